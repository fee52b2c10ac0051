"""A machine of hundreds of gigabytes, for the dump filter to be measured on: a real vmcore, grown.

What a filter reads of a machine is its page structs, 64 bytes a page, 4 GiB of them for 256 GiB of memory, and on the way there
the page tables and the memory sections. So the file has the real kernel's, and behind them more of the same kind: the page
structs of some of the real machine's sections over and over, each copy where it would lie, its pointers to compound heads
corrected, with sections and page tables that lead to them. Everything else of the new memory, and of the old what no filter
reads, is a hole in a sparse file, which reads as zeros.

x86_64 with SPARSEMEM_VMEMMAP and four levels of page tables, as Debian's kernel has them. References: Linux
`include/linux/mmzone.h` (struct mem_section), `Documentation/arch/x86/x86_64/mm.rst`, `arch/x86/include/asm/pgtable_types.h`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crashkernel.errors import FormatError
from crashkernel.formats.elf import EM_X86_64, PT_LOAD, PT_NOTE, ElfFile, Segment, iter_notes
from crashkernel.formats.vmcoreinfo import VmcoreInfo
from crashkernel.memory import align_down, align_up

_PAGE = 4096
_KERNEL_MAP = 0xFFFFFFFF80000000  # __START_KERNEL_map: where the kernel's image is mapped
_GIB = 1 << 30
_TEMPLATE = 2 * _GIB  # bytes of the real memory's end whose page structs are repeated, if nobody chooses
SECTION = 128 << 20  # bytes of a memory section on x86_64
_TABLES = 2 << 20  # bytes for new page tables and sections; 256 GiB take some 30 pages

_HEAD_SIZE = 1 << 16  # bytes at the start of the file that hold its headers
_PHDR = struct.Struct("<IIQQQQQQ")

# _PAGE_TABLE and PAGE_KERNEL with their accessed and dirty bits, and _PAGE_PSE for an entry that maps a page itself.
_TABLE_ENTRY = 0x67
_LARGE_PAGE = 0x80000000000001E3
_PRESENT, _PSE = 1, 1 << 7
_ADDRESS = 0x000FFFFFFFFFF000
_SHIFTS = (39, 30, 21)  # of a virtual address: the index into the tables of each level
_EARLY = 1 | 2 | 4 | 8  # SECTION_MARKED_PRESENT, HAS_MEM_MAP, IS_ONLINE, IS_EARLY

_COMPOUND_HEAD = 1  # the lowest bit of page.compound_head marks a tail

Words = npt.NDArray[np.uint64]


class Frames:
    """Pages of physical memory, read through `read(paddr, size)` and changed here; `changed` are their bytes by address."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        self.changed: dict[int, bytearray] = {}

    def word(self, paddr: int) -> int:
        """A word of 8 bytes."""
        page, at = paddr - paddr % _PAGE, paddr % _PAGE
        data = self.changed.get(page) or self._read(page, _PAGE)
        return int.from_bytes(data[at : at + 8], "little")

    def put(self, paddr: int, value: int) -> None:
        """Change a word."""
        page, at = paddr - paddr % _PAGE, paddr % _PAGE
        if page not in self.changed:
            self.changed[page] = bytearray(self._read(page, _PAGE))
        self.changed[page][at : at + 8] = value.to_bytes(8, "little")

    def add(self, paddr: int) -> None:
        """A page of zeros, whatever was there."""
        self.changed[paddr] = bytearray(_PAGE)


