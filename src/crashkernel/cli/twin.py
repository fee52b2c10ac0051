"""drill, describe-twin, matrix, bench drill, big-endian: for the engineer's machine, with QEMU and the `drill` extra."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from crashkernel.cli.command import add_command, write
from crashkernel.drill.dma import REGIONS, WHENS, Dma, report_lines
from crashkernel.drill.saving import CODECS, DESTINATIONS, Saving
from crashkernel.drill.twin import CPUS, MACHINES, MMUS, Twin
from crashkernel.errors import CrashkernelError, EnvironmentFault, StageFailed, UsageError
from crashkernel.memory import format_size, parse_size
from crashkernel.placement.image import KernelImage
from crashkernel.placement.plan import DAMAGE_POLICIES, PLACEMENTS, PlacementName

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from crashkernel.drill.debian import Kernel
    from crashkernel.drill.dma import DmaReport
    from crashkernel.drill.guest import Userland
    from crashkernel.drill.saving import Footprint
    from crashkernel.drill.scenario import Outcome, Scenario, Stage
    from crashkernel.drill.verdict import Verdict

_GOAL = 1.5  # times the bare twin, at 2 GiB

_DRILL_EPILOG = """examples:
  crashkernel drill                                 Debian 12's kernel, both placements
  crashkernel drill --placement zero --keep out     keep the dump and the evidence in out/
  crashkernel drill --kernel debian:trixie debian:trixie/powerpc64le-64k debian:sid
  crashkernel drill --kernel big-endian             a big-endian kernel, after `make big-endian`
  crashkernel drill --kernel ./vmlinux              your own kernel; modules in ../lib/modules/RELEASE
  crashkernel drill --cpu POWER8 --smp 2 --memory 4G --crashkernel 256M@128M
  crashkernel drill --flip initrd                   is a damaged initramfs noticed at the panic?
  crashkernel drill --dma init,data                 and if a device goes on writing when K1 is dead?
  crashkernel drill --dma init --no-quarantine      the same, into pages that a load takes away from K1
  crashkernel drill --capture 31                    K2 runs `crashkernel capture` in place of a raw copy
  crashkernel drill --capture 31 --capture-to network --crashkernel 256M
  crashkernel drill --judge out                     judge a kept drill once more

A drill boots K1 in QEMU, loads K2 with `crashkernel load`, crashes K1, stops the twin at the purgatory's
first instruction to copy its memory from outside, lets K2 save /proc/vmcore, and compares every byte of
K1's memory. The first run downloads Debian packages (about 60 MB a kernel) and keeps them.

With --dma the host writes into the twin's memory like a device that nobody stopped, into K1's
  text, data    some pages of K1's static image          image     K2's image where it waits
  init, slack   pages that K1 gave out to a driver,      reserved  anywhere in the reserved region
                of its freed init, behind its image      memory    pages of K1 anywhere
What differs in the device's own buffers is counted apart; all else must be right.

With --capture each page of K1's memory must be in the dump with the right bytes, or be of a class that the level
leaves out: the drill decides that from K1's memory as it was, with none of capture's code.

