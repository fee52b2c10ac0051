"""Takes pages out of the running K1's hands, so that it gives them to nobody while K2 waits, and gives them back.

The 2005 mail rejected running K2 at zero because K1 hands out its freed init pages, and what lies behind its image, to
drivers, whose devices go on writing there after the crash. A page that K1 has soft-offlined is in no free list: no allocation
gets it.

What the kernel does (mm/memory-failure.c, soft_offline_page; 6.1 to 7.2 read and tried): a free page leaves the buddy
allocator, clean page cache is dropped, what else can be moved is moved elsewhere; the page is then marked as poisoned, though
nothing is wrong with it. Slabs, page tables and what a driver allocated cannot be moved: such pages stay K1's. Only
unpoison_memory undoes it, which hwpoison_inject's debugfs file calls.

Everything is read and written below a root directory. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from crashkernel.errors import CrashkernelError, FormatError
from crashkernel.formats import fields
from crashkernel.machine import PAGE_SIZES, Pages
from crashkernel.machine.pages import is_out, read_pages
from crashkernel.memory import Range, RangeSet

RECORD = Path("run/crashkernel/quarantine.json")
"""Where it is kept which pages are ours to give back, below the root directory."""

FORMAT = 1
"""Version of the record."""

Progress = Callable[[int, int], None]
"""Told once a second, from two seconds on, how many pages have been asked for, and of how many."""

_SOFT_OFFLINE = Path("sys/devices/system/memory/soft_offline_page")
_FLAGS = Path("proc/kpageflags")
_BOOT = Path("proc/sys/kernel/random/boot_id")
_DEBUGFS = Path("sys/kernel/debug")
_UNPOISON = _DEBUGFS / "hwpoison/unpoison-pfn"
_MODULE = "hwpoison_inject"
_HOST = Path("/")

# include/uapi/linux/kernel-page-flags.h
_FLAG_SIZE = 8  # bytes a page
_HWPOISON = 1 << 19
_NOPAGE = 1 << 20
_BUDDY = 1 << 10
# BUDDY, LRU, ANON, HUGE, THP, and UPTODATE, SWAPBACKED of what is on its way to the LRU lists: what the kernel may part with.
_MOVABLE = _BUDDY | 1 << 5 | 1 << 12 | 1 << 17 | 1 << 22 | 1 << 3 | 1 << 14
# SLAB, OFFLINE, PGTABLE, RESERVED
_IMMOVABLE = 1 << 7 | 1 << 23 | 1 << 26 | 1 << 32

_MOST_SPENT = 8  # pages in all
_SPENT_AT_ONCE = 2  # one may be allocated before it can be taken
_SPENT_WITHIN = 1 << 16  # pages above those wanted: there the zone is the same (free lists are each zone's)
_ROUNDS = 4  # how often a page is tried that was in use for the moment
_PAUSE = 0.1  # seconds between rounds
_TOOL_DEADLINE = 30  # seconds for modprobe, mount


@dataclass(frozen=True, slots=True)
class Quarantine:
    """What became of the pages that K1 was to part with: whole pages of K1's, in bytes.

    `held` says who holds those it did not part with, ascending; nobody knows it of a page that a memory error took, so that is
    "kernel". `reason` is why nothing, or not everything, could be asked of the kernel, "" if it could.
    """

    taken: RangeSet
    held: tuple[Pages, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Released:
    """What was given back to K1, and what stays out of its hands until it reboots; `reason` says why, "" if nothing does."""

    given_back: RangeSet
    stuck: RangeSet
    reason: str = ""


class _Obstacle(CrashkernelError):
    """Nothing can be asked of the kernel: becomes a `reason`."""


def take(ranges: RangeSet, page_size: int, root: Path = _HOST, progress: Progress | None = None) -> Quarantine:
    """Take the whole pages within `ranges` out of K1's hands; those taken before stay taken.

    The ranges must hold nothing of K1's image. `page_size` is K1's, in bytes. It never raises for a page that cannot be taken:
    that page is in `held`. Which pages are ours is on record before the first is taken, so that `release` gives them back
    whenever the taking ended.
    """
    wanted = RangeSet(inner for each in ranges if (inner := each.align_inward(page_size)) is not None)
    if not wanted:
        return Quarantine(RangeSet(), ())
    try:
        with _alone(root), _Kernel(root, page_size) as kernel:
            kernel.require_soft_offlining()
            before = _read_record(root) or _Record(_boot(root), page_size)
            record = _claim(kernel, before, wanted)
            _write_record(root, record)
            reason = _take(kernel, record.spent - before.spent, wanted, progress)
            return _seen(kernel, root, wanted, record, reason)
    except _Obstacle as obstacle:
        return Quarantine(RangeSet(), _held(root, wanted, page_size), str(obstacle))


def again(root: Path = _HOST, progress: Progress | None = None) -> Quarantine | None:
    """Ask once more for what `take` could not get: pages change hands. None when there is no quarantine."""
    try:
        record = _read_record(root)
    except _Obstacle as obstacle:
        return Quarantine(RangeSet(), (), str(obstacle))
    return None if record is None else take(record.asked, record.page_size, root, progress)


def status(root: Path = _HOST) -> Quarantine | None:
    """What is in quarantine at present, and who holds the rest of what was to be; None when there is no quarantine."""
    try:
        record = _read_record(root)
        if record is None:
            return None
        with _Kernel(root, record.page_size) as kernel:
            return _seen(kernel, root, record.asked, record)
    except _Obstacle as obstacle:
        return Quarantine(RangeSet(), (), str(obstacle))


def release(root: Path = _HOST) -> Released:
    """Give back what `take` took, in however many calls, and forget it. What a memory error took stays out.

    On the running machine the module hwpoison_inject is loaded, and debugfs mounted, for as long as it takes. Pages that K1
    does not take back stay on record: a later call tries again.
    """
    try:
        record = _read_record(root)
        if record is None:
            return Released(RangeSet(), RangeSet())
        with _alone(root), _Kernel(root, record.page_size) as kernel:
            return _release(kernel, root, (record.asked | record.spent) - record.others)
    except _Obstacle as obstacle:
        return Released(RangeSet(), RangeSet(), str(obstacle))


# ----------------------------------------------------------------------------------------------------------- taking pages


def _take(kernel: _Kernel, spend: RangeSet, wanted: RangeSet, progress: Progress | None) -> str:
    """Ask the kernel for each page; why that ended early, "" if it did not.

    Of the pages without any flag some are a driver's, others free, on a CPU's own list, where soft_offline_page does not find
    them (seen: all of freed init right after a boot). Taking any free page empties those lists (__page_handle_poison:
    drain_all_pages or zone_pcp_disable), and the next round finds theirs. What has no flag even then is not asked for: the
    kernel would refuse, and say so on the console for each.
    """
    for paddr in kernel.pages(spend):
        if kernel.flags(paddr) & _BUDDY and kernel.soft_offline(paddr) == 0:
            break
    pages = list(kernel.pages(wanted))
    clock = _Clock(progress, len(pages))
    for attempt in range(_ROUNDS):
        if attempt:
            time.sleep(_PAUSE)
        rest, asked = [], 0
        for number, paddr in enumerate(pages):
            if attempt == 0:
                clock.tell(number)
            flags = kernel.flags(paddr)  # just before: pages come into use, and out of it, at any time
            if flags & _HWPOISON:
                continue
            if flags & _MOVABLE and not flags & _IMMOVABLE:
                asked += 1
                code = kernel.soft_offline(paddr)
                if code in _REFUSALS:
                    return _REFUSALS[code]
                if code == 0 and is_out(kernel.flags(paddr)):
                    continue
            rest.append(paddr)
        pages = rest
        if not asked:
            break
    return ""


def _to_spend(kernel: _Kernel, wanted: RangeSet) -> RangeSet:
    """Free pages above those wanted, one of which is taken with them: only where no wanted page is free itself."""
    flags = [flags for _, flags in kernel.scan(wanted)]
    if 0 not in flags or any(value & _BUDDY for value in flags):
        return RangeSet()
    above = Range.sized(wanted.ranges[-1].end, _SPENT_WITHIN * kernel.page_size)
    free = (paddr for paddr, value in kernel.scan(RangeSet([above])) if value & _BUDDY)
    return kernel.set_of(islice(free, _SPENT_AT_ONCE))


_NOT_ALLOWED = "this kernel takes no page out of use for us: that needs CAP_SYS_ADMIN (run as root)"
_REFUSALS = {
    errno.EPERM: _NOT_ALLOWED,
    errno.EACCES: _NOT_ALLOWED,
    errno.EOPNOTSUPP: (
        "this kernel takes no page out of use at present: see that vm.enable_soft_offline is 1, and no filter of "
        "hwpoison_inject on"
    ),
}
"""Answers that hold for every page."""


def _seen(kernel: _Kernel, root: Path, wanted: RangeSet, record: _Record, reason: str = "") -> Quarantine:
    taken = kernel.out(wanted) - record.others
    rest = kernel.set_of(kernel.pages(wanted)) - taken  # a record may speak of more than there is memory
    return Quarantine(taken, _held(root, rest, kernel.page_size), reason)


def _held(root: Path, pages: RangeSet, page_size: int) -> tuple[Pages, ...]:
    """Who holds pages that we did not take. Of those marked all the same, a driver's among them, the flags do not tell."""
    found = read_pages(root, pages, page_size)
    return tuple(Pages(piece.range, "kernel") if piece.use == "poisoned" else piece for piece in found)


