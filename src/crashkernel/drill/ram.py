"""The twin's memory and disk as files of the host: made before it starts, read and written while it stands still."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import threading
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from crashkernel.memory import Range, RangeSet

if TYPE_CHECKING:
    from pathlib import Path

    from crashkernel.drill.qemu import Wiring

_UNWRITTEN = b"\xa5" * (4 << 20)
_MADV_POPULATE_WRITE = 23  # include/uapi/asm-generic/mman-common.h, since Linux 5.14
_POPULATE_STEP = 16 << 20


def disk_size(memory: int) -> int:
    """Bytes of K2's disk: room for all of memory, headers, and the padding of the last block."""
    return memory + (64 << 20)


@contextlib.asynccontextmanager
async def prepared(wiring: Wiring, memory: int, blank: int = 0) -> AsyncIterator[asyncio.Event]:
    """RAM of `memory` bytes and K2's disk, made ready while K1 boots; what is yielded is set once the disk is.

    The disk is filled with what no memory is made of: a page that K2 never wrote must not pass for a page of zeros. And by
    the time K2 reads all of RAM and writes all of the disk, the host has found memory for both. Its first `blank` bytes are
    zeros all the same.
    """
    for path, size in ((wiring.ram, memory), (wiring.disk, disk_size(memory))):
        with path.open("wb") as file:
            file.truncate(size)
    stop, filled, loop = threading.Event(), asyncio.Event(), asyncio.get_running_loop()

    def work() -> None:
        with wiring.disk.open("r+b", buffering=0) as file:
            for _ in range(disk_size(memory) // len(_UNWRITTEN)):
                if stop.is_set():
                    return
                file.write(_UNWRITTEN)
            file.seek(0)
            file.write(bytes(blank))
        loop.call_soon_threadsafe(filled.set)
        # only a help: an older kernel cannot do it, and loses nothing but time
        with contextlib.suppress(OSError), wiring.ram.open("r+b") as ram, mmap.mmap(ram.fileno(), 0) as pages:
            for start in range(0, len(pages), _POPULATE_STEP):
                if stop.is_set():
                    return
                pages.madvise(_MADV_POPULATE_WRITE, start, min(_POPULATE_STEP, len(pages) - start))

    worker = asyncio.create_task(asyncio.to_thread(work))
    try:
        yield filled
    finally:
        stop.set()
        await asyncio.wait({worker})


def read_ram(ram: Path, size: int, start: int = 0) -> bytes:
    """`size` bytes of guest memory from physical `start` on."""
    with ram.open("rb") as file:
        return os.pread(file.fileno(), size, start)


def flip_bit(ram: Path, at: int, bit: int) -> None:
    """Flip bit `bit` (of 8) of the byte at physical `at`."""
    with ram.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, at)[0] ^ 1 << bit
        os.pwrite(file.fileno(), bytes([byte]), at)


def places(ram: Path, where: RangeSet, text: bytes) -> Iterator[Range]:
    """Where `text` lies in guest RAM."""
    for each in where:
        memory = read_ram(ram, each.size, each.start)
        at = memory.find(text) if text else -1
        while at >= 0:
            yield Range.sized(each.start + at, len(text))
            at = memory.find(text, at + 1)
