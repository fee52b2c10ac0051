"""The hazards of a plan: each problem of the 2005 mail, and those that time has added, as a named check.

A check is a question about the table of moves and the machine it was made for. It does not guess: what it would have to know
and could not read is "unknown". docs/answers.md has the mail's questions, and the drill in which each danger bites.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from crashkernel.machine import LARGEST_PAGE
from crashkernel.memory import Range, RangeSet, align_up, format_size
from crashkernel.placement.image import RUN_AT_LOAD_OFFSET, RUN_AT_ZERO, RUN_IN_PLACE
from crashkernel.placement.plan import Hazard
from crashkernel.placement.reservation import LOW_PER_CPU, LOW_STACKS, LOWEST, low_memory
from crashkernel.placement.sizing import PROCESS_TABLE, limited_cpus, possible_cpus, recommended

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from crashkernel.machine import Machine, Mmu, PageUse
    from crashkernel.placement.image import KernelImage
    from crashkernel.placement.plan import HazardVerdict, LoadPlan
    from crashkernel.placement.sizing import Estimate

_MIB = 1 << 20

EARLY_ALLOCATIONS = 2 * _MIB
"""Free memory K2 needs right behind its image at zero, in bytes: radix takes the page tables of a range from inside it."""

VECTORS = Range(0, LARGEST_PAGE)
"""What K2 copies to 0 when it runs elsewhere lies in here (copy_to_here, arch/powerpc/kernel/head_64.S)."""

_LOW = Range(0, 2 * _MIB)
"""Every kernel has text here, and nothing else: the smallest has more than that."""

_NOT_K2S = 2 * LARGEST_PAGE + 16 * _MIB
"""What of a region is not K2's memory, in bytes at the most: the backup of K1's low block, and the purgatory."""

_HELD: dict[PageUse, str] = {
    "free": "free, to be handed out next",
    "cache": "page cache",
    "anonymous": "processes'",
    "slab": "kernel objects",
    "pagetable": "page tables",
    "kernel": "the kernel's or a driver's",
}


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is asked about, and what several checks ask of it."""

    plan: LoadPlan
    machine: Machine
    estimate: Estimate
    image: KernelImage
    mmu: Mmu  # K2's

    @property
    def at_zero(self) -> bool:
        return self.plan.entry == 0

    @property
    def k2_image(self) -> Range:
        return Range.sized(self.plan.entry, self.plan.kernel_span)

    @property
    def k1_end(self) -> int:
        """Where K1's image ends, 0 when nobody could tell."""
        return self.machine.kernel_end or max((region.range.end for region in self.plan.k1_layout), default=0)

    @property
    def free(self) -> RangeSet:
        """K2's memory that nothing was loaded into."""
        loaded = RangeSet(segment.range for segment in self.plan.segments if segment.content != "kernel")
        return self.plan.k2_memory - loaded - RangeSet([self.k2_image])

    @property
    def exposed_above_text(self) -> RangeSet:
        """What K2 takes over beyond what is K1's text whoever built it."""
        return self.plan.exposed - RangeSet([_LOW])

    def k1(self, name: str) -> RangeSet:
        return RangeSet(region.range for region in self.plan.k1_layout if region.name == name)


@dataclass(frozen=True, slots=True)
class _Finding:
    verdict: HazardVerdict
    reason: str
    ranges: tuple[Range, ...] = ()
    advice: str = ""


def _found(verdict: HazardVerdict, reason: str, ranges: Iterable[Range] = (), advice: str = "") -> _Finding:
    return _Finding(verdict, reason, tuple(ranges), advice)


def assess(plan: LoadPlan, machine: Machine, estimate: Estimate, image: KernelImage, mmu: Mmu) -> tuple[Hazard, ...]:
    """Every check's answer for `plan` on `machine`.

    `estimate` is what K2 needs of memory, `image` is K2's, `mmu` is what K2 will choose.
    """
    subject = _Subject(plan, machine, estimate, image, mmu)
    hazards = []
    for name, (title, source, check) in _CHECKS.items():
        found = check(subject)
        hazards.append(Hazard(name, title, found.verdict, found.reason, found.ranges, found.advice, source))
    return tuple(hazards)


def slaves_of(machine: Machine) -> int:
    """How many CPUs K1 sends to the purgatory besides the one that crashed.

    On bare metal none: pnv_kexec_cpu_down (arch/powerpc/platforms/powernv/setup.c) hands them back to OPAL.
    """
    return 0 if machine.platform == "powernv" else max(0, sum(cpu.online for cpu in machine.cpus) - 1)


