"""What each page of a dead kernel was: its own lists and pointers decide, in the page structs of many years."""

import re

import numpy as np
import pytest

from crashkernel.drill.oracle import May, droppable
from crashkernel.errors import FormatError, VerificationError
from support.deadpages import LAYOUTS, DeadKernel
from support.pages import ERA_5_10, ERA_7_1, ERAS


@pytest.mark.parametrize("era", [era for era in ERAS if era.size == 64], ids=lambda era: era.name)
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[4]], ids=str)
def test_every_class_in_the_structs_of_every_year(era, layout):
    dead = DeadKernel(era, layout)
    structs = dead.structs
    structs.cache(10)
    structs.cache(11, private=True)
    structs.anon(12)
    structs.anon(13, listed=False)
    structs.swapcache(14)
    structs.slab(15)
    structs.hugetlb(32, 4)
    structs.compound(64, 3)  # of the kernel's own
    structs.compound(80, 2)
    structs.anon(80)
    structs.compound(96, 2)
    structs.cache(96)
    structs.flag(120, "hwpoison")
    structs.type(121, "OFFLINE")
    dead.free(128, 4)
    dead.free(192, 0, zone=0, kind=2)
    expected = {
        **{10: May.CACHE, 11: May.CACHE_PRIVATE, 12: May.USER, 13: May.USER, 14: May.CACHE},
        **dict.fromkeys(range(32, 48), May.USER),
        **dict.fromkeys(range(80, 84), May.USER),
        **dict.fromkeys(range(96, 100), May.CACHE),
        **{120: May.POISONED, 121: May.OFFLINE, 192: May.FREE},
        **dict.fromkeys(range(128, 144), May.FREE),
    }
    assert {pfn: what for pfn, what in enumerate(dead.may_be()) if what} == expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("arch", ["ppc64le", "ppc64"])
def test_page_structs_are_found_however_they_are_mapped(layout, arch):
    dead = DeadKernel(layout=layout, arch=arch)
    last = dead.pages - 1
    for pfn in (0, 100, last):
        dead.structs.cache(pfn)
    assert np.flatnonzero(dead.oracle().may_be()).tolist() == [0, 100, last]


def test_free_is_what_the_allocator_has_on_its_lists_and_not_what_is_marked():
    dead = DeadKernel()
    dead.structs.free(16, 2)  # marked, on no list
    dead.free(32, 1)
    dead.list(40, 1)  # on a list, not marked
    assert np.flatnonzero(dead.oracle().free()).tolist() == [32, 33, 40, 41]


@pytest.mark.parametrize("era", [ERA_5_10, ERA_7_1], ids=lambda era: era.name)
def test_a_tail_is_what_its_head_is_even_if_its_own_struct_says_otherwise(era):
    dead = DeadKernel(era)
    dead.structs.compound(64, 2)
    for tail in (65, 66, 67):
        dead.structs.map(tail, 0x1001)  # looks anonymous
    assert not any(dead.may_be())


def test_a_mask_leads_to_the_head_too():
    """7.x has in a tail's struct the mask that makes its own address its head's."""
    dead = DeadKernel(ERA_7_1)
    dead.structs.compound(64, 2)
    dead.structs.anon(64)
    for tail in (65, 66, 67):
        dead.structs.put(tail, ERA_7_1.head_info, 8, -(64 << 2) | 1)
    assert {pfn for pfn, what in enumerate(dead.may_be()) if what is May.USER} == {64, 65, 66, 67}


@pytest.mark.parametrize(
    ("level", "allowed"),
    [
        (0, May.POISONED),
        (1, May.POISONED | May.OFFLINE | May.ZERO),
        (2, May.POISONED | May.OFFLINE | May.CACHE),
        (4, May.POISONED | May.OFFLINE | May.CACHE | May.CACHE_PRIVATE),
        (8, May.POISONED | May.OFFLINE | May.USER),
        (16, May.POISONED | May.OFFLINE | May.FREE),
        (31, May(127)),
    ],
)
def test_what_a_level_drops(level, allowed):
    assert droppable(level) == allowed


class TestDamage:
    """The truth is a dead kernel's memory: what does not hold together is said, not believed."""

    def test_a_list_that_leaves_the_page_array(self):
        dead = DeadKernel()
        dead.free(32, 1)
        dead.oracle()
        dead.structs.put(32, 8, 8, 0xC000_0000_0000_1008)
        dead.lists.clear()
        dead.put(dead.head(1, 1, 0), dead.lru(32))
        oracle = dead.oracle()
        with pytest.raises(VerificationError, match="c000000000001008, which is no page"):
            self.relink(dead).free()
        assert oracle.free().sum() == 0

    @staticmethod
    def relink(dead):
        """The oracle over memory in which the first list's head leads to page 32, whatever that says."""
        oracle = dead.oracle()
        memory = oracle._memory.copy()
        at = dead.kernel.paddr(dead.head(1, 1, 0))
        memory[at : at + 8] = np.frombuffer(dead.lru(32).to_bytes(8, "little"), np.uint8)
        oracle._memory = memory
        return oracle

    def test_a_list_without_an_end(self, monkeypatch):
        monkeypatch.setattr("crashkernel.drill.oracle._LONGEST_LIST", 1000)
        dead = DeadKernel()
        dead.structs.put(32, 8, 8, dead.lru(32))
        with pytest.raises(VerificationError, match="has no end"):
            self.relink(dead).free()

    def test_tails_that_point_to_tails(self):
        dead = DeadKernel()
        dead.structs.compound(64, 2)
        dead.structs.put(64, 8, 8, dead.kernel.vmemmap + 60 * 64 + 1)
        with pytest.raises(VerificationError, match="point to no head"):
            dead.may_be()

    def test_a_page_array_that_is_mapped_nowhere(self):
        dead = DeadKernel()
        paddr = dead.kernel.root
        dead.kernel.memory.write(paddr, bytes(8 << 13))
        with pytest.raises(VerificationError, match="is mapped nowhere"):
            dead.oracle()

    @pytest.mark.parametrize("key", ["OFFSET(page.flags)", "NUMBER(PG_lru)", "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)", "SIZE(page)"])
    def test_vmcoreinfo_without_what_is_needed(self, key):
        dead = DeadKernel()
        dead.info = {name: value for name, value in dead.info.items() if name != key}
        dead.kernel.info.pop(key, None)
        with pytest.raises(FormatError, match=re.escape(key)):
            dead.may_be()
