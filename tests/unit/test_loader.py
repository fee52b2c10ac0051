"""The loader: the bytes of every segment, the kernel's refusals, and what it remembers."""

import ctypes
import errno
import json
import os
import platform
import re
from dataclasses import replace
from pathlib import Path

import pytest

from crashkernel import loader
from crashkernel.errors import LoadRefused, PlanError
from crashkernel.formats.elf import CoreHeader
from crashkernel.formats.fdt import DeviceTree
from crashkernel.loader import STATE, Payload, assemble, load, refusal, status, status_json, unload
from crashkernel.memory import Range, RangeSet
from crashkernel.placement import plan_load
from crashkernel.placement.plan import LoadPlan
from crashkernel.placement.tree import capture_tree
from crashkernel.purgatory import purgatory_bytes
from support.machines import HEAD, MIB, kernel, small_machine, small_plan

INITRD = bytes(range(256)) * 300
every_placement = pytest.mark.parametrize("placement", ["zero", "reserved"])


def assembled(placement: str, **changes) -> tuple[LoadPlan, dict[str, Payload]]:
    found = small_machine(**changes)
    plan = plan_load(found, kernel(), len(INITRD), "console=hvc0", placement)
    return plan, {payload.segment.content: payload for payload in assemble(plan, found, kernel(), INITRD)}


class TestAssemble:
    @every_placement
    def test_one_payload_for_each_segment_in_the_plan_s_order(self, placement):
        found = small_machine()
        plan = plan_load(found, kernel(), len(INITRD), "", placement)
        payloads = assemble(plan, found, kernel(), INITRD)
        assert tuple(payload.segment for payload in payloads) == plan.segments
        assert all(len(payload.data) <= payload.segment.range.size for payload in payloads)

    @pytest.mark.parametrize(("placement", "in_place"), [("zero", False), ("reserved", True)])
    def test_the_kernel_is_told_where_it_runs(self, placement, in_place):
        _, payloads = assembled(placement)
        assert payloads["kernel"].data == kernel().bytes_to_load(in_place=in_place)

    def test_a_command_line_that_is_no_text_reaches_k2_byte_for_byte(self):
        found = small_machine()
        plan = plan_load(found, kernel(), 0, os.fsdecode(b"name=caf\xe9"), "zero")
        assert LoadPlan.from_json(plan.to_json()) == plan
        payloads = {payload.segment.content: payload.data for payload in assemble(plan, found, kernel(), b"")}
        bootargs = DeviceTree.from_bytes(payloads["fdt"]).root.child("chosen").properties["bootargs"]
        assert bootargs.startswith(b"name=caf\xe9 elfcorehdr=")
        assert bootargs.endswith(b"K\0")

    @every_placement
    def test_initrd_tree_and_purgatory(self, placement):
        found = small_machine()
        plan, payloads = assembled(placement)
        assert payloads["initrd"].data == INITRD
        tree = DeviceTree.from_bytes(payloads["fdt"].data)
        assert tree == capture_tree(found, plan, len(INITRD))
        chosen = tree.root.child("chosen")
        assert chosen.u64("linux,initrd-end") - chosen.u64("linux,initrd-start") == len(INITRD)
        assert payloads["purgatory"].data == purgatory_bytes(plan, HEAD)

    @every_placement
    def test_the_core_header(self, placement):
        plan, payloads = assembled(placement)
        header = CoreHeader.from_bytes(payloads["elfcorehdr"].data)
        assert header.machine == 21
        assert header.byteorder == "little"
        assert [(each.paddr, each.size, each.location) for each in header.loads] == [
            (k.range.start, k.range.size, k.location) for k in plan.kept
        ]
        assert all(each.vaddr == 0xC000000000000000 + each.paddr for each in header.loads)
        assert header.notes == tuple((plan.locate(note), note.size) for note in plan.notes)
        assert RangeSet(Range.sized(each.paddr, each.size) for each in header.loads) == plan.k1_memory

    def test_notes_that_move_are_found_where_they_went(self):
        plan, payloads = assembled("zero")
        moved = plan.kept[0]
        assert moved.range.contains(plan.notes[0])
        assert CoreHeader.from_bytes(payloads["elfcorehdr"].data).notes[0][0] == moved.location + plan.notes[0].start

    def test_a_kernel_in_two_pieces(self):
        """The region begins below K2's end: the head of the image waits above, its tail lies where it will run."""
        image = kernel(40 * MIB, 39 * MIB)
        found = small_machine(region=Range(32 * MIB, 192 * MIB))
        plan = plan_load(found, image, 0, "", "zero")
        head, tail = (p for p in assemble(plan, found, image, b"") if p.segment.content == "kernel")
        assert len(head.data) == 32 * MIB
        assert head.data + tail.data == image.bytes_to_load(in_place=False)
        assert tail.segment.range.start == tail.segment.origin == 32 * MIB

    def test_without_initrd(self):
        found = small_machine()
        plan = plan_load(found, kernel(), 0, "", "zero")
        assert [payload.segment.content for payload in assemble(plan, found, kernel(), b"")] == [
            "kernel",
            "purgatory",
            "elfcorehdr",
            "fdt",
        ]

    def test_what_outgrew_its_room_is_refused(self):
        found = small_machine()
        plan = plan_load(found, kernel(), len(INITRD), "", "zero")
        room = plan.segment("initrd").range.size
        with pytest.raises(PlanError, match=f"the initrd is {room + 1} bytes, its segment holds {room}"):
            assemble(plan, found, kernel(), bytes(room + 1))

    def test_a_head_that_nobody_could_read_is_refused(self):
        found = replace(small_machine(), head=b"")
        plan = plan_load(found, kernel(), 0, "", "zero")
        with pytest.raises(PlanError, match=r"K1's head is 0 bytes.*/proc/kcore"):
            assemble(plan, found, kernel(), b"")

    def test_kernels_of_two_byte_orders(self):
        """K2's kernel reads the core header in its own byte order (parse_crash_elf64_headers, fs/proc/vmcore.c)."""
        image = kernel(byteorder="big")
        found = small_machine()
        try:
            plan = plan_load(found, image, 0, "", "zero")
            (header,) = (p for p in assemble(plan, found, image, b"") if p.segment.content == "elfcorehdr")
        except PlanError as error:
            assert "endian" in error.message  # noqa: PT017 - to refuse is as good
            return
        assert CoreHeader.from_bytes(header.data).byteorder == "big"


