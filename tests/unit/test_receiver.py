import base64
import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from crashkernel.cli import main
from crashkernel.errors import EnvironmentFault, UsageError
from crashkernel.formats.flattened import END, HEADER, record_header
from crashkernel.target import LOG, NoTargetLeft, TargetOptions, parse_target, save
from crashkernel.target.manifest import PIECE_SIZE, Digest, Manifest, PieceHasher, manifest_name
from crashkernel.target.receiver import Receiver
from crashkernel.target.uploads import JOURNALS, Uploads
from support.dumps import RECORD, claims, contents, dump_bytes, flattened, is_whole, writer
from support.receiving import TOKEN, ReceiverProcess

CRASH = "host-2026-11-25-01.02.03"
FILES = {LOG: b"Kernel panic - not syncing\n"}
SIZE = 2 * PIECE_SIZE + 300_000
ID = "0123456789abcdef" * 2


@contextlib.contextmanager
def receiving(directory: Path, port: int = 0, **options):
    lines = []
    receiver = Receiver(directory, ("127.0.0.1", port), TOKEN, log=lines.append, **{"idle": 5.0, **options})
    serving = threading.Thread(target=receiver.serve, daemon=True)
    serving.start()
    try:
        yield receiver, lines
    finally:
        receiver.stop()
        receiver.close()
        serving.join()


@pytest.fixture
def store(tmp_path):
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def options(tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    return TargetOptions(token_file=tmp_path / "token", stall=3.0)


def url(receiver: Receiver, prefix: str = "", scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{receiver.address[1]}/{prefix}"


def names(directory: Path) -> set[str]:
    return {
        str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir() and JOURNALS not in path.parts
    }


class Sender:
    """The protocol by hand."""

    def __init__(self, receiver: Receiver, token: str = TOKEN) -> None:
        self.connection = http.client.HTTPConnection(*receiver.address, timeout=10)
        self.token = token

    def put(self, path: str, body: bytes = b"", **changes: str) -> tuple[int, dict]:
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Digest": f"sha-256=:{digest}:"}
        headers |= {name.replace("_", "-"): value for name, value in changes.items()}
        self.connection.request("PUT", path, body=body, headers=headers)
        response = self.connection.getresponse()
        answer = json.loads(response.read())
        if response.will_close:
            self.connection.close()
        return response.status, answer

    def begin(self, path: str = CRASH, identity: str = ID) -> tuple[int, dict]:
        return self.put(f"/uploads/{identity}", json.dumps({"path": path}).encode())

    def pieces(self, stream: bytes, identity: str = ID, start: int = 0) -> None:
        for at in range(start, len(stream), PIECE_SIZE):
            piece = stream[at : at + PIECE_SIZE]
            assert self.put(f"/uploads/{identity}/dump/{at}", piece) == (200, {"received": at + len(piece)})

    def finish(self, stream: bytes, identity: str = ID, **changes) -> tuple[int, dict]:
        return self.put(f"/uploads/{identity}/manifest", sent(stream, **changes).to_json().encode())


def sent(stream: bytes, **changes) -> Manifest:
    hasher = PieceHasher()
    hasher.update(stream)
    fields = {"file": "vmcore.flat", "size": len(stream), "digest": hasher.digest(), "contents": contents("flattened")}
    return Manifest(**{**fields, **changes})


STREAM = flattened(dump_bytes(SIZE))
SHORT = flattened(dump_bytes(200_000))


# -- a whole capture


def test_a_dump_arrives_and_is_unpacked(store, options):
    with receiving(store) as (receiver, lines):
        saved = save(writer(SIZE), [parse_target(url(receiver, "lab"), options)], CRASH, files=FILES)
    assert names(store) == {f"lab/{CRASH}/{name}" for name in ("vmcore", manifest_name("vmcore"), LOG)}
    directory = store / "lab" / CRASH
    assert (directory / LOG).read_bytes() == FILES[LOG]
    assert is_whole(directory / "vmcore", dump_bytes(SIZE))
    assert saved.manifest == Manifest.from_json((directory / manifest_name("vmcore")).read_text())
    assert saved.manifest.contents == contents()
    assert saved.place == url(receiver, f"lab/{CRASH}/vmcore")
    assert lines == [f"127.0.0.1: saved lab/{CRASH}/vmcore, 8.3 MiB, of 6.1.0 ppc64le: Kernel panic"]
    assert (directory / "vmcore").stat().st_mode & 0o077 == 0


def test_many_at_once_by_one_name_do_not_mix(store, options):
    with receiving(store) as (receiver, _):
        senders = [
            threading.Thread(
                target=save, args=(writer(SIZE, seed), [parse_target(url(receiver), options)], CRASH), kwargs={"files": FILES}
            )
            for seed in range(6)
        ]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
    found = claims(store)
    assert [path.parent.name for path in found] == [CRASH, *(f"{CRASH}-{number}" for number in range(1, 6))]
    assert {path.read_bytes() for path in found} == {dump_bytes(SIZE, seed) for seed in range(6)}
    assert all(is_whole(path, path.read_bytes()) for path in found)


def certificate(directory: Path) -> Path:
    """A certificate for 127.0.0.1 that signs itself, with its key in the same file."""
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=receiver "
        "-addext subjectAltName=IP:127.0.0.1 -keyout - -out -"
    )
    made = subprocess.run(command.split(), check=True, capture_output=True)
    path = directory / "both.pem"
    path.write_bytes(made.stdout)
    return path


def test_by_https_from_whom_it_trusts(store, options, tmp_path):
    pem = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    trusting = TargetOptions(token_file=options.token_file, ca_file=pem, stall=1.0)
    with receiving(store, tls=context) as (receiver, _):
        where = url(receiver, scheme="https")
        save(writer(SIZE), [parse_target(where, trusting)], CRASH, files=FILES)
        assert is_whole(store / CRASH / "vmcore", dump_bytes(SIZE))
        with pytest.raises(NoTargetLeft, match="certificate is not to be trusted"):
            save(writer(SIZE), [parse_target(where, options)], CRASH)
        with pytest.raises(NoTargetLeft, match="http://"):
            save(writer(SIZE), [parse_target(url(receiver), trusting)], CRASH)
    assert len(claims(store)) == 1


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_handshake_that_fails_leaves_nothing_open(store, tmp_path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path))
    with receiving(store, tls=context) as (receiver, _):
        before = descriptors()
        for _ in range(20):
            raw(receiver, b"PUT / HTTP/1.1\r\n\r\n")  # sees the end of the connection, or times out
        deadline = time.monotonic() + 5
        while descriptors() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert descriptors() <= before


