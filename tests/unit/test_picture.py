"""The one model behind every form of the maps: true to scale, every byte accounted for, colours everybody can tell apart."""

from dataclasses import replace
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.machine import Region
from crashkernel.memory import Range, RangeSet
from crashkernel.placement.moves import Check
from crashkernel.placement.plan import PLACEMENTS
from crashkernel.report.html import stages_html
from crashkernel.report.maps import draw_stages
from crashkernel.report.picture import GAP, K1_IMAGE, KINDS, Picture, describe_rows, luminance, share_out
from crashkernel.report.svg import stages_svg
from support.hazards import HAZARDS
from support.machines import LAYOUT, MIB, memory_node, small_plan

FRAGMENTED = [memory_node(0, 256 * MIB), *(memory_node(512 * MIB + 32 * MIB * n, 16 * MIB) for n in range(200))]
PLANS = {
    **{name: small_plan(name) for name in PLACEMENTS},
    "fragmented": small_plan("zero", memory=FRAGMENTED),
    "near": small_plan("zero", region=Range(4 * MIB, 128 * MIB), rtas=Range.sized(160 * MIB, 0x10000)),
    "plain": replace(small_plan("zero"), k1_layout=(), firmware=()),
    "outside": replace(small_plan(), firmware=(Region("flash", Range.sized(128 * MIB, 4096)),)),
}


@pytest.fixture(params=PLANS, scope="module")
def picture(request):
    return Picture(PLANS[request.param])


@pytest.fixture(params=[(68, 1), (68, 2), (884, 7), (10_000, 150)], ids=str, scope="module")
def rulers(request, picture):
    return [band.ruler(*request.param) for band in picture.bands]


class TestShares:
    @given(st.lists(st.integers(1, 1 << 60), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 500))
    def test_true_where_it_can_be(self, sizes, minimum, spare):
        room = len(sizes) * minimum + spare
        widths = share_out(sizes, room, minimum)
        assert sum(widths) == room
        assert min(widths) >= minimum
        # whatever was not widened keeps its proportion, to the rounding of a unit
        free = [(size, width) for size, width in zip(sizes, widths, strict=True) if width > minimum + 1]
        for (size, width), (other, its) in combinations(free, 2):
            assert abs(width * other - its * size) <= size + other
        assert all(width >= its for size, width in free for other, its in free if size > other + other)

    def test_no_room(self):
        with pytest.raises(ValueError, match="do not fit"):
            share_out([1, 1, 1], 5, 2)


class TestStages:
    def test_every_address_is_accounted_for(self, picture):
        for stage in picture.stages:
            assert stage.pieces[0].range.start == 0
            assert stage.pieces[-1].range.end == picture.end
            assert all(before.range.end == after.range.start for before, after in pairwise(stage.pieces))
            gaps = RangeSet(piece.range for piece in stage.pieces if piece.kind is GAP)
            known = RangeSet(region.range for region in picture.plan.firmware)
            assert RangeSet([Range(0, picture.end)]) - gaps == picture.plan.memory | known

    def test_bytes_of_k1_are_where_the_plan_keeps_them(self, picture):
        last = picture.stages[-1]
        for kept in picture.plan.kept:
            there = [p for p in last.pieces if p.range.overlaps(Range.sized(kept.location, kept.range.size)) and p.of_k1]
            assert all(p.home - p.range.start == kept.range.start - kept.location for p in there)

    def test_what_changed_is_what_differs(self, picture):
        for number, (before, after) in enumerate(pairwise(picture.stages[:-1]), 1):
            same = RangeSet([Range(0, picture.end)]) - after.changed
            for old in before.pieces:
                for new in after.pieces:
                    for part in RangeSet([old.range]) & RangeSet([new.range]) & same:
                        assert (old.clip(part).kind, old.clip(part).home) == (new.clip(part).kind, new.clip(part).home)
            if picture.plan.firmware and picture.plan.reserved.overlaps(picture.plan.firmware[0].range):
                continue
            assert RangeSet(where for where, *_ in picture.changes(number)) == after.changed

    def test_checks_are_told_with_the_stage_they_do_not_change(self, picture):
        frames = picture.frames()
        assert sum(len(checks) for _, checks in frames) == sum(isinstance(move, Check) for move in picture.plan.moves)
        assert sum(1 + len(checks) for _, checks in frames) == len(picture.stages)

    def test_k2s_memory_is_k2s_at_the_end_and_not_before(self, picture):
        *others, last = picture.stages
        mine = RangeSet(p.range for p in last.pieces if p.holder == "K2")
        assert mine == picture.plan.k2_memory - RangeSet(region.range for region in picture.plan.firmware)
        assert not any(piece.holder == "K2" for stage in others for piece in stage.pieces)

    def test_the_regions_of_k1s_image_keep_their_names_when_they_move(self):
        last = Picture(PLANS["zero"]).stages[-1]
        moved = {piece.name: piece for piece in last.pieces if piece.moved and piece.name in {r.name for r in LAYOUT}}
        assert set(moved) == {region.name for region in LAYOUT}
        for region in LAYOUT:
            assert moved[region.name].came_from == f"K1 had them at {region.range}"

    def test_where_k2s_bytes_came_from(self):
        plan = PLANS["zero"]
        low = Picture(plan).stages[-1].pieces[0]
        assert low.name == "K2 image"
        assert low.came_from == f"loaded at {Range.sized(plan.segment('kernel').range.start, low.range.size)}"

    def test_firmware_outside_memory_is_drawn(self):
        names = {piece.name for piece in Picture(PLANS["outside"]).stages[0].pieces}
        assert "flash" in names


