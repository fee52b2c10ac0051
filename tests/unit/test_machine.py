"""What a machine is read from: device trees written here, captured from QEMU, and the files of a live host."""

import contextlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.errors import CrashkernelError, EnvironmentFault, FormatError
from crashkernel.formats.fdt import DeviceTree, Node
from crashkernel.machine import Cpu, Pages, Region, Services
from crashkernel.machine.devicetree import dynamic_memory, machine_from_tree, memory_nodes, memory_ranges
from crashkernel.machine.drmem import DynamicMemory, LmbRun
from crashkernel.machine.kernelfile import kernel_files, running_layout
from crashkernel.machine.live import read_machine, read_tree
from crashkernel.machine.pages import read_pages
from crashkernel.memory import Range, RangeSet
from support.elfwriter import Part, write_elf
from support.machines import (
    GIB,
    HEAD,
    KERNEL_BASE,
    MIB,
    RTAS_TOKENS,
    VTY,
    Block,
    cpu_node,
    drmem_node,
    memory_node,
    rtas_node,
    tree,
    u32,
    u64,
    vmlinux,
    vty_node,
    with_sections,
)

QEMU = "qemu-system-ppc64"


def bare(*children: Node) -> Node:
    """A partition's tree of these nodes and no others."""
    return Node("", {"#address-cells": u32(2), "#size-cells": u32(2)}, (*children, rtas_node()))


class TestMemory:
    def test_memory_nodes_of_all_names_and_entries_become_one_set(self):
        nodes = [memory_node(0, GIB), memory_node(GIB, 512 * MIB, 512 * MIB), memory_node(16 * GIB, GIB)]
        found = machine_from_tree(tree(memory=nodes))
        assert found.memory == RangeSet([Range(0, 2 * GIB), Range(16 * GIB, 17 * GIB)])

    def test_a_node_counts_by_its_type_not_by_its_name(self):
        odd = Node("ram@0", {"device_type": b"memory\0", "reg": u64(0, GIB)})
        false = Node("memory@40000000", {"reg": u64(GIB, GIB)})
        root = tree(memory=[odd, false])
        assert machine_from_tree(root).memory == RangeSet([Range(0, GIB)])
        assert memory_nodes(root) == (odd,)

    def test_empty_entries_of_reg_are_no_memory(self):
        node = Node("memory@0", {"device_type": b"memory\0", "reg": u64(0, GIB, 4 * GIB, 0)})
        assert machine_from_tree(tree(memory=[node])).memory == RangeSet([Range(0, GIB)])

    def test_one_cell_addresses(self):
        node = Node("memory@0", {"device_type": b"memory\0", "reg": u32(0, GIB)})
        root = tree(memory=[node], properties={"#address-cells": u32(1), "#size-cells": u32(1)})
        assert machine_from_tree(root).memory == RangeSet([Range(0, GIB)])

    @pytest.mark.parametrize("reg", [b"", u64(0), u32(1), u64(0, 0)])
    def test_no_memory_is_refused(self, reg):
        node = Node("memory@0", {"device_type": b"memory\0", "reg": reg})
        with pytest.raises(FormatError, match="no /memory node") as caught:
            machine_from_tree(tree(memory=[node]), source="x.dtb")
        assert caught.value.source == "x.dtb"
        assert caught.value.hint

    @pytest.mark.parametrize(("name", "value"), [("#size-cells", 3), ("#size-cells", 0), ("#address-cells", 0)])
    def test_impossible_cells_are_refused(self, name, value):
        with pytest.raises(FormatError, match=f"{name} {value}"):
            machine_from_tree(tree(properties={name: u32(value)}))

    def test_without_cells_addresses_have_two_and_sizes_one(self):
        """Devicetree specification 2.3.5."""
        node = Node("memory@0", {"device_type": b"memory\0", "reg": u64(4 * GIB) + u32(GIB)})
        assert memory_ranges(node, Node("")) == (Range.sized(4 * GIB, GIB),)

    @pytest.mark.parametrize(
        "settings",
        [
            {"memory": [memory_node((1 << 64) - GIB, GIB)]},
            {"memory": [memory_node((1 << 64) - GIB, 2 * GIB)]},
            {"extra": [drmem_node(GIB, [Block((1 << 64) - GIB)], 1)]},
            {"extra": [drmem_node(GIB, [Block((1 << 64) - 3 * GIB, 3)], 2)]},
            {"extra": [drmem_node(GIB, [Block(GIB)], 1).with_property("ibm,lmb-size", u64(1, 0))]},
            {"properties": {"reserved-ranges": u64((1 << 64) - 1, 0x1000)}},
        ],
    )
    def test_addresses_beyond_64_bits_are_refused(self, settings):
        with pytest.raises(FormatError, match="beyond 64 bits"):
            machine_from_tree(tree(**settings))

    @pytest.mark.parametrize(
        "names", [("linux,crashkernel-base", "linux,crashkernel-size"), ("linux,initrd-start", "linux,initrd-end")]
    )
    def test_a_stretch_in_chosen_beyond_64_bits_is_refused(self, names):
        chosen = Node("chosen", {names[0]: u64(0x10000), names[1]: u64(1, 0)})
        with pytest.raises(FormatError, match="beyond 64 bits"):
            machine_from_tree(bare(memory_node(0, GIB), chosen))


class TestPlatform:
    def test_neither_opal_nor_a_hypervisor(self):
        rtas = Range.sized(0x2FFF0000, 0x10000)
        for root in (tree(platform="chrp"), tree(platform="chrp", rtas=rtas), Node("", {}, (memory_node(0, GIB),))):
            with pytest.raises(FormatError, match="not a PowerNV or PAPR machine") as caught:
                machine_from_tree(root, source="x.dtb")
            assert caught.value.source == "x.dtb"

    def test_opal_makes_bare_metal_whatever_else_is_there(self):
        assert machine_from_tree(tree(platform="powernv", extra=[rtas_node()])).platform == "powernv"


def single_blocks(found: DynamicMemory) -> list[tuple[Range, int]]:
    """Each block and its flags, in the order of the property."""
    starts = [(start, run) for run in found.runs for start in range(run.range.start, run.range.end, run.block)]
    return [(Range.sized(start, run.block), run.flags) for start, run in starts]


