"""One drill as a process: exactly the command that its campaign prints beside it, with a deadline, and its evidence read back.

All of this runs on a worker, which has this package and QEMU and nothing else. A drill does not outlive its worker: the
kernel sends it a SIGTERM when that dies, upon which it ends QEMU and removes its files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crashkernel import __version__
from crashkernel.campaign.store import Result, Verdict, utc_now
from crashkernel.drill.budget import STAGES_VARIABLE, Share, ledger, place_with_room, private_directory
from crashkernel.drill.qemu import QEMU, Wiring
from crashkernel.drill.stages import BOOT_K1, BOOT_K2, CONSOLE, VERIFY, WAIT
from crashkernel.errors import CrashkernelError
from crashkernel.report.terminal import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PROGRAM = (sys.executable, "-m", "crashkernel")
"""What a drill's command begins with on this worker, in place of "crashkernel"."""
TOPIC = "crashkernel-campaign"
"""Dask's topic of what drills are doing: a dict with campaign, drill, worker, stage ("" at the beginning) and text."""

_POLL = 0.1  # seconds
_GRACE = 20.0  # seconds that a drill has to end QEMU and to remove its files
_CONSOLE_LIMIT = 4 << 20  # bytes: a kernel that repeats itself for ever fills no database
_BEFORE = "packages"  # what a drill does before its first stage
_BOOTS = (BOOT_K1.name, BOOT_K2.name)

