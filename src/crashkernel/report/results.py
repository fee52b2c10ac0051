"""Reads a campaign's database.

It is a file from anywhere: it is opened to be read only, its tables are asked for their columns before they are read, and each
value is held against what it must be. What is missing of a drill's evidence is missing here too, never made up.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crashkernel.errors import EnvironmentFault, FormatError, UsageError
from crashkernel.formats import fields
from crashkernel.report.campaign import Campaign, Drill, Evidence, Result, Run, Size, moment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from crashkernel.memory import Range

VERSION = 1
"""The `PRAGMA user_version` of the schema that campaigns are written in, and that is read."""

_COLUMNS = {
    "campaign": "name file path created version host state",
    "run": "number started ended seconds workers cpus scheduler end",
    "drill": "number key repeat title command request kernel capture_kernel machine cpu mmu smp memory crashkernel placement "
    "all_cpus capture fault seed known",
    "result": "drill verdict stage reason release capture_release seconds boot_seconds cpu_seconds started ended worker host "
    "attempt record console plan",
    "stage": "drill position name seconds",
    "size": "title request result found recommended created",
}


def read_campaign(path: Path) -> Campaign:
    """All of a campaign's database, as it is at one moment: a driver may be at work on it.

    :raise UsageError: there is no such file.
    :raise FormatError: it is no campaign's database, or one of another version, or damaged.
    :raise EnvironmentFault: it cannot be read now.
    """
    try:
        there, source, place = path.is_file(), str(path), path.resolve()
    except (OSError, RuntimeError) as error:  # a directory that one may not enter; a loop of links
        raise EnvironmentFault(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not there:
        raise UsageError(f"cannot read {path}: no such file", hint="give the database of `crashkernel campaign run`")
    # SQLite makes files beside a database in WAL mode even to read it. Where it may not, and no driver has, nobody writes.
    written = os.access(place.parent, os.W_OK, effective_ids=True) or place.with_name(f"{place.name}-wal").exists()
    uri = f"{place.as_uri()}?{'mode=ro' if written else 'immutable=1'}"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5)) as database:
            # what a table cannot hold must not make the rest unreadable, and what a file defines must not be run
            database.text_factory = lambda raw: raw.decode("utf-8", "replace")
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA trusted_schema = OFF")
            database.execute("BEGIN")
            _check_schema(database, source)
            return _Reader(database, source).campaign()
    except sqlite3.OperationalError as error:
        raise EnvironmentFault(
            f"cannot read {path}: {error}", hint="is it another user's, or in use by something that locks it?"
        ) from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # of names in a damaged schema
        raise FormatError(f"not a campaign's database: {error}", source=source) from error


def _check_schema(database: sqlite3.Connection, source: str) -> None:
    """Whether the tables that are read are tables, and have the columns."""
    hint = "give the database of `crashkernel campaign run`"
    tables = {str(row[0]) for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables & set(_COLUMNS):
        raise FormatError("not a campaign's database: none of its tables is there", source=source, hint=hint)
    version = int(database.execute("PRAGMA user_version").fetchone()[0])
    if version != VERSION:
        raise FormatError(
            f"a campaign's database of version {version}, and only version {VERSION} is known here",
            source=source,
            hint="use the crashkernel that wrote it",
        )
    for table, columns in _COLUMNS.items():
        if table not in tables:
            raise FormatError(f"not a campaign's database: the table {table!r} is missing", source=source, hint=hint)
        present = {str(row[1]) for row in database.execute(f"PRAGMA table_info({table})")}
        if missing := [name for name in columns.split() if name not in present]:
            raise FormatError(f"not a campaign's database: the table {table!r} has no column {missing[0]!r}", source=source)


class _Reader:
    """Reads row after row. A value that cannot be is refused by table, row and column."""

    def __init__(self, database: sqlite3.Connection, source: str) -> None:
        self._database = database
        self._source = source

    def campaign(self) -> Campaign:
        heads = list(self._rows("campaign"))
        if len(heads) != 1:
            raise FormatError(f"the table 'campaign' must have one row, it has {len(heads)}", source=self._source)
        head = heads[0]
        campaign = Campaign(
            name=head.text("name"),
            file=head.text("file"),
            created=head.text("created"),
            version=head.text("version"),
            host=_json_object(head.text("host")),
            state=head.text("state"),
            runs=(),
            drills=tuple(self._drills()),
            sizes=tuple(self._size(row) for row in self._rows("size", "ORDER BY rowid")),
        )
        wanted = {drill.number for drill in campaign.drills if drill.result is not None and drill.standing != "passed"}
        wanted |= {drill.number for drill in campaign.pair}
        return replace(campaign, runs=tuple(self._runs(campaign.results)), evidence=dict(self._evidence(wanted)))

    def _rows(self, table: str, more: str = "", columns: str = "*") -> Iterator[_Values]:
        for number, row in enumerate(self._database.execute(f"SELECT {columns} FROM {table} {more}"), 1):  # noqa: S608 (no value of anybody's is in it)
            yield _Values(row, f"{self._source}: table {table!r}, row {number}")

    def _runs(self, results: Sequence[Result]) -> Iterator[Run]:
        rows = list(self._rows("run", "ORDER BY number"))
        starts = [row.text("started") for row in rows]
        for number, (row, started) in enumerate(zip(rows, starts, strict=True), 1):
            following = starts[number] if number < len(starts) else None
            seconds = row.seconds("seconds") if row["seconds"] is not None else _until_last(started, following, results)
            yield Run(started, row.text("ended"), seconds, row.whole("workers"), row.whole("cpus"), row.text("end"))

    def _drills(self) -> Iterator[Drill]:
        stages: defaultdict[int, list[tuple[str, float]]] = defaultdict(list)
        for row in self._rows("stage", "ORDER BY drill, position"):
            stages[row.whole("drill")].append((row.text("name"), row.seconds("seconds")))
        results = {}
        columns = ", ".join(name for name in _COLUMNS["result"].split() if name not in ("console", "plan"))
        for row in self._rows("result", columns=columns):
            number = row.whole("drill")
            results[number] = self._result(row, tuple(stages[number]))
        for row in self._rows("drill", "ORDER BY number"):
            number = row.whole("number")
            yield Drill(
                number=number,
                key=row.text("key"),
                repeat=row.whole("repeat"),
                title=row.text("title"),
                command=row.text("command"),
                options=_json_object(row.text("request")),
                kernel=row.text("kernel"),
                capture_kernel=row.text("capture_kernel"),
                machine=row.text("machine"),
                cpu=row.text("cpu"),
                mmu=row.text("mmu"),
                smp=row.whole("smp"),
                memory=row.whole("memory"),
                crashkernel=row.text("crashkernel"),
                placement=row.text("placement"),
                all_cpus=bool(row.whole("all_cpus")),
                capture=None if row["capture"] is None else row.whole("capture"),
                fault=row.text("fault"),
                seed=row.whole("seed"),
                known=row.text("known"),
                result=results.get(number),
            )

    def _result(self, row: _Values, stages: tuple[tuple[str, float], ...]) -> Result:
        record = _json_object(row.text("record"))
        return Result(
            verdict=row.one_of("verdict", ("PASS", "FAIL", "ERROR")),
            stage=row.text("stage"),
            reason=row.text("reason"),
            release=row.text("release"),
            capture_release=row.text("capture_release"),
            seconds=row.seconds("seconds"),
            boot_seconds=row.seconds("boot_seconds"),
            cpu_seconds=row.seconds("cpu_seconds"),
            started=row.text("started"),
            ended=row.text("ended"),
            worker=row.text("worker"),
            host=row.text("host"),
            attempt=row.whole("attempt"),
            stages=stages,
            compared=_count(record.get("bytes_compared")),
            told=tuple(str(fault["told"]) for fault in _objects(record.get("faults")) if fault.get("told")),
        )

    def _size(self, row: _Values) -> Size:
        result = _json_object(row.text("result"))
        others = [("estimated by crashkernel plan", result.get("estimate"))]
        others += [(f"recommended by {each.get('vendor')}", each.get("size")) for each in _objects(result.get("distributions"))]
        accounting = result.get("accounting")
        tables = ((peak, accounting.get(peak)) for peak in ("unpacking", "saving")) if isinstance(accounting, dict) else ()
        return Size(
            title=row.text("title"),
            command=str(result.get("command") or ""),
            found=row.whole("found"),
            recommended=None if row["recommended"] is None else row.whole("recommended"),
            failed=_count(result.get("failed")),
            passed=_count(result.get("passed")),
            drills=_count(result.get("drills")),
            compared=tuple((name, size) for name, said in others if (size := _count(said)) is not None),
            peaks=tuple(
                (peak, tuple((name, size) for name, said in table.items() if (size := _count(said))))
                for peak, table in tables
                if isinstance(table, dict)
            ),
            result=result,
        )

    def _evidence(self, wanted: set[int]) -> Iterator[tuple[int, Evidence]]:
        for number in sorted(wanted):
            for row in self._rows("result", f"WHERE drill = {number:d}", "record, console, plan"):
                record = _json_object(row.text("record"))
                failure = record.get("failure")
                failure = failure if isinstance(failure, dict) else {}
                lines = failure.get("console")
                console = row.text("console") or "\n".join(map(str, lines if isinstance(lines, list) else ()))
                problems = record.get("problems")
                plan = row.text("plan")
                if not plan and isinstance(record.get("plan"), dict):
                    plan = json.dumps(record["plan"])
                yield (
                    number,
                    Evidence(
                        console=console,
                        likely=str(failure.get("likely") or ""),
                        problems=tuple(map(str, problems)) if isinstance(problems, list) else (),
                        wrong=tuple(_wrong(record.get("wrong_ranges"))),
                        plan=plan,
                    ),
                )


class _Values:
    """One row, whose values are held against what they must be; NULL is 0 or ""."""

    def __init__(self, row: sqlite3.Row, where: str) -> None:
        self._row = row
        self._where = where

    def __getitem__(self, name: str) -> Any:
        return self._row[name]

    def text(self, name: str) -> str:
        """A text; bytes are taken for one."""
        value = self._row[name]
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        return "" if value is None else str(value)

    def whole(self, name: str) -> int:
        value = self._row[name]
        if value is None:
            return 0
        if not isinstance(value, int) or value < 0:
            raise self._refused(name, "a whole number, 0 or more")
        return value

    def seconds(self, name: str) -> float:
        value = self._row[name]
        if value is None:
            return 0.0
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise self._refused(name, "a number of seconds")
        return float(value)

    def one_of(self, name: str, allowed: tuple[Any, ...]) -> Any:
        if self._row[name] not in allowed:
            raise self._refused(name, f"one of {', '.join(allowed)}")
        return self._row[name]

    def _refused(self, name: str, wanted: str) -> FormatError:
        shown = repr(self._row[name])
        return FormatError(f"{name} = {shown if len(shown) < 60 else shown[:57] + '...'}: must be {wanted}", source=self._where)


def _json_object(text: str) -> dict[str, Any]:
    """What is no JSON object says nothing."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    """The objects of a list in JSON; what is none has none."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64 else None


def _wrong(ranges: Any) -> Iterator[tuple[Range, str]]:
    for each in _objects(ranges):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            yield fields.one_range(each["range"]), str(each.get("what") or "")


def _until_last(started: str, following: str | None, results: Sequence[Result]) -> float | None:
    """Seconds from the start of a run that was killed to the last result it had before the run that followed."""
    begin = moment(started)
    end = moment(following) if following else None
    ends = [when for result in results if (when := moment(result.ended)) is not None]
    if begin is None or (following and end is None):
        return None
    with contextlib.suppress(TypeError):  # one of them says its time zone, another does not
        inside = [when for when in ends if begin <= when and (end is None or when <= end)]
        return (max(inside) - begin).total_seconds() if inside else 0.0
    return None
