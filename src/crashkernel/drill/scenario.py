"""One drill: a twin boots K1, loads K2 with our loader, dies, hands over, saves its memory; and the result is judged.

The order of things is `run_drill`, top to bottom. Every stage has a deadline, and nothing outlives the drill.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crashkernel.drill.arrival import BLANK, LOG, MANIFEST, Arrival, arrival
from crashkernel.drill.budget import drill_share, working_directory
from crashkernel.drill.dma import (
    REGIONS,
    Dma,
    DmaReport,
    RogueDevice,
    choose_targets,
    driver_command,
)
from crashkernel.drill.filtered import judge_filtered
from crashkernel.drill.guest import NONCE_SIZE, Loader, build_capture_image, build_crash_image
from crashkernel.drill.qemu import Debugger, RunningTwin, Wiring, qemu_command
from crashkernel.drill.record import CONSOLE, DUMP, EVIDENCE, PLAN, TRUTH, evidence_json
from crashkernel.drill.saving import FOOTPRINT_WORDS, Footprint
from crashkernel.drill.verdict import Truth, Verdict, begin_verdict, judge
from crashkernel.errors import FormatError, StageFailed, UsageError, VerificationError
from crashkernel.machine import HEAD_SIZE, Region
from crashkernel.machine.live import cpu_list
from crashkernel.memory import Range, RangeSet, format_size
from crashkernel.placement.plan import LoadPlan, PlacementName, SegmentContent
from crashkernel.purgatory import PARAMETERS_OFFSET, STATE_OFFSET

if TYPE_CHECKING:
    from crashkernel.drill.debian import Kernel
    from crashkernel.drill.request import DrillRequest, Supplies
    from crashkernel.drill.saving import Saving
    from crashkernel.drill.twin import Twin

CAPTURE_CMDLINE = "console=hvc0 irqpoll reset_devices rdinit=/init"
_ONE_CPU = " maxcpus=1"
# As tmpfs the root may take half of the memory that is free while its archive is still there (init_rootfs, init/do_mounts.c),
# and what goes beyond is silently left out.
_WHOLE_ROOT = " rootfstype=ramfs"
_CRASHED_PID = 1  # the drill's init crashes K1 itself


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the drill that the user waits for. `deadline` is in seconds on a slow machine."""

    name: str
    deadline: float
    likely: str  # what to look at when it fails


WAIT = Stage("wait", float("inf"), "")  # for other drills on this machine to end
BOOT_K1 = Stage("K1 boot", 300, "does this kernel boot on this machine model and CPU? see the console")
LOAD = Stage("load", 180, "the loader's own message says what to change")
DRIVER = Stage(
    "driver", 180, "K1's driver needs packet sockets and /proc/PID/pagemap: the console's last lines say what it missed"
)
CRASH = Stage("crash", 120, "K1 did not reach the purgatory: did the panic take another path (fadump, panic_timeout)?")
COPY_TRUTH = Stage("truth", 120, "the host could not copy the twin's memory: is there room for it?")
HANDOVER = Stage("handover", 120, "the purgatory did not reach K2's first instruction: its last line on the console says where")
DAMAGE = Stage("damage", 120, "the purgatory said nothing of the flipped bit")
BOOT_K2 = Stage("K2 boot", 300, "K2 started but did not come up: too little memory in crashkernel=, or a wrong device tree")
CAPTURE = Stage("capture", 900, "K2 could not save /proc/vmcore")
VERIFY = Stage("verify", 600, "")
DESCRIBE = Stage("describe", 180, "the command's own message says what to change")


@dataclass(frozen=True, slots=True)
class Scenario:
    """What to drill, and with what. `keep` is the directory to leave dump, truth, plan and logs in; None throws them away."""

    request: DrillRequest
    supplies: Supplies
    keep: Path | None = None
    flip: SegmentContent | None = None  # flip a bit of this once K1 is dead: the purgatory is to say so
    dma: Dma | None = None  # a device goes on writing when K1 is dead
    twin: Twin = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "twin", self.request.resolved(self.k1.vmlinux))

    @property
    def k1(self) -> Kernel:
        """The kernel that dies."""
        return self.supplies.k1

    @property
    def k2(self) -> Kernel:
        """The kernel that captures."""
        return self.supplies.k2

    @property
    def placement(self) -> PlacementName:
        """Where K2 runs."""
        return self.request.placement

    @property
    def saving(self) -> Saving | None:
        """`crashkernel capture` saves the dump; None: a raw copy of /proc/vmcore."""
        return self.request.saving


