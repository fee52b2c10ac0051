"""What is written, read back by the formats' own rules: every page, in every form, whatever the workers and page sizes."""

import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashkernel.capture import crew as crew_module
from crashkernel.capture import writer
from crashkernel.capture.codec import CODECS, codec_by_name, codec_for_flag
from crashkernel.capture.crew import Crew
from crashkernel.capture.selection import PageClass
from crashkernel.capture.writer import write_dump
from crashkernel.errors import UsageError
from crashkernel.formats import flattened
from crashkernel.vmcore.source import ElfVmcore
from support.capture import LINEAR_BASE, ArraySource, ListedSelection, identity, page_of

PAGE = 0x1000
ZSTD, NONE = codec_by_name("zstd"), codec_by_name("none")


def machine(count: int = 700, page_size: int = PAGE, byteorder: str = "little", hole: int = 0, **options) -> ArraySource:
    pfns = [pfn if pfn < count // 2 else pfn + hole for pfn in range(count)]
    return ArraySource({pfn: page_of(pfn % 5, pfn, page_size) for pfn in pfns}, page_size, byteorder, **options)


def classes_of(source: ArraySource) -> dict[int, PageClass]:
    every = [each for each in PageClass if each not in (PageClass.KEPT, PageClass.ABSENT)]
    return {pfn: every[pfn // 3 % len(every)] for pfn in source.pages if pfn % 3 == 1}


def write(path, source, selection, codec=ZSTD, workers=1, form="kdump", drop_zeros=True, tell=lambda _: None):
    with Crew(source, selection, codec, workers, drop_zeros) as crew, path.open("wb") as file:
        return write_dump(identity(source.byteorder), crew, file.fileno(), form, tell)


def read_kdump(data: bytes, page_size: int, byteorder: str) -> dict[int, bytes]:
    """Every page of a kdump-compressed file, by offsets counted from crash's and libkdumpfile's description of it."""
    order = "<" if byteorder == "little" else ">"
    assert data[:8] == b"KDUMP   "
    assert struct.unpack_from(order + "i", data, 8) == (6,)
    block_size, sub_blocks, bitmap_blocks = struct.unpack_from(order + "iII", data, 428)
    assert block_size == page_size
    start = (1 + sub_blocks) * page_size
    half = bitmap_blocks // 2 * page_size
    present, kept = (
        np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8, half, start + skip), bitorder="little")).tolist()
        for skip in (0, half)
    )
    assert set(kept) <= set(present)
    pages = {}
    for number, pfn in enumerate(kept):
        at, size, flags, _ = struct.unpack_from(order + "QIIQ", data, start + 2 * half + 24 * number)
        stored = data[at : at + size]
        assert len(stored) == size
        pages[pfn] = stored if not flags else codec_for_flag(flags).decompress(stored, page_size)
    return pages


def expected(source, selection_classes):
    return {pfn: page for pfn, page in source.pages.items() if pfn not in selection_classes}


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize(("page_size", "byteorder"), [(0x1000, "little"), (0x10000, "little"), (0x10000, "big")])
def test_every_kept_page_is_there_and_no_other(tmp_path, codec, page_size, byteorder):
    source = machine(200, page_size, byteorder, hole=1000)
    classes = classes_of(source)
    written = write(tmp_path / "dump", source, ListedSelection(source, classes), codec)
    data = (tmp_path / "dump").read_bytes()
    assert read_kdump(data, page_size, byteorder) == expected(source, classes)
    assert written.size == len(data)
    assert written.classes[PageClass.KEPT] == 200 - len(classes)
    assert written.classes[PageClass.USER] == list(classes.values()).count(PageClass.USER)
    assert written.zero == sum(not any(page) for page in expected(source, classes).values())
    assert not written.stream


@pytest.mark.parametrize("drop_zeros", [True, False])
def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, drop_zeros):
    source = machine(1500)
    for workers in (1, 2, 4):
        write(
            tmp_path / str(workers), source, ListedSelection(source, classes_of(source)), workers=workers, drop_zeros=drop_zeros
        )
    dumps = {(tmp_path / str(workers)).read_bytes() for workers in (1, 2, 4)}
    assert len(dumps) == 1


def into_pipe(source, selection, codec=ZSTD, form="kdump", piece=777):
    """What comes out at the other end of a pipe that is read in small pieces."""
    read_end, write_end = os.pipe()
    received = bytearray()

    def drain():
        while data := os.read(read_end, piece):
            received.extend(data)

    reader = threading.Thread(target=drain)
    with Crew(source, selection, codec, 2, form == "kdump") as crew:
        reader.start()
        written = write_dump(identity(source.byteorder), crew, write_end, form)
        os.close(write_end)
    reader.join(30)
    os.close(read_end)
    return bytes(received), written


