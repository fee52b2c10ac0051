"""The shipped purgatory, packed by the product, on a CPU and nothing else. See `support.bench`."""

import random

import pytest

from crashkernel.machine import HEAD_SIZE
from crashkernel.memory import Range
from crashkernel.placement import plan_load
from crashkernel.placement.moves import LINE, Copy, Exchange, Move, Put
from crashkernel.placement.plan import LoadPlan
from crashkernel.purgatory import MAX_MOVES
from support.bench import (
    ARENA,
    ARRIVED,
    CPUS,
    ENTRY,
    MIB,
    MSR_LE,
    PURGATORY,
    QUIET,
    RELEASED,
    START_BOX,
    TREE,
    Crash,
)
from support.machines import kernel, machine, memory_node, tree

pytestmark = pytest.mark.bench

BARE = ("970fx", "POWER8", "POWER9", "POWER10")
ENTRIES = [(name, False) for name in BARE] + [(name, True) for name in BARE if CPUS[name].little]
every_cpu = pytest.mark.parametrize("name", BARE)
every_entry = pytest.mark.parametrize(("name", "little"), ENTRIES, ids=lambda v: v if isinstance(v, str) else "BL"[v] + "E")
every_pair = pytest.mark.parametrize(
    ("name", "little"),
    [entry for entry in ENTRIES if CPUS[entry[0]].count > 1],
    ids=lambda v: v if isinstance(v, str) else "BL"[v] + "E",
)
IDLE = 1 << 20  # ticks


