"""A strict reader of kdump-compressed files, for the verdict alone.

`capture` has its own reader and writer of this format; were the verdict to read a dump with them, one misunderstanding on
both sides would pass. So this knows nothing of theirs, and is strict where a reader that must get at a damaged dump would be
lenient: whatever is out of place is an error.

References: makedumpfile's `IMPLEMENTATION` (the layout, version 6), crash's `diskdump.h` (`struct disk_dump_header`,
`struct kdump_sub_header`, `struct page_desc`), libkdumpfile's `src/kdumpfile/diskdump.c`. 64-bit dumps only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Self

import numpy as np

from crashkernel.errors import EnvironmentFault, VerificationError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from crashkernel.formats.elf import ByteOrder

_SIGNATURE = b"KDUMP   "
_VERSION = 6
# struct disk_dump_header: signature, version, utsname, (pad), timestamp, status, block_size, sub_hdr_size, bitmap_blocks, ...
_UTSNAME = slice(12, 402)
_COUNTS = 424, "IiiII"
_SUB_HEADER = "QiiQQqQqQqQQQQ"
_DESCRIPTOR_SIZE = 24  # struct page_desc: offset, size, flags, page_flags
_INCOMPLETE = 0x8  # DUMP_DH_COMPRESSED_INCOMPLETE
_ZLIB, _LZO, _SNAPPY, _ZSTD = 0x1, 0x2, 0x4, 0x20  # DUMP_DH_COMPRESSED_*
_KNOWN_STATUS = _ZLIB | _LZO | _SNAPPY | _ZSTD | _INCOMPLETE

Decompress = Callable[[bytes, int], bytes]


class KdumpFile:
    """An open dump. `pfns` are the page frame numbers whose bytes it has, ascending; `described` is those K1 had at all.

    :raise VerificationError: on opening, when anything about its structure is wrong.
    """

    def __init__(self, path: Path, byteorder: ByteOrder) -> None:
        self.name = path.name
        self._order = "<" if byteorder == "little" else ">"
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                raise VerificationError(f"{self.name} is empty")
            self._file = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        try:
            self._read_headers()
            self._read_bitmaps()
            self._read_descriptors()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the file back; its arrays are copies."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fail(self, what: str) -> VerificationError:
        return VerificationError(f"{self.name}: {what}")

    def _take(self, offset: int, size: int, what: str) -> bytes:
        if not 0 <= offset <= offset + size <= self.size:
            raise self._fail(f"{what} at {offset:#x}, {size:#x} bytes, are beyond the file's {self.size:#x}")
        return self._file[offset : offset + size]

    def _read_headers(self) -> None:
        head = self._take(0, 464, "the header's fields")
        if head[:8] != _SIGNATURE:
            raise self._fail(f"not a kdump-compressed file: it begins with {head[:8]!r}")
        (version,) = struct.unpack_from(self._order + "i", head, 8)
        if version != _VERSION:
            raise self._fail(f"header version {version}, not {_VERSION}")
        self.utsname = tuple(field.rstrip(b"\0").decode("ascii", "replace") for field in _sliced(head[_UTSNAME], 65))
        counts: tuple[int, ...] = struct.unpack_from(self._order + _COUNTS[1], head, _COUNTS[0])
        self.status, self.page_size, sub_blocks, self._bitmap_blocks, max_mapnr = counts
        if self.page_size not in (4096, 65536):
            raise self._fail(f"blocks of {self.page_size} bytes")
        if self.status & _INCOMPLETE:
            raise self._fail("it says of itself that it is incomplete")
        if self.status & ~_KNOWN_STATUS or (self.status & ~_INCOMPLETE).bit_count() > 1:
            raise self._fail(f"unknown status {self.status:#x}")
        sub = self._take(self.page_size, struct.calcsize(self._order + _SUB_HEADER), "the sub header")
        fields = struct.unpack(self._order + _SUB_HEADER, sub)
        _phys_base, self.level, split, _start, _end = fields[:5]
        info_offset, info_size, note_offset, note_size, _erase_offset, erase_size = fields[5:11]
        self.max_pfn: int = fields[13]
        if split or erase_size:
            raise self._fail("a part of a split dump, or one with erased data")
        if max_mapnr != min(self.max_pfn, (1 << 32) - 1):
            raise self._fail(f"max_mapnr is {max_mapnr:#x} in the header and {self.max_pfn:#x} in the sub header")
        self.notes = self._take(note_offset, note_size, "the notes")
        self.vmcoreinfo = self._take(info_offset, info_size, "VMCOREINFO")
        self._bitmap_offset = (1 + sub_blocks) * self.page_size
        for offset, size, what in ((note_offset, note_size, "the notes"), (info_offset, info_size, "VMCOREINFO")):
            if not self.page_size <= offset <= offset + size <= self._bitmap_offset:
                raise self._fail(f"{what} are not in the sub header's blocks")

    def _read_bitmaps(self) -> None:
        total = self._bitmap_blocks * self.page_size
        half = total // 2
        if half * 8 < self.max_pfn or self._bitmap_blocks % 2:
            raise self._fail(f"{self._bitmap_blocks} blocks of bitmaps are none for two of {self.max_pfn:#x} pages")
        raw = np.frombuffer(self._take(self._bitmap_offset, total, "the bitmaps"), np.uint8)
        described, dumped = (np.unpackbits(each, bitorder="little") for each in (raw[:half], raw[half:]))
        if described[self.max_pfn :].any() or dumped[self.max_pfn :].any():
            raise self._fail(f"its bitmaps have pages beyond the last, {self.max_pfn:#x}")
        if (dumped & ~described & 1).any():
            raise self._fail("its second bitmap has pages that the first has not")
        self.described: NDArray[np.int64] = np.flatnonzero(described)
        self.pfns: NDArray[np.int64] = np.flatnonzero(dumped)
        self._descriptor_offset = self._bitmap_offset + total

    def _read_descriptors(self) -> None:
        count = len(self.pfns)
        raw = self._take(self._descriptor_offset, count * _DESCRIPTOR_SIZE, "the page descriptors")
        words = (("offset", "u8"), ("size", "u4"), ("flags", "u4"), ("page_flags", "u8"))
        table = np.frombuffer(raw, np.dtype([(name, self._order + kind) for name, kind in words]))
        self._offsets = table["offset"].astype(np.int64)
        self._sizes = table["size"].astype(np.int64)
        self._flags = table["flags"].astype(np.int64)
        data = self._descriptor_offset + len(raw)
        if not count:
            raise self._fail("it has no pages")
        raw_pages = self._flags == 0
        announced = [flag for flag in (_ZLIB, _LZO, _SNAPPY, _ZSTD) if flag & self.status]
        if self._offsets.min() < data or self._offsets.max() > self.size or (self._offsets + self._sizes).max() > self.size:
            raise self._fail("page descriptors point outside of the pages' data")
        if (self._sizes == 0).any() or (self._sizes[raw_pages] != self.page_size).any():
            raise self._fail("page descriptors have sizes that no page has")
        if (self._sizes[~raw_pages] >= self.page_size).any():
            raise self._fail("pages are compressed that did not become smaller")
        if not np.isin(self._flags[~raw_pages], announced).all():
            raise self._fail(f"page descriptors have flags that the header ({self.status:#x}) does not announce")
        # pages of zeros share one block; no other two pages share a byte, and no byte belongs to none
        starts, first, sharers = np.unique(self._offsets, return_index=True, return_counts=True)
        ends = starts + self._sizes[first]
        for which in np.flatnonzero(sharers > 1):
            numbers = np.flatnonzero(self._offsets == starts[which])
            if (self._flags[numbers] != 0).any() or not self._is_zeros(int(numbers[0])):
                raise self._fail(f"{len(numbers)} pages share their bytes, and are not all zeros")
        if (starts[1:] < ends[:-1]).any():
            raise self._fail("pages overlap in the file")
        if (starts[1:] > ends[:-1]).any() or starts[0] != data or ends[-1] != self.size:
            raise self._fail("there are bytes in the file that belong to nothing")
        zeros = [
            int(count)
            for number, count in zip(first, sharers, strict=True)
            if self._flags[number] == 0 and self._is_zeros(int(number))
        ]
        self.zero_pages = sum(zeros)

    def read(self, first: int, count: int, into: bytearray) -> int:
        """Put the bytes of `count` kept pages, from number `first` on in `pfns`, into a buffer; how many bytes.

        :raise VerificationError: a page cannot be decompressed, or is not a page then.
        """
        size = self.page_size
        for number in range(first, first + count):
            at = (number - first) * size
            into[at : at + size] = self._page(number)
        return count * size

    def _is_zeros(self, number: int) -> bool:
        return self._page(number).count(0) == self.page_size

    def _page(self, number: int) -> bytes:
        offset, flags = int(self._offsets[number]), int(self._flags[number])
        data = self._file[offset : offset + int(self._sizes[number])]
        if not flags:
            return data
        page = _decompressor(flags)(data, self.page_size)
        if len(page) != self.page_size:
            raise self._fail(f"page {self.pfns[number]:#x} has {len(page)} bytes once decompressed")
        return page


def _sliced(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


# ------------------------------------------------------------------------------------------------------- decompressors


@cache
def _decompressor(flag: int) -> Decompress:
    return {_ZLIB: _zlib, _LZO: _lzo, _SNAPPY: _snappy, _ZSTD: _zstd}[flag]


def _zlib(data: bytes, size: int) -> bytes:
    engine = zlib.decompressobj()
    try:
        page = engine.decompress(data, size + 1)
    except zlib.error as error:
        raise VerificationError(f"zlib: {error}") from error
    if not engine.eof or engine.unused_data:
        raise VerificationError("a zlib page does not end where its bytes do")
    return page


def _zstd(data: bytes, size: int) -> bytes:
    import zstandard  # noqa: PLC0415

    try:
        return bytes(zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise VerificationError(f"zstd: {error}") from error


def _lzo(data: bytes, size: int) -> bytes:
    output, length = ctypes.create_string_buffer(size), ctypes.c_size_t(size)
    call = _library("liblzo2.so.2", "liblzo2-2").lzo1x_decompress_safe
    if status := call(data, ctypes.c_size_t(len(data)), output, ctypes.byref(length), None):
        raise VerificationError(f"LZO: error {status}")
    return output.raw[: length.value]


def _snappy(data: bytes, size: int) -> bytes:
    output, length = ctypes.create_string_buffer(size), ctypes.c_size_t(size)
    if status := _library("libsnappy.so.1", "libsnappy1v5").snappy_uncompress(
        data, ctypes.c_size_t(len(data)), output, ctypes.byref(length)
    ):
        raise VerificationError(f"snappy: error {status}")
    return output.raw[: length.value]


@cache
def _library(name: str, package: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise EnvironmentFault(f"the verdict needs {name} to read this dump", hint=f"apt-get install {package}") from error