def test_a_receiver_that_is_not_there_is_given_up(options):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        target = parse_target(
            f"http://127.0.0.1:{nobody.getsockname()[1]}/", TargetOptions(token_file=options.token_file, stall=1)
        )
        with pytest.raises(NoTargetLeft, match="Connection refused"):
            save(writer(SIZE), [target], CRASH)


def test_a_wrong_token_is_told_at_once(store, options):
    options.token_file.write_text("x" * 32)
    with receiving(store) as (receiver, lines), pytest.raises(NoTargetLeft, match="the token is not the receiver's"):
        save(writer(SIZE), [parse_target(url(receiver), options)], CRASH)
    assert lines == ["127.0.0.1: 401: the token is not the receiver's"]
    assert not names(store)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_goes_on_after_a_restart_of_the_receiver(store, options, number):
    receiver = ReceiverProcess(store, options.token_file)
    target = parse_target(f"http://127.0.0.1:{receiver.port}/", TargetOptions(token_file=options.token_file, stall=60))
    middle, reached = os.pipe()

    def before(record):
        if record == (PIECE_SIZE + 1_000_000) // RECORD:
            os.write(reached, b"x")
            time.sleep(0.1)

    def restart():
        nonlocal receiver
        os.read(middle, 1)
        status, _ = receiver.stop(number)
        assert status in (0, -signal.SIGKILL)
        receiver = ReceiverProcess(store, options.token_file, receiver.port)

    restarting = threading.Thread(target=restart)
    restarting.start()
    save(writer(SIZE, before=before), [target], CRASH, files=FILES)
    restarting.join()
    status, output = receiver.stop()
    assert status == 0
    assert f"saved {CRASH}/vmcore, 8.3 MiB, of 6.1.0 ppc64le: Kernel panic" in output
    assert names(store) == {f"{CRASH}/{name}" for name in ("vmcore", manifest_name("vmcore"), LOG)}
    assert is_whole(store / CRASH / "vmcore", dump_bytes(SIZE))
    os.close(middle)
    os.close(reached)


