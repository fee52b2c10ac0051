"""What a kernel does with `crashkernel=`, in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crashkernel.memory import format_size
from crashkernel.report.terminal import visible, wrap

if TYPE_CHECKING:
    from crashkernel.placement.reservation import Reservation


def draw_reservation(asked: str, reservation: Reservation, width: int = 80) -> str:
    """The region, how the kernel comes to it, and what it would refuse, as text of at most `width` columns."""
    region = reservation.range
    lines = [
        f"crashkernel={visible(asked)}: " + (f"{region} ({format_size(region.size)})" if region else "nothing is reserved")
    ]
    for reason in reservation.reasons:
        lines += wrap(reason, width, "  ", "    ")
    if reservation.cma:
        lines.append(f"  {format_size(reservation.cma)} more of K1's movable memory (cma): not for a capture kernel's image")
    for message in reservation.console:
        lines += wrap(f"K1's log says: {message}", width, "  ", "    ")
    for refusal in reservation.refused:
        text = f"{refusal.range} ({format_size(refusal.range.size)}): {refusal.why} ({refusal.source})"
        # what K1 grants all the same is cut out of what K2 gets
        told = (
            "  it would be refused at "
            if refusal.by == "kernel"
            else "  K2 is not given "
            if refusal.hit
            else "  K2 would not be given "
        )
        lines += wrap(text, width, told, "    ")
    return "\n".join(lines)
