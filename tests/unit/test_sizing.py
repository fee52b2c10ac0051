"""Is the reservation large enough: what an initrd unpacks to, what K2 needs, and what drills showed."""

import bz2
import gzip
import lzma
import random
import shutil
import subprocess
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.errors import FormatError
from crashkernel.formats import cpio
from crashkernel.memory import Range, RangeSet
from crashkernel.placement import sizing
from crashkernel.placement.sizing import Initrd, estimate, limited_cpus, measure_initrd, possible_cpus, recommended, whole_root
from support.machines import GIB, MIB, small_machine

CONTENTS = [b"x" * size for size in (0, 1, 4096, 5000, 70000, 300000)]
SMALL = sum(-(-len(content) // 4096) * 4096 for content in CONTENTS)
LARGE = sum(-(-len(content) // 65536) * 65536 for content in CONTENTS)
ENTRIES = len(CONTENTS) + 2  # a directory, the trailer


def archive(contents=CONTENTS):
    files = [cpio.Entry.file(f"etc/{number}", content) for number, content in enumerate(contents)]
    return cpio.pack([cpio.Entry.directory("etc"), *files])


def lz4_legacy(data):
    """What lz4 -l writes of data, one block, nothing compressed: a token, the length, the literals."""
    rest, length = len(data) - 15, b""
    while rest >= 255:
        rest, length = rest - 255, length + b"\xff"
    block = b"\xf0" + length + bytes([rest]) + data
    return b"\x02\x21\x4c\x18" + len(block).to_bytes(4, "little") + block


def zstd_raw(data, *, sized):
    """A zstd frame of raw blocks; `sized`: the frame says how large its content is."""
    head = b"\x28\xb5\x2f\xfd" + (b"\xa0" + len(data).to_bytes(4, "little") if sized else b"\x00\x58")
    pieces = [data[at : at + 0x20000] for at in range(0, len(data), 0x20000)]
    blocks = [(len(piece) << 3 | (piece is pieces[-1])).to_bytes(3, "little") + piece for piece in pieces]
    return head + b"".join(blocks)


PACKERS = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_an_initrd_is_counted_file_by_file(packer):
    data = packer(archive())
    assert measure_initrd(data) == Initrd(len(data), sum(map(len, CONTENTS)), SMALL, LARGE, ENTRIES, exact=True)


def test_many_small_files_take_more_on_large_pages():
    found = measure_initrd(archive([b"x" * 100] * 200))
    assert found.unpacked == 20000
    assert found.in_memory(0x1000) == 200 * 0x1000 + 202 * 1024
    assert found.in_memory(0x10000) == 200 * 0x10000 + 202 * 1024


@pytest.mark.parametrize("second", PACKERS.values(), ids=PACKERS)
@pytest.mark.parametrize("gap", [0, 4, 512])
def test_archives_follow_one_another_as_with_microcode(second, gap):
    early = cpio.pack([cpio.Entry.file("kernel/x86/microcode/GenuineIntel.bin", b"m" * 3000)])
    found = measure_initrd(early + bytes(gap) + second(archive()))
    assert found.unpacked == 3000 + sum(map(len, CONTENTS))
    assert found.entries == ENTRIES + 2


def test_two_compressed_ones_and_padding_behind_them():
    data = gzip.compress(archive()) + bytes(8) + lzma.compress(archive(), check=lzma.CHECK_CRC32) + bytes(100)
    assert measure_initrd(data).entries == 2 * ENTRIES


@pytest.mark.parametrize("sized", [True, False])
def test_zstd_says_its_size_or_its_blocks_do(sized):
    found = measure_initrd(zstd_raw(archive(), sized=sized))
    assert (found.unpacked, found.exact) == (len(archive()), False)
    assert found.in_memory(0x10000) > found.in_memory(0x1000) > found.unpacked


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
@pytest.mark.parametrize("options", [["-1"], ["-19"], ["--no-content-size"]])
def test_what_zstd_itself_writes_is_understood(options):
    noise = random.Random(4).randbytes(1 << 20)
    content = b"".join(noise[at : at + 1024] * 2 for at in range(0, len(noise), 1024))
    data = subprocess.run(["zstd", "-q", "-c", *options], input=content, capture_output=True, check=True, timeout=60).stdout
    found = measure_initrd(data + data)
    assert 2 * len(content) <= found.unpacked <= 4 * len(data) * 2


def test_zstd_frames_of_each_width_of_size():
    # RFC 8878 3.1.1.1.1: the flag in the two highest bits, one byte only with the single segment flag, 256 added to two bytes
    last = b"\x01\0\0"
    for flag, width, content in ((0x20, 1, 200), (0x60, 2, 300), (0xA0, 4, 70000), (0xE0, 8, 1 << 33)):
        written = content - 256 if width == 2 else content
        frame = b"\x28\xb5\x2f\xfd" + bytes([flag]) + written.to_bytes(width, "little") + last
        assert measure_initrd(frame).unpacked == content


def test_a_zstd_stream_in_thousands_of_blocks_is_not_taken_for_a_bomb():
    tiny = (2 << 1 | 8 << 3).to_bytes(3, "little") + bytes(8)
    last = (2 << 1 | 8 << 3 | 1).to_bytes(3, "little") + bytes(8)
    data = b"\x28\xb5\x2f\xfd\x00\x58" + tiny * 10000 + last
    assert measure_initrd(data).unpacked == 4 * len(data)


def test_lz4_is_counted_in_blocks():
    assert 300000 <= measure_initrd(lz4_legacy(b"y" * 300000)).unpacked <= 800000
    full = (8 * MIB).to_bytes(4, "little") + bytes(8 * MIB)
    assert measure_initrd(b"\x02\x21\x4c\x18" + full + full).unpacked == 16 * MIB


def test_lzo_and_old_ramdisks_are_guessed():
    assert measure_initrd(b"\x89LZO\0\r\n\x1a\n" + bytes(1000)).unpacked == 2522
    ramdisk = measure_initrd(b"\x7fno archive" + bytes(9000))
    assert (ramdisk.unpacked, ramdisk.exact) == (9011, False)
    assert measure_initrd(b"") == Initrd(0, 0)


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_one_that_is_cut_off_is_told(packer):
    data = packer(cpio.pack([cpio.Entry.file("big", bytes(range(256)) * 400)]).rstrip(b"\0")[:90000])
    with pytest.raises(FormatError, match="cut off"):
        measure_initrd(data)
    whole = packer(archive())
    with pytest.raises(FormatError):
        measure_initrd(whole[: len(whole) // 2] if packer is not bytes else whole[:300])


def test_what_is_compressed_must_be_an_archive():
    with pytest.raises(FormatError, match="is no cpio archive"):
        measure_initrd(gzip.compress(b"hello, world" * 100))
    with pytest.raises(FormatError, match="hexadecimal"):
        measure_initrd(b"070701" + b"zz" * 60)


def test_a_bomb_ends_in_an_error_and_not_in_the_end_of_memory(monkeypatch):
    monkeypatch.setattr(sizing, "MOST_UNPACKED", 10 * MIB)
    with pytest.raises(FormatError, match="no initrd does"):
        measure_initrd(gzip.compress(archive([bytes(6 * MIB)] * 3)))
    with pytest.raises(FormatError, match="no initrd does"):
        measure_initrd(zstd_raw(b"", sized=True)[:4] + b"\xe0" + (1 << 50).to_bytes(8, "little") + b"\x01\0\0")


magics = st.sampled_from([*sizing._MAGICS, b"", b"\0\0\0\0", b"0707"])


@given(st.lists(st.tuples(magics, st.binary(max_size=200)), max_size=4))
def test_hostile_bytes_give_a_size_or_a_format_error(pieces):
    data = b"".join(magic + rest for magic, rest in pieces)
    try:
        found = measure_initrd(data)
    except FormatError:
        return
    assert found.size == len(data)
    assert 0 <= found.unpacked <= sizing.MOST_UNPACKED
    assert found.in_memory(0x1000) <= found.in_memory(0x10000)


@given(st.data(), st.sampled_from(list(PACKERS.values())))
def test_a_damaged_initrd_gives_a_size_or_a_format_error(data, packer):
    whole = bytearray(packer(archive(CONTENTS[:4])))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert measure_initrd(bytes(whole)).size == len(whole)
    except FormatError as error:
        assert error.message  # noqa: PT017 - either is right


# --------------------------------------------------------------------------------------------------------------- the needs


def of(region, mmu="radix", page_size=0x10000, cpus=1, initrd=None, span=0x2880000, **more):
    """What a K2 like Debian 6.1 needs of a region of so many bytes."""
    initrd = initrd or Initrd(3 * MIB, 3 * MIB, 3 * MIB, 4 * MIB, 30)
    return estimate(span, initrd, RangeSet([Range.sized(512 * MIB, region)]), mmu, page_size, cpus, **more)


def test_the_peak_is_the_worse_of_two():
    small, large = (
        of(512 * MIB, k1_memory=64 * GIB),
        of(512 * MIB, initrd=Initrd(100 * MIB, 300 * MIB, 300 * MIB, 320 * MIB, 9)),
    )
    assert small.peak == small.during("capturing") > small.during("unpacking")
    assert large.peak == large.during("unpacking") > large.during("capturing")
    assert small.during("always") + sum(n.size for n in small.needs if n.phase == "capturing") == small.peak
    assert small.margin == 512 * MIB - small.peak


def test_every_need_has_a_size_and_a_source():
    for mmu in ("radix", "hash"):
        for need in of(GIB, mmu, cpus=8, started=4, k1_memory=GIB).needs:
            assert need.size > 0
            assert need.source


def test_the_array_of_struct_pages_comes_in_blocks():
    def array(*args, **more):
        return next(need.size for need in of(*args, **more).needs if need.name == "struct page array")

    assert array(512 * MIB) == 2 * MIB  # half a MiB, in radix's vmemmap blocks
    assert array(512 * MIB, page_size=0x1000) == 8 * MIB
    assert array(512 * MIB, "hash") == 512 << 10
    assert array(2 * GIB, "hash") == 16 * MIB  # blocks of 16 MiB from 1 GiB on


def test_cpus_cost_memory_possible_or_started():
    one, many = of(GIB), of(GIB, cpus=1920)
    assert many.peak - one.peak == 1919 * 768 * 1024
    assert of(GIB, cpus=8, started=8).peak - of(GIB, cpus=8).peak == 7 * 7 * MIB
    assert many.verdict == "too small"


@given(
    st.integers(1, 64).map(lambda n: n * 32 * MIB),
    st.sampled_from(["radix", "hash"]),
    st.sampled_from([0x1000, 0x10000]),
    st.integers(1, 4096),
    st.integers(0, GIB),
    st.integers(0, 1 << 46),
)
def test_more_of_anything_never_needs_less(region, mmu, page_size, cpus, size, k1_memory):
    initrd = Initrd(size, size, size, size, 10)
    base = estimate(0x2880000, initrd, RangeSet([Range.sized(0, region)]), mmu, page_size, cpus, k1_memory=k1_memory)
    assert base.peak > 0x2880000 + size
    more = Initrd(size + MIB, size + MIB, size + MIB, size + MIB, 11)
    for other in (
        of(region, mmu, page_size, cpus + 1, initrd, k1_memory=k1_memory),
        of(region, mmu, page_size, cpus, more, k1_memory=k1_memory),
        of(region, mmu, page_size, cpus, initrd, started=2, k1_memory=k1_memory),
    ):
        assert other.peak >= base.peak


# ------------------------------------------------------------------------------------------------------------ seen for real

# Drills on a twin of 1 GiB and one CPU, the reserved placement where not said otherwise: MMU, page size, where K2's image ends,
# the reservation in MiB, and whether the dump was saved whole. The 2.7 MB initrd is the drill's own, uncompressed.
SEEN = [
    ("radix", 0x10000, 0x2880000, 80, False),  # Debian 6.1: no room for the process table, seen in its memory only
    ("radix", 0x10000, 0x2880000, 96, False),  # "System is deadlocked on memory", while its init ran; also with zero
    ("radix", 0x10000, 0x2880000, 104, False),  # the same, while it captured
    ("radix", 0x10000, 0x2880000, 112, True),  # also Debian 6.12 with 64 KiB pages
    ("hash", 0x10000, 0x2880000, 80, False),  # "System is deadlocked on memory"
    ("hash", 0x10000, 0x2880000, 88, False),
    ("hash", 0x10000, 0x2880000, 96, True),
    ("radix", 0x1000, 0x287F000, 88, False),  # Debian 6.12: no room for the process table
    ("radix", 0x1000, 0x287F000, 96, True),
]
INITRD = Initrd(2817024, 2814000, 2856000, 3670016, 24)


@pytest.mark.parametrize(("mmu", "page_size", "span", "region", "saved"), SEEN)
def test_what_failed_is_called_too_small_and_what_has_room_is_not(mmu, page_size, span, region, saved):
    def verdict(size):
        return of(size, mmu, page_size, initrd=INITRD, span=span, k1_memory=GIB).verdict

    if saved:
        assert verdict(region * MIB) == "tight"  # with 8 MiB less it fails
        assert verdict(region * 4 // 3 * MIB) == "ample"
    else:
        assert verdict(region * MIB) == "too small"


def test_half_of_memory_is_all_that_an_initrd_gets_without_a_root():
    # seen of Debian 6.1, radix, in 256 MiB: 120 MB were cut off without root=, and whole with it
    big = Initrd(MIB // 2, 120 * MIB, 120 * MIB, 120 * MIB, 20)
    assert of(256 * MIB, initrd=big).verdict == "too small"
    assert of(256 * MIB, initrd=big, root=True).verdict == "tight"
    assert of(256 * MIB, initrd=Initrd(MIB // 2, 60 * MIB, 60 * MIB, 60 * MIB, 20)).verdict != "too small"
    assert of(320 * MIB, initrd=big).verdict != "too small"


# ------------------------------------------------------------------------------------------------------ what vendors recommend


@pytest.mark.parametrize(
    ("memory", "cpus", "rhel", "debian"),
    [
        (GIB, 1, 0, 0),
        (2 * GIB, 8, 392 * MIB, 320 * MIB),
        (2 * GIB - 100 * MIB, 8, 392 * MIB, 320 * MIB),
        (16 * GIB, 1, GIB + MIB, 512 * MIB),
        (64 << 40, 1920, (4096 + 1920) * MIB, 4 * GIB),
    ],
)
def test_what_distributions_recommend(memory, cpus, rhel, debian):
    found = {each.vendor: each.size for each in recommended(memory, cpus)}
    assert found == {"rhel": rhel, "debian": debian, "suse": 384 * MIB}
    assert all(each.source for each in recommended(memory, cpus))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ("", 8),
        ("nr_cpus=4", 4),
        ("nr_cpus=4 nr_cpus=2", 2),
        ("nr_cpus=2 nr_cpus=4", 4),
        ("nr_cpus=16", 8),
        ("nr_cpus=0", 8),
        ("nr_cpus=", 8),
        ("nr_cpus=1x xnr_cpus=1 maxcpus=1", 8),
    ],
)
def test_a_limit_of_cpus_is_read_as_no_lower_than_the_kernel_does(options, left):
    assert limited_cpus(8, options, "nr_cpus") == left


@pytest.mark.parametrize(
    ("cmdline", "whole"),
    [
        ("", False),
        ("console=hvc0 maxcpus=1", False),
        ("root=/dev/vda1", True),
        ("rootfstype=ramfs", True),
        ("rootfstype=tmpfs,ramfs", False),
        ("root=/dev/vda1 rootfstype=tmpfs", False),
        ("rootfstype=tmpfs rootfstype=ext4", True),
        ("rootflags=root=x norootfstype=ramfs", False),
    ],
)
def test_what_lifts_the_limit_of_a_tmpfs(cmdline, whole):
    assert whole_root(cmdline) == whole


def test_cpus_that_a_partition_may_come_to_have_are_possible():
    found = small_machine()
    assert possible_cpus(found) == 2
    (rtas,) = [node for node in found.device_tree.children if node.name == "rtas"]
    for capacity, possible in ((5, 5), (1, 2), (0, 2), (0xFFFFFFFF, 8192)):
        rtas.properties["ibm,lrdr-capacity"] = bytes(16) + capacity.to_bytes(4, "big")
        assert possible_cpus(found) == possible
    assert possible_cpus(replace(found, platform="powernv")) == 2
    rtas.properties["ibm,lrdr-capacity"] = bytes(3)
    assert possible_cpus(found) == 2


def test_an_estimate_knows_whether_it_was_guessed():
    junk = bytes(range(1, 251)) * 8
    assert not of(512 * MIB, initrd=measure_initrd(junk)).exact
    assert of(512 * MIB, initrd=measure_initrd(b"")).exact