class Tables:
    """The kernel's page tables from `root` (physical) on; new tables are taken from `allocate`."""

    def __init__(self, frames: Frames, root: int, allocate: Callable[[], int]) -> None:
        self._frames, self._root, self._allocate = frames, root, allocate

    def visit(self) -> Iterator[int]:
        """The physical address of every table."""
        todo = [(self._root, 0)]
        while todo:
            table, level = todo.pop()
            yield table
            if level == len(_SHIFTS):
                continue
            for at in range(table, table + _PAGE, 8):
                entry = self._frames.word(at)
                if entry & _PRESENT and not (level and entry & _PSE):
                    todo.append((entry & _ADDRESS, level + 1))

    def paddr(self, vaddr: int) -> int:
        """Where a virtual address lies.

        :raise FormatError: it is not mapped.
        """
        table = self._root
        for shift in (*_SHIFTS, 12):
            entry = self._frames.word(table + (vaddr >> shift & 511) * 8)
            if not entry & _PRESENT:
                raise FormatError(f"virtual address {vaddr:#x} is not mapped")
            if shift == 12 or (entry & _PSE and shift != _SHIFTS[0]):
                return (entry & _ADDRESS & -(1 << shift)) | (vaddr & ((1 << shift) - 1))
            table = entry & _ADDRESS
        raise AssertionError("the last level returns")

    def map(self, vaddr: int, paddr: int, shift: int) -> None:
        """Map a page of 1 << `shift` bytes (30 or 21)."""
        table = self._root
        for level in _SHIFTS[: _SHIFTS.index(shift)]:
            at = table + (vaddr >> level & 511) * 8
            entry = self._frames.word(at)
            if not entry & _PRESENT:
                entry = self._allocate() | _TABLE_ENTRY
                self._frames.put(at, entry)
            table = entry & _ADDRESS
        self._frames.put(table + (vaddr >> shift & 511) * 8, paddr | _LARGE_PAGE)


class _Original:
    """The real vmcore: its headers, and its memory by physical address.

    :raise FormatError: it is not one that can be grown: another machine, or its last memory is not the last in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._descriptor = os.dup(file.fileno())
        self.head = os.pread(self._descriptor, _HEAD_SIZE, 0)
        self.elf = ElfFile.from_bytes(self.head, str(path), file_size=path.stat().st_size)
        loads = [each for each in self.elf.segments if each.type == PT_LOAD]
        self.linear = sorted((each for each in loads if each.vaddr < _KERNEL_MAP), key=lambda each: each.paddr)
        self.image = [each for each in loads if each.vaddr >= _KERNEL_MAP]
        if self.elf.machine != EM_X86_64 or not self.linear or self.linear[-1].file_offset < max(s.file_offset for s in loads):
            raise FormatError("not an x86_64 vmcore whose highest memory comes last", source=str(path))
        notes = b"".join(self.bytes_at(s.file_offset, s.file_size) for s in self.elf.segments if s.type == PT_NOTE)
        found = (note.desc for note in iter_notes(notes, self.elf.byteorder, str(path)) if note.name == "VMCOREINFO")
        self.info = VmcoreInfo.from_bytes(next(found, b""), str(path))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def bytes_at(self, offset: int, size: int) -> bytes:
        """Bytes of the file."""
        return os.pread(self._descriptor, size, offset)

    def offset(self, paddr: int) -> int:
        """Where in the file a byte of memory is, or would be beyond the end of the last segment."""
        for each in reversed(self.linear):
            if paddr >= each.paddr:
                if paddr < each.paddr + each.memory_size or each is self.linear[-1]:
                    return each.file_offset + paddr - each.paddr
                break
        raise FormatError(f"no memory at {paddr:#x}", source=str(self.path))

    def read(self, paddr: int, size: int) -> bytes:
        """Bytes of memory, zeros beyond the end."""
        return self.bytes_at(self.offset(paddr), size).ljust(size, b"\0")

    @property
    def end(self) -> int:
        """The end of its memory."""
        return self.linear[-1].paddr + self.linear[-1].memory_size

    @property
    def memory(self) -> int:
        """Bytes of its memory."""
        return sum(each.memory_size for each in self.linear)

    @property
    def page_offset(self) -> int:
        """Where the direct mapping begins."""
        return self.linear[-1].vaddr - self.linear[-1].paddr


@dataclass(frozen=True, slots=True)
class _Sections:
    """The kernel's memory sections: `array` (virtual) of pointers to pages of them, `size` bytes each."""

    array: int
    size: int
    map_offset: int
    pages: int  # page frames of one

    @classmethod
    def from_info(cls, info: VmcoreInfo) -> _Sections:
        """What VMCOREINFO says of them."""
        offset = info.offset("mem_section.section_mem_map")
        return cls(info.symbol("mem_section"), info.size("mem_section"), offset, 1 << (info.number("SECTION_SIZE_BITS") - 12))

    def place(self, number: int) -> tuple[int, int]:
        """Of a section: the virtual address of the pointer to its page, and the offset in that page of its encoded map."""
        per_page = _PAGE // self.size
        return self.array + number // per_page * 8, number % per_page * self.size + self.map_offset


