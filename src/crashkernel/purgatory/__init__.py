"""The purgatory's bytes: the shipped machine code with a plan's table packed into it.

`purgatory.S` is the code and `docs/purgatory.md` the contract. The offsets below are declared twice, here and there; the
tests run the packed image on a CPU, so that a disagreement shows as a wrong move.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from crashkernel.errors import PlanError
from crashkernel.machine import HEAD_SIZE, Services
from crashkernel.memory import Range
from crashkernel.placement.moves import MAX_MOVES, Check, Copy, Exchange, Put
from crashkernel.placement.plan import DAMAGE_POLICIES, DamagePolicy, describe_move
from crashkernel.purgatory.digest import DIGEST_SIZE, crc_tables, digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from crashkernel.placement.moves import Layout, Move
    from crashkernel.placement.plan import LoadPlan

LOADED_AT_OFFSETS = (0x48, 0x50, 0x58)
HANDLER_OFFSET = 0xFF8
PARAMETERS_OFFSET = 0x2000
SAVED_HEAD_OFFSET = PARAMETERS_OFFSET + 0x100
TABLE_OFFSET = 0x3000
CRC_OFFSET = 0x5000
STATE_OFFSET = 0x6000
"""From here on the purgatory writes; what is before is under its own digests, which are kept here."""

ARRIVED_OFFSET = STATE_OFFSET + 0x80
RELEASED_OFFSET = STATE_OFFSET + 0x88
LOG_OFFSET = 0x8000
"""Behind the image, in its segment: all that the purgatory said, NUL-terminated."""

LOG_SIZE = 0x2000
MAGIC = b"CRASHPRG"

# magic, timeout, slaves, rows, on damage, altivec, firmware, console, opal base, opal entry, rtas base, entry, reboot, nmi
_PARAMETERS = struct.Struct(">8s 14Q")
_ROW = struct.Struct(">QQQQ 64s 96s")  # operation, dst, src, size, digest, text; then the digest of these
_ROW_SIZE = _ROW.size + DIGEST_SIZE
_COPY, _EXCHANGE, _CHECK, _ENTER = 1, 2, 3, 4
_CODE = Range(0x1000, PARAMETERS_OFFSET + 0x200)  # code and parameters
_TEXT_SIZE = 95  # and its NUL
_IMAGE_SIZE = STATE_OFFSET + 0x100
_FIRMWARE = {"none": 0, "papr": 1, "opal": 2}
_NO_CONSOLE = (1 << 64) - 1


def purgatory_bytes(plan: LoadPlan, head: bytes, contents: Mapping[str, bytes]) -> bytes:
    """The image to load at the plan's purgatory segment.

    `head` is K1's first 0x100 bytes, saved now; `contents` are the bytes of all other segments' contents, by name.
    :raise PlanError: the plan checks what none of them is.
    """
    base = plan.segment("purgatory").range.start
    layouts = [layout for _, layout in plan.stages()][2:]  # after each move
    expected = [
        _expected(layout, move, contents) for move, layout in zip(plan.moves, layouts, strict=True) if isinstance(move, Check)
    ]
    return pack(
        base, plan.moves, head, fdt=plan.segment("fdt").range.start, entry=plan.entry, expected=expected,
        services=plan.services, altivec=plan.altivec, slaves=plan.slaves, slave_timeout=plan.slave_timeout,
        on_damage=plan.on_damage,
    )  # fmt: skip


def _expected(layout: Layout, check: Check, contents: Mapping[str, bytes]) -> tuple[str, bytes]:
    """What a check is to find, by the table's own account of what lies where: its name and digest."""
    (extent,) = layout.within(check.range)
    if extent.content not in contents:
        raise PlanError(f"the plan checks {extent.content} at {check.range}, whose bytes are not known")
    data = contents[extent.content][extent.origin : extent.origin + check.size]
    return extent.content, digest(data, check.size)


