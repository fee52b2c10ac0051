"""Dumps held against each other and against the memory they are of: a second reader of the kdump-compressed format.

It shares nothing with the readers and the codecs of `capture`, which wrote half of what it looks at, or with its view of an ELF
vmcore: what the two sides agree on here, they agree on for two reasons. Little-endian dumps only, not split, not flattened.

References: makedumpfile's `IMPLEMENTATION` (the layout) and `diskdump_mod.h` (the structures).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crashkernel.errors import EnvironmentFault, FormatError

_SIGNATURE = b"KDUMP   "
# struct disk_dump_header: the signature, int header_version, struct new_utsname (6 * 65 bytes), struct timeval at 408, then
# unsigned int status, int block_size, int sub_hdr_size, unsigned int bitmap_blocks, max_mapnr, ...
_HEADER = struct.Struct("<8si")
_SIZES = struct.Struct("<IiiII")
_SIZES_AT = 408 + 16
# struct kdump_sub_header, a block behind: unsigned long phys_base, int dump_level, int split, unsigned long start_pfn, end_pfn,
# off_t offset_vmcoreinfo, unsigned long size_vmcoreinfo, offset and size of the notes, of the erase info, then start_pfn_64,
# end_pfn_64, max_mapnr_64 (header version 6)
_SUB_HEADER = struct.Struct("<QiiQQ6Q3Q")
_VERSION = 6
_DESCRIPTOR = np.dtype([("offset", "<u8"), ("size", "<u4"), ("flags", "<u4"), ("page_flags", "<u8")])
_ZLIB, _LZO, _SNAPPY, _ZSTD = 1, 2, 4, 0x20  # DUMP_DH_COMPRESSED_*, and zstd's of 1.7.1
_SEVERAL = 8  # differences that are worth naming

Bits = npt.NDArray[np.bool_]


class Dump:
    """A kdump-compressed file: which pages it knows of, which it keeps, and each kept page's bytes.

    :raise FormatError: it is none, or a part of it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            try:
                self._data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            except ValueError as error:
                raise FormatError("an empty file", source=str(path)) from error
        try:
            self._read_headers()
        except struct.error as error:
            raise FormatError("the headers are cut off", source=str(path)) from error

    def _read_headers(self) -> None:
        signature, version = _HEADER.unpack_from(self._data)
        if signature != _SIGNATURE or version < _VERSION:
            raise FormatError(f"starts with {signature!r} version {version}, not with KDUMP version 6", source=str(self.path))
        _, self.page_size, sub_blocks, bitmap_blocks, _ = _SIZES.unpack_from(self._data, _SIZES_AT)
        fields = _SUB_HEADER.unpack_from(self._data, self.page_size)
        self.level, self.max_pfn = int(fields[1]), int(fields[-1])
        at = (1 + sub_blocks) * self.page_size
        half = bitmap_blocks * self.page_size // 2
        if half * 8 < self.max_pfn or at + 2 * half > len(self._data):
            raise FormatError(f"{bitmap_blocks} blocks of bitmap for {self.max_pfn} pages", source=str(self.path), offset=at)
        self.known, self.kept = self._bits(at, half), self._bits(at + half, half)
        self._descriptors_at = at + 2 * half
        end = self._descriptors_at + int(self.kept.sum()) * _DESCRIPTOR.itemsize
        if end > len(self._data):
            raise FormatError(f"page descriptors up to {end:#x}, and it ends before", source=str(self.path), offset=end)

    def _bits(self, at: int, size: int) -> Bits:
        """A bitmap: bit n of byte m is the page 8 m + n."""
        packed = np.frombuffer(self._data, np.uint8, size, at)
        return np.unpackbits(packed, count=self.max_pfn, bitorder="little").view(np.bool_)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._data)

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """Each kept page: its page frame number and its bytes.

        :raise FormatError: one cannot be decompressed, or is not where its descriptor says.
        """
        frames = np.flatnonzero(self.kept)
        table = np.frombuffer(self._data, _DESCRIPTOR, len(frames), self._descriptors_at)
        last, page = (-1, 0), b""
        columns = (frames.tolist(), table["offset"].tolist(), table["size"].tolist(), table["flags"].tolist())
        for pfn, offset, size, flags in zip(*columns, strict=True):
            if (offset, size) != last:  # zero pages share their bytes
                page = self._page(pfn, offset, size, flags)
                last = (offset, size)
            yield pfn, page

    def _page(self, pfn: int, offset: int, size: int, flags: int) -> bytes:
        stored = self._data[offset : offset + size]
        source = f"{self.path}, page {pfn:#x}"
        if len(stored) != size or size > self.page_size:
            raise FormatError(f"{size} bytes are not there", source=source, offset=offset)
        if flags & (_ZLIB | _LZO | _SNAPPY | _ZSTD):
            try:
                stored = _decompressor(flags)(stored, self.page_size)
            except (ValueError, zlib.error) as error:
                raise FormatError(f"cannot be decompressed: {error}", source=source, offset=offset) from error
        if len(stored) != self.page_size:
            raise FormatError(f"has {len(stored)} bytes, not {self.page_size}", source=source, offset=offset)
        return stored


