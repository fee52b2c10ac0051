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
from crashkernel.drill.stages import CONSOLE, KERNEL_STARTS
from crashkernel.drill.twin import Twin
from crashkernel.errors import CrashkernelError, EnvironmentFault
from crashkernel.memory import Range, align_up

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

_T = TypeVar("_T")

QEMU = "qemu-system-ppc64"
CONSOLE_TAIL = 40
"""Lines of console kept for a report of failure."""

_MSR_IR, _MSR_LE = 0x20, 0x1  # instruction relocation, little-endian (Power ISA Book III 4.2.1)
_GENERAL = 32  # general registers


@dataclass(frozen=True, slots=True)
class Wiring:
    """The files and sockets of one instance, all below one directory."""

    directory: Path

    @property
    def ram(self) -> Path:
        """Guest RAM; file offset = physical address."""
        return self.directory / "ram"

    @property
    def plugged(self) -> Path:
        """Memory that is plugged in later."""
        return self.directory / "plugged"

    @property
    def disk(self) -> Path:
        """The disk K2 writes the dump to."""
        return self.directory / "disk"

    @property
    def console(self) -> Path:
        """All that the twin says there."""
        return self.directory / CONSOLE

    def socket(self, name: str) -> Path:
        """One of console, control, qmp, gdb."""
        return self.directory / f"{name}.sock"


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a twin has beside the machine, and what is wrong with it. Sizes in bytes.

    `disk_rate` is in bytes a second, None for as fast as it goes; whatever is written over the disk's byte `bad_sector` fails.
    `cpus_to_come` and `memory_to_come` can be plugged in later.
    """

    network: bool = False  # a card from which the host's loopback is reached
    disk: bool = True
    disk_rate: int | None = None
    bad_sector: int | None = None
    cpus_to_come: int = 0
    memory_to_come: int = 0
    outlives_panic: bool = False  # it runs on when its kernel tells the firmware that it has panicked
    kernel_options: tuple[str, ...] = ()  # more for K1's command line


_PORT = f"virtserialport,chardev=control,name={PORT_NAME}"
# With an ioeventfd QEMU looks through every queue whenever the machine goes on (virtio_device_start_ioeventfd_impl,
# hw/virtio/virtio.c), and the debugger has it go on when K1's rings are K2's image already: what QEMU took for a ring there
# it once in some thirty drills wrote to.
_SERIAL = "virtio-serial-pci,ioeventfd=off"
_PSERIES_DEVICES = (_SERIAL, _PORT)
# One PCI host bridge instead of the default six, each of which K2 resets for three seconds; and a BMC, without which
# powering off never ends.
_POWERNV_DEVICES = (
    "pnv-phb,chip-id=0,index=0,id=phb0",
    "pnv-phb-root-port,bus=phb0,id=pcie.0",
    f"{_SERIAL},bus=pcie.0,addr=0.0,multifunction=on",
    _PORT,
    "ipmi-bmc-sim,id=bmc0",
    "isa-ipmi-bt,bmc=bmc0,irq=10",
)
_DISK, _NETWORK = "virtio-blk-pci,drive=disk,num-queues=1", "virtio-net-pci,netdev=net,id=card"
_POWERNV_PLACES = {_DISK: ",bus=pcie.0,addr=0.1", _NETWORK: ",bus=pcie.0,addr=0.2"}

_SECTOR = 512
_EIO = 5


def qemu_command(
    twin: Twin, kernel: Path, initrd: Path, wiring: Wiring, hardware: Hardware | None = None, *, qemu: str = QEMU
) -> list[str]:
    """QEMU's arguments for `twin` with `hardware`."""
    hardware = hardware or Hardware()
    machine: str = twin.machine
    if machine == "pseries":
        # The mitigations that TCG cannot emulate; a guest would only be told that it is vulnerable.
        machine += ",cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-htm=off"
    sockets = [
        argument
        for name in ("console", "control", "qmp")
        for argument in ("-chardev", f"socket,id={name},path={wiring.socket(name)}")
    ]
    cpus, memory = str(twin.smp), str(twin.memory >> 20)
    if hardware.cpus_to_come:
        most = twin.smp + hardware.cpus_to_come
        cpus += f",maxcpus={most},cores={most},threads=1"
    if hardware.memory_to_come:
        memory += f"M,slots=1,maxmem={plug_address(twin) + hardware.memory_to_come >> 20}M"
    return [
        qemu,
        "-machine", f"{machine},memory-backend=ram",
        "-object", f"memory-backend-file,id=ram,size={twin.memory},mem-path={wiring.ram},share=on",
        "-cpu", twin.cpu, "-smp", cpus, "-m", memory,
        "-accel", "tcg,thread=multi",
        "-display", "none", "-vga", "none", "-nodefaults", "-no-reboot",
        *(("-action", "panic=none") if hardware.outlives_panic else ()),
        *sockets,
        "-chardev", f"socket,id=gdb,path={wiring.socket('gdb')},server=on,wait=off",
        "-gdb", "chardev:gdb",
        "-serial", "chardev:console", "-mon", "chardev=qmp,mode=control",
        *_storage(hardware, wiring),
        *(("-netdev", "user,id=net") if hardware.network else ()),
        *(argument for device in _devices(twin, hardware) for argument in ("-device", device)),
        "-kernel", str(kernel), "-initrd", str(initrd),
        "-append", " ".join([twin.kernel_options, *hardware.kernel_options]),
    ]  # fmt: skip


