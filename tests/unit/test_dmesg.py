"""The log out of a printk ring in memory, whatever state the crash left it in, and the line that says why the kernel died."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crashkernel.errors import CrashkernelError, FormatError
from crashkernel.memory import Range, RangeSet
from crashkernel.vmcore import dmesg
from crashkernel.vmcore.dmesg import Record, format_record, log_records, panic_line, read_log
from crashkernel.vmcore.kernel import CrashedKernel
from support.vmcores import MIB, PrintkRing, SyntheticKernel

ARCHES = {
    "x86_64": {},
    "ppc64le": {"arch": "ppc64le", "page_size": 0x10000},
    "ppc64": {"arch": "ppc64", "page_size": 0x10000, "mmu": "hash", "vmemmap_shift": 24},
}


def kernel_with(ring: PrintkRing, arch: str = "x86_64") -> CrashedKernel:
    made = SyntheticKernel(**ARCHES[arch], ranges=((0, 64 * MIB),))
    made.put_log(ring)
    return CrashedKernel(made.source())


def ring_for(arch: str = "x86_64", **settings_) -> PrintkRing:
    return PrintkRing(byteorder="big" if arch == "ppc64" else "little", **settings_)


@pytest.mark.parametrize("arch", ARCHES)
def test_records_are_what_the_kernel_stored(arch):
    ring = ring_for(arch)
    ring.append(b"Linux version 6.1.0", ns=0, level=5, caller=0)
    ring.append(b"hello from user space", ns=1_234_567_899, level=4, facility=3, caller=4711)
    ring.append(b"in an interrupt", ns=12_000_000_000, level=7, caller=0x80000003)
    records = list(log_records(kernel_with(ring, arch)))
    assert records == [
        Record(0, 0, 5, 0, "T0", b"Linux version 6.1.0"),
        Record(1, 1_234_567_899, 4, 3, "T4711", b"hello from user space"),
        Record(2, 12_000_000_000, 7, 0, "C3", b"in an interrupt"),
    ]


def test_the_log_reads_as_dmesg_prints_it():
    ring = ring_for()
    ring.append(b"one", ns=0)
    ring.append(b"two\n  and more\nof it", ns=31_426_855_999)
    ring.append(b"tab\there \xc3\xa9 \x1b[31m \r gone\\x", ns=123_456_000_000_000, caller=0x80000001)
    kernel = kernel_with(ring)
    assert read_log(kernel) == (
        "[    0.000000] one\n"
        "[   31.426855] two\n"
        "                 and more\n"
        "               of it\n"
        "[123456.000000] tab\there \\xc3\\xa9 \\x1b[31m \\x0d gone\\x\n"
    )
    assert read_log(kernel, callers=True).splitlines()[::4] == [
        "[    0.000000] [      T1] one",
        "[123456.000000] [      C1] tab\there \\xc3\\xa9 \\x1b[31m \\x0d gone\\x",
    ]
    assert kernel.doubts == []


def test_unfinished_and_reusable_records_are_left_out():
    ring = ring_for()
    ring.append(b"finalized", state=2)
    ring.append(b"committed", state=1)
    ring.append(b"reserved", state=0)
    ring.append(b"reusable", state=3)
    ring.append(b"")
    ring.append(b"last words", state=1)
    assert [record.text for record in log_records(kernel_with(ring))] == [b"finalized", b"committed", b"last words"]


def test_a_length_beyond_the_block_is_cut():
    ring = ring_for()
    ring.append(b"truncated", length=500)  # printk wants room for more than it gets, and stores what fits
    ring.append(b"next one")
    assert [record.text for record in log_records(kernel_with(ring))] == [b"truncated" + bytes(7), b"next one"]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("seed", range(4))
def test_the_ring_goes_round(arch, exact, seed):
    """Every placement at the ring's end occurs: before it, over it, exactly at it; the oldest records make room."""
    chosen = random.Random(seed)
    ring = ring_for(arch, count_bits=5, size_bits=10, exact=exact)
    said: list[bytes] = []
    for number in range(chosen.randrange(200, 400)):
        text = f"message {number} ".encode() + b"x" * chosen.choice((0, 1, 7, 8, 30, 100, 104))
        ring.append(text)
        said.append(text)
    records = list(log_records(kernel_with(ring, arch)))
    assert 5 <= len(records) <= 32
    assert [record.text for record in records] == said[-len(ring.kept) :]
    assert [record.sequence for record in records] == list(range(len(said) - len(records), len(said)))


