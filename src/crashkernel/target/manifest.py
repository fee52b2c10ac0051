"""The manifest beside a dump: what it is, how whole it is, and a digest to hold it against.

The digest (`PIECES`): the file is cut into pieces of 4 MiB, the last one shorter; the sha256 of each, in order, and sha256 over
all of these is the root. So a file's digest is taken by as many threads as there are CPUs, a stream's as it goes by, and an
interrupted transfer is resumed at a piece. An empty file has no pieces: its root is the sha256 of nothing.

The last field, `sign_off`, is the sha256 of the canonical JSON of all the others (sorted keys, no spaces, ASCII): a manifest
that was cut, damaged or edited says so. It is no signature: whoever can write the file can sign it off.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, cast, get_args

from crashkernel.errors import FormatError
from crashkernel.formats.fields import boolean, count, line, mapping, one_of, text

PIECE_SIZE = 4 << 20  # bytes
PIECES = "sha256-pieces"
_HASH_SIZE = 32
_FEW = 4  # pieces that are not worth a thread
_READ_SIZE = 256 << 10
"""What is read at once: small enough to be hashed out of a CPU's cache."""

DumpFormat = Literal["kdump-compressed", "flattened", "elf"]

_VERSION = 1
_MAX_SIZE = 1 << 63
_MAX_PAGES = 1 << 52
_MAX_MANIFEST = 1 << 20
"""A manifest is some hundred bytes; whoever reads one from outside reads no more than this."""

SUFFIX = ".manifest.json"


def manifest_name(dump: str) -> str:
    """The name of the manifest beside the dump of this name."""
    return dump + SUFFIX


@dataclass(frozen=True, slots=True)
class Digest:
    """A digest over pieces: the root as 64 hexadecimal digits."""

    root: str
    piece_size: int = PIECE_SIZE  # bytes
    algorithm: str = PIECES


class PieceHasher:
    """The digest of a stream, as it goes by."""

    def __init__(self) -> None:
        self.size = 0  # bytes seen
        self._root = hashlib.sha256()
        self._piece = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        view = memoryview(data)
        while view:
            room = PIECE_SIZE - self.size % PIECE_SIZE
            self._piece.update(view[:room])
            self.size += min(len(view), room)
            if len(view) >= room:
                self._root.update(self._piece.digest())
                self._piece = hashlib.sha256()
            view = view[room:]

    def digest(self) -> Digest:
        """The digest of what was seen so far."""
        root = self._root.copy()
        if self.size % PIECE_SIZE:
            root.update(self._piece.digest())
        return Digest(root.hexdigest())


def digest_of_pieces(pieces: bytes | bytearray) -> Digest:
    """The digest of a file, given the sha256 of each of its pieces, one after the other."""
    return Digest(hashlib.sha256(pieces).hexdigest())


