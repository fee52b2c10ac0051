"""How and where K1 dies, other than by the drill's own init on the one CPU: each of these must be dumped as well."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from crashkernel.drill.conversation import have_done, pinned
from crashkernel.drill.faults.base import Fault, saved_exactly
from crashkernel.drill.stages import CRASH, DAMAGE, FAULT, KERNEL_STARTS, GuestSaidNo, purgatory_lines
from crashkernel.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crashkernel.drill.faults.base import Ending, Running
    from crashkernel.drill.qemu import Debugger, Hardware, RunningTwin
    from crashkernel.drill.request import DrillRequest
    from crashkernel.drill.verdict import Truth

_LOCAL_ENTRY = 8  # bytes from a function's first instruction to where its own kernel enters it (ELFv2 ABI 2.3.2.1)
_SYSTEM_RESET = "exception 0x0100"  # as the purgatory tells it
_NULL = 0  # where K1 is sent to: an oops
_FAULTED = (
    "Unable to handle kernel"  # "BUG: Unable to handle kernel instruction fetch (NULL pointer?)", arch/powerpc/mm/fault.c
)


class OnOtherCpu(Fault):
    """The task that crashes runs on the last CPU. The dump must have its registers as that CPU's, and K2 starts there."""

    name = "secondary"
    kind = "crash"
    summary = "K1 crashes on its last CPU, not on the one that booted"

    def fit(self, request: DrillRequest) -> None:
        """Of two CPUs and more.

        :raise UsageError: there is only one.
        """
        came = any(word.partition(":")[0] == "cpu-added" for word in request.fault)
        if request.smp + came < 2:
            raise UsageError("fault secondary needs a second CPU", hint="add --smp 2")
        self._cpu = request.smp - 1 + came

    async def loaded(self, drill: Running) -> None:
        """Move init there."""
        async with drill.clock.stage(FAULT, drill.machine):
            await have_done(drill.machine, pinned(self._cpu))

    def judged_by(self, truth: Truth) -> Truth:
        """The crashed task's registers are that CPU's."""
        return replace(truth, crashed_cpu=self._cpu)

    def conclude(self, ending: Ending) -> bool:
        """The verdict has seen to it."""
        if ending.verdict is not None and ending.verdict.registers_ok:
            self.told = f"the registers of the task that crashed are CPU {self._cpu}'s"
        return False


class _AtFunction(Fault):
    """K1 is sent to address 0 when it next comes to a function, once: an oops there, as of a call through a null pointer."""

    kind = "crash"
    function = ""
    _address = 0
    _registers: Mapping[str, int] | None = None

    async def loaded(self, drill: Running) -> None:
        """Ask K1 where the function is."""
        async with drill.clock.stage(FAULT, drill.machine):
            self._address = await _address_of(drill, self.function)

    async def crash(self, drill: Running, debugger: Debugger) -> None:
        """Have K1 crash, and trip it there."""
        drill.machine.say("crash")
        await self._trip(drill, debugger)

    async def _trip(self, drill: Running, debugger: Debugger) -> None:
        purgatory = drill.plan.segment("purgatory").range.start
        entries = (self._address, self._address + _LOCAL_ENTRY)
        for address in (*entries, purgatory):
            await debugger.set_breakpoint(address)
        while True:
            await debugger.resume()
            cpu = await debugger.stopped()
            if (await drill.machine.registers())[cpu]["nip"] in entries:
                break
            if await drill.machine.in_real_mode_at(purgatory) is not None:
                raise GuestSaidNo(f"K1 died without coming to {self.function}")
        for address in (*entries, purgatory):
            await debugger.clear_breakpoint(address)
        self._registers = await drill.machine.send_to(debugger, cpu, _NULL)


class Oops(_AtFunction):
    """Any function of K1's: by its timer, by what its init does, or by the crash itself K1 must come there."""

    name = "oops"
    argument = "FUNCTION"
    summary = "K1 oopses where it next comes to FUNCTION, with panic_on_oops"

    def __init__(self, argument: str = "", seed: int = 0) -> None:
        super().__init__(argument, seed)
        self.function = _function_name(argument, self.word)

    async def loaded(self, drill: Running) -> None:
        """An oops is to end K1."""
        await super().loaded(drill)
        async with drill.clock.stage(FAULT, drill.machine):
            await have_done(drill.machine, "echo 1 >/proc/sys/kernel/panic_on_oops")

    @property
    def title(self) -> str:
        """What is done to the twin, in one line."""
        return f"K1 oopses in {self.function}"

    def judged_by(self, truth: Truth) -> Truth:
        """Whoever was there: with the registers that QEMU had."""
        return replace(truth, crashed_pid=None, registers=(*truth.registers, saved_exactly(self._registers or {})))

    def conclude(self, ending: Ending) -> bool:
        """The verdict has seen to it."""
        if ending.verdict is not None and ending.verdict.registers_ok and self._registers is not None:
            self.told = (
                f"the dump has the registers with which K1 left {self.function}, called from {self._registers['link']:#x}"
            )
        return False


