"""The one idea of this house: a placement is a table of moves over physical memory.

This module is the table's meaning, without any machine: apply the moves one by one to a symbolic memory and see where every
byte of K1 lies at each stage. The vmcore's header, K2's memory, the pictures and the verdict all ask here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from crashkernel.memory import Range

LINE = 128
"""Moves are made of whole cache lines, in bytes: the cache block of every 64-bit POWER server CPU since the 970."""

MAX_MOVES = 31
"""A table's length at most: the purgatory's has 32 rows (AT_TABLE, purgatory.S), the last of which enters K2."""

K1 = "K1"
"""The content that matters: K1's memory, named by the physical address it had when K1 died."""


@dataclass(frozen=True, slots=True)
class Copy:
    """`dst` becomes a copy of `src`; both are physical addresses, `size` is in bytes."""

    dst: int
    src: int
    size: int

    @property
    def read(self) -> tuple[Range, ...]:
        """The stretches this row reads."""
        return (Range.sized(self.src, self.size),)

    @property
    def written(self) -> tuple[Range, ...]:
        """The stretches it writes."""
        return (Range.sized(self.dst, self.size),)


@dataclass(frozen=True, slots=True)
class Exchange:
    """The bytes at `dst` and at `src` change places. What is to be executed goes to `dst`."""

    dst: int
    src: int
    size: int

    @property
    def read(self) -> tuple[Range, ...]:
        """The stretches this row reads."""
        return (Range.sized(self.dst, self.size), Range.sized(self.src, self.size))

    @property
    def written(self) -> tuple[Range, ...]:
        """The stretches it writes: the same."""
        return self.read


@dataclass(frozen=True, slots=True)
class Put:
    """Bytes of K1 that were at `origin` when the plan was loaded, and that the purgatory carries since, go to `dst`."""

    dst: int
    origin: int
    size: int

    @property
    def read(self) -> tuple[Range, ...]:
        """Nothing outside the purgatory."""
        return ()

    @property
    def written(self) -> tuple[Range, ...]:
        """The stretch it writes."""
        return (Range.sized(self.dst, self.size),)


@dataclass(frozen=True, slots=True)
class Check:
    """What lies at `at` must be what the loader put there: held against a digest made at load time. Moves nothing."""

    at: int
    size: int

    @property
    def range(self) -> Range:
        """What is checked."""
        return Range.sized(self.at, self.size)

    @property
    def read(self) -> tuple[Range, ...]:
        """The stretch it reads."""
        return (self.range,)

    @property
    def written(self) -> tuple[Range, ...]:
        """Nothing."""
        return ()


Move = Copy | Exchange | Put | Check


@dataclass(frozen=True, slots=True)
class Extent:
    """Physical memory at `location` holds `content`, from its byte `origin` on."""

    location: Range
    content: str
    origin: int

    @property
    def source(self) -> Range:
        """The stretch of the content that lies here; for `K1` these are addresses at the time of death."""
        return Range.sized(self.origin, self.location.size)

    def clip(self, window: Range) -> Extent | None:
        """The part of this extent inside `window`."""
        part = self.location.intersection(window)
        return None if part is None else Extent(part, self.content, self.origin + part.start - self.location.start)

    def moved(self, distance: int) -> Extent:
        """The same content, `distance` bytes further up."""
        return Extent(Range(self.location.start + distance, self.location.end + distance), self.content, self.origin)


@dataclass(frozen=True, slots=True)
class Layout:
    """What lies where: extents sorted by location, disjoint, neighbours of one content merged."""

    extents: tuple[Extent, ...]

    @classmethod
    def of(cls, extents: Iterable[Extent]) -> Layout:
        """Sort and merge. The extents must not overlap."""
        merged: list[Extent] = []
        for extent in sorted(extents, key=lambda e: e.location.start):
            last = merged[-1] if merged else None
            if (
                last is not None
                and last.content == extent.content
                and last.location.end == extent.location.start
                and last.origin + last.location.size == extent.origin
            ):
                merged[-1] = Extent(Range(last.location.start, extent.location.end), last.content, last.origin)
            else:
                merged.append(extent)
        return cls(tuple(merged))

    def within(self, window: Range) -> tuple[Extent, ...]:
        """The extents inside `window`, clipped to it."""
        return tuple(part for extent in self.extents if (part := extent.clip(window)) is not None)

    def overlaid(self, *pieces: Extent) -> Layout:
        """`pieces` replace whatever was at their locations."""
        kept: list[Extent] = list(self.extents)
        for piece in pieces:
            kept = [part for extent in kept for part in _around(extent, piece.location)]
        return Layout.of([*kept, *pieces])

    def after(self, move: Move) -> Layout:
        """The layout once `move` is made."""
        if isinstance(move, Check):
            return self
        if isinstance(move, Put):
            return self.overlaid(Extent(Range.sized(move.dst, move.size), K1, move.origin))
        dst, src = Range.sized(move.dst, move.size), Range.sized(move.src, move.size)
        distance = move.dst - move.src
        arriving = [extent.moved(distance) for extent in self.within(src)]
        if isinstance(move, Exchange):
            arriving += [extent.moved(-distance) for extent in self.within(dst)]
        return self.overlaid(*arriving)

    def locations(self, content: str = K1) -> Iterator[Extent]:
        """Where `content` lies, in ascending order of its own bytes; a byte that lies twice is yielded twice."""
        yield from sorted((e for e in self.extents if e.content == content), key=lambda e: (e.origin, e.location.start))


def _around(extent: Extent, hole: Range) -> Iterator[Extent]:
    if not extent.location.overlaps(hole):
        yield extent
        return
    if extent.location.start < hole.start:
        yield Extent(Range(extent.location.start, hole.start), extent.content, extent.origin)
    if hole.end < extent.location.end:
        yield Extent(Range(hole.end, extent.location.end), extent.content, extent.origin + hole.end - extent.location.start)
