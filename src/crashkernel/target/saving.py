"""Saving a dump at the first target that takes it.

Each target is tried in a process of its own, forked for it. A disk that hangs holds whoever writes to it where no signal is
heard; a capture kernel that runs out of memory kills; and a library may crash: all of that ends the attempt and not the
capture, which watches, says what happened, and goes on to the next target. So the capture itself touches no target's disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pickle
import select
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

from crashkernel.errors import CrashkernelError, EnvironmentFault, UsageError
from crashkernel.target.aside import aside, wait_for
from crashkernel.target.base import Heartbeat, Saved, Target, TargetFailed
from crashkernel.target.manifest import Contents


class Beat(Protocol):
    """What a writer calls whenever it has got on."""

    def __call__(self, start: int = 0, end: int = 0) -> None:
        """There is progress; and the dump's bytes from offset `start` to `end` (if any) will not be written again."""
        ...


Write = Callable[[int, Beat], Contents]
"""Writes the dump to a descriptor."""

STALL = 60.0  # seconds

_GRACE = 5.0
"""Seconds beyond its deadline that a target has to say itself why it gives up."""

_GLANCE = 0.25  # seconds between looks at an attempt
_ROOM = 1 << 16  # bytes: a pipe has no more
_MESSAGE = struct.Struct("=I")  # how many bytes of a pickled tuple follow
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


class NoTargetLeft(EnvironmentFault):
    """No target took the dump. The message has each with its reason."""


def save(
    write: Write,
    targets: Sequence[Target],
    crash: str,
    *,
    files: Mapping[str, bytes] | None = None,
    stall: float = STALL,
    report: Callable[[str], None] = lambda _: None,
) -> Saved:
    """Store `files` and then the dump that `write` writes at the first of `targets` that takes both.

    `crash` names the crash, as its directory (`crash_name`). A target that gets on with nothing for `stall` seconds is given
    up. `report` is told, in sentences, what is wrong with a target and what is done about it. `write` runs in another process
    than the caller's, once for each target that is tried.

    :raise NoTargetLeft: none did.
    :raise CrashkernelError: `write` failed for a reason that has nothing to do with a target.
    """
    failures: list[TargetFailed] = []
    leftovers: list[Path] = []
    for number, target in enumerate(targets):
        attempt = _Attempt(target, report)
        try:
            attempt.start(lambda attempt: attempt.fill(write, crash, files or {}))
            saved = attempt.watch(stall + _GRACE)
        except TargetFailed as failure:
            failures.append(failure)
            left = ""
            if attempt.leftover is not None:
                leftovers.append(attempt.leftover)
                left = f"; {attempt.leftover} is what it has"
            following = f"; trying {targets[number + 1].name}" if number + 1 < len(targets) else ""
            report(f"{failure}{left}{following}")
            continue
        for leftover in leftovers:  # part of what is now whole elsewhere, on a disk that may be full because of it
            if aside(partial(_remove, leftover)) is None:
                report(f"{leftover} could not be removed")
        return saved
    reasons = "; ".join(str(failure) for failure in failures)
    raise NoTargetLeft(f"the dump is NOT saved: {reasons or 'there is no target'}")


def _remove(leftover: Path) -> int:
    leftover.unlink(missing_ok=True)
    return 0