@dataclass(slots=True)
class Outcome:
    """What a drill showed. `verdict` is None when a stage failed before there was a dump, or K2 was not to be entered."""

    scenario: Scenario
    stages: dict[str, float] = field(default_factory=dict)  # seconds
    verdict: Verdict | None = None
    told: str | None = None  # the purgatory's own line about the flipped bit
    dma: DmaReport | None = None
    footprint: Footprint = field(default_factory=Footprint)  # of the capture, if `crashkernel capture` saved the dump
    failure: StageFailed | None = None
    plan: LoadPlan | None = None
    dump: Path | None = None
    seconds: float = 0.0  # from building the images to the verdict

    @property
    def passed(self) -> bool:
        """Whether the drill proved what it is for."""
        if self.failure is not None:
            return False
        return self.told is not None if self.scenario.flip else self.verdict is not None and self.verdict.passed


Listener = Callable[[Stage, str], None]
"""Told of each stage as it begins (with "") and of what happens in it."""


class _Clock:
    """Runs stages: each has its deadline, its time is taken, and what breaks it becomes a `StageFailed`."""

    def __init__(self, outcome: Outcome, tell: Listener) -> None:
        self._outcome = outcome
        self._tell = tell

    @contextlib.asynccontextmanager
    async def stage(self, stage: Stage, machine: RunningTwin | None = None) -> AsyncIterator[Callable[[str], None]]:
        self._tell(stage, "")
        start = time.monotonic()
        try:
            async with asyncio.timeout(stage.deadline):
                yield lambda text: self._tell(stage, text)
        except TimeoutError as error:
            raise self._failed(stage, f"not done after {stage.deadline:.0f} s", machine) from error
        except EOFError as error:
            # the console's last words may still be on their way
            await asyncio.sleep(0.2)
            raise self._failed(stage, str(error), machine) from error
        except _Silent as error:
            console = tuple(machine.console) if machine else ()
            raise StageFailed(stage.name, error.reason, console=console, hint=_likely(stage, (error.reason,))) from error
        except _GuestSaidNo as error:
            await asyncio.sleep(0.2)
            raise self._failed(stage, error.reason, machine) from error
        except (OSError, ValueError, FormatError) as error:
            # QEMU gone with words unread, a full disk, a guest that says nonsense
            await asyncio.sleep(0.2)
            raise self._failed(stage, f"{type(error).__name__}: {error}", machine) from error
        finally:
            self._outcome.stages[stage.name] = round(time.monotonic() - start, 3)

    def taken(self, stage: Stage) -> float:
        """Seconds that a stage took, once it is over."""
        return self._outcome.stages[stage.name]

    def _failed(self, stage: Stage, message: str, machine: RunningTwin | None) -> StageFailed:
        console = tuple(machine.console) if machine else ()
        if stage is HANDOVER:  # what the purgatory found is the reason for all else
            message = _damage_told(console) or message
        return StageFailed(stage.name, message, console=console, hint=_likely(stage, (*console, message)))


