"""The verdict: a perfect dump passes, and whatever is wrong with another is caught and called by its name."""

import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crashkernel.drill.verdict import Exemption, describe_place, judge
from crashkernel.errors import CrashkernelError
from crashkernel.machine import Region
from crashkernel.memory import Range
from crashkernel.purgatory import pack
from support.cores import (
    NONCE,
    PANIC,
    PID,
    RELEASE,
    VPA,
    core_of,
    memory_of,
    notes,
    prstatus_notes,
    tiny_plan,
    truth_of,
    with_firmware,
)
from support.elfwriter import PT_LOAD, Part
from support.machines import HEAD, KERNEL_BASE, MIB

PAGE = 0x1000


class Bench:
    """A crash: the plan, K1's memory, the truth in a file, and a dump to be damaged and judged."""

    def __init__(self, directory, placement: str = "zero", *, opal: bool = False) -> None:
        self.directory = directory
        self.plan = tiny_plan(placement, opal=opal)
        self.memory = memory_of(self.plan)
        self.core = core_of(self.plan, self.memory)
        self.truth = truth_of(self.plan, self.memory, directory)

    def judge(self, data: bytes | None = None, **truth):
        dump = self.directory / "vmcore"
        dump.write_bytes(self.core.to_bytes() if data is None else data)
        return judge(dump, replace(self.truth, **truth), self.plan)

    def flip(self, paddr: int, size: int = 1) -> None:
        self.core.write(paddr, bytes(byte ^ 0x5A for byte in self.core.read(paddr, size)))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def assert_found(verdict, problem: str) -> None:
    """The verdict fails, and one of its problems, each a line, says so."""
    assert not verdict.passed
    assert any(re.search(problem, each) for each in verdict.problems), verdict.problems
    assert all("\n" not in each for each in verdict.problems)


class TestPass:
    @pytest.mark.parametrize("placement", ["zero", "reserved"])
    def test_a_perfect_dump(self, tmp_path, placement):
        bench = Bench(tmp_path, placement)
        verdict = bench.judge()
        assert verdict.problems == []
        assert verdict.passed
        assert verdict.k1_bytes == verdict.bytes_compared == 10 * MIB
        assert (verdict.bytes_wrong, verdict.bytes_missing, verdict.wrong_ranges, verdict.exempt) == (0, 0, [], [])
        assert verdict.first_256_bytes_ok
        assert verdict.nonce_found
        assert verdict.panic_found
        assert verdict.registers_ok

    def test_pt_loads_in_any_order_and_split_anywhere(self, bench):
        first, *rest = bench.core.loads
        cut = 0x12345
        second = Part(PT_LOAD, vaddr=first.vaddr + cut, paddr=cut, data=first.data[cut:])
        bench.core.loads = [*reversed(rest), second, replace(first, data=first.data[:cut])]
        assert bench.judge().passed

    def test_an_empty_pt_load_is_nothing(self, bench):
        bench.core.loads.append(Part(PT_LOAD, vaddr=KERNEL_BASE + 9 * MIB, paddr=9 * MIB))
        assert bench.judge().passed

    def test_a_truth_that_ends_early_proves_nothing(self, bench):
        bench.memory[23 * MIB :] = bytes(MIB)
        bench.core = core_of(bench.plan, bench.memory)
        bench.truth.memory.write_bytes(bytes(bench.memory[: 23 * MIB]))
        assert_found(bench.judge(), "ended at 0x1700000")
        bench.truth.memory.write_bytes(bytes(bench.memory))
        bench.flip(23 * MIB + 5)
        assert bench.judge().wrong_ranges[0].range == Range(23 * MIB + 5, 23 * MIB + 6)

    def test_positive_evidence_is_wanted_for_everything(self, bench):
        good = bench.judge()
        for name in ("first_256_bytes_ok", "nonce_found", "panic_found", "registers_ok"):
            assert not replace(good, **{name: False}).passed
        assert not replace(good, bytes_compared=good.k1_bytes - 1).passed
        assert not replace(good, k1_bytes=0, bytes_compared=0).passed
        assert not replace(good, bytes_wrong=1).passed
        assert not replace(good, bytes_missing=1).passed
        assert not replace(good, problems=["something"]).passed


