"""Generated plans, a few hundred for each CPU; and that the bench sees what is wrong with a purgatory."""

from dataclasses import replace

import pytest

from crashkernel.bench.cpus import MIB
from crashkernel.bench.plans import KINDS, VECTORS, CaseName
from crashkernel.bench.stubs import TOP
from crashkernel.placement.moves import LINE, Check, Copy, Exchange, Put
from crashkernel.purgatory import LOADED_AT_OFFSETS
from support.bench import case, every_entry, every_pair, sealed

pytestmark = pytest.mark.bench

SEED = 2005
CODE_OFFSET = 0x1000  # AT_CODE in purgatory.S
CASES = 32  # of each kind


@every_entry
@pytest.mark.parametrize("kind", KINDS)
def test_pass(machine_of, name, little, kind):
    names = [CaseName(name, little, kind, number) for number in range(CASES)]
    machine = machine_of(name)
    assert {str(n): p for n in names if n.cpus == 1 and (p := machine.judge(n.generate(SEED)))} == {}


@every_pair
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "random"])
def test_pass_with_another_cpu(machine_of, name, little, kind):
    names = [CaseName(name, little, kind, number) for number in range(CASES)]
    machine = machine_of(name, 2)
    assert {str(n): p for n in names if n.cpus == 2 and (p := machine.judge(n.generate(SEED)))} == {}


def test_code_of_the_case_before_is_never_run(machine_of):
    """K2 and the purgatory change places from case to case: QEMU's translations must go with them.

    With code that the host writes in place itself, 13 of the first 20 turns fail.
    """
    machine = machine_of("POWER9")
    starts = machine.starts
    places = (0x100000, 0x110000, 0x120000)
    for turn in range(60):
        base, entry = (places[(turn + n) % 3] for n in range(2))
        assert machine.judge(case((Copy(0x200000, 0x300000, LINE),), base=base, entry=entry, ids=(turn,))) == ()
    assert machine.starts <= starts + 1


