"""What K1's kernel makes of `crashkernel=`: which region it reserves on this machine, what it refuses and what that costs.

The kernel parses its whole command line for the word, and what it does with it depends on its release. So `reserve` follows the
kernel's own functions, character by character where people and kernel read differently. The rules were held against real
kernels (`tests/unit/test_reservation.py` has what was seen, messages included).

What changed when, on ppc64:

| release | change |
| --- | --- |
| 5.15.34, 5.18 | a partition's region begins in the middle of its RMA, at most at 512 MiB; before, at most at 128 MiB |
| 6.12 | a size of all memory or more is an error already where it is read (`parse_crashkernel`) |
| 6.15 | `reserve_crashkernel_generic` makes the reservation: its size is no longer rounded up, `mem=` no longer gives way |
| 6.17 | the parser knows `,cma` and skips it; before it, a last word `,cma` hides the `crashkernel=` that the user meant |
| 6.19 | `,cma` reserves memory |

`,high` and `,low` are known words on every release and do nothing on ppc64: no release passes the parser a place for them.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from crashkernel.machine import LARGEST_PAGE
from crashkernel.machine.devicetree import DYNAMIC_MEMORY_NODE
from crashkernel.memory import Range, RangeSet, align_down, align_up, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crashkernel.machine import Machine

Refuser = Literal["kernel", "crashkernel"]
"""Who refuses: K1's kernel, which then reserves nothing; or this project, which makes no use of what the kernel grants."""

WORD = "crashkernel="
COMMAND_LINE_SIZE = 2048
"""Bytes of its command line that a kernel reads, K1 or K2, with the final NUL (arch/powerpc/include/uapi/asm/setup.h)."""

RTAS_LIMIT = 1 << 30
"""RTAS and the buffers that K1 shares with it lie below (`RTAS_INSTANTIATE_MAX`, arch/powerpc/include/asm/rtas.h)."""

RTAS_32_BIT = 1 << 32
"""RTAS runs in 32-bit mode: who calls it, and its arguments, must lie below (PAPR 7.2.2)."""

_MIB = 1 << 20
_DEBIAN = "-powerpc64"  # in the release of its ppc64 kernels only
_RANGE_ROUNDING = 128 * _MIB  # total memory, before it is looked up in the ranges (parse_crashkernel_mem)
_LPAR_LIMIT = 512 * _MIB
_OTHER_LIMIT = 128 * _MIB
_LARGE_PAGE = 16 * _MIB  # newer kernels cut their memory to a multiple of it
_ADDRESS_SPACE = 1 << 64
_PHYSICAL_SPACE = 1 << 51  # MAX_PHYSMEM_BITS, arch/powerpc/include/asm/book3s/64/mmu.h

