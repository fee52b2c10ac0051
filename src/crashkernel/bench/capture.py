"""`capture` beside makedumpfile, on one real vmcore: the same pages, the same bytes, the time and the memory both take.

makedumpfile is Debian's, of its stable and of its newest release, and the host's own for a codec that Debian leaves out, such
as snappy. Whole processes are measured, as users run them; the vmcore is in the page cache, and the dump goes to memory. For
each codec one run of each setting (which build, how many threads) finds out which may be makedumpfile's best. One run can be
disturbed, so several settings are run in turn with ours, and what is best is settled by these rounds.
"""

from __future__ import annotations

import compileall
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

import crashkernel
from crashkernel.bench import bigcore, contest, dumps, makedumpfile, vmcore
from crashkernel.bench.contest import Contender, Measure, Peak, Ratio, Rounds, TooSlow
from crashkernel.bench.makedumpfile import Makedumpfile
from crashkernel.bench.pagecounts import FilterPass, PageCounts
from crashkernel.drill.debian import Progress, default_cache, silent

CODECS = ("zstd", "lzo", "snappy", "zlib", "none")
WORKERS = (1, 2)
THREADS = (1, 2)
LEVEL = 31
ALL = 0
"""The level of a dump of everything: six times as many pages of this vmcore, so that what a start costs weighs less."""
CODECS_OF_ALL = ("zstd", "lzo")
LEVELS = tuple(range(32))
QUICK_LEVELS = (0, 1, 2, 4, 8, 16, 23, 31)
SELECTION_CODEC = "lzo"  # the fastest that both sides have
BIG = (64 << 30, 256 << 30)
"""Bytes of the machines the filter is measured on."""

_FLAGS = {"zlib": ("-c",), "lzo": ("-l",), "snappy": ("-p",), "zstd": ("-z",), "none": ()}
UNTRIED = "--split, which leaves a dump in several files, and --cyclic-buffer"
"""What makedumpfile has besides that may change its speed, and is not tried."""

_DEADLINE = 600.0  # seconds for one run
_FINALISTS = 3  # settings of makedumpfile that are run in turn with ours, besides those without threads
_HOPELESS = 3  # times makedumpfile's own time without threads; what takes longer with them is not its best setting
_LEAST = 5.0  # seconds that a run with threads has in any case
_QUIET = 0.04  # of a section's pages may be kept for it to be repeated in a machine that is captured as a whole
_FILTERED = r"STEP \[Checking for memory holes .*\n.*STEP \[Checking for memory holes "
"""Said when makedumpfile has gone over all pages once: it begins to write then.

Its bitmap holds so many of them (128 GiB of 4 KiB pages), so it goes in cycles. Each looks for holes, then it excludes pages.
"""
_REPORTING = "16"  # message level: what it is at, and how many pages of each class there are


@dataclass(frozen=True, slots=True)
class Goal:
    """At most `ratio` of makedumpfile's time."""

    codec: str
    workers: int
    ratio: float


GOALS = (
    Goal("zstd", 1, 1.0), Goal("lzo", 1, 1.1), Goal("snappy", 1, 1.1), Goal("zlib", 1, 0.55),
    Goal("zstd", 2, 0.55), Goal("lzo", 2, 0.65), Goal("zlib", 2, 0.3),
)  # fmt: skip
EFFICIENCY_GOAL = 0.9  # of two workers, where there is a goal for their time
SIZE_GOAL = 0.02  # by which a zlib dump may be larger
FILTER_GOAL = 1.0  # of the time of makedumpfile's filter


def goal(codec: str, workers: int) -> float | None:
    """The ratio that is to be reached at `LEVEL`, where there is one."""
    return next((each.ratio for each in GOALS if (each.codec, each.workers) == (codec, workers)), None)


# --------------------------------------------------------------------------------------------------------- makedumpfile's best


def finalists(trials: Mapping[tuple[Makedumpfile, int], float | None]) -> list[tuple[Makedumpfile, int]]:
    """Settings, a program and its threads, that may be the best: all without threads, and the few that took least in trials."""
    taken = {setting: seconds for setting, seconds in trials.items() if seconds is not None}
    few = sorted(taken, key=taken.__getitem__)[:_FINALISTS]
    return [setting for setting in taken if setting in few or not setting[1]]