# ----------------------------------------------------------------------------------------------------------- decompression


def _library(name: str, package: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise EnvironmentFault(f"{name} is not here", hint=f"apt-get install {package}") from error


def _lzo() -> Callable[[bytes, int], bytes]:
    call = _library("liblzo2.so.2", "liblzo2-2").lzo1x_decompress_safe

    def decompress(data: bytes, page_size: int) -> bytes:
        page, size = ctypes.create_string_buffer(page_size), ctypes.c_size_t(page_size)
        if status := call(data, ctypes.c_size_t(len(data)), page, ctypes.byref(size), None):
            raise ValueError(f"LZO error {status}")
        return page.raw[: size.value]

    return decompress


def _snappy() -> Callable[[bytes, int], bytes]:
    call = _library("libsnappy.so.1", "libsnappy1v5").snappy_uncompress

    def decompress(data: bytes, page_size: int) -> bytes:
        page, size = ctypes.create_string_buffer(page_size), ctypes.c_size_t(page_size)
        if status := call(data, ctypes.c_size_t(len(data)), page, ctypes.byref(size)):
            raise ValueError(f"snappy error {status}")
        return page.raw[: size.value]

    return decompress


def _zstd() -> Callable[[bytes, int], bytes]:
    library = _library("libzstd.so.1", "libzstd1")
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_isError.argtypes = [ctypes.c_size_t]

    def decompress(data: bytes, page_size: int) -> bytes:
        page = ctypes.create_string_buffer(page_size)
        size = library.ZSTD_decompress(page, ctypes.c_size_t(page_size), data, ctypes.c_size_t(len(data)))
        if library.ZSTD_isError(size):
            raise ValueError("zstd error")
        return page.raw[:size]

    return decompress


def _zlib(data: bytes, _page_size: int) -> bytes:
    return zlib.decompress(data)


@functools.cache
def _decompressor(flags: int) -> Callable[[bytes, int], bytes]:
    """One page from its stored form; by the flags of its descriptor.

    :raise EnvironmentFault: its library is not installed.
    """
    if flags & _ZLIB:
        return _zlib
    return _lzo() if flags & _LZO else _snappy() if flags & _SNAPPY else _zstd()


# -------------------------------------------------------------------------------------------------------------- comparison


class Memory:
    """An ELF vmcore's memory, page by page. References: System V gABI, chapters 4 and 5.

    Of memory that two segments describe, the kernel's text on x86_64, the later one counts here.
    """

    def __init__(self, path: Path, page_size: int = 4096) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        (table,) = struct.unpack_from("<Q", self._data, 32)
        (count,) = struct.unpack_from("<H", self._data, 56)
        headers = [struct.unpack_from("<IIQQQQQQ", self._data, table + 56 * number) for number in range(count)]
        self._loads = [(paddr, offset, size) for kind, _, offset, _, paddr, size, _, _ in reversed(headers) if kind == 1]
        self._page_size = page_size

    @property
    def twice(self) -> int:
        """How many pages more than one segment describes, each counted once less than it is described."""
        reached, twice = 0, 0
        for start, end in sorted(
            (paddr // self._page_size, -(-(paddr + size) // self._page_size)) for paddr, _, size in self._loads
        ):
            twice += max(0, min(end, reached) - start)
            reached = max(reached, end)
        return twice

    def page(self, pfn: int) -> bytes:
        """The bytes of a page.

        :raise FormatError: it is not there as a whole.
        """
        at = pfn * self._page_size
        for paddr, offset, size in self._loads:
            if paddr <= at and at + self._page_size <= paddr + size:
                return self._data[offset + at - paddr : offset + at - paddr + self._page_size]
        raise FormatError(f"the vmcore has no page {pfn:#x}")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two dumps of one memory select: page frames that only one of them knows of, or keeps."""

    only_first: int
    only_second: int
    examples: tuple[int, ...]

    @property
    def same(self) -> bool:
        """Whether it is the same page for page."""
        return not self.examples


def compare_selections(first: Dump, second: Dump) -> Comparison:
    """Hold the bitmaps against each other, both of each."""
    length = max(first.max_pfn, second.max_pfn)
    mine, theirs = ((_padded(each.known, length), _padded(each.kept, length)) for each in (first, second))
    more = (mine[0] & ~theirs[0]) | (mine[1] & ~theirs[1])
    less = (theirs[0] & ~mine[0]) | (theirs[1] & ~mine[1])
    examples = np.flatnonzero(more | less)[:_SEVERAL]
    return Comparison(int(more.sum()), int(less.sum()), tuple(examples.tolist()))


def _padded(bits: Bits, length: int) -> Bits:
    return np.concatenate([bits, np.zeros(length - len(bits), np.bool_)])


def wrong_pages(dump: Dump, memory: Memory) -> list[int]:
    """The first few kept pages whose bytes are not those of the memory.

    :raise FormatError: a page cannot be read.
    """
    wrong: list[int] = []
    for pfn, page in dump.pages():
        if page != memory.page(pfn):
            wrong.append(pfn)
            if len(wrong) == _SEVERAL:
                break
    return wrong
