"""Generated plans: tables of the product's own making in an arena of a few MiB, and random ones whose order shows.

A plan is a function of the seed, the CPU, the byte order, the kind and a number; nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from crashkernel.bench.cpus import CPUS, MIB
from crashkernel.bench.model import PURGATORY_SIZE, Case, make
from crashkernel.bench.stubs import ARENA, k2_code
from crashkernel.errors import UsageError
from crashkernel.machine import HEAD_SIZE, Services
from crashkernel.memory import Range
from crashkernel.placement import tables
from crashkernel.placement.moves import LINE, Check, Copy, Exchange, Move, Put

Kind = Literal["zero", "reserved", "linked", "random"]
KINDS: tuple[Kind, ...] = ("zero", "reserved", "linked", "random")

PAGE = 0x1000
VECTORS = Range(0x100, 0x3000)
"""Where a kernel linked elsewhere has its branches (KDUMP_TRAMPOLINE_START, KDUMP_TRAMPOLINE_END, asm/kdump.h)."""
_BLOCK = 64  # a check is of whole ones
_RANDOM_ROWS = (1, 2, 3, 4, 5, 6, 8, 12)


@dataclass(frozen=True, slots=True)
class CaseName:
    """Which case of a seed."""

    cpu: str
    little: bool
    kind: Kind
    number: int

    def __str__(self) -> str:
        return f"{self.cpu}-{'LE' if self.little else 'BE'}-{self.kind}-{self.number}"

    @classmethod
    def parse(cls, text: str) -> CaseName:
        """The name as printed.

        :raise UsageError: it is none.
        """
        cpu, _, rest = text.partition("-")
        order, _, rest = rest.partition("-")
        kind, _, number = rest.partition("-")
        known = [each for each in KINDS if each == kind]
        if cpu not in CPUS or order not in ("BE", "LE") or not known or not number.isdecimal():
            raise UsageError(f"{text!r} names no case", hint="a name is like POWER9-LE-zero-17")
        if order == "LE" and not CPUS[cpu].little:
            raise UsageError(f"the {cpu} is big-endian only")
        return cls(cpu, order == "LE", known[0], int(number))

    @property
    def cpus(self) -> int:
        """How many CPUs the case runs on: in every fourth one, where there are two, K1's other CPU comes too."""
        return 2 if self.kind != "random" and self.number % 4 == 0 and CPUS[self.cpu].count > 1 else 1

    def generate(self, seed: int) -> Case:
        """The case."""
        source = random.Random(f"{seed}/{self}")  # noqa: S311  (not for secrets)
        settings = _surroundings(source, self.cpus) | {"little": self.little}
        builders = {"zero": _zero, "reserved": _reserved, "linked": _linked, "random": _random}
        return Case(**builders[self.kind](source), **settings)


def _surroundings(source: random.Random, cpus: int) -> dict[str, Any]:
    """Who comes and when, and what the firmware is: nothing the moves depend on."""
    ids = tuple(source.sample(range(0x800), cpus))
    opal = (source.getrandbits(64), source.getrandbits(64)) if source.random() < 0.5 else (0, 0)
    settings: dict[str, Any] = {"ids": ids, "delays": (0,) * cpus, "services": Services(opal=opal)}
    settings["altivec"] = source.random() < 0.5
    if cpus > 1:
        delay = source.choice((0, source.randrange(1, 200_000)))
        # both at once, the crashing CPU late, the other one late
        settings["delays"] = source.choice(((0, 0), (delay, 0), (0, delay)))
        settings |= {"slaves": 1, "slave_timeout": 1 << 40}
    elif source.random() < 0.1:  # CPUs that never come are not waited for
        settings |= {"slaves": source.randrange(1, 4), "slave_timeout": source.randrange(50_000)}
    else:
        settings["slave_timeout"] = source.choice((0, 1 << 40))
    return settings


class _Space:
    """The arena while a plan is laid out in it: what is placed never overlaps, and often touches."""

    def __init__(self, source: random.Random, taken: Sequence[Range]) -> None:
        self._source, self._taken = source, list(taken)

    def place(self, size: int, *, align: int = PAGE) -> int:
        """Take `size` bytes somewhere, every second time next to something taken."""
        while True:
            if self._source.random() < 0.5:
                neighbour = self._source.choice(self._taken)
                at = self._source.choice((neighbour.end, neighbour.start - size))
            else:
                at = self._source.randrange(ARENA - size) // align * align
            if at < 0 or at + size > ARENA or at % align:
                continue
            wanted = Range.sized(at, size)
            if not any(wanted.overlaps(taken) for taken in self._taken):
                self._taken.append(wanted)
                return at


