"""Runs in the guest of the capture bench, on a bare Python: fills its memory with every kind of page, then crashes it.

The contents come from ``/pages``, a pool of seeded 4 KiB pages that the host made (`crashkernel.bench.vmcore.page_pool`); who
holds them is decided here, so that each class of the dump filter has pages, and each state of a page that the filter must
know: transparent huge pages and single ones, hugetlb pages mapped and free, pipe buffers, page cache clean, dirty and in
memory only, some 200,000 inodes, pages poisoned and offlined, free pages with and without old contents. The host takes away
some more with the balloon.

Arguments: the seed, and the megabytes of memory to lay the amounts out for. Speaks on the standard input and output, which is
the virtio-serial port, one line a message::

    log TEXT       what was done
    filled KIB     the memory is filled, KIB are free; from the host comes ``crash``
    failed REASON  nothing else follows
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

_MIB = 1 << 20
_MAP_HUGETLB = 0x40000  # include/uapi/asm-generic/hugetlb_encode.h, mman.h of x86
_MADV_SOFT_OFFLINE = 101  # include/uapi/asm-generic/mman-common.h
_MADV_HWPOISON = 100
_SYS_KEXEC_FILE_LOAD = 320  # arch/x86/entry/syscalls/syscall_64.tbl
_KEXEC_FILE_ON_CRASH = 2  # include/uapi/linux/kexec.h
_PIPE_SIZE = _MIB  # /proc/sys/fs/pipe-max-size
_HUGE = 2 * _MIB

_CAPTURE_OPTIONS = "console=ttyS0 irqpoll nr_cpus=1 reset_devices novmcoredd rdinit=/init panic=5 8250.nr_uarts=1 loglevel=4"


def say(*words: object) -> None:
    """A line to the host."""
    print(*words, flush=True)


class Pool:
    """The host's pages: a different stretch of them for each megabyte."""

    def __init__(self, seed: int) -> None:
        with Path("/pages").open("rb") as file:
            self._pages = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        self._random = random.Random(seed)  # noqa: S311  (not for secrets)

    def stretch(self, size: int) -> memoryview:
        """`size` bytes, at most a megabyte, from the start of a page."""
        first = self._random.randrange((len(self._pages) - size) // mmap.PAGESIZE)
        return self._pages[first * mmap.PAGESIZE :][:size]

    def fill(self, memory: mmap.mmap) -> None:
        """All of `memory`."""
        for at in range(0, len(memory), _MIB):
            size = min(_MIB, len(memory) - at)
            memory[at : at + size] = self.stretch(size)


def private(size: int, flags: int = 0) -> mmap.mmap:
    """Anonymous memory of this process, as long as it has the object."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags)


def in_child(work: Callable[[], object], *, stays: bool = True) -> None:
    """Do `work` in a process of its own and wait for it; what it returns it holds until the crash, unless it does not stay."""
    done, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            held = work()
        except BaseException:
            say("log", traceback.format_exc().replace("\n", " | "))
            os._exit(1)
        if not stays:
            os._exit(0)
        os.write(tell, b"1")
        while held:
            signal.pause()
    os.close(tell)
    if os.read(done, 1) != b"1" and os.waitpid(child, 0)[1]:
        raise RuntimeError(f"{work.__name__} did not work")
    os.close(done)


def load_capture_kernel() -> None:
    """K2, which lies on the disk."""
    libc = ctypes.CDLL(None, use_errno=True)
    kernel, initrd = os.open("/boot/capture-kernel", os.O_RDONLY), os.open("/boot/capture-initrd", os.O_RDONLY)
    options = _CAPTURE_OPTIONS.encode()
    arguments = (ctypes.c_long(kernel), ctypes.c_long(initrd), ctypes.c_long(len(options) + 1), options)
    if libc.syscall(ctypes.c_long(_SYS_KEXEC_FILE_LOAD), *arguments, ctypes.c_long(_KEXEC_FILE_ON_CRASH)):
        raise OSError(ctypes.get_errno(), f"kexec_file_load: {os.strerror(ctypes.get_errno())}")


def hold_huge_pages(pool: Pool, size: int) -> None:
    """Hugetlb pages, a fifth of them free."""
    Path("/proc/sys/vm/nr_hugepages").write_text(f"{size // _HUGE * 5 // 4}")

    def huge_pages() -> mmap.mmap:
        memory = private(size, _MAP_HUGETLB)
        pool.fill(memory)
        return memory

    in_child(huge_pages)


def hold_anonymous(pool: Pool, size: int) -> None:
    """One half in transparent huge pages where the kernel can, the other in single ones."""
    Path("/sys/kernel/mm/transparent_hugepage/enabled").write_text("madvise")

    def anonymous() -> list[mmap.mmap]:
        halves = [private(size // 2 // _HUGE * _HUGE) for _ in range(2)]
        for memory, advice in zip(halves, (mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE), strict=True):
            memory.madvise(advice)
            pool.fill(memory)
        return halves

    in_child(anonymous)


def hold_pipes(pool: Pool, size: int) -> None:
    """Pages that are nobody's but the kernel's."""

    def pipes() -> list[tuple[int, int]]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (65536, 65536))
        pairs = [os.pipe() for _ in range(size // _PIPE_SIZE)]
        for _, write in pairs:
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            os.write(write, pool.stretch(_PIPE_SIZE))
        return pairs

    in_child(pipes)


def write_file(pool: Pool, path: str, size: int) -> None:
    """A file, left in memory."""
    with Path(path).open("wb", buffering=0) as file:
        for _ in range(size // _MIB):
            file.write(pool.stretch(_MIB))


def make_inodes(count: int) -> None:
    """Empty files in directories of 1000, every tenth directory removed again, so that slabs are part full."""
    for number in range(count):
        if number % 1000 == 0:
            os.mkdir(f"/tmp/{number // 1000}")  # noqa: PTH102, S108  (a quarter of a million of them, on an emulated CPU)
        os.mknod(f"/tmp/{number // 1000}/file-{number:08}-{number * 2654435761 % (1 << 32):08x}")  # noqa: S108
    for directory in range(0, count // 1000, 10):
        with os.scandir(f"/tmp/{directory}") as files:  # noqa: S108
            for file in files:
                os.unlink(file.path)  # noqa: PTH108
        os.rmdir(f"/tmp/{directory}")  # noqa: PTH106, S108


def read_disk() -> None:
    """Page cache, clean: everything on the disk, and the kernel's own file systems for their inodes."""
    buffer = bytearray(_MIB)
    for directory, _, names in os.walk("/"):
        if directory.split("/")[1] in {"proc", "sys", "dev", "tmp"}:
            continue
        for name in names:
            path = os.path.join(directory, name)  # noqa: PTH118
            if not os.path.islink(path):  # noqa: PTH114
                with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                    while file.readinto(buffer):
                        pass
    for _ in os.walk("/sys"):
        pass


def poison(pool: Pool) -> None:
    """Pages the kernel has given up: hard, in anonymous memory and page cache, and soft, whose contents moved."""

    def poisoned() -> tuple[mmap.mmap, mmap.mmap]:
        memory = private(64 * mmap.PAGESIZE)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        pool.fill(memory)
        for number in range(0, 12, 3):
            memory.madvise(_MADV_HWPOISON, number * mmap.PAGESIZE, mmap.PAGESIZE)
        for number in range(20, 28, 2):
            memory.madvise(_MADV_SOFT_OFFLINE, number * mmap.PAGESIZE, mmap.PAGESIZE)
        with Path("/boot/capture-initrd").open("rb") as file:
            cached = mmap.mmap(file.fileno(), 1 * _MIB, prot=mmap.PROT_READ)
        for number in (7, 8):
            cached[number * mmap.PAGESIZE]
            cached.madvise(_MADV_HWPOISON, number * mmap.PAGESIZE, mmap.PAGESIZE)
        return memory, cached

    in_child(poisoned)


def kib_free() -> int:
    """What nobody holds."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemFree:"))


def leave_stale(pool: Pool, size: int) -> None:
    """Free memory that is not empty."""

    def stale() -> None:
        pool.fill(private(size))

    in_child(stale, stays=False)


def fill(seed: int, mib: int) -> None:
    """All of it. The amounts are those of 4 GiB, scaled; over half a gigabyte stays free."""
    pool = Pool(seed)

    def amount(of_4_gib: int) -> int:
        return of_4_gib * mib // 4096 * _MIB

    for name, value in (("dirty_ratio", 90), ("dirty_background_ratio", 90), ("dirty_expire_centisecs", 360000)):
        Path(f"/proc/sys/vm/{name}").write_text(f"{value}")
    started = time.monotonic()
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("capture kernel", load_capture_kernel),
        ("huge pages", lambda: hold_huge_pages(pool, amount(80))),
        ("file in tmpfs", lambda: write_file(pool, "/tmp/a", amount(300))),  # noqa: S108
        ("inodes", lambda: make_inodes(250 * mib // 4096 * 1000)),
        ("anonymous", lambda: hold_anonymous(pool, amount(450))),
        ("pipes", lambda: hold_pipes(pool, amount(160))),
        ("disk", read_disk),
        ("poison", lambda: poison(pool)),
        ("dirty file", lambda: write_file(pool, "/dirty", amount(100))),
        ("stale", lambda: leave_stale(pool, kib_free() * 5 // 8 << 10)),
    )
    for name, step in steps:
        step()
        say("log", f"{name}: {time.monotonic() - started:.1f} s, {kib_free() >> 10} MiB free")


def main() -> None:
    """Fill, wait for the host, crash."""
    try:
        fill(int(sys.argv[1]), int(sys.argv[2]))
        say("filled", kib_free())
        word = sys.stdin.readline().strip()
        if word != "crash":
            raise RuntimeError(f"the host said {word!r}")
        Path("/proc/sysrq-trigger").write_text("c")
        raise RuntimeError("sysrq-trigger did not crash the kernel")
    except Exception:
        say("failed", traceback.format_exc().strip().replace("\n", " | "))
        raise


if __name__ == "__main__":
    main()