class TestDynamicMemory:
    LMB = 256 * MIB

    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize(
        ("flags", "usable"),
        [(0x8, True), (0x0, False), (0x80, False), (0x88, False), (0x108, True), (0x48, True)],
        ids=["assigned", "unassigned", "reserved", "assigned-and-reserved", "hotremovable", "invalid-affinity"],
    )
    def test_flags(self, version, flags, usable):
        root = tree(extra=[drmem_node(self.LMB, [Block(4 * GIB, 1, flags)], version)])
        assert dynamic_memory(root).runs == (LmbRun(Range.sized(4 * GIB, self.LMB), self.LMB, flags & 0x188),)
        assert dynamic_memory(root).usable_blocks == usable
        assert machine_from_tree(root).memory.covers(Range.sized(4 * GIB, self.LMB)) is usable

    @given(
        st.lists(
            st.builds(Block, st.integers(0, 64).map(lambda n: n * GIB), st.integers(0, 3), st.integers(0, (1 << 32) - 1)),
            max_size=20,
        )
    )
    def test_both_versions_say_the_same(self, blocks):
        first, second = (dynamic_memory(tree(extra=[drmem_node(self.LMB, blocks, version)])) for version in (1, 2))
        expected = [(Range.sized(b.base + i * self.LMB, self.LMB), b.flags & 0x188) for b in blocks for i in range(b.count)]
        usable = [where for where, kept in expected if kept & 0x88 == 0x8]
        for found in (first, second):
            assert single_blocks(found) == expected
            assert found.usable_blocks == len(usable)
            assert found.usable == RangeSet(usable)
            assert all(run.count for run in found.runs)

    def test_version_1_is_read_in_runs_however_its_blocks_lie(self):
        """Neighbours of one kind are one run; a hole, a step back or another kind begins the next."""
        blocks = [Block(4 * GIB, 3), Block(8 * GIB, 2), Block(8 * GIB + 2 * self.LMB, 1, 0x80), Block(GIB, 1, 0x80)]
        blocks += [Block(GIB + self.LMB, 2, 0x108), Block(GIB + 3 * self.LMB, 1, 0x8)]
        found = dynamic_memory(tree(extra=[drmem_node(self.LMB, blocks, 1)]))
        assert found.runs == (
            LmbRun(Range.sized(4 * GIB, 3 * self.LMB), self.LMB, 0x8),
            LmbRun(Range.sized(8 * GIB, 2 * self.LMB), self.LMB, 0x8),
            LmbRun(Range.sized(8 * GIB + 2 * self.LMB, self.LMB), self.LMB, 0x80),
            LmbRun(Range.sized(GIB, self.LMB), self.LMB, 0x80),
            LmbRun(Range.sized(GIB + self.LMB, 2 * self.LMB), self.LMB, 0x108),
            LmbRun(Range.sized(GIB + 3 * self.LMB, self.LMB), self.LMB, 0x8),
        )

    @pytest.mark.parametrize("version", [1, 2])
    def test_64_tib_are_a_few_objects(self, version):
        node = drmem_node(
            self.LMB, [Block(GIB, 100_000), Block(GIB + 100_000 * self.LMB, 1, 0), Block(1 << 45, 131_072, 0x108)], version
        )
        found, peak = traced(lambda: DynamicMemory.of(node))
        assert [run.count for run in found.runs] == [100_000, 1, 131_072]
        assert found.usable_blocks == 231_072
        assert peak < 24 * 231_073 * 4, "a few copies of the property, no object for each block"

    @pytest.mark.parametrize("version", [1, 2])
    def test_reduced_it_says_the_same_of_the_blocks_and_nothing_else(self, version):
        blocks = [Block(4 * GIB, 3), Block(8 * GIB, 2, 0x108), Block(9 * GIB, 1, 0x80), Block(10 * GIB, 1, 0)]
        node = drmem_node(self.LMB, blocks, version).with_property("ibm,associativity-lookup-arrays", u32(1, 1, 5))
        reduced = DynamicMemory.of(node).reduced(node)
        assert single_blocks(DynamicMemory.of(reduced)) == single_blocks(DynamicMemory.of(node))
        assert [run.flags for run in DynamicMemory.of(reduced).runs] == [0x8, 0x108, 0x80, 0]
        assert set(reduced.properties) == {"ibm,lmb-size", "ibm,dynamic-memory-v2"}
        assert DynamicMemory.of(reduced).reduced(reduced) == reduced

    def test_version_1_rules_when_both_are_there(self):
        node = drmem_node(self.LMB, [Block(4 * GIB)], 1)
        both = node.with_property("ibm,dynamic-memory-v2", u32(0))
        assert dynamic_memory(tree(extra=[both])).usable_blocks == 1

    def test_without_blocks_or_block_size_there_is_none(self):
        assert not dynamic_memory(tree()).runs
        node = drmem_node(self.LMB, [Block(4 * GIB)], 1)
        assert not dynamic_memory(tree(extra=[node.without("ibm,lmb-size")])).runs
        assert not dynamic_memory(tree(extra=[node.with_property("ibm,lmb-size", u64(0))])).runs
        assert not dynamic_memory(tree(extra=[node.without("ibm,dynamic-memory")])).runs

    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("cut", [1, 4, 24, 26, 27, 28])
    def test_a_property_shorter_than_its_count_is_refused(self, version, cut):
        node = drmem_node(self.LMB, [Block(4 * GIB)], version)
        name = "ibm,dynamic-memory" if version == 1 else "ibm,dynamic-memory-v2"
        short = node.with_property(name, node.properties[name][:-cut])
        with pytest.raises(FormatError, match=name):
            machine_from_tree(tree(extra=[short]))

    @pytest.mark.parametrize("version", [1, 2])
    def test_a_wrong_count_is_refused_at_once(self, version):
        node = drmem_node(self.LMB, [Block(4 * GIB)], version)
        name = "ibm,dynamic-memory" if version == 1 else "ibm,dynamic-memory-v2"
        lying = node.with_property(name, u32(0xFFFFFFFF) + node.properties[name][4:])
        with pytest.raises(FormatError, match="4294967295 entries"):
            machine_from_tree(tree(extra=[lying]))

    def test_a_run_of_billions_is_refused_at_once(self):
        with pytest.raises(FormatError, match="claims 4294967295 memory blocks"):
            dynamic_memory(tree(extra=[drmem_node(self.LMB, [Block(4 * GIB, 0xFFFFFFFF)], 2)]))


