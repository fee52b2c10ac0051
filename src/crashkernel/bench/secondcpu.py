"""A second CPU at each point of a handover: one that arrives at 0x60 just then, and one that K1 lost hold of.

The crashing CPU expects it and does not wait (a wait would make the way another each time); that it waits, and that it counts
whoever has come before it, are cases of their own. At each point the second CPU first goes its way out of page 0, while the
first stands still; then QEMU lets both run at once, and what is seen is one of their interleavings.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from crashkernel.bench.scene import NO_FAULT, OTHER, PAGE, scene
from crashkernel.bench.walk import Walk
from crashkernel.drill.debian import silent

if TYPE_CHECKING:
    from crashkernel.bench.scene import Placement
    from crashkernel.bench.walk import Outcome
    from crashkernel.drill.debian import Progress

Coming = Literal["early", "waited for", "now", "after K2's entry", "never", "straggler"]

_LATE = 10.0  # seconds for a handover of some milliseconds
_SOON = 0.03  # seconds for a CPU that spins to have come there
_FOR_EVER = 1 << 60  # ticks of the time base
_AT_A_POINT: tuple[Coming, ...] = ("now", "straggler")
_SHORT = b"crashkernel: 0x0000 of 0x0001 other CPUs came"
_COMPLAINTS = (b"DAMAGED", b"exception", b"is no operation")
_DECREMENTER = 0x900
_HEAD = 40  # instructions at most from an entry in page 0 to the purgatory's code


@dataclass
class SecondCpu:
    """How often what came of it: outcome, and where the second CPU was at last."""

    scene: str
    cpu: str
    little: bool
    found: dict[Coming, collections.Counter[tuple[Outcome, str]]] = field(default_factory=dict)
    where: dict[tuple[Coming, Outcome, str], list[str]] = field(default_factory=dict)
    """The phases in which that was so."""

    def note(self, coming: Coming, outcome: Outcome, end: str, phase: str) -> None:
        """One case."""
        self.found.setdefault(coming, collections.Counter())[outcome, end] += 1
        phases = self.where.setdefault((coming, outcome, end), [])
        if phase not in phases:
            phases.append(phase)

    @property
    def silent(self) -> int:
        """Cases in which K2 was damaged or not entered, and nothing said."""
        return sum(n for row in self.found.values() for (outcome, _), n in row.items() if outcome.startswith("silent"))


def second_cpu(
    placement: Placement, *, cpu: str = "POWER9", little: bool = True, every: int = 1, progress: Progress = silent
) -> SecondCpu:
    """All cases, those at points of the handover at each `every`-th."""
    found = SecondCpu(placement, cpu, little)
    with Walk(cpu, scene(placement, slaves=1), little=little, count=2) as walk:
        start = walk.stepper.save()
        found.note("never", *_judged(walk, 0), "")
        _arrive(walk)
        found.note("after K2's entry", _judged(walk)[0], _last_seen(walk), "K2")
        walk.put_back(start, alive=True)
        _arrive(walk)
        walk.stepper.stop_at(())
        walk.stepper.run(_SOON, 1)
        found.note("early", *_judged(walk, 0, 1), "")
        walk.put_back(start, alive=True)
        points = walk.score.points[::every]
        for number, point in enumerate(points):
            walk.advance(point)
            here = walk.stepper.save()
            for coming in _AT_A_POINT:
                _arrive(walk, straggling=coming == "straggler")
                found.note(coming, *_judged(walk, 0, 1), point.phase)
                walk.put_back(here, alive=True)
            if not number % 50:
                progress(f"{placement}, a second CPU: {100 * number // len(points)} %")
    with Walk(cpu, scene(placement, slaves=1, slave_timeout=_FOR_EVER), little=little, count=2, scored=False) as walk:
        walk.stepper.run(_SOON, 0)
        _arrive(walk)
        found.note("waited for", *_judged(walk, 0, 1), "")
    return found


def _arrive(walk: Walk, *, straggling: bool = False) -> None:
    """The second CPU stands at 0x60 as K1 leaves it, or at the vector of an interrupt that it takes somewhere in K1."""
    walk.set_up(1)
    walk.stepper.enter(0x60, physical=OTHER, little=walk.little, cpu=1)
    if straggling:
        (msr,) = walk.stepper.read("msr", cpu=1)
        walk.interrupt(_DECREMENTER, {"msr": msr, "pc": 0x3000}, 1)
    for _ in range(_HEAD):  # out of page 0, before the first CPU goes on
        pc = walk.stepper.step(1)
        if pc >= PAGE:
            break


def _judged(walk: Walk, *running: int) -> tuple[Outcome, str]:
    """Let these CPUs run, if any, to the first one's end; what came of it, and where the second is."""
    stepper, seen = walk.stepper, ""
    end = "entered" if not running else ""
    stepper.stop_at(walk.ends)
    while not end:
        came = stepper.run(_LATE, *running)
        if came is None:
            end = "stuck"
            break
        (pc,) = stepper.read("pc", cpu=came)
        if pc == walk.scene.entry and (came or not walk.k2_is_there()):
            stepper.step(came)
        elif came:
            seen, running = walk.ends[pc], (0,)
        else:
            end = walk.ends[pc]
    wrong = walk.wrong(NO_FAULT).what if end == "entered" else end
    said = walk.said()
    if wrong:
        told = any(word in said for word in _COMPLAINTS)
        return "told" if told else "silent damage" if end == "entered" else "silent hang", wrong
    if 1 in running:
        seen = _last_seen(walk)
    return "told" if _SHORT in said else "good", seen


def _last_seen(walk: Walk) -> str:
    """Where the second CPU goes when it is let run on."""
    stepper, base = walk.stepper, walk.scene.base
    stepper.stop_at(walk.ends.keys() - {walk.scene.entry})
    if stepper.run(_SOON, 1) is not None:
        return walk.ends[stepper.read("pc", cpu=1)[0]]
    (pc,) = stepper.read("pc", cpu=1)
    return "in the purgatory" if base + 0x1000 <= pc < base + 0x2000 else f"astray at {pc:#x}"


def render_second_cpu(each: SecondCpu) -> str:
    """A table of when it came, what came of it, and where it is at last."""
    lines = [f"{each.scene}, {each.cpu} {'LE' if each.little else 'BE'}: a second CPU"]
    for coming, row in each.found.items():
        for (outcome, end), number in row.items():
            phases = each.where[coming, outcome, end]
            where = f"; {phases[0]} to {phases[-1]}" if len(phases) > 1 else f"; {phases[0]}" if phases[0] else ""
            lines.append(f"  {coming:18}{outcome:15}{number:>7,}  it is {end or 'nowhere'}{where}")
    return "\n".join(lines)
