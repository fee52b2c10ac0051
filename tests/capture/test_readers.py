"""Dumps of every format and codec that we write, opened by readers that we did not write, which must see known bytes."""

import random

import numpy as np
import pytest

from crashkernel.capture.codec import NAMES
from crashkernel.dump.conversion import convert
from crashkernel.dump.dumpfile import open_dump
from support.readers import LEFT_OUT, RANGES, RELEASE, Machine, crash, libkdumpfile

pytestmark = pytest.mark.capture

MACHINES = (("x86_64", 0x1000), ("ppc64le", 0x1000), ("ppc64le", 0x10000))
FORMS = (("elf", "none"), *(("kdump", codec) for codec in NAMES), *(("flattened", codec) for codec in NAMES))
DEBIAN = {"x86_64": "amd64", "ppc64le": "ppc64el"}


@pytest.fixture(scope="module", params=MACHINES, ids=lambda each: f"{each[0]}-{each[1] >> 10}K")
def machine(request):
    return Machine(*request.param)


@pytest.fixture(scope="module")
def vmcore(machine, tmp_path_factory):
    path = tmp_path_factory.mktemp("readers") / "vmcore"
    path.write_bytes(machine.vmcore())
    return path


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def written(request, vmcore):
    """The machine's dump in one form and codec, as `crashkernel convert` writes it."""
    form, codec = request.param
    path = vmcore.with_name(f"{form}-{codec}")
    convert(vmcore, path, form, codec)
    return path, form


@pytest.fixture
def dump(written):
    return written[0]


@pytest.fixture
def form(written):
    return written[1]


def places(machine: Machine, count: int = 300) -> list[tuple[int, int]]:
    """Places in the machine's memory: within pages, across them, of each kind of page."""
    dice = random.Random(machine.page_size)
    found = []
    for _ in range(count):
        start, size = dice.choice(RANGES)
        length = dice.choice((1, 8, 100, machine.page_size, machine.page_size + 64))
        found.append((start + dice.randrange(size - length), length))
    return found


def test_crash_prints_the_log_and_the_release(machine, dump):
    architecture = DEBIAN[machine.arch]
    assert crash(architecture, "--osrelease", dump).splitlines()[-1] == RELEASE
    assert machine.log in crash(architecture, "--log", dump)


def test_libkdumpfile_reads_known_bytes(machine, form, dump):
    if form == "flattened":
        with pytest.raises(AssertionError, match="Unknown file format"):  # Debian 12's 0.5.1; 0.5.3 reads them
            libkdumpfile(dump, [])
        return
    wanted = places(machine)
    found, reads = libkdumpfile(dump, [*wanted, (LEFT_OUT[0], 8)])
    assert found["arch.name"] == ("x86_64" if machine.arch == "x86_64" else "ppc64")
    assert found["arch.page_size"] == machine.page_size
    assert found["linux.uts.release"] == RELEASE
    if form != "elf":
        assert (found["linux.uts.machine"], found["linux.uts.nodename"]) == (machine.arch, "deadhost")
    assert reads == [*(machine.read(*place) for place in wanted), None]


def test_drgn_reads_known_bytes(machine, form, dump):
    import drgn

    program = drgn.Program()
    program.set_core_dump(str(dump))
    architecture = drgn.Architecture.X86_64 if machine.arch == "x86_64" else drgn.Architecture.PPC64
    assert program.platform.arch == architecture
    assert program.platform.flags & drgn.PlatformFlags.IS_LITTLE_ENDIAN
    if (machine.arch, machine.page_size) == ("ppc64le", 0x1000) and form != "elf":
        with pytest.raises(drgn.FaultError, match="Unsupported page shift: 12"):  # libkdumpfile has 64 KiB pages only
            program.read(0, 8, physical=True)
        return
    for paddr, size in places(machine):
        assert program.read(paddr, size, physical=True) == machine.read(paddr, size)
    if form != "elf":  # an ELF file says of memory that was left out that it is zeros
        with pytest.raises(drgn.FaultError, match="Excluded page"):
            program.read(LEFT_OUT[0], 8, physical=True)


def test_our_reader_reads_them_all(machine, dump):
    with open_dump(dump) as opened:
        assert opened.page_size == machine.page_size
        assert opened.vmcoreinfo.release == RELEASE
        for start, size in RANGES:
            pfns = np.arange(start // machine.page_size, (start + size) // machine.page_size)
            into = np.empty(size, np.uint8)
            opened.read_pages(pfns, into)
            assert into.tobytes() == machine.read(start, size)
