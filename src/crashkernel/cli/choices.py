"""What the capture kernel is and where it goes: the options that plan, compare and load share, and the plan they make."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from crashkernel.cli.command import read
from crashkernel.errors import UsageError
from crashkernel.loader import Request
from crashkernel.machine.kernelfile import kernel_files
from crashkernel.placement import ONE_CPU, plan_load
from crashkernel.placement.plan import DAMAGE_POLICIES, PLACEMENTS, DamagePolicy, LoadPlan, PlacementName
from crashkernel.placement.sizing import Initrd, measure_initrd

if TYPE_CHECKING:
    from crashkernel.machine import Machine
    from crashkernel.placement.image import KernelImage

DEFAULT_OPTIONS = f"{ONE_CPU} irqpoll reset_devices"
"""What every capture kernel wants: one CPU; interrupts that nobody asked for any more; devices in an unknown state."""

_NOT_FOR_K2 = ("crashkernel=", "elfcorehdr=", "fadump=", "BOOT_IMAGE=")


def add_placement(parser: argparse.ArgumentParser) -> None:
    """The placement, for commands that are about one."""
    parser.add_argument(
        "--placement",
        choices=PLACEMENTS,
        help="where K2 runs: exchanged down to address zero, or in its reserved region (default: reserved)",
    )


def add_capture_kernel(parser: argparse.ArgumentParser) -> None:
    """K2: kernel, initramfs, command line, and what it does on damage."""
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
        help="at a panic, when K2 or anything loaded with it is found damaged: say so on the console, then halt, reboot, or "
        "enter K2 all the same (default: reboot)",
    )


def given(arguments: argparse.Namespace) -> list[str]:
    """Which of the options that make a request were given, as on the command line."""
    names = ("placement", "kernel", "initrd", "append", "reuse_cmdline", "on_damage", "no_quarantine", "machine", "crashkernel")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name, None) not in (None, False)]


def requested(arguments: argparse.Namespace, machine: Machine) -> Request:
    """What the options ask for, with every default filled in.

    :raise UsageError: no kernel or initramfs was named, and none is where distributions put them.
    """
    kernel = arguments.kernel or _first("a kernel", list(kernel_files(Path("/"), os.uname().release)), "--kernel")
    initrd: Path | None = arguments.initrd
    if initrd is None:
        initrd = _first("an initramfs", _initrds(), "--initrd") if arguments.kernel is None else None
    elif str(initrd) == ".":  # what Path makes of ''
        initrd = None
    return Request(
        placement=cast("PlacementName", getattr(arguments, "placement", None) or "reserved"),
        on_damage=cast("DamagePolicy", arguments.on_damage or "reboot"),
        kernel=str(kernel.absolute()),
        initrd=str(initrd.absolute()) if initrd else "",
        cmdline=_cmdline(arguments, machine),
        quarantine=not getattr(arguments, "no_quarantine", False),
    )


def plan_for(request: Request, machine: Machine, image: KernelImage, initrd: Initrd) -> LoadPlan:
    """The plan that `request` leads to on `machine`; `image` and `initrd` are its files."""
    return plan_load(machine, image, initrd, request.cmdline, request.placement, request.on_damage)


def initrd_of(request: Request) -> tuple[bytes, Initrd]:
    """K2's initramfs, b"" for none, and what it will take of K2's memory.

    :raise UsageError: it cannot be read.
    :raise FormatError: K2 could not unpack it.
    """
    data = read(Path(request.initrd)) if request.initrd else b""
    return data, measure_initrd(data, request.initrd)


def _cmdline(arguments: argparse.Namespace, machine: Machine) -> str:
    if arguments.append is not None:
        return str(arguments.append)
    words = [word for word in machine.cmdline.split() if not word.startswith(_NOT_FOR_K2)]
    if not arguments.reuse_cmdline:
        words = [word for word in words if word.startswith("console=")]
    return " ".join([*words, *(word for word in DEFAULT_OPTIONS.split() if word not in words)])


def _initrds() -> list[Path]:
    release = os.uname().release
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
