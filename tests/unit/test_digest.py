"""The digest of what is loaded, held against a model that goes bit by bit and against the damage it promises to see."""

import importlib
import itertools
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashkernel.purgatory.digest import BLOCK, DIGEST_SIZE, LANES, WORD, crc_tables, digest

module = importlib.import_module("crashkernel.purgatory.digest")  # the package has the function by that name

TABLES = crc_tables()
POLYNOMIAL = 0x04C11DB7
"""IEEE 802.3's, most significant coefficient first."""


def slow(data: bytes, size: int) -> bytes:
    """The definition, by long division: one bit at a time into the register of the lane that the bit's word belongs to."""
    registers = [0xFFFFFFFF] * LANES
    for at, byte in enumerate(data + bytes(size - len(data))):
        lane = at // WORD % LANES
        for bit in range(8):
            top = registers[lane] >> 31 ^ byte >> bit & 1
            registers[lane] = registers[lane] << 1 & 0xFFFFFFFF ^ (POLYNOMIAL if top else 0)
    # zlib keeps the register mirrored; its lowest byte comes first
    return b"".join(int(f"{register:032b}"[::-1], 2).to_bytes(4, "little") for register in (registers[-1], *registers[:-1]))


blocks = st.integers(0, 8).map(lambda count: count * BLOCK)


@st.composite
def contents(draw: st.DrawFn) -> tuple[bytes, int]:
    """Bytes, and a size in whole blocks that holds them."""
    size = draw(blocks)
    return draw(st.binary(max_size=size)), size


@st.composite
def whole(draw: st.DrawFn) -> bytes:
    """One to eight blocks of bytes."""
    size = draw(st.integers(1, 8)) * BLOCK
    return draw(st.binary(min_size=size, max_size=size))


def changed(data: bytes, at: int, pattern: bytes) -> bytes:
    """`pattern` on top of what was there, as a fault that flips these bits would leave it."""
    faulty = bytearray(data)
    for number, byte in enumerate(pattern):
        faulty[at + number] ^= byte
    return bytes(faulty)


class TestDefinition:
    @settings(max_examples=50)
    @given(contents())
    def test_bit_by_bit(self, content):
        data, size = content
        assert digest(data, size) == slow(data, size)

    @given(whole())
    def test_each_lane_is_zlib_s_crc_of_every_sixteenth_word(self, data):
        lanes = [b"".join(data[at : at + 4] for at in range(4 * lane, len(data), BLOCK)) for lane in range(LANES)]
        found = digest(data, len(data))
        places = [(lane + 1) % LANES for lane in range(LANES)]  # none in its own: see digest.digest
        assert [int.from_bytes(found[4 * n : 4 * n + 4], "little") ^ 0xFFFFFFFF for n in places] == [
            zlib.crc32(lane) for lane in lanes
        ]

    def test_a_known_value(self):
        """The text that every catalogue of CRCs is checked with, as the first lane of three blocks."""
        assert zlib.crc32(b"123456789") == 0xCBF43926
        data = b"".join(word.ljust(BLOCK, b"\0") for word in (b"1234", b"5678", b"9"))
        wanted = zlib.crc32(b"123456789\0\0\0") ^ 0xFFFFFFFF
        assert digest(data, len(data))[4:8] == wanted.to_bytes(4, "little")

    def test_of_nothing(self):
        assert digest(b"", 0) == b"\xff" * DIGEST_SIZE
        assert (LANES, WORD, BLOCK, DIGEST_SIZE) == (16, 4, 64, 64)

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_any_bytes(self, kind):
        data = bytes(range(256))
        assert digest(kind(data), 256) == digest(data, 256)


class TestSize:
    @given(contents())
    def test_what_is_missing_is_zeros(self, content):
        data, size = content
        assert digest(data, size) == digest(data.ljust(size, b"\0"), size)

    @given(st.binary(max_size=200), st.integers(0, 300))
    def test_no_whole_block_or_too_small(self, data, size):
        if size % BLOCK == 0 and size >= len(data):
            assert len(digest(data, size)) == DIGEST_SIZE
        else:
            with pytest.raises(ValueError, match=f"{len(data)} bytes of data in {size}"):
                digest(data, size)

    @given(whole(), blocks)
    def test_a_longer_one_is_another_one(self, data, more):
        """Zeros behind the data count: a CRC's register keeps changing."""
        assert (digest(data, len(data) + more) == digest(data, len(data))) is (more == 0)

    @settings(max_examples=40)
    @given(contents(), st.sampled_from((BLOCK, 2 * BLOCK, 3 * BLOCK, 1 << 16)))
    def test_the_chunks_it_is_made_in_do_not_show(self, content, chunk):
        data, size = content
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_CHUNK", chunk)
            chunked = digest(data, size)
        assert chunked == digest(data, size)

    def test_across_the_chunks_it_really_uses(self):
        size = 3 * module._CHUNK + 5 * BLOCK
        assert module._CHUNK % BLOCK == 0
        data = np.random.default_rng(0).integers(0, 256, size - module._CHUNK - 77, np.uint8).tobytes()
        padded = np.frombuffer(data.ljust(size, b"\0"), np.uint32).reshape(-1, LANES)
        lanes = [zlib.crc32(padded[:, lane].tobytes()) ^ 0xFFFFFFFF for lane in range(LANES)]
        assert digest(data, size) == b"".join(crc.to_bytes(4, "little") for crc in (lanes[-1], *lanes[:-1]))


