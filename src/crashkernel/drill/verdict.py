"""The verdict: is every byte of K1's memory in the dump, exactly once, and is it this crash's dump?

Nothing here trusts the code that made the dump. What K1's memory was comes from outside (`Truth`); the plan is only asked for
names, so that a wrong byte can be told by what lived there. This module judges raw copies of /proc/vmcore; `filtered`, with
what it finds here, the dumps of `crashkernel capture`.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from crashkernel.drill.dma import LINE, MARK
from crashkernel.errors import CrashkernelError, VerificationError
from crashkernel.formats.elf import EM_PPC64, ET_CORE, NT_PRSTATUS, ElfFile, Note, PrStatus
from crashkernel.formats.vmcoreinfo import VmcoreInfo
from crashkernel.machine import HEAD_SIZE, Region
from crashkernel.memory import Range, RangeSet
from crashkernel.placement.moves import K1
from crashkernel.placement.plan import LoadPlan

if TYPE_CHECKING:
    from pathlib import Path

    from crashkernel.formats.elf import ByteOrder

_CHUNK = 8 << 20
_BLOCK = 4096  # the granularity of wrong ranges while comparing; the ends are then narrowed to bytes
_HEADERS = 16 << 20  # more than any vmcore's headers and notes
_SKIBOOT = "ibm,firmware-"  # mem_region_init and mem_region_add_dt_reserved, skiboot core/mem_region.c
_VPA_SIZE = 0x400  # and its alignment: LPPACA_SIZE, arch/powerpc/kernel/paca.c
_VPA_EYE_CATCHER = b"\xd3\x97\xd7\x81"  # init_lppaca, arch/powerpc/kernel/paca.c
_VPA_DISPATCH_COUNT = range(0x100, 0x104)  # struct lppaca, arch/powerpc/include/asm/lppaca.h
_MOST_DISPATCHES = 16  # seen: 3
_MAX_RANGES = 64  # listed one by one; the counts are always complete
_KERNEL_BASE = 0xC000000000000000


@dataclass(frozen=True, slots=True)
class Truth:
    """What the host saw from outside.

    `memory` is a copy of guest RAM (file offset = physical address) taken when the purgatory's first instruction was about
    to run. K1 itself had overwritten its first 0x100 bytes by then: `head` is what the host read there before the crash.
    """

    memory: Path
    head: bytes
    memory_size: int  # bytes
    reserved: Range  # in K1's kernel's words (/proc/device-tree/chosen, linux,crashkernel-base), not the loader's
    nonce: bytes
    panic: str  # the line K1 printed on its console when it died, without the time stamp
    release: str  # uname -r of K1
    crashed_pid: int | None  # None: whoever was there
    cpus: int  # that left their registers
    firmware: tuple[Region, ...]  # what OPAL reserved on bare metal, in K1's kernel's words; a partition's is below it
    device_problem: str = ""  # why a device that went on writing proves nothing, "" if it does or there was none
    device_buffers: RangeSet = RangeSet()  # K1's memory that a device went on writing to, as K1 had told it  # noqa: RUF009
    says_why: bool = True  # K1 prints a line when it dies; if not, there is none to be looked for
    crashed_cpu: int | None = None  # the CPU whose registers are the crashed task's, if that is known; None: any
    registers: tuple[Mapping[str, int], ...] = ()  # some of a CPU's as the host saw them: each must be in the dump

    @property
    def k1_memory(self) -> RangeSet:
        """What a dump must account for."""
        return RangeSet([Range(0, self.memory_size)]) - RangeSet([self.reserved])


@dataclass(frozen=True, slots=True)
class WrongRange:
    """Bytes of the dump that are not K1's. `range` holds K1 physical addresses; `wrong` counts bytes in it."""

    range: Range
    wrong: int
    what: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Exemption:
    """Memory that firmware below both kernels wrote after the truth was taken: reported, not counted as wrong.

    There are two, and both are recognised by what they are, not by how much changed:

    - the firmware's own memory on bare metal (skiboot's image and heap, the tables of its interrupt and PCI controllers):
      OPAL runs, and logs, as long as the machine does;
    - a CPU's dispatch count in its VPA: the hypervisor counts when the stopped twin goes on, before the purgatory's first
      instruction can take the VPA from it. At most one for each CPU, and at most `_MOST_DISPATCHES` up.
    """

    range: Range
    what: str
    changed: int  # bytes


