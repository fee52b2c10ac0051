"""The hazards: for each check a machine where nothing can happen and one where it can, and each always answers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.errors import PlanError
from crashkernel.formats.fdt import Node
from crashkernel.machine import Pages, Region
from crashkernel.memory import Range, RangeSet
from crashkernel.placement import hazards, plan_load
from crashkernel.placement.hazards import assess, quarantinable
from crashkernel.placement.plan import HAZARD_VERDICTS, LoadPlan, Segment
from crashkernel.placement.sizing import Estimate, Need, estimate
from support.machines import LAYOUT, MIB, initrd, kernel, machine, memory_node, small_machine, tree, u64

PAGE = 0x10000
INIT = Range(2 * MIB, 3 * MIB)
"""Where the small machine's K1 has its freed init section; its image ends at 4 MiB."""


def ask(name, placement="zero", *, span=3 * MIB, found=None, initrd_size=70000, change=lambda plan: plan, **changes):
    """What the check `name` says of a small machine with these changes, and of its plan with that change."""
    found = replace(small_machine(), **changes) if found is None else found
    plan = change(plan_load(found, kernel(span), initrd(initrd_size), "console=hvc0", placement))
    needs = estimate(span, initrd(initrd_size), plan.k2_memory, found.mmu, PAGE, len(found.cpus))
    told = {hazard.name: hazard for hazard in assess(plan, found, needs)}
    return told[name]


def pages(where, use):
    return tuple(Pages(each, use) for each in where)


class TestAll:
    @pytest.mark.parametrize("placement", ["zero", "reserved"])
    def test_every_check_answers_and_says_why_and_whence(self, placement):
        plan = plan_load(small_machine(), kernel(), initrd(70000), "", placement)
        assert len({hazard.name for hazard in plan.hazards}) == len(plan.hazards) == len(hazards._CHECKS)
        for hazard in plan.hazards:
            assert hazard.verdict in HAZARD_VERDICTS
            assert hazard.reason.endswith("."), hazard
            assert hazard.title
            assert hazard.source
            if hazard.verdict in ("dangerous", "impossible", "unknown"):
                assert hazard.advice.endswith("."), hazard

    @pytest.mark.parametrize("placement", ["zero", "reserved"])
    def test_they_survive_json(self, placement):
        plan = plan_load(small_machine(), kernel(), initrd(70000), "", placement)
        assert LoadPlan.from_json(plan.to_json()).hazards == plan.hazards

    def test_reserved_has_no_danger_on_a_machine_that_is_told_whole_and_has_room(self):
        found = replace(small_machine(memory=[memory_node(0, 1024 * MIB)], region=Range(256 * MIB, 768 * MIB)))
        plan = plan_load(found, kernel(), initrd(70000), "", "reserved")
        assert {hazard.verdict for hazard in plan.hazards} <= {"safe", "guarded"}


