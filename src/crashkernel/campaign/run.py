"""Drills of a campaign on Dask workers, until each has a result.

The driver is the only one who writes to the database. What it has not written down was not done: whenever it is killed, running
the same campaign again goes on where it stopped. A worker that dies is Dask's business, which gives its drill to another; the
host's ledger (`drill.budget`) sees to it that no host takes on more than it has.
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import subprocess
import time
import uuid
from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from crashkernel import __version__
from crashkernel.campaign import worker
from crashkernel.campaign.cluster import Workers, connected
from crashkernel.campaign.store import Result, Store, StoredDrill, utc_now
from crashkernel.drill.budget import (
    CPUS_VARIABLE,
    MEMORY_VARIABLE,
    limit,
    remove_leftovers,
)
from crashkernel.drill.request import fetch
from crashkernel.errors import CrashkernelError, EnvironmentFault
from crashkernel.report.terminal import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from distributed import Future

    from crashkernel.campaign.file import Campaign
    from crashkernel.drill.request import DrillRequest

_MOST_DEATHS = 10  # of workers in one drill: that many are its own doing
_TICK = 0.25  # seconds
_FETCH = 10  # seconds for a result to come from the worker that has it
_BAD_ENDS = ("error", "cancelled")  # of a future: there will be no result
_LOOK = 1.0  # seconds between two looks at the workers
_STOPPING = 30  # seconds for drills to end when the campaign is given up


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run a campaign. What is None follows from the host; `program` is in place of `worker.PROGRAM`."""

    scheduler: str = ""  # the address of a Dask scheduler; "": workers on this host
    workers: int | None = None
    cpus: int | None = None  # of each host, for all drills together
    memory: int | None = None  # bytes, likewise
    retry_errors: bool = False
    program: tuple[str, ...] = ()

    @property
    def limits(self) -> dict[str, str]:
        """The ledger's variables for the drills."""
        given = ((CPUS_VARIABLE, self.cpus), (MEMORY_VARIABLE, self.memory))
        return {name: str(value) for name, value in given if value is not None}

    @property
    def local_workers(self) -> int:
        """How many drills are started on this host at a time, as far as the ledger lets them."""
        return self.workers or self.cpus or limit().cpus


class Observer(Protocol):
    """Who is told what happens, in the driver's own thread."""

    def note(self, text: str) -> None:
        """Something to know."""

    def planned(self, pending: Sequence[StoredDrill], done: Sequence[tuple[DrillRequest, str, float]], slots: int) -> None:
        """These are to be drilled, so many at a time; others have their result: request, verdict, seconds."""

    def stage(self, drill: StoredDrill, name: str, text: str) -> None:
        """What a drill is doing; `name` is "" when a worker begins with it."""

    def ended(self, drill: StoredDrill, result: Result) -> None:
        """A drill has its result, and that is in the database."""

    def tick(self) -> None:
        """Time has passed."""


def run_campaign(campaign: Campaign, db: Path, settings: Settings, observer: Observer) -> None:
    """Drill what has no result yet; the results are in `db`.

    :raise UsageError: the database is another campaign's.
    :raise EnvironmentFault: Dask, QEMU or the scheduler is missing, another driver is at work, or the database's disk is full.
    """
    with Store.open(db, campaign, describe_host()) as store:
        if settings.retry_errors and (count := store.forget_errors()):
            observer.note(f"{count} that could not be run are tried again")
        pending = store.drills(pending=True)
        if not pending:
            store.finish()
            return
        if not settings.scheduler:
            if not settings.program:
                _fetch_packages([drill.request for drill in pending], observer)
            remove_leftovers()
        start = time.monotonic()
        with connected(settings.scheduler, settings.local_workers) as workers:
            slots = workers.slots if settings.scheduler else settings.local_workers
            cpus = settings.cpus or (slots if settings.scheduler else limit().cpus)
            run = store.begin_run(slots, cpus, settings.scheduler)
            try:
                observer.planned(pending, store.done(), slots)
                _Driver(campaign, store, settings, observer, workers).work(pending)
            except BaseException:
                with contextlib.suppress(CrashkernelError):  # the first fault is the one to tell
                    store.end_run(run, time.monotonic() - start, "interrupted")
                raise
            store.end_run(run, time.monotonic() - start, "done")
        if not settings.scheduler:
            remove_leftovers()


