"""The stepper, the counting of instructions, and kexec-tools' purgatory on the bench."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from crashkernel.bench.cpus import BARE, CPUS
from crashkernel.bench.instructions import Count, InstructionReport, count_instructions, floor, render_instructions
from crashkernel.bench.kexectools import KexecPurgatory, debian_kexec
from crashkernel.bench.stepper import MSR_LE, Stepper
from crashkernel.bench.stubs import Code
from crashkernel.errors import EnvironmentFault, FormatError, VerificationError

pytestmark = pytest.mark.bench

ARENA = 0x20000
START, DATA = 0x4000, 0x8000
every_cpu = pytest.mark.parametrize("name", BARE)


def put(stepper: Stepper, at: int, code: Code) -> None:
    data = bytes(code)
    stepper.memory[at : at + len(data)] = np.frombuffer(data, np.uint8)


def loop(times: int) -> Code:
    """Stores `times` doublewords; 4 + 3 * times instructions, then stands still."""
    code = Code().load(4, times).mtspr(9, 4).word(0x60000000)
    return code.label("again").std(3, 0, 5).addi(5, 5, 8).branch("again", "bdnz").stop()


class TestStepper:
    @every_cpu
    def test_it_steps_one_instruction_after_the_other(self, name):
        with Stepper.start(CPUS[name], ARENA) as stepper:
            put(stepper, START, loop(3))
            stepper.enter(START, physical=0x11, little=False)
            stepper.write({"r5": DATA})
            seen = [stepper.step() for _ in range(14)]
            head = START + 16
            wanted = [START + 4, START + 8, START + 12, *[head, head + 4, head + 8] * 3, head + 12, head + 12]
            assert seen == wanted
            assert stepper.memory[DATA : DATA + 24].tobytes() == (0x11).to_bytes(8, "big") * 3
            assert stepper.memory[DATA + 24 : DATA + 32].tobytes() == bytes(8)

    @every_cpu
    def test_a_state_is_restored_whole(self, name):
        """Disturbed anywhere, run to the end, restored: the rest goes as if nothing had been."""
        with Stepper.start(CPUS[name], ARENA) as stepper:
            put(stepper, START, loop(5))
            stepper.enter(START, physical=0x11, little=False)
            stepper.write({"r5": DATA, "cr": 0x12345678, "xer": 0x20000000, "lr": 0x1234, "srr0": 0x5678, "srr1": 0x9ABC})
            end = START + 28
            stepper.stop_at([end])
            untouched = stepper.save()
            assert stepper.run(30) == 0
            finished = stepper.save()
            assert finished.registers["pc"] == end
            stepper.restore(untouched)
            assert stepper.save() == untouched
            for _ in range(19):
                here = stepper.save()
                stepper.poke(START + 20, bytes(Code().addi(5, 5, 16)))
                stepper.write(dict.fromkeys(("r3", "r4", "cr", "lr", "srr0"), 0x77) | {"ctr": 2})
                assert stepper.run(30) == 0
                assert stepper.save() != finished
                stepper.restore(here)
                assert stepper.save() == here
                assert stepper.run(30) == 0
                assert stepper.save() == finished
                stepper.restore(here)
                stepper.step()

    @pytest.mark.parametrize("name", [name for name in BARE if CPUS[name].little])
    def test_registers_are_the_same_numbers_in_either_byte_order(self, name):
        with Stepper.start(CPUS[name], ARENA) as stepper:
            for little in (True, False, True):
                stepper.enter(START, physical=0x11, little=little)
                assert stepper.read("r3", "pc", "r4", "r5") == (0x11, START, START, 0)
                assert stepper.read("msr")[0] & MSR_LE == little

    def test_a_step_that_changes_the_byte_order(self):
        """rfid into big-endian code at once after little-endian."""
        with Stepper.start(CPUS["POWER9"], ARENA) as stepper:
            rfid = (0x4C000024).to_bytes(4, "little")
            stepper.memory[START : START + 4] = np.frombuffer(rfid, np.uint8)
            stepper.enter(START, physical=0x11, little=True)
            stepper.write({"srr0": DATA, "srr1": stepper.read("msr")[0] & ~MSR_LE})
            assert stepper.step() == DATA
            assert stepper.read("r3") == (0x11,)

    def test_what_was_executed_and_is_poked_is_executed_anew(self):
        with Stepper.start(CPUS["POWER9"], ARENA) as stepper:
            for number in range(3):
                stepper.poke(START, bytes(Code().load(3, 0x1000 + number).stop()))
                stepper.enter(START, physical=0, little=False)
                stepper.stop_at([START + 8])
                assert stepper.run(30) == 0
                assert stepper.read("r3") == (0x1000 + number,)

    def test_a_cpu_that_never_comes_to_a_stop(self):
        with Stepper.start(CPUS["POWER9"], ARENA) as stepper:
            put(stepper, START, Code().stop())
            stepper.enter(START, physical=0, little=False)
            stepper.stop_at([DATA])
            assert stepper.run(0.05) is None
            assert stepper.read("pc") == (START,)

    def test_the_first_access(self):
        with Stepper.start(CPUS["POWER9"], ARENA) as stepper:
            put(stepper, START, loop(5))
            stepper.enter(START, physical=0, little=False)
            stepper.write({"r5": DATA})
            assert stepper.run_to_access(DATA + 16)
            assert stepper.read("ctr") == (3,)
            assert not stepper.run_to_access(DATA + 0x1000, 0.1)

    def test_one_cpu_while_another_stands_still(self):
        with Stepper.start(CPUS["POWER9"], ARENA, count=2) as stepper:
            put(stepper, START, loop(5))
            put(stepper, DATA - 0x100, loop(5))
            for cpu, start in enumerate((START, DATA - 0x100)):
                stepper.enter(start, physical=cpu + 1, little=False, cpu=cpu)
                stepper.write({"r5": DATA + 0x100 * cpu}, cpu)
            stepper.stop_at([START + 28, DATA - 0x100 + 28])
            assert stepper.run(30, 1) == 1
            assert stepper.read("pc", cpu=0) == (START,)
            assert stepper.read("pc", "r3", cpu=1) == (DATA - 0x100 + 28, 2)
            assert not stepper.memory[DATA : DATA + 0x100].any()
            assert stepper.step(0) == START + 4
            assert stepper.run(30, 0) == 0
            assert stepper.read("r3", cpu=0) == (1,)


@pytest.fixture(scope="module")
def report() -> InstructionReport:
    return count_instructions(["POWER9"], with_kexec=False)


@pytest.fixture(scope="module")
def kexec() -> Path:
    try:
        return debian_kexec()
    except EnvironmentFault as fault:
        pytest.skip(str(fault))


class TestCounting:
    def test_every_row_is_linear(self, report):
        assert [count.what for count in report.rows] == ["exchange", "exchange AltiVec", "copy", "check"]
        assert all(count.exact for count in report.rows)

    def test_no_row_is_below_its_floor(self, report):
        """Else something was not counted."""
        for count in report.rows:
            if count.what != "check":
                assert count.per_byte > floor(count.what, 16 if "AltiVec" in count.what else 8)

    def test_the_goals(self, report):
        """As docs/benchmarks.md has them."""
        cost = {count.what: count.per_byte for count in report.rows}
        assert cost["exchange"] <= Fraction(11, 10) * floor("exchange", 8)
        assert cost["exchange AltiVec"] <= Fraction(12, 10) * floor("exchange", 16)

    def test_a_count_that_is_not_linear_is_told(self):
        crooked = Count("copy", "POWER9", (128, 256, 384), (100, 200, 301))
        assert not crooked.exact
        assert "not linear: 100, 200, 301" in render_instructions(InstructionReport((crooked,), None, None))

    def test_a_goal_that_is_missed_is_told(self):
        check = Count("check", "POWER9", (64, 128), (0, 640))
        for sha, word in ((49, "MISSED"), (50, "met")):
            report = InstructionReport((check,), Count("SHA-256", "POWER9", (64, 128), (0, 64 * sha)), None)
            assert report.check_ratio == Fraction(10, sha)
            assert word in render_instructions(report)


class TestKexecTools:
    def test_its_check_and_its_copy_are_counted(self, kexec):
        report = count_instructions([], kexec=kexec)
        assert report.sha256 is not None
        assert report.backup is not None
        assert report.sha256.exact
        assert report.backup.exact
        # SHA-256 has 64 rounds of some twenty operations for 64 bytes; the copy is of single bytes
        assert 20 < report.sha256.per_byte < 60
        assert report.backup.per_byte == 5

    def test_a_purgatory_whose_check_is_none_measures_nothing(self, kexec):
        """Where the check is switched off, a flipped bit passes: refused, not counted."""
        from crashkernel.bench import instructions

        purgatory = KexecPurgatory.from_program(kexec, 0x20000)
        image = purgatory.with_values({"skip_checks": b"\1\0\0\0"})
        blind = KexecPurgatory(purgatory.base, image, purgatory.symbols, purgatory.toc, purgatory.entry)
        with pytest.raises(VerificationError, match="flipped bit"):
            instructions._count_sha256(blind, 512)

    def test_it_runs_wherever_it_is_linked(self, kexec):
        one, other = (KexecPurgatory.from_program(kexec, base) for base in (0x20000, 0x7_1234_0000))
        assert len(one.image) == len(other.image)
        assert one.image != other.image
        assert {name for name in one.symbols if one.symbols[name] - one.base == other.symbols[name] - other.base} >= {
            "memcpy",
            "sha256_regions",
            "purgatory_start",
        }

    def test_a_program_without_one_is_refused(self, tmp_path):
        program = tmp_path / "kexec"
        program.write_bytes(b"\x7fELF\x02\x01\x01".ljust(64, b"\0") * 2)
        with pytest.raises(FormatError, match="no little-endian ppc64 purgatory"):
            KexecPurgatory.from_program(program, 0)
