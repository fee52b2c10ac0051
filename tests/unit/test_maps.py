"""The maps of a handover: 80 columns, every region visible, every address in the table."""

from itertools import pairwise

import pytest

from crashkernel.memory import RangeSet
from crashkernel.placement import plan_load
from crashkernel.placement.plan import PLACEMENTS
from crashkernel.report.maps import draw_layout, draw_stages
from support.machines import kernel, small_machine


@pytest.fixture(params=PLACEMENTS)
def plan(request):
    return plan_load(small_machine(), kernel(), 1 << 20, "console=hvc0", request.param)


def test_no_line_is_wider_than_a_terminal(plan):
    assert max(map(len, draw_stages(plan).splitlines())) <= 80


def test_each_stage_is_drawn_with_its_title(plan):
    text = draw_stages(plan)
    for title, _ in plan.stages():
        assert title in text


def test_a_check_is_told_under_the_map_it_does_not_change(plan):
    text = draw_stages(plan)
    layouts = [layout for _, layout in plan.stages()]
    changes = 1 + sum(before != after for before, after in pairwise(layouts))
    assert text.count("- reserved -") == changes < len(layouts)


def test_a_bar_has_a_cell_for_every_extent(plan):
    for _, layout in plan.stages():
        over, rule, cells, below_rule, _ = draw_layout(layout, plan.reserved)
        assert rule == below_rule
        assert len(cells) == len(rule)
        assert cells.count("|") == len(layout.extents) + 1
        assert "reserved" in over


def test_the_table_accounts_for_all_memory(plan):
    before, after = draw_stages(plan).split("\nloaded\n")[1].split("\nK2 starts\n")
    for text, (_, layout) in ((before, plan.stages()[0]), (after.split("K2's memory")[0], plan.stages()[-1])):
        for extent in layout.extents:
            assert str(extent.location) in text
        assert RangeSet(e.location for e in layout.extents) == plan.memory


def test_moved_memory_of_k1_is_named_by_where_it_was():
    plan = plan_load(small_machine(), kernel(), 0, "", "zero")
    assert "K1 from 0x0" in draw_stages(plan)
