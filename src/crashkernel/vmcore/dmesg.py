"""The dead kernel's log, out of its memory, and the line of it that says why it died.

References: Linux `kernel/printk/printk_ringbuffer.h` and `.c` (the lockless ring buffer, 5.10 and newer),
`kernel/printk/printk.c` (`log_buf_vmcoreinfo_setup`: what VMCOREINFO says of it; `info_print_prefix`), and `dmesg(1)`, whose
form the text has.

A kernel dies in the middle of things: a record that was reserved but never committed, or whose text has been overwritten, is
left out. The ring is read in slices, so that a log buffer of gigabytes takes no more memory than a small one.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crashkernel.errors import CrashkernelError, FormatError
from crashkernel.vmcore.kernel import CrashedKernel

MAX_LOG_SIZE = 1 << 25
"""Characters of log that `read_log` returns at most: more than a kernel with `log_buf_len=16M` has."""

_MAX_TEXT_BITS = 31  # LOG_BUF_LEN_MAX is 1 << 31
_MAX_COUNT_BITS = 26  # a descriptor for every 32 bytes of text (PRB_AVGBITS)
_SLICE = 4096  # descriptors looked at together
_WINDOW = 1 << 16  # bytes of text read together
_WORD = 8  # unsigned long
_WORD_MASK = (1 << 64) - 1

# printk_ringbuffer.h: the state is in the two highest bits of a descriptor's state_var, its ID in the others.
_STATE_SHIFT = 62
_ID_MASK = (1 << _STATE_SHIFT) - 1
_COMMITTED, _FINALIZED = 1, 2
_DATALESS = 1  # FAILED_LPOS and NO_LPOS are odd, and every real position is even

_NSEC = 1_000_000_000
_CALLER_IS_CPU = 1 << 31


@dataclass(frozen=True, slots=True)
class Record:
    """One message: its time in nanoseconds since boot (the kernel's local clock), who said it, and its bytes as they are.

    `level` (0, emergency, to 7, debug) and `facility` (0 the kernel, others user space through /dev/kmsg) are None when the
    kernel keeps them elsewhere than every kernel so far. `caller` is "T" and a thread or "C" and a CPU.
    """

    sequence: int
    nanoseconds: int
    level: int | None
    facility: int | None
    caller: str
    text: bytes


def read_log(kernel: CrashedKernel, *, callers: bool = False) -> str:
    r"""Return the log as `dmesg` prints it, ASCII, oldest message first; with `callers` each says who (PRINTK_CALLER).

    What is not printable is written as `\xNN`, and so is a carriage return: it would hide a line on a console. A log of
    more than `MAX_LOG_SIZE` characters loses its beginning, with a line that says so.

    :raise FormatError: VMCOREINFO does not say where the log is, or what is there is no log.
    """
    parts: deque[str] = deque()
    size = 0
    dropped = 0
    for record in log_records(kernel):
        text = format_record(record, callers=callers)
        parts.append(text)
        size += len(text)
        while size > MAX_LOG_SIZE:
            size -= len(parts.popleft())
            dropped += 1
    if dropped:
        parts.appendleft(f"({dropped} older messages left out)\n")
    return "".join(parts)


def format_record(record: Record, *, callers: bool = False) -> str:
    """Return a record as `dmesg` prints it, with a line end; further lines of one record are indented as far as the first."""
    seconds, rest = divmod(record.nanoseconds, _NSEC)
    prefix = f"[{seconds:5d}.{rest // 1000:06d}] "
    if callers:
        prefix += f"[{record.caller:>8}] "
    text = record.text.decode("latin-1").translate(_ESCAPES)
    return prefix + text.replace("\n", "\n" + " " * len(prefix)) + "\n"


_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 256)) if code not in b"\t\n"}


@dataclass(frozen=True, slots=True)
class _Ring:
    """Where struct printk_ringbuffer has its parts (virtual addresses), and how many: descriptors, and bytes of text."""

    descriptors: int
    infos: int
    count: int
    text: int
    text_size: int
    tail_id: int
    head_id: int


def log_records(kernel: CrashedKernel) -> Iterator[Record]:
    """Yield every message that was committed, oldest first. Parts that cannot be read go to `kernel.doubts`.

    :raise FormatError: VMCOREINFO does not say where the log is, or what is there is no log.
    """
    info = kernel.info
    desc_size, info_size = info.size("prb_desc"), info.size("printk_info")
    block = info.offset("prb_desc.text_blk_lpos")
    state_at = info.offset("prb_desc.state_var") + info.offset("atomic_long_t.counter")
    begin_at, next_at = (block + info.offset(f"prb_data_blk_lpos.{name}") for name in ("begin", "next"))
    sequence_at, time_at = info.offset("printk_info.seq"), info.offset("printk_info.ts_nsec")
    length_at, caller_at = info.offset("printk_info.text_len"), info.offset("printk_info.caller_id")
    ends = ((desc_size, (state_at, begin_at, next_at)), (info_size, (sequence_at, time_at, length_at, caller_at)))
    for size, offsets in ends:
        if not 0 < size <= _WINDOW or min(offsets) < 0 or max(offsets) + _WORD > size:
            raise FormatError("VMCOREINFO's description of the log makes no sense", source=kernel.source.name)
    ring = _read_ring(kernel)
    texts = _Texts(kernel, ring)
    order = "<" if kernel.source.byteorder == "little" else ">"
    # u8 facility; u8 flags:5, level:3 stand between the two members of struct printk_info that VMCOREINFO names
    packed = caller_at - length_at == 4
    total = min(((ring.head_id - ring.tail_id) & _ID_MASK) + 1, ring.count)
    first_id = (ring.head_id - total + 1) & _ID_MASK
    done = 0
    while done < total:
        slot = (first_id + done) % ring.count
        some = min(_SLICE, total - done, ring.count - slot)
        ids = (np.arange(done, done + some, dtype=np.uint64) + np.uint64(first_id)) & np.uint64(_ID_MASK)
        done += some
        try:
            descs = _rows(kernel, ring.descriptors + slot * desc_size, some, desc_size)
            infos = _rows(kernel, ring.infos + slot * info_size, some, info_size)
        except CrashkernelError as error:
            kernel.doubt(f"messages of the log: {error}")
            continue
        states, begins, nexts = (_column(descs, at, f"{order}u8") for at in (state_at, begin_at, next_at))
        kinds = states >> np.uint64(_STATE_SHIFT)
        whole = (states & np.uint64(_ID_MASK) == ids) & ((kinds == _COMMITTED) | (kinds == _FINALIZED))
        # An empty message, or one that found no room, has no text block: there is nothing to print.
        chosen = np.flatnonzero(whole & ((begins & nexts & np.uint64(_DATALESS)) == 0))
        infos = infos[chosen]
        columns = (
            *(each[chosen] for each in (ids, begins, nexts)),
            *(_column(infos, at, f"{order}u8") for at in (sequence_at, time_at)),
            _column(infos, length_at, f"{order}u2"),
            _column(infos, caller_at, f"{order}u4"),
            infos[:, length_at + 2],
            infos[:, length_at + 3],
        )
        for record_id, begin, following, sequence, nanoseconds, length, caller, facility, bits in zip(
            *(each.tolist() for each in columns), strict=True
        ):
            text = texts.get(record_id, begin, following, length)
            if text is not None:
                who = f"{'C' if caller & _CALLER_IS_CPU else 'T'}{caller & ~_CALLER_IS_CPU}"
                level = bits >> 5 if order == "<" else bits & 7  # on little-endian the first bit field is in the low bits
                yield Record(sequence, nanoseconds, level if packed else None, facility if packed else None, who, text)


def _read_ring(kernel: CrashedKernel) -> _Ring:
    info = kernel.info
    name = kernel.source.name
    place = kernel.pointer(kernel.symbol("prb"))
    descs = place + info.offset("printk_ringbuffer.desc_ring")
    texts = place + info.offset("printk_ringbuffer.text_data_ring")
    counter = info.offset("atomic_long_t.counter")

    def power(vaddr: int, limit: int, what: str) -> int:
        bits = int.from_bytes(kernel.read(vaddr, 4), kernel.source.byteorder)
        if bits > limit:
            raise FormatError(f"a log of 2^{bits} {what} is none", source=name)
        return 1 << bits

    return _Ring(
        descriptors=kernel.pointer(descs + info.offset("prb_desc_ring.descs")),
        infos=kernel.pointer(descs + info.offset("prb_desc_ring.infos")),
        count=power(descs + info.offset("prb_desc_ring.count_bits"), _MAX_COUNT_BITS, "messages"),
        text=kernel.pointer(texts + info.offset("prb_data_ring.data")),
        text_size=power(texts + info.offset("prb_data_ring.size_bits"), _MAX_TEXT_BITS, "bytes"),
        tail_id=kernel.pointer(descs + info.offset("prb_desc_ring.tail_id") + counter) & _ID_MASK,
        head_id=kernel.pointer(descs + info.offset("prb_desc_ring.head_id") + counter) & _ID_MASK,
    )


def _rows(kernel: CrashedKernel, vaddr: int, count: int, size: int) -> NDArray[np.uint8]:
    return np.frombuffer(kernel.read(vaddr, count * size), np.uint8).reshape(count, size)


def _column(rows: NDArray[np.uint8], at: int, kind: str) -> NDArray[Any]:
    dtype = np.dtype(kind)
    return np.ascontiguousarray(rows[:, at : at + dtype.itemsize]).view(dtype).reshape(-1).astype(dtype.newbyteorder("="))


class _Texts:
    """The text ring: blocks of an unsigned long (the descriptor's ID) and the text, at positions that only ever grow."""

    def __init__(self, kernel: CrashedKernel, ring: _Ring) -> None:
        self._kernel = kernel
        self._ring = ring
        self._window = -1
        self._data = b""

    def get(self, record_id: int, begin: int, following: int, length: int) -> bytes | None:
        """Return the text of the block [begin, following), or None when the block is another record's by now.

        A block that would reach beyond the ring's end lies at its start instead (`get_data`). Before 6.18 one that ends
        exactly there does so as well, and its `following` says it: it is a whole block further.
        """
        size = self._ring.text_size
        reach = (following - begin) & _WORD_MASK  # positions begin a ring's size below zero, so the first round passes it
        if not 0 < reach <= size:
            return None
        whole = (begin & _WORD_MASK) // size == ((following - 1) & _WORD_MASK) // size
        place, end = begin % size if whole else 0, following % size or size
        available = end - place - _WORD
        if available < 0:
            return None
        data = self._read(place, _WORD + min(length, available))
        if data is None or int.from_bytes(data[:_WORD], self._kernel.source.byteorder) != record_id:
            return None
        return data[_WORD:]

    def _read(self, place: int, size: int) -> bytes | None:
        """Return bytes of the ring: messages follow each other, so what is read is kept for the next."""
        offset = place - self._window
        if self._window < 0 or offset < 0 or offset + size > len(self._data):
            self._window = -1
            for wanted in (min(max(size, _WINDOW), self._ring.text_size - place), size):
                try:
                    self._data = self._kernel.read(self._ring.text + place, wanted)
                except CrashkernelError as error:  # it may be a page behind this message that is missing
                    reason = error
                    continue
                self._window, offset = place, 0
                break
            else:
                self._kernel.doubt(f"text of the log: {reason}")
                return None
        return self._data[offset : offset + size]


_PREFIX = re.compile(r"^\[ *\d+\.\d{6}\] (?:\[ *[CT]\d+\] )?")
_PANIC = re.compile(r"Kernel panic - not syncing: ?(.*)")
# A panic that says no more than that something came before it: what the line before it begins with, or contains, says more.
_OOPS = (
    r"BUG: |kernel BUG at |Unable to handle kernel |general protection fault|divide error|invalid opcode|int3|"
    r"stack segment|double fault|Internal error|Machine check|Disabling lock debugging due to kernel taint|Oops"
)
_CAUSES = (
    (re.compile(r"Fatal exception|Fatal error|Unrecoverable|Oops", re.I), re.compile(_OOPS)),
    (re.compile(r"softlockup", re.I), re.compile(r"BUG: soft lockup")),
    (re.compile(r"hard lockup", re.I), re.compile(r"hard LOCKUP on cpu", re.I)),
    (re.compile(r"hung_task", re.I), re.compile(r"INFO: task .* blocked for more than")),
    (re.compile(r"RCU Stall", re.I), re.compile(r"INFO: rcu\w* .*stall")),
    (re.compile(r"panic_on_warn|kernel: panic_on_warn", re.I), re.compile(r"WARNING: ")),
)
# Without a panic (crash_kexec comes first in an oops with panic_on_oops), what says most comes first.
_LAST_WORDS = (
    re.compile(r"^sysrq: (?:SysRq : )?Trigger a crash"),
    re.compile(_OOPS),
    re.compile(r"hard LOCKUP on cpu|INFO: rcu\w* .*stall|blocked for more than"),
)
_SAME_OOPS = 12  # lines from an oops's headline to the one with its number, at most
_HEADLINE = re.compile(r"BUG: |kernel BUG at |Unable to handle kernel ")


def panic_line(log: str) -> str | None:
    """Return the message of the log that says why the kernel died, without its time; None when none does.

    That is the panic's own message unless it only refers to what came before ("Fatal exception"): then the headline of the
    oops, lockup or warning that led to it.
    """
    lines = [_PREFIX.sub("", line) for line in log.splitlines()]
    for index in range(len(lines) - 1, -1, -1):
        if found := _PANIC.match(lines[index]):
            for reason, cause in _CAUSES:
                if reason.search(found[1]) and (before := _last(lines, index, cause)) is not None:
                    return _headline(lines, before)
            return lines[index].strip()
    for words in _LAST_WORDS:
        if (last := _last(lines, len(lines), words)) is not None:
            return _headline(lines, last)
    return None


def _last(lines: list[str], before: int, wanted: re.Pattern[str]) -> int | None:
    return next((index for index in range(before - 1, -1, -1) if wanted.search(lines[index])), None)


def _headline(lines: list[str], index: int) -> str:
    """Return the first line of the oops that line `index` belongs to."""
    nearby = range(max(0, index - _SAME_OOPS), index)
    return next((lines[number] for number in nearby if _HEADLINE.search(lines[number])), lines[index]).strip()
