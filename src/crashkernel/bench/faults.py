"""The fault map: every instruction of a handover, and at each of them everything that might go wrong.

One walk steps the crashing CPU from the purgatory's first instruction to K2's. At each instruction a fault is injected, the
purgatory is let run on to whatever end it finds, the outcome is classed, all is put back, and the walk goes on.

What stands for what:

- A row of a few lines stands for one of a million: each line goes through the same instructions, and nothing is carried from
  one line to the next but addresses and a count. A loop is disturbed in its first pass, in its second if it is short, and in
  its last.
- A DMA write, a flipped bit or a second CPU meets the crashing CPU in memory alone, so these come before each instruction that
  touches memory: between two of those no moment differs from another. A machine check or a system reset is taken at every
  instruction.
- A DMA write is 64 bytes, at the first and at the last such place of what it strikes, between two instructions.
"""

from __future__ import annotations

import collections
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from crashkernel.bench.cpus import CPUS
from crashkernel.bench.model import make
from crashkernel.bench.stepper import MSR_HV, MSR_LE, MSR_ME, MSR_RI, MSR_SF, Stepper
from crashkernel.bench.stubs import Code
from crashkernel.drill.debian import silent
from crashkernel.errors import VerificationError
from crashkernel.machine import HEAD_SIZE, Services
from crashkernel.memory import Range
from crashkernel.placement import tables
from crashkernel.placement.moves import Check
from crashkernel.purgatory import (
    CRC_OFFSET,
    LOG_OFFSET,
    LOG_SIZE,
    PARAMETERS_OFFSET,
    SAVED_HEAD_OFFSET,
    STATE_OFFSET,
    TABLE_OFFSET,
    pack,
)
from crashkernel.purgatory.digest import digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from crashkernel.bench.stepper import BYTES, State
    from crashkernel.drill.debian import Progress

Outcome = Literal["good", "told", "silent damage", "silent hang"]
OUTCOMES: tuple[Outcome, ...] = ("good", "told", "silent damage", "silent hang")
Placement = Literal["zero", "reserved"]

PAGE = 0x1000
DMA_SIZE = 64

_ARENA = 0x40000
_PARKED, _BASE, _TREE, _INITRD, _CORE, _OPAL, _REBOOTED, _CONSOLE = (
    0x8000, 0x20000, 0x30000, 0x31000, 0x32000, 0x34000, 0x36000, 0x38000,
)  # fmt: skip
_BACKUP, _IMAGE = 0x8000, 0xC000  # of a reserved placement
_SMALL = 0x200  # bytes of a segment, and of what of K2 is above its low page: four lines
_K1 = 0x4000  # bytes of K1 that are looked at
_PHYSICAL = 0x11
_FDT_BOOT_CPUID = 28
_COMPLAINTS = (b"DAMAGED", b"exception", b"is no operation")

_RUN = 0.05  # seconds of wall clock after which a run is looked at; it takes a few milliseconds
_PATIENCE = 60  # such looks: a host has other things to do
_STILL = 4  # instructions at most in a loop that goes nowhere
_SHORT_LOOP = 64  # instructions
_HILE = {"POWER8": 1 << 63 - 19, "POWER9": 1 << 63 - 4, "POWER10": 1 << 63 - 4}  # HID0: interrupts come little-endian


# ------------------------------------------------------------------------------------------------------------ the scene


@dataclass(frozen=True)
class Scene:
    """A handover about to begin: memory, and what is to come of it."""

    name: str
    base: int
    entry: int
    memory: BYTES = field(repr=False)
    spots: Mapping[str, int] = field(repr=False)
    """Where a DMA write may strike: addresses by name."""
    final: BYTES = field(repr=False)
    """Memory when K2 is entered, by the model."""
    loaded: Mapping[str, Range] = field(repr=False)
    """Where each segment lies then."""
    homes: np.ndarray[tuple[int], np.dtype[np.int64]] = field(repr=False)
    """For each byte of K1's where it lies then, by its address at K1's death."""
    opal: int = _OPAL
    rebooted: int = _REBOOTED


