"""plan, compare: what a load would do, before it is done. Standard library only; on any machine, for any other."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from crashkernel.cli import choices
from crashkernel.cli.command import add_command, read, write
from crashkernel.errors import FormatError, PlanError, UsageError
from crashkernel.formats.fdt import DeviceTree
from crashkernel.machine.description import machine_from_description
from crashkernel.machine.devicetree import machine_from_tree
from crashkernel.machine.live import read_machine
from crashkernel.memory import RangeSet
from crashkernel.placement.comparison import compare, recommend
from crashkernel.placement.image import KernelImage
from crashkernel.placement.plan import LoadPlan
from crashkernel.placement.reservation import WORD, reserve
from crashkernel.report.comparison import draw_comparison
from crashkernel.report.hazards import draw_hazards
from crashkernel.report.maps import draw_stages
from crashkernel.report.reservation import draw_reservation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crashkernel.machine import Machine
    from crashkernel.placement.comparison import Recommendation, Variant
    from crashkernel.placement.plan import PlacementName


_FDT_MAGIC = b"\xd0\x0d\xfe\xed"

_PLAN_EPILOG = """examples:
  crashkernel plan                                  this host, its own kernel and initrd
  crashkernel plan --placement zero --explain       K2 exchanged down to address zero, with every check's reasons
  crashkernel plan --crashkernel 1G-8G:512M,8G-:1G  as if this host had been booted with that
  crashkernel plan --machine machine.json --kernel vmlinux
                                                    for another machine: `crashkernel describe`, or a device tree blob
  crashkernel plan --html plan.html --svg plan.svg  for a ticket
  crashkernel plan --json > plan.json               for scripts
  crashkernel plan --from plan.json                 draw a plan made before

