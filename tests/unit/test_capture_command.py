"""`crashkernel capture` as a user meets it, on the vmcore of a small kernel that never ran."""

import io
import json
import os
import pty

import pytest

from crashkernel.capture import pagefilter
from crashkernel.cli import main
from crashkernel.cli.capture import _as_many_as_fit, _duration, _is_screen
from crashkernel.errors import EnvironmentFault
from crashkernel.target.manifest import Manifest
from crashkernel.vmcore.source import ElfVmcore
from support import deadkernels
from support.deadkernels import PANIC, TEXT, elf_of


@pytest.fixture(scope="module")
def vmcore(tmp_path_factory):
    path = tmp_path_factory.mktemp("vmcore") / "vmcore.elf"
    path.write_bytes(elf_of())
    return path


def run(capfd, *arguments) -> tuple[int, str, str]:
    status = main(["capture", *map(str, arguments)])
    out, err = capfd.readouterr()
    return status, out, err


def test_a_directory_gets_log_dump_and_manifest(vmcore, tmp_path, capfd):
    status, out, err = run(capfd, vmcore, "--to", tmp_path, "--json", "-")
    assert status == 0, err
    (crash,) = tmp_path.iterdir()
    assert sorted(each.name for each in crash.iterdir()) == ["vmcore", "vmcore-dmesg.txt", "vmcore.manifest.json"]
    assert (crash / "vmcore-dmesg.txt").read_text() == TEXT
    manifest = Manifest.from_json((crash / "vmcore.manifest.json").read_text())
    assert (manifest.contents.panic, manifest.contents.level, manifest.contents.codec) == (PANIC, 31, "zstd")
    assert manifest.size == (crash / "vmcore").stat().st_size
    record = json.loads(out)
    assert record["place"] == str(crash / "vmcore")
    assert record["pages"]["kept"] == manifest.contents.pages.kept
    assert PANIC in err
    assert "pages kept" in err
    assert f"saved: {crash / 'vmcore'}" in err
    assert main(["verify", str(crash / "vmcore")]) == 0


@pytest.mark.parametrize("codec", ["zstd", "lzo", "snappy", "zlib", "none"])
def test_every_codec_is_written_as_asked_and_good(vmcore, tmp_path, capfd, codec):
    status, _, err = run(capfd, vmcore, "--codec", codec, "--workers", "0", "--to", tmp_path / "dump")
    assert status == 0, err
    assert main(["inspect", str(tmp_path / "dump"), "--json", "-"]) == 0
    assert json.loads(capfd.readouterr().out)["codec"] == codec
    assert main(["verify", str(tmp_path / "dump")]) == 0


def test_plain_elf(vmcore, tmp_path, capfd):
    assert run(capfd, vmcore, "--format", "elf", "--to", tmp_path / "dump")[0] == 0
    assert (tmp_path / "dump").read_bytes()[:4] == b"\x7fELF"
    assert main(["verify", str(tmp_path / "dump")]) == 0
    status, _, err = run(capfd, vmcore, "--format", "elf", "--codec", "zstd", "--to", tmp_path / "other")
    assert (status, "leave --codec out" in err) == (2, True)


def test_the_first_target_that_takes_it_and_why_not_the_others(vmcore, tmp_path, capfd):
    status, _, err = run(capfd, vmcore, "--to", "/proc/nowhere/", "--to", tmp_path / "dump")
    assert status == 0
    assert "/proc/nowhere" in err
    assert f"saved: {tmp_path / 'dump'}" in err
    status, _, err = run(capfd, vmcore, "--to", "/proc/nowhere/")
    assert status == 3
    assert "NOT saved" in err