class TestTheBenchCanFail:
    """The purgatory's image is altered, or the model is given another table than the purgatory."""

    @pytest.fixture
    def machine(self, machine_of):
        return machine_of("POWER9")

    @pytest.fixture
    def hang(self, machine_of, monkeypatch):
        """Run, on two CPUs, what never gets to K2; what is said of it."""
        machine = machine_of("POWER9", 2)

        def run(case):
            with monkeypatch.context() as patch:
                patch.setattr(machine, "deadline", 1.0)
                problems = machine.judge(case)
            assert "not seen" in problems[0]
            return problems

        return run

    MOVES = (Exchange(0x10000, 0x800000, 0x20000), Copy(0x400000, 0x10000, 0x8000), Exchange(0x404000, 0x600000, 0x8000))

    def test_this_passes(self, machine):
        assert machine.judge(case(self.MOVES)) == ()

    def test_every_swap_of_rows_that_overlap_is_seen(self, machine):
        for at in range(len(self.MOVES) - 1):
            other = [*self.MOVES[:at], self.MOVES[at + 1], self.MOVES[at], *self.MOVES[at + 2 :]]
            assert self.with_the_table_of(machine, case(other), case(self.MOVES))

    @pytest.mark.parametrize("number", range(12))
    def test_swapped_rows_of_a_random_table_are_seen(self, machine, number):
        wanted = CaseName("POWER9", False, "random", number).generate(SEED)
        moves = [move for move in wanted.moves if not isinstance(move, Check)]
        for at in range(len(moves) - 1):
            other = [*moves[:at], moves[at + 1], moves[at], *moves[at + 2 :]]
            assert self.with_the_table_of(machine, replace(wanted, moves=tuple(other)), replace(wanted, moves=tuple(moves)))

    def test_a_table_of_the_product_in_another_order_is_seen(self, machine):
        """K1's true head put in its place before the rest of its low page."""
        wanted = CaseName("POWER9", True, "reserved", 1).generate(SEED)
        moves = [move for move in wanted.moves if not isinstance(move, Check)]
        other = sorted(moves, key=lambda move: not isinstance(move, Put))
        assert other != moves
        assert self.with_the_table_of(machine, replace(wanted, moves=tuple(other)), replace(wanted, moves=tuple(moves)))

    def test_a_flipped_bit_of_the_code_is_seen(self, hang):
        """The purgatory's own digest sees it and stops: K2 is not entered."""
        problems = hang(case(self.MOVES, alter=lambda image: image.__setitem__(CODE_OFFSET + 3, image[CODE_OFFSET + 3] ^ 1)))
        assert any("NIP" in line for line in problems)

    def test_a_wrong_step_of_the_copy_is_seen(self, machine):
        """`addi r27,r27,128` made 64, and the digest mended: half of each line comes from the wrong place."""
        step = bytes.fromhex("3b7b0080")

        def change(image):
            at = image.index(step)
            image[at : at + 4] = bytes.fromhex("3b7b0040")

        problems = machine.judge(case(self.MOVES, alter=sealed(change)))
        assert any("bytes are wrong" in problem for problem in problems), problems

    def test_a_wrong_register_is_seen(self, machine):
        """The last `li r5,0` made 1: K2 would take it for a call from Open Firmware."""

        def change(image):
            at = image.rindex(bytes.fromhex("38a00000"))
            image[at + 3] = 1

        assert machine.judge(case(self.MOVES, alter=sealed(change))) == ("K2's r5 is 0x1, not 0x0",)

    def test_branches_that_miss_the_handler_are_seen(self, machine, hang):
        """K2 linked elsewhere takes its program interrupt through the branch at 0x704, and by no other way."""
        good = CaseName("POWER9", False, "linked", 1).generate(SEED)
        ((at, page),) = good.places
        assert machine.judge(good) == ()
        branch = VECTORS.start + 0x604
        missed = page[:branch] + (0x48000000).to_bytes(4, "big") + page[branch + 4 :]  # b .
        assert "K2's first instructions" in hang(replace(good, places=((at, missed),)))[0]

    def test_a_head_that_finds_no_body_is_seen(self, hang):
        """The other CPU is sent elsewhere and never counted."""

        def change(image):
            for offset in LOADED_AT_OFFSETS:
                image[offset + 5] ^= 0x10

        hang(case(self.MOVES, ids=(1, 2), slaves=1, slave_timeout=1 << 40, alter=sealed(change)))

    def test_one_byte_of_memory_is_seen(self, machine):
        with machine.case(case(self.MOVES)) as run:
            run.release(0)
            run.finish()
            run.memory[7 * MIB] ^= 1
            assert any(problem.startswith("0x700000 holds") for problem in run.problems())

    def test_it_goes_on_after_a_case_that_hangs(self, machine_of, hang):
        hang(case(self.MOVES, before=lambda code, _: code.stop()))
        machine = machine_of("POWER9", 2)
        starts = machine.starts
        assert machine.judge(case(self.MOVES)) == ()
        assert machine.starts == starts + 1

    def test_a_stray_access_is_seen(self, machine):
        """Above the memory that is compared: the first of a page, by K1's stub in the purgatory's place."""
        far = case(self.MOVES, before=lambda code, _: code.load(20, 48 * MIB).ld(21, 0, 20))
        (problem,) = machine.judge(far)
        assert "memory above" in problem
        own = case(self.MOVES, before=lambda code, _: code.load(20, TOP - 8).std(20, 0, 20))
        assert "the bench's own memory" in machine.judge(own)[0]

    @staticmethod
    def with_the_table_of(machine, made, wanted):
        """Run `made`'s table and hold memory against `wanted`'s."""
        with machine.case(made) as run:
            run.release(0)
            run.finish()
            return [*replace(run, case=wanted).wrong_memory(except_at=((made.base, 0x10000),))]
