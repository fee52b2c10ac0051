"""One CPU's way through a handover, left at any instruction, disturbed, run to its end, judged, and taken up again."""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from crashkernel.bench.cpus import CPUS
from crashkernel.bench.scene import (
    ARENA,
    CONSOLE,
    DMA_SIZE,
    IN_K1,
    IN_K2,
    PAGE,
    PHYSICAL,
    REBOOTED,
    SET_UP,
    SLAVE_IN_K2,
)
from crashkernel.bench.score import CHECK, FETCH, Score, score
from crashkernel.bench.stepper import MSR_HV, MSR_LE, MSR_ME, MSR_RI, MSR_SF, StandsStill, Stepper
from crashkernel.errors import VerificationError
from crashkernel.memory import Range
from crashkernel.purgatory import ARRIVED_OFFSET, LOG_OFFSET, LOG_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crashkernel.bench.scene import Fault, Scene
    from crashkernel.bench.score import Point
    from crashkernel.bench.stepper import State

Outcome = Literal["good", "told", "silent damage", "silent hang"]
OUTCOMES: tuple[Outcome, ...] = ("good", "told", "silent damage", "silent hang")
End = Literal["entered", "rebooted", "K1's vectors", "K2's vectors", "K2's slave code", "stuck"]

UNEXPLAINED = "UNEXPLAINED"
REASONS = {
    "after its last check": "what was struck is read by no later check",
    "the code being executed": "struck code was executed before the next check of it had ended",
    "used before its next check": "a struck number was used before the next check of it had ended",
    "the code that tells": "the damage was noticed; what was struck is the code that would have said so",
    "under no check": "what was struck is written while the purgatory runs, and so under no digest: a length, the log",
    "before any check": "struck code was executed before the first check, which begins the purgatory, had ended",
    "before the guard": "an exception while K1's own vectors were still in force, whole or in part",
    "after K2's low page": "an exception when K2's vectors had begun to come into force, and K2 was not set up",
}
"""Why a fault stays without a word: all that is found. Whatever has none of these is UNEXPLAINED."""

_COMPLAINTS = (b"DAMAGED", b"exception", b"is no operation")
_RUN = 0.01  # seconds of wall clock after which a run is looked at; it takes a few milliseconds
_AGES = 60.0
_SAME = 3  # looks at which a CPU that ran has the same registers: it goes round and round
_RAN = 0.02  # seconds on the host's CPUs that it must have had meanwhile, unless it was met at the same instruction each time
_DEAD = 0.2  # seconds of wall clock in which it neither ran nor stood in line for that: a checkstop, or a nap for ever
_NONE = 0.005
_ASTRAY = 0.5  # seconds on the host's CPUs after which a CPU that still does something is given up; it takes milliseconds
_K1S_SPRG3 = 0x7EAD0003
_HILE = {"POWER8": 1 << 63 - 19, "POWER9": 1 << 63 - 4, "POWER10": 1 << 63 - 4}  # HID0: interrupts come little-endian
_LOOKED_AT = 3  # instructions: the return of `check`, mtlr and beqlr in `require`
_RETURN = bytes.fromhex("7c0803a6 4d820020")  # mtlr r0; beqlr: in `require`, before what follows a check that failed


_SCORES: dict[tuple[str, bool, int, bytes], Score] = {}
"""By CPU, byte order, number of CPUs and a digest of memory: taking one costs more than many a use of it."""


@dataclass(frozen=True)
class Verdict:
    """What came of a fault."""

    outcome: Outcome
    why: str
    """What is wrong in the end."""
    reason: str
    """Of a silent one: one of REASONS, or UNEXPLAINED."""


@dataclass
class Found:
    """What is wrong when K2 is entered: nothing, if `what` is empty."""

    what: str = ""
    places: list[Range] = field(default_factory=list)
    """Where, of what was loaded."""


