"""What a dump keeps: every page of K1 has a class, and the dump level says which classes are dropped.

The dump level is makedumpfile's (`makedumpfile(8)`, option -d): a sum of 1 (pages of zeros), 2 (page cache), 4 (page cache
with private data), 8 (user data) and 16 (free pages). Whether a page is all zeros is not known before it is read, so zero pages
are no class here: the writer finds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

DL_ZERO, DL_CACHE, DL_CACHE_PRIVATE, DL_USER, DL_FREE = 1, 2, 4, 8, 16
MAX_DUMP_LEVEL = 31


class PageClass(IntEnum):
    """Why a page is kept or not. Only `KEPT` pages are in the dump; `ABSENT` ones are no memory of K1's."""

    KEPT = 0
    CACHE = 1
    CACHE_PRIVATE = 2
    USER = 3
    FREE = 4
    POISONED = 5  # hardware-poisoned: reading it may kill K2, so it is dropped at every level
    OFFLINE = 6  # logically offline (balloon, virtio-mem): dropped at every level that filters
    DROPPED = 7  # left out by who wrote the dump that is read; why is not known
    ABSENT = 255


def pages_of_each_class(classes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How many pages there are of each class, by its number; in less than half the time of `np.bincount`, which converts."""
    counts = np.zeros(256, np.int64)
    for each in PageClass:
        counts[each] = np.count_nonzero(classes == each)
    return counts


class Chunk(NamedTuple):
    """Consecutive pages from page frame `pfn` on, with the `PageClass` of each as a byte."""

    pfn: int
    classes: NDArray[np.uint8]


class Findings:
    """What could not be told, so that pages are kept: doubts, in words for the console.

    Many processes find, each in its part of the machine, and some twice: a finding has a place, and counts once there. In its
    text {count} stands for the sum over all places, {place} for the lowest.
    """

    def __init__(self) -> None:
        self._counts: dict[str, dict[int, int]] = {}

    def note(self, text: str, place: int = 0, count: int = 0) -> None:
        """There is this to doubt at `place` (any number that orders places), about `count` things."""
        self._counts.setdefault(text, {})[place] = count

    def entries(self) -> list[tuple[str, int, int]]:
        """Everything noted, as `note` takes it."""
        return [(text, place, count) for text, places in self._counts.items() for place, count in places.items()]

    def doubts(self) -> list[str]:
        """Everything in words."""
        return [
            text.replace("{count}", f"{sum(places.values()):,}").replace("{place}", f"{min(places):#x}")
            for text, places in self._counts.items()
        ]


class Selection(Protocol):
    """Which pages of a source go into a dump.

    It can be asked more than once, by many processes, and gives the same answer: a dump's page descriptors stand before its
    pages, so a writer must know how many there are before it writes the first.
    """

    page_size: int  # bytes
    max_pfn: int  # one more than the highest page frame number of the source
    level: int  # the dump level that was applied, 0 to 31
    findings: Findings

    def chunks_of(self, first: int, last: int) -> Iterator[Chunk]:
        """Yield the classes of every page of the page frames [first, last) that is there, in ascending order, each once.

        Memory in use does not grow with the machine.
        """
        ...

    def conclude(self, classes: NDArray[np.int64]) -> bool:
        """Everything was gone over, and there were so many pages of each class: whether that makes a difference.

        If so it has changed its mind, and everything must be gone over again.
        """
        ...
