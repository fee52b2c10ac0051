"""Faults at chosen moments: a process killed at its n-th call into C, a connection cut after n bytes, a disk of n bytes."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


class Killer:
    """Runs `work` in a process, and kills that and all that it forked at the n-th call into C of a chosen one of them.

    With `of_forked` calls count in what the process forks, else in itself. The kernel sees nothing of what is between two such
    calls, so these are all the moments at which a kill can make a difference.
    """

    def __init__(self, work: Callable[[], object], *, of_forked: bool) -> None:
        self._work = work
        self._of_forked = of_forked
        self._memory = mmap.mmap(-1, 8)

    def count(self) -> int:
        """How many calls there are in an undisturbed run."""
        assert self._run(1 << 60) == 0
        return int.from_bytes(self._memory[:8], "little")

    def kill_at(self, number: int) -> bool:
        """Kill at this call; False if there was none, and the work was done."""
        return self._run(number) != 0

    def _run(self, number: int) -> int:
        self._memory[:8] = bytes(8)
        alive, witness = os.pipe()  # open as long as any of the processes lives
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                os.close(alive)
                self._arm(number)
                self._work()
                status = 0
            finally:
                sys.setprofile(None)
                os._exit(status)
        os.close(witness)
        os.read(alive, 1)
        os.close(alive)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        return status

    def _arm(self, number: int) -> None:
        first = os.getpid()
        seen = 0

        def look(_frame: object, event: str, _argument: object) -> None:
            nonlocal seen
            if event == "c_call" and (os.getpid() != first) == self._of_forked:
                seen += 1
                self._memory[:8] = seen.to_bytes(8, "little")
                if seen == number:
                    if self._of_forked:
                        os.kill(first, signal.SIGKILL)
                    os.kill(os.getpid(), signal.SIGKILL)

        threading.setprofile(look)
        sys.setprofile(look)


class Proxy:
    """Forwards connections on the loopback address to a port there, and cuts them after so many bytes from the client.

    `budgets` has the bytes of each connection, in order; further ones have no limit, or, with `then_dead`, are not accepted.
    """

    def __init__(self, port: int, budgets: list[int], *, then_dead: bool) -> None:
        self._port = port
        self._budgets = budgets
        self._then_dead = then_dead
        self._sockets: list[socket.socket] = []
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for each in self._sockets:
            _cut(each)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                budget = self._budgets.pop(0) if self._budgets else -1
                if budget < 0 and self._then_dead:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [client, server]
                threading.Thread(target=self._forward, args=(client, server, budget), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, -1), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, budget: int) -> None:
        """Forward until either end closes, or `budget` bytes have gone through (-1: without a limit)."""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16 if budget < 0 else min(1 << 16, budget) or 1):
                if budget == 0:
                    self.cuts += 1
                    break
                sink.sendall(data)
                budget -= len(data) if budget > 0 else 0
        _cut(source)
        _cut(sink)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class SmallDisk:
    """A directory with room for so many bytes: a tmpfs where the tests may mount one, else a limit on the size of a file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "none", directory], capture_output=True, check=False
        )
        self.mounted = mounted.returncode == 0

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", self.directory], check=True)

    @contextlib.contextmanager
    def of(self, size: int) -> Iterator[None]:
        """As long as this lasts, it has this size; in this process and those that it forks."""
        if self.mounted:
            subprocess.run(["mount", "-o", f"remount,size={size}", self.directory], check=True)
            yield
            return
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
