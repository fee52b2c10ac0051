"""One picture of a handover, for every form it is drawn in: what lies where at each stage, in which colour, to which scale.

A machine has terabytes, its low block megabytes and the page that matters 4 KiB, so no single linear scale shows them all.
A picture has three bands, each linear inside: all memory, the low memory, and the reserved region, whose unused end is drawn
to a scale of its own behind a visible break. What would be too narrow to see is widened, and says so. The scale of a band
is the same at every stage, so that stages can be held against each other.

Nothing here knows about terminals, SVG or HTML: positions are whole units of whatever the caller counts in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from crashkernel.machine import HEAD_SIZE
from crashkernel.memory import Range, RangeSet, align_up, format_size
from crashkernel.placement.moves import K1, Check, Copy, Exchange, Put

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from crashkernel.placement.moves import Extent, Layout, Move
    from crashkernel.placement.plan import LoadPlan


@dataclass(frozen=True, slots=True)
class Kind:
    """Something that can lie in memory, and how it is drawn everywhere."""

    name: str  # stable, a word: "k1-text"
    labels: tuple[str, ...]  # from the full name to one letter, for whatever room there is
    fill: str  # "#rrggbb"
    meaning: str  # for the legend

    @property
    def ink(self) -> str:
        """Black or white, whichever is easier to read on `fill`."""
        light = luminance(self.fill)
        return "#000000" if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else "#ffffff"


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb", 0 to 1 (WCAG 2.2)."""
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# Each is a colour that a terminal has too. K1 in blues and pink, K2 in warm colours, what serves both in green, purple and
# grey. Told apart by lightness where hue does not serve; tests/unit/test_picture.py holds them against colour blindness.
K1_TEXT = Kind("k1-text", ("K1 text", "text", "T"), "#005faf", "K1's code")
K1_RODATA = Kind("k1-rodata", ("K1 read-only data", "K1 rodata", "rodata", "R"), "#5f87ff", "K1's read-only data")
K1_INIT = Kind("k1-init", ("K1 freed init", "freed init", "init", "I"), "#d75faf", "K1's init, freed and handed out again")
K1_DATA = Kind("k1-data", ("K1 data", "data", "D"), "#87d7ff", "K1's static data")
K1_IMAGE = Kind("k1-image", ("K1 image", "K1", "1"), "#005faf", "K1's image")
K1_MEMORY = Kind("k1-memory", ("K1 memory", "K1", "k"), "#c6c6c6", "K1's memory")
K2_IMAGE = Kind("k2-image", ("K2 image", "K2", "2"), "#d75f00", "K2's image")
INITRD = Kind("initrd", ("initrd", "i"), "#ffaf00", "K2's initramfs")
TREE = Kind("fdt", ("device tree", "tree", "t"), "#ffff00", "K2's device tree")
HEADER = Kind("elfcorehdr", ("elfcorehdr", "hdr", "h"), "#870087", "the vmcore's header")
PURGATORY = Kind("purgatory", ("purgatory", "purg", "p"), "#00af87", "the purgatory")
FREE = Kind("free", ("free", "f"), "#eeeeee", "reserved and not used")
FIRMWARE = Kind("firmware", ("firmware", "F"), "#4e4e4e", "the firmware's, below both kernels")
GAP = Kind("gap", ("no memory", ""), "#ffffff", "no memory")

KINDS = (
    *(K1_TEXT, K1_RODATA, K1_INIT, K1_DATA, K1_IMAGE, K1_MEMORY),
    *(K2_IMAGE, INITRD, TREE, HEADER, PURGATORY, FREE, FIRMWARE, GAP),
)
"""All kinds, in the order of a legend."""

_LAYOUT = {"K1 text": K1_TEXT, "K1 read-only data": K1_RODATA, "K1 freed init": K1_INIT, "K1 data": K1_DATA}
_LOADED = {"kernel": K2_IMAGE, "initrd": INITRD, "fdt": TREE, "elfcorehdr": HEADER, "purgatory": PURGATORY, "free": FREE}
_IMAGE_KINDS = (*_LAYOUT.values(), K1_IMAGE)

