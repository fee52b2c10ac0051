"""One drill: a twin boots K1, loads K2 with our loader, dies, hands over, saves its memory; and the result is judged.

The order of things is `_drill`, top to bottom; at each point of it the drill's faults have their say. Every stage has a
deadline, and nothing outlives the drill.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from crashkernel.drill.arrival import BLANK, Arrival, arrival, whole_dumps
from crashkernel.drill.budget import working_directory
from crashkernel.drill.conversation import (
    expect,
    first_words,
    kernels_regions,
    loaded_plan,
    patience_with,
    run_until,
    signs_of_life,
)
from crashkernel.drill.faults import Ending, Fault, Running, console_text, parse_faults
from crashkernel.drill.filtered import judge_filtered
from crashkernel.drill.guest import NONCE_SIZE, build_crash_image
from crashkernel.drill.images import build_images
from crashkernel.drill.qemu import Debugger, Hardware, RunningTwin, Wiring, qemu_command
from crashkernel.drill.ram import disk_size, prepared, read_ram
from crashkernel.drill.record import EVIDENCE, PLAN, TRUTH, evidence_json, keep_evidence
from crashkernel.drill.saving import Footprint
from crashkernel.drill.sparse import copy_sparse, place_sparse
from crashkernel.drill.stages import (
    BOOT_K1,
    BOOT_K2,
    CAPTURE,
    COPY_TRUTH,
    CRASH,
    DESCRIBE,
    HANDOVER,
    LOAD,
    VERIFY,
    WAIT,
    Clock,
    GuestSaidNo,
    Listener,
)
from crashkernel.drill.verdict import Truth, Verdict, begin_verdict, judge
from crashkernel.errors import StageFailed, VerificationError
from crashkernel.machine import HEAD_SIZE
from crashkernel.machine.live import cpu_list
from crashkernel.memory import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from crashkernel.drill.debian import Kernel
    from crashkernel.drill.request import DrillRequest, Supplies
    from crashkernel.drill.saving import Saving
    from crashkernel.drill.twin import Twin
    from crashkernel.placement.plan import LoadPlan, PlacementName

_CRASHED_PID = 1  # the drill's init crashes K1 itself


@dataclass(frozen=True, slots=True)
class Scenario:
    """What to drill, and with what. `keep` is the directory to leave dump, truth, plan and logs in; None throws them away."""

    request: DrillRequest
    supplies: Supplies
    keep: Path | None = None
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
    """What a drill showed. `verdict` is None when a stage failed before there was a dump, or none was to be."""

    scenario: Scenario
    faults: tuple[Fault, ...] = ()
    stages: dict[str, float] = field(default_factory=dict)  # seconds
    verdict: Verdict | None = None
    footprint: Footprint = field(default_factory=Footprint)  # of K2, as far as it told
    failure: StageFailed | None = None
    plan: LoadPlan | None = None
    dump: Path | None = None
    seconds: float = 0.0  # from building the images to the verdict

    @property
    def passed(self) -> bool:
        """Whether the drill proved what it is for.

        That is a dump that is right, or the words that a fault expects, and right is whatever dump there is beside them. And
        every fault must have been seen to act.
        """
        if self.failure is not None or not all(fault.told for fault in self.faults):
            return False
        if self.verdict is None:
            return any(fault.expects == "told" for fault in self.faults)
        return self.verdict.passed


def run_drill(scenario: Scenario, tell: Listener) -> Outcome:
    """Drill once. A stage that fails is in the outcome, not raised.

    :raise EnvironmentFault: this machine lacks something, or has no room.
    :raise UsageError: the faults make no sense.
    """
    outcome = Outcome(scenario, parse_faults(scenario.request))
    with _room(scenario, tell) as directory:
        start = time.monotonic()
        wiring, clock = Wiring(directory), Clock(tell)
        outcome.stages = clock.taken
        try:
            asyncio.run(_arrange(scenario, wiring, outcome, clock))
        except StageFailed as failure:
            outcome.failure = failure
        outcome.seconds = round(time.monotonic() - start, 3)
        _conclude(outcome, wiring)
        if scenario.keep is not None:
            outcome.dump = keep_evidence(
                directory, scenario.keep, saved=scenario.saving is not None, judged=outcome.verdict is not None
            )
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

    return working_directory(scenario.request.share, waiting)


def _conclude(outcome: Outcome, wiring: Wiring) -> None:
    """Ask each fault what came of it. A stage that failed because a fault meant it to is no failure, if no dump pretends."""
    console = console_text(wiring)
    ending = Ending(console, outcome.stages, outcome.plan, outcome.verdict, outcome.failure)
    meant = [fault.conclude(ending) for fault in outcome.faults]
    if outcome.failure is not None and any(meant):
        outcome.failure = None
        if outcome.scenario.saving is not None and (whole := whole_dumps(wiring.disk, wiring.directory)):
            outcome.failure = StageFailed(VERIFY.name, f"K2 says that it has no dump, and there is one: {', '.join(whole)}")


async def _arrange(scenario: Scenario, wiring: Wiring, outcome: Outcome, clock: Clock) -> None:
    """Drill, with somebody to receive the dump where that is wanted."""
    try:
        if scenario.saving is None:
            await _drill(scenario, wiring, outcome, clock, None)
            return
        fallback = any(fault.fallback for fault in outcome.faults)
        async with arrival(scenario.saving, wiring.disk, wiring.directory, fallback=fallback) as arriving:
            await _drill(scenario, wiring, outcome, clock, arriving)
    finally:
        for fault in outcome.faults:
            fault.stop()


async def _drill(scenario: Scenario, wiring: Wiring, outcome: Outcome, clock: Clock, arriving: Arrival | None) -> None:
    request, twin, faults = scenario.request, scenario.twin, outcome.faults
    nonce = secrets.token_bytes(NONCE_SIZE)
    hardware = Hardware(network=bool(arriving and arriving.token))
    for fault in faults:
        hardware = fault.hardware(hardware)
    initrd = build_images(scenario, wiring.directory, nonce, "crashkernel", faults, arriving)
    command = qemu_command(twin, scenario.k1.vmlinux, initrd, wiring, hardware)
    async with (
        prepared(wiring, twin.memory, BLANK if arriving else 0) as disk_filled,
        RunningTwin.start(command, wiring) as machine,
    ):
        async with clock.stage(BOOT_K1, machine):
            await expect(machine, "k1-up")
        async with clock.stage(LOAD, machine) as note:
            drill = Running(request, twin, machine, await loaded_plan(machine, note), clock)
            _note_plan(drill.plan, outcome, wiring)
            await expect(machine, "armed", log=note)
            await disk_filled.wait()
            reserved, firmware = kernels_regions(machine, twin)
        for fault in faults:
            await fault.loaded(drill)
        plan = drill.plan
        _note_plan(plan, outcome, wiring)
        async with clock.stage(CRASH, machine):
            debugger = await machine.attach()
            head = read_ram(wiring.ram, HEAD_SIZE)
            machine.await_death()
            for fault in faults:
                await fault.dying(drill, debugger)
            crash = next((fault for fault in faults if fault.kind == "crash"), None)
            if crash is None:
                machine.say("crash")
            else:
                await crash.crash(drill, debugger)
            crashed_cpu = await run_until(machine, debugger, plan.segment("purgatory").range.start)
        async with clock.stage(COPY_TRUTH, machine):
            await asyncio.to_thread(_copy_truth, machine, wiring)
            truth = Truth(
                memory=wiring.directory / TRUTH,
                head=head,
                memory_size=twin.memory,
                reserved=reserved,
                nonce=nonce,
                panic=machine.said_dying(),
                release=scenario.k1.name,
                crashed_pid=_CRASHED_PID,
                cpus=twin.smp,
                firmware=firmware,
                crashed_cpu=crashed_cpu,
            )
        ended = [await fault.dead(drill, debugger, truth) for fault in faults]
        if any(ended):
            return
        size = await _hand_over(outcome, drill, debugger, crashed_cpu)
    for fault in faults:
        truth = fault.judged_by(truth)
    (wiring.directory / EVIDENCE).write_text(evidence_json(truth, scenario.saving))
    async with clock.stage(VERIFY):
        if scenario.saving is None or arriving is None:
            os.truncate(wiring.disk, size)
            outcome.verdict = await asyncio.to_thread(judge, wiring.disk, truth, plan)
        else:
            outcome.verdict = await asyncio.to_thread(_judge_saved, arriving, wiring, scenario.saving, truth, plan)


def _note_plan(plan: LoadPlan, outcome: Outcome, wiring: Wiring) -> None:
    outcome.plan = plan
    (wiring.directory / PLAN).write_text(plan.to_json())


def _copy_truth(machine: RunningTwin, wiring: Wiring) -> None:
    copy_sparse(wiring.ram, wiring.directory / TRUTH)
    if machine.plugged is not None:
        place_sparse(wiring.plugged, wiring.directory / TRUTH, machine.plugged.start)


def _judge_saved(arriving: Arrival, wiring: Wiring, saving: Saving, truth: Truth, plan: LoadPlan) -> Verdict:
    try:
        if len(whole := whole_dumps(wiring.disk, wiring.directory)) > 1:
            raise VerificationError(f"more than one target says that it has the whole dump: {', '.join(whole)}")
        saved = arriving.collect()
    except VerificationError as error:
        verdict = begin_verdict(truth, plan)
        verdict.problems.append(error.message)
        return verdict
    return judge_filtered(saved, saving, truth, plan)


async def _hand_over(outcome: Outcome, drill: Running, debugger: Debugger, crashed_cpu: int) -> int:
    """From the purgatory's first instruction to the saved dump; the size of K2's /proc/vmcore. QEMU has ended then."""
    machine, plan, clock, faults = drill.machine, drill.plan, drill.clock, outcome.faults
    patience = patience_with(clock.taken[BOOT_K1.name]) if any(fault.slow for fault in faults) else None
    async with clock.stage(HANDOVER, machine), signs_of_life(machine, plan, patience):
        for fault in faults:
            fault.handing_over()
        await run_until(machine, debugger, plan.entry)
        for fault in faults:
            await fault.k2_enters(drill)
        machine.spoke.clear()
        await debugger.detach()
    async with clock.stage(BOOT_K2, machine), signs_of_life(machine, plan, patience):
        await first_words(machine, plan)
        # on bare metal no CPU but one comes to the purgatory; and K2 of a refreshed load has those that came, too
        all_cpus = max(drill.request.smp, plan.slaves + 1) if drill.request.all_cpus else None
        require_cpus(await expect(machine, "k2-cpus"), crashed_cpu, all_cpus)
        await expect(machine, "k2-up")
    async with clock.stage(CAPTURE, machine) as note, signs_of_life(machine, plan, patience):
        size = int(await expect(machine, "vmcore"))
        await expect(
            machine,
            "saved",
            log=note,
            progress=lambda done: note(f"{format_size(done)} of {format_size(size)}"),
            memory=outcome.footprint.take,
        )
        for fault in faults:
            fault.stop()
            await fault.saved(drill)
        await machine.quit()
    return size


def require_cpus(online: str, crashed_cpu: int, all_cpus: int | None) -> None:
    """See that K2 runs on the CPUs that it was told to use; `online` is its kernel's list, in numbers that are K1's too.

    `all_cpus` is how many there are if it was told to use all, None if it was told to use one.

    :raise GuestSaidNo: on others.
    """
    cpus = cpu_list(online)
    if all_cpus is not None:
        wanted, good = f"all {all_cpus}", len(cpus) == all_cpus
    else:
        # With maxcpus=1, kernels since 6.5 start CPU 0 beside the one that they boot on, which is the one that crashed
        # (cpuhp_bringup_mask, kernel/cpu.c, counts from CPU 0 whether or not it runs already).
        wanted, good = f"the one that crashed, {crashed_cpu}", set(cpus) in ({crashed_cpu}, {0, crashed_cpu})
    if not good:
        raise GuestSaidNo(f"K2 runs on CPUs {online}, not on {wanted}")


def run_bare(request: DrillRequest, supplies: Supplies, tell: Listener) -> Outcome:
    """The peer's twin: boot, load with kexec-tools, crash, boot K2; no truth, no capture, no verdict. For `make bench`."""
    outcome = Outcome(Scenario(request, supplies))
    with _room(outcome.scenario, tell) as directory:
        start = time.monotonic()
        clock = Clock(tell)
        outcome.stages = clock.taken
        try:
            asyncio.run(_bare(outcome.scenario, Wiring(directory), clock))
        except StageFailed as failure:
            outcome.failure = failure
        outcome.seconds = round(time.monotonic() - start, 3)
    return outcome


