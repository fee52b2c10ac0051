"""The two initial RAM file systems of the drill: one for the kernel that dies, one for the kernel that saves the dump.

Each is a busybox, the few kernel modules that reach the host, and a shell script (``crash-init.sh``,
``capture-init.sh``, beside this file) whose head describes the protocol it speaks. The dying kernel's also holds
Debian's python3.11 and this package's own source, so that the loader under test is the very one that is being edited; and
so does the other's, with Debian's numpy and codecs, when it is `crashkernel capture` that saves the dump.

They are uncompressed: QEMU loads 80 MB in a few hundredths of a second, while decompressing them on an emulated CPU
costs seconds.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import importlib.util
import lzma
import marshal
import os
import re
import stat
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

import crashkernel
from crashkernel.drill.debian import Archive, Kernel, Progress, default_cache, silent
from crashkernel.errors import EnvironmentFault, UsageError
from crashkernel.formats import cpio

Loader = Literal["crashkernel", "kexec-tools"]
Task = Literal["crash", "describe"]
Driver = Literal["none", "late", "early"]

USERLAND_SUITE = "bookworm"  # the last release with Python 3.11, the oldest this package runs on
GUEST_PYTHON = "python3.11"
GUEST_MAGIC = 3495  # its bytecode's magic number (Python/import.c history in importlib/_bootstrap_external.py)

PORT_NAME = "crashkernel"  # the virtio-serial port of both guests
NONCE_SIZE = 64  # bytes

CRASH_MODULES = ("virtio_pci", "virtio_console")
CAPTURE_MODULES = ("virtio_pci", "virtio_console", "virtio_blk")
NETWORK_MODULES = ("virtio_net",)  # K2's, when the dump leaves over the network

CRASH_APPLETS = ("sh", "cat", "hexdump", "insmod", "mount", "poweroff", "sleep", "stat")
CAPTURE_APPLETS = ("sh", "cat", "dd", "insmod", "mount", "poweroff", "sleep", "stat")
NETWORK_APPLETS = ("ifconfig",)  # K2's, likewise

_NOT_IN_K1 = ("drill", "bench", "campaign", "vmcore", "capture", "target", "dump")
"""Rooms that nobody enters before the crash. What the dying kernel's files take of its memory, a driver cannot be given."""

GUEST_PACKAGE_ROOT = PurePosixPath("usr/lib/crashkernel")  # PYTHONPATH in crash-init.sh

# ------------------------------------------------------------------------------------------------------------- modules

_TOOL_DEADLINE = 60.0  # seconds for zstd to decompress one module


def _module_name(path: str) -> str:
    """`kernel/drivers/char/virtio-rng.ko.xz` → `virtio_rng`: the kernel has underscores where files may have dashes."""
    return path.rsplit("/", 1)[-1].split(".ko", 1)[0].replace("-", "_")


def read_module(path: Path) -> bytes:
    """A kernel module as the kernel wants it, decompressed if its name ends in .xz, .gz or .zst.

    :raise EnvironmentFault: it is compressed with zstd and there is no ``zstd`` here, or it is broken.
    """
    if path.suffix == ".zst":
        try:
            result = subprocess.run(["zstd", "-dc", str(path)], capture_output=True, timeout=_TOOL_DEADLINE, check=True)
        except FileNotFoundError as error:
            raise EnvironmentFault(f"{path} needs zstd to be decompressed", hint="install zstd") from error
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise EnvironmentFault(f"{path} cannot be decompressed: {error}") from error
        return result.stdout
    data = path.read_bytes()
    try:
        if path.suffix == ".xz":
            return lzma.decompress(data)
        if path.suffix == ".gz":
            return gzip.decompress(data)
    except (lzma.LZMAError, OSError, EOFError, zlib.error) as error:
        raise EnvironmentFault(f"{path} cannot be decompressed: {error}") from error
    return data


