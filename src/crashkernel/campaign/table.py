"""What a campaign showed to work, as a table in Markdown: kernels and machines by placement and number of CPUs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from crashkernel.errors import UsageError
from crashkernel.memory import format_size
from crashkernel.placement.plan import PLACEMENTS
from crashkernel.report.campaign import STANDINGS, Cell, further_options

if TYPE_CHECKING:
    from pathlib import Path

    from crashkernel.report.campaign import Campaign, Drill

BEGIN, END = "<!-- campaign: begin, written by `crashkernel campaign table` -->", "<!-- campaign: end -->"

_T = TypeVar("_T")
_Row = tuple[str, str, str, str, str]  # K1, K2, machine, MMU, what else


def campaign_table(campaign: Campaign) -> str:
    """The drills without a fault; those that did not pass have a note below the table."""
    drills = [drill for drill in campaign.drills if not drill.fault]
    usual_memory = _usual(drill.memory for drill in drills)
    usual_region = _usual(drill.crashkernel for drill in drills)
    releases = _releases(campaign)
    cells: defaultdict[tuple[_Row, str, int], list[Drill]] = defaultdict(list)
    rows: dict[_Row, None] = {}
    for drill in drills:
        k1, k2 = releases[drill.kernel], releases[drill.capture_kernel or drill.kernel]
        row = (k1, "=" if k1 == k2 else k2, _machine(drill), drill.mmu, _other(drill, usual_memory, usual_region))
        rows[row] = None
        cells[row, drill.placement, drill.smp].append(drill)
    columns = [
        (placement, smp)
        for placement in PLACEMENTS
        for smp in sorted({drill.smp for drill in drills if drill.placement == placement})
    ]
    notes: dict[str, int] = {}
    head = ["K1", "K2", "machine", "MMU", "", *(f"{placement}, {_cpus(smp)}" for placement, smp in columns)]
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [
        _line([*row, *(_cell(cells.get((row, placement, smp), ()), notes) for placement, smp in columns)]) for row in rows
    ]
    passed = sum(1 for drill in drills if drill.standing == "passed")
    compared = sum(result.compared or 0 for drill in drills if drill.standing == "passed" and (result := drill.result))
    facts = [f"{passed} of {len(drills)} drills passed", f"{format_size(compared >> 20 << 20)} compared byte for byte"]
    if usual_memory and usual_region:
        facts.append(f"{format_size(usual_memory)} of memory and `crashkernel={usual_region}` where nothing else is said")
    lines += ["", f"{'; '.join(facts)}; crashkernel {campaign.version}, QEMU {campaign.host.get('qemu', '?')}."]
    lines += ["", *(f"{number}. {_safe(note)}" for note, number in notes.items())] if notes else []
    return "\n".join(lines)


def update_document(path: Path, table: str) -> None:
    """Put `table` between the markers of a document, which is written whole or not at all.

    :raise UsageError: it cannot be read or written, or has no markers.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}", hint="give a document with the markers") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{path} has no lines {BEGIN} and {END}", hint="put them where the table is to be")
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _releases(campaign: Campaign) -> Mapping[str, str]:
    """Specs of kernels, as their releases where a drill has told."""
    releases = {spec: spec for drill in campaign.drills for spec in (drill.kernel, drill.capture_kernel or drill.kernel)}
    for drill in campaign.drills:
        if drill.result and drill.result.release:
            releases[drill.kernel] = drill.result.release
            releases[drill.capture_kernel or drill.kernel] = drill.result.capture_release
    return releases


def _machine(drill: Drill) -> str:
    return f"{drill.machine} {drill.cpu}" if drill.machine == "pseries" else drill.machine


def _cpus(smp: int) -> str:
    return f"{smp} CPU{'s' * (smp != 1)}"


def _other(drill: Drill, memory: int | None, region: str | None) -> str:
    return ", ".join(
        [
            *([format_size(drill.memory)] if drill.memory != memory else []),
            *([f"`{drill.crashkernel}`"] if drill.crashkernel != region else []),
            *(["all CPUs in K2"] if drill.all_cpus else []),
            *([f"`capture` {drill.capture}"] if drill.capture is not None else []),
            *([f"`{more}`"] if (more := further_options(drill)) else []),
        ]
    )


def _cell(drills: Sequence[Drill], notes: dict[str, int]) -> str:
    if not drills:
        return ""
    cell = Cell(tuple(drills))
    standing = cell.standing
    word = {"passed": "PASS", "known": "FAIL", "failed": "FAIL", "surprise": "PASS"}.get(standing, STANDINGS[standing][0])
    if len(drills) > 1:
        word += f" {cell.passed}/{len(drills)}"
    if standing in {"passed", "missing"}:
        return word
    numbers = []
    for drill in drills:
        if drill.standing == standing and drill.result:
            said = f"{drill.result.stage}: {drill.result.reason}" if drill.result.reason else "passed, though known to fail"
            note = f"{drill.known} ({said})" if drill.known else said
            numbers.append(notes.setdefault(note, len(notes) + 1))
    return f"{word} ({', '.join(map(str, dict.fromkeys(numbers)))})"


def _line(columns: Iterable[str]) -> str:
    return f"| {' | '.join(map(_safe, columns))} |"


def _safe(text: str) -> str:
    """Text that ends no cell and is no HTML."""
    return text.replace("|", "/").replace("<", "&lt;")


def _usual(values: Iterable[_T]) -> _T | None:
    """The most frequent one."""
    return next((value for value, _ in Counter(values).most_common(1)), None)
