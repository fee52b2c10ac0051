"""capture: in the capture kernel, or on any vmcore file. The codecs, numpy and all else are imported when a capture begins."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from crashkernel.cli.command import add_command, require_numpy
from crashkernel.cli.command import write as write_file
from crashkernel.errors import CrashkernelError, EnvironmentFault, UsageError
from crashkernel.memory import format_size
from crashkernel.report.terminal import visible

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crashkernel.capture.codec import Codec
    from crashkernel.capture.selection import PageClass
    from crashkernel.capture.writer import Progress, Written
    from crashkernel.target import Beat, Target
    from crashkernel.target.manifest import Contents
    from crashkernel.vmcore.kernel import CrashedKernel

_CODECS = ("zstd", "lzo", "snappy", "zlib", "none")  # capture/codec.py has them; importing it costs what --help need not pay
_DEFAULT_TARGET = "/var/crash/"
_VMCORE = "/proc/vmcore"

_EPILOG = """examples:
  crashkernel capture                                   /proc/vmcore to a new directory below /var/crash
  crashkernel capture --to /mnt/dumps --to ssh://kdump@host/var/crash
                                                        the first that takes it
  crashkernel capture --to http://10.0.0.9:8790/ --token-file /etc/kdump.token
                                                        to a `crashkernel receive`
  crashkernel capture --level 17 --codec zlib --to /dev/sdb1
  crashkernel capture vmcore --to - > vmcore.flat       any ELF vmcore; a pipe gets the flattened stream
  crashkernel capture --encrypt-to age1... --to /mnt    what leaves K2 only the key's owner can read

K1's log goes first, as vmcore-dmesg.txt, to each target that is tried. A dump bears its name only when it is whole, with a
manifest beside it (`crashkernel verify`); until then, and if it fails, its name says `incomplete`.

dump level, a sum of what to leave out:
  1 pages of zeros    2 page cache    4 page cache with private data    8 user memory    16 free pages

targets:
  DIRECTORY, FILE               on a mounted file system
  /dev/NAME                     a block device, which is overwritten (crashkernel inspect /dev/NAME reads it)
  ssh://[USER@]HOST[:PORT]/DIR  by ssh; the other end needs a POSIX shell and coreutils
  http[s]://HOST[:PORT]/PREFIX  to `crashkernel receive`
  -                             standard output