# -- the protocol


def test_every_request_may_be_repeated(store):
    with receiving(store) as (receiver, lines):
        sender = Sender(receiver)
        for _ in range(2):
            assert sender.begin() == (201, {"path": CRASH, "received": 0})
            assert sender.put(f"/uploads/{ID}/files/{LOG}", b"log") == (201, {})
        for at in range(0, len(STREAM), PIECE_SIZE):
            piece = STREAM[at : at + PIECE_SIZE]
            for _ in range(2):
                assert sender.put(f"/uploads/{ID}/dump/{at}", piece) == (200, {"received": at + len(piece)})
        assert sender.begin() == (201, {"path": CRASH, "received": len(STREAM)})
        answers = [sender.finish(STREAM) for _ in range(2)]
        assert answers[0] == answers[1]
        assert answers[0][1]["saved"] == f"{CRASH}/vmcore"
        assert len(lines) == 1
    assert is_whole(store / CRASH / "vmcore", dump_bytes(SIZE))
    assert names(store) == {f"{CRASH}/{name}" for name in ("vmcore", manifest_name("vmcore"), LOG)}


def test_a_new_receiver_knows_what_the_old_one_had(store):
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        sender.begin()
        sender.pieces(STREAM[:PIECE_SIZE])
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        assert sender.begin() == (201, {"path": CRASH, "received": PIECE_SIZE})
        sender.pieces(STREAM, start=PIECE_SIZE)
    with receiving(store) as (receiver, _):
        assert Sender(receiver).finish(STREAM)[0] == 201
    with receiving(store) as (receiver, _):
        assert Sender(receiver).finish(STREAM)[0] == 201
    assert is_whole(store / CRASH / "vmcore", dump_bytes(SIZE))


@pytest.mark.parametrize("left", ["named", "only the manifest"])
def test_a_receiver_killed_while_it_gave_the_name_finishes(store, left):
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        sender.begin()
        sender.pieces(SHORT)
        journal = (store / JOURNALS / ID).read_bytes()
        sender.finish(SHORT)
    (store / JOURNALS / ID).write_bytes(journal)  # as if it had been killed before the last line
    if left == "only the manifest":
        (store / CRASH / "vmcore").rename(store / CRASH / "vmcore.incomplete")
    with receiving(store) as (receiver, _):
        assert Sender(receiver).finish(SHORT)[0] == 201
    assert is_whole(store / CRASH / "vmcore", dump_bytes(200_000))


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_journal_cut_by_a_power_failure_loses_only_its_last_line(store, cut):
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        sender.begin()
        sender.pieces(STREAM[: 2 * PIECE_SIZE])
    journal = store / JOURNALS / ID
    journal.write_bytes(journal.read_bytes()[:-cut])
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        assert sender.begin() == (201, {"path": CRASH, "received": PIECE_SIZE})
        sender.pieces(STREAM, start=PIECE_SIZE)
        assert sender.finish(STREAM)[0] == 201
    assert is_whole(store / CRASH / "vmcore", dump_bytes(SIZE))


@pytest.mark.parametrize("part", [b"0123 {", b"x" * 2000])
def test_a_line_that_a_full_disk_left_in_part_is_overwritten(store, part):
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        sender.begin()
        sender.pieces(STREAM[:PIECE_SIZE])
        with (store / JOURNALS / ID).open("ab") as journal:
            journal.write(part)
        sender.pieces(STREAM, start=PIECE_SIZE)
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        assert sender.begin() == (201, {"path": CRASH, "received": len(STREAM)})
        assert sender.finish(STREAM)[0] == 201
    assert is_whole(store / CRASH / "vmcore", dump_bytes(SIZE))


