"""The file of a kernel: where distributions keep it, which kernel it is, and where the parts of its image lie.

The sections of the file say what the running kernel does not: in its /proc/kallsyms is what its distribution chose to keep,
which without CONFIG_KALLSYMS_ALL is code alone. Files are mapped, not read: what is asked of 45 MB is in a few pages of them.
"""

from __future__ import annotations

import mmap
import re
from itertools import pairwise
from typing import TYPE_CHECKING

from crashkernel.errors import FormatError
from crashkernel.formats.elf import EM_PPC64, ElfFile, section_addresses
from crashkernel.machine import LARGEST_PAGE, Region
from crashkernel.memory import Range, align_up

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

KERNEL_BASE = 0xC000000000000000
"""Virtual address of the image's first byte (arch/powerpc/Kconfig, KERNEL_START)."""

FileBytes = bytes | mmap.mmap
"""A file's bytes, in memory or mapped."""

_NAMES = ("K1 text", "K1 read-only data", "K1 freed init", "K1 data")


def kernel_files(root: Path, release: str) -> tuple[Path, ...]:
    """Where distributions keep the kernel of that release, below `root`."""
    return (
        root / f"boot/vmlinux-{release}",
        root / f"boot/vmlinuz-{release}",
        root / f"usr/lib/modules/{release}/vmlinuz",
    )


def map_file(path: Path) -> FileBytes:
    """A file's bytes, read as they are looked at. Those of what cannot be mapped, such as a pipe, are read at once.

    :raise OSError: it cannot be opened or read.
    """
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # ValueError: it is empty
            return file.read()


def find_banner(data: FileBytes, elf: ElfFile, banner: bytes) -> int:
    """Offset of `banner` in the file, -1 when it is nowhere. `linux_banner` is read-only data, so that is searched first."""
    start = section_addresses(memoryview(data)).get(".rodata", 0)
    for load in elf.loads:
        if load.vaddr <= start < load.vaddr + load.file_size:
            at = data.find(banner, load.file_offset + start - load.vaddr)
            if at >= 0:
                return at
    return data.find(banner)


def ends_alike(span: int, kernel_end: int) -> bool:
    """Whether an image of `span` bytes may be the kernel that ends at `kernel_end` (0: unknown): it rounds up to its page."""
    return not kernel_end or align_up(span, LARGEST_PAGE) == align_up(kernel_end, LARGEST_PAGE)


def image_layout(sections: Mapping[str, int], span: int) -> tuple[Region, ...]:
    """The parts of an image, as physical addresses when it lies at 0; () when the sections are missing or make no sense.

    `sections` are the file's (virtual addresses by name), `span` the image's bytes in memory, bss included.
    """
    # The order in memory is the linker script's (arch/powerpc/kernel/vmlinux.lds.S); what lies between .init.text and .data
    # is freed after the boot (free_initmem).
    return _parts([sections.get(name, 0) - KERNEL_BASE for name in (".rodata", ".init.text", ".data")], span)


def running_layout(root: Path, release: str, kernel_end: int) -> tuple[Region, ...]:
    """The parts of K1's own image: by the file it was booted from, else by its symbols; () when neither says.

    `root` has K1's /boot, /usr and /proc; `kernel_end` is where K1's image ends, a physical address, 0 when unknown.
    """
    try:
        # The running kernel prints its own linux_banner there (version_proc_show, fs/proc/version.c): no other build has it.
        banner = (root / "proc/version").read_bytes().strip()
    except OSError:
        banner = b""
    # SUSE links the default kernel there; whether it is this one the banner says
    for path in (*kernel_files(root, release), root / "boot/vmlinux") if banner else ():
        try:
            layout = _file_layout(map_file(path), banner, kernel_end)
        except (OSError, FormatError):
            continue
        if layout:
            return layout
    try:
        symbols = (root / "proc/kallsyms").read_bytes()
    except OSError:
        return ()
    return _symbol_layout(symbols, kernel_end)


def _file_layout(data: FileBytes, banner: bytes, kernel_end: int) -> tuple[Region, ...]:
    elf = ElfFile.from_bytes(memoryview(data))
    loads = [load for load in elf.loads if load.memory_size]
    if elf.machine != EM_PPC64 or not loads or min(load.vaddr for load in loads) != KERNEL_BASE:
        return ()
    span = max(load.vaddr + load.memory_size for load in loads) - KERNEL_BASE
    # a K1 that does not lie at 0, itself a capture kernel, ends elsewhere
    if not ends_alike(span, kernel_end):
        return ()
    return image_layout(section_addresses(memoryview(data)), span) if find_banner(data, elf, banner) >= 0 else ()


def _symbol_layout(kallsyms: bytes, kernel_end: int) -> tuple[Region, ...]:
    # vmlinux.lds.S has these; kptr_restrict makes all of them 0
    wanted = (rb"_stext", rb"__start_rodata", rb"__init_begin", rb"__init_end", rb"_end")
    found = {
        name: int(address, 16)
        for address, name in re.findall(rb"^([0-9a-f]{1,16}) \w (" + rb"|".join(wanted) + rb")$", kallsyms, re.MULTILINE)
    }
    start, *bounds, end = (found.get(name, 0) for name in wanted)
    if start != KERNEL_BASE or (kernel_end and end - KERNEL_BASE != kernel_end):
        return ()
    return _parts([bound - KERNEL_BASE for bound in bounds], end - KERNEL_BASE)


def _parts(bounds: list[int], span: int) -> tuple[Region, ...]:
    if not 0 < bounds[0] < bounds[1] < bounds[2] < span:
        return ()
    return tuple(Region(name, Range(*piece)) for name, piece in zip(_NAMES, pairwise([0, *bounds, span]), strict=True))
