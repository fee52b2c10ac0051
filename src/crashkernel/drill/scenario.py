"""One drill: a twin boots K1, loads K2 with our loader, dies, hands over, saves its memory; and the result is judged.

The order of things is `run_drill`, top to bottom. Every stage has a deadline, and nothing outlives the drill.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crashkernel.drill.guest import NONCE_SIZE, Loader, Userland, build_capture_image, build_crash_image
from crashkernel.drill.qemu import Debugger, RunningTwin, Wiring, qemu_command
from crashkernel.drill.record import CONSOLE, DUMP, EVIDENCE, PLAN, TRUTH, evidence_json
from crashkernel.drill.twin import Twin
from crashkernel.drill.verdict import Truth, Verdict, judge
from crashkernel.errors import EnvironmentFault, FormatError, StageFailed, UsageError
from crashkernel.machine import HEAD_SIZE, Region
from crashkernel.machine.live import cpu_list
from crashkernel.memory import Range, format_size
from crashkernel.placement.plan import DamagePolicy, LoadPlan, PlacementName, SegmentContent
from crashkernel.purgatory import PARAMETERS_OFFSET, STATE_OFFSET

if TYPE_CHECKING:
    from crashkernel.drill.debian import Kernel

CAPTURE_CMDLINE = "console=hvc0 irqpoll reset_devices rdinit=/init"
_ONE_CPU = " maxcpus=1"
_CRASHED_PID = 1  # the drill's init crashes K1 itself


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the drill that the user waits for. `deadline` is in seconds on a slow machine."""

    name: str
    deadline: float
    likely: str  # what to look at when it fails


BOOT_K1 = Stage("K1 boot", 300, "does this kernel boot on this machine model and CPU? see the console")
LOAD = Stage("load", 180, "the loader's own message says what to change")
CRASH = Stage("crash", 120, "K1 did not reach the purgatory: did the panic take another path (fadump, panic_timeout)?")
COPY_TRUTH = Stage("truth", 120, "the host could not copy the twin's memory: is there room for it?")
HANDOVER = Stage("handover", 120, "the purgatory did not reach K2's first instruction: its last line on the console says where")
DAMAGE = Stage("damage", 120, "the purgatory said nothing of the flipped bit")
BOOT_K2 = Stage("K2 boot", 300, "K2 started but did not come up: too little memory in crashkernel=, or a wrong device tree")
CAPTURE = Stage("capture", 900, "K2 could not save /proc/vmcore to its disk")
VERIFY = Stage("verify", 600, "")


@dataclass(frozen=True, slots=True)
class Scenario:
    """What to drill. `keep` is the directory to leave dump, truth, plan and logs in; None throws them away."""

    twin: Twin
    k1: Kernel
    k2: Kernel
    placement: PlacementName
    keep: Path | None = None
    all_cpus: bool = False  # K2 starts every CPU, not only the one that crashed
    on_damage: DamagePolicy = "reboot"
    flip: SegmentContent | None = None  # flip a bit of this once K1 is dead: the purgatory is to say so


@dataclass(slots=True)
class Outcome:
    """What a drill showed. `verdict` is None when a stage failed before there was a dump, or K2 was not to be entered."""

    scenario: Scenario
    stages: dict[str, float] = field(default_factory=dict)  # seconds
    verdict: Verdict | None = None
    told: str | None = None  # the purgatory's own line about the flipped bit
    failure: StageFailed | None = None
    plan: LoadPlan | None = None
    dump: Path | None = None
    seconds: float = 0.0  # from building the images to the verdict

    @property
    def passed(self) -> bool:
        """Whether the drill proved what it is for."""
        if self.failure is not None:
            return False
        return self.told is not None if self.scenario.flip else self.verdict is not None and self.verdict.passed


Listener = Callable[[Stage, str], None]
"""Told of each stage as it begins (with "") and of what happens in it."""


