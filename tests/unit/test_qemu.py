"""The twin's command line, as a table; nothing is started."""

import asyncio
import contextlib
from itertools import pairwise
from pathlib import Path

import pytest

from crashkernel.drill.guest import PORT_NAME
from crashkernel.drill.qemu import Debugger, Hardware, RunningTwin, Wiring, plug_address, qemu_command
from crashkernel.drill.twin import MACHINES, Twin
from crashkernel.errors import EnvironmentFault, UsageError

WIRING = Wiring(Path("/run/twin"))


def command(twin: Twin, **options) -> list[str]:
    return qemu_command(twin, Path("/boot/vmlinux"), Path("/boot/initrd"), WIRING, **options)


def value(arguments: list[str], option: str) -> str:
    """The only value of an option."""
    (found,) = values(arguments, option)
    return found


def values(arguments: list[str], option: str) -> list[str]:
    return [after for before, after in pairwise(arguments) if before == option]


class TestCommand:
    @pytest.mark.parametrize(
        ("twin", "expected"),
        [
            (Twin(), {"-cpu": "POWER9", "-smp": "1", "-m": "2048", "machine": "pseries"}),
            (Twin(cpu="POWER8", mmu="hash"), {"-cpu": "POWER8", "machine": "pseries"}),
            (Twin(cpu="POWER10", smp=4, memory=4 << 30), {"-cpu": "POWER10", "-smp": "4", "-m": "4096", "machine": "pseries"}),
            (Twin(machine="powernv9"), {"-cpu": "POWER9", "machine": "powernv9"}),
            (Twin(machine="powernv10", cpu="POWER10"), {"-cpu": "POWER10", "machine": "powernv10"}),
        ],
        ids=lambda each: each.title if isinstance(each, Twin) else "",
    )
    def test_the_machine(self, twin, expected):
        arguments = command(twin)
        name, *options = value(arguments, "-machine").split(",")
        assert name == expected.pop("machine")
        assert "memory-backend=ram" in options
        assert {option: value(arguments, option) for option in expected} == expected
        assert ("cap-htm=off" in options) == (name == "pseries"), "only pseries has capabilities"

    @pytest.mark.parametrize("machine", MACHINES)
    def test_memory_is_a_shared_file_that_the_host_can_read(self, machine):
        twin = Twin(machine=machine, cpu="POWER10" if machine == "powernv10" else "POWER9", memory=3 << 30)
        backend = value(command(twin), "-object").split(",")
        assert backend == ["memory-backend-file", "id=ram", f"size={3 << 30}", "mem-path=/run/twin/ram", "share=on"]

    @pytest.mark.parametrize("machine", MACHINES)
    def test_the_guest_finds_its_port_and_its_disk(self, machine):
        arguments = command(Twin(machine=machine, cpu="POWER10" if machine == "powernv10" else "POWER9"))
        devices = values(arguments, "-device")
        assert f"virtserialport,chardev=control,name={PORT_NAME}" in devices
        assert any(each.startswith("virtio-blk-pci,drive=disk") for each in devices)
        assert devices.index(next(d for d in devices if d.startswith("virtio-serial"))) < devices.index(
            next(d for d in devices if d.startswith("virtserialport"))
        ), "a port comes after its bus"
        drives = {dict(pair.split("=", 1) for pair in each.split(","))["node-name"] for each in values(arguments, "-blockdev")}
        assert "disk" in drives
        assert any("filename=/run/twin/disk" in each for each in values(arguments, "-blockdev"))

    @pytest.mark.parametrize("machine", MACHINES)
    def test_a_network_card_only_when_the_dump_goes_over_it(self, machine):
        twin = Twin(machine=machine, cpu="POWER10" if machine == "powernv10" else "POWER9")
        assert "-netdev" not in command(twin)
        arguments = command(twin, hardware=Hardware(network=True))
        assert value(arguments, "-netdev") == "user,id=net"
        (card,) = [each for each in values(arguments, "-device") if each.startswith("virtio-net-pci,netdev=net")]
        places = [each.partition("addr=")[2].partition(",")[0] for each in values(arguments, "-device") if "addr=" in each]
        assert len(set(places)) == len(places), "no two devices in one place"
        assert ("addr=" in card) == (machine != "pseries")

    def test_every_socket_but_the_debugger_s_is_the_host_s(self):
        arguments = command(Twin())
        chardevs = {each.split(",")[1]: each for each in values(arguments, "-chardev")}
        assert set(chardevs) == {"id=console", "id=control", "id=qmp", "id=gdb"}
        for name in ("console", "control", "qmp", "gdb"):
            assert f"path=/run/twin/{name}.sock" in chardevs[f"id={name}"]
            assert ("server=on" in chardevs[f"id={name}"]) == (name == "gdb")
        assert value(arguments, "-gdb") == "chardev:gdb"
        assert value(arguments, "-serial") == "chardev:console"
        assert value(arguments, "-mon") == "chardev=qmp,mode=control"

    @pytest.mark.parametrize(
        ("twin", "options"),
        [
            (Twin(), "console=hvc0 crashkernel=512M rdinit=/init"),
            (Twin(mmu="hash"), "console=hvc0 crashkernel=512M disable_radix rdinit=/init"),
            (Twin(cpu="POWER8", mmu="hash"), "console=hvc0 crashkernel=512M rdinit=/init"),
            (Twin(crashkernel="1G@64M"), "console=hvc0 crashkernel=1G@64M rdinit=/init"),
        ],
    )
    def test_k1_s_command_line(self, twin, options):
        assert value(command(twin), "-append") == options

    def test_files_and_binary(self):
        arguments = command(Twin(), qemu="/opt/qemu")
        assert arguments[0] == "/opt/qemu"
        assert value(arguments, "-kernel") == "/boot/vmlinux"
        assert value(arguments, "-initrd") == "/boot/initrd"
        assert "-no-reboot" in arguments
        assert "-nodefaults" in arguments
        assert value(arguments, "-display") == "none"

    @pytest.mark.parametrize("machine", MACHINES)
    def test_no_argument_is_empty_or_an_unknown_placeholder(self, machine):
        for argument in command(Twin(machine=machine, cpu="POWER10" if machine == "powernv10" else "POWER9")):
            assert argument
            assert "{" not in argument
            assert "None" not in argument