class TestRefusal:
    @pytest.mark.parametrize(
        ("code", "lockdown", "message", "hint"),
        [
            (errno.EADDRNOTAVAIL, "", "leaves its reserved region 0x4000000-0xc000000", "kexec_crash_size"),
            (errno.ETXTBSY, "", "region 0x4000000-0xc000000 overlaps the running kernel", "crashkernel=SIZE@OFFSET"),
            (errno.EBUSY, "", "another kexec load or a crash is in progress", "try again"),
            (errno.EPERM, "", "kexec_load is not permitted", "run as root.*kexec_load_disabled"),
            (errno.EPERM, "none", "kexec_load is not permitted", "run as root"),
            (errno.EPERM, "integrity", r"kernel lockdown \(integrity\) forbids kexec_load", "kexec_file_load"),
            (errno.EPERM, "confidentiality", r"lockdown \(confidentiality\)", "Secure Boot"),
            (errno.ENOMEM, "", "no memory left", "free some memory"),
            (errno.ENOSYS, "", "has no kexec_load", "CONFIG_KEXEC=y"),
            (errno.EINVAL, "", "calls the load invalid", "bug of ours"),
            (errno.EIO, "", "kexec_load failed: Input/output error", "dmesg"),
        ],
    )
    def test_each_says_what_to_change(self, code, lockdown, message, hint):
        refused = refusal(code, small_plan(), lockdown)
        assert refused.errno == code
        assert refused.exit_code == 3
        assert re.search(message, refused.message)
        assert re.search(hint, refused.hint)
        assert "\n" not in str(refused)

    def test_without_a_plan(self):
        assert "reserved region overlaps" in refusal(errno.ETXTBSY, None, "").message


