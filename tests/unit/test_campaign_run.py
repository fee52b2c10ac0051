"""The driver of a campaign, before and beside Dask: what it needs, what is refused, how long it expects things to take."""

import sys

import pytest

from crashkernel.campaign import worker
from crashkernel.campaign.cluster import connected
from crashkernel.campaign.file import parse_campaign
from crashkernel.campaign.run import Estimate, Settings, describe_host, run_campaign
from crashkernel.campaign.store import Result, Store
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
