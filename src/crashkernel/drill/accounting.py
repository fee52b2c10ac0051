"""Where K2's reservation went, by K2's own accounting: what a twin's K2 said of its memory, as a table that adds up.

K2 is measured twice: before it saves the dump, and when the least was available while it did. While it unpacked its initrd
nobody could look; but then all that stood at the first look lay there already, and the initrd as it was loaded besides.
Rows that K2 does not count itself are computed (the array of page structs, radix's process table) or what is left.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from crashkernel.placement.plan import SegmentContent
from crashkernel.placement.sizing import PROCESS_TABLE, page_structs

if TYPE_CHECKING:
    from crashkernel.drill.saving import Footprint
    from crashkernel.machine import Mmu
    from crashkernel.placement.plan import LoadPlan

Peak = Literal["unpacking", "saving"]
PEAKS: tuple[Peak, ...] = ("unpacking", "saving")

FREE, CACHE = "free", "page cache"
INITRD: SegmentContent = "initrd"


@dataclass(frozen=True, slots=True)
class Accounting:
    """What each thing took of the reservation, in bytes, at both peaks. Either table adds up to `reservation`.

    `page_size` is K2's, 0 where it did not say.
    """

    reservation: int
    page_size: int
    unpacking: dict[str, int]
    saving: dict[str, int]

    @property
    def peak(self) -> Peak:
        """The worse of the two: the one that had less to spare."""
        return "unpacking" if _spare(self.unpacking) < _spare(self.saving) else "saving"

    @property
    def at_peak(self) -> dict[str, int]:
        """The table of the worse peak."""
        return self.unpacking if self.peak == "unpacking" else self.saving

    @property
    def spare(self) -> int:
        """What K2 could still have had at the worse peak: free pages, and those of its page cache."""
        return _spare(self.at_peak)

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "reservation": self.reservation,
            "page_size": self.page_size,
            "peak": self.peak,
            "spare": self.spare,
            "unpacking": self.unpacking,
            "saving": self.saving,
        }


def account(footprint: Footprint, plan: LoadPlan, mmu: Mmu) -> Accounting | None:
    """What K2 said, as tables; None where it did not get so far as to say anything.

    Nothing that K2 says is trusted to make sense: what cannot be read counts as not said, and ends up in the rows of what is
    left over.
    """
    if not footprint.before:
        return None
    boot = _Boot.read(footprint.booted)
    loaded = sum(segment.range.size for segment in plan.segments if segment.content == INITRD)
    saving = _table(footprint.low, boot, plan, mmu, unpacked=footprint.before.get("Cached", 0))
    unpacking = _table(footprint.before, boot, plan, mmu, unpacked=footprint.before.get("Cached", 0), loaded=loaded)
    return Accounting(plan.reserved.size, boot.page_size, unpacking, saving)


@dataclass(frozen=True, slots=True)
class _Boot:
    """What the kernel's log says of its memory, in bytes; 0 where it does not.

    `image` is text, data and bss without what is freed after boot (mem_init_print_info, mm/page_alloc.c); `percpu` is the
    first chunk of all possible CPUs, which is counted as Percpu but not in MemTotal (pcpu_embed_first_chunk, mm/percpu.c).
    """

    image: int = 0
    page_size: int = 0
    percpu: int = 0

    @classmethod
    def read(cls, lines: list[str]) -> _Boot:
        text = "\n".join(lines)
        sizes = re.search(
            r"\((\d{1,12})K kernel code, (\d{1,12})K rwdata, (\d{1,12})K rodata, \d+K init, (\d{1,12})K bss", text
        )
        image = sum(int(size) for size in sizes.groups()) << 10 if sizes else 0
        units = re.search(r"Embedded (\d{1,6}) pages/cpu s(\d{1,12}) r(\d{1,12}) d(\d{1,12})", text)
        if units is None or not (pages := int(units[1])):
            return cls(image)
        unit = sum(int(part) for part in units.groups()[1:])
        cpus = re.search(r"nr_cpu_ids[:=](\d{1,4})\b", text)
        return cls(image, unit // pages, unit * (int(cpus[1]) if cpus else 1))


def _table(said: dict[str, int], boot: _Boot, plan: LoadPlan, mmu: Mmu, *, unpacked: int, loaded: int = 0) -> dict[str, int]:
    """One table. `unpacked` bytes of the page cache are the initrd's files, `loaded` its archive where that is still there."""
    total = said.get("MemTotal", 0)
    files = sum(said.get(name, 0) for name in ("Cached", "Buffers", "SwapCached"))
    at_boot = {
        "K2's image": boot.image,
        "array of page structs": page_structs(plan.k2_memory, mmu, boot.page_size) if boot.page_size else 0,
        "radix's process table": PROCESS_TABLE if mmu == "radix" else 0,
    }
    # a stack that is smaller than a page comes from a slab (alloc_thread_stack_node, kernel/fork.c)
    stacks = said.get("KernelStack", 0) if boot.page_size and boot.page_size <= _STACK else 0
    at_work = {
        "initrd as loaded": loaded,
        "initrd unpacked": min(unpacked, files),
        CACHE: files - min(unpacked, files),
        "slabs": said.get("Slab", 0),
        "kernel stacks": stacks,
        "modules, vmalloc": max(0, said.get("VmallocUsed", 0) - stacks),
        "page tables": said.get("PageTables", 0),
        "per-CPU data": max(0, said.get("Percpu", 0) - boot.percpu),
        "processes": said.get("AnonPages", 0),
        FREE: max(0, said.get("MemFree", 0) - loaded),
    }
    table = {
        **at_boot,
        "else reserved at boot": plan.reserved.size - total - sum(at_boot.values()),
        **at_work,
        "drivers, pages in hand": total - sum(at_work.values()),
    }
    table[FREE] = table.pop(FREE)  # the last row
    return {name: size for name, size in table.items() if size or name == FREE}


def _spare(table: dict[str, int]) -> int:
    return table[FREE] + table.get(CACHE, 0)


_STACK = 16 << 10  # THREAD_SIZE, arch/powerpc/Kconfig: THREAD_SHIFT of ppc64
