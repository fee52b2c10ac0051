"""Damage for parsers: whatever the bytes, a parser reads them or raises FormatError, in bounded time and memory."""

import tracemalloc
from collections.abc import Callable, Iterator

from hypothesis import strategies as st

from crashkernel.errors import FormatError


def survives(parse: Callable[[bytes], object], data: bytes) -> bool:
    """Whether `parse` read `data`; anything but success and FormatError escapes to the test."""
    try:
        parse(data)
    except FormatError:
        return False
    return True


def truncations(data: bytes, step: int = 1) -> Iterator[bytes]:
    return (data[:length] for length in range(0, len(data), step))


@st.composite
def corrupted(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` after one to six faults: a byte or an aligned word replaced, a stretch removed, doubled or zeroed."""
    blob = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(blob) - 1, 0)))
        length = draw(st.integers(1, 16))
        fault = draw(st.sampled_from(("byte", "word", "remove", "double", "zero")))
        if fault == "byte":
            blob[at : at + 1] = bytes((draw(st.integers(0, 255)),))
        elif fault == "word":
            at -= at % 4
            word = draw(st.sampled_from((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)) | st.integers(0, 0x200))
            blob[at : at + 4] = word.to_bytes(4, draw(st.sampled_from(("little", "big"))))
        elif fault == "remove":
            del blob[at : at + length]
        elif fault == "double":
            blob[at:at] = blob[at : at + length]
        else:
            blob[at : at + length] = bytes(length)
    return bytes(blob)


def peak_memory(parse: Callable[[bytes], object], data: bytes) -> int:
    """Bytes allocated at the worst moment of parsing `data`."""
    tracemalloc.start()
    try:
        survives(parse, data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
