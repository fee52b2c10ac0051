"""Instructions per byte, counted one by one: the purgatory's rows of moves, its check, and kexec-tools' purgatory beside them.

A handover's time is the number of bytes times this. Counts are exact, the same on any host and on any day, which a time under
emulation is not. Each is the slope between tables of n, 2n and 3n lines: what the purgatory does once, however large the
kernel, falls out; and if the two steps differ, something is counted that is not the row's, and that is said.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from crashkernel.bench.cpus import BARE, CPUS
from crashkernel.bench.kexectools import KexecPurgatory, debian_kexec
from crashkernel.bench.stepper import Stepper
from crashkernel.drill.debian import silent
from crashkernel.errors import VerificationError
from crashkernel.machine import HEAD_SIZE
from crashkernel.placement.moves import LINE, Check, Copy, Exchange
from crashkernel.purgatory import LOG_OFFSET, LOG_SIZE, pack
from crashkernel.purgatory.digest import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from crashkernel.bench.cpus import Cpu
    from crashkernel.drill.debian import Progress

SIZES = (2 * LINE, 4 * LINE, 6 * LINE)
"""Bytes of the rows that are counted. Their hexadecimal digits are as many and of one kind, should a row be told in a log."""

KEXEC_SIZES = (128, 256, 384)
"""Bytes that kexec-tools' check and copy are counted over. Blocks of 64 bytes differ by an instruction or two, pairs do not."""

SPAN = 45_000_000
"""Bytes a Debian kernel spans, bss included, for the totals: what a zero placement exchanges."""

CHECK_GOAL = Fraction(1, 5)
"""The purgatory's own check may cost this part of kexec-tools' SHA-256, by byte."""

_ACCESSES = {"exchange": 4, "exchange AltiVec": 4, "copy": 2}
"""Loads and stores of each byte: a byte exchanged is loaded twice and stored twice."""


def floor(what: str, width: int) -> Fraction:
    """The fewest instructions a byte with registers of `width` bytes: 8 for doublewords, 16 for AltiVec, in every CPU here.

    Loads and stores, and for each line of the destination its write-back and its drop from the instruction cache; no loop.
    """
    return Fraction(_ACCESSES[what], width) + Fraction(2, LINE)


_ARENA = 1 << 20
_PURGATORY, _TREE, _ENTRY, _KEXEC, _STACK, _HERE, _THERE = 0x40000, 0x60000, 0x70000, 0x20000, 0x38000, 0x80000, 0xC0000
_Row = Copy | Exchange | Check
_TOO_MANY = 1_000_000  # instructions of one count: it has lost its way
_SOON = 1.0  # seconds of wall clock for what takes a few milliseconds


@dataclass(frozen=True, slots=True)
class Count:
    """How many instructions `what` took on `cpu` for each size."""

    what: str
    cpu: str
    sizes: tuple[int, ...]
    instructions: tuple[int, ...]

    @property
    def per_byte(self) -> Fraction:
        """The slope from the smallest to the largest."""
        return Fraction(self.instructions[-1] - self.instructions[0], self.sizes[-1] - self.sizes[0])

    @property
    def exact(self) -> bool:
        """Whether every step has that slope."""
        steps = zip(pairwise(self.sizes), pairwise(self.instructions), strict=True)
        return all(Fraction(b - a, y - x) == self.per_byte for (x, y), (a, b) in steps)


@dataclass(frozen=True, slots=True)
class InstructionReport:
    """What was counted. The last two are None without kexec-tools."""

    rows: tuple[Count, ...]
    sha256: Count | None
    backup: Count | None

    @property
    def check_ratio(self) -> Fraction | None:
        """Our check's cost by byte as a part of kexec-tools'; the dearest CPU's."""
        checks = [count.per_byte for count in self.rows if count.what == "check"]
        return max(checks) / self.sha256.per_byte if checks and self.sha256 is not None else None


