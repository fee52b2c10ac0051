"""The twin's command line, as a table; nothing is started."""

from itertools import pairwise
from pathlib import Path

import pytest

from crashkernel.drill.guest import PORT_NAME
from crashkernel.drill.qemu import Hardware, Wiring, qemu_command
from crashkernel.drill.twin import MACHINES, Twin
from crashkernel.errors import UsageError

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
