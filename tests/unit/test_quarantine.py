"""Quarantine against a root tree with a kernel that keeps its pages in files: every refusal, every interruption."""

import errno
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel import quarantine
from crashkernel.machine.pages import read_pages
from crashkernel.memory import Range, RangeSet
from crashkernel.quarantine import Quarantine, Released, again, release, status, take

PAGE = 0x10000
PAGES = 64  # of memory

# include/uapi/linux/kernel-page-flags.h
LRU, SLAB, BUDDY, MMAP, ANON, HWPOISON, NOPAGE, PGTABLE, RESERVED = (1 << bit for bit in (5, 7, 10, 11, 12, 19, 20, 26, 32))
UPTODATE = 1 << 3
DRIVER = 0  # no flag: a driver's, or free on a CPU's own list

MOVABLE = (BUDDY, LRU | UPTODATE, LRU | ANON | MMAP)
HELD = {SLAB: "slab", PGTABLE: "pagetable", RESERVED: "kernel", DRIVER: "kernel"}


def pages(*numbers):
    return RangeSet(Range.sized(number * PAGE, PAGE) for number in numbers)


class Kernel:
    """K1 as a tree of files. What is written to two of them has the effect that the real kernel's have."""

    def __init__(self, root: Path, flags: list[int]) -> None:
        self.root = root
        self.offline = root / "sys/devices/system/memory/soft_offline_page"
        self.unpoison = root / "sys/kernel/debug/hwpoison/unpoison-pfn"
        self.flags_file = root / "proc/kpageflags"
        self.boot = root / "proc/sys/kernel/random/boot_id"
        for path in (self.offline, self.unpoison, self.flags_file, self.boot):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        self.boot.write_text("one\n")
        self.flags = flags
        self.asked: list[int] = []  # page numbers of every soft_offline_page
        self.refuse: dict[int, list[int]] = {}  # page number: errnos still to be given
        self.always = 0  # errno for everything
        self.keeps = 0  # errno for every unpoison-pfn
        self.lies = False  # says 0 and does nothing
        self.dies_after = -1  # pages
        self.cpus_own: list[int] = []  # free pages on a CPU's own list: no flag, until a free page is taken
        self.store()

    def store(self) -> None:
        self.flags_file.write_bytes(struct.pack(f"={len(self.flags)}Q", *self.flags))

    def write(self, path: Path, text: str) -> int:
        if path == self.unpoison:
            return self._unpoison(int(text))
        assert path == self.offline
        page, rest = divmod(int(text, 16), PAGE)
        assert rest == 0
        if len(self.asked) == self.dies_after:
            raise KeyboardInterrupt
        self.asked.append(page)
        return self._soft_offline(page)

    def _soft_offline(self, page: int) -> int:
        if self.always or self.refuse.get(page):
            return self.always or self.refuse[page].pop(0)
        if self.flags[page] not in MOVABLE:
            return errno.EIO
        if not self.lies:
            if self.flags[page] == BUDDY:
                for number in self.cpus_own:
                    self.flags[number] = BUDDY
                self.cpus_own = []
            self.flags[page] = HWPOISON | (self.flags[page] & (UPTODATE | ANON))  # as seen: some flags stay
            self.store()
        return 0

    def _unpoison(self, page: int) -> int:
        if self.keeps or not self.flags[page] & HWPOISON:
            return self.keeps or errno.EBUSY
        self.flags[page] = BUDDY
        self.store()
        return 0

    @property
    def poisoned(self) -> RangeSet:
        return pages(*(number for number, flags in enumerate(self.flags) if flags & HWPOISON))

    @property
    def record(self) -> Path:
        return self.root / quarantine.RECORD


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    made = Kernel(tmp_path, [BUDDY] * PAGES)
    monkeypatch.setattr(quarantine, "_write", made.write)
    monkeypatch.setattr(quarantine, "_PAUSE", 0)
    return made


def test_every_free_and_movable_page_is_taken(kernel):
    kernel.flags[:4] = [BUDDY, LRU | UPTODATE, LRU | ANON | MMAP, BUDDY]
    kernel.store()
    found = take(pages(0, 1, 2, 3), PAGE, kernel.root)
    assert found == Quarantine(pages(0, 1, 2, 3), ())
    assert kernel.poisoned == pages(0, 1, 2, 3)
    assert status(kernel.root) == found


