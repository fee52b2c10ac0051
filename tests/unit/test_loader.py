"""The loader: the bytes of every segment, the kernel's refusals, and what it remembers."""

import ctypes
import errno
import functools
import json
import os
import platform
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crashkernel import loader
from crashkernel.errors import EnvironmentFault, FormatError, LoadRefused, PlanError
from crashkernel.formats.elf import CoreHeader
from crashkernel.formats.fdt import DeviceTree
from crashkernel.loader import (
    REQUEST,
    STATE,
    Payload,
    Request,
    assemble,
    load,
    outdated,
    refusal,
    requested,
    status,
    status_json,
    unload,
)
from crashkernel.memory import Range, RangeSet, align_up
from crashkernel.placement import plan_load
from crashkernel.placement.plan import LoadPlan
from crashkernel.placement.tree import capture_tree
from crashkernel.purgatory import purgatory_bytes
from support.machines import HEAD, MIB, initrd, kernel, small_machine, small_plan

INITRD = bytes(range(256)) * 300
ASKED = Request("zero", "reboot", "/boot/vmlinux", "/boot/initrd", "console=hvc0", True)
every_placement = pytest.mark.parametrize("placement", ["zero", "reserved"])


def assembled(placement: str, **changes) -> tuple[LoadPlan, dict[str, Payload]]:
    found = small_machine(**changes)
    plan = plan_load(found, kernel(), initrd(len(INITRD)), "console=hvc0", placement)
    return plan, {payload.segment.content: payload for payload in assemble(plan, found, kernel(), INITRD)}


class TestAssemble:
    @every_placement
    def test_one_payload_for_each_segment_in_the_plan_s_order(self, placement):
        found = small_machine()
        plan = plan_load(found, kernel(), initrd(len(INITRD)), "", placement)
        payloads = assemble(plan, found, kernel(), INITRD)
        assert tuple(payload.segment for payload in payloads) == plan.segments
        assert all(len(payload.data) <= payload.segment.range.size for payload in payloads)

    @pytest.mark.parametrize(("placement", "in_place"), [("zero", False), ("reserved", True)])
    def test_the_kernel_is_told_where_it_runs(self, placement, in_place):
        _, payloads = assembled(placement)
        assert payloads["kernel"].data == kernel().bytes_to_load(in_place=in_place)

    def test_a_command_line_that_is_no_text_reaches_k2_byte_for_byte(self):
        found = small_machine()
        plan = plan_load(found, kernel(), initrd(0), os.fsdecode(b"name=caf\xe9"), "zero")
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
        contents = {name: payload.data for name, payload in payloads.items() if name != "purgatory"}
        assert payloads["purgatory"].data == purgatory_bytes(plan, HEAD, contents)

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
        plan = plan_load(found, image, initrd(0), "", "zero")
        head, tail = (p for p in assemble(plan, found, image, b"") if p.segment.content == "kernel")
        assert len(head.data) == 32 * MIB
        assert head.data + tail.data == image.bytes_to_load(in_place=False)
        assert tail.segment.range.start == tail.segment.origin == 32 * MIB

    def test_without_initrd(self):
        found = small_machine()
        plan = plan_load(found, kernel(), initrd(0), "", "zero")
        assert [payload.segment.content for payload in assemble(plan, found, kernel(), b"")] == [
            "kernel",
            "purgatory",
            "elfcorehdr",
            "fdt",
        ]

    def test_what_outgrew_its_room_is_refused(self):
        found = small_machine()
        plan = plan_load(found, kernel(), initrd(len(INITRD)), "", "zero")
        room = plan.segment("initrd").range.size
        with pytest.raises(PlanError, match=f"the initrd is {room + 1} bytes, its segment holds {room}"):
            assemble(plan, found, kernel(), bytes(room + 1))

    def test_a_head_that_nobody_could_read_is_refused(self):
        found = replace(small_machine(), head=b"")
        plan = plan_load(found, kernel(), initrd(0), "", "zero")
        with pytest.raises(PlanError, match=r"K1's head is 0 bytes.*/proc/kcore"):
            assemble(plan, found, kernel(), b"")

    def test_kernels_of_two_byte_orders(self):
        """K2's kernel reads the core header in its own byte order (parse_crash_elf64_headers, fs/proc/vmcore.c)."""
        image = kernel(byteorder="big")
        found = small_machine()
        try:
            plan = plan_load(found, image, initrd(0), "", "zero")
            (header,) = (p for p in assemble(plan, found, image, b"") if p.segment.content == "elfcorehdr")
        except PlanError as error:
            assert "endian" in error.message  # noqa: PT017 - to refuse is as good
            return
        assert CoreHeader.from_bytes(header.data).byteorder == "big"