exit status: 0 saved and whole, 2 usage, or not a vmcore, 3 no target took it, or this machine lacks something
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add capture to the parser."""
    capture = add_command(commands, "capture", "save a dead kernel's memory, filtered and compressed", _EPILOG)
    capture.add_argument("vmcore", nargs="?", default=_VMCORE, help="an ELF vmcore (default: %(default)s)")
    capture.add_argument(
        "--to",
        action="append",
        metavar="TARGET",
        help=f"where to; given more than once, the first that takes it (default: {_DEFAULT_TARGET})",
    )
    capture.add_argument(
        "--level", "-d", type=_level, default=31, metavar="LEVEL", help="dump level, 0 (all) to 31 (default: %(default)s)"
    )
    capture.add_argument("--codec", "-c", choices=_CODECS, help="default: zstd, or what this machine has")
    capture.add_argument(
        "--format", choices=("kdump", "elf"), default="kdump", help="kdump-compressed, or plain ELF (default: %(default)s)"
    )
    capture.add_argument(
        "--workers",
        "-j",
        type=_workers,
        metavar="N",
        help="processes that compress; 0: the capture itself (default: one for each CPU, as memory allows; 0 on one CPU)",
    )
    capture.add_argument("--encrypt-to", metavar="RECIPIENT", help="an age recipient (age1…, ssh-…), or a file of them")
    capture.add_argument("--ssh-identity", type=Path, metavar="FILE", help="the private key for ssh:// targets")
    capture.add_argument("--token-file", type=Path, metavar="FILE", help="the token for http(s):// targets, in a file")
    capture.add_argument(
        "--ca-file", type=Path, metavar="FILE", help="who signs for an https:// target (default: the system's)"
    )
    capture.add_argument(
        "--stall",
        type=_positive,
        default=60,
        metavar="SECONDS",
        help="give a target up that gets on with nothing for so long (default: %(default)s)",
    )
    capture.add_argument("--json", metavar="FILE", help="write what was saved, and where, as JSON; - for standard output")
    capture.set_defaults(run=_capture)


def _level(text: str) -> int:
    if not text.isdecimal() or int(text) > 31:
        raise argparse.ArgumentTypeError(f"{text!r} is no dump level: give a number from 0 to 31")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 4096")
    return int(text)


def _workers(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _capture(arguments: argparse.Namespace) -> int:
    require_numpy()
    gc.disable()  # what is imported stays: looking for garbage in it is a twentieth of a short capture's start
    from crashkernel.target import LOG, crash_name, save  # noqa: PLC0415
    from crashkernel.vmcore.dmesg import read_log  # noqa: PLC0415
    from crashkernel.vmcore.kernel import CrashedKernel  # noqa: PLC0415
    from crashkernel.vmcore.source import ElfVmcore  # noqa: PLC0415

    if arguments.json == "-" and "-" in (arguments.to or ()):
        raise UsageError("the dump and the JSON cannot both go to standard output", hint="give --json a file")
    targets = _targets(arguments)
    codec = _codec(arguments)
    if not Path(arguments.vmcore).exists():
        hint = "only a capture kernel has it: name a vmcore file" if arguments.vmcore == _VMCORE else ""
        raise UsageError(f"there is no {arguments.vmcore}", hint=hint)
    console = _Console(sys.stderr)
    kernel = CrashedKernel(ElfVmcore(arguments.vmcore))
    log = ""
    try:
        log = read_log(kernel)
    except CrashkernelError as error:
        kernel.doubt(f"its log cannot be read: {error}")
    capture = _Capture(arguments, codec, kernel, log, console)
    identity = capture.identity
    console.say(f"{identity.utsname.release} {identity.utsname.machine}: {capture.panic or 'no panic message in its log'}")
    console.doubt(kernel.doubts)
    gc.freeze()  # nor is it looked at when the process ends
    saved = save(
        capture.write,
        targets,
        crash_name(identity.utsname.nodename.replace("(none)", ""), identity.crash_time or time.time()),
        files={LOG: log.encode()} if log else {},
        stall=arguments.stall,
        report=console.say,
    )
    console.say(f"saved: {saved.place}, {format_size(saved.manifest.size)}, {codec.name if codec.flag else 'not compressed'}")
    if arguments.json is not None:
        _put_json(arguments.json, {"place": saved.place, **json.loads(saved.manifest.to_json())}, console)
    return 0


def _put_json(name: str, record: dict[str, object], console: _Console) -> None:
    """Write a record to where `--json` says. What goes wrong there is said, no more: the dump is saved."""
    text = json.dumps(record, indent=1) + "\n"
    try:
        if name == "-":
            print(text, end="", flush=True)
        else:
            write_file(Path(name), text, "--json")
    except (OSError, UsageError) as error:
        console.say(f"{error}")


class _Capture:
    """One vmcore to save: what is known of it, and how it is written. A target that is tried has it written anew."""

    def __init__(self, arguments: argparse.Namespace, codec: Codec, kernel: CrashedKernel, log: str, console: _Console) -> None:
        from crashkernel.vmcore.dmesg import panic_line  # noqa: PLC0415
        from crashkernel.vmcore.identity import Identity  # noqa: PLC0415

        self._arguments, self._codec, self._kernel, self._console = arguments, codec, kernel, console
        self.panic = panic_line(log) or ""
        self.identity = Identity.of(kernel)

    def write(self, descriptor: int, beat: Beat) -> Contents:
        """Write the dump, with the log already where it goes: what can go wrong from here on cannot cost that."""
        from crashkernel.capture.crew import Crew  # noqa: PLC0415
        from crashkernel.capture.pagefilter import PageFilter  # noqa: PLC0415
        from crashkernel.capture.selection import DL_ZERO  # noqa: PLC0415
        from crashkernel.capture.writer import write_dump  # noqa: PLC0415

        gc.enable()
        arguments, source, console = self._arguments, self._kernel.source, self._console
        selection = PageFilter(self._kernel, source, arguments.level)
        console.doubt(selection.findings.doubts())

        def tell(progress: Progress) -> None:
            beat(*progress.settled)
            console.show(progress)

        workers = _as_many_as_fit(source.page_size) if arguments.workers is None else arguments.workers
        drop_zeros = arguments.format == "kdump" and bool(arguments.level & DL_ZERO)
        with Crew(source, selection, self._codec, workers, drop_zeros) as crew:
            written = write_dump(self.identity, crew, descriptor, arguments.format, tell)
        console.doubt(selection.findings.doubts())
        console.done(written)
        return self._contents(written)

    def _contents(self, written: Written) -> Contents:
        from crashkernel.capture.selection import PageClass  # noqa: PLC0415
        from crashkernel.target.manifest import Contents, PageCounts  # noqa: PLC0415

        pages, identity = written.classes, self.identity
        compressed = self._arguments.format == "kdump"
        return Contents(
            format=("flattened" if written.stream else "kdump-compressed") if compressed else "elf",
            codec=self._codec.name,
            level=self._arguments.level,
            page_size=self._kernel.source.page_size,
            pages=PageCounts(
                kept=pages[PageClass.KEPT],
                zero=written.zero,
                unreadable=len(written.unreadable),
                **{each.name.lower(): pages[each] for each in pages if each not in (PageClass.KEPT, PageClass.DROPPED)},
            ),
            release=identity.utsname.release,
            machine=identity.utsname.machine,
            panic=self.panic,
            crash_time=identity.crash_time or None,
        )


def _targets(arguments: argparse.Namespace) -> list[Target]:
    from crashkernel.target import TargetOptions, parse_target  # noqa: PLC0415

    encryption = None
    if arguments.encrypt_to:
        from crashkernel.target.encryption import Encryption  # noqa: PLC0415

        encryption = Encryption.to(arguments.encrypt_to)
    options = TargetOptions(
        encryption=encryption,
        ssh_identity=arguments.ssh_identity,
        token_file=arguments.token_file,
        ca_file=arguments.ca_file,
        stall=arguments.stall,
    )
    return [parse_target(text, options) for text in arguments.to or (_DEFAULT_TARGET,)]


def _codec(arguments: argparse.Namespace) -> Codec:
    """The codec asked for; if none was, the first of `_CODECS` that this machine has."""
    from crashkernel.capture.codec import codec_by_name, missing  # noqa: PLC0415

    if arguments.format == "elf":
        if arguments.codec not in (None, "none"):
            raise UsageError(f"a plain ELF dump is not compressed with {arguments.codec}", hint="leave --codec out")
        return codec_by_name("none")
    if arguments.codec is None:
        return next(codec for codec in map(codec_by_name, _CODECS) if not missing(codec))
    codec = codec_by_name(arguments.codec)
    if why := missing(codec):
        raise EnvironmentFault(why)
    return codec


_WORKER = 24 << 20
"""Bytes that a worker's process takes beside what `Crew.memory_for` says: the most that was seen (docs/benchmarks.md)."""


