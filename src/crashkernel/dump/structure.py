"""What can be wrong with a kdump-compressed dump: every bitmap, every descriptor and every page is looked at."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from crashkernel.capture.selection import MAX_DUMP_LEVEL
from crashkernel.dump.bitmap import PIECE, Pfns
from crashkernel.dump.dumpfile import DamagedPage, KdumpFile, admitted
from crashkernel.errors import EnvironmentFault
from crashkernel.formats import diskdump

_BATCH_BYTES = 1 << 20  # of pages that are looked at together
_WORTH_A_FORK = 1 << 14  # pages


@dataclass(frozen=True, slots=True)
class Faults:
    """What is wrong with a dump: how often in all, and the first of them in words."""

    count: int
    first: tuple[str, ...]


class FaultList:
    """Faults as they are found; only the first ones are kept in words."""

    LIMIT = 50

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, text: str, times: int = 1) -> None:
        """Note one fault, or as many of a kind."""
        self.count += times
        if len(self.first) < self.LIMIT:
            self.first.append(text)

    def extend(self, other: Faults) -> None:
        """Note what was found elsewhere."""
        self.count += other.count
        self.first += other.first[: self.LIMIT - len(self.first)]

    def all(self) -> Faults:
        """All of them."""
        return Faults(self.count, tuple(self.first))


def check_structure(
    dump: KdumpFile, tell: Callable[[int, int], None] = lambda _done, _all: None, *, workers: int = 1
) -> Faults:
    """Find every fault of a kdump-compressed dump's structure: in its bitmaps, in each descriptor, in each page's data.

    `tell` is called with how many pages were gone over, and of how many; `workers` is how many processes look at the pages.
    Headers that make no sense were found on opening it.

    :raise EnvironmentFault: the file cannot be read, or a codec is not installed.
    """
    faults = FaultList()
    _check_headers(dump, faults)
    _check_bitmaps(dump, faults)
    end = dump.header.descriptors_offset + dump.pages * diskdump.DESCRIPTOR_SIZE
    if end > dump.data.size:
        faults.add(f"the file ends at {dump.data.size:#x}, in its page descriptors, which end at {end:#x}")
    shared = dump.shared_zeros()
    done = 0
    for pfns, rows, bad in _checked(dump, workers):
        end = _check_places(dump, pfns, rows, end, shared, faults)
        for text in bad:
            faults.add(text)
        done += len(pfns)
        tell(done, dump.pages)
    erase = dump.sub_header.eraseinfo
    if erase.size and erase.file_offset + erase.size > dump.data.size:
        faults.add(f"its erase information, {erase.size:#x} bytes at {erase.file_offset:#x}, is not in the file")
    return faults.all()


_Batch = tuple[Pfns, NDArray[np.void]]


def _checked(dump: KdumpFile, workers: int) -> Iterator[tuple[Pfns, NDArray[np.void], list[str]]]:
    """Yield all pages in order, some at a time, their descriptors, and what is wrong with their data."""
    batches = dump.batches(max(1, _BATCH_BYTES // dump.page_size))
    if workers < 2 or dump.pages < _WORTH_A_FORK:
        for pfns, rows in batches:
            yield pfns, rows, _bad_pages(dump, pfns, rows)
        return
    waiting: deque[tuple[_Batch, Future[list[str]]]] = deque()
    with ProcessPoolExecutor(workers, get_context("fork"), _adopt, (dump,)) as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_bad_pages_of_ours, *batch)))
                if len(waiting) > 4 * workers:
                    (pfns, rows), bad = waiting.popleft()
                    yield pfns, rows, bad.result()
            for (pfns, rows), bad in waiting:
                yield pfns, rows, bad.result()
        except BrokenProcessPool as error:
            raise EnvironmentFault("a process that was checking pages was killed", hint="is memory short?") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _bad_pages(dump: KdumpFile, pfns: Pfns, rows: NDArray[np.void]) -> list[str]:
    return [
        f"page frame {result.pfn:#x}: {result.reason}"
        for _, result in dump.try_pages(pfns, rows)
        if isinstance(result, DamagedPage)
    ]


_ours: list[KdumpFile] = []
"""In a process that checks pages: the dump, which came with the fork."""


def _adopt(dump: KdumpFile) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is the first process's to answer
    _ours.append(dump)


def _bad_pages_of_ours(pfns: Pfns, rows: NDArray[np.void]) -> list[str]:
    return _bad_pages(_ours[0], pfns, rows)


def _check_headers(dump: KdumpFile, faults: FaultList) -> None:
    header, sub = dump.header, dump.sub_header
    for lack in admitted(dump):
        faults.add(lack)
    if header.status & ~(diskdump.COMPRESSED | diskdump.INCOMPLETE | diskdump.EXCLUDED_VMEMMAP):
        faults.add(f"its status, {header.status:#x}, has flags that nobody sets")
    if not 0 <= sub.level <= MAX_DUMP_LEVEL:
        faults.add(f"its dump level is {sub.level}")
    if header.version == diskdump.VERSION and header.max_pfn != min(sub.max_pfn, 0xFFFFFFFF):
        faults.add(f"main and sub header differ in the number of page frames: {header.max_pfn:#x} and {sub.max_pfn:#x}")
    text, notes = sub.vmcoreinfo, sub.notes
    if notes.size and text.size:
        inside = notes.file_offset <= text.file_offset and text.file_offset + text.size <= notes.file_offset + notes.size
        if not inside:
            faults.add(f"VMCOREINFO, {text.size:#x} bytes at {text.file_offset:#x}, is not inside the notes")
    if text.size and dump.data.read(text.file_offset, len("OSRELEASE=")) != b"OSRELEASE=":
        faults.add(f"what the sub header calls VMCOREINFO, at {text.file_offset:#x}, is something else")


def _check_bitmaps(dump: KdumpFile, faults: FaultList) -> None:
    for (pfn, memory), (_, kept) in zip(dump.present.pieces(), dump.dumped.pieces(), strict=True):
        strays = np.flatnonzero(np.unpackbits(kept & ~memory, bitorder="little"))
        if len(strays):
            faults.add(f"page frame {pfn + int(strays[0]):#x} is in the dump, but no memory by bitmap 1", len(strays))
    header = dump.header
    for number, start in ((1, header.bitmap1_offset), (2, header.bitmap2_offset)):
        if _bits_set_behind(dump, start):
            faults.add(f"bitmap {number} has bits set behind the last page frame, {dump.max_pfn - 1:#x}")


def _bits_set_behind(dump: KdumpFile, bitmap_offset: int) -> bool:
    first, end = dump.max_pfn // 8, dump.header.bitmap_size
    last = dump.data.read(bitmap_offset + first, 1)
    if first < end and last and last[0] >> dump.max_pfn % 8:
        return True
    for start in range(first + 1, end, PIECE):
        data = dump.data.read(bitmap_offset + start, min(PIECE, end - start))
        if data.strip(b"\0"):
            return True
    return False


def _check_places(dump: KdumpFile, pfns: Pfns, rows: NDArray[np.void], end: int, shared: int | None, faults: FaultList) -> int:
    """Check that pages' data lie one behind the other, from `end` on, and return where they end.

    Who writes a dump goes over the pages in order, so data that go back are another page's, but for the zeros that all share.
    """
    offsets, sizes, flags = rows["offset"].astype(np.int64), rows["size"].astype(np.int64), rows["flags"]
    own = (offsets > 0) & (sizes > 0) & (sizes <= dump.page_size) & (offsets < dump.data.size)
    if shared is not None:
        zeros = offsets == shared
        wrong = zeros & ((sizes != dump.page_size) | (flags != 0))
        for index in np.flatnonzero(wrong).tolist():
            faults.add(f"page frame {int(pfns[index]):#x}: its descriptor names a part of the page of zeros")
        own &= ~zeros
        if zeros.any():
            end = max(end, shared + dump.page_size)
    places = np.flatnonzero(own)
    starts, ends = offsets[places], offsets[places] + sizes[places]
    before = np.maximum.accumulate(np.concatenate((np.array([end], np.int64), ends)))
    for index in np.flatnonzero(starts < before[:-1]).tolist():
        pfn = int(pfns[places[index]])
        faults.add(
            f"page frame {pfn:#x}: its data, at {int(starts[index]):#x}, overlap what lies before {int(before[index]):#x}"
        )
    return int(before[-1])
