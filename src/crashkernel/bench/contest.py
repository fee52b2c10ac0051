"""Programs measured side by side: processes run in turn on the same work, and ratios of what they took in the same round.

A round runs every contender once, each round beginning with another one. What disturbs the machine disturbs a round, so ratios
are taken within a round, and their median is the result, with the extremes beside it.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Self

from crashkernel.errors import EnvironmentFault

_SAMPLING = 0.01  # seconds between two looks at the memory of a process and its children


@dataclass(frozen=True, slots=True)
class Contender:
    """A program and what it is to do: `command(output)` are its arguments, `output` the file it is to write."""

    name: str
    command: Callable[[Path], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Measure:
    """One run: wall time and the processor time of it and its children, in seconds, and the bytes of its output."""

    seconds: float
    cpu: float
    size: int


class TooSlow(EnvironmentFault):
    """A run was ended because it took longer than `seconds`."""

    def __init__(self, name: str, seconds: float) -> None:
        super().__init__(f"{name} did not end within {seconds:.0f} s")
        self.seconds = seconds


class _Process:
    """A contender running, in a session of its own; what it says goes to a file."""

    def __init__(self, contender: Contender, output: Path, log: Path) -> None:
        self.name = contender.name
        self._log = log
        command = list(contender.command(output))
        self._killed = False
        self.started = time.perf_counter()
        try:
            with log.open("wb") as sink:
                self._popen = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
                )
        except OSError as error:
            raise EnvironmentFault(f"{command[0]} does not run here: {error.strerror}") from error
        self.pid = self._popen.pid

    def kill(self) -> None:
        """End it and its children."""
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def said(self) -> str:
        """What it said so far."""
        return self._log.read_text(errors="replace").replace("\r", "\n")

    def wait(self, *, block: bool = True) -> resource.struct_rusage | None:
        """What it used, once it has ended; None if it has not and that is not waited for.

        :raise EnvironmentFault: it failed.
        """
        pid, status, usage = os.wait4(self.pid, 0 if block else os.WNOHANG)
        if pid == 0:
            return None
        self._popen.returncode = os.waitstatus_to_exitcode(status)
        if self._popen.returncode and not self._killed:
            said = self.said.strip().splitlines()
            raise EnvironmentFault(
                f"{self.name} exited with {self._popen.returncode}: {said[-1] if said else 'without a word'}"
            )
        return usage

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._popen.returncode is None:
            self.kill()
            self.wait()


def measure(contender: Contender, scratch: Path, deadline: float) -> Measure:
    """Run it once, with a new directory below `scratch` for its output, which is removed again.

    :raise TooSlow: it took longer than `deadline` seconds.
    :raise EnvironmentFault: it failed.
    """
    return measure_said(contender, scratch, deadline)[0]


def measure_said(contender: Contender, scratch: Path, deadline: float) -> tuple[Measure, str]:
    """The same, and what it said.

    :raise TooSlow, EnvironmentFault: as `measure` does.
    """
    with tempfile.TemporaryDirectory(prefix="run-", dir=scratch) as directory:
        output = Path(directory) / "dump"
        seconds, cpu, said = _run(contender, output, Path(directory) / "log", deadline)
        return Measure(seconds, cpu, output.stat().st_size if output.exists() else 0), said


@contextlib.contextmanager
def output_of(contender: Contender, scratch: Path, deadline: float) -> Iterator[Path]:
    """Run it, and have its output for a while.

    :raise TooSlow, EnvironmentFault: as `measure` does.
    """
    with tempfile.TemporaryDirectory(prefix="run-", dir=scratch) as directory:
        output = Path(directory) / "dump"
        _run(contender, output, Path(directory) / "log", deadline)
        if not output.exists():
            raise EnvironmentFault(f"{contender.name} wrote no {output.name}")
        yield output


def _run(contender: Contender, output: Path, log: Path, deadline: float) -> tuple[float, float, str]:
    """Wall and processor time in seconds, and what it said."""
    with _Process(contender, output, log) as process:
        timer = threading.Timer(deadline, process.kill)
        timer.start()
        try:
            usage = process.wait()
            seconds = time.perf_counter() - process.started
        finally:
            timer.cancel()
    assert usage is not None, "it was waited for"
    if seconds >= deadline:
        raise TooSlow(contender.name, deadline)
    return seconds, usage.ru_utime + usage.ru_stime, process.said


# -------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that a process and its children had at once, in bytes; what they share counts once.

    `own` is without the pages of mapped files: those of /proc/vmcore are not K2's memory, and those of programs and libraries
    are in its page cache, or in the initramfs, anyway.
    """

    total: int
    own: int


