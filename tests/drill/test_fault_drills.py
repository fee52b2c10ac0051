"""Three faults of docs/faults.md, one of each sort; `campaigns/faults.toml` has them all."""

import json
import subprocess

from drill_command import COMMAND

from crashkernel.drill.record import judge_kept
from crashkernel.memory import Range
from crashkernel.placement.plan import LoadPlan


def drill(tmp_path, *options):
    results = tmp_path / "results.json"
    done = subprocess.run(
        [*COMMAND, "drill", "--memory", "1G", *options, "--keep", str(tmp_path), "--json", str(results)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(results.read_text())["drills"]
    assert result["verdict"] == "PASS"
    assert result["faults"][0]["told"] in done.stdout
    return result


def test_an_oops_in_an_interrupt_is_dumped_with_the_registers_of_that_moment(tmp_path):
    drill(tmp_path, "--placement", "zero", "--fault", "interrupt")
    kept = tmp_path / "zero"
    evidence = json.loads((kept / "evidence.json").read_text())
    console = (kept / "console.log").read_text(errors="replace")
    assert "Unable to handle kernel instruction fetch" in console
    assert "Kernel panic" not in console.split("crashkernel: K1 is dead")[0], "an oops in an interrupt is enough"
    (registers,) = evidence["registers"]
    assert registers["nip"] == 0
    assert judge_kept(kept).passed
    # a dump with other registers than QEMU had is found out
    (kept / "evidence.json").write_text(json.dumps(evidence | {"registers": [registers | {"gpr1": registers["gpr1"] + 8}]}))
    assert any("no CPU has the registers" in problem for problem in judge_kept(kept).problems)


def test_memory_that_came_after_the_load_is_told_and_all_else_is_dumped(tmp_path):
    result = drill(tmp_path, "--placement", "reserved", "--fault", "memory-added")
    came = Range(1 << 30, (1 << 30) + (256 << 20))
    (fault,) = result["faults"]
    assert fault["expects"] == "told"
    assert str(came) in fault["told"]
    assert not LoadPlan.from_json(json.dumps(result["plan"])).memory.overlaps(came)
    assert result["bytes_compared"] == result["k1_bytes"] == (1 << 30) - (512 << 20)


def test_a_disk_that_fails_halfway_leaves_no_dump_and_the_network_takes_it(tmp_path):
    result = drill(tmp_path, "--placement", "zero", "--capture", "31", "--fault", "disk-failing:4M")
    assert result["bytes_missing"] == result["bytes_wrong"] == 0
    assert "the network took the dump" in result["faults"][0]["told"]
    console = (tmp_path / "zero" / "console.log").read_text(errors="replace")
    assert "I/O error, dev vda, sector" in console, "the disk did fail"
