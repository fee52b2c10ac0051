"""The maps of a handover in a terminal: 80 columns, every region visible, every address in the table."""

import re
from dataclasses import replace

import pytest

from crashkernel.machine import Region
from crashkernel.memory import Range, RangeSet
from crashkernel.placement.plan import PLACEMENTS
from crashkernel.report.maps import draw_stages
from crashkernel.report.picture import KINDS, Picture
from crashkernel.report.terminal import nearest, paint, visible, wrap
from support.hazards import HAZARDS
from support.machines import MIB, memory_node, small_plan

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
HOSTILE = 'a\x1b[2Jb\rc\x00d\udc80e</script>"&'


@pytest.fixture(params=PLACEMENTS, scope="module")
def plan(request):
    return replace(small_plan(request.param, initrd_size=1 << 20), hazards=HAZARDS)


def stages_of(text):
    """The drawn stages, each a list of lines, by title."""
    blocks = text.split("\n\n")
    return {
        lines[0]: lines
        for lines in (block.splitlines() for block in blocks[1:])
        if any(x.startswith("reserved   |") for x in lines)
    }


def table(text, title):
    """Ranges of one of the tables."""
    after = text.split(f"\n{title}", 1)[1].split("\n\n")[0]
    return RangeSet(Range(int(a, 16), int(b, 16)) for a, b in re.findall(r"^  (0x[0-9a-f]+)-(0x[0-9a-f]+) ", after, re.M))


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("unicode", [False, True])
@pytest.mark.parametrize("width", [60, 80, 132])
def test_no_line_is_wider_than_the_terminal(plan, colour, unicode, width):
    text = ESCAPE.sub("", draw_stages(plan, colour, width, unicode=unicode))
    assert max(map(len, text.splitlines())) <= width


def test_plain_text_is_plain(plan):
    assert draw_stages(plan).isascii()
    assert "\x1b" not in draw_stages(plan, unicode=True)


def test_each_stage_is_told_with_its_title(plan):
    text = draw_stages(plan, width=132)
    for stage in Picture(plan).stages:
        assert stage.title in text


def test_a_check_is_told_under_the_map_it_does_not_change(plan):
    text = draw_stages(plan)
    frames = Picture(plan).frames()
    assert len(stages_of(text)) == len(frames) < len(Picture(plan).stages)
    assert text.count("\nreserved   |") == len(frames)
    for stage, checks in frames:
        block = next(lines for title, lines in stages_of(text).items() if stage.title.startswith(title))
        assert block[len(block) - len(checks) :] == checks


def test_a_bar_has_a_border_for_every_region(plan):
    picture = Picture(plan)
    rulers = [band.ruler(68, 2) for band in picture.bands]
    bars = [line for line in draw_stages(plan).splitlines() if re.match(r"(all memory|low memory|reserved  ) [|]", line)]
    frames = [stage for stage, _ in picture.frames()]
    drawn = [
        (stage, ruler) for stage in frames for ruler in rulers if stage in (frames[0], frames[-1]) or ruler is not rulers[0]
    ]
    for bar, (stage, ruler) in zip(bars, drawn, strict=True):
        assert len(bar) == 80
        assert bar.count("|") + bar.count("~") == len(ruler.cells(stage)) + 1


def test_the_changed_part_is_marked(plan):
    for title, lines in stages_of(draw_stages(plan)).items():
        marks = [line for line in lines if line.startswith("  changed")]
        assert bool(marks) == title.startswith(("move", "K1 has died"))
        assert all(set(line[11:]) == {"=", " "} or set(line[11:]) == {"="} for line in marks)


def test_the_tables_account_for_all_memory(plan):
    text = draw_stages(plan)
    assert table(text, "loaded\n") == table(text, "K2 starts:") == plan.memory
    assert table(text, "K2's memory\n") == plan.k2_memory
    assert table(text, "exposed:") == plan.exposed


