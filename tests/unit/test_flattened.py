import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashkernel.errors import FormatError, UsageError
from crashkernel.formats import flattened
from crashkernel.formats.flattened import Decoder, Record, read_record_header, record_header
from support.hostile import corrupted, peak_memory, survives, truncations
from support.kdumps import write_flattened

records = st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=300)), max_size=8)


def rebuilt(stream: bytes, step: int | None = None) -> bytes:
    """The file that a stream describes, fed to a decoder in pieces of `step` bytes."""
    decoder = Decoder("stream")
    out = bytearray()
    for start in range(0, len(stream), step or max(len(stream), 1)):
        for offset, data in decoder.feed(stream[start : start + (step or len(stream))]):
            out.extend(bytes(max(0, offset + len(data) - len(out))))
            out[offset : offset + len(data)] = data
    decoder.finish()
    assert decoder.position == len(stream)
    return bytes(out)


def described(parts: list[tuple[int, bytes]]) -> bytes:
    out = bytearray()
    for offset, data in parts:
        out.extend(bytes(max(0, offset + len(data) - len(out))))
        out[offset : offset + len(data)] = data
    return bytes(out)


def test_what_we_write_is_what_makedumpfile_writes():
    parts = [(0, b"head"), (0x1234567890, b"x" * 99)]
    ours = flattened.HEADER + b"".join(record_header(at, len(data)) + data for at, data in parts) + flattened.END
    assert ours == write_flattened(parts)


@given(records, st.integers(1, 5000))
def test_pieces_of_any_size_give_the_same_file(parts, step):
    stream = write_flattened(parts)
    assert rebuilt(stream, step) == rebuilt(stream) == described(parts)


def test_a_byte_at_a_time():
    parts = [(7, b"abc"), (0, b"defghijk"), (100, b"l")]
    assert rebuilt(write_flattened(parts), 1) == described(parts)


def test_an_empty_stream_is_an_empty_file():
    assert rebuilt(write_flattened([])) == b""


@given(records, st.data())
def test_goes_on_in_another_process(parts, data):
    stream = write_flattened(parts)
    cut = data.draw(st.integers(0, len(stream)))
    first = Decoder()
    pieces = [(offset, bytes(some)) for offset, some in first.feed(stream[:cut])]
    second = Decoder.resumed(first.state())
    pieces += [(offset, bytes(some)) for offset, some in second.feed(stream[cut:])]
    second.finish()
    assert described(pieces) == described(parts)


def test_a_state_that_is_none():
    good = Decoder().state()
    for bad in ({}, good | {"position": -1}, good | {"head": "xyz"}, good | {"ended": 1}, good | {"head": "00" * 4097}):
        with pytest.raises(FormatError, match="no state"):
            Decoder.resumed(bad)


class TestRefusals:
    @pytest.mark.parametrize(
        ("at", "patch", "match"),
        [
            (0, b"M", "not a flattened dump"),
            (13, b"x", "type 1 and version 1"),
            (23, b"\x02", "type 2 and version 1"),
            (31, b"\x03", "type 1 and version 3"),
            (4096, b"\x80", "a record of .* for offset"),
            (4096 + 8, b"\x80", "a record of -"),
            (4096 + 8, bytes(8), "a record of 0x0 bytes"),
            (4096 + 8, b"\x7f", "a record of 0x7f"),
        ],
    )
    def test_what_is_not_a_stream(self, at, patch, match):
        stream = bytearray(write_flattened([(0, b"abc")]))
        stream[at : at + len(patch)] = patch
        with pytest.raises(FormatError, match=match):
            rebuilt(bytes(stream))

    def test_names_the_place(self):
        with pytest.raises(FormatError) as caught:
            rebuilt(write_flattened([(0, b"abc")], end=False) + b"\x80" + bytes(15))
        assert caught.value.offset == 4096 + 16 + 3

    def test_bytes_behind_the_end(self):
        with pytest.raises(FormatError, match="goes on behind its end"):
            rebuilt(write_flattened([(0, b"abc")]) + b"\0")

    def test_every_truncation(self):
        stream = write_flattened([(0, b"abc"), (9, b"defg")])
        for short in truncations(stream[4000:]):
            with pytest.raises(FormatError, match="cut off"):
                rebuilt(stream[:4000] + short)
        with pytest.raises(FormatError, match="cut off"):
            rebuilt(b"")

    @pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, 0), (0, 1 << 31), (0, -1)])
    def test_records_that_nobody_could_read(self, offset, size):
        with pytest.raises(UsageError, match="no record"):
            record_header(offset, size)

    def test_half_an_end_is_none(self):
        with pytest.raises(FormatError, match="a record of"):
            read_record_header(b"\xff" * 8 + bytes(8), 0)
        assert read_record_header(b"\xff" * 16, 0) is None
        assert read_record_header(record_header(5, 6), 0) == Record(5, 6)

    def test_a_huge_record_allocates_nothing(self):
        stream = write_flattened([], end=False) + (0).to_bytes(8, "big") + (1 << 61).to_bytes(8, "big") + b"x" * 100
        assert peak_memory(lambda data: list(Decoder().feed(data)), stream) < 1 << 16


def decode(stream: bytes) -> None:
    decoder = Decoder()
    for _ in decoder.feed(stream):
        pass
    decoder.finish()


@settings(max_examples=200)
@given(records.flatmap(lambda parts: corrupted(write_flattened(parts))))
def test_damage_is_refused_or_still_a_stream(stream):
    survives(decode, stream)