class TestFirmware:
    def test_rtas(self):
        assert machine_from_tree(tree(rtas=Range.sized(0x2FFF0000, 0x10000))).firmware == (
            Region("RTAS", Range.sized(0x2FFF0000, 0x10000)),
        )

    def test_rtas_that_was_not_instantiated_is_nowhere(self):
        rtas = rtas_node()
        for name in ("rtas-size", "linux,rtas-base"):
            root = tree(extra=[rtas.with_property(name, u32(0x10000))])
            assert root.child("rtas").properties[name]
            assert machine_from_tree(root).firmware == ()

    def test_opal_and_the_platform(self):
        root = tree(platform="powernv", opal=Range.sized(0x30000000, 0x2200000))
        found = machine_from_tree(root)
        assert found.platform == "powernv"
        assert found.firmware == (Region("OPAL", Range.sized(0x30000000, 0x2200000)),)
        assert machine_from_tree(tree()).platform == "pseries"

    def test_opal_without_an_address_is_no_region(self):
        assert machine_from_tree(tree(platform="powernv")).firmware == ()

    def test_tce_tables_anywhere_in_the_tree(self):
        bridge = Node("pci@1", {"linux,tce-base": u64(0x7F000000), "linux,tce-size": u32(0x400000)})
        empty = Node("pci@2", {"linux,tce-base": u64(0x7F000000), "linux,tce-size": u32(0)})
        found = machine_from_tree(tree(extra=[Node("axon", {}, (bridge, empty))]))
        assert found.firmware == (Region("TCE /axon/pci@1", Range.sized(0x7F000000, 0x400000)),)

    def reserved_memory(self) -> Node:
        cells = {"#address-cells": u32(2), "#size-cells": u32(2), "ranges": b""}
        return Node(
            "reserved-memory",
            cells,
            (
                Node("ibm,hbrt-code@39c00000", {"reg": u64(0x39C00000, 0x100000)}),
                Node("two", {"reg": u64(0x3A000000, 0x10000, 0x3B000000, 0x10000)}),
                Node("on-demand", {"size": u64(0x100000)}),
            ),
        )

    def test_reserved_memory_rules_over_reserved_ranges(self):
        expected = (
            Region("ibm,hbrt-code", Range.sized(0x39C00000, 0x100000)),
            Region("two", Range.sized(0x3A000000, 0x10000)),
            Region("two", Range.sized(0x3B000000, 0x10000)),
        )
        both = tree(extra=[self.reserved_memory()], properties={"reserved-ranges": u64(0x1000, 0x1000)})
        assert machine_from_tree(both).firmware == expected

    def test_reserved_ranges_alone(self):
        found = machine_from_tree(tree(properties={"reserved-ranges": u64(0x30000000, 0x10000, 0, 0, 0x31000000, 0x20000)}))
        assert found.firmware == (
            Region("reserved", Range.sized(0x30000000, 0x10000)),
            Region("reserved", Range.sized(0x31000000, 0x20000)),
        )


class TestChosen:
    def test_region_initrd_and_command_line(self):
        found = machine_from_tree(
            tree(region=Range.sized(0x20000000, 512 * MIB), initrd=Range(0x3000000, 0x3123456), bootargs="quiet splash")
        )
        assert found.reserved == Range.sized(0x20000000, 512 * MIB)
        assert found.initrd == Range(0x3000000, 0x3123456)
        assert found.cmdline == "quiet splash"

    def test_numbers_of_one_or_two_cells(self):
        chosen = {"linux,initrd-start": u32(0x3000000), "linux,initrd-end": u64(0x3100000)}
        root = bare(memory_node(0, GIB), Node("chosen", chosen))
        assert machine_from_tree(root).initrd == Range(0x3000000, 0x3100000)

    @pytest.mark.parametrize("size", [None, 0])
    def test_no_region(self, size):
        chosen = {"linux,crashkernel-base": u64(0x20000000)}
        if size is not None:
            chosen["linux,crashkernel-size"] = u64(size)
        assert machine_from_tree(bare(memory_node(0, GIB), Node("chosen", chosen))).reserved is None

    @pytest.mark.parametrize("base", [0, 0x800, 0x8000])
    def test_a_region_where_k1_itself_lies(self, base):
        with pytest.raises(FormatError, match=f"the reserved region at {base:#x} leaves K1 no page at 0"):
            machine_from_tree(tree(region=Range.sized(base, 512 * MIB)))

    def test_an_initrd_that_ends_before_it_starts_is_none(self):
        chosen = {"linux,initrd-start": u64(5), "linux,initrd-end": u64(5)}
        assert machine_from_tree(bare(memory_node(0, GIB), Node("chosen", chosen))).initrd is None

    def test_where_k1_ends_and_how_large_the_tree_is(self):
        root = tree()
        assert machine_from_tree(root).kernel_end == 0
        assert machine_from_tree(root).tree_size == len(DeviceTree(root).to_bytes())
        chosen = root.child("chosen").with_property("linux,kernel-end", u64(0x2880000))
        root = root.with_children([chosen if node.name == "chosen" else node for node in root.children])
        assert machine_from_tree(root).kernel_end == 0x2880000

    def test_a_tree_with_nothing_but_memory(self):
        found = machine_from_tree(bare(memory_node(0, GIB)))
        assert (found.reserved, found.initrd, found.cmdline, found.cpus, found.model) == (None, None, "", (), "")
        assert found.mmu == "hash"
        assert found.timebase_hz == 512_000_000


class TestProcessors:
    def test_the_rma_of_a_partition_is_the_first_entry_of_its_first_node(self):
        nodes = [memory_node(4 * GIB, GIB), memory_node(0, 256 * MIB, 768 * MIB)]
        assert machine_from_tree(tree(memory=nodes)).real_mode == Range(0, 256 * MIB)

    def test_bare_metal_reaches_everything(self):
        nodes = [memory_node(0, GIB), memory_node(16 * GIB, GIB)]
        assert machine_from_tree(tree(memory=nodes, platform="powernv")).real_mode == Range(0, 17 * GIB)

    def test_threads_count_as_cpus(self):
        cpus = Node("cpus", {}, (cpu_node(0, threads=4), cpu_node(8, threads=4), Node("l2-cache@2000", {})))
        assert machine_from_tree(bare(memory_node(0, GIB), cpus)).cpus == tuple(Cpu(number) for number in range(8))

    def test_a_cpu_without_server_numbers_is_one_thread(self):
        cpus = Node("cpus", {}, (cpu_node(0, servers=False), cpu_node(8, servers=False)))
        assert len(machine_from_tree(bare(memory_node(0, GIB), cpus)).cpus) == 2

    @pytest.mark.parametrize(("radix", "mmu"), [(True, "radix"), (False, "hash")])
    def test_what_the_cpu_can_do(self, radix, mmu):
        assert machine_from_tree(tree(radix=radix)).mmu == mmu

    def test_the_timebase(self):
        cpus = Node("cpus", {}, (cpu_node(0, timebase=None), cpu_node(1, timebase=14_318_000)))
        assert machine_from_tree(bare(memory_node(0, GIB), cpus)).timebase_hz == 14_318_000

    def test_a_timebase_that_no_clock_has_is_not_believed(self):
        cpus = Node("cpus", {}, (cpu_node(0).with_property("timebase-frequency", b"\xff" * 8),))
        assert machine_from_tree(bare(memory_node(0, GIB), cpus)).timebase_hz == 512_000_000

    @pytest.mark.parametrize(
        ("vectors", "altivec"),
        [
            ([{"ibm,vmx": 2}, {"ibm,vmx": 1}], True),
            ([{"altivec": 1}, {"ibm,vmx": 1}], True),
            ([{"altivec": 0, "ibm,vmx": 0}, {"ibm,vmx": 2}], False),
            ([{"ibm,vmx": 2}, {}], False),
            ([{}, {}], False),
            ([{"ibm,dfp": 1}], False),
            ([], False),
        ],
    )
    def test_altivec_is_every_cpu_s_or_nobody_s(self, vectors, altivec):
        cpus = Node("cpus", {}, tuple(cpu_node(8 * n, vectors=each) for n, each in enumerate(vectors)))
        assert machine_from_tree(bare(memory_node(0, GIB), cpus)).altivec is altivec

    def test_a_cache_has_no_altivec_and_takes_none_away(self):
        cpus = Node("cpus", {}, (cpu_node(0), Node("l2-cache@2000", {"device_type": b"cache\0"})))
        assert machine_from_tree(bare(memory_node(0, GIB), cpus)).altivec is True
        assert machine_from_tree(bare(memory_node(0, GIB))).altivec is False


