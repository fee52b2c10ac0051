"""Where a dump of `crashkernel capture` arrives on the host, and how it is taken from there: not by code of capture's."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

from crashkernel.drill.filtered import SavedDump
from crashkernel.errors import VerificationError

LOG, MANIFEST = "vmcore-dmesg.txt", "vmcore.manifest.json"
"""Names of what lies beside a dump, in a kept drill too."""

_DUMP = "dump"  # beside QEMU's `disk`
_CHUNK = 16 << 20

BLANK = 1 << 20
"""Bytes at the start of K2's disk that must be zeros: `capture` overwrites no device that holds what it does not know."""

# The head of a block device (capture/target/device.py has its layout): magic, version, state, sizes, a digest.
_HEAD = struct.Struct(">16sIIQII32s")
_MAGIC, _VERSION, _WHOLE = b"crashkernel dump", 1, 1
_MANIFEST_OFFSET, _LOG_OFFSET, _DUMP_OFFSET = 0x1000, 0x10000, 0x100000


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
