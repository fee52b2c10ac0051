import errno
import importlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from crashkernel.errors import EnvironmentFault, FormatError, UsageError
from crashkernel.formats.flattened import END, HEADER, record_header
from crashkernel.target import (
    LOG,
    Heartbeat,
    NoTargetLeft,
    TargetFailed,
    TargetOptions,
    crash_name,
    files,
    parse_target,
    save,
)
from crashkernel.target import manifest as manifest_module
from crashkernel.target.aside import Kind, aside, kind_of
from crashkernel.target.device import DeviceHead, DeviceTarget, open_device_dump, read_device_head
from crashkernel.target.encryption import Encryption
from crashkernel.target.local import FileTarget
from crashkernel.target.manifest import PIECE_SIZE, Digest, Manifest, digest_file, manifest_name
from crashkernel.target.stream import StdoutTarget
from support.dumps import claims, contents, dump_bytes, flattened, is_whole, writer
from support.hostile import survives

SIZE = 300_000
CRASH = "host-2026-11-25-01.02.03"
FILES = {LOG: b"Kernel panic - not syncing\n"}

needs_age = pytest.mark.skipif(shutil.which("age") is None, reason="age is not installed")


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def raising(error: BaseException):
    def write(descriptor, beat):
        os.write(descriptor, b"some")
        raise error

    return write


# -- a file


def test_a_directory_gets_one_for_the_crash(tmp_path):
    saved = save(writer(SIZE), [parse_target(str(tmp_path))], CRASH, files=FILES)
    directory = tmp_path / CRASH
    assert names(tmp_path) == {f"{CRASH}/{name}" for name in ("vmcore", manifest_name("vmcore"), LOG)}
    assert (directory / LOG).read_bytes() == FILES[LOG]
    assert is_whole(directory / "vmcore", dump_bytes(SIZE))
    assert saved.place == str(directory / "vmcore")
    assert saved.manifest == Manifest.from_json((directory / manifest_name("vmcore")).read_text())
    assert saved.manifest.contents == contents()
    assert directory.stat().st_mode & 0o077 == 0
    assert (directory / "vmcore").stat().st_mode & 0o077 == 0


def test_a_second_crash_of_the_same_name_gets_another_directory(tmp_path):
    for seed in range(3):
        save(writer(SIZE, seed), [parse_target(f"{tmp_path}/")], CRASH, files=FILES)
    found = claims(tmp_path)
    assert [path.parent.name for path in found] == [CRASH, f"{CRASH}-1", f"{CRASH}-2"]
    assert all(is_whole(path, dump_bytes(SIZE, seed)) for seed, path in enumerate(found))


def test_a_file_of_the_users_own_name(tmp_path):
    save(writer(SIZE), [parse_target(str(tmp_path / "vmcore.today"))], CRASH, files=FILES)
    assert names(tmp_path) == {"vmcore.today", "vmcore.today.manifest.json", "vmcore.today-dmesg.txt"}
    assert is_whole(tmp_path / "vmcore.today", dump_bytes(SIZE))


def test_all_is_flushed_before_it_is_named(tmp_path, monkeypatch):
    steps = []

    def fsync(descriptor, flush=os.fsync):
        steps.append(f"flush {Path(f'/proc/self/fd/{descriptor}').readlink().relative_to(tmp_path)}")
        flush(descriptor)

    def give_name(scratch, path, give=files.give_name):
        steps.append(f"name {path.relative_to(tmp_path)}")
        give(scratch, path)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "give_name", give_name)
    target = parse_target(str(tmp_path / "mine"))
    target.begin(CRASH, Heartbeat())
    target.put(LOG, FILES[LOG])
    target.commit(writer(SIZE)(target.open(), lambda: None))
    assert steps == [
        "flush mine-dmesg.txt.incomplete",
        "name mine-dmesg.txt",
        "flush .",
        "flush mine.incomplete",
        "flush mine.manifest.json.incomplete",
        "name mine.manifest.json",
        "flush .",
        "name mine",
        "flush .",
    ]


