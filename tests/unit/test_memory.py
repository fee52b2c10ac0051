import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.errors import UsageError
from crashkernel.memory import Range, RangeSet, align_down, align_up, format_size, parse_size

SPACE = 48  # the naive model's address space, in bytes
ranges = st.builds(Range.sized, st.integers(0, SPACE - 8), st.integers(1, 8))
range_lists = st.lists(ranges, max_size=8)
alignments = st.integers(1, 9)


def bytes_of(*parts: Range) -> set[int]:
    return {paddr for part in parts for paddr in range(part.start, part.end)}


class TestRange:
    @pytest.mark.parametrize(("start", "end"), [(1, 0), (-1, 4), (-4, -1), (0, 0), (5, 5)])
    def test_refuses_what_holds_no_byte_or_starts_below_zero(self, start, end):
        with pytest.raises(ValueError, match="not a range"):
            Range(start, end)

    def test_reads_like_the_mail(self):
        assert str(Range.sized(0x20000000, 0x20000000)) == "0x20000000-0x40000000"
        assert Range(0, 0x100).size == 0x100

    def test_is_half_open(self):
        assert 0x100 in Range(0x100, 0x200)
        assert 0x200 not in Range(0x100, 0x200)
        assert not Range(0, 0x100).overlaps(Range(0x100, 0x200))

    def test_sorts_by_start_then_end(self):
        assert sorted([Range(2, 3), Range(1, 9), Range(1, 2)]) == [Range(1, 2), Range(1, 9), Range(2, 3)]

    def test_aligns_both_ways(self):
        page = 0x10000
        assert Range(0x12345, 0x34567).align_outward(page) == Range(0x10000, 0x40000)
        assert Range(0x12345, 0x34567).align_inward(page) == Range(0x20000, 0x30000)
        assert Range(0x12345, 0x1FFFF).align_inward(page) is None

    @given(ranges, ranges)
    def test_agrees_with_sets_of_bytes(self, one, other):
        both = bytes_of(one) & bytes_of(other)
        assert one.overlaps(other) == bool(both)
        assert one.contains(other) == (bytes_of(other) <= bytes_of(one))
        shared = one.intersection(other)
        assert (bytes_of(shared) if shared else set()) == both

    @given(ranges, alignments)
    def test_alignment_is_tight(self, one, alignment):
        outer = one.align_outward(alignment)
        assert outer.contains(one)
        assert outer.start % alignment == outer.end % alignment == 0
        assert one.start - outer.start < alignment > outer.end - one.end
        inner = one.align_inward(alignment)
        blocks = [at for at in range(0, SPACE, alignment) if at >= one.start and at + alignment <= one.end]
        assert (bytes_of(inner) if inner else set()) == bytes_of(*(Range.sized(at, alignment) for at in blocks))


