"""A dump that arrives as a stream, put where it belongs: a flattened one becomes the file it is about, another stays as it is.

Nothing is kept in memory, and whoever puts pieces can be interrupted between two of them and go on in another process: putting
a piece again does no harm.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from crashkernel.errors import FormatError
from crashkernel.formats.fields import count, mapping
from crashkernel.formats.flattened import SIGNATURE, Decoder
from crashkernel.target.manifest import Contents

_ELF = b"\x7fELF"


class Unpacker:
    """Puts a stream into an open file or device, from file offset `start` on, up to `limit` bytes.

    Whether the stream is flattened, its first piece says.
    """

    def __init__(self, descriptor: int, *, start: int = 0, limit: int = 1 << 62) -> None:
        self.size = 0  # bytes of the dump so far: where its last byte ends
        self._descriptor = descriptor
        self._start = start
        self._limit = limit
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
        self._position += len(view)

    def finish(self) -> None:
        """The stream has ended.

        :raise FormatError: it ought to have gone on.
        """
        if self._decoder is not None:
            self._decoder.finish()

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
