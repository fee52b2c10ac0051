"""The shipped purgatory, packed by the product, on a CPU and nothing else (crashkernel.bench): one property at a time."""

import struct
from dataclasses import replace

import pytest

from crashkernel.bench.cpus import MIB
from crashkernel.bench.model import PURGATORY_SIZE
from crashkernel.bench.stubs import MSR_LE
from crashkernel.errors import StageFailed
from crashkernel.machine import HEAD_SIZE, Services
from crashkernel.placement.moves import LINE, MAX_MOVES, Copy, Exchange, Put
from crashkernel.purgatory import ARRIVED_OFFSET, MAGIC, RELEASED_OFFSET, TABLE_OFFSET
from support.bench import ENTRY, PURGATORY, QUIET, TREE, case, every_cpu, every_entry, every_pair, sealed

pytestmark = pytest.mark.bench


class TestMoves:
    @every_cpu
    def test_a_full_table(self, machine_of, name):
        moves = [Exchange(LINE * (5 + 3 * n), 5 * MIB + LINE * n, 2 * LINE) for n in range(MAX_MOVES)]
        assert machine_of(name).judge(case(moves)) == ()

    @every_entry
    def test_no_moves_at_all(self, machine_of, name, little):
        """K2 is entered where it lies; the head stays the purgatory's."""
        with machine_of(name).case(case(little=little)) as run:
            run.release(0)
            assert list(run.problems()) == []
            assert run.memory[:HEAD_SIZE].tobytes() == run.case.image[:HEAD_SIZE]

    @every_cpu
    @pytest.mark.parametrize("altivec", [False, True], ids=["registers", "AltiVec"])
    @pytest.mark.parametrize("size", [LINE, 2 * LINE, 3 * LINE, 0x10000, 4 * MIB])
    @pytest.mark.parametrize("kind", [Copy, Exchange])
    def test_sizes(self, machine_of, name, kind, size, altivec):
        moves = (kind(LINE * 5, 5 * MIB + LINE, size), kind(9 * MIB + 3 * LINE, 0x4000, LINE))
        assert machine_of(name).judge(case(moves, altivec=altivec)) == ()

    def test_a_row_of_less_than_a_line_is_no_move(self, machine_of):
        """The product makes no such row: the packed table is altered."""

        def change(image):
            for row, size in enumerate((0, LINE - 1)):
                struct.pack_into(">Q", image, TABLE_OFFSET + 0x100 * row + 0x18, size)

        real = Exchange(0x3000, 0x5000, LINE)
        altered = case((Copy(0x1000, 0x2000, LINE), Exchange(0x1000, 0x2000, LINE), real), alter=sealed(change))
        with machine_of("POWER8").case(altered) as run:
            run.release(0)
            run.finish()
            image = (PURGATORY, PURGATORY_SIZE)
            assert list(replace(run, case=case((real,))).wrong_memory(except_at=(image, (0, HEAD_SIZE)))) == []

    def test_neighbours(self, machine_of):
        """Two stretches that touch, in both orders."""
        moves = (Exchange(0x10000, 0x20000, 0x10000), Copy(0x50000, 0x40000, 0x10000), Copy(0x60000, 0x70000, 0x10000))
        assert machine_of("POWER8").judge(case(moves)) == ()

    def test_an_exchange_and_its_opposite(self, machine_of):
        moves = (Put(0, 0, HEAD_SIZE), Exchange(0, 6 * MIB, 3 * MIB), Exchange(6 * MIB, 0, 3 * MIB))
        assert machine_of("POWER9").judge(case(moves)) == ()

    @every_cpu
    def test_five_mib_to_zero(self, machine_of, name):
        moves = (Put(0, 0, HEAD_SIZE), Exchange(0, 5 * MIB, 5 * MIB))
        assert machine_of(name).judge(case(moves, entry=0, k2_at=5 * MIB)) == ()


class TestContract:
    @every_entry
    def test_what_k2_is_entered_with(self, machine_of, name, little):
        opal = (0x30000000, 0x300004E0)
        dead = case((Put(0, 0, HEAD_SIZE),), little=little, ids=(0x28,), services=Services(opal=opal))
        with machine_of(name).case(dead) as run:
            run.release(0)
            assert list(run.problems()) == []
            registers = run.finish()
        assert registers["r3"] == TREE
        assert registers["r4"] == ENTRY
        assert registers["r5"] == 0, "not Open Firmware"
        assert (registers["r6"], registers["r7"]) == (0, 0)
        assert (registers["r8"], registers["r9"]) == opal
        assert not registers["msr"] & MSR_LE, "big-endian, whatever K1 was"
        assert registers["msr"] >> 63 == 1, "64-bit"
        assert not registers["msr"] & 0x8030, "no interrupts, no translation"

    @pytest.mark.parametrize("physical", [0, 1, 0x28, 0x7FF])
    def test_the_tree_names_the_cpu_that_enters(self, machine_of, physical):
        machine = machine_of("POWER8")
        assert machine.judge(case(ids=(physical,))) == ()
        assert machine.u32(TREE + 28) == physical

    @every_entry
    @pytest.mark.parametrize("base", [PURGATORY, 0x900000, 0x7F0000])
    def test_it_runs_wherever_it_lies(self, machine_of, name, little, base):
        moves = (Put(0, 0, HEAD_SIZE), Exchange(0x100000, 0x300000, 0x8000))
        assert machine_of(name).judge(case(moves, base=base, little=little)) == ()

    def test_an_unknown_operation_stops_it(self, machine_of):
        """To guess would lose K1's memory: nothing after it is done, and K2 is not entered."""

        def change(image):
            image[TABLE_OFFSET + 0x100 + 7] = 9  # the second row's operation

        moves = (Copy(0x1000, 0x2000, LINE), Copy(0x3000, 0x4000, LINE), Copy(0x5000, 0x6000, LINE))
        with machine_of("POWER8").case(case(moves, alter=sealed(change))) as run:
            before = run.memory[0x3000:QUIET].tobytes()
            run.release(0)
            run.wait(lambda: run.memory[0x1000:0x1080].tobytes() == run.memory[0x2000:0x2080].tobytes(), "the first move")
            with pytest.raises(StageFailed, match="not seen"):
                run.finish(seconds=0.3)
            assert not run.released
            assert run.memory[0x3000:QUIET].tobytes() == before