class _Driver:
    """Sends drills to workers, no more at a time than there are, and writes down what comes back."""

    def __init__(self, campaign: Campaign, store: Store, settings: Settings, observer: Observer, workers: Workers) -> None:
        self._campaign, self._store, self._settings = campaign, store, settings
        self._observer, self._workers, self._client = observer, workers, workers.client
        self._run = uuid.uuid4().hex
        self._identity = store.identity
        self._drills: dict[int, StoredDrill] = {}
        self._futures: dict[int, Future[Result]] = {}
        self._deaths: defaultdict[int, int] = defaultdict(int)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def work(self, drills: Iterable[StoredDrill]) -> None:
        """Until each has its result."""
        waiting = deque(drills)
        self._drills = {drill.number: drill for drill in waiting}
        self._client.subscribe_topic(worker.TOPIC, lambda event: self._inbox.put(lambda: self._heard(event[1])))
        slots, counted = 0, 0.0
        try:
            while waiting or self._futures:
                if time.monotonic() - counted > _LOOK:
                    self._workers.tend()
                    slots, counted = self._workers.slots, time.monotonic()
                while waiting and len(self._futures) < max(1, slots):
                    self._send(waiting.popleft())
                with contextlib.suppress(queue.Empty):
                    self._inbox.get(timeout=_TICK)()
                self._observer.tick()
        finally:
            if self._futures:
                self._stop()

    def _send(self, drill: StoredDrill) -> None:
        request = drill.request
        task = worker.Task(
            campaign=self._identity,
            run=self._run,
            drill=drill.number,
            command=tuple(request.command()),
            share=request.share,
            deadline=self._campaign.deadline,
            limits=self._settings.limits,
            program=self._settings.program,
        )
        deaths = self._deaths[drill.number]
        key = f"crashkernel-{self._identity}-{drill.key}" + (f"-{deaths}" if deaths else "")
        # in the file's order
        future = self._client.submit(worker.run_on_worker, task, key=key, pure=False, priority=-drill.number)
        self._futures[drill.number] = future
        self._watch(drill, future)

    def _watch(self, drill: StoredDrill, future: Future[Result]) -> None:
        """Have `_done` called, in this thread, when it has ended."""
        future.add_done_callback(lambda done: self._inbox.put(lambda: self._done(drill, done)))

    def _heard(self, event: dict[str, Any]) -> None:
        drill = self._drills.get(event["drill"])
        if event["campaign"] != self._identity or drill is None or drill.number not in self._futures:
            return
        if not event["stage"]:
            self._store.attempted(drill.number)
        self._observer.stage(drill, event["stage"], event["text"])

    def _done(self, drill: StoredDrill, future: Future[Result]) -> None:
        if self._futures.get(drill.number) is not future:
            return
        result = _fetched(future)
        if result is None and future.status not in _BAD_ENDS:
            self._watch(drill, future)
            return
        del self._futures[drill.number]
        result = result or self._failed(drill, future)
        if result is not None:
            self._store.add(drill.number, result)
            self._observer.ended(drill, result)

    def _failed(self, drill: StoredDrill, future: Future[Result]) -> Result | None:
        """What to say of a drill that Dask has no result of; None if it was sent again.

        :raise EnvironmentFault: Dask does not know it any more.
        """
        if future.status == "cancelled":
            raise EnvironmentFault("the scheduler dropped a drill", hint="is it still running? the same command goes on")
        error = future.exception()
        if type(error).__name__ == "KilledWorker":
            self._deaths[drill.number] += 1
            if self._deaths[drill.number] < _MOST_DEATHS:
                self._send(drill)
                return None
        now = utc_now()
        return Result("ERROR", "worker", visible(f"{type(error).__name__}: {error}"), started=now, ended=now)

    def _stop(self) -> None:
        """End the drills that run; what they did is dropped."""
        futures = list(self._futures.values())
        self._futures.clear()
        with contextlib.suppress(Exception):  # whatever has become of the scheduler, this run is over
            from distributed import wait  # noqa: PLC0415

            self._client.run(worker.stop, self._run, on_error="ignore")
            queued = [future for future in futures if not future.done()]
            wait(queued, timeout=_STOPPING)


