"""A real K1 on a twin with an init of the test's own: what its console says. Nothing is crashed."""

import io
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from crashkernel.drill.debian import Kernel
from crashkernel.drill.guest import NONCE_SIZE, Userland, build_crash_image
from crashkernel.formats import cpio


def console_of(
    directory: Path,
    kernel: Kernel,
    userland: Userland,
    k2: tuple[Kernel, Path],
    init: bytes,
    files: Iterable[cpio.Entry] = (),
    *,
    options: tuple[str, ...],
    append: str = "",
    told: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Boot `kernel` from the drill's image with another /init and `files` over it, to its end or its line "DONE".

    `told` hears each line of the console. `k2` is what lies in /boot: a kernel and its image. `options` are QEMU's own.
    """
    if shutil.which("qemu-system-ppc64") is None:
        pytest.skip("qemu-system-ppc64 is not installed")
    initrd = build_crash_image(kernel, *k2, userland, directory / "crash.cpio", nonce=bytes(NONCE_SIZE))
    overlay = io.BytesIO()  # what a later archive has replaces what an earlier one had
    cpio.write(overlay, [cpio.Entry.file("init", init, 0o755), *files])
    with initrd.open("ab") as archive:
        archive.write(overlay.getvalue())
    command = [
        "qemu-system-ppc64",
        *("-machine", "pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-htm=off", "-cpu", "POWER9", *options),
        *("-accel", "tcg,thread=multi", "-display", "none", "-vga", "none", "-nodefaults", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(kernel.vmlinux), "-initrd", str(initrd), "-append", f"console=hvc0 quiet rdinit=/init {append}"),
    ]
    console: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as qemu:
        assert qemu.stdout is not None
        deadline = threading.Timer(400, qemu.kill)
        deadline.start()
        try:
            for line in qemu.stdout:
                console.append(line.rstrip())
                told(console[-1])
                if console[-1] == "DONE":
                    break
        finally:
            deadline.cancel()
            qemu.kill()
    return console
