import io
import shutil
import stat
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashkernel.errors import FormatError, UsageError
from crashkernel.formats import cpio
from crashkernel.formats.cpio import Entry
from support.hostile import corrupted, peak_memory, survives, truncations

SAMPLE = [
    Entry.directory("bin"),
    Entry.file("bin/tool", b"\x7fELF", mode=0o755),
    Entry.file("empty", b""),
    Entry.symlink("init", "bin/tool"),
    Entry.device("dev/console", "c", 5, 1),
    Entry.device("dev/vda", "b", 254, 0, 0o660),
    Entry("fifo", stat.S_IFIFO | 0o600, mtime=1124377373),
]
ARCHIVE = cpio.pack(SAMPLE)


def header(*, magic: bytes = b"070701", name: bytes, size: int = 0, name_size: int | None = None, check: int = 0) -> bytes:
    """One header and name, written out as buffer-format.rst lists the fields."""
    fields = (1, 0o100644, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name) if name_size is None else name_size, check)
    head = magic + b"".join(b"%08X" % each for each in fields) + name
    return head + bytes(-len(head) % 4)


def read(data: bytes) -> list[Entry]:
    return list(cpio.unpack(data))


def test_round_trip():
    assert read(ARCHIVE) == SAMPLE
    assert list(cpio.unpack(memoryview(ARCHIVE))) == SAMPLE


def test_layout():
    assert cpio.pack(SAMPLE) == ARCHIVE
    assert len(ARCHIVE) % 512 == 0
    assert ARCHIVE.startswith(
        b"070701" b"00000001" b"000041ed" b"00000000" b"00000000" b"00000002" b"00000000" b"00000000"
        b"00000000" b"00000000" b"00000000" b"00000000" b"00000004" b"00000000" b"bin\0"
    )  # fmt: skip
    assert cpio.pack([]).rstrip(b"\0").endswith(b"TRAILER!!!")


def test_modes_carry_the_type():
    assert SAMPLE[0].mode == stat.S_IFDIR | 0o755
    assert SAMPLE[3].mode == stat.S_IFLNK | 0o777
    assert SAMPLE[3].data == b"bin/tool"
    assert (SAMPLE[5].mode, SAMPLE[5].rdev_major) == (stat.S_IFBLK | 0o660, 254)


def test_writes_to_a_file_as_it_packs():
    file = io.BytesIO()
    cpio.write(file, iter(SAMPLE))
    assert file.getvalue() == ARCHIVE


def test_archives_may_follow_each_other_with_zeros_between():
    early = cpio.pack([Entry.file("early", b"1")])
    assert [each.name for each in read(bytes(4) + early + bytes(4096) + early + ARCHIVE)] == [
        *("early", "early"),
        *(each.name for each in SAMPLE),
    ]


def test_reads_what_other_archivers_write():
    plain = header(name=b"hello\0", size=3) + b"abc\0"
    assert read(plain) == [Entry("hello", 0o100644, b"abc")]
    padded = header(name=b"hello\0\0\0\0\0\0", size=3) + b"abc\0"
    assert read(padded) == read(plain)
    summed = header(magic=b"070702", name=b"hello\0", size=3, check=sum(b"abc")) + b"abc\0"
    assert read(summed) == read(plain)
    assert [each.name for each in read(header(name=b"caf\xe9\0"))] == ["caf\udce9"]
    assert read(bytes(200_000)) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x1f\x8b\x08\0\0\0\0\0", "no newc cpio header at offset 0x0.*compressed"),
        (b"070707" + bytes(200), "no newc cpio header"),
        (b"\0" + ARCHIVE, "off its 4-byte boundary at offset 0x1"),
        (ARCHIVE[:100], "cut off"),
        (header(name=b"a\0", size=0xFFFFFFFF), "0xffffffff bytes is cut off"),
        (header(name=b"a\0", name_size=0xFFFFFFFF), "is cut off"),
        (header(name=b"a\0", name_size=0), "has no name"),
        (header(name=b"\0\0"), "has no name"),
        (header(name=b"abc"), "does not end"),
        (header(name=b"a\0bc\0"), "does not end"),
        (header(name=b"a\0").replace(b"000081A4", b"+00081A4"), "not hexadecimal"),
        (header(name=b"a\0").replace(b"000081A4", b"0000_1A4"), "not hexadecimal"),
        (header(magic=b"070702", name=b"a\0", size=1, check=7) + b"a\0\0\0", "checksum"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_to_read(data, message):
    with pytest.raises(FormatError, match=message) as caught:
        list(cpio.unpack(data, "initrd.img"))
    assert caught.value.source == "initrd.img"


@pytest.mark.parametrize(
    "entry",
    [
        Entry.file("", b""),
        Entry.file("a\0b", b""),
        Entry.file("TRAILER!!!", b""),
        Entry.file("a" * 4096, b""),
        Entry.symlink("link", "t" * 4097),
        Entry.device("dev/null", "c", 1 << 32, 3),
        Entry("late", stat.S_IFREG, mtime=1 << 32),
    ],
    ids=lambda entry: ascii(entry.name[:20]),
)
def test_refuses_to_write_what_the_kernel_would_skip_or_misread(entry):
    with pytest.raises(UsageError):
        cpio.pack([entry])


numbers = st.integers(0, (1 << 32) - 1)
names = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name)
entries = st.builds(
    Entry,
    names.map(lambda name: name.decode("utf-8", "surrogateescape")).filter(lambda name: name != "TRAILER!!!"),
    numbers.filter(lambda mode: not stat.S_ISLNK(mode)),
    st.binary(max_size=20),
    *(numbers,) * 4,
)


@given(st.lists(entries, max_size=5))
def test_any_entries_round_trip(members):
    assert read(cpio.pack(members)) == members


def test_truncations_lose_entries_or_are_refused():
    for short in truncations(ARCHIVE):
        if survives(read, short):
            assert read(short) == SAMPLE[: len(read(short))]


@settings(max_examples=300)
@given(corrupted(ARCHIVE[:700]))
def test_damage_is_refused_or_still_an_archive(data):
    survives(read, data)


def test_forged_sizes_allocate_nothing():
    for forged in (header(name=b"a\0", size=0xFFFFFFFF), header(name=b"a\0", name_size=0xFFFFFFFE)):
        assert peak_memory(read, forged) < 1 << 16


def test_cpio_lists_our_archive():
    if shutil.which("cpio") is None:
        pytest.skip("cpio is not installed")
    listing = subprocess.run(["cpio", "--list", "--quiet"], input=ARCHIVE, check=True, capture_output=True, timeout=60)
    assert listing.stdout.decode().split() == [each.name for each in SAMPLE]


def test_reads_what_cpio_writes(tmp_path):
    if shutil.which("cpio") is None:
        pytest.skip("cpio is not installed")
    (tmp_path / "hello").write_bytes(b"world")
    command = ["cpio", "--create", "--quiet", "--format=newc"]
    archive = subprocess.run(command, input=b"hello\n", cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert [(each.name, each.data) for each in cpio.unpack(archive.stdout)] == [("hello", b"world")]