def test_moved_memory_of_k1_is_named_by_where_it_was():
    text = draw_stages(small_plan("zero"))
    assert "K1 text from 0x0" in text
    assert "K1 freed init from 0x200000" in text
    assert "K1 memory from 0x0" in draw_stages(replace(small_plan("zero"), k1_layout=()))


def test_whose_memory_it_is_at_the_end():
    text = draw_stages(small_plan("zero"))
    row = next(line for line in text.split("K2 starts")[1].splitlines() if "K1 text from 0x0" in line)
    assert re.search(r"MiB  dump +K1 text from 0x0$", row)


def test_without_colour_each_kind_has_its_letter_in_the_legend(plan):
    text = draw_stages(plan)
    for kind in Picture(plan).kinds:
        if kind.labels[-1]:
            assert re.search(rf"^(.{{42}})? {kind.labels[-1]}  {re.escape(kind.meaning)}", text, re.M), kind


def test_the_scale_and_what_is_wider_are_told(plan):
    scale = draw_stages(plan).split("\nscale\n")[1].split("\n\n")[0]
    assert "all memory: 0x0-0x10000000, a column is" in scale
    wider = [
        text.split(" drawn wider than that: ")[1] for text in " ".join(scale.split()).split(" a column")[1:] if "wider" in text
    ]
    assert "0x0-0x1000" in wider[1]
    assert "0xa000000-0xa010000" in wider[2]  # RTAS


def test_colours_are_those_of_the_palette(plan):
    text = draw_stages(plan, colour=True)
    for kind in (kind for kind in Picture(plan).kinds if kind.labels[-1]):
        assert f"48;5;{nearest(kind.fill)}m" in text
    for line in text.splitlines():
        assert line.count("\x1b[0m") == len(ESCAPE.findall(line)) / 2, "a colour runs on into the next line"


def test_dangerous_ranges_are_marked(plan):
    lines = draw_stages(plan).splitlines()
    low = next(number for number, line in enumerate(lines) if line.startswith("low memory"))
    marks = next(line for line in lines[low:] if line.startswith("  hazards"))
    assert "!" in marks
    assert "hazards" not in draw_stages(replace(plan, hazards=()))


def test_a_fragmented_partition_stays_readable():
    nodes = [memory_node(0, 256 * MIB), *(memory_node(512 * MIB + 32 * MIB * n, 16 * MIB) for n in range(400))]
    plan = small_plan("zero", memory=nodes)
    text = draw_stages(plan)
    assert len(text.splitlines()) < 200
    assert max(map(len, text.splitlines())) <= 80
    assert "in 401 pieces" in text
    assert "a CPU with translation off reaches 0x0-0x10000000 (256 MiB, the RMA)" in text


def test_what_comes_from_outside_does_not_reach_the_terminal_as_it_is(plan):
    firmware = tuple(Region(HOSTILE, region.range) for region in plan.firmware)
    text = draw_stages(replace(plan, cmdline=HOSTILE, kernel=HOSTILE, machine=HOSTILE, firmware=firmware))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert r"\x1b[2J" in text


def test_the_colours_of_the_palette_are_a_terminals_own():
    cube = (0, 95, 135, 175, 215, 255)
    for kind in KINDS:
        index = nearest(kind.fill)
        grey = (8 + 10 * (index - 232),) * 3
        colour = grey if index >= 232 else tuple(cube[(index - 16) // step % 6] for step in (36, 6, 1))
        assert kind.fill == "#{:02x}{:02x}{:02x}".format(*colour)


def test_text_helpers():
    assert visible("plain text") == "plain text"
    assert visible(HOSTILE) == r'a\x1b[2Jb\rc\x00d\udc80e</script>"&'
    assert paint("x") == "x"
    assert paint("", bold=True) == ""
    assert paint("x", ink="#000000", fill="#ffffff", bold=True) == "\x1b[1;38;5;16;48;5;231mx\x1b[0m"
    assert wrap("one two three", 9, "- ", "  ") == ["- one two", "  three"]
    assert wrap("", 9, "- ") == ["-"]