def _as_many_as_fit(page_size: int) -> int:
    """A worker for each CPU, in at most half of the memory that is free: the other half is for what is being written."""
    from crashkernel.capture.crew import Crew  # noqa: PLC0415

    cpus = len(os.sched_getaffinity(0))
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
        available = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError, IndexError):
        return 0
    fitting = min(cpus, available // 2 // (Crew.memory_for(page_size) + _WORKER))
    return fitting if fitting > 1 else 0


_SERIAL = ("console", "hvc", "ttyS", "ttyAMA", "ttyUSB")  # names of devices in /dev that what is sent to stays on


def _is_screen(stream: TextIO) -> bool:
    """Whether it is a terminal on which a line can be written again: no console that somebody logs."""
    if not stream.isatty() or os.environ.get("TERM", "dumb") in ("", "dumb"):
        return False
    try:
        return not Path(os.ttyname(stream.fileno())).name.startswith(_SERIAL)
    except OSError:
        return False


class _Console:
    """What a capture says: lines, and how far it is. A terminal gets a bar, a serial console a line a second."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = _is_screen(stream)
        self._start = time.monotonic()
        self._shown = 0.0
        self._copying_since = 0.0
        self._doubts: set[str] = set()

    def say(self, text: str) -> None:
        """One line; of a bar nothing remains, whoever drew it: a target is tried by a process of its own."""
        clear = "\r\x1b[K" if self._terminal else ""
        print(f"{clear}crashkernel: {visible(text)}", file=self._stream, flush=True)

    def show(self, progress: Progress) -> None:
        """How far it is, unless that was said a moment ago."""
        now = time.monotonic()
        if progress.copying and not self._copying_since:
            self._copying_since = now
        if now - self._shown < (0.2 if self._terminal else 1.0) or now - self._start < 1.0:
            return
        self._shown = now
        share = progress.done / max(progress.total, 1)
        if progress.copying:
            seconds = max(now - self._copying_since, 0.001)
            rate = progress.done / seconds
            left = (progress.total - progress.done) / rate if rate else 0.0
            text = f"{share:4.0%} copied, {format_size(progress.written)} written, {rate:,.0f} pages/s, {_duration(left)} left"
        else:
            text = f"{share:4.0%} of memory looked at"
        text += _dropped(progress.classes)
        if self._terminal:
            import shutil  # noqa: PLC0415 - brings every kind of archive with it

            width = shutil.get_terminal_size().columns
            bar = "#" * round(20 * share)
            self._stream.write(f"\r\x1b[K[{bar:<20}] {text}"[: width + 4])
            self._stream.flush()
        else:
            print(f"crashkernel: {text}", file=self._stream, flush=True)

    def doubt(self, doubts: list[str]) -> None:
        """What is doubtful and was not said before."""
        for text in doubts:
            if text not in self._doubts:
                self._doubts.add(text)
                self.say(f"doubtful: {text}")

    def done(self, written: Written) -> None:
        """All pages are written; the target has yet to make them whole."""
        from crashkernel.capture.selection import PageClass  # noqa: PLC0415

        if written.unreadable:
            count = len(written.unreadable)
            first = written.unreadable[0]
            self.say(f"{count:,} pages could not be read, and are zeros in the dump; the first is page frame {first:#x}")
        kept = written.classes[PageClass.KEPT]
        self.say(
            f"{kept:,} pages kept, {written.zero:,} of them zeros{_dropped(written.classes)}; "
            f"{format_size(written.size)} in {_duration(time.monotonic() - self._start)}; making sure that it is whole"
        )


_WORDS = ("cache", "private cache", "user", "free", "poisoned", "offline", "dropped before")


def _dropped(classes: Mapping[PageClass, int]) -> str:
    """What was left out, by class; the classes other than KEPT come in the order of `_WORDS`."""
    parts = [f"{count:,} {word}" for word, count in zip(_WORDS, list(classes.values())[1:], strict=True) if count]
    return f"; left out: {', '.join(parts)}" if parts else ""


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
