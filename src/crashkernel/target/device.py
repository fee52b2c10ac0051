"""A raw block device: no file system to mount, to fill or to repair.

The first MiB is ours, the dump begins behind it (all numbers big-endian)::

    0x0       "crashkernel dump"
    0x10      u32 version (1), u32 state (0 incomplete, 1 whole)
    0x18      u64 size of the dump, u32 size of the manifest, u32 size of the log
    0x28      sha256 over all of the above, the manifest and the log
    0x1000    the manifest, JSON
    0x10000   K1's log
    0x100000  the dump

The head is written as incomplete, and flushed, before the first byte of a dump; and as whole when all bytes and the manifest
are flushed. So at every instant the device either does not claim to hold a dump, or holds it. Only a device is taken that
nobody uses (O_EXCL: not mounted, no part of a RAID, no swap) and that is blank or bears this head, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from crashkernel.errors import FormatError, UsageError
from crashkernel.target.base import DUMP, SLOWEST, Heartbeat, Saved, TargetFailed
from crashkernel.target.encryption import Encryption
from crashkernel.target.manifest import Manifest, digest_file
from crashkernel.target.stream import StreamTarget
from crashkernel.target.unpacking import Extents, Unpacker

DUMP_OFFSET = 1 << 20
"""Where the dump begins, in bytes."""

_MAGIC = b"crashkernel dump"
_HEAD = struct.Struct(">16sIIQII")
_VERSION = 1
_INCOMPLETE, _WHOLE = 0, 1
_HASH_SIZE = 32
_MANIFEST_OFFSET = 0x1000
_LOG_OFFSET = 0x10000
_LOG_ROOM = DUMP_OFFSET - _LOG_OFFSET
_AGE_OVERHEAD = 0x8000
"""Bytes by which a log of at most `_LOG_ROOM` may grow when it is encrypted to some recipients."""

_SIGNATURES = (  # (offset, bytes, what it is): libblkid's superblocks and partition tables
    (510, b"\x55\xaa", "a partition table or a FAT file system"),
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (0, b"XFSB", "an XFS file system"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (0x200, b"LABELONE", "an LVM physical volume"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (0x1000, b"\xfc\x4e\x2b\xa9", "a part of a RAID"),
    (0xFF6, b"SWAPSPACE2", "swap space"),
    (0xFFF6, b"SWAPSPACE2", "swap space"),
    (0, b"KDUMP   ", "a dump without our head"),
    (0, b"makedumpfile", "a dump without our head"),
    (0, b"\x7fELF", "a dump without our head"),
)
_GPT = b"EFI PART"
_TEXT = b"\0\t\n\r\x1b" + bytes(range(0x20, 0x7F))
_AGE = b"age-encryption.org/"  # how an encrypted log begins
_RAID = (b"\xfc\x4e\x2b\xa9", b"\xa9\x2b\x4e\xfc")  # md_p.h, MD_SB_MAGIC in either byte order
_TAIL = 1 << 17
"""Bytes at a device's end where a GPT's copy and the superblocks of RAID 0.90 and 1.0 lie."""


@dataclass(frozen=True, slots=True)
class DeviceHead:
    """What a device's first MiB says."""

    manifest: Manifest | None  # None: there is no whole dump
    log: bytes

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "device") -> DeviceHead:
        """Read a head of `DUMP_OFFSET` bytes.

        :raise FormatError: there is none, or it is damaged.
        """
        if len(data) < DUMP_OFFSET or data[: len(_MAGIC)] != _MAGIC:
            raise FormatError("no dump of ours on it", source=source, offset=0)
        _, version, state, size, manifest_size, log_size = _HEAD.unpack_from(data)
        if version != _VERSION or state not in (_INCOMPLETE, _WHOLE):
            raise FormatError(f"its head has version {version} and state {state}", source=source, offset=len(_MAGIC))
        if manifest_size > _LOG_OFFSET - _MANIFEST_OFFSET or log_size > _LOG_ROOM:
            raise FormatError("its head has sizes beyond its room", source=source, offset=_HEAD.size)
        manifest = data[_MANIFEST_OFFSET : _MANIFEST_OFFSET + manifest_size]
        log = data[_LOG_OFFSET : _LOG_OFFSET + log_size]
        digest = hashlib.sha256(data[: _HEAD.size] + manifest + log).digest()
        if data[_HEAD.size : _HEAD.size + _HASH_SIZE] != digest:
            raise FormatError("its head is damaged: its digest does not match", source=source, offset=_HEAD.size)
        if state == _INCOMPLETE:
            return cls(None, log)
        whole = Manifest.from_json(manifest, source)
        if whole.size != size:
            raise FormatError("its head and its manifest differ about the size", source=source, offset=0x18)
        return cls(whole, log)

    def to_bytes(self) -> bytes:
        """The head as it is stored, of `DUMP_OFFSET` bytes."""
        manifest = self.manifest.to_json().encode() if self.manifest else b""
        state, size = (_WHOLE, self.manifest.size) if self.manifest else (_INCOMPLETE, 0)
        head = _HEAD.pack(_MAGIC, _VERSION, state, size, len(manifest), len(self.log))
        digest = hashlib.sha256(head + manifest + self.log).digest()
        data = (head + digest).ljust(_MANIFEST_OFFSET, b"\0") + manifest
        return (data.ljust(_LOG_OFFSET, b"\0") + self.log).ljust(DUMP_OFFSET, b"\0")


