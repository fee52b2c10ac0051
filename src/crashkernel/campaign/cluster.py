"""Dask workers for a campaign: those of a cluster that is there, or processes on this host that live as long as the driver.

Workers on this host are started anew when they die, at any moment of theirs; Dask's own nanny gives up on one that is
killed while it starts. The kernel kills them when the driver dies.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crashkernel import __version__
from crashkernel.campaign import worker
from crashkernel.drill.budget import places, private_directory
from crashkernel.errors import EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from distributed import Client

_CONNECT = 10  # seconds to find a scheduler
_FIRST = 60  # seconds until there is a worker
_HASTE = 15  # seconds: a worker that dies sooner, time after time, cannot live here
_MOST_HASTY = 20
_FAREWELL = 10  # seconds for workers to end
_SILENT = logging.CRITICAL + 1


class Workers:
    """A client of the scheduler, and how many drills its workers take at a time."""

    def __init__(self, client: Client) -> None:
        self.client = client

    @property
    def slots(self) -> int:
        """Drills at a time, 0 while no worker is there.

        :raise EnvironmentFault: the scheduler is gone.
        """
        try:
            return sum(self.client.nthreads().values())
        except OSError as error:
            raise EnvironmentFault(f"the scheduler is gone: {error}", hint="the same command goes on") from error

    def tend(self) -> None:
        """Start what died anew, where that is ours to do.

        :raise EnvironmentFault: workers do not stay alive.
        """


class _LocalWorkers(Workers):
    def __init__(self, client: Client, address: str, count: int, scratch: Path) -> None:
        super().__init__(client)
        self._address, self._scratch = address, scratch
        self._started = 0
        self._hasty = 0
        self._processes = [self._start() for _ in range(count)]

    def tend(self) -> None:
        for slot, process in enumerate(self._processes):
            if process.running.poll() is None:
                continue
            self._hasty = self._hasty + 1 if time.monotonic() - process.since < _HASTE else 0
            if self._hasty > _MOST_HASTY:
                said = process.log.read_text(errors="replace").strip().splitlines()
                raise EnvironmentFault(f"workers end as soon as they start: {said[-1] if said else 'they say nothing'}")
            self._processes[slot] = self._start()

    def end(self) -> None:
        """None of them lives when this returns."""
        for process in self._processes:
            process.running.terminate()
        deadline = time.monotonic() + _FAREWELL
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.running.wait(max(0.1, deadline - time.monotonic()))
            process.running.kill()
            process.running.wait()

    def _start(self) -> _Process:
        self._started += 1
        log = self._scratch / f"worker-{self._started}.log"
        with log.open("wb") as sink:
            running = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "distributed.cli.dask_worker", self._address,
                 "--name", str(self._started), "--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0",
                 "--local-directory", str(self._scratch), "--death-timeout", str(_FIRST)],
                # a session of its own: a Ctrl-C is the driver's to handle
                stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True,
            )  # fmt: skip
        return _Process(running, log, time.monotonic())


@dataclass(frozen=True, slots=True)
class _Process:
    running: subprocess.Popen[bytes]
    log: Path
    since: float


@contextlib.contextmanager
def connected(scheduler: str, count: int) -> Iterator[Workers]:
    """The workers of the Dask scheduler at `scheduler`; if that is "", `count` on this host, which end with the context.

    :raise EnvironmentFault: Dask is not installed, or there is no scheduler, or no worker.
    """
    try:
        import dask  # noqa: PLC0415
        from distributed import Client, LocalCluster  # noqa: PLC0415
    except ImportError as error:
        raise EnvironmentFault("a campaign needs distributed", hint="pip install 'crashkernel[campaign]'") from error
    with contextlib.ExitStack() as stack:
        for name in ("distributed", "tornado", "asyncio"):  # of workers that were killed, mostly
            stack.enter_context(_quiet(logging.getLogger(name)))
        if scheduler:
            yield Workers(stack.enter_context(_client_of(scheduler)))
            return
        scratch = stack.enter_context(private_directory(places()[-1]))
        # as often as it takes: whoever kills workers is not to cost a drill its result
        settled = {"distributed.scheduler.allowed-failures": 30, "temporary-directory": str(scratch)}
        stack.enter_context(dask.config.set(settled))
        quiet = {"dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}, "silence_logs": _SILENT}
        cluster = stack.enter_context(LocalCluster(n_workers=0, **quiet))
        client = stack.enter_context(Client(cluster, set_as_default=False))
        workers = _LocalWorkers(client, cluster.scheduler_address, count, scratch)
        stack.callback(workers.end)
        deadline = time.monotonic() + _FIRST
        while not workers.slots:
            workers.tend()
            if time.monotonic() > deadline:
                raise EnvironmentFault(f"no worker started within {_FIRST} s")
            time.sleep(0.1)
        yield workers


@contextlib.contextmanager
def _client_of(scheduler: str) -> Iterator[Client]:
    from distributed import Client  # noqa: PLC0415

    hint = "start them with `dask scheduler` and `dask worker ADDRESS --nthreads 1`"
    try:
        client = Client(scheduler, timeout=_CONNECT, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise EnvironmentFault(f"no Dask scheduler at {scheduler}: {error}", hint=hint) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_FIRST)
        except TimeoutError as error:
            raise EnvironmentFault(f"the scheduler at {scheduler} has no worker", hint=hint) from error
        _require_equipped(client)
        yield client


def _require_equipped(client: Client) -> None:
    """Refuse workers on which no drill can be run, before every drill says so.

    :raise EnvironmentFault: one lacks something.
    """
    try:
        lacking = client.run(worker.lacks, __version__)
    except Exception as error:  # whatever it is that keeps the package from being imported there
        raise EnvironmentFault(
            f"a worker cannot run drills: {error}", hint=f"install crashkernel {__version__} where the workers run"
        ) from error
    for address, what in lacking.items():
        if what:
            raise EnvironmentFault(f"the worker {address} lacks {what}")


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(_SILENT)
    try:
        yield
    finally:
        logger.setLevel(level)
