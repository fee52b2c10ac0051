"""Whatever happens and whenever: no dump that claims to be whole and is not."""

import contextlib
import random
import shutil
import threading
import time
from pathlib import Path

import pytest

from crashkernel.errors import FormatError
from crashkernel.target import LOG, NoTargetLeft, TargetOptions, parse_target, save
from crashkernel.target.device import DeviceTarget, open_device_dump
from crashkernel.target.manifest import PIECE_SIZE, Manifest, PieceHasher, digest_file, manifest_name
from crashkernel.target.uploads import Uploads
from support.dumps import claims, contents, dump_bytes, flattened, is_whole, writer
from support.faults import Killer, Proxy, SmallDisk
from support.receiving import ReceiverProcess
from support.sshd import SSHD, sshd

pytestmark = pytest.mark.capture

CRASH = "host-2026-11-25-01.02.03"
FILES = {LOG: b"Kernel panic - not syncing\n"}
SMALL = 400_000
LARGE = 2 * PIECE_SIZE + 300_000


def points(count: int, total: int, seed: str) -> list[int]:
    """`count` numbers from 1 to `total`: half of them random, half evenly over the last fifth, where names are given."""
    dice = random.Random(seed)
    late = range(total - total // 5, total)
    half = count // 2
    return [late[number * len(late) // half] for number in range(half)] + [dice.randint(1, total) for _ in range(count - half)]


def checked(directory: Path, *expected: bytes) -> int:
    """How many dumps claim to be whole; all of them are."""
    found = claims(directory)
    for path in found:
        assert is_whole(path, *expected), path
    return len(found)


# -- killed


def test_killed_while_it_writes_a_file(tmp_path):
    def capture():
        save(writer(SMALL), [parse_target(str(directory))], CRASH, files=FILES)

    directory = tmp_path / "undisturbed"
    directory.mkdir()
    killer = Killer(capture, of_forked=True)
    total = killer.count()
    assert checked(directory, dump_bytes(SMALL)) == 1
    killed, whole, left = 0, 0, set()
    for number, point in enumerate(points(130, total, "file")):
        directory = tmp_path / str(number)
        directory.mkdir()
        killed += killer.kill_at(point)
        whole += checked(directory, dump_bytes(SMALL))
        left |= {path.name for path in directory.rglob("*") if path.is_file()}
        shutil.rmtree(directory)
    assert killed > 120
    assert 0 < whole < 130  # some were killed after it had its name, most before
    assert left >= {LOG, "vmcore", manifest_name("vmcore"), "vmcore.incomplete", manifest_name("vmcore") + ".incomplete"}


def test_killed_while_it_writes_a_device(tmp_path):
    device = tmp_path / "device"

    def capture():
        save(writer(SMALL, seed=1), [DeviceTarget(str(device))], CRASH)

    with device.open("wb") as file:
        file.truncate(3 << 20)
    killer = Killer(capture, of_forked=True)
    save(writer(SMALL), [DeviceTarget(str(device))], CRASH, files=FILES)
    before = device.read_bytes()
    total = killer.count()
    outcomes = set()
    for point in points(70, total, "device"):
        device.write_bytes(before)
        killer.kill_at(point)
        try:
            file_offset, size, manifest = open_device_dump(device)
        except FormatError as error:
            outcomes.add("incomplete" if "incomplete" in str(error) else "damaged head")
            continue
        seed = manifest.contents.pages.kept
        assert device.read_bytes()[file_offset : file_offset + size] == dump_bytes(SMALL, seed)
        outcomes.add(f"whole dump {seed}")
    assert outcomes >= {"whole dump 0", "incomplete", "whole dump 1"}


def sent(stream: bytes) -> Manifest:
    hasher = PieceHasher()
    hasher.update(stream)
    return Manifest("vmcore.flat", len(stream), hasher.digest(), contents("flattened"))


def test_a_receiver_killed_at_any_moment_goes_on(tmp_path):
    stream = flattened(dump_bytes(LARGE))
    manifest = sent(stream)
    identity = "ab" * 16

    def receive():
        uploads = Uploads(directory)
        upload = uploads.begin(identity, CRASH)
        uploads.put_file(upload, LOG, FILES[LOG])
        while not upload.saved and upload.received < len(stream):
            uploads.put_piece(upload, upload.received, stream[upload.received : upload.received + PIECE_SIZE])
        uploads.finish(upload, manifest)
        uploads.close()

    directory = tmp_path / "undisturbed"
    directory.mkdir()
    killer = Killer(receive, of_forked=False)
    total = killer.count()
    whole = 0
    for number, point in enumerate(points(50, total, "receiver")):
        directory = tmp_path / str(number)
        directory.mkdir()
        killer.kill_at(point)
        whole += checked(directory, dump_bytes(LARGE))
        receive()
        assert checked(directory, dump_bytes(LARGE)) == 1
        names = {path.name for path in claims(directory)[0].parent.iterdir()}
        assert {name for name in names if "incomplete" not in name} == {LOG, "vmcore", manifest_name("vmcore")}
        shutil.rmtree(directory)
    assert 0 < whole < 50


# -- the disk is full


@pytest.fixture
def disk(tmp_path):
    small = SmallDisk(tmp_path / "disk")
    yield small
    small.close()


def test_the_disk_is_full(tmp_path, disk):
    dice = random.Random("full")
    (tmp_path / "second").mkdir()
    saved = 0
    reasons = []
    for number in range(40):
        size = dice.randint(8192, SMALL + 60_000)
        directory = disk.directory / str(number)
        with disk.of(size):
            directory.mkdir()
            try:
                save(writer(SMALL), [parse_target(str(directory))], CRASH, files=FILES)
                saved += 1
                assert checked(directory, dump_bytes(SMALL)) == 1
            except NoTargetLeft as error:
                reasons.append(error.message)
                assert checked(directory) == 0
        shutil.rmtree(directory)
    assert saved
    assert len(reasons) > 20
    assert all("No space left on device" in reason or "File too large" in reason for reason in reasons)
    with disk.of(SMALL // 2):
        targets = [parse_target(str(disk.directory)), parse_target(str(tmp_path / "second"))]
        if disk.mounted:
            save(writer(SMALL), targets, CRASH, files=FILES)
            assert checked(tmp_path / "second", dump_bytes(SMALL)) == 1
            assert not list(disk.directory.rglob("*.incomplete"))
    assert checked(disk.directory) == 0


def test_a_receivers_disk_is_full_and_gets_room(disk):
    stream = flattened(dump_bytes(LARGE))
    dice = random.Random("507")
    full = 0
    for number in range(10):
        with disk.of(dice.randint(1 << 20, LARGE)):
            uploads = Uploads(disk.directory)
            with contextlib.suppress(OSError):
                upload = uploads.begin(f"{number:032x}", CRASH)
                for at in range(0, len(stream), PIECE_SIZE):
                    uploads.put_piece(upload, at, stream[at : at + PIECE_SIZE])
                uploads.finish(upload, sent(stream))
            full += upload.saved is None
            uploads.close()
            assert checked(disk.directory, dump_bytes(LARGE)) == (upload.saved is not None)
        with disk.of(2 * LARGE):
            uploads = Uploads(disk.directory)
            upload = uploads.begin(f"{number:032x}", CRASH)
            for at in range(upload.received, len(stream), PIECE_SIZE):
                uploads.put_piece(upload, at, stream[at : at + PIECE_SIZE])
            uploads.finish(upload, sent(stream))
            uploads.close()
        assert checked(disk.directory, dump_bytes(LARGE)) == 1
        for path in disk.directory.iterdir():
            shutil.rmtree(path)
    assert full > 5


# -- the connection is cut


@pytest.fixture(scope="module")
def receiver(tmp_path_factory):
    directory = tmp_path_factory.mktemp("receiver")
    (directory / "store").mkdir()
    process = ReceiverProcess(directory / "store", directory / "token")
    process.store, process.token_file = directory / "store", directory / "token"
    yield process
    assert process.stop()[0] == 0


def test_cut_and_resumed(receiver):
    dice = random.Random("cut")
    cuts = 0
    for number in range(25):
        budgets = [dice.randint(1, LARGE) for _ in range(dice.randint(1, 4))]
        with Proxy(receiver.port, budgets, then_dead=False) as proxy:
            target = parse_target(f"http://127.0.0.1:{proxy.port}/cut{number}", TargetOptions(token_file=receiver.token_file))
            save(writer(LARGE, number), [target], CRASH, files=FILES)
            cuts += proxy.cuts
        place = receiver.store / f"cut{number}"
        assert checked(place, dump_bytes(LARGE, number)) == 1
        assert {path.name for path in claims(place)[0].parent.iterdir()} == {LOG, "vmcore", manifest_name("vmcore")}
        shutil.rmtree(place)
    assert cuts >= 25


def test_cut_for_good(receiver, tmp_path):
    dice = random.Random("dead")
    for number in range(15):
        with Proxy(receiver.port, [dice.randint(1, LARGE)], then_dead=True) as proxy:
            options = TargetOptions(token_file=receiver.token_file, stall=0.2)
            target = parse_target(f"http://127.0.0.1:{proxy.port}/dead{number}", options)
            (tmp_path / str(number)).mkdir()
            saved = save(writer(LARGE), [target, parse_target(str(tmp_path / str(number)))], CRASH, files=FILES)
        assert saved.place == str(tmp_path / str(number) / CRASH / "vmcore")
        assert checked(tmp_path / str(number), dump_bytes(LARGE)) == 1
        assert checked(receiver.store) == 0


@pytest.mark.skipif(SSHD is None, reason="sshd is not installed")
def test_ssh_cut(tmp_path):
    dice = random.Random("ssh")
    cut = 0
    (tmp_path / "sshd").mkdir()
    with sshd(tmp_path / "sshd") as server:
        options = TargetOptions(ssh_identity=server.identity, ssh_config=server.config)
        for number in range(10):
            directory = tmp_path / str(number)
            directory.mkdir()
            sessions = 4  # begin, log, dump, names
            budgets = [-1] * dice.randint(0, sessions) + [dice.randint(1, SMALL)]
            with Proxy(server.port, [budget if budget > 0 else 1 << 40 for budget in budgets], then_dead=False) as proxy:
                with contextlib.suppress(NoTargetLeft):
                    save(writer(SMALL), [parse_target(server.url(directory, proxy.port), options)], CRASH, files=FILES)
                cut += proxy.cuts
            checked(directory, flattened(dump_bytes(SMALL)))
    assert cut >= 4


# -- the receiver is killed, again and again


def test_a_receiver_that_is_killed_again_and_again(tmp_path):
    (tmp_path / "store").mkdir()
    process = ReceiverProcess(tmp_path / "store", tmp_path / "token")
    options = TargetOptions(token_file=tmp_path / "token", stall=30)
    target = parse_target(f"http://127.0.0.1:{process.port}/", options)
    size = 8 * PIECE_SIZE
    slow = writer(size, before=lambda _: time.sleep(0.004))
    stored = []
    sending = threading.Thread(target=lambda: stored.append(save(slow, [target], CRASH, files=FILES)))
    sending.start()
    dice = random.Random("restart")
    restarts = 0
    while sending.is_alive() and restarts < 12:
        time.sleep(dice.random() / 4)
        process.kill()
        checked(tmp_path / "store", dump_bytes(size))
        process = ReceiverProcess(tmp_path / "store", tmp_path / "token", process.port)
        restarts += 1
    sending.join(60)
    assert stored
    assert restarts >= 3
    assert checked(tmp_path / "store", dump_bytes(size)) == 1
    process.stop()


# -- two of one name


def test_two_captures_to_one_file(tmp_path):
    for number in range(20):
        path = tmp_path / f"{number}" / "vmcore"
        path.parent.mkdir()
        errors = []

        def capture(seed, path=path, errors=errors):
            try:
                save(writer(SMALL, seed), [parse_target(str(path))], CRASH, files=FILES)
            except NoTargetLeft as error:
                errors.append(error)

        both = [threading.Thread(target=capture, args=(seed,)) for seed in (1, 2)]
        for each in both:
            each.start()
        for each in both:
            each.join()
        assert len(errors) == 1
        assert checked(path.parent, dump_bytes(SMALL, 1), dump_bytes(SMALL, 2)) == 1


def test_two_senders_of_one_name_whose_connections_are_cut(receiver):
    dice = random.Random("two")
    for number in range(3):
        with contextlib.ExitStack() as stack:
            threads = []
            for seed in (1, 2):
                proxy = stack.enter_context(Proxy(receiver.port, [dice.randint(1, LARGE) for _ in range(3)], then_dead=False))
                url = f"http://127.0.0.1:{proxy.port}/two{number}"
                target = parse_target(url, TargetOptions(token_file=receiver.token_file))
                threads.append(
                    threading.Thread(target=save, args=(writer(LARGE, seed), [target], CRASH), kwargs={"files": FILES})
                )
            for each in threads:
                each.start()
            for each in threads:
                each.join()
        place = receiver.store / f"two{number}"
        found = claims(place)
        assert {path.read_bytes() for path in found} == {dump_bytes(LARGE, 1), dump_bytes(LARGE, 2)}
        assert len(found) == checked(place, dump_bytes(LARGE, 1), dump_bytes(LARGE, 2)) == 2
        shutil.rmtree(place)


# -- bits flip in what is finished


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        value = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([value ^ 1 << bit % 8]))


def test_no_flipped_bit_is_missed(tmp_path):
    save(writer(SMALL), [parse_target(str(tmp_path))], CRASH, files=FILES)
    (dump,) = claims(tmp_path)
    beside = dump.with_name(manifest_name(dump.name))
    manifest = Manifest.from_json(beside.read_bytes())
    dice = random.Random("flip")
    for _ in range(200):
        bit = dice.randrange(8 * SMALL)
        flip(dump, bit)
        with dump.open("rb") as file:
            assert digest_file(file.fileno(), SMALL, workers=1) != manifest.digest
        flip(dump, bit)
    size = beside.stat().st_size
    for _ in range(200):
        bit = dice.randrange(8 * size)
        flip(beside, bit)
        with contextlib.suppress(FormatError):
            assert Manifest.from_json(beside.read_bytes()) == manifest  # white space, or a digit's case in the same number
        flip(beside, bit)
    assert checked(tmp_path, dump_bytes(SMALL)) == 1


def test_no_flipped_bit_of_a_device_is_missed(tmp_path):
    device = tmp_path / "device"
    device.write_bytes(bytes(3 << 20))
    save(writer(SMALL), [DeviceTarget(str(device))], CRASH, files=FILES)
    file_offset, size, manifest = open_device_dump(device)
    parts = {
        "head": range(0x48),
        "manifest": range(0x1000, 0x1000 + len(manifest.to_json())),
        "log": range(0x10000, 0x10000 + len(FILES[LOG])),
        "dump": range(file_offset, file_offset + size),
    }
    dice = random.Random("device")
    for part, where in parts.items():
        for _ in range(50):
            bit = 8 * dice.choice(where) + dice.randrange(8)
            flip(device, bit)
            if part == "dump":
                with device.open("rb") as file:
                    assert digest_file(file.fileno(), size, start=file_offset, workers=1) != manifest.digest
            else:
                with pytest.raises(FormatError):
                    open_device_dump(device)
            flip(device, bit)
    assert open_device_dump(device) == (file_offset, size, manifest)
