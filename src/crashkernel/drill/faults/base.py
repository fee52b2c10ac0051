"""What a fault is: what it needs of the twin, what it does at each point of a drill, and what must be seen in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from crashkernel.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crashkernel.drill.guest import Driver
    from crashkernel.drill.qemu import Debugger, Hardware, RunningTwin, Wiring
    from crashkernel.drill.request import DrillRequest
    from crashkernel.drill.stages import Clock
    from crashkernel.drill.twin import Twin
    from crashkernel.drill.verdict import Truth, Verdict
    from crashkernel.errors import StageFailed
    from crashkernel.placement.plan import LoadPlan

Kind = Literal["change", "crash", "damage", "k2"]
"""When a fault acts: after the load, as K1's way to die, between K1's death and K2, or in K2's life."""

Expects = Literal["dump", "told"]
"""What must come of it: a dump that is right all the same, or clear words that there is none, or none that is complete."""


@dataclass(slots=True)
class Running:
    """A drill under way, as a fault sees it."""

    request: DrillRequest
    twin: Twin
    machine: RunningTwin
    plan: LoadPlan  # of the last load
    clock: Clock


@dataclass(frozen=True, slots=True)
class Ending:
    """How a drill ended: with a verdict, a stage that failed, or neither where the fault ended it."""

    console: str  # all that was said there
    seconds: Mapping[str, float]  # by stage
    plan: LoadPlan | None = None
    verdict: Verdict | None = None
    failure: StageFailed | None = None


class Fault:
    """A fault of one drill, made from its word. What it does not override goes as in any drill.

    `told` is what came of it, in one line, once that is known. Until it says something the fault was not seen to act, and its
    drill does not pass.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    argument: ClassVar[str] = ""
    """What the word's argument says, as `[RATE]` (optional) or `SEGMENT`; "" where it takes none."""
    summary: ClassVar[str]
    """What is done to the twin, for a list of faults."""

    def __init__(self, argument: str = "", seed: int = 0) -> None:
        """Take the word's argument ("" without), and the seed of whatever is chosen at random.

        :raise UsageError: no such argument.
        """
        self.word = f"{self.name}:{argument}" if argument else self.name
        self.expects: Expects = "dump"
        self.told = ""
        self._seed = seed
        if argument and not self.argument:
            raise UsageError(f"fault {self.name} takes no argument, not {argument!r}")
        if not argument and self.argument and not self.argument.startswith("["):
            raise UsageError(f"fault {self.name} needs an argument", hint=f"as {self.name}:{self.argument}")

    @classmethod
    def pattern(cls) -> str:
        """How its word is made, as `disk-slow[:RATE]`."""
        if cls.argument.startswith("["):
            return f"{cls.name}[:{cls.argument[1:]}"
        return f"{cls.name}:{cls.argument}" if cls.argument else cls.name

    @property
    def title(self) -> str:
        """What is done to the twin, in one line."""
        return self.summary

    def fit(self, request: DrillRequest) -> None:
        """See that the fault makes sense in that drill, and what it expects there.

        :raise UsageError: it makes none.
        """

    def hardware(self, hardware: Hardware) -> Hardware:
        """The twin's hardware as this fault needs it."""
        return hardware

    @property
    def driver(self) -> Driver:
        """What K1 needs of a driver."""
        return "none"

    @property
    def k2_script(self) -> str:
        """What K2's shell does before it saves anything."""
        return ""

    @property
    def seen_in_dump(self) -> bool:
        """Whether it takes a dump to see that it acted."""
        return True

    @property
    def fallback(self) -> bool:
        """Whether `crashkernel capture` is given a second target."""
        return False

    @property
    def slow(self) -> bool:
        """Whether K2 may stand still anywhere: it is given up when it is silent for long."""
        return False

    async def loaded(self, drill: Running) -> None:
        """K2 is loaded and K1 runs; it obeys `have_done`."""

    async def dying(self, drill: Running, debugger: Debugger) -> None:
        """The twin stands still under the debugger; when it goes on, K1 dies."""

    async def crash(self, drill: Running, debugger: Debugger) -> None:
        """Have K1 die. The twin stands still under the debugger, and is run on until it comes to the purgatory."""
        drill.machine.say("crash")

    async def dead(self, drill: Running, debugger: Debugger, truth: Truth) -> bool:
        """K1 is dead, its memory copied; the twin stands still at the purgatory's first instruction.

        True: that was all, this drill is not about K2.
        """
        return False

    def handing_over(self) -> None:
        """The purgatory is about to run."""

    async def k2_enters(self, drill: Running) -> None:
        """The twin stands still at K2's first instruction."""

    def stop(self) -> None:
        """K2 has saved the dump, or the drill is over in another way: leave the twin alone. May be called again."""

    async def saved(self, drill: Running) -> None:
        """K2 says that it has saved the dump."""

    def judged_by(self, truth: Truth) -> Truth:
        """What a dump must have, given what it must have in any drill."""
        return truth

    def conclude(self, ending: Ending) -> bool:
        """See what came of it, and say so in `told`; whether a stage that failed was meant to."""
        return False


def saved_exactly(registers: Mapping[str, int]) -> Mapping[str, int]:
    """What of a CPU's registers goes into its note as it was: not all of the MSR, and r13 is the kernel's own."""
    return {name: value for name, value in registers.items() if name not in ("msr", "gpr13")}


def console_text(wiring: Wiring) -> str:
    """All that a twin said on its console."""
    return wiring.console.read_text(errors="replace").replace("\r", "") if wiring.console.exists() else ""