@dataclass(frozen=True, slots=True)
class PageCount:
    """What a filtered dump has of K1's pages, and what not: all pages of K1's memory are counted once."""

    level: int
    page_size: int
    kept: int
    zeros: int  # of the kept ones, those that are all zeros and share one place in the file
    left_out: dict[str, int]  # lawfully, by class
    lost: int  # left out although no class that the level drops has them
    needless: int  # of the kept ones, those that the level might have left out
    dump_bytes: int


@dataclass(slots=True)
class Verdict:
    """What was found. It passes only if nothing at all is wrong."""

    k1_bytes: int = 0
    bytes_compared: int = 0
    bytes_wrong: int = 0
    bytes_missing: int = 0
    bytes_left_out: int = 0  # lawfully, at the dump level asked for
    bytes_in_device_buffers: int = 0  # that differ, as on any machine with such a device: not among the wrong ones
    wrong_ranges: list[WrongRange] = field(default_factory=list)
    exempt: list[Exemption] = field(default_factory=list)
    first_256_bytes_ok: bool = False
    nonce_found: bool = False
    panic_found: bool = False  # or, of a crash without a word, that there was none to find
    registers_ok: bool = False
    pages: PageCount | None = None  # of a filtered dump
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """PASS only on positive evidence: everything compared, all marks of this crash found, no problem."""
        return (
            not self.problems
            and self.k1_bytes > 0
            and self.bytes_compared > 0
            and self.bytes_compared + self.bytes_left_out == self.k1_bytes
            and self.bytes_wrong == self.bytes_missing == 0
            and self.first_256_bytes_ok
            and self.nonce_found
            and self.panic_found
            and self.registers_ok
        )


def judge(dump: Path, truth: Truth, plan: LoadPlan) -> Verdict:
    """Hold a dump against the truth. Never raises for a bad dump: what is wrong with it is in the verdict."""
    verdict = begin_verdict(truth, plan)
    k1 = truth.k1_memory
    with dump.open("rb") as file, truth.memory.open("rb") as memory:
        size = os.fstat(file.fileno()).st_size
        try:
            head = os.pread(file.fileno(), min(size, _HEADERS), 0)
            # a cut dump still has headers: judge what is there and count the rest as missing
            elf = ElfFile.from_bytes(head, source=dump.name, file_size=1 << 63)
            if (elf.type, elf.machine) != (ET_CORE, EM_PPC64):
                verdict.problems.append(f"not a ppc64 core file: ELF type {elf.type}, machine {elf.machine}")
            pieces = _pieces(elf, k1, size, verdict)
            _compare(file.fileno(), memory.fileno(), pieces, truth, plan, verdict)
            judge_registers(elf.notes(head), elf.byteorder, truth, plan, verdict)
        except CrashkernelError as error:
            verdict.problems.append(error.message)
            verdict.bytes_missing = verdict.k1_bytes - verdict.bytes_compared
    summarise(verdict)
    return verdict


def begin_verdict(truth: Truth, plan: LoadPlan) -> Verdict:
    """A verdict with what can be said before the dump is looked at."""
    verdict = Verdict(k1_bytes=truth.k1_memory.total)
    if plan.reserved != truth.reserved:
        verdict.problems.append(f"the plan's reserved region {plan.reserved} is not the kernel's {truth.reserved}")
    if truth.device_problem:
        verdict.problems.append(truth.device_problem)
    return verdict


@dataclass(frozen=True, slots=True)
class _Piece:
    """K1's bytes of `range` are said to lie at `file_offset` of the dump."""

    range: Range
    file_offset: int


