"""bench faults, bench instructions: the purgatory under every fault, and counted instruction by instruction."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from crashkernel.bench.cpus import BARE, CPUS
from crashkernel.cli.command import add_command
from crashkernel.cli.display import require_extra, require_writable, terminable
from crashkernel.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

_T = TypeVar("_T")
_PLACEMENTS = ("zero", "reserved")
_QUICK = 60
_QUICK_BITS = 97
_SECOND = 20
"""A second CPU at one point in so many of those disturbed."""

_EPILOG = """examples:
  crashkernel bench faults                             some minutes
  crashkernel bench faults --every 1 --svg map.svg     every instruction: a quarter of an hour or more
  crashkernel bench faults --every-bit                 and every bit of the purgatory: an hour or more

Faults are injected into a handover over a few lines of memory, at each instruction outside loops and of the
first, a middle and the last pass of each loop: DMA writes and flipped bits in every region, machine checks,
system resets, a second CPU. Then bits of the loaded purgatory are flipped, and 10,000 damaged copies are shown
to its check.

exit status: 0 whatever is silent has a known reason, 1 something is UNEXPLAINED or the check missed damage,
2 usage, 3 this machine lacks something
"""


def add_benches(benches: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both."""
    faults = add_command(
        benches,
        "faults",
        "inject every fault at every instruction of a handover",
        _EPILOG,
        description="Inject every fault at every instruction of a handover, and classify what comes of it.",
    )
    faults.add_argument(
        "--every", type=int, default=_QUICK, metavar="N", help="at each N-th instruction (default: %(default)s)"
    )
    faults.add_argument("--every-bit", action="store_true", help=f"flip every bit of the purgatory, not one in {_QUICK_BITS}")
    faults.add_argument("--cpu", choices=BARE, default="POWER9", help="(default: %(default)s)")
    faults.add_argument("--big-endian", action="store_true", help="K1's byte order (default: little-endian where there is one)")
    faults.add_argument("--placement", action="append", choices=_PLACEMENTS, help="repeatable (default: both)")
    faults.add_argument("--svg", type=Path, metavar="FILE", help="draw the map; of two placements: FILE-zero, FILE-reserved")
    faults.add_argument("--json", type=Path, metavar="FILE", help="write the map as JSON")
    faults.set_defaults(run=_faults)
    instructions = add_command(
        benches,
        "instructions",
        "count the purgatory's instructions a byte, and kexec-tools'",
        "example:\n  crashkernel bench instructions --cpu POWER9",
        description="Count the purgatory's instructions for each byte, and those of kexec-tools' (fetched from Debian).",
    )
    instructions.add_argument("--cpu", action="append", choices=BARE, help="repeatable (default: all)")
    instructions.set_defaults(run=_instructions)


def _faults(arguments: argparse.Namespace) -> int:
    require_extra("numpy", "rich")
    from rich.console import Console  # noqa: PLC0415

    from crashkernel.bench.bits import flip_bits, inject_damage, render_bits, render_injections  # noqa: PLC0415
    from crashkernel.bench.faultpicture import render_faults, svg  # noqa: PLC0415
    from crashkernel.bench.faults import fault_map, to_json  # noqa: PLC0415
    from crashkernel.bench.secondcpu import render_second_cpu, second_cpu  # noqa: PLC0415

    if arguments.every < 1:
        raise UsageError("--every must be at least 1")
    for path in (arguments.svg, arguments.json):
        if path is not None:
            require_writable(path)
    console = Console(highlight=False, soft_wrap=True)
    cpu, little = arguments.cpu, CPUS[arguments.cpu].little and not arguments.big_endian
    placements = tuple(dict.fromkeys(arguments.placement or _PLACEMENTS))
    started, bad, maps = time.monotonic(), 0, []

    def show(text: str) -> None:
        console.print(text + "\n", markup=False)

    with terminable():
        shown = _with_progress(console, partial(inject_damage, cpu))
        show(render_injections(shown))
        bad += len(shown.missed) + shown.imagined
        for placement in placements:
            inject = partial(fault_map, placement, cpu=cpu, little=little, every=arguments.every)
            each = _with_progress(console, inject)
            show(render_faults(each))
            maps.append(each)
            if CPUS[cpu].count > 1:
                arrive = partial(second_cpu, placement, cpu=cpu, little=little, every=arguments.every * _SECOND)
                second = _with_progress(console, arrive)
                show(render_second_cpu(second))
                bad += second.silent
            flip = partial(flip_bits, placement, cpu=cpu, little=little, every=1 if arguments.every_bit else _QUICK_BITS)
            bits = _with_progress(console, flip)
            show(render_bits(bits))
            bad += len(each.unexplained) + len(bits.unexplained)
            if arguments.svg is not None:
                path = arguments.svg
                if len(placements) > 1:
                    path = path.with_stem(f"{path.stem}-{placement}")
                path.write_text(svg(each))
    if arguments.json is not None:
        arguments.json.write_text(to_json(maps) + "\n")
    verdict = "nothing is UNEXPLAINED" if not bad else f"{bad:,} UNEXPLAINED"
    console.print(f"{verdict}, in {time.monotonic() - started:.0f} s", style="bold red" if bad else "bold green")
    return 1 if bad else 0


def _instructions(arguments: argparse.Namespace) -> int:
    require_extra("numpy", "rich")
    from rich.console import Console  # noqa: PLC0415

    from crashkernel.bench.instructions import count_instructions, render_instructions  # noqa: PLC0415

    console = Console(highlight=False, soft_wrap=True)
    with terminable():
        report = _with_progress(console, partial(count_instructions, arguments.cpu or BARE))
    console.print(render_instructions(report), markup=False)
    return 0


def _with_progress(console: Console, work: Callable[..., _T]) -> _T:
    """Do it, with a line on the terminal that says how far it is."""
    with console.status("") as status:
        return work(progress=status.update)
