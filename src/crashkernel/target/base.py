"""What every target is: the order of its calls, how it fails, and how it shows that it is alive."""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from crashkernel.errors import EnvironmentFault
from crashkernel.target.manifest import Contents, Manifest

INCOMPLETE = ".incomplete"
"""What the name of a dump ends in as long as it is not whole; where that name is taken, in `.incomplete-1` and so on."""

DUMP = "vmcore"
LOG = "vmcore-dmesg.txt"
"""The names that kdump's users know (kdump-utils): the dump, and K1's log beside it."""

SLOWEST = 4 << 20
"""Bytes a second below which a disk is held to be dead while it flushes or reads back what was written to it."""


class TargetFailed(EnvironmentFault):
    """A target did not take the dump: its disk is full, it does not answer, what arrived is not what was sent."""

    def __init__(self, target: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"{target}: {reason}", hint=hint)
        self.target = target
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Saved:
    """A whole dump: where it is, in words for the user, and its manifest."""

    place: str
    manifest: Manifest


class Heartbeat:
    """When something last got on with it; shared with the processes that are forked after it was made."""

    _TIME = struct.Struct("=d")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self._TIME.size)
        self.beat()

    def beat(self, allow: float = 0) -> None:
        """There is progress now; or there will be none to be seen for `allow` seconds, which is all right."""
        self._TIME.pack_into(self._memory, 0, time.monotonic() + allow)

    @property
    def silence(self) -> float:
        """Seconds without progress; below 0 while it is allowed."""
        return time.monotonic() - float(self._TIME.unpack_from(self._memory)[0])


class Target(Protocol):
    """Where a dump goes. Calls come in this order: `begin`, `put` (any number), `open`, then `settled` (if at all)
    while it is written, then `commit` or `abort`.

    All but `abort` and `warnings` raise `TargetFailed` or OSError. Whatever happens, also if the process is killed between
    any two instructions: nothing but a whole dump bears a dump's name.
    """

    name: str  # for messages: "file /var/crash", "ssh root@host:/var/crash"
    leftover: Path | None  # a local file, with "incomplete" in its name, that is of no use once another target has the dump

    @property
    def failure(self) -> Exception | None:
        """What went wrong where the writer cannot see it: it only finds a pipe closed."""
        ...

    def warnings(self) -> list[str]:
        """What is to be known before it is begun, in sentences."""
        ...

    def begin(self, crash: str, alive: Heartbeat) -> None:
        """Make room for the crash of this name; a target that keeps many gives each its own directory."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Store a small file beside the dump to come, whole or not at all."""
        ...

    def open(self) -> int:
        """The descriptor to write the dump to; a seekable file, or a pipe. It stays the target's to close."""
        ...

    def settled(self, start: int, end: int) -> None:
        """The file's bytes from offset `start` to `end` will not be written again: the target may see to them already.

        Ranges grow from one start: each call has the `start` of the one before, and an `end` not below its own.
        (0, 0) says nothing.
        """
        ...

    def commit(self, contents: Contents) -> Saved:
        """Everything was written: make it whole. Only now the dump gets its name."""
        ...

    def abort(self) -> None:
        """Stop and let go of everything; what was stored keeps its incomplete name. Harmless at any time."""
        ...
