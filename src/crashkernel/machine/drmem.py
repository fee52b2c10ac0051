"""The dynamic memory of a partition: logical memory blocks that the hypervisor can give and take, in runs.

A 64 TiB partition has 262,144 blocks of 256 MiB, so they are never one object each. Sources: PAPR
("ibm,dynamic-memory", "ibm,dynamic-memory-v2"); arch/powerpc/mm/drmem.c, __walk_drmem_v1_lmbs and __walk_drmem_v2_lmbs;
arch/powerpc/include/asm/drmem.h.
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crashkernel.errors import FormatError
from crashkernel.formats.fdt import Node
from crashkernel.memory import Range, RangeSet

if TYPE_CHECKING:
    from collections.abc import Iterator

ASSIGNED = 0x08  # DRCONF_MEM_ASSIGNED
RESERVED = 0x80  # DRCONF_MEM_RESERVED
HOTREMOVABLE = 0x100  # DRCONF_MEM_HOTREMOVABLE: it has come in at run time, and no region reaches across its end
_V1, _V2 = "ibm,dynamic-memory", "ibm,dynamic-memory-v2"
_ENTRY = 24  # bytes, in both versions
_ENTRY_V2 = struct.Struct(">IQIII")  # consecutive blocks, base, drc index, associativity index, flags
_MAX_LMBS = 1 << 20  # 256 TiB of 256 MiB blocks: more is a corrupt count, not a machine
_KEPT = ASSIGNED | RESERVED | HOTREMOVABLE
# The flags that are kept, of a block in one byte: the lowest bit of the second byte takes the place of the first's, unused.
_LOW = bytes(flags & _KEPT for flags in range(256))
_HIGH = bytes(flags & _KEPT >> 8 for flags in range(256))
_SAME_KIND = re.compile(b"|".join(b"\\x%02x+" % (low | high) for low in sorted(set(_LOW)) for high in sorted(set(_HIGH))))


@dataclass(frozen=True, slots=True)
class LmbRun:
    """Blocks of `block` bytes, one behind the other, all with the same flags (ASSIGNED, RESERVED, HOTREMOVABLE; no others)."""

    range: Range
    block: int
    flags: int

    @property
    def count(self) -> int:
        """Number of blocks, at least 1."""
        return self.range.size // self.block

    @property
    def usable(self) -> bool:
        """The kernel's own test: assigned and not reserved (early_init_drmem_lmb, arch/powerpc/kernel/prom.c)."""
        return self.flags & (ASSIGNED | RESERVED) == ASSIGNED


@dataclass(frozen=True, slots=True)
class DynamicMemory:
    """All blocks in the order the kernel walks them, which is that of the property."""

    runs: tuple[LmbRun, ...] = ()

    @classmethod
    def of(cls, node: Node | None) -> DynamicMemory:
        """Read a node, in either version; nothing when it has no blocks or no block size.

        :raise FormatError: the property is shorter than its own count says, claims a million blocks, or a block reaches beyond
            64 bits.
        """
        if node is None:
            return cls()
        size = int.from_bytes(node.properties.get("ibm,lmb-size", b""), "big")
        if size == 0:
            return cls()
        if _V1 in node.properties:
            return cls(tuple(_runs_v1(node.properties[_V1], size)))
        if _V2 in node.properties:
            return cls(tuple(_runs_v2(node.properties[_V2], size)))
        return cls()

    @property
    def usable(self) -> RangeSet:
        """The memory a kernel takes for its own."""
        return RangeSet(run.range for run in self.runs if run.usable)

    @property
    def usable_blocks(self) -> int:
        """Number of blocks a kernel takes for its own."""
        return sum(run.count for run in self.runs if run.usable)

    def reduced(self, node: Node) -> Node:
        """Return the node with block size and blocks alone, as version 2: no index that a hypervisor gave them."""
        entries = b"".join(_ENTRY_V2.pack(run.count, run.range.start, 0, 0, run.flags) for run in self.runs)
        properties = {name: value for name, value in node.properties.items() if name == "ibm,lmb-size"}
        return Node(node.name, properties | {_V2: len(self.runs).to_bytes(4, "big") + entries})


def _runs_v1(data: bytes, size: int) -> Iterator[LmbRun]:
    # { base 64, drc index 32, reserved 32, associativity index 32, flags 32 }: three 64-bit words, of which the first is the
    # base and the last two bytes have the flags
    count = _count(data, _V1)
    body = data[4 : 4 + _ENTRY * count]
    words = array("Q", body)
    if sys.byteorder == "little":
        words.byteswap()
    bases = words[0::3]
    for same in _SAME_KIND.finditer(_kinds(body)):
        kind = same[0][0]
        yield from _consecutive(bases[same.start() : same.end()], size, kind & _KEPT | (kind & 1) << 8)


def _kinds(body: bytes) -> bytes:
    """A byte for each block of version 1; as a number all of them are made at once."""
    low, high = body[_ENTRY - 1 :: _ENTRY].translate(_LOW), body[_ENTRY - 2 :: _ENTRY].translate(_HIGH)
    return (int.from_bytes(low, "big") | int.from_bytes(high, "big")).to_bytes(len(low), "big")


def _consecutive(bases: array[int], size: int, flags: int) -> Iterator[LmbRun]:
    first, last = bases[0], bases[0] + (len(bases) - 1) * size
    if last < 1 << 64 and bases == array("Q", range(first, last + 1, size)):
        yield _run(first, len(bases), size, flags)
        return
    at = 0
    while at < len(bases):
        end = at + 1
        while end < len(bases) and bases[end] == bases[end - 1] + size:
            end += 1
        yield _run(bases[at], end - at, size, flags)
        at = end


def _runs_v2(data: bytes, size: int) -> Iterator[LmbRun]:
    total = 0
    for count, base, _, _, flags in _ENTRY_V2.iter_unpack(data[4 : 4 + _ENTRY * _count(data, _V2)]):
        total += count
        if total > _MAX_LMBS:
            raise FormatError(f"{_V2} claims {total} memory blocks", source="device tree")
        if count:
            yield _run(base, count, size, flags & _KEPT)


def _run(base: int, count: int, size: int, flags: int) -> LmbRun:
    # A plan writes every address, ends included, as a 64-bit number.
    if base + count * size >= 1 << 64:
        raise FormatError(f"{count} memory blocks of {size:#x} bytes at {base:#x} reach beyond 64 bits", source="device tree")
    return LmbRun(Range.sized(base, count * size), size, flags)


def _count(data: bytes, name: str) -> int:
    count = int.from_bytes(data[:4], "big")
    if len(data) < 4 or len(data) < 4 + count * _ENTRY:
        raise FormatError(f"{name} says {count} entries but holds {len(data)} bytes", source="device tree")
    return count