class InInterrupt(Oops):
    """In the timer's interrupt handler, hard interrupt context: K1 dies of the oops whatever panic_on_oops says."""

    name = "interrupt"
    argument = ""
    summary = "K1 oopses in its timer's interrupt handler"

    def __init__(self, argument: str = "", seed: int = 0) -> None:
        Fault.__init__(self, argument, seed)
        self.function = "hrtimer_interrupt"

    async def loaded(self, drill: Running) -> None:
        """Nothing but the address."""
        await _AtFunction.loaded(self, drill)

    async def crash(self, drill: Running, debugger: Debugger) -> None:
        """The next tick will do."""
        await self._trip(drill, debugger)


class InNotifier(_AtFunction):
    """A panic notifier that faults, with K1 told to call them before it goes to K2."""

    name = "panic-notifier"
    summary = "K1 oopses in a panic notifier, called before K2 (crash_kexec_post_notifiers)"
    function = "rcu_panic"  # kernel/rcu/tree_stall.h: on the list of every kernel

    def hardware(self, hardware: Hardware) -> Hardware:
        """A partition's panic notifier tells the hypervisor, and QEMU would end there, which a real one does not."""
        return replace(hardware, outlives_panic=True, kernel_options=(*hardware.kernel_options, "crash_kexec_post_notifiers"))

    @property
    def seen_in_dump(self) -> bool:
        """K1's console has it."""
        return False

    def conclude(self, ending: Ending) -> bool:
        """It must have said that it faulted after its panic. Then it may panic again, or go to K2 at once."""
        panics = _panics(ending.console)
        dying = ending.console.partition(panics[0])[2].partition(KERNEL_STARTS)[0] if panics else ""
        if self._registers is not None and _FAULTED in dying:
            self.told = f"K1 faulted after its panic, and {f'panicked again as {panics[-1]!r}' if panics[1:] else 'went to K2'}"
        return False


class DoubleCrash(_AtFunction):
    """A second fault on the way from the panic to K2: the kernel goes to K2 only once, and has no second try."""

    name = "double"
    argument = "[FUNCTION]"
    summary = "K1 oopses on its way from the panic to K2, in FUNCTION (default_machine_crash_shutdown)"

    def __init__(self, argument: str = "", seed: int = 0) -> None:
        super().__init__(argument, seed)
        self.function = _function_name(argument or "default_machine_crash_shutdown", self.word)
        self.expects = "told"

    @property
    def title(self) -> str:
        """What is done to the twin, in one line."""
        return f"K1 oopses in {self.function}, on its way from the panic to K2"

    @property
    def seen_in_dump(self) -> bool:
        """There is none."""
        return False

    def conclude(self, ending: Ending) -> bool:
        """K1 must have said both, and the purgatory nothing."""
        panics = _panics(ending.console)
        if ending.failure is None or ending.failure.stage != CRASH.name or self._registers is None or len(panics) < 2:
            return False
        if _FAULTED not in ending.console or purgatory_lines(ending.console.splitlines()):
            return False
        self.told = f"no dump: K1 did not come to its purgatory, and said: {panics[-1]}"
        return True


