"""What K2 meets: a disk or network that is gone, slow or broken, and no memory."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from crashkernel.drill.faults.base import Fault
from crashkernel.drill.stages import CAPTURE, MEMORY_SHORT, k2_said
from crashkernel.errors import UsageError
from crashkernel.memory import format_size, parse_size

if TYPE_CHECKING:
    from crashkernel.drill.faults.base import Ending, Running
    from crashkernel.drill.qemu import Hardware
    from crashkernel.drill.request import DrillRequest
    from crashkernel.drill.saving import Destination


class _TargetLost(Fault):
    """A target that does not take the dump.

    `crashkernel capture` is given another, and the dump must be there. With `alone`, or when a raw copy is made, there is
    none: K2 must say that it has no dump, and nothing may pass for one.
    """

    kind = "k2"
    target: Destination
    _sign: str  # a regular expression: what K2 must say when it has lost its only target

    def __init__(self, argument: str = "", seed: int = 0) -> None:
        super().__init__(argument, seed)
        self._alone = self._read(argument)

    def _read(self, argument: str) -> bool:
        """Whether this is the only target: all that the argument says, unless a fault takes more."""
        if argument not in ("", "alone"):
            raise UsageError(f"fault {self.word}: it is the only target or not", hint=f"{self.name} or {self.name}:alone")
        return argument == "alone"

    @property
    def seen_in_dump(self) -> bool:
        """If there is to be one."""
        return self.expects == "dump"

    @property
    def fallback(self) -> bool:
        """Another target, unless this one is to be alone."""
        return self.expects == "dump"

    def fit(self, request: DrillRequest) -> None:
        """Of the drills whose dump goes there.

        :raise UsageError: it goes elsewhere.
        """
        goes_to = "disk" if request.capture is None else request.capture_to
        if goes_to != self.target:
            raise UsageError(
                f"fault {self.word}: the dump goes to the {goes_to}",
                hint="add --capture LEVEL --capture-to network" if self.target == "network" else "leave --capture-to out",
            )
        self.expects = "told" if self._alone or request.capture is None else "dump"

    def conclude(self, ending: Ending) -> bool:
        """Without another target K2 must have said that it failed, and of what."""
        failure = ending.failure
        if self.expects == "told":
            if failure is None or failure.stage != CAPTURE.name or not re.search(self._sign, failure.message):
                return False
            self.told = f"no dump: {failure.message.removeprefix(f'{CAPTURE.name}: ')}"
            return True
        if ending.verdict is not None and ending.verdict.passed:
            other = "network" if self.target == "disk" else "disk"
            self.told = f"the {other} took the dump, {ending.seconds.get(CAPTURE.name, 0):.0f} s after K2 was up"
        return False


class DiskGone(_TargetLost):
    """The disk that K2 is to save to is not there when K2 looks for it."""

    name = "disk-gone"
    argument = "[alone]"
    summary = "K2 has no disk; with --capture it is given the network as a second target, but for `:alone`"
    target = "disk"
    _sign = "/dev/vda"

    def hardware(self, hardware: Hardware) -> Hardware:
        """K1 never uses it, so it may as well never be there."""
        return replace(hardware, disk=False)


class NetworkGone(_TargetLost):
    """The cable is pulled while K1 dies."""

    name = "network-gone"
    argument = "[alone]"
    summary = "the network's cable is pulled before K2 runs; K2 is given the disk as a second target, but for `:alone`"
    target = "network"
    _sign = r"//10\.0\.2\.2[:/]"

    async def k2_enters(self, drill: Running) -> None:
        """Pull it."""
        await drill.machine.pull_network()


class DiskFailing(_TargetLost):
    """The disk takes some of the dump, and then no more."""

    name = "disk-failing"
    argument = "[OFFSET][,alone]"
    summary = "K2's disk cannot be written at OFFSET (16M); with --capture there is the network, but for `,alone`"
    target = "disk"
    _sign = "/dev/vda.*Input/output error"

    def _read(self, argument: str) -> bool:
        offset, _, alone = argument.partition(",")
        if offset == "alone" and not alone:
            offset, alone = "", "alone"
        if alone not in ("", "alone"):
            raise UsageError(f"fault {self.word} is not understood", hint="as disk-failing:16M,alone")
        self._offset = parse_size(offset or "16M")
        return alone == "alone"

    @property
    def title(self) -> str:
        """What is done to the twin, in one line."""
        return f"K2's disk cannot be written {format_size(self._offset)} from its start"

    def hardware(self, hardware: Hardware) -> Hardware:
        """A sector that QEMU fails every write to."""
        return replace(hardware, bad_sector=self._offset)


class DiskSlow(Fault):
    """A disk that takes its time. Patience is all that is asked for."""

    name = "disk-slow"
    kind = "k2"
    argument = "[RATE]"
    summary = "K2's disk takes RATE bytes a second (16M, with --capture 1M)"

    def __init__(self, argument: str = "", seed: int = 0) -> None:
        super().__init__(argument, seed)
        self._rate = parse_size(argument or "16M")
        if self._rate < 1 << 20:
            raise UsageError(f"fault {self.word}: less than 1 MiB a second, and no drill ends", hint="as disk-slow:16M")
        self._written, self._waited = 0, 0.0  # bytes, seconds

    @property
    def title(self) -> str:
        """What is done to the twin, in one line."""
        return f"K2's disk takes {format_size(self._rate)} a second"

    def fit(self, request: DrillRequest) -> None:
        """Of the drills whose dump goes there, and can be there before the drill's patience ends.

        :raise UsageError: it goes elsewhere, or is too much.
        """
        if request.capture is None:
            seconds = parse_size(request.memory) / self._rate
            if seconds > CAPTURE.deadline / 2:
                raise UsageError(
                    f"fault {self.word}: a raw copy of {request.memory} takes {seconds:,.0f} s, a drill gives it "
                    f"{CAPTURE.deadline:.0f} s, and the machine is slow as well",
                    hint="a higher rate, a smaller --memory, or --capture 31",
                )
        elif request.capture_to != "disk":
            raise UsageError(f"fault {self.word}: the dump goes over the network", hint="leave --capture-to out")
        elif ":" not in self.word:
            self._rate = _CAPTURES_RATE

    def hardware(self, hardware: Hardware) -> Hardware:
        """QEMU's throttle."""
        return replace(hardware, disk_rate=self._rate)

    async def saved(self, drill: Running) -> None:
        """Ask QEMU, which counts what the guest waits for its disk."""
        self._written, self._waited = await drill.machine.disk_writes()

    def conclude(self, ending: Ending) -> bool:
        """K2 must have waited for it most of the time: one that compresses may be slower, and then it shows nothing."""
        if ending.verdict is not None and ending.verdict.passed:
            took, due = ending.seconds.get(CAPTURE.name, 0.0), self._written / self._rate  # seconds
            if min(took, self._waited) * _BURST >= due >= took / 2 > 0:
                self.told = f"{format_size(self._written)} in {took:.0f} s; its writes took {self._waited:.0f} s, added up"
        return False


