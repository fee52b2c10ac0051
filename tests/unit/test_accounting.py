"""Where K2's reservation went: what K2 said as a table that adds up, whatever it said."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.drill import saving
from crashkernel.drill.accounting import FREE, account
from crashkernel.drill.saving import Footprint
from crashkernel.memory import Range, RangeSet
from crashkernel.placement.plan import LoadPlan
from crashkernel.placement.sizing import page_structs

MIB = 1 << 20
REAL = json.loads((Path(__file__).parents[1] / "data" / "drills.json").read_text())
PLAN = LoadPlan.from_json(json.dumps(REAL["pass-zero"]["record"]["plan"]))  # 256 MiB, an initrd of 2.75 MiB

# as K2 said it: Debian 6.1, 64 KiB pages, radix, 256 MiB, `crashkernel capture` at level 31 from an initrd of 47.6 MiB
SAID = [
    ("booted", "percpu: Embedded 10 pages/cpu s603432 r0 d51928 u655360"),
    ("booted", "rcu: \tRCU restricting CPUs from NR_CPUS=2048 to nr_cpu_ids=1."),
    (
        "booted",
        "Memory: 0K/262144K available (14144K kernel code, 2304K rwdata, 18624K rodata, 4992K init, 1394K bss, "
        "111360K reserved, 0K cma-reserved)",
    ),
    (
        "memory",
        "MemTotal:204480 MemFree:84096 MemAvailable:88512 Buffers:0 Cached:73792 SwapCached:0 AnonPages:448 Slab:31680 "
        "KernelStack:704 PageTables:512 VmallocUsed:4096 Percpu:896",
    ),
    (
        "memory",
        "MemTotal:204480 MemFree:25856 MemAvailable:34816 Buffers:6272 Cached:75712 SwapCached:0 AnonPages:49600 Slab:32128 "
        "KernelStack:800 PageTables:960 VmallocUsed:4096 Percpu:896",
    ),
]


def heard(messages):
    footprint = Footprint()
    for kind, words in messages:
        footprint.take(kind, words)
    return footprint


def test_both_peaks_add_up_to_the_reservation():
    found = account(heard(SAID), PLAN, "radix")
    assert found.reservation == PLAN.reserved.size == 256 * MIB
    assert found.page_size == 0x10000
    for table in (found.unpacking, found.saving):
        assert sum(table.values()) == found.reservation
        assert all(size >= 0 for size in table.values())
        assert list(table)[-1] == FREE


def test_each_row_is_what_k2_said():
    found = account(heard(SAID), PLAN, "radix")
    loaded = PLAN.segment("initrd").range.size
    assert found.saving["K2's image"] == 36466 << 10
    assert found.saving["initrd unpacked"] == found.unpacking["initrd unpacked"] == 73792 << 10
    assert found.saving["page cache"] == (75712 + 6272 - 73792) << 10
    assert found.saving["processes"] == 49600 << 10
    assert found.saving["slabs"] == 32128 << 10
    assert found.saving[FREE] == 25856 << 10
    assert found.saving["per-CPU data"] == (896 - 640) << 10, "the first chunk is no part of MemTotal"
    assert "kernel stacks" not in found.saving, "with 64 KiB pages they come from a slab"
    assert "initrd as loaded" not in found.saving
    assert found.unpacking["initrd as loaded"] == loaded
    assert found.unpacking[FREE] == (84096 << 10) - loaded


def test_the_worse_peak_is_the_one_with_less_to_spare():
    found = account(heard(SAID), PLAN, "radix")
    assert found.peak == "saving"
    assert found.at_peak is found.saving
    assert found.spare == found.saving[FREE] + found.saving["page cache"]
    idle = account(heard(SAID[:4]), PLAN, "radix")  # nothing was taken while it saved
    assert idle.peak == "unpacking"
    assert idle.at_peak is idle.unpacking


def test_stacks_have_a_row_where_they_are_whole_pages():
    said = [("booted", "percpu: Embedded 41 pages/cpu s127128 r0 d40808 u167936"), *SAID[1:]]
    found = account(heard(said), PLAN, "radix")
    assert found.page_size == 0x1000
    assert found.saving["kernel stacks"] == 800 << 10
    assert found.saving["modules, vmalloc"] == (4096 - 800) << 10
    assert sum(found.saving.values()) == found.reservation


def test_hash_has_no_process_table_of_its_own():
    assert "radix's process table" in account(heard(SAID), PLAN, "radix").saving
    assert "radix's process table" not in account(heard(SAID), PLAN, "hash").saving


def test_every_possible_cpu_has_a_first_chunk():
    said = [SAID[0], ("booted", "rcu: RCU restricting CPUs from NR_CPUS=2048 to nr_cpu_ids=4."), *SAID[2:]]
    assert "per-CPU data" not in account(heard(said), PLAN, "radix").saving, "896 KiB are less than 4 first chunks"


def test_a_k2_that_said_nothing_has_no_accounting():
    assert account(Footprint(), PLAN, "radix") is None
    assert account(heard(SAID[:3]), PLAN, "radix") is None


def test_without_the_log_there_are_fewer_rows():
    found = account(heard(SAID[3:]), PLAN, "radix")
    assert found.page_size == 0
    assert not {"K2's image", "array of page structs"} & found.saving.keys()
    assert sum(found.saving.values()) == found.reservation


def test_it_is_json():
    found = account(heard(SAID), PLAN, "radix")
    record = json.loads(json.dumps(found.record()))
    assert record["peak"] == "saving"
    assert sum(record["saving"].values()) == record["reservation"]


words = st.one_of(
    st.text(max_size=60),
    st.sampled_from([words for _, words in SAID]),
    st.lists(
        st.tuples(st.sampled_from(["MemTotal", "MemFree", "Cached", "Slab", "Percpu", "x"]), st.integers(-1, 10**18)),
        max_size=8,
    ).map(lambda fields: " ".join(f"{name}:{number}" for name, number in fields)),
    st.integers(0, 10**9).map(lambda pages: f"Embedded {pages} pages/cpu s1 r2 d{pages}"),
)


@given(st.lists(st.tuples(st.sampled_from(["booted", "memory"]), words), max_size=6), st.sampled_from(["radix", "hash"]))
def test_whatever_k2_says_the_tables_add_up(messages, mmu):
    found = account(heard(messages), PLAN, mmu)
    if found is not None:
        assert sum(found.saving.values()) == sum(found.unpacking.values()) == found.reservation
        assert 0 <= found.at_peak[FREE] <= found.spare


@pytest.mark.parametrize("page_size", [0x1000, 0x10000])
def test_page_structs_are_counted_by_blocks(page_size):
    memory = RangeSet([Range(0, 256 * MIB)])
    assert page_structs(memory, "hash", page_size) == 256 * MIB // page_size * 64
    assert page_structs(memory, "radix", page_size) == max(2 * MIB, 256 * MIB // page_size * 64)


def test_the_guests_shell_says_what_the_host_reads():
    """The shell function of the guest, run here: its words are taken as they come."""
    script = (Path(saving.__file__).parent / "capture-init.sh").read_text()
    sample, watch = (re.search(rf"^{name}\(\) {{.*?^}}", script, re.MULTILINE | re.DOTALL)[0] for name in ("sample", "watch"))
    program = f'say() {{ echo "$*"; }}\n{sample}\n{watch}\nwatch\nkill $watcher'
    said = subprocess.run(["sh", "-c", program], capture_output=True, text=True, check=True, timeout=30).stdout
    kind, _, words = said.splitlines()[0].partition(" ")
    assert kind in saving.FOOTPRINT_WORDS
    footprint = heard([(kind, words)])
    assert {"MemTotal", "MemFree", "MemAvailable", "Cached", "AnonPages", "Slab", "PageTables"} <= footprint.before.keys()
    assert f"MemTotal: {footprint.total >> 10} kB" in re.sub(" +", " ", Path("/proc/meminfo").read_text())