@pytest.mark.parametrize("taken", ["mine", "mine.manifest.json"])
def test_a_name_that_exists_is_never_replaced(tmp_path, taken):
    (tmp_path / taken).write_text("precious")
    with pytest.raises(NoTargetLeft, match=f"{taken} exists"):
        save(writer(SIZE), [parse_target(str(tmp_path / "mine"))], CRASH)
    assert names(tmp_path) == {taken}
    assert (tmp_path / taken).read_text() == "precious"


@pytest.mark.parametrize("taken", ["mine", "mine.manifest.json"])
def test_a_name_taken_meanwhile_is_not_replaced_either(tmp_path, taken):
    def late(number):
        if number == 2:
            (tmp_path / taken).write_text("precious")

    with pytest.raises(NoTargetLeft, match="exists by now"):
        save(writer(SIZE, before=late), [parse_target(str(tmp_path / "mine"))], CRASH)
    assert names(tmp_path) == {taken, "mine.incomplete"}
    assert (tmp_path / taken).read_text() == "precious"


def test_a_log_that_is_there_already_does_not_stop_the_next_try(tmp_path):
    (tmp_path / "mine-dmesg.txt").write_text("of an earlier try")
    (tmp_path / "mine.incomplete").write_text("of an earlier try")
    save(writer(SIZE), [parse_target(str(tmp_path / "mine"))], CRASH, files=FILES)
    assert is_whole(tmp_path / "mine", dump_bytes(SIZE))
    assert (tmp_path / "mine-dmesg.txt-1").read_bytes() == FILES[LOG]
    assert (tmp_path / "mine-dmesg.txt").read_text() == (tmp_path / "mine.incomplete").read_text() == "of an earlier try"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_renameat2_does_as_well(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "_rename_noreplace", refuse)
    save(writer(SIZE), [parse_target(str(tmp_path / "mine"))], CRASH)
    assert names(tmp_path) == {"mine", "mine.manifest.json"}
    assert is_whole(tmp_path / "mine", dump_bytes(SIZE))
    (tmp_path / "x").write_text("other")
    with pytest.raises(FileExistsError):
        files.give_name(tmp_path / "x", tmp_path / "mine")
    assert is_whole(tmp_path / "mine", dump_bytes(SIZE))


def test_a_mount_that_is_missing_is_no_directory_to_be_made(tmp_path):
    with pytest.raises(NoTargetLeft, match="there is no directory"):
        save(writer(SIZE), [parse_target(f"{tmp_path}/missing/")], CRASH)
    assert not names(tmp_path)


def test_what_an_attempt_says_arrives_whole(tmp_path):
    """Also what is longer than a pipe has room, and many small things at once."""
    sentences = [f"{number} " + "x" * size for number, size in enumerate((0, 1, 70_000, 300_000, 3, 65_536, *range(200)))]

    class Talkative(FileTarget):
        def warnings(self):
            return sentences

    lines = []
    save(writer(SIZE), [Talkative(str(tmp_path / "mine"))], CRASH, report=lines.append)
    assert lines == sentences
    assert is_whole(tmp_path / "mine", dump_bytes(SIZE))


def test_the_log_comes_first(tmp_path):
    seen = []

    def look(number):
        (tmp_path / "seen").write_text(" ".join(sorted(names(tmp_path))))
        seen.append(number)

    save(writer(SIZE, before=look), [parse_target(str(tmp_path / "mine"))], CRASH, files={LOG: b"log"})
    assert (tmp_path / "seen").read_text() == "mine-dmesg.txt mine.incomplete seen"


