"""The dump-level filter, against a plain loop over the same page structs, in the kernels of many years and both byte orders."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.capture import pagefilter
from crashkernel.capture.pagefilter import PageFilter
from crashkernel.capture.selection import PageClass
from crashkernel.errors import UsageError
from support.capture import all_chunks
from support.pages import ERA_5_10, ERA_6_16, ERAS, DeadMachine, PageArray

KEPT, CACHE, PRIVATE, USER, FREE = (
    PageClass.KEPT,
    PageClass.CACHE,
    PageClass.CACHE_PRIVATE,
    PageClass.USER,
    PageClass.FREE,
)
PAGES = 2048
every_era = pytest.mark.parametrize("era", ERAS, ids=lambda era: era.name)
both_orders = pytest.mark.parametrize("byteorder", ["little", "big"])


def classes_of(filtered: PageFilter, first: int = 0, last: int | None = None) -> np.ndarray:
    """All classes, by page frame; checks that the chunks come as they must."""
    last = filtered.max_pfn if last is None else last
    found = np.full(filtered.max_pfn, PageClass.ABSENT, np.uint8)
    position = first
    for chunk in filtered.chunks_of(first, last):
        assert position <= chunk.pfn < chunk.pfn + len(chunk.classes) <= last
        found[chunk.pfn : chunk.pfn + len(chunk.classes)] = chunk.classes
        position = chunk.pfn + len(chunk.classes)
    if (first, last) == (0, filtered.max_pfn):
        filtered.conclude(np.bincount(found, minlength=256))
    return found


def select(array: PageArray, level: int, memory=None, **options) -> np.ndarray:
    machine = DeadMachine(array, memory, **options)
    return classes_of(PageFilter(machine, machine, level))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 512 pages, read 128 at a time, so that small arrays have many borders."""
    shrink(monkeypatch)


def shrink(patch) -> None:
    patch.setattr(pagefilter, "_CHUNK_PAGES", 512)
    patch.setattr(pagefilter, "_READ_PAGES", 128)
    patch.setattr(pagefilter, "_LEAST_SAMPLED", 64)
    patch.setattr(pagefilter, "_MOST_SAMPLED", 128)


def sampler(era, byteorder="little") -> PageArray:
    """One of everything, each on a page of its own or at the start of a block."""
    array = PageArray(era, PAGES, byteorder)
    array.cache(1)
    array.cache(2, private=True)
    array.anon(3)
    array.anon(4, listed=False)
    array.swapcache(5)
    array.flag(6, "swapcache")
    array.slab(7)
    array.free(8, 0)
    array.flag(9, "hwpoison")
    array.type(10, "OFFLINE")
    array.cache(11)
    array.flag(11, "hwpoison")
    array.slab(12)
    if "slab" in era.bits:
        array.type(12, "BUDDY")
    array.free(64, 6)
    array.cache(65)
    array.compound(256, 7)
    array.cache(256)
    array.compound(512, 8)
    array.anon(512)
    array.hugetlb(1024, 9)
    array.compound(1536, 4)
    array.compound(1552, 4)
    array.slab(1552)
    return array


