"""The rogue device: where it may be aimed, what it writes, and how the pages it was given are counted apart."""

import json
import time
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.cli import main
from crashkernel.drill import guest_driver
from crashkernel.drill.debian import Kernel
from crashkernel.drill.dma import (
    BUFFERS,
    LINE,
    MARK,
    REGIONS,
    WHENS,
    Dma,
    DmaReport,
    RogueDevice,
    choose_targets,
    driver_command,
    report_lines,
    writes,
)
from crashkernel.drill.faults import Ending, parse_fault
from crashkernel.drill.guest_driver import ELSEWHERE, Buffer, Holding, parse_wanted, take_all
from crashkernel.drill.ram import places
from crashkernel.drill.record import dma_record, evidence_json, judge_kept, outcome_record
from crashkernel.drill.request import DrillRequest, Supplies
from crashkernel.drill.scenario import Outcome, Scenario
from crashkernel.drill.verdict import Verdict, judge
from crashkernel.errors import StageFailed, UsageError
from crashkernel.machine import HEAD_SIZE, Region
from crashkernel.memory import Range, RangeSet
from crashkernel.placement.plan import PLACEMENTS, Hazard
from support.cores import core_of, memory_of, tiny_plan, truth_of
from support.machines import MIB

PAGE = 0x10000
PAGES = (Range(0x140000, 0x150000), Range(0x160000, 0x170000))
"""What K1 gave out of its freed init (0x100000-0x180000 of the tiny plan)."""


def plan_of(placement="zero"):
    return tiny_plan(placement)


class TestRegions:
    @pytest.mark.parametrize("placement", PLACEMENTS)
    @pytest.mark.parametrize("name", REGIONS)
    def test_each_lies_in_memory_and_on_its_side_of_the_region(self, placement, name):
        plan = plan_of(placement)
        region = REGIONS[name]
        where = region.where(plan)
        assert bool(where) == (name != "memory"), "memory is any page"
        assert not where - plan.memory
        inside = where & RangeSet([plan.reserved])
        assert not inside if region.k1 else inside == where

    @pytest.mark.parametrize(("name", "title"), [("text", "K1 text"), ("init", "K1 freed init"), ("data", "K1 data")])
    def test_those_of_k1_s_image_are_its_own_words(self, name, title):
        plan = plan_of()
        assert REGIONS[name].where(plan) == RangeSet(r.range for r in plan.k1_layout if r.name == title)

    def test_slack_is_all_behind_the_image_that_becomes_k2_s_at_zero(self):
        plan = plan_of("zero")
        image = RangeSet(region.range for region in plan.k1_layout)
        assert REGIONS["slack"].where(plan) == plan.exposed - image
        assert REGIONS["slack"].where(plan)

    def test_slack_is_the_same_place_where_none_of_it_becomes_k2_s(self):
        plan = plan_of("reserved")
        end = max(region.range.end for region in plan.k1_layout)
        assert REGIONS["slack"].where(plan) == RangeSet([Range(end, end + 2 * MIB)])

    def test_slack_ends_where_the_reserved_region_begins(self):
        plan = plan_of("zero")
        layout = (*plan.k1_layout, Region("K1 data", Range(plan.reserved.start - PAGE, plan.reserved.start)))
        assert not REGIONS["slack"].where(replace(plan, k1_layout=layout))

    def test_a_plan_that_does_not_know_k1_s_image_has_none_of_it(self):
        plan = replace(plan_of(), k1_layout=())
        assert not any(REGIONS[name].where(plan) for name in ("text", "init", "data", "slack"))

    def test_k2_s_image_is_without_the_free_memory_behind_it(self):
        plan = plan_of()
        (image,) = REGIONS["image"].where(plan)
        assert image.start == plan.segment("kernel").range.start
        assert image.size == plan.kernel_span < plan.segment("kernel").range.size


