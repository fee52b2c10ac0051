"""size: the smallest reservation that does for these kernels, found by drills; for the engineer's machine."""

from __future__ import annotations

import argparse
import threading
import uuid
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crashkernel.cli.command import add_command, write_json
from crashkernel.cli.display import Display, require_extra, require_writable, terminable
from crashkernel.cli.twin import add_machine
from crashkernel.drill.accounting import FREE, PEAKS
from crashkernel.drill.request import DEFAULT_KERNEL, DrillRequest, fetch
from crashkernel.drill.saving import CODECS, DESTINATIONS, MAX_LEVEL
from crashkernel.errors import CrashkernelError, UsageError
from crashkernel.memory import format_size
from crashkernel.placement.plan import PLACEMENTS
from crashkernel.report.terminal import visible

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.status import Status

    from crashkernel.campaign.sizing import Sized, Trial

_RAW = "raw"

_EPILOG = """examples:
  crashkernel size                                  Debian 12's kernel, both placements: about 5 minutes
  crashkernel size --placement reserved --kernel debian:trixie --memory 8G
  crashkernel size --kernel ./vmlinux --initrd kdump.img     your own kernel, and what your initrd unpacks to
  crashkernel size --capture raw                    K2 copies /proc/vmcore as it is
  crashkernel size --smp 4 --all-cpus               K2 runs on four CPUs
  crashkernel size --into night.sqlite              keep it with a campaign's results, for `crashkernel report`

Each trial is a drill: K1 crashes, K2 saves the dump, and it must be right. The search closes in on the smallest
reservation with which it is, and repeats that; what it recommends has a margin on top.

What is simulated: this kernel, the memory that the initrd takes packed and unpacked, the CPUs, the placement, and
`crashkernel capture` or a raw copy. What is not: the drivers and programs of your --initrd, which are unpacked and not
run; adapters of real machines take tens of MiB each. The drill's own initrd is not compressed.

The answer is printed first, then written to --json and --into. If one placement's search fails or is interrupted, what
the other's has found by then is told and kept all the same.

exit status: 0 found, 1 none was, or a dump was wrong for another reason, 2 usage, 3 this machine lacks something
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add size to the parser."""
    size = add_command(commands, "size", "find the smallest reservation that does, by drills", _EPILOG)
    size.add_argument("--placement", choices=(*PLACEMENTS, "both"), default="both", help="default: %(default)s")
    size.add_argument("--kernel", default=DEFAULT_KERNEL, metavar="KERNEL", help="as for drill (default: %(default)s)")
    size.add_argument("--capture-kernel", metavar="KERNEL", help="K2, where it is another than K1")
    size.add_argument("--initrd", metavar="FILE", help="K2 unpacks this initrd too")
    add_machine(size)
    size.add_argument("--all-cpus", action="store_true", help="K2 starts every CPU (default: only the one that crashed)")
    size.add_argument(
        "--capture",
        type=_level,
        default=MAX_LEVEL,
        metavar="LEVEL",
        help="the dump level of `crashkernel capture`, or 'raw' for a plain copy of /proc/vmcore (default: %(default)s)",
    )
    size.add_argument("--capture-codec", choices=CODECS, help="default: zstd")
    size.add_argument("--capture-to", choices=DESTINATIONS, help="where K2 sends the dump (default: disk)")
    size.add_argument(
        "--margin", type=_number, default=25, metavar="PERCENT", help="to add to what was found (default: %(default)s)"
    )
    size.add_argument(
        "--confirm", type=_number, default=3, metavar="N", help="what was found must pass N times more (default: %(default)s)"
    )
    size.add_argument("--into", type=Path, metavar="DB", help="add it to the database of a campaign")
    size.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON ('-' for standard output)")
    size.set_defaults(run=_size)


def _level(text: str) -> int | None:
    return None if text == _RAW else _number(text)


def _number(text: str) -> int:
    if not (text.isdecimal() and len(text) < 4):
        raise argparse.ArgumentTypeError(f"{text!r} is no small whole number")
    return int(text)


