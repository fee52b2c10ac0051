"""The workers: results in order, however many work, and whatever becomes of them."""

import ctypes
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from crashkernel.capture.codec import codec_by_name
from crashkernel.capture.crew import Crew, WorkerFailed
from crashkernel.capture.selection import Findings, PageClass
from support.capture import ArraySource, ListedSelection, page_of

PAGE = 0x10000  # 16 pages to a batch
LZO = codec_by_name("lzo")


def source_of(count: int, **options) -> ArraySource:
    return ArraySource({pfn: page_of(pfn % 5, pfn, PAGE) for pfn in range(count)}, PAGE, **options)


def crew_of(count: int, workers: int, drop_zeros: bool) -> Crew:
    source = source_of(count)
    return Crew(source, ListedSelection(source, {}), LZO, workers, drop_zeros)


def batches(pfns, capacity):
    pfns = np.asarray(list(pfns), np.int64)
    return [pfns[start : start + capacity] for start in range(0, len(pfns), capacity)]


def run(crew: Crew, pfns, after=lambda number: None) -> list[tuple[int, bytes]]:
    """Each page frame with its stored bytes."""
    found = []
    for number, result in enumerate(crew.run(batches(pfns, crew.capacity))):
        for pfn, address, size in zip(result.pfns.tolist(), result.address.tolist(), result.size.tolist(), strict=True):
            found.append((pfn, ctypes.string_at(address, size) if size else b""))
        after(number)
    return found


def check(found, source, pfns):
    assert [pfn for pfn, _ in found] == list(pfns)
    for pfn, data in found:
        page = source.pages[pfn]
        if not any(page):
            assert data == b""
        else:
            assert (data if len(data) == PAGE else LZO.decompress(data, PAGE)) == page


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_results_come_in_order_and_are_the_same_for_any_number_of_workers(workers):
    source = source_of(200)
    pfns = [pfn for pfn in range(200) if pfn % 7]
    with Crew(source, ListedSelection(source, {}), LZO, 1, True) as crew:
        alone = run(crew, pfns)
    with Crew(source, ListedSelection(source, {}), LZO, workers, True) as crew:
        together = run(crew, pfns)
    check(together, source, pfns)
    assert together == alone


def test_zero_pages_are_stored_when_they_are_not_to_be_dropped():
    source = source_of(20)
    with Crew(source, ListedSelection(source, {}), LZO, 1, False) as crew:
        found = run(crew, range(20))
    assert all(data for _, data in found)
    assert LZO.decompress(found[5][1], PAGE) == bytes(PAGE)


@pytest.mark.parametrize("victims", [1, 2])
def test_a_killed_worker_costs_nothing(victims):
    source = source_of(400)

    with Crew(source, ListedSelection(source, {}), LZO, 2, True) as crew:
        pids = [worker.pid for worker in crew._team]

        def kill(number):
            if number == 3:
                for pid in pids[:victims]:
                    os.kill(pid, signal.SIGKILL)

        found = run(crew, range(400), kill)
    check(found, source, range(400))


def test_workers_killed_before_they_began_cost_nothing():
    source = source_of(50)
    with Crew(source, ListedSelection(source, {}), LZO, 2, True) as crew:
        for worker in crew._team:
            os.kill(worker.pid, signal.SIGKILL)
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        check(run(crew, range(50)), source, range(50))


def test_pages_that_cannot_be_read_are_zeros_and_named():
    source = source_of(64, broken=(3, 40, 41))
    unreadable = []
    with Crew(source, ListedSelection(source, {}), LZO, 2, True) as crew:
        for result in crew.run(batches(range(64), crew.capacity)):
            unreadable += result.unreadable
            for pfn, size in zip(result.pfns.tolist(), result.size.tolist(), strict=True):
                assert (size == 0) == (pfn in source.broken or pfn % 5 == 0)
    assert unreadable == [3, 40, 41]


def test_a_page_that_is_not_in_the_source_is_unreadable_too():
    source = source_of(4)
    with Crew(source, ListedSelection(source, {}), LZO, 1, True) as crew:
        (result,) = crew.run([np.array([1, 2, 99])])
        assert result.unreadable == (99,)


def test_what_no_process_could_do_is_an_error_with_its_reason():
    class Bad(ArraySource):
        def read_pages(self, pfns, into):
            raise ZeroDivisionError("bad luck")

    source = Bad({0: bytes(PAGE)}, PAGE)
    with (
        Crew(source, ListedSelection(source, {}), LZO, 1, True) as crew,
        pytest.raises(WorkerFailed, match="ZeroDivisionError: bad luck"),
    ):
        list(crew.run([np.array([0])]))


def test_nothing_is_left_behind():
    before = len(list(Path("/proc/self/fd").iterdir()))
    with crew_of(10, 3, True) as crew:
        pids = [worker.pid for worker in crew._team]
        generator = crew.run(batches(range(10), 2))
        next(generator)  # and not the others
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_nothing_to_do():
    with crew_of(1, 2, True) as crew:
        assert list(crew.run([])) == []


def test_workers_die_with_who_runs_them():
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with crew_of(1, 2, True) as crew:
            os.write(write_end, b"".join(worker.pid.to_bytes(8, "little") for worker in crew._team))
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(write_end)
    os.waitpid(pid, 0)
    data = os.read(read_end, 100)
    assert len(data) == 16
    assert os.read(read_end, 1) == b"", "the workers hold the other end of the pipe until they end"
    os.close(read_end)


def survey(source, workers, kill=False, **options):
    """What a survey finds of pages that are kept, cached or free, and its selection."""
    classes = {pfn: PageClass.FREE for pfn in source.pages if pfn % 3 == 1} | {7: PageClass.CACHE}
    selection = ListedSelection(source, classes, **options)
    found = []
    with Crew(source, selection, LZO, workers, True) as crew:
        for block in crew.survey():
            found.append((block.present, block.kept, block.classes.tolist()))
            if kill and len(found) == 2:
                for worker in crew._team:
                    os.kill(worker.pid, signal.SIGKILL)
    return found, selection, classes


@pytest.mark.parametrize(("workers", "kill"), [(0, False), (1, False), (3, False), (2, True)])
def test_a_survey_is_the_same_whoever_does_it(monkeypatch, workers, kill):
    monkeypatch.setattr("crashkernel.capture.crew.BLOCK", 64)
    source = source_of(700)
    del source.pages[100], source.pages[699]
    doubtful = (128, 640)
    found, selection, classes = survey(source, workers, kill, doubtful=doubtful)
    assert len(found) == 11
    for place, wanted in ((0, set(source.pages)), (1, set(source.pages) - set(classes))):
        bits = np.unpackbits(np.frombuffer(b"".join(block[place] for block in found), np.uint8), bitorder="little")
        assert set(np.flatnonzero(bits).tolist()) == wanted
    totals = np.sum([block[2] for block in found], axis=0)
    assert (totals[PageClass.KEPT], totals[PageClass.CACHE]) == (len(source.pages) - len(classes), 1)
    assert selection.findings.doubts() == ["nobody knows what 10 pages from 0x80 on are"]


def test_findings_count_once_at_each_place():
    findings = Findings()
    findings.note("plain")
    for _ in range(2):
        findings.note("{count} pages from {place} on", 0x200, 1000)
        findings.note("{count} pages from {place} on", 0x100, 500)
    again = Findings()
    for entry in findings.entries():
        again.note(*entry)
    assert again.doubts() == findings.doubts() == ["plain", "1,500 pages from 0x100 on"]
