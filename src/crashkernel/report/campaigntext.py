"""A campaign for a terminal: the figures of its page, in 80 columns where they fit, and to be pasted into a ticket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crashkernel.report.campaign import ELSE, STANDINGS, Standing
from crashkernel.report.terminal import paint, visible, wrap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crashkernel.report.campaign import Campaign, Cell, Failures, Size, Spread, Table

_INKS: dict[Standing, tuple[str, str]] = {
    "failed": ("#ffffff", "#af0000"),
    "surprise": ("#000000", "#ff8700"),
    "error": ("#000000", "#ffd700"),
    "missing": ("#8a8a8a", ""),
    "known": ("#0087d7", ""),
    "passed": ("#00875f", ""),
}
"""Ink and fill: to be read on dark terminals and on light ones."""

_DRILLS_SHOWN = 12
_BOX = 26


def draw_campaign(campaign: Campaign, colour: bool = False, width: int = 80) -> str:
    """The campaign as text of at most `width` columns (60 at least) where words and tables allow."""
    width = max(60, width)
    lines = [paint(line, bold=colour) for line in wrap(f"{campaign.name}: {campaign.headline}", width, "", "  ")]
    lines += [line for fact in campaign.facts for line in wrap(fact, width, "  ", "    ")]
    for failures in campaign.failures:
        lines += ["", *_failures(failures, campaign, colour, width)]
    if campaign.matrix.rows:
        lines += ["", _title("drills", colour), *_table(campaign.matrix, colour, width)]
    if campaign.fault_rows.rows:
        lines += ["", _title("faults", colour), *_table(campaign.fault_rows, colour, width)]
    if campaign.totals:
        lines += ["", _title("seconds of drills that passed", colour), *_times(campaign)]
    if campaign.sizes:
        lines += ["", _title("smallest reservations found", colour)]
        for size in campaign.sizes:
            lines += ["", *_size(size, width)]
    return "\n".join(lines)


def _size(size: Size, width: int) -> list[str]:
    lines = wrap(size.title, width, "  ", "  ")
    lines += [line for fact in size.facts for line in wrap(fact, width, "    ", "      ")]
    column = max(len(visible(name)) for name, _ in size.bars)
    most = max(1, *(each for _, each in size.bars))
    for name, each in size.bars:
        lines.append(f"    {visible(name):<{column}}{_mib(each)}  {'=' * round(each / most * _BOX)}".rstrip())
    for peak, table in size.peaks:
        lines.append(f"    where it went, {peak}")
        column = max((len(visible(name)) for name, _ in table), default=0)
        lines += [f"      {visible(name):<{column}}{_mib(each)}" for name, each in table]
    return lines


def _mib(size: int) -> str:
    return f"{size / (1 << 20):9.1f} MiB"


def _title(text: str, colour: bool) -> str:
    return paint(text, bold=colour)


def _word(standing: Standing, text: str, colour: bool, width: int = 0) -> str:
    """`text` in the standing's colour, then blanks up to `width`."""
    blanks = " " * max(0, width - len(text))
    if not colour:
        return text + blanks
    ink, fill = _INKS[standing]
    return paint(text, ink=ink, fill=fill, bold=standing == "failed") + blanks


def _failures(failures: Failures, campaign: Campaign, colour: bool, width: int) -> list[str]:
    count = len(failures.drills)
    head = STANDINGS[failures.standing][1 + (count != 1)]
    first, *others = wrap(f"{head}, {count} drill{'s' * (count != 1)}: {failures.why}", width, "", "  ")
    lines = [_word(failures.standing, first[: len(head)], colour) + first[len(head) :], *others]
    evidence = campaign.evidence.get(failures.drills[0].number)
    if evidence and evidence.likely and failures.standing != "known":
        lines += wrap(evidence.likely, width, "  likely: ", "    ")
    for drill in failures.drills[:_DRILLS_SHOWN]:
        lines += wrap(drill.title, width, f"  {drill.number:>4}  ", " " * 8)
        if failures.standing != "known":
            lines.append(" " * 8 + visible(drill.command))  # whole, to be copied
    if count > _DRILLS_SHOWN:
        lines.append(f"        and {count - _DRILLS_SHOWN} more")
    return lines


def _table(table: Table, colour: bool, width: int) -> list[str]:
    """Names, then a column for each placement, then what else is said. What is too wide is not cut."""
    skipped = 1 if table.grouped else 0
    last = len(table.heads) - (table.heads[-1] == ELSE)
    heads = [[visible(text) for text in row.heads] for row in table.rows]
    texts = [[_cell(cell) for cell in row.cells] for row in table.rows]
    titles = [" ".join(filter(None, map(visible, column))) for column in table.columns]
    lines = [[*table.heads[skipped:last], *titles, *table.heads[last:]]]
    lines += [[*names[skipped:last], *cells, *names[last:]] for names, cells in zip(heads, texts, strict=True)]
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    indent = "    " if skipped else "  "
    drawn = [indent + "  ".join(text.ljust(size) for text, size in zip(lines[0], sizes, strict=True)).rstrip()]
    for row, names, line, before in zip(table.rows, heads, lines[1:], [[""], *heads], strict=False):
        if skipped and names[0] != before[0]:
            drawn.append(f"  {table.heads[0]} {paint(names[0], bold=colour)}")
        painted = [text.ljust(size) for text, size in zip(line, sizes, strict=True)]
        for number, cell in enumerate(row.cells, last - skipped):
            if cell is not None:
                painted[number] = _word(cell.standing, cell.word, colour) + painted[number][len(cell.word) :]
        drawn.append(f"{indent}{'  '.join(painted)}".rstrip())
    if table.alike:
        drawn += wrap(f"where nothing else is said: {'; '.join(table.alike)}", width, "  ", "    ")
    return drawn


def _cell(cell: Cell | None) -> str:
    return "-" if cell is None else f"{cell.word} {cell.compared}".rstrip()


def _times(campaign: Campaign) -> list[str]:
    """A line for each stage and placement, with a box from quartile to quartile to the scale of its stage."""
    spreads: dict[str, Mapping[str, Spread]] = {**campaign.stage_times, "whole drill": campaign.totals}
    column = max(len(visible(name)) for name in spreads)
    lines = [f"  {'':<{column}} {'':<9}{'drills':>6}{'least':>8}{'median':>8}{'95 %':>8}{'most':>8}"]
    for name, by_placement in spreads.items():
        most = max(spread.values[-1] for spread in by_placement.values())
        for number, (placement, spread) in enumerate(by_placement.items()):
            figures = [spread.values[0], spread.median, spread.quantile(0.95), spread.values[-1]]
            lines.append(
                f"  {visible(name) if not number else '':<{column}} {visible(placement):<9}{len(spread.values):>6}"
                + "".join(f"{value:8.{2 if most < 10 else 1}f}" for value in figures)
                + f"  {_box(spread, most)}"
            )
    return lines


def _box(spread: Spread, most: float) -> str:
    """`  |--[==#==]----|`: least, quartiles around the median, most; 0 is at the left edge."""

    def at(value: float) -> int:
        return round(value / most * (_BOX - 1)) if most else 0

    line = [" "] * _BOX
    line[at(spread.values[0]) : at(spread.values[-1]) + 1] = "-" * (at(spread.values[-1]) + 1 - at(spread.values[0]))
    low, high = at(spread.quantile(0.25)), at(spread.quantile(0.75))
    line[low : high + 1] = "=" * (high + 1 - low)
    line[at(spread.median)] = "#"
    return "".join(line).rstrip()
