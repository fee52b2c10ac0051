"""What each page of K1 was, decided from the truth: whether a dump may lack it is held against this.

It shares nothing with `capture`'s filter but the parser of VMCOREINFO's lines, and where there is another way to know, it takes
that: free pages are those on the buddy allocator's own lists, not those that are marked as such; a part of a compound page
asks the head it points to, it is not told by the head how far that reaches; all of memory lies here at once, and is
looked at as one array. It answers with every class a page may be taken for.

References: `include/linux/page-flags.h`, `include/linux/mmzone.h` (`struct zone`, `struct free_area`), `mm/sparse.c`
(`sparse_encode_mem_map`), `Documentation/admin-guide/kdump/vmcoreinfo.rst`; of ppc64 `arch/powerpc/mm/init_64.c`
(`vmemmap_list_populate`) and `arch/powerpc/include/asm/book3s/64/radix.h` (the tree of the radix MMU).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntFlag
from typing import TYPE_CHECKING

import numpy as np

from crashkernel.errors import VerificationError
from crashkernel.formats.vmcoreinfo import VmcoreInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crashkernel.formats.elf import ByteOrder


class May(IntFlag):
    """What a page may be called, as bits: a page of zeros that is free is both."""

    ZERO = 1
    CACHE = 2
    CACHE_PRIVATE = 4
    USER = 8
    FREE = 16
    POISONED = 32
    OFFLINE = 64


def droppable(level: int) -> May:
    """What a dump level lets a dump lack (`makedumpfile(8)`, option -d)."""
    allowed = May.POISONED
    if level:
        allowed |= May.OFFLINE
    allowed |= May(level & (May.ZERO | May.CACHE | May.CACHE_PRIVATE | May.USER | May.FREE))
    if level & May.CACHE_PRIVATE:
        allowed |= May.CACHE
    return allowed


_LINEAR = 0xC000000000000000
_ANONYMOUS = 1  # PAGE_MAPPING_ANON, include/linux/page-flags.h
_TAIL = 1
_ENTRY_PRESENT, _ENTRY_LEAF = 1 << 63, 1 << 62  # _PAGE_PRESENT, _PAGE_PTE
_LEAF_ADDRESS, _TABLE_ADDRESS = 0x01FFFFFFFFFFF000, 0x0FFFFFFFFFFFFF00  # RPN and RPDB, Power ISA Book III 6.7.10
_LONGEST_LIST = 1 << 24
_PAGE_ALIGNED_FLAGS = 0x3F  # of mem_section.section_mem_map: struct pages are aligned to 64 bytes


class Oracle:
    """The pages of one dead kernel. `memory` is all of its RAM, by physical address."""

    def __init__(self, memory: NDArray[np.uint8], info: VmcoreInfo, byteorder: ByteOrder) -> None:
        """Find the struct pages.

        :raise VerificationError: the memory does not hold together.
        :raise FormatError: VMCOREINFO lacks what is needed.
        """
        self._memory = memory
        self._info = info
        self._order = "<" if byteorder == "little" else ">"
        self._byteorder = byteorder
        self.page_size = info.page_size
        self.pages = len(memory) // self.page_size
        self._struct = info.size("page")
        self._vmemmap = self._backing()
        self._table, self._known, self._first = self._struct_pages()

    # -- K1's virtual addresses

    def _word(self, vaddr: int, size: int = 8) -> int:
        paddr = self._physical(vaddr)
        if paddr + size > len(self._memory):
            raise VerificationError(f"the truth ends before what K1 had at {vaddr:#x}")
        return int.from_bytes(self._memory[paddr : paddr + size].tobytes(), self._byteorder)

    def _physical(self, vaddr: int) -> int:
        paddr = vaddr - _LINEAR
        if 0 <= paddr < len(self._memory):
            return paddr
        found = self._in_tree(vaddr)
        if found is None:
            found = next((paddr + vaddr - start for start, paddr, size in self._vmemmap if 0 <= vaddr - start < size), None)
        if found is None:
            raise VerificationError(f"K1's {vaddr:#x} is mapped nowhere")
        return found

    def _in_tree(self, vaddr: int) -> int | None:
        """Where the radix MMU's tree has an address; None if it has it not, as on the hash MMU."""
        table = self._info.symbol("swapper_pg_dir") - _LINEAR
        shift = 52
        for bits in (13, 9, 9, 5 if self.page_size == 0x10000 else 9):
            shift -= bits
            at = table + (vaddr >> shift & (1 << bits) - 1) * 8
            if not 0 <= at <= len(self._memory) - 8:
                return None
            entry = int.from_bytes(self._memory[at : at + 8].tobytes(), "big")
            if not entry & _ENTRY_PRESENT:
                return None
            if entry & _ENTRY_LEAF:
                return (entry & _LEAF_ADDRESS & -(1 << shift)) + (vaddr & (1 << shift) - 1)
            table = entry & _TABLE_ADDRESS
        return None

    def _backing(self) -> list[tuple[int, int, int]]:
        """The pieces of the page array where no tree has them (the hash MMU): virtual, physical, size in bytes."""
        info = self._info
        pieces: list[tuple[int, int, int]] = []
        if "SYMBOL(vmemmap_list)" not in info:
            return []
        kind = self._word_at(info.symbol("mmu_vmemmap_psize"), 4)
        shift = self._word_at(
            info.symbol("mmu_psize_defs") + kind * info.size("mmu_psize_def") + info.offset("mmu_psize_def.shift"), 4
        )
        node = self._word_at(info.symbol("vmemmap_list"))
        while node and len(pieces) < _LONGEST_LIST:
            virtual, paddr = (self._word_at(node + info.offset(f"vmemmap_backing.{name}")) for name in ("virt_addr", "phys"))
            pieces.append((virtual, paddr, 1 << shift))
            node = self._word_at(node + info.offset("vmemmap_backing.list"))
        return pieces

    def _word_at(self, vaddr: int, size: int = 8) -> int:
        paddr = vaddr - _LINEAR
        return int.from_bytes(self._memory[paddr : paddr + size].tobytes(), self._byteorder)

    # -- the struct pages

    def _struct_pages(self) -> tuple[NDArray[np.uint64], NDArray[np.bool_], int]:
        """All of them as rows of 64-bit words, which of them exist, and the virtual address of the first."""
        info = self._info
        each = 1 << info.number("SECTION_SIZE_BITS")
        per_section = each // self.page_size
        roots, size = info.symbol("mem_section"), info.size("mem_section")
        per_root = self.page_size // size
        table = np.zeros((self.pages, self._struct // 8), np.uint64)
        known = np.zeros(self.pages, np.bool_)
        bases = set()
        for number in range(-(-len(self._memory) // each)):
            root = self._word(roots + number // per_root * 8)
            encoded = self._word(root + number % per_root * size) if root else 0
            if not encoded & 2:  # SECTION_HAS_MEM_MAP
                continue
            base = encoded & ~_PAGE_ALIGNED_FLAGS
            bases.add(base)
            first = number * per_section
            raw = self._read(base + first * self._struct, per_section * self._struct)
            rows = np.frombuffer(raw, f"{self._order}u8").reshape(per_section, -1)[: self.pages - first]
            table[first : first + len(rows)] = rows
            known[first : first + len(rows)] = True
        if len(bases) != 1:
            raise VerificationError(f"K1's memory sections have {len(bases)} page arrays, not one")
        return table, known, bases.pop()

    def _read(self, vaddr: int, size: int) -> bytes:
        parts = []
        while size:
            some = min(size, 4096 - vaddr % 4096)
            paddr = self._physical(vaddr)
            parts.append(self._memory[paddr : paddr + some].tobytes())
            vaddr, size = vaddr + some, size - some
        return b"".join(parts)

    def _field(self, rows: NDArray[np.uint64], name: str, kind: str) -> NDArray[np.int64]:
        """A field of struct pages, by its name in VMCOREINFO."""
        return self._at(rows, self._info.offset(f"page.{name}"), kind)

    def _at(self, rows: NDArray[np.uint64], offset: int, kind: str) -> NDArray[np.int64]:
        words = np.dtype(f"{self._order}{kind}")
        raw = rows.astype(f"{self._order}u8").view(np.uint8).reshape(len(rows), -1)
        return raw[:, offset : offset + words.itemsize].copy().view(words).reshape(-1).astype(np.int64)

    def _heads(self) -> NDArray[np.int64]:
        """Of each page, the number of the page that stands for it: its compound page's head, else itself.

        :raise VerificationError: a tail points to no page.
        """
        numbers = np.arange(self.pages)
        # up to 6.x a pointer to the head; in 7.x, where a struct page's size allows it, a mask of its own address
        name = "compound_head" if "OFFSET(page.compound_head)" in self._info else "compound_info"
        link = self._field(self._table, name, "u8").astype(np.uint64)
        own = np.uint64(self._first) + (numbers * self._struct).astype(np.uint64)
        tail = self._known & np.not_equal(link & np.uint64(_TAIL), 0)
        first, end = np.uint64(self._first), np.uint64(self._first + self.pages * self._struct)
        target = np.where((link >= first) & (link < end), link - np.uint64(_TAIL), own & link)
        # what is neither wraps around, far beyond the last page
        head = np.where(tail, (target - first).astype(np.int64) // self._struct, numbers)
        if (head < 0).any() or (head > numbers).any() or (tail & tail[np.clip(head, 0, self.pages - 1)]).any():
            raise VerificationError("parts of K1's compound pages point to no head")
        return head

    def _types(self, rows: NDArray[np.uint64], value: int) -> NDArray[np.bool_]:
        """Which have this page type. From 6.11 on it is one byte (`enum pagetype`), before it was bits that are cleared."""
        counts = self._field(rows, "_mapcount", "i4")
        if value & 0xFFFFFF == 0:
            counts, value = counts >> 24, value >> 24
        same: NDArray[np.bool_] = counts == value
        return same

    # -- the answer

    def free(self) -> NDArray[np.bool_]:
        """The pages on the buddy allocator's lists: of every node, zone, order and migrate type.

        :raise VerificationError: a list does not close, or leaves the page array.
        """
        info = self._info
        free = np.zeros(self.pages, np.bool_)
        orders, types = info.length("zone.free_area"), info.length("free_area.free_list")
        for zone in self._zones():
            for order in range(orders):
                area = zone + info.offset("zone.free_area") + order * info.size("free_area")
                for kind in range(types):
                    head = area + info.offset("free_area.free_list") + kind * info.size("list_head")
                    for page in self._list(head):
                        free[page : page + (1 << order)] = True
        return free

    def _zones(self) -> Iterator[int]:
        info = self._info
        if "SYMBOL(node_data)" in info:
            nodes = [self._word(info.symbol("node_data") + number * 8) for number in range(info.length("node_data"))]
        else:
            nodes = [info.symbol("contig_page_data")]
        for node in filter(None, nodes):
            count = self._word(node + info.offset("pglist_data.nr_zones"), 4)
            for number in range(count):
                yield node + info.offset("pglist_data.node_zones") + number * info.size("zone")

    def _list(self, head: int) -> Iterator[int]:
        """The numbers of the pages on a list that hangs by `page.lru`."""
        lru, following = self._info.offset("page.lru"), self._info.offset("list_head.next")
        entry = self._word(head + following)
        for _ in range(_LONGEST_LIST):
            if entry == head:
                return
            number, rest = divmod(entry - lru - self._first, self._struct)
            if rest or not 0 <= number < self.pages or not self._known[number]:
                raise VerificationError(f"a list of K1's free pages leads to {entry:#x}, which is no page")
            yield number
            entry = int(self._table[number, (lru + following) // 8])
        raise VerificationError("a list of K1's free pages has no end")

    def may_be(self) -> NDArray[np.uint8]:
        """Of each page the classes it may be taken for, `May` bits; none for what must be in every dump.

        Whether a page is all zeros is not among them: who reads its bytes knows.
        """
        info, rows, head = self._info, self._table, self._heads()
        flags, mapping = (self._field(rows, name, "u8")[head] for name in ("flags", "mapping"))

        def has(name: str) -> NDArray[np.bool_]:
            return (flags >> info.number(name) & 1).astype(np.bool_)

        buddy = self._types(rows, info.number("PAGE_BUDDY_MAPCOUNT_VALUE"))
        offline = self._types(rows, info.number("PAGE_OFFLINE_MAPCOUNT_VALUE"))
        slab = self._types(rows, info.number("PAGE_SLAB_MAPCOUNT_VALUE"))[head] if self._typed("SLAB") else has("PG_slab")
        anonymous = (mapping & _ANONYMOUS != 0) & ~slab & ~buddy & ~offline
        cache = (has("PG_lru") | has("PG_swapcache") & has("PG_swapbacked")) & ~anonymous & ~slab & ~buddy & ~offline
        private = has("PG_private")
        free = self.free()

        answer = np.zeros(self.pages, np.uint8)
        own_flags = self._field(rows, "flags", "u8")
        for which, bit in (
            (cache & ~private, May.CACHE),
            (cache & private, May.CACHE_PRIVATE),
            (anonymous | self._hugetlb(head), May.USER),
            (free, May.FREE),
            (offline & ~slab, May.OFFLINE),
            (own_flags >> info.number("PG_hwpoison") & 1 != 0, May.POISONED),
        ):
            answer[which & self._known] |= np.uint8(bit)
        return answer

    def _typed(self, name: str) -> bool:
        return f"NUMBER(PAGE_{name}_MAPCOUNT_VALUE)" in self._info

    def _hugetlb(self, head: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Pages of hugetlbfs: by page type from 6.11 on, before by a flag in the head's neighbour, or a destructor's number."""
        info, rows = self._info, self._table
        if self._typed("HUGETLB"):
            return np.take(self._types(rows, info.number("PAGE_HUGETLB_MAPCOUNT_VALUE")), head)
        is_head = self._field(rows, "flags", "u8") & info.number("PG_head_mask") != 0
        next_one = np.minimum(head + 1, self.pages - 1)
        if "NUMBER(PG_hugetlb)" in info:
            marked = self._field(rows, "flags", "u8") >> info.number("PG_hugetlb") & 1 != 0
        elif "NUMBER(HUGETLB_PAGE_DTOR)" in info:
            # from 6.3 on a member of struct folio, which begins with the head
            folio = "OFFSET(folio._folio_dtor)" in info
            offset = info.offset("folio._folio_dtor") - self._struct if folio else info.offset("page.compound_dtor")
            marked = self._at(rows, offset, "u1") == info.number("HUGETLB_PAGE_DTOR")
        else:
            raise VerificationError("K1 does not say how its hugetlbfs pages are told")
        both: NDArray[np.bool_] = is_head[head] & marked[next_one]
        return both
