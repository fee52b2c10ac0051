"""kexec-tools' purgatory, the very bytes Debian ships, made ready to run on the bench.

`/sbin/kexec` carries its purgatory as a relocatable object and links it itself when it loads a kernel. Here the same object is
found in the program, laid out at an address of ours and relocated by the rules of the 64-bit ELF V2 ABI; nothing of kexec-tools
is copied into this package.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from crashkernel.drill.debian import Archive, default_cache, silent
from crashkernel.errors import EnvironmentFault, FormatError

if TYPE_CHECKING:
    from pathlib import Path

    from crashkernel.drill.debian import Progress

SUITE = "bookworm"
"""The Debian release whose kexec-tools is run."""

# System V gABI, chapter 4; numbers of relocations: 64-bit ELF V2 ABI 3.5.3.
_ET_REL, _EM_PPC64 = 1, 21
_SECTION = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, addr, offset, size, link, info, addralign, entsize
_SYMBOL = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size
_RELA = struct.Struct("<QQq")  # offset, symbol << 32 | type, addend
_SHT_SYMTAB, _SHT_RELA, _SHT_NOBITS, _SHF_ALLOC = 2, 4, 8, 2
_SHN_UNDEF, _SHN_ABS = 0, 0xFFF1
_TOC_BIAS = 0x8000  # what r2 points behind the first byte of .toc
_REL24, _REL32, _ADDR64, _REL16_LO, _REL16_HA = 10, 26, 38, 250, 252
_ADDR16 = {4: 0, 5: 16, 39: 32, 41: 48}  # LO, HI, HIGHER, HIGHEST: which 16 bits
_TOC16_LO, _TOC16_HA, _TOC16_LO_DS = 48, 50, 64


@dataclass(frozen=True, slots=True)
class KexecPurgatory:
    """The linked object: `image` lies at `base`, `symbols` are addresses, `toc` is what its code wants in r2."""

    base: int
    image: bytes
    symbols: dict[str, int]
    toc: int
    entry: int

    @classmethod
    def from_program(cls, program: Path, base: int) -> Self:
        """Find the object in `kexec` and link it to run at `base`.

        :raise FormatError: there is no such object in it, or it wants a relocation that is not known here.
        """
        data = program.read_bytes()
        at = 0
        while (at := data.find(b"\x7fELF\x02\x01\x01", at + 1)) >= 0:
            if struct.unpack_from("<HH", data, at + 16) == (_ET_REL, _EM_PPC64):
                return cls._link(data[at:], base, str(program))
        raise FormatError("carries no little-endian ppc64 purgatory", source=str(program))

    @classmethod
    def _link(cls, data: bytes, base: int, source: str) -> Self:
        entry, _, table = struct.unpack_from("<QQQ", data, 24)
        (count,) = struct.unpack_from("<H", data, 60)
        sections = [_SECTION.unpack_from(data, table + number * _SECTION.size) for number in range(count)]
        image, places = bytearray(), {}
        for number, (_, kind, flags, _, offset, size, _, _, align, _) in enumerate(sections):
            if flags & _SHF_ALLOC:
                image += bytes(-len(image) % max(align, 1))
                places[number] = len(image)
                image += bytes(size) if kind == _SHT_NOBITS else data[offset : offset + size]
        symbols = _symbols(data, sections, places, base)
        toc = next(base + places[n] for n in places if _name(data, sections, n) == ".toc") + _TOC_BIAS
        for _, kind, _, _, offset, size, _, target, _, _ in sections:
            if kind == _SHT_RELA and target in places:
                for rela, number, addend in (_RELA.unpack_from(data, at) for at in range(offset, offset + size, _RELA.size)):
                    name, value, other = symbols[number >> 32]
                    place = places[target] + rela
                    wanted = (toc if name == ".TOC." else value) + addend
                    _apply(image, place, base + place, number & 0xFFFFFFFF, wanted, toc, other, source)
        named = {name: value for name, value, _ in symbols if name}
        return cls(base, bytes(image), named, toc, base + entry)

    def with_values(self, values: dict[str, bytes]) -> bytes:
        """The image with variables set, as kexec sets them when it loads a kernel."""
        image = bytearray(self.image)
        for name, value in values.items():
            at = self.symbols[name] - self.base
            image[at : at + len(value)] = value
        return bytes(image)


def debian_kexec(progress: Progress = silent) -> Path:
    """The program `kexec` of Debian's package for ppc64el.

    :raise EnvironmentFault: the package cannot be had, or holds no such program.
    """
    tree = Archive(default_cache(), SUITE, progress).unpack("kexec-tools")
    for place in ("sbin/kexec", "usr/sbin/kexec"):
        if (tree / place).is_file():
            return tree / place
    raise EnvironmentFault(f"kexec-tools of Debian {SUITE} holds no kexec", hint=f"unpacked in {tree}")


def _name(data: bytes, sections: list[tuple[int, ...]], number: int) -> str:
    (strings,) = struct.unpack_from("<H", data, 62)
    return _text(data, sections[strings][4] + sections[number][0])


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode("ascii", "replace")


def _symbols(data: bytes, sections: list[tuple[int, ...]], places: dict[int, int], base: int) -> list[tuple[str, int, int]]:
    """Name, address and st_other of each symbol."""
    found = next(section for section in sections if section[1] == _SHT_SYMTAB)
    strings = sections[found[6]][4]
    symbols = []
    for at in range(found[4], found[4] + found[5], _SYMBOL.size):
        name, _, other, section, value, _ = _SYMBOL.unpack_from(data, at)
        if section not in {_SHN_UNDEF, _SHN_ABS}:
            value += base + places.get(section, 0)
        symbols.append((_text(data, strings + name), value, other))
    return symbols


def _apply(image: bytearray, place: int, address: int, kind: int, value: int, toc: int, other: int, source: str) -> None:
    """One relocation: `address` is where `place` in the image will lie."""

    def half(number: int, keep: int = 0) -> None:
        (old,) = struct.unpack_from("<H", image, place)
        struct.pack_into("<H", image, place, number & 0xFFFF & ~keep | old & keep)

    if kind == _ADDR64:
        struct.pack_into("<Q", image, place, value)
    elif kind in _ADDR16:
        half(value >> _ADDR16[kind])
    elif kind == _REL24:
        # to the local entry: behind the instructions that make r2, which the caller already has (ELF V2 ABI 3.4.1)
        target = value + ((1 << (other >> 5)) >> 2 << 2) - address
        (old,) = struct.unpack_from("<I", image, place)
        struct.pack_into("<I", image, place, old & ~0x3FFFFFC | target & 0x3FFFFFC)
    elif kind == _REL16_LO:
        half(value - address)
    elif kind == _REL16_HA:
        half((value - address + 0x8000) >> 16)
    elif kind == _TOC16_LO:
        half(value - toc)
    elif kind == _TOC16_LO_DS:
        half(value - toc, keep=3)
    elif kind == _TOC16_HA:
        half((value - toc + 0x8000) >> 16)
    elif kind == _REL32:
        struct.pack_into("<i", image, place, value - address)
    else:
        raise FormatError(f"its purgatory wants relocation {kind}, which is unknown here", source=source)