class _Attempt:
    """One target, tried by a child; the child's messages are tuples with their kind first."""

    def __init__(self, target: Target, report: Callable[[str], None]) -> None:
        self.target = target
        self._report = report
        self.leftover: Path | None = None
        self._alive = Heartbeat()
        self._receive, self._send = os.pipe()
        self._received = bytearray()  # what of a message is here already
        self._pid = 0

    # -- the child

    def start(self, work: Callable[[_Attempt], Saved]) -> None:
        """Fork the child and let it do `work`.

        :raise TargetFailed: there is no memory for another process.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        try:
            self._pid = os.fork()
        except OSError as error:
            os.close(self._receive)
            os.close(self._send)
            raise TargetFailed(self.target.name, f"cannot fork: {error.strerror}") from error
        if self._pid == 0:
            self._live(parent, work)
        with contextlib.suppress(OSError):  # the child does the same: whoever comes first
            os.setpgid(self._pid, self._pid)
        os.close(self._send)

    def fill(self, write: Write, crash: str, files: Mapping[str, bytes]) -> Saved:
        """Give the target all it is to have."""
        target = self.target
        for warning in target.warnings():
            self._tell("warning", warning)
        target.begin(crash, self._alive)
        for name, data in files.items():
            target.put(name, data)
            self._alive.beat()
        descriptor = target.open()
        self._tell("leftover", target.leftover)

        def beat(start: int = 0, end: int = 0) -> None:
            self._alive.beat()
            target.settled(start, end)

        return target.commit(write(descriptor, beat))

    def _live(self, parent: int, work: Callable[[_Attempt], Saved]) -> NoReturn:
        """The child's life; it ends with its process, and never returns into the capture it was forked from."""
        try:
            os.setpgid(0, 0)  # so that all it starts can be ended with it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is the parent's to answer
            os.close(self._receive)
            if os.getppid() == parent:
                self._tell(*self._outcome(work))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(0)

    def _tell(self, *message: Any) -> None:
        data = pickle.dumps(message)
        view = memoryview(_MESSAGE.pack(len(data)) + data)
        while view:
            view = view[os.write(self._send, view) :]

    def _outcome(self, work: Callable[[_Attempt], Saved]) -> tuple[Any, ...]:
        try:
            return ("saved", work(self))
        except (TargetFailed, EnvironmentFault, OSError, MemoryError) as error:
            fault: Exception = self.target.failure or error
            self.target.abort()
            return ("failed", *_reason(fault))
        except UsageError as error:  # no target can help
            self.target.abort()
            return ("error", type(error), error.args, error.__dict__)
        except CrashkernelError as error:
            self.target.abort()
            return ("failed", error.message, error.hint)
        except Exception as error:
            if os.environ.get("CRASHKERNEL_DEBUG"):
                traceback.print_exc()
            self.target.abort()
            return ("failed", f"a bug of ours: {type(error).__name__}: {error}", "report it; another target may do")

    # -- the parent

    def watch(self, stall: float) -> Saved:
        """Wait for the outcome; whatever it is, the child and all that it started are gone afterwards.

        :raise TargetFailed: the target did not take the dump, or the child died or stood still for `stall` seconds.
        :raise CrashkernelError: what the child could not blame on the target.
        """
        there = select.poll()
        there.register(self._receive, select.POLLIN)
        try:
            while True:
                dead = self._is_dead()
                while there.poll(0 if dead else _GLANCE * 1000):
                    data = os.read(self._receive, _ROOM)
                    if not data:
                        dead = True
                        break
                    for message in self._messages(data):
                        if outcome := self._hear(message):
                            return outcome
                if dead:
                    raise TargetFailed(self.target.name, self._death())
                if (silence := self._alive.silence) > stall:
                    raise TargetFailed(self.target.name, f"no progress for {silence:.0f} s")
        finally:
            self._end()

    def _messages(self, data: bytes) -> Iterator[tuple[Any, ...]]:
        """Yield the messages that are whole with the `data` that has just come."""
        received = self._received
        received += data
        while len(received) >= _MESSAGE.size:
            end = _MESSAGE.size + _MESSAGE.unpack_from(received)[0]
            if len(received) < end:
                return
            message = pickle.loads(received[_MESSAGE.size : end])  # noqa: S301 - from a child of ours
            del received[:end]
            yield message

    def _hear(self, message: tuple[Any, ...]) -> Saved | None:
        match message:
            case ("warning", warning):
                self._report(warning)
            case ("leftover", path):
                self.leftover = path
            case ("saved", saved):
                assert isinstance(saved, Saved)
                return saved
            case ("failed", reason, hint):
                raise TargetFailed(self.target.name, reason, hint=hint)
            case ("error", kind, arguments, attributes):
                error = kind.__new__(kind, *arguments)  # not called: its arguments are by now the finished message
                error.args = arguments
                error.__dict__.update(attributes)
                raise error
        return None

    def _is_dead(self) -> bool:
        """Whether the child has ended; it stays to be reaped, so that its process group cannot become somebody else's."""
        return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _death(self) -> str:
        ended = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        if ended is None or ended.si_code == os.CLD_EXITED:
            return "its process ended without a word"
        name = signal.Signals(ended.si_status).name
        return f"its process was killed ({name}{'; out of memory?' if ended.si_status == signal.SIGKILL else ''})"

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        wait_for(self._pid, _GRACE)  # one that hangs in a dead disk is left behind: nothing can end it
        os.close(self._receive)


def _reason(fault: Exception) -> tuple[str, str]:
    """In words, and a hint."""
    if isinstance(fault, TargetFailed):
        return fault.reason, fault.hint
    if isinstance(fault, EnvironmentFault):
        return fault.message, fault.hint
    if isinstance(fault, MemoryError):
        return "out of memory", ""
    if isinstance(fault, OSError) and fault.errno:
        hint = "make room on it" if fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        return os.strerror(fault.errno), hint
    return str(fault) or type(fault).__name__, ""
