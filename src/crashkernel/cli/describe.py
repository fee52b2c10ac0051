"""describe: this machine as a file to plan with elsewhere. Standard library only, like the rest of the rescue path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crashkernel.cli.command import add_command, read, write
from crashkernel.formats.fdt import DeviceTree
from crashkernel.machine.description import CMDLINE_OPTIONS, describe
from crashkernel.machine.devicetree import machine_from_tree
from crashkernel.machine.live import read_machine
from crashkernel.memory import format_size

if TYPE_CHECKING:
    import argparse

    from crashkernel.machine import Machine


_EPILOG = f"""examples:
  crashkernel describe --out machine.json           this host, to be planned for on another machine
  crashkernel describe | less                       look at it before you send it
  crashkernel describe --machine host.dtb      what can be said of a machine by its device tree alone

in the file:
  memory, the reserved region, firmware's memory, CPUs and where their registers are saved, the MMU, consoles;
  where this kernel's image lies and who holds the low memory pages (asked of /proc/kpageflags, so run as root);
  its release, its first 256 bytes, which are code, and of its command line the options
  {", ".join(CMDLINE_OPTIONS[:5])},
  {", ".join(CMDLINE_OPTIONS[5:])}

not in the file:
  any other property of the device tree (serial numbers, partition names, MAC addresses, vital product data, random
  seeds, keys), any other option of the command line, any other byte of memory
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add describe to the parser."""
    parser = add_command(commands, "describe", "write down this machine, to plan for it elsewhere", _EPILOG)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there, whole or not at all (default: standard output)")
    parser.add_argument(
        "--machine", type=Path, metavar="DTB", help="describe the machine of this flattened device tree, not this host"
    )
    parser.set_defaults(run=_describe)


def _describe(arguments: argparse.Namespace) -> int:
    text = describe(read_machine() if arguments.machine is None else _from_tree(arguments.machine)) + "\n"
    if arguments.out is None:
        print(text, end="")
    else:
        write(arguments.out, text, "--out")
        print(f"{arguments.out}: {format_size(len(text))}")
    return 0


def _from_tree(path: Path) -> Machine:
    return machine_from_tree(DeviceTree.from_bytes(read(path), str(path)).root, source=str(path))
