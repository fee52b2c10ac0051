import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from crashkernel.cli import main
from crashkernel.dump.backtrace import _back_chain, backtrace
from crashkernel.dump.dumpfile import open_dump
from crashkernel.dump.inspection import Task, crashed_task, find_manifest, inspect, verify
from crashkernel.errors import EnvironmentFault, FormatError, UsageError
from crashkernel.target.device import DUMP_OFFSET, DeviceHead
from crashkernel.target.manifest import Manifest, manifest_name
from crashkernel.vmcore.kernel import CrashedKernel
from support.deadkernels import LOG, PANIC, TEXT, altered, dump_of, elf_of, kernel_of, manifest_of
from support.elfwriter import write_note, write_prstatus
from support.kdumps import in_records, write_flattened

MACHINES = [("ppc64le", 0x1000), ("ppc64le", 0x10000), ("ppc64", 0x10000), ("x86_64", 0x1000)]
every_machine = pytest.mark.parametrize(("machine", "page_size"), MACHINES)


def stored(tmp_path, data: bytes, name: str = "vmcore") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def inspected(path: Path, manifest: Manifest | None = None):
    with open_dump(path) as dump:
        return inspect(dump, manifest)


class TestInspect:
    @every_machine
    @pytest.mark.parametrize("form", ["kdump", "flattened", "elf"])
    def test_says_what_crashed(self, tmp_path, machine, page_size, form):
        made = dump_of(machine, page_size)
        data = elf_of(machine, page_size) if form == "elf" else made.to_bytes()
        found = inspected(stored(tmp_path, write_flattened(in_records(data, 1 << 16)) if form == "flattened" else data))
        assert found.format == {"kdump": "kdump-compressed", "flattened": "flattened kdump-compressed", "elf": "elf"}[form]
        assert (found.completeness, found.remarks) == ("whole", () if form != "elf" else found.remarks)
        assert (found.machine, found.page_size, found.release) == (machine, page_size, "6.1.0-kdumps")
        assert (found.panic, found.log) == (PANIC, TEXT)
        assert found.task == Task(1, 7, "sh")
        assert [(cpu.pid, cpu.crashed) for cpu in found.cpus] == [(0, False), (7, True)]
        assert found.crash_time == 1795567645
        assert found.size == (tmp_path / "vmcore").stat().st_size
        pages = found.pages
        assert (pages.memory, pages.missing) == ((32 << 20) // page_size, 0)
        if form == "elf":
            assert (found.codec, found.level, pages.kept) == ("none", None, pages.memory)
        else:
            assert (found.codec, found.level, pages.kept) == ("zlib", 31, len(made.pages))
            assert pages.zero == sum(not any(page) for page in made.pages.values())
            assert (found.version, found.node) == ("#1 SMP test", "node")

    def test_registers_have_their_own_values(self, tmp_path):
        """The builder numbers the words from 0x1000 on, in the order of the kernel's struct."""
        ppc64 = inspected(stored(tmp_path, dump_of("ppc64le").to_bytes())).cpus[0]
        assert (ppc64.registers["gpr0"], ppc64.registers["gpr31"], ppc64.pc) == (0x1000, 0x101F, 0x1020)
        x86_64 = inspected(stored(tmp_path, dump_of("x86_64").to_bytes())).cpus[0]
        assert (x86_64.registers["r15"], x86_64.registers["rsp"], x86_64.pc) == (0x1000, 0x1013, 0x1010)
        assert x86_64.registers["gs"] == 0x101A

    def test_a_note_that_is_too_short(self, tmp_path):
        made = dump_of("x86_64")
        notes = write_note("little", "CORE", 1, write_prstatus("little", 7, [])[:300])
        made.notes = notes + write_note("little", "VMCOREINFO", 0, made.vmcoreinfo())
        found = inspected(stored(tmp_path, made.to_bytes()))
        assert not found.cpus
        assert "has at least 328 bytes, this one 300" in found.remarks[0]

    def test_a_dump_without_a_log(self, tmp_path):
        made = dump_of()
        made.info = {key: value for key, value in made.info.items() if "printk" not in key and "prb" not in key}
        found = inspected(stored(tmp_path, made.to_bytes()))
        assert (found.log, found.panic, found.task) == ("", "", None)
        assert any("its log cannot be read" in each for each in found.remarks)
        assert [cpu.crashed for cpu in found.cpus] == [False, False]

    def test_the_only_cpu_is_the_one_that_crashed(self, tmp_path):
        made = dump_of(log=LOG[:2], pids=(0,))
        assert [cpu.crashed for cpu in inspected(stored(tmp_path, made.to_bytes())).cpus] == [True]

    def test_among_idle_tasks_the_cpu_s_number_decides(self, tmp_path):
        log = (PANIC, "CPU: 2 UID: 0 PID: 0 Comm: swapper/2 Not tainted 7.2.0")
        found = inspected(stored(tmp_path, dump_of(log=log, pids=(0, 3, 0, 0)).to_bytes()))
        assert [cpu.crashed for cpu in found.cpus] == [False, False, True, False]

    def test_one_that_is_incomplete(self, tmp_path):
        made = dump_of(status=9)
        data = bytearray(made.to_bytes())
        end = made.places["descriptors"] + 24 * len(made.pages)
        data[end - 48 : end] = bytes(48)
        found = inspected(stored(tmp_path, bytes(data)))
        assert (found.completeness, found.pages.missing, found.panic) == ("incomplete", 2, PANIC)

    @pytest.mark.parametrize("form", ["kdump", "flattened"])
    def test_one_that_is_cut_off(self, tmp_path, form):
        data = dump_of(codec="none").to_bytes()
        data = write_flattened([(0, data)]) if form == "flattened" else data
        found = inspected(stored(tmp_path, data[:-5000]))
        assert (found.completeness, found.pages.missing, found.panic) == ("truncated", 2, PANIC)

    def test_an_elf_that_makedumpfile_could_not_complete(self, tmp_path):
        assert inspected(stored(tmp_path, elf_of(flags=1))).completeness == "incomplete"

    @pytest.mark.parametrize("form", ["elf", "flattened", "device"])
    def test_a_vmcore_that_is_cut_off(self, tmp_path, form):
        data = elf_of()[: -(1 << 20) - 5000]
        if form == "flattened":
            data = write_flattened([(0, elf_of())])[: -(1 << 20) - 5016]
        if form == "device":
            path = stored(tmp_path, data)
            data = DeviceHead(manifest_of(path, form="elf"), b"").to_bytes() + data
        found = inspected(stored(tmp_path, data))
        assert (found.completeness, found.panic) == ("truncated", PANIC)
        assert (found.pages.memory, found.pages.missing) == (8192, 257)
        assert any("is cut off" in each or "1.0 MiB of memory" in each for each in found.remarks)

    def test_a_vmcore_that_is_cut_off_in_its_headers(self, tmp_path):
        for size in (100, 64 + 56, 700):
            with pytest.raises(FormatError):
                inspected(stored(tmp_path, elf_of()[:size]))

    def test_one_that_is_shorter_than_its_manifest_says(self, tmp_path):
        path = stored(tmp_path, dump_of().to_bytes())
        found = inspected(path, replace(manifest_of(path), size=1 << 40))
        assert found.completeness == "truncated"
        assert "its manifest says that it has 1,099,511,627,776 bytes" in found.remarks

    def test_json(self, tmp_path):
        path = stored(tmp_path, dump_of().to_bytes())
        record = json.loads(json.dumps(inspected(path, manifest_of(path)).to_json()))
        assert record["panic"] == PANIC
        assert record["task"] == {"cpu": 1, "pid": 7, "name": "sh"}
        assert record["cpus"][1]["registers"]["nip"] == "0x1020"
        assert record["pages"]["dropped"] == record["pages"]["memory"] - record["pages"]["kept"]
        assert record["dropped_by_class"]["free"] == 100


class TestTask:
    @pytest.mark.parametrize(
        ("line", "task"),
        [
            ("CPU: 1 PID: 113 Comm: python3.11 Kdump: loaded Not tainted 6.1.0 #1", Task(1, 113, "python3.11")),
            ("CPU: 0 UID: 0 PID: 1 Comm: init Tainted: G        W   7.2.13 #1", Task(0, 1, "init")),
            ("CPU: 12 PID: 99 Comm: a b: c Not tainted 6.12.1", Task(12, 99, "a b: c")),
        ],
    )
    def test_every_form_of_the_line(self, line, task):
        assert crashed_task(f"[    1.000000] {line}\n") == task

    def test_is_the_one_behind_the_panic_and_not_one_of_a_warning_before(self):
        lines = ["WARNING: CPU: 3 PID: 8 at mm/x.c:1", "CPU: 3 PID: 8 Comm: warn Not tainted 6", PANIC]
        lines += ["CPU: 1 PID: 7 Comm: sh Tainted: G", "CPU: 2 PID: 9 Comm: other Tainted: G"]
        assert crashed_task("\n".join(lines)) == Task(1, 7, "sh")

    def test_without_one_behind_the_panic_the_last_counts(self):
        assert crashed_task(f"CPU: 3 PID: 8 Comm: a Not tainted\nCPU: 4 PID: 9 Comm: b Not tainted\n{PANIC}") == Task(4, 9, "b")

    def test_nobody(self):
        assert crashed_task("") is None
        assert crashed_task(PANIC) is None


class TestVerify:
    def good(self, tmp_path, **options) -> Path:
        made = dump_of(**options)
        path = stored(tmp_path, made.to_bytes())
        manifest_of(path, kept=len(made.pages))
        return path

    def test_good(self, tmp_path):
        found = verify(self.good(tmp_path))
        assert (found.good, found.manifest, found.remarks) == (True, True, ())
        assert len(found.checks) == 2
        assert "against the digest in its manifest" in found.checks[0]

    def test_without_a_manifest_it_says_what_it_cannot_vouch_for(self, tmp_path):
        found = verify(stored(tmp_path, dump_of().to_bytes()))
        assert found.good
        assert "there is no vmcore.manifest.json beside it" in found.remarks[0]

    def test_every_flipped_bit_is_found(self, tmp_path):
        path = self.good(tmp_path)
        data = path.read_bytes()
        for at in range(0, len(data), len(data) // 60):
            path.write_bytes(data[:at] + bytes((data[at] ^ 0x10,)) + data[at + 1 :])
            found = verify(path)
            assert not found.good, at
            assert any("its digest differs" in each for each in found.problems.first)
        path.write_bytes(data)
        assert verify(path).good

    @pytest.mark.parametrize("codec", ["zlib", "lzo", "snappy", "zstd"])
    def test_every_flipped_bit_of_a_page_s_frame_header_is_found(self, tmp_path, codec, capsys):
        made = dump_of(codec=codec)
        path = stored(tmp_path, made.to_bytes())
        manifest_of(path, codec=codec, kept=len(made.pages))
        data = path.read_bytes()
        at = made.places[max(made.pages)]
        for bit in range(8 * 8):
            flipped = bytearray(data)
            flipped[at + bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            assert main(["verify", str(path)]) == 1, bit
            assert main(["inspect", str(path)]) == 0  # of its pages it reads those of the log
            out, err = capsys.readouterr()
            assert ("BAD" in out, err) == (True, "")

    def test_a_zlib_page_without_its_checksum_is_found(self, tmp_path):
        made = dump_of()
        data = bytearray(made.to_bytes())
        last = made.places["descriptors"] + 24 * (len(made.pages) - 1) + 8
        size = int.from_bytes(data[last : last + 4], "little")
        data[last : last + 4] = (size - 4).to_bytes(4, "little")
        found = verify(stored(tmp_path, bytes(data[:-4])))
        assert found.problems.first == (f"page frame {max(made.pages):#x}: zlib: it is cut off before its end",)

    def test_every_length_is_found(self, tmp_path):
        path = self.good(tmp_path)
        data = path.read_bytes()
        for size in (0, 100, 0x1000, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:size])
            assert not verify(path).good
        path.write_bytes(data + b"\0")
        assert "by its manifest" in verify(path).problems.first[0]

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("release", "5.10.0", "its kernel is 6.1.0-kdumps, by its manifest 5.10.0"),
            ("level", 1, "its dump level is 31, by its manifest 1"),
            ("page_size", 65536, "its page size is 4096, by its manifest 65536"),
        ],
    )
    def test_a_manifest_of_another_dump(self, tmp_path, field, value, message):
        path = self.good(tmp_path)
        manifest, _ = find_manifest(path)
        other = replace(manifest, contents=replace(manifest.contents, **{field: value}))
        path.with_name(manifest_name(path.name)).write_text(other.to_json())
        assert verify(path).problems.first == (message,)

    def test_a_number_of_pages_that_differs(self, tmp_path):
        path = stored(tmp_path, dump_of().to_bytes())
        manifest_of(path, kept=11, zero=6)
        assert "by its manifest 11" in verify(path).problems.first[0]

    def test_another_dump_s_manifest_by_name(self, tmp_path):
        path = self.good(tmp_path)
        manifest, _ = find_manifest(path)
        path.with_name(manifest_name(path.name)).write_text(manifest.renamed("other").to_json())
        assert verify(path).problems.first == ("its manifest is that of other",)

    def test_a_damaged_manifest(self, tmp_path):
        path = self.good(tmp_path)
        beside = path.with_name(manifest_name(path.name))
        beside.write_text(altered(beside.read_text(), bytes=5))
        found = verify(path)
        assert (found.good, found.manifest) == (False, False)
        assert "its sign-off does not match it" in found.problems.first[0]

    def test_a_damaged_manifest_and_no_dump_at_all(self, tmp_path):
        path = stored(tmp_path, b"nothing")
        path.with_name(manifest_name(path.name)).write_text("{")
        assert verify(path).problems.count == 2

    def test_what_claims_to_be_a_dump_is_a_bad_one_and_what_does_not_is_none(self, tmp_path):
        assert not verify(stored(tmp_path, b"KDUMP   " + bytes(5000))).good
        assert not verify(stored(tmp_path, b"\x7fELF")).good
        with pytest.raises(FormatError, match="neither an ELF vmcore nor"):
            verify(stored(tmp_path, b"#!/bin/sh"))
        with pytest.raises(UsageError, match="there is no"):
            verify(tmp_path / "nothing")

    def test_an_elf_vmcore(self, tmp_path):
        path = stored(tmp_path, elf_of())
        assert verify(path).good
        assert "plain ELF has nothing to check a page by" in verify(path).checks[0]
        assert not verify(stored(tmp_path, elf_of()[:-1])).good
        assert "it says of itself that it is incomplete" in verify(stored(tmp_path, elf_of(flags=1))).problems.first[0]

    @pytest.mark.parametrize("data", [b"kdump", b"elf"])
    def test_a_flattened_dump_that_is_cut_off(self, tmp_path, data):
        whole = elf_of() if data == b"elf" else dump_of().to_bytes()
        stream = write_flattened([(0, whole)])
        assert verify(stored(tmp_path, stream)).good
        found = verify(stored(tmp_path, stream[:-16]))
        assert found.problems.first == ("the flattened stream is cut off before its end",)

    def test_an_encrypted_dump_is_held_against_its_digest_alone(self, tmp_path):
        path = stored(tmp_path, b"age-encryption.org/v1\n" + bytes(9999), "vmcore.age")
        manifest = replace(manifest_of(path), encrypted_to="age1someone")
        path.with_name(manifest_name(path.name)).write_text(manifest.to_json())
        found = verify(path)
        assert found.good
        assert "encrypted to age1someone" in found.remarks[0]
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        assert not verify(path).good

    def test_tells_how_far_it_is(self, tmp_path):
        told = []
        verify(self.good(tmp_path), lambda what, done, total: told.append((what, done, total)))
        assert {what for what, _, _ in told} == {"digest", "pages"}
        assert all(done <= total for _, done, total in told)
        assert told[-1][1] == told[-1][2]