def count_instructions(
    names: Iterable[str] = BARE, *, kexec: Path | None = None, with_kexec: bool = True, progress: Progress = silent
) -> InstructionReport:
    """Count everything, on each CPU of `names`; kexec-tools' on one POWER9, its code is the same on all.

    `kexec` is the program to take kexec-tools' purgatory from, Debian's if it is None.

    :raise EnvironmentFault: no QEMU, or no kexec-tools to be had.
    :raise VerificationError: a row did not do its work, or kexec-tools' check passes a flipped bit: nothing was measured.
    """
    rows: tuple[tuple[str, Callable[[int], _Row], bool], ...] = (
        ("exchange", lambda size: Exchange(_HERE, _THERE, size), False),
        ("exchange AltiVec", lambda size: Exchange(_HERE, _THERE, size), True),
        ("copy", lambda size: Copy(_HERE, _THERE, size), False),
        ("check", lambda size: Check(_HERE, size), False),
    )
    counts = []
    for name in names:
        for what, row, altivec in rows:
            progress(f"counting instructions: {what} on {name}")
            taken = tuple(_count_row(CPUS[name], row(size), altivec=altivec) for size in SIZES)
            counts.append(Count(what, name, SIZES, taken))
    sha256 = backup = None
    if with_kexec:
        purgatory = KexecPurgatory.from_program(kexec or debian_kexec(progress), _KEXEC)
        progress("counting instructions: kexec-tools' SHA-256 and backup copy")
        taken = tuple(_count_sha256(purgatory, size) for size in KEXEC_SIZES)
        sha256 = Count("SHA-256", "POWER9", KEXEC_SIZES, taken)
        backup = Count("backup", "POWER9", KEXEC_SIZES, tuple(_count_backup(purgatory, size) for size in KEXEC_SIZES))
    return InstructionReport(tuple(counts), sha256, backup)


def render_instructions(report: InstructionReport) -> str:
    """The report as lines of text."""
    lines = [f"{'':24}{'CPU':>9}{'a byte':>10}{'doublewords':>14}{'AltiVec':>10}{f'{SPAN / 1e6:.0f} MB':>12}"]
    lines += [_line(f"our {count.what}", count) for count in report.rows]
    for name, other in (("kexec-tools' SHA-256", report.sha256), ("kexec-tools' backup", report.backup)):
        if other is not None:
            lines.append(_line(name, other))
    lines.append("doublewords, AltiVec: how many times the fewest possible with such registers, cache maintenance included")
    if report.check_ratio is not None:
        verdict = "met" if report.check_ratio <= CHECK_GOAL else "MISSED"
        lines.append(f"our check / kexec-tools' SHA-256: {float(report.check_ratio):.3f}, goal {float(CHECK_GOAL)}: {verdict}")
    return "\n".join(lines)


def _line(name: str, count: Count) -> str:
    times = [f"{float(count.per_byte / floor(count.what, width)):.2f}" if count.what in _ACCESSES else "" for width in (8, 16)]
    total = f"{float(count.per_byte * SPAN / 1_000_000):.1f} M"
    exact = "" if count.exact else "  not linear: " + ", ".join(map(str, count.instructions))
    return f"{name:24}{count.cpu:>9}{float(count.per_byte):>10.4f}{times[0]:>14}{times[1]:>10}{total:>12}{exact}"


# --------------------------------------------------------------------------------------------------------------- ours


def _count_row(cpu: Cpu, row: _Row, *, altivec: bool) -> int:
    """Instructions from the row's first access to memory up to the first letter of what the purgatory says of it.

    What comes before and after is the same for every size, and would be by far the longest part of the counting.

    :raise VerificationError: the row did not do its work.
    """
    memory = np.random.default_rng(0).integers(0, 256, _ARENA, np.uint8)
    expected = []
    if isinstance(row, Check):
        expected.append(("counted", digest(memory[row.at : row.at + row.size].tobytes(), row.size)))
    image = pack(_PURGATORY, (row,), bytes(HEAD_SIZE), fdt=_TREE, entry=_ENTRY, expected=expected, altivec=altivec)
    memory[_PURGATORY : _PURGATORY + len(image)] = np.frombuffer(image, np.uint8)
    log = slice(_PURGATORY + LOG_OFFSET, _PURGATORY + LOG_OFFSET + LOG_SIZE)
    memory[log] = 0
    with Stepper.start(cpu, _ARENA) as stepper:
        stepper.memory[:] = memory
        stepper.enter(_PURGATORY, physical=0, little=False)
        if not stepper.run_to_access(row.at if isinstance(row, Check) else row.src):
            raise VerificationError(f"the purgatory does not touch what its row {row} names")
        said = log.start + int(np.count_nonzero(stepper.memory[log]))
        taken = _steps(stepper, lambda _: bool(stepper.memory[said]))
        stepper.stop_at([_ENTRY])
        stepper.run(_SOON)
        text = stepper.memory[said : log.stop].tobytes()
        if isinstance(row, Check):
            done = text.startswith(b" ok")
        else:
            here, there = slice(row.dst, row.dst + row.size), slice(row.src, row.src + row.size)
            done = bool((stepper.memory[here] == memory[there]).all())
            done = done and bool((stepper.memory[there] == memory[here if isinstance(row, Exchange) else there]).all())
        if not done:
            raise VerificationError(f"the purgatory did not do its row {row}")
        return taken


