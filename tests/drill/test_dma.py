"""A device that nobody stopped: what it does to K2 at zero, what the quarantine changes, and that it is harmless otherwise."""

import json
import subprocess

from drill_command import COMMAND

from crashkernel.memory import Range, RangeSet
from crashkernel.placement.plan import LoadPlan


def drill(tmp_path, placement, regions, *options):
    results = tmp_path / "results.json"
    done = subprocess.run(
        [*COMMAND, "drill", "--placement", placement, "--fault", f"dma:{regions}", *options, "--json", str(results)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    result = json.loads(results.read_text())["drills"][0]
    assert done.returncode == (0 if result["verdict"] == "PASS" else 1), done.stdout + done.stderr
    assert result["dma"]["writes"] > 100, done.stdout
    assert not result["dma"]["problem"]
    assert sum(result["dma"]["writes_by_page"].values()) == result["dma"]["writes"]
    return result, done.stdout


def ranges(texts):
    return RangeSet(Range(*(int(end, 16) for end in text.split("-"))) for text in texts)


def test_a_driver_s_buffers_in_freed_init_ruin_k2_at_zero(tmp_path):
    result, output = drill(tmp_path, "zero", "init", "--no-quarantine")
    (init,) = result["dma"]["regions"]
    freed = next(r.range for r in LoadPlan.from_json(json.dumps(result["plan"])).k1_layout if r.name == "K1 freed init")
    assert init["targets"], "K1 gives such pages out"
    assert not ranges(init["targets"]) - RangeSet([freed])
    assert result["verdict"] == "FAIL"
    assert result["failure"]["stage"] == "handover"
    assert "kernel DAMAGED" in result["dma"]["effect"]
    assert "dma: damage: the purgatory found the damage and did not enter K2" in output
    assert init["plan_had_said"]["verdict"] == "dangerous"


def test_the_same_buffers_are_harmless_where_k2_runs_in_its_region(tmp_path):
    result, output = drill(tmp_path, "reserved", "init+slack")
    assert result["verdict"] == "PASS", output
    init, _ = result["dma"]["regions"]
    # behind its image K1 may have eight free pages to give out, or none: that is luck
    assert init["targets"], "K1 gives such pages out"
    assert result["dma"]["writes_into_k2"] == 0
    assert result["dma"]["writes"] > 1000, "a device that writes as long as K2 lives"
    assert result["bytes_in_device_buffers"] > 10_000
    assert result["bytes_wrong"] == 0
    assert "dma: damage: none outside of the device's own buffers" in output


def test_with_the_quarantine_no_such_buffer_can_be_had_and_the_same_load_does_no_harm(tmp_path):
    result, output = drill(tmp_path, "zero", "init+slack")
    assert [region["targets"] for region in result["dma"]["regions"]] == [[], []], output
    plan = LoadPlan.from_json(json.dumps(result["plan"]))
    assert result["dma"]["pages_looked_at"] * result["dma"]["page_size"] > plan.k1_memory.total // 2
    elsewhere = ranges(result["dma"]["elsewhere"])
    assert elsewhere.total == 32 * result["dma"]["page_size"]
    assert not elsewhere & plan.exposed
    assert result["verdict"] == "PASS", output
    assert result["dma"]["writes_into_k2"] == 0
    assert result["dma"]["writes"] > 1000, "a device that writes as long as K2 lives"
    assert result["bytes_in_device_buffers"] > 10_000
    assert result["bytes_wrong"] == 0