def test_pieces_come_in_order_and_only_once(store):
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        sender.begin()
        first, second = STREAM[:PIECE_SIZE], STREAM[PIECE_SIZE : 2 * PIECE_SIZE]
        assert sender.put(f"/uploads/{ID}/dump/{PIECE_SIZE}", second)[0] == 409
        assert sender.put(f"/uploads/{ID}/dump/0", first) == (200, {"received": PIECE_SIZE})
        status, answer = sender.put(f"/uploads/{ID}/dump/0", second)
        assert (status, answer["received"]) == (409, PIECE_SIZE)
        assert sender.put(f"/uploads/{ID}/dump/5", first)[0] == 409
        sender.pieces(STREAM[: PIECE_SIZE + 100], start=PIECE_SIZE)
        assert sender.put(f"/uploads/{ID}/dump/{PIECE_SIZE + 100}", b"more")[0] == 409
        assert sender.put(f"/uploads/{ID}/dump/0", b"")[0] == 409
    assert names(store) == {f"{CRASH}/vmcore.incomplete"}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"digest": Digest("00" * 32)}, 422),
        ({"size": 5}, 422),
        ({"file": "vmcore"}, 422),
        ({"file": "vmcore.flat.age"}, 422),
        ({"file": "x"}, 422),
    ],
)
def test_what_does_not_match_its_manifest_gets_no_name(store, changes, status):
    with receiving(store) as (receiver, lines):
        sender = Sender(receiver)
        sender.begin()
        sender.pieces(SHORT)
        assert sender.finish(SHORT, **changes)[0] == status
        assert not claims(store)
        assert lines[0].startswith("127.0.0.1: 422: ")
        assert sender.finish(SHORT)[0] == 201  # nothing is lost by it
    assert is_whole(store / CRASH / "vmcore", dump_bytes(200_000))


def lose_the_end(path: Path) -> None:
    os.truncate(path, 5_000)


def lose_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"\0\0\0\0", 70_000)


def fill_a_hole(path: Path) -> None:
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"x", 150_000)


@pytest.mark.parametrize("damage", [lose_the_end, lose_a_byte, fill_a_hole])
@pytest.mark.parametrize("restarted", [False, True])
def test_what_the_disk_does_not_give_back_is_not_signed(store, damage, restarted):
    stream = bytearray(flattened(dump_bytes(150_000))[: -len(END)])
    stream += record_header(150_100, 50_000) + dump_bytes(50_000) + END
    dump = dump_bytes(150_000) + bytes(100) + dump_bytes(50_000)
    with contextlib.ExitStack() as stack:
        receiver, _ = stack.enter_context(receiving(store))
        sender = Sender(receiver)
        sender.begin()
        sender.pieces(bytes(stream))
        if restarted:
            stack.close()
            receiver, _ = stack.enter_context(receiving(store))
            sender = Sender(receiver)
        scratch = store / CRASH / "vmcore.incomplete"
        damage(scratch)
        assert sender.finish(stream)[0] == 500
        assert not claims(store)
        scratch.write_bytes(dump)
        assert sender.finish(stream)[0] == 201
    assert is_whole(store / CRASH / "vmcore", dump)


def test_a_stream_of_crumbs_is_refused(store):
    stream = HEADER + b"".join(record_header(2 * at, 1) + b"x" for at in range(20_000))
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        sender.begin()
        status, answer = sender.put(f"/uploads/{ID}/dump/0", stream)
    assert status == 422
    assert "crumbs" in answer["error"]


def test_of_two_records_for_the_same_bytes_the_later_counts(store):
    stream = flattened(dump_bytes(150_000))[: -len(END)] + record_header(0, 4) + b"KDMP" + END
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        sender.begin()
        sender.pieces(stream)
        assert sender.finish(stream)[0] == 201
    assert is_whole(store / CRASH / "vmcore", b"KDMP" + dump_bytes(150_000)[4:])


