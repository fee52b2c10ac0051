"""A fault map as text and as a picture."""

from __future__ import annotations

import collections
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from crashkernel.bench.walk import OUTCOMES, REASONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crashkernel.bench.faults import FaultMap
    from crashkernel.bench.scene import Fault
    from crashkernel.bench.walk import Outcome

_COLOURS: dict[Outcome, str] = {"good": "#e4e4e4", "told": "#56b4e9", "silent hang": "#f0d000", "silent damage": "#c03000"}
"""From the mildest to the worst; told apart by whoever sees no red or no green, and by their lightness."""
_LABELS = {
    "good": "K2 starts, K1 is all there",
    "told": "the purgatory says so",
    "silent hang": "silent: K2 is not entered",
    "silent damage": "silent: K2 or K1 is damaged",
}

_WIDTH, _LEFT, _TOP, _ROW = 1000, 212, 92, 14
_COLUMNS = 1552  # half a pixel each


def render_faults(each: FaultMap) -> str:
    """Tables of phases and of faults with the number of each outcome, and the reasons of what is silent."""
    order = "LE" if each.little else "BE"
    lines = [
        f"{each.scene}, {each.cpu} {order}: {each.instructions:,} instructions, {len(each.points):,} of them disturbed, "
        f"{each.injected:,} runs"
    ]
    for title, key in (
        ("from the line of row", lambda _stretch, number: each.points[number].phase),
        ("fault", lambda stretch, _number: f"{stretch.fault.kind} {stretch.fault.name}"),
    ):
        lines.append(f"{title:52}" + "".join(f"{outcome:>15}" for outcome in OUTCOMES))
        lines += [f"{name[:51]:52}{_figures(row)}" for name, row in each.table(key).items()]
    lines.append(f"{'all':52}{_figures(each.count())}")
    lines.append(f"{'counted for the instructions they stand for':52}{_figures(each.count(weighted=True))}")
    reasons = each.reasons()
    if reasons:
        lines.append(f"{'silent, and why':52}" + "".join(f"{outcome:>15}" for outcome in OUTCOMES))
        lines += [f"{reason:52}{_figures(row)}" for reason, row in reasons.items()]
        lines += [f"  {reason}: {REASONS[reason]}" for reason in reasons if reason in REASONS]
    lines += [
        f"UNEXPLAINED: {s.fault.kind} {s.fault.name}, instructions {each.points[s.first].index} (at "
        f"{each.points[s.first].pc:#x}) to {each.points[s.last].index}: {s.verdict.outcome}, {s.verdict.why}"
        for s in each.unexplained
    ]
    return "\n".join(lines)


def _figures(row: Mapping[Outcome, int] | Mapping[str, int]) -> str:
    numbers: dict[str, int] = {str(name): number for name, number in row.items()}
    return "".join(f"{numbers[o]:>15,}" if numbers.get(o) else f"{'.':>15}" for o in OUTCOMES)


def svg(each: FaultMap) -> str:
    """Instructions from left to right in the order of their execution, faults from top to bottom, a colour for each outcome."""
    columns, begins = _columns(each)
    spots = list(dict.fromkeys(fault.name for fault in columns))
    width = (_WIDTH - _LEFT - 12) / len(next(iter(columns.values())))
    bottom = _TOP + _ROW * len(spots)
    order = "little" if each.little else "big"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 34}" width="{_WIDTH}" '
        f'height="{bottom + 34}" font-family="sans-serif" font-size="11" fill="#202020">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="10" y="20" font-size="15">Every instruction, every fault: placement {each.scene}, {each.cpu}, '
        f"K1 {order}-endian</text>",
    ]
    for number, (outcome, colour) in enumerate(_COLOURS.items()):
        x = 10 + 246 * number
        parts.append(f'<rect x="{x}" y="32" width="14" height="14" fill="{colour}" stroke="#808080" stroke-width="0.5"/>')
        parts.append(f'<text x="{x + 20}" y="43">{_LABELS[outcome]} ({each.count()[outcome]:,})</text>')
    paths = collections.defaultdict["Outcome", list[str]](list)
    for fault, row in columns.items():
        top, high = _place(fault, spots)
        edges = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
        for start, end in pairwise(edges):
            at, span = _LEFT + width * start, width * (end - start)
            paths[list(_COLOURS)[row[start]]].append(f"M{at:.1f} {top:g}h{span:.1f}v{high:g}h-{span:.1f}z")
    parts += [f'<path fill="{_COLOURS[outcome]}" d="{"".join(path)}"/>' for outcome, path in paths.items()]
    for number, name in enumerate(spots):
        y = _TOP + _ROW * number
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 10.5:g}" text-anchor="end">{escape(name)}</text>')
    for phase, start, end in begins:
        at = _LEFT + width * start
        first, _, second = phase.partition(" ")
        if not first.isdigit():
            first, second = "before", "the rows"
        if start:
            parts.append(f'<path d="M{at:.1f} {_TOP - 30}V{bottom}" stroke="#404040" stroke-width="0.6"/>')
        middle = at + width * (end - start) / 2
        for line, text in enumerate((first, second)):
            parts.append(
                f'<text x="{middle:.1f}" y="{_TOP - 19 + 12 * line}" font-size="10" text-anchor="middle">{text}</text>'
            )
    parts.append(f'<text x="{_LEFT - 6}" y="{_TOP - 13}" text-anchor="end">row of the table</text>')
    parts.append(
        f'<text x="10" y="{bottom + 15}">Upper half of a line: a DMA write of 64 bytes; lower half: one flipped bit; both in '
        "the memory that is named. A machine check or system reset fills its line.</text>"
    )
    parts.append(
        f'<text x="10" y="{bottom + 29}">From left to right {len(each.points):,} instructions that stand for '
        f"{each.instructions:,}, in the order of their execution; of those in one column the worst outcome shows.</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _place(fault: Fault, spots: list[str]) -> tuple[float, float]:
    """Top and height of its line."""
    y = _TOP + _ROW * spots.index(fault.name)
    if fault.in_memory:
        return y + 1 + 6 * (fault.kind == "bit"), 6
    return y + 1, 12


def _columns(each: FaultMap) -> tuple[dict[Fault, npt.NDArray[np.int64]], list[tuple[str, int, int]]]:
    """For each fault the worst outcome in each column of the picture; and the columns of each phase."""
    worst = list(_COLOURS)
    rows: dict[Fault, npt.NDArray[np.int64]] = {}
    for stretch in each.stretches:
        row = rows.setdefault(stretch.fault, np.zeros(len(each.points), np.int64))
        row[stretch.first : stretch.last + 1] = worst.index(stretch.verdict.outcome)
    starts = np.unique(np.linspace(0, len(each.points), _COLUMNS, endpoint=False).astype(int))
    begins: list[tuple[str, int, int]] = []
    for column, start in enumerate(starts.tolist()):
        phase = each.points[start].phase
        if begins and begins[-1][0] == phase:
            begins[-1] = (phase, begins[-1][1], column + 1)
        else:
            begins.append((phase, column, column + 1))
    return {fault: np.maximum.reduceat(row, starts) for fault, row in rows.items()}, begins