def test_only_whole_pages_are_taken(kernel):
    found = take(RangeSet([Range(0x1000, 0x2FFFF), Range(0x40000, 0x48000)]), PAGE, kernel.root)
    assert found == Quarantine(pages(1), ())
    assert kernel.asked == [1]


def test_nothing_to_take_is_no_quarantine(kernel):
    assert take(RangeSet([Range(1, PAGE)]), PAGE, kernel.root) == Quarantine(RangeSet(), ())
    assert not kernel.record.exists()
    assert status(kernel.root) is None
    assert release(kernel.root) == Released(RangeSet(), RangeSet())


@pytest.mark.parametrize(("flags", "use"), HELD.items())
def test_what_cannot_be_moved_is_held_and_named(kernel, flags, use):
    kernel.flags[1] = flags
    kernel.store()
    found = take(pages(0, 1, 2), PAGE, kernel.root)
    assert found.taken == pages(0, 2)
    assert [(held.range, held.use) for held in found.held] == [(Range(PAGE, 2 * PAGE), use)]
    assert found.reason == ""


@pytest.mark.parametrize("flags", [SLAB, PGTABLE, RESERVED, SLAB | UPTODATE])
def test_the_kernel_is_not_asked_for_what_it_would_refuse_on_its_console(kernel, flags):
    kernel.flags[1] = flags
    kernel.store()
    take(pages(0, 1, 2), PAGE, kernel.root)
    assert kernel.asked == [0, 2]


def test_a_page_in_use_for_the_moment_is_tried_again(kernel):
    kernel.refuse = {1: [errno.EBUSY, errno.EBUSY]}
    assert take(pages(0, 1), PAGE, kernel.root) == Quarantine(pages(0, 1), ())
    assert kernel.asked == [0, 1, 1, 1]


def test_a_page_that_its_holder_gives_up_meanwhile_is_taken(kernel, monkeypatch):
    kernel.flags[0] = SLAB
    kernel.store()

    def gives_up(path, text):
        kernel.flags[0] = kernel.flags[0] if kernel.flags[0] & HWPOISON else BUDDY
        return kernel.write(path, text)

    monkeypatch.setattr(quarantine, "_write", gives_up)
    assert take(pages(0, 1), PAGE, kernel.root) == Quarantine(pages(0, 1), ())


def test_a_page_in_use_for_good_is_given_up(kernel):
    kernel.flags[1] = LRU | ANON | MMAP
    kernel.store()
    kernel.refuse = {1: [errno.EBUSY] * 100}
    found = take(pages(0, 1), PAGE, kernel.root)
    assert found.taken == pages(0)
    assert [held.use for held in found.held] == ["anonymous"]
    assert kernel.asked.count(1) == 4


def test_pages_that_a_cpu_keeps_free_for_itself_are_taken_after_a_free_one(kernel):
    kernel.flags[:2] = [DRIVER, DRIVER]
    kernel.cpus_own = [0, 1]
    kernel.store()
    assert take(pages(0, 1, 2), PAGE, kernel.root) == Quarantine(pages(0, 1, 2), ())
    assert kernel.asked == [2, 0, 1]


def test_where_no_page_is_free_one_above_is_spent_and_given_back_with_them(kernel):
    kernel.flags[:3] = [DRIVER, DRIVER, SLAB]
    kernel.cpus_own = [0, 1]
    kernel.store()
    assert take(pages(0, 1), PAGE, kernel.root) == Quarantine(pages(0, 1), ())
    assert kernel.asked == [3, 0, 1]
    assert status(kernel.root) == Quarantine(pages(0, 1), ())
    assert release(kernel.root) == Released(pages(0, 1, 3), RangeSet())
    assert kernel.poisoned == RangeSet()


def test_a_page_that_was_spent_and_is_wanted_later_is_ours_too(kernel):
    kernel.flags[0] = DRIVER
    kernel.store()
    take(pages(0), PAGE, kernel.root)
    assert kernel.poisoned == pages(1)
    assert take(pages(1), PAGE, kernel.root) == Quarantine(pages(1), ())
    assert release(kernel.root) == Released(pages(1), RangeSet())


def test_a_page_to_spend_that_is_lost_to_an_allocation_is_not_the_only_one(kernel):
    kernel.flags[0] = DRIVER
    kernel.cpus_own = [0]
    kernel.refuse = {1: [errno.EIO]}
    kernel.store()
    assert take(pages(0), PAGE, kernel.root) == Quarantine(pages(0), ())
    assert kernel.asked == [1, 2, 0]


