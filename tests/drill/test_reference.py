"""The main job on real input: two real crashes, every byte proved, and the dump read by a reader we did not write."""

import pytest

from crashkernel.drill.record import judge_kept
from crashkernel.placement.plan import PLACEMENTS, LoadPlan

K1_BYTES = (2048 - 512) << 20
STAGES = ["K1 boot", "load", "crash", "truth", "handover", "K2 boot", "capture", "verify"]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_byte_of_k1_is_in_the_dump(reference, placement):
    drill = reference.of(placement)
    assert drill["verdict"] == "PASS"
    assert drill["k1_bytes"] == drill["bytes_compared"] == K1_BYTES
    assert (drill["bytes_wrong"], drill["bytes_missing"], drill["wrong_ranges"]) == (0, 0, [])
    assert drill["first_256_bytes_ok"]
    assert drill["nonce_found"]
    assert drill["panic_found"]
    assert drill["registers_ok"]
    assert drill["problems"] == []
    assert list(drill["stages"]) == STAGES
    assert f"{placement}: PASS" in reference.output


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_firmware_wrote_is_a_short_list_of_dispatch_counts(reference, placement):
    exempt = reference.of(placement)["exempt"]
    assert len(exempt) <= 1  # one CPU, one VPA
    assert all(e["what"].startswith("VPA dispatch count") and e["changed"] <= 4 for e in exempt)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_guests_plan_is_a_plan_and_the_kept_drill_can_be_judged_again(reference, placement):
    directory = reference.directory / placement
    plan = LoadPlan.from_json((directory / "plan.json").read_text())
    assert plan.placement == placement
    assert plan.k1_memory.total == K1_BYTES
    assert {region.name for region in plan.k1_layout} >= {"K1 text", "K1 freed init", "K1 data"}
    assert judge_kept(directory).passed


def test_the_two_placements_really_differ(reference):
    zero, reserved = (LoadPlan.from_json((reference.directory / p / "plan.json").read_text()) for p in PLACEMENTS)
    assert zero.entry == 0
    assert reserved.entry >= reserved.reserved.start
    # two kernels came up in each twin: K1's log, then K2's, which says of which memory it knows
    for placement, first in (
        ("zero", "[mem 0x0000000000000000-0x0000000002bf"),
        ("reserved", "[mem 0x0000000000000000-0x00000000001f"),
    ):
        console = (reference.directory / placement / "console.log").read_text(errors="replace")
        k2 = console.split("] Linux version")[2]
        assert first in k2


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_drgn_reads_the_dump(reference, placement):
    drgn = pytest.importorskip("drgn")
    directory = reference.directory / placement
    program = drgn.Program()
    program.set_core_dump(directory / "vmcore")
    assert program.platform.arch == drgn.Architecture.PPC64
    assert program.platform.flags & drgn.PlatformFlags.IS_LITTLE_ENDIAN
    with (directory / "truth").open("rb") as truth:
        # text that moved, and memory far above everything that moved
        for paddr in (0x10000, 0x1000000, 0x60000000):
            truth.seek(paddr)
            assert program.read(paddr, 4096, physical=True) == truth.read(4096)