def test_warns_of_a_place_in_memory(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("crashkernel.target.local._file_system", lambda path: "tmpfs")
    save(writer(SIZE), [parse_target(str(tmp_path / "mine"))], CRASH, report=lines.append)
    assert lines == [f"file {tmp_path / 'mine'} is in memory: what is stored there is gone after a reboot"]
    assert is_whole(tmp_path / "mine", dump_bytes(SIZE))


@pytest.mark.parametrize("settle", [True, False])
def test_a_file_is_followed_while_it_is_written(tmp_path, settle, monkeypatch):
    read_afterwards = []

    def piece_digest(descriptor, file_offset, size, digest=manifest_module.piece_digest):
        read_afterwards.append(file_offset // PIECE_SIZE)
        return digest(descriptor, file_offset, size)

    monkeypatch.setattr(manifest_module, "piece_digest", piece_digest)
    data = dump_bytes(4 * PIECE_SIZE + 1000)
    head = 100_000
    target = parse_target(str(tmp_path / "mine"))
    target.begin(CRASH, Heartbeat())
    descriptor = target.open()
    for at in range(head, len(data), 1 << 20):
        os.pwrite(descriptor, data[at : at + (1 << 20)], at)
        if settle:
            target.settled(head, min(at + (1 << 20), len(data)))
    deadline = time.monotonic() + 20
    while settle and len(target._follower.pieces) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.pwrite(descriptor, data[:head], 0)
    target.commit(contents())
    assert sorted(read_afterwards) == ([0, 4] if settle else [0, 1, 2, 3, 4])
    assert is_whole(tmp_path / "mine", data)


def test_a_writer_says_what_is_settled(tmp_path):
    def write(descriptor, beat):
        data = dump_bytes(2 * PIECE_SIZE)
        os.pwrite(descriptor, data, 0)
        beat()
        beat(0, len(data))
        return contents()

    save(write, [parse_target(str(tmp_path / "mine"))], CRASH)
    assert is_whole(tmp_path / "mine", dump_bytes(2 * PIECE_SIZE))


# -- one target after the other


def test_the_next_target_takes_it_and_the_remains_go(tmp_path):
    (tmp_path / "second").mkdir()
    attempts = tmp_path / "attempts"

    def write(descriptor, beat):
        if attempts.exists():
            return writer(SIZE)(descriptor, beat)
        attempts.touch()
        os.write(descriptor, b"some")
        raise OSError(errno.ENOSPC, "full")

    lines = []
    targets = [parse_target(str(tmp_path / "first")), parse_target(str(tmp_path / "second"))]
    saved = save(write, targets, CRASH, files=FILES, report=lines.append)
    assert saved.place == str(tmp_path / "second" / CRASH / "vmcore")
    assert names(tmp_path) == {
        "attempts",
        "first-dmesg.txt",
        *(f"second/{CRASH}/{name}" for name in ("vmcore", manifest_name("vmcore"), LOG)),
    }
    assert lines == [
        f"file {tmp_path}/first: No space left on device (make room on it); {tmp_path}/first.incomplete is what it has; "
        f"trying directory {tmp_path}/second"
    ]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EIO, "x"), "Input/output error"),
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
        (MemoryError(), "out of memory"),
        (EnvironmentFault("no such luck"), "no such luck"),
        (TargetFailed("it", "its reason"), "its reason"),
    ],
)
def test_says_why_when_none_is_left(tmp_path, error, says):
    with pytest.raises(NoTargetLeft, match=rf"NOT saved: file .*mine: {says}") as caught:
        save(raising(error), [parse_target(str(tmp_path / "mine"))], CRASH, files=FILES)
    assert caught.value.exit_code == 3
    assert names(tmp_path) == {"mine.incomplete", "mine-dmesg.txt"}


def test_no_target_at_all():
    with pytest.raises(NoTargetLeft, match="there is no target"):
        save(writer(SIZE), [], CRASH)


def test_what_is_wrong_with_the_dump_itself_stops_everything(tmp_path):
    (tmp_path / "second").mkdir()
    with pytest.raises(FormatError, match=r"vmcore: no ELF at offset 0x40 \(try another\)") as caught:
        save(
            raising(FormatError("no ELF", source="vmcore", offset=0x40, hint="try another")),
            [parse_target(str(tmp_path / "first")), parse_target(str(tmp_path / "second"))],
            CRASH,
        )
    assert caught.value.hint == "try another"
    assert caught.value.offset == 0x40
    assert names(tmp_path) == {"first.incomplete"}


