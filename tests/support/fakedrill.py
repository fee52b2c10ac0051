"""What a campaign's tests run in place of `crashkernel drill`: some tenths of a second, a twin's files, stages and report.

It takes its share of the ledger and works in a directory as a drill does. What comes of it is the kernel's name: `fail`,
`hang` (and ends at SIGTERM), `stubborn` (not even then), `nonsense` (as its report), `lacks` (exit status 3), `die` (by
SIGKILL); any other passes.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from crashkernel.drill import budget


def main() -> int:
    if ledger := os.environ.get("FAKE_LEDGER"):
        budget.LEDGER = Path(ledger)
    options = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
    keep = Path(sys.argv[sys.argv.index("--keep") + 1])
    kernel = options.get("kernel", "")
    signal.signal(signal.SIGTERM, signal.SIG_IGN if kernel == "stubborn" else lambda *_: sys.exit(130))
    if log := os.environ.get("FAKE_LOG"):
        with Path(log).open("a") as file:
            file.write(f"{' '.join(sys.argv[1:])}\n")
    if kernel == "lacks":
        print("crashkernel: this machine lacks a twin", file=sys.stderr)
        return 3
    with budget.working_directory(budget.Share(1, 1 << 20), lambda reason: stage("wait", f"for {reason}")) as directory:
        console = directory / "console.log"
        console.write_text("[    0.000000] Linux version\r\n[    1.0] K2 said \x1b[31m<this>\x00\n")
        times = {}
        for name in ("K1 boot", "load", "K2 boot", "capture"):
            stage(name, "")
            times[name] = round(random.uniform(0.05, 0.12), 3)
            time.sleep(times[name])
            if name == "K2 boot" and kernel in ("hang", "stubborn"):
                time.sleep(60)
            if name == "K2 boot" and kernel == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        kept = keep / options["placement"]
        kept.mkdir(parents=True)
        console.rename(kept / "console.log")
    if kernel == "nonsense":
        print('{"verdict": "PASS", "drills": []}')
        return 0
    failure = {"stage": "K2 boot", "message": "K2 boot: not\tdone after 300 s", "likely": "too little memory", "console": []}
    record = {
        "placement": options["placement"],
        "verdict": "FAIL" if kernel == "fail" else "PASS",
        "bytes_compared": 512 << 20,
        "bytes_wrong": 0,
        "bytes_missing": 0,
        "problems": [],
        "failure": failure if kernel == "fail" else None,
        "stages": times,
        "seconds": sum(times.values()),
        "kernel": "6.1.0",
        "capture_kernel": "6.12.0",
        "plan": {"moves": []},
    }
    print(json.dumps({"verdict": record["verdict"], "drills": [record]}))
    return 1 if kernel == "fail" else 0


def stage(name: str, text: str) -> None:
    with Path(os.environ[budget.STAGES_VARIABLE]).open("a") as file:
        file.write(f"{name}\t{text}\n")


if __name__ == "__main__":
    sys.exit(main())
