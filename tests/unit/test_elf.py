import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashkernel.errors import FormatError, UsageError
from crashkernel.formats.elf import (
    EM_PPC64,
    ET_CORE,
    NT_PRSTATUS,
    PN_XNUM,
    PPC64_REGISTERS,
    PT_LOAD,
    PT_NOTE,
    CoreHeader,
    CoreLoad,
    ElfFile,
    Note,
    PrStatus,
    Segment,
    build_core_header,
    iter_notes,
)
from support.elfwriter import Part, write_elf, write_note, write_prstatus
from support.hostile import corrupted, peak_memory, survives, truncations

ORDERS = ["little", "big"]
both_orders = pytest.mark.parametrize("byteorder", ORDERS)
KERNEL = 0xC000000000000000


def register_values() -> list[int]:
    """Every register holds its own name, so that a wrong offset reads as the wrong word."""
    return [int.from_bytes(name.encode()[:8].ljust(8), "big") for name in PPC64_REGISTERS]


def notes(byteorder: str) -> bytes:
    return write_note(byteorder, "CORE", NT_PRSTATUS, write_prstatus(byteorder, 4711, register_values())) + write_note(
        byteorder, "VMCOREINFO", 0, b"OSRELEASE=6.1.0\n"
    )


def sample(byteorder: str, **options: bool) -> bytes:
    parts = [
        Part(type=PT_NOTE, flags=4, data=notes(byteorder)),
        Part(vaddr=KERNEL, paddr=0, data=b"text" * 8, memory_size=0x40, alignment=0x10000),
        Part(type=0x6474E551, flags=6),
    ]
    return write_elf(byteorder, parts, kind=ET_CORE, flags=2, **options)


@both_orders
class TestElfFile:
    @pytest.mark.parametrize("escaped_count", [False, True])
    def test_reads_headers_and_segments(self, byteorder, escaped_count):
        data = sample(byteorder, escaped_count=escaped_count)
        elf = ElfFile.from_bytes(memoryview(data), "vmcore")
        assert (elf.byteorder, elf.type, elf.machine, elf.entry, elf.flags) == (byteorder, ET_CORE, EM_PPC64, KERNEL, 2)
        assert [each.type for each in elf.segments] == [PT_NOTE, PT_LOAD, 0x6474E551]
        (load,) = elf.loads
        assert load == Segment(PT_LOAD, 7, len(data) - 32, KERNEL, 0, 32, 0x40, 0x10000)
        assert data[load.file_offset :] == b"text" * 8

    def test_reads_notes(self, byteorder):
        data = sample(byteorder)
        status, info = ElfFile.from_bytes(data).notes(data)
        assert info == Note("VMCOREINFO", 0, b"OSRELEASE=6.1.0\n")
        assert (status.name, status.type) == ("CORE", NT_PRSTATUS)
        read = PrStatus.from_bytes(status.desc, byteorder)
        assert read.pid == 4711
        assert list(read.registers.values()) == register_values()
        assert read.registers["nip"] == int.from_bytes(b"nip     ", "big")
        assert len(read.registers) == 44

    def test_headers_suffice_when_the_size_is_known(self, byteorder):
        data = sample(byteorder)
        head = data[: 64 + 3 * 56]
        assert ElfFile.from_bytes(head, file_size=len(data)) == ElfFile.from_bytes(data)
        with pytest.raises(FormatError, match="notes are cut off"):
            list(ElfFile.from_bytes(head, file_size=len(data)).notes(head))

    def test_names_the_segment_and_what_it_lacks(self, byteorder):
        data = sample(byteorder)
        with pytest.raises(FormatError, match=r"vmlinux: segment 1 \(PT_LOAD\) lacks 0x5 of its 0x20 bytes") as caught:
            ElfFile.from_bytes(data[:-5], "vmlinux")
        assert caught.value.offset == len(data) - 32

    def test_a_segment_beyond_the_end_lacks_all_of_it(self, byteorder):
        with pytest.raises(FormatError, match=r"segment 0 \(PT_NOTE\) lacks 0x234 of its 0x234 bytes"):
            ElfFile.from_bytes(sample(byteorder), file_size=64)

    def test_segments_of_other_types_may_point_anywhere(self, byteorder):
        data = write_elf(byteorder, [Part(type=6, data=b"1234")])
        assert ElfFile.from_bytes(data[:-4]).segments[0].file_size == 4

    def test_a_file_without_segments(self, byteorder):
        assert ElfFile.from_bytes(write_elf(byteorder, [])).segments == ()

    def test_more_in_the_file_than_in_memory(self, byteorder):
        with pytest.raises(FormatError, match="0x4 bytes in the file for 0x2 in memory"):
            ElfFile.from_bytes(write_elf(byteorder, [Part(data=b"1234", memory_size=2)]))

    @pytest.mark.parametrize(
        ("offset", "patch", "message"),
        [
            (0, b"\x1f\x8b", "not an ELF file"),
            (4, b"\x01", "not a 64-bit ELF file.*zImage"),
            (5, b"\x03", "byte order or version"),
            (6, b"\x00", "byte order or version"),
            (20, b"\x09\x00\x00\x09", "ELF version"),
            (54, b"\x20\x20", "program headers have 8224 bytes"),
            (32, b"\xff" * 8, "the 3 program headers end"),
            (56, b"\xfe\xfe", "the 65278 program headers end"),
            (56, b"\xff\xff", "number of program headers is not there"),
        ],
    )
    def test_refuses(self, byteorder, offset, patch, message):
        data = bytearray(sample(byteorder))
        data[offset : offset + len(patch)] = patch
        with pytest.raises(FormatError, match=message):
            ElfFile.from_bytes(data)

    def test_a_forged_escaped_count_allocates_nothing(self, byteorder):
        data = bytearray(write_elf(byteorder, [], escaped_count=True))
        data[64 + 44 : 64 + 48] = b"\xff" * 4
        with pytest.raises(FormatError, match="the 4294967295 program headers end"):
            ElfFile.from_bytes(data)
        assert peak_memory(ElfFile.from_bytes, bytes(data)) < 1 << 16

    def test_notes_named_many_times_are_refused(self, byteorder):
        data = bytearray(write_elf(byteorder, [Part(type=PT_NOTE, data=notes(byteorder))] + [Part(type=PT_NOTE)] * 99))
        first = bytes(data[64:120])
        for index in range(100):
            data[64 + 56 * index : 120 + 56 * index] = first
        with pytest.raises(FormatError, match="overlap"):
            list(ElfFile.from_bytes(data).notes(data))


