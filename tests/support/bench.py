"""The bench: the packed purgatory alone on an emulated CPU, in memory that the test maps and models byte by byte.

Nothing of Linux is here. A stub of a few instructions stands for each CPU of K1, another for K2: it stores the registers it
was entered with and stops. QEMU's `-M none` would do, were it not that it has no time base: `mftb` ends QEMU 7.2 there with
a segmentation fault, and the purgatory waits by the time base. So the 970 sits in a mac99 and the others in powernv
machines, whose firmware is replaced by the very bytes under test, and a loader device points each CPU at its stub.
"""

import contextlib
import mmap
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from crashkernel.machine import HEAD_SIZE
from crashkernel.placement.moves import Exchange, Move, Put
from crashkernel.purgatory import PARAMETERS_OFFSET, pack

QEMU = "qemu-system-ppc64"
MIB = 1 << 20

ARENA = 12 * MIB
"""The memory under test: from 0 up to here. QEMU's machines keep their own things above."""
QUIET = 0xB00000
"""What no random move touches: purgatory, tree, stubs, mailboxes."""
PURGATORY, TREE, STUBS, MAILBOX, ENTRY = QUIET, QUIET + 0x10000, QUIET + 0x20000, QUIET + 0x30000, QUIET + 0x40000
UP, GO = MAILBOX + 0x8000, MAILBOX + 0x8800  # a 64-bit word for each CPU: K1's stub says it runs, and waits to be let go
MARKER = 0x4B32  # "K2"

# What K2's stub stores for the CPU that entered: 64-bit words of its mailbox.
K2_WORDS = ("r3", "r4", "r5", "r6", "r7", "r8", "r9", "msr", "timebase", "marker")
SLAVE_BOX = MAILBOX + 0x1000  # and for each other CPU, 0x80 bytes at SLAVE_BOX + 0x80 * its physical id
SLAVE_WORDS = ("r3", "msr", "marker")
START_BOX = MAILBOX + 0x7000  # the time base when the crashing CPU left K1's stub, then results of hypercalls
MSR_LE = 1

ARRIVED, RELEASED = (PURGATORY + PARAMETERS_OFFSET + offset for offset in (0x34, 0x38))


class Code:
    """Big-endian instructions, one method each, as few as the stubs need."""

    def __init__(self) -> None:
        self.words: list[int] = []

    def __bytes__(self) -> bytes:
        return b"".join(word.to_bytes(4, "big") for word in self.words)

    def word(self, value: int) -> "Code":
        self.words.append(value & 0xFFFFFFFF)
        return self

    def load(self, register: int, value: int) -> "Code":
        """A constant of 31 bits: lis, ori."""
        assert 0 <= value < 1 << 31
        self.word(15 << 26 | register << 21 | value >> 16)
        return self.word(24 << 26 | register << 21 | register << 16 | value & 0xFFFF)

    def std(self, register: int, offset: int, base: int) -> "Code":
        return self.word(62 << 26 | register << 21 | base << 16 | offset)

    def ld(self, register: int, offset: int, base: int) -> "Code":
        return self.word(58 << 26 | register << 21 | base << 16 | offset)

    def sldi(self, target: int, source: int, shift: int) -> "Code":
        sh, me = shift, 63 - shift  # rldicr target, source, shift, 63 - shift
        me_field = (me & 31) << 1 | me >> 5
        return self.word(30 << 26 | source << 21 | target << 16 | (sh & 31) << 11 | me_field << 5 | 1 << 2 | (sh >> 5) << 1)

    def add(self, target: int, one: int, other: int) -> "Code":
        return self.word(31 << 26 | target << 21 | one << 16 | other << 11 | 266 << 1)

    def ori(self, target: int, source: int, value: int) -> "Code":
        return self.word(24 << 26 | source << 21 | target << 16 | value)

    def mfmsr(self, register: int) -> "Code":
        return self.word(31 << 26 | register << 21 | 83 << 1)

    def mftb(self, register: int) -> "Code":
        return self.word(0x7C0C42A6 | register << 21)

    def mtspr(self, number: int, register: int) -> "Code":
        return self.word(31 << 26 | register << 21 | (number & 31) << 16 | (number >> 5) << 11 | 467 << 1)

    def wait_for(self, address: int) -> "Code":
        """Spin until the 64-bit word at `address` is not 0."""
        self.load(20, address)
        self.ld(21, 0, 20)
        self.word(0x2C350000)  # cmpdi r21, 0
        return self.word(0x4182FFF8)  # beq .-8

    def sync(self) -> "Code":
        return self.word(0x7C0004AC)

    def hypercall(self) -> "Code":
        return self.word(0x44000022)

    def go_to(self, address: int, *, little: bool = False) -> "Code":
        """Jump, and be little-endian afterwards if so wanted."""
        self.load(22, address)
        if not little:
            self.mtspr(9, 22)
            return self.word(0x4E800420)  # bctr
        self.mfmsr(23).ori(23, 23, MSR_LE)
        self.mtspr(26, 22).mtspr(27, 23)
        return self.word(0x4C000024)  # rfid

    def stop(self) -> "Code":
        return self.word(0x48000000)  # b .


