"""`crashkernel size` as a command, its drills played by a program that knows a border."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from crashkernel import cli
from crashkernel.campaign import sizing, worker
from crashkernel.cli import size as command
from crashkernel.cli.display import require_writable
from crashkernel.drill.request import DrillRequest, Supplies
from crashkernel.errors import UsageError
from crashkernel.placement.sizing import Initrd
from support.campaigns import alter, write_campaign

MIB = 1 << 20
DRILLS = Path(__file__).parents[1] / "data" / "drills.json"

# What a drill's process does: its verdict by the border of its placement, its record on standard output.
PLAYER = """
import json, os, sys, time
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
size = int(options.get("crashkernel", "512M").removesuffix("M"))
borders = json.loads(os.environ["BORDERS"])
if os.environ.get("HANGS"):
    open(os.environ["HANGS"], "a").write(f"{os.getpid()}\\n")
    time.sleep(60)
border = borders[options["placement"]]
passed = size >= border
real = json.load(open(os.environ["DRILLS"]))
record = real[("pass-" if passed else "fail-") + options["placement"]]["record"]
left = max(0, size - border)
table = {"K2's image": (size - left) << 20, "free": left << 20}
peaks = {"peak": "saving", "unpacking": table, "saving": table}
record["accounting"] = {"reservation": size << 20, "page_size": 65536, "spare": left << 20, **peaks} if passed else None
if os.environ.get("WRONG") in ("1", options["placement"]):
    while not all(os.path.exists(name) for name in os.environ.get("AFTER", "").split()):
        time.sleep(0.05)
    record["verdict"], record["failure"], record["bytes_wrong"] = "FAIL", None, 64
elif not passed:
    record["failure"] = {"stage": "K2 boot", "message": "K2 boot: Kernel panic: Out of memory", "likely": "", "console": []}
print(json.dumps({"verdict": record["verdict"], "drills": [record]}))
sys.exit(0 if record["verdict"] == "PASS" else 1)
"""


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Drills are played: zero needs 100 MiB, reserved 120."""
    player = tmp_path / "player.py"
    player.write_text(textwrap.dedent(PLAYER))
    monkeypatch.setattr(worker, "PROGRAM", (sys.executable, str(player)))
    monkeypatch.setenv("BORDERS", json.dumps({"zero": 100, "reserved": 120}))
    monkeypatch.setenv("DRILLS", str(DRILLS))

    class Kernel:
        name = "6.1.0-test"

    kernel = Kernel()
    monkeypatch.setattr(command, "fetch", lambda _request, _tell: Supplies(kernel, kernel, None))
    monkeypatch.setattr(
        sizing,
        "expect",
        lambda request, _supplies: sizing.Expectation(request, 40 * MIB, Initrd(3 * MIB, 3 * MIB, 3 * MIB, 3 * MIB)),
    )


def test_the_answer_comes_with_its_trials_and_what_others_say(played, capfd):
    assert cli.main(["size", "--memory", "2G"]) == 0
    out = capfd.readouterr().out
    assert "\ncrashkernel=160M\n" in out, "a quarter more than 120M, in whole 16M"
    assert "zero: 100M was enough, 4 times of 4; 96M was not; with 25 % more 128M" in out
    assert "reserved: 120M was enough, 4 times of 4; 116M was not; with 25 % more 160M" in out
    assert re.search(r"^  zero +96M  too small +\d+\.\d s  K2 boot: Kernel panic: Out of memory", out, re.MULTILINE)
    assert re.search(r"^  reserved +120M  passed +\d+\.\d s  0 B to spare at its lowest", out, re.MULTILINE)
    size, *ratios = re.search(r"^  estimated: (\d+) MiB +(\d\.\d\d) +(\d\.\d\d)$", out, re.MULTILINE).groups()
    assert ratios == [f"{int(size) / 100:.2f}", f"{int(size) / 120:.2f}"]
    assert re.search(r"^  recommended by debian: 320 MiB +3\.20 +2\.67$", out, re.MULTILINE)
    assert re.search(r"^  the reservation +100\.0 +100\.0 +120\.0 +120\.0$", out, re.MULTILINE)