def scene(placement: Placement) -> Scene:
    """A table of the product's own making over a few lines, with its purgatory, K1 and everything that is loaded."""
    memory = np.random.default_rng(1).integers(1, 256, _ARENA, np.uint8)
    memory[_CONSOLE:] = 0
    head = memory[:HEAD_SIZE].copy()
    upper = [Range.sized(at, _SMALL) for at in (_INITRD, _CORE, _TREE)]
    if placement == "zero":
        size, entry = PAGE + _SMALL, 0
        k2 = Range(0, size)
        moves = tables.zero(size, _PARKED, _BASE, [Range(PAGE, size), *upper])
        spots = {
            "K1's low page, parked; K2's before": _PARKED + 0x400,
            "K1 parked; K2 before": _PARKED + PAGE,
            "K1 parked; K2 before, end": _PARKED + size - DMA_SIZE,
            "K2; K1 before": PAGE,
            "K2; K1 before, end": size - DMA_SIZE,
        }
    else:
        size, entry, low = 2 * _SMALL, _IMAGE, PAGE + _SMALL
        k2 = Range.sized(_IMAGE, size)
        moves = tables.reserved(low, _BACKUP, _IMAGE, _BASE, [k2, *upper])
        spots = {
            "K2": _IMAGE,
            "K2, end": _IMAGE + size - DMA_SIZE,
            "K1's backup": _BACKUP,
            "K1's backup, end": _BACKUP + low - DMA_SIZE,
            "K1's low memory": PAGE,
        }
    spots |= {"page 0, head": 0, "page 0, slaves' entry": 0x40, "page 0, machine check": 0x200, "page 0, end": PAGE - DMA_SIZE}
    spots |= {"save page": _BASE + tables.SAVE_OFFSET, "save page, end": _BASE + tables.SAVE_OFFSET + PAGE - DMA_SIZE}
    for name, offset in (
        ("head", 0), ("vectors", 0x200), ("code", 0x1200), ("parameters", PARAMETERS_OFFSET), ("K1's head", SAVED_HEAD_OFFSET),
        ("table", TABLE_OFFSET), ("CRC tables", CRC_OFFSET), ("digest", STATE_OFFSET), ("state", STATE_OFFSET + 0x80),
        ("log", LOG_OFFSET),
    ):  # fmt: skip
        spots["purgatory: " + name] = _BASE + offset
    spots |= {"tree": _TREE, "tree, end": _TREE + _SMALL - DMA_SIZE, "initrd": _INITRD, "elfcorehdr": _CORE}
    expected, after = [], memory.copy()
    for move in moves:
        make(after, [move], head)
        if isinstance(move, Check):
            expected.append((f"{move.at:#x}", digest(after[move.at : move.at + move.size].tobytes(), move.size)))
    image = pack(
        _BASE, moves, head.tobytes(), fdt=_TREE, entry=entry, expected=expected, on_damage="reboot",
        services=Services("opal", console=0, opal=(_OPAL, _OPAL)),
    )  # fmt: skip
    origins = np.where(np.arange(_ARENA) < _K1, np.arange(_ARENA), -1)
    make(origins, moves, np.arange(HEAD_SIZE))
    homes = np.arange(_K1)
    lying = np.flatnonzero(origins >= 0)
    homes[origins[lying]] = lying  # of a byte that lies twice the higher one: the parked one, the backup
    _put(memory, _BASE, bytes(0x10000))
    _put(memory, _BASE, image)
    _put(memory, 0, image[:HEAD_SIZE])  # kexec_sequence
    _put(memory, _OPAL, opal_stub())
    _put(memory, _REBOOTED, bytes(Code().stop()))
    _put(after, _TREE + _FDT_BOOT_CPUID, _PHYSICAL.to_bytes(4, "big"))
    loaded = {"K2": k2, "tree": upper[2], "initrd": upper[0], "elfcorehdr": upper[1]}
    if placement == "reserved":
        loaded["K2's head"] = Range(0, HEAD_SIZE)
    return Scene(placement, _BASE, entry, memory, spots, after, loaded, homes)


