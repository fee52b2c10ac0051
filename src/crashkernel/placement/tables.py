"""The two placements of the 2005 mail as tables of moves: pure functions of a few addresses.

Both keep to one order, which is what makes a handover that goes wrong speak instead of standing still:

1. K1's low page steps aside.
2. The purgatory's first page takes its place: its entry for CPUs that come late, and its exception vectors.
3. Everything else moves; K1's low page ends where the dump will look for it, with its true first bytes.
4. Everything that was loaded is checked where it lies now.
5. K2's own low page goes in last, and is checked too.

From 2 to 5 a machine check, a system reset or a fault of ours ends in the purgatory's own handler, and a CPU that arrives at
absolute 0x60 finds the purgatory's slave entry. docs/purgatory.md has what remains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crashkernel.machine import HEAD_SIZE
from crashkernel.placement.moves import Check, Copy, Exchange, Move, Put

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crashkernel.memory import Range

LOW_PAGE = 0x1000
"""Bytes at 0 that stay the purgatory's until the last move: its head, and an exception vector each 0x80 bytes."""

SAVE_OFFSET = 0x7000
"""A page inside the purgatory's segment that the code leaves alone (purgatory.S): here low pages wait."""

PURGATORY_SPAN = 0xA000
"""What the purgatory uses of its segment, in bytes: image, the page above, log (purgatory.S)."""


def zero(size: int, parked: int, purgatory: int, checks: Iterable[Range]) -> tuple[Move, ...]:
    """K2's first `size` bytes wait at `parked` and change places with K1's at 0.

    With a page of branches in K2's place it is also the way of a K2 linked elsewhere, whose low pages alone are exchanged.
    `checks` are the segments where they lie afterwards, what is below `LOW_PAGE` left out. Addresses are physical, sizes bytes;
    `size` is at least `LOW_PAGE`.
    """
    saved = purgatory + SAVE_OFFSET
    rest = size - LOW_PAGE
    return (
        Copy(saved, 0, LOW_PAGE),
        Copy(0, purgatory, LOW_PAGE),
        Exchange(saved, parked, LOW_PAGE),
        Put(parked, 0, HEAD_SIZE),
        *((Exchange(LOW_PAGE, parked + LOW_PAGE, rest),) if rest else ()),
        *(Check(r.start, r.size) for r in checks),
        Copy(0, saved, LOW_PAGE),
        Check(0, LOW_PAGE),
    )


def reserved(low: int, backup: int, image: int, purgatory: int, checks: Iterable[Range]) -> tuple[Move, ...]:
    """K2 runs at `image`, where it was loaded; K1's first `low` bytes are saved at `backup`.

    K2's head is copied to 0 for K1's other CPUs, who find K2's slave entry there. K2 itself copies its vectors, from 0x100
    on, when it has come that far (copy_to_here, arch/powerpc/kernel/head_64.S): until then the purgatory's stay. `low` is at
    least `LOW_PAGE`.
    """
    rest = low - LOW_PAGE
    return (
        Copy(backup, 0, LOW_PAGE),
        Copy(0, purgatory, LOW_PAGE),
        Put(backup, 0, HEAD_SIZE),
        *((Copy(backup + LOW_PAGE, LOW_PAGE, rest),) if rest else ()),
        *(Check(r.start, r.size) for r in checks),
        Copy(0, image, HEAD_SIZE),
        Check(0, HEAD_SIZE),
    )
