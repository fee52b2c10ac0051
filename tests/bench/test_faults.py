"""The fault map can tell every outcome from every other, and its picture and figures are of its results."""

import collections
import json
import random
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from crashkernel.bench import bits, faults, score
from crashkernel.bench import walk as walk_module
from crashkernel.bench.bits import flip_bits, inject_damage, render_bits, render_injections
from crashkernel.bench.cpus import BARE, CPUS
from crashkernel.bench.faultpicture import _COLOURS, render_faults, svg
from crashkernel.bench.faults import FaultMap, Stretch
from crashkernel.bench.scene import ARENA, DMA_SIZE, NO_FAULT, PLACEMENTS, Fault, put, scene
from crashkernel.bench.score import Point
from crashkernel.bench.secondcpu import second_cpu
from crashkernel.bench.stepper import Stepper
from crashkernel.bench.walk import OUTCOMES, REASONS, UNEXPLAINED, Verdict, Walk
from crashkernel.cli import main
from crashkernel.errors import VerificationError
from crashkernel.purgatory import PARAMETERS_OFFSET, TABLE_OFFSET, pack

pytestmark = pytest.mark.bench

every_placement = pytest.mark.parametrize("placement", PLACEMENTS)
EQUAL = (0x7C042000).to_bytes(4, "big")  # cmpw r4,r4
RESULT = bytes.fromhex("2c0400004e800020")  # cmpwi r4,0; blr: how `check` ends
CPU_STOPS = (0x4C0002E4).to_bytes(4, "big")  # stop, of the POWER9


def blind(image):
    """The purgatory with a check that finds nothing."""
    assert image.count(RESULT) == 1
    return image.replace(RESULT, EQUAL + RESULT[4:])


def outcomes(setting, *injected, cpu="POWER9", little=True):
    """What comes of each fault before the purgatory's first instruction."""
    with Walk(cpu, setting, little=little) as walk:
        here = walk.stepper.save()
        return [walk.disturbed(fault, here) for fault in injected]


@pytest.mark.parametrize(("cpu", "little"), [(c, e) for c in BARE for e in (False, True) if CPUS[c].little or not e])
def test_undisturbed_it_is_good(cpu, little):
    with Walk(cpu, scene("zero"), little=little, scored=False) as walk:
        assert walk.disturbed(NO_FAULT, walk.stepper.save()) == Verdict("good", "", "")


@every_placement
def test_before_the_start(placement):
    """A segment, the code, a parameter, the table: told. K1's memory: K1's. A machine check into K1's vectors: silence."""
    setting = scene(placement)
    found = outcomes(
        setting,
        *(Fault("DMA", name, setting.spots[name]) for name in ("tree", "initrd", "elfcorehdr")),
        Fault("bit", "code", setting.base + 0x1234),
        Fault("bit", "parameter", setting.base + PARAMETERS_OFFSET + 0x37),
        Fault("bit", "table", setting.base + TABLE_OFFSET + 0x1C),
        Fault("DMA", "K1", 0x3000),
        Fault("interrupt", "machine check", 0x200),
    )
    assert [each.outcome for each in found] == ["told"] * 6 + ["good", "silent hang"]
    assert found[-1].reason == "before the guard"


def test_without_its_checks_damage_is_silent_and_unexplained():
    """The classifier does not take the purgatory's word for it."""
    setting = scene("zero")
    image = setting.memory[setting.base : setting.base + 0x6000].tobytes()
    put(setting.memory, setting.base, blind(image))
    found = outcomes(setting, NO_FAULT, Fault("DMA", "initrd", setting.spots["initrd"]))
    assert found == [Verdict("good", "", ""), Verdict("silent damage", "initrd", UNEXPLAINED)]


@every_placement
def test_a_loss_of_k1_shows(placement):
    """The same byte changed by nobody's DMA."""
    setting = scene(placement)
    setting.final[int(setting.homes[0x1008])] ^= 1
    (found,) = outcomes(setting, NO_FAULT)
    assert found.outcome == "silent damage"
    assert "K1: 1 bytes" in found.why or "K2" in found.why