def test_a_block_that_ends_with_the_ring():
    """Before 6.18 it goes to the start, since then it stays: its end says which."""
    texts = [b"a" * 120, b"b" * 120, b"c" * 248, b"d" * 504]
    for exact in (False, True):
        ring = ring_for(size_bits=10, exact=exact)
        for text in texts:  # 128 + 128 + 256 + 512 bytes with their IDs: exactly 1024
            ring.append(text)
        assert [record.text for record in log_records(kernel_with(ring))] == [text for text in texts if exact or text[0] == 100]


def test_text_of_another_record_is_not_taken_for_ones_own():
    ring = ring_for()
    for text in (b"first", b"second", b"third"):
        ring.append(text)
    ring.text[16 : 16 + 8] = (12345).to_bytes(8, "little")  # the ID in front of "second"
    assert [record.text for record in log_records(kernel_with(ring))] == [b"first", b"third"]


def test_parts_that_are_not_in_the_dump_are_doubted():
    made = SyntheticKernel(ranges=((0, 64 * MIB),))
    ring = ring_for()
    ring.append(b"somewhere else")
    made.put_log(ring)
    rb = made.paddr(int.from_bytes(made.memory.read(made.paddr(int(made.info["SYMBOL(prb)"], 16)), 8), "little"))
    made.memory.put(rb + 56, made.linear + 800 * MIB)
    kernel = CrashedKernel(made.source())
    assert read_log(kernel) == ""
    assert kernel.doubts[0].startswith("text of the log: ")
    made.memory.put(rb + 8, made.linear + 800 * MIB)
    kernel = CrashedKernel(made.source())
    assert read_log(kernel) == ""
    assert kernel.doubts[0].startswith("messages of the log: ")


