"""Copies of large files, most of which is zeros."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK = 64 << 10  # what is all zero in blocks of this many bytes becomes a hole
_CHUNK = 4 << 20


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file and leave out its zeros: most of a fresh machine's memory was never touched."""
    target.touch()
    place_sparse(source, target, 0)


def place_sparse(source: Path, target: Path, at: int) -> None:
    """Copy a file likewise into another, which becomes that large and ends with it; zeros are left as they are there."""
    with source.open("rb") as src, target.open("r+b") as dst:
        size = os.fstat(src.fileno()).st_size
        dst.truncate(at)
        dst.truncate(at + size)
        starts = range(0, size, _CHUNK)
        with ThreadPoolExecutor(max_workers=2) as pool:  # reading, looking and writing all let go of the interpreter
            for _ in pool.map(lambda start: _copy_chunk(src.fileno(), dst.fileno(), start, at), starts):
                pass


def _copy_chunk(src: int, dst: int, start: int, shift: int) -> None:
    data = os.pread(src, _CHUNK, start)
    whole = len(data) // _BLOCK * _BLOCK
    filled = np.frombuffer(data, np.uint64, whole // 8).reshape(-1, _BLOCK // 8).any(axis=1)
    for number in np.flatnonzero(filled):
        at = int(number) * _BLOCK
        os.pwrite(dst, data[at : at + _BLOCK], shift + start + at)
    if any(data[whole:]):
        os.pwrite(dst, data[whole:], shift + start + whole)