def opal_stub() -> bytes:
    """A firmware that appends what it is to print to the text at `_CONSOLE`, behind its length, and stands still to reboot."""
    code = Code().cmpdi(0, 6).branch("reboot", "beq").cmpdi(0, 1).branch("out", "bne")
    code.load(6, _CONSOLE).ld(7, 0, 6).ld(8, 0, 4).cmpdi(8, 0).branch("out", "beq").mtspr(9, 8)
    code.addi(9, 6, 8).add(9, 9, 7).add(7, 7, 8).std(7, 0, 6)
    code.label("letter").word(34 << 26 | 10 << 21 | 5 << 16).word(38 << 26 | 10 << 21 | 9 << 16)  # lbz r10,0(r5); stb r10,0(r9)
    code.addi(5, 5, 1).addi(9, 9, 1).branch("letter", "bdnz")
    code.label("out").load(3, 0).word(0x4E800020)  # blr
    code.label("reboot").load(3, _REBOOTED).mtspr(9, 3).word(0x4E800420)  # bctr
    return bytes(code)


def _put(memory: BYTES, at: int, data: bytes) -> None:
    memory[at : at + len(data)] = np.frombuffer(data, np.uint8)


# ----------------------------------------------------------------------------------------------------------- the faults


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong. `at` is an address for a DMA write or a flipped bit, a vector for an interrupt."""

    kind: Literal["none", "DMA", "bit", "interrupt"]
    name: str
    at: int = 0

    @property
    def in_memory(self) -> bool:
        """Whether the CPU meets it in memory alone."""
        return self.kind in {"DMA", "bit"}


NO_FAULT = Fault("none", "none")


def faults_of(scene: Scene) -> tuple[Fault, ...]:
    """All that is injected into it."""
    return (
        *(Fault("DMA", name, at) for name, at in scene.spots.items()),
        *(Fault("bit", name, at + 0x1C) for name, at in scene.spots.items()),
        Fault("interrupt", "machine check", 0x200),
        Fault("interrupt", "system reset", 0x100),
    )


# -------------------------------------------------------------------------------------------------------------- the walk


@dataclass(frozen=True, slots=True)
class Point:
    """An instruction about to be executed. `index` counts from the purgatory's first."""

    index: int
    phase: str
    pc: int
    touches_memory: bool


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one fault at one point."""

    point: Point
    fault: Fault
    outcome: Outcome
    why: str


class Walk:
    """One CPU's way through a scene."""

    def __init__(self, stepper: Stepper, cpu: str, scene: Scene, *, little: bool) -> None:
        self._stepper, self._scene, self._little = stepper, scene, little
        self._log = slice(scene.base + LOG_OFFSET, scene.base + LOG_OFFSET + LOG_SIZE)
        stepper.memory[:] = scene.memory
        stepper.enter(scene.base, physical=_PHYSICAL, little=little)
        if little:
            stepper.write({"hid0": stepper.read("hid0")[0] | _HILE[cpu]})
        self._noise = np.random.default_rng(2).integers(0, 256, DMA_SIZE, np.uint8)
        self._handover = {scene.entry, scene.rebooted}

    def points(self) -> Iterator[Point]:
        """Every instruction that is worth a disturbance. The caller may disturb, if it restores."""
        stepper, scene = self._stepper, self._scene
        (pc,) = stepper.read("pc")
        index, visits, phase = 0, collections.Counter[tuple[str, int]](), ""
        while pc != scene.entry:
            if pc == scene.rebooted:
                raise VerificationError(f"an undisturbed handover ends: {self.said()!r}")
            if pc == scene.opal:  # the firmware's instructions are not ours
                self._run_to(stepper.read("lr")[0])
                (pc,) = stepper.read("pc")
                continue
            new = self.phase()
            if new != phase:
                phase = new
            visits[phase, pc] += 1
            word = int.from_bytes(stepper.memory[pc : pc + 4].tobytes(), "big")
            if visits[phase, pc] <= 2:
                yield Point(index, phase, pc, _touches_memory(word, self._little))
            last, pc = pc, stepper.step()
            index += 1
            if pc < last and word & 0xFFE00001 == 0x42000000:  # a bdnz that went back
                body = (last - pc) // 4 + 1
                passes = visits[phase, pc]
                (left,) = stepper.read("ctr")
                if passes >= (2 if body <= _SHORT_LOOP else 1) and left > 1:
                    stepper.stop_at([pc])
                    for _ in range(left - 1):
                        stepper.step()
                        stepper.run(_RUN * _PATIENCE)
                    stepper.stop_at(())
                    index += body * (left - 1)
                    for at in range(pc, last + 4, 4):
                        visits[phase, at] = 1  # its last pass counts anew

    def _run_to(self, address: int) -> None:
        self._stepper.stop_at([address])
        if self._stepper.run(_RUN * _PATIENCE) is None:
            raise VerificationError(f"an undisturbed handover does not come to {address:#x}")
        self._stepper.stop_at(())

    def phase(self) -> str:
        """What the purgatory is at: the row whose line it has begun, or the check of itself before the next."""
        text = self._stepper.memory[self._log].tobytes().split(b"\0", 1)[0].decode("ascii", "replace")
        begun = re.findall(r"crashkernel: (\d+)/\d+ (\w+) ", text)
        if not begun:
            return "before the first row"
        number, word = begun[-1]
        return f"between {number} and {int(number) + 1}" if text.endswith(" ok\n") else f"{number} {word}"

    def said(self) -> bytes:
        """All that it said, to its log and to the console."""
        memory, scene = self._stepper.memory, self._scene
        return memory[self._log].tobytes() + memory[_CONSOLE : len(scene.memory)].tobytes()

    def disturbed(self, fault: Fault, here: State) -> tuple[Outcome, str]:
        """What comes of `fault` at this point; all is `here` again afterwards."""
        self._inject(fault, here)
        end = self._run_on()
        outcome = self._judge(end, fault)
        self._stepper.restore(here)
        return outcome

    def _inject(self, fault: Fault, here: State) -> None:
        stepper = self._stepper
        if fault.kind == "DMA":
            stepper.poke(fault.at, self._noise.tobytes())
        elif fault.kind == "bit":
            stepper.poke(fault.at, bytes([here.memory[fault.at] ^ 0x10]))
        elif fault.kind == "interrupt":
            # Power ISA Book III 7.4: srr0 is the instruction not executed; translation off, byte order by HILE
            msr = here.registers["msr"]
            new = msr & (MSR_SF | MSR_HV) | (MSR_ME if fault.at == 0x100 else 0) | (MSR_LE if self._little else 0)
            stepper.write({"srr0": here.registers["pc"], "srr1": msr & ~0x783F0000 | MSR_RI, "msr": new, "pc": fault.at})

    def _run_on(self) -> Literal["entered", "rebooted", "stuck"]:
        stepper = self._stepper
        stepper.stop_at(self._handover)
        still = 0
        (pc,) = stepper.read("pc")
        if pc in self._handover:
            pc = stepper.step()
        for _ in range(_PATIENCE):
            if stepper.run(_RUN) is not None:
                (pc,) = stepper.read("pc")
                return "entered" if pc == self._scene.entry else "rebooted"
            seen = {stepper.step() for _ in range(10 * _STILL)}
            still = still + 1 if len(seen) <= _STILL else 0
            if still == 2:
                break
        return "stuck"

    def _judge(self, end: str, fault: Fault) -> tuple[Outcome, str]:
        told = any(word in self.said() for word in _COMPLAINTS)
        if end != "entered":
            return ("told", end) if told else ("silent hang", end)
        wrong = self._wrong(fault)
        if not wrong:
            return "good", "it was told of something" if told else ""
        return ("told" if told else "silent damage"), wrong

    def _wrong(self, fault: Fault) -> str:
        """What is not as it should be when K2 is entered."""
        scene, memory = self._scene, self._stepper.memory
        wanted = (_TREE, scene.entry, 0, 0, 0, scene.opal, scene.opal)
        *registers, msr = self._stepper.read(*(f"r{number}" for number in range(3, 10)), "msr")
        if tuple(registers) != wanted or msr & (MSR_LE | 0x8030):
            return "registers"
        for name, place in scene.loaded.items():
            if (memory[place.start : place.end] != scene.final[place.start : place.end]).any():
                return name
        lost = memory[scene.homes] != scene.final[scene.homes]
        if fault.in_memory:
            # what the fault itself did to K1's memory while it was K1's, wherever the byte lay then, is K1's memory now
            struck = np.zeros(len(scene.memory), bool)
            struck[fault.at : fault.at + (DMA_SIZE if fault.kind == "DMA" else 1)] = True
            lost &= ~(struck[: len(lost)] | struck[scene.homes])
        return f"K1: {np.count_nonzero(lost)} bytes" if lost.any() else ""


