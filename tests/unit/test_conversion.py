"""A dump in another form is the same dump: every page, and all that its headers say."""

import io
import os
import resource
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from crashkernel.capture.codec import NAMES
from crashkernel.capture.selection import PageClass
from crashkernel.cli import main
from crashkernel.dump import conversion
from crashkernel.dump.conversion import STANDARD, convert
from crashkernel.dump.dumpfile import KdumpFile, open_dump, stored_pages
from crashkernel.dump.inspection import find_manifest, inspect, verify
from crashkernel.dump.structure import check_structure
from crashkernel.errors import EnvironmentFault, FormatError, UsageError, VerificationError
from crashkernel.formats import flattened
from crashkernel.vmcore.source import ElfVmcore
from support.capture import all_chunks
from support.deadkernels import PANIC, dump_of, elf_of, manifest_of
from support.kdumps import in_records, write_flattened

MACHINES = [("ppc64le", 0x1000), ("ppc64", 0x10000), ("x86_64", 0x1000)]
every_machine = pytest.mark.parametrize(("machine", "page_size"), MACHINES)


def contents(path) -> dict[int, bytes]:
    """Every page that is in a dump."""
    found = {}
    with open_dump(path) as dump:
        for chunk in all_chunks(stored_pages(dump)):
            pfns = np.flatnonzero(chunk.classes == PageClass.KEPT) + chunk.pfn
            into = np.empty(len(pfns) * dump.page_size, np.uint8)
            dump.read_pages(pfns, into)
            found.update(zip(pfns.tolist(), (page.tobytes() for page in into.reshape(len(pfns), -1)), strict=True))
    return found


def inspected(path):
    with open_dump(path) as dump:
        return inspect(dump)


class TestEveryForm:
    @every_machine
    @pytest.mark.parametrize("form", ["kdump", "flattened", "elf"])
    def test_keeps_every_page_and_what_the_headers_say(self, tmp_path, machine, page_size, form):
        made = dump_of(machine, page_size)
        (tmp_path / "in").write_bytes(made.to_bytes())
        convert(tmp_path / "in", tmp_path / "out", form, None if form == "elf" else "zstd")
        with open_dump(tmp_path / "in") as before, open_dump(tmp_path / "out") as after:
            assert (after.notes, after.memory) == (before.notes, before.memory)
            assert (after.machine, after.byteorder, after.page_size) == (before.machine, before.byteorder, before.page_size)
            assert inspect(after).panic == PANIC
            if form == "elf":
                assert isinstance(after, ElfVmcore)
            else:
                assert isinstance(before, KdumpFile)
                assert isinstance(after, KdumpFile)
                assert after.header.utsname == before.header.utsname
                assert (after.header.timestamp, after.header.cpus) == (before.header.timestamp, before.header.cpus)
                assert (after.sub_header.phys_base, after.level) == (before.sub_header.phys_base, before.level)
                assert not check_structure(after).count
                kept = after.statistics()
                assert set(kept.codecs) <= {"zstd", "none"}
                assert (kept.kept, kept.zero) == (before.statistics().kept, before.statistics().zero)
        assert contents(tmp_path / "out") == made.pages

    def test_plain_elf_of_x86_64_says_where_memory_was_mapped(self, tmp_path):
        (tmp_path / "in").write_bytes(dump_of("x86_64").to_bytes())
        convert(tmp_path / "in", tmp_path / "out", "elf")
        with ElfVmcore(tmp_path / "out") as after:
            assert after.linear_base == 0xFFFF_8880_0000_0000

    @pytest.mark.parametrize("codec", NAMES)
    @pytest.mark.parametrize("own", ["zlib", "lzo"])
    def test_from_codec_to_codec(self, tmp_path, own, codec):
        made = dump_of(codec=own)
        (tmp_path / "in").write_bytes(made.to_bytes())
        convert(tmp_path / "in", tmp_path / "out", "kdump", codec)
        assert contents(tmp_path / "out") == made.pages
        with open_dump(tmp_path / "out") as after:
            assert set(after.statistics().codecs) <= {codec, "none"}

    def test_there_and_back_is_the_same_file(self, tmp_path):
        data = dump_of().to_bytes()
        (tmp_path / "in").write_bytes(data)
        convert(tmp_path / "in", tmp_path / "flat", "flattened")
        convert(tmp_path / "flat", tmp_path / "back", "kdump")
        assert (tmp_path / "back").read_bytes() == data
        assert (tmp_path / "flat").read_bytes().startswith(flattened.HEADER)

    @every_machine
    def test_from_an_elf_vmcore(self, tmp_path, machine, page_size):
        (tmp_path / "in").write_bytes(elf_of(machine, page_size))
        convert(tmp_path / "in", tmp_path / "out", "kdump")
        with open_dump(tmp_path / "out") as after:
            found = inspect(after)
        assert (found.panic, found.codec, found.level, found.machine) == (PANIC, "zstd", 0, machine)
        assert found.pages.kept == (32 << 20) // page_size
        assert contents(tmp_path / "in") == contents(tmp_path / "out")

    def test_tells_how_far_it_is(self, tmp_path):
        (tmp_path / "in").write_bytes(dump_of().to_bytes())
        told = []
        convert(
            tmp_path / "in", tmp_path / "out", "kdump", "zstd", tell=lambda what, done, total: told.append((what, done, total))
        )
        assert told[-1][0] == "pages"
        assert told[-1][1] == told[-1][2] > 0