class _GuestSaidNo(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Silent(_GuestSaidNo):
    """K2 never printed a line: what the console holds is K1's."""


def run_drill(scenario: Scenario, tell: Listener) -> Outcome:
    """Drill once. A stage that fails is in the outcome, not raised.

    :raise EnvironmentFault: this machine lacks something, or has no room.
    """
    outcome = Outcome(scenario)
    with _room(scenario, tell) as directory:
        start = time.monotonic()
        try:
            asyncio.run(_arrange(scenario, Wiring(directory), outcome, tell))
        except StageFailed as failure:
            outcome.failure = failure
        outcome.seconds = round(time.monotonic() - start, 3)
        if outcome.dma is not None:
            outcome.dma.effect = _effect(outcome, directory / CONSOLE)
        if scenario.keep is not None:
            _keep(directory, scenario.keep, outcome)
    return outcome


def _room(scenario: Scenario, tell: Listener) -> contextlib.AbstractContextManager[Path]:
    """A directory to drill in, once this machine has room for one more drill."""
    begun = False

    def waiting(reason: str) -> None:
        nonlocal begun
        if not begun:
            tell(WAIT, "")
            begun = True
        tell(WAIT, f"for {reason}")

    return working_directory(drill_share(scenario.twin.memory, scenario.twin.smp, saved=scenario.saving is not None), waiting)


async def _arrange(scenario: Scenario, wiring: Wiring, outcome: Outcome, tell: Listener) -> None:
    """Drill, with somebody to receive the dump where that is wanted."""
    if scenario.saving is None:
        await _drill(scenario, wiring, outcome, tell, None)
        return
    async with arrival(scenario.saving, wiring.disk, wiring.directory) as arriving:
        await _drill(scenario, wiring, outcome, tell, arriving)


async def _drill(scenario: Scenario, wiring: Wiring, outcome: Outcome, tell: Listener, arriving: Arrival | None) -> None:
    clock = _Clock(outcome, tell)
    nonce = secrets.token_bytes(NONCE_SIZE)
    initrd = _build(scenario, wiring, nonce, "crashkernel", arriving)
    network = scenario.saving is not None and scenario.saving.to == "network"
    command = qemu_command(scenario.twin, scenario.k1.vmlinux, initrd, wiring, network=network)
    async with (
        _prepared(wiring, scenario.twin, BLANK if arriving else 0) as disk_filled,
        RunningTwin.start(command, wiring) as machine,
    ):
        async with clock.stage(BOOT_K1, machine):
            await _expect(machine, "k1-up")
        async with clock.stage(LOAD, machine) as note:
            size = int(await _expect(machine, "plan", log=note))
            text = (await machine.exactly(size)).decode()
            (wiring.directory / PLAN).write_text(text)
            outcome.plan = plan = LoadPlan.from_json(text)
            await _expect(machine, "armed", log=note)
            await disk_filled.wait()
            reserved, firmware = _kernels_regions(machine, scenario.twin)
        if scenario.dma is not None:
            outcome.dma = _aimed(scenario.dma, plan)
            if scenario.dma.given_out:
                async with clock.stage(DRIVER, machine):
                    await _take_buffers(machine, outcome.dma, plan)
        purgatory = plan.segment("purgatory").range.start
        debugger = await machine.attach()
        head = _read_ram(wiring.ram, HEAD_SIZE)
        async with clock.stage(CRASH, machine):
            machine.panics_expected = 1
            machine.say("crash")
            await _run_until(machine, debugger, purgatory)
        async with clock.stage(COPY_TRUTH, machine):
            await asyncio.to_thread(_copy_sparse, wiring.ram, wiring.directory / TRUTH)
        if scenario.flip is not None:
            async with clock.stage(DAMAGE, machine) as note:
                note(f"bit flipped at {_flip(wiring.ram, plan, scenario.flip):#x}")
                machine.spoke.clear()
                await debugger.detach()
                outcome.told = await _told(machine, scenario.flip)
                if scenario.request.on_damage == "reboot":
                    await machine.process.wait()  # the twin ends where a machine would reboot
            return
        with _device(outcome.dma, wiring.ram, plan, _panic_text(machine.panics)) as device:
            size = await _hand_over(clock, outcome, machine, debugger, plan, device)
        truth = Truth(
            memory=wiring.directory / TRUTH,
            head=head,
            memory_size=scenario.twin.memory,
            reserved=reserved,
            nonce=nonce,
            panic=_panic_text(machine.panics),
            release=scenario.k1.name,
            crashed_pid=_CRASHED_PID,
            cpus=scenario.twin.smp,
            firmware=firmware,
            device_buffers=outcome.dma.own if outcome.dma else RangeSet(),
            device_problem=outcome.dma.problem if outcome.dma else "",
        )
        (wiring.directory / EVIDENCE).write_text(evidence_json(truth, scenario.saving))
    async with clock.stage(VERIFY):
        if scenario.saving is None or arriving is None:
            os.truncate(wiring.disk, size)
            outcome.verdict = await asyncio.to_thread(judge, wiring.disk, truth, plan)
        else:
            outcome.verdict = await asyncio.to_thread(_judge_saved, arriving, scenario.saving, truth, plan)


def _judge_saved(arriving: Arrival, saving: Saving, truth: Truth, plan: LoadPlan) -> Verdict:
    try:
        saved = arriving.collect()
    except VerificationError as error:
        verdict = begin_verdict(truth, plan)
        verdict.problems.append(error.message)
        return verdict
    return judge_filtered(saved, saving, truth, plan)


async def _hand_over(
    clock: _Clock, outcome: Outcome, machine: RunningTwin, debugger: Debugger, plan: LoadPlan, device: RogueDevice | None
) -> int:
    """From the purgatory's first instruction to the saved dump; the size of K2's /proc/vmcore. QEMU has ended then."""
    # a K2 that a device runs over may stand still anywhere; in twice the time of a whole boot a slow one says something
    patience = max(_SILENCE + 15, 2 * clock.taken(BOOT_K1)) if device else None
    async with clock.stage(HANDOVER, machine), _signs_of_life(machine, plan, patience):
        if device:
            device.k1_is_dead()
        await _run_until(machine, debugger, plan.entry)
        if device:
            device.k2_runs(plan.k2_memory)
        machine.spoke.clear()
        await debugger.detach()
    async with clock.stage(BOOT_K2, machine), _signs_of_life(machine, plan, patience):
        await _first_words(machine, plan)
        _require_cpus(await _expect(machine, "k2-cpus"), outcome.scenario)
        await _expect(machine, "k2-up")
    async with clock.stage(CAPTURE, machine) as note, _signs_of_life(machine, plan, patience):
        size = int(await _expect(machine, "vmcore"))
        await _expect(
            machine,
            "saved",
            log=note,
            progress=lambda done: note(f"{format_size(done)} of {format_size(size)}"),
            memory=outcome.footprint.take,
        )
        if device:
            device.stop()
        await machine.quit()
    return size


def run_bare(request: DrillRequest, supplies: Supplies, tell: Listener) -> Outcome:
    """The peer's twin: boot, load with kexec-tools, crash, boot K2; no truth, no capture, no verdict. For `make bench`."""
    outcome = Outcome(Scenario(request, supplies))
    with _room(outcome.scenario, tell) as directory:
        start = time.monotonic()
        try:
            asyncio.run(_bare(outcome.scenario, Wiring(directory), outcome, tell))
        except StageFailed as failure:
            outcome.failure = failure
        outcome.seconds = round(time.monotonic() - start, 3)
    return outcome


def describe_twin(request: DrillRequest, supplies: Supplies, tell: Listener) -> str:
    """The description that `crashkernel describe` writes in K1: JSON, as the guest sent it.

    :raise StageFailed: the twin did not boot, or the command failed.
    :raise EnvironmentFault: this machine lacks something, or has no room.
    """
    scenario = Scenario(request, supplies)
    with _room(scenario, tell) as directory:
        return asyncio.run(_describe(scenario, Wiring(directory), tell))


async def _describe(scenario: Scenario, wiring: Wiring, tell: Listener) -> str:
    clock = _Clock(Outcome(scenario), tell)
    kernel, twin = scenario.k1, scenario.twin
    initrd = build_crash_image(
        kernel,
        kernel,
        None,
        scenario.supplies.userland,
        wiring.directory / "crash.cpio",
        nonce=bytes(NONCE_SIZE),
        task="describe",
    )
    command = qemu_command(twin, kernel.vmlinux, initrd, wiring)
    async with _prepared(wiring, twin), RunningTwin.start(command, wiring) as machine:
        async with clock.stage(BOOT_K1, machine):
            await _expect(machine, "k1-up")
        async with clock.stage(DESCRIBE, machine) as note:
            size = int(await _expect(machine, "description", log=note))
            return (await machine.exactly(size)).decode()


def _disk_size(twin: Twin) -> int:
    # all of memory, headers, and the padding of the last block
    return twin.memory + (64 << 20)


_UNWRITTEN = b"\xa5" * (4 << 20)
_MADV_POPULATE_WRITE = 23  # include/uapi/asm-generic/mman-common.h, since Linux 5.14
_POPULATE_STEP = 16 << 20


@contextlib.asynccontextmanager
async def _prepared(wiring: Wiring, twin: Twin, blank: int = 0) -> AsyncIterator[asyncio.Event]:
    """RAM and K2's disk, made ready while K1 boots; what is yielded is set once the disk is.

    The disk is filled with what no memory is made of: a page that K2 never wrote must not pass for a page of zeros. And by
    the time K2 reads all of RAM and writes all of the disk, the host has found memory for both. Its first `blank` bytes are
    zeros all the same.
    """
    for path, size in ((wiring.ram, twin.memory), (wiring.disk, _disk_size(twin))):
        with path.open("wb") as file:
            file.truncate(size)
    stop, filled, loop = threading.Event(), asyncio.Event(), asyncio.get_running_loop()

    def work() -> None:
        with wiring.disk.open("r+b", buffering=0) as file:
            for _ in range(_disk_size(twin) // len(_UNWRITTEN)):
                if stop.is_set():
                    return
                file.write(_UNWRITTEN)
            file.seek(0)
            file.write(bytes(blank))
        loop.call_soon_threadsafe(filled.set)
        # only a help: an older kernel cannot do it, and loses nothing but time
        with contextlib.suppress(OSError), wiring.ram.open("r+b") as ram, mmap.mmap(ram.fileno(), 0) as memory:
            for start in range(0, len(memory), _POPULATE_STEP):
                if stop.is_set():
                    return
                memory.madvise(_MADV_POPULATE_WRITE, start, min(_POPULATE_STEP, len(memory) - start))

    worker = asyncio.create_task(asyncio.to_thread(work))
    try:
        yield filled
    finally:
        stop.set()
        await asyncio.wait({worker})


async def _bare(scenario: Scenario, wiring: Wiring, outcome: Outcome, tell: Listener) -> None:
    clock = _Clock(outcome, tell)
    initrd = _build(scenario, wiring, bytes(NONCE_SIZE), "kexec-tools")
    with wiring.disk.open("wb") as disk:
        disk.truncate(_disk_size(scenario.twin))
    command = qemu_command(scenario.twin, scenario.k1.vmlinux, initrd, wiring)
    async with RunningTwin.start(command, wiring) as machine:
        async with clock.stage(BOOT_K1, machine):
            await _expect(machine, "k1-up")
        async with clock.stage(LOAD, machine) as note:
            await _expect(machine, "armed", log=note)
        async with clock.stage(BOOT_K2, machine):  # kexec-tools' purgatory and its integrity check included
            machine.panics_expected = 1
            machine.say("crash")
            await _expect(machine, "k2-up")
            await machine.quit()


def _build(scenario: Scenario, wiring: Wiring, nonce: bytes, loader: Loader, arriving: Arrival | None = None) -> Path:
    directory, userland = wiring.directory, scenario.supplies.userland
    arguments, token = (arriving.arguments, arriving.token) if arriving else ((), "")
    capture = build_capture_image(scenario.k2, userland, directory / "capture.cpio", capture_args=arguments, token=token)
    if scenario.request.initrd:
        capture = _behind(Path(scenario.request.initrd), capture, directory / "capture-whole.cpio")
    cmdline = (
        CAPTURE_CMDLINE
        + ("" if scenario.request.all_cpus else _ONE_CPU)
        + (_WHOLE_ROOT if arriving or scenario.request.initrd else "")
    )
    append = cmdline + (" crashkernel.mode=bare" if loader == "kexec-tools" else "")
    return build_crash_image(
        scenario.k1,
        scenario.k2,
        capture,
        userland,
        directory / "crash.cpio",
        nonce=nonce,
        driver=scenario.dma.driver if scenario.dma else "none",
        loader=loader,
        load_args=(
            f"--placement={scenario.placement}",
            "--kernel=/boot/vmlinux",
            "--initrd=/boot/initrd",
            f"--append={cmdline}",
            f"--on-damage={scenario.request.on_damage}",
            *(("--no-quarantine",) if scenario.request.no_quarantine else ()),
        ),
        append=append,
    )


def _behind(users: Path, ours: Path, output: Path) -> Path:
    """The user's initrd with ours behind it: K2 unpacks both, and where they have a file of one name, the last is it."""
    data = users.read_bytes()
    # an archive begins at a multiple of four bytes (write_buffer, init/initramfs.c)
    output.write_bytes(data + bytes(-len(data) % 4) + ours.read_bytes())
    return output


async def _expect(
    machine: RunningTwin,
    word: str,
    *,
    log: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
    memory: Callable[[str, str], None] | None = None,
) -> str:
    """Wait for the guest's message `word`; its argument. What our command there prints on the way goes to `log`."""
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
            raise _GuestSaidNo(last if rest.isdigit() and last else f"the guest says: {rest}")
        if kind == "log":
            last = rest.removeprefix("crashkernel: ")
            if log:
                log(rest)
        if kind == "progress" and progress:
            progress(int(rest))
        if kind in FOOTPRINT_WORDS and memory:
            memory(kind, rest)


_SILENCE = 60  # seconds; K2's first line takes one or two
_PANIC = b"Kernel panic - not syncing: "


async def _first_words(machine: RunningTwin, plan: LoadPlan) -> None:
    """Wait for K2's first line. A kernel that dies before its console works leaves its reason in its log, in its memory."""
    try:
        async with asyncio.timeout(_SILENCE):
            await machine.spoke.wait()
    except TimeoutError as error:
        raise _Silent(f"K2 printed nothing for {_SILENCE} s{_log_says(machine, plan)}") from error


def _log_says(machine: RunningTwin, plan: LoadPlan) -> str:
    """The panic in K2's log buffer, for the end of a sentence; "" without."""
    # the buffer is static data: in K2's image, wherever that runs
    image = Range.sized(plan.entry, plan.kernel_span)
    with machine.wiring.ram.open("rb") as file:
        file.seek(image.start)
        memory = file.read(image.size)
    at = memory.rfind(_PANIC)
    while at >= 0:
        text = re.split(rb"[\0\n]| \]---", memory[at : at + 200])[0]  # the ring's records have no terminator
        if b"%s" not in text:  # else it is the format itself
            return f"; its log says: {text.decode('ascii', 'replace')}"
        at = memory.rfind(_PANIC, 0, at)
    return ""


async def _run_until(machine: RunningTwin, debugger: Debugger, address: int) -> None:
    """Run to physical `address` in real mode; a user program of K1 may well use the same number as a virtual address."""
    while True:
        await debugger.set_breakpoint(address)
        await debugger.resume()
        await debugger.stopped()
        await debugger.clear_breakpoint(address)
        if await machine.in_real_mode_at(address):
            return
        await debugger.step()  # past it, or it would stop there for ever


def _flip(ram: Path, plan: LoadPlan, content: SegmentContent) -> int:
    """Flip one bit, anywhere, of what was loaded as `content`; its address."""
    segment = plan.segment(content).range
    if content == "purgatory":
        # its code may go astray before it checks itself
        segment = Range(segment.start + PARAMETERS_OFFSET, segment.start + STATE_OFFSET)
    elif content == "kernel":
        segment = Range.sized(segment.start, min(segment.size, plan.kernel_span))  # behind it is K2's free memory
    at = segment.start + secrets.randbelow(segment.size)
    with ram.open("r+b", buffering=0) as file:
        file.seek(at)
        byte = file.read(1)[0] ^ 1 << secrets.randbelow(8)
        file.seek(at)
        file.write(bytes([byte]))
    return at


async def _told(machine: RunningTwin, content: SegmentContent) -> str:
    """Wait for the purgatory's line about damage; a K2 that is entered without one is the failure looked for."""
    while True:
        await machine.spoke.wait()
        machine.spoke.clear()
        lines = [line for line in machine.console if line.startswith("crashkernel: ")]
        for line in lines:
            if "DAMAGED" in line and content in line:
                return line
        if lines and "enter K2" in lines[-1]:
            raise _GuestSaidNo(f"a bit of the {content} was flipped, and K2 was entered")


def _aimed(dma: Dma, plan: LoadPlan) -> DmaReport:
    """A report with the regions, and what the plan had said of them.

    :raise StageFailed: the plan does not know where K1's image lies.
    """
    where = {name: REGIONS[name].where(plan) for name in dma.regions}
    unknown = [name for name in dma.regions if not where[name] and not (REGIONS[name].given_out and plan.k1_layout)]
    unknown = [name for name in unknown if name != "memory"]
    if unknown:
        raise StageFailed(
            LOAD.name, f"the plan does not say where {' and '.join(unknown)} lies", hint="use one kernel for both"
        )
    hazards = {hazard.name: hazard for hazard in plan.hazards}
    said = {name: hazards[REGIONS[name].hazard] for name in dma.regions if REGIONS[name].hazard in hazards}
    return DmaReport(dma, wanted=where, hazards=said)


async def _take_buffers(machine: RunningTwin, report: DmaReport, plan: LoadPlan) -> None:
    """Have K1's driver take the pages it can get, and keep them."""
    machine.say(f"driver {driver_command(report.dma, plan)}")
    while True:
        kind, _, rest = (await machine.line()).partition(" ")
        if kind == "failed":
            raise _GuestSaidNo(f"the guest says: {rest}")
        if kind == "driving":
            report.pages_looked_at, report.page_size = (int(number) for number in rest.split())
            return
        if kind == "buffer":
            name, _, text = rest.partition(" ")
            start, _, end = text.partition("-")
            report.given.setdefault(name, []).append(Range(int(start, 16), int(end, 16)))


@contextlib.contextmanager
def _device(report: DmaReport | None, ram: Path, plan: LoadPlan, panic: str) -> Iterator[RogueDevice | None]:
    """The device, aimed but idle; when the context ends it has stopped, and the report says what it wrote."""
    if report is None:
        yield None
        return
    # the log has no buffer of a device's in it, and the verdict looks for this line
    avoid = [*plan.notes, *_places(ram, RangeSet(region.range for region in plan.k1_layout), panic.encode())]
    report.targets = choose_targets(report.dma, plan, report.given, avoid)
    if not report.all_targets:
        raise StageFailed(DRIVER.name, "the device has nowhere to write", hint="choose other regions, or a larger --memory")
    device = RogueDevice(ram, report)
    try:
        yield device
    finally:
        device.stop()
        device.account(report)


def _places(ram: Path, where: RangeSet, text: bytes) -> Iterator[Range]:
    """Where `text` lies in guest RAM."""
    with ram.open("rb") as file:
        for each in where:
            memory = os.pread(file.fileno(), each.size, each.start)
            at = memory.find(text) if text else -1
            while at >= 0:
                yield Range.sized(each.start + at, len(text))
                at = memory.find(text, at + 1)


@contextlib.asynccontextmanager
async def _signs_of_life(machine: RunningTwin, plan: LoadPlan, patience: float | None) -> AsyncIterator[None]:
    """Give up on a twin that says nothing on its console or port for `patience` seconds; None waits for ever."""
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
        raise _GuestSaidNo(f"{words}; {await machine.whereabouts()}{_log_says(machine, plan)}") from error
    finally:
        machine.on_sound = None


def _damage_told(lines: Iterable[str]) -> str:
    """The purgatory's line about damage to what was loaded, "" if it said none."""
    return next((line for line in lines if line.startswith("crashkernel: ") and "DAMAGED" in line), "")


_TROUBLE = re.compile(r"Oops|BUG:|kernel BUG|Kernel panic|Unable to handle|Bad page|Machine check|stuck for|general protection")
_KERNEL_STARTS = "] Linux version"


def _effect(outcome: Outcome, console: Path) -> str:
    """What the device's writes did, in one line."""
    text = console.read_text(errors="replace").replace("\r", "") if console.exists() else ""
    k2_said = text.rpartition(_KERNEL_STARTS)[2]
    trouble = (
        next((line for line in k2_said.splitlines() if _TROUBLE.search(line)), "") if text.count(_KERNEL_STARTS) > 1 else ""
    )
    said = f"; its first complaint: {trouble}" if trouble else ""
    told = _damage_told(text.splitlines())
    if outcome.failure is not None:
        if told and outcome.failure.stage == HANDOVER.name:
            return f"the purgatory found the damage and did not enter K2: {told}"
        said = said or f": {outcome.failure.message.removeprefix(f'{outcome.failure.stage}: ')}"
        where = {
            HANDOVER.name: "K2 was not reached",
            BOOT_K2.name: "K2 did not come up",
            CAPTURE.name: "K2 could not save the dump",
            VERIFY.name: "the dump could not be judged",
        }
        went_on = "; the purgatory had told the damage and went on" if told else ""
        return f"{where.get(outcome.failure.stage, 'nothing: the drill did not get so far')}{said}{went_on}"
    if outcome.verdict is None or not outcome.verdict.passed:
        wrong = outcome.verdict.bytes_wrong if outcome.verdict else 0
        what = f"{wrong:,} bytes are wrong outside of the device's own buffers" if wrong else "the dump is not whole"
    elif _aimed_at_k2(outcome):
        what = "none that shows in the dump, but K2's memory was written to: it came up by luck"
    else:
        what = "none outside of the device's own buffers"
    return f"{what}{said}"


def _aimed_at_k2(outcome: Outcome) -> bool:
    """Whether the device wrote to K2's memory, or to what became that."""
    if outcome.dma is None:
        return False
    becomes = (outcome.plan.exposed | outcome.plan.k2_memory) if outcome.plan else RangeSet()
    return outcome.dma.writes_into_k2 > 0 or bool(RangeSet(outcome.dma.all_targets) & becomes)


def _require_cpus(online: str, scenario: Scenario) -> None:
    wanted = scenario.twin.smp if scenario.request.all_cpus else 1
    count = len(cpu_list(online))
    if count != wanted:
        raise _GuestSaidNo(f"K2 runs on {count} CPUs ({online}), not on {wanted}")


def _read_ram(ram: Path, size: int) -> bytes:
    with ram.open("rb") as file:
        return file.read(size)


_BLOCK = 64 << 10  # what is all zero in blocks of this many bytes becomes a hole
_CHUNK = 4 << 20


def _copy_sparse(source: Path, target: Path) -> None:
    """Copy a file and leave out its zeros: most of a fresh machine's memory was never touched."""
    with source.open("rb") as src, target.open("wb") as dst:
        size = os.fstat(src.fileno()).st_size
        dst.truncate(size)
        starts = range(0, size, _CHUNK)
        with ThreadPoolExecutor(max_workers=2) as pool:  # reading, looking and writing all let go of the interpreter
            for _ in pool.map(lambda start: _copy_chunk(src.fileno(), dst.fileno(), start), starts):
                pass


def _copy_chunk(src: int, dst: int, start: int) -> None:
    data = os.pread(src, _CHUNK, start)
    whole = len(data) // _BLOCK * _BLOCK
    filled = np.frombuffer(data, np.uint64, whole // 8).reshape(-1, _BLOCK // 8).any(axis=1)
    for number in np.flatnonzero(filled):
        at = int(number) * _BLOCK
        os.pwrite(dst, data[at : at + _BLOCK], start + at)
    if any(data[whole:]):
        os.pwrite(dst, data[whole:], start + whole)


def _note_region(machine: RunningTwin, text: str) -> None:
    """Take a line "NAME HEX": a memory region as the bytes of its device tree property, pairs of 64-bit address and size."""
    name, _, digits = text.partition(" ")
    data = bytes.fromhex(digits)
    for at in range(0, len(data) // 16 * 16, 16):
        base, size = (int.from_bytes(data[at + half : at + half + 8], "big") for half in (0, 8))
        if size:
            machine.regions.setdefault(name, []).append(Range.sized(base, size))


def _kernels_regions(machine: RunningTwin, twin: Twin) -> tuple[Range, tuple[Region, ...]]:
    """The reserved region, and on bare metal the firmware's, in K1's kernel's words: the loader is not asked."""
    reserved = machine.regions.pop("crashkernel", [])
    if len(reserved) != 1:
        raise _GuestSaidNo("K1 has no reserved region: is crashkernel= valid for this memory size?")
    if twin.machine == "pseries":
        return reserved[0], ()
    return reserved[0], tuple(Region(name, piece) for name, pieces in machine.regions.items() for piece in pieces)


def _panic_text(panics: list[str]) -> str:
    # "[    1.234567] Kernel panic - not syncing: sysrq triggered crash"
    return panics[0][panics[0].index("Kernel panic") :] if panics else ""


def _likely(stage: Stage, console: tuple[str, ...]) -> str:
    text = "\n".join(console)
    for sign, cause in (
        ("Crash kernel can not overlap current kernel", "crashkernel=…@OFFSET lies over K1: choose a higher offset"),
        ("Out of memory", "K2 ran out of memory: raise crashkernel="),
        ("ailed to allocate", "K2 found no memory early in its boot: raise crashkernel="),
        (
            "Illegal instruction",
            "QEMU up to 8.0 refuses what a real POWER8 runs (mffsl, in Debian's C library): use another --cpu",
        ),
        ("Unable to handle kernel", "the kernel took a fault: see the console's last lines"),
    ):
        if sign in text:
            return cause
    return stage.likely


def require_keepable(keep: Path) -> None:
    """Say before a drill, not after it, that its evidence cannot be kept there.

    :raise UsageError: the directory cannot be made or written.
    """
    try:
        keep.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=keep):
            pass
    except OSError as error:
        raise UsageError(f"cannot keep a drill in {keep}: {error.strerror}", hint="choose another --keep") from error


def _keep(directory: Path, keep: Path, outcome: Outcome) -> None:
    """Keep this drill's files and no other's; the dump last, and whole or not at all."""
    dump = "dump" if outcome.scenario.saving else "disk"
    files = {dump: DUMP, **{name: name for name in (CONSOLE, PLAN, EVIDENCE, TRUTH, LOG, MANIFEST)}}
    for kept in files.values():
        (keep / kept).unlink(missing_ok=True)
    for name, kept in reversed(files.items()):
        source = directory / name
        # a disk that no verdict was reached on holds no dump
        if source.exists() and (name != dump or outcome.verdict is not None):
            try:
                source.rename(keep / kept)
            except OSError:  # on another file system
                temporary = keep / f"{kept}.new"
                _copy_sparse(source, temporary)
                temporary.replace(keep / kept)
            if name == dump:
                outcome.dump = keep / kept