class _Clock:
    """Runs stages: each has its deadline, its time is taken, and what breaks it becomes a `StageFailed`."""

    def __init__(self, outcome: Outcome, tell: Listener) -> None:
        self._outcome = outcome
        self._tell = tell

    @contextlib.asynccontextmanager
    async def stage(self, stage: Stage, machine: RunningTwin | None = None) -> AsyncIterator[Callable[[str], None]]:
        self._tell(stage, "")
        start = time.monotonic()
        try:
            async with asyncio.timeout(stage.deadline):
                yield lambda text: self._tell(stage, text)
        except TimeoutError as error:
            raise self._failed(stage, f"not done after {stage.deadline:.0f} s", machine) from error
        except EOFError as error:
            # the console's last words may still be on their way
            await asyncio.sleep(0.2)
            raise self._failed(stage, str(error), machine) from error
        except _Silent as error:
            console = tuple(machine.console) if machine else ()
            raise StageFailed(stage.name, error.reason, console=console, hint=_likely(stage, (error.reason,))) from error
        except _GuestSaidNo as error:
            await asyncio.sleep(0.2)
            raise self._failed(stage, error.reason, machine) from error
        except (OSError, ValueError, FormatError) as error:
            # QEMU gone with words unread, a full disk, a guest that says nonsense
            await asyncio.sleep(0.2)
            raise self._failed(stage, f"{type(error).__name__}: {error}", machine) from error
        finally:
            self._outcome.stages[stage.name] = round(time.monotonic() - start, 3)

    def _failed(self, stage: Stage, message: str, machine: RunningTwin | None) -> StageFailed:
        console = tuple(machine.console) if machine else ()
        return StageFailed(stage.name, message, console=console, hint=_likely(stage, console))


