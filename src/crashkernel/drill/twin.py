"""What machine to emulate: a value, apart from how QEMU is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crashkernel.errors import UsageError
from crashkernel.machine import Mmu
from crashkernel.memory import format_size

MachineName = Literal["pseries", "powernv9", "powernv10"]
MACHINES: tuple[MachineName, ...] = ("pseries", "powernv9", "powernv10")
CPUS = ("POWER8", "POWER9", "POWER10")
MMUS: tuple[Mmu, ...] = ("radix", "hash")

_SPAPR_BLOCK = 256 << 20
_MOST_MEMORY = 1 << 46


@dataclass(frozen=True, slots=True)
class Twin:
    """The machine to emulate. `memory` is in bytes; `crashkernel` as on K1's command line."""

    machine: MachineName = "pseries"
    cpu: str = "POWER9"
    mmu: Mmu = "radix"
    smp: int = 1
    memory: int = 2 << 30
    crashkernel: str = "512M"

    def __post_init__(self) -> None:
        if self.smp < 1:
            raise UsageError(f"--smp {self.smp}: a machine has at least one CPU")
        if self.machine == "powernv9" and self.cpu != "POWER9":
            raise UsageError(f"powernv9 is a POWER9 machine, not {self.cpu}", hint="leave --cpu out")
        if self.machine == "powernv10" and self.cpu != "POWER10":
            raise UsageError(f"powernv10 is a POWER10 machine, not {self.cpu}", hint="leave --cpu out")
        if self.cpu == "POWER8" and self.mmu == "radix":
            raise UsageError("POWER8 has no radix MMU", hint="add --mmu hash, or leave --mmu out")
        # QEMU's own rules: spapr_validate_node_memory, hw/ppc/spapr.c; pnv_init, hw/ppc/pnv.c. Linux: MAX_PHYSMEM_BITS.
        least, unit = (_SPAPR_BLOCK, _SPAPR_BLOCK) if self.machine == "pseries" else (1 << 30, 1 << 20)
        if not least <= self.memory <= _MOST_MEMORY or self.memory % unit:
            raise UsageError(
                f"a {self.machine} cannot have {format_size(self.memory)} of memory",
                hint=f"give a multiple of {format_size(unit)}, {format_size(least)} to {format_size(_MOST_MEMORY)}",
            )

    @property
    def title(self) -> str:
        """One line for people."""
        return (
            f"{self.machine} {self.cpu} {self.mmu}, {self.smp} CPU{'s' * (self.smp > 1)}, "
            f"{format_size(self.memory)}, crashkernel={self.crashkernel}"
        )

    @property
    def kernel_options(self) -> str:
        """What K1's command line needs for this machine."""
        hash_mmu = " disable_radix" if self.mmu == "hash" and self.cpu != "POWER8" else ""
        return f"console=hvc0 crashkernel={self.crashkernel}{hash_mmu} rdinit=/init"
