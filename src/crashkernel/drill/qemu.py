"""The emulated machine: its command line, and a running instance with its console, control port, monitor and debugger.

Every socket is made here first and QEMU connects to it, so that nothing depends on who starts faster. Guest RAM is a shared
file: the host reads the dead kernel's memory without asking anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from qemu.qmp import QMPClient, QMPError

from crashkernel.drill.guest import PORT_NAME
from crashkernel.drill.twin import Twin
from crashkernel.errors import CrashkernelError, EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from crashkernel.memory import Range

_T = TypeVar("_T")

QEMU = "qemu-system-ppc64"
CONSOLE_TAIL = 40
"""Lines of console kept for a report of failure."""

_MSR_IR = 0x20  # instruction relocation, Power ISA Book III 4.2.1


@dataclass(frozen=True, slots=True)
class Wiring:
    """The files and sockets of one instance, all below one directory."""

    directory: Path

    @property
    def ram(self) -> Path:
        """Guest RAM; file offset = physical address."""
        return self.directory / "ram"

    @property
    def disk(self) -> Path:
        """The disk K2 writes the dump to."""
        return self.directory / "disk"

    def socket(self, name: str) -> Path:
        """One of console, control, qmp, gdb."""
        return self.directory / f"{name}.sock"


_PORT = f"virtserialport,chardev=control,name={PORT_NAME}"
_PSERIES_DEVICES = ("virtio-serial-pci", _PORT, "virtio-blk-pci,drive=disk,num-queues=1")
# One PCI host bridge instead of the default six, each of which K2 resets for three seconds; and a BMC, without which
# powering off never ends.
_POWERNV_DEVICES = (
    "pnv-phb,chip-id=0,index=0,id=phb0",
    "pnv-phb-root-port,bus=phb0,id=pcie.0",
    "virtio-serial-pci,bus=pcie.0,addr=0.0,multifunction=on",
    _PORT,
    "virtio-blk-pci,drive=disk,bus=pcie.0,addr=0.1,num-queues=1",
    "ipmi-bmc-sim,id=bmc0",
    "isa-ipmi-bt,bmc=bmc0,irq=10",
)

_PSERIES_NETWORK = "virtio-net-pci,netdev=net"
_POWERNV_NETWORK = "virtio-net-pci,netdev=net,bus=pcie.0,addr=0.2"


def qemu_command(
    twin: Twin, kernel: Path, initrd: Path, wiring: Wiring, *, network: bool = False, qemu: str = QEMU
) -> list[str]:
    """QEMU's arguments for `twin`; with `network` it has a card from which the host's loopback is reached."""
    machine: str = twin.machine
    if machine == "pseries":
        # The mitigations that TCG cannot emulate; a guest would only be told that it is vulnerable.
        machine += ",cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-htm=off"
    devices: tuple[str, ...] = _PSERIES_DEVICES if twin.machine == "pseries" else _POWERNV_DEVICES
    if network:
        devices += (_PSERIES_NETWORK if twin.machine == "pseries" else _POWERNV_NETWORK,)
    sockets = [
        argument
        for name in ("console", "control", "qmp")
        for argument in ("-chardev", f"socket,id={name},path={wiring.socket(name)}")
    ]
    return [
        qemu,
        "-machine", f"{machine},memory-backend=ram",
        "-object", f"memory-backend-file,id=ram,size={twin.memory},mem-path={wiring.ram},share=on",
        "-cpu", twin.cpu, "-smp", str(twin.smp), "-m", str(twin.memory >> 20),
        "-accel", "tcg,thread=multi",
        "-display", "none", "-vga", "none", "-nodefaults", "-no-reboot",
        *sockets,
        "-chardev", f"socket,id=gdb,path={wiring.socket('gdb')},server=on,wait=off",
        "-gdb", "chardev:gdb",
        "-serial", "chardev:console", "-mon", "chardev=qmp,mode=control",
        *(("-netdev", "user,id=net") if network else ()),
        *(argument for device in devices for argument in ("-device", device)),
        "-blockdev", f"driver=file,node-name=disk,filename={wiring.disk}",
        "-kernel", str(kernel), "-initrd", str(initrd), "-append", twin.kernel_options,
    ]  # fmt: skip


class Debugger:
    """The few words of the GDB remote protocol the drill needs: one breakpoint, go on, go away."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def set_breakpoint(self, address: int) -> None:
        """A hardware breakpoint: QEMU matches it against NIP, so in real mode `address` is physical."""
        await self._ask(f"Z1,{address:x},4")

    async def clear_breakpoint(self, address: int) -> None:
        """Take it away again."""
        await self._ask(f"z1,{address:x},4")

    async def resume(self) -> None:
        """Let all CPUs run; does not wait."""
        await self._send("c")

    async def step(self) -> None:
        """One instruction on the CPU that stopped."""
        await self._send("s")
        await self.stopped()

    async def stopped(self) -> None:
        """Wait until the CPUs stand still."""
        while not (await self._packet()).startswith(("T", "S")):
            pass

    async def detach(self) -> None:
        """Let the machine run on, undebugged."""
        await self._ask("D")
        self._writer.close()

    async def _ask(self, command: str) -> None:
        await self._send(command)
        # attaching stopped the machine, and QEMU says so before it answers the first question
        while (answer := await self._packet()).startswith("T"):
            pass
        if answer != "OK":
            raise EnvironmentFault(f"QEMU's debug port answered {answer!r} to {command!r}")

    async def _send(self, command: str) -> None:
        data = command.encode()
        self._writer.write(b"$" + data + b"#%02x" % (sum(data) & 0xFF))
        await self._writer.drain()

    async def _packet(self) -> str:
        await self._reader.readuntil(b"$")  # acknowledgements in between are of no interest on a local socket
        body = await self._reader.readuntil(b"#")
        await self._reader.readexactly(2)
        self._writer.write(b"+")
        return body[:-1].decode("ascii", "replace")


