"""A campaign's report: the same figures in the terminal, on the page and as JSON; odd databases are told of, and none acts."""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crashkernel import cli
from crashkernel.campaign.file import PlannedDrill
from crashkernel.drill.request import DrillRequest
from crashkernel.errors import CrashkernelError, FormatError, UsageError
from crashkernel.memory import Range
from crashkernel.report.campaign import STANDINGS, Evidence, Spread, duration
from crashkernel.report.campaignjson import figures
from crashkernel.report.campaignpage import campaign_html
from crashkernel.report.campaigntext import draw_campaign
from crashkernel.report.results import read_campaign
from crashkernel.report.terminal import tail
from support import campaigns
from support.webpage import HOSTILE, Page

ZERO, RESERVED = DrillRequest(), DrillRequest(placement="reserved")
ALL_STANDINGS = [
    (PlannedDrill(ZERO), campaigns.result_of),
    (PlannedDrill(RESERVED), campaigns.result_of),
    (PlannedDrill(ZERO, 2), lambda request: campaigns.result_of(request, went="fail")),
    (PlannedDrill(DrillRequest(smp=4), known="a reason"), lambda request: campaigns.result_of(request, went="fail")),
    (PlannedDrill(DrillRequest(smp=2), known="another reason"), campaigns.result_of),
    (
        PlannedDrill(DrillRequest(mmu="hash")),
        lambda request: campaigns.result_of(request, verdict="ERROR", reason="the worker died", record=None, console=""),
    ),
    (PlannedDrill(DrillRequest(memory="4G")), None),
]


@pytest.fixture(scope="module")
def reach(tmp_path_factory):
    return campaigns.reach(tmp_path_factory.mktemp("campaign") / "reach.db", drills=190)


@pytest.fixture(scope="module")
def campaign(reach):
    return read_campaign(reach)


@pytest.fixture(scope="module")
def page(campaign):
    return Page(campaign_html(campaign))


@pytest.fixture
def every(tmp_path):
    """A database with a drill of each standing."""
    return campaigns.write_campaign(tmp_path / "every.db", ALL_STANDINGS)


