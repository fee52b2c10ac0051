"""Two runs of a campaign side by side: what got better, what got worse, and how long it took."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from crashkernel.report.campaign import numberless

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from crashkernel.report.campaign import Campaign, Drill

Kind = Literal["worse", "better", "changed"]


@dataclass(frozen=True, slots=True)
class Change:
    """One drill that both have, with another result."""

    kind: Kind
    before: Drill
    after: Drill


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Median seconds of a stage, of the drills that passed in both."""

    name: str
    before: float
    after: float
    drills: int

    @property
    def ratio(self) -> float:
        """How much longer it takes now; 1.0 for what takes no time at all."""
        return self.after / self.before if self.before else 1.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that differs."""

    changes: tuple[Change, ...]
    new: tuple[Drill, ...]  # only the second has them
    gone: tuple[Drill, ...]  # only the first
    same: int
    compared: int  # drills that have a result in both
    stages: tuple[StageTimes, ...]

    @property
    def lost(self) -> list[Drill]:
        """Those that passed in the first and have no result in the second: whether they got worse is not known."""
        unknown = [*(change.before for change in self.changes if change.after.result is None), *self.gone]
        return [drill for drill in unknown if drill.result is not None and drill.result.verdict == "PASS"]

    @property
    def exit_status(self) -> int:
        """0 nothing got worse; 1 something did; 3 nothing is known to, but not all could be compared that passed before."""
        return 1 if self.of("worse") else 3 if self.lost or not self.compared else 0

    def of(self, kind: Kind) -> list[Change]:
        """The changes of one kind."""
        return [change for change in self.changes if change.kind == kind]


def compare_campaigns(before: Campaign, after: Campaign) -> Comparison:
    """Drill by drill. Two are the same if their options and repeats are, whatever the seeds of their faults."""
    pairs = list(_pairs(before.drills, after.drills))
    matched = {id(drill) for pair in pairs for drill in pair}
    changes = [Change(kind, old, new) for old, new in pairs if (kind := _kind(old, new))]
    order: list[Kind] = ["worse", "better", "changed"]
    return Comparison(
        tuple(sorted(changes, key=lambda change: order.index(change.kind))),
        tuple(drill for drill in after.drills if id(drill) not in matched),
        tuple(drill for drill in before.drills if id(drill) not in matched),
        len(pairs) - len(changes),
        sum(old.result is not None and new.result is not None for old, new in pairs),
        tuple(_stage_times(pairs)),
    )


def _pairs(before: Iterable[Drill], after: Iterable[Drill]) -> Iterator[tuple[Drill, Drill]]:
    keys = {drill.key: drill for drill in before}
    loose = []
    for drill in after:
        if drill.key in keys:
            yield keys.pop(drill.key), drill
        else:
            loose.append(drill)
    # of one campaign with another seed
    counts = [Counter(map(_without_seed, side)) for side in (keys.values(), loose)]
    seedless = {name: drill for drill in keys.values() if counts[0][name := _without_seed(drill)] == 1}
    for drill in loose:
        name = _without_seed(drill)
        if name in seedless and counts[1][name] == 1:
            yield seedless[name], drill


def _without_seed(drill: Drill) -> str:
    return json.dumps([{k: v for k, v in drill.options.items() if k != "seed"}, drill.repeat], sort_keys=True)


def _kind(before: Drill, after: Drill) -> Kind | None:
    old, new = before.result, after.result
    if old is None or new is None:
        return None if old is new else "changed"
    if old.verdict == new.verdict:
        alike = old.stage == new.stage and numberless(old.reason) == numberless(new.reason)
        return None if alike else "changed"
    return "worse" if old.verdict == "PASS" else "better" if new.verdict == "PASS" else "changed"


def _stage_times(pairs: Iterable[tuple[Drill, Drill]]) -> Iterator[StageTimes]:
    times: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for before, after in pairs:
        if before.result and after.result and before.result.verdict == after.result.verdict == "PASS":
            now = dict(after.result.stages)
            for name, seconds in before.result.stages:
                if name in now:
                    times[name].append((seconds, now[name]))
            times["whole drill"].append((before.result.seconds, after.result.seconds))
    whole = times.pop("whole drill", None)
    for name, values in [*times.items(), *([("whole drill", whole)] if whole else [])]:
        yield StageTimes(name, median(old for old, _ in values), median(new for _, new in values), len(values))


def comparison_record(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON; times in seconds."""

    def drill(each: Drill) -> dict[str, Any]:
        result = each.result
        return {
            "number": each.number,
            "title": each.title,
            "command": each.command,
            "verdict": result.verdict if result else None,
            "stage": result.stage if result else "",
            "reason": result.reason if result else "",
        }

    return {
        "changes": [
            {"kind": change.kind, "before": drill(change.before), "after": drill(change.after)} for change in comparison.changes
        ],
        "new": [drill(each) for each in comparison.new],
        "gone": [drill(each) for each in comparison.gone],
        "same": comparison.same,
        "compared": comparison.compared,
        "lost": [drill(each) for each in comparison.lost],
        "stages": [
            {"name": s.name, "before": s.before, "after": s.after, "ratio": round(s.ratio, 3), "drills": s.drills}
            for s in comparison.stages
        ],
    }
