"""Many processes that look at pages, read and compress them; results come back in order, whatever the number of processes.

A worker is a fork of the capture. It is told which block of page frames to survey, or which pages to take: it reads those from
the source, finds the ones that are all zeros, compresses the others, and says that it is done. Requests and results lie in
memory that both share, so nothing is copied between processes. Who runs the crew writes the results, alone and in order: so a
dump is the same for any number of workers, and a worker that dies (the capture kernel is short of memory, and the kernel kills)
takes nothing with it. What it had not finished is done again, by the process that runs the crew.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import select
import signal
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from crashkernel.capture.codec import Codec, Compress, PageBatch
from crashkernel.capture.selection import PageClass, Selection, pages_of_each_class
from crashkernel.errors import CrashkernelError, EnvironmentFault
from crashkernel.vmcore.source import MissingMemory, Source

Pfns = NDArray[np.int64]
Finding = tuple[str, int, int]
_NO_PFNS: Pfns = np.empty(0, np.int64)

BATCH_BYTES = 1 << 20
"""Bytes of pages in a batch: large enough that handing it over costs little, small enough to stay in a CPU's cache."""

BLOCK = 1 << 18
"""Page frames that are surveyed at a time: 1 GiB of 4 KiB pages."""

_SLOTS = 3  # tasks a worker may have: one in hand, one waiting, one being written
_REQUEST = struct.Struct("=IIQ")  # kind of task, slot, pages or number of the block
_PAGES, _BLOCK = range(2)
_REPLY = struct.Struct("=II")  # slot, and the task's answer or _FAILED
_FAILED = 0xFFFFFFFF
_EXPENDABLE = b"500"  # oom_score_adj: of all processes here, a worker is the one that can be spared


class WorkerFailed(CrashkernelError):
    """A worker met something it could not deal with: it would fail in any other process too."""


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """A batch as it is to be written, valid until the next one is asked for.

    Of each page: its `pfns`, and where its `size` bytes lie in this process (`address`). A size of 0 is a page of zeros, and
    nothing is to be stored of it; one of a whole page is the page as it is. `unreadable` are page frames that could not be
    read; they are zeros here.
    """

    pfns: Pfns
    address: NDArray[np.uint64]
    size: NDArray[np.uint64]
    unreadable: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Surveyed:
    """A block of page frames: bits of those that are there and of those to keep, and how many there are of each class.

    Bit n of byte m is the 8m + n-th page frame of the block.
    """

    present: bytes
    kept: bytes
    classes: NDArray[np.int64]


