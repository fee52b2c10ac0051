"""The meaning of moves, held against bytes that are really moved."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.machine import HEAD_SIZE
from crashkernel.memory import Range
from crashkernel.placement.moves import K1, LINE, Check, Copy, Exchange, Extent, Layout, Put

SIZE = 48
CONTENTS = (K1, "kernel", "free")
Memory = list[tuple[str, int]]
"""The naive model: for each byte the content it belongs to and its place in that content."""


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    """SIZE bytes, in runs of a content from an arbitrary origin on."""
    cuts = [0, *sorted(draw(st.sets(st.integers(1, SIZE - 1), max_size=6))), SIZE]
    memory: Memory = []
    for start, end in pairwise(cuts):
        content, origin = draw(st.sampled_from(CONTENTS)), draw(st.integers(0, 100))
        memory += [(content, origin + at) for at in range(end - start)]
    return memory


def layout_of(memory: Memory) -> Layout:
    return Layout.of(Extent(Range.sized(at, 1), content, origin) for at, (content, origin) in enumerate(memory))


def bytes_of(layout: Layout) -> Memory:
    """The layout spelled out byte by byte, which also asserts that its extents are sorted and disjoint."""
    memory: Memory = []
    for extent in layout.extents:
        assert extent.location.start == len(memory), "a gap or an overlap"
        memory += [(extent.content, extent.origin + at) for at in range(extent.location.size)]
    return memory


@st.composite
def two_places(draw: st.DrawFn) -> tuple[int, int, int]:
    """Two stretches of equal size that do not overlap, in either order."""
    size = draw(st.integers(1, SIZE // 2))
    low = draw(st.integers(0, SIZE - 2 * size))
    high = draw(st.integers(low + size, SIZE - size))
    return draw(st.sampled_from(((low, high, size), (high, low, size))))


copies = two_places().map(lambda place: Copy(*place))
exchanges = two_places().map(lambda place: Exchange(*place))
stretches = st.integers(1, SIZE).flatmap(lambda size: st.tuples(st.integers(0, SIZE - size), st.just(size)))
puts = st.builds(lambda place, origin: Put(place[0], origin, place[1]), stretches, st.integers(0, 2 * SIZE))
checks = stretches.map(lambda place: Check(*place))
any_move = copies | exchanges | puts | checks


def make(memory: Memory, move: Copy | Exchange | Put | Check) -> Memory:
    """Really move: what the purgatory's loops do."""
    after = list(memory)
    if isinstance(move, Check):
        return after
    dst = slice(move.dst, move.dst + move.size)
    if isinstance(move, Put):
        after[dst] = [(K1, move.origin + at) for at in range(move.size)]
        return after
    src = slice(move.src, move.src + move.size)
    after[dst] = memory[src]
    if isinstance(move, Exchange):
        after[src] = memory[dst]
    return after


class TestAgainstBytes:
    @given(memories(), st.lists(any_move, max_size=6))
    def test_any_table(self, memory, moves):
        layout = layout_of(memory)
        for move in moves:
            layout, memory = layout.after(move), make(memory, move)
            assert bytes_of(layout) == memory

    @given(memories(), exchanges)
    def test_an_exchange_twice_changes_nothing(self, memory, move):
        layout = layout_of(memory)
        assert layout.after(move).after(move) == layout
        assert layout.after(move).after(Exchange(move.src, move.dst, move.size)) == layout

    @given(memories(), checks)
    def test_a_check_moves_nothing(self, memory, move):
        layout = layout_of(memory)
        assert layout.after(move) is layout
        assert move.range == Range.sized(move.at, move.size)

    @given(memories(), puts)
    def test_a_put_brings_k1_s_bytes_by_their_own_address(self, memory, move):
        layout = layout_of(memory).after(move)
        (extent,) = layout.within(Range.sized(move.dst, move.size))
        assert (extent.content, extent.source) == (K1, Range.sized(move.origin, move.size))

    @given(memories(), st.lists(exchanges, max_size=6))
    def test_exchanges_lose_nothing(self, memory, moves):
        layout = layout_of(memory)
        for move in moves:
            layout = layout.after(move)
        assert sorted(bytes_of(layout)) == sorted(memory)

    @given(memories(), any_move)
    def test_what_no_move_touches_stays(self, memory, move):
        touched = [Range.sized(move.dst, move.size)] if not isinstance(move, Check) else []
        if isinstance(move, Exchange):
            touched.append(Range.sized(move.src, move.size))
        after = bytes_of(layout_of(memory).after(move))
        assert all(after[at] == memory[at] for at in range(SIZE) if not any(at in r for r in touched))

    @given(memories(), st.lists(any_move, max_size=4))
    def test_the_form_is_canonical(self, memory, moves):
        layout = layout_of(memory)
        for move in moves:
            layout = layout.after(move)
        assert layout == Layout.of(reversed(layout.extents))
        assert layout == layout_of(bytes_of(layout))
        for before, after in pairwise(layout.extents):
            assert before.location.end <= after.location.start
            joined = before.origin + before.location.size == after.origin
            assert not (before.content == after.content and joined and before.location.end == after.location.start)

    @given(memories(), st.lists(any_move, max_size=4))
    def test_locations_name_every_byte_of_k1_in_its_own_order(self, memory, moves):
        layout = layout_of(memory)
        for move in moves:
            layout, memory = layout.after(move), make(memory, move)
        found = list(layout.locations())
        assert [e.origin for e in found] == sorted(e.origin for e in found)
        pairs = [(e.source.start + at, e.location.start + at) for e in found for at in range(e.location.size)]
        assert sorted(pairs) == sorted((origin, at) for at, (content, origin) in enumerate(memory) if content == K1)

    @given(memories(), st.integers(0, SIZE - 1), st.integers(1, SIZE))
    def test_a_window(self, memory, start, size):
        window = Range(start, min(SIZE, start + size))
        seen = layout_of(memory).within(window)
        assert [(e.content, e.origin + at) for e in seen for at in range(e.location.size)] == memory[window.start : window.end]