def test_a_bug_in_one_targets_code_leaves_the_next(tmp_path):
    class Buggy(FileTarget):
        def open(self):
            raise ZeroDivisionError("oops")

    lines = []
    targets = [Buggy(str(tmp_path / "first")), parse_target(str(tmp_path / "second"))]
    save(writer(SIZE), targets, CRASH, report=lines.append)
    assert len(lines) == 1
    assert "a bug of ours: ZeroDivisionError: oops" in lines[0]
    assert is_whole(tmp_path / "second", dump_bytes(SIZE))
    with pytest.raises(NoTargetLeft, match="a bug of ours: ZeroDivisionError: oops"):
        save(raising(ZeroDivisionError("oops")), [parse_target(str(tmp_path / "third"))], CRASH)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_attempt_that_is_killed_is_one_that_failed(tmp_path, number):
    def write(descriptor, beat):
        os.kill(os.getpid(), number)
        return writer(SIZE)(descriptor, beat)

    with pytest.raises(NoTargetLeft, match=f"killed \\({number.name}"):
        save(write, [parse_target(str(tmp_path / "mine"))], CRASH)
    assert names(tmp_path) == {"mine.incomplete"}


def test_one_that_stands_still_is_given_up_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr("crashkernel.target.saving._GRACE", 0.0)
    started = tmp_path / "pid"

    def write(descriptor, beat):
        started.write_text(str(subprocess.Popen(["sleep", "100"]).pid))
        time.sleep(100)
        return contents()

    with pytest.raises(NoTargetLeft, match="no progress for 1 s"):
        save(write, [parse_target(str(tmp_path / "mine"))], CRASH, stall=0.6)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and running(int(started.read_text())):
        time.sleep(0.02)
    assert not running(int(started.read_text()))


@pytest.mark.parametrize(
    "hanging", ["os.stat", "pathlib.Path.is_dir", "pathlib.Path.mkdir", "crashkernel.target.local._file_system"]
)
def test_a_disk_that_hangs_is_given_up(tmp_path, monkeypatch, hanging):
    monkeypatch.setattr("crashkernel.target.saving._GRACE", 0.0)
    monkeypatch.setattr("crashkernel.target.aside.PATIENCE", 0.2)
    module, _, name = hanging.rpartition(".")
    owner = Path if module == "pathlib.Path" else importlib.import_module(module)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    ours, call = os.getpid(), getattr(owner, name)

    def hang(path, *rest, **options):
        if str(path).startswith(str(first)):
            assert os.getpid() != ours, "the capture itself hangs"
            time.sleep(100)
        return call(path, *rest, **options)

    monkeypatch.setattr(owner, name, hang)
    lines = []
    targets = [parse_target(str(first)), parse_target(str(second))]
    save(writer(SIZE), targets, CRASH, stall=0.6, report=lines.append)
    assert is_whole(second, dump_bytes(SIZE))
    assert "no progress for 1 s" in lines[0]


def test_a_disk_that_hangs_keeps_its_leftover_and_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setattr("crashkernel.target.aside.PATIENCE", 0.2)
    ours = os.getpid()

    def unlink(path, missing_ok=False, call=Path.unlink):
        if path.name == "first.incomplete":
            assert os.getpid() != ours, "the capture itself hangs"
            time.sleep(100)
        call(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    lines = []

    def write(descriptor, beat):
        if "first" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, "full")
        return writer(SIZE)(descriptor, beat)

    targets = [parse_target(str(tmp_path / "first")), parse_target(str(tmp_path / "second"))]
    save(write, targets, CRASH, report=lines.append)
    assert is_whole(tmp_path / "second", dump_bytes(SIZE))
    assert lines[-1] == f"{tmp_path / 'first.incomplete'} could not be removed"


def test_a_disk_that_was_only_slow_gets_its_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("crashkernel.target.local.kind_of", lambda path: Kind.UNKNOWN)
    save(writer(SIZE), [FileTarget(str(tmp_path))], CRASH)
    assert is_whole(tmp_path / CRASH / "vmcore", dump_bytes(SIZE))