class TestManifest:
    def test_the_new_dump_gets_one_that_is_true(self, tmp_path):
        made = dump_of()
        (tmp_path / "in").write_bytes(made.to_bytes())
        manifest_of(tmp_path / "in", kept=len(made.pages))
        result = convert(tmp_path / "in", tmp_path / "out", "flattened", "lzo")
        manifest, _ = find_manifest(tmp_path / "out")
        assert result.manifest == manifest
        assert (manifest.file, manifest.contents.format, manifest.contents.codec) == ("out", "flattened", "lzo")
        assert manifest.contents.pages.free == 100
        assert verify(tmp_path / "out").good

    @pytest.mark.parametrize("level", [0, 17, 31])
    @pytest.mark.parametrize("form", ["kdump", "flattened", "elf"])
    def test_that_of_a_plain_elf_dump_counts_what_stood_between_its_pages(self, tmp_path, level, form):
        """What a capture writes: of 100 free pages 8 were in small gaps, so they are in the file."""
        (tmp_path / "in").write_bytes(elf_of())
        manifest = manifest_of(tmp_path / "in", form="elf", codec="none", kept=8184, free=100)
        manifest = replace(manifest, contents=replace(manifest.contents, level=level))
        (tmp_path / "in.manifest.json").write_text(manifest.to_json())
        convert(tmp_path / "in", tmp_path / "out", form, None if form == "elf" else "zstd")
        found = verify(tmp_path / "out")
        assert (found.good, found.manifest, found.problems.first) == (True, True, ())
        made, _ = find_manifest(tmp_path / "out")
        with open_dump(tmp_path / "out") as dump:
            pages = inspect(dump).pages
            assert (made.contents.level, made.contents.pages.kept, made.contents.pages.zero) == (level, 8192, pages.zero)
            assert bool(pages.zero) == (form != "elf" and bool(level & 1))
        assert made.contents.pages.free == 100

    def test_without_one_there_is_none(self, tmp_path):
        (tmp_path / "in").write_bytes(dump_of().to_bytes())
        assert convert(tmp_path / "in", tmp_path / "out", "flattened").manifest is None
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]

    def test_damage_is_never_signed_off_anew(self, tmp_path):
        made = dump_of(codec="none")
        data = bytearray(made.to_bytes())
        (tmp_path / "in").write_bytes(data)
        manifest_of(tmp_path / "in", kept=len(made.pages))
        data[-1] ^= 1  # in a page's data: no structure can tell
        (tmp_path / "in").write_bytes(data)
        with pytest.raises(VerificationError, match="its digest differs"):
            convert(tmp_path / "in", tmp_path / "out", "kdump", "zstd")
        assert not (tmp_path / "out").exists()

    def test_a_manifest_that_is_damaged(self, tmp_path):
        (tmp_path / "in").write_bytes(dump_of().to_bytes())
        (tmp_path / "in.manifest.json").write_text("{}")
        with pytest.raises(VerificationError, match="no manifest of a dump"):
            convert(tmp_path / "in", tmp_path / "out", "flattened")


