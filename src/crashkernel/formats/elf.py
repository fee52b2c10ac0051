"""ELF64 in both byte orders: kernels, vmcores, and the core header a loader leaves for the capture kernel.

References: the ELF specification (System V gABI, chapters 4 "Object Files" and 5 "Program Loading"); Linux
`fs/proc/vmcore.c` (what the capture kernel makes of the core header), `kernel/crash_core.c` (how the kernel itself
writes one), `include/uapi/linux/elfcore.h` (`struct elf_prstatus`) and `arch/powerpc/include/uapi/asm/ptrace.h`
(`struct pt_regs`).

Program headers and notes are read; of the sections only their addresses, and what an escaped program header count needs.
32-bit ELF is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

from crashkernel.errors import FormatError, UsageError
from crashkernel.memory import align_up

ByteOrder = Literal["little", "big"]

ET_CORE = 4
EM_PPC64, EM_X86_64 = 21, 62
PT_LOAD, PT_NOTE = 1, 4
PF_X, PF_W, PF_R = 1, 2, 4
PN_XNUM = 0xFFFF
NT_PRSTATUS = 1

_MAGIC = b"\x7fELF"
_CLASS_64 = 2
_DATA: dict[int, ByteOrder] = {1: "little", 2: "big"}  # EI_DATA: ELFDATA2LSB, ELFDATA2MSB
_VERSION = 1  # EV_CURRENT

_IDENT_SIZE = 16
# What follows e_ident in Elf64_Ehdr: type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum,
# shentsize, shnum, shstrndx.
_HEADER = "HHIQQQIHHHHHH"
_HEADER_SIZE = 64
_PROGRAM_HEADER = "IIQQQQQQ"  # Elf64_Phdr: type, flags, offset, vaddr, paddr, filesz, memsz, align
_PROGRAM_HEADER_SIZE = 56
_SECTION_HEADER = "IIQQQQIIQQ"  # Elf64_Shdr: name, type, flags, addr, offset, size, link, info, addralign, entsize
_SECTION_HEADER_SIZE = 64
_SECTION_INFO = 44  # offset of the word sh_info in Elf64_Shdr
_NOTE_HEADER = "III"  # Elf64_Nhdr: namesz, descsz, type
_NOTE_HEADER_SIZE = 12
_NOTE_ALIGNMENT = 4  # of name and description; the gABI says 8 for 64-bit files, every kernel and tool uses 4

_ADDRESS_SPACE = 1 << 64


def _order(byteorder: ByteOrder) -> str:
    """Return the byte order as `struct` writes it."""
    return "<" if byteorder == "little" else ">"


@dataclass(frozen=True, slots=True)
class Segment:
    """A program header (Elf64_Phdr): `file_size` bytes at `file_offset`, of `memory_size` bytes at `vaddr` and `paddr`.

    All in bytes. `type` is PT_*, `flags` are PF_* bits.
    """

    type: int
    flags: int
    file_offset: int
    vaddr: int
    paddr: int
    file_size: int
    memory_size: int
    alignment: int


@dataclass(frozen=True, slots=True)
class Note:
    """An ELF note: the owner's `name` without its NUL, the owner's `type`, and the description's bytes."""

    name: str
    type: int
    desc: bytes


