"""The dump-level filter: which class each page of a dead kernel has, read from the kernel's own array of page structs.

The classes mean what they mean to makedumpfile (`makedumpfile(8)`, option -d), page for page. What a page struct looks like is
asked of VMCOREINFO and never of a kernel version. The ways a kernel can say the same thing, by the first release that has them:

================  ============================================  ==================================================
what              how                                           since
================  ============================================  ==================================================
tail of a         bit 0 of `compound_head`                      4.3 (`include/linux/page-flags.h`)
compound page     bit 0 of `compound_info`                      7.1
order of a        `compound_order` in the page after            2.6.39 (`page[1].compound_order`)
compound page     `folio._folio_order`                          6.3
                  lowest byte of the flags of the page after    6.6 (`folio._flags_1`)
hugetlb page      `compound_dtor`, then `folio._folio_dtor`     4.4, 6.3
                  PG_hugetlb in the flags of the page after     6.6
                  a page type                                   6.9
slab page         PG_slab                                       always
                  a page type                                   6.10
================  ============================================  ==================================================

A page type is a value of `_mapcount` that no count can have: a flag taken out of -1, or since 6.12 a number in the top byte.
Either way VMCOREINFO has the whole value (NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE) and its like).

The page array is read in pieces that fit a CPU's caches; nothing grows with the machine. A page that is dropped as the first of
many (a free block of the buddy allocator, a compound page) decides for all of them: their structs are not looked at, and where
such blocks follow each other they are not even read. Whatever the bytes are, the answer is some class for each page.

Where this differs from makedumpfile 1.7.8:

- It does not know `compound_info`, so on 7.1 and later it takes what tails hold for a page's own. (Fixed in its repository.)
- Of a ppc64 kernel with 4 KiB pages and the radix MMU it reads other memory for page structs: it always takes the first of
  the 16 pages that hold the top level of the kernel's page table.
- From 6.10 on, where slab is a page type, it still takes bit 7 of the flags for PG_slab. That bit is PG_waiters: anonymous
  memory that somebody waits for counts as page cache there. Here it is user data.
- A free block that does not begin at a multiple of its size is kept here: only damage makes one.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from crashkernel.capture.selection import (
    DL_CACHE,
    DL_CACHE_PRIVATE,
    DL_FREE,
    DL_USER,
    DL_ZERO,
    MAX_DUMP_LEVEL,
    Chunk,
    Findings,
    PageClass,
)
from crashkernel.errors import CrashkernelError, FormatError, UsageError
from crashkernel.formats.elf import ByteOrder
from crashkernel.formats.vmcoreinfo import VmcoreInfo

if TYPE_CHECKING:
    from crashkernel.vmcore.kernel import PageStructs
    from crashkernel.vmcore.source import Source

_CHUNK_PAGES = 32768
"""Pages of a chunk: enough for numpy's calls to cost little, and few enough for the third-level cache (2 MiB of structs)."""

_READ_PAGES = 8192
"""Pages whose structs are read at a time: half a MiB, which fits the second-level cache of the CPUs this runs on."""

_LEAST_SAMPLED, _MOST_SAMPLED = 256, 1024
"""Pages of a block that is looked for by its first page alone, half of them at least: smaller ones are not worth a read."""

_LARGEST_BLOCK = 1 << 34
"""Bytes of the largest compound page there is: a 16 GiB page of the ppc64 hash MMU (`arch/powerpc/include/asm/mmu.h`)."""

_STRUCT_SIZES = range(32, 257, 8)
"""Bytes a struct page can have: 64 on a usual kernel, 56 or up to 96 with other options (`include/linux/mm_types.h`)."""

_MOST_FREE_ORDERS = 32  # a free block has less than 2^32 pages on any kernel: MAX_ORDER is 10 to 13, 16 at most
_ANON = 1  # of page.mapping: PAGE_MAPPING_ANON (include/linux/page-flags.h)
_TAIL = 1  # of page.compound_head

_SAMPLES = 64
"""Places, spread over memory, whose share of free pages is held against the kernel's own count before one is dropped."""

_EXCESS_OF_ALL, _EXCESS_OF_SOME = 1 / 16, 1 / 3
"""By what share of memory that may be wrong, if all of it was looked at, and if some places were."""

_MOST_NODES, _MOST_ZONES = 1 << 10, 8
"""Of a kernel's memory: CONFIG_NODES_SHIFT is 10 at most, enum zone_type has 6 at most."""

_PROBES, _DAMAGED_PROBES = 16, 3
"""How many structs of a large block's worth of them are looked at for damage, and how many make it so."""

_U8 = NDArray[np.uint8]
_Bool = NDArray[np.bool_]
_Index = NDArray[np.int64]
_Piece = tuple[int, int, int]
"""Page structs in one piece: first page frame, last one (exclusive), physical address."""


class DeadKernel(Protocol):
    """What the filter asks of a kernel: `kernel.CrashedKernel` is one."""

    @property
    def info(self) -> VmcoreInfo:
        """Its VMCOREINFO."""
        ...

    @property
    def doubts(self) -> list[str]:
        """Where what it says of itself cannot be true or cannot be read."""
        ...

    def page_structs(self, first: int = 0) -> Iterator[PageStructs]:
        """Yield where the page structs are, in ascending order, at least those of the page frames from `first` on."""
        ...

    def read(self, vaddr: int, size: int) -> bytes:
        """Return `size` bytes of virtual memory.

        :raise FormatError: they are not mapped, or not in the dump.
        """
        ...


# ------------------------------------------------------------------------------------------------ what a page struct says


