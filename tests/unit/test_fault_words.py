"""The drill's faults: their words, what goes together, what each needs of the twin, and that none passes on too little."""

import asyncio
import contextlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.cli import main
from crashkernel.drill.debian import Kernel
from crashkernel.drill.faults import FAULTS, KINDS, Ending, Running, fault_lines, parse_fault, parse_faults
from crashkernel.drill.qemu import Hardware, Wiring
from crashkernel.drill.record import outcome_record
from crashkernel.drill.request import DrillRequest, Supplies
from crashkernel.drill.scenario import Outcome, Scenario
from crashkernel.drill.stages import GuestSaidNo
from crashkernel.drill.verdict import Verdict
from crashkernel.errors import StageFailed, UsageError
from crashkernel.memory import Range
from crashkernel.purgatory import PARAMETERS_OFFSET, STATE_OFFSET
from support.cores import PID, memory_of, tiny_plan, truth_of

WORDS = {
    "cpu-added": ("cpu-added", "cpu-added:refresh"),
    "memory-added": ("memory-added", "memory-added:refresh"),
    "stuck-cpu": ("stuck-cpu",),
    "secondary": ("secondary",),
    "interrupt": ("interrupt",),
    "oops": ("oops:vfs_write", "oops:__x64.part.0"),
    "nmi": ("nmi", "nmi:handover"),
    "memory-pressure": ("memory-pressure",),
    "panic-notifier": ("panic-notifier",),
    "double": ("double", "double:crash_save_cpu"),
    "flip": ("flip:kernel", "flip:initrd", "flip:fdt", "flip:elfcorehdr", "flip:purgatory"),
    "dma": ("dma:init", "dma:init+data,rate=5", "dma:image,when=k2,rate=7"),
    "disk-gone": ("disk-gone", "disk-gone:alone"),
    "disk-failing": ("disk-failing", "disk-failing:8M", "disk-failing:8M,alone", "disk-failing:alone"),
    "disk-slow": ("disk-slow", "disk-slow:8M"),
    "network-gone": ("network-gone", "network-gone:alone"),
    "k2-oom": ("k2-oom", "k2-oom:4M"),
}
"""For each fault, words that name it."""
TAKEN = "[ 0.0] Linux version 6\n[ 0.0] Linux version 6\n[ 3.0] the drill takes K2's memory\n"
"""A console on which `k2-oom` has begun."""
GOOD = Verdict(
    k1_bytes=4 << 20,
    bytes_compared=4 << 20,
    first_256_bytes_ok=True,
    nonce_found=True,
    panic_found=True,
    registers_ok=True,
)
BAD = replace(GOOD, bytes_wrong=1)


def request_for(*words: str, **options) -> DrillRequest:
    """A drill in which these words make sense."""
    needs = {"smp": 2} if {"stuck-cpu", "secondary"} & set(words) else {}
    if any(word.startswith(("network-gone", "k2-oom")) for word in words):
        needs["capture"] = 31
    if any(word.startswith("network-gone") for word in words):
        needs["capture_to"] = "network"
    return DrillRequest(fault=words, **(needs | options))


def the_fault(*words: str, **options):
    (fault,) = parse_faults(request_for(*words, **options))
    return fault


def failed(stage: str, message: str = "it did") -> StageFailed:
    return StageFailed(stage, message)


