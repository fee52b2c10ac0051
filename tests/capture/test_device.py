"""Targets on real block devices (loop devices, as root): in use, too small, and dying while a dump is written."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crashkernel.errors import FormatError
from crashkernel.target import LOG, NoTargetLeft, parse_target, save
from crashkernel.target.device import DeviceTarget, open_device_dump, read_device_head
from support.dumps import claims, contents, dump_bytes, is_whole, writer
from support.faults import SmallDisk

pytestmark = [
    pytest.mark.capture,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("losetup") is None, reason="loop devices want root and losetup"),
]

CRASH = "host-2026-11-25-01.02.03"
FILES = {LOG: b"Kernel panic - not syncing\n"}
SIZE = 3_000_000


def run(*command: object) -> str:
    return subprocess.run([str(each) for each in command], check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def loop(backing: Path, size: int) -> Iterator[Path]:
    with backing.open("wb") as file:
        file.truncate(size)
    device = Path(run("losetup", "--find", "--show", backing))
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def mounted(device: Path, directory: Path) -> Iterator[Path]:
    directory.mkdir()
    run("mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", device)
    run("mount", device, directory)
    try:
        yield directory
    finally:
        run("umount", directory)


def test_a_block_device_takes_a_dump_and_gives_it_back(tmp_path):
    with loop(tmp_path / "disk", 8 << 20) as device:
        target = parse_target(str(device))
        assert isinstance(target, DeviceTarget)
        save(writer(SIZE), [target], CRASH, files=FILES)
        file_offset, size, manifest = open_device_dump(device)
        with device.open("rb") as file:
            file.seek(file_offset)
            assert file.read(size) == dump_bytes(SIZE)
        assert manifest.contents == contents()
        assert read_device_head(device).log == FILES[LOG]


def test_one_that_is_in_use_is_left_alone(tmp_path):
    with loop(tmp_path / "disk", 8 << 20) as device:
        with mounted(device, tmp_path / "mnt") as directory:
            (directory / "precious").write_text("precious")
            with pytest.raises(NoTargetLeft, match="it is in use"):
                save(writer(SIZE), [parse_target(str(device))], CRASH, files=FILES)
            assert (directory / "precious").read_text() == "precious"
        with pytest.raises(NoTargetLeft, match="ext4 file system, which is not to be overwritten"):
            save(writer(SIZE), [parse_target(str(device))], CRASH, files=FILES)
        run("mount", device, tmp_path / "mnt")
        assert (tmp_path / "mnt" / "precious").read_text() == "precious"
        run("umount", tmp_path / "mnt")


@pytest.mark.parametrize("size", [1 << 19, 1 << 20, 3 << 20])
def test_one_that_is_too_small_keeps_the_log_at_the_most(tmp_path, size):
    with loop(tmp_path / "disk", size) as device:
        with pytest.raises(NoTargetLeft, match=r"No space left on device|smaller than 1 MiB"):
            save(writer(SIZE), [parse_target(str(device))], CRASH, files=FILES)
        with pytest.raises(FormatError):
            open_device_dump(device)
        if size >= 1 << 20:
            assert read_device_head(device).log == FILES[LOG]


@pytest.fixture
def dying(tmp_path):
    """A disk of 16 MiB that fails (EIO) once 2 MiB are on it: its backing file has no more room."""
    small = SmallDisk(tmp_path / "backing")
    if not small.mounted:
        small.close()
        pytest.skip("no tmpfs may be mounted")
    with contextlib.ExitStack() as stack:
        stack.callback(small.close)
        stack.enter_context(small.of(2 << 20))
        yield stack.enter_context(loop(small.directory / "disk", 16 << 20))


def test_a_device_that_dies_claims_nothing(tmp_path, dying):
    (tmp_path / "second").mkdir()
    lines = []
    targets = [parse_target(str(dying)), parse_target(str(tmp_path / "second"))]
    save(writer(SIZE), targets, CRASH, files=FILES, report=lines.append)
    assert lines == [f"device {dying}: Input/output error; trying directory {tmp_path / 'second'}"]
    assert is_whole(tmp_path / "second" / CRASH / "vmcore", dump_bytes(SIZE))
    with pytest.raises(FormatError, match="incomplete"):
        open_device_dump(dying)


def test_a_file_system_whose_disk_dies_claims_nothing(tmp_path, dying):
    (tmp_path / "second").mkdir()
    with mounted(dying, tmp_path / "mnt") as directory:
        lines = []
        targets = [parse_target(str(directory)), parse_target(str(tmp_path / "second"))]
        save(writer(SIZE), targets, CRASH, files=FILES, report=lines.append)
        assert len(lines) == 1
        # by the time of fsync: the loop device passes on what its file was told, which is not always EIO
        assert "Input/output error" in lines[0] or "No space left on device" in lines[0]
        assert not claims(directory)
    assert is_whole(tmp_path / "second" / CRASH / "vmcore", dump_bytes(SIZE))