def _size(arguments: argparse.Namespace) -> int:
    require_extra("numpy", "qemu", "rich")
    requests = _requests(arguments)
    from crashkernel.campaign.sizing import require_database  # noqa: PLC0415

    if arguments.into is not None:
        require_database(arguments.into)
    to_stdout = str(arguments.json) == "-"
    if arguments.json is not None and not to_stdout:
        require_writable(arguments.json)
    progress = _Progress(to_stderr=to_stdout)
    found: list[Sized] = []
    wanted = [request.placement for request in requests]
    try:
        with terminable():
            _search(requests, arguments, progress, found)
    except BaseException:
        if found:
            try:
                _tell(found, wanted, arguments, progress)
            except CrashkernelError as error:  # not what ended the search
                progress.line(f"  {error}", "bold red")
        raise
    _tell(found, wanted, arguments, progress)
    return 0


def _tell(found: Sequence[Sized], wanted: Sequence[str], arguments: argparse.Namespace, progress: _Progress) -> None:
    """The answer in each form: first what cannot fail, and the database even if the file could not be written.

    :raise UsageError: one of them could not be written.
    """
    from crashkernel.campaign.sizing import keep_sizes  # noqa: PLC0415

    for line in _report(found, wanted):
        progress.line(*line)
    try:
        if arguments.json is not None:
            write_json(arguments.json, {"sizes": [sized.record() for sized in found]})
    finally:
        if arguments.into is not None:
            keep_sizes(arguments.into, found)


def _requests(arguments: argparse.Namespace) -> list[DrillRequest]:
    if arguments.capture is None and (arguments.capture_codec or arguments.capture_to):
        raise UsageError("--capture-codec and --capture-to say how `crashkernel capture` saves", hint="leave --capture raw out")
    names = (
        *("kernel", "capture_kernel", "initrd", "machine", "cpu", "mmu", "smp", "memory"),
        *("all_cpus", "capture", "capture_codec", "capture_to"),
    )
    given = {name.replace("_", "-"): value for name in names if (value := getattr(arguments, name)) is not None}
    placements = PLACEMENTS if arguments.placement == "both" else (arguments.placement,)
    return [DrillRequest.from_options({**given, "placement": placement}) for placement in placements]


def _search(requests: Sequence[DrillRequest], arguments: argparse.Namespace, progress: _Progress, found: list[Sized]) -> None:
    """Each placement's search, all at a time: the host's ledger sees to it that no more run than there is room for.

    `found` has each answer in the end, and if one search raises, the others' that there are by then.
    """
    from crashkernel.campaign import worker  # noqa: PLC0415
    from crashkernel.campaign.sizing import size_reservation  # noqa: PLC0415

    with progress.busy("packages") as tell:
        supplies = fetch(requests[0], tell)
    run = uuid.uuid4().hex
    twin = requests[0].twin.title.rpartition(", ")[0]
    progress.line(f"{supplies.title} on {twin}, {requests[0].saving.title if requests[0].saving else 'a raw copy'}", "bold")
    with progress, ThreadPoolExecutor(len(requests)) as pool:
        futures = [
            pool.submit(
                size_reservation,
                request,
                supplies,
                run,
                progress.listener(request.placement),
                confirmations=arguments.confirm,
                margin=arguments.margin,
            )
            for request in requests
        ]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future in done:
                    future.result()
        except BaseException:
            worker.stop(run)
            raise
        finally:
            wait(futures)
            found += [future.result() for future in futures if future.exception() is None]