def quarantinable(plan: LoadPlan, page_size: int) -> RangeSet:
    """K1's memory that K2 takes over and that K1 hands out to whoever asks: whole pages of `page_size` bytes.

    That is K1's freed init section and what lies behind its image; nothing when where K1's image lies is not known.
    """
    if not plan.k1_layout:
        return RangeSet()
    static = RangeSet(region.range for region in plan.k1_layout if region.name != "K1 freed init")
    return _whole_pages(plan.exposed - static, page_size)


def _whole_pages(ranges: RangeSet, page_size: int) -> RangeSet:
    return RangeSet(inner for each in ranges if (inner := each.align_inward(page_size)) is not None)


def _span(subject: _Subject) -> _Finding:
    span, end, region = subject.plan.kernel_span, subject.k1_end, subject.plan.reserved
    if not end:
        return _found("unknown", "Where K1's image ends could not be read.", advice="Plan on the host.")
    if region.start < end:
        return _found(
            "impossible",
            f"The region begins inside K1's image, which ends at {end:#x}: K1 would neither reserve it nor load into it.",
            [Range(region.start, min(end, region.end))],
            "Describe the machine anew, or choose a region behind K1.",
        )
    if not subject.at_zero:
        return _found("safe", "K2 runs in its own region: it never lies over K1.")
    sizes = f"K2 spans {span:#x} bytes, K1 {end:#x}"
    if span <= end:
        return _found("safe", f"{sizes}: K2's image lies over nothing but K1's.")
    return _found(
        "guarded",
        f"{sizes}. What K1 has in between changes places with K2 like the rest, and no byte is lost. Whether a device may "
        "still write there is the next checks' question.",
        [Range(end, span)],
    )


def _freed_init(subject: _Subject) -> _Finding:
    init = subject.k1("K1 freed init")
    if not init and not (taken := subject.exposed_above_text):
        return _found("safe", "K2 takes over K1's low pages only, which are its text.")
    if not init:
        return _found(
            "unknown",
            f"K2 takes over {taken}, and where K1's init section lies could not be read.",
            advice="Have K1's own vmlinux in /boot, and plan as root.",
        )
    return _handed_out(subject, init)


def _slack(subject: _Subject) -> _Finding:
    if not subject.k1_end:
        if not subject.exposed_above_text:
            return _found("safe", "K2 takes over K1's low pages only, which are its text.")
        return _found("unknown", "Where K1's image ends could not be read.", advice="Plan on the host.")
    behind = subject.plan.memory - RangeSet([Range(0, subject.k1_end)])
    return _handed_out(subject, behind)


def _handed_out(subject: _Subject, where: RangeSet) -> _Finding:
    """Pages that K1 hands out to whoever asks and that K2 takes over: dangerous unless every one is out of K1's hands."""
    page_size = subject.machine.base_page
    pages = _whole_pages(subject.plan.exposed & where, page_size)
    if not pages:
        return _found("safe", "K2 takes over none of them.")
    held: Counter[PageUse] = Counter()
    known = RangeSet()
    for piece in subject.machine.pages:
        if part := pages & RangeSet([piece.range]):
            held[piece.use] += part.total // page_size
            known |= part
    count, out = pages.total // page_size, held.pop("poisoned", 0)
    if out == count:
        return _found("guarded", f"All {count} pages are out of K1's hands: no device can be given one.", pages)
    holders = [f"{number} {_HELD[use]}" for use, number in held.most_common()]
    if unread := (pages - known).total // page_size:
        holders.append(f"{unread} whose holder could not be read")
    still = f"{count - out} of {count} pages are" if out else f"All {count} pages are"
    return _found(
        "dangerous",
        f"{still} in K1's hands: {', '.join(holders)}. A device that writes to one of them after the crash writes into K2.",
        pages,
        "Choose placement reserved. Or load early in the boot, before drivers do: with placement zero, `crashkernel load` "
        "takes out of K1's hands what it can get.",
    )