@both_orders
class TestNotes:
    def test_end_at_a_note_without_a_name(self, byteorder):
        """A crash_notes buffer is longer than its notes, and all zeros on a CPU that saved nothing."""
        one = write_note(byteorder, "CORE", 1, b"abcde")
        assert list(iter_notes(one + bytes(64) + one, byteorder)) == [Note("CORE", 1, b"abcde")]
        assert not list(iter_notes(bytes(1024), byteorder))

    @pytest.mark.parametrize("field", [0, 4])
    def test_what_precedes_a_bad_note_is_yielded(self, byteorder, field):
        bad = bytearray(write_note(byteorder, "CORE", 1, b"abcd"))
        bad[field : field + 4] = b"\xff" * 4
        reader = iter_notes(write_note(byteorder, "LINUX", 2, b"") + bad, byteorder, "cpu3")
        assert next(reader) == Note("LINUX", 2, b"")
        with pytest.raises(FormatError, match=r"cpu3: a note of .* does not fit"):
            next(reader)

    def test_a_name_that_is_not_ascii(self, byteorder):
        data = write_note(byteorder, "CORE", 1, b"").replace(b"CORE", b"C\xffRE")
        with pytest.raises(FormatError, match="not ASCII"):
            list(iter_notes(data, byteorder))

    def test_a_short_prstatus_is_refused(self, byteorder):
        status = write_prstatus(byteorder, 1, [])
        assert PrStatus.from_bytes(status[:496], byteorder).pid == 1
        for short in truncations(status[:496]):
            with pytest.raises(FormatError, match="at least 496 bytes"):
                PrStatus.from_bytes(short, byteorder)


words = st.integers(0, (1 << 64) - 1)
half_words = st.integers(0, (1 << 63) - 1)
core_notes = st.lists(st.tuples(half_words, half_words), max_size=4)
core_loads = st.lists(st.builds(CoreLoad, words, half_words, half_words, words), max_size=6)


