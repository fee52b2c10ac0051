"""The driver of a campaign whose drills are fake: FILE.toml FILE.sqlite."""

import sys
from pathlib import Path

from crashkernel.campaign.file import load_campaign
from crashkernel.campaign.run import Settings, run_campaign
from crashkernel.cli.campaign import Progress
from crashkernel.cli.display import terminable

FAKE = (sys.executable, str(Path(__file__).parent.parent / "support" / "fakedrill.py"))

if __name__ == "__main__":
    campaign = load_campaign(Path(sys.argv[1]))
    progress = Progress(campaign.name)
    with terminable(), progress:
        run_campaign(campaign, Path(sys.argv[2]), Settings(program=FAKE, workers=2), progress)
