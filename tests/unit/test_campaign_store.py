"""A campaign's database: made whole, one writer, one result for each drill, and a file that grew is taken in."""

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from crashkernel.campaign.file import parse_campaign
from crashkernel.campaign.store import Result, Store, _lock, connect, read_evidence
from crashkernel.cli.twin import add_commands
from crashkernel.drill.request import DrillRequest
from crashkernel.errors import EnvironmentFault, FormatError, UsageError
from crashkernel.report.results import read_campaign

MATRIX = 'name = "t"\n[[matrix]]\nsmp = [1, 2]\nplacement = ["zero", "reserved"]\n'
RESULT = Result(
    "PASS",
    release="6.1.0",
    capture_release="6.12.0",
    seconds=12.5,
    boot_seconds=8.0,
    cpu_seconds=14.0,
    started="2026-01-01T00:00:00Z",
    ended="2026-01-01T00:00:12Z",
    worker="1",
    host="h",
    stages={"K1 boot": 6.0, "K2 boot": 2.0},
    record={"bytes_compared": 1 << 29, "plan": {"moves": [1]}},
    console="hello\n",
)


def campaign(text: str = MATRIX):
    return parse_campaign(text, "t.toml")


@contextlib.contextmanager
def opened(path, text: str = MATRIX):
    with Store.open(path, campaign(text), {"cpus": 2}) as store:
        yield store


@pytest.fixture
def db(tmp_path):
    return tmp_path / "t.sqlite"


def rows(db, query: str):
    with contextlib.closing(sqlite3.connect(db)) as connection:
        return connection.execute(query).fetchall()


def test_a_new_database_has_all_drills_and_no_result(db):
    with opened(db) as store:
        assert [drill.number for drill in store.drills(pending=True)] == [1, 2, 3, 4]
        assert [drill.request for drill in store.drills()] == [drill.request for drill in campaign().drills]
    assert rows(db, "PRAGMA user_version") == [(1,)]
    assert rows(db, "PRAGMA journal_mode") == [("wal",)]
    assert rows(db, "SELECT name, file, path, state FROM campaign") == [("t", MATRIX, "t.toml", "new")]
    assert [path.name for path in db.parent.iterdir()] == ["t.sqlite"]


def test_the_command_and_the_columns_say_the_same(db):
    with opened(
        db, 'name = "t"\n[[drill]]\nfault = ["nmi"]\nmemory = "1G"\ncapture-kernel = "debian:sid"\n[[drill]]\ncapture = 31'
    ):
        pass
    columns = "command, kernel, capture_kernel, memory, fault, seed, capture, all_cpus, request FROM drill"
    first, second = rows(db, f"SELECT {columns}")
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    asked = parser.parse_args(shlex.split(first[0])[1:])
    assert (asked.kernel, asked.capture_kernel, asked.memory, asked.seed) == (["debian:bookworm"], "debian:sid", "1G", first[5])
    assert first[1:5] == ("debian:bookworm", "debian:sid", 1 << 30, "nmi")
    assert DrillRequest.from_options(json.loads(first[8])).command() == shlex.split(first[0])
    assert first[6:8] == (None, 0)
    assert second[6] == 31


def test_there_is_one_result_for_each_drill_and_the_first_stays(db):
    with opened(db) as store:
        store.attempted(2)
        store.attempted(2)
        assert store.add(2, RESULT)
        assert not store.add(2, Result("FAIL", "K2 boot", "late"))
        assert [drill.number for drill in store.drills(pending=True)] == [1, 3, 4]
        assert store.done() == [(campaign().drills[1].request, "PASS", 12.5)]
    assert rows(db, "SELECT drill, verdict, attempt, seconds FROM result") == [(2, "PASS", 2, 12.5)]
    assert rows(db, "SELECT * FROM stage") == [(2, 0, "K1 boot", 6.0), (2, 1, "K2 boot", 2.0)]
    assert read_evidence(db, 2) == (RESULT.record, "hello\n")
    assert read_evidence(db, 1) == (None, "")


def test_a_result_that_cannot_be_is_refused_whole(db):
    with opened(db) as store:
        with pytest.raises(sqlite3.IntegrityError):
            store.add(1, Result("MAYBE"))
        with pytest.raises((sqlite3.Error, TypeError)):
            store.add(1, Result("PASS", stages={"K1 boot": object()}))
        assert store.done() == []
        assert store.add(1, RESULT)