class _Clock:
    def __init__(self, progress: Progress | None, pages: int) -> None:
        self._progress, self._pages = progress, pages
        self._next = time.monotonic() + 2

    def tell(self, done: int) -> None:
        if self._progress is not None and (now := time.monotonic()) >= self._next:
            self._next = now + 1
            self._progress(done, self._pages)


# ------------------------------------------------------------------------------------------------------------ giving back


def _release(kernel: _Kernel, root: Path, ours: RangeSet) -> Released:
    poisoned = kernel.poisoned(ours)
    reason = ""
    if poisoned:
        try:
            with _unpoisoning(root) as door:
                reason = _give_back(kernel, door, kernel.pages(poisoned))
        except _Obstacle as obstacle:
            reason = str(obstacle)
    stuck = kernel.poisoned(poisoned)
    if not stuck:
        with contextlib.suppress(OSError):  # it names no page that is still out: no harm in it
            (root / RECORD).unlink()
    return Released(poisoned - stuck, stuck, reason if stuck else "")


def _give_back(kernel: _Kernel, door: Path, poisoned: Iterator[int]) -> str:
    reason = ""
    for paddr in poisoned:
        # hwpoison_unpoison, mm/hwpoison-inject.c: a page number, where soft_offline_page takes an address
        code = _write(door, str(paddr // kernel.page_size))
        if code == errno.EOPNOTSUPP:
            return "the machine had a memory error since its boot: its kernel gives no page back any more (reboot)"
        if code in (errno.EPERM, errno.EACCES):
            return "this kernel lets nobody give pages back: not root, or kernel lockdown (reboot)"
        if code:
            reason = f"the kernel did not take every page back: {os.strerror(code)} (try again later, or reboot)"
    return reason


@contextlib.contextmanager
def _unpoisoning(root: Path) -> Iterator[Path]:
    """The file that gives pages back; what has to be loaded and mounted for it is undone again.

    :raise _Obstacle: it cannot be had.
    """
    door = root / _UNPOISON
    debugfs = root / _DEBUGFS
    missing: list[tuple[list[str], list[str]]] = []
    if root == _HOST and not door.exists():
        if not (root / "sys/module" / _MODULE).exists():
            missing.append((["modprobe", _MODULE], ["modprobe", "-r", _MODULE]))
        if not any(debugfs.glob("*")):
            missing.append((["mount", "-t", "debugfs", "debugfs", str(debugfs)], ["umount", str(debugfs)]))
    with contextlib.ExitStack() as stack:
        for do, undo in missing:
            if _run(do):
                stack.callback(_run, undo)
        if not door.exists():
            raise _Obstacle(
                f"cannot give pages back: {door} is not there",
                hint=f"modprobe {_MODULE}; mount -t debugfs debugfs {debugfs}; else they come back at the next boot",
            )
        yield door


def _run(command: list[str]) -> bool:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TOOL_DEADLINE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


# ------------------------------------------------------------------------------------------------------------- the kernel


class _Kernel:
    """K1's pages: what it says of each (fs/proc/page.c), and its file that takes one out of use (drivers/base/memory.c)."""

    def __init__(self, root: Path, page_size: int) -> None:
        self.page_size = page_size
        self._door = root / _SOFT_OFFLINE
        try:
            self._file = (root / _FLAGS).open("rb", buffering=0)
        except OSError as error:
            raise _Obstacle(
                f"cannot read {root / _FLAGS}: {error.strerror}",
                hint="run as root, on a kernel with CONFIG_PROC_PAGE_MONITOR=y",
            ) from error

    def __enter__(self) -> _Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def require_soft_offlining(self) -> None:
        """:raise _Obstacle: this kernel cannot do it."""
        if not self._door.exists():
            raise _Obstacle(f"this kernel has no {self._door}", hint="boot one with CONFIG_MEMORY_FAILURE=y")

    def pages(self, ranges: RangeSet) -> Iterator[int]:
        """The address of each page, where there is memory."""
        return (paddr for paddr, flags in self.scan(ranges) if not flags & _NOPAGE)

    def scan(self, ranges: RangeSet) -> Iterator[tuple[int, int]]:
        """Address and flags of each page, as far as memory reaches."""
        for each in ranges:
            at, end = each.start // self.page_size, each.end // self.page_size
            while at < end and (flags := self._read(at, min(end - at, _AT_ONCE))):
                yield from ((page * self.page_size, value) for page, value in enumerate(flags, at))
                at += len(flags)

    def flags(self, paddr: int) -> int:
        """The flags of one page."""
        return next(iter(self._read(paddr // self.page_size, 1)), _NOPAGE)

    def out(self, ranges: RangeSet) -> RangeSet:
        """The pages that are out of K1's hands, by their flags, whoever took them."""
        return self.set_of(paddr for paddr, flags in self.scan(ranges) if is_out(flags))

    def poisoned(self, ranges: RangeSet) -> RangeSet:
        """The pages that are marked, in use or not."""
        return self.set_of(paddr for paddr, flags in self.scan(ranges) if flags & _HWPOISON)

    def set_of(self, pages: Iterator[int]) -> RangeSet:
        """The pages at these addresses as a set of bytes."""
        return RangeSet(Range.sized(paddr, self.page_size) for paddr in pages)

    def soft_offline(self, paddr: int) -> int:
        """Ask for one page; 0 or the errno."""
        return _write(self._door, hex(paddr))

    def _read(self, first: int, count: int) -> array[int]:
        try:
            data = os.pread(self._file.fileno(), count * _FLAG_SIZE, first * _FLAG_SIZE)
        except (OSError, OverflowError):  # an address beyond what a file may have
            data = b""
        return array("Q", data[: len(data) // _FLAG_SIZE * _FLAG_SIZE])


_AT_ONCE = 4096  # pages whose flags are read together


def _write(path: Path, text: str) -> int:
    """Tell the kernel something through one of its files; 0 or the errno."""
    try:
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


# ------------------------------------------------------------------------------------------------------------- the record


@dataclass(frozen=True, slots=True)
class _Record:
    """Pages that were asked for; taken, and ours to give back, are those of them that are poisoned, but for `others`.

    So it is true whenever the taking ended: it is written before. A boot forgets every poisoned page, and so `boot` tells
    whether the record is of this one.
    """

    boot: str
    page_size: int  # bytes
    asked: RangeSet = field(default_factory=RangeSet)
    others: RangeSet = field(default_factory=RangeSet)  # poisoned before we came: memory errors
    spent: RangeSet = field(default_factory=RangeSet)  # asked for as well, but only for what taking one brings about


def _claim(kernel: _Kernel, before: _Record, wanted: RangeSet) -> _Record:
    if before.page_size != kernel.page_size:
        before = _Record(before.boot, kernel.page_size)
    room = _MOST_SPENT * kernel.page_size - before.spent.total
    spend = _to_spend(kernel, wanted) if room > 0 else RangeSet()
    others = kernel.poisoned(wanted) - before.asked - before.spent
    return replace(before, asked=before.asked | wanted, others=before.others | others, spent=before.spent | spend)


def _read_record(root: Path) -> _Record | None:
    """The record of this boot.

    :raise _Obstacle: there is one, and it cannot be read.
    """
    path = root / RECORD
    try:
        raw = json.loads(path.read_text())
        if fields.mapping(raw)["format"] != FORMAT:
            raise FormatError(f"not of format {FORMAT}")
        page_size = fields.count(raw["page_size"], 1 << 32)
        asked, others, spent = (RangeSet(fields.ranges(raw[name])) for name in ("asked", "others", "spent"))
        if page_size not in PAGE_SIZES or any(end % page_size for each in (*asked, *spent) for end in (each.start, each.end)):
            raise FormatError("not whole pages")
        record = _Record(fields.text(raw["boot"]), page_size, asked, others, spent)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError, FormatError) as error:
        raise _Obstacle(
            f"cannot read {path}, the record of the quarantine: {error}",
            hint="nothing was changed; remove the file to begin anew; pages that were taken come back at the next boot, and "
            "count as a memory error's until then",
        ) from error
    return record if record.boot == _boot(root) else None


def _write_record(root: Path, record: _Record) -> None:
    """Keep the record, whole or not at all.

    :raise _Obstacle: it cannot be kept.
    """
    path = root / RECORD
    temporary = path.with_suffix(".new")
    text = json.dumps(
        {
            "format": FORMAT,
            "boot": record.boot,
            "page_size": record.page_size,
            "asked": [str(each) for each in record.asked],
            "others": [str(each) for each in record.others],
            "spent": [str(each) for each in record.spent],
        },
        indent=1,
    )
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise _Obstacle(
            f"cannot write {path}: {error.strerror}", hint="no page was taken, for want of a record to give it back by"
        ) from error


def _boot(root: Path) -> str:
    try:
        return (root / _BOOT).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keep another load or unload from changing the record meanwhile.

    :raise _Obstacle: one is at it, or the record's directory cannot be had.
    """
    directory = (root / RECORD).parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise _Obstacle(f"cannot use {directory}: {error.strerror}", hint="run as root") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise _Obstacle("another crashkernel is taking or giving back pages", hint="wait for it") from error
    finally:
        os.close(descriptor)