def _static_data(subject: _Subject) -> _Finding:
    rule = (
        "The kernel's DMA API forbids buffers in the kernel's image, and CONFIG_DMA_API_DEBUG reports them: only a driver that "
        "breaks this rule would write into K2."
    )
    if not subject.plan.k1_layout:
        if not (taken := subject.exposed_above_text):
            return _found("safe", "K2 takes over K1's low pages only, which are its text.")
        return _found("guarded", f"Where K1's data lies could not be read: K2 may take over some of it. {rule}", taken)
    hit = subject.plan.exposed & subject.k1("K1 data")
    if not hit:
        return _found("safe", "K1's data stays where it is: a device that writes there changes K1's bytes, and nothing of K2.")
    return _found("guarded", f"K2 takes over K1's data. {rule}", hit)


def _early_allocator(subject: _Subject) -> _Finding:
    plan, free = subject.plan, subject.free
    own = RangeSet(r for r in plan.k2_memory if r.overlaps(subject.k2_image))
    beside = (own & free).total
    if subject.at_zero and beside < EARLY_ALLOCATIONS:
        return _found(
            "impossible",
            f"{format_size(beside)} are free beside K2's image. K2 takes a block's page tables from inside the block and dies "
            f"before its first line of output: it needs {format_size(EARLY_ALLOCATIONS)}.",
            own,
            "Plan anew: crashkernel leaves this room by itself.",
        )
    full = [r for r in plan.k2_mapped if RangeSet([r]) & plan.k2_memory and not RangeSet([r]) & free]
    if full:
        return _found(
            "dangerous",
            "What was loaded fills these ranges to the last page: K2 finds no room in them for the page tables that map them.",
            full,
            "Reserve more memory.",
        )
    # the table comes after what maps its range, which is taken from the range's end
    left = RangeSet(Range(r.start, r.end - EARLY_ALLOCATIONS) for r in free if r.size > EARLY_ALLOCATIONS)
    if subject.mmu == "radix" and left.find(PROCESS_TABLE, PROCESS_TABLE) is None:
        return _found(
            "dangerous",
            f"Radix wants {format_size(PROCESS_TABLE)} in one piece, aligned to as much, for its process table. No such piece "
            "is free: K2 would panic before its console works.",
            free,
            "Reserve more memory, 128M at the least.",
        )
    return _found(
        "safe",
        f"{format_size(free.total)} are free when K2 starts, {format_size(beside)} of it in the range of its image.",
        own,
    )


def _rma(subject: _Subject) -> _Finding:
    plan = subject.plan
    if plan.unchecked:
        return _found(
            "dangerous",
            f"{plan.unchecked} of the initramfs lies above the RMA, where no check at the panic reaches.",
            plan.unchecked,
            f"Move the region down: boot with crashkernel=SIZE@OFFSET, all of it below {plan.real_mode.end:#x}.",
        )
    if (cramped := _cramped(subject)) is not None:
        return cramped
    if beyond := RangeSet([plan.reserved]) - RangeSet([plan.real_mode]):
        return _found(
            "guarded",
            f"Real mode ends at {plan.real_mode.end:#x}. All that the handover touches lies below; what is above is K2's free "
            "memory, for when its MMU is on.",
            beyond,
        )
    return _found("safe", f"Real mode reaches {plan.real_mode}, and so the whole region.")


def _cramped(subject: _Subject) -> _Finding | None:
    """What K2 keeps for each CPU that may come, on hash in a partition: all of it within its own RMA.

    Which is the first piece of memory that its tree gives it (early_init_dt_add_memory_arch, arch/powerpc/kernel/prom.c).
    """
    plan, machine = subject.plan, subject.machine
    if subject.mmu != "hash" or machine.platform != "pseries" or not plan.k2_mapped:
        return None
    rma = RangeSet([plan.k2_mapped.ranges[0]]) & RangeSet([plan.real_mode])
    free = subject.free & rma
    possible = possible_cpus(machine)
    limited = limited_cpus(possible, plan.cmdline, "nr_cpus")
    each = LOW_PER_CPU + LOW_STACKS
    if free.total >= LOWEST + possible * each:
        return None
    said = (
        f"On hash K2 keeps {format_size(each)} for each possible CPU below the end of its RMA, which is the first piece of its "
        f"memory: with {possible} CPUs {format_size(LOWEST + possible * each)}, and {format_size(free.total)} are free there."
    )
    most = max(0, free.total - LOWEST) // each
    if limited < possible and free.total >= LOWEST + limited * each:
        return _found("guarded", f"{said} nr_cpus= keeps K2 to {limited}, as long as none above CPU {most - 1} panics.", rma)
    advice = f"Give K2 nr_cpus={max(1, most)} with --append, which holds for a panic on one of these CPUs"
    return _found(
        "dangerous",
        f"{said} K2 would panic before its console works.",
        rma,
        f"{advice}; or boot K2 with radix, where the CPU has it." if most else "Choose the other placement, or radix.",
    )


