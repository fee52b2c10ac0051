"""Memory maps of a handover for a terminal, stage by stage, as the 2005 mail draws them.

80 columns, made to be pasted into tickets: without colour every region is named by its label or its letter. Each bar is to
scale; what is widened to be seen at all is told below, and the tables have every address.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from crashkernel.memory import Range, RangeSet, format_size
from crashkernel.report.picture import FREE, GAP, KINDS, Picture, describe_rows, headline
from crashkernel.report.terminal import paint, visible, wrap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crashkernel.placement.plan import LoadPlan
    from crashkernel.report.picture import Cell, Lane, Piece, Ruler, Stage

_GUTTER = 11
"""Columns left of every bar, for its name."""

_LANES = {"real-mode": "-", "k2": "2", "exposed": "x", "hazard": "!"}
_LANE_INKS = {"k2": "#d75f00", "exposed": "#d75faf", "hazard": "#ff0000"}
_ROW_LIMIT = 40
_PIECES_LIMIT = 16


@dataclass(frozen=True, slots=True)
class _Style:
    """How bars are drawn."""

    colour: bool
    separator: str
    scale_break: str
    changed: str
    begins: str


def draw_stages(plan: LoadPlan, colour: bool = False, width: int = 80, *, unicode: bool = False) -> str:
    """All stages of `plan` as maps, then where everything lies before and after.

    `width` is in columns, 60 at least; `colour` uses a terminal's 256 colours, `unicode` its line drawing characters.
    """
    style = _Style(colour, *("│≈━╵" if unicode else "|~=^"))
    picture = Picture(plan)
    width = max(60, width)
    room = width - _GUTTER - 1
    rulers = [band.ruler(room, 1 if colour else 2) for band in picture.bands]
    lines = [line for fact in [*headline(plan), *_real_mode(picture)] for line in wrap(fact, width, "", "  ")]
    lines.append("")
    frames = picture.frames()
    for number, (stage, checks) in enumerate(frames):
        whole = number in (0, len(frames) - 1)
        lines += [paint(line, bold=colour) for line in wrap(stage.title, width)]
        for ruler in rulers:
            if whole or ruler.band.name != "all":
                lines += _bar(picture, ruler, stage, style, lanes=whole)
        lines += [line for check in checks for line in wrap(check, width)]
        lines.append("")
    lines += _legend(picture, rulers, style, width)
    lines += ["", "loaded", *_table(picture.stages[0].pieces, width)]
    lines += ["", "K2 starts: whose the memory is, and what lies there", *_table(picture.stages[-1].pieces, width)]
    lines += ["", "K2's memory", *_ranges(plan.k2_memory)]
    lines += ["", "exposed: K1's memory until the handover, then K2's", *_ranges(plan.exposed)]
    lines += ["", f"K2 is entered at {plan.entry:#x} with", *wrap(plan.cmdline, width, "  ", "  ")]
    return "\n".join(lines)


def _real_mode(picture: Picture) -> list[str]:
    reach = picture.plan.real_mode
    if reach.end >= picture.end:
        return []
    return [f"a CPU with translation off reaches {reach} ({format_size(reach.size)}, the RMA)"]


def _bar(picture: Picture, ruler: Ruler, stage: Stage, style: _Style, *, lanes: bool) -> list[str]:
    """The bar, what changed, what lanes there are, and the addresses that there is room for."""
    cells = ruler.cells(stage)
    body = "".join(_cell(cell, style) for cell in cells)
    end = "" if style.colour else style.separator
    lines = [f"{ruler.band.title:<{_GUTTER}}{body}{end}"]
    if stage.changed and (marks := _marks(ruler, stage.changed, style.changed)):
        lines.append(_gutter("changed", style) + paint(marks, bold=style.colour))
    for lane in picture.lanes(stage, ruler.band.window) if lanes else ():
        if marks := _marks(ruler, lane.ranges, _LANES[lane.name]):
            ink = _LANE_INKS.get(lane.name, "") if style.colour else ""
            lines.append(_gutter(lane.label, style) + paint(marks, ink=ink, bold=bool(ink)))
    return [*lines, _gutter("", style) + _addresses(ruler, cells, style)]


def _gutter(label: str, style: _Style) -> str:
    padded = f"  {label}".ljust(_GUTTER) if label else " " * _GUTTER
    return paint(padded, ink="#8a8a8a") if style.colour and label else padded


def _cell(cell: Cell, style: _Style) -> str:
    """As wide as the cell; without colour its first column is the border."""
    width = cell.right - cell.left
    first = style.scale_break if cell.broken else "" if style.colour else style.separator
    room = width - len(first)
    padding = " " if room > 6 else ""
    label = next((text for text in map(visible, cell.labels) if len(text) + len(padding) <= room), "")
    text = f"{padding}{label}".ljust(room)
    if style.colour:
        dim = cell.kind is GAP
        return paint(first + text, ink="" if dim else cell.kind.ink, fill="" if dim else cell.kind.fill)
    return first + text


def _marks(ruler: Ruler, ranges: RangeSet, sign: str) -> str:
    room = ruler.columns[-1]
    line = [" "] * room
    for each in ranges:
        span = ruler.span(each)
        if span is not None:
            start = min(int(span[0]), room - 1)
            line[start : max(start + 1, round(span[1]))] = sign * (max(start + 1, round(span[1])) - start)
    return "".join(line).rstrip()


def _addresses(ruler: Ruler, cells: Sequence[Cell], style: _Style) -> str:
    """Where cells begin, the widest first as long as there is room, and where the band ends."""
    room = ruler.columns[-1]
    end = f"{ruler.edges[-1]:#x}{style.begins}"
    line = [" "] * (room + 1)
    line[room + 1 - len(end) :] = end
    first, *others = cells
    for cell in [first, *sorted(others, key=lambda each: (each.kind is FREE, each.left - each.right))]:
        text = f"{style.begins}{cell.range.start:#x}"
        before, after = max(0, cell.left - 1), cell.left + len(text) + 1
        if after <= room + 1 and not "".join(line[before:after]).strip():
            line[cell.left : cell.left + len(text)] = text
    return "".join(line)


def _legend(picture: Picture, rulers: Sequence[Ruler], style: _Style, width: int) -> list[str]:
    shown = {cell.kind for stage in picture.stages for ruler in rulers for cell in ruler.cells(stage)}
    kinds = [kind for kind in KINDS if kind in shown and kind is not GAP]
    entries = []
    for kind in kinds:
        letter = f" {kind.labels[-1]} "
        padding = " " * (38 - len(kind.meaning))
        entries.append((paint(letter, ink=kind.ink, fill=kind.fill) if style.colour else letter) + f" {kind.meaning}{padding}")
    half = (len(entries) + 1) // 2 if width >= 80 else len(entries)
    lines = [(left + right).rstrip() for left, right in zip_longest(entries[:half], entries[half:], fillvalue="")]
    notes = [f" {style.changed}  changed by this move"]
    seen: dict[str, Lane] = {lane.name: lane for stage in picture.stages for lane in picture.lanes(stage)}
    notes += [f" {_LANES[name]}  {lane.meaning}" for name, lane in seen.items()]
    lines += [line for note in notes for line in wrap(note.strip(), width, " ", "    ")]
    return [*lines, "", "scale", *(line for ruler in rulers for line in _scale(ruler, style, width))]


def _scale(ruler: Ruler, style: _Style, width: int) -> list[str]:
    """What a column is worth, and what is wider than that."""
    parts = []
    for stretch in ruler.band.stretches:
        columns = ruler.at(stretch.range.end) - ruler.at(stretch.range.start)
        wide = [r for r in ruler.widened if stretch.range.contains(r)]
        left, taken = stretch.range.size, 0.0
        for each in wide:
            left, taken = left - each.size, taken + ruler.at(each.end) - ruler.at(each.start)
        parts.append(f"{stretch.range}, a column is {format_size(round(left / max(1.0, columns - taken)))}")
    text = f"{ruler.band.title}: {f'; from the {style.scale_break} on '.join(parts)}"
    if ruler.widened:
        joined = RangeSet(ruler.widened)
        names = ", ".join(map(str, joined.ranges[:4])) + (f" and {len(joined) - 4} more" if len(joined) > 4 else "")
        text += f"; drawn wider than that: {names}"
    return wrap(text, width, "  ", "    ")


def _table(pieces: Sequence[Piece], width: int) -> list[str]:
    """Addresses, size, what it is, and who may write there where that differs."""
    rows = describe_rows(pieces, _ROW_LIMIT)
    holders = {piece.holder for *_, piece in rows} > {"K2"}
    column = max(len(str(where)) for where, *_ in rows)
    lines = []
    for where, size, what, piece in rows:
        first = f"  {where!s:<{column}} {format_size(size):>10}  "
        first += f"{piece.holder:<9}" if holders else ""
        lines += wrap(what, width, first, " " * len(first))
    return lines


def _ranges(ranges: RangeSet) -> list[str]:
    rows = [(each, each.size, "") for each in ranges]
    if len(rows) > _PIECES_LIMIT:
        last = ranges.ranges[_PIECES_LIMIT:]
        whole = Range(last[0].start, last[-1].end)
        rows[_PIECES_LIMIT:] = [(whole, sum(r.size for r in last), f"  in {len(last)} pieces")]
    column = max((len(str(where)) for where, *_ in rows), default=0)
    return [f"  {where!s:<{column}} {format_size(size):>10}{more}" for where, size, more in rows]
