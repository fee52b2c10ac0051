"""The emulated CPUs of the bench, and QEMU's arguments for each.

QEMU's `-M none` would do, were it not that it has no time base: `mftb` ends QEMU 7.2 there with a segmentation fault, and the
purgatory waits by the time base. So the 970 sits in a mac99 and the others in powernv machines, whose firmware is replaced by
an empty page, and a loader device points each CPU at its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

QEMU = "qemu-system-ppc64"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Cpu:
    """What to run on. `memory` is the machine's in bytes, `count` how many CPUs it can have here."""

    name: str
    machine: str
    options: tuple[str, ...]
    memory: int
    little: bool
    """Whether MSR.LE exists: the 970 is big-endian only."""
    count: int = 1
    partition: bool = False
    """QEMU plays a PAPR hypervisor: it starts one CPU, at the firmware's 0x100, and that one the others by RTAS."""

    def command(self, ram: Path | str, firmware: Path, starts: Sequence[int]) -> list[str]:
        """QEMU's arguments: RAM is the file `ram`, CPU number n starts at `starts[n]`, one CPU for each of these."""
        command = [QEMU, "-M", f"{self.machine},memory-backend=ram", *self.options, "-smp", str(len(starts))]
        command += ["-m", str(self.memory // MIB)]
        command += ["-object", f"memory-backend-file,id=ram,size={self.memory},mem-path={ram},share=on"]
        command += ["-display", "none", "-nodefaults", "-accel", "tcg,thread=multi", "-bios", str(firmware)]
        if not self.partition:
            for number, start in enumerate(starts):
                command += ["-device", f"loader,addr={start:#x},cpu-num={number}"]
        return command


_PARTITION = "pseries,x-vof=off,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off"

CPUS = {
    cpu.name: cpu
    for cpu in (
        Cpu("970fx", "mac99", ("-cpu", "970fx"), 128 * MIB, little=False),
        Cpu("POWER8", "powernv8", (), 1024 * MIB, little=True, count=2),
        Cpu("POWER9", "powernv9", (), 1024 * MIB, little=True, count=2),
        Cpu("POWER10", "powernv10", (), 1024 * MIB, little=True, count=2),
        Cpu("partition", _PARTITION, ("-cpu", "POWER9"), 256 * MIB, little=True, count=2, partition=True),
    )
}

BARE = tuple(name for name, cpu in CPUS.items() if not cpu.partition)
"""The CPUs without a hypervisor, where a case costs milliseconds."""
