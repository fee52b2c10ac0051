"""Planning never trusts its input: of any description or device tree it makes an error, or a plan that keeps every rule.

Valid ones are changed in ways that keep their shape: numbers, ranges, nodes and types, not bytes at random, which no reader
lets pass.
"""

import contextlib
import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from crashkernel.errors import CrashkernelError
from crashkernel.formats.fdt import DeviceTree, Node
from crashkernel.machine import Machine
from crashkernel.machine.description import describe, machine_from_description
from crashkernel.machine.devicetree import machine_from_tree
from crashkernel.memory import Range, RangeSet
from crashkernel.placement import PAGE, plan_load
from crashkernel.placement.plan import PLACEMENTS, LoadPlan, check_plan
from crashkernel.placement.tree import capture_tree
from crashkernel.report.maps import draw_stages
from support.bigmachine import captured
from support.machines import (
    GIB,
    MIB,
    Block,
    drmem_node,
    initrd,
    kernel,
    machine,
    memory_node,
    small_machine,
    tree,
    u32,
    u64,
)

IMAGE = kernel()
INITRD = initrd(5 * MIB)


def partition(version: int) -> Node:
    """Its region crosses from the memory node into dynamic memory."""
    blocks = [Block(256 * MIB, 4), Block(320 * MIB, 1, 0), Block(336 * MIB, 2, 0x88), Block(368 * MIB, 3, 0x108)]
    return tree(
        memory=[memory_node(0, 256 * MIB)],
        region=Range(128 * MIB, 320 * MIB),
        rtas=Range.sized(160 * MIB, 0x10000),
        initrd=Range(0x3000000, 0x3123456),
        extra=[drmem_node(16 * MIB, blocks, version)],
    )


def bare_metal() -> Node:
    serial = Node("serial@0", {"reg": u32(0), "compatible": b"ibm,opal-console-raw\0"})
    opal = {"opal-base-address": u64(0x30000000), "opal-entry-address": u64(0x30000810), "opal-runtime-size": u64(0x2200000)}
    cells = {"#address-cells": u32(2), "#size-cells": u32(2)}
    held = [Node(f"ibm,held@{at:x}", {"reg": u64(at, 0x100000)}) for at in (0x9C00000, 0x39C00000)]
    extra = [Node("ibm,opal", opal, (Node("consoles", {}, (serial,)),)), Node("reserved-memory", cells, tuple(held))]
    memory = [memory_node(0, GIB), memory_node(4 * GIB, GIB)]
    return tree(platform="none", memory=memory, region=Range(128 * MIB, 640 * MIB), radix=False, extra=extra)


TREES = {
    "partition": partition(2),
    "older partition": partition(1),
    "bare metal": bare_metal(),
    "small": small_machine().device_tree,
}
DESCRIBED = {name: json.loads(describe(machine(root, notes_at=0x300000))) for name, root in TREES.items()}
DESCRIBED["captured"] = json.loads(describe(captured()))

# Where number formats, pages, blocks and 64 bits end.
EDGES = (0, 1, 0x7F, 0xFF, 0xFFF, 0x1000, 0xFFFF, 0x10000, 0x10001, 16 * MIB, 128 * MIB, 256 * MIB, GIB, (1 << 32) - 1, 1 << 32)
EDGES += (1 << 46, (1 << 63) - 1, 1 << 63, (1 << 64) - 0x10000, (1 << 64) - 1, 1 << 64)


@st.composite
def numbers(draw: st.DrawFn, value: int, bits: int = 64) -> int:
    """A number near `value`, or at an edge."""
    near = st.sampled_from(
        (value + 1, value - 1, value * 2, value // 2, value + PAGE, value - PAGE, value + 0x800, value + 16 * MIB)
    )
    return draw(near | st.sampled_from(EDGES) | st.integers(0, 1 << 30)) % (1 << bits)


def places(value, path=()):
    """The path to every value in a JSON document, the document itself left out."""
    if path:
        yield path
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(below, (*path, key))


@st.composite
def changed_value(draw: st.DrawFn, value):
    """Something like `value`: another number, range or text; rarely another type."""
    if draw(st.integers(0, 15)) == 0:
        return draw(st.sampled_from((None, True, -1, 1.5, "", "0x", [], {}, "\udcff", 1 << 70, [[]], "0x1-")))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(numbers(value, 66))
    return draw(changed_text(value)) if isinstance(value, str) else value


@st.composite
def changed_text(draw: st.DrawFn, value: str) -> str:
    """Another range, address, property or word, after what `value` is."""
    with contextlib.suppress(ValueError):
        start, dash, end = value.partition("-")
        if dash:
            first, last = int(start, 16), int(end, 16)
            kind = draw(st.integers(0, 2))
            return f"{draw(numbers(first)) if kind else first:#x}-{draw(numbers(last)) if kind != 1 else last:#x}"
        if value.startswith("0x"):
            return hex(draw(numbers(int(value, 16))))
        return draw(changed_bytes(bytes.fromhex(value))).hex()
    return draw(st.text(max_size=8) | st.just(value + "x"))


@st.composite
def changed_bytes(draw: st.DrawFn, value: bytes) -> bytes:
    """A property whose words say something else; rarely shorter or longer."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return value[: draw(st.integers(0, len(value)))]
    if kind == 1:
        return value + draw(st.binary(min_size=1, max_size=8))
    width = 4 if kind < 5 or len(value) < 8 else 8
    if len(value) < width:
        return draw(st.binary(max_size=8))
    at = draw(st.integers(0, len(value) // width - 1)) * width
    word = draw(numbers(int.from_bytes(value[at : at + width], "big"), 8 * width))
    return value[:at] + word.to_bytes(width, "big") + value[at + width :]


@st.composite
def descriptions(draw: st.DrawFn) -> str:
    """A description of which one to four values are others, gone, doubled or in each other's place."""
    raw = copy.deepcopy(DESCRIBED[draw(st.sampled_from(sorted(DESCRIBED)))])
    for _ in range(draw(st.integers(1, 4))):
        found = list(places(raw))
        *way, last = draw(st.sampled_from(found))
        parent = raw
        for key in way:
            parent = parent[key]
        kind = draw(st.sampled_from(("change", "change", "change", "drop", "double", "swap")))
        if kind == "drop":
            del parent[last]
        elif kind == "double" and isinstance(parent, list):
            parent.insert(last, copy.deepcopy(parent[last]))
        elif kind == "swap":
            other = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
            parent[last], parent[other] = parent[other], parent[last]
        else:
            parent[last] = draw(changed_value(parent[last]))
    return json.dumps(raw)


@st.composite
def trees(draw: st.DrawFn) -> Node:
    """A device tree of which one to four properties or nodes are others, gone or doubled."""
    root = TREES[draw(st.sampled_from(sorted(TREES)))]
    for _ in range(draw(st.integers(1, 4))):
        root = draw(changed_tree(root))
    return root


@st.composite
def changed_tree(draw: st.DrawFn, node: Node) -> Node:
    """The node with one change in it or below it."""
    if node.children and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(node.children) - 1))
        child = node.children[at]
        kind = draw(st.integers(0, 11))
        if kind == 0:
            replaced: tuple[Node, ...] = ()
        elif kind == 1:
            replaced = (child, child)
        elif kind == 2:
            name = draw(st.sampled_from(sorted({each.name for root in TREES.values() for _, each in root.walk()} - {""})))
            replaced = (replace(child, name=name),)
        else:
            replaced = (draw(changed_tree(child)),)
        return node.with_children((*node.children[:at], *replaced, *node.children[at + 1 :]))
    if not node.properties:
        return node
    name = draw(st.sampled_from(sorted(node.properties)))
    if draw(st.integers(0, 9)) == 0:
        return node.without(name)
    return node.with_property(name, draw(changed_bytes(node.properties[name])))