def test_what_a_path_leads_to(tmp_path):
    (tmp_path / "file").touch()
    paths = {"": Kind.DIRECTORY, "file": Kind.OTHER, "missing": Kind.MISSING, "file/x": Kind.MISSING}
    assert {path: kind_of(str(tmp_path / path)) for path in paths} == paths
    assert aside(lambda: 7) == 7
    assert aside(lambda: 1 // 0) is None


def test_an_interrupted_capture_leaves_nothing_running(tmp_path):
    started = tmp_path / "pid"

    def write(descriptor, beat):
        started.write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(100)
        return contents()

    with pytest.raises(KeyboardInterrupt):
        save(write, [parse_target(str(tmp_path / "mine"))], CRASH, files=FILES)
    assert not running(int(started.read_text()))
    assert names(tmp_path) == {"pid", "mine.incomplete", "mine-dmesg.txt"}


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_slow_one_is_not_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("crashkernel.target.saving._GRACE", 0.0)
    slow = writer(SIZE, before=lambda _: time.sleep(0.2))
    save(slow, [parse_target(str(tmp_path / "mine"))], CRASH, stall=0.6)
    assert is_whole(tmp_path / "mine", dump_bytes(SIZE))


def test_a_heartbeat_is_heard_by_other_processes():
    alive = Heartbeat()
    assert 0 <= alive.silence < 10
    pid = os.fork()
    if pid == 0:
        alive.beat(allow=1000)
        os._exit(0)
    os.waitpid(pid, 0)
    assert alive.silence < -900


# -- a stream


def test_standard_output_gets_the_flattened_stream(tmp_path):
    with (tmp_path / "out").open("wb") as out:
        saved = save(writer(SIZE), [StdoutTarget(descriptor=out.fileno())], CRASH, files=FILES)
    assert (tmp_path / "out").read_bytes() == flattened(dump_bytes(SIZE))
    assert saved.manifest.file == "vmcore.flat"
    assert saved.manifest.size == len(flattened(dump_bytes(SIZE)))


def test_a_terminal_is_refused():
    master, terminal = os.openpty()
    try:
        with pytest.raises(NoTargetLeft, match="standard output: it is a terminal"):
            save(writer(SIZE), [StdoutTarget(descriptor=terminal)], CRASH)
    finally:
        os.close(master)
        os.close(terminal)


def test_a_reader_that_leaves_is_told(tmp_path):
    reader, out = os.pipe()
    os.close(reader)
    try:
        with pytest.raises(NoTargetLeft, match="standard output: Broken pipe"):
            save(writer(8 << 20), [StdoutTarget(descriptor=out)], CRASH)
    finally:
        os.close(out)


def test_what_is_lost_on_the_last_stretch_is_told():
    # all of the dump goes into the pipe at once: only the relay sees that the disk is full
    with Path("/dev/full").open("wb") as full, pytest.raises(NoTargetLeft, match="standard output: No space left on device"):
        save(writer(1000), [StdoutTarget(descriptor=full.fileno())], CRASH)


# -- a block device: here a file, which differs in that nobody can mount it

ROOM = 4 << 20


def device(tmp_path: Path, size: int = ROOM) -> Path:
    path = tmp_path / "device"
    path.write_bytes(bytes(size))
    return path


def test_a_device_holds_the_dump_behind_its_head(tmp_path):
    path = device(tmp_path)
    saved = save(writer(SIZE), [DeviceTarget(str(path))], CRASH, files=FILES)
    file_offset, size, manifest = open_device_dump(path)
    assert path.read_bytes()[file_offset : file_offset + size] == dump_bytes(SIZE)
    assert manifest == saved.manifest
    assert (manifest.file, manifest.size, manifest.contents) == ("vmcore", SIZE, contents())
    with path.open("rb") as file:
        assert digest_file(file.fileno(), size, start=file_offset) == manifest.digest
    assert read_device_head(path).log == FILES[LOG]


def test_a_device_that_failed_has_the_log_and_claims_nothing(tmp_path):
    path = device(tmp_path)
    lines = []
    save(writer(SIZE), [DeviceTarget(str(path))], CRASH, files=FILES, report=lines.append)
    assert not lines
    with pytest.raises(NoTargetLeft, match="Input/output error"):
        save(raising(OSError(errno.EIO, "x")), [DeviceTarget(str(path))], CRASH, files={LOG: b"new"}, report=lines.append)
    assert lines[0] == f"device {path} holds a whole dump, of 6.1.0: it is overwritten"
    assert read_device_head(path) == DeviceHead(None, b"new")
    with pytest.raises(FormatError, match="incomplete"):
        open_device_dump(path)


def test_a_device_that_does_not_give_back_a_stream_claims_nothing(tmp_path):
    path = device(tmp_path)

    def damage(number):
        if number == 3:  # what came before is in the relay's hands
            deadline = time.monotonic() + 5
            while not path.read_bytes()[(1 << 20) + 65536 :][:1].strip(b"\0") and time.monotonic() < deadline:
                time.sleep(0.01)
            with path.open("r+b") as file:
                os.pwrite(file.fileno(), bytes(16), (1 << 20) + 65536)

    with pytest.raises(NoTargetLeft, match="does not give back"):
        save(writer(SIZE, before=damage), [DeviceTarget(str(path))], CRASH, files=FILES)
    assert read_device_head(path).manifest is None


def test_what_a_dump_is_silent_about_is_zeros_on_a_used_device(tmp_path):
    path = device(tmp_path)
    save(writer(SIZE), [DeviceTarget(str(path))], CRASH)

    def write(descriptor, beat):
        stream = HEADER + record_header(0, 4) + b"KDMP" + record_header(5000, 4) + b"page" + END
        os.write(descriptor, stream)
        return contents("flattened")

    save(write, [DeviceTarget(str(path))], CRASH)
    file_offset, size, _ = open_device_dump(path)
    assert path.read_bytes()[file_offset : file_offset + size] == b"KDMP" + bytes(4996) + b"page"


def test_of_a_long_log_the_end_is_kept(tmp_path):
    path = device(tmp_path)
    save(writer(SIZE), [DeviceTarget(str(path))], CRASH, files={LOG: b"x" * (2 << 20) + b"panic"})
    log = read_device_head(path).log
    assert log.endswith(b"xpanic")
    assert len(log) > 900_000
    assert open_device_dump(path)[1] == SIZE


@needs_age
def test_an_encrypted_dump_on_a_device(tmp_path, key):
    identity, recipient = key
    path = device(tmp_path)
    save(writer(SIZE), [DeviceTarget(str(path), Encryption.to(recipient))], CRASH, files=FILES)
    file_offset, size, manifest = open_device_dump(path)
    (tmp_path / "sealed").write_bytes(path.read_bytes()[file_offset : file_offset + size])
    assert manifest.file == "vmcore.flat.age"
    assert decrypted(tmp_path / "sealed", identity) == flattened(dump_bytes(SIZE))
    (tmp_path / "sealed").write_bytes(read_device_head(path).log)
    assert decrypted(tmp_path / "sealed", identity) == FILES[LOG]


@pytest.mark.parametrize(
    ("at", "magic", "what"),
    [
        (510, b"\x55\xaa", "partition table"),
        (512, b"EFI PART", "partition table"),
        (ROOM - 512, b"EFI PART", "partition table"),
        (0x438, b"\x53\xef", "ext4"),
        (0, b"XFSB", "XFS"),
        (0x10040, b"_BHRfS_M", "btrfs"),
        (ROOM - 8192, b"\xfc\x4e\x2b\xa9", "RAID"),
        (0xFFFF, b"x", "something unknown"),
    ],
)
def test_what_is_not_ours_is_not_overwritten(tmp_path, at, magic, what):
    path = device(tmp_path)
    before = bytearray(ROOM)
    before[at : at + len(magic)] = magic
    path.write_bytes(before)
    with pytest.raises(NoTargetLeft, match=f"it holds .*{what}.*not to be overwritten"):
        save(writer(SIZE), [DeviceTarget(str(path))], CRASH, files=FILES)
    assert path.read_bytes() == before


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("at", "magic"),
    [
        (510, b"\x55\xaa"),
        (512, b"EFI PART"),
        (0x438, b"\x53\xef"),
        (0x200, b"LABELONE"),
        (0x1000, b"\xfc\x4e\x2b\xa9"),
        (0x4000, b"\1\1\0\0\0\0\0\0\0\0\0\1\0\0\0\x24"),  # a pool's nvlist
        (0xFFF6, b"SWAPSPACE2"),
        (0x10040, b"_BHRfS_M"),
        (0x20000, b"\x0c\xb1\xba\0"),  # an uberblock
        (ROOM - 8192, b"\xfc\x4e\x2b\xa9"),
        (ROOM - 512, b"EFI PART"),
    ],
)
def test_what_a_device_was_used_for_after_a_dump_is_not_overwritten(tmp_path, at, magic, whole):
    path = device(tmp_path)
    if whole:
        save(writer(SIZE), [DeviceTarget(str(path))], CRASH, files=FILES)
    else:
        with pytest.raises(NoTargetLeft):
            save(raising(OSError(errno.EIO, "x")), [DeviceTarget(str(path))], CRASH)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), magic, at)
    before = path.read_bytes()
    with pytest.raises(NoTargetLeft, match=r"it holds .*not to be overwritten"):
        save(writer(SIZE), [DeviceTarget(str(path))], CRASH, files=FILES)
    assert path.read_bytes() == before


