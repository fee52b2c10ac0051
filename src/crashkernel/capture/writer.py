"""A dump, written to one descriptor: kdump-compressed, as a file or as makedumpfile's flattened stream, or plain ELF.

A descriptor that can be written at any offset (a file, a block device) gets a file; one that cannot (a pipe, a socket) gets the
flattened stream of the same bytes; plain ELF is the same on either. The source is gone over twice: first to count and to
write which pages the dump will have, then for the pages themselves, since their descriptors stand before them.
Memory in use does not grow with the machine.
"""

from __future__ import annotations

import ctypes
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crashkernel.capture.crew import Crew, Pfns
from crashkernel.capture.selection import PageClass, pages_of_each_class
from crashkernel.errors import EnvironmentFault, UsageError
from crashkernel.formats import diskdump, elf, flattened
from crashkernel.formats.elf import ByteOrder
from crashkernel.memory import RangeSet, align_up
from crashkernel.vmcore.identity import Identity

DumpFormat = Literal["kdump", "elf"]
FORMATS: tuple[DumpFormat, ...] = ("kdump", "elf")

_REMEMBERED = 16 << 20  # bytes of kept-page bitmap to keep from the first pass: 512 GiB of 4 KiB pages
_DESCRIPTORS = 8192  # page descriptors that are collected before they are written
_IOV_MAX = 1024  # include/uapi/linux/uio.h, UIO_MAXIOV


class Progress(NamedTuple):
    """How far a dump is: of `total` pages `done` are behind us, first in looking which to keep, then in copying those.

    `written` counts bytes, `classes` the pages of each class that were found so far, `unreadable` those that the source would
    not give. Nothing will be written any more to the bytes [start, end) of the dump that `settled` names: its head is none of
    them while page descriptors are missing there.
    """

    copying: bool
    done: int
    total: int
    written: int
    classes: Mapping[PageClass, int]
    settled: tuple[int, int] = (0, 0)
    unreadable: int = 0


Listener = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Written:
    """What was written. `size` is the dump's in bytes (of a stream: of what went through the descriptor)."""

    size: int
    classes: Mapping[PageClass, int]  # pages of each class; those of KEPT are in the dump
    zero: int  # kept pages that are all zeros and share one place in the dump
    unreadable: tuple[int, ...]  # page frames that the source would not give; zeros stand for them
    stream: bool


@dataclass(slots=True)
class _Tally:
    classes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    zero: int = 0
    unreadable: list[int] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return int(self.classes[PageClass.KEPT])

    def by_class(self) -> dict[PageClass, int]:
        return {each: int(self.classes[each]) for each in PageClass if each is not PageClass.ABSENT}


def write_dump(
    identity: Identity,
    crew: Crew,
    descriptor: int,
    form: DumpFormat = "kdump",
    tell: Listener = lambda _: None,
) -> Written:
    """Write the pages that `crew`'s selection keeps, and what a reader needs to find them, to `descriptor`.

    For plain ELF the crew stores pages as they are, zeros too. The descriptor is left open, and nothing is flushed.

    :raise OSError: the descriptor does not take it (full, gone, closed at the other end).
    :raise WorkerFailed: a page could be neither read nor compressed.
    """
    seekable = stat.S_ISREG(mode := os.fstat(descriptor).st_mode) or stat.S_ISBLK(mode)
    output: _Output
    if form == "elf":
        output = _Sequential(descriptor)
        tally = _write_elf(identity, crew, output, tell)
    else:
        output = _Seekable(descriptor) if seekable else _Flattened(descriptor)
        tally = _write_kdump(identity, crew, output, tell)
    output.finish()
    return Written(output.size, tally.by_class(), tally.zero, tuple(tally.unreadable), not seekable)


# -------------------------------------------------------------------------------------------------------------- outputs

_libc = ctypes.CDLL(None, use_errno=True)
_libc.pwritev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_libc.pwritev.restype = ctypes.c_ssize_t
_libc.writev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.writev.restype = ctypes.c_ssize_t

_Vector = NDArray[np.uint64]
"""Rows of (address, size): a struct iovec each."""


def _vector(*parts: tuple[NDArray[np.uint64], NDArray[np.uint64]]) -> _Vector:
    return np.concatenate([np.stack(part, axis=1) for part in parts])


def _of_bytes(data: bytes) -> _Vector:
    address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
    return np.array([[address, len(data)]], np.uint64)


