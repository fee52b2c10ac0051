"""Who holds K1's pages, as `/proc/kpageflags` tells.

Sources: stable_page_flags, fs/proc/page.c, of 6.1 and 7.x; include/uapi/linux/kernel-page-flags.h (the bits below 32, a stable
interface: none has moved since 2.6.31) and include/linux/kernel-page-flags.h (KPF_RESERVED, 32 throughout). `/proc/kpagecount`
is not asked: what it knows and this needs, whether a page is mapped at all, is KPF_MMAP.

What it cannot tell apart is called "kernel": K1's own image and early allocations (reserved), pages that a driver allocated,
and free pages on a CPU's own list, which have no flag either.
"""

from __future__ import annotations

import os
from array import array
from itertools import groupby
from typing import TYPE_CHECKING

from crashkernel.machine import Pages
from crashkernel.memory import Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from crashkernel.machine import PageUse
    from crashkernel.memory import RangeSet

_ENTRY = 8  # bytes a page
_UPTODATE, _LRU, _SLAB, _BUDDY, _MMAP, _ANON = 1 << 3, 1 << 5, 1 << 7, 1 << 10, 1 << 11, 1 << 12
_SWAPBACKED, _HEAD, _TAIL, _HUGE, _HWPOISON, _NOPAGE = 1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 19, 1 << 20
_OFFLINE, _ZERO_PAGE, _PGTABLE, _RESERVED = 1 << 23, 1 << 24, 1 << 26, 1 << 32

# A page that was taken out is single and in no list. Flags of what it was, such as ANON and UPTODATE, may stay.
_IN_USE = _LRU | _SLAB | _BUDDY | _MMAP | _HEAD | _TAIL | _OFFLINE | _PGTABLE | _RESERVED


def is_out(flags: int) -> bool:
    """Whether a page of these flags (a word of kpageflags) is out of K1's hands.

    The mark alone does not say so: memory_failure, mm/memory-failure.c, sets it first, and leaves it on a page that it cannot
    take from whoever has it. Of such a page without any flag, a driver's, it cannot be told.
    """
    return bool(flags & _HWPOISON) and not flags & (_IN_USE | _NOPAGE)


def read_pages(root: Path, wanted: RangeSet, page_size: int) -> tuple[Pages, ...]:
    """The pages of `wanted`, in bytes, by who holds them: ascending runs, as long as can be. Holes in memory are left out.

    `page_size` is K1's, in bytes. () when K1 does not tell: without CONFIG_PROC_PAGE_MONITOR, or to others than root.
    """
    runs: list[Pages] = []
    try:
        with (root / "proc/kpageflags").open("rb", buffering=0) as file:
            for each in wanted:
                first = each.start // page_size
                flags = _flags(file.fileno(), first, -(-each.end // page_size))
                page = first
                for use, pages in groupby(_holders(flags)):
                    end = page + sum(1 for _ in pages)
                    run = Range(page * page_size, end * page_size).intersection(each)
                    if use is not None and run is not None:
                        runs.append(Pages(run, use))
                    page = end
    except OSError:
        return ()
    return tuple(runs)


def _flags(descriptor: int, first: int, end: int) -> Iterable[int]:
    """The flags of the pages [first, end), fewer where memory ends."""
    data = bytearray()
    # kpageflags_read refuses whatever is not whole entries, and may give fewer than were asked for
    while chunk := os.pread(descriptor, (end - first) * _ENTRY - len(data), first * _ENTRY + len(data)):
        data += chunk
    return array("Q", bytes(data[: len(data) // _ENTRY * _ENTRY]))


def _holders(flags: Iterable[int]) -> Iterator[PageUse | None]:
    """Who holds each page, None for a hole."""
    known: dict[int, PageUse | None] = {}
    head: PageUse = "kernel"
    for value in flags:
        if value not in known:
            known[value] = _holder(value)
        use = known[value]
        if not value & _TAIL:
            head = use if use not in (None, "poisoned") else "kernel"  # neither heads a compound page
        elif use == "kernel":
            use = head  # before folios (6.1) the pages behind a compound page's first have few flags of their own
        yield use


def _holder(flags: int) -> PageUse | None:
    if flags & _NOPAGE:
        return None
    if is_out(flags):
        return "poisoned"
    for bits, use in _USES:
        if flags & bits:
            return use
    return "kernel"


_USES: tuple[tuple[int, PageUse], ...] = (
    (_BUDDY, "free"),
    (_RESERVED | _OFFLINE | _ZERO_PAGE, "kernel"),  # offline: a balloon's
    (_PGTABLE, "pagetable"),
    (_SLAB, "slab"),
    (_HUGE | _ANON, "anonymous"),
    # Pages on their way to the LRU lists wait in batches. Mapped alone does not count: drivers map theirs for processes.
    (_LRU | _UPTODATE | _SWAPBACKED, "cache"),
)
"""The first that matches, in this order."""