@pytest.mark.parametrize("written", [0, 512, 0xF000, 0xF000 + 512, 0xFF000])
@pytest.mark.parametrize("step", range(4))
def test_a_head_that_is_half_written_is_ours(tmp_path, written, step):
    whole = DeviceHead(Manifest("vmcore", 7, Digest("00" * 32), contents()), "an old log, née\n".encode() * 100)
    heads = [whole, DeviceHead(None, b""), DeviceHead(None, b"log"), DeviceHead(whole.manifest, b"log"), DeviceHead(None, b"")]
    old, new = (head.to_bytes() for head in heads[step : step + 2])
    path = device(tmp_path)
    with path.open("r+b") as file:
        file.write(old[:0x1000] + new[0x1000 : 0x1000 + written] + old[0x1000 + written :])
    save(writer(SIZE), [DeviceTarget(str(path))], CRASH, files=FILES)
    assert open_device_dump(path)[1] == SIZE


def test_a_dump_may_reach_a_devices_end(tmp_path):
    path = device(tmp_path)
    for _ in range(2):
        save(writer(ROOM - (1 << 20)), [DeviceTarget(str(path))], CRASH, files=FILES)


def test_a_device_that_is_missing_is_no_file_to_be_made():
    target = parse_target("/dev/no-such-device")
    with pytest.raises(NoTargetLeft, match="there is no such device"):
        save(writer(SIZE), [target], CRASH)
    assert not Path("/dev/no-such-device").exists()