_CORE = "arch/powerpc/kexec/core.c"
_PARSER = "kernel/crash_reserve.c, parse_crashkernel"
_HASH = "arch/powerpc/mm/book3s64/hash_utils.c"
_RMA_LIMIT = "hash__setup_initial_memory_limit"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Memory of this machine that no reserved region may have, or that is cut out of it for "crashkernel".

    `hit`: the region asked for touches it.
    """

    range: Range
    why: str
    source: str
    by: Refuser
    hit: bool


@dataclass(frozen=True, slots=True)
class Reservation:
    """What K1's kernel does with a command line. All addresses are physical, all sizes bytes.

    `range` is what it reserves, None when nothing; `boots` is whether K1 then has the low memory it needs to boot. `wanted` is
    where the region would lie, also when it is then refused; None when the kernel does not get that far. `usable` is what is
    left of `range` for a capture kernel. `console` holds what the kernel prints about it, for a search in K1's log.
    """

    range: Range | None
    wanted: Range | None
    reasons: tuple[str, ...]
    refused: tuple[Refusal, ...]
    console: tuple[str, ...]
    usable: RangeSet
    boots: bool = True
    cma: int = 0
    """Bytes that `,cma` asks for besides: K1 goes on using that memory for user pages, where it lies only K1's kernel knows
    (/sys/kernel/kexec/crash_cma_ranges), and `kexec_load` takes no segment there."""


@dataclass(frozen=True, slots=True)
class LowMemory:
    """Free memory below a limit that K1's boot or firmware depends on: before and after a reservation, in bytes.

    `needed` is what K1 cannot boot without.
    """

    name: str
    limit: int
    before: int
    left: int
    needed: int
    source: str

    @property
    def enough(self) -> bool:
        """Whether K1 boots, as far as this memory goes."""
        return self.left >= self.needed


@dataclass(frozen=True, slots=True)
class _Rules:
    """What depends on the release of K1's kernel."""

    release: str
    middle_of_rma: bool
    size_checked: bool
    generic: bool
    cma_known: bool
    cma_reserved: bool
    trims: bool

    @classmethod
    def of(cls, release: str) -> _Rules:
        """The rules of a kernel of `release` (`uname -r`); of the newest when it says nothing."""
        found = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,6}))?", release)
        version = tuple(int(part or 0) for part in found.groups()) if found else (1 << 16, 0, 0)
        return cls(
            release=release if found else "",
            # "powerpc: Set crashkernel offset to mid of RMA region"
            middle_of_rma=version >= (5, 18) or (5, 15, 34) <= version < (5, 16),
            size_checked=version >= (6, 12),
            # "powerpc/crash: use generic crashkernel reservation" (e3185ee438c2)
            generic=version >= (6, 15),
            # "Add a new optional ",cma" suffix to the crashkernel= command line option" (ab475510e042 is its second half)
            cma_known=version >= (6, 17),
            # "powerpc/kdump: Add support for crashkernel CMA reservation" (b4a96ab50f36)
            cma_reserved=version >= (6, 19),
            # early_init_devtree: so in 6.12's source, not in 6.1's
            trims=version >= (6, 12),
        )

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (",high", ",low", ",cma") if self.cma_known else (",high", ",low")


# ---------------------------------------------------------------------------------------------------- what the kernel reads


def _command_line(text: str) -> str:
    line = text.rstrip("\n")
    bare = WORD not in line and line and not re.search(r"[\s=]", line)
    return WORD + line if bare or re.match(r"[0-9]", line) else line


def _words(cmdline: str) -> list[str]:
    # get_last_crashkernel finds the word anywhere, also inside another one, and ends it at a space
    return [found[1] for found in re.finditer(rf"(?={WORD}([^ ]*))", cmdline)]


