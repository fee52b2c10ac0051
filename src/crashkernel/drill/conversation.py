"""What the host and the twin say to each other in a drill: the guests' messages, K2's first words, and signs of life."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING

from crashkernel.drill.ram import read_ram
from crashkernel.drill.saving import FOOTPRINT_WORDS
from crashkernel.drill.stages import GuestSaidNo, Silent
from crashkernel.machine import Region
from crashkernel.memory import Range
from crashkernel.placement.plan import LoadPlan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from crashkernel.drill.qemu import Debugger, RunningTwin
    from crashkernel.drill.twin import Twin


async def expect(
    machine: RunningTwin,
    word: str,
    *,
    log: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
    memory: Callable[[str, str], None] | None = None,
) -> str:
    """Wait for the guest's message `word`; its argument. What our command there prints on the way goes to `log`.

    :raise GuestSaidNo: it failed.
    :raise EOFError: the twin ended.
    """
    last = ""
    while True:
        line = await machine.line()
        kind, _, rest = line.partition(" ")
        if kind == word:
            return rest.split(" ")[0]
        if kind == "region":
            _note_region(machine, rest)
        if kind == "failed":
            # a number is our command's exit status: its own last line says more
            raise GuestSaidNo(last if rest.isdigit() and last else f"the guest says: {rest}")
        if kind == "log":
            last = rest.removeprefix("crashkernel: ")
            if log:
                log(rest)
        if kind == "progress" and progress:
            progress(int(rest))
        if kind in FOOTPRINT_WORDS and memory:
            memory(kind, rest)


async def have_done(machine: RunningTwin, script: str) -> list[str]:
    """Have K1's shell do something for a fault; the lines that it says with `say answer ...`.

    :raise GuestSaidNo: it failed.
    """
    machine.say(f"do {script}")
    answers: list[str] = []
    while True:
        kind, _, rest = (await machine.line()).partition(" ")
        match kind:
            case "did" if rest == "0":
                return answers
            case "did":
                raise GuestSaidNo(f"K1 could not do what the fault needs: exit {rest} of {script!r}")
            case "failed":
                raise GuestSaidNo(f"the guest says: {rest}")
            case "answer":
                answers.append(rest)


def pinned(cpu: int) -> str:
    """A command for `have_done`: from now on K1's init, which crashes it, runs on that CPU."""
    return f'python3.11 -S -c "import os; os.sched_setaffinity(1, {{{cpu}}})"'


async def loaded_plan(machine: RunningTwin, log: Callable[[str], None]) -> LoadPlan:
    """The plan of what K1 has loaded, as K1 sends it; what the loader prints goes to `log`.

    :raise GuestSaidNo: the load failed.
    :raise FormatError: it is no plan.
    """
    size = int(await expect(machine, "plan", log=log))
    return LoadPlan.from_json((await machine.exactly(size)).decode())


_SILENCE = 60  # seconds; K2's first line takes one or two
_PANIC = b"Kernel panic - not syncing: "


async def first_words(machine: RunningTwin, plan: LoadPlan) -> None:
    """Wait for K2's first line. A kernel that dies before its console works leaves its reason in its log, in its memory.

    :raise Silent: there was none.
    """
    try:
        async with asyncio.timeout(_SILENCE):
            await machine.spoke.wait()
    except TimeoutError as error:
        raise Silent(f"K2 printed nothing for {_SILENCE} s{_log_says(machine, plan)}") from error


def _log_says(machine: RunningTwin, plan: LoadPlan) -> str:
    """The panic in K2's log buffer, for the end of a sentence; "" without."""
    # the buffer is static data: in K2's image, wherever that runs
    memory = read_ram(machine.wiring.ram, plan.kernel_span, plan.entry)
    at = memory.rfind(_PANIC)
    while at >= 0:
        text = re.split(rb"[\0\n]| \]---", memory[at : at + 200])[0]  # the ring's records have no terminator
        if b"%s" not in text:  # else it is the format itself
            return f"; its log says: {text.decode('ascii', 'replace')}"
        at = memory.rfind(_PANIC, 0, at)
    return ""


def patience_with(boot: float) -> float:
    """Seconds of silence after which a K2 that may stand still anywhere is given up, where K1 took `boot` to start.

    In twice the time of a whole boot a slow one says something.
    """
    return max(_SILENCE + 15, 2 * boot)


async def run_until(machine: RunningTwin, debugger: Debugger, address: int) -> int:
    """Run to physical `address` in real mode; the number of the CPU that came there.

    A user program of K1 may well use the same number as a virtual address.
    """
    while True:
        await debugger.set_breakpoint(address)
        await debugger.resume()
        await debugger.stopped()
        await debugger.clear_breakpoint(address)
        if (cpu := await machine.in_real_mode_at(address)) is not None:
            return cpu
        await debugger.step()  # past it, or it would stop there for ever


@contextlib.asynccontextmanager
async def signs_of_life(machine: RunningTwin, plan: LoadPlan, patience: float | None) -> AsyncIterator[None]:
    """Give up on a twin that says nothing on its console or port for `patience` seconds; None waits for ever.

    :raise GuestSaidNo: it was given up.
    """
    if patience is None:
        yield
        return
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(patience) as limit:

            def heard() -> None:
                if not limit.expired():
                    limit.reschedule(loop.time() + patience)

            machine.on_sound = heard
            yield
    except TimeoutError as error:
        words = f"nothing more was heard for {patience:.0f} s"
        if machine.console:
            words += f", the last was {machine.console[-1]!r}"
        raise GuestSaidNo(f"{words}; {await machine.whereabouts()}{_log_says(machine, plan)}") from error
    finally:
        machine.on_sound = None


def _note_region(machine: RunningTwin, text: str) -> None:
    """Take a line "NAME HEX": a memory region as the bytes of its device tree property, pairs of 64-bit address and size."""
    name, _, digits = text.partition(" ")
    data = bytes.fromhex(digits)
    for at in range(0, len(data) // 16 * 16, 16):
        base, size = (int.from_bytes(data[at + half : at + half + 8], "big") for half in (0, 8))
        if size:
            machine.regions.setdefault(name, []).append(Range.sized(base, size))


def kernels_regions(machine: RunningTwin, twin: Twin) -> tuple[Range, tuple[Region, ...]]:
    """The reserved region, and on bare metal the firmware's, in K1's kernel's words: the loader is not asked.

    :raise GuestSaidNo: it has no reserved region.
    """
    reserved = machine.regions.pop("crashkernel", [])
    if len(reserved) != 1:
        raise GuestSaidNo("K1 has no reserved region: is crashkernel= valid for this memory size?")
    if twin.machine == "pseries":
        return reserved[0], ()
    return reserved[0], tuple(Region(name, piece) for name, pieces in machine.regions.items() for piece in pieces)
