"""The capture kernel's image: an ELF vmlinux turned into the flat bytes that lie in memory."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from crashkernel.errors import FormatError
from crashkernel.formats.elf import EM_PPC64, ElfFile, section_addresses
from crashkernel.machine import Region
from crashkernel.memory import Range

if TYPE_CHECKING:
    from crashkernel.machine import ByteOrder

RUN_AT_LOAD_OFFSET = 0x5C
"""Offset of `__run_at_load` in the image, in bytes (arch/powerpc/kernel/head_64.S: "Do not move this variable")."""
_RUN_AT_ZERO = 0x72756E30  # "run0": K2 copies itself to physical 0 first
_RUN_IN_PLACE = 1
_BANNER = b"Linux version "
_LONGEST_RELEASE = 65  # __NEW_UTS_LEN, include/uapi/linux/utsname.h
_KERNEL_BASE = 0xC000000000000000


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A relocatable ppc64 kernel: `data` from its first byte on, `span` bytes in memory once bss is counted."""

    source: str
    release: str
    byteorder: ByteOrder
    data: bytes
    span: int
    layout: tuple[Region, ...] = ()  # text, init and data by the file's sections, if it has any

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "") -> KernelImage:
        """The image inside an ELF vmlinux.

        :raise FormatError: not a ppc64 ELF kernel, truncated, not linked at 0, or not relocatable.
        """
        if data[:2] == b"\x1f\x8b" or data[:6] == b"\xfd7zXZ\0":
            raise FormatError("the kernel is compressed", source=source, hint="give the uncompressed ELF vmlinux")
        elf = ElfFile.from_bytes(data, source=source)
        if elf.machine != EM_PPC64:
            raise FormatError(
                f"ELF machine {elf.machine} is not ppc64",
                source=source,
                hint="give a vmlinux built for ppc64 or ppc64le",
            )
        loads = [segment for segment in elf.loads if segment.memory_size]
        if not loads:
            raise FormatError("no PT_LOAD segment: nothing to load", source=source, hint="give a vmlinux, not a module")
        base = min(segment.vaddr for segment in loads)
        if base != _KERNEL_BASE:
            raise FormatError(f"linked at {base:#x}, not at {_KERNEL_BASE:#x}", source=source, hint="give a relocatable kernel")
        span = max(segment.vaddr + segment.memory_size for segment in loads) - base
        file_span = max(segment.vaddr + segment.file_size for segment in loads) - base
        if span > 1 << 30:
            raise FormatError(f"spans {span:#x} bytes: no kernel is that big", source=source)
        flat = bytearray(file_span)
        for segment in loads:
            at = segment.vaddr - base
            flat[at : at + segment.file_size] = data[segment.file_offset : segment.file_offset + segment.file_size]
        order = ">" if elf.byteorder == "big" else "<"
        if len(flat) < 0x100 or struct.unpack_from(order + "I", flat, RUN_AT_LOAD_OFFSET)[0] not in (
            _RUN_AT_ZERO,
            _RUN_IN_PLACE,
        ):
            raise FormatError(
                "no __run_at_load flag: this kernel cannot run where it is loaded",
                source=source,
                offset=RUN_AT_LOAD_OFFSET,
                hint="give a kernel with CONFIG_RELOCATABLE=y, as every distribution ships",
            )
        return cls(source, _release(data), elf.byteorder, bytes(flat), span, _layout(section_addresses(data), base, span))

    def bytes_to_load(self, *, in_place: bool) -> bytes:
        """The image with `__run_at_load` set: `in_place` makes K2 relocate itself where it lies instead of moving to 0."""
        image = bytearray(self.data)
        order = ">" if self.byteorder == "big" else "<"
        struct.pack_into(order + "I", image, RUN_AT_LOAD_OFFSET, _RUN_IN_PLACE if in_place else _RUN_AT_ZERO)
        return bytes(image)


def _layout(sections: dict[str, int], base: int, span: int) -> tuple[Region, ...]:
    # The order in memory is the linker script's (arch/powerpc/kernel/vmlinux.lds.S); what lies between .init.text and .data
    # is freed after the boot (free_initmem).
    bounds = [sections.get(name, 0) - base for name in (".rodata", ".init.text", ".data")]
    if not 0 < bounds[0] < bounds[1] < bounds[2] < span:
        return ()
    names = ("K1 text", "K1 read-only data", "K1 freed init", "K1 data")
    return tuple(Region(name, Range(*piece)) for name, piece in zip(names, pairwise([0, *bounds, span]), strict=True))


def _release(data: bytes) -> str:
    # linux_banner, init/version.c: "Linux version RELEASE (builder) …"; format strings with "%s" are not it
    at = data.find(_BANNER)
    while at >= 0:
        word = data[at + len(_BANNER) : at + len(_BANNER) + _LONGEST_RELEASE].split(b" ", 1)[0].decode("ascii", "replace")
        if word[:1].isdigit() and word.isprintable():
            return word
        at = data.find(_BANNER, at + 1)
    return "unknown"
