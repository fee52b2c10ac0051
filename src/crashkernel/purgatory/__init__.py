"""The purgatory's bytes: the shipped machine code with a plan's table of moves packed into its parameter block.

`purgatory.S` is the code and `docs/purgatory.md` the contract. The block's offsets below are declared twice, here and there;
the tests run the packed image on a CPU, so that a disagreement shows as a wrong move.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from crashkernel.errors import PlanError
from crashkernel.machine import HEAD_SIZE
from crashkernel.placement.moves import MAX_MOVES, Copy, Exchange, Put

if TYPE_CHECKING:
    from crashkernel.placement.moves import Move
    from crashkernel.placement.plan import LoadPlan

LOADED_AT_OFFSET = 0x58
PARAMETERS_OFFSET = 0x800
MAGIC = b"CRASHPRG"

# magic, fdt, entry, opal base, opal entry, timeout; expected, arrived, released, moves, partition
_FIXED = struct.Struct(">8s QQQQQ IIIII")
_MOVES_OFFSET = 0x80
_MOVE = struct.Struct(">QQQQ")  # operation, dst, src, size
_HEAD_OFFSET = 0x480
_SIZE = 0x580
_COPY, _EXCHANGE = 1, 2


def purgatory_bytes(plan: LoadPlan, head: bytes) -> bytes:
    """The image to load at the plan's purgatory segment. `head` is K1's first 0x100 bytes, saved now.

    :raise PlanError: more moves than the table has rows.
    """
    base = plan.segment("purgatory").range.start
    return pack(
        base, plan.moves, head, fdt=plan.segment("fdt").range.start, entry=plan.entry, opal=plan.opal, slaves=plan.slaves,
        slave_timeout=plan.slave_timeout, partition=plan.partition,
    )  # fmt: skip


def pack(
    base: int,
    moves: tuple[Move, ...],
    head: bytes,
    *,
    fdt: int,
    entry: int,
    opal: tuple[int, int] = (0, 0),
    slaves: int = 0,
    slave_timeout: int = 0,
    partition: bool = False,
) -> bytes:
    """The purgatory for a table of moves, to lie at physical `base`.

    `slave_timeout` is in timebase ticks; `partition` says that a PAPR hypervisor takes hypercalls.
    """
    if len(moves) > MAX_MOVES:
        raise PlanError(f"{len(moves)} moves, the purgatory's table holds {MAX_MOVES}")
    if len(head) != HEAD_SIZE:
        raise PlanError(f"K1's head is {len(head)} bytes, not {HEAD_SIZE}", hint="is /proc/kcore readable (root, no lockdown)?")
    image = bytearray((Path(__file__).parent / "purgatory.bin").read_bytes())
    if image[PARAMETERS_OFFSET : PARAMETERS_OFFSET + len(MAGIC)] != MAGIC or len(image) != PARAMETERS_OFFSET + _SIZE:
        raise PlanError("purgatory.bin is not the image this package was built with", hint="reinstall crashkernel")
    struct.pack_into(">Q", image, LOADED_AT_OFFSET, base)
    _FIXED.pack_into(image, PARAMETERS_OFFSET, MAGIC, fdt, entry, *opal, slave_timeout, slaves, 0, 0, len(moves), partition)
    saved_head = base + PARAMETERS_OFFSET + _HEAD_OFFSET
    for number, move in enumerate(moves):
        _MOVE.pack_into(image, PARAMETERS_OFFSET + _MOVES_OFFSET + number * _MOVE.size, *_row(move, saved_head))
    at = PARAMETERS_OFFSET + _HEAD_OFFSET
    image[at : at + HEAD_SIZE] = head
    return bytes(image)


def _row(move: Move, saved_head: int) -> tuple[int, int, int, int]:
    match move:
        case Copy(dst, src, size):
            return _COPY, dst, src, size
        case Exchange(dst, src, size):
            return _EXCHANGE, dst, src, size
        case Put(dst, size) if dst + size <= HEAD_SIZE:
            return _COPY, dst, saved_head + dst, size
    raise PlanError(f"the purgatory carries only K1's first {HEAD_SIZE:#x} bytes, not {move}")
