"""The dead kernel as its own VMCOREINFO describes it: where its virtual addresses lie, and where its page structs are.

References: Linux `include/linux/mmzone.h` (struct mem_section), `mm/sparse.c`, `mm/sparse-vmemmap.c`,
`Documentation/arch/x86/x86_64/mm.rst`, `arch/powerpc/include/asm/book3s/64/` (`hash.h`, `radix.h`),
`arch/powerpc/mm/init_64.c` (vmemmap_list), and the VMCOREINFO lines of `arch/x86/kernel/vmcore_info_64.c` and
`arch/powerpc/kexec/vmcore_info.c` (`machine_kexec_64.c` and `core.c` before 6.9).

What a kernel is like is asked of VMCOREINFO and of its memory, never of its version. Where an answer is missing or makes no
sense the kernel is doubtful there: that goes to `doubts`, and the pages it is about are not described.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crashkernel.errors import CrashkernelError, FormatError
from crashkernel.formats.elf import EM_X86_64
from crashkernel.memory import Range, RangeSet
from crashkernel.vmcore.pagetable import Blocks, Direct, Mapping, PageTable, Span, merged, ppc64_format, x86_64_format
from crashkernel.vmcore.source import Source

_MAX_DOUBTS = 20
_POINTER_SIZE = 8
_ADDRESS_SPACE = 1 << 64

# x86_64: the kernel's image is mapped from here (__START_KERNEL_map); how far when VMCOREINFO does not say, without KASLR.
_X86_64_IMAGE = 0xFFFF_FFFF_8000_0000
_X86_64_IMAGE_SIZE = 1 << 29
PPC64_LINEAR = 0xC000_0000_0000_0000
"""Where ppc64's kernel has physical address 0, and its addresses begin: PAGE_OFFSET, arch/powerpc/include/asm/page.h."""
# From there physical memory is mapped up to where vmalloc begins: H_KERN_VIRT_START of a hash kernel with 4 KiB pages, and
# of all others (RADIX_KERN_VIRT_START).
_PPC64_HASH_4K_VIRTUAL = 0xC000_3D00_0000_0000
_PPC64_VIRTUAL = 0xC008_0000_0000_0000
_MAX_VMEMMAP_BLOCKS = 1 << 20  # of 16 MiB each as a rule; the list is K1's and could have no end
_MAX_VMEMMAP_SHIFT = 34  # log2 of the largest page a ppc64 CPU has, 16 GiB

# enum in include/linux/mmzone.h: the low bits of section_mem_map. How many flags there are differs between kernels
# (SECTION_MAP_LAST_BIT), but never more than the bits that an encoded map leaves free.
_SECTION_PRESENT, _SECTION_HAS_MEM_MAP, _SECTION_ONLINE = 1 << 0, 1 << 1, 1 << 2
_SECTION_SIZE_BITS = {EM_X86_64: 27}  # where VMCOREINFO has no SECTION_SIZE_BITS (before 5.13)
_PPC64_SECTION_SIZE_BITS = 24
_MAX_SECTION_SIZE_BITS = 40  # the largest of any machine is 34 (`CONFIG_PA_SECTION_SHIFT` and its like)
_ROOTS_AT_A_TIME = 64


class UnmappedMemory(FormatError):
    """A virtual address that the dead kernel did not map, or whose page table is not in the dump."""

    def __init__(self, vaddr: int, *, source: str = "") -> None:
        super().__init__(f"virtual address {vaddr:#x} is not mapped", source=source)
        self.vaddr = vaddr


@dataclass(frozen=True, slots=True)
class PageStructs:
    """The page structs of `count` page frames from `pfn` on, one after the other in physical memory from `paddr` on."""

    pfn: int
    count: int
    paddr: int


@dataclass(frozen=True, slots=True)
class _Sections:
    """How the kernel keeps its memory sections (struct mem_section): sizes in bytes, `array` is a virtual address."""

    array: int
    extreme: bool  # the array is of pointers to pages full of sections (CONFIG_SPARSEMEM_EXTREME), not of sections
    count: int  # sections up to the end of memory
    section_size: int  # of one struct mem_section
    map_offset: int  # of section_mem_map in it
    pages: int  # page frames of a section
    page_struct_size: int
    flags: int  # the bits of section_mem_map that are flags

    def per_root(self, page_size: int) -> int:
        """Return how many sections one page of them holds (SECTIONS_PER_ROOT)."""
        return page_size // self.section_size