def k2_code(more: Callable[[Code], object]) -> bytes:
    """K2 at its entry: stores its registers, then the marker; and at 0x60 what the other CPUs run.

    Like a kernel's (FIXUP_ENDIAN), the code at 0x60 takes either byte order; the purgatory's own switch does that here.
    """
    code = Code().load(20, MAILBOX)
    for slot, register in enumerate(range(3, 10)):
        code.std(register, 8 * slot, 20)
    code.mfmsr(21).std(21, 56, 20).mftb(21).std(21, 64, 20)
    code.word(0x48000000 | (0x100 - 4 * len(code.words)))  # b to 0x100 of the image
    rest = Code()
    more(rest)
    rest.load(20, MAILBOX).load(22, MARKER).sync().std(22, 72, 20).stop()
    slave = Code().load(20, SLAVE_BOX).sldi(21, 3, 7).add(20, 20, 21)
    slave.std(3, 0, 20).mfmsr(21).std(21, 8, 20).load(22, MARKER).sync().std(22, 16, 20).stop()
    switch = pack(0, (), bytes(HEAD_SIZE), fdt=0, entry=0)[:0x30]
    return (bytes(code).ljust(0x60, b"\0") + switch + bytes(slave)).ljust(0x100, b"\0") + bytes(rest)


@dataclass(frozen=True)
class Cpu:
    """What to run on. `ids` are the physical ids that the stubs give their CPUs."""

    name: str
    machine: str
    options: tuple[str, ...]
    memory: int
    little: bool  # whether MSR.LE exists
    count: int = 1
    partition: bool = False


CPUS = {
    "970fx": Cpu("970fx", "mac99", ("-cpu", "970fx"), 128 * MIB, little=False),
    "POWER8": Cpu("POWER8", "powernv8", ("-smp", "2"), 1024 * MIB, little=True, count=2),
    "POWER9": Cpu("POWER9", "powernv9", ("-smp", "2"), 1024 * MIB, little=True, count=2),
    "POWER10": Cpu("POWER10", "powernv10", ("-smp", "2"), 1024 * MIB, little=True, count=2),
    "partition": Cpu(
        "partition",
        "pseries,x-vof=off,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
        ("-cpu", "POWER9", "-smp", "2"),
        256 * MIB,
        little=True,
        count=2,
        partition=True,
    ),
}


def pattern() -> np.ndarray:
    """Memory in which every 8 bytes name their own address."""
    return (np.arange(0, ARENA, 8, dtype=np.uint64) | np.uint64(0x5A << 56)).astype(">u8").view(np.uint8)


def make(memory: np.ndarray, moves: Iterable[Move], head: bytes) -> None:
    """The model: the moves, made with slices."""
    for move in moves:
        dst = slice(move.dst, move.dst + move.size)
        if isinstance(move, Put):
            memory[dst] = np.frombuffer(head, np.uint8)[dst]
            continue
        src = slice(move.src, move.src + move.size)
        arriving = memory[src].copy()
        if isinstance(move, Exchange):
            memory[src] = memory[dst]
        memory[dst] = arriving


