"""A campaign's figures, worked out once for every form that shows them: terminal, page, JSON, exit status."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, cast

from crashkernel.memory import Range, format_size
from crashkernel.placement.plan import PLACEMENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

Standing = Literal["failed", "surprise", "error", "missing", "known", "passed"]
STANDINGS: dict[Standing, tuple[str, str, str]] = {
    "failed": ("FAIL", "FAILED", "FAILED"),
    "surprise": ("PASS!", "passed though known to fail", "passed though known to fail"),
    "error": ("ERROR", "could not be run", "could not be run"),
    "missing": ("not run", "not run yet", "not run yet"),
    "known": ("known", "known failure", "known failures"),
    "passed": ("PASS", "passed", "passed"),
}
"""What a drill's result is against what the campaign's file expects, the worst first: the word of a cell, and for how many."""

EXPECTED: tuple[Standing, ...] = ("passed", "known")
_TOLD: tuple[Standing, ...] = ("passed", "known", "surprise", "failed", "error", "missing")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a drill. Times are in seconds, sizes in bytes; `compared` is None where the record does not say."""

    verdict: Literal["PASS", "FAIL", "ERROR"]
    stage: str  # where it ended, "" for PASS
    reason: str  # one line, "" for PASS
    release: str
    capture_release: str
    seconds: float
    boot_seconds: float  # both boots
    cpu_seconds: float
    started: str
    ended: str
    worker: str
    host: str
    attempt: int
    stages: tuple[tuple[str, float], ...]
    compared: int | None
    told: tuple[str, ...]  # what came of each fault


@dataclass(frozen=True, slots=True)
class Drill:
    """One drill of the campaign, run or not."""

    number: int
    key: str
    repeat: int
    title: str
    command: str
    options: Mapping[str, Any]
    kernel: str
    capture_kernel: str
    machine: str
    cpu: str
    mmu: str
    smp: int
    memory: int
    crashkernel: str
    placement: str
    all_cpus: bool
    capture: int | None
    fault: str
    seed: int
    known: str  # why it is known to fail, "" if it is not
    result: Result | None

    @property
    def standing(self) -> Standing:
        """Its result against what was expected."""
        if self.result is None:
            return "missing"
        if self.result.verdict == "ERROR":
            return "error"
        if self.result.verdict == "PASS":
            return "surprise" if self.known else "passed"
        return "known" if self.known else "failed"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a drill left behind: texts as they are in the database, "" or None where there is nothing (that can be read)."""

    console: str
    likely: str
    problems: tuple[str, ...]
    wrong: tuple[tuple[Range, str], ...]  # where K1 had the bytes that are wrong, and what lived there
    plan: str  # JSON


@dataclass(frozen=True, slots=True)
class Run:
    """One time that a driver worked on the campaign. `seconds` is None if it was killed and nothing says when."""

    started: str
    ended: str
    seconds: float | None
    workers: int
    cpus: int
    end: str  # "done", "interrupted", "killed"; "" for killed, or still at it


@dataclass(frozen=True, slots=True)
class Size:
    """What `crashkernel size` found: the smallest reservation that did. Sizes are in bytes, None for what it does not say."""

    title: str
    command: str  # drills with what was found
    found: int
    recommended: int | None
    failed: int | None  # the largest that did not do, 0 if none was seen to fail
    passed: int | None  # drills with what was found that passed
    drills: int | None  # all with what was found: one of them may have failed without a word of memory
    compared: tuple[tuple[str, int], ...]  # what others say, by name
    peaks: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]  # when K2 had least, and what took its memory then
    result: Mapping[str, Any]  # all that `crashkernel size` said

    @property
    def facts(self) -> list[str]:
        """What was found, one line each."""
        found = f"{format_size(self.found)} was enough"
        if self.passed:
            found += f", {self.passed} times of {self.drills}" if self.drills else f", {self.passed} times"
        if self.failed is not None:
            found += f"; {format_size(self.failed)} was not" if self.failed else "; nothing smaller was seen to fail"
        return [*([f"recommended: crashkernel={self.recommended >> 20}M"] if self.recommended else []), found]

    @property
    def bars(self) -> tuple[tuple[str, int], ...]:
        """All sizes that are worth a comparison, by name."""
        return (("found", self.found), *([("recommended here", self.recommended)] if self.recommended else []), *self.compared)


@dataclass(frozen=True, slots=True)
class Cell:
    """What is known of one combination: its drills, repeats of each other."""

    drills: tuple[Drill, ...]

    @property
    def standing(self) -> Standing:
        """The worst of them."""
        return worst(self.drills)

    @property
    def passed(self) -> int:
        """How many did."""
        return sum(1 for drill in self.drills if drill.result is not None and drill.result.verdict == "PASS")

    @property
    def word(self) -> str:
        """For people: "PASS", "FAIL 19/20" (of the repeats so many passed)."""
        word = STANDINGS[self.standing][0]
        return word if len(self.drills) == 1 else f"{word} {self.passed}/{len(self.drills)}"

    @property
    def compared(self) -> str:
        """How much of K1's memory was compared byte for byte, "" if nothing says so."""
        sizes = sorted({d.result.compared for d in self.drills if d.result is not None and d.result.compared})
        return " to ".join(format_size(size) for size in dict.fromkeys((sizes[0], sizes[-1]))) if sizes else ""

    @property
    def first(self) -> Drill:
        """The drill to look at first."""
        order = list(STANDINGS)
        return min(self.drills, key=lambda drill: (order.index(drill.standing), drill.number))


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: its names, and a cell for each column, None where there is no such drill."""

    heads: tuple[str, ...]
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Combinations of a campaign. `alike` is what they are where nothing else is said."""

    heads: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]  # machine, or "" if all are on one; placement
    rows: tuple[Row, ...]
    alike: tuple[str, ...]

    @property
    def grouped(self) -> bool:
        """Whether the first name stands above its rows, and not in each: it does where it names many."""
        return len(self.heads) > 1 and 2 * len({row.heads[0] for row in self.rows}) <= len(self.rows)