class _Progress(Display):
    """A line for each trial; on a terminal also what runs now, and about how many drills are still to come."""

    def __init__(self, *, to_stderr: bool) -> None:
        super().__init__(to_stderr=to_stderr)
        self._status: Status | None = None
        self._lock = threading.Lock()
        self._doing: dict[str, str] = {}
        self._left: dict[str, int] = {}

    def __enter__(self) -> None:
        if self._console.is_terminal:
            self._status = self._console.status("begins")
            self._status.start()

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def line(self, text: str, style: str = "") -> None:
        """A line that stays, whatever a twin said in it."""
        super().line(visible(text), style)

    def listener(self, placement: str) -> _Listener:
        """Who listens to one search."""
        return _Listener(self, placement)

    def doing(self, placement: str, text: str) -> None:
        """What a search does now."""
        with self._lock:
            self._doing[placement] = text
            self._update()

    def ended(self, placement: str, trial: Trial, left: int) -> None:
        """A search has one trial more, and so many to come."""
        spare = "" if trial.spare is None else f"{format_size(trial.spare)} to spare at its lowest"
        said = "; ".join(part for part in (trial.reason, spare) if part)
        with self._lock:
            self._left[placement] = left
            style = {"passed": "green", "too small": "yellow"}.get(trial.finding, "bold yellow")
            self.line(
                f"  {placement:<9}{trial.size >> 20:>5}M  {trial.finding:<9} {trial.seconds:5.1f} s  {said}".rstrip(), style
            )
            self._update()

    def _update(self) -> None:
        if self._status is not None:
            doing = ", ".join(f"{placement} {text}" for placement, text in self._doing.items())
            left = sum(self._left.values())
            self._status.update(visible(doing + (f"; drills to come: about {left}" if left else "")))


@dataclass(frozen=True, slots=True)
class _Listener:
    progress: _Progress
    placement: str

    def stage(self, size: int, text: str) -> None:
        """What the drill at `size` bytes does now."""
        self.progress.doing(self.placement, f"{size >> 20}M{': ' * bool(text)}{text}")

    def ended(self, trial: Trial, left: int) -> None:
        """A drill is over."""
        self.progress.ended(self.placement, trial, left)


def _report(found: Sequence[Sized], wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The answer, where the memory went, and what others say; each line with its style."""
    yield f"crashkernel={max(sized.recommended for sized in found) >> 20}M", "bold green"
    if missing := set(wanted) - {sized.request.placement for sized in found}:
        yield f"  no answer for {', '.join(sorted(missing))}: that search did not come to its end", "bold yellow"
    for sized in found:
        search = sized.search
        failed = f"{search.failed >> 20}M was not" if search.failed else "nothing smaller was seen to fail"
        yield (
            f"  {sized.request.placement}: {search.found >> 20}M was enough, {search.passed} times of {len(search.at_found)}; "
            f"{failed}; with {sized.margin} % more {sized.recommended >> 20}M",
            "",
        )
    yield from _accounting({sized.request.placement: sized.accounting for sized in found if sized.accounting})
    yield from _table("compared with what was found, times", {sized.request.placement: sized.ratios for sized in found}, "5.2f")


def _accounting(said: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Both peaks of each placement; every column adds up to a reservation."""
    columns = {f"{placement} {peak}": table[peak] for placement, table in said.items() for peak in PEAKS}
    if not columns:
        return
    tables = {name: {row: size / (1 << 20) for row, size in column.items()} for name, column in columns.items()}
    free = {name: table.pop(FREE) for name, table in tables.items()}
    sums = {name: {FREE: free[name], "the reservation": free[name] + sum(table.values())} for name, table in tables.items()}
    yield from _table("where it went by K2's own accounting, MiB", {name: tables[name] | sums[name] for name in tables}, "8.1f")


def _table(title: str, columns: dict[str, dict[str, float]], form: str) -> Iterator[tuple[str, str]]:
    yield f"  {title:<42}" + "".join(f"{name.partition(' ')[0]:>10}" for name in columns), "bold"
    if any(" " in name for name in columns):
        yield f"  {'':<42}" + "".join(f"{name.partition(' ')[2]:>10}" for name in columns), ""
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        yield f"  {row:<42}" + "".join(f"{format(column.get(row, 0), form):>10}" for column in columns.values()), ""
