"""A device that goes on writing to memory after K1 has died: what it aims at, the writes, and what came of them.

Nobody stops a device when K1 dies, and K2 knows nothing of it: whatever K1 told it to fill, it fills. Here the device is a
thread of the host that writes into the twin's RAM file, which QEMU shares (`qemu.py`): like a device, no CPU sees it coming.
It is truthful for data; a write to code that QEMU has translated already is not noticed before QEMU translates it again,
while a real CPU would fetch it sooner or later.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from crashkernel.drill.guest_driver import ELSEWHERE
from crashkernel.errors import UsageError
from crashkernel.machine import HEAD_SIZE
from crashkernel.memory import Range, RangeSet, format_size
from crashkernel.placement import PAGE
from crashkernel.placement.hazards import EARLY_ALLOCATIONS

if TYPE_CHECKING:
    from pathlib import Path

    from crashkernel.drill.guest import Driver
    from crashkernel.placement.plan import Hazard, LoadPlan

When = Literal["handover", "k2", "both"]
WHENS: tuple[When, ...] = ("handover", "k2", "both")

BUFFERS = 16
"""Pages the device has in each region."""

LINE = 64
"""Bytes that a device writes at once at least, and to which its writes are aligned."""
_MOST_LINES = 64
MARK = b"the rogue device"
"""How each line of what it writes begins; a number and noise follow."""


@dataclass(frozen=True, slots=True)
class DmaRegion:
    """Memory a device may be told to write to: `where` it lies, given a plan.

    `given_out` says that only pages which K1's allocator really handed out count, and `k1` that the device's buffers are K1's
    memory: bytes that may differ in a dump, as on any machine with such a device.
    """

    name: str
    title: str
    hazard: str  # the plan's check that speaks of it, "" without
    where: Callable[[LoadPlan], RangeSet]
    given_out: bool = False
    k1: bool = True


def _image(name: str) -> Callable[[LoadPlan], RangeSet]:
    return lambda plan: RangeSet(region.range for region in plan.k1_layout if region.name == name)


def _slack(plan: LoadPlan) -> RangeSet:
    """Behind K1's image: what becomes K2's at zero; elsewhere as much as K2's early allocator would need there."""
    image = RangeSet(region.range for region in plan.k1_layout)
    if not image:
        return image
    end = max(region.end for region in image)
    behind = RangeSet([Range.sized(end, EARLY_ALLOCATIONS)]) | (plan.exposed - RangeSet([Range(0, end)]))
    return (behind & plan.memory) - RangeSet([plan.reserved])


def _anywhere(_plan: LoadPlan) -> RangeSet:
    """No place is better than another."""
    return RangeSet()


def _waiting(plan: LoadPlan) -> RangeSet:
    """K2's image where it was loaded, without the free memory behind it in its segment."""
    kernel = next(segment for segment in plan.segments if segment.content == "kernel")
    return RangeSet([Range.sized(kernel.range.start, min(kernel.range.size, plan.kernel_span))])


REGIONS: Mapping[str, DmaRegion] = {
    region.name: region
    for region in (
        DmaRegion("text", "K1's text", "", _image("K1 text")),
        DmaRegion("init", "K1's freed init", "freed-init", _image("K1 freed init"), given_out=True),
        DmaRegion("data", "K1's static data", "static-data", _image("K1 data")),
        DmaRegion("slack", "the memory behind K1's image", "slack", _slack, given_out=True),
        DmaRegion("memory", "K1's memory", "", _anywhere, given_out=True),
        DmaRegion("image", "K2's image where it waits", "damage", _waiting, k1=False),
        DmaRegion("reserved", "the reserved region", "damage", lambda plan: RangeSet([plan.reserved]), k1=False),
    )
}