What the checks say: safe; safe because something named prevents it; DANGEROUS; IMPOSSIBLE, which `load` refuses;
unknown, when what one would have to know could not be read.
"""

_COMPARE_EPILOG = """examples:
  crashkernel compare                               this host, its own kernel and initrd
  crashkernel compare --machine machine.json --kernel vmlinux
  crashkernel drill --json drill.json && crashkernel compare --drills drill.json
                                                    with what drills showed
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add plan and compare to the parser."""
    plan = add_command(commands, "plan", "show where K2 would go, stage by stage, and what could go wrong", _PLAN_EPILOG)
    choices.add_placement(plan)
    _add_machine(plan)
    choices.add_capture_kernel(plan)
    plan.add_argument("--explain", action="store_true", help="every check with its reason, addresses, advice and source")
    plan.add_argument("--from", dest="saved", type=Path, metavar="PLAN", help="draw a saved plan instead of making one")
    plan.add_argument("--plan-out", type=Path, metavar="FILE", help="write the plan as JSON")
    plan.add_argument("--svg", type=Path, metavar="FILE", help="write the stages as a picture")
    plan.add_argument("--html", type=Path, metavar="FILE", help="write a page that steps through the stages")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON instead of maps")
    plan.set_defaults(run=_plan)

    compare_ = add_command(
        commands, "compare", "both placements side by side: hazards, costs, and which to take", _COMPARE_EPILOG
    )
    _add_machine(compare_)
    choices.add_capture_kernel(compare_)
    compare_.add_argument("--drills", type=Path, metavar="FILE", help="what drills showed: the JSON of `crashkernel drill`")
    compare_.add_argument("--json", action="store_true", help="for scripts")
    compare_.set_defaults(run=_compare)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--machine",
        type=Path,
        metavar="FILE",
        help="another machine: what `crashkernel describe` wrote there, or its flattened device tree (default: this host)",
    )
    parser.add_argument(
        "--crashkernel", metavar="SPEC", help="as if K1 had been booted with crashkernel=SPEC: by its kernel's own rules"
    )


def _plan(arguments: argparse.Namespace) -> int:
    preface = ""
    if arguments.saved is not None:
        if given := choices.given(arguments):
            raise UsageError(
                f"--from draws a plan as it is: it takes no {' and no '.join(given)}", hint="leave one or the other out"
            )
        plan = LoadPlan.from_json(read(arguments.saved).decode("utf-8", "replace"), str(arguments.saved))
    else:
        machine, preface = _machine(arguments)
        request = choices.requested(arguments, machine)
        plan = choices.plan_for(request, machine, KernelImage.open(Path(request.kernel)), choices.initrd_of(request)[1])
    files = []  # all are made before the first is written
    if arguments.plan_out is not None:
        files.append((arguments.plan_out, plan.to_json() + "\n", "--plan-out"))
    if arguments.svg is not None:
        from crashkernel.report.svg import stages_svg  # noqa: PLC0415  (takes longer to import than all the rest)

        files.append((arguments.svg, stages_svg(plan), "--svg"))
    if arguments.html is not None:
        from crashkernel.report.html import stages_html  # noqa: PLC0415

        files.append((arguments.html, stages_html(plan), "--html"))
    for path, text, option in files:
        write(path, text, option)
    if arguments.json:
        print(plan.to_json())
        return 0
    colour, width = _colour(), _width()
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    parts = [
        preface,
        draw_stages(plan, colour, width, unicode=unicode),
        draw_hazards(plan.hazards, colour, width, short=not arguments.explain),
    ]
    print("\n\n".join(part for part in parts if part))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    machine, preface = _machine(arguments)
    request = choices.requested(arguments, machine)
    image, (_, initrd) = KernelImage.open(Path(request.kernel)), choices.initrd_of(request)

    def plan_on(machine: Machine, placement: PlacementName) -> LoadPlan:
        return choices.plan_for(replace(request, placement=placement), machine, image, initrd)

    variants = compare(machine, plan_on)
    recommendation = recommend(variants)
    drilled = _drilled(arguments.drills, variants) if arguments.drills is not None else {}
    if arguments.json:
        print(_comparison_json(variants, recommendation, drilled))
    else:
        table = draw_comparison(variants, recommendation, drilled, _colour(), _width())
        print("\n\n".join(part for part in (preface, table) if part))
    return 0 if recommendation.variant is not None else PlanError.exit_code


def _machine(arguments: argparse.Namespace) -> tuple[Machine, str]:
    """The machine to plan for, and what is to be said of its reservation first."""
    machine = _described(arguments.machine) if arguments.machine is not None else read_machine()
    if arguments.crashkernel is None:
        return machine, ""
    # the kernel finds the word inside others too
    others = [word for word in machine.cmdline.split() if WORD not in word]
    reservation = reserve(machine, " ".join([*others, f"{WORD}{arguments.crashkernel}"]))
    if reservation.range is None:
        why = "; ".join((*reservation.reasons, *(f"{r.range}: {r.why}" for r in reservation.refused if r.hit)))
        raise PlanError(f"crashkernel={arguments.crashkernel} would reserve nothing: {why}", hint="choose another SPEC")
    # a plan leaves out by itself what is refused of a region; what K1 cuts off later it does not know of
    cut = RangeSet([reservation.range]) - reservation.usable - RangeSet(refusal.range for refusal in reservation.refused)
    if cut:
        raise PlanError(
            f"with crashkernel={arguments.crashkernel} K1 would cut off {cut} of the region: {reservation.reasons[-1]}",
            hint="choose another SPEC, or take mem= off K1's command line",
        )
    if not reservation.boots:
        why = reservation.reasons[-1]
        raise PlanError(f"with crashkernel={arguments.crashkernel} K1 would not boot: {why}", hint="choose another SPEC")
    return machine.booted_with(reservation.range), draw_reservation(arguments.crashkernel, reservation, _width())


def _described(path: Path) -> Machine:
    data = read(path)
    if data.startswith(_FDT_MAGIC):
        return machine_from_tree(DeviceTree.from_bytes(data, str(path)).root, source=str(path))
    return machine_from_description(data.decode("utf-8", "replace"), str(path))


def _drilled(path: Path, variants: tuple[Variant, ...]) -> dict[str, str]:
    """How many drills of each variant passed, of the results in `path`; what was not drilled is left out."""
    results: dict[str, list[bool]] = {}
    try:
        for drill in json.loads(read(path))["drills"]:
            if (variant := _drilled_as(drill, variants)) is not None:
                results.setdefault(variant.name, []).append(drill["verdict"] == "PASS")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            "not the results of drills", source=str(path), hint="write them with `crashkernel drill --json FILE`"
        ) from error
    return {name: f"{sum(passed)} of {len(passed)} pass" for name, passed in results.items()}


def _drilled_as(drill: dict[str, object], variants: tuple[Variant, ...]) -> Variant | None:
    """The variant that a drill's record is of. Records from before there was a quarantine do not name it: it had none."""
    placement = drill["placement"]
    quarantine = placement == "zero" and drill.get("quarantine") is True
    _, word, spec = str(drill.get("machine", "")).rpartition(WORD)
    boots = {variant.boot for variant in variants if variant.boot and variant.placement == placement}
    boot = word + spec if word + spec in boots else ""
    for variant in variants:
        if (variant.placement, variant.quarantine, variant.boot) == (placement, quarantine, boot):
            return variant
    return None


def _comparison_json(variants: tuple[Variant, ...], recommendation: Recommendation, drilled: Mapping[str, str]) -> str:
    return json.dumps(
        {
            "variants": [
                {
                    "name": variant.name,
                    "placement": variant.placement,
                    "idea": variant.idea,
                    "boot": variant.boot,
                    "obstacle": variant.obstacle,
                    "verdicts": dict(variant.verdicts),
                    "cost": {name: getattr(variant.cost, name) for name in variant.cost.__dataclass_fields__}
                    if variant.cost
                    else None,
                    "plan": json.loads(variant.plan.to_json()) if variant.plan else None,
                    "drilled": drilled.get(variant.name, ""),
                }
                for variant in variants
            ],
            "recommended": recommendation.variant.name if recommendation.variant else None,
            "reasons": list(recommendation.reasons),
        },
        indent=1,
    )


def _colour() -> bool:
    # no-color.org: any value that is not empty
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _width() -> int:
    """Columns to draw in: those of the terminal, within reason; 80 where there is none."""
    return min(max(shutil.get_terminal_size((80, 24)).columns, 60), 120) if sys.stdout.isatty() else 80
