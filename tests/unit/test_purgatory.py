"""The purgatory's bytes. What they do on a CPU is tests/bench's business."""

import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

import crashkernel.purgatory
from crashkernel.errors import PlanError
from crashkernel.machine import HEAD_SIZE, Services
from crashkernel.placement.moves import LINE, MAX_MOVES, Check, Copy, Exchange, Put
from crashkernel.placement.plan import DAMAGE_POLICIES, describe_move
from crashkernel.placement.tables import LOW_PAGE, PURGATORY_SPAN, SAVE_OFFSET
from crashkernel.purgatory import (
    CRC_OFFSET,
    HANDLER_OFFSET,
    LOADED_AT_OFFSETS,
    LOG_OFFSET,
    LOG_SIZE,
    MAGIC,
    PARAMETERS_OFFSET,
    SAVED_HEAD_OFFSET,
    STATE_OFFSET,
    TABLE_OFFSET,
    pack,
    purgatory_bytes,
)
from crashkernel.purgatory.digest import DIGEST_SIZE, digest
from support.machines import HEAD, RTAS_TOKENS, VTY, small_plan

ROOM = Path(crashkernel.purgatory.__file__).parent
SHIPPED = (ROOM / "purgatory.bin").read_bytes()
BASE = 0x5000000
SLAVE_ENTRY = 0x60
"""Where K1 sends its other CPUs (kexec_wait, arch/powerpc/kernel/misc_64.S)."""
VECTORS = range(0x100, 0xE00, 0x80)
NARROW = range(0xE00, 0xFA0, 0x20)
"""The hypervisor's and the facilities' vectors (Power ISA Book III 7.5), which share a tail."""
TAIL = 0xFA0
PREFIX = "powerpc64le-linux-gnu-"
SC_1 = 0x44000022
SERVICES = Services("papr", 0x71000000, rtas=(0x7000, 0x7040), rtas_reboot=0x2014, rtas_nmi=0x2028)


def tool(name: str) -> str:
    found = shutil.which(PREFIX + name)
    if found is None:
        pytest.skip(f"{PREFIX}{name} is not installed")
    return found


def parameters(image: bytes) -> tuple:
    """The parameter block as purgatory.S declares it: magic, then fourteen words."""
    return struct.unpack_from(">8s14Q", image, PARAMETERS_OFFSET)


def lanes(data: bytes) -> bytes:
    """The digest by its definition, and not by crashkernel.purgatory.digest: sixteen registers of zlib's CRC-32."""
    words = [data[at : at + 4] for at in range(0, len(data), 4)]
    crcs = [zlib.crc32(b"".join(words[lane::16])) ^ 0xFFFFFFFF for lane in range(16)]
    return struct.pack("<16I", crcs[-1], *crcs[:-1])


def row(image: bytes, number: int) -> tuple[int, int, int, int, bytes, bytes]:
    """Operation, dst, src, size, digest and text, which ends before its NUL."""
    *words, wanted, text, own = struct.unpack_from(">4Q64s96s64s", image, TABLE_OFFSET + 0x100 * number)
    assert text.endswith(b"\0")
    assert own == lanes(image[TABLE_OFFSET + 0x100 * number :][:0xC0]), "it is under its own digest"
    return *words, wanted, text[: text.index(b"\0")]


NO_DIGEST = bytes(64)


