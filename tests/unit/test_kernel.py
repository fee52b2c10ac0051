"""K1's own view of its memory, over synthetic kernels in every layout: addresses, tables, and where the page structs are."""

import tracemalloc
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashkernel.errors import CrashkernelError, FormatError
from crashkernel.memory import Range
from crashkernel.vmcore.kernel import CrashedKernel, UnmappedMemory
from crashkernel.vmcore.source import ElfVmcore, MissingMemory
from support.vmcores import EARLY, GIB, HAS_MEM_MAP, MIB, ONLINE, PRESENT, TIB, SyntheticKernel

TWO_RANGES = ((0, 300 * MIB), (1 * GIB, 200 * MIB))
LAYOUTS = {
    "x86_64": {},
    "x86_64, five levels": {"five_levels": True},
    "x86_64, page structs in 4 KiB pages": {"vmemmap_shift": 12, "scatter": True},
    "x86_64, encrypted memory": {"sme_mask": 1 << 47},
    "x86_64, no vmemmap": {"vmemmap_shift": None},
    "x86_64, sections in an array": {"extreme": False},
    "radix, 4 KiB": {"arch": "ppc64le", "scatter": True},
    "radix, 64 KiB": {"arch": "ppc64le", "page_size": 0x10000},
    "radix, 64 KiB, page structs in 64 KiB pages": {
        "arch": "ppc64le",
        "page_size": 0x10000,
        "vmemmap_shift": 16,
        "scatter": True,
    },
    "radix, 64 KiB, not told": {"arch": "ppc64le", "page_size": 0x10000, "tell_mmu": False},
    "radix, big-endian": {"arch": "ppc64", "page_size": 0x10000, "tell_mmu": False},
    "hash, 4 KiB, blocks of 4 KiB": {"arch": "ppc64le", "mmu": "hash", "vmemmap_shift": 12, "scatter": True},
    "hash, 4 KiB, blocks of 16 MiB": {"arch": "ppc64le", "mmu": "hash", "vmemmap_shift": 24},
    "hash, 64 KiB": {"arch": "ppc64le", "mmu": "hash", "page_size": 0x10000, "vmemmap_shift": 16, "scatter": True},
    "hash, 64 KiB, not told": {"arch": "ppc64le", "mmu": "hash", "page_size": 0x10000, "vmemmap_shift": 24, "tell_mmu": False},
    "hash, big-endian": {"arch": "ppc64", "mmu": "hash", "page_size": 0x10000, "vmemmap_shift": 24, "tell_mmu": False},
    "hash, no vmemmap": {"arch": "ppc64le", "mmu": "hash", "page_size": 0x10000, "vmemmap_shift": None},
}


def build(layout: str, **changes) -> SyntheticKernel:
    return SyntheticKernel(**({"ranges": TWO_RANGES} | LAYOUTS[layout] | changes))


def described(kernel: CrashedKernel) -> dict[int, int]:
    """Page frame to the physical address of its struct, checking what every caller may rely on."""
    places: dict[int, int] = {}
    last = -1
    for run in kernel.page_structs():
        assert run.pfn > last
        assert run.count > 0
        last = run.pfn + run.count - 1
        size = kernel.info.size("page")
        assert kernel.source.memory.covers(Range.sized(run.paddr, run.count * size))
        places.update((run.pfn + index, run.paddr + index * size) for index in range(run.count))
    return places