class Nmi(Fault):
    """A system reset from outside, as from a management console's "dump" button: without a word K1 goes to K2.

    A second one, while the purgatory is at work, is the purgatory's to tell.
    """

    name = "nmi"
    kind = "crash"
    argument = "[handover]"
    summary = "a system reset (NMI) from outside ends K1; `:handover`: another one comes while the purgatory is at work"

    def __init__(self, argument: str = "", seed: int = 0) -> None:
        super().__init__(argument, seed)
        if argument not in ("", "handover"):
            raise UsageError(f"fault {self.word}: it comes to K1, or to the handover", hint="nmi or nmi:handover")
        self._again = argument == "handover"
        self.expects = "told" if self._again else "dump"
        self._registers: tuple[Mapping[str, int], ...] = ()

    @property
    def title(self) -> str:
        """What is done to the twin, in one line."""
        return "a system reset comes while the purgatory is at work" if self._again else "a system reset ends K1"

    def fit(self, request: DrillRequest) -> None:
        """With the second one there is no dump.

        :raise UsageError: one is to be captured.
        """
        if self._again and request.capture is not None:
            raise UsageError(f"with fault {self.word} there is no dump to capture", hint="leave --capture out")

    @property
    def seen_in_dump(self) -> bool:
        """The first one's registers; of the second one the purgatory tells."""
        return not self._again

    async def crash(self, drill: Running, debugger: Debugger) -> None:
        """Press the button, and remember what every CPU was at."""
        if self._again:
            drill.machine.say("crash")
            return
        self._registers = tuple(await drill.machine.registers())
        await drill.machine.inject_nmi()

    async def dead(self, drill: Running, debugger: Debugger, truth: Truth) -> bool:
        """Press it again when the purgatory has begun to move."""
        if not self._again:
            return False
        machine = drill.machine
        async with drill.clock.stage(DAMAGE, machine):
            machine.spoke.clear()
            await debugger.detach()
            await _line_of_purgatory(machine, " ok")
            await machine.inject_nmi()
            self.told = await _line_of_purgatory(machine, _SYSTEM_RESET)
            if drill.request.on_damage == "reboot":  # in all other cases it halts there
                await machine.process.wait()
        return True

    def judged_by(self, truth: Truth) -> Truth:
        """No panic's line; and on a partition, whose idle CPUs keep their registers, what QEMU had."""
        if self._again:
            return truth
        known = () if truth.firmware else tuple(saved_exactly(each) for each in self._registers)
        return replace(truth, crashed_pid=None, panic="", says_why=False, registers=(*truth.registers, *known))

    def conclude(self, ending: Ending) -> bool:
        """The verdict has seen to it."""
        if not self._again and ending.verdict is not None and ending.verdict.registers_ok:
            self.told = f"the dump has the registers of {len(self._registers)} CPUs as they were when the reset came"
        return False


class MemoryPressure(Fault):
    """K1 has no memory left and its out-of-memory killer is at work."""

    name = "memory-pressure"
    kind = "crash"
    summary = "K1 crashes with no memory left, its out-of-memory killer at work"

    _seen = ""
    _LEFT = 24 << 10  # KiB
    _HOGS = 3  # while one is killed, the others go on

    @property
    def seen_in_dump(self) -> bool:
        """K1 tells."""
        return False

    async def loaded(self, drill: Running) -> None:
        """Let them loose, and wait until one was killed and nothing is left."""
        hog = _python("[b'x' * (1 << 20) for _ in iter(int, 1)]")
        started = (
            f"for hog in {' '.join(map(str, range(self._HOGS)))}; do (while :; do {hog}; done) >/dev/null 2>&1 3>&- & done"
        )
        # the shell's own words only: nothing can be started any more
        wait = (
            "killed=0 left=999999; while [ $killed = 0 ] || [ $left -gt "
            f"{self._LEFT} ]; do "
            "while read -r name value; do [ $name != oom_kill ] || killed=$value; done </proc/vmstat; "
            "while read -r name value unit; do [ $name != MemAvailable: ] || left=$value; done </proc/meminfo; done; "
            'say "answer $killed $left"'
        )
        async with drill.clock.stage(FAULT, drill.machine):
            (answer,) = await have_done(drill.machine, f"{started}; {wait}")
            killed, left = (int(number) for number in answer.split())
        self._seen = f"K1's killer had killed {killed}, {left} KiB were available"

    def conclude(self, ending: Ending) -> bool:
        """What K1 said before it died."""
        self.told = self._seen
        return False


def _panics(console: str) -> list[str]:
    """Every panic's line, without its time."""
    return re.findall(r"Kernel panic - not syncing: [^\n]*", console)


def _function_name(text: str, word: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", text):
        raise UsageError(f"fault {word}: no function of a kernel has that name")
    return text


def _python(code: str) -> str:
    """A command of K1's shell."""
    return f'python3.11 -S -c "{code}"'


async def _address_of(drill: Running, function: str) -> int:
    code = (
        "import sys; print(*{w[0] for w in map(str.split, open('/proc/kallsyms')) "
        f"if w[2] == '{function}' and w[1] in 'tTwW'}})"
    )
    (answer,) = await have_done(drill.machine, f'say "answer $({_python(code)})"')
    addresses = answer.split()
    if len(addresses) != 1 or not int(addresses[0], 16):
        found = f"{len(addresses)} functions" if addresses else "no function"
        raise GuestSaidNo(f"K1 has {found} of the name {function}")
    return int(addresses[0], 16)


async def _line_of_purgatory(machine: RunningTwin, words: str) -> str:
    """Wait for one of the purgatory's lines with these words."""
    while True:
        for line in purgatory_lines(machine.console):
            if words in line:
                return line
        await machine.spoke.wait()
        machine.spoke.clear()
