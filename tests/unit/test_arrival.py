"""How a dump of the drill comes to the host: what K2 is told, and what is taken off its disk, or from the receiver."""

import asyncio
import hashlib
import struct
import urllib.error
import urllib.request

import pytest

from crashkernel.drill.arrival import BLANK, LOG, MANIFEST, arrival, from_disk, from_receiver, whole_dumps
from crashkernel.drill.saving import Footprint, Saving
from crashkernel.errors import UsageError, VerificationError


def disk_of(dump=b"dump" * 1000, manifest=b'{"a": 1}', log=b"log", state=1, room=0):
    """A device as target/device.py describes it."""
    head = struct.pack(">16sIIQII", b"crashkernel dump", 1, state, len(dump), len(manifest), len(log))
    head += hashlib.sha256(head + manifest + log).digest()
    first = (head.ljust(0x1000, b"\0") + manifest).ljust(0x10000, b"\0") + log
    return first.ljust(BLANK, b"\0") + dump + b"\xa5" * room


@pytest.fixture
def disk(tmp_path):
    return tmp_path / "disk"


class TestDisk:
    def test_all_three_are_taken_off_it(self, disk, tmp_path):
        disk.write_bytes(disk_of(room=5000))
        saved = from_disk(disk, tmp_path)
        assert saved.dump.read_bytes() == b"dump" * 1000
        assert saved.manifest.read_bytes() == b'{"a": 1}'
        assert saved.log.read_bytes() == b"log"

    @pytest.mark.parametrize(
        ("data", "problem"),
        [
            (bytes(BLANK), "does not say that it holds a whole dump"),
            (b"\xa5" * BLANK, "does not say that it holds a whole dump"),
            (disk_of(state=0), "does not say that it holds a whole dump"),
            (disk_of().replace(b'{"a": 1}', b'{"a": 2}'), "does not match its own digest"),
            (disk_of()[:-1], "too small for the 4,000 bytes"),
        ],
    )
    def test_a_disk_that_holds_none_is_named(self, disk, tmp_path, data, problem):
        disk.write_bytes(data)
        with pytest.raises(VerificationError, match=problem):
            from_disk(disk, tmp_path)

    @pytest.mark.parametrize(
        ("data", "whole"), [(disk_of(), ["K2's disk"]), (disk_of(state=0), []), (bytes(BLANK), []), (b"\xa5" * BLANK, [])]
    )
    def test_what_says_that_it_is_whole(self, disk, tmp_path, data, whole):
        disk.write_bytes(data)
        assert whole_dumps(disk, tmp_path) == whole

    def test_what_is_told_with_a_fallback(self, disk, tmp_path):
        async def told(to):
            async with arrival(Saving(31, to=to), disk, tmp_path / to, fallback=True) as arriving:
                return [each for each in arriving.arguments if each.startswith("--to=")], arriving.token

        for to, last in (("disk", "--to=http://10.0.2.2:"), ("network", "--to=/dev/vda")):
            (tmp_path / to).mkdir()
            targets, token = asyncio.run(told(to))
            assert len(targets) == 2
            assert targets[1].startswith(last), "the other comes last"
            assert token

    def test_what_k2_is_told(self, disk, tmp_path):
        async def told():
            async with arrival(Saving(17, "lzo"), disk, tmp_path) as arriving:
                return arriving

        arriving = asyncio.run(told())
        assert arriving.arguments == ("--level=17", "--codec=lzo", "--to=/dev/vda")
        assert arriving.token == ""
        disk.write_bytes(disk_of())
        assert arriving.collect().log.read_bytes() == b"log"


class TestReceiver:
    def test_it_listens_for_whoever_has_the_token_and_is_gone_afterwards(self, disk, tmp_path):
        def put(port, token):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/uploads/{'0' * 32}",
                b'{"path": "crash"}',
                {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
                method="PUT",
            )
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status

        async def ask():
            async with arrival(Saving(31, to="network"), disk, tmp_path) as arriving:
                level, codec, to, token_file = arriving.arguments
                assert (level, codec, token_file) == ("--level=31", "--codec=zstd", "--token-file=/etc/crashkernel/token")
                assert to.startswith("--to=http://10.0.2.2:")
                port = int(to.rstrip("/").rpartition(":")[2])
                with pytest.raises(urllib.error.HTTPError, match="401"):
                    await asyncio.to_thread(put, port, "1" * 64)
                assert await asyncio.to_thread(put, port, arriving.token) in (200, 201)
                return port, arriving.token

        port, token = asyncio.run(ask())
        assert (tmp_path / "token").stat().st_mode & 0o077 == 0
        with pytest.raises(urllib.error.URLError):
            put(port, token)

    def test_what_it_stored_is_taken_from_it(self, tmp_path):
        crash = tmp_path / "received" / "host-2026"
        crash.mkdir(parents=True)
        for name in ("vmcore", LOG, MANIFEST):
            (crash / name).write_text(name)
        saved = from_receiver(tmp_path / "received", tmp_path)
        assert (saved.dump.read_text(), saved.log.read_text(), saved.manifest.read_text()) == ("vmcore", LOG, MANIFEST)

    @pytest.mark.parametrize(
        "names",
        [
            (),
            ("a/vmcore.incomplete",),
            ("a/vmcore", f"a/{LOG}"),
            ("a/vmcore", f"a/{LOG}", f"a/{MANIFEST}", "a/vmcore.incomplete"),
            ("a/vmcore", f"a/{LOG}", f"a/{MANIFEST}", "b/vmcore"),
        ],
    )
    def test_anything_but_one_whole_dump_is_named(self, tmp_path, names):
        received = tmp_path / "received"
        received.mkdir()
        for name in names:
            (received / name).parent.mkdir(exist_ok=True)
            (received / name).touch()
        with pytest.raises(VerificationError, match="the receiver has not one dump"):
            from_receiver(received, tmp_path)


@pytest.mark.parametrize("level", [-1, 32])
def test_a_dump_level_that_is_none(level):
    with pytest.raises(UsageError, match="a dump level is 0 to 31"):
        Saving(level)


def test_what_the_guest_says_of_its_memory():
    footprint = Footprint()
    footprint.take("memory", "MemTotal:200000 MemAvailable:90000")
    footprint.take("memory", "MemTotal:200000 MemAvailable:50000")
    footprint.take("memory", "MemTotal:200000 MemAvailable:30000")
    footprint.take("peak", "40000 0")
    assert (footprint.total, footprint.available, footprint.least) == (200000 << 10, 90000 << 10, 30000 << 10)
    assert (footprint.peak, footprint.peak_of_child) == (40000 << 10, 0)
