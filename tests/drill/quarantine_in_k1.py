"""Runs in K1 as root: takes K1's freed init pages and what lies behind its image, and tries everything to get them.

Prints one line, "QUARANTINE " and JSON, on the console. Whoever allocates for a driver allocates like a packet socket's ring:
with GFP_KERNEL, page by page (alloc_pg_vec, net/packet/af_packet.c), and the ring's pages can be looked up in
/proc/self/pagemap.
"""

import contextlib
import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from crashkernel import quarantine
from crashkernel.memory import Range, RangeSet

PAGE = os.sysconf("SC_PAGESIZE")
PIECE = max(16 * PAGE, 1 << 20)  # bytes allocated at once
SOL_PACKET, PACKET_RX_RING = 263, 5  # include/uapi/linux/if_packet.h
PRESENT, FRAME = 1 << 63, (1 << 55) - 1  # Documentation/admin-guide/mm/pagemap.rst


def corrupted() -> int:
    """HardwareCorrupted of /proc/meminfo, in bytes."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("HardwareCorrupted:"))
    return int(line.split()[1]) << 10


def frames(memory: mmap.mmap) -> list[int]:
    """Physical addresses of the pages of a mapping."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        file.seek(start // PAGE * 8)
        entries = struct.unpack(f"={len(memory) // PAGE}Q", file.read(len(memory) // PAGE * 8))
    return [(entry & FRAME) * PAGE for entry in entries if entry & PRESENT]


def ring() -> mmap.mmap:
    """Memory allocated as a driver would."""
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    count = PIECE // PAGE
    packets.setsockopt(SOL_PACKET, PACKET_RX_RING, struct.pack("=IIII", PAGE, count, 2048, count * (PAGE // 2048)))
    memory = mmap.mmap(packets.fileno(), PIECE)
    packets.detach()  # stays open as long as this process lives
    return memory


def anonymous() -> mmap.mmap:
    """Memory of a process."""
    memory = mmap.mmap(-1, PIECE)
    for at in range(0, PIECE, PAGE):
        memory[at] = 1
    return memory


def handed_out(allocate) -> set[int]:
    """Physical addresses of all pages that a child gets until the kernel kills it for want of memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        Path("/proc/self/oom_score_adj").write_text("1000")
        resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 16, 1 << 16))
        kept = []
        with contextlib.suppress(OSError):
            while True:
                kept.append(allocate())
                os.write(writer, b"".join(paddr.to_bytes(8, "big") for paddr in frames(kept[-1])))
        os._exit(0)
    os.close(writer)
    got = bytearray()
    while chunk := os.read(reader, 1 << 16):
        got += chunk
    os.close(reader)
    os.waitpid(child, 0)
    return {int.from_bytes(got[at : at + 8], "big") for at in range(0, len(got) // 8 * 8, 8)}


def killed_while_taking(wanted: RangeSet) -> int:
    """Bytes that a load, killed outright in the middle, leaves out of K1's hands."""
    child = os.fork()
    if child == 0:
        quarantine.take(wanted, PAGE)
        os._exit(0)
    while corrupted() == 0 and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
    return corrupted()


def main() -> None:
    """Print what came of it."""
    Path("/proc/self/oom_score_adj").write_text("-1000")
    wanted = RangeSet(Range(*ends) for ends in json.loads(Path("/etc/quarantine/ranges").read_text()))
    found = {"page_size": PAGE, "corrupted_before": corrupted()}
    found["killed"] = killed_while_taking(wanted)
    found["killed_given_back"] = quarantine.release().given_back.total
    found["corrupted_between"] = corrupted()
    taken = quarantine.take(wanted, PAGE)
    found |= {
        "wanted": wanted.total,
        "taken": taken.taken.total,
        "held": {use: sum(h.range.size for h in taken.held if h.use == use) for use in {h.use for h in taken.held}},
        "reason": taken.reason,
        "corrupted_during": corrupted(),
    }
    for name, allocate in (("ring", ring), ("anonymous", anonymous)):
        got = handed_out(allocate)
        found[f"{name}_pages"] = len(got)
        found[f"{name}_while_taken"] = sum(paddr in taken.taken for paddr in got)
    after = quarantine.status()
    found["still_taken"] = after is not None and after.taken == taken.taken
    found["again"] = quarantine.take(wanted, PAGE).taken.total
    found["corrupted_again"] = corrupted()
    released = quarantine.release()
    found |= {
        "given_back": released.given_back.total,
        "stuck": released.stuck.total,
        "release_reason": released.reason,
        "corrupted_after": corrupted(),
    }
    for name, allocate in (("ring", ring), ("anonymous", anonymous)):
        found[f"{name}_after_release"] = sum(paddr in taken.taken for paddr in handed_out(allocate))
    print("QUARANTINE " + json.dumps(found))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
