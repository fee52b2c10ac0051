import errno
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.errors import FormatError
from crashkernel.target.unpacking import Unpacker
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