@dataclass(frozen=True, slots=True)
class Spread:
    """How values are distributed: all of them, ascending and never none."""

    values: tuple[float, ...]

    def quantile(self, share: float) -> float:
        """The value that `share` of them do not exceed, between two of them where it falls there."""
        place = share * (len(self.values) - 1)
        below = math.floor(place)
        above = min(below + 1, len(self.values) - 1)
        return self.values[below] + (self.values[above] - self.values[below]) * (place - below)

    @property
    def median(self) -> float:
        """The one in the middle."""
        return self.quantile(0.5)


@dataclass(frozen=True, slots=True)
class Failures:
    """Drills that ended alike: the same standing, stage and reason, numbers in it apart."""

    standing: Standing
    stage: str
    reason: str  # of the first
    known: str
    drills: tuple[Drill, ...]

    @property
    def varied(self) -> bool:
        """Whether the reasons differ in their numbers."""
        return len({drill.result.reason for drill in self.drills if drill.result is not None}) > 1

    @property
    def why(self) -> str:
        """The reason in one line, with the stage; of a known failure first what is known."""
        stage = f"{self.stage}: " if self.stage and not self.reason.startswith(f"{self.stage}: ") else ""
        why = stage + self.reason + (" (and alike, with other numbers)" if self.varied else "")
        return f"{self.known} ({why})" if self.known and why else self.known or why or "no reason was given"


