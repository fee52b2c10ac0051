"""The kdump-compressed format, version 6: what makedumpfile writes, and crash, drgn and libkdumpfile read.

References: makedumpfile `IMPLEMENTATION`, `diskdump_mod.h` (struct disk_dump_header, kdump_sub_header, page_desc) and
`write_kdump_header`; crash `diskdump.c`; libkdumpfile `src/kdumpfile/diskdump.c`. docs/dump-format.md has the whole picture.

    block 0                 main header
    block 1                 sub header, the ELF notes right behind it
    then                    bitmap 1: page frames that are memory;  bitmap 2: page frames that are in the dump
    then                    a descriptor for each bit of bitmap 2, in order
    then                    the pages' data

A block is as large as a page of the dead kernel. Bit n of byte m of a bitmap is page frame 8m + n. All numbers are in the dead
kernel's byte order and have the sizes that they have on a 64-bit machine: dumps of 32-bit machines are refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields

from crashkernel.errors import FormatError, UsageError
from crashkernel.formats.elf import NT_PRSTATUS, ByteOrder, iter_notes
from crashkernel.memory import align_up

SIGNATURE = b"KDUMP   "
VERSION = 6
OLDEST_VERSION = 4
"""The first version whose sub header says where the ELF notes are."""

# Both of a page descriptor, which names its page's codec, and of the main header's status, which names the dump's.
COMPRESSED_ZLIB, COMPRESSED_LZO, COMPRESSED_SNAPPY, COMPRESSED_ZSTD = 0x01, 0x02, 0x04, 0x20
COMPRESSED = COMPRESSED_ZLIB | COMPRESSED_LZO | COMPRESSED_SNAPPY | COMPRESSED_ZSTD
# Of the main header's status alone.
INCOMPLETE = 0x08
"""The writer ran out of space: descriptors of pages that it did not come to are zeros."""
EXCLUDED_VMEMMAP = 0x10
"""Page structs that nothing uses were dropped (makedumpfile -e)."""

DESCRIPTOR_SIZE = 24

BLOCK_SIZES = (0x1000, 0x2000, 0x4000, 0x8000, 0x10000)

NAME_SIZE = 64
"""Bytes of a name in a utsname, without the NUL behind it (__NEW_UTS_LEN, include/uapi/linux/utsname.h)."""
_NAME_SIZE = NAME_SIZE + 1
UTSNAME_SIZE = 6 * _NAME_SIZE

# struct disk_dump_header. The 6 bytes align struct timeval.
_MAIN = f"8si{UTSNAME_SIZE}s6xqqIiiIIIIIIi"
MAIN_SIZE = 464
_VERSION_OFFSET = 8
_BLOCK_SIZE_OFFSET = 428
# struct kdump_sub_header: phys_base, dump_level, split, start_pfn, end_pfn, (offset, size) of vmcoreinfo, notes and eraseinfo,
# start_pfn_64, end_pfn_64, max_mapnr_64. Version 5 ends before the last three, version 4 before eraseinfo.
_SUB = "QiiQQQQQQQQQQQ"
SUB_SIZE = 104
_SUB_SIZES = {4: 64, 5: 80, 6: SUB_SIZE}

_MAX_PFN_32 = 0xFFFF_FFFF
_MAX_FILE = 1 << 63
_MAX_PFN = 1 << 52
_VMCOREINFO = "VMCOREINFO"


def _order(byteorder: ByteOrder) -> str:
    return "<" if byteorder == "little" else ">"


def descriptor_dtype(byteorder: ByteOrder) -> list[tuple[str, str]]:
    """A page descriptor (struct page_desc) as numpy's `dtype` takes it: offset and size in the file, flags, page_flags."""
    order = _order(byteorder)
    return [("offset", f"{order}u8"), ("size", f"{order}u4"), ("flags", f"{order}u4"), ("page_flags", f"{order}u8")]


@dataclass(frozen=True, slots=True)
class Utsname:
    """What the dead kernel called itself (struct new_utsname). Readers of dumps choose the architecture by `machine`."""

    sysname: str = "Linux"
    nodename: str = ""
    release: str = ""
    version: str = ""
    machine: str = ""
    domainname: str = ""

    @classmethod
    def from_bytes(cls, data: bytes) -> Utsname:
        """Read the six names, each up to its NUL; what is not printable ASCII becomes "?".

        :raise FormatError: `data` has not `UTSNAME_SIZE` bytes.
        """
        if len(data) != UTSNAME_SIZE:
            raise FormatError(f"a utsname has {UTSNAME_SIZE} bytes, this one {len(data)}")
        parts = (data[start : start + _NAME_SIZE].partition(b"\0")[0] for start in range(0, UTSNAME_SIZE, _NAME_SIZE))
        return cls(*("".join(chr(c) if 32 <= c < 127 else "?" for c in part) for part in parts))

    def to_bytes(self) -> bytes:
        """The names as the kernel has them.

        :raise UsageError: one of them does not fit.
        """
        parts = [getattr(self, field.name).encode("ascii", "replace") for field in fields(self)]
        if long := [part for part in parts if len(part) >= _NAME_SIZE]:
            raise UsageError(f"{long[0]!r} is too long for a utsname")
        return b"".join(part.ljust(_NAME_SIZE, b"\0") for part in parts)