class TestClasses:
    @every_era
    @both_orders
    def test_one_of_everything_at_every_level(self, era, byteorder):
        array = sampler(era, byteorder)
        for level in range(32):
            assert np.array_equal(select(array, level), array.expected(level)), level

    @every_era
    @both_orders
    def test_level_31_in_numbers(self, era, byteorder):
        found = select(sampler(era, byteorder), 31)
        counts = {each: int(np.count_nonzero(found == each)) for each in PageClass}
        assert counts[CACHE] == 1 + 1 + 1 + 128  # listed, in the swap cache, poisoned but listed, compound
        assert counts[PRIVATE] == 1
        assert counts[USER] == 2 + 256 + 512
        assert counts[FREE] == 1 + 64
        assert counts[PageClass.POISONED] == counts[PageClass.OFFLINE] == 1
        assert found[65] == FREE, "what a free page was before does not count"
        assert found[6] == found[7] == found[12] == KEPT
        assert not found[1536:1568].any(), "compound pages of the kernel's own are kept, tails and all"

    def test_level_2_keeps_private_cache_and_4_drops_both(self):
        array = sampler(ERA_6_16)
        assert [int(select(array, level)[2]) for level in (2, 4, 6)] == [KEPT, PRIVATE, PRIVATE]
        assert [int(select(array, level)[1]) for level in (2, 4, 6)] == [CACHE, CACHE, CACHE]

    def test_poisoned_and_offline_pages_are_dropped_at_level_0_too(self):
        found = select(sampler(ERA_5_10), 0)
        assert np.flatnonzero(found).tolist() == [9, 10, 11]

    def test_levels_0_and_1_look_at_nothing_without_hardware_poison(self):
        array = sampler(ERA_5_10)
        info = array.era.vmcoreinfo(4096, 11).replace("NUMBER(PG_hwpoison)=22\n", "")
        machine = DeadMachine(array, info=info)
        for level in (0, 1):
            assert not classes_of(PageFilter(machine, machine, level)).any()
        assert not machine.reads

    def test_a_page_that_is_waited_for_is_still_anonymous(self):
        """Bit 7 is PG_waiters where slab is a page type; makedumpfile takes it for PG_slab, its number in old kernels."""
        array = PageArray(ERA_6_16, 4)
        array.anon(1)
        array.put(1, 0, 8, array.get(1, 0, 8) | 1 << 7)
        assert [int(select(array, level)[1]) for level in (2, 8)] == [KEPT, USER]

    def test_unaccepted_memory_is_free_in_blocks_of_the_highest_order(self):
        array = PageArray(ERA_6_16, 4096)
        array.type(1024, "UNACCEPTED")
        array.put(1024, array.era.private, 8, 0xDEAD)
        assert np.flatnonzero(select(array, 16)).tolist() == list(range(1024, 2048))
        assert not select(array, 15).any()

    def test_a_hugetlb_page_whose_structs_are_mapped_again_and_again(self):
        """Every 64th struct is the head's (vmemmap optimised); at level 8 all pages are user data, at 2 none is dropped."""
        array = PageArray(ERA_5_10, 1024)
        array.hugetlb(512, 9)
        array.data[512:] = np.tile(array.data[512:576], (8, 1))
        assert np.array_equal(select(array, 8), np.repeat(np.uint8([KEPT, USER]), 512))
        assert not select(array, 7).any()

    def test_there_are_32_levels(self):
        machine = DeadMachine(PageArray(ERA_5_10, 4))
        for level in (-1, 32):
            with pytest.raises(UsageError, match=f"no dump level {level}"):
                PageFilter(machine, machine, level)


