"""The two tables, for any sizes and addresses, held against what a handover must leave behind."""

import functools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.errors import PlanError
from crashkernel.machine import HEAD_SIZE
from crashkernel.memory import Range, RangeSet, align_up
from crashkernel.placement.moves import K1, LINE, MAX_MOVES, Check, Copy, Exchange, Extent, Layout, Move, Put
from crashkernel.placement.plan import Kept, Segment, keep, loaded_layout
from crashkernel.placement.tables import LOW_PAGE, PURGATORY_SPAN, SAVE_OFFSET, reserved, zero

PURGATORY_SIZE = 0x10000
lines = lambda low, high: st.integers(low // LINE, high // LINE).map(lambda n: n * LINE)  # noqa: E731


@dataclass(frozen=True)
class Case:
    """Memory [0, end) with its reserved region from `region.start` to the end, and a table over it."""

    region: Range
    segments: tuple[Segment, ...]
    moves: tuple[Move, ...]
    k2_memory: RangeSet
    kernel: Range  # where K2 lies afterwards
    checks: tuple[Range, ...]

    @property
    def memory(self) -> RangeSet:
        return RangeSet([Range(0, self.region.end)])

    @property
    def purgatory(self) -> Range:
        return next(segment.range for segment in self.segments if segment.content == "purgatory")

    @functools.cached_property
    def layouts(self) -> list[Layout]:
        """Before the first row, and after each."""
        layout = loaded_layout(self.memory, self.region, self.segments)
        found = [layout.after(Copy(0, self.purgatory.start, HEAD_SIZE))]  # K1's death
        for move in self.moves:
            found.append(found[-1].after(move))
        return found


def place(draw: st.DrawFn, at: int, *wanted: tuple[str, int]) -> dict[str, Range]:
    """The named stretches from `at` on, in any order and with any gaps."""
    found = {}
    for name, size in draw(st.permutations(wanted)):
        at += draw(lines(0, 0x3000))
        found[name] = Range.sized(at, size)
        at = found[name].end
    return found


@st.composite
def zeros(draw: st.DrawFn) -> Case:
    size = draw(st.just(LOW_PAGE) | lines(LOW_PAGE, 0x40000))
    start = size + draw(lines(0, 0x20000))
    others = [("initrd", draw(lines(LINE, 0x8000))), ("fdt", LOW_PAGE)]
    found = place(draw, start, ("kernel", size), ("purgatory", PURGATORY_SIZE), *others)
    region = Range(start, max(r.end for r in found.values()) + draw(lines(LINE, 0x1000)))
    checks = [found[name] for name, _ in others]
    if size > LOW_PAGE:
        checks.append(Range(LOW_PAGE, size))
    kernel = found["kernel"]
    return Case(
        region,
        tuple(Segment(name, r) for name, r in found.items()),
        zero(size, kernel.start, found["purgatory"].start, checks),
        RangeSet([Range(0, size), region]) - RangeSet([kernel]),
        Range(0, size),
        (*checks, Range(0, LOW_PAGE)),
    )


@st.composite
def backups(draw: st.DrawFn) -> Case:
    low = draw(st.just(LOW_PAGE) | lines(LOW_PAGE, 0x20000))
    start = low + draw(lines(0, 0x20000))
    others = [("kernel", draw(lines(HEAD_SIZE, 0x40000))), ("fdt", LOW_PAGE)]
    found = place(draw, start, ("backup", low), ("purgatory", PURGATORY_SIZE), *others)
    region = Range(start, max(r.end for r in found.values()) + draw(lines(LINE, 0x1000)))
    backup = found.pop("backup")
    checks = [found[name] for name, _ in others]
    return Case(
        region,
        tuple(Segment(name, r) for name, r in found.items()),
        reserved(low, backup.start, found["kernel"].start, found["purgatory"].start, checks),
        RangeSet([Range(0, low), region]) - RangeSet([backup]),
        found["kernel"],
        (*checks, Range(0, HEAD_SIZE)),
    )


cases = zeros() | backups()


def written(move: Move) -> RangeSet:
    if isinstance(move, Check):
        return RangeSet([])
    found = [Range.sized(move.dst, move.size)]
    if isinstance(move, Exchange):
        found.append(Range.sized(move.src, move.size))
    return RangeSet(found)


class TestEveryTable:
    @given(cases)
    def test_every_byte_of_k1_lies_where_keep_says(self, case):
        final = case.layouts[-1]
        kept = keep(case.memory, case.region, case.segments, case.moves, case.k2_memory)
        assert RangeSet(each.range for each in kept) == RangeSet([Range(0, case.region.start)])
        for each in kept:
            here = Range.sized(each.location, each.range.size)
            assert final.within(here) == (Extent(here, K1, each.range.start),)
            assert not case.k2_memory.overlaps(here)

    @given(cases)
    def test_k2_lies_whole_at_its_place(self, case):
        final = case.layouts[-1]
        assert final.within(case.kernel) == (Extent(case.kernel, "kernel", 0),)
        head = Range(0, HEAD_SIZE)
        assert final.within(head) == (Extent(head, "kernel", 0),), "K1's other CPUs go to its 0x60"

    @given(cases)
    def test_the_purgatory_s_first_page_is_at_zero_until_the_last_move(self, case):
        guard = Extent(Range(0, LOW_PAGE), "purgatory", 0)
        guarded = [layout.within(guard.location) == (guard,) for layout in case.layouts]
        first = guarded.index(True)
        assert first == 2, "one row alone comes before it: the one that makes room"
        last = max(number for number, move in enumerate(case.moves) if not isinstance(move, Check))
        assert case.moves[first - 1] == Copy(0, case.purgatory.start, LOW_PAGE)
        assert all(guarded[first : last + 1]), "what is taken in between finds no vector"
        assert not any(guarded[:first])
        assert not any(guarded[last + 1 :])
        assert case.moves[last + 1 :] == (Check(0, case.moves[last].size),), "the last move is checked, and nothing follows"

    @given(cases)
    def test_the_purgatory_s_head_is_at_zero_as_long_as_cpus_may_come(self, case):
        """A CPU of K1's goes to absolute 0x60 whenever it comes: it finds the purgatory's slave entry, or K2's at the end."""
        head = Range(0, HEAD_SIZE)
        for layout in case.layouts[:-2]:
            assert layout.within(head) == (Extent(head, "purgatory", 0),)

    @given(cases)
    def test_k1_s_low_page_is_whole_before_it_is_overwritten(self, case):
        layouts = case.layouts
        guard = case.moves.index(Copy(0, case.purgatory.start, LOW_PAGE))
        left = Range(HEAD_SIZE, LOW_PAGE)  # K1's death took the rest
        (copy,) = (e for e in layouts[guard].locations() if e.source.contains(left) and e.location.start >= LOW_PAGE)
        aside = copy.location.start - copy.origin
        # before it the purgatory's head: K1's death put it there, and the copy took it along
        assert layouts[guard].within(Range.sized(aside, HEAD_SIZE)) == (Extent(Range.sized(aside, HEAD_SIZE), "purgatory", 0),)

    @given(cases)
    def test_k1_s_low_page_is_whole_from_the_put_on(self, case):
        layouts = case.layouts
        (put,) = (move for move in case.moves if isinstance(move, Put))
        assert (put.origin, put.size) == (0, HEAD_SIZE)
        number = case.moves.index(put)
        there = Range.sized(put.dst, LOW_PAGE)
        head, rest = layouts[number].within(there)
        assert head == Extent(Range.sized(put.dst, HEAD_SIZE), "purgatory", 0), "nothing of K1's is put over"
        assert (rest.content, rest.source) == (K1, Range(HEAD_SIZE, LOW_PAGE))
        for layout in layouts[number + 1 :]:
            assert layout.within(there) == (Extent(there, K1, 0),)

    @given(cases)
    def test_nothing_of_k1_s_is_lost_at_any_row(self, case):
        """But its head, which is in the purgatory's image until the put."""
        (put,) = (number for number, move in enumerate(case.moves) if isinstance(move, Put))
        for number, layout in enumerate(case.layouts):
            somewhere = RangeSet(extent.source for extent in layout.locations())
            assert somewhere == RangeSet([Range(0 if number > put else HEAD_SIZE, case.region.start)]), f"after {number} rows"

    @given(cases)
    def test_nothing_that_was_loaded_is_lost_at_any_row(self, case):
        before = {(e.content, e.source) for e in case.layouts[0].extents if e.content not in (K1, "free", "purgatory")}
        for layout in case.layouts:
            for content, source in before:
                somewhere = RangeSet(extent.source for extent in layout.locations(content))
                assert somewhere.covers(source), content

    @given(cases)
    def test_everything_is_checked_after_the_last_move_that_touches_it(self, case):
        assert tuple(move.range for move in case.moves if isinstance(move, Check)) == case.checks
        for number, (move, layout) in enumerate(zip(case.moves, case.layouts[1:], strict=True)):
            if not isinstance(move, Check):
                continue
            for later in case.moves[number:]:
                assert not written(later) & RangeSet([move.range])
            assert layout.within(move.range) == case.layouts[-1].within(move.range)
            (extent,) = layout.within(move.range)
            assert extent.content not in (K1, "free", "purgatory")

    @given(cases)
    def test_nothing_else_of_what_was_loaded_moves(self, case):
        before, after = case.layouts[0], case.layouts[-1]
        for segment in case.segments:
            if segment.content == "purgatory":
                saved = Range.sized(segment.range.start + SAVE_OFFSET, LOW_PAGE)
                assert Range.sized(segment.range.start, PURGATORY_SPAN).contains(saved)
                for part in RangeSet([segment.range]) - RangeSet([saved]):
                    assert after.within(part) == before.within(part)
            elif segment.content != "kernel":
                assert after.within(segment.range) == before.within(segment.range)

    @given(cases)
    def test_a_purgatory_can_make_it(self, case):
        assert len(case.moves) <= MAX_MOVES
        for move in case.moves:
            values = (move.at, move.size) if isinstance(move, Check) else (move.dst, move.size)
            assert all(value % LINE == 0 for value in values)
            assert move.size > 0
            if isinstance(move, Copy | Exchange):
                assert move.src % LINE == 0
                assert not Range.sized(move.dst, move.size).overlaps(Range.sized(move.src, move.size))


class TestZero:
    def test_the_rows(self):
        checks = (Range(0x30000, 0x31000), Range(0x1000, 0x4000))
        assert zero(0x4000, 0x10000, 0x20000, checks) == (
            Copy(0x20000 + SAVE_OFFSET, 0, LOW_PAGE),
            Copy(0, 0x20000, LOW_PAGE),
            Exchange(0x20000 + SAVE_OFFSET, 0x10000, LOW_PAGE),
            Put(0x10000, 0, HEAD_SIZE),
            Exchange(LOW_PAGE, 0x11000, 0x3000),
            Check(0x30000, 0x1000),
            Check(0x1000, 0x3000),
            Copy(0, 0x20000 + SAVE_OFFSET, LOW_PAGE),
            Check(0, LOW_PAGE),
        )

    def test_a_low_page_alone_needs_no_second_exchange(self):
        moves = zero(LOW_PAGE, 0x10000, 0x20000, ())
        low = Exchange(0x20000 + SAVE_OFFSET, 0x10000, LOW_PAGE)
        rest = Exchange(LOW_PAGE, 0x10000 + LOW_PAGE, LOW_PAGE)
        assert [move for move in moves if isinstance(move, Exchange)] == [low]
        assert moves == tuple(move for move in zero(2 * LOW_PAGE, 0x10000, 0x20000, ()) if move != rest)

    @given(zeros())
    def test_k2_s_low_page_waits_in_the_purgatory_until_it_goes_in(self, case):
        """Checked at last, where it lies then: no row may have taken it from anywhere but its place in the image."""
        saved = Range.sized(case.purgatory.start + SAVE_OFFSET, LOW_PAGE)
        swap, last = 3, len(case.moves) - 2
        assert case.moves[last] == Copy(0, saved.start, LOW_PAGE)
        for layout in case.layouts[swap : last + 1]:
            assert layout.within(saved) == (Extent(saved, "kernel", 0),)

    @given(zeros())
    def test_k1_is_parked_where_k2_waited(self, case):
        (waiting,) = (segment.range for segment in case.segments if segment.content == "kernel")
        kept = keep(case.memory, case.region, case.segments, case.moves, case.k2_memory)
        assert kept[0] == Kept(Range(0, case.kernel.end), waiting.start)


class TestReserved:
    def test_the_rows(self):
        assert reserved(0x8000, 0x10000, 0x20000, 0x30000, [Range(0x20000, 0x28000)]) == (
            Copy(0x10000, 0, LOW_PAGE),
            Copy(0, 0x30000, LOW_PAGE),
            Put(0x10000, 0, HEAD_SIZE),
            Copy(0x11000, LOW_PAGE, 0x7000),
            Check(0x20000, 0x8000),
            Copy(0, 0x20000, HEAD_SIZE),
            Check(0, HEAD_SIZE),
        )

    def test_a_low_page_alone_is_backed_up_in_one_row(self):
        moves = reserved(LOW_PAGE, 0x10000, 0x20000, 0x30000, ())
        rest = Copy(0x10000 + LOW_PAGE, LOW_PAGE, LOW_PAGE)
        assert moves == tuple(move for move in reserved(2 * LOW_PAGE, 0x10000, 0x20000, 0x30000, ()) if move != rest)
        assert len(moves) == 5

    @given(backups())
    def test_the_vectors_stay_the_purgatory_s(self, case):
        """K2 copies its own, from 0x100 on, when it has come that far."""
        rest = Range(HEAD_SIZE, LOW_PAGE)
        assert case.layouts[-1].within(rest) == (Extent(rest, "purgatory", HEAD_SIZE),)

    @given(backups())
    def test_k2_stays_where_it_was_loaded(self, case):
        for layout in case.layouts:
            assert layout.within(case.kernel) == (Extent(case.kernel, "kernel", 0),)


class TestNumbers:
    """What purgatory.S and the kernels say of the same addresses."""

    def test_the_saved_page_is_in_the_purgatory_s_segment(self):
        assert SAVE_OFFSET % LINE == 0
        assert SAVE_OFFSET + LOW_PAGE <= PURGATORY_SPAN <= PURGATORY_SIZE
        assert PURGATORY_SPAN % LINE == 0

    def test_the_low_page_holds_head_and_vectors(self):
        assert LOW_PAGE % LINE == 0
        assert align_up(HEAD_SIZE + 30 * 0x80, LOW_PAGE) == LOW_PAGE

    @pytest.mark.parametrize("move", [Copy(0x8000, 0, 0x80), Exchange(0x8000, 0, 0x80), Put(0x8000, 0, 0x80)])
    def test_keep_refuses_a_table_that_loses_bytes(self, move):
        """So that the properties above ask something that can fail."""
        segments = (Segment("kernel", Range(0x20000, 0x24000)), Segment("purgatory", Range(0x30000, 0x40000)))
        moves = (move, *zero(0x4000, 0x20000, 0x30000, ()))
        memory, region = RangeSet([Range(0, 0x40000)]), Range(0x20000, 0x40000)
        with pytest.raises(PlanError, match="the moves lose K1's memory at"):
            keep(memory, region, segments, moves, RangeSet([Range(0, 0x4000), Range(0x24000, 0x40000)]))
