"""Two more ways of asking the CPU itself: every bit of the purgatory flipped, and damage of every form under its check.

Both are about what is in memory when the handover begins; what strikes while it is under way is the fault map's.
"""

from __future__ import annotations

import collections
import random
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from crashkernel.bench.cpus import CPUS
from crashkernel.bench.scene import ARENA, NO_FAULT, PHYSICAL, Fault, put, scene
from crashkernel.bench.stepper import Stepper
from crashkernel.bench.stubs import Code
from crashkernel.bench.walk import OUTCOMES, UNEXPLAINED, Verdict, Walk
from crashkernel.drill.debian import silent
from crashkernel.errors import VerificationError
from crashkernel.machine import HEAD_SIZE
from crashkernel.placement.moves import Check
from crashkernel.purgatory import LOG_OFFSET, LOG_SIZE, pack
from crashkernel.purgatory.digest import digest

if TYPE_CHECKING:
    from crashkernel.bench.scene import Placement
    from crashkernel.drill.debian import Progress

FLIPPED = 0x6140
"""Bytes of the purgatory, from its first, whose bits are flipped: the image and some of the zeros behind it."""
BITS = 8 * FLIPPED
_PARTS = {0x100: "head", 0x1000: "vectors", 0x2000: "code and texts", 0x2100: "parameters", 0x2200: "K1's head",
          0x5000: "table", 0x6000: "CRC tables", 0x6080: "digests", FLIPPED: "state"}  # fmt: skip
"""Where each part of the image ends."""


