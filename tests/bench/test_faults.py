"""The fault map can tell every outcome from every other, and its picture and figures are of its results."""

import collections
import json
from itertools import pairwise
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from crashkernel.bench import faults
from crashkernel.bench.cpus import BARE, CPUS
from crashkernel.bench.faults import DMA_SIZE, OUTCOMES, Fault, Scene, Walk, scene
from crashkernel.bench.stepper import Stepper
from crashkernel.errors import VerificationError
from crashkernel.purgatory import PARAMETERS_OFFSET, TABLE_OFFSET

pytestmark = pytest.mark.bench

PLACEMENTS = ("zero", "reserved")
every_placement = pytest.mark.parametrize("placement", PLACEMENTS)


def outcome(setting: Scene, *injected: Fault, cpu: str = "POWER9", little: bool = True) -> list[tuple[str, str]]:
    """What comes of each fault before the purgatory's first instruction."""
    with Stepper.start(CPUS[cpu], len(setting.memory)) as stepper:
        walk = Walk(stepper, cpu, setting, little=little)
        return [walk.disturbed(fault, stepper.save()) for fault in injected]


@every_placement
@pytest.mark.parametrize(("cpu", "little"), [(c, e) for c in BARE for e in (False, True) if CPUS[c].little or not e])
def test_undisturbed_it_is_good(placement, cpu, little):
    assert outcome(scene(placement), faults.NO_FAULT, cpu=cpu, little=little) == [("good", "")]


@every_placement
def test_before_the_start(placement):
    """A segment, the code, a parameter, the table: told. K1's memory: K1's. A machine check into K1's vectors: silence."""
    setting = scene(placement)
    found = outcome(
        setting,
        *(Fault("DMA", name, setting.spots[name]) for name in ("tree", "initrd", "elfcorehdr")),
        Fault("bit", "code", setting.base + 0x1234),
        Fault("bit", "parameter", setting.base + PARAMETERS_OFFSET + 0x37),
        Fault("bit", "table", setting.base + TABLE_OFFSET + 0x1C),
        Fault("DMA", "K1", 0x3000),
        Fault("interrupt", "machine check", 0x200),
    )
    assert [word for word, _ in found] == ["told"] * 6 + ["good", "silent hang"]


@every_placement
def test_a_loss_of_k1_shows(placement):
    """The same byte changed by nobody's DMA."""
    setting = scene(placement)
    setting.final[int(setting.homes[0x1008])] ^= 1
    ((word, why),) = outcome(setting, faults.NO_FAULT)
    assert word == "silent damage"
    assert "K1: 1 bytes" in why or "K2" in why


@every_placement
def test_damage_after_the_last_check_is_silent(placement):
    """Nothing can check what is struck after its check; the map says so."""
    each = faults.fault_map(placement, every=97, faults=["initrd"])
    initrd = [r for r in each.results if r.fault == Fault("DMA", "initrd", scene(placement).spots["initrd"])]
    words = [r.outcome for r in initrd]
    assert words[0] == "told"
    assert words[-1] == "silent damage"
    assert words == sorted(words, reverse=True), "told until its check has passed, silent from then on"
    assert len(initrd) == len({r.point.index for r in initrd})


def test_a_handover_that_fails_undisturbed_makes_no_map():
    setting = scene("zero")
    setting.memory[setting.base + 0x1234] ^= 1
    with pytest.raises(VerificationError, match="undisturbed"):
        faults.map_scene(setting, cpu="POWER9", little=True, every=1)


def test_the_walk_visits_every_instruction_of_the_image_that_runs():
    """Against a walk that skips nothing: the same addresses, the same count."""
    setting = scene("reserved")
    with Stepper.start(CPUS["POWER9"], len(setting.memory)) as stepper:
        walk = Walk(stepper, "POWER9", setting, little=False)
        points = []
        for point in walk.points():
            points.append(point)
            if point.phase.startswith("1 "):
                break
        assert (np.diff([point.index for point in points]) > 0).all()
        walk = Walk(stepper, "POWER9", setting, little=False)
        stepper.poke_all(setting.memory.tobytes())
        seen = collections.Counter([setting.base])
        for _ in range(2000):
            seen[stepper.step()] += 1
        early = {point.pc for point in points if point.index <= 2000}
        assert early == set(seen)


def test_figures_picture_and_data_are_of_the_results():
    point = faults.Point(0, "before the first row", 0x1000, touches_memory=True)
    results = tuple(faults.Result(point, Fault("DMA", f"spot {n}", 0), word, "") for n, word in enumerate(OUTCOMES))
    each = faults.FaultMap("zero", "POWER9", True, 10, results)
    assert each.count() == dict.fromkeys(OUTCOMES, 1)
    assert len(json.loads(faults.to_json([each]))[0]["rows"]) == 4
    text = faults.render_faults(each)
    assert all(f"spot {number}" in text for number in range(4))
    picture = ET.fromstring(faults.svg(each))
    fills = collections.Counter(element.get("fill") for element in picture.iter() if element.get("fill"))
    assert all(fills[faults._COLOURS[word]] == 2 for word in OUTCOMES), "one in the key, one in the map"


def test_regions_do_not_lie_in_each_other():
    for placement in PLACEMENTS:
        at = sorted(scene(placement).spots.values())
        assert all(b - a >= DMA_SIZE for a, b in pairwise(at))
