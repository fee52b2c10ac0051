"""The big-endian build without building: makers and tools are stood in for."""

import importlib.util
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

import crashkernel
from crashkernel.cli import main
from crashkernel.drill import bigendian, debian, guest
from crashkernel.drill.debian import silent
from crashkernel.drill.request import DrillRequest, fetch
from crashkernel.errors import EnvironmentFault, UsageError

# Modules/Setup.bootstrap.in of CPython 3.11, and what the interpreter itself has (Modules/config.c.in).
CORE = """
    _abc _ast _codecs _collections _functools _imp _io _locale _operator _signal _sre _stat _string _symtable _thread _tokenize
    _tracemalloc _warnings _weakref atexit builtins errno faulthandler gc itertools marshal posix pwd sys time
"""
OPTIONAL = {"_bz2", "_lzma", "_typing"}  # shutil and typing do without them

HERE = Path(bigendian.__file__).parent


def is_extension(name: str) -> bool:
    """Whether a module of this Python is not made of Python."""
    if name in sys.builtin_module_names:
        return True
    spec = importlib.util.find_spec(name) if "." not in name and name != "__main__" else None
    return spec is not None and (spec.origin or "").endswith(".so")


def vmlinux() -> bytes:
    ident = b"\x7fELF\2\2\1" + bytes(9)
    return ident + struct.pack(">HHI", 2, 21, 1) + bytes(40) + b"Linux version 6.1.2-big-endian (x@y) #1"


def make_kernel(_job, _cache, result):
    (result / "vmlinux").write_bytes(vmlinux())


def make_userland(_job, _cache, result):
    (result / "bin").mkdir()
    (result / "bin" / "busybox").write_bytes(b"busybox")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(bigendian, "_MAKERS", {"kernel": make_kernel, "userland": make_userland})
    monkeypatch.setattr(bigendian, "_require_tools", lambda: None)
    return tmp_path / "cache"


@pytest.fixture
def job(tmp_path):
    return bigendian._Job(tmp_path, tmp_path / "log", debian.silent)


class TestWhatIsThere:
    def test_nothing_says_how_to_build_it(self, cache):
        for find in (bigendian.find_kernel, bigendian.find_userland):
            with pytest.raises(EnvironmentFault, match="not built on this machine") as caught:
                find(cache)
            assert "make big-endian" in caught.value.hint

    def test_the_kernel(self, cache):
        bigendian.build(cache)
        kernel = bigendian.find_kernel(cache)
        assert (kernel.spec, kernel.name, kernel.byteorder) == ("big-endian", "6.1.2-big-endian", "big")
        assert guest.resolve_modules(kernel, guest.CAPTURE_MODULES) == ()

    def test_the_userland(self, cache):
        bigendian.build(cache)
        assert bigendian.find_userland(cache).busybox.read_bytes() == b"busybox"


class TestBuild:
    def test_what_is_there_is_not_built_again(self, cache, monkeypatch):
        bigendian.build(cache)
        monkeypatch.setattr(bigendian, "_MAKERS", dict.fromkeys(("kernel", "userland")))  # not to be called
        monkeypatch.setattr(bigendian, "_ROOM", 1 << 62)
        bigendian.build(cache)

    def test_another_recipe_is(self, cache, monkeypatch):
        bigendian.build(cache)
        monkeypatch.setattr(bigendian, "_RECIPE", bigendian._RECIPE + 1)
        with pytest.raises(EnvironmentFault, match="not built"):
            bigendian.find_kernel(cache)

    def test_a_failure_leaves_nothing_but_the_log(self, cache, monkeypatch):
        def fail(_job, _cache, result):
            (result / "half").touch()
            raise EnvironmentFault("no")

        monkeypatch.setattr(bigendian, "_MAKERS", {"kernel": make_kernel, "userland": fail})
        with pytest.raises(EnvironmentFault, match="no"):
            bigendian.build(cache)
        names = {re.sub("-.*", "", path.name) for path in (cache / "big-endian").iterdir()}
        assert names == {"kernel", "kernel.log", "userland.log", "lock"}

    def test_what_a_killed_build_left_is_removed(self, cache):
        left = cache / "big-endian" / ".build-1"
        left.mkdir(parents=True)
        bigendian.build(cache)
        assert not left.exists()

    def test_room_is_asked_for_first(self, cache, monkeypatch):
        monkeypatch.setattr(bigendian, "_ROOM", 1 << 62)
        with pytest.raises(EnvironmentFault, match="of room") as caught:
            bigendian.build(cache)
        assert "CRASHKERNEL_CACHE" in caught.value.hint

    def test_missing_tools_are_named_with_their_packages(self, tmp_path, monkeypatch):
        for tool in set(bigendian._TOOLS) - {"flex", "xz"}:
            (tmp_path / tool).touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(EnvironmentFault, match="not installed: flex, xz") as caught:
            bigendian.build(tmp_path / "cache")
        assert caught.value.hint == "apt-get install flex xz-utils"


