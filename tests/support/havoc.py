"""Kill a campaign's workers and its driver at random moments, start the driver again, and look at what is left in the end."""

import random
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil


@dataclass
class Havoc:
    """What was done, and what came of it."""

    workers_killed: int = 0
    drivers_killed: int = 0
    runs: int = 0
    drills: int = 0
    results: Counter = field(default_factory=Counter)  # by verdict
    attempts: int = 0  # of all drills together
    problems: list[str] = field(default_factory=list)
    output: str = ""

    def __str__(self) -> str:
        told = ", ".join(f"{count} {verdict}" for verdict, count in self.results.items())
        return (
            f"{self.drills} drills, begun {self.attempts} times in {self.runs} runs of the driver; "
            f"{self.workers_killed} workers and {self.drivers_killed} drivers killed; results: {told}; "
            + ("; ".join(self.problems) or "no problem")
        )


def wreak(command: list[str], db: Path, place: Path, *, drills: int, kills: int, delay: float, seed: int, environment) -> Havoc:
    """Run `command` until it ends by itself, with `kills` on the way; its drills work in `place`.

    A kill comes up to `delay` seconds after some number of the `drills` have their result. Half of them, by chance, hit a
    worker, the others the driver.
    """
    chance, havoc, seen = random.Random(seed), Havoc(), {}
    moments = sorted(chance.choices(range(drills - drills // 10), k=kills))
    while True:
        havoc.runs += 1
        with (place / "output").open("ab") as output:
            driver = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            while driver.poll() is None:
                _note_results(db, seen, havoc)
                if moments and len(seen) >= moments[0]:
                    time.sleep(chance.uniform(0, delay))
                    moments.pop(0)
                    _kill_one(driver, chance, havoc)
                time.sleep(0.1)
        finally:
            driver.kill()
            driver.wait()
        if driver.returncode != -signal.SIGKILL:
            break
        _wait_for_none_in(place, havoc)
    havoc.output = (place / "output").read_text(errors="replace")
    if driver.returncode not in (0, 1):
        havoc.problems.append(f"the driver ended with {driver.returncode}")
    _look_at_database(db, seen, havoc)
    _wait_for_none_in(place, havoc)
    havoc.problems += [f"{path} is left" for path in place.glob("crashkernel-drill-*")]
    return havoc


def _kill_one(driver, chance, havoc):
    if driver.poll() is not None:
        return
    workers = [child for child in psutil.Process(driver.pid).children() if any("dask_worker" in word for word in _words(child))]
    if workers and chance.random() < 0.5:
        chance.choice(workers).kill()
        havoc.workers_killed += 1
    else:
        driver.kill()
        driver.wait()
        havoc.drivers_killed += 1


def _words(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _wait_for_none_in(place, havoc):
    """Whatever a killed driver had started ends within seconds, with nobody to end it."""
    deadline = time.monotonic() + 20
    while strays := _processes_in(place):
        if time.monotonic() > deadline:
            havoc.problems += [f"process {stray.pid} outlived its driver: {stray.info['cmdline']}" for stray in strays]
            return
        time.sleep(0.1)


def _processes_in(place):
    return [each for each in psutil.process_iter(["cmdline"]) if str(place) in " ".join(each.info["cmdline"] or ())]


def _note_results(db, seen, havoc):
    """Results that were there once must be there for good, and the same."""
    if not db.exists():
        return
    with sqlite3.connect(f"file:{db}?mode=ro", uri=True) as connection:
        now = {
            drill: (verdict, ended) for drill, verdict, ended in connection.execute("SELECT drill, verdict, ended FROM result")
        }
    connection.close()
    havoc.problems += [
        f"the result of drill {drill} was {seen[drill]}, is {now.get(drill)}" for drill in seen if now.get(drill) != seen[drill]
    ]
    seen.update(now)


def _look_at_database(db, seen, havoc):
    _note_results(db, seen, havoc)
    connection = sqlite3.connect(f"file:{db}?mode=ro", uri=True)
    havoc.drills, havoc.attempts = connection.execute("SELECT count(*), sum(attempts) FROM drill").fetchone()
    havoc.results = Counter(verdict for (verdict,) in connection.execute("SELECT verdict FROM result"))
    if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
        havoc.problems.append("the database is damaged")
    without = connection.execute("SELECT count(*) FROM drill WHERE number NOT IN (SELECT drill FROM result)").fetchone()[0]
    if without:
        havoc.problems.append(f"{without} drills have no result")
    connection.close()
