"""Whole campaigns on Dask: with fake drills under every kind of death, and one of two real drills through the command line."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from support.havoc import wreak

FAKE = [sys.executable, str(Path(__file__).parent / "fakecampaign.py")]
REAL = [sys.executable, "-m", "crashkernel", "campaign"]
FORTY = """name = "forty"
repeats = 2
[[matrix]]
kernel = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
placement = ["zero", "reserved"]
"""


@pytest.fixture
def environment(tmp_path, short_path):
    return {**os.environ, "TMPDIR": str(short_path), "FAKE_LEDGER": str(tmp_path / "ledger"), "FAKE_LOG": str(tmp_path / "log")}


def campaign(tmp_path, text: str) -> tuple[Path, Path]:
    file = tmp_path / "c.toml"
    file.write_text(text)
    return file, tmp_path / "c.sqlite"


def rows(db, query: str):
    connection = sqlite3.connect(db)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def begun(tmp_path) -> Counter:
    """How many times each drill was begun, by kernel and placement."""
    words = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    return Counter(tuple(word for word in line if word.startswith(("--placement", "--kernel"))) for line in words)


def test_every_drill_has_one_result_whoever_is_killed(tmp_path, short_path, environment):
    """Ten kills of workers and drivers at random moments; nothing of what they had started is left."""
    file, db = campaign(tmp_path, FORTY)
    seed = int.from_bytes(os.urandom(4))
    command = [*FAKE, str(file), str(db)]
    havoc = wreak(command, db, short_path, drills=40, kills=10, delay=0.6, seed=seed, environment=environment)
    assert not havoc.problems, f"seed {seed}: {havoc}\n{havoc.output}"
    assert havoc.results == {"PASS": 40}, f"seed {seed}: {havoc}\n{havoc.output}"
    assert havoc.workers_killed + havoc.drivers_killed == 10
    assert "Traceback" not in havoc.output
    # each kill costs what ran, two drills, and may hit the driver before it has written down one more
    assert 40 <= sum(begun(tmp_path).values()) <= 40 + 3 * 10


def test_what_has_a_result_is_not_run_again(tmp_path, environment):
    file, db = campaign(tmp_path, FORTY.replace("repeats = 2", "repeats = 1"))
    first = subprocess.run(
        [*FAKE, str(file), str(db)], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert first.stdout.startswith("forty: 20 drills, 2 at a time; ")
    assert first.stderr == ""
    assert sum(begun(tmp_path).values()) == 20
    file.write_text(FORTY.replace('"j"]', '"j", "fail"]').replace("repeats = 2", "repeats = 1"))
    again = subprocess.run(
        [*FAKE, str(file), str(db)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert again.returncode == 1
    assert again.stdout.startswith("forty: 2 drills, 2 at a time, 20 of 22 have their result; ")
    assert set(begun(tmp_path).values()) == {1}
    assert rows(db, "SELECT verdict, count(*) FROM result GROUP BY verdict ORDER BY verdict") == [("FAIL", 2), ("PASS", 20)]
    assert [end for (end,) in rows(db, 'SELECT "end" FROM run')] == ["done", "done"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_campaign_ends_what_runs_and_says_so(tmp_path, short_path, environment, number):
    file, db = campaign(tmp_path, FORTY.replace('"c"', '"hang"'))
    process = subprocess.Popen(
        [*FAKE, str(file), str(db)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists() or "--kernel=hang" not in (tmp_path / "log").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done = rows(db, "SELECT count(*) FROM result")
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, output + errors
    assert errors == ""
    assert rows(db, 'SELECT "end" FROM run') == [("interrupted",)]
    assert rows(db, "SELECT state FROM campaign") == [("interrupted",)]
    assert rows(db, "SELECT count(*) FROM result WHERE verdict != 'PASS'") == [(0,)]
    assert rows(db, "SELECT count(*) FROM result") >= done
    assert list(short_path.iterdir()) == []


def test_a_terminal_shows_what_runs_and_keeps_a_whole_line_for_each_result(tmp_path, environment):
    file, db = campaign(
        tmp_path, FORTY.replace('"c", "d", "e", "f", "g", "h", "i", "j"', '"fail"').replace("repeats = 2", "repeats = 1")
    )
    ours, theirs = pty.openpty()
    terminal = {**environment, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"}
    process = subprocess.Popen([*FAKE, str(file), str(db)], env=terminal, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while data := os.read(ours, 65536):
            shown += data
    os.close(ours)
    assert process.wait(60) == 1
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).splitlines()
    kept = [line.split(maxsplit=5) for line in lines if re.match(r" +\d/6  ", line)]
    alike = "pseries POWER9 radix, 1 CPU, 2 GiB, crashkernel=512M"
    assert sorted((words[1], words[4] + words[5]) for words in kept) == sorted(
        ("FAIL" if kernel == "fail" else "PASS", f"{kernel},{alike}, {placement}")
        for kernel in ("a", "b", "fail")
        for placement in ("zero", "reserved")
    )
    assert any(re.fullmatch(r"forty: \d of 6 done: \d passed, \d failed, 0 not run, .* left", line) for line in lines)
    assert any(re.match(r" +\d s +(K1 boot|K2 boot|load|capture) +a, pseries", line) for line in lines)


def test_drills_that_end_badly_are_told_and_tried_again_when_asked(tmp_path, environment):
    file, db = campaign(
        tmp_path,
        """name = "bad"
        deadline = 2
        [[matrix]]
        kernel = ["good", "fail", "hang", "lacks", "die"]
        [[known]]
        match = { kernel = "fail" }
        reason = "as ever"
        """,
    )
    done = subprocess.run(
        [*FAKE, str(file), str(db)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 3
    assert dict(rows(db, "SELECT kernel, verdict FROM drill JOIN result ON number = drill")) == {
        "good": "PASS", "fail": "FAIL", "hang": "ERROR", "lacks": "ERROR", "die": "ERROR",
    }  # fmt: skip
    before = begun(tmp_path)
    subprocess.run(
        [*FAKE, str(file), str(db), "--retry-errors"], env=environment, capture_output=True, timeout=120, check=False
    )
    again = begun(tmp_path) - before
    assert sorted(words[1] for words in again) == ["--kernel=die", "--kernel=hang", "--kernel=lacks"]
    assert rows(db, "SELECT sum(attempt) FROM result") == [(8,)]


def test_a_scheduler_of_ones_own_with_workers_that_come_and_go(tmp_path, environment):
    file, db = campaign(tmp_path, FORTY.replace("repeats = 2", "repeats = 1"))
    port = str(20000 + os.getpid() % 20000)
    address = f"tcp://127.0.0.1:{port}"
    dask = [sys.executable, "-m"]
    scheduler = subprocess.Popen(
        [*dask, "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def worker():
        return subprocess.Popen(
            [*dask, "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard",
             "--local-directory", str(tmp_path)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    workers = [worker()]
    try:
        driver = subprocess.Popen([*FAKE, str(file), str(db), address], env=environment, stdout=subprocess.PIPE, text=True)
        while driver.poll() is None and not (db.exists() and rows(db, "SELECT count(*) FROM result")[0][0] > 3):
            time.sleep(0.1)
        workers.append(worker())
        workers[0].kill()
        output, _ = driver.communicate(timeout=60)
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()
    assert driver.returncode == 0, output
    assert rows(db, "SELECT verdict, count(*) FROM result GROUP BY verdict") == [("PASS", 20)]
    assert len(rows(db, "SELECT DISTINCT worker FROM result")) == 2
    assert rows(db, "SELECT scheduler FROM run") == [(address,)]


def test_a_scheduler_that_is_not_there_is_told(tmp_path):
    file, db = campaign(tmp_path, FORTY)
    command = [*REAL, "run", str(file), "--db", str(db), "--scheduler", "tcp://127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("crashkernel: no Dask scheduler at tcp://127.0.0.1:9")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.drill
def test_a_real_campaign_from_its_file_to_every_form(tmp_path):
    if shutil.which("qemu-system-ppc64") is None:
        pytest.skip("qemu-system-ppc64 is not installed")
    file, db = campaign(
        tmp_path,
        """name = "real"
        [defaults]
        memory = "1G"
        [[matrix]]
        placement = ["zero", "reserved"]
        """,
    )
    junit, document = tmp_path / "j.xml", tmp_path / "README.md"
    document.write_text(
        "before\n<!-- campaign: begin, written by `crashkernel campaign table` -->\n<!-- campaign: end -->\nafter\n"
    )

    def run(*words) -> str:
        done = subprocess.run([*REAL, *map(str, words)], capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    listed = run("run", file, "--list")
    assert (
        "   1   20 s  1 CPU and 3.5 GiB    debian:bookworm, pseries POWER9 radix, 1 CPU, 1 GiB, crashkernel=512M, zero"
        in listed
    )
    figures = json.loads(run("run", file, "--db", db, "--junit", junit, "--json"))
    assert figures["counts"]["passed"] == 2
    assert [case.get("name").rpartition(", ")[2] for case in ET.parse(junit).iter("testcase")] == ["zero", "reserved"]
    run("table", db, "--update", document)
    assert document.read_text().count("| PASS | PASS |") == 1
    told = run("show", db, "--drill", "1")
    assert "crashkernel drill --placement=zero --memory=1G" in told
    assert "verify" in told
    assert "enter K2" in rows(db, "SELECT console FROM result")[0][0]
    boots, whole, cpu = rows(db, "SELECT boot_seconds, seconds, cpu_seconds FROM result")[0]
    assert 0 < boots < whole
    assert cpu > 0
    assert "0 worse" in run("diff", db, db)
