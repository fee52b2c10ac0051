"""The "newc" cpio archive, which is what an initramfs is made of.

References: Linux `Documentation/driver-api/early-userspace/buffer-format.rst` (the grammar and the header) and
`init/initramfs.c` (what the kernel makes of it).

Reads "newc" and "crc" (070701, 070702) archives, one or several with zeros between them, uncompressed. Writes "newc".
Owners are neither kept nor written: everything in an initramfs is root's. Hard links are read as the separate entries
they are stored as, of which only the last need have data, and are never written.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from crashkernel.errors import FormatError, UsageError
from crashkernel.memory import align_up

_MAGIC_NEWC = b"070701"
_MAGIC_CRC = b"070702"
_TRAILER = "TRAILER!!!"
_HEX_DIGITS = b"0123456789abcdefABCDEF"
_FIELD = 8  # characters; ino, mode, uid, gid, nlink, mtime, filesize, maj, min, rmaj, rmin, namesize, chksum
_FIELDS = 13
_HEADER_SIZE = 6 + _FIELD * _FIELDS
_ALIGNMENT = 4
_BLOCK = 512  # archives are padded to this, as cpio(1) does
_FIELD_LIMIT = 1 << 32
_ZEROS_AT_ONCE = 1 << 16

# PATH_MAX, NUL included: do_header (init/initramfs.c) silently skips an entry with a longer name or link target.
_PATH_MAX = 4096


@dataclass(frozen=True, slots=True)
class Entry:
    """A member of an archive. `mode` is st_mode, type bits included; a symbolic link's `data` is its target.

    `rdev_major` and `rdev_minor` number a device; `mtime` is in seconds since 1970.
    """

    name: str
    mode: int
    data: bytes = b""
    rdev_major: int = 0
    rdev_minor: int = 0
    nlink: int = 1
    mtime: int = 0

    @classmethod
    def file(cls, name: str, data: bytes, mode: int = 0o644) -> Entry:
        """Return a regular file."""
        return cls(name, stat.S_IFREG | mode, data)

    @classmethod
    def directory(cls, name: str, mode: int = 0o755) -> Entry:
        """Return a directory; it must come before what is in it."""
        return cls(name, stat.S_IFDIR | mode, nlink=2)

    @classmethod
    def symlink(cls, name: str, target: str) -> Entry:
        """Return a symbolic link to `target`."""
        return cls(name, stat.S_IFLNK | 0o777, target.encode("utf-8", "surrogateescape"))

    @classmethod
    def device(cls, name: str, kind: Literal["c", "b"], major: int, minor: int, mode: int = 0o600) -> Entry:
        """Return a character (`c`) or block (`b`) device."""
        return cls(name, (stat.S_IFCHR if kind == "c" else stat.S_IFBLK) | mode, rdev_major=major, rdev_minor=minor)


def pack(entries: Iterable[Entry]) -> bytes:
    """Return the archive of these entries: the same bytes for the same entries, a multiple of 512.

    :raise UsageError: when an entry cannot be stored, as for `write`.
    """
    archive = io.BytesIO()
    write(archive, entries)
    return archive.getvalue()


def write(file: BinaryIO, entries: Iterable[Entry]) -> None:
    """Write the archive of these entries, one at a time, so that an archive larger than memory can be made.

    :raise UsageError: when an entry cannot be stored: its name is empty, has a NUL, is the trailer's or is longer than
        the kernel reads, or a number does not fit in 32 bits (4 GiB of data).
    """
    size = 0
    for inode, entry in enumerate(entries, start=1):
        if not entry.name or "\0" in entry.name or entry.name == _TRAILER:
            raise UsageError(f"{entry.name!r} is no name for a file in an initramfs")
        if stat.S_ISLNK(entry.mode) and len(entry.data) > _PATH_MAX:
            raise UsageError(f"the target of {entry.name} is longer than {_PATH_MAX} bytes")
        size += _write_entry(file, entry, inode)
    size += _write_entry(file, Entry(_TRAILER, 0), 0)
    file.write(bytes(-size % _BLOCK))


def _write_entry(file: BinaryIO, entry: Entry, inode: int) -> int:
    """Write one entry and return the number of bytes."""
    name = entry.name.encode("utf-8", "surrogateescape") + b"\0"
    if len(name) > _PATH_MAX:
        raise UsageError(f"the name {entry.name[:40]}… is longer than {_PATH_MAX - 1} bytes")
    fields = (
        *(inode, entry.mode, 0, 0, entry.nlink, entry.mtime, len(entry.data)),
        *(0, 0, entry.rdev_major, entry.rdev_minor, len(name), 0),
    )
    if not all(0 <= each < _FIELD_LIMIT for each in fields):
        raise UsageError(f"{entry.name} has {len(entry.data)} bytes or a number beyond 32 bits, too much for an initramfs")
    head = _MAGIC_NEWC + b"".join(b"%08x" % each for each in fields) + name
    head += bytes(-len(head) % _ALIGNMENT)
    padding = bytes(-len(entry.data) % _ALIGNMENT)
    file.write(head)
    file.write(entry.data)
    file.write(padding)
    return len(head) + len(entry.data) + len(padding)


def unpack(data: bytes | memoryview, source: str = "") -> Iterator[Entry]:
    """Yield the entries of every archive in `data`, trailers left out; a missing last trailer is no fault.

    :raise FormatError: when something is neither an entry nor zeros between archives, or is cut off, says where.
    """
    view = memoryview(data)
    offset = 0
    while offset < len(view):
        if view[offset] == 0:
            run = bytes(view[offset : offset + _ZEROS_AT_ONCE])
            offset += len(run) - len(run.lstrip(b"\0"))
            continue
        if offset % _ALIGNMENT:
            raise FormatError("an archive starts off its 4-byte boundary", source=source, offset=offset)
        entry, offset = _read_entry(view, offset, source)
        if entry.name != _TRAILER:
            yield entry


def _read_entry(view: memoryview, start: int, source: str) -> tuple[Entry, int]:
    """Return the entry at `start` and the offset of what follows it."""
    magic = bytes(view[start : start + len(_MAGIC_NEWC)])
    if magic not in (_MAGIC_NEWC, _MAGIC_CRC):
        raise FormatError(
            f"{magic!r} is no newc cpio header",
            source=source,
            offset=start,
            hint="a compressed archive is to be unpacked",
        )
    header = bytes(view[start + len(magic) : start + _HEADER_SIZE])
    if len(header) < _FIELD * _FIELDS:
        raise FormatError("a cpio header is cut off", source=source, offset=start)
    if header.translate(None, _HEX_DIGITS):
        raise FormatError("a cpio header has a field that is not hexadecimal", source=source, offset=start)
    fields = (int(header[at : at + _FIELD], 16) for at in range(0, len(header), _FIELD))
    _, mode, _, _, nlink, mtime, size, _, _, rdev_major, rdev_minor, name_size, checksum = fields
    name_start = start + _HEADER_SIZE
    data_start = align_up(name_start + name_size, _ALIGNMENT)
    end = data_start + size
    if end > len(view):
        message = f"a cpio entry of {name_size:#x} and {size:#x} bytes is cut off"
        raise FormatError(message, source=source, offset=start)
    # More than one NUL is how some archivers align the data that follows.
    name, *rest = bytes(view[name_start : name_start + name_size]).partition(b"\0")
    if not name or not rest[0] or rest[1].strip(b"\0"):
        raise FormatError("a cpio entry has no name, or one that does not end", source=source, offset=name_start)
    content = bytes(view[data_start:end])
    if magic == _MAGIC_CRC and sum(content) % _FIELD_LIMIT != checksum:
        raise FormatError(f"the checksum of {name!r} does not match", source=source, offset=data_start)
    text = name.decode("utf-8", "surrogateescape")
    return Entry(text, mode, content, rdev_major, rdev_minor, nlink, mtime), align_up(end, _ALIGNMENT)
