"""Is the reserved region large enough? What K2 needs at its peak, each need with its source.

K2 has two peaks. While it unpacks its initrd, packed and unpacked lie in memory together; while it captures, the unpacked one
and the program that saves the dump do. All else is there at both. Nothing here reads a host: values in, values out.

Drills with falling reservations showed where K2 stops (Debian's kernels as K1 and K2, a twin of 1 GiB and one CPU, an initrd of
2.7 MB, dd; `tests/unit/test_sizing.py` holds the estimate against it):

| K2 | fails with | saves its dump with | estimate there |
| --- | --- | --- | --- |
| 6.1 radix, 64 KiB pages | 80, 96, 104 MiB | 112 MiB | 111 MiB |
| 6.1 hash, 64 KiB pages | 80, 88 MiB | 96 MiB | 93 MiB |
| 6.12 radix, 64 KiB pages | | 112, 128 MiB | 111 MiB |
| 6.12 radix, 4 KiB pages | 88 MiB | 96 MiB | 95 MiB |
| 7.2 radix, 4 KiB pages | | 96 MiB | 97 MiB |

That is K2 with three drivers. Real adapters take tens of MiB each, which nobody knows beforehand: hence a quarter of the peak
must be to spare before a reservation is called ample.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from crashkernel.errors import FormatError
from crashkernel.memory import Range, RangeSet, align_up, format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from crashkernel.machine import Machine, Mmu

Phase = Literal["always", "unpacking", "capturing"]
Verdict = Literal["ample", "tight", "too small"]
Vendor = Literal["rhel", "debian", "suse"]

_KIB, _MIB, _GIB, _TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
SMALL_PAGE, LARGE_PAGE = 4 * _KIB, 64 * _KIB
"""The two base page sizes of ppc64 kernels, in bytes."""

# ------------------------------------------------------------------------------------------------------------- the initrd

MOST_UNPACKED = 64 * _GIB
"""What no initrd unpacks to, in bytes: a file made to exhaust who reads it does."""

_CHUNK = 1 << 18
_LZMA_MEMORY = 256 * _MIB  # more than xz -9's 65 MiB
_INODE = _KIB  # a shmem inode and its directory entry, mm/shmem.c and fs/dcache.c

# Where files could not be counted. What fills up their last pages, seen of Debian's module trees: 124 MB of 3,100 files take
# 130 MB in 4 KiB pages and 275 MB in 64 KiB pages.
_ROUNDED_SMALL, _ROUNDED_LARGE = 1.05, 2.2

_BLOCK_LZ4 = 8 * _MIB  # LZ4_DEFAULT_UNCOMPRESSED_CHUNK_SIZE, lib/decompress_unlz4.c
_BLOCK_ZSTD = 128 * _KIB  # Block_Maximum_Size, RFC 8878 3.1.1.2.3
# Of formats that no library here reads, where they do not say: assumptions. zstd's best levels split blocks, up to hundreds of
# times, so that their number says too much.
_RATIO, _RATIO_ZSTD = 2.5, 4


@dataclass(frozen=True, slots=True)
class Initrd:
    """An initial RAM file system: what it takes in K2's memory as loaded and as unpacked. All sizes in bytes.

    `unpacked` is the contents of its files. In memory each begins a page of its own, so that many small files take twice as
    much on 64 KiB pages: `in_memory` says that. `exact` is whether the files were counted or guessed.
    """

    size: int
    unpacked: int
    small_pages: int = 0
    large_pages: int = 0
    entries: int = 0
    exact: bool = True

    def in_memory(self, page_size: int) -> int:
        """What the unpacked files take in K2's page cache and inodes, for a K2 of that base page size, in bytes."""
        pages = self.small_pages if page_size <= SMALL_PAGE else self.large_pages
        return pages + self.entries * _INODE


