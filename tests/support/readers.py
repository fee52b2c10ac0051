"""Readers of dumps that we did not write (crash, drgn, libkdumpfile), and a small dead machine whose every byte is known.

crash prints the log of a kernel without its vmlinux if that is the plain buffer of kernels before 3.5, so this machine has one:
what crash prints then has come through a dump's headers, bitmaps, descriptors and codec.
"""

import functools
import hashlib
import json
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from crashkernel.drill.debian import Archive, default_cache
from crashkernel.errors import EnvironmentFault
from support.capture import page_of
from support.elfwriter import PT_NOTE, Part, write_elf, write_note, write_prstatus

MIB = 1 << 20
RELEASE = "3.2.0-readers"
RANGES = ((0, 4 * MIB), (32 * MIB, 2 * MIB))
"""K1's memory that is in the dump."""
LEFT_OUT = (36 * MIB, MIB)
"""Memory of K1's that is not."""
LOG_SIZE = MIB
_LOG, _POINTERS, _NAMES, _TABLE = 2 * MIB, MIB, MIB + 0x10000, MIB + 0x20000
_IMAGES = {"x86_64": 0xFFFF_FFFF_8000_0000, "ppc64le": 0xC000_0000_0000_0000}

_LINKERS = {
    "amd64": ("ld-linux-x86-64.so.2", "x86_64-linux-gnu", ()),
    "ppc64el": ("ld64.so.2", "powerpc64le-linux-gnu", ("qemu-ppc64le-static",)),
}
_DEADLINE = 300