def _touches_memory(word: int, little: bool) -> bool:
    """Whether this instruction loads or stores (Power ISA, opcode maps)."""
    primary, extended = word >> 26, word >> 1 & 0x3FF
    if primary == 31:
        return extended in _INDEXED
    return 32 <= primary <= 55 or primary in {58, 62}


_INDEXED = frozenset((20, 84, 150, 214, 23, 87, 21, 151, 215, 149, 103, 231, 279, 407, 341, 534, 662))
"""lwarx, ldarx, stwcx., stdcx., lwzx, lbzx, ldx, stwx, stbx, stdx, lvx, stvx, lhzx, sthx, lwax, lwbrx, stwbrx."""


# --------------------------------------------------------------------------------------------------------------- the map


@dataclass(frozen=True)
class FaultMap:
    """All results of one scene."""

    scene: str
    cpu: str
    little: bool
    instructions: int
    results: tuple[Result, ...]

    def count(self) -> dict[Outcome, int]:
        """How many of each."""
        found = collections.Counter(result.outcome for result in self.results)
        return {outcome: found[outcome] for outcome in OUTCOMES}


def fault_map(
    placement: Placement, *, cpu: str = "POWER9", little: bool = True, every: int = 1, faults: Iterable[str] | None = None,
    progress: Progress = silent,
) -> FaultMap:  # fmt: skip
    """Walk through a handover and inject all faults, or those named, at every point, or at each `every`-th.

    :raise VerificationError: the handover does not come to its end when nothing disturbs it.
    """
    setting = scene(placement)
    return map_scene(setting, cpu=cpu, little=little, every=every, faults=faults, progress=progress)


