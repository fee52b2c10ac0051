"""Builds page structs as kernels of many years have them, and says with a plain loop what a filter must make of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from crashkernel.capture.selection import DL_CACHE, DL_CACHE_PRIVATE, DL_FREE, DL_USER, PageClass
from crashkernel.errors import FormatError
from crashkernel.formats.vmcoreinfo import VmcoreInfo
from crashkernel.memory import Range, RangeSet
from crashkernel.vmcore.kernel import PageStructs
from crashkernel.vmcore.source import MissingMemory

STRUCTS_AT = 1 << 40  # where the fake machine keeps its page structs: apart from the memory that they describe
ZONES_AT = 0xC000_0000_0000_0000
UNMAPPED = 0xFFFFFFFF  # _mapcount of a page that nobody maps


@dataclass(frozen=True)
class Era:
    """What a struct page is like in kernels of some years, and how they tell it."""

    name: str
    size: int = 64
    flags: int = 0
    head_info: int = 8  # compound_head or compound_info
    mapping: int = 24
    private: int = 40
    mapcount: int = 48
    refcount: int = 52
    second_order: int | None = None  # byte offset in the struct of the page after; None: lowest byte of its flags
    second_kind: int | None = None  # likewise of the destructor's number
    bits: dict[str, int] = field(
        default_factory=lambda: {
            "lru": 4,
            "private": 13,
            "swapcache": 10,
            "swapbacked": 19,
            "slab": 9,
            "hwpoison": 22,
            "head": 16,
        }
    )
    hugetlb_bit: int | None = None
    types: dict[str, int] = field(default_factory=lambda: {"BUDDY": -129, "OFFLINE": -257})
    info: str = ""  # lines of VMCOREINFO that are this era's own

    def vmcoreinfo(self, page_size: int, free_orders: int) -> str:
        bits = self.bits
        lines = [
            "OSRELEASE=" + self.name,
            f"PAGESIZE={page_size}",
            f"SIZE(page)={self.size}",
            f"OFFSET(page.flags)={self.flags}",
            f"OFFSET(page._refcount)={self.refcount}",
            f"OFFSET(page.mapping)={self.mapping}",
            f"OFFSET(page._mapcount)={self.mapcount}",
            f"OFFSET(page.private)={self.private}",
            f"LENGTH(zone.free_area)={free_orders}",
            *(f"NUMBER(PG_{name})={bits[name]}" for name in bits if name != "head"),
            f"NUMBER(PG_head_mask)={1 << bits['head']}",
            *(f"NUMBER(PAGE_{name}_MAPCOUNT_VALUE)={value}" for name, value in self.types.items()),
            "SYMBOL(node_data)=c000000000000000",
            "LENGTH(node_data)=4",
            "OFFSET(pglist_data.node_zones)=0",
            "OFFSET(pglist_data.nr_zones)=4096",
            "SIZE(zone)=1024",
            "OFFSET(zone.vm_stat)=512",
            "NUMBER(NR_FREE_PAGES)=0",
        ]
        return "\n".join(lines) + "\n" + self.info


_BITS_6_10 = {"lru": 5, "private": 14, "swapcache": 10, "swapbacked": 17, "hwpoison": 21, "head": 6}
_TYPES_6_12 = {"BUDDY": -268435456, "OFFLINE": -251658240, "SLAB": -184549376, "HUGETLB": -201326592}
_HEAD = "OFFSET(page.compound_head)=8\n"

ERA_5_10 = Era(
    "5.10",
    second_order=17,
    second_kind=16,
    info=_HEAD + "OFFSET(page.compound_dtor)=16\nOFFSET(page.compound_order)=17\nNUMBER(HUGETLB_PAGE_DTOR)=2\n",
)
ERA_6_3 = replace(
    ERA_5_10,
    name="6.3",
    info=_HEAD + "OFFSET(folio._folio_dtor)=80\nOFFSET(folio._folio_order)=81\nNUMBER(HUGETLB_PAGE_DTOR)=2\n",
)
ERA_6_6 = Era("6.6", hugetlb_bit=8, info=_HEAD + "NUMBER(PG_hugetlb)=8\n")
ERA_6_9 = Era("6.9", types={"BUDDY": -129, "OFFLINE": -257, "HUGETLB": -2049}, info=_HEAD)
ERA_6_10 = Era("6.10", bits=_BITS_6_10, types={"BUDDY": -129, "OFFLINE": -257, "SLAB": -4097, "HUGETLB": -2049}, info=_HEAD)
ERA_6_16 = Era("6.16", bits=_BITS_6_10, types={**_TYPES_6_12, "UNACCEPTED": -117440512}, info=_HEAD)
ERA_7_1 = Era("7.1", bits=_BITS_6_10, types=_TYPES_6_12, info="OFFSET(page.compound_info)=8\n")
ERA_WIDE = replace(ERA_6_16, name="6.16-wide", size=80, private=48, mapcount=56, refcount=60)
ERAS = (ERA_5_10, ERA_6_3, ERA_6_6, ERA_6_9, ERA_6_10, ERA_6_16, ERA_7_1, ERA_WIDE)


class PageArray:
    """Page structs of page frames 0 and up, in a kernel's own layout; all begin as a used page of no class."""

    def __init__(self, era: Era, pages: int, byteorder: str = "little", page_size: int = 4096, free_orders: int = 11) -> None:
        self.era = era
        self.pages = pages
        self.byteorder = byteorder
        self.page_size = page_size
        self.free_orders = free_orders
        self.data = np.zeros((pages, era.size), np.uint8)
        for pfn in range(min(pages, 1)):
            self.put(pfn, era.mapcount, 4, UNMAPPED)
            self.put(pfn, era.refcount, 4, 1)
        self.data[:] = self.data[:1]

    # ------------------------------------------------------------------------------------------------- single members

    def put(self, pfn: int, offset: int, size: int, value: int) -> None:
        raw = (value & ((1 << 8 * size) - 1)).to_bytes(size, self.byteorder)
        self.data[pfn, offset : offset + size] = np.frombuffer(raw, np.uint8)

    def get(self, pfn: int, offset: int, size: int) -> int:
        return int.from_bytes(self.data[pfn, offset : offset + size].tobytes(), self.byteorder)

    def flag(self, pfn: int, *names: str) -> None:
        for name in names:
            self.put(pfn, self.era.flags, 8, self.get(pfn, self.era.flags, 8) | 1 << self.era.bits[name])

    def map(self, pfn: int, mapping: int) -> None:
        self.put(pfn, self.era.mapping, 8, mapping)

    def type(self, pfn: int, name: str) -> None:
        self.put(pfn, self.era.mapcount, 4, self.era.types[name])

    # ----------------------------------------------------------------------------------------------------- what pages are

    def free(self, pfn: int, order: int) -> None:
        """A free block. What its other pages were before is still in their structs."""
        self.type(pfn, "BUDDY")
        self.put(pfn, self.era.private, 8, order)
        self.put(pfn, self.era.refcount, 4, 0)

    def compound(self, pfn: int, order: int) -> None:
        """A compound page of nothing in particular."""
        era = self.era
        self.flag(pfn, "head")
        if era.second_order is not None:
            self.put(pfn + 1, era.second_order, 1, order)
        else:
            self.put(pfn + 1, era.flags, 8, self.get(pfn + 1, era.flags, 8) & ~0xFF | order)
        head = np.frombuffer((0xC00C_0000_0000_0000 + pfn * era.size + 1).to_bytes(8, self.byteorder), np.uint8)
        self.data[pfn + 1 : pfn + (1 << order), era.head_info : era.head_info + 8] = head

    def hugetlb(self, pfn: int, order: int) -> None:
        self.compound(pfn, order)
        if "HUGETLB" in self.era.types:
            self.type(pfn, "HUGETLB")
        elif self.era.hugetlb_bit is not None:
            self.put(pfn + 1, self.era.flags, 8, self.get(pfn + 1, self.era.flags, 8) | 1 << self.era.hugetlb_bit)
        else:
            assert self.era.second_kind is not None
            self.put(pfn + 1, self.era.second_kind, 1, 2)

    def cache(self, pfn: int, private: bool = False) -> None:
        self.flag(pfn, "lru", *(["private"] if private else []))
        self.map(pfn, 0xC000_0000_1234_5670)

    def anon(self, pfn: int, listed: bool = True) -> None:
        self.map(pfn, 0xC000_0000_1234_5671)
        if listed:
            self.flag(pfn, "lru", "swapbacked")

    def swapcache(self, pfn: int) -> None:
        """Shared memory on its way to or from swap, on no list."""
        self.flag(pfn, "swapcache", "swapbacked")

    def slab(self, pfn: int) -> None:
        """What a slab has where other pages have `mapping` is anything."""
        self.map(pfn, 0xFFFF_FFFF_FFFF_FFFF)
        if "SLAB" in self.era.types:
            self.type(pfn, "SLAB")
        else:
            self.flag(pfn, "slab")

    # ------------------------------------------------------------------------------------------------ what must come of it

    def expected(self, level: int, memory: Sequence[tuple[int, int]] | None = None) -> np.ndarray:
        """The class of each page at a dump level, by one loop over the pages that jumps over blocks."""
        memory = [(0, self.pages)] if memory is None else memory
        present = np.zeros(self.pages, bool)
        for first, last in memory:
            present[first:last] = True
        classes = np.zeros(self.pages, np.uint8)
        pfn = 0
        while pfn < self.pages:
            page_class, order = self._own(pfn, level) if present[pfn] else (PageClass.KEPT, 0)
            pages = 1 << order if page_class is not PageClass.KEPT else 1
            classes[pfn : pfn + pages] = page_class
            pfn += pages
        classes[~present] = PageClass.ABSENT
        return classes

    def _own(self, pfn: int, level: int) -> tuple[PageClass, int]:
        era = self.era
        flags, count = self.get(pfn, era.flags, 8), self.get(pfn, era.mapcount, 4)

        def has(name: str) -> bool:
            return name in era.bits and bool(flags >> era.bits[name] & 1)

        def typed(name: str) -> bool:
            return name in era.types and count == era.types[name] & 0xFFFFFFFF

        page_class, order = PageClass.KEPT, 0
        slab = typed("SLAB") or has("slab")
        anon = bool(self.get(pfn, era.mapping, 8) & 1) and not slab
        cache = has("lru") or (has("swapcache") and has("swapbacked"))
        compound_order, hugetlb = self._compound(pfn) if has("head") and pfn + 1 < self.pages else (0, False)
        if self.get(pfn, era.head_info, 8) & 1:
            pass  # a tail
        elif level & DL_FREE and not slab and (typed("BUDDY") or typed("UNACCEPTED")):
            order = self.free_orders - 1 if typed("UNACCEPTED") else self.get(pfn, era.private, 8)
            if order < self.free_orders and pfn % (1 << order) == 0:
                page_class = PageClass.FREE
        elif cache and not anon and level & (DL_CACHE_PRIVATE | (0 if has("private") else DL_CACHE)):
            page_class, order = (PageClass.CACHE_PRIVATE if has("private") else PageClass.CACHE), compound_order
        elif level & DL_USER and (anon or hugetlb):
            page_class, order = PageClass.USER, compound_order
        elif has("hwpoison"):
            page_class, order = PageClass.POISONED, compound_order
        elif typed("OFFLINE") and not slab:
            page_class, order = PageClass.OFFLINE, compound_order
        return page_class, order

    def _compound(self, pfn: int) -> tuple[int, bool]:
        era = self.era
        second = self.get(pfn + 1, era.flags, 8)
        order = second & 0xFF if era.second_order is None else self.get(pfn + 1, era.second_order, 1)
        if order > ((1 << 34) // self.page_size).bit_length() - 1 or pfn % (1 << order):
            order = 0
        if "HUGETLB" in era.types:
            return order, self.get(pfn, era.mapcount, 4) == era.types["HUGETLB"] & 0xFFFFFFFF
        if era.hugetlb_bit is not None:
            return order, bool(second >> era.hugetlb_bit & 1)
        return order, era.second_kind is not None and self.get(pfn + 1, era.second_kind, 1) == 2


class DeadMachine:
    """A kernel and the source of its memory in one. `memory` are ranges of page frames; their structs lie in runs of `run`.

    Between runs there is a gap of three pages. `unreadable` is a range of page frames whose structs are not in the dump.
    """

    name = "fake"
    machine = 21
    notes = b""

    def __init__(
        self,
        array: PageArray,
        memory: Sequence[tuple[int, int]] | None = None,
        run: int | None = None,
        info: str | None = None,
        counted_free: int | None = None,
        unreadable: tuple[int, int] | None = None,
    ) -> None:
        self.array = array
        self.doubts: list[str] = []
        self.page_size = array.page_size
        self.byteorder = array.byteorder
        text = info if info is not None else array.era.vmcoreinfo(array.page_size, array.free_orders)
        self.info = self.vmcoreinfo = VmcoreInfo.from_bytes(text.encode())
        ranges = [(0, array.pages)] if memory is None else memory
        self.memory = RangeSet(Range(low * self.page_size, high * self.page_size) for low, high in ranges)
        self.run = run or max(array.pages, 1)
        self.counted_free = counted_free
        self.unreadable = unreadable
        self.reads: list[tuple[int, int]] = []  # page frame, structs
        self.gaps: list[tuple[int, int]] = []  # page frames that no run names
        self._flat = array.data.reshape(-1)

    def page_structs(self, first: int = 0) -> Iterator[PageStructs]:
        size = self.array.era.size
        for number, begin in enumerate(range(0, self.array.pages, self.run)):
            last = min(begin + self.run, self.array.pages)
            if last <= first or any(low <= begin and last <= high for low, high in self.gaps):
                continue
            yield PageStructs(begin, last - begin, STRUCTS_AT + begin * size + 3 * number * self.page_size)

    def read_into(self, paddr: int, into: np.ndarray) -> None:
        size = self.array.era.size
        number, at = divmod(paddr - STRUCTS_AT, self.run * size + 3 * self.page_size)
        pfn, count = number * self.run + at // size, len(into) // size
        self.reads.append((pfn, count))
        low, high = self.unreadable or (0, 0)
        if at % size or not number * self.run <= pfn <= pfn + count <= min((number + 1) * self.run, self.array.pages):
            raise MissingMemory(paddr, len(into))
        if pfn < high and low < pfn + count:
            raise MissingMemory(paddr, len(into))
        into[:] = self._flat[pfn * size : pfn * size + len(into)]

    def read(self, vaddr: int, size: int) -> bytes:
        """The zones: one node with two of them; the count of free pages in both together."""
        if self.counted_free is None:
            raise FormatError("not mapped")
        words = {0: ZONES_AT + 0x10000, 0x10000 + 4096: 2, 0x10200: 3, 0x10600: self.counted_free - 3}
        step = 4 if size == 4 else 8
        return b"".join(words.get(vaddr - ZONES_AT + at, 0).to_bytes(step, self.byteorder) for at in range(0, size, step))
