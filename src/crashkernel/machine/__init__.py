"""What a machine is, as far as a capture kernel cares: memory, CPUs, firmware, and where the running kernel (K1) lies.

A `Machine` is a value. `crashkernel.machine.devicetree` reads what a device tree alone can say; `crashkernel.machine.live`
adds what only a running kernel knows; `crashkernel.machine.description` writes it all to a file and reads it back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from crashkernel.memory import RangeSet

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crashkernel.formats.fdt import Node
    from crashkernel.memory import Range

Platform = Literal["pseries", "powernv"]
Mmu = Literal["radix", "hash"]
ByteOrder = Literal["little", "big"]

PageUse = Literal["free", "cache", "anonymous", "slab", "pagetable", "kernel", "poisoned"]
"""Who holds a page of K1, as far as K1 tells: nobody; the page cache; a process; K1's own objects; its page tables; K1
itself or a driver, which it does not tell apart; and "poisoned": out of K1's hands, whatever put it there."""

PAGE_SIZES = (1 << 12, 1 << 14, 1 << 16, 1 << 18)
"""Of any ppc64 kernel, in bytes (arch/powerpc/Kconfig, PPC_*K_PAGES)."""

LARGEST_PAGE = 0x10000
"""The largest base page of a kernel that distributions ship for ppc64, in bytes: good for any where its own is not known."""

HEAD_SIZE = 0x100
"""K1's first bytes, in bytes: the ones `kexec_sequence` overwrites before any purgatory runs."""


@dataclass(frozen=True, slots=True)
class Region:
    """A named stretch of physical memory."""

    name: str
    range: Range


@dataclass(frozen=True, slots=True)
class Pages:
    """A stretch of K1's memory whose pages are all held by the same holder, when the machine was read."""

    range: Range
    use: PageUse


@dataclass(frozen=True, slots=True)
class Services:
    """What the firmware below both kernels does for a purgatory that asks: print, reboot, redirect machine checks."""

    kind: Literal["none", "papr", "opal"] = "none"
    console: int | None = None  # its number in the firmware's words: a vty's unit address, an OPAL terminal
    opal: tuple[int, int] = (0, 0)  # base and entry, physical
    rtas: tuple[int, int] = (0, 0)  # base and entry, physical; called in 32-bit mode
    rtas_reboot: int = 0  # token of system-reboot, 0 without
    rtas_nmi: int = 0  # token of ibm,nmi-register, 0 without


@dataclass(frozen=True, slots=True)
class Cpu:
    """One of K1's CPUs. `number` is Linux's, `note` the buffer its registers are saved to at the panic, if known."""

    number: int
    note: Range | None = None
    online: bool = True


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything a plan depends on. All addresses are physical, all sizes bytes."""

    platform: Platform
    model: str  # the device tree's own words
    mmu: Mmu  # what K1 runs with, and so what K2 will choose
    byteorder: ByteOrder  # of K1
    page_size: int  # of K1, one of PAGE_SIZES, 0 when unknown
    memory: RangeSet  # all RAM, the reserved region included
    real_mode: Range  # what a CPU with translation off reaches: the RMA of a partition, everything on bare metal
    cpus: tuple[Cpu, ...]  # all that are present
    reserved: Range | None  # crashkernel=
    firmware: tuple[Region, ...]  # RTAS, OPAL, TCE tables, reserved-memory: live below any kernel
    initrd: Range | None  # K1's, where it lay when K1 booted
    vmcoreinfo: Range | None
    head: bytes  # K1's first HEAD_SIZE bytes, b"" when nobody could read them
    cmdline: str  # K1's
    release: str  # K1's, "" when only its tree is known
    timebase_hz: int
    altivec: bool  # whether every CPU has it
    services: Services
    device_tree: Node
    layout: tuple[Region, ...] = ()  # K1's own image: text, read-only data, freed init, data; () when unknown
    kernel_end: int = 0  # where K1's image ends (its `_end`), 0 when unknown
    pages: tuple[Pages, ...] = ()  # who holds K1's low memory, ascending; () when K1 was not asked
    tree_size: int = 0  # bytes of the whole tree, flattened; `device_tree` may be what a description keeps of it

    @property
    def base_page(self) -> int:
        """K1's base page in bytes, the largest there is where it is not known."""
        return self.page_size or LARGEST_PAGE

    def held_by(self, pages: Iterable[Pages]) -> Machine:
        """The machine with `pages` in place of what was known of who holds their ranges."""
        told = tuple(pages)
        over = RangeSet(piece.range for piece in told)
        kept = (Pages(part, piece.use) for piece in self.pages for part in RangeSet([piece.range]) - over)
        return replace(self, pages=tuple(sorted((*kept, *told), key=lambda piece: piece.range.start)))

    def booted_with(self, region: Range) -> Machine:
        """The machine as if its kernel had been booted with `region` reserved.

        Where that kernel would keep its notes nobody can tell; who holds a page of the region is no question any more.
        """
        return replace(
            self,
            reserved=region,
            vmcoreinfo=None,
            cpus=tuple(replace(cpu, note=None) for cpu in self.cpus),
            pages=tuple(
                Pages(part, piece.use) for piece in self.pages for part in RangeSet([piece.range]) - RangeSet([region])
            ),
        )
