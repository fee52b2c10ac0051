"""Damage to memory between K1's death and K2: a flipped bit, and a device that nobody stopped."""

from __future__ import annotations

import asyncio
import random
import re
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from crashkernel.drill.dma import REGIONS, WHENS, Dma, DmaReport, RogueDevice, choose_targets, driver_command
from crashkernel.drill.faults.base import Fault, console_text
from crashkernel.drill.ram import flip_bit, places
from crashkernel.drill.stages import (
    BOOT_K2,
    CAPTURE,
    DAMAGE,
    FAULT,
    HANDOVER,
    VERIFY,
    GuestSaidNo,
    damage_told,
    k2_trouble,
    purgatory_lines,
)
from crashkernel.errors import StageFailed, UsageError
from crashkernel.formats import fields
from crashkernel.memory import Range, RangeSet
from crashkernel.placement.plan import SegmentContent
from crashkernel.purgatory import PARAMETERS_OFFSET, STATE_OFFSET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crashkernel.drill.faults.base import Ending, Running
    from crashkernel.drill.guest import Driver
    from crashkernel.drill.qemu import Debugger, RunningTwin
    from crashkernel.drill.request import DrillRequest
    from crashkernel.drill.verdict import Truth
    from crashkernel.placement.plan import DamagePolicy, LoadPlan

_CONTENTS: tuple[SegmentContent, ...] = get_args(SegmentContent)
_THEN: Mapping[DamagePolicy, str] = {"reboot": ", rebooting", "halt": ", halted", "continue": ", going on as told"}
"""How the purgatory's line on damage ends (purgatory.S)."""
_A_WHILE = 2.0  # seconds in which a purgatory that says that it halts, and does not, would enter K2


class Flip(Fault):
    """One bit of what was loaded, flipped. The purgatory is to say so and, unless told to go on, not to enter K2."""

    name = "flip"
    kind = "damage"
    argument = "SEGMENT"
    summary = f"one bit is flipped of what was loaded: {', '.join(_CONTENTS)}"

    def __init__(self, argument: str = "", seed: int = 0) -> None:
        super().__init__(argument, seed)
        if argument not in _CONTENTS:
            raise UsageError(f"fault flip:{argument}: nothing of that name is loaded", hint=f"choose of {', '.join(_CONTENTS)}")
        self.content: SegmentContent = argument
        self.expects = "told"

    @property
    def title(self) -> str:
        """What is done to the twin, in one line."""
        return f"one bit of the {self.content} is flipped"

    def fit(self, request: DrillRequest) -> None:
        """Of the drill: there is no dump.

        :raise UsageError: one is to be captured.
        """
        if request.capture is not None:
            raise UsageError(f"with fault {self.word} there is no dump to capture", hint="leave --capture out")

    @property
    def seen_in_dump(self) -> bool:
        """The purgatory tells."""
        return False

    def place(self, plan: LoadPlan) -> tuple[int, int]:
        """The address of the byte and the number of the bit."""
        segment = plan.segment(self.content).range
        if self.content == "purgatory":
            # its code may go astray before it checks itself
            segment = Range(segment.start + PARAMETERS_OFFSET, segment.start + STATE_OFFSET)
        elif self.content == "kernel":
            segment = Range.sized(segment.start, min(segment.size, plan.kernel_span))  # behind it is K2's free memory
        noise = random.Random(f"{self.word} {self._seed}")  # noqa: S311  (repeatable, not secret)
        return segment.start + noise.randrange(segment.size), noise.randrange(8)

    async def dead(self, drill: Running, debugger: Debugger, truth: Truth) -> bool:
        """Flip it, and wait for the purgatory's words; a K2 that is entered without them is the failure looked for."""
        machine = drill.machine
        async with drill.clock.stage(DAMAGE, machine) as note:
            at, bit = self.place(drill.plan)
            flip_bit(machine.wiring.ram, at, bit)
            note(f"bit {bit} flipped at {at:#x}")
            machine.spoke.clear()
            await debugger.detach()
            told = await self._words(machine, drill.request.on_damage)
            if told.endswith(_THEN["reboot"]):
                await machine.process.wait()  # the twin ends where a machine would reboot
            elif told.endswith(_THEN["halt"]):
                await asyncio.sleep(_A_WHILE)
            if not told.endswith(_THEN["continue"]):
                self._require_no_k2(machine)
            self.told = told
        return True

    async def _words(self, machine: RunningTwin, policy: DamagePolicy) -> str:
        # a purgatory that is damaged itself never goes on, and the policy may be what is damaged
        then = f"({_THEN['reboot']}|{_THEN['halt']})" if self.content == "purgatory" else _THEN[policy]
        wanted = re.compile(rf"(: {self.content}|the {self.content} itself is) DAMAGED{then}$")
        while True:
            await machine.spoke.wait()
            machine.spoke.clear()
            for line in purgatory_lines(machine.console):
                if wanted.search(line):
                    return line
            self._require_no_k2(machine)

    def _require_no_k2(self, machine: RunningTwin) -> None:
        # all of the console: of its last lines alone K2 would have made other ones by now
        if any("enter K2" in line for line in purgatory_lines(console_text(machine.wiring).splitlines())):
            raise GuestSaidNo(f"a bit of the {self.content} was flipped, and K2 was entered")