def test_the_reader_of_reports_reads_it(db):
    with opened(db) as store:
        run = store.begin_run(2, 2, "")
        store.add(1, RESULT)
        store.add(2, Result("FAIL", "K2 boot", "K2 printed nothing", seconds=80.0))
        store.end_run(run, 60.0, "done")
    read = read_campaign(db)
    assert (read.counts["passed"], read.counts["failed"], read.counts["missing"]) == (1, 1, 2)
    assert read.exit_status == 1
    assert read.rate == pytest.approx(60)
    assert read.drills[0].result.compared == 1 << 29


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (MATRIX.replace("[1, 2]", "[1, 2, 4]"), 6),
        (MATRIX + "[[drill]]\nsmp = 8\n", 5),
        (MATRIX + "repeats = 3\n", 12),
        (MATRIX.replace('["zero", "reserved"]', '["reserved", "zero"]'), 4),
    ],
)
def test_a_file_that_grew_is_taken_in_and_results_stay(db, text, number):
    with opened(db) as store:
        store.add(3, RESULT)
        done = store.drills()[2].key
    with opened(db, text) as store:
        assert len(store.drills()) == number
        assert len(store.drills(pending=True)) == number - 1
        assert done not in {drill.key for drill in store.drills(pending=True)}
    assert rows(db, "SELECT file FROM campaign") == [(text,)]


NUMBERS = st.sampled_from([-1, 0, 1, 4, 2048, 2049, 2**31, 2**32, 2**63 - 1, 2**63, 10**20])


def mostly(good, odd):
    """One value in ten may be odd: else next to no file would be taken."""
    return st.integers(0, 9).flatmap(lambda number: odd if number == 7 else good)


SIZES = mostly(st.sampled_from(["512M", "1G", "0x80000000", "64T"]), st.sampled_from(["0", "16383P", "0xffffffffffffffff"]))
TEXTS = mostly(st.sampled_from(["debian:sid", "é 🖥", "'; --"]), st.text(max_size=9))
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "smp": mostly(st.sampled_from([1, 4, 2048]), NUMBERS),
        "seed": mostly(st.integers(0, 2**63 - 1), NUMBERS),
        "capture": mostly(st.integers(0, 31), NUMBERS),
        **dict.fromkeys(("memory", "crashkernel"), SIZES),
        **dict.fromkeys(("kernel", "capture-kernel", "initrd"), TEXTS),
        "fault": st.lists(st.sampled_from(["nmi", "dma:init"]), max_size=2, unique=True),
        "all-cpus": st.booleans(),
    },
)


def toml(options) -> str:
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in options.items())


@given(st.lists(OPTIONS, min_size=1, max_size=3), mostly(st.just(7), NUMBERS), st.integers(1, 3))
@example([{"seed": 2**63 - 1, "smp": 2048, "memory": "64T", "fault": ["nmi"]}], 10**20, 1)
@example([{"seed": -1}], 0, 1)
@example([{"seed": 10**20}], 0, 1)
@example([{"smp": 10**20}], 0, 1)
@example([{"memory": "0xf000000000000000"}], 0, 1)
def test_whatever_a_campaign_file_may_say_is_kept_and_read_again(drills, seed, repeats):
    text = f'name = "t"\nseed = {seed}\nrepeats = {repeats}\n' + "".join(f"[[drill]]\n{toml(each)}" for each in drills)
    try:
        planned = campaign(text).drills
    except UsageError:
        event("refused")
        return
    with tempfile.TemporaryDirectory() as place:
        db = Path(place) / "t.sqlite"
        with opened(db, text) as store:
            assert [drill.request for drill in store.drills()] == [drill.request for drill in planned]
        read = read_campaign(db).drills
    assert [(drill.key, drill.title, drill.seed, drill.smp) for drill in read] == [
        (drill.key, drill.title, drill.request.seed, drill.request.smp) for drill in planned
    ]