def test_a_cpu_that_stops_for_ever_costs_a_machine_and_no_more():
    setting = scene("zero")
    with Walk("POWER9", setting, little=False) as walk:
        here = walk.stepper.save()
        stopping = Fault("DMA", "a stop", setting.base + 0x30)
        walk._noise[:4] = list(CPU_STOPS)
        found = walk.disturbed(stopping, here)
        assert (found.outcome, found.why, found.reason) == ("silent hang", "stuck", "before any check")
        assert walk.machines == 2
        assert walk.disturbed(NO_FAULT, here).outcome == "good"


@every_placement
def test_damage_after_the_last_check_is_silent(placement):
    """Nothing can check what is struck after its check; the map says so."""
    each = faults.fault_map(placement, every=97, faults=["initrd"])
    struck = [s for s in each.stretches if s.fault.kind == "DMA"]
    assert [(s.verdict.outcome, s.verdict.reason) for s in struck] == [("told", ""), ("silent damage", "after its last check")]
    assert (struck[0].first, struck[-1].last) == (0, len(each.points) - 1)


@every_placement
def test_a_coarse_map_has_nothing_unexplained(placement):
    each = faults.fault_map(placement, every=1200)
    assert not each.unexplained
    assert each.reasons().keys() <= REASONS.keys()
    assert sum(each.count().values()) == len(each.points) * len({s.fault for s in each.stretches})
    assert all(each.count()[word] for word in OUTCOMES)


def test_points_stand_for_all_instructions():
    """And none of a short stretch outside loops is left out."""
    setting = scene("reserved")
    with Walk("POWER9", setting, little=True) as walk:
        points = walk.score.points
        assert sum(point.weight for point in points) == len(walk.score.pcs)
        assert {point.pc for point in points} == set(walk.score.pcs.tolist())
        assert [point.index for point in points[:10]] == list(range(10))
        for point in (points[50], points[-1]):
            walk.advance(point)
            assert walk.stepper.read("pc") == (point.pc,)


def test_what_is_reckoned_is_what_the_cpu_does():
    """Code of all that is reckoned, with any operands: the same registers come of it."""
    source = random.Random(5)
    words = []
    for _ in range(500):
        a, b, c = (source.randrange(3, 32) for _ in range(3))
        first, last = sorted(source.randrange(32) for _ in range(2))
        words += [
            14 << 26 | a << 21 | source.choice([0, b]) << 16 | source.randrange(1 << 16),  # addi
            21 << 26 | a << 21 | b << 16 | source.randrange(32) << 11 | first << 6 | last << 1,  # rlwinm
            31 << 26 | a << 21 | b << 16 | c << 11 | source.choice([316, 444]) << 1,  # xor, or
            32 << 26 | a << 21 | 1 << 16 | 4 * source.randrange(-64, 64) & 0xFFFF,  # lwz from r1 on
            31 << 26 | a << 21 | 1 << 16 | 2 << 11 | 23 << 1,  # lwzx
        ]
    assert all(map(score._is_reckoned, words))
    code = b"".join(word.to_bytes(4, "big") for word in words)
    names = [f"r{number}" for number in range(32)]
    with Stepper.start(CPUS["POWER9"], ARENA) as stepper:
        put(stepper.memory, 0x4000, code)
        put(stepper.memory, 0x8000, source.randbytes(0x1000))
        stepper.enter(0x4000, physical=0, little=False)
        stepper.write({"r1": 0x8400, "r2": 0x2C} | {name: source.getrandbits(64) for name in names[3:]})
        registers = list(stepper.read(*names))
        stepper.stop_at([0x4000 + len(code)])
        assert stepper.run(30) == 0
        loaded = [score._reckon(word, registers, stepper.memory) for word in words]
        assert registers == list(stepper.read(*names))
    assert [place for place in loaded if place][1::2] == [(0x842C, 4)] * 500


def test_a_cpu_that_does_otherwise_than_reckoned_is_told(monkeypatch):
    reckon = score._reckon
    monkeypatch.setattr(walk_module, "_SCORES", {})
    monkeypatch.setattr(score, "_reckon", lambda word, *rest: reckon(word ^ 0x800 if word >> 26 == 21 else word, *rest))
    with (
        pytest.raises(VerificationError, match="does not do what its instructions"),
        Walk("POWER9", scene("zero"), little=True),
    ):
        pass