class TestTargets:
    def test_given_out_pages_are_those_k1_gave_out(self):
        given = {"init": PAGES, "slack": (), ELSEWHERE: (Range(0x500000, 0x510000),)}
        targets = choose_targets(Dma(("init", "slack")), plan_of(), given)
        assert targets == {"init": PAGES, "slack": (), ELSEWHERE: given[ELSEWHERE]}

    @pytest.mark.parametrize("name", ["text", "data"])
    def test_static_buffers_are_whole_pages_of_the_region(self, name):
        plan = plan_of()
        targets = choose_targets(Dma((name,)), plan, {})[name]
        assert 0 < len(targets) <= BUFFERS
        assert list(targets) == sorted(set(targets))
        assert all(each.size == PAGE and each.start % PAGE == 0 for each in targets)
        assert not RangeSet(targets) - REGIONS[name].where(plan)

    def test_no_static_buffer_lies_where_k1_keeps_what_the_verdict_looks_for(self):
        plan = plan_of()
        text = REGIONS["text"].where(plan)
        for seed in range(20):
            targets = RangeSet(choose_targets(Dma(("text",), seed=seed), plan, {}, [Range(0x2FFF8, 0x30008)])["text"])
            assert targets == text - RangeSet([Range(0, PAGE), Range(0x20000, 0x40000)]), "all the others: there are few"
            assert not targets.overlaps(Range(0, HEAD_SIZE))

    def test_another_seed_another_choice(self):
        plan = replace(plan_of(), k1_layout=(Region("K1 data", Range(0, 0x400000)),))
        chosen = [choose_targets(Dma(("data",), seed=seed), plan, {})["data"] for seed in (1, 1, 2)]
        assert chosen[0] == chosen[1] != chosen[2]
        assert len(chosen[0]) == BUFFERS

    def test_the_reserved_region_is_one_target(self):
        plan = plan_of()
        assert choose_targets(Dma(("reserved",)), plan, {})["reserved"] == (plan.reserved,)

    def test_its_own_is_k1_s_memory_only(self):
        report = DmaReport(Dma(("init", "reserved")), targets={"init": PAGES, "reserved": (Range(0x800000, 0x900000),)})
        assert report.own == RangeSet(PAGES)
        assert report.all_targets == (*PAGES, Range(0x800000, 0x900000))

    def test_the_driver_is_told_where(self):
        plan = plan_of()
        count, *regions = driver_command(Dma(("init", "text", "memory")), plan).split()
        assert (int(count), len(regions)) == (BUFFERS, 2)
        assert parse_wanted(regions) == {"init": ((0x100000, 0x180000),), "memory": ()}


class TestWrites:
    targets = (Range(0x10000, 0x11000), Range(0x20000, 0x20000 + LINE), Range(0x30000, 0x50000))

    @given(st.integers())
    def test_each_stays_in_one_target_and_is_whole_marked_lines(self, seed):
        numbers = []
        for address, data in islice(writes(self.targets, seed), 50):
            assert address % LINE == 0
            assert any(target.contains(Range.sized(address, len(data))) for target in self.targets)
            assert 64 <= len(data) <= 4096
            lines = [data[at : at + LINE] for at in range(0, len(data), LINE)]
            assert all(len(line) == LINE and line.startswith(MARK) for line in lines)
            numbers += [int.from_bytes(line[len(MARK) : len(MARK) + 8], "big") for line in lines]
        assert numbers == list(range(1, len(numbers) + 1))

    def test_they_reach_every_line_of_every_target(self):
        some = list(islice(writes(self.targets[:2], 0), 2000))
        reached = RangeSet(Range.sized(address, len(data)) for address, data in some)
        assert reached == RangeSet(self.targets[:2])

    def test_the_same_seed_the_same_writes(self):
        first, again, other = (list(islice(writes(self.targets, seed), 20)) for seed in (7, 7, 8))
        assert first == again != other

    def test_a_device_without_a_target(self):
        with pytest.raises(ValueError, match="without a target"):
            next(writes((), 0))