class TestOnADevice:
    """A device's image in a file: its head, then the dump, then what was there before."""

    @pytest.mark.parametrize("make", [dump_of, elf_of])
    def test_reads_like_a_file(self, tmp_path, make):
        data = make()
        data = data if isinstance(data, bytes) else data.to_bytes()
        path = stored(tmp_path, data)
        head = DeviceHead(manifest_of(path), b"the log").to_bytes()
        image = stored(tmp_path, head + data + b"\xa5" * 100_000, "sdb1")
        assert len(head) == DUMP_OFFSET
        found = inspected(image)
        assert (found.panic, found.size, found.completeness) == (PANIC, len(data), "whole")

    def test_an_incomplete_one_is_refused(self, tmp_path):
        image = stored(tmp_path, DeviceHead(None, b"the log").to_bytes() + bytes(5000), "sdb1")
        with pytest.raises(FormatError, match="the dump on it is incomplete"):
            open_dump(image)


class TestBacktrace:
    def trace(self, path: Path, vmlinux: Path) -> tuple[str, ...]:
        with open_dump(path) as dump:
            return backtrace(dump, inspect(dump).cpus[1].registers, vmlinux)

    def test_without_drgn(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "drgn", None)
        with pytest.raises(EnvironmentFault, match="needs drgn"):
            self.trace(stored(tmp_path, dump_of().to_bytes()), tmp_path / "vmlinux")

    def test_symbols_of_another_kernel(self, tmp_path):
        pytest.importorskip("drgn")
        path = stored(tmp_path, dump_of("x86_64").to_bytes())
        with pytest.raises(EnvironmentFault, match=r"drgn: .*\(is .* the vmlinux, with debug symbols"):
            self.trace(path, stored(tmp_path, b"no ELF", "vmlinux"))

    @pytest.mark.parametrize(("machine", "page_size"), MACHINES[:3])
    def test_follows_the_chain_of_frames(self, machine, page_size):
        """Three frames on a stack in the kernel's memory; the fourth is a user's."""
        kernel = kernel_of(machine, page_size)
        stack = kernel.linear + 0x1F0000
        for at, following, place in (
            (0, stack + 0x100, 0),
            (0x100, stack + 0x300, 0xC0FFEE10),
            (0x300, 0x7FFF0000, 0xC0FFEE20),
        ):
            kernel.memory.put(0x1F0000 + at, following)
            kernel.memory.put(0x1F0000 + at + 16, kernel.linear + place if place else 0)
        registers = {"nip": kernel.linear + 0x1234, "gpr1": stack}
        places = list(_back_chain(CrashedKernel(kernel.source()), registers))
        assert places == [kernel.linear + each for each in (0x1234, 0xC0FFEE10, 0xC0FFEE20)]

    def test_a_chain_that_goes_in_circles_or_nowhere_ends(self):
        kernel = kernel_of("ppc64le", 0x1000)
        stack = kernel.linear + 0x1F0000
        for following in (stack, stack - 0x100, 0, (1 << 64) - 8):
            kernel.memory.put(0x1F0000, following)
            places = list(_back_chain(CrashedKernel(kernel.source()), {"nip": stack, "gpr1": stack}))
            assert places == [stack]
        assert list(_back_chain(CrashedKernel(kernel.source()), {"nip": stack, "gpr1": 8})) == [stack]