class TestServices:
    """What the purgatory may ask of the firmware."""

    RTAS = Range.sized(0x2FFF0000, 0x10000)

    def partition(self, *vtys: Node, chosen: dict[str, bytes] | None = None, rtas: Node | None = None) -> Services:
        children = [memory_node(0, GIB), Node("vdevice", {}, vtys), rtas or rtas_node()]
        if chosen is not None:
            children.append(Node("chosen", chosen))
        return machine_from_tree(Node("", {"#address-cells": u32(2), "#size-cells": u32(2)}, tuple(children))).services

    def test_a_partition(self):
        assert machine_from_tree(tree(rtas=self.RTAS)).services == Services(
            "papr",
            VTY,
            opal=(0, 0),
            rtas=(self.RTAS.start, self.RTAS.start + 0x40),
            rtas_reboot=RTAS_TOKENS["system-reboot"],
            rtas_nmi=RTAS_TOKENS["ibm,nmi-register"],
        )

    @pytest.mark.parametrize("name", RTAS_TOKENS)
    def test_a_token_that_is_not_there(self, name):
        found = self.partition(rtas=rtas_node(self.RTAS).without(name))
        tokens = {"system-reboot": found.rtas_reboot, "ibm,nmi-register": found.rtas_nmi}
        assert tokens == RTAS_TOKENS | {name: 0}
        assert found.rtas == (self.RTAS.start, self.RTAS.start + 0x40)

    def test_rtas_that_was_not_instantiated_has_no_entry(self):
        """As firmware leaves it: tokens, and nobody to give them to."""
        tokens = rtas_node(self.RTAS).without("linux,rtas-base", "linux,rtas-entry")
        assert self.partition(vty_node(), rtas=tokens) == Services("papr", VTY)

    @pytest.mark.parametrize("name", ["stdout-path", "linux,stdout-path"])
    @pytest.mark.parametrize("named", [0x30000000, 0x30000001, 0x30000002])
    def test_the_terminal_that_chosen_names(self, name, named):
        vtys = [vty_node(address) for address in (0x30000001, 0x30000000, 0x30000002)]
        chosen = {name: f"/vdevice/vty@{named:x}\0".encode()}
        assert self.partition(*vtys, chosen=chosen).console == named

    @pytest.mark.parametrize("chosen", [None, {}, {"stdout-path": b""}, {"stdout-path": b"/pci/serial\0"}])
    def test_without_a_name_it_is_the_first(self, chosen):
        assert self.partition(vty_node(0x30000001), vty_node(0x30000000), chosen=chosen).console == 0x30000000

    def test_a_terminal_that_wants_packets_is_none(self):
        packets = vty_node(0x30000000, b"hvterm-protocol\0")
        chosen = {"stdout-path": b"/vdevice/vty@30000000\0"}
        assert self.partition(packets, chosen=chosen).console is None
        assert self.partition(packets, vty_node(0x30000001), chosen=chosen).console == 0x30000001

    def test_one_that_is_compatible_among_others(self):
        assert self.partition(vty_node(0x30000000, b"qemu,vty\0hvterm1\0")).console == 0x30000000
        assert self.partition(vty_node(0x30000000, b"hvterm10\0xhvterm1\0")).console is None

    def test_a_terminal_at_zero_is_one(self):
        assert self.partition(vty_node(0)).console == 0
        assert self.partition().console is None

    def test_what_stands_behind_a_colon_is_no_part_of_the_path(self):
        """Devicetree Specification 3.6: options."""
        for name in ("stdout-path", "linux,stdout-path"):
            chosen = {name: b"/vdevice/vty@30000001:115200n8\0"}
            assert self.partition(vty_node(0x30000000), vty_node(0x30000001), chosen=chosen).console == 0x30000001

    @pytest.mark.parametrize("reg", [None, b"", bytes(9), u32(0, 0, 0x30000000), u64(0, 0x30000000)], ids=repr)
    def test_a_terminal_whose_address_is_none(self, reg):
        """Not what H_PUT_TERM_CHAR takes, and no reason to refuse the machine, named or not."""
        node = vty_node(0x30000000)
        odd = node.without("reg") if reg is None else node.with_property("reg", reg)
        for chosen in (None, {"stdout-path": b"/vdevice/vty@30000000\0"}):
            assert self.partition(odd, chosen=chosen).console is None
            assert self.partition(odd, vty_node(0x30000001), chosen=chosen).console == 0x30000001

    @pytest.mark.parametrize(("reg", "console"), [(b"\7", 7), (u32(0x30000000), 0x30000000), (b"\xff" * 8, (1 << 64) - 1)])
    def test_an_address_of_one_byte_to_eight(self, reg, console):
        assert self.partition(vty_node().with_property("reg", reg)).console == console

    def serial(self, reg: bytes, compatible: bytes = b"ibm,opal-console-raw\0") -> Node:
        return Node("serial", {"reg": reg, "compatible": compatible})

    def opal(self, *consoles: Node, entry: bool = True, named: bool | None = None) -> Services:
        """`named` says whether there is a node for consoles, which may have none in it."""
        properties = {"opal-base-address": u64(0x30000000), "opal-runtime-size": u64(0x2000000)}
        if entry:
            properties["opal-entry-address"] = u64(0x30000810)
        node = Node("ibm,opal", properties, (Node("consoles", {}, consoles),) if consoles or named else ())
        return machine_from_tree(tree(platform="none", rtas=self.RTAS, extra=[node])).services

    def test_bare_metal(self):
        """Its RTAS, if it has one, is not asked; a console that is not named has the number 0."""
        assert self.opal() == Services("opal", 0, opal=(0x30000000, 0x30000810))

    @pytest.mark.parametrize(("numbers", "console"), [([0], 0), ([1], 1), ([2, 1, 3], 1), ([0, 1], 0)])
    def test_the_consoles_of_bare_metal(self, numbers, console):
        assert self.opal(*(self.serial(u32(number)) for number in numbers)).console == console

    def test_a_console_that_wants_packets_is_none(self):
        packets = self.serial(u32(0), b"ibm,opal-console-hvsi\0")
        assert self.opal(packets).console is None
        assert self.opal(packets, self.serial(u32(1))).console == 1
        assert self.opal(self.serial(u32(2)), packets).console == 2
        assert self.opal(self.serial(u32(3), b"x\0ibm,opal-console-raw\0")).console == 3

    def test_a_node_for_consoles_without_a_raw_one(self):
        assert self.opal(named=True).console is None
        for compatible in (b"", b"ibm,opal-console-raw2\0", b"xibm,opal-console-raw\0"):
            assert self.opal(self.serial(u32(0), compatible)).console is None
        assert self.opal(Node("serial@0", {"reg": u32(0)})).console is None

    def test_bare_metal_whose_opal_has_no_entry(self):
        assert self.opal(self.serial(u32(0)), entry=False) == Services()

    @pytest.mark.parametrize("name", ["linux,rtas-entry", *RTAS_TOKENS])
    def test_numbers_that_the_purgatory_has_no_room_for(self, name):
        with pytest.raises(FormatError, match=f"rtas: {name} reaches beyond 64 bits"):
            self.partition(rtas=rtas_node(self.RTAS).with_property(name, u64(1, 0)))

    def test_a_console_that_the_purgatory_has_no_room_for(self):
        with pytest.raises(FormatError, match="serial: reg reaches beyond 64 bits"):
            self.opal(self.serial(u64(1, 0)))


