"""Databases of campaigns: written by the store itself, from the records of real drills, as large and odd as a test wants.

`tests/data/drills.json` has the records of drills of Debian 6.1 on a twin of 1 GiB: both placements with 256 MiB; both with
64 MiB, which K2 does not survive; and zero with a device that wrote over K2's image, which the purgatory noticed. Each has the
last lines of its console.
"""

import contextlib
import json
import random
import sqlite3
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path

from crashkernel.campaign.file import Campaign, PlannedDrill
from crashkernel.campaign.store import Result, Store
from crashkernel.drill.request import DrillRequest

SAMPLES = json.loads((Path(__file__).parent.parent / "data" / "drills.json").read_text())
BEGUN = datetime(2026, 11, 24, 21, 30, tzinfo=UTC)
HOST = {"cpus": 2, "memory": 24 << 30, "qemu": "7.2.22", "python": "3.11.2"}
RELEASES = {
    "debian:bullseye": "5.10.0-35-powerpc64le",
    "debian:bookworm": "6.1.0-50-powerpc64le",
    "debian:trixie": "6.12.107+deb13-powerpc64le",
    "debian:trixie/powerpc64le-64k": "6.12.107+deb13-powerpc64le-64k",
    "debian:sid": "7.2.13+deb14-powerpc64le",
}
MACHINES = [
    ("pseries", "POWER8", "hash"),
    ("pseries", "POWER9", "radix"),
    ("pseries", "POWER9", "hash"),
    ("pseries", "POWER10", "radix"),
    ("powernv9", "POWER9", "radix"),
    ("powernv10", "POWER10", "radix"),
]
FAULTS = ["flip:kernel", "flip:initrd", "nmi", "dma:init+data", "double", "interrupt", "oops"]
KNOWN = "QEMU's powernv10 of 7.2 loses interrupts of the serial console"


def result_of(request, began=BEGUN, *, went="pass", pace=1.0, record=None, **changes):
    """The store's result of that request, as a real drill went, at another pace; `record` and `changes` replace parts of it."""
    sample = SAMPLES[f"{went}-{request.placement}"]
    stages = {name: round(seconds * pace, 3) for name, seconds in sample["record"]["stages"].items()}
    seconds = round(sample["record"]["seconds"] * pace, 3)
    whole = sample["record"] | {"command": " ".join(request.command()), "stages": stages, "seconds": seconds} | (record or {})
    failure = whole["failure"] or {}
    return Result(
        **{
            "verdict": whole["verdict"],
            "stage": failure.get("stage", ""),
            "reason": failure.get("message", ""),
            "release": RELEASES.get(request.kernels[0], "6.1.0-50-powerpc64le"),
            "capture_release": RELEASES.get(request.kernels[1], "6.1.0-50-powerpc64le"),
            "seconds": seconds + 0.6,  # the process itself
            "boot_seconds": stages["K1 boot"] + stages.get("K2 boot", 0.0),
            "cpu_seconds": round(seconds * 1.2, 3),
            "started": began.isoformat(),
            "ended": (began + timedelta(seconds=seconds)).isoformat(),
            "worker": "worker-1",
            "host": "laptop",
            "stages": stages,
            "record": whole,
            "console": sample["console"],
        }
        | changes
    )


def write_campaign(path, drills, *, name="reach", workers=2, end="done"):
    """A database of pairs: the planned drill, and what gives its result from its request, None where it has not run."""
    campaign = Campaign(name, "campaigns/reach.toml", f"name = {name!r}\n", tuple(planned for planned, _ in drills))
    with Store.open(path, campaign, HOST) as store:
        run = store.begin_run(workers, 2, "local")
        seconds = 0.0
        for stored, (planned, make) in zip(store.drills(), drills, strict=True):
            if make is not None:
                result = make(planned.request)
                seconds += result.seconds
                assert store.add(stored.number, result)
        if end:
            store.end_run(run, seconds / workers * 1.04, end)
    return path


SIZED = {
    "title": "debian:bookworm, pseries POWER9 radix, 1 CPU, 2 GiB, crashkernel=112M, zero, capture 31 zstd to disk",
    "placement": "zero",
    "command": "crashkernel drill --placement=zero --crashkernel=112M --capture=31",
    "found": 112 << 20,
    "passed": 4,
    "drills": 5,
    "failed": 108 << 20,
    "margin": 25,
    "recommended": 144 << 20,
    "crashkernel": "144M",
    "estimate": 115 << 20,
    "distributions": [
        {"vendor": "rhel", "size": 385 << 20, "source": "kdump-utils"},
        {"vendor": "suse", "size": 0, "source": ""},
    ],
    "accounting": {
        "reservation": 112 << 20,
        "page_size": 65536,
        "peak": "saving",
        "unpacking": {"K2's image": 40 << 20, "initrd as loaded": 30 << 20, "slabs": 12 << 20, "free": 30 << 20},
        "saving": {
            "K2's image": 40 << 20,
            "processes": 40 << 20,
            "slabs": 12 << 20,
            "else reserved at boot": -3,
            "free": 20 << 20,
        },
    },
    "trials": [],
}
"""What `crashkernel size` says, as it is put into a database."""


def add_size(path, result=SIZED):
    """Add what `crashkernel size --into` adds."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        row = (result["title"], "{}", json.dumps(result), result["found"], result["recommended"], BEGUN.isoformat())
        database.execute("INSERT INTO size VALUES (?, ?, ?, ?, ?, ?)", row)
    return path


def alter(path, *statements):
    """SQL on a closed database."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        for statement in statements:
            database.execute(statement)
    return path


def reach(path, *, drills=132, seed=0, repeats=3, failing=0.0):
    """A campaign as the house runs them: kernels by machines by CPUs by placements, then faults, and some that went wrong.

    `failing` is the share of all others that fail, too.
    """
    chance = random.Random(seed)
    configurations = [
        PlannedDrill(
            DrillRequest(kernel=kernel, machine=machine, cpu=cpu, mmu=mmu, smp=smp, placement=placement),
            known=KNOWN if (machine, kernel, smp) == ("powernv10", "debian:bullseye", 4) else "",
        )
        for kernel, (machine, cpu, mmu), smp, placement in product(RELEASES, MACHINES, (1, 4), ("zero", "reserved"))
    ]
    faulty = [
        PlannedDrill(DrillRequest(machine=machine, cpu=cpu, mmu=mmu, placement=placement, fault=(fault,), seed=repeat), repeat)
        for fault, (machine, cpu, mmu), placement in product(FAULTS, MACHINES[1:3], ("zero", "reserved"))
        for repeat in range(1, repeats + 1)
    ]
    wanted = []
    for number, planned in enumerate([*configurations, *faulty][:drills]):
        request = planned.request
        pace = chance.lognormvariate(0.25, 0.2) * (1.35 if request.machine != "pseries" else 1) * (1 + 0.06 * request.smp)
        bad = (request.kernel, request.cpu, request.smp) == ("debian:trixie/powerpc64le-64k", "POWER8", 4)
        bad = bad or (planned.known and request.placement == "zero") or chance.random() < failing
        told = [{"word": word, "title": word, "expects": "told", "told": "the purgatory told of it"} for word in request.fault]
        how = {"began": BEGUN + timedelta(seconds=10 * number), "pace": 1.0 if bad else pace, "went": "fail" if bad else "pass"}
        if request.fault == ("dma:init+data",) and request.placement == "zero" and planned.repeat == 1:
            how["went"] = "damaged"
        wanted.append((planned, lambda request, how=how, told=told: result_of(request, record={"faults": told}, **how)))
    return write_campaign(path, wanted)