class TestWrongBytes:
    @pytest.mark.parametrize(
        ("paddr", "what"),
        [
            (0x1235, "K1 text"),
            (0x90001, "K1 read-only data"),
            (0x140000, "K1 freed init"),
            (0x1FFFFF, "K1 data"),
            (0x100010, "crash notes"),
            (0x280000, "moved to 0x"),
            (22 * MIB, "K1 memory"),
            (24 * MIB - 1, "K1 memory"),
        ],
    )
    def test_one_flipped_byte(self, bench, paddr, what):
        bench.flip(paddr)
        verdict = bench.judge()
        assert_found(verdict, r"^1 bytes are wrong, in 1 range$")
        (wrong,) = verdict.wrong_ranges
        assert wrong.range == Range(paddr, paddr + 1)
        assert wrong.wrong == verdict.bytes_wrong == 1
        assert what in wrong.what
        assert verdict.first_256_bytes_ok
        assert verdict.bytes_compared == verdict.k1_bytes

    def test_where_a_moved_byte_lay_at_capture_time(self, bench):
        bench.flip(0x1235)
        moved = bench.plan.kept[0].location + 0x1235
        assert bench.judge().wrong_ranges[0].what == f"K1 text, moved to {moved:#x}"

    def test_neighbours_are_one_range_and_others_are_not(self, bench):
        for paddr in (0x5010, 0x5020, 0x6FFF, 0x7000, 0xA0000):
            bench.flip(paddr)
        verdict = bench.judge()
        assert [(w.range, w.wrong) for w in verdict.wrong_ranges] == [
            (Range(0x5010, 0x5021), 2),
            (Range(0x6FFF, 0x7001), 2),
            (Range(0xA0000, 0xA0001), 1),
        ]
        assert verdict.bytes_wrong == 5

    def test_a_block_of_zeros(self, bench):
        bench.core.write(0x50000, bytes(0x4000))
        (wrong,) = bench.judge().wrong_ranges
        assert wrong.note == "zeros"
        assert wrong.range.align_outward(PAGE) == Range(0x50000, 0x54000)

    def test_two_swapped_pages(self, bench):
        one, other = bench.core.read(0x40000, PAGE), bench.core.read(0x60000, PAGE)
        bench.core.write(0x40000, other)
        bench.core.write(0x60000, one)
        verdict = bench.judge()
        assert [w.note for w in verdict.wrong_ranges] == ["holds what belongs at 0x60000", "holds what belongs at 0x40000"]
        assert [w.range.align_outward(PAGE).start for w in verdict.wrong_ranges] == [0x40000, 0x60000]

    def test_pages_swapped_across_pt_loads(self, bench):
        one, other = bench.core.read(0x40000, PAGE), bench.core.read(23 * MIB, PAGE)
        bench.core.write(0x40000, other)
        bench.core.write(23 * MIB, one)
        assert [w.note for w in bench.judge().wrong_ranges] == [
            "holds what belongs at 0x1700000",
            "holds what belongs at 0x40000",
        ]

    def test_the_list_is_bounded_and_the_count_is_not(self, bench):
        for number in range(80):
            bench.flip(22 * MIB + 0x2000 * number)
        verdict = bench.judge()
        assert verdict.bytes_wrong == 80
        assert len(verdict.wrong_ranges) == 64
        assert_found(verdict, "80 bytes are wrong, in 80 ranges")

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.sets(st.integers(0, 4 * MIB - 1), min_size=1, max_size=12))
    def test_any_flipped_bytes_are_counted_and_within_the_ranges(self, bench, places):
        original = list(bench.core.loads)
        for paddr in places:
            bench.flip(paddr)
        verdict = bench.judge()
        bench.core.loads = original
        assert verdict.bytes_wrong == len(places)
        assert sum(w.wrong for w in verdict.wrong_ranges) == len(places)
        for paddr in places:
            assert any(paddr in w.range for w in verdict.wrong_ranges)
        for wrong in verdict.wrong_ranges:
            assert {wrong.range.start, wrong.range.end - 1} <= places