def test_a_page_of_text_that_is_missing_costs_only_the_messages_on_it():
    made = SyntheticKernel(ranges=((0, 64 * MIB),))
    ring = ring_for(count_bits=8, size_bits=15)
    lines = [b"message number %03d %s" % (number, b"." * 200) for number in range(100)]
    for line in lines:
        ring.append(line)
    made.put_log(ring)
    source = made.source()
    lost = Range.sized(made.log_text // 4096 * 4096 + 8192, 4096)
    source.memory = source.memory - RangeSet([lost])
    kernel = CrashedKernel(source)
    found = read_log(kernel).splitlines()
    numbers = [int(line.split("number ")[1][:3]) for line in found]
    missing = sorted(set(range(100)) - set(numbers))
    assert missing == list(range(missing[0], missing[-1] + 1))
    assert 4096 // 240 <= len(missing) <= 4096 // 220 + 2
    assert kernel.doubts[0].startswith("text of the log: ")


def test_a_ring_whose_ids_make_no_sense_is_read_as_far_as_it_goes():
    made = SyntheticKernel(ranges=((0, 64 * MIB),))
    ring = ring_for()
    ring.append(b"one")
    ring.append(b"two")
    ring.tail = ring.head - 5000 & ((1 << 62) - 1)
    made.put_log(ring)
    assert read_log(CrashedKernel(made.source())).count("\n") == 2


@pytest.mark.parametrize("at", [0, 48])
def test_a_ring_too_large_to_be_one_is_refused(at):
    made = SyntheticKernel(ranges=((0, 64 * MIB),))
    made.put_log(ring_for())
    rb = made.paddr(int.from_bytes(made.memory.read(made.paddr(int(made.info["SYMBOL(prb)"], 16)), 8), "little"))
    made.memory.put(rb + at, 32, 4)
    with pytest.raises(FormatError, match="is none"):
        read_log(CrashedKernel(made.source()))


@pytest.mark.parametrize(
    "key",
    ["SYMBOL(prb)", "SIZE(prb_desc)", "OFFSET(printk_info.text_len)", "OFFSET(prb_data_ring.data)", "OFFSET(printk_info.seq)"],
)
def test_what_vmcoreinfo_lacks_is_named(key):
    made = SyntheticKernel(ranges=((0, 64 * MIB),))
    made.put_log(ring_for())
    del made.info[key]
    with pytest.raises(FormatError, match=key.split("(")[1].strip(")")):
        read_log(CrashedKernel(made.source()))


def test_members_elsewhere_leave_level_and_facility_open():
    """VMCOREINFO does not say where they are: they are known only as long as they fill the place between two that it names."""
    made = SyntheticKernel(ranges=((0, 64 * MIB),))
    ring = ring_for()
    ring.append(b"hello", level=3, facility=1)
    made.put_log(ring)
    made.info["OFFSET(printk_info.caller_id)"] = "24"
    (record,) = log_records(CrashedKernel(made.source()))
    assert (record.level, record.facility, record.text) == (None, None, b"hello")


def test_an_endless_log_loses_its_beginning(monkeypatch):
    ring = ring_for(count_bits=8, size_bits=14)
    for number in range(200):
        ring.append(f"message {number:04d}".encode())
    monkeypatch.setattr(dmesg, "MAX_LOG_SIZE", 1000)
    log = read_log(kernel_with(ring))
    lines = log.splitlines()
    assert lines[0] == "(165 older messages left out)"
    assert lines[1].endswith("message 0165")
    assert lines[-1].endswith("message 0199")
    assert 900 < len(log) < 1040


def test_large_rings_are_read_in_slices():
    """More descriptors than one slice has, the ring gone round in the middle of one."""
    ring = ring_for(count_bits=13, size_bits=20)
    for number in range(12_000):
        ring.append(b"message %d" % number)
    records = list(log_records(kernel_with(ring)))
    assert len(records) == 8192
    assert [record.text for record in records] == [b"message %d" % number for number in range(12_000 - 8192, 12_000)]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_survives_hostile_rings(data):
    arch = data.draw(st.sampled_from(sorted(ARCHES)))
    made = SyntheticKernel(**ARCHES[arch], ranges=((0, 64 * MIB),))
    ring = ring_for(arch, count_bits=4, size_bits=9)
    for number in range(data.draw(st.integers(0, 40))):
        ring.append(b"m" * (number % 90), length=data.draw(st.sampled_from((-1, 0, 3, 65535))))
    made.put_log(ring)
    words = st.sampled_from((0, 1, 3, 1 << 62, 1 << 63, (1 << 64) - 1)) | st.integers(0, 5000)
    rb = made.paddr(int.from_bytes(made.memory.read(made.paddr(int(made.info["SYMBOL(prb)"], 16)), 8), made.byteorder))
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(
            st.integers(0, 10).map(lambda n: rb + 8 * n)
            | st.integers(0, 47).map(lambda n: made.log_descriptors + 8 * n)
            | st.integers(0, 63).map(lambda n: made.log_text + 8 * n)
        )
        made.memory.put(place, data.draw(words))
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from([key for key in made.info if key.startswith(("OFFSET(pr", "SIZE(pr"))]))
        made.info[key] = data.draw(st.sampled_from(("0", "1", "-1", "80", "65536", "99999999999999999999999")))
    try:
        log = read_log(CrashedKernel(made.source()))
        assert log.isascii()
        assert len(log) < 1 << 20
        panic_line(log)
    except CrashkernelError:
        pass


def log_of(*lines: str) -> str:
    return "".join(format_record(Record(0, 10**9 * n, 6, 0, "T1", line.encode())) for n, line in enumerate(lines))


