"""campaign run, show, diff, table: many drills from one file, on the engineer's machine or a cluster."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from crashkernel.campaign.file import load_campaign
from crashkernel.campaign.store import read_evidence
from crashkernel.cli.command import add_command, write
from crashkernel.cli.display import require_extra, require_writable, terminable
from crashkernel.drill.budget import Share, limit
from crashkernel.drill.request import DrillRequest
from crashkernel.drill.stages import WAIT
from crashkernel.errors import UsageError
from crashkernel.memory import parse_size
from crashkernel.report.campaign import EXPECTED, duration
from crashkernel.report.results import read_campaign
from crashkernel.report.terminal import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    from crashkernel.campaign.comparison import Kind
    from crashkernel.campaign.file import Campaign
    from crashkernel.campaign.run import Settings
    from crashkernel.campaign.store import Result, StoredDrill
    from crashkernel.report.campaign import Campaign as Results
    from crashkernel.report.campaign import Drill

_CHANGES: dict[Kind, str] = {"worse": "worse", "better": "better", "changed": "otherwise changed"}
_COLOURS = {"PASS": "bold green", "FAIL": "bold red", "ERROR": "bold magenta"}

_CONSOLE_LINES = 40

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


_SHOW_EPILOG = """examples:
  crashkernel campaign show quick.sqlite
  crashkernel campaign show quick.sqlite --failed           only what did not come out as expected
  crashkernel campaign show quick.sqlite --drill 7          all that is known of one: times, reason, the console's end
  crashkernel campaign show quick.sqlite --junit quick.xml

`crashkernel report` draws the same as a matrix and as a page.

exit status: 0 every drill came out as expected, 1 one did not, 2 usage, 3 one could not be run, or was not yet
"""

_DIFF_EPILOG = """example:
  crashkernel campaign diff before.sqlite after.sqlite

Drills are the same if their options and repeats are. Worse is what passed and does not now. What passed and has no result
now, or is gone, says nothing: neither does a comparison in which no drill has a result in both.

exit status: 0 nothing got worse, 1 something did, 2 usage, 3 what passed has no result now, or nothing could be compared
"""

_TABLE_EPILOG = """examples:
  crashkernel campaign table reach.sqlite
  crashkernel campaign table reach.sqlite --update README.md    between the two markers there

