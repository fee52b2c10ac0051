import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashkernel.errors import FormatError, UsageError
from crashkernel.formats import diskdump
from crashkernel.formats.diskdump import DumpLayout, Extent, MainHeader, SubHeader, Utsname, descriptor_dtype
from support.elfwriter import write_note, write_prstatus
from support.hostile import corrupted, survives, truncations
from support.kdumps import Kdump

ORDERS = ["little", "big"]
both_orders = pytest.mark.parametrize("byteorder", ORDERS)
NAMES = Utsname("Linux", "host", "6.1.0", "#1 SMP", "ppc64le", "(none)")
SIZES = [0x1000, 0x10000]


def sample(byteorder: str, page_size: int = 0x1000, **options) -> bytes:
    machine = "ppc64le" if byteorder == "little" else "ppc64"
    return Kdump({3: b"x" * page_size}, machine=machine, page_size=page_size, **options).to_bytes()


def notes(byteorder: str, cpus: int = 3, text: bytes = b"OSRELEASE=6.1.0\n") -> bytes:
    registers = write_prstatus(byteorder, 7, [])
    return write_note(byteorder, "CORE", 1, registers) * cpus + write_note(byteorder, "VMCOREINFO", 0, text)


def layout(byteorder: str = "little", **options) -> DumpLayout:
    given = {
        "byteorder": byteorder,
        "page_size": 0x1000,
        "max_pfn": 0x12345,
        "utsname": NAMES,
        "notes": notes(byteorder),
        "level": 31,
        "compression": diskdump.COMPRESSED_ZSTD,
    }
    return DumpLayout.plan(**(given | options))


@both_orders
@pytest.mark.parametrize("page_size", SIZES)
class TestHeaders:
    def test_reads_what_makedumpfile_writes(self, byteorder, page_size):
        data = sample(byteorder, page_size, level=17, phys_base=0x1234)
        main = MainHeader.from_bytes(data)
        assert (main.byteorder, main.block_size, main.version) == (byteorder, page_size, 6)
        assert (main.utsname.release, main.utsname.version, main.utsname.nodename) == ("6.1.0-kdumps", "#1 SMP test", "node")
        assert main.utsname.machine == ("ppc64le" if byteorder == "little" else "ppc64")
        assert (main.status, main.cpus, main.timestamp, main.microseconds) == (1, 2, 1_700_000_000, 250)
        sub = SubHeader.from_bytes(data[page_size : page_size + 104], main)
        assert (sub.phys_base, sub.level, sub.max_pfn, sub.split) == (0x1234, 17, 4, 0)
        assert sub.notes.file_offset == page_size + 104
        text = data[sub.vmcoreinfo.file_offset :][: sub.vmcoreinfo.size]
        assert text == f"OSRELEASE=6.1.0-kdumps\nPAGESIZE={page_size}\n".encode()

    def test_places_what_follows(self, byteorder, page_size):
        dump = Kdump(
            {3: b"x" * page_size}, "ppc64le" if byteorder == "little" else "ppc64", page_size, max_pfn=8 * page_size + 1
        )
        main = MainHeader.from_bytes(dump.to_bytes())
        assert main.bitmap_blocks == 4
        assert main.bitmap_size == 2 * page_size
        assert main.bitmap1_offset == dump.places["bitmap1"]
        assert main.bitmap2_offset == dump.places["bitmap2"]
        assert main.descriptors_offset == dump.places["descriptors"]

    def test_round_trip(self, byteorder, page_size):
        data = sample(byteorder, page_size)
        main = MainHeader.from_bytes(data)
        assert main.to_bytes() == data[: diskdump.MAIN_SIZE]
        raw = data[page_size : page_size + diskdump.SUB_SIZE]
        assert SubHeader.from_bytes(raw, main).to_bytes(byteorder) == raw

    def test_page_frames_beyond_32_bits_are_in_the_sub_header_alone(self, byteorder, page_size):
        big = layout(byteorder, page_size=page_size, max_pfn=1 << 34)
        main = MainHeader.from_bytes(big.headers)
        assert main.max_pfn == 0xFFFFFFFF
        assert SubHeader.from_bytes(big.headers[page_size:], main).max_pfn == 1 << 34


class TestOlderVersions:
    def test_version_5_has_the_number_of_pages_in_the_main_header(self):
        data = sample("little", version=5)
        main = MainHeader.from_bytes(data)
        assert SubHeader.from_bytes(data[0x1000 : 0x1000 + 80], main).max_pfn == 4

    def test_version_4_has_no_erase_information(self):
        data = bytearray(sample("little", version=4))
        main = MainHeader.from_bytes(bytes(data))
        data[0x1000 + 64 : 0x1000 + 104] = b"\xff" * 40
        sub = SubHeader.from_bytes(bytes(data[0x1000:0x2000]), main)
        assert (sub.eraseinfo, sub.max_pfn) == (Extent(), 4)
        assert sub.notes.size

    @pytest.mark.parametrize("version", [0, 1, 3, 7, 255])
    def test_others_are_refused(self, version):
        with pytest.raises(FormatError, match=f"version {version}, not 4 to 6"):
            MainHeader.from_bytes(sample("little", version=version))