class RogueDma(Fault):
    """A device that goes on writing when K1 is dead. Its own buffers may differ in the dump; all else must be right."""

    name = "dma"
    kind = "damage"
    argument = "REGION[+REGION...][,rate=N][,when=WHEN]"
    summary = f"a device goes on writing into {', '.join(REGIONS)}; N times a second (1000), WHEN {', '.join(WHENS)}"

    def __init__(self, argument: str = "", seed: int = 0) -> None:
        super().__init__(argument, seed)
        self.dma = Dma.from_argument(argument, seed)
        self.report = DmaReport(self.dma)
        self._device: RogueDevice | None = None

    @property
    def title(self) -> str:
        """What is done to the twin, in one line."""
        return f"a device goes on writing into {', '.join(REGIONS[name].title for name in self.dma.regions)}"

    @property
    def driver(self) -> Driver:
        """What K1 needs of a driver."""
        return self.dma.driver

    @property
    def slow(self) -> bool:
        """A K2 that a device runs over may stand still anywhere."""
        return True

    async def loaded(self, drill: Running) -> None:
        """Aim, and have K1 give out the pages."""
        self._aim(drill.plan)
        if self.dma.given_out:
            async with drill.clock.stage(FAULT, drill.machine):
                await _take_buffers(drill.machine, self.report, drill.plan)

    def _aim(self, plan: LoadPlan) -> None:
        """Enter the regions, and what the plan had said of them.

        :raise StageFailed: the plan does not know where K1's image lies.
        """
        dma, report = self.dma, self.report
        report.wanted = {name: REGIONS[name].where(plan) for name in dma.regions}
        unknown = [name for name in dma.regions if not report.wanted[name] and not (REGIONS[name].given_out and plan.k1_layout)]
        unknown = [name for name in unknown if name != "memory"]
        if unknown:
            raise StageFailed(
                FAULT.name, f"the plan does not say where {' and '.join(unknown)} lies", hint="use one kernel for both"
            )
        hazards = {hazard.name: hazard for hazard in plan.hazards}
        report.hazards = {name: hazards[REGIONS[name].hazard] for name in dma.regions if REGIONS[name].hazard in hazards}

    async def dead(self, drill: Running, debugger: Debugger, truth: Truth) -> bool:
        """Choose the targets: from now on they are the device's.

        :raise StageFailed: there is none.
        """
        plan, ram = drill.plan, drill.machine.wiring.ram
        # the log has no buffer of a device's in it, and the verdict looks for this line
        log = places(ram, RangeSet(region.range for region in plan.k1_layout), truth.panic.encode())
        self.report.targets = choose_targets(self.dma, plan, self.report.given, [*plan.notes, *log])
        if not self.report.all_targets:
            raise StageFailed(FAULT.name, "the device has nowhere to write", hint="choose other regions, or a larger --memory")
        self._device = RogueDevice(ram, self.report)
        return False

    def handing_over(self) -> None:
        """It goes on writing."""
        if self._device:
            self._device.k1_is_dead()

    async def k2_enters(self, drill: Running) -> None:
        """It goes on, begins or ends."""
        if self._device:
            self._device.k2_runs(drill.plan.k2_memory)

    def stop(self) -> None:
        """No write is made after this."""
        if self._device:
            self._device.stop()
            self._device.account(self.report)

    def judged_by(self, truth: Truth) -> Truth:
        """Whatever is in the device's own buffers in its own lines is right."""
        return replace(truth, device_buffers=self.report.own, device_problem=self.report.problem)

    def conclude(self, ending: Ending) -> bool:
        """Say what the writes did."""
        self.report.effect = _effect(self.report, ending)
        self.told = self.report.effect if self.report.writes else ""
        return False


async def _take_buffers(machine: RunningTwin, report: DmaReport, plan: LoadPlan) -> None:
    """Have K1's driver take the pages it can get, and keep them."""
    machine.say(f"driver {driver_command(report.dma, plan)}")
    while True:
        kind, _, rest = (await machine.line()).partition(" ")
        if kind == "failed":
            raise GuestSaidNo(f"the guest says: {rest}")
        if kind == "driving":
            report.pages_looked_at, report.page_size = (int(number) for number in rest.split())
            return
        if kind == "buffer":
            name, _, text = rest.partition(" ")
            report.given.setdefault(name, []).append(fields.one_range(text))


def _effect(report: DmaReport, ending: Ending) -> str:
    """What the device's writes did, in one line."""
    trouble = k2_trouble(ending.console)
    said = f"; its first complaint: {trouble}" if trouble else ""
    told = damage_told(ending.console.splitlines())
    failure, verdict = ending.failure, ending.verdict
    if failure is not None:
        if told and failure.stage == HANDOVER.name:
            return f"the purgatory found the damage and did not enter K2: {told}"
        said = said or f": {failure.message.removeprefix(f'{failure.stage}: ')}"
        where = {
            HANDOVER.name: "K2 was not reached",
            BOOT_K2.name: "K2 did not come up",
            CAPTURE.name: "K2 could not save the dump",
            VERIFY.name: "the dump could not be judged",
        }
        went_on = "; the purgatory had told the damage and went on" if told else ""
        return f"{where.get(failure.stage, 'nothing: the drill did not get so far')}{said}{went_on}"
    if verdict is None or not verdict.passed:
        wrong = verdict.bytes_wrong if verdict else 0
        what = f"{wrong:,} bytes are wrong outside of the device's own buffers" if wrong else "the dump is not whole"
    elif _aimed_at_k2(report, ending.plan):
        what = "none that shows in the dump, but K2's memory was written to: it came up by luck"
    else:
        what = "none outside of the device's own buffers"
    return f"{what}{said}"


def _aimed_at_k2(report: DmaReport, plan: LoadPlan | None) -> bool:
    """Whether the device wrote to K2's memory, or to what became that."""
    becomes = (plan.exposed | plan.k2_memory) if plan else RangeSet()
    return report.writes_into_k2 > 0 or bool(RangeSet(report.all_targets) & becomes)
