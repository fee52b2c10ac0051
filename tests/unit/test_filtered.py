"""The verdict on a filtered dump: a true one passes, and whatever is wrong with another is found and named."""

import functools
import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from crashkernel.cli.display import Display
from crashkernel.drill.filtered import SavedDump, judge_filtered
from crashkernel.drill.saving import Saving
from crashkernel.drill.verdict import Truth
from crashkernel.machine import Region
from crashkernel.memory import Range
from support.cores import PID, prstatus_notes
from support.deadpages import LAYOUTS, SIZE, DeadKernel
from support.elfwriter import write_note
from support.kdumps import Kdump
from support.machines import HEAD
from support.vmcores import MIB

PAGE = 0x10000
RELEASE = "6.1.0-49-powerpc64le"
NONCE = hashlib.sha256(b"this run's nonce").digest()
PANIC = "Kernel panic - not syncing: sysrq triggered crash"
RESERVED = Range(40 * MIB, 48 * MIB)
NOTES, MARKS, TEXT = 0x100000, 0x200000, 0x300000  # physical addresses
VPA = 0x30000
CPUS = prstatus_notes((PID, 0))
CACHE, USER, FREE, ZERO, PRIVATE = 0x150, 0x160, 0x170, 0x190, 0x1A0  # page frames: four pages of each, sixteen free ones


class Remade(Kdump):
    def vmcoreinfo(self):
        return self.info["text"]


