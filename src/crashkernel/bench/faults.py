"""The fault map: every instruction of a handover, and at each of them everything that might go wrong.

One walk goes through the handover. At each instruction (of loops: see `score`) a fault is injected, the purgatory is let run on
to whatever end it finds, the outcome is judged, all is put back, and the walk goes on.

A DMA write or a flipped bit meets the CPU in memory alone. Until the CPU next touches what was struck (loads, stores, executes
it) no instruction is different from another: the same memory and the same registers come of it. So these are injected once
between two such touches, and what comes of it holds for all instructions there, exactly. A machine check or a system reset is
taken at every instruction.
"""

from __future__ import annotations

import collections
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crashkernel.bench.scene import NO_FAULT, faults_of, scene
from crashkernel.bench.walk import OUTCOMES, UNEXPLAINED, Walk
from crashkernel.drill.debian import silent
from crashkernel.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from crashkernel.bench.scene import Fault, Placement, Scene
    from crashkernel.bench.score import Point
    from crashkernel.bench.walk import Outcome, Verdict
    from crashkernel.drill.debian import Progress


@dataclass(frozen=True, slots=True)
class Stretch:
    """The same came of a fault at these points: numbers of the first and of the last."""

    fault: Fault
    first: int
    last: int
    verdict: Verdict


@dataclass(frozen=True)
class FaultMap:
    """All results of one scene."""

    scene: str
    cpu: str
    little: bool
    instructions: int
    points: tuple[Point, ...]
    stretches: tuple[Stretch, ...]
    injected: int
    """Runs; each stands for all points up to the next touch of what was struck."""

    def table(self, key: Callable[[Stretch, int], str], *, weighted: bool = False) -> dict[str, collections.Counter[str]]:
        """By what `key` says of a stretch and one of its points: how many points there are of each outcome."""
        table: dict[str, collections.Counter[str]] = {}
        for stretch in self.stretches:
            for number in range(stretch.first, stretch.last + 1):
                weight = self.points[number].weight if weighted else 1
                table.setdefault(key(stretch, number), collections.Counter())[stretch.verdict.outcome] += weight
        return table

    def count(self, *, weighted: bool = False) -> dict[Outcome, int]:
        """How many points of each outcome; or instructions, each point counted for those it stands for."""
        found = self.table(lambda _stretch, _number: "", weighted=weighted).get("", collections.Counter())
        return {outcome: found[outcome] for outcome in OUTCOMES}

    def reasons(self, *, weighted: bool = False) -> dict[str, collections.Counter[str]]:
        """Why faults stay silent: by reason how many points of each outcome."""
        return {reason: row for reason, row in self.table(lambda s, _: s.verdict.reason, weighted=weighted).items() if reason}

    @property
    def unexplained(self) -> list[Stretch]:
        """What is silent for no reason that we know."""
        return [stretch for stretch in self.stretches if stretch.verdict.reason == UNEXPLAINED]


def fault_map(
    placement: Placement, *, cpu: str = "POWER9", little: bool = True, every: int = 1, faults: Iterable[str] | None = None,
    progress: Progress = silent,
) -> FaultMap:  # fmt: skip
    """Walk through a handover and inject all faults, or those named, at every point, or at each `every`-th.

    :raise VerificationError: the handover does not come to its end when nothing disturbs it.
    """
    return map_scene(scene(placement), cpu=cpu, little=little, every=every, faults=faults, progress=progress)


def map_scene(
    setting: Scene, *, cpu: str, little: bool, every: int, faults: Iterable[str] | None = None, progress: Progress = silent
) -> FaultMap:
    """The map of any scene."""
    names = None if faults is None else set(faults)
    chosen = [fault for fault in faults_of(setting) if names is None or fault.name in names]
    open_: dict[Fault, Stretch] = {}
    closed: list[Stretch] = []
    injected = 0
    with Walk(cpu, setting, little=little) as walk:
        undisturbed = walk.disturbed(NO_FAULT, walk.stepper.save())
        if undisturbed.outcome != "good" or undisturbed.why:
            raise VerificationError(f"an undisturbed handover: {undisturbed}")
        touched = {fault: walk.score.touches(fault.struck)[0] for fault in chosen if fault.in_memory}
        points = walk.score.points[::every]
        for number, point in enumerate(points):
            if not number % 100:
                progress(f"{setting.name}, {point.phase}: {100 * number // len(points)} %, {injected:,} faults injected")
            walk.advance(point)
            _ = walk.guarded  # noted at every point
            here = None
            for fault in chosen:
                last = open_.get(fault)
                if last is not None and fault in touched:
                    since, until = np.searchsorted(touched[fault], (points[number - 1].index, point.index))
                    if since == until:
                        open_[fault] = Stretch(fault, last.first, number, last.verdict)
                        continue
                here = here or walk.stepper.save()
                verdict = walk.disturbed(fault, here)
                injected += 1
                if last is not None and last.verdict == verdict:
                    open_[fault] = Stretch(fault, last.first, number, verdict)
                    continue
                if last is not None:
                    closed.append(last)
                open_[fault] = Stretch(fault, number, number, verdict)
    order = {fault: number for number, fault in enumerate(chosen)}
    stretches = sorted((*closed, *open_.values()), key=lambda stretch: (order[stretch.fault], stretch.first))
    return FaultMap(setting.name, cpu, little, len(walk.score.pcs), points, tuple(stretches), injected)


def to_json(maps: Sequence[FaultMap]) -> str:
    """All results, for other tools."""
    return json.dumps([_plain(each) for each in maps])


def _plain(each: FaultMap) -> dict[str, Any]:
    points = [[p.index, f"{p.pc:#x}", p.phase, p.weight] for p in each.points]
    stretches = [
        [s.fault.kind, s.fault.name, s.first, s.last, s.verdict.outcome, s.verdict.why, s.verdict.reason]
        for s in each.stretches
    ]
    return {
        "scene": each.scene, "cpu": each.cpu, "little": each.little, "instructions": each.instructions,
        "injected": each.injected, "plain": each.count(), "weighted": each.count(weighted=True),
        "point": ["index", "pc", "phase", "instructions"], "points": points,
        "stretch": ["kind", "fault", "first point", "last point", "outcome", "why", "reason"], "stretches": stretches,
    }  # fmt: skip
