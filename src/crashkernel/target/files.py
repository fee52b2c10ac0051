"""Files that get their name when they are whole, in a directory.

The order that makes a dump whole, so that a crash or a kill between any two steps leaves either no dump's name, or a dump's
name with its manifest beside it and all its bytes on the disk:

1. the dump is written to `vmcore.incomplete` and flushed (fsync), and its digest taken;
2. the manifest is written by an incomplete name, flushed, given its own name, and the directory flushed;
3. the dump is given its name, and the directory flushed.

A name that exists is never replaced: renameat2(RENAME_NOREPLACE), or link(2) where the file system does not know that (NFS).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from crashkernel.target.base import INCOMPLETE, SLOWEST, Heartbeat
from crashkernel.target.manifest import Manifest, manifest_name

_T = TypeVar("_T")

_MOST_OF_A_NAME = 100
"""How many times a name that is taken is tried with -1, -2, ... behind it."""

_RENAME_NOREPLACE = 1  # include/uapi/linux/fs.h
_AT_FDCWD = -100  # include/uapi/linux/fcntl.h


def put_file(directory: Path, name: str, data: bytes) -> None:
    """Store a small file, whole or not at all; if there is one of that name, as `name`-1 and so on.

    :raise OSError: it cannot be stored.
    """
    descriptor, scratch = create_file(directory, name)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
        first_free(directory / name, lambda path: give_name(scratch, path))
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    flush_directory(directory)


def create_file(directory: Path, name: str) -> tuple[int, Path]:
    """A new file for what is to be called `name`: its descriptor and its incomplete name.

    :raise OSError: it cannot be created.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return first_free(directory / (name + INCOMPLETE), lambda path: os.open(path, flags, 0o600))


def name_dump(scratch: Path, manifest: Manifest) -> Path:
    """Give a dump that was flushed its manifest and its name: step 2 and 3. It can be repeated if it was interrupted.

    :raise FileExistsError: somebody else has taken the dump's name, or its manifest's.
    :raise OSError: the disk failed.
    """
    path = scratch.with_name(manifest.file)
    beside = path.with_name(manifest_name(path.name))
    text = manifest.to_json().encode()
    ours = _holds(beside, text)
    if not ours:
        descriptor, unsigned = create_file(path.parent, beside.name)
        try:
            write_all(descriptor, text)
            os.fsync(descriptor)
            give_name(unsigned, beside)
        except BaseException:
            unsigned.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    flush_directory(path.parent)
    try:
        give_name(scratch, path)
    except OSError:
        if not ours:
            beside.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)
    return path


def flush(descriptor: int, alive: Heartbeat) -> int:
    """Wait until a file's bytes are on the disk; its size in bytes.

    :raise OSError: the disk failed. The file is then worth nothing: the kernel reports a lost write once and forgets it.
    """
    size = os.fstat(descriptor).st_size
    alive.beat(allow=size / SLOWEST)
    os.fsync(descriptor)
    alive.beat()
    return size


def give_name(scratch: Path, path: Path) -> None:
    """Rename a file, but never onto one that exists.

    :raise FileExistsError: the name is taken.
    :raise OSError: it cannot be renamed.
    """
    try:
        _rename_noreplace(scratch, path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        os.link(scratch, path)
        scratch.unlink()


def _rename_noreplace(source: Path, path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))


def first_free(path: Path, take: Callable[[Path], _T]) -> tuple[_T, Path]:
    """Take `path`, or, if that exists, the first of `path`-1, -2, ... that does not: what `take` returned, and which."""
    for number in range(_MOST_OF_A_NAME):
        candidate = path.with_name(f"{path.name}-{number}") if number else path
        try:
            return take(candidate), candidate
        except FileExistsError:
            continue
    raise FileExistsError(errno.EEXIST, f"there are {_MOST_OF_A_NAME} of {path.name} already", str(path))


def make_directory(path: Path) -> Path:
    """A new directory of this name, or, if there is one, of `path`-1 and so on; only its owner may enter.

    :raise OSError: it cannot be made.
    """
    _, made = first_free(path, lambda path: path.mkdir(mode=0o700))
    flush_directory(path.parent)
    return made


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data` where the descriptor stands.

    :raise OSError: it does not take it.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def flush_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk.

    :raise OSError: the disk failed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.is_file() and not path.is_symlink() and path.read_bytes() == data
    except OSError:
        return False