class TestPack:
    MOVES = (
        Put(0x9000, 0, 0x100),
        Exchange(0x80, 0x6000000, 0x1000),
        Copy(0x7000000, 0x8000000, 0x80),
        Check(0x1000, 0x40),
        Check(0x2000, 0x80),
    )
    EXPECTED = (("initrd", digest(b"initrd", 0x40)), ("kernel", digest(b"kernel", 0x80)))

    def packed(self, **changes) -> bytes:
        arguments = {"fdt": 0x1111, "entry": 0x2222, "expected": self.EXPECTED} | changes
        return pack(BASE, self.MOVES, HEAD, **arguments)

    def test_the_parameter_block(self):
        image = self.packed(slaves=5, slave_timeout=0x6666, services=SERVICES, altivec=True, on_damage="reboot")
        assert parameters(image) == (
            MAGIC, 0x6666, 5, len(self.MOVES) + 1, 1, 1, 1, 0x71000000, 0, 0, 0x7000, 0x7040, 0x2014, 0x2028,
            0xA3D,
        )  # fmt: skip
        assert not any(image[PARAMETERS_OFFSET + 0x78 : SAVED_HEAD_OFFSET])

    def test_the_parameters_of_bare_metal(self):
        image = self.packed(services=Services("opal", 0, opal=(0x30000000, 0x30000810)))
        assert parameters(image)[6:] == (2, 0, 0x30000000, 0x30000810, 0, 0, 0, 0, 0)

    def test_the_parameters_of_nothing_known(self):
        assert parameters(self.packed()) == (MAGIC, 0, 0, 6, 0, 0, 0, (1 << 64) - 1, 0, 0, 0, 0, 0, 0, 0)

    @pytest.mark.parametrize(("ticks", "each"), [(0, 0), (9, 0), (10, 1), (5_120_000_000, 512_000_000)])
    def test_a_busy_console_is_granted_a_tenth_of_what_the_cpus_are(self, ticks, each):
        image = self.packed(slave_timeout=ticks)
        assert (parameters(image)[1], parameters(image)[14]) == (ticks, each)
        assert struct.unpack_from(">Q", image, PARAMETERS_OFFSET + 0x70) == (each,)

    @pytest.mark.parametrize(("policy", "number"), [("halt", 0), ("reboot", 1), ("continue", 2)])
    def test_what_to_do_about_damage(self, policy, number):
        """As P_ON_DAMAGE has them: a word that none of them is means to halt."""
        assert parameters(self.packed(on_damage=policy))[4] == number
        assert DAMAGE_POLICIES[number] == policy

    def test_the_rows(self):
        image = self.packed()
        assert [row(image, number) for number in range(6)] == [
            (1, 0x9000, BASE + SAVED_HEAD_OFFSET, 0x100, NO_DIGEST, b"crashkernel: 1/6 put K1's first bytes at 0x9000-0x9100"),
            (2, 0x80, 0x6000000, 0x1000, NO_DIGEST, b"crashkernel: 2/6 exchange 0x80-0x1080 with 0x6000000-0x6001000"),
            (1, 0x7000000, 0x8000000, 0x80, NO_DIGEST, b"crashkernel: 3/6 copy 0x8000000-0x8000080 to 0x7000000-0x7000080"),
            (3, 0x1000, 0, 0x40, self.EXPECTED[0][1], b"crashkernel: 4/6 check 0x1000-0x1040: initrd"),
            (3, 0x2000, 0, 0x80, self.EXPECTED[1][1], b"crashkernel: 5/6 check 0x2000-0x2080: kernel"),
            (4, 0x2222, 0x1111, 0, NO_DIGEST, b"crashkernel: 6/6 enter K2 at 0x2222"),
        ]
        assert not any(image[TABLE_OFFSET + 0x100 * 6 : CRC_OFFSET]), "rows without an operation"

    def test_a_part_of_the_head(self):
        image = pack(BASE, (Put(0x80, 0x80, 0x80),), HEAD, fdt=0, entry=0)
        assert row(image, 0)[:4] == (1, 0x80, BASE + SAVED_HEAD_OFFSET + 0x80, 0x80)

    def test_a_text_is_cut_where_its_room_ends(self):
        long = "k\u00e9rnel" * 100
        image = pack(BASE, (Check(0, 0x40),), HEAD, fdt=0, entry=0, expected=[(long, bytes(64))])
        *_, text = row(image, 0)
        assert text == b"crashkernel: 1/2 check 0x0-0x40: " + (b"k?rnel" * 100)[: 95 - 33]
        assert row(image, 1)[0] == 4

    def test_where_it_was_loaded_stands_there_three_times(self):
        image = self.packed()
        assert LOADED_AT_OFFSETS == (0x48, 0x50, 0x58), "inside of what K1 copies, and before the slave entry"
        for offset in LOADED_AT_OFFSETS:
            assert image[offset : offset + 8] == BASE.to_bytes(8, "big")
            assert SHIPPED[offset : offset + 8] == bytes(8)

    def test_the_handler_s_place(self):
        """Read by the vectors, which run at physical 0: so it must be absolute."""
        (offset,) = struct.unpack_from(">Q", SHIPPED, HANDLER_OFFSET)
        assert struct.unpack_from(">Q", self.packed(), HANDLER_OFFSET) == (BASE + offset,)
        assert 0x1000 <= offset < PARAMETERS_OFFSET, "in the code, which is not at physical 0"
        assert HANDLER_OFFSET + 8 == LOW_PAGE, "in the page that is"

    def test_the_saved_head(self):
        assert self.packed()[SAVED_HEAD_OFFSET : SAVED_HEAD_OFFSET + HEAD_SIZE] == HEAD
        assert SAVED_HEAD_OFFSET % LINE == 0, "moved by the line"

    def test_the_crc_tables(self):
        image = self.packed()
        for zeros in range(4):
            for byte in (0, 1, 2, 0x80, 0xFF):
                at = CRC_OFFSET + 1024 * zeros + 4 * byte
                entry = zlib.crc32(bytes((byte, *bytes(zeros)))) ^ zlib.crc32(bytes(1 + zeros))
                assert image[at : at + 4] == entry.to_bytes(4, "little")

    def test_its_own_digest(self):
        image = self.packed()
        assert image[STATE_OFFSET : STATE_OFFSET + DIGEST_SIZE] == lanes(image[:STATE_OFFSET])
        assert not any(image[STATE_OFFSET + 2 * DIGEST_SIZE :]), "what it writes begins as zeros"
        for other in (self.packed(slaves=1), self.packed(on_damage="continue")):
            assert other[STATE_OFFSET:][:DIGEST_SIZE] != image[STATE_OFFSET:][:DIGEST_SIZE], "the parameters are under it"

    def test_any_bit_of_the_table_shows_in_the_image_s_digest(self):
        image = bytearray(self.packed()[:STATE_OFFSET])
        wanted = lanes(bytes(image))
        for at in range(TABLE_OFFSET, TABLE_OFFSET + 0x700, 13):
            image[at] ^= 1 << at % 8
            assert lanes(bytes(image)) != wanted, f"{at:#x}"
            image[at] ^= 1 << at % 8

    def test_a_whole_row_in_another_s_place_shows_too(self):
        """A CRC over data that ends with its own CRC does not depend on the data: no lane's stands in its own."""
        image = self.packed()
        for other in (self.packed(entry=0), self.packed(fdt=0)):
            assert row(other, 5) != row(image, 5)
            assert lanes(other[:STATE_OFFSET]) != lanes(image[:STATE_OFFSET])
        first, second = (image[TABLE_OFFSET + 0x100 * number :][:0x100] for number in range(2))
        for rows in (second + first, first + first, second + second):
            struck = image[:TABLE_OFFSET] + rows + image[TABLE_OFFSET + 0x200 : STATE_OFFSET]
            assert lanes(struck) != lanes(image[:STATE_OFFSET])
        for place in (bytes(0x100), b"\xff" * 0x100, image[0x1000:0x1100], image[TABLE_OFFSET + 0x80 : TABLE_OFFSET + 0x180]):
            assert lanes(place[:0xC0]) != place[0xC0:]
            struck = image[:TABLE_OFFSET] + place + image[TABLE_OFFSET + 0x100 : STATE_OFFSET]
            assert lanes(struck) != lanes(image[:STATE_OFFSET])

    def test_the_digest_of_code_and_parameters(self):
        """Of what is used again at every row: K1's saved head included, the table not, whose rows have their own."""
        own = lambda image: image[STATE_OFFSET + DIGEST_SIZE : STATE_OFFSET + 2 * DIGEST_SIZE]  # noqa: E731
        image = self.packed()
        assert own(image) == lanes(image[0x1000:0x2200])
        head = bytes((HEAD[0] ^ 1, *HEAD[1:]))
        other_head = pack(BASE, self.MOVES, head, fdt=0x1111, entry=0x2222, expected=self.EXPECTED)
        for other in (self.packed(slaves=1), self.packed(altivec=True), self.packed(on_damage="continue"), other_head):
            assert own(other) == lanes(other[0x1000:0x2200]) != own(image)
        for other in (self.packed(entry=0), self.packed(fdt=0)):
            assert own(other) == own(image)
        assert SAVED_HEAD_OFFSET + HEAD_SIZE == 0x2200

    def test_each_row_s_digest(self):
        """`row` holds it against the definition; that no two rows share one shows that it is of the row."""
        image = self.packed()
        found = [image[TABLE_OFFSET + 0x100 * number + 0xC0 :][:DIGEST_SIZE] for number in range(6)]
        assert found == [lanes(image[TABLE_OFFSET + 0x100 * number :][:0xC0]) for number in range(6)]
        assert len(set(found)) == 6

    @pytest.mark.parametrize("at", [0, 7, 8, 0x10, 0x18, 0x1F, 0x20, 0x5F, 0x60, 0xBF, 0xC0, 0xFF])
    def test_a_row_that_was_hit_is_not_whole(self, at):
        data = bytearray(self.packed()[TABLE_OFFSET + 0x300 :][:0x100])
        for bit in range(8):
            data[at] ^= 1 << bit
            assert lanes(bytes(data[:0xC0])) != data[0xC0:], f"bit {bit}"
            data[at] ^= 1 << bit
        assert lanes(bytes(data[:0xC0])) == data[0xC0:]

    def test_the_code_is_the_same_for_every_plan(self):
        image = bytearray(self.packed())
        for offset in (*LOADED_AT_OFFSETS, HANDLER_OFFSET):
            assert offset + 8 <= PARAMETERS_OFFSET
            image[offset : offset + 8] = SHIPPED[offset : offset + 8]
        assert image[:PARAMETERS_OFFSET] == SHIPPED[:PARAMETERS_OFFSET]

    def test_nothing_lies_over_anything_else(self):
        assert SAVED_HEAD_OFFSET + HEAD_SIZE <= TABLE_OFFSET
        assert TABLE_OFFSET + 0x100 * (MAX_MOVES + 1) == CRC_OFFSET
        assert CRC_OFFSET + 4 * 1024 == STATE_OFFSET
        assert len(self.packed()) == len(SHIPPED) == STATE_OFFSET + 0x100 <= SAVE_OFFSET
        assert SAVE_OFFSET + LOW_PAGE <= LOG_OFFSET
        assert LOG_OFFSET + LOG_SIZE == PURGATORY_SPAN <= 0x10000
        assert STATE_OFFSET + 2 * DIGEST_SIZE == crashkernel.purgatory.ARRIVED_OFFSET, "behind both digests"

    @pytest.mark.parametrize("count", [0, MAX_MOVES, MAX_MOVES + 1])
    def test_a_table_has_32_rows(self, count):
        moves = tuple(Copy(0x1000 * i, 0x100000, 0x80) for i in range(count))
        if count > MAX_MOVES:
            with pytest.raises(PlanError, match="32 moves, the purgatory's table holds 31"):
                pack(0, moves, HEAD, fdt=0, entry=0)
            return
        image = pack(0, moves, HEAD, fdt=0x30, entry=0x20)
        assert parameters(image)[3] == count + 1
        for number in range(count):
            assert row(image, number)[:4] == (1, 0x1000 * number, 0x100000, 0x80)
        assert row(image, count) == (
            4,
            0x20,
            0x30,
            0,
            NO_DIGEST,
            f"crashkernel: {count + 1}/{count + 1} enter K2 at 0x20".encode(),
        )

    @pytest.mark.parametrize("head", [b"", HEAD[:-1], HEAD + b"x"])
    def test_a_head_of_another_size(self, head):
        with pytest.raises(PlanError, match=rf"K1's head is {len(head)} bytes, not 256.*/proc/kcore"):
            pack(0, (), head, fdt=0, entry=0)

    @pytest.mark.parametrize("put", [Put(0, 0x80, 0x100), Put(0, 0x100, 0x80), Put(0, 0x1000, 0x80), Put(0, 0, 0x180)])
    def test_a_put_of_what_was_not_saved(self, put):
        with pytest.raises(PlanError, match="only K1's first 0x100 bytes"):
            pack(0, (put,), HEAD, fdt=0, entry=0)

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_as_many_digests_as_checks(self, count):
        with pytest.raises(PlanError, match=f"2 checks, and digests for {count}"):
            self.packed(expected=(self.EXPECTED * 2)[:count])

    @pytest.mark.parametrize("damage", [b"", b"x" * len(SHIPPED), SHIPPED[:-1], SHIPPED + b"\0"], ids=len)
    def test_another_image_than_this_package_s(self, damage, monkeypatch):
        monkeypatch.setattr(type(ROOM), "read_bytes", lambda _: damage)
        with pytest.raises(PlanError, match=r"purgatory\.bin is not the image.*reinstall"):
            pack(0, (), HEAD, fdt=0, entry=0)


