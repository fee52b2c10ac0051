"""K1's physical memory as a vmcore has it: where the capture reads from.

References: Linux `fs/proc/vmcore.c` (what the capture kernel shows of K1) and the ELF specification, chapter 5 "Program
Loading".
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from crashkernel.errors import EnvironmentFault, FormatError
from crashkernel.formats.elf import EM_PPC64, EM_X86_64, ET_CORE, PT_NOTE, ByteOrder, ElfFile, Segment, iter_notes, notes_size
from crashkernel.formats.vmcoreinfo import VmcoreInfo
from crashkernel.memory import Range, RangeSet, align_up

PAGE_SIZES = {EM_PPC64: (0x1000, 0x10000), EM_X86_64: (0x1000,)}
"""Bytes a page can have, by machine (ppc64: `arch/powerpc/Kconfig`, PPC_PAGE_SHIFT for Book3S)."""

# The headers must be in the first bytes of the file. /proc/vmcore cannot have more: it counts segments in 16 bits, and
# 65535 headers of 56 bytes are 3.5 MiB.
_HEAD_SIZES = (1 << 16, 1 << 22)
# Of one CPU's registers a kernel keeps 1 to 3 KiB, so this is tens of thousands of CPUs; a file cannot make us take more.
NOTES_LIMIT = 1 << 26
# A physical address has at most 56 bits (ppc64: _RPAGE_PA_MAX, `arch/powerpc/include/asm/book3s/64/pgtable.h`; x86_64: 52).
PADDR_LIMIT = 1 << 56
_VMCOREINFO = "VMCOREINFO"

# The capture kernel maps what it reads of /proc/vmcore, and unmaps it again, page by page; a mapping of ours is made once for
# all of a window. Measured in K2 on an emulated POWER9, MB/s by reads of 1 MiB and by windows of 4 MiB: 4 KiB pages 860 and
# 2,900 (hash: 75 and 470), 64 KiB pages 3,300 and 3,000; if only a 16th of a window is wanted, it is still no slower. These
# pages are no memory of ours, in no statistic. Any other file is read: a mapping of the page cache would count as our memory.
_PROC_VMCORE = Path("/proc/vmcore")
_WINDOW_SIZE = 1 << 22


class MissingMemory(FormatError):
    """Bytes of K1's memory were asked for that the source does not hold: `size` bytes at `paddr`, not all of them there."""

    def __init__(self, paddr: int, size: int, *, source: str = "") -> None:
        super().__init__(f"{size:#x} bytes of memory at physical address {paddr:#x} are not in the dump", source=source)
        self.paddr = paddr
        self.size = size


class Source(Protocol):
    """A dead kernel's physical memory, and the notes it left. What writes a dump, and what reads one, take any of these."""

    name: str  # for messages: the path
    machine: int  # EM_PPC64 or EM_X86_64
    byteorder: ByteOrder
    notes: bytes  # the PT_NOTE contents, merged: NT_PRSTATUS of each CPU, VMCOREINFO, ...
    vmcoreinfo: VmcoreInfo
    memory: RangeSet  # physical memory it knows of, in bytes
    linear_base: int | None  # the virtual address of physical address 0 in K1's linear mapping, if it says so

    @property
    def page_size(self) -> int:
        """K1's page size in bytes."""
        ...

    def read(self, paddr: int, size: int) -> bytes:
        """Return `size` bytes of physical memory.

        :raise MissingMemory: a byte of them is not in the dump.
        """
        ...

    def read_into(self, paddr: int, into: NDArray[np.uint8]) -> None:
        """Fill `into` (flat, contiguous) with the physical memory from `paddr` on.

        For what is read a piece after the other, as the dump-level filter reads page structs: half a MiB at a time into the
        same memory. With `read` the new objects would cost more than the filtering.

        :raise MissingMemory: a byte of it is not in the dump.
        """
        ...

    def read_pages(self, pfns: NDArray[np.int64], into: NDArray[np.uint8]) -> None:
        """Read whole pages, ascending page frame numbers, one after the other into `into` (flat, `page_size` bytes each).

        What a page lacks reads as zeros, as long as a byte of it is there: memory need not begin or end on a page.

        :raise MissingMemory: one of them is not in the dump.
        """
        ...