class TestWhatK1HandsOut:
    def test_reserved_takes_over_none_of_it(self):
        # K1 is so small here that its init lies where K2 has its low block: further up it does not
        layout = (Region("K1 text", Range(0, 4 * MIB)), Region("K1 freed init", Range(4 * MIB, 5 * MIB)))
        assert ask("freed-init", "reserved", layout=layout).verdict == "safe"
        assert ask("slack", "reserved", layout=layout).verdict == "safe"

    def test_at_zero_it_is_dangerous_and_says_who_holds_it(self):
        held = (*pages([Range(2 * MIB, 2 * MIB + 10 * PAGE)], "free"), *pages([Range(2 * MIB + 10 * PAGE, 3 * MIB)], "slab"))
        found = ask("freed-init", pages=held)
        assert found.verdict == "dangerous"
        assert "All 16 pages are in K1's hands: 10 free" in found.reason
        assert "6 kernel objects" in found.reason
        assert found.ranges == (INIT,)

    def test_what_is_out_of_k1s_hands_is_safe_and_only_if_it_is_all(self):
        assert ask("freed-init", pages=pages([INIT], "poisoned")).verdict == "guarded"
        most = pages([Range(INIT.start, INIT.end - PAGE)], "poisoned")
        found = ask("freed-init", pages=most)
        assert found.verdict == "dangerous"
        assert "1 of 16 pages are in K1's hands: 1 whose holder could not be read" in found.reason
        assert ask("freed-init", pages=(*most, *pages([Range(INIT.end - PAGE, INIT.end)], "kernel"))).verdict == "dangerous"

    def test_pages_elsewhere_do_not_count(self):
        found = ask("freed-init", pages=pages([Range(0, INIT.start), Range(INIT.end, 64 * MIB)], "poisoned"))
        assert "16 whose holder could not be read" in found.reason

    def test_a_k1_of_which_nothing_is_known(self):
        found = replace(small_machine(), release="another", layout=(), kernel_end=0)
        assert ask("freed-init", found=found).verdict == "unknown"
        assert ask("slack", found=found).verdict == "unknown"
        assert ask("span", found=found).verdict == "unknown"
        assert ask("freed-init", "reserved", found=found).verdict == "safe"
        assert ask("slack", "reserved", found=found).verdict == "safe"

    def test_slack_is_what_k2_needs_beyond_k1s_image(self):
        found = ask("slack", span=5 * MIB)
        assert found.verdict == "dangerous"
        assert found.ranges == (Range(4 * MIB, 8 * MIB),)
        assert ask("slack", span=5 * MIB, pages=pages([Range(4 * MIB, 8 * MIB)], "poisoned")).verdict == "guarded"
        # K1 larger than all that K2 wants
        assert ask("slack", kernel_end=16 * MIB).verdict == "safe"

    def test_a_region_behind_k1_leaves_no_slack(self):
        root = tree(memory=[memory_node(0, 256 * MIB)], region=Range(4 * MIB, 192 * MIB))
        found = machine(root, notes_at=0x300000, release=small_machine().release)
        assert ask("slack", found=found).verdict == "safe"

    def test_only_whole_pages_of_k1_count(self):
        ragged = Range(2 * MIB + 0x100, 3 * MIB - 0x100)
        layout = (*LAYOUT[:2], Region("K1 freed init", ragged), Region("K1 data", Range(ragged.end, 4 * MIB)))
        assert ask("freed-init", layout=layout).ranges == (Range(2 * MIB + PAGE, 3 * MIB - PAGE),)

    def test_what_may_be_taken_is_never_k1s_image(self):
        for span in (3 * MIB, 9 * MIB):
            plan = plan_load(small_machine(), kernel(span), initrd(0), "", "zero")
            wanted = quarantinable(plan, PAGE)
            assert wanted.covers(INIT)
            assert wanted.covers(Range(4 * MIB, plan.exposed.ranges[-1].end))
            assert not wanted & RangeSet(r.range for r in plan.k1_layout if r.name != "K1 freed init")

    def test_nothing_may_be_taken_where_k1s_image_is_not_known(self):
        found = replace(small_machine(), release="another", layout=())
        assert not quarantinable(plan_load(found, kernel(), initrd(0), "", "zero"), PAGE)


class TestK1sImage:
    def test_span(self):
        assert ask("span").verdict == "safe"
        assert ask("span", "reserved", span=9 * MIB).verdict == "safe"
        larger = ask("span", span=9 * MIB)
        assert larger.verdict == "guarded"
        assert larger.ranges == (Range(4 * MIB, 9 * MIB),)

    def test_static_data(self):
        assert ask("static-data").verdict == "guarded"
        assert ask("static-data").ranges == (Range(3 * MIB, 4 * MIB),)
        assert ask("static-data", "reserved").verdict == "safe"

    def test_vectors(self):
        assert ask("vectors", "reserved").verdict == "guarded"
        lost = ask("vectors", "reserved", change=lambda plan: replace(plan, kept=(), k2_memory=RangeSet([plan.reserved])))
        assert lost.verdict == "impossible"