_stopped: set[str] = set()  # runs that were given up


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is sent. `deadline` is in seconds; `limits` are the ledger's variables."""

    campaign: str
    run: str  # of its driver
    drill: int
    command: tuple[str, ...]
    share: Share
    deadline: float
    limits: Mapping[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = ()  # in place of `PROGRAM`


class Stopped(Exception):
    """The campaign was given up while this drill ran: there is no result."""


def run_on_worker(task: Task) -> Result:
    """`run_task` in a Dask worker, which tells the driver what the drill is doing.

    :raise Stopped: the driver gave up.
    """
    from distributed import get_worker  # noqa: PLC0415

    worker = get_worker()
    name = str(worker.name)

    def tell(stage: str, text: str) -> None:
        worker.log_event(TOPIC, {"campaign": task.campaign, "drill": task.drill, "worker": name, "stage": stage, "text": text})

    return replace(run_task(task, tell), worker=name)


def stop(run: str) -> None:
    """End the drills on this worker that this run of a driver sent; they have no result."""
    _stopped.add(run)


def lacks(version: str) -> str:
    """What this worker lacks for drills that a driver of this version sends, "" if nothing."""
    missing = [program for program in ("setpriv", QEMU) if shutil.which(program) is None]
    return " and ".join(missing + ([] if version == __version__ else [f"crashkernel {version}: it has {__version__}"]))


def run_task(task: Task, tell: Callable[[str, str], None]) -> Result:
    """Drill once; `tell` hears of each stage as it begins, and what happens in it.

    :raise Stopped: `stop` was called meanwhile.
    """
    tell("", "")
    host = socket.gethostname()
    started = utc_now()
    try:
        with private_directory(place_with_room(task.share)) as directory:
            run = _Run(task, tell, directory)
            run.to_the_end()
            result = run.result()
    except (OSError, CrashkernelError) as error:  # this machine lacks something
        result = Result("ERROR", _BEFORE, visible(str(error)))
    return replace(result, started=started, ended=utc_now(), host=host)


class _Run:
    """One process. Its standard output, its stages and what it keeps lie in `directory`."""

    def __init__(self, task: Task, tell: Callable[[str, str], None], directory: Path) -> None:
        self._task = task
        self._tell = tell
        self._output, self._errors = directory / "output", directory / "errors"
        self._stages, self._keep = directory / "stages", directory / "kept"
        self._stages.touch()
        self._stage = _BEFORE
        self._waited = 0.0
        self._console = ""
        self._broken = ""  # why there is no verdict
        self._cpu_seconds = 0.0
        self._start = self._looked = time.monotonic()
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *(task.program or PROGRAM), *task.command[1:],
                 "--json", "-", "--keep", str(self._keep)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True,
                env={**os.environ, **task.limits, STAGES_VARIABLE: str(self._stages)},
            )  # fmt: skip

    def to_the_end(self) -> None:
        """Wait for the process, or end it when its time is over.

        :raise Stopped: the campaign was given up.
        """
        try:
            with self._stages.open(encoding="utf-8", errors="replace") as stages:
                while not self._ended():
                    self._look(stages.readlines())
                    if self._task.run in _stopped:
                        raise Stopped
                    if self._active() > self._task.deadline:
                        self._console = self._console_of_the_living()
                        self._broken = f"not done after {self._task.deadline:.0f} s"
                        return
                    time.sleep(_POLL)
                self._look(stages.readlines())
        finally:
            self._end()
            self._seconds = self._active()

    def result(self) -> Result:
        """What came of it."""
        return replace(self._outcome(), seconds=round(self._seconds, 3), cpu_seconds=round(self._cpu_seconds, 3))

    def _outcome(self) -> Result:
        status = self._process.returncode
        if self._broken or status not in (0, 1):
            return Result("ERROR", self._stage, self._broken or self._last_words(status), console=self._console)
        verdict: Verdict = "FAIL" if status else "PASS"
        try:
            (record,) = json.loads(self._output.read_text())["drills"]
            if record["verdict"] != verdict:
                raise ValueError(f"verdict {record['verdict']!r} and exit status {status}")
            stages = {str(name): float(seconds) for name, seconds in record["stages"].items()}
            stage, reason = _failure(record) if status else ("", "")
            return Result(
                verdict,
                stage,
                reason,
                str(record["kernel"]),
                str(record["capture_kernel"]),
                boot_seconds=round(sum(stages.get(name, 0.0) for name in _BOOTS), 3),
                stages=stages,
                record=record,
                console=self._kept_console(),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = visible(f"the drill's report makes no sense: {error!r}")
            return Result("ERROR", self._stage, reason, console=self._kept_console())

    def _ended(self) -> bool:
        if self._process.returncode is None:
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                self._cpu_seconds = usage.ru_utime + usage.ru_stime  # with those it waited for: QEMU
        return self._process.returncode is not None

    def _look(self, lines: list[str]) -> None:
        now = time.monotonic()
        if self._stage == WAIT.name:
            self._waited += now - self._looked
        self._looked = now
        for line in lines:
            self._stage, _, text = line.rstrip("\n").partition("\t")
            self._tell(self._stage, visible(text))

    def _active(self) -> float:
        """Seconds since it began, without its waiting."""
        return time.monotonic() - self._start - self._waited

    def _end(self) -> None:
        """Nothing of it lives when this returns."""
        if not self._ended():
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            give_up = time.monotonic() + _GRACE
            while not self._ended() and time.monotonic() < give_up:
                time.sleep(_POLL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        while not self._ended():
            time.sleep(_POLL)

    def _last_words(self, status: int) -> str:
        """Why a process ended that reached no verdict."""
        if status < 0:
            return f"killed by signal {-status} ({signal.strsignal(-status)})"
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        said = lines[-1].removeprefix("crashkernel: ") if lines else "it said nothing"
        return visible(f"exit status {status}: {said}")

    def _kept_console(self) -> str:
        return next((_tail(path) for path in self._keep.glob(f"*/{CONSOLE}")), "")

    def _console_of_the_living(self) -> str:
        """What the twin said so far; the ledger knows where the drill works."""
        for entry in ledger():
            if entry.process == self._process.pid and entry.directory:
                with contextlib.suppress(OSError):
                    return _tail(Wiring(Path(entry.directory)).console)
        return ""


def _failure(record: Mapping[str, Any]) -> tuple[str, str]:
    """Where a drill failed, and why in one line."""
    if failure := record["failure"]:
        stage = str(failure["stage"])
        return stage, _line(str(failure["message"]).removeprefix(f"{stage}: "))
    wrong = [f"{record[name]:,} bytes {what}" for name, what in _WRONG.items() if record[name]]
    marks = [f"{what} not as in K1" for name, what in _MARKS.items() if not record[name]]
    unseen = [f"fault {fault['word']} was not seen to act" for fault in record.get("faults", ()) if not fault["told"]]
    return VERIFY.name, _line([*map(str, record["problems"]), *wrong, *marks, *unseen, "it does not say why"][0])


def _line(text: str) -> str:
    return visible(" ".join(text.split()))


_WRONG = {"bytes_wrong": "are wrong", "bytes_missing": "are missing"}
_MARKS = {
    "first_256_bytes_ok": "the first 256 bytes are",
    "nonce_found": "the nonce is",
    "panic_found": "the panic message is",
    "registers_ok": "the registers are",
}


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _CONSOLE_LIMIT))
        return file.read().decode("utf-8", "replace").replace("\r\n", "\n")
