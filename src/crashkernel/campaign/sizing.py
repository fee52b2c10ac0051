"""The smallest reservation that still does: found by bisection on the twin, each step a drill, the last one many times.

A search asks `probe` for one drill at a size, and knows nothing of drills. What a failed drill says of the size is
`classify`'s to decide: only what K2 itself could not do for want of memory is "too small". Anything else that breaks a drill
ends the search, for it says nothing of sizes, or it says something worse.

The border is not sharp. Near it the order in which K2 allocates decides, so what is found must pass again and again, and what
is recommended has a margin on top: `MARGIN`.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from crashkernel.campaign.file import DEFAULT_DEADLINE
from crashkernel.campaign.store import connect, utc_now
from crashkernel.campaign.worker import Task, run_task
from crashkernel.drill.guest import build_capture_image
from crashkernel.drill.images import whole_initrd
from crashkernel.drill.stages import BOOT_K2, CAPTURE, LOAD, MEMORY_SHORT, VERIFY, k2_said
from crashkernel.errors import EnvironmentFault, StageFailed, UsageError, VerificationError
from crashkernel.memory import Range, RangeSet, align_up, format_size
from crashkernel.placement import LINEAR_MAP_BLOCK
from crashkernel.placement.image import KernelImage
from crashkernel.placement.sizing import (
    CAPTURE_PROGRAM,
    LARGE_PAGE,
    Estimate,
    Initrd,
    capture_command,
    estimate,
    measure_initrd,
    recommended,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from crashkernel.campaign.store import Result
    from crashkernel.drill.request import DrillRequest, Supplies
    from crashkernel.machine import Mmu

Finding = Literal["passed", "too small", "unclear"]
"""What a drill says of its size; "unclear" is a K2 that failed without a word about memory."""

MARGIN = 25
"""Percent to add to what was found: the twin has three drivers, each adapter of a real machine takes tens of MiB more, and what
`placement.sizing` calls ample is a quarter, too."""

CONFIRMATIONS = 3
"""How often what was found must pass again."""

_MIB = 1 << 20
_STEP: dict[Mmu, int] = {"radix": 4 * _MIB, "hash": LINEAR_MAP_BLOCK["hash"]}
"""How finely is searched, in bytes. On hash K2's memory comes in whole blocks."""

_ROUND = 16 * _MIB
"""What is recommended is a multiple of this many bytes, as people write it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One drill at `size` bytes. `spare` is what K2 had to spare at its lowest, None if it did not live to say so."""

    size: int
    finding: Finding
    reason: str = ""  # why it did not pass
    spare: int | None = None
    seconds: float = 0.0
    accounting: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """Whether the dump came out right."""
        return self.finding == "passed"


Probe = Callable[[int], Trial]
"""Drills once at a size in bytes.

:raise VerificationError: it failed, and not for want of memory.
:raise EnvironmentFault: it could not be run.
"""


@dataclass(frozen=True, slots=True)
class Search:
    """What a search came to. `found` passed each time, but for one drill at the most that was unclear.

    `failed` is the largest size that did not; 0: none was seen to fail.
    """

    found: int
    failed: int
    trials: tuple[Trial, ...]

    @property
    def at_found(self) -> list[Trial]:
        """The drills at the size that was found. The one that was unclear, if one was, is among them."""
        return [trial for trial in self.trials if trial.size == self.found]

    @property
    def tightest(self) -> Trial:
        """Of those that passed there, the one with the least to spare."""
        passed = [trial for trial in self.at_found if trial.passed]
        return min(passed, key=lambda trial: _MIB << 30 if trial.spare is None else trial.spare)

    @property
    def passed(self) -> int:
        """How many passed there."""
        return sum(trial.passed for trial in self.at_found)


