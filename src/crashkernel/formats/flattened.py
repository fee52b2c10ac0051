"""The flattened stream: a file as records of (offset, size, bytes), for what cannot be written at any offset.

References: makedumpfile `makedumpfile.h` (struct makedumpfile_header, makedumpfile_data_header), `write_start_flat_header`,
`write_buffer`, `rearrange_dumpdata`; makedumpfile(8), option -F. All numbers are big-endian, whatever the dump's byte order.

    4096 bytes      "makedumpfile", padded to 16 bytes; type 1 and version 1 as 64-bit numbers; zeros
    records         offset and size as signed 64-bit numbers, then so many bytes
    the end         a record whose offset and size are -1

Of two records for the same bytes the later one counts. What no record is about, up to the end of the last byte, is zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from crashkernel.errors import FormatError, UsageError
from crashkernel.formats.fields import boolean, count, text

SIGNATURE = b"makedumpfile"
HEADER_SIZE = 4096
RECORD_HEADER_SIZE = 16
_SIGNATURE_SIZE = 16
_HEADER = f">{_SIGNATURE_SIZE}sqq"
_RECORD = ">qq"
_TYPE = _VERSION = 1
_END = -1

HEADER = struct.pack(_HEADER, SIGNATURE, _TYPE, _VERSION).ljust(HEADER_SIZE, b"\0")
"""What a stream begins with."""
END = struct.pack(_RECORD, _END, _END)
"""What it ends with."""

MAX_RECORD = (1 << 31) - 1
"""Bytes of a record at the most that we write: makedumpfile and crash count them in an int."""
# ext4's largest file has 16 TiB, XFS's 8 EiB; beyond this, an offset is not one that was ever written.
_MAX_END = 1 << 62


@dataclass(frozen=True, slots=True)
class Record:
    """A record's header: the `size` bytes behind it belong at `file_offset`."""

    file_offset: int
    size: int

    @property
    def end(self) -> int:
        """The offset behind the last byte."""
        return self.file_offset + self.size


def record_header(file_offset: int, size: int) -> bytes:
    """What stands before `size` bytes that belong at `file_offset`.

    :raise UsageError: there are none, or more than readers can count.
    """
    if file_offset < 0 or not 0 < size <= MAX_RECORD:
        raise UsageError(f"no record of {size:#x} bytes at {file_offset:#x}")
    return struct.pack(_RECORD, file_offset, size)


def check_header(data: bytes, source: str = "") -> None:
    """Whether a stream begins with `data`, at least `HEADER_SIZE` bytes.

    :raise FormatError: it does not.
    """
    if data[: len(SIGNATURE)] != SIGNATURE:
        raise FormatError("not a flattened dump", source=source, offset=0)
    if len(data) < HEADER_SIZE:
        raise FormatError(f"cut off in the flattened stream's header, after {len(data)} bytes", source=source)
    signature, kind, version = struct.unpack_from(_HEADER, data)
    if signature.rstrip(b"\0") != SIGNATURE or (kind, version) != (_TYPE, _VERSION):
        raise FormatError(f"a flattened stream of type {kind} and version {version}, not 1 and 1", source=source, offset=0)


def read_record_header(data: bytes, at: int, source: str = "") -> Record | None:
    """The record whose header is `data`, found `at` bytes into the stream; None for the end.

    :raise FormatError: no record begins like this.
    """
    if len(data) < RECORD_HEADER_SIZE:
        raise FormatError("the flattened stream is cut off before its end", source=source, offset=at)
    file_offset, size = struct.unpack(_RECORD, data[:RECORD_HEADER_SIZE])
    if (file_offset, size) == (_END, _END):
        return None
    if file_offset < 0 or size <= 0 or file_offset + size > _MAX_END:
        raise FormatError(f"a record of {size:#x} bytes for offset {file_offset:#x}", source=source, offset=at)
    return Record(file_offset, size)


class Decoder:
    """Takes a stream as it comes, in pieces of any size, and gives what is to be written where; keeps no data.

    `ended` is true once the end has been seen, `position` counts the stream's bytes so far.
    """

    def __init__(self, source: str = "") -> None:
        self.ended = False
        self.position = 0
        self._source = source
        self._head = bytearray()  # of the stream's or a record's header, what has come of it
        self._wanted = HEADER_SIZE
        self._in_records = False
        self._file_offset = 0
        self._left = 0  # bytes of the current record that are still to come

    def state(self) -> dict[str, int | bool | str]:
        """Where the decoder stands, for JSON: another one can go on from there (`resumed`), also in another process."""
        return {
            "ended": self.ended,
            "position": self.position,
            "head": self._head.hex(),
            "in_records": self._in_records,
            "file_offset": self._file_offset,
            "left": self._left,
        }

    @classmethod
    def resumed(cls, state: Mapping[str, Any], source: str = "") -> Decoder:
        """A decoder that stands where the one stood whose `state` this was.

        :raise FormatError: it is none.
        """
        decoder = cls(source)
        try:
            decoder.ended, decoder._in_records = boolean(state["ended"]), boolean(state["in_records"])
            decoder.position, decoder._file_offset, decoder._left = (
                count(state[name], 2 * _MAX_END) for name in ("position", "file_offset", "left")
            )
            decoder._head = bytearray.fromhex(text(state["head"]))
            decoder._wanted = RECORD_HEADER_SIZE if decoder._in_records else HEADER_SIZE
            if len(decoder._head) >= decoder._wanted:
                raise ValueError(f"{len(decoder._head)} bytes of a header of {decoder._wanted}")
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"no state of a decoder: {error}", source=source) from error
        return decoder

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield (file offset, bytes) of what `data`, the next piece of the stream, holds; to be used before the next piece.

        :raise FormatError: it is no flattened stream, or goes on behind its end.
        """
        view = memoryview(data)
        while view:
            if self.ended:
                raise FormatError("the flattened stream goes on behind its end", source=self._source, offset=self.position)
            if self._left:
                some = view[: self._left]
                yield self._file_offset, some
                self._file_offset += len(some)
                self._left -= len(some)
            else:
                some = view[: self._wanted - len(self._head)]
                self._head += some
            self.position += len(some)
            view = view[len(some) :]
            if len(self._head) == self._wanted:
                self._take_head()

    def finish(self) -> None:
        """The stream has ended.

        :raise FormatError: before its end.
        """
        if not self.ended:
            message = "the flattened stream is cut off before its end"
            raise FormatError(message, source=self._source, offset=self.position)

    def _take_head(self) -> None:
        head, at = bytes(self._head), self.position - len(self._head)
        self._head.clear()
        if not self._in_records:
            check_header(head, self._source)
            self._in_records, self._wanted = True, RECORD_HEADER_SIZE
            return
        record = read_record_header(head, at, self._source)
        if record is None:
            self.ended = True
        else:
            self._file_offset, self._left = record.file_offset, record.size
