"""Builds device trees, machines, kernels and plans: small, complete, and without a host."""

import array
import sys
from dataclasses import dataclass, replace

from crashkernel.formats.fdt import Node
from crashkernel.machine import HEAD_SIZE, Cpu, Machine, Region
from crashkernel.machine.devicetree import machine_from_tree
from crashkernel.memory import Range
from crashkernel.placement import plan_load
from crashkernel.placement.image import KernelImage
from crashkernel.placement.plan import LoadPlan
from crashkernel.placement.sizing import Initrd
from support.elfwriter import Part, write_elf

MIB = 1 << 20
GIB = 1 << 30
KERNEL_BASE = 0xC000000000000000
HEAD = bytes(range(0x100))
"""K1's first bytes in every machine here."""


RELEASE = "6.1.0-test"
LAYOUT = tuple(
    Region(name, Range.sized(number * MIB, MIB))
    for number, name in enumerate(("K1 text", "K1 read-only data", "K1 freed init", "K1 data"))
)
"""Where a kernel of that release has what."""

VTY = 0x71000000
"""The unit address of the terminal of every partition here."""

RTAS_TOKENS = {"system-reboot": 0x2014, "ibm,nmi-register": 0x2028}


def u32(*values: int) -> bytes:
    return b"".join(value.to_bytes(4, "big") for value in values)


def u64(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "big") for value in values)


@dataclass(frozen=True)
class Block:
    """A run of logical memory blocks of dynamic memory: assigned 0x8, reserved 0x80."""

    base: int
    count: int = 1
    flags: int = 0x8


def memory_node(base: int, *sizes: int, name: str = "") -> Node:
    """A memory node; each further size is the next entry of `reg`, right behind the one before."""
    reg, at = b"", base
    for size in sizes:
        reg += u64(at, size)
        at += size
    return Node(name or f"memory@{base:x}", {"device_type": b"memory\0", "reg": reg})


def cpu_node(
    number: int,
    *,
    threads: int = 1,
    radix: bool = True,
    timebase: int | None = 512_000_000,
    servers: bool = True,
    vectors: dict[str, int] | None = None,
) -> Node:
    properties = {"device_type": b"cpu\0", "reg": u32(number)}
    properties |= {name: u32(value) for name, value in ({"ibm,vmx": 2} if vectors is None else vectors).items()}
    if timebase is not None:
        properties["timebase-frequency"] = u32(timebase)
    if servers:
        properties["ibm,ppc-interrupt-server#s"] = u32(*range(number, number + threads))
    if radix:
        properties["ibm,processor-radix-AP-encodings"] = u32(0xC, 0x10)
    return Node(f"PowerPC,POWER9@{number:x}", properties)


def drmem_node(lmb_size: int, blocks: list[Block], version: int) -> Node:
    properties = {"ibm,lmb-size": u64(lmb_size)}
    if version == 1:
        entries = [(b.base + i * lmb_size, b.flags) for b in blocks for i in range(b.count)]
        properties["ibm,dynamic-memory"] = u32(len(entries)) + b"".join(
            u64(base) + u32(0x80000000 + number, 0, 1, flags) for number, (base, flags) in enumerate(entries)
        )
    else:
        properties["ibm,dynamic-memory-v2"] = u32(len(blocks)) + b"".join(
            u32(b.count) + u64(b.base) + u32(0x80000000, 1, b.flags) for b in blocks
        )
    return Node("ibm,dynamic-reconfiguration-memory", properties)


def rtas_node(where: Range | None = None, *, hypervisor: bool = True) -> Node:
    """RTAS, instantiated at `where`; with a hypervisor's calls it makes the machine a PAPR partition."""
    properties = {"ibm,hypertas-functions": b"hcall-pft\0hcall-term\0"} if hypervisor else {}
    if where is not None:
        properties |= {"linux,rtas-base": u32(where.start), "rtas-size": u32(where.size)}
        properties |= {"linux,rtas-entry": u32(where.start + 0x40)}
        properties |= {name: u32(token) for name, token in RTAS_TOKENS.items()}
    return Node("rtas", properties)


def vty_node(address: int = VTY, compatible: bytes = b"hvterm1\0") -> Node:
    return Node(f"vty@{address:x}", {"compatible": compatible, "reg": u32(address)})


def tree(
    *,
    memory: list[Node] | None = None,
    region: Range | None = None,
    platform: str = "pseries",  # or "powernv", or another word for neither
    radix: bool = True,
    cpus: int = 2,
    rtas: Range | None = None,
    opal: Range | None = None,
    initrd: Range | None = None,
    bootargs: str = "root=/dev/sda1 crashkernel=512M",
    extra: list[Node] | None = None,
    properties: dict[str, bytes] | None = None,
) -> Node:
    chosen: dict[str, bytes] = {"bootargs": bootargs.encode() + b"\0", "stdout-path": f"/vdevice/vty@{VTY:x}\0".encode()}
    if region is not None:
        chosen |= {"linux,crashkernel-base": u64(region.start), "linux,crashkernel-size": u64(region.size)}
    if initrd is not None:
        chosen |= {"linux,initrd-start": u64(initrd.start), "linux,initrd-end": u64(initrd.end)}
    children = [
        Node("cpus", {"#address-cells": u32(1), "#size-cells": u32(0)}, tuple(cpu_node(n, radix=radix) for n in range(cpus))),
        *(memory if memory is not None else [memory_node(0, 2 * GIB)]),
        Node("chosen", chosen),
        *(extra or []),
    ]
    if platform == "pseries" or rtas is not None:
        children.append(rtas_node(rtas, hypervisor=platform == "pseries"))
    if platform == "pseries":
        children.append(Node("vdevice", {}, (vty_node(),)))
    if platform == "powernv":
        opal_properties = {"compatible": b"ibm,opal-v3\0"}
        if opal is not None:
            opal_properties |= {
                "opal-base-address": u64(opal.start),
                "opal-entry-address": u64(opal.start + 0x4E0),
                "opal-runtime-size": u64(opal.size),
            }
        children.append(Node("ibm,opal", opal_properties))
    root = {"#address-cells": u32(2), "#size-cells": u32(2), "model": b"IBM pSeries (test)\0", "compatible": b"qemu,pseries\0"}
    return Node("", root | (properties or {}), tuple(children))


