"""Decides where everything goes: `plan_load` turns a machine and a capture kernel into a `LoadPlan`.

The two placements of the 2005 mail are two small functions here, each a table of moves and the memory that table leaves to K2.
All that follows from a table (the vmcore's header, the pictures, the verdict) asks the table and knows no placement.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from crashkernel.errors import PlanError
from crashkernel.machine import LARGEST_PAGE, Machine, Services
from crashkernel.machine.devicetree import dynamic_memory
from crashkernel.machine.kernelfile import ends_alike
from crashkernel.memory import Range, RangeSet, align_up, format_size
from crashkernel.placement import tables
from crashkernel.placement.hazards import EARLY_ALLOCATIONS, assess, slaves_of
from crashkernel.placement.moves import MAX_MOVES
from crashkernel.placement.plan import (
    DamagePolicy,
    LoadPlan,
    PlacementName,
    Segment,
    SegmentContent,
    check_plan,
    final_layout,
    keep,
    loaded_contents,
    to_check,
)
from crashkernel.placement.reservation import COMMAND_LINE_SIZE
from crashkernel.placement.sizing import Initrd, estimate, limited_cpus, possible_cpus, whole_root

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from crashkernel.machine import Mmu
    from crashkernel.placement.image import KernelImage
    from crashkernel.placement.moves import Move
    from crashkernel.placement.sizing import Estimate

__all__ = ["plan_load", "slaves_of"]

PAGE = LARGEST_PAGE
"""Everything is placed in whole 64 KiB pages: the largest base page of any ppc64 kernel, K1 or K2."""

PURGATORY_SIZE = PAGE
_MIB = 1 << 20

LINEAR_MAP_BLOCK: dict[Mmu, int] = {"radix": 2 * _MIB, "hash": 16 * _MIB}
"""The page size K2 may map its memory with, in bytes; a page of every range of its memory stays free.

Hash: htab_bolt_mapping (arch/powerpc/mm/book3s64/hash_utils.c) maps only whole linear pages, up to 16 MiB, and leaves the
ragged ends of a range unmapped though the allocator hands them out. Radix maps ragged ends with small pages, whose page
tables it must find inside the same range (early_alloc_pgtable). A range that K2's image fills to its ragged end stops
K2 before its first line of output: seen with Debian 6.1, with 64 KiB at 0 and the backup right behind the image.

So K2's memory is cut to whole blocks on hash, and not on radix: there a K2 whose memory began at 44 MiB of a region at 41 MiB
came up and then stood still before its init, every time, while with the ragged head it ran. The cause is not known.
"""

ONE_CPU = "maxcpus=1 numa=off"
"""What a K2 is told that is to run on one CPU.

