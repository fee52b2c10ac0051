"""bench: what is measured, the purgatory alone on thousands of plans, and capture beside makedumpfile.

With QEMU and this package's `drill` extra.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crashkernel.bench.cpus import BARE
from crashkernel.cli import faults, twin
from crashkernel.cli.command import add_command
from crashkernel.cli.display import require_extra, require_writable, terminable
from crashkernel.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from crashkernel.bench.capture import Results, Speed
    from crashkernel.bench.contest import Ratio
    from crashkernel.bench.plans import CaseName
    from crashkernel.bench.series import Result, Series

_DEFAULT_CASES = 100
_DEFAULT_ROUNDS, _QUICK_ROUNDS = 5, 2
_TABLE_WIDTH = 160  # columns, where no terminal says how many it has

_PURGATORY_EPILOG = """examples:
  crashkernel bench purgatory                          about a minute
  crashkernel bench purgatory --cases 2000 --cpu POWER9
  crashkernel bench purgatory --seed 7 --case POWER9-LE-zero-17

The shipped bytes, packed with generated plans of every placement and with random tables, run alone on
emulated CPUs: entered as K1 enters them, in both byte orders (the 970fx is big-endian only), to K2's first
instruction. All of memory, K2's registers and the other CPUs are held against a model.

exit status: 0 every case passed, 1 one failed, 2 usage, 3 this machine lacks something
"""

_CAPTURE_EPILOG = """examples:
  crashkernel bench capture                a good half hour, and a minute more the first time
  crashkernel bench capture --quick        some minutes
  crashkernel bench capture --runs 9 --json capture.json

On a real vmcore of 4 GiB, made once (a Debian kernel that dies in QEMU), whole processes in turn: our capture and Debian's
makedumpfile, its stable and its newest build, for each codec. makedumpfile's best setting is looked for first, and among those
that come near it settled in the rounds. Then the pages both select at every level, and every byte of every kept page, are held
against each other and the vmcore; at last one pass of both filters over a machine of 64 and one of 256 GiB, which are sparse
files, and whole captures of such: what they find and keep is held against each other too.

exit status: 0 measured, and selections, bytes and counts are right, 1 some are not, 2 usage, 3 this machine lacks something
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
    capture = add_command(
        benches,
        "capture",
        "capture beside makedumpfile: pages, bytes, time, memory",
        _CAPTURE_EPILOG,
        description="Measure capture beside Debian's makedumpfile on one real vmcore, and hold what both write against it.",
    )
    capture.add_argument(
        "--runs",
        type=int,
        metavar="N",
        help=f"rounds of each contest (default: {_DEFAULT_ROUNDS}, with --quick {_QUICK_ROUNDS})",
    )
    capture.add_argument("--quick", action="store_true", help="some levels only, and no dumps of everything")
    capture.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    capture.set_defaults(run=_capture)


def _purgatory(arguments: argparse.Namespace) -> int:
    require_extra("numpy", "rich")
    from rich.console import Console  # noqa: PLC0415

    from crashkernel.bench.plans import CaseName  # noqa: PLC0415
    from crashkernel.bench.series import Series  # noqa: PLC0415

    if arguments.cases < 1:
        raise UsageError("--cases must be at least 1")
    if arguments.json is not None:
        require_writable(arguments.json)
    console = Console(highlight=False, soft_wrap=True)
    if arguments.case is not None:
        if arguments.seed is None:
            raise UsageError("--case is one of a --seed")
        return _one(CaseName.parse(arguments.case), arguments.seed, console)
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed  # noqa: S311  (not for secrets)
    series = Series.of(seed, dict.fromkeys(arguments.cpu or BARE), arguments.cases)
    started = time.monotonic()
    with terminable():
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

    with terminable():
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


# ------------------------------------------------------------------------------------------------------------- capture


def _capture(arguments: argparse.Namespace) -> int:
    require_extra("numpy", "rich", "qemu.qmp")
    from rich.console import Console  # noqa: PLC0415

    from crashkernel.bench.capture import Bench  # noqa: PLC0415

    runs = arguments.runs if arguments.runs is not None else _QUICK_ROUNDS if arguments.quick else _DEFAULT_ROUNDS
    if runs < 1:
        raise UsageError("--runs must be at least 1")
    if arguments.json is not None:
        require_writable(arguments.json)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _TABLE_WIDTH)
    with terminable(), console.status("preparing") as status:

        def tell(message: str) -> None:
            if console.is_terminal:
                status.update(message)
            else:
                print(message, file=sys.stderr, flush=True)

        bench = Bench(runs, quick=arguments.quick, progress=tell)

        def keep() -> None:
            # after each part: the bench is long, and what was measured is worth having if it is interrupted
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(bench.results.record(), indent=1) + "\n")

        bench.run(keep)
    _show_capture(bench.results, console)
    return 0 if bench.results.right else 1