class TestTools:
    def test_what_a_tool_says_is_logged(self, job, tmp_path):
        job.run("talking", "sh", "-c", "echo one; echo two >&2")
        assert (tmp_path / "log").read_text().splitlines() == ["+ nice sh -c 'echo one; echo two >&2'", "one", "two"]

    @pytest.mark.parametrize(
        ("script", "blame"),
        [
            ("echo 'a.c:1: error: no'; echo 'make: *** [a.o] Error 1'; false", "a.c:1: error: no"),
            ("echo 'Segmentation fault'; false", "Segmentation fault"),
            ("false", "exit status 1"),
        ],
    )
    def test_a_failure_is_one_line_and_the_log(self, job, tmp_path, script, blame):
        with pytest.raises(EnvironmentFault, match=f"compiling failed: {re.escape(blame)}") as caught:
            job.run("compiling", "sh", "-c", script)
        assert str(tmp_path / "log") in caught.value.hint

    def test_one_that_hangs_is_ended_with_its_children(self, job, monkeypatch):
        monkeypatch.setattr(bigendian, "_DEADLINE", 0.2)
        start = time.monotonic()
        with pytest.raises(EnvironmentFault, match="hanging failed: not done after"):
            job.run("hanging", "sh", "-c", "sleep 60; true")
        assert time.monotonic() - start < 30

    def test_long_work_is_told_of(self, tmp_path, monkeypatch):
        monkeypatch.setattr(bigendian, "_TELL", 0.0)
        heard: list[str] = []
        bigendian._Job(tmp_path, tmp_path / "log", heard.append).run("compiling", "echo", "  CC init/main.o")
        assert heard == ["compiling", "compiling, 0 s: CC init/main.o"]

    def test_the_callers_environment_builds_nothing(self, job, tmp_path, monkeypatch):
        monkeypatch.setenv("ARCH", "x86")
        monkeypatch.setenv("MAKEFLAGS", "-j8")
        job.run("looking", "env", KBUILD_BUILD_USER="me")
        text = (tmp_path / "log").read_text()
        assert "KBUILD_BUILD_USER=me" in text
        assert "LC_ALL=C" in text
        assert "ARCH=" not in text
        assert "MAKEFLAGS=" not in text


