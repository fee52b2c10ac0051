"""Writes ELF64 files field by field from the specification's offsets, sharing nothing with the reader under test."""

from dataclasses import dataclass

PT_LOAD, PT_NOTE = 1, 4


@dataclass(frozen=True)
class Part:
    """A segment to write; `memory_size` None means as many bytes as `data`."""

    type: int = PT_LOAD
    flags: int = 7
    vaddr: int = 0
    paddr: int = 0
    data: bytes = b""
    memory_size: int | None = None
    alignment: int = 0


class _Bytes:
    def __init__(self, byteorder: str, size: int) -> None:
        self.byteorder = byteorder
        self.buffer = bytearray(size)

    def put(self, offset: int, size: int, value: int) -> None:
        self.buffer[offset : offset + size] = value.to_bytes(size, self.byteorder)


def write_elf(
    byteorder: str,
    parts: list[Part],
    *,
    kind: int = 2,
    machine: int = 21,
    entry: int = 0xC000000000000000,
    flags: int = 0,
    escaped_count: bool = False,
) -> bytes:
    """An ELF64 file: header, program headers, (with `escaped_count`) one section header, then the parts' bytes."""
    sections = 64 + 56 * len(parts)
    position = sections + (64 if escaped_count else 0)
    out = _Bytes(byteorder, position)
    out.buffer[0:7] = b"\x7fELF\x02" + (b"\x01" if byteorder == "little" else b"\x02") + b"\x01"
    out.put(16, 2, kind)
    out.put(18, 2, machine)
    out.put(20, 4, 1)
    out.put(24, 8, entry)
    out.put(32, 8, 64)
    out.put(40, 8, sections if escaped_count else 0)
    out.put(48, 4, flags)
    out.put(52, 2, 64)
    out.put(54, 2, 56)
    out.put(56, 2, 0xFFFF if escaped_count else len(parts))
    if escaped_count:
        out.put(58, 2, 64)
        out.put(60, 2, 1)
        out.put(sections + 44, 4, len(parts))
    for index, part in enumerate(parts):
        at = 64 + 56 * index
        out.put(at, 4, part.type)
        out.put(at + 4, 4, part.flags)
        out.put(at + 8, 8, position)
        out.put(at + 16, 8, part.vaddr)
        out.put(at + 24, 8, part.paddr)
        out.put(at + 32, 8, len(part.data))
        out.put(at + 40, 8, len(part.data) if part.memory_size is None else part.memory_size)
        out.put(at + 48, 8, part.alignment)
        position += len(part.data)
    return bytes(out.buffer) + b"".join(part.data for part in parts)


def write_note(byteorder: str, name: str, kind: int, desc: bytes) -> bytes:
    owner = name.encode() + b"\0"
    head = b"".join(each.to_bytes(4, byteorder) for each in (len(owner), len(desc), kind))
    return head + owner + bytes(-len(owner) % 4) + desc + bytes(-len(desc) % 4)


def write_prstatus(byteorder: str, pid: int, registers: list[int]) -> bytes:
    """struct elf_prstatus of ppc64, 504 bytes, with the first of the 48 registers given."""
    out = _Bytes(byteorder, 504)
    out.put(32, 4, pid)
    for index, value in enumerate(registers):
        out.put(112 + 8 * index, 8, value)
    return bytes(out.buffer)
