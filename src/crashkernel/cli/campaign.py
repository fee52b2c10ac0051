"""campaign run, show, diff, table: many drills from one file, on the engineer's machine or a cluster."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crashkernel.cli.command import add_command
from crashkernel.cli.display import require_extra, terminable
from crashkernel.memory import parse_size
from crashkernel.report.campaign import duration
from crashkernel.report.terminal import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    from crashkernel.campaign.store import Result, StoredDrill
    from crashkernel.drill.request import DrillRequest

_COLOURS = {"PASS": "bold green", "FAIL": "bold red", "ERROR": "bold magenta"}

_RUN_EPILOG = """examples:
  crashkernel campaign run campaigns/quick.toml --list      which drills, and how long they will take
  crashkernel campaign run campaigns/quick.toml             results in quick.sqlite
  crashkernel campaign run campaigns/quick.toml             again: goes on where it was stopped
  crashkernel campaign run campaigns/reach.toml --db night.sqlite --junit night.xml
  crashkernel campaign run campaigns/reach.toml --scheduler tcp://10.0.0.1:8786
  crashkernel campaign run campaigns/reach.toml --workers 4 --cpus 4 --memory 12G

docs/campaigns.md describes the file. Each drill is a process of its own, exactly the command that `campaign show` prints.
A drill waits until its CPUs and its memory are free on its host, whoever has them. A worker that dies costs nothing but
the time of its drill; whatever ends this command, the same command goes on. A cluster of your own:
`dask scheduler`, and `dask worker tcp://… --nthreads 1` once for each drill at a time, where this package and QEMU are.