def map_scene(
    setting: Scene, *, cpu: str, little: bool, every: int, faults: Iterable[str] | None = None, progress: Progress = silent,
    walk: type[Walk] = Walk,
) -> FaultMap:  # fmt: skip
    """The map of any scene."""
    chosen = [fault for fault in faults_of(setting) if faults is None or fault.name in set(faults)]
    results: list[Result] = []
    with Stepper.start(CPUS[cpu], _ARENA) as stepper:
        way = walk(stepper, cpu, setting, little=little)
        undisturbed = way.disturbed(NO_FAULT, stepper.save())
        if undisturbed != ("good", ""):
            raise VerificationError(f"an undisturbed handover: {undisturbed}, {way.said()!r}")
        phase, index = "", 0
        for number, point in enumerate(way.points()):
            index = point.index
            if point.phase != phase:
                phase = point.phase
                progress(f"{setting.name}: {phase}: {len(results)} faults so far")
            if number % every:
                continue
            stepper.stop_at(())
            here = stepper.save()
            for fault in chosen:
                if point.touches_memory or not fault.in_memory:
                    results.append(Result(point, fault, *way.disturbed(fault, here)))
            stepper.stop_at(())
    return FaultMap(setting.name, cpu, little, index + 1, tuple(results))


def to_json(maps: Sequence[FaultMap]) -> str:
    """All results, for other tools."""
    return json.dumps([_plain(each) for each in maps], indent=1)