@functools.cache
def k1_memory(size: int) -> np.ndarray:
    """K1's memory from 0 on; not to be written."""
    found = np.random.default_rng(42).integers(0, 256, size, np.uint8)
    found[: len(HEAD)] = np.frombuffer(HEAD, np.uint8)
    found.flags.writeable = False
    return found


class Memory:
    """A machine's memory as bytes, from `kexec_load` to the entry of K2, with the purgatory's rows made as it makes them.

    Of the purgatory it knows what purgatory.S says of its image, and nothing of crashkernel.purgatory or of the digest's code.
    """

    def __init__(self, plan: LoadPlan, payloads: tuple[Payload, ...]) -> None:
        self.bytes = np.zeros(max(r.end for r in plan.memory), np.uint8)
        top = min(plan.reserved.start, 16 * MIB)  # what lies higher is not moved by any table here
        self.k1 = k1_memory(top)
        self.bytes[:top] = self.k1
        for payload in payloads:
            self.bytes[payload.segment.range.start :][: len(payload.data)] = np.frombuffer(payload.data, np.uint8)
        self.purgatory = plan.segment("purgatory").range.start
        self.bytes[:0x100] = self.bytes[self.purgatory :][:0x100]  # K1 dies (kexec_sequence, arch/powerpc/kernel/misc_64.S)

    def read(self, at: int, size: int) -> bytes:
        return self.bytes[at : at + size].tobytes()

    def number(self, at: int) -> int:
        return int.from_bytes(self.read(at, 8), "big")

    def digest(self, at: int, size: int) -> bytes:
        words = self.bytes[at : at + size].reshape(-1, 16, 4)
        lanes = [zlib.crc32(words[:, lane].tobytes()) ^ 0xFFFFFFFF for lane in range(16)]
        return b"".join(crc.to_bytes(4, "little") for crc in (lanes[-1], *lanes[:-1]))

    def whole(self, at: int, size: int, wanted: int) -> bool:
        return self.digest(self.purgatory + at, size) == self.read(self.purgatory + wanted, 64)

    def run(self, hit: tuple[int, int] | None = None) -> tuple[list[str], int, int]:
        """The texts of the rows that found damage, the entry of K2, and its tree.

        The purgatory's own row is '': there it stops, with the row's number as the entry (-1: the first check of all).
        `hit` is a row, and the offset in the purgatory of a byte whose lowest bit falls over right before it.
        """
        damaged: list[str] = []
        if not self.whole(0, 0x6000, 0x6000):
            return [""], -1, 0
        for number in range(self.number(self.purgatory + 0x2018)):
            if hit is not None and hit[0] == number:
                self.bytes[self.purgatory + hit[1]] ^= 1
            offset = 0x3000 + 0x100 * number
            at = self.purgatory + offset
            if not self.whole(0x1000, 0x1200, 0x6040) or not self.whole(offset, 0xC0, offset + 0xC0):
                return [*damaged, ""], number, 0
            operation, dst, src, size = (self.number(at + 8 * word) for word in range(4))
            if operation == 4:
                return damaged, dst, src
            if operation == 3:
                if self.digest(dst, size) != self.read(at + 0x20, 64):
                    damaged.append(self.read(at + 0x60, 96).rstrip(b"\0").decode())
                continue
            assert operation in (1, 2)
            arriving = self.bytes[src : src + size].copy()
            if operation == 2:
                self.bytes[src : src + size] = self.bytes[dst : dst + size]
            self.bytes[dst : dst + size] = arriving
        raise AssertionError("a table without an end")


SETTINGS = {
    "common": {},
    "hash": {"radix": False},
    "a kernel in two pieces": {"region": Range(2 * MIB, 192 * MIB)},
    "a small kernel": {"span": 0x8000},
}


@pytest.fixture(params=[(p, s) for p in ("zero", "reserved") for s in SETTINGS], ids=" ".join)
def loaded(request):
    """A plan, its image, and what is loaded."""
    placement, name = request.param
    changes = dict(SETTINGS[name])
    image = kernel(changes.pop("span", 3 * MIB))
    found = small_machine(**changes)
    if name == "a kernel in two pieces":
        found = replace(found, vmcoreinfo=None, cpus=tuple(replace(cpu, note=None) for cpu in found.cpus))
    plan = plan_load(found, image, initrd(len(INITRD)), "console=hvc0", placement)
    return plan, image, assemble(plan, found, image, INITRD)


