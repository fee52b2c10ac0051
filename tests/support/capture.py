"""A small dead machine for what compresses and writes: memory in an array, and a class for each page."""

import numpy as np

from crashkernel.capture.selection import Chunk, Findings, PageClass
from crashkernel.errors import EnvironmentFault
from crashkernel.formats.diskdump import Utsname
from crashkernel.formats.elf import EM_PPC64
from crashkernel.formats.vmcoreinfo import VmcoreInfo
from crashkernel.memory import Range, RangeSet
from crashkernel.vmcore.identity import Identity
from crashkernel.vmcore.source import MissingMemory
from support.elfwriter import write_note

LINEAR_BASE = 0xC000_0000_0000_0000


def page_of(kind: int, seed: int, page_size: int) -> bytes:
    """A page of zeros, of text, of pointers, of noise, or nearly empty."""
    rng = np.random.default_rng(seed)
    if kind == 0:
        return bytes(page_size)
    if kind == 1:
        return (b"the kernel says %d; " % seed * page_size)[:page_size]
    if kind == 2:
        return (np.uint64(LINEAR_BASE) + rng.integers(0, 1 << 20, page_size // 8).astype(np.uint64)).tobytes()
    if kind == 3:
        return rng.bytes(page_size)
    page = bytearray(page_size)
    page[-1] = seed % 255 + 1
    return bytes(page)


class ArraySource:
    """Page frames `pfns` hold `pages`; those in `broken` cannot be read."""

    name = "array"
    machine = EM_PPC64
    linear_base = LINEAR_BASE

    def __init__(
        self, pages: dict[int, bytes], page_size: int, byteorder: str = "little", broken: tuple[int, ...] = ()
    ) -> None:
        self.pages = pages
        self.page_size = page_size
        self.byteorder = byteorder
        self.broken = broken
        text = f"OSRELEASE=6.1.0-test\nPAGESIZE={page_size}\n".encode()
        self.notes = write_note(byteorder, "VMCOREINFO", 0, text)
        self.vmcoreinfo = VmcoreInfo.from_bytes(text)
        self.memory = RangeSet(Range.sized(pfn * page_size, page_size) for pfn in pages)

    def read(self, paddr, size):
        raise NotImplementedError

    def read_pages(self, pfns, into):
        for number, pfn in enumerate(pfns.tolist()):
            if pfn in self.broken:
                raise EnvironmentFault(f"page frame {pfn:#x} cannot be read")
            if pfn not in self.pages:
                raise MissingMemory(pfn * self.page_size, self.page_size)
            into[number * self.page_size : (number + 1) * self.page_size] = np.frombuffer(self.pages[pfn], np.uint8)


class ListedSelection:
    """Pages of a source by a given class, in chunks of a given size."""

    def __init__(
        self,
        source: ArraySource,
        classes: dict[int, PageClass],
        level: int = 31,
        chunk: int = 7,
        doubtful: tuple[int, ...] = (),
    ) -> None:
        self.findings = Findings()
        self.concluded: list[list[int]] = []
        self.changes: list[dict[int, PageClass]] = []  # of mind, one after each pass
        self._doubtful = doubtful
        self.page_size = source.page_size
        self.level = level
        self.max_pfn = max(source.pages) + 1
        self._source, self._classes, self._chunk = source, classes, chunk

    def chunks_of(self, first, last):
        pfns = [pfn for pfn in sorted(self._source.pages) if first <= pfn < last]
        start = 0
        while start < len(pfns):
            end = start + 1
            while end < len(pfns) and pfns[end] == pfns[end - 1] + 1 and end - start < self._chunk:
                end += 1
            classes = [self._classes.get(pfn, PageClass.KEPT) for pfn in pfns[start:end]]
            yield Chunk(pfns[start], np.array(classes, np.uint8))
            start = end
        if first in self._doubtful:
            self.findings.note("nobody knows what {count} pages from {place} on are", first, 5)

    def conclude(self, classes):
        self.concluded.append(classes.tolist())
        if len(self.concluded) > len(self.changes):
            return False
        self._classes = self.changes[len(self.concluded) - 1]
        return True


def all_chunks(selection):
    """Every chunk of a selection."""
    return selection.chunks_of(0, selection.max_pfn)


def identity(byteorder: str = "little") -> Identity:
    """Who the dead kernel was."""
    machine = "ppc64le" if byteorder == "little" else "ppc64"
    return Identity(Utsname(release="6.1.0-test", machine=machine), 0, LINEAR_BASE, 1700000000)