def _pieces(elf: ElfFile, k1: RangeSet, size: int, verdict: Verdict) -> list[_Piece]:
    """The PT_LOADs as pieces of K1's memory, each byte once; anything else goes to the verdict."""
    pieces = []
    covered = RangeSet([])
    for segment in sorted(elf.loads, key=lambda s: s.paddr):
        if segment.file_size != segment.memory_size:
            verdict.problems.append(f"PT_LOAD at {segment.paddr:#x}: {segment.file_size:#x} bytes of {segment.memory_size:#x}")
        if not segment.file_size:
            continue
        whole = Range.sized(segment.paddr, segment.file_size)
        if segment.vaddr != _KERNEL_BASE + segment.paddr:
            verdict.problems.append(f"PT_LOAD {whole} has virtual address {segment.vaddr:#x}")
        if covered.overlaps(whole):
            verdict.problems.append(f"PT_LOADs cover {' '.join(str(r) for r in covered & RangeSet([whole]))} more than once")
        foreign = RangeSet([whole]) - k1
        if foreign:
            verdict.problems.append(f"PT_LOADs cover what is no memory of K1's: {foreign}")
        for part in (RangeSet([whole]) & k1) - covered:
            at = segment.file_offset + part.start - whole.start
            present = min(part.size, max(0, size - at))
            if present < part.size:
                verdict.problems.append(f"the dump ends at {size:#x}, inside or before K1's {part}")
            if present:
                pieces.append(_Piece(Range.sized(part.start, present), at))
        covered |= RangeSet([whole])
    uncovered = k1 - covered
    if uncovered:
        verdict.problems.append(f"no PT_LOAD covers K1's {uncovered}")
    verdict.bytes_missing = verdict.k1_bytes - sum(piece.range.size for piece in pieces)
    return pieces


def _compare(dump: int, memory: int, pieces: list[_Piece], truth: Truth, plan: LoadPlan, verdict: Verdict) -> None:
    """Compare all pieces in chunks, two at a time: reading is most of the work, and needs no interpreter."""
    marks = _Marks([truth.nonce, truth.panic.encode()] if truth.panic else [truth.nonce])
    buffers = threading.local()
    wrong: list[Wrong] = []
    head_bytes = 0

    def compare(chunk: _Piece) -> tuple[_Piece, int, list[Wrong]]:
        if not hasattr(buffers, "pair"):
            buffers.pair = bytearray(_CHUNK), bytearray(_CHUNK)
        ours, theirs = buffers.pair
        start, size = chunk.range.start, chunk.range.size
        _read(dump, ours, size, chunk.file_offset)
        _read(memory, theirs, size, start)
        right_head = 0
        if start < HEAD_SIZE:
            part = truth.head[start : start + size]
            theirs[: len(part)] = part
            right_head = len(part) if ours[: len(part)] == part else 0
        marks.look(ours, size)
        same = ours == theirs if size == _CHUNK else ours[:size] == theirs[:size]
        return chunk, right_head, [] if same else list(wrong_blocks(ours, theirs, size, start))

    with ThreadPoolExecutor(max_workers=2) as pool:
        for chunk, right_head, blocks in pool.map(compare, _chunks(pieces)):
            head_bytes += right_head
            verdict.bytes_compared += chunk.range.size
            wrong += excuse(blocks, truth, verdict)
    verdict.first_256_bytes_ok = head_bytes == HEAD_SIZE
    count_wrong(wrong, plan, verdict)
    verdict.nonce_found = marks.found(truth.nonce, dump)
    verdict.panic_found = marks.found(truth.panic.encode(), dump) if truth.panic else not truth.says_why
    if not verdict.nonce_found:
        verdict.problems.append("this run's nonce is not in the dump: it is another crash's dump, or memory is lost")
    if not verdict.panic_found:
        verdict.problems.append(f"this crash's panic message is not in the dump: {truth.panic!r}")


