"""The vmcore that `capture` is measured on: a real x86_64 kernel, its memory full of all sorts, crashed and saved by kdump.

Everything in it is from Debian: the kernel, which is both K1 and K2, busybox, and a Python that fills the memory
(``vmcore_filler.py``, beside this file, runs in the guest and says what with). K1's disk is an ext4 image with that Python, the
kernel's modules for the page cache to hold, and `page_pool`, the contents. K2 is the drill's own capture image: it copies
/proc/vmcore to a disk, as it is.

The guest is emulated (TCG): the same everywhere, and the bench is not about speed in here. It takes about a minute, once: the
file stays in the cache. The seed makes the contents and the order of things the same, not the file: two CPUs and an
allocator are in between.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crashkernel.drill import guest
from crashkernel.drill.debian import Archive, Kernel, Progress, default_cache, locked, silent
from crashkernel.drill.qemu import RunningTwin, Wiring
from crashkernel.errors import EnvironmentFault, StageFailed
from crashkernel.formats import cpio
from crashkernel.memory import align_up

QEMU = "qemu-system-x86_64"
SUITE = "bookworm"
ARCHITECTURE = "amd64"
VERSION = 1
"""Counts up when the recipe changes in a way that makes old files misleading."""

_CRASH_MODULES = ("virtio_pci", "virtio_console", "virtio_blk", "virtio_balloon", "crc32c_generic", "ext4")
_FILLER = Path(__file__).with_name("vmcore_filler.py")
_INIT = Path(__file__).with_name("vmcore_init.sh")

_PAGE = 4096  # bytes; of x86_64
_POOL = 64 << 20  # bytes of contents; more would not be more varied to a compressor that sees one page at a time
_RESERVED = 256  # MiB for K2
_DISK_SPARE = 256 << 20  # bytes: the dirty file, and what ext4 needs

_FILL_DEADLINE = 900.0  # seconds; seen: 25
_CAPTURE_DEADLINE = 900.0  # seconds from the crash to the end of the copy; seen: 25
_BALLOON_PAUSE = 5.0  # seconds for the guest to give memory up
_MKFS_DEADLINE = 120.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the file depends on: the guest's `memory` in bytes and the `seed` of its contents."""

    memory: int = 4 << 30
    seed: int = 1

    @property
    def name(self) -> str:
        """The directory of the result in the cache."""
        return f"vmcore-x86_64-{self.memory >> 20}M-{self.seed}-v{VERSION}"


# ----------------------------------------------------------------------------------------------------------- contents

_WORDS = (
    "error", "kernel", "the", "page", "memory", "request", "GET", "/index.html", "200", "session", "user=", "id=", "timestamp",
    "2026-01-", "null", "true", '"name":', "value", "\n", "cache",
)  # fmt: skip

_KINDS = (("zero", 2), ("random", 3), ("text", 5), ("pointers", 6), ("sparse", 4))
"""Kinds of pages and how many of twenty."""

Pages = npt.NDArray[np.uint8]


def page_pool(seed: int, size: int = _POOL) -> bytes:
    """`size` bytes of pages of mixed kinds: empty, incompressible, text, a heap of pointers, nearly empty."""
    generator = np.random.default_rng(seed)
    count = size // _PAGE
    kinds = generator.choice(len(_KINDS), count, p=[share / 20 for _, share in _KINDS])
    pool = np.zeros((count, _PAGE), np.uint8)
    for number, (kind, _) in enumerate(_KINDS):
        chosen = np.flatnonzero(kinds == number)
        if kind == "random":
            pool[chosen] = generator.integers(0, 256, (len(chosen), _PAGE), np.uint8)
        elif kind == "text":
            pool[chosen] = _text(generator, len(chosen))
        elif kind == "pointers":
            pool[chosen] = _pointers(generator, len(chosen))
        elif kind == "sparse":
            places = generator.integers(0, _PAGE, (len(chosen), 16))
            pool[chosen[:, None], places] = generator.integers(0, 256, places.shape, np.uint8)
    return pool.tobytes()


