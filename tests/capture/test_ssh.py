"""The ssh target against a real sshd on the loopback address."""

import shutil
import subprocess
import time

import pytest

from crashkernel.errors import UsageError
from crashkernel.target import LOG, NoTargetLeft, TargetOptions, parse_target, save
from crashkernel.target.encryption import Encryption
from crashkernel.target.manifest import manifest_name
from support.dumps import claims, contents, dump_bytes, flattened, is_whole, writer
from support.sshd import SSHD, free_port, sshd

pytestmark = [
    pytest.mark.capture,
    pytest.mark.skipif(SSHD is None or shutil.which("ssh") is None, reason="sshd is not installed"),
]

SIZE = 3_000_000
CRASH = "host-2026-11-25-01.02.03"
FILES = {LOG: b"Kernel panic - not syncing\n"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


def options(server, **changes):
    return TargetOptions(ssh_identity=server.identity, ssh_config=server.config, **changes)


def names(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def test_brings_the_stream_the_log_and_the_manifest(server, tmp_path):
    saved = save(writer(SIZE), [parse_target(server.url(tmp_path), options(server))], CRASH, files=FILES)
    directory = tmp_path / CRASH
    assert names(tmp_path) == {f"{CRASH}/{name}" for name in ("vmcore.flat", manifest_name("vmcore.flat"), LOG)}
    assert (directory / LOG).read_bytes() == FILES[LOG]
    assert is_whole(directory / "vmcore.flat", flattened(dump_bytes(SIZE)))
    assert saved.place == f"ssh {server.user}@127.0.0.1:{server.port}:{directory}/vmcore.flat"
    assert saved.manifest.contents == contents("flattened")
    assert directory.stat().st_mode & 0o077 == 0
    assert (directory / "vmcore.flat").stat().st_mode & 0o077 == 0


def test_two_of_one_name_do_not_mix(server, tmp_path):
    directory = tmp_path / 'it\'s a "directory" $HOME'
    directory.mkdir()
    url = server.url(str(directory).replace("$", "%24").replace(" ", "%20").replace('"', "%22"))
    for seed in range(2):
        save(writer(SIZE, seed), [parse_target(url, options(server))], CRASH, files=FILES)
    found = claims(directory)
    assert [path.parent.name for path in found] == [CRASH, CRASH + "-1"]
    assert all(is_whole(path, flattened(dump_bytes(SIZE, seed))) for seed, path in enumerate(found))


@pytest.mark.skipif(shutil.which("age") is None, reason="age is not installed")
def test_encrypted_on_the_way(server, tmp_path):
    identity = tmp_path / "identity"
    made = subprocess.run(["age-keygen", "-o", identity], check=True, capture_output=True, text=True)
    to = Encryption.to(made.stderr.split()[-1])
    (tmp_path / "dumps").mkdir()
    save(writer(SIZE), [parse_target(server.url(tmp_path / "dumps"), options(server, encryption=to))], CRASH, files=FILES)
    (dump,) = claims(tmp_path / "dumps")
    assert dump.name == "vmcore.flat.age"
    opened = subprocess.run(["age", "--decrypt", "-i", identity, dump], check=True, capture_output=True).stdout
    assert opened == flattened(dump_bytes(SIZE))
    assert (dump.parent / (LOG + ".age")).exists()


def test_says_why_it_does_not_come_through(server, tmp_path):
    for target, says in (
        (parse_target(server.url(tmp_path / "missing"), options(server)), "missing"),
        (parse_target(server.url(tmp_path, free_port()), options(server)), "Connection refused"),
        (parse_target(server.url(tmp_path), TargetOptions(ssh_config=server.config)), "Permission denied"),
        (parse_target(server.url(tmp_path), TargetOptions(ssh_config=tmp_path / "none")), "none"),
    ):
        with pytest.raises(NoTargetLeft, match=says):
            save(writer(SIZE), [target], CRASH, files=FILES)
    assert not names(tmp_path)


def test_a_host_that_nobody_vouches_for_gets_nothing(server, tmp_path):
    strange = tmp_path / "config"
    strange.write_text(f"UserKnownHostsFile {tmp_path}/known\nGlobalKnownHostsFile none\n")
    target = parse_target(server.url(tmp_path), TargetOptions(ssh_identity=server.identity, ssh_config=strange))
    with pytest.raises(NoTargetLeft, match="ost key verification failed"):
        save(writer(SIZE), [target], CRASH, files=FILES)


def test_bytes_that_change_at_the_other_end_are_noticed(server, tmp_path):
    def flip(number):
        if number == 20:  # most have arrived
            path = tmp_path / CRASH / "vmcore.incomplete"
            deadline = time.monotonic() + 20
            while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.01)
            with path.open("r+b") as file:
                first = file.read(1)
                file.seek(0)
                file.write(bytes([first[0] ^ 1]))

    with pytest.raises(NoTargetLeft, match="what arrived is not what was sent"):
        save(writer(SIZE, before=flip), [parse_target(server.url(tmp_path), options(server))], CRASH)
    assert not claims(tmp_path)
    assert f"{CRASH}/vmcore.incomplete" in names(tmp_path)


def test_a_name_that_is_taken_meanwhile_is_not_replaced(server, tmp_path):
    def take(number):
        if number == 20:
            (tmp_path / CRASH / "vmcore.flat").write_text("precious")

    with pytest.raises(NoTargetLeft, match="the name exists by now"):
        save(writer(SIZE, before=take), [parse_target(server.url(tmp_path), options(server))], CRASH)
    assert (tmp_path / CRASH / "vmcore.flat").read_text() == "precious"


@pytest.mark.parametrize(
    "url",
    [
        "ssh://",
        "ssh:///dir",
        "ssh://-oProxyCommand=x/dir",
        "ssh://-x@host/dir",
        "ssh://h:99999/d",
        "ssh://h/d?x",
        "ssh://h/%0a",
    ],
)
def test_no_target(url):
    with pytest.raises(UsageError, match="no target"):
        parse_target(url)


def test_no_password_on_a_command_line():
    with pytest.raises(UsageError, match="password"):
        parse_target("ssh://me:secret@host/dir")
