"""Runs in K1, on its bare Python: takes kernel memory as a driver does for its buffers, says where it lies, and keeps it.

The buffers are a packet socket's receive ring: its pages come one by one from ``__get_free_pages(GFP_KERNEL | ...)``
(``alloc_one_pg_vec_page``, net/packet/af_packet.c), like those of any network driver, and the kernel never writes to them
while the socket is bound to no protocol. Which pages they are is in ``/proc/self/pagemap``
(Documentation/admin-guide/mm/pagemap.rst). So no module has to be built for every kernel that is drilled. (perf's buffers
would do as well, but from 6.14 on pagemap does not show them.)

A driver does not choose its memory, so neither does this: it takes all that K1 gives until it holds enough pages of each
wanted region, or K1 has no more; then it gives the rest back. For each wanted page that was not to be had it keeps another,
so that the device has the same load of DMA wherever its buffers lie. On the standard output, a line each::

    buffer NAME START-END   a page it holds in a wanted region, physical
    buffer elsewhere START-END
    driving PAGES SIZE      the last line: so many pages of SIZE bytes were looked at
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ELSEWHERE = "elsewhere"
"""The region of the pages that stand for those that were not to be had."""

_AF_PACKET, _SOCK_RAW = 17, 3  # include/linux/socket.h, include/linux/net.h
_SOL_PACKET, _PACKET_RX_RING = 263, 5  # include/linux/socket.h, include/uapi/linux/if_packet.h
_PROT_READ, _PROT_WRITE, _MAP_SHARED = 1, 2, 1  # include/uapi/asm-generic/mman-common.h
_MAP_FAILED = (1 << 64) - 1
_PRESENT, _FRAME = 1 << 63, (1 << 55) - 1

_BUFFER = 4 << 20  # bytes; taken at once while there is plenty
_RESERVE = 4 << 10  # KiB that K1 keeps for itself meanwhile, in place of 20 MiB and more with transparent huge pages
_EARLY = 64 << 20  # bytes; ten times a kernel's init section
_LEFT = 24 << 20  # bytes that stay free, lest K1 kills a process for more: this one, it is told below

Span = tuple[int, int]
"""Physical addresses, half-open."""


def parse_wanted(words: Iterable[str]) -> dict[str, tuple[Span, ...]]:
    """The regions of the command line, each `NAME=START-END,START-END`, hexadecimal; a region without ranges is not to be had.

    :raise ValueError: a word is none of this.
    """
    wanted = {}
    for word in words:
        name, separator, ranges = word.partition("=")
        if not separator:
            raise ValueError(f"{word!r} is no NAME=RANGES")
        pairs = (each.split("-") for each in ranges.split(",") if each)
        wanted[name] = tuple((int(start, 16), int(end, 16)) for start, end in pairs)
    return wanted


@dataclass(frozen=True)
class Buffer:
    """One mapped ring: where, how long in bytes, and the physical addresses of its pages."""

    address: int
    size: int
    pages: tuple[int, ...]


class Holding:
    """Which pages are held for which region; `count` are wanted of each."""

    def __init__(self, wanted: Mapping[str, tuple[Span, ...]], count: int, page_size: int) -> None:
        self._wanted = wanted
        self._count = count
        self._page_size = page_size
        self.looked = 0
        self.held: dict[str, list[int]] = {name: [] for name in wanted}

    @property
    def complete(self) -> bool:
        """Whether nothing more can or need be found."""
        return all(not ranges or len(self.held[name]) == self._count for name, ranges in self._wanted.items())

    def look(self, pages: Iterable[int]) -> bool:
        """Look at pages K1 gave out; whether one of them is to be kept."""
        found = False
        for page in pages:
            self.looked += 1
            name = self._region(page)
            if name is not None:
                self.held[name].append(page)
                found = True
        return found

    def _region(self, page: int) -> str | None:
        """The wanted region, not yet full, in which the whole page lies."""
        for name, ranges in self._wanted.items():
            if len(self.held[name]) < self._count and any(
                start <= page and page + self._page_size <= end for start, end in ranges
            ):
                return name
        return None

    def stand_ins(self, pages: Iterable[int]) -> list[int]:
        """As many of `pages` as there are too few in the wanted regions."""
        taken = {page for held in self.held.values() for page in held}
        missing = sum(self._count - len(held) for held in self.held.values())
        return [page for page in pages if page not in taken][:missing]


class Kernel:
    """The few system calls; 64-bit Linux on POWER."""

    def __init__(self) -> None:
        self.page_size = os.sysconf("SC_PAGE_SIZE")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_uint64
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._pagemap = Path("/proc/self/pagemap").open("rb", buffering=0)  # noqa: SIM115  (as long as the process)

    def take(self, pages: int) -> Buffer | None:
        """A ring of so many pages; None when K1 has no memory for it.

        :raise OSError: this kernel has no packet sockets, or does not show where a ring lies.
        """
        ring = self._libc.socket(_AF_PACKET, _SOCK_RAW, 0)
        if ring < 0:
            raise OSError(ctypes.get_errno(), "no packet socket")
        try:
            # struct tpacket_req: blocks of one page, each with one frame
            request = struct.pack("=4I", self.page_size, pages, self.page_size, pages)
            if self._libc.setsockopt(ring, _SOL_PACKET, _PACKET_RX_RING, request, len(request)):
                return None
            size = pages * self.page_size
            address = self._libc.mmap(None, size, _PROT_READ | _PROT_WRITE, _MAP_SHARED, ring, 0)
        finally:
            os.close(ring)  # the mapping holds it
        if address == _MAP_FAILED:
            return None
        buffer = Buffer(address, size, self._physical(address, pages))
        if len(buffer.pages) != pages:
            raise OSError("/proc/self/pagemap does not show where a packet socket's ring lies")
        return buffer

    def _physical(self, address: int, pages: int) -> tuple[int, ...]:
        entries = os.pread(self._pagemap.fileno(), 8 * pages, address // self.page_size * 8)
        frames = struct.unpack(f"={pages}Q", entries)
        return tuple((entry & _FRAME) * self.page_size for entry in frames if entry & _PRESENT)

    def give_back(self, buffer: Buffer) -> None:
        """The pages are K1's again."""
        self._libc.munmap(buffer.address, buffer.size)

    def free(self) -> int:
        """Bytes that nobody holds and a driver may have, unlike those of the contiguous memory allocator."""
        sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(sizes["MemFree"].split()[0]) - int(sizes.get("CmaFree", "0").split()[0]) << 10