async def _bare(scenario: Scenario, wiring: Wiring, clock: Clock) -> None:
    initrd = build_images(scenario, wiring.directory, bytes(NONCE_SIZE), "kexec-tools")
    with wiring.disk.open("wb") as disk:
        disk.truncate(disk_size(scenario.twin.memory))
    command = qemu_command(scenario.twin, scenario.k1.vmlinux, initrd, wiring)
    async with RunningTwin.start(command, wiring) as machine:
        async with clock.stage(BOOT_K1, machine):
            await expect(machine, "k1-up")
        async with clock.stage(LOAD, machine) as note:
            await expect(machine, "armed", log=note)
        async with clock.stage(BOOT_K2, machine):  # kexec-tools' purgatory and its integrity check included
            machine.await_death()
            machine.say("crash")
            await expect(machine, "k2-up")
            await machine.quit()


def describe_twin(request: DrillRequest, supplies: Supplies, tell: Listener) -> str:
    """The description that `crashkernel describe` writes in K1: JSON, as the guest sent it.

    :raise StageFailed: the twin did not boot, or the command failed.
    :raise EnvironmentFault: this machine lacks something, or has no room.
    """
    scenario = Scenario(request, supplies)
    with _room(scenario, tell) as directory:
        return asyncio.run(_describe(scenario, Wiring(directory), Clock(tell)))


async def _describe(scenario: Scenario, wiring: Wiring, clock: Clock) -> str:
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
    async with prepared(wiring, twin.memory), RunningTwin.start(command, wiring) as machine:
        async with clock.stage(BOOT_K1, machine):
            await expect(machine, "k1-up")
        async with clock.stage(DESCRIBE, machine) as note:
            size = int(await expect(machine, "description", log=note))
            return (await machine.exactly(size)).decode()
