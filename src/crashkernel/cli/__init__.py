"""The `crashkernel` command: the only room that prints or exits.

`describe`, `planning` (plan, compare) and `rescue` (load, status, unload) run on the POWER host and in its initramfs; `twin`
(drill, matrix) and `bench` on the engineer's machine. The latter and their dependencies are only imported when asked for.
"""

from __future__ import annotations

import argparse
import os
import sys

from crashkernel import __version__
from crashkernel.cli import describe, planning, rescue
from crashkernel.errors import CrashkernelError
from crashkernel.report.terminal import visible

_DESCRIPTION = """kdump for POWER: decides where the capture kernel goes, loads it, hands the machine over to it when the
running kernel dies, and proves on a virtual twin that every byte of the dead kernel's memory will be in the dump."""

_EPILOG = """on the POWER host:
  crashkernel plan                          show where everything would go, and what could go wrong
  crashkernel compare                       both placements side by side
  crashkernel load                          protect this host with its own kernel
  crashkernel status                        is it protected, and how?

on any machine with QEMU:
  crashkernel drill                         crash a twin, both placements, and check every byte

exit status:
  0   good                                  2   the request makes no sense
  1   a handover or a dump failed           3   this machine lacks something, or refuses
                                            70  a bug of ours

environment:
  CRASHKERNEL_DEBUG=1                       show the traceback of a bug
  CRASHKERNEL_CACHE, CRASHKERNEL_MIRROR     where the drill keeps Debian's packages, where it gets them
"""


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
    describe.add_commands(commands)
    planning.add_commands(commands)
    rescue.add_commands(commands)
    # In an initramfs neither the drill nor what it stands on is there; and parsing `load` needs none of it.
    if not argv or argv[0] not in (*describe.COMMANDS, *planning.COMMANDS, *rescue.COMMANDS):
        from crashkernel.cli import bench, twin  # noqa: PLC0415

        twin.add_commands(commands)
        bench.add_commands(commands)
    return parser
