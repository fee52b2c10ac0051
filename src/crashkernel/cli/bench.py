"""bench: what is measured, and the purgatory alone on thousands of plans. With QEMU and this package's `drill` extra."""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crashkernel.bench.cpus import BARE
from crashkernel.cli import faults, twin
from crashkernel.cli.command import add_command
from crashkernel.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from crashkernel.bench.plans import CaseName
    from crashkernel.bench.series import Result, Series

_DEFAULT_CASES = 100

_PURGATORY_EPILOG = """examples:
  crashkernel bench purgatory                          about a minute
  crashkernel bench purgatory --cases 2000 --cpu POWER9
  crashkernel bench purgatory --seed 7 --case POWER9-LE-zero-17

The shipped bytes, packed with generated plans of every placement and with random tables, run alone on
emulated CPUs: entered as K1 enters them, in both byte orders (the 970fx is big-endian only), to K2's first
instruction. All of memory, K2's registers and the other CPUs are held against a model.

exit status: 0 every case passed, 1 one failed, 2 usage, 3 this machine lacks something
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench` and what it has."""
    bench = add_command(
        commands,
        "bench",
        "the purgatory alone on thousands of plans; drills measured",
        "examples:\n  crashkernel bench drill --runs 5\n  crashkernel bench purgatory --cpu POWER9",
        description="Benches: parts of the product alone, or measured.",
    )

    def list_benches(_arguments: argparse.Namespace) -> int:
        bench.print_help()
        return 0

    bench.set_defaults(run=list_benches)
    benches = bench.add_subparsers(title="benches", metavar="BENCH")
    twin.add_bench(benches)
    purgatory = add_command(
        benches,
        "purgatory",
        "run the purgatory alone on generated plans and check all of memory",
        _PURGATORY_EPILOG,
        description="Run the shipped purgatory alone on emulated CPUs, on generated plans, and check all of memory.",
    )
    purgatory.add_argument("--seed", type=int, metavar="N", help="of the generated plans (default: a new one, printed)")
    purgatory.add_argument(
        "--cases",
        type=int,
        default=_DEFAULT_CASES,
        metavar="N",
        help="plans of each kind, for each CPU and byte order (default: %(default)s)",
    )
    purgatory.add_argument("--cpu", action="append", choices=BARE, help="repeatable (default: all)")
    purgatory.add_argument("--case", metavar="NAME", help="run one case of --seed, and show its table")
    purgatory.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    purgatory.set_defaults(run=_purgatory)
    faults.add_benches(benches)


def _purgatory(arguments: argparse.Namespace) -> int:
    twin.require_extra("numpy", "rich")
    from rich.console import Console  # noqa: PLC0415

    from crashkernel.bench.plans import CaseName  # noqa: PLC0415
    from crashkernel.bench.series import Series  # noqa: PLC0415

    if arguments.cases < 1:
        raise UsageError("--cases must be at least 1")
    if arguments.json is not None:
        twin.require_writable(arguments.json)
    console = Console(highlight=False, soft_wrap=True)
    if arguments.case is not None:
        if arguments.seed is None:
            raise UsageError("--case is one of a --seed")
        return _one(CaseName.parse(arguments.case), arguments.seed, console)
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed  # noqa: S311  (not for secrets)
    series = Series.of(seed, dict.fromkeys(arguments.cpu or BARE), arguments.cases)
    started = time.monotonic()
    with twin.terminable():
        _run(series, console)
    console.print(_table(series))
    for failure in series.failures:
        console.print(f"failed: {series.command(failure.name)}", style="bold red", markup=False)
    run, passed = len(list(series.results)), sum(cell.passed for cell in series.cells)
    console.print(f"seed {seed}: {passed:,} of {run:,} cases passed in {time.monotonic() - started:.0f} s")
    if run < (wanted := sum(cell.cases for cell in series.cells)):
        console.print(f"{wanted - run:,} were not run, after {len(series.failures)} failures", style="bold red")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(series.record(), indent=1) + "\n")
    return 0 if series.passed else 1


def _run(series: Series, console: Console) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"seed {series.seed}", total=sum(cell.cases for cell in series.cells))

        def tell(result: Result) -> None:
            name = result.name
            progress.update(task, advance=1, description=f"{name.cpu} {'LE' if name.little else 'BE'} {name.kind}")
            if result.problems:
                _show(name, series.seed, result.problems, console)

        series.run(tell)


def _one(name: CaseName, seed: int, console: Console) -> int:
    from crashkernel.bench.series import run_cases  # noqa: PLC0415

    with twin.terminable():
        (result,) = run_cases(seed, [name])
    _show(name, seed, result.problems, console)
    return 1 if result.problems else 0


def _show(name: CaseName, seed: int, problems: tuple[str, ...], console: Console) -> None:
    """One case: its table, where everything lies, and what is wrong."""
    from crashkernel.placement.plan import describe_move  # noqa: PLC0415

    case = name.generate(seed)
    console.print(f"{name}: {'FAIL' if problems else 'PASS'}", style="bold red" if problems else "bold green", markup=False)
    console.print(
        f"  purgatory {case.base:#x}, tree {case.tree:#x}, K2 waits at {case.k2_at:#x} and is entered at {case.entry:#x}; "
        f"CPUs {', '.join(f'{physical:#x}' for physical in case.ids)} come, {case.slaves} others expected, "
        f"AltiVec {'on' if case.altivec else 'off'}",
        markup=False,
    )
    for number, move in enumerate(case.moves, 1):
        console.print(f"  {number:2} {describe_move(move)}", markup=False)
    for problem in problems:
        console.print(f"  wrong: {problem}", markup=False)


def _table(series: Series) -> Any:
    from rich.table import Table  # noqa: PLC0415

    table = Table()
    for title in ("CPU", "K1", "plans"):
        table.add_column(title)
    for title in ("cases", "passed", "ms a case"):
        table.add_column(title, justify="right")
    for cell in series.cells:
        style = "" if cell.passed == cell.cases else "bold red"
        order = "LE" if cell.little else "BE"
        figures = (str(len(cell.results)), str(cell.passed), f"{cell.milliseconds:.1f}")
        table.add_row(cell.cpu, order, cell.kind, *figures, style=style)
    return table