class TestHardware:
    """What faults need: memory and CPUs that come later, and disks that are slow, broken or not there."""

    @pytest.mark.parametrize("machine", MACHINES)
    def test_no_disk(self, machine):
        twin = Twin(machine=machine, cpu="POWER10" if machine == "powernv10" else "POWER9")
        arguments = command(twin, hardware=Hardware(disk=False, network=True))
        assert "-blockdev" not in arguments
        assert not any("drive=disk" in each for each in values(arguments, "-device"))
        assert any("netdev=net" in each for each in values(arguments, "-device"))

    @pytest.mark.parametrize(
        ("hardware", "chain"),
        [
            (Hardware(), ["file"]),
            (Hardware(bad_sector=8 << 20), ["file", "blkdebug"]),
            (Hardware(disk_rate=1 << 20), ["file", "throttle"]),
            (Hardware(bad_sector=8 << 20, disk_rate=1 << 20), ["file", "blkdebug", "throttle"]),
        ],
    )
    def test_what_stands_before_the_disk(self, hardware, chain):
        nodes = [
            dict(pair.split("=", 1) for pair in each.split(","))
            for each in values(command(Twin(), hardware=hardware), "-blockdev")
        ]
        assert [node["driver"] for node in nodes] == chain
        assert nodes[-1]["node-name"] == "disk"
        for below, above in pairwise(nodes):
            assert below["node-name"] in (above.get("image"), above.get("file")), "each stands on the one before"

    def test_the_bad_sector_fails_every_write_and_no_read(self):
        (node,) = [
            each for each in values(command(Twin(), hardware=Hardware(bad_sector=8 << 20)), "-blockdev") if "blkdebug" in each
        ]
        rule = dict(pair.split("=", 1) for pair in node.split(",") if pair.startswith("inject-error.0."))
        assert rule["inject-error.0.sector"] == str((8 << 20) // 512)
        assert (rule["inject-error.0.iotype"], rule["inject-error.0.once"]) == ("write", "off")

    def test_room_for_what_comes_later(self):
        arguments = command(Twin(smp=2, memory=1 << 30), hardware=Hardware(cpus_to_come=1, memory_to_come=256 << 20))
        assert value(arguments, "-smp") == "2,maxcpus=3,cores=3,threads=1"
        assert value(arguments, "-m") == "1024M,slots=1,maxmem=1280M"

    @pytest.mark.parametrize(("memory", "address"), [(1 << 30, 1 << 30), (3 << 29, 2 << 30), (4 << 30, 4 << 30)])
    def test_where_memory_comes(self, memory, address):
        assert plug_address(Twin(memory=memory)) == address

    def test_a_panic_that_the_firmware_hears_of(self):
        assert "-action" not in command(Twin())
        assert value(command(Twin(), hardware=Hardware(outlives_panic=True)), "-action") == "panic=none"

    def test_more_options_for_k1(self):
        arguments = command(Twin(), hardware=Hardware(kernel_options=("crash_kexec_post_notifiers",)))
        assert value(arguments, "-append").endswith(" rdinit=/init crash_kexec_post_notifiers")


class TestDebugger:
    """What is said to QEMU's GDB stub, held against a stub of the test's own."""

    @staticmethod
    def talk(answers, talk):
        """What a debugger said, packet by packet, to a stub that gives these answers."""
        said = []

        async def stub(reader, writer):
            remaining = list(answers)
            with contextlib.suppress(asyncio.IncompleteReadError):
                while True:
                    await reader.readuntil(b"$")
                    body = (await reader.readuntil(b"#"))[:-1]
                    assert int(await reader.readexactly(2), 16) == sum(body) & 0xFF
                    said.append(body.decode())
                    answer = remaining.pop(0).encode()
                    writer.write(b"+$" + answer + b"#%02x" % (sum(answer) & 0xFF))
            writer.close()

        async def both():
            server = await asyncio.start_server(stub, "127.0.0.1", 0)
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            found = await talk(Debugger(reader, writer))
            writer.close()
            server.close()
            return found

        return asyncio.run(both()), said

    @pytest.mark.parametrize(("little", "digits"), [(True, "3412000000000000"), (False, "0000000000001234")])
    def test_a_register_is_written_in_the_cpu_s_own_byte_order(self, little, digits):
        _, said = self.talk(
            ["l<target/>", "OK", "OK"], lambda debugger: debugger.write_register(1, 64, 0x1234, little_endian=little)
        )
        assert said == ["qXfer:features:read:target.xml:0,fff", "Hg2", f"P40={digits}"]

    def test_it_reads_what_registers_there_are_only_once(self):
        async def twice(debugger):
            for cpu in (0, 1):
                await debugger.write_register(cpu, 65, 0, little_endian=True)

        _, said = self.talk(["m<target/>", "OK", "OK", "OK", "OK"], twice)
        assert [each[:2] for each in said] == ["qX", "Hg", "P4", "Hg", "P4"]

    def test_a_refusal_is_an_error(self):
        with pytest.raises(EnvironmentFault, match=r"answered 'E22' to 'P40="):
            self.talk(["l", "OK", "E22"], lambda debugger: debugger.write_register(0, 64, 0, little_endian=True))

    @pytest.mark.parametrize(("stop", "cpu"), [("T05thread:01;", 0), ("T05thread:03;swbreak:;", 2), ("S05", 0)])
    def test_which_cpu_stopped(self, stop, cpu):
        async def run(debugger):
            await debugger.resume()
            return await debugger.stopped()

        assert self.talk([stop], run) == (cpu, ["c"])


class FakeTwin(RunningTwin):
    """A twin without QEMU: its CPUs' registers are a list, which its debugger writes."""

    def __init__(self, *cpus, deaf=False):
        self.cpus, self.deaf = list(cpus), deaf

    async def registers(self):
        return [dict(cpu) for cpu in self.cpus]

    async def write_register(self, cpu, number, value, *, little_endian):
        assert little_endian == bool(self.cpus[cpu]["msr"] & 1)
        if not self.deaf:
            self.cpus[cpu][{64: "nip", 65: "msr"}[number]] = value


class TestSendingACpuElsewhere:
    def test_it_is_there_then_and_the_others_are_where_they_were(self):
        twin = FakeTwin({"nip": 1, "msr": 0x1}, {"nip": 2, "msr": 0x8001})
        assert asyncio.run(twin.send_to(twin, 1, 0x2000)) == {"nip": 0x2000, "msr": 0x8001}
        assert asyncio.run(twin.send_to(twin, 1, 0x3000, msr=0x31)) == {"nip": 0x3000, "msr": 0x31}
        assert twin.cpus[0] == {"nip": 1, "msr": 1}

    def test_a_qemu_that_does_not_do_it_is_told(self):
        twin = FakeTwin({"nip": 1, "msr": 0}, deaf=True)
        with pytest.raises(EnvironmentFault, match="did not send CPU 0 to 0x2000, it is at 0x1"):
            asyncio.run(twin.send_to(twin, 0, 0x2000))


class TestTwin:
    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            (
                {"machine": "powernv9", "cpu": "POWER8"},
                r"powernv9 is a POWER9 machine, not POWER8.*leave --cpu out",
            ),
            ({"machine": "powernv9", "cpu": "POWER10"}, "powernv9 is a POWER9 machine, not POWER10"),
            ({"machine": "powernv10", "cpu": "POWER9"}, "powernv10 is a POWER10 machine, not POWER9"),
            ({"cpu": "POWER8", "mmu": "radix"}, r"POWER8 has no radix MMU.*--mmu hash"),
        ],
    )
    def test_machines_that_do_not_exist(self, settings, says):
        with pytest.raises(UsageError, match=says) as caught:
            Twin(**settings)
        assert caught.value.exit_code == 2

    @pytest.mark.parametrize(
        ("twin", "title"),
        [
            (Twin(), "pseries POWER9 radix, 1 CPU, 2 GiB, crashkernel=512M"),
            (Twin("powernv9", smp=2, mmu="hash", memory=1 << 30), "powernv9 POWER9 hash, 2 CPUs, 1 GiB, crashkernel=512M"),
        ],
    )
    def test_titles(self, twin, title):
        assert twin.title == title