@contextlib.contextmanager
def small_reserve() -> Iterator[None]:
    """Single pages between others are handed out last, and many of K1's init pages are: a large reserve would hide them."""
    sysctl = Path("/proc/sys/vm/min_free_kbytes")
    before = sysctl.read_text()
    sysctl.write_text(str(_RESERVE))
    try:
        yield
    finally:
        sysctl.write_text(before)


def take_all(kernel: Kernel, holding: Holding) -> None:
    """Take memory until everything is found or nothing is left; keep what holds a wanted page, and the first for stand-ins."""
    size = _BUFFER // kernel.page_size
    buffers: list[tuple[Buffer, bool]] = []
    while size and not (buffers and holding.complete):
        buffer = kernel.take(size) if kernel.free() > _LEFT + size * kernel.page_size else None
        if buffer is None:
            size //= 2
            continue
        buffers.append((buffer, holding.look(buffer.pages)))
    if not buffers:
        raise MemoryError("K1 has no memory to give")
    spare, used = buffers[0]
    holding.held[ELSEWHERE] = holding.stand_ins(spare.pages)
    for buffer, keep in [(spare, used or bool(holding.held[ELSEWHERE])), *buffers[1:]]:
        if not keep:
            kernel.give_back(buffer)


def keep_early(held: Path) -> None:
    """Hold the memory K1 gives out first after its boot, its freed init, until this process is ended; then `held` exists.

    K1's modules would go there, for good. So a driver that was unloaded again has had it, and it is free when K2 is loaded.
    """
    kernel = Kernel()
    buffers = [kernel.take(_BUFFER // kernel.page_size) for _ in range(_EARLY // _BUFFER)]
    held.write_text(f"{len(buffers)}\n")
    signal.pause()


def main() -> None:
    """Arguments: `early` and a file, or the number of pages wanted of each region and the regions. Ends only by a signal."""
    if sys.argv[1] == "early":
        keep_early(Path(sys.argv[2]))
        return
    # should K1 run out of memory all the same, it is this process that has it
    Path("/proc/self/oom_score_adj").write_text("1000")
    kernel = Kernel()
    holding = Holding(parse_wanted(sys.argv[2:]), int(sys.argv[1]), kernel.page_size)
    with small_reserve():
        # loaded already; unpacked first, these files lie right behind K1's image
        for file in Path("/boot").iterdir():
            file.unlink()
        take_all(kernel, holding)
    for name, pages in holding.held.items():
        for page in pages:
            print(f"buffer {name} {page:#x}-{page + kernel.page_size:#x}")
    print(f"driving {holding.looked} {kernel.page_size}", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
