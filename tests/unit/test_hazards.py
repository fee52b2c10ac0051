"""The hazards: for each check a machine where nothing can happen and one where it can, and each always answers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.errors import FormatError, PlanError
from crashkernel.formats.fdt import Node
from crashkernel.machine import Pages, Region
from crashkernel.memory import Range, RangeSet
from crashkernel.placement import hazards, plan_load
from crashkernel.placement.hazards import assess, quarantinable
from crashkernel.placement.image import KernelImage
from crashkernel.placement.plan import HAZARD_VERDICTS, LoadPlan, Segment
from crashkernel.placement.sizing import Estimate, Need, estimate
from support.machines import LAYOUT, MIB, initrd, kernel, machine, memory_node, small_machine, tree, u64, vmlinux

PAGE = 0x10000
INIT = Range(2 * MIB, 3 * MIB)
"""Where the small machine's K1 has its freed init section; its image ends at 4 MiB."""


def ask(
    name,
    placement="zero",
    *,
    span=3 * MIB,
    found=None,
    initrd_size=70000,
    change=lambda plan: plan,
    cmdline="console=hvc0",
    image=None,
    k2_mmu=None,
    on=None,
    **changes,
):
    """What the check `name` says of a small machine with these changes, and of its plan with that change.

    `on` is the machine that the plan is held against, if it is no longer the one it was made for.
    """
    found = replace(small_machine(), **changes) if found is None else found
    image, k2_mmu = kernel(span) if image is None else image, k2_mmu or found.mmu
    plan = change(plan_load(found, image, initrd(initrd_size), cmdline, placement))
    needs = estimate(span, initrd(initrd_size), plan.k2_memory, k2_mmu, PAGE, len(found.cpus))
    told = {hazard.name: hazard for hazard in assess(plan, on or found, needs, image, k2_mmu)}
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

    @pytest.mark.parametrize("name", ["freed-init", "slack"])
    def test_reserved_on_hash_takes_16_mib_and_may_take_over_what_nobody_knows(self, name):
        unheard = {"release": "another", "layout": (), "kernel_end": 0}
        told = ask(name, "reserved", mmu="hash", **unheard)
        assert told.verdict == "unknown"
        assert told.advice
        assert ask(name, "reserved", **unheard).verdict == "safe", "2 MiB on radix: nothing but text"

    def test_a_file_of_k1s_release_that_is_not_k1s_tells_nothing_of_it(self):
        """A release may be built twice; where K1 ends is what K1 itself says."""
        assert ask("freed-init", kernel_end=3 * MIB).verdict == "dangerous"
        assert ask("freed-init", kernel_end=3 * MIB - 0x3000).verdict == "dangerous", "its last page, rounded up"
        for other in (3 * MIB + PAGE, 2 * MIB + 0xF0000):
            plan = plan_load(replace(small_machine(), kernel_end=other), kernel(), initrd(0), "", "zero")
            assert plan.k1_layout == ()
            assert {h.name: h.verdict for h in plan.hazards}["freed-init"] == "unknown"
        plan = plan_load(replace(small_machine(), kernel_end=8 * MIB, layout=LAYOUT), kernel(), initrd(0), "", "zero")
        assert plan.k1_layout == LAYOUT, "K1's own word"

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

    @pytest.mark.parametrize("placement", ["zero", "reserved"])
    def test_a_region_that_begins_inside_k1s_image(self, placement):
        """The kernel answers ETXTBSY; a description may say so all the same."""
        found = small_machine(region=Range(32 * MIB, 192 * MIB))
        told = ask("span", placement, found=replace(found, kernel_end=0x2880000))
        assert told.verdict == "impossible"
        assert told.ranges == (Range(32 * MIB, 0x2880000),)
        assert ask("span", placement, found=replace(found, kernel_end=32 * MIB)).verdict != "impossible"

    def test_whether_the_region_is_inside_an_image_whose_end_is_not_known(self):
        assert ask("span", "reserved", release="another").verdict == "unknown"

    def test_static_data_of_a_k1_of_which_nothing_is_known(self):
        low = ask("static-data", "reserved", release="another", kernel_end=32 * MIB)
        assert low.verdict == "safe"
        assert "text" in low.reason
        more = ask("static-data", "reserved", release="another", kernel_end=32 * MIB, mmu="hash")
        assert more.verdict == "guarded"
        assert more.reason.startswith("Where K1's data lies could not be read")
        assert more.ranges == (Range(2 * MIB, 16 * MIB),)
        assert ask("static-data", release="another").reason.startswith("Where K1's data lies could not be read")

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

    @pytest.mark.parametrize(
        ("k1", "platform", "radix", "cmdline", "dangerous"),
        [
            ("radix", "pseries", True, "", True),
            ("radix", "pseries", True, "quiet disable_radix", False),
            ("radix", "pseries", True, "disable_radix=yes", False),
            ("radix", "pseries", True, "disable_radix=0", True),
            ("hash", "pseries", True, "", False),  # as the partition and its hypervisor have agreed
            ("hash", "powernv", True, "", True),  # K1's own choice: K2 is free to make another
            ("hash", "powernv", True, "disable_radix", False),
            ("hash", "powernv", False, "", False),
        ],
    )
    def test_the_process_table_is_wanted_by_a_k2_that_chooses_radix(self, k1, platform, radix, cmdline, dangerous):
        # room for hash's whole blocks, and none of 16 MiB aligned to as much
        root = tree(memory=[memory_node(0, 256 * MIB)], region=Range(64 * MIB, 112 * MIB), platform=platform, radix=radix)
        found = machine(root, mmu=k1, notes_at=0x300000, release=small_machine().release)
        plan = plan_load(found, kernel(), initrd(8 * MIB), cmdline, "reserved")
        told = {hazard.name: hazard for hazard in plan.hazards}["early-allocator"]
        assert (told.verdict == "dangerous") == dangerous, told
        assert ("process table" in told.reason) == dangerous

    def test_room_says_when_what_the_initramfs_takes_is_a_guess(self):
        for exact in (True, False):
            plan = plan_load(small_machine(), kernel(), replace(initrd(70000), exact=exact), "", "zero")
            reason = {hazard.name: hazard.reason for hazard in plan.hazards}["room"]
            assert ("is guessed" in reason) is not exact

    def test_room(self):
        wide = small_machine(memory=[memory_node(0, 1024 * MIB)], region=Range(256 * MIB, 768 * MIB))
        assert ask("room", found=wide).verdict == "safe"
        narrow = ask("room", found=wide, initrd_size=240 * MIB)
        assert narrow.verdict == "dangerous"
        assert "crashkernel=" in narrow.advice
        assert "suse 384 MiB" in narrow.advice

    def test_room_that_may_just_do(self):
        plan = plan_load(small_machine(), kernel(), initrd(0), "", "zero")
        told = {h.name: h for h in assess(plan, small_machine(), Estimate((Need("all", 100, "here"),), 110), kernel(), "radix")}
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
        moved = ask("initrd", found=small_machine(initrd=Range(MIB, 2 * MIB)))
        assert moved.verdict == "guarded"
        assert "retain_initrd" in moved.reason
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
        told = ask("hash-table", found=found)
        assert told.verdict == verdict
        # no check of the kernel's that was ever there
        assert "refuse" not in told.reason
        assert "kexec_prepare" not in told.source

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

    def hash_lpar(self, cpus, *, capacity=0, threads=1, **changes):
        """400 CPUs of a partition, say: a region of 1 GiB that begins within an RMA of 256 MiB."""
        root = tree(memory=[memory_node(0, 256 * MIB, 1792 * MIB)], region=Range(128 * MIB, 1152 * MIB), cpus=cpus, radix=False)
        for node in root.children:
            if node.name == "rtas":
                node.properties["ibm,lrdr-capacity"] = bytes(16) + capacity.to_bytes(4, "big")
            if node.name == "cpus":
                for cpu in node.children:
                    cpu.properties["ibm,ppc-interrupt-server#s"] = bytes(4 * threads)
        return replace(machine(root, notes_at=0x300000, release=small_machine().release), **changes)

    @pytest.mark.parametrize(("cpus", "verdict"), [(1, "guarded"), (256, "guarded"), (257, "dangerous"), (400, "dangerous")])
    def test_k2s_own_rma_must_hold_what_it_keeps_for_each_cpu(self, cpus, verdict):
        """16 MiB of it: 2 MiB to boot with, 56 KiB for each CPU, whatever else K2 has further up."""
        told = ask("rma", "reserved", found=self.hash_lpar(cpus))
        assert told.verdict == verdict
        assert ("paca" in told.source, "K2 would panic" in told.reason) == (True, verdict == "dangerous")
        assert ask("rma", "reserved", found=self.hash_lpar(cpus), initrd_size=0).verdict == verdict
        assert ask("rma", "reserved", found=self.hash_lpar(cpus), k2_mmu="radix").verdict == "guarded", "no limit there"

    def test_at_zero_it_has_what_lies_beside_its_image(self):
        # 3 MiB of K2 in 16 MiB
        assert ask("rma", found=self.hash_lpar(201)).verdict == "guarded"
        assert ask("rma", found=self.hash_lpar(202)).verdict == "dangerous"

    def test_cpus_that_may_come_count(self):
        assert ask("rma", "reserved", found=self.hash_lpar(4, capacity=257)).verdict == "dangerous"
        assert ask("rma", "reserved", found=self.hash_lpar(4, capacity=33, threads=8)).verdict == "dangerous"
        assert ask("rma", "reserved", found=self.hash_lpar(4, capacity=32, threads=8)).verdict == "guarded"

    @pytest.mark.parametrize(("cmdline", "few"), [("", False), ("maxcpus=1", False), ("nr_cpus=4", True)])
    def test_they_take_room_as_well(self, cmdline, few):
        """More than 1 MiB each of K2's 1 GiB."""
        plan = plan_load(self.hash_lpar(4, capacity=1000), kernel(), initrd(0), cmdline, "reserved")
        told = {hazard.name: hazard.verdict for hazard in plan.hazards}
        assert told["room"] == ("safe" if few else "dangerous")

    def test_nr_cpus_lowers_it_and_maxcpus_does_not(self):
        found = self.hash_lpar(400)
        assert ask("rma", "reserved", found=found, cmdline="maxcpus=1").verdict == "dangerous"
        assert ask("rma", "reserved", found=found, cmdline="nr_cpus=0").verdict == "dangerous", "0 is no limit"
        assert ask("rma", "reserved", found=found, cmdline="nr_cpus=300").verdict == "dangerous"
        told = ask("rma", "reserved", found=found, cmdline="nr_cpus=1")
        assert told.verdict == "guarded"
        assert "as long as none above CPU 255 panics" in told.reason
        assert "nr_cpus=256" in ask("rma", "reserved", found=found).advice

    def test_bare_metal_has_no_rma(self):
        root = tree(memory=[memory_node(0, 2048 * MIB)], region=Range(128 * MIB, 1152 * MIB), platform="powernv", cpus=400)
        found = machine(root, mmu="hash", notes_at=0x300000, release=small_machine().release)
        assert ask("rma", "reserved", found=found).verdict == "safe"

    def test_low_memory_left_to_k1(self):
        assert ask("behind-k1").verdict == "safe"
        root = tree(memory=[memory_node(0, 64 * MIB, 192 * MIB)], region=Range(4 * MIB, 64 * MIB))
        found = machine(root, notes_at=0x300000, release=small_machine().release)
        assert ask("behind-k1", "reserved", found=found).verdict == "dangerous"
        assert ask("behind-k1", "reserved", found=replace(found, release="another")).verdict == "unknown"


