"""One drill as a process: its result in every way it can end, and that nothing of it outlives its deadline or its worker."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crashkernel.campaign import worker
from crashkernel.campaign.worker import Stopped, Task, run_task, stop
from crashkernel.drill import budget
from crashkernel.drill.budget import Share, ledger
from crashkernel.drill.request import DrillRequest

FAKE = Path(__file__).parents[1] / "support" / "fakedrill.py"


@pytest.fixture
def place(short_path, monkeypatch):
    monkeypatch.setattr(budget, "LEDGER", short_path / "ledger")
    monkeypatch.setenv("FAKE_LEDGER", str(short_path / "ledger"))
    monkeypatch.setenv("TMPDIR", str(short_path))
    return short_path


def task(kernel: str, deadline: float = 20.0, **more) -> Task:
    command = tuple(DrillRequest(kernel=kernel).command())
    return Task("campaign", "run", 1, command, Share(1, 1 << 20), deadline, program=(sys.executable, str(FAKE)), **more)


def processes_in(place) -> list[str]:
    return [
        cmdline
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(place) in (cmdline := path.read_bytes().decode(errors="replace") if path.exists() else "")
        and "fakedrill" in cmdline
    ]


def test_a_drill_that_passes(place):
    told = []
    result = run_task(task("good"), lambda stage, text: told.append((stage, text)))
    assert (result.verdict, result.stage, result.reason) == ("PASS", "", "")
    assert (result.release, result.capture_release) == ("6.1.0", "6.12.0")
    assert list(result.stages) == ["K1 boot", "load", "K2 boot", "capture"]
    assert result.boot_seconds == pytest.approx(result.stages["K1 boot"] + result.stages["K2 boot"])
    assert result.seconds >= sum(result.stages.values())
    assert 0 < result.cpu_seconds < result.seconds * 2
    assert result.record["plan"] == {"moves": []}
    assert result.console.startswith("[    0.000000] Linux version\n")
    assert result.started < result.ended
    assert told == [("", ""), ("K1 boot", ""), ("load", ""), ("K2 boot", ""), ("capture", "")]
    assert [path.name for path in place.iterdir()] == ["ledger"]


@pytest.mark.parametrize(
    ("kernel", "verdict", "stage", "reason"),
    [
        ("fail", "FAIL", "K2 boot", "not done after 300 s"),
        ("nonsense", "ERROR", "capture", "the drill's report makes no sense"),
        ("lacks", "ERROR", "packages", "exit status 3: this machine lacks a twin"),
        ("die", "ERROR", "K2 boot", "killed by signal 9 (Killed)"),
    ],
)
def test_a_drill_that_does_not(place, kernel, verdict, stage, reason):
    result = run_task(task(kernel), lambda *_: None)
    assert (result.verdict, result.stage) == (verdict, stage)
    assert result.reason.startswith(reason)
    assert bool(result.console) == (kernel in ("fail", "nonsense"))


@pytest.mark.parametrize("kernel", ["hang", "stubborn"])
def test_a_drill_that_hangs_is_ended_and_its_console_is_kept(place, monkeypatch, kernel):
    monkeypatch.setattr(worker, "_GRACE", 1.0)
    result = run_task(task(kernel, deadline=1.5), lambda *_: None)
    assert (result.verdict, result.stage, result.reason) == ("ERROR", "K2 boot", "not done after 2 s")
    assert "K2 said" in result.console
    assert processes_in(place) == []
    assert ledger() == []
    budget.remove_leftovers()  # what a drill could not remove itself
    assert list(place.glob("crashkernel-drill-*")) == []


def test_waiting_for_its_turn_is_not_the_drills_time(place, monkeypatch):
    monkeypatch.setenv(budget.CPUS_VARIABLE, "1")
    told = []
    with budget.working_directory(Share(1, 1)):
        thread = threading.Timer(
            0, lambda: told.append(run_task(task("good", deadline=2.0), lambda *event: told.append(event)))
        )
        thread.start()
        time.sleep(4)
        assert told[-1] == ("wait", "for 1 of 1 CPUs, 1 are taken")
    thread.join()
    assert told[-1].verdict == "PASS"
    assert told[-1].seconds < 2


def test_the_limits_reach_the_drill(place):
    told = []
    limits = {budget.CPUS_VARIABLE: "1"}
    with budget.working_directory(Share(1, 1)):
        thread = threading.Thread(target=lambda: run_task(task("good", limits=limits), lambda *event: told.append(event)))
        thread.start()
        deadline = time.monotonic() + 20
        while told[-1:] != [("wait", "for 1 of 1 CPUs, 1 are taken")] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert told[-1][0] == "wait"
    thread.join()


def test_a_campaign_that_is_given_up_ends_its_drills_and_no_others(place):
    ends = {}

    def run(name):
        try:
            ends[name] = run_task(Task("campaign", name, 1, tuple(DrillRequest(kernel="hang").command()), Share(1, 1), 4.0,
                                       program=(sys.executable, str(FAKE))), lambda *_: None).verdict  # fmt: skip
        except Stopped:
            ends[name] = "stopped"

    threads = [threading.Thread(target=run, args=(name,)) for name in ("given up", "other")]
    for thread in threads:
        thread.start()
    time.sleep(1)
    stop("given up")
    for thread in threads:
        thread.join()
    assert ends == {"given up": "stopped", "other": "ERROR"}
    assert processes_in(place) == []


def test_a_drill_dies_with_its_worker_and_leaves_nothing(place):
    source = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_campaign_worker import task
from crashkernel.campaign.worker import run_task
run_task(task("hang", 60), lambda stage, text: print(stage, flush=True))
"""
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, env={**os.environ})
    while process.stdout.readline() != "K2 boot\n":
        assert process.poll() is None
    assert processes_in(place)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while processes_in(place) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_in(place) == []
    assert ledger() == []
    budget.remove_leftovers()  # the killed worker's own directory
    assert list(place.glob("crashkernel-drill-*")) == []


