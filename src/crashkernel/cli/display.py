"""What the engineer's commands show while twins run, and how they begin and end alike."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from crashkernel.drill.budget import STAGES_VARIABLE
from crashkernel.drill.dma import report_lines
from crashkernel.drill.faults.damage import RogueDma
from crashkernel.errors import EnvironmentFault, UsageError
from crashkernel.memory import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.status import Status

    from crashkernel.drill.dma import DmaReport
    from crashkernel.drill.saving import Footprint
    from crashkernel.drill.scenario import Outcome
    from crashkernel.drill.stages import Stage
    from crashkernel.drill.verdict import Verdict


_EXPECTED = {"dump": "a dump that is right all the same", "told": "clear words, where no whole dump can be"}


def require_extra(*names: str) -> None:
    """Refuse with what to install, if one of these packages is not there."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentFault(f"this command needs {', '.join(missing)}", hint="pip install 'crashkernel[drill]'")


def require_writable(path: Path) -> None:
    """Refuse a path for results that cannot be written: before the drill, not after it."""
    try:
        replaced = path.is_file() or not path.exists()  # all others, such as a pipe, are written to
        target = path.resolve().parent if replaced else path
        good = os.access(target, os.W_OK, effective_ids=True) and not path.is_dir()
    except (OSError, RuntimeError):  # a directory that one may not enter; a loop of links
        good = False
    if not good:
        raise UsageError(f"cannot write {path}", hint="give the name of a file in a directory that you may write to")


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP end a drill like Ctrl-C does: QEMU and the working directory go with it."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Display:
    """Live progress on a terminal, plain lines elsewhere; a line stays for each stage that is done."""

    def __init__(self, *, to_stderr: bool = False) -> None:
        from rich.console import Console  # noqa: PLC0415

        self._console: Console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)

    def line(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self._console.print(text, style=style, markup=False)

    def title(self, text: str) -> None:
        """What comes next."""
        self.line(text, style="bold")

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[Any]:
        """A spinner that shows the last message; elsewhere each message is a line."""
        if self._console.is_terminal:
            with self._console.status(what) as status:
                yield lambda text: status.update(f"{what}: {text}")
        else:
            yield lambda text: self.line(f"{what}: {text}")

    @contextlib.contextmanager
    def drill(self, name: str) -> Iterator[Any]:
        """A listener for `run_drill`. If `STAGES_VARIABLE` names a file, all that it is told is a line there as well."""
        with contextlib.ExitStack() as stack:
            status = stack.enter_context(self._console.status(f"{name}: images")) if self._console.is_terminal else None
            stages = os.environ.get(STAGES_VARIABLE)
            listener = stack.enter_context(Path(stages).open("a", encoding="utf-8")) if stages else None
            progress = _Progress(self, name, status, listener)
            try:
                yield progress
            finally:
                progress.close()

    def outcome(self, outcome: Outcome) -> None:
        """The report of one drill."""
        placement = outcome.scenario.placement + (", no quarantine" if outcome.scenario.request.no_quarantine else "")
        failure = outcome.failure
        if outcome.passed:
            self.line(f"{placement}: PASS in {outcome.seconds:.1f} s", style="bold green")
        else:
            self.line(f"{placement}: FAIL after {outcome.seconds:.1f} s", style="bold red")
        if failure is not None:
            self.line(f"  {failure.message}")
            if failure.hint:
                self.line(f"  likely cause: {failure.hint}")
            for text in failure.console[-12:]:
                self.line(f"  console | {text}", style="dim")
        for fault in outcome.faults:
            self.line(f"  fault {fault.word}: {fault.title}; expected: {_EXPECTED[fault.expects]}")
            self.line(f"  seen: {fault.told}" if fault.told else "  seen: nothing of what was expected")
        if outcome.verdict is not None:
            self.verdict(outcome.verdict)
        if outcome.footprint.total:
            self.footprint(outcome.footprint)
        for fault in outcome.faults:
            if isinstance(fault, RogueDma):
                self.dma(fault.report)
        if outcome.dump is not None:
            self.line(f"  kept in {outcome.dump.parent}")

    def dma(self, report: DmaReport) -> None:
        """What the rogue device did."""
        for line in report_lines(report):
            self.line(f"  dma: {line}")

    def footprint(self, footprint: Footprint) -> None:
        """What was left of K2's memory, and what the capture took."""
        before, least, total = (format_size(each) for each in (footprint.available, footprint.least, footprint.total))
        capture = (
            f"; resident {format_size(footprint.peak)}, a worker {format_size(footprint.peak_of_child)}"
            if footprint.peak
            else ""
        )
        self.line(f"  K2's memory: {before} of {total} available, while it saved {least}{capture}")

    def verdict(self, verdict: Verdict) -> None:
        """The evidence."""
        self.line(
            f"  {verdict.bytes_compared:,} of {verdict.k1_bytes:,} bytes of K1's memory compared: "
            f"{verdict.bytes_wrong:,} wrong, {verdict.bytes_missing:,} missing"
        )
        if pages := verdict.pages:
            out = ", ".join(f"{count:,} {name}" for name, count in pages.left_out.items()) or "nothing"
            self.line(
                f"  level {pages.level}: {pages.kept:,} pages of {format_size(pages.page_size)} in "
                f"{format_size(pages.dump_bytes)}, {pages.zeros:,} of them zeros; left out {out}; "
                f"{pages.lost:,} left out that it keeps"
            )
            if pages.needless:
                self.line(f"  needless: {pages.needless:,} pages are kept that level {pages.level} drops", style="bold yellow")
        marks = {
            "K1's first 256 bytes": verdict.first_256_bytes_ok,
            "nonce": verdict.nonce_found,
            "panic message": verdict.panic_found,
            "registers": verdict.registers_ok,
        }
        self.line("  of this crash: " + ", ".join(f"{name} {'ok' if ok else 'WRONG'}" for name, ok in marks.items()))
        for wrong in verdict.wrong_ranges:
            self.line(
                f"  wrong: {wrong.range}, {wrong.wrong:,} bytes: {wrong.what}" + (f" ({wrong.note})" if wrong.note else "")
            )
        if verdict.bytes_in_device_buffers:
            self.line(f"  in the device's own buffers, as on any machine: {verdict.bytes_in_device_buffers:,} bytes differ")
        for problem in verdict.problems:
            self.line(f"  problem: {problem}")
        for what, changed in Counter(
            e.what.partition(",")[0] if e.what.startswith("VPA") else e.what for e in verdict.exempt
        ).items():
            places = f"{changed} place{'s' * (changed != 1)}"
            self.line(f"  written by firmware after the truth was taken, not counted: {what}, {places}", style="dim")


class _Progress:
    """The listener: a line for every stage that is done, the present one in the status line."""

    def __init__(self, display: Display, name: str, status: Status | None, listener: TextIO | None) -> None:
        self._display = display
        self._name = name
        self._status = status
        self._listener = listener
        self._stage: Stage | None = None
        self._since = 0.0

    def __call__(self, stage: Stage, text: str) -> None:
        if not text:
            self.close()
            self._stage, self._since = stage, time.monotonic()
        if self._listener is not None:
            self._listener.write(f"{stage.name}\t{text}\n")
            self._listener.flush()
        if self._status is not None:
            self._status.update(f"{self._name}: {stage.name}" + (f", {text}" if text else ""))

    def close(self) -> None:
        if self._stage is not None:
            self._display.line(f"  {self._name:<9} {self._stage.name:<9} {time.monotonic() - self._since:6.1f} s")
            self._stage = None
