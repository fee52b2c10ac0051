"""Builds vmcores of kernels that never ran: memory, page tables, sections, page structs and a log, in every layout K1 can have.

Written from the kernel's headers and the architecture manuals, sharing nothing with the readers under test. Memory is sparse:
a machine of terabytes costs only what is written to it.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from crashkernel.formats.vmcoreinfo import VmcoreInfo
from crashkernel.memory import Range, RangeSet
from crashkernel.vmcore.source import MissingMemory
from support.elfwriter import PT_LOAD, PT_NOTE, Part, write_elf, write_note

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
_BLOCK = 0x10000

PAGE_OFFSETS = {
    "flags": 0,
    "_refcount": 52,
    "mapping": 24,
    "lru": 8,
    "_mapcount": 48,
    "private": 40,
    "compound_dtor": 16,
    "compound_order": 17,
    "compound_head": 8,
}
"""Members of struct page as Debian 12's kernel has them."""
_PAGE_SIZES = {"_refcount": 4, "_mapcount": 4, "compound_dtor": 1, "compound_order": 1}

PRESENT, HAS_MEM_MAP, ONLINE, EARLY = 1, 2, 4, 8


class SparseMemory:
    """Physical memory that is zero where nobody wrote."""

    def __init__(self, byteorder: str) -> None:
        self.byteorder = byteorder
        self.blocks: dict[int, bytearray] = {}

    def write(self, paddr: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            number, at = divmod(paddr + done, _BLOCK)
            some = min(_BLOCK - at, len(data) - done)
            self.blocks.setdefault(number, bytearray(_BLOCK))[at : at + some] = data[done : done + some]
            done += some

    def read(self, paddr: int, size: int) -> bytes:
        parts = []
        while size > 0:
            number, at = divmod(paddr, _BLOCK)
            some = min(_BLOCK - at, size)
            block = self.blocks.get(number)
            parts.append(bytes(some) if block is None else bytes(block[at : at + some]))
            paddr, size = paddr + some, size - some
        return b"".join(parts)

    def put(self, paddr: int, value: int, size: int = 8, byteorder: str | None = None) -> None:
        self.write(paddr, (value & ((1 << 8 * size) - 1)).to_bytes(size, byteorder or self.byteorder))

    def get(self, paddr: int, size: int = 8, byteorder: str | None = None) -> int:
        return int.from_bytes(self.read(paddr, size), byteorder or self.byteorder)


class MemorySource:
    """A `Source` without a file, over the memory a builder made."""

    def __init__(self, machine: int, memory: SparseMemory, ranges: RangeSet, info: str, notes: bytes = b"") -> None:
        self.name = "synthetic"
        self.machine = machine
        self.byteorder = memory.byteorder
        self.notes = notes
        self.vmcoreinfo = VmcoreInfo.from_bytes(info.encode(), self.name)
        self.memory = ranges
        self.linear_base = None
        self.bytes = memory
        self.reads = 0

    @property
    def page_size(self) -> int:
        return self.vmcoreinfo.page_size

    def read(self, paddr: int, size: int) -> bytes:
        self.reads += 1
        if size <= 0:
            return b""
        if paddr < 0 or not self.memory.covers(Range.sized(paddr, size)):
            raise MissingMemory(paddr, size, source=self.name)
        return self.bytes.read(paddr, size)

    def read_pages(self, pfns: np.ndarray, into: np.ndarray) -> None:
        size = self.page_size
        for index, pfn in enumerate(pfns.tolist()):
            if not self.memory.overlaps(Range.sized(pfn * size, size)):
                raise MissingMemory(pfn * size, size, source=self.name)
            into[index * size : (index + 1) * size] = np.frombuffer(self.bytes.read(pfn * size, size), np.uint8)


@dataclass
class PrintkRing:
    """The lockless ring as `prb_reserve` and `prb_commit` fill it: descriptors and text, the oldest making room.

    `exact` is how blocks are placed since 6.18: one that ends exactly with the ring stays there.
    """

    count_bits: int = 6
    size_bits: int = 12
    exact: bool = False
    descriptors: list[list[int]] = field(default_factory=list)  # state_var, begin, next
    infos: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    kept: list[tuple[int, int]] = field(default_factory=list)  # record id, where its block ends
    byteorder: str = "little"

    def __post_init__(self) -> None:
        count = 1 << self.count_bits
        # "Descriptor Bootstrap" in printk_ringbuffer.h: the last one is reusable, and its ID soon wraps to 0.
        self.head = (-(count + 1)) & ((1 << 62) - 1)
        self.tail = self.head
        self.descriptors = [[0, 0, 0] for _ in range(count)]
        self.descriptors[-1] = [3 << 62 | self.head, 1, 1]
        self.infos = [(0, 0, 0, 0, 0, 0)] * count
        self.text = bytearray(1 << self.size_bits)
        self.head_lpos = self.tail_lpos = (-(1 << self.size_bits)) & ((1 << 64) - 1)
        self.sequence = 0

    def append(
        self, text: bytes, *, ns: int = 0, level: int = 6, facility: int = 0, caller: int = 1, state: int = 2, length: int = -1
    ) -> int:
        """Store a message and return its ID. `state`: 0 reserved, 1 committed, 2 finalized; `length` to claim another one."""
        count, size = 1 << self.count_bits, 1 << self.size_bits
        record = (self.head + 1) & ((1 << 62) - 1)
        if (record - self.tail) & ((1 << 62) - 1) >= count:
            self._drop()
        self.head = record
        begin = following = 3
        if text:
            need = -(-(8 + len(text)) // 8) * 8
            begin = self.head_lpos
            following = self._advance(begin, need)
            while ((following - self.tail_lpos) & ((1 << 64) - 1)) > size:
                self._drop()
            self.head_lpos = following
            at = begin % size if self._same_wrap(begin, following) else 0
            self.text[at : at + 8 + len(text)] = record.to_bytes(8, self.byteorder) + text
        self.kept.append((record, following if text else -1))
        slot = record % count
        self.descriptors[slot] = [state << 62 | record, begin, following]
        claimed = len(text) if length < 0 else length
        self.infos[slot] = (self.sequence, ns, claimed, facility, level, caller)
        self.sequence += 1
        return record

    def _same_wrap(self, begin: int, following: int) -> bool:
        size = 1 << self.size_bits
        return begin // size == ((following - self.exact) & ((1 << 64) - 1)) // size

    def _advance(self, begin: int, need: int) -> int:
        size = 1 << self.size_bits
        following = (begin + need) & ((1 << 64) - 1)
        if self._same_wrap(begin, following):
            return following
        return following - following % size + need if following % size else following + need

    def _drop(self) -> None:
        record, end = self.kept.pop(0)
        self.descriptors[record % (1 << self.count_bits)][0] = 3 << 62 | record
        self.tail = self.kept[0][0] if self.kept else record
        if end >= 0:
            self.tail_lpos = end


@dataclass
class SyntheticKernel:
    """A kernel in memory, to be changed before anybody reads it.

    `mmu` is "radix" or "hash" on ppc64 and means nothing on x86_64. `vmemmap_shift` is log2 of the pages that the array of page
    structs is mapped with; None keeps the structs of each section in the linear map (no SPARSEMEM_VMEMMAP). `scatter` leaves a
    hole between any two of its blocks.
    """

    arch: str = "x86_64"
    page_size: int = 0x1000
    mmu: str = "radix"
    five_levels: bool = False
    sme_mask: int = 0
    ranges: tuple[tuple[int, int], ...] = ((0, 64 * MIB),)
    section_bits: int = 0
    struct_size: int = 64
    extreme: bool = True
    vmemmap_shift: int | None = 21
    scatter: bool = False
    section_flags: dict[int, int] = field(default_factory=dict)  # by section number; others are early and online
    tell_mmu: bool = True
    image: int = 4 * MIB  # physical address of the kernel's image

    def __post_init__(self) -> None:
        self.byteorder = "big" if self.arch == "ppc64" else "little"
        self.machine = 62 if self.arch == "x86_64" else 21
        self.memory = SparseMemory(self.byteorder)
        self.section_bits = self.section_bits or (27 if self.arch == "x86_64" else 24)
        self.image_end = self.image
        self.free = self.image + 8 * MIB
        self.blocks: dict[int, int] = {}  # page structs: vaddr of a block -> paddr
        self.section_maps: dict[int, int] = {}  # paddr of a section's struct mem_section
        self.notes = b""
        self.info: dict[str, str] = {"OSRELEASE": "6.1.0-synthetic", "PAGESIZE": str(self.page_size)}
        if self.arch == "x86_64":
            self.image_vaddr = 0xFFFF_FFFF_8100_0000
            self.linear = 0xFF11_0000_0000_0000 if self.five_levels else 0xFFFF_8880_0000_0000
            self.vmemmap = 0xFFD4_0000_0000_0000 if self.five_levels else 0xFFFF_EA00_0000_0000
            self.levels = (9,) * (5 if self.five_levels else 4)
        else:
            self.linear = 0xC000_0000_0000_0000
            self.image_vaddr = self.linear + self.image
            small_hash = self.mmu == "hash" and self.page_size == 0x1000
            self.vmemmap = 0xC000_3F00_0000_0000 if small_hash else 0xC00C_0000_0000_0000
            self.levels = {
                ("radix", 0x1000): (13, 9, 9, 9),
                ("radix", 0x10000): (13, 9, 9, 5),
                ("hash", 0x1000): (9, 9, 7, 9),
                ("hash", 0x10000): (8, 10, 10, 8),
            }[self.mmu, self.page_size]
        self.root_vaddr, self.root = self.data(8 << self.levels[0], 8 << self.levels[0])
        self._build()

    # --- allocation

    def data(self, size: int, alignment: int = 64) -> tuple[int, int]:
        """Room in the kernel's image: virtual and physical address."""
        paddr = -(-self.image_end // alignment) * alignment
        self.image_end = paddr + size
        assert self.image_end <= self.image + 8 * MIB
        return self.image_vaddr + paddr - self.image, paddr

    def alloc(self, size: int, alignment: int = 0x1000) -> tuple[int, int]:
        """Room in the linear map: virtual and physical address."""
        paddr = -(-self.free // alignment) * alignment
        self.free = paddr + size
        return self.linear + paddr, paddr

    def symbol(self, name: str, vaddr: int) -> None:
        self.info[f"SYMBOL({name})"] = f"{vaddr:x}"

    # --- page tables

    def map(self, vaddr: int, paddr: int, shift: int) -> None:
        """Map a page of 2^shift bytes, with the tables it takes."""
        table = self.root
        level_shift = (self.page_size - 1).bit_length() + sum(self.levels[1:])
        order = "little" if self.arch == "x86_64" else "big"
        for depth, bits in enumerate(self.levels):
            entry = table + 8 * ((vaddr >> level_shift) & ((1 << bits) - 1))
            if level_shift == shift:
                self.memory.put(entry, self._leaf(paddr, large=depth < len(self.levels) - 1), byteorder=order)
                return
            found = self.memory.get(entry, byteorder=order)
            if not found:
                below = self.levels[depth + 1]
                table = self.alloc(8 << below, max(8 << below, 256))[1]
                found = table | 0x67 | self.sme_mask if self.arch == "x86_64" else table | 1 << 63 | below
                self.memory.put(entry, found, byteorder=order)
            table = found & ~self.sme_mask & (~0xFFF if self.arch == "x86_64" else ~0xFF) & ((1 << 60) - 1)
            level_shift -= self.levels[depth + 1]
        raise AssertionError(f"no level maps 2^{shift} bytes")

    def _leaf(self, paddr: int, *, large: bool) -> int:
        if self.arch == "x86_64":  # NX, G, D, A, RW, P; PSE, and PAT where a large page has it
            return 1 << 63 | paddr | self.sme_mask | 0x163 | (0x1080 if large else 0)
        return 1 << 63 | 1 << 62 | paddr | 0x18E  # present, PTE, C, R, privileged, RW

    # --- the kernel

    def _build(self) -> None:
        info = self.info
        info["NUMBER(SECTION_SIZE_BITS)"] = str(self.section_bits)
        info["NUMBER(MAX_PHYSMEM_BITS)"] = "46" if self.arch == "x86_64" else "51"
        info["SIZE(page)"] = str(self.struct_size)
        info.update({f"OFFSET(page.{name})": str(offset) for name, offset in PAGE_OFFSETS.items()})
        info["SIZE(mem_section)"], info["OFFSET(mem_section.section_mem_map)"] = "32", "0"
        info["CRASHTIME"] = "1795567645"
        last = max(start + size for start, size in self.ranges)
        big = 30 if last > GIB else 21
        if self.arch == "x86_64":
            self.symbol("init_top_pgt", self.root_vaddr)
            info["NUMBER(phys_base)"] = str(self.image - (self.image_vaddr - 0xFFFF_FFFF_8000_0000))
            info["NUMBER(KERNEL_IMAGE_SIZE)"] = str(GIB)
            info["NUMBER(pgtable_l5_enabled)"] = str(int(self.five_levels))
            if self.sme_mask:
                info["NUMBER(sme_mask)"] = str(self.sme_mask)
        else:
            self.symbol("swapper_pg_dir", self.root_vaddr)
            self.symbol("_stext", self.linear)
            if self.tell_mmu:
                info["NUMBER(RADIX_MMU)"] = str(int(self.mmu == "radix"))
        if self.arch == "x86_64" or self.mmu == "radix":
            for paddr in range(0, last, 1 << big):
                self.map(self.linear + paddr, paddr, big)
        self._sections(last)

    def _sections(self, last: int) -> None:
        per_root = self.page_size // 32
        count = -(-last >> self.section_bits)
        roots = -(-count // per_root)
        size = roots * 8 if self.extreme else roots * per_root * 32
        array, array_paddr = self.alloc(size, 64)
        self.symbol("mem_section", array)
        all_sections = 1 << (int(self.info["NUMBER(MAX_PHYSMEM_BITS)"]) - self.section_bits)
        self.info["LENGTH(mem_section)"] = str(all_sections // per_root if self.extreme else all_sections)
        pages = 1 << (self.section_bits - (self.page_size - 1).bit_length())
        for start, size in self.ranges:
            for number in range(start >> self.section_bits, (start + size - 1 >> self.section_bits) + 1):
                root, index = divmod(number, per_root)
                if self.extreme:
                    where = self.memory.get(array_paddr + 8 * root)
                    if not where:
                        where = self.alloc(self.page_size, self.page_size)[0]
                        self.memory.put(array_paddr + 8 * root, where)
                    entry = where - self.linear + 32 * index
                else:
                    entry = array_paddr + 32 * number
                structs = self.vmemmap + number * pages * self.struct_size
                if self.vmemmap_shift is None:
                    structs = self.alloc(pages * self.struct_size, self.page_size)[0]
                    self.blocks[structs] = structs - self.linear
                coded = structs - number * pages * self.struct_size
                flags = self.section_flags.get(number, PRESENT | HAS_MEM_MAP | ONLINE | EARLY)
                self.section_maps[number] = entry
                self.memory.put(entry, coded | flags)
                self.memory.put(entry + 8, 0xDEAD_0000_0000_0000 | number)  # the other members are no zeros either
                if self.vmemmap_shift is not None:
                    self._map_structs(structs, pages * self.struct_size)
        if self.arch != "x86_64":
            self._vmemmap_list()

    def _map_structs(self, vaddr: int, size: int) -> None:
        shift = self.vmemmap_shift
        assert shift is not None
        step = 1 << shift
        for block in range(vaddr // step * step, vaddr + size, step):
            if block in self.blocks:
                continue
            paddr = self.alloc(step, step)[1]
            if self.scatter:
                self.alloc(step, step)
            self.blocks[block] = paddr
            if self.arch == "x86_64" or self.mmu == "radix":
                self.map(block, paddr, shift)

    def _vmemmap_list(self) -> None:
        """struct vmemmap_backing of each block, the newest first, and the size of a block by way of mmu_psize_defs."""
        info, memory = self.info, self.memory
        info.update(
            {f"OFFSET(vmemmap_backing.{name})": str(8 * index) for index, name in enumerate(("list", "phys", "virt_addr"))}
        )
        info["SIZE(vmemmap_backing)"], info["SIZE(mmu_psize_def)"], info["OFFSET(mmu_psize_def.shift)"] = "24", "96", "4"
        for name, size in (("vmemmap_list", 8), ("mmu_vmemmap_psize", 4), ("mmu_psize_defs", 16 * 96)):
            vaddr, paddr = self.data(size)
            self.symbol(name, vaddr)
            if name == "mmu_vmemmap_psize":
                memory.put(paddr, 9, 4)
            elif name == "mmu_psize_defs":
                memory.put(paddr + 9 * 96 + 4, self.vmemmap_shift or 24, 4)
        head = 0
        self.list_entries: list[int] = []
        if self.mmu == "hash" and self.vmemmap_shift is not None:
            per_page = self.page_size // 24
            for index, (vaddr, block) in enumerate(self.blocks.items()):
                if index % per_page == 0:
                    page = self.alloc(self.page_size, self.page_size)[0]
                entry = page + index % per_page * 24
                for at, value in ((0, head), (8, block), (16, vaddr)):
                    memory.put(entry - self.linear + at, value)
                self.list_entries.append(entry)
                head = entry
        memory.put(self.paddr(int(info["SYMBOL(vmemmap_list)"], 16)), head)

    def paddr(self, vaddr: int) -> int:
        """Of an address in the image or the linear map."""
        if self.arch == "x86_64" and vaddr >= self.image_vaddr:
            return vaddr - self.image_vaddr + self.image
        return vaddr - self.linear

    def struct_paddr(self, pfn: int) -> int:
        """Where the page struct of a page frame lies; it must not cross blocks."""
        if self.vmemmap_shift is None:
            pages = 1 << (self.section_bits - (self.page_size - 1).bit_length())
            flags = (1 << min((pages - 1).bit_length(), (self.page_size - 1).bit_length())) - 1
            coded = self.memory.get(self.section_maps[pfn // pages])
            return (coded & ~flags) + pfn * self.struct_size - self.linear
        vaddr = self.vmemmap + pfn * self.struct_size
        step = 1 << self.vmemmap_shift
        return self.blocks[vaddr // step * step] + vaddr % step

    def put_page(self, pfn: int, **members: int) -> None:
        """Set members of a page struct, such as flags, mapping, _mapcount, private, compound_head."""
        for name, value in members.items():
            at = self.struct_paddr(pfn) + int(self.info[f"OFFSET(page.{name})"])
            self.memory.put(at, value, _PAGE_SIZES.get(name, 8))

    def put_log(self, ring: PrintkRing) -> None:
        """Put a ring into memory and describe it as `log_buf_vmcoreinfo_setup` does, with Debian 12's structures."""
        memory, info = self.memory, self.info
        assert ring.byteorder == self.byteorder
        for name, members in (
            ("printk_ringbuffer", {"desc_ring": 0, "text_data_ring": 48, "fail": 80}),
            ("prb_desc_ring", {"count_bits": 0, "descs": 8, "infos": 16, "head_id": 24, "tail_id": 32}),
            ("prb_desc", {"state_var": 0, "text_blk_lpos": 8}),
            ("prb_data_blk_lpos", {"begin": 0, "next": 8}),
            ("printk_info", {"seq": 0, "ts_nsec": 8, "text_len": 16, "caller_id": 20, "dev_info": 24}),
            ("prb_data_ring", {"size_bits": 0, "data": 8, "head_lpos": 16, "tail_lpos": 24}),
            ("atomic_long_t", {"counter": 0}),
        ):
            info.update({f"OFFSET({name}.{member})": str(offset) for member, offset in members.items()})
        info.update({"SIZE(prb_desc)": "24", "SIZE(printk_info)": "88", "SIZE(printk_ringbuffer)": "88"})
        pointer, pointer_paddr = self.data(8)
        rb, rb_paddr = self.data(88)
        self.symbol("prb", pointer)
        memory.put(pointer_paddr, rb)
        descs, descs_paddr = self.alloc(24 * len(ring.descriptors))
        infos, infos_paddr = self.alloc(88 * len(ring.infos))
        text, text_paddr = self.alloc(len(ring.text))
        self.log_text, self.log_descriptors = text_paddr, descs_paddr
        memory.put(rb_paddr, ring.count_bits, 4)
        for at, value in (
            *((8, descs), (16, infos), (24, ring.head), (32, ring.tail)),
            *((56, text), (64, ring.head_lpos), (72, ring.tail_lpos)),
        ):
            memory.put(rb_paddr + at, value)
        memory.put(rb_paddr + 48, ring.size_bits, 4)
        for index, words in enumerate(ring.descriptors):
            for number, word in enumerate(words):
                memory.put(descs_paddr + 24 * index + 8 * number, word)
        for index, (sequence, ns, length, facility, level, caller) in enumerate(ring.infos):
            at = infos_paddr + 88 * index
            memory.put(at, sequence)
            memory.put(at + 8, ns)
            memory.put(at + 16, length, 2)
            memory.put(at + 18, facility, 1)
            # u8 flags:5, level:3 with LOG_NEWLINE set: bit fields start at the low end on little-endian, at the high end on big
            memory.put(at + 19, 2 | level << 5 if self.byteorder == "little" else 2 << 3 | level, 1)
            memory.put(at + 20, caller, 4)
        memory.write(text_paddr, bytes(ring.text))

    # --- reading it

    @property
    def vmcoreinfo(self) -> str:
        return "".join(f"{key}={value}\n" for key, value in self.info.items())

    def source(self) -> MemorySource:
        held = RangeSet(Range.sized(start, size) for start, size in self.ranges)
        return MemorySource(self.machine, self.memory, held, self.vmcoreinfo, self.note_bytes())

    def note_bytes(self) -> bytes:
        return self.notes + write_note(self.byteorder, "VMCOREINFO", 0, self.vmcoreinfo.encode())

    def write(self, path: Path) -> Path:
        """Write an ELF vmcore, sparse as the memory is."""
        notes = self.note_bytes()
        parts = [Part(PT_NOTE, 0, data=notes)]
        parts += [Part(PT_LOAD, vaddr=self.linear + start, paddr=start) for start, _ in self.ranges]
        head = bytearray(write_elf(self.byteorder, parts, kind=4, machine=self.machine))
        offset = -(-len(head) // 0x10000) * 0x10000
        with path.open("wb") as file:
            for index, (start, size) in enumerate(self.ranges):
                at = 64 + 56 * (index + 1)
                for place, value in ((8, offset), (32, size), (40, size)):
                    head[at + place : at + place + 8] = value.to_bytes(8, self.byteorder)
                for number, block in self.memory.blocks.items():
                    low, high = max(start, number * _BLOCK), min(start + size, (number + 1) * _BLOCK)
                    if low < high:
                        os.pwrite(file.fileno(), block[low % _BLOCK : low % _BLOCK + high - low], offset + low - start)
                offset = -(-(offset + size) // 0x10000) * 0x10000
            os.pwrite(file.fileno(), bytes(head), 0)
            os.ftruncate(file.fileno(), offset)
        return path