_CAPTURES_RATE = 1 << 20  # bytes a second: a twin's K2 writes two to three times as much, compressed
_BURST = 1.2  # times its rate that a throttle may let through on the whole (throttle.txt: bursts)


_TAKEN = "the drill takes K2's memory"  # in K2's log, from where on its words count


class K2OutOfMemory(Fault):
    """Something takes all of K2's memory but a little before the dump is saved, and does not give it back."""

    name = "k2-oom"
    kind = "k2"
    argument = "[LEFT]"
    summary = "all of K2's memory but LEFT (16M) is taken before the dump is saved"

    def __init__(self, argument: str = "", seed: int = 0) -> None:
        super().__init__(argument, seed)
        self._left = parse_size(argument or "16M")
        self.expects = "told"

    def fit(self, request: DrillRequest) -> None:
        """A raw copy needs next to no memory.

        :raise UsageError: one is to be made.
        """
        if request.capture is None:
            raise UsageError(f"fault {self.word}: a raw copy needs no memory to speak of", hint="add --capture LEVEL")

    @property
    def title(self) -> str:
        """What is done to the twin, in one line."""
        return f"all of K2's memory but {format_size(self._left)} is taken before the dump is saved"

    @property
    def slow(self) -> bool:
        """Who has no memory may stand still anywhere."""
        return True

    @property
    def k2_script(self) -> str:
        """Files of a root that is a ramfs: nobody can take that memory back."""
        return f"""echo "{_TAKEN}" >/dev/kmsg
left=999999
while [ $left -gt {self._left >> 10} ]; do
    while read -r name kib unit; do [ $name != MemAvailable: ] || left=$kib; done </proc/meminfo
    dd if=/dev/zero bs=64k count=16 >>/taken 2>/dev/null
done
"""

    @property
    def seen_in_dump(self) -> bool:
        """There is none."""
        return False

    def conclude(self, ending: Ending) -> bool:
        """K2 must have said that it is for want of memory, and have no dump."""
        failure = ending.failure
        _, taken, console = k2_said(ending.console).partition(_TAKEN)
        if failure is None or failure.stage != CAPTURE.name or not taken:
            return False
        words = [line.partition("] ")[2] for line in console.splitlines() if MEMORY_SHORT.search(line)]
        if not words and not MEMORY_SHORT.search(failure.message):
            return False
        self.told = "; ".join([failure.message.removeprefix(f"{failure.stage}: "), *words[:1]])
        return True