def test_json_that_cannot_be_written_does_not_make_a_saved_dump_a_failure(vmcore, tmp_path, capfd):
    status, _, err = run(capfd, vmcore, "--to", tmp_path / "dump", "--json", tmp_path / "no" / "where")
    assert status == 0
    assert "cannot write" in err
    status, _, err = run(capfd, vmcore, "--to", "-", "--json", "-")
    assert (status, "both" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["/nowhere/vmcore"], 2, "there is no /nowhere/vmcore"),
        ([], 2, "only a capture kernel has it"),
        (["/etc/passwd"], 2, "not an ELF file"),
    ],
)
def test_what_is_no_vmcore(tmp_path, capfd, arguments, status, message):
    found, _, err = run(capfd, *arguments, "--to", tmp_path / "dump")
    assert (found, message in err) == (status, True), err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["9999999999999", "9" * 30, "-1", "soon"])
def test_a_crash_time_that_makes_no_sense_costs_nothing(tmp_path, capfd, monkeypatch, value):
    monkeypatch.setattr(deadkernels, "kernel_of", with_info(CRASHTIME=value))
    (tmp_path / "vmcore").write_bytes(elf_of())
    assert run(capfd, tmp_path / "vmcore", "--to", tmp_path / "dump")[0] == 0
    assert json.loads((tmp_path / "dump.manifest.json").read_text())["crash"]["time"] is None
    assert main(["inspect", str(tmp_path / "dump")]) == 0


def test_a_release_that_is_longer_than_any_costs_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(deadkernels, "kernel_of", with_info(OSRELEASE="6" * 90))
    (tmp_path / "vmcore").write_bytes(elf_of())
    assert run(capfd, tmp_path / "vmcore", "--to", tmp_path / "dump")[0] == 0


def with_info(**lines):
    """A builder of kernels whose VMCOREINFO says something else."""
    build = deadkernels.kernel_of

    def changed(*arguments):
        kernel = build(*arguments)
        kernel.info |= lines
        return kernel

    return changed


def test_a_log_that_cannot_be_read_costs_only_the_log(vmcore, tmp_path, capfd, monkeypatch):
    def failing(self, paddr, size):
        raise EnvironmentFault("cannot read it: Input/output error")

    monkeypatch.setattr(ElfVmcore, "read", failing)
    status, _, err = run(capfd, vmcore, "--to", tmp_path / "dump", "--level", "0")
    assert status == 0, err
    assert "doubtful: its log cannot be read" in err
    assert not (tmp_path / "dump-dmesg.txt").exists()


def test_a_filter_that_fails_does_not_cost_the_log(vmcore, tmp_path, capfd, monkeypatch):
    class Broken:
        def __init__(self, *_):
            raise ZeroDivisionError("a bug")

    monkeypatch.setattr(pagefilter, "PageFilter", Broken)
    status, _, err = run(capfd, vmcore, "--to", tmp_path / "dump")
    assert status == 3
    assert "a bug of ours: ZeroDivisionError: a bug" in err
    assert (tmp_path / "dump-dmesg.txt").read_text() == TEXT
    assert not (tmp_path / "dump").exists()


def test_numpy_that_is_missing_is_named(vmcore, capfd, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    status, _, err = run(capfd, vmcore)
    assert (status, "python3-numpy" in err) == (3, True)


def test_a_terminal_is_a_screen_and_a_serial_console_is_none(monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream, os.fdopen(ours, "rb"):
        monkeypatch.setenv("TERM", "xterm")
        assert _is_screen(stream)
        for name in ("/dev/console", "/dev/hvc0", "/dev/ttyS1"):
            monkeypatch.setattr(os, "ttyname", lambda _, name=name: name)
            assert not _is_screen(stream)
        monkeypatch.undo()
        monkeypatch.setenv("TERM", "dumb")
        assert not _is_screen(stream)
    assert not _is_screen(io.StringIO())


def test_one_cpu_or_little_memory_mean_no_worker_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert _as_many_as_fit(0x1000) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4096)))
    assert 1 < _as_many_as_fit(0x10000) < 4096


@pytest.mark.parametrize(("seconds", "text"), [(0.31, "0.3 s"), (42.4, "42 s"), (100, "1:40"), (7325, "2:02:05")])
def test_durations(seconds, text):
    assert _duration(seconds) == text