@dataclass(frozen=True, slots=True)
class Dma:
    """What the device is to do. `rate` in writes per second.

    :raise UsageError: a region nobody knows, none at all, or a rate or time that is none.
    """

    regions: tuple[str, ...]
    rate: int = 1000
    when: When = "both"
    seed: int = 0

    def __post_init__(self) -> None:
        known = ", ".join(REGIONS)
        for name in self.regions:
            if name not in REGIONS:
                raise UsageError(f"fault dma: {name!r} is no region", hint=f"choose of {known}")
        if not self.regions:
            raise UsageError("fault dma names no region", hint=f"choose of {known}")
        if not 0 < self.rate <= 1_000_000:
            raise UsageError(f"fault dma: rate={self.rate}: a device writes 1 to 1000000 times a second")
        if self.when not in WHENS:
            raise UsageError(f"fault dma: when={self.when}", hint=f"choose of {', '.join(WHENS)}")

    @classmethod
    def from_argument(cls, text: str, seed: int) -> Dma:
        """What a fault's argument says: `REGION+REGION,rate=N,when=WHEN`.

        :raise UsageError: something that none can have.
        """
        regions, *options = text.split(",")
        given: dict[str, Any] = {}
        for option in options:
            name, _, value = option.partition("=")
            if name not in ("rate", "when") or name in given:
                raise UsageError(f"fault dma: {option!r} is not understood", hint="as dma:init+data,rate=100,when=k2")
            if name == "rate" and not value.isdecimal():
                raise UsageError(f"fault dma: {option}: a device writes 1 to 1000000 times a second")
            given[name] = int(value) if name == "rate" else value
        return cls(tuple(dict.fromkeys(name for name in regions.split("+") if name)), seed=seed, **given)

    @property
    def given_out(self) -> tuple[str, ...]:
        """The regions whose pages K1 is asked for."""
        return tuple(name for name in self.regions if REGIONS[name].given_out)

    @property
    def driver(self) -> Driver:
        """What K1 needs of a driver: one that is to find pages of its own choice must keep K1's modules from having them."""
        if set(self.given_out) - {"memory"}:
            return "early"
        return "late" if self.given_out else "none"


@dataclass(slots=True)
class DmaReport:
    """What the device was aimed at, what it wrote, and what came of it. Addresses are physical, sizes bytes."""

    dma: Dma
    wanted: dict[str, RangeSet] = field(default_factory=dict)  # where each region lies
    given: dict[str, list[Range]] = field(default_factory=dict)  # what K1's driver got; `ELSEWHERE` among the names
    targets: dict[str, tuple[Range, ...]] = field(default_factory=dict)  # what the device writes to, likewise
    pages_looked_at: int = 0  # by K1's driver, to find them
    page_size: int = 0  # K1's, 0 when no driver ran
    hazards: dict[str, Hazard] = field(default_factory=dict)  # what the plan had said of each region
    writes: int = 0
    bytes_written: int = 0
    writes_into_k2: int = 0  # into K2's memory, after K2 was entered
    k2_ran: bool = False
    per_page: dict[int, int] = field(default_factory=dict)  # writes by the 64 KiB page they begin in
    problem: str = ""  # why the writes prove nothing, "" if they do
    effect: str = ""  # one line

    @property
    def own(self) -> RangeSet:
        """The device's buffers in K1's memory: what K1 lent it, and what it may fill."""
        return RangeSet(
            target for name, targets in self.targets.items() if name == ELSEWHERE or REGIONS[name].k1 for target in targets
        )

    @property
    def all_targets(self) -> tuple[Range, ...]:
        """Every target once, in the order of the regions."""
        return tuple(dict.fromkeys(target for targets in self.targets.values() for target in targets))


def driver_command(dma: Dma, plan: LoadPlan) -> str:
    """The arguments of K1's driver (`guest_driver.py`)."""
    regions = (f"{name}={','.join(f'{r.start:x}-{r.end:x}' for r in REGIONS[name].where(plan))}" for name in dma.given_out)
    return " ".join([str(BUFFERS), *regions])


def choose_targets(
    dma: Dma, plan: LoadPlan, given: Mapping[str, Sequence[Range]], avoid: Iterable[Range] = ()
) -> dict[str, tuple[Range, ...]]:
    """The device's targets by region: the pages K1 gave out (`given`, by region), pages of static memory, or anywhere.

    Of K1's static image some whole pages stand for a driver's static buffers, never one with bytes of `avoid`: nobody has
    a buffer where K1 saves its registers.
    """
    noise = random.Random(f"targets {dma.seed}")  # noqa: S311  (repeatable, not secret)
    targets: dict[str, tuple[Range, ...]] = {}
    for name in dma.regions:
        region = REGIONS[name]
        where = region.where(plan)
        if region.given_out:
            targets[name] = tuple(given.get(name, ()))
            continue
        if not region.k1:
            targets[name] = tuple(where)
            continue
        usable = where - RangeSet(each.align_outward(PAGE) for each in (Range(0, HEAD_SIZE), *avoid))
        pages = [page for each in usable if (whole := each.align_inward(PAGE)) for page in _pages(whole)]
        targets[name] = tuple(sorted(noise.sample(pages, min(BUFFERS, len(pages)))))
    targets[ELSEWHERE] = tuple(given.get(ELSEWHERE, ()))
    return targets


def _pages(whole: Range) -> Iterator[Range]:
    return (Range.sized(start, PAGE) for start in range(whole.start, whole.end, PAGE))