def digest_file(
    descriptor: int,
    size: int,
    *,
    start: int = 0,
    workers: int | None = None,
    known: Mapping[int, bytes] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Digest:
    """The digest of `size` bytes of an open file from file offset `start` on, by so many threads (default: one for each CPU).

    `known` has the sha256 of pieces, by their number, that are not to be read again. `progress` is called after each piece.
    Memory does not grow with the file but for 32 bytes a piece.

    :raise OSError: it cannot be read, or ends before.
    """
    known = known or {}
    number_of_pieces = -(-size // PIECE_SIZE)
    pieces = bytearray(_HASH_SIZE * number_of_pieces)
    numbers = iter(range(number_of_pieces))
    turn = threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not failures:
                with turn:
                    number = next(numbers, None)
                if number is None:
                    return
                digest = known.get(number)
                if digest is None:
                    file_offset = start + number * PIECE_SIZE
                    digest = piece_digest(descriptor, file_offset, min(PIECE_SIZE, start + size - file_offset))
                    progress()
                pieces[number * _HASH_SIZE : (number + 1) * _HASH_SIZE] = digest
        except BaseException as error:
            failures.append(error)

    missing = number_of_pieces - len(known)
    workers = max(1, min(workers or len(os.sched_getaffinity(0)), missing // _FEW))
    threads = [threading.Thread(target=work, name="digest", daemon=True) for _ in range(workers - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return digest_of_pieces(pieces)


def piece_digest(descriptor: int, file_offset: int, size: int) -> bytes:
    """The sha256 of `size` bytes of an open file.

    :raise OSError: it cannot be read, or ends before.
    """
    digest, end = hashlib.sha256(), file_offset + size
    while file_offset < end:
        data = os.pread(descriptor, min(_READ_SIZE, end - file_offset), file_offset)
        if not data:
            raise OSError(0, f"the file ends at {file_offset:,}, before its {end:,} bytes")
        digest.update(data)
        file_offset += len(data)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class PageCounts:
    """K1's pages by what became of them. `zero` and `unreadable` ones are among those kept, the rest are not in the dump."""

    kept: int = 0
    zero: int = 0  # kept ones that are all zeros and share one place in the dump
    unreadable: int = 0  # kept ones that the source would not give: the dump has zeros for them
    cache: int = 0
    cache_private: int = 0
    user: int = 0
    free: int = 0
    poisoned: int = 0
    offline: int = 0

    @property
    def dropped(self) -> int:
        """Pages that are not in the dump."""
        return self.cache + self.cache_private + self.user + self.free + self.poisoned + self.offline


@dataclass(frozen=True, slots=True)
class Contents:
    """What a writer knows of the dump that it wrote: all that does not depend on where it went.

    `panic` is the line of K1's log, "" if none was found. What is not printable (it is a dead kernel's memory) becomes "?".
    """

    format: DumpFormat
    codec: str  # "zstd", "lzo", "snappy", "zlib", "none"
    level: int  # the dump level, 0 to 31
    page_size: int  # bytes
    pages: PageCounts
    release: str  # K1's kernel release
    machine: str  # as uname -m has it
    panic: str = ""
    crash_time: int | None = None  # seconds since 1970, UTC

    def __post_init__(self) -> None:
        for name in ("release", "machine", "panic"):
            printable = "".join(c if c.isprintable() else "?" for c in getattr(self, name))
            object.__setattr__(self, name, printable)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What stands beside a whole dump. It exists only for whole ones: `complete` is true in each."""

    file: str  # the dump's name, without a directory
    size: int  # bytes
    digest: Digest
    contents: Contents
    encrypted_to: str | None = None  # the age recipient, or None for a dump in the clear
    complete: bool = True

    def renamed(self, file: str) -> Manifest:
        """The same, for the same bytes by another name."""
        return replace(self, file=file)

    def to_json(self) -> str:
        """The manifest as it is stored, with its sign-off."""
        record = self._record()
        return json.dumps({**record, "sign_off": _sign_off(record)}, indent=1) + "\n"

    def _record(self) -> dict[str, Any]:
        contents = self.contents
        return {
            "manifest": _VERSION,
            "file": self.file,
            "bytes": self.size,
            "digest": {"algorithm": self.digest.algorithm, "piece_size": self.digest.piece_size, "root": self.digest.root},
            "dump": {
                "format": contents.format,
                "codec": contents.codec,
                "level": contents.level,
                "page_size": contents.page_size,
            },
            "pages": asdict(contents.pages),
            "crash": {
                "release": contents.release,
                "machine": contents.machine,
                "panic": contents.panic,
                "time": contents.crash_time,
            },
            "encrypted_to": self.encrypted_to,
            "complete": self.complete,
        }

    @classmethod
    def from_json(cls, data: str | bytes, source: str = "manifest") -> Manifest:
        """Read a manifest back.

        :raise FormatError: it is none, is of another version, or does not match its own sign-off.
        """
        hint = "the dump beside it may be good all the same: verify it without its manifest"
        try:
            if len(data) > _MAX_MANIFEST:
                raise ValueError(f"{len(data):,} bytes are too many")
            raw = mapping(json.loads(data))
            signed = raw.pop("sign_off", None)
            if raw.get("manifest") != _VERSION:
                raise ValueError(f"it is of version {raw.get('manifest')!r}, not {_VERSION}")
            if not isinstance(signed, str) or signed != _sign_off(raw):
                raise ValueError("its sign-off does not match it: it was damaged or edited")
            return cls._from_record(raw)
        except KeyError as error:
            raise FormatError(f"no manifest of a dump: it lacks {error}", source=source, hint=hint) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise FormatError(f"no manifest of a dump: {error}", source=source, hint=hint) from error

    @classmethod
    def _from_record(cls, raw: dict[str, Any]) -> Manifest:
        digest, dump, pages, crash = (mapping(raw[name]) for name in ("digest", "dump", "pages", "crash"))
        if not boolean(raw["complete"]):
            raise ValueError("it says of itself that the dump is not complete")
        return cls(
            file=_file_name(raw["file"]),
            size=count(raw["bytes"], _MAX_SIZE),
            digest=Digest(
                algorithm=one_of(digest["algorithm"], (PIECES,)),
                piece_size=_one_number(digest["piece_size"], PIECE_SIZE),
                root=_hash(digest["root"]),
            ),
            contents=Contents(
                format=cast("DumpFormat", one_of(dump["format"], get_args(DumpFormat))),
                codec=line(dump["codec"]),
                level=count(dump["level"], 32),
                page_size=count(dump["page_size"], 1 << 31),
                pages=PageCounts(**{field.name: count(pages[field.name], _MAX_PAGES) for field in fields(PageCounts)}),
                release=line(crash["release"]),
                machine=line(crash["machine"]),
                panic=line(crash["panic"]),
                crash_time=None if crash["time"] is None else count(crash["time"], 1 << 62),
            ),
            encrypted_to=None if raw["encrypted_to"] is None else line(raw["encrypted_to"]),
        )


def _sign_off(record: dict[str, Any]) -> str:
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _file_name(value: Any) -> str:
    name = line(value)
    if not name or "/" in name or name in (".", ".."):
        raise ValueError(f"{name!r} is no file's name")
    return name


def _hash(value: Any) -> str:
    digits = text(value)
    if len(digits) != 2 * _HASH_SIZE or not set(digits) <= set("0123456789abcdef"):
        raise ValueError(f"{digits!r} is no sha256")
    return digits


def _one_number(value: Any, only: int) -> int:
    if count(value, only + 1) != only:
        raise ValueError(f"{value} is not {only}")
    return only
