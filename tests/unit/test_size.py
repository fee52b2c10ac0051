"""The search for the smallest reservation: on probes that are sharp, noisy and broken, and what a drill's result says."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.campaign.sizing import Trial, classify, find_smallest
from crashkernel.campaign.store import Result
from crashkernel.errors import EnvironmentFault, StageFailed, VerificationError

MIB = 1 << 20
STEP = 4 * MIB
# real ones: Debian 6.1 as K2 with too little, its console shortened to the lines about memory
REAL = json.loads((Path(__file__).parents[1] / "data" / "size-failures.json").read_text())
CEILING = 1024 * MIB


class Twin:
    """A probe: enough from `border` bytes on, K2 uses all of that but what it can spare."""

    def __init__(self, border, *, tells=True, findings=None):
        self.border, self.tells, self.findings = border, tells, findings or {}
        self.sizes = []

    def __call__(self, size):
        self.sizes.append(size)
        if queue := self.findings.get(size):
            return Trial(size, queue.pop(0), "as it was told")
        if size >= self.border:
            return Trial(size, "passed", spare=size - self.border if self.tells else None)
        return Trial(size, "too small", "Out of memory", spare=0 if self.tells else None)


sizes = st.integers(1, CEILING // MIB).map(lambda mib: mib * MIB)


@given(sizes, sizes, st.booleans(), st.sampled_from([STEP, 16 * MIB]), st.integers(0, 4))
def test_a_sharp_border_is_found_exactly(border, start, tells, step, confirmations):
    twin = Twin(border, tells=tells)
    found = find_smallest(twin, start, CEILING, step, confirmations)
    assert found.found == -(-border // step) * step
    assert found.failed == found.found - step
    assert found.passed == 1 + confirmations
    assert [trial.size for trial in found.trials] == twin.sizes
    assert all(size % step == 0 for size in twin.sizes)
    assert len(twin.sizes) <= 8 + confirmations + 2 * math.log2(CEILING / step)


@pytest.mark.parametrize("border", range(180, 260, 7))
def test_a_good_guess_costs_few_drills(border):
    """Nine at the most, with three repetitions, where the first size is within a fifth and K2 says what it had left."""
    twin = Twin(border * MIB)
    find_smallest(twin, border * MIB * 6 // 5, CEILING, STEP)
    assert len(twin.sizes) <= 9


@given(sizes, sizes, st.lists(st.integers(-24, 24), min_size=1, max_size=40))
def test_what_is_found_near_a_ragged_border_passed_every_time(border, start, noise):
    """The border moves by up to 24 MiB from drill to drill."""
    borders = iter(noise * 1000)

    def probe(size):
        finding = "passed" if size >= border + next(borders) * MIB else "too small"
        return Trial(size, finding, "Out of memory")

    try:
        found = find_smallest(probe, start, CEILING + 128 * MIB, STEP)
    except VerificationError:
        pytest.fail("the ceiling is above the border, wherever that moves")
    at_found = [trial for trial in found.trials if trial.size == found.found]
    assert len(at_found) == 4
    assert all(trial.passed for trial in at_found)
    assert not any(trial.size >= found.found for trial in found.trials if not trial.passed)
    assert found.failed == max((trial.size for trial in found.trials if not trial.passed), default=0)
    assert border - 24 * MIB <= found.found <= border + 28 * MIB + STEP


def test_a_failed_repetition_moves_up_and_begins_to_count_anew():
    twin = Twin(100 * MIB, findings={100 * MIB: ["passed", "passed", "too small"]})
    found = find_smallest(twin, 128 * MIB, CEILING, STEP)
    assert (found.found, found.failed, found.passed) == (104 * MIB, 100 * MIB, 4)


def test_one_unclear_failure_of_a_size_is_drilled_again_and_the_second_drill_counts():
    twin = Twin(100 * MIB, findings={100 * MIB: ["unclear", "passed"]})
    found = find_smallest(twin, 128 * MIB, CEILING, STEP)
    assert (found.found, found.passed, len(found.at_found)) == (100 * MIB, 4, 5)
    assert found.tightest.passed
    twin = Twin(100 * MIB, findings={100 * MIB: ["unclear", "unclear"]})
    found = find_smallest(twin, 128 * MIB, CEILING, STEP)
    assert (found.found, found.failed) == (104 * MIB, 100 * MIB)


@pytest.mark.parametrize(
    ("findings", "found", "drills"),
    [
        (["passed", "unclear", "passed", "passed", "passed"], 100, 5),
        (["unclear", "passed", "unclear"], 104, 4),
        (["passed", "passed", "unclear", "passed", "unclear"], 104, 4),
        (["passed", "unclear", "too small"], 104, 4),
    ],
)
def test_a_second_failure_while_a_size_is_confirmed_ends_it_clear_or_not(findings, found, drills):
    search = find_smallest(Twin(100 * MIB, findings={100 * MIB: findings}), 128 * MIB, CEILING, STEP)
    assert (search.found, search.passed, len(search.at_found)) == (found * MIB, 4, drills)
    assert search.failed == (found - 4) * MIB


def test_a_size_that_fails_every_other_time_is_never_found():
    """As a K2 does that hangs half the time: unclear, passed, unclear, passed."""
    twin = Twin(100 * MIB, findings={size * MIB: ["unclear", "passed"] * 20 for size in range(100, 140, 4)})
    search = find_smallest(twin, 128 * MIB, CEILING, STEP)
    assert search.found == 140 * MIB
    assert search.passed == len(search.at_found) == 4


def test_where_no_size_is_enough_the_last_reason_is_told():
    with pytest.raises(VerificationError, match=r"not even 1 GiB are enough: Out of memory") as caught:
        find_smallest(Twin(2 * CEILING), 100 * MIB, CEILING, STEP)
    assert "--memory" in caught.value.hint


def test_a_probe_that_raises_ends_the_search():
    def probe(_size):
        raise StageFailed("K1 boot", "no")

    with pytest.raises(StageFailed):
        find_smallest(probe, 100 * MIB, CEILING, STEP)


def test_each_drill_is_told_with_how_many_are_left():
    told = []
    find_smallest(Twin(100 * MIB), 128 * MIB, CEILING, STEP, tell=lambda trial, left: told.append((trial.size, left)))
    assert len(told) >= 6
    assert all(left > 0 for _, left in told[:-1])
    assert told[-1][1] == 0


def failed(stage, reason, console=""):
    return Result("FAIL", stage, reason, console=console)


K1_STARTS, K2_STARTS = "[    0.000000] Linux version 6.1.0 K1", "[    0.000000] Linux version 6.1.0 K2"


def test_a_drill_that_passed_is_no_failure():
    assert classify(Result("PASS")) == ("passed", "")


@pytest.mark.parametrize("name", REAL)
def test_k2s_that_lacked_memory_are_known_by_what_they_said(name):
    real = REAL[name]
    finding, reason = classify(failed(real["stage"], real["reason"], "\n".join(real["console"])))
    assert finding == "too small"
    assert reason.startswith(f"{real['stage']}: {real['reason']}")
    assert "\n" not in reason


def test_what_the_console_said_is_told_where_the_reason_does_not():
    _, reason = classify(failed("capture", "Killed", "\n".join(REAL["capture killed"]["console"])))
    assert reason == "capture: Killed (Out of memory)" or "oom-kill" in reason


@pytest.mark.parametrize(
    ("stage", "reason", "console"),
    [
        ("K2 boot", "K2 printed nothing for 60 s", ""),
        ("K2 boot", "the twin ended", f"{K1_STARTS}\n{K2_STARTS}\nInitramfs unpacking failed: write error"),
        ("capture", "MemoryError", ""),
        ("capture", "dd: exit 1: dd: out of memory", ""),
        ("capture", "cannot fork: Cannot allocate memory", ""),
        ("load", "K2 does not fit: the image of the capture kernel needs 44 MiB in one piece, 20 MiB left", ""),
    ],
)
def test_signs_of_too_little_memory(stage, reason, console):
    assert classify(failed(stage, reason, console))[0] == "too small"


@pytest.mark.parametrize(
    ("stage", "reason", "console"),
    [
        ("K2 boot", "not done after 300 s", f"{K1_STARTS}\n{K2_STARTS}\nall is well"),
        ("capture", "the guest says: no disk /dev/vda", ""),
        ("K2 boot", "the twin ended", f"{K1_STARTS}\n[    9.0] Out of memory: Killed process 1, in K1"),
    ],
)
def test_a_k2_that_does_not_speak_of_memory_is_unclear(stage, reason, console):
    assert classify(failed(stage, reason, console)) == ("unclear", f"{stage}: {reason}")


@pytest.mark.parametrize("stage", ["K1 boot", "load", "crash", "truth", "handover"])
def test_what_breaks_before_k2_says_nothing_of_its_memory(stage):
    with pytest.raises(StageFailed, match=f"{stage}: the twin ended") as caught:
        classify(failed(stage, "the twin ended", "Out of memory"))
    assert caught.value.exit_code == 1


def test_a_wrong_dump_is_never_taken_for_a_small_reservation():
    with pytest.raises(VerificationError, match="64 bytes are wrong"):
        classify(failed("verify", "64 bytes are wrong", f"{K1_STARTS}\n{K2_STARTS}\nOut of memory"))


@pytest.mark.parametrize("reason", ["not done after 1200 s", "killed by signal 9 (Killed)", "exit status 3: no QEMU"])
def test_a_drill_that_could_not_be_run_ends_the_search(reason):
    with pytest.raises(EnvironmentFault, match="could not be run"):
        classify(Result("ERROR", "K2 boot", reason, console=f"{K1_STARTS}\n{K2_STARTS}\nOut of memory"))


@given(st.sampled_from(["", "load", "K2 boot", "capture", "verify", "x"]), st.text(max_size=60), st.text(max_size=200))
def test_whatever_a_result_says_is_one_finding_or_one_error(stage, reason, console):
    try:
        finding, _ = classify(failed(stage, reason, console))
    except VerificationError:
        assert stage not in ("K2 boot", "capture")
    else:
        assert finding in ("too small", "unclear")