def test_a_head_survives_being_read_back():
    manifest = Manifest("vmcore", 7, Digest("00" * 32), contents())
    for head in (DeviceHead(None, b""), DeviceHead(None, b"log"), DeviceHead(manifest, b"log")):
        assert DeviceHead.from_bytes(head.to_bytes()) == head


def test_no_damage_to_a_head_goes_unnoticed():
    head = DeviceHead(Manifest("vmcore", 7, Digest("00" * 32), contents()), b"log")
    data = head.to_bytes()
    for at in (*range(0x48), *range(0x1000, 0x1100), 0x10000, 0x10002):
        damaged = bytearray(data)
        damaged[at] ^= 1
        assert not survives(DeviceHead.from_bytes, bytes(damaged)), hex(at)
    assert not survives(DeviceHead.from_bytes, data[:-1])
    assert not survives(DeviceHead.from_bytes, b"")


# -- encryption


@pytest.fixture
def key(tmp_path_factory):
    path = tmp_path_factory.mktemp("key") / "identity"
    made = subprocess.run(["age-keygen", "-o", path], check=True, capture_output=True, text=True)
    return path, made.stderr.split()[-1]


def decrypted(path: Path, identity: Path) -> bytes:
    return subprocess.run(["age", "--decrypt", "-i", identity, path], check=True, capture_output=True).stdout


