"""The machine code around the purgatory: what stands for K1's CPUs, what stands for K2, and the monitor that runs the cases.

Nothing of Linux is here. K1's stub leaves in the registers what `kexec_sequence` and `kexec_wait` leave; K2's stores what it
was entered with. Everything executed in a case is brought to its place by the monitor's own stores: QEMU does not see the
host write to guest memory, and would go on running what it translated there for the case before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from crashkernel.bench.cpus import MIB
from crashkernel.machine import HEAD_SIZE
from crashkernel.purgatory import pack

ARENA = 12 * MIB
"""The memory under test: from 0 up to here. Above are the bench's own things, then QEMU's."""

MONITOR = ARENA  # 0x400 bytes of code for each CPU
STUBS = ARENA + 0x10000  # K1's, 0x400 bytes for each CPU
STUB_SIZE = 0x400
K2_BOX = ARENA + 0x20000  # what K2's stub stores
START_BOX = ARENA + 0x21000  # what the crashing CPU's stub stores when it leaves, and room for tests
# Between host and monitor, 64-bit words, each with one writer. (With one word that the host sets and the guest clears, a case
# in some ten thousands ran twice: the C library stores eight bytes twice over, the second time after the clearing.)
GO = ARENA + 0x22000  # for each CPU, the host's: a number other than the last lets it go to its stub
TAKEN = ARENA + 0x22100  # for each CPU, the guest's: the last number it went for
UP = ARENA + 0x22200  # for each CPU, the guest's: the same, when it is back in the monitor
LOAD = ARENA + 0x22300  # the host's: another number asks the first CPU to bring the pieces to their places
LOADED = ARENA + 0x22308  # the guest's: the last number it did so for
PIECES = ARENA + 0x22400  # rows of destination, source, doublewords; one of no doublewords is the last
SLAVE_BOX = ARENA + 0x40000  # 0x80 bytes for each physical id
SLAVE_BOX_SIZE = 0x80
STAGING = ARENA + MIB  # the pieces
TOP = ARENA + 2 * MIB

MARKER = 0x4B32  # "K2"
MSR_LE, MSR_RI, MSR_ME = 0x1, 0x2, 0x1000

K2_WORDS = ("r3", "r4", "r5", "r6", "r7", "r8", "r9", "msr", "timebase", "marker")
"""What K2's stub stores for the CPU that entered: 64-bit words of its box."""
SLAVE_WORDS = ("r3", "msr", "marker")
"""And for every other CPU."""
SLAVE_RETURN = 0x40
"""In a slave's box, put there by the host: where its CPU goes afterwards."""
START_WORDS = ("timebase", "msr")

ENTRY_ROOM = 0x700
"""K2's stub: its code lies below this offset, the handler of its program interrupt at it."""
K2_SIZE = 0x740


