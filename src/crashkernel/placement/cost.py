"""What a placement costs: memory that K1 goes without, and work between K1's death and K2's first instruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from crashkernel.placement.hazards import quarantinable
from crashkernel.placement.moves import Check, Copy, Exchange

if TYPE_CHECKING:
    from crashkernel.placement.plan import LoadPlan

# Instructions a byte, as `crashkernel bench instructions` counts them: docs/benchmarks.md
EXCHANGE_ALTIVEC = 0.3047
EXCHANGE = 0.5547
COPY = 0.3047
CHECK = 3.2812


@dataclass(frozen=True, slots=True)
class Cost:
    """All in bytes but `instructions`, which are those of one CPU."""

    reserved: int  # K1 boots without it
    quarantined: int  # taken out of K1's hands at load time, if all of it can be had
    moved: int  # written by the moves
    checked: int
    instructions: int

    @property
    def memory(self) -> int:
        """What K1 goes without."""
        return self.reserved + self.quarantined


def cost_of(plan: LoadPlan, page_size: int, *, quarantine: bool) -> Cost:
    """The cost of `plan` on a K1 with pages of `page_size` bytes, with or without taking out what K1 could hand out."""
    exchanged = sum(move.size for move in plan.moves if isinstance(move, Exchange))
    copied = sum(move.size for move in plan.moves if isinstance(move, Copy))
    checked = sum(move.size for move in plan.moves if isinstance(move, Check))
    rate = EXCHANGE_ALTIVEC if plan.altivec else EXCHANGE
    return Cost(
        reserved=plan.reserved.size,
        quarantined=quarantinable(plan, page_size).total if quarantine else 0,
        moved=sum(part.size for move in plan.moves for part in move.written),
        checked=checked,
        instructions=round(exchanged * rate + copied * COPY + checked * CHECK),
    )