@dataclass(frozen=True, slots=True)
class Campaign:
    """All that a report is made of."""

    name: str
    file: str
    created: str
    version: str  # of crashkernel
    host: Mapping[str, Any]
    state: str
    runs: tuple[Run, ...]
    drills: tuple[Drill, ...]
    sizes: tuple[Size, ...]
    evidence: Mapping[int, Evidence] = field(default_factory=dict)  # of the drills that did not pass, and of `pair`

    @property
    def counts(self) -> dict[Standing, int]:
        """How many drills stand how; those that none does are 0."""
        counted = Counter(drill.standing for drill in self.drills)
        return {standing: counted[standing] for standing in STANDINGS}

    @property
    def placements(self) -> list[str]:
        """Those that occur, in the order of all tables."""
        return _placements(self.drills)

    @property
    def exit_status(self) -> int:
        """0 all as expected; 1 a drill was not; 3 none was not, but some could not be run, or were not yet."""
        counts = self.counts
        return 1 if counts["failed"] or counts["surprise"] else 3 if counts["error"] or counts["missing"] else 0

    @property
    def wall_seconds(self) -> float | None:
        """How long drivers worked on it; None if that is not known of each."""
        return sum(cast("float", run.seconds) for run in self.runs) if self._timed else None

    @property
    def core_seconds(self) -> float | None:
        """The same, times the CPUs that they could use."""
        return sum(cast("float", run.seconds) * run.cpus for run in self.runs) if self._timed else None

    @property
    def _timed(self) -> bool:
        return bool(self.runs) and all(run.seconds is not None for run in self.runs)

    @property
    def cores(self) -> int:
        """CPUs of the largest run."""
        return max((run.cpus for run in self.runs), default=0)

    @property
    def results(self) -> list[Result]:
        """Those there are."""
        return [drill.result for drill in self.drills if drill.result is not None]

    @property
    def rate(self) -> float | None:
        """Drills per core-hour."""
        return len(self.results) * 3600 / self.core_seconds if self.core_seconds and self.results else None

    @property
    def shares(self) -> tuple[float, float, float] | None:
        """What the workers' time went into, as shares of it: the two boots, the rest of the drills, waiting for one."""
        drilled = sum(result.seconds for result in self.results)
        offered = max(drilled, sum(cast("float", run.seconds) * run.workers for run in self.runs) if self._timed else 0.0)
        if not drilled:
            return None
        boots = min(drilled, sum(result.boot_seconds for result in self.results))
        return boots / offered, (drilled - boots) / offered, 1 - drilled / offered

    @property
    def answer(self) -> str:
        """How many drills, and how they stand."""
        counts = self.counts
        told = ", ".join(f"{counts[each]} {STANDINGS[each][1 + (counts[each] != 1)]}" for each in _TOLD if counts[each])
        return f"{_plural(len(self.drills), 'drill')}: {told}" if self.drills else "no drills"

    @property
    def measures(self) -> list[tuple[str, str]]:
        """What it took: figures, and what they are of. What is not known is left out."""
        measures = []
        if self.wall_seconds is not None and self.results:
            measures.append((duration(self.wall_seconds), f"on {_plural(self.cores, 'core')}"))
        if self.rate is not None:
            measures.append((f"{self.rate:.0f}", "drills per core-hour"))
        if self.shares is not None:
            measures.append((f"{1 - self.shares[0]:.0%}", "of the time not the two boots"))
        return measures

    @property
    def headline(self) -> str:
        """The answer and what it took, in one line."""
        return "; ".join([self.answer, *(" ".join(measure) for measure in self.measures)])

    @property
    def facts(self) -> list[str]:
        """What stands below the headline in every form: one line each."""
        host = self.host
        machine = [
            *([_plural(host["cpus"], "CPU")] if isinstance(host.get("cpus"), int) else []),
            *([format_size(host["memory"])] if isinstance(host.get("memory"), int) and host["memory"] >= 0 else []),
            *(f"{name} {host[key]}" for key, name in (("qemu", "QEMU"), ("python", "Python")) if host.get(key)),
        ]
        facts = [
            ", ".join(
                [f"crashkernel {self.version}", *machine, *([f"begun {_to_the_minute(self.created)}"] if self.created else [])]
            )
        ]
        if self.runs:
            ends = Counter({"done": "", "": "killed or still at it"}.get(run.end, run.end) for run in self.runs)
            ended = ", ".join(f"{count} {word}" for word, count in ends.items() if word)
            slots = max(run.workers for run in self.runs)
            told = f"{_plural(len(self.runs), 'run')} of the driver" + (f" ({ended})" if ended else "")
            facts.append(f"{told}, {_plural(slots, 'drill')} at a time")
        if (shares := self.shares) is not None:
            boots, rest, waiting = shares
            facts.append(
                f"the workers' time: {boots:.0%} the two boots, {rest:.0%} the rest of the drills, {waiting:.0%} waiting"
            )
        return facts

    @property
    def matrix(self) -> Table:
        """The drills without a fault: configurations by placement."""
        return _table([drill for drill in self.drills if not drill.fault], ("K1", *_MACHINE))

    @property
    def faults(self) -> Table:
        """Those with one: faults by machine and placement."""
        return _table([drill for drill in self.drills if drill.fault], ("fault",), _MACHINE)

    @property
    def fault_rows(self) -> Table:
        """The same with each machine in a row of its own, where there is no room for columns."""
        return _table([drill for drill in self.drills if drill.fault], ("fault", *_MACHINE))

    @property
    def failures(self) -> tuple[Failures, ...]:
        """What did not simply pass, the worst first, larger groups before smaller ones."""
        groups: defaultdict[tuple[str, ...], list[Drill]] = defaultdict(list)
        for drill in self.drills:
            if drill.result is not None and drill.standing != "passed":
                result = drill.result
                groups[drill.standing, drill.known, result.stage, numberless(result.reason)].append(drill)
        order = list(STANDINGS)
        found = []
        for (standing, known, stage, _), drills in groups.items():
            assert drills[0].result is not None, "only drills with a result are grouped"
            found.append(Failures(cast("Standing", standing), stage, drills[0].result.reason, known, tuple(drills)))
        return tuple(sorted(found, key=lambda g: (order.index(g.standing), -len(g.drills), g.drills[0].number)))

    @property
    def timed(self) -> list[tuple[str, Result]]:
        """Placement and result of the drills whose times are told: that passed, and without a fault if there are any such."""
        passed = [(drill, drill.result) for drill in self.drills if drill.result is not None and drill.result.verdict == "PASS"]
        plain = [(drill, result) for drill, result in passed if not drill.fault]
        return [(drill.placement, result) for drill, result in plain or passed]

    @property
    def stage_times(self) -> dict[str, dict[str, Spread]]:
        """How long each stage took, by placement; stages in their order."""
        places: defaultdict[str, list[int]] = defaultdict(list)
        times: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
        for placement, result in self.timed:
            for place, (name, seconds) in enumerate(result.stages):
                places[name].append(place)
                times[name].append((placement, seconds))
        order = sorted(places, key=lambda name: (sum(places[name]) / len(places[name]), name))
        return {name: self._spreads(times[name]) for name in order}

    @property
    def totals(self) -> dict[str, Spread]:
        """Whole drills, by placement."""
        return self._spreads([(placement, result.seconds) for placement, result in self.timed])

    def _spreads(self, times: Sequence[tuple[str, float]]) -> dict[str, Spread]:
        found = {placement: sorted(seconds for p, seconds in times if p == placement) for placement in self.placements}
        return {placement: Spread(tuple(values)) for placement, values in found.items() if values}

    @property
    def pair(self) -> tuple[Drill, ...]:
        """The first configuration without a fault that passed in both placements, to be shown side by side."""
        found: defaultdict[tuple[str, ...], dict[str, Drill]] = defaultdict(dict)
        for drill in self.drills:
            if drill.standing == "passed" and not drill.fault:
                same = found[tuple(get(drill) for get in _AXES.values())]
                same.setdefault(drill.placement, drill)
                if len(same) > 1:
                    return tuple(same[placement] for placement in _placements(same.values()))
        return ()


