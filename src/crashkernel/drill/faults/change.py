"""What changes between the load and the crash: CPUs and memory that come, and a CPU that is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from crashkernel.drill.conversation import expect, have_done, loaded_plan, pinned
from crashkernel.drill.faults.base import Fault, console_text, saved_exactly
from crashkernel.drill.ram import read_ram
from crashkernel.drill.stages import FAULT, GuestSaidNo, purgatory_lines
from crashkernel.errors import UsageError
from crashkernel.memory import Range, format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crashkernel.drill.faults.base import Ending, Running
    from crashkernel.drill.qemu import Debugger, Hardware
    from crashkernel.drill.request import DrillRequest
    from crashkernel.drill.verdict import Truth

_CAME = 256 << 20  # bytes; a block of memory that a partition may be given (ibm,lmb-size)
_GIB = 1 << 30
_STATUS = 'crashkernel status </dev/null 2>&1 3>&- | while IFS= read -r line; do say "answer $line"; done'
_REFRESH = ": >/tmp/plan.json; logged crashkernel load --refresh --plan-out /tmp/plan.json; send plan /tmp/plan.json"


class _Came(Fault):
    """Something is plugged into a running K1, after the load; and with `refresh` the same is loaded again for it."""

    kind = "change"
    argument = "[refresh]"
    _what: str

    def __init__(self, argument: str = "", seed: int = 0) -> None:
        super().__init__(argument, seed)
        if argument not in ("", "refresh"):
            raise UsageError(f"fault {self.word}: only a refresh may follow", hint=f"{self.name} or {self.name}:refresh")
        self._refresh = argument == "refresh"
        self._said: tuple[str, ...] = ()  # by `crashkernel status`, before a refresh

    @property
    def title(self) -> str:
        """What is done to the twin, in one line."""
        return f"{self._what} plugged into K1 after the load" + (", and the same is loaded again" if self._refresh else "")

    def fit(self, request: DrillRequest) -> None:
        """Where QEMU can plug something in.

        :raise UsageError: it cannot.
        """
        if request.machine != "pseries":
            raise UsageError(f"fault {self.word}: nothing can be plugged into {request.machine}", hint="--machine pseries")

    async def loaded(self, drill: Running) -> None:
        """Plug it in, wait until K1 has it, ask what is loaded what it makes of it, and perhaps load again."""
        async with drill.clock.stage(FAULT, drill.machine) as note:
            await self._plug(drill)
            self._said = tuple(
                line.removeprefix("OUT OF DATE: ")
                for line in await have_done(drill.machine, _STATUS)
                if line.startswith("OUT OF DATE: ")
            )
            if not self._said:
                raise GuestSaidNo("`crashkernel status` does not say that what is loaded is out of date")
            if self._refresh:
                drill.machine.say(f"do {_REFRESH}")
                drill.plan = await loaded_plan(drill.machine, note)
                if (status := await expect(drill.machine, "did")) != "0":
                    raise GuestSaidNo(f"K1 could not load again: exit {status}")

    async def _plug(self, drill: Running) -> None:
        raise NotImplementedError


class CpuAdded(_Came):
    """A CPU. K1 has a note buffer for each that may come, and all are in the header: no dump lacks its registers.

    But K2's device tree has it only after a refresh, and before that K2 cannot boot on it. Here an old one crashes, and with
    the fault `secondary` the new one.
    """

    name = "cpu-added"
    _what = "a CPU is"
    summary = "a CPU is plugged into K1 after the load; `:refresh`: and `load --refresh` run"

    def hardware(self, hardware: Hardware) -> Hardware:
        """A free slot."""
        return replace(hardware, cpus_to_come=1)

    async def _plug(self, drill: Running) -> None:
        number = await drill.machine.plug_cpu()
        online = f"/sys/devices/system/cpu/cpu{number}/online"
        await have_done(drill.machine, f"while [ ! -e {online} ] || [ $(cat {online}) != 1 ]; do sleep 0.1; done")
        await have_done(drill.machine, pinned(0))

    def judged_by(self, truth: Truth) -> Truth:
        """One more."""
        return replace(truth, cpus=truth.cpus + 1)

    def conclude(self, ending: Ending) -> bool:
        """The verdict has counted them."""
        if ending.verdict is not None and ending.verdict.registers_ok:
            came = next((line for line in purgatory_lines(ending.console.splitlines()) if "other CPUs came" in line), "")
            self.told = f"the dump has the new CPU's registers; status had said: {'; '.join(self._said)}; {came}"
        return False


class MemoryAdded(_Came):
    """Memory. What was loaded before does not know of it: `status` says so, and the dump is right but for it."""

    name = "memory-added"
    _what = "256 MiB are"
    summary = "256 MiB are plugged into K1 after the load; `:refresh`: and `load --refresh` run"

    def __init__(self, argument: str = "", seed: int = 0) -> None:
        super().__init__(argument, seed)
        self.expects = "dump" if self._refresh else "told"
        self._where: Range | None = None

    def fit(self, request: DrillRequest) -> None:
        """Where what comes lies right behind what there is.

        :raise UsageError: it does not.
        """
        super().fit(request)
        if parse_size(request.memory) % _GIB:
            raise UsageError(
                f"fault {self.word}: it comes at a multiple of 1 GiB, behind {request.memory} is a hole", hint="--memory 2G"
            )

    def hardware(self, hardware: Hardware) -> Hardware:
        """A free slot."""
        return replace(hardware, memory_to_come=_CAME)

    async def _plug(self, drill: Running) -> None:
        await have_done(drill.machine, "echo online >/sys/devices/system/memory/auto_online_blocks")
        self._where = await drill.machine.plug_memory(drill.twin, _CAME)
        block = f"/sys/devices/system/memory/memory{self._where.start // _CAME}"
        await have_done(drill.machine, f"while [ ! -e {block} ] || [ $(cat {block}/state) != online ]; do sleep 0.1; done")

    def judged_by(self, truth: Truth) -> Truth:
        """With a refresh it is K1's memory like any other; without, a dump that has something of it is wrong."""
        return replace(truth, memory_size=truth.memory_size + _CAME) if self._refresh else truth

    def conclude(self, ending: Ending) -> bool:
        """What status said must be of that memory, and the dump right but for it."""
        if ending.verdict is None or not ending.verdict.passed or self._where is None:
            return False
        if self._refresh:
            self.told = f"the dump has the {format_size(_CAME)} at {self._where}"
        else:
            self.told = next((line for line in self._said if str(self._where) in line), "")
        return False


