"""A check that cannot fail proves nothing: each way to spoil a real dump is caught, and named."""

import os
import shutil
import subprocess

import pytest
from drill_command import COMMAND

from crashkernel.drill.record import judge_kept
from crashkernel.formats.elf import ElfFile
from crashkernel.placement.plan import PLACEMENTS

PAGE = 0x10000


class Spoiled:
    """A copy of a kept drill whose dump may be damaged by K1 physical address."""

    def __init__(self, directory):
        self.directory = directory
        self.dump = directory / "vmcore"
        with self.dump.open("rb") as file:
            self.elf = ElfFile.from_bytes(file.read(1 << 20), file_size=1 << 63)

    def offset(self, paddr):
        segment = next(s for s in self.elf.loads if s.paddr <= paddr < s.paddr + s.file_size)
        return segment.file_offset + paddr - segment.paddr

    def read(self, paddr, size):
        with self.dump.open("rb") as file:
            file.seek(self.offset(paddr))
            return file.read(size)

    def write(self, paddr, data):
        with self.dump.open("r+b") as file:
            file.seek(self.offset(paddr))
            file.write(data)

    def busy_page(self, start):
        """A page from `start` on that is not all of one byte: damage to it shows."""
        page = start
        while len(set(self.read(page, PAGE))) < 2:
            page += PAGE
        return page

    def verdict(self):
        verdict = judge_kept(self.directory)
        assert not verdict.passed
        return verdict


@pytest.fixture(params=PLACEMENTS)
def spoiled(reference, request, tmp_path):
    directory = tmp_path / "kept"
    directory.mkdir()
    source = reference.directory / request.param
    for name in ("plan.json", "evidence.json", "truth"):
        (directory / name).symlink_to(source / name)
    shutil.copyfile(source / "vmcore", directory / "vmcore")
    yield Spoiled(directory)
    shutil.rmtree(directory)


def test_flipped_bytes_are_found_and_named(spoiled):
    for paddr, mask in ((0x5000, 0x01), (0x60000123, 0x80)):
        spoiled.write(paddr, bytes([spoiled.read(paddr, 1)[0] ^ mask]))
    verdict = spoiled.verdict()
    assert verdict.bytes_wrong == 2
    assert [(r.range.start, r.range.size) for r in verdict.wrong_ranges] == [(0x5000, 1), (0x60000123, 1)]
    assert "K1 text" in verdict.wrong_ranges[0].what
    assert verdict.wrong_ranges[1].what == "K1 memory"


def test_a_dropped_page_is_found(spoiled):
    # cut out of the middle: everything behind it moves up by a page
    at = spoiled.offset(0x60000000)
    with spoiled.dump.open("r+b") as file:
        file.seek(at + PAGE)
        rest = file.read()
        file.seek(at)
        file.write(rest)
        file.truncate()
    verdict = spoiled.verdict()
    assert verdict.bytes_missing == PAGE
    assert verdict.bytes_wrong > 0
    assert any("the dump ends at" in problem for problem in verdict.problems)


def test_swapped_pages_are_told_as_such(spoiled):
    one = spoiled.busy_page(0x100000)
    other = spoiled.busy_page(0x800000)
    first, second = spoiled.read(one, PAGE), spoiled.read(other, PAGE)
    spoiled.write(one, second)
    spoiled.write(other, first)
    verdict = spoiled.verdict()
    assert {r.note for r in verdict.wrong_ranges} >= {f"holds what belongs at {other:#x}", f"holds what belongs at {one:#x}"}


def test_missing_first_bytes_are_named(spoiled):
    # what every other tool's dump has there: the purgatory's head, or nothing
    spoiled.write(0, bytes(0x100))
    verdict = spoiled.verdict()
    assert not verdict.first_256_bytes_ok
    assert any("first 0x100 bytes" in problem for problem in verdict.problems)
    assert "K1's first 0x100 bytes" in verdict.wrong_ranges[0].what


def test_a_dump_cut_short_is_named(spoiled):
    size = spoiled.dump.stat().st_size
    os.truncate(spoiled.dump, size - 12345)
    verdict = spoiled.verdict()
    assert verdict.bytes_missing == 12345
    assert any("the dump ends at" in problem for problem in verdict.problems)


def test_another_crashs_dump_is_named(reference, tmp_path):
    source, other = (reference.directory / placement for placement in PLACEMENTS)
    for name in ("plan.json", "evidence.json", "truth"):
        (tmp_path / name).symlink_to(source / name)
    (tmp_path / "vmcore").symlink_to(other / "vmcore")
    done = subprocess.run(
        [*COMMAND, "drill", "--judge", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("FAIL")
    assert "this run's nonce is not in the dump" in done.stdout