class TestHead:
    @pytest.mark.parametrize(
        "head",
        [bytes(0x100), b"\xee" * 0x100, pack(0x5000000, (), HEAD, fdt=0, entry=0)[:0x100], HEAD[:0x80] + bytes(0x80)],
        ids=["zeros", "what-the-truth-file-holds", "purgatory", "half"],
    )
    def test_the_first_0x100_bytes_are_not_k1_s(self, bench, head):
        bench.core.write(0, head)
        verdict = bench.judge()
        assert_found(verdict, "K1's first 0x100 bytes are not what they were")
        assert not verdict.first_256_bytes_ok
        assert verdict.wrong_ranges[0].what.startswith("K1's first 0x100 bytes")
        assert verdict.bytes_wrong == sum(a != b for a, b in zip(head, HEAD, strict=True))

    def test_the_first_0x100_bytes_are_left_out(self, bench):
        first = bench.core.loads[0]
        bench.core.loads[0] = replace(first, paddr=0x100, vaddr=first.vaddr + 0x100, data=first.data[0x100:])
        verdict = bench.judge()
        assert_found(verdict, "no PT_LOAD covers K1's 0x0-0x100")
        assert_found(verdict, "K1's first 0x100 bytes are not what they were")
        assert verdict.bytes_missing == 0x100

    @pytest.mark.parametrize("cut", [1, 0x40, 0x80, 0xFF])
    def test_a_head_in_two_pt_loads(self, bench, cut):
        """It is K1's head wherever it is cut: a wrong byte in either part is found."""
        first = bench.core.loads[0]
        parts = [
            replace(first, data=first.data[:cut]),
            replace(first, paddr=cut, vaddr=first.vaddr + cut, data=first.data[cut:]),
        ]
        bench.core.loads[:1] = parts
        good = bench.judge()
        assert good.bytes_wrong == 0
        assert good.first_256_bytes_ok
        for paddr in (cut - 1, cut, 0xFF):
            bench.core.loads[:2] = parts
            bench.flip(paddr)
            bad = bench.judge()
            assert bad.bytes_wrong == 1
            assert not bad.first_256_bytes_ok
            assert not bad.passed


class TestStructure:
    def test_a_page_dropped_from_the_file(self, bench):
        data = bench.core.to_bytes()
        at = data.index(bytes(bench.memory[0x50000:0x51000]))
        verdict = bench.judge(data[:at] + data[at + PAGE :])
        assert_found(verdict, f"the dump ends at {len(data) - PAGE:#x}")
        assert verdict.bytes_missing == PAGE
        assert verdict.wrong_ranges[0].note == "holds what belongs at 0x51000"
        assert verdict.wrong_ranges[0].range.align_outward(PAGE).start == 0x50000
        assert len(verdict.wrong_ranges) < 20, "all that is shifted alike is one range in each region"

    @pytest.mark.parametrize("size", [1, PAGE])
    def test_a_pt_load_shortened(self, bench, size):
        first = bench.core.loads[0]
        bench.core.loads[0] = replace(first, data=first.data[:-size])
        end = len(first.data)
        verdict = bench.judge()
        assert_found(verdict, f"no PT_LOAD covers K1's {end - size:#x}-{end:#x}")
        assert verdict.bytes_missing == size

    def test_a_pt_load_missing(self, bench):
        gone = bench.core.loads.pop()
        verdict = bench.judge()
        assert_found(verdict, f"no PT_LOAD covers K1's {gone.paddr:#x}-")
        assert verdict.bytes_missing == len(gone.data)

    def test_overlapping_pt_loads(self, bench):
        first = bench.core.loads[0]
        again = replace(first, paddr=0x10000, vaddr=first.vaddr + 0x10000, data=first.data[0x10000:0x20000])
        bench.core.loads.append(again)
        assert_found(bench.judge(), "PT_LOADs cover 0x10000-0x20000 more than once")

    def test_the_region_is_not_k1_s(self, bench):
        bench.core.loads.append(Part(PT_LOAD, vaddr=KERNEL_BASE + 9 * MIB, paddr=9 * MIB, data=bytes(PAGE)))
        assert_found(bench.judge(), r"PT_LOADs cover what is no memory of K1's: 0x900000-0x901000")

    def test_memory_without_bytes(self, bench):
        bench.core.loads[0] = replace(bench.core.loads[0], memory_size=len(bench.core.loads[0].data) + PAGE)
        assert_found(bench.judge(), r"PT_LOAD at 0x0: 0x[0-9a-f]+ bytes of 0x")

    def test_a_virtual_address_elsewhere(self, bench):
        bench.core.loads[-1] = replace(bench.core.loads[-1], vaddr=0xC000000000000000)
        assert_found(bench.judge(), "has virtual address 0xc000000000000000")

    @pytest.mark.parametrize(("machine", "kind"), [(62, 4), (21, 2)], ids=["x86_64", "executable"])
    def test_a_file_of_another_kind(self, bench, machine, kind):
        bench.core = core_of(bench.plan, bench.memory, machine=machine, kind=kind)
        assert_found(bench.judge(), "not a ppc64 core")

    def test_the_plan_of_another_region(self, bench):
        assert_found(
            bench.judge(reserved=Range(8 * MIB, 21 * MIB)), "the plan's reserved region 0x800000-0x1600000 is not the kernel's"
        )

    @pytest.mark.parametrize(
        "data", [b"", b"\x7fELF", b"not a dump at all" * 100, bytes(4096)], ids=["empty", "magic", "text", "zeros"]
    )
    def test_not_a_dump(self, bench, data):
        verdict = bench.judge(data)
        assert_found(verdict, "not an ELF file|ELF header is cut off")
        assert verdict.bytes_missing == verdict.k1_bytes
        assert verdict.bytes_compared == 0
        assert not verdict.nonce_found

    def test_cut_short_at_every_interesting_place(self, bench):
        data = bench.core.to_bytes()
        headers = 64 + 56 * (1 + len(bench.core.loads))
        starts, at = [], headers
        for size in (len(bench.core.notes), *(len(load.data) for load in bench.core.loads)):
            starts.append(at)
            at += size
        assert at == len(data)
        cuts = {0, 1, 4, 16, 63, 64, 65, 64 + 56, headers - 1, headers, len(data) - 1}
        cuts |= {start + delta for start in starts for delta in (-1, 0, 1, 0x80, 0x100, PAGE)}
        for cut in sorted(cuts):
            verdict = bench.judge(data[:cut])
            assert not verdict.passed, hex(cut)
            assert verdict.problems, hex(cut)
            assert verdict.bytes_missing == verdict.k1_bytes - max(0, min(verdict.k1_bytes, cut - starts[1])), hex(cut)


