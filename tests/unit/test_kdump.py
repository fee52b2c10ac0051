"""The verdict's reader of kdump-compressed files: it reads what is right, and nothing that is not."""

import random
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crashkernel.drill.kdump import KdumpFile
from crashkernel.errors import VerificationError
from support.hostile import corrupted
from support.kdumps import FLAGS, Kdump

RANDOM = random.Random(7)
SIZE = 0x1000


def pages():
    return {
        1: b"text " * 819 + b"x",
        2: bytes(SIZE),
        5: RANDOM.randbytes(SIZE),
        6: bytes(SIZE),
        9: b"\xa5" * SIZE,
    }


def dump(**options):
    return Kdump(pages(), memory=set(range(12)), **options)


@pytest.fixture
def opened(tmp_path):
    def opened(data):
        path = tmp_path / "vmcore"
        path.write_bytes(data)
        return KdumpFile(path, "little")

    return opened


def contents(file):
    buffer = bytearray(len(file.pfns) * file.page_size)
    file.read(0, len(file.pfns), buffer)
    return {pfn: bytes(buffer[at * SIZE : (at + 1) * SIZE]) for at, pfn in enumerate(file.pfns.tolist())}


@pytest.mark.parametrize("codec", FLAGS)
def test_every_codec(opened, codec):
    kdump = dump(codec=codec)
    with opened(kdump.to_bytes()) as file:
        assert contents(file) == kdump.pages
        assert file.described.tolist() == list(range(12))
        assert (file.level, file.page_size, file.max_pfn, file.zero_pages) == (31, SIZE, 12, 2)
        assert file.notes == kdump.elf_notes()
        assert file.vmcoreinfo == kdump.vmcoreinfo()
        assert (file.utsname[2], file.utsname[4]) == (kdump.release, "ppc64le")


def test_zeros_that_do_not_share_their_place_are_zeros_all_the_same(opened):
    kdump = dump(share_zeros=False, codec="none")
    with opened(kdump.to_bytes()) as file:
        assert contents(file) == kdump.pages
        assert file.zero_pages == 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"version": 5}, "header version 5"),
        ({"page_size": 0x2000}, "blocks of 8192 bytes"),
        ({"status": 1 | 8}, "says of itself that it is incomplete"),
        ({"status": 1 | 2}, "unknown status"),
        ({"status": 0x40}, "unknown status"),
        ({"status": 4}, "does not announce"),
        ({"split": 1}, "a part of a split dump"),
        ({"max_pfn": 8}, "pages beyond the last"),
        ({"memory": {1, 2, 5, 6}}, "pages that the first has not"),
    ],
)
def test_what_is_wrong_is_named(opened, options, problem):
    kdump = Kdump(pages() if "page_size" not in options else {}, **({"memory": set(range(12))} | options))
    with pytest.raises(VerificationError, match=problem):
        opened(kdump.to_bytes())


def patched(kdump, pfn, **fields):
    """The dump with other fields in a page's descriptor."""
    data = bytearray(kdump.to_bytes())
    at = kdump.places["descriptors"] + 24 * sorted(kdump.pages).index(pfn)
    values = dict(zip(("offset", "size", "flags"), struct.unpack_from("<QII", data, at), strict=True)) | fields
    struct.pack_into("<QII", data, at, values["offset"], values["size"], values["flags"])
    return bytes(data)


def test_descriptors_must_be_those_of_pages(opened):
    kdump = dump()
    kdump.to_bytes()
    for pfn, fields, problem in (
        (1, {"offset": 0}, "outside of the pages' data"),
        (9, {"size": 1 << 30}, "outside of the pages' data"),
        (1, {"size": 0}, "no page has"),
        (5, {"size": SIZE - 1}, "no page has"),
        (1, {"flags": 0x20}, "does not announce"),
        (1, {"offset": kdump.places[1] + 1}, "belong to nothing|overlap"),
        (9, {"offset": kdump.places[1]}, "share their bytes"),
        (2, {"offset": kdump.places[5]}, "share their bytes"),
    ):
        with pytest.raises(VerificationError, match=problem):
            opened(patched(kdump, pfn, **fields))


def test_bytes_of_nobody_s_are_found(opened):
    data = dump().to_bytes()
    for bad in (data + b"\0", data[:-1]):
        with pytest.raises(VerificationError, match=r"belong to nothing|outside of the pages' data"):
            opened(bad)


@pytest.mark.parametrize("codec", ["zlib", "zstd", "lzo", "snappy"])
def test_a_page_that_does_not_decompress_to_a_page_is_found(opened, codec):
    kdump = dump(codec=codec)
    data = bytearray(kdump.to_bytes())
    at = kdump.places[1]
    data[at : at + 8] = b"\xff" * 8
    with opened(bytes(data)) as file, pytest.raises(VerificationError):
        contents(file)


@pytest.mark.parametrize("data", [b"", b"KDUMP   ", b"\x7fELF" + bytes(500)])
def test_what_is_no_dump(opened, data):
    with pytest.raises(VerificationError):
        opened(data)


GOOD = {codec: dump(codec=codec).to_bytes() for codec in ("zlib", "none")}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(sorted(GOOD)))
def test_hostile_files_are_refused_or_read(tmp_path, data, codec):
    """Whatever the bytes: pages, or our own error."""
    path = tmp_path / "vmcore"
    path.write_bytes(data.draw(corrupted(GOOD[codec])))
    try:
        with KdumpFile(path, "little") as file:
            assert set(contents(file)) <= set(range(file.max_pfn))
    except VerificationError:
        pass


@pytest.mark.parametrize("length", [0, 1, 463, 464, 0x1000, 0x1068, 0x2000, 0x4000])
def test_cut_files_are_refused(opened, length):
    with pytest.raises(VerificationError):
        opened(GOOD["zlib"][:length])