class TestDevice:
    @pytest.fixture
    def ram(self, tmp_path):
        path = tmp_path / "ram"
        path.write_bytes(bytes(MIB))
        return path

    def report(self, when="both"):
        return DmaReport(
            Dma(("init",), rate=100_000, when=when), targets={"init": (Range(0x10000, 0x20000), Range(0x40000, 0x50000))}
        )

    def until_it_wrote(self, device, more_than=0):
        deadline = time.monotonic() + 60
        while device.writes <= more_than:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def test_it_writes_its_targets_and_nothing_else_and_counts(self, ram):
        report = self.report()
        device = RogueDevice(ram, report)
        device.k1_is_dead()
        self.until_it_wrote(device, 20)
        device.k2_runs(RangeSet([Range(0x40000, 0x80000)]))
        self.until_it_wrote(device, device.writes + 20)
        device.stop()
        device.account(report)
        expected = bytearray(MIB)
        pages = Counter()
        plan = writes(report.all_targets, 0)
        for address, data in islice(plan, report.writes):
            expected[address : address + len(data)] = data
            pages[address // PAGE * PAGE] += 1
        assert ram.read_bytes() == expected
        assert report.per_page == pages
        assert report.writes == sum(pages.values()) == device.writes
        assert 0 < report.writes_into_k2 <= pages[0x40000]
        assert report.bytes_written >= LINE * report.writes

    @pytest.mark.parametrize("when", WHENS)
    def test_it_writes_when_it_is_told_to(self, ram, when):
        report = self.report(when)
        device = RogueDevice(ram, report)
        device.k1_is_dead()
        if when != "k2":
            self.until_it_wrote(device)
        during_handover = device.writes
        device.k2_runs(RangeSet())
        if when != "handover":
            self.until_it_wrote(device, during_handover)
        before = device.writes
        device.stop()
        device.stop()
        assert bool(during_handover) == (when != "k2")
        if when == "handover":
            assert device.writes == before, "it ended with the handover"

    def test_nothing_was_written_before_it_began(self, ram):
        device = RogueDevice(ram, self.report())
        device.stop()
        assert not any(ram.read_bytes())

    def test_a_device_that_never_wrote_or_died_early_says_so(self, ram, tmp_path):
        report = self.report()
        device = RogueDevice(ram, report)
        device.stop()
        device.account(report)
        assert report.problem == "the device never wrote"
        device = RogueDevice(tmp_path / "nowhere", report)
        device.k1_is_dead()
        device.k2_runs(RangeSet())
        device.stop()
        device.account(report)
        assert "No such file" in report.problem
        assert any("prove nothing" in line for line in report_lines(report))

    def test_memory_that_cannot_be_written_is_no_crash(self, tmp_path):
        report = self.report()
        device = RogueDevice(tmp_path / "gone", report)
        device.k1_is_dead()
        device.stop()
        device.account(report)
        assert report.writes == 0
        assert isinstance(device.error, FileNotFoundError)


class TestVerdict:
    """The tiny plan's K1 gave out two pages of its freed init."""

    @pytest.fixture(params=PLACEMENTS)
    def bench(self, request, tmp_path):
        plan = plan_of(request.param)
        memory = memory_of(plan)
        return plan, core_of(plan, memory), truth_of(plan, memory, tmp_path, device_buffers=RangeSet(PAGES)), tmp_path

    def judge(self, bench):
        plan, core, truth, directory = bench
        (directory / "vmcore").write_bytes(core.to_bytes())
        return judge(directory / "vmcore", truth, plan)

    def spoil(self, bench, paddr, size=1):
        core = bench[1]
        core.write(paddr, bytes(byte ^ 0x5A for byte in core.read(paddr, size)))

    def fill(self, bench, where):
        """The device fills whole lines of `where`; how many bytes differ then."""
        core = bench[1]
        differ = 0
        for start in range(where.start, where.end, LINE):
            line = next(writes((Range.sized(start, LINE),), start))[1]
            differ += sum(a != b for a, b in zip(core.read(start, LINE), line, strict=True))
            core.write(start, line)
        return differ

    def test_what_it_wrote_in_its_own_buffers_may_differ_and_is_counted(self, bench):
        differ = self.fill(bench, Range.sized(PAGES[0].start, LINE))
        differ += self.fill(bench, Range(PAGES[1].end - 3 * LINE, PAGES[1].end))
        verdict = self.judge(bench)
        assert verdict.passed
        assert differ > LINE
        assert (verdict.bytes_in_device_buffers, verdict.bytes_wrong, verdict.wrong_ranges) == (differ, 0, [])

    def test_a_buffer_s_bytes_that_it_did_not_write_are_wrong(self, bench):
        """A handover that lost just these pages is a bad one."""
        core = bench[1]
        lost = sum(byte != 0 for byte in core.read(PAGES[0].start, PAGES[0].size))
        core.write(PAGES[0].start, bytes(PAGES[0].size))
        verdict = self.judge(bench)
        assert not verdict.passed
        assert (verdict.bytes_in_device_buffers, verdict.bytes_wrong) == (0, lost)

    def test_a_device_that_proves_nothing_makes_no_pass(self, bench):
        plan, core, truth, directory = bench
        verdict = self.judge((plan, core, replace(truth, device_problem="the device never wrote"), directory))
        assert not verdict.passed
        assert "the device never wrote" in verdict.problems

    @pytest.mark.parametrize("paddr", [PAGES[0].start - 1, PAGES[0].end, PAGES[1].start - 1, PAGES[1].end])
    def test_a_byte_next_to_a_buffer_is_wrong(self, bench, paddr):
        self.spoil(bench, paddr)
        verdict = self.judge(bench)
        assert not verdict.passed
        assert (verdict.bytes_in_device_buffers, verdict.bytes_wrong) == (0, 1)
        assert verdict.wrong_ranges[0].range == Range(paddr, paddr + 1)

    def test_a_stretch_across_the_end_is_wrong_behind_it(self, bench):
        plan, core, truth, directory = bench
        inside = Range(PAGES[0].start + 0x800, PAGES[0].start + 0x900)  # a buffer smaller than what is compared at once
        whole = self.fill(bench, Range(inside.start - LINE, inside.end + LINE))
        verdict = self.judge((plan, core, replace(truth, device_buffers=RangeSet([inside])), directory))
        assert verdict.bytes_in_device_buffers + verdict.bytes_wrong == whole
        assert 0 < verdict.bytes_wrong <= 2 * LINE < verdict.bytes_in_device_buffers <= inside.size
        assert not verdict.passed

    def test_without_a_device_nothing_is_excused(self, bench):
        plan, core, truth, directory = bench
        self.spoil(bench, PAGES[0].start)
        verdict = self.judge((plan, core, replace(truth, device_buffers=RangeSet()), directory))
        assert verdict.bytes_wrong == 1

    def test_what_the_device_wrote_elsewhere_is_told_by_its_mark(self, bench):
        core = bench[1]
        core.write(0x50000, next(writes((Range(0x50000, 0x50000 + LINE),), 0))[1])
        assert self.judge(bench).wrong_ranges[0].note == "the rogue device wrote there"

    def test_a_kept_drill_is_judged_with_the_same_buffers(self, bench):
        plan, core, truth, directory = bench
        differ = self.fill(bench, Range.sized(PAGES[0].start, LINE))
        (directory / "vmcore").write_bytes(core.to_bytes())
        (directory / "plan.json").write_text(plan.to_json())
        (directory / "evidence.json").write_text(evidence_json(truth))
        verdict = judge_kept(directory)
        assert verdict.passed
        assert verdict.bytes_in_device_buffers == differ
        (directory / "evidence.json").write_text(evidence_json(replace(truth, device_problem="the device never wrote")))
        assert not judge_kept(directory).passed


class TestReport:
    hazard = Hazard("freed-init", "K1's freed init pages", "dangerous", "two pages are a driver's.")

    def report(self, **changes):
        values = {
            "wanted": {"init": RangeSet([Range(0x100000, 0x180000)])},
            "targets": {"init": PAGES, ELSEWHERE: (Range(0x500000, 0x510000),)},
            "pages_looked_at": 20_000,
            "page_size": PAGE,
            "hazards": {"init": self.hazard},
            "writes": 1234,
            "bytes_written": 4 * MIB,
            "writes_into_k2": 1000,
            "per_page": {0x160000: 34, 0x140000: 1200},
            "effect": "K2 did not come up",
        }
        return DmaReport(Dma(("init",)), **(values | changes))

    def test_the_record(self):
        record = json.loads(json.dumps(dma_record(self.report())))
        assert record["regions"] == [
            {
                "name": "init",
                "where": ["0x100000-0x180000"],
                "targets": ["0x140000-0x150000", "0x160000-0x170000"],
                "plan_had_said": {"hazard": "freed-init", "verdict": "dangerous", "reason": "two pages are a driver's."},
            }
        ]
        assert record["elsewhere"] == ["0x500000-0x510000"]
        assert list(record["writes_by_page"].items()) == [("0x140000", 1200), ("0x160000", 34)]
        assert (record["writes"], record["writes_into_k2"], record["effect"]) == (1234, 1000, "K2 did not come up")

    def test_a_drill_without_dma_says_so(self):
        kernel = Kernel("test", "6.1", None, None)
        outcome = Outcome(Scenario(DrillRequest(), Supplies(kernel, kernel, None)), failure=StageFailed("load", "no"))
        record = outcome_record(outcome)
        assert record["dma"] is None
        assert record["quarantine"] is True

    def test_the_lines(self):
        report = self.report()
        report.k2_ran = True
        assert report_lines(report) == [
            "init (K1's freed init): K1 gave out 2 pages of 0x100000-0x180000; 20,000 pages were looked at",
            "the plan had said of K1's freed init pages: DANGEROUS: two pages are a driver's.",
            "1 other page that K1 gave out: 0x500000-0x510000",
            "1,234 writes, 4 MiB, during the handover and while K2 ran; 1,000 of them into K2's memory after it was entered",
            "damage: K2 did not come up",
        ]

    def test_a_device_that_was_never_aimed(self):
        assert report_lines(self.report(targets={})) == ["damage: K2 did not come up"]

    def test_no_page_was_to_be_had(self):
        lines = report_lines(self.report(targets={"init": ()}, hazards={}))
        assert lines[0].startswith("init (K1's freed init): K1 gave out no page of 0x100000-0x180000")
        assert len(lines) == 3


class TestEffect:
    """What is said of the writes, by how far the drill came and what the console holds."""

    started = "[    0.000000] Linux version 6.1\n"
    dead = "[   10.000000] Kernel panic - not syncing: sysrq triggered crash\n"
    entered = "crashkernel: 12/12 enter K2 at 0x0\n"

    def effect(self, console, failure=None, into_k2=0, **verdict):
        fault = parse_fault("dma:init")
        fault.report.writes, fault.report.writes_into_k2 = max(1, into_k2), into_k2
        ending = Ending(console, {}, verdict=Verdict(**verdict) if verdict else None, failure=failure)
        assert not fault.conclude(ending), "a device excuses nothing"
        assert fault.told == fault.report.effect
        return fault.told

    def test_a_device_that_never_wrote_shows_nothing(self):
        fault = parse_fault("dma:init")
        fault.conclude(Ending(self.started, {}, verdict=Verdict()))
        assert not fault.told
        assert fault.report.effect

    def test_the_purgatory_found_it(self):
        told = "crashkernel: 9/12 check 0x1000-0x2000: kernel DAMAGED, rebooting"
        failure = StageFailed("handover", told)
        assert self.effect(self.started + self.dead + told + "\n", failure).endswith(f"did not enter K2: {told}")

    def test_k2_complained(self):
        oops = "[    1.000000] BUG: Unable to handle kernel data access"
        console = f"{self.started}{self.dead}{self.entered}{self.started}{oops}\n[    2.0] Kernel panic - not syncing: x\n"
        said = self.effect(console, StageFailed("K2 boot", "Kernel panic - not syncing: x"))
        assert said == f"K2 did not come up; its first complaint: {oops}"

    def test_k2_said_nothing_and_k1_s_panic_is_not_its(self):
        failure = StageFailed("K2 boot", "K2 printed nothing for 60 s")
        said = self.effect(self.started + self.dead + self.entered, failure)
        assert said == "K2 did not come up: K2 printed nothing for 60 s"

    def test_k2_could_not_save(self):
        console = self.started + self.dead + self.entered + self.started
        assert self.effect(console, StageFailed("capture", "silence")) == "K2 could not save the dump: silence"

    def test_k1_s_failure_is_none_of_the_device_s(self):
        assert self.effect(self.started, StageFailed("load", "no")).startswith("nothing: the drill did not get so far")

    def test_wrong_bytes(self):
        assert self.effect(self.started, bytes_wrong=1234).startswith("1,234 bytes are wrong outside")

    def test_a_dump_that_is_not_whole(self):
        assert "not whole" in self.effect(self.started, bytes_missing=4)

    def test_none(self):
        good = {"k1_bytes": 4, "bytes_compared": 4, "bytes_in_device_buffers": 9}
        marks = dict.fromkeys(("first_256_bytes_ok", "nonce_found", "panic_found", "registers_ok"), True)
        assert self.effect(self.started, **good, **marks) == "none outside of the device's own buffers"
        assert "by luck" in self.effect(self.started, into_k2=7, **good, **marks)


def test_where_the_log_has_the_panic(tmp_path):
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(0x100) + b"panic" + bytes(0x100) + b"panic" + bytes(0x400))
    where = RangeSet([Range(0x80, 0x180), Range(0x200, 0x300)])
    assert list(places(ram, where, b"panic")) == [Range(0x100, 0x105), Range(0x205, 0x20A)]
    assert list(places(ram, RangeSet([Range(0, 0x104)]), b"panic")) == []
    assert list(places(ram, where, b"")) == []