class TestMemory:
    def test_holes_are_absent_and_decide_nothing(self):
        array = PageArray(ERA_6_16, PAGES)
        array.compound(1024, 9)
        array.anon(1024)
        array.free(512, 9)
        memory = [(16, 513), (1025, 1400), (2000, 2001)]
        found = select(array, 31, memory)
        assert np.array_equal(found, array.expected(31, memory)[: len(found)])
        assert len(found) == 2001
        assert found[512] == FREE
        assert found[513] == PageClass.ABSENT
        assert found[1025] == KEPT, "the first page of the compound page is no memory, so nothing is known of the others"

    def test_memory_that_begins_or_ends_inside_a_page(self):
        machine = DeadMachine(sampler(ERA_6_16))
        machine.memory = type(machine.memory)([type(machine.memory.ranges[0])(0x800, 0x2801), *machine.memory.ranges[1:]])
        filtered = PageFilter(machine, machine, 31)
        assert filtered.max_pfn == 3
        assert classes_of(filtered).tolist() == [KEPT, CACHE, PRIVATE]

    def test_no_memory_at_all(self):
        machine = DeadMachine(PageArray(ERA_6_16, 0), [])
        assert list(all_chunks(PageFilter(machine, machine, 31))) == []

    @both_orders
    def test_64_kib_pages_and_structs_in_many_places(self, byteorder, small_chunks):
        array = PageArray(ERA_6_16, PAGES, byteorder, page_size=65536, free_orders=9)
        array.free(256, 8)
        array.hugetlb(512, 9)
        array.cache(100)
        for run in (1, 7, 64, 2048):
            assert np.array_equal(select(array, 31, run=run), array.expected(31)), run

    def test_gigantic_pages_are_not_read(self, small_chunks):
        array = PageArray(ERA_6_16, 1 << 14)
        array.hugetlb(4096, 12)
        array.cache(8192)
        machine = DeadMachine(array)
        assert np.array_equal(classes_of(PageFilter(machine, machine, 31)), array.expected(31))
        assert not [pfn for pfn, count in machine.reads if pfn + count > 4096 + 512 and pfn < 8192]

    def test_after_large_free_blocks_only_the_first_of_each_is_read(self, small_chunks):
        array = PageArray(ERA_6_16, 1 << 14)
        for pfn in range(0, 1 << 14, 1024):
            array.free(pfn, 10)
        array.type(8192, "BUDDY")
        array.put(8192, array.era.mapcount, 4, 5)
        array.anon(8192 + 200)
        machine = DeadMachine(array)
        found = classes_of(PageFilter(machine, machine, 31))
        assert np.array_equal(found, array.expected(31))
        assert int(np.count_nonzero(found == FREE)) == (1 << 14) - 1024
        assert sum(count for _, count in machine.reads) < 4096

    def test_among_huge_pages_too(self, small_chunks):
        array = PageArray(ERA_6_16, 1 << 14)
        for pfn in range(0, 1 << 14, 64):
            (array.compound if pfn % 1024 == 64 else array.hugetlb)(pfn, 6)
        machine = DeadMachine(array)
        assert np.array_equal(classes_of(PageFilter(machine, machine, 8)), array.expected(8))
        assert sum(count for _, count in machine.reads) < 4096
        machine.reads.clear()
        assert not classes_of(PageFilter(machine, machine, 7)).any()
        assert sum(count for _, count in machine.reads) == 1 << 14, "what is kept is not looked for"

    def test_memory_in_use_does_not_grow(self):
        peaks = []
        for pages in (1 << 17, 1 << 19):
            array = PageArray(ERA_6_16, 1 << 15)
            for pfn in range(0, 1 << 15, 64):
                array.free(pfn, 4)
            machine = Repeated(array, pages)
            filtered = PageFilter(machine, machine, 31)
            tracemalloc.start()
            kept = sum(int(np.count_nonzero(chunk.classes == KEPT)) for chunk in all_chunks(filtered))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert kept == pages * 3 // 4
        assert peaks[1] < 1.05 * peaks[0] < 8 << 20


class Repeated(DeadMachine):
    """A machine of many times the same page structs."""

    def __init__(self, array: PageArray, pages: int) -> None:
        super().__init__(array, [(0, pages)])
        self.total = pages

    def page_structs(self, first: int = 0):
        for begin in range(0, self.total, self.array.pages):
            for each in super().page_structs() if begin + self.array.pages > first else ():
                yield type(each)(begin, each.count, each.paddr)


# ------------------------------------------------------------------------------------------------------- random machines


KINDS = ("free", "cache", "private", "anon", "hugetlb", "slab", "kernel", "poison", "offline", "plain")
SITES = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 10), st.booleans()), max_size=40)


@st.composite
def arrays(draw) -> PageArray:
    """A machine's pages as a kernel could have left them: blocks of all kinds, some of what pages were before still there."""
    array = PageArray(draw(st.sampled_from(ERAS)), PAGES, draw(st.sampled_from(("little", "big"))))
    pfn = 0
    for kind, wanted, stale in draw(SITES):
        if pfn == PAGES:
            break
        order = wanted
        while pfn % (1 << order) or pfn + (1 << order) > PAGES:
            order -= 1
        place(array, kind, pfn, order, stale)
        pfn += 1 << order
    return array