def at_all(ranges: tuple[Range, ...]) -> list[int]:
    """The places in these stretches, each as often as they name it."""
    return sorted(at for r in ranges for at in range(r.start, r.end))


class TestReadAndWritten:
    """What a row says of itself, held against what the naive model really reads and writes."""

    @given(any_move)
    def test_written_is_what_changes(self, move):
        """Exactly: no byte of this memory is like another, or like one that a put brings."""
        memory = [("free", 1000 + at) for at in range(SIZE)]
        after = make(memory, move)
        assert [at for at in range(SIZE) if after[at] != memory[at]] == at_all(move.written)

    @given(memories(), any_move)
    def test_what_is_written_depends_on_what_is_read_alone(self, memory, move):
        read = set(at_all(move.read))
        other = [memory[at] if at in read else ("elsewhere", at) for at in range(SIZE)]
        written = at_all(move.written)
        assert [make(memory, move)[at] for at in written] == [make(other, move)[at] for at in written]

    @given(copies | exchanges)
    def test_what_is_read_is_what_arrives(self, move):
        memory = [("free", 1000 + at) for at in range(SIZE)]
        after = make(memory, move)
        assert sorted(after[at] for at in at_all(move.written)) == [memory[at] for at in at_all(move.read)]

    @pytest.mark.parametrize(
        ("move", "read", "written"),
        [
            (Copy(0x100, 0x800, 0x80), (Range(0x800, 0x880),), (Range(0x100, 0x180),)),
            (Exchange(0x100, 0x800, 0x80), *[(Range(0x100, 0x180), Range(0x800, 0x880))] * 2),
            (Put(0x100, 0x80, 0x80), (), (Range(0x100, 0x180),)),
            (Check(0x100, 0x80), (Range(0x100, 0x180),), ()),
        ],
        ids=lambda value: type(value).__name__.lower() if not isinstance(value, tuple) else "",
    )
    def test_each_kind_of_row(self, move, read, written):
        assert (move.read, move.written) == (read, written)


class TestWithHoles:
    def test_a_hole_stays_a_hole(self):
        layout = Layout.of([Extent(Range(0, 8), K1, 0), Extent(Range(16, 24), K1, 16)])
        after = layout.after(Exchange(0, 16, 8))
        assert after.extents == (Extent(Range(0, 8), K1, 16), Extent(Range(16, 24), K1, 0))

    def test_overlaid_replaces_and_splits(self):
        layout = Layout.of([Extent(Range(0, 10), K1, 100)])
        assert layout.overlaid(Extent(Range(3, 5), "fdt", 0)).extents == (
            Extent(Range(0, 3), K1, 100),
            Extent(Range(3, 5), "fdt", 0),
            Extent(Range(5, 10), K1, 105),
        )


def test_the_exchange_of_the_2005_mail():
    """K1 below, K2 in its region: afterwards they have changed places, K1's head included."""
    k1, k2 = Range(0, 0x1000), Range(0x4000, 0x5000)
    layout = Layout.of([Extent(Range(0, 0x4000), K1, 0), Extent(k2, "kernel", 0)])
    layout = layout.after(Copy(0, 0x4000, HEAD_SIZE))  # K1 dies: its first bytes are overwritten
    assert Extent(Range(0, HEAD_SIZE), "kernel", 0) in layout.extents
    layout = layout.after(Put(0, 0, HEAD_SIZE)).after(Exchange(0, k2.start, k1.size))
    assert layout.extents == (
        Extent(k1, "kernel", 0),
        Extent(Range(0x1000, 0x4000), K1, 0x1000),
        Extent(k2, K1, 0),
    )


@pytest.mark.parametrize("value", [LINE, HEAD_SIZE])
def test_lines_make_up_the_head(value):
    assert HEAD_SIZE % LINE == 0
    assert value & (value - 1) == 0