class TestK2sMemory:
    def test_early_allocator_at_zero(self):
        assert ask("early-allocator", mmu="hash").verdict == "safe"

        def cut(plan):
            low = Range(0, plan.kernel_span + MIB)
            return replace(plan, k2_memory=(plan.k2_memory & RangeSet([plan.reserved])) | RangeSet([low]))

        assert ask("early-allocator", change=cut).verdict == "impossible"

    def test_a_range_that_is_filled_to_the_last_page(self):
        def fill(plan):
            return replace(
                plan,
                segments=(*plan.segments, Segment("initrd", Range(250 * MIB, 251 * MIB))),
                k2_memory=plan.k2_memory | RangeSet([Range(250 * MIB, 251 * MIB)]),
                k2_mapped=plan.k2_mapped | RangeSet([Range(250 * MIB, 251 * MIB)]),
            )

        full = ask("early-allocator", change=fill)
        assert full.verdict == "dangerous"
        assert full.ranges == (Range(250 * MIB, 251 * MIB),)

    def test_radix_wants_room_for_its_process_table(self):
        small = tree(memory=[memory_node(0, 256 * MIB)], region=Range(64 * MIB, 84 * MIB))
        found = machine(small, notes_at=0x300000)
        assert ask("early-allocator", "reserved", found=found).verdict == "dangerous"
        assert ask("early-allocator", "reserved").verdict == "safe"

    def test_room(self):
        wide = small_machine(memory=[memory_node(0, 1024 * MIB)], region=Range(256 * MIB, 768 * MIB))
        assert ask("room", found=wide).verdict == "safe"
        narrow = ask("room", found=wide, initrd_size=240 * MIB)
        assert narrow.verdict == "dangerous"
        assert "crashkernel=" in narrow.advice
        assert "suse 384 MiB" in narrow.advice

    def test_room_that_may_just_do(self):
        plan = plan_load(small_machine(), kernel(), initrd(0), "", "zero")
        told = {h.name: h for h in assess(plan, small_machine(), Estimate((Need("all", 100, "here"),), 110))}
        assert told["room"].verdict == "guarded"


class TestFirmware:
    def test_inside_the_region_and_elsewhere(self):
        assert ask("firmware").verdict == "guarded"
        assert ask("firmware", found=small_machine(rtas=Range.sized(32 * MIB, PAGE))).verdict == "safe"
        assert ask("firmware", found=small_machine(rtas=None)).verdict == "safe"

    def test_where_k2_goes_no_plan_is_made_and_a_plan_that_was_is_called_impossible(self):
        with pytest.raises(PlanError):
            ask("firmware", found=small_machine(rtas=Range.sized(MIB, PAGE)))
        inside = Region("RTAS", Range.sized(MIB, PAGE))
        assert ask("firmware", change=lambda plan: replace(plan, firmware=(inside,))).verdict == "impossible"

    def test_initrd_of_k1(self):
        assert ask("initrd", found=small_machine(initrd=Range(MIB, 2 * MIB))).verdict == "guarded"
        assert ask("initrd", found=small_machine(initrd=Range(32 * MIB, 33 * MIB))).verdict == "safe"

    @pytest.mark.parametrize(
        ("base", "verdict"), [(2 * MIB, "guarded"), (32 * MIB, "safe"), (100 * MIB, "impossible"), (None, "unknown")]
    )
    def test_hash_table_on_bare_metal(self, base, verdict):
        root = tree(
            memory=[memory_node(0, 256 * MIB)],
            region=Range(64 * MIB, 192 * MIB),
            platform="powernv",
            opal=Range(200 * MIB, 202 * MIB),
        )
        found = machine(root, mmu="hash", notes_at=0x300000, release=small_machine().release)
        assert ask("hash-table", found=found).verdict == "unknown"
        if base is not None:
            more = {"linux,htab-base": u64(base), "linux,htab-size": u64(MIB)}
            children = [Node(n.name, {**n.properties, **more}, n.children) if n.name == "chosen" else n for n in root.children]
            found = replace(found, device_tree=root.with_children(children))
        assert ask("hash-table", found=found).verdict == verdict

    def test_hash_table_elsewhere(self):
        assert ask("hash-table").verdict == "safe"
        assert ask("hash-table", mmu="hash").verdict == "safe"

    def test_purgatory_above_4_gib_cannot_call_rtas(self):
        gib = 1 << 30
        found = small_machine(
            memory=[memory_node(0, 8 * gib)], region=Range(5 * gib, 6 * gib), rtas=Range.sized(160 * MIB, PAGE)
        )
        assert ask("purgatory", found=found).verdict == "dangerous"
        assert ask("purgatory").verdict == "safe"