def worst(drills: Iterable[Drill]) -> Standing:
    """The worst standing of any of these, of which there is one at least."""
    standings = {drill.standing for drill in drills}
    return next(standing for standing in STANDINGS if standing in standings)


def numberless(reason: str) -> str:
    """A reason, its numbers apart: what is the same of two drills that failed alike."""
    return _NUMBER.sub("#", reason)


def duration(seconds: float) -> str:
    """For people: "12.3 s", "41 min", "3 h 20 min"."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def moment(text: str) -> datetime | None:
    """A time of a database, None for what is none."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _to_the_minute(text: str) -> str:
    """A moment for people, in its own time zone; what is none stays as it is."""
    when = moment(text)
    return text if when is None else f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".rstrip()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


# ------------------------------------------------------------------------------------------------------------------- tables

_TOLD_APART = {
    *("kernel", "capture-kernel", "machine", "cpu", "mmu", "smp", "memory", "crashkernel", "placement", "all-cpus"),
    *("capture", "fault", "seed"),
}


def further_options(drill: Drill) -> str:
    """Options that have no place of their own in a table."""
    return " ".join(
        name if value is True else f"{name}={value}" for name, value in drill.options.items() if name not in _TOLD_APART
    )


_SAME = "the same"
_AXES: dict[str, Callable[[Drill], str]] = {
    "fault": lambda drill: drill.fault,
    "K1": lambda drill: drill.kernel,
    "K2": lambda drill: drill.capture_kernel if drill.capture_kernel not in ("", drill.kernel) else _SAME,
    "machine": lambda drill: drill.machine,
    "CPU": lambda drill: drill.cpu,
    "MMU": lambda drill: drill.mmu,
    "CPUs K1, K2": lambda drill: f"{drill.smp}, {drill.smp if drill.all_cpus else 1}",
    "memory": lambda drill: format_size(drill.memory),
    "crashkernel=": lambda drill: drill.crashkernel,
    "saved by": lambda drill: "copying" if drill.capture is None else f"capture {drill.capture}",
    "options": further_options,
}
_MACHINE = ("machine", "CPU", "MMU", "CPUs K1, K2")
ELSE = "else"
"""The column for what is not as usual."""
_NUMBER = re.compile(r"0x[0-9a-f]+|\d[\d,.]*")


