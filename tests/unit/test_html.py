"""The page: one file, all stages readable without its script, nothing from a plan executed, the plan itself inside."""

import re
from dataclasses import replace

import pytest

from crashkernel.machine import Region
from crashkernel.memory import format_size
from crashkernel.placement.plan import PLACEMENTS, LoadPlan
from crashkernel.report.html import stages_html
from crashkernel.report.picture import Picture
from support.hazards import HAZARDS
from support.machines import small_plan
from support.webpage import HOSTILE, Page


@pytest.fixture(params=PLACEMENTS, scope="module")
def plan(request):
    return replace(small_plan(request.param), hazards=HAZARDS)


@pytest.fixture(scope="module")
def page(plan):
    return Page(stages_html(plan))


def test_needs_nothing_else(plan, page):
    assert not {"link", "img", "iframe", "object", "base"} & {e["tag"] for e in page.elements}
    assert not [e for e in page.elements if "src" in e]
    assert all(e["href"].startswith("#") for e in page.elements if "href" in e)
    assert not re.search(r"https?:|@import|url\(", stages_html(plan))


def test_is_a_page_a_phone_and_a_screen_reader_can_use(page):
    assert page.all("html")[0]["lang"] == "en"
    assert [e for e in page.all("meta") if e.get("name") == "viewport" and "width=device-width" in e["content"]]
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("title")) == 1
    ids = [e["id"] for e in page.elements if "id" in e]
    assert len(set(ids)) == len(ids)
    for element in page.elements:
        for reference in element.get("aria-labelledby", "").split():
            assert reference in ids
        if element["tag"] in ("button", "input"):
            assert element.get("aria-label") or element.get("title") or element["text"].strip()
    assert page.by_id("told")["role"] == "status"


def test_every_stage_is_there_without_the_script(plan, page):
    stages = Picture(plan).stages
    sections = page.all("section", "stage")
    assert [e["text"] for e in page.all("h2") if e["inside"][-1] == "section" and e.get("id", "").startswith("title-")] == [
        stage.title for stage in stages
    ]
    assert not any("hidden" in e for e in sections)
    assert [e["href"] for e in page.all("a") if "ol" in e["inside"]] == [f"#{e['id']}" for e in sections]
    # only the script's own class hides a stage
    style = page.all("style")[0]["text"]
    assert ".js .stage:not(.on){display:none}" in style
    assert ".js .stage:not(.on){display:block!important" in style.split("@media print")[1]
    assert int(page.by_id("slider")["max"]) == len(stages) - 1


def test_each_region_tells_what_it_is(plan, page):
    picture = Picture(plan)
    titles = [e["title"].split("\n") for e in page.all("button", "cell")]
    for stage in picture.stages:
        for band in picture.bands:
            for cell in band.ruler(10_000, 150).cells(stage):
                size = format_size(sum(piece.range.size for piece in cell.pieces))
                assert any(t[:5] == [cell.name, str(cell.range), size, *cell.details] for t in titles)


def test_regions_fill_their_bars(page):
    ends = {}
    for element in page.all("button", "cell"):
        left, width = (float(n) for n in re.findall(r"([\d.]+)%", element["style"]))
        assert 0 <= left < 100
        assert width > 0
        ends[id(element)] = left + width
    assert max(ends.values()) == pytest.approx(100, abs=0.02)


def test_the_table_of_the_last_stage_has_all_of_k1s_memory(plan, page):
    rows = [e["text"] for e in page.all("tr")]
    for kept in plan.kept:
        if kept.location != kept.range.start:
            assert any(f"from {kept.range.start:#x}" in row for row in rows)


def test_what_a_stage_changed_is_listed(plan, page):
    picture = Picture(plan)
    items = [e["text"] for e in page.all("li") if "section" in e["inside"]]
    for number in range(len(picture.stages)):
        for where, before, after in picture.changes(number)[:12]:
            told = "as before" if before == after else f"{before} \N{RIGHTWARDS ARROW} {after}"
            assert f"{where} ({format_size(where.size)}): {told}" in items


def test_hazards_are_told_with_their_verdict_in_words(page):
    articles = [e["text"] for e in page.all("article", "hazard")]
    assert articles[0].startswith("IMPOSSIBLE")
    assert len(articles) == len(HAZARDS)
    for hazard in HAZARDS:
        text = next(text for text in articles if hazard.title in text)
        for part in (hazard.reason, hazard.advice, hazard.source, *map(str, hazard.ranges)):
            assert part in text


def test_the_plan_can_be_taken_out_again(plan, page):
    assert LoadPlan.from_json(page.by_id("plan")["text"]) == plan
    assert any(plan.cmdline == e["text"] for e in page.all("pre"))


class TestHostile:
    @pytest.fixture
    def evil(self):
        plan = small_plan("zero")
        return replace(
            plan,
            kernel=HOSTILE,
            cmdline=HOSTILE,
            machine=HOSTILE,
            firmware=tuple(Region(HOSTILE, region.range) for region in plan.firmware),
            k1_layout=tuple(Region(HOSTILE, region.range) for region in plan.k1_layout),
            hazards=tuple(
                replace(h, name=HOSTILE, title=HOSTILE, reason=HOSTILE, advice=HOSTILE, source=HOSTILE) for h in HAZARDS
            ),
        )

    def test_no_element_and_no_attribute_of_its_own(self, plan, evil):
        usual, page = Page(stages_html(small_plan("zero"))), Page(stages_html(evil))
        assert {e["tag"] for e in page.elements} <= {e["tag"] for e in usual.elements} | {"article", "h3", "strong"}
        assert len(page.all("script")) == len(page.all("style")) == 1
        assert not [name for e in page.elements for name in e if name.startswith("on") or name == "autofocus"]

    def test_the_script_and_the_style_are_the_same_for_every_plan(self, page, evil):
        hostile = Page(stages_html(evil))
        for tag in ("script", "style"):
            assert hostile.all(tag)[0]["text"] == page.all(tag)[0]["text"]

    def test_it_can_be_written_as_utf_8_and_says_what_was_there(self, evil):
        text = stages_html(evil)
        assert "\x00" not in text
        assert "\x1b" not in text
        assert r"\x1b\x00\udc80" in Page(text.encode("utf-8").decode("utf-8")).all("pre")[0]["text"]

    def test_the_plan_is_whole_all_the_same(self, evil):
        assert LoadPlan.from_json(Page(stages_html(evil)).by_id("plan")["text"]) == evil
