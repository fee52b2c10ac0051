"""load, status, unload: standard library only, for a POWER host or its initramfs."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from crashkernel import loader, quarantine
from crashkernel.cli import choices
from crashkernel.cli.command import add_command, write
from crashkernel.errors import CrashkernelError, EnvironmentFault, PlanError, UsageError
from crashkernel.machine import HEAD_SIZE, Pages
from crashkernel.machine.live import read_machine
from crashkernel.memory import RangeSet, format_size
from crashkernel.placement.hazards import quarantinable
from crashkernel.placement.image import KernelImage
from crashkernel.report.terminal import visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crashkernel.machine import Machine
    from crashkernel.placement.plan import LoadPlan
    from crashkernel.quarantine import Quarantine, Released


_LOAD_EPILOG = """examples:
  crashkernel load                                  K2 is this host's own kernel, in the reserved region
  crashkernel load --placement zero                 the same, to be exchanged down to address zero
  crashkernel load --kernel vmlinux --initrd rescue.img --append 'console=hvc0 maxcpus=1 numa=off'
  crashkernel load --dry-run                        plan and build everything, load nothing
  crashkernel load --refresh                        the same as last time, if the machine has changed since

What was loaded before is replaced. The plan is kept in /run/crashkernel/plan.json for `crashkernel status`, what was
asked for in request.json beside it for --refresh. The kernel frees the old capture kernel before it takes the new one
in; `load` says how long that took.
"""

_QUARANTINE_EPILOG = """Pages change hands: what the loader, a slab or a driver held may be free now. Run it after `load`, and
from a timer. Who still holds what is in the output.

examples:
  crashkernel load --placement zero; crashkernel quarantine

exit status:
  0   K1 can hand out none of K2's memory at zero
  1   some pages are still held, and may be handed out again when they are let go
  3   there is no quarantine: nothing is loaded at zero
"""

_STATUS_EPILOG = """exit status:
  0   loaded, and the machine is the one it was loaded for (or another tool loaded it)
  1   loaded, but CPUs or memory have changed since (run `crashkernel load --refresh`), or cannot be read (run as root)
  3   not loaded
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the four commands to the parser."""
    load = add_command(commands, "load", "load the capture kernel into the reserved region", _LOAD_EPILOG)
    choices.add_placement(load)
    choices.add_capture_kernel(load)
    load.add_argument("--plan-out", type=Path, metavar="FILE", help="write the plan as JSON")
    load.add_argument(
        "--no-quarantine",
        action="store_true",
        help="leave in K1's hands what it could hand out of K2's memory at zero (default: take it out, free and movable pages)",
    )
    load.add_argument("--dry-run", action="store_true", help="stop short of the kexec_load system call")
    load.add_argument(
        "--refresh",
        action="store_true",
        help="load what was loaded last, with the options it was loaded with, if CPUs or memory have changed since",
    )
    load.set_defaults(run=_load)

    status = add_command(commands, "status", "tell whether a capture kernel is loaded, and how", _STATUS_EPILOG)
    status.add_argument("--json", action="store_true", help="for scripts")
    status.set_defaults(run=_status)

    unload = add_command(commands, "unload", "take the capture kernel out again")
    unload.set_defaults(run=_unload)

    sweep = add_command(
        commands,
        "quarantine",
        "take out of K1's hands what a load at zero could not get",
        _QUARANTINE_EPILOG,
    )
    sweep.set_defaults(run=_sweep)


def _load(arguments: argparse.Namespace) -> int:
    machine = read_machine()
    if arguments.refresh:
        if given := choices.given(arguments):
            raise UsageError(
                f"--refresh loads what was loaded last, with its options: it takes no {' and no '.join(given)}",
                hint="leave one or the other out",
            )
        request = loader.requested()
        now = loader.status()
        changes = loader.outdated(now.plan, machine) if now.plan else ("nothing of ours is loaded",)
        if not changes:
            print("nothing has changed since the load: it stands")
            return 0
        for change in changes:
            print(change)
    else:
        request = choices.requested(arguments, machine)
    image = KernelImage.open(Path(request.kernel))
    initrd, measured = choices.initrd_of(request)
    plan = choices.plan_for(request, machine, image, measured)
    if len(machine.head) != HEAD_SIZE:
        raise EnvironmentFault(
            "cannot read this kernel's first bytes from /proc/kcore", hint="run as root; lockdown forbids it too"
        )
    _refuse(plan)
    _write_plan(arguments, plan)  # before all else: a path that cannot be written is to change nothing
    where = f"{plan.kernel}, placement {plan.placement}, into {plan.reserved} ({format_size(plan.reserved.size)})"
    if arguments.dry_run:
        loader.assemble(plan, machine, image, initrd)
        _warn(plan)
        print(f"would load {where}")
        return 0
    with _kept_as_it_was():
        if wanted := quarantinable(plan, machine.page_size) if request.quarantine else RangeSet():
            machine = _quarantined(wanted, machine)
            plan = choices.plan_for(request, machine, image, measured)
            _write_plan(arguments, plan)
        payloads = loader.assemble(plan, machine, image, initrd)
        _warn(plan)
        loaded = loader.load(plan, payloads, request)
    if not wanted:
        _tell_released(quarantine.release())
    if not loaded.remembered:
        _complain(f"cannot write /{loader.STATE}: `crashkernel status` will not know this load")
    print(f"loaded {where}")
    if loaded.unprotected is not None:
        print(f"the kernel frees the old one first: it had none for at most {loaded.unprotected * 1000:.0f} ms")
    return 0


@contextlib.contextmanager
def _kept_as_it_was() -> Iterator[None]:
    """After a load that fails: no pages in quarantine for nothing, and the user knows whether anything is still loaded."""
    before, quarantined = loader.status(), quarantine.status() is not None
    try:
        yield
    except BaseException:
        now = loader.status()
        if not now.loaded or not quarantined:
            _tell_released(quarantine.release())
        if before.loaded and not now.loaded:
            _complain("the kernel freed the old capture kernel before it refused this one: this machine is not protected now")
        raise


def _write_plan(arguments: argparse.Namespace, plan: LoadPlan) -> None:
    if arguments.plan_out is not None:
        write(arguments.plan_out, plan.to_json() + "\n", "--plan-out")


def _sweep(arguments: argparse.Namespace) -> int:
    del arguments
    result = quarantine.again(progress=_progress)
    if result is None:
        raise EnvironmentFault("there is no quarantine", hint="load with --placement zero first")
    _tell_quarantined(result)
    return 1 if result.held or result.reason else 0


def _tell_quarantined(result: Quarantine) -> None:
    held = sum(piece.range.size for piece in result.held)
    print(
        f"quarantine: {format_size(result.taken.total)} of the {format_size(result.taken.total + held)} of K2's memory that K1 "
        "could hand out are out of its hands (HardwareCorrupted in /proc/meminfo counts them; nothing is broken)"
    )
    if result.held:
        print(f"  not to be had: {_holders(result.held)}")
    if result.reason:
        _complain(f"quarantine: {result.reason}")


def _quarantined(wanted: RangeSet, machine: Machine) -> Machine:
    """`machine` with what can be had of `wanted` taken out of K1's hands."""
    result = quarantine.take(wanted, machine.page_size, progress=_progress)
    _tell_quarantined(result)
    return machine.held_by([*(Pages(part, "poisoned") for part in result.taken), *result.held])


