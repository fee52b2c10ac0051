"""What is made of a campaign's database: comparisons, JUnit XML, the table in Markdown, and the commands' own words."""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashkernel.campaign.comparison import compare_campaigns, comparison_record
from crashkernel.campaign.file import parse_campaign
from crashkernel.campaign.junit import junit_xml
from crashkernel.campaign.store import Result, Store
from crashkernel.campaign.table import BEGIN, END, campaign_table, update_document
from crashkernel.cli import main
from crashkernel.errors import UsageError
from crashkernel.report.results import read_campaign

MATRIX = 'name = "t"\n[[matrix]]\nkernel = ["a", "b"]\nsmp = [1, 2]\nplacement = ["zero", "reserved"]\n'
KNOWN = '[[known]]\nmatch = { kernel = "b", smp = 2 }\nreason = "b has | no <2>"\n'
PASS = Result("PASS", release="6.1", capture_release="6.1", seconds=12.0, stages={"K1 boot": 6.0, "K2 boot": 2.0}, record={})
FAIL = Result(
    "FAIL",
    "K2 boot",
    "K2 printed nothing for 60 s",
    "6.2",
    "6.2",
    seconds=70.0,
    stages={"K1 boot": 6.0},
    record={},
    console="one\n\x1b[31mtwo\x00\ufffe <&>]]>\n",
)
ERROR = Result("ERROR", "packages", "exit status 3: no QEMU", console="")


def made(path: Path, text: str, results: dict[int, Result]):
    with Store.open(path, parse_campaign(text, "t.toml"), {"qemu": "7.2.22", "cpus": 2}) as store:
        run = store.begin_run(2, 2, "")
        for number, result in results.items():
            assert store.add(number, result)
        store.end_run(run, 30.0, "done")
    return path


@pytest.fixture
def mixed(tmp_path):
    """1 to 4 are of kernel a, others of b. 4 was not run, 5 fails, 6 could not be run, 7 is known and fails, 8 and passes."""
    results = {1: PASS, 2: PASS, 3: PASS, 5: FAIL, 6: ERROR, 7: FAIL, 8: replace(PASS, release="6.2", capture_release="6.2")}
    return made(tmp_path / "mixed.sqlite", MATRIX + KNOWN, results)


def test_junit_counts_and_says_what_a_ci_system_is_to_show(mixed):
    root = ET.fromstring(junit_xml(read_campaign(mixed)))
    for suite in (root, root.find("testsuite")):
        assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["8", "2", "1", "2"]
    cases = root.findall("testsuite/testcase")
    kinds = [[child.tag for child in case if child.tag != "system-out"] for case in cases]
    assert kinds == [[], [], [], ["skipped"], ["failure"], ["error"], ["skipped"], ["failure"]]
    assert cases[4].find("failure").get("message") == "K2 boot: K2 printed nothing for 60 s"
    assert cases[4].find("failure").text == "crashkernel drill --placement=zero --kernel=b"
    assert cases[4].find("system-out").text.splitlines()[1:] == ["one", "\\x1b[31mtwo\\x00\\xfffe <&>]]>"]
    assert cases[6].find("skipped").get("message").startswith("known to fail: b has | no <2> (K2 boot: ")
    assert cases[7].find("failure").get("message") == "passed, though known to fail: b has | no <2>"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", root.find("testsuite").get("timestamp"))
    assert {case.get("classname") for case in cases} == {"t.a", "t.b"}
    assert len({case.get("name") for case in cases}) == 8


def test_junit_names_of_drills_that_differ_in_a_seed_or_on_damage_say_so(tmp_path):
    text = 'name = "t"\n[[matrix]]\nfault = "nmi"\nseed = [1, 2]\non-damage = ["reboot", "halt"]\nrepeats = 2\n'
    root = ET.fromstring(junit_xml(read_campaign(made(tmp_path / "t.sqlite", text, {}))))
    names = [case.get("name").partition("zero, ")[2] for case in root.iter("testcase")]
    assert names == [
        "nmi, seed 1", "nmi, seed 1, repeat 2", "halt on damage, nmi, seed 1", "halt on damage, nmi, seed 1, repeat 2",
        "nmi, seed 2", "nmi, seed 2, repeat 2", "halt on damage, nmi, seed 2", "halt on damage, nmi, seed 2, repeat 2",
    ]  # fmt: skip