def test_the_json_is_complete_and_alone_on_standard_output(played, capfd):
    assert (
        cli.main(["size", "--placement", "reserved", "--capture", "raw", "--margin", "0", "--confirm", "1", "--json", "-"]) == 0
    )
    (found,) = json.loads(capfd.readouterr().out)["sizes"]
    assert (found["found"], found["failed"], found["recommended"]) == (120 * MIB, 116 * MIB, 128 * MIB)
    assert (found["passed"], found["margin"], found["crashkernel"]) == (2, 0, "128M")
    assert found["command"] == "crashkernel drill --placement=reserved --crashkernel=120M"
    assert found["accounting"]["page_size"] == 0x10000
    assert {each["vendor"] for each in found["distributions"]} == {"rhel", "debian", "suse"}
    assert [trial["finding"] for trial in found["trials"]].count("passed") >= 2


def test_the_options_of_a_drill_are_its_own(played, capfd):
    options = ["--placement=zero", "--smp=4", "--all-cpus", "--mmu=hash", "--capture=0", "--capture-codec=lzo", "--memory=1G"]
    assert cli.main(["size", *options, "--json", "-"]) == 0
    (found,) = json.loads(capfd.readouterr().out)["sizes"]
    assert found["found"] % (16 * MIB) == 0, "hash gives K2 its memory in blocks"
    words = found["command"].split()
    assert {"--smp=4", "--all-cpus", "--mmu=hash", "--capture=0", "--capture-codec=lzo", "--memory=1G"} <= set(words)


def test_it_is_kept_with_a_campaigns_results(played, tmp_path, capfd):
    database = write_campaign(tmp_path / "night.sqlite", [])
    assert cli.main(["size", "--into", str(database)]) == 0
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT title, request, result, found, recommended FROM size ORDER BY found").fetchall()
    assert [(found, recommended) for *_, found, recommended in rows] == [(100 * MIB, 128 * MIB), (120 * MIB, 160 * MIB)]
    for title, request, result, found, _ in rows:
        assert f"crashkernel={found // MIB}M" in title
        assert DrillRequest.from_options(json.loads(request)).crashkernel == f"{found // MIB}M"
        assert json.loads(result)["found"] == found


def test_a_wrong_dump_ends_it_and_is_no_size(played, monkeypatch, capfd):
    monkeypatch.setenv("WRONG", "1")
    assert cli.main(["size"]) == 1
    captured = capfd.readouterr()
    assert "crashkernel: the dump is wrong, which is no matter of memory: 64 bytes are wrong" in captured.err
    assert "crashkernel=" not in captured.out


@pytest.fixture
def unprivileged():
    """A directory, and how to be somebody in it who may only do what its mode says: root is nobody meanwhile."""
    with tempfile.TemporaryDirectory() as shared:  # not pytest's own, which is closed to all others
        directory, root = Path(shared), os.geteuid() == 0

        @contextlib.contextmanager
        def entered(mode):
            directory.chmod(mode)
            if root:
                os.seteuid(65534)
            try:
                yield
            finally:
                if root:
                    os.seteuid(0)
                directory.chmod(0o755)

        yield directory, entered


def test_a_database_that_may_only_be_read_is_refused_before_the_drills(unprivileged):
    directory, entered = unprivileged
    database = write_campaign(directory / "night.sqlite", [])
    sizing.require_database(database)
    database.chmod(0o444)
    with entered(0o777), pytest.raises(UsageError, match=r"cannot write .*night.sqlite: attempt to write a readonly database"):
        sizing.require_database(database)


def test_a_directory_that_may_not_be_written_to_is_refused_before_the_drills(unprivileged, tmp_path):
    directory, entered = unprivileged
    require_writable(directory / "new.json")
    with (
        entered(0o555),
        pytest.raises(UsageError, match=r"cannot write .*new.json \(give the name of a file in a directory that"),
    ):
        require_writable(directory / "new.json")
    with pytest.raises(UsageError, match="cannot write"):
        require_writable(tmp_path)
    require_writable(Path("/dev/null"))