def machine(root: Node, *, mmu: str | None = None, notes_at: int | None = None, release: str = "") -> Machine:
    """A machine as the live reader would complete it; notes (one page each) from `notes_at` on, VMCOREINFO first."""
    found = machine_from_tree(root)
    cpus, vmcoreinfo = found.cpus, None
    if notes_at is not None:
        vmcoreinfo = Range.sized(notes_at, 0x1000)
        cpus = tuple(Cpu(c.number, Range.sized(notes_at + 0x1000 * (1 + i), 0x400)) for i, c in enumerate(found.cpus))
    return replace(
        found,
        mmu=mmu or found.mmu,
        byteorder="little",
        page_size=0x10000,
        cpus=cpus,
        vmcoreinfo=vmcoreinfo,
        release=release,
        head=HEAD[:HEAD_SIZE],
    )


def small_machine(**changes) -> Machine:
    """256 MiB of partition, its region [64 MiB, 192 MiB), RTAS inside it."""
    settings = {
        "memory": [memory_node(0, 256 * MIB)],
        "region": Range(64 * MIB, 192 * MIB),
        "rtas": Range.sized(160 * MIB, 0x10000),
    } | changes
    return machine(tree(**settings), notes_at=0x300000, release=RELEASE)


def kernel(span: int = 3 * MIB, size: int | None = None, byteorder: str = "little") -> KernelImage:
    """An image whose every 8 bytes name their own offset, with the flag of a relocatable kernel."""
    size = span // 2 if size is None else size
    words = array.array("Q", range(0x4B32000000000000, 0x4B32000000000000 + size, 8))
    if sys.byteorder == "little":
        words.byteswap()
    data = bytearray(words.tobytes())
    data[0x5C:0x60] = (0x72756E30).to_bytes(4, byteorder)
    return KernelImage("vmlinux", RELEASE, byteorder, ((0, bytes(data[:size])),), span, LAYOUT)


def initrd(size: int) -> Initrd:
    """An initramfs that is not compressed, as far as a plan is concerned."""
    return Initrd(size, size, size, size)


def vmlinux(
    byteorder: str = "little",
    *,
    release: str = "6.1.0-49-powerpc64le",
    span: int = 0x9000,
    flag: int = 0x72756E30,
    vaddr: int = KERNEL_BASE,
    machine_number: int = 21,
    banner: bytes | None = None,
) -> bytes:
    """A vmlinux as the linker leaves it: text with head and flag, a data segment apart, bss behind, and its banner."""
    text = bytearray(0x4000)
    for at in range(0, len(text), 4):
        text[at : at + 4] = at.to_bytes(4, byteorder)
    text[0x5C:0x60] = flag.to_bytes(4, byteorder)
    line = banner if banner is not None else f"Linux version {release} (builder@host) (gcc) #1 SMP\n\0".encode()
    text[0x2000 : 0x2000 + len(line)] = line
    data = bytes(range(256)) * 8
    parts = [
        Part(vaddr=vaddr, paddr=0, data=bytes(text), alignment=0x10000),
        Part(vaddr=vaddr + 0x6000, paddr=0x6000, data=data, memory_size=span - 0x6000, alignment=0x10000),
    ]
    return write_elf(byteorder, parts, machine=machine_number, entry=vaddr)


def with_sections(blob: bytes, sections: dict[str, int], byteorder: str = "little") -> bytes:
    """An ELF file with section headers added: the null section, these by name and address, and the names' own."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in (*sections, ".shstrtab"))

    def header(name: str, kind: int, address: int, offset: int, size: int) -> bytes:
        words = [(strings.index(b"\0" + name.encode() + b"\0") + 1, 4), (kind, 4), (0, 8), (address, 8), (offset, 8), (size, 8)]
        return b"".join(value.to_bytes(width, byteorder) for value, width in words).ljust(64, b"\0")

    table = len(blob) + len(strings)
    headers = [bytes(64), *(header(name, 1, address, 0, 0) for name, address in sections.items())]
    headers.append(header(".shstrtab", 3, 0, len(blob), len(strings)))
    out = bytearray(blob + strings + b"".join(headers))
    out[40:48] = table.to_bytes(8, byteorder)
    for at, value in ((58, 64), (60, len(headers)), (62, len(headers) - 1)):
        out[at : at + 2] = value.to_bytes(2, byteorder)
    return bytes(out)


def small_plan(placement: str = "reserved", *, initrd_size: int = 70000, **changes) -> LoadPlan:
    return plan_load(small_machine(**changes), kernel(), initrd(initrd_size), "console=hvc0", placement)
