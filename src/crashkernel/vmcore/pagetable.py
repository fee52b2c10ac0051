"""From a dead kernel's virtual addresses to physical ones: its page tables, and what it maps without any.

References: Intel SDM volume 3A, chapter "Paging" (4- and 5-level); Power ISA 3.0B, Book III, section 5.7.10 "Radix Tree
Translation"; Linux `arch/x86/include/asm/pgtable_types.h`, `arch/powerpc/include/asm/book3s/64/` (`pgtable.h`, `radix-4k.h`,
`radix-64k.h`, `hash-4k.h`, `hash-64k.h`).

Whole ranges are translated, not addresses: a table's entries are looked at together, and what is consecutive in both address
spaces comes out as one span. A terabyte of page structs takes a thousand reads of 4 KiB.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from crashkernel.errors import CrashkernelError
from crashkernel.formats.elf import ByteOrder

_ENTRY_SIZE = 8
_PAGE_BITS = {0x1000: 12, 0x10000: 16}


class Span(NamedTuple):
    """`size` bytes at `vaddr` that lie at `paddr` on, in one piece.

    A tuple, unlike other records here: where huge pages share the pages that their page structs lie in
    (CONFIG_HUGETLB_PAGE_OPTIMIZE_VMEMMAP) a terabyte has millions of spans.
    """

    vaddr: int
    paddr: int
    size: int


class Mapping(Protocol):
    """What maps virtual addresses. Spans are ascending, within what was asked for, and never empty."""

    def spans(self, start: int, end: int) -> Iterator[Span]:
        """Yield where the virtual addresses [start, end) lie; what is not mapped is left out."""
        ...


class Format(NamedTuple):
    """How an architecture writes its tables. `levels` are the bits of the virtual address each indexes, top level first."""

    lowest: int  # the kernel's part of the address space begins here, and is as large as the table's reach or ends with 64 bits
    levels: tuple[int, ...]
    page_bits: int  # log2 of the bytes in a page, which the last level's entries map
    byteorder: ByteOrder  # of the entries
    present: int  # an entry with none of these bits set maps nothing
    leaf: int  # an entry above the last level with this bit maps a large page, any other is a table's address
    page_address: int  # the bits of an entry that are a page's address (for a large one, the low of them belong to no address)
    table_address: int  # the same of a table's address


def x86_64_format(*, five_levels: bool, encryption_mask: int = 0) -> Format:
    """Return the format of x86_64's tables. `encryption_mask` is AMD SME's C-bit, which belongs to no address (sme_mask)."""
    address = ((1 << 52) - 1) & ~0xFFF & ~encryption_mask
    return Format(
        lowest=(1 << 64) - (1 << (56 if five_levels else 47)),  # the upper half of the canonical addresses
        levels=(9,) * (5 if five_levels else 4),
        page_bits=12,
        byteorder="little",
        present=1 << 0,  # _PAGE_PRESENT
        leaf=1 << 7,  # _PAGE_PSE
        page_address=address,
        table_address=address,
    )


# Index sizes from RADIX_*_INDEX_SIZE and H_*_INDEX_SIZE, by page size: PGD, PUD, PMD, PTE.
_RADIX_LEVELS = {0x1000: (13, 9, 9, 9), 0x10000: (13, 9, 9, 5)}
_HASH_LEVELS = {0x1000: (9, 9, 7, 9), 0x10000: (8, 10, 10, 8)}


def ppc64_format(page_size: int, *, radix: bool) -> Format:
    """Return the format of ppc64's kernel page table, radix's own or the one Linux keeps beside the hash table.

    The entries are big-endian whatever the kernel is (`pgtable-be-types.h`).
    """
    return Format(
        lowest=0xC << 60,  # quadrant 3 of radix; the top bits are no part of the index
        levels=(_RADIX_LEVELS if radix else _HASH_LEVELS)[page_size],
        page_bits=_PAGE_BITS[page_size],
        byteorder="big",
        present=1 << 63,  # _PAGE_PRESENT; a table's address has it too (RADIX_PMD_VAL_BITS, HASH_PMD_VAL_BITS)
        leaf=1 << 62,  # _PAGE_PTE
        page_address=((1 << 53) - 1) & ~(page_size - 1),  # PTE_RPN_MASK
        table_address=((1 << 60) - 1) & ~0xFF,  # PMD_MASKED_BITS is 0xc0000000000000ff; bits 60 and 61 are reserved
    )


class PageTable:
    """A page table in a dead kernel's memory.

    `read(paddr, size)` reads that memory; `doubt` is told of every table that could not be read, and what it maps is then
    left out.
    """

    def __init__(
        self, root: int, layout: Format, read: Callable[[int, int], bytes], doubt: Callable[[str], None] = lambda _: None
    ) -> None:
        self.root = root
        self._layout = layout
        self._read = read
        self._doubt = doubt
        self._dtype = np.dtype(np.uint64).newbyteorder("<" if layout.byteorder == "little" else ">")
        shifts = [layout.page_bits]
        for bits in reversed(layout.levels[1:]):
            shifts.append(shifts[-1] + bits)
        self._shifts = tuple(reversed(shifts))  # log2 of what one entry of each level maps
        self._lowest = layout.lowest
        self._end = min(layout.lowest + (1 << (self._shifts[0] + layout.levels[0])), 1 << 64)

    def spans(self, start: int, end: int) -> Iterator[Span]:
        """Yield where the virtual addresses [start, end) lie; a span ends with the table that maps it."""
        start, end = max(start, self._lowest), min(end, self._end)
        return self._walk(0, self.root, start, end) if start < end else iter(())

    def _walk(self, depth: int, table: int, start: int, end: int) -> Iterator[Span]:
        """Yield the spans of [start, end), all of which the table at `table` is for."""
        layout, shift = self._layout, self._shifts[depth]
        step, mask = 1 << shift, (1 << layout.levels[depth]) - 1
        first, last = (start >> shift) & mask, ((end - 1) >> shift) & mask
        try:
            raw = self._read(table + first * _ENTRY_SIZE, (last - first + 1) * _ENTRY_SIZE)
        except CrashkernelError as error:
            self._doubt(f"the page table of virtual addresses {start:#x}-{end:#x}: {error}")
            return
        entries = np.frombuffer(raw, self._dtype).astype(np.uint64)
        present = (entries & np.uint64(layout.present)) != 0
        leaf = present if shift == layout.page_bits else present & ((entries & np.uint64(layout.leaf)) != 0)
        paddrs = entries & np.uint64(layout.page_address & ~(step - 1))
        # One run is one span, one table, or a hole: it ends where the next entry is of another kind or lies elsewhere.
        together = leaf[1:] & leaf[:-1] & (paddrs[1:] - paddrs[:-1] == np.uint64(step)) | ~present[1:] & ~present[:-1]
        begins = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(~together) + 1))
        ends = np.append(begins[1:], len(entries))
        base = (start >> shift) << shift
        chosen = present[begins]
        begins, ends = begins[chosen], ends[chosen]
        tables = entries[begins] & np.uint64(layout.table_address)
        for begin, stop, is_leaf, paddr, below in zip(
            begins.tolist(), ends.tolist(), leaf[begins].tolist(), paddrs[begins].tolist(), tables.tolist(), strict=True
        ):
            lowest = base + begin * step
            low, high = max(start, lowest), min(end, base + stop * step)
            if is_leaf:
                yield Span(low, paddr + low - lowest, high - low)
            else:
                yield from self._walk(depth + 1, below, low, high)


class Direct(NamedTuple):
    """Virtual addresses [start, end) that lie at `paddr` on: a kernel's linear map, or its own image."""

    start: int
    end: int
    paddr: int

    def spans(self, start: int, end: int) -> Iterator[Span]:
        """Yield where the virtual addresses [start, end) lie."""
        start, end = max(start, self.start), min(end, self.end)
        if start < end:
            yield Span(start, self.paddr + start - self.start, end - start)