def _size(source: random.Random, smallest: int, largest: int, unit: int) -> int:
    """Bytes, a multiple of `unit`: as many small ones as large ones."""
    return max(smallest, int(smallest * (largest / smallest) ** source.random()) // unit * unit)


def _k1(source: random.Random) -> int:
    """K1's size: it lies at 0, and the region begins behind it."""
    return _size(source, 4 * PAGE, 2 * MIB if source.random() < 0.1 else MIB // 2, PAGE)


def _checks(source: random.Random, stretches: Sequence[Range]) -> list[Range]:
    """Segments to be checked, some of them in two parts."""
    checks = []
    for stretch in stretches:
        if source.random() < 0.5:
            middle = stretch.start + source.randrange(_BLOCK, stretch.size, _BLOCK)
            checks += [Range(stretch.start, middle), Range(middle, stretch.end)]
        else:
            checks.append(stretch)
    return checks


def _zero(source: random.Random) -> dict[str, Any]:
    """K2 smaller than K1, as large, or larger; the region next to K1 or further up."""
    k1 = _k1(source)
    size = source.choice((_size(source, PAGE, k1 - LINE, LINE), k1, k1 + _size(source, LINE, k1, LINE)))
    region = k1 if source.random() < 0.5 else k1 + source.randrange(PAGE, MIB, LINE)
    lowest = max(region, size)
    parked = lowest if source.random() < 0.3 else source.randrange(lowest, ARENA - size - MIB, LINE)
    space = _Space(source, (Range(0, lowest), Range.sized(parked, size)))
    base, tree, initrd = space.place(PURGATORY_SIZE), space.place(PAGE), space.place(4 * PAGE, align=LINE)
    upper = (Range(PAGE, size),) if size > PAGE else ()
    checks = _checks(source, (*upper, Range.sized(initrd, 4 * PAGE), Range.sized(tree, PAGE)))
    moves = tables.zero(size, parked, base, checks)
    return {"moves": moves, "base": base, "tree": tree, "entry": 0, "k2_at": parked, "k2": k2_code(trap=True)}


def _reserved(source: random.Random) -> dict[str, Any]:
    k1 = _k1(source)
    low = _size(source, PAGE, k1, LINE)
    image_size = _size(source, PAGE, MIB // 2, LINE)
    space = _Space(source, (Range(0, k1),))
    backup, image = space.place(low, align=LINE), space.place(image_size)
    base, tree = space.place(PURGATORY_SIZE), space.place(PAGE)
    checks = _checks(source, (Range.sized(image, image_size), Range.sized(tree, PAGE)))
    moves = tables.reserved(low, backup, image, base, checks)
    return {"moves": moves, "base": base, "tree": tree, "entry": image, "k2_at": image}


def _linked(source: random.Random) -> dict[str, Any]:
    """As in 2005: only low pages change places; K2 runs where it is linked and takes its exceptions there."""
    low = source.choice((VECTORS.end, VECTORS.end + PAGE, 16 * PAGE))
    k1 = max(_k1(source), low)
    image_size = _size(source, PAGE, MIB // 2, LINE)
    space = _Space(source, (Range(0, k1),))
    parked, link = space.place(low, align=LINE), space.place(image_size)
    base, tree = space.place(PURGATORY_SIZE), space.place(PAGE)
    k2 = k2_code(trap=True)
    checks = _checks(source, (Range(PAGE, low), Range.sized(link, image_size), Range.sized(tree, PAGE)))
    moves = tables.zero(low, parked, base, checks)
    places = ((parked, k2[:HEAD_SIZE] + branches(link)),)
    return {"moves": moves, "base": base, "tree": tree, "entry": link, "k2_at": link, "k2": k2, "places": places}


def branches(link: int) -> bytes:
    """What K2 linked at `link` has in place of its vectors: every 8 bytes `nop; b` to the same place of its own image.

    A branch reaches 32 MiB, forwards or backwards. (create_trampoline, arch/powerpc/kernel/crash_dump.c)
    """
    branch = 18 << 26 | (link - 4) & 0x3FFFFFC
    return (0x60000000 << 32 | branch).to_bytes(8, "big") * (VECTORS.size // 8)


def _random(source: random.Random) -> dict[str, Any]:
    """Moves anywhere but over the purgatory, the tree and K2's code, each of what the one before it has written."""
    space = _Space(source, (Range(ARENA, ARENA + PAGE), Range(0, HEAD_SIZE)))
    base, tree, entry = space.place(PURGATORY_SIZE), space.place(PAGE), space.place(PAGE)
    forbidden = (Range.sized(base, PURGATORY_SIZE), Range.sized(tree, PAGE), Range.sized(entry, PAGE))
    moves = random_table(source, source.choice(_RANDOM_ROWS), forbidden)
    return {"moves": moves, "base": base, "tree": tree, "entry": entry, "k2_at": entry}


def random_table(source: random.Random, rows: int, forbidden: Sequence[Range]) -> tuple[Move, ...]:
    """So many moves and a few checks between them. The moves' order shows: see `order_shows`."""
    while True:
        moves: list[Move] = []
        while len(moves) < rows:
            move = _random_move(source, moves)
            if move is not None and not any(r.overlaps(f) for r in stretches(move) for f in forbidden):
                moves.append(move)
        if order_shows(moves):
            break
    for _ in range(source.randrange(3)):
        before = source.randrange(len(moves) + 1)
        check = Check(source.randrange(ARENA // LINE) * LINE, _size(source, _BLOCK, 16 * PAGE, _BLOCK))
        # what the loader cannot know it cannot have checked: the purgatory itself, its head included, wherever it was moved
        held = _lines(moves[:before])[check.at // LINE : -(-(check.at + check.size) // LINE)]
        if (held >= 0).all() and not any(check.range.overlaps(f) for f in (*forbidden, Range(ARENA, 2 * ARENA))):
            moves.insert(before, check)
    return tuple(moves)


def stretches(move: Move) -> tuple[Range, ...]:
    """What a move reads or writes of memory."""
    match move:
        case Check():
            return (move.range,)
        case Put(dst, _, size):
            return (Range.sized(dst, size),)
        case _:
            return Range.sized(move.dst, move.size), Range.sized(move.src, move.size)


def _random_move(source: random.Random, moves: Sequence[Move]) -> Move | None:
    lines = ARENA // LINE
    size = source.choice((1, 2, 3, 8, 33, _size(source, 1, 2 * MIB // LINE, 1)))
    one, other = source.randrange(lines - size), source.randrange(lines - size)
    if moves:
        written = source.choice(stretches(moves[-1]))
        one = source.randrange(written.start // LINE - size + 1, written.end // LINE)  # overlaps by a line at least
        if source.random() < 0.5:
            touched = source.choice(stretches(source.choice(moves)))
            other = source.choice((touched.end // LINE, touched.start // LINE - size))
    if source.random() < 0.5:
        one, other = other, one
    if source.random() < 0.1:
        size = source.randrange(1, HEAD_SIZE // LINE + 1)
        other = one
    if not (0 <= one <= lines - size and 0 <= other <= lines - size):
        return None
    if one == other:
        origin = source.randrange(HEAD_SIZE // LINE - size + 1) if size <= HEAD_SIZE // LINE else -1
        return Put(one * LINE, origin * LINE, size * LINE) if origin >= 0 else None
    if abs(one - other) < size:
        return None
    return source.choice((Copy, Exchange))(one * LINE, other * LINE, size * LINE)


def order_shows(moves: Sequence[Move]) -> bool:
    """Whether memory tells this table from the same with any two neighbours swapped, any row left out, or all reversed."""
    states = [_lines(())]
    for move in moves:
        states.append(_after(states[-1], (move,)))
    others = [_after(states[at], (moves[at + 1], moves[at], *moves[at + 2 :])) for at in range(len(moves) - 1)]
    others += [_after(states[at], moves[at + 1 :]) for at in range(len(moves))]
    if len(moves) > 1:
        others.append(_lines(moves[::-1]))
    return not any(np.array_equal(other, states[-1]) for other in others)


def _lines(moves: Sequence[Move]) -> Any:
    """Memory by lines: whose line of K1 each holds. The first are negative: the purgatory's head, not K1's any more."""
    lines = np.arange(ARENA // LINE, dtype=np.int32)
    lines[: HEAD_SIZE // LINE] = -1 - lines[: HEAD_SIZE // LINE]
    return _after(lines, moves)


def _after(lines: Any, moves: Sequence[Move]) -> Any:
    after = lines.copy()
    make(after, moves, np.arange(HEAD_SIZE // LINE, dtype=np.int32), LINE)
    return after
