"""The `crashkernel` command: the only place that prints or exits."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from crashkernel import __version__, loader
from crashkernel.errors import CrashkernelError
from crashkernel.machine.live import read_machine
from crashkernel.placement import plan_load
from crashkernel.placement.image import KernelImage
from crashkernel.placement.plan import PLACEMENTS

if TYPE_CHECKING:
    pass


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit status: 0 good, 1 failed verification, 2 usage, 3 the machine lacks something, 70 our bug."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except CrashkernelError as error:
        print(f"crashkernel: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="crashkernel")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True)
    load = commands.add_parser("load")
    load.add_argument("--placement", choices=PLACEMENTS, default="reserved")
    load.add_argument("--kernel", type=Path)
    load.add_argument("--initrd", type=Path)
    load.add_argument("--append")
    load.add_argument("--plan-out", type=Path)
    load.add_argument("--dry-run", action="store_true")
    load.set_defaults(run=_load)
    return parser


def _load(arguments: argparse.Namespace) -> int:
    machine = read_machine()
    image = KernelImage.from_bytes(arguments.kernel.read_bytes(), str(arguments.kernel))
    initrd = arguments.initrd.read_bytes() if arguments.initrd else b""
    plan = plan_load(machine, image, len(initrd), arguments.append, arguments.placement)
    payloads = loader.assemble(plan, machine, image, initrd)
    loader.load(plan, payloads)
    if arguments.plan_out:
        arguments.plan_out.write_text(plan.to_json())
    return 0
