"""Plans: what holds for every machine, what is refused, and what a plan from outside is held against."""

import functools
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from crashkernel.errors import CrashkernelError, FormatError, PlanError
from crashkernel.formats.fdt import DeviceTree, Node
from crashkernel.machine import HEAD_SIZE, Machine, Region, Services
from crashkernel.machine.devicetree import DYNAMIC_MEMORY_NODE, dynamic_memory, memory_ranges
from crashkernel.memory import Range, RangeSet, align_up
from crashkernel.placement import EARLY_ALLOCATIONS, LINEAR_MAP_BLOCK, PAGE, _reachable, plan_load
from crashkernel.placement.image import KernelImage
from crashkernel.placement.moves import K1, LINE, MAX_MOVES, Check, Copy, Exchange, Put
from crashkernel.placement.plan import DAMAGE_POLICIES, PLACEMENTS, LoadPlan, describe_move
from crashkernel.placement.tables import LOW_PAGE, PURGATORY_SPAN, SAVE_OFFSET
from crashkernel.placement.tree import capture_tree
from crashkernel.purgatory import pack
from support.machines import (
    GIB,
    HEAD,
    LAYOUT,
    MIB,
    RTAS_TOKENS,
    VTY,
    Block,
    drmem_node,
    initrd,
    kernel,
    machine,
    memory_node,
    small_machine,
    small_plan,
    tree,
)

