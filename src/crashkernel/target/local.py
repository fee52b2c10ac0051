"""A file on a mounted file system, in a directory for each crash or by a name of the user's."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from crashkernel.target.aside import Kind, kind_of
from crashkernel.target.base import DUMP, Heartbeat, Saved, TargetFailed
from crashkernel.target.files import create_file, flush, make_directory, name_dump, put_file
from crashkernel.target.manifest import PIECE_SIZE, Contents, Manifest, digest_file, manifest_name, piece_digest

_IN_MEMORY = ("tmpfs", "ramfs", "rootfs", "devtmpfs")


class Place:
    """Where a dump's files lie: names them, and gives names to what is whole.

    A path that is a directory, or ends in a slash, gets a directory for each crash, which is nobody else's; any other is the
    dump's own name.
    """

    def __init__(self, path: str, kind: Kind | None = None) -> None:
        """`kind` is what the path leads to, if that was asked for before."""
        self.path = Path(path)
        self._kind = kind_of(path) if kind is None else kind
        self._own_directory = path.endswith("/") or self._kind is Kind.DIRECTORY
        self.name = f"{'directory' if self._own_directory else 'file'} {path}"
        self.directory = self.path if self._own_directory else self.path.parent

    def begin(self, crash: str) -> None:
        """Make the crash's directory; the one it is in must exist, for in a capture kernel it is a mounted disk or nothing.

        :raise TargetFailed: it does not, or the dump's own name is taken.
        :raise OSError: it cannot be made.
        """
        if self._kind is Kind.UNKNOWN and self.path.is_dir():  # its disk is slow; or it hangs, and this with it
            self._own_directory, self.directory = True, self.path
        if not self.directory.is_dir():
            raise TargetFailed(self.name, f"there is no directory {self.directory}", hint="is its file system mounted?")
        if not self._own_directory:
            for taken in (self.path, self.path.with_name(manifest_name(self.path.name))):
                if taken.is_symlink() or taken.exists():
                    raise TargetFailed(self.name, f"{taken.name} exists", hint="choose another name, or remove it")
            return
        self.directory = make_directory(self.path / crash)

    def dump_name(self, default: str) -> str:
        """The dump's name once it is whole."""
        return default if self._own_directory else self.path.name

    def put(self, name: str, data: bytes) -> None:
        """Store a small file; beside a dump with a name of its own, its begins with that.

        :raise OSError: it cannot be stored.
        """
        if not self._own_directory:
            name = self.path.name + name.removeprefix(DUMP)
        put_file(self.directory, name, data)

    def create(self, name: str) -> tuple[int, Path]:
        """A new file for what is to be called `name`: its descriptor and its incomplete name.

        :raise OSError: it cannot be created.
        """
        return create_file(self.directory, name)

    def finish(self, scratch: Path, manifest: Manifest) -> Saved:
        """Give the dump its name; all its bytes are on the disk.

        :raise TargetFailed: somebody else has taken the name.
        :raise OSError: the disk failed.
        """
        try:
            return Saved(str(name_dump(scratch, manifest)), manifest)
        except FileExistsError as error:
            raise TargetFailed(self.name, "the name exists by now") from error

    def warnings(self) -> list[str]:
        """Nothing that outlives a reboot."""
        with contextlib.suppress(OSError):
            if _file_system(self.directory) in _IN_MEMORY:
                return [f"{self.name} is in memory: what is stored there is gone after a reboot"]
        return []


class Follower:
    """Takes the digests of a file's pieces while the rest is being written.

    What was just written is still in memory. Afterwards it would have to come from the disk: a capture kernel would wait, and
    a disk that stored something else would be believed.
    """

    def __init__(self, descriptor: int) -> None:
        self.pieces: dict[int, bytes] = {}
        self._descriptor = descriptor
        self._change = threading.Condition()
        self._next = self._end = 0  # numbers of pieces: those in between are to be done
        self._thread: threading.Thread | None = None
        self._stopped = False

    def settled(self, start: int, end: int) -> None:
        """The bytes from `start` to `end` will not be written again."""
        first, last = -(-start // PIECE_SIZE), end // PIECE_SIZE
        if last <= max(self._end, first):
            return
        with self._change:
            self._next, self._end = max(self._next, first), last
            self._change.notify()
        if self._thread is None:  # only now: a writer may have forked before
            self._thread = threading.Thread(target=self._run, name="digest", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Nothing more is to be done; what is in hand is finished."""
        with self._change:
            self._stopped = True
            self._change.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # whoever takes the whole digest will meet it again
            while True:
                with self._change:
                    while self._next >= self._end and not self._stopped:
                        self._change.wait()
                    if self._stopped:
                        return
                    number = self._next
                    self._next += 1
                self.pieces[number] = piece_digest(self._descriptor, number * PIECE_SIZE, PIECE_SIZE)


class FileTarget:
    """A file, written at any offset and by any number of processes."""

    def __init__(self, path: str, kind: Kind | None = None) -> None:
        self._place = Place(path, kind)
        self.name = self._place.name
        self.leftover: Path | None = None
        self._alive = Heartbeat()
        self._descriptor: int | None = None
        self._follower: Follower | None = None

    failure = None  # whoever writes to a file sees for itself

    def warnings(self) -> list[str]:
        """Nothing that outlives a reboot."""
        return self._place.warnings()

    def begin(self, crash: str, alive: Heartbeat) -> None:
        """Make the crash's directory."""
        self._alive = alive
        self._place.begin(crash)

    def put(self, name: str, data: bytes) -> None:
        """Store a small file beside the dump."""
        self._place.put(name, data)

    def open(self) -> int:
        """A new file with an incomplete name."""
        self._descriptor, self.leftover = self._place.create(self._place.dump_name(DUMP))
        self._follower = Follower(self._descriptor)
        return self._descriptor

    def settled(self, start: int, end: int) -> None:
        """Take the digest of these bytes now."""
        assert self._follower is not None
        self._follower.settled(start, end)

    def commit(self, contents: Contents) -> Saved:
        """Flush it, take its digest, and give it its name."""
        assert self._descriptor is not None
        assert self.leftover is not None
        assert self._follower is not None
        self._follower.stop()
        size = flush(self._descriptor, self._alive)
        digest = digest_file(self._descriptor, size, known=self._follower.pieces, progress=self._alive.beat)
        name = self._place.dump_name(DUMP)
        saved = self._place.finish(self.leftover, Manifest(name, size, digest, contents))
        self._close()
        self.leftover = None
        return saved

    def abort(self) -> None:
        """Close it."""
        self._close()

    def _close(self) -> None:
        if self._follower is not None:
            self._follower.stop()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _file_system(path: Path) -> str:
    """The type of the file system that `path` is on, as /proc/self/mountinfo (proc(5)) has it; "" if it does not say."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if f" {number} " in line and line.split()[2] == number:
            return line.partition(" - ")[2].split()[0]
    return ""