@needs_age
def test_an_encrypted_dump_is_a_stream_that_only_the_key_opens(tmp_path, key):
    identity, recipient = key
    options = TargetOptions(encryption=Encryption.to(recipient))
    saved = save(writer(SIZE), [parse_target(str(tmp_path), options)], CRASH, files=FILES)
    directory = tmp_path / CRASH
    assert names(directory) == {"vmcore.flat.age", "vmcore.flat.age.manifest.json", LOG + ".age"}
    assert decrypted(directory / "vmcore.flat.age", identity) == flattened(dump_bytes(SIZE))
    assert decrypted(directory / (LOG + ".age"), identity) == FILES[LOG]
    assert is_whole(directory / "vmcore.flat.age", (directory / "vmcore.flat.age").read_bytes())
    assert saved.manifest.encrypted_to == recipient


@needs_age
def test_a_file_of_recipients(tmp_path, key):
    identity, recipient = key
    keys = tmp_path / "keys"
    keys.write_text(f"# who may read\n\n{recipient}\n")
    assert Encryption.to(str(keys)) == Encryption((recipient,))
    sealed = tmp_path / "sealed"
    sealed.write_bytes(Encryption.to(str(keys)).encrypt(b"secret"))
    assert decrypted(sealed, identity) == b"secret"


@needs_age
@pytest.mark.parametrize(
    ("text", "says"), [("", "has no public key"), ("# none", "has no public key"), ("AGE-SECRET", "no public")]
)
def test_a_file_without_recipients(tmp_path, text, says):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UsageError, match=says):
        Encryption.to(str(tmp_path / "keys"))
    with pytest.raises(UsageError, match="no public key, and no file"):
        Encryption.to(str(tmp_path / "missing"))


@needs_age
def test_a_key_that_age_refuses_leaves_nothing_in_the_clear(tmp_path):
    with pytest.raises(UsageError, match=r"cannot encrypt to age1nonsense: .*malformed"):
        Encryption.to("age1nonsense")
    (tmp_path / "keys").write_text("age1nonsense\n")
    with pytest.raises(UsageError, match="cannot encrypt to age1nonsense"):
        Encryption.to(str(tmp_path / "keys"))
    (tmp_path / "keys").unlink()
    options = TargetOptions(encryption=Encryption(("age1nonsense",)))  # as if age failed only then
    for small in (FILES, {}):
        with pytest.raises(NoTargetLeft, match=r"age1nonsense|malformed"):
            save(writer(8 << 20), [parse_target(str(tmp_path), options)], CRASH, files=small)
    assert not claims(tmp_path)
    assert all(path.stat().st_size == 0 for path in tmp_path.rglob("*") if path.is_file())


def test_without_age_there_is_no_encryption(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match="age is missing"):
        Encryption.to("age1xyz")


# -- names


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("power9.example.org", "power9.example.org-2023-11-14-22.13.20"),
        ("::1", "__1-2023-11-14-22.13.20"),
        ("../../etc", "_.._etc-2023-11-14-22.13.20"),
        ("", "localhost-2023-11-14-22.13.20"),
        ("é\n", "__-2023-11-14-22.13.20"),
    ],
)
def test_the_name_of_a_crash(host, name):
    assert crash_name(host, 1_700_000_000) == name


@pytest.mark.parametrize("text", ["", "a\0b", "a\nb"])
def test_no_target(text):
    with pytest.raises(UsageError, match="no target"):
        parse_target(text)