class TestRangeSet:
    @given(range_lists)
    def test_is_sorted_disjoint_and_coalesced(self, parts):
        held = RangeSet(parts)
        assert bytes_of(*held) == bytes_of(*parts)
        assert all(left.end < right.start for left, right in zip(held.ranges, held.ranges[1:], strict=False))
        assert held.total == len(bytes_of(*parts))
        assert bool(held) == bool(parts)
        assert held == RangeSet(reversed(parts))
        assert hash(held) == hash(RangeSet(reversed(parts)))

    @given(range_lists, range_lists)
    def test_algebra_agrees_with_sets_of_bytes(self, one, other):
        ours, theirs = RangeSet(one), RangeSet(other)
        for result, model in (
            (ours | theirs, bytes_of(*one) | bytes_of(*other)),
            (ours & theirs, bytes_of(*one) & bytes_of(*other)),
            (ours - theirs, bytes_of(*one) - bytes_of(*other)),
        ):
            assert bytes_of(*result) == model
            assert result == RangeSet(result)

    @given(range_lists, ranges)
    def test_queries_agree_with_sets_of_bytes(self, parts, wanted):
        held, model = RangeSet(parts), bytes_of(*parts)
        assert held.covers(wanted) == (bytes_of(wanted) <= model)
        assert held.overlaps(wanted) == bool(bytes_of(wanted) & model)
        assert {paddr for paddr in range(SPACE + 1) if paddr in held} == model

    @given(range_lists, st.integers(1, 12), alignments)
    def test_find_is_the_lowest(self, parts, size, alignment):
        held, model = RangeSet(parts), bytes_of(*parts)
        fits = [at for at in range(0, SPACE, alignment) if bytes_of(Range.sized(at, size)) <= model]
        assert held.find(size, alignment) == (Range.sized(fits[0], size) if fits else None)

    def test_one_hole_across_several_ranges(self):
        ram = RangeSet([Range(0, 10), Range(20, 30), Range(40, 50)])
        assert ram - RangeSet([Range(5, 45)]) == RangeSet([Range(0, 5), Range(45, 50)])

    def test_several_holes_in_one_range(self):
        holes = RangeSet([Range(2, 3), Range(5, 6), Range(9, 12)])
        assert (RangeSet([Range(0, 10)]) - holes).ranges == (Range(0, 2), Range(3, 5), Range(6, 9))

    def test_names_its_ranges(self):
        assert str(RangeSet([Range(0x100, 0x200), Range(0, 0x80)])) == "0x0-0x80, 0x100-0x200"
        assert str(RangeSet()) == "nothing"

    def test_refuses_a_hole_of_no_size(self):
        with pytest.raises(ValueError, match="not positive"):
            RangeSet([Range(0, 10)]).find(0, 1)

    def test_thousands_of_ranges(self):
        even = RangeSet(Range.sized(at, 0x1000) for at in range(0, 20_000 * 0x2000, 0x2000))
        odd = RangeSet(Range.sized(at + 0x1000, 0x1000) for at in range(0, 20_000 * 0x2000, 0x2000))
        assert (even | odd).ranges == (Range(0, 20_000 * 0x2000),)
        assert not even & odd
        assert even - odd == even
        assert all(even.covers(each) for each in even)


@given(st.integers(0, 1 << 70), st.integers(1, 1 << 40))
def test_aligning_numbers(value, alignment):
    down, up = align_down(value, alignment), align_up(value, alignment)
    assert down % alignment == up % alignment == 0
    assert down <= value <= up
    assert value - down < alignment > up - value


@pytest.mark.parametrize("align", [align_down, align_up])
@pytest.mark.parametrize("alignment", [0, -4])
def test_alignment_must_be_positive(align, alignment):
    with pytest.raises(ValueError, match="not positive"):
        align(16, alignment)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("64k", 64 << 10),
        ("1G", 1 << 30),
        ("2T", 2 << 40),
        ("0x20000000", 0x20000000),
        ("0X1fK", 0x1F << 10),
        ("0xffffffffffffffff", (1 << 64) - 1),
        ("18446744073709551615", (1 << 64) - 1),
    ],
)
def test_sizes_are_read_as_the_kernel_reads_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", "M", "0x", "0xM", "-1", "+1", "1.5G", "1 G", " 1", "1_0", "1MB", "1P", "010", "0M1", "\u0661", "1\u212a"),
        *("18446744073709551616", "16777216T", "1" * 10_000, "0x" + "f" * 10_000),
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError):
        parse_size(text)


@given(st.text(max_size=8))
def test_any_text_is_a_size_or_a_usage_error(text):
    try:
        size = parse_size(text)
    except UsageError:
        return
    assert 0 <= size < 1 << 64


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (100, "100 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 << 20, "512 MiB"),
        (0x2714EA4, "39.1 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        ((512 << 20) + 1, "512.0 MiB"),
        (3 << 30, "3 GiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_sizes_are_written_for_people(size, text):
    assert format_size(size) == text


def test_a_negative_size_is_no_size():
    with pytest.raises(ValueError, match="negative"):
        format_size(-1)


@given(st.integers(1, 1023), st.sampled_from("KMGT"))
def test_written_sizes_read_back(number, suffix):
    size = parse_size(f"{number}{suffix}")
    assert parse_size(format_size(size).replace("iB", "").replace(" ", "")) == size
