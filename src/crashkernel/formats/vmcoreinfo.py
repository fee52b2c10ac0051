"""VMCOREINFO: what a kernel tells its dump tools about itself, as lines of `key=value` in an ELF note.

References: Linux `Documentation/admin-guide/kdump/vmcoreinfo.rst`, `include/linux/vmcore_info.h` (the VMCOREINFO_*
macros) and `kernel/vmcore_info.c` (`crash_core.c` before 6.9).

Keys are kept as text and interpreted when asked for, so that a line of a newer kernel never spoils the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from crashkernel.errors import FormatError

_TIME_DIGITS = 11
"""Of a time in seconds: up to the year 5138, all that a calendar takes."""


@dataclass(frozen=True, eq=False, slots=True)
class VmcoreInfo(Mapping[str, str]):
    """The lines of a VMCOREINFO note as a mapping, such as `"OFFSET(page.flags)"` to `"0"`, with typed access.

    Every typed access raises FormatError when the key is not there or its value is not a number; `key in info` asks.
    """

    lines: Mapping[str, str]
    source: str = ""

    @classmethod
    def from_bytes(cls, text: bytes, source: str = "") -> VmcoreInfo:
        """Read the note's description; NULs at its end are padding. The first of two lines with one key counts.

        :raise FormatError: when a line is not printable ASCII or has no `=`.
        """
        lines: dict[str, str] = {}
        offset = 0
        for raw in bytes(text).rstrip(b"\0").split(b"\n"):
            line = raw.decode("ascii", "replace")
            if not (raw.isascii() and line.isprintable()):
                raise FormatError(f"VMCOREINFO has a line that is not text: {raw[:40]!r}", source=source, offset=offset)
            key, equals, value = line.partition("=")
            if line and not (key and equals):
                raise FormatError(f"VMCOREINFO has a line without a value: {line[:40]!r}", source=source, offset=offset)
            if line:
                lines.setdefault(key, value)
            offset += len(raw) + 1
        return cls(lines, source)

    def __getitem__(self, key: str) -> str:
        return self.lines[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def release(self) -> str:
        """The kernel's release, as `uname -r` prints it (OSRELEASE)."""
        return self._text("OSRELEASE")

    @property
    def page_size(self) -> int:
        """Bytes in a page (PAGESIZE), a power of two."""
        size = self._integer("PAGESIZE", 10)
        if size <= 0 or size & (size - 1):
            raise FormatError(f"VMCOREINFO says PAGESIZE={size}, not a power of two", source=self.source)
        return size

    @property
    def crash_time(self) -> int | None:
        """When the kernel crashed by its own clock (CRASHTIME), in seconds since 1970; None if it does not say, or nonsense."""
        value = self.lines.get("CRASHTIME", "")
        return int(value) if value.isascii() and value.isdigit() and len(value) <= _TIME_DIGITS else None

    def symbol(self, name: str) -> int:
        """Virtual address of a symbol (SYMBOL)."""
        return self._integer(f"SYMBOL({name})", 16)

    def offset(self, member: str) -> int:
        """Offset in bytes of a structure's member, written `page.flags` (OFFSET)."""
        return self._integer(f"OFFSET({member})", 10)

    def size(self, name: str) -> int:
        """Size of a structure in bytes (SIZE)."""
        return self._integer(f"SIZE({name})", 10)

    def length(self, name: str) -> int:
        """Number of elements of an array (LENGTH)."""
        return self._integer(f"LENGTH({name})", 10)

    def number(self, name: str) -> int:
        """Value of a constant or variable (NUMBER); decimal and perhaps negative, or hexadecimal with 0x."""
        key = f"NUMBER({name})"
        return self._integer(key, 16 if self._text(key).lower().startswith("0x") else 10, signed=True)

    def _text(self, key: str) -> str:
        try:
            return self.lines[key]
        except KeyError:
            raise FormatError(f"VMCOREINFO has no {key}", source=self.source) from None

    def _integer(self, key: str, base: int, *, signed: bool = False) -> int:
        value = self._text(key)
        try:
            if (value[1:] if signed and value[:1] == "-" else value).isalnum():  # int() takes blanks and underscores
                return int(value, base)
        except ValueError:
            pass
        raise FormatError(f"VMCOREINFO says {key}={value[:40]}, not a number", source=self.source)
