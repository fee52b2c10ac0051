import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashkernel.capture.selection import PageClass
from crashkernel.dump import bitmap, dumpbytes, dumpfile, structure
from crashkernel.dump.dumpbytes import FlattenedFile, PlainFile
from crashkernel.dump.dumpfile import DamagedPage, KdumpFile, StoredPages, cut_off, is_flattened, open_dump, stored_pages
from crashkernel.dump.structure import check_structure
from crashkernel.errors import CrashkernelError, EnvironmentFault, FormatError, UsageError
from crashkernel.memory import Range, RangeSet
from crashkernel.vmcore.source import ElfVmcore, MissingMemory
from support.capture import all_chunks
from support.elfwriter import Part, write_elf, write_note
from support.hostile import corrupted
from support.kdumps import FLAGS, Kdump, in_records, write_flattened

MACHINES = [("ppc64le", 0x1000), ("ppc64le", 0x10000), ("ppc64", 0x10000), ("x86_64", 0x1000)]
every_machine = pytest.mark.parametrize(("machine", "page_size"), MACHINES)
every_codec = pytest.mark.parametrize("codec", FLAGS)


def page(pfn: int, size: int) -> bytes:
    """Of five kinds: zeros, text, noise that no codec makes smaller, nearly zeros, a pattern."""
    kind = pfn % 5
    if kind == 0:
        return bytes(size)
    if kind == 1:
        return (b"page %d of the kernel; " % pfn * size)[:size]
    if kind == 2:
        return random.Random(pfn).randbytes(size)
    if kind == 3:
        return bytes(size - 1) + b"\x07"
    return (pfn.to_bytes(8, "big") * size)[:size]


def pages(pfns, size: int = 0x1000) -> dict[int, bytes]:
    return {pfn: page(pfn, size) for pfn in pfns}


def opened(tmp_path, dump: Kdump | bytes) -> KdumpFile:
    path = tmp_path / "vmcore"
    path.write_bytes(dump if isinstance(dump, bytes) else dump.to_bytes())
    found = open_dump(path)
    assert isinstance(found, KdumpFile)
    return found


def read_all(dump: KdumpFile, pfns) -> dict[int, bytes]:
    wanted = np.array(sorted(pfns), np.int64)
    into = np.full(len(wanted) * dump.page_size, 0xAA, np.uint8)
    dump.read_pages(wanted, into)
    return {pfn: into[i * dump.page_size : (i + 1) * dump.page_size].tobytes() for i, pfn in enumerate(wanted.tolist())}


def kept_and_dropped(selection) -> tuple[list[int], list[int]]:
    kept, dropped, position = [], [], 0
    for chunk in all_chunks(selection):
        assert chunk.pfn >= position
        position = chunk.pfn + len(chunk.classes)
        assert position <= selection.max_pfn
        kept += (np.flatnonzero(chunk.classes == PageClass.KEPT) + chunk.pfn).tolist()
        dropped += (
            np.flatnonzero((chunk.classes != PageClass.KEPT) & (chunk.classes != PageClass.ABSENT)) + chunk.pfn
        ).tolist()
    return kept, dropped


