"""What a receiver stores, and how it goes on after it was interrupted.

An upload is one crash: a directory that nobody else gets, K1's log in it, and a dump that arrives in pieces of 4 MiB, one after
the other, unpacked as it arrives. Each piece is on the disk before it is acknowledged, and so is a line of the upload's journal
(`.crashkernel/ID`, beside the directories) that says so, with the piece's sha256, what it put where, and where the unpacking
stands. What was acknowledged is never asked for again, whether the receiver is killed or its machine loses power.

The dump gets its name when the sender's manifest and the sums of the pieces that arrived agree, and the disk gives back what
they put on it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crashkernel.errors import CrashkernelError, EnvironmentFault, FormatError
from crashkernel.formats.fields import count, line, mapping
from crashkernel.target.base import DUMP, INCOMPLETE, LOG
from crashkernel.target.encryption import SUFFIX
from crashkernel.target.files import create_file, flush_directory, make_directory, name_dump, put_file
from crashkernel.target.manifest import PIECE_SIZE, Manifest, digest_file, digest_of_pieces, manifest_name
from crashkernel.target.unpacking import Extents, Unpacker

JOURNALS = ".crashkernel"
"""The directory of the journals; no sender's path can begin with a dot."""

SMALL_FILES = (LOG, LOG + SUFFIX)
"""What may be stored beside a dump."""

_IDENTITY = re.compile(r"[0-9a-f]{32}", re.ASCII)
_COMPONENT = re.compile(r"[A-Za-z0-9_+@%=,-][A-Za-z0-9._+@%=,-]{0,99}", re.ASCII)
_MOST_COMPONENTS = 8
_HASH_SIZE = 32
_MOST_EXTENTS = 1 << 14
"""In a piece: each takes 48 bytes of memory. A dump's records have some KiB, and most follow each other."""