class TestHostile:
    @given(st.data())
    def test_a_tree_of_noise_is_read_or_refused(self, data):
        names = ["reg", "device_type", "#address-cells", "#size-cells", "linux,crashkernel-base", "linux,crashkernel-size"]
        names += ["linux,rtas-base", "rtas-size", "opal-base-address", "opal-runtime-size", "reserved-ranges", "bootargs"]
        names += [
            "ibm,hypertas-functions",
            "ibm,lmb-size",
            "ibm,dynamic-memory-v2",
            "linux,tce-base",
            "linux,tce-size",
            "linux,initrd-start",
        ]
        names += ["linux,rtas-entry", "system-reboot", "opal-entry-address", "compatible", "stdout-path", "ibm,vmx"]
        values = st.binary(max_size=20) | st.sampled_from(
            (b"memory\0", b"cpu\0", b"hvterm1\0", u32(2), u32(0xFFFFFFFF), u64(0, GIB))
        )
        properties = st.dictionaries(st.sampled_from(names), values, max_size=6)
        kinds = [
            "memory@0",
            "cpus",
            "chosen",
            "rtas",
            "ibm,opal",
            "reserved-memory",
            "ibm,dynamic-reconfiguration-memory",
            "consoles",
        ]
        leaf = st.builds(Node, st.sampled_from(kinds), properties)
        nodes = st.builds(Node, st.sampled_from(kinds), properties, st.lists(leaf, max_size=2).map(tuple))
        root = data.draw(st.builds(Node, st.just(""), properties, st.lists(nodes, max_size=5).map(tuple)))
        with contextlib.suppress(FormatError):
            found = machine_from_tree(root).services
            numbers = (found.console or 0, *found.opal, *found.rtas, found.rtas_reboot, found.rtas_nmi)
            assert max(numbers) < 1 << 64