def _chunks(pieces: list[_Piece]) -> Iterator[_Piece]:
    for piece in pieces:
        for start in range(piece.range.start, piece.range.end, _CHUNK):
            end = min(start + _CHUNK, piece.range.end)
            yield _Piece(Range(start, end), piece.file_offset + start - piece.range.start)


class _Marks:
    """Bytes that only this crash's memory holds, looked for in each chunk as it passes."""

    def __init__(self, marks: list[bytes]) -> None:
        self._missing = set(marks)

    def look(self, chunk: bytearray, size: int) -> None:
        for mark in tuple(self._missing):
            if chunk.find(mark, 0, size) >= 0:
                self._missing.discard(mark)

    def found(self, mark: bytes, dump: int) -> bool:
        if mark not in self._missing:
            return True
        # it may lie across two chunks
        size = os.fstat(dump).st_size
        if size == 0:
            return False
        with mmap.mmap(dump, size, prot=mmap.PROT_READ) as data:
            return data.find(mark) >= 0


@dataclass(frozen=True, slots=True)
class Wrong:
    """A block of `_BLOCK` bytes with differences; `range` is from its first to its last wrong byte."""

    start: int
    dumped: bytes
    true: bytes
    places: tuple[int, ...]  # offsets of the wrong bytes

    @property
    def range(self) -> Range:
        """From the first wrong byte to the last, K1 physical."""
        return Range(self.start + self.places[0], self.start + self.places[-1] + 1)

    @property
    def wrong(self) -> int:
        """How many bytes are wrong."""
        return len(self.places)


def excuse(blocks: Iterable[Wrong], truth: Truth, verdict: Verdict) -> Iterator[Wrong]:
    """What is wrong once the exemptions are told apart, which go to the verdict."""
    live = [region for region in truth.firmware if region.name == "OPAL" or region.name.startswith(_SKIBOOT)]
    for block in blocks:
        region = next((region for region in live if region.range.contains(block.range)), None)
        if region is not None:
            verdict.exempt.append(Exemption(block.range, region.name, block.wrong))
            continue
        for part in _outside_device_buffers(block, truth, verdict):
            yield from _without_dispatch_counts(part, truth, verdict)


def count_wrong(blocks: list[Wrong], plan: LoadPlan, verdict: Verdict) -> None:
    """Put what is wrong into the verdict, with what lived there."""
    verdict.bytes_wrong = sum(block.wrong for block in blocks)
    verdict.wrong_ranges = _describe(blocks, plan)


def _outside_device_buffers(block: Wrong, truth: Truth, verdict: Verdict) -> list[Wrong]:
    """Count the bytes that a device wrote where it was told to, and leave the others."""
    if not truth.device_buffers.overlaps(block.range):
        return [block]
    places = tuple(place for place in block.places if not _devices(block, place, truth))
    verdict.bytes_in_device_buffers += block.wrong - len(places)
    return [Wrong(block.start, block.dumped, block.true, places)] if places else []


def _devices(block: Wrong, place: int, truth: Truth) -> bool:
    """Whether that byte is in a buffer and in a line that the device wrote: it marks each. Anything else there is wrong."""
    line = place // LINE * LINE
    return block.start + place in truth.device_buffers and block.dumped[line : line + len(MARK)] == MARK


def _without_dispatch_counts(block: Wrong, truth: Truth, verdict: Verdict) -> list[Wrong]:
    """Move what the hypervisor counted in a VPA from the wrong bytes to the exemptions."""
    places = set(block.places)
    if truth.firmware:  # bare metal: no hypervisor counts
        return [block]
    for vpa in range(0, len(block.true), _VPA_SIZE):
        if block.true[vpa : vpa + 4] != _VPA_EYE_CATCHER:
            continue
        field_bytes = slice(vpa + _VPA_DISPATCH_COUNT.start, vpa + _VPA_DISPATCH_COUNT.stop)
        before, after = (int.from_bytes(data[field_bytes], "big") for data in (block.true, block.dumped))
        counted = places & {vpa + offset for offset in _VPA_DISPATCH_COUNT}
        if counted and 0 < after - before <= _MOST_DISPATCHES and len(verdict.exempt) < truth.cpus:
            places -= counted
            where = Range.sized(block.start + field_bytes.start, len(_VPA_DISPATCH_COUNT))
            verdict.exempt.append(Exemption(where, f"VPA dispatch count, {before} to {after}", len(counted)))
    return [Wrong(block.start, block.dumped, block.true, tuple(sorted(places)))] if places else []