class TestReading:
    @every_codec
    @every_machine
    def test_every_page(self, tmp_path, machine, page_size, codec):
        content = pages([*range(3, 40), *range(100, 140, 3)], page_size)
        dump = opened(tmp_path, Kdump(content, machine, page_size, codec))
        assert read_all(dump, content) == content
        for pfn, data in content.items():
            assert dump.read(pfn * page_size, page_size) == data
        assert not check_structure(dump).count

    @every_machine
    def test_what_the_headers_say(self, tmp_path, machine, page_size):
        memory = {*range(64), *range(1000, 1100)}
        dump = opened(tmp_path, Kdump(pages(range(8), page_size), machine, page_size, memory=memory, level=23))
        assert dump.page_size == page_size
        assert dump.byteorder == ("big" if machine == "ppc64" else "little")
        assert dump.machine == (62 if machine == "x86_64" else 21)
        assert dump.memory == RangeSet([Range(0, 64 * page_size), Range(1000 * page_size, 1100 * page_size)])
        assert (dump.level, dump.max_pfn, dump.pages) == (23, 1100, 8)
        assert dump.vmcoreinfo.release == "6.1.0-kdumps"
        assert dump.notes == Kdump({}, machine, page_size, memory=memory).elf_notes()
        assert not dump.incomplete
        assert dump.linear_base == (None if machine == "x86_64" else 0xC000000000000000)

    def test_bytes_anywhere(self, tmp_path):
        content = pages(range(1, 300))
        whole = b"".join(content[pfn] for pfn in sorted(content))
        dump = opened(tmp_path, Kdump(content))
        dice = random.Random(4)
        for _ in range(200):
            start = dice.randrange(len(whole))
            size = min(dice.choice((0, 1, 8, 4096, 5000, 9000, 700_000)), len(whole) - start)
            expected = whole[start : start + size]
            assert dump.read(0x1000 + start, size) == expected
            into = np.empty(size, np.uint8)
            dump.read_into(0x1000 + start, into)
            assert into.tobytes() == expected

    def test_pages_across_blocks_of_the_directory(self, tmp_path, monkeypatch):
        """So few pages a block, and so small pieces of bitmap, that each of their edges is met."""
        monkeypatch.setattr(bitmap, "_BLOCK_PAGES", 64)
        monkeypatch.setattr(bitmap, "PIECE", 16)
        monkeypatch.setattr(bitmap, "_BLOCKS_REMEMBERED", 2)
        pfns = sorted(random.Random(1).sample(range(5000), 900))
        content = pages(pfns)
        dump = opened(tmp_path, Kdump(content, memory=set(range(4700)) | set(pfns)))
        assert dump.pages == 900
        for _ in range(3):
            assert read_all(dump, content) == content
        for pfn in random.Random(2).sample(pfns, 100):
            assert read_all(dump, [pfn]) == {pfn: content[pfn]}
        kept, dropped = kept_and_dropped(dump.kept)
        assert kept == pfns
        assert dropped == sorted((set(range(4700)) | set(pfns)) - set(pfns))
        assert not check_structure(dump).count

    def test_a_directory_of_few_large_blocks(self, tmp_path, monkeypatch):
        """What a machine has whose memory ends at many terabytes: blocks larger than the pieces they are counted in."""
        monkeypatch.setattr(bitmap, "_MAX_BLOCKS", 2)
        monkeypatch.setattr(bitmap, "_BLOCK_PAGES", 64)
        monkeypatch.setattr(bitmap, "PIECE", 16)
        content = pages(random.Random(3).sample(range(2000), 300))
        assert read_all(opened(tmp_path, Kdump(content)), content) == content

    @given(st.sets(st.integers(0, 3000), min_size=1, max_size=60), st.integers(1, 4000), st.data())
    @settings(max_examples=40)
    def test_any_selection_of_pages(self, tmp_path_factory, pfns, step, data):
        content = pages(pfns)
        dump = opened(tmp_path_factory.mktemp("dump"), Kdump(content, codec="none", max_pfn=3001 + step))
        some = data.draw(st.sets(st.sampled_from(sorted(pfns))))
        assert read_all(dump, some) == {pfn: content[pfn] for pfn in some}
        assert kept_and_dropped(dump.kept) == (sorted(pfns), [])
        dump.close()

    def test_pages_that_lie_far_apart_in_the_file(self, tmp_path):
        """Read in any order that they may have there, and those in between not at all."""
        content = pages(range(600), 0x1000)
        dump = opened(tmp_path, Kdump(content, codec="none"))
        some = [1, 2, 99, 300, 301, 599]
        assert read_all(dump, some) == {pfn: content[pfn] for pfn in some}

    def test_pages_that_were_asked_for_before(self, tmp_path, monkeypatch):
        monkeypatch.setattr(dumpfile, "_CACHED_BYTES", 3 * 0x1000)
        content = pages(range(1, 9))
        dump = opened(tmp_path, Kdump(content))
        for pfn in [1, 2, 3, 4, 1, 8, 3, 3, 1, 2]:
            assert dump.read(pfn * 0x1000 + 5, 7) == content[pfn][5:12]

    def test_what_was_dropped_and_what_never_was(self, tmp_path):
        dump = opened(tmp_path, Kdump(pages([2, 3, 5]), memory={1, 2, 3, 4, 5}))
        for paddr, size in ((0, 1), (0x1000, 8), (0x4000, 0x1000), (0x3FF8, 16), (0x5FFF, 2), (0x100000, 1), (-8, 8)):
            with pytest.raises(MissingMemory, match="are not in the dump"):
                dump.read(paddr, size)
        for pfns in ([1], [2, 4], [3, 6], [-1, 2], [5, 1 << 40]):
            with pytest.raises(MissingMemory):
                dump.read_pages(np.array(pfns), np.empty(len(pfns) * 0x1000, np.uint8))
        dump.read_pages(np.array([], np.int64), np.empty(0, np.uint8))

    def test_shared_among_processes(self, tmp_path):
        content = pages(range(20))
        dump = opened(tmp_path, Kdump(content))
        pid = os.fork()
        if not pid:
            os._exit(0 if read_all(dump, content) == content else 1)
        assert read_all(dump, content) == content
        assert os.waitpid(pid, 0)[1] == 0

    def test_statistics(self, tmp_path):
        content = pages(range(20))
        stats = opened(tmp_path, Kdump(content, memory=set(range(50)))).statistics()
        assert (stats.memory, stats.kept, stats.zero, stats.missing, stats.dropped) == (50, 20, 4, 0, 30)
        assert stats.codecs == {"zlib": 12, "none": 4}
        assert stats.data_end == (tmp_path / "vmcore").stat().st_size

    def test_statistics_of_a_dump_without_a_page_for_zeros(self, tmp_path):
        stats = opened(tmp_path, Kdump(pages(range(20)), share_zeros=False)).statistics()
        assert (stats.kept, stats.zero, stats.codecs) == (20, 0, {"zlib": 16, "none": 4})

    @pytest.mark.parametrize("version", [4, 5])
    def test_older_versions(self, tmp_path, version):
        content = pages(range(10))
        dump = opened(tmp_path, Kdump(content, version=version))
        assert read_all(dump, content) == content
        assert not check_structure(dump).count


