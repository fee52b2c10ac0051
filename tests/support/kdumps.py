"""Writes kdump-compressed dumps and flattened streams field by field from makedumpfile's description of them.

It shares nothing with the readers under test, nor with our writer: offsets are counted here.
"""

import ctypes
import struct
import zlib
from dataclasses import dataclass, field

from support.elfwriter import write_note, write_prstatus

HEADER_END = 464  # sizeof(struct disk_dump_header)
SUB_END = 104  # sizeof(struct kdump_sub_header)
FLAGS = {"none": 0, "zlib": 1, "lzo": 2, "snappy": 4, "zstd": 0x20}
MACHINES = {"x86_64": "little", "ppc64le": "little", "ppc64": "big"}


def compress(codec: str, data: bytes) -> bytes:
    """One page as the codec's own library has it, as it is where that is not smaller."""
    if codec == "zlib":
        return zlib.compress(data)
    if codec == "zstd":
        import zstandard

        return zstandard.ZstdCompressor().compress(data)
    room = ctypes.create_string_buffer(2 * len(data) + 64)
    size = ctypes.c_size_t(len(room))
    if codec == "lzo":
        work = ctypes.create_string_buffer(1 << 17)
        ctypes.CDLL("liblzo2.so.2").lzo1x_1_compress(data, ctypes.c_size_t(len(data)), room, ctypes.byref(size), work)
    elif codec == "snappy":
        ctypes.CDLL("libsnappy.so.1").snappy_compress(data, ctypes.c_size_t(len(data)), room, ctypes.byref(size))
    else:
        return data
    return room.raw[: size.value]


@dataclass
class Kdump:
    """A dump to be written, and to be damaged first. `memory` are the page frames of bitmap 1, by default those of `pages`.

    After `to_bytes`, `places` says where everything lies: the bitmaps, "descriptors", "data", and of each page its data.
    """

    pages: dict[int, bytes]
    machine: str = "ppc64le"
    page_size: int = 0x1000
    codec: str = "zlib"
    memory: set[int] | None = None
    level: int = 31
    status: int | None = None
    version: int = 6
    split: int = 0
    max_pfn: int | None = None
    share_zeros: bool = True
    pids: tuple[int, ...] = (1, 0)
    info: dict[str, str] = field(default_factory=dict)
    notes: bytes | None = None
    phys_base: int = 0
    release: str = "6.1.0-kdumps"
    timestamp: int = 1_700_000_000
    places: dict[object, int] = field(default_factory=dict)

    @property
    def byteorder(self) -> str:
        return MACHINES[self.machine]

    def vmcoreinfo(self) -> bytes:
        lines = {"OSRELEASE": self.release, "PAGESIZE": str(self.page_size), **self.info}
        return "".join(f"{key}={value}\n" for key, value in lines.items()).encode()

    def elf_notes(self) -> bytes:
        if self.notes is not None:
            return self.notes
        registers = [0x1000 + index for index in range(48)]
        cpus = [write_note(self.byteorder, "CORE", 1, write_prstatus(self.byteorder, pid, registers)) for pid in self.pids]
        return b"".join(cpus) + write_note(self.byteorder, "VMCOREINFO", 0, self.vmcoreinfo())

    def to_bytes(self) -> bytes:
        order = "<" if self.byteorder == "little" else ">"
        size = self.page_size
        memory = set(self.pages) if self.memory is None else self.memory
        max_pfn = max({*memory, *self.pages}) + 1 if self.max_pfn is None else self.max_pfn
        notes, text = self.elf_notes(), self.vmcoreinfo()
        sub_blocks = -(-(SUB_END + len(notes)) // size)
        bitmap = (max_pfn + 8 * size - 1) // (8 * size) * size
        status = FLAGS[self.codec] if self.status is None else self.status

        main = bytearray(size)
        main[0:8] = b"KDUMP   "
        main[8:12] = struct.pack(order + "i", self.version)
        names = ("Linux", "node", self.release, "#1 SMP test", self.machine, "(none)")
        for index, name in enumerate(names):
            main[12 + 65 * index : 12 + 65 * index + len(name)] = name.encode()
        main[408:424] = struct.pack(order + "qq", self.timestamp, 250)
        main[424:440] = struct.pack(order + "IiiI", status, size, sub_blocks, 2 * bitmap // size)
        main[440:464] = struct.pack(order + "IIIIIi", min(max_pfn, 0xFFFFFFFF), 0, 0, 0, 0, len(self.pids))

        notes_at = size + SUB_END
        text_at = notes_at + notes.find(text) if text in notes else 0
        text_size = len(text) if text in notes else 0
        sub = struct.pack(order + "Qii", self.phys_base % (1 << 64), self.level, self.split)
        sub += struct.pack(order + "QQ", 0, 0)
        sub += struct.pack(order + "QQQQQQ", text_at, text_size, notes_at if notes else 0, len(notes), 0, 0)
        sub += struct.pack(order + "QQQ", 0, 0, max_pfn if self.version >= 6 else 0)
        head = bytes(main) + (sub + notes).ljust(sub_blocks * size, b"\0")

        maps = bytearray(2 * bitmap)
        for start, pfns in ((0, memory), (bitmap, set(self.pages))):
            for pfn in pfns:
                maps[start + pfn // 8] |= 1 << pfn % 8

        data_at = len(head) + len(maps) + 24 * len(self.pages)
        self.places = {
            "bitmap1": len(head),
            "bitmap2": len(head) + bitmap,
            "descriptors": len(head) + len(maps),
            "data": data_at,
        }
        descriptors, data = bytearray(), bytearray()
        if self.share_zeros:
            data += bytes(size)
        for pfn, page in sorted(self.pages.items()):
            if self.share_zeros and page.count(0) == size:
                at, stored, flags = data_at, b"", 0
                length = size
            else:
                stored, flags = compress(self.codec, page), FLAGS[self.codec]
                if len(stored) >= size:
                    stored, flags = page, 0
                at, length = data_at + len(data), len(stored)
            self.places[pfn] = at
            descriptors += struct.pack(order + "QIIQ", at, length, flags, 0)
            data += stored
        return head + bytes(maps) + bytes(descriptors) + bytes(data)


def write_flattened(records: list[tuple[int, bytes]], *, end: bool = True) -> bytes:
    """A flattened stream of these records, in this order."""
    out = bytearray(b"makedumpfile".ljust(16, b"\0") + (1).to_bytes(8, "big") + (1).to_bytes(8, "big")).ljust(4096, b"\0")
    for offset, data in records:
        out += offset.to_bytes(8, "big") + len(data).to_bytes(8, "big") + data
    return bytes(out) + (b"\xff" * 16 if end else b"")


def in_records(data: bytes, step: int = 1000) -> list[tuple[int, bytes]]:
    """A file's bytes as records, the head last as makedumpfile may write it."""
    pieces = [(at, data[at : at + step]) for at in range(0, len(data), step)]
    return [*pieces[1:], pieces[0]]