class TestAnotherCrash:
    def test_another_run_s_dump(self, bench):
        verdict = bench.judge(nonce=bytes(reversed(NONCE)), panic="Kernel panic - not syncing: Fatal exception")
        assert not verdict.nonce_found
        assert not verdict.panic_found
        assert_found(verdict, "this run's nonce is not in the dump")
        assert_found(verdict, "this crash's panic message is not in the dump: 'Kernel panic - not syncing: Fatal exception'")

    @pytest.mark.parametrize(
        ("mark", "size", "problem"), [(0x310000, len(NONCE), "nonce"), (0x320000, len(PANIC), "panic message")]
    )
    def test_a_mark_that_memory_should_hold_and_the_dump_does_not(self, bench, mark, size, problem):
        bench.core.write(mark, bytes(size))
        assert_found(bench.judge(), problem)

    def test_no_panic_was_seen(self, bench):
        verdict = bench.judge(panic="")
        assert not verdict.panic_found
        assert_found(verdict, "panic message is not in the dump")

    def test_another_kernel(self, bench):
        verdict = bench.judge(release="6.12.0")
        assert_found(verdict, f"VMCOREINFO is of kernel {RELEASE}, K1 was 6.12.0")
        assert not verdict.registers_ok

    def test_another_task(self, bench):
        verdict = bench.judge(crashed_pid=4711)
        assert_found(verdict, r"no CPU's registers belong to the task that crashed \(pid 4711\)")
        assert not verdict.registers_ok

    def test_registers_outside_of_the_kernel(self, bench):
        bench.core.notes = notes(nip=KERNEL_BASE + 0x300000)
        assert_found(bench.judge(), r"no CPU's registers belong to the task that crashed \(pid 1\)")

    def test_no_registers(self, bench):
        bench.core.notes = notes(pids=())
        assert_found(bench.judge(), "the dump has the registers of 0 CPUs, the machine had 2")

    def test_one_cpu_s_registers_are_missing(self, bench):
        bench.core.notes = notes(pids=(PID,))
        assert_found(bench.judge(), "the dump has the registers of 1 CPUs, the machine had 2")

    def test_registers_that_k1_never_saved(self, bench):
        bench.core.notes = notes(nip=KERNEL_BASE + 0x4321)
        assert_found(bench.judge(), "registers in the dump are not those K1 saved when it died")

    def test_no_vmcoreinfo(self, bench):
        whole = notes()
        bench.core.notes = whole[: whole.index(b"VMCOREINFO") - 12]
        assert_found(bench.judge(), "no VMCOREINFO note")

    @pytest.mark.parametrize("text", [b"OSRELEASE", b"\xff=1", b"PAGESIZE=1"])
    def test_a_vmcoreinfo_that_is_none(self, bench, text):
        bench.core.notes = bench.core.notes.replace(f"OSRELEASE={RELEASE}\n".encode(), text.ljust(31, b"x")[:31])
        assert not bench.judge().passed

    def test_big_endian(self, bench):
        for buffer, note in zip(bench.plan.notes[1:], prstatus_notes((PID, 0), byteorder="big"), strict=True):
            bench.memory[buffer.start : buffer.start + len(note)] = note
        bench.core = core_of(bench.plan, bench.memory, byteorder="big")
        bench.core.notes = notes(byteorder="big")
        bench.truth = truth_of(bench.plan, bench.memory, bench.directory)
        assert bench.judge().passed