@settings(max_examples=25)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "kernel": st.just(["a/b", "a-b"]),
            "capture-kernel": st.just(["", "a/b", "c"]),
            "memory": st.just(["2G", "2048M", "0x80000000"]),
            "crashkernel": st.just(["512M", "512m"]),
            "on-damage": st.just(["reboot", "halt", "continue"]),
            "no-quarantine": st.just([False, True]),
            "seed": st.just([0, 1, 2]),
            "fault": st.just(["", "nmi", "flip:initrd"]),
            "repeats": st.integers(1, 2),
        },
    )
)
def test_junit_names_are_unique_in_a_campaign(options):
    text = 'name = "t"\n[[matrix]]\n' + "".join(f"{name} = {json.dumps(values)}\n" for name, values in options.items())
    with tempfile.TemporaryDirectory() as directory:
        root = ET.fromstring(junit_xml(read_campaign(made(Path(directory) / "t.sqlite", text, {}))))
    names = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(set(names)) == len(names) == int(root.get("tests"))


def test_what_got_better_or_worse(tmp_path, mixed):
    after = made(
        tmp_path / "after.sqlite",
        MATRIX.replace('"b"]', '"b", "c"]').replace("[1, 2]", "[1, 2]\nexclude = [{ kernel = 'a', smp = 2 }]"),
        {1: FAIL, 2: PASS, 3: PASS, 4: ERROR, 5: FAIL, 6: PASS},
    )
    comparison = compare_campaigns(read_campaign(mixed), read_campaign(after))
    assert [(each.kind, each.before.number, each.after.number) for each in comparison.changes] == [
        ("worse", 1, 1),
        ("better", 5, 3),
    ]
    assert [drill.number for drill in comparison.gone] == [3, 4]
    assert [drill.kernel for drill in comparison.new] == ["c"] * 4
    assert comparison.same == 4
    assert [(each.name, each.before, each.ratio, each.drills) for each in comparison.stages] == [
        ("K1 boot", 6.0, 1.0, 2), ("K2 boot", 2.0, 1.0, 2), ("whole drill", 12.0, 1.0, 2),
    ]  # fmt: skip
    assert json.loads(json.dumps(comparison_record(comparison)))["changes"][0]["after"]["reason"] == FAIL.reason


def test_the_same_campaign_with_another_seed_is_the_same_drills(tmp_path):
    text = 'name = "t"\n[[matrix]]\nfault = ["nmi", "flip:initrd"]\nrepeats = 2\n'
    before, after = (
        made(tmp_path / f"{seed}.sqlite", text.replace("[[", f"seed = {seed}\n[[", 1), dict.fromkeys(range(1, 5), PASS))
        for seed in (1, 2)
    )
    comparison = compare_campaigns(read_campaign(before), read_campaign(after))
    assert (comparison.same, comparison.changes, comparison.new, comparison.gone) == (4, (), (), ())


@pytest.mark.parametrize(
    ("reason", "kind"),
    [("K2 printed nothing for 90 s", None), ("K2 panicked", "changed"), ("K2 printed nothing for 60 s", None)],
)
def test_another_reason_is_a_change_and_another_number_in_it_is_none(tmp_path, reason, kind):
    text = 'name = "t"\n[[drill]]\n'
    before = made(tmp_path / "a.sqlite", text, {1: FAIL})
    after = made(tmp_path / "b.sqlite", text, {1: Result("FAIL", "K2 boot", reason)})
    found = compare_campaigns(read_campaign(before), read_campaign(after)).changes
    assert [each.kind for each in found] == ([kind] if kind else [])