def _show_capture(results: Results, console: Console) -> None:
    from crashkernel.bench.capture import UNTRIED  # noqa: PLC0415

    console.print(f"{results.vmcore}; {', '.join(results.programs)}")
    console.print(_speeds(results))
    for speed in results.speeds:
        console.print(
            f"{speed.codec}, level {speed.level}: {_trials(speed)}; best in the rounds: {_opponent(speed.best)}", markup=False
        )
    console.print(f"not tried of makedumpfile: {UNTRIED}")
    for codec in results.unmatched:
        console.print(f"{codec}: no makedumpfile here has it; one on PATH that has would be measured")
    console.print(_memories(results))
    wrong = [each for each in results.selections if not each.comparison.same]
    console.print(
        f"selection: the same page for page in {len(results.selections) - len(wrong)} of {len(results.selections)} dumps"
    )
    for selection in wrong:
        pages = ", ".join(f"{pfn:#x}" for pfn in selection.comparison.examples)
        console.print(f"  level {selection.level}, {selection.program}: {pages} …", style="bold red")
    bad = [each for each in results.bytes if each.wrong]
    count = sum(each.pages for each in results.bytes)
    console.print(f"bytes: right in {len(results.bytes) - len(bad)} of {len(results.bytes)} dumps, {count:,} pages")
    for dump in bad:
        console.print(f"  {dump.name}, level {dump.level}: {', '.join(hex(pfn) for pfn in dump.wrong)} …", style="bold red")
    for each in results.filters:
        console.print(
            f"filter, {each.memory >> 30} GiB, {each.workers} worker{'s' if each.workers > 1 else ''}: {_ratio(each.ratio)} "
            f"of {each.program}, which has one thread, CPU time {each.cpu_ratio.median:.2f}, "
            f"{each.ours.median:.2f} s against {each.theirs.median:.2f} s; peak {each.peak.total / (1 << 20):.0f} MiB"
        )
    for check in results.filter_checks:
        console.print(
            f"filter, {check.memory >> 30} GiB, {check.workers} worker{'s' if check.workers > 1 else ''}: "
            + (
                f"not what {check.program} reports"
                if check.wrong
                else f"each class's pages are as {check.program} reports them"
            ),
            style="bold red" if check.wrong else "",
        )
        for text in check.wrong:
            console.print(f"  {text}", style="bold red", markup=False)
    for big in results.big:
        console.print(
            f"whole capture, {big.memory >> 30} GiB, {big.workers} workers: {big.ours.seconds:.1f} s against "
            f"{big.theirs.seconds:.1f} s; peak {big.peak.total / (1 << 20):.0f} MiB; "
            + ("the same pages" if big.comparison.same else "other pages are kept: ")
            + ", ".join(f"{pfn:#x}" for pfn in big.comparison.examples),
            style="" if big.comparison.same else "bold red",
        )
    if results.unmeasured:
        names = "; ".join(
            f"{each.codec}, {each.workers} worker{'s' if each.workers > 1 else ''}" for each in results.unmeasured
        )
        console.print(f"goals not measured: {names}")
    missed = "; ".join(map(str, results.missed))
    console.print(f"goals missed: {missed or 'none'}", style="yellow" if missed else "", markup=False)


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _speeds(results: Results) -> Any:
    from rich.table import Table  # noqa: PLC0415

    from crashkernel.bench.capture import WORKERS  # noqa: PLC0415

    table = Table()
    for title in ("codec", "level", "workers", "makedumpfile"):
        table.add_column(title)
    for title in ("time", "goal", "CPU time", "seconds", "theirs", "efficiency", "size"):
        table.add_column(title, justify="right")
    table.add_column("missed")
    for speed in results.speeds:
        mine, theirs = speed.sizes
        for workers in WORKERS:
            ratio, wanted = speed.ratio(workers), speed.goal(workers)
            efficiency = speed.efficiency.median if workers > 1 else None
            missed = ", ".join(each.what for each in speed.missed(workers))
            table.add_row(
                speed.codec,
                str(speed.level),
                str(workers),
                _opponent(speed.opponent(workers)),
                _ratio(ratio),
                "" if wanted is None else f"{wanted:.2f}",
                f"{speed.cpu_ratio(workers).median:.2f}",
                f"{speed.rounds.seconds(speed.names[workers]).median:.2f}",
                f"{speed.rounds.seconds(speed.opponent(workers)).median:.2f}",
                "" if efficiency is None else f"{efficiency:.2f}",
                f"{mine / 1e6:.1f} MB, {mine / theirs - 1:+.1%}",
                missed,
                style="yellow" if missed else "",
            )
    return table


def _opponent(name: str) -> str:
    """Such as "1.7.8" or "1.7.8, 2 threads", of a run's name."""
    program, _, *threads = name.removeprefix("makedumpfile ").split(", ")
    return ", ".join((program.split(" ")[0], *threads))


def _trials(speed: Speed) -> str:
    """What makedumpfile took with each setting."""
    parts = []
    for trial in speed.trials:
        setting = f"{trial.threads} threads" if trial.threads else "no threads"
        parts.append(f"{trial.program} {setting} {'too slow' if trial.seconds is None else f'{trial.seconds:.2f} s'}")
    return "; ".join(parts)


def _memories(results: Results) -> Any:
    from rich.table import Table  # noqa: PLC0415

    table = Table()
    table.add_column("peak memory, MiB")
    for title in ("with children", "without files"):
        table.add_column(title, justify="right")
    for each in results.memory:
        table.add_row(each.name, f"{each.peak.total / (1 << 20):.0f}", f"{each.peak.own / (1 << 20):.0f}")
    return table