def _needs(module: bytes) -> tuple[str, ...]:
    """The modules that `module` depends on: the string `depends=a,b` that modpost puts into every module's .modinfo.

    Debian's packages carry no modules.dep (depmod makes it at installation), and this string is what depmod reads.
    """
    match = re.search(rb"(?:\A|\0)depends=([^\0]*)\0", module)
    return tuple(name.replace("-", "_") for name in match[1].decode().split(",") if name) if match else ()


@dataclass(frozen=True)
class Module:
    """A kernel module, uncompressed, under the name the kernel has for it."""

    name: str
    data: bytes


@functools.cache  # both guests' kernels are mostly one, with some thousand modules
def _module_files(directory: Path) -> Mapping[str, Path]:
    return {_module_name(path.name): path for path in directory.rglob("*.ko*")}


def resolve_modules(kernel: Kernel, names: Iterable[str]) -> tuple[Module, ...]:
    """The modules `names` and all they depend on, in the order to load them; those built into `kernel` are left out.

    A kernel without a modules directory is taken to have everything built in.

    :raise EnvironmentFault: a module is neither built in nor there.
    """
    if not kernel.modules.is_dir():
        return ()
    builtin_list = kernel.modules / "modules.builtin"
    builtin = {_module_name(line) for line in builtin_list.read_text().split()} if builtin_list.exists() else set()
    files = _module_files(kernel.modules)
    found: dict[str, Module] = {}
    trail: list[str] = []

    def visit(name: str) -> None:
        if name in found or name in builtin or name in trail:
            return
        if name not in files:
            wanted = f", needed by {trail[-1]}" if trail else ""
            raise EnvironmentFault(
                f"kernel {kernel.name} has no module {name}{wanted}: it is neither built in nor in {kernel.modules}",
                hint="the drill reaches its guests over virtio: use a kernel with virtio-pci, -console and -blk",
            )
        data = read_module(files[name])
        trail.append(name)
        for needed in _needs(data):
            visit(needed)
        trail.pop()
        found[name] = Module(name, data)

    for name in names:
        visit(name)
    return tuple(found.values())


# ------------------------------------------------------------------------------------------------------------ userland


@dataclass(frozen=True)
class Userland:
    """What the guests' root file systems are made of: Debian packages, unpacked."""

    busybox: Path  # a static executable
    python: Path  # tree with python3.11, its library and the shared libraries both need
    kexec: Path | None = None  # tree with kexec-tools, when asked for
    capture: Path | None = None  # tree with the same python3.11, numpy and the codecs' libraries, when asked for


PYTHON_PACKAGES = (
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libexpat1", "libffi8", "zlib1g",
)  # fmt: skip


CODEC_PACKAGES = ("python3-zstandard", "libzstd1", "libdeflate0", "liblzo2-2", "libsnappy1v5", "libstdc++6", "libgcc-s1")
"""What `capture.codec` opens, and what that needs."""

CAPTURE_PACKAGES = (*PYTHON_PACKAGES, "python3-numpy", "libblas3", "liblapack3", "libgfortran5", *CODEC_PACKAGES)


def fetch_userland(
    cache: Path | None = None, progress: Progress = silent, *, kexec_tools: bool = False, capture: bool = False
) -> Userland:
    """The guests' userland, from Debian.

    :raise EnvironmentFault: a package cannot be had.
    """
    cache = cache or default_cache()
    archive = Archive(cache, USERLAND_SUITE, progress)
    python = archive.unpack(*PYTHON_PACKAGES)
    return Userland(
        busybox=archive.unpack("busybox-static") / "bin" / "busybox",
        python=python,
        kexec=archive.unpack("kexec-tools") if kexec_tools else None,
        capture=archive.unpack(*CAPTURE_PACKAGES) if capture else None,
    )