def _holders(held: tuple[Pages, ...]) -> str:
    """Who holds how much, the most first."""
    sizes = Counter[str]()
    for piece in held:
        sizes[piece.use] += piece.range.size
    return ", ".join(f"{use} {format_size(size)}" for use, size in sizes.most_common())


def _progress(done: int, total: int) -> None:
    print(f"quarantine: {done} of {total} pages", file=sys.stderr)


def _tell_released(released: Released) -> None:
    if released.given_back:
        print(f"quarantine: {format_size(released.given_back.total)} given back to K1")
    if released.stuck or released.reason:
        _complain(f"quarantine: {format_size(released.stuck.total)} stay out of K1's hands until it reboots: {released.reason}")


def _refuse(plan: LoadPlan) -> None:
    for hazard in plan.hazards:
        if hazard.verdict == "impossible":
            raise PlanError(f"{hazard.title}: {hazard.reason}", hint=hazard.advice)


def _warn(plan: LoadPlan) -> None:
    for hazard in plan.hazards:
        if hazard.verdict == "dangerous":
            _complain(f"{hazard.title}: {hazard.reason}")


def _complain(text: str) -> None:
    print(f"crashkernel: warning: {text}", file=sys.stderr)


def _status(arguments: argparse.Namespace) -> int:
    now, kept = loader.status(), quarantine.status()
    changes: tuple[str, ...] | None = ()
    unread = ""
    if now.plan is not None:
        try:
            changes = loader.outdated(now.plan, read_machine())
        except CrashkernelError as error:
            changes, unread = None, str(error)
    if arguments.json:
        print(loader.status_json(now, changes, kept))
    elif not now.loaded:
        room = format_size(now.reserved_size) if now.reserved_size else "nothing"
        print(f"not loaded; {room} is reserved" + ("" if now.reserved_size else ": boot with crashkernel=512M"))
    elif now.plan is None:
        print(
            "loaded, perhaps by another tool: crashkernel has no record of it that it can read; "
            f"{format_size(now.reserved_size)} is reserved"
        )
    else:
        plan = now.plan
        where = f"in {plan.reserved} ({format_size(plan.reserved.size)})"
        print(f"loaded; the last load by crashkernel was {plan.kernel}, placement {plan.placement}, {where}")
        print(f"K2's command line: {visible(plan.cmdline)}")
        print(f"its dump will hold {format_size(plan.k1_memory.total)} of memory")
        if kept is not None and kept.reason:
            print(f"what K1 could hand out of K2's memory: {kept.reason}")
        elif kept is not None:
            still = f"; in its hands still: {_holders(kept.held)}" if kept.held else ""
            print(f"{format_size(kept.taken.total)} of K2's memory that K1 could hand out are out of its hands{still}")
        if changes is None:
            print(f"whether the machine has changed since cannot be told: {unread}")
        for change in changes or ():
            print(f"OUT OF DATE: {change}")
        if changes:
            print("run `crashkernel load --refresh`")
    if not now.loaded:
        return EnvironmentFault.exit_code
    return 0 if changes == () else 1


def _unload(arguments: argparse.Namespace) -> int:
    del arguments
    print("unloaded: this machine is not protected now" if loader.unload() else "nothing was loaded")
    _tell_released(quarantine.release())
    return 0
