"""drill, describe-twin, bench drill, big-endian: for the engineer's machine, with QEMU and the `drill` extra."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crashkernel.cli.command import add_command, write, write_json
from crashkernel.cli.display import Display, require_extra, require_writable, terminable
from crashkernel.drill.faults import fault_lines
from crashkernel.drill.request import DEFAULT_KERNEL, DrillRequest, Supplies, fetch
from crashkernel.drill.saving import CODECS, DESTINATIONS
from crashkernel.drill.twin import CPUS, MACHINES, MMUS
from crashkernel.errors import StageFailed, UsageError
from crashkernel.placement.plan import DAMAGE_POLICIES, PLACEMENTS, PlacementName

if TYPE_CHECKING:
    from crashkernel.drill.scenario import Outcome, Scenario

_GOAL = 1.5  # times the bare twin, at 2 GiB

_DRILL_EPILOG = """examples:
  crashkernel drill                                 Debian 12's kernel, both placements
  crashkernel drill --placement zero --keep out     keep the dump and the evidence in out/
  crashkernel drill --kernel debian:trixie debian:trixie/powerpc64le-64k debian:sid
  crashkernel drill --kernel big-endian             a big-endian kernel, after `make big-endian`
  crashkernel drill --kernel ./vmlinux              your own kernel; modules in ../lib/modules/RELEASE
  crashkernel drill --kernel debian:bookworm --capture-kernel debian:sid    a newer K2
  crashkernel drill --cpu POWER8 --smp 2 --memory 4G --crashkernel 256M@128M
  crashkernel drill --fault flip:initrd             is a damaged initramfs noticed at the panic?
  crashkernel drill --fault dma:init+data           and if a device goes on writing when K1 is dead?
  crashkernel drill --fault dma:init --no-quarantine    the same, into pages that a load takes away from K1
  crashkernel drill --fault stuck-cpu --fault nmi --smp 2    a CPU hangs, and an administrator asks for a dump
  crashkernel drill --fault disk-failing --capture 31    and the dump goes elsewhere
  crashkernel drill --capture 31                    K2 runs `crashkernel capture` in place of a raw copy
  crashkernel drill --capture 31 --capture-to network --crashkernel 256M
  crashkernel drill --judge out                     judge a kept drill once more

A drill boots K1 in QEMU, loads K2 with `crashkernel load`, crashes K1, stops the twin at the purgatory's
first instruction to copy its memory from outside, lets K2 save /proc/vmcore, and compares every byte of
K1's memory. The first run downloads Debian packages (about 60 MB a kernel) and keeps them.

Faults for --fault, of each kind one at a time:
@FAULTS@
Most must end in a dump that is right all the same, some in clear words that there is none: docs/faults.md.
With dma the host writes into the twin's memory like a device that nobody stopped: into some pages of K1's static text
or data, pages that K1 gave out to a driver of its freed init, behind its image (slack) or anywhere (memory), K2's image
where it waits, or anywhere in the reserved region. What differs in the device's own buffers is counted apart.

With --capture each page of K1's memory must be in the dump with the right bytes, or be of a class that the level
leaves out: the drill decides that from K1's memory as it was, with none of capture's code.

