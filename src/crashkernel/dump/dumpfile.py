"""Dumps read back: kdump-compressed ones, also as a flattened stream that was put into a file, as a `Source` of memory.

References: `formats.diskdump` and `formats.flattened`; crash `diskdump.c` (read_dump_header, cache_page), libkdumpfile
`src/kdumpfile/diskdump.c`.

A dump may have more pages than fit in memory, and so may its bitmaps. Of bitmap 2 only a directory is kept: how many pages are
dumped before each block of some thousand. From that and one block of the bitmap follows the number of a page's descriptor.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from crashkernel.capture.codec import Codec, codec_for_flag
from crashkernel.capture.selection import MAX_DUMP_LEVEL, Chunk, Findings, PageClass, Selection
from crashkernel.dump.bitmap import PIECE, Bitmap, Directory, Pfns, runs
from crashkernel.dump.dumpbytes import DumpBytes, FlattenedFile, PlainFile
from crashkernel.errors import EnvironmentFault, FormatError, UsageError
from crashkernel.formats import diskdump, flattened
from crashkernel.formats.diskdump import MainHeader, SubHeader
from crashkernel.formats.elf import EM_PPC64, PT_LOAD, PT_NOTE, ByteOrder, ElfFile, Segment, iter_notes
from crashkernel.formats.vmcoreinfo import VmcoreInfo
from crashkernel.memory import Range, RangeSet, format_size
from crashkernel.vmcore.identity import MACHINES
from crashkernel.vmcore.kernel import PPC64_LINEAR
from crashkernel.vmcore.source import NOTES_LIMIT, PADDR_LIMIT, PAGE_SIZES, ElfVmcore, MissingMemory

_MACHINES = {name: machine for (machine, _), name in MACHINES.items()}  # by what `uname -m` calls them
_E_FLAGS = 48  # offset of e_flags in Elf64_Ehdr
_ELF_INCOMPLETE = 1  # DUMP_ELF_INCOMPLETE, makedumpfile.h
_HEAD_LIMIT = 1 << 22  # bytes: 65535 program headers are 3.5 MiB
_BATCH_BYTES = 1 << 20  # of pages that are read at once
_DATA_GAP = 1 << 16  # bytes between two pages' data that are read, and dropped, rather than asked for apart
_DESCRIPTOR_GAP = 512
_CACHED_BYTES = 1 << 22  # of pages read one by one
# A vmcore has at most 65535 segments; bitmap 1 says the same as they do.
_MAX_STRETCHES = 1 << 17
_DESCRIPTORS_AT_ONCE = 1 << 16


class DamagedPage(MissingMemory):
    """A page that is in the dump by its bitmap, but that cannot be had from it; the message has the reason."""

    def __init__(self, pfn: int, page_size: int, reason: str, *, source: str = "") -> None:
        super().__init__(pfn * page_size, page_size, source=source)
        FormatError.__init__(self, f"page frame {pfn:#x}: {reason}", source=source)
        self.pfn = pfn
        self.reason = reason


@dataclass(frozen=True, slots=True)
class PageStatistics:
    """A dump's pages by its bitmaps and descriptors.

    `codecs` has how many are stored by which codec, the zero ones not among them; `missing` are those that are in the dump by
    its bitmap alone: it is incomplete or cut off.
    """

    memory: int  # pages that the dead kernel had
    kept: int  # of them, those in the dump
    zero: int  # of these, those that share the one page of zeros
    missing: int
    codecs: dict[str, int]
    data_end: int  # where the last page's data end, in bytes

    @property
    def dropped(self) -> int:
        """Pages that the dead kernel had and that are not in the dump."""
        return self.memory - self.kept


class KdumpFile:
    """A kdump-compressed dump as a `Source`. `kept` is the `Selection` of what is in it, by which it can be written anew.

    `memory` is all memory that the dead kernel had (bitmap 1), also what was dropped: reading that raises `MissingMemory`, and
    so does a page whose data are cut off or cannot be decompressed (`DamagedPage`). Many processes can share one object after a
    fork.

    :raise FormatError: it is no dump of ppc64 or x86_64, its headers make no sense, or it ends before its descriptors.
    :raise EnvironmentFault: it cannot be read.
    """

    def __init__(self, data: DumpBytes | Path | str) -> None:
        self.data: DumpBytes = PlainFile(data) if isinstance(data, Path | str) else data
        self.name = self.data.name
        try:
            self._read_headers()
        except BaseException:
            self.close()
            raise

    def _read_headers(self) -> None:
        name = self.name
        self.header = header = MainHeader.from_bytes(self.data.read(0, diskdump.MAIN_SIZE), name)
        self.sub_header = SubHeader.from_bytes(self.data.read(header.block_size, diskdump.SUB_SIZE), header, name)
        self.byteorder: ByteOrder = header.byteorder
        self._page_size = header.block_size
        self.max_pfn = self.sub_header.max_pfn
        machine = _MACHINES.get(header.utsname.machine)
        if machine is None:
            message = f"a dump of machine {header.utsname.machine!r}, not of {', '.join(_MACHINES)}"
            raise FormatError(message, source=name, offset=12)
        if header.block_size not in PAGE_SIZES[machine]:
            message = f"blocks of {header.block_size} bytes, which no page of this machine has"
            raise FormatError(message, source=name, offset=428)
        self.machine = machine
        self.linear_base = PPC64_LINEAR if machine == EM_PPC64 else None
        self._check_places()
        self._read_notes()
        self.present = Bitmap(self.data, header.bitmap1_offset, self.max_pfn)
        self.dumped = Bitmap(self.data, header.bitmap2_offset, self.max_pfn)
        self.memory = self._memory()
        self._directory = Directory(self.dumped)
        self._descriptor_dtype = np.dtype(diskdump.descriptor_dtype(self.byteorder))
        self._codecs: dict[int, Codec] = {}
        self._cache: OrderedDict[int, bytes] = OrderedDict()

    def _check_places(self) -> None:
        """Whether what the headers name is where it can be, and no larger than the file."""
        header, sub, name = self.header, self.sub_header, self.name
        if sub.split:
            raise FormatError(
                f"one part of a dump that makedumpfile split, pages {sub.start_pfn:#x} to {sub.end_pfn:#x}",
                source=name,
                hint="put the parts together first: makedumpfile --reassemble",
            )
        if self.max_pfn * self._page_size > PADDR_LIMIT:
            raise FormatError(f"memory up to page frame {self.max_pfn:#x} has no physical address", source=name)
        if header.bitmap_size * 8 < self.max_pfn:
            message = f"bitmaps of {header.bitmap_size:#x} bytes for {self.max_pfn:#x} page frames"
            raise FormatError(message, source=name, hint="a damaged header")
        if header.descriptors_offset > self.data.size or 2 * -(-self.max_pfn // 8) > self.data.stored:
            raise FormatError(
                f"cut off: its page descriptors begin at {header.descriptors_offset:#x}", source=name, offset=self.data.size
            )
        start, end = sub.notes.file_offset, sub.notes.file_offset + sub.notes.size
        if sub.notes.size and not header.block_size < start < end <= header.bitmap1_offset:
            message = f"its notes, {sub.notes.size:#x} bytes at {start:#x}, are not between sub header and bitmaps"
            raise FormatError(message, source=name, offset=header.block_size)
        if sub.notes.size > NOTES_LIMIT:
            raise FormatError(f"{sub.notes.size:#x} bytes of notes are no dump's", source=name, offset=start)
        if sub.vmcoreinfo.size > NOTES_LIMIT:
            raise FormatError(f"{sub.vmcoreinfo.size:#x} bytes of VMCOREINFO are no dump's", source=name)

    def _read_notes(self) -> None:
        where, text = self.sub_header.notes, self.sub_header.vmcoreinfo
        self.notes = self.data.read(where.file_offset, where.size) if where.size else b""
        found = [each.desc for each in iter_notes(self.notes, self.byteorder, self.name) if each.name == "VMCOREINFO"]
        if not found and text.size:
            found = [self.data.read(text.file_offset, text.size)]
        if not found:
            raise FormatError("no VMCOREINFO among the notes", source=self.name, hint="not a kernel's dump, or a damaged one")
        self.vmcoreinfo = VmcoreInfo.from_bytes(found[0], self.name)
        if self.vmcoreinfo.page_size != self._page_size:
            message = f"VMCOREINFO says PAGESIZE={self.vmcoreinfo.page_size}, the header {self._page_size}"
            raise FormatError(message, source=self.name)

    def _memory(self) -> RangeSet:
        ranges: list[Range] = []
        for first, last in self.present.stretches():
            start, end = first * self._page_size, last * self._page_size
            if ranges and ranges[-1].end == start:
                ranges[-1] = Range(ranges[-1].start, end)
                continue
            if len(ranges) >= _MAX_STRETCHES:
                raise FormatError(
                    f"bitmap 1 has more than {_MAX_STRETCHES:,} pieces of memory, as no machine", source=self.name
                )
            ranges.append(Range(start, end))
        return RangeSet(ranges)

    @property
    def page_size(self) -> int:
        """The dead kernel's page size in bytes."""
        return self._page_size

    @property
    def pages(self) -> int:
        """How many pages are in the dump by its bitmap."""
        return self._directory.total

    @property
    def level(self) -> int:
        """The dump level that was applied when it was written."""
        return self.sub_header.level

    @property
    def incomplete(self) -> bool:
        """Whether its writer said that it did not come to its end."""
        return bool(self.header.status & diskdump.INCOMPLETE)

    @property
    def kept(self) -> Selection:
        """What is in the dump."""
        return KeptPages(self)

    def close(self) -> None:
        """Close the file; nothing can be read afterwards."""
        self.data.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # -- memory

    def read(self, paddr: int, size: int) -> bytes:
        """Return `size` bytes of physical memory.

        :raise MissingMemory: a byte of them is not in the dump.
        :raise EnvironmentFault: the file cannot be read there, or a codec is not installed.
        """
        if size <= 0:
            return b""
        pfn, within = divmod(paddr, self._page_size)
        if paddr >= 0 and within + size <= self._page_size:
            return self._page(pfn)[within : within + size]
        data = np.empty(size, np.uint8)
        self.read_into(paddr, data)
        return data.tobytes()

    def read_into(self, paddr: int, into: NDArray[np.uint8]) -> None:
        """Fill `into` (flat, contiguous) with the physical memory from `paddr` on.

        :raise MissingMemory: a byte of it is not in the dump.
        :raise EnvironmentFault: the file cannot be read there, or a codec is not installed.
        """
        size, page_size = len(into), self._page_size
        if not size:
            return
        if paddr < 0 or paddr + size > self.max_pfn * page_size:
            raise MissingMemory(paddr, size, source=self.name)
        first, last = -(-paddr // page_size), (paddr + size) // page_size
        if first > last:
            within = paddr % page_size
            into[:] = np.frombuffer(self._page(paddr // page_size), np.uint8)[within : within + size]
            return
        head = first * page_size - paddr
        if head:
            into[:head] = np.frombuffer(self._page(first - 1), np.uint8)[page_size - head :]
        body = head + (last - first) * page_size
        self.read_pages(np.arange(first, last, dtype=np.int64), into[head:body])
        if body < size:
            into[body:] = np.frombuffer(self._page(last), np.uint8)[: size - body]

    def read_pages(self, pfns: NDArray[np.int64], into: NDArray[np.uint8]) -> None:
        """Read whole pages, ascending page frame numbers, one after the other into `into` (flat, `page_size` bytes each).

        :raise MissingMemory: one of them is not in the dump; what `into` holds then is not defined.
        :raise EnvironmentFault: the file cannot be read there, or a codec is not installed.
        """
        step = max(1, _BATCH_BYTES // self._page_size)
        for start in range(0, len(pfns), step):
            some = pfns[start : start + step]
            view = into[start * self._page_size : (start + len(some)) * self._page_size].data
            for index, page in self._pages(some, self.descriptors(some)):
                view[index * self._page_size : (index + 1) * self._page_size] = page

    def _page(self, pfn: int) -> bytes:
        """One page: those that were asked for last are remembered."""
        page = self._cache.get(pfn)
        if page is None:
            pfns = np.array([pfn], np.int64)
            page = next(page for _, page in self._pages(pfns, self.descriptors(pfns)))
            self._cache[pfn] = page
            if len(self._cache) * self._page_size > _CACHED_BYTES:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(pfn)
        return page

    def descriptors(self, pfns: Pfns) -> NDArray[np.void]:
        """Return the descriptors of pages, ascending, as `formats.diskdump.descriptor_dtype` has them.

        :raise MissingMemory: one of them is not in the dump; of one that is cut off all fields are 0.
        """
        numbers, missing = self._directory.numbers(pfns)
        if missing is not None:
            raise MissingMemory(missing * self._page_size, self._page_size, source=self.name)
        rows = np.zeros(len(pfns), self._descriptor_dtype)
        for first, last in runs(np.flatnonzero(np.diff(numbers) > _DESCRIPTOR_GAP) + 1, len(pfns)):
            base = int(numbers[first])
            found = self.descriptor_rows(base, int(numbers[last - 1]) + 1 - base)
            there = numbers[first:last] - base
            there = there[there < len(found)]
            rows[first : first + len(there)] = found[there]
        return rows

    def descriptor_rows(self, number: int, count: int) -> NDArray[np.void]:
        """Return `count` descriptors from the one with this number on, or those that there are before the end of the file."""
        size = diskdump.DESCRIPTOR_SIZE
        raw = self.data.read(self.header.descriptors_offset + number * size, count * size)
        return np.frombuffer(raw[: len(raw) - len(raw) % size], self._descriptor_dtype)

    def _pages(self, pfns: Pfns, rows: NDArray[np.void]) -> Iterator[tuple[int, bytes]]:
        """Yield the place among `pfns`, and the bytes, of each page, in the order in which they lie in the file.

        :raise DamagedPage: one cannot be had.
        """
        for index, result in self.try_pages(pfns, rows):
            if isinstance(result, DamagedPage):
                raise result
            yield index, result

    def try_pages(self, pfns: Pfns, rows: NDArray[np.void]) -> Iterator[tuple[int, bytes | DamagedPage]]:
        """Yield for each page its place among `pfns`, and its bytes or why there are none.

        :raise EnvironmentFault: the file cannot be read there, or a codec is not installed.
        """
        offsets, sizes = rows["offset"].astype(np.uint64), rows["size"].astype(np.uint64)
        good = (sizes > 0) & (sizes <= self._page_size) & (offsets > 0) & (offsets < self.data.size)
        good[good] = offsets[good] + sizes[good] <= self.data.size
        for index in np.flatnonzero(~good).tolist():
            row = rows[index]
            yield index, self._damaged(int(pfns[index]), self._why(int(row["offset"]), int(row["size"])))
        order = np.flatnonzero(good)
        order = order[np.argsort(offsets[order], kind="stable")]
        starts, ends = offsets[order].astype(np.int64), (offsets[order] + sizes[order]).astype(np.int64)
        flags = rows["flags"]
        breaks = np.flatnonzero(starts[1:] > np.maximum.accumulate(ends)[:-1] + _DATA_GAP) + 1
        for first, last in runs(breaks, len(order)):
            base = int(starts[first])
            raw = self.data.read(base, int(ends[first:last].max()) - base)
            for index, start, end in zip(
                order[first:last].tolist(),
                (starts[first:last] - base).tolist(),
                (ends[first:last] - base).tolist(),
                strict=True,
            ):
                yield index, self._decompress(int(pfns[index]), raw[start:end], int(flags[index]))

    def _decompress(self, pfn: int, data: bytes, flags: int) -> bytes | DamagedPage:
        try:
            codec = self._codecs.get(flags)
            if codec is None:
                codec = self._codecs[flags] = codec_for_flag(flags)
            page = codec.decompress(data, self._page_size)
        except FormatError as error:
            return self._damaged(pfn, error.message)
        if len(page) != self._page_size:
            return self._damaged(pfn, f"{codec.name}: {len(page)} bytes came of it, not {self._page_size}")
        return page

    def _damaged(self, pfn: int, reason: str) -> DamagedPage:
        return DamagedPage(pfn, self._page_size, reason, source=self.name)

    def _why(self, file_offset: int, size: int) -> str:
        if not file_offset and not size:
            return "it was never written"
        if not 0 < size <= self._page_size:
            return f"its descriptor says that it is stored in {size:#x} bytes"
        return f"its data, {size:#x} bytes at {file_offset:#x}, are not in the file, which ends at {self.data.size:#x}"

    # -- all of it

    def batches(self, capacity: int) -> Iterator[tuple[Pfns, NDArray[np.void]]]:
        """Yield all pages in the dump, `capacity` at a time at the most, and their descriptors.

        Of pages whose descriptors are cut off all fields are 0.
        """
        number = 0
        for pfn, data in self.dumped.pieces():
            pfns = np.flatnonzero(np.unpackbits(data, bitorder="little")) + pfn if data.any() else np.empty(0, np.int64)
            for start in range(0, len(pfns), capacity):
                some = pfns[start : start + capacity]
                rows = np.zeros(len(some), self._descriptor_dtype)
                found = self.descriptor_rows(number, len(some))
                rows[: len(found)] = found
                number += len(some)
                yield some, rows

    def statistics(self, tell: Callable[[int], None] = lambda _: None) -> PageStatistics:
        """Count the dump's pages; reads all descriptors, and no page but the one that all zero ones share.

        `tell` is called with the number of pages gone over.
        """
        shared = self.shared_zeros()
        zero = missing = end = done = 0
        flags: Counter[int] = Counter()
        for pfns, rows in self.batches(_DESCRIPTORS_AT_ONCE):
            offsets, sizes = rows["offset"].astype(np.uint64), rows["size"].astype(np.uint64)
            ends = offsets + sizes
            there = (offsets > 0) & (ends >= offsets) & (ends <= self.data.size)
            missing += len(rows) - int(there.sum())
            zeros = there & (offsets == shared) if shared is not None else np.zeros(len(rows), np.bool_)
            zero += int(zeros.sum())
            values, counts = np.unique(rows["flags"][there & ~zeros], return_counts=True)
            flags.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            written = offsets > 0
            end = max(end, int(ends[written].max()) if written.any() else 0)
            done += len(pfns)
            tell(done)
        return PageStatistics(
            self.present.count(), self.pages, zero, missing, {_codec_name(each): flags[each] for each in flags}, end
        )

    def shared_zeros(self) -> int | None:
        """Where the page of zeros is that all zero pages share, if there is one: makedumpfile and we write it first."""
        place = self.header.descriptors_offset + self.pages * diskdump.DESCRIPTOR_SIZE
        return place if self.data.read(place, self._page_size) == bytes(self._page_size) else None


def _codec_name(flags: int) -> str:
    try:
        return codec_for_flag(flags).name
    except FormatError:
        return f"unknown ({flags:#x})"


class KeptPages:
    """A dump's pages as a `Selection`: those that are in it, and those that its writer dropped.

    Of which class a dropped page was is not in a dump.
    """

    def __init__(self, dump: KdumpFile) -> None:
        self._dump = dump
        self.page_size = dump.page_size
        self.max_pfn = dump.max_pfn
        self.level = dump.level
        self.findings = Findings()

    def chunks_of(self, first: int, last: int) -> Iterator[Chunk]:
        """Yield the classes of the page frames [first, last)."""
        step = 8 * PIECE
        for start in range(first - first % step, last, step):
            memory, kept = (bitmap.raw(start, step) for bitmap in (self._dump.present, self._dump.dumped))
            if not (memory.any() or kept.any()):
                continue
            classes = np.full(8 * len(memory), PageClass.ABSENT, np.uint8)
            classes[np.unpackbits(memory, bitorder="little") != 0] = PageClass.DROPPED
            classes[np.unpackbits(kept, bitorder="little") != 0] = PageClass.KEPT
            yield Chunk(max(start, first), classes[max(first - start, 0) : min(last, self.max_pfn) - start])

    def conclude(self, classes: NDArray[np.int64]) -> bool:
        """A dump has what it has."""
        return False


class StoredPages:
    """The pages that an ELF vmcore has in its file, as a `Selection`; zeros that are not in it count as dropped.

    An ELF file does not say which dump level was applied; its manifest does. Without one it is 0 if all memory is there, else
    any class may have been dropped.
    """

    def __init__(self, vmcore: ElfVmcore, level: int | None = None) -> None:
        self.page_size = vmcore.page_size
        self.max_pfn = max((-(-each.end // self.page_size) for each in vmcore.segments), default=0)
        everything = all(each.file_offset is not None for each in vmcore.segments)
        self.level = level if level is not None else 0 if everything else MAX_DUMP_LEVEL
        self.findings = Findings()
        # first page frame, last one, and where it is in the file; both ascend, as segments do not overlap
        self._spans = [
            (each.paddr // self.page_size, -(-each.end // self.page_size), each.file_offset) for each in vmcore.segments
        ]
        self._starts = [start for start, _, _ in self._spans]
        self._ends = [end for _, end, _ in self._spans]

    def chunks_of(self, first: int, last: int) -> Iterator[Chunk]:
        """Yield the classes of the page frames [first, last)."""
        step = 8 * PIECE
        position, index = first, bisect_right(self._ends, first)
        while index < len(self._spans) and position < last:
            start = max(position, self._spans[index][0])
            end = min(start + step, last)
            if start >= end:
                return
            classes = np.full(end - start, PageClass.ABSENT, np.uint8)
            # first what is not in the file, so that a page which is in parts is kept
            inside = self._spans[index : bisect_left(self._starts, end)]
            for low, high, offset in sorted(inside, key=lambda each: each[2] is not None):
                value = PageClass.DROPPED if offset is None else PageClass.KEPT
                classes[max(low - start, 0) : max(high - start, 0)] = value
            yield Chunk(start, classes)
            position = end
            index = bisect_right(self._ends, position)

    def conclude(self, classes: NDArray[np.int64]) -> bool:
        """A dump has what it has."""
        return False


# ------------------------------------------------------------------------------------------------------------- opening


class ElfWithin(ElfVmcore):
    """An ELF vmcore that is no file of its own, or not a whole one: all reading goes through what knows where its bytes are.

    What is cut off is no memory of it; `lost` says how many bytes that are.
    """

    def __init__(self, data: DumpBytes) -> None:
        self.data = data
        self._cut: list[Range] = []
        super().__init__(data.name)
        self.lost = (RangeSet(self._cut) - self.memory).total

    def _elf(self, _file_size: int) -> ElfFile:
        elf = ElfFile.from_bytes(self.data.read(0, _HEAD_LIMIT), self.name, file_size=1 << 63)
        return replace(elf, segments=tuple(self._what_is_there(each) for each in elf.segments))

    def _what_is_there(self, segment: Segment) -> Segment:
        """A segment up to the end of the bytes."""
        left = max(self.data.size - segment.file_offset, 0)
        if segment.file_size <= left or segment.type not in (PT_LOAD, PT_NOTE):
            return segment
        if segment.type == PT_NOTE:
            raise FormatError("cut off in its notes", source=self.name, offset=self.data.size)
        self._cut.append(Range.sized(segment.paddr + left, segment.memory_size - left))
        return replace(segment, file_size=left, memory_size=left)

    def _fill(self, file_offset: int, target: memoryview) -> None:
        data = self.data.read(file_offset, len(target))
        if len(data) < len(target):
            raise EnvironmentFault(f"{self.name} ends at offset {file_offset + len(data):#x} of the vmcore in it")
        target[:] = data

    def close(self) -> None:
        """Close the file; nothing can be read afterwards."""
        self.data.close()
        super().close()


Dump = KdumpFile | ElfVmcore
"""What `open_dump` opens."""

_ELF = b"\x7fELF"
_AGE = b"age-encryption"
_DEVICE = b"crashkernel dump"  # target/device.py
_HEAD_SIZE = 16


def require_file(path: Path) -> None:
    """Whether there is a file of that name, or a device.

    :raise UsageError: there is none.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"there is no {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path} is a directory, not a dump")


def open_dump(path: Path | str) -> Dump:
    """Open a dump of any format we know: an ELF vmcore, a kdump-compressed dump, a flattened stream of either.

    All of these may also lie on a block device, behind the head that `crashkernel capture` puts there. They may lack their end,
    as long as the headers are whole: `cut_off` and `KdumpFile.statistics` tell.

    :raise UsageError: there is no such file.
    :raise FormatError: it is none of them, or damaged where it begins.
    :raise EnvironmentFault: it cannot be read.
    """
    require_file(Path(path))
    data = PlainFile(path)
    head = data.read(0, _HEAD_SIZE)
    if head == _DEVICE:
        from crashkernel.target.device import open_device_dump  # noqa: PLC0415 - the targets are many, and rarely needed

        data.close()
        start, size, _ = open_device_dump(Path(path))
        data = PlainFile(path, start, size)
        head = data.read(0, _HEAD_SIZE)
    elif head.startswith(_ELF):
        try:
            vmcore = ElfVmcore(path)
        except FormatError as error:
            return _cut_off_elf(data, error)
        data.close()
        return vmcore
    return _open(data, head)


def _cut_off_elf(data: PlainFile, error: FormatError) -> Dump:
    """The vmcore that `error` says cannot be read, if all that it lacks is its end."""
    try:
        vmcore = ElfWithin(data)
    except FormatError:
        data.close()
        raise error from None
    if not vmcore.lost:
        vmcore.close()
        raise error
    return vmcore


def _open(data: PlainFile, head: bytes) -> Dump:
    if head.startswith(diskdump.SIGNATURE):
        return KdumpFile(data)
    if head.startswith(_ELF):
        return ElfWithin(data)
    if not head.startswith(flattened.SIGNATURE):
        data.close()
        raise FormatError(
            "neither an ELF vmcore nor a kdump-compressed or flattened dump",
            source=data.name,
            offset=0,
            hint="an encrypted dump must be decrypted first: age -d" if head.startswith(_AGE) else "",
        )
    stream = FlattenedFile(data)
    try:
        return ElfWithin(stream) if stream.read(0, len(_ELF)) == _ELF else KdumpFile(stream)
    except BaseException:
        stream.close()
        raise


def stored_pages(dump: Dump, level: int | None = None) -> Selection:
    """What is in the dump, to be written anew; `level` is its dump level, which plain ELF does not say."""
    return dump.kept if isinstance(dump, KdumpFile) else StoredPages(dump, level)


def is_flattened(dump: Dump) -> bool:
    """Whether the file holds the dump as a flattened stream."""
    return isinstance(dump, KdumpFile | ElfWithin) and isinstance(dump.data, FlattenedFile)


def file_size(dump: Dump) -> int:
    """Bytes that the dump takes where it lies."""
    return dump.data.file_size if isinstance(dump, KdumpFile | ElfWithin) else os.lseek(dump.fileno(), 0, os.SEEK_END)


def cut_off(dump: Dump) -> str:
    """How it shows that a dump lacks its end, "" if it does not; a kdump-compressed one may do so only in its descriptors."""
    if isinstance(dump, KdumpFile | ElfWithin) and dump.data.truncated:
        return "the flattened stream is cut off before its end"
    if isinstance(dump, ElfWithin) and dump.lost:
        return f"the file ends before its last {format_size(dump.lost)} of memory"
    return ""


Completeness = Literal["whole", "incomplete", "truncated"]


@dataclass(frozen=True, slots=True)
class Wholeness:
    """How whole a dump is: incomplete if its writer said so; in `reasons` why, in words."""

    completeness: Completeness
    reasons: tuple[str, ...]


def how_whole(dump: Dump, pages: PageStatistics) -> Wholeness:
    """Whether a dump has all that its headers, bitmaps and descriptors promise, given what was counted of these."""
    reasons = list(admitted(dump))
    said = _says_incomplete(dump)
    if isinstance(dump, KdumpFile):
        if pages.data_end > dump.data.size:
            reasons.append(f"the file ends at {dump.data.size:,}; its pages' data go on to {pages.data_end:,}")
        elif pages.missing and not said:
            reasons.append(f"{pages.missing:,} pages are in the dump by its bitmap alone")
    if not reasons:
        return Wholeness("whole", ())
    return Wholeness("incomplete" if said else "truncated", tuple(reasons))


def admitted(dump: Dump) -> tuple[str, ...]:
    """Why a dump is not whole, as far as that shows without a look at its pages' descriptors."""
    said = "its writer ran out of space: it says of itself that it is incomplete" if _says_incomplete(dump) else ""
    return tuple(text for text in (cut_off(dump), said) if text)


def count_pages(dump: Dump, tell: Callable[[int], None] = lambda _: None) -> PageStatistics:
    """Count a dump's pages; `tell` is called with the number of page descriptors gone over."""
    if isinstance(dump, KdumpFile):
        return dump.statistics(tell)
    spans = [(each.paddr // dump.page_size, -(-each.end // dump.page_size), each) for each in dump.segments]
    memory = sum(last - first for first, last, _ in spans)
    kept = sum(last - first for first, last, each in spans if each.file_offset is not None)
    end = max(((each.file_offset or 0) + each.size for each in dump.segments if each.file_offset is not None), default=0)
    missing = dump.lost // dump.page_size if isinstance(dump, ElfWithin) else 0
    return PageStatistics(memory + missing, kept + missing, 0, missing, {"none": kept}, end)


def _says_incomplete(dump: Dump) -> bool:
    """Whether its writer said that it did not come to its end; of an ELF dump that is makedumpfile, in e_flags."""
    if isinstance(dump, KdumpFile):
        return dump.incomplete
    raw = bytearray(4)
    dump._fill(_E_FLAGS, memoryview(raw))
    return bool(int.from_bytes(raw, dump.byteorder) & _ELF_INCOMPLETE)