class Blocks:
    """Blocks of one size, each mapped somewhere: hash ppc64's list of what backs its array of page structs.

    Of two blocks at one virtual address the first counts.
    """

    def __init__(self, vaddrs: NDArray[np.uint64], paddrs: NDArray[np.uint64], size: int) -> None:
        unique, index = np.unique(vaddrs, return_index=True)  # sorted, and the index is of the first
        places = paddrs[index]
        step = np.uint64(size)
        broken = (unique[1:] - unique[:-1] != step) | (places[1:] - places[:-1] != step)
        begins = np.concatenate((np.zeros(min(len(unique), 1), np.int64), np.flatnonzero(broken) + 1))
        sizes = np.diff(np.append(begins, len(unique))) * size
        self._spans = [
            Span(vaddr, paddr, total)
            for vaddr, paddr, total in zip(unique[begins].tolist(), places[begins].tolist(), sizes.tolist(), strict=True)
        ]
        self._starts = [each.vaddr for each in self._spans]

    def spans(self, start: int, end: int) -> Iterator[Span]:
        """Yield where the virtual addresses [start, end) lie."""
        for index in range(max(bisect_right(self._starts, start) - 1, 0), len(self._spans)):
            each = self._spans[index]
            low, high = max(start, each.vaddr), min(end, each.vaddr + each.size)
            if each.vaddr >= end:
                break
            if low < high:
                yield Span(low, each.paddr + low - each.vaddr, high - low)


def merged(spans: Iterable[Span]) -> Iterator[Span]:
    """Yield the same with neighbours that are consecutive in both address spaces made one."""
    vaddr = paddr = size = 0
    for each in spans:
        if size and each.vaddr == vaddr + size and each.paddr == paddr + size:
            size += each.size
            continue
        if size:
            yield Span(vaddr, paddr, size)
        vaddr, paddr, size = each
    if size:
        yield Span(vaddr, paddr, size)