def _fetched(future: Future[Result]) -> Result | None:
    """The result; None if there is none, or none any more: when a worker dies with it, Dask has it drilled again.

    That may want a worker that only the caller starts: it never waits for long.

    :raise EnvironmentFault: the scheduler is gone.
    """
    if future.status in _BAD_ENDS:
        return None
    try:
        return future.result(timeout=_FETCH if future.status == "finished" else _TICK)
    except TimeoutError:
        return None
    except Exception as error:
        if future.status in _BAD_ENDS:  # meanwhile
            return None
        if isinstance(error, OSError):
            raise EnvironmentFault(f"the scheduler is gone: {error}", hint="the same command goes on") from error
        raise


def _fetch_packages(requests: Iterable[DrillRequest], observer: Observer) -> None:
    """Have all packages here before several drills ask for them. One that cannot be had is its drills' business.

    :raise EnvironmentFault: QEMU is missing, or what ends it.
    """
    if lacking := worker.lacks(__version__):
        raise EnvironmentFault(f"this machine lacks {lacking}", hint="apt-get install qemu-system-ppc util-linux")
    different = {(request.kernels, request.capture is not None): request for request in requests}
    for request in different.values():
        try:
            fetch(request, lambda text: observer.note(f"packages: {text}"))
        except CrashkernelError as error:
            observer.note(f"packages: {error}")


def describe_host() -> dict[str, Any]:
    """What a result may depend on, of the driver's host; memory in bytes."""
    qemu = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(["qemu-system-ppc64", "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
        qemu = said.splitlines()[0].removeprefix("QEMU emulator version ")
    host = limit()
    return {
        "name": platform.node(),
        "cpus": os.cpu_count(),
        "memory": host.memory,
        "qemu": qemu,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
    }


@dataclass(slots=True)
class Estimate:
    """How long drills take: the mean of those like them that are done."""

    _done: dict[tuple[object, ...], list[float]] = field(default_factory=lambda: defaultdict(list))

    def learn(self, request: DrillRequest, seconds: float) -> None:
        """One more is done."""
        for kind in self._kinds(request):
            self._done[kind].append(seconds)

    def seconds(self, request: DrillRequest) -> float:
        """For one drill."""
        for kind in self._kinds(request):
            if self._done[kind]:
                return fmean(self._done[kind])
        return _USUAL

    def left(self, waiting: Iterable[DrillRequest], running: Iterable[tuple[DrillRequest, float]], slots: int) -> float:
        """For what waits, and the rest of what has been running for so many seconds; CPUs are what there is too few of."""
        work = [(request, self.seconds(request)) for request in waiting]
        work += [(request, max(0.0, self.seconds(request) - done)) for request, done in running]
        cpus = limit().cpus
        slots = max(1, min(slots, cpus))
        return sum(seconds * min(request.smp, cpus, slots) for request, seconds in work) / slots

    @staticmethod
    def _kinds(request: DrillRequest) -> list[tuple[object, ...]]:
        """What it is like, the nearest first."""
        near = (request.machine, request.kernels, request.memory, request.smp, request.fault, request.capture is None)
        return [
            near,
            near[:3],
            (),
        ]


_USUAL = 20.0  # seconds of a drill with 1 GiB on one CPU of 2020