def complaint(capsys):
    """The one line on standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("crashkernel: ")
    return lines[0]


def inside(element):
    """All elements in it, at any depth."""
    return [found for part in element["parts"] for found in (part, *inside(part))]


class TestFigures:
    def test_each_standing(self, every):
        campaign = read_campaign(every)
        expected = ["passed", "passed", "failed", "known", "surprise", "error", "missing"]
        assert [drill.standing for drill in campaign.drills] == expected
        assert campaign.counts == {"failed": 1, "surprise": 1, "error": 1, "missing": 1, "known": 1, "passed": 2}
        assert campaign.answer == (
            "7 drills: 2 passed, 1 known failure, 1 passed though known to fail, 1 FAILED, 1 could not be run, 1 not run yet"
        )

    @pytest.mark.parametrize(
        ("kept", "status"), [({0, 1, 3}, 0), ({0, 2}, 1), ({0, 4}, 1), ({0, 5}, 3), ({0, 6}, 3), ({2, 5, 6}, 1), (set(), 0)]
    )
    def test_exit_status(self, tmp_path, kept, status):
        drills = [drill for number, drill in enumerate(ALL_STANDINGS) if number in kept]
        assert read_campaign(campaigns.write_campaign(tmp_path / "x.db", drills)).exit_status == status

    def test_what_it_took(self, tmp_path):
        two = [
            (PlannedDrill(request), lambda request: campaigns.result_of(request, seconds=30.0, boot_seconds=20.0))
            for request in (ZERO, RESERVED)
        ]
        path = campaigns.write_campaign(tmp_path / "x.db", two)
        campaigns.alter(path, "UPDATE run SET seconds = 36, workers = 2, cpus = 2")
        campaign = read_campaign(path)
        assert (campaign.wall_seconds, campaign.core_seconds, campaign.cores) == (36, 72, 2)
        assert campaign.rate == pytest.approx(100)
        assert campaign.shares == pytest.approx((40 / 72, 20 / 72, 12 / 72))
        assert sum(campaign.shares) == pytest.approx(1)
        assert campaign.headline == (
            "2 drills: 2 passed; 36.0 s on 2 cores; 100 drills per core-hour; 44% of the time not the two boots"
        )

    def test_a_driver_that_was_killed_worked_until_its_last_result(self, tmp_path):
        path = campaigns.write_campaign(tmp_path / "x.db", ALL_STANDINGS[:2], end="")
        begun = campaigns.BEGUN.isoformat()
        campaigns.alter(
            path,
            f"UPDATE run SET started = '{begun}'",
            "UPDATE result SET ended = '2026-11-24T21:31:30Z' WHERE drill = 2",
            "INSERT INTO run SELECT 2, '2026-11-24T23:00:00Z', NULL, 10.0, workers, cpus, scheduler, 'done' FROM run",
        )
        campaign = read_campaign(path)
        assert [run.seconds for run in campaign.runs] == [90, 10]
        assert any("1 killed or still at it" in fact for fact in campaign.facts)
        campaigns.alter(path, "UPDATE run SET started = 'long ago' WHERE number = 1")
        campaign = read_campaign(path)
        assert campaign.wall_seconds is None
        assert campaign.rate is None
        assert "core" not in campaign.headline

    def test_failures_that_differ_in_numbers_alone_are_one(self, tmp_path):
        reasons = ["verify: 12 bytes wrong at 0x1000", "verify: 7 bytes wrong at 0xffe0", "verify: the nonce is missing"]
        drills = [
            (
                PlannedDrill(ZERO, number),
                lambda request, reason=reason: campaigns.result_of(request, went="fail", stage="verify", reason=reason),
            )
            for number, reason in enumerate(reasons, 1)
        ]
        first, second = read_campaign(campaigns.write_campaign(tmp_path / "x.db", drills)).failures
        assert [drill.number for drill in first.drills] == [1, 2]
        assert first.varied
        assert first.why == "verify: 12 bytes wrong at 0x1000 (and alike, with other numbers)"
        assert (second.why, second.varied) == (reasons[2], False)

    def test_the_matrix_names_what_varies_and_tells_the_rest_once(self, campaign):
        table = campaign.matrix
        assert table.heads == ("K1 = K2", "machine", "CPU", "MMU", "CPUs K1, K2")
        assert table.columns == (("", "zero"), ("", "reserved"))
        assert table.alike == ("memory 2 GiB", "crashkernel=512M", "saved by copying")
        assert len(table.rows) == 5 * 6 * 2
        cells = {row.heads: row.cells for row in table.rows}
        failed = cells["debian:trixie/powerpc64le-64k", "pseries", "POWER8", "hash", "4, 1"]
        assert [cell.word for cell in failed] == ["FAIL", "FAIL"]
        known = cells["debian:bullseye", "powernv10", "POWER10", "radix", "4, 1"]
        assert [cell.word for cell in known] == ["known", "PASS!"]
        assert {cell.compared for row in table.rows for cell in row.cells if cell.standing == "passed"} == {"768 MiB"}

    def test_faults_by_machine_and_placement_with_their_repeats(self, campaign):
        table = campaign.faults
        assert table.heads == ("fault",)
        assert table.columns == tuple((mmu, placement) for mmu in ("radix", "hash") for placement in ("zero", "reserved"))
        dma = next(row for row in table.rows if row.heads == ("dma:init+data",))
        assert [cell.word for cell in dma.cells] == ["FAIL 2/3", "PASS 3/3", "FAIL 2/3", "PASS 3/3"]
        assert dma.cells[0].first.repeat == 1
        assert {row.heads for row in campaign.fault_rows.rows} >= {("nmi", "radix"), ("nmi", "hash")}

    def test_k2_of_its_own_and_other_options_are_told_apart(self, tmp_path):
        requests = [
            DrillRequest(),
            DrillRequest(capture_kernel="debian:sid"),
            DrillRequest(no_quarantine=True),
            DrillRequest(capture=31, crashkernel="1G"),
        ]
        path = campaigns.write_campaign(tmp_path / "x.db", [(PlannedDrill(request), None) for request in requests])
        table = read_campaign(path).matrix
        assert table.heads == ("K1", "else")
        assert [row.heads for row in table.rows] == [
            ("debian:bookworm", ""),
            ("debian:bookworm", "K2 debian:sid"),
            ("debian:bookworm", "no-quarantine"),
            ("debian:bookworm", "crashkernel=1G, capture 31"),
        ]
        assert {"K2 the same", "crashkernel=512M", "saved by copying"} <= set(table.alike)

    def test_times_are_of_drills_without_a_fault(self, campaign):
        plain = [drill.result for drill in campaign.drills if drill.standing in ("passed", "surprise") and not drill.fault]
        assert sum(len(spread.values) for spread in campaign.totals.values()) == len(plain)
        assert list(campaign.stage_times) == [name for name, _ in plain[0].stages]
        boots = [seconds for result in plain for name, seconds in result.stages if name == "K1 boot"]
        assert sorted(v for spread in campaign.stage_times["K1 boot"].values() for v in spread.values) == sorted(boots)

    def test_a_campaign_of_faults_alone_has_times_too(self, tmp_path):
        faulty = (PlannedDrill(DrillRequest(fault=("nmi",))), campaigns.result_of)
        assert list(read_campaign(campaigns.write_campaign(tmp_path / "x.db", [faulty])).totals) == ["zero"]

    def test_quantiles(self):
        spread = Spread((1.0, 2.0, 3.0, 10.0))
        assert [spread.quantile(share) for share in (0, 0.5, 1)] == [1, 2.5, 10]
        assert Spread((4.0,)).median == 4

    @pytest.mark.parametrize(
        ("seconds", "text"), [(0.04, "0.0 s"), (99.9, "99.9 s"), (99.96, "2 min"), (5990, "100 min"), (12000, "3 h 20 min")]
    )
    def test_durations(self, seconds, text):
        assert duration(seconds) == ("1 h 40 min" if text == "100 min" else text)

    def test_the_pair_is_one_configuration_in_both_placements(self, campaign):
        zero, reserved = campaign.pair
        assert (zero.placement, reserved.placement) == ("zero", "reserved")
        assert zero.title.replace("zero", "") == reserved.title.replace("reserved", "")
        assert {zero.number, reserved.number} <= set(campaign.evidence)


class TestSameFiguresEverywhere:
    """The forms share one model; this holds that each shows it."""

    def test_headline_and_facts(self, campaign, page):
        text = draw_campaign(campaign, width=500)
        assert f"{campaign.name}: {campaign.headline}" in text
        assert figures(campaign)["headline"] == campaign.headline
        header = next(element for element in page.elements if element["tag"] == "header")["text"]
        assert campaign.answer in header
        for figure, words in campaign.measures:
            assert figure in header
            assert words in header
        for fact in campaign.facts:
            assert fact in text
            assert fact in header

    def test_every_cell(self, campaign, page):
        text = draw_campaign(campaign, width=500)
        drawn = [
            element["text"] for element in page.elements if element["tag"] == "a" and set(STANDINGS) & {element.get("class")}
        ]
        assert drawn == [
            cell.word + cell.compared
            for table in (campaign.matrix, campaign.faults)
            for row in table.rows
            for cell in row.cells
            if cell is not None
        ]
        text = text.partition("\ndrills\n")[2]
        assert campaign.matrix.grouped
        for table in (campaign.matrix, campaign.fault_rows):
            for row in table.rows:
                name, *names = row.heads if table.grouped else ("", *row.heads)
                if (title := f"\n  {table.heads[0]} {name}\n") in text:
                    text = text.partition(title)[2]  # rows stand below their name
                line = [*names, *(f"{cell.word} {cell.compared}".strip() for cell in row.cells if cell)]
                assert re.search("^ {2,4}" + r"\s+".join(map(re.escape, line)) + "$", text, re.MULTILINE), row.heads

    def test_every_time(self, campaign, page):
        drawn = [cell["text"] for row in page.all("tr", "zero") + page.all("tr", "reserved") for cell in row["parts"]]
        text = draw_campaign(campaign, width=500)
        told = figures(campaign)["stages"]
        for name, by_placement in campaign.stage_times.items():
            digits = 2 if max(spread.values[-1] for spread in by_placement.values()) < 10 else 1
            for placement, spread in by_placement.items():
                shown = [spread.values[0], spread.median, spread.quantile(0.95), spread.values[-1]]
                for value in shown:
                    assert f"{value:.{digits}f}" in drawn
                assert re.search(r"\s+".join([placement, str(len(spread.values)), *(f"{v:.{digits}f}" for v in shown)]), text)
                assert [told[name][placement][key] for key in ("least", "median", "p95", "most")] == shown

    def test_every_failure_with_its_command(self, campaign, page):
        text = draw_campaign(campaign, width=500)
        for group in campaign.failures:
            assert group.why in text
            for drill in group.drills:
                block = page.by_id(f"drill-{drill.number}")
                assert block["tag"] == "details"
                assert drill.command in block["text"]
                assert group.standing == "known" or drill.command in text
                if drill.result.verdict == "FAIL":
                    assert "crashkernel: K1 is dead, its purgatory is whole" in block["text"]
                    assert len([part for part in inside(block) if part["tag"] == "svg"]) == 1

    def test_json_has_every_drill(self, campaign):
        told = json.loads(json.dumps(figures(campaign)))
        assert [drill["number"] for drill in told["drills"]] == [drill.number for drill in campaign.drills]
        assert told["counts"] == campaign.counts

    def test_every_size(self, every):
        campaign = read_campaign(campaigns.add_size(every))
        (size,) = campaign.sizes
        assert size.facts == [
            "recommended: crashkernel=144M",
            "112 MiB was enough, 4 times of 5; 108 MiB was not",
        ]
        assert dict(size.bars) == {
            "found": 112 << 20,
            "recommended here": 144 << 20,
            "estimated by crashkernel plan": 115 << 20,
            "recommended by rhel": 385 << 20,
            "recommended by suse": 0,
        }
        assert [peak for peak, _ in size.peaks] == ["unpacking", "saving"]
        # no part of a bar is as wide as less than nothing
        assert dict(size.peaks[1][1]) == {"K2's image": 40 << 20, "processes": 40 << 20, "slabs": 12 << 20, "free": 20 << 20}
        text, page = draw_campaign(campaign), Page(campaign_html(campaign))
        shown = page.by_id("sizes")["text"] + " ".join(section["text"] for section in page.all("section"))
        for fact in size.facts:
            assert fact in text
            assert fact in shown
        for name, each in size.bars:
            assert re.search(rf"{name} +{each / (1 << 20):.1f} MiB", text)
            assert f"{name}{each >> 20} MiB" in shown or not each
        assert "saving" in text
        assert "processes 40 MiB" in shown
        assert figures(campaign)["sizes"][0]["result"] == campaigns.SIZED

    def test_a_size_that_says_little(self, every):
        little = campaigns.SIZED | {
            "estimate": "?",
            "distributions": [3, {"size": -1}],
            "accounting": {"saving": [1], "unpacking": 4},
        }
        (size,) = read_campaign(campaigns.add_size(every, little)).sizes
        assert [name for name, _ in size.bars] == ["found", "recommended here"]
        assert size.peaks == ()
        campaigns.alter(every, "UPDATE size SET result = 'no JSON', recommended = NULL")
        campaign = read_campaign(every)
        assert campaign.sizes[0].facts == ["112 MiB was enough"]
        assert "112 MiB was enough" in campaign_html(campaign)
        assert "112 MiB was enough" in draw_campaign(campaign)


class TestPage:
    def test_needs_nothing_else(self, campaign, page):
        assert not {"link", "img", "iframe", "object", "base", "form"} & {element["tag"] for element in page.elements}
        assert not [element for element in page.elements if "src" in element]
        assert all(element["href"].startswith("#") for element in page.elements if "href" in element)
        assert not re.search(r"https?:|@import|url\((?!#)", campaign_html(campaign))

    def test_its_policy_lets_its_own_script_run_and_no_other(self, campaign, page):
        (script,) = page.all("script")
        digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
        policy = next(e["content"] for e in page.all("meta") if e.get("http-equiv") == "Content-Security-Policy")
        assert f"script-src 'sha256-{digest}'" in policy
        assert "default-src 'none'" in policy

    def test_every_link_leads_somewhere(self, page):
        names = [element["id"] for element in page.elements if "id" in element]
        assert len(set(names)) == len(names)
        assert {element["href"][1:] for element in page.elements if "href" in element} <= set(names)

    def test_every_drill_is_there_once_with_its_command(self, campaign, page):
        for drill in campaign.drills:
            assert drill.command in page.by_id(f"drill-{drill.number}")["text"]

    def test_tables_have_headers_and_every_section_its_name(self, page):
        for table in page.all("table"):
            assert any(e["tag"] == "th" and e.get("scope") == "col" and "table" in e["inside"] for e in page.elements), table
        for section in page.all("section"):
            assert page.by_id(section["aria-labelledby"])["tag"] == "h2"
        assert page.all("html")[0]["lang"] == "en"
        assert [len(page.all(tag)) for tag in ("main", "header", "footer", "nav", "h1")] == [1, 1, 1, 1, 1]

    def test_a_map_that_is_needed_twice_is_drawn_once(self, campaign):
        text = campaign_html(campaign)
        assert 0 < text.count('id="map-') < text.count('class="map"')
        assert text.count("<use ") == text.count('class="map"') - text.count('id="map-')

    def test_what_is_wrong_in_a_dump_is_marked_where_it_lies(self, tmp_path):
        wrong = {"wrong_ranges": [{"range": "0x1000000-0x1010000", "wrong": 3, "what": "K1 <text>", "note": ""}]}
        failure = {"stage": "verify", "message": "verify: 3 bytes are wrong", "likely": "", "console": []}
        drill = (
            PlannedDrill(ZERO),
            lambda request: campaigns.result_of(request, record={"verdict": "FAIL", "failure": failure, **wrong}),
        )
        campaign = read_campaign(campaigns.write_campaign(tmp_path / "x.db", [drill]))
        assert campaign.evidence[1].wrong == ((Range(0x1000000, 0x1010000), "K1 <text>"),)
        text = campaign_html(campaign)
        assert "wrong: 0x1000000-0x1010000, K1 &lt;text&gt;" in text
        assert "<title>bytes that are wrong in the dump</title>" in text

    @pytest.mark.parametrize(("failing", "most"), [(0.0, 600_000), (1.0, 2_000_000)])
    def test_stays_small(self, tmp_path, failing, most):
        path = campaigns.reach(tmp_path / "big.db", drills=500, repeats=20, failing=failing)
        assert len(campaign_html(read_campaign(path)).encode()) < most

    def test_plans_that_all_differ_do_not_make_it_large(self, tmp_path):
        def odd(request, number):
            plan = campaigns.SAMPLES["fail-zero"]["record"]["plan"] | {"machine": f"machine {number}"}
            plan["k1_layout"] = [{"name": f"K1 {number}", "range": "0x0-0x10000"}]
            return campaigns.result_of(request, went="fail", record={"plan": plan})

        drills = [(PlannedDrill(ZERO, n), lambda request, n=n: odd(request, n)) for n in range(1, 301)]
        text = campaign_html(read_campaign(campaigns.write_campaign(tmp_path / "x.db", drills)))
        assert len(text.encode()) < 2_000_000
        assert "Not drawn: 40 others are." in text


class TestUnfinished:
    def test_nothing_has_run(self, tmp_path):
        path = campaigns.write_campaign(tmp_path / "x.db", [(planned, None) for planned, _ in ALL_STANDINGS], end="")
        campaign = read_campaign(path)
        assert campaign.headline == "7 drills: 7 not run yet"
        assert "not run" in draw_campaign(campaign)
        page = Page(campaign_html(campaign))
        assert "No drill has been run yet." in page.all("main")[0]["text"]
        assert len(page.all("a", "missing")) == 6
        figures(campaign)

    def test_no_drills_at_all(self, tmp_path):
        campaign = read_campaign(campaigns.write_campaign(tmp_path / "x.db", []))
        assert campaign.headline == "no drills"
        assert "names none" in campaign_html(campaign)
        assert draw_campaign(campaign).startswith("reach: no drills")

    def test_no_run(self, every):
        campaigns.alter(every, "DELETE FROM run")
        assert "core" not in read_campaign(every).headline

    def test_while_a_driver_writes(self, every):
        writer = sqlite3.connect(every)
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM result")
        assert read_campaign(every).counts["missing"] == 1
        writer.close()

    def test_where_nothing_may_be_written(self, every):
        with tempfile.TemporaryDirectory() as shared:  # not pytest's own, which is closed to all others
            path = Path(shutil.copy(every, shared))
            path.chmod(0o444)
            path.parent.chmod(0o555)
            root = os.geteuid() == 0
            if root:
                os.seteuid(65534)
            try:
                assert not os.access(shared, os.W_OK, effective_ids=True)
                assert len(read_campaign(path).drills) == len(ALL_STANDINGS)
            finally:
                if root:
                    os.seteuid(0)
                path.parent.chmod(0o755)

    @pytest.mark.parametrize("plan", [None, "", "{}", "no JSON", "[" * 100_000, '{"format": 3}'])
    def test_without_a_plan_there_is_no_map(self, tmp_path, plan):
        drill = (PlannedDrill(ZERO), lambda request: campaigns.result_of(request, went="fail", record={"plan": None}))
        path = campaigns.write_campaign(tmp_path / "x.db", [drill])
        with sqlite3.connect(path) as database:
            database.execute("UPDATE result SET plan = ?, console = ''", (plan,))
        database.close()
        text = campaign_html(read_campaign(path))
        assert ("K1 had sent no plan yet." if not plan else "Its plan cannot be drawn: ") in text

    @pytest.mark.parametrize(
        "record", [None, "", "null", "[]", "no JSON", '{"bytes_compared": "many", "faults": 3, "failure": 7}']
    )
    def test_a_record_that_says_nothing(self, every, record):
        with sqlite3.connect(every) as database:
            database.execute("UPDATE result SET record = ?", (record,))
        database.close()
        campaign = read_campaign(every)
        assert {drill.result.compared for drill in campaign.drills if drill.result} == {None}
        assert "PASS" in draw_campaign(campaign)
        Page(campaign_html(campaign))


class TestHostile:
    """What comes from a database is shown, and does nothing; what cannot be is refused in one line."""

    @pytest.fixture
    def hostile(self, every):
        text = HOSTILE.replace("\udc80", "")
        with sqlite3.connect(every) as database:
            for table, columns in {
                "campaign": "name file path created version",
                "drill": "title command kernel capture_kernel machine cpu mmu crashkernel placement fault known",
                "result": "stage reason release capture_release started ended worker host console",
                "stage": "name",
                "run": "started ended end scheduler",
            }.items():
                for column in columns.split():
                    database.execute(f'UPDATE {table} SET "{column}" = ? || coalesce("{column}", \'\')', (text,))
            record = {"failure": {"likely": text, "console": [text]}, "problems": [text], "faults": [{"told": text}]}
            record["wrong_ranges"] = [{"range": "0x0-0x1000", "what": text}]
            database.execute("UPDATE result SET record = ?", (json.dumps(record),))
            database.execute("UPDATE campaign SET host = ?", (json.dumps({"qemu": text, "cpus": text}),))
            database.execute("INSERT INTO size VALUES (?, '{}', ?, 1, NULL, '')", (text, json.dumps({text: text})))
        database.close()
        return read_campaign(every)

    def test_on_the_page(self, hostile):
        text = campaign_html(hostile)
        page = Page(text)
        structure = {"html", "head", "meta", "title", "style", "body", "header", "main", "section", "article", "nav", "footer"}
        text_level = {
            "a",
            "b",
            "i",
            "p",
            "h1",
            "h2",
            "h3",
            "h4",
            "ul",
            "li",
            "dl",
            "dt",
            "dd",
            "pre",
            "div",
            "code",
            "span",
            "small",
        }
        tables = {"table", "caption", "thead", "tbody", "tr", "th", "td"}
        controls = {"details", "summary", "label", "input", "select", "option", "output", "script"}
        drawings = {"svg", "rect", "line", "path", "text", "g", "defs", "pattern", "circle", "use"}
        assert {element["tag"] for element in page.elements} <= structure | text_level | tables | controls | drawings
        assert not [name for element in page.elements for name in element if name.startswith("on")]
        assert len(page.all("script")) == 1
        assert "\x1b" not in text
        assert "\x00" not in text

    def test_in_the_terminal(self, hostile):
        assert draw_campaign(hostile).replace("\n", "").isprintable()

    def test_as_json(self, hostile):
        assert json.dumps(figures(hostile)).isprintable()

    def test_a_console_that_goes_on_and_on(self):
        console = "first\n\x1b]0;title\x07\x1b[31mred\x1b[0m \x9b\x00\r\n50%\r100%\n" + "x" * 3_000_000 + "\n\n\r\n"
        assert tail(console, 10, 20) == ["first", "red \\x9b\\x00", "100%", "x" * 19 + "…"]
        assert tail(console, 2, 20) == ["100%", "x" * 19 + "…"]
        assert tail("", 10, 20) == []

    @given(st.text(st.characters(codec="utf-8"), max_size=400))
    def test_any_console(self, text):
        for line in tail(text, 5, 30):
            assert line.isprintable()
            assert len(line) <= 30

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE drill SET smp = 'two'",
            "UPDATE drill SET memory = -1",
            "UPDATE drill SET memory = 1.5",
            "UPDATE result SET seconds = 'long'",
            "UPDATE result SET seconds = 9e999",
            "UPDATE result SET boot_seconds = -1",
            "UPDATE stage SET seconds = 'x'",
            "UPDATE run SET cpus = 'all'",
            "DROP TABLE stage",
            "ALTER TABLE drill RENAME COLUMN fault TO mishap",
            "PRAGMA user_version = 2",
            "DELETE FROM campaign",
            "INSERT INTO campaign SELECT * FROM campaign",
        ],
    )
    def test_what_cannot_be_is_refused(self, every, statement, capsys):
        campaigns.alter(every, statement)
        with pytest.raises(FormatError):
            read_campaign(every)
        assert cli.main(["report", str(every)]) == 2
        assert str(every) in complaint(capsys)

    def test_a_verdict_that_is_none(self, every):
        campaigns.alter(
            every,
            "CREATE TABLE copy AS SELECT * FROM result",
            "DROP TABLE result",
            "ALTER TABLE copy RENAME TO result",
            "UPDATE result SET verdict = 'MAYBE'",
        )
        with pytest.raises(FormatError, match=r"verdict = 'MAYBE': must be one of PASS, FAIL, ERROR"):
            read_campaign(every)

    def test_a_view_is_no_table(self, every):
        campaigns.alter(every, "ALTER TABLE stage RENAME TO real", "CREATE VIEW stage AS SELECT * FROM real")
        with pytest.raises(FormatError, match="'stage' is missing"):
            read_campaign(every)

    def test_bytes_that_are_no_text(self, every):
        campaigns.alter(every, "UPDATE drill SET title = CAST(x'ff41' AS TEXT)", "UPDATE result SET console = x'fe42'")
        campaign = read_campaign(every)
        assert {drill.title for drill in campaign.drills} == {"�A"}
        assert campaign.evidence[3].console == "�B"

    @pytest.mark.parametrize("content", [b"", b"SQLite format 3\0" + bytes(100), b"no database at all, but long enough" * 40])
    def test_a_file_that_is_no_database(self, tmp_path, content, capsys):
        path = tmp_path / "x.db"
        path.write_bytes(content)
        assert cli.main(["report", str(path)]) == 2
        assert "not a campaign's database" in complaint(capsys)

    def test_another_programs_database(self, tmp_path):
        path = tmp_path / "x.db"
        sqlite3.connect(path).execute("CREATE TABLE bookmarks (url TEXT)").connection.close()
        with pytest.raises(FormatError, match="none of its tables"):
            read_campaign(path)

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_a_damaged_file_is_refused_or_shown(self, reach, tmp_path, data):
        content = bytearray(reach.read_bytes())
        for _ in range(data.draw(st.integers(1, 8))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] = data.draw(st.integers(0, 255))
        path = tmp_path / "damaged.db"
        path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
        with contextlib.suppress(CrashkernelError):
            campaign = read_campaign(path)
            draw_campaign(campaign)
            Page(campaign_html(campaign))


class TestCommand:
    def test_in_the_terminal(self, reach, campaign, capsys):
        assert cli.main(["report", str(reach)]) == 0
        assert capsys.readouterr().out == draw_campaign(campaign) + "\n"

    def test_as_json(self, reach, campaign, capsys):
        assert cli.main(["report", str(reach), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(figures(campaign)))

    def test_as_a_page(self, reach, campaign, capsys, tmp_path):
        assert cli.main(["report", str(reach), "--html", str(tmp_path / "out.html")]) == 0
        assert (tmp_path / "out.html").read_text() == campaign_html(campaign)
        assert capsys.readouterr().out == f"reach: {campaign.headline}\n"
        assert [path.name for path in tmp_path.iterdir()] == ["out.html"]

    def test_a_page_that_cannot_be_written(self, reach, capsys, tmp_path):
        assert cli.main(["report", str(reach), "--html", str(tmp_path / "no" / "out.html")]) == 2
        assert "--html" in complaint(capsys)

    def test_a_page_is_not_written_for_what_cannot_be_read(self, tmp_path, capsys):
        out = tmp_path / "out.html"
        out.write_text("what was there")
        assert cli.main(["report", str(tmp_path / "none.db"), "--html", str(out)]) == 2
        assert "no such file" in complaint(capsys)
        assert out.read_text() == "what was there"

    def test_no_file(self, tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            read_campaign(tmp_path / "none.db")

    def test_colours(self, campaign):
        plain = draw_campaign(campaign)
        coloured = draw_campaign(campaign, colour=True)
        assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
        assert coloured != plain


def test_evidence_of_a_drill_that_passed_is_not_read(campaign):
    passed = {drill.number for drill in campaign.drills if drill.standing == "passed"}
    assert set(campaign.evidence) & passed == {drill.number for drill in campaign.pair}
    assert all(isinstance(evidence, Evidence) for evidence in campaign.evidence.values())
