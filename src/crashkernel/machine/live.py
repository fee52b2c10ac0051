"""Reads the machine this runs on: `/proc/device-tree`, `/proc` and `/sys` of a running K1.

Everything is read below a root directory, so that a saved copy of those files describes its machine just as well.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from crashkernel.errors import EnvironmentFault, FormatError
from crashkernel.formats.elf import ElfFile
from crashkernel.formats.fdt import Node
from crashkernel.machine import HEAD_SIZE, Cpu, Machine, Mmu
from crashkernel.machine.devicetree import machine_from_tree
from crashkernel.machine.kernelfile import running_layout
from crashkernel.machine.pages import read_pages
from crashkernel.memory import Range, RangeSet

PAGE_OFFSET = 0xC000000000000000
"""Virtual address of physical 0 in every ppc64 Linux (arch/powerpc/Kconfig, PAGE_OFFSET)."""

# How far pages are asked for: K1's image, what is right behind it, and never less than a K2 at zero may need.
_BEHIND_K1 = 64 << 20
_LOW_MEMORY = 128 << 20


def read_machine(root: Path = Path("/")) -> Machine:
    """The machine whose `/proc` and `/sys` lie below `root`.

    :raise EnvironmentFault: this is no POWER machine, or its device tree cannot be read.
    """
    tree = root / "proc/device-tree"
    if not tree.is_dir():
        raise EnvironmentFault(
            f"{tree} is not there: this is not a POWER machine",
            hint="run on the ppc64 host that is to be protected, or plan for it with --machine FILE",
        )
    machine = machine_from_tree(read_tree(tree), source=str(tree))
    sys_kernel = root / "sys/kernel"
    release = (root / "proc/sys/kernel/osrelease").read_text().strip()
    page_size = os.sysconf("SC_PAGESIZE")
    low = Range(0, max(machine.kernel_end + _BEHIND_K1, _LOW_MEMORY))
    return replace(
        machine,
        mmu=_mmu(root, machine.mmu),
        byteorder=sys.byteorder,
        page_size=page_size,
        cpus=_cpus(root),
        vmcoreinfo=_vmcoreinfo(sys_kernel / "vmcoreinfo"),
        head=_head(root / "proc/kcore"),
        cmdline=os.fsdecode((root / "proc/cmdline").read_bytes()).strip(),  # any bytes: whoever booted K1 typed them
        release=release,
        layout=running_layout(root, release, machine.kernel_end),
        pages=read_pages(root, machine.memory & RangeSet([low]), page_size),
    )


def read_tree(directory: Path) -> Node:
    """A device tree from its directory form (`/proc/device-tree`): a folder per node, a file per property."""

    def node(path: str, name: str) -> Node:
        properties: dict[str, bytes] = {}
        children: list[Node] = []
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.is_dir(follow_symlinks=False):
                    children.append(node(entry.path, entry.name))
                # `name` repeats the node's name for Open Firmware's sake; a flattened tree carries it in the node
                elif entry.name != "name" and entry.is_file(follow_symlinks=False):
                    properties[entry.name] = Path(entry.path).read_bytes()
        return Node(name, properties, tuple(children))

    try:
        return node(str(directory.resolve()), "")
    except PermissionError as error:
        raise EnvironmentFault(f"cannot read {error.filename}", hint="run as root") from error


def _mmu(root: Path, capable: Mmu) -> Mmu:
    # show_cpuinfo, arch/powerpc/kernel/setup-common.c → "MMU : Radix" or "Hash" on platforms that say so
    for line in (root / "proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "MMU":
            return "radix" if value.strip().lower() == "radix" else "hash"
    return capable


def _cpus(root: Path) -> tuple[Cpu, ...]:
    """Every present CPU with its note buffer (drivers/base/cpu.c, crash_notes: physical address and size in bytes).

    A CPU without one, in a kernel without CONFIG_KEXEC_CORE, is a CPU all the same: it comes to the purgatory.
    """
    cpus = []
    online = cpu_list((root / "sys/devices/system/cpu/online").read_text())
    for directory in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*"), key=lambda path: int(path.name[3:])):
        note = None
        try:
            paddr = int((directory / "crash_notes").read_text(), 16)
            note = Range.sized(paddr, int((directory / "crash_notes_size").read_text()))
        except FileNotFoundError:
            pass
        except PermissionError as error:
            raise EnvironmentFault(f"cannot read {error.filename}", hint="run as root") from error
        number = int(directory.name[3:])
        cpus.append(Cpu(number, note, number in online))
    return tuple(cpus)


def cpu_list(text: str) -> set[int]:
    """The kernel's list of CPUs, as in "0-3,8" (Documentation/admin-guide/cputopology.rst)."""
    numbers: set[int] = set()
    for piece in text.strip().split(","):
        first, _, last = piece.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _vmcoreinfo(path: Path) -> Range | None:
    # vmcoreinfo_show, kernel/ksysfs.c: "%pa %x", physical address and size, both hexadecimal
    try:
        paddr, size = path.read_text().split()
    except (OSError, ValueError):
        return None
    return Range.sized(int(paddr, 16), int(size, 16))


def _head(kcore: Path) -> bytes:
    """K1's first bytes through `/proc/kcore` (fs/proc/kcore.c), b"" when lockdown or permissions forbid."""
    try:
        with kcore.open("rb") as core:
            elf = ElfFile.from_bytes(core.read(0x10000), source=str(kcore), file_size=1 << 63)
            for segment in elf.loads:
                if segment.vaddr <= PAGE_OFFSET < segment.vaddr + segment.memory_size:
                    core.seek(segment.file_offset + PAGE_OFFSET - segment.vaddr)
                    head = core.read(HEAD_SIZE)
                    return head if len(head) == HEAD_SIZE else b""
    except (OSError, FormatError):  # a container may put an empty file there
        return b""
    return b""
