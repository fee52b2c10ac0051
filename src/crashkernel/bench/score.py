"""What an undisturbed handover does, instruction by instruction: which run, what they touch, and which of them to disturb.

A check of some kilobytes is some hundred thousand instructions, a loop of few over one block after the other. Every pass
through such a loop executes the same instructions on the next block, with nothing carried over but an address, a count, and
the sums that the loop is for. So the first pass, one in the middle and the last are disturbed, at every instruction; the one in
the middle counts for all between. Outside loops every instruction is disturbed.

The passes between are not stepped through either. What they touch is reckoned from those that are: addresses go on linearly,
but for the look-ups in the CRC tables, which may be anywhere in those.

Nor is a stretch of code that only loads and reckons, of which the loop of a check consists: what it does is reckoned here too,
instruction by instruction; then the CPU runs over it, and its registers have to be the ones that were reckoned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from crashkernel.bench.scene import REBOOTED
from crashkernel.errors import VerificationError
from crashkernel.memory import Range
from crashkernel.purgatory import CRC_OFFSET, LOG_OFFSET, LOG_SIZE, STATE_OFFSET

if TYPE_CHECKING:
    from crashkernel.bench.scene import Scene
    from crashkernel.bench.stepper import BYTES, Stepper

CHECK, FETCH, USE = range(3)
"""How a byte is touched: read by a check, executed, or loaded or stored by anything else."""

_AGES = 60.0  # seconds for what takes none
_STRETCH = 8  # instructions; a shorter stretch is stepped through
_MANY = 20  # passes of a loop; one of fewer is stepped through
_LOOP = 0x400  # bytes of code that a loop spans at most
_TOO_MANY = 10_000_000  # instructions of a handover that has lost its way
_LENGTH_OFFSET = STATE_OFFSET + 0x90  # P_LOG_END
_DOUBLEWORD = (1 << 64) - 1
_SUM = 0x549A55BA  # rlwinm r26,r4,10,22,29: comes two after each load of `check`, and nowhere else (crc_word, purgatory.S)

_BLR = 0x4E800020
_REBOOT = 6  # OPAL_CEC_REBOOT


@dataclass(frozen=True, slots=True)
class Point:
    """An instruction about to be executed. `index` counts from the purgatory's first; it counts for `weight` instructions."""

    index: int
    pc: int
    phase: str
    weight: int


@dataclass(frozen=True)
class Score:
    """An undisturbed handover."""

    pcs: npt.NDArray[np.int64]
    """Every instruction's address."""
    accesses: npt.NDArray[np.int64]
    """Rows of index, address, width in bytes and kind of touch: all but fetches."""
    phases: tuple[tuple[int, str], ...]
    """From which instruction on which row is at work."""
    jumps: frozenset[int]
    """Addresses of branches that do not note where they come from."""
    checked_at: int
    """Where a check of anything has its result."""

    def touches(self, struck: Range) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """When any of these bytes is touched, in order, and how."""
        index, at, width, kind = self.accesses.T
        hit = (at < struck.end) & (at + width > struck.start)
        fetched = np.flatnonzero((self.pcs < struck.end) & (self.pcs + 4 > struck.start))
        indices = np.concatenate([index[hit], fetched])
        kinds = np.concatenate([kind[hit], np.full(len(fetched), FETCH)])
        order = np.argsort(indices, kind="stable")
        return indices[order], kinds[order]

    def last_check(self, place: Range) -> int:
        """When a check last reads any of these bytes; -1 if none does."""
        indices, kinds = self.touches(place)
        read = indices[kinds == CHECK]
        return int(read[-1]) if len(read) else -1

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """What is disturbed, in order."""
        weights = np.ones(len(self.pcs), np.int64)
        for starts in self._loops():  # of the second pass and all after it
            if len(starts) < 3:
                continue
            middle = len(starts[:-1]) // 2
            weights[starts[0] : starts[-1]] = 0
            weights[starts[middle] : starts[middle + 1]] = len(starts) - 1
        numbers = np.flatnonzero(weights)
        begins = np.array([begin for begin, _ in self.phases])
        names = [name for _, name in self.phases]
        at = np.searchsorted(begins, numbers, "right") - 1
        return tuple(Point(int(n), int(self.pcs[n]), names[a], int(weights[n])) for n, a in zip(numbers, at, strict=True))

    def _loops(self) -> list[list[int]]:
        """Loops that call nothing: for each time one was run, where its passes but the first begin."""
        step = np.diff(self.pcs)
        back = [i for i in np.flatnonzero((step < 0) & (step >= -_LOOP)).tolist() if int(self.pcs[i]) in self.jumps]
        found: list[list[int]] = []
        for last, this in pairwise([-1, *back]):
            low, high = int(self.pcs[this + 1]), int(self.pcs[this])
            again = last >= 0 and self.pcs[last] == high and self.pcs[last + 1] == low
            if again:
                body = self.pcs[last + 1 : this + 1]
                again = low <= int(body.min()) and int(body.max()) <= high
            if again:
                found[-1].append(this + 1)
            else:
                found.append([this + 1])
        return found


