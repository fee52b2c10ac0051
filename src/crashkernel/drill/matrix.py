"""The machines and kernels every release is drilled on, and the table the README shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from crashkernel.drill.twin import Twin
from crashkernel.errors import UsageError
from crashkernel.memory import align_up, format_size

if TYPE_CHECKING:
    from pathlib import Path

    from crashkernel.drill.scenario import Outcome

_TWIN = Twin()
_GIB = 1 << 30
BOOKWORM, TRIXIE, TRIXIE_64K, SID = "debian:bookworm", "debian:trixie", "debian:trixie/powerpc64le-64k", "debian:sid"


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a kernel on a machine, drilled with both placements."""

    kernel: str
    twin: Twin
    all_cpus: bool = False  # in K2 too

    def resolved(self, kernel_span: int) -> Twin:
        """The twin with `BEHIND_K1` replaced by the first MiB behind a K1 of `kernel_span` bytes."""
        behind = f"512M@{align_up(kernel_span, 1 << 20) >> 20}M"
        return replace(self.twin, crashkernel=behind) if self.twin.crashkernel == BEHIND_K1 else self.twin


BEHIND_K1 = "directly behind K1's image"  # the mail's variant

CASES = (
    Case(BOOKWORM, _TWIN),
    Case(BOOKWORM, replace(_TWIN, cpu="POWER8", mmu="hash")),
    Case(BOOKWORM, replace(_TWIN, mmu="hash")),
    Case(BOOKWORM, replace(_TWIN, cpu="POWER10")),
    Case(BOOKWORM, replace(_TWIN, smp=2)),
    Case(BOOKWORM, replace(_TWIN, smp=4)),
    Case(BOOKWORM, replace(_TWIN, smp=4), all_cpus=True),
    Case(BOOKWORM, replace(_TWIN, smp=4, mmu="hash")),
    Case(BOOKWORM, replace(_TWIN, smp=4, mmu="hash"), all_cpus=True),
    Case(TRIXIE, _TWIN),
    Case(TRIXIE_64K, _TWIN),
    Case(SID, _TWIN),
    Case(BOOKWORM, replace(_TWIN, machine="powernv9")),
    Case(BOOKWORM, replace(_TWIN, machine="powernv9", smp=4), all_cpus=True),
    Case(BOOKWORM, replace(_TWIN, memory=1 * _GIB)),
    Case(BOOKWORM, replace(_TWIN, memory=4 * _GIB)),
    Case(BOOKWORM, replace(_TWIN, crashkernel="256M@128M")),
    Case(BOOKWORM, replace(_TWIN, crashkernel=BEHIND_K1)),
)

_BEGIN, _END = "<!-- matrix: begin, written by `make matrix` -->", "<!-- matrix: end -->"


def markdown_row(twin: Twin, release: str, cells: list[str], *, all_cpus: bool = False) -> str:
    """One line of the table; `cells` are the results of both placements."""
    machine = f"{twin.machine} {twin.cpu}" if twin.machine == "pseries" else twin.machine
    columns = [
        release,
        machine,
        twin.mmu,
        f"{twin.smp}, {twin.smp if all_cpus else 1}",
        format_size(twin.memory),
        f"`{twin.crashkernel}`",
        *cells,
    ]
    return f"| {' | '.join(column.replace('|', '/') for column in columns)} |"


def result_cell(outcome: Outcome) -> str:
    """PASS and how much was compared, or why not."""
    if outcome.failure is not None:
        return f"FAIL: {outcome.failure.stage}"
    verdict = outcome.verdict
    if verdict is None or not outcome.passed:
        return "FAIL: " + (verdict.problems[0] if verdict and verdict.problems else "no verdict")
    return f"PASS {verdict.bytes_compared >> 20} MiB"


def markdown_table(rows: list[str]) -> str:
    """The table with its head. A PASS is followed by how much memory was compared."""
    head = ("K1 = K2", "machine", "MMU", "CPUs K1, K2", "memory", "crashkernel=", "zero", "reserved")
    return "\n".join([f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |", *rows])


def update_document(path: Path, table: str) -> None:
    """Put `table` between the markers of a document.

    :raise UsageError: the document has no markers.
    """
    text = path.read_text()
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UsageError(f"{path} has no lines {_BEGIN} and {_END}")
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{after}")
    temporary.replace(path)