class _Rules(NamedTuple):
    """How to read a page struct, and what to drop.

    Columns count from the start of the struct in units of their width. Values are numbers as this machine reads them from K1's
    memory, so that nothing has to be swapped page by page; flags that do not exist are 0.
    """

    size: int  # bytes of a struct page
    flags: int  # 32-bit column: the half of page.flags that has the flags
    tail: int | None  # byte column: the one with the lowest bit of page.compound_head
    mapping: int  # byte column: likewise of page.mapping
    mapcount: int  # 32-bit column
    private: int  # 64-bit column
    refcount: int | None  # 32-bit column
    swapped: bool  # K1's byte order is not this machine's
    order: int | None  # byte column in the page after a compound page's first: log2 of its number of pages
    hugetlb_id: tuple[int, int] | None  # byte column in the page after, and what it holds when the page is a hugetlb page
    hugetlb_flag: np.uint32 | None  # in the flags of the page after
    hugetlb_type: np.uint32 | None
    lru: np.uint32
    swapcache: np.uint32  # both flags that together make a page one of the swap cache
    private_flag: np.uint32
    head: np.uint32
    poisoned: np.uint32
    sign: np.uint32  # of a number of 32 bits
    slab: np.uint32
    slab_type: np.uint32 | None
    buddy_type: np.uint32 | None
    unaccepted_type: np.uint32 | None
    offline_type: np.uint32 | None
    free_orders: int  # LENGTH(zone.free_area): a free block has less than 2^this pages
    max_order: int  # of any compound page
    cache: bool  # page cache without private data is dropped
    cache_private: bool  # page cache with private data is dropped as well
    user: bool
    free: bool

    def largest_order(self) -> int:
        """Log2 of the number of pages of the largest block there is."""
        return max(self.max_order, self.free_orders)

    def sampled_pages(self) -> tuple[int, int]:
        """Return the numbers of pages of blocks that may be worth judging by their first page alone, the smaller one first.

        The larger is that of the largest free blocks; the smaller that of huge pages where these are 2 MiB in pages of 4 KiB.
        """
        free = 1 << (self.free_orders - 1) if self.free_orders else _MOST_SAMPLED
        large = max(_LEAST_SAMPLED, min(free, _MOST_SAMPLED))
        return large // 2, large


