"""The bitmaps of a kdump-compressed dump, read a piece after the other, and the numbers of the pages that are set in one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from crashkernel.dump.dumpbytes import DumpBytes
from crashkernel.errors import FormatError

Pfns = NDArray[np.int64]

PIECE = 1 << 17
"""Bytes of bitmap that are looked at together: a million pages."""

# How many pages a block has of which the directory counts the dumped ones: 8192, but never more blocks than make 16 MiB.
_BLOCK_PAGES, _MAX_BLOCKS = 1 << 13, 1 << 21
_BLOCKS_REMEMBERED = 8  # 40 KiB each; page tables, log and page structs lie apart

_POPULATION = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
"""How many bits a byte has."""


def runs(breaks: NDArray[np.intp], count: int) -> Iterator[tuple[int, int]]:
    """Yield the half-open runs of `count` things that begin at 0 and at each of `breaks`, ascending."""
    if count:
        edges = [0, *breaks.tolist(), count]
        yield from pairwise(edges)


class Bitmap:
    """A bitmap in a file: bit n of byte m is page frame 8m + n. What is set beyond `max_pfn` does not count."""

    def __init__(self, data: DumpBytes, file_offset: int, max_pfn: int) -> None:
        self._data = data
        self._file_offset = file_offset
        self.max_pfn = max_pfn

    def raw(self, pfn: int, count: int) -> NDArray[np.uint8]:
        """Bits of `count` page frames from `pfn` on, both multiples of 8, as they are stored; fewer at the end.

        :raise FormatError: the file ends before.
        """
        size = min(count, self.max_pfn - pfn + 7) // 8
        data = self._data.read(self._file_offset + pfn // 8, size)
        if len(data) < size:
            raise FormatError("cut off in its bitmaps", source=self._data.name, offset=self._data.size)
        bits = np.frombuffer(data, np.uint8)
        if pfn + 8 * size > self.max_pfn:
            bits = bits.copy()
            bits[-1] &= (1 << self.max_pfn % 8) - 1
        return bits

    def bits(self, pfn: int, count: int) -> NDArray[np.uint8]:
        """Whether each of `count` page frames from `pfn` on is set (1 or 0); fewer at the end."""
        return np.unpackbits(self.raw(pfn, count), bitorder="little")[: self.max_pfn - pfn]

    def pieces(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield all of the bitmap: the first page frame of a piece, and its bytes."""
        for pfn in range(0, self.max_pfn, 8 * PIECE):
            yield pfn, self.raw(pfn, 8 * PIECE)

    def count(self) -> int:
        """How many page frames are set."""
        return sum(int(_POPULATION[data].sum(dtype=np.int64)) for _, data in self.pieces() if data.any())

    def stretches(self) -> Iterator[tuple[int, int]]:
        """Yield half-open ranges of page frames that are set, ascending; two may touch."""
        for pfn, data in self.pieces():
            if not data.any():
                continue
            if (data == 0xFF).all():
                yield pfn, pfn + 8 * len(data)
                continue
            bits = np.unpackbits(data, bitorder="little")
            edges = np.flatnonzero(np.diff(bits, prepend=0, append=0)) + pfn
            yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


class Directory:
    """How many pages are set before each block of a bitmap, and from that the number of any page that is set."""

    def __init__(self, bitmap: Bitmap) -> None:
        self._bitmap = bitmap
        pages = _BLOCK_PAGES
        while pages * _MAX_BLOCKS < bitmap.max_pfn:
            pages *= 2
        self._pages = pages
        counts = np.zeros(-(-bitmap.max_pfn // pages) + 1, np.int64)
        block_size = pages // 8
        for pfn, data in bitmap.pieces():
            if not data.any():
                continue
            bits = _POPULATION[data]
            if block_size >= len(bits):
                counts[pfn // pages + 1] += int(bits.sum(dtype=np.int64))
                continue
            sums = np.add.reduceat(bits, np.arange(0, len(bits), block_size), dtype=np.int64)
            counts[pfn // pages + 1 : pfn // pages + 1 + len(sums)] = sums
        self._before = np.cumsum(counts)
        self.total = int(self._before[-1])
        self._blocks: OrderedDict[int, tuple[NDArray[np.uint8], NDArray[np.int32]]] = OrderedDict()

    def numbers(self, pfns: Pfns) -> tuple[Pfns, int | None]:
        """Return the number of each page among those that are set, and the first page frame that is not, if there is one."""
        numbers = np.empty(len(pfns), np.int64)
        if len(pfns) and not 0 <= int(pfns[0]) <= int(pfns[-1]) < self._bitmap.max_pfn:
            return numbers, int(pfns[0] if pfns[0] < 0 else pfns[np.argmax(pfns >= self._bitmap.max_pfn)])
        blocks = pfns // self._pages
        for first, last in runs(np.flatnonzero(np.diff(blocks)) + 1, len(pfns)):
            block = int(blocks[first])
            bits, before = self._block(block)
            within = pfns[first:last] - block * self._pages
            there = bits[within]
            if not there.all():
                return numbers, int(pfns[first + int(np.argmin(there))])
            numbers[first:last] = before[within] + self._before[block]
        return numbers, None

    def _block(self, block: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        found = self._blocks.get(block)
        if found is None:
            bits = self._bitmap.bits(block * self._pages, self._pages)
            before = np.cumsum(bits, dtype=np.int32)
            before -= bits
            found = self._blocks[block] = bits, before
            if len(self._blocks) > _BLOCKS_REMEMBERED:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(block)
        return found