@dataclass
class Crash:
    """A dead K1: the moves to make, and how the CPUs come to the purgatory.

    `comes` lists when each CPU but the crashing one leaves its stub: True at once, False when `Run.release` says so.
    """

    cpu: Cpu
    moves: tuple[Move, ...]
    entry: int = ENTRY
    k2_at: int | None = None  # where K2's code waits before the moves; at its entry if None
    little: bool = False
    ids: tuple[int, ...] = (0x11,)  # physical ids: the crashing CPU's first
    comes: tuple[bool, ...] = ()
    slaves: int = 0  # expected
    slave_timeout: int = 0  # ticks
    opal: tuple[int, int] = (0, 0)
    base: int = PURGATORY
    partition: bool = False
    master_comes: bool = True
    before: Callable[[Code, int], object] = lambda _code, _cpu: None  # more of K1's stub, for the partition
    after: Callable[[Code], object] = lambda _: None  # more of K2's
    places: tuple[tuple[int, bytes], ...] = ()  # more bytes of K1's
    head: bytes = b""
    memory: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))

    def __post_init__(self) -> None:
        memory = pattern()
        self.head = memory[:HEAD_SIZE].tobytes()
        code = k2_code(self.after)
        at = self.entry if self.k2_at is None else self.k2_at
        self._write(memory, at, code)
        for number, _ in enumerate(self.ids):
            self._write(memory, STUBS + 0x400 * number, self._stub(number))
        self._write(memory, MAILBOX, bytes(0x9000))
        for place, data in self.places:
            self._write(memory, place, data)
        self._write(memory, self.base, self.purgatory())
        self._write(memory, 0, self.purgatory()[:HEAD_SIZE])  # kexec_sequence
        if self.cpu.partition:
            # the hypervisor starts the first CPU at 0x100
            self._write(memory, 0x100, (18 << 26 | STUBS | 2).to_bytes(4, "big"))
        self.memory = memory

    def purgatory(self) -> bytes:
        return pack(
            self.base,
            self.moves,
            self.head,
            fdt=TREE,
            entry=self.entry,
            opal=self.opal,
            slaves=self.slaves,
            slave_timeout=self.slave_timeout,
            partition=self.partition,
        )

    def _stub(self, number: int) -> bytes:
        code = Code().load(20, UP).load(21, 1).std(21, 8 * number, 20)
        code.wait_for(GO + 8 * number)
        self.before(code, number)
        if number == 0:
            code.mftb(24).load(20, START_BOX).std(24, 0, 20)
        # what kexec_sequence and kexec_wait leave in the registers
        code.load(3, self.ids[number]).load(4, self.base).load(5, 0)
        for register in (6, 7, 8, 9, 30, 31):
            code.load(register, 0x7EAD0000 + register)
        stub = bytes(code.go_to(self.base if number == 0 else 0x60, little=self.little))
        assert len(stub) <= 0x400
        return stub

    @staticmethod
    def _write(memory: np.ndarray, at: int, data: bytes) -> None:
        memory[at : at + len(data)] = np.frombuffer(data, np.uint8)

    def expected(self, run: "Run") -> np.ndarray:
        """Memory afterwards, by the model. The mailboxes are as they were found: they are looked at by name."""
        memory = self.memory.copy()
        make(memory, self.moves, self.head)
        self._write(memory, TREE + 28, self.ids[0].to_bytes(4, "big"))
        arrived = self.base + PARAMETERS_OFFSET + 0x34
        self._write(memory, arrived, run.u32(arrived).to_bytes(4, "big"))
        self._write(memory, arrived + 4, (1).to_bytes(4, "big"))  # released
        boxes = slice(MAILBOX, MAILBOX + 0x9000)
        memory[boxes] = run.memory[boxes]
        return memory

    @contextlib.contextmanager
    def run(self, directory: Path) -> Iterator["Run"]:
        """Start the CPUs; QEMU is gone when the context ends."""
        if shutil.which(QEMU) is None:
            pytest.skip(f"{QEMU} is not installed")
        ram, firmware = directory / "ram", directory / "firmware"
        firmware.write_bytes(self.memory[:0x1000].tobytes())
        with ram.open("w+b") as file:
            file.truncate(self.cpu.memory)
            mapped = mmap.mmap(file.fileno(), ARENA)
        mapped[:] = self.memory.tobytes()
        command = [QEMU, "-M", f"{self.cpu.machine},memory-backend=ram", *self.cpu.options, "-m", str(self.cpu.memory // MIB)]
        command += ["-object", f"memory-backend-file,id=ram,size={self.cpu.memory},mem-path={ram},share=on"]
        command += ["-display", "none", "-nodefaults", "-accel", "tcg,thread=multi", "-bios", str(firmware)]
        for number in range(self.cpu.count if not self.cpu.partition else 0):
            stub = STUBS + 0x400 * number if number < len(self.ids) else STUBS + 0x7000
            command += ["-device", f"loader,addr={stub:#x},cpu-num={number}"]
        mapped[STUBS + 0x7000 : STUBS + 0x7004] = bytes(Code().stop())
        self._write(self.memory, STUBS + 0x7000, bytes(Code().stop()))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        run = Run(self, process, mapped)
        try:
            up = [number for number, _ in enumerate(self.ids) if number == 0 or not self.cpu.partition]
            run.wait(lambda: all(run.u64(UP + 8 * number) for number in up), "K1's CPUs")
            mapped[:HEAD_SIZE] = self.memory[:HEAD_SIZE].tobytes()  # mac99 puts an empty command line at address 0
            for number, free in enumerate((self.master_comes, *self.comes)):
                if free:
                    run.release(number)
            yield run
        finally:
            process.kill()
            process.communicate()
            mapped.close()
            ram.unlink()


@dataclass
class Run:
    """The bench while it runs: memory as it is now, and what the stubs left in their mailboxes."""

    crash: Crash
    process: subprocess.Popen
    mapped: mmap.mmap

    @property
    def memory(self) -> np.ndarray:
        """A copy of the arena."""
        return np.frombuffer(self.mapped[:], np.uint8)

    def u32(self, at: int) -> int:
        return int.from_bytes(self.mapped[at : at + 4], "big")

    def u64(self, at: int) -> int:
        return int.from_bytes(self.mapped[at : at + 8], "big")

    def release(self, number: int) -> None:
        """Let CPU `number` leave its stub."""
        self.mapped[GO + 8 * number : GO + 8 * number + 8] = (1).to_bytes(8, "big")

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
        """Poll memory until `condition` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                output = self.process.stdout.read().decode("utf-8", "replace")
                pytest.fail(f"QEMU ended with {self.process.returncode}: {output.strip()}")
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not seen after {seconds:.0f} s")
            time.sleep(0.002)

    def finish(self, seconds: float = 10) -> dict[str, int]:
        """Wait for K2's marker; the registers K2 was entered with."""
        self.wait(lambda: self.u64(MAILBOX + 72) == MARKER, "K2's first instructions", seconds)
        return {name: self.u64(MAILBOX + 8 * slot) for slot, name in enumerate(K2_WORDS)}

    def slave(self, physical: int) -> dict[str, int]:
        """Wait until another CPU is in K2's slave code; its registers."""
        box = SLAVE_BOX + 0x80 * physical
        self.wait(lambda: self.u64(box + 16) == MARKER, f"CPU {physical:#x} in K2's slave code")
        return {name: self.u64(box + 8 * slot) for slot, name in enumerate(SLAVE_WORDS)}

    def check(self, *, except_at: Iterable[tuple[int, int]] = ()) -> None:
        """Hold all memory against the model; `except_at` are (address, size) that may be anything."""
        found, wanted = self.memory.copy(), self.crash.expected(self)
        for at, size in except_at:
            found[at : at + size] = wanted[at : at + size]
        wrong = np.flatnonzero(found != wanted)
        if len(wrong):
            at = int(wrong[0]) & ~7
            text = f"{at:#x} holds {found[at : at + 8].tobytes().hex()}, not {wanted[at : at + 8].tobytes().hex()}"
            pytest.fail(f"{len(wrong)} bytes are wrong, from {int(wrong[0]):#x} to {int(wrong[-1]):#x}; {text}")