exit status: 0 every drill passed, 1 one failed, 2 usage, 3 this machine lacks something
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add drill, describe-twin, matrix and big-endian to the parser."""
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
        default=["debian:bookworm"],
        metavar="KERNEL",
        help="debian:SUITE[/FLAVOUR], big-endian or the path of a vmlinux, as K1 and K2 (default: debian:bookworm)",
    )
    _add_twin(drill)
    drill.add_argument("--all-cpus", action="store_true", help="K2 starts every CPU (default: only the one that crashed)")
    drill.add_argument(
        "--flip",
        choices=("kernel", "initrd", "fdt", "elfcorehdr", "purgatory"),
        help="flip one bit, anywhere in this (of the purgatory: in its parameters and tables), once K1 is dead: passes if the "
        "purgatory says so on the console",
    )
    drill.add_argument(
        "--on-damage", choices=DAMAGE_POLICIES, default="reboot", help="then, as for `crashkernel load` (default: %(default)s)"
    )
    drill.add_argument(
        "--dma", metavar="REGION,...", help=f"a device goes on writing there when K1 is dead: {', '.join(REGIONS)}"
    )
    drill.add_argument("--dma-rate", type=int, metavar="N", help="writes a second (default: 1000)")
    drill.add_argument("--dma-when", choices=WHENS, help="during the handover, K2's life, or both (default: both)")
    drill.add_argument("--seed", type=int, metavar="N", help="of the device's targets and writes (default: 0)")
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
    describe.add_argument("--kernel", default="debian:bookworm", metavar="KERNEL", help="K1 (default: %(default)s)")
    _add_twin(describe)
    describe.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    describe.set_defaults(run=_describe_twin)

    matrix = add_command(
        commands,
        "matrix",
        "drill every supported machine and kernel, both placements",
        "example:\n  crashkernel matrix --update README.md --json matrix.json",
        description="Drill every supported machine and kernel, both placements, and print the table (20 minutes).",
    )
    matrix.add_argument("--update", type=Path, metavar="FILE", help="put the table between the matrix markers of this document")
    matrix.add_argument("--json", type=Path, metavar="FILE", help="write all results as JSON")
    matrix.set_defaults(run=_matrix)

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
    bench.add_argument("--kernel", default="debian:bookworm", metavar="KERNEL", help="default: %(default)s")
    bench.add_argument("--runs", type=int, default=3, metavar="N", help="rounds of bare, zero, reserved (default: %(default)s)")
    _add_twin(bench)
    bench.set_defaults(run=_bench)


def _add_twin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machine", choices=MACHINES, default="pseries", help="default: %(default)s")
    parser.add_argument("--cpu", choices=CPUS, help="default: POWER9, or the machine's own")
    parser.add_argument("--mmu", choices=MMUS, help="default: radix, hash on POWER8")
    parser.add_argument("--smp", type=int, default=1, metavar="N", help="CPUs (default: %(default)s)")
    parser.add_argument("--memory", default="2G", metavar="SIZE", help="default: %(default)s")
    parser.add_argument("--crashkernel", default="512M", metavar="SPEC", help="K1's crashkernel= option (default: %(default)s)")


def _drill(arguments: argparse.Namespace) -> int:
    if arguments.judge is not None:
        return _judge(arguments.judge)
    twin = _twin(arguments)
    from crashkernel.drill.scenario import Scenario, require_keepable  # noqa: PLC0415

    if arguments.json is not None and str(arguments.json) != "-":
        require_writable(arguments.json)
    if arguments.keep is not None:
        require_keepable(arguments.keep)
    dma, saving = _dma(arguments), _saving(arguments)
    placements = PLACEMENTS if arguments.placement == "both" else (cast("PlacementName", arguments.placement),)
    display = _Display(to_stderr=str(arguments.json) == "-")
    with terminable():
        prepared = _prepare(arguments.kernel, display, capture=saving is not None)
        outcomes = []
        for kernel, userland in prepared:
            display.title(f"{kernel.name} on {twin.title}")
            for placement in placements:
                keep = arguments.keep
                if keep is not None:
                    keep = keep / kernel.name / placement if len(prepared) > 1 else keep / placement
                    require_keepable(keep)
                scenario = Scenario(
                    twin, kernel, kernel, placement, keep,
                    all_cpus=arguments.all_cpus, flip=arguments.flip, on_damage=arguments.on_damage,
                    dma=dma, quarantine=not arguments.no_quarantine, saving=saving,
                )  # fmt: skip
                outcomes.append(_run(scenario, userland, display))
    _write_json(arguments.json, outcomes)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _dma(arguments: argparse.Namespace) -> Dma | None:
    given = {
        name: value
        for name, value in (("rate", arguments.dma_rate), ("when", arguments.dma_when), ("seed", arguments.seed))
        if value is not None
    }
    if arguments.dma is None:
        if given:
            raise UsageError("--dma-rate, --dma-when and --seed say how a device writes, not where", hint="add --dma REGION")
        return None
    if arguments.flip is not None:
        raise UsageError("--dma and --flip both damage memory: what was seen would tell of neither", hint="give one of them")
    return Dma(tuple(dict.fromkeys(name.strip() for name in arguments.dma.split(",") if name.strip())), **given)


def _saving(arguments: argparse.Namespace) -> Saving | None:
    given = {name: value for name, value in (("codec", arguments.capture_codec), ("to", arguments.capture_to)) if value}
    if arguments.capture is None:
        if given:
            raise UsageError("--capture-codec and --capture-to say how `crashkernel capture` saves", hint="add --capture LEVEL")
        return None
    if arguments.flip is not None:
        raise UsageError("with --flip there is no dump to capture", hint="leave --capture out")
    return Saving(arguments.capture, **given)


def _describe_twin(arguments: argparse.Namespace) -> int:
    require_extra("numpy", "qemu", "rich")
    from crashkernel.drill.scenario import describe_twin  # noqa: PLC0415

    twin = _twin(arguments)
    display = _Display(to_stderr=True)
    with terminable():
        ((kernel, userland),) = _prepare([arguments.kernel], display)
        display.title(f"{kernel.name} on {twin.title}")
        with display.drill("describe") as tell:
            text = describe_twin(twin, kernel, userland, tell)
    if arguments.out is None:
        print(text, end="")
    else:
        write(arguments.out, text, "--out")
    return 0


def _judge(directory: Path) -> int:
    require_extra("numpy", "qemu", "rich")
    from crashkernel.drill.record import judge_kept  # noqa: PLC0415

    display = _Display()
    verdict = judge_kept(directory)
    display.line("PASS" if verdict.passed else "FAIL", style="bold green" if verdict.passed else "bold red")
    display.verdict(verdict)
    return 0 if verdict.passed else 1


def _matrix(arguments: argparse.Namespace) -> int:
    require_extra("numpy", "qemu", "rich")
    from crashkernel.drill.matrix import CASES, markdown_row, markdown_table, result_cell, update_document  # noqa: PLC0415
    from crashkernel.drill.scenario import Scenario  # noqa: PLC0415

    display = _Display()
    rows: list[str] = []
    outcomes: list[Outcome] = []
    complete = True
    with terminable():
        for number, case in enumerate(CASES, 1):
            twin, release = case.twin, case.kernel
            try:
                ((kernel, userland),) = _prepare([case.kernel], display)
                span = KernelImage.from_bytes(kernel.vmlinux.read_bytes(), str(kernel.vmlinux)).span
                twin, release = case.resolved(span), kernel.name
                display.title(f"{number} of {len(CASES)}: {release} on {twin.title}")
                scenarios = [Scenario(twin, kernel, kernel, placement, all_cpus=case.all_cpus) for placement in PLACEMENTS]
                results = [_run(scenario, userland, display) for scenario in scenarios]
                cells = [result_cell(outcome) for outcome in results]
                outcomes += results
            except CrashkernelError as error:  # one kernel that cannot be had does not cost the others
                complete = False
                cells = [f"not run: {error.message}"] * len(PLACEMENTS)
                display.line(f"not run: {error}", style="bold red")
            rows.append(markdown_row(twin, release, cells, all_cpus=case.all_cpus))
            _write_json(arguments.json, outcomes)
    table = markdown_table(rows)
    print(table)
    if arguments.update is not None:
        update_document(arguments.update, table)
    return 0 if complete and all(outcome.passed for outcome in outcomes) else 1


def _bench(arguments: argparse.Namespace) -> int:
    require_extra("numpy", "qemu", "rich")
    from crashkernel.drill.scenario import Scenario, run_bare  # noqa: PLC0415

    if arguments.runs < 1:
        raise UsageError("--runs must be at least 1")
    twin = _twin(arguments)
    display = _Display()
    ratios: dict[PlacementName, list[float]] = {placement: [] for placement in PLACEMENTS}
    with terminable():
        ((kernel, userland),) = _prepare([arguments.kernel], display, kexec_tools=True)
        display.title(f"{kernel.name} on {twin.title}")
        for _ in range(arguments.runs):
            with display.drill("bare twin, kexec-tools") as tell:
                bare = run_bare(twin, kernel, userland, tell)
            if bare.failure is not None:
                raise bare.failure
            display.line(f"bare twin, kexec-tools: {bare.seconds:.1f} s")
            for placement in PLACEMENTS:
                outcome = _run(Scenario(twin, kernel, kernel, placement), userland, display)
                if not outcome.passed:
                    raise StageFailed("bench", f"the {placement} drill failed, so its time means nothing")
                ratios[placement].append(outcome.seconds / bare.seconds)
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

    display = _Display()
    with terminable(), display.busy("big-endian") as tell:
        bigendian.build(progress=tell)
    display.line("the big-endian kernel is ready: crashkernel drill --kernel big-endian")
    return 0


def _run(scenario: Scenario, userland: Userland, display: _Display) -> Outcome:
    from crashkernel.drill.scenario import run_drill  # noqa: PLC0415

    with display.drill(scenario.placement) as tell:
        outcome = run_drill(scenario, userland, tell)
    display.outcome(outcome)
    return outcome


def _twin(arguments: argparse.Namespace) -> Twin:
    require_extra("numpy", "qemu", "rich")
    own_cpu = {"powernv9": "POWER9", "powernv10": "POWER10"}
    cpu = arguments.cpu or own_cpu.get(arguments.machine, "POWER9")
    mmu = arguments.mmu or ("hash" if cpu == "POWER8" else "radix")
    return Twin(arguments.machine, cpu, mmu, arguments.smp, parse_size(arguments.memory), arguments.crashkernel)


def _prepare(
    specs: list[str], display: _Display, *, kexec_tools: bool = False, capture: bool = False
) -> list[tuple[Kernel, Userland]]:
    """The kernels, each with the programs it can run."""
    from crashkernel.drill import bigendian  # noqa: PLC0415
    from crashkernel.drill.debian import resolve_kernel  # noqa: PLC0415
    from crashkernel.drill.qemu import QEMU  # noqa: PLC0415

    if shutil.which(QEMU) is None:
        raise EnvironmentFault(f"{QEMU} is not installed", hint="apt-get install qemu-system-ppc")
    with display.busy("packages") as tell:
        kernels = [bigendian.find_kernel() if spec == bigendian.SPEC else resolve_kernel(spec, progress=tell) for spec in specs]
        return [(kernel, _userland(kernel, tell, kexec_tools=kexec_tools, capture=capture)) for kernel in kernels]


def _userland(kernel: Kernel, tell: Callable[[str], None], *, kexec_tools: bool, capture: bool) -> Userland:
    from crashkernel.drill import bigendian  # noqa: PLC0415
    from crashkernel.drill.guest import fetch_userland  # noqa: PLC0415

    if kernel.byteorder == "little":
        return fetch_userland(progress=tell, kexec_tools=kexec_tools, capture=capture)
    if capture:
        raise UsageError(f"{kernel.name} is big-endian, and Debian has no numpy for it: it saves raw copies only")
    if kexec_tools:
        raise UsageError(f"{kernel.name} is big-endian, and Debian has no kexec-tools for it to be measured against")
    return bigendian.find_userland()


def require_extra(*names: str) -> None:
    """Refuse with what to install, if one of these packages is not there."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentFault(f"this command needs {', '.join(missing)}", hint="pip install 'crashkernel[drill]'")