class TestFlattened:
    @every_machine
    @pytest.mark.parametrize("step", [77, 4096, 1 << 30])
    def test_reads_like_the_file_it_describes(self, tmp_path, machine, page_size, step):
        content = pages(range(30), page_size)
        data = Kdump(content, machine, page_size).to_bytes()
        dump = opened(tmp_path, write_flattened(in_records(data, step)))
        assert is_flattened(dump)
        assert not cut_off(dump)
        assert read_all(dump, content) == content
        assert not check_structure(dump).count

    @given(st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=60)), min_size=1, max_size=12))
    def test_the_later_of_two_records_counts(self, tmp_path_factory, parts):
        path = tmp_path_factory.mktemp("stream") / "flat"
        path.write_bytes(write_flattened(parts))
        whole = bytearray()
        for offset, data in parts:
            whole.extend(bytes(max(0, offset + len(data) - len(whole))))
            whole[offset : offset + len(data)] = data
        stream = FlattenedFile(PlainFile(path))
        assert stream.size == len(whole)
        assert stream.read(0, 1000) == whole
        for start in range(0, len(whole), 7):
            assert stream.read(start, 11) == whole[start : start + 11]
        assert stream.read(len(whole), 5) == b""
        stream.close()

    @pytest.mark.parametrize("lost", [8, 16, 20, 40_000])
    def test_one_that_is_cut_off(self, tmp_path, lost):
        content = pages(range(30))
        stream = write_flattened([(0, Kdump(content, codec="none").to_bytes())])
        dump = opened(tmp_path, stream[:-lost])
        assert cut_off(dump)
        assert "the flattened stream is cut off" in check_structure(dump).first[0]
        assert read_all(dump, [1, 2, 3]) == {pfn: content[pfn] for pfn in (1, 2, 3)}

    def test_more_records_than_fit(self, tmp_path, monkeypatch):
        monkeypatch.setattr(dumpbytes, "_MAX_RECORDS", 10)
        with pytest.raises(FormatError, match="more than 10 records"):
            opened(tmp_path, write_flattened(in_records(Kdump(pages(range(9))).to_bytes())))

    def test_claims_of_terabytes_allocate_nothing(self, tmp_path):
        """A stream of a few KiB whose header says that a bitmap of 2 TiB follows, and that puts a byte at its end."""
        small = Kdump(pages([1])).to_bytes()
        head = bytearray(small[:0x2000])
        blocks = 2 * ((1 << 43) // 8 // 0x1000)
        head[436:440] = blocks.to_bytes(4, "little")
        head[0x1000 + 96 : 0x1000 + 104] = (1 << 43).to_bytes(8, "little")
        stream = write_flattened([(0, bytes(head)), (1 << 50, b"x")])
        with pytest.raises(FormatError, match="cut off"):
            opened(tmp_path, stream)

    def test_an_elf_vmcore(self, tmp_path):
        text = b"OSRELEASE=6.1.0\nPAGESIZE=4096\n"
        memory = random.Random(5).randbytes(0x5000)
        elf = write_elf(
            "little", [Part(4, data=write_note("little", "VMCOREINFO", 0, text)), Part(paddr=0x7000, data=memory)], kind=4
        )
        (tmp_path / "flat").write_bytes(write_flattened(in_records(elf)))
        with open_dump(tmp_path / "flat") as dump:
            assert isinstance(dump, ElfVmcore)
            assert is_flattened(dump)
            assert dump.read(0x7001, 0x4000) == memory[1:0x4001]
            assert kept_and_dropped(stored_pages(dump)) == (list(range(7, 12)), [])
            with pytest.raises(MissingMemory):
                dump.read(0x6000, 1)


class TestStoredPages:
    @staticmethod
    def vmcore(tmp_path, parts) -> ElfVmcore:
        note = Part(4, data=write_note("little", "VMCOREINFO", 0, b"OSRELEASE=6.1.0\nPAGESIZE=4096\n"))
        (tmp_path / "vmcore").write_bytes(write_elf("little", [note, *parts], kind=4))
        return ElfVmcore(tmp_path / "vmcore")

    def test_all_of_it(self, tmp_path):
        parts = [Part(paddr=0x1000, data=bytes(0x2000)), Part(paddr=0x9000, data=bytes(0x1000))]
        selection = StoredPages(self.vmcore(tmp_path, parts))
        assert kept_and_dropped(selection) == ([1, 2, 9], [])
        assert (selection.level, selection.max_pfn, selection.page_size) == (0, 10, 0x1000)

    def test_zeros_that_are_not_in_the_file(self, tmp_path):
        parts = [Part(paddr=0x1000, data=bytes(0x1000), memory_size=0x3000), Part(paddr=0x4000, data=bytes(0x1000))]
        selection = StoredPages(self.vmcore(tmp_path, parts))
        assert kept_and_dropped(selection) == ([1, 4], [2, 3])
        assert selection.level == 31

    def test_a_page_in_parts(self, tmp_path):
        parts = [Part(paddr=0x1800, data=bytes(0x1000)), Part(paddr=0x2800, data=b"", memory_size=0x1000)]
        assert kept_and_dropped(StoredPages(self.vmcore(tmp_path, parts))) == ([1, 2], [3])

    def test_in_chunks(self, tmp_path, monkeypatch):
        monkeypatch.setattr(dumpfile, "PIECE", 1)
        parts = [Part(paddr=at * 0x1000, data=bytes(size * 0x1000)) for at, size in ((3, 2), (7, 20), (40, 1), (44, 9))]
        expected = [*range(3, 5), *range(7, 27), 40, *range(44, 53)]
        assert kept_and_dropped(StoredPages(self.vmcore(tmp_path, parts))) == (expected, [])


def faults_of(tmp_path, data: bytes) -> str:
    found = check_structure(opened(tmp_path, data))
    assert found.count >= len(found.first)
    return "\n".join(found.first)


def kill_me(*_) -> list[str]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


class TestStructure:
    """Each fault is found, and named."""

    def test_none(self, tmp_path):
        assert faults_of(tmp_path, Kdump(pages(range(300)), memory=set(range(400))).to_bytes()) == ""

    @every_codec
    def test_a_damaged_page(self, tmp_path, codec):
        dump = Kdump(pages(range(10)), codec=codec)
        data = bytearray(dump.to_bytes())
        at = dump.places[7] - 4 if codec == "lzo" else dump.places[6]  # LZO's end is checked, its beginning may be anything
        data[at : at + 4] = b"\xff\xfe\xfd\xfc"
        found = check_structure(opened(tmp_path, bytes(data)))
        if codec == "none":
            assert found.count == 0  # nothing in the dump can tell: that is what the manifest's digest is for
        else:
            assert found.count == 1
            assert found.first[0].lower().startswith(f"page frame 0x6: {codec}")

    def test_a_page_that_becomes_too_long_or_too_short(self, tmp_path):
        import zlib

        for size, message in ((100, "100 bytes came of it"), (5000, "bytes came of it")):
            dump = Kdump(pages(range(10)))
            data = bytearray(dump.to_bytes())
            stored = zlib.compress(b"a" * size)
            data[dump.places[6] : dump.places[6] + len(stored)] = stored
            row = dump.places["descriptors"] + 24 * 6
            data[row + 8 : row + 12] = len(stored).to_bytes(4, "little")
            assert message in faults_of(tmp_path, bytes(data))

    @pytest.mark.parametrize(
        ("at", "value", "size", "message"),
        [
            (0, 1 << 40, 8, "are not in the file"),
            (0, (1 << 64) - 8, 8, "are not in the file"),
            (0, 5, 8, "overlap what lies before"),
            (8, 0, 4, "is stored in 0x0 bytes"),
            (8, 0x1001, 4, "is stored in 0x1001 bytes"),
            (8, 0xFFFFFFFF, 4, "is stored in 0xffffffff bytes"),
            (12, 0x40, 4, "unknown method"),
            (12, 3, 4, "unknown method"),
        ],
    )
    def test_a_descriptor(self, tmp_path, at, value, size, message):
        dump = Kdump(pages(range(10)))
        data = bytearray(dump.to_bytes())
        row = dump.places["descriptors"] + 24 * 6 + at
        data[row : row + size] = value.to_bytes(size, "little")
        assert message in faults_of(tmp_path, bytes(data))

    def test_descriptors_that_name_the_same_data(self, tmp_path):
        dump = Kdump(pages([1, 2, 3]))
        data = bytearray(dump.to_bytes())
        row = dump.places["descriptors"]
        data[row + 24 : row + 48] = data[row : row + 24]
        assert "page frame 0x2: its data" in faults_of(tmp_path, bytes(data))

    def test_a_part_of_the_page_of_zeros(self, tmp_path):
        dump = Kdump(pages(range(10)))
        data = bytearray(dump.to_bytes())
        row = dump.places["descriptors"] + 24 * 5
        data[row + 8 : row + 12] = (8).to_bytes(4, "little")
        assert "page frame 0x5: its descriptor names a part of the page of zeros" in faults_of(tmp_path, bytes(data))

    def test_an_incomplete_dump(self, tmp_path):
        dump = Kdump(pages(range(10)), status=9)
        data = bytearray(dump.to_bytes())
        row = dump.places["descriptors"] + 24 * 7
        data[row : row + 72] = bytes(72)
        found = opened(tmp_path, bytes(data))
        assert found.incomplete
        faults = check_structure(found)
        assert faults.count == 4
        assert "ran out of space" in faults.first[0]
        assert "page frame 0x9: it was never written" in faults.first[3]
        assert found.statistics().missing == 3
        with pytest.raises(DamagedPage, match="page frame 0x7: it was never written") as caught:
            read_all(found, [6, 7])
        assert (caught.value.pfn, caught.value.paddr, caught.value.size) == (7, 0x7000, 0x1000)

    def test_a_page_in_the_dump_that_is_no_memory(self, tmp_path):
        assert "page frame 0x3 is in the dump, but no memory" in faults_of(
            tmp_path, Kdump(pages([2, 3]), memory={2}).to_bytes()
        )

    def test_bits_behind_the_last_page(self, tmp_path):
        for where, place in (("bitmap1", 1), ("bitmap2", 400)):
            dump = Kdump(pages([2, 3]))
            data = bytearray(dump.to_bytes())
            data[dump.places[where] + place] = 0x80
            assert f"bitmap {where[-1]} has bits set behind" in faults_of(tmp_path, bytes(data))

    def test_a_bit_behind_the_last_page_in_its_byte(self, tmp_path):
        dump = Kdump(pages([2, 3]))
        data = bytearray(dump.to_bytes())
        data[dump.places["bitmap2"]] |= 0x80
        assert "bitmap 2 has bits set behind the last page frame, 0x3" in faults_of(tmp_path, bytes(data))

    @pytest.mark.parametrize(
        ("at", "patch", "message"),
        [
            (424, b"\x41", "has flags that nobody sets"),
            (440, b"\x09", "differ in the number of page frames"),
            (0x1000 + 8, b"\x20", "its dump level is 32"),
            (0x1000 + 32, b"\x01", "is something else"),
            (0x1000 + 32, b"\0\0\0\x01", "is not inside the notes"),
            (0x1000 + 64, b"\0\0\0\x01\0\0\0\0\x01", "erase information"),
        ],
    )
    def test_a_header(self, tmp_path, at, patch, message):
        data = bytearray(Kdump(pages([2, 3])).to_bytes())
        data[at : at + len(patch)] = patch
        assert message in faults_of(tmp_path, bytes(data))

    def test_every_truncation(self, tmp_path):
        """A dump that lacks even one byte is never whole."""
        dump = Kdump(pages(range(12)))
        data = dump.to_bytes()
        for size in [*range(0, len(data), 97), *range(dump.places["data"] - 30, dump.places["data"] + 30), len(data) - 1]:
            try:
                found = check_structure(opened(tmp_path, data[:size]))
            except FormatError:
                assert size < dump.places["descriptors"]
                continue
            assert found.count
            assert size >= dump.places["descriptors"]

    def test_faults_are_cut_at_a_sane_number(self, tmp_path):
        dump = Kdump({pfn: page(1, 0x1000) for pfn in range(500)})
        data = bytearray(dump.to_bytes())
        start = dump.places["descriptors"]
        data[start : start + 500 * 24] = bytes(500 * 24)
        found = check_structure(opened(tmp_path, bytes(data)))
        assert found.count == 500
        assert len(found.first) == 50

    def test_many_processes_find_the_same(self, tmp_path, monkeypatch):
        monkeypatch.setattr(structure, "_WORTH_A_FORK", 1)
        dump = Kdump(pages(range(3000), 0x1000), codec="zlib")
        data = bytearray(dump.to_bytes())
        for pfn in (11, 1501, 1502, 2999):
            data[dump.places[pfn]] ^= 0xFF
        found = opened(tmp_path, bytes(data))
        told = []
        alone = check_structure(found)
        assert alone.count == 3  # a page of noise is stored as it is
        assert check_structure(found, lambda done, total: told.append((done, total)), workers=3) == alone
        assert told == sorted(told)
        assert told[-1] == (3000, 3000)

    def test_a_process_that_is_killed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(structure, "_WORTH_A_FORK", 1)
        monkeypatch.setattr(structure, "_bad_pages_of_ours", kill_me)
        with pytest.raises(EnvironmentFault, match="was killed"):
            check_structure(opened(tmp_path, Kdump(pages(range(9)))), workers=2)

    def test_tells_how_far_it_is(self, tmp_path):
        told = []
        check_structure(opened(tmp_path, Kdump(pages(range(600)))), lambda done, total: told.append((done, total)))
        assert told[-1] == (600, 600)
        assert len(told) == 3


class TestRefusals:
    @pytest.mark.parametrize(
        ("at", "patch", "message"),
        [
            (0, b"X", "neither an ELF vmcore nor"),
            (428, b"\x01", "neither byte order"),
            (12 + 4 * 65, b"armv7l\0\0", "a dump of machine 'armv7l'"),
            (428, b"\0\x20\0", "0x0 page frames"),
            (436, b"\0\0\0\0", "bitmaps of 0x0 bytes"),
            (436, b"\xff\xff\xff\x7f", "cut off: its page descriptors begin"),
            (432, b"\xff\xff\xff\x7f", "cut off: its page descriptors begin"),
            (0x1000 + 12, b"\x01", "one part of a dump that makedumpfile split"),
            (0x1000 + 96, b"\0\0\0\0\x01", "bitmaps of"),
            (0x1000 + 96, b"\0\0\0\0\0\0\x0f", "has no physical address"),
            (0x1000 + 48, b"\x10\0\0\0", "its notes"),
            (0x1000 + 56, b"\xff\xff", "its notes"),
            (0x1000 + 104, b"\xff\xff\xff", "a note of"),
            (0x1000 + 40, b"\0\0\0\xff", "no VMCOREINFO|bytes of VMCOREINFO"),
        ],
    )
    def test_headers_that_make_no_sense(self, tmp_path, at, patch, message):
        data = bytearray(Kdump(pages([2, 3])).to_bytes())
        data[at : at + len(patch)] = patch
        with pytest.raises(FormatError, match=message):
            opened(tmp_path, bytes(data))

    def test_a_page_size_that_the_machine_has_not(self, tmp_path):
        with pytest.raises(FormatError, match="blocks of 65536 bytes, which no page of this machine has"):
            opened(tmp_path, Kdump(pages([2], 0x10000), "x86_64", 0x10000))

    def test_page_sizes_that_differ(self, tmp_path):
        notes = write_note("little", "VMCOREINFO", 0, b"OSRELEASE=6\nPAGESIZE=65536\n")
        with pytest.raises(FormatError, match="VMCOREINFO says PAGESIZE=65536, the header 4096"):
            opened(tmp_path, Kdump(pages([2]), notes=notes))

    def test_without_vmcoreinfo(self, tmp_path):
        for notes in (b"", write_note("little", "CORE", 1, b"abcd")):
            with pytest.raises(FormatError, match="no VMCOREINFO"):
                opened(tmp_path, Kdump(pages([2]), notes=notes))

    def test_vmcoreinfo_that_is_in_no_note(self, tmp_path):
        """The sub header alone says where it is."""
        dump = Kdump(pages([2]))
        data = bytearray(dump.to_bytes())
        data[0x1000 + 48 : 0x1000 + 64] = bytes(16)
        assert opened(tmp_path, bytes(data)).vmcoreinfo.release == "6.1.0-kdumps"

    def test_memory_in_too_many_pieces(self, tmp_path, monkeypatch):
        monkeypatch.setattr(dumpfile, "_MAX_STRETCHES", 20)
        with pytest.raises(FormatError, match="more than 20 pieces"):
            opened(tmp_path, Kdump(pages(range(0, 100, 2))))

    def test_what_is_no_file(self, tmp_path):
        for path, message in (
            (tmp_path / "nothing", "there is no "),
            (tmp_path, "is a directory, not a dump"),
            (tmp_path / ("x" * 300), "File name too long"),
        ):
            with pytest.raises(UsageError, match=message):
                open_dump(path)
        os.mkfifo(tmp_path / "pipe")
        writer = os.open(tmp_path / "pipe", os.O_RDWR)
        with pytest.raises(EnvironmentFault, match="a dump must be a file"):
            open_dump(tmp_path / "pipe")
        os.close(writer)

    def test_an_encrypted_dump(self, tmp_path):
        (tmp_path / "vmcore.age").write_bytes(b"age-encryption.org/v1\n")
        with pytest.raises(FormatError, match="must be decrypted first"):
            open_dump(tmp_path / "vmcore.age")

    def test_leaves_nothing_open(self, tmp_path):
        before = set(Path("/proc/self/fd").iterdir())
        for data in (b"KDUMP   " + bytes(1000), b"makedumpfile" + bytes(9), write_flattened([(0, b"KDUMP   ")]), b"\x7fELF"):
            (tmp_path / "bad").write_bytes(data)
            with pytest.raises(FormatError):
                open_dump(tmp_path / "bad")
        assert set(Path("/proc/self/fd").iterdir()) == before


class Quiet(bytes):
    """A dump's bytes, which nobody wants to see in a failure's report."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


SAMPLES = [
    Kdump(pages(range(6)), memory=set(range(9))).to_bytes(),
    Kdump(pages(range(4), 0x1000), "x86_64", codec="lzo").to_bytes(),
    write_flattened(in_records(Kdump(pages(range(6))).to_bytes(), 5000)),
]


@settings(max_examples=150)
@given(
    st.sampled_from(SAMPLES).flatmap(
        lambda data: st.just(data[:0x2000]).flatmap(corrupted).map(lambda head: Quiet(head + data[0x2000:]))
    )
)
def test_damaged_headers_are_refused_or_read(tmp_path_factory, data):
    look_at(tmp_path_factory, data)


@settings(max_examples=150)
@given(st.sampled_from(SAMPLES).flatmap(corrupted).map(Quiet))
def test_damage_anywhere_is_refused_or_found_or_read(tmp_path_factory, data):
    look_at(tmp_path_factory, data)


def look_at(tmp_path_factory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("hostile") / "dump"
    path.write_bytes(data)
    try:
        with open_dump(path) as dump:
            if isinstance(dump, KdumpFile):
                check_structure(dump)
                dump.statistics()
                for chunk in all_chunks(dump.kept):
                    pfns = np.flatnonzero(chunk.classes == PageClass.KEPT)[:5] + chunk.pfn
                    dump.read_pages(pfns, np.empty(len(pfns) * dump.page_size, np.uint8))
    except CrashkernelError as error:
        assert isinstance(error, FormatError | EnvironmentFault)  # noqa: PT017
    path.unlink()
