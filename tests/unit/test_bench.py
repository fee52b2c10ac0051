"""Generated plans (crashkernel.bench.plans): lawful, repeatable, and such that the order of their moves shows."""

import itertools
import random

import pytest

from crashkernel.bench.cpus import BARE, CPUS
from crashkernel.bench.model import PURGATORY_SIZE, pattern
from crashkernel.bench.plans import KINDS, CaseName, _lines, branches, order_shows, random_table, stretches
from crashkernel.bench.series import Series
from crashkernel.bench.stubs import ARENA
from crashkernel.errors import UsageError
from crashkernel.memory import Range
from crashkernel.placement.moves import LINE, MAX_MOVES, Check, Copy, Exchange, Put
from crashkernel.placement.tables import LOW_PAGE, SAVE_OFFSET

MIB = 1 << 20
every_kind = pytest.mark.parametrize("kind", KINDS)


def plans(kind, count=200, cpu="POWER9"):
    return [CaseName(cpu, False, kind, number).generate(7) for number in range(count)]


@every_kind
class TestGenerated:
    def test_moves_are_lawful(self, kind):
        """Whole lines inside the arena, not onto themselves, and not over what must stay."""
        for case in plans(kind):
            assert len(case.moves) <= MAX_MOVES
            saved = Range.sized(case.base + SAVE_OFFSET, LOW_PAGE)
            for move in case.moves:
                touched = stretches(move)
                assert all(r.start >= 0 and r.end <= ARENA for r in touched)
                if isinstance(move, Check):
                    assert move.at % 64 == move.size % 64 == 0
                    continue
                assert all(r.start % LINE == r.end % LINE == 0 for r in touched)
                assert len(touched) == 1 or not touched[0].overlaps(touched[1])
                written = touched if isinstance(move, Exchange) else touched[:1]
                for part in written:
                    assert saved.contains(part) or not part.overlaps(Range.sized(case.base, PURGATORY_SIZE))
                    assert not part.overlaps(Range.sized(case.tree, 0x1000))

    def test_are_repeatable(self, kind):
        name = CaseName("POWER10", True, kind, 5)
        assert repr(name.generate(3)) == repr(name.generate(3))
        assert repr(name.generate(3)) != repr(name.generate(4))
        assert CaseName.parse(str(name)) == name


class TestKinds:
    def test_k2_is_smaller_as_large_and_larger_than_what_lies_below_its_region(self):
        """And waits right behind the memory it will run in, or further up."""
        touching, sizes = set(), set()
        for case in plans("zero"):
            size = next((m.dst + m.size for m in case.moves if isinstance(m, Exchange) and m.dst == LOW_PAGE), LOW_PAGE)
            assert case.k2_at >= size
            touching.add(case.k2_at == size)
            sizes.add(size)
        assert touching == {True, False}
        assert LOW_PAGE in sizes, "a K2 of a single page"

    def test_branches_reach_their_own_place_in_the_image(self):
        """`nop; b`: the second word of each pair, at A + 4, goes to link + A."""
        link = 0x9F0000
        words = branches(link)
        assert len(words) == 0x2F00
        branch = int.from_bytes(words[0x604:0x608], "big")  # at absolute 0x704
        assert (branch >> 26, branch & 3) == (18, 0)
        assert 0x704 + (branch & 0x3FFFFFC) == link + 0x700

    def test_other_cpus_come_where_there_are_two(self):
        cases = [CaseName(cpu, False, "zero", number) for cpu in BARE for number in range(8)]
        assert {name.cpu for name in cases if name.cpus == 2} == {cpu for cpu in BARE if CPUS[cpu].count == 2}
        assert all(len(name.generate(1).ids) == name.cpus for name in cases)


class TestOrder:
    def test_every_other_order_of_a_random_table_shows(self):
        """The generator looks at neighbours and at the reverse; this at all orders there are."""
        source = random.Random(1)
        for rows in (2, 3, 4, 5) * 6:
            moves = [move for move in random_table(source, rows, ()) if not isinstance(move, Check)]
            wanted = _lines(moves)
            for other in itertools.permutations(moves):
                assert list(other) == moves or (_lines(other) != wanted).any()

    @pytest.mark.parametrize(
        ("moves", "shows"),
        [
            ((Copy(0x1000, 0x2000, 0x80),), True),
            ((Copy(0x1000, 0x2000, 0x80), Copy(0x3000, 0x4000, 0x80)), False),
            ((Copy(0x1000, 0x2000, 0x80), Copy(0x3000, 0x1000, 0x80)), True),
            ((Copy(0x1000, 0x2000, 0x80), Copy(0x1000, 0x3000, 0x80)), False),
            ((Exchange(0x1000, 0x2000, 0x100), Put(0x1080, 0, 0x80)), True),
        ],
    )
    def test_seen_by_the_generator(self, moves, shows):
        assert order_shows(moves) is shows


def test_every_eight_bytes_of_memory_name_their_address():
    words = pattern().view(">u8")
    assert len(set(words.tolist())) == len(words) == ARENA // 8
    assert words[0x1000 // 8] & 0xFFFFFFFF == 0x1000


@pytest.mark.parametrize(
    "text", ["", "POWER9", "POWER9-LE-zero", "POWER7-BE-zero-1", "POWER9-XE-zero-1", "POWER9-BE-all-1", "970fx-LE-zero-1"]
)
def test_what_names_no_case(text):
    with pytest.raises(UsageError):
        CaseName.parse(text)


def test_the_970_is_run_big_endian_only():
    cells = Series.of(1, BARE, 3).cells
    assert {(cell.cpu, cell.little) for cell in cells} == {(cpu, little) for cpu in BARE for little in (False, True)} - {
        ("970fx", True)
    }
    assert all(cell.cases == 3 for cell in cells)
