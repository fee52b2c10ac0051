"""The report in Chromium: on a phone, on a desk, in the dark, on paper, by keyboard, without its script, full of mischief."""

import json
import sqlite3

import pytest

from crashkernel.campaign.file import PlannedDrill
from crashkernel.drill.request import DrillRequest
from crashkernel.report.campaignpage import campaign_html
from crashkernel.report.results import read_campaign
from support import campaigns
from support.browser import A4, DESK, PHONE

OPEN_ALL = "document.querySelectorAll('details').forEach(each => { each.open = true; });"

# Of every text that can be seen: its colour against the nearest ground that is not transparent, as WCAG 2.2 counts it (1.4.3).
CONTRASTS = """
const channel = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
const read = colour => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = ([red, green, blue]) =>
  0.2126 * channel(red / 255) + 0.7152 * channel(green / 255) + 0.0722 * channel(blue / 255);
const ground = element => {
  for (let at = element; at; at = at.parentElement) {
    const colour = read(getComputedStyle(at).backgroundColor);
    if (colour[3] === 255) return colour;
    if (colour[3] !== 0) throw new Error('a ground that lets through');
  }
  return [255, 255, 255];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), bad = [];
let seen = 0;
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, style = getComputedStyle(element);
  if (!walker.currentNode.data.trim() || element.closest('svg, script') || !element.checkVisibility()) continue;
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  const [one, two] = [light(read(style.color)), light(ground(element))];
  const contrast = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
  seen += 1;
  if (contrast < (large ? 3 : 4.5)) bad.push([walker.currentNode.data.slice(0, 40), style.color, contrast]);
}
return [seen, bad];
"""

# Clicks each link of the page, and tells of those that do not bring what they name into view, opened.
FOLLOW = """
const done = arguments[0], frame = () => new Promise(resolve => requestAnimationFrame(() => setTimeout(resolve)));
(async () => {
  const bad = [], links = [...document.querySelectorAll(arguments[1] ?? 'a[href^="#"]:not(.skip)')];
  for (const link of links) {
    document.querySelectorAll('details.drill[open]').forEach(each => { each.open = false; });
    history.replaceState(null, '', '#');
    link.click();
    await frame();
    const target = document.getElementById(link.hash.slice(1)), at = target.getBoundingClientRect();
    const seen = at.height > 0 && at.top >= -1 && at.top < innerHeight - 20;
    if (!seen || (target.matches('details') && !target.open)) bad.push([link.hash, at.top, at.height, target.open ?? null]);
  }
  done([links.length, bad]);
})();
"""

ROWS = "return [...document.querySelectorAll('.list tbody tr')].filter(row => row.checkVisibility()).length"


