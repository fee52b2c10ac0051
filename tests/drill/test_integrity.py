"""What a real twin's console says when something loaded is damaged, and what the purgatory then does; and K2 on every CPU."""

import json
import subprocess

import pytest
from drill_command import COMMAND


def drill(tmp_path, *options):
    results = tmp_path / "results.json"
    done = subprocess.run(
        [*COMMAND, "drill", *options, "--keep", str(tmp_path), "--json", str(results)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return done, json.loads(results.read_text())["drills"][0]


@pytest.mark.parametrize(
    ("machine", "placement", "content", "policy", "last"),
    [
        ("pseries", "zero", "kernel", "reboot", "kernel DAMAGED, rebooting"),
        ("powernv9", "reserved", "initrd", "halt", "initrd DAMAGED, halted"),
    ],
)
def test_a_flipped_bit_is_told_and_k2_is_not_entered(tmp_path, machine, placement, content, policy, last):
    done, result = drill(
        tmp_path, "--machine", machine, "--placement", placement, "--fault", f"flip:{content}", "--on-damage", policy
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["verdict"] == "PASS"
    (fault,) = result["faults"]
    assert (fault["word"], fault["expects"]) == (f"flip:{content}", "told")
    assert fault["told"].endswith(last)
    assert fault["told"] in done.stdout
    assert result["k1_bytes"] == 0, "there is no dump"
    console = (tmp_path / placement / "console.log").read_text(errors="replace")
    assert "crashkernel: K1 is dead, its purgatory is whole\n" in console.replace("\r", "")
    assert "enter K2" not in console
    assert console.count("] Linux version") == 1


def test_k2_takes_all_cpus_over_from_where_they_wait(tmp_path):
    done, result = drill(tmp_path, "--placement", "zero", "--smp", "2", "--all-cpus")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["bytes_wrong"] == result["bytes_missing"] == 0
    console = (tmp_path / "zero" / "console.log").read_text(errors="replace")
    assert "crashkernel: 0x0001 of 0x0001 other CPUs came" in console
    assert console.split("] Linux version")[2].count("smp: Brought up 1 node, 2 CPUs") == 1