class TestWhoCrashed:
    """The registers in a dump, where the drill knows more of them than the task's number."""

    def with_notes(self, bench, *notes, vmcoreinfo=None):
        """K1 saved these, in each CPU's buffer, and the dump has them."""
        memory = bytearray(bench.memory)
        for buffer, note in zip(bench.plan.notes[1:], notes, strict=True):
            memory[buffer.start : buffer.start + len(note)] = note
        bench.core = core_of(bench.plan, memory)
        info = bench.core.notes[bench.core.notes.index(b"VMCOREINFO") - 12 :]
        bench.core.notes = b"".join(notes) + info
        return {"memory": truth_of(bench.plan, memory, bench.directory).memory}

    def test_on_the_right_cpu(self, bench):
        truth = self.with_notes(bench, *prstatus_notes((0, PID)))
        assert bench.judge(**truth, crashed_cpu=1).passed
        assert_found(bench.judge(**truth, crashed_cpu=0), "the registers of the task that crashed .* are not those of CPU 0")

    def test_a_crash_without_a_word(self, bench):
        assert bench.judge(panic="", says_why=False).passed
        assert not bench.judge(panic="").passed, "unless it was to say something"

    def test_whoever_it_was(self, bench):
        truth = self.with_notes(bench, *prstatus_notes((7, 9)))
        assert bench.judge(**truth, crashed_pid=None).passed
        assert_found(bench.judge(**truth), f"no CPU's registers belong to the task that crashed .pid {PID}.")

    def test_whoever_it_was_it_was_a_kernel(self, bench):
        truth = self.with_notes(bench, *prstatus_notes((7, 9), nip=0x10000))
        assert_found(bench.judge(**truth, crashed_pid=None), "a CPU's registers are none of a kernel: it was at 0x10000")

    def test_registers_that_the_host_saw(self, bench):
        nip = KERNEL_BASE + 0x1234
        seen = {"nip": nip, "gpr1": 0, "link": 0}
        assert bench.judge(crashed_pid=None, registers=(seen, seen)).passed
        verdict = bench.judge(crashed_pid=None, registers=(seen, seen | {"gpr1": 0x77}))
        assert_found(verdict, "no CPU has the registers that one had when K1 was made to die: gpr1 is 0x0, was 0x77")
        assert not verdict.registers_ok

    def test_of_all_that_is_known_each_must_be_right(self, bench):
        wrong = ({"nip": 0}, {"nip": KERNEL_BASE + 0x1234})
        assert not bench.judge(registers=wrong).passed
        assert not bench.judge(registers=wrong[::-1]).passed


