"""The codecs of a kdump-compressed dump: a batch of pages compressed at once, one page decompressed.

Each page is compressed by itself, for readers fetch single pages, and what a call into a library costs counts as much as the
library's own speed: LZO takes 3 µs for a page of 4 KiB, an ordinary ctypes call half of one. So batches live at fixed
addresses (`PageBatch`), the arguments of every call are made once, and no page becomes a Python object. A page that does not
become smaller is stored as it is.

The libraries are the system's, by ctypes, but for zstd's; docs/dependencies.md has the reasons and the figures. None is opened
before it is asked for: a capture kernel needs only the one it uses.
"""

from __future__ import annotations

import ctypes
import importlib
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from crashkernel.errors import EnvironmentFault, FormatError, UsageError
from crashkernel.formats.diskdump import COMPRESSED_LZO, COMPRESSED_SNAPPY, COMPRESSED_ZLIB, COMPRESSED_ZSTD


@dataclass(frozen=True, slots=True, eq=False)
class PageBatch:
    """Pages in, what is to be written of each out. All arrays stay where they are for as long as a capture runs.

    `pages` holds pages of `page_size` bytes, one after the other; `stored` has room for each page's compressed form. A
    compressor sets `address` (this process's) and `size` in bytes of what is to be stored of a page: somewhere in `stored`, or,
    with the page's own size, in `pages`.
    """

    page_size: int
    pages: NDArray[np.uint8]
    stored: NDArray[np.uint8]
    address: NDArray[np.uint64]
    size: NDArray[np.uint64]

    @classmethod
    def within(cls, memory: memoryview, capacity: int, page_size: int) -> PageBatch:
        """A batch of `capacity` pages in `memory`, which has `batch_size` bytes."""
        whole = np.frombuffer(memory, np.uint8)
        pages, stored = capacity * page_size, capacity * stored_stride(page_size)
        rest = whole[pages + stored :].view(np.uint64)
        return cls(page_size, whole[:pages], whole[pages : pages + stored], rest[:capacity], rest[capacity : 2 * capacity])

    @staticmethod
    def bytes_for(capacity: int, page_size: int) -> int:
        """Bytes of memory that a batch takes."""
        return capacity * (page_size + stored_stride(page_size) + 16)

    @property
    def capacity(self) -> int:
        """How many pages it holds."""
        return len(self.size)

    def store_raw(self, which: NDArray[np.intp]) -> None:
        """Have pages stored as they are."""
        self.address[which] = self.pages.ctypes.data + which.astype(np.uint64) * np.uint64(self.page_size)
        self.size[which] = self.page_size

    def settle(self, which: NDArray[np.intp]) -> None:
        """Of the pages just compressed, have those stored raw that did not become smaller, or were refused (size 0)."""
        size = self.size[which]
        self.store_raw(which[(size == 0) | (size >= self.page_size)])


Compress = Callable[[NDArray[np.intp]], None]
"""Compress these pages of the batch it was made for (their numbers in it, ascending)."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A codec: its `name`, and its `flag` in page descriptors (`formats.diskdump`)."""

    name: str
    flag: int
    compressor: Callable[[PageBatch], Compress]
    decompress: Callable[[bytes, int], bytes]  # one page, and its size in bytes