class TestWords:
    def test_every_fault_has_words_here(self):
        assert WORDS.keys() == FAULTS.keys()

    @pytest.mark.parametrize("word", [word for words in WORDS.values() for word in words])
    def test_a_word_names_its_fault_and_is_its_name_again(self, word):
        fault = the_fault(word)
        assert fault.word == word
        assert fault.name == word.partition(":")[0]
        assert fault.kind in KINDS
        assert fault.title
        assert "\n" not in fault.title
        assert fault.expects in ("dump", "told")
        assert fault.told == "", "nothing has been seen yet"
        assert DrillRequest.from_options(request_for(word).options()).fault == (word,)

    @pytest.mark.parametrize(
        ("word", "says"),
        [
            ("gremlin", "'gremlin' is no fault"),
            ("", "'' is no fault"),
            ("Nmi", "'Nmi' is no fault"),
            ("stuck-cpu:1", "takes no argument"),
            ("flip", "needs an argument"),
            ("flip:heap", "nothing of that name is loaded"),
            ("oops", "needs an argument"),
            ("oops:rm -rf", "no function of a kernel has that name"),
            ("oops:$(reboot)", "no function of a kernel has that name"),
            ("double:a b", "no function of a kernel has that name"),
            ("nmi:twice", "it comes to K1, or to the handover"),
            ("cpu-added:again", "only a refresh may follow"),
            ("memory-added:1G", "only a refresh may follow"),
            ("disk-gone:yes", "it is the only target or not"),
            ("network-gone:yes", "it is the only target or not"),
            ("disk-failing:8M,yes", "is not understood"),
            ("disk-failing:much", "much"),
            ("disk-slow:1", "less than 1 MiB a second"),
            ("k2-oom:little", "little"),
        ],
    )
    def test_a_word_that_is_none(self, capsys, word, says):
        assert main(["drill", "--capture", "31", "--fault", word]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1

    @given(st.text(max_size=30))
    def test_any_text_is_a_fault_or_a_usage_error(self, text):
        with contextlib.suppress(UsageError):
            assert parse_fault(text).word == text

    def test_choices_are_named(self):
        with pytest.raises(UsageError) as caught:
            parse_fault("gremlin")
        assert all(name in caught.value.hint for name in FAULTS)

    def test_a_fault_lives_for_one_drill(self):
        request = request_for("nmi")
        first, second = parse_faults(request), parse_faults(request)
        first[0].told = "seen"
        assert second[0].told == ""

    def test_all_are_listed_with_what_they_do(self):
        text = "\n".join(fault_lines())
        assert all(fault.pattern() in text for fault in FAULTS.values())
        assert all(when in text for when in KINDS.values())
        assert max(map(len, fault_lines())) <= 112


class TestTogether:
    def test_they_act_in_their_order(self):
        request = request_for("disk-slow", "dma:init", "interrupt", "stuck-cpu")
        assert [fault.name for fault in parse_faults(request)] == ["stuck-cpu", "interrupt", "dma", "disk-slow"]

    @pytest.mark.parametrize(
        ("words", "options", "says"),
        [
            (("nmi", "interrupt"), {}, "both of 'how K1 dies'"),
            (("nmi", "nmi"), {}, "both of 'how K1 dies'"),
            (("flip:kernel", "dma:init"), {}, "what was seen would tell of neither"),
            (("disk-gone", "disk-slow"), {}, "both of 'what K2 meets'"),
            (("cpu-added", "memory-added"), {}, "both of 'after the load'"),
            (("memory-added", "flip:kernel"), {}, "each keep a dump from being whole"),
            (("double", "disk-gone"), {}, "each keep a dump from being whole"),
            (("secondary",), {"smp": 1}, "needs a second CPU"),
            (("stuck-cpu",), {"smp": 1}, "needs a second CPU"),
            (("stuck-cpu", "secondary"), {}, "a CPU that is stuck does not crash"),
            (("cpu-added",), {"machine": "powernv9"}, "nothing can be plugged into powernv9"),
            (("memory-added",), {"machine": "powernv10", "cpu": "POWER10"}, "nothing can be plugged into powernv10"),
            (("memory-added",), {"memory": "1536M"}, "behind 1536M is a hole"),
            (("flip:fdt",), {"capture": 31}, "there is no dump to capture"),
            (("nmi:handover",), {"capture": 31}, "there is no dump to capture"),
            (("disk-gone",), {"capture": 31, "capture_to": "network"}, "the dump goes to the network"),
            (("disk-failing",), {"capture": 31, "capture_to": "network"}, "the dump goes to the network"),
            (("disk-slow",), {"capture": 31, "capture_to": "network"}, "the dump goes over the network"),
            (("network-gone",), {"capture_to": "disk"}, "the dump goes to the disk"),
            (("network-gone",), {"capture": None}, "the dump goes to the disk"),
            (("k2-oom",), {"capture": None}, "a raw copy needs no memory to speak of"),
            (("disk-slow:1M",), {"memory": "1G"}, "a raw copy of 1G takes 1,024 s"),
            (("k2-oom", "cpu-added"), {}, "with fault k2-oom there is no dump, and without one nobody sees what cpu-added did"),
            (("disk-gone:alone", "secondary"), {"capture": 31}, "nobody sees what secondary did"),
            (("disk-gone", "dma:init"), {}, "nobody sees what dma:init did"),
            (("flip:initrd", "stuck-cpu"), {"smp": 2}, "nobody sees what stuck-cpu did"),
            (("double", "disk-slow"), {}, "nobody sees what disk-slow did"),
            (("nmi:handover", "disk-slow"), {}, "nobody sees what disk-slow did"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, words, options, says):
        with pytest.raises(UsageError, match=re.escape(says)):
            parse_faults(request_for(*words, **options))

    @pytest.mark.parametrize(
        ("word", "options", "expects"),
        [
            ("disk-gone", {}, "told"),
            ("disk-gone", {"capture": 31}, "dump"),
            ("disk-gone:alone", {"capture": 31}, "told"),
            ("disk-failing", {"capture": 31}, "dump"),
            ("disk-failing:4M,alone", {"capture": 31}, "told"),
            ("network-gone", {}, "dump"),
            ("network-gone:alone", {}, "told"),
            ("memory-added", {}, "told"),
            ("memory-added:refresh", {}, "dump"),
            ("nmi", {}, "dump"),
            ("nmi:handover", {}, "told"),
        ],
    )
    def test_what_is_expected(self, word, options, expects):
        fault = the_fault(word, **options)
        assert fault.expects == expects
        if fault.kind == "k2":
            assert fault.fallback == (expects == "dump")

    @pytest.mark.parametrize(
        ("words", "options"),
        [
            (("flip:initrd", "memory-pressure"), {}),  # K1 tells of the one, the purgatory of the other
            (("disk-gone", "panic-notifier"), {}),
            (("disk-gone", "secondary"), {"capture": 31}),  # another target has the dump
            (("memory-added", "secondary", "disk-slow"), {}),  # words, and a dump that is right but for them
            (("nmi", "disk-failing"), {"capture": 31}),
        ],
    )
    def test_what_is_seen_all_the_same_goes_together(self, words, options):
        assert len(parse_faults(request_for(*words, **options))) == len(words)


class TestTwin:
    """What each fault needs of the hardware."""

    @pytest.mark.parametrize(
        ("word", "hardware"),
        [
            ("nmi", Hardware()),
            ("cpu-added", Hardware(cpus_to_come=1)),
            ("memory-added", Hardware(memory_to_come=256 << 20)),
            ("panic-notifier", Hardware(outlives_panic=True, kernel_options=("crash_kexec_post_notifiers",))),
            ("disk-gone", Hardware(disk=False)),
            ("disk-failing", Hardware(bad_sector=16 << 20)),
            ("disk-failing:4M,alone", Hardware(bad_sector=4 << 20)),
            ("disk-slow:8M", Hardware(disk_rate=8 << 20)),
            ("network-gone", Hardware()),
        ],
    )
    def test_hardware(self, word, hardware):
        assert the_fault(word).hardware(Hardware()) == hardware

    def test_one_adds_to_the_other(self):
        hardware = Hardware(network=True, kernel_options=("quiet",))
        for fault in parse_faults(request_for("panic-notifier", "disk-slow", "cpu-added")):
            hardware = fault.hardware(hardware)
        assert hardware == Hardware(
            network=True,
            disk_rate=16 << 20,
            cpus_to_come=1,
            outlives_panic=True,
            kernel_options=("quiet", "crash_kexec_post_notifiers"),
        )

    def test_k2_s_memory_is_taken_before_anything_is_saved(self):
        assert "[ $left -gt 4096 ]" in the_fault("k2-oom:4M").k2_script
        assert not the_fault("nmi").k2_script


class TestFlip:
    @pytest.mark.parametrize("placement", ["zero", "reserved"])
    @given(seed=st.integers(0, 1 << 32), content=st.sampled_from(["kernel", "fdt", "elfcorehdr", "purgatory"]))
    def test_it_hits_what_is_checked_of_that_segment(self, placement, seed, content):
        plan = tiny_plan(placement)
        at, bit = parse_fault(f"flip:{content}", seed).place(plan)
        segment = plan.segment(content).range
        if content == "purgatory":
            segment = Range(segment.start + PARAMETERS_OFFSET, segment.start + STATE_OFFSET)
        elif content == "kernel":
            segment = Range.sized(segment.start, plan.kernel_span)
        assert at in segment
        assert 0 <= bit < 8
        assert parse_fault(f"flip:{content}", seed).place(plan) == (at, bit), "the same for the same seed"

    def test_seeds_differ(self):
        plan = tiny_plan()
        places = {parse_fault("flip:kernel", seed).place(plan) for seed in range(50)}
        assert len(places) == 50


class TestFlipSeen:
    """Which lines of the purgatory's a flipped bit is seen by."""

    def words(self, content, policy, tmp_path, *lines):
        class Machine:
            wiring = Wiring(tmp_path)
            console = lines

            def __init__(self):
                self.spoke = asyncio.Event()
                self.spoke.set()

        (tmp_path / "console.log").write_text("".join(f"{line}\n" for line in lines))

        async def within(seconds):
            async with asyncio.timeout(seconds):
                return await parse_fault(f"flip:{content}")._words(Machine(), policy)

        return asyncio.run(within(0.05))

    @pytest.mark.parametrize(
        ("content", "policy", "line"),
        [
            ("kernel", "reboot", "crashkernel: 9/12 check 0x1000-0x2000: kernel DAMAGED, rebooting"),
            ("kernel", "halt", "crashkernel: 11/12 check 0x0-0x1000: kernel DAMAGED, halted"),
            ("initrd", "continue", "crashkernel: 8/12 check 0x0-0x1000: initrd DAMAGED, going on as told"),
            ("purgatory", "reboot", "crashkernel: the purgatory itself is DAMAGED, rebooting"),
            ("purgatory", "continue", "crashkernel: the purgatory itself is DAMAGED, halted"),
        ],
    )
    def test_its_own(self, tmp_path, content, policy, line):
        assert self.words(content, policy, tmp_path, "crashkernel: K1 is dead", line) == line

    @pytest.mark.parametrize(
        ("content", "policy", "line"),
        [
            ("kernel", "reboot", "crashkernel: 8/12 check 0x0-0x1000: initrd DAMAGED, rebooting"),
            ("kernel", "reboot", "crashkernel: the purgatory itself is DAMAGED, rebooting"),
            ("kernel", "reboot", "crashkernel: 9/12 check 0x1000-0x2000: kernel DAMAGED, going on as told"),
            ("kernel", "halt", "crashkernel: 9/12 check 0x1000-0x2000: kernel ok"),
            ("purgatory", "continue", "crashkernel: the purgatory itself is DAMAGED, going on as told"),
        ],
    )
    def test_no_other(self, tmp_path, content, policy, line):
        with pytest.raises(TimeoutError):
            self.words(content, policy, tmp_path, line)

    def test_k2_was_entered(self, tmp_path):
        with pytest.raises(GuestSaidNo, match="a bit of the kernel was flipped, and K2 was entered"):
            self.words("kernel", "reboot", tmp_path, "crashkernel: 12/12 enter K2 at 0x0")


class TestWhatTheVerdictIsToFind:
    @pytest.fixture
    def truth(self, tmp_path):
        plan = tiny_plan()
        return truth_of(plan, memory_of(plan), tmp_path)

    def test_a_stuck_cpu_s_registers_are_wanted_as_they_were(self, truth):
        fault = the_fault("stuck-cpu")
        fault._registers = {"nip": 0x2000, "gpr1": 7, "gpr13": 8, "msr": 9}
        seen = fault.judged_by(replace(truth, registers=({"nip": 1},)))
        assert seen == replace(truth, registers=({"nip": 1}, {"nip": 0x2000, "gpr1": 7}))

    def test_but_not_of_one_that_k1_gave_up(self, truth):
        fault = the_fault("stuck-cpu")
        fault._given_up = "ERROR: 1 cpu(s) not responding"
        assert fault.judged_by(truth) == replace(truth, cpus=truth.cpus - 1)

    def test_a_cpu_that_came(self, truth):
        assert the_fault("cpu-added").judged_by(truth).cpus == truth.cpus + 1

    def test_memory_that_came_is_k1_s_only_after_a_refresh(self, truth):
        assert the_fault("memory-added").judged_by(truth) == truth
        with_it = the_fault("memory-added:refresh").judged_by(truth)
        assert with_it.memory_size == truth.memory_size + (256 << 20)

    def test_a_system_reset_is_without_a_word(self, truth):
        seen = the_fault("nmi").judged_by(truth)
        assert (seen.panic, seen.says_why, seen.crashed_pid) == ("", False, None)

    def test_what_happens_in_the_handover_changes_nothing(self, truth):
        assert the_fault("nmi:handover").judged_by(truth) == truth

    def test_memory_pressure_is_init_s_own_crash(self, truth):
        assert the_fault("memory-pressure").judged_by(truth).crashed_pid == PID


class TestConclusions:
    """A stage that fails is excused for the words that a fault is about, and for nothing else."""

    dead = "[   10.000000] Kernel panic - not syncing: sysrq triggered crash\n"
    oops = "[   10.100000] BUG: Unable to handle kernel instruction fetch (NULL pointer?)\n"
    again = "[   11.000000] Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b\n"

    @pytest.mark.parametrize("word", [word for words in WORDS.values() for word in words])
    @pytest.mark.parametrize("stage", ["K1 boot", "load", "fault", "verify", "handover"])
    def test_no_fault_excuses_what_is_not_its_own(self, word, stage):
        fault = the_fault(word)
        assert not fault.conclude(Ending("", {}, failure=failed(stage)))

    def double(self):
        fault = the_fault("double")
        fault._registers = {"nip": 0}
        return fault

    def test_a_double_crash_is_told_by_its_second_panic(self):
        fault = self.double()
        assert fault.conclude(Ending(self.dead + self.oops + self.again, {}, failure=failed("crash")))
        assert "Attempted to kill init!" in fault.told

    @pytest.mark.parametrize(
        ("console", "stage"),
        [
            (dead + oops, "crash"),
            (dead + again, "crash"),
            (dead + oops + again + "crashkernel: K1 is dead, its purgatory is whole\n", "crash"),
            (dead + oops + again, "handover"),
        ],
    )
    def test_a_double_crash_that_is_none(self, console, stage):
        fault = self.double()
        assert not fault.conclude(Ending(console, {}, failure=failed(stage)))
        assert not fault.told

    @pytest.mark.parametrize(
        ("console", "told"),
        [
            (
                dead + oops + again,
                "K1 faulted after its panic, and panicked again as 'Kernel panic - not syncing: Attempted to ",
            ),
            (dead + oops, "K1 faulted after its panic, and went to K2"),  # as on bare metal
            (dead, ""),
            (oops + dead, ""),
            (dead + "[    0.000000] Linux version 6.1\n" + oops, ""),  # K2's own
        ],
    )
    def test_a_notifier_that_faulted(self, console, told):
        fault = the_fault("panic-notifier")
        fault.conclude(Ending(console, {}, verdict=GOOD))
        assert not fault.told, "it was not tripped"
        fault._registers = {"nip": 0}
        fault.conclude(Ending(console, {}, verdict=GOOD))
        assert fault.told.startswith(told)
        assert bool(fault.told) == bool(told)

    def test_a_double_crash_that_never_was_tripped(self):
        fault = the_fault("double")
        assert not fault.conclude(Ending(self.dead + self.oops + self.again, {}, failure=failed("crash")))

    @pytest.mark.parametrize(
        ("word", "message", "excused"),
        [
            ("disk-gone", "the guest says: no disk /dev/vda", True),
            ("disk-gone", "the guest says: insmod virtio_blk: exit 1", False),
            ("disk-failing", "the guest says: dd: exit 1: dd: error writing '/dev/vda': Input/output error", True),
            ("disk-failing", "device /dev/vda: Input/output error", True),
            ("disk-failing", "not done after 900 s", False),
            ("disk-failing", "the guest says: dd: exit 1: dd: error reading '/proc/vmcore': Input/output error", False),
            ("disk-failing", "the guest says: no disk /dev/vda", False),
            ("network-gone:alone", "no target took the dump: http://10.0.2.2:4/: timed out", True),
            ("network-gone:alone", "the twin ended", False),
            ("network-gone:alone", "eth0: 10.0.2.20 is in use", False),
        ],
    )
    def test_a_lost_target_must_be_named(self, word, message, excused):
        fault = the_fault(word)
        assert fault.conclude(Ending("", {}, failure=failed("capture", message))) == excused
        assert fault.told == (f"no dump: {message}" if excused else "")

    @pytest.mark.parametrize("word", ["disk-gone", "disk-failing", "network-gone"])
    def test_with_another_target_no_failure_is_excused(self, word):
        fault = the_fault(word, capture=31)
        assert not fault.conclude(Ending("", {}, failure=failed("capture", "/dev/vda 10.0.2.2 Input/output error")))
        assert not fault.told
        assert not fault.conclude(Ending("", {"capture": 4.0}, verdict=BAD))
        assert not fault.told
        assert not fault.conclude(Ending("", {"capture": 4.0}, verdict=GOOD))
        assert fault.told

    def test_k2_without_memory_must_say_so(self):
        starts = "[    0.000000] Linux version 6.1.0\n"
        taken = starts + starts + "[    3.000000] the drill takes K2's memory\n"
        killed = "[    9.000000] Out of memory: Killed process 77 (python3.11)\n"
        fault = the_fault("k2-oom")
        assert fault.conclude(Ending(taken + killed, {}, failure=failed("capture", "the guest says: 137")))
        assert fault.told == "the guest says: 137; Out of memory: Killed process 77 (python3.11)"
        python = "the guest says: MemoryError"
        assert the_fault("k2-oom").conclude(Ending(taken, {}, failure=failed("capture", python)))
        assert not the_fault("k2-oom").conclude(Ending(taken + killed, {}, verdict=GOOD))
        # it was short of memory before anybody took any, or in another stage
        for console in (starts + starts + killed, starts + killed + taken):
            assert not the_fault("k2-oom").conclude(Ending(console, {}, failure=failed("capture", "the guest says: 137")))
        assert not the_fault("k2-oom").conclude(Ending(taken + killed, {}, failure=failed("K2 boot", "the guest says: 137")))

    @pytest.mark.parametrize(
        ("console", "message"),
        [
            (TAKEN, "not done after 900 s"),
            # K1's own, as with memory-pressure
            (TAKEN.replace("6\n", "6\n[ 9.0] Out of memory: Killed process 7\n", 1), "not done after 900 s"),
            (TAKEN, "K2 was silent for 75 s; its last line: Freeing unused kernel image (initmem) memory: 6400K"),
        ],
    )
    def test_not_every_word_of_memory_will_do(self, console, message):
        fault = the_fault("k2-oom")
        assert not fault.conclude(Ending(console, {}, failure=failed("capture", message)))
        assert not fault.told

    @pytest.mark.parametrize(
        ("took", "writes", "told"),
        [
            (4.0, (64 << 20, 4.0), True),
            (1.0, (64 << 20, 4.0), False),  # all of it was faster than the disk can be
            (9.0, (64 << 20, 4.0), False),  # the disk was not what it took its time for
            (60.0, (64 << 20, 1.0), False),  # K2 was so slow that it never waited for the disk
            (4.0, (0, 0.0), False),
        ],
    )
    def test_a_slow_disk_that_nobody_waited_for_shows_nothing(self, took, writes, told):
        class Machine:
            async def disk_writes(self):
                return writes

        fault = the_fault("disk-slow")
        asyncio.run(fault.saved(Running(DrillRequest(), None, Machine(), None, None)))
        fault.conclude(Ending("", {"capture": took}, verdict=BAD))
        assert not fault.told
        fault.conclude(Ending("", {"capture": took}, verdict=GOOD))
        assert bool(fault.told) == told

    def test_memory_that_came_must_have_been_named_by_status(self):
        for said, told in ((("256 MiB of memory came at 0x80000000-0x90000000",), True), (("a CPU came",), False)):
            fault = the_fault("memory-added")
            fault._where, fault._said = Range(0x80000000, 0x90000000), said
            fault.conclude(Ending("", {}, verdict=BAD))
            assert not fault.told
            fault.conclude(Ending("", {}, verdict=GOOD))
            assert bool(fault.told) == told


class TestOutcome:
    """When a drill with faults passes."""

    def outcome(self, word, *, told="", verdict=None, failure=None):
        kernel = Kernel("test", "6.1", None, None)
        request = request_for(word) if word else DrillRequest()
        outcome = Outcome(Scenario(request, Supplies(kernel, kernel, None)), parse_faults(request), verdict=verdict)
        outcome.failure = failure
        for fault in outcome.faults:
            fault.told = told
        return outcome

    @pytest.mark.parametrize(
        ("word", "told", "verdict", "failure", "passes"),
        [
            ("", "", GOOD, None, True),
            ("", "", None, None, False),
            ("", "", BAD, None, False),
            ("nmi", "", GOOD, None, False),
            ("nmi", "seen", GOOD, None, True),
            ("nmi", "seen", None, None, False),
            ("nmi", "seen", BAD, None, False),
            ("flip:initrd", "initrd DAMAGED", None, None, True),
            ("flip:initrd", "", None, None, False),
            ("flip:initrd", "initrd DAMAGED", None, failed("damage"), False),
            ("disk-gone", "", GOOD, None, False),
            ("disk-gone", "no dump", None, None, True),
            ("memory-added", "256 MiB came", GOOD, None, True),
            ("memory-added", "256 MiB came", BAD, None, False),
            ("memory-added", "", GOOD, None, False),
        ],
    )
    def test_when(self, word, told, verdict, failure, passes):
        assert self.outcome(word, told=told, verdict=verdict, failure=failure).passed == passes

    def test_the_record_has_them(self):
        record = outcome_record(self.outcome("flip:initrd", told="initrd DAMAGED"))
        assert record["faults"] == [
            {
                "word": "flip:initrd",
                "title": "one bit of the initrd is flipped",
                "expects": "told",
                "told": "initrd DAMAGED",
            }
        ]
        assert record["verdict"] == "PASS"
        assert record["command"] == "crashkernel drill --placement=zero --fault=flip:initrd"
        assert outcome_record(self.outcome(""))["faults"] == []


def test_every_fault_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert sorted({named_in(row) for row in rows} & set(FAULTS)) == sorted(FAULTS)


def named_in(row: str) -> str:
    """The name of the fault that a row of the table is about."""
    return re.split(r"[:\[`]", row.removeprefix("| `"))[0]