@dataclass(frozen=True, slots=True)
class ElfFile:
    """What an ELF64 file says of itself: identity, entry point (virtual address), and every program header in order."""

    byteorder: ByteOrder
    type: int
    machine: int
    entry: int
    flags: int
    segments: tuple[Segment, ...]
    source: str = ""

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, source: str = "", *, file_size: int | None = None) -> ElfFile:
        """Read the headers, and check that the bytes of every PT_LOAD and PT_NOTE segment are in the file.

        `data` may be the first part of a file of `file_size` bytes, as long as the headers are in it.

        :raise FormatError: when it is not ELF64, its headers are not in `data`, or a segment reaches beyond the file.
        """
        view = memoryview(data)
        file_size = len(view) if file_size is None else file_size
        ident = bytes(view[:_IDENT_SIZE])
        if ident[:4] != _MAGIC:
            raise FormatError("not an ELF file", source=source, offset=0)
        if len(view) < _HEADER_SIZE:
            raise FormatError("the ELF header is cut off", source=source, offset=len(view))
        if ident[4] != _CLASS_64:
            raise FormatError(
                "not a 64-bit ELF file", source=source, offset=4, hint="a zImage is a 32-bit wrapper: give the vmlinux"
            )
        if ident[5] not in _DATA or ident[6] != _VERSION:
            raise FormatError("the ELF file's byte order or version is unknown", source=source, offset=5)
        byteorder = _DATA[ident[5]]
        order = _order(byteorder)
        (kind, machine, version, entry, table, sections, flags, _, entry_size, count, *_) = struct.unpack_from(
            order + _HEADER, view, _IDENT_SIZE
        )
        if version != _VERSION:
            raise FormatError(f"ELF version {version} is unknown", source=source, offset=20)
        if count == PN_XNUM:  # gABI chapter 4, e_phnum: the count is in the first section header
            if not sections or sections + _SECTION_INFO + 4 > len(view):
                raise FormatError("the number of program headers is not there", source=source, offset=sections)
            count = struct.unpack_from(order + "I", view, sections + _SECTION_INFO)[0]
        if count and entry_size != _PROGRAM_HEADER_SIZE:
            raise FormatError(f"program headers have {entry_size} bytes, not 56", source=source, offset=54)
        end = table + count * _PROGRAM_HEADER_SIZE
        if end > len(view):
            message = f"the {count} program headers end at {end:#x}, beyond the {len(view):#x} bytes here"
            raise FormatError(message, source=source, offset=table)
        segments = tuple(
            Segment(*fields) for fields in struct.iter_unpack(order + _PROGRAM_HEADER, view[table:end] if count else b"")
        )
        for number, segment in enumerate(segments):
            _check(segment, number, file_size, source)
        return cls(byteorder, kind, machine, entry, flags, segments, source)

    @property
    def loads(self) -> tuple[Segment, ...]:
        """The PT_LOAD segments, in the file's order."""
        return tuple(each for each in self.segments if each.type == PT_LOAD)

    def to_bytes(self) -> bytes:
        """Write the ELF header and the program headers behind it, as `from_bytes` reads them; sections there are none.

        :raise UsageError: when there is no segment, or more than a program header count can tell.
        """
        count = len(self.segments)
        if not 0 < count < PN_XNUM:
            raise UsageError(f"a core header holds 1 to {PN_XNUM - 1} segments, not {count}")
        order = _order(self.byteorder)
        ident = (_MAGIC + bytes((_CLASS_64, 1 if self.byteorder == "little" else 2, _VERSION))).ljust(_IDENT_SIZE, b"\0")
        header = struct.pack(
            order + _HEADER,
            *(self.type, self.machine, _VERSION),
            *(self.entry, _HEADER_SIZE, 0, self.flags),  # entry, phoff, shoff, flags
            *(_HEADER_SIZE, _PROGRAM_HEADER_SIZE, count, 0, 0, 0),
        )
        segment = struct.Struct(order + _PROGRAM_HEADER)
        return b"".join((ident, header, *(segment.pack(*astuple(each)) for each in self.segments)))

    def notes(self, data: bytes | memoryview) -> Iterator[Note]:
        """Yield the notes of every PT_NOTE segment, `data` being the file from its start.

        :raise FormatError: when a segment's bytes are not in `data`, or are no notes; what precedes is yielded first.
        """
        view = memoryview(data)
        budget = len(view)  # thousands of forged headers that all name the same bytes would take for ever
        for each in self.segments:
            if each.type != PT_NOTE:
                continue
            end = each.file_offset + each.file_size
            budget -= each.file_size
            if end > len(view) or budget < 0:
                raise FormatError("the notes are cut off, or overlap", source=self.source, offset=each.file_offset)
            yield from iter_notes(view[each.file_offset : end], self.byteorder, self.source)


def _check(segment: Segment, number: int, file_size: int, source: str) -> None:
    if segment.type not in (PT_LOAD, PT_NOTE):
        return
    name = f"segment {number} ({'PT_LOAD' if segment.type == PT_LOAD else 'PT_NOTE'})"
    missing = segment.file_offset + segment.file_size - file_size
    if segment.file_size and missing > 0:
        missing = min(missing, segment.file_size)
        message = f"{name} lacks {missing:#x} of its {segment.file_size:#x} bytes: the file has only {file_size:#x}"
        raise FormatError(message, source=source, offset=segment.file_offset)
    if segment.type == PT_LOAD and segment.file_size > segment.memory_size:  # gABI chapter 5, p_memsz
        message = f"{name} has {segment.file_size:#x} bytes in the file for {segment.memory_size:#x} in memory"
        raise FormatError(message, source=source)


