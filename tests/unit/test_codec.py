"""The codecs: each page comes back, what does not shrink is stored as it is, and damage is told."""

import contextlib
import ctypes
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashkernel.capture import codec as codec_module
from crashkernel.capture.codec import CODECS, PageBatch, codec_by_name, codec_for_flag, missing, stored_stride
from crashkernel.errors import EnvironmentFault, FormatError, UsageError
from support.capture import page_of

every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
COMPRESSING = [codec for codec in CODECS if codec.flag]


def batch_of(pages: list[bytes]) -> PageBatch:
    page_size = len(pages[0])
    batch = PageBatch.within(memoryview(bytearray(PageBatch.bytes_for(len(pages), page_size))), len(pages), page_size)
    batch.pages[:] = np.frombuffer(b"".join(pages), np.uint8)
    return batch


def stored(batch: PageBatch, number: int) -> bytes:
    return ctypes.string_at(int(batch.address[number]), int(batch.size[number]))


def test_this_machine_has_every_codec():
    assert [missing(codec) for codec in CODECS] == [""] * len(CODECS)


@every_codec
@pytest.mark.parametrize("page_size", [0x1000, 0x10000])
def test_every_kind_of_page_comes_back(codec, page_size):
    pages = [page_of(number % 5, number, page_size) for number in range(17)]
    batch = batch_of(pages)
    codec.compressor(batch)(np.arange(len(pages)))
    for number, page in enumerate(pages):
        data = stored(batch, number)
        raw = len(data) == page_size
        assert len(data) <= page_size
        assert (data if raw else codec.decompress(data, page_size)) == page
        assert raw == (codec.flag == 0 or number % 5 == 3), "only noise does not shrink"


@pytest.mark.parametrize("codec", COMPRESSING, ids=lambda codec: codec.name)
def test_only_the_pages_asked_for_are_compressed_and_again_and_again(codec):
    pages = [page_of(1 + number % 4, number, 0x1000) for number in range(12)]
    batch = batch_of(pages)
    compress = codec.compressor(batch)
    for which in ([1, 4, 5, 11], [0], [], list(range(12))):
        batch.size[:] = 7777
        compress(np.array(which, np.intp))
        for number in which:
            data = stored(batch, number)
            assert (data if len(data) == 0x1000 else codec.decompress(data, 0x1000)) == pages[number]
        assert all(batch.size[number] == 7777 for number in range(12) if number not in which)


@every_codec
@settings(max_examples=30)
@given(st.lists(st.binary(max_size=64), min_size=1, max_size=5))
def test_any_content_comes_back(codec, seeds):
    pages = [(seed * 0x1000)[:0x1000].ljust(0x1000, b"\1") for seed in seeds]
    batch = batch_of(pages)
    codec.compressor(batch)(np.arange(len(pages)))
    for number, page in enumerate(pages):
        data = stored(batch, number)
        assert (data if len(data) == 0x1000 else codec.decompress(data, 0x1000)) == page


@pytest.mark.parametrize("codec", COMPRESSING, ids=lambda codec: codec.name)
@settings(max_examples=60)
@given(st.binary(max_size=200))
def test_rubbish_is_an_error_or_some_bytes_but_never_more_than_a_page(codec, data):
    try:
        page = codec.decompress(data, 0x1000)
    except FormatError:
        return
    assert len(page) <= 0x1001


@pytest.mark.parametrize("codec", COMPRESSING, ids=lambda codec: codec.name)
def test_a_page_cut_short_is_told(codec):
    page = page_of(2, 1, 0x1000)
    batch = batch_of([page])
    codec.compressor(batch)(np.arange(1))
    whole = stored(batch, 0)
    assert len(whole) < 0x1000
    with contextlib.suppress(FormatError):
        assert codec.decompress(whole[: len(whole) // 2], 0x1000) != page


@pytest.mark.parametrize("codec", COMPRESSING, ids=lambda codec: codec.name)
def test_every_flipped_bit_of_a_page_s_first_bytes_is_an_error_or_some_bytes(codec):
    """zstd's and snappy's say how large the page is, and zstd's module makes room for that."""
    batch = batch_of([page_of(2, 1, 0x1000)])
    codec.compressor(batch)(np.arange(1))
    data = stored(batch, 0)
    for bit in range(8 * 18):  # zstd's longest frame header
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(FormatError):
            assert len(codec.decompress(bytes(flipped), 0x1000)) <= 0x1001


@pytest.mark.parametrize("size", [0, 0xFFF, 0x1001, 1 << 20])
def test_a_zstd_frame_of_another_size_is_refused_before_there_is_room_for_it(size):
    zstandard = pytest.importorskip("zstandard")
    with pytest.raises(FormatError, match=f"by its header it has {size:,} bytes, not 4,096"):
        codec_by_name("zstd").decompress(zstandard.ZstdCompressor().compress(bytes(size)), 0x1000)


def test_a_zstd_frame_that_does_not_say_its_size():
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.ZstdCompressor(write_content_size=False).compress(b"page" * 1024)
    assert codec_by_name("zstd").decompress(data, 0x1000) == b"page" * 1024


def test_memory_that_a_zstd_frame_asks_for_in_vain(monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.ZstdCompressor().compress(bytes(0x1000))

    def none_left():
        raise MemoryError

    monkeypatch.setattr(zstandard, "ZstdDecompressor", none_left)
    with pytest.raises(FormatError, match="zstd: it asks for more memory than there is"):
        codec_by_name("zstd").decompress(data, 0x1000)


@pytest.mark.parametrize("lost", [1, 4])
def test_a_zlib_stream_without_its_checksum_is_cut_off(lost):
    data = zlib.compress(b"page" * 1024)
    with pytest.raises(FormatError, match="zlib: it is cut off before its end"):
        codec_by_name("zlib").decompress(data[:-lost], 0x1000)


def test_a_zstandard_without_a_call_for_many_pages_gives_the_same(monkeypatch):
    """Debian's package is built so."""
    zstandard = pytest.importorskip("zstandard")
    pages = [page_of(number % 5, number, 0x1000) for number in range(9)]
    results = []
    for features in (zstandard.backend_features, {"buffer_types"}):
        monkeypatch.setattr(zstandard, "backend_features", features)
        batch = batch_of(pages)
        codec_by_name("zstd").compressor(batch)(np.array([0, 2, 3, 8]))
        results.append([stored(batch, number) for number in (0, 2, 3, 8)])
    assert results[0] == results[1]


def test_no_compressed_page_outgrows_its_place():
    assert stored_stride(0x1000) >= max(32 + 0x1000 + 0x1000 // 6, 0x1000 + 0x1000 // 16 + 67)
    assert stored_stride(0x10000) % 64 == 0


def test_codecs_by_name_and_by_flag():
    assert codec_by_name("lzo").flag == 2
    assert [codec_for_flag(codec.flag) for codec in CODECS] == list(CODECS)
    with pytest.raises(UsageError, match="choose one of zstd, lzo"):
        codec_by_name("lz4")
    with pytest.raises(FormatError, match="0x40"):
        codec_for_flag(0x40)


def test_a_library_that_is_not_there_is_named_with_its_package(monkeypatch):
    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "PyDLL", absent)
    for library in (codec_module._lzo, codec_module._snappy):
        library.cache_clear()
    assert "liblzo2.so.2" in missing(codec_by_name("lzo"))
    assert "Debian: libsnappy1v5" in missing(codec_by_name("snappy"))
    with pytest.raises(EnvironmentFault, match="libdeflate0"):
        codec_by_name("zlib").compressor(batch_of([bytes(4096)]))