class TestOfAPlan:
    CONTENTS: ClassVar = {"kernel": b"K2" * 1_000_000, "initrd": b"initrd" * 10_000, "fdt": b"tree", "elfcorehdr": b"header"}

    @pytest.mark.parametrize("placement", ["zero", "reserved"])
    def test_it_is_packed_from_the_plan(self, placement):
        plan = replace(small_plan(placement), on_damage="halt")
        image = purgatory_bytes(plan, HEAD, self.CONTENTS)
        base = plan.segment("purgatory").range.start
        assert image[LOADED_AT_OFFSETS[0] :][:8] == base.to_bytes(8, "big")
        rtas = plan.firmware[0].range
        tokens = RTAS_TOKENS["system-reboot"], RTAS_TOKENS["ibm,nmi-register"]
        assert parameters(image) == (
            MAGIC, 5_120_000_000, 1, len(plan.moves) + 1, 0, 1, 1, VTY, 0, 0, rtas.start, rtas.start + 0x40, *tokens,
            512_000_000,
        )  # fmt: skip
        for number, move in enumerate(plan.moves):
            assert describe_move(move).encode() in row(image, number)[-1]
        assert row(image, len(plan.moves))[:3] == (4, plan.entry, plan.segment("fdt").range.start)
        assert len(image) <= plan.segment("purgatory").range.size

    @pytest.mark.parametrize("placement", ["zero", "reserved"])
    def test_each_check_names_what_it_is_to_find(self, placement):
        plan = small_plan(placement)
        image = purgatory_bytes(plan, HEAD, self.CONTENTS)
        rows = [row(image, number) for number, move in enumerate(plan.moves) if isinstance(move, Check)]
        names = [text.rpartition(b": ")[2].decode() for *_, text in rows]
        assert names == ["elfcorehdr", "fdt", "initrd", "kernel", "kernel"], "the largest last"
        low = rows[-1][3]
        for (_, at, _, size, wanted, _), name in zip(rows, names, strict=True):
            origin = at - plan.entry if name == "kernel" and at else 0
            assert wanted == digest(self.CONTENTS[name][origin : origin + size], size)
        assert rows[-1][1:4] == (0, 0, low)
        assert low == (LOW_PAGE if placement == "zero" else HEAD_SIZE)

    def test_a_content_that_is_missing(self):
        contents = {name: data for name, data in self.CONTENTS.items() if name != "initrd"}
        with pytest.raises(PlanError, match=r"the plan checks initrd at 0x[0-9a-f]+-0x[0-9a-f]+, whose bytes are not known"):
            purgatory_bytes(small_plan(), HEAD, contents)


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("purgatory")
    subprocess.run(
        [tool("as"), "-mbig", "-a64", "-o", directory / "purgatory.o", ROOM / "purgatory.S"], check=True, capture_output=True
    )
    return directory / "purgatory.o"


