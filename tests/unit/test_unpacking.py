import errno
import json
import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.errors import FormatError
from crashkernel.formats.flattened import END, HEADER, record_header
from crashkernel.target.unpacking import Extents, Unpacker
from support.dumps import contents, dump_bytes, flattened

DATA = dump_bytes(200_000)
STREAM = flattened(DATA)
PLAIN = b"\x7fELF" + DATA


@given(st.lists(st.integers(12, len(STREAM) - 1), max_size=6), st.sampled_from((STREAM, PLAIN)))
def test_may_go_on_in_another_process_after_each_piece(tmp_path_factory, cuts, stream):
    path = tmp_path_factory.mktemp("unpacking") / "dump"
    edges = [0, *sorted(cuts), len(stream)]
    state = None
    for start, end in pairwise(edges):
        with path.open("r+b" if path.exists() else "w+b") as file:
            for _ in range(2):  # interrupted once it had put a piece, and before it could note that
                unpacker = Unpacker(file.fileno(), start=100)
                if state:
                    unpacker.resume(json.loads(state))
                unpacker.put(stream[start:end])
            state = json.dumps(unpacker.state())
            if end == len(stream):
                unpacker.finish()
    assert path.read_bytes()[100:] == (DATA if stream is STREAM else PLAIN)[: unpacker.size]
    assert unpacker.size == len(DATA if stream is STREAM else PLAIN)
    assert unpacker.flattened == (stream is STREAM)


@pytest.mark.parametrize("size", [12, 4095, 4096, 5000, len(STREAM) - 16, len(STREAM) - 1])
def test_a_cut_stream_is_noticed(tmp_path, size):
    with (tmp_path / "dump").open("w+b") as file:
        unpacker = Unpacker(file.fileno())
        unpacker.put(STREAM[:size])
        with pytest.raises(FormatError, match="cut off"):
            unpacker.finish()


def put(tmp_path, *records: tuple[int, bytes]) -> Extents:
    extents = Extents()
    with (tmp_path / "dump").open("w+b") as file:
        unpacker = Unpacker(file.fileno(), extents=extents)
        unpacker.put(HEADER + b"".join(record_header(at, len(data)) + data for at, data in records) + END)
        unpacker.finish()
    return extents


@given(
    st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=100)), min_size=1, max_size=12),
    st.integers(0, 400),
)
def test_extents_tell_what_a_file_lost(tmp_path_factory, records, at):
    tmp_path = tmp_path_factory.mktemp("extents")
    extents = Extents(put(tmp_path, *records).packed())
    owner = {}
    for number, (start, data) in enumerate(records):
        owner |= dict.fromkeys(range(start, start + len(data)), number)
    size = max(owner) + 1
    assert {byte for hole in extents.holes(size) for byte in range(*hole)} == set(range(size)) - set(owner)
    with (tmp_path / "dump").open("r+b") as file:
        assert extents.first_lost(file.fileno()) is None
        before = os.pread(file.fileno(), 1, at)
        last = len(records) - 1
        if owner.get(at) == last:
            os.pwrite(file.fileno(), bytes([before[0] ^ 1]), at)
            assert extents.first_lost(file.fileno()) is not None
            os.pwrite(file.fileno(), before, at)
            os.ftruncate(file.fileno(), at)
            assert extents.first_lost(file.fileno()) is not None


def test_extents_are_few_where_bytes_follow_each_other(tmp_path):
    assert len(put(tmp_path, *((at, b"x" * 10) for at in range(0, 1000, 10)))) == 1
    assert len(put(tmp_path, (100, b"x"), (0, b"x" * 100), (101, b"x"))) == 3


def test_no_extents():
    with pytest.raises(FormatError, match="cut off"):
        Extents(b"x")


def test_a_stream_about_nothing_is_none(tmp_path):
    put(tmp_path, (1 << 20, b"x"))
    with pytest.raises(FormatError, match="about a file of"):
        put(tmp_path, (1 << 30, b"x"))


def test_a_limit_is_one_for_offsets_too(tmp_path):
    with (tmp_path / "dump").open("w+b") as file:
        for stream in (STREAM, PLAIN):
            unpacker = Unpacker(file.fileno(), limit=100_000)
            with pytest.raises(OSError, match="File too large") as caught:
                unpacker.put(stream)
            assert caught.value.errno == errno.EFBIG
    assert (tmp_path / "dump").stat().st_size <= 100_000


def test_what_is_stored_has_its_own_format(tmp_path):
    for inner, form in ((DATA, "kdump-compressed"), (PLAIN, "elf")):
        with (tmp_path / "dump").open("w+b") as file:
            unpacker = Unpacker(file.fileno())
            unpacker.put(flattened(inner))
            assert unpacker.contents(contents("flattened")) == contents(form)
    with (tmp_path / "dump").open("w+b") as file:
        unpacker = Unpacker(file.fileno())
        unpacker.put(b"age-encryption.org/v1")
        assert unpacker.contents(contents("flattened")) == contents("flattened")


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"size": -1, "position": 0, "decoder": None},
        {"size": 0, "position": "1", "decoder": None},
        {"size": 0, "position": 0, "decoder": []},
        {"size": 0, "position": 0, "decoder": {}},
        {
            "size": 0,
            "position": 0,
            "decoder": {"ended": False, "in_records": True, "position": 0, "file_offset": -1, "left": 0, "head": ""},
        },
        {
            "size": 0,
            "position": 0,
            "decoder": {"ended": False, "in_records": True, "position": 0, "file_offset": 0, "left": 0, "head": "x"},
        },
    ],
)
def test_no_state(tmp_path, state):
    with (tmp_path / "dump").open("w+b") as file, pytest.raises(FormatError, match="no state"):
        Unpacker(file.fileno()).resume(state)