exit status: 0 every drill came out as expected, 1 one did not, 2 usage, 3 one could not be run, or this machine lacks something
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add campaign to the parser."""
    campaign = add_command(
        commands,
        "campaign",
        "run many drills, and compare what came of them",
        "examples:\n  crashkernel campaign run campaigns/quick.toml\n  crashkernel campaign show quick.sqlite\n"
        "  crashkernel campaign diff before.sqlite after.sqlite",
    )
    parts = campaign.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run = add_command(parts, "run", "run the drills of a campaign file that have no result yet", _RUN_EPILOG)
    run.add_argument("file", type=Path, metavar="FILE.toml", help="the campaign")
    run.add_argument("--db", type=Path, metavar="FILE", help="where the results go (default: NAME.sqlite, of NAME.toml)")
    run.add_argument("--list", action="store_true", help="run nothing: list the drills, what they take and how long")
    run.add_argument("--scheduler", default="", metavar="ADDRESS", help="a Dask scheduler (default: workers on this machine)")
    run.add_argument("--workers", type=_count, metavar="N", help="drills at a time on this machine (default: its CPUs)")
    run.add_argument("--cpus", type=_count, metavar="N", help="CPUs of each machine, for all drills together (default: all)")
    run.add_argument("--memory", metavar="SIZE", help="memory of each machine, likewise (default: what is free)")
    run.add_argument("--retry-errors", action="store_true", help="drill again what could not be run before")
    run.add_argument("--junit", type=Path, metavar="FILE", help="write the results as JUnit XML too, for CI")
    run.add_argument("--json", action="store_true", help="print the results as JSON, when all are there")
    run.set_defaults(run=_run)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _run(arguments: argparse.Namespace) -> int:
    from crashkernel.campaign.file import load_campaign  # noqa: PLC0415

    campaign = load_campaign(arguments.file)
    db = arguments.db or Path(arguments.file.with_suffix(".sqlite").name)
    require_extra("numpy", "qemu", "rich")
    from crashkernel.campaign.run import Settings, run_campaign  # noqa: PLC0415

    settings = Settings(
        scheduler=arguments.scheduler,
        workers=arguments.workers,
        cpus=arguments.cpus,
        memory=None if arguments.memory is None else parse_size(arguments.memory),
        retry_errors=arguments.retry_errors,
    )
    progress = Progress(campaign.name, to_stderr=arguments.json)
    try:
        with terminable(), progress:
            run_campaign(campaign, db, settings, progress)
    except KeyboardInterrupt:
        again = shlex.join(["crashkernel", "campaign", "run", str(arguments.file), "--db", str(db)])
        progress.line(f"what ran is dropped, what has a result is kept; to go on: {again}")
        raise
    return _verdict(db, arguments)


def _verdict(db: Path, arguments: argparse.Namespace) -> int:
    """What the database says, as exit status and in the forms that were asked for."""
    from crashkernel.report.campaign import read_campaign  # noqa: PLC0415

    results = read_campaign(db)
    if arguments.json:
        from crashkernel.report.campaignjson import figures  # noqa: PLC0415

        print(json.dumps(figures(results), indent=1))
    else:
        print(visible(f"{results.name}: {results.headline}"))
        print(f"more: crashkernel campaign show {shlex.quote(str(db))}")
    return results.exit_status


class Progress:
    """The campaign on a terminal: what runs, what came out, the time that is left. Elsewhere a line for each result."""

    def __init__(self, name: str, *, to_stderr: bool = False) -> None:
        from rich.console import Console  # noqa: PLC0415

        from crashkernel.campaign.run import Estimate  # noqa: PLC0415

        self._name = name
        self._console: Console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._estimate = Estimate()
        self._waiting: dict[int, StoredDrill] = {}
        self._running: dict[int, _Running] = {}
        self._counts = {"PASS": 0, "FAIL": 0, "ERROR": 0}
        self._total = 0
        self._slots = 1

    def __enter__(self) -> None:
        from rich.live import Live  # noqa: PLC0415

        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, get_renderable=self._picture)
            self._live.start()

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self._console.print(text, style=style, markup=False)

    def note(self, text: str) -> None:
        """Something to know."""
        self.line(text)

    def planned(self, pending: Sequence[StoredDrill], done: Sequence[tuple[DrillRequest, str, float]], slots: int) -> None:
        """What is to be done, and what was before: request, verdict, seconds."""
        self._waiting = {drill.number: drill for drill in pending}
        self._slots, self._total = slots, len(pending) + len(done)
        for request, verdict, seconds in done:
            self._counts[verdict] += 1
            if verdict != "ERROR":
                self._estimate.learn(request, seconds)
        goes_on = f", {len(done)} of {self._total} have their result" if done else ""
        self.line(
            f"{self._name}: {len(pending)} drills, {slots} at a time{goes_on}; {duration(self._left())} or so", style="bold"
        )

    def stage(self, drill: StoredDrill, name: str, text: str) -> None:
        """What a drill is doing now."""
        self._waiting.pop(drill.number, None)
        now = time.monotonic()
        if not name or drill.number not in self._running:  # a drill may begin anew, when its worker died
            self._running[drill.number] = _Running(drill, now)
        running = self._running[drill.number]
        if name == "wait":
            running.begun = now
        running.doing = f"{name}{', ' if text else ''}{text}" if name else "begins"

    def ended(self, drill: StoredDrill, result: Result) -> None:
        """A drill has its result."""
        self._running.pop(drill.number, None)
        self._waiting.pop(drill.number, None)
        self._counts[result.verdict] += 1
        if result.verdict != "ERROR":
            self._estimate.learn(drill.request, result.seconds)
        done = sum(self._counts.values())
        known = ", as known" if drill.known and result.verdict == "FAIL" else ""
        known = known or (", though known to fail" if drill.known and result.verdict == "PASS" else "")
        self._console.print(f"{done:>4}/{self._total}  ", end="")
        self._console.print(f"{result.verdict:<5}", style=_COLOURS[result.verdict], end="")
        self.line(f" {result.seconds:5.1f} s  {drill.title}{known}")
        if result.reason:
            self.line(f"{'':11}{result.stage}: {result.reason}")

    def tick(self) -> None:
        """Time has passed."""
        if self._live is not None:
            self._live.refresh()

    def _left(self) -> float:
        now = time.monotonic()
        running = [(each.drill.request, now - each.begun) for each in self._running.values()]
        return self._estimate.left((drill.request for drill in self._waiting.values()), running, self._slots)

    def _picture(self) -> Table:
        """What is so now."""
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        counts = self._counts
        table = Table.grid(padding=(0, 2))
        table.title, table.title_justify = Text(), "left"
        table.title.append(f"{self._name}: {sum(counts.values())} of {self._total} done: ", "bold")
        for word, verdict in (("passed", "PASS"), ("failed", "FAIL"), ("not run", "ERROR")):
            style = _COLOURS[verdict] if counts[verdict] else "dim"
            table.title.append(f"{counts[verdict]} {word}", style).append(", ")
        table.title.append(f"{duration(self._left())} left" if self._total else "starting")
        for running in self._running.values():
            table.add_row(
                Text(f"{time.monotonic() - running.begun:5.0f} s"),
                Text(running.doing, "cyan", overflow="ellipsis", no_wrap=True),
                Text(running.drill.title, overflow="ellipsis", no_wrap=True),
            )
        return table


@dataclass(slots=True)
class _Running:
    drill: StoredDrill
    begun: float
    doing: str = "begins"