class Kernel:
    """A running kernel: `/sys/kernel` below a root, and a libc that takes its system calls."""

    def __init__(self, root: Path, monkeypatch) -> None:
        self.root = root
        self.answer = 0
        self.calls: list[tuple[int, int, list[tuple[bytes, int, int]], int]] = []
        (root / "sys/kernel").mkdir(parents=True)
        self.loaded = False
        monkeypatch.setattr(platform, "machine", lambda: "ppc64le")
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: self)
        monkeypatch.setattr(ctypes, "get_errno", lambda: self.answer)

    @property
    def loaded(self) -> bool:
        return (self.root / "sys/kernel/kexec_crash_loaded").read_text() == "1\n"

    @loaded.setter
    def loaded(self, value: bool) -> None:
        (self.root / "sys/kernel/kexec_crash_loaded").write_text(f"{value:d}\n")
        (self.root / "sys/kernel/kexec_crash_size").write_text(f"{128 * MIB}\n")

    def syscall(self, number, entry, count, pointer, flags) -> int:
        table = pointer._obj
        segments = [(ctypes.string_at(s.buf, s.bufsz), s.mem, s.memsz) for s in table]
        assert count.value == len(segments)
        self.calls.append((number.value, entry.value, segments, flags.value))
        if self.answer:
            return -1
        self.loaded = bool(segments)
        return 0


@pytest.fixture
def running(tmp_path, monkeypatch):
    return Kernel(tmp_path, monkeypatch)


class TestLoad:
    def test_the_system_call(self, running):
        plan, payloads = assembled("zero")
        load(plan, tuple(payloads.values()), running.root)
        ((number, entry, segments, flags),) = running.calls
        assert number == 268
        assert entry == plan.segment("purgatory").range.start
        assert flags == 1 | 21 << 16
        assert segments == [(p.data, p.segment.range.start, p.segment.range.size) for p in payloads.values()]

    def test_the_plan_is_remembered(self, running):
        plan, payloads = assembled("zero")
        assert load(plan, tuple(payloads.values()), running.root) is True
        now = status(running.root)
        assert (now.loaded, now.reserved_size, now.plan) == (True, 128 * MIB, plan)
        assert list((running.root / STATE).parent.iterdir()) == [running.root / STATE]
        again = json.loads(status_json(now))
        assert again == {"loaded": True, "reserved_size": 128 * MIB, "plan": json.loads(plan.to_json())}

    def test_the_new_plan_takes_the_old_one_s_place_in_one_step(self, running, monkeypatch):
        for placement in ("zero", "reserved"):
            plan, payloads = assembled(placement)
            load(plan, tuple(payloads.values()), running.root)
        assert status(running.root).plan == plan

        def fail(*_):
            raise OSError(errno.EIO, "power is gone")

        monkeypatch.setattr(Path, "replace", fail)
        assert loader._remember(running.root / STATE, "half a pl") is False
        monkeypatch.undo()
        assert status(running.root).plan is None, "the old record would speak of another load"
        assert list((running.root / STATE).parent.iterdir()) == []

    def test_a_load_that_cannot_be_remembered_is_a_load_all_the_same(self, running):
        (running.root / "run").write_text("not a directory")
        plan, payloads = assembled("zero")
        assert load(plan, tuple(payloads.values()), running.root) is False
        now = status(running.root)
        assert now.loaded
        assert now.plan is None
        assert unload(running.root) is True

    def test_a_refused_load_leaves_the_record_alone(self, running):
        plan, payloads = assembled("zero")
        load(plan, tuple(payloads.values()), running.root)
        running.answer = errno.EBUSY
        with pytest.raises(LoadRefused, match="in progress"):
            load(small_plan("reserved"), (), running.root)
        assert status(running.root).plan == plan

    def test_lockdown_is_asked_for(self, running, monkeypatch):
        running.answer = errno.EPERM
        monkeypatch.setattr(loader, "_lockdown", lambda: "integrity")
        plan, payloads = assembled("zero")
        with pytest.raises(LoadRefused, match=r"lockdown \(integrity\)"):
            load(plan, tuple(payloads.values()), running.root)

    @pytest.mark.parametrize(
        ("text", "mode"),
        [("none [integrity] confidentiality\n", "integrity"), ("[none] integrity confidentiality\n", "none"), ("", "")],
    )
    def test_the_lockdown_mode(self, monkeypatch, text, mode):
        monkeypatch.setattr(Path, "read_text", lambda _: text)
        assert loader._lockdown() == mode

    def test_a_kernel_without_lockdown(self, monkeypatch):
        def missing(_):
            raise FileNotFoundError(2, "No such file")

        monkeypatch.setattr(Path, "read_text", missing)
        assert loader._lockdown() == ""


