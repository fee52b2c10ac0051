"""The purgatory's bytes. What they do on a CPU is tests/bench's business."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import crashkernel.purgatory
from crashkernel.errors import PlanError
from crashkernel.machine import HEAD_SIZE
from crashkernel.placement.moves import MAX_MOVES, Copy, Exchange, Put
from crashkernel.purgatory import LOADED_AT_OFFSET, MAGIC, PARAMETERS_OFFSET, pack, purgatory_bytes
from support.machines import HEAD, small_plan

ROOM = Path(crashkernel.purgatory.__file__).parent
SLAVE_ENTRY = 0x60
"""Where K1 sends its other CPUs (kexec_wait, arch/powerpc/kernel/misc_64.S)."""
PREFIX = "powerpc64le-linux-gnu-"
MOVES = PARAMETERS_OFFSET + 0x80
SAVED_HEAD = PARAMETERS_OFFSET + 0x480


def tool(name: str) -> str:
    found = shutil.which(PREFIX + name)
    if found is None:
        pytest.skip(f"{PREFIX}{name} is not installed")
    return found


class TestPack:
    def test_the_parameter_block(self):
        image = pack(
            0x5000000,
            (Put(0, 0x100), Exchange(0x80, 0x6000000, 0x1000), Copy(0x7000000, 0x8000000, 0x80)),
            HEAD,
            fdt=0x1111,
            entry=0x2222,
            opal=(0x3333, 0x4444),
            slaves=5,
            slave_timeout=0x6666,
            partition=True,
        )
        assert image[LOADED_AT_OFFSET : LOADED_AT_OFFSET + 8] == (0x5000000).to_bytes(8, "big")
        fields = struct.unpack_from(">8s5Q5I", image, PARAMETERS_OFFSET)
        assert fields == (MAGIC, 0x1111, 0x2222, 0x3333, 0x4444, 0x6666, 5, 0, 0, 3, 1)
        rows = [struct.unpack_from(">4Q", image, MOVES + 0x20 * number) for number in range(4)]
        assert rows == [
            (1, 0, 0x5000000 + SAVED_HEAD, 0x100),
            (2, 0x80, 0x6000000, 0x1000),
            (1, 0x7000000, 0x8000000, 0x80),
            (0, 0, 0, 0),
        ]
        assert image[SAVED_HEAD : SAVED_HEAD + HEAD_SIZE] == HEAD
        assert len(image) == SAVED_HEAD + HEAD_SIZE

    def test_a_part_of_the_head(self):
        image = pack(0x5000000, (Put(0x80, 0x80),), HEAD, fdt=0, entry=0)
        assert struct.unpack_from(">4Q", image, MOVES) == (1, 0x80, 0x5000000 + SAVED_HEAD + 0x80, 0x80)

    def test_the_code_is_the_same_for_every_plan(self):
        shipped = (ROOM / "purgatory.bin").read_bytes()
        image = pack(0x1230000, (Put(0, 0x100),), HEAD, fdt=1, entry=2)
        assert image[:LOADED_AT_OFFSET] == shipped[:LOADED_AT_OFFSET]
        assert image[LOADED_AT_OFFSET + 8 : PARAMETERS_OFFSET] == shipped[LOADED_AT_OFFSET + 8 : PARAMETERS_OFFSET]

    @pytest.mark.parametrize("count", [MAX_MOVES, MAX_MOVES + 1])
    def test_a_table_has_32_rows(self, count):
        moves = tuple(Copy(0x1000 * i, 0x100000, 0x80) for i in range(count))
        if count <= MAX_MOVES:
            last = pack(0, moves, HEAD, fdt=0, entry=0)[MOVES + 0x20 * 31 : MOVES + 0x20 * 32]
            assert struct.unpack(">4Q", last) == (1, 0x1F000, 0x100000, 0x80)
        else:
            with pytest.raises(PlanError, match="33 moves, the purgatory's table holds 32"):
                pack(0, moves, HEAD, fdt=0, entry=0)
        assert MOVES + 0x20 * MAX_MOVES == SAVED_HEAD, "a full table ends where the saved head begins"

    @pytest.mark.parametrize("head", [b"", HEAD[:-1], HEAD + b"x"])
    def test_a_head_of_another_size(self, head):
        with pytest.raises(PlanError, match=rf"K1's head is {len(head)} bytes, not 256.*/proc/kcore"):
            pack(0, (), head, fdt=0, entry=0)

    @pytest.mark.parametrize("put", [Put(0x100, 0x80), Put(0x80, 0x100), Put(0x1000, 0x80)])
    def test_a_put_of_what_was_not_saved(self, put):
        with pytest.raises(PlanError, match="only K1's first 0x100 bytes"):
            pack(0, (put,), HEAD, fdt=0, entry=0)

    @pytest.mark.parametrize("placement", ["zero", "reserved"])
    def test_of_a_plan(self, placement):
        plan = small_plan(placement)
        image = purgatory_bytes(plan, HEAD)
        assert image == pack(
            plan.segment("purgatory").range.start,
            plan.moves,
            HEAD,
            fdt=plan.segment("fdt").range.start,
            entry=plan.entry,
            opal=plan.opal,
            slaves=1,
            slave_timeout=5_120_000_000,
            partition=True,
        )
        assert len(image) <= plan.segment("purgatory").range.size

    @pytest.mark.parametrize("damage", [b"", b"x" * 3456])
    def test_another_image_than_this_package_s(self, damage, monkeypatch):
        monkeypatch.setattr(type(ROOM), "read_bytes", lambda _: damage)
        with pytest.raises(PlanError, match=r"purgatory\.bin is not the image.*reinstall"):
            pack(0, (), HEAD, fdt=0, entry=0)


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("purgatory")
    subprocess.run(
        [tool("as"), "-mbig", "-a64", "-o", directory / "purgatory.o", ROOM / "purgatory.S"], check=True, capture_output=True
    )
    return directory / "purgatory.o"


@pytest.fixture(scope="module")
def listing(assembled):
    """(address, word, mnemonic) of every instruction before the parameters, as far as a POWER4 knows them."""
    text = subprocess.run(
        [tool("objdump"), "-d", "-z", "-Mpower4", assembled], check=True, capture_output=True, text=True
    ).stdout
    found = re.findall(r"^\s*([0-9a-f]+):\t((?:[0-9a-f]{2} ){4})\s*\t(\S+)", text, re.MULTILINE)
    return [(int(at, 16), int(word.replace(" ", ""), 16), name) for at, word, name in found if int(at, 16) < PARAMETERS_OFFSET]


class TestShipped:
    def test_the_bytes_are_the_source_s(self, assembled):
        flat = assembled.with_suffix(".bin")
        subprocess.run([tool("objcopy"), "-O", "binary", assembled, flat], check=True, capture_output=True)
        assert flat.read_bytes() == (ROOM / "purgatory.bin").read_bytes(), "rebuild it: make purgatory"

    def test_nothing_is_left_to_a_linker(self, assembled):
        text = subprocess.run([tool("objdump"), "-r", assembled], check=True, capture_output=True, text=True).stdout
        assert "R_PPC64" not in text

    def test_the_head(self):
        image = (ROOM / "purgatory.bin").read_bytes()
        switch = image[:0x30]
        assert image[SLAVE_ENTRY : SLAVE_ENTRY + 0x30] == switch, "the slave entry begins as the first one does"
        # "go on" to a big-endian CPU, "jump over the next word" to a little-endian one
        assert switch[:4] == bytes.fromhex("08000048")
        assert any(image[0x90:0x100]), "and goes on inside of what K1 copies"
        assert image[LOADED_AT_OFFSET : LOADED_AT_OFFSET + 8] == bytes(8)

    def test_the_switch_of_endianness_in_a_little_endian_cpu_s_eyes(self, assembled):
        swapped = assembled.with_suffix(".le")
        image = (ROOM / "purgatory.bin").read_bytes()
        swapped.write_bytes(image[:0x30])
        text = subprocess.run(
            [tool("objdump"), "-D", "-b", "binary", "-m", "powerpc:common64", "-EL", "-Mpower4", swapped],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        names = [line.split("\t")[2:] for line in text.splitlines() if re.match(r"\s*[0-9a-f]+:\t", line)]
        words = [" ".join(part.split()[0] for part in line[:1]) for line in names]
        assert words[0] == "b", "over the next word, which is the big-endian CPU's"
        assert words[2:] == ["mfmsr", "xori", "li", "mtmsrd", "bcl", "mflr", "addi", "mtsrr0", "mtsrr1", "rfid"]

    def test_only_instructions_of_2005_s_cpus(self, listing):
        """What a POWER4 does not know was written as .long on purpose: the words for little-endian CPUs, and sc 1."""
        unknown = {(at, word) for at, word, name in listing if name == ".long" and word}
        little = {at for start in (0, SLAVE_ENTRY) for at in range(start + 8, start + 0x30, 4)}
        assert {word for at, word in unknown if at not in little} <= {0x44000022}
        assert any(word == 0x44000022 for _, word, _ in listing)
        assert len(listing) > 150

    def test_it_needs_neither_stack_nor_memory_of_its_own_but_the_parameters(self, listing):
        stores = [word for at, word, name in listing if name in ("std", "stw", "stdu", "stwu", "stb", "sth") and at >= 0x100]
        # RA of each store: dst and src of a move (r26, r27), the parameters (r30), the tree's header (r3)
        assert {(word >> 16) & 31 for word in stores} == {26, 27, 30, 3}