A driver's probe is sent to the first CPU of the device's node (pci_call_probe, drivers/pci/pci-driver.c), and waits for ever
where that is not the one that runs: seen on powernv9, when K1 crashed on its second. Without nodes it is sent nowhere.
"""


def plan_load(
    machine: Machine,
    image: KernelImage,
    initrd: Initrd,
    cmdline: str,
    placement: PlacementName,
    on_damage: DamagePolicy = "reboot",
) -> LoadPlan:
    """The complete plan for one machine, capture kernel and placement.

    `initrd` is what is known of K2's, of size 0 when there is none; `cmdline` is K2's, without `elfcorehdr=`, which is added
    here; `on_damage` is what is done at a panic when what was loaded is found damaged.
    :raise PlanError: no region is reserved, K2 does not fit into it (says by how much, and what to change), or its command
        line is too long.
    """
    region = machine.reserved
    if region is None:
        raise PlanError(
            "no memory is reserved for a capture kernel",
            hint="boot with crashkernel=512M on the kernel command line (check /sys/kernel/kexec_crash_size)",
        )
    mmu = _k2_mmu(machine, cmdline)
    # hash blocks hold whole radix blocks: good for both, where K1 and K2 do not choose the same
    block = LINEAR_MAP_BLOCK["hash" if "hash" in (machine.mmu, mmu) else "radix"]
    firmware = RangeSet(region.range.align_outward(PAGE) for region in machine.firmware)
    table = (_zero if placement == "zero" else _reserved)(machine, image, region, firmware, block)
    k2_memory = table.k2_memory - firmware
    k2_mapped = table.k2_memory | _mappable(machine, block)
    free = k2_memory - RangeSet(segment.range for segment in table.segments)
    room = _Room((RangeSet([region]) & free) - RangeSet([table.low_block]) - _spare(k2_mapped, free), machine)
    # room for what tree.py adds: K2's command line, a pair of 64-bit numbers for each piece of memory, its count in drconf
    tree_size = machine.tree_size + COMMAND_LINE_SIZE + 64 * 1024
    tree_size += 24 * dynamic_memory(machine.device_tree).usable_blocks
    core_entries = 8 + len(machine.cpus) + 2 * len(machine.memory) + 4 * MAX_MOVES
    wanted: list[tuple[SegmentContent, int]] = [
        ("purgatory", PURGATORY_SIZE),
        ("elfcorehdr", 64 + 56 * core_entries),
        ("fdt", tree_size),
    ]
    if initrd.size:
        wanted.append(("initrd", initrd.size))
    # Nothing but the purgatory's check reads the initrd with translation off. It goes lowest first like the rest, and so above
    # the RMA, where it goes unchecked, only when it does not fit below: K2's early allocations have a block of their own
    # (first_memblock_size, arch/powerpc/kernel/prom.c).
    segments = (
        *table.segments,
        *(Segment(content, room.take(content, size, real_mode=content != "initrd")) for content, size in wanted),
    )
    purgatory = next(segment.range for segment in segments if segment.content == "purgatory")
    # everything is checked where the table leaves it, the largest and most exposed last: the kernel
    final = final_layout(machine.memory, region, segments, table.moves(purgatory.start, ()))
    loaded = sorted(loaded_contents(final, purgatory), key=lambda extent: extent.content == "kernel")
    low_page = RangeSet([Range(0, tables.LOW_PAGE)])
    checks = [piece for extent in loaded for piece in to_check(machine.real_mode, table.entry, image.span, extent) - low_page]
    moves = table.moves(purgatory.start, checks)
    kept = keep(machine.memory, region, segments, moves, k2_memory)
    elfcorehdr = next(segment.range.start for segment in segments if segment.content == "elfcorehdr")
    cmdline = f"{cmdline} elfcorehdr={elfcorehdr >> 10}K".strip()
    if (length := len(os.fsencode(cmdline)) + 1) > COMMAND_LINE_SIZE:
        raise PlanError(
            f"K2's command line has {length} bytes, K2 reads {COMMAND_LINE_SIZE}: elfcorehdr= at its end would be lost",
            hint="shorten --append, or do not --reuse-cmdline",
        )
    plan = LoadPlan(
        placement=placement,
        kernel=image.release,
        kernel_span=image.span,
        cmdline=cmdline,
        machine=f"{machine.platform} {machine.mmu}, {machine.model}",
        memory=machine.memory,
        real_mode=machine.real_mode,
        reserved=region,
        firmware=machine.firmware,
        k1_layout=machine.layout or (image.layout if _same_kernel(machine, image) else ()),
        segments=segments,
        moves=moves,
        entry=table.entry,
        k2_memory=k2_memory,
        k2_mapped=k2_mapped,
        kept=kept,
        notes=tuple(note for note in (machine.vmcoreinfo, *(cpu.note for cpu in machine.cpus)) if note is not None),
        slaves=slaves_of(machine),
        # as long as K1 itself grants its CPUs to answer the crash IPI (IPI_TIMEOUT, arch/powerpc/kexec/crash.c)
        slave_timeout=10 * machine.timebase_hz,
        services=_reachable(machine.services, purgatory),
        altivec=machine.altivec,
        on_damage=on_damage,
    )
    check_plan(plan)
    return replace(plan, hazards=assess(plan, machine, _estimate(machine, image, initrd, cmdline, mmu, k2_memory), image, mmu))


def _k2_mmu(machine: Machine, cmdline: str) -> Mmu:
    """What K2 will choose: hash if its command line says so, else what a partition has agreed on, or all that the CPU can.

    parse_disable_radix and early_check_vec5, arch/powerpc/mm/init_64.c.
    """
    given = [value for key, _, value in (word.partition("=") for word in cmdline.split()) if key == "disable_radix"]
    # kstrtobool, lib/kstrtox.c
    if given and not given[-1].lower().startswith(("n", "0", "f", "of")):
        return "hash"
    cpus = machine.device_tree.child("cpus")
    if machine.platform == "powernv" and cpus is not None:
        return "radix" if any("ibm,processor-radix-AP-encodings" in node.properties for node in cpus.children) else "hash"
    return machine.mmu


def _same_kernel(machine: Machine, image: KernelImage) -> bool:
    """Whether K2's file tells as much of where K1 has what as K1's own: a release may have been built more than once."""
    if image.release != machine.release:
        return False
    return ends_alike(image.span, machine.kernel_end)


def _estimate(machine: Machine, image: KernelImage, initrd: Initrd, cmdline: str, mmu: Mmu, k2_memory: RangeSet) -> Estimate:
    """What K2 will need. Of its page size nothing is known but K1's, which distributions build it with too."""
    possible = limited_cpus(possible_cpus(machine), cmdline, "nr_cpus")
    return estimate(
        image.span,
        initrd,
        k2_memory,
        mmu,
        machine.base_page,
        possible,
        started=limited_cpus(possible, cmdline, "maxcpus"),
        k1_memory=machine.memory.total - (machine.reserved.size if machine.reserved else 0),
        root=whole_root(cmdline),
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """What a placement decides. `low_block` is the memory at 0 that K2 owns afterwards.

    `moves` makes the table once the rest is placed: of the purgatory's address and of what is to be checked.
    """

    segments: tuple[Segment, ...]
    moves: Callable[[int, Iterable[Range]], tuple[Move, ...]]
    entry: int
    low_block: Range
    k2_memory: RangeSet


class _Room:
    """Hands out pages of the reserved region, lowest first."""

    def __init__(self, free: RangeSet, machine: Machine) -> None:
        self._free = free
        self._machine = machine

    def take(self, what: str, size: int, alignment: int = PAGE, *, real_mode: bool = True) -> Range:
        """The lowest free stretch of `size` bytes (rounded up to pages), within reach of `real_mode` if so wanted."""
        size = align_up(size, PAGE)
        candidates = self._free & RangeSet([self._machine.real_mode]) if real_mode else self._free
        found = candidates.find(size, alignment)
        if found is None:
            needs = f"K2 does not fit: the {what} needs {format_size(size)} in one piece"
            has = (
                f"the reserved region {self._machine.reserved} has {format_size(max((r.size for r in candidates), default=0))}"
            )
            if self._free.find(size, alignment) is None:
                raise PlanError(f"{needs}, {has} left", hint="reserve more memory: raise crashkernel= and reboot")
            limit = self._machine.real_mode.end
            raise PlanError(
                f"{needs} within the RMA, all that a CPU reaches with translation off: {has} left below {limit:#x}",
                hint=f"move the region down: boot with crashkernel=SIZE@OFFSET, with more of it below {format_size(limit)}",
            )
        self._free -= RangeSet([found])
        return found


def _zero(machine: Machine, image: KernelImage, region: Range, firmware: RangeSet, block: int) -> _Table:
    """K2 exchanged down to address zero.

    K2 owns [0, low): its image and what its early allocator needs behind it. Where the region begins below `low`, the
    part from there on is K2's already: only [0, region) is exchanged, and an image that reaches into the region is loaded
    there directly.
    """
    low = Range(0, align_up(image.span + EARLY_ALLOCATIONS, block))
    moving = Range(0, min(low.end, region.start))
    for named in machine.firmware:
        if named.range.overlaps(low):
            raise PlanError(
                f"{named.name} at {named.range} lies in the memory that K2 would take ({low})",
                hint="use --placement reserved on this machine",
            )
    room = _Room((RangeSet([region]) & machine.memory) - RangeSet([low]) - firmware, machine)
    # Not K2's to map, but the whole blocks around it are: what it leaves of its last block is nobody's.
    parked = room.take("image of the capture kernel", moving.size, block)
    segments = [Segment("kernel", parked)]
    if image.span > moving.end:
        segments.append(Segment("kernel", Range(moving.end, align_up(image.span, PAGE)), origin=moving.end))
    # Where the region begins below `low`, the two are one range, with the early allocator's room inside.
    memory = (RangeSet([low, region]) & machine.memory) - RangeSet([parked])
    return _Table(
        segments=tuple(segments),
        moves=partial(tables.zero, moving.size, parked.start),
        entry=0,
        low_block=low,
        k2_memory=_whole_blocks(memory, block),
    )


def _reserved(machine: Machine, image: KernelImage, region: Range, firmware: RangeSet, block: int) -> _Table:
    """K2 running where it was loaded.

    It still needs memory at 0 for its exception vectors, so K1's bytes there are backed up first; and K1's other CPUs find
    K2's slave entry at absolute 0x60 only if its head is copied there (K2 itself copies from 0x100 on).
    """
    low = Range(0, block)
    # on hash K2 is not given, and so cannot run in, the ragged ends of the region
    room = _Room(_whole_blocks(RangeSet([region]) & machine.memory, block) - firmware, machine)
    # The backup first: it is not K2's, and the rest of the region stays one range with free memory around the image.
    backup = room.take("backup of K1's low memory", low.size, low.size)
    # With a page behind it that stays free, should the image be all there is in its range.
    running = room.take("image of the capture kernel", align_up(image.span, PAGE) + PAGE, LINEAR_MAP_BLOCK["hash"])
    running = Range(running.start, running.end - PAGE)
    return _Table(
        segments=(Segment("kernel", running),),
        moves=partial(tables.reserved, low.size, backup.start, running.start),
        entry=running.start,
        low_block=low,
        k2_memory=_whole_blocks((RangeSet([low, region]) & machine.memory) - RangeSet([backup]), block),
    )


def _reachable(services: Services, purgatory: Range) -> Services:
    """RTAS runs in 32-bit mode, its arguments included: from higher up it cannot be called."""
    return services if max(*services.rtas, purgatory.end - 1) < 1 << 32 else replace(services, rtas_reboot=0, rtas_nmi=0)


def _whole_blocks(memory: RangeSet, block: int) -> RangeSet:
    if block != LINEAR_MAP_BLOCK["hash"]:
        return memory
    return RangeSet(inner for r in memory if (inner := r.align_inward(block)) is not None)


def _spare(k2_mapped: RangeSet, free: RangeSet) -> RangeSet:
    """The last free page of each range that K2 maps, for K2's own page tables: nothing is to be loaded there."""
    lasts = (list(RangeSet([mapped]) & free)[-1:] for mapped in k2_mapped)
    return RangeSet(Range(last.end - PAGE, last.end) for pieces in lasts for last in pieces)


def _mappable(machine: Machine, block: int) -> RangeSet:
    # The firmware's memory must be mapped in K2 (opal_msglog_init reads OPAL's log through the linear map), in whole blocks.
    return RangeSet(region.range.align_outward(block) for region in machine.firmware) & machine.memory