def test_a_cpu_that_comes_to_k2s_entry_for_ever_is_given_up(monkeypatch):
    """Before K2 is there: round and round through page 0, by a flipped bit of its first instruction."""
    runs, run = [], Stepper.run
    monkeypatch.setattr(Stepper, "run", lambda *a: runs.append(a) or run(*a))
    setting = scene("zero")
    setting.memory[0] ^= 0x80
    with Walk("POWER9", setting, little=True, scored=False) as walk:
        monkeypatch.setattr(walk, "_reason", lambda *_, **__: "before any check")
        found = walk.disturbed(Fault("bit", "the first instruction", setting.base, 0x80), walk.stepper.save())
        assert (found.outcome, found.why) == ("silent hang", "stuck")
        assert walk.machines == 1
    assert len(runs) < 50


def test_a_handover_that_fails_undisturbed_makes_no_map():
    setting = scene("zero")
    setting.memory[setting.base + 0x1234] ^= 1
    with pytest.raises(VerificationError, match="undisturbed"):
        faults.map_scene(setting, cpu="POWER9", little=True, every=1)


@pytest.mark.parametrize(("placement", "little"), [("zero", True)])
def test_a_second_cpu_is_never_silent(placement, little):
    found = second_cpu(placement, little=little, every=4000)
    assert not found.silent
    ends = {coming: {outcome for outcome, _ in row} for coming, row in found.found.items()}
    assert ends["early"] == ends["waited for"] == {"good"}
    assert ends["never"] == ends["after K2's entry"] == ends["straggler"] == {"told"}
    assert {end for _, end in found.found["now"]} == {"K2's slave code"}


def test_the_check_tells_all_damage(monkeypatch):
    """And one that is blind tells none: the count is not made up."""
    found = inject_damage(cases=10_000)
    assert found.damaged >= 10_000
    assert (found.missed, found.imagined) == ((), 0)
    assert ", 0 missed" in render_injections(found)
    monkeypatch.setattr(bits, "pack", lambda *a, **k: blind(pack(*a, **k)))
    found = inject_damage(cases=20)
    assert len(found.missed) == found.damaged


def test_flipped_bits_are_told_or_explained():
    found = flip_bits("zero", every=6007)
    assert not found.unexplained
    assert found.table()["table"].keys() == {"told"}
    assert f"{len(found.verdicts):,} of {bits.BITS:,}" in render_bits(found)


def test_figures_picture_and_data_are_of_the_results():
    points = tuple(Point(n, 0x1000 + 4 * n, "before the rows", n + 1) for n in range(4))
    stretches = tuple(
        Stretch(Fault("DMA", f"spot {n}", 0), 0, 3, Verdict(word, "", "before the guard" if "silent" in word else ""))
        for n, word in enumerate(OUTCOMES)
    )
    each = FaultMap("zero", "POWER9", True, 10, points, stretches, 4)
    assert each.count() == dict.fromkeys(OUTCOMES, 4)
    assert each.count(weighted=True) == dict.fromkeys(OUTCOMES, 10)
    assert len(json.loads(faults.to_json([each]))[0]["stretches"]) == 4
    text = render_faults(each)
    assert all(f"spot {number}" in text for number in range(4))
    assert REASONS["before the guard"] in text
    picture = ET.fromstring(svg(each))
    fills = collections.Counter(element.get("fill") for element in picture.iter() if element.get("fill"))
    assert all(fills[_COLOURS[word]] == 2 for word in OUTCOMES), "one in the key, one in the map"


def test_regions_do_not_lie_in_each_other():
    for placement in PLACEMENTS:
        at = sorted(scene(placement).spots.values())
        assert all(b - a >= DMA_SIZE for a, b in pairwise(at))


@pytest.mark.parametrize("wrong", [["--every", "0"], ["--svg", "/no/such/place"], ["--json", "/no/such/place"]])
def test_what_makes_no_sense(wrong, capsys):
    assert main(["bench", "faults", *wrong]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
