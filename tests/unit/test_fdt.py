import shutil
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashkernel.errors import FormatError
from crashkernel.formats.fdt import MAX_DEPTH, DeviceTree, Node
from support.elfwriter import Part, write_elf
from support.hostile import corrupted, peak_memory, survives, truncations


def cells(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}I", *numbers)


SAMPLE = DeviceTree(
    Node(
        "",
        {"compatible": b"IBM,9009-22A\0ibm,pseries\0", "#address-cells": cells(2), "#size-cells": cells(2)},
        (
            Node("chosen", {"bootargs": b"elfcorehdr=0x1000K\0", "linux,initrd-start": cells(0, 0x4000000)}),
            Node("memory@0", {"device_type": b"memory\0", "reg": cells(0, 0, 0, 0x40000000)}),
            Node("cpus", {}, (Node("PowerPC,POWER9@8", {"reg": cells(8), "ibm,odd": b"abc", "empty": b""}),)),
        ),
    ),
    reserved=((0x2FFF0000, 0x10000), (0x1000, 0x2000)),
    boot_cpuid=8,
)
BLOB = SAMPLE.to_bytes()

BEGIN, END_NODE, PROP, NOP, END = 1, 2, 3, 4, 9


def blob(*structure: int | bytes, strings: bytes = b"name\0", version: int = 17, **header: int) -> bytes:
    """A blob with this structure block; `header` overrides a field."""
    words = b"".join(each if isinstance(each, bytes) else cells(each) for each in structure)
    fields = {
        "magic": 0xD00DFEED,
        "totalsize": 56 + len(words) + len(strings),
        "off_dt_struct": 56,
        "off_dt_strings": 56 + len(words),
        "off_mem_rsvmap": 40,
        "version": version,
        "last_comp_version": 16,
        "boot_cpuid_phys": 0,
        "size_dt_strings": len(strings),
        "size_dt_struct": len(words),
    }
    assert header.keys() <= fields.keys()
    return cells(*(fields | header).values()) + bytes(16) + words + strings


EMPTY = (BEGIN, b"\0\0\0\0", END_NODE, END)


def nested(depth: int) -> Node:
    node = Node("leaf")
    for _ in range(depth - 2):
        node = Node("branch", {}, (node,))
    return Node("", {}, (node,))


class TestAccess:
    def test_finds_by_path(self):
        cpu = SAMPLE.root.find("/cpus/PowerPC,POWER9@8")
        assert cpu is not None
        assert cpu.cells("reg") == (8,)
        assert SAMPLE.root.find("/") is SAMPLE.root
        assert SAMPLE.root.find("/cpus/missing/deeper") is None
        assert SAMPLE.root.child("memory") is None

    def test_walks_parents_first(self):
        assert [path for path, _ in SAMPLE.root.walk()] == [
            "/",
            "/chosen",
            "/memory@0",
            "/cpus",
            "/cpus/PowerPC,POWER9@8",
        ]

    def test_reads_values(self):
        chosen = SAMPLE.root.child("chosen")
        assert chosen is not None
        assert chosen.string("bootargs") == "elfcorehdr=0x1000K"
        assert chosen.u64("linux,initrd-start") == 0x4000000
        assert chosen.cells("linux,initrd-start") == (0, 0x4000000)
        assert Node("", {"bootargs": b"caf\xe9\0"}).string("bootargs").encode("utf-8", "surrogateescape") == b"caf\xe9"

    @pytest.mark.parametrize(
        "read",
        [
            lambda node: node.u64("three"),
            lambda node: node.cells("three"),
            lambda node: node.string("three"),
        ],
    )
    def test_a_value_of_another_kind_is_a_format_error(self, read):
        with pytest.raises(FormatError, match="node memory@0"):
            read(Node("memory@0", {"three": b"abc", "eight": bytes(8)}))

    def test_updates_leave_the_original_alone(self):
        node = Node("n", {"a": b"1", "b": b"2"}, (Node("c"),))
        assert list(node.with_property("a", b"3").properties.items()) == [("a", b"3"), ("b", b"2")]
        assert list(node.with_property("z", b"").properties) == ["a", "b", "z"]
        assert dict(node.without("a", "missing").properties) == {"b": b"2"}
        assert node.with_children([Node("d"), Node("e")]).children == (Node("d"), Node("e"))
        assert node == Node("n", {"a": b"1", "b": b"2"}, (Node("c"),))


