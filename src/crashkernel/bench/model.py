"""What a case is, and what memory must hold after it. Numpy slices, nothing of the code under test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from crashkernel.bench.stubs import ARENA, Code, k2_code
from crashkernel.machine import HEAD_SIZE, Services
from crashkernel.placement.moves import Check, Exchange, Move, Put
from crashkernel.placement.plan import DamagePolicy
from crashkernel.purgatory import ARRIVED_OFFSET, LOG_OFFSET, LOG_SIZE, STATE_OFFSET, pack
from crashkernel.purgatory.digest import digest

Bytes = npt.NDArray[np.uint8]

PURGATORY_SIZE = 0x10000
"""The purgatory's segment: image, room for K2's low page, log."""
STATE_SIZE = 0x100  # STATE_SIZE in purgatory.S
FDT_BOOT_CPUID = 28


def pattern() -> Bytes:
    """Memory in which every 8 bytes name their own address."""
    words = np.arange(0, ARENA, 8, dtype=np.uint64) | np.uint64(0x5A << 56)
    return words.astype(">u8").view(np.uint8)


_PATTERN = pattern()
_ROOM = np.empty_like(_PATTERN)  # filling pages that exist is three times as fast as asking for new ones
K1_HEAD = _PATTERN[:HEAD_SIZE].tobytes()
"""K1's first bytes, as the loader saved them."""


def make(memory: npt.NDArray[np.generic], moves: Iterable[Move], head: npt.NDArray[np.generic], unit: int = 1) -> None:
    """Make the moves. An element of `memory` and of K1's `head` stands for `unit` bytes."""
    for move in moves:
        if isinstance(move, Check):
            continue
        size = move.size // unit
        dst = slice(move.dst // unit, move.dst // unit + size)
        if isinstance(move, Put):
            memory[dst] = head[move.origin // unit : move.origin // unit + size]
            continue
        src = slice(move.src // unit, move.src // unit + size)
        arriving = memory[src].copy()
        if isinstance(move, Exchange):
            memory[src] = memory[dst]
        memory[dst] = arriving


@dataclass(frozen=True)
class Case:
    """A dead K1 to be handed over: the moves, where everything lies, and how the CPUs come to the purgatory.

    Addresses are physical, below ARENA.
    """

    moves: tuple[Move, ...]
    base: int
    """The purgatory's."""
    tree: int
    entry: int
    """Where K2 is entered."""
    k2_at: int
    """Where K2's code waits before the moves."""
    k2: bytes = field(default_factory=k2_code, repr=False)
    little: bool = False
    """The byte order K1 leaves its CPUs in."""
    ids: tuple[int, ...] = (0x11,)
    """Physical ids of the CPUs that come, the crashing one's first."""
    delays: tuple[int, ...] = (0,)
    """Ticks of the time base that each of them waits before it leaves K1."""
    slaves: int = 0
    """How many others the purgatory expects."""
    slave_timeout: int = 0
    services: Services = field(default_factory=Services)
    altivec: bool = False
    places: tuple[tuple[int, bytes], ...] = field(default=(), repr=False)
    """More bytes of K1's or the loader's: data, not executed where they lie."""
    before: Callable[[Code, int], object] = field(default=lambda _code, _cpu: None, repr=False)
    """More of K1's last instructions on each CPU."""
    on_damage: DamagePolicy = "halt"
    alter: Callable[[bytearray], object] = field(default=lambda _: None, repr=False)
    """What is done to the packed image before it is loaded: for what must go wrong."""

    @cached_property
    def image(self) -> bytes:
        """The purgatory, packed by the product."""
        image = bytearray(
            pack(
                self.base,
                self.moves,
                K1_HEAD,
                fdt=self.tree,
                entry=self.entry,
                expected=self._checked(),
                services=self.services,
                altivec=self.altivec,
                slaves=self.slaves,
                slave_timeout=self.slave_timeout,
                on_damage=self.on_damage,
            )
        )
        self.alter(image)
        return bytes(image)

    def _checked(self) -> list[tuple[str, bytes]]:
        """What the checks are to find, by the model. None of them may be of the image itself."""
        if not any(isinstance(move, Check) for move in self.moves):
            return []
        memory = _ROOM
        memory[:] = _PATTERN
        _put(memory, (*self.places, (self.k2_at, self.k2)))
        found = []
        for move in self.moves:
            if isinstance(move, Check):
                found.append((f"{move.at:#x}", digest(memory[move.at : move.at + move.size].tobytes(), move.size)))
            else:
                make(memory, (move,), _PATTERN[:HEAD_SIZE])
        return found

    def fill(self, memory: Bytes) -> None:
        """Memory when the crashing CPU leaves K1: `kexec_sequence` has copied the purgatory's head to 0."""
        memory[:] = _PATTERN
        _put(memory, (*self.places, *self.code))

    @property
    def code(self) -> Iterator[tuple[int, bytes]]:
        """What is executed: addresses and bytes."""
        yield self.k2_at, self.k2
        yield self.base, self.image.ljust(PURGATORY_SIZE, b"\0")  # kexec_load fills a segment with zeros
        yield 0, self.image[:HEAD_SIZE]

    def hand_over(self, memory: Bytes) -> None:
        """From there to memory when K2 is entered. What the purgatory notes for itself is left as loaded: see `volatile`."""
        make(memory, self.moves, _PATTERN[:HEAD_SIZE])
        boot_cpuid = self.tree + FDT_BOOT_CPUID
        memory[boot_cpuid : boot_cpuid + 4] = np.frombuffer(self.ids[0].to_bytes(4, "big"), np.uint8)

    @property
    def volatile(self) -> tuple[tuple[int, int], ...]:
        """Addresses and sizes of what the purgatory writes in its own image; looked at by name."""
        state_end = STATE_OFFSET + STATE_SIZE
        return (self.base + ARRIVED_OFFSET, state_end - ARRIVED_OFFSET), (self.base + LOG_OFFSET, LOG_SIZE)


def _put(memory: Bytes, places: Iterable[tuple[int, bytes]]) -> None:
    for at, data in places:
        memory[at : at + len(data)] = np.frombuffer(data, np.uint8)