def headers_size(segments: int) -> int:
    """Bytes that the headers of a file with so many segments take (`ElfFile.to_bytes`)."""
    return _HEADER_SIZE + segments * _PROGRAM_HEADER_SIZE


def section_addresses(data: bytes | memoryview) -> dict[str, int]:
    """Virtual addresses of a file's sections by name; empty when its section headers are missing or make no sense.

    They are no part of what a loader needs (gABI chapter 4), so a file without them is no worse for it.
    """
    view = memoryview(data)
    if len(view) < _HEADER_SIZE or view[5] not in _DATA:
        return {}
    order = _order(_DATA[view[5]])
    (*_, table, _, _, _, _, entry_size, count, names) = struct.unpack_from(order + _HEADER, view, _IDENT_SIZE)
    end = table + count * _SECTION_HEADER_SIZE
    if entry_size != _SECTION_HEADER_SIZE or names >= count or end > len(view):
        return {}
    headers = list(struct.iter_unpack(order + _SECTION_HEADER, view[table:end]))
    strings = bytes(view[headers[names][4] : headers[names][4] + headers[names][5]])
    addresses = {}
    for name, _, _, address, *_ in headers:
        if address and name < len(strings):
            text = strings[name : strings.find(b"\0", name)]
            addresses[text.decode("ascii", "replace")] = address
    return addresses


def iter_notes(data: bytes | memoryview, byteorder: ByteOrder, source: str = "") -> Iterator[Note]:
    """Yield the notes in `data` up to its end, or to a note without a name, which ends the kernel's note buffers.

    That is how `update_note_header_size_elf64` (`fs/proc/vmcore.c`) reads them; a CPU that saved nothing left zeros.

    :raise FormatError: when a note reaches beyond `data` (the kernel drops it there) or its name is not ASCII; the
        notes before it are yielded first. Offsets are from the start of `data`.
    """
    for note, _ in _located_notes(data, byteorder, source):
        yield note


def notes_size(data: bytes | memoryview, byteorder: ByteOrder, source: str = "") -> int:
    """How many bytes of `data` are notes: what follows them, up to the end of a note buffer, is none.

    :raise FormatError: as `iter_notes`.
    """
    return max((end for _, end in _located_notes(data, byteorder, source)), default=0)


def _located_notes(data: bytes | memoryview, byteorder: ByteOrder, source: str) -> Iterator[tuple[Note, int]]:
    """Each note, and the offset behind it and its padding."""
    view = memoryview(data)
    header = struct.Struct(_order(byteorder) + _NOTE_HEADER)
    offset = 0
    while offset + _NOTE_HEADER_SIZE <= len(view):
        name_size, desc_size, kind = header.unpack_from(view, offset)
        if name_size == 0:
            return
        name_start = offset + _NOTE_HEADER_SIZE
        desc_start = name_start + align_up(name_size, _NOTE_ALIGNMENT)
        if desc_start + desc_size > len(view):
            message = f"a note of {name_size:#x} and {desc_size:#x} bytes does not fit in {len(view):#x}"
            raise FormatError(message, source=source, offset=offset)
        name = bytes(view[name_start : name_start + name_size]).rstrip(b"\0")
        if not name.isascii():
            raise FormatError(f"a note's name, {name!r}, is not ASCII", source=source, offset=name_start)
        offset = desc_start + align_up(desc_size, _NOTE_ALIGNMENT)
        yield Note(name.decode("ascii"), kind, bytes(view[desc_start : desc_start + desc_size])), offset


@dataclass(frozen=True, slots=True)
class CoreLoad:
    """A stretch of the crashed kernel's memory: `size` bytes it had at `paddr` and `vaddr`, and where they are now.

    `location` is the physical address at which the capture kernel finds them; it differs from `paddr` for whatever the
    handover moved. Nothing need be page aligned: the capture kernel rounds what it reads outward to its own pages, and
    `p_offset` with it (`process_ptload_program_headers_elf64`, `fs/proc/vmcore.c`).
    """

    paddr: int
    size: int
    location: int
    vaddr: int