class TestUnload:
    def test_it_loads_nothing(self, running):
        plan, payloads = assembled("zero")
        load(plan, tuple(payloads.values()), running.root)
        assert unload(running.root) is True
        number, entry, segments, flags = running.calls[-1]
        assert (number, entry, segments, flags) == (268, 0, [], 1 | 21 << 16)
        assert not (running.root / STATE).exists()
        assert status(running.root).loaded is False

    def test_nothing_was_loaded(self, running):
        assert unload(running.root) is False

    def test_refused(self, running):
        plan, payloads = assembled("zero")
        load(plan, tuple(payloads.values()), running.root)
        running.answer = errno.EBUSY
        with pytest.raises(LoadRefused):
            unload(running.root)
        assert status(running.root).plan == plan


class TestStatus:
    def test_loaded_by_somebody_else(self, running):
        running.loaded = True
        assert status(running.root).plan is None
        assert json.loads(status_json(status(running.root)))["plan"] is None

    @pytest.mark.parametrize("record", [b"", b"{}", b"\xff\xfe\x00", b"[" * 100_000], ids=["empty", "object", "binary", "deep"])
    def test_a_record_that_was_lost(self, running, record):
        running.loaded = True
        (running.root / STATE).parent.mkdir(parents=True)
        (running.root / STATE).write_bytes(record)
        now = status(running.root)
        assert now.loaded
        assert now.plan is None

    def test_a_record_of_a_plan_that_breaks_its_promise(self, running):
        plan, payloads = assembled("zero")
        load(plan, tuple(payloads.values()), running.root)
        raw = json.loads(plan.to_json())
        raw["moves"].pop(0)
        (running.root / STATE).write_text(json.dumps(raw))
        assert status(running.root).plan is None

    def test_a_record_that_outlived_its_load(self, running):
        plan, payloads = assembled("zero")
        load(plan, tuple(payloads.values()), running.root)
        running.loaded = False
        assert status(running.root).plan is None

    def test_a_kernel_without_kexec(self, tmp_path):
        with pytest.raises(LoadRefused, match=r"no kexec.*CONFIG_KEXEC=y") as caught:
            status(tmp_path)
        assert caught.value.errno == errno.ENOSYS


class TestElsewhere:
    @pytest.mark.parametrize("machine", ["x86_64", "aarch64", "ppc"])
    def test_a_host_of_another_kind_is_not_asked(self, running, monkeypatch, machine):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        plan, payloads = assembled("zero")
        with pytest.raises(LoadRefused, match=rf"this is a {machine} kernel.*on the POWER host") as caught:
            load(plan, tuple(payloads.values()), running.root)
        assert caught.value.errno == 0
        assert running.calls == []
        assert not (running.root / STATE).exists()
