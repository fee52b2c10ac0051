"""Dumps of kernels that never ran, with a log and registers: what inspect, verify and convert are about."""

import json
from pathlib import Path

from crashkernel.target.manifest import Contents, Manifest, PageCounts, digest_file, manifest_name
from support.elfwriter import PT_NOTE, Part, write_elf
from support.kdumps import Kdump
from support.vmcores import MIB, PrintkRing, SyntheticKernel

PANIC = "Kernel panic - not syncing: sysrq triggered crash"
LOG = (
    "Linux version 6.1.0-kdumps (builder@debian) #1 SMP test",
    "sysrq: Trigger a crash",
    PANIC,
    "CPU: 1 PID: 7 Comm: sh Kdump: loaded Not tainted 6.1.0-kdumps #1",
    "Call Trace:",
)
PIDS = (0, 7)
TEXT = "".join(f"[    {second}.000000] {line}\n" for second, line in enumerate(LOG))
"""The log as `dmesg` prints it."""


def kernel_of(machine: str, page_size: int, log: tuple[str, ...] = LOG) -> SyntheticKernel:
    kernel = SyntheticKernel(machine, page_size, ranges=((0, 32 * MIB),))
    kernel.info["OSRELEASE"] = "6.1.0-kdumps"
    ring = PrintkRing(byteorder=kernel.byteorder)
    for second, line in enumerate(log):
        ring.append(line.encode(), ns=second * 1_000_000_000)
    kernel.put_log(ring)
    return kernel


def dump_of(machine: str = "ppc64le", page_size: int = 0x1000, log: tuple[str, ...] = LOG, **options) -> Kdump:
    """What a level that drops free pages keeps of such a kernel: the pages that anybody wrote to, and some of zeros."""
    kernel = kernel_of(machine, page_size, log)
    memory = set(range(32 * MIB // page_size))
    written = {
        pfn
        for number in kernel.memory.blocks
        for pfn in range((number << 16) // page_size, -(-((number + 1) << 16) // page_size))
    }
    pages = {pfn: kernel.memory.read(pfn * page_size, page_size) for pfn in sorted(written & memory)}
    # the last pages of memory, and so of the dump: not the log's
    pages |= dict.fromkeys(sorted(memory)[-3:], b"user" * (page_size // 4))
    info = {key: value for key, value in kernel.info.items() if key not in ("OSRELEASE", "PAGESIZE")}
    given = {"memory": memory, "info": info, "pids": PIDS, "phys_base": int(info.get("NUMBER(phys_base)", 0))}
    return Kdump(pages, machine, page_size, **(given | options))


def elf_of(machine: str = "ppc64le", page_size: int = 0x1000, log: tuple[str, ...] = LOG, **options) -> bytes:
    """The same kernel's vmcore as the capture kernel has it."""
    kernel = kernel_of(machine, page_size, log)
    dump = dump_of(machine, page_size, log)
    data = kernel.memory.read(0, 32 * MIB)
    parts = [Part(PT_NOTE, 0, data=dump.elf_notes()), Part(vaddr=kernel.linear, paddr=0, data=data)]
    return write_elf(kernel.byteorder, parts, kind=4, machine=kernel.machine, **options)


def manifest_of(path: Path, form: str = "kdump-compressed", codec: str = "zlib", **pages: int) -> Manifest:
    """A true manifest beside the dump at `path`."""
    counts = PageCounts(**({"kept": 0, "free": 100} | pages))
    contents = Contents(form, codec, 31, 0x1000, counts, "6.1.0-kdumps", "ppc64le", PANIC, 1795567645)
    with path.open("rb") as file:
        manifest = Manifest(path.name, path.stat().st_size, digest_file(file.fileno(), path.stat().st_size), contents)
    path.with_name(manifest_name(path.name)).write_text(manifest.to_json())
    return manifest


def altered(manifest: str, **fields: object) -> str:
    """A manifest's JSON with other values, and its old sign-off."""
    return json.dumps(json.loads(manifest) | fields)
