"""A CPU and memory come to a running K1 after the load: `status` says so, and `load --refresh` takes them in."""

import json
import socket

import pytest

from crashkernel.drill.debian import resolve_kernel
from crashkernel.drill.guest import build_capture_image, fetch_userland
from support.k1 import console_of

INIT = b"""#!/bin/sh
export PATH=/bin:/usr/bin PYTHONPATH=/usr/lib/crashkernel PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /tmp
exec </dev/console >/dev/console 2>&1
crashkernel() {
    echo "BEGIN $*"
    python3.11 -S -c 'import sys; from crashkernel.cli import main; sys.exit(main())' "$@"
    echo "END $?"
}
echo online >/sys/devices/system/memory/auto_online_blocks
crashkernel load --placement zero --kernel /boot/vmlinux --initrd /boot/initrd --append console=hvc0
echo PLUG
while read -r online </sys/devices/system/cpu/online && [ "$online" != 0-1 ]; do sleep 0.2; done
while [ ! -d /sys/devices/system/memory/memory8 ]; do sleep 0.2; done
crashkernel status
crashkernel load --refresh
crashkernel status --json
echo DONE
poweroff -f
sleep 60
"""

PLUG = (
    {"execute": "qmp_capabilities"},
    {"execute": "device_add", "arguments": {"driver": "power9_v2.0-spapr-cpu-core", "id": "core1", "core-id": 1}},
    {"execute": "object-add", "arguments": {"qom-type": "memory-backend-ram", "id": "memory1", "size": 256 << 20}},
    {"execute": "device_add", "arguments": {"driver": "pc-dimm", "id": "dimm1", "memdev": "memory1"}},
)


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, tuple[int, list[str]]]:
    """What each command said in K1, and its exit status."""
    directory = tmp_path_factory.mktemp("refresh")
    kernel, userland = resolve_kernel("debian:bookworm"), fetch_userland()
    console = console_of(
        directory,
        kernel,
        userland,
        (kernel, build_capture_image(kernel, userland, directory / "capture.cpio")),
        INIT,
        options=(
            *("-smp", "1,maxcpus=2,cores=2,threads=1", "-m", "2048M,slots=2,maxmem=4G"),
            *("-qmp", f"unix:{directory / 'qmp'},server=on,wait=off"),
        ),
        append="crashkernel=512M",
        told=lambda line: plug(str(directory / "qmp")) if line == "PLUG" else None,
    )
    assert console[-1:] == ["DONE"], "\n".join(console[-40:])
    return commands_in(console)


def plug(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(path)
        with monitor.makefile("rw") as stream:
            stream.readline()
            for command in PLUG:
                print(json.dumps(command), file=stream, flush=True)
                while "return" not in (answer := json.loads(stream.readline())):
                    assert "error" not in answer, answer


def commands_in(console: list[str]) -> dict[str, tuple[int, list[str]]]:
    found: dict[str, tuple[int, list[str]]] = {}
    command, lines = "", []
    for line in console:
        if line.startswith("BEGIN "):
            command, lines = line.removeprefix("BEGIN ").split(" --placement")[0], []
        elif line.startswith("END "):
            found[command] = (int(line.removeprefix("END ")), lines)
            lines = []
        else:
            lines.append(line)
    return found


def test_status_says_what_came(said):
    status, lines = said["status"]
    assert status == 1
    told = [line for line in lines if line.startswith("OUT OF DATE: ")]
    assert "OUT OF DATE: 256 MiB of memory came at 0x80000000-0x90000000: it would not be in the dump" in told
    assert (
        "OUT OF DATE: 2 CPUs are online, the handover waits for 1: "
        "if one that was plugged in since is the one that crashes, there is no K2"
    ) in told
    assert lines[-1] == "run `crashkernel load --refresh`"


def test_a_refresh_loads_the_same_for_the_machine_as_it_is(said):
    status, lines = said["load --refresh"]
    assert status == 0
    assert any(line.startswith("loaded 6.1.0-") and "placement zero" in line for line in lines)
    assert any(line.startswith("the kernel frees the old one first: it had none for at most ") for line in lines)


def test_the_plan_has_them_then(said):
    status, lines = said["status --json"]
    now = json.loads("\n".join(lines))
    assert status == 0
    assert now["outdated"] == []
    assert now["plan"]["memory"] == ["0x0-0x90000000"]
    assert now["plan"]["slaves"] == 1
    assert now["plan"]["placement"] == "zero"