def _placements(drills: Iterable[Drill]) -> list[str]:
    found = {drill.placement for drill in drills}
    return [*(each for each in PLACEMENTS if each in found), *sorted(found.difference(PLACEMENTS))]


def _table(drills: Sequence[Drill], heads: Sequence[str], across: Sequence[str] = ()) -> Table:
    """`heads` are the axes that have a column of names each, the first in any case and the others where they vary; `across` are
    those of the columns of cells. All others vary seldom: what they usually are is told once, and what differs in one column.
    """
    if not drills:
        return Table((), (), (), ())
    usual = {name: Counter(get(drill) for drill in drills).most_common(1)[0][0] for name, get in _AXES.items()}
    varied = [name for name, get in _AXES.items() if any(get(drill) != usual[name] for drill in drills)]
    shown = [name for name in heads if name in varied or name == heads[0]]
    sides = [name for name in across if name in varied]
    seldom = [name for name in varied if name not in (*heads, *across)]
    cells: defaultdict[tuple[tuple[str, ...], tuple[str, str]], list[Drill]] = defaultdict(list)
    rows: dict[tuple[str, ...], None] = {}
    columns: dict[str, None] = {}
    for drill in drills:
        other = ", ".join(_told(name, drill) for name in seldom if _AXES[name](drill) != usual[name])
        row = (*(_AXES[name](drill) for name in shown), *([other] if seldom else []))
        side = " ".join(_cpus(drill) if name == "CPUs K1, K2" else _AXES[name](drill) for name in sides)
        rows[row] = columns[side] = None
        cells[row, (side, drill.placement)].append(drill)
    order = {name: number for number, name in enumerate(dict.fromkeys(row[0] for row in rows))}
    places = tuple((side, placement) for side in columns for placement in _placements(drills))
    titles = ["K1 = K2" if name == "K1" and "K2" not in varied else name for name in shown]
    alike = [
        name for name in _AXES if name not in (*shown, *sides, "fault") and usual[name] and (name != "K2" or "K2" in varied)
    ]
    return Table(
        (*titles, *([ELSE] if seldom else [])),
        places,
        tuple(
            Row(row, tuple(Cell(tuple(found)) if (found := cells.get((row, place))) else None for place in places))
            for row in sorted(rows, key=lambda row: order[row[0]])
        ),
        tuple(f"{name}{'' if name.endswith('=') else ' '}{usual[name]}" for name in alike),
    )


def _cpus(drill: Drill) -> str:
    return _plural(drill.smp, "CPU") + (", all in K2" if drill.all_cpus and drill.smp > 1 else "")


def _told(name: str, drill: Drill) -> str:
    """What is not as usual, so that it can be told from what else may not be."""
    value = _AXES[name](drill)
    return f"{name} {value}" if name in ("K1", "K2") else f"{name}{value}" if name.endswith("=") else value