class Refused(CrashkernelError):
    """A request that is not granted. `status` is HTTP's; `received`, how many bytes of the stream have arrived."""

    exit_code = 1

    def __init__(self, status: int, message: str, received: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.received = received


@dataclass(eq=False, slots=True)
class Upload:
    """One crash, on its way or saved. `path` is its directory, below the receiver's; `asked`, the one that was asked for."""

    identity: str
    asked: str
    path: str
    received: int = 0  # bytes of the stream
    pieces: bytearray = field(default_factory=bytearray)  # the sha256 of each
    extents: bytearray = field(default_factory=bytearray)  # what they put where, packed
    state: dict[str, Any] | None = None  # of the unpacker
    saved: str | None = None  # the dump's name
    journal_size: int = 0  # bytes of the journal up to its last whole line
    lock: threading.Lock = field(default_factory=threading.Lock)


class Uploads:
    """All uploads below a directory. Its methods may be called by many threads."""

    def __init__(self, directory: Path, limit: int | None = None) -> None:
        """Take the directory; nobody else may receive into it.

        :raise EnvironmentFault: it is not there, cannot be written, or another receiver has it.
        """
        self._limit = limit if limit is not None else 1 << 62
        self._uploads: dict[str, Upload] = {}  # those on their way
        self._lock = threading.Lock()
        with contextlib.ExitStack() as stack:
            try:
                self._root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, self._root)
                with contextlib.suppress(FileExistsError):
                    os.mkdir(JOURNALS, 0o700, dir_fd=self._root)
                self._journals = _enter(self._root, JOURNALS)
                stack.callback(os.close, self._journals)
                fcntl.flock(self._journals, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise EnvironmentFault(
                    f"another receiver stores into {directory}", hint="give each its own directory"
                ) from error
            except OSError as error:
                raise EnvironmentFault(f"cannot receive into {directory}: {error.strerror}") from error
            except Refused as error:
                raise EnvironmentFault(f"cannot receive into {directory}: {error}") from error
            stack.pop_all()

    def close(self) -> None:
        """Let the directory go."""
        os.close(self._journals)
        os.close(self._root)

    def begin(self, identity: str, asked: str) -> Upload:
        """The upload of this identity; a new one, with a directory of its own, if there is none yet.

        :raise Refused: the path is not one, or the identity is another upload's.
        :raise OSError: it cannot be stored.
        """
        with self._lock:
            try:
                upload = self._known(identity)
            except Refused as refused:
                if refused.status != 404:
                    raise
                upload = self._create(identity, asked)
        if upload.asked != asked:
            raise Refused(409, "this identity is another upload's")
        return upload

    def find(self, identity: str) -> Upload:
        """An upload that has begun, in this process or before it.

        :raise Refused: it has not.
        """
        with self._lock:
            return self._known(identity)

    def put_file(self, upload: Upload, name: str, data: bytes) -> None:
        """Store a small file beside the dump; the same one again is stored once.

        :raise Refused: its name is none that may be.
        :raise OSError: it cannot be stored.
        """
        if name not in SMALL_FILES:
            raise Refused(403, f"only {' and '.join(SMALL_FILES)} may be stored beside a dump")
        with upload.lock, self._directory(upload) as directory:
            path = directory / name
            if not (path.is_file() and path.read_bytes() == data):
                put_file(directory, name, data)

    def put_piece(self, upload: Upload, offset: int, data: bytes) -> int:
        """Store the piece of the stream at `offset`; how many bytes have arrived. A piece that has arrived may come again.

        :raise Refused: it is not the next, or not the one that arrived; or the stream is damaged.
        :raise OSError: it cannot be stored; nothing of what had arrived is lost.
        """
        digest = hashlib.sha256(data).digest()
        with upload.lock:
            received = upload.received
            if offset < received:
                number = offset // PIECE_SIZE
                arrived = bytes(upload.pieces[number * _HASH_SIZE : (number + 1) * _HASH_SIZE])
                if offset % PIECE_SIZE or arrived != digest:
                    raise Refused(409, "another piece has arrived in its place", received)
                return received
            if offset != received or received % PIECE_SIZE or not 0 < len(data) <= PIECE_SIZE or upload.saved:
                raise Refused(409, f"the next piece is the one at {received:,}", received)
            with (
                self._directory(upload) as directory,
                _opened(directory / (DUMP + INCOMPLETE), create=not received) as descriptor,
            ):
                extents = Extents()
                unpacker = Unpacker(descriptor, limit=self._limit, extents=extents)
                try:
                    if upload.state is not None:
                        unpacker.resume(upload.state)
                    unpacker.put(data)
                except FormatError as error:
                    raise Refused(422, str(error), received) from error
                if len(extents) > _MOST_EXTENTS:
                    raise Refused(422, f"a flattened stream of crumbs: {len(extents):,} in {len(data):,} bytes", received)
                os.fdatasync(descriptor)
                if received == 0:
                    flush_directory(directory)
            state, put = unpacker.state(), extents.packed()
            self._note(upload, {"piece": digest.hex(), "size": len(data), "extents": put.hex(), "state": state})
            upload.pieces += digest
            upload.extents += put
            upload.received += len(data)
            upload.state = state
            return upload.received

    def finish(self, upload: Upload, sent: Manifest) -> Manifest:
        """Give the dump its name if what arrived is what `sent` is about; the manifest of what is stored.

        :raise Refused: it is not.
        :raise OSError: it cannot be stored.
        """
        name = DUMP + (".flat" if sent.contents.format == "flattened" else "") + (SUFFIX if sent.encrypted_to else "")
        if sent.file != name:
            raise Refused(422, f"a dump of this kind is called {name}, not {sent.file}")
        with upload.lock, self._directory(upload) as directory:
            if upload.saved:
                return _read_manifest(directory, upload.saved)
            if (sent.size, sent.digest) != (upload.received, digest_of_pieces(upload.pieces)):
                raise Refused(422, "what arrived is not what the manifest is about", upload.received)
            manifest = self._make_whole(upload, directory, sent)
            self._begin_journal(upload, manifest.file)  # all else in it is of no use any more
            upload.saved = manifest.file
        with self._lock:  # a sender that did not hear of it is answered out of the journal
            self._uploads.pop(upload.identity, None)
        return manifest

    def _make_whole(self, upload: Upload, directory: Path, sent: Manifest) -> Manifest:
        scratch = directory / (DUMP + INCOMPLETE)
        if not scratch.is_file() and (earlier := _named_before(directory, sent)):
            return earlier
        with _opened(scratch, create=upload.received == 0) as descriptor:
            unpacker = Unpacker(descriptor)
            if upload.state is not None:
                unpacker.resume(upload.state)
            try:
                unpacker.finish()
            except FormatError as error:
                raise Refused(422, str(error), upload.received) from error
            lost = Refused(500, "the receiver's disk does not give back what arrived", upload.received)
            if os.fstat(descriptor).st_size < unpacker.size:
                raise lost
            os.ftruncate(descriptor, unpacker.size)
            os.fsync(descriptor)
            if unpacker.flattened and not _gives_back(descriptor, Extents(upload.extents), unpacker.size):
                raise lost
            digest = digest_file(descriptor, unpacker.size)
            if unpacker.flattened:
                contents = unpacker.contents(sent.contents)
                sent = replace(sent, file=DUMP, size=unpacker.size, digest=digest, contents=contents)
            elif digest != sent.digest:
                raise lost
        try:
            name_dump(scratch, sent)
        except FileExistsError as error:
            raise Refused(409, f"somebody else has stored a {sent.file} in {upload.path}", upload.received) from error
        return sent

    # -- directories: opened component by component, so that a symbolic link leads nowhere

    def _create(self, identity: str, asked: str) -> Upload:
        if not _IDENTITY.fullmatch(identity):
            raise Refused(400, "an upload's identity is 32 hexadecimal digits")
        components = asked.split("/")
        if len(components) > _MOST_COMPONENTS or not all(map(_COMPONENT.fullmatch, components)):
            raise Refused(403, f"{asked[:200]!r} is no path that may be stored to")
        with contextlib.ExitStack() as stack:
            parent = os.dup(self._root)
            stack.callback(os.close, parent)
            for component in components[:-1]:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(component, 0o700, dir_fd=parent)
                    os.fsync(parent)
                parent = _enter(parent, component)
                stack.callback(os.close, parent)
            made = make_directory(_reach(parent) / components[-1]).name
        upload = Upload(identity, asked, "/".join([*components[:-1], made]))
        self._begin_journal(upload)
        self._uploads[identity] = upload
        return upload

    @contextlib.contextmanager
    def _directory(self, upload: Upload) -> Iterator[Path]:
        with contextlib.ExitStack() as stack:
            descriptor = self._root
            for component in upload.path.split("/"):
                descriptor = _enter(descriptor, component)
                stack.callback(os.close, descriptor)
            yield _reach(descriptor)

    # -- journals

    def _known(self, identity: str) -> Upload:
        if upload := self._uploads.get(identity):
            return upload
        if not _IDENTITY.fullmatch(identity):
            raise Refused(400, "an upload's identity is 32 hexadecimal digits")
        try:
            data = (_reach(self._journals) / identity).read_bytes()
        except FileNotFoundError as error:
            raise Refused(404, "there is no such upload") from error
        upload = _replay(identity, data)
        if upload.saved is None:
            self._uploads[identity] = upload
        return upload

    def _begin_journal(self, upload: Upload, saved: str | None = None) -> None:
        directory = _reach(self._journals)
        data = _journal_line({"asked": upload.asked, "path": upload.path, "saved": saved})
        descriptor, scratch = create_file(directory, upload.identity)
        try:
            os.pwrite(descriptor, data, 0)
            os.fsync(descriptor)
            scratch.rename(directory / upload.identity)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        flush_directory(directory)
        upload.journal_size = len(data)

    def _note(self, upload: Upload, record: dict[str, Any]) -> None:
        """Add a line to the journal. A part of one, which a full disk may leave, is overwritten by the next."""
        data = _journal_line(record)
        with _opened(_reach(self._journals) / upload.identity) as descriptor:
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], upload.journal_size + done)
            os.fdatasync(descriptor)
        upload.journal_size += len(data)