def test_what_is_known_to_fail_may_change(db):
    with opened(db) as store:
        store.add(1, Result("FAIL", "K2 boot", "as ever"))
    assert read_campaign(db).exit_status == 1
    with opened(db, MATRIX + '[[known]]\nmatch = { smp = 1, placement = "zero" }\nreason = "too small"\n') as store:
        assert [drill.known for drill in store.drills()] == ["too small", "", "", ""]
    assert read_campaign(db).counts["known"] == 1
    with opened(db) as store:
        assert {drill.known for drill in store.drills()} == {""}


def test_another_campaigns_database_is_refused_and_stays(db):
    with opened(db):
        pass
    before = db.read_bytes()
    with (
        pytest.raises(UsageError, match=r"is of the campaign 't', not of 'u' \(give another --db"),
        opened(db, MATRIX.replace('"t"', '"u"')),
    ):
        pass
    with (
        pytest.raises(UsageError, match=r"no longer lists: debian:bookworm.*, 2 CPUs.* and 1 more"),
        opened(db, MATRIX.replace("[1, 2]", "1")),
    ):
        pass
    assert rows(db, "SELECT count(*) FROM drill") == [(4,)]
    assert len(before) == len(db.read_bytes())


def test_a_second_driver_is_refused(db):
    with opened(db):
        with pytest.raises(EnvironmentFault, match="another `crashkernel campaign run` works on"), opened(db):
            pass
        assert len(read_campaign(db).drills) == 4  # but anybody may read
    with opened(db):
        pass


def test_no_link_and_no_lock_that_a_killed_driver_left_gets_a_second_one_in_or_keeps_the_first_out(db):
    link = db.parent / "elsewhere"
    link.mkdir()
    link /= "link.sqlite"
    with opened(db):
        link.symlink_to(db)
        with pytest.raises(EnvironmentFault, match=r"works on .*/link.sqlite"), opened(link):
            pass
        (lock,) = db.parent.glob(".*-lock")
    assert not lock.exists()
    lock.touch()
    with opened(link), pytest.raises(EnvironmentFault, match="another `crashkernel campaign run` works on"), opened(db):
        pass
    assert not lock.exists()


def test_a_lock_that_its_owner_has_removed_locks_nothing(tmp_path):
    path = tmp_path / "lock"
    with path.open("w") as before:
        path.unlink()
        assert not _lock(before.fileno(), path)
        with path.open("w") as after:
            assert not _lock(before.fileno(), path)
            assert _lock(after.fileno(), path)


def test_the_drivers_lock_is_not_on_the_database_itself(db):
    """Over NFS a lock of flock(2) is one of fcntl(2), and those on the database are SQLite's own."""
    with opened(db), db.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_database_that_may_only_be_read_is_refused_before_anything_runs(short_path):
    db = short_path / "t.sqlite"
    with opened(db):
        pass
    short_path.chmod(0o777)
    db.chmod(0o444)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(1001)  # root may write whatever it likes
        with pytest.raises(UsageError, match=r"cannot write .*t.sqlite: Permission denied \(choose another --db\)"), opened(db):
            pass
    finally:
        if root:
            os.seteuid(0)


def fill_the_disk(store):
    """No page more; and not even those that are free."""
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages}")


WRITES = {
    "add": lambda store: store.add(1, replace(RESULT, console="x" * (1 << 20))),
    "attempted": lambda store: store.attempted(1),
    "begin_run": lambda store: store.begin_run(1, 1, ""),
    "end_run": lambda store: store.end_run(1, 1.0, "done"),
    "finish": lambda store: store.finish(),
    "forget_errors": lambda store: store.forget_errors(),
}


def test_a_full_disk_is_told_and_what_was_written_stays(db):
    with opened(db) as store:
        store.add(2, RESULT)
        fill_the_disk(store)
        with pytest.raises(EnvironmentFault, match=r"is full \(free some room; the same command goes on\)"):
            WRITES["add"](store)
        assert [drill.number for drill in store.drills(pending=True)] == [1, 3, 4]
    with opened(db) as store:
        assert store.add(1, RESULT)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_who_locks_the_database_for_long_is_complained_of(db, write):
    with opened(db) as store, contextlib.closing(sqlite3.connect(db)) as other:
        store._connection.execute("PRAGMA busy_timeout = 0")  # else it waits for half a minute
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(EnvironmentFault, match=r"is locked \(end what else writes to it; the same command goes on\)"):
            write(store)
        other.rollback()
        write(store)