def open_device_dump(path: Path) -> tuple[int, int, Manifest]:
    """Where the dump lies on a device that holds a whole one: its offset and size in bytes, and its manifest.

    :raise UsageError: it cannot be read.
    :raise FormatError: there is no dump of ours on it, or none that is whole.
    """
    head = read_device_head(path)
    if head.manifest is None:
        raise FormatError("the dump on it is incomplete", source=str(path), hint="its log may be there: it is in the first MiB")
    return DUMP_OFFSET, head.manifest.size, head.manifest


def read_device_head(path: Path) -> DeviceHead:
    """What a device says of the dump on it, if it is whole, and the log.

    :raise UsageError: it cannot be read.
    :raise FormatError: it says nothing, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return DeviceHead.from_bytes(file.read(DUMP_OFFSET), str(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


class DeviceTarget(StreamTarget):
    """A block device. The writer's stream is unpacked behind the head, so that the writer need not know of it."""

    def __init__(self, path: str, encryption: Encryption | None = None) -> None:
        super().__init__(f"device {path}", encryption)
        self._path = Path(path)
        self._descriptor: int | None = None
        self._log = b""
        self._extents = Extents()
        self._unpacker: Unpacker | None = None

    def warnings(self) -> list[str]:
        """A dump that is going to be replaced."""
        with contextlib.suppress(UsageError):
            if manifest := read_device_head(self._path).manifest:
                return [f"{self.name} holds a whole dump, of {manifest.contents.release}: it is overwritten"]
        return []

    def begin(self, crash: str, alive: Heartbeat) -> None:
        """Take the device, and take back what it claims.

        :raise TargetFailed: it is somebody else's.
        :raise OSError: it cannot be opened or written.
        """
        super().begin(crash, alive)
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise TargetFailed(self.name, "there is no such device", hint="is its driver loaded?") from error
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise TargetFailed(self.name, "it is in use", hint="is it mounted, swap, or a part of something?") from error
            raise
        if what := _stranger(self._descriptor):
            hint = "if it may be: blank it with wipefs -a, and fill its first MiB with zeros"
            raise TargetFailed(self.name, f"it holds {what}, which is not to be overwritten", hint=hint)
        self._write_head(None)

    def put(self, name: str, data: bytes) -> None:
        """Store the log in the head; of a long one the end, where the panic is."""
        super().put(name, data[-(_LOG_ROOM - _AGE_OVERHEAD) :])

    def _put(self, name: str, data: bytes) -> None:
        if len(data) > _LOG_ROOM:
            raise TargetFailed(self.name, f"its head has no room for {name}")
        self._log = data
        self._write_head(None)

    def _start(self) -> None:
        assert self._descriptor is not None
        room = os.lseek(self._descriptor, 0, os.SEEK_END) - DUMP_OFFSET
        self._unpacker = Unpacker(self._descriptor, start=DUMP_OFFSET, extents=self._extents)
        if room <= 0:
            raise TargetFailed(self.name, "it is smaller than 1 MiB")

    def _send(self, data: memoryview) -> None:
        assert self._unpacker is not None
        self._unpacker.put(data)

    def _finish(self, manifest: Manifest) -> Saved:
        assert self._descriptor is not None
        assert self._unpacker is not None
        self._unpacker.finish()
        size = self._unpacker.size
        if self._unpacker.flattened:
            for start, end in self._extents.holes(size):  # of an earlier dump's bytes
                os.pwrite(self._descriptor, bytes(end - start), DUMP_OFFSET + start)
        self._alive.beat(allow=size / SLOWEST)
        os.fsync(self._descriptor)
        self._alive.beat()
        lost = TargetFailed(self.name, "it does not give back what was written to it")
        if self._extents.first_lost(self._descriptor, start=DUMP_OFFSET, progress=self._alive.beat) is not None:
            raise lost
        digest = digest_file(self._descriptor, size, start=DUMP_OFFSET, progress=self._alive.beat)
        if self._unpacker.flattened:
            contents = self._unpacker.contents(manifest.contents)
            manifest = replace(manifest, file=DUMP, size=size, digest=digest, contents=contents)
        elif digest != manifest.digest:
            raise lost
        self._write_head(manifest)
        self._stop()
        return Saved(str(self._path), manifest)

    def _stop(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write_head(self, manifest: Manifest | None) -> None:
        """Everything but the first page first, so that what the first page says is there when it says so."""
        assert self._descriptor is not None
        head = DeviceHead(manifest, self._log).to_bytes()
        for offset, data in ((_MANIFEST_OFFSET, head[_MANIFEST_OFFSET:]), (0, head[:_MANIFEST_OFFSET])):
            done = 0
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], offset + done)
            os.fsync(self._descriptor)


