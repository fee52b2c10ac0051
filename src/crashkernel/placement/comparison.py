"""Both placements and their variants side by side, for one machine and one capture kernel, and which of them to take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from crashkernel.errors import PlanError
from crashkernel.machine import Pages
from crashkernel.memory import RangeSet, format_size
from crashkernel.placement.cost import Cost, cost_of
from crashkernel.placement.hazards import quarantinable
from crashkernel.placement.reservation import behind_k1, specification

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from crashkernel.machine import Machine, PageUse
    from crashkernel.placement.plan import HazardVerdict, LoadPlan, PlacementName

_TAKEABLE: frozenset[PageUse] = frozenset(("free", "cache", "anonymous", "poisoned"))
"""What soft offlining takes out of K1's hands: free pages, and those it can move (docs/answers.md has what was seen)."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to do it. `plan` and `cost` are None when it cannot be done here; `obstacle` then says why."""

    name: str
    placement: PlacementName
    idea: str
    quarantine: bool = True  # what K1 could hand out of K2's memory is taken out of its hands first; of no use to "reserved"
    boot: str = ""  # what K1 is to be booted with first, "" for as it is
    plan: LoadPlan | None = None
    cost: Cost | None = None
    obstacle: str = ""

    @property
    def verdicts(self) -> Counter[HazardVerdict]:
        """How many checks came to each verdict."""
        return Counter(hazard.verdict for hazard in self.plan.hazards) if self.plan else Counter()


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The variant to take, None when none can be, and why, a sentence each."""

    variant: Variant | None
    reasons: tuple[str, ...]


def compare(machine: Machine, plan_on: Callable[[Machine, PlacementName], LoadPlan]) -> tuple[Variant, ...]:
    """The variants on `machine`; `plan_on` makes the plan for a machine and a placement, all else being settled."""
    return tuple(_worked_out(variant, on, plan_on) for variant, on in _variants(machine, plan_on))


def _variants(machine: Machine, plan_on: Callable[[Machine, PlacementName], LoadPlan]) -> Iterator[tuple[Variant, Machine]]:
    yield Variant("reserved", "reserved", "K2 runs in its region, where it is loaded", quarantine=False), machine
    try:
        out = quarantinable(plan_on(machine, "zero"), machine.base_page)
    except PlanError:
        out = RangeSet([])
    idea = "K2 changes places with K1; what K1 could hand out there is taken out of its hands"
    yield Variant("zero", "zero", idea), _without(machine, out)
    yield Variant("zero, no quarantine", "zero", "K2 changes places with K1, as the mail had it", quarantine=False), machine
    if machine.reserved is not None and machine.kernel_end:
        region = behind_k1(machine, machine.reserved.size)
        if region is not None:
            boot = f"crashkernel={specification(region)}"
            idea = "the mail's other fix: the region begins where K1 ends, and K2 is let grow into it"
            yield Variant("zero, right behind K1", "zero", idea, boot=boot), _without(machine.booted_with(region), out)


def _worked_out(variant: Variant, machine: Machine, plan_on: Callable[[Machine, PlacementName], LoadPlan]) -> Variant:
    try:
        plan = plan_on(machine, variant.placement)
    except PlanError as error:
        return replace(variant, obstacle=str(error))
    cost = cost_of(plan, machine.base_page, quarantine=variant.quarantine)
    return replace(variant, plan=plan, cost=cost)


def _without(machine: Machine, out: RangeSet) -> Machine:
    """`machine` as it will be once what can be had of `out` is out of K1's hands."""
    takeable = RangeSet(piece.range for piece in machine.pages if piece.use in _TAKEABLE)
    return machine.held_by(Pages(part, "poisoned") for part in takeable & out)


def recommend(variants: tuple[Variant, ...]) -> Recommendation:
    """The variant with the fewest dangers; then the fewest unknowns, no reboot, the least memory, the shortest handover."""
    possible = [v for v in variants if v.cost is not None and not v.verdicts["impossible"]]
    if not possible:
        return Recommendation(None, tuple(f"{v.name}: {v.obstacle or _worst(v)}" for v in variants))
    best = min(possible, key=_rank)
    return Recommendation(best, tuple(_reasons(best, [v for v in variants if v is not best])))


def _rank(variant: Variant) -> tuple[int, ...]:
    assert variant.cost is not None  # only what is possible is ranked
    found = variant.verdicts
    return found["dangerous"], found["unknown"], bool(variant.boot), variant.cost.memory, variant.cost.instructions


def _reasons(best: Variant, others: list[Variant]) -> Iterator[str]:
    assert best.plan is not None
    assert best.cost is not None
    dangers, unknowns = (_titles(best.plan, verdict) for verdict in ("dangerous", "unknown"))
    first = f"{best.name}: " + (f"the dangers left are {', '.join(dangers)}." if dangers else "no check found a danger.")
    if unknowns:
        first += f" {len(unknowns)} check{'s' * (len(unknowns) > 1)} could not be answered: {', '.join(unknowns)}."
    yield first
    for other in others:
        if other.plan is None or other.cost is None:
            yield f"{other.name}: cannot be done here: {other.obstacle}"
            continue
        more = [title for title in _titles(other.plan, "dangerous", "impossible") if title not in dangers]
        unjudged = [title for title in _titles(other.plan, "unknown") if title not in unknowns]
        if more or unjudged:
            parts = (("adds", more), ("cannot be judged:", unjudged))
            said = "; ".join(f"{how} {', '.join(titles)}" for how, titles in parts if titles)
            yield f"{other.name}: {said}."
        elif other.cost.memory > best.cost.memory:
            yield f"{other.name}: takes {format_size(other.cost.memory - best.cost.memory)} more of K1's memory."
        elif other.boot:
            yield f"{other.name}: needs a reboot with {other.boot}, and gains nothing for it."
        else:
            times = other.cost.instructions / max(1, best.cost.instructions)
            same = "what could be judged of it is as safe" if unknowns else "as safe"
            yield f"{other.name}: {same}, and its handover takes {times:.2f} times the instructions."


def _titles(plan: LoadPlan, *verdicts: HazardVerdict) -> list[str]:
    return [hazard.title for hazard in plan.hazards if hazard.verdict in verdicts]


def _worst(variant: Variant) -> str:
    assert variant.plan is not None
    return "; ".join(f"{h.title}: {h.reason}" for h in variant.plan.hazards if h.verdict == "impossible")
