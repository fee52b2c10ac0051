"""The host's ledger of drills: nobody takes more than there is, first come, first served, and the dead take nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crashkernel.drill import budget
from crashkernel.drill.budget import Share, drill_share, ledger, limit, private_directory, remove_leftovers, working_directory
from crashkernel.errors import EnvironmentFault, UsageError

# Enters the ledger, says so, and leaves when its standard input ends.
DRILL = """
import sys
from pathlib import Path
from crashkernel.drill import budget
budget.LEDGER = Path(sys.argv[1])
share = budget.Share(int(sys.argv[2]), int(sys.argv[3]))
with budget.working_directory(share, lambda reason: print("waits", reason, flush=True)) as place:
    print("runs", place, flush=True)
    sys.stdin.read()
print("ends", flush=True)
"""
MIB = 1 << 20


@pytest.fixture
def place(short_path, monkeypatch):
    """A ledger and a place of its own, and a host of two CPUs and a gibibyte."""
    monkeypatch.setattr(budget, "LEDGER", short_path / "ledger")
    monkeypatch.setenv("TMPDIR", str(short_path))
    monkeypatch.setenv(budget.CPUS_VARIABLE, "2")
    monkeypatch.setenv(budget.MEMORY_VARIABLE, "1G")
    return short_path


class Drill:
    def __init__(self, place, cpus=1, memory=MIB):
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRILL, str(place / "ledger"), str(cpus), str(memory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def says(self) -> str:
        return self.process.stdout.readline().rstrip("\n")

    def end(self) -> None:
        self.process.stdin.close()
        assert self.process.stdout.read().endswith("ends\n")
        assert self.process.wait() == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(place):
    drills = []

    def started(*arguments):
        drills.append(Drill(place, *arguments))
        return drills[-1]

    yield started
    for drill in drills:
        drill.kill()
        drill.process.stdin.close()
        drill.process.stdout.close()


def test_who_fits_runs_and_who_does_not_waits_for_its_turn(place, start):
    first, second = start(), start()
    assert {first.says()[:4], second.says()[:4]} == {"runs"}
    third = start()
    assert third.says() == "waits 1 of 2 CPUs, 2 are taken"
    assert [entry.admitted for entry in ledger()] == [True, True, False]
    second.end()
    assert third.says().startswith("runs")
    first.end()
    third.end()
    assert ledger() == []
    assert list(place.glob("crashkernel-drill-*")) == []


def test_first_come_first_served_even_where_a_later_one_would_fit(start):
    first = start(1)
    assert first.says().startswith("runs")
    large = start(2)
    assert large.says() == "waits 2 of 2 CPUs, 1 are taken"
    small = start(1)
    assert small.says() == "waits 1 drill that came earlier"
    first.end()
    assert large.says().startswith("runs")
    assert small.says() == "waits 1 of 2 CPUs, 2 are taken"
    large.end()
    assert small.says().startswith("runs")


def test_memory_is_shared_like_cpus(start):
    first = start(1, 700 * MIB)
    assert first.says().startswith("runs")
    second = start(1, 400 * MIB)
    assert second.says() == "waits 400 MiB of 1 GiB, 700 MiB are taken"
    first.kill()
    assert second.says().startswith("runs")


@pytest.mark.parametrize("waits", [False, True])
def test_who_is_killed_takes_nothing_and_leaves_nothing(place, start, waits):
    first = start(2)
    left = Path(first.says().removeprefix("runs "))
    second = start(1)
    assert second.says().startswith("waits")
    third = start(1)
    assert third.says() == "waits 1 drill that came earlier"
    if waits:
        second.kill()
        assert third.says() == "waits 1 of 2 CPUs, 2 are taken"
    first.kill()
    assert third.says().startswith("runs")
    assert not left.exists()
    assert [entry.process for entry in ledger()] == [
        each.process.pid for each in (second, third) if each.process.poll() is None
    ]


def test_never_more_at_a_time_than_there_is_room_for_whoever_is_killed(start):
    """Eighteen drills, of which some are killed."""
    drills = [start(1 + number % 2) for number in range(18)]
    deadline, most = time.monotonic() + 60, 0
    for number in range(10_000):
        entries = ledger()
        taken = sum(entry.share.cpus for entry in entries if entry.admitted)
        assert taken <= 2
        most = max(most, taken)
        running = {entry.process for entry in entries if entry.admitted}
        for drill in drills:
            if drill.process.pid in running and not drill.process.stdin.closed:
                if number % 3:
                    drill.process.stdin.close()
                else:
                    drill.process.send_signal(signal.SIGKILL)
        if all(drill.process.poll() is not None for drill in drills):
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert most == 2
    assert ledger() == []


def test_a_drill_that_is_larger_than_the_limit_runs_alone(place):
    with working_directory(Share(4, 4 << 30)) as directory:
        assert directory.parent == place


def test_a_drill_for_which_there_is_no_room_at_all_is_refused(place):
    with pytest.raises(EnvironmentFault, match="a drill needs 1024 TiB of room in"), working_directory(Share(1, 1 << 50)):
        pass
    assert ledger() == []


def test_what_others_were_promised_is_not_given_away(place, monkeypatch):
    """Two thirds of what is free here are promised to a drill that has taken none of it yet."""
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    monkeypatch.setenv(budget.MEMORY_VARIABLE, str(4 * free))
    told = []

    class Waited(Exception):
        pass

    def waiting(reason):
        told.append(reason)
        raise Waited

    with working_directory(Share(1, free * 2 // 3)) as directory:
        with pytest.raises(Waited), working_directory(Share(1, free * 2 // 3), waiting):
            pass
        (directory / "ram").write_bytes(b"x" * MIB)
        assert ledger()[0].unused() <= free * 2 // 3 - MIB
    assert told[0].endswith("of room")


def test_leftovers_are_removed_and_the_living_are_not(place):
    with private_directory(place) as mine:
        (mine / "file").touch()
        remove_leftovers()
        assert (mine / "file").exists()
        left = place / "crashkernel-drill-left"
        left.mkdir()
        (left / "lock").touch()
        (left / "ram").write_bytes(bytes(MIB))
        remove_leftovers()
        assert not left.exists()
    assert not mine.exists()


@contextlib.contextmanager
def user(number):
    """As another user: no privilege is left, and files are that user's."""
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes two users in turn, which root alone may")
def test_the_killed_drill_of_one_user_keeps_no_other_out(place):
    place.chmod(0o1777)
    with user(1001), working_directory(Share(1, MIB)):
        (entry,) = budget.LEDGER.iterdir()
        assert (entry.stat().st_uid, budget.LEDGER.stat().st_mode & 0o7777) == (1001, 0o1777)
        left = entry.read_bytes()
    entry.write_bytes(left)
    os.chown(entry, 1001, 1001)  # as a kill leaves it: under no lock
    with user(1002):
        with working_directory(Share(2, MIB)), working_directory(Share(0, MIB)):
            assert [each.number for each in ledger()] == [2, 3]
        assert ledger() == []
        assert entry.exists()
    with user(1001):
        assert ledger() == []
        assert not entry.exists()


