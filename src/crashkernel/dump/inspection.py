"""What a dump says of the crash, and whether it is whole: what `crashkernel inspect` and `crashkernel verify` print.

References: Linux `arch/x86/include/asm/user_64.h` (struct user_regs_struct, the registers of x86_64's NT_PRSTATUS) and
`lib/dump_stack.c` (dump_stack_print_info: the line that names the task).
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crashkernel.dump.dumpfile import (
    Completeness,
    Dump,
    KdumpFile,
    PageStatistics,
    count_pages,
    file_size,
    how_whole,
    is_flattened,
    open_dump,
    require_file,
)
from crashkernel.dump.structure import FaultList, Faults, check_structure
from crashkernel.errors import EnvironmentFault, FormatError, UsageError
from crashkernel.formats.diskdump import Utsname
from crashkernel.formats.elf import EM_PPC64, NT_PRSTATUS, PrStatus, iter_notes
from crashkernel.target.manifest import Manifest, digest_file, manifest_name
from crashkernel.vmcore.dmesg import panic_line, read_log
from crashkernel.vmcore.identity import Identity
from crashkernel.vmcore.kernel import CrashedKernel

Tell = Callable[[str, int, int], None]
"""How far something is: what, how many of how many."""

X86_64_REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_X86_64_PRSTATUS = 112 + 8 * len(X86_64_REGISTERS)
_PRSTATUS_PID, _PRSTATUS_REGISTERS = 32, 112  # struct elf_prstatus, the same on all 64-bit machines

# "CPU: 1 PID: 7 Comm: sh Kdump: loaded Not tainted 6.1.0", and since 6.12 "CPU: 1 UID: 0 PID: 7 Comm: ..."
_TASK = re.compile(r"\bCPU: (\d+) (?:UID: \d+ )?PID: (\d+) Comm: (.{1,15}?) (?:Kdump: |Not tainted|Tainted)")


@dataclass(frozen=True, slots=True)
class Task:
    """Who ran where when the kernel died, by its log."""

    cpu: int
    pid: int
    name: str


@dataclass(frozen=True, slots=True)
class Cpu:
    """The registers of one CPU, in the dump's order; `pid` is its task's, 0 the idle one's."""

    pid: int
    registers: Mapping[str, int]
    crashed: bool

    @property
    def pc(self) -> int:
        """The instruction it was at: a virtual address."""
        return self.registers["nip" if "nip" in self.registers else "rip"]


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that a dump says without debug symbols. `remarks` is what could not be had, or cannot be right."""

    path: str
    format: str
    codec: str
    size: int  # bytes of the file
    completeness: Completeness
    level: int | None  # None: the format does not say
    page_size: int
    machine: str
    release: str
    version: str
    node: str
    crash_time: int | None
    panic: str
    task: Task | None
    cpus: tuple[Cpu, ...]
    pages: PageStatistics
    log: str
    manifest: Manifest | None
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same for programs; registers are hexadecimal strings, the log is not in it."""
        record = asdict(self)
        del record["log"], record["manifest"]
        record["pages"]["dropped"] = self.pages.dropped
        for cpu in record["cpus"]:
            cpu["registers"] = {name: f"{value:#x}" for name, value in cpu["registers"].items()}
        record["dropped_by_class"] = self.dropped_by_class
        record["unreadable"] = None if self.manifest is None else self.manifest.contents.pages.unreadable
        return record

    @property
    def dropped_by_class(self) -> dict[str, int] | None:
        """By its manifest, how many pages of each class are not in the dump."""
        if self.manifest is None:
            return None
        pages = asdict(self.manifest.contents.pages)
        return {name: number for name, number in pages.items() if name not in _KEPT}


_KEPT = ("kept", "zero", "unreadable")  # fields of `PageCounts` that count pages in the dump


def _never_read(manifest: Manifest) -> list[str]:
    """What is to be said of pages that the source would not give when the dump was written: no check of the dump can tell."""
    count = manifest.contents.pages.unreadable
    what = "1 page is" if count == 1 else f"{count:,} pages are"
    return [f"{what} zeros because the source would not give {'it' if count == 1 else 'them'}"] if count else []


# ------------------------------------------------------------------------------------------------------------- inspect