class _Unread(Exception):
    """The kernel gives up on the word; `message` is what it prints, "" when it says nothing."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def _memparse(text: str, at: int) -> tuple[int, int]:
    """The number at `at`, not cut to 64 bits, and where it ends: at `at` if there is none (memparse, lib/cmdline.c)."""
    found = _NUMBER.match(text, at)
    if not found:
        return 0, at
    digits, suffix = found[1], found[2]
    base = 16 if digits[1:2] in ("x", "X") else 8 if digits[0] == "0" else 10
    # Each digit counts at most 4 bits: a number that long overflows whatever its digits are, and int() is slow with thousands.
    value = int(digits, base) if len(digits.lstrip("0xX")) <= _MOST_DIGITS else _ADDRESS_SPACE
    return value << (10 * (_SUFFIX_LETTERS.index(suffix.lower()) + 1) if suffix else 0), found.end()


# simple_strtoull with base 0 (lib/kstrtox.c): 0x only before a hexadecimal digit, else a leading 0 means octal
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)([kKmMgGtTpPeE]?)")
_SUFFIX_LETTERS = "kmgtpe"
_MOST_DIGITS = 23  # 8**22 > 2**64


def _chosen_word(cmdline: str, rules: _Rules, suffix: str | None = None) -> str | None:
    """The last `crashkernel=` without a suffix that the kernel knows, or with `suffix` (get_last_crashkernel)."""
    last = None
    for word in _words(cmdline):
        if word.endswith(suffix) if suffix else not word.endswith(rules.suffixes):
            last = word
    return last


def _read_simple(word: str) -> tuple[int, int]:
    """`SIZE[@OFFSET]`: size and offset (parse_crashkernel_simple). Nothing behind the offset is looked at."""
    size, at = _memparse(word, 0)
    if at == 0:
        raise _Unread("crashkernel: memory value expected")
    if word[at : at + 1] == "@":
        return size, _memparse(word, at + 1)[0]
    if at < len(word):
        raise _Unread(f"crashkernel: unrecognized char: {word[at]}")
    return size, 0


def _read_ranges(word: str, total: int) -> tuple[int, int, str]:
    """`START-[END]:SIZE,...[@OFFSET]`: size, offset and the range taken, "" when none matches (parse_crashkernel_mem)."""
    total, at = align_up(total, _RANGE_ROUNDING), 0
    while True:
        begin = at
        start, at = _expect_number(word, at, "crashkernel: Memory value expected")
        at = _expect(word, at, "-")
        end = _ADDRESS_SPACE
        if word[at : at + 1] != ":":
            end, at = _expect_number(word, at, "crashkernel: Memory value expected")
            if end <= start:
                raise _Unread("crashkernel: end <= start")
        at = _expect(word, at, ":")
        size, at = _expect_number(word, at, "Memory value expected")
        if size >= total:
            raise _Unread("crashkernel: invalid size")
        if start <= total < end:
            break
        if word[at : at + 1] != ",":
            return 0, 0, ""
        at += 1
    taken = word[begin:at]
    offset = word.find("@", at)
    if not size or offset < 0:
        return size, 0, taken
    return size, _expect_number(word, offset + 1, "Memory value expected after '@'")[0], taken


def _expect_number(word: str, at: int, message: str) -> tuple[int, int]:
    value, end = _memparse(word, at)
    if end == at:
        raise _Unread(message)
    return value, end


def _expect(word: str, at: int, character: str) -> int:
    if word[at : at + 1] != character:
        raise _Unread(f"crashkernel: '{character}' expected")
    return at + 1


# --------------------------------------------------------------------------------------------------- what the kernel reserves


def reserve(machine: Machine, cmdline_or_spec: str, release: str = "") -> Reservation:
    """What a kernel of `release` (K1's own when not given) reserves on `machine` with that command line or specification.

    Never raises for what it is given: a word the kernel does not understand is a reservation of nothing, with its reason.
    Sources: arch/powerpc/kexec/core.c, (arch_)reserve_crashkernel; kernel/crash_reserve.c (kernel/crash_core.c up to 6.8);
    arch/powerpc/kernel/prom.c, early_init_devtree, for the order of things.
    """
    return _Reserver(machine, cmdline_or_spec, _Rules.of(release or machine.release)).made()


class _Reserver:
    """Follows one kernel through one command line, and takes notes."""

    def __init__(self, machine: Machine, text: str, rules: _Rules) -> None:
        self._machine = machine
        self._rules = rules
        whole = _command_line(text)
        self._cmdline = whole[: COMMAND_LINE_SIZE - 1]
        self._page = machine.base_page
        self._reasons: list[str] = []
        self._console: list[str] = []
        self._wanted: Range | None = None
        self._boots = True
        self._cma = 0
        if len(whole) != len(self._cmdline):
            self._note(f"K1 reads {COMMAND_LINE_SIZE - 1} bytes of its command line: the rest is lost", "COMMAND_LINE_SIZE")
        self._limit = self._memory_limit()

    def made(self) -> Reservation:
        granted = self._reserve()
        usable = RangeSet([granted]) - self._dropped(granted) if granted else RangeSet()
        usable -= RangeSet(each.range for each in off_limits(self._machine))
        return Reservation(
            range=granted,
            wanted=self._wanted,
            reasons=tuple(self._reasons),
            refused=off_limits(self._machine, granted or self._wanted),
            console=tuple(self._console),
            usable=usable,
            boots=self._boots,
            cma=self._cma,
        )

    def _reserve(self) -> Range | None:
        if not self._rules.release:
            self._note("K1's release is not known: the newest kernel's rules are taken", "")
        elif _DEBIAN not in self._rules.release and not self._rules.cma_reserved:
            self._note(f"these are upstream's rules for {self._rules.release}; vendors bring later ones to older kernels", "")
        if self._fadump():
            return None
        word = _chosen_word(self._cmdline, self._rules)
        self._suffixed()
        if word is None:
            self._note("no crashkernel= that this kernel goes by: nothing is reserved", _PARSER)
            return None
        if self._cmdline.count(WORD) > 1:
            self._note(f"crashkernel={word} is what the kernel goes by: the last one counts", "get_last_crashkernel")
        try:
            size, offset = self._read(word)
        except _Unread as unread:
            self._say(unread.message)
            self._note(f"the kernel does not understand crashkernel={word} ({unread.message!r}): nothing is reserved", _PARSER)
            if not self._rules.cma_known and word.endswith(",cma"):
                self._note(
                    "this kernel knows no ,cma: it takes the word for the region itself, in place of any before", _PARSER
                )
            return None
        # crashk_res of one byte is taken for an empty one there
        if size == 0 or (size == 1 and not self._rules.generic):
            self._note("0 bytes are asked for: nothing is reserved", _PARSER)
            return None
        if self._rules.size_checked and size >= self._total:
            self._note(
                f"{format_size(size)} are no less than all memory, {format_size(self._total)}: nothing is reserved", _PARSER
            )
            return None
        return self._place(size, offset)

    def _read(self, word: str) -> tuple[int, int]:
        if ":" not in word:
            return _read_simple(word)
        size, offset, taken = _read_ranges(word, self._total)
        shown = f"{format_size(self._total)} of memory, rounded up to 128 MiB"
        if taken:
            self._note(f"range {taken} is taken for {shown}", "parse_crashkernel_mem")
        else:
            self._say("crashkernel size resulted in zero bytes")
            self._note(f"no range of crashkernel={word} holds {shown}", "parse_crashkernel_mem")
        return size, offset

    def _place(self, size: int, offset: int) -> Range | None:
        start = offset or self._default_base()
        if start % self._page:
            self._say(f"Crash kernel base must be aligned to {self._page:#x}")
            self._note(f"the offset {start:#x} is moved up to a page of {self._page:#x} bytes", _CORE)
            start = align_up(start, self._page)
        if not self._rules.generic and size % self._page:
            self._note(f"the size is rounded up to pages of {self._page:#x} bytes", _CORE)
            size = align_up(size, self._page)
        elif size % self._page:
            self._note(
                "the size is no whole number of pages, and is left so", "kernel/crash_reserve.c, reserve_crashkernel_generic"
            )
        self._wanted = wanted = Range.sized(start, size)
        k1 = self._machine.kernel_end
        if start < k1:
            self._say("Crash kernel can not overlap current kernel")
            self._note(f"{wanted} overlaps K1's image, which ends at {k1:#x}: nothing is reserved", _CORE)
            return None
        if not k1:
            self._note("where K1's image ends is not known: whether the region overlaps it was not looked at", "")
        if not self._rules.generic:
            self._old_messages(wanted)
        if wanted.end >= _ADDRESS_SPACE or not any(memory.covers(wanted) for memory in _memblocks(self._machine)):
            self._say(
                "crashkernel reservation failed - memory is in use."
                if self._rules.generic
                else "Failed to reserve memory for crashkernel!"
            )
            if missing := (RangeSet([wanted]) - self._machine.memory).total:
                why = f"{format_size(missing)} of {wanted} are no memory"
            else:
                why = f"{wanted} lies in memory that can be removed and memory that cannot"
            self._note(f"{why}: nothing is reserved, the kernel looks for no other place", _CORE)
            return None
        if self._rules.generic:
            self._say(f"crashkernel reserved: {start:#018x} - {wanted.end:#018x} ({size >> 20} MB)")
        self._note(f"{wanted} is reserved", _CORE)
        for low in low_memory(self._machine, wanted) if k1 else ():
            if not low.enough:
                self._boots = False
                self._note(
                    f"K1 does not boot: it needs {format_size(low.needed)} below {format_size(low.limit)} for {low.name}, "
                    f"and {format_size(low.left)} are left",
                    low.source,
                )
        return wanted

    def _default_base(self) -> int:
        rma = self._rma()
        partition = self._machine.platform == "pseries"
        limit = _LPAR_LIMIT if partition and self._rules.middle_of_rma else _OTHER_LIMIT
        start = limit if rma is None else min(rma // 2, limit)
        if rma is None:
            why = "on bare metal a region without an offset begins at 128 MiB"
        else:
            why = f"a region without an offset begins at half of the RMA of {format_size(rma)}, at most at {format_size(limit)}"
        self._note(f"{why}: at {start:#x}", _CORE)
        return start

    def _rma(self) -> int | None:
        """ppc64_rma_size as it is when the region is placed: K1 has not chosen radix yet. None on bare metal: no limit."""
        # hash__setup_initial_memory_limit, arch/powerpc/mm/book3s64/hash_utils.c
        if self._machine.platform == "powernv":
            return None
        rma = self._machine.real_mode.size
        return min(rma, self._limit) if self._limit else rma

    # -- mem=

    @property
    def _total(self) -> int:
        return self._limit or self._machine.memory.total

    def _memory_limit(self) -> int:
        # early_parse_mem, arch/powerpc/kernel/prom.c; the last one counts
        words = re.findall(r"(?:^| )mem=([^ ]*)", self._cmdline)
        return align_up(_memparse(words[-1], 0)[0], self._page) % _ADDRESS_SPACE if words else 0

    def _old_messages(self, wanted: Range) -> None:
        if self._limit and self._limit <= wanted.end - 1:
            self._limit = wanted.end
            self._say(f"Adjusted memory limit for crashkernel, now {self._limit:#x}")
            self._note(f"mem= gives way: K1 has memory up to the region's end {wanted.end:#x}", _CORE)
        self._say(
            f"Reserving {wanted.size >> 20}MB of memory at {wanted.start >> 20}MB "
            f"for crashkernel (System RAM: {self._total >> 20}MB)"
        )

    def _dropped(self, granted: Range) -> RangeSet:
        """What K1 gives up of its region right after it made it: it keeps only so many bytes of memory from 0 on."""
        total = self._machine.memory.total
        limit = min(self._limit or total, total)
        left = align_down(limit, _LARGE_PAGE) if self._rules.trims else align_up(limit, self._page)
        kept = []
        for piece in self._machine.memory:
            if left > 0:
                kept.append(Range.sized(piece.start, min(piece.size, left)))
            left -= piece.size
        dropped = RangeSet([granted]) - RangeSet(kept)
        if dropped:
            self._note(
                f"K1 then cuts off its memory in {dropped}: that part is exported as reserved, but nothing can be loaded there",
                "arch/powerpc/kernel/prom.c, early_init_devtree: memblock_enforce_memory_limit",
            )
        return dropped

    # -- the rest of the line

    def _fadump(self) -> bool:
        words = re.findall(r"(?:^| )fadump=([^ ]*)", self._cmdline)
        if not words or not words[-1].startswith(("on", "nocma")):
            return False
        if _DEBIAN in self._rules.release:
            self._note("fadump= is ignored: Debian's kernels are built without it", "CONFIG_FA_DUMP")
            return False
        tree = self._machine.device_tree
        rtas, opal = tree.child("rtas"), tree.child("ibm,opal")
        supported = (rtas is not None and "ibm,configure-kernel-dump" in rtas.properties) or (
            opal is not None and opal.child("dump") is not None
        )
        if supported:
            self._note("fadump is on: its own area is reserved in place of a region for kexec", "fadump_reserve_mem")
            return True
        self._note("fadump is asked for, the firmware has none: crashkernel= is used as if it were not", "fadump_reserve_mem")
        return False

    def _suffixed(self) -> None:
        for suffix in (",high", ",low"):
            word = _chosen_word(self._cmdline, self._rules, suffix)
            if word is not None:
                self._note(
                    f"crashkernel={word} is ignored: ppc64 has no {suffix}", f"{_CORE}: parse_crashkernel gets no place for it"
                )
        if not self._rules.cma_known:
            return
        word = _chosen_word(self._cmdline, self._rules, ",cma")
        if word is None:
            return
        size, at = _memparse(word, 0)
        if at == 0 or word[at:] != ",cma" or size >= _ADDRESS_SPACE:
            self._note(f"the kernel does not understand crashkernel={word}: no memory for ,cma", "parse_crashkernel_suffix")
        elif not self._rules.cma_reserved:
            self._note(f"crashkernel={word} is ignored: ppc64 reserves memory for ,cma from 6.19 on", _CORE)
        else:
            self._cma = size
            self._note(
                f"{format_size(size)} of ,cma memory: K1 uses it for user pages until it dies, its pages are missing from the "
                "dump, devices may still write to it, and nothing can be loaded there",
                "kernel/crash_reserve.c, reserve_crashkernel_cma; arch/powerpc/mm/mem.c, arch_mm_preinit",
            )

    def _note(self, text: str, source: str) -> None:
        self._reasons.append(f"{text} [{source}]" if source else text)

    def _say(self, message: str) -> None:
        if message:
            self._console.append(message)


# ------------------------------------------------------------------------------------------------------------ the memory


def _memblocks(machine: Machine) -> tuple[RangeSet, RangeSet]:
    """Memory as the kernel keeps it when it makes the reservation: a region must lie in one piece of one of the two.

    Touching pieces are one, but not where one has come in at run time and can be removed again: these are marked
    (early_init_drmem_lmb, arch/powerpc/kernel/prom.c), and memblock keeps what is marked apart (memblock_merge_regions).
    """
    removable = RangeSet(_removable(machine))
    return machine.memory - removable, machine.memory & removable


def _removable(machine: Machine) -> Iterator[Range]:
    node = machine.device_tree.child(DYNAMIC_MEMORY_NODE)
    size = int.from_bytes(node.properties.get("ibm,lmb-size", b""), "big") if node is not None else 0
    if node is None or not 0 < size < _ADDRESS_SPACE:
        return
    for name, layout in (("ibm,dynamic-memory", _LMB), ("ibm,dynamic-memory-v2", _LMB_RUN)):
        data = node.properties.get(name, b"")[4:]
        # a 64 TiB machine has 262,144 blocks, of which mostly none is: one look at the byte of all their flags that says so
        if not any(data[_LMB.size - 2 :: _LMB.size]):
            continue
        for fields in layout.iter_unpack(data[: len(data) // layout.size * layout.size]):
            count, base = (1, fields[0]) if layout is _LMB else fields[:2]
            if fields[-1] & _HOT_REMOVABLE and 0 < base + count * size < _ADDRESS_SPACE and count:
                yield Range.sized(base, count * size)


# arch/powerpc/include/asm/drmem.h: both versions' entries end with the flags
_LMB = struct.Struct(">QIIII")  # base, drc index, reserved, associativity index
_LMB_RUN = struct.Struct(">IQIII")  # consecutive blocks, base, drc index, associativity index
_HOT_REMOVABLE = 0x100  # DRCONF_MEM_HOTREMOVABLE


# ------------------------------------------------------------------------------------------------------------ off limits


def off_limits(machine: Machine, region: Range | None = None) -> tuple[Refusal, ...]:
    """What of this machine's address space no reserved region may have, or is cut out of it, lowest first.

    `region` says which of them are hit. Of those that "crashkernel" refuses, the kernel grants a region over them all the
    same: it has not looked at the firmware's memory yet when it makes the reservation (early_init_devtree calls
    early_reserve_mem after it), and it asks nobody what a CPU reaches with translation off.
    """
    found: list[tuple[Range, str, str, Refuser]] = []
    if machine.kernel_end:
        k1 = Range(0, machine.kernel_end)
        found.append((k1, "K1's own image", f"{_CORE}: Crash kernel can not overlap current kernel", "kernel"))
    for hole in _holes(machine.memory):
        found.append((hole, "no memory", f"{_CORE}; kernel/crash_reserve.c, reserve_crashkernel_generic", "kernel"))
    for named in machine.firmware:
        source = "arch/powerpc/kernel/prom.c, early_init_devtree"
        found.append((named.range, f"the firmware's {named.name}, live while K1 and K2 run", source, "crashkernel"))
    reach, end = machine.real_mode.end, _memory_end(machine)
    if reach < end:
        why = f"beyond the RMA of {format_size(machine.real_mode.size)}: no CPU reaches it with translation off"
        found.append((Range(reach, end), why, f"{_HASH}, {_RMA_LIMIT}", "crashkernel"))
    refusals = [Refusal(*each, hit=region is not None and region.overlaps(each[0])) for each in found]
    return tuple(sorted(refusals, key=lambda refusal: (refusal.range, refusal.why)))


def _memory_end(machine: Machine) -> int:
    return max((piece.end for piece in machine.memory), default=0)


def _holes(memory: RangeSet) -> RangeSet:
    whole = RangeSet([Range(0, max(_PHYSICAL_SPACE, *(piece.end for piece in memory)))]) if memory else RangeSet()
    return whole - memory


# -------------------------------------------------------------------------------------------------------- the mail's variant


def behind_k1(machine: Machine, size: int) -> Range | None:
    """The lowest region of `size` bytes or a little more behind K1's image that the kernel grants; None when there is none.

    None also when nobody knows where K1's image ends. The 2005 mail's answer to a K2 larger than K1: the region starts at
    klimit, so that an exchange with K2 touches nothing of K1's but its image. Whole pages of 64 KiB, and no
    more: what lies between the two is K1's to hand out.
    `low_memory` says what it costs.
    :raise ValueError: when `size` is not positive.
    """
    if not machine.kernel_end:
        return None
    k1 = RangeSet([Range(0, align_up(machine.kernel_end, LARGEST_PAGE))])
    found = ((memory - k1).find(align_up(size, LARGEST_PAGE), LARGEST_PAGE) for memory in _memblocks(machine))
    return min((each for each in found if each is not None), default=None)


def specification(region: Range) -> str:
    """`region` as it is written behind `crashkernel=`: "512M@41472K"."""
    return f"{_short(region.size)}@{_short(region.start)}"


def _short(size: int) -> str:
    for shift, letter in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{letter}"
    return hex(size)


def low_memory(machine: Machine, region: Range) -> tuple[LowMemory, ...]:
    """What `region` leaves free of the memory that K1's boot or its firmware cannot do without, lowest limit first.

    The mail asks whether anybody minds that a region right behind K1's image eats up low memory, and answers: RTAS does.
    """
    cpus = len(machine.cpus)
    least = LOWEST + cpus * LOW_PER_CPU
    if machine.platform == "pseries":
        rma = least + cpus * LOW_STACKS if machine.mmu == "hash" else least
        limits = [
            ("RTAS and the buffers shared with it", RTAS_LIMIT, least, "arch/powerpc/kernel/rtas.c, rtas_initialize"),
            ("the RMA, where K1 keeps what it uses with translation off", machine.real_mode.end, rma, f"{_HASH}, {_RMA_LIMIT}"),
            ("callers of RTAS, which runs in 32-bit mode", RTAS_32_BIT, least, "PAPR 7.2.2"),
        ]
    else:
        limits = [("devices that address 32 bits", RTAS_32_BIT, least, "arch/powerpc/mm/mem.c, paging_init")]
    free = machine.memory - RangeSet([Range(0, max(machine.kernel_end, 1)), *(named.range for named in machine.firmware)])
    found = []
    for name, limit, needed, source in sorted(limits, key=lambda each: each[1]):
        low = free & RangeSet([Range(0, limit)])
        found.append(LowMemory(name, limit, low.total, (low - RangeSet([region])).total, needed, source))
    return tuple(found)


LOWEST = 2 * _MIB
"""Bytes of low memory with which a kernel still boots, of one CPU: seen of Debian 6.1 and 7.2, on POWER8 and POWER9, when all
between 2 MiB behind their image and 1 GiB was reserved. With none left they died without a word on the console."""

LOW_PER_CPU = 8 << 10
"""Bytes of low memory for each possible CPU: its paca and lppaca (arch/powerpc/kernel/paca.c)."""

LOW_STACKS = 48 << 10
"""Bytes below the RMA for each possible CPU, on hash: three stacks for emergencies (emergency_stack_init,
arch/powerpc/kernel/setup_64.c)."""