class TestOtherCpus:
    """Two real CPUs where the machine has them (powernv); on the 970 the host plays the other one."""

    MOVES = (Put(0, 0, HEAD_SIZE), Exchange(0, 6 * MIB, 2 * MIB))

    def case(self, **settings):
        settings = {"ids": (0x18, 0x2), "slaves": 1, "slave_timeout": 1 << 40} | settings
        return case(self.MOVES, entry=0, k2_at=6 * MIB, **settings)

    @every_pair
    def test_it_waits_is_counted_and_goes_to_k2(self, machine_of, name, little):
        with machine_of(name, 2).case(self.case(little=little)) as run:
            before = run.memory[:QUIET].copy()
            run.release(0)
            run.wait(lambda: run.left["timebase"] != 0, "the crashing CPU's way to the purgatory")
            with pytest.raises(StageFailed, match="not seen"):
                run.finish(seconds=0.1)
            assert (run.memory[:QUIET] == before).all(), "nothing moves while K1's other CPU is at large"
            assert (run.arrived, run.released) == (0, False)
            run.release(1)
            assert list(run.problems()) == []
            assert run.arrived == 1
            other = run.slave(1)
            assert other["r3"] == 0x2
            assert not other["msr"] & MSR_LE

    @every_pair
    def test_it_arrives_first(self, machine_of, name, little):
        with machine_of(name, 2).case(self.case(little=little)) as run:
            before = run.memory[:QUIET].copy()
            run.release(1)
            run.wait(lambda: run.arrived == 1, "the other CPU's arrival")
            assert (run.memory[:QUIET] == before).all()
            run.release(0)
            assert list(run.problems()) == []
            assert run.arrived == 1

    @every_pair
    def test_one_that_never_comes_is_waited_for_no_longer_than_said(self, machine_of, name, little):
        ticks = 100_000_000  # 0.2 s of a POWER server
        with machine_of(name, 2).case(self.case(little=little, slave_timeout=ticks)) as run:
            run.release(0)
            registers = run.finish()
            waited = registers["timebase"] - run.left["timebase"]
            assert ticks <= waited
            assert run.arrived == 0
            assert list(run.wrong_memory()) == []
            # and when it comes after all, it finds K2's own slave code at 0x60
            run.release(1)
            assert run.slave(1)["r3"] == 0x2
            assert run.arrived == 0

    def test_more_than_were_counted_do_no_harm(self, machine_of):
        with machine_of("POWER9", 2).case(self.case(slaves=0)) as run:
            run.release(1)
            run.wait(lambda: run.arrived == 1, "the other CPU's arrival")
            run.release(0)
            assert list(run.problems()) == []

    def test_a_timeout_of_nothing(self, machine_of):
        with machine_of("POWER8", 2).case(self.case(slave_timeout=0)) as run:
            run.release(0)
            run.finish()
            assert list(run.wrong_memory()) == []

    def test_the_970_waits_no_longer_than_said(self, machine_of):
        ticks = 10_000_000
        with machine_of("970fx").case(self.case(ids=(0x18,), slave_timeout=ticks)) as run:
            run.release(0)
            assert run.finish()["timebase"] - run.left["timebase"] >= ticks
            assert list(run.wrong_memory()) == []

    def test_the_970_waits_for_the_count(self, machine_of):
        with machine_of("970fx").case(self.case(ids=(0x18,), slaves=2)) as run:
            before = run.memory[:QUIET].copy()
            run.release(0)
            run.wait(lambda: run.left["timebase"] != 0, "the crashing CPU's way to the purgatory")
            for count in (0, 1):
                self.count(run, count)
                with pytest.raises(StageFailed, match="not seen"):
                    run.finish(seconds=0.05)
                assert (run.memory[:QUIET] == before).all()
            self.count(run, 2)
            run.finish()
            assert list(run.wrong_memory()) == []

    def test_a_970_as_the_other_cpu(self, machine_of):
        """It leaves page 0, counts itself, and stays until the host, in the crashing CPU's place, releases it to 0x60.

        There it finds the purgatory's slave entry again, for nothing was moved, and is counted again and again.
        """
        other = case(ids=(0x3,), before=lambda code, _: code.load(3, 3).go_to(0x60))
        with machine_of("970fx").case(other) as run:
            run.release(0)
            run.wait(lambda: run.arrived == 1, "the other CPU's arrival")
            with pytest.raises(StageFailed, match="not seen"):
                run.wait(lambda: run.arrived != 1, "anything", 0.1)
            run.machine.write(run.case.base + RELEASED_OFFSET, MAGIC)
            run.wait(lambda: run.arrived > 100, "the way through 0x60")

    @staticmethod
    def count(run, arrived):
        run.machine.write(run.case.base + ARRIVED_OFFSET, (arrived << 32 | arrived).to_bytes(8, "big"))
