"""The pages that the filter keeps, against those that makedumpfile keeps: every level, every vmcore there is, two releases.

It takes the bench's vmcore, which is made if it is not in the cache, others that are there, and `$CRASHKERNEL_VMCORES/*.vmcore`
(any kernels of x86_64 and ppc64le).

Two things of a kernel's are put into words that makedumpfile knows, in a copy of the vmcore, for otherwise it would read
something else than page structs (`pagefilter`'s docstring has what it does then): `compound_info` of 7.1 and later is called
`compound_head`, and a ppc64 kernel with 4 KiB pages and the radix MMU gets the list that one with the hash MMU keeps of where
its page structs are.
"""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from crashkernel.bench import vmcore as benchs
from crashkernel.bench.makedumpfile import SUITES, Makedumpfile, provide
from crashkernel.capture.pagefilter import PageFilter
from crashkernel.capture.selection import MAX_DUMP_LEVEL, PageClass
from crashkernel.drill.debian import default_cache
from crashkernel.errors import EnvironmentFault
from crashkernel.formats import flattened
from crashkernel.formats.elf import EM_PPC64
from crashkernel.vmcore.kernel import CrashedKernel
from crashkernel.vmcore.source import ElfVmcore
from support.capture import all_chunks

pytestmark = [pytest.mark.capture, pytest.mark.timeout(3600)]

NEWEST_KNOWN = {"bookworm": (6, 2), "sid": (7, 0)}
"""The newest kernels that the releases of makedumpfile know; what is put into words for them as above counts as older."""


def corpus() -> list[Path]:
    places = sorted(default_cache().glob("bench/*/vmcore"))
    if directory := os.environ.get("CRASHKERNEL_VMCORES"):
        places += sorted(Path(directory).glob("*.vmcore"))
    return places


def name(path: Path) -> str:
    return path.stem if path.stem != "vmcore" else path.parent.name


# ------------------------------------------------------------------------------------------------- what makedumpfile keeps


