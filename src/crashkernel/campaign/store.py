"""A campaign's results: one SQLite file, for sqlite3, DuckDB and pandas as well. docs/campaigns.md has the columns.

Only the driver writes, one result in one transaction, and `result`'s primary key is what makes exactly one result of each
drill true. Readers may read at any time: the file is in WAL mode, which wants a local disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import sqlite3
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from crashkernel import __version__
from crashkernel.campaign.file import PlannedDrill
from crashkernel.drill.request import DrillRequest
from crashkernel.errors import CrashkernelError, EnvironmentFault, FormatError, UsageError
from crashkernel.memory import parse_size
from crashkernel.report.results import VERSION as SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from crashkernel.campaign.file import Campaign

Verdict = Literal["PASS", "FAIL", "ERROR"]

_SCHEMA = """
CREATE TABLE campaign (
  name TEXT NOT NULL, file TEXT NOT NULL, path TEXT NOT NULL, created TEXT NOT NULL, version TEXT NOT NULL, host TEXT NOT NULL,
  state TEXT NOT NULL
);
CREATE TABLE run (
  number INTEGER PRIMARY KEY, started TEXT NOT NULL, ended TEXT, seconds REAL, workers INTEGER, cpus INTEGER, scheduler TEXT,
  "end" TEXT
);
CREATE TABLE drill (
  number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, repeat INTEGER NOT NULL, title TEXT NOT NULL, command TEXT NOT NULL,
  request TEXT NOT NULL, kernel TEXT NOT NULL, capture_kernel TEXT NOT NULL, machine TEXT NOT NULL, cpu TEXT NOT NULL,
  mmu TEXT NOT NULL, smp INTEGER NOT NULL, memory INTEGER NOT NULL, crashkernel TEXT NOT NULL, placement TEXT NOT NULL,
  all_cpus INTEGER NOT NULL, capture INTEGER, fault TEXT NOT NULL, seed INTEGER NOT NULL, known TEXT,
  attempts INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE result (
  drill INTEGER PRIMARY KEY REFERENCES drill, verdict TEXT NOT NULL CHECK (verdict IN ('PASS', 'FAIL', 'ERROR')),
  stage TEXT NOT NULL, reason TEXT NOT NULL, release TEXT NOT NULL, capture_release TEXT NOT NULL, seconds REAL NOT NULL,
  boot_seconds REAL NOT NULL, cpu_seconds REAL NOT NULL, started TEXT NOT NULL, ended TEXT NOT NULL, worker TEXT NOT NULL,
  host TEXT NOT NULL, attempt INTEGER NOT NULL, record TEXT, console TEXT NOT NULL, plan TEXT
);
CREATE TABLE stage (
  drill INTEGER NOT NULL REFERENCES result, position INTEGER NOT NULL, name TEXT NOT NULL, seconds REAL NOT NULL,
  PRIMARY KEY (drill, position)
);
CREATE TABLE size (
  title TEXT NOT NULL, request TEXT NOT NULL, result TEXT NOT NULL, found INTEGER NOT NULL, recommended INTEGER,
  created TEXT NOT NULL
);
"""


def utc_now() -> str:
    """The time as every column has it: ISO 8601, UTC, whole milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one drill. Times are in seconds; `record` is the drill's own JSON, None if it has none."""

    verdict: Verdict
    stage: str = ""  # where it failed
    reason: str = ""  # one line; "" for PASS
    release: str = ""
    capture_release: str = ""
    seconds: float = 0.0  # wall time of the whole process, its turn not waited for
    boot_seconds: float = 0.0  # K1's boot and K2's
    cpu_seconds: float = 0.0  # of QEMU, too
    started: str = ""
    ended: str = ""
    worker: str = ""
    host: str = ""
    stages: Mapping[str, float] = field(default_factory=dict)
    record: dict[str, Any] | None = None
    console: str = ""


@dataclass(frozen=True, slots=True)
class StoredDrill:
    """A row of `drill`."""

    number: int
    key: str
    repeat: int
    title: str
    command: str
    known: str
    request: DrillRequest


class Store:
    """The database of one campaign, open for its driver.

    :raise EnvironmentFault: any method: SQLite cannot read or write now, on a full disk or while another program locks it.
    :raise UsageError: likewise: the file is damaged, or is no campaign's.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, campaign: Campaign, host: Mapping[str, Any]) -> Iterator[Self]:
        """The database at `path`, made unless it is there; drills that the file has and the database has not are added.

        Runs whose driver was killed are marked so: while this one has the lock, no other can be at work.

        :raise UsageError: it is another campaign's, no campaign's, or cannot be written.
        :raise EnvironmentFault: another driver has it, or the disk is full.
        """
        if not path.exists():
            _create(path, campaign, host)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_locked(path))
            with _sqlite_errors(path):
                connection = stack.enter_context(contextlib.closing(connect(path, write=True)))
                connection.execute("PRAGMA journal_mode = WAL")
                store = cls(path, connection)
                store._extend(campaign)
                store._settle()
            yield store

    def drills(self, *, pending: bool = False) -> list[StoredDrill]:
        """All drills, or those that have no result yet, in order."""
        where = "WHERE number NOT IN (SELECT drill FROM result)" if pending else ""
        query = f"SELECT number, key, repeat, title, command, known, request FROM drill {where} ORDER BY number"  # noqa: S608
        with self._transaction() as connection:
            rows = connection.execute(query).fetchall()
        return [
            StoredDrill(number, key, repeat, title, command, known or "", DrillRequest.from_options(json.loads(request)))
            for number, key, repeat, title, command, known, request in rows
        ]

    @property
    def identity(self) -> str:
        """A digest that no other database has."""
        with self._transaction() as connection:
            row = connection.execute("SELECT name, created, host FROM campaign").fetchone()
        return hashlib.sha256(repr(row).encode()).hexdigest()[:12]

    def done(self) -> list[tuple[DrillRequest, str, float]]:
        """What has a result: request, verdict, seconds."""
        with self._transaction() as connection:
            rows = connection.execute("SELECT request, verdict, seconds FROM result JOIN drill ON number = drill").fetchall()
        return [(DrillRequest.from_options(json.loads(request)), verdict, seconds) for request, verdict, seconds in rows]

    def begin_run(self, workers: int, cpus: int, scheduler: str) -> int:
        """Note that a driver begins to work; the run's number."""
        with self._transaction() as connection:
            connection.execute("UPDATE campaign SET state = 'running'")
            number = connection.execute(
                "INSERT INTO run (started, workers, cpus, scheduler) VALUES (?, ?, ?, ?)", (utc_now(), workers, cpus, scheduler)
            ).lastrowid
        assert number is not None
        return number

    def end_run(self, number: int, seconds: float, end: Literal["done", "interrupted"]) -> None:
        """Note how a driver's work ended."""
        with self._transaction() as connection:
            connection.execute(
                'UPDATE run SET ended = ?, seconds = ?, "end" = ? WHERE number = ?',
                (utc_now(), round(seconds, 3), end, number),
            )
            connection.execute("UPDATE campaign SET state = ?", (end,))

    def finish(self) -> None:
        """Note that every drill has its result, whatever became of the driver that wrote the last one."""
        with self._transaction() as connection:
            connection.execute("UPDATE campaign SET state = 'done'")

    def attempted(self, number: int) -> None:
        """Note that a worker has begun with the drill `number`."""
        with self._transaction() as connection:
            connection.execute("UPDATE drill SET attempts = attempts + 1 WHERE number = ?", (number,))

    def add(self, number: int, result: Result) -> bool:
        """Keep the result of the drill `number`, all of it or nothing; False if it has one already, which stays."""
        record = result.record
        with self._transaction() as connection:
            kept = connection.execute(
                """INSERT INTO result VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?,
                   (SELECT max(1, attempts) FROM drill WHERE number = ?), ?, ?, ?) ON CONFLICT (drill) DO NOTHING""",
                (
                    *(number, result.verdict, result.stage, result.reason, result.release, result.capture_release),
                    *(result.seconds, result.boot_seconds, result.cpu_seconds, result.started, result.ended),
                    *(result.worker, result.host, number),
                    None if record is None else json.dumps(record),
                    result.console,
                    None if record is None or record.get("plan") is None else json.dumps(record["plan"]),
                ),
            ).rowcount
            if kept:
                connection.executemany(
                    "INSERT INTO stage VALUES (?, ?, ?, ?)",
                    ((number, position, name, seconds) for position, (name, seconds) in enumerate(result.stages.items())),
                )
        return bool(kept)

    def forget_errors(self) -> int:
        """Drop the results that say nothing of the handover, so that these drills run again; how many they were."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM stage WHERE drill IN (SELECT drill FROM result WHERE verdict = 'ERROR')")
            return connection.execute("DELETE FROM result WHERE verdict = 'ERROR'").rowcount

    def _extend(self, campaign: Campaign) -> None:
        """Take in what the file has more than the database, and what it says is known to fail.

        :raise UsageError: the file lacks drills that the database has.
        """
        with self._transaction() as connection:
            (name,) = connection.execute("SELECT name FROM campaign").fetchone()
        fresh = "give another --db to begin a new one"
        if name != campaign.name:
            raise UsageError(f"{self.path} is of the campaign {name!r}, not of {campaign.name!r}", hint=fresh)
        listed = {drill.key for drill in campaign.drills}
        gone = [drill.title for drill in self.drills() if drill.key not in listed]
        if gone:
            others = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            raise UsageError(
                f"{self.path} has drills that {campaign.path} no longer lists: {gone[0]}{others}",
                hint=f"put them back, or {fresh}",
            )
        with self._transaction() as connection:
            _add_drills(connection, campaign.drills)
            connection.execute("UPDATE campaign SET file = ?, path = ?", (campaign.text, campaign.path))

    def _settle(self) -> None:
        """Say of runs that nobody ended that their driver was killed; when that was, only their results tell."""
        with self._transaction() as connection:
            connection.execute("""UPDATE run SET "end" = 'killed' WHERE "end" IS NULL""")
            connection.execute("UPDATE campaign SET state = 'interrupted' WHERE state = 'running'")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done in it is kept, or nothing.

        :raise EnvironmentFault: SQLite cannot do it now.
        :raise UsageError: the file is damaged, or is no campaign's.
        """
        try:
            with self._connection as connection:
                yield connection
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):  # what we asked for makes no sense
            raise
        except sqlite3.DatabaseError as error:
            raise _fault(self.path, error, "the same command goes on") from error


