"""A big-endian kernel and the guests' user programs for it, built here from Debian's sources.

No release of Debian has packages for big-endian ppc64, so what `guest` and `debian` fetch for little-endian drills is built
for big-endian ones: by ``make big-endian``, once, with Debian's cross compiler. The parts:

kernel
    Debian's kernel source (linux-source-6.1, with Debian's patches), configured by ``kernel.config`` beside this file.
userland
    busybox, static (``busybox.config``), and CPython 3.11 (``python.setup``) with zlib and libffi linked in, on the cross
    compiler's own C library. All four are the upstream archives in Debian's source packages, unpatched.

Both have the ELFv1 ABI: the kernel's default for this byte order, and the one that Debian's cross C library has.

Layout of the cache; KEY names the recipe, so that a changed one is built anew::

    <cache>/big-endian/kernel-KEY/vmlinux
    <cache>/big-endian/userland-KEY/     a root file system: bin/busybox, usr/bin/python3.11, …
    <cache>/big-endian/PART.log          what the tools said, of the last build
    <cache>/big-endian/lock              held while any of these changes

A part is built in a directory beside its own and appears by rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from crashkernel.drill.debian import Archive, Kernel, Progress, Sources, default_cache, locked, read_release, silent
from crashkernel.drill.guest import GUEST_PYTHON, USERLAND_SUITE, Userland
from crashkernel.errors import EnvironmentFault
from crashkernel.memory import format_size

SPEC = "big-endian"
"""What `--kernel` calls it."""

HINT = "`make big-endian` builds it, in five to fifteen minutes"

KERNEL_SOURCE = "linux-source-6.1"

_RECIPE = 1  # to be raised when the code below would build something else of the same files
_TRIPLET = "powerpc64-linux-gnu"
_CROSS = f"{_TRIPLET}-"

# Programs that the build runs, and the packages that have them: the Makefile installs these.
_TOOLS = {
    f"{_CROSS}gcc": "gcc-powerpc64-linux-gnu libc6-dev-ppc64-cross",
    "gcc": "gcc libc6-dev",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "tar": "tar",
    "xz": "xz-utils",
    "bzip2": "bzip2",
}
_CROSS_LIBC = "libc.a"  # the compiler does without it until it links
_ROOM = 3 << 30  # bytes; the kernel's source and objects were seen to take less than 2 GiB
_DEADLINE = 2 * 3600.0  # seconds for one tool; the longest was seen to take three minutes on two idle cores
_ANSWER = 60.0  # seconds
_TELL = 10.0  # seconds between two words about a tool that is at work

_CACHE = "big-endian"
_LIBRARIES = f"lib/{_TRIPLET}"  # where that C library's dynamic linker looks first
_LINKER = "ld64.so.1"  # of the ELFv1 ABI


# ------------------------------------------------------------------------------------------------------- what is there


def find_kernel(cache: Path | None = None) -> Kernel:
    """The big-endian kernel, as K1 or K2.

    :raise EnvironmentFault: it was not built here.
    """
    vmlinux = _require("kernel", cache) / "vmlinux"
    release = read_release(vmlinux)
    return Kernel(SPEC, release, vmlinux, vmlinux.parent / "modules" / release)  # it has none, and no such directory


def find_userland(cache: Path | None = None) -> Userland:
    """The guests' userland for big-endian kernels.

    :raise EnvironmentFault: it was not built here.
    """
    tree = _require("userland", cache)
    return Userland(busybox=tree / "bin" / "busybox", python=tree)


def _require(part: str, cache: Path | None) -> Path:
    path = _target(part, cache)
    if not path.exists():
        raise EnvironmentFault(f"the big-endian {part} was not built on this machine", hint=HINT)
    return path


def _target(part: str, cache: Path | None) -> Path:
    key = hashlib.sha256(f"{_RECIPE}\n".encode())
    for name in _FILES[part]:
        key.update(_data(name).encode())
    return (cache or default_cache()) / _CACHE / f"{part}-{key.hexdigest()[:12]}"


_FILES = {"kernel": ("kernel.config",), "userland": ("busybox.config", "python.setup")}


def _data(name: str) -> str:
    return (Path(__file__).parent / name).read_text()


# ------------------------------------------------------------------------------------------------------------ building


def build(cache: Path | None = None, progress: Progress = silent) -> None:
    """Build the parts that are not there yet.

    :raise EnvironmentFault: a tool, a package or room is missing, or a tool failed.
    """
    root = (cache or default_cache()) / _CACHE
    with locked(root / "lock", progress):
        for left in root.glob(".build-*"):  # by a build that was killed
            shutil.rmtree(left, ignore_errors=True)
        for part, make in _MAKERS.items():
            target = _target(part, cache)
            if target.exists():
                continue
            _require_tools()
            _require_room(root)
            with tempfile.TemporaryDirectory(prefix=".build-", dir=root) as directory:
                job = _Job(Path(directory), root / f"{part}.log", progress)
                result = job.directory / "result"
                result.mkdir()
                make(job, cache or default_cache(), result)
                result.rename(target)


def _require_tools() -> None:
    missing = [program for program in _TOOLS if shutil.which(program) is None]
    if missing:
        raise EnvironmentFault(
            f"not installed: {', '.join(missing)}",
            hint=f"apt-get install {' '.join(_TOOLS[program] for program in missing)}",
        )
    if _ask(f"{_CROSS}gcc", f"-print-file-name={_CROSS_LIBC}") == _CROSS_LIBC:  # it answers with a path if it has it
        raise EnvironmentFault(f"{_CROSS}gcc has no C library", hint="apt-get install libc6-dev-ppc64-cross")


def _require_room(root: Path) -> None:
    free = shutil.disk_usage(root).free
    if free < _ROOM:
        raise EnvironmentFault(
            f"{root} has {format_size(free)} of room, building takes {format_size(_ROOM)}",
            hint="CRASHKERNEL_CACHE names another place",
        )


class _Job:
    """One part being built: its scratch directory, its log, and how tools are run in it."""

    def __init__(self, directory: Path, log: Path, progress: Progress) -> None:
        self.directory = directory
        self._log = log
        self.progress = progress
        log.write_text("")

    def run(self, what: str, *argv: str | Path, cwd: Path | None = None, **environment: str) -> None:
        """Run a tool, at low priority: it may take minutes, and nobody waits for it.

        :raise EnvironmentFault: it failed, or did not end.
        """
        command = ["nice", *(str(argument) for argument in argv)]
        # Nothing else of the caller's: ARCH, CFLAGS, MAKEFLAGS and many more would change what is built.
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        self.progress(what)
        start = time.monotonic()
        with (
            self._log.open("a") as log,
            subprocess.Popen(
                command, cwd=cwd or self.directory, env={**inherited, "LC_ALL": "C", **environment},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", start_new_session=True,
            ) as process,
        ):  # fmt: skip
            log.write(f"+ {shlex.join(command)}\n")
            timer = threading.Timer(_DEADLINE, _kill, (process,))
            timer.start()
            try:
                blame = self._follow(what, process, log.write)
                status = process.wait()
            except BaseException:
                _kill(process)
                raise
            finally:
                timer.cancel()
        if status:
            late = time.monotonic() - start >= _DEADLINE
            reason = f"not done after {_DEADLINE:.0f} s" if late else blame or f"exit status {status}"
            raise EnvironmentFault(f"{what} failed: {reason}", hint=f"all that was said is in {self._log}")

    def _follow(self, what: str, process: subprocess.Popen[str], write: Callable[[str], object]) -> str:
        """Log what a tool says and tell how it gets on; the line to blame if it fails."""
        assert process.stdout is not None
        start = told = time.monotonic()
        error = last = ""
        for line in process.stdout:
            write(line)
            last = line.strip(" \t\n#") or last
            if not error and "error: " in line:
                error = last
            now = time.monotonic()
            if now - told >= _TELL:
                told = now
                self.progress(f"{what}, {now - start:.0f} s: {last[:60]}")
        return error or last

    def unpack(self, tarball: Path) -> Path:
        """The directory that holds what is in an archive's only directory."""
        target = self.directory / tarball.name.partition("_")[0]
        target.mkdir()
        self.run(f"unpacking {tarball.name}", "tar", "-x", "-f", tarball, "--strip-components=1", "-C", target)
        return target