class RunningTwin:
    """A twin under QEMU. `console` holds the last lines it printed; `on_console` sees each as it comes."""

    def __init__(self, process: asyncio.subprocess.Process, wiring: Wiring, log: Path) -> None:
        self.process = process
        self.wiring = wiring
        self.console: deque[str] = deque(maxlen=CONSOLE_TAIL)
        self.panics: list[str] = []
        self.panics_expected = 0
        self._panicked = asyncio.Event()
        self.regions: dict[str, list[Range]] = {}  # what K1's kernel says of its memory
        self.spoke = asyncio.Event()  # set by each line on the console
        self.on_sound: Callable[[], None] | None = None  # called for each line on the console or the control port
        self._log = log
        self._control: tuple[asyncio.StreamReader, asyncio.StreamWriter]
        self._qmp: QMPClient
        self._reader: asyncio.Task[None]

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, command: list[str], wiring: Wiring, deadline: float = 20) -> AsyncIterator[Self]:
        """Run QEMU; it is gone, whatever happens, when the context ends.

        :raise EnvironmentFault: QEMU is missing or does not start.
        """
        for program, package in ((command[0], "qemu-system-ppc"), ("setpriv", "util-linux")):
            if shutil.which(program) is None:
                raise EnvironmentFault(f"{program} is not installed", hint=f"apt-get install {package}")
        loop = asyncio.get_running_loop()
        connections: dict[str, asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {}
        qmp = QMPClient("twin")
        async with contextlib.AsyncExitStack() as stack:
            for name in ("console", "control"):
                connections[name] = loop.create_future()
                server = await asyncio.start_unix_server(_accept(connections[name]), wiring.socket(name), limit=1 << 20)
                stack.callback(server.close)
            await qmp.start_server(str(wiring.socket("qmp")))
            log = wiring.directory / "console.log"
            errors = wiring.directory / "qemu.log"
            with errors.open("wb") as sink:
                process = await asyncio.create_subprocess_exec(
                    # should this process be killed outright, QEMU dies with it
                    "setpriv", "--pdeathsig", "KILL", *command, stdin=asyncio.subprocess.DEVNULL, stdout=sink, stderr=sink
                )  # fmt: skip
            stack.push_async_callback(_end, process)
            machine = cls(process, wiring, log)
            try:
                async with asyncio.timeout(deadline):
                    await _or_exit(qmp.accept(), process)
                    console = await _or_exit(connections["console"], process)
                    machine._control = await _or_exit(connections["control"], process)
            except (TimeoutError, QMPError, _Exited) as error:
                text = errors.read_text(errors="replace").strip()
                raise EnvironmentFault(f"QEMU did not start: {text.splitlines()[-1] if text else error!r}") from error
            machine._qmp = qmp
            stack.push_async_callback(_quietly, qmp.disconnect)
            machine._reader = asyncio.create_task(machine._read_console(console[0]))
            stack.push_async_callback(_cancel, machine._reader)
            yield machine

    async def line(self) -> str:
        """The next line from the guest's control port.

        :raise EOFError: QEMU is gone, or a kernel died that was not to die now.
        """
        reading = asyncio.ensure_future(self._control[0].readline())
        panic = asyncio.ensure_future(self._panicked.wait())
        try:
            await asyncio.wait({reading, panic}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise EOFError(self.panics[-1])
        finally:
            panic.cancel()
            reading.cancel()
        raw = reading.result()
        if not raw:
            raise EOFError("the twin ended")
        if self.on_sound:
            self.on_sound()
        return raw.decode("utf-8", "replace").rstrip("\n")

    async def exactly(self, size: int) -> bytes:
        """The next `size` bytes from the control port."""
        return await self._control[0].readexactly(size)

    def say(self, word: str) -> None:
        """A line to the guest."""
        self._control[1].write(word.encode() + b"\n")

    async def attach(self) -> Debugger:
        """Connect the debugger, which stops the machine."""
        reader, writer = await asyncio.open_unix_connection(self.wiring.socket("gdb"))
        return Debugger(reader, writer)

    async def in_real_mode_at(self, address: int) -> bool:
        """Whether a stopped CPU is about to execute physical `address` with translation off."""
        return any(nip == address and not msr & _MSR_IR for nip, msr in await self._standing())

    async def whereabouts(self) -> str:
        """Where each CPU is, for people, as far as QEMU answers."""
        places = []
        with contextlib.suppress(QMPError):
            places = [f"CPU {number} is at {nip:#x}" for number, (nip, _) in enumerate(await self._standing())]
        return ", ".join(places) or "QEMU does not say where its CPUs are"

    async def _standing(self) -> list[tuple[int, int]]:
        """NIP and MSR of each CPU, in the order of their numbers."""
        places = []
        for cpu in range(len(await self._command("query-cpus-fast"))):
            text = await self._command("human-monitor-command", {"command-line": "info registers", "cpu-index": cpu})
            if found := re.search(r"NIP ([0-9a-f]+).*?MSR ([0-9a-f]+)", str(text), re.DOTALL):
                places.append((int(found[1], 16), int(found[2], 16)))
        return places

    async def balloon(self, size: int) -> None:
        """Ask the guest's balloon driver to leave the guest `size` bytes; does not wait."""
        await self._command("balloon", {"value": size})

    async def quit(self) -> None:
        """End QEMU in good order: its disks are flushed."""
        with contextlib.suppress(QMPError):
            await self._qmp.execute("quit")
        await self.process.wait()

    async def _command(self, name: str, arguments: dict[str, object] | None = None) -> list[object]:
        return await self._qmp.execute(name, arguments)  # type: ignore[return-value]

    async def _read_console(self, reader: asyncio.StreamReader) -> None:
        with self._log.open("wb") as log, contextlib.suppress(ConnectionError):
            while raw := await reader.readline():
                log.write(raw)
                log.flush()
                line = raw.decode("utf-8", "replace").strip("\r\n")
                self.console.append(line)
                self.spoke.set()
                if self.on_sound:
                    self.on_sound()
                if "Kernel panic - not syncing" in line:
                    self.panics.append(line)
                    if len(self.panics) > self.panics_expected:
                        self._panicked.set()


class _Exited(CrashkernelError):
    """QEMU ended while something was awaited from it."""


async def _or_exit(awaited: Awaitable[_T], process: asyncio.subprocess.Process) -> _T:
    task, gone = asyncio.ensure_future(awaited), asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Exited(f"QEMU exited with {process.returncode}")
        return task.result()
    finally:
        # also when a Ctrl-C ends the waiting: nobody else will ask what became of them
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def _accept(
    future: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]],
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not future.done():
            future.set_result((reader, writer))

    return connected


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, ConnectionError, ValueError):
        await task


async def _quietly(disconnect: Callable[[], object]) -> None:
    with contextlib.suppress(QMPError, EOFError, ConnectionError):
        await disconnect()  # type: ignore[misc]