class TestCoreHeader:
    @given(st.sampled_from(ORDERS), core_notes, core_loads)
    def test_round_trip(self, byteorder, notes, loads):
        if not notes and not loads:
            with pytest.raises(UsageError):
                build_core_header(byteorder, EM_PPC64, notes, loads)
            return
        data = build_core_header(byteorder, EM_PPC64, notes, loads)
        assert len(data) == 64 + 56 * (len(notes) + len(loads))
        assert CoreHeader.from_bytes(data) == CoreHeader(byteorder, EM_PPC64, tuple(notes), tuple(loads))

    @both_orders
    def test_is_what_the_kernel_checks_for(self, byteorder):
        """The conditions of parse_crash_elf64_headers, on the bytes."""
        load = CoreLoad(paddr=0, size=0x2880000, location=0x20000000, vaddr=KERNEL)
        data = build_core_header(byteorder, EM_PPC64, [(0x1F00, 0x200)], [load])

        def field(offset: int, size: int) -> int:
            return int.from_bytes(data[offset : offset + size], byteorder)

        assert data[:7] == b"\x7fELF\x02" + (b"\x01" if byteorder == "little" else b"\x02") + b"\x01"
        assert (field(16, 2), field(18, 2), field(20, 4)) == (ET_CORE, EM_PPC64, 1)
        assert (field(32, 8), field(52, 2), field(54, 2), field(56, 2)) == (64, 64, 56, 2)
        assert (field(64, 4), field(72, 8), field(104, 8)) == (PT_NOTE, 0x1F00, 0x200)
        at = 120
        assert (field(at, 4), field(at + 4, 4)) == (PT_LOAD, 7)
        assert (field(at + 8, 8), field(at + 16, 8), field(at + 24, 8)) == (0x20000000, KERNEL, 0)
        assert (field(at + 32, 8), field(at + 40, 8)) == (0x2880000, 0x2880000)

    def test_more_segments_than_the_kernel_counts(self):
        with pytest.raises(UsageError, match="not 65535"):
            build_core_header("big", EM_PPC64, [], [CoreLoad(0, 1, 0, 0)] * PN_XNUM)

    def test_a_kernel_is_no_core_header(self):
        with pytest.raises(FormatError, match="not a core header"):
            CoreHeader.from_bytes(write_elf("little", [Part(data=b"1234")], kind=2))


def read_all(data: bytes) -> None:
    elf = ElfFile.from_bytes(data)
    for note in elf.notes(data):
        if note.type == NT_PRSTATUS:
            PrStatus.from_bytes(note.desc, elf.byteorder)


def read_everything(data: bytes) -> None:
    survives(CoreHeader.from_bytes, data)
    survives(read_all, data)


@both_orders
@pytest.mark.parametrize("escaped_count", [False, True])
def test_every_truncation_is_refused(byteorder, escaped_count):
    for short in truncations(sample(byteorder, escaped_count=escaped_count)):
        assert not survives(ElfFile.from_bytes, short)
        read_everything(short)


@settings(max_examples=300)
@given(
    st.sampled_from([sample(order, escaped_count=escaped) for order in ORDERS for escaped in (False, True)]).flatmap(corrupted)
)
def test_damage_is_refused_or_still_a_file(data):
    read_everything(data)


@given(st.binary(max_size=80).map(lambda data: b"\x7fELF\x02\x01\x01" + data))
def test_noise_behind_the_magic(data):
    read_everything(data)


@given(st.binary(max_size=200), st.sampled_from(ORDERS))
def test_noise_as_notes(data, byteorder):
    survives(lambda noise: list(iter_notes(noise, byteorder)), data)


def readelf(path: Path) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    command = ("readelf", "--file-header", "--segments", "--wide", str(path))
    return subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout


def segments_of(listing: str) -> list[tuple[int, ...]]:
    """(offset, vaddr, paddr, file size, memory size) of each line of readelf's table."""
    pattern = r"^  [A-Z][A-Z_+0-9a-fx]* +(0x\w+) (0x\w+) (0x\w+) (0x\w+) (0x\w+)"
    return [tuple(int(each, 16) for each in found) for found in re.findall(pattern, listing, re.MULTILINE)]


def numbers(segment: Segment) -> tuple[int, ...]:
    return (segment.file_offset, segment.vaddr, segment.paddr, segment.file_size, segment.memory_size)


def test_agrees_with_readelf_on_a_program_of_this_machine():
    path = Path(sys.executable).resolve()
    elf = ElfFile.from_bytes(path.read_bytes(), str(path))
    listing = readelf(path)
    assert [numbers(each) for each in elf.segments] == segments_of(listing)
    assert f"0x{elf.entry:x}" in listing


@both_orders
def test_readelf_agrees_with_our_core_header(tmp_path, byteorder):
    path = tmp_path / "elfcorehdr"
    loads = [CoreLoad(0, 0x2880000, 0x20000000, KERNEL), CoreLoad(0x2880000, 0x1000000, 0x2880000, KERNEL + 0x2880000)]
    path.write_bytes(build_core_header(byteorder, EM_PPC64, [(0x1F00, 0x200)], loads))
    listing = readelf(path)
    assert "CORE (Core file)" in listing
    assert f"{byteorder} endian" in listing
    assert "PowerPC64" in listing
    assert segments_of(listing) == [
        (0x1F00, 0, 0x1F00, 0x200, 0x200),
        (0x20000000, KERNEL, 0, 0x2880000, 0x2880000),
        (0x2880000, KERNEL + 0x2880000, 0x2880000, 0x1000000, 0x1000000),
    ]