class Walk:
    """A CPU on its way, a context manager; of `count` CPUs the first. `score`, if it is wanted: the undisturbed handover."""

    def __init__(self, cpu: str, scene: Scene, *, little: bool, count: int = 1, scored: bool = True) -> None:
        self.scene, self.little, self._cpu, self._count = scene, little, cpu, count
        self._scored = scored
        self.index = 0
        self.machines = 0
        self._stack = contextlib.ExitStack()
        self._log = slice(scene.base + LOG_OFFSET, scene.base + LOG_OFFSET + LOG_SIZE)
        self._noise = np.random.default_rng(2).integers(0, 256, DMA_SIZE, np.uint8)
        self.ends: dict[int, End] = {
            REBOOTED: "rebooted", IN_K1: "K1's vectors", IN_K2: "K2's vectors", SLAVE_IN_K2: "K2's slave code",
            scene.entry: "entered",
        }  # fmt: skip
        image = scene.memory[scene.base : scene.base + 0x2000].tobytes()
        assert image.count(_RETURN) == 1
        self._noticing = scene.base + image.index(_RETURN) + len(_RETURN)
        self._guard = scene.memory[scene.base + 0x100 : scene.base + PAGE].tobytes()
        self._was_guarded = False

    def __enter__(self) -> Self:
        self._renew()
        if self._scored:
            memory = hashlib.blake2b(self.scene.memory.tobytes()).digest()
            key = self._cpu, self.little, self._count, memory
            if key not in _SCORES:
                _SCORES[key] = score(self.stepper, self.scene)
                self.begin()
            self.score = _SCORES[key]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _renew(self) -> None:
        """Another QEMU, at the purgatory's first instruction."""
        self._stack.close()
        self.stepper = self._stack.enter_context(Stepper.start(CPUS[self._cpu], ARENA, count=self._count))
        self.machines += 1
        self.begin()

    def begin(self) -> None:
        """To the purgatory's first instruction."""
        stepper, scene = self.stepper, self.scene
        stepper.poke_all(scene.memory.tobytes())
        stepper.enter(scene.base, physical=PHYSICAL, little=self.little)
        hid0 = stepper.read("hid0")[0] | (_HILE[self._cpu] if self.little else 0)
        stepper.write({"sprg3": _K1S_SPRG3, "hid0": hid0})
        self.index, self._was_guarded = 0, False

    def set_up(self, cpu: int) -> None:
        """Make another CPU's special registers what the first one's were at the start."""
        stepper = self.stepper
        stepper.enter(SET_UP, physical=0, little=False, cpu=cpu)
        stepper.write({"r5": stepper.read("hid0")[0], "r6": _K1S_SPRG3}, cpu)
        for _ in range(2):
            stepper.step(cpu)

    def advance(self, point: Point) -> None:
        """On to a later point, undisturbed."""
        if point.index == self.index:
            return
        stepper, target = self.stepper, point.pc
        passed = self.score.pcs[self.index + 1 : point.index + 1]
        left = int(np.count_nonzero(passed == target))
        self.index = point.index
        stepper.stop_at({target} if len(passed) > 1 else ())
        while left:
            if stepper.step() == target:
                left -= 1
            elif len(passed) > 1 or stepper.read("pc")[0] == self.scene.opal:
                stepper.stop_at({target})
                if stepper.run(_AGES) is None:
                    raise VerificationError(f"an undisturbed handover does not come to {target:#x} again")
                left -= 1
            else:
                raise VerificationError(f"an undisturbed handover is not the same again at {target:#x}")

    @property
    def guarded(self) -> bool:
        """Whether the purgatory's vectors are in force here."""
        whole = self.stepper.memory[0x100:PAGE].tobytes() == self._guard
        self._was_guarded |= whole
        return whole

    def said(self) -> bytes:
        """All that it said, to its log and to the console."""
        return self.stepper.memory[self._log].tobytes() + self.stepper.memory[CONSOLE:ARENA].tobytes()

    def disturbed(self, fault: Fault, here: State) -> Verdict:
        """What comes of `fault` at this point; all is `here` again afterwards."""
        guarded = self.guarded
        self._inject(fault, here)
        end, alive = self._run_on()
        told = any(word in self.said() for word in _COMPLAINTS)
        found = self.wrong(fault) if end == "entered" else Found(end)
        if end == "entered" and not found.what:
            verdict = Verdict("good", "it was told of something" if told else "", "")
        elif told:
            verdict = Verdict("told", found.what, "")
        else:
            reason = self._reason(fault, found, guarded=guarded)
            if reason == UNEXPLAINED and fault.in_memory and end != "entered":
                self.put_back(here, alive=alive)
                self._inject(fault, here)
                stepper = self.stepper
                stepper.stop_at({*self.ends, self._noticing})  # slow: QEMU goes through such a page one by one
                alive = stepper.run(_ASTRAY) is not None
                if alive and stepper.read("pc")[0] == self._noticing:
                    reason = "the code that tells"
            verdict = Verdict("silent damage" if end == "entered" else "silent hang", found.what, reason)
        self.put_back(here, alive=alive)
        return verdict

    def put_back(self, here: State, *, alive: bool) -> None:
        """Make all `here` again."""
        if not alive:
            index, was_guarded = self.index, self._was_guarded
            self._renew()
            self.index, self._was_guarded = index, was_guarded
        self.stepper.restore(here)

    def interrupt(self, vector: int, here: Mapping[str, int], cpu: int = 0) -> None:
        """Power ISA Book III 7.4: srr0 is the instruction not executed; translation off, byte order by HILE."""
        msr = here["msr"]
        new = msr & (MSR_SF | MSR_HV) | (MSR_ME if vector != 0x200 else 0) | (MSR_LE if self.little else 0)
        saved = {} if cpu else {"srr0": here["pc"], "srr1": msr & ~0x783F0000 | MSR_RI}  # not within the debugger's reach
        self.stepper.write({**saved, "msr": new, "pc": vector}, cpu)

    def _inject(self, fault: Fault, here: State) -> None:
        stepper = self.stepper
        if fault.kind == "DMA":
            stepper.poke(fault.at, self._noise.tobytes())
        elif fault.kind == "bit":
            stepper.poke(fault.at, bytes([here.memory[fault.at] ^ fault.mask]))
        elif fault.kind == "interrupt":
            self.interrupt(fault.at, here.registers)

    def _run_on(self) -> tuple[End, bool]:
        """How it ends, and whether the CPU is still good for anything."""
        stepper = self.stepper
        stepper.stop_at(self.ends)
        same, last = 0, None
        start = then = stepper.ran()
        since = time.monotonic()
        try:
            (pc,) = stepper.read("pc")
            if pc in self.ends:
                stepper.step()
            while True:
                astray = stepper.run(_RUN) is not None
                if astray:
                    (pc,) = stepper.read("pc")
                    if pc != self.scene.entry or self.k2_is_there():
                        return self.ends[pc], True
                    stepper.step()  # a jump to 0
                now, registers = stepper.ran(), (astray, *stepper.read(*(f"r{n}" for n in range(32)), "ctr", "lr"))
                if registers != last:
                    last, same, then, since = registers, 0, now, time.monotonic()
                same += 1
                if (same >= _SAME and (astray or now[0] - then[0] >= _RAN)) or now[0] - start[0] >= _ASTRAY:
                    stepper.step()  # one in checkstop that is looked at often enough, on a busy host, seems to have run
                    return "stuck", True
                if time.monotonic() - since >= _DEAD and sum(now) - sum(then) < _NONE:
                    return "stuck", False
        except StandsStill:
            return "stuck", False

    def k2_is_there(self) -> bool:
        """Whether what is entered is K2 by now; by a part of its head that no fault of ours strikes."""
        place = slice(self.scene.entry + 0x80, self.scene.entry + 0x100)
        return bool((self.stepper.memory[place] == self.scene.final[place]).all())

    # -- the judgement

    def wrong(self, fault: Fault) -> Found:
        """Hold everything against the model when K2 is entered."""
        scene, memory = self.scene, self.stepper.memory
        wanted = (scene.tree, scene.entry, 0, 0, 0, scene.opal, scene.opal)
        *registers, msr = self.stepper.read(*(f"r{number}" for number in range(3, 10)), "msr")
        found, names = Found(), []
        if tuple(registers) != wanted or msr & (MSR_LE | 0x8030):
            names.append("registers")
        for name, place in scene.loaded.items():
            bad = np.flatnonzero(memory[place.start : place.end] != scene.final[place.start : place.end])
            if len(bad):
                names.append(name)
                found.places.append(Range(place.start + int(bad[0]), place.start + int(bad[-1]) + 1))
        lost = memory[scene.homes] != scene.final[scene.homes]
        if fault.in_memory:
            lost[self._k1s(fault.struck)] = False
        if lost.any():
            names.append(f"K1: {np.count_nonzero(lost)} bytes")
        found.what = ", ".join(names)
        return found

    def _k1s(self, struck: Range) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Which bytes of K1's lie there at this instruction: what strikes those is K1's own doing, and its memory from then on.

        Before or after the row at work, for within a row both may be true of a byte.
        """
        done = min(self._rows_begun(), len(self.scene.origins) - 1)
        lying = [self.scene.origins[n][struck.start : struck.end] for n in {max(done - 1, 0), done}]
        origins = np.concatenate(lying)
        return origins[origins >= 0]

    def _rows_begun(self) -> int:
        begun = [name for index, name in self.score.phases if index <= self.index][-1]
        return int(begun.split()[0]) if begun[0].isdigit() else 0

    def _reason(self, fault: Fault, found: Found, *, guarded: bool) -> str:
        if not fault.in_memory:
            if guarded:
                return UNEXPLAINED
            return "after K2's low page" if self._was_guarded else "before the guard"
        if found.places and all(self.score.last_check(place) < self.index for place in found.places):
            return "after its last check"
        return self._reason_by_touches(fault.struck)

    def _reason_by_touches(self, struck: Range) -> str:
        indices, kinds = self.score.touches(struck)
        begun, checked = indices < self.index, kinds == CHECK
        checks, uses = indices[checked & ~begun], indices[~checked & ~begun]
        fetches = indices[(kinds == FETCH) & ~begun]
        reason = UNEXPLAINED
        if not len(checks):
            if checked.any() and len(uses):
                reason = "after its last check"
            elif self.scene.base + ARRIVED_OFFSET <= struck.start < self._log.stop:
                reason = "under no check"
            return reason
        verdict = self._end_of_check(int(checks[0]))
        if len(fetches) and fetches[0] < verdict:
            before = indices[checked & begun]
            done = len(before) and self._end_of_check(int(before[0])) < self.index
            reason = "the code being executed" if done else "before any check"
        elif len(uses) and uses[0] < verdict:
            reason = "used before its next check"
        return reason

    def _end_of_check(self, index: int) -> int:
        """Of the check that reads something at this instruction: when its result has been looked at."""
        after = np.flatnonzero(self.score.pcs[index:] == self.score.checked_at)
        return index + int(after[0]) + _LOOKED_AT