def inspect(dump: Dump, manifest: Manifest | None = None, tell: Tell = lambda *_: None) -> Inspection:
    """Look at a dump that is open. No page is read but those of the log and of the kernel's own tables.

    :raise FormatError: a page's descriptor or the bitmaps cannot be read.
    :raise EnvironmentFault: the file cannot be read, or a codec is not installed.
    """
    remarks: list[str] = []
    log = ""
    names = dump.header.utsname if isinstance(dump, KdumpFile) else Utsname()
    try:
        kernel = CrashedKernel(dump)
        try:
            if not isinstance(dump, KdumpFile):
                names = Identity.of(kernel).utsname
            log = read_log(kernel)
        finally:
            remarks += kernel.doubts
    except FormatError as error:
        remarks.append(f"its log cannot be read: {error}")
    total = dump.pages if isinstance(dump, KdumpFile) else 0
    pages = count_pages(dump, lambda done: tell("page descriptors", done, total))
    task = crashed_task(log)
    whole = how_whole(dump, pages)
    completeness = whole.completeness
    remarks += whole.reasons
    if manifest is not None:
        remarks += _never_read(manifest)
    if manifest is not None and manifest.size != file_size(dump):
        remarks.append(f"its manifest says that it has {manifest.size:,} bytes")
        completeness = "truncated" if manifest.size > file_size(dump) else completeness
    return Inspection(
        path=dump.name,
        format=format_name(dump),
        codec=", ".join(sorted(name for name in pages.codecs if name != "none")) or "none",
        size=file_size(dump),
        completeness=completeness,
        level=dump.level if isinstance(dump, KdumpFile) else None,
        page_size=dump.page_size,
        machine=names.machine,
        release=dump.vmcoreinfo.release,
        version=names.version,
        node=names.nodename,
        crash_time=dump.vmcoreinfo.crash_time,
        panic=panic_line(log) or "",
        task=task,
        cpus=tuple(_cpus(dump, task, remarks)),
        pages=pages,
        log=log,
        manifest=manifest,
        remarks=tuple(remarks),
    )


def format_name(dump: Dump) -> str:
    """What a dump's format is called, as in its manifest, and that it is flattened."""
    name = "kdump-compressed" if isinstance(dump, KdumpFile) else "elf"
    return f"flattened {name}" if is_flattened(dump) else name


def crashed_task(log: str) -> Task | None:
    """Who ran on the CPU that died: the first task that the log names from the line on that says why, or the last one."""
    lines = log.splitlines()
    panic = panic_line(log)
    start = next((index for index in range(len(lines) - 1, -1, -1) if panic and panic in lines[index]), 0)
    after = [found for line in lines[start:] if (found := _TASK.search(line))] if panic else []
    last = next((found for line in reversed(lines) if (found := _TASK.search(line))), None)
    found = after[0] if after else last
    return Task(int(found[1]), int(found[2]), found[3]) if found else None


def _cpus(dump: Dump, task: Task | None, remarks: list[str]) -> list[Cpu]:
    states: list[tuple[int, Mapping[str, int]]] = []
    try:
        for note in iter_notes(dump.notes, dump.byteorder, dump.name):
            if note.name == "CORE" and note.type == NT_PRSTATUS:
                states.append(_registers(dump, note.desc))
    except FormatError as error:
        remarks.append(f"registers of a CPU cannot be read: {error}")
    # A CPU that was offline has no note, so that the notes' order is not the CPUs' numbers; a pid but idle's names one.
    crashed = -1
    if task is not None:
        same = [index for index, (pid, _) in enumerate(states) if pid == task.pid]
        crashed = same[0] if len(same) == 1 else task.cpu if task.cpu in same else -1
    if crashed < 0 and len(states) == 1:
        crashed = 0
    return [Cpu(pid, registers, index == crashed) for index, (pid, registers) in enumerate(states)]


def _registers(dump: Dump, desc: bytes) -> tuple[int, Mapping[str, int]]:
    if dump.machine == EM_PPC64:
        status = PrStatus.from_bytes(desc, dump.byteorder)
        return status.pid, status.registers
    if len(desc) < _X86_64_PRSTATUS:
        raise FormatError(f"an NT_PRSTATUS note of x86_64 has at least {_X86_64_PRSTATUS} bytes, this one {len(desc)}")
    values = struct.unpack_from(f"<{len(X86_64_REGISTERS)}Q", desc, _PRSTATUS_REGISTERS)
    (pid,) = struct.unpack_from("<i", desc, _PRSTATUS_PID)
    return pid, dict(zip(X86_64_REGISTERS, values, strict=True))