@dataclass(frozen=True, slots=True)
class MainHeader:
    """struct disk_dump_header, without the fields that nothing sets any more. Sizes in blocks but `block_size`, in bytes."""

    byteorder: ByteOrder
    block_size: int
    utsname: Utsname
    sub_header_blocks: int
    bitmap_blocks: int  # of both bitmaps together
    max_pfn: int  # cut off at 32 bits: the sub header has the whole of it
    status: int = 0
    cpus: int = 0
    timestamp: int = 0  # seconds since 1970, of the crash
    microseconds: int = 0
    version: int = VERSION

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "") -> MainHeader:
        """Read the header at the start of `data`. The byte order is the one in which version and block size make sense.

        :raise FormatError: it is no kdump-compressed dump of a 64-bit machine, of a version from 4 to 6.
        """
        if data[: len(SIGNATURE)] != SIGNATURE:
            hint = "a dump of the old diskdump facility" if data[:8] == b"DISKDUMP" else ""
            raise FormatError("not a kdump-compressed dump", source=source, offset=0, hint=hint)
        if len(data) < MAIN_SIZE:
            raise FormatError(f"cut off in its main header, after {len(data)} bytes", source=source)
        for byteorder in (*_BYTE_ORDERS,):
            version, block_size = (
                int.from_bytes(data[offset : offset + 4], byteorder) for offset in (_VERSION_OFFSET, _BLOCK_SIZE_OFFSET)
            )
            if version < 1 << 16 and block_size in BLOCK_SIZES:
                break
        else:
            message = "its version and block size make sense in neither byte order"
            raise FormatError(message, source=source, hint="a damaged header, or a dump of a 32-bit machine")
        if not OLDEST_VERSION <= version <= VERSION:
            known = f"{OLDEST_VERSION} to {VERSION}"
            raise FormatError(f"kdump-compressed version {version}, not {known}", source=source, offset=_VERSION_OFFSET)
        (_, _, names, seconds, microseconds, status, _, sub_blocks, bitmap_blocks, max_pfn, *_, cpus) = struct.unpack_from(
            _order(byteorder) + _MAIN, data
        )
        if sub_blocks <= 0:
            raise FormatError(f"a sub header of {sub_blocks} blocks", source=source)
        return cls(
            byteorder,
            block_size,
            Utsname.from_bytes(names),
            sub_blocks,
            bitmap_blocks,
            max_pfn,
            status,
            cpus,
            seconds,
            microseconds,
            version,
        )

    def to_bytes(self) -> bytes:
        """The header as it is stored, without the rest of its block.

        :raise UsageError: a number does not fit its field.
        """
        try:
            return struct.pack(
                _order(self.byteorder) + _MAIN,
                *(SIGNATURE, self.version, self.utsname.to_bytes(), self.timestamp, self.microseconds),
                *(self.status, self.block_size, self.sub_header_blocks, self.bitmap_blocks, min(self.max_pfn, _MAX_PFN_32)),
                *(0, 0, 0, 0),  # total_ram_blocks, device_blocks, written_blocks, current_cpu: diskdump's, as is a task list
                self.cpus,
            )
        except struct.error as error:
            raise UsageError(f"no header of a dump can say that: {error}") from error

    @property
    def bitmap1_offset(self) -> int:
        """Where bitmap 1 begins in the file, in bytes."""
        return (1 + self.sub_header_blocks) * self.block_size

    @property
    def bitmap_size(self) -> int:
        """Bytes of one bitmap."""
        return self.bitmap_blocks // 2 * self.block_size

    @property
    def bitmap2_offset(self) -> int:
        """Where bitmap 2 begins in the file, in bytes."""
        return self.bitmap1_offset + self.bitmap_size

    @property
    def descriptors_offset(self) -> int:
        """Where the page descriptors begin in the file, in bytes."""
        return self.bitmap1_offset + self.bitmap_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class Extent:
    """`size` bytes at `file_offset`; nothing when the size is 0."""

    file_offset: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class SubHeader:
    """struct kdump_sub_header. `vmcoreinfo` is where the note's text lies, inside `notes`.

    `phys_base` is x86_64's: what is added to an address of the kernel's image, less __START_KERNEL_map.
    With `split` the file is one of several, which holds the page frames of the half-open range [start_pfn, end_pfn) only.
    """

    phys_base: int
    level: int
    max_pfn: int
    vmcoreinfo: Extent = Extent()
    notes: Extent = Extent()
    eraseinfo: Extent = Extent()
    split: int = 0
    start_pfn: int = 0
    end_pfn: int = 0

    @classmethod
    def from_bytes(cls, data: bytes, main: MainHeader, source: str = "") -> SubHeader:
        """Read what block 1 begins with.

        :raise FormatError: it is cut off, or a number in it makes no sense.
        """
        if len(data) < _SUB_SIZES[main.version]:
            raise FormatError(f"cut off in its sub header, after {len(data)} bytes", source=source)
        raw = data[: _SUB_SIZES[main.version]].ljust(SUB_SIZE, b"\0")
        (phys_base, level, split, start, end, *rest) = struct.unpack(_order(main.byteorder) + _SUB, raw)
        vmcoreinfo, notes, eraseinfo = (Extent(*rest[index : index + 2]) for index in (0, 2, 4))
        start_64, end_64, max_64 = rest[6:]
        if main.version < VERSION:
            start_64, end_64, max_64 = start, end, main.max_pfn
        for extent in (vmcoreinfo, notes, eraseinfo):
            if extent.file_offset + extent.size > _MAX_FILE:
                message = f"its sub header names {extent.size:#x} bytes at {extent.file_offset:#x}"
                raise FormatError(message, source=source, offset=main.block_size)
        if not 0 < max_64 <= _MAX_PFN:
            raise FormatError(
                f"its sub header says that there are {max_64:#x} page frames", source=source, offset=main.block_size
            )
        return cls(phys_base, level, max_64, vmcoreinfo, notes, eraseinfo, split, start_64, end_64)

    def to_bytes(self, byteorder: ByteOrder) -> bytes:
        """The sub header of version 6 as it is stored.

        :raise UsageError: a number does not fit its field.
        """
        extents = (self.vmcoreinfo, self.notes, self.eraseinfo)
        try:
            return struct.pack(
                _order(byteorder) + _SUB,
                *(self.phys_base, self.level, self.split, min(self.start_pfn, _MAX_PFN_32), min(self.end_pfn, _MAX_PFN_32)),
                *(number for extent in extents for number in (extent.file_offset, extent.size)),
                *(self.start_pfn, self.end_pfn, self.max_pfn),
            )
        except struct.error as error:
            raise UsageError(f"no sub header of a dump can say that: {error}") from error