def _plain(each: FaultMap) -> dict[str, Any]:
    rows = [
        [r.point.index, f"{r.point.pc:#x}", r.point.phase, r.fault.kind, r.fault.name, r.outcome, r.why] for r in each.results
    ]
    head = {"scene": each.scene, "cpu": each.cpu, "little": each.little, "instructions": each.instructions}
    return head | {"columns": ["index", "pc", "phase", "kind", "fault", "outcome", "why"], "rows": rows}


def render_faults(each: FaultMap) -> str:
    """Two tables: phases of the handover and faults, with the number of each outcome."""
    order = "LE" if each.little else "BE"
    lines = [f"{each.scene}, {each.cpu} {order}: {len(each.results)} faults in {each.instructions} instructions"]
    for title, key in (
        ("phase", lambda result: result.point.phase),
        ("fault", lambda result: f"{result.fault.kind} {result.fault.name}"),
    ):
        table: dict[str, collections.Counter[str]] = {}
        for result in each.results:
            table.setdefault(key(result), collections.Counter())[result.outcome] += 1
        lines.append(f"{title:58}" + "".join(f"{outcome:>15}" for outcome in OUTCOMES))
        lines += [f"{name[:57]:58}" + "".join(f"{row[o] or '.':>15}" for o in OUTCOMES) for name, row in table.items()]
    lines.append(f"{'all':58}" + "".join(f"{number:>15}" for number in each.count().values()))
    return "\n".join(lines)


_COLOURS = {"good": "#9fd8a4", "told": "#5b8fd9", "silent damage": "#d62728", "silent hang": "#ff9f1c"}


def svg(each: FaultMap) -> str:
    """The map as a picture: points from left to right, faults from top to bottom, a colour for each outcome."""
    names = list(dict.fromkeys((r.fault.kind, r.fault.name) for r in each.results))
    columns = {index: number for number, index in enumerate(sorted({r.point.index for r in each.results}))}
    left, top, high = 260, 60, 12
    wide = max(0.2, 1200 / max(len(columns), 1))
    width, height = left + wide * len(columns) + 20, top + high * len(names) + 90
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" font-family="sans-serif" '
        'font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{each.scene} placement, {each.cpu}: {len(each.results)} faults injected</text>',
    ]
    for number, outcome in enumerate(OUTCOMES):
        parts.append(f'<rect x="{left + 150 * number}" y="30" width="12" height="12" fill="{_COLOURS[outcome]}"/>')
        parts.append(f'<text x="{left + 16 + 150 * number}" y="40">{outcome} ({each.count()[outcome]})</text>')
    for number, name in enumerate(names):
        y = top + high * number
        parts.append(f'<text x="{left - 6}" y="{y + 9}" text-anchor="end">{name[0]}: {name[1]}</text>')
        row = sorted((columns[r.point.index], r.outcome) for r in each.results if (r.fault.kind, r.fault.name) == name)
        start = 0
        for end in range(1, len(row) + 1):  # one rectangle for a run of one colour
            if end == len(row) or row[end][1] != row[start][1]:
                until = row[end][0] if end < len(row) else row[-1][0] + 1
                x, span = left + wide * row[start][0], wide * (until - row[start][0])
                parts.append(
                    f'<rect x="{x:.2f}" y="{y}" width="{span:.2f}" height="{high - 1}" fill="{_COLOURS[row[start][1]]}"/>'
                )
                start = end
    bottom = top + high * len(names)
    for phase, first in {r.point.phase: columns[r.point.index] for r in reversed(each.results)}.items():
        x = left + wide * first
        parts.append(f'<line x1="{x:.2f}" y1="{top}" x2="{x:.2f}" y2="{bottom + 6}" stroke="black" stroke-width="0.4"/>')
        parts.append(f'<text x="{x:.2f}" y="{bottom + 14}" transform="rotate(20 {x:.2f} {bottom + 14})">{phase[:40]}</text>')
    return "\n".join([*parts, "</svg>"])
