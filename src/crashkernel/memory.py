"""Ranges of physical memory and sets of them: half-open, in bytes, and the ground everything else stands on.

A `Range` is never empty, so an empty intersection is None and an empty set is falsy. A `RangeSet` is always sorted,
disjoint and coalesced, so two sets that hold the same bytes are equal, and every operation is one merge of two sorted
lists: a machine with thousands of memory blocks costs milliseconds, even on an emulated CPU.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from crashkernel.errors import UsageError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SUFFIXES = "kmgt"
_DIGITS = frozenset("0123456789")
_HEX_DIGITS = frozenset("0123456789abcdef")
_ADDRESS_SPACE = 1 << 64
_LONGEST_NUMBER = 20  # digits of 2**64 - 1, the decimal form being the longest


def align_down(value: int, alignment: int) -> int:
    """Return the highest multiple of `alignment` (bytes, any positive number) that is not above `value`.

    :raise ValueError: when `alignment` is not positive.
    """
    if alignment <= 0:
        raise ValueError(f"alignment {alignment} is not positive")
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """Return the lowest multiple of `alignment` (bytes, any positive number) that is not below `value`.

    :raise ValueError: when `alignment` is not positive.
    """
    return -align_down(-value, alignment)


@dataclass(frozen=True, order=True, slots=True)
class Range:
    """The bytes [start, end) of an address space; never empty. Ordered by start, then end.

    :raise ValueError: when `start` is negative or `end` is not above it.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"{self.start:#x}-{self.end:#x} is not a range: it must hold at least one byte, from 0 up")

    @classmethod
    def sized(cls, start: int, size: int) -> Range:
        """Return the `size` bytes from `start` on.

        :raise ValueError: when `start` is negative or `size` is not positive.
        """
        return cls(start, start + size)

    @property
    def size(self) -> int:
        """Number of bytes, at least 1."""
        return self.end - self.start

    def __contains__(self, paddr: int) -> bool:
        return self.start <= paddr < self.end

    def contains(self, other: Range) -> bool:
        """Whether every byte of `other` is in this range."""
        return self.start <= other.start and other.end <= self.end

    def overlaps(self, other: Range) -> bool:
        """Whether the two share at least one byte; ranges that only touch do not."""
        return self.start < other.end and other.start < self.end

    def intersection(self, other: Range) -> Range | None:
        """Return the bytes that are in both, or None when there are none."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Range(start, end) if start < end else None

    def align_outward(self, alignment: int) -> Range:
        """Return the smallest range with both ends on multiples of `alignment` that contains this one."""
        return Range(align_down(self.start, alignment), align_up(self.end, alignment))

    def align_inward(self, alignment: int) -> Range | None:
        """Return the largest range inside this one with both ends on multiples of `alignment`, or None."""
        start, end = align_up(self.start, alignment), align_down(self.end, alignment)
        return Range(start, end) if start < end else None

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end:#x}"


@dataclass(frozen=True, init=False, slots=True)
class RangeSet:
    """A set of bytes, as sorted, disjoint ranges that do not touch. Immutable, hashable, equal when the bytes are.

    Built from ranges in any order; overlapping and touching ones become one.
    """

    ranges: tuple[Range, ...]

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        merged: list[Range] = []
        for each in sorted(ranges):
            if merged and each.start <= merged[-1].end:
                if each.end > merged[-1].end:
                    merged[-1] = Range(merged[-1].start, each.end)
            else:
                merged.append(each)
        object.__setattr__(self, "ranges", tuple(merged))

    def __iter__(self) -> Iterator[Range]:
        return iter(self.ranges)

    def __len__(self) -> int:
        """Number of ranges, not of bytes: those are `total`."""
        return len(self.ranges)

    def __str__(self) -> str:
        return ", ".join(map(str, self.ranges)) or "nothing"

    @property
    def total(self) -> int:
        """Number of bytes in the set."""
        return sum(each.size for each in self.ranges)

    def __or__(self, other: RangeSet) -> RangeSet:
        return RangeSet((*self.ranges, *other.ranges))

    def __and__(self, other: RangeSet) -> RangeSet:
        shared: list[Range] = []
        ours, theirs = 0, 0
        while ours < len(self.ranges) and theirs < len(other.ranges):
            mine, its = self.ranges[ours], other.ranges[theirs]
            if (both := mine.intersection(its)) is not None:
                shared.append(both)
            if mine.end <= its.end:
                ours += 1
            else:
                theirs += 1
        return RangeSet(shared)

    def __sub__(self, other: RangeSet) -> RangeSet:
        kept: list[Range] = []
        theirs = 0
        for each in self.ranges:
            start = each.start
            while theirs < len(other.ranges) and other.ranges[theirs].start < each.end:
                hole = other.ranges[theirs]
                if start < hole.start:
                    kept.append(Range(start, hole.start))
                start = max(start, hole.end)
                if hole.end > each.end:
                    break  # the hole reaches on, perhaps into the next range
                theirs += 1
            if start < each.end:
                kept.append(Range(start, each.end))
        return RangeSet(kept)

    def _at_or_below(self, paddr: int) -> Range | None:
        """Return the last range that starts at or below `paddr`."""
        index = bisect_right(self.ranges, paddr, key=lambda each: each.start)
        return self.ranges[index - 1] if index else None

    def __contains__(self, paddr: int) -> bool:
        candidate = self._at_or_below(paddr)
        return candidate is not None and paddr in candidate

    def covers(self, wanted: Range) -> bool:
        """Whether every byte of `wanted` is in the set."""
        candidate = self._at_or_below(wanted.start)
        return candidate is not None and candidate.contains(wanted)

    def overlaps(self, wanted: Range) -> bool:
        """Whether at least one byte of `wanted` is in the set."""
        candidate = self._at_or_below(wanted.end - 1)
        return candidate is not None and candidate.overlaps(wanted)

    def find(self, size: int, alignment: int) -> Range | None:
        """Return the lowest `size` bytes of the set that start on `alignment`, or None.

        :raise ValueError: when `size` or `alignment` is not positive.
        """
        if size <= 0:
            raise ValueError(f"size {size} is not positive")
        for each in self.ranges:
            start = align_up(each.start, alignment)
            if start + size <= each.end:
                return Range.sized(start, size)
        return None


def parse_size(text: str) -> int:
    """Read a number of bytes: decimal or 0x hexadecimal, with an optional K, M, G or T (powers of 1024, any case).

    Follows `memparse` (kernel `lib/cmdline.c`), so that a size means here what it means on a kernel command line. What
    `memparse` reads differently from people is refused: a leading zero (octal there), and anything of 64 bits or more.

    :raise UsageError: when the text is none of this.
    """
    hint = "a size is written like 512M, 1G or 0x20000000"
    number = text.lower() if text.isascii() else ""
    shift = 0
    if number and number[-1] in _SUFFIXES:
        shift = 10 * (_SUFFIXES.index(number[-1]) + 1)
        number = number[:-1]
    hexadecimal = number.startswith("0x")
    digits = number[2:] if hexadecimal else number
    if not digits or not set(digits) <= (_HEX_DIGITS if hexadecimal else _DIGITS):
        raise UsageError(f"{text!r} is not a size", hint=hint)
    if not hexadecimal and digits[0] == "0" and len(digits) > 1:
        raise UsageError(f"{text!r} has a leading zero, which the kernel would read as octal", hint=hint)
    # The length goes first: int() refuses thousands of digits with an error of its own.
    if len(digits) > _LONGEST_NUMBER or (value := int(digits, 16 if hexadecimal else 10) << shift) >= _ADDRESS_SPACE:
        raise UsageError(f"{text!r} does not fit in 64 bits", hint=hint)
    return value


def format_size(size: int) -> str:
    """Write a number of bytes for people: `512 MiB` when exact, `39.1 MiB` (one decimal, rounded) when not.

    :raise ValueError: when `size` is negative.
    """
    if size < 0:
        raise ValueError(f"size {size} is negative")
    power = min(max(size.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    unit = 1 << (10 * power)
    if size % unit == 0:
        return f"{size // unit} {_UNITS[power]}"
    tenths = (size * 20 + unit) // (2 * unit)
    if tenths >= 10240 and power < len(_UNITS) - 1:
        tenths, power = 10, power + 1  # 1023.96 KiB is 1.0 MiB, not 1024.0 KiB
    return f"{tenths // 10}.{tenths % 10} {_UNITS[power]}"