def _firmware(subject: _Subject) -> _Finding:
    plan = subject.plan
    own = RangeSet(region.range for region in plan.firmware)
    if clash := own & (plan.exposed | plan.k2_memory):
        return _found(
            "impossible",
            "Firmware lives where K2 or a move would write, and both kernels need it.",
            clash,
            "Choose another region, or placement reserved.",
        )
    if inside := own & RangeSet([plan.reserved]):
        names = ", ".join(sorted({region.name for region in plan.firmware if region.range.overlaps(plan.reserved)}))
        return _found(
            "guarded",
            f"{names}, in the region: nothing is loaded there, no move touches it, K2 is told to leave it alone.",
            inside,
        )
    return _found("safe", "None of it lies in the region or in what moves." if own else "The firmware has no memory of K1's.")


def _initrd(subject: _Subject) -> _Finding:
    where = RangeSet([subject.machine.initrd] if subject.machine.initrd else [])
    if moved := subject.plan.exposed & where:
        return _found(
            "guarded",
            "K1's initrd lay in what moves. Whether K1 freed it or keeps it (retain_initrd), it is K1's memory, and the dump "
            "follows it.",
            moved,
        )
    return _found("safe", "K2 has a tree and an initrd of its own in the region; K1's are K1's memory like the rest.", where)


def _hash_table(subject: _Subject) -> _Finding:
    plan, machine = subject.plan, subject.machine
    if machine.mmu == "radix":
        return _found("safe", "K1 runs with radix: there is none.")
    if machine.platform == "pseries":
        return _found("safe", "The hypervisor keeps it, outside the partition's memory.")
    chosen = machine.device_tree.child("chosen")
    properties = chosen.properties if chosen is not None else {}
    base, size = (int.from_bytes(properties.get(f"linux,htab-{name}", b"")[:8], "big") for name in ("base", "size"))
    if not size or base + size > 1 << 64:
        return _found("unknown", "Where K1 has its hash table could not be read.", advice="Plan on the host.")
    table = RangeSet([Range.sized(base, size)])
    if inside := table & RangeSet([plan.reserved]):
        return _found(
            "impossible",
            "It lies in the region: the load would overwrite the table that K1 runs on, and nothing in K1 prevents it.",
            inside,
            "Choose another region.",
        )
    if moved := table & plan.exposed:
        return _found("guarded", "It is among what moves. Translation is off by then, and K2 makes its own.", moved)
    return _found("safe", "It stays where it is; K2 makes its own.", table)


def _behind_k1(subject: _Subject) -> _Finding:
    if not subject.k1_end:
        return _found("unknown", "Where K1's image ends could not be read.", advice="Plan on the host.")
    limits = low_memory(replace(subject.machine, kernel_end=subject.k1_end), subject.plan.reserved)
    short = [each for each in limits if not each.enough]
    said = "; ".join(
        f"{format_size(each.left)} of {format_size(each.before)} free memory below {each.limit:#x} stay K1's ({each.name})"
        for each in short or limits[:1]
    )
    if short:
        return _found(
            "dangerous",
            f"{said}: K1 may not boot again.",
            [subject.plan.reserved],
            "Boot with a smaller region, or a higher one: crashkernel=SIZE without @OFFSET.",
        )
    return _found("safe", f"{said}.")


def _relocatable(subject: _Subject) -> _Finding:
    if subject.plan.entry % LARGEST_PAGE:
        return _found(
            "impossible",
            f"K2 is to run at {subject.plan.entry:#x}, and it relocates itself by whole pages of {LARGEST_PAGE:#x} bytes only.",
            [subject.k2_image],
            "Plan anew.",
        )
    how = "runs where it was linked" if subject.at_zero else "relocates itself where it lies"
    return _found("safe", f"K2 is linked at zero and relocatable: it {how}.", [subject.k2_image])


