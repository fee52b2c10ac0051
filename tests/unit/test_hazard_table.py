"""The hazards as text: the worst first, nothing lost, 80 columns."""

import re
from dataclasses import replace

import pytest

from crashkernel.memory import Range
from crashkernel.placement.plan import HAZARD_VERDICTS
from crashkernel.report.hazards import VERDICTS, draw_hazards, ranges_text, summary, worst_first
from crashkernel.report.picture import luminance
from support.hazards import HAZARDS

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def test_every_verdict_has_its_word():
    assert set(VERDICTS) == set(HAZARD_VERDICTS)


def test_the_worst_come_first_and_equals_keep_their_order():
    twice = [*HAZARDS, *(replace(hazard, name=f"{hazard.name}-2") for hazard in HAZARDS)]
    names = [hazard.name for hazard in worst_first(twice)]
    assert names[:4] == ["rma", "rma-2", "freed-init", "freed-init-2"]
    assert names[-2:] == ["span", "span-2"]


def test_summary_counts_each_verdict_once():
    assert summary(HAZARDS) == "1 IMPOSSIBLE, 1 DANGEROUS, 1 unknown, 1 safe because, 1 safe"
    assert summary(HAZARDS[:1] * 3) == "3 safe"
    assert summary(()) == "none checked"


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("colour", [False, True])
def test_no_line_is_wider_than_the_terminal(width, short, colour):
    text = ESCAPE.sub("", draw_hazards(HAZARDS, colour, width, short=short))
    assert max(map(len, text.splitlines())) <= width


def test_the_long_form_has_everything():
    words = " ".join(draw_hazards(HAZARDS).split())
    for hazard in HAZARDS:
        for text in (hazard.title, hazard.name, hazard.reason, hazard.advice, hazard.source, *map(str, hazard.ranges)):
            assert text in words
    assert "do: take these pages out" in words


def test_the_short_form_has_a_line_for_each():
    first, *lines = draw_hazards(HAZARDS, short=True).splitlines()
    assert first.startswith("hazards: 1 IMPOSSIBLE")
    assert len(lines) == len(HAZARDS)
    assert lines[1] == "DANGEROUS     K1's freed init pages at 0x200000-0x300000"
    assert lines[-1] == "safe          K2's span against K1's"


def test_a_short_line_is_cut_at_a_word():
    long = replace(HAZARDS[2], reason="word " * 40)
    line = draw_hazards([long], short=True).splitlines()[1]
    assert len(line) <= 80
    assert line.endswith("word...")


def test_a_verdict_is_never_told_by_colour_alone():
    coloured = draw_hazards(HAZARDS, colour=True)
    assert ESCAPE.sub("", coloured) == draw_hazards(HAZARDS)
    assert coloured != draw_hazards(HAZARDS)


def test_many_ranges_are_cut_with_their_number():
    hazard = replace(HAZARDS[1], ranges=tuple(Range(n * 16, n * 16 + 8) for n in range(30)))
    assert ranges_text(hazard).endswith(" and 22 more")


def test_what_comes_from_outside_is_made_visible():
    hazard = replace(HAZARDS[1], title="\x1b[2J", reason="\x07", advice="\udc80", source="\x00", name="\r")
    for short in (False, True):
        assert all(c.isprintable() or c == "\n" for c in draw_hazards([hazard], short=short))


@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_badge_can_be_read_in_white(verdict):
    assert 1.05 / (luminance(VERDICTS[verdict][1]) + 0.05) >= 4.5  # WCAG 2.2, 1.4.3