exit status: 0 every drill passed, 1 one failed, 2 usage, 3 this machine lacks something
""".replace("@FAULTS@", "\n".join(f"  {line}" for line in fault_lines()))


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add drill, describe-twin and big-endian to the parser."""
    drill = add_command(
        commands,
        "drill",
        "crash a virtual twin and prove its dump byte for byte",
        _DRILL_EPILOG,
    )
    drill.add_argument("--placement", choices=(*PLACEMENTS, "both"), default="both", help="default: %(default)s")
    drill.add_argument(
        "--kernel",
        nargs="+",
        default=[DEFAULT_KERNEL],
        metavar="KERNEL",
        help="debian:SUITE[/FLAVOUR], big-endian or the path of a vmlinux, as K1 and K2 (default: debian:bookworm)",
    )
    drill.add_argument("--capture-kernel", metavar="KERNEL", help="K2, where it is another than K1")
    drill.add_argument("--initrd", metavar="FILE", help="K2 unpacks this initrd too, for what it takes of K2's memory")
    _add_twin(drill)
    drill.add_argument("--all-cpus", action="store_true", help="K2 starts every CPU (default: only the one that crashed)")
    drill.add_argument(
        "--fault", action="append", metavar="WORD", help="what goes wrong, as below; may be given more than once"
    )
    drill.add_argument("--seed", type=int, metavar="N", help="of what the faults choose at random (default: 0)")
    drill.add_argument("--on-damage", choices=DAMAGE_POLICIES, help="as for `crashkernel load` (default: reboot)")
    drill.add_argument("--no-quarantine", action="store_true", help="as for `crashkernel load`")
    drill.add_argument(
        "--capture", type=int, metavar="LEVEL", help="K2 runs `crashkernel capture` at this dump level (default: a raw copy)"
    )
    drill.add_argument("--capture-codec", choices=CODECS, help="default: zstd")
    drill.add_argument("--capture-to", choices=DESTINATIONS, help="where K2 sends the dump (default: disk)")
    drill.add_argument("--keep", type=Path, metavar="DIR", help="leave dump, truth, plan and console in DIR/PLACEMENT")
    drill.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON ('-' for standard output)")
    drill.add_argument("--judge", type=Path, metavar="DIR", help="run nothing: judge the drill kept in DIR again")
    drill.set_defaults(run=_drill)

    describe = add_command(
        commands,
        "describe-twin",
        "write down a virtual twin, to plan for it without booting it",
        "example:\n  crashkernel describe-twin --cpu POWER8 --memory 4G --out twin.json\n"
        "  crashkernel plan --machine twin.json --kernel vmlinux",
        description="Boot K1 on a twin and have `crashkernel describe` run there.",
    )
    describe.add_argument("--kernel", default=DEFAULT_KERNEL, metavar="KERNEL", help="K1 (default: %(default)s)")
    _add_twin(describe)
    describe.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    describe.set_defaults(run=_describe_twin)

    big_endian = add_command(
        commands,
        "big-endian",
        "build the big-endian kernel and userland for drills",
        "`make big-endian` installs the compilers first.\n\nexample:\n"
        "  crashkernel big-endian && crashkernel drill --kernel big-endian",
        description="Build a big-endian kernel, and the guests' programs for it, from Debian's sources, unless they are there.",
    )
    big_endian.set_defaults(run=_big_endian)


