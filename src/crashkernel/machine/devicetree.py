"""What a device tree says of a machine: memory, CPUs, firmware, the reserved region.

Works on the tree of a live host and on a captured blob alike. Sources: Devicetree Specification v0.4 ch. 3 (memory, cpus,
reserved-memory), PAPR (RTAS, dynamic memory), skiboot doc/device-tree (ibm,opal), and the kernel's readers named below.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from crashkernel.errors import FormatError
from crashkernel.formats.fdt import DeviceTree
from crashkernel.machine import Cpu, Machine, Mmu, Platform, Region, Services
from crashkernel.machine.drmem import DynamicMemory
from crashkernel.memory import Range, RangeSet

if TYPE_CHECKING:
    from crashkernel.formats.fdt import Node

DYNAMIC_MEMORY_NODE = "ibm,dynamic-reconfiguration-memory"
_LOWEST_REGION = 0x10000  # the running kernel itself lies at 0
_SMALLEST_PAGE = 0x1000  # of any ppc64 kernel


def machine_from_tree(root: Node, *, source: str = "device tree") -> Machine:
    """What the tree alone can tell; a running kernel's notes, page size and layout stay unknown (0, None, empty).

    Where its image ends the tree of a running kernel tells (kexec_setup, arch/powerpc/kexec/core.c: linux,kernel-end).
    :raise FormatError: the tree is no POWER machine's, lacks memory, or says something impossible.
    """
    platform = _platform(root, source)
    nodes = [memory_ranges(node, root) for node in memory_nodes(root)]
    memory = RangeSet(piece for node in nodes for piece in node) | dynamic_memory(root).usable
    if not memory:
        raise FormatError("no /memory node describes any RAM", source=source, hint="is this the tree of a POWER machine?")
    for piece in memory:
        _require_pages(piece, "memory", source)
    first = next(iter(memory))
    everything = Range(0, list(memory)[-1].end)
    chosen = root.child("chosen")
    return Machine(
        platform=platform,
        model=_text(root, "model") or _text(root, "compatible"),
        mmu=_mmu(root),
        byteorder="little",
        page_size=0,
        memory=memory,
        real_mode=everything if platform == "powernv" else _rma(nodes, first),
        cpus=tuple(Cpu(number) for number, _ in enumerate(_threads(root))),
        reserved=_reserved(chosen),
        firmware=tuple(_firmware(root)),
        initrd=_pair(chosen, "linux,initrd-start", "linux,initrd-end"),
        vmcoreinfo=None,
        head=b"",
        cmdline=os.fsdecode(chosen.properties.get("bootargs", b"").split(b"\0")[0]) if chosen is not None else "",
        release="",
        timebase_hz=_timebase(root),
        altivec=_altivec(root),
        services=_services(root, platform),
        device_tree=root,
        kernel_end=_word(chosen, "linux,kernel-end") if chosen is not None else 0,
        tree_size=len(DeviceTree(root).to_bytes()),
    )


def _platform(root: Node, source: str) -> Platform:
    if root.child("ibm,opal") is not None:
        return "powernv"
    # A hypervisor names its calls there: that, not RTAS, makes a partition (probe_fw_features,
    # arch/powerpc/platforms/pseries/firmware.c; prom_find_machine_type, arch/powerpc/kernel/prom_init.c).
    rtas = root.child("rtas")
    if rtas is not None and "ibm,hypertas-functions" in rtas.properties:
        return "pseries"
    raise FormatError(
        "not a PowerNV or PAPR machine: neither /ibm,opal nor /rtas with ibm,hypertas-functions",
        source=source,
        hint="give the tree of a booted POWER server or partition, /sys/firmware/fdt",
    )


def memory_nodes(root: Node) -> tuple[Node, ...]:
    """The top level's nodes of device_type "memory" (early_init_dt_scan_memory, drivers/of/fdt.c)."""
    return tuple(node for node in root.children if _text(node, "device_type") == "memory")


def memory_ranges(node: Node, root: Node) -> tuple[Range, ...]:
    """`reg` of a memory node as ranges; empty entries are dropped."""
    return tuple(_reg(node, root))


def dynamic_memory(root: Node) -> DynamicMemory:
    """The partition's logical memory blocks.

    :raise FormatError: the property is shorter than its own count says, or says something impossible.
    """
    return DynamicMemory.of(root.child(DYNAMIC_MEMORY_NODE))


