"""One machine under QEMU's debug port, stopped: step it, change it, let it run, put it back.

The bench's other users start a purgatory and look at what it left. Here every instruction is looked at: `Stepper` drives one
CPU through the gdb remote protocol while the others stand still, and `save` and `restore` let one walk through a handover be
left at any instruction, disturbed, run to its end, and resumed as if nothing had been.

What was found out about QEMU 7.2, and rules this module:

- the packets that carry all registers at once (`g`, `G`) abort QEMU on a POWER9; those of one register (`p`, `P`) do not;
- a packet may follow another before the first is answered, so forty registers cost one trip, not forty;
- the host may write guest memory through its shared file, but QEMU then goes on executing what it translated before. What
  may be executed is therefore written by the debugger (`M`), which drops such translations;
- a CPU in checkstop, or in nap with nothing to wake it, answers no step; an interrupt (a byte 3) gets the debugger back, but
  not the CPU;
- registers travel in the byte order that MSR.LE says at that moment;
- `-S` stops the machine before its first instruction, so no stub has to bring a CPU to its starting point.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from crashkernel.bench.cpus import QEMU
from crashkernel.errors import CrashkernelError, EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from crashkernel.bench.cpus import Cpu

BYTES = np.ndarray[tuple[int], np.dtype[np.uint8]]
"""Memory as it is looked at here."""

MSR_SF, MSR_HV, MSR_EE, MSR_PR, MSR_ME, MSR_IR, MSR_DR, MSR_RI, MSR_LE = (
    1 << 63, 1 << 60, 1 << 15, 1 << 14, 1 << 12, 1 << 5, 1 << 4, 1 << 1, 1,
)  # fmt: skip
"""Power ISA Book III 4.2.1."""

# gdb's numbers (gdb-xml/power64-core.xml in QEMU); the special registers after them are asked for by name.
_CORE = {f"r{number}": number for number in range(32)} | {"pc": 64, "msr": 65, "cr": 66, "lr": 67, "ctr": 68, "xer": 69}
_CORE_REGISTERS = 71
_STATE = (
    *(f"r{number}" for number in range(32)),
    "pc",
    "cr",
    "lr",
    "ctr",
    "xer",
    "srr0",
    "srr1",
    "sprg3",
)  # and msr, before them

_PIECE = 0x700  # bytes of memory in one `M` packet: QEMU's buffer is 4096 characters
_NOWHERE = 0x1000  # where the CPUs would start if anybody let them; not 0, which the loader device takes for nothing
_GAP = 64  # bytes: differences closer than this are written as one
_LATE = 30.0  # seconds for an answer that takes microseconds: a loaded host
_STEP = 5.0  # seconds for one instruction


class StandsStill(CrashkernelError):
    """A CPU does not execute its next instruction, or QEMU's debug port says nothing sensible of it: a checkstop, a nap.

    Nothing brings such a CPU back but a new QEMU.
    """


@dataclass(frozen=True)
class State:
    """All that a CPU and the arena were."""

    registers: Mapping[str, int]
    memory: bytes


class Stepper:
    """A stopped machine. Numbers of CPUs count from 0."""

    def __init__(self, process: subprocess.Popen[bytes], port: socket.socket, mapped: mmap.mmap, count: int) -> None:
        self._process, self._port = process, port
        self._received = b""
        self._cpu = 0
        self._little = [False] * count  # by CPU: the byte order its registers travel in
        self._stops: set[int] = set()
        self._threads: dict[int, Path] = {}
        self.memory: BYTES = np.frombuffer(mapped, np.uint8)
        """The arena, shared with the guest. Write nothing here that was ever executed: see `poke`."""
        self._numbers = dict(_CORE)
        self._widths: dict[str, int] = {}
        self._ask("qSupported:multiprocess+", "?")
        self._name_special_registers()

    @classmethod
    @contextlib.contextmanager
    def start(cls, cpu: Cpu, arena: int, *, count: int = 1) -> Iterator[Self]:
        """`count` CPUs before their first instruction, `arena` bytes of their memory in reach; QEMU is gone afterwards.

        :raise EnvironmentFault: QEMU is missing or does not start.
        """
        if shutil.which(QEMU) is None:
            raise EnvironmentFault(f"{QEMU} is not installed", hint="apt-get install qemu-system-ppc")
        with tempfile.TemporaryDirectory(prefix="crashkernel-stepper-") as name, contextlib.ExitStack() as stack:
            directory = Path(name)
            ram, firmware, place, errors = (directory / part for part in ("ram", "firmware", "gdb", "qemu.log"))
            firmware.write_bytes(bytes(0x1000))
            with ram.open("w+b") as file:
                file.truncate(cpu.memory)
                mapped = mmap.mmap(file.fileno(), arena)
            command = cpu.command(ram, firmware, [_NOWHERE] * count)
            command += [
                "-name",
                "stepper,debug-threads=on",
                "-S",
                "-chardev",
                f"socket,id=gdb,path={place},server=on,wait=off",
                "-gdb",
                "chardev:gdb",
            ]
            with errors.open("wb") as sink:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
            stack.callback(process.wait)
            stack.callback(process.kill)
            port = stack.enter_context(socket.socket(socket.AF_UNIX))
            port.settimeout(_LATE)
            deadline = time.monotonic() + _LATE
            while port.connect_ex(str(place)):
                if process.poll() is not None or time.monotonic() > deadline:
                    said = errors.read_text(errors="replace").strip()
                    raise EnvironmentFault(f"QEMU did not start: {said.splitlines()[-1] if said else 'it says nothing'}")
                time.sleep(0.005)
            yield cls(process, port, mapped, count)

    # -- registers

    def read(self, *names: str, cpu: int = 0) -> tuple[int, ...]:
        """Registers by name: r0..r31, pc, msr, cr, lr, ctr, xer, and the special ones as gdb's XML has them (srr0, hid0)."""
        answers = self._on(cpu, "p41", *(f"p{self._numbers[name]:x}" for name in names))
        self._little[cpu] = bool(int(answers[0][:2], 16) & MSR_LE)
        values = []
        for name, answer in zip(names, answers[1:], strict=True):
            self._widths[name] = len(answer) // 2
            values.append(self._number(answer, cpu))
        return tuple(values)

    def write(self, values: Mapping[str, int], cpu: int = 0) -> None:
        """Set registers. The MSR goes first, for it decides how the others travel."""
        (before,) = self.read("msr", cpu=cpu)
        if "msr" in values and values["msr"] != before:
            self._set(cpu, {"msr": values["msr"]})
            self._little[cpu] = bool(values["msr"] & MSR_LE)
        self._set(cpu, {name: value for name, value in values.items() if name != "msr"})

    def _set(self, cpu: int, values: Mapping[str, int]) -> None:
        unknown = [name for name in values if name not in self._widths]
        if unknown:
            self.read(*unknown, cpu=cpu)
        order = "little" if self._little[cpu] else "big"
        packets = [f"P{self._numbers[n]:x}={v.to_bytes(self._widths[n], order).hex()}" for n, v in values.items()]  # type: ignore[arg-type]
        for packet, answer in zip(packets, self._on(cpu, *packets), strict=True):
            self._expect(answer, "OK", packet)

    def _number(self, answer: str, cpu: int) -> int:
        return int.from_bytes(bytes.fromhex(answer), "little" if self._little[cpu] else "big")

    def _name_special_registers(self) -> None:
        """QEMU numbers them after the core's, feature by feature, in the order in which it names the features."""
        number = _CORE_REGISTERS
        for feature in re.findall(r'include href="([^"]+)"', self._document("target.xml"))[1:]:
            for name in re.findall(r'<reg name="([^"]+)"', self._document(feature)):
                self._numbers.setdefault(name, number)
                number += 1

    def _document(self, name: str) -> str:
        text, more = "", True
        while more:
            (answer,) = self._ask(f"qXfer:features:read:{name}:{len(text):x},7fb")
            text, more = text + answer[1:], answer[0] == "m"
        return text

    # -- memory

    def poke(self, at: int, data: bytes) -> None:
        """Write memory that may be executed."""
        packets = []
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            packets.append(f"M{at + start:x},{len(piece):x}:{piece.hex()}")
        for answer in self._ask(*packets):
            self._expect(answer, "OK", f"M{at:x}")

    # -- going on

    def step(self, cpu: int = 0) -> int:
        """One instruction on one CPU; the address of the next.

        :raise StandsStill: it does not execute it.
        """
        return self.step_reading(cpu=cpu)[0]

    def step_reading(self, *names: str, cpu: int = 0) -> tuple[int, ...]:
        """One instruction; the address of the next, and what these core registers were before it."""
        before = self._on(cpu, *(f"p{self._numbers[name]:x}" for name in names))
        values = [self._number(answer, cpu) for answer in before]
        start = self._pc(cpu) if len(self._little) > 1 else None
        self._go_on(f"vCont;s:{_thread(cpu)}", _STEP)
        after = self._pc(cpu)
        if after == start:
            # seen once on a busy host: with a second CPU the step ended before it had begun. An instruction that branches to
            # itself does it twice, and nobody can tell.
            self._go_on(f"vCont;s:{_thread(cpu)}", _STEP)
            after = self._pc(cpu)
        return after, *values

    def _pc(self, cpu: int) -> int:
        (answer,) = self._on(cpu, "p40")
        if self._little[cpu] or answer[:8] != "00000000":  # after an rfid the byte order may be another
            return self.read("pc", cpu=cpu)[0]
        return int(answer, 16)

    def enter(self, address: int, *, physical: int, little: bool, cpu: int = 0) -> None:
        """Stand at a purgatory's first instruction, or at absolute 0x60, with what K1 leaves in the registers.

        kexec_sequence and kexec_wait (Linux, arch/powerpc/kernel/misc_64.S): translation and interrupts off, machine checks
        on. What they do not promise is filled with a pattern.
        """
        registers = {f"r{number}": 0x7EAD0000_7EAD0000 + number for number in range(32)}
        hypervisor = self.read("msr", cpu=cpu)[0] & MSR_HV
        registers |= {"msr": MSR_SF | hypervisor | MSR_ME | MSR_RI | little * MSR_LE, "pc": address}
        self.write(registers | {"r3": physical, "r4": address, "r5": 0}, cpu)

    def run_to_access(self, at: int, seconds: float = _LATE) -> bool:
        """Run the first CPU until it has read or written the 8 bytes at `at`; whether it did within the time."""
        self.stop_at(())
        self._expect(self._ask(f"Z4,{at:x},8")[0], "OK", "Z4")
        came = self.run(seconds)
        self._expect(self._ask(f"z4,{at:x},8")[0], "OK", "z4")
        return came is not None

    def stop_at(self, addresses: Iterable[int]) -> None:
        """Where `run` is to end: these addresses and no others."""
        wanted = set(addresses)
        packets = [f"z1,{address:x},4" for address in self._stops - wanted]
        packets += [f"Z1,{address:x},4" for address in wanted - self._stops]
        for packet, answer in zip(packets, self._ask(*packets), strict=True):
            self._expect(answer, "OK", packet)
        self._stops = wanted

    def run(self, seconds: float, *cpus: int) -> int | None:
        """Let CPUs run, the first if none is named, until one comes to a stop: which. None after `seconds` of wall clock."""
        try:
            return self._go_on("vCont" + "".join(f";c:{_thread(cpu)}" for cpu in cpus or (0,)), seconds)
        except StandsStill:
            return None

    def _go_on(self, packet: str, seconds: float) -> int:
        """Let CPUs go on until one comes to a stop: which. After `seconds` all are stopped.

        :raise StandsStill: none came to a stop.
        """
        self._send(packet)
        self._port.settimeout(seconds)
        try:
            answer = self._receive()
        except TimeoutError:
            self._port.settimeout(_LATE)
            self._port.sendall(b"\x03")
            answer = self._receive()
            if not answer.startswith("T02"):  # it came to a stop itself just then: let the interrupt be read before it goes on
                self._ask(f"Hg{_thread(0)}")
        finally:
            self._port.settimeout(_LATE)
        came = re.match(r"T05thread:p01\.([0-9a-f]+);", answer)
        self._cpu = -1
        if came is None:
            raise StandsStill(f"QEMU's debug port says {answer!r}")
        self._cpu = int(came[1], 16) - 1
        return self._cpu

    def ran(self, cpu: int = 0) -> tuple[float, float]:
        """Seconds that a CPU has run on the host so far, and that it stood in line for it, as on a busy host.

        A CPU that does neither is in checkstop, or naps.
        """
        if cpu not in self._threads:
            tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
            (self._threads[cpu],) = (task for task in tasks if (task / "comm").read_text().startswith(f"CPU {cpu}/"))
        ran, waited, _ = map(int, (self._threads[cpu] / "schedstat").read_text().split())
        return ran / 1e9, waited / 1e9

    # -- all of it

    def save(self, cpu: int = 0) -> State:
        """What a CPU and the arena are now."""
        names = ("msr", *_STATE)
        return State(dict(zip(names, self.read(*names, cpu=cpu), strict=True)), self.memory.tobytes())

    def restore(self, state: State, cpu: int = 0) -> None:
        """Make a CPU and the arena what they were."""
        self.poke_all(state.memory)
        self.write(state.registers, cpu)

    def poke_all(self, memory: bytes) -> None:
        """Make the arena `memory`, writing what differs and little more."""
        wanted = np.frombuffer(memory, np.uint8)
        rows = np.flatnonzero((wanted.view(np.uint64) != self.memory.view(np.uint64)).reshape(-1, _GAP // 8).any(axis=1))
        if not len(rows):
            return
        breaks = np.flatnonzero(np.diff(rows) > 1)
        for first, last in zip(rows[np.r_[0, breaks + 1]], rows[np.r_[breaks, len(rows) - 1]], strict=True):
            start, end = int(first) * _GAP, (int(last) + 1) * _GAP
            self.poke(start, memory[start:end])

    # -- the protocol

    def _on(self, cpu: int, *packets: str) -> list[str]:
        """Ask about one CPU."""
        if self._cpu == cpu:
            return self._ask(*packets)
        self._cpu = cpu
        return self._ask(f"Hg{_thread(cpu)}", *packets)[1:]

    def _ask(self, *packets: str) -> list[str]:
        self._send(*packets)
        return [self._receive() for _ in packets]

    def _send(self, *packets: str) -> None:
        self._port.sendall(b"".join(b"$%b#%02x" % (data, sum(data) & 0xFF) for data in map(str.encode, packets)))

    def _receive(self) -> str:
        while (end := self._received.find(b"#")) < 0 or len(self._received) < end + 3:
            data = self._port.recv(1 << 16)
            if not data:
                raise EnvironmentFault(f"QEMU ended with {self._process.wait()} under the debugger")
            self._received += data
        body = self._received[self._received.index(b"$") + 1 : end]
        self._received = self._received[end + 3 :]
        return body.decode()

    @staticmethod
    def _expect(answer: str, wanted: str, packet: str) -> None:
        if answer != wanted:
            raise EnvironmentFault(f"QEMU's debug port answered {answer!r} to {packet!r}")


def _thread(cpu: int) -> str:
    return f"p1.{cpu + 1:x}"
