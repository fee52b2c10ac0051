"""A partition of 64 TiB and 1,920 CPUs, made from the description of a small one that was captured from a running kernel."""

from dataclasses import replace
from pathlib import Path

from crashkernel.formats.fdt import Node
from crashkernel.machine import Cpu, Machine, Pages
from crashkernel.machine.description import machine_from_description
from crashkernel.machine.devicetree import machine_from_tree
from crashkernel.memory import Range
from support.machines import GIB, MIB, Block, cpu_node, drmem_node, memory_node, u64

CAPTURED = Path(__file__).parents[1] / "data/pseries-power9.json"
"""What `crashkernel describe` wrote in a twin: pseries, POWER9, radix, 2 CPUs, 2 GiB, Debian's 6.1 with 64 KiB pages."""

MEMORY = 1 << 46
BLOCK = 256 * MIB
CORES, THREADS = 240, 8
RMA = GIB
REGION = Range.sized(256 * MIB, 4 * GIB)


def captured() -> Machine:
    return machine_from_description(CAPTURED.read_text(), CAPTURED.name)


def big_tree(version: int = 2) -> Node:
    """The captured tree with the memory and the CPUs of the big machine; dynamic memory in that version of the property.

    All memory but the RMA is in blocks, and each 4096th of them has been taken away.
    """
    run = 4096
    blocks = []
    for base in range(RMA, MEMORY, run * BLOCK):
        count = min(run, (MEMORY - base) // BLOCK)
        blocks += [Block(base, count - 1), Block(base + (count - 1) * BLOCK, 1, 0)]
    new = {
        "cpus": Node("cpus", {}, tuple(cpu_node(THREADS * core, threads=THREADS) for core in range(CORES))),
        "memory@0": memory_node(0, RMA),
    }
    root = captured().device_tree
    chosen = root.child("chosen")
    assert chosen is not None
    chosen = chosen.with_property("linux,crashkernel-base", u64(REGION.start))
    new["chosen"] = chosen.with_property("linux,crashkernel-size", u64(REGION.size))
    children = [new.get(node.name, node) for node in root.children]
    return root.with_children([*children, drmem_node(BLOCK, blocks, version)])


def big_machine(page_runs: int = 2048) -> Machine:
    """The machine as a live reader would complete it; each of its lowest pages has another use than its neighbours."""
    small = captured()
    uses = ("free", "slab", "cache")
    return replace(
        machine_from_tree(big_tree()),
        **{name: getattr(small, name) for name in ("release", "cmdline", "mmu", "byteorder", "vmcoreinfo", "head", "layout")},
        page_size=0x10000,
        cpus=tuple(Cpu(number, Range.sized(0x3FFE0000000 + number * 0xA0000, 0x218)) for number in range(CORES * THREADS)),
        kernel_end=small.kernel_end,
        pages=tuple(Pages(Range.sized(n * 0x10000, 0x10000), uses[n % 3]) for n in range(page_runs)),
    )