def test_few_pages_are_spent_however_often_the_taking(kernel):
    kernel.flags[0] = DRIVER
    kernel.store()
    for _ in range(20):
        assert take(pages(0), PAGE, kernel.root).taken == RangeSet()
    assert 0 < kernel.poisoned.total <= 8 * PAGE
    release(kernel.root)
    assert kernel.poisoned == RangeSet()


def test_a_page_that_is_a_drivers_is_not_asked_for(kernel):
    kernel.flags[1] = DRIVER
    kernel.store()
    take(pages(0, 1), PAGE, kernel.root)
    assert kernel.asked == [0]


def test_success_is_not_believed_without_the_flag(kernel):
    kernel.lies = True
    found = take(pages(0, 1), PAGE, kernel.root)
    assert found.taken == RangeSet()
    assert [(held.range, held.use) for held in found.held] == [(Range(0, 2 * PAGE), "free")]


def test_success_that_was_none_is_tried_again(kernel, monkeypatch):
    """page_handle_poison can lose a page to an allocation and soft_offline_page still return 0 (its "invalidated" branch)."""
    kernel.lies = True

    def lies_twice(path, text):
        kernel.lies = len(kernel.asked) < 2
        return kernel.write(path, text)

    monkeypatch.setattr(quarantine, "_write", lies_twice)
    assert take(pages(0, 1), PAGE, kernel.root) == Quarantine(pages(0, 1), ())


def test_nobody_waits_when_there_is_nothing_left_to_ask(kernel, monkeypatch):
    waits = []
    monkeypatch.setattr(quarantine.time, "sleep", waits.append)
    kernel.flags[1] = SLAB
    kernel.store()
    take(pages(0, 1), PAGE, kernel.root)
    assert len(waits) == 1


@pytest.mark.parametrize("in_use", [LRU, SLAB, BUDDY, MMAP, PGTABLE])
def test_a_poisoned_page_that_is_in_use_is_not_out(kernel, in_use):
    """After a memory error a page of K1's own may be marked and used all the same."""
    kernel.flags[1] = HWPOISON | in_use
    kernel.store()
    found = take(pages(0, 1), PAGE, kernel.root)
    assert found.taken == pages(0)
    assert [held.range for held in found.held] == [Range(PAGE, 2 * PAGE)]


def test_holes_are_neither_taken_nor_held(kernel):
    kernel.flags[1] = NOPAGE
    kernel.store()
    assert take(pages(0, 1, PAGES + 5), PAGE, kernel.root) == Quarantine(pages(0), ())
    assert kernel.asked == [0]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.EOPNOTSUPP, "vm.enable_soft_offline"),
        (errno.EPERM, "CAP_SYS_ADMIN"),
        (errno.EACCES, "CAP_SYS_ADMIN"),
    ],
)
def test_a_kernel_that_refuses_altogether_is_asked_once(kernel, code, says):
    kernel.always = code
    found = take(pages(0, 1, 2), PAGE, kernel.root)
    assert found.taken == RangeSet()
    assert says in found.reason
    assert [(held.range, held.use) for held in found.held] == [(Range(0, 3 * PAGE), "free")]
    assert kernel.asked == [0]


def test_a_kernel_without_soft_offlining_is_a_reason(kernel):
    kernel.offline.unlink()
    found = take(pages(0, 1), PAGE, kernel.root)
    assert found.taken == RangeSet()
    assert "CONFIG_MEMORY_FAILURE" in found.reason
    assert [held.use for held in found.held] == ["free"]
    assert not kernel.record.exists()


def test_without_page_flags_nothing_is_taken(kernel):
    kernel.flags_file.unlink()
    found = take(pages(0, 1), PAGE, kernel.root)
    assert found.taken == RangeSet()
    assert "CONFIG_PROC_PAGE_MONITOR" in found.reason
    assert kernel.asked == []


def test_without_a_record_nothing_is_taken(kernel):
    (kernel.root / "run").write_text("no directory")
    found = take(pages(0, 1), PAGE, kernel.root)
    assert found.taken == RangeSet()
    assert "run/crashkernel" in found.reason
    assert kernel.asked == []