class TestWholeOrNotAtAll:
    def nothing_but(self, tmp_path, *names):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)

    @pytest.mark.parametrize("form", ["kdump", "flattened", "elf"])
    def test_a_page_that_is_damaged(self, tmp_path, form):
        made = dump_of()
        data = bytearray(made.to_bytes())
        pfn = max(pfn for pfn, page in made.pages.items() if any(page))
        data[made.places[pfn]] ^= 0xFF
        (tmp_path / "in").write_bytes(data)
        with pytest.raises(VerificationError, match="a page of it cannot be read"):
            convert(tmp_path / "in", tmp_path / "out", form, None if form == "elf" else "zstd")
        self.nothing_but(tmp_path, "in")

    @pytest.mark.parametrize("codec", [None, "zstd"])
    @pytest.mark.parametrize("how", ["flag", "cut", "stream", "killed", "elf", "elf cut"])
    def test_an_incomplete_dump(self, tmp_path, how, codec):
        made = dump_of(status=9 if how == "flag" else None)
        data = made.to_bytes()
        if how == "cut":
            data = data[:-1]
        if how == "stream":
            data = write_flattened([(0, data)])[:-16]
        if how == "killed":  # all pages' data are there, but descriptors that were never written
            end = made.places["descriptors"] + 24 * len(made.pages)
            data = data[: end - 48] + bytes(48) + data[end:]
        if how.startswith("elf"):
            data = elf_of(flags=1) if how == "elf" else elf_of()[:-1]
        (tmp_path / "in").write_bytes(data)
        assert inspected(tmp_path / "in").completeness != "whole"
        assert not verify(tmp_path / "in").good
        with pytest.raises(VerificationError, match="is incomplete"):
            convert(tmp_path / "in", tmp_path / "out", "flattened", codec)
        self.nothing_but(tmp_path, "in")

    @pytest.mark.parametrize("form", ["kdump", "flattened"])
    @pytest.mark.parametrize("how", ["sparse", "stream", "stdin", "a page"])
    def test_a_byte_that_is_put_far_behind_everything_fills_no_disk(self, tmp_path, monkeypatch, form, how):
        made = dump_of()
        data = bytearray(made.to_bytes())
        source = tmp_path / "in"
        if how == "a page":  # is where its descriptor says
            row = made.places["descriptors"]
            data[row : row + 12] = (1 << 40).to_bytes(8, "little") + (1).to_bytes(4, "little")
        stream = write_flattened([(0, bytes(data)), (1 << 40, b"x")])
        source.write_bytes(data if how == "sparse" else stream)
        if how == "sparse":
            os.truncate(source, 1 << 40)
        if how == "stdin":
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stream)))
            source = STANDARD
        with pytest.raises(FormatError, match=r"it ends at 0x1000000000\d, far behind|about a file of 1,099,511,627,777"):
            convert(source, tmp_path / "out", form)
        self.nothing_but(tmp_path, "in")

    @pytest.mark.parametrize("form", ["kdump", "flattened"])
    @pytest.mark.parametrize("codec", [None, "zstd"])
    def test_a_disk_that_is_full(self, tmp_path, form, codec):
        (tmp_path / "in").write_bytes(dump_of().to_bytes())
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(EnvironmentFault, match=r"cannot write .*out: File too large"):
                convert(tmp_path / "in", tmp_path / "out", form, codec)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.nothing_but(tmp_path, "in")

    def test_interrupted(self, tmp_path):
        (tmp_path / "in").write_bytes(dump_of().to_bytes())

        def interrupt(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "in", tmp_path / "out", "kdump", "zstd", tell=interrupt)
        self.nothing_but(tmp_path, "in")

    def test_nothing_that_exists_is_overwritten(self, tmp_path):
        path = tmp_path / "in"
        path.write_bytes(dump_of().to_bytes())
        (tmp_path / "link").symlink_to(path)
        (tmp_path / "dangling").symlink_to("nowhere")
        (tmp_path / "other").write_bytes(b"precious")
        for output, message in (
            (path, "is the dump to be converted"),
            (tmp_path / "link", "is the dump to be converted"),
            (tmp_path / "other", "is there already"),
            (tmp_path / "dangling", "is there already"),
            (tmp_path, "is there already"),
        ):
            with pytest.raises(UsageError, match=message):
                convert(path, output, "kdump", "zstd")
        assert (tmp_path / "other").read_bytes() == b"precious"

    def test_a_name_that_is_taken_meanwhile(self, tmp_path, monkeypatch):
        (tmp_path / "in").write_bytes(dump_of().to_bytes())
        write = conversion._rewrite

        def take_the_name(*arguments):
            write(*arguments)
            (tmp_path / "out").write_bytes(b"precious")

        monkeypatch.setattr(conversion, "_rewrite", take_the_name)
        with pytest.raises(EnvironmentFault, match="File exists"):
            convert(tmp_path / "in", tmp_path / "out", "kdump", "zstd")
        self.nothing_but(tmp_path, "in", "out")
        assert (tmp_path / "out").read_bytes() == b"precious"