class TestConfigurations:
    def test_an_option_that_was_dropped_is_named(self, tmp_path):
        lines = list(bigendian._options("kernel.config").values())
        (tmp_path / ".config").write_text("\n".join(lines))
        bigendian._require_options("kernel.config", tmp_path)
        (tmp_path / ".config").write_text("\n".join(line for line in lines if line != "CONFIG_KEXEC=y"))
        with pytest.raises(EnvironmentFault, match=r"cannot be configured with CONFIG_KEXEC=y \(see"):
            bigendian._require_options("kernel.config", tmp_path)

    def test_ours_replace_what_was_there(self):
        text = bigendian._with_options(
            "# top\n# CONFIG_DD is not set\n# CONFIG_DDD is not set\nCONFIG_TAIL=n\n", "busybox.config"
        )
        assert text.startswith("# top\n# CONFIG_DDD is not set\n")
        assert text.count("CONFIG_DD=y\n") == text.count("CONFIG_TAIL=y\n") == 1
        assert "CONFIG_DD is" not in text

    def test_busybox_has_every_applet(self):
        applets = {*guest.CRASH_APPLETS, *guest.CAPTURE_APPLETS} - {"sh"}
        assert {f"CONFIG_{applet.upper()}" for applet in applets} <= set(bigendian._options("busybox.config"))

    def test_python_has_every_extension_module_that_the_rescue_path_imports(self):
        """Seen without it: the guest's loader ends with ModuleNotFoundError."""
        rooms = "from crashkernel.cli import rescue; from crashkernel import loader"
        names = "import sys; print(*(name for name, it in sys.modules.items() if not hasattr(it, '__path__')))"
        command = [sys.executable, "-S", "-c", f"{rooms}; import ctypes, tempfile; {names}"]
        environment = {**os.environ, "PYTHONPATH": str(Path(crashkernel.__file__).parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
        imported = {name for name in done.stdout.split() if is_extension(name)}
        assert "_struct" in imported or "_struct" in sys.builtin_module_names  # else nothing was looked at
        have = {line.split()[0] for line in (HERE / "python.setup").read_text().splitlines() if " " in line and line[0] != "#"}
        assert imported - have - set(CORE.split()) - OPTIONAL == set()

    def test_each_set_of_files_has_a_maker_and_all_files_are_in_one(self):
        assert bigendian._FILES.keys() == bigendian._MAKERS.keys()
        used = {name for names in bigendian._FILES.values() for name in names}
        assert used == {path.name for path in HERE.iterdir() if path.suffix in {".config", ".setup"}}


def test_a_python_of_the_guests_release(monkeypatch, tmp_path):
    monkeypatch.setattr(bigendian, "GUEST_PYTHON", "python3.9")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match=r"python3\.9 is not installed"):
        bigendian._build_python()
    (tmp_path / "python3.9").touch(mode=0o755)
    assert bigendian._build_python() == str(tmp_path / "python3.9")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setattr(bigendian, "GUEST_PYTHON", version)
    assert bigendian._build_python() == sys.executable


class TestCommand:
    @pytest.fixture
    def kernel(self, cache, tmp_path, monkeypatch):
        """The built kernel, on a machine with QEMU."""
        monkeypatch.setenv("CRASHKERNEL_CACHE", str(cache))
        (tmp_path / "qemu-system-ppc64").touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        bigendian.build(cache)
        return bigendian.find_kernel(cache)

    def test_it_builds(self, kernel, cache, monkeypatch, capsys):
        monkeypatch.setattr(bigendian, "_RECIPE", 0)
        assert main(["big-endian"]) == 0
        assert bigendian.find_kernel(cache) != kernel
        assert capsys.readouterr().out.endswith("is ready: crashkernel drill --kernel big-endian\n")

    @pytest.mark.parametrize("by_path", [False, True])
    def test_each_kernel_gets_the_programs_it_can_run(self, kernel, cache, monkeypatch, by_path):
        little = guest.Userland(Path("busybox"), Path("python"))
        monkeypatch.setattr(guest, "fetch_userland", lambda **_options: little)
        monkeypatch.setattr(debian, "_kernel_from_debian", lambda spec, *_: kernel_in(cache, spec))
        spec = str(kernel.vmlinux) if by_path else "big-endian"
        assert fetch(DrillRequest(kernel=spec), silent).userland == bigendian.find_userland(cache)
        assert fetch(DrillRequest(), silent).userland == little
        with pytest.raises(UsageError, match="of different byte order"):
            fetch(DrillRequest(kernel=spec, capture_kernel="debian:bookworm"), silent)

    def test_there_is_no_peer_to_measure_it_against(self, kernel):
        with pytest.raises(UsageError, match="no kexec-tools"):
            fetch(DrillRequest(kernel="big-endian"), silent, kexec_tools=True)

    def test_a_drill_of_what_was_not_built(self, kernel, monkeypatch, capsys):
        monkeypatch.setattr(bigendian, "_RECIPE", 0)
        assert main(["drill", "--kernel", "big-endian"]) == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert "make big-endian" in line


def kernel_in(directory: Path, spec: str) -> debian.Kernel:
    """A little-endian kernel."""
    (directory / "vmlinux").write_bytes(b"\x7fELF\2\1\1" + bytes(13))
    return debian.Kernel(spec, "6.1", directory / "vmlinux", directory)