class Code:
    """Big-endian instructions, one method each, as few as the stubs need."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self._labels: dict[str, int] = {}
        self._branches: list[tuple[int, str]] = []

    def __bytes__(self) -> bytes:
        words = list(self.words)
        for at, label in self._branches:
            words[at] |= (self._labels[label] - at) * 4 & (0x3FFFFFC if words[at] >> 26 == 18 else 0xFFFC)
        return b"".join(word.to_bytes(4, "big") for word in words)

    def word(self, value: int) -> Code:
        """Any instruction."""
        self.words.append(value & 0xFFFFFFFF)
        return self

    def label(self, name: str) -> Code:
        """Name this place for branches."""
        self._labels[name] = len(self.words)
        return self

    def branch(self, label: str, condition: str = "b") -> Code:
        """To a label, before or after it is placed."""
        self._branches.append((len(self.words), label))
        return self.word(
            {"b": 0x48000000, "beq": 0x41820000, "bne": 0x40820000, "blt": 0x41800000, "bdnz": 0x42000000}[condition]
        )

    def load(self, register: int, value: int) -> Code:
        """A constant of 31 bits: lis, ori."""
        assert 0 <= value < 1 << 31
        self.word(15 << 26 | register << 21 | value >> 16)
        return self.word(24 << 26 | register << 21 | register << 16 | value & 0xFFFF)

    def std(self, register: int, offset: int, base: int) -> Code:
        """Store 64 bits."""
        return self.word(62 << 26 | register << 21 | base << 16 | offset)

    def ld(self, register: int, offset: int, base: int) -> Code:
        """Load 64 bits."""
        return self.word(58 << 26 | register << 21 | base << 16 | offset)

    def sldi(self, target: int, source: int, shift: int) -> Code:
        """Shift left: rldicr target, source, shift, 63 - shift."""
        sh, me = shift, 63 - shift
        me_field = (me & 31) << 1 | me >> 5
        return self.word(30 << 26 | source << 21 | target << 16 | (sh & 31) << 11 | me_field << 5 | 1 << 2 | (sh >> 5) << 1)

    def add(self, target: int, one: int, other: int) -> Code:
        """Sum of two registers."""
        return self.word(31 << 26 | target << 21 | one << 16 | other << 11 | 266 << 1)

    def addi(self, target: int, source: int, value: int) -> Code:
        """Sum of a register other than r0 and a constant."""
        return self.word(14 << 26 | target << 21 | source << 16 | value & 0xFFFF)

    def subf(self, target: int, less: int, source: int) -> Code:
        """`source` - `less`."""
        return self.word(31 << 26 | target << 21 | less << 16 | source << 11 | 40 << 1)

    def ori(self, target: int, source: int, value: int) -> Code:
        """Or with a constant."""
        return self.word(24 << 26 | source << 21 | target << 16 | value)

    def cmpdi(self, register: int, value: int) -> Code:
        """Compare with a constant, signed."""
        return self.word(0x2C200000 | register << 16 | value & 0xFFFF)

    def cmpd(self, one: int, other: int) -> Code:
        """Compare two registers, signed."""
        return self.word(0x7C200000 | one << 16 | other << 11)

    def mfmsr(self, register: int) -> Code:
        """Read the MSR."""
        return self.word(31 << 26 | register << 21 | 83 << 1)

    def mftb(self, register: int) -> Code:
        """Read the time base."""
        return self.word(0x7C0C42A6 | register << 21)

    def mtspr(self, number: int, register: int) -> Code:
        """Write a special register."""
        return self.word(31 << 26 | register << 21 | (number & 31) << 16 | (number >> 5) << 11 | 467 << 1)

    def sixty_four_bit(self) -> Code:
        """Set MSR.SF, whatever it was."""
        self.load(20, 1).mfmsr(21)
        self.word(30 << 26 | 20 << 21 | 21 << 16 | 31 << 11 | 3 << 2 | 1 << 1)  # rldimi r21, r20, 63, 0
        return self.word(0x7C000164 | 21 << 21)  # mtmsrd r21

    def sync(self) -> Code:
        """Stores before this are seen before stores after it."""
        return self.word(0x7C0004AC)

    def isync(self) -> Code:
        """Forget what was fetched."""
        return self.word(0x4C00012C)

    def trap(self) -> Code:
        """A program interrupt, at once: the CPU goes to 0x700."""
        return self.word(0x7FE00008)

    def hypercall(self) -> Code:
        """`sc 1`."""
        return self.word(0x44000022)

    def stop(self) -> Code:
        """Branch to itself."""
        return self.word(0x48000000)

    def delay(self, ticks: int) -> Code:
        """Spin for so many ticks of the time base. r24 to r26."""
        name = f"delay {len(self.words)}"
        self.mftb(24).load(25, ticks).label(name)
        return self.mftb(26).subf(26, 24, 26).cmpd(26, 25).branch(name, "blt")

    def go_to(self, address: int) -> Code:
        """Jump. r22, ctr."""
        return self.load(22, address).mtspr(9, 22).word(0x4E800420)  # bctr

    def enter(self, address: int, *, little: bool = False) -> Code:
        """Jump with machine checks enabled, as a kernel leaves them, in either byte order. r22, r23, srr0, srr1."""
        self.load(22, address).mfmsr(23).ori(23, 23, MSR_ME | little * MSR_LE)
        return self.mtspr(26, 22).mtspr(27, 23).word(0x4C000024)  # rfid


def k1_stub(
    number: int,
    physical: int,
    target: int,
    *,
    little: bool = False,
    delay: int = 0,
    before: Callable[[Code, int], object] = lambda _code, _cpu: None,
) -> bytes:
    """K1's last instructions on CPU `number`: to the purgatory at `target`, or to absolute 0x60.

    `before` adds what a test wants done first, `delay` is in ticks of the time base.
    """
    code = Code()
    before(code, number)
    if delay:
        code.delay(delay)
    if number == 0:
        code.load(20, START_BOX).mftb(21).std(21, 0, 20).mfmsr(21).ori(21, 21, MSR_ME).std(21, 8, 20)
    # what kexec_sequence and kexec_wait leave in the registers; r4 is the image's address for the crashing CPU only
    code.load(3, physical).load(4, target).load(5, 0)
    for register in (6, 7, 8, 9, *range(24, 32)):
        code.load(register, 0x7EAD0000 + register)
    stub = bytes(code.enter(target, little=little))
    assert len(stub) <= STUB_SIZE
    return stub


def k2_code(*, trap: bool = False, more: Callable[[Code], object] = lambda _: None) -> bytes:
    """K2 from its first byte: stores its registers, then the marker, and goes to the monitor; at 0x60 the other CPUs.

    Like a kernel's (FIXUP_ENDIAN), the code at 0x60 takes either byte order; the purgatory's own switch does that here.

    :param trap: take a program interrupt on the way. Only the handler of *this* image, 0x700 bytes in, sets the marker.
    :param more: what a test wants done between registers and marker.
    """
    entry = Code().load(20, K2_BOX)
    for slot, register in enumerate(range(3, 10)):
        entry.std(register, 8 * slot, 20)
    entry.mfmsr(21).std(21, 56, 20).mftb(21).std(21, 64, 20)
    entry.word(0x48000000 | (HEAD_SIZE - 4 * len(entry.words)))  # b to the rest, behind the head
    finish = bytes(Code().load(20, K2_BOX).load(22, MARKER).sync().std(22, 72, 20).go_to(MONITOR))
    rest = Code()
    more(rest)
    rest_bytes = bytes(rest.trap().stop()) if trap else bytes(rest) + finish
    slave = Code().load(20, SLAVE_BOX).sldi(21, 3, 7).add(20, 20, 21)
    slave.std(3, 0, 20).mfmsr(21).std(21, 8, 20).load(22, MARKER).sync().std(22, 16, 20)
    slave.ld(22, SLAVE_RETURN, 20).mtspr(9, 22).word(0x4E800420)  # bctr
    head = bytes(entry).ljust(0x60, b"\0") + _switch() + bytes(slave)
    assert len(head) <= HEAD_SIZE
    assert len(rest_bytes) <= ENTRY_ROOM - HEAD_SIZE
    return ((head.ljust(HEAD_SIZE, b"\0") + rest_bytes).ljust(ENTRY_ROOM, b"\0") + finish).ljust(K2_SIZE, b"\0")


@cache
def _switch() -> bytes:
    """The words that leave a CPU big-endian whatever it was: the purgatory begins with them."""
    return pack(0, (), bytes(HEAD_SIZE), fdt=0, entry=0)[:0x30]


def monitor(number: int) -> bytes:
    """What CPU `number` does between cases, at MONITOR + 0x400 * number: brings pieces (the first CPU), waits, goes."""
    offset = 8 * number
    # QEMU's pseries starts its CPUs in 32-bit mode; no K1 ends in that
    code = Code().sixty_four_bit().load(20, TAKEN).ld(21, offset, 20).load(20, UP).sync().std(21, offset, 20)
    code.label("wait")
    if number == 0:
        code.load(20, LOAD).ld(21, 0, 20).load(20, LOADED).ld(22, 0, 20).cmpd(21, 22).branch("load", "bne")
    code.load(20, GO).ld(21, offset, 20).load(20, TAKEN).ld(22, offset, 20).cmpd(21, 22).branch("wait", "beq")
    code.std(21, offset, 20).sync().isync().go_to(STUBS + STUB_SIZE * number)
    code.label("load").load(23, PIECES)
    code.label("piece").ld(24, 0, 23).ld(25, 8, 23).ld(26, 16, 23).cmpdi(26, 0).branch("loaded", "beq").mtspr(9, 26)
    code.label("copy").ld(27, 0, 25).std(27, 0, 24).addi(24, 24, 8).addi(25, 25, 8).branch("copy", "bdnz")
    code.addi(23, 23, 24).branch("piece")
    code.label("loaded").sync().isync().load(20, LOADED).std(21, 0, 20).branch("wait")
    return bytes(code)
