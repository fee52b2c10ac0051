"""The hazards of a plan as a table: the worst first, what to do about each, and where the knowledge comes from."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from crashkernel.report.terminal import paint, visible, wrap

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crashkernel.placement.plan import Hazard, HazardVerdict

VERDICTS: dict[HazardVerdict, tuple[str, str]] = {
    "impossible": ("IMPOSSIBLE", "#b3261e"),
    "dangerous": ("DANGEROUS", "#b84a00"),
    "unknown": ("unknown", "#8a6d00"),
    "guarded": ("safe because", "#1f6fb2"),
    "safe": ("safe", "#00784f"),
}
"""What people read for each verdict, the worst first, and its colour: all can be read on white, and white on them."""

_ON_TERMINALS = {
    "impossible": ("#ffffff", "#af0000"),
    "dangerous": ("#000000", "#ff8700"),
    "unknown": ("#000000", "#ffd700"),
    "guarded": ("#0087d7", ""),
    "safe": ("#00875f", ""),
}
"""Ink and fill: to be read on dark terminals and on light ones."""

_COLUMN = 14
_RANGES_SHOWN = 8


def worst_first(hazards: Iterable[Hazard]) -> list[Hazard]:
    """The same hazards, the worst verdicts first, each verdict's in their own order."""
    order = list(VERDICTS)
    return sorted(hazards, key=lambda hazard: order.index(hazard.verdict))


def summary(hazards: Iterable[Hazard]) -> str:
    """How many of each verdict, in one line: "2 DANGEROUS, 1 unknown, 9 safe"."""
    count = Counter(hazard.verdict for hazard in hazards)
    return ", ".join(f"{count[verdict]} {word}" for verdict, (word, _) in VERDICTS.items() if count[verdict]) or "none checked"


def draw_hazards(hazards: Iterable[Hazard], colour: bool = False, width: int = 80, *, short: bool = False) -> str:
    """The hazards as text of at most `width` columns (60 at least) where words allow; `short` is one line for each."""
    width = max(60, width)
    hazards = worst_first(hazards)
    lines = wrap(f"hazards: {summary(hazards)}", width, "", "  ")
    for hazard in hazards:
        word, _ = VERDICTS[hazard.verdict]
        bad = hazard.verdict in ("dangerous", "impossible")
        verdict = word.ljust(_COLUMN)
        if colour:
            ink, fill = _ON_TERMINALS[hazard.verdict]
            verdict = paint(word, ink=ink, fill=fill, bold=bad) + " " * (_COLUMN - len(word))
        if short:
            lines.append(verdict + _short(hazard, width - _COLUMN))
            continue
        indent = " " * _COLUMN
        first, *others = wrap(f"{hazard.title} ({hazard.name})", width - _COLUMN)
        lines += ["", verdict + paint(first, bold=colour), *(indent + paint(line, bold=colour) for line in others)]
        lines += wrap(hazard.reason, width, indent, indent)
        if hazard.ranges:
            lines += wrap(ranges_text(hazard), width, f"{indent}at ", f"{indent}   ")
        if hazard.advice:
            lines += wrap(hazard.advice, width, f"{indent}do: ", f"{indent}    ")
        if hazard.source:
            lines += wrap(hazard.source, width, f"{indent}source: ", f"{indent}        ")
    return "\n".join(lines)


def ranges_text(hazard: Hazard) -> str:
    """The addresses of a hazard, the first few of many."""
    shown = ", ".join(map(str, hazard.ranges[:_RANGES_SHOWN]))
    more = len(hazard.ranges) - _RANGES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _short(hazard: Hazard, room: int) -> str:
    """The title; of what is bad the addresses, of what could be the reason, as far as there is room."""
    if hazard.verdict == "safe":
        more = ""
    elif hazard.verdict == "guarded" or not hazard.ranges:
        more = f": {hazard.reason}"
    else:
        more = f" at {ranges_text(hazard)}"
    text = visible(hazard.title + more)
    return text if len(text) <= room else f"{text[: room - 3].rpartition(' ')[0] or text[: room - 3]}..."
