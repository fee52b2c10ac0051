"""Where a dump of `crashkernel capture` arrives on the host, and how it is taken from there: not by code of capture's."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
import struct
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from crashkernel.drill.filtered import SavedDump
from crashkernel.drill.saving import Saving
from crashkernel.errors import EnvironmentFault, VerificationError

LOG, MANIFEST = "vmcore-dmesg.txt", "vmcore.manifest.json"
"""Names of what lies beside a dump, in a kept drill too."""

_DUMP = "dump"  # beside QEMU's `disk`
_RECEIVED = "received"  # what the receiver stores, likewise
_DISK = "/dev/vda"  # in K2
_CHUNK = 16 << 20

BLANK = 1 << 20
"""Bytes at the start of K2's disk that must be zeros: `capture` overwrites no device that holds what it does not know."""

# The head of a block device (target/device.py has its layout): magic, version, state, sizes, a digest.
_HEAD = struct.Struct(">16sIIQII32s")
_MAGIC, _VERSION, _WHOLE = b"crashkernel dump", 1, 1
_MANIFEST_OFFSET, _LOG_OFFSET, _DUMP_OFFSET = 0x1000, 0x10000, 0x100000

_HOST = "10.0.2.2"  # the host's loopback, as a guest on QEMU's user network sees it (qemu(1), -netdev user)
_START = 20.0  # seconds that the receiver may take to listen
_SHOWN = "/etc/crashkernel/token"  # in K2


@dataclass(frozen=True, slots=True)
class Arrival:
    """What K2 is told, and what to call once it says that the dump is saved."""

    arguments: tuple[str, ...]  # of `crashkernel capture`
    token: str  # what the receiver wants to be shown, "" if there is none
    collect: Callable[[], SavedDump]
    """:raise VerificationError: there is no whole dump."""


@contextlib.asynccontextmanager
async def arrival(saving: Saving, disk: Path, directory: Path, *, fallback: bool = False) -> AsyncIterator[Arrival]:
    """Make ready for a dump; `disk` is K2's. What is collected lies in `directory`.

    With a `fallback` K2 is told of both the disk and the network, that which `saving` names first, and the dump must come to
    the other.

    :raise EnvironmentFault: the receiver does not start.
    """
    if saving.to == "disk" and not fallback:
        yield Arrival(saving.arguments(_DISK), "", lambda: from_disk(disk, directory))
        return
    token = secrets.token_hex(32)
    received = directory / _RECEIVED
    async with _receiver(received, token) as port:
        network = f"http://{_HOST}:{port}/"
        targets = [network] if not fallback else [network, _DISK] if saving.to == "network" else [_DISK, network]
        arguments = (*saving.arguments(*targets), f"--token-file={_SHOWN}")
        if targets[-1] == network:
            yield Arrival(arguments, token, lambda: from_receiver(received, directory))
        else:
            yield Arrival(arguments, token, lambda: from_disk(disk, directory))


def whole_dumps(disk: Path, directory: Path) -> list[str]:
    """What says of itself that it is a whole dump, on K2's disk and among what was received."""
    with disk.open("rb") as file:
        magic, version, state, *_ = _HEAD.unpack(file.read(_HEAD.size))
    on_disk = ["K2's disk"] if (magic, version, state) == (_MAGIC, _VERSION, _WHOLE) else []
    received = directory / _RECEIVED
    return on_disk + sorted(str(path.relative_to(received)) for path in received.rglob("vmcore"))


@contextlib.asynccontextmanager
async def _receiver(received: Path, token: str) -> AsyncIterator[int]:
    """`crashkernel receive` on a port of its own choice, as a user would run it."""
    received.mkdir()
    token_file = received.with_name("token")
    token_file.touch(0o600)
    token_file.write_text(token + "\n")
    command = ["receive", str(received), "--listen=127.0.0.1:0", f"--token-file={token_file}"]
    process = await asyncio.create_subprocess_exec(
        # should this process be killed outright, the receiver dies with it
        "setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "crashkernel", *command,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        try:
            async with asyncio.timeout(_START):
                line = (await process.stdout.readline()).decode("utf-8", "replace").rstrip()
        except TimeoutError:
            line = f"nothing within {_START:.0f} s"
        listening = re.search(r" on 127\.0\.0\.1:(\d+)", line)
        if listening is None:
            raise EnvironmentFault(f"the receiver did not start; it said: {line}")
        reading = asyncio.create_task(process.stdout.read())  # or its pipe would fill
        yield int(listening[1])
        reading.cancel()
    finally:
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_START):
                    await process.wait()
        if process.returncode is None:
            process.kill()


def from_receiver(received: Path, directory: Path) -> SavedDump:
    """Take what the receiver stored, into `directory`.

    :raise VerificationError: it has not exactly one whole dump.
    """
    names = sorted(str(path.relative_to(received)) for path in received.rglob("*") if path.is_file())
    dumps = [name for name in names if name.endswith("/vmcore")]
    beside = [str(Path(dumps[0]).with_name(name)) for name in (LOG, MANIFEST)] if len(dumps) == 1 else []
    if not beside or sorted(dumps + beside) != [name for name in names if not name.startswith(".")]:
        raise VerificationError(f"the receiver has not one dump with its log and manifest, but {', '.join(names) or 'nothing'}")
    saved = SavedDump(directory / _DUMP, directory / LOG, directory / MANIFEST)
    for name, path in zip((*dumps, *beside), (saved.dump, saved.log, saved.manifest), strict=True):
        (received / name).replace(path)
    return saved


def from_disk(disk: Path, directory: Path) -> SavedDump:
    """Take dump, log and manifest off K2's disk, into `directory`.

    :raise VerificationError: the disk does not say that it holds a whole dump.
    """
    with disk.open("rb") as file:
        head = file.read(_DUMP_OFFSET)
        magic, version, state, size, manifest_size, log_size, digest = _HEAD.unpack_from(head)
        if (magic, version, state) != (_MAGIC, _VERSION, _WHOLE):
            raise VerificationError(f"K2's disk does not say that it holds a whole dump: it begins with {head[:24].hex()}")
        manifest = head[_MANIFEST_OFFSET : _MANIFEST_OFFSET + manifest_size]
        log = head[_LOG_OFFSET : _LOG_OFFSET + log_size]
        if hashlib.sha256(head[: _HEAD.size - len(digest)] + manifest + log).digest() != digest:
            raise VerificationError("the head of K2's disk does not match its own digest")
        if _DUMP_OFFSET + size > os.fstat(file.fileno()).st_size:
            raise VerificationError(f"K2's disk is too small for the {size:,} bytes that it says it holds")
        saved = SavedDump(directory / _DUMP, directory / LOG, directory / MANIFEST)
        saved.manifest.write_bytes(manifest)
        saved.log.write_bytes(log)
        file.seek(_DUMP_OFFSET)
        with saved.dump.open("wb") as dump:
            while size and (data := file.read(min(size, _CHUNK))):
                dump.write(data)
                size -= len(data)
    return saved