class TestLayout:
    @both_orders
    @pytest.mark.parametrize("page_size", SIZES)
    @pytest.mark.parametrize("cpus", [1, 40])
    def test_reads_back(self, byteorder, page_size, cpus):
        text = notes(byteorder, cpus)
        plan = layout(byteorder, page_size=page_size, notes=text, phys_base=-0x200000, crash_time=99)
        main = MainHeader.from_bytes(plan.headers)
        assert main == plan.main
        assert (main.cpus, main.timestamp, main.status, main.utsname) == (cpus, 99, 0x20, NAMES)
        sub = SubHeader.from_bytes(plan.headers[page_size:], main)
        assert sub == plan.sub
        assert sub.phys_base == (1 << 64) - 0x200000
        assert plan.headers[sub.notes.file_offset :][: sub.notes.size] == text
        assert plan.headers[sub.vmcoreinfo.file_offset :][: sub.vmcoreinfo.size] == b"OSRELEASE=6.1.0\n"
        assert len(plan.headers) == plan.bitmap1_offset

    def test_bitmaps_are_whole_blocks_that_hold_every_page(self):
        for max_pfn, blocks in ((1, 1), (8 * 4096, 1), (8 * 4096 + 1, 2)):
            plan = layout(max_pfn=max_pfn)
            assert plan.bitmap_size == blocks * 4096
            assert plan.bitmap2_offset == plan.bitmap1_offset + plan.bitmap_size
            assert plan.descriptors_offset == plan.bitmap2_offset + plan.bitmap_size
            assert plan.descriptors_offset % 4096 == 0

    def test_without_notes(self):
        plan = layout(notes=b"")
        assert (plan.sub.notes, plan.sub.vmcoreinfo, plan.main.cpus) == (Extent(), Extent(), 0)

    @pytest.mark.parametrize("bad", [{"page_size": 0x800}, {"page_size": 0x3000}, {"max_pfn": 0}, {"max_pfn": 1 << 53}])
    def test_what_cannot_be(self, bad):
        with pytest.raises(UsageError, match="no dump of"):
            layout(**bad)

    def test_a_number_that_fits_no_field(self):
        with pytest.raises(UsageError, match="no sub header"):
            layout(level=1 << 40)


class TestUtsname:
    def test_what_is_not_printable_becomes_a_question_mark(self):
        raw = NAMES.to_bytes()
        raw = b"Li\x1b\xff".ljust(65, b"\0") + raw[65:]
        assert Utsname.from_bytes(raw).sysname == "Li??"

    def test_without_a_nul(self):
        assert Utsname.from_bytes(b"x" * 390).machine == "x" * 65

    def test_sizes(self):
        assert Utsname.from_bytes(NAMES.to_bytes()) == NAMES
        with pytest.raises(FormatError, match="390 bytes"):
            Utsname.from_bytes(b"")
        with pytest.raises(UsageError, match="too long"):
            Utsname(release="x" * 65).to_bytes()


@both_orders
def test_a_descriptor_is_what_makedumpfile_writes(byteorder):
    """off_t offset, unsigned int size and flags, unsigned long long page_flags (diskdump_mod.h)."""
    import numpy as np

    raw = struct.pack(("<" if byteorder == "little" else ">") + "QIIQ", 0x123456789A, 0xFFF, 2, 5)
    assert len(raw) == diskdump.DESCRIPTOR_SIZE
    assert np.frombuffer(raw, np.dtype(descriptor_dtype(byteorder)))[0].item() == (0x123456789A, 0xFFF, 2, 5)


class TestRefusals:
    def test_another_format(self):
        with pytest.raises(FormatError, match="not a kdump-compressed dump"):
            MainHeader.from_bytes(b"\x7fELF" + bytes(1000))
        with pytest.raises(FormatError, match="old diskdump"):
            MainHeader.from_bytes(b"DISKDUMP" + bytes(1000))

    def test_a_32_bit_machines(self):
        """struct timeval is half as long there, so that the block size lies 12 bytes before."""
        raw = bytearray(464)
        raw[:8], raw[8:12] = b"KDUMP   ", struct.pack("<i", 6)
        raw[416:420] = struct.pack("<i", 4096)
        with pytest.raises(FormatError, match=r"neither byte order.*32-bit"):
            MainHeader.from_bytes(bytes(raw))

    def test_truncations(self):
        data = sample("little")
        for short in truncations(data[:464]):
            assert not survives(MainHeader.from_bytes, short)
        main = MainHeader.from_bytes(data)
        for short in truncations(data[0x1000 : 0x1000 + 104]):
            with pytest.raises(FormatError, match="cut off in its sub header"):
                SubHeader.from_bytes(short, main)

    def test_a_negative_sub_header(self):
        data = bytearray(sample("little"))
        data[432:436] = struct.pack("<i", -1)
        with pytest.raises(FormatError, match="a sub header of -1 blocks"):
            MainHeader.from_bytes(bytes(data))

    @pytest.mark.parametrize(("at", "match"), [(32, "names"), (48, "names"), (96, "page frames")])
    def test_numbers_that_make_no_sense(self, at, match):
        data = bytearray(sample("little"))
        data[0x1000 + at : 0x1000 + at + 8] = b"\xff" * 8
        with pytest.raises(FormatError, match=match):
            SubHeader.from_bytes(bytes(data[0x1000:]), MainHeader.from_bytes(bytes(data)))


def read_headers(data: bytes) -> None:
    main = MainHeader.from_bytes(data)
    SubHeader.from_bytes(data[main.block_size : main.block_size + diskdump.SUB_SIZE], main)


@settings(max_examples=200)
@given(st.sampled_from([sample(order)[:0x1100] for order in ORDERS]).flatmap(corrupted))
def test_damage_is_refused_or_still_headers(data):
    survives(read_headers, data)


@given(st.binary(max_size=456).map(lambda noise: b"KDUMP   " + noise))
def test_noise_behind_the_signature(noise):
    survives(read_headers, noise)