class Stretch(NamedTuple):
    """`size` bytes of K1's memory from `paddr` on, at `file_offset`; all zeros and not in the file when that is None."""

    paddr: int
    file_offset: int | None
    size: int

    @property
    def end(self) -> int:
        """The physical address behind the last byte."""
        return self.paddr + self.size


class ElfVmcore:
    """An ELF vmcore as a `Source`: a file, or `/proc/vmcore` of the capture kernel.

    Each run of pages that is consecutive in the file is read in one piece, with no position kept, so many processes can share
    one object after a fork. `/proc/vmcore` is mapped, a few MiB at a time; any other file is read.

    `segments` are the PT_LOADs in ascending order without overlaps. Where two of them hold the same memory the one that
    comes first in the file counts: on x86_64 kexec-tools describes K1's text once more as it was mapped. `linear_base` is the
    virtual address of physical address 0 in K1's linear mapping, None where the file does not say.

    :raise FormatError: it is no vmcore of ppc64 or x86_64, it is cut off, or VMCOREINFO is missing.
    :raise EnvironmentFault: it cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.name = str(path)
        try:
            self._descriptor = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise EnvironmentFault(f"cannot open {self.name}: {error.strerror}") from None
        self._mappable = Path(path).resolve() == _PROC_VMCORE
        self._window: mmap.mmap | None = None
        self._window_start = 0
        try:
            self._read_headers()
        except BaseException:
            self.close()
            raise

    def _read_headers(self) -> None:
        try:
            self._file_size = os.lseek(self._descriptor, 0, os.SEEK_END)  # stat says 0 of a block device
        except OSError:
            raise EnvironmentFault(f"{self.name} cannot be read at any place: a vmcore must be a file") from None
        elf = self._elf(self._file_size)
        if elf.type != ET_CORE:
            raise FormatError("an ELF file, but not a core dump", source=self.name, offset=16)
        if elf.machine not in PAGE_SIZES:
            raise FormatError(f"a dump of ELF machine {elf.machine}, not of ppc64 or x86_64", source=self.name, offset=18)
        self.machine = elf.machine
        self.byteorder: ByteOrder = elf.byteorder
        self._read_notes(elf)
        self.segments = tuple(_stretches(elf.loads, self.name))
        self.memory = RangeSet(Range.sized(each.paddr, each.size) for each in self.segments)
        self.linear_base = _linear_base(elf.loads)
        self._paddrs = [each.paddr for each in self.segments]
        self._starts = np.array(self._paddrs, np.int64)
        self._ends = np.array([each.end for each in self.segments], np.int64)
        # file offset minus physical address, so that one addition translates; what is not in the file is marked apart
        self._stored = np.array([each.file_offset is not None for each in self.segments], np.bool_)
        self._shifts = np.array([(each.file_offset or 0) - each.paddr for each in self.segments], np.int64)

    def _elf(self, file_size: int) -> ElfFile:
        for limit in _HEAD_SIZES:
            head = self._pread(0, min(limit, file_size))
            try:
                return ElfFile.from_bytes(head, self.name, file_size=file_size)
            except FormatError:
                if limit == _HEAD_SIZES[-1] or limit >= file_size:
                    raise
        raise AssertionError("the last limit returns or raises")

    def _read_notes(self, elf: ElfFile) -> None:
        parts: list[bytes] = []
        info: VmcoreInfo | None = None
        size = 0
        for each in elf.segments:
            if each.type != PT_NOTE:
                continue
            size += each.file_size
            if size > NOTES_LIMIT:
                raise FormatError(f"{size:#x} bytes of notes are no dump's", source=self.name, offset=each.file_offset)
            data = self._pread(each.file_offset, each.file_size)
            # what is left of its buffer is zeros, at which a reader of all notes together would stop
            whole = notes_size(data, elf.byteorder, self.name)
            parts.append(data[:whole].ljust(align_up(whole, 4), b"\0"))
            for note in iter_notes(data, elf.byteorder, self.name):
                if note.name == _VMCOREINFO and info is None:
                    info = VmcoreInfo.from_bytes(note.desc, self.name)
        if info is None:
            raise FormatError("no VMCOREINFO among the notes", source=self.name, hint="not a kernel's dump, or a damaged one")
        if info.page_size not in PAGE_SIZES[elf.machine]:
            raise FormatError(f"VMCOREINFO says PAGESIZE={info.page_size}, which this machine cannot have", source=self.name)
        self.notes = b"".join(parts)
        self.vmcoreinfo = info
        self._page_size = info.page_size

    @property
    def page_size(self) -> int:
        """K1's page size in bytes."""
        return self._page_size

    def fileno(self) -> int:
        """Return the open file's descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Close the file; nothing can be read afterwards."""
        self._unmap()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> ElfVmcore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def read(self, paddr: int, size: int) -> bytes:
        """Return `size` bytes of physical memory.

        :raise MissingMemory: a byte of them is not in the dump.
        :raise EnvironmentFault: the file cannot be read there.
        """
        if size <= 0:
            return b""
        if paddr < 0 or not self.memory.covers(Range.sized(paddr, size)):
            raise MissingMemory(paddr, size, source=self.name)
        data = bytearray(size)
        self._read_pieces(paddr, memoryview(data))
        return bytes(data)

    def read_into(self, paddr: int, into: NDArray[np.uint8]) -> None:
        """Fill `into` (flat, contiguous) with the physical memory from `paddr` on.

        :raise MissingMemory: a byte of it is not in the dump.
        :raise EnvironmentFault: the file cannot be read there.
        """
        size = len(into)
        index = bisect_right(self._paddrs, paddr) - 1
        if index >= 0:
            each = self.segments[index]
            if each.file_offset is not None and paddr + size <= each.end:
                self._fill(each.file_offset + paddr - each.paddr, into.data)
                return
        if not size:
            return
        if paddr < 0 or not self.memory.covers(Range.sized(paddr, size)):
            raise MissingMemory(paddr, size, source=self.name)
        into[:] = 0
        self._read_pieces(paddr, into.data)

    def read_pages(self, pfns: NDArray[np.int64], into: NDArray[np.uint8]) -> None:
        """Read whole pages, ascending page frame numbers, one after the other into `into` (flat, `page_size` bytes each).

        :raise MissingMemory: one of them is not in the dump; `into` holds the pages before it.
        :raise EnvironmentFault: the file cannot be read there.
        """
        page_size = self._page_size
        if not len(pfns):
            return
        if not self.segments:
            raise MissingMemory(int(pfns[0]) * page_size, page_size, source=self.name)
        paddrs = pfns * page_size
        at = np.searchsorted(self._starts, paddrs, side="right") - 1  # -1 is below all memory: no page of it is whole
        offsets = paddrs + self._shifts[at]
        whole = (at >= 0) & (paddrs + page_size <= self._ends[at]) & self._stored[at]
        breaks = np.flatnonzero((np.diff(offsets) != page_size) | ~whole[1:] | ~whole[:-1]) + 1
        firsts = [0, *breaks.tolist()]
        view = into.data
        for first, last in zip(firsts, [*firsts[1:], len(pfns)], strict=True):
            target = view[first * page_size : last * page_size]
            if whole[first]:
                self._fill(int(offsets[first]), target)
            else:
                target[:] = bytes(len(target))
                if not self._read_pieces(int(paddrs[first]), target):
                    raise MissingMemory(int(paddrs[first]), page_size, source=self.name)

    def _read_pieces(self, paddr: int, target: memoryview) -> bool:
        """Read what there is of [paddr, paddr + len(target)) and leave the rest as it is; whether there was any of it."""
        end = paddr + len(target)
        found = False
        for index in range(max(bisect_right(self._paddrs, paddr) - 1, 0), len(self.segments)):
            each = self.segments[index]
            if each.paddr >= end:
                break
            first, last = max(paddr, each.paddr), min(end, each.end)
            if first < last:
                found = True
                if each.file_offset is not None:
                    self._fill(each.file_offset + first - each.paddr, target[first - paddr : last - paddr])
        return found

    def _fill(self, file_offset: int, target: memoryview) -> None:
        done = 0
        while self._mappable and done < len(target):
            window = self._mapped(file_offset + done)
            if window is None:
                break
            at = file_offset + done - self._window_start
            some = min(len(window) - at, len(target) - done)
            if some <= 0:
                break
            with memoryview(window) as view, view[at : at + some] as piece:
                target[done : done + some] = piece
            done += some
        while done < len(target):
            try:
                count = os.preadv(self._descriptor, [target[done:]], file_offset + done)
            except OSError as error:
                place = f"{self.name} at offset {file_offset + done:#x}"
                raise EnvironmentFault(f"cannot read {place}: {error.strerror}") from None
            if count == 0:
                raise EnvironmentFault(
                    f"{self.name} ends at offset {file_offset + done:#x}: it became shorter while it was read"
                )
            done += count

    def _mapped(self, file_offset: int) -> mmap.mmap | None:
        """Return the mapping of the window that `file_offset` is in, or None when the kernel does not map it."""
        start = file_offset - file_offset % _WINDOW_SIZE
        if self._window is None or start != self._window_start:
            self._unmap()
            size = min(_WINDOW_SIZE, self._file_size - start)
            try:
                self._window = mmap.mmap(self._descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=start)
            except (OSError, ValueError):  # ValueError: behind the end of the file
                self._mappable = False
                return None
            self._window_start = start
        return self._window

    def _unmap(self) -> None:
        if self._window is not None:
            self._window.close()
            self._window = None

    def _pread(self, file_offset: int, size: int) -> bytes:
        data = bytearray(size)
        self._fill(file_offset, memoryview(data))
        return bytes(data)