class _Slot:
    """Shared memory for one task, and how to do it."""

    def __init__(self, capacity: int, page_size: int, block: int) -> None:
        size = PageBatch.bytes_for(capacity, page_size)
        self._memory = mmap.mmap(-1, size + 9 * capacity)
        view = memoryview(self._memory)
        self.batch = PageBatch.within(view[:size], capacity, page_size)
        rest = np.frombuffer(view[size:], np.uint8)
        self.pfns: Pfns = rest[: 8 * capacity].view(np.int64)
        self.unreadable: NDArray[np.uint8] = rest[8 * capacity :]
        self._compress: Compress | None = None
        self._words = self.batch.pages.view(np.uint64).reshape(capacity, -1)
        # a survey lies where compressed pages would
        bits = 8 * 256 + block // 8
        counts, self._present, self._kept, self._doubts = np.split(self.batch.stored, [8 * 256, bits, bits + block // 8])
        self._classes: NDArray[np.int64] = counts.view(np.int64)

    def survey(self, classes: NDArray[np.uint8], found: Iterable[Finding]) -> int:
        """Note the classes of a block's pages, and what was found doubtful about them; the size of the latter."""
        self._present[:] = np.packbits(classes != PageClass.ABSENT, bitorder="little")
        self._kept[:] = np.packbits(classes == PageClass.KEPT, bitorder="little")
        self._classes[:] = pages_of_each_class(classes)
        data = json.dumps(list(found)).encode()
        if len(data) > len(self._doubts):  # the console would not take so much either
            data = b"[]"
        self._doubts[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)

    def surveyed(self) -> Surveyed:
        """What `survey` found."""
        return Surveyed(self._present.tobytes(), self._kept.tobytes(), self._classes.copy())

    def found(self, size: int) -> list[Finding]:
        """What was found doubtful."""
        return [tuple(each) for each in json.loads(self._doubts[:size].tobytes())]

    def do(self, count: int, source: Source, codec: Codec, *, drop_zeros: bool) -> int:
        """Do the batch of the first `count` of `pfns`; how many of them could not be read."""
        if self._compress is None:  # in the worker, for it has working memory
            self._compress = codec.compressor(self.batch)
        pages = self.batch.pages[: count * self.batch.page_size]
        failed = 0
        try:
            source.read_pages(self.pfns[:count], pages)
        except (EnvironmentFault, MissingMemory):
            failed = self._read_one_by_one(count, source)
        which = np.arange(count)
        if drop_zeros:
            zero = self._zero_pages(count)
            self.batch.size[zero] = 0
            which = np.delete(which, zero)
        self._compress(which)
        return failed

    def _read_one_by_one(self, count: int, source: Source) -> int:
        """A page that cannot be read (a memory error, a hypervisor that refuses) must not cost the others."""
        self.unreadable[:count] = 0
        page_size = self.batch.page_size
        for number in range(count):
            page = self.batch.pages[number * page_size : (number + 1) * page_size]
            try:
                source.read_pages(self.pfns[number : number + 1], page)
            except (EnvironmentFault, MissingMemory):
                page[:] = 0
                self.unreadable[number] = 1
        return int(self.unreadable[:count].sum())

    def _zero_pages(self, count: int) -> NDArray[np.intp]:
        """Numbers of the pages that are all zeros: a look at a few words of each first, then at those of the few that pass."""
        words = self._words[:count]
        few = words[:, 0] | words[:, 64] | words[:, 257] | words[:, 511]
        candidates = np.flatnonzero(few == 0)
        if len(candidates):
            candidates = candidates[~words[candidates, ::8].any(axis=1)]
        if len(candidates):
            candidates = candidates[~words[candidates].any(axis=1)]
        return candidates


@dataclass(slots=True, eq=False)
class _Worker:
    pid: int
    requests: int
    replies: int
    free: list[_Slot]
    slots: list[_Slot]


@dataclass(slots=True, eq=False)
class _Job:
    kind: int
    pfns: Pfns
    block: int = 0  # its number
    worker: _Worker | None = None
    slot: _Slot | None = None
    answer: int | None = None  # once it is done


def _capacity(page_size: int) -> int:
    """How many pages a batch has."""
    return max(1, BATCH_BYTES // page_size)


@dataclass(eq=False)
class Crew:
    """`workers` processes that survey `selection`, take pages from `source` and compress them with `codec`; a context manager.

    None do it in the process that runs the crew: on a single CPU more would only take memory. With `drop_zeros` a page of zeros
    is found, not stored.
    """

    source: Source
    selection: Selection
    codec: Codec
    workers: int
    drop_zeros: bool
    _team: list[_Worker] = field(default_factory=list)
    _poll: select.poll = field(default_factory=select.poll)

    def __post_init__(self) -> None:
        self.page_size = self.source.page_size
        self.capacity = _capacity(self.page_size)
        self.block = BLOCK
        self._own = _Slot(self.capacity, self.page_size, self.block)

    def blocks(self) -> range:
        """The numbers of all blocks of page frames."""
        return range(-(-self.selection.max_pfn // self.block))

    def classes_of(self, number: int) -> NDArray[np.uint8]:
        """The class of each page frame of a block; what lies beyond the selection's last is absent."""
        start = number * self.block
        classes = np.full(self.block, PageClass.ABSENT, np.uint8)
        for chunk in self.selection.chunks_of(start, min(start + self.block, self.selection.max_pfn)):
            classes[chunk.pfn - start : chunk.pfn - start + len(chunk.classes)] = chunk.classes
        return classes

    @staticmethod
    def memory_for(page_size: int) -> int:
        """Bytes of shared memory that one worker takes; its process takes some MiB of its own."""
        return _SLOTS * (PageBatch.bytes_for(_capacity(page_size), page_size) + 9)

    def renew(self) -> None:
        """Have workers that know what the selection is now."""
        self._dismiss()
        self.__enter__()

    def __enter__(self) -> Self:
        gc.freeze()  # a collection writes to every object it looks at, and what is written to after a fork is copied
        try:
            for _ in range(self.workers):
                self._fork()
        except BaseException:
            self._dismiss()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._dismiss()

    def survey(self) -> Iterator[Surveyed]:
        """Go over all pages; yields every block from page frame 0 on. Then the selection has the findings of all workers.

        :raise WorkerFailed: something that no other process could do either.
        """
        for job in self._in_order(_Job(_BLOCK, _NO_PFNS, number) for number in self.blocks()):
            assert job.slot is not None
            for finding in job.slot.found(job.answer or 0):
                self.selection.findings.note(*finding)
            yield job.slot.surveyed()

    def run(self, batches: Iterable[Pfns]) -> Iterator[Result]:
        """Do all batches, each of at most `capacity` page frames in ascending order; yields their results in the same order.

        :raise WorkerFailed: something that no other process could do either.
        """
        for job in self._in_order(_Job(_PAGES, pfns) for pfns in batches):
            assert job.slot is not None
            count = len(job.pfns)
            unreadable = tuple(job.pfns[job.slot.unreadable[:count] != 0].tolist()) if job.answer else ()
            yield Result(job.pfns, job.slot.batch.address[:count], job.slot.batch.size[:count], unreadable)

    def _in_order(self, waiting: Iterator[_Job]) -> Iterator[_Job]:
        """Have jobs done; yields each when it is, in their order. Its slot is its own until the next is asked for."""
        jobs: deque[_Job] = deque()
        more = True
        while True:
            while more and ((not self._team and not jobs) or self._idle()):
                job = next(waiting, None)
                if job is None:
                    more = False
                else:
                    jobs.append(job)
                    if worker := self._idle():
                        self._hand_out(job, worker)
            if not jobs:
                return
            job = jobs[0]
            self._listen(jobs, wait=False)
            while job.answer is None and job.worker is not None:
                self._listen(jobs, wait=True)
            if job.answer is None:
                job.slot = self._own
                job.answer = self._do(job.slot, job)
            yield job
            jobs.popleft()
            if job.worker is not None and job.slot is not None:
                job.worker.free.append(job.slot)

    def _do(self, slot: _Slot, job: _Job) -> int:
        """Do a job in this process."""
        if job.kind == _BLOCK:
            known = set(self.selection.findings.entries())
            classes = self.classes_of(job.block)
            return slot.survey(classes, [each for each in self.selection.findings.entries() if each not in known])
        slot.pfns[: len(job.pfns)] = job.pfns
        return slot.do(len(job.pfns), self.source, self.codec, drop_zeros=self.drop_zeros)

    def _idle(self) -> _Worker | None:
        """The worker with most room for another batch."""
        best = max(self._team, key=lambda worker: len(worker.free), default=None)
        return best if best is not None and best.free else None

    def _hand_out(self, job: _Job, worker: _Worker) -> None:
        slot = worker.free.pop()
        slot.pfns[: len(job.pfns)] = job.pfns
        job.worker, job.slot = worker, slot
        request = _REQUEST.pack(job.kind, worker.slots.index(slot), job.block or len(job.pfns))
        # a worker that has died is noticed when it is listened to
        with contextlib.suppress(BrokenPipeError):
            os.write(worker.requests, request)

    def _listen(self, jobs: Iterable[_Job], *, wait: bool) -> None:
        """Note what workers have done, and which have died."""
        for descriptor, _ in self._poll.poll(None if wait else 0):
            worker = next(each for each in self._team if each.replies == descriptor)
            data = os.read(descriptor, _SLOTS * _REPLY.size)
            for number, answer in _REPLY.iter_unpack(data):
                slot = worker.slots[number]
                if answer == _FAILED:
                    size = int(slot.batch.size[0])
                    raise WorkerFailed(bytes(slot.batch.stored[:size]).decode(errors="replace"))
                job = next(each for each in jobs if each.slot is slot)
                job.answer = answer
            if not data:
                self._bury(worker, jobs)

    def _bury(self, worker: _Worker, jobs: Iterable[_Job]) -> None:
        self._let_go(worker)
        for job in jobs:
            if job.worker is worker:
                job.worker = None  # to be done again here; what is done stays valid in its slot
                if job.answer is None:
                    job.slot = None

    # -- processes

    def _fork(self) -> None:
        slots = [_Slot(self.capacity, self.page_size, self.block) for _ in range(_SLOTS)]
        their_requests, requests = os.pipe()
        replies, their_replies = os.pipe()
        pid = os.fork()
        if pid == 0:
            for worker in self._team:  # or these would never see the others' end
                os.close(worker.requests)
                os.close(worker.replies)
            os.close(requests)
            os.close(replies)
            self._work(slots, their_requests, their_replies)
        os.close(their_requests)
        os.close(their_replies)
        self._team.append(_Worker(pid, requests, replies, list(slots), slots))
        self._poll.register(replies, select.POLLIN | select.POLLHUP)

    def _work(self, slots: list[_Slot], requests: int, replies: int) -> None:
        """A worker's life; ends with its process, and never returns into the capture it was forked from."""
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is the capture's to answer
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb") as score:  # noqa: PTH123
                score.write(_EXPENDABLE)
            while request := os.read(requests, _REQUEST.size):
                kind, number, argument = _REQUEST.unpack(request)
                slot = slots[number]
                try:
                    pfns = slot.pfns[:argument] if kind == _PAGES else _NO_PFNS
                    answer = self._do(slot, _Job(kind, pfns, argument))
                except MemoryError:
                    break  # as if it had been killed
                except Exception as error:
                    text = f"{type(error).__name__}: {error}".encode()[: len(slot.batch.stored)]
                    slot.batch.stored[: len(text)] = np.frombuffer(text, np.uint8)
                    slot.batch.size[0] = len(text)
                    answer = _FAILED
                os.write(replies, _REPLY.pack(number, answer))
            status = 0
        finally:
            os._exit(status)

    def _let_go(self, *workers: _Worker) -> None:
        for worker in workers:
            self._team.remove(worker)
            self._poll.unregister(worker.replies)
            os.close(worker.requests)
            os.close(worker.replies)
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)  # a worker has nothing to lose, and may be stuck in a dead source
        for worker in workers:
            os.waitpid(worker.pid, 0)

    def _dismiss(self) -> None:
        self._let_go(*self._team)
