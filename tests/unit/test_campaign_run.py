"""The driver of a campaign, before and beside Dask: what it needs, what is refused, how long it expects things to take."""

import contextlib
import sys

import pytest

from crashkernel.campaign import worker
from crashkernel.campaign.cluster import connected
from crashkernel.campaign.file import parse_campaign
from crashkernel.campaign.run import Estimate, Settings, describe_host, run_campaign
from crashkernel.campaign.store import Result, Store, connect
from crashkernel.drill.budget import Share
from crashkernel.drill.request import DrillRequest
from crashkernel.errors import EnvironmentFault

TWO = parse_campaign('name = "t"\n[[matrix]]\nplacement = ["zero", "reserved"]\n', "t.toml")


class Listener:
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(autouse=True)
def host(monkeypatch):
    monkeypatch.setenv("CRASHKERNEL_CPUS", "2")
    monkeypatch.setenv("CRASHKERNEL_MEMORY", "8G")


def test_an_estimate_is_of_drills_alike():
    estimate = Estimate()
    plain, large, bare = DrillRequest(), DrillRequest(smp=4), DrillRequest(machine="powernv9")
    assert estimate.seconds(plain) == 20
    estimate.learn(plain, 10)
    estimate.learn(plain, 20)
    estimate.learn(bare, 60)
    assert estimate.seconds(plain) == 15
    assert estimate.seconds(large) == 15  # the same machine and kernels
    assert estimate.seconds(bare) == 60
    assert estimate.seconds(DrillRequest(kernel="debian:sid")) == 30  # of all


def test_the_time_left_is_what_waits_and_the_rest_of_what_runs():
    estimate = Estimate()
    plain, large = DrillRequest(), DrillRequest(smp=4)
    estimate.learn(plain, 10)
    estimate.learn(large, 12)
    assert estimate.left([plain] * 4, [], slots=2) == 20
    assert estimate.left([plain] * 4, [], slots=1) == 40
    assert estimate.left([large], [], slots=2) == 12  # it takes both CPUs
    assert estimate.left([], [(plain, 4), (plain, 25)], slots=2) == 3
    assert estimate.left([], [], slots=2) == 0


def test_what_a_drill_takes():
    assert DrillRequest(memory="1G", smp=4).share == Share(2, (3 << 30) + (512 << 20))
    assert DrillRequest(memory="1G", capture=31).share == Share(1, (4 << 30) + (512 << 20))


def test_limits_are_handed_on_as_the_ledger_reads_them():
    assert Settings(cpus=1, memory=3 << 30).limits == {"CRASHKERNEL_CPUS": "1", "CRASHKERNEL_MEMORY": str(3 << 30)}
    assert Settings().limits == {}
    assert Settings().local_workers == 2
    assert Settings(cpus=5).local_workers == 5
    assert Settings(cpus=5, workers=3).local_workers == 3


def test_nothing_is_started_when_nothing_is_left_to_do(tmp_path, monkeypatch):
    db = tmp_path / "t.sqlite"
    with Store.open(db, TWO, describe_host()) as store:
        for drill in store.drills():
            store.add(drill.number, Result("PASS"))
    monkeypatch.setattr("crashkernel.campaign.run.connected", None)
    run_campaign(TWO, db, Settings(), Listener())


def said(db, query):
    with contextlib.closing(connect(db)) as connection:
        return connection.execute(query).fetchall()


def test_a_campaign_whose_driver_was_killed_after_the_last_result_is_done(tmp_path):
    db = tmp_path / "t.sqlite"
    with Store.open(db, TWO, describe_host()) as store:
        store.begin_run(1, 1, "")
        for drill in store.drills():
            store.add(drill.number, Result("PASS"))
    assert said(db, "SELECT state FROM campaign") == [("running",)]
    run_campaign(TWO, db, Settings(), Listener())
    assert said(db, "SELECT state FROM campaign") == [("done",)]
    assert said(db, 'SELECT "end", ended FROM run') == [("killed", None)]


class Future:
    """One of Dask's: what it is asked for comes from `answers`, one after the other, at once; the last stays."""

    def __init__(self, key, *answers):
        self.key, self.answers, self.asked = key, list(answers), 0

    @property
    def status(self):
        return self.answers[0][0]

    def add_done_callback(self, callback):
        callback(self)

    def result(self, timeout=None):
        assert timeout is not None, "nobody starts a worker while the driver waits here"
        self.asked += 1
        status, value = self.answers[0]
        if len(self.answers) > 1:
            self.answers.pop(0)
        if status == "finished" and not isinstance(value, Exception):
            return value
        raise value or TimeoutError

    def exception(self):
        return self.answers[0][1]


class KilledWorker(Exception):
    pass