@pytest.mark.parametrize("count", [900, 2])
def test_a_pipe_gets_the_flattened_stream_of_the_same_bytes(tmp_path, count):
    source = machine(count)
    if count == 900:  # batches of nothing but zeros among them
        source.pages |= {pfn: bytes(PAGE) for pfn in range(2000, 2600)}
    selection = ListedSelection(source, classes_of(source))
    write(tmp_path / "file", source, selection)
    stream, written = into_pipe(source, selection)
    assert written.stream
    assert written.size == len(stream)
    decoder = flattened.Decoder()
    whole = bytearray()
    for offset, data in decoder.feed(stream):
        whole.extend(bytes(max(0, offset + len(data) - len(whole))))
        whole[offset : offset + len(data)] = data
    decoder.finish()
    assert whole == (tmp_path / "file").read_bytes()


def read_elf(path, page_size) -> tuple[dict[int, bytes], ElfVmcore]:
    core = ElfVmcore(path)
    pages = {}
    for stretch in core.segments:
        for paddr in range(stretch.paddr, stretch.end, page_size):
            if stretch.file_offset is not None:
                pages[paddr // page_size] = core.read(paddr, page_size)
    return pages, core


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_plain_elf_has_every_kept_page_and_says_of_all_memory_that_it_was_there(tmp_path, byteorder, monkeypatch):
    monkeypatch.setattr(writer, "_ELF_GAP", 1)
    source = machine(300, byteorder=byteorder, hole=5000)
    classes = classes_of(source)
    written = write(tmp_path / "core", source, ListedSelection(source, classes), NONE, 2, "elf", drop_zeros=False)
    pages, core = read_elf(tmp_path / "core", PAGE)
    assert pages == expected(source, classes)
    assert core.memory == source.memory
    assert core.notes == source.notes
    assert core.linear_base == LINEAR_BASE
    assert written.size == (tmp_path / "core").stat().st_size
    assert into_pipe(source, ListedSelection(source, classes), NONE, "elf")[0] == (tmp_path / "core").read_bytes()


def test_plain_elf_bridges_small_gaps_but_never_touches_a_poisoned_page(tmp_path):
    source = machine(100, broken=(50,))
    classes = dict.fromkeys(range(10, 20), PageClass.FREE) | {50: PageClass.POISONED, 70: PageClass.OFFLINE}
    written = write(tmp_path / "core", source, ListedSelection(source, classes), NONE, 1, "elf", drop_zeros=False)
    pages, _ = read_elf(tmp_path / "core", PAGE)
    assert set(pages) == set(source.pages) - {50, 70}
    assert all(page == source.pages[pfn] for pfn, page in pages.items())
    assert written.unreadable == ()


def test_too_many_segments_are_made_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_ELF_GAP", 1)
    monkeypatch.setattr(writer, "_MOST_RUNS", 20)
    source = machine(300)
    classes = {pfn: PageClass.FREE for pfn in source.pages if pfn % 4 == 0}
    write(tmp_path / "core", source, ListedSelection(source, classes), NONE, 1, "elf", drop_zeros=False)
    pages, core = read_elf(tmp_path / "core", PAGE)
    assert len(core.segments) <= 20
    assert pages.items() >= expected(source, classes).items()


def test_memory_in_too_many_pieces_is_no_elf_file(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_MOST_RUNS", 20)
    source = machine(300)
    classes = {pfn: PageClass.POISONED for pfn in source.pages if pfn % 4 == 0}
    with pytest.raises(UsageError, match="use --format kdump"):
        write(tmp_path / "core", source, ListedSelection(source, classes), NONE, 1, "elf", drop_zeros=False)


def test_a_selection_too_large_to_remember_is_asked_again(tmp_path, monkeypatch):
    source = machine(400)
    selection = ListedSelection(source, classes_of(source))
    write(tmp_path / "remembered", source, selection)
    monkeypatch.setattr(writer, "_REMEMBERED", 0)
    write(tmp_path / "asked", source, selection)
    assert (tmp_path / "asked").read_bytes() == (tmp_path / "remembered").read_bytes()


def test_page_structs_that_read_differently_the_second_time_are_no_dump(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_REMEMBERED", 0)
    source = machine(400)

    class Fickle(ListedSelection):
        def chunks_of(self, first, last):
            if self.concluded:  # as many pages, but not the same
                self._classes = {pfn + 1: page_class for pfn, page_class in classes.items()}
            return super().chunks_of(first, last)

    classes = dict.fromkeys(range(0, 400, 5), PageClass.FREE)
    with pytest.raises(writer.SourceChanged):
        write(tmp_path / "dump", source, Fickle(source, classes))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["kdump", "elf"])
def test_a_selection_that_changes_its_mind_is_gone_over_again(tmp_path, workers, form):
    source = machine(500)
    selection = ListedSelection(source, dict.fromkeys(range(500), PageClass.FREE))
    final = dict.fromkeys(range(0, 500, 3), PageClass.FREE)
    selection.changes = [final]
    elf = form == "elf"
    written = write(tmp_path / "dump", source, selection, NONE if elf else ZSTD, workers, form, drop_zeros=not elf)
    assert len(selection.concluded) == 2
    assert written.classes[PageClass.KEPT] == len(source.pages) - len(final)
    if elf:
        assert read_elf(tmp_path / "dump", PAGE)[0].items() >= expected(source, final).items()
    else:
        assert read_kdump((tmp_path / "dump").read_bytes(), PAGE, "little") == expected(source, final)


def test_the_bitmaps_are_written_to_their_ends(tmp_path):
    """On a disk that held something else."""
    source = machine(100, 0x10000)
    with (tmp_path / "dump").open("w+b") as file:
        file.write(b"\xff" * 0x80000)
        file.flush()
        with Crew(source, ListedSelection(source, {}), ZSTD, 0, True) as crew:
            write_dump(identity(), crew, file.fileno())
    data = (tmp_path / "dump").read_bytes()
    assert set(data[0x20000 + 13 : 0x30000]) == set(data[0x30000 + 13 : 0x40000]) == {0}


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.integers(0, 300), st.integers(0, 4), min_size=1, max_size=60),
    st.integers(1, 9),
    st.sets(st.integers(0, 300)),
    st.integers(1, 64),
)
def test_any_memory_map_and_any_selection(tmp_path_factory, kinds, chunk, dropped, block):
    source = ArraySource({pfn: page_of(kind, pfn, PAGE) for pfn, kind in kinds.items()}, PAGE)
    classes = {pfn: PageClass.FREE for pfn in dropped if pfn in kinds}
    path = tmp_path_factory.mktemp("any") / "dump"
    before = crew_module.BLOCK
    crew_module.BLOCK = block * 8
    try:
        write(path, source, ListedSelection(source, classes, chunk=chunk))
    finally:
        crew_module.BLOCK = before
    assert read_kdump(path.read_bytes(), PAGE, "little") == expected(source, classes)