def _run_at_load(subject: _Subject) -> _Finding:
    built = subject.image.run_at_load
    found = f"Built as {built:#x} (offset {RUN_AT_LOAD_OFFSET:#x})"
    if built not in (RUN_AT_ZERO, RUN_IN_PLACE):
        return _found(
            "impossible",
            f"{found}: that is no such flag, and K2 would run nowhere but at zero.",
            [subject.k2_image],
            "Give a kernel with CONFIG_RELOCATABLE=y.",
        )
    if subject.at_zero:
        return _found("safe", f"{found}, loaded as {RUN_AT_ZERO:#x}: K2 finds itself at zero and moves nothing.")
    return _found("safe", f"{found}, loaded as {RUN_IN_PLACE:#x}: K2 stays where it is.")


def _vectors(subject: _Subject) -> _Finding:
    if not subject.plan.exposed.covers(VECTORS):
        return _found(
            "impossible", "K2 writes its vectors over K1's low pages, and the plan keeps no copy.", [VECTORS], "Plan anew."
        )
    return _found(
        "guarded",
        "K1's low pages step aside before all else, and the dump has them. Until K2's vectors are in place, page 0 is the "
        "purgatory's, with a handler for each exception.",
        [VECTORS],
    )


def _core_header(subject: _Subject) -> _Finding:
    plan, machine = subject.plan, subject.machine
    silent = [cpu.number for cpu in machine.cpus if cpu.note is None]
    if machine.vmcoreinfo is None and len(silent) == len(machine.cpus):
        return _found(
            "unknown", "Where K1 keeps its notes could not be read.", advice="Plan on the host that is to be protected."
        )
    if machine.vmcoreinfo is None or silent:
        missing = "VMCOREINFO" if machine.vmcoreinfo is None else f"the registers of {len(silent)} CPUs"
        return _found(
            "dangerous",
            f"K1 does not say where it keeps {missing}: the dump would lack it.",
            advice="Run as root; if that is no help, K1 was built without CONFIG_CRASH_DUMP.",
        )
    exposed = plan.exposed
    moved = [note for note in plan.notes if exposed.overlaps(note)]
    if moved:
        return _found(
            "guarded",
            f"{len(moved)} of {len(plan.notes)} notes lie in what moves: the header says where the moves leave them.",
            moved,
        )
    return _found("safe", f"All {len(plan.notes)} notes stay where K1 writes them; the header lies in the region.")


