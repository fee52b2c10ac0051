"""report: what came of a campaign, in the terminal and as one page."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from crashkernel.cli.command import add_command, write
from crashkernel.report.campaignjson import figures
from crashkernel.report.campaignpage import campaign_html
from crashkernel.report.campaigntext import draw_campaign
from crashkernel.report.results import read_campaign
from crashkernel.report.terminal import visible

_EPILOG = """examples:
  crashkernel report reach.db                        in the terminal
  crashkernel report reach.db --html report.html     one page for anyone: no network, no script needed
  crashkernel report reach.db --json | jq .counts

The page shows what failed and why, with the console, the memory map at that moment and the command that drills it
again; the matrix; both placements side by side; how long each stage took; what `crashkernel size` found.
A campaign that is still running is shown as far as it is.

exit status: 0 the report is made, whatever it tells (`crashkernel campaign show` has a verdict), 2 usage, 3 the
database cannot be read
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add report to the parser."""
    report = add_command(commands, "report", "what came of a campaign: in the terminal, or as one page", _EPILOG)
    report.add_argument("database", type=Path, metavar="DB", help="the results of `crashkernel campaign run`")
    report.add_argument("--html", type=Path, metavar="FILE", help="write the page, and print no more than the answer")
    report.add_argument("--json", action="store_true", help="print the figures as JSON")
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    campaign = read_campaign(arguments.database)
    if arguments.html is not None:
        write(arguments.html, campaign_html(campaign), "--html")
    if arguments.json:
        print(json.dumps(figures(campaign), indent=1))
    elif arguments.html is not None:
        print(visible(f"{campaign.name}: {campaign.headline}"))
    else:
        terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if terminal else 80
        print(draw_campaign(campaign, colour=terminal and not os.environ.get("NO_COLOR"), width=width))
    return 0