def test_pages_beyond_what_32_bits_count(tmp_path):
    far = 1 << 33
    source = ArraySource({3: page_of(1, 3, PAGE)}, PAGE)
    selection = ListedSelection(source, {})
    layout = writer.diskdump.DumpLayout.plan(
        byteorder="little", page_size=PAGE, max_pfn=far, utsname=identity().utsname, notes=b"", level=31, compression=0
    )
    assert layout.sub.max_pfn == far
    assert write(tmp_path / "dump", source, selection).classes[PageClass.KEPT] == 1


def test_a_full_disk_is_an_os_error(tmp_path):
    source = machine(50)
    with (
        Crew(source, ListedSelection(source, {}), ZSTD, 1, True) as crew,
        Path("/dev/full").open("wb") as full,
        pytest.raises(OSError, match="No space left"),
    ):
        write_dump(identity(), crew, full.fileno())


def test_it_tells_how_far_it_is(tmp_path):
    told = []
    source = machine(1000)
    written = write(tmp_path / "dump", source, ListedSelection(source, classes_of(source)), tell=told.append)
    assert [progress.copying for progress in told] == sorted(progress.copying for progress in told)
    assert not told[0].copying
    assert told[-1].done == told[-1].total == written.classes[PageClass.KEPT]
    assert [progress.done for progress in told if progress.copying] == sorted({p.done for p in told if p.copying})


@given(st.lists(st.binary(max_size=50), max_size=30), st.integers(1, 7))
@settings(max_examples=40)
def test_a_vector_cut_anywhere_is_written_on(parts, most):
    """A descriptor that takes a few bytes at a time, as a slow pipe may."""
    taken = bytearray()

    class Libc:
        def writev(self, _descriptor, address, count):
            rows = np.frombuffer((np.ctypeslib.ctypes.c_uint64 * (2 * count)).from_address(address), np.uint64)
            data = b"".join(np.ctypeslib.ctypes.string_at(int(at), int(size)) for at, size in rows.reshape(-1, 2))[:most]
            taken.extend(data)
            return len(data)

    vector = np.concatenate([writer._of_bytes(part) for part in parts] or [np.empty((0, 2), np.uint64)])
    real, writer._libc = writer._libc, Libc()
    try:
        writer._write_all(-1, vector, None)
    finally:
        writer._libc = real
    assert bytes(taken) == b"".join(parts)
