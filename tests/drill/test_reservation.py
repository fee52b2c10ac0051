"""What is predicted of crashkernel= is what a real kernel does with it: it is booted, and asked."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from crashkernel.drill.budget import drill_share, working_directory
from crashkernel.drill.debian import resolve_kernel
from crashkernel.drill.guest import NONCE_SIZE, build_crash_image, fetch_userland
from crashkernel.drill.qemu import RunningTwin, Wiring, qemu_command
from crashkernel.drill.twin import Twin
from crashkernel.memory import Range, align_up
from crashkernel.placement.image import KernelImage
from crashkernel.placement.reservation import reserve
from support.machines import machine, memory_node, tree

KERNEL = "debian:bookworm"
PAGE_SIZE = 0x10000
DEADLINE = 300  # seconds, for a slow machine


@pytest.fixture(scope="module")
def kernel():
    return resolve_kernel(KERNEL)


async def region_of(twin, kernel, directory):
    """What K1 has in /proc/device-tree, which its init says before anything that needs a region."""
    wiring = Wiring(directory)
    # nothing is loaded here: a capture kernel would only make the image large
    nothing = directory / "nothing"
    nothing.write_bytes(b"")
    initrd = build_crash_image(
        kernel, replace(kernel, vmlinux=nothing), nothing, fetch_userland(), directory / "crash.cpio", nonce=bytes(NONCE_SIZE)
    )
    for path, size in ((wiring.ram, twin.memory), (wiring.disk, 1 << 20)):
        with path.open("wb") as file:
            file.truncate(size)
    found = None
    async with (
        asyncio.timeout(DEADLINE),
        RunningTwin.start(qemu_command(twin, kernel.vmlinux, initrd, wiring), wiring) as running,
    ):
        while (words := (await running.line()).split())[0] in ("k1-up", "region"):
            if words[:2] == ["region", "crashkernel"]:
                base, size = (int(words[2][at : at + 16], 16) for at in (0, 16))
                found = Range.sized(base, size)
        await running.quit()
    return found


@pytest.mark.parametrize(
    ("twin", "granted"),
    [
        (Twin(memory=1 << 30, crashkernel="64M crashkernel=1G-2G:160M,2G-:384M@0x12345678"), True),
        (Twin(memory=1 << 30, mmu="hash", crashkernel="512M mem=768M"), True),
        (Twin(memory=1 << 30, crashkernel="512M crashkernel=256M,cma"), False),
    ],
    ids=lambda value: value.crashkernel if isinstance(value, Twin) else "",
)
def test_a_real_kernel_reserves_what_was_predicted(kernel, twin, granted):
    with working_directory(drill_share(twin.memory)) as directory:
        seen = asyncio.run(region_of(twin, kernel, directory))
    span = KernelImage.from_bytes(Path(kernel.vmlinux).read_bytes()).span
    k1 = machine(tree(memory=[memory_node(0, twin.memory)]), mmu=twin.mmu, release=kernel.name)
    k1 = replace(k1, kernel_end=align_up(span, PAGE_SIZE), page_size=PAGE_SIZE)
    assert reserve(k1, twin.kernel_options).range == seen
    assert (seen is not None) == granted