def _write_all(descriptor: int, vector: _Vector, offset: int | None) -> None:
    """Write the pieces of memory that `vector` names, at an offset or where the descriptor stands; all of them."""
    vector = np.ascontiguousarray(vector[vector[:, 1] > 0])
    while len(vector):
        some = vector[:_IOV_MAX]
        if offset is None:
            count = _libc.writev(descriptor, some.ctypes.data, len(some))
        else:
            count = _libc.pwritev(descriptor, some.ctypes.data, len(some), offset)
        if count < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        if offset is not None:
            offset += count
        ends = np.cumsum(some[:, 1], dtype=np.int64)
        done = int(np.searchsorted(ends, count, side="right"))
        if done < len(some) or len(vector) > len(some):
            vector = vector[done:].copy()
            if done < len(some):  # cut off inside a piece
                inside = count - (int(ends[done - 1]) if done else 0)
                vector[0] += np.array([inside, -inside]).astype(np.uint64)
        else:
            return


class _Output:
    """Where a dump's bytes go. `size` is how many went, or where the file ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = 0

    def put(self, offset: int, data: bytes) -> None:
        """Bytes at an offset of the dump."""
        self.put_vector(offset, _of_bytes(data), len(data))

    def put_vector(self, offset: int, vector: _Vector, size: int) -> None:
        """The pieces of memory that `vector` names, `size` bytes together, at an offset of the dump."""
        raise NotImplementedError

    def finish(self) -> None:
        """After the last byte."""


class _Seekable(_Output):
    def put_vector(self, offset: int, vector: _Vector, size: int) -> None:
        _write_all(self._descriptor, vector, offset)
        self.size = max(self.size, offset + size)


class _Flattened(_Output):
    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._send(_of_bytes(flattened.HEADER), len(flattened.HEADER))

    def put_vector(self, offset: int, vector: _Vector, size: int) -> None:
        head = flattened.record_header(offset, size)
        self._send(np.concatenate([_of_bytes(head), vector]), len(head) + size)

    def finish(self) -> None:
        self._send(_of_bytes(flattened.END), len(flattened.END))

    def _send(self, vector: _Vector, size: int) -> None:
        _write_all(self._descriptor, vector, None)
        self.size += size


class _Sequential(_Output):
    """Bytes in the order they come, which is their order in the dump."""

    def put_vector(self, offset: int, vector: _Vector, size: int) -> None:
        assert offset == self.size
        _write_all(self._descriptor, vector, None)
        self.size += size


# --------------------------------------------------------------------------------------------- which pages, and batches


class SourceChanged(EnvironmentFault):
    """The dead kernel's page structs were not the same when they were read again: what was written is of no use."""


