"""A real campaign whose workers and driver are killed at random moments: `make kill-campaign`, a quarter of an hour."""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from crashkernel.campaign.file import load_campaign
from support.havoc import wreak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", default="campaigns/kill.toml")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--delay", type=float, default=20, help="seconds, at most, from a drill's end to a kill")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--db", type=Path, help="keep the results there")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"--seed {arguments.seed}", flush=True)
    start = time.monotonic()
    # in memory, as drills are, but where what they leave behind can be told from that of others
    with tempfile.TemporaryDirectory(prefix="crashkernel-kill-", dir="/dev/shm") as name:
        place = Path(name)
        db = arguments.db or place / "kill.sqlite"
        command = [sys.executable, "-m", "crashkernel", "campaign", "run", arguments.file, "--db", str(db)]
        environment = {**os.environ, "TMPDIR": name}
        havoc = wreak(
            command,
            db,
            place,
            drills=len(load_campaign(Path(arguments.file)).drills),
            kills=arguments.kills,
            delay=arguments.delay,
            seed=arguments.seed,
            environment=environment,
        )
    print(havoc.output)
    print(f"{havoc}; {time.monotonic() - start:.0f} s")
    return 1 if havoc.problems or set(havoc.results) != {"PASS"} or havoc.results["PASS"] != havoc.drills else 0


if __name__ == "__main__":
    sys.exit(main())