def connect(path: Path, *, write: bool = False) -> sqlite3.Connection:
    """Open a campaign's database; it is made by `Store.open` alone.

    :raise UsageError: it cannot be opened.
    :raise EnvironmentFault: not now: another program locks it, or its disk is full.
    :raise FormatError: it is no campaign's database, or of another version's schema.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such database", hint="`crashkernel campaign run FILE.toml` makes one")
    with _sqlite_errors(path):
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode={'rw' if write else 'ro'}", uri=True, timeout=30)
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not {"campaign", "run", "drill", "result", "stage"} <= tables:
                raise FormatError("no database of a campaign", source=str(path))
            if version != SCHEMA_VERSION:
                raise FormatError(
                    f"its schema is of version {version}, this crashkernel knows {SCHEMA_VERSION}", source=str(path)
                )
        except BaseException:
            connection.close()
            raise
    return connection


def read_evidence(path: Path, number: int) -> tuple[dict[str, Any] | None, str]:
    """The JSON of a drill, None if it has none, and what its console said.

    :raise UsageError: the database cannot be read.
    :raise FormatError: it is no campaign's.
    """
    with contextlib.closing(connect(path)) as connection, _sqlite_errors(path):
        row = connection.execute("SELECT record, console FROM result WHERE drill = ?", (number,)).fetchone()
    record, console = row or (None, "")
    try:
        return None if record is None else json.loads(record), str(console)
    except ValueError as error:
        raise FormatError(f"the record of drill {number} is no JSON", source=str(path)) from error


@contextlib.contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise _fault(path, error, "try again") from error


def _fault(path: Path, error: sqlite3.DatabaseError, then: str) -> CrashkernelError:
    """What SQLite's error means; `then` is what to do when that is seen to."""
    if not isinstance(error, sqlite3.OperationalError):
        return FormatError(f"no database of a campaign: {error}", source=str(path))
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without what is more exact
    if remedy := _REMEDIES.get(code):
        return EnvironmentFault(f"{path}: {error}", hint=f"{remedy}; {then}")
    return UsageError(f"{path}: {error}")


