import hashlib
import json
import os
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashkernel.errors import FormatError
from crashkernel.target import manifest
from crashkernel.target.manifest import (
    PIECE_SIZE,
    Contents,
    Digest,
    Manifest,
    PageCounts,
    PieceHasher,
    digest_file,
    digest_of_pieces,
    manifest_name,
)
from support.hostile import corrupted, survives, truncations

CONTENTS = Contents(
    format="kdump-compressed",
    codec="zstd",
    level=31,
    page_size=65536,
    pages=PageCounts(kept=10, zero=3, unreadable=1, cache=4, cache_private=5, user=6, free=7, poisoned=1, offline=2),
    release="6.1.0-37-powerpc64le",
    machine="ppc64le",
    panic="Kernel panic - not syncing: sysrq triggered crash",
    crash_time=1124377373,
)
SAMPLE = Manifest(file="vmcore", size=1234, digest=Digest("ab" * 32), contents=CONTENTS, encrypted_to="age1xyz")


def expected(data: bytes) -> str:
    """The digest by its definition."""
    pieces = [hashlib.sha256(data[at : at + PIECE_SIZE]).digest() for at in range(0, len(data), PIECE_SIZE)]
    return hashlib.sha256(b"".join(pieces)).hexdigest()


def test_comes_back_from_json():
    assert Manifest.from_json(SAMPLE.to_json()) == SAMPLE
    plain = Manifest("vmcore.flat", 0, Digest("00" * 32), Contents("flattened", "none", 0, 4096, PageCounts(), "", "x86_64"))
    assert Manifest.from_json(plain.to_json().encode()) == plain


def test_what_a_dead_kernel_says_cannot_act_on_a_terminal_nor_break_the_manifest():
    hostile = Contents("elf", "none", 0, 4096, PageCounts(), "6.1\x1b[2J", "ppc64", panic="Oops\n\x00\udc80é")
    assert (hostile.release, hostile.panic) == ("6.1?[2J", "Oops???é")
    sent = Manifest("vmcore", 1, Digest("00" * 32), hostile)
    assert Manifest.from_json(sent.to_json()) == sent


def test_the_dropped_pages_are_all_but_the_kept():
    assert CONTENTS.pages.dropped == 4 + 5 + 6 + 7 + 1 + 2


def test_the_sign_off_is_the_digest_of_the_canonical_rest():
    record = json.loads(SAMPLE.to_json())
    signed = record.pop("sign_off")
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    assert signed == hashlib.sha256(canonical).hexdigest()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"complete": False}, "not complete"),
        ({"file": "../vmcore"}, "no file's name"),
        ({"file": ".."}, "no file's name"),
        ({"file": ""}, "no file's name"),
        ({"bytes": -1}, "no count"),
        ({"bytes": True}, "no count"),
        ({"digest": {"algorithm": "md5", "piece_size": PIECE_SIZE, "root": "ab" * 32}}, "none of sha256-pieces"),
        ({"digest": {"algorithm": "sha256-pieces", "piece_size": 1, "root": "ab" * 32}}, "1 is not"),
        ({"digest": {"algorithm": "sha256-pieces", "piece_size": PIECE_SIZE, "root": "AB" * 32}}, "no sha256"),
        ({"digest": {"algorithm": "sha256-pieces", "piece_size": PIECE_SIZE}}, "lacks 'root'"),
        ({"pages": []}, "no object"),
        ({"manifest": 2}, "of version 2"),
        ({"encrypted_to": "a\nb"}, "no printable text"),
    ],
)
def test_refuses_what_it_says_wrong_though_signed_off(change, says):
    record = json.loads(SAMPLE.to_json())
    del record["sign_off"]
    record |= change
    with pytest.raises(FormatError, match=says):
        Manifest.from_json(json.dumps({**record, "sign_off": manifest._sign_off(record)}), "m")


def test_an_edited_one_is_noticed():
    with pytest.raises(FormatError, match="sign-off"):
        Manifest.from_json(SAMPLE.to_json().replace('"bytes": 1234', '"bytes": 1235'))


def test_any_cut_is_noticed():
    whole = SAMPLE.to_json().rstrip().encode()
    assert not any(survives(Manifest.from_json, cut) for cut in truncations(whole))


@given(corrupted(SAMPLE.to_json().encode()))
def test_damage_is_noticed_or_changes_nothing(data):
    if survives(Manifest.from_json, data):
        assert Manifest.from_json(data) == SAMPLE


@pytest.mark.parametrize("size", [0, 1, PIECE_SIZE - 1, PIECE_SIZE, PIECE_SIZE + 1, 3 * PIECE_SIZE + 77])
def test_stream_file_and_definition_agree(tmp_path, size):
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    stream = PieceHasher()
    for at in range(0, size, 999_983):
        stream.update(data[at : at + 999_983])
    assert stream.size == size
    assert stream.digest().root == expected(data)
    path = tmp_path / "dump"
    path.write_bytes(b"head" + data + b"tail")
    pieces = []
    with path.open("rb") as file:
        for workers in (1, 3):
            pieces.clear()
            digest = digest_file(file.fileno(), size, start=4, workers=workers, progress=lambda: pieces.append(1))
            assert digest.root == expected(data)
            assert len(pieces) == -(-size // PIECE_SIZE)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 2 * PIECE_SIZE), max_size=6))
def test_a_stream_may_be_cut_anywhere(sizes):
    data, stream = bytes(sum(sizes)), PieceHasher()
    for size in sizes:
        stream.update(bytes(size))
    assert stream.digest().root == expected(data)


def test_one_bit_matters(tmp_path):
    data = bytearray(PIECE_SIZE + 100)
    digests = set()
    for at in (None, 0, PIECE_SIZE - 1, PIECE_SIZE, PIECE_SIZE + 99):
        if at is not None:
            data[at] ^= 1
        digests.add(expected(bytes(data)))
        path = tmp_path / "dump"
        path.write_bytes(data)
        with path.open("rb") as file:
            assert digest_file(file.fileno(), len(data)).root in digests
    assert len(digests) == 5


def test_a_file_that_ends_early_is_an_error(tmp_path):
    path = tmp_path / "dump"
    path.write_bytes(b"short")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="ends at 5"):
            digest_file(descriptor, 6)
    finally:
        os.close(descriptor)


def test_pieces_given_are_the_same_digest():
    data = bytes(PIECE_SIZE) + b"x"
    pieces = hashlib.sha256(bytes(PIECE_SIZE)).digest() + hashlib.sha256(b"x").digest()
    assert digest_of_pieces(pieces).root == expected(data)


def test_name():
    assert manifest_name("vmcore.flat") == "vmcore.flat.manifest.json"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_digest_takes_32_bytes_a_piece(tmp_path, monkeypatch, workers):
    number = 20_000
    monkeypatch.setattr(manifest, "piece_digest", lambda descriptor, file_offset, size: b"x" * 32)
    tracemalloc.start()
    try:
        digest = digest_file(-1, number * PIECE_SIZE, workers=workers)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert digest == digest_of_pieces(b"x" * 32 * number)
    assert peak < 50 * number


def test_a_failure_of_one_thread_is_told(tmp_path, monkeypatch):
    def piece_digest(descriptor, file_offset, size):
        if file_offset == 37 * PIECE_SIZE:
            raise OSError(5, "Input/output error")
        return b"x" * 32

    monkeypatch.setattr(manifest, "piece_digest", piece_digest)
    with pytest.raises(OSError, match="Input/output error"):
        digest_file(-1, 100 * PIECE_SIZE, workers=4)