def fastest(rounds: Rounds, names: Sequence[str]) -> str:
    """The one with the least median."""
    return min(names, key=lambda name: rounds.seconds(name).median)


# ------------------------------------------------------------------------------------------------------------ contenders


def our_command() -> tuple[str, ...]:
    """The installed command, as users run it; the module where none lies beside this Python."""
    script = Path(sys.executable).with_name("crashkernel")
    return (str(script),) if script.is_file() else (sys.executable, "-m", "crashkernel")


def ours(core: Path, codec: str, workers: int, level: int = LEVEL) -> Contender:
    """Our capture."""

    def command(output: Path) -> Sequence[str]:
        options = ("--level", str(level), "--codec", codec, "--workers", str(workers), "--to", str(output))
        return (*our_command(), "capture", str(core), *options)

    return Contender(f"crashkernel, {codec}, {_workers(workers)}", command)


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


def theirs(program: Makedumpfile, core: Path, codec: str, threads: int = 0, level: int = LEVEL) -> Contender:
    """A makedumpfile; without ``--num-threads`` if there are no `threads`."""

    def command(output: Path) -> Sequence[str]:
        options = ("--num-threads", str(threads)) if threads else ()
        return (*program.command, *_FLAGS[codec], "-d", str(level), *options, str(core), str(output))

    return Contender(f"{program}, {codec}{f', {threads} threads' if threads else ''}", command)


def _lacking(programs: Sequence[Makedumpfile]) -> list[str]:
    """Codecs that none of them has."""
    return [codec for codec in CODECS if not any(codec in each.codecs for each in programs)]


# --------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a makedumpfile with a setting; `seconds` is None if it was hopeless."""

    program: str
    threads: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Missed:
    """A goal that was missed: `found` is what `what` is, as a part of makedumpfile's unless it is the efficiency."""

    where: str
    what: str
    found: float
    goal: float

    def __str__(self) -> str:
        digits = next((digits for digits in range(2, 6) if round(self.found, digits) != round(self.goal, digits)), 6)
        return f"{self.where}: {self.what} {self.found:.{digits}f}, not {self.goal:.2f}"


@dataclass(frozen=True, slots=True)
class Speed:
    """One codec: `plain` is makedumpfile without threads, `best` its best setting, both of the fastest build in the rounds."""

    codec: str
    rounds: Rounds
    trials: tuple[Trial, ...]
    plain: str
    best: str
    names: Mapping[int, str]  # of ours, by the number of workers
    level: int = LEVEL

    def goal(self, workers: int) -> float | None:
        """The ratio that is to be reached, where there is one."""
        return goal(self.codec, workers) if self.level == LEVEL else None

    def ratio(self, workers: int) -> Ratio:
        """Our time as a part of makedumpfile's: of plain with one worker, of its best with two."""
        return self.rounds.ratio(self.names[workers], self.opponent(workers))

    def cpu_ratio(self, workers: int) -> Ratio:
        """The same of processor time."""
        return self.rounds.cpu_ratio(self.names[workers], self.opponent(workers))

    def opponent(self, workers: int) -> str:
        """Which of makedumpfile's runs ours is held against."""
        return self.plain if workers == 1 else self.best

    @property
    def efficiency(self) -> Ratio:
        """Time of one worker, by twice the time of two."""
        return self.rounds.efficiency(self.names[1], self.names[2], 2)

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of our dump and of makedumpfile's."""
        return self.rounds.size(self.names[1]), self.rounds.size(self.plain)

    def missed(self, workers: int) -> Iterator[Missed]:
        """What is worse than its goal with so many workers: by medians, and not rounded."""
        where = f"{self.codec}, {_workers(workers)}"
        wanted = self.goal(workers)
        if wanted is None:
            return
        if (ratio := self.ratio(workers).median) > wanted:
            yield Missed(where, "time", ratio, wanted)
        if workers > 1 and (efficiency := self.efficiency.median) < EFFICIENCY_GOAL:
            yield Missed(where, "parallel efficiency", efficiency, EFFICIENCY_GOAL)
        mine, other = self.sizes
        if self.codec == "zlib" and workers == 1 and mine > other * (1 + SIZE_GOAL):
            yield Missed(where, "size", mine / other, 1 + SIZE_GOAL)


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak memory of a program."""

    name: str
    peak: Peak


@dataclass(frozen=True, slots=True)
class SelectionCheck:
    """Both selections at one level, and how many pages they keep."""

    level: int
    program: str
    kept: int
    comparison: dumps.Comparison


@dataclass(frozen=True, slots=True)
class BytesCheck:
    """Every page of a dump held against the vmcore: `wrong` are the first few page frames that differ."""

    name: str
    level: int
    pages: int
    wrong: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FilterSpeed:
    """One pass of our filter, by `workers`, over a machine of `memory` bytes; `peak` is ours.

    makedumpfile's filter has one thread, whatever ``--num-threads`` says: that is for the compression.
    """

    memory: int
    workers: int
    program: str
    ratio: Ratio
    cpu_ratio: Ratio
    ours: Ratio
    theirs: Ratio
    peak: Peak

    @property
    def missed(self) -> tuple[Missed, ...]:
        """Whether it is slower than makedumpfile's."""
        where = f"filter, {self.memory >> 30} GiB, {_workers(self.workers)}"
        return (Missed(where, "time", self.ratio.median, FILTER_GOAL),) if self.ratio.median > FILTER_GOAL else ()