class TestDriver:
    """What runs in K1, held against a kernel made of a list."""

    class Kernel:
        page_size = PAGE

        def __init__(self, pages, keeps_free=0):
            self.pages = list(pages)
            self.given_back = []
            self._keeps_free = keeps_free

        def free(self):
            return len(self.pages) * PAGE + self._keeps_free

        def take(self, count):
            if len(self.pages) < count:
                return None
            taken, self.pages = self.pages[:count], self.pages[count:]
            return Buffer(0, 0, tuple(taken))

        def give_back(self, buffer):
            self.given_back += buffer.pages

    def run(self, pages, wanted, count=2):
        kernel = self.Kernel(pages, keeps_free=1 << 30)
        holding = Holding(parse_wanted(wanted), count, PAGE)
        take_all(kernel, holding)
        return kernel, holding

    def test_it_takes_all_there_is_to_find_the_wanted_pages(self):
        pages = [PAGE * number for number in range(1000, 0, -1)]
        kernel, holding = self.run(pages, ["init=10000-30000"])
        assert holding.held == {"init": [0x20000, 0x10000], ELSEWHERE: []}
        assert holding.looked == 1000
        assert not kernel.pages
        assert {0x10000, 0x20000}.isdisjoint(kernel.given_back)
        assert len(kernel.given_back) > 900

    def test_it_stops_when_it_has_enough(self):
        kernel, holding = self.run([PAGE * number for number in range(1, 1000)], ["init=10000-30000"])
        assert holding.held["init"] == [0x10000, 0x20000]
        assert holding.looked == 64
        assert not kernel.given_back

    def test_pages_that_are_not_to_be_had_have_stand_ins(self):
        kernel, holding = self.run([PAGE * number for number in range(100, 1000)], ["init=10000-30000", "slack=640000-650000"])
        assert holding.held == {"init": [], "slack": [0x640000], ELSEWHERE: [0x650000, 0x660000, 0x670000]}
        assert {0x640000, 0x650000, 0x660000, 0x670000}.isdisjoint(kernel.given_back)

    def test_memory_is_stand_ins_only_and_cheap(self):
        _, holding = self.run([PAGE * number for number in range(1, 1000)], ["memory="])
        assert holding.held == {"memory": [], ELSEWHERE: [0x10000, 0x20000]}
        assert holding.looked == 64

    def test_a_page_that_reaches_over_the_end_is_not_in_the_region(self):
        _, holding = self.run([0x10000, 0x20000, 0x30000], ["init=10001-2ffff"])
        assert not holding.held["init"]

    def test_k1_without_memory(self):
        with pytest.raises(MemoryError):
            self.run([], ["init=10000-30000"])

    def test_it_leaves_k1_some(self):
        kernel = self.Kernel([PAGE * number for number in range(1, 1000)])
        holding = Holding(parse_wanted(["init=0-1"]), 1, PAGE)
        take_all(kernel, holding)
        assert len(kernel.pages) * PAGE >= guest_driver._LEFT

    @given(
        st.dictionaries(st.sampled_from(["init", "slack"]), st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 99))))
    )
    def test_regions_there_and_back(self, regions):
        words = [f"{name}={','.join(f'{start:x}-{start + size:x}' for start, size in each)}" for name, each in regions.items()]
        assert parse_wanted(words) == {n: tuple((s, s + size) for s, size in each) for n, each in regions.items()}

    @pytest.mark.parametrize("word", ["init", "init=1", "init=x-y", "init=1-2-3"])
    def test_no_region(self, word):
        with pytest.raises(ValueError, match=r".+"):
            parse_wanted([word])