def test_the_table_has_a_note_for_what_failed(mixed):
    lines = campaign_table(read_campaign(mixed)).splitlines()
    assert lines[0] == "| K1 | K2 | machine | MMU |  | zero, 1 CPU | zero, 2 CPUs | reserved, 1 CPU | reserved, 2 CPUs |"
    assert lines[2:4] == [
        "| 6.1 | = | pseries POWER9 | radix |  | PASS | PASS | PASS | not run |",
        "| 6.2 | = | pseries POWER9 | radix |  | FAIL (1) | FAIL (2) | ERROR (3) | PASS (4) |",
    ]
    assert lines[5].startswith("3 of 8 drills passed; 0 B compared byte for byte; 2 GiB of memory and `crashkernel=512M` where")
    assert lines[7:] == [
        "1. K2 boot: K2 printed nothing for 60 s",
        "2. b has / no &lt;2> (K2 boot: K2 printed nothing for 60 s)",
        "3. packages: exit status 3: no QEMU",
        "4. b has / no &lt;2> (passed, though known to fail)",
    ]


def test_what_is_not_as_usual_has_a_row_of_its_own(tmp_path):
    kernels = """kernels = [
        { kernel = "a" }, { kernel = "a", capture-kernel = "b" }, { kernel = "a", memory = "4G" },
        { kernel = "a", all-cpus = true, crashkernel = "256M@128M" }, { kernel = "a", capture = 31 }]"""
    other = replace(PASS, capture_release="6.2")
    text = MATRIX.replace('kernel = ["a", "b"]', kernels)
    db = made(tmp_path / "o.sqlite", text, {n: other if 5 <= n <= 8 else PASS for n in range(1, 21)})
    rows = [line.split(" | ") for line in campaign_table(read_campaign(db)).splitlines()[2:7]]
    assert [(row[0], row[1], row[4]) for row in rows] == [
        ("| 6.1", "=", ""),
        ("| 6.1", "6.2", ""),
        ("| 6.1", "=", "4 GiB"),
        ("| 6.1", "=", "`256M@128M`, all CPUs in K2"),
        ("| 6.1", "=", "`capture` 31"),
    ]


def test_a_document_is_updated_between_its_markers_alone(tmp_path):
    document = tmp_path / "README.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update_document(document, "new")
    assert document.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    document.write_text("no markers")
    with pytest.raises(UsageError, match="has no lines <!-- campaign: begin"):
        update_document(document, "new")
    assert document.read_text() == "no markers"
    with pytest.raises(UsageError, match="cannot read"):
        update_document(tmp_path / "none.md", "new")


