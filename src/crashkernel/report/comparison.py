"""Variants of a load side by side: what each risks, what it costs, what drills showed, and which to take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crashkernel.memory import format_size
from crashkernel.report.hazards import VERDICTS, worst_first
from crashkernel.report.terminal import paint, wrap

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from crashkernel.placement.comparison import Recommendation, Variant
    from crashkernel.placement.cost import Cost

_LABEL = 24

_COSTS: tuple[tuple[str, Callable[[Cost], str]], ...] = (
    ("K1's memory, reserved", lambda cost: format_size(cost.reserved)),
    ("  and quarantined", lambda cost: format_size(cost.quarantined)),
    ("written when K1 dies", lambda cost: format_size(cost.moved)),
    ("checked when K1 dies", lambda cost: format_size(cost.checked)),
    ("instructions of it", lambda cost: f"{cost.instructions / 1e6:.1f} M"),
)


def draw_comparison(
    variants: Sequence[Variant],
    recommendation: Recommendation,
    drilled: Mapping[str, str],
    colour: bool = False,
    width: int = 80,
) -> str:
    """The table as text. `drilled` is what drills showed of each variant, by its name."""
    column = max(12, (width - _LABEL) // max(1, len(variants)))
    lines = []
    for number, variant in enumerate(variants, 1):
        lines += wrap(
            f"{variant.idea}" + (f"; boot with {variant.boot}" if variant.boot else ""),
            width,
            f"{number}  {variant.name}: ",
            "   ",
        )
    lines += ["", " " * _LABEL + "".join(str(number).ljust(column) for number in range(1, len(variants) + 1)).rstrip()]
    for verdict, (word, _) in VERDICTS.items():
        cells = [str(variant.verdicts[verdict]) if variant.plan else "-" for variant in variants]
        if any(cell not in ("0", "-") for cell in cells):
            lines.append(_row(f"{word} checks", cells, column))
    for label, show in _COSTS:
        lines.append(_row(label, [show(variant.cost) if variant.cost else "-" for variant in variants], column))
    lines.append(_row("drilled", [drilled.get(variant.name, "no") for variant in variants], column))
    differing = _differing(variants)
    if differing:
        lines += ["", "what the checks say where they differ or warn"]
        for name, cells in differing:
            lines.append(_row(f"  {name}", cells, column))
    for variant in variants:
        if variant.plan is None:
            lines += ["", *wrap(variant.obstacle, width, f"{variant.name} cannot be done here: ", "  ")]
    lines.append("")
    chosen = recommendation.variant
    take = f"recommended: {chosen.name}" if chosen else "recommended: none of these, as this machine is"
    lines.append(paint(take, bold=True) if colour else take)
    if chosen and chosen.boot:
        lines.append(f"  boot with {chosen.boot} first")
    for reason in recommendation.reasons:
        lines += wrap(reason, width, "  ", "    ")
    return "\n".join(lines)


def _row(label: str, cells: Sequence[str], column: int) -> str:
    return (label.ljust(_LABEL) + "".join(cell.ljust(column) for cell in cells)).rstrip()


def _differing(variants: Sequence[Variant]) -> list[tuple[str, list[str]]]:
    """The checks whose verdicts are not the same everywhere, or are bad anywhere: name and one verdict for each variant."""
    planned = [variant.plan for variant in variants if variant.plan]
    rows = []
    for hazard in worst_first(planned[0].hazards) if planned else ():
        found = [next((h.verdict for h in v.plan.hazards if h.name == hazard.name), None) if v.plan else None for v in variants]
        known = {verdict for verdict in found if verdict}
        if len(known) > 1 or known & {"dangerous", "impossible", "unknown"}:
            rows.append((hazard.name, [VERDICTS[verdict][0] if verdict else "-" for verdict in found]))
    return rows