def add_bench(benches: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench drill`."""
    bench = add_command(
        benches,
        "drill",
        "measure a drill against the two boots it contains",
        "example:\n  crashkernel bench drill --runs 5",
        description="Measure drills against a bare twin that boots, crashes and boots K2 with kexec-tools, run in turn.",
    )
    bench.add_argument("--kernel", default=DEFAULT_KERNEL, metavar="KERNEL", help="default: %(default)s")
    bench.add_argument("--runs", type=int, default=3, metavar="N", help="rounds of bare, zero, reserved (default: %(default)s)")
    _add_twin(bench)
    bench.set_defaults(run=_bench)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The machine to emulate, all but its reservation."""
    parser.add_argument("--machine", choices=MACHINES, default="pseries", help="default: %(default)s")
    parser.add_argument("--cpu", choices=CPUS, help="default: POWER9, or the machine's own")
    parser.add_argument("--mmu", choices=MMUS, help="default: radix, hash on POWER8")
    parser.add_argument("--smp", type=int, default=1, metavar="N", help="CPUs (default: %(default)s)")
    parser.add_argument("--memory", default="2G", metavar="SIZE", help="default: %(default)s")


def _add_twin(parser: argparse.ArgumentParser) -> None:
    add_machine(parser)
    parser.add_argument(
        "--crashkernel",
        default="512M",
        metavar="SPEC",
        help="K1's crashkernel= option; SIZE@k1-end: directly behind K1's image (default: %(default)s)",
    )


def _drill(arguments: argparse.Namespace) -> int:
    if arguments.judge is not None:
        return _judge(arguments.judge)
    placements = PLACEMENTS if arguments.placement == "both" else (arguments.placement,)
    requests = [[_drill_request(arguments, kernel, placement) for placement in placements] for kernel in arguments.kernel]
    from crashkernel.drill.record import require_keepable  # noqa: PLC0415
    from crashkernel.drill.scenario import Scenario  # noqa: PLC0415

    if arguments.json is not None and str(arguments.json) != "-":
        require_writable(arguments.json)
    if arguments.keep is not None:
        require_keepable(arguments.keep)
    display = Display(to_stderr=str(arguments.json) == "-")
    outcomes = []
    with terminable():
        for alike in requests:
            supplies = _fetch(alike[0], display)
            for number, request in enumerate(alike):
                keep = arguments.keep
                if keep is not None:
                    keep = keep / supplies.k1.name / request.placement if len(requests) > 1 else keep / request.placement
                    require_keepable(keep)
                scenario = Scenario(request, supplies, keep)
                if not number:
                    display.title(f"{supplies.title} on {scenario.twin.title}")
                outcomes.append(_run(scenario, display))
    if arguments.json is not None:
        write_json(arguments.json, _record(outcomes))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _drill_request(arguments: argparse.Namespace, kernel: str, placement: PlacementName) -> DrillRequest:
    if arguments.capture is None and (arguments.capture_codec or arguments.capture_to):
        raise UsageError("--capture-codec and --capture-to say how `crashkernel capture` saves", hint="add --capture LEVEL")
    names = (
        "capture-kernel",
        "initrd",
        "on-damage",
        "all-cpus",
        "no-quarantine",
        "capture",
        "capture-codec",
        "capture-to",
        "fault",
        "seed",
    )
    given = {name: getattr(arguments, name.replace("-", "_")) for name in names}
    return _request(arguments, kernel, placement=placement, **given)


def _describe_twin(arguments: argparse.Namespace) -> int:
    request = _request(arguments, arguments.kernel)
    from crashkernel.drill.scenario import describe_twin  # noqa: PLC0415

    display = Display(to_stderr=True)
    with terminable():
        supplies = _fetch(request, display)
        display.title(f"{supplies.k1.name} on {request.twin.title}")
        with display.drill("describe") as tell:
            text = describe_twin(request, supplies, tell)
    if arguments.out is None:
        print(text, end="")
    else:
        write(arguments.out, text, "--out")
    return 0


def _judge(directory: Path) -> int:
    require_extra("numpy", "qemu", "rich")
    from crashkernel.drill.record import judge_kept  # noqa: PLC0415

    display = Display()
    verdict = judge_kept(directory)
    display.line("PASS" if verdict.passed else "FAIL", style="bold green" if verdict.passed else "bold red")
    display.verdict(verdict)
    return 0 if verdict.passed else 1


def _bench(arguments: argparse.Namespace) -> int:
    requests = [_request(arguments, arguments.kernel, placement=placement) for placement in PLACEMENTS]
    from crashkernel.drill.scenario import Scenario, run_bare  # noqa: PLC0415

    if arguments.runs < 1:
        raise UsageError("--runs must be at least 1")
    display = Display()
    ratios: dict[PlacementName, list[float]] = {placement: [] for placement in PLACEMENTS}
    with terminable():
        supplies = _fetch(requests[0], display, kexec_tools=True)
        display.title(f"{supplies.k1.name} on {requests[0].twin.title}")
        for _ in range(arguments.runs):
            with display.drill("bare twin, kexec-tools") as tell:
                bare = run_bare(requests[0], supplies, tell)
            if bare.failure is not None:
                raise bare.failure
            display.line(f"bare twin, kexec-tools: {bare.seconds:.1f} s")
            for request in requests:
                outcome = _run(Scenario(request, supplies), display)
                if not outcome.passed:
                    raise StageFailed("bench", f"the {request.placement} drill failed, so its time means nothing")
                ratios[request.placement].append(outcome.seconds / bare.seconds)
    for placement, values in ratios.items():
        print(
            f"drill {placement}: {statistics.median(values):.2f} times the bare twin "
            f"(median of {len(values)}, {min(values):.2f} to {max(values):.2f}), capture and verification included; "
            f"{'within' if statistics.median(values) <= _GOAL else 'beyond'} the goal of {_GOAL}"
        )
    return 0


def _big_endian(_arguments: argparse.Namespace) -> int:
    require_extra("rich")
    from crashkernel.drill import bigendian  # noqa: PLC0415

    display = Display()
    with terminable(), display.busy("big-endian") as tell:
        bigendian.build(progress=tell)
    display.line("the big-endian kernel is ready: crashkernel drill --kernel big-endian")
    return 0


def _run(scenario: Scenario, display: Display) -> Outcome:
    from crashkernel.drill.scenario import run_drill  # noqa: PLC0415

    with display.drill(scenario.placement) as tell:
        outcome = run_drill(scenario, tell)
    display.outcome(outcome)
    return outcome


def _request(arguments: argparse.Namespace, kernel: str, **more: Any) -> DrillRequest:
    """The drill that the options name."""
    require_extra("numpy", "qemu", "rich")
    given = {name: getattr(arguments, name) for name in ("machine", "cpu", "mmu", "smp", "memory", "crashkernel")}
    return DrillRequest.from_options(
        {"kernel": kernel, **{name: value for name, value in (given | more).items() if value is not None}}
    )


def _fetch(request: DrillRequest, display: Display, *, kexec_tools: bool = False) -> Supplies:
    with display.busy("packages") as tell:
        return fetch(request, tell, kexec_tools=kexec_tools)


def _record(outcomes: list[Outcome]) -> dict[str, Any]:
    from crashkernel.drill.record import outcome_record  # noqa: PLC0415

    return {
        "verdict": "PASS" if all(outcome.passed for outcome in outcomes) else "FAIL",
        "drills": [outcome_record(outcome) for outcome in outcomes],
    }