def _rma(nodes: list[tuple[Range, ...]], first: Range) -> Range:
    # A partition's RMA is the first entry of the memory node at 0 (PAPR; ppc64_rma_size in
    # early_init_dt_add_memory_arch, arch/powerpc/kernel/prom.c).
    starts = [pieces[0] for pieces in nodes if pieces and pieces[0].start == first.start]
    return starts[0] if starts else first


def _reserved(chosen: Node | None) -> Range | None:
    # export_crashk_values, arch/powerpc/kexec/core.c
    if chosen is None or "linux,crashkernel-base" not in chosen.properties:
        return None
    base, size = (_number(chosen, f"linux,crashkernel-{name}") for name in ("base", "size"))
    if not size:
        return None
    if base < _LOWEST_REGION:
        raise FormatError(f"the reserved region at {base:#x} leaves K1 no page at 0", source="device tree")
    region = _sized(base, size)
    _require_pages(region, "the reserved region", "device tree")  # reserve_crashkernel, arch/powerpc/kexec/core.c, aligns both
    return region


def _firmware(root: Node) -> Iterator[Region]:
    rtas = root.child("rtas")
    if rtas is not None and "linux,rtas-base" in rtas.properties:
        size = _number(rtas, "rtas-size")
        if size:
            yield Region("RTAS", _sized(_number(rtas, "linux,rtas-base"), size))
    opal = root.child("ibm,opal")
    if opal is not None and "opal-base-address" in opal.properties:
        size = _number(opal, "opal-runtime-size")
        if size:
            yield Region("OPAL", _sized(_number(opal, "opal-base-address"), size))
    for path, node in root.walk():
        # prom_initialize_tce_table, arch/powerpc/kernel/prom_init.c (bare metal before OPAL)
        if "linux,tce-base" in node.properties and _number(node, "linux,tce-size"):
            yield Region(f"TCE {path}", _sized(_number(node, "linux,tce-base"), _number(node, "linux,tce-size")))
    named = root.child("reserved-memory")
    if named is not None:
        for node in named.children:
            if "reg" in node.properties:
                for piece in _reg(node, named):
                    yield Region(node.name.split("@")[0], piece)
    elif "reserved-ranges" in root.properties:
        # early_reserve_mem_dt, arch/powerpc/kernel/prom.c: pairs of 64-bit base and size
        for piece in _pairs(root.properties["reserved-ranges"], 2, 2):
            yield Region("reserved", piece)


def _services(root: Node, platform: Platform) -> Services:
    rtas = root.child("rtas")
    if platform == "powernv":
        opal = root.child("ibm,opal")
        if opal is None or "opal-entry-address" not in opal.properties:
            return Services()
        consoles = opal.child("consoles")
        # "ibm,opal-console-hvsi" wants packets; a firmware that names none has a raw one of number 0 (hvc_opal_init_early)
        terminals = [
            _word(node, "reg")
            for node in (consoles.children if consoles is not None else ())
            if b"ibm,opal-console-raw" in node.properties.get("compatible", b"").split(b"\0")
        ]
        return Services(
            "opal",
            min(terminals, default=0 if consoles is None else None),
            (_word(opal, "opal-base-address"), _word(opal, "opal-entry-address")),
        )
    if rtas is None or "linux,rtas-entry" not in rtas.properties:
        return Services("papr", _vty(root))
    return Services(
        "papr",
        _vty(root),
        rtas=(_word(rtas, "linux,rtas-base"), _word(rtas, "linux,rtas-entry")),
        rtas_reboot=_word(rtas, "system-reboot"),
        rtas_nmi=_word(rtas, "ibm,nmi-register"),
    )


def _vty(root: Node) -> int | None:
    """The unit address of the terminal that the firmware talks to, if it takes plain characters.

    hvc_vio_init_early, drivers/tty/hvc/hvc_vio.c: /chosen names it; if that is another device, the first there is. A
    "hvterm-protocol" one wants packets.
    """
    chosen = root.child("chosen")
    # a path may have options behind a colon (Devicetree spec 3.6)
    named = (
        {_text(chosen, name).partition(":")[0] for name in ("stdout-path", "linux,stdout-path")}
        if chosen is not None
        else set()
    )
    found = [
        (path not in named, _number(node, "reg"))
        for path, node in root.walk()
        if b"hvterm1" in node.properties.get("compatible", b"").split(b"\0") and 0 < len(node.properties.get("reg", b"")) <= 8
    ]
    return min(found)[1] if found else None


