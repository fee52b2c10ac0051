"""inspect, verify, convert: what can be done with a dump. numpy and the codecs are imported when one is opened."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from crashkernel.cli.command import add_command, require_numpy, write
from crashkernel.errors import CrashkernelError, EnvironmentFault, FormatError, UsageError
from crashkernel.memory import format_size
from crashkernel.report.terminal import visible

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from crashkernel.dump.dumpfile import Dump
    from crashkernel.dump.inspection import Cpu, Inspection, Verification

_FORMS = ("kdump", "flattened", "elf")  # dump/conversion.py has them; importing it costs what --help need not pay
_CODECS = ("zstd", "lzo", "snappy", "zlib", "none")  # likewise capture/codec.py
_LOG_LINES = 12
_REGISTERS_A_LINE = 4
_PATIENCE = 2.0  # seconds before anything is said of how far it is
_PERIOD = 10.0  # seconds between two such lines that are no terminal's

_INSPECT_EPILOG = """examples:
  crashkernel inspect vmcore                            what crashed, and is the dump whole?
  crashkernel inspect --dmesg vmcore | less             all of the kernel's log
  crashkernel inspect --registers vmcore                the registers of every CPU
  crashkernel inspect --vmlinux /usr/lib/debug/boot/vmlinux-6.1.0-49-powerpc64le vmcore
                                                        with a backtrace of the task that crashed (needs drgn)
  crashkernel inspect --json - vmcore | jq .panic

reads: ELF vmcores (/proc/vmcore too), kdump-compressed dumps (zlib, lzo, snappy, zstd), flattened streams of either, and
block devices that `crashkernel capture` wrote to

