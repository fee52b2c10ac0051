"""The digest that what was loaded is held against at a panic: sixteen CRC-32s over the words of the data, word by word in turn.

Lane j is the CRC-32 (zlib's: polynomial 0x04c11db7, reflected) of the words j, j + 16, j + 32 … A word is 4 bytes. Hence:

- a flipped bit changes one lane: a CRC-32 misses no single bit;
- two flipped bits change one lane or two: a CRC-32 misses no two bits within 2^32 - 1 (512 MiB of a lane, 8 GiB of data);
- a burst of up to 64 whole bytes leaves in each lane it touches at most 4 neighbouring bytes: a CRC-32 misses no burst of 32
  bits.

Anything else goes unseen once in 2^32 for each lane that it touches. It is no defence against an enemy, who could repair
the digest too.

It is what both ends are good at: `zlib.crc32` here, thirteen instructions a word in the purgatory.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from functools import cache

LANES = 16
WORD = 4
BLOCK = LANES * WORD
"""Bytes; the data is a whole number of these."""

DIGEST_SIZE = LANES * 4
_CHUNK = 1 << 17  # fits a cache with the copies made of it
_POLYNOMIAL = 0xEDB88320  # bit-reversed


def digest(data: bytes, size: int) -> bytes:
    """The digest of `data`, followed by zeros up to `size` bytes (a multiple of `BLOCK`), as the purgatory compares it.

    64 bytes: for each lane the CRC's register after the last word, before zlib's final inversion, least significant byte
    first. The last lane's comes first: a CRC over data and its own CRC would be the same for all data, so a digest that
    covered rows with theirs (the image's) would not know one row from another. So each stands in another lane than its own.
    """
    if size % BLOCK or len(data) > size:
        raise ValueError(f"{len(data)} bytes of data in {size}, which must hold it and be a multiple of {BLOCK}")
    lanes = [0] * LANES
    view = memoryview(data)
    for start in range(0, size, _CHUNK):
        piece = view[start : start + _CHUNK]
        words = array("I")
        words.frombytes(bytes(piece).ljust(min(_CHUNK, size - start), b"\0") if len(piece) < _CHUNK else piece)
        for lane in range(LANES):
            lanes[lane] = zlib.crc32(words[lane::LANES], lanes[lane])
    return struct.pack(f"<{LANES}I", *(~crc & 0xFFFFFFFF for crc in (lanes[-1], *lanes[:-1])))


@cache
def crc_tables() -> bytes:
    """The purgatory's four tables of 256 words: entry b of table n is the CRC of byte b followed by n bytes of zeros.

    Each word's bytes stand in the order in which they meet the data's, so that neither kernel's byte order matters.
    """
    first = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        first.append(crc)
    tables = [first]
    for _ in range(3):
        tables.append([crc >> 8 ^ first[crc & 0xFF] for crc in tables[-1]])
    return b"".join(struct.pack("<256I", *table) for table in tables)