def keeps_every_rule(plan: LoadPlan, found: Machine) -> None:
    """By first principles; `check_plan`, which plan_load has asked already, is asked once more."""
    check_plan(plan)
    firmware = RangeSet(region.range for region in found.firmware)
    segments = [segment.range for segment in plan.segments]
    assert found.reserved is not None
    for each in segments:
        assert found.memory.covers(each), f"{each} is no memory"
        assert found.reserved.contains(each)
        assert each.start % PAGE == 0 == each.end % PAGE
    for before, after in pairwise(sorted(segments)):
        assert before.end <= after.start, "segments overlap"
    for each in (*segments, *(part for move in plan.moves for part in (*move.read, *move.written))):
        assert found.memory.covers(each), f"{each} is no memory"
        assert not firmware.overlaps(each), f"{each} is the firmware's"
    assert not plan.k2_memory - found.memory
    assert not plan.k2_memory & firmware
    for each in plan.k2_memory:
        assert each.start % 0x1000 == 0 == each.end % 0x1000, f"{each} is no whole pages"
    k1 = found.memory - RangeSet([found.reserved])
    assert RangeSet(kept.range for kept in plan.kept) == k1
    places = RangeSet(Range.sized(kept.location, kept.range.size) for kept in plan.kept)
    assert places.total == k1.total, "two bytes of K1's are kept in one place"
    assert not places & plan.k2_memory
    assert not places - found.memory
    assert plan.k2_memory.covers(Range.sized(plan.entry, plan.kernel_span))


def plan_all(found: Machine, cmdline: str) -> int:
    """Plan for both placements, and do with the plans what commands do; how many there were."""
    made = 0
    for placement in PLACEMENTS:
        with contextlib.suppress(CrashkernelError):
            plan = plan_load(found, IMAGE, INITRD, cmdline, placement)
            made += 1
            keeps_every_rule(plan, found)
            assert LoadPlan.from_json(plan.to_json()) == plan
            assert draw_stages(plan)
            assert len(capture_tree(found, plan, INITRD.size).to_bytes()) <= plan.segment("fdt").range.size or found.tree_size
    return made


cmdlines = st.sampled_from(("console=hvc0", "console=hvc0 disable_radix maxcpus=1"))


@pytest.mark.parametrize("name", sorted(TREES))
def test_every_one_of_them_can_be_planned_for(name):
    """Else the changes below would change nothing."""
    assert plan_all(machine_from_tree(TREES[name]), "console=hvc0") == len(PLACEMENTS)
    assert plan_all(machine_from_description(json.dumps(DESCRIBED[name])), "console=hvc0") == len(PLACEMENTS)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(descriptions(), cmdlines)
def test_a_changed_description_is_refused_or_planned_for_by_the_rules(text, cmdline):
    with contextlib.suppress(CrashkernelError):
        plan_all(machine_from_description(text), cmdline)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees(), cmdlines)
def test_a_changed_tree_is_refused_or_planned_for_by_the_rules(root, cmdline):
    with contextlib.suppress(CrashkernelError):
        found = machine_from_tree(DeviceTree.from_bytes(DeviceTree(root).to_bytes()).root)
        plan_all(found, cmdline)
        assert machine_from_description(describe(found)).memory == found.memory


@settings(max_examples=100, deadline=None)
@given(descriptions())
def test_what_is_read_is_described_the_same_again(text):
    with contextlib.suppress(CrashkernelError):
        found = machine_from_description(text)
        once = describe(found)
        assert describe(machine_from_description(once)) == once
        return
    assume(False)