def test_a_database_that_is_damaged_or_changed_while_a_campaign_runs_is_told(db):
    with opened(db) as store:
        with contextlib.closing(sqlite3.connect(db)) as other:
            other.execute("ALTER TABLE drill RENAME TO music")
        with pytest.raises(UsageError, match=r"t.sqlite: no such table: .*drill"):
            store.attempted(1)
    db.unlink()
    with opened(db) as store:
        store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        store._connection.execute("PRAGMA cache_size = 0")
        data = db.read_bytes()
        with db.open("r+b") as file:
            file.write(data[:100] + b"\xff" * (len(data) - 100))
        with pytest.raises(FormatError, match="no database of a campaign: database disk image is malformed"):
            store.done()


def test_a_run_that_was_killed_is_told_from_one_that_is_still_at_it(db):
    with opened(db) as store:
        store.begin_run(1, 1, "")
        store.end_run(store.begin_run(1, 1, ""), 1.0, "interrupted")
        store.begin_run(1, 1, "")
    assert rows(db, 'SELECT "end", ended, seconds FROM run')[0] == (None, None, None)
    with opened(db) as store:
        assert rows(db, 'SELECT "end", ended FROM run WHERE ended IS NULL') == [("killed", None)] * 2
        assert rows(db, 'SELECT "end" FROM run WHERE number = 2') == [("interrupted",)]
        assert rows(db, "SELECT state FROM campaign") == [("interrupted",)]
        store.begin_run(1, 1, "")
        assert rows(db, "SELECT state FROM campaign") == [("running",)]
    assert [run.end for run in read_campaign(db).runs] == ["killed", "interrupted", "killed", ""]


@pytest.mark.parametrize(
    "content", [b"", b"no database at all, but long enough to be one" * 100, b"SQLite format 3\0" + bytes(5000)]
)
def test_a_file_that_is_no_database_is_refused_and_stays(db, content):
    db.write_bytes(content)
    with pytest.raises(UsageError), opened(db):
        pass
    assert db.read_bytes() == content


def test_a_foreign_database_and_one_of_another_version_are_refused(db):
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("CREATE TABLE music (title)")
    with pytest.raises(FormatError, match="no database of a campaign"), opened(db):
        pass
    db.unlink()
    with opened(db):
        pass
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(FormatError, match="its schema is of version 2"):
        connect(db)


def test_a_damaged_database_is_told_in_one_line(db):
    with opened(db) as store:
        store.add(1, RESULT)
    data = bytearray(db.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    db.write_bytes(data)
    with pytest.raises(UsageError) as caught, opened(db):
        pass
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"cannot write .*none/t.sqlite"), opened(tmp_path / "none" / "t.sqlite"):
        pass


WRITER = """
import sys
import time
from pathlib import Path
from crashkernel.campaign.file import parse_campaign
from crashkernel.campaign.store import Result, Store
path = Path(sys.argv[1])
campaign = parse_campaign('name = "t"\\nrepeats = 500\\n[[drill]]', "t.toml")
with Store.open(path, campaign, {}) as store:
    for drill in store.drills(pending=True):
        time.sleep(0.01)  # not done before the last kill
        store.attempted(drill.number)
        store.add(drill.number, Result("PASS", stages={"a": 1.0, "b": 2.0}, record={"x": "y" * 2000}, console="z" * 5000))
"""


def test_a_writer_that_is_killed_at_any_moment_loses_nothing_but_the_last(db):
    """Half of the kills hit it while it makes the database, the others while it writes results."""
    results = 0
    for number in range(6):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(db)])
        deadline = time.monotonic() + 60
        if number % 2:
            while not (db.exists() and rows(db, "SELECT count(*) FROM result")[0][0] > results) and time.monotonic() < deadline:
                assert process.poll() is None
        else:
            time.sleep(0.2 + 0.1 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if db.exists():
            with contextlib.closing(connect(db)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                assert connection.execute("SELECT count(*) FROM drill").fetchone() == (500,)
                now = connection.execute("SELECT count(*) FROM result").fetchone()[0]
                assert connection.execute("SELECT count(*) FROM stage").fetchone() == (2 * now,)
            assert now >= results
            results = now
    assert results > 0