class TestExemptions:
    def count(self, bench, value: bytes, at: int = VPA + 0x100) -> None:
        bench.core.write(at, value)

    def test_a_vpa_s_dispatch_count_that_went_up(self, bench):
        self.count(bench, (44).to_bytes(4, "big"))
        verdict = bench.judge()
        assert verdict.passed
        assert verdict.exempt == [Exemption(Range(VPA + 0x100, VPA + 0x104), "VPA dispatch count, 41 to 44", 1)]

    @pytest.mark.parametrize("count", [41 + 17, 1 << 24])
    def test_a_count_that_went_up_too_far_is_damage(self, bench, count):
        self.count(bench, count.to_bytes(4, "big"))
        assert not bench.judge().passed

    def test_no_more_counts_than_cpus(self, bench):
        for vpa in (VPA, VPA + 0x400, VPA + 0x800):
            bench.memory[vpa : vpa + 4] = b"\xd3\x97\xd7\x81"
            bench.memory[vpa + 0x100 : vpa + 0x104] = (7).to_bytes(4, "big")
        bench.core = core_of(bench.plan, bench.memory)
        bench.truth = truth_of(bench.plan, bench.memory, bench.directory)
        for vpa in (VPA, VPA + 0x400, VPA + 0x800):
            self.count(bench, (8).to_bytes(4, "big"), vpa + 0x100)
        verdict = bench.judge()
        assert len(verdict.exempt) == 2
        assert verdict.bytes_wrong == 1

    def test_bare_metal_has_no_hypervisor_to_count(self, tmp_path):
        bench = Bench(tmp_path, "reserved", opal=True)
        self.count(bench, (44).to_bytes(4, "big"))
        assert not bench.judge().passed

    def test_across_a_carry(self, bench):
        bench.memory[VPA + 0x100 : VPA + 0x104] = (0xFF).to_bytes(4, "big")
        bench.core = core_of(bench.plan, bench.memory)
        bench.truth = truth_of(bench.plan, bench.memory, bench.directory)
        self.count(bench, (0x100).to_bytes(4, "big"))
        verdict = bench.judge()
        assert verdict.passed
        assert verdict.exempt[0].changed == 2

    @pytest.mark.parametrize("value", [40, 0])
    def test_a_count_that_went_down_is_damage(self, bench, value):
        self.count(bench, value.to_bytes(4, "big"))
        verdict = bench.judge()
        assert not verdict.passed
        assert verdict.bytes_wrong == 1
        assert verdict.exempt == []

    @pytest.mark.parametrize("paddr", [VPA + 0xFF, VPA + 0x104, VPA + 0x500, VPA + 4])
    def test_only_these_four_bytes(self, bench, paddr):
        self.count(bench, (44).to_bytes(4, "big"))
        bench.flip(paddr)
        verdict = bench.judge()
        assert not verdict.passed
        assert verdict.bytes_wrong == 1
        assert verdict.wrong_ranges[0].range == Range(paddr, paddr + 1)
        assert len(verdict.exempt) == 1

    @pytest.mark.parametrize("at", [VPA, VPA + 3])
    def test_only_with_the_eye_catcher_in_k1_s_memory(self, bench, tmp_path, at):
        bench.memory[at] ^= 0xFF
        bench.core = core_of(bench.plan, bench.memory)
        bench.truth = truth_of(bench.plan, bench.memory, tmp_path)
        self.count(bench, (44).to_bytes(4, "big"))
        verdict = bench.judge()
        assert not verdict.passed
        assert verdict.exempt == []

    def test_an_eye_catcher_that_only_the_dump_has_is_damage(self, bench):
        bench.core.write(0x38000, b"\xd3\x97\xd7\x81")
        bench.core.write(0x38100, b"\xff\xff\xff\xff")
        verdict = bench.judge()
        assert verdict.exempt == []
        assert verdict.bytes_wrong >= 4

    def test_only_where_a_vpa_can_be(self, bench, tmp_path):
        """A VPA is as long as its alignment: 0x400 bytes."""
        bench.memory[VPA + 0x200 : VPA + 0x204] = b"\xd3\x97\xd7\x81"
        bench.memory[VPA + 0x300 : VPA + 0x304] = (1).to_bytes(4, "big")
        bench.core = core_of(bench.plan, bench.memory)
        bench.truth = truth_of(bench.plan, bench.memory, tmp_path)
        self.count(bench, (2).to_bytes(4, "big"), VPA + 0x300)
        verdict = bench.judge()
        assert verdict.bytes_wrong == 1
        assert verdict.exempt == []

    def test_opal_s_own_memory_on_bare_metal(self, tmp_path):
        bench = Bench(tmp_path, "reserved", opal=True)
        bench.flip(23 * MIB + 0x123, 7)
        verdict = bench.judge()
        assert verdict.passed
        assert [(e.what, e.changed) for e in verdict.exempt] == [("OPAL", 7)]
        assert Range(23 * MIB, 23 * MIB + 0x20000).contains(verdict.exempt[0].range)

    @pytest.mark.parametrize("paddr", [23 * MIB - 1, 23 * MIB + 0x20000])
    def test_right_beside_opal_counts(self, tmp_path, paddr):
        bench = Bench(tmp_path, "reserved", opal=True)
        bench.flip(paddr)
        verdict = bench.judge()
        assert not verdict.passed
        assert verdict.wrong_ranges[0].range == Range(paddr, paddr + 1)

    def test_opal_excuses_nothing_beside_it_in_the_same_block(self, tmp_path):
        bench = Bench(tmp_path, "reserved", opal=True)
        bench.flip(23 * MIB + 0x7FF)
        bench.flip(23 * MIB + 0x801)
        verdict = bench.judge(firmware=(Region("OPAL", Range(23 * MIB + 0x800, 23 * MIB + 0x20000)),))
        assert not verdict.passed
        assert 23 * MIB + 0x7FF in verdict.wrong_ranges[0].range

    @pytest.mark.parametrize("name", ["RTAS", "TCE /pci@1", "opal", "OPAL2", "ibm,hbrt-code-image", "reserved"])
    def test_only_opal_s(self, tmp_path, name):
        bench = Bench(tmp_path, "reserved", opal=True)
        bench.plan = with_firmware(bench.plan, Region(name, Range(23 * MIB, 23 * MIB + 0x20000)))
        bench.flip(23 * MIB + 0x123)
        verdict = bench.judge(firmware=(Region(name, Range(23 * MIB, 23 * MIB + 0x20000)),))
        assert not verdict.passed
        assert verdict.exempt == []
        assert name in verdict.wrong_ranges[0].what

    def test_what_the_plan_calls_opal_excuses_nothing(self, bench):
        """The plan comes from the code under test."""
        bench.plan = with_firmware(bench.plan, Region("OPAL", Range(22 * MIB, 24 * MIB)))
        bench.flip(23 * MIB)
        assert not bench.judge().passed