class TestRequests:
    @pytest.mark.parametrize(
        ("output", "form", "codec", "message"),
        [
            (STANDARD, "kdump", None, "not to standard output"),
            ("out", "elf", "zstd", "is not compressed with zstd"),
            ("no/such/directory", "kdump", None, "cannot write .*No such file"),
        ],
    )
    def test_that_make_no_sense(self, tmp_path, output, form, codec, message):
        (tmp_path / "in").write_bytes(dump_of().to_bytes())
        with pytest.raises((UsageError, EnvironmentFault), match=message):
            convert(tmp_path / "in", STANDARD if output == STANDARD else tmp_path / output, form, codec)

    def test_a_dump_that_is_not_there(self, tmp_path):
        with pytest.raises(UsageError, match="there is no"):
            convert(tmp_path / "in", tmp_path / "out", "kdump")

    def test_what_is_no_dump(self, tmp_path):
        (tmp_path / "in").write_bytes(b"hello")
        with pytest.raises(FormatError):
            convert(tmp_path / "in", tmp_path / "out", "kdump")

    def test_a_codec_that_is_not_installed(self, tmp_path, monkeypatch):
        (tmp_path / "in").write_bytes(dump_of().to_bytes())
        monkeypatch.setattr(conversion, "missing", lambda codec: "no library for lzo" if codec.name == "lzo" else "")
        with pytest.raises(EnvironmentFault, match="no library for lzo"):
            convert(tmp_path / "in", tmp_path / "out", "kdump", "lzo")

    @pytest.mark.parametrize("codec", [None, "lzo"])
    def test_what_only_moves_needs_no_codec(self, tmp_path, monkeypatch, codec):
        data = dump_of(codec="lzo").to_bytes()
        (tmp_path / "in").write_bytes(data)
        monkeypatch.setattr(conversion, "missing", lambda codec: f"no library for {codec.name}")
        convert(tmp_path / "in", tmp_path / "flat", "flattened", codec)
        convert(tmp_path / "flat", tmp_path / "out", "kdump", codec)
        assert (tmp_path / "out").read_bytes() == data
        with pytest.raises(EnvironmentFault, match="no library for lzo"):
            convert(tmp_path / "in", tmp_path / "elf", "elf")