def test_a_name_from_before_is_taken_for_the_bytes_that_it_was_given_for(store):
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        sender.begin()
        sender.pieces(SHORT)
        journal = (store / JOURNALS / ID).read_bytes()
        sender.finish(SHORT)
    (store / JOURNALS / ID).write_bytes(journal)  # as if it had been killed before the last line
    lose_a_byte(store / CRASH / "vmcore")
    with receiving(store) as (receiver, _):
        assert Sender(receiver).finish(SHORT)[0] == 500


def test_a_stream_without_its_end_gets_no_name(store):
    cut = SHORT[:-1]
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        sender.begin()
        sender.pieces(cut)
        assert sender.finish(cut)[0] == 422
    assert not claims(store)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_stream_that_is_not_flattened_is_kept_as_it_is(store, encrypted):
    stream = (b"age-encryption.org/v1" if encrypted else b"\x7fELF") + dump_bytes(PIECE_SIZE)
    changes = {"contents": contents("flattened" if encrypted else "elf"), "encrypted_to": "age1x" if encrypted else None}
    name = "vmcore.flat.age" if encrypted else "vmcore"
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        sender.begin()
        sender.pieces(stream)
        assert sender.finish(stream, file=name, **changes)[0] == 201
    assert is_whole(store / CRASH / name, stream)


def test_damage_on_the_way_is_refused_and_may_be_repaired(store):
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        sender.begin()
        wrong = "sha-256=:" + base64.b64encode(bytes(32)).decode() + ":"
        assert sender.put(f"/uploads/{ID}/dump/0", SHORT, Content_Digest=wrong)[0] == 400
        assert sender.put(f"/uploads/{ID}/files/{LOG}", b"log", Content_Digest=wrong)[0] == 400
        sender.pieces(SHORT)
        assert sender.finish(SHORT)[0] == 201
    assert names(store) == {f"{CRASH}/{name}" for name in ("vmcore", manifest_name("vmcore"))}


@pytest.mark.parametrize(
    "path",
    [
        "",
        "..",
        "../x",
        "a/../../x",
        "/etc/x",
        "a//b",
        "a/./b",
        ".crashkernel/x",
        "a/.hidden",
        "a\0b",
        "a\nb",
        "a\\b",
        "é",
        "a" * 101,
        "/".join("a" * 9),
        "~/x",
        "a b",
    ],
)
def test_a_path_leads_nowhere_else(store, path):
    with receiving(store) as (receiver, _):
        assert Sender(receiver).begin(path)[0] == 403
    assert not names(store)
    assert {path.name for path in store.iterdir()} == {JOURNALS}


def test_a_symbolic_link_leads_nowhere(store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (store / "link").symlink_to(tmp_path / "elsewhere")
    (store / "file").write_text("file")
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        assert sender.begin("link/x")[0] == 403
        assert sender.begin("file/x")[0] == 403
        assert sender.begin("link") == (201, {"path": "link-1", "received": 0})
        (store / "link-1" / "vmcore.incomplete").symlink_to(tmp_path / "token")
        assert sender.put(f"/uploads/{ID}/dump/0", STREAM[:PIECE_SIZE])[0] == 500
        (store / "link-1" / "vmcore.incomplete").unlink()
        (store / "link-1").rmdir()
        (store / "link-1").symlink_to(tmp_path / "elsewhere")
        assert sender.put(f"/uploads/{ID}/dump/0", STREAM[:PIECE_SIZE])[0] == 403
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["vmcore", "vmcore.flat", "vmcore.manifest.json", "..", "x", "vmcore-dmesg.txt.incomplete"])
def test_no_small_file_takes_a_dumps_name(store, name):
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        sender.begin()
        assert sender.put(f"/uploads/{ID}/files/{name}", b"data")[0] == 403
    assert not names(store)


def test_no_name_that_is_there_is_replaced(store):
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        sender.begin()
        sender.pieces(SHORT)
        (store / CRASH / "vmcore").write_text("precious")
        assert sender.finish(SHORT)[0] == 409
    assert (store / CRASH / "vmcore").read_text() == "precious"
    assert not (store / CRASH / manifest_name("vmcore")).exists()