def traced(make):
    """What `make` makes, and the bytes allocated at the worst moment."""
    tracemalloc.start()
    try:
        return make(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def dump_tree(tmp_path, *arguments: str) -> Node:
    """The tree QEMU's own firmware interface hands to a guest."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    blob = tmp_path / "machine.dtb"
    machine, *rest = arguments
    command = [QEMU, "-M", f"{machine},dumpdtb={blob}", "-display", "none", "-nodefaults", *rest]
    subprocess.run(command, check=False, capture_output=True, timeout=60)
    return DeviceTree.from_bytes(blob.read_bytes(), str(blob)).root


class TestCaptured:
    """What QEMU's machines say of themselves, before any firmware or kernel added to it."""

    @pytest.mark.parametrize(
        ("cpu", "mmu", "platform_memory"),
        [("POWER8", "hash", 1 << 30), ("POWER9", "radix", 2 << 30), ("POWER10", "radix", 1 << 30)],
    )
    def test_pseries(self, tmp_path, cpu, mmu, platform_memory):
        found = machine_from_tree(dump_tree(tmp_path, "pseries", "-cpu", cpu, "-smp", "2", "-m", str(platform_memory >> 20)))
        assert (found.platform, found.mmu, len(found.cpus)) == ("pseries", mmu, 2)
        assert found.device_tree.child("rtas").properties["ibm,hypertas-functions"]
        assert found.memory == RangeSet([Range(0, platform_memory)])
        assert found.real_mode.start == 0
        assert found.real_mode.size <= platform_memory
        assert found.timebase_hz == 512_000_000
        assert found.reserved is None
        assert found.altivec is True
        assert found.services == Services("papr"), "no terminal was asked for; RTAS is for K1's boot code to place"
        assert "QEMU" in found.model or "pSeries" in found.model

    def test_the_rma_of_a_machine_with_numa_nodes(self, tmp_path):
        arguments = ["-cpu", "POWER9", "-smp", "2", "-m", "2048"]
        arguments += ["-object", "memory-backend-ram,id=a,size=1G", "-object", "memory-backend-ram,id=b,size=1G"]
        arguments += ["-numa", "node,memdev=a", "-numa", "node,memdev=b"]
        found = machine_from_tree(dump_tree(tmp_path, "pseries", *arguments))
        assert found.memory == RangeSet([Range(0, 2 * GIB)])
        assert found.real_mode == Range(0, GIB)

    @pytest.mark.parametrize("addresses", [(0x30000000,), (0x30005000, 0x30002000, 0x30003000)])
    def test_the_terminals_of_a_partition(self, tmp_path, addresses):
        """QEMU names its lowest one in /chosen, in both spellings."""
        arguments = []
        for address in addresses:
            arguments += ["-chardev", f"null,id=c{address}", "-device", f"spapr-vty,chardev=c{address},reg={address}"]
        root = dump_tree(tmp_path, "pseries", "-cpu", "POWER9", *arguments)
        assert machine_from_tree(root).services == Services("papr", min(addresses))
        names = {"stdout-path", "linux,stdout-path"} & set(root.child("chosen").properties)
        assert names
        other = root.child("chosen").without(*names).with_property("stdout-path", f"/vdevice/vty@{addresses[0]:x}\0".encode())
        named = root.with_children([other if node.name == "chosen" else node for node in root.children])
        assert machine_from_tree(named).services.console == addresses[0]

    @pytest.mark.parametrize(("machine", "memory"), [("powernv8", 1 << 30), ("powernv9", 2 << 30), ("powernv10", 2 << 30)])
    def test_powernv(self, tmp_path, machine, memory):
        root = dump_tree(tmp_path, machine, "-smp", "2", "-m", str(memory >> 20))
        # skiboot adds ibm,opal; until then the tree looks like any other
        booted = root.with_children([*root.children, Node("ibm,opal", {"opal-base-address": u64(0x30000000)})])
        found = machine_from_tree(booted)
        assert found.platform == "powernv"
        assert found.memory == RangeSet([Range(0, memory)])
        assert found.real_mode == Range(0, memory)
        assert len(found.cpus) == 2


class Host:
    """A root directory with the files of a live K1."""

    def __init__(self, root) -> None:
        self.root = root
        self.region = Range.sized(0x20000000, 512 * MIB)
        self.write_tree(tree(region=self.region, cpus=2), root / "proc/device-tree")
        self.write("proc/cmdline", "root=/dev/sda1 crashkernel=512M\n")
        self.write("proc/cpuinfo", "processor\t: 0\ncpu\t\t: POWER9\n\ntimebase\t: 512000000\nMMU\t\t: Radix\n")
        self.write("proc/sys/kernel/osrelease", "6.1.0-49-powerpc64le\n")
        self.write("sys/kernel/vmcoreinfo", "0x000000000a310000 1024\n")
        self.write("sys/devices/system/cpu/online", "0-1\n")
        for number in range(2):
            self.write(f"sys/devices/system/cpu/cpu{number}/crash_notes", f"{0x7F000000 + 0x1000 * number:x}\n")
            self.write(f"sys/devices/system/cpu/cpu{number}/crash_notes_size", "920\n")
        self.write("sys/devices/system/cpu/cpufreq/note", "not a cpu")
        self.write_core()

    def write(self, name: str, content: str | bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def write_tree(self, node: Node, directory) -> None:
        directory.mkdir(parents=True)
        (directory / "name").write_bytes(node.name.split("@")[0].encode() + b"\0")
        for name, value in node.properties.items():
            (directory / name).write_bytes(value)
        for child in node.children:
            self.write_tree(child, directory / child.name)

    def write_core(self, base: int = KERNEL_BASE, size: int = 0x1000) -> None:
        other = Part(vaddr=0xC00A000000000000, data=bytes(64))
        memory = Part(vaddr=base, data=(HEAD * 16)[:size])
        self.write("proc/kcore", write_elf("little", [other, memory], kind=4))


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


class TestLive:
    def test_everything(self, host):
        found = read_machine(host.root)
        assert found.platform == "pseries"
        assert found.mmu == "radix"
        assert found.reserved == host.region
        assert found.memory == RangeSet([Range(0, 2 * GIB)])
        assert found.cpus == (Cpu(0, Range.sized(0x7F000000, 920)), Cpu(1, Range.sized(0x7F001000, 920)))
        assert found.vmcoreinfo == Range.sized(0xA310000, 0x1024)
        assert found.head == HEAD
        assert found.cmdline == "root=/dev/sda1 crashkernel=512M"
        assert found.byteorder == sys.byteorder
        assert found.page_size == os.sysconf("SC_PAGESIZE")
        assert found.release == "6.1.0-49-powerpc64le"
        assert found.altivec is True
        assert found.services == Services("papr", VTY)

    def test_the_tree_of_a_directory_is_the_tree(self, host):
        written = tree(region=host.region, cpus=2)
        read = read_tree(host.root / "proc/device-tree")
        assert {path for path, _ in read.walk()} == {path for path, _ in written.walk()}
        for path, node in written.walk():
            assert dict(read.find(path).properties) == dict(node.properties), path

    def test_pages_of_the_low_memory_alone(self, host):
        assert read_machine(host.root).pages == ()
        page = os.sysconf("SC_PAGESIZE")
        low = 128 * MIB // page
        host.write("proc/kpageflags", flags(f"reserved*{low // 2}", f"buddy*{low // 2}", "slab*4096"))
        half = 64 * MIB
        assert read_machine(host.root).pages == (Pages(Range(0, half), "kernel"), Pages(Range(half, 2 * half), "free"))
        host.write("proc/device-tree/chosen/linux,kernel-end", u64(256 * MIB))
        assert read_machine(host.root).pages[-1] == Pages(Range.sized(128 * MIB, 4096 * page), "slab"), "behind K1's image too"

    def test_a_link_to_the_tree_is_followed_and_links_in_it_are_not(self, host):
        proc = host.root / "proc"
        (proc / "device-tree").rename(host.root / "base")
        (proc / "device-tree").symlink_to(host.root / "base")
        (host.root / "base/loop").symlink_to(host.root / "base")
        assert read_machine(host.root).platform == "pseries"
        assert read_tree(proc / "device-tree").child("loop") is None

    def test_a_machine_of_another_kind(self, tmp_path):
        with pytest.raises(EnvironmentFault, match="not a POWER machine") as caught:
            read_machine(tmp_path)
        assert caught.value.hint

    @pytest.mark.parametrize(
        ("line", "mmu"), [("MMU\t\t: Hash\n", "hash"), ("MMU\t\t: Radix\n", "radix"), ("platform\t: pSeries\n", "radix")]
    )
    def test_the_mmu_in_use(self, host, line, mmu):
        host.write("proc/cpuinfo", "cpu\t\t: POWER9\n" + line)
        assert read_machine(host.root).mmu == mmu

    def test_cpus_in_numeric_order_and_which_are_online(self, host):
        for number in (10, 2):
            host.write(f"sys/devices/system/cpu/cpu{number}/crash_notes", "1000\n")
            host.write(f"sys/devices/system/cpu/cpu{number}/crash_notes_size", "400\n")
        host.write("sys/devices/system/cpu/online", "0,2-3\n")
        assert [(cpu.number, cpu.online) for cpu in read_machine(host.root).cpus] == [
            (0, True),
            (1, False),
            (2, True),
            (10, False),
        ]

    def test_a_kernel_that_keeps_no_notes(self, host):
        for number in range(2):
            (host.root / f"sys/devices/system/cpu/cpu{number}/crash_notes").unlink()
        (host.root / "sys/kernel/vmcoreinfo").unlink()
        found = read_machine(host.root)
        assert found.cpus == (Cpu(0), Cpu(1)), "they come to the purgatory all the same"
        assert found.vmcoreinfo is None

    def test_a_command_line_that_is_no_text(self, host):
        host.write("proc/cmdline", b"console=hvc0 name=caf\xe9\n")
        assert os.fsencode(read_machine(host.root).cmdline) == b"console=hvc0 name=caf\xe9"

    def test_garbage_in_vmcoreinfo(self, host):
        host.write("sys/kernel/vmcoreinfo", "what\n")
        assert read_machine(host.root).vmcoreinfo is None

    def test_no_kcore(self, host):
        (host.root / "proc/kcore").unlink()
        assert read_machine(host.root).head == b""

    def test_kcore_that_may_not_be_read(self, host, monkeypatch):
        # root may read every file, so the refusal is put where the kernel would give it
        kcore = host.root / "proc/kcore"
        real = type(kcore).open

        def refuse(path, *arguments, **keywords):
            if path == kcore:
                raise PermissionError(1, "Operation not permitted", str(path))
            return real(path, *arguments, **keywords)

        monkeypatch.setattr(type(kcore), "open", refuse)
        assert read_machine(host.root).head == b""

    @pytest.mark.parametrize(("base", "size"), [(KERNEL_BASE + 0x10000, 0x1000), (KERNEL_BASE, 0x80)])
    def test_kcore_without_the_first_bytes(self, host, base, size):
        host.write_core(base, size)
        assert read_machine(host.root).head == b""

    def test_the_head_in_the_middle_of_a_segment(self, host):
        part = Part(vaddr=KERNEL_BASE - 0x80, data=b"\xff" * 0x80 + HEAD)
        host.write("proc/kcore", write_elf("big", [part], kind=4))
        assert read_machine(host.root).head == HEAD

    @pytest.mark.parametrize("content", [b"", b"\x7fELF", bytes(4096)], ids=["masked-by-a-container", "cut", "zeros"])
    def test_kcore_that_is_no_core(self, host, content):
        host.write("proc/kcore", content)
        assert read_machine(host.root).head == b""

    def test_notes_that_only_root_may_read(self, host, monkeypatch):
        real = type(host.root).read_text

        def refuse(path, *arguments, **keywords):
            if path.name == "crash_notes":
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *arguments, **keywords)

        monkeypatch.setattr(type(host.root), "read_text", refuse)
        with pytest.raises(CrashkernelError, match="crash_notes"):
            read_machine(host.root)

    def test_a_tree_that_only_root_may_read(self, host, monkeypatch):
        real = os.scandir

        def refuse(path):
            if str(path).endswith("cpus"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(EnvironmentFault, match=r"cpus.*run as root"):
            read_machine(host.root)


class TestLayout:
    """Where the parts of K1's own image lie."""

    RELEASE = "6.1.0-49-powerpc64le"
    BANNER = f"Linux version {RELEASE} (builder@host) (gcc) #1 SMP\n"
    SECTIONS: ClassVar = {".rodata": 0x1000, ".init.text": 0x2000, ".data": 0x4000}
    EXPECTED = (
        Region("K1 text", Range(0, 0x1000)),
        Region("K1 read-only data", Range(0x1000, 0x2000)),
        Region("K1 freed init", Range(0x2000, 0x4000)),
        Region("K1 data", Range(0x4000, 0x9000)),
    )
    SYMBOLS: ClassVar = {"_stext": 0, "__start_rodata": 0x1000, "__init_begin": 0x2000, "__init_end": 0x4000, "_end": 0x9000}

    def file(self, **changes) -> bytes:
        return with_sections(vmlinux(**changes), {name: KERNEL_BASE + at for name, at in self.SECTIONS.items()})

    def write(self, root, *, kernel: bytes | None = None, at: str = f"boot/vmlinux-{RELEASE}", version: str = BANNER) -> None:
        files = {"proc/version": version.encode()} | ({at: kernel} if kernel is not None else {})
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)

    def symbols(self, root, **changes) -> None:
        lines = [f"{KERNEL_BASE + at:016x} D {name}" for name, at in (self.SYMBOLS | changes).items() if at is not None]
        (root / "proc").mkdir(exist_ok=True)
        other = ["c000000000001234 t init_end", "c008000000000000 t _end\t[module]"]
        (root / "proc/kallsyms").write_text("\n".join(["c000000000000000 T _text", *lines, *other]) + "\n")

    @pytest.mark.parametrize("kernel_end", [0, 0x9000, 0x10000])
    @pytest.mark.parametrize("at", [str(path) for path in kernel_files(Path(), RELEASE)] + ["boot/vmlinux"])
    def test_by_k1_s_own_file(self, tmp_path, at, kernel_end):
        self.write(tmp_path, kernel=self.file(), at=at)
        assert running_layout(tmp_path, self.RELEASE, kernel_end) == self.EXPECTED

    @pytest.mark.parametrize(
        "kernel",
        [
            None,
            b"",
            b"\x1f\x8b\x08" + bytes(64),
            b"\x7fELF",
            bytes(4096),
            vmlinux(),
            vmlinux(machine_number=62),
            vmlinux(vaddr=1 << 20),
        ],
        ids=["none", "empty", "compressed", "cut", "zeros", "no-sections", "another-machine", "linked-elsewhere"],
    )
    def test_a_file_that_says_nothing(self, tmp_path, kernel):
        self.write(tmp_path, kernel=kernel)
        assert running_layout(tmp_path, self.RELEASE, 0) == ()

    def test_another_build_of_the_same_release(self, tmp_path):
        self.write(tmp_path, kernel=self.file(), version=self.BANNER.replace("#1", "#2"))
        assert running_layout(tmp_path, self.RELEASE, 0) == ()
        (tmp_path / "proc/version").unlink()
        assert running_layout(tmp_path, self.RELEASE, 0) == (), "nobody says that it is K1's"

    @pytest.mark.parametrize("kernel_end", [0x2009000, 0x20000])
    def test_a_k1_that_ends_elsewhere_does_not_lie_at_zero(self, tmp_path, kernel_end):
        self.write(tmp_path, kernel=self.file())
        assert running_layout(tmp_path, self.RELEASE, kernel_end) == ()

    def test_by_its_symbols(self, tmp_path):
        self.symbols(tmp_path)
        assert running_layout(tmp_path, self.RELEASE, 0) == self.EXPECTED
        assert running_layout(tmp_path, self.RELEASE, 0x9000) == self.EXPECTED
        assert running_layout(tmp_path, self.RELEASE, 0xA000) == ()

    @pytest.mark.parametrize("name", list(SYMBOLS))
    def test_symbols_that_are_not_there_or_hidden(self, tmp_path, name):
        """Without CONFIG_KALLSYMS_ALL the data's are missing; kptr_restrict makes all of them zero."""
        self.symbols(tmp_path, **{name: None})
        assert running_layout(tmp_path, self.RELEASE, 0) == ()
        self.symbols(tmp_path, **dict.fromkeys(self.SYMBOLS, -KERNEL_BASE))
        assert running_layout(tmp_path, self.RELEASE, 0) == ()

    def test_a_capture_kernel_s_own_symbols(self, tmp_path):
        self.symbols(tmp_path, **{name: at + 0x2000000 for name, at in self.SYMBOLS.items()})
        assert running_layout(tmp_path, self.RELEASE, 0) == ()


# include/uapi/linux/kernel-page-flags.h and include/linux/kernel-page-flags.h
KPF = {
    name: 1 << bit
    for bit, name in enumerate(
        (
            *("locked", "error", "referenced", "uptodate", "dirty", "lru", "active", "slab", "writeback", "reclaim", "buddy"),
            *("mmap", "anon", "swapcache", "swapbacked", "head", "tail", "huge", "unevictable", "hwpoison", "nopage", "ksm"),
            *("thp", "offline", "zero", "idle", "pgtable"),
        )
    )
} | {"reserved": 1 << 32, "private": 1 << 35}


def flags(*pages: str) -> bytes:
    """`/proc/kpageflags` of these pages: names of flags, "*8" behind them for eight such pages."""
    out = b""
    for page in pages:
        names, _, count = page.partition("*")
        out += struct.pack("Q", sum(KPF[name] for name in names.split())) * int(count or 1)
    return out


class TestPages:
    """Who holds K1's pages."""

    PAGE = 0x1000

    def uses(self, tmp_path, data: bytes, wanted: Range | None = None, page: int = PAGE) -> list[tuple[int, int, str]]:
        """(first page, page behind the last, use)."""
        (tmp_path / "proc").mkdir(exist_ok=True)
        (tmp_path / "proc/kpageflags").write_bytes(data)
        found = read_pages(tmp_path, RangeSet([wanted or Range(0, len(data) // 8 * page)]), page)
        assert all(each.range.start % page == 0 for each in found)
        return [(each.range.start // page, each.range.end // page, each.use) for each in found]

    @pytest.mark.parametrize(
        ("named", "use"),
        [
            ("buddy", "free"),
            ("lru uptodate active mmap", "cache"),
            ("referenced uptodate", "cache"),  # on its way to the lists
            ("uptodate lru swapbacked", "cache"),  # shared memory
            ("lru anon mmap swapbacked uptodate", "anonymous"),
            ("anon ksm mmap", "anonymous"),
            ("unevictable lru anon mmap", "anonymous"),
            ("huge head", "anonymous"),
            ("slab", "slab"),
            ("slab private referenced", "slab"),
            ("pgtable mmap", "pagetable"),
            ("pgtable", "pagetable"),
            ("hwpoison", "poisoned"),
            ("hwpoison uptodate anon", "poisoned"),  # seen of taken pages: flags of what they were
            # a memory error's mark, on what somebody has or may get
            ("hwpoison buddy", "free"),
            ("hwpoison lru uptodate", "cache"),
            ("hwpoison lru anon mmap swapbacked", "anonymous"),
            ("hwpoison slab", "slab"),
            ("hwpoison pgtable", "pagetable"),
            ("hwpoison reserved", "kernel"),
            ("hwpoison offline", "kernel"),
            ("hwpoison mmap", "kernel"),
            ("hwpoison head", "kernel"),
            ("hwpoison tail", "kernel"),
            ("reserved", "kernel"),
            ("reserved mmap", "kernel"),
            ("zero reserved", "kernel"),
            ("offline", "kernel"),
            ("mmap", "kernel"),  # a driver's, mapped for a process
            ("head", "kernel"),
            ("private", "kernel"),
            ("", "kernel"),
        ],
    )
    def test_each_kind(self, tmp_path, named, use):
        assert self.uses(tmp_path, flags(named)) == [(0, 1, use)]

    def test_runs_are_as_long_as_can_be(self, tmp_path):
        data = flags("reserved*3", "*2", "buddy*4", "slab", "buddy")
        assert self.uses(tmp_path, data) == [(0, 5, "kernel"), (5, 9, "free"), (9, 10, "slab"), (10, 11, "free")]

    def test_a_compound_page_is_its_first_page_s_holder(self, tmp_path):
        """6.1 says of the others little more than that they belong to it."""
        data = flags(
            "lru uptodate head", "tail*3", "slab head", "slab tail", "head", "tail*2", "lru anon head thp", "anon tail thp"
        )
        expected = [(0, 4, "cache"), (4, 6, "slab"), (6, 9, "kernel"), (9, 11, "anonymous")]
        assert self.uses(tmp_path, data) == expected

    def test_a_memory_error_takes_no_page_of_a_compound_page_from_its_holder(self, tmp_path):
        data = flags("lru uptodate head hwpoison", "tail", "tail hwpoison", "tail", "slab head", "tail hwpoison", "hwpoison")
        assert self.uses(tmp_path, data) == [(0, 4, "cache"), (4, 6, "slab"), (6, 7, "poisoned")]

    def test_a_page_taken_out_is_no_head(self, tmp_path):
        assert self.uses(tmp_path, flags("hwpoison", "tail", "nopage", "tail")) == [
            (0, 1, "poisoned"),
            (1, 2, "kernel"),
            (3, 4, "kernel"),
        ]

    def test_holes_are_left_out(self, tmp_path):
        assert self.uses(tmp_path, flags("buddy", "nopage*2", "buddy")) == [(0, 1, "free"), (3, 4, "free")]

    def test_only_what_is_wanted(self, tmp_path):
        data = flags("slab*4", "buddy*4", "slab*4")
        assert self.uses(tmp_path, data, Range(3 * self.PAGE, 6 * self.PAGE)) == [(3, 4, "slab"), (4, 6, "free")]

    def test_where_memory_ends_so_do_the_pages(self, tmp_path):
        assert self.uses(tmp_path, flags("slab*2"), Range(0, 1 << 20)) == [(0, 2, "slab")]
        assert self.uses(tmp_path, flags("slab*2") + b"half", Range(0, 1 << 20)) == [(0, 2, "slab")]

    def test_a_range_that_begins_in_a_page(self, tmp_path):
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/kpageflags").write_bytes(flags("slab", "buddy*2"))
        found = read_pages(tmp_path, RangeSet([Range(0x18000, 0x28000)]), 0x10000)
        assert found == (Pages(Range(0x18000, 0x28000), "free"),)

    def test_a_kernel_that_does_not_tell(self, tmp_path):
        assert read_pages(tmp_path, RangeSet([Range(0, 0x1000)]), 0x1000) == ()
        (tmp_path / "proc/kpageflags").mkdir(parents=True)
        assert read_pages(tmp_path, RangeSet([Range(0, 0x1000)]), 0x1000) == ()

    @given(st.lists(st.integers(0, (1 << 33) - 1), max_size=40))
    def test_any_flags_make_ascending_runs_of_different_use(self, values):
        with tempfile.TemporaryDirectory() as directory:
            found = self.uses(Path(directory), struct.pack(f"{len(values)}Q", *values), Range(0, 0x100000))
        for before, after in pairwise(found):
            assert before[1] <= after[0]
            assert before[1] < after[0] or before[2] != after[2]
        held = sum(end - start for start, end, _ in found)
        assert held == sum(not value & KPF["nopage"] for value in values)