What failed says FAIL, with its reason below the table.
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add campaign to the parser."""
    campaign = add_command(
        commands,
        "campaign",
        "run many drills, and compare what came of them",
        "examples:\n  crashkernel campaign run campaigns/quick.toml\n  crashkernel campaign show quick.sqlite\n"
        "  crashkernel campaign diff before.sqlite after.sqlite\n\ndocs/campaigns.md has both formats.",
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
    _add_forms(run)
    run.set_defaults(run=_run)

    show = add_command(parts, "show", "what came of a campaign, drill by drill", _SHOW_EPILOG)
    show.add_argument("database", type=Path, metavar="DB", help="the results of `crashkernel campaign run`")
    only = show.add_mutually_exclusive_group()
    only.add_argument("--failed", action="store_true", help="only what did not come out as expected")
    only.add_argument("--drill", type=_count, metavar="N", help="all that is known of one drill")
    _add_forms(show)
    show.set_defaults(run=_show)

    diff = add_command(parts, "diff", "what got better or worse between two runs of a campaign", _DIFF_EPILOG)
    diff.add_argument("before", type=Path, metavar="A", help="the database of the first")
    diff.add_argument("after", type=Path, metavar="B", help="of the second")
    diff.add_argument("--json", action="store_true", help="print it as JSON")
    diff.set_defaults(run=_diff)

    table = add_command(parts, "table", "what a campaign showed to work, as a table in Markdown", _TABLE_EPILOG)
    table.add_argument("database", type=Path, metavar="DB", help="the results of `crashkernel campaign run`")
    table.add_argument("--update", type=Path, metavar="FILE", help="put it between the markers of this document")
    table.set_defaults(run=_table)


def _add_forms(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the results as JUnit XML too, for CI")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _run(arguments: argparse.Namespace) -> int:
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
    if arguments.list:
        return _list(campaign, db, settings)
    if arguments.junit is not None:
        require_writable(arguments.junit)
    progress = Progress(campaign.name, to_stderr=arguments.json)
    try:
        with terminable(), progress:
            run_campaign(campaign, db, settings, progress)
    except KeyboardInterrupt:
        again = shlex.join(["crashkernel", "campaign", "run", str(arguments.file), "--db", str(db)])
        progress.line(f"what ran is dropped, what has a result is kept; to go on: {again}")
        raise
    results = read_campaign(db)
    _write_forms(results, arguments)
    if not arguments.json:
        print(visible(f"{results.name}: {results.headline}"))
        print(f"more: crashkernel campaign show {shlex.quote(str(db))}")
    return results.exit_status


def _list(campaign: Campaign, db: Path, settings: Settings) -> int:
    """What would be run."""
    from crashkernel.campaign.run import Estimate  # noqa: PLC0415

    estimate, done = Estimate(), {}
    if db.exists():
        results = read_campaign(db)
        done = {drill.key: drill.result.verdict for drill in results.drills if drill.result}
        for drill in results.drills:
            if drill.result and drill.result.verdict != "ERROR":
                estimate.learn(DrillRequest.from_options(drill.options), drill.result.seconds)
    pending = [drill for drill in campaign.drills if drill.key not in done]
    for number, planned in enumerate(campaign.drills, 1):
        request = planned.request
        share, seconds = request.share, estimate.seconds(request)
        known = f"  (known to fail: {planned.known})" if planned.known else ""
        told = done.get(planned.key) or f"{seconds:3.0f} s"
        print(visible(f"{number:>4}  {told:<6} {share!s:<20} {planned.title}{known}"))
    bound = limit()
    cpus = settings.cpus or bound.cpus
    memory = bound.memory if settings.memory is None else settings.memory
    slots = settings.local_workers
    seconds = estimate.left((drill.request for drill in pending), (), slots)
    print(
        visible(
            f"{campaign.name}: {len(campaign.drills)} drills, {len(done)} of them done; {duration(seconds)} or so for the "
            f"others on {Share(cpus, memory)}, {slots} at a time; a drill may take {duration(campaign.deadline)}"
        )
    )
    return 0


def _show(arguments: argparse.Namespace) -> int:
    results = read_campaign(arguments.database)
    if arguments.drill is not None:
        return _show_drill(results, arguments)
    _write_forms(results, arguments)
    if arguments.json:
        return results.exit_status
    console = _console()
    console.print(f"{results.name}: {results.headline}", style="bold")
    for fact in results.facts:
        console.print(f"  {fact}")
    for drill in results.drills:
        if not arguments.failed or _went_wrong(drill):
            _show_line(console, drill)
    return results.exit_status


def _went_wrong(drill: Drill) -> bool:
    return drill.standing not in (*EXPECTED, "missing")


def _show_line(console: Console, drill: Drill) -> None:
    result = drill.result
    word = result.verdict if result else "-"
    console.print(f"{drill.number:>5}  ", end="")
    console.print(f"{word:<5}", style=_COLOURS.get(word, "dim"), end="")
    seconds = f"{result.seconds:6.1f} s" if result else " " * 8
    console.print(f"{seconds}  {visible(drill.title)}")
    margin = " " * 12
    if drill.known:
        passed = "passed, though known to fail" if word == "PASS" else "known to fail"
        console.print(f"{margin}{passed}: {visible(drill.known)}")
    if result and result.reason:
        console.print(f"{margin}{visible(f'{result.stage}: {result.reason}')}")
    if _went_wrong(drill):
        console.print(f"{margin}{visible(drill.command)}", style="dim")


def _show_drill(results: Results, arguments: argparse.Namespace) -> int:
    drill = next((each for each in results.drills if each.number == arguments.drill), None)
    if drill is None:
        raise UsageError(f"{arguments.database} has no drill {arguments.drill}", hint=f"it has {len(results.drills)}")
    if arguments.junit is not None:
        raise UsageError("--junit is of all drills", hint="leave --drill out")
    record, console_text = read_evidence(arguments.database, drill.number)
    result = drill.result
    if arguments.json:
        told = None if result is None else asdict(result) | {"stages": dict(result.stages)}
        of_drill = {"number": drill.number, "title": drill.title, "command": drill.command, "known": drill.known or None}
        print(json.dumps({**of_drill, "result": told, "record": record, "console": console_text}, indent=1))
    else:
        console = _console()
        _show_line(console, drill)
        lines = [] if _went_wrong(drill) else [drill.command]  # else it is said already
        if result:
            kernels = " and ".join(dict.fromkeys(filter(None, (result.release, result.capture_release))))
            lines.append(f"{kernels or 'no kernel booted'}; {result.started} to {result.ended}")
            lines.append(
                f"attempt {result.attempt}, by worker {result.worker or '?'} on {result.host}; "
                f"{result.cpu_seconds:.1f} s of CPU time, {result.boot_seconds:.1f} s in both boots"
            )
            lines += [f"{name:<10} {seconds:6.1f} s" for name, seconds in result.stages]
            lines += [f"fault: {told}" for told in result.told]
        for line in lines:
            console.print(f"{'':12}{visible(line)}")
        for line in console_text.splitlines()[-_CONSOLE_LINES:]:
            console.print(f"{'':12}| {visible(line)}", style="dim")
    return replace(results, drills=(drill,)).exit_status


def _diff(arguments: argparse.Namespace) -> int:
    from crashkernel.campaign.comparison import compare_campaigns, comparison_record  # noqa: PLC0415

    comparison = compare_campaigns(read_campaign(arguments.before), read_campaign(arguments.after))
    if arguments.json:
        print(json.dumps(comparison_record(comparison), indent=1))
        return comparison.exit_status
    console = _console()
    for change in comparison.changes:
        style = {"worse": "bold red", "better": "bold green", "changed": "bold yellow"}[change.kind]
        console.print(f"{change.kind:<8}", style=style, end="")
        console.print(visible(change.after.title))
        for name, drill in (("was", change.before), ("is", change.after)):
            result = drill.result
            said = "not run yet" if result is None else result.verdict
            why = f", {result.stage}: {result.reason}" if result and result.reason else ""
            console.print(f"{'':8}{name:<4}{said}{visible(why)}")
    for name, drills in (("new", comparison.new), ("gone", comparison.gone)):
        for drill in drills:
            console.print(f"{name:<8}{drill.result.verdict if drill.result else '-':<6}{visible(drill.title)}")
    counts = [f"{len(comparison.of(kind))} {word}" for kind, word in _CHANGES.items()]
    counts += [f"{len(comparison.new)} new", f"{len(comparison.gone)} gone", f"{comparison.same} the same"]
    console.print(", ".join(counts), style="bold")
    if not comparison.compared:
        console.print("nothing could be compared: no drill has a result in both", style="bold magenta")
    elif lost := len(comparison.lost):
        console.print(
            f"{lost} of those that passed before {'has' if lost == 1 else 'have'} no result now", style="bold magenta"
        )
    if comparison.stages:
        console.print(f"median seconds of {comparison.stages[-1].drills} drills that passed in both:")
        for stage in comparison.stages:
            console.print(
                f"  {visible(stage.name):<12}{stage.before:7.1f}{stage.after:7.1f}  {stage.ratio:5.2f} times", markup=False
            )
    return comparison.exit_status


def _table(arguments: argparse.Namespace) -> int:
    from crashkernel.campaign.table import campaign_table, update_document  # noqa: PLC0415

    text = campaign_table(read_campaign(arguments.database))
    if arguments.update is None:
        print(text)
    else:
        update_document(arguments.update, text)
    return 0


def _console(*, stderr: bool = False) -> Console:
    """Where texts from files go: as they are, colours apart."""
    require_extra("rich")
    from rich.console import Console  # noqa: PLC0415

    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)


def _write_forms(results: Results, arguments: argparse.Namespace) -> None:
    if arguments.junit is not None:
        from crashkernel.campaign.junit import junit_xml  # noqa: PLC0415

        write(arguments.junit, junit_xml(results), "--junit")
    if arguments.json:
        from crashkernel.report.campaignjson import figures  # noqa: PLC0415

        print(json.dumps(figures(results), indent=1))


class Progress:
    """The campaign on a terminal: what runs, what came out, the time that is left. Elsewhere a line for each result."""

    def __init__(self, name: str, *, to_stderr: bool = False) -> None:
        from crashkernel.campaign.run import Estimate  # noqa: PLC0415

        self._name = name
        self._console = _console(stderr=to_stderr)
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
        self._console.print(text, style=style)

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
        if name == WAIT.name:
            running.begun = now
        running.doing = f"{name}{', ' if text else ''}{text}" if name else "begins"

    def ended(self, drill: StoredDrill, result: Result) -> None:
        """A drill has its result."""
        from rich.text import Text  # noqa: PLC0415

        self._running.pop(drill.number, None)
        self._waiting.pop(drill.number, None)
        self._counts[result.verdict] += 1
        if result.verdict != "ERROR":
            self._estimate.learn(drill.request, result.seconds)
        done = sum(self._counts.values())
        known = {"PASS": ", though known to fail", "FAIL": ", as known"}.get(result.verdict, "") if drill.known else ""
        # in one piece: what is drawn below comes again after each
        lines = [f" {result.seconds:5.1f} s  {drill.title}{known}"]
        lines += [f"{'':11}{result.stage}: {result.reason}"] if result.reason else []
        word = (f"{result.verdict:<5}", _COLOURS[result.verdict])
        self._console.print(Text.assemble(f"{done:>4}/{self._total}  ", word, "\n".join(lines)))

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