def _altivec(root: Node) -> bool:
    # check_cpu_pa_features' neighbour: feature_properties, arch/powerpc/kernel/prom.c
    cpus = root.child("cpus")
    nodes = [node for node in (cpus.children if cpus is not None else ()) if _text(node, "device_type") == "cpu"]
    return bool(nodes) and all(_number(node, "ibm,vmx") or _number(node, "altivec") for node in nodes)


def _threads(root: Node) -> Iterator[int]:
    cpus = root.child("cpus")
    for node in cpus.children if cpus is not None else ():
        if _text(node, "device_type") == "cpu":
            threads = node.properties.get("ibm,ppc-interrupt-server#s") or node.properties.get("reg", b"")
            for at in range(0, len(threads) // 4 * 4, 4):
                yield int.from_bytes(threads[at : at + 4], "big")


def _timebase(root: Node) -> int:
    # 512 MHz on every POWER server since POWER6 (Power ISA's time base is a constant of the platform)
    cpus = root.child("cpus")
    rates = [_number(node, "timebase-frequency") for node in (cpus.children if cpus else ())]
    return next((rate for rate in rates if 0 < rate < 1 << 32), 512_000_000)


def _mmu(root: Node) -> Mmu:
    # A tree cannot say what K1 chose; it says what the CPU can do. Radix came with ISA 3.0 (POWER9).
    cpus = root.child("cpus")
    radix = any("ibm,processor-radix-AP-encodings" in node.properties for node in (cpus.children if cpus else ()))
    return "radix" if radix else "hash"


def _text(node: Node, name: str) -> str:
    return node.properties.get(name, b"").split(b"\0")[0].decode("ascii", "replace")


def _number(node: Node, name: str) -> int:
    # Linux and firmware write these as one or two cells: the length tells.
    return int.from_bytes(node.properties.get(name, b""), "big")


def _word(node: Node, name: str) -> int:
    # For a parameter of the purgatory's, which has 64 bits for each.
    value = _number(node, name)
    if value >= 1 << 64:
        raise FormatError(f"{node.name}: {name} reaches beyond 64 bits", source="device tree")
    return value


def _pair(node: Node | None, start: str, end: str) -> Range | None:
    if node is None or start not in node.properties or end not in node.properties:
        return None
    first, last = _number(node, start), _number(node, end)
    return _sized(first, last - first) if first < last else None


def _reg(node: Node, parent: Node) -> Iterator[Range]:
    # Devicetree spec 2.3.5: the parent's cells rule, 2 and 1 where it says nothing; POWER roots always say 2 and 2.
    address_cells = _number(parent, "#address-cells") if "#address-cells" in parent.properties else 2
    size_cells = _number(parent, "#size-cells") if "#size-cells" in parent.properties else 1
    if not (1 <= address_cells <= 2 and 1 <= size_cells <= 2):
        raise FormatError(f"{node.name}: #address-cells {address_cells}, #size-cells {size_cells}", source="device tree")
    yield from _pairs(node.properties.get("reg", b""), address_cells, size_cells)


def _pairs(data: bytes, address_cells: int, size_cells: int) -> Iterator[Range]:
    step = 4 * (address_cells + size_cells)
    for at in range(0, len(data) // step * step, step):
        base = int.from_bytes(data[at : at + 4 * address_cells], "big")
        size = int.from_bytes(data[at + 4 * address_cells : at + step], "big")
        if size:
            yield _sized(base, size)


def _require_pages(piece: Range, what: str, source: str) -> None:
    if piece.start % _SMALLEST_PAGE or piece.end % _SMALLEST_PAGE:
        raise FormatError(f"{what} at {piece} is not in whole pages of {_SMALLEST_PAGE:#x} bytes", source=source)


def _sized(base: int, size: int) -> Range:
    # A plan writes every address, ends included, as a 64-bit number.
    if base + size >= 1 << 64:
        raise FormatError(f"{size:#x} bytes at {base:#x} reach beyond 64 bits", source="device tree")
    return Range.sized(base, size)