def writes(targets: tuple[Range, ...], seed: int) -> Iterator[tuple[int, bytes]]:
    """Without end: an address and what the device writes there, in whole lines of one target. The same for the same seed.

    :raise ValueError: no target.
    """
    if not targets:
        raise ValueError("a device without a target")
    noise = random.Random(f"writes {seed}")  # noqa: S311  (repeatable, not secret)
    number = 0
    while True:
        target = noise.choice(targets)
        lines = target.size // LINE
        first = noise.randrange(lines)
        count = noise.randint(1, min(_MOST_LINES, lines - first))
        data = bytearray()
        for _ in range(count):
            number += 1
            data += MARK + number.to_bytes(8, "big") + noise.randbytes(LINE - len(MARK) - 8)
        yield target.start + first * LINE, bytes(data)


def _during(report: DmaReport) -> str:
    handover = ["during the handover"] if report.dma.when != "k2" else []
    k2 = ["while K2 ran"] if report.dma.when != "handover" and report.k2_ran else []
    return " and ".join(handover + k2) or "never"


def report_lines(report: DmaReport) -> list[str]:
    """The report for people."""
    lines: list[str] = []
    if not report.targets:
        return [f"damage: {report.effect}"]
    for name in report.dma.regions:
        region, targets = REGIONS[name], report.targets.get(name, ())
        where = str(report.wanted.get(name, RangeSet()))
        if not region.given_out:
            pages = f"{len(targets)} pages of {where}" if region.k1 else f"anywhere in {where}"
            lines.append(f"{name} ({region.title}): {pages}")
        elif region.where is not _anywhere and not report.wanted.get(name):
            lines.append(f"{name} ({region.title}): there is none")
        elif region.where is not _anywhere:
            got = "no page" if not targets else "1 page" if len(targets) == 1 else f"{len(targets)} pages"
            lines.append(
                f"{name} ({region.title}): K1 gave out {got} of {where}; {report.pages_looked_at:,} pages were looked at"
            )
        if hazard := report.hazards.get(name):
            lines.append(f"the plan had said of {hazard.title}: {hazard.verdict.upper()}: {hazard.reason}")
    if elsewhere := report.targets.get(ELSEWHERE, ()):
        other = "" if report.dma.regions == ("memory",) else "other "
        pages = "page" if len(elsewhere) == 1 else "pages"
        lines.append(f"{len(elsewhere)} {other}{pages} that K1 gave out: {RangeSet(elsewhere)}")
    lines.append(
        f"{report.writes:,} writes, {format_size(report.bytes_written)}, {_during(report)}; "
        f"{report.writes_into_k2:,} of them into K2's memory after it was entered"
    )
    if report.problem:
        lines.append(f"these writes prove nothing: {report.problem}")
    lines.append(f"damage: {report.effect}")
    return lines


class RogueDevice:
    """The thread that writes into guest RAM, from `start` to `stop`, at the rate and to the targets of a report."""

    def __init__(self, ram: Path, report: DmaReport) -> None:
        self.when = report.dma.when
        self.writes = 0
        self.error: OSError | None = None
        self._bytes_written = 0
        self._writes_into_k2 = 0
        self._per_page: Counter[int] = Counter()
        self._k2_memory = RangeSet()
        self._k2_ran = False
        self._ram = ram
        self._plan = writes(report.all_targets, report.dma.seed)
        self._rate = report.dma.rate
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="rogue device", daemon=True)

    def k1_is_dead(self) -> None:
        """The handover is about to begin: and so does the device, if it is not to wait for K2."""
        if self.when != "k2":
            self._thread.start()

    def k2_runs(self, k2_memory: RangeSet) -> None:
        """K2 is about to run, with that memory: begin, go on or end."""
        self._k2_memory = k2_memory
        self._k2_ran = True
        if self.when == "k2":
            self._thread.start()
        elif self.when == "handover":
            self.stop()

    def stop(self) -> None:
        """No write is made after this returns. May be called again, and on a device that never began."""
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def account(self, report: DmaReport) -> None:
        """Enter what was written; once it has stopped."""
        report.writes = self.writes
        report.bytes_written = self._bytes_written
        report.writes_into_k2 = self._writes_into_k2
        report.k2_ran = self._k2_ran
        report.per_page = dict(self._per_page)
        if self.error is not None:
            report.problem = f"the device died of {self.error}"
        elif not self.writes:
            report.problem = "the device never wrote"

    def _work(self) -> None:
        since = time.monotonic()
        try:
            with self._ram.open("r+b", buffering=0) as ram:
                while not self._end.wait(max(0.0, since + self.writes / self._rate - time.monotonic())):
                    address, data = next(self._plan)
                    os.pwrite(ram.fileno(), data, address)
                    self.writes += 1
                    self._bytes_written += len(data)
                    self._writes_into_k2 += self._k2_memory.overlaps(Range.sized(address, len(data)))
                    self._per_page[address // PAGE * PAGE] += 1
        except OSError as error:
            self.error = error