def grow(vmcore: Path, output: Path, memory: int, sections: Sequence[int] = ()) -> None:
    """Write a sparse vmcore of a machine with about `memory` bytes (whole gigabytes more than the real one has) to `output`.

    `sections` are the numbers of those whose page structs are repeated: those of the last two gigabytes if there are none.

    :raise FormatError: `vmcore` is not of the kind described above, or has no such section.
    """
    original = _Original(vmcore)
    try:
        with output.open("wb") as file:
            _Growth(original, file.fileno(), memory, sections).write()
    finally:
        original.close()


class _Growth:
    """Growing `original` to `memory` bytes, into a new file."""

    def __init__(self, original: _Original, descriptor: int, memory: int, template: Sequence[int]) -> None:
        self.original, self._descriptor = original, descriptor
        info = original.info
        self.start = original.end
        self.extra = align_up(memory - original.memory, _GIB)
        self.struct_size = info.size("page")
        self.sections = _Sections.from_info(info)
        usual = self.sections.pages * _PAGE == SECTION and self.sections.pages * self.struct_size == 1 << _SHIFTS[-1]
        if self.start % _GIB or self.extra <= 0 or not usual:
            raise FormatError("its memory does not end on a gigabyte, or its sections are unusual", source=str(original.path))
        if info.get("NUMBER(pgtable_l5_enabled)", "0") != "0":
            raise FormatError("has five levels of page tables", source=str(original.path))
        self.frames = Frames(original.read)
        self._next_table = self.start
        root = info.symbol("init_top_pgt") - _KERNEL_MAP + info.number("phys_base")
        self.tables = Tables(self.frames, root, self._new_table)
        self.section_numbers = range(self.start // SECTION, (self.start + self.extra) // SECTION)
        end = self.section_numbers.start
        self.template = tuple(template) or tuple(range(end - min(_TEMPLATE, original.linear[-1].memory_size) // SECTION, end))
        self.structs = self.start + _TABLES  # physical, of the new page structs
        self.vmemmap = self._map_of(self.section_numbers.start - 1)

    def _new_table(self) -> int:
        paddr = self._next_table
        self._next_table += _PAGE
        if self._next_table > self.structs:
            raise FormatError(f"more than {_TABLES >> 20} MiB of new page tables", source=str(self.original.path))
        self.frames.add(paddr)
        return paddr

    def _map_of(self, number: int) -> int:
        """Where the array of page structs begins, from a section's encoded map, which is relative to page 0."""
        pointer, offset = self.sections.place(number)
        page = self.frames.word(self.tables.paddr(pointer))
        encoded = self.frames.word(self.tables.paddr(page + offset)) if page else 0
        if not encoded & _PRESENT:
            raise FormatError(f"section {number} is not there", source=str(self.original.path))
        return align_down(encoded, 1 << _SHIFTS[-1])

    def write(self) -> None:
        """The whole file."""
        rows = [self._structs_of(number) for number in self.template]  # before there are more sections than the real ones
        self._copy_originals()
        self._lead_to_structs()
        self._write_structs(rows)
        for paddr, page in self.frames.changed.items():
            self._pwrite(page, self.original.offset(paddr))
            for each in self.original.image:  # the same memory once more
                if each.paddr <= paddr < each.paddr + each.file_size:
                    self._pwrite(page, each.file_offset + paddr - each.paddr)
        last = self.original.linear[-1]
        grown = replace(last, file_size=last.file_size + self.extra, memory_size=last.memory_size + self.extra)
        self._write_header(last, grown)
        os.truncate(self._descriptor, grown.file_offset + grown.file_size)

    def _copy_originals(self) -> None:
        """All that leads to the page structs, and the kernel's image for the rest that a dump wants of it."""
        first = min(each.file_offset for each in self.original.elf.segments if each.type == PT_LOAD)
        self._copy(0, first)
        for each in self.original.image:
            self._copy(each.file_offset, each.file_size)
            self._copy_memory(each.paddr, each.file_size)
        for table in self.tables.visit():
            self._copy_memory(table, _PAGE)
        pages = set()
        for number in range(self.section_numbers.start):
            pointer, offset = self.sections.place(number)
            array = self.tables.paddr(pointer)
            pages.add(align_down(array, _PAGE))
            page = self.frames.word(array)
            if not page:
                continue
            at = self.tables.paddr(page + offset)
            pages.add(align_down(at, _PAGE))
            if self.frames.word(at) & _PRESENT:
                for place, size in self._located(number):
                    self._copy_memory(place, size)
        for paddr in pages:
            self._copy_memory(paddr, _PAGE)

    def _located(self, number: int) -> Iterator[tuple[int, int]]:
        """Where the page structs of a section lie, piece by piece; a section need not be full, and then not all are there."""
        start = self.vmemmap + number * (1 << _SHIFTS[-1])
        for vaddr in range(start, start + (1 << _SHIFTS[-1]), _PAGE):
            try:
                yield self.tables.paddr(vaddr), _PAGE
            except FormatError:
                continue

    def _lead_to_structs(self) -> None:
        """Sections, their page structs in the vmemmap, and the direct mapping of all the new memory."""
        for paddr in range(self.start, self.start + self.extra, _GIB):
            self.tables.map(self.original.page_offset + paddr, paddr, _SHIFTS[1])
        size = 1 << _SHIFTS[-1]
        for index, number in enumerate(self.section_numbers):
            self.tables.map(self.vmemmap + number * size, self.structs + index * size, _SHIFTS[-1])
            pointer, offset = self.sections.place(number)
            at = self.tables.paddr(pointer)
            page = self.frames.word(at)
            if not page:
                page = self.original.page_offset + self._new_table()
                self.frames.put(at, page)
            self.frames.put(self.tables.paddr(page + offset), self.vmemmap | _EARLY)

    def _write_structs(self, rows: Sequence[Words]) -> None:
        head = self.original.info.offset("page.compound_head") // 8
        size = 1 << _SHIFTS[-1]
        for index, number in enumerate(self.section_numbers):
            copied = self.template[index % len(rows)]
            structs = rows[index % len(rows)].copy()
            tails = structs[:, head] & np.uint64(_COMPOUND_HEAD) != 0
            structs[tails, head] += np.uint64((number - copied) * size)
            self._pwrite(structs.data.cast("B"), self.original.offset(self.structs + index * size))

    def _structs_of(self, number: int) -> Words:
        """The page structs of a real section, one a row."""
        pieces = b"".join(self.original.read(paddr, size) for paddr, size in self._located(number))
        if len(pieces) != 1 << _SHIFTS[-1]:
            raise FormatError(f"section {number} is not there as a whole", source=str(self.original.path))
        return np.frombuffer(pieces, "<u8").reshape(-1, self.struct_size // 8)

    def _write_header(self, old: Segment, new: Segment) -> None:
        head = self.original.head
        table = int.from_bytes(head[32:40], "little")
        number = self.original.elf.segments.index(old)
        fields = (new.type, new.flags, new.file_offset, new.vaddr, new.paddr, new.file_size, new.memory_size, new.alignment)
        self._pwrite(_PHDR.pack(*fields), table + number * _PHDR.size)

    def _copy_memory(self, paddr: int, size: int) -> None:
        while size > 0:
            each = next(s for s in self.original.linear if s.paddr <= paddr < s.paddr + s.memory_size)
            some = min(size, each.paddr + each.memory_size - paddr)
            self._copy(self.original.offset(paddr), some)
            paddr, size = paddr + some, size - some

    def _copy(self, offset: int, size: int) -> None:
        self._pwrite(self.original.bytes_at(offset, size), offset)

    def _pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], offset + done)