def test_a_record_that_cannot_be_written_takes_nothing(kernel):
    kernel.record.with_suffix(".new").mkdir(parents=True)
    found = take(pages(0, 1), PAGE, kernel.root)
    assert "no page was taken" in found.reason
    assert kernel.asked == []


def test_a_record_half_written_does_not_replace_the_one_before(kernel, monkeypatch):
    take(pages(0), PAGE, kernel.root)

    def disk_full(path, text):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", disk_full)
        found = take(pages(1), PAGE, kernel.root)
    assert "No space left" in found.reason
    assert kernel.asked == [0]
    assert release(kernel.root) == Released(pages(0), RangeSet())


def test_two_at_once(kernel):
    with quarantine._alone(kernel.root):
        assert "another crashkernel" in take(pages(0), PAGE, kernel.root).reason
    take(pages(0), PAGE, kernel.root)
    with quarantine._alone(kernel.root):
        assert "another crashkernel" in release(kernel.root).reason
    assert kernel.poisoned == pages(0)


def test_taken_again_is_still_ours(kernel):
    first = take(pages(0, 1), PAGE, kernel.root)
    assert take(pages(0, 1), PAGE, kernel.root) == first
    assert kernel.asked == [0, 1]
    assert release(kernel.root) == Released(pages(0, 1), RangeSet())
    assert kernel.poisoned == RangeSet()


def test_more_is_taken_later(kernel):
    kernel.flags[1] = DRIVER
    kernel.store()
    take(pages(0, 1), PAGE, kernel.root)
    kernel.flags[1] = BUDDY  # its holder gave it up
    kernel.store()
    assert take(pages(1, 2), PAGE, kernel.root) == Quarantine(pages(1, 2), ())
    assert status(kernel.root) == Quarantine(pages(0, 1, 2), ())
    assert release(kernel.root).given_back == pages(0, 1, 2)


def test_asking_again_gets_what_was_let_go_and_needs_no_plan(kernel):
    assert again(kernel.root) is None
    kernel.flags[1] = DRIVER
    kernel.store()
    assert take(pages(0, 1), PAGE, kernel.root).held
    assert again(kernel.root).taken == pages(0)
    kernel.flags[1] = BUDDY
    kernel.store()
    assert again(kernel.root) == Quarantine(pages(0, 1), ())
    kernel.record.write_text("no record")
    assert again(kernel.root).reason


def test_a_memory_errors_pages_are_not_ours_to_give_back(kernel):
    kernel.flags[1:4] = [HWPOISON, HWPOISON | SLAB, HWPOISON | LRU]
    kernel.store()
    assert take(pages(0, 1, 2), PAGE, kernel.root).taken == pages(0)
    assert take(pages(0, 1, 2, 3, 4), PAGE, kernel.root).taken == pages(0, 4)
    found = status(kernel.root)
    assert found is not None
    assert found.taken == pages(0, 4)
    held = [(each.range.start // PAGE, each.range.end // PAGE, each.use) for each in found.held]
    assert held == [(1, 2, "kernel"), (2, 3, "slab"), (3, 4, "cache")]
    assert release(kernel.root) == Released(pages(0, 4), RangeSet())
    assert kernel.poisoned == pages(1, 2, 3)


def test_a_page_that_was_never_taken_is_not_called_so_when_nothing_can_be_asked(kernel):
    kernel.flags[:3] = [HWPOISON, HWPOISON | SLAB, BUDDY]
    kernel.store()
    kernel.offline.unlink()
    assert [held.use for held in take(pages(0, 1, 2), PAGE, kernel.root).held] == ["kernel", "slab", "free"]


@given(st.lists(st.integers(0, 27).map(lambda bit: 1 << bit) | st.just(RESERVED), max_size=3).map(sum))
def test_a_page_is_out_by_the_same_rule_for_the_plan_and_for_the_quarantine(tmp_path_factory, flags):
    """What `load` takes, the plan that it makes next reads by itself."""
    kernel = Kernel(tmp_path_factory.mktemp("root"), [BUDDY] * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quarantine, "_write", kernel.write)
        assert take(pages(0, 1, 2), PAGE, kernel.root).taken == pages(0, 1, 2)
        kernel.flags[1] |= flags
        kernel.store()
        found = status(kernel.root)
    assert found is not None
    read = read_pages(kernel.root, pages(0, 1, 2), PAGE)
    assert found.taken == RangeSet(each.range for each in read if each.use == "poisoned")
    assert found.held == tuple(each for each in read if each.use != "poisoned")


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_load_killed_in_the_middle_leaves_nothing_forgotten(kernel, after):
    kernel.dies_after = after
    with pytest.raises(KeyboardInterrupt):
        take(pages(0, 1, 2), PAGE, kernel.root)
    assert kernel.poisoned == pages(*range(after))
    found = status(kernel.root)
    assert found is not None
    assert found.taken == pages(*range(after))
    assert release(kernel.root) == Released(pages(*range(after)), RangeSet())
    assert kernel.poisoned == RangeSet()
    assert not kernel.record.exists()


def test_a_release_killed_in_the_middle_goes_on_later(kernel, monkeypatch):
    take(pages(0, 1, 2), PAGE, kernel.root)
    calls = []

    def dies(path, text):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(text)
        return kernel.write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(quarantine, "_write", dies)
        with pytest.raises(KeyboardInterrupt):
            release(kernel.root)
    assert kernel.poisoned == pages(1, 2)
    assert release(kernel.root) == Released(pages(1, 2), RangeSet())


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.EOPNOTSUPP, "had a memory error"),
        (errno.EPERM, "lockdown"),
        (errno.EACCES, "lockdown"),
        (errno.EBUSY, "try again later"),
    ],
)
def test_pages_that_the_kernel_does_not_take_back_stay_on_record(kernel, code, says):
    take(pages(0, 1), PAGE, kernel.root)
    kernel.keeps = code
    found = release(kernel.root)
    assert (found.given_back, found.stuck) == (RangeSet(), pages(0, 1))
    assert says in found.reason
    kernel.keeps = 0
    assert release(kernel.root) == Released(pages(0, 1), RangeSet())