def _kill(process: subprocess.Popen[str]) -> None:
    """End a tool and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _jobs() -> str:
    return f"-j{len(os.sched_getaffinity(0))}"


# ---------------------------------------------------------------------------------------------------------- the kernel


def _make_kernel(job: _Job, cache: Path, result: Path) -> None:
    deb = Archive(cache, USERLAND_SUITE, job.progress).fetch(KERNEL_SOURCE)
    job.run(f"unpacking {deb.name}", "dpkg-deb", "-x", deb, job.directory)
    tarball = job.directory / "usr" / "src" / f"{KERNEL_SOURCE}.tar.xz"
    source = job.unpack(tarball)
    wanted = job.directory / "kernel.config"
    wanted.write_text(_data("kernel.config"))
    make = ("make", "ARCH=powerpc", f"CROSS_COMPILE={_CROSS}", _jobs())
    job.run("configuring the kernel", *make, "allnoconfig", cwd=source, KCONFIG_ALLCONFIG=str(wanted))
    _require_options("kernel.config", source)
    # Kbuild puts who built it, where and when into the banner.
    banner = {"KBUILD_BUILD_USER": "crashkernel", "KBUILD_BUILD_HOST": "big-endian"}
    job.run("compiling the kernel", *make, "vmlinux", cwd=source, **banner)
    (source / "vmlinux").rename(result / "vmlinux")
    (source / ".config").rename(result / "config")


def _options(name: str) -> dict[str, str]:
    """The lines of a configuration by the option each sets."""
    lines = (line for line in _data(name).splitlines() if line.startswith("CONFIG_"))
    return {line.partition("=")[0]: line for line in lines}


def _with_options(text: str, name: str) -> str:
    """The configuration `text` with our lines in the place of its own."""
    options = _options(name)
    mentioned = ((re.search(r"CONFIG_\w+", line), line) for line in text.splitlines())
    others = (line for option, line in mentioned if option is None or option.group() not in options)
    return "\n".join([*others, *options.values(), ""])


def _require_options(name: str, source: Path) -> None:
    """Kconfig drops silently what it does not know, or what depends on something that is not set.

    :raise EnvironmentFault: it did: the source is not one the configuration was written for.
    """
    have = set((source / ".config").read_text().splitlines())
    dropped = [line for line in _options(name).values() if line not in have]
    if dropped:
        raise EnvironmentFault(f"this source cannot be configured with {', '.join(dropped)}", hint=f"see {name}")


# -------------------------------------------------------------------------------------------------------- the userland


def _make_userland(job: _Job, cache: Path, result: Path) -> None:
    sources = Sources(cache, USERLAND_SUITE, job.progress)
    _make_busybox(job, job.unpack(sources.upstream("busybox")), result)
    prefix = job.directory / "prefix"
    _make_zlib(job, job.unpack(sources.upstream("zlib")), prefix)
    _make_libffi(job, job.unpack(sources.upstream("libffi")), prefix)
    _make_python(job, job.unpack(sources.upstream(GUEST_PYTHON)), prefix, result)
    _copy_libraries(result)


def _make_busybox(job: _Job, source: Path, result: Path) -> None:
    make = ("make", f"CROSS_COMPILE={_CROSS}", _jobs())
    job.run("configuring busybox", *make, "allnoconfig", cwd=source)
    # Its Kconfig reads KCONFIG_ALLCONFIG and then forgets it. Asked again, it has no question that is not answered here.
    config = source / ".config"
    config.write_text(_with_options(config.read_text(), "busybox.config"))
    job.run("configuring busybox", *make, "oldconfig", cwd=source)
    _require_options("busybox.config", source)
    job.run("compiling busybox", *make, "busybox", cwd=source)
    _install(source / "busybox", result / "bin" / "busybox")


def _make_zlib(job: _Job, source: Path, prefix: Path) -> None:
    # its configure is not autoconf's
    options = ("--static", f"--prefix={prefix}")
    job.run("configuring zlib", "./configure", *options, cwd=source, CHOST=_TRIPLET, CFLAGS="-O2 -fPIC")
    job.run("compiling zlib", "make", _jobs(), "install", cwd=source)


def _make_libffi(job: _Job, source: Path, prefix: Path) -> None:
    job.run(
        "configuring libffi", "./configure", f"--host={_TRIPLET}", f"--prefix={prefix}",
        "--disable-shared", "--with-pic", "--disable-docs", "--disable-multi-os-directory", cwd=source,
    )  # fmt: skip
    job.run("compiling libffi", "make", _jobs(), "install", cwd=source)


def _make_python(job: _Job, source: Path, prefix: Path, result: Path) -> None:
    setup = source / "Modules" / "Setup.local"
    setup.write_text(_data("python.setup").replace("@PREFIX@", str(prefix)))
    job.run(
        "configuring Python", "./configure", f"--host={_TRIPLET}", f"--build={_ask('gcc', '-dumpmachine')}", "--prefix=/usr",
        f"--with-build-python={_build_python()}", "--without-ensurepip", "--disable-ipv6", cwd=source,
        # It cannot ask about files of a machine that is not there; and pkg-config would tell of this machine's libraries.
        ac_cv_file__dev_ptmx="no", ac_cv_file__dev_ptc="no", PKG_CONFIG="false",
    )  # fmt: skip
    job.run("compiling Python", "make", _jobs(), "python", "oldsharedmods", cwd=source)
    library = result / "usr" / "lib" / GUEST_PYTHON
    shutil.copytree(source / "Lib", library, ignore=shutil.ignore_patterns("test", "tests", "__pycache__"))
    _install(source / "python", result / "usr" / "bin" / GUEST_PYTHON)
    for module in (source / "Modules").glob("*.so"):
        _install(module, library / "lib-dynload" / module.name)
    for program in (result / "usr" / "bin" / GUEST_PYTHON, *(library / "lib-dynload").iterdir()):
        job.run("stripping Python", f"{_CROSS}strip", program)


def _build_python() -> str:
    """A Python of the guest's own release: its build runs parts of itself, and cannot run what it compiles.

    :raise EnvironmentFault: there is none.
    """
    if f"python{sys.version_info.major}.{sys.version_info.minor}" == GUEST_PYTHON:
        return sys.executable
    found = shutil.which(GUEST_PYTHON)
    if found is None:
        raise EnvironmentFault(
            f"{GUEST_PYTHON} is not installed, and is needed to cross-compile {GUEST_PYTHON}",
            hint="build on Debian 12, and copy the cache's directory big-endian",
        )
    return found


def _copy_libraries(result: Path) -> None:
    """The C library that came with the cross compiler, and the dynamic linker where programs name it."""
    for name in ("libc.so.6", "libm.so.6", _LINKER):
        _install(Path(_ask(f"{_CROSS}gcc", f"-print-file-name={name}")), result / _LIBRARIES / name)
    link = result / "lib64" / _LINKER
    link.parent.mkdir()
    link.symlink_to(f"/{_LIBRARIES}/{_LINKER}")


def _ask(*argv: str) -> str:
    """What a compiler answers to a question about itself."""
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=_ANSWER).stdout.strip()


def _install(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)


_MAKERS = {"kernel": _make_kernel, "userland": _make_userland}
