"""As `crashkernel campaign run`, but that the drills are fake: FILE.toml FILE.sqlite [--retry-errors] [ADDRESS]."""

import sys
from pathlib import Path

from crashkernel.campaign.file import load_campaign
from crashkernel.campaign.run import Settings, run_campaign
from crashkernel.cli.campaign import Progress
from crashkernel.cli.display import terminable
from crashkernel.report.results import read_campaign

FAKE = (sys.executable, str(Path(__file__).parent.parent / "support" / "fakedrill.py"))


def main(file: str, db: str, *more: str) -> int:
    campaign = load_campaign(Path(file))
    settings = Settings(
        program=FAKE,
        workers=2,
        retry_errors="--retry-errors" in more,
        scheduler=next((word for word in more if word.startswith("tcp://")), ""),
    )
    progress = Progress(campaign.name)
    try:
        with terminable(), progress:
            run_campaign(campaign, Path(db), settings, progress)
    except KeyboardInterrupt:
        return 130
    return read_campaign(Path(db)).exit_status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
