"""A handover about to begin, small enough to be disturbed at every instruction; and what may go wrong with it.

The table is the product's own, over a few lines: each line of a row goes through the same instructions, and nothing is carried
from one to the next but addresses and a count. Where K1's and K2's exception vectors and K2's slave code would be are branches
to places of their own, so that a CPU that comes to them is seen there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from crashkernel.bench.model import make
from crashkernel.bench.stubs import Code
from crashkernel.machine import HEAD_SIZE, Services
from crashkernel.memory import Range
from crashkernel.placement import tables
from crashkernel.placement.moves import Check
from crashkernel.purgatory import (
    CRC_OFFSET,
    LOG_OFFSET,
    PARAMETERS_OFFSET,
    SAVED_HEAD_OFFSET,
    STATE_OFFSET,
    TABLE_OFFSET,
    pack,
)
from crashkernel.purgatory.digest import digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crashkernel.bench.stepper import BYTES
    from crashkernel.placement.moves import Move

Placement = Literal["zero", "reserved"]
PLACEMENTS: tuple[Placement, ...] = ("zero", "reserved")

PAGE = 0x1000
DMA_SIZE = 64
BIT = 0x10
"""The bit of a byte that is flipped unless another is meant."""
PHYSICAL = 0x11
"""The crashing CPU's id."""
OTHER = 0x12
"""The second CPU's."""

ARENA = 0x40000
CONSOLE = 0x38000
"""What came to the console: its length in 8 bytes, then the text."""
_PARKED, _BASE, _TREE, _INITRD, _CORE, _OPAL, _ENDS = 0x8000, 0x20000, 0x30000, 0x31000, 0x32000, 0x34000, 0x36000
_BACKUP, _IMAGE = 0x8000, 0xC000  # of a reserved placement
_SMALL = 0x200  # bytes of a segment, and of what of K2 is above its low page: four lines
_K1 = 0x4000  # bytes of K1 that are looked at
_FDT_BOOT_CPUID = 28
_VECTORS = (*range(0x100, 0xE00, 0x80), *range(0xE00, 0x1000, 0x20))  # Power ISA Book III 7.5

SET_UP = _ENDS + 0x400
"""Code that makes r5 a CPU's HID0 and r6 its SPRG3: two instructions. The debugger has neither register of a second CPU."""
REBOOTED, IN_K1, IN_K2, SLAVE_IN_K2 = (_ENDS + 0x100 * number for number in range(4))
"""Where a CPU stands when the firmware was asked to reboot, at any of K1's vectors, at any of K2's, at K2's slave code."""


@dataclass(frozen=True)
class Scene:
    """Memory when the crashing CPU comes, and what is to come of it."""

    name: str
    base: int
    entry: int
    moves: tuple[Move, ...]
    memory: BYTES = field(repr=False)
    spots: Mapping[str, int] = field(repr=False)
    """Where a DMA write may strike: addresses by name."""
    final: BYTES = field(repr=False)
    """Memory when K2 is entered, by the model."""
    loaded: Mapping[str, Range] = field(repr=False)
    """Where each segment lies then."""
    origins: tuple[np.ndarray[tuple[int], np.dtype[np.int64]], ...] = field(repr=False)
    """Before the first row and after each: for each byte of memory which of K1's lies there, -1 for none."""
    homes: np.ndarray[tuple[int], np.dtype[np.int64]] = field(repr=False)
    """For each byte of K1's where it lies at the end, by its address at K1's death."""
    tree: int = _TREE
    opal: int = _OPAL