def measure_initrd(data: bytes, source: str = "") -> Initrd:
    """What an initrd unpacks to: any number of cpio archives one behind the other, each compressed or not (init/initramfs.c).

    gzip, bzip2, xz and lzma are unpacked, a chunk at a time; of zstd and lz4 the blocks are counted, which comes close; lzo is
    taken to be 2.5 times as large. What is none of these at the start is an old RAM disk image, as large as it is.
    :raise FormatError: what K2 could not unpack either (cut off, damaged, no cpio archive inside), or more than MOST_UNPACKED.
    """
    view, at = memoryview(data), 0
    meter, guessed = _Meter(source), 0
    while at < len(view):
        if view[at] == 0:
            at += 1 if at % 4 else _zeros(view, at)
            continue
        kind = next((kind for magic, kind in _MAGICS.items() if view[at : at + len(magic)] == magic), None)
        if kind is None:
            if at == 0:
                guessed = len(view)
            break  # the kernel says "invalid magic" and goes on without it; some boot loaders leave their padding there
        if kind == "cpio":
            at += meter.feed(view[at:], whole=True)
        elif kind in _OPENERS and (stream := _opened(kind)) is not None:
            at = _unpack(view, at, kind, stream, meter, source)
        else:
            size, at = _guess(view, at, kind, source)
            guessed += size
    total = meter.total + guessed
    _limit(total, source)
    return Initrd(
        size=len(data),
        unpacked=total,
        small_pages=meter.small_pages + align_up(int(guessed * _ROUNDED_SMALL), SMALL_PAGE),
        large_pages=meter.large_pages + align_up(int(guessed * _ROUNDED_LARGE), LARGE_PAGE),
        entries=meter.entries,
        exact=not guessed,
    )


_MAGICS = {
    b"070701": "cpio",
    b"070702": "cpio",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x5d\0\0": "lzma",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x89LZO\0\r\n\x1a\n": "lzo",
}


def _zeros(view: memoryview, at: int) -> int:
    run = bytes(view[at : at + _CHUNK])
    return len(run) - len(run.lstrip(b"\0"))


def _limit(total: int, source: str) -> None:
    if total > MOST_UNPACKED:
        raise FormatError(f"unpacks to more than {format_size(MOST_UNPACKED)}: no initrd does", source=source)


class _Stream(Protocol):
    """What bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    """zlib's object, with the manners of the other two."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 16)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int = 0) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


def _bzip2() -> _Stream:
    import bz2  # noqa: PLC0415

    return bz2.BZ2Decompressor()


def _xz() -> _Stream:
    import lzma  # noqa: PLC0415

    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY)


def _lzma() -> _Stream:
    import lzma  # noqa: PLC0415

    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY)


_OPENERS: dict[str, Callable[[], _Stream]] = {"gzip": _Gzip, "bzip2": _bzip2, "xz": _xz, "lzma": _lzma}
"""Imported when they are needed: a Python in an initramfs may lack what bz2 and lzma stand on."""


def _opened(kind: str) -> _Stream | None:
    """A decompressor, None when this Python has none for it."""
    try:
        return _OPENERS[kind]()
    except ImportError:
        return None


def _unpack(view: memoryview, at: int, kind: str, stream: _Stream, meter: _Meter, source: str) -> int:
    """Count what is in the compressed stream at `at`; where it ends."""
    begin = at
    try:
        while not stream.eof:
            piece = b""
            if stream.needs_input:
                piece = bytes(view[at : at + _CHUNK])
                if not piece:
                    raise FormatError(f"the {kind} stream is cut off", source=source, offset=begin)
                at += len(piece)
            found = stream.decompress(piece, _CHUNK)
            if meter.feed(memoryview(found)) != len(found):
                raise FormatError(f"what the {kind} stream holds is no cpio archive", source=source, offset=begin)
            _limit(meter.total, source)
    except FormatError:
        raise
    except Exception as error:  # each library has errors of its own, and lzma's cannot be named without it
        raise FormatError(f"the {kind} stream cannot be unpacked: {error}", source=source, offset=begin) from error
    meter.close(begin)
    return at - len(stream.unused_data)


def _guess(view: memoryview, at: int, kind: str, source: str) -> tuple[int, int]:
    """How much a stream unpacks to that no library here reads, and where it ends."""
    if kind == "zstd":
        return _zstd_frame(view, at, source)
    if kind == "lz4":
        return _lz4_blocks(view, at, source)
    return int((len(view) - at) * _RATIO), len(view)


