"""One QEMU that runs thousands of cases: a monitor in the guest waits for the next, and K2's stub goes back to it.

Guest RAM is memory that host and guest share. The host fills the arena and the boxes; the monitor brings code to its place
(see `stubs`), lets K1's stubs go, and has its CPUs back when K2 has stored its registers. A case that does not come back costs
its deadline, and a new QEMU.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from crashkernel.bench.cpus import Cpu
from crashkernel.bench.model import Bytes, Case
from crashkernel.bench.stubs import (
    ARENA,
    GO,
    K2_BOX,
    K2_WORDS,
    LOAD,
    LOADED,
    MARKER,
    MONITOR,
    MSR_LE,
    MSR_RI,
    PIECES,
    SLAVE_BOX,
    SLAVE_BOX_SIZE,
    SLAVE_RETURN,
    SLAVE_WORDS,
    STAGING,
    START_BOX,
    START_WORDS,
    STUB_SIZE,
    STUBS,
    TOP,
    UP,
    k1_stub,
    monitor,
)
from crashkernel.errors import EnvironmentFault, StageFailed
from crashkernel.purgatory import ARRIVED_OFFSET, LOG_OFFSET, LOG_SIZE, MAGIC, RELEASED_OFFSET

DEADLINE = 10.0
"""Seconds a case may take. One takes milliseconds; this machine may be busy with other things."""
_START_DEADLINE = 60.0


class Machine:
    """A QEMU with `count` CPUs of one model; a context manager. It is started by the first case that needs it."""

    def __init__(self, cpu: Cpu, count: int = 1, *, deadline: float = DEADLINE) -> None:
        self.cpu, self.count, self.deadline = cpu, count, deadline
        self.starts = 0  # how many QEMUs there were
        self._process: subprocess.Popen[bytes] | None = None
        self._firmware = Path()
        self._pages = 0  # of RAM that QEMU and the bench have touched, in 512 bytes
        self._own: Bytes = np.empty(0, np.uint8)  # what is above the arena, as loaded
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for program, package in ((self.cpu.command("", Path(), ())[0], "qemu-system-ppc"), ("setpriv", "util-linux")):
            if shutil.which(program) is None:
                raise EnvironmentFault(f"{program} is not installed", hint=f"apt-get install {package}")
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="crashkernel-bench-")))
        self._firmware = directory / "firmware"
        # a hypervisor starts the first CPU here, below 32 MiB: ba MONITOR
        self._firmware.write_bytes((bytes(0x100) + (18 << 26 | MONITOR | 2).to_bytes(4, "big")).ljust(0x1000, b"\0"))
        self._ram = os.memfd_create("crashkernel-bench")
        self._stack.callback(os.close, self._ram)
        os.ftruncate(self._ram, self.cpu.memory)
        self.memory: Bytes = np.frombuffer(mmap.mmap(self._ram, TOP), np.uint8)
        """Guest memory up to TOP as it is now; writable."""
        self.wanted: Bytes = np.empty(ARENA, np.uint8)
        """Room for the model."""
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._stack.close()

    def write(self, at: int, data: bytes) -> None:
        """The host writes. The guest must not have executed anything there (see `stubs`)."""
        self.memory[at : at + len(data)] = np.frombuffer(data, np.uint8)

    def u32(self, at: int) -> int:
        """A 32-bit word of guest memory."""
        return int.from_bytes(self.memory[at : at + 4].tobytes(), "big")

    def u64(self, at: int) -> int:
        """A 64-bit word of guest memory."""
        return int.from_bytes(self.memory[at : at + 8].tobytes(), "big")

    def idle(self, number: int) -> bool:
        """Whether CPU `number` is in the monitor and has not been let go since."""
        return self.u64(UP + 8 * number) == self.u64(GO + 8 * number)

    def start(self) -> None:
        """A new QEMU, its CPUs in the monitor."""
        self.stop()
        self.starts += 1
        self.memory[:] = 0  # all its pages exist from now on
        for number in range(self.count):
            self.write(MONITOR + STUB_SIZE * number, monitor(number))
            self.write(UP + 8 * number, b"\xff" * 8)  # until it is
        command = self.cpu.command(
            f"/proc/self/fd/{self._ram}", self._firmware, [MONITOR + STUB_SIZE * number for number in range(self.count)]
        )
        # QEMU dies with the bench; its monitor (QMP) is on its standard input and output
        command = ["setpriv", "--pdeathsig", "KILL", *command]
        command += ["-chardev", "stdio,id=qmp,signal=off", "-mon", "chardev=qmp,mode=control"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(self._ram,)
        )
        first = 1 if self.cpu.partition else self.count
        self.wait(lambda: all(self.idle(number) for number in range(first)), "the monitor", _START_DEADLINE)
        self._pages = os.fstat(self._ram).st_blocks

    def stop(self) -> None:
        """Kill QEMU, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def wait(self, condition: Callable[[], bool], what: str, seconds: float | None = None) -> None:
        """Poll memory until `condition` holds.

        :raise StageFailed: it did not; with the CPUs' registers.
        """
        assert self._process is not None
        seconds = self.deadline if seconds is None else seconds
        deadline = time.monotonic() + seconds
        while not condition():
            if self._process.poll() is not None:
                output = self._process.communicate()[1].decode("utf-8", "replace").strip()
                raise StageFailed("bench", f"QEMU ended with {self._process.returncode}: {output}")
            if time.monotonic() > deadline:
                raise StageFailed("bench", f"{what}: not seen after {seconds:g} s", console=self.registers())
            time.sleep(0.0001)

    def registers(self) -> tuple[str, ...]:
        """The registers of all CPUs, as QEMU prints them; without those the purgatory has no use for."""
        self._qmp("qmp_capabilities")
        text = str(self._qmp("human-monitor-command", **{"command-line": "info registers -a"}))
        return tuple(
            line.rstrip() for line in text.splitlines() if line.startswith(("CPU#", "NIP", "MSR", "GPR", "CR", " SRR0"))
        )

    def _qmp(self, command: str, **arguments: object) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            answer = json.loads(line)
            if "return" in answer or "error" in answer:  # else the greeting, or an event
                return answer.get("return")
        return ""

    @contextlib.contextmanager
    def case(self, case: Case) -> Iterator[Run]:
        """`case` in memory and K1's CPUs ready to go. If not all are back afterwards, QEMU is killed."""
        if self._process is None:
            self.start()
        try:
            self._load(case)
            yield Run(self, case)
        finally:
            if not all(self.idle(number) for number in range(self.count)):
                self.stop()

    def _load(self, case: Case) -> None:
        case.fill(self.memory[:ARENA])
        self.memory[K2_BOX:GO] = 0
        for number, physical in enumerate(case.ids):
            box = bytearray(SLAVE_BOX_SIZE)
            box[SLAVE_RETURN : SLAVE_RETURN + 8] = (MONITOR + STUB_SIZE * number).to_bytes(8, "big")
            self.write(SLAVE_BOX + SLAVE_BOX_SIZE * physical, bytes(box))
        pieces = [(at, self.memory[at : at + _up(len(data), 8)].tobytes()) for at, data in case.code]
        for number, (physical, delay) in enumerate(zip(case.ids, case.delays, strict=True)):
            target = 0x60 if number else case.base
            stub = k1_stub(number, physical, target, little=case.little, delay=delay, before=case.before)
            pieces.append((STUBS + STUB_SIZE * number, stub.ljust(_up(len(stub), 8), b"\0")))
        staged, rows = STAGING, b""
        for at, data in pieces:
            self.write(staged, data)
            rows += b"".join(word.to_bytes(8, "big") for word in (at, staged, len(data) // 8))
            staged += len(data)
        assert staged <= TOP
        self.write(PIECES, rows + bytes(24))
        self._own = self.memory[ARENA:TOP].copy()
        self.write(LOAD, (self.u64(LOAD) + 1).to_bytes(8, "big"))
        self.wait(lambda: self.u64(LOAD) == self.u64(LOADED), "the monitor's copy of the code")

    def strays(self) -> Iterator[str]:
        """What was touched above the arena but the boxes: the bench's code and staging, and all memory behind them."""
        for start, end in ((MONITOR, STUBS), (STAGING, TOP)):
            if not np.array_equal(self.memory[start:end], self._own[start - ARENA : end - ARENA]):
                yield f"the bench's own memory at {start:#x}-{end:#x} was written"
        # a page of RAM comes into being when it is first read or written
        pages = os.fstat(self._ram).st_blocks
        if pages != self._pages:
            yield f"{(pages - self._pages) * 512:,} bytes of memory above {TOP:#x} were touched"
            self._pages = pages

    def judge(self, case: Case) -> tuple[str, ...]:
        """Run `case` to K2 and look at everything; what is wrong, most telling first."""
        assert len(case.ids) <= self.count
        try:
            with self.case(case) as run:
                for number in range(len(case.ids)):
                    run.release(number)
                return tuple(run.problems())
        except StageFailed as failure:
            self.stop()
            return (failure.message, *failure.console)


@dataclass(frozen=True)
class Run:
    """A case while it runs: memory as it is now, and what the stubs left in their boxes."""

    machine: Machine
    case: Case

    @property
    def memory(self) -> Bytes:
        """The arena as it is now."""
        return self.machine.memory[:ARENA]

    def release(self, number: int) -> None:
        """Let CPU `number` leave K1."""
        at = GO + 8 * number
        self.machine.write(at, (self.machine.u64(at) + 1).to_bytes(8, "big"))

    def _box(self, at: int, words: Sequence[str]) -> dict[str, int]:
        return {name: self.machine.u64(at + 8 * slot) for slot, name in enumerate(words)}

    @property
    def left(self) -> dict[str, int]:
        """What the crashing CPU's stub stored when it left K1; zeros before."""
        return self._box(START_BOX, START_WORDS)

    @property
    def arrived(self) -> int:
        """How many other CPUs the purgatory has counted, in both halves of a word: -1 if they disagree."""
        high, low = divmod(self.machine.u64(self.case.base + ARRIVED_OFFSET), 1 << 32)
        return low if low == high else -1

    @property
    def released(self) -> bool:
        """Whether the purgatory lets the other CPUs go to K2."""
        at = self.case.base + RELEASED_OFFSET
        return self.memory[at : at + len(MAGIC)].tobytes() == MAGIC

    @property
    def log(self) -> str:
        """All that the purgatory has said."""
        at = self.case.base + LOG_OFFSET
        return self.memory[at : at + LOG_SIZE].tobytes().partition(b"\0")[0].decode("ascii", "replace")

    def wait(self, condition: Callable[[], bool], what: str, seconds: float | None = None) -> None:
        """See `Machine.wait`."""
        self.machine.wait(condition, what, seconds)

    def finish(self, seconds: float | None = None) -> dict[str, int]:
        """Wait until K2 has been entered and the CPU is back in the monitor; the registers K2 was entered with."""
        self.wait(lambda: self.machine.idle(0), "K2's first instructions", seconds)
        return self._box(K2_BOX, K2_WORDS)

    def slave(self, number: int) -> dict[str, int]:
        """Wait until CPU `number` has been in K2's slave code and is back; its registers."""
        box = SLAVE_BOX + SLAVE_BOX_SIZE * self.case.ids[number]
        self.wait(lambda: self.machine.idle(number), f"CPU {self.case.ids[number]:#x} in K2's slave code")
        return self._box(box, SLAVE_WORDS)

    def problems(self) -> Iterator[str]:
        """Wait for K2; then everything that is wrong with its registers, the other CPUs and memory."""
        case = self.case
        found = self.finish()
        msr = self.left["msr"] & ~(MSR_LE | MSR_RI)
        if not msr >> 63:
            yield "the bench's K1 was in 32-bit mode"
        found["msr"] &= ~MSR_RI
        wanted = {"r3": case.tree, "r4": case.entry, "r5": 0, "r6": 0, "r7": 0, "r8": 0, "r9": 0}
        wanted |= {"msr": msr, "marker": MARKER}
        wanted["r8"], wanted["r9"] = case.services.opal
        yield from (
            f"K2's {name} is {found[name]:#x}, not {value:#x}" for name, value in wanted.items() if found[name] != value
        )
        for number, physical in list(enumerate(case.ids))[1:]:
            other = self.slave(number)
            wanted = {"r3": physical, "marker": MARKER}
            yield from (
                f"CPU {physical:#x}'s {name} in K2 is {other[name]:#x}, not {value:#x}"
                for name, value in wanted.items()
                if other[name] != value
            )
            if other["msr"] & MSR_LE:
                yield f"CPU {physical:#x} comes to K2 little-endian"
        if self.arrived != len(case.ids) - 1:
            yield f"the purgatory counted {self.arrived} other CPUs, not {len(case.ids) - 1}"
        if not self.released:
            yield "K2 was entered, the other CPUs were not released"
        told = [(int(number), int(rows)) for number, rows in re.findall(r"^crashkernel: (\d+)/(\d+) ", self.log, re.MULTILINE)]
        rows = len(case.moves) + 1  # the last enters K2
        if told != [(number, rows) for number in range(1, rows + 1)]:
            yield f"the purgatory's log tells of the rows {told} of {rows}"
        yield from self.wrong_memory()
        yield from self.machine.strays()

    def wrong_memory(self, except_at: Iterable[tuple[int, int]] = ()) -> Iterator[str]:
        """Hold all memory against the model: one line for each wrong stretch, eight at most.

        :param except_at: addresses and sizes of what may be anything.
        """
        found, wanted = self.memory, self.machine.wanted
        self.case.fill(wanted)
        self.case.hand_over(wanted)
        for at, size in (*except_at, *self.case.volatile):
            wanted[at : at + size] = found[at : at + size]
        words = np.flatnonzero(found.view(np.uint64) != wanted.view(np.uint64)) * 8
        if len(words) == 0:
            return
        first = words[np.flatnonzero(np.diff(words, prepend=-16) != 8)]
        for at in first[:8]:
            got, want = (memory[at : at + 8].tobytes().hex() for memory in (found, wanted))
            yield f"{at:#x} holds {got}, not {want}"
        yield f"{len(words) * 8:,} bytes are wrong in {len(first)} stretches, from {words[0]:#x} to {words[-1] + 7:#x}"


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