@dataclass
class BitMap:
    """What came of each flipped bit, by its number from the image's first."""

    scene: str
    cpu: str
    little: bool
    verdicts: dict[int, Verdict] = field(default_factory=dict)

    def table(self) -> dict[str, collections.Counter[str]]:
        """By part of the image: how many bits of each outcome."""
        table: dict[str, collections.Counter[str]] = {}
        for bit, verdict in self.verdicts.items():
            part = next(name for end, name in _PARTS.items() if bit // 8 < end)
            table.setdefault(part, collections.Counter())[verdict.outcome] += 1
        return table

    @property
    def unexplained(self) -> dict[int, Verdict]:
        """Silent for no reason that we know."""
        return {bit: verdict for bit, verdict in self.verdicts.items() if verdict.reason == UNEXPLAINED}


def flip_bits(
    placement: Placement, *, cpu: str = "POWER9", little: bool = True, every: int = 1, progress: Progress = silent
) -> BitMap:
    """Flip each `every`-th bit of the purgatory, after the load and before the crash: K1 copies the flipped head to 0 too.

    The crashing CPU's way alone: what the other CPUs execute of the image counts as good here.
    """
    setting = scene(placement)
    found = BitMap(placement, cpu, little)
    with Walk(cpu, setting, little=little) as walk:
        here = walk.stepper.save()
        for number, bit in enumerate(range(0, BITS, every)):
            at, mask = bit // 8, 0x80 >> bit % 8
            if at < HEAD_SIZE:
                walk.stepper.poke(at, bytes([here.memory[at] ^ mask]))
            found.verdicts[bit] = walk.disturbed(Fault("bit", "the image", setting.base + at, mask), here)
            if not number % 500:
                progress(f"{placement}: {number:,} of {BITS // every:,} bits flipped")
        if walk.disturbed(NO_FAULT, here).outcome != "good":
            raise VerificationError("with nothing flipped the handover is not what it was before")
    return found


# -------------------------------------------------------------------------------------------------- under its check


@dataclass(frozen=True, slots=True)
class Injections:
    """Damaged copies and whole ones that the purgatory's check was shown, and how many it took for the other."""

    cpu: str
    seed: int
    damaged: int
    whole: int
    missed: tuple[str, ...]
    """What it did not tell."""
    imagined: int
    """Whole copies it told of."""


_BASE, _TREE, _ENTRY, _COPIES = 0x20000, 0x30000, 0x31000, 0x32000
_ROWS, _WHOLE = 31, 3  # checks of one run, and how many of them of a copy that is whole
_SIZE = 0x400  # bytes of a copy
_MAX_BURST = 64
_LATE = 60.0


def inject_damage(cpu: str = "POWER9", *, cases: int = 10_000, seed: int = 1, progress: Progress = silent) -> Injections:
    """Let the purgatory check copies of random bytes, each damaged by one flipped bit or a burst of up to 64 bytes.

    A burst begins and ends at any bit: its first and its last are wrong, those between by chance. Half are single bits.
    """
    source, noise = random.Random(seed), np.random.default_rng(seed)  # noqa: S311  (not for secrets)
    rows = [Check(_COPIES + _SIZE * number, _SIZE) for number in range(_ROWS)]
    data = noise.integers(0, 256, (_ROWS, _SIZE), np.uint8)
    expected = [(f"copy {number}", digest(data[number].tobytes(), _SIZE)) for number in range(_ROWS)]
    image = pack(_BASE, rows, bytes(HEAD_SIZE), fdt=_TREE, entry=_ENTRY, expected=expected, on_damage="continue")
    log = slice(_BASE + LOG_OFFSET, _BASE + LOG_OFFSET + LOG_SIZE)
    damaged = whole = imagined = 0
    missed: list[str] = []
    with Stepper.start(CPUS[cpu], ARENA) as stepper:
        put(stepper.memory, _BASE, bytes(0x10000))
        put(stepper.memory, _BASE, image)
        put(stepper.memory, _ENTRY, bytes(Code().stop()))
        stepper.stop_at([_ENTRY])
        while damaged < cases:
            spared = set(source.sample(range(_ROWS), _WHOLE))
            forms = [
                "" if number in spared else _damage(data[number].copy(), source, stepper, number) for number in range(_ROWS)
            ]
            for number in spared:
                put(stepper.memory, rows[number].at, data[number].tobytes())
            stepper.memory[log] = 0
            stepper.enter(_BASE, physical=PHYSICAL, little=False)
            if stepper.run(_LATE) is None:
                raise VerificationError("the purgatory does not come to its end over damaged segments")
            text = stepper.memory[log].tobytes().decode("ascii", "replace")
            told = {int(row) - 1: "DAMAGED" in rest for row, rest in re.findall(r"crashkernel: (\d+)/\d+ (check .*)", text)}
            if len(told) != _ROWS:
                raise VerificationError(f"the purgatory told of {len(told)} checks, not of {_ROWS}")
            missed += [form for number, form in enumerate(forms) if form and not told[number]]
            imagined += sum(told[number] for number in spared)
            damaged, whole = damaged + _ROWS - _WHOLE, whole + _WHOLE
            progress(f"the check on {cpu}: {damaged:,} damaged copies")
    return Injections(cpu, seed, damaged, whole, tuple(missed), imagined)


def _damage(copy: np.ndarray[tuple[int], np.dtype[np.uint8]], source: random.Random, stepper: Stepper, number: int) -> str:
    """Store a damaged copy; what was done to it."""
    bits = 1 if source.random() < 0.5 else source.randint(2, 8 * _MAX_BURST)
    first = source.randrange(8 * _SIZE - bits + 1)
    burst = source.getrandbits(bits) | 1 | 1 << bits - 1
    value = int.from_bytes(copy.tobytes(), "big") ^ burst << 8 * _SIZE - bits - first
    put(stepper.memory, _COPIES + _SIZE * number, value.to_bytes(_SIZE, "big"))
    return f"{bits} bits from bit {first} of {_SIZE} bytes"


def render_injections(each: Injections) -> str:
    """One line, and one for each miss."""
    lines = [
        f"the check on {each.cpu}: {each.damaged:,} damaged copies, {len(each.missed)} missed; "
        f"{each.whole:,} whole ones, {each.imagined} called damaged"
    ]
    return "\n".join([*lines, *(f"MISSED: {form}" for form in each.missed)])


def render_bits(each: BitMap) -> str:
    """A table: parts of the image, and the number of bits of each outcome; reasons of the silent ones."""
    order = "LE" if each.little else "BE"
    title = f"{each.scene}, {each.cpu} {order}: {len(each.verdicts):,} of {BITS:,} bits flipped"
    lines = [f"{title:52}" + "".join(f"{outcome:>15}" for outcome in OUTCOMES)]
    for part, row in each.table().items():
        lines.append(f"{part:52}" + "".join(f"{row[outcome] or '.':>15}" for outcome in OUTCOMES))
    reasons = collections.Counter((v.outcome, v.reason) for v in each.verdicts.values() if v.reason)
    lines += [f"  {outcome}, {reason}: {number:,}" for (outcome, reason), number in reasons.items()]
    lines += [f"UNEXPLAINED: bit {bit % 8} of byte {bit // 8:#x}: {v.outcome}, {v.why}" for bit, v in each.unexplained.items()]
    return "\n".join(lines)
