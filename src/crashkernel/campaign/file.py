"""The campaign file: TOML that lists drills, most of them as a product of options. docs/campaigns.md describes it.

`load_campaign` gives the drills one by one, in the file's order. A drill's key, and the seed of its faults, depend on the
drill alone and on the campaign's seed: whatever is added to a file, or moved in it, changes no other drill.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from crashkernel.drill.request import DrillRequest
from crashkernel.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

MOST_DRILLS = 100_000
"""More than this is a slip of the pen: four months of one machine's time."""
DEFAULT_DEADLINE = 1200
"""Seconds that one drill may take, its turn not waited for; most take 10 to 60."""

_OPTIONS = tuple(field.name.replace("_", "-") for field in fields(DrillRequest))
_ALIKE = 0.7
"""From which ratio of difflib's on a word is taken for a misspelt one: excludes, excluded, exlude, include."""
_LARGEST = (1 << 63) - 1  # that a database holds
_TOP = ("name", "repeats", "seed", "deadline", "defaults", "matrix", "drill", "known")


@dataclass(frozen=True, slots=True)
class PlannedDrill:
    """One drill of a campaign."""

    request: DrillRequest
    repeat: int = 1  # counts from 1
    known: str = ""  # why it is known to fail; "": it is to pass
    seeded: bool = False  # its seed is in the file, not made of the campaign's

    @property
    def title(self) -> str:
        """One line for people."""
        seed = f", seed {self.request.seed}" if self.seeded else ""
        return self.request.title + seed + (f", repeat {self.repeat}" if self.repeat > 1 else "")

    @property
    def key(self) -> str:
        """A digest of what is drilled, and which time."""
        return _digest(self.request.options(), self.repeat)[:16]


@dataclass(frozen=True, slots=True)
class Campaign:
    """What a campaign file says. `deadline` is in seconds, for one drill."""

    name: str
    path: str
    text: str
    drills: tuple[PlannedDrill, ...]
    deadline: int = DEFAULT_DEADLINE


def load_campaign(path: Path) -> Campaign:
    """Read a campaign file.

    :raise UsageError: it cannot be read, or says something that makes no sense: the message names the file and the key.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="give the path of a campaign file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: no text in UTF-8, as TOML is") from error
    return parse_campaign(text, str(path))


def parse_campaign(text: str, path: str) -> Campaign:
    """Read the text of a campaign file; `path` is its name in messages.

    :raise UsageError: it says something that makes no sense.
    """
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError that is no TOMLDecodeError
        raise UsageError(f"{path}: {error}") from error
    try:
        return _campaign(raw, text, path)
    except _Wrong as error:
        raise UsageError(f"{path}: {error}", hint=error.hint) from error


class _Wrong(Exception):
    """What is wrong, with the place in the file in front."""

    def __init__(self, place: str, message: str, hint: str = "") -> None:
        super().__init__(f"{place}: {message}")
        self.hint = hint


@dataclass(frozen=True, slots=True)
class _Found:
    """A drill's options as the file has them, and where."""

    place: str
    options: dict[str, Any]
    repeats: int


def _campaign(raw: dict[str, Any], text: str, path: str) -> Campaign:
    for key in raw:
        if key not in _TOP:
            raise _Wrong(key, "no key of a campaign file", f"choose of {', '.join(_TOP)}")
    name = raw.get("name")
    if not (isinstance(name, str) and name.strip() and name.isprintable()):
        raise _Wrong("name", "must be a text: what this campaign is called")
    repeats = _whole(raw, "repeats", "", 1, least=1)
    seed = _whole(raw, "seed", "", 0)
    deadline = _whole(raw, "deadline", "", DEFAULT_DEADLINE, least=1)
    defaults = _table(raw.get("defaults", {}), "defaults")
    _sketch(defaults, "defaults")
    found: list[_Found] = []
    for number, block in enumerate(_tables(raw, "matrix"), 1):
        found += _matrix(block, defaults, f"matrix {number}", repeats)
    for number, block in enumerate(_tables(raw, "drill"), 1):
        place = f"drill {number}"
        found.append(_Found(place, {k: v for k, v in block.items() if k != "repeats"}, _repeats(block, place, repeats)))
    if not found:
        raise _Wrong("matrix", "the file lists no drill", "add a [[matrix]] or a [[drill]]")
    if (total := sum(each.repeats for each in found)) > MOST_DRILLS:
        raise _Wrong("repeats", f"{total:,} drills are more than {MOST_DRILLS:,}")
    drills = _distinct(found, defaults, seed)
    return Campaign(name.strip(), path, text, tuple(_marked(drills, _tables(raw, "known"))), deadline)


