"""Costs and comparison: what a placement takes and does, and which is recommended on what machine."""

import json
from dataclasses import replace

import pytest

from crashkernel.cli.planning import _drilled
from crashkernel.drill.twin import Twin
from crashkernel.machine import Pages
from crashkernel.memory import Range
from crashkernel.placement import plan_load
from crashkernel.placement.comparison import Variant, compare, recommend
from crashkernel.placement.cost import CHECK, COPY, EXCHANGE, EXCHANGE_ALTIVEC, cost_of
from crashkernel.placement.moves import Check, Copy, Exchange
from crashkernel.report.comparison import draw_comparison
from support.machines import LAYOUT, MIB, initrd, kernel, memory_node, small_machine, small_plan

PAGE = 0x10000


def planner(span=3 * MIB, initrd_size=70000):
    return lambda found, placement: plan_load(found, kernel(span), initrd(initrd_size), "console=hvc0", placement)


def roomy(**changes):
    """A machine whose region holds K2 with ease, told whole."""
    found = small_machine(memory=[memory_node(0, 1024 * MIB)], region=Range(256 * MIB, 768 * MIB))
    return replace(found, **{"kernel_end": 4 * MIB, "layout": LAYOUT} | changes)


class TestCost:
    def test_it_is_counted_off_the_table(self):
        plan = small_plan("zero")
        cost = cost_of(plan, PAGE, quarantine=True)
        exchanged = sum(m.size for m in plan.moves if isinstance(m, Exchange))
        copied = sum(m.size for m in plan.moves if isinstance(m, Copy))
        checked = sum(m.size for m in plan.moves if isinstance(m, Check))
        assert exchanged == 6 * MIB  # K2's 3 MiB and its early allocator's room, in whole blocks
        assert cost.checked == checked > 3 * MIB
        rate = EXCHANGE_ALTIVEC if plan.altivec else EXCHANGE
        assert cost.instructions == round(exchanged * rate + copied * COPY + checked * CHECK)
        assert cost.moved >= 2 * exchanged
        assert cost.memory == cost.reserved + cost.quarantined == 128 * MIB + 3 * MIB

    def test_without_altivec_an_exchange_takes_longer(self):
        plan = small_plan("zero")
        slow, fast = (cost_of(replace(plan, altivec=has), PAGE, quarantine=False).instructions for has in (False, True))
        assert slow - fast == pytest.approx(6 * MIB * (EXCHANGE - EXCHANGE_ALTIVEC), abs=1)

    def test_no_quarantine_costs_no_memory(self):
        assert cost_of(small_plan("zero"), PAGE, quarantine=False).quarantined == 0


class TestRecommendation:
    def test_reserved_where_both_can_be_had(self):
        variants = compare(roomy(), planner())
        assert [v.name for v in variants] == ["reserved", "zero", "zero, no quarantine", "zero, right behind K1"]
        best = recommend(variants)
        assert best.variant is variants[0]
        assert "no check found a danger" in best.reasons[0]
        assert any(reason.startswith("zero: adds K1's freed init pages") for reason in best.reasons)

    def test_the_quarantine_is_foreseen(self):
        """Pages that can be moved are counted as taken, others are not."""
        for use, expected in (("free", "guarded"), ("cache", "guarded"), ("slab", "dangerous"), ("kernel", "dangerous")):
            found = roomy(pages=(Pages(Range(0, 8 * MIB), use),))
            zero, bare = compare(found, planner())[1:3]
            assert {h.name: h.verdict for h in zero.plan.hazards}["freed-init"] == expected
            assert {h.name: h.verdict for h in bare.plan.hazards}["freed-init"] == "dangerous"

    def test_right_behind_k1_leaves_no_slack(self):
        (behind,) = [v for v in compare(roomy(), planner(span=9 * MIB)) if v.boot]
        assert behind.boot == "crashkernel=512M@4M"
        verdicts = {h.name: h.verdict for h in behind.plan.hazards}
        assert verdicts["slack"] == "safe"
        assert verdicts["core-header"] == "unknown"

    def test_right_behind_k1_begins_with_the_next_page(self):
        """And not with the next MiB: what lies between would be K1's to hand out."""
        found = roomy(kernel_end=0x2880000)
        (behind,) = [v for v in compare(found, planner(span=0x2880000)) if v.boot]
        assert behind.boot == "crashkernel=512M@41472K"
        assert {h.name: h.verdict for h in behind.plan.hazards}["slack"] == "safe"

    def test_what_could_not_be_answered_is_not_called_safe(self):
        """Of a K1 of which only the tree is known."""
        found = roomy(release="", layout=(), kernel_end=0, vmcoreinfo=None, cpus=())
        variants = compare(found, planner())
        best = recommend(variants)
        assert best.variant is variants[0]
        assert "checks could not be answered: " in best.reasons[0]
        assert not any("as safe" in reason for reason in best.reasons)
        assert any(reason.startswith("zero: cannot be judged: K1's freed init pages") for reason in best.reasons)

    def test_as_safe_goes_as_far_as_could_be_judged(self):
        (reserved, *_) = compare(roomy(vmcoreinfo=None, cpus=()), planner())
        best = recommend((reserved, replace(reserved, name="other")))
        assert best.reasons[0].endswith("1 check could not be answered: elfcorehdr, notes and VMCOREINFO.")
        assert best.reasons[1].startswith("other: what could be judged of it is as safe")

    def test_what_cannot_be_done_says_why(self):
        found = roomy(firmware=(replace(small_machine().firmware[0], range=Range.sized(4 * MIB, PAGE)),))
        variants = compare(found, planner())
        assert variants[1].plan is None
        assert "RTAS" in variants[1].obstacle
        best = recommend(variants)
        assert best.variant is variants[0]
        assert any("cannot be done here" in reason for reason in best.reasons)

    def test_nothing_can_be_done_without_a_region(self):
        best = recommend(compare(roomy(reserved=None), planner()))
        assert best.variant is None
        assert all("no memory is reserved" in reason for reason in best.reasons)

    def test_zero_when_it_alone_is_safe(self):
        """Nothing is built in: a variant without dangers beats one with."""
        safe, dangerous = compare(roomy(pages=(Pages(Range(0, 8 * MIB), "free"),)), planner())[1:3]
        assert recommend((dangerous, safe)).variant is safe

    def test_a_reboot_must_gain_something(self):
        first = compare(roomy(), planner())[0]
        assert recommend((replace(first, name="other", boot="crashkernel=1G"), first)).variant is first


