"""How many pages a filter finds of each class: as ours says it (`filterpass`), and as makedumpfile reports it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from crashkernel.errors import FormatError

_REPORTED = {
    "cache": "Non-private cache pages",
    "cache_private": "Private cache pages",
    "user": "User process data pages",
    "free": "Free pages",
    "poisoned": "Hwpoison pages",
    "offline": "Offline pages",
}
_ZEROS, _REMAINING = "Pages filled with zero", "Remaining pages"
_FIGURE = re.compile(r"^\s*([A-Z][A-Za-z -]*?)\s*: 0x([0-9a-f]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages by class; `kept` ones with those that are all zeros, which no filter of page structs knows."""

    kept: int
    cache: int
    cache_private: int
    user: int
    free: int
    poisoned: int
    offline: int

    @classmethod
    def from_report(cls, text: str, twice: int) -> PageCounts:
        """What makedumpfile reports at its end (message level 16).

        It takes the pages it started from as the sum of the vmcore's segments and reports those remaining of that sum, so what
        segments describe `twice`, so many pages, is taken off here. Those that it excluded it counts one by one.

        :raise FormatError: it is no such report.
        """
        found = {name: int(figure, 16) for name, figure in _FIGURE.findall(text)}
        try:
            kept = found[_REMAINING] + found[_ZEROS] - twice
            return cls(kept, **{name: found[title] for name, title in _REPORTED.items()})
        except KeyError as error:
            raise FormatError(f"makedumpfile reports no {error}", source="its report") from error

    def differences(self, other: PageCounts) -> tuple[str, ...]:
        """Classes whose counts differ, with both."""
        pairs = ((each.name, getattr(self, each.name), getattr(other, each.name)) for each in fields(self))
        return tuple(f"{name} {mine:,}, not {theirs:,}" for name, mine, theirs in pairs if mine != theirs)


@dataclass(frozen=True, slots=True)
class FilterPass:
    """What one pass of our filter found, and what it doubts."""

    counts: PageCounts
    doubts: tuple[str, ...]

    def to_json(self) -> str:
        """In one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> FilterPass:
        """Of the last line of what `filterpass` said.

        :raise FormatError: it is none.
        """
        try:
            raw: Any = json.loads(text.strip().splitlines()[-1])
            return cls(PageCounts(**raw["counts"]), tuple(raw["doubts"]))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise FormatError(f"no result: {text[-200:]!r}", source="our filter") from error