# -------------------------------------------------------------------------------------------------------------- verify


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found: `checks` are done, in words, `problems` were found by them, `remarks` could not be checked."""

    path: str
    manifest: bool
    checks: tuple[str, ...]
    problems: Faults
    remarks: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems.count

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "path": self.path,
            "good": self.good,
            "manifest": self.manifest,
            "checks": list(self.checks),
            "problems": list(self.problems.first),
            "problem_count": self.problems.count,
            "remarks": list(self.remarks),
        }


def find_manifest(path: Path) -> tuple[Manifest | None, int]:
    """The manifest of a dump, beside it or in front of it on a device, and where the dump begins in the file.

    :raise FormatError: there is one, but it is damaged.
    :raise UsageError: it cannot be read, or there is no such dump.
    """
    require_file(path)
    if path.is_block_device():
        from crashkernel.target.device import open_device_dump  # noqa: PLC0415 - the targets are many, and rarely needed

        start, _, manifest = open_device_dump(path)
        return manifest, start
    beside = path.with_name(manifest_name(path.name))
    try:
        with beside.open("rb") as file:
            return Manifest.from_json(file.read(_MANIFEST_LIMIT), str(beside)), 0
    except FileNotFoundError:
        return None, 0
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # so nobody can have written it
            return None, 0
        raise UsageError(f"cannot read {beside}: {error.strerror}") from error


_MANIFEST_LIMIT = (1 << 20) + 1  # one byte more than a manifest may have


def verify(path: Path, tell: Tell = lambda *_: None) -> Verification:
    """Hold a dump against its manifest, and against its own structure: each descriptor, each page.

    :raise UsageError: there is no such file, or it is no dump and has no manifest.
    :raise EnvironmentFault: it cannot be read, or a codec is not installed.
    """
    faults, checks, remarks = FaultList(), [], []
    manifest: Manifest | None = None
    start, damaged = 0, False
    try:
        manifest, start = find_manifest(path)
        if manifest is None:
            remarks.append(
                f"there is no {manifest_name(path.name)} beside it: bytes that no codec checks cannot be vouched for"
            )
    except FormatError as error:
        damaged = True
        faults.add(str(error))
    if manifest is not None:
        checks.append(check_digest(path, manifest, start, faults, tell))
        remarks += _never_read(manifest)
    if manifest is not None and manifest.encrypted_to is not None:
        remarks.append(f"it is encrypted to {manifest.encrypted_to}: what is in it was not looked at")
        return Verification(str(path), True, tuple(checks), faults.all(), tuple(remarks))
    try:
        with open_dump(path) as dump:
            checks.append(_check_contents(dump, manifest, faults, tell))
    except FormatError as error:
        if manifest is None and not damaged and not _claims_to_be_a_dump(path):
            raise
        faults.add(str(error))
    return Verification(str(path), manifest is not None, tuple(checks), faults.all(), tuple(remarks))


def _claims_to_be_a_dump(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(16)
    return head.startswith((b"KDUMP   ", b"makedumpfile", b"\x7fELF", b"crashkernel dump"))


class Counter:
    """Counts things as they are done, and tells."""

    def __init__(self, what: str, total: int, tell: Tell) -> None:
        self._what, self._total, self._tell = what, total, tell
        self._done = 0

    def count(self) -> None:
        """One more."""
        self._done += 1
        self._tell(self._what, self._done, self._total)


def check_digest(path: Path, manifest: Manifest, start: int, faults: FaultList, tell: Tell) -> str:
    """Hold a file's name, size and bytes against its manifest; what was done, in words.

    :raise EnvironmentFault: it cannot be read.
    """
    if manifest.file != path.name and not path.is_block_device():
        faults.add(f"its manifest is that of {manifest.file}")
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - start
            if size != manifest.size and not path.is_block_device():
                faults.add(f"it has {size:,} bytes, by its manifest {manifest.size:,}")
            if size < manifest.size:
                return "its size"
            pieces = Counter("digest", -(-manifest.size // manifest.digest.piece_size), tell)
            digest = digest_file(file.fileno(), manifest.size, start=start, progress=pieces.count)
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror or error}") from error
    if digest != manifest.digest:
        faults.add("its bytes are not those that were written: its digest differs from its manifest's")
    return f"{manifest.size:,} bytes against the digest in its manifest"


def _check_contents(dump: Dump, manifest: Manifest | None, faults: FaultList, tell: Tell) -> str:
    """The structure, and that the dump is the one that its manifest describes."""
    if isinstance(dump, KdumpFile):
        workers = len(os.sched_getaffinity(0))
        found = check_structure(dump, lambda done, total: tell("pages", done, total), workers=workers)
        faults.extend(found)
        pages = dump.pages
        check = f"{pages:,} pages: each descriptor, and that each can be had"
    else:
        counted = count_pages(dump)
        pages = counted.kept - counted.missing
        for text in how_whole(dump, counted).reasons:
            faults.add(text)
        check = f"headers, notes and that {pages:,} pages are in the file; plain ELF has nothing to check a page by"
    if manifest is not None:
        contents = manifest.contents
        expected = contents.pages.kept
        said: tuple[tuple[str, object, object], ...] = (
            ("kernel", contents.release, dump.vmcoreinfo.release),
            ("page size", contents.page_size, dump.page_size),
        )
        if isinstance(dump, KdumpFile):
            said = (*said, ("dump level", contents.level, dump.level), ("number of pages", expected, pages))
        for what, by_manifest, by_dump in said:
            if by_manifest != by_dump:
                faults.add(f"its {what} is {by_dump}, by its manifest {by_manifest}")
    return check