@dataclass(frozen=True, slots=True)
class FilterCheck:
    """What our filter found in each timed run, held against what makedumpfile reports: `wrong` in words, and doubts.

    `counts` are makedumpfile's.
    """

    memory: int
    workers: int
    program: str
    counts: PageCounts
    wrong: tuple[str, ...]

    @classmethod
    def of(cls, memory: int, workers: int, program: str, counts: PageCounts, passes: Sequence[FilterPass]) -> FilterCheck:
        """Hold all `passes` against `counts`."""
        wrong = [said for each in passes for said in (*each.counts.differences(counts), *each.doubts)]
        return cls(memory, workers, program, counts, tuple(dict.fromkeys(wrong)))


@dataclass(frozen=True, slots=True)
class BigCapture:
    """Whole captures of a machine of `memory` bytes, of whose pages few are kept; `peak` is ours, with `workers`.

    `comparison` is that of both dumps' selections.
    """

    memory: int
    workers: int
    program: str
    ours: Measure
    theirs: Measure
    peak: Peak
    comparison: dumps.Comparison


@dataclass(slots=True)
class Results:
    """What was found so far."""

    vmcore: str = ""
    programs: tuple[str, ...] = ()
    speeds: list[Speed] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    selections: list[SelectionCheck] = field(default_factory=list)
    bytes: list[BytesCheck] = field(default_factory=list)
    filters: list[FilterSpeed] = field(default_factory=list)
    filter_checks: list[FilterCheck] = field(default_factory=list)
    big: list[BigCapture] = field(default_factory=list)

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Codecs that no makedumpfile here has."""
        return tuple(codec for codec in CODECS if codec not in {each.codec for each in self.speeds})

    @property
    def missed(self) -> tuple[Missed, ...]:
        """Every goal that was missed."""
        of_speeds = (each for speed in self.speeds for workers in WORKERS for each in speed.missed(workers))
        return (*of_speeds, *(each for speed in self.filters for each in speed.missed))

    @property
    def unmeasured(self) -> tuple[Goal, ...]:
        """Goals of codecs that no makedumpfile here has."""
        return tuple(each for each in GOALS if each.codec in self.unmatched)

    @property
    def right(self) -> bool:
        """Whether every selection, every byte and every count of a filter is as it should be."""
        comparisons = [*(each.comparison for each in self.selections), *(each.comparison for each in self.big)]
        wrong = [*(each.wrong for each in self.bytes), *(each.wrong for each in self.filter_checks)]
        return all(each.same for each in comparisons) and not any(wrong)

    def record(self) -> dict[str, object]:
        """As JSON has it; times in seconds, sizes in bytes."""
        return {
            "vmcore": self.vmcore,
            "makedumpfile": self.programs,
            "untried": UNTRIED,
            "missed": [asdict(each) for each in self.missed],
            "unmeasured": [asdict(each) for each in self.unmeasured],
            "speeds": [_speed_record(each) for each in self.speeds],
            "memory": [asdict(each) for each in self.memory],
            "selections": [asdict(each) for each in self.selections],
            "bytes": [asdict(each) for each in self.bytes],
            "filters": [asdict(each) for each in self.filters],
            "filter_checks": [asdict(each) for each in self.filter_checks],
            "big": [asdict(each) for each in self.big],
        }


def _speed_record(speed: Speed) -> dict[str, object]:
    return {
        "codec": speed.codec,
        "level": speed.level,
        "plain": speed.plain,
        "best": speed.best,
        "trials": [asdict(each) for each in speed.trials],
        "rounds": {name: [asdict(each) for each in measures] for name, measures in speed.rounds.measures.items()},
        "ratios": {workers: asdict(speed.ratio(workers)) for workers in WORKERS},
        "cpu_ratios": {workers: asdict(speed.cpu_ratio(workers)) for workers in WORKERS},
        "goals": {workers: speed.goal(workers) for workers in WORKERS},
        "missed": {workers: [each.what for each in speed.missed(workers)] for workers in WORKERS},
        "efficiency": asdict(speed.efficiency),
        "sizes": speed.sizes,
    }


# --------------------------------------------------------------------------------------------------------------- the bench


class Bench:
    """All of it, a part after the other; `results` grow. `done` is called after each part of them.

    :raise EnvironmentFault: QEMU, a package, memory or a makedumpfile is missing, or one of the programs failed.
    """

    def __init__(self, runs: int, *, quick: bool = False, cache: Path | None = None, progress: Progress = silent) -> None:
        self._runs, self._quick, self._progress = runs, quick, progress
        self._cache = cache or default_cache()
        # as installers do; who runs from a checkout with PYTHONDONTWRITEBYTECODE would compile anew in each run
        compileall.compile_dir(Path(crashkernel.__file__).parent, quiet=2)
        self._core = vmcore.provide(cache=self._cache, progress=progress)
        self._programs = self._find_programs()
        self.results = Results(str(self._core), tuple(map(str, self._programs)))

    def _find_programs(self) -> tuple[Makedumpfile, ...]:
        """Debian's; the host's own, last, if it has what they lack."""
        found = [makedumpfile.provide(suite, "amd64", self._cache, self._progress) for suite in makedumpfile.SUITES]
        own = makedumpfile.installed()
        return (*found, own) if own is not None and any(codec in own.codecs for codec in _lacking(found)) else tuple(found)

    def _with(self, codec: str) -> list[Makedumpfile]:
        """Those that have a codec; the host's own only where Debian's have not."""
        debian = self._programs[: len(makedumpfile.SUITES)]
        return [each for each in debian if codec in each.codecs] or [each for each in self._programs if codec in each.codecs]

    @property
    def _newest(self) -> Makedumpfile:
        """Debian's newest."""
        return self._programs[len(makedumpfile.SUITES) - 1]

    def run(self, done: Callable[[], None]) -> None:
        """Measure and check."""
        with self._scratch(self._core.stat().st_size) as scratch:
            self._warm(self._core)
            contests = [(codec, LEVEL) for codec in CODECS]
            contests += [] if self._quick else [(codec, ALL) for codec in CODECS_OF_ALL]
            for codec, level in contests:
                if programs := self._with(codec):
                    self.results.speeds.append(self._speed(codec, level, programs, scratch))
                    done()
            self._memory(scratch)
            done()
            self._selections(scratch, done)
            self._bytes(scratch, done)
            quiet = self._quiet_sections(scratch)
            for memory in BIG[: 1 if self._quick else None]:
                self._large(memory, quiet, scratch, done)

    @contextmanager
    def _scratch(self, core_size: int) -> Iterator[Path]:
        """A directory in memory with room for two dumps of everything; on the disk of the cache where there is none."""
        wanted = 2 * core_size
        memory = Path("/dev/shm")  # noqa: S108
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) << 10
        place = memory
        if not memory.is_dir() or min(shutil.disk_usage(memory).free, available) < wanted:
            place = self._cache
            self._progress(
                f"less than {wanted >> 30} GiB of memory are free: dumps go to {place}, and times are the disk's too"
            )
        with tempfile.TemporaryDirectory(prefix="ck-bench-", dir=place) as directory:
            yield Path(directory)

    def _warm(self, path: Path) -> None:
        """Have a file in the page cache, as far as there is memory."""
        self._progress(f"reading {path}")
        with path.open("rb") as file:
            buffer = bytearray(1 << 22)
            while file.readinto(buffer):
                pass

    # -- speed

    def _speed(self, codec: str, level: int, programs: Sequence[Makedumpfile], scratch: Path) -> Speed:
        trials: dict[tuple[Makedumpfile, int], float | None] = {}
        for program in programs:
            plain = self._try(theirs(program, self._core, codec, level=level), scratch, _DEADLINE)
            trials[program, 0] = plain
            for threads in THREADS:
                limit = max(_LEAST, _HOPELESS * (plain or _DEADLINE))
                trials[program, threads] = self._try(theirs(program, self._core, codec, threads, level), scratch, limit)
        in_turn = {setting: theirs(setting[0], self._core, codec, setting[1], level) for setting in finalists(trials)}
        mine = {workers: ours(self._core, codec, workers, level) for workers in WORKERS}
        contenders = [*mine.values(), *in_turn.values()]
        rounds = contest.hold(contenders, self._runs, lambda each: self._measure(each, scratch), self._progress)
        plain_run = fastest(rounds, [each.name for (_, threads), each in in_turn.items() if not threads])
        best = fastest(rounds, [each.name for each in in_turn.values()])
        listed = tuple(Trial(str(program), threads, seconds) for (program, threads), seconds in trials.items())
        return Speed(codec, rounds, listed, plain_run, best, {number: each.name for number, each in mine.items()}, level)

    def _try(self, contender: Contender, scratch: Path, deadline: float) -> float | None:
        self._progress(f"trying {contender.name}")
        try:
            return self._measure(contender, scratch, deadline).seconds
        except TooSlow:
            return None

    @staticmethod
    def _measure(contender: Contender, scratch: Path, deadline: float = _DEADLINE) -> Measure:
        return contest.measure(contender, scratch, deadline)

    # -- memory

    def _memory(self, scratch: Path) -> None:
        for codec in CODECS:
            mine = [ours(self._core, codec, workers) for workers in WORKERS]
            for contender in (*mine, *(theirs(program, self._core, codec) for program in self._with(codec)[-1:])):
                self._progress(f"memory of {contender.name}")
                self.results.memory.append(Memory(contender.name, contest.peak_memory(contender, scratch, _DEADLINE)))

    # -- what is kept, and its bytes

    def _selections(self, scratch: Path, done: Callable[[], None]) -> None:
        for level in QUICK_LEVELS if self._quick else LEVELS:
            self._progress(f"selection at level {level}")
            with contest.output_of(ours(self._core, SELECTION_CODEC, 2, level), scratch, _DEADLINE) as mine:
                # one after the other: two dumps of everything are what there is room for
                for program in (*self._programs[:1], self._newest) if level in (0, LEVEL) else (self._newest,):
                    other = theirs(program, self._core, SELECTION_CODEC, level=level)
                    with contest.output_of(other, scratch, _DEADLINE) as their_dump:
                        first, second = dumps.Dump(mine), dumps.Dump(their_dump)
                        comparison = dumps.compare_selections(first, second)
                        self.results.selections.append(SelectionCheck(level, str(program), int(first.kept.sum()), comparison))
            done()

    def _bytes(self, scratch: Path, done: Callable[[], None]) -> None:
        memory = dumps.Memory(self._core)
        for level in (LEVEL,) if self._quick else (LEVEL, 0):
            for codec in CODECS:
                contenders = [ours(self._core, codec, 2, level)]
                if level == LEVEL or codec == SELECTION_CODEC:
                    contenders += [theirs(program, self._core, codec, level=level) for program in self._with(codec)[-1:]]
                for contender in contenders:
                    self._progress(f"bytes of {contender.name}, level {level}")
                    with contest.output_of(contender, scratch, _DEADLINE) as output:
                        dump = dumps.Dump(output)
                        wrong = tuple(dumps.wrong_pages(dump, memory))
                        self.results.bytes.append(BytesCheck(contender.name, level, int(dump.kept.sum()), wrong))
                    done()

    # -- large machines

    def _large(self, memory: int, quiet: Sequence[int], scratch: Path, done: Callable[[], None]) -> None:
        """The filters, and whole captures, of a machine of `memory` bytes."""
        with self._grown(memory) as big:
            self._filter(memory, big, scratch)
        done()
        with self._grown(memory, quiet) as big:
            self.results.big.append(self._big(memory, big, scratch))
        done()

    @contextmanager
    def _grown(self, memory: int, sections: Sequence[int] = ()) -> Iterator[Path]:
        """On the disk: makedumpfile maps the file, and in a tmpfs a hole that is read through a mapping takes memory."""
        with tempfile.TemporaryDirectory(prefix=".big-", dir=self._cache) as directory:
            big = Path(directory) / "vmcore"
            self._progress(f"making a machine of {memory >> 30} GiB")
            bigcore.grow(self._core, big, memory, sections)
            with big.open("rb") as file:
                os.fsync(file.fileno())  # written back now, not while something is measured
            yield big

    def _quiet_sections(self, scratch: Path) -> tuple[int, ...]:
        """Sections of the vmcore of which makedumpfile keeps hardly a page: user data and page cache, as in a large machine."""
        with contest.output_of(theirs(self._newest, self._core, SELECTION_CODEC), scratch, _DEADLINE) as output:
            dump = dumps.Dump(output)
        pages = bigcore.SECTION // dump.page_size
        kept, known = (bits[: len(bits) // pages * pages].reshape(-1, pages).mean(axis=1) for bits in (dump.kept, dump.known))
        later = np.arange(len(kept)) >= len(kept) // 2  # the earlier ones are free as a whole, or absent
        return tuple(np.flatnonzero((kept <= _QUIET) & (known == 1) & later).tolist())

    def _filter(self, memory: int, big: Path, scratch: Path) -> None:
        """All builds in turn with ours, by each number of workers; each pass of ours is held against makedumpfile's report."""

        def filtering(program: Makedumpfile) -> Contender:
            return Contender(f"{program}'s filter", lambda output: self._dry_run(program, big, output))

        def passing(workers: int) -> Contender:
            python = ("env", "OPENBLAS_NUM_THREADS=1", sys.executable)  # as `crashkernel capture` has it
            command = (*python, "-m", "crashkernel.bench.filterpass", str(big), str(LEVEL), str(workers))
            return Contender(f"our filter, {memory >> 30} GiB, {_workers(workers)}", lambda _output: command)

        others = [filtering(program) for program in self._programs[: len(makedumpfile.SUITES)]]
        mine = {workers: passing(workers) for workers in WORKERS}
        passes: dict[str, list[FilterPass]] = {each.name: [] for each in mine.values()}

        def take(contender: Contender) -> Measure:
            if contender.name not in passes:
                return contest.measure_to(contender.command(scratch / "none"), _FILTERED, _DEADLINE)
            taken, said = contest.measure_said(contender, scratch, _DEADLINE)
            passes[contender.name].append(FilterPass.from_json(said))
            return taken

        rounds = contest.hold([*mine.values(), *others], self._runs, take, self._progress)
        opponent = fastest(rounds, [each.name for each in others])
        for workers, each in mine.items():
            ratios = rounds.ratio(each.name, opponent), rounds.cpu_ratio(each.name, opponent)
            seconds = rounds.seconds(each.name), rounds.seconds(opponent)
            peak = contest.peak_memory(each, scratch, _DEADLINE)
            self.results.filters.append(FilterSpeed(memory, workers, opponent, *ratios, *seconds, peak))
        self._progress(f"what {self._newest} reports of {memory >> 30} GiB")
        reporting = filtering(self._newest)
        counts = PageCounts.from_report(contest.measure_said(reporting, scratch, _DEADLINE)[1], dumps.Memory(big).twice)
        for workers, each in mine.items():
            self.results.filter_checks.append(FilterCheck.of(memory, workers, str(self._newest), counts, passes[each.name]))

    @staticmethod
    def _dry_run(program: Makedumpfile, big: Path, output: Path) -> Sequence[str]:
        return (*program.command, "--dry-run", "-l", "-d", str(LEVEL), "--message-level", _REPORTING, str(big), str(output))

    def _big(self, memory: int, big: Path, scratch: Path) -> BigCapture:
        mine, other = ours(big, SELECTION_CODEC, 2), theirs(self._newest, big, SELECTION_CODEC)
        self._progress(f"whole captures of {memory >> 30} GiB")
        taken = contest.measure(mine, scratch, _DEADLINE), contest.measure(other, scratch, _DEADLINE)
        peak = contest.peak_memory(mine, scratch, _DEADLINE)
        with contest.output_of(mine, scratch, _DEADLINE) as first, contest.output_of(other, scratch, _DEADLINE) as second:
            comparison = dumps.compare_selections(dumps.Dump(first), dumps.Dump(second))
        return BigCapture(memory, 2, str(self._newest), *taken, peak, comparison)