def _steps(stepper: Stepper, ended: Callable[[int], bool]) -> int:
    """Instructions until `ended` says so of the address of the next."""
    last = -1
    for taken in range(1, _TOO_MANY):
        at = stepper.step()
        if ended(at):
            return taken
        if at == last:
            raise VerificationError(f"it stands still at {at:#x} after {taken} instructions")
        last = at
    raise VerificationError(f"no end after {_TOO_MANY} instructions")


def _put(stepper: Stepper, at: int, data: bytes) -> None:
    """Before anything ran, the host may write."""
    stepper.memory[at : at + len(data)] = np.frombuffer(data, np.uint8)


# -------------------------------------------------------------------------------------------------------- kexec-tools'


def _count_sha256(purgatory: KexecPurgatory, size: int) -> int:
    """Instructions of kexec-tools' check from its first access to the data up to its end, for `size` bytes in one region.

    :raise VerificationError: the check refuses the right digest, or passes a flipped bit.
    """
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    done = purgatory.symbols["post_verification_setup_arch"]
    ends = {done, done + 8}  # its global and its local entry
    with _loaded(purgatory, data) as stepper:
        stepper.stop_at(ends)
        flipped = data[: size // 2] + bytes([data[size // 2] ^ 0x10]) + data[size // 2 + 1 :]
        stepper.memory[_HERE : _HERE + size] = np.frombuffer(flipped, np.uint8)
        start = stepper.save()
        if stepper.run(_SOON) is not None:
            raise VerificationError("kexec-tools' check passes a flipped bit")
        stepper.restore(start)
        stepper.memory[_HERE : _HERE + size] = np.frombuffer(data, np.uint8)
        if not stepper.run_to_access(_HERE):
            raise VerificationError("kexec-tools' check does not read what it is to check")
        return _steps(stepper, ends.__contains__)


def _count_backup(purgatory: KexecPurgatory, size: int) -> int:
    """Instructions of the routine that kexec-tools copies the low 64 KiB with, for `size` bytes.

    :raise VerificationError: it is not the one.
    """
    back = 0x1000  # where it returns to; not executed
    with _loaded(purgatory, b"", skip_checks=1, panic_kernel=1, backup_start=_THERE) as stepper:
        stepper.stop_at([purgatory.symbols["memcpy"]])
        called = stepper.run(_SOON)
        if called is None or stepper.read("r3", "r4", "r5") != (_THERE, 0, 0x10000):
            raise VerificationError("kexec-tools' purgatory does not copy 64 KiB from 0 with its memcpy")
        stepper.write({"r4": _HERE, "r5": size, "lr": back})
        taken = _steps(stepper, lambda at: at == back)
        if stepper.memory[_THERE : _THERE + size].tobytes() != stepper.memory[_HERE : _HERE + size].tobytes():
            raise VerificationError("kexec-tools' memcpy did not copy")
        return taken


@contextlib.contextmanager
def _loaded(purgatory: KexecPurgatory, data: bytes, **numbers: int) -> Iterator[Stepper]:
    """kexec-tools' purgatory before its first instruction, as kexec loads it, to check `data` at `_HERE`."""
    values = {
        "sha256_regions": struct.pack("<QQ", _HERE, len(data)),
        "sha256_digest": hashlib.sha256(data).digest(),
        "my_toc": struct.pack("<Q", purgatory.toc),
        "stack": struct.pack("<Q", _STACK),
    }
    values |= {name: struct.pack("<I" if name != "backup_start" else "<Q", number) for name, number in numbers.items()}
    with Stepper.start(CPUS["POWER9"], _ARENA) as stepper:
        stepper.memory[:] = np.random.default_rng(1).integers(0, 256, _ARENA, np.uint8)
        _put(stepper, _KEXEC, purgatory.with_values(values))
        _put(stepper, _HERE, data)
        stepper.enter(purgatory.entry, physical=0, little=True)
        yield stepper
