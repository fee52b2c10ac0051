"""Text for terminals: colours, and strings from outside that must not act on them."""

from __future__ import annotations

import re
import textwrap

_CUBE = (0, 95, 135, 175, 215, 255)
# ECMA-48 5.4 (CSI), 5.6 (strings, OSC among them), and escapes of two or three bytes
_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]")


def visible(text: str) -> str:
    """`text` with everything that is not printable as an escape: a name from a device tree may hold control sequences, a
    command line bytes that are no text (os.fsdecode).
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii", "backslashreplace") for c in text
    )


def tail(text: str, lines: int, width: int) -> list[str]:
    """The last lines of a console's log as they may be shown: without control sequences, of at most `width` characters each.

    What a carriage return took back is left out, and so are empty lines at the end.
    """
    shown: list[str] = []
    end = len(text)
    while end >= 0 and len(shown) < lines:
        start = text.rfind("\n", 0, end) + 1
        left = text[start:end].rstrip("\r").rpartition("\r")[2]
        plain = visible(_SEQUENCES.sub("", left[: width * 8]).replace("\t", " ")).rstrip()
        if plain or shown:
            shown.append(plain if len(plain) <= width else f"{plain[: width - 1]}…")
        end = start - 1
    return shown[::-1]


def wrap(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """`text` made visible, in lines of at most `width` columns where its words allow; `first` and `rest` begin them."""
    return textwrap.wrap(
        visible(text), width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    ) or [first.rstrip()]


def paint(text: str, *, ink: str = "", fill: str = "", bold: bool = False) -> str:
    """`text` in the nearest of a terminal's 256 colours to the "#rrggbb" given; "" leaves the terminal's own."""
    codes = ["1"] if bold else []
    codes += [f"38;5;{nearest(ink)}"] if ink else []
    codes += [f"48;5;{nearest(fill)}"] if fill else []
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes and text else text


def nearest(colour: str) -> int:
    """The index of the xterm colour nearest to "#rrggbb": 16 to 231 are a cube of 6 levels, 232 to 255 greys."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    levels = [min(range(6), key=lambda level: abs(_CUBE[level] - value)) for value in (red, green, blue)]
    grey = min(range(24), key=lambda step: abs(8 + 10 * step - (red + green + blue) // 3))
    cube = sum((_CUBE[level] - value) ** 2 for level, value in zip(levels, (red, green, blue), strict=True))
    grey_off = sum((8 + 10 * grey - value) ** 2 for value in (red, green, blue))
    return 232 + grey if grey_off < cube else 16 + 36 * levels[0] + 6 * levels[1] + levels[2]
