"""A campaign as JUnit XML for CI systems: the part of Ant's format that all of them read."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crashkernel.report.campaign import Campaign, Drill

_CONSOLE_LINES = 60
# what XML 1.0 has no way to write, section 2.2
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(campaign: Campaign) -> str:
    """One test case for each drill. A failure that is known is skipped with its reason; a PASS that was not expected fails."""
    counts = campaign.counts
    totals = {
        "tests": str(len(campaign.drills)),
        "failures": str(counts["failed"] + counts["surprise"]),
        "errors": str(counts["error"]),
        "skipped": str(counts["known"] + counts["missing"]),
        "time": f"{sum(result.seconds for result in campaign.results):.3f}",
    }
    suites = ET.Element("testsuites", {"name": _text(campaign.name), **totals})
    suite = ET.SubElement(suites, "testsuite", {"name": _text(campaign.name), "timestamp": campaign.created[:19], **totals})
    for drill, (classname, name) in zip(campaign.drills, _names(campaign), strict=True):
        _case(suite, campaign, drill, {"classname": classname, "name": name})
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _names(campaign: Campaign) -> list[tuple[str, str]]:
    """Class and name of each case, by which CI systems tell them apart: like titles have the drill's number behind."""
    names = [(_text(f"{campaign.name}.{drill.kernel}".replace("/", "-")), _text(drill.title)) for drill in campaign.drills]
    counts = Counter(names)
    return [
        (classname, title if counts[classname, title] == 1 else f"{title}, drill {drill.number}")
        for drill, (classname, title) in zip(campaign.drills, names, strict=True)
    ]


def _case(suite: ET.Element, campaign: Campaign, drill: Drill, names: Mapping[str, str]) -> None:
    result = drill.result
    case = ET.SubElement(suite, "testcase", {**names, "time": f"{result.seconds if result else 0.0:.3f}"})
    said = "" if result is None else f"{result.stage}: {result.reason}" if result.reason else ""
    match drill.standing:
        case "failed":
            _add(case, "failure", said, drill.command)
        case "surprise":
            _add(case, "failure", f"passed, though known to fail: {drill.known}", drill.command)
        case "error":
            _add(case, "error", said, drill.command)
        case "known":
            _add(case, "skipped", f"known to fail: {drill.known} ({said})")
        case "missing":
            _add(case, "skipped", "not run yet")
        case "passed":
            pass
    evidence = campaign.evidence.get(drill.number)
    lines = evidence.console.splitlines()[-_CONSOLE_LINES:] if evidence and drill.standing != "passed" else []
    ET.SubElement(case, "system-out").text = _text("\n".join([drill.command, *lines]))


def _add(case: ET.Element, name: str, message: str, text: str = "") -> None:
    ET.SubElement(case, name, {"message": _text(message)}).text = _text(text) or None


def _text(text: str) -> str:
    return _UNWRITABLE.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