class TestReading:
    @pytest.mark.parametrize("dark", [False, True])
    def test_no_page_wide_scrolling_on_a_phone(self, browser, reach, dark):
        browser.show(reach[1], PHONE, dark=dark)
        for script in ("", OPEN_ALL):
            browser.run(script)
            assert browser.run("return [document.documentElement.scrollWidth, innerWidth]") == [PHONE, PHONE]

    def test_the_matrix_fits_a_phone(self, browser, reach):
        browser.show(reach[1], PHONE)
        assert browser.run(
            "const box = document.querySelector('.matrix').parentElement; return box.scrollWidth <= box.clientWidth"
        )

    @pytest.mark.parametrize("width", [PHONE, DESK])
    @pytest.mark.parametrize("dark", [False, True])
    def test_every_text_can_be_read(self, browser, reach, width, dark):
        browser.show(reach[1], width, dark=dark)
        browser.run(OPEN_ALL)
        seen, bad = browser.run(CONTRASTS)
        assert seen > 1000
        assert bad == []

    def test_the_measure_of_contrast_can_fail(self, page):
        page.run("document.querySelector('.answer').style.color = '#bbb'")
        _, bad = page.run(CONTRASTS)
        assert len(bad) == 1

    @pytest.mark.parametrize(("dark", "ground"), [(False, "rgb(255, 255, 255)"), (True, "rgb(21, 24, 27)")])
    def test_follows_the_readers_scheme(self, browser, reach, dark, ground):
        browser.show(reach[1], dark=dark)
        assert browser.run("return getComputedStyle(document.body).backgroundColor") == ground

    def test_the_answer_is_on_the_first_screen_of_a_phone(self, browser, reach):
        campaign, path = reach
        browser.show(path, PHONE)
        seen = browser.run(
            "return [...document.querySelectorAll('h1, .answer, .measures')].filter(each => "
            "each.getBoundingClientRect().bottom <= innerHeight).map(each => each.innerText).join(' ')"
        )
        for text in (campaign.answer, *(figure for figure, _ in campaign.measures)):
            assert text in seen

    def test_what_can_be_tapped_is_large_enough(self, browser, reach):
        browser.show(reach[1], PHONE)
        # WCAG 2.2, 2.5.8: 24 by 24 pixels; links in a sentence and in a list of numbers are excepted
        small = browser.run(
            "return [...document.querySelectorAll('nav a, .cell a, summary, button, input, select')]"
            ".filter(each => each.checkVisibility()).map(each => each.getBoundingClientRect())"
            ".filter(box => box.width < 24 || box.height < 24).length"
        )
        assert small == 0

    def test_maps_are_drawn_and_drawn_again(self, page, reach):
        page.run(OPEN_ALL)
        boxes = page.run("return [...document.querySelectorAll('svg.map')].map(each => each.getBBox().width)")
        failed = sum(drill.result.verdict == "FAIL" for group in reach[0].failures for drill in group.drills)
        assert len(boxes) == failed + 2
        assert min(boxes) > 900

    def test_a_console_shows_its_end(self, page):
        page.run(OPEN_ALL)
        below = page.run(
            "return [...document.querySelectorAll('pre.console')].filter(each => each.scrollHeight > each.clientHeight)"
            ".map(each => { const range = document.createRange(), text = each.firstChild.firstChild;"
            " range.setStart(text, text.length - 1); range.setEnd(text, text.length);"
            " return range.getBoundingClientRect().bottom - each.getBoundingClientRect().bottom; })"
        )
        assert below
        assert max(below) <= 0