class TestBlob:
    def test_round_trip(self):
        assert DeviceTree.from_bytes(BLOB) == SAMPLE
        assert DeviceTree.from_bytes(memoryview(BLOB + b"slack after the total size")) == SAMPLE

    def test_layout(self):
        magic, total, structure, strings, reservations = struct.unpack_from(">5I", BLOB)
        assert (magic, total, reservations) == (0xD00DFEED, len(BLOB), 40)
        assert struct.unpack_from(">2I", BLOB, 20) == (17, 16)
        assert struct.unpack_from(">I", BLOB, 28) == (8,)
        assert struct.unpack_from(">6Q", BLOB, 40) == (0x2FFF0000, 0x10000, 0x1000, 0x2000, 0, 0)
        assert structure % 4 == 0
        assert BLOB.count(b"reg\0", strings) == 1

    def test_version_16_has_no_structure_size(self):
        words = cells(BEGIN) + bytes(4) + cells(END_NODE, END)
        header = cells(0xD00DFEED, 40 + 16 + len(words), 56, 56 + len(words), 40, 16, 16, 5, 0)
        tree = DeviceTree.from_bytes(header + bytes(4) + bytes(16) + words)
        assert tree == DeviceTree(Node(""), (), 5)

    def test_no_operations_are_skipped(self):
        read = DeviceTree.from_bytes(blob(NOP, BEGIN, b"\0\0\0\0", NOP, PROP, 1, 0, b"x\0\0\0", NOP, END_NODE, NOP, END))
        assert read.root == Node("", {"name": b"x"})

    def test_deepest_tree(self):
        tree = DeviceTree(nested(MAX_DEPTH))
        assert DeviceTree.from_bytes(tree.to_bytes()) == tree

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "needs a header"),
            (blob(*EMPTY, magic=0xEDFE0DD0), "magic is 0xedfe0dd0 at offset 0x0"),
            (blob(*EMPTY, version=3, last_comp_version=2), "version 3"),
            (blob(*EMPTY, version=18, last_comp_version=18), "version 18"),
            (blob(*EMPTY, totalsize=0xFFFFFFFF), "claims 4294967295 bytes"),
            (blob(*EMPTY, totalsize=8), "claims 8 bytes"),
            (blob(*EMPTY, off_dt_struct=57), "not aligned"),
            (blob(*EMPTY, off_mem_rsvmap=44), "not aligned"),
            (blob(*EMPTY, off_mem_rsvmap=0xFFFFFFF8), "reserve map does not end"),
            (blob(*EMPTY, off_mem_rsvmap=32), "reserve map has an empty entry at offset 0x20"),
            (blob(*EMPTY, size_dt_struct=0xFFFFFFFF), "beyond its total size"),
            (blob(*EMPTY, off_dt_struct=0xFFFFFFFC), "beyond its total size"),
            (blob(*EMPTY, size_dt_strings=0xFFFFFFFF), "beyond its total size"),
            (blob(*EMPTY[:-1]), "does not end at offset 0x44"),
            (blob(END), "does not begin with a node at offset 0x38"),
            (blob(BEGIN, b"\0\0\0\0", END), "0x9 is no token"),
            (blob(BEGIN, b"\0\0\0\0", 7, END_NODE, END), "0x7 is no token that can stand in a node at offset 0x40"),
            (blob(*EMPTY[:-1], *EMPTY), "goes on after its root"),
            (blob(BEGIN, b"abc\0", END_NODE, END), "'abc' is no name"),
            (blob(BEGIN, b"\0\0\0\0", BEGIN, b"\0\0\0\0", END_NODE, END_NODE, END), "'' is no name"),
            (blob(BEGIN, b"\0\0\0\0", BEGIN, b"a/b\0", END_NODE, END_NODE, END), "'a/b' is no name"),
            (blob(BEGIN, b"\0\0\0\0", BEGIN, b"\xe9bc\0", END_NODE, END_NODE, END), "is not ASCII"),
            (blob(BEGIN, b"abcdefgh"), "a node name does not end at offset 0x3c"),
            (blob(BEGIN, b"\0\0\0\0", PROP, 0xFFFFFFFF, 0, END_NODE, END), "4294967295 bytes reach beyond"),
            (blob(BEGIN, b"\0\0\0\0", PROP, 0, 0xFFFFFFFF, END_NODE, END), "a property name does not end"),
            (blob(BEGIN, b"\0\0\0\0", PROP, 0, 0, END_NODE, END, strings=b"name"), "a property name does not end"),
            (blob(BEGIN, b"\0\0\0\0", PROP, 0, 4, END_NODE, END), "a property has no name"),
            (blob(BEGIN, b"\0\0\0\0", PROP, 0, 0, PROP, 0, 0, END_NODE, END), "property name twice"),
            (blob(BEGIN, b"\0\0\0\0", BEGIN, b"a\0\0\0", END_NODE, PROP, 0, 0, END_NODE, END), "behind a child"),
            (blob(BEGIN, b"\0\0\0\0", PROP, 8, 0, END_NODE), "8 bytes reach beyond the structure block at offset 0x4c"),
            (
                blob(BEGIN, b"\0\0\0\0", *(BEGIN, b"a\0\0\0") * 64, *(END_NODE,) * 65, END),
                "more than 64 deep at offset 0x23c",
            ),
            (blob(*(BEGIN, b"\0\0\0\0"), *(BEGIN, b"a\0\0\0") * 100_000), "more than 64 deep"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_refuses(self, data, message):
        with pytest.raises(FormatError, match=message) as caught:
            DeviceTree.from_bytes(data, "k2.dtb")
        assert caught.value.source == "k2.dtb"
        assert caught.value.offset is not None

    def test_refuses_an_empty_reservation(self):
        with pytest.raises(FormatError, match="empty entry"):
            DeviceTree.from_bytes(blob(*EMPTY)[:40] + struct.pack(">QQ", 0x1000, 0) + blob(*EMPTY)[56:])

    @pytest.mark.parametrize(
        ("tree", "message"),
        [
            (DeviceTree(Node("root")), "root"),
            (DeviceTree(Node("", {}, (Node(""),))), "no name for a node"),
            (DeviceTree(Node("", {}, (Node("a/b"),))), "no name for a node"),
            (DeviceTree(Node("", {}, (Node("a\0b"),))), "no name for a node"),
            (DeviceTree(Node("", {"": b""})), "no name for a property"),
            (DeviceTree(Node("", {"n" * 256: b""})), "no name for a property"),
            (DeviceTree(Node("", {"\xe9": b""})), "no name"),
            (DeviceTree(nested(MAX_DEPTH + 1)), "more than 64 deep"),
            (DeviceTree(Node(""), reserved=((0x1000, 0),)), "reservation at 0x1000 is empty"),
        ],
    )
    def test_writes_only_what_reads_back(self, tree, message):
        with pytest.raises(FormatError, match=message):
            tree.to_bytes()


names = st.text("abcdefgh,-#@0123456789", min_size=1, max_size=12)
properties = st.dictionaries(names, st.binary(max_size=9), max_size=4)
nodes = st.recursive(
    st.builds(Node, names, properties),
    lambda below: st.builds(Node, names, properties, st.lists(below, max_size=3).map(tuple)),
    max_leaves=8,
)
words = st.integers(0, (1 << 64) - 1)
trees = st.builds(
    DeviceTree,
    st.builds(Node, st.just(""), properties, st.lists(nodes, max_size=3).map(tuple)),
    st.lists(st.tuples(words, st.integers(1, (1 << 64) - 1)), max_size=3).map(tuple),
    st.integers(0, (1 << 32) - 1),
)


@given(trees)
def test_every_tree_round_trips(tree):
    data = tree.to_bytes()
    assert DeviceTree.from_bytes(data) == tree
    assert DeviceTree.from_bytes(data).to_bytes() == data


def test_every_truncation_is_refused():
    for short in truncations(BLOB):
        assert not survives(DeviceTree.from_bytes, short)


def reads_back(data: bytes) -> None:
    tree = DeviceTree.from_bytes(data)
    assert DeviceTree.from_bytes(tree.to_bytes()) == tree


@settings(max_examples=300)
@given(corrupted(BLOB))
def test_damage_is_refused_or_still_a_tree(data):
    survives(reads_back, data)


@given(st.binary(max_size=64))
def test_noise_is_refused(data):
    assert not survives(DeviceTree.from_bytes, data)


def test_shared_names_do_not_multiply():
    """Every property names another suffix of one huge string: reading must not cost properties times string."""
    count = 4_000
    properties = b"".join(cells(PROP, 0, 4 * index) for index in range(count))
    data = blob(BEGIN, b"\0\0\0\0", properties, END_NODE, END, strings=b"n" * (8 * count) + b"\0")
    assert peak_memory(DeviceTree.from_bytes, data) < 16 * len(data)


def run_qemu(*arguments: str) -> None:
    if shutil.which("qemu-system-ppc64") is None:
        pytest.skip("qemu-system-ppc64 is not installed")
    quiet = ("-display", "none", "-nodefaults", "-serial", "none", "-monitor", "none")
    subprocess.run(("qemu-system-ppc64", *arguments, *quiet), check=True, timeout=60, capture_output=True)


@pytest.mark.parametrize("machine", ["pseries", "powernv9"])
def test_reads_the_tree_qemu_writes(tmp_path, machine):
    path = tmp_path / "qemu.dtb"
    run_qemu("-M", f"{machine},dumpdtb={path}", "-m", "1G", "-smp", "2")
    tree = DeviceTree.from_bytes(path.read_bytes(), str(path))
    cpus = tree.root.child("cpus")
    assert cpus is not None
    assert sum(each.name.startswith("PowerPC,") for each in cpus.children) >= 1
    assert DeviceTree.from_bytes(tree.to_bytes()) == tree


def test_qemu_reads_the_tree_we_write(tmp_path):
    """QEMU's libfdt opens our blob, moves its blocks about, and writes it again (`load_device_tree`)."""
    ours, theirs, kernel = tmp_path / "ours.dtb", tmp_path / "theirs.dtb", tmp_path / "kernel.elf"
    ours.write_bytes(BLOB)
    kernel.write_bytes(write_elf("big", [Part(data=bytes(64), vaddr=0x100000, paddr=0x100000)], entry=0x100000))
    run_qemu("-M", f"ppce500,dumpdtb={theirs}", "-bios", str(kernel), "-dtb", str(ours))
    assert theirs.read_bytes() != BLOB
    assert DeviceTree.from_bytes(theirs.read_bytes()) == SAMPLE