def test_what_cannot_be_removed_from_the_ledger_keeps_its_number(place):
    (place / "ledger" / "00000007").mkdir(parents=True)
    (place / "ledger" / "0x").touch()
    with working_directory(Share(1, MIB)):
        assert [each.number for each in ledger()] == [8]


def test_every_user_can_read_an_entry_whatever_the_umask(place):
    before = os.umask(0o077)
    try:
        with working_directory(Share(1, MIB)):
            (entry,) = budget.LEDGER.iterdir()
            assert entry.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_a_path_that_qemu_cannot_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "LEDGER", tmp_path / "ledger")
    for name in ("a,b", "x" * 100):
        odd = tmp_path / name
        odd.mkdir()
        with pytest.raises(EnvironmentFault, match="QEMU cannot use"), private_directory(odd):
            pass
        assert list(odd.iterdir()) == []


def test_the_limit_is_the_hosts_or_what_the_environment_leaves(monkeypatch):
    monkeypatch.delenv(budget.CPUS_VARIABLE, raising=False)
    monkeypatch.delenv(budget.MEMORY_VARIABLE, raising=False)
    assert limit().cpus == len(os.sched_getaffinity(0))
    assert limit().memory > 1 << 28
    monkeypatch.setenv(budget.CPUS_VARIABLE, "3")
    monkeypatch.setenv(budget.MEMORY_VARIABLE, "5G")
    assert limit() == Share(3, 5 << 30)
    assert drill_share(1 << 30, 8) == Share(3, (3 << 30) + (512 << 20))
    assert drill_share(1 << 30, 1, saved=True) == Share(1, (4 << 30) + (512 << 20))
    for nonsense in ("0", "two", "-1"):
        monkeypatch.setenv(budget.CPUS_VARIABLE, nonsense)
        with pytest.raises(UsageError, match="is no number of CPUs"):
            limit()