class TestUsing:
    def test_fetches_nothing_and_complains_of_nothing(self, browser, reach):
        browser.show(reach[1])
        browser.run(OPEN_ALL)
        assert browser.take_logs() == ([reach[1].as_uri()], [])

    @pytest.mark.parametrize("width", [PHONE, DESK])
    def test_every_link_lands_where_it_says(self, browser, reach, width):
        browser.show(reach[1], width)
        campaign = reach[0]
        cells = sum(
            cell is not None for table in (campaign.matrix, campaign.faults) for row in table.rows for cell in row.cells
        )
        followed, bad = browser.driver.execute_async_script(FOLLOW.replace("arguments[0]", "arguments[arguments.length - 1]"))
        assert followed > cells
        assert bad == []

    def test_a_link_to_a_drill_opens_it(self, browser, reach):
        number = reach[0].failures[0].drills[0].number
        browser.show(reach[1], fragment=f"#drill-{number}")
        assert browser.run(f"return document.getElementById('drill-{number}').open") is True

    def test_by_keyboard(self, page, reach):
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        def press(key, held=""):
            chain = ActionChains(page.driver)
            chain = chain.key_down(held).send_keys(key).key_up(held) if held else chain.send_keys(key)
            chain.perform()

        press(Keys.TAB)
        assert page.run("return document.activeElement.className") == "skip"
        assert page.run("return document.activeElement.getBoundingClientRect().left") >= 0
        for _ in range(40):
            press(Keys.TAB)
            if page.run("return document.activeElement.matches('details.drill > summary')"):
                break
        first = f"drill-{reach[0].failures[0].drills[0].number}"
        assert page.run("return document.activeElement.parentElement.id") == first
        outline = page.run(
            "const style = getComputedStyle(document.activeElement); return [style.outlineStyle, style.outlineWidth]"
        )
        assert outline == ["solid", "3px"]
        press(Keys.ENTER)
        assert page.run(f"return document.getElementById('{first}').open") is True
        press(Keys.TAB)
        assert page.run("return document.activeElement.textContent") == "Copy"
        press(Keys.TAB, Keys.SHIFT)
        press(Keys.SPACE)
        assert page.run(f"return document.getElementById('{first}').open") is False

    def test_the_filter(self, page, reach):
        from selenium.webdriver.support.ui import Select

        drills = reach[0].drills
        assert page.run(ROWS) == len(drills)
        words = page.driver.find_element("id", "words")
        words.send_keys("HASH reserved")
        wanted = [drill for drill in drills if "hash" in drill.title and "reserved" in drill.title]
        assert 0 < len(wanted) < len(drills)
        assert page.run(ROWS) == len(wanted)
        assert page.driver.find_element("id", "shown").text == f"{len(wanted)} of {len(drills)}"
        stands = Select(page.driver.find_element("id", "stands"))
        stands.select_by_value("failed")
        assert page.run(ROWS) == sum(drill.standing == "failed" for drill in wanted)
        words.clear()
        assert page.run(ROWS) == sum(drill.standing == "failed" for drill in drills)
        # a link to a row that is filtered away shows it all the same
        passed = next(drill.number for drill in drills if drill.standing == "passed")
        page.run(f"location.hash = '#drill-{passed}'")
        page.driver.execute_async_script("setTimeout(arguments[0], 50)")
        assert page.run(f"return document.getElementById('drill-{passed}').checkVisibility()") is True
        assert page.run(ROWS) == len(drills)

    def test_a_command_is_copied_whole(self, page, reach):
        page.command("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        drill = reach[0].failures[0].drills[0]
        page.run(f"const box = document.getElementById('drill-{drill.number}'); box.open = true;")
        page.driver.find_element("css selector", f"#drill-{drill.number} .copy").click()
        page.driver.execute_async_script("setTimeout(arguments[0], 100)")
        copied = page.driver.execute_async_script(
            "navigator.clipboard.readText().then(arguments[0], e => arguments[0](String(e)))"
        )
        assert copied == drill.command

    def test_without_its_script(self, browser, reach):
        browser.command("Emulation.setScriptExecutionDisabled", value=True)
        try:
            browser.show(reach[1], PHONE)
            assert browser.run("return document.documentElement.className") == ""
            assert browser.run(ROWS) == len(reach[0].drills)
            assert browser.run("return document.getElementById('words').checkVisibility()") is False
            summary = browser.driver.find_element("css selector", "details.drill > summary")
            summary.click()
            assert browser.run("return document.querySelector('details.drill pre.console').checkVisibility()") is True
        finally:
            browser.command("Emulation.setScriptExecutionDisabled", value=False)


class TestPrinting:
    @pytest.mark.parametrize("script", [True, False])
    def test_every_failure_is_on_paper(self, browser, reach, script):
        campaign, path = reach
        browser.command("Emulation.setScriptExecutionDisabled", value=not script)
        try:
            browser.show(path)
            text, pages = browser.pdf()
        finally:
            browser.command("Emulation.setScriptExecutionDisabled", value=False)
        assert 5 < pages < 60
        assert "".join(campaign.answer.split()) in text
        for group in campaign.failures:
            assert "".join(group.why.split()) in text
            for drill in group.drills:
                assert "".join(f"{drill.number}: {drill.title}".split()) in text
                assert text.count("".join(drill.command.split())) == 1
        failed = sum(drill.result.verdict == "FAIL" for group in campaign.failures for drill in group.drills)
        assert text.count("K1isdead,itspurgatoryiswhole") == failed
        assert text.count("PASS") > campaign.counts["passed"]

    def test_what_is_filtered_is_on_paper_all_the_same(self, page, reach):
        page.driver.find_element("id", "words").send_keys("nothing has this word")
        assert page.run(ROWS) == 0
        text, _ = page.pdf()
        assert "".join(reach[0].drills[0].title.split()) in text

    def test_nothing_is_wider_than_the_paper(self, browser, reach):
        browser.show(reach[1], A4, paper=True)
        assert browser.run("return document.documentElement.scrollWidth") <= A4
        assert browser.run("return document.querySelector('nav').checkVisibility()") is False

    def test_a_wide_matrix_is_not_cut(self, browser, tmp_path):
        drills = [
            (PlannedDrill(DrillRequest(machine=machine, cpu=cpu, mmu=mmu, placement=placement, fault=(fault,)), 1), None)
            for machine, cpu, mmu in campaigns.MACHINES
            for placement in ("zero", "reserved")
            for fault in ("nmi", "memory-pressure")
        ]
        campaign = read_campaign(campaigns.write_campaign(tmp_path / "x.db", drills))
        assert len(campaign.faults.columns) == 12
        (tmp_path / "x.html").write_text(campaign_html(campaign))
        browser.show(tmp_path / "x.html", A4, paper=True)
        right = [f"document.querySelector('{name}').getBoundingClientRect().right" for name in (".matrix", "body")]
        assert browser.run(f"return {' - '.join(right)}") <= 0

    def test_paper_is_white_in_the_dark(self, browser, reach):
        browser.show(reach[1], dark=True, paper=True)
        assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        seen, bad = browser.run(CONTRASTS)
        assert seen > 500
        assert bad == []


class TestOtherCampaigns:
    def test_mischief_in_every_text(self, browser, tmp_path):
        mischief = (
            "</title></style></script></pre></svg><script>window.hit = 1</script>"
            "<img src='https://example.org/x' onerror='window.hit=1'>"
            "<iframe srcdoc='<script>parent.hit = 1</script>'></iframe>\" onmouseover=\"window.hit=1\" x='"
        )
        drills = [
            (PlannedDrill(DrillRequest()), campaigns.result_of),
            (PlannedDrill(DrillRequest(), 2), lambda request: campaigns.result_of(request, went="fail")),
            (PlannedDrill(DrillRequest(fault=("nmi",))), campaigns.result_of),
        ]
        path = campaigns.write_campaign(tmp_path / "x.db", drills)
        with sqlite3.connect(path) as database:
            for table, columns in {
                "campaign": "name version created",
                "drill": "title command kernel capture_kernel machine cpu mmu crashkernel fault",
                "result": "stage reason release worker host started console",
                "stage": "name",
            }.items():
                for column in columns.split():
                    database.execute(f"UPDATE {table} SET {column} = ? || {column}", (mischief,))
            record = {"failure": {"likely": mischief}, "problems": [mischief], "faults": [{"told": mischief}]}
            database.execute("UPDATE result SET record = ?", (json.dumps(record),))
        database.close()
        (tmp_path / "x.html").write_text(campaign_html(read_campaign(path)))
        browser.show(tmp_path / "x.html", PHONE)
        browser.run(OPEN_ALL)
        assert browser.run("return window.hit ?? null") is None
        assert browser.run("return [document.scripts.length, document.images.length, frames.length]") == [1, 0, 0]
        assert browser.run("return document.documentElement.scrollWidth") == PHONE
        assert browser.take_logs() == ([(tmp_path / "x.html").as_uri()], [])

    @pytest.mark.parametrize("drills", [0, 190])
    def test_nothing_has_run(self, browser, tmp_path, drills):
        planned = [(PlannedDrill(DrillRequest(), number), None) for number in range(1, drills + 1)]
        campaign = read_campaign(campaigns.write_campaign(tmp_path / "x.db", planned, end=""))
        (tmp_path / "x.html").write_text(campaign_html(campaign))
        browser.show(tmp_path / "x.html", PHONE)
        assert browser.run("return document.documentElement.scrollWidth") == PHONE
        assert campaign.answer in browser.run("return document.body.innerText")
        assert browser.take_logs() == ([(tmp_path / "x.html").as_uri()], [])

    def test_five_hundred_failures(self, browser, tmp_path):
        path = campaigns.reach(tmp_path / "big.db", drills=500, repeats=20, failing=1.0)
        (tmp_path / "big.html").write_text(campaign_html(read_campaign(path)))
        browser.show(tmp_path / "big.html", PHONE)
        browser.run(OPEN_ALL)
        assert browser.run("return document.documentElement.scrollWidth") == PHONE
        assert browser.run("return document.querySelectorAll('details.drill').length") == 500
        assert browser.take_logs() == ([(tmp_path / "big.html").as_uri()], [])
