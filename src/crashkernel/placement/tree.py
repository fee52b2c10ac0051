"""K2's device tree: K1's, told which memory is K2's, where its initrd lies and what its command line is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crashkernel.formats.fdt import DeviceTree
from crashkernel.machine.devicetree import DYNAMIC_MEMORY_NODE, dynamic_memory, memory_nodes, memory_ranges
from crashkernel.memory import Range, RangeSet

if TYPE_CHECKING:
    from crashkernel.formats.fdt import Node
    from crashkernel.machine import Machine
    from crashkernel.placement.plan import LoadPlan

# What K1 was told by its own boot loader or says of itself (kexec_setup, arch/powerpc/kexec/core.c; prom_init.c).
_K1_ONLY = (
    "bootargs",
    "linux,initrd-start",
    "linux,initrd-end",
    "linux,elfcorehdr",
    "linux,usable-memory-range",
    "linux,crashkernel-base",
    "linux,crashkernel-size",
    "linux,memory-limit",
    "linux,kernel-end",
    "linux,tce-alloc-start",
    "linux,tce-alloc-end",
)


def capture_tree(machine: Machine, plan: LoadPlan, initrd_size: int) -> DeviceTree:
    """The tree to hand to K2. `initrd_size` is in bytes. The purgatory fills in the CPU that enters."""
    root = machine.device_tree
    memory = {node.name for node in memory_nodes(root)}
    children = []
    for node in root.children:
        if node.name in memory:
            usable = RangeSet(memory_ranges(node, root)) & plan.k2_mapped
            children.append(node.with_property("linux,usable-memory", _pairs(usable)))
        elif node.name == DYNAMIC_MEMORY_NODE:
            children.append(node.with_property("linux,drconf-usable-memory", _drconf(root, plan.k2_mapped)))
        elif node.name == "chosen":
            children.append(_chosen(node, plan, initrd_size))
        else:
            children.append(node)
    # Mapped but not K2's (the firmware's, and what shares a mapping block with it), and what K2 must not allocate over.
    reserved = (plan.k2_mapped - plan.k2_memory) | RangeSet(s.range for s in plan.segments if s.content != "kernel")
    return DeviceTree(root.with_children(children), tuple((r.start, r.size) for r in reserved), 0)


def _chosen(node: Node, plan: LoadPlan, initrd_size: int) -> Node:
    node = node.without(*_K1_ONLY).with_property("bootargs", os.fsencode(plan.cmdline) + b"\0")
    if initrd_size:
        start = plan.segment("initrd").range.start
        node = node.with_property("linux,initrd-start", start.to_bytes(8, "big"))
        node = node.with_property("linux,initrd-end", (start + initrd_size).to_bytes(8, "big"))
    return node


def _pairs(ranges: RangeSet) -> bytes:
    # early_init_dt_scan_memory, drivers/of/fdt.c: an empty property would read as "all of it", a pair of size 0 as "none"
    return b"".join(r.start.to_bytes(8, "big") + r.size.to_bytes(8, "big") for r in ranges) or bytes(16)


def _drconf(root: Node, usable: RangeSet) -> bytes:
    # early_init_drmem_lmb, arch/powerpc/kernel/prom.c: for each block that is assigned and not reserved (others consume
    # nothing) a 64-bit count and that many pairs
    out = bytearray()
    for run in dynamic_memory(root).runs:
        if not run.usable:
            continue
        if not usable.overlaps(run.range):
            out += bytes(8 * run.count)
            continue
        for start in range(run.range.start, run.range.end, run.block):
            pieces = RangeSet([Range.sized(start, run.block)]) & usable
            out += len(pieces).to_bytes(8, "big") + (_pairs(pieces) if pieces else b"")
    return bytes(out)