def test_the_command_is_what_runs(place, monkeypatch):
    log = place / "log"
    monkeypatch.setenv("FAKE_LOG", str(log))
    request = DrillRequest(kernel="good", smp=2, fault=("nmi",), seed=5)
    run_task(Task("c", "r", 1, tuple(request.command()), Share(1, 1), 20, program=(sys.executable, str(FAKE))), lambda *_: None)
    words = log.read_text().split()
    assert words[:-4] == request.command()[1:]
    assert words[-4:-1] == ["--json", "-", "--keep"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"failure": {"stage": "load", "message": "load: no\n room"}}, ("load", "no room")),
        ({"problems": ["PT_LOADs overlap", "more"]}, ("verify", "PT_LOADs overlap")),
        ({"bytes_wrong": 4096, "nonce_found": False}, ("verify", "4,096 bytes are wrong")),
        ({"bytes_missing": 1}, ("verify", "1 bytes are missing")),
        (
            {"faults": [{"word": "nmi", "told": "seen"}, {"word": "disk-slow", "told": ""}]},
            ("verify", "fault disk-slow was not seen to act"),
        ),
        ({"faults": [{"word": "nmi", "told": ""}], "nonce_found": False}, ("verify", "the nonce is not as in K1")),
        ({"faults": [{"word": "nmi", "told": "seen"}], "bytes_missing": 1}, ("verify", "1 bytes are missing")),
        ({}, ("verify", "it does not say why")),
    ],
)  # fmt: skip
def test_the_reason_of_a_failure_is_one_line(record, said):
    good = dict.fromkeys(("first_256_bytes_ok", "nonce_found", "panic_found", "registers_ok"), True)
    whole = {"failure": None, "problems": [], "bytes_wrong": 0, "bytes_missing": 0, "faults": [], **good, **record}
    assert worker._failure(whole) == said
