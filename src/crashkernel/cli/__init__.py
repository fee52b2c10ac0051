"""The `crashkernel` command: the only room that prints or exits.

`describe`, `planning` (plan, compare) and `rescue` (load, status, unload) run on the POWER host and in its initramfs, `capture`
in the capture kernel; `dumps` (inspect, verify, convert) and `receive` wherever a dump goes; `twin` (drill) and `bench`
on the engineer's machine. A command's module, and what that stands on, is imported only when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from crashkernel import __version__
from crashkernel.errors import CrashkernelError
from crashkernel.report.terminal import visible

_DESCRIPTION = """kdump for POWER: decides where the capture kernel goes, loads it, hands the machine over to it when the
running kernel dies, and proves on a virtual twin that every byte of the dead kernel's memory will be in the dump."""

_EPILOG = """on the POWER host:
  crashkernel plan                          show where everything would go, and what could go wrong
  crashkernel compare                       both placements side by side
  crashkernel load                          protect this host with its own kernel
  crashkernel status                        is it protected, and how?

in the capture kernel, and where dumps go:
  crashkernel capture                       save /proc/vmcore, filtered and compressed
  crashkernel receive DIR                   take dumps over the network
  crashkernel inspect vmcore                what crashed, and is the dump whole?

on any machine with QEMU:
  crashkernel drill                         crash a twin, both placements, and check every byte
  crashkernel campaign run FILE.toml        hundreds of drills, into one database
  crashkernel report DB                     what came of them: in the terminal, or as one page

exit status:
  0   good                                  2   the request makes no sense
  1   a handover or a dump failed           3   this machine lacks something, or refuses
                                            70  a bug of ours

environment:
  CRASHKERNEL_DEBUG=1                       show the traceback of a bug
  CRASHKERNEL_CACHE, CRASHKERNEL_MIRROR     where the drill keeps Debian's packages, where it gets them
"""


_COMMANDS = {
    "describe": ("describe",),
    "planning": ("plan", "compare"),
    "rescue": ("load", "status", "unload", "quarantine"),
    "capture": ("capture",),
    "dumps": ("inspect", "verify", "convert"),
    "receive": ("receive",),
    "twin": ("drill", "describe-twin", "big-endian"),
    "campaign": ("campaign",),
    "size": ("size",),
    "bench": ("bench",),
    "report": ("report",),
}
"""The modules of this room, and the commands of each."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit status."""
    status = None
    try:
        arguments = _parser(sys.argv[1:] if argv is None else argv).parse_args(argv)
        status = int(arguments.run(arguments))
        sys.stdout.flush()
    except CrashkernelError as error:
        print(f"crashkernel: {visible(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("crashkernel: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader has gone, as `head` does; a verdict that was not reached is no good one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141 if status is None else status
    except Exception as error:
        if os.environ.get("CRASHKERNEL_DEBUG"):
            raise
        print(
            f"crashkernel: a bug of ours: {type(error).__name__}: {error} (run again with CRASHKERNEL_DEBUG=1 and report it)",
            file=sys.stderr,
        )
        return CrashkernelError.exit_code
    return status


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="crashkernel", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"crashkernel {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    # In an initramfs neither the drill nor what it stands on is there; and parsing `load` needs none of it.
    asked = [module for module, names in _COMMANDS.items() if argv and argv[0] in names]
    for module in asked or _COMMANDS:
        importlib.import_module(f"crashkernel.cli.{module}").add_commands(commands)
    return parser