class TestTable:
    @pytest.mark.parametrize("colour", [False, True])
    def test_it_fits_a_terminal_and_names_all(self, colour):
        variants = compare(roomy(), planner())
        text = draw_comparison(variants, recommend(variants), {"zero": "3 of 3 pass"}, colour)
        for variant in variants:
            assert f"{variant.name}: " in text
        assert "3 of 3 pass" in text
        assert "recommended: reserved" in text
        if not colour:
            assert max(map(len, text.splitlines())) <= 80

    def test_an_obstacle_is_told(self):
        variant = Variant("zero", "zero", "K2 changes places with K1", obstacle="it does not fit")
        text = draw_comparison([variant], recommend((variant,)), {})
        assert "it does not fit" in text
        assert "recommended: none" in text

    def test_drills_are_shown_where_they_belong(self):
        variants = compare(roomy(), planner())
        text = draw_comparison(variants, recommend(variants), {"zero, no quarantine": "1 of 1 pass"})
        (row,) = [line for line in text.splitlines() if line.startswith("drilled")]
        assert row.split()[1:] == ["no", "no", "1", "of", "1", "pass", "no"]


class TestDrilled:
    """Which variant a drill's record is of."""

    ROWS = ("reserved", "zero", "zero, no quarantine", "zero, right behind K1")

    def drilled(self, tmp_path, *drills):
        path = tmp_path / "drills.json"
        path.write_text(json.dumps({"drills": drills}))
        variants = compare(roomy(), planner())
        assert tuple(variant.name for variant in variants) == self.ROWS
        return _drilled(path, variants)

    @pytest.mark.parametrize(
        ("placement", "quarantine", "spec", "row"),
        [
            ("reserved", True, "512M", "reserved"),
            ("reserved", False, "512M", "reserved"),
            ("reserved", True, "512M@4M", "reserved"),
            ("zero", True, "512M", "zero"),
            ("zero", False, "512M", "zero, no quarantine"),
            ("zero", True, "1G-2G:256M,2G-:512M", "zero"),
            ("zero", True, "512M@4M", "zero, right behind K1"),
        ],
    )
    def test_one_pass_is_one_variants(self, tmp_path, placement, quarantine, spec, row):
        title = Twin(crashkernel=spec).title
        drill = {"placement": placement, "quarantine": quarantine, "machine": title, "verdict": "PASS"}
        assert self.drilled(tmp_path, drill) == {row: "1 of 1 pass"}

    def test_what_is_no_variant_counts_for_none(self, tmp_path):
        behind = Twin(crashkernel="512M@4M").title
        drill = {"placement": "zero", "quarantine": False, "machine": behind, "verdict": "PASS"}
        assert self.drilled(tmp_path, drill) == {}

    def test_failures_count(self, tmp_path):
        drill = {"placement": "zero", "quarantine": True, "machine": Twin().title, "verdict": "PASS"}
        assert self.drilled(tmp_path, drill, drill | {"verdict": "FAIL"}) == {"zero": "1 of 2 pass"}

    def test_a_record_that_names_no_quarantine_had_none(self, tmp_path):
        assert self.drilled(tmp_path, {"placement": "zero", "verdict": "PASS"}) == {"zero, no quarantine": "1 of 1 pass"}