def stored_stride(page_size: int) -> int:
    """Bytes between two pages' compressed forms in `PageBatch.stored`: more than any of the codecs can need for one.

    Snappy asks for most: 32 + n + n/6 (`MaxCompressedLength`, snappy.cc); LZO for n + n/16 + 67 (LZO.FAQ).
    """
    return (page_size + page_size // 6 + 128) & ~63


# ------------------------------------------------------------------------------------------------- libraries, by ctypes


def _library(codec: str, *names: str) -> ctypes.PyDLL:
    # PyDLL: a call of a few microseconds is not worth giving the interpreter's lock away for.
    for name in names:
        try:
            return ctypes.PyDLL(name)
        except OSError:
            continue
    raise EnvironmentFault(
        f"no library for {codec} here ({', '.join(names)})",
        hint=f"install it (Debian: {_DEBIAN_PACKAGE[codec]}), or choose another codec",
    )


_DEBIAN_PACKAGE = {"zlib": "libdeflate0", "lzo": "liblzo2-2", "snappy": "libsnappy1v5", "zstd": "python3-zstandard"}


def _addresses(array: NDArray[np.generic], count: int, stride: int) -> list[ctypes.c_void_p]:
    """Addresses in an array, as arguments that ctypes need not convert at each call."""
    return [ctypes.c_void_p(array.ctypes.data + number * stride) for number in range(count)]


def _each_page(batch: PageBatch, call: Callable[..., object], *last: object, result: bool) -> Compress:
    """Call `call(page, page size, output, [&size,] *last)` for each page; with `result` it returns the size."""
    stride = stored_stride(batch.page_size)
    sources = _addresses(batch.pages, batch.capacity, batch.page_size)
    outputs = _addresses(batch.stored, batch.capacity, stride)
    sizes = _addresses(batch.size, batch.capacity, batch.size.itemsize)
    page_size = ctypes.c_size_t(batch.page_size)
    base, every = np.uint64(batch.stored.ctypes.data), np.uint64(stride)

    def compress(which: NDArray[np.intp]) -> None:
        ins, outs, lengths = sources, outputs, sizes
        if len(which) != batch.capacity:
            numbers = which.tolist()
            ins, outs, lengths = ([each[number] for number in numbers] for each in (sources, outputs, sizes))
        batch.size[which] = stride  # room in, size out: how snappy's takes it
        rest = [repeat(each) for each in last]
        if result:
            batch.size[which] = np.fromiter(map(call, ins, repeat(page_size), outs, *rest), np.uint64, len(which))
        else:
            deque(map(call, ins, repeat(page_size), outs, lengths, *rest), maxlen=0)
        batch.address[which] = base + which.astype(np.uint64) * every
        batch.settle(which)

    return compress


# ---------------------------------------------------------------------------------------------------------------- zlib

_DEFLATE_LEVEL = 1


def _zlib_compressor(batch: PageBatch) -> Compress:
    library = _library("zlib", "libdeflate.so.0", "libdeflate.so")
    library.libdeflate_alloc_compressor.restype = ctypes.c_void_p
    state = ctypes.c_void_p(library.libdeflate_alloc_compressor(_DEFLATE_LEVEL))
    call = library.libdeflate_zlib_compress
    call.restype = ctypes.c_size_t
    # no more room than makes it worth while: it gives up early, with 0
    room = ctypes.c_size_t(batch.page_size - 1)

    def compress_page(page: object, page_size: object, output: object) -> object:
        return call(state, page, page_size, output, room)

    return _each_page(batch, compress_page, result=True)


def _zlib_decompress(data: bytes, page_size: int) -> bytes:
    engine = zlib.decompressobj()
    try:
        page = engine.decompress(data, page_size + 1)
    except zlib.error as error:
        raise FormatError(f"zlib: {error}") from error
    if not engine.eof and len(page) <= page_size:  # or its checksum was never looked at
        raise FormatError("zlib: it is cut off before its end")
    return page


# ----------------------------------------------------------------------------------------------------------------- lzo

_LZO_WORK = 16384 * ctypes.sizeof(ctypes.c_void_p)  # LZO1X_1_MEM_COMPRESS, lzo1x.h


@cache
def _lzo() -> ctypes.PyDLL:
    return _library("lzo", "liblzo2.so.2", "liblzo2.so")


def _lzo_compressor(batch: PageBatch) -> Compress:
    work = ctypes.create_string_buffer(_LZO_WORK)
    return _each_page(batch, _lzo().lzo1x_1_compress, work, result=False)


def _lzo_decompress(data: bytes, page_size: int) -> bytes:
    output = ctypes.create_string_buffer(page_size)
    size = ctypes.c_size_t(page_size)
    status = _lzo().lzo1x_decompress_safe(data, ctypes.c_size_t(len(data)), output, ctypes.byref(size), None)
    if status:
        raise FormatError(f"LZO: error {status}")
    return output.raw[: size.value]


# -------------------------------------------------------------------------------------------------------------- snappy


@cache
def _snappy() -> ctypes.PyDLL:
    return _library("snappy", "libsnappy.so.1", "libsnappy.so")


def _snappy_compressor(batch: PageBatch) -> Compress:
    return _each_page(batch, _snappy().snappy_compress, result=False)


def _snappy_decompress(data: bytes, page_size: int) -> bytes:
    output = ctypes.create_string_buffer(page_size)
    size = ctypes.c_size_t(page_size)
    status = _snappy().snappy_uncompress(data, ctypes.c_size_t(len(data)), output, ctypes.byref(size))
    if status:
        raise FormatError(f"snappy: error {status}")
    return output.raw[: size.value]


# ---------------------------------------------------------------------------------------------------------------- zstd

# The first of zstd's fast levels: it does without entropy coding of literals. On kernel pages that costs 5 % of size against
# level 1, and takes a third of the time off (docs/benchmarks.md).
_ZSTD_LEVEL = -1


def _zstandard() -> ModuleType:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise EnvironmentFault(
            "no zstandard module for this Python",
            hint=f"install it (pip: zstandard, Debian: {_DEBIAN_PACKAGE['zstd']}), or choose another codec",
        ) from error


def _zstd_compressor(batch: PageBatch) -> Compress:
    zstandard = _zstandard()
    engine = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    segments = np.empty((batch.capacity, 2), np.uint64)  # offset and size of each page, as BufferWithSegments takes them
    segments[:, 1] = batch.page_size
    views = [batch.pages[at : at + batch.page_size].data for at in range(0, len(batch.pages), batch.page_size)]
    base = np.uint64(batch.stored.ctypes.data)
    # Debian builds it against the system's libzstd, and then it has no call for many pages.
    many = "multi_compress_to_buffer" in zstandard.backend_features

    def compress(which: NDArray[np.intp]) -> None:
        if not len(which):
            return
        if many:
            segments[: len(which), 0] = which * batch.page_size
            pages = zstandard.BufferWithSegments(batch.pages, segments[: len(which)].tobytes())
            frames = list(engine.multi_compress_to_buffer(pages))
        else:
            frames = [engine.compress(views[number]) for number in which.tolist()]
        sizes = np.fromiter(map(len, frames), np.uint64, len(frames))
        data = b"".join(frames)
        batch.stored[: len(data)] = np.frombuffer(data, np.uint8)
        batch.size[which] = sizes
        batch.address[which] = base + np.cumsum(sizes) - sizes
        batch.settle(which)

    return compress


def _zstd_decompress(data: bytes, page_size: int) -> bytes:
    zstandard = _zstandard()
    try:
        # the module makes room for what the frame says of itself, whatever `max_output_size` is
        size = zstandard.get_frame_parameters(data).content_size
        if size not in (page_size, zstandard.CONTENTSIZE_UNKNOWN):
            raise FormatError(f"zstd: by its header it has {size:,} bytes, not {page_size:,}")
        return bytes(zstandard.ZstdDecompressor().decompress(data, max_output_size=page_size))
    except (zstandard.ZstdError, MemoryError) as error:
        raise FormatError(f"zstd: {str(error) or 'it asks for more memory than there is'}") from error


# ---------------------------------------------------------------------------------------------------------------- none


def _store(batch: PageBatch) -> Compress:
    return batch.store_raw


def _stored(data: bytes, _page_size: int) -> bytes:
    return data


CODECS = (
    Codec("zstd", COMPRESSED_ZSTD, _zstd_compressor, _zstd_decompress),
    Codec("lzo", COMPRESSED_LZO, _lzo_compressor, _lzo_decompress),
    Codec("snappy", COMPRESSED_SNAPPY, _snappy_compressor, _snappy_decompress),
    Codec("zlib", COMPRESSED_ZLIB, _zlib_compressor, _zlib_decompress),
    Codec("none", 0, _store, _stored),
)
NAMES = tuple(codec.name for codec in CODECS)


def codec_by_name(name: str) -> Codec:
    """The codec of that name.

    :raise UsageError: there is none.
    """
    for codec in CODECS:
        if codec.name == name:
            return codec
    raise UsageError(f"no codec {name!r}", hint=f"choose one of {', '.join(NAMES)}")


def codec_for_flag(flag: int) -> Codec:
    """The codec of a page descriptor with that flag; 0 is a page stored as it is.

    :raise FormatError: no codec has it.
    """
    for codec in CODECS:
        if codec.flag == flag:
            return codec
    raise FormatError(f"a page is compressed by an unknown method (flags {flag:#x})")


def missing(codec: Codec) -> str:
    """Why `codec` cannot be used on this machine, "" if it can."""
    try:
        codec.compressor(PageBatch.within(memoryview(bytearray(PageBatch.bytes_for(1, 4096))), 1, 4096))
    except EnvironmentFault as fault:
        return str(fault)
    return ""
