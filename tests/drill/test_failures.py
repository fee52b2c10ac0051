"""A drill that goes wrong says where and why, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from drill_command import COMMAND

from crashkernel.drill.budget import Share, working_directory


def processes_with(text):
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def test_k2_that_does_not_fit_is_the_loaders_refusal(tmp_path):
    results = tmp_path / "results.json"
    done = subprocess.run(
        [*COMMAND, "drill", "--placement", "zero", "--crashkernel", "40M", "--json", str(results)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1
    drill = json.loads(results.read_text())["drills"][0]
    assert drill["verdict"] == "FAIL"
    assert drill["failure"]["stage"] == "load"
    assert "K2 does not fit" in drill["failure"]["message"]
    assert "raise crashkernel=" in drill["failure"]["message"]
    assert drill["failure"]["console"]
    assert "load: K2 does not fit" in done.stdout


def test_k2_that_dies_before_its_console_is_quoted_from_its_memory(tmp_path):
    results = tmp_path / "results.json"
    done = subprocess.run(
        [*COMMAND, "drill", "--placement", "zero", "--crashkernel", "64M", "--json", str(results)],
        capture_output=True,
        text=True,
        timeout=200,  # less than the stage's own deadline
        check=False,
    )
    assert done.returncode == 1
    drill = json.loads(results.read_text())["drills"][0]
    failure = drill["failure"]
    # the plan had said so
    said = {hazard["name"]: hazard["verdict"] for hazard in drill["plan"]["hazards"]}
    assert said["early-allocator"] == said["room"] == "dangerous"
    assert failure["stage"] == "K2 boot"
    assert "its log says: Kernel panic - not syncing: early_alloc_pgtable: Failed to allocate" in failure["message"]
    assert "raise crashkernel=" in failure["likely"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_drill_leaves_no_qemu_and_no_files(short_path, number):
    process = subprocess.Popen(
        [*COMMAND, "drill", "--placement", "zero"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a place of its own, so that what is left behind can be told from other drills
        env={**os.environ, "TMPDIR": str(short_path)},
    )
    try:
        deadline = time.monotonic() + 120
        while not processes_with(str(short_path) + "/crashkernel-drill-"):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    time.sleep(0.2)
    assert processes_with(str(short_path) + "/crashkernel-drill-") == []
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert output.rstrip().endswith("crashkernel: interrupted")
        assert list(short_path.iterdir()) == []
    else:
        # nothing can tidy up after SIGKILL but the next drill
        assert list(short_path.iterdir()) != []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", str(short_path))
            with working_directory(Share(0, 0)) as mine:
                assert list(short_path.iterdir()) == [mine]