def require_writable(path: Path) -> None:
    """Refuse a path for results that cannot be written: before the drill, not after it."""
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise UsageError(f"cannot write {path}", hint="give the name of a file in an existing directory")


def _write_json(path: Path | None, outcomes: list[Outcome]) -> None:
    from crashkernel.drill.record import outcome_record  # noqa: PLC0415

    if path is None:
        return
    record: dict[str, Any] = {
        "verdict": "PASS" if all(outcome.passed for outcome in outcomes) else "FAIL",
        "drills": [outcome_record(outcome) for outcome in outcomes],
    }
    text = json.dumps(record, indent=1)
    if str(path) == "-":
        print(text)
        return
    try:
        temporary = path.with_name(path.name + ".new")
        temporary.write_text(text + "\n")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP end a drill like Ctrl-C does: QEMU and the working directory go with it."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Display:
    """Live progress on a terminal, plain lines elsewhere; a line stays for each stage that is done."""

    def __init__(self, *, to_stderr: bool = False) -> None:
        from rich.console import Console  # noqa: PLC0415

        self._console: Console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)

    def line(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False)

    def title(self, text: str) -> None:
        self.line(text, style="bold")

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[Any]:
        """A spinner that shows the last message; elsewhere each message is a line."""
        if self._console.is_terminal:
            with self._console.status(what) as status:
                yield lambda text: status.update(f"{what}: {text}")
        else:
            yield lambda text: self.line(f"{what}: {text}")

    @contextlib.contextmanager
    def drill(self, name: str) -> Iterator[Any]:
        """A listener for `run_drill`."""
        with contextlib.ExitStack() as stack:
            status = stack.enter_context(self._console.status(f"{name}: images")) if self._console.is_terminal else None
            progress = _Progress(self, name, status)
            try:
                yield progress
            finally:
                progress.close()

    def outcome(self, outcome: Outcome) -> None:
        """The report of one drill."""
        placement = outcome.scenario.placement + ("" if outcome.scenario.quarantine else ", no quarantine")
        failure = outcome.failure
        if outcome.passed:
            self.line(f"{placement}: PASS in {outcome.seconds:.1f} s", style="bold green")
        else:
            self.line(f"{placement}: FAIL after {outcome.seconds:.1f} s", style="bold red")
        if failure is not None:
            self.line(f"  {failure.message}")
            if failure.hint:
                self.line(f"  likely cause: {failure.hint}")
            for text in failure.console[-12:]:
                self.line(f"  console | {text}", style="dim")
        if outcome.told is not None:
            self.line(f"  a bit of the {outcome.scenario.flip} was flipped; the purgatory said")
            self.line(f"  console | {outcome.told}", style="dim")
        if outcome.verdict is not None:
            self.verdict(outcome.verdict)
        if outcome.footprint.total:
            self.footprint(outcome.footprint)
        if outcome.dma is not None:
            self.dma(outcome.dma)
        if outcome.dump is not None:
            self.line(f"  kept in {outcome.dump.parent}")

    def dma(self, report: DmaReport) -> None:
        """What the rogue device did."""
        for line in report_lines(report):
            self.line(f"  dma: {line}")

    def footprint(self, footprint: Footprint) -> None:
        """What the capture took of K2's memory."""
        before, least, total, peak, child = (
            format_size(each)
            for each in (
                *(footprint.available, footprint.least, footprint.total),
                *(footprint.peak, footprint.peak_of_child),
            )
        )
        self.line(f"  K2's memory: {before} of {total} available, while capturing {least}; resident {peak}, a worker {child}")

    def verdict(self, verdict: Verdict) -> None:
        """The evidence."""
        self.line(
            f"  {verdict.bytes_compared:,} of {verdict.k1_bytes:,} bytes of K1's memory compared: "
            f"{verdict.bytes_wrong:,} wrong, {verdict.bytes_missing:,} missing"
        )
        if pages := verdict.pages:
            out = ", ".join(f"{count:,} {name}" for name, count in pages.left_out.items()) or "nothing"
            self.line(
                f"  level {pages.level}: {pages.kept:,} pages of {format_size(pages.page_size)} in "
                f"{format_size(pages.dump_bytes)}, {pages.zeros:,} of them zeros; left out {out}; "
                f"{pages.lost:,} left out that it keeps"
            )
            if pages.needless:
                self.line(f"  needless: {pages.needless:,} pages are kept that level {pages.level} drops", style="bold yellow")
        marks = {
            "K1's first 256 bytes": verdict.first_256_bytes_ok,
            "nonce": verdict.nonce_found,
            "panic message": verdict.panic_found,
            "registers": verdict.registers_ok,
        }
        self.line("  of this crash: " + ", ".join(f"{name} {'ok' if ok else 'WRONG'}" for name, ok in marks.items()))
        for wrong in verdict.wrong_ranges:
            self.line(
                f"  wrong: {wrong.range}, {wrong.wrong:,} bytes: {wrong.what}" + (f" ({wrong.note})" if wrong.note else "")
            )
        if verdict.bytes_in_device_buffers:
            self.line(f"  in the device's own buffers, as on any machine: {verdict.bytes_in_device_buffers:,} bytes differ")
        for problem in verdict.problems:
            self.line(f"  problem: {problem}")
        for what, changed in Counter(
            e.what.partition(",")[0] if e.what.startswith("VPA") else e.what for e in verdict.exempt
        ).items():
            places = f"{changed} place{'s' * (changed != 1)}"
            self.line(f"  written by firmware after the truth was taken, not counted: {what}, {places}", style="dim")


class _Progress:
    """The listener: a line for every stage that is done, the present one in the status line."""

    def __init__(self, display: _Display, name: str, status: Status | None) -> None:
        self._display = display
        self._name = name
        self._status = status
        self._stage: Stage | None = None
        self._since = 0.0

    def __call__(self, stage: Stage, text: str) -> None:
        if not text:
            self.close()
            self._stage, self._since = stage, time.monotonic()
        if self._status is not None:
            self._status.update(f"{self._name}: {stage.name}" + (f", {text}" if text else ""))

    def close(self) -> None:
        if self._stage is not None:
            self._display.line(f"  {self._name:<9} {self._stage.name:<9} {time.monotonic() - self._since:6.1f} s")
            self._stage = None
