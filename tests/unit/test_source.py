"""An ELF vmcore as a source: what is read is what the file says, however its segments lie; hostile headers are refused."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crashkernel.vmcore.source as source_module
from crashkernel.errors import CrashkernelError, EnvironmentFault, FormatError
from crashkernel.memory import Range, RangeSet
from crashkernel.vmcore.source import ElfVmcore, MissingMemory, Stretch
from support.elfwriter import PT_LOAD, PT_NOTE, Part, write_elf, write_note
from support.hostile import corrupted, truncations

PAGE = 0x1000
INFO = b"OSRELEASE=6.1.0\nPAGESIZE=4096\n"
NOTE = write_note("little", "VMCOREINFO", 0, INFO)


def vmcore(path: Path, *loads: Part, notes: bytes = NOTE, machine: int = 62, kind: int = 4, byteorder: str = "little") -> Path:
    path.write_bytes(write_elf(byteorder, [Part(PT_NOTE, data=notes), *loads], kind=kind, machine=machine))
    return path


def noise(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def pages(source: ElfVmcore, *pfns: int) -> bytes:
    into = np.full(len(pfns) * source.page_size, 0xEE, np.uint8)
    source.read_pages(np.array(pfns, np.int64), into)
    return into.tobytes()


def test_reads_what_the_segments_hold(tmp_path):
    low, high = noise(3 * PAGE, 1), noise(2 * PAGE, 2)
    path = vmcore(tmp_path / "v", Part(paddr=0x100000, data=high), Part(paddr=PAGE, data=low))
    with ElfVmcore(path) as source:
        assert (source.machine, source.byteorder, source.page_size) == (62, "little", PAGE)
        assert source.vmcoreinfo.release == "6.1.0"
        assert source.notes == NOTE
        assert source.memory == RangeSet([Range(PAGE, 4 * PAGE), Range(0x100000, 0x100000 + 2 * PAGE)])
        assert [each.paddr for each in source.segments] == [PAGE, 0x100000]
        assert source.read(PAGE + 5, 2 * PAGE) == low[5 : 5 + 2 * PAGE]
        assert pages(source, 1, 2, 3, 0x100, 0x101) == low + high
        assert pages(source, 3, 0x101) == low[2 * PAGE :] + high[PAGE:]
        assert pages(source) == b""
        assert os.pread(source.fileno(), 4, 0) == b"\x7fELF"


def test_missing_memory_is_named(tmp_path):
    with ElfVmcore(vmcore(tmp_path / "v", Part(paddr=PAGE, data=noise(PAGE, 1)))) as source:
        for paddr, size in ((0, 1), (PAGE - 1, 2), (2 * PAGE - 1, 2), (1 << 40, 8), (-8, 8)):
            with pytest.raises(MissingMemory) as caught:
                source.read(paddr, size)
            assert (caught.value.paddr, caught.value.size) == (paddr, size)
        with pytest.raises(MissingMemory, match="0x2000"):
            pages(source, 1, 2)
        with pytest.raises(MissingMemory):
            pages(source, 0)
        assert source.read(1 << 40, 0) == b""


def test_pages_that_are_partly_there_are_filled_with_zeros(tmp_path):
    data = noise(2 * PAGE, 3)
    # [0x1800, 0x2400) and [0x2c00, 0x2e00): page 1 lacks its first half, page 2 its middle and its end
    path = vmcore(tmp_path / "v", Part(paddr=0x1800, data=data[:0xC00]), Part(paddr=0x2C00, data=data[0xC00:0xE00]))
    with ElfVmcore(path) as source:
        expected = bytes(0x800) + data[:0xC00] + bytes(0x800) + data[0xC00:0xE00] + bytes(0x200)
        assert pages(source, 1, 2) == expected
        with pytest.raises(MissingMemory):
            source.read(0x1000, 0x1000)


def test_a_page_across_two_segments_is_read_from_both(tmp_path):
    data = noise(2 * PAGE, 4)
    parts = Part(paddr=0x1000, data=data[:0x1234]), Part(paddr=0x8000, data=b"x"), Part(paddr=0x2234, data=data[0x1234:])
    with ElfVmcore(vmcore(tmp_path / "v", *parts)) as source:
        assert pages(source, 1, 2) == data
        assert source.read(0x1001, 0x1FFF) == data[1:]
        assert len(source.segments) == 3


def test_neighbours_in_memory_and_file_become_one(tmp_path):
    data = noise(4 * PAGE, 5)
    with ElfVmcore(
        vmcore(tmp_path / "v", Part(paddr=PAGE, data=data[:PAGE]), Part(paddr=2 * PAGE, data=data[PAGE:]))
    ) as source:
        assert len(source.segments) == 1
        assert source.segments[0].size == 4 * PAGE


def test_what_only_memory_has_is_zeros(tmp_path):
    data = noise(PAGE + 0x10, 6)
    with ElfVmcore(vmcore(tmp_path / "v", Part(paddr=PAGE, data=data, memory_size=4 * PAGE))) as source:
        assert source.memory == RangeSet([Range(PAGE, 5 * PAGE)])
        assert source.segments[-1] == Stretch(2 * PAGE + 0x10, None, 3 * PAGE - 0x10)
        assert pages(source, 1, 2, 3, 4) == data + bytes(4 * PAGE - len(data))
        assert source.read(2 * PAGE, PAGE) == data[PAGE:] + bytes(PAGE - 0x10)


def test_of_overlapping_segments_the_first_counts_and_bytes_beat_zeros(tmp_path):
    first, second = noise(2 * PAGE, 7), noise(4 * PAGE, 8)
    zeros = Part(paddr=0, memory_size=8 * PAGE)
    parts = zeros, Part(paddr=2 * PAGE, data=first), Part(paddr=PAGE, data=second)
    with ElfVmcore(vmcore(tmp_path / "v", *parts)) as source:
        expected = bytes(PAGE) + second[:PAGE] + first + second[3 * PAGE :] + bytes(3 * PAGE)
        assert pages(source, *range(8)) == expected
        assert source.read(0, 8 * PAGE) == expected
        assert source.memory == RangeSet([Range(0, 8 * PAGE)])


@pytest.fixture
def as_proc_vmcore(tmp_path, monkeypatch):
    """A path that is taken for /proc/vmcore, and is mapped in small windows."""
    monkeypatch.setattr(source_module, "_PROC_VMCORE", tmp_path / "proc-vmcore")
    monkeypatch.setattr(source_module, "_WINDOW_SIZE", 0x10000)
    return tmp_path / "proc-vmcore"


def test_proc_vmcore_is_mapped_and_reads_the_same(as_proc_vmcore, monkeypatch):
    data = noise(100 * PAGE, 11)
    path = vmcore(as_proc_vmcore, Part(paddr=0x800, data=data), Part(paddr=200 * PAGE, data=data))
    (path.parent / "link").symlink_to(path)
    with ElfVmcore(path.parent / "link") as source:
        monkeypatch.setattr(os, "preadv", None)  # nothing is read any more
        plain = bytes(0x800) + data + bytes(0x800)
        assert pages(source, *range(101)) == plain
        assert pages(source, 0, 50, 99, 100, 200, 299) == b"".join(
            (plain + bytes(99 * PAGE) + data)[pfn * PAGE : (pfn + 1) * PAGE] for pfn in (0, 50, 99, 100, 200, 299)
        )
        assert source.read(0x801, 70 * PAGE) == data[1 : 1 + 70 * PAGE]


def test_a_proc_vmcore_that_cannot_be_mapped_is_read(as_proc_vmcore, monkeypatch):
    data = noise(100 * PAGE, 12)

    def refuse(*_args, **_named):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with ElfVmcore(vmcore(as_proc_vmcore, Part(paddr=PAGE, data=data))) as source:
        assert pages(source, *range(1, 101)) == data


def test_other_files_are_not_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(mmap, "mmap", None)
    data = noise(4 * PAGE, 13)
    with ElfVmcore(vmcore(tmp_path / "v", Part(paddr=PAGE, data=data))) as source:
        assert pages(source, 1, 2, 3, 4) == data


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12), st.integers(0, 12)), max_size=8),
    st.lists(st.integers(0, 9), unique=True, max_size=10),
)
@settings(max_examples=80, deadline=None)
def test_any_layout_reads_as_a_plain_memory_would(tmp_path_factory, loads, wanted):
    """Segments in units of 0x500 bytes, so that hardly one begins or ends on a page."""
    unit = 0x500
    parts = []
    plain: dict[int, int] = {}
    zeros: set[int] = set()
    for number, (start, stored, extra) in enumerate(loads):
        data = noise(stored * unit, number)
        parts.append(Part(paddr=start * unit, data=data, memory_size=(stored + extra) * unit))
        for index, value in enumerate(data):
            plain.setdefault(start * unit + index, value)
        zeros.update(range((start + stored) * unit, (start + stored + extra) * unit))
    plain = dict.fromkeys(zeros, 0) | plain
    with ElfVmcore(vmcore(tmp_path_factory.mktemp("v") / "v", *parts)) as source:
        assert source.memory.total == len(plain)
        for pfn in sorted(wanted):
            there = [plain.get(paddr) for paddr in range(pfn * PAGE, (pfn + 1) * PAGE)]
            if any(value is not None for value in there):
                assert pages(source, pfn) == bytes(value or 0 for value in there)
            else:
                with pytest.raises(MissingMemory):
                    pages(source, pfn)
        present = sorted({paddr // PAGE for paddr in plain})
        expected = b"".join(bytes(plain.get(at, 0) for at in range(pfn * PAGE, (pfn + 1) * PAGE)) for pfn in present)
        assert pages(source, *present) == expected


def test_big_endian_and_64k_pages(tmp_path):
    note = write_note("big", "VMCOREINFO", 0, b"OSRELEASE=6.1.0\nPAGESIZE=65536\n")
    data = noise(0x20000, 9)
    path = vmcore(tmp_path / "v", Part(paddr=0x10000, data=data), notes=note, machine=21, byteorder="big")
    with ElfVmcore(path) as source:
        assert (source.machine, source.byteorder, source.page_size) == (21, "big", 0x10000)
        assert pages(source, 1, 2) == data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": 2}, "not a core dump"),
        ({"machine": 183}, "machine 183"),
        ({"notes": write_note("little", "CORE", 1, bytes(8))}, "no VMCOREINFO"),
        ({"notes": write_note("little", "VMCOREINFO", 0, b"PAGESIZE=8192\n")}, "PAGESIZE=8192"),
        ({"notes": write_note("little", "VMCOREINFO", 0, b"PAGESIZE=65536\n")}, "PAGESIZE=65536"),
        ({"notes": write_note("little", "VMCOREINFO", 0, b"OSRELEASE=6\n")}, "no PAGESIZE"),
    ],
)
def test_refuses_what_is_no_vmcore(tmp_path, changes, message):
    with pytest.raises(FormatError, match=message):
        ElfVmcore(vmcore(tmp_path / "v", Part(paddr=0, data=bytes(PAGE)), **changes))


def test_refuses_an_address_no_machine_has(tmp_path):
    with pytest.raises(FormatError, match="no physical address"):
        ElfVmcore(vmcore(tmp_path / "v", Part(paddr=(1 << 56) - PAGE, memory_size=2 * PAGE)))


def test_says_which_file_cannot_be_opened_or_read(tmp_path):
    with pytest.raises(EnvironmentFault, match="nowhere"):
        ElfVmcore(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    writer = os.open(tmp_path / "fifo", os.O_RDWR)
    try:
        with pytest.raises(EnvironmentFault, match="must be a file"):
            ElfVmcore(tmp_path / "fifo")
    finally:
        os.close(writer)


def test_a_file_that_shrinks_while_it_is_read_is_reported(tmp_path):
    path = vmcore(tmp_path / "v", Part(paddr=0, data=noise(4 * PAGE, 1)))
    with ElfVmcore(path) as source:
        os.truncate(path, path.stat().st_size - PAGE)
        with pytest.raises(EnvironmentFault, match="shorter"):
            pages(source, 0, 1, 2, 3)


def test_many_headers_are_read(tmp_path):
    """More program headers than the first read holds, all overlapping: no quadratic time, no limit of 64 KiB."""
    count = 30_000
    parts = [Part(paddr=index * 16, memory_size=0x100000 + index) for index in range(count)]
    with ElfVmcore(vmcore(tmp_path / "v", *parts)) as source:
        assert source.memory == RangeSet([Range(0, (count - 1) * 16 + 0x100000 + count - 1)])
        assert len(source.segments) == 1


def blob() -> bytes:
    parts = [
        Part(PT_NOTE, data=NOTE),
        Part(PT_LOAD, paddr=0, data=noise(PAGE, 1)),
        Part(PT_LOAD, paddr=0x5800, data=noise(PAGE, 2)),
    ]
    return write_elf("little", parts, kind=4, machine=62)


def use(path: Path) -> None:
    """Open and read all of it; whatever the bytes are, only our errors come out."""
    try:
        with ElfVmcore(path) as source:
            ranges = source.memory.ranges[:4]
            for each in ranges:
                source.read(each.start, min(each.size, PAGE))
                first = each.start // source.page_size
                pages(source, first, *range(first + 1, min(-(-each.end // source.page_size), first + 4)))
    except CrashkernelError:
        pass


@given(corrupted(blob()))
@settings(max_examples=300, deadline=None)
def test_survives_hostile_headers(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("v") / "v"
    path.write_bytes(data)
    use(path)


def test_survives_being_cut_off(tmp_path):
    path = tmp_path / "v"
    for data in truncations(blob(), 61):
        path.write_bytes(data)
        with pytest.raises(FormatError):
            ElfVmcore(path)


def test_what_follows_the_notes_of_a_buffer_is_none_of_the_notes(tmp_path):
    """Else a reader of all notes together would stop at it."""
    first = write_note("little", "CORE", 1, bytes(336))
    path = tmp_path / "v"
    parts = [Part(PT_NOTE, data=first + bytes(64)), Part(PT_NOTE, data=NOTE), Part(PT_LOAD, data=bytes(4096))]
    path.write_bytes(write_elf("little", parts, kind=4, machine=62))
    with ElfVmcore(path) as source:
        assert source.notes == first + NOTE