def place(array: PageArray, kind: str, pfn: int, order: int, stale: bool) -> None:
    if stale:
        for page in range(pfn, pfn + (1 << order), 3):
            array.anon(page) if page % 2 else array.cache(page)
        if kind != "free":
            array.data[pfn] = array.data[0] * 0
            array.put(pfn, array.era.mapcount, 4, 0)
    if kind == "free":
        array.free(pfn, order)
        return
    if order and kind != "plain":
        (array.hugetlb if kind == "hugetlb" else array.compound)(pfn, order)
    if kind in ("cache", "private"):
        array.cache(pfn, kind == "private")
    elif kind == "anon":
        array.anon(pfn)
    elif kind == "slab":
        array.slab(pfn)
    elif kind == "poison":
        array.flag(pfn, "hwpoison")
    elif kind == "offline":
        array.type(pfn, "OFFLINE")


class TestAnyMachine:
    @given(array=arrays(), level=st.integers(0, 31), run=st.sampled_from((1, 64, 100, PAGES)))
    def test_as_a_plain_loop_finds_it(self, array, level, run):
        with pytest.MonkeyPatch.context() as patch:
            shrink(patch)
            assert np.array_equal(select(array, level, run=run), array.expected(level))

    @given(
        array=arrays(),
        level=st.integers(0, 31),
        ends=st.lists(
            st.integers(0, PAGES) | st.integers(0, PAGES // 512).map(lambda chunk: 512 * chunk), min_size=1, max_size=6
        ),
    )
    def test_parts_are_what_the_whole_is(self, array, level, ends):
        memory = [(3, 700), (701, 1500), (1536, PAGES)]
        with pytest.MonkeyPatch.context() as patch:
            shrink(patch)
            machine = DeadMachine(array, memory)
            filtered = PageFilter(machine, machine, level)
            whole = classes_of(filtered)
            assert np.array_equal(whole, array.expected(level, memory))
            edges = [0, *sorted(ends), PAGES]
            parts = np.full(PAGES, PageClass.ABSENT, np.uint8)
            for first, last in pairwise(edges):
                parts[first:last] = classes_of(filtered, first, last)[first:last]
            assert np.array_equal(parts, whole)

    def test_parts_in_order_are_one_pass_over_the_page_structs(self, small_chunks, monkeypatch):
        array = sampler(ERAS[-1])
        machine = DeadMachine(array)
        filtered = PageFilter(machine, machine, 31)
        asked = []
        look_up = machine.page_structs
        monkeypatch.setattr(machine, "page_structs", lambda first=0: asked.append(first) or look_up(first))
        for parts in ((0, 512, 1024, PAGES), (0, 512, 1024, PAGES), (0, 1024, PAGES)):
            asked.clear()
            found = [classes_of(filtered, first, last)[first:last] for first, last in pairwise(parts)]
            assert np.array_equal(np.concatenate(found), array.expected(31))
            assert asked == [0]
        asked.clear()
        assert np.array_equal(classes_of(filtered, 1024)[1024:], array.expected(31)[1024:])
        assert np.array_equal(classes_of(filtered, 0, 512)[:512], array.expected(31)[:512])
        assert np.array_equal(classes_of(filtered, 1024)[1024:], array.expected(31)[1024:])
        assert len(asked) == 3, "a part elsewhere begins anew"

    @given(
        seed=st.integers(0, 1 << 32), era=st.sampled_from(ERAS), level=st.integers(0, 31), share=st.sampled_from((0, 0.5, 1))
    )
    def test_damage_is_survived_and_says_the_same_twice(self, seed, era, level, share):
        rng = np.random.default_rng(seed)
        array = sampler(era)
        damaged = rng.random(PAGES) < share
        array.data[damaged] = rng.integers(0, 256, (int(damaged.sum()), era.size), np.uint8)
        if share == 0:  # a few wrong words in structs that are right otherwise
            for pfn in rng.integers(0, PAGES, 50):
                at = int(rng.integers(0, era.size // 4)) * 4
                array.put(int(pfn), at, 4, int(rng.choice([0, 1, 0xFFFFFFFF, 0x40, 0x10000, era.types["BUDDY"] & 0xFFFFFFFF])))
        with pytest.MonkeyPatch.context() as patch:
            shrink(patch)
            machine = DeadMachine(array)
            filtered = PageFilter(machine, machine, level)
            first, second = classes_of(filtered), classes_of(filtered)
            halves = np.concatenate([classes_of(filtered, 0, 900)[:900], classes_of(filtered, 900)[900:]])
        assert np.array_equal(first, second)
        assert np.array_equal(first, halves)
        assert set(first.tolist()) <= set(PageClass)
        if share == 0:
            assert np.array_equal(first, array.expected(level))


# ------------------------------------------------------------------------------------------------------------------ doubts


LACKING = [
    ("OFFSET(page.flags)", {CACHE, PRIVATE, USER, FREE}, "no OFFSET(page.flags): every page is kept"),
    ("OFFSET(page.mapping)", {CACHE, PRIVATE, USER}, "user data is kept"),
    ("OFFSET(page.compound_head)", {CACHE, PRIVATE, USER}, "no OFFSET(page.compound_head)"),
    ("OFFSET(page._mapcount)", {FREE}, "no NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)"),
    ("OFFSET(page.private)", {FREE}, "no OFFSET(page.private)"),
    ("NUMBER(PG_lru)", {CACHE, PRIVATE}, "no NUMBER(PG_lru), or none that makes sense: page cache is kept"),
    ("NUMBER(PG_private)", {CACHE, PRIVATE}, "page cache is kept"),
    ("NUMBER(PG_slab)", {USER, FREE, PageClass.OFFLINE}, "no NUMBER(PG_slab)"),
    ("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)", {FREE}, "free pages are kept"),
    ("LENGTH(zone.free_area)", {FREE}, "no LENGTH(zone.free_area)"),
    ("OFFSET(page.compound_order)", set(), "does not say how large compound pages are"),
    ("NUMBER(PG_head_mask)", set(), "does not say how large compound pages are"),
]


class TestDoubts:
    def doubtful(self, array: PageArray, level: int = 31, info: str | None = None, **options) -> tuple[np.ndarray, list[str]]:
        machine = DeadMachine(array, info=info, **options)
        filtered = PageFilter(machine, machine, level)
        return classes_of(filtered), filtered.findings.doubts()

    @every_era
    def test_a_sound_machine_leaves_none(self, era):
        assert self.doubtful(sampler(era), counted_free=65)[1] == []

    @pytest.mark.parametrize(
        ("line", "kept", "text", "value"),
        [
            (*case, value)
            for case in LACKING
            for value in (None, "nonsense", "-1", "99999999999")
            if value in (None, "nonsense") or not case[0].startswith("NUMBER(PAGE_")  # a page type can be any number
        ],
    )
    def test_what_vmcoreinfo_lacks_is_kept(self, line, kept, text, value):
        array = sampler(ERA_5_10)
        lines = array.era.vmcoreinfo(4096, 11).splitlines()
        assert any(each.startswith(line + "=") for each in lines)
        changed = [each if not each.startswith(line + "=") else f"{line}={value}" for each in lines]
        if value is None:
            changed = [each for each in lines if not each.startswith(line + "=")]
        found, doubts = self.doubtful(array, info="\n".join(changed))
        assert any(text in each for each in doubts), doubts
        assert not set(found.tolist()) & kept
        assert not np.any((found != KEPT) & (array.expected(31) == KEPT)), "nothing more is dropped than otherwise"

    @pytest.mark.parametrize("size", ["0", "8", "60", "1000000000000", "-64"])
    def test_a_struct_page_of_a_size_that_makes_no_sense(self, size):
        array = sampler(ERA_5_10)
        info = array.era.vmcoreinfo(4096, 11).replace("SIZE(page)=64", f"SIZE(page)={size}")
        found, doubts = self.doubtful(array, info=info)
        assert not found.any()
        assert "every page is kept" in doubts[0]

    def test_pages_without_structs_are_kept(self):
        array = sampler(ERA_6_16)
        machine = DeadMachine(array, run=256)
        machine.gaps = [(512, 1024)]
        filtered = PageFilter(machine, machine, 31)
        expected = array.expected(31)
        expected[512:1024] = KEPT
        assert np.array_equal(classes_of(filtered), expected)
        assert filtered.findings.doubts() == ["512 pages of memory have no page structs: they are kept"]

    def test_structs_that_cannot_be_read_are_kept(self):
        array = sampler(ERA_6_16)
        found, doubts = self.doubtful(array, run=256, unreadable=(300, 301))
        expected = array.expected(31)
        expected[256:512] = KEPT
        assert np.array_equal(found, expected)
        assert doubts == ["the page structs of 256 pages cannot be read: they are kept"]

    def test_a_page_array_that_was_overwritten_is_kept(self):
        array = sampler(ERA_6_16)
        array.data[1024:] = np.random.default_rng(5).integers(0, 256, (1024, array.era.size), np.uint8)
        found, doubts = self.doubtful(array)
        assert np.array_equal(found[:1024], array.expected(31)[:1024])
        assert not found[1024:].any()
        assert doubts == [
            "what should be page structs, of 1,024 pages from page frame 0x400 on, is something else: they are kept"
        ]

    def test_structs_that_were_never_set_up_are_no_damage(self):
        array = sampler(ERA_6_16)
        array.data[1024:] = 0xFF
        found, doubts = self.doubtful(array)
        assert not found[1024:].any()
        assert doubts == []

    @pytest.mark.parametrize(("pfn", "order"), [(100, 3), (64, 11), (64, 64), (64, 1 << 40)])
    def test_a_free_block_of_an_impossible_size_or_place(self, pfn, order):
        array = PageArray(ERA_6_16, PAGES)
        array.free(pfn, order)
        array.free(1024, 10)
        found, doubts = self.doubtful(array)
        assert np.flatnonzero(found).tolist() == list(range(1024, 2048))
        assert doubts == ["1 free blocks have an impossible size or place: they are kept"]

    def test_more_free_pages_than_the_kernel_counts_are_kept(self):
        array = sampler(ERA_6_16)
        for pfn in range(1600, PAGES):
            array.free(pfn, 0)
        found, doubts = self.doubtful(array, counted_free=65)
        assert np.array_equal(found, array.expected(31 - 16))
        assert doubts == ["25% of memory is marked free, but the kernel counts 3%: free pages are kept"]

    def test_an_excess_that_only_the_whole_shows_is_taken_back(self):
        """Where the samples look there is no free page; elsewhere far more than the kernel counts."""
        array = PageArray(ERA_6_16, 1 << 15)
        machine = Repeated(array, 1 << 22)
        machine.counted_free = 1000
        filtered = PageFilter(machine, machine, 31)
        assert filtered.findings.doubts() == []
        counts = np.zeros(256, np.int64)
        counts[FREE] = 1 << 21
        assert filtered.conclude(counts)
        assert filtered.findings.doubts() == ["50% of memory is marked free, but the kernel counts 0%: free pages are kept"]
        for pfn in range(0, 1 << 15, 1024):
            array.free(pfn, 10)
        assert not classes_of(filtered, 0, 1 << 15)[: 1 << 15].any()
        assert not filtered.conclude(counts)

    def test_what_the_kernel_comes_to_doubt_on_the_way_is_a_finding(self):
        machine = DeadMachine(PageArray(ERA_6_16, 512))
        filtered = PageFilter(machine, machine, 31)
        machine.doubts.append("memory sections from 8 on: not there")
        classes_of(filtered)
        assert filtered.findings.doubts() == ["memory sections from 8 on: not there"]

    def test_fewer_free_pages_than_the_kernel_counts(self):
        found, doubts = self.doubtful(sampler(ERA_6_16), counted_free=1000)
        assert np.count_nonzero(found == FREE) == 65
        assert doubts == ["65 pages are marked free, but the kernel counts 1,000: the others are kept"]

    def test_a_large_machine_is_sampled_before_its_free_pages_are_believed(self):
        array = PageArray(ERA_6_16, 1 << 15)
        for pfn in range(0, 1 << 15, 1024):
            array.free(pfn, 10)
        machine = Repeated(array, 1 << 22)
        machine.counted_free = 1000
        filtered = PageFilter(machine, machine, 31)
        assert not classes_of(filtered, 0, 1 << 16)[: 1 << 16].any()
        assert len(filtered.findings.doubts()) == 1
        machine.counted_free = 3 << 20  # of 1 << 22: that may be the sample
        assert classes_of(PageFilter(machine, machine, 31), 0, 1 << 16)[: 1 << 16].all()
