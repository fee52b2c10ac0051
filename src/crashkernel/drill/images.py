"""The guests' images of a drill, built as its scenario and its faults need them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crashkernel.drill.guest import Driver, Loader, build_capture_image, build_crash_image
from crashkernel.placement import ONE_CPU

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crashkernel.drill.arrival import Arrival
    from crashkernel.drill.faults import Fault
    from crashkernel.drill.request import DrillRequest
    from crashkernel.drill.scenario import Scenario

CAPTURE_CMDLINE = "console=hvc0 irqpoll reset_devices rdinit=/init"
# As tmpfs the root may take half of the memory that is free while its archive is still there (init_rootfs, init/do_mounts.c),
# and what goes beyond is silently left out.
_WHOLE_ROOT = " rootfstype=ramfs"


def build_images(
    scenario: Scenario,
    directory: Path,
    nonce: bytes,
    loader: Loader,
    faults: Sequence[Fault] = (),
    arriving: Arrival | None = None,
) -> Path:
    """K1's image, with K2's in it, below `directory`."""
    userland, request = scenario.supplies.userland, scenario.request
    arguments, token = (arriving.arguments, arriving.token) if arriving else ((), "")
    capture = build_capture_image(
        scenario.k2,
        userland,
        directory / "capture.cpio",
        capture_args=arguments,
        token=token,
        fault="".join(fault.k2_script for fault in faults),
    )
    if request.initrd:
        whole = directory / "capture-whole.cpio"
        whole.write_bytes(whole_initrd(request, capture.read_bytes()))
        capture = whole
    cmdline = (
        CAPTURE_CMDLINE + ("" if request.all_cpus else f" {ONE_CPU}") + (_WHOLE_ROOT if arriving or request.initrd else "")
    )
    drivers: list[Driver] = [fault.driver for fault in faults if fault.driver != "none"]
    return build_crash_image(
        scenario.k1,
        scenario.k2,
        capture,
        userland,
        directory / "crash.cpio",
        nonce=nonce,
        driver=drivers[0] if drivers else "none",
        loader=loader,
        load_args=(
            f"--placement={request.placement}",
            "--kernel=/boot/vmlinux",
            "--initrd=/boot/initrd",
            f"--append={cmdline}",
            f"--on-damage={request.on_damage}",
            *(("--no-quarantine",) if request.no_quarantine else ()),
        ),
        append=cmdline + (" crashkernel.mode=bare" if loader == "kexec-tools" else ""),
    )


def whole_initrd(request: DrillRequest, ours: bytes) -> bytes:
    """The user's initrd, if there is one, with ours behind it: K2 unpacks both, and of two files of one name the last is it."""
    users = Path(request.initrd).read_bytes() if request.initrd else b""
    # an archive begins at a multiple of four bytes (write_buffer, init/initramfs.c)
    return users + bytes(-len(users) % 4) + ours
