"""Dumps of a real kernel that makedumpfile wrote: every page is read as the vmcore has it."""

import shutil
import subprocess

import numpy as np
import pytest

from crashkernel.bench.makedumpfile import SUITES, provide
from crashkernel.bench.vmcore import provide as provide_vmcore
from crashkernel.capture.selection import PageClass
from crashkernel.dump.dumpfile import KdumpFile, open_dump, stored_pages
from crashkernel.dump.inspection import inspect
from crashkernel.dump.structure import check_structure
from crashkernel.errors import FormatError
from crashkernel.vmcore.source import ElfVmcore
from support.capture import all_chunks
from support.faults import SmallDisk

pytestmark = [pytest.mark.capture, pytest.mark.timeout(1800)]

OPTIONS = {"zlib": "-c", "lzo": "-l", "zstd": "-z", "none": ""}
"""Debian builds none with snappy, and that of bookworm without zstd: they store pages as they are then."""
LEVEL = 31
TOO_SMALL = 60 << 20  # bytes; the dump takes twice as many


@pytest.fixture(scope="module")
def vmcore():
    return provide_vmcore()


@pytest.fixture(scope="module", params=SUITES)
def makedumpfile(request):
    return provide(request.param)


@pytest.fixture
def place(tmp_path):
    """A directory that does not outlive the test: dumps of hundreds of MiB."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def written(makedumpfile, vmcore, path, *options, status=0):
    command = [*makedumpfile.command, *(option for option in options if option), "-d", str(LEVEL), str(vmcore)]
    if "-F" in options:
        with path.open("wb") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, timeout=600, check=False)
    else:
        done = subprocess.run([*command, str(path)], capture_output=True, timeout=600, check=False)
    assert (done.returncode == 0) == (status == 0), done.stderr
    return path


def same_pages(dump, vmcore) -> int:
    """How many pages the dump has; each is as in the vmcore."""
    count = 0
    with ElfVmcore(vmcore) as source:
        for chunk in all_chunks(stored_pages(dump)):
            pfns = np.flatnonzero(chunk.classes == PageClass.KEPT) + chunk.pfn
            for some in np.array_split(pfns, max(1, len(pfns) // 4096)):
                ours, theirs = (np.empty(len(some) * dump.page_size, np.uint8) for _ in range(2))
                dump.read_pages(some, ours)
                source.read_pages(some, theirs)
                assert np.array_equal(ours, theirs)
            count += len(pfns)
        assert (dump.memory, dump.notes) == (source.memory, source.notes)
    return count


@pytest.mark.parametrize(("codec", "form"), [*((codec, "file") for codec in OPTIONS), ("lzo", "flattened")])
def test_every_page_of_every_codec(place, makedumpfile, vmcore, codec, form):
    path = written(makedumpfile, vmcore, place / "dump", OPTIONS[codec], "-F" if form == "flattened" else "")
    with open_dump(path) as dump, ElfVmcore(vmcore) as source:
        assert isinstance(dump, KdumpFile)
        assert same_pages(dump, vmcore) == dump.pages > 100_000
        assert not check_structure(dump, workers=2).count
        theirs, truth = inspect(dump), inspect(source)
    assert set(theirs.pages.codecs) == {codec if codec in makedumpfile.codecs else "none", "none"}
    assert (theirs.completeness, theirs.level, theirs.pages.memory) == ("whole", LEVEL, truth.pages.memory)
    for field in ("log", "panic", "task", "cpus", "release", "version", "machine", "crash_time"):
        assert getattr(theirs, field) == getattr(truth, field)


def test_plain_elf(place, makedumpfile, vmcore):
    path = written(makedumpfile, vmcore, place / "dump", "-E")
    with open_dump(path) as dump, ElfVmcore(vmcore) as source:
        assert isinstance(dump, ElfVmcore)
        assert inspect(dump).log == inspect(source).log
        assert dump.memory == source.memory


def test_one_part_of_several_is_refused(place, makedumpfile, vmcore):
    command = [*makedumpfile.command, "-l", "-d", str(LEVEL), "--split", str(vmcore), *(str(place / name) for name in "ab")]
    subprocess.run(command, capture_output=True, timeout=600, check=True)
    with pytest.raises(FormatError, match=r"one part of a dump .*--reassemble"):
        open_dump(place / "a")
    together = [*makedumpfile.command, "--reassemble", *(str(place / name) for name in ("a", "b", "whole"))]
    subprocess.run(together, capture_output=True, timeout=600, check=True)
    with open_dump(place / "whole") as dump:
        assert same_pages(dump, vmcore) == dump.pages
        assert not check_structure(dump, workers=2).count


def test_a_disk_that_was_full(place, makedumpfile, vmcore):
    disk = SmallDisk(place / "disk")
    try:
        if not disk.mounted:
            pytest.skip("makedumpfile needs a disk that is full, and no tmpfs can be mounted here")
        with disk.of(TOO_SMALL):
            path = written(makedumpfile, vmcore, disk.directory / "dump", "-c", status=1)
            with open_dump(path) as dump, ElfVmcore(vmcore) as source:
                found = inspect(dump)
                assert (found.completeness, found.panic) == ("incomplete", inspect(source).panic)
                assert 0 < found.pages.missing < found.pages.kept
                faults = check_structure(dump)
                assert faults.count == found.pages.missing + 1
    finally:
        disk.close()