def _room(subject: _Subject) -> _Finding:
    estimate, plan = subject.estimate, subject.plan
    guessed = "" if estimate.exact else " What the initramfs unpacks to is guessed: its format cannot be read here."
    largest = sorted(estimate.needs, key=lambda need: need.size, reverse=True)[:4]
    most = ", ".join(f"{need.name} {format_size(need.size)}" for need in largest)
    said = f"K2 needs about {format_size(estimate.peak)} of its {format_size(estimate.available)} ({most}, ...).{guessed}"
    wanted = align_up(estimate.peak * 5 // 4 + _NOT_K2S, 64 * _MIB)
    advised = recommended(plan.memory.total, len(subject.machine.cpus))
    usual = ", ".join(f"{each.vendor} {format_size(each.size)}" for each in advised if each.size)
    advice = f"Boot with crashkernel={wanted >> 20}M. Distributions reserve on such a machine: {usual or 'nothing'}."
    if estimate.verdict == "too small":
        return _found("dangerous", said, [plan.reserved], advice)
    if estimate.verdict == "tight":
        return _found(
            "guarded", f"{said} What is left may be less than the estimate is wrong by: drill it.", [plan.reserved], advice
        )
    return _found("safe", said, [plan.reserved])


def _purgatory(subject: _Subject) -> _Finding:
    where = subject.plan.segment("purgatory").range
    if subject.machine.services.rtas_reboot and not subject.plan.services.rtas_reboot:
        return _found(
            "dangerous",
            "RTAS cannot be called from above 4 GiB: on damage the purgatory would halt where it should reboot.",
            [where],
            "Move the region below 4 GiB.",
        )
    return _found(
        "safe", "In reach of real mode, under no move; it needs no stack, no page tables and nothing of K1's.", [where]
    )


def _hotplug(subject: _Subject) -> _Finding:
    plan, machine = subject.plan, subject.machine
    online = [cpu for cpu in machine.cpus if cpu.online]
    again = "Load anew: crashkernel load --refresh."
    if moved := (machine.memory - plan.memory) | (plan.memory - machine.memory):
        return _found("dangerous", f"Memory came or went since the plan was made: {moved}.", moved, again)
    if plan.slaves != slaves_of(machine):
        return _found(
            "dangerous",
            f"K1 sends {slaves_of(machine)} CPUs to the purgatory besides the one that panics, and the plan has {plan.slaves}.",
            advice=again,
        )
    # that of none of them anything is known is core-header's to say
    silent = [cpu.number for cpu in online if cpu.note is None]
    if silent and len(silent) < len(online):
        return _found(
            "dangerous",
            f"CPU {', '.join(map(str, silent[:8]))}{', ...' if len(silent) > 8 else ''} came online without a buffer for its "
            "registers: the dump would lack them.",
            advice=again,
        )
    return _found(
        "guarded",
        f"Planned for {len(online)} CPUs, {len(machine.cpus) - len(online)} more that may come, and "
        f"{format_size(plan.memory.total)} of memory. `crashkernel status` tells what came later, `crashkernel load --refresh` "
        "renews the load.",
    )


_CHECKS: dict[str, tuple[str, str, Callable[[_Subject], _Finding]]] = {
    "span": (
        "K2's image larger than K1's",
        "linux,kernel-end: export_crashk_values, arch/powerpc/kexec/core.c; a segment below K1's end is ETXTBSY: "
        "machine_kexec_prepare, arch/powerpc/kexec/core_64.c",
        _span,
    ),
    "freed-init": (
        "K1's freed init pages",
        "free_initmem, arch/powerpc/mm/mem.c; /proc/kpageflags; seen: crashkernel drill --fault dma:init",
        _freed_init,
    ),
    "slack": (
        "K1's memory behind its image",
        "/proc/kpageflags; seen: crashkernel drill --fault dma:slack",
        _slack,
    ),
    "static-data": (
        "DMA to K1's static data",
        "Documentation/core-api/dma-api-howto.rst, What memory is DMA'able?; seen: crashkernel drill --fault dma:data",
        _static_data,
    ),
    "early-allocator": (
        "room for K2's early allocator",
        "early_alloc_pgtable, radix_init_pgtable: arch/powerpc/mm/book3s64/radix_pgtable.c",
        _early_allocator,
    ),
    "rma": (
        "reach with translation off",
        "PAPR: the RMA is the first entry of the memory node at 0; on bare metal there is no limit; K2's own: allocate_paca, "
        "arch/powerpc/kernel/paca.c, and emergency_stack_init, arch/powerpc/kernel/setup_64.c",
        _rma,
    ),
    "firmware": (
        "RTAS, OPAL and TCE tables",
        "the device tree's linux,rtas-base, opal-base-address, linux,tce-base, /reserved-memory; a segment over TCE tables is "
        "ETXTBSY: machine_kexec_prepare, arch/powerpc/kexec/core_64.c",
        _firmware,
    ),
    "initrd": (
        "K1's initrd and flattened tree",
        "linux,initrd-start; free_initrd_mem, init/initramfs.c",
        _initrd,
    ),
    "hash-table": (
        "the hash page table",
        "linux,htab-base: export_htab_values, arch/powerpc/kexec/core_64.c",
        _hash_table,
    ),
    "behind-k1": (
        "low memory left to K1",
        "rtas_initialize, arch/powerpc/kernel/rtas.c; ppc64_rma_size; seen of Debian 6.1 and 7.2 with 0 and 2 MiB left",
        _behind_k1,
    ),
    "relocatable": (
        "K2 built for another address",
        "CRASH_DUMP selects RELOCATABLE: arch/powerpc/Kconfig; arch/powerpc/kernel/reloc_64.S",
        _relocatable,
    ),
    "run-at-load": (
        "__run_at_load",
        "offset 0x5c, arch/powerpc/kernel/head_64.S",
        _run_at_load,
    ),
    "vectors": (
        "exception vectors",
        "copy_to_here, arch/powerpc/kernel/head_64.S; docs/purgatory.md",
        _vectors,
    ),
    "core-header": (
        "elfcorehdr, notes and VMCOREINFO",
        "/sys/kernel/vmcoreinfo, crash_notes; parse_crash_elf64_headers, fs/proc/vmcore.c",
        _core_header,
    ),
    "room": (
        "a reservation large enough",
        "placement/sizing.py, held against drills with falling reservations",
        _room,
    ),
    "purgatory": (
        "placement of the purgatory",
        "docs/purgatory.md",
        _purgatory,
    ),
    "hotplug": (
        "CPUs and memory that come later",
        "topology_init, arch/powerpc/kernel/sysfs.c: a note buffer for each CPU that may come; PAPR dynamic memory",
        _hotplug,
    ),
}