# What is taken of the Python packages: the interpreter, the dynamic linker, the libraries they and the modules need.
# (readelf -d: python3.11 needs libm, libz, libexpat and libc; _ctypes needs libffi.)
_PYTHON_FILES = (
    r"usr/bin/python3\.11",
    r"lib64/ld64\.so\.[12]",
    r"(usr/)?lib/powerpc64(le)?-linux-gnu/(ld64\.so\.[12]|lib(c|m|dl|pthread|rt|util|z|ffi|expat)\.so[.0-9]*)",
    r"usr/lib/python3\.11/.*\.py",
    r"usr/lib/python3\.11/lib-dynload/(_ctypes|_decimal|_json|_contextvars|_queue|_typing|mmap|resource|termios)\..*",
)
_UNUSED_IN_BOTH = (
    r"usr/lib/python3\.11/(test|unittest|idlelib|lib2to3|ensurepip|pydoc_data|distutils|sqlite3|tkinter|turtledemo"
    r"|asyncio|curses|dbm|venv|wsgiref|xml|xmlrpc|zoneinfo)/.*",
    r"usr/lib/python3\.11/(_pydecimal|_pyio|antigravity|cgi|doctest|ftplib|imaplib|mailbox|nntplib|pdb|pickletools|pydoc"
    r"|smtpd|smtplib|tarfile|telnetlib|this|turtle|webbrowser)\.py",
)
_UNUSED = (
    *_UNUSED_IN_BOTH,
    r"usr/lib/python3\.11/(concurrent|email|http|multiprocessing)/.*",
    # Nothing is read from the network, and the file system speaks UTF-8.
    r"usr/lib/python3\.11/encodings/(?!(__init__|aliases|ascii|latin_1|utf_8)\.py).*",
)

# And for `crashkernel capture`: numpy as far as `import numpy` goes, which is all of its subpackages but these. Debian's BLAS
# and LAPACK lie in directories of their own, for update-alternatives to choose between.
_CAPTURE_FILES = (
    *_PYTHON_FILES,
    r"usr/lib/python3\.11/lib-dynload/_(multiprocessing|posixshmem)\..*",
    r"(usr/)?lib/powerpc64le-linux-gnu/lib(gcc_s|stdc\+\+|gfortran|zstd|deflate|lzo2|snappy)\.so[.0-9]*",
    r"usr/lib/powerpc64le-linux-gnu/(blas|lapack)/lib(blas|lapack)\.so[.0-9]*",
    r"usr/lib/python3/dist-packages/(numpy|zstandard)/.*\.(py|so)",
)
_CAPTURE_UNUSED = (
    *_UNUSED_IN_BOTH,
    r"usr/lib/python3\.11/encodings/(?!(__init__|aliases|ascii|idna|latin_1|utf_8)\.py).*",
    r"usr/lib/python3\.11/(aifc|cProfile|cgitb|chunk|code|codeop|colorsys|crypt|filecmp|fileinput|getopt|imghdr|mailcap"
    r"|modulefinder|netrc|nturl2path|optparse|pipes|plistlib|poplib|profile|pstats|py_compile|pyclbr|sched|shelve|sndhdr"
    r"|statistics|sunau|symtable|tabnanny|timeit|trace|tracemalloc|uu|uuid|wave|xdrlib|zipapp|zipfile)\.py",
    r"usr/lib/python3\.11/(lib-dynload/_decimal\..*|tomllib/.*)",
    r"usr/lib/python3/dist-packages/numpy/(.*/)?(tests|distutils|f2py|testing|_pyinstaller|array_api|doc)/.*",
    r"usr/lib/python3/dist-packages/numpy/(.*/)?(setup|conftest)\.py",
    r"usr/lib/python3/dist-packages/numpy/core/_(simd|umath_tests|rational_tests|operand_flag_tests|struct_ufunc_tests)\..*",
    r"usr/lib/python3/dist-packages/zstandard/(_cffi\..*|backend_cffi\.py)",
)