def test_what_is_too_large_is_refused(store):
    with receiving(store, limit=1_000_000) as (receiver, lines):
        sender = Sender(receiver)
        sender.begin()
        assert sender.put(f"/uploads/{ID}/dump/0", STREAM[:PIECE_SIZE])[0] == 413
        assert sender.put(f"/uploads/{ID}/manifest", bytes(100_000))[0] == 413
        assert len(lines) == 2
        head = f"PUT /uploads/{ID}/dump/0 HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {PIECE_SIZE + 1}\r\n\r\n"
        assert b" 413 " in raw(receiver, head.encode()).partition(b"\r\n")[0]
    assert sum(path.stat().st_size for path in (store / CRASH).iterdir()) <= 1_000_000


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"/uploads/{'f' * 32}/dump/0", 404),
        ("/uploads/x", 400),
        ("/uploads/" + "F" * 32, 400),
        ("/uploads/../../etc/passwd", 404),
        (f"/uploads/{ID}/dump/-1", 404),
        (f"/uploads/{ID}/dump/1%30", 404),
        (f"/uploads/{ID}/dump/{'9' * 30}", 404),
        ("/", 404),
    ],
)
def test_nothing_else_is_there(store, path, status):
    with receiving(store) as (receiver, _):
        assert Sender(receiver).put(path, b'{"path": "x"}')[0] == status
    assert not names(store)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"path": 5}', b"[" * 60_000])
def test_an_upload_begins_with_a_path(store, body):
    with receiving(store) as (receiver, _):
        assert Sender(receiver).put(f"/uploads/{ID}", body)[0] == 400


def test_one_identity_is_one_upload(store):
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        assert sender.begin("a")[0] == 201
        assert sender.begin("b")[0] == 409


@pytest.mark.parametrize(
    "header", ["", "Bearer ", "Bearer wrong", "Basic " + TOKEN, TOKEN, f" {TOKEN}", "Bearer" + TOKEN, "Bearer \xff"]
)
def test_without_the_token_nothing_happens(store, header):
    with receiving(store) as (receiver, _):
        status, _ = Sender(receiver).put(f"/uploads/{ID}", b'{"path": "x"}', Authorization=header)
    assert status == 401
    assert {path.name for path in store.iterdir()} == {JOURNALS}


def raw(receiver: Receiver, data: bytes) -> bytes:
    """What it answers to bytes, until it closes the connection."""
    with socket.create_connection(receiver.address, timeout=10) as connection:
        connection.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while some := connection.recv(1 << 16):
                answer += some
        return answer


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"501"),
        (b"PUT / HTTP/1.1\r\nContent-Length: 1\r\n\r\nx", b"401"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"PUT /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"PUT / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"431"),
        (b"PUT / HTTP/1.1\r\nA: " + b"x" * 70_000 + b"\r\n\r\n", b"431"),
    ],
)
def test_what_is_no_request(store, data, status):
    with receiving(store, idle=1.0) as (receiver, _):
        assert status in raw(receiver, data).partition(b"\r\n")[0] or status in raw(receiver, data)[:300]


@pytest.mark.parametrize("length", ["Transfer-Encoding: chunked", "Content-Length: -1", "Content-Length: x", "A: b"])
def test_a_request_says_how_long_it_is(store, length):
    head = f"PUT /uploads/{ID} HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n{length}\r\n\r\n"
    with receiving(store, idle=1.0) as (receiver, _):
        assert b" 411 " in raw(receiver, head.encode()).partition(b"\r\n")[0]


def test_a_sender_that_dawdles_is_let_go(store):
    with receiving(store, idle=0.3) as (receiver, _):
        assert raw(receiver, b"PUT / HT") == b""
        assert (
            raw(receiver, f"PUT /uploads/{ID} HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 9\r\n\r\n".encode())
            == b""
        )
        with socket.create_connection(receiver.address, timeout=10) as connection, contextlib.suppress(ConnectionError):
            for _ in range(40):  # a byte now and then does not help
                connection.send(b"P")
                time.sleep(0.1)
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    if connection.recv(1) == b"":
                        break
                connection.setblocking(True)
            else:
                pytest.fail("it is still there")