def test_a_complaint_about_a_page_that_came_back_all_the_same_is_none(kernel, monkeypatch):
    take(pages(0), PAGE, kernel.root)

    def complains(path, text):
        return kernel.write(path, text) or errno.EBUSY

    monkeypatch.setattr(quarantine, "_write", complains)
    assert release(kernel.root) == Released(pages(0), RangeSet())


def test_without_the_module_the_pages_are_stuck_and_the_way_out_is_named(kernel):
    take(pages(0, 1), PAGE, kernel.root)
    kernel.unpoison.unlink()
    found = release(kernel.root)
    assert (found.given_back, found.stuck) == (RangeSet(), pages(0, 1))
    assert "modprobe hwpoison_inject" in found.reason
    assert kernel.record.exists()


def test_on_the_running_machine_the_module_is_there_for_as_long_as_it_takes(kernel, monkeypatch):
    take(pages(0), PAGE, kernel.root)
    kernel.unpoison.unlink()
    kernel.unpoison.parent.rmdir()
    ran = []

    def run(command):
        ran.append(" ".join(command[:3]))
        if command[0] == "mount":
            kernel.unpoison.parent.mkdir()
            kernel.unpoison.touch()
        return True

    monkeypatch.setattr(quarantine, "_HOST", kernel.root)
    monkeypatch.setattr(quarantine, "_run", run)
    assert release(kernel.root) == Released(pages(0), RangeSet())
    assert ran == [
        "modprobe hwpoison_inject",
        "mount -t debugfs",
        f"umount {kernel.root / 'sys/kernel/debug'}",
        "modprobe -r hwpoison_inject",
    ]


def test_below_another_root_no_program_is_run(kernel, monkeypatch):
    take(pages(0), PAGE, kernel.root)
    kernel.unpoison.unlink()
    monkeypatch.setattr(quarantine, "_run", lambda command: pytest.fail(f"ran {command}"))
    assert release(kernel.root).stuck == pages(0)


def test_a_program_that_is_not_there_is_no_crash():
    assert quarantine._run(["/nonexistent/modprobe"]) is False


def test_a_boot_forgets_the_quarantine(kernel):
    """Poison does not outlive a boot: what is poisoned then, a memory error took."""
    take(pages(0, 1), PAGE, kernel.root)
    kernel.boot.write_text("two\n")
    kernel.flags = [BUDDY] * PAGES
    kernel.flags[0] = HWPOISON
    kernel.store()
    assert status(kernel.root) is None
    assert release(kernel.root) == Released(RangeSet(), RangeSet())
    take(pages(0, 1), PAGE, kernel.root)
    assert release(kernel.root) == Released(pages(1), RangeSet())
    assert kernel.poisoned == pages(0)