def _devices(twin: Twin, hardware: Hardware) -> list[str]:
    wanted = [*([_DISK] if hardware.disk else []), *([_NETWORK] if hardware.network else [])]
    if twin.machine == "pseries":
        return [*_PSERIES_DEVICES, *wanted]
    return [*_POWERNV_DEVICES, *(device + _POWERNV_PLACES[device] for device in wanted)]


def _storage(hardware: Hardware, wiring: Wiring) -> list[str]:
    """The disk that K2 writes to, and in front of it what makes it slow or fail."""
    if not hardware.disk:
        return []
    node = f"driver=file,filename={wiring.disk}"
    arguments = []
    if hardware.bad_sector is not None:
        arguments += ["-blockdev", f"{node},node-name=file"]
        rule = {"event": "none", "iotype": "write", "sector": hardware.bad_sector // _SECTOR, "errno": _EIO, "once": "off"}
        node = "driver=blkdebug,image=file," + ",".join(f"inject-error.0.{name}={value}" for name, value in rule.items())
    if hardware.disk_rate is not None:
        arguments += ["-object", f"throttle-group,id=slow,x-bps-write={hardware.disk_rate}"]
        arguments += ["-blockdev", f"{node},node-name=whole"]
        node = "driver=throttle,throttle-group=slow,file=whole"
    return [*arguments, "-blockdev", f"{node},node-name=disk"]


def plug_address(twin: Twin) -> int:
    """Where memory that is plugged into a pseries lies (`spapr_machine_init`, hw/ppc/spapr.c: SPAPR_DEVICE_MEM_ALIGN)."""
    return align_up(twin.memory, 1 << 30)


_NIP, _MSR = 64, 65  # as the GDB remote protocol counts them (ppc_cpu_gdb_write_register, target/ppc/gdbstub.c)


class Debugger:
    """The few words of the GDB remote protocol the drill needs: breakpoints, go on, another NIP, go away."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._described = False

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

    async def stopped(self) -> int:
        """Wait until the CPUs stand still; the number of the one that stopped them."""
        while not (stop := await self._packet()).startswith(("T", "S")):
            pass
        thread = re.search(r"thread:([0-9a-f]+);", stop)
        return int(thread[1], 16) - 1 if thread else 0

    async def halted(self) -> None:
        """Wait until the CPUs stand still for a debugger that has come."""
        await self._ask("Hg1")

    async def write_register(self, cpu: int, number: int, value: int, *, little_endian: bool) -> None:
        """Set a 64-bit register of a CPU that stands still; `little_endian` is that CPU's mode."""
        if not self._described:
            # QEMU lets nobody write registers who has not read what they are (handle_set_reg, gdbstub.c)
            await self._send("qXfer:features:read:target.xml:0,fff")
            while not (await self._packet()).startswith(("l", "m")):
                pass
            self._described = True
        await self._ask(f"Hg{cpu + 1:x}")
        await self._ask(f"P{number:x}={value.to_bytes(8, 'little' if little_endian else 'big').hex()}")

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

    def __init__(self, process: asyncio.subprocess.Process, wiring: Wiring) -> None:
        self.process = process
        self.wiring = wiring
        self.console: deque[str] = deque(maxlen=CONSOLE_TAIL)
        self._panics: list[str] = []
        self._oopses: list[str] = []  # the first line of each
        self._dying = False
        self._panicked = asyncio.Event()
        self.regions: dict[str, list[Range]] = {}  # what K1's kernel says of its memory
        self.plugged: Range | None = None  # memory that came while it ran
        self.spoke = asyncio.Event()  # set by each line on the console
        self.on_sound: Callable[[], None] | None = None  # called for each line on the console or the control port
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
            errors = wiring.directory / "qemu.log"
            with errors.open("wb") as sink:
                process = await asyncio.create_subprocess_exec(
                    # should this process be killed outright, QEMU dies with it
                    "setpriv", "--pdeathsig", "KILL", *command, stdin=asyncio.subprocess.DEVNULL, stdout=sink, stderr=sink
                )  # fmt: skip
            stack.push_async_callback(_end, process)
            machine = cls(process, wiring)
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
                raise EOFError(self._panics[-1])
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

    def await_death(self) -> None:
        """From now on, and until another kernel starts, this one may panic."""
        self._dying = True

    def said_dying(self) -> str:
        """Why the kernel died, in the line of its own without the time: the last panic's, else the last oops's, "" without."""
        # "[    1.234567] Kernel panic - not syncing: sysrq triggered crash"
        last = self._panics or self._oopses
        return last[-1].partition("] ")[2] if last else ""

    def say(self, word: str) -> None:
        """A line to the guest."""
        self._control[1].write(word.encode() + b"\n")

    async def attach(self) -> Debugger:
        """Connect the debugger, which stops the machine."""
        reader, writer = await asyncio.open_unix_connection(self.wiring.socket("gdb"))
        return Debugger(reader, writer)

    async def in_real_mode_at(self, address: int) -> int | None:
        """The number of the stopped CPU about to execute physical `address` with translation off; None if none is."""
        standing = enumerate(await self._standing())
        return next((cpu for cpu, (nip, msr) in standing if nip == address and not msr & _MSR_IR), None)

    async def whereabouts(self) -> str:
        """Where each CPU is, for people, as far as QEMU answers."""
        places = []
        with contextlib.suppress(EOFError, EnvironmentFault):
            places = [f"CPU {number} is at {nip:#x}" for number, (nip, _) in enumerate(await self._standing())]
        return ", ".join(places) or "QEMU does not say where its CPUs are"

    async def registers(self) -> list[dict[str, int]]:
        """NIP, LR, MSR and the 32 general registers of each CPU, by the names that an NT_PRSTATUS note has for them."""
        found = []
        for cpu in range(len(await self._command("query-cpus-fast"))):
            text = str(await self._command("human-monitor-command", {"command-line": "info registers", "cpu-index": cpu}))
            special = re.search(r"NIP ([0-9a-f]+) +LR ([0-9a-f]+).*?MSR ([0-9a-f]+)", text, re.DOTALL)
            general = [int(word, 16) for row in re.findall(r"GPR\d\d((?: [0-9a-f]{16})+)", text) for word in row.split()]
            if special is None or len(general) != _GENERAL:
                raise EnvironmentFault(f"QEMU says its registers in a form that is not known: {text[:200]!r}")
            names = ("nip", "link", "msr", *(f"gpr{number}" for number in range(_GENERAL)))
            found.append(dict(zip(names, (*(int(word, 16) for word in special.groups()), *general), strict=True)))
        return found

    async def _standing(self) -> list[tuple[int, int]]:
        """NIP and MSR of each CPU, in the order of their numbers."""
        return [(registers["nip"], registers["msr"]) for registers in await self.registers()]

    async def send_to(self, debugger: Debugger, cpu: int, nip: int, *, msr: int | None = None) -> dict[str, int]:
        """Have a CPU that stands still go on at `nip`, with another MSR if one is given; its registers then.

        :raise EnvironmentFault: QEMU does not do it.
        """
        little = bool((await self.registers())[cpu]["msr"] & _MSR_LE)
        if msr is not None:
            await debugger.write_register(cpu, _MSR, msr, little_endian=little)
        await debugger.write_register(cpu, _NIP, nip, little_endian=little)
        registers = (await self.registers())[cpu]
        if registers["nip"] != nip:
            raise EnvironmentFault(f"QEMU did not send CPU {cpu} to {nip:#x}, it is at {registers['nip']:#x}")
        return registers

    async def inject_nmi(self) -> None:
        """A system reset of every CPU: an NMI button, in QEMU's word."""
        await self._command("inject-nmi")

    async def pull_network(self) -> None:
        """Pull the network's cable."""
        await self._command("set_link", {"name": "card", "up": False})

    async def disk_writes(self) -> tuple[int, float]:
        """Bytes that the guest has written to its disk, and the seconds that its requests took, added up."""
        for each in await self._command("query-blockstats", {"query-nodes": False}):
            if isinstance(each, dict) and (stats := each["stats"])["wr_bytes"]:
                return int(stats["wr_bytes"]), int(stats["wr_total_time_ns"]) / 1e9
        return 0, 0.0

    async def plug_cpu(self) -> int:
        """Plug a CPU into a running pseries; its number."""
        slots = await self._command("query-hotpluggable-cpus")
        free = min(
            (slot for slot in slots if isinstance(slot, dict) and "qom-path" not in slot),
            key=lambda slot: slot["props"]["core-id"],
        )
        number = int(free["props"]["core-id"])
        await self._command("device_add", {"driver": free["type"], "id": f"core{number}", **free["props"]})
        return number

    async def plug_memory(self, twin: Twin, size: int) -> Range:
        """Plug memory into a running pseries; where it lies."""
        backend = {"qom-type": "memory-backend-file", "id": "plugged", "size": size, "share": True}
        await self._command("object-add", {**backend, "mem-path": str(self.wiring.plugged)})
        await self._command("device_add", {"driver": "pc-dimm", "id": "dimm", "memdev": "plugged"})
        self.plugged = Range.sized(plug_address(twin), size)
        return self.plugged

    async def balloon(self, size: int) -> None:
        """Ask the guest's balloon driver to leave the guest `size` bytes; does not wait."""
        await self._command("balloon", {"value": size})

    async def quit(self) -> None:
        """End QEMU in good order: its disks are flushed."""
        with contextlib.suppress(QMPError):
            await self._qmp.execute("quit")
        await self.process.wait()

    async def _command(self, name: str, arguments: dict[str, object] | None = None) -> list[object]:
        """Ask QEMU's monitor.

        :raise EOFError: it refused, or is gone.
        """
        try:
            return await self._qmp.execute(name, arguments)  # type: ignore[return-value]
        except QMPError as error:
            raise EOFError(f"QEMU did not do {name}: {error}") from error

    async def _read_console(self, reader: asyncio.StreamReader) -> None:
        with self.wiring.console.open("wb") as log, contextlib.suppress(ConnectionError):
            while raw := await reader.readline():
                log.write(raw)
                log.flush()
                line = raw.decode("utf-8", "replace").strip("\r\n")
                self.console.append(line)
                self.spoke.set()
                if self.on_sound:
                    self.on_sound()
                if "Unable to handle kernel" in line:
                    self._oopses.append(line)
                if "Kernel panic - not syncing" in line:
                    self._panics.append(line)
                    if not self._dying:
                        self._panicked.set()
                if KERNEL_STARTS in line:
                    self._dying = False


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