class _Kept:
    """The page frames that a crew's selection keeps: remembered from the survey if that is cheap, else surveyed again."""

    def __init__(self, crew: Crew, tally: _Tally) -> None:
        self._crew = crew
        self._tally = tally
        self._bits: list[bytes] | None = []
        self._check = 0  # of all bits that were counted

    def first_pass(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Numbers of blocks, bits of the page frames that are there, and of those that are kept; counts them on the way.

        Begins anew where the selection changes its mind: of two blocks of one number the later counts.
        """
        while True:
            size = self._check = 0
            self._bits = []
            self._tally.classes[:] = 0
            for number, block in enumerate(self._crew.survey()):
                self._tally.classes += block.classes
                self._check = zlib.crc32(block.kept, self._check)
                size += len(block.kept)
                if size > _REMEMBERED:
                    self._bits = None
                if self._bits is not None:
                    self._bits.append(block.kept)
                yield number, block.present, block.kept
            if not self._crew.selection.conclude(self._tally.classes):
                return
            self._crew.renew()

    def batches(self, capacity: int) -> Iterator[Pfns]:
        """The kept page frames, `capacity` at a time."""
        rest: Pfns = np.empty(0, np.int64)
        for number, kept in enumerate(self._kept()):
            both = np.concatenate([rest, np.flatnonzero(kept) + number * self._crew.block])
            whole = len(both) - len(both) % capacity
            for start in range(0, whole, capacity):
                yield both[start : start + capacity]
            rest = both[whole:]
        if len(rest):
            yield rest

    def _kept(self) -> Iterator[NDArray[np.uint8]]:
        if self._bits is not None:
            for bits in self._bits:
                yield np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
            return
        check = 0
        for number in self._crew.blocks():
            kept = (self._crew.classes_of(number) == PageClass.KEPT).view(np.uint8)
            check = zlib.crc32(np.packbits(kept, bitorder="little").tobytes(), check)
            yield kept
        if check != self._check:
            raise SourceChanged("the page structs of the dead kernel were others when they were read again")


# ----------------------------------------------------------------------------------------------------- kdump-compressed


def _write_kdump(identity: Identity, crew: Crew, output: _Output, tell: Listener) -> _Tally:
    source, selection = crew.source, crew.selection
    layout = diskdump.DumpLayout.plan(
        byteorder=source.byteorder,
        page_size=source.page_size,
        max_pfn=selection.max_pfn,
        utsname=identity.utsname,
        notes=source.notes,
        level=selection.level,
        compression=crew.codec.flag,
        phys_base=identity.phys_base,
        crash_time=identity.crash_time,
    )
    tally = _Tally()
    kept = _Kept(crew, tally)
    output.put(0, layout.headers)
    for number, present, wanted in kept.first_pass():
        at = number * crew.block // 8
        done = min((number + 1) * crew.block, selection.max_pfn)
        # on a disk that held something else the rest of the last block must be zeros too
        size = layout.bitmap_size - at if done == selection.max_pfn else len(wanted)
        for offset, bits in ((layout.bitmap1_offset, present), (layout.bitmap2_offset, wanted)):
            output.put(offset + at, bits[:size].ljust(size, b"\0"))
        tell(Progress(False, done, selection.max_pfn, output.size, tally.by_class()))
    raw_size = source.page_size
    descriptors = _Descriptors(output, layout.descriptors_offset, source.byteorder)
    offset = layout.descriptors_offset + tally.kept * diskdump.DESCRIPTOR_SIZE
    zeros_at = offset
    if crew.drop_zeros:  # one page of zeros, for all that are
        output.put(offset, bytes(raw_size))
        offset += raw_size
    done = 0
    for result in crew.run(kept.batches(crew.capacity)):
        ends = np.cumsum(result.size)
        size = int(ends[-1])
        if size:  # not all of them zeros
            output.put_vector(offset, np.stack([result.address, result.size], axis=1), size)
        zero = result.size == 0
        descriptors.add(
            offset=np.where(zero, zeros_at, offset + ends - result.size),
            size=np.where(zero, raw_size, result.size),
            flags=np.where(zero | (result.size == raw_size), 0, crew.codec.flag),
        )
        offset += size
        done += len(result.pfns)
        tally.zero += int(np.count_nonzero(zero))
        tally.unreadable += result.unreadable
        tell(Progress(True, done, tally.kept, output.size, tally.by_class(), (zeros_at, offset), len(tally.unreadable)))
    descriptors.flush()
    return tally


class _Descriptors:
    """Page descriptors on their way to their place in the dump."""

    def __init__(self, output: _Output, offset: int, byteorder: ByteOrder) -> None:
        self._output, self._offset = output, offset
        self._dtype = np.dtype(diskdump.descriptor_dtype(byteorder))
        self._blocks: list[bytes] = []
        self._count = 0

    def add(self, offset: NDArray[np.uint64], size: NDArray[np.uint64], flags: NDArray[np.uint64]) -> None:
        """The descriptors of the next pages."""
        rows = np.zeros(len(offset), self._dtype)
        rows["offset"], rows["size"], rows["flags"] = offset, size, flags
        self._blocks.append(rows.tobytes())
        self._count += len(rows)
        if self._count >= _DESCRIPTORS:
            self.flush()

    def flush(self) -> None:
        """Write what has been added."""
        data = b"".join(self._blocks)
        if data:
            self._output.put(self._offset, data)
        self._offset += len(data)
        self._blocks.clear()
        self._count = 0


# ------------------------------------------------------------------------------------------------------------ plain ELF

_ELF_GAP = 256  # pages that are dropped in a row before it is worth another program header (as makedumpfile's PFN_EXCLUDED)
_NOT_TO_BE_READ = (PageClass.POISONED, PageClass.OFFLINE, PageClass.DROPPED, PageClass.ABSENT)
_MOST_RUNS = (elf.PN_XNUM - 2) // 2  # less PT_NOTE; readers of cores know no escape for more, and a run may take two


def _write_elf(identity: Identity, crew: Crew, output: _Output, tell: Listener) -> _Tally:
    source = crew.source
    assert not crew.drop_zeros, "a plain ELF file has no one place for all zero pages"
    assert crew.codec.flag == 0, "a plain ELF file is not compressed"
    tally = _Tally()
    while True:
        tally.classes[:] = 0
        runs = _runs(_told(crew, tally, output, tell), crew.block)
        if not crew.selection.conclude(tally.classes):
            break
        crew.renew()
    page_size = source.page_size
    loads = _elf_segments(source.memory, runs, page_size, identity.linear_base)
    head_size = elf.headers_size(1 + len(loads))
    start = align_up(head_size + len(source.notes), page_size)
    note = elf.Segment(elf.PT_NOTE, 0, head_size, 0, 0, len(source.notes), len(source.notes), 0)
    placed = []
    for load in loads:
        placed.append(replace(load, file_offset=start))
        start += load.file_size
    file = elf.ElfFile(source.byteorder, elf.ET_CORE, source.machine, 0, 0, (note, *placed))
    head = file.to_bytes() + source.notes
    output.put(0, head.ljust(align_up(len(head), page_size), b"\0"))
    total = sum(end - first for first, end in runs)
    done = 0
    for result in crew.run(_slices(runs, crew.capacity)):
        size = int(result.size.sum())
        output.put_vector(output.size, np.stack([result.address, result.size], axis=1), size)
        done += len(result.pfns)
        tally.unreadable += result.unreadable
        tell(Progress(True, done, total, output.size, tally.by_class(), (0, output.size), len(tally.unreadable)))
    return tally


def _told(crew: Crew, tally: _Tally, output: _Output, tell: Listener) -> Iterator[NDArray[np.uint8]]:
    """The classes of all page frames, a block at a time, counted on the way."""
    selection = crew.selection
    for number in crew.blocks():
        classes = crew.classes_of(number)
        tally.classes += pages_of_each_class(classes)
        done = min((number + 1) * crew.block, selection.max_pfn)
        tell(Progress(False, done, selection.max_pfn, output.size, tally.by_class()))
        yield classes


def _runs(blocks: Iterable[NDArray[np.uint8]], block: int) -> list[tuple[int, int]]:
    """Half-open runs of page frames to store: the kept ones, and with them dropped ones in small gaps in between.

    A page that must not be read, or is not there, ends a run. Where there are more runs than an ELF file can have
    segments for, larger gaps are small.

    :raise UsageError: no size of gaps makes them few enough.
    """
    runs: list[tuple[int, int]] = []
    walls: list[int] = []  # of each run: the last page frame below it that no run may hold
    gap = _ELF_GAP
    wall = -1
    for number, classes in enumerate(blocks):
        start = number * block
        edges = np.flatnonzero(np.diff(classes == PageClass.KEPT, prepend=False, append=False)) + start
        forbidden = np.flatnonzero(np.isin(classes, _NOT_TO_BE_READ)) + start
        below = np.searchsorted(forbidden, edges[::2])
        for first, end, index in zip(edges[::2].tolist(), edges[1::2].tolist(), below.tolist(), strict=True):
            last_wall = int(forbidden[index - 1]) if index else wall
            if runs and first - runs[-1][1] < gap and last_wall < runs[-1][0]:
                runs[-1] = (runs[-1][0], end)
                continue
            runs.append((first, end))
            walls.append(last_wall)
            if len(runs) > _MOST_RUNS:
                while len(runs) > _MOST_RUNS // 2 and gap < end:
                    gap *= 2
                    runs, walls = _merged(runs, walls, gap)
                if len(runs) > _MOST_RUNS:
                    raise UsageError("memory is in more pieces than an ELF file can have segments", hint="use --format kdump")
        if len(forbidden):
            wall = int(forbidden[-1])
    return runs


def _merged(runs: list[tuple[int, int]], walls: list[int], gap: int) -> tuple[list[tuple[int, int]], list[int]]:
    """The same with larger gaps bridged."""
    fewer, theirs = [runs[0]], [walls[0]]
    for run, wall in zip(runs[1:], walls[1:], strict=True):
        if run[0] - fewer[-1][1] < gap and wall < fewer[-1][0]:
            fewer[-1] = (fewer[-1][0], run[1])
        else:
            fewer.append(run)
            theirs.append(wall)
    return fewer, theirs


def _elf_segments(
    memory: RangeSet, runs: Sequence[tuple[int, int]], page_size: int, linear_base: int | None
) -> list[elf.Segment]:
    """PT_LOADs for all of memory: what a run stores is in the file, what follows it up to the next is only in `memory_size`."""
    segments = []
    stored = iter([*((first * page_size, end * page_size) for first, end in runs), (1 << 64, 1 << 64)])
    first, end = next(stored)
    for each in RangeSet(part.align_outward(page_size) for part in memory):
        at = each.start
        while at < each.end:
            if first > at:  # dropped up to the next run
                begin, size, stop = at, 0, min(first, each.end)
            else:
                begin, size = at, min(end, each.end) - at
                if end <= each.end:
                    first, end = next(stored)
                else:
                    first = each.end
                stop = min(max(first, begin + size), each.end)
            vaddr = 0 if linear_base is None else (linear_base + begin) % (1 << 64)
            flags = elf.PF_R | elf.PF_W | elf.PF_X
            segments.append(elf.Segment(elf.PT_LOAD, flags, 0, vaddr, begin, size, stop - begin, 0))
            at = stop
    return segments


def _slices(runs: Iterable[tuple[int, int]], capacity: int) -> Iterator[Pfns]:
    """Page frames of all runs, `capacity` at a time at the most."""
    for first, end in runs:
        for start in range(first, end, capacity):
            yield np.arange(start, min(start + capacity, end), dtype=np.int64)