def pack(
    base: int,
    moves: Sequence[Move],
    head: bytes,
    *,
    fdt: int,
    entry: int,
    expected: Sequence[tuple[str, bytes]] = (),
    services: Services = Services(),  # noqa: B008  (a frozen value)
    altivec: bool = False,
    slaves: int = 0,
    slave_timeout: int = 0,
    on_damage: DamagePolicy = "halt",
) -> bytes:
    """The purgatory for a table of moves, to lie at physical `base`.

    `expected` are name and digest for each `Check` among the moves, in order; `slave_timeout` is in timebase ticks, and a
    busy console is granted a tenth of it for each text.
    :raise PlanError: more moves than the table has rows, or one that the purgatory cannot make; not one digest for each check.
    """
    checks = sum(isinstance(move, Check) for move in moves)
    if checks != len(expected):
        raise PlanError(f"{checks} checks, and digests for {len(expected)}")
    if len(moves) > MAX_MOVES:
        raise PlanError(f"{len(moves)} moves, the purgatory's table holds {MAX_MOVES}")
    if len(head) != HEAD_SIZE:
        raise PlanError(f"K1's head is {len(head)} bytes, not {HEAD_SIZE}", hint="is /proc/kcore readable (root, no lockdown)?")
    image = bytearray((Path(__file__).parent / "purgatory.bin").read_bytes())
    if image[PARAMETERS_OFFSET : PARAMETERS_OFFSET + len(MAGIC)] != MAGIC or len(image) != _IMAGE_SIZE:
        raise PlanError("purgatory.bin is not the image this package was built with", hint="reinstall crashkernel")
    for offset in LOADED_AT_OFFSETS:
        struct.pack_into(">Q", image, offset, base)
    # the handler's place is an offset in the shipped image
    (handler,) = struct.unpack_from(">Q", image, HANDLER_OFFSET)
    struct.pack_into(">Q", image, HANDLER_OFFSET, base + handler)
    _PARAMETERS.pack_into(
        image, PARAMETERS_OFFSET, MAGIC, slave_timeout, slaves, len(moves) + 1, DAMAGE_POLICIES.index(on_damage), altivec,
        _FIRMWARE[services.kind], _NO_CONSOLE if services.console is None else services.console, *services.opal,
        *services.rtas, services.rtas_reboot, services.rtas_nmi, slave_timeout // 10,
    )  # fmt: skip
    image[SAVED_HEAD_OFFSET : SAVED_HEAD_OFFSET + HEAD_SIZE] = head
    digests = iter(expected)
    rows = [_row(move, base + SAVED_HEAD_OFFSET, digests) for move in moves]
    rows.append((_ENTER, entry, fdt, 0, b"", f"enter K2 at {entry:#x}"))
    for number, (*words, text) in enumerate(rows):
        line = f"crashkernel: {number + 1}/{len(rows)} {text}".encode("ascii", "replace")[:_TEXT_SIZE]
        packed = _ROW.pack(*words, line)
        at = TABLE_OFFSET + number * _ROW_SIZE
        image[at : at + _ROW_SIZE] = packed + digest(packed, _ROW.size)
    image[CRC_OFFSET:STATE_OFFSET] = crc_tables()
    for offset, covered in ((STATE_OFFSET, Range(0, STATE_OFFSET)), (STATE_OFFSET + DIGEST_SIZE, _CODE)):
        image[offset : offset + DIGEST_SIZE] = digest(bytes(image[covered.start : covered.end]), covered.size)
    return bytes(image)


def _row(move: Move, saved_head: int, expected: Iterator[tuple[str, bytes]]) -> tuple[int, int, int, int, bytes, str]:
    text = describe_move(move)
    match move:
        case Copy(dst, src, size):
            return _COPY, dst, src, size, b"", text
        case Exchange(dst, src, size):
            return _EXCHANGE, dst, src, size, b"", text
        case Check(at, size):
            name, wanted = next(expected)
            return _CHECK, at, 0, size, wanted, f"{text}: {name}"
        case Put(dst, origin, size) if origin + size <= HEAD_SIZE:
            return _COPY, dst, saved_head + origin, size, b"", text
    raise PlanError(f"the purgatory carries only K1's first {HEAD_SIZE:#x} bytes, not {move}")