def _zstd_frame(view: memoryview, start: int, source: str) -> tuple[int, int]:
    """RFC 8878 3.1.1: the frame's own word for its size, or what its blocks can hold, most of which are full."""
    at = start + 4
    descriptor = _number(view, at, 1, "zstd", source)
    single, content_flag = descriptor >> 5 & 1, descriptor >> 6
    at += 1 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    width = (single, 2, 4, 8)[content_flag]
    content = _number(view, at, width, "zstd", source) + (256 if width == 2 else 0)
    at += width
    largest = raw = 0
    while True:
        header = _number(view, at, 3, "zstd", source)
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        if kind == 3:
            raise FormatError("a zstd block of the reserved type", source=source, offset=at)
        at += 3 + (1 if kind == 1 else size)
        largest += _BLOCK_ZSTD if kind == 2 else size
        raw += size
        if last:
            break
    at += 4 * (descriptor >> 2 & 1)
    if at > len(view):
        raise FormatError("the zstd stream is cut off", source=source, offset=start)
    return content if width else min(largest, max(raw, _RATIO_ZSTD * (at - start))), at


def _lz4_blocks(view: memoryview, start: int, source: str) -> tuple[int, int]:
    """The legacy format, the only one the kernel reads (lib/decompress_unlz4.c): blocks of 8 MiB, the last one smaller."""
    at, sizes = start + 4, []
    while at + 4 <= len(view):
        size = int.from_bytes(view[at : at + 4], "little")
        if not 0 < size <= 2 * _BLOCK_LZ4 or size == _LZ4_MAGIC:
            break  # zeros, or another archive
        at += 4 + size
        sizes.append(size)
    if not sizes or at > len(view):
        raise FormatError("the lz4 stream is cut off", source=source, offset=start)
    return (len(sizes) - 1) * _BLOCK_LZ4 + min(_BLOCK_LZ4, int(sizes[-1] * _RATIO)), at


_LZ4_MAGIC = 0x184C2102


def _number(view: memoryview, at: int, width: int, kind: str, source: str) -> int:
    if at + width > len(view):
        raise FormatError(f"the {kind} stream is cut off", source=source, offset=at)
    return int.from_bytes(view[at : at + width], "little")


class _Meter:
    """Counts the files of cpio archives (newc) that come by in pieces, and keeps none of them."""

    _HEADER = 6 + 8 * 13

    def __init__(self, source: str) -> None:
        self._source = source
        self._head = b""
        self._skip = 0  # of the entry's name and data
        self.total = self.small_pages = self.large_pages = self.entries = 0

    def feed(self, view: memoryview, *, whole: bool = False) -> int:
        """Count what is there; how much of it was archive. `whole`: nothing follows, so an entry that goes on is cut off.

        :raise FormatError: an entry that is damaged, or cut off.
        """
        at = 0
        while at < len(view):
            if self._skip:
                step = min(self._skip, len(view) - at)
                self._skip, at = self._skip - step, at + step
                continue
            if not self._head and view[at] == 0:
                at += _zeros(view, at)
                continue
            piece = bytes(view[at : at + self._HEADER - len(self._head)])
            if whole and not self._head and not piece.startswith((b"070701", b"070702")):
                return at
            self._head, at = self._head + piece, at + len(piece)
            if not self._head.startswith((b"070701"[: len(self._head)], b"070702"[: len(self._head)])):
                return at - len(piece)
            if len(self._head) == self._HEADER:
                self._entry()
        if whole:
            self.close(at)
        return at

    def close(self, at: int) -> None:
        """The stream ended."""
        if self._skip or self._head:
            raise FormatError("a cpio archive is cut off", source=self._source, offset=at)

    def _entry(self) -> None:
        try:
            fields = [int(self._head[at : at + 8], 16) for at in range(6, self._HEADER, 8)]
        except ValueError as error:
            raise FormatError("a cpio header has a field that is not hexadecimal", source=self._source) from error
        size, name = fields[6], fields[11]
        self._head = b""
        self._skip = align_up(self._HEADER + name, 4) - self._HEADER + align_up(size, 4)
        self.total += size
        self.small_pages += align_up(size, SMALL_PAGE)
        self.large_pages += align_up(size, LARGE_PAGE)
        self.entries += 1


# --------------------------------------------------------------------------------------------------------------- the needs