def _stranger(descriptor: int) -> str:
    """What a device holds that is not ours to overwrite; "" if it is blank, or our own.

    Our magic is not enough: what was given the device later need not touch its first bytes (ZFS, LVM, a RAID's superblock).
    """
    start = os.pread(descriptor, DUMP_OFFSET, 0)
    end = os.lseek(descriptor, 0, os.SEEK_END)
    tail_offset = max(0, end - _TAIL) & ~0xFFF
    head = _own_head(start)
    if head is None:
        for at, magic, what in _SIGNATURES:
            if start[at : at + len(magic)] == magic:
                return what
    elif head.manifest and DUMP_OFFSET + head.manifest.size > tail_offset:
        return ""  # what lies there is the dump's
    tail = os.pread(descriptor, _TAIL + 0x1000, tail_offset)
    if what := _at_either_end(start, tail):
        return what
    if head or start.count(0) == len(start) or (start.startswith(_MAGIC) and _half_written(start)):
        return ""
    return "something unknown"


def _at_either_end(start: bytes, tail: bytes) -> str:
    if _GPT in (start[512:520], start[4096:4104], tail[-512:][:8], tail[-4096:][:8]):
        return "a partition table"
    return "a part of a RAID" if any(tail[at : at + 4] in _RAID for at in range(0, len(tail), 0x1000)) else ""


def _own_head(start: bytes) -> DeviceHead | None:
    """The head that a device begins with, if there is nothing else in its first MiB."""
    try:
        head = DeviceHead.from_bytes(start)
    except FormatError:
        return None
    return head if head.to_bytes() == start else None


def _half_written(start: bytes) -> bool:
    """Whether this may be a head of which some was there and the rest was not yet when the power failed.

    Its first page is written at once, after all else: so it is whole, and what does not go with it is text, the manifest's or
    the log's, or zeros. Superblocks are neither.
    """
    _, version, state, _, manifest_size, log_size = _HEAD.unpack_from(start)
    page, manifest, log = start[:_MANIFEST_OFFSET], start[_MANIFEST_OFFSET:_LOG_OFFSET], start[_LOG_OFFSET:]
    return (
        (version, state) in ((_VERSION, _INCOMPLETE), (_VERSION, _WHOLE))
        and manifest_size <= len(manifest)
        and log_size <= _LOG_ROOM
        and not page[_HEAD.size + _HASH_SIZE :].strip(b"\0")
        and not manifest.translate(None, _TEXT)
        and (log.startswith(_AGE) or not log.translate(None, _TEXT + bytes(range(0x80, 0x100))))
    )
