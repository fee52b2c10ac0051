"""A dump's bytes: a file as it is, or the file that a flattened stream in a file describes.

All is read with `pread`, nothing is mapped: a file that becomes shorter is an error then, not the end of the process.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from crashkernel.errors import EnvironmentFault, FormatError
from crashkernel.formats import flattened

_MAX_RECORDS = 1 << 25  # of a flattened stream: 24 bytes each

_Numbers = NDArray[np.int64]


class DumpBytes(Protocol):
    """A dump's bytes, wherever they lie: `size` is where the last one ends, `stored` how many of them really are in a file.

    `file_size` is how much of a file all this takes.
    """

    name: str
    size: int
    stored: int
    file_size: int
    truncated: bool  # the stream that it came as is cut off

    def read(self, file_offset: int, size: int) -> bytes:
        """Return `size` bytes, or those that there are before the end.

        :raise EnvironmentFault: they cannot be read.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class PlainFile:
    """A file as it is, or `size` bytes of it from file offset `start` on.

    :raise EnvironmentFault: it cannot be opened, or not be read at any place.
    """

    truncated = False

    def __init__(self, path: Path | str, start: int = 0, size: int | None = None) -> None:
        self.name = str(path)
        self._start = start
        try:
            self._descriptor = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise EnvironmentFault(f"cannot open {self.name}: {error.strerror}") from None
        try:
            end = os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError:
            self.close()
            raise EnvironmentFault(f"{self.name} cannot be read at any place: a dump must be a file") from None
        self.size = self.stored = self.file_size = max(min(end - start, end if size is None else size), 0)

    def fileno(self) -> int:
        """Return the open file's descriptor."""
        return self._descriptor

    def read(self, file_offset: int, size: int) -> bytes:
        """Return `size` bytes, or those that there are before the end."""
        size = min(size, self.size - file_offset)
        if size <= 0:
            return b""
        try:
            at = self._start + file_offset
            data = os.pread(self._descriptor, size, at)
            while len(data) < size and (more := os.pread(self._descriptor, size - len(data), at + len(data))):
                data += more
        except OSError as error:
            raise EnvironmentFault(f"cannot read {self.name} at offset {file_offset:#x}: {error.strerror}") from None
        return data

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class FlattenedFile:
    """The file that a flattened stream, itself in a file, describes. Where each record lies is kept, not what it holds.

    A stream that is cut off is read up to there; `truncated` says so.

    :raise FormatError: it is no flattened stream, or a record in it makes no sense; the file is closed then.
    :raise EnvironmentFault: it cannot be read.
    """

    def __init__(self, file: PlainFile) -> None:
        self.name = file.name
        self._file = file
        self.file_size = file.size
        self.truncated = False
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def _index(self) -> None:
        flattened.check_header(self._file.read(0, flattened.HEADER_SIZE), self.name)
        offsets, sizes, places = array("q"), array("q"), array("q")
        at, end = flattened.HEADER_SIZE, self._file.size
        while True:
            head = self._file.read(at, flattened.RECORD_HEADER_SIZE)
            if len(head) < flattened.RECORD_HEADER_SIZE:
                self.truncated = True
                break
            record = flattened.read_record_header(head, at, self.name)
            at += flattened.RECORD_HEADER_SIZE
            if record is None:
                break
            if len(offsets) >= _MAX_RECORDS:
                raise FormatError(
                    f"a flattened stream of more than {_MAX_RECORDS:,} records",
                    source=self.name,
                    hint="let makedumpfile -R put it in order first",
                )
            size = min(record.size, end - at)
            if size > 0:
                offsets.append(record.file_offset)
                sizes.append(size)
                places.append(at)
            if size < record.size:
                self.truncated = True
                break
            at += record.size
        self.stored = sum(sizes)
        self._starts, self._ends, self._places = _in_order(*(np.array(each, np.int64) for each in (offsets, sizes, places)))
        self.size = int(self._ends[-1]) if len(self._ends) else 0

    def read(self, file_offset: int, size: int) -> bytes:
        """Return `size` bytes, or those that there are before the end; what no record is about is zeros."""
        end = min(file_offset + size, self.size)
        if file_offset >= end:
            return b""
        data = bytearray(end - file_offset)
        index = max(int(np.searchsorted(self._starts, file_offset, side="right")) - 1, 0)
        while index < len(self._starts) and (start := int(self._starts[index])) < end:
            first, last = max(file_offset, start), min(end, int(self._ends[index]))
            if first < last:
                piece = self._file.read(int(self._places[index]) + first - start, last - first)
                data[first - file_offset : first - file_offset + len(piece)] = piece
            index += 1
        return bytes(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _in_order(offsets: _Numbers, sizes: _Numbers, places: _Numbers) -> tuple[_Numbers, _Numbers, _Numbers]:
    """Start, end and place in the stream of pieces in ascending order, of which no two are about the same bytes."""
    order = np.argsort(offsets, kind="stable")
    starts, places = offsets[order], places[order]
    ends = starts + sizes[order]
    reach = np.maximum.accumulate(ends)
    # groups of records that overlap; nearly all have one
    breaks = np.flatnonzero(starts[1:] >= reach[:-1]) + 1
    firsts = np.concatenate((np.zeros(min(len(starts), 1), np.int64), breaks))
    lengths = np.diff(np.append(firsts, len(starts)))
    if not (lengths > 1).any():
        return starts, ends, places
    pieces: list[tuple[int, int, int]] = []
    alone = lengths == 1
    for first, length in zip(firsts[~alone].tolist(), lengths[~alone].tolist(), strict=True):
        part = slice(first, first + length)
        pieces += _latest(starts[part].tolist(), ends[part].tolist(), places[part].tolist())
    rest = firsts[alone]
    settled = np.array(pieces, np.int64).reshape(-1, 3)
    both = [np.concatenate(each) for each in zip((starts[rest], ends[rest], places[rest]), settled.T, strict=True)]
    order = np.argsort(both[0], kind="stable")
    return both[0][order], both[1][order], both[2][order]


def _latest(starts: list[int], ends: list[int], places: list[int]) -> Iterator[tuple[int, int, int]]:
    """Of records that overlap, in ascending order, the pieces that count: of the one that stands latest in the stream."""
    edges = sorted({*starts, *ends})
    candidates: list[tuple[int, int]] = []  # (-place, number)
    number = 0
    for start, end in pairwise(edges):
        while number < len(starts) and starts[number] <= start:
            heappush(candidates, (-places[number], number))
            number += 1
        while candidates and ends[candidates[0][1]] <= start:
            heappop(candidates)
        if candidates:
            top = candidates[0][1]
            yield start, end, places[top] + start - starts[top]