@dataclass
class Machine:
    """A dead machine: `memory` maps the start of each of its ranges to their bytes."""

    arch: str
    page_size: int
    memory: dict[int, bytearray] = field(default_factory=dict)
    log: str = ""

    def __post_init__(self) -> None:
        for start, size in RANGES:
            pages = range(start // self.page_size, (start + size) // self.page_size)
            self.memory[start] = bytearray(b"".join(page_of(pfn % 5, pfn, self.page_size) for pfn in pages))
        lines = (
            f"<6>[{number:5}.000000] line {number}: {hashlib.sha256(b'%d' % number).hexdigest()}" for number in range(9000)
        )
        self.log = "\n".join(lines)[: LOG_SIZE // 2 - 1] + "\n"
        self.put(_LOG, bytes(LOG_SIZE))
        self.put(_LOG, self.log.encode())
        for at, value, size in (
            (0, self.vaddr(_LOG), 8),  # char *log_buf
            (8, len(self.log), 4),  # log_end
            (12, LOG_SIZE, 4),  # log_buf_len
            (16, len(self.log), 4),  # logged_chars
            (24, 0, 8),  # phys_base
        ):
            self.put(_POINTERS + at, value.to_bytes(size, "little"))
        names = ("Linux", "deadhost", RELEASE, "#1 SMP readers", self.arch, "(none)")
        self.put(_NAMES, b"".join(name.encode().ljust(65, b"\0") for name in names))
        self.put(_TABLE, bytes(0x10000))

    def vaddr(self, paddr: int) -> int:
        return _IMAGES[self.arch] + paddr

    def put(self, paddr: int, data: bytes) -> None:
        self.memory[0][paddr : paddr + len(data)] = data

    def read(self, paddr: int, size: int) -> bytes:
        start = max(each for each in self.memory if each <= paddr)
        return bytes(self.memory[start][paddr - start : paddr - start + size])

    def vmcoreinfo(self) -> bytes:
        symbols = {
            **{"log_buf": 0, "log_end": 8, "log_buf_len": 12, "logged_chars": 16, "phys_base": 24},
            **{"init_uts_ns": _NAMES - _POINTERS, "swapper_pg_dir": _TABLE - _POINTERS, "init_top_pgt": _TABLE - _POINTERS},
        }
        lines = {
            "OSRELEASE": RELEASE,
            "PAGESIZE": self.page_size,
            "SYMBOL(_stext)": f"{self.vaddr(0):x}",
            "OFFSET(uts_namespace.name)": 0,
            "NUMBER(phys_base)": 0,
            "KERNELOFFSET": 0,
            "CRASHTIME": 1_700_000_000,
            **{f"SYMBOL({name})": f"{self.vaddr(_POINTERS + at):x}" for name, at in symbols.items()},
        }
        return "".join(f"{key}={value}\n" for key, value in lines.items()).encode()

    def vmcore(self) -> bytes:
        """As the capture kernel shows it, but for one range that has been left out."""
        prstatus = write_prstatus("little", 4711, [0x1000 + number for number in range(48)])
        notes = write_note("little", "CORE", 1, prstatus) + write_note("little", "VMCOREINFO", 0, self.vmcoreinfo())
        loads = [Part(vaddr=self.vaddr(start), paddr=start, data=bytes(data)) for start, data in self.memory.items()]
        start, size = LEFT_OUT
        loads.append(Part(vaddr=self.vaddr(start), paddr=start, data=b"", memory_size=size))
        return write_elf(
            "little", [Part(PT_NOTE, 0, data=notes), *loads], kind=4, machine=62 if self.arch == "x86_64" else 21, entry=0
        )


@functools.cache
def crash_command(architecture: str) -> tuple[str, ...]:
    """Debian 12's crash, from an unpacked tree; ppc64el's by user-mode emulation. Skips where that cannot be had."""
    linker, triplet, emulator = _LINKERS[architecture]
    for program in emulator:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (qemu-user-static)")
    try:
        archive = Archive(default_cache(), "bookworm", architecture=architecture)
        packages = ["crash"]
        for package in packages:  # grows as it is walked
            packages += [name for name in archive.depends(package) if name not in packages and name != "binutils"]
        tree = archive.unpack(*packages)
    except EnvironmentFault as fault:
        pytest.skip(f"crash for {architecture}: {fault}")
    libraries = [path for base in ("lib", "usr/lib") if (path := tree / base / triplet).is_dir()]
    loader = next(path / linker for path in libraries if (path / linker).is_file())
    return (*emulator, str(loader), "--library-path", ":".join(map(str, libraries)), str(tree / "usr/bin/crash"))


def crash(architecture: str, option: str, dump: Path) -> str:
    """What crash prints of a dump without a vmlinux: `option` is --osrelease or --log."""
    done = subprocess.run([*crash_command(architecture), option, dump], capture_output=True, timeout=_DEADLINE, check=False)
    text = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, text[-2000:] + done.stderr.decode("utf-8", "replace")[-2000:]
    return text


_LIBKDUMPFILE = """
import json, sys, kdumpfile
dump = kdumpfile.kdumpfile(sys.argv[1])
names = "file.format", "arch.name", "arch.page_size", "linux.uts.release", "linux.uts.machine", "linux.uts.nodename"
found = {name: dump.attr[name] for name in names if name in dump.attr}
reads = []
for paddr, size in json.loads(sys.argv[2]):
    try:
        reads.append(bytes(dump.read(kdumpfile.KDUMP_MACHPHYSADDR, paddr, size)).hex())
    except kdumpfile.exceptions.NoDataException:
        reads.append(None)
print(json.dumps([found, reads]))
"""


def libkdumpfile(dump: Path, places: list[tuple[int, int]]) -> tuple[dict[str, object], list[bytes | None]]:
    """What libkdumpfile says of a dump, and the bytes at physical addresses: None where it says that there are none."""
    python = "/usr/bin/python3"
    if subprocess.run([python, "-c", "import kdumpfile"], capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("python3-libkdumpfile is not installed")
    done = subprocess.run(
        [python, "-c", _LIBKDUMPFILE, dump, json.dumps(places)], capture_output=True, timeout=_DEADLINE, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    found, reads = json.loads(done.stdout)
    return found, [None if each is None else bytes.fromhex(each) for each in reads]