Holder = Literal["K1", "K2", "dump", "firmware", "purgatory", "reserved", "nobody"]
HOLDERS: dict[Holder, str] = {
    "K1": "K1, and the devices it gave it to",
    "K2": "K2, which may write here",
    "dump": "nobody writes here: K2 keeps it for the dump",
    "firmware": "the firmware, below both kernels",
    "purgatory": "no kernel: the purgatory alone runs",
    "reserved": "reserved: K1 leaves it alone",
    "nobody": "nobody",
}
"""Who holds a stretch of memory at a stage, and the same in words."""

BandName = Literal["all", "low", "reserved"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of physical memory that holds one thing at one stage."""

    range: Range
    kind: Kind
    name: str  # for people: "K1 text", "RTAS"
    holder: Holder  # who may write here at this stage
    home: int | None = None  # where these bytes lay when K2 was loaded, None for what was never loaded

    @property
    def of_k1(self) -> bool:
        """Whether these are K1's bytes."""
        return self.kind is K1_MEMORY or self.kind in _IMAGE_KINDS

    @property
    def moved(self) -> bool:
        """Whether these are bytes of K1 that are not where K1 had them."""
        return self.of_k1 and self.home != self.range.start

    @property
    def full_name(self) -> str:
        """Bytes of K1 elsewhere are named by where K1 had them."""
        return f"{self.name} from {self.home:#x}" if self.moved else self.name

    @property
    def came_from(self) -> str:
        """Where these bytes came from, in words."""
        if self.home is None:
            return {FIRMWARE: "the firmware's own", FREE: "nothing was loaded here"}.get(self.kind, "")
        at = Range.sized(self.home, self.range.size)
        if self.of_k1:
            return "K1's, where K1 had them" if self.home == self.range.start else f"K1 had them at {at}"
        return "where they were loaded" if self.home == self.range.start else f"loaded at {at}"

    def clip(self, window: Range) -> Piece:
        """The part inside `window`.

        :raise ValueError: there is none.
        """
        if window.contains(self.range):
            return self
        part = self.range.intersection(window)
        if part is None:
            raise ValueError(f"{self.range} is not in {window}")
        home = None if self.home is None else self.home + part.start - self.range.start
        return replace(self, range=part, home=home)


@dataclass(frozen=True, slots=True)
class Flow:
    """What went from where to where; `both` if it also went back."""

    source: Range
    target: Range
    both: bool


@dataclass(frozen=True, slots=True)
class Stage:
    """One moment of the handover. `pieces` account for every address up to the end of memory, gaps included, ascending."""

    title: str
    pieces: tuple[Piece, ...]
    changed: RangeSet  # against the stage before
    move: Move | None  # what led here, if it was a row of the plan's table
    flow: Flow | None  # what moved
    final: bool  # K2 runs: its memory is told apart from what it keeps


@dataclass(frozen=True, slots=True)
class Lane:
    """A property of memory that is drawn beside the map: `ranges` have it."""

    name: str  # stable, a word: "exposed"
    label: str  # at most eight letters
    meaning: str
    ranges: RangeSet


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a band with a linear scale of its own. `share` of the band's room is its, in hundredths."""

    range: Range
    share: int


@dataclass(frozen=True, slots=True)
class Band:
    """One bar of the picture: the window it shows and every address at which something begins or ends at some stage."""

    name: BandName
    title: str
    stretches: tuple[Stretch, ...]
    cuts: tuple[int, ...]
    loud: RangeSet  # where at some stage there is anything but K1's plain memory: the last to be drawn together

    @property
    def window(self) -> Range:
        """All it shows."""
        return Range(self.stretches[0].range.start, self.stretches[-1].range.end)

    def ruler(self, room: int, minimum: int) -> Ruler:
        """The band's scale over `room` units, with nothing narrower than `minimum` of them. `room` is at least `minimum`
        for each stretch. Where there is no room for so many neighbours, the small ones are drawn together.
        """
        edges, columns, widened = [self.window.start], [0], []
        for number, stretch in enumerate(self.stretches):
            last = number == len(self.stretches) - 1
            units = room - columns[-1] if last else max(minimum, room * stretch.share // 100)
            inner = [cut for cut in self.cuts if stretch.range.start < cut < stretch.range.end]
            cuts = [stretch.range.start, *inner, stretch.range.end]
            if (most := max(1, units // minimum * 3 // 4)) < len(cuts) - 1:
                cuts = _coarser(cuts, self.loud, most)
            sizes = [end - start for start, end in pairwise(cuts)]
            widths = share_out(sizes, units, minimum)
            true = [size * units / stretch.range.size for size in sizes]
            widened += [
                Range(start, end)
                for (start, end), width, fair in zip(pairwise(cuts), widths, true, strict=True)
                if width == minimum and fair < minimum * 0.75
            ]
            for end, width in zip(cuts[1:], widths, strict=True):
                edges.append(end)
                columns.append(columns[-1] + width)
        return Ruler(self, tuple(edges), tuple(columns), tuple(widened))


@dataclass(frozen=True, slots=True)
class Cell:
    """What is drawn as one rectangle: units [left, right). `pieces` are what it stands for, one or many."""

    range: Range
    left: int
    right: int
    kind: Kind
    pieces: tuple[Piece, ...]
    widened: bool  # wider than to scale
    broken: bool  # the scale changes where it begins

    @property
    def mixed(self) -> bool:
        """Whether it stands for memory and gaps in it alike."""
        return self.kind is not GAP and any(piece.kind is GAP for piece in self.pieces)

    @property
    def name(self) -> str:
        """For people."""
        if len(self.pieces) == 1:
            return self.pieces[0].full_name
        name = self.kind.labels[0]
        alike = [piece for piece in self.pieces if piece.kind is self.kind]
        if self.mixed and len(alike) > 1:
            return f"{name} in {len(alike)} pieces"
        image = self.kind in _IMAGE_KINDS and all(piece.of_k1 for piece in self.pieces)
        return name if image or len(alike) == len(self.pieces) else f"{name} and more"

    @property
    def labels(self) -> tuple[str, ...]:
        """Names to choose from, the longest first."""
        if len(self.pieces) > 1:
            return (self.name, *self.kind.labels)
        piece = self.pieces[0]
        return (self.name, *((piece.name,) if piece.name != self.name else ()), *self.kind.labels[1:])

    @property
    def details(self) -> tuple[str, str]:
        """Where these bytes came from, or of many pieces what they are; and whose the memory is, in words."""
        told = (piece.came_from if len(self.pieces) == 1 else piece.full_name for piece in self.pieces)
        owners = dict.fromkeys(HOLDERS[piece.holder] for piece in self.pieces if piece.kind is not GAP)
        return _some(list(dict.fromkeys(filter(None, told)))), _some(list(owners))


@dataclass(frozen=True, slots=True)
class Ruler:
    """A band's scale in one form: `edges` are addresses, `columns` the units where they lie."""

    band: Band
    edges: tuple[int, ...]
    columns: tuple[int, ...]
    widened: tuple[Range, ...]

    def at(self, paddr: int) -> float:
        """Where an address of the band lies, in units; linear between edges."""
        index = min(max(bisect_left(self.edges, paddr), 1), len(self.edges) - 1)
        start, end = self.edges[index - 1], self.edges[index]
        left, right = self.columns[index - 1], self.columns[index]
        return left + (right - left) * (paddr - start) / (end - start)

    def span(self, wanted: Range) -> tuple[float, float] | None:
        """Where the part of `wanted` that the band shows lies, in units."""
        part = wanted.intersection(self.band.window)
        return None if part is None else (self.at(part.start), self.at(part.end))

    def cells(self, stage: Stage) -> tuple[Cell, ...]:
        """The rectangles of a stage, from left to right, without a gap between them."""
        breaks = {stretch.range.start for stretch in self.band.stretches[1:]}
        cells: list[Cell] = []
        index = 0
        pieces = stage.pieces
        merged: Piece | None = None  # of the last cell, if it stands for one piece alone
        for (start, end), (left, right) in zip(pairwise(self.edges), pairwise(self.columns), strict=True):
            while pieces[index].range.end <= start:
                index += 1
            stop = index
            while stop < len(pieces) and pieces[stop].range.start < end:
                stop += 1
            here = pieces[index:stop]
            window = Range(start, end)
            widened = window in self.widened
            if len(here) == 1 and here[0] is merged and start not in breaks:
                last = cells[-1]
                whole = Range(last.range.start, end)
                one = (here[0].clip(whole),)
                cells[-1] = Cell(whole, last.left, right, last.kind, one, last.widened and widened, last.broken)
                continue
            merged = here[0] if len(here) == 1 else None
            clipped = tuple(piece.clip(window) for piece in here)
            cells.append(Cell(window, left, right, _loudest(clipped), clipped, widened, start in breaks))
        return tuple(cells)


class Picture:
    """All that is to be drawn of a plan."""

    def __init__(self, plan: LoadPlan) -> None:
        self.plan = plan

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The plan's stages, and K2 running as the last one."""
        plan = self.plan
        drawn: list[Stage] = []
        layout: Layout | None = None
        for number, (title, layout) in enumerate(plan.stages()):
            move = plan.moves[number - 2] if number > 1 else None
            changed = RangeSet([Range(0, HEAD_SIZE)] if number == 1 else move.written if move is not None else ())
            pieces = drawn[-1].pieces if drawn and not changed else tuple(self._pieces(layout, alive=number == 0))
            drawn.append(Stage(title, pieces, changed, move, self._flow(number, move), final=False))
        assert layout is not None, "every plan has its first stage"
        title = f"K2 is entered at {plan.entry:#x}: what is its own, and what it keeps for the dump"
        drawn.append(Stage(title, tuple(self._pieces(layout, final=True)), RangeSet(), None, None, final=True))
        return tuple(drawn)

    def frames(self) -> list[tuple[Stage, list[str]]]:
        """Stages that change something or end the story, each with the titles of those that follow and change nothing."""
        frames: list[tuple[Stage, list[str]]] = []
        for stage in self.stages:
            if isinstance(stage.move, Check):
                frames[-1][1].append(stage.title)
            else:
                frames.append((stage, []))
        return frames

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """All memory, the low memory, the reserved region."""
        plan = self.plan
        region, end = plan.reserved, self.end
        ranges = [segment.range for segment in plan.segments]
        ranges += [r for move in plan.moves for r in (*move.read, *move.written)]
        low = [r.end for r in (*ranges, *(k.range for k in plan.k1_layout)) if r.end <= region.start]
        low += [min(r.end, region.start) for r in plan.k2_memory if r.start < region.start and r.start == 0]
        used = max(low, default=region.start)
        # never empty, whatever a plan says of a region at 0
        low_end = max(0x1000, min(region.start, align_up(used + used // 12, 0x10000)))
        busy = max(r.end for r in ranges if region.start < r.end <= region.end)
        shown = min(region.end, align_up(busy + (busy - region.start) // 12, 0x10000))

        cuts = sorted({cut for stage in self.stages for piece in stage.pieces for cut in (piece.range.start, piece.range.end)})
        cuts = sorted({*cuts, *(cut for stage in self.stages for r in stage.changed for cut in (r.start, r.end))})
        loud = RangeSet(p.range for stage in self.stages for p in stage.pieces if p.kind not in (K1_MEMORY, GAP))
        coarse = {used, region.start, busy, region.end, *(cut for r in plan.firmware for cut in (r.range.start, r.range.end))}
        coarse |= {cut for r in plan.memory for cut in (r.start, r.end)}
        whole = [Stretch(region, 100)]
        if (shown - region.start) * 10 < region.size * 6:
            whole = [Stretch(Range(region.start, shown), 82), Stretch(Range(shown, region.end), 18)]
        return (
            Band("all", "all memory", (Stretch(Range(0, end), 100),), tuple(sorted(coarse)), loud),
            Band("low", "low memory", (Stretch(Range(0, low_end), 100),), tuple(cuts), loud),
            Band("reserved", "reserved", tuple(whole), tuple(cuts), loud),
        )

    def changes(self, number: int) -> list[tuple[Range, str, str]]:
        """What the stage of that number changed, with what lay there before and what lies there then."""
        if number == 0 or not self.stages[number].changed:
            return []
        changes = []
        window = self.stages[number].changed
        before = [piece for piece in self.stages[number - 1].pieces if window.overlaps(piece.range)]
        for piece in self.stages[number].pieces:
            for was in before:
                for part in window & RangeSet([piece.range]) & RangeSet([was.range]):
                    changes.append((part, was.clip(part).full_name, piece.clip(part).full_name))
        return changes

    def lanes(self, stage: Stage, window: Range | None = None) -> tuple[Lane, ...]:
        """What is drawn beside the map at this stage, inside `window`; lanes that say nothing there are left out."""
        plan, window = self.plan, window or Range(0, self.end)
        shown = RangeSet([window])
        worst = (hazard for hazard in plan.hazards if hazard.verdict in ("dangerous", "impossible"))
        reach = RangeSet() if plan.real_mode.contains(window) else RangeSet([plan.real_mode])
        lanes = (
            Lane("real-mode", "RMA", "what a CPU reaches with translation off", shown & reach),
            Lane("k2", "K2's own", "K2's memory: K2 may write here", shown & plan.k2_memory if stage.final else RangeSet()),
            Lane(
                "exposed",
                "exposed",
                "K1's memory that becomes K2's: a device still writing there hits K2",
                shown & plan.exposed,
            ),
            Lane(
                "hazard",
                "hazards",
                "addresses of what was found dangerous",
                shown & RangeSet(each for hazard in worst for each in hazard.ranges),
            ),
        )
        return tuple(lane for lane in lanes if lane.ranges)

    @property
    def end(self) -> int:
        """Where memory ends, or the reserved region if a plan says that it reaches further."""
        return max(self.plan.memory.ranges[-1].end, self.plan.reserved.end)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """What occurs at any stage, in the order of a legend."""
        seen = {piece.kind.name for stage in self.stages for piece in stage.pieces}
        return tuple(kind for kind in KINDS if kind.name in seen)

    def _flow(self, number: int, move: Move | None) -> Flow | None:
        purgatory = self.plan.segment("purgatory").range
        if number == 1:
            return Flow(Range.sized(purgatory.start, HEAD_SIZE), Range(0, HEAD_SIZE), both=False)
        if isinstance(move, Copy | Exchange):
            both = isinstance(move, Exchange)
            return Flow(Range.sized(move.src, move.size), Range.sized(move.dst, move.size), both)
        if isinstance(move, Put):  # from the purgatory's body
            return Flow(purgatory, move.written[0], both=False)
        return None

    def _pieces(self, layout: Layout, *, alive: bool = False, final: bool = False) -> Iterator[Piece]:
        firmware = sorted(self.plan.firmware, key=lambda region: region.range.start)
        marks = {cut for region in firmware for cut in (region.range.start, region.range.end)}
        if final:
            marks |= {cut for r in self.plan.k2_memory for cut in (r.start, r.end)}
        at = 0
        for extent in layout.extents:
            if at < extent.location.start:
                yield from self._gap(Range(at, extent.location.start), marks)
            for part in _split(extent, marks, self._layout_cuts(extent)):
                yield self._piece(part, alive=alive, final=final)
            at = extent.location.end
        if at < self.end:
            yield from self._gap(Range(at, self.end), marks)

    def _layout_cuts(self, extent: Extent) -> set[int]:
        if extent.content != K1:
            return set()
        shift = extent.location.start - extent.origin
        return {cut + shift for region in self.plan.k1_layout for cut in (region.range.start, region.range.end)}

    def _gap(self, where: Range, marks: set[int]) -> Iterator[Piece]:
        for part in _parts(where, marks):
            named = self._firmware_at(part)
            if named is None:
                yield Piece(part, GAP, GAP.labels[0], "nobody")
            else:
                yield Piece(part, FIRMWARE, named, "firmware")

    def _firmware_at(self, where: Range) -> str | None:
        return next((region.name for region in self.plan.firmware if region.range.overlaps(where)), None)

    def _piece(self, part: Extent, *, alive: bool, final: bool) -> Piece:
        where, named = part.location, self._firmware_at(part.location)
        if named is not None:
            return Piece(where, FIRMWARE, named, "firmware")
        holder = self._holder(part, alive=alive, final=final)
        if part.content == K1:
            inside = (region for region in self.plan.k1_layout if region.range.contains(part.source))
            region = next(inside, None)
            kind, name = (K1_MEMORY, "K1 memory") if region is None else (_LAYOUT.get(region.name, K1_IMAGE), region.name)
            return Piece(where, kind, name, holder, part.origin)
        kind = _LOADED[part.content]
        if kind is FREE:
            return Piece(where, kind, kind.labels[0], holder)
        segments = (s for s in self.plan.segments if s.content == part.content)
        homes = (s.range.start + part.origin - s.origin for s in segments if 0 <= part.origin - s.origin < s.range.size)
        return Piece(where, kind, kind.labels[0], holder, next(homes, where.start))

    def _holder(self, part: Extent, *, alive: bool, final: bool) -> Holder:
        if alive:
            return "reserved" if self.plan.reserved.overlaps(part.location) else "K1"
        if not final:
            return "purgatory"
        if self.plan.k2_memory.overlaps(part.location):
            return "K2"
        return "dump" if part.content == K1 else "nobody"


def share_out(sizes: Sequence[int], room: int, minimum: int) -> list[int]:
    """Divide `room` whole units in proportion to `sizes` (positive), at least `minimum` for each; the sum is `room`.

    :raise ValueError: there is no room for so many.
    """
    if not sizes or len(sizes) * minimum > room:
        raise ValueError(f"{len(sizes)} times {minimum} units do not fit into {room}")
    fixed: set[int] = set()
    while True:
        left, total = room - minimum * len(fixed), sum(size for n, size in enumerate(sizes) if n not in fixed)
        narrow = {n for n, size in enumerate(sizes) if n not in fixed and size * left < minimum * total}
        if not narrow:
            break
        fixed |= narrow
    widths = [minimum if n in fixed else size * left // total for n, size in enumerate(sizes)]
    # what rounding left over: to those it was taken from
    owed = sorted((n for n in range(len(sizes)) if n not in fixed), key=lambda n: -(sizes[n] * left % total))
    for n in owed[: room - sum(widths)]:
        widths[n] += 1
    return widths


def _coarser(cuts: list[int], loud: RangeSet, limit: int) -> list[int]:
    """`cuts` with small neighbours drawn together until at most `limit` parts are left; loud parts only when nothing else
    helps.
    """
    parts = [(start, end, loud.overlaps(Range(start, end))) for start, end in pairwise(cuts)]
    span = cuts[-1] - cuts[0]
    for spare_loud in (True, False):
        threshold = max(1, span // (4 * limit))
        while threshold <= 2 * span:
            kept = [cuts[0]]
            for (start, middle, noisy), (_, end, noisy_too) in pairwise(parts):
                small = middle - start < threshold and end - middle < threshold
                if not small or (spare_loud and (noisy or noisy_too)):
                    kept.append(middle)
            if len(kept) <= limit:
                return [*kept, cuts[-1]]
            threshold *= 4
    return [cuts[0], cuts[-1]]


def _loudest(pieces: tuple[Piece, ...]) -> Kind:
    """The kind that most bytes have; the parts of K1's image count as one when they meet."""
    if len(pieces) == 1:
        return pieces[0].kind
    bytes_of: defaultdict[Kind, int] = defaultdict(int)
    for piece in pieces:
        bytes_of[K1_IMAGE if piece.kind in _IMAGE_KINDS else piece.kind] += piece.range.size
    memory = {kind: size for kind, size in bytes_of.items() if kind is not GAP}
    return max(memory or bytes_of, key=lambda kind: bytes_of[kind])


def _split(extent: Extent, *marks: set[int]) -> Iterator[Extent]:
    for part in _parts(extent.location, set().union(*marks)):
        clipped = extent.clip(part)
        if clipped is not None:
            yield clipped


def _parts(where: Range, marks: Iterable[int]) -> Iterator[Range]:
    edges = [where.start, *sorted(mark for mark in marks if where.start < mark < where.end), where.end]
    return (Range(start, end) for start, end in pairwise(edges))


def _some(texts: list[str]) -> str:
    shown = "; ".join(texts[:3])
    return f"{shown}; and {len(texts) - 3} more" if len(texts) > 3 else shown


def describe_rows(pieces: Sequence[Piece], limit: int = 40) -> list[tuple[Range, int, str, Piece]]:
    """Rows of a table of addresses: the range, bytes of memory in it, what it is, and its first piece. Gaps are left out.

    Where there are more than `limit` rows, neighbours of one kind are told in one row with their number, gaps between them.
    """
    solid = [piece for piece in pieces if piece.kind is not GAP]
    groups: list[list[Piece]] = []
    for piece in solid:
        alike = groups and groups[-1][0].kind is piece.kind and groups[-1][0].holder == piece.holder
        if len(solid) > limit and alike and piece.moved == groups[-1][0].moved:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    rows = []
    for group in groups:
        first = group[0]
        what = first.full_name if len(group) == 1 else f"{first.name} in {len(group)} pieces"
        rows.append((Range(first.range.start, group[-1].range.end), sum(p.range.size for p in group), what, first))
    return rows


def headline(plan: LoadPlan) -> list[str]:
    """What every form says first."""
    return [
        f"K2 {plan.kernel}, placement {plan.placement}",
        f"on {plan.machine}",
        f"reserved {plan.reserved} ({format_size(plan.reserved.size)})",
        f"the dump will hold {format_size(plan.k1_memory.total)} of K1's memory",
    ]
