"""The campaign file: what it expands to, which keys and seeds its drills have, and what it is told when it is wrong."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.campaign.file import MOST_DRILLS, PlannedDrill, load_campaign, parse_campaign
from crashkernel.drill.request import DrillRequest
from crashkernel.errors import UsageError

CAMPAIGNS = sorted((Path(__file__).parents[2] / "campaigns").glob("*.toml"))


def drills(text: str) -> tuple[PlannedDrill, ...]:
    return parse_campaign('name = "t"\n' + text, "t.toml").drills


def toml(value) -> str:
    """A list, number, text or boolean as TOML, which is JSON there."""
    return json.dumps(value)


@pytest.mark.parametrize("path", CAMPAIGNS, ids=lambda path: path.name)
def test_what_is_shipped_can_be_read(path):
    campaign = load_campaign(path)
    assert campaign.name == path.stem
    assert len({drill.key for drill in campaign.drills}) == len(campaign.drills) > 1


def test_the_reach_campaign_is_as_large_as_it_has_to_be():
    reach = load_campaign(next(path for path in CAMPAIGNS if path.name == "reach.toml"))
    assert len(reach.drills) >= 100
    assert {drill.request.placement for drill in reach.drills} == {"zero", "reserved"}


def test_a_matrix_is_the_product_of_its_axes_in_the_files_order():
    found = drills(
        '[defaults]\nmemory = "1G"\n[[matrix]]\nplacement = ["zero", "reserved"]\nsmp = [1, 2, 4]\nkernel = "debian:sid"'
    )
    assert [(d.request.placement, d.request.smp) for d in found] == list(itertools.product(("zero", "reserved"), (1, 2, 4)))
    assert {(d.request.kernel, d.request.memory) for d in found} == {("debian:sid", "1G")}


def test_options_that_go_together_are_an_axis_by_any_name():
    found = drills(
        """[[matrix]]
        host = [{ cpu = "POWER8" }, { cpu = "POWER9", mmu = ["radix", "hash"] }, { machine = "powernv10" }]
        smp = [1, 2]"""
    )
    one = [("pseries", "POWER8", "hash"), ("pseries", "POWER9", "radix"), ("pseries", "POWER9", "hash")]
    one.append(("powernv10", "POWER10", "radix"))
    assert [(d.request.machine, d.request.cpu, d.request.mmu) for d in found] == [each for each in one for _ in range(2)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('["", "nmi", "nmi dma:init"]', [(), ("nmi",), ("nmi", "dma:init")]),
        ('[[], ["nmi"], ["nmi", "dma:init"]]', [(), ("nmi",), ("nmi", "dma:init")]),
        ('"nmi dma:init"', [("nmi", "dma:init")]),
    ],
)
def test_faults_of_one_drill_are_words_and_a_matrix_has_a_list_of_them(value, expected):
    assert [drill.request.fault for drill in drills(f"[[matrix]]\nfault = {value}")] == expected


def test_a_single_drill_has_a_list_of_words_or_a_text():
    found = drills('[[drill]]\nfault = ["nmi", "dma:init"]\n[[drill]]\nfault = "nmi"\nrepeats = 2')
    assert [(drill.request.fault, drill.repeat) for drill in found] == [
        (("nmi", "dma:init"), 1),
        (("nmi",), 1),
        (("nmi",), 2),
    ]


def test_what_is_excluded_is_left_out_even_where_no_machine_has_it():
    found = drills(
        """[[matrix]]
        cpu = ["POWER8", "POWER9"]
        mmu = ["radix", "hash"]
        kernel = ["debian:sid", "debian:sid/powerpc64le-64k"]
        exclude = [{ cpu = "POWER8", mmu = "radix" }, { kernel = "*64k", mmu = ["hash"] }]"""
    )
    assert [(d.request.cpu, d.request.mmu, d.request.kernel) for d in found] == [
        ("POWER8", "hash", "debian:sid"),
        ("POWER9", "radix", "debian:sid"),
        ("POWER9", "radix", "debian:sid/powerpc64le-64k"),
        ("POWER9", "hash", "debian:sid"),
    ]


def test_what_is_excluded_has_what_follows_from_its_machine_even_where_it_cannot_be_had():
    """A CPU that is stuck needs a second one; powernv10 has a POWER10."""
    found = drills(
        """[[matrix]]
        machine = "powernv10"
        fault = ["stuck-cpu nmi"]
        smp = [1, 2]
        exclude = [{ cpu = "POWER10", mmu = "radix", fault = "stuck-cpu*", smp = 1 }]"""
    )
    assert [(d.request.cpu, d.request.smp) for d in found] == [("POWER10", 2)]


@pytest.mark.parametrize(
    ("defaults", "rest", "count"),
    [
        ('capture-codec = "zlib"', "[[matrix]]\ncapture = [1, 31]", 2),
        ('fault = ["stuck-cpu"]', "[[matrix]]\nsmp = [2, 4]", 2),
        ('cpu = "POWER10"', '[[drill]]\nmachine = "powernv10"', 1),
        ('memory = "512M"', '[[matrix]]\nmachine = "powernv9"\nmemory = ["1G", "2G"]', 2),
    ],
)
def test_defaults_need_not_be_a_drill_by_themselves(defaults, rest, count):
    assert len(drills(f"[defaults]\n{defaults}\n{rest}")) == count


def test_a_title_has_a_seed_that_is_the_files_and_no_other():
    given = drills("[[matrix]]\nfault = 'nmi'\nseed = [1, 2]")
    assert [drill.title.rpartition("zero, ")[2] for drill in given] == ["nmi, seed 1", "nmi, seed 2"]
    made = drills("seed = 7\n[[drill]]\nfault = 'nmi'\nrepeats = 2\n[[drill]]")
    assert not any("seed" in drill.title for drill in made)


def test_a_known_failure_has_its_reason():
    found = drills(
        """[[matrix]]
        smp = [1, 2]
        fault = ["", "dma:init", "dma:text,rate=10"]
        [[known]]
        match = { fault = "dma:*", smp = 2 }
        reason = " as ever "
        [[known]]
        match = { fault = "dma:text*" }
        reason = "of late" """
    )
    assert [drill.known for drill in found] == ["", "", "of late", "", "as ever", "as ever"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "t.toml: x: no key of a campaign file"),
        ("repeats = 0\n[[drill]]", "t.toml: repeats: must be a whole number, 1 or more"),
        ("repeats = true\n[[drill]]", "t.toml: repeats: must be a whole number"),
        ("seed = -1\n[[drill]]", "t.toml: seed: must be a whole number, 0 or more"),
        ('deadline = "1h"\n[[drill]]', "t.toml: deadline: must be a whole number"),
        ("", "t.toml: matrix: the file lists no drill"),
        ("matrix = 1", "t.toml: matrix: must be a list of tables (write [[matrix]])"),
        ("[matrix]\nsmp = 1", "t.toml: matrix: must be a list of tables"),
        ("defaults = 1\n[[drill]]", "t.toml: defaults: must be a table of options"),
        ("[defaults]\nsmp = [1, 2]\n[[drill]]", "t.toml: defaults: smp = [1, 2]: must be a whole number"),
        ("[defaults]\nsnp = 1\n[[drill]]", "t.toml: defaults: 'snp' is no option of a drill"),
        ("[[matrix]]\nsnp = 1", "t.toml: matrix 1: snp: no option of a drill, nor a list of tables of options"),
        ("[[matrix]]\nsmp = []", "t.toml: matrix 1: smp: an empty list leaves no drill"),
        ("[[matrix]]\nhost = []", "t.toml: matrix 1: host: an empty list leaves no drill"),
        ("[[matrix]]\nhost = [{ snp = 1 }]", "t.toml: matrix 1: host: snp: no option of a drill"),
        ('[[matrix]]\nsmp = ["1"]', "t.toml: matrix 1: smp = '1': must be a whole number"),
        ('[[matrix]]\ncpu = "486"', "t.toml: matrix 1: cpu = '486': must be one of POWER8"),
        ('[[matrix]]\ncpu = "POWER8"\nmmu = "radix"', "t.toml: matrix 1: POWER8 has no radix MMU"),
        ("[[matrix]]\nsmp = 1\nhost = [{ smp = 2 }]", "t.toml: matrix 1: smp come from two axes"),
        ("[[matrix]]\nsmp = [1, 1]", "t.toml: matrix 1: 'debian:bookworm, pseries POWER9 radix, 1 CPU"),
        ("[[matrix]]\nsmp = [1, 2]\n[[drill]]\nsmp = 2", "was listed before, by matrix 1 (list each drill once)"),
        ("[[matrix]]\nsmp = 1\nexclude = [{ smp = 2 }]", "t.toml: matrix 1: exclude 1: matches no drill of this matrix"),
        ("[[matrix]]\nsmp = 1\nexclude = [{ snp = 1 }]", "t.toml: matrix 1: exclude 1: snp: no option of a drill"),
        ("[[matrix]]\nsmp = 1\nexclude = [{}]", "t.toml: matrix 1: exclude 1: an empty table would match every drill"),
        ("[[matrix]]\nsmp = [2, 4]\nexclude = [{ smp = [2, '4'] }]", "matrix 1: exclude 1: smp: '4' matches no drill of this"),
        ("[[matrix]]\nsmp = [2, 4]\nexclude = [{ smp = [2, 77] }]", "matrix 1: exclude 1: smp: 77 matches no drill of this"),
        ("[[matrix]]\nall-cpus = [true, false]\nexclude = [{ all-cpus = [true, 1] }]", "exclude 1: all-cpus: 1 matches no"),
        ("[[matrix]]\nsmp = [2, 4]\nexcludes = [{ smp = 4 }]", "t.toml: matrix 1: excludes: too much like exclude"),
        ("[[matrix]]\nsmp = [2, 4]\nexlude = [{ smp = 4 }]", "t.toml: matrix 1: exlude: too much like exclude"),
        ("[[matrix]]\nsmp = [2, 4]\n[[matrix.Excluded]]\nmmu = 'hash'", "t.toml: matrix 1: Excluded: too much like exclude"),
        ("[[matrix]]\nkernel = ['*sid', 'a']", "t.toml: matrix 1: kernel = '*sid': must be one kernel"),
        ("[[drill]]\ncrashkernel = 'foo'", "t.toml: drill 1: crashkernel = 'foo': must be what K1 can read"),
        ("[[matrix]]\nmemory = ['0', '1G']\nexclude = [{ memory = '0' }]", "t.toml: matrix 1: memory = '0': must be a size"),
        ("[defaults]\nmemory = '100M'\n[[drill]]", "t.toml: drill 1: a pseries cannot have 100 MiB of memory (give a multiple"),
        (
            "[[drill]]\n[[known]]\nmatch = { smp = [1, 2] }\nreason = 'x'",
            "known 1: match: smp: 2 matches no drill of this file",
        ),
        ("[[matrix]]\nsmp = 1\nexclude = { smp = 1 }", "t.toml: matrix 1: exclude: must be a list of tables"),
        ("[[matrix]]\nsmp = 1\nexclude = [{ smp = 1 }]", "t.toml: matrix 1: no drill is left"),
        ("[[drill]]\nsmp = [1]", "t.toml: drill 1: smp = [1]: must be a whole number"),
        ("[[drill]]\ncapture-codec = 'zstd'", "t.toml: drill 1: capture-codec and capture-to say how"),
        ("[[drill]]\n[[known]]\nreason = 'x'", "t.toml: known 1: match: must be a table of options"),
        ("[[drill]]\n[[known]]\nmatch = { smp = 1 }", "t.toml: known 1: reason: must be a text of one line"),
        ("[[drill]]\n[[known]]\nmatch = { smp = 2 }\nreason = 'x'", "t.toml: known 1: match: matches no drill of this file"),
        ("[[drill]]\n[[known]]\nmatsch = { smp = 2 }", "t.toml: known 1: matsch: no key of [[known]]"),
        (f"repeats = {MOST_DRILLS + 1}\n[[drill]]", "t.toml: repeats: 100,001 drills are more than 100,000"),
        (f"[[matrix]]\nmemory = ['1G', '2G']\nsmp = {[1] * 500}\nseed = {[1] * 500}", "500,000 drills are more than 100,000"),
        ("[[drill]", "t.toml: "),
        ("x = 2026-01-01", "t.toml: x: no key"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_with_file_and_key(text, said):
    with pytest.raises(UsageError) as caught:
        drills(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_name_or_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"t\.toml: name: must be a text"):
        parse_campaign("[[drill]]", "t.toml")
    path = tmp_path / "c.toml"
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(UsageError, match="no text in UTF-8"):
        load_campaign(path)
    with pytest.raises(UsageError, match="No such file"):
        load_campaign(tmp_path / "none.toml")


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["kernel", "smp", "fault", "memory", "capture", "seed", "exclude", "repeats", "host", "match", "cpu"]),
        junk,
    ),
    st.sampled_from(["[[matrix]]", "[[drill]]", "[defaults]", "[[drill]]\n[[known]]"]),
)
def test_whatever_the_file_has_the_answer_is_drills_or_one_line(table, where):
    def render(value) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{toml(name)} = {render(item)}" for name, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(render, value)) + "]"
        return toml("" if value is None else value)

    text = where + "\n" + "\n".join(f"{name} = {render(value)}" for name, value in table.items())
    said = ""
    try:
        assert drills(text)
    except UsageError as error:
        said = str(error)
    assert "\n" not in said


axes = st.fixed_dictionaries(
    {},
    optional={
        "kernel": st.lists(st.sampled_from(["a", "b", "c"]), unique=True, min_size=1),
        "smp": st.lists(st.integers(1, 8), unique=True, min_size=1, max_size=3),
        "placement": st.lists(st.sampled_from(["zero", "reserved"]), unique=True, min_size=1),
        "fault": st.lists(st.sampled_from(["", "nmi", "flip:initrd", "dma:init,rate=10"]), unique=True, min_size=1),
    },
)


def matrix(table) -> str:
    return "[[matrix]]\n" + "\n".join(f"{name} = {toml(values)}" for name, values in table.items())


@given(axes, st.integers(1, 3), st.integers(0, 5), st.randoms(use_true_random=False))
def test_keys_and_seeds_are_the_drills_own(table, repeats, seed, chance):
    """However the file is ordered, and whatever else is in it."""
    head = f"seed = {seed}\nrepeats = {repeats}\n"
    found = drills(head + matrix(table))
    assert len(found) == repeats * len(list(itertools.product(*table.values())))
    assert len({drill.key for drill in found}) == len(found)
    shuffled = {name: chance.sample(values, len(values)) for name, values in chance.sample(list(table.items()), len(table))}
    others = drills(head + "[[drill]]\nmemory = '3G'\n" + matrix(shuffled))
    assert set(others) - set(found) == {PlannedDrill(DrillRequest(memory="3G"), repeat + 1) for repeat in range(repeats)}
    assert set(found) <= set(others)
    more = drills(f"seed = {seed}\nrepeats = {repeats + 1}\n" + matrix(table))
    assert set(found) <= set(more)


@given(axes, st.integers(0, 5))
def test_only_faults_have_a_seed_and_it_is_the_campaigns(table, seed):
    one, other = (drills(f"seed = {each}\nrepeats = 2\n" + matrix(table)) for each in (seed, seed + 1))
    for before, after in zip(one, other, strict=True):
        assert replace(before.request, seed=0) == replace(after.request, seed=0)
        if before.request.fault:
            assert before.request.seed != after.request.seed
        else:
            assert before == after


def test_a_seed_that_is_given_stays():
    assert {drill.request.seed for drill in drills("repeats = 3\n[[drill]]\nfault = ['nmi']\nseed = 7")} == {7}


@pytest.mark.parametrize("number", [f"0x{'f' * 5000}", "9" * 5000, "9223372036854775808", "-1", "1e400", "true"])
@pytest.mark.parametrize("name", ["seed", "repeats", "deadline"])
def test_a_number_that_is_none_or_larger_than_a_database_holds(name, number):
    with pytest.raises(UsageError, match=r"must be a whole number|integer string"):
        parse_campaign(f'name = "c"\n{name} = {number}\n[[matrix]]\nsmp = [1]\n', "c.toml")