def find_smallest(
    probe: Probe,
    start: int,
    ceiling: int,
    step: int,
    confirmations: int = CONFIRMATIONS,
    tell: Callable[[Trial, int], None] = lambda _trial, _left: None,
) -> Search:
    """The smallest multiple of `step` at which 1 + `confirmations` drills pass and none fails, as none was seen to above it.

    It begins at `start`; `tell` hears of each drill, and about how many are still to come. Of all drills at one size a single
    unclear one is done again, and the second one counts; another unclear one counts as failed.

    :raise VerificationError: not even `ceiling` bytes were enough.
    """
    return _Searcher(probe, align_up(start, step), ceiling // step * step, step, confirmations, tell).search()


class _Searcher:
    def __init__(
        self, probe: Probe, start: int, ceiling: int, step: int, confirmations: int, tell: Callable[[Trial, int], None]
    ) -> None:
        self._probe, self._tell = probe, tell
        self._start, self._ceiling, self._step = min(start, ceiling), ceiling, step
        self._needed = 1 + confirmations
        self._trials: list[Trial] = []
        self._passed: Counter[int] = Counter()
        self._unclear: set[int] = set()  # sizes at which one drill was, which is excused
        self._low = 0  # the largest size that failed; none does with nothing
        self._high = 0  # the smallest that passed above it; 0: not known

    def search(self) -> Search:
        self._find_one_that_passes()
        self._go_down()
        while self._passed[self._high] < self._needed:
            if not self._take(self._high):
                self._high += self._step
                if self._high > self._ceiling:
                    self._give_up()
        return Search(self._high, self._low, tuple(self._trials))

    def _find_one_that_passes(self) -> None:
        size, gap = self._start, max(8 * self._step, align_up(self._start // 4, self._step))
        while not self._take(size):
            if size == self._ceiling:
                self._give_up()
            size, gap = min(size + gap, self._ceiling), 2 * gap

    def _go_down(self) -> None:
        """Close in from above and below: first on what K2 had to spare, then in growing strides, at most to the middle."""
        stride = 2 * self._step
        spare = self._trials[-1].spare
        if spare is not None and self._high - self._low > self._step:
            self._take(self._between(self._high - spare))
        while self._high - self._low > self._step:
            middle = (self._low + self._high) // 2
            last = self._trials[-1]
            self._take(self._between(max(middle, self._high - stride) if last.passed else min(middle, self._low + stride)))
            stride *= 2

    def _between(self, size: int) -> int:
        return min(max(align_up(size, self._step), self._low + self._step), max(self._high - self._step, self._step))

    def _take(self, size: int) -> bool:
        """Drill at `size`, and note what that says."""
        while True:
            trial = self._probe(size)
            self._trials.append(trial)
            excused = trial.finding == "unclear" and size not in self._unclear
            if trial.passed:
                self._passed[size] += 1
                self._high = size
            elif excused:
                self._unclear.add(size)
            else:
                self._low = size
            self._tell(trial, self._left())
            if not excused:
                return trial.passed

    def _left(self) -> int:
        if not self._high:
            return 6 + self._needed
        bisections = max(0, (self._high - self._low) // self._step - 1).bit_length() if self._low else 3
        return bisections + max(0, self._needed - self._passed[self._high])

    def _give_up(self) -> None:
        last = self._trials[-1]
        raise VerificationError(
            f"not even {format_size(self._ceiling)} are enough: {last.reason}",
            hint="that is half of the twin's memory: give it more with --memory",
        )


# --------------------------------------------------------------------------------------------------------- drills as probes

_SILENT = "K2 printed nothing"  # what a drill says of a K2 that died before its console worked
_NO_ROOM = "K2 does not fit"  # what a plan is refused with
_K2S_STAGES = (BOOT_K2.name, CAPTURE.name)


def classify(result: Result) -> tuple[Finding, str]:
    """What a drill's result says of its reservation, and why in one line.

    :raise EnvironmentFault: the drill could not be run.
    :raise VerificationError: it failed, and memory is not the reason.
    """
    if result.verdict == "PASS":
        return "passed", ""
    if result.verdict == "ERROR":
        raise EnvironmentFault(f"a drill could not be run: {result.stage}: {result.reason}")
    reason = f"{result.stage}: {result.reason}"
    if result.stage == LOAD.name and _NO_ROOM in result.reason:
        return "too small", reason
    if result.stage in _K2S_STAGES:
        said = MEMORY_SHORT.search(result.reason) or MEMORY_SHORT.search(k2_said(result.console))
        if said or _SILENT in result.reason:
            return "too small", reason if not said or said[0] in reason else f"{reason} ({said[0]})"
        return "unclear", reason
    if result.stage == VERIFY.name:
        raise VerificationError(
            f"the dump is wrong, which is no matter of memory: {result.reason}", hint="run the drill with --keep, and look"
        )
    raise StageFailed(result.stage, f"{result.reason}: that is no matter of K2's memory")


class Listener(Protocol):
    """Who hears of a search, in its thread."""

    def stage(self, size: int, text: str) -> None:
        """What the drill at `size` bytes does now."""

    def ended(self, trial: Trial, left: int) -> None:
        """A drill is over, about `left` are to come."""


@dataclass(slots=True)
class DrillProbe:
    """Drills `request` at any size, each as a process of its own. `worker.stop` ends those of `run`."""

    request: DrillRequest
    run: str
    listener: Listener
    drills: int = 0

    def __call__(self, size: int) -> Trial:
        """One drill; see `Probe`."""
        self.drills += 1
        request = at_size(self.request, size)
        task = Task("size", self.run, self.drills, tuple(request.command()), request.share, DEFAULT_DEADLINE)
        result = run_task(task, lambda stage, text: self.listener.stage(size, f"{stage}{', ' * bool(text)}{text}"))
        finding, reason = classify(result)
        accounting = (result.record or {}).get("accounting")
        return Trial(size, finding, reason, accounting and accounting["spare"], result.seconds, accounting)


def at_size(request: DrillRequest, size: int) -> DrillRequest:
    """The drill with a reservation of `size` bytes, a whole number of MiB."""
    return replace(request, crashkernel=f"{size >> 20}M")


def step_of(request: DrillRequest) -> int:
    """How finely to search, in bytes."""
    return _STEP[request.twin.mmu]


# ---------------------------------------------------------------------------------------------------------- the estimate


@dataclass(frozen=True, slots=True)
class Expectation:
    """What `placement.sizing` expects of a drill's K2. (`crashkernel plan` knows less: it takes a makedumpfile for granted.)"""

    request: DrillRequest
    image_span: int
    initrd: Initrd

    def at(self, size: int, page_size: int) -> Estimate:
        """What K2 needs of a reservation of `size` bytes; its memory is taken to be one range of as much."""
        twin = self.request.twin
        return estimate(
            self.image_span,
            self.initrd,
            RangeSet([Range(0, size)]),
            twin.mmu,
            page_size,
            twin.smp,
            started=twin.smp if self.request.all_cpus else 1,
            k1_memory=max(0, twin.memory - size) if self.request.saving else 0,
            program=capture_command(page_size) if self.request.saving else CAPTURE_PROGRAM,
            root=self.request.saving is not None or bool(self.request.initrd),  # what a drill's K2 has rootfstype=ramfs for
        )

    def smallest(self, page_size: int = LARGE_PAGE) -> int:
        """The least whole MiB that are enough by the estimate, in bytes."""
        size = _MIB
        while (short := -self.at(size, page_size).margin) > 0:
            size += align_up(short, _MIB)
        return size


def expect(request: DrillRequest, supplies: Supplies) -> Expectation:
    """Look at what K2 will be made of."""
    saving = request.saving
    arguments = () if saving is None else saving.arguments("/dev/vda")
    token = "network" if saving is not None and saving.to == "network" else ""
    with tempfile.TemporaryDirectory() as scratch:
        image = build_capture_image(
            supplies.k2, supplies.userland, Path(scratch) / "capture.cpio", capture_args=arguments, token=token
        )
        data = whole_initrd(request, image.read_bytes())
    span = KernelImage.from_bytes(supplies.k2.vmlinux.read_bytes(), str(supplies.k2.vmlinux)).span
    return Expectation(request, span, measure_initrd(data, request.initrd or "K2's initramfs"))


# ------------------------------------------------------------------------------------------------------------ the answer


@dataclass(frozen=True, slots=True)
class Sized:
    """What was found for one drill, whose reservation is now what was found. Sizes are in bytes, `margin` in percent."""

    request: DrillRequest
    search: Search
    expectation: Expectation
    margin: int = MARGIN

    @property
    def recommended(self) -> int:
        """What to reserve."""
        return align_up(self.search.found * (100 + self.margin) // 100, _ROUND)

    @property
    def accounting(self) -> dict[str, Any] | None:
        """Where it went, in the drill that had least to spare; None if no K2 said so."""
        return self.search.tightest.accounting

    @property
    def estimate(self) -> int:
        """What `placement.sizing` would have called enough, knowing K2's page size."""
        return self.expectation.smallest((self.accounting or {}).get("page_size") or LARGE_PAGE)

    @property
    def ratios(self) -> dict[str, float]:
        """The estimate and what distributions recommend, by name, as so many times what was found."""
        twin = self.request.twin
        sizes = {
            f"estimated: {format_size(self.estimate)}": self.estimate,
            **{
                f"recommended by {each.vendor}: {format_size(each.size)}": each.size
                for each in recommended(twin.memory, twin.smp)
            },
        }
        return {name: size / self.search.found for name, size in sizes.items()}

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        twin, search = self.request.twin, self.search
        return {
            "title": self.request.title,
            "placement": self.request.placement,
            "command": shlex.join(self.request.command()),
            "found": search.found,
            "passed": search.passed,
            "drills": len(search.at_found),
            "failed": search.failed,
            "margin": self.margin,
            "recommended": self.recommended,
            "crashkernel": f"{self.recommended >> 20}M",
            "estimate": self.estimate,
            "distributions": [asdict(each) for each in recommended(twin.memory, twin.smp)],
            "accounting": self.accounting,
            "trials": [
                {
                    "size": trial.size,
                    "finding": trial.finding,
                    "reason": trial.reason,
                    "spare": trial.spare,
                    "seconds": trial.seconds,
                }
                for trial in search.trials
            ],
        }


def size_reservation(
    request: DrillRequest,
    supplies: Supplies,
    run: str,
    listener: Listener,
    *,
    confirmations: int = CONFIRMATIONS,
    margin: int = MARGIN,
) -> Sized:
    """Find the smallest reservation with which the drill passes; `worker.stop(run)` ends it.

    :raise VerificationError: no reservation does, or a drill failed for another reason.
    :raise EnvironmentFault: a drill could not be run.
    """
    step = step_of(request)
    expectation = expect(request, supplies)
    search = find_smallest(
        DrillProbe(request, run, listener),
        align_up(expectation.smallest() * 9 // 8, step),
        request.twin.memory // 2,
        step,
        confirmations,
        listener.ended,
    )
    return Sized(at_size(request, search.found), search, expectation, margin)


def require_database(path: Path) -> None:
    """Refuse one that sizes could not be added to: before the drills, not after them.

    :raise UsageError: it cannot be opened, or is no campaign's.
    """
    with _written(path) as connection:
        # SQLite opens a file that it may not write for reading, and lets a transaction begin: only a change is refused.
        connection.execute("DELETE FROM size WHERE false")


def keep_sizes(path: Path, found: Iterable[Sized]) -> None:
    """Add what was found to a campaign's database, all of it or nothing.

    :raise UsageError: it cannot be written.
    """
    rows = [
        (
            sized.request.title,
            json.dumps(sized.request.options(), sort_keys=True),
            json.dumps(sized.record()),
            sized.search.found,
            sized.recommended,
            utc_now(),
        )
        for sized in found
    ]
    with _written(path) as connection, connection:
        connection.executemany("INSERT INTO size VALUES (?, ?, ?, ?, ?, ?)", rows)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with contextlib.closing(connect(path, write=True)) as connection:
            yield connection
    except sqlite3.Error as error:
        raise UsageError(f"cannot write {path}: {error}", hint="--json keeps the figures without a database") from error
