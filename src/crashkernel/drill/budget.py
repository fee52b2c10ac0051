"""What this host has for drills, and who has it: however they were started, together they never take more than there is.

Each drill enters what it takes into one ledger of the host, `LEDGER`, and waits until that is free, first come, first
served. An entry is a file that its drill holds under lock: one that is killed outright takes nothing any more. The lock of
the directory itself guards reading it and deciding. A drill works in a directory of its own, under lock as well: what a
killed drill left in one is removed by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from crashkernel.errors import EnvironmentFault, UsageError
from crashkernel.memory import format_size, parse_size

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (of the host, by intention)
LEDGER = _SHARED_MEMORY / "crashkernel-ledger"
CPUS_VARIABLE, MEMORY_VARIABLE = "CRASHKERNEL_CPUS", "CRASHKERNEL_MEMORY"
"""How much of this host all drills may have together, where that is less than it has."""
STAGES_VARIABLE = "CRASHKERNEL_STAGES"
"""A file to which a drill adds a line for each stage as it begins: how a campaign follows those it started."""

_FILES = 3  # RAM, its copy, K2's disk; a filtered dump is taken off that
_PROGRAMS = 512 << 20  # bytes: QEMU itself, the images, the judge
_PATIENCE = 0.2  # seconds between two looks at the ledger, of the first in the queue
_SELDOM = 20  # times that at the most, of those behind it


@dataclass(frozen=True, slots=True)
class Share:
    """CPUs, and bytes of memory."""

    cpus: int
    memory: int

    def __str__(self) -> str:
        return f"{self.cpus} CPU{'s' * (self.cpus != 1)} and {format_size(self.memory)}"


def drill_share(memory: int, cpus: int = 1, *, saved: bool = False) -> Share:
    """What a drill of a twin with `memory` bytes and `cpus` takes; `saved`: by `crashkernel capture`, not as a raw copy."""
    return Share(min(cpus, limit().cpus), (_FILES + saved) * memory + _PROGRAMS)


def limit() -> Share:
    """What all drills may have together: this host, or what the environment leaves of it.

    :raise UsageError: the environment says nonsense.
    """
    host = Share(len(os.sched_getaffinity(0)), _memory_said("MemTotal"))
    cpus, memory = os.environ.get(CPUS_VARIABLE, ""), os.environ.get(MEMORY_VARIABLE, "")
    if cpus and not (cpus.isdecimal() and int(cpus) > 0):
        raise UsageError(f"{CPUS_VARIABLE}={cpus} is no number of CPUs")
    return Share(int(cpus) if cpus else host.cpus, parse_size(memory) if memory else host.memory)


@contextlib.contextmanager
def working_directory(need: Share, waiting: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
    """A private directory with room for a drill, once its turn has come: in TMPDIR if that is set, else memory, else the disk.

    `waiting` is told what it waits for, whenever that changes.

    :raise EnvironmentFault: there is not enough room even if no other drill runs, or QEMU cannot use the path.
    """
    with _entered(need) as entry, private_directory(_turn(entry, waiting)) as directory:
        entry.note(directory)
        yield directory


@contextlib.contextmanager
def private_directory(place: Path) -> Iterator[Path]:
    """A directory below `place` that is gone when the context ends, or when the next drill begins there.

    :raise EnvironmentFault: QEMU cannot use the path.
    """
    with contextlib.ExitStack() as stack:
        with _guarded():  # until it is under lock it looks like a leftover
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix=_WORK, dir=place))
            directory = Path(name)
            if "," in name or len(name) > _LONGEST_SOCKET_PATH - len("/console.sock"):
                raise EnvironmentFault(f"QEMU cannot use {name}", hint="set TMPDIR to a short path without commas")
            lock = stack.enter_context((directory / _LOCK).open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory


def places() -> list[Path]:
    """Where drills work, the best first."""
    chosen = os.environ.get("TMPDIR")
    return [Path(chosen)] if chosen else [_SHARED_MEMORY, Path(tempfile.gettempdir())]


def place_with_room(share: Share) -> Path:
    """Where a drill that takes `share` is likely to work: what it leaves there can be moved, not copied."""
    return next((place for place in places() if _has_room(place, share.memory)), places()[-1])


def remove_leftovers() -> None:
    """Remove what drills left that were killed outright: gigabytes, in memory. A drill that lives holds its lock."""
    with _guarded():
        for path in [path for place in places() for path in place.glob(f"{_WORK}*/{_LOCK}")]:
            with contextlib.suppress(OSError), path.open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent, ignore_errors=True)


_NUMBER = re.compile("[0-9]{8,}")
_WORK = "crashkernel-drill-"
_LOCK = "lock"
_LONGEST_SOCKET_PATH = 107  # sun_path, include/uapi/linux/un.h


@dataclass(frozen=True, slots=True)
class Entry:
    """One drill of the ledger. `directory` is "" until its turn has come."""

    number: int  # in the order of arrival
    share: Share
    admitted: bool
    directory: str
    process: int

    def unused(self) -> int:
        """Bytes that an admitted drill may still take."""
        used = 0
        with contextlib.suppress(OSError):  # another user's: nobody may look
            used = sum(file.stat().st_blocks * 512 for file in os.scandir(self.directory)) if self.directory else 0
        return max(0, self.share.memory - used)


def ledger() -> list[Entry]:
    """The drills that run on this host or wait for their turn, in the order of their arrival."""
    with _guarded():
        return _read()


class _OwnEntry:
    def __init__(self, number: int, share: Share, descriptor: int) -> None:
        self.number, self.share = number, share
        self._descriptor = descriptor
        self._write(admitted=False, directory="")

    def admit(self) -> None:
        """With the ledger guarded."""
        self._write(admitted=True, directory="")

    def note(self, directory: Path) -> None:
        """Say where the drill works."""
        with _guarded():
            self._write(admitted=True, directory=str(directory))

    def _write(self, *, admitted: bool, directory: str) -> None:
        fields = {**asdict(self.share), "admitted": admitted, "directory": directory, "process": os.getpid()}
        text = json.dumps(fields).encode()
        os.pwrite(self._descriptor, text, 0)
        os.ftruncate(self._descriptor, len(text))


@contextlib.contextmanager
def _entered(share: Share) -> Iterator[_OwnEntry]:
    with contextlib.ExitStack() as stack:
        with _guarded():
            _read()  # for the dead that may be removed; of another user's the file stays, and its number is taken
            number = max((int(path.name) for path in _files()), default=0) + 1
            path = LEDGER / f"{number:08}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            stack.callback(os.close, descriptor)
            stack.callback(path.unlink, missing_ok=True)
            os.fchmod(descriptor, 0o644)  # whatever the umask: who cannot read it would take what this drill has
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            entry = _OwnEntry(number, share, descriptor)
        yield entry


def _turn(own: _OwnEntry, waiting: Callable[[str], None]) -> Path:
    """Wait until there is room, and nobody who came earlier waits for it; where the room is."""
    told, waited, ahead = "", False, 0
    while True:
        if not ahead:
            remove_leftovers()
        with _guarded():
            entries = [entry for entry in _read() if entry.number != own.number]
            admitted = [entry for entry in entries if entry.admitted]
            ahead = sum(not entry.admitted and entry.number < own.number for entry in entries)
            reason = f"{ahead} drill{'s' * (ahead > 1)} that came earlier" if ahead else _shortage(own.share, admitted)
            place = None if reason else _roomy(own.share, admitted)
            if place:
                own.admit()
                return place
        if not reason and not admitted:
            raise EnvironmentFault(
                f"a drill needs {format_size(own.share.memory)} of room in {' or '.join(map(str, places()))}",
                hint="free some, set TMPDIR, or use a smaller --memory",
            )
        reason = reason or f"{format_size(own.share.memory)} of room"
        if waited and reason != told:  # a turn that comes at once is no waiting
            waiting(told := reason)
        waited = True
        time.sleep(_PATIENCE * min(1 + ahead, _SELDOM))  # a long queue that looks all the time is a load of its own


def _shortage(share: Share, admitted: list[Entry]) -> str:
    """What of the limit is taken by others, "" if enough is left. A drill that is larger than the limit runs alone."""
    if not admitted:
        return ""
    bound = limit()
    if share.cpus + (taken := sum(entry.share.cpus for entry in admitted)) > bound.cpus:
        return f"{share.cpus} of {bound.cpus} CPUs, {taken} are taken"
    if share.memory + (taken := sum(entry.share.memory for entry in admitted)) > bound.memory:
        return f"{format_size(share.memory)} of {format_size(bound.memory)}, {format_size(taken)} are taken"
    return ""


def _roomy(share: Share, admitted: list[Entry]) -> Path | None:
    """The first place with room for `share` beside what others were promised and have not taken yet."""
    promised = sum(entry.unused() for entry in admitted)
    return next((place for place in places() if _has_room(place, share.memory + promised)), None)


def _has_room(place: Path, wanted: int) -> bool:
    try:
        room = os.access(place, os.W_OK) and shutil.disk_usage(place).free > wanted
    except OSError:
        return False
    return room and (place != _SHARED_MEMORY or _memory_said("MemAvailable") > wanted)


def _memory_said(name: str) -> int:
    # in KiB (Documentation/filesystems/proc.rst)
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    try:
        LEDGER.mkdir(exist_ok=True)
        if LEDGER.stat().st_uid == os.geteuid():
            LEDGER.chmod(0o1777)  # for the drills of every user; mkdir's mode is subject to the umask
        descriptor = os.open(LEDGER, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise EnvironmentFault(f"cannot keep a ledger of drills in {LEDGER}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _files() -> list[Path]:
    """The entries, the living's and the dead's."""
    return [path for path in LEDGER.iterdir() if _NUMBER.fullmatch(path.name)]


def _read() -> list[Entry]:
    """With the ledger guarded: its entries. Those of the dead are removed, but for other users' (the directory is sticky)."""
    entries = []
    for path in sorted(_files()):
        with contextlib.suppress(OSError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                entries.append(_entry(path.name, file.read()))
            else:
                path.unlink()
    return entries


def _entry(name: str, text: bytes) -> Entry:
    raw = json.loads(text)
    return Entry(int(name), Share(raw["cpus"], raw["memory"]), raw["admitted"], raw["directory"], raw["process"])