class TestOptions:
    @pytest.mark.parametrize(
        ("word", "says"),
        [
            ("dma", "fault dma needs an argument"),
            ("dma:foo", "'foo' is no region"),
            ("dma:init+foo", "'foo' is no region"),
            ("dma:+", "fault dma names no region"),
            ("dma:init,rate=0", "rate=0"),
            ("dma:init,rate=-5", "rate=-5"),
            ("dma:init,rate=", "rate="),
            ("dma:init,when=never", "when=never"),
            ("dma:init,data", "'data' is not understood"),
            ("dma:init,rate=1,rate=2", "'rate=2' is not understood"),
        ],
    )
    def test_a_word_that_makes_no_sense(self, capsys, word, says):
        assert main(["drill", "--fault", word]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1

    def test_all_that_a_word_can_say(self):
        dma = parse_fault("dma:init+data+init,rate=20,when=k2", seed=7).dma
        assert dma == Dma(("init", "data"), rate=20, when="k2", seed=7)

    def test_the_regions_are_named_to_who_named_none(self):
        with pytest.raises(UsageError) as caught:
            Dma(("foo",))
        assert all(name in caught.value.hint for name in REGIONS)

    @pytest.mark.parametrize(
        ("regions", "driver"),
        [(("text", "reserved"), "none"), (("memory", "data"), "late"), (("init",), "early"), (("memory", "slack"), "early")],
    )
    def test_what_k1_needs_of_a_driver(self, regions, driver):
        assert Dma(regions).driver == driver

    def test_the_defaults(self):
        assert (Dma(("init",)).rate, Dma(("init",)).when, Dma(("init",)).seed) == (1000, "both", 0)
        assert all(before != after for before, after in pairwise(WHENS))