exit status: 0 read, and it looks whole, 1 read, but incomplete or truncated, 2 no dump, 3 something is not installed or cannot
be read
"""

_VERIFY_EPILOG = """examples:
  crashkernel verify /var/crash/*/vmcore
  crashkernel verify --json - vmcore                    for scripts

A dump is held against its manifest (vmcore.manifest.json beside it): its size, its digest, how many pages it must have. Then
its structure is gone over: headers, bitmaps, the descriptor and the data of each page, every one of which is decompressed.

exit status: 0 all good, 1 not, with each problem listed, 2 no dump, 3 something is not installed or cannot be read; of many
dumps the highest
"""

_CONVERT_EPILOG = """examples:
  crashkernel convert vmcore vmcore.zlib --codec zlib   for a reader without zstd
  crashkernel convert vmcore vmcore.elf --format elf    for gdb, or for a reader of plain ELF
  crashkernel convert --format kdump vmcore.flat vmcore
  ssh host cat /var/crash/vmcore.flat | crashkernel convert - vmcore
  crashkernel convert vmcore - --format flattened | ssh host 'cat > vmcore.flat'

The output appears whole or not at all; nothing that exists is overwritten. A dump that is incomplete, or not what its manifest
says, is refused. From a plain ELF vmcore all pages are taken: `crashkernel capture` filters.

exit status: 0 made, 1 refused or given up: the dump is incomplete or damaged, or not what its manifest says, 2 no dump, or the
request makes no sense, 3 something is not installed, or cannot be read or written
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the three commands to the parser."""
    inspect = add_command(commands, "inspect", "what a dump says of the crash, and how complete it is", _INSPECT_EPILOG)
    inspect.add_argument("dump", type=Path)
    inspect.add_argument("--dmesg", action="store_true", help="print all of the kernel's log, and nothing else")
    inspect.add_argument("--registers", action="store_true", help="print all registers of every CPU")
    inspect.add_argument(
        "--vmlinux", type=Path, metavar="FILE", help="the kernel with debug symbols: print a backtrace (needs drgn)"
    )
    _add_json(inspect)
    inspect.set_defaults(run=_inspect)

    verify = add_command(commands, "verify", "hold dumps against their manifests and their own structure", _VERIFY_EPILOG)
    verify.add_argument("dumps", type=Path, nargs="+", metavar="dump")
    _add_json(verify)
    verify.set_defaults(run=_verify)

    convert = add_command(commands, "convert", "make a dump into one of another format or codec", _CONVERT_EPILOG)
    convert.add_argument("dump", type=Path, help="the dump; '-' is a flattened stream on standard input")
    convert.add_argument("output", type=Path, help="a new file; '-' is standard output, for --format flattened or elf")
    convert.add_argument("--format", choices=_FORMS, default="kdump", help="default: %(default)s")
    convert.add_argument(
        "--codec", choices=_CODECS, help="default: the dump's own; for an ELF vmcore zstd, or what is installed"
    )
    _add_json(convert)
    convert.set_defaults(run=_convert)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON ('-' for standard output)")


def _put_json(path: Path | None, record: object) -> bool:
    """Write the record where it is wanted; whether that was standard output, which then gets nothing else."""
    if path is None:
        return False
    text = json.dumps(record, indent=1) + "\n"
    if str(path) == "-":
        _print(text, end="")
        return True
    write(path, text, "--json")
    return False


def _print(*lines: str, end: str = "\n") -> None:
    """Print lines, and see to it that they are out.

    :raise EnvironmentFault: standard output does not take them.
    """
    try:
        for line in lines:
            print(line, end=end)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # its reader has had enough
    except OSError as error:
        # what is still in the buffer would be tried once more, and complained of, when Python ends
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise EnvironmentFault(f"cannot write to standard output: {error.strerror}") from error


# ------------------------------------------------------------------------------------------------------------- inspect


def _inspect(arguments: argparse.Namespace) -> int:
    require_numpy()
    from crashkernel.dump import inspection  # noqa: PLC0415
    from crashkernel.dump.dumpfile import open_dump  # noqa: PLC0415

    if arguments.dmesg and (arguments.registers or arguments.vmlinux or arguments.json):
        raise UsageError("--dmesg prints the log and nothing else", hint="leave the other options out")
    manifest, remark = None, ""
    try:
        manifest, _ = inspection.find_manifest(arguments.dump)
    except FormatError as error:
        remark = str(error)
    with open_dump(arguments.dump) as dump, _Progress() as progress:
        found = inspection.inspect(dump, manifest, progress.tell)
        frames: tuple[str, ...] = ()
        if arguments.vmlinux is not None:
            frames = _backtrace(dump, found, arguments.vmlinux)
    status = 0 if found.completeness == "whole" else 1
    if arguments.dmesg:
        if not found.log:
            raise FormatError("; ".join(found.remarks) or "its log is empty", source=str(arguments.dump))
        _print(found.log, end="")
        return status
    record = found.to_json()
    if arguments.vmlinux is not None:
        record["backtrace"] = list(frames)
    if _put_json(arguments.json, record):
        return status
    lines = list(_report(found, remark, every_register=arguments.registers))
    if frames:
        lines += ["", "backtrace of the task that crashed:", *(f"  {frame}" for frame in frames)]
    _print(*map(visible, lines))
    return status


def _backtrace(dump: Dump, found: Inspection, vmlinux: Path) -> tuple[str, ...]:
    from crashkernel.dump.backtrace import backtrace  # noqa: PLC0415
    from crashkernel.dump.dumpfile import require_file  # noqa: PLC0415

    require_file(vmlinux)
    crashed = next((cpu for cpu in found.cpus if cpu.crashed), None)
    if crashed is None:
        raise FormatError("which CPU crashed is not known, so there is no backtrace", source=found.path)
    return backtrace(dump, crashed.registers, vmlinux)


def _report(found: Inspection, remark: str, *, every_register: bool) -> Iterator[str]:
    codec = "" if found.codec == "none" else f" ({found.codec})"
    level = "" if found.level is None else f", dump level {found.level}"
    yield f"{found.path}: {found.format}{codec}{level}, {format_size(found.size)}, {found.completeness}"
    yield _field("kernel", f"{found.release} {found.version}".strip())
    count = len(found.cpus)
    yield _field(
        "machine",
        f"{found.machine}, {count} CPU{'' if count == 1 else 's'}, pages of {format_size(found.page_size)}"
        + (f", {found.node}" if found.node not in ("", "(none)") else ""),
    )
    if found.crash_time is not None:
        yield _field("crashed", datetime.fromtimestamp(found.crash_time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
    yield _field("panic", found.panic or "no message in its log says why")
    if found.task is not None:
        yield _field("task", f"{found.task.name} (pid {found.task.pid}) on CPU {found.task.cpu}")
    yield from _pages(found)
    if found.manifest is not None:
        yield _field("manifest", "there is one; crashkernel verify holds the dump against it")
    for each in (remark, *found.remarks):
        if each:
            yield _field("note", each)
    for cpu in found.cpus:
        yield ""
        yield from _registers(cpu, every=every_register)
    yield from _log(found)


def _log(found: Inspection) -> Iterator[str]:
    """The log's last lines, or, if it says why the kernel died, those around that."""
    lines = found.log.splitlines()
    if not lines:
        return
    panic = next((index for index in range(len(lines) - 1, -1, -1) if found.panic and found.panic in lines[index]), None)
    last = len(lines) if panic is None else min(panic + _LOG_LINES, len(lines))
    first = max(last - _LOG_LINES if panic is None else panic - _LOG_LINES // 3, 0)
    yield ""
    yield f"its log, {'the end' if panic is None else 'around the panic'} (--dmesg prints all {len(lines):,} lines):"
    yield from (f"  {line}" for line in lines[first:last])


def _field(name: str, text: str) -> str:
    return f"  {name:<9} {text}"


def _pages(found: Inspection) -> Iterator[str]:
    pages = found.pages
    memory = format_size(pages.memory * found.page_size)
    missing = f", {pages.missing:,} of them missing" if pages.missing else ""
    zero = f", {pages.zero:,} of them zeros" if pages.zero else ""
    yield _field("memory", f"{memory}, {pages.memory:,} pages: {pages.kept:,} kept{zero}{missing}; {pages.dropped:,} left out")
    classes = found.dropped_by_class or {}
    if dropped := [f"{number:,} {name.replace('_', ' ')}" for name, number in classes.items() if number]:
        yield _field("", f"left out, by its manifest: {', '.join(dropped)}")
    if set(pages.codecs) - {"none"}:
        stored = [f"{number:,} {'as they are' if name == 'none' else name}" for name, number in sorted(pages.codecs.items())]
        yield _field("", f"stored: {', '.join(stored)}")


def _registers(cpu: Cpu, *, every: bool) -> Iterator[str]:
    who = f"the CPU that crashed, running pid {cpu.pid}" if cpu.crashed else f"a CPU running pid {cpu.pid}"
    if not (every or cpu.crashed):
        yield f"{who}, at {cpu.pc:#x}"
        return
    yield f"{who}:"
    values = [f"{name:>8} {value:016x}" for name, value in cpu.registers.items()]
    for start in range(0, len(values), _REGISTERS_A_LINE):
        yield "  " + " ".join(values[start : start + _REGISTERS_A_LINE])


# -------------------------------------------------------------------------------------------------------------- verify


def _verify(arguments: argparse.Namespace) -> int:
    require_numpy()
    from crashkernel.dump import inspection  # noqa: PLC0415

    records: list[dict[str, object]] = []
    status = 0
    for path in arguments.dumps:
        try:
            with _Progress() as progress:
                found = inspection.verify(path, progress.tell)
        except CrashkernelError as error:  # of this dump; the others have their verdicts all the same
            print(f"crashkernel: {visible(str(error))}", file=sys.stderr)
            records.append({"path": str(path), "good": False, "error": str(error)})
            status = max(status, error.exit_code)
            continue
        records.append(found.to_json())
        status = max(status, 0 if found.good else 1)
        if str(arguments.json) != "-":
            _print(*map(visible, _verdict(found)))
    _put_json(arguments.json, {"good": not status, "dumps": records})
    return status


def _verdict(found: Verification) -> Iterator[str]:
    count = found.problems.count
    problems = "1 problem" if count == 1 else f"{count:,} problems"
    yield f"{found.path}: {'good' if found.good else f'BAD, {problems}'}"
    yield from (f"  checked: {each}" for each in found.checks)
    yield from (f"  problem: {each}" for each in found.problems.first)
    if (more := count - len(found.problems.first)) > 0:
        yield f"  and {more:,} more"
    yield from (f"  note: {each}" for each in found.remarks)


# ------------------------------------------------------------------------------------------------------------- convert


def _convert(arguments: argparse.Namespace) -> int:
    require_numpy()
    from crashkernel.dump.conversion import convert  # noqa: PLC0415

    if str(arguments.json) == "-" and str(arguments.output) == "-":
        raise UsageError("the dump and the JSON cannot both go to standard output")
    with _Progress() as progress:
        made = convert(arguments.dump, arguments.output, arguments.format, arguments.codec, tell=progress.tell)
    if made is None:
        return 0
    record = {"path": str(arguments.output), "size": made.size, "manifest": made.manifest is not None}
    if not _put_json(arguments.json, record):
        _print(visible(f"{arguments.output}: {format_size(made.size)}{', with a manifest' if made.manifest else ''}"))
    return 0


class _Progress:
    """How far something is, on standard error, once it has taken two seconds: on a terminal a line that changes."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()
        self._bar = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def tell(self, what: str, done: int, total: int) -> None:
        """Say it, unless that was said a moment ago."""
        now = time.monotonic()
        if now - self._start < _PATIENCE or now - self._shown < (0.2 if self._terminal else _PERIOD):
            return
        self._shown = now
        share = done / max(total, 1)
        text = f"{what}: {done:,} of {total:,}, {share:.0%}"
        if self._terminal:
            width = shutil.get_terminal_size().columns
            sys.stderr.write(f"\r\x1b[K[{'#' * round(20 * share):<20}] {text}"[: width + 4])
            sys.stderr.flush()
            self._bar = True
        else:
            print(f"crashkernel: {text}", file=sys.stderr, flush=True)