def test_a_stranger_has_less_time_than_a_sender(store, monkeypatch):
    monkeypatch.setattr("crashkernel.target.receiver._STRANGER", 0.3)
    with receiving(store, idle=20.0) as (receiver, _):
        start = time.monotonic()
        assert raw(receiver, b"PUT / HT") == b""
        assert time.monotonic() - start < 5
        sender = Sender(receiver)
        sender.begin()
        kept = sender.connection.sock
        time.sleep(0.6)
        assert sender.begin()[0] == 201
        assert sender.connection.sock is kept


def test_a_stranger_takes_no_memory(store):
    head = f"PUT /uploads/{ID}/dump/0 HTTP/1.1\r\nAuthorization: Bearer wrong\r\nContent-Length: {PIECE_SIZE}\r\n\r\n"
    request = head.encode() + bytes(PIECE_SIZE)
    with receiving(store) as (receiver, _):
        tracemalloc.start()
        try:
            assert b" 401 " in raw(receiver, request).partition(b"\r\n")[0]
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < PIECE_SIZE // 4
        endless = b"PUT / HTTP/1.1\r\n" + (b"A: " + b"x" * 60_000 + b"\r\n") * 20
        assert raw(receiver, endless) == b""


def test_one_address_does_not_take_all_connections(store, monkeypatch):
    monkeypatch.setattr("crashkernel.target.receiver._MOST_OF_ONE_ADDRESS", 2)
    with receiving(store) as (receiver, _), contextlib.ExitStack() as stack:
        first, _ = (stack.enter_context(socket.create_connection(receiver.address, timeout=10)) for _ in range(2))
        with socket.create_connection(receiver.address, timeout=3) as third, contextlib.suppress(ConnectionError):
            assert third.recv(1) == b""
        first.close()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionError):
                assert Sender(receiver).begin()[0] == 201
                break
        else:
            pytest.fail("there is no room for a second connection")


def test_a_manifest_that_was_damaged_is_told(store):
    with receiving(store) as (receiver, lines):
        sender = Sender(receiver)
        sender.begin()
        sender.pieces(SHORT)
        assert sender.finish(SHORT)[0] == 201
        (store / CRASH / manifest_name("vmcore")).write_text("{")
        status, answer = sender.finish(SHORT)
    assert status == 500
    assert "no manifest of a dump" in answer["error"]
    assert lines[-1] == f"127.0.0.1: 500: {answer['error']}"


def test_a_journal_of_another_version_is_told(store):
    with receiving(store) as (receiver, lines):
        text = '{"asked":"x"}'
        (store / JOURNALS / ID).write_text(f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}\n")
        status, answer = Sender(receiver).begin()
    assert status == 500
    assert "journal is of another version" in answer["error"]
    assert len(lines) == 1