@pytest.fixture(scope="module")
def symbols(assembled):
    text = subprocess.run([tool("nm"), assembled], check=True, capture_output=True, text=True).stdout
    return {name: int(at, 16) for at, _, name in (line.split() for line in text.splitlines())}


def disassemble(*arguments) -> list[tuple[int, int, str, str]]:
    """(address, word as bytes in memory, mnemonic, operands) of every instruction."""
    text = subprocess.run([tool("objdump"), "-z", *arguments], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^\s*([0-9a-f]+):\t((?:[0-9a-f]{2} ){4})\s*\t(\S+)[^\S\n]*(.*)$", text, re.MULTILINE)
    return [(int(at, 16), int(word.replace(" ", ""), 16), name, operands) for at, word, name, operands in found]


@pytest.fixture(scope="module")
def listing(assembled, symbols):
    """Every instruction before the texts, as far as a POWER4 with AltiVec knows them."""
    return [each for each in disassemble("-d", "-Mpower4,altivec", assembled) if each[0] < symbols["text_begin"]]


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """The first page in a little-endian CPU's eyes, by address."""
    flat = tmp_path_factory.mktemp("little") / "page"
    flat.write_bytes(SHIPPED[:LOW_PAGE])
    found = disassemble("-D", "-b", "binary", "-m", "powerpc:common64", "-EL", "-Mpower4", flat)
    return {at: (name, operands.split()[0] if operands else "") for at, _, name, operands in found}


def little_words() -> set[int]:
    """Where words for little-endian CPUs stand: behind the first two of each switch, up to its end."""
    switches = {at for start in (0, SLAVE_ENTRY) for at in range(start + 8, start + 0x30, 4)}
    switches |= {at for vector in VECTORS for at in range(vector + 8, vector + 0x38, 4)}
    return switches | {at for vector in NARROW for at in (vector + 8, vector + 0xC)} | set(range(TAIL, TAIL + 0x30, 4))


class TestShipped:
    def test_the_bytes_are_the_source_s(self, assembled):
        flat = assembled.with_suffix(".bin")
        subprocess.run([tool("objcopy"), "-O", "binary", assembled, flat], check=True, capture_output=True)
        assert flat.read_bytes() == SHIPPED, "rebuild it: make purgatory"

    def test_nothing_is_left_to_a_linker(self, assembled):
        text = subprocess.run([tool("objdump"), "-r", assembled], check=True, capture_output=True, text=True).stdout
        assert "R_PPC64" not in text

    def test_both_files_say_the_same_of_the_image(self, symbols):
        """What purgatory.S declares and crashkernel.purgatory declares again."""
        assert {
            "AT_HANDLER": HANDLER_OFFSET,
            "AT_PARAMS": PARAMETERS_OFFSET,
            "AT_TABLE": TABLE_OFFSET,
            "AT_CRC": CRC_OFFSET,
            "AT_STATE": STATE_OFFSET,
            "AT_SAVED": SAVE_OFFSET,
            "AT_LOG": LOG_OFFSET,
            "LOG_SIZE": LOG_SIZE,
            "LINE": LINE,
            "AT_CODE": LOW_PAGE,
            "ROW_DIGEST": 0x20,
            "ROW_TEXT": 0x60,
            "ROW_OWN_DIGEST": 0xC0,
            "ROW_BYTES": 0x100,
        }.items() <= symbols.items()
        assert symbols["AT_LOG"] + symbols["LOG_SIZE"] == PURGATORY_SPAN
        assert symbols["params"] == PARAMETERS_OFFSET
        assert symbols["params"] + symbols["P_HEAD"] == SAVED_HEAD_OFFSET
        assert symbols["params"] + symbols["P_END"] == SAVED_HEAD_OFFSET + HEAD_SIZE
        assert symbols["params"] + symbols["P_IMAGE_DIGEST"] == STATE_OFFSET
        assert symbols["params"] + symbols["P_CODE_DIGEST"] == STATE_OFFSET + DIGEST_SIZE
        assert symbols["params"] + symbols["P_ARRIVED"] == crashkernel.purgatory.ARRIVED_OFFSET
        assert symbols["params"] + symbols["P_RELEASED"] == crashkernel.purgatory.RELEASED_OFFSET
        assert symbols["loaded_at"] == LOADED_AT_OFFSETS[0]
        assert SHIPPED[HANDLER_OFFSET : HANDLER_OFFSET + 8] == symbols["exception"].to_bytes(8, "big")
        assert symbols["P_CONSOLE_TIMEOUT"] == 0x70, "the last parameter"
        assert [symbols[name] for name in ("HALT", "REBOOT", "GO_ON")] == [0, 1, 2]
        assert [symbols[f"OPERATION_{name}"] for name in ("COPY", "EXCHANGE", "CHECK", "ENTER")] == [1, 2, 3, 4]

    def test_the_head(self):
        switch = SHIPPED[:0x30]
        assert SHIPPED[SLAVE_ENTRY : SLAVE_ENTRY + 0x30] == switch, "the slave entry begins as the first one does"
        # "go on" to a big-endian CPU, "jump over the next word" to a little-endian one
        assert switch[:4] == bytes.fromhex("08000048")
        assert any(SHIPPED[0x90:0x100]), "and goes on inside of what K1 copies"

    def test_the_vectors_are_alike_but_for_their_number(self, listing):
        first = bytearray(SHIPPED[0x100:0x180])
        numbers = {at: operands for at, _, name, operands in listing if name == "li" and at % 0x80 == 0x40 and at < LOW_PAGE}
        for vector in VECTORS:
            assert numbers[vector + 0x40] == f"r3,{vector}"
            stub = bytearray(SHIPPED[vector : vector + 0x80])
            stub[0x42:0x44] = first[0x42:0x44]
            assert stub[:0x78] == first[:0x78]
        assert VECTORS[-1] + 0x80 == NARROW[0]
        assert NARROW[-1] + 0x20 == TAIL

    def test_the_narrow_vectors_go_on_where_the_wide_ones_do(self, listing):
        """Number and branch are their own; the tail is the rest of a wide one, word for word."""
        at_word = {at: (name, operands.partition(" ")[0]) for at, _, name, operands in listing if at < LOW_PAGE}
        tail = TAIL + 0x30
        for vector in NARROW:
            assert SHIPPED[vector : vector + 4] == SHIPPED[0x100:0x104]
            assert at_word[vector + 4] == ("b", f"{vector + 0x10:x}")
            assert at_word[vector + 0x10] == ("li", f"r3,{vector}")
            assert at_word[vector + 0x14] == ("b", f"{tail:x}")
            assert not any(SHIPPED[vector + 0x18 : vector + 0x20])
        assert SHIPPED[TAIL:tail] == SHIPPED[0x108:0x138]
        rest = SHIPPED[0x138:0x140] + SHIPPED[0x144:0x150]  # without the number
        assert SHIPPED[tail : tail + len(rest)] == rest
        assert not any(SHIPPED[tail + len(rest) : HANDLER_OFFSET])

    def test_a_vector_in_a_big_endian_cpu_s_eyes(self, listing):
        """It goes from the first words to what follows those for the other kind, and saves SRR0 and SRR1 itself."""
        names = {at - 0x100: (name, operands.partition(" ")[0]) for at, _, name, operands in listing if 0x100 <= at < 0x150}
        assert names[0] == ("tdi", "0,r0,72"), "traps never: no condition is asked for"
        assert names[4] == ("b", "138")
        seen = [names[at] for at in range(0x38, 0x50, 4)]
        assert seen[:3] == [("mfsrr0", "r20"), ("mfsrr1", "r21"), ("li", "r3,256")]
        assert seen[3] == ("ld", f"r10,{HANDLER_OFFSET}(0)"), "absolute: the page is at physical 0"
        assert [name for name, _ in seen[4:]] == ["mtctr", "bctr"]


class TestLittleEndian:
    """A CPU in little-endian mode fetches each word the other way round."""

    SWITCH = ("mfmsr", "xori", "li", "mtmsrd", "bcl", "mflr", "addi", "mtsrr0", "mtsrr1", "rfid")

    def landing(self, little, start: int) -> int:
        """Where the rfid of the switch at `start` goes to: the link register's address, and what is added to it."""
        end = start + (0x38 if start in VECTORS else 0x30)
        words = {little[at][0]: at for at in range(start, end, 4)}
        link = words["bcl"] + 4
        assert little[words["bcl"]][1] == f"20,4*cr7+so,0x{link:x}", "to the next word, which is where lr points then"
        register, source, distance = little[words["addi"]][1].split(",")
        assert little[words["mflr"]][1] == register == source == "r10"
        assert little[words["mtsrr0"]][1] == "r10"
        return link + int(distance)

    @pytest.mark.parametrize("start", [0, SLAVE_ENTRY])
    def test_the_head_s_switches(self, little, start):
        assert little[start] == ("b", f"0x{start + 8:x}"), "over the next word, which is the big-endian CPU's"
        assert tuple(little[at][0] for at in range(start + 8, start + 0x30, 4)) == self.SWITCH
        assert self.landing(little, start) == start + 0x30

    @pytest.mark.parametrize("vector", VECTORS)
    def test_a_vector_s_switch(self, little, vector):
        assert little[vector] == ("b", f"0x{vector + 8:x}")
        assert little[vector + 8] == ("mfsrr0", "r20"), "before they become the switch's own"
        assert little[vector + 0xC] == ("mfsrr1", "r21")
        assert tuple(little[at][0] for at in range(vector + 0x10, vector + 0x38, 4)) == self.SWITCH
        assert self.landing(little, vector) == vector + 0x40, "over the big-endian mfsrr0 and mfsrr1: they were done"
        assert SHIPPED[vector + 0x38 : vector + 0x40] == struct.pack(">2I", 0x7E9A02A6, 0x7EBB02A6)

    @pytest.mark.parametrize("vector", NARROW)
    def test_a_narrow_vector_s_way(self, little, vector):
        assert little[vector] == ("b", f"0x{vector + 8:x}")
        assert little[vector + 8] == ("li", f"r3,{vector}")
        assert little[vector + 0xC] == ("b", f"0x{TAIL:x}")

    def test_the_narrow_vectors_switch(self, little):
        assert little[TAIL] == ("mfsrr0", "r20")
        assert little[TAIL + 4] == ("mfsrr1", "r21")
        assert tuple(little[at][0] for at in range(TAIL + 8, TAIL + 0x30, 4)) == self.SWITCH
        assert self.landing(little, TAIL) == TAIL + 0x38, "over the big-endian mfsrr0 and mfsrr1: they were done"

    @pytest.mark.parametrize("start", [0, SLAVE_ENTRY, *VECTORS, TAIL])
    def test_it_leaves_little_endian_mode_and_nothing_else(self, little, start):
        end = start + (0x38 if start in VECTORS else 0x30)
        words = {little[at][0]: little[at][1] for at in range(start + 8, end, 4)}
        assert words["mfmsr"] == "r11"
        assert words["xori"] == "r11,r11,1", "MSR.LE is the lowest bit"
        assert words["mtsrr1"] == "r11"
        assert (words["li"], words["mtmsrd"]) == ("r10,0", "r10,1"), "RI alone"


class TestListing:
    def test_it_ends_where_the_texts_begin(self, listing, symbols):
        assert listing[-1][0] == symbols["text_begin"] - 4
        assert [at for at, *_ in listing] == list(range(0, symbols["text_begin"], 4))
        texts = SHIPPED[symbols["text_begin"] : PARAMETERS_OFFSET].rstrip(b"\0").decode("ascii")
        assert texts.startswith("\ncrashkernel: K1 is dead")
        assert texts.endswith(", halted\n")

    def test_only_instructions_of_2005_s_cpus(self, listing):
        """What a POWER4 with AltiVec does not know was written as .long on purpose: words for little-endian CPUs, and sc 1."""
        unknown = {(at, word) for at, word, name, _ in listing if name == ".long" and word}
        data = {*range(LOADED_AT_OFFSETS[0], LOADED_AT_OFFSETS[-1] + 8, 4), HANDLER_OFFSET, HANDLER_OFFSET + 4}
        assert {word for at, word in unknown if at not in little_words() | data} <= {SC_1}
        assert len(listing) > 1000

    def test_each_word_for_a_little_endian_cpu_is_unreached_by_a_big_endian_one(self, listing):
        """The branch before them goes over them, and no other branch goes there."""
        words = little_words()
        jumps = {at: int(operands.split()[0].split(",")[-1], 16) for at, _, name, operands in listing
                 if name.startswith("b") and at not in words and re.search(r"(^|,)[0-9a-f]+( |$)", operands)}  # fmt: skip
        for start in (0, SLAVE_ENTRY):
            assert jumps[start + 4] == start + 0x30
        for vector in VECTORS:
            assert jumps[vector + 4] == vector + 0x38
        assert not set(jumps.values()) & words
        assert len(jumps) > 100

    def test_a_row_is_checked_before_it_is_obeyed(self, listing, symbols):
        """Code and parameters first, then the row, so that its text ends; and the row again when that was said."""
        row = [(name, operands) for at, _, name, operands in listing if symbols["next_row"] <= at < symbols["copy"]]
        calls = [operands.split("<")[1].rstrip(">") for name, operands in row if name == "bl"]
        assert calls[:4] == ["require_code", "require_row", "say", "require_row"]
        (obeyed,) = (number for number, (name, operands) in enumerate(row) if (name, operands) == ("ld", "r3,0(r28)"))
        assert sum(name == "bl" for name, _ in row[:obeyed]) == 4
        assert row[obeyed - 1][0] == "bl", "right behind the check, which alone comes between"
        loads = [operands for name, operands in row[:obeyed] if name.startswith("l") and "(r28)" in operands]
        assert loads == [], "nothing of a row is used before"
        asked = [
            (name, operands) for at, _, name, operands in listing if symbols["require_row"] <= at < symbols["require_code"]
        ]
        assert asked[:3] == [("mr", "r3,r28"), ("li", f"r4,{0xC0}"), ("addi", f"r5,r28,{0xC0}")], "all of it but its digest"
        assert [name for name, _ in asked[3:]] == ["b"]
        assert asked[3][1].endswith("<require>")
        back = [at for at, _, name, operands in listing if name == "b" and operands.endswith("<next_row>")]
        assert len(back) == 1, "the only way on is through the checks"

    def test_a_purgatory_that_is_not_whole_goes_nowhere(self, listing, symbols):
        """Whatever the plan says of damage: the one way out of `require` but that of what is whole is to stop."""
        inside = [each for each in listing if symbols["require"] <= each[0] < symbols["go_on_or_stop"]]
        ways = [(name, operands.partition("<")[2].rstrip(">")) for *_, name, operands in inside if name.startswith("b")]
        assert ways == [("bl", "check"), ("beqlr", ""), ("bl", "say"), ("b", "stop")]
        assert inside[-1][2] == "b"

    def test_whose_exception_it_is(self, listing, symbols):
        """The crashing CPU's SPRG3 is the parameters' address; one more is that of the others that came."""
        (slave, slave_register), (master, master_register) = (
            (at, operands) for at, _, name, operands in listing if name in ("mtsprg", "mtsprg3")
        )
        assert symbols["slave"] < slave < symbols["master"] < master < symbols["catch_resets"]
        at_word = {at: (name, operands) for at, _, name, operands in listing}
        assert slave_register.endswith("r9")
        assert at_word[slave - 4] == ("addi", "r9,r30,1")
        assert master_register.endswith("r30")

    def test_rtas_is_called_when_nobody_else_can_be_in_it(self, listing, symbols):
        """Behind the wait for the other CPUs, and at the end of the road."""
        calls = [at for at, _, name, operands in listing if name in ("b", "bl") and operands.endswith("<rtas>")]
        assert len(calls) == 2
        assert symbols["catch_resets"] < calls[0] < symbols["begin_rows"]
        assert symbols["stop"] < calls[1] < symbols["exception"]
        waits = [
            at for at, _, name, operands in listing if name == "ld" and operands == f"r10,{symbols['P_SLAVES_EXPECTED']}(r30)"
        ]
        assert waits
        assert max(waits) < symbols["catch_resets"]

    def test_altivec_is_behind_the_word_that_allows_it(self, listing, symbols):
        vectors = [at for at, _, name, _ in listing if name in ("lvx", "stvx")]
        assert len(vectors) == 32, "a line of each side, in and out"
        assert min(vectors) > symbols["exchange_vectors"]
        assert max(vectors) < symbols["coherent"]

    def test_hypercalls(self, listing, symbols):
        calls = [at for at, word, *_ in listing if word == SC_1]
        assert len(calls) == 2
        assert symbols["leave_hypervisor_areas"] < calls[0] < symbols["master"]
        assert symbols["say_papr"] < calls[1] < symbols["say_opal"]

    def test_what_it_writes(self, listing, symbols):
        """No stack: a store's base is a move's (r26, r27), the parameters (r30), the log and the digits (r5), or K2's tree."""
        stores = [
            (name, operands)
            for at, _, name, operands in listing
            if name in ("std", "stw", "stdu", "stwu", "stb", "sth", "stbu", "sthu", "stmw") and at not in little_words()
        ]
        bases = {re.search(r"\((r?\d+)\)", operands)[1] for _, operands in stores}
        assert bases == {"r26", "r27", "r30", "r5", "r3"}
        assert [operands for _, operands in stores if "(r3)" in operands] == ["r31,28(r3)"], "boot_cpuid_phys"
        indexed = [(name, operands) for _, _, name, operands in listing if re.fullmatch(r"st\w+x\.?|dcbz", name)]
        assert {operands for name, operands in indexed if name == "stbx"} == {"r6,r5,r4"}, "the log"
        counts = [(at, operands) for at, _, name, operands in listing if name == "stdcx."]
        assert [operands for _, operands in counts] == ["r9,0,r10"] * 2, "the count of CPUs, and whose exception is noted"
        assert symbols["slave"] < counts[0][0] < symbols["master"] < symbols["exception"] < counts[1][0]
        assert {name for name, _ in indexed} == {"stbx", "stdcx.", "stvx"}
