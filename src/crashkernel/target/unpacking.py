"""A dump that arrives as a stream, put where it belongs: a flattened one becomes the file it is about, another stays as it is.

No data is kept in memory, and whoever puts pieces can be interrupted between two of them and go on in another process: putting
a piece again does no harm.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from crashkernel.errors import FormatError
from crashkernel.formats.fields import count, mapping
from crashkernel.formats.flattened import SIGNATURE, Decoder
from crashkernel.target.manifest import Contents, piece_digest

_ELF = b"\x7fELF"
_EXTENT = struct.Struct(">QQ32s")
_LONGEST_EXTENT = 64 << 20
"""Bytes under one digest at the most: a TiB's take less than 1 MiB of memory."""
_MOST_HOLES = 16 << 20
"""Bytes of a dump that a flattened stream may be silent about. Between a dump's parts, some ten, there is padding of a page at
the most; a stream of a few bytes about a file of many TiB would have its receiver read them all."""


class Extents:
    """What was put where: (file offset, size, sha256) of what lies in one go, in the order in which it was put.

    A flattened stream's digest is of the stream, which is not what is stored. These are taken from the same memory that the
    stream's digest was taken of, and what is stored must give them again: a disk that lost some is found out, and not signed.
    """

    def __init__(self, packed: bytes | bytearray = b"") -> None:
        """Go on where another stood that was `packed`.

        :raise FormatError: it is none.
        """
        if len(packed) % _EXTENT.size:
            raise FormatError("no extents of a dump: they are cut off")
        self._packed = bytearray(packed)
        self._start = self._end = 0
        self._hash = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._packed) // _EXTENT.size + (self._end > self._start)

    def note(self, file_offset: int, data: memoryview) -> None:
        """These bytes are put there."""
        if file_offset != self._end or self._end - self._start >= _LONGEST_EXTENT:
            self._close()
            self._start = self._end = file_offset
        self._hash.update(data)
        self._end += len(data)

    def packed(self) -> bytes:
        """All of them, as bytes."""
        self._close()
        return bytes(self._packed)

    def first_lost(self, descriptor: int, *, start: int = 0, progress: Callable[[], None] = lambda: None) -> int | None:
        """The file offset of an extent that an open file does not give back; None if it gives back all.

        Of two for the same bytes the later one counts; of an earlier one that a later one overlaps in part, the rest is not
        compared (no writer of dumps does that: it overwrites what it wrote as a whole, if at all).

        :raise OSError: it cannot be read.
        """
        covered = _Covered()
        for file_offset, size, digest in self._backwards():
            if not covered.add(file_offset, file_offset + size):
                continue
            try:
                if piece_digest(descriptor, start + file_offset, size) != digest:
                    return file_offset
            except OSError as error:
                if error.errno:
                    raise
                return file_offset  # the file ends before
            progress()
        return None

    def holes(self, size: int) -> list[tuple[int, int]]:
        """The ranges of file offsets below `size` where nothing was put: they are to be zeros."""
        covered = _Covered()
        for file_offset, extent_size, _ in self._backwards():
            covered.add(file_offset, file_offset + extent_size)
        edges = [0, *(edge for pair in zip(covered.starts, covered.ends, strict=True) for edge in pair), size]
        return [(edges[at], edges[at + 1]) for at in range(0, len(edges), 2) if edges[at] < edges[at + 1]]

    def _backwards(self) -> list[tuple[int, int, bytes]]:
        self._close()
        return list(_EXTENT.iter_unpack(self._packed))[::-1]

    def _close(self) -> None:
        if self._end > self._start:
            self._packed += _EXTENT.pack(self._start, self._end - self._start, self._hash.digest())
            self._hash = hashlib.sha256()
        self._start = self._end


class _Covered:
    """Ranges that do not touch, in order."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []

    def add(self, start: int, end: int) -> bool:
        """Add a range; whether none of it was there."""
        first, last = bisect_left(self.ends, start), bisect_right(self.starts, end)
        new = all(self.ends[at] == start or self.starts[at] == end for at in range(first, last))
        if first < last:
            start, end = min(start, self.starts[first]), max(end, self.ends[last - 1])
        self.starts[first:last], self.ends[first:last] = [start], [end]
        return new


class Unpacker:
    """Puts a stream into an open file or device, from file offset `start` on, up to `limit` bytes.

    Whether the stream is flattened, its first piece says; of a flattened one, `extents` get to know what was put where.
    """

    def __init__(self, descriptor: int, *, start: int = 0, limit: int = 1 << 62, extents: Extents | None = None) -> None:
        self.size = 0  # bytes of the dump so far: where its last byte ends
        self._descriptor = descriptor
        self._start = start
        self._limit = limit
        self._extents = extents
        self._position = 0  # in the stream
        self._decoder: Decoder | None = None

    @property
    def flattened(self) -> bool:
        """Whether the stream is flattened, and what is stored is not the stream itself."""
        return self._decoder is not None

    def put(self, data: bytes | memoryview) -> None:
        """Put the next piece; the first has at least 12 bytes or is the only one.

        :raise FormatError: it is damaged.
        :raise OSError: it cannot be written; EFBIG: the dump goes beyond its limit.
        """
        view = memoryview(data)
        if self._position == 0 and view[: len(SIGNATURE)] == SIGNATURE:
            self._decoder = Decoder("stream")
        if self._decoder is None:
            self._write(view, self._position)
        else:
            for file_offset, some in self._decoder.feed(view):
                self._write(some, file_offset)
                if self._extents is not None:
                    self._extents.note(file_offset, some)
        self._position += len(view)

    def finish(self) -> None:
        """The stream has ended.

        :raise FormatError: it ought to have gone on, or it was about a file that is mostly holes.
        """
        if self._decoder is not None:
            self._decoder.finish()
            if self.size > self._position + _MOST_HOLES:
                raise FormatError(f"a flattened stream of {self._position:,} bytes about a file of {self.size:,}")

    def contents(self, sent: Contents) -> Contents:
        """What is stored, given what the sender says of the stream."""
        if not self.flattened:
            return sent
        elf = os.pread(self._descriptor, len(_ELF), self._start) == _ELF
        return replace(sent, format="elf" if elf else "kdump-compressed")

    def state(self) -> dict[str, Any]:
        """Where it stands, for JSON."""
        return {
            "size": self.size,
            "position": self._position,
            "decoder": None if self._decoder is None else self._decoder.state(),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where another stood whose `state` this was.

        :raise FormatError: it is none.
        """
        try:
            self.size, self._position = count(state["size"], 1 << 63), count(state["position"], 1 << 63)
            decoder = state["decoder"]
            self._decoder = None if decoder is None else Decoder.resumed(mapping(decoder), "stream")
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"no state of an unpacker: {error}") from error

    def _write(self, data: memoryview, file_offset: int) -> None:
        if file_offset + len(data) > self._limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self.size = max(self.size, file_offset + len(data))
        while data:
            done = os.pwrite(self._descriptor, data, self._start + file_offset)
            data, file_offset = data[done:], file_offset + done