every_placement = pytest.mark.parametrize("placement", PLACEMENTS)
pages = lambda low, high: st.integers(low // PAGE, high // PAGE).map(lambda n: n * PAGE)  # noqa: E731


def make_plan(found: Machine, image: KernelImage, placement: str, initrd_size: int = 5 * MIB) -> LoadPlan:
    return plan_load(found, image, initrd(initrd_size), "console=hvc0 irqpoll", placement)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """Partitions and bare metal of 512 MiB to some GiB, with a region, firmware, and sometimes dynamic memory."""
    radix = draw(st.booleans())
    platform = draw(st.sampled_from(("pseries", "powernv")))
    low_size = draw(st.sampled_from((512 * MIB, GIB, 2 * GIB)))
    nodes = [memory_node(0, *draw(st.sampled_from(((low_size,), (low_size // 2, low_size // 2)))))]
    if draw(st.booleans()):
        nodes.append(memory_node(draw(st.sampled_from((4, 8))) * GIB, GIB))
    extra = []
    if draw(st.booleans()):
        blocks = [Block(16 * GIB, draw(st.integers(1, 3))), Block(17 * GIB, 1, draw(st.sampled_from((8, 0x88, 0))))]
        extra.append(drmem_node(256 * MIB, blocks, draw(st.sampled_from((1, 2)))))
    start = draw(pages(16 * MIB, 400 * MIB) | st.sampled_from((41 * MIB, 0x2FE0000, 0x81E0000)))
    region = Range(start, min(low_size, start + draw(pages(32 * MIB, 512 * MIB))))
    at = draw(pages(0, low_size - MIB)) + draw(st.sampled_from((0, 0x800)))  # firmware need not keep to pages
    where = Range.sized(at, 0x30000)
    root = tree(
        memory=nodes,
        region=region,
        platform=platform,
        radix=radix,
        cpus=draw(st.sampled_from((1, 2, 8))),
        rtas=where if platform == "pseries" and draw(st.booleans()) else None,
        opal=where if platform == "powernv" else None,
        extra=extra,
    )
    return machine(root, notes_at=12 * MIB)


images = st.builds(kernel, st.integers(1 * MIB, 90 * MIB), st.just(MIB))


def check_invariants(plan: LoadPlan, found: Machine, image: KernelImage) -> None:
    """What must hold whoever made the plan, from first principles rather than through `check_plan`."""
    firmware = RangeSet(region.range for region in found.firmware)
    placed = RangeSet(segment.range for segment in plan.segments)
    assert placed.total == sum(segment.range.size for segment in plan.segments), "segments overlap"
    assert all(found.reserved.contains(r) for r in placed)
    for segment in plan.segments:
        if segment.content != "initrd":
            assert found.real_mode.contains(segment.range), f"{segment.content}: used with translation off"
    assert not placed & firmware
    assert all(value % PAGE == 0 for segment in plan.segments for value in (segment.range.start, segment.range.end))

    k1 = found.memory - RangeSet([found.reserved])
    assert plan.k1_memory == k1
    assert RangeSet(kept.range for kept in plan.kept) == k1
    assert sum(kept.range.size for kept in plan.kept) == k1.total, "a byte is kept twice"
    places = RangeSet(Range.sized(kept.location, kept.range.size) for kept in plan.kept)
    assert places.total == k1.total, "two bytes are kept in one place"
    assert not places & plan.k2_memory, "K2 may overwrite K1"
    assert not places - found.memory
    assert all(before.range.end <= after.range.start for before, after in pairwise(plan.kept))

    assert not plan.k2_memory - found.memory
    assert not plan.k2_memory & firmware
    assert plan.k2_memory & RangeSet([Range(0, PAGE)]), "K2 has no memory for its exception vectors"
    assert not plan.k2_memory - plan.k2_mapped
    assert plan.k2_memory.covers(Range.sized(plan.entry, image.span)), "K2 runs outside of its memory"
    for segment in plan.segments:
        if segment.content != "kernel":
            assert plan.k2_memory.covers(segment.range), "K2 cannot reach what it is handed"

    free = plan.k2_memory - placed
    for mapped in plan.k2_mapped:
        if plan.k2_memory.overlaps(mapped):
            assert (free & RangeSet([mapped])).find(PAGE, PAGE), f"no page left for the page tables of {mapped}"
    # only hash is cut to whole blocks: on radix a K2 without its ragged head stood still (LINEAR_MAP_BLOCK says what was seen)
    block = LINEAR_MAP_BLOCK["hash"]
    for mapped in plan.k2_mapped if found.mmu == "hash" or "disable_radix" in plan.cmdline else ():
        for value in (mapped.start, mapped.end):
            assert value % block == 0 or value == max(r.end for r in found.memory), f"a ragged end at {value:#x}"

    needed = Range(0, image.span + EARLY_ALLOCATIONS if plan.placement == "zero" else PAGE)
    assert plan.k2_memory.covers(needed)
    assert not any(s.range.overlaps(needed) for s in plan.segments if s.content != "kernel"), "K2's early allocator needs it"

    quiet = RangeSet(s.range for s in plan.segments if s.content != "kernel")
    quiet -= RangeSet([Range.sized(plan.segment("purgatory").range.start + SAVE_OFFSET, LOW_PAGE)])
    written = RangeSet(r for move in plan.moves for r in writes(move))
    assert not (written | RangeSet(reads(move) for move in plan.moves)) & firmware
    assert not written & quiet, "a move destroys what was loaded"
    assert len(plan.moves) <= MAX_MOVES
    assert pack_any(plan)

    # what is taken from row 3 on finds the purgatory's vectors
    purgatory = plan.segment("purgatory").range
    assert purgatory.size >= PURGATORY_SPAN
    assert plan.moves[1] == Copy(0, purgatory.start, LOW_PAGE)

    check_reach(plan, found)
    check_checks(plan, found, image)


def check_reach(plan: LoadPlan, found: Machine) -> None:
    """The purgatory, with translation off, reads and writes only what it reaches."""
    assert plan.real_mode == found.real_mode
    for move in plan.moves:
        assert all(plan.real_mode.contains(part) for part in (*move.read, *move.written)), f"out of reach: {move}"
        assert plan.real_mode.contains(reads(move))
        assert all(plan.real_mode.contains(part) for part in writes(move))


def check_checks(plan: LoadPlan, found: Machine, image: KernelImage) -> None:
    """Every byte that was loaded for K2 is checked where K2 finds it, and stays as it was checked.

    All but what of the initrd the purgatory does not reach, and the zeros behind K2's image.
    """
    checked = checked_at_last(plan)
    image_end = plan.entry + align_up(image.span, LINE)
    assert checked.covers(Range(plan.entry, image_end)), "K2 is not checked"
    handed = RangeSet(s.range for s in plan.segments if s.content in ("initrd", "fdt", "elfcorehdr"))
    assert not checked - handed - RangeSet([Range(0, LOW_PAGE), Range(plan.entry, image_end)]), "a check of K2's free memory"
    initrd = RangeSet(s.range for s in plan.segments if s.content == "initrd")
    assert plan.unchecked == initrd - RangeSet([found.real_mode]) == initrd - checked
    assert checked.covers(Range(0, HEAD_SIZE)), "K2's slave entry is not checked"
    assert not checked - plan.k2_memory, "a check of what is not K2's"


def check_every_row(plan: LoadPlan) -> None:
    """Wherever a handover ends, all of K1 is in memory: its head in the purgatory's image until it is put."""
    (put,) = (number for number, move in enumerate(plan.moves) if isinstance(move, Put))
    for done, (name, layout) in enumerate(plan.stages()[1:]):
        somewhere = RangeSet(extent.source for extent in layout.locations())
        assert somewhere == plan.k1_memory - RangeSet([Range(0, HEAD_SIZE)] if done <= put else []), f"K1 is lost: {name}"


def checked_at_last(plan: LoadPlan) -> RangeSet:
    """What is checked and not written any more, which must hold all that K2 is handed."""
    checked = RangeSet([])
    for move in plan.moves:
        checked = checked | RangeSet([move.range]) if isinstance(move, Check) else checked - RangeSet(writes(move))
    for segment in plan.segments:
        if segment.content in ("initrd", "fdt", "elfcorehdr"):
            needed = RangeSet([segment.range])
            if segment.content == "initrd":  # the one that may lie out of reach
                needed &= RangeSet([plan.real_mode])
            assert not needed - checked, f"the {segment.content} is not checked"
    assert checked.covers(Range.sized(plan.entry, plan.kernel_span)), "K2 is not checked"
    return checked


def writes(move: Copy | Exchange | Put | Check) -> list[Range]:
    if isinstance(move, Check):
        return []
    found = [Range.sized(move.dst, move.size)]
    return [*found, Range.sized(move.src, move.size)] if isinstance(move, Exchange) else found


def reads(move: Copy | Exchange | Put | Check) -> Range:
    """What a move reads, its destination where it reads none."""
    if isinstance(move, Check):
        return move.range
    return Range.sized(move.dst if isinstance(move, Put) else move.src, move.size)


def pack_any(plan: LoadPlan) -> bytes:
    """The purgatory for a plan, whatever its checks are to find."""
    expected = [("?", bytes(64)) for move in plan.moves if isinstance(move, Check)]
    return pack(
        plan.segment("purgatory").range.start, plan.moves, HEAD, fdt=plan.segment("fdt").range.start, entry=plan.entry,
        expected=expected, services=plan.services, altivec=plan.altivec, slaves=plan.slaves, slave_timeout=plan.slave_timeout,
        on_damage=plan.on_damage,
    )  # fmt: skip


def simulate(plan: LoadPlan) -> np.ndarray:
    """For each line of memory the line of K1 it holds at capture time, or a negative number: the moves made for real."""
    memory = np.full(max(r.end for r in plan.memory) // LINE, -1, np.int32)
    for r in plan.memory:
        memory[r.start // LINE : r.end // LINE] = np.arange(r.start // LINE, r.end // LINE)
    memory[plan.reserved.start // LINE : plan.reserved.end // LINE] = -1
    for segment in plan.segments:
        if segment.content == "kernel":
            at = segment.range.start // LINE
            count = segment.range.size // LINE
            memory[at : at + count] = -2 - np.arange(segment.origin // LINE, segment.origin // LINE + count)
    memory[: HEAD_SIZE // LINE] = -1  # kexec_sequence: the purgatory's head
    for move in plan.moves:
        if isinstance(move, Check):
            continue
        dst = slice(move.dst // LINE, (move.dst + move.size) // LINE)
        if isinstance(move, Put):
            memory[dst] = np.arange(move.origin // LINE, (move.origin + move.size) // LINE)
            continue
        src = slice(move.src // LINE, (move.src + move.size) // LINE)
        arriving = memory[src].copy()
        if isinstance(move, Exchange):
            memory[src] = memory[dst]
        memory[dst] = arriving
    return memory


class TestEveryMachine:
    @settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
    @given(machines(), images, st.sampled_from(PLACEMENTS), st.sampled_from((0, 70_000, 20 * MIB)))
    def test_a_plan_keeps_its_promises_or_there_is_none(self, found, image, placement, initrd_size):
        try:
            plan = make_plan(found, image, placement, initrd_size)
        except PlanError as error:
            event(f"{placement}: refused for {error.message.split()[0]}")
            return
        event(f"{placement}: planned")
        check_invariants(plan, found, image)
        assert LoadPlan.from_json(plan.to_json()) == plan
        assert make_plan(found, image, placement, initrd_size) == plan

    @settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
    @given(
        st.booleans(),
        st.sampled_from(PLACEMENTS),
        pages(17 * MIB, 80 * MIB),
        pages(24 * MIB, 128 * MIB),
        st.integers(MIB, 40 * MIB),
        pages(0, 250 * MIB),
    )
    def test_the_bytes_lie_where_the_plan_says(self, radix, placement, start, size, span, rtas):
        found = small_machine(radix=radix, region=Range.sized(start, size), rtas=Range.sized(rtas, 0x10000))
        try:
            plan = make_plan(found, kernel(span, MIB), placement, 70_000)
        except PlanError:
            assume(False)
        memory = simulate(plan)
        for kept in plan.kept:
            here = memory[kept.location // LINE : (kept.location + kept.range.size) // LINE]
            assert (here == np.arange(kept.range.start // LINE, kept.range.end // LINE)).all(), f"{kept}"
        entry = plan.entry // LINE
        count = align_up(span, PAGE) // LINE
        assert (memory[entry : entry + count] == -2 - np.arange(count)).all(), "K2 does not lie whole at its entry"
        head = np.arange(HEAD_SIZE // LINE)
        assert (memory[head] == -2 - head).all(), "K2's slave entry is not at 0x60"


class TestPlacements:
    @every_placement
    @pytest.mark.parametrize("radix", [True, False])
    def test_a_common_machine(self, placement, radix):
        found = small_machine(radix=radix)
        plan = small_plan(placement, radix=radix)
        check_invariants(plan, found, kernel())
        check_every_row(plan)
        assert plan.placement == placement
        assert plan.slaves == 1
        assert plan.slave_timeout == 10 * 512_000_000
        assert plan.services == found.services
        assert (plan.services.console, plan.services.rtas_reboot) == (VTY, RTAS_TOKENS["system-reboot"])
        assert plan.altivec is True
        assert plan.on_damage == "reboot"
        assert plan.kernel == "6.1.0-test"
        header = plan.segment("elfcorehdr").range.start
        assert plan.cmdline == f"console=hvc0 elfcorehdr={header // 1024}K"
        assert header % 1024 == 0
        assert [note.size for note in plan.notes] == [0x1000, 0x400, 0x400]

    def test_zero_is_an_exchange(self):
        plan = small_plan("zero")
        low = align_up(3 * MIB + EARLY_ALLOCATIONS, LINEAR_MAP_BLOCK["radix"])
        parked = plan.segment("kernel").range
        purgatory = plan.segment("purgatory").range.start
        checked = [plan.segment(content).range for content in ("elfcorehdr", "fdt", "initrd")]
        assert plan.moves == (
            Copy(purgatory + SAVE_OFFSET, 0, LOW_PAGE),
            Copy(0, purgatory, LOW_PAGE),
            Exchange(purgatory + SAVE_OFFSET, parked.start, LOW_PAGE),
            Put(parked.start, 0, HEAD_SIZE),
            Exchange(LOW_PAGE, parked.start + LOW_PAGE, low - LOW_PAGE),
            *(Check(r.start, r.size) for r in checked),
            Check(LOW_PAGE, 3 * MIB - LOW_PAGE),
            Copy(0, purgatory + SAVE_OFFSET, LOW_PAGE),
            Check(0, LOW_PAGE),
        )
        assert plan.entry == 0
        assert plan.kept[0].range == Range(0, low)
        assert plan.kept[0].location == parked.start
        assert plan.locate(Range(0x1000, 0x2000)) == parked.start + 0x1000

    def test_reserved_is_a_backup(self):
        plan = small_plan("reserved")
        running = plan.segment("kernel").range
        backup = plan.kept[0].location
        low = LINEAR_MAP_BLOCK["radix"]
        checked = [plan.segment(content).range for content in ("elfcorehdr", "fdt", "initrd", "kernel")]
        assert plan.moves == (
            Copy(backup, 0, LOW_PAGE),
            Copy(0, plan.segment("purgatory").range.start, LOW_PAGE),
            Put(backup, 0, HEAD_SIZE),
            Copy(backup + LOW_PAGE, LOW_PAGE, low - LOW_PAGE),
            *(Check(r.start, r.size) for r in checked),
            Copy(0, running.start, HEAD_SIZE),
            Check(0, HEAD_SIZE),
        )
        assert plan.entry == running.start
        assert plan.kept[0].range == Range(0, low)

    def test_bare_metal_gives_its_cpus_to_opal(self):
        opal = Range.sized(160 * MIB, 2 * MIB)
        plan = small_plan("reserved", platform="powernv", opal=opal, rtas=None, cpus=4)
        assert plan.slaves == 0
        assert plan.services == Services("opal", 0, opal=(opal.start, opal.start + 0x4E0))
        assert plan.k2_mapped.covers(opal), "K2 reads OPAL's log"
        assert not plan.k2_memory.overlaps(opal)

    @every_placement
    @pytest.mark.parametrize("policy", DAMAGE_POLICIES)
    def test_what_to_do_about_damage_is_the_caller_s(self, placement, policy):
        plan = plan_load(small_machine(), kernel(), initrd(0), "", placement, policy)
        assert plan.on_damage == policy
        assert replace(plan, on_damage="reboot") == plan_load(small_machine(), kernel(), initrd(0), "", placement)

    @pytest.mark.parametrize("vectors", [{}, {"ibm,vmx": 1}])
    def test_altivec_is_the_machine_s(self, vectors):
        found = replace(small_machine(), altivec=bool(vectors))
        assert make_plan(found, kernel(), "zero").altivec is bool(vectors)

    @pytest.mark.parametrize(("start", "reachable"), [(3 * GIB, True), (4 * GIB - 16 * MIB, False), (4 * GIB, False)])
    def test_rtas_is_not_called_from_where_it_cannot_answer(self, start, reachable):
        """It runs in 32-bit mode: its arguments, which lie in the purgatory, must be below 4 GiB."""
        # the image takes what is left below 4 GiB, so that the purgatory comes to lie above
        found = small_machine(
            memory=[memory_node(0, 8 * GIB)], region=Range.sized(start, 256 * MIB), rtas=Range(GIB, GIB + PAGE)
        )
        plan = make_plan(found, kernel(14 * MIB, MIB), "zero")
        assert (plan.segment("purgatory").range.end <= 4 * GIB) is reachable
        services = plan.services if reachable else replace(plan.services, **tokens(found.services))
        assert services == found.services
        assert (plan.services.rtas_reboot, plan.services.rtas_nmi) == (tuple(RTAS_TOKENS.values()) if reachable else (0, 0))
        assert plan.services.console == VTY, "a hypercall's arguments are in registers"

    def test_rtas_that_lies_above_4_gib_itself(self):
        found = Services("papr", 1, rtas=(0x1000, 0x1040), rtas_reboot=2, rtas_nmi=3)
        for rtas in ((5 * GIB, 5 * GIB + 0x40), (0x1000, 4 * GIB + 0x40), (4 * GIB + 0x40, 0x1000)):
            high = replace(found, rtas=rtas)
            assert _reachable(high, Range(0, PAGE)) == replace(high, rtas_reboot=0, rtas_nmi=0)
            made = make_plan(replace(small_machine(), services=high), kernel(), "zero")
            assert made.services == replace(high, rtas_reboot=0, rtas_nmi=0)

    def test_a_plan_that_calls_rtas_from_above_4_gib(self):
        found = small_machine(
            memory=[memory_node(0, 8 * GIB)], region=Range.sized(4 * GIB, 256 * MIB), rtas=Range(GIB, GIB + PAGE)
        )
        plan = make_plan(found, kernel(), "zero")
        for name, token in tokens(found.services).items():
            text = replace(plan, services=replace(plan.services, **{name: token})).to_json()
            assert "RTAS runs in 32-bit mode" in refuse(text)

    def test_a_purgatory_that_ends_at_4_gib(self):
        found = Services("papr", 1, rtas=(0x1000, 0x1040), rtas_reboot=2, rtas_nmi=3)
        for end, kept in ((4 * GIB, True), (4 * GIB + PAGE, False), (5 * GIB, False)):
            now = _reachable(found, Range(end - PAGE, end))
            assert now == (found if kept else replace(found, rtas_reboot=0, rtas_nmi=0))

    def test_the_layout_is_known_only_of_the_kernel_that_runs(self):
        assert small_plan().k1_layout == LAYOUT
        assert make_plan(replace(small_machine(), release="6.1.0-other"), kernel(), "zero").k1_layout == ()

    def test_only_the_cpus_that_run_come_to_the_purgatory(self):
        found = small_machine(cpus=4)
        found = replace(found, cpus=tuple(replace(cpu, online=cpu.number != 2) for cpu in found.cpus))
        assert make_plan(found, kernel(), "zero").slaves == 2

    def test_a_plan_without_initrd_has_no_segment_for_it(self):
        assert [s.content for s in small_plan(initrd_size=0).segments] == ["kernel", "purgatory", "elfcorehdr", "fdt"]

    def test_a_machine_whose_cpus_nobody_counted(self):
        assert make_plan(replace(small_machine(), cpus=()), kernel(), "zero").slaves == 0

    def test_the_longest_command_line(self):
        """COMMAND_LINE_SIZE, arch/powerpc/include/uapi/asm/setup.h: 2047 bytes and a NUL."""
        found = small_machine()
        added = len(plan_load(found, kernel(), initrd(0), "", "zero").cmdline) + 1
        longest = "x" * (2047 - added)
        assert len(plan_load(found, kernel(), initrd(0), longest, "zero").cmdline) == 2047
        for line in (longest + "x", "\u00e9" * (len(longest) // 2 + 1)):
            with pytest.raises(PlanError, match=r"2\d{3} bytes, K2 reads 2048.*--append.*--reuse-cmdline"):
                plan_load(found, kernel(), initrd(0), line, "zero")

    @every_placement
    @pytest.mark.parametrize("word", ["disable_radix", "disable_radix=1"])
    def test_a_k2_that_is_told_to_use_hash(self, placement, word):
        found = small_machine(region=Range(65 * MIB, 192 * MIB))
        plan = plan_load(found, kernel(), initrd(70_000), f"console=hvc0 {word}", placement)
        check_invariants(plan, found, kernel())
        assert all(value % (16 * MIB) == 0 for r in plan.k2_mapped for value in (r.start, r.end))
        other = plan_load(found, kernel(), initrd(70_000), "root=/dev/disable_radix", placement)
        assert any(r.start % (16 * MIB) or r.end % (16 * MIB) for r in other.k2_mapped)

    @every_placement
    @pytest.mark.parametrize("radix", [True, False])
    @pytest.mark.parametrize("start", [41 * MIB, 0x2FE0000, 0x81E0000])
    @pytest.mark.parametrize("span", [3 * MIB, 38 * MIB, 40 * MIB, 45 * MIB])
    def test_a_region_at_an_odd_address(self, placement, radix, start, span):
        """What K2 is given has a free page in each range, and on hash no ragged end."""
        found = small_machine(memory=[memory_node(0, 512 * MIB)], radix=radix, region=Range(start, 384 * MIB + 3 * PAGE))
        plan = make_plan(found, kernel(span, MIB), placement)
        check_invariants(plan, found, kernel(span, MIB))
        check_every_row(plan)

    @every_placement
    def test_what_is_loaded_never_fills_a_range(self, placement):
        """Firmware pushes the big pieces up and leaves a range of 2 MiB, which this initrd would fill to its last page."""
        rtas = Range.sized(65 * MIB, MIB)
        for size in range(0, MIB + 1, PAGE):
            found = small_machine(region=Range(64 * MIB, 192 * MIB), rtas=rtas)
            check_invariants(make_plan(found, kernel(), placement, size), found, kernel())

    def test_an_image_that_would_fill_its_range(self):
        """Hash: the backup takes [64, 80) MiB, so that the image would have [80, 112) MiB to itself, to the last byte."""
        settings = {"memory": [memory_node(0, 256 * MIB)], "radix": False, "rtas": Range.sized(50 * MIB, PAGE)}
        image = kernel(32 * MIB, MIB)
        with pytest.raises(PlanError, match="the image of the capture kernel needs"):
            make_plan(small_machine(**settings, region=Range(48 * MIB, 112 * MIB)), image, "reserved", 0)
        found = small_machine(**settings, region=Range(48 * MIB, 128 * MIB))
        check_invariants(make_plan(found, image, "reserved", 0), found, image)

    @every_placement
    def test_only_the_initrd_goes_beyond_the_rma(self, placement):
        found = small_machine(memory=[memory_node(0, 96 * MIB, 160 * MIB)], region=Range(64 * MIB, 192 * MIB))
        assert found.real_mode == Range(0, 96 * MIB)
        plan = make_plan(found, kernel(), placement, 60 * MIB)
        check_invariants(plan, found, kernel())
        initrd = plan.segment("initrd").range
        assert initrd.start < 96 * MIB < initrd.end
        assert Check(initrd.start, 96 * MIB - initrd.start) in plan.moves, "as far as the purgatory reaches"
        assert plan.unchecked == RangeSet([Range(96 * MIB, initrd.end)])
        small = make_plan(found, kernel(), placement, MIB)
        starts = [small.segment(content).range.start for content in ("purgatory", "elfcorehdr", "fdt", "initrd")]
        assert starts == sorted(starts), "lowest first, as on a machine that has no limit"
        assert small.segment("initrd").range.end < 96 * MIB
        assert small.unchecked == RangeSet([])

    @every_placement
    def test_an_initrd_wholly_beyond_the_rma_is_checked_by_nobody(self, placement):
        found = small_machine(
            memory=[memory_node(0, 96 * MIB, 160 * MIB)], region=Range(64 * MIB, 192 * MIB), rtas=Range(90 * MIB, 96 * MIB)
        )
        plan = make_plan(found, kernel(), placement, 60 * MIB)
        check_invariants(plan, found, kernel())
        initrd = plan.segment("initrd").range
        assert initrd.start >= 96 * MIB
        assert plan.unchecked == RangeSet([initrd])
        assert not any(move.range.overlaps(initrd) for move in plan.moves if isinstance(move, Check))
        assert LoadPlan.from_json(plan.to_json()).unchecked == plan.unchecked

    @every_placement
    @pytest.mark.parametrize("radix", [True, False])
    @pytest.mark.parametrize("span", [3 * MIB, 3 * MIB + 1, 3 * MIB + LINE, 0x8000])
    def test_the_kernel_s_check_ends_with_its_image(self, placement, radix, span):
        """On hash its segment has 16 MiB, nearly all of them zeros for K2's allocator: no reason to stay dead for."""
        found = small_machine(radix=radix)
        plan = make_plan(found, kernel(span), placement)
        check_invariants(plan, found, kernel(span))
        image = Range.sized(plan.entry, align_up(span, LINE))
        pieces = [move.range for move in plan.moves if isinstance(move, Check) and move.range.overlaps(image)]
        assert RangeSet(pieces) == RangeSet([image])
        assert sum(piece.size for piece in pieces) == image.size, "and nothing twice"
        if placement == "zero":
            assert plan.segment("kernel").range.size >= (2 if radix else 16) * MIB

    def test_the_command_line_may_be_empty(self):
        plan = plan_load(small_machine(), kernel(), initrd(0), "", "zero")
        assert plan.cmdline.startswith("elfcorehdr=")

    @pytest.mark.parametrize("radix", [True, False])
    @pytest.mark.parametrize("start", [32 * MIB, 33 * MIB, 45 * MIB])
    def test_a_region_below_the_end_of_k2(self, radix, start):
        """`klimit`: the region begins right behind K1's image, and K2 is bigger than what lies below."""
        span = 52 * MIB
        found = small_machine(radix=radix, region=Range(start, 200 * MIB))
        plan = make_plan(found, kernel(span, MIB), "zero")
        head, tail = (s for s in plan.segments if s.content == "kernel")
        assert exchange(plan) == Exchange(LOW_PAGE, head.range.start + LOW_PAGE, start - LOW_PAGE)
        assert head.range.size == start
        assert tail.range == Range(start, align_up(span, PAGE))
        assert tail.origin == start
        check_invariants(plan, found, kernel(span, MIB))

    def test_exactly_as_big_as_the_gap_needs_no_tail(self):
        found = small_machine(region=Range(32 * MIB, 200 * MIB))
        plan = make_plan(found, kernel(32 * MIB, MIB), "zero")
        assert len([s for s in plan.segments if s.content == "kernel"]) == 1
        assert exchange(plan).size == 32 * MIB - LOW_PAGE

    def test_hash_gets_whole_16_mib_blocks(self):
        found = small_machine(radix=False, region=Range(64 * MIB + 3 * PAGE, 192 * MIB + 5 * PAGE), rtas=None)
        for placement in PLACEMENTS:
            for r in make_plan(found, kernel(), placement).k2_memory:
                assert r.start % (16 * MIB) == r.end % (16 * MIB) == 0

    def test_k2_does_not_run_in_the_ragged_end_of_a_region(self):
        """Hash maps whole 16 MiB blocks: the last 8.5 MiB of this region are nobody's, and K2 must not reach into them."""
        found = small_machine(radix=False, region=Range(64 * MIB, 152 * MIB + 8 * PAGE), rtas=Range.sized(96 * MIB, PAGE))
        try:
            plan = make_plan(found, kernel(40 * MIB, MIB), "reserved", 0)
        except PlanError as error:
            assert "does not fit" in error.message  # noqa: PT017 - to refuse is as good
            return
        check_invariants(plan, found, kernel(40 * MIB, MIB))

    def test_stages_are_the_mail_s_pictures(self):
        plan = small_plan("zero")
        names = [name for name, _ in plan.stages()]
        layouts = [layout for _, layout in plan.stages()]
        assert len(names) == 2 + len(plan.moves)
        assert "move 5 of 11: exchange" in names[6]
        assert "move 11 of 11: check 0x0-0x1000" in names[-1]
        assert [layout.extents[0].content for layout in layouts] == [K1, *["purgatory"] * 10, *["kernel"] * 2]
        assert layouts[-1].extents[0].location.end == plan.kept[1].location
        # what is kept is what the last picture shows
        shown = [e for e in layouts[-1].locations() if e.location.start == plan.kept[0].location]
        assert shown[0].source.start == 0

    @pytest.mark.parametrize(
        ("move", "line"),
        [
            (Put(0, 0, 0x100), "put K1's first bytes at 0x0-0x100"),
            (Put(0x4000, 0x80, 0x80), "put K1's first bytes at 0x4000-0x4080"),
            (Check(0x1000, 0x40), "check 0x1000-0x1040"),
            (Copy(0x1000, 0x2000, 0x80), "copy 0x2000-0x2080 to 0x1000-0x1080"),
            (Exchange(0, 0x2000, 0x80), "exchange 0x0-0x80 with 0x2000-0x2080"),
        ],
    )
    def test_moves_in_words(self, move, line):
        assert describe_move(move) == line

    def test_bytes_that_are_split_or_no_memory_are_not_located(self):
        plan = small_plan("zero")
        for wanted in (Range(5 * MIB, 7 * MIB), Range(65 * MIB, 66 * MIB), Range(GIB, GIB + 1)):
            with pytest.raises(PlanError, match="do not stay in one piece"):
                plan.locate(wanted)


class TestRefused:
    @every_placement
    def test_no_region(self, placement):
        with pytest.raises(PlanError, match=r"no memory is reserved.*crashkernel=512M"):
            small_plan(placement, region=None)

    @every_placement
    def test_a_region_too_small_says_for_what_and_what_is_left(self, placement):
        with pytest.raises(
            PlanError, match=r"does not fit.* needs .*MiB.*region 0x4000000-0x4400000 has .* left.*raise crashkernel="
        ) as e:
            small_plan(placement, region=Range(64 * MIB, 68 * MIB), rtas=None, initrd_size=MIB)
        assert e.value.exit_code == 3

    @every_placement
    def test_an_initrd_too_big(self, placement):
        with pytest.raises(PlanError, match=r"the initrd needs 500 MiB"):
            small_plan(placement, initrd_size=500 * MIB)

    def test_firmware_where_k2_would_run(self):
        with pytest.raises(PlanError, match=r"RTAS at 0x200000-0x210000.*--placement reserved"):
            small_plan("zero", rtas=Range.sized(2 * MIB, 0x10000))

    @every_placement
    def test_firmware_at_zero(self, placement):
        with pytest.raises(PlanError, match="RTAS"):
            small_plan(placement, rtas=Range.sized(0x10000, 0x10000))

    def test_a_region_out_of_real_mode_s_reach(self):
        nodes = [memory_node(0, 64 * MIB, 192 * MIB)]
        for placement in PLACEMENTS:
            with pytest.raises(PlanError, match=r"does not fit: .* within the RMA.* left below 0x4000000") as caught:
                small_plan(placement, memory=nodes, region=Range(64 * MIB, 192 * MIB))
            assert "raise crashkernel=" not in caught.value.hint, "more memory of that kind would not help"
            assert "crashkernel=SIZE@OFFSET, with more of it below 64 MiB" in caught.value.hint


class TestTree:
    """K2's tree, read as K2's kernel reads it."""

    def usable(self, root: Node) -> RangeSet:
        """early_init_dt_scan_memory (drivers/of/fdt.c) and early_init_drmem_lmb (arch/powerpc/kernel/prom.c)."""
        found = []
        for node in root.children:
            if node.properties.get("device_type") != b"memory\0":
                continue
            cells = node.properties.get("linux,usable-memory", node.properties["reg"])
            for at in range(0, len(cells) // 16 * 16, 16):
                base, size = (int.from_bytes(cells[at + i : at + i + 8], "big") for i in (0, 8))
                if size:
                    found.append(Range.sized(base, size))
        return RangeSet(found + self.drmem(root))

    def drmem(self, root: Node) -> list[Range]:
        node = root.child(DYNAMIC_MEMORY_NODE)
        if node is None:
            return []
        usm = node.properties["linux,drconf-usable-memory"]
        cursor = 0

        def cell() -> int:
            nonlocal cursor
            assert cursor + 8 <= len(usm), "the kernel reads beyond the property"
            cursor += 8
            return int.from_bytes(usm[cursor - 8 : cursor], "big")

        found = []
        for flags in self.flags(node):
            if flags & 0x80 or not flags & 0x8:
                continue  # consumes nothing
            for _ in range(cell()):
                base, size = cell(), cell()
                found.append(Range.sized(base, size))
        assert cursor == len(usm), "the property holds more than the kernel reads"
        return found

    def flags(self, node: Node) -> list[int]:
        """The flags of each block, in the order of __walk_drmem_v1_lmbs or __walk_drmem_v2_lmbs (arch/powerpc/mm/drmem.c)."""
        v1, v2 = (node.properties.get(name) for name in ("ibm,dynamic-memory", "ibm,dynamic-memory-v2"))
        data = v1 or v2
        words = [int.from_bytes(data[at : at + 4], "big") for at in range(0, len(data), 4)]
        if v1:
            return [words[1 + 6 * i + 5] for i in range(words[0])]
        return [words[1 + 6 * i + 5] for i in range(words[0]) for _ in range(words[1 + 6 * i])]

    @settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
    @given(machines(), st.integers(MIB, 40 * MIB), st.sampled_from(PLACEMENTS))
    def test_k2_sees_its_memory_and_allocates_over_nothing(self, found, span, placement):
        try:
            plan = make_plan(found, kernel(span, MIB), placement)
        except PlanError:
            assume(False)
        made = capture_tree(found, plan, 5 * MIB)
        assert self.usable(made.root) == plan.k2_mapped
        reserved = RangeSet(Range.sized(base, size) for base, size in made.reserved)
        for segment in plan.segments:
            if segment.content != "kernel":
                assert reserved.covers(segment.range), segment.content
        assert not (plan.k2_mapped - plan.k2_memory) - reserved
        free = self.usable(made.root) - reserved
        assert not free & RangeSet(Range.sized(kept.location, kept.range.size) for kept in plan.kept)
        assert not free & RangeSet(region.range for region in found.firmware)
        assert len(made.to_bytes()) <= plan.segment("fdt").range.size

    def test_usable_memory_of_each_node(self):
        nodes = [memory_node(0, 128 * MIB), memory_node(128 * MIB, 128 * MIB), memory_node(4 * GIB, GIB)]
        found = small_machine(memory=nodes)
        plan = make_plan(found, kernel(), "reserved")
        made = capture_tree(found, plan, 0)
        for node in nodes:
            pairs = made.root.child(node.name).cells("linux,usable-memory")
            numbers = [(pairs[i] << 32 | pairs[i + 1], pairs[i + 2] << 32 | pairs[i + 3]) for i in range(0, len(pairs), 4)]
            expected = RangeSet(memory_ranges(node, found.device_tree)) & plan.k2_mapped
            assert numbers == ([(r.start, r.size) for r in expected] or [(0, 0)])
        assert made.root.child("memory@100000000").properties["linux,usable-memory"] == bytes(16)

    @pytest.mark.parametrize("version", [1, 2])
    def test_a_region_across_dynamic_blocks(self, version):
        blocks = [Block(128 * MIB, 1, 0x8), Block(144 * MIB, 1, 0x88), Block(160 * MIB, 4, 0x8), Block(512 * MIB, 2, 0)]
        found = small_machine(
            memory=[memory_node(0, 144 * MIB)],
            region=Range(64 * MIB, 208 * MIB),
            rtas=Range.sized(180 * MIB, 0x10000),
            extra=[drmem_node(16 * MIB, blocks, version)],
        )
        found = replace(found, real_mode=Range(0, 256 * MIB))
        plan = replace(small_plan(), k2_mapped=RangeSet([Range(0, 4 * MIB), Range(165 * MIB, 190 * MIB)]))
        made = capture_tree(found, plan, 0)
        assert self.drmem(made.root) == [
            Range(165 * MIB, 176 * MIB),
            Range(176 * MIB, 190 * MIB),
        ]
        assert sum(run.count for run in dynamic_memory(found.device_tree).runs) == 8

    def test_chosen(self):
        chosen = {"bootargs": b"old\0", "linux,initrd-start": bytes(8), "linux,initrd-end": bytes(8), "linux,elfcorehdr": b"1"}
        chosen |= {"linux,memory-limit": bytes(8), "linux,kernel-end": bytes(8), "linux,usable-memory-range": bytes(16)}
        chosen |= {"linux,tce-alloc-start": bytes(8), "linux,tce-alloc-end": bytes(8), "rng-seed": b"12"}
        found = small_machine()
        root = found.device_tree
        before = root.child("chosen")
        after = replace(before, properties=dict(before.properties) | chosen)
        root = root.with_children([after if node is before else node for node in root.children])
        found = replace(found, device_tree=root)
        plan = make_plan(found, kernel(), "zero", 123_457)
        node = capture_tree(found, plan, 123_457).root.child("chosen")
        start = plan.segment("initrd").range.start
        assert node.string("bootargs") == plan.cmdline
        assert node.u64("linux,initrd-start") == start
        assert node.u64("linux,initrd-end") == start + 123_457
        assert set(node.properties) == {"bootargs", "linux,initrd-start", "linux,initrd-end", "rng-seed", "stdout-path"}

    def test_without_initrd_nothing_is_said_of_one(self):
        found = small_machine(initrd=Range(0x3000000, 0x3100000))
        made = capture_tree(found, make_plan(found, kernel(), "zero", 0), 0)
        assert not {"linux,initrd-start", "linux,initrd-end"} & set(made.root.child("chosen").properties)

    def test_everything_else_is_k1_s_tree(self):
        found = small_machine()
        made = capture_tree(found, make_plan(found, kernel(), "zero"), 0)
        for before, after in zip(found.device_tree.children, made.root.children, strict=True):
            if before.name not in ("chosen", "memory@0"):
                assert after == before
        assert made.boot_cpuid == 0

    def test_a_partition_of_many_terabytes(self):
        """16 TiB in blocks of 256 MiB: `linux,drconf-usable-memory` alone is half a MiB."""
        lmb = 256 * MIB
        blocks = [Block(256 * MIB, 16 * 1024 * GIB // lmb)]
        found = small_machine(extra=[drmem_node(lmb, blocks, 2)])
        plan = make_plan(found, kernel(), "reserved")
        blob = capture_tree(found, plan, 5 * MIB).to_bytes()
        assert len(blob) <= plan.segment("fdt").range.size
        assert DeviceTree.from_bytes(blob).root.child(DYNAMIC_MEMORY_NODE) is not None


def damaged(change) -> str:
    """The JSON of a good plan after `change` was made to it."""
    raw = json.loads(small_text())
    change(raw)
    return json.dumps(raw)


def refuse(text: str) -> str:
    """The one line with which a plan is refused; anything but a FormatError is the test's failure."""
    with pytest.raises(FormatError) as caught:
        LoadPlan.from_json(text, source="plan.json")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("plan.json: ")
    return line


def segment(raw: dict, content: str) -> dict:
    return next(each for each in raw["segments"] if each["content"] == content)


def over(raw: dict, kind: str, content: str) -> dict[str, str]:
    """A move of a line of K1's over what was loaded."""
    where = segment(raw, content)["range"].split("-")[0]
    return {"move": kind, "dst": where, "src": "0x1000000", "origin": "0x0", "size": "0x80"}


THERE_AND_BACK = {"move": "exchange", "dst": "0x1000000", "src": "0x1000", "size": "0x80"}
"""Made twice, it leaves everything where it was, and what it took along unchecked."""


def check(at: str, size: str) -> dict[str, str]:
    return {"move": "check", "at": at, "size": size}


def at_saved(distance: int, size: int) -> dict[str, str]:
    """A copy of K1's memory to the page that the purgatory leaves alone, or so many bytes off."""
    return {"move": "copy", "dst": hex(0x4600000 + SAVE_OFFSET + distance), "src": "0x1000000", "size": hex(size)}


def exchange_with(raw: dict, content: str) -> None:
    """The plan's exchange, of `content` and not of the kernel; its table is otherwise a good one."""
    move = over(raw, "exchange", content)
    raw["moves"].append(move | {"dst": move["src"], "src": move["dst"]})


class TestJson:
    @every_placement
    @pytest.mark.parametrize("radix", [True, False])
    def test_there_and_back(self, placement, radix):
        plan = small_plan(placement, radix=radix)
        assert LoadPlan.from_json(plan.to_json()) == plan
        assert LoadPlan.from_json(plan.to_json()).to_json() == plan.to_json()

    @pytest.mark.parametrize("name", sorted(json.loads(small_plan().to_json())))
    def test_a_field_is_missing(self, name):
        assert name in refuse(damaged(lambda raw: raw.pop(name)))

    @pytest.mark.parametrize("name", sorted(set(json.loads(small_plan().to_json())) - {"format"}))
    @pytest.mark.parametrize("value", [None, 1.5, {}, [[]], [{}], "\ud800", {"a": 1}, -1, [None]], ids=repr)
    def test_a_field_of_the_wrong_kind(self, name, value):
        if isinstance(value, str) and name in ("kernel", "machine", "cmdline"):
            return
        refuse(damaged(lambda raw: raw.update({name: value})))

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "null",
            "[]",
            "{}",
            '"plan"',
            "1",
            "{",
            "[" * 100_000,
            '{"format":' * 100_000,
            "9" * 5000,
            "NaN",
            '{"format": 3}',
            '{"format": 1}',
        ],
        ids=lambda text: text[:12] or "empty",
    )
    def test_not_a_plan(self, text):
        refuse(text)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda raw: segment(raw, "fdt").update(range=segment(raw, "purgatory")["range"]), "segments overlap: "),
            (lambda raw: segment(raw, "fdt").update(range="0x1000000-0x1010000"), "outside the reserved region"),
            (lambda raw: segment(raw, "fdt").update(range="0xa000000-0xa020000"), "lies over 'RTAS'"),
            (lambda raw: segment(raw, "fdt").update(range="0x10-0x8"), "is not a range"),
            (lambda raw: segment(raw, "fdt").update(range="0x10-0x10"), "is not a range"),
            (lambda raw: segment(raw, "fdt").update(range="-0x10-0x10"), "not what it must be"),
            (lambda raw: segment(raw, "fdt").update(content="vdso"), "'vdso' is none of"),
            (lambda raw: raw["segments"].remove(segment(raw, "fdt")), "needs kernel, fdt"),
            (lambda raw: raw["segments"].remove(segment(raw, "purgatory")), "needs kernel, fdt"),
            (lambda raw: raw["segments"].remove(segment(raw, "kernel")), "needs kernel, fdt"),
            (lambda raw: raw.update(segments=[]), "needs kernel, fdt"),
            (lambda raw: raw["moves"][4].update(src="0xa000000", size="0x10000"), "touches 'RTAS'"),
            (lambda raw: raw["moves"][4].update(src="0x100000000", size="0x10000"), "which is no memory"),
            (lambda raw: raw["moves"].append(check("0xa000000", "0x80")), "touches 'RTAS'"),
            (lambda raw: raw["moves"].append(check("0x100000000", "0x80")), "which is no memory"),
            (lambda raw: exchange_with(raw, "purgatory"), "a move writes over the purgatory that makes it"),
            (lambda raw: raw["moves"].append(over(raw, "copy", "purgatory")), "over the purgatory that makes it: 0x4600000-"),
            (lambda raw: raw["moves"].append(over(raw, "put", "purgatory")), "over the purgatory that makes it: 0x4600000-"),
            (lambda raw: raw["moves"].append(at_saved(-0x80, 0x100)), "over the purgatory that makes it: 0x4606f80-0x4607080"),
            (lambda raw: raw["moves"].append(at_saved(0xF80, 0x100)), "over the purgatory that makes it: 0x4607f80-0x4608080"),
            (lambda raw: raw["moves"].append(at_saved(-0x7080, 0x10100)), "that makes it: 0x45fff80-0x4610080"),
            (lambda raw: exchange_with(raw, "elfcorehdr"), "a move writes over the elfcorehdr"),
            (lambda raw: exchange_with(raw, "fdt"), "a move writes over the fdt"),
            (lambda raw: exchange_with(raw, "initrd"), "a move writes over the initrd"),
            (lambda raw: raw["moves"].append(over(raw, "copy", "initrd")), "a move writes over the initrd"),
            (lambda raw: raw["moves"].append(over(raw, "put", "fdt")), "a move writes over the fdt"),
            (lambda raw: raw["moves"].extend([raw["moves"][0]] * 21), "32 moves, the purgatory's table holds 31"),
            (lambda raw: raw.update(entry="0x80"), "does not lie whole at its entry 0x80"),
            (lambda raw: raw.update(entry="0x1000000"), "does not lie whole at its entry"),
            (lambda raw: raw.update(kernel_span="0x4000000"), "does not lie whole at its entry"),
            (lambda raw: segment(raw, "kernel").update(origin="0x80"), "does not lie whole at its entry"),
            (lambda raw: raw["notes"].append("0x5000000-0x5000400"), "K1's bytes at 0x5000000-0x5000400"),
            (lambda raw: raw["notes"].append("0x5fff00-0x600100"), "do not stay in one piece"),
            (lambda raw: raw["moves"][4].update(src="0x1080"), "onto itself"),
            (lambda raw: raw["moves"][4].update(src="0x4001040"), "whole 128-byte lines"),
            (lambda raw: raw["moves"][4].update(dst="0x1040"), "whole 128-byte lines"),
            (lambda raw: raw["moves"][4].update(size="0x5fefc0"), "whole 128-byte lines"),
            (lambda raw: raw["moves"][8].update(at="0x1020"), "whole 128-byte lines"),
            (lambda raw: raw["moves"][8].update(size="0x20"), "whole 128-byte lines"),
            (lambda raw: raw["moves"][3].update(origin="0x40", size="0x80"), "whole 128-byte lines of K1's first bytes"),
            (lambda raw: raw["moves"][4].update(size="0x0"), "a move of nothing"),
            (lambda raw: raw["moves"][8].update(size="0x0"), "a move of nothing"),
            (lambda raw: raw["moves"][4].update(size=hex(1 << 64)), "no 64-bit address"),
            (lambda raw: raw["moves"][8].update(at=hex(1 << 64)), "no 64-bit address"),
            (lambda raw: raw["moves"][4].update(move="jump"), "'jump' is none of copy, exchange, put, check"),
            (lambda raw: raw["moves"][4].update(move=["copy"]), "is none of"),
            (lambda raw: raw["moves"][4].pop("src"), "'src' is missing"),
            (lambda raw: raw["moves"][3].pop("origin"), "'origin' is missing"),
            (lambda raw: raw["moves"][8].pop("at"), "'at' is missing"),
            (lambda raw: raw["moves"].reverse(), "lose K1's memory at 0x0-0x100"),
            (lambda raw: raw["moves"].pop(0), "lose K1's memory at 0x100-0x1000"),
            (lambda raw: raw["moves"].pop(2), "lose K1's memory at 0x100-0x1000"),
            (lambda raw: raw["moves"].pop(3), "lose K1's memory at 0x0-0x100"),
            (lambda raw: raw["moves"].insert(0, raw["moves"].pop(1)), "lose K1's memory at 0x100-0x1000"),
            (lambda raw: raw["moves"].insert(2, raw["moves"].pop(3)), "lose K1's memory at 0x0-0x100"),
            (lambda raw: raw["moves"][2].update(move="copy"), "lose K1's memory at 0x100-0x1000"),
            (lambda raw: raw["moves"][2].update(src="0x4001000"), "lose K1's memory at "),
            (lambda raw: raw["moves"][9].update(src="0x4000000"), "does not lie whole at its entry"),
            (lambda raw: raw["moves"].pop(4), "lose K1's memory at 0x1000-0x600000"),
            (lambda raw: raw["moves"][4].update(move="copy"), "lose K1's memory at 0x1000-0x600000"),
            (lambda raw: raw["moves"].pop(9), "does not lie whole at its entry"),
            (lambda raw: raw["moves"][3].update(origin="0x80"), "carries only K1's first 0x100 bytes: put"),
            (lambda raw: raw["moves"][3].update(size="0x180"), "carries only K1's first 0x100 bytes: put"),
            (lambda raw: raw["moves"][3].update(origin="0x100"), "carries only K1's first 0x100 bytes: put"),
            (lambda raw: raw["moves"][3].update(origin=hex((1 << 64) - 1)), "carries only K1's first 0x100 bytes: put"),
            (lambda raw: raw["moves"][3].update(size="0x80"), "lose K1's memory at 0x80-0x100"),
            (lambda raw: raw["moves"][3].update(origin="0x80", size="0x80"), "lose K1's memory at 0x0-0x80"),
            (lambda raw: raw["moves"].pop(5), "the elfcorehdr at 0x4610000-0x4620000 is not checked before K2 is entered"),
            (lambda raw: raw["moves"].pop(6), "the fdt at 0x4620000-0x4640000 is not checked"),
            (lambda raw: raw["moves"].pop(7), "the initrd at 0x4640000-0x4660000 is not checked"),
            (lambda raw: raw["moves"].pop(8), "the kernel at 0x0-0x300000 is not checked"),
            (lambda raw: raw["moves"].pop(10), "the kernel at 0x0-0x300000 is not checked"),
            (lambda raw: raw["moves"][7].update(size="0x1ff80"), "the initrd at 0x4640000-0x4660000 is not checked"),
            (lambda raw: raw["moves"][8].update(at="0x1080", size="0x2fef80"), "the kernel at 0x0-0x300000 is not checked"),
            (lambda raw: raw["moves"][8].update(size="0x2fef80"), "the kernel at 0x0-0x300000 is not checked"),
            (lambda raw: raw.update(kernel_span="0x300001"), "the kernel at 0x0-0x300080 is not checked"),
            (lambda raw: raw.update(real_mode="0x0-0x4650000"), "a move touches 0x4640000-0x4660000, which a CPU with transl"),
            (lambda raw: raw.update(real_mode="0x0-0x465ff80"), "does not reach: check 0x4640000-0x4660000"),
            (lambda raw: raw.update(real_mode="0x0-0x4610000"), "the elfcorehdr 0x4610000-0x4620000 lies where"),
            (lambda raw: raw.update(real_mode="0x0-0x4607f80"), "the purgatory 0x4600000-0x4610000 lies where"),
            (lambda raw: raw.update(real_mode="0x80-0x10000000"), "a move touches 0x0-0x1000, which a CPU with translation"),
            (lambda raw: raw.update(real_mode="0x0-0x4650000") or raw["moves"].pop(7), "the initrd at 0x4640000-0x4650000 is"),
            (lambda raw: raw.update(real_mode="0x0-0x4650000") or raw["moves"][7].update(size="0xff80"), "0x4640000-0x4650000"),
            (lambda raw: raw.update(memory=["0x0-0x20000000"], real_mode="0x0-0x10000000") or raw["moves"].append(
                {"move": "copy", "dst": "0x1000000", "src": "0x10000000", "size": "0x80"}), "does not reach: copy 0x10000000-"),
            (lambda raw: raw.update(memory=["0x0-0x20000000"], real_mode="0x0-0x10000000") or raw["moves"].append(
                {"move": "copy", "dst": "0x10000000", "src": "0x1000000", "size": "0x80"}), "does not reach: copy 0x1000000-"),
            (lambda raw: raw["moves"][8].update(at="0x4001000"), "nothing that was loaded lies whole at 0x4001000-0x4300000"),
            (lambda raw: raw["moves"].insert(4, raw["moves"].pop(8)), "nothing that was loaded lies whole at 0x1000-0x300000"),
            (lambda raw: raw["moves"].insert(4, raw["moves"].pop(10)), "nothing that was loaded lies whole at 0x0-0x1000"),
            (lambda raw: raw["moves"].insert(0, check("0x4000000", "0x600000")) or raw["moves"].pop(9), "is not checked"),
            (lambda raw: raw["moves"].extend([THERE_AND_BACK] * 2), "the kernel at 0x0-0x300000 is not checked"),
            (lambda raw: raw["moves"].append(raw["moves"][9]), "the kernel at 0x0-0x300000 is not checked"),
            (lambda raw: raw["moves"].append(check("0x1000000", "0x1000")), "nothing that was loaded lies whole at 0x1000000"),
            (lambda raw: raw["moves"].append(check("0x4000000", "0x1000")), "nothing that was loaded lies whole at 0x4000000"),
            (lambda raw: raw["moves"].append(check("0x8000000", "0x1000")), "nothing that was loaded lies whole at 0x8000000"),
            (lambda raw: raw["moves"].append(check("0x4600000", "0x1000")), "nothing that was loaded lies whole at 0x4600000"),
            (lambda raw: raw["moves"].append(check("0x4610000", "0x20000")), "nothing that was loaded lies whole at 0x4610000"),
            (lambda raw: raw["moves"].append(check("0x5fff80", "0x100")), "nothing that was loaded lies whole at 0x5fff80"),
            (lambda raw: raw["moves"].pop(1), "does not guard address 0"),
            (lambda raw: raw["moves"].insert(3, raw["moves"].pop(1)), "does not guard address 0"),
            (lambda raw: raw["moves"][1].update(size="0x800"), "does not guard address 0"),
            (lambda raw: raw["k2_memory"].append("0xe000000-0xe100000"), "lose K1's memory at 0xe000000-0xe100000"),
            (lambda raw: raw["kept"].pop(), "is not where the moves leave it"),
            (lambda raw: raw["kept"][0].update(location="0x5000000"), "is not where the moves leave it"),
            (lambda raw: raw["kept"][0].update(range="0x0-0x500000"), "is not where the moves leave it"),
            (lambda raw: raw.update(placement="elsewhere"), "'elsewhere' is none of zero, reserved"),
            (lambda raw: raw["services"].update(opal=["0x0"]), "no list of 2"),
            (lambda raw: raw["services"].update(rtas=["0x0", "0x0", "0x0"]), "no list of 2"),
            (lambda raw: raw["services"].update(rtas="0x0"), "no list of 2"),
            (lambda raw: raw["services"].update(rtas=["0x0", hex(1 << 64)]), "no 64-bit address"),
            (lambda raw: raw["services"].update(rtas=["0x0", None]), "None is no string"),
            (lambda raw: raw["services"].update(rtas=["0xa000000", "0x100000040"]), "RTAS runs in 32-bit mode"),
            (lambda raw: raw["services"].update(rtas=["0x100000040", "0xa000040"]), "RTAS runs in 32-bit mode"),
            (lambda raw: raw["services"].update(rtas=["0x0", "0x100000040"], rtas_reboot="0x0"), "RTAS runs in 32-bit mode"),
            (lambda raw: raw["services"].update(rtas=["0x0", "0x100000040"], rtas_nmi="0x0"), "RTAS runs in 32-bit mode"),
            (lambda raw: raw["services"].update(kind="xen"), "'xen' is none of none, papr, opal"),
            (lambda raw: raw["services"].update(kind=None), "None is none of none, papr, opal"),
            (lambda raw: raw["services"].update(kind=["papr"]), "is none of none, papr, opal"),
            (lambda raw: raw["services"].update(console=0), "0 is no string"),
            (lambda raw: raw["services"].update(console=""), "not what it must be"),
            (lambda raw: raw["services"].update(console="-0x1"), "no 64-bit address"),
            (lambda raw: raw["services"].update(rtas_reboot=hex(1 << 64)), "no 64-bit address"),
            (lambda raw: raw["services"].update(rtas_nmi=None), "None is no string"),
            (lambda raw: raw["services"].update(rtas_nmi=False), "False is no string"),
            (lambda raw: raw.update(on_damage="explode"), "'explode' is none of halt, reboot, continue"),
            (lambda raw: raw.update(on_damage=1), "1 is none of halt, reboot, continue"),
            (lambda raw: raw.update(slaves=-1), "no count"),
            (lambda raw: raw.update(slaves="1"), "no count"),
        ],
    )  # fmt: skip
    def test_a_plan_that_contradicts_itself(self, change, says):
        assert says in refuse(damaged(change))

    def test_a_put_of_bytes_that_the_purgatory_does_not_carry(self):
        """Only K1's head is saved at load time: a put of more would claim bytes that nobody has."""

        def claim(raw):
            raw["moves"][1] = {"move": "put", "dst": "0x4000000", "origin": "0x0", "size": "0x1000"}

        assert "carries only K1's first 0x100 bytes: put K1's first bytes at 0x4000000-0x4001000" in refuse(damaged(claim))

    def test_the_slave_entry_of_a_k2_in_its_region_is_checked_too(self):
        raw = json.loads(small_plan("reserved").to_json())
        assert raw["moves"].pop() == check("0x0", "0x100")
        assert "the kernel at 0x0-0x100 is not checked before K2 is entered" in refuse(json.dumps(raw))

    def test_a_check_more_is_no_contradiction(self):
        """Of a part, twice, and of what is to move on."""

        def add(raw):
            raw["moves"][:0] = [check("0x4000000", "0x600000"), check("0x4640000", "0x80")]
            raw["moves"] += [check("0x4640080", "0x80"), raw["moves"][7]]

        plan = LoadPlan.from_json(damaged(add))
        assert len(plan.moves) == 15
        assert checked_at_last(plan) == checked_at_last(small_plan("zero"))

    def test_a_check_of_the_zeros_behind_the_image_is_no_contradiction(self):
        plan = LoadPlan.from_json(damaged(lambda raw: raw["moves"][8].update(size="0x5ff000")))
        assert plan.moves[8] == Check(0x1000, 0x5FF000)

    @pytest.mark.parametrize(("end", "size"), [(0x4650000, 0x10000), (0x4640080, 0x80), (0x4640000, 0)])
    def test_what_real_mode_does_not_reach_of_the_initrd_need_not_be_checked(self, end, size):
        def cut(raw):
            raw.update(real_mode=f"0x0-{end:#x}")
            raw["moves"][7].update(size=hex(size))
            if not size:
                raw["moves"].pop(7)

        plan = LoadPlan.from_json(damaged(cut))
        assert plan.real_mode == Range(0, end)
        assert plan.unchecked == RangeSet([Range(end, 0x4660000)])
        assert plan.unchecked == RangeSet([plan.segment("initrd").range]) - checked_at_last(plan)

    def test_a_write_to_the_saved_page_is_no_contradiction(self):
        """The one page of the purgatory's segment that its code leaves alone."""
        plan = LoadPlan.from_json(damaged(lambda raw: raw["moves"].append(at_saved(0xF80, 0x80))))
        assert plan.moves[-1] == Copy(0x4607F80, 0x1000000, 0x80)

    @every_placement
    @pytest.mark.parametrize("size", [LINE, SAVE_OFFSET, SAVE_OFFSET + LOW_PAGE, PURGATORY_SPAN - LINE, PURGATORY_SPAN - 1])
    def test_a_purgatory_s_segment_without_room_for_page_and_log(self, placement, size):
        """What is behind it in its region would be written over by the purgatory itself."""
        raw = json.loads(small_plan(placement).to_json())
        start = int(segment(raw, "purgatory")["range"].split("-")[0], 16)
        short = Range.sized(start, size)
        segment(raw, "purgatory").update(range=str(short))
        assert f"the purgatory needs 0xa000 bytes, not {short}" in refuse(json.dumps(raw))

    @every_placement
    def test_a_purgatory_s_segment_with_just_enough_room(self, placement):
        raw = json.loads(small_plan(placement).to_json())
        start = int(segment(raw, "purgatory")["range"].split("-")[0], 16)
        segment(raw, "purgatory").update(range=str(Range.sized(start, PURGATORY_SPAN)))
        plan = LoadPlan.from_json(json.dumps(raw))
        assert plan.segment("purgatory").range == Range.sized(start, 0xA000)
        assert plan.moves == small_plan(placement).moves

    @pytest.mark.parametrize("format_", [None, 0, 2, 4, "3"])
    def test_a_plan_of_another_format(self, format_):
        line = refuse(damaged(lambda raw: raw.update(format=format_)))
        assert "not a load plan of format 3" in line
        assert "plan --plan-out" in line

    @pytest.mark.parametrize("name", sorted(json.loads(small_plan().to_json())["services"]))
    def test_a_service_is_missing(self, name):
        assert f"field '{name}' is missing" in refuse(damaged(lambda raw: raw["services"].pop(name)))

    @pytest.mark.parametrize(
        "services",
        [
            Services(),
            Services("papr"),
            Services("papr", 0),
            Services("papr", (1 << 64) - 1, (0, 0), (1, (1 << 32) - 1), 0xFFFFFFFF, 1),
            Services("papr", (1 << 64) - 1, (0, 0), (1, (1 << 64) - 1)),
            Services("opal", 0, (0x30000000, 0x30000810)),
        ],
    )
    @pytest.mark.parametrize("altivec", [True, False])
    @pytest.mark.parametrize("policy", DAMAGE_POLICIES)
    def test_services_altivec_and_policy_there_and_back(self, services, altivec, policy):
        plan = replace(small_plan("zero"), services=services, altivec=altivec, on_damage=policy)
        assert LoadPlan.from_json(plan.to_json()) == plan
        raw = json.loads(plan.to_json())
        assert (raw["format"], raw["altivec"], raw["on_damage"], raw["services"]["kind"]) == (3, altivec, policy, services.kind)

    def test_each_kind_of_row_there_and_back(self):
        raw = json.loads(small_text())["moves"]
        assert raw[1] == {"move": "copy", "dst": "0x0", "src": "0x4600000", "size": "0x1000"}
        assert raw[2] == {"move": "exchange", "dst": "0x4607000", "src": "0x4000000", "size": "0x1000"}
        assert raw[3] == {"move": "put", "dst": "0x4000000", "origin": "0x0", "size": "0x100"}
        assert raw[4] == {"move": "exchange", "dst": "0x1000", "src": "0x4001000", "size": "0x5ff000"}
        assert raw[8] == {"move": "check", "at": "0x1000", "size": "0x2ff000"}

    @pytest.mark.parametrize(("name", "value"), [("slaves", 1 << 32), ("slave_timeout", 1 << 64), ("slaves", True)])
    def test_counts_that_the_purgatory_has_no_room_for(self, name, value):
        assert "no count" in refuse(damaged(lambda raw: raw.update({name: value})))

    @pytest.mark.parametrize("value", ["yes", 1, None, []], ids=repr)
    def test_altivec_is_true_or_false(self, value):
        assert "is neither true nor false" in refuse(damaged(lambda raw: raw.update(altivec=value)))

    def test_names_are_quoted_in_messages(self):
        """A plan comes from the machine under test: its words must not forge lines of a report."""

        def forge(raw):
            raw["firmware"][0]["name"] = "RTAS\nPASS"
            segment(raw, "fdt").update(range="0xa000000-0xa020000")

        refuse(damaged(forge))

    @settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def test_random_damage(self, data):
        text = small_text()
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(text) - 1))
            length = data.draw(st.integers(0, 8))
            put = data.draw(st.text(st.sampled_from('0123456789abcdefx-"{}[],: nu\n'), max_size=4))
            text = text[:at] + put + text[at + length :]
        survive(text)

    @settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def test_random_values(self, data):
        raw = json.loads(small_text())
        holder, key = data.draw(st.sampled_from(list(places(raw))))
        numbers = st.sampled_from([0, 1, 0x80, 0x100, 0x600000, 0x4000000, 0xA000000, (1 << 64) - 1, 1 << 64]).map(hex)
        ranges = st.builds(lambda a, b: f"{a}-{b}", numbers, numbers)
        scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | numbers | ranges
        holder[key] = data.draw(
            scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(max_size=2), scalars, max_size=1)
        )
        survive(json.dumps(raw))


def tokens(services: Services) -> dict[str, int]:
    return {"rtas_reboot": services.rtas_reboot, "rtas_nmi": services.rtas_nmi}


def exchange(plan: LoadPlan) -> Exchange:
    """The one of all but the low page, which changes places in the purgatory's segment."""
    low, found = (move for move in plan.moves if isinstance(move, Exchange))
    saved = plan.segment("purgatory").range.start + SAVE_OFFSET
    assert low == Exchange(saved, plan.segment("kernel").range.start, LOW_PAGE)
    return found


@functools.cache
def small_text() -> str:
    return small_plan("zero").to_json()


def places(value):
    """Every (container, key) in a JSON value."""
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from places(inner)


def survive(text: str) -> None:
    try:
        plan = LoadPlan.from_json(text, source="plan.json")
    except FormatError as error:
        line = str(error)
        assert "\n" not in line, line
        return
    # what was read keeps the promises that matter, whatever was changed
    pack_any(plan)
    checked_at_last(plan)
    memory = simulate(plan) if plan.memory == RangeSet([Range(0, 256 * MIB)]) else None
    for kept in plan.kept:
        if memory is not None and kept.range.start % LINE == 0 and kept.range.size % LINE == 0:
            here = memory[kept.location // LINE : (kept.location + kept.range.size) // LINE]
            assert (here == np.arange(kept.range.start // LINE, kept.range.end // LINE)).all()
    assert not plan.k2_memory & RangeSet(Range.sized(kept.location, kept.range.size) for kept in plan.kept)
    plan.to_json()


def test_crashkernel_error_is_the_root_of_all():
    assert issubclass(PlanError, CrashkernelError)
    assert Region("RTAS", Range(0, 1)).name == "RTAS"