RECORD = {"format": 1, "boot": "one", "page_size": PAGE, "asked": ["0x0-0x20000"], "others": [], "spent": []}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        "\x00\xff",
        json.dumps({**RECORD, "format": 2}),
        json.dumps({**RECORD, "boot": 1}),
        json.dumps({**RECORD, "page_size": 0}),
        json.dumps({**RECORD, "page_size": 4097}),
        json.dumps({**RECORD, "page_size": True}),
        json.dumps({**RECORD, "asked": ["0x0-0x20001"]}),
        json.dumps({**RECORD, "asked": ["0x20000-0x0"]}),
        json.dumps({**RECORD, "asked": "0x0-0x20000"}),
        json.dumps({**RECORD, "asked": [7]}),
        json.dumps({**RECORD, "others": None}),
        json.dumps({**RECORD, "spent": ["0x1-0x10000"]}),
        json.dumps({name: value for name, value in RECORD.items() if name != "others"}),
    ],
)
def test_a_record_that_cannot_be_read_changes_nothing(kernel, text):
    take(pages(0), PAGE, kernel.root)
    kernel.record.write_text(text, encoding="latin-1")
    for found in (take(pages(0, 1), PAGE, kernel.root), status(kernel.root), release(kernel.root)):
        assert "quarantine.json, the record of the quarantine" in found.reason
    assert kernel.poisoned == pages(0)
    assert kernel.record.read_text(encoding="latin-1") == text


def test_a_record_of_memory_that_is_not_there_is_read_to_the_end_of_memory(kernel):
    kernel.record.parent.mkdir(parents=True)
    kernel.record.write_text(json.dumps({**RECORD, "asked": ["0x0-0xffffffffffff0000"]}))
    kernel.flags[3] = HWPOISON
    kernel.store()
    found = status(kernel.root)
    assert found is not None
    assert found.taken == pages(3)
    assert [held.range for held in found.held] == [Range(0, 3 * PAGE), Range(4 * PAGE, PAGES * PAGE)]
    assert release(kernel.root) == Released(pages(3), RangeSet())


def test_progress_is_told_only_when_it_takes_long(kernel, monkeypatch):
    told = []
    take(pages(*range(8)), PAGE, kernel.root, lambda done, wanted: told.append((done, wanted)))
    assert told == []
    now = iter(range(100))  # a page takes a second
    monkeypatch.setattr(quarantine.time, "monotonic", lambda: next(now))
    release(kernel.root)
    take(pages(*range(8)), PAGE, kernel.root, lambda done, wanted: told.append((done, wanted)))
    assert told == [(1, 8), (2, 8), (3, 8), (4, 8), (5, 8), (6, 8), (7, 8)]


@given(
    flags=st.lists(st.sampled_from([*MOVABLE, *HELD, NOPAGE, HWPOISON, HWPOISON | SLAB]), min_size=PAGES, max_size=PAGES),
    wanted=st.lists(st.tuples(st.integers(0, PAGES * PAGE), st.integers(1, 8 * PAGE)), max_size=6),
    killed=st.integers(-1, PAGES),
)
def test_what_was_not_poisoned_before_is_not_afterwards(tmp_path_factory, flags, wanted, killed):
    kernel = Kernel(tmp_path_factory.mktemp("root"), list(flags))
    kernel.dies_after = killed
    before = kernel.poisoned
    memory = pages(*(number for number, value in enumerate(flags) if value != NOPAGE))
    ranges = RangeSet(Range.sized(start, size) for start, size in wanted)
    whole = RangeSet(inner for each in ranges if (inner := each.align_inward(PAGE))) & memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quarantine, "_write", kernel.write)
        patch.setattr(quarantine, "_PAUSE", 0)
        try:
            found = take(ranges, PAGE, kernel.root)
        except KeyboardInterrupt:
            pass
        else:
            held = RangeSet(each.range for each in found.held)
            assert found.taken | held == whole
            assert not found.taken & held
            movable = pages(*(number for number, value in enumerate(flags) if value in MOVABLE))
            assert found.taken == movable & whole
            assert found.reason == ""
        assert (kernel.poisoned - before - whole).total <= PAGE  # the one that is spent
        kernel.dies_after = -1
        released = release(kernel.root)
    assert released.stuck == RangeSet()
    assert kernel.poisoned == before
    assert status(kernel.root) is None