def _tree_files(tree: Path) -> Iterator[tuple[str, Path]]:
    """Files and links below `tree`, each as its relative name and its path, in the order of their names."""
    for directory, subdirectories, names in os.walk(tree):
        subdirectories.sort()
        links = [name for name in subdirectories if (Path(directory) / name).is_symlink()]
        for name in sorted([*names, *links]):
            path = Path(directory) / name
            yield path.relative_to(tree).as_posix(), path


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


@contextlib.contextmanager
def _appearing(output: Path) -> Iterator[BinaryIO]:
    """The file `output` to write, which appears whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}-")
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
            yield file
        Path(scratch).chmod(0o644)
        Path(scratch).rename(output)
    finally:
        Path(scratch).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- bytecode


def compile_module(source: bytes, guest_path: str) -> bytes:
    """The .pyc of a module, of the kind that is never checked against its source (PEP 552: flags 1, then a hash).

    The bytecode is the running Python's: `same_bytecode` says whether the guest's can use it.

    :raise SyntaxError, ValueError: the source does not compile.
    """
    code = compile(source, guest_path, "exec", dont_inherit=True, optimize=0)
    head = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(source)
    return head + marshal.dumps(code)


def kept_module(source: bytes, guest_path: str) -> bytes:
    """`compile_module`, but what was compiled once is kept in the cache: an image has some 280 modules, half a second's work.

    :raise SyntaxError, ValueError: the source does not compile.
    """
    key = hashlib.sha256(importlib.util.MAGIC_NUMBER + guest_path.encode() + b"\0" + source).hexdigest()
    kept = default_cache() / "bytecode" / f"{key}.pyc"
    try:
        return kept.read_bytes()
    except OSError:
        compiled = compile_module(source, guest_path)
        with contextlib.suppress(OSError), _appearing(kept) as file:  # a cache that cannot be written is none
            file.write(compiled)
        return compiled


def same_bytecode() -> bool:
    """Whether this Python and the guest's have the same bytecode."""
    return int.from_bytes(importlib.util.MAGIC_NUMBER[:2], "little") == GUEST_MAGIC


def _pyc_name(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.parent / "__pycache__" / f"{path.stem}.cpython-311.pyc")


# --------------------------------------------------------------------------------------------------------------- images


class _Root:
    """The entries of a root file system, parents before children, each name once."""

    def __init__(self) -> None:
        self.entries: list[cpio.Entry] = []
        self._names: set[str] = set()

    def _add(self, name: str, entry: cpio.Entry) -> None:
        if name in self._names:
            raise ValueError(f"two entries called {name}")
        self.directory(str(PurePosixPath(name).parent))
        self._names.add(name)
        self.entries.append(entry)

    def directory(self, name: str) -> None:
        if name != "." and name not in self._names:
            self._add(name, cpio.Entry.directory(name))

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._add(name, cpio.Entry.file(name, data, mode))

    def symlink(self, name: str, target: str) -> None:
        self._add(name, cpio.Entry.symlink(name, target))

    def device(self, name: str, major: int, minor: int) -> None:
        self._add(name, cpio.Entry.device(name, "c", major, minor, 0o600))

    def copy(self, name: str, path: Path) -> None:
        """A file or link of this machine, as `name`, executable if it is."""
        if path.is_symlink():
            self.symlink(name, str(path.readlink()))
        else:
            self.file(name, path.read_bytes(), stat.S_IMODE(path.stat().st_mode) & 0o755 | 0o444)

    def write(self, output: Path) -> Path:
        """The archive, as the file `output`, which appears whole or not at all."""
        with _appearing(output) as file:
            cpio.write(file, self.entries)
        return output


def _script(name: str) -> bytes:
    return (Path(__file__).parent / name).read_bytes()