class TestK2sImage:
    @pytest.mark.parametrize("placement", ["zero", "reserved"])
    @pytest.mark.parametrize("built", [1, 0x72756E30])
    def test_run_at_load(self, placement, built):
        """A kernel built with RELOCATABLE_TEST has 1 there, and runs in place at zero as well."""
        told = ask("run-at-load", placement, image=KernelImage.from_bytes(vmlinux(flag=built)))
        assert told.verdict == "safe"
        assert told.reason.startswith(f"Built as {built:#x}")
        assert f"loaded as {0x72756E30 if placement == 'zero' else 1:#x}" in told.reason

    def test_run_at_load_impossible(self):
        """No plan is made with a kernel that has no such flag, and one that was is called impossible."""
        with pytest.raises(FormatError, match="no __run_at_load flag"):
            KernelImage.from_bytes(vmlinux(flag=0))
        bare = KernelImage("vmlinux", "", "little", ((0, bytes(0x200)),), 3 * MIB)
        assert ask("run-at-load", image=bare).verdict == "impossible"

    def test_relocatable(self):
        assert ask("relocatable").verdict == "safe"
        assert ask("relocatable", "reserved").verdict == "safe"
        told = ask("relocatable", "reserved", change=lambda plan: replace(plan, entry=plan.entry + 0x8000))
        assert told.verdict == "impossible"

    def test_relocatable_impossible(self):
        """A kernel that was linked elsewhere is refused before there is a plan."""
        with pytest.raises(FormatError, match="relocatable"):
            KernelImage.from_bytes(vmlinux(vaddr=0xC000000002000000))