def sections_of(made: SyntheticKernel) -> set[int]:
    return {
        number
        for start, size in made.ranges
        for number in range(start >> made.section_bits, start + size - 1 >> made.section_bits)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_finds_every_page_struct(layout, tmp_path):
    made = build(layout)
    kernel = CrashedKernel(made.source())
    places = described(kernel)
    assert kernel.doubts == []
    pages = 1 << (made.section_bits - (made.page_size - 1).bit_length())
    expected = [number * pages + index for number in made.section_maps for index in (0, 1, pages // 2 + 1, pages - 1)]
    assert {pfn: places[pfn] for pfn in expected} == {pfn: made.struct_paddr(pfn) for pfn in expected}
    assert len(places) == len(made.section_maps) * pages
    with ElfVmcore(made.write(tmp_path / "vmcore")) as source:
        assert list(CrashedKernel(source).page_structs()) == list(kernel.page_structs())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_are_as_long_as_memory_allows(layout):
    made = build(layout)
    runs = list(CrashedKernel(made.source()).page_structs())
    for one, other in pairwise(runs):
        together = one.pfn + one.count == other.pfn and one.paddr + one.count * 64 == other.paddr
        assert not together
    if made.scatter:
        assert max(run.count * 64 for run in runs) <= 1 << made.vmemmap_shift


@pytest.mark.parametrize("layout", LAYOUTS)
def test_translates_image_linear_map_and_vmalloc(layout):
    made = build(layout)
    vmalloc = {"x86_64": 0xFF2C_0000_1234_0000 if made.five_levels else 0xFFFF_C900_1234_0000}.get(made.arch)
    if vmalloc is None:
        vmalloc = 0xC000_3D00_1234_0000 if made.page_size == 0x1000 and made.mmu == "hash" else 0xC008_0000_1234_0000
    shift = (made.page_size - 1).bit_length()
    pages = [made.alloc(made.page_size, made.page_size)[1] for _ in range(3)]
    pages[1], pages[2] = pages[2], pages[1]  # three pages in a row, of which no two are neighbours in memory
    for index, paddr in enumerate(pages):
        made.map(vmalloc + index * made.page_size, paddr, shift)
        made.memory.write(paddr, bytes([index + 1]) * made.page_size)
    vaddr, paddr = made.data(32)
    made.memory.write(paddr, b"in the image")
    linear, linear_paddr = made.alloc(32)
    made.memory.put(linear_paddr, 0x0123456789ABCDEF)
    made.symbol("greeting", vaddr)
    kernel = CrashedKernel(made.source())
    assert kernel.symbol("greeting") == vaddr
    assert kernel.paddr(vaddr + 3) == paddr + 3
    assert kernel.read(vaddr, 12) == b"in the image"
    assert kernel.paddr(linear) == linear_paddr
    assert kernel.pointer(linear) == 0x0123456789ABCDEF
    assert [kernel.paddr(vmalloc + index * made.page_size + 5) for index in range(3)] == [each + 5 for each in pages]
    assert kernel.read(vmalloc + made.page_size - 2, made.page_size + 4) == b"\1\1" + b"\2" * made.page_size + b"\3\3"
    with pytest.raises(UnmappedMemory) as caught:
        kernel.read(vmalloc, 4 * made.page_size)
    assert caught.value.vaddr == vmalloc + 3 * made.page_size
    with pytest.raises(UnmappedMemory):
        kernel.paddr(vmalloc - 1)
    for nowhere in (0, 0x7FFF_0000_0000, 0xC00F_0000_0000_0000):
        with pytest.raises(UnmappedMemory):
            kernel.paddr(nowhere)


@pytest.mark.parametrize("layout", ["x86_64", "radix, 64 KiB", "hash, 64 KiB"])
def test_linear_memory_that_is_not_in_the_dump_is_missing(layout):
    made = build(layout)
    with pytest.raises(MissingMemory):
        CrashedKernel(made.source()).read(made.linear + 400 * MIB, 8)


def test_newer_section_flags_are_no_part_of_the_address():
    """Bit 5 is SECTION_IS_VMEMMAP_PREINIT since 6.15, and the flags may grow on."""
    flags = PRESENT | HAS_MEM_MAP | ONLINE | EARLY | 1 << 4 | 1 << 5 | 1 << 6
    made = build("x86_64", section_flags=dict.fromkeys(range(16), flags))
    kernel = CrashedKernel(made.source())
    assert described(kernel)[0] == made.struct_paddr(0)
    assert kernel.doubts == []


def test_sections_without_page_structs_or_not_online_are_left_out():
    made = build("x86_64", section_flags={0: PRESENT, 8: PRESENT | HAS_MEM_MAP})
    kernel = CrashedKernel(made.source())
    places = described(kernel)
    pages = 1 << 15
    assert set(made.section_maps) == {0, 1, 2, 8, 9}
    assert {pfn // pages for pfn in places} == {1, 2, 9}
    assert kernel.doubts == ["1 memory sections from 0 on are not online: their page structs may be unwritten"]


def test_a_section_table_that_cannot_be_read_costs_its_sections_only():
    made = build("radix, 64 KiB", ranges=((0, 64 * MIB), (40 * GIB, 64 * MIB)))  # 2048 sections of 16 MiB a root
    array = int(made.info["SYMBOL(mem_section)"], 16)
    made.memory.put(made.paddr(array) + 8, 0xC000_7000_0000_0000)
    kernel = CrashedKernel(made.source())
    assert max(described(kernel)) < 64 * MIB // 0x10000
    assert any(text.startswith("memory sections from 2048 on: ") for text in kernel.doubts)


def test_page_structs_that_are_not_in_the_dump_are_doubted():
    made = build("x86_64", scatter=True)
    lost = made.blocks[made.vmemmap + 2 * MIB]  # of section 1
    shift = 21
    made.map(made.vmemmap + 2 * MIB, 800 * MIB, shift)
    kernel = CrashedKernel(made.source())
    places = described(kernel)
    pages = 1 << 15
    assert lost not in places.values()
    assert {pfn // pages for pfn in places} == {0, 2, 8, 9}
    assert kernel.doubts == ["the page structs of page frames 0x8000-0x10000 are not in the dump"]


def test_a_hole_where_no_memory_is_is_no_doubt():
    """Sections are whole, memory is not: page structs of what is beyond its end need not be mapped."""
    made = build("x86_64", vmemmap_shift=12, ranges=((0, 64 * MIB), (GIB, 100 * MIB)))
    for pfn in range((GIB + 100 * MIB) >> 12, (GIB + 128 * MIB) >> 12, 64):
        made.memory.put(entry_of(made, made.vmemmap + pfn * 64), 0)
    kernel = CrashedKernel(made.source())
    places = described(kernel)
    assert max(places) < (GIB + 100 * MIB) >> 12
    assert kernel.doubts == []


def entry_of(made: SyntheticKernel, vaddr: int) -> int:
    """The physical address of x86_64's last-level entry for an address that is mapped with 4 KiB pages."""
    table = made.root
    for shift in (39, 30, 21):
        table = made.memory.get(table + 8 * (vaddr >> shift & 511)) & 0xFFFFFFFFFF000
    return table + 8 * (vaddr >> 12 & 511)


def test_a_page_table_that_is_not_in_the_dump_is_doubted():
    made = build("x86_64", vmemmap_shift=12)
    table = made.root
    for shift in (39, 30):
        table = made.memory.get(table + 8 * (made.vmemmap >> shift & 511)) & 0xFFFFFFFFFF000
    made.memory.put(table, 800 * MIB | 0x67)
    kernel = CrashedKernel(made.source())
    assert min(described(kernel)) == 1 << 15
    assert any("page table of virtual addresses 0xffffea0000000000-0xffffea0000200000" in text for text in kernel.doubts)


def test_structs_across_two_pages_have_no_one_place():
    """56 bytes do not divide 4 KiB: where two pages are no neighbours the struct between them is left out, and only that."""
    made = build("x86_64", struct_size=56, vmemmap_shift=12, scatter=True, ranges=((0, 64 * MIB),))
    kernel = CrashedKernel(made.source())
    places = described(kernel)
    assert 73 not in places  # bytes 4088 to 4144
    assert {72, 74} <= set(places)
    assert places[74] == made.blocks[made.vmemmap + 0x1000] + 74 * 56 - 0x1000
    assert len(kernel.doubts) == 20  # the first few are enough


@pytest.mark.parametrize("target", [0, 1, -1])
def test_a_list_without_an_end_is_noticed(target):
    made = build("hash, 64 KiB")
    made.memory.put(made.list_entries[0] - made.linear, made.list_entries[target])
    kernel = CrashedKernel(made.source())
    assert any("does not end" in text for text in kernel.doubts)
    assert described(kernel)[0] == made.struct_paddr(0)  # all of the list was read before it began again


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [(0, 0xC000_7FFF_0000_0000, "not in the dump"), (0, 0x1234, "not mapped"), (0, 0xC000_0000_0000_FFF8, "across pages")],
)
def test_a_list_that_leads_nowhere_is_doubted(offset, value, message):
    made = build("hash, 64 KiB")
    made.memory.put(made.list_entries[-1] - made.linear + offset, value)
    kernel = CrashedKernel(made.source())
    assert any(text.startswith("where the page structs are: ") and message in text for text in kernel.doubts)
    assert len(described(kernel)) == 256  # the one block that was read has the last section's


@pytest.mark.parametrize("shift", [0, 11, 40, 0xFFFFFFFF])
def test_an_implausible_block_size_is_doubted(shift):
    made = build("hash, 64 KiB")
    made.memory.put(made.paddr(int(made.info["SYMBOL(mmu_psize_defs)"], 16)) + 9 * 96 + 4, shift, 4)
    kernel = CrashedKernel(made.source())
    assert described(kernel) == {}
    assert any("make no sense" in text for text in kernel.doubts)


@pytest.mark.parametrize(
    "key", ["SYMBOL(mem_section)", "SIZE(mem_section)", "OFFSET(mem_section.section_mem_map)", "SIZE(page)"]
)
@pytest.mark.parametrize("layout", ["x86_64", "hash, 64 KiB"])
def test_what_vmcoreinfo_lacks_is_doubted(layout, key):
    made = build(layout)
    del made.info[key]
    kernel = CrashedKernel(made.source())
    assert described(kernel) == {}
    assert any(key in text for text in kernel.doubts)


@pytest.mark.parametrize("key", ["NUMBER(SECTION_SIZE_BITS)", "NUMBER(MAX_PHYSMEM_BITS)", "LENGTH(mem_section)"])
@pytest.mark.parametrize("layout", ["x86_64", "radix, 64 KiB"])
def test_older_kernels_say_less(layout, key):
    made = build(layout)
    del made.info[key]
    kernel = CrashedKernel(made.source())
    assert described(kernel) == described(CrashedKernel(build(layout).source()))
    assert kernel.doubts == []


@pytest.mark.parametrize(
    ("layout", "key"),
    [("x86_64", "SYMBOL(init_top_pgt)"), ("x86_64", "NUMBER(phys_base)"), ("radix, 4 KiB", "SYMBOL(swapper_pg_dir)")],
)
def test_without_a_page_table_there_is_no_kernel(layout, key):
    made = build(layout)
    del made.info[key]
    with pytest.raises(FormatError, match=key.split("(")[1].strip(")")):
        CrashedKernel(made.source())


@pytest.mark.parametrize(
    ("key", "value"),
    [("SIZE(page)", 1 << 70), ("SIZE(page)", 0), ("SIZE(mem_section)", 24), ("SIZE(mem_section)", 1 << 20),
     ("OFFSET(mem_section.section_mem_map)", 40), ("NUMBER(SECTION_SIZE_BITS)", 12), ("NUMBER(SECTION_SIZE_BITS)", 1 << 40)],
)  # fmt: skip
def test_nonsense_in_vmcoreinfo_is_doubted(key, value):
    made = build("x86_64")
    made.info[key] = str(value)
    kernel = CrashedKernel(made.source())
    assert described(kernel) == {}
    assert kernel.doubts


def test_a_large_machine_takes_little_memory():
    """1 TiB of ppc64 has 65,536 sections; what is read ahead does not grow with it."""
    made = SyntheticKernel(arch="ppc64le", page_size=0x10000, ranges=((0, TIB),), vmemmap_shift=21)
    source = made.source()
    tracemalloc.start()
    runs = sum(1 for _ in CrashedKernel(source).page_structs())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert runs == 33  # the builder's 32 tables of sections lie between the blocks
    assert peak < 8 * MIB
    assert source.reads < 200


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_survives_hostile_memory_and_vmcoreinfo(data):
    layout = data.draw(st.sampled_from(["x86_64", "radix, 64 KiB", "hash, 64 KiB", "hash, 4 KiB, blocks of 16 MiB"]))
    made = build(layout, ranges=((0, 40 * MIB),))
    words = st.sampled_from((0, 1, (1 << 64) - 1, 1 << 63, 0xC000_0000_0000_0000, 0xFFFF_8880_0000_0000)) | st.integers(
        0, 1 << 32
    )
    used = [
        number * 0x10000 + int(at) * 8
        for number, block in made.memory.blocks.items()
        for at in np.flatnonzero(np.frombuffer(block, np.uint64))
    ]
    for _ in range(data.draw(st.integers(1, 6))):
        at = used[data.draw(st.integers(0, len(used) - 1))]
        made.memory.write(at, data.draw(words).to_bytes(8, data.draw(st.sampled_from(("little", "big")))))
    for _ in range(data.draw(st.integers(0, 2))):
        key = data.draw(st.sampled_from(sorted(key for key in made.info if key not in ("PAGESIZE", "OSRELEASE"))))
        made.info[key] = data.draw(st.sampled_from(("0", "1", "-1", "7", "ffffffffffffffff", "99999999999999999999999")))
    try:
        kernel = CrashedKernel(made.source())
        for run in islice(kernel.page_structs(), 20_000):
            assert made.source().memory.covers(Range.sized(run.paddr, run.count * kernel.info.size("page")))
        assert len(kernel.doubts) <= 20
    except CrashkernelError:
        pass