def kept_by(program: Makedumpfile, vmcore: Path, level: int) -> tuple[np.ndarray, np.ndarray]:
    """The two bitmaps of its dump, from the start of a flattened stream: the pages need not be written."""
    command = [*program.command, "-F", "-d", str(level), str(vmcore)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            return bitmaps(process.stdout)
        finally:
            process.kill()


def bitmaps(stream) -> tuple[np.ndarray, np.ndarray]:
    flattened.check_header(stream.read(flattened.HEADER_SIZE))
    start = bytearray(464)  # a struct disk_dump_header
    records: list[tuple[int, int]] = []
    first = size = used = 0
    while not size or any(covered(records, at, used) < used for at in (first, first + size)):
        record = flattened.read_record_header(stream.read(flattened.RECORD_HEADER_SIZE), 0)
        assert record is not None, "the stream ends before the bitmaps do"
        data = stream.read(record.size)
        if not size or record.file_offset < first + 2 * size:
            end = record.file_offset + record.size
            records.append((record.file_offset, end))
            start.extend(bytes(max(0, end - len(start))))
            start[record.file_offset : end] = data
        if not size and start.startswith(b"KDUMP   "):
            # block_size, sub_hdr_size, bitmap_blocks, max_mapnr; of a bitmap's last block the end need not be written
            block_size, sub_blocks, blocks, pages = struct.unpack_from("<iiII", start, 428)
            first, size, used = (1 + sub_blocks) * block_size, blocks * block_size // 2, -(-pages // 8)
    start.extend(bytes(max(0, first + 2 * size - len(start))))
    present, kept = (np.frombuffer(start[at : at + size], np.uint8) for at in (first, first + size))
    return np.unpackbits(present, bitorder="little"), np.unpackbits(kept, bitorder="little")


def covered(records: list[tuple[int, int]], start: int, size: int) -> int:
    """How many bytes of `size` from `start` on are in `records`, which do not overlap."""
    return sum(max(0, min(end, start + size) - max(at, start)) for at, end in records)


# ------------------------------------------------------------------------------------------------------ what we have for it


@pytest.fixture
def scratch(tmp_path):
    """A directory that is gone after the test: copies are large, and pytest keeps its own."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def in_its_words(vmcore: Path, scratch: Path) -> Path:
    """The vmcore, or a copy that differs from it in what makedumpfile needs to find and read the page structs."""
    with ElfVmcore(vmcore) as source:
        changes = [*renamed(source), *listed(source)]
        if not changes:
            return vmcore
    copy = scratch / "vmcore"
    shutil.copyfile(vmcore, copy)
    with copy.open("r+b") as file:
        for offset, data in changes:
            file.seek(offset)
            file.write(data)
    return copy


def renamed(source: ElfVmcore):
    if "OFFSET(page.compound_info)" in source.vmcoreinfo:
        with Path(source.name).open("rb") as file:
            at = file.read(1 << 20).index(b"OFFSET(page.compound_info)")
        yield at, b"OFFSET(page.compound_head)"


def listed(source: ElfVmcore):
    """A vmemmap_list of 2 MiB blocks, on the first page of zeros that is free."""
    if source.machine != EM_PPC64 or source.page_size != 4096:
        return
    kernel, info = CrashedKernel(source), source.vmcoreinfo
    if kernel.pointer(info.symbol("vmemmap_list")):
        return  # a hash kernel has its own
    free = PageFilter(kernel, source, 16)
    pfn = next(
        int(pfn)
        for chunk in all_chunks(free)
        for pfn in np.flatnonzero(chunk.classes == PageClass.FREE) + chunk.pfn
        if not any(source.read(int(pfn) * 4096, 4096))
    )
    shift = info.offset("mmu_psize_def.shift")
    index = next(
        number
        for number in range(16)
        if kernel.read(info.symbol("mmu_psize_defs") + number * info.size("mmu_psize_def") + shift, 4) == struct.pack("<I", 21)
    )
    page, at = bytearray(4096), 0xC000_0000_0000_0000 + pfn * 4096
    first, last = 0xC00C_0000_0000_0000, 0xC00C_0000_0000_0000 + source.memory.ranges[-1].end // 4096 * info.size("page")
    blocks = [
        (each.vaddr + offset, each.paddr + offset)
        for each in kernel.spans(first, last)
        for offset in range(0, each.size, 2 << 20)
    ]
    assert 32 * len(blocks) <= len(page)
    for number, (vaddr, paddr) in enumerate(blocks):
        following = at + 32 * (number + 1) if number + 1 < len(blocks) else 0
        for member, value in (("virt_addr", vaddr), ("phys", paddr), ("list", following)):
            struct.pack_into("<Q", page, 32 * number + info.offset(f"vmemmap_backing.{member}"), value)
    yield file_offset(source, pfn * 4096), bytes(page)
    yield file_offset(source, kernel.paddr(info.symbol("vmemmap_list"))), struct.pack("<Q", at)
    yield file_offset(source, kernel.paddr(info.symbol("mmu_vmemmap_psize"))), struct.pack("<I", index)


def file_offset(source: ElfVmcore, paddr: int) -> int:
    segment = next(each for each in source.segments if each.paddr <= paddr < each.end)
    return segment.file_offset + paddr - segment.paddr


# --------------------------------------------------------------------------------------------------------------- the tests


OTHERS = [path for path in corpus() if path.parent.name != benchs.Recipe().name]


@pytest.fixture(params=[None, *OTHERS], ids=lambda path: name(path) if path else benchs.Recipe().name)
def vmcore(request) -> Path:
    """Each of the corpus. The bench's, which a newcomer's cache lacks when tests are collected, is made now if need be."""
    return request.param or benchs.provide()


def test_there_is_a_corpus():
    assert benchs.provide() in corpus()


def test_every_page_at_every_level(vmcore, scratch):
    copy = in_its_words(vmcore, scratch)
    with ElfVmcore(vmcore) as source:
        release = tuple(int(part) for part in source.vmcoreinfo.release.split(".")[:2])
        programs = [
            provide(suite, "ppc64el" if source.machine == EM_PPC64 else "amd64")
            for suite in SUITES
            if release <= NEWEST_KNOWN[suite] or (suite == SUITES[-1] and copy != vmcore)
        ]
        if not programs:
            raise EnvironmentFault(f"no makedumpfile here knows kernel {source.vmcoreinfo.release}")
        kernel = CrashedKernel(source)
        for level in range(MAX_DUMP_LEVEL + 1):
            filtered = PageFilter(kernel, source, level)
            classes = np.full(filtered.max_pfn, PageClass.ABSENT, np.uint8)
            for chunk in all_chunks(filtered):
                classes[chunk.pfn : chunk.pfn + len(chunk.classes)] = chunk.classes
            assert filtered.findings.doubts() == []
            for program in programs:
                present, kept = (bits[: filtered.max_pfn] for bits in kept_by(program, copy, level))
                assert np.array_equal(classes != PageClass.ABSENT, present), f"{program}, level {level}"
                different = np.flatnonzero((classes == PageClass.KEPT) != kept)
                assert not len(different), (
                    f"{program}, level {level}: {len(different)} pages differ, from {different[0]:#x} on, "
                    f"class {PageClass(classes[different[0]]).name}"
                )
