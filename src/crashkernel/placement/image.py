"""The capture kernel's image: an ELF vmlinux turned into the flat bytes that lie in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from crashkernel.errors import FormatError, UsageError
from crashkernel.formats.elf import EM_PPC64, ElfFile, section_addresses
from crashkernel.machine.kernelfile import KERNEL_BASE, find_banner, image_layout, map_file

if TYPE_CHECKING:
    from pathlib import Path

    from crashkernel.machine import ByteOrder, Region
    from crashkernel.machine.kernelfile import FileBytes

RUN_AT_LOAD_OFFSET = 0x5C
"""Offset of `__run_at_load` in the image, in bytes (arch/powerpc/kernel/head_64.S: "Do not move this variable")."""
RUN_AT_ZERO = 0x72756E30  # "run0": K2 copies itself to physical 0 first
RUN_IN_PLACE = 1
_SMALLEST, _LARGEST = 0x100, 1 << 30  # bytes, of which the first are up to the first exception vector: no kernel is outside
_BANNER = b"Linux version "
_LONGEST_RELEASE = 65  # __NEW_UTS_LEN, include/uapi/linux/utsname.h


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A relocatable ppc64 kernel of `span` bytes in memory, bss included.

    `pieces` are its bytes by their offset in the image; what lies between them and behind them is zero. They may be a view of
    a mapped file, so that a plan costs no more than what it asks.
    """

    source: str
    release: str
    byteorder: ByteOrder
    pieces: tuple[tuple[int, bytes | memoryview], ...] = field(repr=False)
    span: int
    layout: tuple[Region, ...] = ()  # text, init and data by the file's sections, if it has any

    @classmethod
    def open(cls, path: Path) -> KernelImage:
        """The image inside an ELF vmlinux, which is mapped and must not shrink while the image is in use.

        :raise UsageError: the file cannot be read.
        :raise FormatError: as `from_bytes`.
        """
        try:
            data = map_file(path)
        except OSError as error:
            hint = "give the path of an existing, readable file"
            raise UsageError(f"cannot read {path}: {error.strerror}", hint=hint) from error
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: FileBytes, source: str = "") -> KernelImage:
        """The image inside an ELF vmlinux.

        :raise FormatError: not a ppc64 ELF kernel, truncated, not linked at 0, or not relocatable.
        """
        if data[:2] == b"\x1f\x8b" or data[:6] == b"\xfd7zXZ\0":
            raise FormatError("the kernel is compressed", source=source, hint="give the uncompressed ELF vmlinux")
        view = memoryview(data)
        elf = ElfFile.from_bytes(view, source=source)
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
        if base != KERNEL_BASE:
            raise FormatError(f"linked at {base:#x}, not at {KERNEL_BASE:#x}", source=source, hint="give a relocatable kernel")
        span = max(segment.vaddr + segment.memory_size for segment in loads) - base
        if span > _LARGEST:
            raise FormatError(f"spans {span:#x} bytes: no kernel is that big", source=source)
        layout = image_layout(section_addresses(view), span)
        pieces = tuple(
            (load.vaddr - base, view[load.file_offset : load.file_offset + load.file_size]) for load in loads if load.file_size
        )
        image = cls(source, _release(data, elf), elf.byteorder, pieces, span, layout)
        if len(image._flat(_SMALLEST)) < _SMALLEST or image.run_at_load not in (RUN_AT_ZERO, RUN_IN_PLACE):
            raise FormatError(
                "no __run_at_load flag: this kernel cannot run where it is loaded",
                source=source,
                offset=RUN_AT_LOAD_OFFSET,
                hint="give a kernel with CONFIG_RELOCATABLE=y, as every distribution ships",
            )
        return image

    @property
    def run_at_load(self) -> int:
        """The word at `RUN_AT_LOAD_OFFSET` as the file has it: `RUN_AT_ZERO`, or `RUN_IN_PLACE` (CONFIG_RELOCATABLE_TEST)."""
        return int.from_bytes(self._flat(_SMALLEST)[RUN_AT_LOAD_OFFSET : RUN_AT_LOAD_OFFSET + 4], self.byteorder)

    @property
    def data(self) -> bytes:
        """The flat bytes from the image's first to its last that is in the file: tens of MB, made anew each time."""
        return bytes(self._flat())

    def bytes_to_load(self, *, in_place: bool) -> bytes:
        """The image with `__run_at_load` set: `in_place` makes K2 relocate itself where it lies instead of moving to 0."""
        image = self._flat()
        flag = RUN_IN_PLACE if in_place else RUN_AT_ZERO
        image[RUN_AT_LOAD_OFFSET : RUN_AT_LOAD_OFFSET + 4] = flag.to_bytes(4, self.byteorder)
        return bytes(image)

    def _flat(self, limit: int = _LARGEST) -> bytearray:
        """The first `limit` bytes, fewer when the file has no more of the image."""
        size = min(max((offset + len(piece) for offset, piece in self.pieces), default=0), limit)
        flat = bytearray(size)
        for offset, piece in self.pieces:
            part = piece[: max(size - offset, 0)]
            flat[offset : offset + len(part)] = part
        return flat


def _release(data: FileBytes, elf: ElfFile) -> str:
    # linux_banner, init/version.c: "Linux version RELEASE (builder) …"; format strings with "%s" are not it
    at = find_banner(data, elf, _BANNER)
    while at >= 0:
        word = data[at + len(_BANNER) : at + len(_BANNER) + _LONGEST_RELEASE].split(b" ", 1)[0].decode("ascii", "replace")
        if word[:1].isdigit() and word.isprintable():
            return word
        at = data.find(_BANNER, at + 1)
    return "unknown"
