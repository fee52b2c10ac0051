"""`crashkernel capture` in K2: real crashes saved filtered and compressed, each page proved; and dumps that must not pass."""

import hashlib
import io
import json
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from drill_command import COMMAND

from crashkernel.drill import arrival, images, scenario
from crashkernel.drill.debian import Archive, default_cache, silent
from crashkernel.drill.kdump import KdumpFile
from crashkernel.drill.record import judge_kept
from crashkernel.drill.request import DrillRequest, fetch
from crashkernel.errors import VerificationError
from crashkernel.formats import cpio
from crashkernel.placement.plan import PLACEMENTS
from support.kdumps import Kdump

K1_BYTES = (1024 - 256) << 20
PAGE = 0x10000
SMALL = ("--memory", "1G", "--crashkernel", "256M")


def drill(directory, *options):
    """A drill by the command line, kept in `directory`: the records of its placements, and what it printed."""
    if shutil.which("qemu-system-ppc64") is None:
        pytest.skip("qemu-system-ppc64 is not installed")
    results = directory / "results.json"
    done = subprocess.run(
        [*COMMAND, "drill", *SMALL, *options, "--keep", str(directory), "--json", str(results)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {each["placement"]: each for each in json.loads(results.read_text())["drills"]}, done.stdout


@dataclass(frozen=True)
class Captured:
    directory: Path
    drills: dict
    output: str


@pytest.fixture(scope="session")
def captured(tmp_path_factory):
    """Debian 6.1 with 64 KiB pages, everything of K2 in 256 MiB, level 31, the default codec, to K2's disk."""
    directory = tmp_path_factory.mktemp("captured")
    return Captured(directory, *drill(directory, "--capture", "31"))


# --------------------------------------------------------------------------------------------------------- what passes


def check_record(record, level):
    """All of K1's pages are accounted for, none against the level."""
    pages = record["pages"]
    assert record["verdict"] == "PASS"
    assert record["k1_bytes"] == K1_BYTES == record["bytes_compared"] + record["bytes_left_out"]
    assert (record["bytes_wrong"], record["bytes_missing"], record["wrong_ranges"], record["problems"]) == (0, 0, [], [])
    assert record["first_256_bytes_ok"]
    assert record["nonce_found"]
    assert record["panic_found"]
    assert record["registers_ok"]
    assert record["capture"]["level"] == pages["level"] == level
    assert pages["kept"] * pages["page_size"] == record["bytes_compared"]
    assert sum(pages["left_out"].values()) * pages["page_size"] == record["bytes_left_out"]
    assert pages["lost"] == pages["needless"] == 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_page_is_in_the_dump_or_lawfully_left_out(captured, placement):
    record = captured.drills[placement]
    check_record(record, 31)
    assert {"page cache", "user", "free"} <= set(record["pages"]["left_out"])
    assert record["pages"]["zeros"] > 100
    assert record["pages"]["dump_bytes"] < record["bytes_compared"] / 4
    assert f"{placement}: PASS" in captured.output


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_everything_fits_in_256_mib(captured, placement):
    took = captured.drills[placement]["capture"]
    assert took["memory"] < 256 << 20
    assert took["available_least"] > 8 << 20
    assert took["peak_resident"] < 64 << 20
    assert took["peak_resident_of_a_child"] < 64 << 20


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_k2_accounts_for_all_of_its_reservation(captured, placement):
    """What K2 counts itself explains nearly all, and the rows that are what is left over stay small."""
    accounting = captured.drills[placement]["accounting"]
    assert accounting["reservation"] == 256 << 20
    assert accounting["page_size"] == 0x10000
    for table in (accounting["unpacking"], accounting["saving"]):
        assert sum(table.values()) == accounting["reservation"]
        assert 0 < table["else reserved at boot"] < 8 << 20
        assert 0 < table["drivers, pages in hand"] < 24 << 20
        assert 30 << 20 < table["K2's image"] < 45 << 20
        assert 40 << 20 < table["initrd unpacked"] < 100 << 20
    assert 40 << 20 < accounting["unpacking"]["initrd as loaded"] < 64 << 20
    assert accounting["saving"]["processes"] > 20 << 20 > accounting["unpacking"]["processes"]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_kept_drill_can_be_judged_again(captured, placement):
    assert judge_kept(captured.directory / placement).passed


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_drgn_reads_the_dump(captured, placement):
    drgn = pytest.importorskip("drgn")
    directory = captured.directory / placement
    program = drgn.Program()
    program.set_core_dump(directory / "vmcore")
    assert program.platform.arch == drgn.Architecture.PPC64
    # the page that the hypervisor counted in is another one on each run
    counted = {int(each["range"].split("-")[0], 16) // PAGE for each in captured.drills[placement]["exempt"]}
    with KdumpFile(directory / "vmcore", "little") as dump, (directory / "truth").open("rb") as truth:
        pfns = [pfn for pfn in dump.pfns.tolist() if pfn not in counted]
        for pfn in pfns[1 :: len(pfns) // 16]:
            truth.seek(pfn * PAGE)
            assert program.read(pfn * PAGE, PAGE, physical=True) == truth.read(PAGE)


def test_the_nonce_is_in_the_log_and_with_the_page_cache_gone_nowhere_else(captured):
    """What the raw drill looks for is user data in the page cache, which level 31 drops."""
    directory = captured.directory / "reserved"
    nonce = json.loads((directory / "evidence.json").read_text())["nonce"]
    assert nonce in (directory / "vmcore-dmesg.txt").read_text()
    assert not any(bytes.fromhex(nonce) in page for page in pages_of(directory / "vmcore").values())


def test_over_the_network_from_a_kernel_with_small_pages(tmp_path):
    """7.x has 4 KiB pages, a new page type, and compound pages that are told by a mask."""
    options = ("--kernel", "debian:sid", "--placement", "zero", "--capture-to", "network", "--capture-codec", "zlib")
    drills, _ = drill(tmp_path, "--capture", "31", *options)
    check_record(drills["zero"], 31)
    assert drills["zero"]["pages"]["page_size"] == 4096
    assert drills["zero"]["capture"]["to"] == "network"


@pytest.mark.parametrize(("level", "codec"), [(0, "lzo"), (17, "snappy")])
def test_other_levels_and_codecs_on_the_hash_mmu(tmp_path, level, codec):
    options = ("--mmu", "hash", "--placement", "reserved", "--capture-codec", codec)
    drills, _ = drill(tmp_path, "--capture", str(level), *options)
    check_record(drills["reserved"], level)
    assert set(drills["reserved"]["pages"]["left_out"]) == ({"free"} if level else set())


# ----------------------------------------------------------------------------------------------- makedumpfile beside us

_PEER_AT = 600 << 20  # bytes, on K2's disk
_PEER = f"""
makedumpfile -F -c -d 31 /proc/vmcore 2>/mdf.log | dd of=/dev/vda bs=1048576 seek={_PEER_AT >> 20} iflag=fullblock \\
    conv=notrunc,fsync 2>/dev/null
say "log makedumpfile: $(tail -n 1 /mdf.log)"
"""


def unflattened(data):
    """The file that a flattened stream is about (makedumpfile(8), -F), as bytes."""
    assert data[:12] == b"makedumpfile"
    at, out = 4096, bytearray()
    while True:
        offset, size = struct.unpack_from(">qq", data, at)
        if offset == -1:
            return bytes(out)
        out.extend(bytes(max(0, offset + size - len(out))))
        out[offset : offset + size] = data[at + 16 : at + 16 + size]
        at += 16 + size


def overlay_with_makedumpfile():
    """Put over K2's image: makedumpfile, and an init that runs it too, when `crashkernel capture` is done."""
    archive = Archive(default_cache(), "bookworm")
    tree = archive.unpack("makedumpfile", "libdw1", "libelf1", "libbz2-1.0", "liblzma5", "liblzo2-2", "zlib1g")
    init = (Path(arrival.__file__).parent / "capture-init.sh").read_text()
    before, told, after = init.partition('say "saved $size $status"')
    assert told
    entries = [
        cpio.Entry.file("init", (before + _PEER + told + after).encode(), 0o755),
        cpio.Entry.file("bin/makedumpfile", (tree / "usr/bin/makedumpfile").read_bytes(), 0o755),
    ]
    for path in sorted(tree.rglob("powerpc64le-linux-gnu/lib*.so.?*")):
        if path.is_file() and path.name.startswith(("libdw", "libelf", "libbz2", "liblzma")):
            entries.append(cpio.Entry.file(f"usr/lib/powerpc64le-linux-gnu/{path.name}", path.read_bytes()))
    overlay = io.BytesIO()
    cpio.write(overlay, entries)
    return overlay.getvalue()


@pytest.mark.parametrize("mmu", ["radix", "hash"])
def test_makedumpfile_in_the_same_guest_selects_the_same_pages(tmp_path, monkeypatch, mmu):
    """makedumpfile 1.7.2 knows 6.1. Of 7.2 neither it nor 1.7.8 does: that one leaves out pages that no level drops."""
    if shutil.which("qemu-system-ppc64") is None:
        pytest.skip("qemu-system-ppc64 is not installed")
    build, take = images.build_capture_image, arrival.from_disk

    def build_with_peer(*arguments, **options):
        image = build(*arguments, **options)
        with image.open("ab") as file:
            file.write(overlay_with_makedumpfile())
        return image

    def take_both(disk, directory):
        with disk.open("rb") as file:
            file.seek(_PEER_AT)
            (tmp_path / "peer").write_bytes(unflattened(file.read()))
        return take(disk, directory)

    monkeypatch.setattr(images, "build_capture_image", build_with_peer)
    monkeypatch.setattr(arrival, "from_disk", take_both)
    request = DrillRequest(mmu=mmu, memory="1G", crashkernel="256M", placement="reserved", capture=31)
    supplies = fetch(request, silent)
    said = []
    outcome = scenario.run_drill(scenario.Scenario(request, supplies, tmp_path), lambda _, text: said.append(text))
    assert outcome.passed, outcome.failure or outcome.verdict
    assert "makedumpfile: makedumpfile Completed." in said
    with KdumpFile(tmp_path / "vmcore", "little") as ours, KdumpFile(tmp_path / "peer", "little") as theirs:
        assert np.array_equal(ours.pfns, theirs.pfns)
        assert np.array_equal(ours.described, theirs.described)
        assert (ours.zero_pages, ours.notes) == (theirs.zero_pages, theirs.notes)
    assert pages_of(tmp_path / "vmcore") == pages_of(tmp_path / "peer")


# ------------------------------------------------------------------------------------------------- what must not pass


def pages_of(path):
    """The pages of a dump, by page frame number, as the verdict's reader has them."""
    with KdumpFile(path, "little") as dump:
        page, pages = bytearray(dump.page_size), {}
        for number, pfn in enumerate(dump.pfns.tolist()):
            dump.read(number, 1, page)
            pages[pfn] = bytes(page)
        return pages


class Remade(Kdump):
    """A dump written anew, whose notes are those of the real one."""

    def vmcoreinfo(self):
        return self.info["text"]


class Spoiled:
    """A copy of a kept drill whose dump is made anew of pages that may be changed, with a manifest that is true of the file."""

    def __init__(self, directory, source):
        self.directory = directory
        for name in ("plan.json", "truth"):
            (directory / name).symlink_to(source / name)
        for name in ("evidence.json", "vmcore-dmesg.txt", "vmcore.manifest.json"):
            shutil.copyfile(source / name, directory / name)
        self.pages = pages_of(source / "vmcore")
        with KdumpFile(source / "vmcore", "little") as dump:
            self.described = set(dump.described.tolist())
            notes, text = dump.notes, dump.vmcoreinfo
        self.kdump = Remade(
            self.pages,
            page_size=PAGE,
            codec="zstd",
            memory=self.described,
            notes=notes,
            info={"text": text},
            release=self.release,
        )
        self.counts = json.loads((directory / "vmcore.manifest.json").read_text())["pages"]

    @property
    def evidence(self):
        return json.loads((self.directory / "evidence.json").read_text())

    @property
    def release(self):
        return self.evidence["release"]

    def truth(self, pfn):
        with (self.directory / "truth").open("rb") as file:
            file.seek(pfn * PAGE)
            return file.read(PAGE)

    def busy(self, start=0):
        """A page of the dump from `start` on that is not all of one byte."""
        return next(pfn for pfn in sorted(self.pages) if pfn >= start and len(set(self.pages[pfn])) > 16)

    def with_nonce(self):
        mark = self.evidence["nonce"].encode()
        return [pfn for pfn, page in self.pages.items() if mark in page]

    def leave_out(self, pfn, counted_as="free"):
        self.counts["zero"] -= not any(self.pages.pop(pfn))
        self.counts["kept"] -= 1
        self.counts[counted_as] += 1

    def write(self):
        data = self.kdump.to_bytes()
        (self.directory / "vmcore").write_bytes(data)
        self.sign(data)

    def sign(self, data):
        """The manifest, true of the file; whether its pages are, is the counts' matter."""
        path = self.directory / "vmcore.manifest.json"
        manifest = json.loads(path.read_text())
        pieces = (data[at : at + (4 << 20)] for at in range(0, len(data), 4 << 20))
        root = hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).hexdigest()
        manifest |= {"bytes": len(data), "pages": self.counts}
        manifest["digest"]["root"] = root
        self.sign_off(manifest)

    def sign_off(self, manifest):
        """Write the manifest with a true sign-off, whatever it says."""
        manifest.pop("sign_off", None)
        canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        manifest["sign_off"] = hashlib.sha256(canonical.encode()).hexdigest()
        (self.directory / "vmcore.manifest.json").write_text(json.dumps(manifest))

    def verdict(self, *, write=True):
        if write:
            self.write()
        verdict = judge_kept(self.directory)
        assert not verdict.passed
        return verdict

    def problems(self, **options):
        return "\n".join(self.verdict(**options).problems)


@pytest.fixture
def spoiled(captured, tmp_path):
    return Spoiled(tmp_path, captured.directory / "reserved")


def test_a_dump_made_anew_of_the_same_pages_passes(spoiled):
    spoiled.write()
    verdict = judge_kept(spoiled.directory)
    assert verdict.problems == []
    assert verdict.passed


def test_an_altered_page_is_found_and_named(spoiled):
    pfn = spoiled.busy()
    page = spoiled.pages[pfn]
    spoiled.pages[pfn] = page[:0x5000] + bytes([page[0x5000] ^ 1]) + page[0x5001:]
    verdict = spoiled.verdict()
    assert verdict.bytes_wrong == 1
    assert [(each.range.start, each.range.size) for each in verdict.wrong_ranges] == [(pfn * PAGE + 0x5000, 1)]
    assert "K1 text" in verdict.wrong_ranges[0].what


def test_swapped_pages_are_told_as_such(spoiled):
    one, other = spoiled.busy(), spoiled.busy(0x100)
    spoiled.pages[one], spoiled.pages[other] = spoiled.pages[other], spoiled.pages[one]
    notes = {each.note for each in spoiled.verdict().wrong_ranges}
    assert any(note.startswith("holds what belongs at") for note in notes)


def test_zeros_in_place_of_a_page_are_found(spoiled):
    pfn = spoiled.busy(0x80)
    spoiled.pages[pfn] = bytes(PAGE)
    spoiled.counts["zero"] += 1
    verdict = spoiled.verdict()
    assert verdict.bytes_wrong > 16
    assert {each.note for each in verdict.wrong_ranges} == {"zeros"}


@pytest.mark.parametrize("counted_as", ["free", "user", "cache"])
def test_a_kernel_page_left_out_is_found_whatever_it_is_counted_as(spoiled, counted_as):
    pfn = spoiled.busy(0x80)
    spoiled.leave_out(pfn, counted_as)
    verdict = spoiled.verdict()
    assert (verdict.pages.lost, verdict.bytes_missing) == (1, PAGE)
    assert verdict.wrong_ranges[-1].range.start == pfn * PAGE
    assert any("1 pages are left out that level 31 keeps" in problem for problem in verdict.problems)


def test_what_a_lower_level_keeps_must_be_there(spoiled):
    evidence = spoiled.evidence
    evidence["capture"]["level"] = spoiled.kdump.level = 23  # all but user data
    (spoiled.directory / "evidence.json").write_text(json.dumps(evidence))
    verdict = spoiled.verdict()
    assert verdict.pages.lost == spoiled.counts["user"]
    assert "pages are left out that level 23 keeps" in "\n".join(verdict.problems)


def test_pages_kept_needlessly_are_counted_and_no_fault(spoiled, captured):
    out = sorted(spoiled.described - set(spoiled.pages))
    some = [pfn for pfn in out if any(spoiled.truth(pfn))][:3]
    for pfn in some:
        spoiled.pages[pfn] = spoiled.truth(pfn)
    spoiled.write()
    verdict = judge_kept(spoiled.directory)
    assert verdict.pages.needless == 3
    assert verdict.pages.lost == 0
    assert all("the manifest counts" in problem for problem in verdict.problems)


def test_without_the_log_s_pages_it_is_not_this_crash_s(spoiled):
    for pfn in spoiled.with_nonce():
        spoiled.leave_out(pfn)
    assert "this run's nonce, which K1's log has, is not in the dump" in spoiled.problems()


def test_memory_that_is_not_k1_s_is_found(spoiled):
    reserved = int(spoiled.evidence["reserved"].partition("-")[0], 16) // PAGE
    spoiled.described.add(reserved)
    spoiled.pages[reserved] = spoiled.truth(reserved)
    assert f"the dump has pages that are no memory of K1's: {reserved * PAGE:#x}" in spoiled.problems()


def test_memory_that_the_dump_does_not_know_of_is_found(spoiled):
    gone = max(spoiled.described - set(spoiled.pages))
    spoiled.described.remove(gone)
    assert "the dump knows nothing of K1's" in spoiled.problems()


def test_a_manifest_that_counts_wrong_is_found(spoiled):
    spoiled.counts["free"] -= 1
    spoiled.counts["user"] += 1
    problems = spoiled.problems()
    assert "pages free" in problems
    assert "pages user" in problems


def test_a_manifest_of_other_bytes_is_found(spoiled):
    spoiled.write()
    path = spoiled.directory / "vmcore.manifest.json"
    manifest = json.loads(path.read_text())
    manifest["digest"]["root"] = "0" * 64
    spoiled.sign_off(manifest)
    assert spoiled.problems(write=False).startswith("the manifest's digest is ")


def test_an_edited_manifest_is_found(spoiled):
    spoiled.write()
    path = spoiled.directory / "vmcore.manifest.json"
    manifest = json.loads(path.read_text())
    manifest["crash"]["time"] = 1
    path.write_text(json.dumps(manifest))
    assert spoiled.problems(write=False).startswith("the manifest's sign-off is ")


def test_a_dump_of_another_codec_than_was_asked_for_is_found(spoiled):
    spoiled.kdump.codec = "zlib"
    assert spoiled.problems() == "the dump says zlib, zstd was asked for"


def test_a_filter_that_drops_nothing_does_not_pass(spoiled):
    for pfn in spoiled.described - set(spoiled.pages):
        spoiled.pages[pfn] = spoiled.truth(pfn)
    assert "pages that level 31 drops are kept, more than 5%" in spoiled.problems()


@pytest.mark.parametrize("name", ["vmcore-dmesg.txt", "vmcore.manifest.json"])
def test_what_lies_beside_the_dump_must_be_there(spoiled, name):
    spoiled.write()
    (spoiled.directory / name).unlink()
    assert name in spoiled.problems(write=False)


def test_another_crash_s_log_is_found(spoiled, captured):
    spoiled.write()
    shutil.copyfile(captured.directory / "zero" / "vmcore-dmesg.txt", spoiled.directory / "vmcore-dmesg.txt")
    assert "vmcore-dmesg.txt does not have this run's nonce" in spoiled.problems(write=False)


def test_another_crash_s_dump_is_found(captured, tmp_path):
    source, other = captured.directory / "reserved", captured.directory / "zero"
    for name in ("plan.json", "evidence.json", "truth"):
        (tmp_path / name).symlink_to(source / name)
    for name in ("vmcore", "vmcore-dmesg.txt", "vmcore.manifest.json"):
        (tmp_path / name).symlink_to(other / name)
    done = subprocess.run(
        [*COMMAND, "drill", "--judge", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("FAIL")
    assert "this run's nonce" in done.stdout


@pytest.mark.parametrize("what", ["bitmap1", "bitmap2", "descriptors"])
def test_flipped_bits_in_the_dump_s_tables_never_pass(spoiled, what):
    spoiled.write()
    data = bytearray((spoiled.directory / "vmcore").read_bytes())
    some = sorted(spoiled.pages)
    for pfn in (some[0], some[len(some) // 2], some[-1]):
        bad = bytearray(data)
        at = spoiled.kdump.places[what] + (24 * some.index(pfn) if what == "descriptors" else pfn // 8)
        bad[at] ^= 1 << (pfn % 8)
        (spoiled.directory / "vmcore").write_bytes(bad)
        spoiled.sign(bad)
        assert spoiled.problems(write=False)


def test_a_disk_without_a_whole_dump_is_named(tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(b"crashkernel dump" + (1).to_bytes(4, "big") + bytes(2 << 20))  # state 0: incomplete
    with pytest.raises(VerificationError, match="does not say that it holds a whole dump"):
        arrival.from_disk(disk, tmp_path)
