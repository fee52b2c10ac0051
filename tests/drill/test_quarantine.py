"""A real K1 parts with its freed init pages and what lies behind its image, gives them to nobody, and gets them back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from crashkernel.drill.debian import resolve_kernel
from crashkernel.drill.guest import fetch_userland, resolve_modules
from crashkernel.formats import cpio
from crashkernel.memory import Range, align_down, align_up
from crashkernel.placement.image import KernelImage
from support.k1 import console_of

HERE = Path(__file__).parent

INIT = b"""#!/bin/sh
export PATH=/bin:/usr/bin PYTHONPATH=/usr/lib/crashkernel PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t debugfs debugfs /sys/kernel/debug
mount -t tmpfs tmpfs /tmp
insmod /modules/hwpoison_inject.ko
python3.11 -S /etc/quarantine/test.py
poweroff -f
sleep 60
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What the program in K1 found."""
    directory = tmp_path_factory.mktemp("quarantine")
    kernel = resolve_kernel("debian:bookworm")
    image = KernelImage.from_bytes(kernel.vmlinux.read_bytes())
    page = 0x10000
    init = next(region.range for region in image.layout if region.name == "K1 freed init")
    behind = Range(align_up(image.span, page), align_up(image.span + (2 << 20), 2 << 20))
    ranges = [[align_up(init.start, page), align_down(init.end, page)], [behind.start, behind.end]]
    nothing = directory / "nothing"  # no K2 is loaded
    nothing.touch()
    (module,) = resolve_modules(kernel, ["hwpoison_inject"])
    console = console_of(
        directory,
        kernel,
        fetch_userland(),
        (replace(kernel, vmlinux=nothing), nothing),
        INIT,
        [
            cpio.Entry.file("modules/hwpoison_inject.ko", module.data, 0o644),
            cpio.Entry.directory("etc/quarantine"),
            cpio.Entry.file("etc/quarantine/ranges", json.dumps(ranges).encode(), 0o644),
            cpio.Entry.file("etc/quarantine/test.py", (HERE / "quarantine_in_k1.py").read_bytes(), 0o644),
        ],
        options=("-smp", "2", "-m", "512"),
    )
    lines = [line for line in console if line.startswith("QUARANTINE ")]
    assert len(lines) == 1, "\n".join(console[-60:])
    return json.loads(lines[0].removeprefix("QUARANTINE "))


def test_most_pages_are_taken_and_the_holders_of_the_rest_are_named(found):
    assert found["reason"] == ""
    assert found["taken"] + sum(found["held"].values()) == found["wanted"]
    assert found["taken"] >= found["wanted"] // 2
    assert set(found["held"]) <= {"slab", "pagetable", "kernel", "anonymous", "cache", "free"}


def test_the_kernel_counts_the_same_pages(found):
    assert found["corrupted_before"] == 0
    spent = found["corrupted_during"] - found["taken"]
    assert 0 <= spent <= 8 * found["page_size"]


def test_exhausting_memory_gets_none_of_them(found):
    assert found["ring_pages"] * found["page_size"] > 128 << 20, "that was no exhaustion"
    assert found["anonymous_pages"] * found["page_size"] > 128 << 20, "that was no exhaustion"
    assert found["ring_while_taken"] == 0
    assert found["anonymous_while_taken"] == 0
    assert found["still_taken"]


def test_taking_again_keeps_them(found):
    assert found["again"] >= found["taken"]


def test_all_are_given_back_and_allocations_get_them_again(found):
    assert (found["given_back"], found["stuck"], found["release_reason"]) == (found["corrupted_again"], 0, "")
    assert found["corrupted_after"] == 0
    assert found["ring_after_release"] + found["anonymous_after_release"] > 0


def test_a_load_that_was_killed_leaves_nothing_that_is_not_given_back(found):
    assert 0 < found["killed"] == found["killed_given_back"]
    assert found["corrupted_between"] == 0
