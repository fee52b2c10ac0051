"""The stages of a handover as one SVG: no script, no font of its own, its own light ground, so that it looks the same in a
browser, in a ticket, on paper and in dark mode.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Literal

from crashkernel.memory import Range, RangeSet, format_size
from crashkernel.report.hazards import VERDICTS, ranges_text, summary, worst_first
from crashkernel.report.picture import FREE, GAP, KINDS, Lane, Picture, headline
from crashkernel.report.terminal import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crashkernel.placement.plan import LoadPlan
    from crashkernel.report.picture import Cell, Flow, Kind, Ruler, Stage

_WIDTH, _LEFT, _RIGHT = 1000, 100, 16
_ROOM = _WIDTH - _LEFT - _RIGHT
_MINIMUM = 7
_BAR = 26
_BETWEEN = 26
"""Height for arrows between two bars."""
_LANE = 11

LANE_FILLS = {"real-mode": "#767676", "k2": "#d75f00", "exposed": "#af005f", "hazard": "#b3261e", "wrong": "#b3261e"}
"""Colours of the lanes."""

Moment = Literal["loaded", "entered"]
"""Before anything of a handover has happened, and when all of it has."""

GAP_PATTERN = (
    '<defs><pattern id="gap" width="6" height="6" patternUnits="userSpaceOnUse"><path d="M0 6L6 0" '
    'stroke="#b0b0b0" stroke-width=".8"/></pattern></defs>'
)
"""How what is no memory is drawn; a page with maps has it once."""

_NOTHING = RangeSet()
_STYLE = (
    "text{font:11px sans-serif;fill:#202020}.h{font-size:16px;font-weight:bold}.t{font-size:13px;font-weight:bold}"
    ".a{font:9.5px monospace;fill:#505050}.g{font-size:10px;fill:#505050}.c>rect{stroke:#fff;stroke-width:.8}"
    ".m{text-anchor:middle}.e{text-anchor:end}.n{fill:none;stroke:#000;stroke-width:2}.f{fill:#000;fill-opacity:.13}.r{fill:none;stroke:#000;stroke-width:1.4}"
)


def stages_svg(plan: LoadPlan) -> str:
    """One picture of all stages of `plan` with a legend; a valid XML document of one SVG element."""
    return _Drawing(Picture(plan)).render()


def moment_svg(plan: LoadPlan, moment: Moment, wrong: RangeSet = _NOTHING) -> str:
    """One moment of `plan`, as an element of class "map" for a page that has `moment_style` once.

    `wrong` is what is not right in a dump, by K1's addresses: marked where these bytes lie at that moment.
    """
    if moment == "entered":
        wrong = RangeSet(
            Range.sized(kept.location + part.start - kept.range.start, part.size)
            for kept in plan.kept
            for part in wrong & RangeSet([kept.range])
        )
    return _Drawing(Picture(plan), wrong).render_moment(moment)


def moment_style() -> str:
    """Rules for all elements that `moment_svg` makes."""
    return "".join(f".map {rule}}}" for rule in f"{_STYLE}.gap{{fill:url(#gap)}}{_fills()}".split("}")[:-1])


class _Drawing:
    """Draws from top to bottom; `y` is where the next thing goes."""

    def __init__(self, picture: Picture, wrong: RangeSet = _NOTHING) -> None:
        self._picture = picture
        self._wrong = wrong
        self._rulers = {band.name: band.ruler(_ROOM, _MINIMUM) for band in picture.bands}
        self._parts: list[str] = []
        self._y = 0.0

    def render(self) -> str:
        self._head()
        frames = self._picture.frames()
        for number, (stage, checks) in enumerate(frames):
            self._stage(stage, checks, whole=number in (0, len(frames) - 1))
        self._foot()
        height = round(self._y + 12)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
                f'role="img" aria-label="{escaped("; ".join(headline(self._picture.plan)))}">',
                f"<style>{_STYLE}.gap{{fill:url(#gap)}}{_fills()}</style>",
                GAP_PATTERN,
                f'<rect x=".5" y=".5" width="{_WIDTH - 1}" height="{height - 1}" rx="6" fill="#fff" stroke="#b0b0b0"/>',
                *self._parts,
                "</svg>",
                "",
            ]
        )

    def render_moment(self, moment: Moment) -> str:
        """The whole of one stage, on a ground of its own."""
        stage = self._picture.stages[0 if moment == "loaded" else -1]
        self._stage(stage, (), whole=True)
        height = round(self._y)
        return (
            f'<svg class="map" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escaped(stage.title)}">'
            f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>{"".join(self._parts)}</svg>'
        )

    def _add(self, part: str) -> None:
        self._parts.append(part)

    def _say(self, x: float, y: float, text: str, style: str = "", more: str = "") -> None:
        css = f' class="{style}"' if style else ""
        self._add(f'<text x="{x:g}" y="{y:g}"{css}{more}>{escaped(text)}</text>')

    def _head(self) -> None:
        first, *others = headline(self._picture.plan)
        self._say(16, 28, f"Handover to {first}", "h")
        self._say(16, 46, " · ".join(others))
        x, self._y = 16.0, 58.0
        for kind in self._picture.kinds:
            width = 24 + 6.1 * len(kind.meaning)
            if x + width > _WIDTH - 10:
                x, self._y = 16.0, self._y + 18
            self._add(f'<rect x="{x:g}" y="{self._y:g}" width="13" height="13" class="{_class(kind)}" stroke="#808080"/>')
            self._say(x + 18, self._y + 10.5, kind.meaning)
            x += width + 10
        self._y += 18
        self._add(f'<rect x="17" y="{self._y + 1:g}" width="12" height="11" class="n"/>')
        self._say(34, self._y + 10.5, "changed by this step")
        self._add(f'<circle cx="170" cy="{self._y + 6.5:g}" r="1.6"/>')
        self._say(178, self._y + 10.5, "drawn wider than to scale")
        self._say(330, self._y + 10.5, "≈ the scale changes here")
        self._say(480, self._y + 10.5, "Each bar is linear, and the same at every stage.")
        self._y += 26

    def _stage(self, stage: Stage, checks: Sequence[str], *, whole: bool) -> None:
        self._add(f'<path d="M16 {self._y:g}H{_WIDTH - 16}" stroke="#d0d0d0"/>')
        self._say(16, self._y + 18, stage.title, "t")
        self._y += 24
        if whole:
            self._bar(stage, self._rulers["all"], above=True, lanes=True)
            self._y += 6
        low = self._bar(stage, self._rulers["low"], above=True, lanes=whole)
        self._y += 4 if whole else _BETWEEN
        reserved = self._bar(stage, self._rulers["reserved"], above=False, lanes=whole)
        if stage.flow is not None:
            self._flow(stage.flow, low, reserved)
        for check in checks:
            self._say(_LEFT, self._y + 11, f"then {check}")
            self._y += 14
        self._y += 10

    def _bar(self, stage: Stage, ruler: Ruler, *, above: bool, lanes: bool) -> tuple[float, float]:
        """Top and bottom of the bar."""
        cells = ruler.cells(stage)
        if above:
            self._addresses(ruler, cells, self._y + 9)
            self._y += 13
        top = self._y
        self._say(_LEFT - 8, top + 12, ruler.band.title, "e")
        self._say(_LEFT - 8, top + 23, format_size(ruler.band.window.size), "g e")
        self._add('<g class="c">')
        for cell in cells:
            self._cell(cell, top)
        self._add("</g>")
        for changed in stage.changed:
            if (span := ruler.span(changed)) is not None:
                width = max(2.0, span[1] - span[0])
                self._add(f'<rect x="{_LEFT + span[0]:.1f}" y="{top:g}" width="{width:.1f}" height="{_BAR}" class="n"/>')
        self._y += _BAR
        for lane in self._lanes(stage, ruler) if lanes else ():
            spans = [span for each in lane.ranges if (span := ruler.span(each)) is not None]
            self._say(_LEFT - 8, self._y + 9, lane.label, "g e")
            path = "".join(
                f"M{_LEFT + left:.1f} {self._y + 3:g}h{max(2.0, right - left):.1f}v5h-{max(2.0, right - left):.1f}z"
                for left, right in spans
            )
            self._add(f'<path d="{path}" fill="{LANE_FILLS[lane.name]}"><title>{escaped(lane.meaning)}</title></path>')
            self._y += _LANE
        if not above:
            self._addresses(ruler, cells, self._y + 10)
            self._y += 14
        return top, top + _BAR

    def _lanes(self, stage: Stage, ruler: Ruler) -> tuple[Lane, ...]:
        lanes = self._picture.lanes(stage, ruler.band.window)
        wrong = self._wrong & RangeSet([ruler.band.window])
        return (*lanes, Lane("wrong", "wrong", "bytes that are wrong in the dump", wrong)) if wrong else lanes

    def _cell(self, cell: Cell, top: float) -> None:
        left, width = _LEFT + cell.left, cell.right - cell.left
        came_from, holder = cell.details
        size = sum(piece.range.size for piece in cell.pieces)
        told = [cell.name, f"{cell.range} ({format_size(size)})", came_from, holder]
        self._add(
            f'<rect x="{left}" y="{top:g}" width="{width}" height="{_BAR}" class="{_class(cell.kind)}">'
            f"<title>{escaped(chr(10).join(filter(None, told)))}</title></rect>"
        )
        if cell.mixed:
            self._add(f'<rect x="{left}" y="{top:g}" width="{width}" height="{_BAR}" class="gap" pointer-events="none"/>')
        label = next((text for text in cell.labels if text and len(visible(text)) * 6.2 + 5 <= width), "")
        if label:
            self._say(left + width / 2, top + 17, label, f"m l{cell.kind.labels[-1]}" if cell.kind is not GAP else "m")
        if cell.widened:
            self._add(f'<circle cx="{left + width / 2:g}" cy="{top + 4:g}" r="1.6" class="l{cell.kind.labels[-1]}"/>')
        if cell.broken:
            self._add(f'<path d="M{left - 3} {top + _BAR + 3:g}l6 -{_BAR + 6}" stroke="#fff" stroke-width="5"/>')
            self._say(left, top + 17, "≈", "m")

    def _addresses(self, ruler: Ruler, cells: Sequence[Cell], y: float) -> None:
        """Of the beginnings of cells, the widest first, as far as there is room; and the band's end."""
        taken = [(_ROOM - 6.0 * len(f"{ruler.edges[-1]:#x}"), float(_ROOM))]
        self._say(_LEFT + _ROOM, y, f"{ruler.edges[-1]:#x}", "a e")
        first, *others = cells
        for cell in [first, *sorted(others, key=lambda each: (each.kind is FREE, each.left - each.right))]:
            text = f"{cell.range.start:#x}"
            span = (cell.left - 1.0, cell.left + 6.0 * len(text))
            if all(span[1] < left or right < span[0] for left, right in taken):
                taken.append(span)
                self._say(_LEFT + cell.left, y, text, "a")

    def _flow(self, flow: Flow, low: tuple[float, float], reserved: tuple[float, float]) -> None:
        """An arrow from where bytes were to where they went, two heads if they changed places."""
        ends = []
        for where in (flow.source, flow.target):
            span = self._rulers["low"].span(where)
            edge, inward = (low[1], 1) if span is not None else (reserved[0], -1)
            span = span or self._rulers["reserved"].span(where)
            if span is None:
                return
            ends.append((_LEFT + span[0], _LEFT + max(span[1], span[0] + 2), edge, inward))
        (x0, x1, y0, in0), (x2, x3, y1, in1) = ends
        if y0 != y1:
            self._add(f'<path d="M{x0:.1f} {y0:g}H{x1:.1f}L{x3:.1f} {y1:g}H{x2:.1f}z" class="f"/>')
        source, target = (x0 + x1) / 2, (x2 + x3) / 2
        bend = _BETWEEN / 2
        leaving, arriving = f"{source:.1f} {y0 + in0 * bend:g}", f"{target:.1f} {y1 + in1 * bend * 1.6:g}"
        path = f"M{source:.1f} {y0:g}C{leaving} {arriving} {target:.1f} {y1 + in1 * 5:g}"
        self._add(f'<path d="{path}" class="r"/>')
        heads = [(target, y1, in1)] + ([(source, y0, in0)] if flow.both else [])
        for x, y, inward in heads:
            self._add(f'<path d="M{x:.1f} {y:g}l-4 {inward * 7}h8z"/>')

    def _foot(self) -> None:
        plan = self._picture.plan
        for lane in {lane.name: lane for stage in self._picture.stages for lane in self._picture.lanes(stage)}.values():
            self._add(f'<rect x="16" y="{self._y + 4:g}" width="13" height="5" fill="{LANE_FILLS[lane.name]}"/>')
            self._say(34, self._y + 11, f"{lane.label}: {lane.meaning}")
            self._y += 15
        for ruler in self._rulers.values():
            if ruler.widened:
                joined = RangeSet(ruler.widened)
                more = f" and {len(joined) - 5} more" if len(joined) > 5 else ""
                self._say(
                    16, self._y + 11, f"{ruler.band.title}, wider than to scale: {RangeSet(joined.ranges[:5])}{more}", "g"
                )
                self._y += 14
        if plan.hazards:
            self._say(16, self._y + 16, f"Hazards: {summary(plan.hazards)}", "t")
            self._y += 22
            for hazard in worst_first(plan.hazards):
                word, colour = VERDICTS[hazard.verdict]
                if hazard.verdict in ("safe", "guarded"):
                    continue
                self._say(16, self._y + 11, word, "", f' style="fill:{colour};font-weight:bold"')
                where = f" at {ranges_text(hazard)}" if hazard.ranges else ""
                self._say(110, self._y + 11, _cut(f"{hazard.title}{where}", 140))
                self._y += 15


def _fills() -> str:
    return "".join(f".k{k.labels[-1]}{{fill:{k.fill}}}.l{k.labels[-1]}{{fill:{k.ink}}}" for k in KINDS if k is not GAP)


def _class(kind: Kind) -> str:
    """Short: there are hundreds of them."""
    return f"k{kind.labels[-1]}" if kind is not GAP else "gap"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def escaped(text: str) -> str:
    """For XML and HTML, in texts and attributes: without control characters, but that a line break stays one."""
    return "\n".join(escape(visible(line)) for line in text.split("\n"))