class TestScale:
    def test_a_bands_cells_fill_it_without_a_gap(self, picture, rulers):
        for ruler in rulers:
            for stage in picture.stages:
                cells = ruler.cells(stage)
                assert (cells[0].left, cells[-1].right) == (0, ruler.columns[-1])
                assert (cells[0].range.start, cells[-1].range.end) == (ruler.band.window.start, ruler.band.window.end)
                for before, after in pairwise(cells):
                    assert before.right == after.left
                    assert before.range.end == after.range.start
                assert all(cell.left < cell.right for cell in cells)

    def test_nothing_is_narrower_than_the_minimum_and_what_is_widened_is_told(self, picture):
        for band in picture.bands:
            ruler = band.ruler(884, 7)
            for (start, end), (left, right) in zip(pairwise(ruler.edges), pairwise(ruler.columns), strict=True):
                assert right - left >= 7
                stretch = next(s for s in band.stretches if s.range.contains(Range(start, end)))
                room = ruler.at(stretch.range.end) - ruler.at(stretch.range.start)
                if (end - start) / stretch.range.size * room < 4:
                    assert Range(start, end) in ruler.widened

    def test_linear_inside_a_stretch_where_nothing_is_widened(self, picture):
        for band in picture.bands:
            ruler = band.ruler(100_000, 3)
            for stretch in band.stretches:
                free = [
                    (end - start, right - left)
                    for (start, end), (left, right) in zip(pairwise(ruler.edges), pairwise(ruler.columns), strict=True)
                    if stretch.range.contains(Range(start, end)) and right - left > 100
                ]
                rates = [width / size for size, width in free]
                assert not rates or max(rates) / min(rates) < 1.02

    def test_the_scale_is_the_same_at_every_stage(self, picture, rulers):
        for ruler in rulers:
            edges = set(zip(ruler.edges, ruler.columns, strict=True))
            for stage in picture.stages:
                assert {(cell.range.start, cell.left) for cell in ruler.cells(stage)} <= edges

    def test_positions_run_upwards_and_hit_the_edges(self, rulers):
        for ruler in rulers:
            assert [ruler.at(edge) for edge in ruler.edges] == list(ruler.columns)
            window = ruler.band.window
            samples = [ruler.at(window.start + window.size * n // 50) for n in range(51)]
            assert samples == sorted(samples)
            assert ruler.span(Range(window.end, window.end + 1)) is None

    def test_hundreds_of_pieces_become_few_cells_and_none_of_k2s_is_lost(self):
        picture = Picture(PLANS["fragmented"])
        whole = picture.bands[0].ruler(68, 2)
        cells = whole.cells(picture.stages[0])
        assert len(cells) <= 34
        assert any(cell.mixed and cell.name == "K1 memory in 200 pieces" for cell in cells)
        assert {"k2-image", "firmware", "k1-image"} <= {cell.kind.name for cell in cells}

    def test_bands_do_not_overlap_where_the_region_is_near(self):
        _, low, reserved = Picture(PLANS["near"]).bands
        assert low.window == Range(0, 4 * MIB)
        assert reserved.window == PLANS["near"].reserved

    @given(region=st.integers(4, 60), size=st.integers(24, 190), name=st.sampled_from(PLACEMENTS), room=st.integers(60, 4000))
    def test_any_plan_can_be_drawn(self, region, size, name, room):
        plan = small_plan(name, region=Range(region * MIB, (region + size) * MIB), rtas=Range.sized(255 * MIB, 0x10000))
        picture = Picture(plan)
        for band in picture.bands:
            ruler = band.ruler(room, 2)
            for stage in picture.stages:
                assert sum(cell.right - cell.left for cell in ruler.cells(stage)) == room


@pytest.mark.parametrize(
    "reserved",
    [Range(64 * MIB, 300 * MIB), Range(0, 192 * MIB), Range(64 * MIB, 1 << 63)],
    ids=["beyond RAM", "at 0", "absurd"],
)
def test_a_region_that_is_not_what_it_should_be_is_still_drawn(reserved):
    plan = replace(PLANS["zero"], reserved=reserved, k1_layout=(Region("K1 text", Range(0, 1 << 64)),))
    assert "K2 is entered at 0x0" in draw_stages(plan, colour=True, width=60)
    assert "K2 is entered at 0x0" in draw_stages(plan)
    ElementTree.fromstring(stages_svg(plan))
    assert stages_html(plan).endswith("</html>\n")


class TestLanes:
    def test_what_k2_owns_is_told_at_the_end(self, picture):
        names = [[lane.name for lane in picture.lanes(stage)] for stage in picture.stages]
        assert "k2" in names[-1]
        assert all("k2" not in before for before in names[:-1])

    def test_exposed_is_the_plans(self, picture):
        lane = next(lane for lane in picture.lanes(picture.stages[0]) if lane.name == "exposed")
        assert lane.ranges == picture.plan.exposed

    def test_only_what_can_do_harm_is_marked(self):
        plan = replace(PLANS["zero"], hazards=HAZARDS)
        lane = next(lane for lane in Picture(plan).lanes(Picture(plan).stages[0]) if lane.name == "hazard")
        assert lane.ranges == RangeSet([Range(0x200000, 0x300000)])

    def test_the_rma_is_told_where_it_ends(self):
        picture = Picture(PLANS["fragmented"])
        lanes = {lane.name: lane for lane in picture.lanes(picture.stages[0])}
        assert lanes["real-mode"].ranges == RangeSet([Range(0, 256 * MIB)])
        inside = picture.lanes(picture.stages[0], picture.bands[1].window)
        assert "real-mode" not in {lane.name for lane in inside}


class TestRows:
    def test_few_pieces_have_a_row_each(self):
        pieces = Picture(PLANS["zero"]).stages[-1].pieces
        rows = describe_rows(pieces)
        assert [where for where, *_ in rows] == [piece.range for piece in pieces if piece.kind is not GAP]

    def test_many_are_told_together_with_their_number_and_their_size(self):
        rows = describe_rows(Picture(PLANS["fragmented"]).stages[0].pieces)
        assert len(rows) < 40
        where, size, what, _ = rows[-1]
        assert (what, size) == ("K1 memory in 201 pieces", 64 * MIB + 200 * 16 * MIB)
        assert where.end == Picture(PLANS["fragmented"]).end


# Machado, Oliveira, Fernandes: A Physiologically-based Model for Simulation of Color Vision Deficiency, 2009; severity 1.0
SIGHTS = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "no blue": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


class TestColours:
    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
    def test_a_label_can_be_read(self, kind):
        lights = sorted([luminance(kind.fill), luminance(kind.ink)])
        assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5  # WCAG 2.2, 1.4.3

    @pytest.mark.parametrize("sight", SIGHTS)
    def test_kinds_are_told_apart(self, sight):
        kinds = [kind for kind in KINDS if kind not in (K1_IMAGE, GAP)]
        seen = {kind.name: self.lab(kind.fill, SIGHTS[sight]) for kind in kinds}
        for one, other in combinations(seen, 2):
            distance = sum((a - b) ** 2 for a, b in zip(seen[one], seen[other], strict=True)) ** 0.5
            assert distance > 12, f"{one} and {other}"

    @staticmethod
    def lab(colour, sight):
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        red, green, blue = (min(1, max(0, sum(a * b for a, b in zip(row, linear, strict=True)))) for row in sight)
        x, y, z = (
            value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116
            for value in (
                (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505,
                0.2126 * red + 0.7152 * green + 0.0722 * blue,
                (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089,
            )
        )
        return 116 * y - 16, 500 * (x - y), 200 * (y - z)

    def test_letters_and_names_are_one_each(self):
        letters = [kind.labels[-1] for kind in KINDS if kind is not GAP]
        assert len(set(letters)) == len(letters)
        assert all(len(letter) == 1 for letter in letters)