class _GuestSaidNo(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Silent(_GuestSaidNo):
    """K2 never printed a line: what the console holds is K1's."""


def run_drill(scenario: Scenario, userland: Userland, tell: Listener) -> Outcome:
    """Drill once. A stage that fails is in the outcome, not raised.

    :raise EnvironmentFault: this machine lacks something, or has no room.
    """
    outcome = Outcome(scenario)
    start = time.monotonic()
    with working_directory(scenario.twin.memory) as directory:
        try:
            asyncio.run(_drill(scenario, userland, Wiring(directory), outcome, tell))
        except StageFailed as failure:
            outcome.failure = failure
        outcome.seconds = round(time.monotonic() - start, 3)
        if scenario.keep is not None:
            _keep(directory, scenario.keep, outcome)
    return outcome


async def _drill(scenario: Scenario, userland: Userland, wiring: Wiring, outcome: Outcome, tell: Listener) -> None:
    clock = _Clock(outcome, tell)
    nonce = secrets.token_bytes(NONCE_SIZE)
    initrd = _build(scenario, userland, wiring, nonce, "crashkernel")
    command = qemu_command(scenario.twin, scenario.k1.vmlinux, initrd, wiring)
    async with _prepared(wiring, scenario.twin) as disk_filled, RunningTwin.start(command, wiring) as machine:
        async with clock.stage(BOOT_K1, machine):
            await _expect(machine, "k1-up")
        async with clock.stage(LOAD, machine) as note:
            size = int(await _expect(machine, "plan", log=note))
            text = (await machine.exactly(size)).decode()
            (wiring.directory / PLAN).write_text(text)
            outcome.plan = plan = LoadPlan.from_json(text)
            await _expect(machine, "armed", log=note)
            await disk_filled.wait()
            reserved, firmware = _kernels_regions(machine, scenario.twin)
        purgatory = plan.segment("purgatory").range.start
        debugger = await machine.attach()
        head = _read_ram(wiring.ram, HEAD_SIZE)
        async with clock.stage(CRASH, machine):
            machine.panics_expected = 1
            machine.say("crash")
            await _run_until(machine, debugger, purgatory)
        async with clock.stage(COPY_TRUTH, machine):
            await asyncio.to_thread(_copy_sparse, wiring.ram, wiring.directory / TRUTH)
        if scenario.flip is not None:
            async with clock.stage(DAMAGE, machine) as note:
                note(f"bit flipped at {_flip(wiring.ram, plan, scenario.flip):#x}")
                machine.spoke.clear()
                await debugger.detach()
                outcome.told = await _told(machine, scenario.flip)
                if scenario.on_damage == "reboot":
                    await machine.process.wait()  # the twin ends where a machine would reboot
            return
        async with clock.stage(HANDOVER, machine):
            await _run_until(machine, debugger, plan.entry)
            machine.spoke.clear()
            await debugger.detach()
        async with clock.stage(BOOT_K2, machine):
            await _first_words(machine, wiring.ram, plan)
            _require_cpus(await _expect(machine, "k2-cpus"), scenario)
            await _expect(machine, "k2-up")
        async with clock.stage(CAPTURE, machine) as note:
            size = int(await _expect(machine, "vmcore"))
            await _expect(machine, "saved", log=note, progress=lambda done: note(f"{format_size(done)} of {format_size(size)}"))
            await machine.quit()
        truth = Truth(
            memory=wiring.directory / TRUTH,
            head=head,
            memory_size=scenario.twin.memory,
            reserved=reserved,
            nonce=nonce,
            panic=_panic_text(machine.panics),
            release=scenario.k1.name,
            crashed_pid=_CRASHED_PID,
            cpus=scenario.twin.smp,
            firmware=firmware,
        )
        (wiring.directory / EVIDENCE).write_text(evidence_json(truth))
    async with clock.stage(VERIFY):
        os.truncate(wiring.disk, size)
        outcome.verdict = await asyncio.to_thread(judge, wiring.disk, truth, plan)


def run_bare(twin: Twin, k1: Kernel, userland: Userland, tell: Listener) -> Outcome:
    """The peer's twin: boot, load with kexec-tools, crash, boot K2; no truth, no capture, no verdict. For `make bench`."""
    outcome = Outcome(Scenario(twin, k1, k1, "reserved"))
    start = time.monotonic()
    with working_directory(twin.memory) as directory:
        try:
            asyncio.run(_bare(outcome.scenario, userland, Wiring(directory), outcome, tell))
        except StageFailed as failure:
            outcome.failure = failure
        outcome.seconds = round(time.monotonic() - start, 3)
    return outcome


def _disk_size(twin: Twin) -> int:
    # all of memory, headers, and the padding of the last block
    return twin.memory + (64 << 20)


_UNWRITTEN = b"\xa5" * (4 << 20)
_MADV_POPULATE_WRITE = 23  # include/uapi/asm-generic/mman-common.h, since Linux 5.14
_POPULATE_STEP = 16 << 20


@contextlib.asynccontextmanager
async def _prepared(wiring: Wiring, twin: Twin) -> AsyncIterator[asyncio.Event]:
    """RAM and K2's disk, made ready while K1 boots; what is yielded is set once the disk is.

    The disk is filled with what no memory is made of: a page that K2 never wrote must not pass for a page of zeros. And by
    the time K2 reads all of RAM and writes all of the disk, the host has found memory for both.
    """
    for path, size in ((wiring.ram, twin.memory), (wiring.disk, _disk_size(twin))):
        with path.open("wb") as file:
            file.truncate(size)
    stop, filled, loop = threading.Event(), asyncio.Event(), asyncio.get_running_loop()

    def work() -> None:
        with wiring.disk.open("r+b", buffering=0) as file:
            for _ in range(_disk_size(twin) // len(_UNWRITTEN)):
                if stop.is_set():
                    return
                file.write(_UNWRITTEN)
        loop.call_soon_threadsafe(filled.set)
        # only a help: an older kernel cannot do it, and loses nothing but time
        with contextlib.suppress(OSError), wiring.ram.open("r+b") as ram, mmap.mmap(ram.fileno(), 0) as memory:
            for start in range(0, len(memory), _POPULATE_STEP):
                if stop.is_set():
                    return
                memory.madvise(_MADV_POPULATE_WRITE, start, min(_POPULATE_STEP, len(memory) - start))

    worker = asyncio.create_task(asyncio.to_thread(work))
    try:
        yield filled
    finally:
        stop.set()
        await asyncio.wait({worker})


async def _bare(scenario: Scenario, userland: Userland, wiring: Wiring, outcome: Outcome, tell: Listener) -> None:
    clock = _Clock(outcome, tell)
    initrd = _build(scenario, userland, wiring, bytes(NONCE_SIZE), "kexec-tools")
    with wiring.disk.open("wb") as disk:
        disk.truncate(_disk_size(scenario.twin))
    command = qemu_command(scenario.twin, scenario.k1.vmlinux, initrd, wiring)
    async with RunningTwin.start(command, wiring) as machine:
        async with clock.stage(BOOT_K1, machine):
            await _expect(machine, "k1-up")
        async with clock.stage(LOAD, machine) as note:
            await _expect(machine, "armed", log=note)
        async with clock.stage(BOOT_K2, machine):  # kexec-tools' purgatory and its integrity check included
            machine.panics_expected = 1
            machine.say("crash")
            await _expect(machine, "k2-up")
            await machine.quit()


def _build(scenario: Scenario, userland: Userland, wiring: Wiring, nonce: bytes, loader: Loader) -> Path:
    directory = wiring.directory
    capture = build_capture_image(scenario.k2, userland, directory / "capture.cpio")
    cmdline = CAPTURE_CMDLINE + ("" if scenario.all_cpus else _ONE_CPU)
    append = cmdline + (" crashkernel.mode=bare" if loader == "kexec-tools" else "")
    return build_crash_image(
        scenario.k1,
        scenario.k2,
        capture,
        userland,
        directory / "crash.cpio",
        nonce=nonce,
        loader=loader,
        load_args=(
            f"--placement={scenario.placement}",
            "--kernel=/boot/vmlinux",
            "--initrd=/boot/initrd",
            f"--append={cmdline}",
            f"--on-damage={scenario.on_damage}",
        ),
        append=append,
    )


async def _expect(
    machine: RunningTwin,
    word: str,
    *,
    log: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Wait for the guest's message `word`; its argument. What the loader prints on the way goes to `log`."""
    last = ""
    while True:
        line = await machine.line()
        kind, _, rest = line.partition(" ")
        if kind == word:
            return rest.split(" ")[0]
        if kind == "region":
            _note_region(machine, rest)
        if kind == "failed":
            # a number is the loader's exit status: its own last line says more
            raise _GuestSaidNo(last if rest.isdigit() and last else f"the guest says: {rest}")
        if kind == "log":
            last = rest.removeprefix("crashkernel: ")
            if log:
                log(rest)
        if kind == "progress" and progress:
            progress(int(rest))


_SILENCE = 60  # seconds; K2's first line takes one or two
_PANIC = b"Kernel panic - not syncing: "


async def _first_words(machine: RunningTwin, ram: Path, plan: LoadPlan) -> None:
    """Wait for K2's first line. A kernel that dies before its console works leaves its reason in its log, in its memory."""
    try:
        async with asyncio.timeout(_SILENCE):
            await machine.spoke.wait()
    except TimeoutError as error:
        # K2's log buffer is static data: in its image, wherever that runs
        image = Range.sized(plan.entry, plan.kernel_span)
        with ram.open("rb") as file:
            file.seek(image.start)
            memory = file.read(image.size)
        message = f"K2 printed nothing for {_SILENCE} s"
        at = memory.rfind(_PANIC)
        while at >= 0:
            text = re.split(rb"[\0\n]| \]---", memory[at : at + 200])[0]  # the ring's records have no terminator
            if b"%s" not in text:  # else it is the format itself
                raise _Silent(f"{message}; its log says: {text.decode('ascii', 'replace')}") from error
            at = memory.rfind(_PANIC, 0, at)
        raise _Silent(message) from error


async def _run_until(machine: RunningTwin, debugger: Debugger, address: int) -> None:
    """Run to physical `address` in real mode; a user program of K1 may well use the same number as a virtual address."""
    while True:
        await debugger.set_breakpoint(address)
        await debugger.resume()
        await debugger.stopped()
        await debugger.clear_breakpoint(address)
        if await machine.in_real_mode_at(address):
            return
        await debugger.step()  # past it, or it would stop there for ever


def _flip(ram: Path, plan: LoadPlan, content: SegmentContent) -> int:
    """Flip one bit, anywhere, of what was loaded as `content`; its address."""
    segment = plan.segment(content).range
    if content == "purgatory":
        # its code may go astray before it checks itself
        segment = Range(segment.start + PARAMETERS_OFFSET, segment.start + STATE_OFFSET)
    elif content == "kernel":
        segment = Range.sized(segment.start, min(segment.size, plan.kernel_span))  # behind it is K2's free memory
    at = segment.start + secrets.randbelow(segment.size)
    with ram.open("r+b", buffering=0) as file:
        file.seek(at)
        byte = file.read(1)[0] ^ 1 << secrets.randbelow(8)
        file.seek(at)
        file.write(bytes([byte]))
    return at


async def _told(machine: RunningTwin, content: SegmentContent) -> str:
    """Wait for the purgatory's line about damage; a K2 that is entered without one is the failure looked for."""
    while True:
        await machine.spoke.wait()
        machine.spoke.clear()
        lines = [line for line in machine.console if line.startswith("crashkernel: ")]
        for line in lines:
            if "DAMAGED" in line and content in line:
                return line
        if lines and "enter K2" in lines[-1]:
            raise _GuestSaidNo(f"a bit of the {content} was flipped, and K2 was entered")


def _require_cpus(online: str, scenario: Scenario) -> None:
    wanted = scenario.twin.smp if scenario.all_cpus else 1
    count = len(cpu_list(online))
    if count != wanted:
        raise _GuestSaidNo(f"K2 runs on {count} CPUs ({online}), not on {wanted}")


def _read_ram(ram: Path, size: int) -> bytes:
    with ram.open("rb") as file:
        return file.read(size)


_BLOCK = 64 << 10  # what is all zero in blocks of this many bytes becomes a hole
_CHUNK = 4 << 20


def _copy_sparse(source: Path, target: Path) -> None:
    """Copy a file and leave out its zeros: most of a fresh machine's memory was never touched."""
    with source.open("rb") as src, target.open("wb") as dst:
        size = os.fstat(src.fileno()).st_size
        dst.truncate(size)
        starts = range(0, size, _CHUNK)
        with ThreadPoolExecutor(max_workers=2) as pool:  # reading, looking and writing all let go of the interpreter
            for _ in pool.map(lambda start: _copy_chunk(src.fileno(), dst.fileno(), start), starts):
                pass


def _copy_chunk(src: int, dst: int, start: int) -> None:
    data = os.pread(src, _CHUNK, start)
    whole = len(data) // _BLOCK * _BLOCK
    filled = np.frombuffer(data, np.uint64, whole // 8).reshape(-1, _BLOCK // 8).any(axis=1)
    for number in np.flatnonzero(filled):
        at = int(number) * _BLOCK
        os.pwrite(dst, data[at : at + _BLOCK], start + at)
    if any(data[whole:]):
        os.pwrite(dst, data[whole:], start + whole)


def _note_region(machine: RunningTwin, text: str) -> None:
    """Take a line "NAME HEX": a memory region as the bytes of its device tree property, pairs of 64-bit address and size."""
    name, _, digits = text.partition(" ")
    data = bytes.fromhex(digits)
    for at in range(0, len(data) // 16 * 16, 16):
        base, size = (int.from_bytes(data[at + half : at + half + 8], "big") for half in (0, 8))
        if size:
            machine.regions.setdefault(name, []).append(Range.sized(base, size))


def _kernels_regions(machine: RunningTwin, twin: Twin) -> tuple[Range, tuple[Region, ...]]:
    """The reserved region, and on bare metal the firmware's, in K1's kernel's words: the loader is not asked."""
    reserved = machine.regions.pop("crashkernel", [])
    if len(reserved) != 1:
        raise _GuestSaidNo("K1 has no reserved region: is crashkernel= valid for this memory size?")
    if twin.machine == "pseries":
        return reserved[0], ()
    return reserved[0], tuple(Region(name, piece) for name, pieces in machine.regions.items() for piece in pieces)


def _panic_text(panics: list[str]) -> str:
    # "[    1.234567] Kernel panic - not syncing: sysrq triggered crash"
    return panics[0][panics[0].index("Kernel panic") :] if panics else ""


def _likely(stage: Stage, console: tuple[str, ...]) -> str:
    text = "\n".join(console)
    for sign, cause in (
        ("Crash kernel can not overlap current kernel", "crashkernel=…@OFFSET lies over K1: choose a higher offset"),
        ("Out of memory", "K2 ran out of memory: raise crashkernel="),
        ("ailed to allocate", "K2 found no memory early in its boot: raise crashkernel="),
        ("Unable to handle kernel", "the kernel took a fault: see the console's last lines"),
    ):
        if sign in text:
            return cause
    return stage.likely


_WORK = "crashkernel-drill-"
_LOCK = "lock"
_LONGEST_SOCKET_PATH = 107  # sun_path, include/uapi/linux/un.h


@contextlib.contextmanager
def working_directory(memory: int) -> Iterator[Path]:
    """A private directory with room for RAM, its copy and the dump: TMPDIR if that is set, else in memory, else on disk.

    :raise EnvironmentFault: nowhere is enough room, or QEMU cannot use the path.
    """
    wanted = 3 * memory + (512 << 20)
    chosen = os.environ.get("TMPDIR")
    places = [Path(chosen)] if chosen else [Path("/dev/shm"), Path(tempfile.gettempdir())]  # noqa: S108  (a place with room)
    for place in places:
        _remove_leftovers(place)
    roomy = [place for place in places if _has_room(place, wanted)]
    if not roomy:
        raise EnvironmentFault(
            f"a drill with {format_size(memory)} needs {format_size(wanted)} of room in {' or '.join(map(str, places))}",
            hint="free some, set TMPDIR, or use a smaller --memory",
        )
    with tempfile.TemporaryDirectory(prefix=_WORK, dir=roomy[0]) as name:
        directory = Path(name)
        if "," in name or len(name) > _LONGEST_SOCKET_PATH - len("/console.sock"):
            raise EnvironmentFault(f"QEMU cannot use {name}", hint="set TMPDIR to a short path without commas")
        with (directory / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory


def _remove_leftovers(place: Path) -> None:
    """What a drill left that was killed outright: gigabytes, in memory. A drill that lives holds its lock."""
    for path in place.glob(f"{_WORK}*/{_LOCK}"):
        with contextlib.suppress(OSError), path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)


def _has_room(place: Path, wanted: int) -> bool:
    try:
        room = os.access(place, os.W_OK) and shutil.disk_usage(place).free > wanted
    except OSError:
        return False
    return room and (place != Path("/dev/shm") or _available_memory() > wanted)  # noqa: S108


def _available_memory() -> int:
    # MemAvailable, in KiB (Documentation/filesystems/proc.rst)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def require_keepable(keep: Path) -> None:
    """Say before a drill, not after it, that its evidence cannot be kept there.

    :raise UsageError: the directory cannot be made or written.
    """
    try:
        keep.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=keep):
            pass
    except OSError as error:
        raise UsageError(f"cannot keep a drill in {keep}: {error.strerror}", hint="choose another --keep") from error


def _keep(directory: Path, keep: Path, outcome: Outcome) -> None:
    """Keep this drill's files and no other's; the dump last, and whole or not at all."""
    files = {"disk": DUMP, **{name: name for name in (CONSOLE, PLAN, EVIDENCE, TRUTH)}}
    for kept in files.values():
        (keep / kept).unlink(missing_ok=True)
    for name, kept in reversed(files.items()):
        source = directory / name
        # a disk that no verdict was reached on holds no dump
        if source.exists() and (name != "disk" or outcome.verdict is not None):
            temporary = keep / f"{kept}.new"
            _copy_sparse(source, temporary)
            temporary.replace(keep / kept)
            if name == "disk":
                outcome.dump = keep / kept