class TestHandover:
    """The digests are those of what K2 will find: the loaded bytes, moved by the packed rows, answer each check."""

    def test_nothing_is_damaged(self, loaded):
        plan, image, payloads = loaded
        memory = Memory(plan, payloads)
        assert memory.run() == ([], plan.entry, plan.segment("fdt").range.start)
        data = image.bytes_to_load(in_place=plan.placement == "reserved")
        assert memory.read(plan.entry, image.span) == data.ljust(image.span, b"\0")
        assert memory.read(0, 0x100) == data[:0x100]
        for payload in payloads:
            if payload.segment.content not in ("kernel", "purgatory"):
                size = payload.segment.range.size
                assert memory.read(payload.segment.range.start, size) == payload.data.ljust(size, b"\0")
        for kept in plan.kept:
            wanted = memory.k1[kept.range.start : kept.range.end].tobytes()
            assert memory.read(kept.location, len(wanted)) == wanted

    @pytest.mark.parametrize("content", ["kernel", "initrd", "fdt", "elfcorehdr", "purgatory"])
    def test_a_bit_that_falls_over_while_k2_waits_is_told_by_its_name(self, loaded, content):
        """Wherever in the segment, of the kernel's wherever in the image. What the purgatory writes is under no digest."""
        plan, image, payloads = loaded
        random = np.random.default_rng(1)
        for segment in (s for s in plan.segments if s.content == content):
            size = 0x6000 if content == "purgatory" else segment.range.size
            if content == "kernel":
                size = min(size, image.span - segment.origin)
            for offset in (0, 0xFF, 0x100, 0xFFF, size - 1, int(random.integers(size))):
                memory = Memory(plan, payloads)
                memory.bytes[segment.range.start + offset] ^= 1 << int(random.integers(8))
                damaged, *_ = memory.run()
                names = {line.rpartition(": ")[2] for line in damaged}
                assert names == {"" if content == "purgatory" else content}, f"{segment} {offset:#x}"

    @pytest.mark.parametrize(
        ("placement", "span", "radix"),
        [("zero", 3 * MIB, True), ("zero", 3 * MIB, False), ("zero", 0x8001, True), ("reserved", 0x8000, True),
         ("reserved", 0x8001, True), ("reserved", 0x8001, False)],
    )  # fmt: skip
    def test_a_bit_behind_the_image_is_nobody_s_business(self, placement, span, radix):
        """It is free memory of K2's, up to the segment's end; the image's last line is not."""
        found, image = small_machine(radix=radix), kernel(span)
        plan = plan_load(found, image, initrd(len(INITRD)), "console=hvc0", placement)
        payloads = assemble(plan, found, image, INITRD)
        segment = plan.segment("kernel").range
        end = align_up(span, 128)
        assert end < segment.size
        whole = [], plan.entry, plan.segment("fdt").range.start
        for offset in (end, end + 0x7F, (end + segment.size) // 2, segment.size - 1):
            memory = Memory(plan, payloads)
            memory.bytes[segment.start + offset] ^= 0x10
            assert memory.run() == whole, f"{offset:#x}"
        memory = Memory(plan, payloads)
        memory.bytes[segment.start + end - 1] ^= 0x10
        (line,), *_ = memory.run()
        assert line.endswith(": kernel")

    @every_placement
    def test_a_bit_of_an_initrd_that_lies_half_above_the_rma(self, placement):
        """Below it is told; what is above nobody reads before K2 does."""
        found = replace(small_machine(), real_mode=Range(0, 96 * MIB))
        large = bytes(40 * MIB)
        plan = plan_load(found, kernel(), initrd(len(large)), "console=hvc0", placement)
        payloads = assemble(plan, found, kernel(), large)
        (beyond,) = plan.unchecked
        assert beyond == Range(96 * MIB, plan.segment("initrd").range.end)
        for at, names in ((beyond.start - 1, ["initrd"]), (beyond.start, []), (beyond.end - 1, [])):
            memory = Memory(plan, payloads)
            memory.bytes[at] ^= 1
            assert [line.rpartition(": ")[2] for line in memory.run()[0]] == names, f"{at:#x}"

    @every_placement
    def test_a_bit_of_the_purgatory_s_that_falls_over_later_stops_the_row_it_concerns(self, placement):
        """In code, parameters, and K1's saved head before any row; in a row before that row is obeyed, and not sooner."""
        found = small_machine()
        plan = plan_load(found, kernel(), initrd(len(INITRD)), "console=hvc0", placement)
        payloads = assemble(plan, found, kernel(), INITRD)
        rows = len(plan.moves) + 1
        random = np.random.default_rng(2)
        for row in (0, 2, 4, rows - 1):
            for offset in (0x1000, 0x2018, 0x2100, 0x21FF, 0x6040, 0x607F, int(random.integers(0x1000, 0x2200))):
                assert Memory(plan, payloads).run((row, offset)) == ([""], row, 0), f"{row} {offset:#x}"
            for part in (0, 0x08, 0x1F, 0x20, 0x60, 0xBF, 0xC0, 0xFF):
                assert Memory(plan, payloads).run((row, 0x3000 + 0x100 * row + part)) == ([""], row, 0), f"{row} {part:#x}"
        assert Memory(plan, payloads).run((0, 0x3000 + 0x100 * (rows - 1))) == ([""], rows - 1, 0)
        end = ([], plan.entry, plan.segment("fdt").range.start)
        assert Memory(plan, payloads).run((1, 0x3000)) == end, "a row that was made is of no further use"
        assert Memory(plan, payloads).run((1, 0x3000 + 0x100 * rows)) == end, "and one that is none never was"

    def test_a_bit_of_k1_s_is_nobody_s_business(self, loaded):
        plan, _, payloads = loaded
        memory = Memory(plan, payloads)
        memory.bytes[0x300:0x100000] ^= 0xFF
        assert memory.run()[0] == []

    def test_k1_s_head_is_the_saved_one(self, loaded):
        """The one stretch of K1 that nobody can read any more when the purgatory runs."""
        plan, _, payloads = loaded
        memory = Memory(plan, payloads)
        assert memory.read(0, 0x100) != HEAD
        memory.run()
        assert memory.read(plan.kept[0].location, 0x100) == HEAD

    def test_the_purgatory_comes_last(self, monkeypatch):
        """It is packed with the very bytes of the other payloads."""
        seen = {}

        def remember(plan, head, contents):
            seen.update(contents)
            return purgatory_bytes(plan, head, contents)

        monkeypatch.setattr(loader, "purgatory_bytes", remember)
        _, payloads = assembled("zero")
        assert set(seen) == {"kernel", "initrd", "fdt", "elfcorehdr"}
        assert all(payloads[name].data is seen[name] or payloads[name].data == seen[name] for name in seen)


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
        load(plan, tuple(payloads.values()), ASKED, running.root)
        ((number, entry, segments, flags),) = running.calls
        assert number == 268
        assert entry == plan.segment("purgatory").range.start
        assert flags == 1 | 21 << 16
        assert segments == [(p.data, p.segment.range.start, p.segment.range.size) for p in payloads.values()]

    def test_the_plan_is_remembered(self, running):
        plan, payloads = assembled("zero")
        assert load(plan, tuple(payloads.values()), ASKED, running.root).remembered is True
        now = status(running.root)
        assert (now.loaded, now.reserved_size, now.plan) == (True, 128 * MIB, plan)
        assert sorted((running.root / STATE).parent.iterdir()) == [running.root / STATE, running.root / REQUEST]
        again = json.loads(status_json(now, ("a CPU came",), None))
        assert again == {
            "loaded": True,
            "reserved_size": 128 * MIB,
            "outdated": ["a CPU came"],
            "quarantine": None,
            "plan": json.loads(plan.to_json()),
        }

    def test_the_new_plan_takes_the_old_one_s_place_in_one_step(self, running, monkeypatch):
        for placement in ("zero", "reserved"):
            plan, payloads = assembled(placement)
            load(plan, tuple(payloads.values()), ASKED, running.root)
        assert status(running.root).plan == plan

        def fail(*_):
            raise OSError(errno.EIO, "power is gone")

        monkeypatch.setattr(Path, "replace", fail)
        assert loader._remember(running.root / STATE, "half a pl") is False
        monkeypatch.undo()
        assert status(running.root).plan is None, "the old record would speak of another load"
        assert list((running.root / STATE).parent.iterdir()) == [running.root / REQUEST]

    def test_a_load_that_cannot_be_remembered_is_a_load_all_the_same(self, running):
        (running.root / "run").write_text("not a directory")
        plan, payloads = assembled("zero")
        assert load(plan, tuple(payloads.values()), ASKED, running.root).remembered is False
        now = status(running.root)
        assert now.loaded
        assert now.plan is None
        assert unload(running.root) is True

    def test_a_refused_load_leaves_the_record_alone(self, running):
        plan, payloads = assembled("zero")
        load(plan, tuple(payloads.values()), ASKED, running.root)
        running.answer = errno.EBUSY
        with pytest.raises(LoadRefused, match="in progress"):
            load(small_plan("reserved"), (), ASKED, running.root)
        assert status(running.root).plan == plan

    def test_lockdown_is_asked_for(self, running, monkeypatch):
        running.answer = errno.EPERM
        monkeypatch.setattr(loader, "_lockdown", lambda: "integrity")
        plan, payloads = assembled("zero")
        with pytest.raises(LoadRefused, match=r"lockdown \(integrity\)"):
            load(plan, tuple(payloads.values()), ASKED, running.root)

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
        load(plan, tuple(payloads.values()), ASKED, running.root)
        assert unload(running.root) is True
        number, entry, segments, flags = running.calls[-1]
        assert (number, entry, segments, flags) == (268, 0, [], 1 | 21 << 16)
        assert not (running.root / STATE).exists()
        assert status(running.root).loaded is False

    def test_nothing_was_loaded(self, running):
        assert unload(running.root) is False

    def test_refused(self, running):
        plan, payloads = assembled("zero")
        load(plan, tuple(payloads.values()), ASKED, running.root)
        running.answer = errno.EBUSY
        with pytest.raises(LoadRefused):
            unload(running.root)
        assert status(running.root).plan == plan


class TestStatus:
    def test_loaded_by_somebody_else(self, running):
        running.loaded = True
        assert status(running.root).plan is None
        assert json.loads(status_json(status(running.root), (), None))["plan"] is None

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
        load(plan, tuple(payloads.values()), ASKED, running.root)
        raw = json.loads(plan.to_json())
        raw["moves"].pop(0)
        (running.root / STATE).write_text(json.dumps(raw))
        assert status(running.root).plan is None

    def test_a_record_that_outlived_its_load(self, running):
        plan, payloads = assembled("zero")
        load(plan, tuple(payloads.values()), ASKED, running.root)
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
            load(plan, tuple(payloads.values()), ASKED, running.root)
        assert caught.value.errno == 0
        assert running.calls == []
        assert not (running.root / STATE).exists()


class TestRefresh:
    def test_what_was_asked_for_is_remembered_until_it_is_unloaded(self, running):
        plan, payloads = assembled("zero")
        load(plan, tuple(payloads.values()), ASKED, running.root)
        assert requested(running.root) == ASKED
        unload(running.root)
        with pytest.raises(EnvironmentFault, match="no record of a load"):
            requested(running.root)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda raw: raw.pop("kernel"),
            lambda raw: raw.update(kernel=7),
            lambda raw: raw.update(quarantine="yes"),
            lambda raw: raw.update(placement="elsewhere"),
            lambda raw: raw.update(on_damage="pray"),
            lambda raw: raw.update(more=1),
        ],
    )
    def test_a_record_that_is_none(self, running, damage):
        plan, payloads = assembled("zero")
        load(plan, tuple(payloads.values()), ASKED, running.root)
        raw = json.loads((running.root / REQUEST).read_text())
        damage(raw)
        (running.root / REQUEST).write_text(json.dumps(raw))
        with pytest.raises(FormatError, match="not a record of a load"):
            requested(running.root)

    @pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000])
    def test_a_record_that_is_no_object(self, running, text):
        (running.root / REQUEST).parent.mkdir(parents=True)
        (running.root / REQUEST).write_text(text)
        with pytest.raises(FormatError, match="not a record of a load"):
            requested(running.root)

    def test_nothing_has_changed(self):
        for placement in ("zero", "reserved"):
            assert outdated(assembled(placement)[0], small_machine()) == ()

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"memory": RangeSet([Range(0, 272 * MIB)])}, "16 MiB of memory came at 0x10000000-0x11000000"),
            ({"memory": RangeSet([Range(0, 240 * MIB)])}, "16 MiB of memory went at 0xf000000-0x10000000"),
            ({"reserved": Range(64 * MIB, 128 * MIB)}, "the reserved region is 0x4000000-0x8000000"),
            ({"reserved": None}, "the reserved region is gone"),
            ({"vmcoreinfo": Range(0x700000, 0x701000)}, "1 note buffers"),
            ({"cpus": small_machine().cpus[:1]}, "1 CPUs are online, the handover waits for 2"),
        ],
    )
    def test_what_has_changed_is_told(self, change, says):
        (told,) = outdated(assembled("zero")[0], replace(small_machine(), **change))
        assert says in told
