"""A writer without a dump: deterministic bytes in the shape a writer gives them, at offsets or as a flattened stream."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from crashkernel.target.manifest import Contents, Manifest, PageCounts, digest_file, manifest_name

RECORD = 64 << 10


@functools.lru_cache(maxsize=16)
def dump_bytes(size: int, seed: int = 0) -> bytes:
    """A fake dump's bytes."""
    return hashlib.shake_128(b"dump%d" % seed).digest(size)


def records(size: int) -> list[tuple[int, int]]:
    """The order it is written in, as (offset, size): a head that is written last, like a dump's page descriptors."""
    rest = [(at, min(RECORD, size - at)) for at in range(min(RECORD, size), size, RECORD)]
    return [*rest, (0, min(RECORD, size))]


@functools.lru_cache(maxsize=4)
def flattened(data: bytes) -> bytes:
    """The flattened stream (makedumpfile's `makedumpfile_header`, then (offset, size) and bytes) of a fake dump."""
    stream = bytearray(struct.pack(">16sqq", b"makedumpfile", 1, 1).ljust(4096, b"\0"))
    for offset, size in records(len(data)):
        stream += struct.pack(">qq", offset, size) + data[offset : offset + size]
    return bytes(stream + struct.pack(">qq", -1, -1))


def contents(form: str = "kdump-compressed", seed: int = 0) -> Contents:
    return Contents(form, "zstd", 31, 65536, PageCounts(kept=seed), "6.1.0", "ppc64le", "Kernel panic", 1_700_000_000)


def writer(size: int, seed: int = 0, before: Callable[[int], None] = lambda _: None) -> Callable[..., Contents]:
    """A `save`-able writer of a fake dump; `before` is called with each record's number."""

    def write(descriptor: int, beat: Callable[[], None]) -> Contents:
        data = dump_bytes(size, seed)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            for number, (offset, count) in enumerate(records(size)):
                before(number)
                done = 0
                while done < count:
                    done += os.pwrite(descriptor, data[offset + done : offset + count], offset + done)
                beat()
            return contents("kdump-compressed", seed)
        stream = memoryview(flattened(data))
        for number, at in enumerate(range(0, len(stream), RECORD)):
            before(number)
            view = stream[at : at + RECORD]
            while view:
                view = view[os.write(descriptor, view) :]
            beat()
        return contents("flattened", seed)

    return write


def claims(directory: Path) -> list[Path]:
    """The files below a directory whose names say that they are whole dumps."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and path.name in ("vmcore", "vmcore.flat", "vmcore.age", "vmcore.flat.age")
    )


def is_whole(path: Path, *expected: bytes) -> bool:
    """Whether a dump has a true manifest beside it, and is one of the `expected`."""
    manifest = Manifest.from_json(path.with_name(manifest_name(path.name)).read_text())
    with path.open("rb") as file:
        digest = digest_file(file.fileno(), manifest.size)
    return (
        manifest.file == path.name
        and manifest.size == path.stat().st_size
        and manifest.digest == digest
        and path.read_bytes() in expected
    )