SYSRQ = (
    "sysrq: Trigger a crash",
    "Kernel panic - not syncing: sysrq triggered crash",
    "CPU: 0 PID: 1 Comm: init",
    "Call Trace:",
)
NULL_X86 = (
    "BUG: kernel NULL pointer dereference, address: 0000000000000010",
    "#PF: supervisor write access in kernel mode",
    "#PF: error_code(0x0002) - not-present page",
    "PGD 0 P4D 0",
    "Oops: 0002 [#1] PREEMPT SMP NOPTI",
    "CPU: 1 PID: 77 Comm: modprobe",
)
NULL_PPC = (
    "Kernel attempted to write user page (0) - exploit attempt? (uid: 0)",
    "BUG: Kernel NULL pointer dereference on write at 0x00000000",
    "Faulting instruction address: 0xc0000000007c2a10",
    "Oops: Kernel access of bad area, sig: 11 [#1]",
    "LE PAGE_SIZE=64K MMU=Radix SMP NR_CPUS=2048 NUMA pSeries",
)
BUG_AT = ("------------[ cut here ]------------", "kernel BUG at fs/ext4/inode.c:2721!", "invalid opcode: 0000 [#1] SMP")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (SYSRQ, "Kernel panic - not syncing: sysrq triggered crash"),
        ((*SYSRQ, "---[ end Kernel panic - not syncing: sysrq triggered crash ]---"), SYSRQ[1]),
        ((*NULL_X86, "Kernel panic - not syncing: Fatal exception"), NULL_X86[0]),
        ((*NULL_X86, "Kernel panic - not syncing: Fatal exception in interrupt"), NULL_X86[0]),
        (NULL_X86, NULL_X86[0]),  # panic_on_oops: kexec comes before the panic's own message
        ((*NULL_PPC, "Kernel panic - not syncing: Fatal exception"), NULL_PPC[1]),
        (NULL_PPC, NULL_PPC[1]),
        (BUG_AT, BUG_AT[1]),
        ((*BUG_AT, "Kernel panic - not syncing: Fatal exception"), BUG_AT[1]),
        (("general protection fault, probably for non-canonical address 0xdead: 0000 [#1] SMP",), None),
        ((*NULL_X86, *("usb 1-1: new device",) * 30, "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b"),
         "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b"),
        ((*NULL_X86, *("usb 1-1: new device",) * 30, *BUG_AT, "Kernel panic - not syncing: Fatal exception"), BUG_AT[1]),
        (("watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [kworker:7]", "Modules linked in: ext4",
          "Kernel panic - not syncing: softlockup: hung tasks"), None),
        (("watchdog: Watchdog detected hard LOCKUP on cpu 3", "Kernel panic - not syncing: Hard LOCKUP"),
         "watchdog: Watchdog detected hard LOCKUP on cpu 3"),
        (("INFO: task jbd2/vda1-8:212 blocked for more than 120 seconds.", "NMI backtrace for cpu 0",
          "Kernel panic - not syncing: hung_task: blocked tasks"), None),
        (("rcu: INFO: rcu_sched self-detected stall on CPU", "Kernel panic - not syncing: RCU Stall"),
         "rcu: INFO: rcu_sched self-detected stall on CPU"),
        (("WARNING: CPU: 0 PID: 9 at mm/slub.c:3 kfree+0x1/0x2", "Kernel panic - not syncing: kernel: panic_on_warn set ..."),
         "WARNING: CPU: 0 PID: 9 at mm/slub.c:3 kfree+0x1/0x2"),
        (("Kernel panic - not syncing: Fatal exception",), "Kernel panic - not syncing: Fatal exception"),
        (("Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)",), None),
        (("sysrq: Trigger a crash", "usb 1-1: reset"), "sysrq: Trigger a crash"),
        (("systemd[1]: Starting", "usb 1-1: new device"), ""),
        ((), ""),
    ],
)  # fmt: skip
def test_the_line_that_says_why(lines, expected):
    wanted = lines[0] if expected is None else expected or None
    assert panic_line(log_of(*lines)) == wanted
    assert panic_line(log_of(*lines).replace("] ", "] [    C0] ", len(lines))) == wanted
    assert panic_line("Linux version 6.1\n" * 3 + "\n".join(lines)) == wanted