def _add_base(root: _Root, userland: Userland, init: str, applets: Sequence[str], modules: Sequence[Module]) -> None:
    """What both guests have: busybox and its links, the mount points, the modules, /init."""
    for directory in ("proc", "sys", "dev", "tmp"):
        root.directory(directory)
    # The kernel opens it for init before anybody can mount devtmpfs (init/main.c, console_on_rootfs).
    root.device("dev/console", 5, 1)
    root.file("bin/busybox", userland.busybox.read_bytes(), 0o755)
    for applet in applets:
        root.symlink(f"bin/{applet}", "busybox")
    root.file("etc/crashkernel/modules", "".join(f"{module.name}.ko\n" for module in modules).encode())
    for module in modules:
        root.file(f"modules/{module.name}.ko", module.data)
    root.file("etc/crashkernel/common.sh", _script("guest-common.sh"))
    root.file("init", _script(init), 0o755)


def build_capture_image(
    kernel: Kernel,
    userland: Userland,
    output: Path,
    *,
    capture_args: Sequence[str] = (),
    token: str = "",
    fault: str = "",
    package: Path | None = None,
) -> Path:
    """The capture kernel's root file system, for `kernel`, written to `output`.

    It copies ``/proc/vmcore`` to its disk as it is; with `capture_args` it runs ``crashkernel capture`` with these instead. A
    `token` is what the receiver of a dump that goes over the network wants to be shown. `fault` is what its shell does before
    it saves anything. `package` is the directory of the
    package to run, this one when not given.

    :raise UsageError: a line break in an argument.
    :raise EnvironmentFault: `kernel` lacks a module that the guest needs, or `userland` what captures.
    """
    _require_lines(capture_args)
    root = _Root()
    modules = resolve_modules(kernel, (*CAPTURE_MODULES, *(NETWORK_MODULES if token else ())))
    _add_base(root, userland, "capture-init.sh", CAPTURE_APPLETS + (NETWORK_APPLETS if token else ()), modules)
    if capture_args:
        if userland.capture is None:
            raise EnvironmentFault("the userland was fetched without what `crashkernel capture` runs on")
        root.file("etc/crashkernel/capture-args", "".join(f"{argument}\n" for argument in capture_args).encode())
        _add_python(root, userland.capture, _CAPTURE_FILES, _CAPTURE_UNUSED, _add_bytecode)
        _add_package(root, package or Path(crashkernel.__file__).parent, ("drill", "bench", "campaign"), _add_bytecode)
    if fault:
        root.file("etc/crashkernel/fault", fault.encode())
    if token:
        root.file("etc/crashkernel/token", token.encode(), 0o600)
    return root.write(output)


def _require_lines(arguments: Iterable[str]) -> None:
    if any("\n" in text for text in arguments):
        raise UsageError("an argument for the guest must not have a line break")