def peak_memory(contender: Contender, scratch: Path, deadline: float) -> Peak:
    """Run it once more, looked at so often that it is not fit to be timed.

    :raise TooSlow, EnvironmentFault: as `measure` does.
    """
    total = own = 0
    with (
        tempfile.TemporaryDirectory(prefix="run-", dir=scratch) as directory,
        _Process(contender, Path(directory) / "dump", Path(directory) / "log") as process,
    ):
        while process.wait(block=False) is None:
            looks = [look for pid in _family(process.pid) if (look := _proportional(pid))]
            total, own = max(total, sum(look[0] for look in looks)), max(own, sum(look[1] for look in looks))
            if time.perf_counter() - process.started > deadline:
                raise TooSlow(contender.name, deadline)
            time.sleep(_SAMPLING)
    return Peak(total, own)


def _family(pid: int) -> Iterator[int]:
    """A process, its children, theirs."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return
    for child in children:
        yield from _family(int(child))


def _proportional(pid: int) -> tuple[int, int] | None:
    """Its proportional set size in bytes (Documentation/filesystems/proc.rst, smaps_rollup): all of it, and without files."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return parse_rollup(lines)


def parse_rollup(lines: Sequence[str]) -> tuple[int, int] | None:
    """All and own bytes, of the lines of smaps_rollup; None of a process that has ended, whose file is empty."""
    sizes = {words[0]: int(words[1]) << 10 for line in lines if len(words := line.split()) == 3 and words[2] == "kB"}
    if "Pss:" not in sizes:
        return None
    return sizes["Pss:"], sizes["Pss:"] - sizes.get("Pss_File:", 0)


def measure_to(command: Sequence[str], pattern: str, deadline: float) -> Measure:
    """Run a program until what it says has `pattern`, then end it; what it took till then.

    It has a terminal, so that it speaks at once.

    :raise TooSlow: it said nothing of the kind within `deadline` seconds.
    :raise EnvironmentFault: it ended before it did.
    """
    name = Path(command[0]).name
    ours, theirs = os.openpty()
    try:
        started = time.perf_counter()
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, start_new_session=True
        ) as process:
            os.close(theirs)
            timer = threading.Timer(deadline, process.kill)
            timer.start()
            said = b""
            try:
                while not re.search(pattern.encode(), said):
                    said = said[-(1 << 12) :] + os.read(ours, 1 << 16)
                seconds = time.perf_counter() - started
            except OSError:  # EIO: nobody has the other end any more (pty(7))
                if time.perf_counter() - started >= deadline:
                    raise TooSlow(name, deadline) from None
                last = said.decode(errors="replace").replace("\r", "\n").strip().splitlines()[-1:]
                raise EnvironmentFault(f"{name} ended without saying {pattern!r}: {''.join(last)}") from None
            finally:
                timer.cancel()
                process.kill()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            return Measure(seconds, usage.ru_utime + usage.ru_stime, 0)
    finally:
        os.close(ours)


# -------------------------------------------------------------------------------------------------------------- rounds


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of something in each round: the median, and the extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least one round."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Rounds:
    """What each contender took in each round, by its name."""

    measures: Mapping[str, tuple[Measure, ...]]

    def ratio(self, first: str, second: str) -> Ratio:
        """What `first` took of what `second` took."""
        return Ratio.of([a.seconds / b.seconds for a, b in self._pairs(first, second)])

    def cpu_ratio(self, first: str, second: str) -> Ratio:
        """The same of processor time, which other work on the machine disturbs less."""
        return Ratio.of([a.cpu / b.cpu for a, b in self._pairs(first, second)])

    def efficiency(self, one: str, many: str, workers: int) -> Ratio:
        """How much of `workers` times the speed of one there is."""
        return Ratio.of([a.seconds / (workers * b.seconds) for a, b in self._pairs(one, many)])

    def seconds(self, name: str) -> Ratio:
        """What one took."""
        return Ratio.of([each.seconds for each in self.measures[name]])

    def size(self, name: str) -> int:
        """Bytes of its output, in the last round."""
        return self.measures[name][-1].size

    def _pairs(self, first: str, second: str) -> Iterator[tuple[Measure, Measure]]:
        return zip(self.measures[first], self.measures[second], strict=True)


def hold(
    contenders: Sequence[Contender], runs: int, take: Callable[[Contender], Measure], progress: Callable[[str], None]
) -> Rounds:
    """Have `runs` rounds; `take` measures one run."""
    taken: dict[str, list[Measure]] = {each.name: [] for each in contenders}
    for number in range(runs):
        first = number % len(contenders)
        for each in (*contenders[first:], *contenders[:first]):
            progress(f"round {number + 1} of {runs}: {each.name}")
            taken[each.name].append(take(each))
    return Rounds({name: tuple(measures) for name, measures in taken.items()})