def _read(descriptor: int, buffer: bytearray, size: int, offset: int) -> None:
    view = memoryview(buffer)[:size]
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise VerificationError(f"a file ended at {offset:#x} while it was compared")
        view, offset = view[count:], offset + count


def wrong_blocks(ours: bytearray | memoryview, theirs: bytearray | memoryview, size: int, start: int) -> Iterator[Wrong]:
    """The blocks of `_BLOCK` bytes in which two buffers differ; they hold `size` bytes of K1 from physical `start` on."""
    a, b = np.frombuffer(ours, np.uint8, size), np.frombuffer(theirs, np.uint8, size)
    for number in np.unique(np.flatnonzero(a != b) // _BLOCK):
        at = int(number) * _BLOCK
        mine, true = a[at : at + _BLOCK], b[at : at + _BLOCK]
        yield Wrong(start + at, mine.tobytes(), true.tobytes(), tuple(np.flatnonzero(mine != true).tolist()))


def _describe(blocks: list[Wrong], plan: LoadPlan) -> list[WrongRange]:
    """Neighbouring blocks as one range each, with what lives there and what seems to have happened."""
    # the same bytes elsewhere among the wrong blocks: pages that changed places
    true_home = {block.true: block.start for block in blocks if any(block.true)}
    merged: list[tuple[Range, int, str, str]] = []
    last_alike: tuple[object, ...] = ()
    for block in blocks:
        what = describe_place(block.range.start, plan)
        note = ""
        home = true_home.get(block.dumped)
        if home is not None:
            note = f"holds what belongs at {home:#x}"
        elif not any(block.dumped):
            note = "zeros"
        elif MARK in block.dumped:
            note = "the rogue device wrote there"
        # addresses in `what` and `note` grow with the block's own: neighbours are alike if these run in step
        shift = next((k.location - k.range.start for k in plan.kept if block.range.start in k.range), None)
        alike = (*_names(block.range.start, plan), shift, note if home is None else home - block.start)
        if merged and alike == last_alike and block.range.start - merged[-1][0].end < _BLOCK:
            previous, wrong, what, note = merged[-1]
            merged[-1] = (Range(previous.start, block.range.end), wrong + block.wrong, what, note)
        else:
            merged.append((block.range, block.wrong, what, note))
        last_alike = alike
    return [WrongRange(*item) for item in merged]


def describe_place(paddr: int, plan: LoadPlan) -> str:
    """What lives at a physical address of K1, in the words of a report."""
    parts = _names(paddr, plan)
    for kept in plan.kept:
        if paddr in kept.range and kept.location != kept.range.start:
            parts.append(f"moved to {kept.location + paddr - kept.range.start:#x}")
    return ", ".join(parts) or f"{K1} memory"


def _names(paddr: int, plan: LoadPlan) -> list[str]:
    names = ["K1's first 0x100 bytes"] if paddr < HEAD_SIZE else []
    names += [region.name for region in (*plan.firmware, *plan.k1_layout) if paddr in region.range]
    if any(paddr in note for note in plan.notes):
        names.append("crash notes")
    return names


def judge_registers(found: Iterable[Note], byteorder: ByteOrder, truth: Truth, plan: LoadPlan, verdict: Verdict) -> None:
    """The ELF notes: VMCOREINFO of this kernel, and the registers of the task that crashed.

    :raise FormatError: they are no notes.
    """
    problems = []
    notes = list(found)
    info = next((note for note in notes if note.name == "VMCOREINFO"), None)
    if info is None:
        problems.append("no VMCOREINFO note")
    else:
        release = VmcoreInfo.from_bytes(info.desc).release
        if release != truth.release:
            problems.append(f"VMCOREINFO is of kernel {release}, K1 was {truth.release}")
    saved = [note.desc for note in notes if note.type == NT_PRSTATUS]
    tasks = [PrStatus.from_bytes(desc, byteorder) for desc in saved]
    if len(saved) != truth.cpus:
        problems.append(f"the dump has the registers of {len(saved)} CPUs, the machine had {truth.cpus}")
    if any(desc not in _note_buffers(truth, plan) for desc in saved):
        problems.append("registers in the dump are not those K1 saved when it died")
    problems += _judge_crashed(saved, tasks, truth, plan)
    verdict.registers_ok = not problems
    verdict.problems += problems


def _judge_crashed(saved: list[bytes], tasks: list[PrStatus], truth: Truth, plan: LoadPlan) -> Iterator[str]:
    """Whether the registers are those of whoever crashed: what is wrong with them."""
    text = next((region.range for region in plan.k1_layout if region.name == "K1 text"), None)
    crashed = [
        number
        for number, task in enumerate(tasks)
        if task.pid == truth.crashed_pid and (text is None or task.registers["nip"] - _KERNEL_BASE in text)
    ]
    if truth.crashed_pid is not None and not crashed:
        yield f"no CPU's registers belong to the task that crashed (pid {truth.crashed_pid})"
    elif crashed and truth.crashed_cpu is not None:
        # the first note is VMCOREINFO's, the others are the CPUs'
        buffer = _note_buffer(plan.notes[1 + truth.crashed_cpu], truth)
        if not any(saved[number] in buffer for number in crashed):
            yield f"the registers of the task that crashed (pid {truth.crashed_pid}) are not those of CPU {truth.crashed_cpu}"
    if truth.crashed_pid is None and not truth.registers and text is not None:
        for task in tasks:
            if task.registers["nip"] - _KERNEL_BASE not in text:
                yield f"a CPU's registers are none of a kernel: it was at {task.registers['nip']:#x}"
    for wanted in truth.registers:
        if not any(all(task.registers[name] == value for name, value in wanted.items()) for task in tasks):
            yield f"no CPU has the registers that one had when K1 was made to die: {_different(wanted, tasks)}"


def _different(wanted: Mapping[str, int], tasks: list[PrStatus]) -> str:
    """Where the nearest CPU's registers are others."""
    differences = [
        {name: task.registers[name] for name, value in wanted.items() if task.registers[name] != value} for task in tasks
    ]
    nearest = min(differences, key=len, default={})
    return ", ".join(f"{name} is {value:#x}, was {wanted[name]:#x}" for name, value in nearest.items()) or "there are none"


def _note_buffers(truth: Truth, plan: LoadPlan) -> bytes:
    """K1's crash_notes as the host saw them: the plan says where to look, the truth what is there."""
    return b"".join(_note_buffer(note, truth) for note in plan.notes)


def _note_buffer(note: Range, truth: Truth) -> bytes:
    with truth.memory.open("rb") as memory:
        return os.pread(memory.fileno(), min(note.size, _BLOCK), note.start)


def summarise(verdict: Verdict) -> None:
    """The last problems, from the counts."""
    if verdict.bytes_wrong:
        count = len(verdict.wrong_ranges)
        verdict.problems.append(f"{verdict.bytes_wrong} bytes are wrong, in {count} range{'s' * (count != 1)}")
        verdict.wrong_ranges = verdict.wrong_ranges[:_MAX_RANGES]
    if verdict.bytes_missing and not any("ends at" in p or "covers K1" in p for p in verdict.problems):
        verdict.problems.append(f"{verdict.bytes_missing} bytes are missing")
    if not verdict.first_256_bytes_ok:
        verdict.problems.append("K1's first 0x100 bytes are not what they were before the crash")
