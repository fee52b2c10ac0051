"""How K2 saves K1's memory when `crashkernel capture` does it: what it is told, and what it took."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from crashkernel.errors import UsageError

Destination = Literal["disk", "network"]
DESTINATIONS: tuple[Destination, ...] = ("disk", "network")
MAX_LEVEL = 31
CODECS = ("zstd", "lzo", "snappy", "zlib", "none")


@dataclass(frozen=True, slots=True)
class Saving:
    """`crashkernel capture` in place of a raw copy: the dump level, the codec, and where K2 sends the dump."""

    level: int
    codec: str = "zstd"
    to: Destination = "disk"

    def __post_init__(self) -> None:
        if not 0 <= self.level <= MAX_LEVEL:
            raise UsageError(
                f"--capture {self.level}: a dump level is 0 to {MAX_LEVEL}",
                hint="1 drops pages of zeros, 2 page cache, 4 the same with private data, 8 user data, 16 free pages: add up",
            )

    def arguments(self, *targets: str) -> tuple[str, ...]:
        """What `crashkernel capture` is given behind the vmcore: the first of the targets that takes it gets the dump."""
        return f"--level={self.level}", f"--codec={self.codec}", *(f"--to={target}" for target in targets)

    @property
    def title(self) -> str:
        """For people, in one line."""
        return f"crashkernel capture at level {self.level}, {self.codec}, to {self.to}"


FOOTPRINT_WORDS = ("booted", "memory", "peak")
"""The guest's messages that `Footprint.take` takes."""

AVAILABLE = "MemAvailable"
_FIELD = re.compile(r"(\w+):(\d{1,15})")


@dataclass(slots=True)
class Footprint:
    """What K2 says of its own memory; sizes in bytes. Empty where it did not get so far.

    `booted` are lines of its log; `before` and `low` are /proc/meminfo, before the dump is saved and when the least was
    available (Documentation/filesystems/proc.rst).
    """

    booted: list[str] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    low: dict[str, int] = field(default_factory=dict)
    peak: int = 0  # resident, of `crashkernel capture` itself
    peak_of_child: int = 0  # resident, of its largest child: pages that it shares with its parent count in both

    def take(self, kind: str, words: str) -> None:
        """Take one of the guest's messages about memory; its numbers are KiB."""
        if kind == "booted":
            self.booted.append(words)
        elif kind == "memory":
            self.low = {name: int(number) << 10 for name, number in _FIELD.findall(words)}
            self.before = self.before or self.low
        elif kind == "peak":
            self.peak, self.peak_of_child = (int(word) << 10 for word in words.split())

    @property
    def total(self) -> int:
        """What K2's kernel manages, in bytes: without what it reserved at boot."""
        return self.before.get("MemTotal", 0)

    @property
    def available(self) -> int:
        """What could be had of it before the dump was saved."""
        return self.before.get(AVAILABLE, 0)

    @property
    def least(self) -> int:
        """What could be had of it when that was least."""
        return self.low.get(AVAILABLE, 0)
