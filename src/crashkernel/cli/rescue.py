"""plan, load, status, unload: standard library only, for a POWER host or its initramfs."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from crashkernel import loader
from crashkernel.cli.command import add_command
from crashkernel.errors import EnvironmentFault, UsageError
from crashkernel.formats.fdt import DeviceTree
from crashkernel.machine import HEAD_SIZE
from crashkernel.machine.devicetree import machine_from_tree
from crashkernel.machine.live import read_machine
from crashkernel.memory import format_size
from crashkernel.placement import plan_load
from crashkernel.placement.image import KernelImage
from crashkernel.placement.plan import DAMAGE_POLICIES, PLACEMENTS, DamagePolicy, LoadPlan, PlacementName
from crashkernel.report.maps import draw_stages

if TYPE_CHECKING:
    from crashkernel.machine import Machine

COMMANDS = ("plan", "load", "status", "unload")

DEFAULT_OPTIONS = "maxcpus=1 irqpoll reset_devices"
"""What every capture kernel wants: one CPU, interrupts that nobody asked for any more, devices in an unknown state."""

_NOT_FOR_K2 = ("crashkernel=", "elfcorehdr=", "fadump=", "BOOT_IMAGE=")

_PLAN_EPILOG = """examples:
  crashkernel plan                                  this host, its own kernel and initrd
  crashkernel plan --placement zero                 K2 exchanged down to address zero
  crashkernel plan --json > plan.json               for scripts
  crashkernel plan --from plan.json                 draw a plan made before
  crashkernel plan --machine-tree host.dtb --kernel vmlinux
                                                    plan for another machine, from its device tree
"""

_LOAD_EPILOG = """examples:
  crashkernel load                                  K2 is this host's own kernel, in the reserved region
  crashkernel load --placement zero                 the same, to be exchanged down to address zero
  crashkernel load --kernel vmlinux --initrd rescue.img --append 'console=hvc0 maxcpus=1'
  crashkernel load --dry-run                        plan and build everything, load nothing