def _text(generator: np.random.Generator, count: int) -> Pages:
    words = generator.choice(np.array(_WORDS, object), count * _PAGE // 4)
    text = " ".join(words).encode()
    return np.frombuffer(text[: count * _PAGE], np.uint8).reshape(count, _PAGE)


def _pointers(generator: np.random.Generator, count: int) -> Pages:
    """Pairs of a pointer into the same 64 KiB of the direct mapping and, in one of eight, a small number."""
    heap = np.zeros((count, _PAGE // 16, 2), "<u8")
    base = np.uint64(0xFFFF888000000000) + (generator.integers(0, 1 << 24, (count, 1)).astype(np.uint64) << np.uint64(12))
    heap[:, :, 0] = base + (generator.integers(0, 1 << 10, heap.shape[:2]).astype(np.uint64) << np.uint64(6))
    heap[:, ::8, 1] = generator.integers(0, 1 << 16, heap[:, ::8, 1].shape)
    return heap.view(np.uint8).reshape(count, _PAGE)


# --------------------------------------------------------------------------------------------------------------- images


def _kernel(archive: Archive) -> tuple[Kernel, Path]:
    """Debian's kernel of the suite, and the tree of its package. Its file is a bzImage, which K1 and K2 are loaded from."""
    package = "linux-image-amd64"
    versioned = next(name for name in archive.depends(package) if name.startswith("linux-image-"))
    tree = archive.unpack(versioned)
    release = versioned.removeprefix("linux-image-")
    kernel = Kernel(versioned, release, tree / "boot" / f"vmlinuz-{release}", tree / "lib" / "modules" / release)
    if not kernel.vmlinux.is_file():
        raise EnvironmentFault(f"{versioned} holds no /boot/vmlinuz-{release}", hint=f"unpacked in {tree}")
    return kernel, tree


def _crash_image(kernel: Kernel, capture_image: Path, recipe: Recipe, output: Path) -> Path:
    """K1's root file system: K2's with another /init and other modules over it."""
    modules = guest.resolve_modules(kernel, _CRASH_MODULES)
    overlay = io.BytesIO()
    cpio.write(
        overlay,
        [
            cpio.Entry.file("init", _INIT.read_bytes(), 0o755),
            cpio.Entry.file("etc/crashkernel/filler", f"{recipe.seed} {recipe.memory >> 20}\n".encode()),
            cpio.Entry.file("etc/crashkernel/modules", "".join(f"{module.name}.ko\n" for module in modules).encode()),
            *(cpio.Entry.file(f"modules/{module.name}.ko", module.data) for module in modules),
        ],
    )
    output.write_bytes(capture_image.read_bytes() + overlay.getvalue())
    return output


def _disk_image(kernel: Kernel, trees: list[Path], capture_image: Path, recipe: Recipe, directory: Path) -> Path:
    """K1's disk, made by mke2fs from a tree of links to the packages' files."""
    root = directory / "root"
    for tree in trees:
        shutil.copytree(tree, root, symlinks=True, dirs_exist_ok=True, copy_function=_link)
    for name in ("proc", "sys", "dev", "tmp"):
        (root / name).mkdir(exist_ok=True)
    (root / "vmcore_filler.py").write_bytes(_FILLER.read_bytes())
    (root / "pages").write_bytes(page_pool(recipe.seed))
    _link(kernel.vmlinux, root / "boot" / "capture-kernel")
    _link(capture_image, root / "boot" / "capture-initrd")
    used = sum(align_up(path.lstat().st_size, _PAGE) + _PAGE // 4 for path in root.rglob("*"))
    image = directory / "disk"
    with image.open("wb") as file:
        file.truncate(align_up(used + used // 8 + _DISK_SPARE, 1 << 20))
    command = ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-E", "root_owner=0:0", "-d", str(root), str(image)]
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C"}
    try:
        made = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=_MKFS_DEADLINE, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise EnvironmentFault("mke2fs is not installed", hint="apt-get install e2fsprogs") from error
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFault(f"mke2fs did not end within {_MKFS_DEADLINE:.0f} s") from error
    if made.returncode:
        raise EnvironmentFault(f"mke2fs: {made.stderr.strip() or made.returncode}", hint="is the disk full?")
    shutil.rmtree(root)
    return image


def _link(source: str | Path, target: str | Path) -> None:
    """A hard link; a copy where the file system has none, or has too many of this file."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


# ---------------------------------------------------------------------------------------------------------------- guest


def qemu_command(recipe: Recipe, kernel: Path, initrd: Path, disk: Path, output: Path, wiring: Wiring) -> list[str]:
    """QEMU's arguments: K1's `disk` is /dev/vdb, and `output`, which K2 writes, /dev/vda."""
    sockets = [
        argument
        for name in ("console", "control", "qmp")
        for argument in ("-chardev", f"socket,id={name},path={wiring.socket(name)}")
    ]
    return [
        QEMU, "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt",
        "-smp", "2", "-m", str(recipe.memory >> 20),
        "-display", "none", "-vga", "none", "-nodefaults", "-no-reboot",
        *sockets, "-serial", "chardev:console", "-mon", "chardev=qmp,mode=control",
        "-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=control,name={guest.PORT_NAME}",
        "-blockdev", f"driver=file,node-name=output,filename={output},cache.no-flush=on",
        "-device", "virtio-blk-pci,drive=output,num-queues=1",
        "-blockdev", f"driver=file,node-name=disk,filename={disk},cache.no-flush=on",
        "-device", "virtio-blk-pci,drive=disk,num-queues=1",
        "-device", "virtio-balloon-pci",
        "-kernel", str(kernel), "-initrd", str(initrd),
        "-append", f"console=ttyS0 rdinit=/init crashkernel={_RESERVED}M panic=0 loglevel=5 random.trust_cpu=on",
    ]  # fmt: skip


async def _messages(machine: RunningTwin, stage: str, progress: Progress) -> list[str]:
    """The words of the guest's next message that is not for the log.

    :raise StageFailed: the guest says that it failed, or says nothing any more.
    """
    while True:
        try:
            words = (await machine.line()).split()
        except EOFError as error:
            raise StageFailed(stage, str(error), console=tuple(machine.console)) from error
        if words[:1] == ["failed"]:
            raise StageFailed(stage, " ".join(words[1:]), console=tuple(machine.console))
        if words[:1] == ["log"]:
            progress(" ".join(words[1:]))
        elif words:
            return words


async def _crash(recipe: Recipe, command: list[str], wiring: Wiring, progress: Progress) -> int:
    """Run the guest to its end; bytes of /proc/vmcore, which are on the disk then."""
    async with RunningTwin.start(command, wiring) as machine:
        stage, seconds = "filling the guest's memory", _FILL_DEADLINE
        try:
            async with asyncio.timeout(seconds):
                while (await _messages(machine, stage, progress))[0] != "filled":
                    pass
            await machine.balloon(recipe.memory - recipe.memory // 20)
            await asyncio.sleep(_BALLOON_PAUSE)
            stage, seconds = "saving the guest's memory", _CAPTURE_DEADLINE
            progress("the guest crashes, and its capture kernel copies /proc/vmcore")
            machine.await_death()
            machine.say("crash")
            async with asyncio.timeout(seconds):
                while (words := await _messages(machine, stage, silent))[0] != "saved":
                    pass
                await machine.process.wait()
        except TimeoutError as error:
            raise StageFailed(stage, f"not done within {seconds:.0f} s", console=tuple(machine.console)) from error
        return int(words[1])


def provide(recipe: Recipe | None = None, cache: Path | None = None, progress: Progress = silent) -> Path:
    """The vmcore of `recipe`, an ELF file in the cache, made the first time.

    :raise EnvironmentFault: QEMU, mke2fs, a package or the room is missing.
    :raise StageFailed: the guest did not do its part.
    """
    recipe = recipe or Recipe()
    cache = cache or default_cache()
    home = cache / "bench" / recipe.name
    with locked(cache / "bench" / "lock", progress):
        if not (home / "vmcore").exists():
            home.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".make-", dir=home.parent) as scratch:
                made = _make(recipe, cache, Path(scratch), progress)
                shutil.rmtree(home, ignore_errors=True)
                made.rename(home)
    return home / "vmcore"


def _make(recipe: Recipe, cache: Path, scratch: Path, progress: Progress) -> Path:
    """A directory below `scratch` with the vmcore and a word on where it is from."""
    if shutil.which(QEMU) is None:
        raise EnvironmentFault(f"{QEMU} is not installed", hint="apt-get install qemu-system-x86")
    if (free := shutil.disk_usage(scratch).free) < (wanted := recipe.memory * 3 // 2):
        raise EnvironmentFault(f"{free >> 20} MiB are free in {scratch.parent}, {wanted >> 20} are needed for a vmcore")
    progress(f"making a vmcore of {recipe.memory >> 20} MiB, once; this takes some minutes")
    started = time.monotonic()
    archive = Archive(cache, SUITE, progress, architecture=ARCHITECTURE)
    kernel, tree = _kernel(archive)
    python = archive.unpack(*guest.PYTHON_PACKAGES)
    userland = guest.Userland(archive.unpack("busybox-static") / "bin" / "busybox", python)
    capture_image = guest.build_capture_image(kernel, userland, scratch / "capture.cpio")
    crash_image = _crash_image(kernel, capture_image, recipe, scratch / "crash.cpio")
    disk = _disk_image(kernel, [python, tree], capture_image, recipe, scratch)
    result = scratch / "result"
    result.mkdir()
    output = result / "vmcore"
    with output.open("wb") as file:
        file.truncate(recipe.memory + (1 << 28))
    with tempfile.TemporaryDirectory(prefix="ck-") as sockets:  # a socket's path has 108 bytes at most
        wiring = Wiring(Path(sockets))
        command = qemu_command(recipe, kernel.vmlinux, crash_image, disk, output, wiring)
        size = asyncio.run(_crash(recipe, command, wiring, progress))
    os.truncate(output, size)
    about = {**asdict(recipe), "version": VERSION, "kernel": kernel.spec, "seconds": round(time.monotonic() - started)}
    (result / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    return result
