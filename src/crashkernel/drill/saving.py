"""How K2 saves K1's memory when `crashkernel capture` does it: what it is told, and what it took."""

from __future__ import annotations

from dataclasses import dataclass
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

    def arguments(self, target: str) -> tuple[str, ...]:
        """What `crashkernel capture` is given behind the vmcore."""
        return f"--level={self.level}", f"--codec={self.codec}", f"--to={target}"

    @property
    def title(self) -> str:
        """For people, in one line."""
        return f"crashkernel capture at level {self.level}, {self.codec}, to {self.to}"


FOOTPRINT_WORDS = ("memory", "peak")
"""The guest's messages that `Footprint.take` takes."""


@dataclass(slots=True)
class Footprint:
    """What the capture took of K2's memory, in bytes. `least` is what was available when least was."""

    total: int = 0
    available: int = 0  # before
    least: int = 0  # while it ran
    peak: int = 0  # resident, of the process itself
    peak_of_child: int = 0  # resident, of its largest child: pages that it shares with its parent count in both

    def take(self, kind: str, words: str) -> None:
        """Take one of the guest's messages about memory; its numbers are KiB."""
        numbers = [int(word) << 10 for word in words.split()]
        if kind == "memory":
            self.total, self.available, self.least = numbers
        elif kind == "peak":
            self.peak, self.peak_of_child = numbers
