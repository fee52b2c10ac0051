"""What touches a disk that may hang is done aside: by a process that can be left behind.

Whoever waits for a dead disk is not to be killed until it answers, which it may never do (uninterruptible sleep). A thread
would keep the whole process from ending.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import time
from collections.abc import Callable
from enum import IntEnum

PATIENCE = 5.0
"""Seconds that a disk has to answer a question that takes milliseconds; to spin up, it has the time of an attempt."""

_GLANCE = 0.001  # seconds


class Kind(IntEnum):
    """What a path leads to. `UNKNOWN`: its disk does not answer."""

    UNKNOWN = 0
    MISSING = 1
    DIRECTORY = 2
    DEVICE = 3  # a block device
    OTHER = 4


def kind_of(path: str) -> Kind:
    """What a path leads to, without the risk of waiting for ever."""
    return Kind(aside(lambda: _kind_of(path)) or Kind.UNKNOWN)


def _kind_of(path: str) -> Kind:
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - without a Path's extras
    except OSError:
        return Kind.MISSING
    return Kind.DIRECTORY if stat.S_ISDIR(mode) else Kind.DEVICE if stat.S_ISBLK(mode) else Kind.OTHER


def aside(work: Callable[[], int], patience: float | None = None) -> int | None:
    """What `work`, done by another process, returns (0 to 254); None if it fails, or takes longer than `patience` seconds."""
    try:
        pid = os.fork()
    except OSError:
        return None
    if pid == 0:
        status = 255
        try:
            status = work()
        finally:
            os._exit(status)
    if (ended := wait_for(pid, PATIENCE if patience is None else patience)) is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_for(pid, 0.1)  # but for one that cannot be killed
        return None
    return ended if 0 <= ended < 255 else None


def wait_for(pid: int, patience: float) -> int | None:
    """The exit status of a child, or minus the signal that ended it; None if it goes on for longer than `patience` seconds."""
    deadline = time.monotonic() + patience
    pause = _GLANCE
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
