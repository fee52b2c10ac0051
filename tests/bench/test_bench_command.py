"""`crashkernel bench purgatory`: what it says and how it ends."""

import json
import shutil

import pytest

from crashkernel.bench import model
from crashkernel.bench.cpus import QEMU
from crashkernel.cli import main

pytestmark = [pytest.mark.bench, pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")]

COMMAND = ["bench", "purgatory", "--cpu", "970fx", "--seed", "11"]


def test_all_pass(capsys, tmp_path):
    record = tmp_path / "bench.json"
    assert main([*COMMAND, "--cases", "3", "--json", str(record)]) == 0
    assert "seed 11: 12 of 12 cases passed" in capsys.readouterr().out
    written = json.loads(record.read_text())
    assert (written["verdict"], written["seed"], written["failures"]) == ("PASS", 11, [])
    assert [(cell["byte_order"], cell["kind"], cell["passed"]) for cell in written["cells"]] == [
        ("BE", "zero", 3), ("BE", "reserved", 3), ("BE", "linked", 3), ("BE", "random", 3),
    ]  # fmt: skip


def test_with_a_wrong_model_it_fails_and_says_how_to_see_that_again(capsys, monkeypatch, tmp_path):
    """And it ends after ten failures, which is said."""
    make = model.make
    monkeypatch.setattr(model, "make", lambda memory, moves, *rest: make(memory, moves[:-1] or moves, *rest))
    record = tmp_path / "bench.json"
    assert main([*COMMAND, "--cases", "40", "--json", str(record)]) == 1
    out = capsys.readouterr().out
    failures = json.loads(record.read_text())["failures"]
    assert len(failures) == 10
    assert failures[0]["reproduce"].startswith("crashkernel bench purgatory --seed 11 --case 970fx-BE-")
    assert failures[0]["reproduce"] in out
    assert "were not run" in out
    again = failures[0]["reproduce"].split()[1:]
    assert main(again) == 1
    assert "FAIL" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(again) == 0


@pytest.mark.parametrize(
    "wrong",
    [["--cases", "0"], ["--seed", "1", "--case", "POWER9"], ["--case", "POWER9-BE-zero-1"], ["--json", "/no/such/place"]],
)
def test_what_makes_no_sense(wrong, capsys):
    assert main(["bench", "purgatory", *wrong]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_alone_it_lists_what_there_is(capsys):
    assert main(["bench"]) == 0
    out = capsys.readouterr().out
    assert "purgatory" in out
    assert "drill" in out