class StuckCpu(Fault):
    """The last CPU turns round on one instruction, interrupts off.

    A kernel that has a system reset for its other CPUs (`smp_send_nmi_ipi`, arch/powerpc/kernel/smp.c) gets at it, and its
    registers. If not, it is given up after ten seconds; then nobody can take its hypervisor areas back either.
    """

    name = "stuck-cpu"
    kind = "change"
    summary = "K1's last CPU is stuck with interrupts off, and answers nobody"
    _registers: Mapping[str, int]
    _given_up = ""  # K1's words for it

    def fit(self, request: DrillRequest) -> None:
        """Not the only one; and it is not the one that crashes.

        :raise UsageError: it would be.
        """
        if request.smp < 2:
            raise UsageError("fault stuck-cpu needs a second CPU", hint="add --smp 2")
        if "secondary" in request.fault:
            raise UsageError("faults stuck-cpu and secondary: a CPU that is stuck does not crash", hint="give one of them")

    async def loaded(self, drill: Running) -> None:
        """Have it busy, for one that sleeps does nothing, and with nothing that init waits for."""
        interrupts = "for each in /proc/irq/*/smp_affinity_list; do echo 0 >$each; done 2>/dev/null; true"
        busy = f"import os; os.sched_setaffinity(0, {{{drill.twin.smp - 1}}}); [0 for _ in iter(int, 1)]"
        async with drill.clock.stage(FAULT, drill.machine):
            await have_done(drill.machine, interrupts)
            await have_done(drill.machine, pinned(0))
            await have_done(drill.machine, f'python3.11 -S -c "{busy}" 3>&- & sleep 1')

    async def dying(self, drill: Running, debugger: Debugger) -> None:
        """Send it to a branch to itself in K1's text. Any earlier, and K1 might hang with it: CPUs wait for each other."""
        machine, cpu = drill.machine, drill.twin.smp - 1
        await debugger.halted()
        here = (await machine.registers())[0]["msr"]
        place = _LINEAR + _branch_to_itself(drill, little_endian=bool(here & _MSR_LE))
        self._registers = await machine.send_to(debugger, cpu, place, msr=here & ~_MSR_EE_PR | _MSR_TRANSLATION)

    async def dead(self, drill: Running, debugger: Debugger, truth: Truth) -> bool:
        """K1 has said by now whether it got at it."""
        console = console_text(drill.machine.wiring)
        self._given_up = next((line.partition("] ")[2] for line in console.splitlines() if "not responding" in line), "")
        return False

    def judged_by(self, truth: Truth) -> Truth:
        """Its registers, as QEMU set them; or none, if K1 gave it up."""
        if self._given_up:
            return replace(truth, cpus=truth.cpus - 1)
        return replace(truth, registers=(*truth.registers, saved_exactly(self._registers)))

    def conclude(self, ending: Ending) -> bool:
        """What K1 and the purgatory made of it."""
        if ending.verdict is not None and ending.verdict.registers_ok:
            came = [line for line in purgatory_lines(ending.console.splitlines()) if "other CPUs came" in line]
            k1 = self._given_up or f"the dump has its registers, at {self._registers['nip']:#x}"
            self.told = "; ".join([k1, *came])
        return False


_LINEAR = 0xC000000000000000  # where K1 has its physical memory (PAGE_OFFSET)
_MSR_LE, _MSR_EE_PR, _MSR_TRANSLATION = 0x1, 0x8000 | 0x4000, 0x30  # Power ISA Book III 4.2.1
_BRANCH_TO_ITSELF = 0x48000000


def _branch_to_itself(drill: Running, *, little_endian: bool) -> int:
    """The physical address of one in K1's text."""
    word = _BRANCH_TO_ITSELF.to_bytes(4, "little" if little_endian else "big")
    for region in drill.plan.k1_layout:
        if region.name == "K1 text":
            text = read_ram(drill.machine.wiring.ram, region.range.size, region.range.start)
            at = text.find(word)
            while at >= 0 and at % 4:
                at = text.find(word, at + 1)
            if at >= 0:
                return region.range.start + at
    raise GuestSaidNo("K1's text has no branch to itself")