_REMEDIES = {
    sqlite3.SQLITE_FULL: "free some room",
    sqlite3.SQLITE_BUSY: "end what else writes to it",
    sqlite3.SQLITE_IOERR: "see to its disk",
}


def _create(path: Path, campaign: Campaign, host: Mapping[str, Any]) -> None:
    """Make the database under another name, and give it its own when it is whole."""
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        scratch.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(scratch)) as connection:
            connection.executescript(_SCHEMA)
            with connection:
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                connection.execute(
                    "INSERT INTO campaign VALUES (?, ?, ?, ?, ?, ?, 'new')",
                    (campaign.name, campaign.text, campaign.path, utc_now(), __version__, json.dumps(host)),
                )
                _add_drills(connection, campaign.drills)
        os.link(scratch, path)  # not over one that another driver made meanwhile
    except FileExistsError:
        pass
    except (OSError, sqlite3.OperationalError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UsageError(f"cannot write {path}: {reason}", hint="choose another --db") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def _add_drills(connection: sqlite3.Connection, drills: Sequence[PlannedDrill]) -> None:
    for drill in drills:
        request = drill.request
        kernel, capture_kernel = request.kernels
        columns: dict[str, Any] = {
            "key": drill.key,
            "repeat": drill.repeat,
            "title": drill.title,
            "command": shlex.join(request.command()),
            "request": json.dumps(request.options(), sort_keys=True),
            "kernel": kernel,
            "capture_kernel": capture_kernel,
            "memory": parse_size(request.memory),
            "all_cpus": int(request.all_cpus),
            "fault": " ".join(request.fault),
            **{
                name: getattr(request, name)
                for name in ("machine", "cpu", "mmu", "smp", "crashkernel", "placement", "capture", "seed")
            },
            "known": drill.known or None,
        }
        names, marks = ", ".join(columns), ", ".join("?" for _ in columns)
        connection.execute(
            f"INSERT INTO drill ({names}) VALUES ({marks}) ON CONFLICT (key) DO UPDATE SET known = excluded.known",  # noqa: S608
            tuple(columns.values()),
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other drivers off. The lock is a file beside the database: over NFS, flock(2) on that would meet SQLite's own."""
    place = path.resolve()  # whatever link it was named by
    beside = place.with_name(f".{place.name}-lock")
    with contextlib.ExitStack() as stack:
        try:
            place.stat()
            if not os.access(place, os.W_OK, effective_ids=True):  # else SQLite opens it to be read, and says nothing
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            stack.callback(os.close, descriptor)
            ours = _lock(descriptor, beside)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}", hint="choose another --db") from error
        if not ours:
            raise EnvironmentFault(
                f"another `crashkernel campaign run` works on {path}", hint="let it end, or give another --db"
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()


def _lock(descriptor: int, path: Path) -> bool:
    """Lock the file that is at `path`: not one that who had it has removed on leaving, which would keep nobody off."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
