"""`crashkernel=`: what the kernel makes of it, held against what real kernels made of it."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.cli.planning import _machine
from crashkernel.errors import PlanError
from crashkernel.memory import Range, RangeSet
from crashkernel.placement.reservation import (
    COMMAND_LINE_SIZE,
    behind_k1,
    low_memory,
    off_limits,
    reserve,
    specification,
)
from crashkernel.report.reservation import draw_reservation
from support.machines import GIB, MIB, Block, drmem_node, machine, memory_node, tree

RTAS = Range.sized(0x2FFF0000, 0x10000)
OPAL = Range(768 * MIB, 816 * MIB)


def a_machine(
    memory=2 * GIB, platform="pseries", *, release="6.1.0-50-powerpc64le", kernel_end=0x2880000, page_size=0x10000, **more
):
    """A twin as QEMU makes it: memory in one piece from 0 on, its firmware below 1 GiB."""
    firmware = {"rtas": RTAS} if platform == "pseries" else {"opal": OPAL}
    settings = (
        {"memory": [memory_node(0, memory)] if isinstance(memory, int) else memory, "platform": platform} | firmware | more
    )
    found = machine(tree(**settings), release=release)
    return replace(found, kernel_end=kernel_end, page_size=page_size)


# ------------------------------------------------------------------------------------------------------------ seen for real

# Debian's bookworm, trixie and sid: release, where its image ends, its base page
KERNELS = {
    "6.1": ("6.1.0-50-powerpc64le", 0x2880000, 0x10000),
    "6.12": ("6.12.107+deb13-powerpc64le", 0x287F000, 0x1000),
    "7.2": ("7.2.13+deb14-powerpc64le", 0x2AED000, 0x1000),
}
ALL = ("6.1", "6.12", "7.2")

# What these kernels had in /proc/device-tree/chosen, booted in QEMU with so many MiB: kernels, machine, MMU, memory, what
# followed "crashkernel=" on their command line, and base and size of the region, None without one.
SEEN = [
    (ALL, "pseries", "radix", 2048, "512M", (0x20000000, 0x20000000)),
    (ALL, "pseries", "hash", 2048, "256M", (0x20000000, 0x10000000)),
    (ALL, "powernv", "radix", 2048, "512M", (0x8000000, 0x20000000)),
    (ALL, "pseries", "radix", 512, "512M", None),
    (("6.1",), "pseries", "radix", 2048, "256M@0x12345678", (0x12350000, 0x10000000)),
    (("6.12", "7.2"), "pseries", "radix", 2048, "256M@0x12345678", (0x12346000, 0x10000000)),
    (("6.1",), "pseries", "radix", 2048, "0x10000001", (0x20000000, 0x10010000)),
    (("6.12",), "pseries", "radix", 2048, "0x10000001", (0x20000000, 0x10001000)),
    (("7.2",), "pseries", "radix", 2048, "0x10000001", (0x20000000, 0x10000001)),
    (("6.1", "6.12"), "pseries", "radix", 2048, "512M crashkernel=256M,cma", None),
    (("7.2",), "pseries", "radix", 2048, "512M crashkernel=256M,cma", (0x20000000, 0x20000000)),
    (ALL, "pseries", "radix", 2048, "256M,cma", None),
    (ALL, "pseries", "radix", 2048, "512M,high", None),
    (ALL, "pseries", "radix", 2048, "512M,high crashkernel=128M,low", None),
    (ALL, "pseries", "radix", 2048, "3G", None),
    (ALL, "pseries", "radix", 2048, "256M@32M", None),
    (ALL, "pseries", "radix", 2048, "512M mem=768M", (0x18000000, 0x20000000)),
    (ALL, "pseries", "radix", 2048, "128M@0x2c00000", (0x2C00000, 0x8000000)),
    (ALL, "pseries", "radix", 2048, "512M@1792M", None),
    (ALL, "pseries", "radix", 2048, "2G-4G:320M,4G-32G:512M", (0x20000000, 0x14000000)),
    (ALL, "pseries", "radix", 2048, "1G-2G:320M,2G-:384M@256M", (0x10000000, 0x18000000)),
    (("6.1", "7.2"), "powernv", "radix", 2048, "256M@768M", (0x30000000, 0x10000000)),  # all of OPAL is in there
    (("6.1", "7.2"), "pseries", "radix", 2048, "512MB", None),
    (("6.1",), "pseries", "radix", 2048, "0512M", (0x20000000, 0x14A00000)),
    (("6.1",), "pseries", "radix", 2048, "auto", None),
    (("6.1",), "pseries", "radix", 2048, "128M crashkernel=256M", (0x20000000, 0x10000000)),
    (("7.2",), "pseries", "radix", 2048, "64M foo.crashkernel=320M", (0x20000000, 0x14000000)),
    (("7.2",), "pseries", "radix", 2048, "256M,low", None),
    (("7.2",), "pseries", "radix", 2048, "1G-:256M,high", None),
    (("6.1",), "pseries", "radix", 2048, "1792M@64M", (0x4000000, 0x70000000)),
    (("6.1", "7.2"), "pseries", "hash", 2048, "900M@48M", (0x3000000, 0x38400000)),  # these two on a POWER8
    (("6.1",), "pseries", "hash", 2048, "512M@64M", (0x4000000, 0x20000000)),
    (("6.1",), "pseries", "radix", 2048, "256M fadump=on", (0x20000000, 0x10000000)),
]
CASES = [(kernel, *rest) for kernels, *rest in SEEN for kernel in kernels]


@pytest.mark.parametrize(
    ("kernel", "platform", "mmu", "memory", "words", "seen"), CASES, ids=[f"{c[0]} {c[1]} {c[2]} {c[4]}" for c in CASES]
)
def test_a_prediction_is_what_the_real_kernel_did(kernel, platform, mmu, memory, words, seen):
    release, kernel_end, page_size = KERNELS[kernel]
    twin = a_machine(memory * MIB, platform, release=release, kernel_end=kernel_end, page_size=page_size, radix=mmu == "radix")
    found = reserve(twin, f"console=hvc0 crashkernel={words} rdinit=/init")
    assert (found.range and (found.range.start, found.range.size)) == seen, found.reasons


@pytest.mark.parametrize(
    ("kernel", "words", "console"),
    [
        ("6.1", "512M", ["Reserving 512MB of memory at 512MB for crashkernel (System RAM: 2048MB)"]),
        ("7.2", "512M", ["crashkernel reserved: 0x0000000020000000 - 0x0000000040000000 (512 MB)"]),
        (
            "6.12",
            "256M@0x12345678",
            [
                "Crash kernel base must be aligned to 0x1000",
                "Reserving 256MB of memory at 291MB for crashkernel (System RAM: 2048MB)",
            ],
        ),
        (
            "6.1",
            "512M mem=768M",
            [
                "Adjusted memory limit for crashkernel, now 0x38000000",
                "Reserving 512MB of memory at 384MB for crashkernel (System RAM: 896MB)",
            ],
        ),
        ("7.2", "512M mem=768M", ["crashkernel reserved: 0x0000000018000000 - 0x0000000038000000 (512 MB)"]),
        ("6.1", "256M@32M", ["Crash kernel can not overlap current kernel"]),
        (
            "6.1",
            "512M@1792M",
            [
                "Reserving 512MB of memory at 1792MB for crashkernel (System RAM: 2048MB)",
                "Failed to reserve memory for crashkernel!",
            ],
        ),
        ("7.2", "512M@1792M", ["crashkernel reservation failed - memory is in use."]),
        ("6.12", "256M,cma", ["crashkernel: unrecognized char: ,"]),
        ("6.12", "3G", []),
        ("7.2", "512M,high", []),
    ],
)
def test_the_messages_are_those_of_the_real_kernel(kernel, words, console):
    release, kernel_end, page_size = KERNELS[kernel]
    twin = a_machine(release=release, kernel_end=kernel_end, page_size=page_size)
    assert list(reserve(twin, f"crashkernel={words}").console) == console


def test_cma_is_reserved_besides_and_its_size_is_told():
    sid = a_machine(release="7.2.13")
    assert reserve(sid, "crashkernel=512M crashkernel=256M,cma").cma == 256 * MIB
    alone = reserve(sid, "crashkernel=256M,cma")
    assert (alone.range, alone.cma) == (None, 256 * MIB)  # seen: 6c400000-7c3fffff, and no region
    assert reserve(sid, "crashkernel=512M crashkernel=x,cma").cma == 0


@pytest.mark.parametrize(("release", "region", "cma"), [("6.16.0", False, 0), ("6.17.0", True, 0), ("6.19.0", True, 256 * MIB)])
def test_cma_first_hides_the_region_then_does_nothing_then_works(release, region, cma):
    found = reserve(a_machine(release=release), "crashkernel=512M crashkernel=256M,cma")
    assert (found.range is not None, found.cma) == (region, cma)
    assert region or any("knows no ,cma" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("release", "platform", "base"),
    [
        ("5.10.0-28-powerpc64le", "pseries", 128 * MIB),
        ("5.15.33", "pseries", 128 * MIB),
        ("5.15.34", "pseries", 512 * MIB),
        ("5.17.9", "pseries", 128 * MIB),
        ("5.18.0", "pseries", 512 * MIB),
        ("5.18.0", "powernv", 128 * MIB),
        ("", "pseries", 512 * MIB),
        ("unheard of", "pseries", 512 * MIB),
    ],
)
def test_the_base_depends_on_release_and_platform(release, platform, base):
    found = reserve(replace(a_machine(platform=platform), release=""), "256M", release)
    assert found.range == Range.sized(base, 256 * MIB)
    assert any("not known" in reason for reason in found.reasons) == (not release[:1].isdigit())


def test_half_of_a_small_rma_is_the_base_and_a_region_may_be_beyond_it():
    small = a_machine([memory_node(0, 256 * MIB), memory_node(256 * MIB, 1792 * MIB)])
    found = reserve(small, "512M")
    assert found.range == Range(128 * MIB, 640 * MIB)
    beyond = [refusal for refusal in found.refused if "RMA" in refusal.why]
    assert [(refusal.range, refusal.by, refusal.hit) for refusal in beyond] == [
        (Range(256 * MIB, 2 * GIB), "crashkernel", True)
    ]
    assert found.usable == RangeSet([Range(128 * MIB, 256 * MIB)])


def test_the_firmware_inside_a_region_is_granted_and_cut_out():
    found = reserve(a_machine(), "512M")
    (rtas,) = [refusal for refusal in found.refused if "RTAS" in refusal.why]
    assert (rtas.range, rtas.by, rtas.hit) == (RTAS, "crashkernel", True)
    assert found.usable == RangeSet([found.range]) - RangeSet([RTAS])


def test_what_is_off_limits_does_not_depend_on_what_is_asked_for():
    twin = a_machine()
    lists = [[(r.range, r.why) for r in reserve(twin, spec).refused] for spec in ("512M", "256M@32M", "", "nonsense")]
    assert all(each == lists[0] for each in lists)
    assert [r.by for r in off_limits(twin) if r.range.start == 0] == ["kernel"]
    assert not any(refusal.hit for refusal in off_limits(twin))


def test_one_byte_is_nothing_to_older_kernels():
    # crashk_res.end == crashk_res.start is how reserve_crashkernel says that there is no region
    assert reserve(a_machine(release="6.1.0"), "1").range is None
    assert reserve(a_machine(release="7.2.0"), "1").range == Range.sized(512 * MIB, 1)


def test_overlap_with_k1_begins_below_its_end_and_not_at_it():
    twin = a_machine(kernel_end=0x2880000)
    assert reserve(twin, "128M@0x2870000").range is None
    assert reserve(twin, "128M@0x2880000").range == Range.sized(0x2880000, 128 * MIB)
    unknown = reserve(a_machine(kernel_end=0), "128M@16M")
    assert unknown.range is not None
    assert any("not known" in reason for reason in unknown.reasons)


def test_the_last_word_counts_and_it_is_found_anywhere():
    twin = a_machine()
    assert reserve(twin, "crashkernel=128M quiet crashkernel=256M root=x").range.size == 256 * MIB
    assert reserve(twin, "crashkernel=128M foo.crashkernel=320M").range.size == 320 * MIB
    assert reserve(twin, "crashkernel=128M\tcrashkernel=256M").range.size == 256 * MIB


def test_what_lies_beyond_the_end_of_the_command_line_is_lost():
    line = "a" * (COMMAND_LINE_SIZE - 1 - len(" crashkernel=512M"))
    assert reserve(a_machine(), f"{line} crashkernel=512M").range is not None
    cut = reserve(a_machine(), f"{line}a crashkernel=512M")
    assert cut.range.size == 0x10000  # "crashkernel=512" is what is left of it: less than a page
    assert any("the rest is lost" in reason for reason in cut.reasons)


def test_the_range_taken_is_told():
    found = reserve(a_machine(), "2G-4G:384M,4G-16G:512M,16G-:1G")
    assert found.range.size == 384 * MIB
    assert any("2G-4G:384M" in reason and "2 GiB" in reason for reason in found.reasons)
    assert reserve(a_machine(), "4G-:512M").range is None


def test_memory_is_rounded_up_before_a_range_is_looked_up():
    # firmware keeps some for itself: 1.9 GiB is a 2 GiB machine
    assert reserve(a_machine(2 * GIB - 100 * MIB), "2G-:256M").range is not None
    assert reserve(a_machine(2 * GIB - 128 * MIB), "2G-:256M").range is None


def test_a_range_not_taken_spoils_all_behind_it_when_its_size_is_more_than_memory():
    found = reserve(a_machine(), "64G-128G:2G,1G-64G:512M")
    assert found.range is None
    assert found.console == ("crashkernel: invalid size",)


def test_a_memory_limit_gives_way_up_to_6_14_and_then_cuts_the_region():
    line = "crashkernel=512M mem=768M"
    old, new = (reserve(a_machine(release=release), line) for release in ("6.1.0", "6.15.0"))
    assert old.range == new.range == Range(384 * MIB, 896 * MIB)
    assert "Adjusted memory limit for crashkernel, now 0x38000000" in old.console
    assert any("gives way" in reason for reason in old.reasons)
    assert any("cuts off its memory in 0x30000000-0x38000000" in reason for reason in new.reasons)
    assert old.usable.total - new.usable.total == 128 * MIB
    assert not any("cuts off" in reason for reason in old.reasons)


def test_memory_that_is_no_multiple_of_16_mib_loses_its_end():
    nodes = [memory_node(0, 520 * MIB), memory_node(GIB, 520 * MIB)]
    for release, end in (("6.1.0", 1544 * MIB), ("6.12.0", 1544 * MIB), ("7.2.0", 1544 * MIB)):
        twin = a_machine(nodes, "powernv", release=release)
        assert reserve(twin, "256M@1288M").usable == RangeSet([Range(1288 * MIB, end)])
    odd = [memory_node(0, 512 * MIB), memory_node(GIB, 520 * MIB)]
    for release, end in (("6.1.0", 1544 * MIB), ("6.12.0", 1536 * MIB), ("7.2.0", 1536 * MIB)):
        twin = a_machine(odd, "powernv", release=release)
        assert reserve(twin, "256M@1288M").usable == RangeSet([Range(1288 * MIB, end)])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("release", ["6.1.0-50-powerpc64le", "7.2.13+deb14-powerpc64le"])
def test_a_region_does_not_reach_into_memory_that_can_be_removed(version, release):
    # seen of both kernels: 2 GiB, and 1 GiB plugged in behind them, of which the tree says so
    blocks = [Block(2 * GIB, 4, 0x108)]
    twin = a_machine(release=release, extra=[drmem_node(256 * MIB, blocks, version)])
    assert twin.memory == RangeSet([Range(0, 3 * GIB)])
    across = reserve(twin, "512M@1792M")
    assert across.range is None
    assert any("can be removed" in reason for reason in across.reasons)
    assert reserve(twin, "512M@2048M").range == Range(2 * GIB, 2 * GIB + 512 * MIB)
    assert behind_k1(twin, 2 * GIB - 0x2880000) == Range(0x2880000, 2 * GIB)
    assert behind_k1(twin, 2 * GIB) is None
    same = a_machine(release=release, extra=[drmem_node(256 * MIB, [Block(2 * GIB, 4, 0x8)], version)])
    assert reserve(same, "512M@1792M").range is not None


def test_fadump_takes_the_place_of_the_region_where_the_firmware_has_it():
    twin = a_machine(release="5.14.0-503.el9.ppc64le")
    assert reserve(twin, "crashkernel=512M fadump=on").range is not None
    (rtas,) = [node for node in twin.device_tree.children if node.name == "rtas"]
    rtas.properties["ibm,configure-kernel-dump"] = b"\0\0\0\1"
    assert reserve(twin, "crashkernel=512M fadump=on").range is None
    debian = reserve(twin, "crashkernel=512M fadump=on", "6.1.0-50-powerpc64le")
    assert debian.range is not None
    assert any("without it" in reason for reason in debian.reasons)
    assert reserve(twin, "crashkernel=512M fadump=on fadump=off").range is not None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("512MB", "crashkernel: unrecognized char: B"),
        ("auto", "crashkernel: memory value expected"),
        ("", "crashkernel: memory value expected"),
        ("2G:512M", "crashkernel: '-' expected"),
        ("2G-4G:", "Memory value expected"),
        ("4G-2G:512M", "crashkernel: end <= start"),
        ("1G-2G4:512M", "crashkernel: ':' expected"),
        ("-:512M", "crashkernel: Memory value expected"),
        ("1G-:512M@x", "Memory value expected after '@'"),
    ],
)
def test_what_the_kernel_does_not_understand_reserves_nothing_and_says_why(word, message):
    found = reserve(a_machine(), f"crashkernel={word} quiet")
    assert (found.range, found.wanted, found.console) == (None, None, (message,))


def test_a_line_of_nothing_but_the_word_is_read():
    assert reserve(a_machine(), "crashkernel=" * 100_000).range is None


def test_a_leading_zero_is_octal_to_the_kernel():
    assert reserve(a_machine(), "0512M").range.size == 0o512 * MIB
    assert reserve(a_machine(), "0x10000000").range.size == 256 * MIB


numbers = st.builds(lambda n, s: f"{n}{s}", st.integers(0, 5000), st.sampled_from(["", "K", "k", "M", "m", "G", "T"]))
words = st.one_of(
    st.text(alphabet="0123456789xXabKMGTPE-:,@ highlowcma=", max_size=40),
    st.builds(lambda n, o: n + o, numbers, st.sampled_from(["", "@64M", "@0x2880000", "@1G", ",high", ",low", ",cma"])),
    st.lists(st.builds(lambda a, b, c: f"{a}-{b}:{c}", numbers, st.one_of(st.just(""), numbers), numbers), max_size=4).map(
        ",".join
    ),
)
lines = st.one_of(
    st.text(max_size=60),
    st.lists(st.one_of(words.map("crashkernel={}".format), st.just("quiet"), numbers.map("mem={}".format)), max_size=4).map(
        " ".join
    ),
    words,
)
releases = st.sampled_from(["5.10.0", "5.15.40", "6.1.0", "6.12.1", "6.15", "6.17.3", "7.2.13", "", "6", "9" * 40])
memories = st.lists(st.tuples(st.integers(1, 64), st.integers(0, 16)), min_size=1, max_size=4)


def laid_out(pieces):
    """Memory nodes of so many 64 MiB with such holes between them; the first begins at 0."""
    nodes, at = [], 0
    for size, hole in pieces:
        nodes.append(memory_node(at, size * 64 * MIB))
        at += (size + hole) * 64 * MIB
    return nodes


@given(lines, releases, memories, st.sampled_from(["pseries", "powernv"]), st.sampled_from([0x1000, 0x10000]))
def test_whatever_is_granted_is_memory_behind_k1_on_a_page(text, release, pieces, platform, page_size):
    found = a_machine(laid_out(pieces), platform, page_size=page_size)
    made = reserve(found, text, release)
    assert made.reasons
    if made.range is None:
        assert not made.usable
        return
    assert made.range == made.wanted
    assert found.memory.covers(made.range)
    assert made.range.start % page_size == 0
    assert made.range.start >= found.kernel_end
    assert not any(refusal.hit for refusal in made.refused if refusal.by == "kernel")
    assert all(made.range.contains(piece) for piece in made.usable)
    assert all(found.real_mode.contains(piece) for piece in made.usable)
    assert not any(made.usable.overlaps(region.range) for region in found.firmware)


@given(
    st.integers(1, 1500).filter(lambda n: n != 1024),
    st.one_of(st.none(), st.integers(41, 2000)),
    st.sampled_from(["5.10.0", "6.1.0", "6.12.0", "7.2.0"]),
)
def test_size_and_offset_are_those_that_are_written(size, offset, release):
    made = reserve(a_machine(), f"{size}M" + (f"@{offset}M" if offset else ""), release)
    assert made.wanted is not None
    assert made.wanted.size == size * MIB
    assert not offset or made.wanted.start == offset * MIB
    assert (made.range is not None) == a_machine().memory.covers(made.wanted)


# -------------------------------------------------------------------------------------------------------- the mail's variant


def test_right_behind_k1_leaves_none_of_its_pages_between():
    twin = a_machine(kernel_end=0x2880000)
    region = behind_k1(twin, 512 * MIB)
    assert region == Range.sized(0x2880000, 512 * MIB)
    assert specification(region) == "512M@41472K"
    assert reserve(twin, specification(region)).range == region
    assert behind_k1(a_machine(kernel_end=0x287F000, page_size=0x1000), 512 * MIB) == region, "K2's pages may have 64 KiB"


def test_there_may_be_no_room_behind_k1():
    assert behind_k1(a_machine(kernel_end=0), 512 * MIB) is None
    assert behind_k1(a_machine(), 3 * GIB) is None
    with pytest.raises(ValueError, match="not positive"):
        behind_k1(a_machine(), 0)


@given(memories, st.integers(1, 2 * GIB), st.integers(1, 128 * MIB), st.sampled_from(["6.1.0", "7.2.0"]))
def test_what_lies_behind_k1_is_what_the_kernel_grants(pieces, size, kernel_end, release):
    found = a_machine(laid_out(pieces), release=release, kernel_end=kernel_end)
    region = behind_k1(found, size)
    if region is not None and region.size < found.memory.total:
        assert region.size >= size
        made = reserve(found, specification(region))
        assert made.range == region


def test_low_memory_that_a_region_costs():
    twin = a_machine()
    costs = low_memory(twin, Range(41 * MIB, GIB))
    assert [cost.limit for cost in costs] == [GIB, 2 * GIB, 4 * GIB]
    rtas = costs[0]
    assert rtas.before == GIB - 0x2880000 - RTAS.size
    assert rtas.left == 41 * MIB - 0x2880000
    assert rtas.needed == 2 * MIB + 2 * 8192
    bare = low_memory(a_machine(platform="powernv"), Range(128 * MIB, 640 * MIB))
    assert [(cost.limit, cost.before - cost.left) for cost in bare] == [(4 * GIB, 512 * MIB)]


@pytest.mark.parametrize(
    ("spec", "boots"),
    [
        ("0x5d780000@0x2880000", False),  # seen of 6.1 on POWER8 and POWER9: nothing free below 1 GiB, nothing on the console
        ("0x3d580000@0x2a80000", True),  # seen of both: 2 MiB free there
        ("512M", True),
    ],
)
def test_a_region_that_k1_does_not_survive_is_told(spec, boots):
    found = reserve(a_machine(cpus=1, rtas=Range.sized(0x2FFF0000, 0x1000), kernel_end=0x287C000), spec)
    assert found.range is not None
    assert any("K1 does not boot" in reason for reason in found.reasons) == (not boots)
    assert found.boots == boots


def test_k1_on_hash_keeps_its_stacks_below_the_rma():
    radix, hashed = (low_memory(a_machine(cpus=64, radix=radix), Range(41 * MIB, GIB))[1] for radix in (True, False))
    assert (radix.limit, hashed.limit) == (2 * GIB, 2 * GIB)
    assert hashed.needed - radix.needed == 64 * 3 * 16384
    assert hashed.enough


def test_it_is_drawn_with_what_k1_logs_and_who_minds():
    drawn = draw_reservation("256M@768M", reserve(a_machine(platform="powernv"), "256M@768M"))
    assert "K1's log says: Reserving 256MB of memory at 768MB for crashkernel" in " ".join(drawn.split())
    assert "  K2 is not given 0x30000000-0x33000000" in drawn, "OPAL: K1 grants it all the same"
    assert "  it would be refused at 0x0-0x2880000" in drawn
    assert max(map(len, drawn.splitlines())) <= 80


class TestAsIf:
    """--crashkernel of `plan` and `compare`: another word, the rest of K1's command line as it is."""

    def machine(self, tmp_path, cmdline, spec, **changes):
        described = json.loads((Path(__file__).parents[1] / "data/pseries-power9.json").read_text())
        (tmp_path / "machine.json").write_text(json.dumps(described | {"cmdline": cmdline} | changes))
        return _machine(argparse.Namespace(machine=tmp_path / "machine.json", crashkernel=spec))[0]

    def test_the_word_is_replaced(self, tmp_path):
        line = "console=hvc0 crashkernel=1G-:256M,high crashkernel=128M"
        assert self.machine(tmp_path, line, "256M@128M").reserved == Range(128 * MIB, 384 * MIB)

    def test_a_memory_limit_counts(self, tmp_path):
        # half of 768 MiB, not of the RMA
        assert self.machine(tmp_path, "mem=768M", "256M").reserved == Range(384 * MIB, 640 * MIB)

    def test_fadump_counts(self, tmp_path):
        described = json.loads((Path(__file__).parents[1] / "data/pseries-power9.json").read_text())
        (rtas,) = [node for node in described["device_tree"]["children"] if node["name"] == "rtas"]
        rtas["properties"]["ibm,configure-kernel-dump"] = "00000001"
        more = {"release": "5.14.0-503.el9", "device_tree": described["device_tree"]}
        with pytest.raises(PlanError, match="fadump is on"):
            self.machine(tmp_path, "fadump=on", "512M", **more)
        assert self.machine(tmp_path, "fadump=off", "512M", **more).reserved

    def test_a_region_that_k1_cuts_is_not_planned_with(self, tmp_path):
        with pytest.raises(PlanError, match="K1 would cut off 0x30000000-0x38000000 of the region"):
            self.machine(tmp_path, "mem=768M", "512M", release="6.15.0")
        assert self.machine(tmp_path, "mem=768M", "512M").reserved == Range(384 * MIB, 896 * MIB), "6.1: mem= gives way"

    def test_firmware_inside_the_region_is_the_plans_to_leave_out(self, tmp_path):
        assert self.machine(tmp_path, "quiet", "512M").reserved == Range(512 * MIB, 1024 * MIB)