class TestStandardStreams:
    @pytest.mark.parametrize(("form", "codec"), [("kdump", None), ("kdump", "zstd"), ("elf", None), ("flattened", "lzo")])
    def test_what_comes_in(self, tmp_path, monkeypatch, form, codec):
        made = dump_of()
        stream = write_flattened(in_records(made.to_bytes(), 5000))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stream)))
        convert(STANDARD, tmp_path / "out", form, codec)
        assert contents(tmp_path / "out") == made.pages
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_stream_that_breaks_off(self, tmp_path, monkeypatch):
        stream = write_flattened(in_records(dump_of().to_bytes(), 5000))[:-20]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stream)))
        with pytest.raises(FormatError, match="cut off before its end"):
            convert(STANDARD, tmp_path / "out", "kdump")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ("no dump", "^standard input: neither an ELF vmcore nor"),
            ("incomplete", "^standard input is incomplete"),
            ("damaged", "^standard input: a page of it cannot be read"),
        ],
    )
    def test_what_comes_in_and_is_no_whole_dump_is_called_by_its_name(self, tmp_path, monkeypatch, how, message):
        made = dump_of(status=9 if how == "incomplete" else None)
        data = bytearray(made.to_bytes())
        if how == "damaged":
            data[made.places[max(made.pages)]] ^= 0xFF
        stream = b"hello, world" if how == "no dump" else write_flattened(in_records(bytes(data), 5000))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stream)))
        with pytest.raises((FormatError, VerificationError), match=message):
            convert(STANDARD, tmp_path / "out", "flattened", "zstd")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("form", ["flattened", "elf"])
    @pytest.mark.parametrize("to", ["pipe", "file", "appended"])
    def test_what_goes_out(self, tmp_path, form, to):
        made = dump_of()
        (tmp_path / "in").write_bytes(made.to_bytes())
        command = [sys.executable, "-m", "crashkernel", "convert", tmp_path / "in", "-", "--format", form]
        command += ["--codec", "zstd"] if form == "flattened" else []
        if to == "pipe":
            data = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
            (tmp_path / "out").write_bytes(data)
        else:
            with (tmp_path / "out").open("ab" if to == "appended" else "wb") as file:
                subprocess.run(command, check=True, stdout=file, timeout=60)
        assert contents(tmp_path / "out") == made.pages

    @pytest.mark.parametrize("form", ["flattened", "elf"])
    @pytest.mark.parametrize("which", [min, max])
    def test_a_page_that_is_damaged_never_goes_out_as_part_of_a_whole_dump(self, tmp_path, form, which):
        made = dump_of()
        data = bytearray(made.to_bytes())
        data[made.places[which(pfn for pfn, page in made.pages.items() if any(page))]] ^= 0xFF
        (tmp_path / "in").write_bytes(data)
        command = [sys.executable, "-m", "crashkernel", "convert", tmp_path / "in", "-", "--format", form]
        command += ["--codec", "zstd"] if form == "flattened" else []
        done = subprocess.run(command, check=False, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
        assert b"a page of it cannot be read" in done.stderr
        (tmp_path / "out").write_bytes(done.stdout)
        try:
            assert inspected(tmp_path / "out").completeness == "truncated"
        except FormatError:
            assert len(done.stdout) < 1 << 16

    def test_standard_output_that_is_full(self, tmp_path):
        (tmp_path / "in").write_bytes(dump_of().to_bytes())
        command = [sys.executable, "-m", "crashkernel", "convert", tmp_path / "in", "-", "--format", "flattened"]
        with open("/dev/full", "wb") as full:  # noqa: PTH123
            done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, timeout=60, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (3, 1)
        assert "cannot write to standard output: No space left on device" in done.stderr

    def test_a_reader_that_has_gone(self, tmp_path):
        (tmp_path / "in").write_bytes(elf_of())
        command = [sys.executable, "-m", "crashkernel", "convert", tmp_path / "in", "-", "--format", "flattened"]
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command, check=False, stdout=writer, stderr=subprocess.PIPE, timeout=60)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b"")


def test_the_command(tmp_path, capsys):
    made = dump_of()
    (tmp_path / "in").write_bytes(made.to_bytes())
    manifest_of(tmp_path / "in", kept=len(made.pages))
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--codec", "lzo"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'out'}: ")
    assert "with a manifest" in out
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out2"), "--json", "-"]) == 0
    assert f'"size": {(tmp_path / "out2").stat().st_size}' in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "in"), "-", "--format", "elf", "--json", "-"]) == 2