def _matrix(block: dict[str, Any], defaults: Mapping[str, Any], place: str, repeats: int) -> Iterator[_Found]:
    """The product of the block's axes, without what it excludes."""
    own = _repeats(block, place, repeats)
    axes = [_axis(name, value, place) for name, value in block.items() if name not in ("repeats", "exclude")]
    if (size := math.prod(len(axis) for axis in axes)) > MOST_DRILLS:
        raise _Wrong(place, f"{size:,} drills are more than {MOST_DRILLS:,}")
    excludes = [_Match(table, f"{place}: exclude {number}") for number, table in enumerate(_tables(block, "exclude", place), 1)]
    hits: Counter[str] = Counter()
    kept, sketches = [], []
    for values in itertools.product(*axes):
        options: dict[str, Any] = {}
        for value in values:
            if twice := options.keys() & value.keys():
                raise _Wrong(place, f"{' and '.join(sorted(twice))} come from two axes")
            options |= value
        # what no machine has, such as radix on POWER8, may be excluded: only what stays must make sense
        sketches.append(sketch := _sketch({**defaults, **options}, place))
        out = [exclude.place for exclude in excludes if exclude.matches(sketch)]
        hits.update(out)
        if not out:
            kept.append(_Found(place, options, own))
    for exclude in excludes:
        if not hits[exclude.place]:
            raise _Wrong(exclude.place, "matches no drill of this matrix")
        exclude.require_use(sketches, "of this matrix")
    if not kept:
        raise _Wrong(place, "no drill is left", "exclude less, or leave the matrix out")
    yield from kept


def _axis(name: str, value: Any, place: str) -> list[dict[str, Any]]:
    """The points of one axis, each some options. A list of tables, by any name, is an axis of options that go together."""
    if name not in _OPTIONS:
        if get_close_matches(name.lower(), ["exclude"], cutoff=_ALIKE):
            raise _Wrong(
                f"{place}: {name}", "too much like exclude for an axis's name", "write exclude, or choose another name"
            )
        if not (isinstance(value, list) and all(isinstance(point, dict) for point in value)):
            raise _Wrong(
                f"{place}: {name}",
                "no option of a drill, nor a list of tables of options",
                f"the options are {', '.join(_OPTIONS)}",
            )
        points = [each for table in value for each in _product(table, f"{place}: {name}")]
    elif isinstance(value, list):
        points = [{name: _words(name, each)} for each in value]
    else:
        points = [{name: _words(name, value)}]
    if not points:
        raise _Wrong(f"{place}: {name}", "an empty list leaves no drill")
    return points


def _product(table: dict[str, Any], place: str) -> Iterator[dict[str, Any]]:
    for name in table:
        if name not in _OPTIONS:
            raise _Wrong(f"{place}: {name}", "no option of a drill", f"the options are {', '.join(_OPTIONS)}")
    for points in itertools.product(*(_axis(name, value, place) for name, value in table.items())):
        yield {name: value for point in points for name, value in point.items()}


def _words(name: str, value: Any) -> Any:
    """The words of `fault` may be one text."""
    return value.split() if name == "fault" and isinstance(value, str) else value


def _distinct(found: Sequence[_Found], defaults: Mapping[str, Any], seed: int) -> list[PlannedDrill]:
    """The drills, with seeds for their faults; none of them twice."""
    places: dict[str, str] = {}
    drills = []
    for each in found:
        request = _request(defaults, each.options, each.place)
        seeded = "seed" in each.options or "seed" in defaults
        for repeat in range(1, each.repeats + 1):
            own = request if seeded or not request.fault else replace(request, seed=_seed(request, repeat, seed))
            drill = PlannedDrill(own, repeat, seeded=seeded)
            if first := places.get(drill.key):
                raise _Wrong(each.place, f"{drill.title!r} was listed before, by {first}", "list each drill once")
            places[drill.key] = each.place
            drills.append(drill)
    return drills