def phase_of(log: bytes) -> str:
    """What the purgatory is at, by its log: the row whose line it began last."""
    text = log.split(b"\0", 1)[0].decode("ascii", "replace")
    begun = re.findall(r"crashkernel: (\d+)/\d+ (\w+) ", text)
    return f"{begun[-1][0]} {begun[-1][1]}" if begun else "before the rows"


def score(stepper: Stepper, scene: Scene) -> Score:
    """Step through a handover; the CPU stands at its first instruction.

    :raise VerificationError: it does not come to K2.
    """
    return _Scribe(stepper, scene).write()


class _Scribe:
    def __init__(self, stepper: Stepper, scene: Scene) -> None:
        self._stepper, self._scene = stepper, scene
        self._pcs: list[int] = []
        self._accesses: list[tuple[int, int, int, int]] = []
        image = scene.memory[scene.base : scene.base + STATE_OFFSET].tobytes()
        sums = [at for at in range(0, len(image), 4) if int.from_bytes(image[at : at + 4], "big") == _SUM]
        self._check_loads = {scene.base + at - 8 for at in sums}
        self._tables = Range.sized(scene.base + CRC_OFFSET, 0x1000)

    def _word(self, pc: int) -> int:
        return int.from_bytes(self._stepper.memory[pc : pc + 4].tobytes(), "big")

    def write(self) -> Score:
        stepper, scene, memory = self._stepper, self._scene, self._stepper.memory
        log = slice(scene.base + LOG_OFFSET, scene.base + LOG_OFFSET + LOG_SIZE)
        length = slice(scene.base + _LENGTH_OFFSET, scene.base + _LENGTH_OFFSET + 8)
        phases, logged = [(0, phase_of(b""))], b""
        (pc,) = stepper.read("pc")
        while pc != scene.entry:
            if len(self._pcs) > _TOO_MANY or not 0 <= pc < REBOOTED:
                raise VerificationError(f"an undisturbed handover comes to {pc:#x}")
            if pc == scene.opal:
                pc = self._firmware()
                continue
            if (now := memory[length].tobytes()) != logged:
                logged, phase = now, phase_of(memory[log].tobytes())
                if phase != phases[-1][1]:
                    phases.append((len(self._pcs), phase))
            pc = self._go_on(pc)
            last = self._pcs[-1]
            if pc < last <= pc + _LOOP and self._word(last) & 0xFFE00001 == 0x42000000:  # bdnz, and it went back
                self._hurry(pc, last)
        words = {at: self._word(at) for at in set(self._pcs)}
        jumps = frozenset(at for at, word in words.items() if word >> 26 in {16, 18} and not word & 1)
        checked_at = max(self._check_loads)
        while words[checked_at] != _BLR:
            checked_at += 4
        return Score(np.array(self._pcs), np.array(self._accesses), tuple(phases), jumps, checked_at)

    def _go_on(self, pc: int) -> int:
        """Over one instruction, or over a stretch of them; the address of the next."""
        end = pc
        while _is_reckoned(self._word(end)):
            end += 4
        return self._run_over(pc, end) if end >= pc + 4 * _STRETCH else self._step(pc)

    def _run_over(self, pc: int, end: int) -> int:
        names = [f"r{number}" for number in range(32)]
        registers = list(self._stepper.read(*names))
        for at in range(pc, end, 4):
            loaded = _reckon(self._word(at), registers, self._stepper.memory)
            if loaded is not None:
                self._accesses.append((len(self._pcs), *loaded, CHECK if at in self._check_loads else USE))
            self._pcs.append(at)
        self._run_to(end)
        if list(self._stepper.read(*names)) != registers:
            raise VerificationError(f"an undisturbed handover does not do what its instructions from {pc:#x} on say")
        return end

    def _step(self, pc: int) -> int:
        found = _access(self._word(pc))
        index = len(self._pcs)
        self._pcs.append(pc)
        if found is None:
            return self._stepper.step()
        base, other, offset, width = found
        after, *values = self._stepper.step_reading(*(f"r{n}" for n in (base, other) if n))
        at = sum(values) + offset & _DOUBLEWORD
        self._accesses.append((index, at, width, CHECK if pc in self._check_loads else USE))
        return after

    def _firmware(self) -> int:
        """It is not ours: let it run. It reads the text and the length it is given, and writes the length."""
        token, text, length, back = self._stepper.read("r0", "r5", "r4", "lr")
        if token == _REBOOT:
            raise VerificationError("an undisturbed handover is given up by the purgatory")
        if token == 1:
            size = int.from_bytes(self._stepper.memory[length : length + 8].tobytes(), "big")
            self._accesses += [(len(self._pcs), text, size, USE), (len(self._pcs), length, 8, USE)]
        self._run_to(back)
        return back

    def _run_to(self, address: int) -> None:
        self._stepper.stop_at([address])
        if self._stepper.run(_AGES) is None:
            raise VerificationError(f"an undisturbed handover does not come to {address:#x}")
        self._stepper.stop_at(())

    def _hurry(self, low: int, high: int) -> None:
        """At the begin of the second of many passes: to the end of the last but one, with one stepped through in the middle."""
        (left,) = self._stepper.read("ctr")
        body = list(range(low, high + 4, 4))
        if left <= _MANY or self._pcs[-len(body) :] != body:
            return
        start = len(self._pcs)
        first = self._recent(start - len(body))
        before = (left - 1) // 2
        self._pass_over(low, high, before)
        middle_start = len(self._pcs)
        pc = low
        while len(self._pcs) < middle_start + len(body):
            pc = self._go_on(pc)
        middle = self._recent(middle_start)
        self._pass_over(low, high, left - 2 - before)
        for turn in (*range(1, before + 1), *range(before + 2, left)):
            for (index, at, width, kind), (_, then, _, _) in zip(first, middle, strict=True):
                now = index + turn * len(body)
                if at in self._tables:
                    self._accesses.append((now, self._tables.start, self._tables.size, kind))
                else:
                    self._accesses.append((now, at + (then - at) // (before + 1) * turn, width, kind))

    def _recent(self, start: int) -> list[tuple[int, int, int, int]]:
        return [access for access in self._accesses[-1000:] if access[0] >= start]

    def _pass_over(self, low: int, high: int, passes: int) -> None:
        """With the counter made to end the loop after so many: at full speed, then back to its begin with what is left."""
        (left,) = self._stepper.read("ctr")
        self._stepper.write({"ctr": passes})
        self._run_to(high + 4)
        self._stepper.write({"pc": low, "ctr": left - passes})
        self._pcs += list(range(low, high + 4, 4)) * passes


def _is_reckoned(word: int) -> bool:
    """Whether an instruction loads or reckons and does no more, in a way that `_reckon` knows."""
    primary, low = word >> 26, word & 0x7FF
    if primary == 21:  # with a mask that does not wrap
        return not word & 1 and word >> 6 & 31 <= word >> 1 & 31
    return primary in {14, 32} or (primary == 31 and low in {23 << 1, 316 << 1, 444 << 1})


def _reckon(word: int, registers: list[int], memory: BYTES) -> tuple[int, int] | None:
    """Do addi, lwz, lwzx, xor, or, rlwinm (Power ISA Book I 3.3); the address and the width of what it loads."""
    primary, target, source, other = word >> 26, word >> 21 & 31, word >> 16 & 31, word >> 11 & 31
    if (found := _access(word)) is not None:
        base, index, offset, width = found
        at = sum(registers[number] for number in (base, index) if number) + offset & _DOUBLEWORD
        registers[target] = int.from_bytes(memory[at : at + width].tobytes(), "big")
        return at, width
    if primary == 14:
        registers[target] = (registers[source] if source else 0) + (word & 0xFFFF ^ 0x8000) - 0x8000 & _DOUBLEWORD
    elif primary == 21:
        value = registers[target] & 0xFFFFFFFF
        turned = value << other | value >> 32 - other
        first, last = word >> 6 & 31, word >> 1 & 31
        registers[source] = turned & (1 << 32 - first) - (1 << 31 - last)
    elif word & 0x7FF == 316 << 1:
        registers[source] = registers[target] ^ registers[other]
    else:
        registers[source] = registers[target] | registers[other]
    return None


def _access(word: int) -> tuple[int, int, int, int] | None:
    """What an instruction loads or stores: base register, index register, offset, width; register 0 is none (Power ISA)."""
    primary, base = word >> 26, word >> 16 & 31
    if primary == 31:
        width = _INDEXED.get(word >> 1 & 0x3FF)
        return None if width is None else (base, word >> 11 & 31, 0, width)
    if primary not in _OFFSET:
        return None
    offset = (word & 0xFFFF ^ 0x8000) - 0x8000
    return base, 0, offset & ~3 if primary >= 58 else offset, _OFFSET[primary]


_OFFSET = {32: 4, 33: 4, 34: 1, 35: 1, 36: 4, 37: 4, 38: 1, 39: 1, 58: 8, 62: 8}
"""lwz, lwzu, lbz, lbzu, stw, stwu, stb, stbu, ld, std."""
_INDEXED = {23: 4, 87: 1, 21: 8, 151: 4, 215: 1, 149: 8, 84: 8, 214: 8, 103: 16, 231: 16}
"""lwzx, lbzx, ldx, stwx, stbx, stdx, ldarx, stdcx., lvx, stvx."""