@dataclass(frozen=True, slots=True)
class CoreHeader:
    """A core header ("elfcorehdr") read back. `notes` are (physical address, size) of note buffers, in bytes."""

    byteorder: ByteOrder
    machine: int
    notes: tuple[tuple[int, int], ...]
    loads: tuple[CoreLoad, ...]

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, source: str = "") -> CoreHeader:
        """Read what `build_core_header` wrote, or another loader; bytes after the program headers are ignored.

        :raise FormatError: when it is not an ELF64 core header that `parse_crash_elf64_headers` would take.
        """
        # Offsets are physical addresses here, so the length of the blob does not bound them.
        elf = ElfFile.from_bytes(data, source, file_size=_ADDRESS_SPACE)
        if elf.type != ET_CORE or not elf.segments:
            raise FormatError("not a core header: no ET_CORE file with program headers", source=source, offset=16)
        notes = tuple((each.file_offset, each.memory_size) for each in elf.segments if each.type == PT_NOTE)
        loads = tuple(CoreLoad(each.paddr, each.memory_size, each.file_offset, each.vaddr) for each in elf.loads)
        return cls(elf.byteorder, elf.machine, notes, loads)


def build_core_header(byteorder: ByteOrder, machine: int, notes: Sequence[tuple[int, int]], loads: Sequence[CoreLoad]) -> bytes:
    """Write the core header that `elfcorehdr=` points the capture kernel to, and that becomes the head of its vmcore.

    `notes` are (physical address at capture time, size in bytes) of note buffers: one for each CPU, one for VMCOREINFO.
    `byteorder` must be the capture kernel's own: `parse_crash_elf64_headers` (`fs/proc/vmcore.c`) reads native
    structures and never looks at EI_DATA. It checks magic, class, version, type, machine and the sizes of the headers,
    takes the source of every segment from `p_offset` and its length from `p_memsz`, and knows nothing of PN_XNUM.
    `e_flags` stay 0 and segments RWX, as in `crash_prepare_elf64_headers` (`kernel/crash_core.c`).

    :raise UsageError: when there is no segment, or more than the kernel can count.
    """
    # The notes go first: the kernel merges them into the first program header.
    segments = [Segment(PT_NOTE, 0, location, 0, location, size, size, 0) for location, size in notes]
    flags = PF_R | PF_W | PF_X
    segments += [Segment(PT_LOAD, flags, each.location, each.vaddr, each.paddr, each.size, each.size, 0) for each in loads]
    return ElfFile(byteorder, ET_CORE, machine, 0, 0, tuple(segments)).to_bytes()


# The order of struct pt_regs; crash_save_cpu copies 48 words (ELF_NGREG), of which the last four are the kernel's own.
PPC64_REGISTERS = (
    *(f"gpr{number}" for number in range(32)),
    *("nip", "msr", "orig_gpr3", "ctr", "link", "xer", "ccr", "softe", "trap", "dar", "dsisr", "result"),
)

_PRSTATUS_PID = 32  # offset of pr_pid in struct elf_prstatus on a 64-bit machine
_PRSTATUS_REGISTERS = 112  # offset of pr_reg
_PRSTATUS_REGISTER_COUNT = 48  # ELF_NGREG


@dataclass(frozen=True, slots=True)
class PrStatus:
    """What one ppc64 CPU left at the crash: the process it ran (0 in the idle task) and its registers by name."""

    pid: int
    registers: Mapping[str, int]

    @classmethod
    def from_bytes(cls, desc: bytes, byteorder: ByteOrder) -> PrStatus:
        """Read the description of an NT_PRSTATUS note (`struct elf_prstatus`).

        :raise FormatError: when it is too short to be ppc64's.
        """
        size = _PRSTATUS_REGISTERS + 8 * _PRSTATUS_REGISTER_COUNT
        if len(desc) < size:
            raise FormatError(f"an NT_PRSTATUS note of ppc64 has at least {size} bytes, this one {len(desc)}")
        order = _order(byteorder)
        pid = struct.unpack_from(order + "i", desc, _PRSTATUS_PID)[0]
        values = struct.unpack_from(f"{order}{len(PPC64_REGISTERS)}Q", desc, _PRSTATUS_REGISTERS)
        return cls(pid, dict(zip(PPC64_REGISTERS, values, strict=True)))