def test_show_lists_every_drill_with_reasons_and_commands(mixed, capsys):
    assert main(["campaign", "show", str(mixed)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("t: 8 drills: 3 passed, ")
    assert "    5  FAIL   70.0 s  b, pseries POWER9 radix, 1 CPU, 2 GiB, crashkernel=512M, zero\n" in said
    assert (
        "            K2 boot: K2 printed nothing for 60 s\n            crashkernel drill --placement=zero --kernel=b\n" in said
    )
    assert "            passed, though known to fail: b has | no <2>\n" in said
    assert main(["campaign", "show", str(mixed), "--failed"]) == 1
    numbers = re.findall(r"^ +(\d+)  [A-Z]", capsys.readouterr().out, re.MULTILINE)
    assert numbers == ["5", "6", "8"]


@pytest.mark.parametrize(("number", "status"), [(1, 0), (4, 3), (5, 1), (6, 3), (7, 0), (8, 1)])
def test_show_tells_all_of_one_drill(mixed, capsys, number, status):
    assert main(["campaign", "show", str(mixed), "--drill", str(number)]) == status
    said = capsys.readouterr().out
    assert "crashkernel drill --placement=" in said
    assert ("| \\x1b[31mtwo\\x00" in said) == (number in (5, 7))
    assert main(["campaign", "show", str(mixed), "--drill", str(number), "--json"]) == status
    assert json.loads(capsys.readouterr().out)["number"] == number


def test_results_of_a_campaign_have_an_exit_status(tmp_path, capsys):
    text = 'name = "t"\n[[drill]]\n'
    for result, status in ((PASS, 0), (FAIL, 1), (ERROR, 3)):
        db = made(tmp_path / f"{status}.sqlite", text, {1: result})
        assert main(["campaign", "show", str(db), "--json", "--junit", str(tmp_path / "j.xml")]) == status
        assert json.loads(capsys.readouterr().out)["counts"]["passed"] == (status == 0)
        assert ET.parse(tmp_path / "j.xml").getroot().get("tests") == "1"


def test_diff_fails_if_something_got_worse(tmp_path, capsys):
    text = 'name = "t"\n[[drill]]\n'
    good, bad = made(tmp_path / "g.sqlite", text, {1: PASS}), made(tmp_path / "b.sqlite", text, {1: FAIL})
    assert main(["campaign", "diff", str(good), str(bad)]) == 1
    assert "worse   debian:bookworm" in capsys.readouterr().out
    assert main(["campaign", "diff", str(bad), str(good)]) == 0
    assert "0 worse, 1 better" in capsys.readouterr().out
    assert main(["campaign", "diff", str(bad), str(good), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changes"][0]["kind"] == "better"


TWO = 'name = "t"\n[[matrix]]\nsmp = [1, 2]\n'
ONE = 'name = "t"\n[[matrix]]\nsmp = [1]\n'


@pytest.mark.parametrize(
    ("before", "after", "status", "said"),
    [
        ((TWO, {1: PASS, 2: PASS}), (TWO, {1: PASS}), 3, "1 of those that passed before has no result now"),
        ((TWO, {1: PASS, 2: PASS}), (ONE, {1: PASS}), 3, "1 of those that passed before has no result now"),
        ((TWO, {1: PASS, 2: PASS}), (TWO, {}), 3, "nothing could be compared: no drill has a result in both"),
        ((TWO, {}), (TWO, {1: PASS, 2: PASS}), 3, "nothing could be compared: no drill has a result in both"),
        ((TWO, {1: PASS, 2: PASS}), (TWO, {1: FAIL}), 1, "1 worse, 0 better, 1 otherwise changed"),
        ((TWO, {1: PASS, 2: FAIL}), (ONE, {1: PASS}), 0, "1 gone, 1 the same"),
        ((TWO, {1: PASS}), (TWO, {1: PASS, 2: FAIL}), 0, "0 worse, 0 better, 1 otherwise changed"),
    ],
)
def test_diff_is_no_success_where_what_passed_has_no_result_now(tmp_path, capsys, before, after, status, said):
    paths = [made(tmp_path / f"{name}.sqlite", *side) for name, side in (("a", before), ("b", after))]
    assert main(["campaign", "diff", *map(str, paths)]) == status
    assert said in capsys.readouterr().out
    assert main(["campaign", "diff", *map(str, paths), "--json"]) == status
    record = json.loads(capsys.readouterr().out)
    assert (status == 3) == (record["compared"] == 0 or bool(record["lost"])) or status == 1
    assert all(drill["verdict"] == "PASS" for drill in record["lost"])


@pytest.mark.parametrize("words", [["show"], ["diff", "x.sqlite"], ["table"]])
def test_a_database_that_is_not_there_is_told(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert main(["campaign", *words, "none.sqlite"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("crashkernel: ")
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_would_be_run_is_listed_and_nothing_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRASHKERNEL_CPUS", "2")
    monkeypatch.setenv("CRASHKERNEL_MEMORY", "8G")
    Path("t.toml").write_text(MATRIX + 'memory = "1G"\n' + KNOWN)
    assert main(["campaign", "run", "t.toml", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[0] == "   1   20 s  1 CPU and 3.5 GiB    a, pseries POWER9 radix, 1 CPU, 1 GiB, crashkernel=512M, zero"
    assert lines[-1] == (
        "t: 8 drills, 0 of them done; 2 min or so for the others on 2 CPUs and 8 GiB, 2 at a time; a drill may take 20 min"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["t.toml"]
    made(tmp_path / "t.sqlite", MATRIX + 'memory = "1G"\n' + KNOWN, {1: PASS, 2: FAIL})
    assert main(["campaign", "run", "t.toml", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("   1  PASS   1 CPU")
    assert "2 of them done" in lines[-1]