What was loaded before is replaced. The plan is kept in /run/crashkernel/plan.json for `crashkernel status`.
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the four commands to the parser."""
    plan = add_command(commands, "plan", "show where K2 would go, as memory maps stage by stage", _PLAN_EPILOG)
    _add_choices(plan)
    plan.add_argument(
        "--machine-tree", type=Path, metavar="DTB", help="plan for the machine this flattened device tree describes"
    )
    plan.add_argument("--from", dest="saved", type=Path, metavar="PLAN", help="draw a saved plan instead of making one")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON instead of maps")
    plan.set_defaults(run=_plan)

    load = add_command(commands, "load", "load the capture kernel into the reserved region", _LOAD_EPILOG)
    _add_choices(load)
    load.add_argument("--dry-run", action="store_true", help="stop short of the kexec_load system call")
    load.set_defaults(run=_load)

    status = add_command(
        commands, "status", "tell whether a capture kernel is loaded, and how", "exit status: 0 loaded, 3 not loaded"
    )
    status.add_argument("--json", action="store_true", help="for scripts")
    status.set_defaults(run=_status)

    unload = add_command(commands, "unload", "take the capture kernel out again")
    unload.set_defaults(run=_unload)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="reserved",
        help="where K2 runs: exchanged down to address zero, or in its reserved region (default: %(default)s)",
    )
    parser.add_argument("--kernel", type=Path, metavar="FILE", help="K2, an ELF vmlinux (default: that of the running kernel)")
    parser.add_argument(
        "--initrd",
        type=Path,
        metavar="FILE",
        help="K2's initramfs; '' for none (default: kdump's, else the running kernel's; with --kernel: none)",
    )
    cmdline = parser.add_mutually_exclusive_group()
    cmdline.add_argument(
        "--append",
        metavar="OPTIONS",
        help=f"K2's command line (default: this kernel's console= options and '{DEFAULT_OPTIONS}')",
    )
    cmdline.add_argument(
        "--reuse-cmdline",
        action="store_true",
        help=f"use the running kernel's command line, without {', '.join(_NOT_FOR_K2)}, and '{DEFAULT_OPTIONS}' added",
    )
    parser.add_argument(
        "--on-damage",
        choices=DAMAGE_POLICIES,
        default="reboot",
        help="at a panic, when K2 or anything loaded with it is found damaged: say so on the console, then halt, reboot, or "
        "enter K2 all the same (default: %(default)s)",
    )
    parser.add_argument("--plan-out", type=Path, metavar="FILE", help="write the plan as JSON")


def _plan(arguments: argparse.Namespace) -> int:
    if arguments.saved is not None:
        plan = LoadPlan.from_json(_read(arguments.saved).decode("utf-8", "replace"), str(arguments.saved))
    else:
        machine = _machine(arguments)
        plan, _, _ = _make_plan(arguments, machine)
    _write_plan(arguments, plan)
    print(plan.to_json() if arguments.json else _printable(draw_stages(plan)))
    return 0


def _load(arguments: argparse.Namespace) -> int:
    machine = read_machine()
    plan, image, initrd = _make_plan(arguments, machine)
    if len(machine.head) != HEAD_SIZE:
        raise EnvironmentFault(
            "cannot read this kernel's first bytes from /proc/kcore", hint="run as root; lockdown forbids it too"
        )
    payloads = loader.assemble(plan, machine, image, initrd)
    for beyond in plan.unchecked:
        print(
            f"crashkernel: warning: {beyond} of the initramfs lies above the RMA and is not checked at a panic", file=sys.stderr
        )
    _write_plan(arguments, plan)  # before the load: a path that cannot be written is to change nothing
    if not arguments.dry_run and not loader.load(plan, payloads):
        print(
            f"crashkernel: warning: cannot write /{loader.STATE}: `crashkernel status` will not know this load", file=sys.stderr
        )
    did = "would load" if arguments.dry_run else "loaded"
    print(f"{did} {plan.kernel}, placement {plan.placement}, into {plan.reserved} ({format_size(plan.reserved.size)})")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    now = loader.status()
    if arguments.json:
        print(loader.status_json(now))
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
        print(f"K2's command line: {_printable(plan.cmdline)}")
        print(f"its dump will hold {format_size(plan.k1_memory.total)} of memory")
    return 0 if now.loaded else 3


def _unload(arguments: argparse.Namespace) -> int:
    del arguments
    print("unloaded: this machine is not protected now" if loader.unload() else "nothing was loaded")
    return 0


def _machine(arguments: argparse.Namespace) -> Machine:
    if arguments.machine_tree is None:
        return read_machine()
    tree = DeviceTree.from_bytes(_read(arguments.machine_tree), str(arguments.machine_tree))
    return machine_from_tree(tree.root, source=str(arguments.machine_tree))


def _make_plan(arguments: argparse.Namespace, machine: Machine) -> tuple[LoadPlan, KernelImage, bytes]:
    kernel = arguments.kernel or _first("a kernel", _kernels(), "--kernel")
    image = KernelImage.from_bytes(_read(kernel), str(kernel))
    initrd = b""
    if arguments.initrd is None:
        initrd = _read(_first("an initramfs", _initrds(), "--initrd")) if arguments.kernel is None else b""
    elif str(arguments.initrd) != ".":  # what Path makes of ''
        initrd = _read(arguments.initrd)
    plan = plan_load(
        machine,
        image,
        len(initrd),
        _cmdline(arguments, machine),
        cast("PlacementName", arguments.placement),
        cast("DamagePolicy", arguments.on_damage),
    )
    return plan, image, initrd


def _cmdline(arguments: argparse.Namespace, machine: Machine) -> str:
    if arguments.append is not None:
        return str(arguments.append)
    words = [word for word in machine.cmdline.split() if not word.startswith(_NOT_FOR_K2)]
    if not arguments.reuse_cmdline:
        words = [word for word in words if word.startswith("console=")]
    return " ".join([*words, *(word for word in DEFAULT_OPTIONS.split() if word not in words)])


def _kernels() -> list[Path]:
    release = platform.release()
    return [Path(f"/boot/vmlinux-{release}"), Path(f"/boot/vmlinuz-{release}"), Path(f"/usr/lib/modules/{release}/vmlinuz")]


def _initrds() -> list[Path]:
    release = platform.release()
    return [
        Path(f"/var/lib/kdump/initrd.img-{release}"),  # Debian's kdump-tools
        Path(f"/boot/initramfs-{release}kdump.img"),  # Red Hat's kdump-utils
        Path(f"/boot/initrd-{release}-kdump"),  # SUSE's kdump
        Path(f"/boot/initrd.img-{release}"),
    ]


def _first(what: str, places: list[Path], option: str) -> Path:
    for place in places:
        if place.is_file():
            return place
    raise UsageError(
        f"found {what} of the running kernel nowhere: {', '.join(map(str, places))}", hint=f"name it with {option}"
    )


def _printable(text: str) -> str:
    """Bytes of a command line that are no text (os.fsdecode) as escapes: print() refuses them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="give the path of an existing, readable file") from error


def _write_plan(arguments: argparse.Namespace, plan: LoadPlan) -> None:
    if arguments.plan_out is None:
        return
    temporary = arguments.plan_out.with_name(arguments.plan_out.name + ".new")
    try:
        temporary.write_text(plan.to_json() + "\n")
        temporary.replace(arguments.plan_out)
    except OSError as error:
        raise UsageError(f"cannot write {arguments.plan_out}: {error.strerror}", hint="choose another --plan-out") from error
    print(f"plan written to {arguments.plan_out}", file=sys.stderr)