class _RuleReader:
    """Reads the rules out of VMCOREINFO. What it lacks, or what makes no sense there, costs a class, not the dump."""

    def __init__(self, info: VmcoreInfo, byteorder: ByteOrder, page_size: int, level: int) -> None:
        self._info = info
        self._byteorder: ByteOrder = byteorder
        self._page_size = page_size
        self._level = level
        self._size = 0
        self.doubts: list[str] = []

    def rules(self) -> _Rules | None:
        """Return the rules, or None when nothing is to be filtered or nothing can be."""
        info, level = self._info, self._level
        poisoned = self._flag("PG_hwpoison")
        # As makedumpfile (create_2nd_bitmap): without PG_hwpoison levels 0 and 1 do not look at page structs at all.
        if not level & ~DL_ZERO and not poisoned:
            return None
        size = self._ask(info.size, "page")
        self._size = size if size is not None and size in _STRUCT_SIZES else 0
        flags = self._column("page.flags", 8)
        if flags is None:
            what = "a struct page of a size that makes sense" if size is not None and not self._size else "OFFSET(page.flags)"
            self.doubts.append(f"VMCOREINFO has no {what}: every page is kept")
            return None
        tail = self._column("page.compound_head", 8)
        tail = self._column("page.compound_info", 8) if tail is None else tail
        mapping, private = self._column("page.mapping", 8), self._column("page.private", 8)
        mapcount, refcount = self._column("page._mapcount", 4), self._column("page._refcount", 4)
        lru, private_flag, slab = self._flag("PG_lru"), self._flag("PG_private"), self._flag("PG_slab")
        swapcache, swapbacked = self._flag("PG_swapcache"), self._flag("PG_swapbacked")
        head = self._head_mask()
        types = {
            name: self._type(f"PAGE_{name}_MAPCOUNT_VALUE", mapcount)
            for name in ("SLAB", "BUDDY", "UNACCEPTED", "OFFLINE", "HUGETLB")
        }
        orders = self._ask(info.length, "zone.free_area")
        order = self._order() if head else None

        slab_known = {"NUMBER(PG_slab)": slab or types["SLAB"] is not None}
        in_order = {"OFFSET(page.mapping)": mapping is not None, "OFFSET(page.compound_head)": tail is not None}
        cache = bool(level & (DL_CACHE | DL_CACHE_PRIVATE)) and self._all(
            "page cache is", {**in_order, "NUMBER(PG_lru)": lru, "NUMBER(PG_private)": private_flag}
        )
        user = bool(level & DL_USER) and self._all("user data is", {**in_order, **slab_known})
        free = bool(level & DL_FREE) and self._all(
            "free pages are",
            {
                "OFFSET(page._mapcount)": mapcount is not None,
                "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)": types["BUDDY"] is not None,
                "OFFSET(page.private)": private is not None,
                **slab_known,
                "LENGTH(zone.free_area)": orders is not None and 0 < orders <= _MOST_FREE_ORDERS,
            },
        )
        if (cache or user) and order is None:
            self.doubts.append(
                "VMCOREINFO does not say how large compound pages are: of those that would be dropped only the first page is"
            )
        return _Rules(
            size=self._size,
            flags=self._low(flags, 8, 4),
            tail=None if tail is None else self._low(tail, 8, 1),
            mapping=0 if mapping is None else self._low(mapping, 8, 1),
            mapcount=0 if mapcount is None else mapcount // 4,
            private=0 if private is None else private // 8,
            refcount=None if refcount is None else refcount // 4,
            swapped=self._byteorder != sys.byteorder,
            order=order,
            hugetlb_id=self._hugetlb_id(),
            hugetlb_flag=self._value(self._flag("PG_hugetlb")) or None,
            hugetlb_type=types["HUGETLB"],
            lru=self._value(lru),
            swapcache=self._value(swapcache | swapbacked if swapcache and swapbacked else 0),
            private_flag=self._value(private_flag),
            head=self._value(head),
            poisoned=self._value(poisoned),
            sign=self._value(1 << 31),
            slab=self._value(slab),
            slab_type=types["SLAB"],
            buddy_type=types["BUDDY"] if free else None,
            unaccepted_type=types["UNACCEPTED"] if free else None,
            offline_type=types["OFFLINE"] if all(slab_known.values()) else None,
            free_orders=orders if free and orders is not None else 0,
            max_order=max((_LARGEST_BLOCK // self._page_size).bit_length() - 1, 0),
            cache=cache,
            cache_private=cache and bool(level & DL_CACHE_PRIVATE),
            user=user,
            free=free,
        )

    def _order(self) -> int | None:
        """Return the byte column, in the page after a compound page's first, that has its order."""
        if "NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)" in self._info or "NUMBER(PG_hugetlb)" in self._info:
            return self._low(self._column("page.flags", 8) or 0, 8, 1)
        return self._second("folio._folio_order", "page.compound_order")

    def _hugetlb_id(self) -> tuple[int, int] | None:
        """Return the byte column of a compound page's kind in the page after its first, and the kind of hugetlb pages."""
        column, value = (
            self._second("folio._folio_dtor", "page.compound_dtor"),
            self._ask(self._info.number, "HUGETLB_PAGE_DTOR"),
        )
        return None if column is None or value is None or not 0 < value < 1 << 8 else (column, value)

    def _second(self, of_folio: str, of_page: str) -> int | None:
        """Return the byte column, in a compound page's second page struct, of a member of a folio or of that struct page.

        A folio lies over the page structs of its pages, so the member's offset counts from the first one.
        """
        offset = self._ask(self._info.offset, of_folio)
        offset = self._ask(self._info.offset, of_page) if offset is None else offset - self._size
        return offset if offset is not None and 0 <= offset < self._size else None

    def _all(self, what: str, needs: Mapping[str, object]) -> bool:
        """Whether all is there that dropping a class needs; else a doubt."""
        lacking = [name for name, there in needs.items() if not there]
        if lacking:
            self.doubts.append(f"VMCOREINFO has no {' and no '.join(lacking)}, or none that makes sense: {what} kept")
        return not lacking

    def _ask(self, ask: Callable[[str], int], name: str) -> int | None:
        try:
            return ask(name)
        except FormatError:
            return None

    def _column(self, member: str, width: int) -> int | None:
        """Return the offset of a member that is `width` bytes and lies as C lays it out, else None."""
        offset = self._ask(self._info.offset, member)
        return None if offset is None or not 0 <= offset <= self._size - width or offset % width else offset

    def _low(self, offset: int, size: int, width: int) -> int:
        """Return the column, in units of `width` bytes, of the lowest `width` bytes of a number of `size` bytes at `offset`."""
        return (offset if self._byteorder == "little" else offset + size - width) // width

    def _flag(self, name: str) -> int:
        """Return the mask of a page flag, 0 if there is none. The flags proper are below bit 32 (`include/linux/mmzone.h`)."""
        bit = self._ask(self._info.number, name)
        return 1 << bit if bit is not None and 0 <= bit < 32 else 0

    def _head_mask(self) -> int:
        mask = self._ask(self._info.number, "PG_head_mask")
        if mask is not None and 0 < mask < 1 << 32 and not mask & (mask - 1):
            return mask
        return 0

    def _type(self, name: str, mapcount: int | None) -> np.uint32 | None:
        value = self._ask(self._info.number, name)
        return None if value is None or mapcount is None else self._value(value)

    def _value(self, value: int) -> np.uint32:
        """Return a 32-bit value of K1's as this machine reads it from K1's memory."""
        return np.uint32(int.from_bytes((value & 0xFFFF_FFFF).to_bytes(4, self._byteorder), sys.byteorder))


# ---------------------------------------------------------------------------------------------------- looking at structs


@dataclass(slots=True, eq=False, repr=False)
class _Findings:
    """What a pass met that is not as it should be."""

    structless: int = 0  # pages of memory without page structs
    unreadable: int = 0  # pages whose structs the source would not give
    bad_blocks: int = 0  # free blocks whose order or place is impossible
    damaged: int = 0  # pages whose structs are no page structs
    first_damaged: int = 0  # page frame of the first of them

    def note(self, findings: Findings, place: int) -> None:
        """Put it in words, and begin anew; `place` is where the pass began."""
        if self.structless:
            findings.note("{count} pages of memory have no page structs: they are kept", place, self.structless)
        if self.unreadable:
            findings.note("the page structs of {count} pages cannot be read: they are kept", place, self.unreadable)
        if self.damaged:
            text = "what should be page structs, of {count} pages from page frame {place} on, is something else: they are kept"
            findings.note(text, self.first_damaged, self.damaged)
        if self.bad_blocks:
            findings.note("{count} free blocks have an impossible size or place: they are kept", place, self.bad_blocks)
        self.structless = self.unreadable = self.bad_blocks = self.damaged = self.first_damaged = 0


class _Block(NamedTuple):
    """The pages up to `end` (a page frame, exclusive) belong to a block whose first page decides their class."""

    end: int = 0
    page_class: int = PageClass.KEPT


class _Judge:
    """Looks at page structs: the class of each page by its own struct, and how many pages it decides for.

    In two steps, for a CPU's caches have more than one size: `load` takes what matters of each struct while it is still in the
    second-level cache, and `own_classes` then goes over that in arrays long enough to make numpy's calls cheap.
    """

    def __init__(self, rules: _Rules, findings: _Findings, pages: int) -> None:
        self._rules = rules
        self._findings = findings
        self._flags, self._mapcount, self._word = np.empty((3, pages), np.uint32)
        # What numpy says of a comparison are bytes of 0 and 1: they are taken for truths or numbers as it suits.
        self._whole, self._anon, self._plain, self._free, self._cache, self._test = np.empty((6, pages), np.uint8)

    def load(self, structs: _U8, stride: int, at: int) -> None:
        """Take the structs in `structs` (flat), one every `stride` bytes, as pages `at` and up."""
        rules = self._rules
        count = len(structs) // stride
        octets, words = structs.reshape(count, stride), structs.view(np.uint32).reshape(count, stride // 4)
        np.copyto(self._flags[at : at + count], words[:, rules.flags])
        np.copyto(self._mapcount[at : at + count], words[:, rules.mapcount])
        if rules.tail is not None:
            np.copyto(self._whole[at : at + count], octets[:, rules.tail])
        if rules.cache or rules.user:
            np.copyto(self._anon[at : at + count], octets[:, rules.mapping])

    def own_classes(self, structs: _U8, pfn: int, step: int, present: _Bool | None) -> tuple[_U8, _Index, _Index]:
        """Judge the structs that were loaded, of every `step`-th page frame from `pfn` on, each by itself.

        `structs` is where they were loaded from: one after the other when `step` is 1, else each followed by the struct of the
        page after it. `present` tells which of the pages are memory; others decide nothing.

        Returns each page's class, and, ascending, the places of those that decide for more pages than themselves, with the
        number of pages of the block that each begins.
        """
        rules = self._rules
        stride = rules.size if step == 1 else 2 * rules.size
        count = len(structs) // stride
        whole = self._whole[:count]
        if rules.tail is None:
            whole[:] = 1
        else:
            np.bitwise_and(whole, _TAIL, out=whole)
            np.bitwise_xor(whole, _TAIL, out=whole)
        seen = np.bitwise_or.reduce(self._flags[:count])
        plain = self._not_slab(count, seen)
        classes = np.zeros(count, np.uint8)
        if rules.cache or rules.user:
            self._cache_and_user(seen, plain, classes)
            np.multiply(classes, whole, out=classes)
        firsts = self._having(rules.head, count, seen)
        free = self._free_firsts(count, plain)
        if free is not None:
            firsts = np.bitwise_or(free if firsts is None else firsts, free, out=self._test[:count])
        places: _Index = np.empty(0, np.int64)
        if firsts is not None:
            np.bitwise_and(firsts, whole, out=firsts)
            if present is not None:
                np.bitwise_and(firsts, present.view(np.uint8), out=firsts)
            places = np.flatnonzero(firsts.view(np.bool_))  # of truths it is faster than of numbers
        orders = np.zeros(len(places), np.int64)
        pfns = pfn + places * step
        heads: slice | _Index = slice(None)
        if free is not None:
            is_free = free[places] != 0
            blocks, heads = np.flatnonzero(is_free), np.flatnonzero(~is_free)
            if len(blocks):
                orders[blocks] = self._free_blocks(structs, stride, places[blocks], pfns[blocks], classes)
        if len(places[heads]):
            orders[heads] = self._compounds(structs, stride, places[heads], pfns[heads], classes)
        self._mark_unusable(seen, plain, classes)
        several = (orders > 0) & (classes[places] != PageClass.KEPT)
        return classes, places[several], 1 << orders[several]

    def _having(self, mask: np.uint32, count: int, seen: np.uint32) -> _U8 | None:
        """Tell which pages have a flag, in memory that the next call takes again; None when none has."""
        if not seen & mask:
            return None
        np.bitwise_and(self._flags[:count], mask, out=self._word[:count])
        return np.not_equal(self._word[:count], 0, out=self._test[:count].view(np.bool_)).view(np.uint8)

    def _not_slab(self, count: int, seen: np.uint32) -> _U8 | None:
        """Tell which pages are none of the slab allocator's, which has other things in the same places; None when all are."""
        rules, plain = self._rules, self._plain[:count]
        if rules.slab_type is not None:
            np.not_equal(self._mapcount[:count], rules.slab_type, out=plain.view(np.bool_))
            return plain
        slab = self._having(rules.slab, count, seen)
        return None if slab is None else np.bitwise_xor(slab, 1, out=plain)

    def _cache_and_user(self, seen: np.uint32, plain: _U8 | None, classes: _U8) -> None:
        """Find page cache and user data.

        Anonymous memory is on the lists of the page cache as well. Only memory that is being swapped can be in the swap cache
        without being on them; the flag has another meaning on pages that are not PG_swapbacked.
        """
        rules, count = self._rules, len(classes)
        anon = np.bitwise_and(self._anon[:count], _ANON, out=self._anon[:count])
        if plain is not None:
            np.bitwise_and(anon, plain, out=anon)
        if rules.cache and (listed := self._having(rules.lru, count, seen)) is not None:
            np.greater(listed, anon, out=classes.view(np.bool_))
        if rules.cache and rules.swapcache and seen & rules.swapcache == rules.swapcache:
            word, cache = self._word[:count], self._cache[:count].view(np.bool_)
            np.equal(np.bitwise_and(self._flags[:count], rules.swapcache, out=word), rules.swapcache, out=cache)
            np.bitwise_or(classes, np.greater(cache, anon, out=cache).view(np.uint8), out=classes)
        if rules.cache and (private := self._having(rules.private_flag, count, seen)) is not None:
            if rules.cache_private:
                np.left_shift(classes, private, out=classes)  # CACHE << 1 is CACHE_PRIVATE
            else:
                np.greater(classes, private, out=classes.view(np.bool_))
        if rules.user:
            np.bitwise_or(classes, np.multiply(anon, np.uint8(PageClass.USER), out=anon), out=classes)

    def _free_firsts(self, count: int, plain: _U8 | None) -> _U8 | None:
        """Tell which pages are the first of free blocks; None when it is not asked for."""
        rules, free = self._rules, self._free[:count]
        if rules.buddy_type is None:
            return None
        np.equal(self._mapcount[:count], rules.buddy_type, out=free.view(np.bool_))
        if rules.unaccepted_type is not None:
            cache = self._cache[:count].view(np.bool_)
            np.bitwise_or(free, np.equal(self._mapcount[:count], rules.unaccepted_type, out=cache).view(np.uint8), out=free)
        return free if plain is None else np.bitwise_and(free, plain, out=free)

    def _mark_unusable(self, seen: np.uint32, plain: _U8 | None, classes: _U8) -> None:
        """Find poisoned and offline pages among those that have no class yet and are no tails."""
        rules, count = self._rules, len(classes)
        poisoned = self._having(rules.poisoned, count, seen)
        for page_class, found in ((PageClass.POISONED, poisoned), (PageClass.OFFLINE, self._offline(count, plain))):
            if found is not None and found.view(np.bool_).any():
                np.bitwise_and(found, self._whole[:count], out=found)
                np.greater(found, classes, out=found.view(np.bool_))  # found and no class yet: 1 > 0
                np.bitwise_or(classes, np.multiply(found, np.uint8(page_class), out=found), out=classes)

    def _offline(self, count: int, plain: _U8 | None) -> _U8 | None:
        if self._rules.offline_type is None:
            return None
        found = self._cache[:count]
        np.equal(self._mapcount[:count], self._rules.offline_type, out=found.view(np.bool_))
        return found if plain is None else np.bitwise_and(found, plain, out=found)

    def _free_blocks(self, structs: _U8, stride: int, places: _Index, pfns: _Index, classes: _U8) -> _Index:
        """Drop what begins a free block, and return the blocks' orders; what cannot begin one is kept.

        The buddy allocator keeps a block's order in page.private (set_buddy_order, mm/page_alloc.c), and blocks begin at
        multiples of their size.
        """
        rules = self._rules
        private = structs.view(np.uint64).reshape(-1, stride // 8)[places, rules.private]
        if rules.swapped:
            private = private.byteswap()
        if rules.unaccepted_type is not None:
            # Memory is put off in blocks of the highest order only (__free_unaccepted, mm/page_alloc.c).
            private[self._mapcount[places] == rules.unaccepted_type] = rules.free_orders - 1
        possible = private < rules.free_orders
        orders = np.where(possible, private, 0).astype(np.int64)
        possible &= pfns & ((1 << orders) - 1) == 0
        if possible.all():
            classes[places] = PageClass.FREE
            return orders
        self._findings.bad_blocks += len(places) - int(np.count_nonzero(possible))
        classes[places] = np.where(possible, np.uint8(PageClass.FREE), np.uint8(PageClass.KEPT))
        return np.where(possible, orders, 0)

    def _compounds(self, structs: _U8, stride: int, places: _Index, pfns: _Index, classes: _U8) -> _Index:
        """Return the orders of the compound pages that begin at `places`, 0 where it is impossible; marks hugetlb pages.

        The first of a hugetlb page's structs may show up again as every 64th of them (with its vmemmap optimised,
        `Documentation/mm/vmemmap_dedup.rst`), where its order does not fit: those are inside the block that the first begins.
        """
        rules = self._rules
        last = len(structs) - rules.size
        after = np.minimum(places * stride + rules.size, last)  # where in `structs` the struct of the page after is
        orders = np.zeros(len(places), np.int64)
        if rules.order is not None:
            orders[:] = structs[after + rules.order]
            orders[(orders > rules.max_order) | (pfns & ((1 << np.minimum(orders, rules.max_order)) - 1) != 0)] = 0
        hugetlb: _Bool | None = None
        if rules.user and rules.hugetlb_type is not None:
            hugetlb = self._mapcount[places] == rules.hugetlb_type
        elif rules.user and rules.hugetlb_flag is not None:
            hugetlb = structs.view(np.uint32)[after // 4 + rules.flags] & rules.hugetlb_flag != 0
        elif rules.user and rules.hugetlb_id is not None:
            hugetlb = structs[after + rules.hugetlb_id[0]] == rules.hugetlb_id[1]
        if places[-1] * stride == last:  # the struct after is not here; no compound page begins at an odd page frame
            orders[-1] = 0
            if hugetlb is not None:
                hugetlb[-1] = False
        if hugetlb is not None:
            marked = places[hugetlb]
            classes[marked[classes[marked] == PageClass.KEPT]] = PageClass.USER
        return orders


def _spread(classes: _U8, places: _Index, sizes: _Index, values: _U8) -> int:
    """Give all pages of blocks the class of the block: that of the outermost, where one lies in another.

    Blocks begin at `places` (ascending), have `sizes` pages, and lie one in the other or apart: they are aligned powers of 2.
    Returns how far the last block reaches.
    """
    ends = places + sizes
    if len(places) > 1:
        inside = places[1:] < np.maximum.accumulate(ends)[:-1]
        if inside.any():
            outer = np.concatenate((np.ones(1, np.bool_), ~inside))
            places, ends, values = places[outer], ends[outer], values[outer]
    reach = int(ends[-1])
    count = len(classes)
    edges = np.empty(2 * len(places) + 2, np.int64)
    edges[0], edges[1:-1:2], edges[2:-1:2], edges[-1] = 0, places, ends, count
    edges[-2] = min(reach, count)
    cover = np.zeros(2 * len(places) + 1, np.uint8)
    cover[1::2] = values
    spread = np.repeat(cover, np.diff(edges))
    np.multiply(classes, np.equal(spread, 0).view(np.uint8), out=classes)
    np.bitwise_or(classes, spread, out=classes)
    return reach


# ---------------------------------------------------------------------------------------------------------- the page array


class _Array:
    """The page structs in ascending order; holds one run of them."""

    def __init__(self, runs: Iterator[PageStructs], size: int) -> None:
        self._runs = runs
        self._size = size
        self._run = next(runs, None)

    def pieces(self, first: int, last: int) -> list[_Piece]:
        """Return (first page frame, last one, physical address) of the structs there are of [first, last), in ascending order.

        What is asked for must begin no lower than what was asked for before.
        """
        found: list[_Piece] = []
        while (run := self._run) is not None and run.pfn < last:
            start, end = max(first, run.pfn), min(last, run.pfn + run.count)
            if start < end:
                found.append((start, end, run.paddr + (start - run.pfn) * self._size))
            if run.pfn + run.count > last:
                break
            self._run = next(self._runs, None)
        return found


class PageFilter:
    """The pages of a dead kernel that a dump level keeps, as a `Selection`.

    What it cannot tell is among its `findings`, some of it only after a pass.

    :raise UsageError: there is no such level.
    """

    def __init__(self, kernel: DeadKernel, source: Source, level: int) -> None:
        if not 0 <= level <= MAX_DUMP_LEVEL:
            raise UsageError(f"there is no dump level {level}: they are 0 to {MAX_DUMP_LEVEL}")
        self.level = level
        self.page_size = source.page_size
        self.findings = Findings()
        self._kernel = kernel
        self._source = source
        self._memory = _page_ranges(source)
        self.max_pfn = self._memory[-1][1] if self._memory else 0
        reader = _RuleReader(kernel.info, source.byteorder, source.page_size, level)
        self._rules = reader.rules()
        for doubt in reader.doubts:
            self.findings.note(doubt)
        self._counted: int | None = None  # free pages by the kernel's own count
        self._unfinished: tuple[int, _Walk | None] = 0, None  # what goes on from a page frame, if that is asked for next
        self._distrust_free()

    def chunks_of(self, first: int, last: int) -> Iterator[Chunk]:
        """Yield the classes of the page frames [first, last).

        So several processes can share the work, each with a part of the machine and its own `doubts`. One that goes over all of
        it, part after part, does not look up again where the page structs are.
        """
        (reached, walk), self._unfinished = self._unfinished, (0, None)
        in_order = first in (0, reached)
        if first != reached:
            walk = None
        for start, end in self._cells(first, last):
            present = self._present(start, end)
            if self._rules is None:
                classes = np.zeros(end - start, np.uint8)
            else:
                if walk is None:
                    lowest = start & -(1 << self._rules.largest_order())  # where a block that reaches here can begin
                    walk = _Walk(self._source, self._rules, self._kernel.page_structs(lowest))
                    walk.begin(start, self._present)
                classes = walk.classes(start, end, present)
            if present is not None:
                classes[~present] = PageClass.ABSENT
            yield Chunk(max(start, first), classes[max(first - start, 0) : max(min(last, end) - start, 0)])
        if walk is not None:
            walk.findings.note(self.findings, first)
            for doubt in self._kernel.doubts:
                self.findings.note(doubt)
        if in_order and last < self.max_pfn and last % _CHUNK_PAGES == 0:
            self._unfinished = last, walk

    def _distrust_free(self) -> None:
        """Keep all free pages if far more are marked free than the kernel counts: then the mark means something else.

        A few places stand for a large machine, so only a gross excess counts.
        """
        if self._rules is None or not self._rules.free:
            return
        self._counted = counted = _counted_free(self._kernel, self._source.byteorder)
        if counted is None or not self._memory:
            return
        all_pages = self._pages()
        window = max(_MOST_SAMPLED, min(1 << (self._rules.free_orders - 1), _CHUNK_PAGES))  # in which free blocks are whole
        step = max(all_pages // _SAMPLES // window, 1) * window
        walk = _Walk(self._source, self._rules, self._kernel.page_structs())
        pages = free = 0
        for low, high in self._memory:
            for start in range(low // window * window, high, step):
                end = min(start + window, self.max_pfn)
                present = self._present(start, end)
                pages += end - start if present is None else int(np.count_nonzero(present))
                free += walk.marked_free(start, end)
        excess = free / pages - counted / all_pages
        if excess > (_EXCESS_OF_ALL if step == window else _EXCESS_OF_SOME):
            self._keep_free(free / pages)

    def _keep_free(self, share: float) -> None:
        """Believe no mark of a free page any more, with such a share of memory marked."""
        assert self._rules is not None
        assert self._counted is not None
        self._unfinished = 0, None
        self._rules = self._rules._replace(free=False, buddy_type=None, unaccepted_type=None, free_orders=0)
        counts = f"the kernel counts {self._counted / self._pages():.0%}"
        self.findings.note(f"{share:.0%} of memory is marked free, but {counts}: free pages are kept")

    def conclude(self, classes: NDArray[np.int64]) -> bool:
        """Hold the free pages that were found against the kernel's count; far too many, and the next pass keeps them all."""
        if self._counted is None or self._rules is None or not self._rules.free:
            return False
        excess = int(classes[PageClass.FREE]) - self._counted
        if excess > self._pages() * _EXCESS_OF_ALL:
            self._keep_free(int(classes[PageClass.FREE]) / self._pages())
            return True
        if -excess > self._pages() * _EXCESS_OF_ALL:
            found, counted = int(classes[PageClass.FREE]), self._counted
            self.findings.note(f"{found:,} pages are marked free, but the kernel counts {counted:,}: the others are kept")
        return False

    def _pages(self) -> int:
        """How many pages of memory there are."""
        return sum(high - low for low, high in self._memory)

    def _cells(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield the chunks that have memory of [first, last), whole: they begin at multiples of a chunk's pages."""
        cell = 0
        for start, end in self._memory:
            cell = max(cell, max(start, first) // _CHUNK_PAGES)
            while max(cell * _CHUNK_PAGES, first) < min(end, last):
                yield cell * _CHUNK_PAGES, min((cell + 1) * _CHUNK_PAGES, self.max_pfn)
                cell += 1

    def _present(self, start: int, end: int) -> _Bool | None:
        """Tell which of the page frames [start, end) are memory; None when all are."""
        index = bisect_right(self._memory, (start, self.max_pfn)) - 1
        if index >= 0 and end <= self._memory[index][1]:
            return None
        present = np.zeros(end - start, np.bool_)
        for low, high in self._memory[max(index, 0) :]:
            if low >= end:
                break
            present[max(low - start, 0) : max(high - start, 0)] = True
        return present


def _page_ranges(source: Source) -> list[tuple[int, int]]:
    """Return the page frames that hold memory, as ascending ranges that do not touch; a part of a page is enough."""
    ranges: list[tuple[int, int]] = []
    for each in source.memory:
        first, last = each.start // source.page_size, -(-each.end // source.page_size)
        if ranges and first <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], last
        else:
            ranges.append((first, last))
    return ranges


def _counted_free(kernel: DeadKernel, byteorder: ByteOrder) -> int | None:
    """Return how many free pages the kernel counts in all its zones, None when it cannot be asked.

    What each CPU has not added to the counts yet is left out, at most 125 pages of a zone (`mm/vmstat.c`).
    """
    info = kernel.info

    def numbers(vaddr: int, count: int, size: int) -> list[int]:
        data = kernel.read(vaddr, count * size)
        return [int.from_bytes(data[at : at + size], byteorder) for at in range(0, len(data), size)]

    try:
        zones, number = info.offset("pglist_data.node_zones"), info.offset("pglist_data.nr_zones")
        counter = info.offset("zone.vm_stat") + 8 * info.number("NR_FREE_PAGES")
        free = 0
        for node in numbers(info.symbol("node_data"), min(info.length("node_data"), _MOST_NODES), 8):
            (count,) = numbers(node + number, 1, 4) if node else (0,)
            for index in range(min(count, _MOST_ZONES)):
                free += numbers(node + zones + index * info.size("zone") + counter, 1, 8)[0]
    except CrashkernelError:
        return None
    return free


class _Walk:
    """One pass over page structs, chunk after chunk in ascending order. A chunk begins at a multiple of its pages.

    So a block either lies in one chunk or consists of whole ones, and of what came before a chunk only such a block matters.
    """

    def __init__(self, source: Source, rules: _Rules, runs: Iterator[PageStructs]) -> None:
        self.findings = _Findings()
        self._source = source
        self._rules = rules
        self._array = _Array(runs, rules.size)
        self._judge = _Judge(rules, self.findings, _CHUNK_PAGES)
        self._buffer = np.empty(_CHUNK_PAGES * rules.size, np.uint8)
        self._block = _Block()
        self._half, self._large = rules.sampled_pages()
        self._step = 0  # what the next chunk is sampled by, 0 if it is read as it is
        self._covered = 0, 0  # pages of this chunk in blocks of half and of large ones at least
        pairs = _CHUNK_PAGES // self._half
        self._pair_judge = _Judge(rules, _Findings(), pairs)  # for first pages alone: what is wrong there shows with the others
        self._pairs = np.empty(2 * rules.size * pairs, np.uint8)

    def begin(self, start: int, present: Callable[[int, int], _Bool | None]) -> None:
        """Find the block that the page frame `start`, where a chunk begins, lies in but does not begin.

        Its first page can only be where a block of a size that would reach this far is aligned.
        """
        size = self._rules.size
        orders = range(self._rules.largest_order(), 0, -1)
        for first in sorted({start & -(1 << order) for order in orders} - {start}):
            pieces = self._array.pieces(first, first + 2)
            if len(pieces) != 1 or pieces[0][1] - pieces[0][0] != 2 or not self._read(pieces[0][2], self._pairs[: 2 * size]):
                continue
            page_class, pages = self._judge_pair(self._pairs[: 2 * size], first, present(first, first + 1))
            if first + pages > start:
                self._block = _Block(first + pages, page_class)
                return

    def _judge_pair(self, pair: _U8, pfn: int, present: _Bool | None) -> tuple[int, int]:
        """Return the class of one page, and how many it decides for; `pair` is its struct and the one after it."""
        self._pair_judge.load(pair, len(pair), 0)
        classes, _, sizes = self._pair_judge.own_classes(pair, pfn, 2, present)
        return int(classes[0]), int(sizes[0]) if len(sizes) else 1

    def classes(self, start: int, end: int, present: _Bool | None) -> _U8:
        """Return the class of each page frame of the chunk [start, end)."""
        if self._block.end > start:
            return np.full(end - start, self._block.page_class, np.uint8)
        pieces = self._array.pieces(start, end)
        if sum(high - low for low, high, _ in pieces) < end - start:
            self.findings.structless += _without_struct(start, end, pieces, present)
        if not pieces:
            return np.zeros(end - start, np.uint8)
        self._covered = 0, 0
        if self._step and (end - start) % self._step == 0:
            classes = self._sampled(start, end, pieces, present, self._step)
        else:
            classes = self._stretch(start, end, pieces, present)
        # Free memory and huge pages come in clusters: what most of a chunk is in, the next one is looked for.
        half, large = (2 * each >= end - start for each in self._covered)
        self._step = self._large if large else self._half if half else 0
        return classes

    def marked_free(self, start: int, end: int) -> int:
        """Return how many pages are in free blocks that begin in [start, end), going by their marks alone."""
        rules, size = self._rules, self._rules.size
        structs = self._buffer[: (end - start) * size]
        self._fill(structs, start, end, self._array.pieces(start, end))
        marked = np.flatnonzero(structs.view(np.uint32).reshape(-1, size // 4)[:, rules.mapcount] == rules.buddy_type)
        orders = structs.view(np.uint64).reshape(-1, size // 8)[marked, rules.private]
        orders = orders.byteswap() if rules.swapped else orders
        return int((1 << orders[orders < rules.free_orders].astype(np.int64)).sum())

    def _cover(self, sizes: _Index) -> None:
        """Count blocks of so many pages each."""
        half, large = self._covered
        self._covered = half + int(sizes[sizes >= self._half].sum()), large + int(sizes[sizes >= self._large].sum())

    def _sampled(self, start: int, end: int, pieces: list[_Piece], present: _Bool | None, step: int) -> _U8:
        """Judge a chunk by its pages at multiples of `step`, and by all pages only where these do not decide for so many."""
        blocks = self._sample(start, end, pieces, present, step)
        classes = np.repeat(blocks, step)
        for low, high in _gaps(blocks):
            some = slice(low * step, high * step)
            within = _clip(pieces, start + some.start, start + some.stop, self._rules.size)
            classes[some] = self._stretch(
                start + some.start, start + some.stop, within, None if present is None else present[some]
            )
        return classes

    def _stretch(self, start: int, end: int, pieces: list[_Piece], present: _Bool | None) -> _U8:
        """Judge all pages of [start, end), none of which is in a block that begins before."""
        size = self._rules.size
        structs = self._buffer[: (end - start) * size]
        for first in range(start, end, _READ_PAGES):
            last = min(first + _READ_PAGES, end)
            some = structs[(first - start) * size : (last - start) * size]
            self._fill(some, first, last, pieces)
            self._judge.load(some, size, first - start)
        self._clear_damage(structs, start, present)
        classes, places, sizes = self._judge.own_classes(structs, start, 1, present)
        if len(places):
            self._cover(sizes)
            reach = _spread(classes, places, sizes, classes[places])
            if start + reach > end:
                self._block = _Block(start + reach, int(classes[-1]))
        return classes

    def _fill(self, structs: _U8, start: int, end: int, pieces: list[_Piece]) -> None:
        """Read the structs of [start, end); where there are none zeros stand, which say nothing of a page."""
        size = self._rules.size
        position = start
        for low, high, paddr in _clip(pieces, start, end, size):
            structs[(position - start) * size : (low - start) * size] = 0
            target = structs[(low - start) * size : (high - start) * size]
            if not self._read(paddr, target):
                target[:] = 0
                self.findings.unreadable += high - low
            position = high
        structs[(position - start) * size :] = 0

    def _sample(self, start: int, end: int, pieces: list[_Piece], present: _Bool | None, step: int) -> _U8:
        """Judge the pages of [start, end) at multiples of `step`: the class where one decides for so many, 0 for the others."""
        size = self._rules.size
        count = (end - start) // step
        pairs = self._pairs[: 2 * size * count]
        at = 0
        for index in range(count):
            first = start + index * step
            while at < len(pieces) and pieces[at][1] <= first:
                at += 1
            target = pairs[2 * size * index : 2 * size * (index + 1)]
            inside = at < len(pieces) and pieces[at][0] <= first and first + 2 <= pieces[at][1]
            if not inside or not self._read(pieces[at][2] + (first - pieces[at][0]) * size, target):
                target[:] = 0
        self._pair_judge.load(pairs, 2 * size, 0)
        classes, places, sizes = self._pair_judge.own_classes(pairs, start, step, None if present is None else present[::step])
        large = sizes >= step
        blocks = np.zeros(count, np.uint8)
        if large.any():
            self._cover(sizes[large])
            places = places[large]
            reach = _spread(blocks, places, sizes[large] // step, classes[places])
            if reach > count:
                self._block = _Block(start + reach * step, int(blocks[-1]))
        return blocks

    def _clear_damage(self, structs: _U8, start: int, present: _Bool | None) -> None:
        """Put zeros, which say nothing of a page, where the page array has been overwritten.

        Nothing but damage makes reference counts negative: of random ones every other is. (-1 is what is written over structs
        that were never set up, PAGE_POISON_PATTERN in `include/linux/page-flags.h`.)
        """
        rules, step = self._rules, self._half
        if rules.refcount is None:
            return
        words = structs.view(np.uint32).reshape(-1, rules.size // 4)
        counts = words[:: step // _PROBES, rules.refcount]
        if not (counts & rules.sign).any():
            return
        negative = (counts & rules.sign != 0) & (counts != np.uint32(0xFFFF_FFFF))
        for index in range(-(-len(counts) // _PROBES)):
            if np.count_nonzero(negative[index * _PROBES : (index + 1) * _PROBES]) < _DAMAGED_PROBES:
                continue
            low = index * step
            pair = structs[low * rules.size : (low + 2) * rules.size]
            if len(pair) == 2 * rules.size:
                _, pages = self._judge_pair(pair, start + low, None if present is None else present[low : low + 1])
                if pages >= step:  # with a first page that decides for all, sampling would not have looked at the others
                    continue
            if not self.findings.damaged:
                self.findings.first_damaged = start + low
            damaged = words[low : low + step]
            self.findings.damaged += len(damaged)
            damaged[:] = 0
            self._judge.load(damaged.reshape(-1).view(np.uint8), rules.size, low)

    def _read(self, paddr: int, into: _U8) -> bool:
        try:
            self._source.read_into(paddr, into)
        except CrashkernelError:
            return False
        return True


def _clip(pieces: list[_Piece], start: int, end: int, size: int) -> list[_Piece]:
    """Return what of the pieces is in [start, end)."""
    return [
        (max(low, start), min(high, end), paddr + max(start - low, 0) * size)
        for low, high, paddr in pieces
        if low < end and start < high
    ]


def _gaps(blocks: _U8) -> Iterator[tuple[int, int]]:
    """Yield the ranges of places where there is 0."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], blocks == 0, [0]))))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _without_struct(start: int, end: int, pieces: list[_Piece], present: _Bool | None) -> int:
    """Return how many page frames of [start, end) are memory and have no struct."""
    lacking = np.ones(end - start, np.bool_) if present is None else present.copy()
    for low, high, _ in pieces:
        lacking[low - start : high - start] = False
    return int(np.count_nonzero(lacking))