@dataclass(frozen=True, slots=True)
class Need:
    """Something that takes K2's memory, in bytes, and when."""

    name: str
    size: int
    source: str
    phase: Phase = "always"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What K2 needs of the `available` bytes that are its memory."""

    needs: tuple[Need, ...]
    available: int
    exact: bool = True  # the initrd was counted, not guessed

    def during(self, phase: Phase) -> int:
        """Bytes in use at that time; "always" is what K2 needs without an initrd, doing nothing."""
        return sum(need.size for need in self.needs if need.phase in ("always", phase))

    @property
    def peak(self) -> int:
        """Bytes in use at the worse of the two peaks."""
        return max(self.during("unpacking"), self.during("capturing"))

    @property
    def margin(self) -> int:
        """Bytes to spare at the peak; negative when they are short."""
        return self.available - self.peak

    @property
    def verdict(self) -> Verdict:
        """A quarter of the peak to spare is ample: it is about what the estimate may be wrong by."""
        if self.margin < 0:
            return "too small"
        return "ample" if self.margin >= self.peak // 4 else "tight"


PROCESS_TABLE = 16 * _MIB
_SECTION = 16 * _MIB  # SECTION_SIZE_BITS, arch/powerpc/include/asm/sparsemem.h
_STRUCT_PAGE = 64  # include/linux/mm_types.h
_RADIX_VMEMMAP = 2 * _MIB
_HASH_VMEMMAP = 16 * _MIB

# Seen with Debian's kernels as the only one in 256 MiB, their init asleep: memory in use less what else has a need of its own
# here. 25 MiB for 6.1 and 38 MiB for 6.12 with 64 KiB pages, 18 MiB for 6.12 and 24 MiB for 7.2 with 4 KiB pages. It gives way
# when memory is short: these two are what the drills leave of it.
_RUNTIME_LARGE, _RUNTIME_SMALL = 30 * _MIB, 16 * _MIB

# Seen on the same: percpu data of 655,360 bytes on radix and 1 MiB on hash with 64 KiB pages, 168 KB with 4 KiB pages; the rest
# is stacks for interrupts and emergencies. A further CPU that was started took 7 MiB and 1 MiB, mostly slabs in hand.
_POSSIBLE_LARGE: dict[Mmu, int] = {"radix": 768 * _KIB, "hash": 1152 * _KIB}
_POSSIBLE_SMALL = 256 * _KIB
_STARTED_LARGE, _STARTED_SMALL = 7 * _MIB, _MIB

_MOST_CPUS = 8192  # NR_CPUS at its most, arch/powerpc/platforms/Kconfig.cputype

CAPTURE_PROGRAM = 12 * _MIB
"""Bytes of a dd or makedumpfile."""
_COMMAND_LARGE, _COMMAND_SMALL = 54 * _MIB, 40 * _MIB  # seen of `crashkernel capture` on one CPU, level 31, zstd
_CORE_PAGE_BITS = 2  # makedumpfile's two bitmaps of K1's pages


def estimate(
    image_span: int,
    initrd: Initrd,
    k2_memory: RangeSet,
    mmu: Mmu,
    page_size: int,
    cpus: int,
    *,
    started: int = 1,
    k1_memory: int = 0,
    root: bool = False,
    program: int = CAPTURE_PROGRAM,
) -> Estimate:
    """What a K2 of that image and initrd needs of `k2_memory`, all that is its own. Sizes in bytes.

    `page_size` is K2's base page. `cpus` are all that K2's device tree has, unless K2 is given nr_cpus=; `started` those it
    starts (maxcpus=). `k1_memory` is what it is to save, for the bitmaps of the program that does. `program` is what that takes
    besides; assumed is one like makedumpfile on one thread, or dd with blocks of a few MiB, that writes past the page cache
    or empties it as it goes.
    `root` is whether K2's command line lifts a limit (`whole_root`): see "room that a tmpfs leaves free".
    """
    unpacked = initrd.in_memory(page_size)
    small = page_size <= SMALL_PAGE
    at_work, kept_free = _RUNTIME_SMALL if small else _RUNTIME_LARGE, k2_memory.total // 20
    needs = [
        Need("K2's image", align_up(image_span, LARGE_PAGE), "its span with bss, in whole pages"),
        *_tables(k2_memory, mmu, page_size),
        Need(
            "K2's kernel at work",
            at_work,
            "seen of Debian's kernels: slabs, stacks, tables; drivers of real adapters come on top",
        ),
        Need(
            f"data for {cpus} possible CPUs",
            cpus * (_POSSIBLE_SMALL if small else _POSSIBLE_LARGE[mmu]),
            "arch/powerpc/kernel/setup_64.c, setup_per_cpu_areas; size as seen; K2's option nr_cpus= lowers it",
        ),
        Need(
            "started CPUs but the first",
            max(started - 1, 0) * (_STARTED_SMALL if small else _STARTED_LARGE),
            "seen of Debian's kernels; K2's option maxcpus= lowers it",
        ),
        Need(
            "memory kept free for emergencies",
            kept_free,
            "mm/khugepaged.c, set_recommended_min_free_kbytes: at most 5 %, which so little memory always comes to",
        ),
        Need("initrd as loaded", align_up(initrd.size, LARGE_PAGE), "freed once it is unpacked", "unpacking"),
        Need("initrd unpacked", unpacked, "init/initramfs.c; each file begins a page of its own"),
        # Seen of Debian 6.1 in 256 MiB, its initrd one file of 120 MB: "Initramfs unpacking failed: write error", and a file of
        # the right length without its contents. With root=, which made a ramfs of it, all was well.
        Need(
            "room that a tmpfs leaves free",
            0 if root else max(0, unpacked - at_work - kept_free),
            "init/do_mounts.c, init_rootfs: without root= the initrd goes into a tmpfs, which takes half of memory at most",
            "unpacking",
        ),
        Need("the program that saves the dump", program, "assumed: buffers of dd or makedumpfile", "capturing"),
        Need(
            "makedumpfile's bitmaps",
            _bitmaps(k1_memory, page_size),
            "two bits for each of K1's pages; it goes in cycles when they do not fit",
            "capturing",
        ),
    ]
    return Estimate(tuple(need for need in needs if need.size), k2_memory.total, initrd.exact)


def capture_command(page_size: int) -> int:
    """Bytes that `crashkernel capture` takes in a K2 of that base page size, for `estimate`: Python, numpy and one worker."""
    return _COMMAND_SMALL if page_size <= SMALL_PAGE else _COMMAND_LARGE


def possible_cpus(machine: Machine) -> int:
    """How many CPUs K2 keeps data for, started or not, unless nr_cpus= limits it.

    In a partition that is as many as it may ever have (ibm,lrdr-capacity: smp_setup_cpu_maps,
    arch/powerpc/kernel/setup-common.c).
    """
    present = len(machine.cpus)
    rtas, cpus = machine.device_tree.child("rtas"), machine.device_tree.child("cpus")
    if machine.platform != "pseries" or rtas is None or cpus is None:
        return present
    # an address and a size of two cells each, then the number of cores
    cores = int.from_bytes(rtas.properties.get("ibm,lrdr-capacity", b"")[16:20], "big")
    threads = max((len(node.properties.get("ibm,ppc-interrupt-server#s", b"")) // 4 for node in cpus.children), default=0)
    return max(present, min(cores * threads, _MOST_CPUS))


def limited_cpus(cpus: int, cmdline: str, option: str) -> int:
    """`cpus`, or as few as K2's command line allows with `option`: nr_cpus or maxcpus, of which the last counts."""
    values = [value for key, _, value in (word.partition("=") for word in cmdline.split()) if key == option]
    limits = [int(value) for value in values if value.isdecimal() and len(value) < 9]
    return min(cpus, limits[-1]) if limits and limits[-1] else cpus