class TestCommands:
    def test_inspect_prints_it(self, tmp_path, capsys):
        path = stored(tmp_path, dump_of().to_bytes())
        manifest_of(path)
        assert main(["inspect", str(path)]) == 0
        out = capsys.readouterr().out
        for part in (
            "kdump-compressed (zlib), dump level 31",
            "whole",
            "6.1.0-kdumps #1 SMP test",
            PANIC,
            "sh (pid 7) on CPU 1",
        ):
            assert part in out
        assert "left out, by its manifest: 100 free" in out
        assert "a CPU running pid 0, at 0x1020" in out
        assert "the CPU that crashed, running pid 7:" in out
        assert "    nip 0000000000001020" in out
        assert out.count("gpr31") == 1
        main(["inspect", "--registers", str(path)])
        assert capsys.readouterr().out.count("gpr31") == 2

    @pytest.mark.parametrize(
        ("count", "words"),
        [
            (1, "1 page is zeros because the source would not give it"),
            (2000, "2,000 pages are zeros because the source would not give them"),
        ],
    )
    def test_pages_that_could_not_be_read_are_in_the_dump_and_told(self, tmp_path, capsys, count, words):
        made = dump_of()
        path = stored(tmp_path, made.to_bytes())
        manifest_of(path, kept=len(made.pages), unreadable=count)
        assert main(["inspect", str(path)]) == 0
        out = capsys.readouterr().out
        assert f"  note      {words}\n" in out
        assert "left out, by its manifest: 100 free\n" in out
        assert main(["inspect", "--json", "-", str(path)]) == 0
        record = json.loads(capsys.readouterr().out)
        assert (record["unreadable"], "unreadable" in record["dropped_by_class"]) == (count, False)
        assert main(["verify", str(path)]) == 0
        assert f"  note: {words}\n" in capsys.readouterr().out

    @pytest.mark.parametrize("time", ["9999999999999", "9" * 23, "-1", "1e9"])
    def test_a_crash_time_that_is_none(self, tmp_path, capsys, time):
        made = dump_of()
        made.info["CRASHTIME"] = time
        path = stored(tmp_path, made.to_bytes())
        assert main(["inspect", str(path)]) == 0
        out = capsys.readouterr().out
        assert PANIC in out
        assert "  crashed " not in out

    def test_inspect_prints_the_log(self, tmp_path, capsys):
        path = stored(tmp_path, dump_of().to_bytes())
        assert main(["inspect", "--dmesg", str(path)]) == 0
        assert capsys.readouterr().out == TEXT

    def test_inspect_writes_json(self, tmp_path, capsys):
        path = stored(tmp_path, dump_of().to_bytes())
        assert main(["inspect", "--json", "-", str(path)]) == 0
        assert json.loads(capsys.readouterr().out)["panic"] == PANIC
        assert main(["inspect", "--json", str(tmp_path / "out.json"), str(path)]) == 0
        assert json.loads((tmp_path / "out.json").read_text())["completeness"] == "whole"
        assert PANIC in capsys.readouterr().out

    def test_inspect_says_by_its_status_that_a_dump_is_not_whole(self, tmp_path, capsys):
        path = stored(tmp_path, dump_of(codec="none").to_bytes()[:-5000])
        assert main(["inspect", str(path)]) == 1
        out = capsys.readouterr().out
        assert "truncated" in out
        assert "2 of them missing" in out

    def test_control_characters_of_a_dead_kernel_do_nothing(self, tmp_path, capsys):
        path = stored(tmp_path, dump_of(log=("\x1b[2J\x07hello", PANIC)).to_bytes())
        assert main(["inspect", str(path)]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "hello" in out

    def test_a_damaged_manifest_does_not_hide_the_dump(self, tmp_path, capsys):
        path = stored(tmp_path, dump_of().to_bytes())
        path.with_name(manifest_name(path.name)).write_text("{}")
        assert main(["inspect", str(path)]) == 0
        assert "no manifest of a dump" in capsys.readouterr().out

    @pytest.mark.parametrize("arguments", [["inspect"], ["verify"], ["convert", "--format", "flattened"]])
    def test_what_is_no_dump(self, tmp_path, capsys, arguments):
        path = stored(tmp_path, b"hello, world")
        more = ["-"] if arguments[0] == "convert" else []
        assert main([*arguments, str(path), *more]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert "neither an ELF vmcore nor" in lines[0]

    @pytest.mark.parametrize("arguments", [["inspect"], ["verify"], ["convert", "--format", "flattened"]])
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (".", ". is a directory, not a dump"),
            ("", ". is a directory, not a dump"),
            ("/", "/ is a directory, not a dump"),
            ("..", ".. is a directory, not a dump"),
            ("nothing", "there is no nothing"),
            ("nothing/within", "there is no nothing/within"),
            ("x" * 300, "File name too long"),
        ],
    )
    def test_a_name_that_is_no_file_s(self, tmp_path, capsys, monkeypatch, arguments, name, message):
        monkeypatch.chdir(tmp_path)
        assert main([*arguments, name, *(["out"] if arguments[0] == "convert" else [])]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert message in lines[0]

    def test_a_name_so_long_that_its_manifest_has_none(self, tmp_path, capsys):
        path = stored(tmp_path, dump_of().to_bytes(), "x" * 250)
        assert [main([command, str(path)]) for command in ("inspect", "verify")] == [0, 0]
        assert "cannot read" not in capsys.readouterr().out

    def test_a_python_without_numpy(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "numpy", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        for arguments in (["inspect", "vmcore"], ["verify", "vmcore"], ["convert", "vmcore", "out"]):
            assert main(arguments) == 3
            assert "this command needs numpy" in capsys.readouterr().err

    def test_options_that_exclude_each_other(self, tmp_path, capsys):
        path = stored(tmp_path, dump_of().to_bytes())
        assert main(["inspect", "--dmesg", "--json", "-", str(path)]) == 2
        assert "--dmesg prints the log" in capsys.readouterr().err

    def test_verify(self, tmp_path, capsys):
        made = dump_of()
        good, bad = stored(tmp_path, made.to_bytes(), "good"), stored(tmp_path, made.to_bytes()[:-9], "bad")
        manifest_of(good, kept=len(made.pages))
        assert main(["verify", str(good)]) == 0
        assert f"{good}: good" in capsys.readouterr().out
        assert main(["verify", str(good), str(bad)]) == 1
        out = capsys.readouterr().out
        assert f"{bad}: BAD, 1 problem\n" in out
        assert "  problem: page frame" in out
        assert main(["verify", "--json", "-", str(good), str(bad)]) == 1
        record = json.loads(capsys.readouterr().out)
        assert record["good"] is False
        assert [each["good"] for each in record["dumps"]] == [True, False]

    def test_verify_has_a_verdict_on_each_and_the_worst_status(self, tmp_path, capsys):
        made = dump_of()
        good, bad = stored(tmp_path, made.to_bytes(), "good"), stored(tmp_path, made.to_bytes()[:-9], "bad")
        no_dump = stored(tmp_path, b"hello, world", "other")
        names = [str(each) for each in (good, tmp_path / "nothing", bad, no_dump, good)]
        assert main(["verify", *names]) == 2
        out, err = capsys.readouterr()
        assert [line for line in out.splitlines() if not line.startswith("  ")] == [
            f"{good}: good",
            f"{bad}: BAD, 1 problem",
            f"{good}: good",
        ]
        assert [line.split(": ", 1)[1].split(" (")[0] for line in err.splitlines()] == [
            f"there is no {tmp_path / 'nothing'}",
            f"{no_dump}: neither an ELF vmcore nor a kdump-compressed or flattened dump at offset 0x0",
        ]
        assert main(["verify", "--json", "-", *names]) == 2
        record = json.loads(capsys.readouterr().out)
        assert (record["good"], [each["good"] for each in record["dumps"]]) == (False, [True, False, False, False, True])
        assert record["dumps"][1] == {"path": names[1], "good": False, "error": f"there is no {names[1]}"}

    @pytest.mark.parametrize(
        "arguments",
        [["inspect"], ["inspect", "--dmesg"], ["inspect", "--json", "-"], ["verify"], ["verify", "--json", "-"], ["convert"]],
        ids=" ".join,
    )
    def test_standard_output_that_is_full(self, tmp_path, arguments):
        path = stored(tmp_path, dump_of().to_bytes())
        command = [sys.executable, "-m", "crashkernel", *arguments, path]
        command += [tmp_path / "out"] if arguments == ["convert"] else []
        with open("/dev/full", "wb") as full:  # noqa: PTH123
            done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, timeout=60, text=True)
        assert (done.returncode, done.stderr) == (
            3,
            "crashkernel: cannot write to standard output: No space left on device\n",
        )

    def test_every_command_says_what_its_status_means(self, capsys):
        for command in ("inspect", "verify", "convert"):
            with pytest.raises(SystemExit):
                main([command, "--help"])
            assert "\nexit status: 0 " in capsys.readouterr().out

    def test_verify_cuts_a_long_list(self, tmp_path, capsys):
        made = dump_of()
        data = bytearray(made.to_bytes())
        start = made.places["descriptors"]
        data[start : start + 24 * 60] = bytes(24 * 60)
        assert main(["verify", str(stored(tmp_path, bytes(data)))]) == 1
        out = capsys.readouterr().out
        assert "BAD, 60 problems" in out
        assert out.count("  problem: ") == 50
        assert "  and 10 more" in out

    def test_nothing_is_left_open(self, tmp_path, capsys):
        path = stored(tmp_path, dump_of().to_bytes())
        before = os.listdir("/proc/self/fd")  # noqa: PTH208
        main(["inspect", str(path)])
        main(["verify", str(path)])
        assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