class CrashedKernel:
    """K1, read through a source of its memory.

    `doubts` are the places where what it says of itself cannot be true or cannot be read, in words, at most a few of them;
    they grow while it is asked.

    :raise FormatError: VMCOREINFO lacks what any address needs: where its page table is, or where its image lies.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.info = source.vmcoreinfo
        self.doubts: list[str] = []
        self._page_size = source.page_size
        self._mappings: tuple[Mapping, ...] = ()
        if source.machine == EM_X86_64:
            self._map_x86_64()
        else:
            self._map_ppc64()

    def symbol(self, name: str) -> int:
        """Return the virtual address of a symbol that VMCOREINFO names.

        :raise FormatError: it does not.
        """
        return self.info.symbol(name)

    def spans(self, start: int, end: int) -> Iterator[Span]:
        """Yield where the virtual addresses [start, end) lie, ascending; what is not mapped is left out."""
        return merged(self._layered(self._mappings, start, end))

    def _layered(self, mappings: tuple[Mapping, ...], start: int, end: int) -> Iterator[Span]:
        """Ask the first mapping, and the others for what it leaves out."""
        if not mappings:
            return
        position = start
        for each in mappings[0].spans(start, end):
            yield from self._layered(mappings[1:], position, each.vaddr)
            yield each
            position = each.vaddr + each.size
        if position < end:
            yield from self._layered(mappings[1:], position, end)

    def paddr(self, vaddr: int) -> int:
        """Return the physical address of a virtual one.

        :raise UnmappedMemory: it has none.
        """
        for each in self.spans(vaddr, vaddr + 1):
            return each.paddr
        raise UnmappedMemory(vaddr, source=self.source.name)

    def read(self, vaddr: int, size: int) -> bytes:
        """Return `size` bytes of virtual memory, wherever its pages lie.

        :raise UnmappedMemory: an address among them is not mapped.
        :raise MissingMemory: a byte of them is not in the dump.
        """
        parts: list[bytes] = []
        position, end = vaddr, vaddr + size
        for each in self.spans(vaddr, end):
            if each.vaddr != position:
                break
            parts.append(self.source.read(each.paddr, each.size))
            position += each.size
        if position < end:
            raise UnmappedMemory(position, source=self.source.name)
        return b"".join(parts)

    def pointer(self, vaddr: int) -> int:
        """Return the unsigned 64-bit number at a virtual address.

        :raise FormatError: as `read`.
        """
        return int.from_bytes(self.read(vaddr, _POINTER_SIZE), self.source.byteorder)

    def doubt(self, text: str) -> None:
        """Add to `doubts` what it does not say yet; of a kernel that is wrong everywhere the first few are enough."""
        if len(self.doubts) < _MAX_DOUBTS and text not in self.doubts:
            self.doubts.append(text)

    # --- addresses

    def _map_x86_64(self) -> None:
        info = self.info
        phys_base = info.number("phys_base")
        size = info.number("KERNEL_IMAGE_SIZE") if "NUMBER(KERNEL_IMAGE_SIZE)" in info else _X86_64_IMAGE_SIZE
        image = Direct(_X86_64_IMAGE, min(_X86_64_IMAGE + max(size, 0), _ADDRESS_SPACE), phys_base)
        # At the crash cr3 is some process's; the kernel's own table has all that is not a process's.
        root = info.symbol("init_top_pgt") - _X86_64_IMAGE + phys_base
        layout = x86_64_format(
            five_levels="NUMBER(pgtable_l5_enabled)" in info and info.number("pgtable_l5_enabled") != 0,
            encryption_mask=info.number("sme_mask") if "NUMBER(sme_mask)" in info else 0,
        )
        self._mappings = image, PageTable(root, layout, self.source.read, self.doubt)

    def _map_ppc64(self) -> None:
        info = self.info
        root = info.symbol("swapper_pg_dir") - PPC64_LINEAR
        radix = PageTable(root, ppc64_format(self._page_size, radix=True), self.source.read, self.doubt)
        is_radix = info.number("RADIX_MMU") == 1 if "NUMBER(RADIX_MMU)" in info else self._maps_itself(radix)
        if is_radix:
            self._mappings = Direct(PPC64_LINEAR, _PPC64_VIRTUAL, 0), radix
            return
        end = _PPC64_VIRTUAL if self._page_size == 0x10000 else _PPC64_HASH_4K_VIRTUAL
        linear = Direct(PPC64_LINEAR, end, 0)
        self._mappings = (linear,)  # which is where the list lies
        hashed = PageTable(root, ppc64_format(self._page_size, radix=False), self.source.read, self.doubt)
        self._mappings = linear, self._vmemmap_list(), hashed

    def _maps_itself(self, table: PageTable) -> bool:
        """Whether a radix table maps the kernel's text where the linear map has it.

        Only a radix kernel has the linear map in its page table: with a hash MMU it is in the hash table alone, and the same
        words are no table that would translate an address to itself. Kernels before 6.10 do not say NUMBER(RADIX_MMU).
        """
        text = self.info.symbol("_stext")
        return [each.paddr for each in table.spans(text, text + 1)] == [text - PPC64_LINEAR]

    def _vmemmap_list(self) -> Blocks:
        """Return what backs the array of page structs of a hash kernel, which keeps a list of it (struct vmemmap_backing).

        With a hash MMU the array is in no page table that Linux keeps. Radix kernels up to 6.5 have the list as well, and say
        the same in their page table.
        """
        vaddrs: list[int] = []
        paddrs: list[int] = []
        shift = 0
        try:
            shift = self._vmemmap_shift()
            limit = min(self._vmemmap_limit(shift), _MAX_VMEMMAP_BLOCKS)
            entry_size = self.info.size("vmemmap_backing")
            offsets = [self.info.offset(f"vmemmap_backing.{name}") for name in ("virt_addr", "phys", "list")]
            if entry_size <= 0 or min(offsets) < 0 or max(offsets) + _POINTER_SIZE > entry_size or entry_size > self._page_size:
                raise FormatError("VMCOREINFO's struct vmemmap_backing makes no sense", source=self.source.name)
            entry = self.pointer(self.info.symbol("vmemmap_list"))
            page, data = -1, b""  # entries are carved out of pages one after the other, so most are on the one read last
            while entry:
                if len(vaddrs) >= limit:
                    raise FormatError(f"vmemmap_list does not end after {limit} entries", source=self.source.name)
                within = entry % self._page_size
                if within + entry_size > self._page_size:
                    raise FormatError(f"vmemmap_list has an entry at {entry:#x}, across pages", source=self.source.name)
                if entry - within != page:
                    page, data = entry - within, self.read(entry - within, self._page_size)
                vaddr, paddr, entry = (
                    int.from_bytes(data[within + offset : within + offset + _POINTER_SIZE], self.source.byteorder)
                    for offset in offsets
                )
                vaddrs.append(vaddr)
                paddrs.append(paddr)
        except CrashkernelError as error:
            self.doubt(f"where the page structs are: {error}")
        return Blocks(np.array(vaddrs, np.uint64), np.array(paddrs, np.uint64), 1 << shift)

    def _vmemmap_shift(self) -> int:
        """Return log2 of the page size the array of page structs is mapped with."""
        info = self.info
        index = int.from_bytes(self.read(info.symbol("mmu_vmemmap_psize"), 4), self.source.byteorder)
        place = info.symbol("mmu_psize_defs") + info.size("mmu_psize_def") * index + info.offset("mmu_psize_def.shift")
        shift = int.from_bytes(self.read(place, 4), self.source.byteorder)
        if not self._page_size <= 1 << min(shift, 64) <= 1 << _MAX_VMEMMAP_SHIFT:
            raise FormatError(f"page structs in pages of 2^{shift} bytes make no sense", source=self.source.name)
        return shift

    def _vmemmap_limit(self, shift: int) -> int:
        """Return how many blocks of 2^shift bytes the page structs of all memory can take, and one for each range's ends."""
        pages = self._memory_end() // self._page_size + 1
        return (pages * self.info.size("page") >> shift) + 2 * len(self.source.memory) + 2

    def _memory_end(self) -> int:
        ranges = self.source.memory.ranges
        return ranges[-1].end if ranges else 0

    # --- page structs

    def page_structs(self, first: int = 0) -> Iterator[PageStructs]:
        """Yield where the page structs are, in ascending order of page frames, as few and as long runs as there are.

        From the section on that the page frame `first` is in. Lazily: no more than some thousand sections are looked at ahead.
        Left out are sections the kernel had not online, whose page structs it may never have written, and all that is doubtful:
        a page whose struct is not named here must be kept.
        """
        try:
            sections = self._sections()
        except CrashkernelError as error:
            self.doubt(f"where the page structs are: {error}")
            return
        for pfn, count, vaddr in self._section_runs(sections, first // sections.pages):
            yield from self._located(pfn, count, vaddr, sections.page_struct_size)

    def _sections(self) -> _Sections:
        info, name = self.info, self.source.name
        default = _SECTION_SIZE_BITS.get(self.source.machine, _PPC64_SECTION_SIZE_BITS)
        bits = info.number("SECTION_SIZE_BITS") if "NUMBER(SECTION_SIZE_BITS)" in info else default
        page_bits = self._page_size.bit_length() - 1
        size, offset = info.size("mem_section"), info.offset("mem_section.section_mem_map")
        struct_size = info.size("page")
        sane = page_bits < bits <= _MAX_SECTION_SIZE_BITS and 0 <= offset <= size - _POINTER_SIZE and size <= self._page_size
        if not sane or not 0 < struct_size <= self._page_size:
            raise FormatError("VMCOREINFO's struct mem_section or section size makes no sense", source=name)
        if size & (size - 1):  # BUILD_BUG_ON in sparse_init (mm/sparse.c)
            raise FormatError(f"VMCOREINFO has a struct mem_section of {size} bytes, not a power of two", source=name)
        count = -(-self._memory_end() >> bits)
        return _Sections(
            array=info.symbol("mem_section"),
            extreme=self._is_extreme(bits, self._page_size // size),
            count=count,
            section_size=size,
            map_offset=offset,
            pages=1 << (bits - page_bits),
            page_struct_size=struct_size,
            # A map and what is subtracted from it both start on a page, and on as many structs as a section has pages.
            flags=(1 << min(bits - page_bits, page_bits)) - 1,
        )

    def _is_extreme(self, section_size_bits: int, per_root: int) -> bool:
        """Whether mem_section is an array of pointers: its length then is that of the roots, not of the sections."""
        info = self.info
        if not {"LENGTH(mem_section)", "NUMBER(MAX_PHYSMEM_BITS)"} <= info.keys():
            return True  # what every 64-bit configuration of these machines has
        sections = 1 << max(0, min(info.number("MAX_PHYSMEM_BITS") - section_size_bits, 64))
        return info.length("mem_section") == -(-sections // per_root)

    def _section_maps(self, sections: _Sections, begin: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Yield section_mem_map of consecutive sections, and the number of the first: a few thousand at a time.

        Sections before the one numbered `begin` may be left out.
        """
        dtype = np.dtype(np.uint64).newbyteorder("<" if self.source.byteorder == "little" else ">")
        per_root = sections.per_root(self._page_size)
        size = per_root * sections.section_size
        roots = -(-sections.count // per_root)
        if sections.extreme and "LENGTH(mem_section)" in self.info:
            roots = min(roots, self.info.length("mem_section"))
        for first in range(begin // per_root, roots, _ROOTS_AT_A_TIME):
            some = min(_ROOTS_AT_A_TIME, roots - first)
            if sections.extreme:
                try:
                    raw = self.read(sections.array + first * _POINTER_SIZE, some * _POINTER_SIZE)
                except CrashkernelError as error:
                    self.doubt(f"memory sections from {first * per_root} on: {error}")
                    continue
                places = np.frombuffer(raw, dtype).tolist()
            else:
                places = [sections.array + (first + index) * size for index in range(some)]
            maps = np.zeros((some, per_root), np.uint64)
            for index, place in enumerate(places):
                if not place:
                    continue
                try:
                    raw = self.read(place, size)
                except CrashkernelError as error:
                    self.doubt(f"memory sections from {(first + index) * per_root} on: {error}")
                    continue
                table = np.frombuffer(raw, np.uint8).reshape(per_root, sections.section_size)
                column = table[:, sections.map_offset : sections.map_offset + _POINTER_SIZE]
                maps[index] = np.ascontiguousarray(column).view(dtype)[:, 0]
            yield first * per_root, maps.reshape(-1)[: sections.count - first * per_root]

    def _section_runs(self, sections: _Sections, begin: int) -> Iterator[tuple[int, int, int]]:
        """Yield (page frame, number of page frames, virtual address of the first one's struct) of sections in one piece.

        They begin with the section numbered `begin`.
        """
        step = sections.pages * sections.page_struct_size
        run: tuple[int, int, int] | None = None  # number of the first section, how many, virtual address
        for first, maps in self._section_maps(sections, begin):
            maps[: max(begin - first, 0)] = 0
            wanted = np.uint64(_SECTION_PRESENT | _SECTION_HAS_MEM_MAP | _SECTION_ONLINE)
            there = (maps & wanted) == wanted
            mapped = np.uint64(_SECTION_PRESENT | _SECTION_HAS_MEM_MAP)
            if offline := int((((maps & mapped) == mapped) & ~there).sum()):
                self.doubt(f"{offline} memory sections from {first} on are not online: their page structs may be unwritten")
            numbers = np.flatnonzero(there)
            if not len(numbers):
                continue
            vaddrs = (maps[numbers] & ~np.uint64(sections.flags)) + (numbers + first).astype(np.uint64) * np.uint64(step)
            breaks = np.flatnonzero((np.diff(numbers) != 1) | (np.diff(vaddrs) != np.uint64(step))) + 1
            begins = np.concatenate((np.zeros(1, np.int64), breaks))
            sizes = np.diff(np.append(begins, len(numbers)))
            for number, count, vaddr in zip(
                (numbers[begins] + first).tolist(), sizes.tolist(), vaddrs[begins].tolist(), strict=True
            ):
                if run and run[0] + run[1] == number and run[2] + run[1] * step == vaddr:
                    run = (run[0], run[1] + count, run[2])
                    continue
                if run:
                    yield run[0] * sections.pages, run[1] * sections.pages, run[2]
                run = (number, count, vaddr)
        if run:
            yield run[0] * sections.pages, run[1] * sections.pages, run[2]

    def _located(self, pfn: int, count: int, vaddr: int, struct_size: int) -> Iterator[PageStructs]:
        """Yield where the structs of `count` page frames from `pfn` on lie, which are an array at `vaddr`."""
        memory = self.source.memory
        described = 0  # of the array, the structs before this one are yielded or doubted
        held = Range(0, 1)  # memory of the dump that the last span was in, and the next is likely to be
        for span_vaddr, span_paddr, span_size in self.spans(vaddr, min(vaddr + count * struct_size, _ADDRESS_SPACE)):
            at = span_vaddr - vaddr
            # A struct across two spans that are no neighbours has no one place: it is left out with a doubt.
            first, last = -(-at // struct_size), (at + span_size) // struct_size
            start = span_paddr + first * struct_size - at
            end = start + (last - first) * struct_size
            if start >= end:
                continue
            if held.start <= start and end <= held.end:
                if described < first:
                    self._gap(pfn + described, pfn + first)
                described = last
                yield PageStructs(pfn + first, last - first, start)
                continue
            for piece in RangeSet([Range(start, end)]) & memory:
                low, high = -(-(piece.start - start) // struct_size), (piece.end - start) // struct_size
                if low < high:
                    self._gap(pfn + described, pfn + first + low)
                    described = first + high
                    yield PageStructs(pfn + first + low, high - low, start + low * struct_size)
            held = next((each for each in memory if start in each), held)
        self._gap(pfn + described, pfn + count)

    def _gap(self, first: int, last: int) -> None:
        """Doubt page frames [first, last) whose structs are not there, if any of them is memory."""
        if first < last and self.source.memory.overlaps(Range(first * self._page_size, last * self._page_size)):
            self.doubt(f"the page structs of page frames {first:#x}-{last:#x} are not in the dump")