@dataclass(frozen=True, slots=True)
class DumpLayout:
    """What a dump begins with, and where the rest of it goes; offsets in bytes. `headers` go to the start of the file.

    `main` and `sub` are what `headers` says.
    """

    main: MainHeader
    sub: SubHeader
    headers: bytes

    @classmethod
    def plan(
        cls,
        *,
        byteorder: ByteOrder,
        page_size: int,
        max_pfn: int,
        utsname: Utsname,
        notes: bytes,
        level: int,
        compression: int,
        phys_base: int = 0,
        crash_time: int = 0,
    ) -> DumpLayout:
        """Lay out a dump of the page frames [0, max_pfn).

        `notes` are the ELF notes in the dead kernel's byte order, as a vmcore has them; `compression` is one of the
        COMPRESSED flags, or 0; `phys_base` may be negative; `crash_time` is in seconds since 1970, 0 when it is not known.

        :raise UsageError: a page size, or a number of page frames, that the format cannot have.
        """
        if page_size not in BLOCK_SIZES or not 0 < max_pfn <= _MAX_PFN:
            raise UsageError(f"no dump of {max_pfn:#x} pages of {page_size:#x} bytes")
        blocks_of_bitmap = align_up(-(-max_pfn // 8), page_size) // page_size
        notes_at = page_size + SUB_SIZE
        main = MainHeader(
            byteorder=byteorder,
            block_size=page_size,
            utsname=utsname,
            sub_header_blocks=align_up(SUB_SIZE + len(notes), page_size) // page_size,
            bitmap_blocks=2 * blocks_of_bitmap,
            max_pfn=max_pfn,
            status=compression,
            cpus=sum(note.name == "CORE" and note.type == NT_PRSTATUS for note in iter_notes(notes, byteorder)),
            timestamp=crash_time,
        )
        sub = SubHeader(
            phys_base=phys_base % (1 << 64),
            level=level,
            max_pfn=max_pfn,
            vmcoreinfo=_vmcoreinfo(notes, notes_at, byteorder),
            notes=Extent(notes_at, len(notes)) if notes else Extent(),
        )
        headers = main.to_bytes().ljust(page_size, b"\0") + sub.to_bytes(byteorder) + notes
        return cls(main, sub, headers.ljust(main.bitmap1_offset, b"\0"))

    @property
    def bitmap1_offset(self) -> int:
        """Where bitmap 1 goes."""
        return self.main.bitmap1_offset

    @property
    def bitmap2_offset(self) -> int:
        """Where bitmap 2 goes."""
        return self.main.bitmap2_offset

    @property
    def bitmap_size(self) -> int:
        """Bytes of one bitmap, up to the end of its last block."""
        return self.main.bitmap_size

    @property
    def descriptors_offset(self) -> int:
        """Where the page descriptors go; the pages' data come right behind the last of them."""
        return self.main.descriptors_offset


_BYTE_ORDERS: tuple[ByteOrder, ...] = ("little", "big")


def _vmcoreinfo(notes: bytes, notes_at: int, byteorder: ByteOrder) -> Extent:
    """Where the text of the VMCOREINFO note goes, the notes being at `notes_at`."""
    for note in iter_notes(notes, byteorder):
        if note.name == _VMCOREINFO and note.desc:
            return Extent(notes_at + notes.index(note.desc), len(note.desc))
    return Extent()