def _enter(parent: int, component: str) -> int:
    """A directory within an open one.

    :raise Refused: it is a symbolic link, no directory, or gone.
    :raise OSError: it cannot be opened.
    """
    try:
        return os.open(component, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError as error:
        raise Refused(410, f"the directory {component} is gone") from error
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise Refused(403, f"{component} is no directory to store into") from error


def _reach(descriptor: int) -> Path:
    """A path to an open directory, whatever has become of its names (proc(5))."""
    return Path(f"/proc/self/fd/{descriptor}")


@contextlib.contextmanager
def _opened(path: Path, *, create: bool = False) -> Iterator[int]:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    descriptor = os.open(path, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _gives_back(descriptor: int, extents: Extents, size: int) -> bool:
    """Whether a file has what was put into it, and nothing in between."""
    if extents.first_lost(descriptor) is not None:
        return False
    return not any(os.pread(descriptor, end - start, start).strip(b"\0") for start, end in extents.holes(size))


def _named_before(directory: Path, sent: Manifest) -> Manifest | None:
    """The manifest of a dump that got its name before the receiver was killed, which is all that there was left to note."""
    for name in (DUMP, sent.file):
        with contextlib.suppress(FormatError, OSError):
            manifest = _read_manifest(directory, name)
            with _opened(directory / name) as descriptor:
                size = os.fstat(descriptor).st_size
                if size == manifest.size and digest_file(descriptor, size) == manifest.digest:
                    return manifest
    return None


def _read_manifest(directory: Path, dump: str) -> Manifest:
    return Manifest.from_json((directory / manifest_name(dump)).read_bytes(), manifest_name(dump))


def _journal_line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":"))
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}\n".encode()


def _replay(identity: str, data: bytes) -> Upload:
    """The upload that a journal tells of, up to its last line that is whole."""
    upload: Upload | None = None
    size = 0
    for text in data.splitlines(keepends=True):
        checksum, _, record = text.rstrip(b"\n").partition(b" ")
        if not text.endswith(b"\n") or hashlib.sha256(record).hexdigest()[:16].encode() != checksum:
            break
        try:
            upload = _replay_line(identity, upload, mapping(json.loads(record)))
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise Refused(500, f"its journal is of another version: {error}") from error
        size += len(text)
    if upload is None:
        raise Refused(404, "its journal is damaged")
    upload.journal_size = size
    return upload


def _replay_line(identity: str, upload: Upload | None, raw: dict[str, Any]) -> Upload:
    if upload is None:
        saved = None if raw["saved"] is None else line(raw["saved"])
        return Upload(identity, line(raw["asked"]), line(raw["path"]), saved=saved)
    upload.pieces += bytes.fromhex(raw["piece"])
    upload.extents += bytes.fromhex(raw["extents"])
    upload.received += count(raw["size"], PIECE_SIZE + 1)
    upload.state = mapping(raw["state"])
    return upload
