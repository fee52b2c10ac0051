"""Builds vmcores as K2's kernel shows them, from the memory K1 had, and the truth to hold them against."""

import functools
import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path

from crashkernel.drill.verdict import Truth
from crashkernel.machine import Region
from crashkernel.memory import Range
from crashkernel.placement import plan_load
from crashkernel.placement.plan import LoadPlan
from support.elfwriter import PT_LOAD, PT_NOTE, Part, write_elf, write_note, write_prstatus
from support.machines import HEAD, KERNEL_BASE, LAYOUT, MIB, initrd, kernel, machine, memory_node, tree

NONCE = hashlib.sha256(b"this run's nonce").digest()
PANIC = "Kernel panic - not syncing: sysrq triggered crash"
RELEASE = "6.1.0-49-powerpc64le"
PID = 1
KERNEL = replace(
    kernel(MIB), layout=tuple(Region(each.name, Range(each.range.start // 2, each.range.end // 2)) for each in LAYOUT)
)
"""K1 and K2: text, read-only data, freed init and data of 512 KiB each, from 0 up."""
CPUS = 2
VPA = 0x30000
"""A page with a VPA of K1's, eye catcher and dispatch count included."""


def tiny_plan(placement: str = "zero", *, opal: bool = False) -> LoadPlan:
    """24 MiB with a region of 14 MiB: K1 has 10 MiB, of which the lowest move. OPAL has 128 KiB at 23 MiB."""
    firmware = {"opal": Range(23 * MIB, 23 * MIB + 0x20000)} if opal else {}
    root = tree(
        memory=[memory_node(0, 24 * MIB)],
        region=Range(8 * MIB, 22 * MIB),
        platform="powernv" if opal else "pseries",
        cpus=CPUS,
        **firmware,
    )
    found = machine(root, notes_at=0x100000, release=KERNEL.release)
    return plan_load(found, KERNEL, initrd(0), "console=hvc0", placement)


_NOISE = functools.cache(lambda size: random.Random(1).randbytes(size))


def memory_of(plan: LoadPlan) -> bytearray:
    """All RAM as it was when K1 died: every page different, some zero, the marks of this crash in place."""
    memory = bytearray(_NOISE(max(r.end for r in plan.memory)))
    memory[:0x100] = HEAD
    memory[0x2F0000:0x300000] = bytes(0x10000)
    memory[0x310000 : 0x310000 + len(NONCE)] = NONCE
    memory[0x320000 : 0x320000 + len(PANIC)] = PANIC.encode()
    memory[VPA : VPA + 4] = b"\xd3\x97\xd7\x81"
    memory[VPA + 0x100 : VPA + 0x104] = (41).to_bytes(4, "big")
    # each CPU's registers, in its crash_notes buffer (the first note is VMCOREINFO's)
    for buffer, note in zip(plan.notes[1:], prstatus_notes((PID, 0)), strict=True):
        memory[buffer.start : buffer.start + len(note)] = note
    return memory


@dataclass
class Core:
    """What a vmcore is made of, to be damaged before it is written."""

    loads: list[Part]
    notes: bytes
    byteorder: str = "little"
    machine: int = 21
    kind: int = 4

    def to_bytes(self) -> bytes:
        return write_elf(self.byteorder, [Part(PT_NOTE, 0, data=self.notes), *self.loads], kind=self.kind, machine=self.machine)

    def write(self, paddr: int, data: bytes) -> None:
        """Put other bytes where the dump holds K1's `paddr`."""
        for index, part in enumerate(self.loads):
            at = paddr - part.paddr
            if 0 <= at < len(part.data):
                assert at + len(data) <= len(part.data)
                self.loads[index] = replace(part, data=part.data[:at] + data + part.data[at + len(data) :])
                return
        raise AssertionError(f"no PT_LOAD holds {paddr:#x}")

    def read(self, paddr: int, size: int) -> bytes:
        (part,) = [p for p in self.loads if p.paddr <= paddr < p.paddr + len(p.data)]
        return part.data[paddr - part.paddr : paddr - part.paddr + size]


def notes(
    *, pids: tuple[int, ...] = (PID, 0), release: str = RELEASE, nip: int = KERNEL_BASE + 0x1234, byteorder: str = "little"
) -> bytes:
    out = b"".join(prstatus_notes(pids, nip=nip, byteorder=byteorder))
    return out + write_note(byteorder, "VMCOREINFO", 0, f"OSRELEASE={release}\nPAGESIZE=65536\n".encode())


def prstatus_notes(pids: tuple[int, ...], *, nip: int = KERNEL_BASE + 0x1234, byteorder: str = "little") -> list[bytes]:
    """An NT_PRSTATUS note for each CPU's task."""
    registers = [0] * 48
    registers[32] = nip
    return [write_note(byteorder, "CORE", 1, write_prstatus(byteorder, pid, registers)) for pid in pids]


def core_of(plan: LoadPlan, memory: bytes, **changes) -> Core:
    """A perfect dump: one PT_LOAD for each stretch the plan keeps."""
    loads = [
        Part(PT_LOAD, vaddr=KERNEL_BASE + k.range.start, paddr=k.range.start, data=bytes(memory[k.range.start : k.range.end]))
        for k in plan.kept
    ]
    return Core(loads, notes(), **changes)


def truth_of(plan: LoadPlan, memory: bytes, directory: Path, **changes) -> Truth:
    """What the host saw: memory at the purgatory's first instruction, K1's head already overwritten in it."""
    seen = bytearray(memory)
    seen[:0x100] = b"\xee" * 0x100
    path = directory / "truth"
    path.write_bytes(seen)
    settings = {
        "memory": path,
        "head": bytes(memory[:0x100]),
        "memory_size": len(memory),
        "reserved": plan.reserved,
        "nonce": NONCE,
        "panic": PANIC,
        "release": RELEASE,
        "cpus": CPUS,
        "firmware": () if plan.services.kind == "papr" else plan.firmware,
        "crashed_pid": PID,
    }
    return Truth(**(settings | changes))


def with_firmware(plan: LoadPlan, *regions: Region) -> LoadPlan:
    """The plan with other regions of firmware, for the verdict to name."""
    return replace(plan, firmware=regions)
