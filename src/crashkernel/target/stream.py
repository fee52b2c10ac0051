"""A target that takes the dump as a stream: a relay between the writer's pipe and wherever the bytes go.

::

    writer ──pipe──> relay thread: digest, count ──> _send()                  in the clear
    writer ──pipe──> age ──pipe──> relay thread: digest, count ──> _send()    encrypted

A sink that fails closes the pipe, so that the writer stops at once (EPIPE); what went wrong is then the sink's to say.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import subprocess
import threading
from pathlib import Path
from typing import BinaryIO

from crashkernel.target.base import DUMP, Heartbeat, Saved, TargetFailed
from crashkernel.target.encryption import SUFFIX, Encryption
from crashkernel.target.manifest import Contents, Manifest, PieceHasher

_BUFFER = 1 << 20
"""Bytes in a pipe and in the relay: what the writer may be ahead. The most that an unprivileged pipe may have."""

_GIVE_UP = 5
"""Seconds that a thread or a child has to end once nothing keeps it."""


class StreamTarget:
    """Base of targets that take a stream: they implement `_put`, `_start`, `_send`, `_finish` and `_stop`."""

    leftover: Path | None = None

    def __init__(self, name: str, encryption: Encryption | None) -> None:
        self.name = name
        self._encryption = encryption
        self._alive = Heartbeat()
        self._hasher = PieceHasher()
        self._pipe: int | None = None  # the writer's end
        self._age: subprocess.Popen[bytes] | None = None
        self._age_says: BinaryIO | None = None
        self._relay: threading.Thread | None = None
        self._failure: Exception | None = None

    # -- for a target to implement

    def _put(self, name: str, data: bytes) -> None:
        """Store a small file."""
        raise NotImplementedError

    def _start(self) -> None:
        """Get ready for the first byte."""
        raise NotImplementedError

    def _send(self, data: memoryview) -> None:
        """Take the next bytes, all of them; the memory is used again afterwards."""
        raise NotImplementedError

    def _finish(self, manifest: Manifest) -> Saved:
        """All bytes have been sent: make the dump whole."""
        raise NotImplementedError

    def _stop(self) -> None:
        """Let go; also unblock a `_send` in another thread, if one hangs."""
        raise NotImplementedError

    def _dump_name(self, contents: Contents) -> str:
        flat = ".flat" if contents.format == "flattened" else ""
        return DUMP + flat + (SUFFIX if self._encryption else "")

    # -- Target

    def warnings(self) -> list[str]:
        """A stream's other end cannot be asked."""
        return []

    def begin(self, crash: str, alive: Heartbeat) -> None:
        """Take the heartbeat."""
        self._alive = alive

    def put(self, name: str, data: bytes) -> None:
        """Store a small file beside the dump, encrypted if the dump is: a log has secrets, too."""
        if self._encryption:
            self._put(name + SUFFIX, self._encryption.encrypt(data))
        else:
            self._put(name, data)

    def open(self) -> int:
        """Start the relay; the pipe's end to write to."""
        self._start()
        source, self._pipe = _pipe()
        if self._encryption:
            encrypted, sink = _pipe()
            self._age_says = os.fdopen(os.memfd_create("age"), "w+b")
            try:
                self._age = self._encryption.start(source, sink, self._age_says)
            except OSError as error:
                raise TargetFailed(self.name, f"cannot run age: {error.strerror}") from error
            finally:
                os.close(source)
                os.close(sink)
            source = encrypted
        self._relay = threading.Thread(target=self._run, args=(source,), name="relay", daemon=True)
        self._relay.start()
        return self._pipe

    def settled(self, start: int, end: int) -> None:
        """Of no use: a stream is seen to as it comes."""

    def commit(self, contents: Contents) -> Saved:
        """See the stream to its end, and the dump made whole."""
        self._close_pipe()
        assert self._relay is not None
        self._relay.join()
        if self._age:
            self._age.wait(_GIVE_UP)  # its output has ended
        if failure := self.failure:
            raise failure
        digest = self._hasher.digest()
        recipient = str(self._encryption) if self._encryption else None
        return self._finish(Manifest(self._dump_name(contents), self._hasher.size, digest, contents, recipient))

    def abort(self) -> None:
        """Stop; a `_send` that hangs is freed or left behind."""
        self._stop()
        if self._age and self._age.poll() is None:
            self._age.kill()
            self._age.wait()
        self._close_pipe()
        if self._relay:
            self._relay.join(_GIVE_UP)

    @property
    def failure(self) -> Exception | None:
        """What went wrong at the sink's end, of which the writer only saw a closed pipe."""
        status = None
        if self._age:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may be about to say
                status = self._age.wait(1)
        if self._failure or not status or self._age_says is None:
            return self._failure
        self._age_says.seek(0)
        said = os.fsdecode(self._age_says.read(500)).strip().splitlines()[:1]
        return TargetFailed(self.name, f"encryption failed: {' '.join(said) or f'age ended with status {status}'}")

    # -- within

    def _run(self, source: int) -> None:
        buffer = memoryview(bytearray(_BUFFER))
        try:
            while count := os.readv(source, [buffer]):
                self._hasher.update(buffer[:count])
                self._send(buffer[:count])
                self._alive.beat()
        except Exception as error:
            self._failure = error
        finally:
            os.close(source)

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None


class StdoutTarget(StreamTarget):
    """Standard output: the flattened stream and nothing else. Whether it is whole, its end record says."""

    def __init__(self, encryption: Encryption | None = None, descriptor: int = 1) -> None:
        super().__init__("standard output", encryption)
        self._descriptor = descriptor

    def begin(self, crash: str, alive: Heartbeat) -> None:
        """Refuse a terminal.

        :raise TargetFailed: it is one.
        """
        super().begin(crash, alive)
        if os.isatty(self._descriptor):
            raise TargetFailed(self.name, "it is a terminal", hint="redirect it to a file or into a pipe")

    def _put(self, name: str, data: bytes) -> None:
        pass  # there is no room for a second file in a stream

    def _start(self) -> None:
        pass

    def _send(self, data: memoryview) -> None:
        while data:
            data = data[os.write(self._descriptor, data) :]

    def _finish(self, manifest: Manifest) -> Saved:
        if stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            os.fsync(self._descriptor)
        return Saved(self.name, manifest)

    def _stop(self) -> None:
        pass


def _pipe() -> tuple[int, int]:
    source, sink = os.pipe()
    with contextlib.suppress(OSError):  # a limit (pipe-user-pages-soft): the smaller pipe does as well
        fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, _BUFFER)
    return source, sink