def test_a_bug_is_answered_and_logged(store, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("oops")

    with receiving(store) as (receiver, lines):
        monkeypatch.setattr(receiver.uploads, "begin", fail)
        assert Sender(receiver).begin() == (500, {"error": "a bug of ours: ZeroDivisionError: oops"})
        monkeypatch.setattr("crashkernel.target.receiver._Handler.handle", fail)
        assert raw(receiver, b"x") == b""
    assert lines == [
        "127.0.0.1: 500: a bug of ours: ZeroDivisionError: oops",
        "127.0.0.1: a bug of ours: ZeroDivisionError: oops",
    ]


def test_of_an_upload_that_is_saved_nothing_stays_in_memory(store):
    with receiving(store) as (receiver, _):
        sender = Sender(receiver)
        for number in range(3):
            identity = f"{number:032x}"
            sender.begin(f"crash{number}", identity)
            sender.pieces(SHORT, identity)
            assert len(receiver.uploads._uploads) == 1
            answers = [sender.finish(SHORT, identity) for _ in range(2)]
            assert answers[0] == answers[1]
            assert answers[0][0] == 201
            assert not receiver.uploads._uploads
    assert len(claims(store)) == 3


@pytest.mark.parametrize("how", ["dies", "ends"])
def test_a_server_that_ends_by_itself_is_no_success(store, tmp_path, capsys, monkeypatch, how):
    def serve(receiver):
        receiver._server.serve_forever = lambda *_, **__: None
        receiver._server.shutdown = lambda: None
        if how == "dies":
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(Receiver, "serve", serve)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    assert main(["receive", str(store), "--listen", "127.0.0.1:0", "--token-file", str(tmp_path / "token")]) == 70
    assert "the server ended, and nobody told it to" in capsys.readouterr().err
    Uploads(store).close()  # it let go of the directory


def test_a_directory_has_one_receiver(store):
    uploads = Uploads(store)
    with pytest.raises(EnvironmentFault, match="another receiver"):
        Uploads(store)
    uploads.close()
    Uploads(store).close()


def test_no_directory_no_receiver(tmp_path):
    with pytest.raises(EnvironmentFault, match="cannot receive into"):
        Uploads(tmp_path / "missing")
    (tmp_path / JOURNALS).symlink_to("/tmp")
    with pytest.raises(EnvironmentFault, match="is no directory to store into"):
        Uploads(tmp_path)


def test_an_address_that_is_taken(store, tmp_path):
    (tmp_path / "other").mkdir()
    with receiving(store) as (receiver, _), pytest.raises(EnvironmentFault, match="cannot listen on"):
        Receiver(tmp_path / "other", receiver.address, TOKEN)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read the token"),
        ("short", "16 characters"),
        ("two words of many letters", "one word"),
        ("é" * 20, "no ASCII"),
    ],
)
def test_a_token_is_a_secret_of_some_length(tmp_path, text, says):
    if text is not None:
        (tmp_path / "token").write_text(text)
    with pytest.raises(UsageError, match=says):
        parse_target("http://host/", TargetOptions(token_file=tmp_path / "token"))


@pytest.mark.parametrize("data", [None, b"", b"no certificate"])
def test_certificates_that_are_none(options, tmp_path, data):
    if data is not None:
        (tmp_path / "ca.pem").write_bytes(data)
    with pytest.raises(UsageError, match="cannot read the certificates"):
        parse_target("https://host/", TargetOptions(token_file=options.token_file, ca_file=tmp_path / "ca.pem"))


def test_a_capture_kernel_needs_no_tls(options):
    # nor OpenSSL's digests: what its initramfs has of Python is little
    script = (
        "import sys; sys.modules['_ssl'] = sys.modules['_hashlib'] = None\n"
        "from pathlib import Path\n"
        "from crashkernel.target import TargetOptions, parse_target\n"
        "from crashkernel.errors import EnvironmentFault\n"
        f"options = TargetOptions(token_file=Path({str(options.token_file)!r}))\n"
        "print(parse_target('http://host/', options).name)\n"
        "try: parse_target('https://host/', options)\n"
        "except EnvironmentFault as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "http://host/",
        "this Python has no TLS (its module _ssl and OpenSSL's libraries are missing)",
    ], done.stderr


def test_a_receiver_wants_a_token():
    with pytest.raises(UsageError, match="wants a token"):
        parse_target("http://host/")


@pytest.mark.parametrize(
    ("options", "mode", "says"),
    [
        ([], 0o644, "others may read"),
        (["--listen", "8790"], 0o600, "no address"),
        (["--listen", "host:port"], 0o600, "no address"),
        (["--listen", "host:99999"], 0o600, "no address"),
        (["--limit", "much"], 0o600, "a size is written like"),
        (["--tls-key", "key"], 0o600, "nothing without --tls-cert"),
        (["--tls-cert", "missing"], 0o600, "cannot use missing"),
    ],
)
def test_a_request_that_makes_no_sense(store, tmp_path, capsys, options, mode, says):
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(mode)
    assert main(["receive", str(store), "--token-file", str(tmp_path / "token"), *options]) == 2
    assert says in capsys.readouterr().err