class TestTheRegion:
    def test_reach(self):
        assert ask("rma").verdict == "safe"
        near = small_machine(memory=[memory_node(0, 150 * MIB, 106 * MIB)])
        assert ask("rma", found=near).verdict == "guarded"
        assert ask("rma", found=near, initrd_size=88 * MIB).verdict == "dangerous"

    def test_low_memory_left_to_k1(self):
        assert ask("behind-k1").verdict == "safe"
        root = tree(memory=[memory_node(0, 64 * MIB, 192 * MIB)], region=Range(4 * MIB, 64 * MIB))
        found = machine(root, notes_at=0x300000, release=small_machine().release)
        assert ask("behind-k1", "reserved", found=found).verdict == "dangerous"
        assert ask("behind-k1", "reserved", found=replace(found, release="another")).verdict == "unknown"


class TestTheDump:
    def test_notes(self):
        assert (
            ask(
                "core-header",
                "reserved",
                found=machine(tree(memory=[memory_node(0, 256 * MIB)], region=Range(64 * MIB, 192 * MIB)), notes_at=32 * MIB),
            ).verdict
            == "safe"
        )
        moved = ask("core-header")
        assert moved.verdict == "guarded"
        assert moved.ranges[0] == Range.sized(0x300000, 0x1000)

    def test_notes_that_are_missing(self):
        found = small_machine()
        assert ask("core-header", vmcoreinfo=None).verdict == "dangerous"
        without = (found.cpus[0], replace(found.cpus[1], note=None))
        told = ask("core-header", cpus=without)
        assert told.verdict == "dangerous"
        assert "the registers of 1 CPUs" in told.reason

    def test_a_kernel_that_was_not_asked(self):
        assert ask("core-header", found=small_machine().booted_with(Range(64 * MIB, 192 * MIB))).verdict == "unknown"


@given(
    starts=st.lists(st.integers(0, 8 * MIB // PAGE), max_size=6),
    uses=st.lists(
        st.sampled_from(["free", "cache", "anonymous", "slab", "pagetable", "kernel", "poisoned"]), min_size=6, max_size=6
    ),
)
def test_only_poisoned_pages_make_it_safe(starts, uses):
    """However K1's pages are held: guarded exactly when every page that K2 takes over is out of K1's hands."""
    edges = sorted({0, *starts, 8 * MIB // PAGE})
    held = tuple(Pages(Range(a * PAGE, b * PAGE), use) for a, b, use in zip(edges, edges[1:], uses * 2, strict=False))
    out = RangeSet(piece.range for piece in held if piece.use == "poisoned")
    for name in ("freed-init", "slack"):
        found = ask(name, span=5 * MIB, pages=held)
        wanted = RangeSet([INIT if name == "freed-init" else Range(4 * MIB, 8 * MIB)])
        assert found.verdict == ("guarded" if not wanted - out else "dangerous")