def scene(placement: Placement, *, slaves: int = 0, slave_timeout: int = 0) -> Scene:
    """A table of the product's own making, with its purgatory, K1 and everything that is loaded."""
    memory = np.random.default_rng(1).integers(1, 256, ARENA, np.uint8)
    memory[CONSOLE:] = 0
    _put_vectors(memory, 0, IN_K1)
    head = memory[:HEAD_SIZE].copy()
    upper = [Range.sized(at, _SMALL) for at in (_CORE, _TREE, _INITRD)]  # the kernel is checked last, as in the loader's plans
    moves: tuple[Move, ...]
    if placement == "zero":
        size, entry, k2_waits = PAGE + _SMALL, 0, _PARKED
        k2 = Range(0, size)
        moves = tables.zero(size, _PARKED, _BASE, [*upper, Range(PAGE, size)])
        spots = {
            "K1's low page, parked; K2's before": _PARKED + 0x400,
            "K1 parked; K2 before": _PARKED + PAGE,
            "K1 parked; K2 before, end": _PARKED + size - DMA_SIZE,
            "K2; K1 before": PAGE,
            "K2; K1 before, end": size - DMA_SIZE,
        }
        _put_vectors(memory, _PARKED, IN_K2)
    else:
        size, entry, low, k2_waits = 2 * _SMALL, _IMAGE, PAGE + _SMALL, _IMAGE
        k2 = Range.sized(_IMAGE, size)
        moves = tables.reserved(low, _BACKUP, _IMAGE, _BASE, [*upper, k2])
        spots = {
            "K2": _IMAGE,
            "K2, end": _IMAGE + size - DMA_SIZE,
            "K1's backup": _BACKUP,
            "K1's backup, end": _BACKUP + low - DMA_SIZE,
            "K1's low memory": PAGE,
        }
    put(memory, k2_waits + 0x60, _way(SLAVE_IN_K2))
    spots |= {"page 0, head": 0, "page 0, slaves' entry": 0x40, "page 0, machine check": 0x200, "page 0, end": PAGE - DMA_SIZE}
    spots |= {"save page": _BASE + tables.SAVE_OFFSET, "save page, end": _BASE + tables.SAVE_OFFSET + PAGE - DMA_SIZE}
    for name, offset in (
        ("head", 0), ("vectors", 0x200), *((f"code +{at:#x}", at) for at in range(0x1000, 0x1D00, 0x100)),
        ("parameters", PARAMETERS_OFFSET), ("parameters, OPAL", PARAMETERS_OFFSET + 0x40), ("K1's head", SAVED_HEAD_OFFSET),
        ("first row", TABLE_OFFSET), ("a row's text", TABLE_OFFSET + 0x460), ("last row", TABLE_OFFSET + 0x100 * len(moves)),
        ("CRC tables", CRC_OFFSET), ("digest", STATE_OFFSET), ("code's digest", STATE_OFFSET + 0x40),
        ("state", STATE_OFFSET + 0x80), ("log", LOG_OFFSET),
    ):  # fmt: skip
        spots["purgatory: " + name] = _BASE + offset
    spots |= {"tree": _TREE, "tree, end": _TREE + _SMALL - DMA_SIZE, "initrd": _INITRD, "elfcorehdr": _CORE}
    expected, after = [], memory.copy()
    for move in moves:
        make(after, [move], head)
        if isinstance(move, Check):
            expected.append((f"{move.at:#x}", digest(after[move.at : move.at + move.size].tobytes(), move.size)))
    image = pack(
        _BASE, moves, head.tobytes(), fdt=_TREE, entry=entry, expected=expected, on_damage="reboot", slaves=slaves,
        slave_timeout=slave_timeout, services=Services("opal", console=0, opal=(_OPAL, _OPAL)),
    )  # fmt: skip
    origins = [np.where(np.arange(ARENA) < _K1, np.arange(ARENA), -1)]
    for move in moves:
        origins.append(origins[-1].copy())
        make(origins[-1], [move], np.arange(HEAD_SIZE))
    homes = np.arange(_K1)
    lying = np.flatnonzero(origins[-1] >= 0)
    homes[origins[-1][lying]] = lying  # of a byte that lies twice the higher one: the parked one, the backup
    put(memory, _BASE, bytes(0x10000))
    put(memory, _BASE, image)
    put(memory, 0, image[:HEAD_SIZE])  # kexec_sequence
    put(memory, _OPAL, opal_stub())
    put(memory, SET_UP, bytes(Code().mtspr(1008, 5).mtspr(275, 6)))
    for end in (REBOOTED, IN_K1, IN_K2, SLAVE_IN_K2):
        put(memory, end, bytes(Code().stop()))
    put(after, _TREE + _FDT_BOOT_CPUID, PHYSICAL.to_bytes(4, "big"))
    loaded = {"K2": k2, "elfcorehdr": upper[0], "tree": upper[1], "initrd": upper[2]}
    if placement == "reserved":
        loaded["K2's head"] = Range(0, HEAD_SIZE)
    return Scene(placement, _BASE, entry, moves, memory, spots, after, loaded, tuple(origins), homes)


def opal_stub() -> bytes:
    """A firmware that appends what it is to print to the text at `CONSOLE`, behind its length, and stands still to reboot."""
    code = Code().cmpdi(0, 6).branch("reboot", "beq").cmpdi(0, 1).branch("out", "bne")
    code.load(6, CONSOLE).ld(7, 0, 6).ld(8, 0, 4).cmpdi(8, 0).branch("out", "beq").mtspr(9, 8)
    code.addi(9, 6, 8).add(9, 9, 7).add(7, 7, 8).std(7, 0, 6)
    code.label("letter").word(34 << 26 | 10 << 21 | 5 << 16).word(38 << 26 | 10 << 21 | 9 << 16)  # lbz r10,0(r5); stb r10,0(r9)
    code.addi(5, 5, 1).addi(9, 9, 1).branch("letter", "bdnz")
    code.label("out").load(3, 0).word(0x4E800020)  # blr
    code.label("reboot").load(3, REBOOTED).mtspr(9, 3).word(0x4E800420)  # bctr
    return bytes(code)


def put(memory: BYTES, at: int, data: bytes) -> None:
    """Store bytes."""
    memory[at : at + len(data)] = np.frombuffer(data, np.uint8)


def _put_vectors(memory: BYTES, page: int, target: int) -> None:
    for vector in _VECTORS:
        put(memory, page + vector, _way(target))


def _way(target: int) -> bytes:
    """A jump to an absolute address in either byte order. The first word is no-op or `b .+8`, as in the purgatory's head."""
    branch = 18 << 26 | target | 2
    return (0x08000048).to_bytes(4, "big") + branch.to_bytes(4, "big") + branch.to_bytes(4, "little")


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong. `at` is an address for a DMA write or a flipped bit, a vector for an interrupt."""

    kind: Literal["none", "DMA", "bit", "interrupt"]
    name: str
    at: int = 0
    mask: int = BIT
    """Of a flipped bit."""

    @property
    def in_memory(self) -> bool:
        """Whether the CPU meets it in memory alone."""
        return self.kind in {"DMA", "bit"}

    @property
    def struck(self) -> Range:
        """What of memory it changes."""
        return Range.sized(self.at, {"DMA": DMA_SIZE, "bit": 1}.get(self.kind, 0))


NO_FAULT = Fault("none", "none")


def faults_of(scene: Scene) -> tuple[Fault, ...]:
    """All that is injected into it."""
    return (
        *(Fault("DMA", name, at) for name, at in scene.spots.items()),
        *(Fault("bit", name, at + 0x1C) for name, at in scene.spots.items()),
        Fault("interrupt", "machine check", 0x200),
        Fault("interrupt", "system reset", 0x100),
    )