def whole_root(cmdline: str) -> bool:
    """Whether a K2 with that command line unpacks its initrd into a ramfs, which may take all of memory, and not into a tmpfs.

    init_rootfs, init/do_mounts.c: root= or rootfstype= do that, unless a tmpfs is among the types. (With root= older kernels
    do it even then.)
    """
    options = [(key, value) for key, _, value in (word.partition("=") for word in cmdline.split())]
    types = [value for key, value in options if key == "rootfstype"]
    if types:
        return "tmpfs" not in types[-1]
    return any(key == "root" for key, _ in options)


def _bitmaps(k1_memory: int, page_size: int) -> int:
    # makedumpfile's buffer for one cycle: as large as it needs, but never more than it finds free; beyond this it is a matter
    # of speed, not of success
    return min(align_up(k1_memory, page_size) // page_size * _CORE_PAGE_BITS // 8, 32 * _MIB)


def page_structs(k2_memory: RangeSet, mmu: Mmu, page_size: int) -> int:
    """Bytes that K2's array of page structs takes: for each 16 MiB that its memory touches, in blocks (mm/sparse-vmemmap.c)."""
    per_section = _SECTION // page_size * _STRUCT_PAGE
    block = _vmemmap_block(k2_memory, mmu, page_size)
    sections = (piece.align_outward(_SECTION) for piece in k2_memory)
    return RangeSet(
        Range(piece.start // _SECTION * per_section, piece.end // _SECTION * per_section).align_outward(block)
        for piece in sections
    ).total


def _vmemmap_block(k2_memory: RangeSet, mmu: Mmu, page_size: int) -> int:
    if mmu == "radix":
        return _RADIX_VMEMMAP
    return _HASH_VMEMMAP if k2_memory.total >= _GIB else page_size


def _tables(k2_memory: RangeSet, mmu: Mmu, page_size: int) -> list[Need]:
    array_source = "mm/sparse-vmemmap.c: 64 bytes for each page of each 16 MiB touched"
    if mmu == "radix":
        # three levels, the last ones small: 2 MiB pages, and a page table at each ragged end
        tables = Need("page tables", 4 * LARGE_PAGE * len(k2_memory), "radix_pgtable.c, create_physical_mapping")
        process = Need(
            "radix's process table",
            PROCESS_TABLE,
            "radix_pgtable.c, radix_init_pgtable: 16 MiB in one piece, aligned to as much",
        )
        firmware = [process, tables]
    else:
        # htab_get_table_size: a 128th of memory, a power of two; in a partition the hypervisor has the table instead
        table = 1 << max(18, (max(k2_memory.total // 128, 1) - 1).bit_length())
        firmware = [Need("hash table", table, "hash_utils.c, htab_get_table_size; the hypervisor's in a partition")]
    block = format_size(_vmemmap_block(k2_memory, mmu, page_size))
    array = Need("struct page array", page_structs(k2_memory, mmu, page_size), f"{array_source}; in blocks of {block}")
    return [*firmware, array]


# ------------------------------------------------------------------------------------------------------ what vendors recommend


@dataclass(frozen=True, slots=True)
class Recommended:
    """What a distribution would reserve on a machine. `size` in bytes, 0 where it reserves nothing."""

    vendor: Vendor
    size: int
    source: str


_TABLES: dict[Vendor, tuple[tuple[int, int], ...]] = {
    # kdump-utils, ppc64le: memory from which on, and how much
    "rhel": (
        (128 * _GIB, 4 * _GIB),
        (64 * _GIB, 2 * _GIB),
        (16 * _GIB, _GIB),
        (4 * _GIB, 512 * _MIB),
        (2 * _GIB, 384 * _MIB),
    ),
    # kdump-tools of Debian 12, ppc64el
    "debian": (
        (128 * _GIB, 4 * _GIB),
        (64 * _GIB, 2 * _GIB),
        (32 * _GIB, _GIB),
        (4 * _GIB, 512 * _MIB),
        (2 * _GIB, 320 * _MIB),
    ),
    # kdump of SUSE computes; this is what it takes where it did not
    "suse": ((0, 384 * _MIB),),
}
_SOURCES: dict[Vendor, str] = {
    "rhel": "kdump-utils, 2G-4G:384M,4G-16G:512M,16G-64G:1G,64G-128G:2G,128G-:4G and 1 MB for each CPU",
    "debian": "kdump-tools of Debian 12, 2G-4G:320M,4G-32G:512M,32G-64G:1024M,64G-128G:2048M,128G-:4096M",
    "suse": "kdump's default; its calibration computes another for each machine",
}
VENDORS: tuple[Vendor, ...] = ("rhel", "debian", "suse")


def recommended(memory_total: int, cpus: int) -> tuple[Recommended, ...]:
    """What each distribution recommends on ppc64le for a machine of so much memory (bytes) and so many CPUs."""
    rounded = align_up(memory_total, 128 * _MIB)  # parse_crashkernel_mem, kernel/crash_reserve.c
    found = []
    for vendor in VENDORS:
        size = next((size for least, size in _TABLES[vendor] if rounded >= least), 0)
        if vendor == "rhel" and size:
            size += cpus * _MIB
        found.append(Recommended(vendor, size, _SOURCES[vendor]))
    return tuple(found)