def _linear_base(loads: Sequence[Segment]) -> int | None:
    """The virtual address of physical address 0, by most of the memory that has virtual addresses; None where none has."""
    sizes: Counter[int] = Counter()
    for each in loads:
        if each.vaddr and each.vaddr != (1 << 64) - 1:
            sizes[(each.vaddr - each.paddr) % (1 << 64)] += each.memory_size
    return max(sizes, key=sizes.__getitem__, default=None)


def _stretches(loads: Sequence[Segment], source: str) -> Iterator[Stretch]:
    """Yield the memory of all `loads` once, ascending, stretches that touch in memory and file made one.

    One sweep over the starts and ends, with the segments that are open in a heap by their place in the file: a forged header
    of tens of thousands of overlapping segments costs no more than n log n.
    """
    for each in loads:
        if each.paddr + each.memory_size > PADDR_LIMIT:
            end = each.paddr + each.memory_size
            raise FormatError(f"a PT_LOAD reaches up to {end:#x}, which is no physical address", source=source)
    # start, end, file offset of start; what memsz has beyond filesz is zeros (gABI chapter 5), where no other has more to say
    pieces: list[tuple[int, int, int | None]] = [(each.paddr, each.paddr + each.file_size, each.file_offset) for each in loads]
    pieces += [(each.paddr + each.file_size, each.paddr + each.memory_size, None) for each in loads]
    edges = sorted({edge for start, end, _ in pieces if start < end for edge in (start, end)})
    waiting = sorted((start, number) for number, (start, end, _) in enumerate(pieces) if start < end)
    waiting.reverse()
    open_pieces: list[int] = []
    last: Stretch | None = None
    for index, start in enumerate(edges[:-1]):
        while waiting and waiting[-1][0] == start:
            heappush(open_pieces, waiting.pop()[1])
        while open_pieces and pieces[open_pieces[0]][1] <= start:
            heappop(open_pieces)
        if not open_pieces:
            continue
        piece_start, _, piece_offset = pieces[open_pieces[0]]
        offset = None if piece_offset is None else piece_offset + start - piece_start
        size = edges[index + 1] - start
        if last is not None and last.end == start and _continues(last, offset):
            last = Stretch(last.paddr, last.file_offset, last.size + size)
            continue
        if last is not None:
            yield last
        last = Stretch(start, offset, size)
    if last is not None:
        yield last


def _continues(last: Stretch, file_offset: int | None) -> bool:
    if last.file_offset is None or file_offset is None:
        return last.file_offset is file_offset
    return last.file_offset + last.size == file_offset