def build_crash_image(
    kernel: Kernel,
    capture_kernel: Kernel,
    capture_image: Path | None,
    userland: Userland,
    output: Path,
    *,
    nonce: bytes,
    task: Task = "crash",
    driver: Driver = "none",
    loader: Loader = "crashkernel",
    load_args: Sequence[str] = (),
    append: str = "",
    package: Path | None = None,
) -> Path:
    """The dying kernel's root file system, for `kernel`, written to `output`.

    It finds the capture kernel as ``/boot/vmlinux`` and its root file system as ``/boot/initrd``, and its own kernel as
    ``/boot/vmlinux-RELEASE``. `load_args` go to ``crashkernel load`` (which is also told
    ``--plan-out``), `append` to kexec-tools. `nonce` is planted before the crash. `package` is the directory of the package
    to run, this one when not given. With the task `describe` it only runs ``crashkernel describe`` and ends. With
    a `driver` it takes buffers when the host says so; an `early` one has had K1's freed init section before, until K1's
    modules are loaded.

    :raise UsageError: a nonce of another size than `NONCE_SIZE`, or a line break in an argument.
    :raise EnvironmentFault: `kernel` lacks a module that the guest needs, or `userland` the loader.
    """
    if len(nonce) != NONCE_SIZE:
        raise UsageError(f"a nonce has {NONCE_SIZE} bytes, not {len(nonce)}")
    _require_lines((*load_args, append))
    root = _Root()
    # Unpacked first, it gets the lowest free memory, right behind the kernel, which a driver can have once it is loaded.
    root.copy("boot/vmlinux", capture_kernel.vmlinux)
    _add_base(root, userland, "crash-init.sh", CRASH_APPLETS, resolve_modules(kernel, CRASH_MODULES))
    root.file("etc/crashkernel/scenario", f"LOADER={loader}\nTASK={task}\nDRIVER={driver}\n".encode())
    root.file("etc/crashkernel/load-args", "".join(f"{argument}\n" for argument in load_args).encode())
    root.file("etc/crashkernel/append", append.encode())
    root.file("etc/crashkernel/nonce.0", nonce[: NONCE_SIZE // 2])
    root.file("etc/crashkernel/nonce.1", nonce[NONCE_SIZE // 2 :])
    own = f"boot/vmlinux-{kernel.name}"  # where the machine's reader looks for K1's own file
    if capture_kernel.vmlinux == kernel.vmlinux:
        root.symlink(own, "vmlinux")
    else:
        root.copy(own, kernel.vmlinux)
    if capture_image is not None:
        root.copy("boot/initrd", capture_image)
    if driver != "none":
        root.file(str(GUEST_PACKAGE_ROOT / "driver.py"), _script("guest_driver.py"))
    _add_python(root, userland.python, _PYTHON_FILES, _UNUSED, _add_source)
    _add_package(root, package or Path(crashkernel.__file__).parent, _NOT_IN_K1, _add_source)
    if loader == "kexec-tools":
        if userland.kexec is None:
            raise EnvironmentFault("the userland was fetched without kexec-tools")
        root.copy("sbin/kexec", userland.kexec / "sbin" / "kexec")
    return root.write(output)


_Add = Callable[[_Root, str, Path], None]


def _add_python(root: _Root, tree: Path, wanted: Sequence[str], unwanted: Sequence[str], add: _Add) -> None:
    for name, path in _tree_files(tree):
        if _matches(wanted, name) and not _matches(unwanted, name):
            add(root, re.sub(r"/(blas|lapack)(?=/lib)", "", name), path)


def _add_package(root: _Root, package: Path, without: Sequence[str], add: _Add) -> None:
    """The package as it lies on this machine, without the rooms that are for the host only."""
    for relative, path in _tree_files(package):
        parts = PurePosixPath(relative).parts
        if parts[0] not in without and "__pycache__" not in parts:
            add(root, str(GUEST_PACKAGE_ROOT / "crashkernel" / relative), path)


def _add_source(root: _Root, name: str, path: Path) -> None:
    """A file, and its bytecode if it is a module and there is use for it.

    Debian's packages have no bytecode, and compiling on an emulated CPU is slow: with it, importing what a loader needs
    takes 0.5 s in place of 2 s. It costs the image 6 MB.
    """
    root.copy(name, path)
    if same_bytecode() and name.endswith(".py"):
        # What does not compile here will say so in the guest, where the error belongs to whoever imports it.
        with contextlib.suppress(SyntaxError, ValueError):
            root.file(_pyc_name(name), kept_module(path.read_bytes(), "/" + name))


def _add_bytecode(root: _Root, name: str, path: Path) -> None:
    """A file, or in place of a module its bytecode: in a capture kernel every file takes memory, and whole pages of it.

    With 64 KiB pages, sources beside their bytecode would take 40 MB.
    """
    if same_bytecode() and name.endswith(".py") and not path.is_symlink():
        with contextlib.suppress(SyntaxError, ValueError):
            root.file(f"{name}c", kept_module(path.read_bytes(), "/" + name))
            return
    root.copy(name, path)