class TestDamage:
    @given(whole(), st.data())
    def test_a_flipped_bit(self, data, draw):
        bit = draw.draw(st.integers(0, 8 * len(data) - 1))
        faulty = changed(data, bit // 8, bytes((1 << bit % 8,)))
        before, after = digest(data, len(data)), digest(faulty, len(data))
        assert [n for n in range(LANES) if before[4 * n : 4 * n + 4] != after[4 * n : 4 * n + 4]] == [(bit // 32 + 1) % LANES]

    @given(whole(), st.data())
    def test_two_flipped_bits(self, data, draw):
        first, second = draw.draw(st.lists(st.integers(0, 8 * len(data) - 1), min_size=2, max_size=2, unique=True))
        faulty = changed(changed(data, first // 8, bytes((1 << first % 8,))), second // 8, bytes((1 << second % 8,)))
        assert digest(faulty, len(data)) != digest(data, len(data))

    @given(whole(), st.data())
    def test_a_burst_anywhere(self, data, draw):
        at = draw.draw(st.integers(0, len(data) - 1))
        pattern = draw.draw(st.binary(min_size=1, max_size=min(BLOCK, len(data) - at)).filter(any))
        assert digest(changed(data, at, pattern), len(data)) != digest(data, len(data))

    @given(whole(), st.data())
    def test_a_line_that_was_lost(self, data, draw):
        """A cache line that never reached memory is the burst of two blocks: seen with all but one in 2^32 of patterns."""
        at = draw.draw(st.integers(0, len(data) // BLOCK - 1)) * BLOCK
        lost = bytearray(data)
        lost[at : at + 2 * BLOCK] = bytes(len(data[at : at + 2 * BLOCK]))
        assert (digest(bytes(lost), len(data)) == digest(data, len(data))) is (bytes(lost) == data)

    def test_every_pair_of_bits_of_a_lane(self):
        """Exhaustively, over 2 KiB: no two bits of a lane, and no bit alone, leave its register as it was."""
        seen = set()
        for position in range(8 * 4 * 32):  # 32 words in a lane
            word = bytearray(4 * 32)
            word[position // 8] = 1 << position % 8
            seen.add(zlib.crc32(bytes(word)) ^ zlib.crc32(bytes(4 * 32)))
        assert len(seen) == 8 * 4 * 32
        assert 0 not in seen

    def test_a_hundred_thousand_faults(self):
        """CRCs are linear: a fault is seen if the digest of its pattern is not that of zeros, whatever it falls on.

        So the fault's own 64 to 128 bytes tell, put into a run of zeros; `test_linear` holds the digest to that.
        """
        random = np.random.default_rng(2005)
        quiet = digest(bytes(3 * BLOCK), 3 * BLOCK)
        missed = 0
        for kind, count in (("bit", 20_000), ("two", 30_000), ("burst", 50_000)):
            starts = random.integers(0, 2 * BLOCK, count)
            lengths = random.integers(1, BLOCK + 1, count)
            bits = random.integers(0, 8 * 3 * BLOCK, (count, 2))
            noise = random.integers(0, 256, (count, BLOCK), np.uint8)
            noise[:, 0] |= 1
            for n in range(count):
                faulty = bytearray(3 * BLOCK)
                if kind == "burst":
                    faulty[starts[n] : starts[n] + lengths[n]] = noise[n, : lengths[n]].tobytes()
                else:
                    for bit in bits[n, : 1 if kind == "bit" else 2].tolist():
                        faulty[bit // 8] ^= 1 << bit % 8
                if any(faulty):
                    missed += digest(bytes(faulty), 3 * BLOCK) == quiet
        assert missed == 0

    @given(whole(), st.data())
    def test_linear(self, data, draw):
        pattern = draw.draw(st.binary(min_size=len(data), max_size=len(data)))
        before, after, alone, quiet = (
            int.from_bytes(digest(each, len(data)), "big")
            for each in (data, changed(data, 0, pattern), pattern, bytes(len(data)))
        )
        assert before ^ after == alone ^ quiet

    def test_faults_that_are_no_burst_are_seen_too(self):
        """What it does not promise it nearly always keeps: words and blocks that change places."""
        data = np.random.default_rng(7).integers(0, 256, 64 * BLOCK, np.uint8).tobytes()
        good = digest(data, len(data))
        for first, second in itertools.combinations(range(0, len(data), 5 * BLOCK), 2):
            faulty = bytearray(data)
            faulty[first : first + BLOCK], faulty[second : second + BLOCK] = (
                data[second : second + BLOCK],
                data[first : first + BLOCK],
            )
            assert digest(bytes(faulty), len(data)) != good


class TestTables:
    """What the purgatory computes with: it looks each byte of a word up in a table of its own."""

    @staticmethod
    def entry(table: int, byte: int) -> bytes:
        at = 1024 * table + 4 * byte
        return TABLES[at : at + 4]

    def test_their_size(self):
        assert len(crc_tables()) == 4 * 256 * 4

    @pytest.mark.parametrize("zeros", range(4))
    def test_against_zlib(self, zeros):
        """zlib inverts before and after; the difference from the CRC of zeros alone is the table's entry."""
        for byte in range(256):
            entry = zlib.crc32(bytes((byte, *bytes(zeros)))) ^ zlib.crc32(bytes(1 + zeros))
            assert self.entry(zeros, byte) == entry.to_bytes(4, "little")

    @given(st.lists(st.binary(min_size=4, max_size=4), max_size=20))
    def test_the_purgatory_s_step(self, words):
        """Four look-ups a word, on bytes in memory order: first byte by the table of three zeros, and so on."""
        register = b"\xff" * 4
        for word in words:
            mixed = bytes(a ^ b for a, b in zip(register, word, strict=True))
            entries = [self.entry(3 - n, mixed[n]) for n in range(4)]
            register = bytes(a ^ b ^ c ^ d for a, b, c, d in zip(*entries, strict=True))
        assert register == (zlib.crc32(b"".join(words)) ^ 0xFFFFFFFF).to_bytes(4, "little")