def _marked(drills: Sequence[PlannedDrill], known: Iterable[dict[str, Any]]) -> list[PlannedDrill]:
    """The drills, with the reason for those that are known to fail."""
    marked = list(drills)
    for number, table in enumerate(known, 1):
        place = f"known {number}"
        for name in table:
            if name not in ("match", "reason"):
                raise _Wrong(f"{place}: {name}", "no key of [[known]]", "it has match and reason")
        reason = table.get("reason")
        if not (isinstance(reason, str) and reason.strip() and reason.isprintable()):
            raise _Wrong(f"{place}: reason", "must be a text of one line: why these drills fail")
        match = _Match(_table(table.get("match"), f"{place}: match"), f"{place}: match")
        hits = [at for at, drill in enumerate(marked) if match.matches(drill.request)]
        if not hits:
            raise _Wrong(f"{place}: match", "matches no drill of this file")
        match.require_use([drill.request for drill in drills], "of this file")
        for at in hits:
            marked[at] = replace(marked[at], known=marked[at].known or reason.strip())
    return marked


class _Match:
    """A table that says which drills are meant: each option has the value, or one of the list. Texts may have * and ?."""

    def __init__(self, table: dict[str, Any], place: str) -> None:
        self.place = place
        if not table:
            raise _Wrong(place, "an empty table would match every drill")
        for name in table:
            if name not in _OPTIONS:
                raise _Wrong(f"{place}: {name}", "no option of a drill", f"the options are {', '.join(_OPTIONS)}")
        self._wanted = {name: value if isinstance(value, list) else [value] for name, value in table.items()}

    def matches(self, request: DrillRequest) -> bool:
        """Whether this drill is meant."""
        return all(
            any(self._alike(getattr(request, name.replace("-", "_")), value) for value in wanted)
            for name, wanted in self._wanted.items()
        )

    def require_use(self, requests: Iterable[DrillRequest], where: str) -> None:
        """Refuse a value that its option has in none of these drills."""
        seen: dict[str, set[Any]] = {name: set() for name in self._wanted}
        for request in requests:
            for name, values in seen.items():
                values.add(getattr(request, name.replace("-", "_")))
        for name, wanted in self._wanted.items():
            for value in wanted:
                if not any(self._alike(own, value) for own in seen[name]):
                    raise _Wrong(f"{self.place}: {name}", f"{value!r} matches no drill {where}")

    @staticmethod
    def _alike(own: Any, wanted: Any) -> bool:
        if isinstance(own, tuple):
            own = " ".join(own)
        if isinstance(own, str) and isinstance(wanted, str):
            return fnmatchcase(own, wanted)
        return type(own) is type(wanted) and bool(own == wanted)


def _request(defaults: Mapping[str, Any], options: Mapping[str, Any], place: str) -> DrillRequest:
    try:
        return DrillRequest.from_options({name: _words(name, value) for name, value in {**defaults, **options}.items()})
    except UsageError as error:
        raise _Wrong(place, error.message, error.hint) from error


def _sketch(options: Mapping[str, Any], place: str) -> DrillRequest:
    """A drill to be matched, which need not be one that can be had."""
    try:
        return DrillRequest.sketch({name: _words(name, value) for name, value in options.items()})
    except UsageError as error:
        raise _Wrong(place, error.message, error.hint) from error


def _seed(request: DrillRequest, repeat: int, seed: int) -> int:
    return int(_digest(request.options(), repeat, seed)[:8], 16) >> 1


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _repeats(block: Mapping[str, Any], place: str, otherwise: int) -> int:
    return _whole(block, "repeats", f"{place}: ", otherwise, least=1)


def _whole(table: Mapping[str, Any], name: str, place: str, otherwise: int, least: int = 0) -> int:
    value = table.get(name, otherwise)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
        raise _Wrong(f"{place}{name}", f"must be a whole number, {least} or more, that a database can hold")
    return value


def _table(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(place, "must be a table of options")
    return value


def _tables(table: Mapping[str, Any], name: str, place: str = "") -> list[dict[str, Any]]:
    value = table.get(name, [])
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise _Wrong(f"{place}: {name}" if place else name, "must be a list of tables", "" if place else f"write [[{name}]]")
    return value