@functools.cache
def dead_memory():
    """A dead kernel's memory, its VMCOREINFO note, and where its notes are."""
    dead = DeadKernel(layout=LAYOUTS[2])
    dead.structs.era = replace(dead.structs.era, name=RELEASE)
    dead.info["OSRELEASE"] = RELEASE
    for number in range(4):
        dead.structs.cache(CACHE + number)
        dead.structs.cache(PRIVATE + number, private=True)
        dead.structs.anon(USER + number)
    dead.free(FREE, 4)
    info = dead.build()
    memory = bytearray(dead.kernel.memory.read(0, SIZE))
    for first, count in ((CACHE, 4), (PRIVATE, 4), (USER, 4), (FREE, 16), (0, 8), (TEXT // PAGE, 4)):
        for pfn in range(first, first + count):
            memory[pfn * PAGE : (pfn + 1) * PAGE] = hashlib.sha256(pfn.to_bytes(8, "big")).digest() * (PAGE // 32)
    memory[:0x100] = HEAD
    memory[MARKS : MARKS + 200] = f"nonce {NONCE.hex()} {PANIC}".encode().ljust(200)
    memory[VPA : VPA + 4] = b"\xd3\x97\xd7\x81"
    note = write_note("little", "VMCOREINFO", 0, info)
    places = (Range.sized(NOTES, len(note)), *(Range.sized(NOTES + 0x10000 * n, 4096) for n in (1, 2)))
    for place, data in zip(places, (note, *CPUS), strict=True):
        memory[place.start : place.start + len(data)] = data
    return bytes(memory), note, info, places


class Bench:
    """A crash of a kernel that never ran, a dump of it at a level, and what lies beside that."""

    def __init__(self, directory, level=31):
        self.directory = directory
        self.memory, self.note, info, places = dead_memory()
        self.plan = SimpleNamespace(
            reserved=RESERVED, notes=places, kept=(), firmware=(), k1_layout=(Region("K1 text", Range(0, MIB)),)
        )
        self.truth = Truth(
            memory=directory / "truth", head=bytes(HEAD), memory_size=SIZE, reserved=RESERVED, nonce=NONCE, panic=PANIC,
            release=RELEASE, crashed_pid=PID, cpus=2, firmware=(),
        )  # fmt: skip
        self.truth.memory.write_bytes(b"\xee" * 0x100 + self.memory[0x100:])
        self.saving = Saving(level, "zlib")
        self.counts = dict.fromkeys(
            ("kept", "zero", "unreadable", "cache", "cache_private", "user", "free", "poisoned", "offline"), 0
        )
        self.described = set(range(RESERVED.start // PAGE))
        out = {"cache": range(CACHE, CACHE + 4), "cache_private": range(PRIVATE, PRIVATE + 4)}
        out |= {"user": range(USER, USER + 4), "free": range(FREE, FREE + 16)}
        bits = {"cache": 2, "cache_private": 4, "user": 8, "free": 16}
        self.pages = {pfn: self.page(pfn) for pfn in self.described}
        for name, pfns in out.items():
            if level & bits[name] or (name == "cache" and level & 4):
                for pfn in pfns:
                    del self.pages[pfn]
                self.counts[name] = len(pfns)
        self.counts["kept"] = len(self.pages)
        self.counts["zero"] = sum(page == bytes(PAGE) for page in self.pages.values()) if level & 1 else 0
        self.dump = Remade(
            self.pages, page_size=PAGE, memory=self.described, level=level, notes=b"".join([*CPUS, self.note]),
            info={"text": info}, release=RELEASE, share_zeros=bool(level & 1),
        )  # fmt: skip
        self.log = f"[    1.0] nonce {NONCE.hex()}\n[    2.0] {PANIC}\n"

    def page(self, pfn):
        return self.memory[pfn * PAGE : (pfn + 1) * PAGE]

    def leave_out(self, pfn, counted_as="free"):
        self.counts["zero"] -= self.pages.pop(pfn) == bytes(PAGE)
        self.counts["kept"] -= 1
        self.counts[counted_as] += 1

    def tell_another_kernel(self):
        text = self.dump.info["text"]
        self.dump.info["text"] = text.replace(b"CRASHTIME=1", b"CRASHTIME=2")
        self.dump.notes = self.dump.notes.replace(text, self.dump.info["text"])

    def change(self, pfn, at, value):
        page = bytearray(self.pages[pfn])
        page[at] = value
        self.pages[pfn] = bytes(page)

    def manifest(self, data):
        pieces = (data[at : at + (4 << 20)] for at in range(0, len(data), 4 << 20))
        root = hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).hexdigest()
        return {
            "manifest": 1,
            "file": "vmcore",
            "complete": True,
            "bytes": len(data),
            "digest": {"algorithm": "sha256-pieces", "piece_size": 4 << 20, "root": root},
            "dump": {"format": "kdump-compressed", "level": self.saving.level, "codec": "zlib", "page_size": PAGE},
            "pages": self.counts,
            "crash": {"release": RELEASE, "machine": "ppc64le", "panic": PANIC, "time": None},
            "encrypted_to": None,
        }

    def signed(self, manifest):
        canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        return manifest | {"sign_off": hashlib.sha256(canonical.encode()).hexdigest()}

    def judge(self, **truth):
        saved = SavedDump(*(self.directory / name for name in ("vmcore", "log", "manifest")))
        data = self.dump.to_bytes()
        saved.dump.write_bytes(data)
        saved.log.write_text(self.log)
        saved.manifest.write_text(json.dumps(self.signed(self.manifest(data))))
        return judge_filtered(saved, self.saving, replace(self.truth, **truth), self.plan)

    def problems(self, **truth):
        verdict = self.judge(**truth)
        assert not verdict.passed
        assert all("\n" not in each for each in verdict.problems)
        return "\n".join(verdict.problems)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.mark.parametrize("level", [0, 1, 2, 4, 8, 16, 17, 31])
def test_a_true_dump_passes_at_every_level(tmp_path, level):
    bench = Bench(tmp_path, level)
    verdict = bench.judge()
    assert verdict.problems == []
    assert verdict.passed
    names = {"cache": "page cache", "cache_private": "page cache with private data", "user": "user", "free": "free"}
    assert verdict.pages.left_out == {name: bench.counts[field] for field, name in names.items() if bench.counts[field]}
    assert (verdict.pages.kept, verdict.pages.lost, verdict.pages.needless) == (bench.counts["kept"], 0, 0)
    if level & 1:
        assert verdict.pages.zeros == bench.counts["zero"]
    assert verdict.bytes_compared + verdict.bytes_left_out == verdict.k1_bytes == RESERVED.start


def test_a_page_of_zeros_may_be_left_out_where_the_level_drops_zeros(bench):
    bench.leave_out(ZERO)
    verdict = bench.judge()
    assert verdict.pages.left_out["zeros"] == 1
    assert verdict.pages.lost == 0


def test_but_not_elsewhere(tmp_path):
    bench = Bench(tmp_path, 16)
    bench.leave_out(ZERO)
    assert "1 pages are left out that level 16 keeps" in bench.problems()


def test_an_altered_byte_is_found_and_named(bench):
    bench.change(5, 0x123, bench.pages[5][0x123] ^ 1)
    verdict = bench.judge()
    assert verdict.bytes_wrong == 1
    assert (verdict.wrong_ranges[0].range.start, verdict.wrong_ranges[0].what) == (0x50123, "K1 text")


def test_swapped_pages_are_told_as_such(bench):
    bench.pages[5], bench.pages[TEXT // PAGE] = bench.pages[TEXT // PAGE], bench.pages[5]
    assert {each.note.rpartition(" ")[0] for each in bench.judge().wrong_ranges} == {"holds what belongs at"}


@pytest.mark.parametrize(("pfn", "why"), [(5, "text"), (TEXT // PAGE + 1, "kernel data")])
def test_a_page_that_no_level_drops_is_missed(bench, pfn, why):
    bench.leave_out(pfn, "user")
    verdict = bench.judge()
    assert (verdict.pages.lost, verdict.bytes_missing, verdict.passed) == (1, PAGE, False), why
    assert [each.range for each in verdict.wrong_ranges] == [Range.sized(pfn * PAGE, PAGE)]


def test_pages_that_might_have_been_left_out_are_counted_only(bench):
    bench.pages[USER] = bench.page(USER)
    bench.counts["user"] -= 1
    bench.counts["kept"] += 1
    verdict = bench.judge()
    assert verdict.passed
    assert verdict.pages.needless == 1


def test_k1_s_first_bytes_are_those_before_the_crash(bench):
    bench.pages[0] = b"\xee" * 0x100 + bench.pages[0][0x100:]
    verdict = bench.judge()
    assert not verdict.first_256_bytes_ok
    assert verdict.wrong_ranges[0].range == Range(0, 0x100)


def test_a_dispatch_count_that_the_hypervisor_raised_is_no_fault(bench):
    count = int.from_bytes(bench.memory[VPA + 0x100 : VPA + 0x104], "big")
    bench.change(VPA // PAGE, 0x103, count % 256 + 2)
    verdict = bench.judge()
    assert verdict.passed
    assert [each.what for each in verdict.exempt] == [f"VPA dispatch count, {count} to {count + 2}"]


def test_firmware_s_own_memory_may_change(bench):
    bench.change(TEXT // PAGE, 7, 0)
    verdict = bench.judge(firmware=(Region("OPAL", Range(TEXT, TEXT + MIB)),))
    assert verdict.passed
    assert [each.what for each in verdict.exempt] == ["OPAL"]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda b: b.leave_out(MARKS // PAGE), "this run's nonce, which K1's log has, is not in the dump"),
        (lambda b: b.leave_out(MARKS // PAGE), "this crash's panic message is not in the dump"),
        (lambda b: setattr(b.dump, "level", 15), "the dump says level 15, level 31 was asked for"),
        (lambda b: setattr(b.dump, "release", "5.10.0"), "the dump says it is of 5.10.0 ppc64le"),
        (lambda b: setattr(b.dump, "machine", "x86_64"), f"the dump says it is of {RELEASE} x86_64"),
        (lambda b: b.tell_another_kernel(), "VMCOREINFO is not what K1 had in memory"),
        (lambda b: b.described.add(RESERVED.start // PAGE), "pages that are no memory of K1's: 0x2800000"),
        (lambda b: b.described.add(SIZE // PAGE + 9), "pages that are no memory of K1's: beyond 0x3000000"),
        (lambda b: b.described.discard(FREE), "the dump knows nothing of K1's 0x1700000"),
        (lambda b: b.counts.update(free=15, user=5), "the manifest counts 15 pages free, the dump has 16"),
        (lambda b: b.counts.update(unreadable=1), "1 pages could not be read"),
        (lambda b: b.counts.update(poisoned=1), "pages, the dump tells of 640"),
        (lambda b: setattr(b, "log", PANIC), "log does not have this run's nonce"),
        (lambda b: setattr(b, "log", NONCE.hex()), "log does not have the panic message"),
        (lambda b: setattr(b.dump, "notes", b.note), "the registers of 0 CPUs"),
        (lambda b: setattr(b.plan, "reserved", Range(0, PAGE)), "is not the kernel's"),
        (lambda b: setattr(b.plan, "notes", b.plan.notes[1:]), "K1 left no VMCOREINFO where the plan says"),
    ],
)
def test_what_is_wrong_is_named(bench, spoil, problem):
    spoil(bench)
    assert problem in bench.problems()


def test_a_filter_that_drops_nothing_does_not_pass(bench):
    for pfn in bench.described:
        bench.pages[pfn] = bench.page(pfn)
    bench.counts |= {"kept": len(bench.pages), "cache": 0, "cache_private": 0, "user": 0, "free": 0}
    assert bench.problems() == (
        "28 of the 28 pages that level 31 drops are kept, more than 5%: "
        "4 page cache, 4 page cache with private data, 4 user, 16 free"
    )


def test_a_few_needless_pages_pass_and_more_do_not(bench):
    for number, pfn in enumerate((USER, USER + 1)):
        bench.pages[pfn] = bench.page(pfn)
        bench.counts["user"] -= 1
        bench.counts["kept"] += 1
        verdict = bench.judge()
        assert verdict.passed == (number == 0)
        assert verdict.pages.needless == number + 1
    assert verdict.problems == ["2 of the 28 pages that level 31 drops are kept, more than 5%: 2 user"]


def test_needless_pages_have_a_line_of_their_own_where_the_verdict_is_shown(bench, capsys):
    Display().verdict(bench.judge())
    assert "needless" not in capsys.readouterr().out
    bench.pages[USER] = bench.page(USER)
    bench.counts["user"] -= 1
    bench.counts["kept"] += 1
    Display().verdict(bench.judge())
    assert "  needless: 1 pages are kept that level 31 drops\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        (("manifest",), 2, "version"),
        (("file",), "vmcore.flat", "file"),
        (("complete",), False, "complete"),
        (("bytes",), 1, "bytes"),
        (("digest", "algorithm"), "sha256", "digest's algorithm"),
        (("digest", "piece_size"), 1 << 20, "digest's piece size"),
        (("digest", "root"), "00", "digest"),
        (("dump", "format"), "flattened", "format"),
        (("dump", "level"), 30, "level"),
        (("dump", "codec"), "lzo", "codec"),
        (("dump", "page_size"), 4096, "page size"),
        (("crash", "release"), "5.10.0", "kernel"),
        (("crash", "machine"), "ppc64", "machine"),
        (("crash", "panic"), "", "panic message"),
        (("encrypted_to",), "age1nobody", "recipient"),
    ],
)
def test_a_manifest_that_is_signed_and_not_true_is_found(bench, monkeypatch, place, value, what):
    manifest = bench.manifest

    def changed(data):
        raw = manifest(data)
        within = raw if len(place) == 1 else raw[place[0]]
        within[place[-1]] = value
        return raw

    monkeypatch.setattr(bench, "manifest", changed)
    assert bench.problems().startswith(f"the manifest's {what} is {value!r}, not ")
    assert "\n" not in bench.problems()


def test_a_manifest_edited_after_it_was_signed_is_found(bench, monkeypatch):
    """Even where nothing else could tell: when the crash was is known to nobody else."""
    signed = bench.signed
    monkeypatch.setattr(bench, "signed", lambda raw: signed(raw) | {"crash": raw["crash"] | {"time": 1}})
    assert bench.problems().startswith("the manifest's sign-off is ")


def test_a_manifest_without_a_sign_off_is_none(bench, monkeypatch):
    monkeypatch.setattr(bench, "signed", lambda raw: raw)
    assert "is no manifest: KeyError('sign_off')" in bench.problems()


def test_a_manifest_that_is_true_of_another_codec_than_was_asked_for(bench):
    """The manifest and the request agree; the dump is another."""
    bench.dump.codec = "lzo"
    assert bench.problems() == "the dump says lzo, zlib was asked for"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pages": 3}'])
def test_what_is_no_manifest_is_found(bench, monkeypatch, text):
    monkeypatch.setattr(json, "dumps", lambda *_, **__: text)
    assert "is no manifest" in bench.problems()


@pytest.mark.parametrize("name", ["vmcore", "log", "manifest"])
def test_what_did_not_arrive_is_named(bench, name):
    bench.judge()
    (bench.directory / name).unlink()
    saved = SavedDump(*(bench.directory / each for each in ("vmcore", "log", "manifest")))
    verdict = judge_filtered(saved, bench.saving, bench.truth, bench.plan)
    assert not verdict.passed
    assert any(name in each for each in verdict.problems)