class TestWhatComesLater:
    def test_nothing_has_come(self):
        told = ask("hotplug")
        assert told.verdict == "guarded"
        assert "2 CPUs, 0 more" in told.reason
        half = small_machine()
        half = replace(half, cpus=(half.cpus[0], replace(half.cpus[1], note=None, online=False)))
        assert ask("hotplug", found=half).verdict == "guarded", "it has no registers to save"
        assert ask("hotplug", found=half.booted_with(Range(64 * MIB, 192 * MIB))).verdict == "guarded"

    @pytest.mark.parametrize("size", [192, 320])
    def test_memory_that_came_or_went(self, size):
        found = small_machine()
        told = ask("hotplug", found=found, on=replace(found, memory=RangeSet([Range(0, size * MIB)])))
        assert told.verdict == "dangerous"
        assert told.ranges == (Range(min(size, 256) * MIB, max(size, 256) * MIB),)

    def test_a_cpu_that_came_or_went(self):
        found = small_machine()
        fewer = replace(found, cpus=(found.cpus[0], replace(found.cpus[1], online=False)))
        for made_for, on in ((found, fewer), (fewer, found)):
            assert ask("hotplug", found=made_for, on=on).verdict == "dangerous"

    def test_a_cpu_online_without_a_note_buffer(self):
        found = small_machine()
        told = ask("hotplug", cpus=(found.cpus[0], replace(found.cpus[1], note=None)))
        assert told.verdict == "dangerous"
        assert "CPU 1 " in told.reason


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
