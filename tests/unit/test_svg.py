"""The SVG of a handover: valid XML, nothing outside it needed, everything inside its frame."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from crashkernel.machine import Region
from crashkernel.placement.plan import PLACEMENTS
from crashkernel.report.picture import KINDS, Picture
from crashkernel.report.svg import stages_svg
from support.hazards import HAZARDS
from support.machines import MIB, memory_node, small_plan

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</title></svg><script>alert(1)</script> ]]> & \" ' \x1b\x00\udc80"


@pytest.fixture(params=PLACEMENTS, scope="module")
def plan(request):
    return replace(small_plan(request.param), hazards=HAZARDS)


@pytest.fixture(scope="module")
def root(plan):
    return ElementTree.fromstring(stages_svg(plan))


def texts(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def test_is_one_svg_that_needs_nothing_else(plan, root):
    assert root.tag == f"{SVG}svg"
    used = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert used <= {"svg", "style", "defs", "pattern", "path", "rect", "circle", "text", "title", "g"}
    for element in root.iter():
        assert not any("href" in name or name.startswith("on") for name in element.attrib)
    text = stages_svg(plan)
    assert re.findall(r"url\(([^)]*)\)", text) in ([], ["#gap"])
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_has_a_ground_of_its_own(root):
    ground = next(root.iter(f"{SVG}rect"))
    grounds = [rect for rect in root.findall(f"{SVG}rect") if rect.get("fill") == "#fff"]
    assert ground is not None
    assert float(grounds[0].get("width")) >= float(root.get("width")) - 1
    assert float(grounds[0].get("height")) >= float(root.get("height")) - 1


def test_everything_lies_inside_the_frame(root):
    width, height = float(root.get("width")), float(root.get("height"))
    for element in (*root.iter(f"{SVG}rect"), *root.iter(f"{SVG}text")):
        if element.get("x") is not None:
            assert 0 <= float(element.get("x")) <= width
            assert 0 <= float(element.get("y")) <= height
        if element.get("width") and element.get("x"):
            assert float(element.get("x")) + float(element.get("width")) <= width + 2


def test_each_stage_is_told(plan, root):
    said = texts(root)
    for stage in Picture(plan).stages:
        assert stage.title in said or f"then {stage.title}" in said


def test_the_legend_names_what_is_drawn(plan, root):
    said = texts(root)
    for kind in Picture(plan).kinds:
        assert kind.meaning in said


def test_a_regions_details_are_its_title(plan, root):
    titles = [title.text for title in root.iter(f"{SVG}title")]
    picture = Picture(plan)
    ruler = picture.bands[2].ruler(884, 7)
    for cell in ruler.cells(picture.stages[0]):
        assert any(title.startswith(f"{cell.name}\n{cell.range} (") for title in titles)


def test_colours_are_those_of_the_palette(root):
    style = next(root.iter(f"{SVG}style")).text
    for kind in KINDS:
        if kind.name != "gap":
            assert f".k{kind.labels[-1]}{{fill:{kind.fill}}}" in style


def test_bars_of_a_stage_are_to_the_pictures_scale(plan, root):
    picture = Picture(plan)
    wanted = [(cell.left, cell.right - cell.left) for cell in picture.bands[0].ruler(884, 7).cells(picture.stages[0])]
    bar = next(root.iter(f"{SVG}g"))
    assert [
        (int(r.get("x")) - 100, int(r.get("width"))) for r in bar.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None
    ] == wanted


def test_the_bad_hazards_are_told(root):
    said = texts(root)
    assert "Hazards: 1 IMPOSSIBLE, 1 DANGEROUS, 1 unknown, 1 safe because, 1 safe" in said
    assert "K1's freed init pages at 0x200000-0x300000" in said
    assert "K2's span against K1's" not in said


def test_a_plan_without_hazards_says_nothing_of_them():
    assert "hazard" not in stages_svg(replace(small_plan(), hazards=())).lower()


def test_hostile_names_stay_text(plan):
    firmware = tuple(Region(HOSTILE, region.range) for region in plan.firmware)
    layout = tuple(Region(HOSTILE, region.range) for region in plan.k1_layout)
    hazards = tuple(replace(hazard, title=HOSTILE) for hazard in HAZARDS)
    text = stages_svg(replace(plan, kernel=HOSTILE, machine=HOSTILE, firmware=firmware, k1_layout=layout, hazards=hazards))
    text.encode("utf-8")
    root = ElementTree.fromstring(text)
    assert not list(root.iter(f"{SVG}script"))
    assert any("<script>" in (text or "") for text in texts(root))


def test_many_pieces_do_not_make_it_large():
    nodes = [memory_node(0, 256 * MIB), *(memory_node(512 * MIB + 32 * MIB * n, 16 * MIB) for n in range(300))]
    assert len(stages_svg(small_plan("zero", memory=nodes))) < 80_000