def random_moves(seed: int, count: int) -> tuple[Move, ...]:
    """Moves of one line to two MiB anywhere below the quiet part, the head included."""
    source = random.Random(seed)
    lines = QUIET // LINE
    moves: list[Move] = [Put(0, HEAD_SIZE)] if source.random() < 0.5 else []
    while len(moves) < count:
        size = source.choice((1, 2, 3, 8, 513, source.randrange(1, 2 * MIB // LINE)))
        one, other = source.randrange(lines - size), source.randrange(lines - size)
        if abs(one - other) >= size:
            kind = source.choice((Copy, Exchange))
            moves.append(kind(one * LINE, other * LINE, size * LINE))
        elif source.random() < 0.2:
            moves.append(Put(LINE * source.randrange(2), LINE))
    return tuple(moves)


def small_real_plan(placement: str, radix: bool, start: int) -> LoadPlan:
    """A plan as the product makes it, for a machine as big as the bench: its moves are the real ones."""
    root = tree(memory=[memory_node(0, 1024 * MIB)], region=Range(start, start + 512 * MIB), radix=radix, cpus=1)
    return plan_load(machine(root), kernel(MIB, MIB), 0, "", placement)


def scaled(plan: LoadPlan, factor: int) -> tuple[tuple[Move, ...], int]:
    """The plan's table with every address divided, but for the head, which has one size; and the entry."""
    moves: list[Move] = []
    for move in plan.moves:
        if isinstance(move, Put):
            moves.append(move)
        else:
            size = move.size // factor if move.size > HEAD_SIZE else move.size
            moves.append(type(move)(move.dst // factor, move.src // factor, size))
    return tuple(moves), plan.entry // factor


class TestMoves:
    @every_entry
    @pytest.mark.parametrize("seed", range(3))
    def test_random_tables(self, tmp_path, name, little, seed):
        moves = random_moves(seed * 100 + len(name) + little, 1 + 9 * seed)
        crash = Crash(CPUS[name], moves, little=little, slave_timeout=IDLE)
        with crash.run(tmp_path) as run:
            run.finish()
            run.check()

    @every_cpu
    def test_a_full_table(self, tmp_path, name):
        crash = Crash(CPUS[name], random_moves(7, MAX_MOVES))
        assert len(crash.moves) == MAX_MOVES
        with crash.run(tmp_path) as run:
            run.finish()
            run.check()

    @every_entry
    def test_no_moves_at_all(self, tmp_path, name, little):
        """K2 is entered where it lies; the head stays the purgatory's."""
        crash = Crash(CPUS[name], (), little=little)
        with crash.run(tmp_path) as run:
            run.finish()
            run.check()
            assert run.mapped[:HEAD_SIZE] == crash.purgatory()[:HEAD_SIZE]

    @pytest.mark.parametrize("size", [LINE, 2 * LINE, 3 * LINE, 0x10000, 4 * MIB])
    @pytest.mark.parametrize("kind", [Copy, Exchange])
    def test_sizes(self, tmp_path, kind, size):
        moves = (kind(LINE * 5, 5 * MIB + LINE, size), kind(9 * MIB + 3 * LINE, 0x4000, LINE))
        with Crash(CPUS["POWER8"], moves).run(tmp_path) as run:
            run.finish()
            run.check()

    def test_a_move_of_nothing_is_no_move(self, tmp_path):
        moves = (Copy(0x1000, 0x2000, 0), Exchange(0x1000, 0x2000, 0), Exchange(0x3000, 0x5000, LINE))
        with Crash(CPUS["POWER8"], moves).run(tmp_path) as run:
            run.finish()
            run.check()

    def test_neighbours(self, tmp_path):
        """Two stretches that touch, in both orders."""
        moves = (Exchange(0x10000, 0x20000, 0x10000), Copy(0x50000, 0x40000, 0x10000), Copy(0x60000, 0x70000, 0x10000))
        with Crash(CPUS["POWER8"], moves).run(tmp_path) as run:
            run.finish()
            run.check()

    def test_an_exchange_and_its_opposite(self, tmp_path):
        moves = (Put(0, HEAD_SIZE), Exchange(0, 6 * MIB, 3 * MIB), Exchange(6 * MIB, 0, 3 * MIB))
        crash = Crash(CPUS["POWER9"], moves)
        with crash.run(tmp_path) as run:
            run.finish()
            run.check()
            assert run.mapped[:HEAD_SIZE] == crash.head

    @every_entry
    @pytest.mark.parametrize("placement", ["zero", "reserved"])
    @pytest.mark.parametrize("radix", [True, False], ids=["radix", "hash"])
    def test_real_tables(self, tmp_path, name, little, placement, radix):
        """What the product plans, made smaller; K2's code waits where the plan loads it and runs where the plan enters it."""
        moves, entry = scaled(small_real_plan(placement, radix, 128 * MIB), 32)
        loaded = entry if placement == "reserved" else moves[1].src
        crash = Crash(CPUS[name], moves, entry=entry, k2_at=loaded, little=little, slave_timeout=IDLE)
        with crash.run(tmp_path) as run:
            registers = run.finish()
            run.check()
            assert registers["r4"] == entry
            # K2's slave code lies at absolute 0x60 in either placement
            assert run.mapped[0x60:0x80] == crash.memory[loaded + 0x60 : loaded + 0x80].tobytes()

    def test_at_full_scale(self, tmp_path):
        """The tables as planned for a real kernel's span reach beyond the arena; the lowest 4 MiB of one fit."""
        moves = (Put(0, HEAD_SIZE), Exchange(0, 5 * MIB, 5 * MIB))
        with Crash(CPUS["970fx"], moves, entry=0, k2_at=5 * MIB).run(tmp_path) as run:
            run.finish()
            run.check()


class TestContract:
    @every_entry
    def test_what_k2_is_entered_with(self, tmp_path, name, little):
        opal = (0x30000000, 0x300004E0)
        crash = Crash(CPUS[name], (Put(0, HEAD_SIZE),), little=little, ids=(0x28,), opal=opal)
        with crash.run(tmp_path) as run:
            registers = run.finish()
            run.check()
        assert registers["r3"] == TREE
        assert registers["r4"] == ENTRY
        assert registers["r5"] == 0, "not Open Firmware"
        assert (registers["r6"], registers["r7"]) == (0, 0)
        assert (registers["r8"], registers["r9"]) == opal
        assert not registers["msr"] & MSR_LE, "big-endian, whatever K1 was"
        assert registers["msr"] >> 63 == 1, "64-bit"
        assert not registers["msr"] & 0x8030, "no interrupts, no translation"

    @pytest.mark.parametrize("physical", [0, 1, 0x28, 0x7FF])
    def test_the_tree_names_the_cpu_that_enters(self, tmp_path, physical):
        with Crash(CPUS["POWER8"], (), ids=(physical,)).run(tmp_path) as run:
            run.finish()
            run.check()
            assert run.u32(TREE + 28) == physical

    @every_entry
    @pytest.mark.parametrize("base", [PURGATORY, 0x900000, 0x7F0000])
    def test_it_runs_wherever_it_lies(self, tmp_path, name, little, base):
        moves = (Put(0, HEAD_SIZE), Exchange(0x100000, 0x300000, 0x8000))
        with Crash(CPUS[name], moves, base=base, little=little).run(tmp_path) as run:
            run.finish()
            run.check()

    def test_an_unknown_operation_stops_it(self, tmp_path):
        """To guess would lose K1's memory: nothing after it is done, and K2 is not entered."""
        crash = Crash(CPUS["POWER8"], (Copy(0x1000, 0x2000, LINE), Copy(0x3000, 0x4000, LINE), Copy(0x5000, 0x6000, LINE)))
        crash.memory[PURGATORY + 0x880 + 0x27] = 3  # the second row's operation
        before = crash.memory.copy()
        with crash.run(tmp_path) as run:
            run.wait(lambda: run.mapped[0x1000:0x1080] == run.mapped[0x2000:0x2080], "the first move")
            with pytest.raises(pytest.fail.Exception, match="not seen"):
                run.finish(seconds=0.3)
            assert run.u32(RELEASED) == 0
            assert run.memory[0x3000:QUIET].tobytes() == before[0x3000:QUIET].tobytes()


class TestOtherCpus:
    """Two real CPUs where the machine has them (powernv); on the 970 the host plays the other one."""

    MOVES = (Put(0, HEAD_SIZE), Exchange(0, 6 * MIB, 2 * MIB))

    def crash(self, name, little=False, **settings) -> Crash:
        settings = {"ids": (0x18, 0x2), "comes": (True,), "slaves": 1, "slave_timeout": 1 << 40} | settings
        return Crash(CPUS[name], self.MOVES, entry=0, k2_at=6 * MIB, little=little, **settings)

    @every_pair
    def test_it_waits_is_counted_and_goes_to_k2(self, tmp_path, name, little):
        crash = self.crash(name, little, comes=(False,))
        with crash.run(tmp_path) as run:
            run.wait(lambda: run.u64(START_BOX) != 0, "the crashing CPU's way to the purgatory")
            with pytest.raises(pytest.fail.Exception, match="not seen"):
                run.finish(seconds=0.1)
            assert (run.memory[:QUIET] == crash.memory[:QUIET]).all(), "nothing moves while K1's other CPU is at large"
            assert (run.u32(ARRIVED), run.u32(RELEASED)) == (0, 0)
            run.release(1)
            run.finish()
            other = run.slave(0x2)
            assert run.u32(ARRIVED) == 1
            assert other["r3"] == 0x2
            assert not other["msr"] & MSR_LE
            run.check()

    @every_pair
    def test_it_arrives_first(self, tmp_path, name, little):
        crash = self.crash(name, little, master_comes=False)
        with crash.run(tmp_path) as run:
            run.wait(lambda: run.u32(ARRIVED) == 1, "the other CPU's arrival")
            with pytest.raises(pytest.fail.Exception, match="not seen"):
                run.finish(seconds=0.1)
            assert (run.memory[:QUIET] == crash.memory[:QUIET]).all()
            run.release(0)
            run.finish()
            run.slave(0x2)
            run.check()
            assert run.u32(ARRIVED) == 1

    @every_pair
    def test_one_that_never_comes_is_waited_for_no_longer_than_said(self, tmp_path, name, little):
        ticks = 100_000_000  # 0.2 s of a POWER server
        crash = self.crash(name, little, comes=(False,), slave_timeout=ticks)
        with crash.run(tmp_path) as run:
            registers = run.finish()
            waited = registers["timebase"] - run.u64(START_BOX)
            assert ticks <= waited < 20 * ticks
            assert run.u32(ARRIVED) == 0
            run.check()
            # and when it comes after all, it finds K2's own slave code at 0x60
            run.release(1)
            assert run.slave(0x2)["r3"] == 0x2
            assert run.u32(ARRIVED) == 0

    def test_more_than_were_counted_do_no_harm(self, tmp_path):
        crash = self.crash("POWER9", slaves=0, master_comes=False)
        with crash.run(tmp_path) as run:
            run.wait(lambda: run.u32(ARRIVED) == 1, "the other CPU's arrival")
            run.release(0)
            run.finish()
            run.slave(0x2)
            run.check()

    def test_a_timeout_of_nothing(self, tmp_path):
        crash = self.crash("POWER8", comes=(False,), slave_timeout=0)
        with crash.run(tmp_path) as run:
            run.finish()
            run.check()

    @pytest.mark.parametrize("ticks", [10_000_000])
    def test_the_970_waits_no_longer_than_said(self, tmp_path, ticks):
        crash = self.crash("970fx", ids=(0x18,), comes=(), slave_timeout=ticks)
        with crash.run(tmp_path) as run:
            registers = run.finish()
            assert ticks <= registers["timebase"] - run.u64(START_BOX) < 20 * ticks
            run.check()

    def test_the_970_waits_for_the_count(self, tmp_path):
        crash = self.crash("970fx", ids=(0x18,), comes=(), slaves=2)
        with crash.run(tmp_path) as run:
            run.wait(lambda: run.u64(START_BOX) != 0, "the crashing CPU's way to the purgatory")
            for arrived in (0, 1):
                run.mapped[ARRIVED : ARRIVED + 4] = arrived.to_bytes(4, "big")
                with pytest.raises(pytest.fail.Exception, match="not seen"):
                    run.finish(seconds=0.05)
                assert (run.memory[:QUIET] == crash.memory[:QUIET]).all()
            run.mapped[ARRIVED : ARRIVED + 4] = (2).to_bytes(4, "big")
            run.finish()
            run.check()

    def test_a_970_as_the_other_cpu(self, tmp_path):
        """It leaves page 0, counts itself, and stays until the host, in the crashing CPU's place, releases it to 0x60.

        There it finds the purgatory's slave entry again, for nothing was moved, and is counted again and again.
        """
        crash = Crash(CPUS["970fx"], (), ids=(0x3,), before=lambda code, _: code.load(3, 3).go_to(0x60))
        with crash.run(tmp_path) as run:
            run.wait(lambda: run.u32(ARRIVED) == 1, "the other CPU's arrival")
            with pytest.raises(pytest.fail.Exception, match="not seen"):
                run.wait(lambda: run.u32(ARRIVED) != 1, "anything", 0.1)
            run.mapped[RELEASED : RELEASED + 4] = (1).to_bytes(4, "big")
            run.wait(lambda: run.u32(ARRIVED) > 100, "the way through 0x60")


def test_the_arena_holds_what_the_tests_put_there():
    assert PURGATORY + 0x10000 <= TREE < ENTRY < ARENA
