"""What the bench's tests have in common: where they put things, and a case with as little in it as can be."""

import pytest

from crashkernel.bench.cpus import BARE, CPUS
from crashkernel.bench.model import PURGATORY_SIZE, Case
from crashkernel.placement.moves import MAX_MOVES
from crashkernel.purgatory import PARAMETERS_OFFSET, STATE_OFFSET, TABLE_OFFSET
from crashkernel.purgatory.digest import DIGEST_SIZE, digest

QUIET = 0xB00000
"""What no test's move touches, from here to the arena's end."""
ROW_SIZE = 0x100  # ROW_BYTES in purgatory.S
PURGATORY, TREE, ENTRY = QUIET, QUIET + PURGATORY_SIZE, QUIET + 0x40000

ENTRIES = [(name, little) for name in BARE for little in ((False, True) if CPUS[name].little else (False,))]


def _label(value):
    return value if isinstance(value, str) else "LE" if value else "BE"


every_cpu = pytest.mark.parametrize("name", BARE)
every_entry = pytest.mark.parametrize(("name", "little"), ENTRIES, ids=_label)
every_pair = pytest.mark.parametrize(
    ("name", "little"), [(name, little) for name, little in ENTRIES if CPUS[name].count > 1], ids=_label
)


def case(moves=(), *, entry=ENTRY, k2_at=None, base=PURGATORY, ids=(0x11,), **settings) -> Case:
    """K2's code waits at its entry if nothing else is said."""
    settings.setdefault("delays", (0,) * len(ids))
    return Case(tuple(moves), base, TREE, entry, entry if k2_at is None else k2_at, ids=ids, **settings)


def sealed(change):
    """An alteration of the image that none of its own digests shows: each row's, the code's, the whole's."""

    def alter(image: bytearray) -> None:
        change(image)
        rows = range(TABLE_OFFSET, TABLE_OFFSET + (MAX_MOVES + 1) * ROW_SIZE, ROW_SIZE)
        covered = [(end := row + ROW_SIZE - DIGEST_SIZE, row, end) for row in rows]
        covered += [(STATE_OFFSET + DIGEST_SIZE, 0x1000, PARAMETERS_OFFSET + 0x200), (STATE_OFFSET, 0, STATE_OFFSET)]
        for at, start, end in covered:
            image[at : at + DIGEST_SIZE] = digest(bytes(image[start:end]), end - start)

    return alter