def test_what_cannot_be_stored_is_told_all_the_same(played, tmp_path, monkeypatch, capfd):
    database = write_campaign(tmp_path / "night.sqlite", [])
    monkeypatch.setattr(sizing, "require_database", lambda _path: None)
    alter(database, "DROP TABLE size")
    assert cli.main(["size", "--into", str(database), "--json", str(tmp_path / "found.json")]) == 2
    captured = capfd.readouterr()
    assert "\ncrashkernel=160M\n" in captured.out
    assert captured.err.startswith(f"crashkernel: cannot write {database}: ")
    assert len(json.loads((tmp_path / "found.json").read_text())["sizes"]) == 2


def test_what_one_search_found_is_told_and_kept_when_another_fails(played, tmp_path, monkeypatch, capfd):
    database = write_campaign(tmp_path / "night.sqlite", [])
    monkeypatch.setenv("WRONG", "reserved")
    monkeypatch.setenv("AFTER", str(tmp_path / "found"))
    search = sizing.find_smallest

    def watched(*arguments):
        found = search(*arguments)
        (tmp_path / "found").touch()
        return found

    monkeypatch.setattr(sizing, "find_smallest", watched)
    assert cli.main(["size", "--into", str(database), "--json", str(tmp_path / "found.json")]) == 1
    captured = capfd.readouterr()
    assert "\ncrashkernel=128M\n  no answer for reserved: that search did not come to its end\n  zero: 100M was" in captured.out
    assert captured.err.startswith("crashkernel: the dump is wrong, which is no matter of memory")
    (found,) = json.loads((tmp_path / "found.json").read_text())["sizes"]
    assert found["placement"] == "zero"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT found FROM size").fetchall() == [(100 * MIB,)]


def test_where_nothing_is_enough_it_says_so(played, monkeypatch, capfd):
    monkeypatch.setenv("BORDERS", json.dumps({"zero": 5000, "reserved": 5000}))
    assert cli.main(["size", "--memory", "1G"]) == 1
    assert "not even 512 MiB are enough: K2 boot: Kernel panic: Out of memory" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--capture", "raw", "--capture-codec", "lzo"], "say how `crashkernel capture` saves"),
        (["--capture", "32"], "capture = 32: must be a whole number from 0 to 31"),
        (["--machine", "powernv9", "--cpu", "POWER8"], "powernv9 is a POWER9 machine"),
        (["--memory", "lots"], "lots"),
        (["--into", "/nonexistent/db"], "no such database"),
        (["--json", "/nonexistent/file"], "cannot write /nonexistent/file"),
    ],
)
def test_bad_options_are_one_clear_line_before_anything_runs(played, capfd, options, said):
    assert cli.main(["size", *options]) == 2
    captured = capfd.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize("options", [["--capture", "many"], ["--margin", "-5"], ["--confirm", "1e3"], ["--placement", "here"]])
def test_words_that_are_no_options_values(played, capfd, options):
    with pytest.raises(SystemExit) as caught:
        cli.main(["size", *options])
    assert caught.value.code == 2


def test_ctrl_c_ends_the_drills_too(played, tmp_path, monkeypatch):
    """The command is interrupted while two drills hang: neither outlives it."""
    started = tmp_path / "started"
    script = tmp_path / "interrupted.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from crashkernel import cli
            from crashkernel.campaign import sizing, worker
            from crashkernel.cli import size
            from crashkernel.drill.request import Supplies
            from crashkernel.placement.sizing import Initrd
            worker.PROGRAM = {worker.PROGRAM!r}
            kernel = type("Kernel", (), {{"name": "test"}})
            supplies = Supplies(kernel, kernel, None)
            size.fetch = lambda request, tell: supplies
            sizing.expect = lambda request, _: sizing.Expectation(request, 40 << 20, Initrd(1 << 20, 1 << 20))
            sys.exit(cli.main(["size"]))
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "HANGS": str(started)},
    )
    give_up = time.monotonic() + 30
    while (drills := started.read_text().split() if started.exists() else []) != drills[:2] or len(drills) < 2:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == b"crashkernel: interrupted\n"
    for drill in drills:
        with pytest.raises(ProcessLookupError):
            os.kill(int(drill), 0)