class TestPlaces:
    def test_in_the_words_of_a_report(self):
        plan = tiny_plan()
        moved = plan.kept[0].location
        assert describe_place(0x10, plan) == f"K1's first 0x100 bytes, K1 text, moved to {moved + 0x10:#x}"
        assert describe_place(23 * MIB, plan) == "K1 memory"
        assert describe_place(23 * MIB, with_firmware(plan, Region("RTAS", Range(23 * MIB, 24 * MIB)))) == "RTAS"


class TestHostile:
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_random_corruption_of_the_headers_never_raises(self, bench, data):
        blob = bytearray(bench.core.to_bytes())
        end = 64 + 56 * (1 + len(bench.core.loads)) + len(bench.core.notes)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, end - 1))
            value = data.draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)) | st.integers(0, 255))
            size = data.draw(st.sampled_from((1, 2, 4, 8)))
            blob[at : at + size] = bytes([value]) * size
        changed = bytes(blob) != bench.core.to_bytes()
        verdict = bench.judge(bytes(blob))
        if verdict.passed and changed:
            # what the verdict does not look at: padding, flags, registers but pid and nip, the entry point …
            assert verdict.bytes_compared == verdict.k1_bytes

    @settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.binary(max_size=300), st.sampled_from((b"", b"\x7fELF\x02\x01\x01", b"\x7fELF\x02\x02\x01")))
    def test_noise_never_raises(self, bench, noise, start):
        assert not bench.judge(start + noise).passed

    def test_thousands_of_forged_pt_loads_take_seconds_at_most(self, bench):
        part = Part(PT_LOAD, vaddr=KERNEL_BASE, paddr=0, data=b"x")
        bench.core.loads = [replace(part, paddr=2 * n, vaddr=KERNEL_BASE + 2 * n) for n in range(1500)]
        verdict = bench.judge()
        assert not verdict.passed
        assert len("".join(verdict.problems)) < 1 << 16

    def test_it_is_an_error_of_ours_only_when_the_truth_is_missing(self, bench):
        bench.truth.memory.unlink()
        with pytest.raises((OSError, CrashkernelError)):
            bench.judge()


def test_the_marks_of_the_builder_are_what_the_tests_assume():
    plan = tiny_plan()
    memory = memory_of(plan)
    assert len(memory) == 24 * MIB
    assert NONCE in memory
    assert PID == 1
    assert plan.kept[0].range.end == 4 * MIB
