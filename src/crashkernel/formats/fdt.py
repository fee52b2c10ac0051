"""The flattened device tree, version 17: the machine as firmware describes it, and as the capture kernel is told of it.

References: Devicetree Specification v0.4, chapter 5 (the blob) and section 2.2 (names and values); Linux
`drivers/of/fdt.c` and `scripts/dtc/libfdt` for what readers accept in practice.

Reads versions 16 and 17 (and later ones that declare themselves compatible), writes 17. Strings are deduplicated but do
not share suffixes, so the bytes may differ from another writer's; the tree does not. Comments, labels and the order of
blocks are not kept.

Trees are values: an update returns a new node, and whoever holds the old one keeps what they had.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from crashkernel.errors import FormatError
from crashkernel.memory import align_up

MAGIC = 0xD00DFEED
VERSION = 17
LAST_COMPATIBLE_VERSION = 16

# Linux unflattens no deeper (FDT_MAX_DEPTH, drivers/of/fdt.c). Counted in nodes, the root being the first.
MAX_DEPTH = 64

# The specification (2.2.4.1) allows property names of 31 characters; PAPR firmware has longer ones. A bound keeps a
# forged blob, whose every property may name the same huge string, from costing the product of both sizes.
MAX_PROPERTY_NAME = 255

_HEADER = struct.Struct(">10I")  # specification 5.2; version 16 lacks the last word, size_dt_struct
_HEADER_SIZE_V16 = 36
_RESERVATION = struct.Struct(">QQ")  # specification 5.3: address, size
_WORD = struct.Struct(">I")
_PROPERTY = struct.Struct(">II")  # specification 5.4.1: length of the value, offset of the name in the strings

_BEGIN_NODE, _END_NODE, _PROP, _NOP, _END = 1, 2, 3, 4, 9


@dataclass(frozen=True, slots=True)
class Node:
    """A node: its name with unit address (`memory@0`; the root's is empty), its properties' bytes, its children.

    `properties` keeps the order of the blob and is not to be changed in place: the methods return a changed copy.
    """

    name: str
    properties: Mapping[str, bytes] = field(default_factory=dict)
    children: tuple[Node, ...] = ()

    def child(self, name: str) -> Node | None:
        """Return the first child of exactly this name, unit address included, or None."""
        for each in self.children:
            if each.name == name:
                return each
        return None

    def find(self, path: str) -> Node | None:
        """Return the descendant at `path`, such as `/cpus/PowerPC,POWER9@0`, or None; `/` is this node itself."""
        node: Node | None = self
        for name in path.split("/"):
            if name and node is not None:
                node = node.child(name)
        return node

    def walk(self, path: str = "/") -> Iterator[tuple[str, Node]]:
        """Yield (path, node) for this node, at `path`, and everything below it, parents before their children."""
        yield path, self
        for each in self.children:
            yield from each.walk(f"{path.rstrip('/')}/{each.name}")

    def _value(self, name: str) -> bytes:
        try:
            return self.properties[name]
        except KeyError:
            raise FormatError(f"node {self.name or '/'} has no property {name}") from None

    def cells(self, name: str) -> tuple[int, ...]:
        """Return the property as 32-bit numbers (specification 2.2.4, `<prop-encoded-array>`).

        :raise FormatError: when there is no such property, or its size is no multiple of 4 bytes.
        """
        value = self._value(name)
        if len(value) % _WORD.size:
            raise FormatError(f"property {name} of node {self.name or '/'} has {len(value)} bytes, not whole cells")
        return struct.unpack(f">{len(value) // _WORD.size}I", value)

    def u64(self, name: str) -> int:
        """Return the property as one 64-bit number.

        :raise FormatError: when there is no such property, or it is not 8 bytes.
        """
        return self._number(name, 8)

    def _number(self, name: str, size: int) -> int:
        value = self._value(name)
        if len(value) != size:
            raise FormatError(f"property {name} of node {self.name or '/'} has {len(value)} bytes, not {size}")
        return int.from_bytes(value, "big")

    def string(self, name: str) -> str:
        """Return the property as text, up to its first NUL; bytes that are not UTF-8 survive as surrogates.

        :raise FormatError: when there is no such property, or no NUL in it (specification 2.2.4, `<string>`).
        """
        text, terminator, _ = self._value(name).partition(b"\0")
        if not terminator:
            raise FormatError(f"property {name} of node {self.name or '/'} is not a terminated string")
        return text.decode("utf-8", "surrogateescape")

    def with_property(self, name: str, value: bytes) -> Node:
        """Return this node with the property set: in its old place when it had one, at the end otherwise."""
        return replace(self, properties={**self.properties, name: value})

    def without(self, *names: str) -> Node:
        """Return this node without the properties of these names, those it does not have being no error."""
        return replace(self, properties={name: value for name, value in self.properties.items() if name not in names})

    def with_children(self, children: Iterable[Node]) -> Node:
        """Return this node with these children in place of its own."""
        return replace(self, children=tuple(children))


@dataclass(frozen=True, slots=True)
class DeviceTree:
    """A whole blob: the root node, the reserve map as (address, size) in bytes, and the physical id of the boot CPU."""

    root: Node
    reserved: tuple[tuple[int, int], ...] = ()
    boot_cpuid: int = 0

    @classmethod
    def from_bytes(cls, blob: bytes | memoryview, source: str = "") -> DeviceTree:
        """Read a blob; bytes after its own total size are ignored.

        :raise FormatError: when it is not a flattened device tree of a version this can read, says where.
        """
        return _Reader(bytes(blob), source).tree()

    def to_bytes(self) -> bytes:
        """Write the blob, version 17: header, reserve map, structure, strings (specification 5.1).

        :raise FormatError: when the tree holds what a blob cannot: a name that is none, a value of 4 GiB, an empty
            reservation, more than `MAX_DEPTH` levels.
        """
        reservations = bytearray()
        for address, size in self.reserved:
            if size <= 0:
                raise FormatError(f"the reservation at {address:#x} is empty, which readers take for the end of the list")
            reservations += _RESERVATION.pack(address, size)
        reservations += bytes(_RESERVATION.size)
        structure, strings = _Writer().blocks(self.root)
        structure_offset = _HEADER.size + len(reservations)
        strings_offset = structure_offset + len(structure)
        header = _HEADER.pack(
            MAGIC,
            strings_offset + len(strings),
            structure_offset,
            strings_offset,
            _HEADER.size,
            VERSION,
            LAST_COMPATIBLE_VERSION,
            self.boot_cpuid,
            len(strings),
            len(structure),
        )
        return b"".join((header, reservations, structure, strings))


class _Reader:
    """One pass over a blob that nobody vouches for: every offset is checked before it is followed.

    `cursor` is where the structure block is read next, in bytes from the start of the blob, as all offsets here.
    """

    def __init__(self, blob: bytes, source: str) -> None:
        self.source = source
        if len(blob) < _HEADER_SIZE_V16:
            raise self.fault("a flattened device tree needs a header", len(blob))
        # Padded, so that a version 16 header can be unpacked as version 17; the last word is then not looked at.
        header = _HEADER.unpack(blob[: _HEADER.size].ljust(_HEADER.size, b"\0"))
        magic, total, structure, strings, reservations = header[:5]
        version, compatible, boot_cpuid, strings_size, structure_size = header[5:]
        if magic != MAGIC:
            raise self.fault(f"not a flattened device tree: its magic is {magic:#010x}", 0)
        if version < LAST_COMPATIBLE_VERSION or compatible > VERSION:
            raise self.fault(f"device tree version {version} (compatible with {compatible}) is not 16 or 17", 20)
        if not (_HEADER_SIZE_V16 if version < VERSION else _HEADER.size) <= total <= len(blob):
            raise self.fault(f"the device tree claims {total} bytes, of which {len(blob)} are here", 4)
        if structure % 4 or reservations % 8:
            raise self.fault("a block of the device tree is not aligned", 8)  # specification 5.6
        self.blob = blob[:total]
        self.boot_cpuid = boot_cpuid
        self.reservations = reservations
        self.cursor = structure
        self.structure_end = structure + structure_size if version >= VERSION else total
        self.strings = strings
        self.strings_end = strings + strings_size
        if max(self.structure_end, self.strings_end, structure) > total:
            raise self.fault("a block of the device tree ends beyond its total size", 8)
        self.names: dict[int, str] = {}

    def fault(self, message: str, offset: int) -> FormatError:
        return FormatError(message, source=self.source, offset=offset)

    def tree(self) -> DeviceTree:
        return DeviceTree(self.root(), tuple(self.reserve_map()), self.boot_cpuid)

    def reserve_map(self) -> Iterator[tuple[int, int]]:
        offset = self.reservations
        while offset + _RESERVATION.size <= len(self.blob):
            address, size = _RESERVATION.unpack_from(self.blob, offset)
            if size == 0:
                if address:  # the end for Linux, an entry for the specification (5.3.2): nobody can know
                    raise self.fault("the reserve map has an empty entry", offset)
                return
            yield address, size
            offset += _RESERVATION.size
        raise self.fault("the reserve map does not end", offset)

    def text(self, start: int, end: int, limit: int, what: str) -> str:
        """Return the NUL-terminated name at `start`, before `end`, of at most `limit` bytes."""
        stop = self.blob.find(b"\0", start, min(end, start + limit + 1))
        if stop < 0:
            raise self.fault(f"a {what} name does not end", start)
        name = self.blob[start:stop]
        if not name.isascii():
            raise self.fault(f"the {what} name {name!r} is not ASCII", start)
        return name.decode("ascii")

    def word(self) -> int:
        """Return the word under the cursor and step over it."""
        if self.cursor + _WORD.size > self.structure_end:
            raise self.fault("the structure block does not end", self.cursor)
        value: int = _WORD.unpack_from(self.blob, self.cursor)[0]
        self.cursor += _WORD.size
        return value

    def token(self) -> int:
        while (token := self.word()) == _NOP:
            pass
        return token

    def step(self, size: int) -> None:
        """Step over `size` bytes and the padding to the next token."""
        self.cursor = align_up(self.cursor + size, _WORD.size)

    def root(self) -> Node:
        """Return the tree of the structure block (specification 5.4)."""
        if self.token() != _BEGIN_NODE:
            raise self.fault("the structure block does not begin with a node", self.cursor - _WORD.size)
        root = self.node(1)
        if self.token() != _END:
            raise self.fault("the structure block goes on after its root node", self.cursor - _WORD.size)
        return root

    def node(self, depth: int) -> Node:
        """Return the node whose first token the cursor has just passed; `depth` bounds the recursion."""
        start = self.cursor
        if depth > MAX_DEPTH:
            raise self.fault(f"nodes are more than {MAX_DEPTH} deep", start)
        name = self.text(start, self.structure_end, self.structure_end, "node")
        if "/" in name or (depth > 1) != bool(name):
            raise self.fault(f"{name!r} is no name for a node here", start)
        self.step(len(name) + 1)
        properties: dict[str, bytes] = {}
        children: list[Node] = []
        while (token := self.token()) != _END_NODE:
            at = self.cursor - _WORD.size
            if token == _BEGIN_NODE:
                children.append(self.node(depth + 1))
            elif token != _PROP:
                raise self.fault(f"{token:#x} is no token that can stand in a node", at)
            elif children:  # libfdt, hence Linux, would not see it (specification 5.4.2)
                raise self.fault(f"node {name or '/'} has a property behind a child", at)
            else:
                key, value = self.property()
                if key in properties:
                    raise self.fault(f"node {name or '/'} has property {key} twice", at)
                properties[key] = value
        return Node(name, properties, tuple(children))

    def property(self) -> tuple[str, bytes]:
        """Return the property whose token the cursor has just passed."""
        size, name = self.word(), self.word()
        start = self.cursor
        if size > self.structure_end - start:
            raise self.fault(f"a property's {size} bytes reach beyond the structure block", start)
        self.step(size)
        if name not in self.names:
            self.names[name] = self.text(self.strings + name, self.strings_end, MAX_PROPERTY_NAME, "property")
        if not self.names[name]:
            raise self.fault("a property has no name", start)
        return self.names[name], self.blob[start : start + size]


class _Writer:
    """Builds the structure and the strings block of one tree."""

    def __init__(self) -> None:
        self.structure = bytearray()
        self.strings = bytearray()
        self.offsets: dict[str, int] = {}

    def blocks(self, root: Node) -> tuple[bytes, bytes]:
        if root.name:
            raise FormatError(f"the root node has a name, {root.name!r}")
        self.node(root, 1)
        self.structure += _WORD.pack(_END)
        return bytes(self.structure), bytes(self.strings)

    def pad(self) -> None:
        self.structure += bytes(-len(self.structure) % _WORD.size)

    def node(self, node: Node, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise FormatError(f"node {node.name} is more than {MAX_DEPTH} deep")
        if "/" in node.name or (depth > 1) != bool(node.name):
            raise FormatError(f"{node.name!r} is no name for a node")
        self.structure += _WORD.pack(_BEGIN_NODE) + _terminated(node.name)
        self.pad()
        for name, value in node.properties.items():
            if len(value) >= 1 << 32:
                raise FormatError(f"property {name} of node {node.name or '/'} has {len(value)} bytes")
            self.structure += _WORD.pack(_PROP) + _PROPERTY.pack(len(value), self.string(name)) + value
            self.pad()
        for each in node.children:
            self.node(each, depth + 1)
        self.structure += _WORD.pack(_END_NODE)

    def string(self, name: str) -> int:
        if name not in self.offsets:
            if not 0 < len(name) <= MAX_PROPERTY_NAME:
                raise FormatError(f"{name!r} is no name for a property")
            self.offsets[name] = len(self.strings)
            self.strings += _terminated(name)
        return self.offsets[name]


def _terminated(name: str) -> bytes:
    if not name.isascii() or "\0" in name:
        raise FormatError(f"{name!r} is no name for a node or property")
    return name.encode("ascii") + b"\0"
