"""Memory maps of a handover in plain text, stage by stage, as the 2005 mail draws them.

80 columns, no colour: they are made to be pasted into tickets. A bar is not to scale, so that the smallest region stays
visible; the table below the bars has the addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crashkernel.memory import Range, format_size
from crashkernel.placement.moves import K1

if TYPE_CHECKING:
    from crashkernel.placement.moves import Extent, Layout
    from crashkernel.placement.plan import LoadPlan

WIDTH = 78

_LABELS = {
    "kernel": ("K2 image", "K2"),
    "initrd": ("initrd", "i"),
    "fdt": ("tree", "t"),
    "elfcorehdr": ("hdr", "h"),
    "purgatory": ("purg", "p"),
    "free": ("free", ""),
}


def draw_stages(plan: LoadPlan) -> str:
    """All stages of `plan` as maps, then where everything lies before and after."""
    lines = [
        f"K2 {plan.kernel}, placement {plan.placement}",
        f"on {plan.machine}",
        f"reserved {plan.reserved} ({format_size(plan.reserved.size)})",
        f"the dump will hold {format_size(plan.k1_memory.total)} of K1's memory",
        "",
    ]
    stages = plan.stages()
    drawn = None
    for title, layout in stages:
        if layout == drawn:  # a check moves nothing
            lines[-1:] = [title, ""]
        else:
            lines += [title, *draw_layout(layout, plan.reserved), ""]
            drawn = layout
    lines += ["p purgatory, h elfcorehdr, t device tree, i initrd", "K1 from X: bytes of K1 that were at X", ""]
    lines += _table("loaded", stages[0][1])
    lines += ["", *_table("K2 starts", stages[-1][1])]
    lines += ["", "K2's memory", *(f"  {r!s:<36} {format_size(r.size):>10}" for r in plan.k2_memory)]
    lines += [f"K2 is entered at {plan.entry:#x} with", f"  {plan.cmdline}"]
    return "\n".join(lines)


def draw_layout(layout: Layout, reserved: Range) -> list[str]:
    """One stage: the bar, the reserved region above it and the addresses that matter below it."""
    extents = list(layout.extents)
    widths = _widths(extents)
    cells = [f" {_label(extent, width - 1)}".ljust(width) for extent, width in zip(extents, widths, strict=True)]
    rule = "-" * (sum(widths) + len(widths) + 1)
    starts = [1 + sum(widths[:number]) + number for number in range(len(widths))]
    inside = [number for number, extent in enumerate(extents) if reserved.contains(extent.location)]
    over = ""
    if inside:
        first, last = starts[inside[0]], starts[inside[-1]] + widths[inside[-1]]
        over = " " * (first - 1) + "/" + " reserved ".center(last - first, "-") + "\\"
    return [over, rule, "|" + "|".join(cells) + "|", rule, _addresses(extents, starts, len(rule))]


def _widths(extents: list[Extent]) -> list[int]:
    room = WIDTH - len(extents) - 1
    widths = [min(len(_full(extent)) + 2, 12) if extent.location.size >= 1 << 20 else 3 for extent in extents]
    # too many to label: the largest keep their names
    for number in sorted(range(len(extents)), key=lambda n: extents[n].location.size):
        if sum(widths) <= room:
            break
        widths[number] = 3
    # what is left goes to the large ones, by the logarithm of their size
    weights = [extent.location.size.bit_length() if width > 3 else 0 for extent, width in zip(extents, widths, strict=True)]
    spare = max(0, room - sum(widths))
    total = sum(weights) or 1
    return [width + spare * weight // total for width, weight in zip(widths, weights, strict=True)]


def _full(extent: Extent) -> str:
    if extent.content == K1:
        return K1 if extent.origin == extent.location.start else f"K1 from {extent.origin:#x}"
    return _LABELS[extent.content][0]


def _label(extent: Extent, room: int) -> str:
    full = _full(extent)
    short = "K1" if extent.content == K1 else _LABELS[extent.content][1]
    return full if len(full) <= room else short[:room]


def _addresses(extents: list[Extent], starts: list[int], width: int) -> str:
    line = ""
    for number, extent in enumerate(extents):
        text = f"^{extent.location.start:#x}"
        # only where there is room: the table has them all
        if len(line) <= starts[number] - 1 and starts[number] - 1 + len(text) <= width + 4:
            line = line.ljust(starts[number] - 1) + text + " "
    return line.rstrip()


def _table(title: str, layout: Layout) -> list[str]:
    names = {
        **{name: full for name, (full, _) in _LABELS.items()},
        "fdt": "device tree",
        "elfcorehdr": "elfcorehdr",
        "purgatory": "purgatory",
    }
    lines = [title]
    for extent in layout.extents:
        what = _full(extent) if extent.content == K1 else names[extent.content]
        lines.append(f"  {extent.location!s:<36} {format_size(extent.location.size):>10}  {what}")
    return lines