class Cluster:
    """Workers and their client: of each drill a future with the next of the answers."""

    slots = 1

    def __init__(self, *answers):
        self.client, self.answers = self, list(answers)
        self.futures, self.tended = [], 0

    def tend(self):
        self.tended += 1

    def subscribe_topic(self, topic, listener):
        pass

    def submit(self, function, task, key, **options):
        self.futures.append(Future(key, *self.answers.pop(0)))
        return self.futures[-1]

    def run(self, function, *arguments, **options):
        pass


class Observer(Listener):
    def __init__(self):
        super().__init__()
        self.results = {}

    def planned(self, pending, done, slots):
        pass

    def ended(self, drill, result):
        self.results[drill.number] = result

    def tick(self):
        pass


@pytest.fixture
def drilled(tmp_path, monkeypatch):
    """A campaign of two drills on such a cluster: what came of them."""
    monkeypatch.setattr("crashkernel.drill.budget.LEDGER", tmp_path / "ledger")
    monkeypatch.setattr("crashkernel.campaign.run._LOOK", 0.0)

    def run(cluster):
        monkeypatch.setattr("crashkernel.campaign.run.connected", lambda *_: contextlib.nullcontext(cluster))
        observer = Observer()
        run_campaign(TWO, tmp_path / "t.sqlite", Settings(program=("true",)), observer)
        return {number: result.verdict for number, result in observer.results.items()}

    return run


GOOD = ("finished", Result("PASS"))


@pytest.mark.parametrize(
    "before",
    [
        [("finished", None)],  # the worker died meanwhile
        [("pending", None)],  # before we looked
        [("lost", None), ("pending", None), ("finished", None), ("finished", None)],
    ],
)
def test_a_result_that_died_with_its_worker_is_waited_for_while_workers_are_tended(drilled, before):
    cluster = Cluster([*before, GOOD], [GOOD])
    assert drilled(cluster) == {1: "PASS", 2: "PASS"}
    assert len(cluster.futures) == 2
    assert cluster.futures[0].asked == len(before) + 1
    assert cluster.tended > len(before) + 1


def test_a_worker_that_dies_again_while_its_result_is_fetched_costs_the_drill_nothing(drilled):
    killed = KilledWorker("died 31 times")
    cluster = Cluster([("finished", killed), ("error", killed)], [GOOD], [GOOD])
    assert drilled(cluster) == {1: "PASS", 2: "PASS"}
    assert [future.key.rpartition("-")[2] for future in cluster.futures][:2] == [TWO.drills[0].key, "1"]


def test_a_drill_that_dask_could_not_run_is_told(drilled, tmp_path):
    assert drilled(Cluster([("error", MemoryError("no room"))], [GOOD])) == {1: "ERROR", 2: "PASS"}
    assert said(tmp_path / "t.sqlite", "SELECT reason FROM result WHERE drill = 1") == [("MemoryError: no room",)]


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        ([("cancelled", None)], r"the scheduler dropped a drill \(is it still running\? the same command goes on\)"),
        ([("finished", OSError("connection reset"))], r"the scheduler is gone: connection reset \(the same command goes on\)"),
    ],
)
def test_a_scheduler_that_is_gone_ends_the_run_with_what_to_do(drilled, tmp_path, answers, complaint):
    with pytest.raises(EnvironmentFault, match=complaint):
        drilled(Cluster(answers))
    assert said(tmp_path / "t.sqlite", 'SELECT state, "end" FROM campaign, run') == [("interrupted", "interrupted")]


def test_what_ended_a_run_is_told_though_its_end_cannot_be_written_down(drilled, monkeypatch):
    """A full disk takes neither the result nor that the run is over."""

    def full(*_):
        raise EnvironmentFault("no room for the end")

    def first(*_):
        raise EnvironmentFault("no room for the result")

    monkeypatch.setattr(Store, "end_run", full)
    monkeypatch.setattr(Store, "add", first)
    with pytest.raises(EnvironmentFault, match="no room for the result"):
        drilled(Cluster([GOOD]))


def test_what_this_machine_lacks_is_told_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match="this machine lacks setpriv and qemu-system-ppc64"):
        run_campaign(TWO, tmp_path / "t.sqlite", Settings(), Listener())


def test_a_worker_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(worker.shutil, "which", lambda name: name)
    assert worker.lacks(worker.__version__) == ""
    assert worker.lacks("9.9") == f"crashkernel 9.9: it has {worker.__version__}"


def test_dask_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(EnvironmentFault, match=r"a campaign needs distributed \(pip install 'crashkernel\[campaign\]'\)"),
        connected("", 1),
    ):
        pass


def test_workers_that_cannot_live_here_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setattr("crashkernel.drill.budget.LEDGER", tmp_path / "ledger")
    monkeypatch.setattr("crashkernel.campaign.cluster.sys.executable", "/bin/false")
    with pytest.raises(EnvironmentFault, match="workers end as soon as they start: they say nothing"), connected("", 1):
        pass
