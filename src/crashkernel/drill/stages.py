"""The parts of a drill that the user waits for: each has a deadline, its time is taken, and what breaks it has a reason."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crashkernel.errors import FormatError, StageFailed

if TYPE_CHECKING:
    from crashkernel.drill.qemu import RunningTwin


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the drill. `deadline` is in seconds on a slow machine."""

    name: str
    deadline: float
    likely: str  # what to look at when it fails


WAIT = Stage("wait", float("inf"), "")  # for other drills on this machine to end
BOOT_K1 = Stage("K1 boot", 300, "does this kernel boot on this machine model and CPU? see the console")
LOAD = Stage("load", 180, "the loader's own message says what to change")
FAULT = Stage("fault", 180, "what the fault needs of K1 could not be done: the console's last lines say what it missed")
CRASH = Stage("crash", 120, "K1 did not reach the purgatory: did the panic take another path (fadump, panic_timeout)?")
COPY_TRUTH = Stage("truth", 120, "the host could not copy the twin's memory: is there room for it?")
HANDOVER = Stage("handover", 120, "the purgatory did not reach K2's first instruction: its last line on the console says where")
DAMAGE = Stage("damage", 120, "the purgatory did not say what was done to it")
BOOT_K2 = Stage("K2 boot", 300, "K2 started but did not come up: too little memory in crashkernel=, or a wrong device tree")
CAPTURE = Stage("capture", 900, "K2 could not save /proc/vmcore")
VERIFY = Stage("verify", 600, "")
DESCRIBE = Stage("describe", 180, "the command's own message says what to change")

Listener = Callable[[Stage, str], None]
"""Told of each stage as it begins (with "") and of what happens in it."""

_LAST_WORDS = 0.2  # seconds that the console's may still be on their way


class GuestSaidNo(Exception):
    """What the twin itself says, or does not say, is why a stage failed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Silent(GuestSaidNo):
    """K2 never printed a line: what the console holds is K1's."""


class Clock:
    """Runs stages, and turns what breaks one into a `StageFailed`. `taken` has the seconds of those that are over, by name."""

    def __init__(self, tell: Listener) -> None:
        self.taken: dict[str, float] = {}
        self._tell = tell

    @contextlib.asynccontextmanager
    async def stage(self, stage: Stage, machine: RunningTwin | None = None) -> AsyncIterator[Callable[[str], None]]:
        """Do what follows within the stage's deadline; what is yielded takes notes.

        :raise StageFailed: it was not done.
        """
        self._tell(stage, "")
        start = time.monotonic()
        try:
            async with asyncio.timeout(stage.deadline):
                yield lambda text: self._tell(stage, text)
        except TimeoutError as error:
            raise _failed(stage, f"not done after {stage.deadline:.0f} s", machine) from error
        except EOFError as error:
            await asyncio.sleep(_LAST_WORDS)
            raise _failed(stage, str(error), machine) from error
        except Silent as error:
            console = tuple(machine.console) if machine else ()
            raise StageFailed(stage.name, error.reason, console=console, hint=_likely(stage, (error.reason,))) from error
        except GuestSaidNo as error:
            await asyncio.sleep(_LAST_WORDS)
            raise _failed(stage, error.reason, machine) from error
        except (OSError, ValueError, FormatError) as error:
            # QEMU gone with words unread, a full disk, a guest that says nonsense
            await asyncio.sleep(_LAST_WORDS)
            raise _failed(stage, f"{type(error).__name__}: {error}", machine) from error
        finally:
            self.taken[stage.name] = round(time.monotonic() - start, 3)


def _failed(stage: Stage, message: str, machine: RunningTwin | None) -> StageFailed:
    console = tuple(machine.console) if machine else ()
    if stage is HANDOVER:  # what the purgatory found is the reason for all else
        message = damage_told(console) or message
    return StageFailed(stage.name, message, console=console, hint=_likely(stage, (*console, message)))


def purgatory_lines(lines: Iterable[str]) -> list[str]:
    """Of a console's lines, those of the purgatory."""
    return [line for line in lines if line.startswith("crashkernel: ")]


def damage_told(lines: Iterable[str]) -> str:
    """The purgatory's line about damage to what was loaded, "" if it said none."""
    return next((line for line in purgatory_lines(lines) if "DAMAGED" in line), "")


_CAUSES = (
    ("Crash kernel can not overlap current kernel", "crashkernel=…@OFFSET lies over K1: choose a higher offset"),
    ("Out of memory", "K2 ran out of memory: raise crashkernel="),
    ("ailed to allocate", "K2 found no memory early in its boot: raise crashkernel="),
    (
        "Illegal instruction",
        "QEMU up to 8.0 refuses what a real POWER8 runs (mffsl, in Debian's C library): use another --cpu",
    ),
    ("Unable to handle kernel", "the kernel took a fault: see the console's last lines"),
)


def _likely(stage: Stage, console: Iterable[str]) -> str:
    text = "\n".join(console)
    return next((cause for sign, cause in _CAUSES if sign in text), stage.likely)


CONSOLE = "console.log"
"""Name of the file that has all of a twin's console, where a drill works and where it is kept."""

KERNEL_STARTS = "] Linux version"
"""In a kernel's first line on the console."""

MEMORY_SHORT = re.compile(
    r"[Oo]ut of memory|deadlocked on memory|[Ff]ailed to allocate|[Cc]annot allocate memory|page allocation failure"
    r"|oom-kill|MemoryError|Initramfs unpacking failed: write error|No space left on device|not enough memory"
)
"""What kernels and programs say when memory is short: mm/oom_kill.c, mm/page_alloc.c, mm/memblock.c and its callers,
init/initramfs.c, strerror(3), Python."""

_TROUBLE = re.compile(r"Oops|BUG:|kernel BUG|Kernel panic|Unable to handle|Bad page|Machine check|stuck for|general protection")


def k2_said(console: str) -> str:
    """K2's part of all that the console said, "" if it never ran."""
    return console.rpartition(KERNEL_STARTS)[2] if console.count(KERNEL_STARTS) > 1 else ""


def k2_trouble(console: str) -> str:
    """K2's first complaint in all that the console said, "" if it made none or never ran."""
    return next((line for line in k2_said(console).splitlines() if _TROUBLE.search(line)), "")
