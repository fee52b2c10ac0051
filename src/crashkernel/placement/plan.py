"""`LoadPlan`: everything a handover is, as a frozen value that goes to JSON and back.

The plan holds no payload. The loader builds the segments' bytes from it, the purgatory executes its moves, and whoever holds
the dump afterwards reads here what the plan promised.
"""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_right
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, cast

from crashkernel.errors import FormatError, PlanError
from crashkernel.formats import fields
from crashkernel.machine import HEAD_SIZE, Region, Services
from crashkernel.memory import Range, RangeSet, align_up
from crashkernel.placement.moves import K1, LINE, MAX_MOVES, Check, Copy, Exchange, Extent, Layout, Move, Put
from crashkernel.placement.tables import LOW_PAGE, PURGATORY_SPAN, SAVE_OFFSET

if TYPE_CHECKING:
    from collections.abc import Iterable

PlacementName = Literal["zero", "reserved"]
PLACEMENTS: tuple[PlacementName, ...] = ("zero", "reserved")
FORMAT = 3
"""Version of the JSON form."""

DamagePolicy = Literal["halt", "reboot", "continue"]
DAMAGE_POLICIES: tuple[DamagePolicy, ...] = ("halt", "reboot", "continue")
"""What the purgatory does when what was loaded is not what it finds, in the order of P_ON_DAMAGE (purgatory.S)."""

SegmentContent = Literal["kernel", "initrd", "fdt", "elfcorehdr", "purgatory"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Memory the loader fills: `content` from its byte `origin` on, zeros after its end."""

    content: SegmentContent
    range: Range
    origin: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """K1's bytes of `range`, named by the address they had when K1 died, lie at physical `location` at capture time."""

    range: Range
    location: int


HazardVerdict = Literal["safe", "guarded", "dangerous", "impossible", "unknown"]
HAZARD_VERDICTS: tuple[HazardVerdict, ...] = ("safe", "guarded", "dangerous", "impossible", "unknown")
"""What a check found: nothing can happen; it could, but something named prevents it; it can happen; it will happen, or the
placement cannot be made; or what one would have to know was not to be had."""


@dataclass(frozen=True, slots=True)
class Hazard:
    """One problem of the 2005 mail, or one that time has added, held against this plan."""

    name: str  # stable, for scripts: "freed-init"
    title: str  # a few words for people: "K1's freed init pages"
    verdict: HazardVerdict
    reason: str  # one or two sentences; for "guarded" what prevents it
    ranges: tuple[Range, ...] = ()  # the physical addresses involved
    advice: str = ""  # what to do about it, "" where nothing is to be done
    source: str = ""  # the kernel file and function, specification or measurement behind it


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A placement worked out for one machine and one capture kernel. Addresses are physical, sizes bytes."""

    placement: PlacementName
    kernel: str  # K2's release
    kernel_span: int
    cmdline: str  # K2's, elfcorehdr= included
    machine: str  # one line for people: platform, model, MMU
    memory: RangeSet
    real_mode: Range  # what the purgatory, with translation off, reaches
    reserved: Range
    firmware: tuple[Region, ...]
    k1_layout: tuple[Region, ...]
    segments: tuple[Segment, ...]
    moves: tuple[Move, ...]
    entry: int
    k2_memory: RangeSet  # what K2 may write
    k2_mapped: RangeSet  # what K2 is told exists: its memory and the firmware's
    kept: tuple[Kept, ...]  # all of K1's memory, in ascending order
    notes: tuple[Range, ...]  # VMCOREINFO and one per CPU, at their address in K1
    slaves: int  # CPUs that K1 will send to the purgatory's slave entry
    slave_timeout: int  # in timebase ticks
    services: Services  # what the purgatory may ask of the firmware
    altivec: bool  # it may use AltiVec
    on_damage: DamagePolicy
    hazards: tuple[Hazard, ...] = ()

    @property
    def k1_memory(self) -> RangeSet:
        """What the dump must hold: all RAM but the reserved region."""
        return self.memory - RangeSet([self.reserved])

    @property
    def exposed(self) -> RangeSet:
        """K1's memory that is K2's from the handover on: a device that still writes there hits K2, not K1's bytes."""
        moved = RangeSet(kept.range for kept in self.kept if kept.location != kept.range.start)
        return moved | (self.k2_memory - RangeSet([self.reserved]))

    @property
    def unchecked(self) -> RangeSet:
        """What is loaded out of the purgatory's reach, and so is checked by nobody."""
        return RangeSet(segment.range for segment in self.segments) - RangeSet([self.real_mode])

    def segment(self, content: SegmentContent) -> Segment:
        """The first segment with that content."""
        return next(segment for segment in self.segments if segment.content == content)

    def locate(self, wanted: Range) -> int:
        """Where K1's bytes of `wanted` lie at capture time.

        :raise PlanError: they do not lie in one piece, or are no memory of K1's.
        """
        index = bisect_right(self.kept, wanted.start, key=lambda kept: kept.range.start)
        if index and (kept := self.kept[index - 1]).range.contains(wanted):
            return kept.location + wanted.start - kept.range.start
        raise PlanError(f"K1's bytes at {wanted} do not stay in one piece")

    def stages(self) -> tuple[tuple[str, Layout], ...]:
        """The machine's memory at each stage of the handover, as the 2005 mail draws it."""
        layout = loaded_layout(self.memory, self.reserved, self.segments)
        stages = [("loaded: K1 runs, K2 waits in the reserved region", layout)]
        layout = layout.after(Copy(0, self.segment("purgatory").range.start, HEAD_SIZE))
        stages.append(("K1 has died: it copied the purgatory's head over its own first bytes", layout))
        for number, move in enumerate(self.moves, 1):
            layout = layout.after(move)
            stages.append((f"move {number} of {len(self.moves)}: {describe_move(move)}", layout))
        return tuple(stages)

    def to_json(self) -> str:
        """One JSON object; addresses are hexadecimal strings, ranges half-open "0x0-0x10000"."""
        return json.dumps(
            {
                "format": FORMAT,
                "placement": self.placement,
                "kernel": self.kernel,
                "kernel_span": hex(self.kernel_span),
                "cmdline": self.cmdline,
                "machine": self.machine,
                "memory": [str(r) for r in self.memory],
                "real_mode": str(self.real_mode),
                "reserved": str(self.reserved),
                "firmware": [{"name": r.name, "range": str(r.range)} for r in self.firmware],
                "k1_layout": [{"name": r.name, "range": str(r.range)} for r in self.k1_layout],
                "segments": [{"content": s.content, "range": str(s.range), "origin": hex(s.origin)} for s in self.segments],
                "moves": [_move_to_json(move) for move in self.moves],
                "entry": hex(self.entry),
                "k2_memory": [str(r) for r in self.k2_memory],
                "k2_mapped": [str(r) for r in self.k2_mapped],
                "kept": [{"range": str(k.range), "location": hex(k.location)} for k in self.kept],
                "notes": [str(r) for r in self.notes],
                "slaves": self.slaves,
                "slave_timeout": self.slave_timeout,
                "services": _services_to_json(self.services),
                "altivec": self.altivec,
                "on_damage": self.on_damage,
                "hazards": [_hazard_to_json(hazard) for hazard in self.hazards],
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> LoadPlan:
        """Read a plan back and hold it against its own rules.

        :raise FormatError: not a plan, a field is missing or of the wrong kind, or the plan contradicts itself.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"not JSON: {error}", source=source) from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise FormatError(
                f"not a load plan of format {FORMAT}",
                source=source,
                hint="write one with `crashkernel plan --plan-out`",
            )
        try:
            plan = cls(
                placement=fields.one_of(raw["placement"], PLACEMENTS),
                kernel=fields.text(raw["kernel"]),
                kernel_span=fields.number(raw["kernel_span"]),
                cmdline=fields.text(raw["cmdline"]),
                machine=fields.text(raw["machine"]),
                memory=RangeSet(fields.ranges(raw["memory"])),
                real_mode=fields.one_range(raw["real_mode"]),
                reserved=fields.one_range(raw["reserved"]),
                firmware=tuple(
                    Region(fields.text(r["name"]), fields.one_range(r["range"])) for r in fields.items(raw["firmware"])
                ),
                k1_layout=tuple(
                    Region(fields.text(r["name"]), fields.one_range(r["range"])) for r in fields.items(raw["k1_layout"])
                ),
                segments=tuple(
                    Segment(
                        fields.one_of(s["content"], _CONTENTS),
                        fields.one_range(s["range"]),
                        fields.number(s["origin"]),
                    )
                    for s in fields.items(raw["segments"])
                ),
                moves=tuple(_move_from_json(move) for move in fields.items(raw["moves"])),
                entry=fields.number(raw["entry"]),
                k2_memory=RangeSet(fields.ranges(raw["k2_memory"])),
                k2_mapped=RangeSet(fields.ranges(raw["k2_mapped"])),
                kept=tuple(Kept(fields.one_range(k["range"]), fields.number(k["location"])) for k in fields.items(raw["kept"])),
                notes=tuple(fields.ranges(raw["notes"])),
                slaves=fields.count(raw["slaves"], 1 << 32),  # as wide as the purgatory's parameter block has them
                slave_timeout=fields.count(raw["slave_timeout"], 1 << 64),
                services=_services_from_json(raw["services"]),
                altivec=fields.boolean(raw["altivec"]),
                on_damage=fields.one_of(raw["on_damage"], DAMAGE_POLICIES),
                hazards=tuple(_hazard_from_json(hazard) for hazard in fields.items(raw["hazards"])),
            )
        except KeyError as error:
            raise FormatError(f"field {error} is missing", source=source) from error
        except (TypeError, ValueError) as error:
            raise FormatError(f"a field is not what it must be: {error}", source=source) from error
        try:
            check_plan(plan)
        except PlanError as error:
            raise FormatError(error.message, source=source) from error
        return plan


def check_plan(plan: LoadPlan) -> None:
    """Hold a plan against the rules that no plan may break, whoever made it.

    :raise PlanError: a rule is broken; names the ranges that collide.
    """
    placed = sorted(plan.segments, key=lambda s: s.range.start)
    for before, after in pairwise(placed):
        if before.range.overlaps(after.range):
            raise PlanError(f"segments overlap: {before.content} {before.range} and {after.content} {after.range}")
    for segment in plan.segments:
        # sanity_check_segment_list, kernel/kexec_core.c: a crash segment outside crashk_res is -EADDRNOTAVAIL
        if not plan.reserved.contains(segment.range):
            raise PlanError(f"segment {segment.content} {segment.range} lies outside the reserved region {plan.reserved}")
        if segment.content != "initrd" and not plan.real_mode.contains(segment.range):
            raise PlanError(f"the {segment.content} {segment.range} lies where a CPU with translation off does not reach")
        for region in plan.firmware:
            if segment.range.overlaps(region.range):
                raise PlanError(f"segment {segment.content} {segment.range} lies over {region.name!r} {region.range}")
    if {"kernel", "fdt", "elfcorehdr", "purgatory"} - {segment.content for segment in plan.segments}:
        raise PlanError("a plan needs kernel, fdt, elfcorehdr and purgatory segments")
    services, limit = plan.services, 1 << 32
    if (services.rtas_reboot or services.rtas_nmi) and max(*services.rtas, plan.segment("purgatory").range.end - 1) >= limit:
        raise PlanError("RTAS runs in 32-bit mode: neither it nor the purgatory may lie above 4 GiB")
    if plan.segment("purgatory").range.size < PURGATORY_SPAN:
        raise PlanError(f"the purgatory needs {PURGATORY_SPAN:#x} bytes, not {plan.segment('purgatory').range}")
    if len(plan.moves) > MAX_MOVES:
        raise PlanError(f"{len(plan.moves)} moves, the purgatory's table holds {MAX_MOVES}")
    for move in plan.moves:
        _check_move(plan, move)
    if keep(plan.memory, plan.reserved, plan.segments, plan.moves, plan.k2_memory) != plan.kept:
        raise PlanError("where K1's memory is said to lie is not where the moves leave it")
    running = Range.sized(plan.entry, max(plan.kernel_span, HEAD_SIZE))
    if final_layout(plan.memory, plan.reserved, plan.segments, plan.moves).within(running) != (Extent(running, "kernel", 0),):
        raise PlanError(f"K2 does not lie whole at its entry {plan.entry:#x} after the moves")
    for note in plan.notes:
        plan.locate(note)
    _check_checks(plan)
    if [move for move in plan.moves if move.written][1:2] != [Copy(0, plan.segment("purgatory").range.start, LOW_PAGE)]:
        raise PlanError("the purgatory's first page does not guard address 0 from the second move on")


def _check_move(plan: LoadPlan, move: Move) -> None:
    """A row of the table, for itself."""
    purgatory = plan.segment("purgatory").range
    saved = Range.sized(purgatory.start + SAVE_OFFSET, LOW_PAGE)
    if isinstance(move, Put):
        if move.origin + move.size > HEAD_SIZE:
            raise PlanError(f"the purgatory carries only K1's first {HEAD_SIZE:#x} bytes: {describe_move(move)}")
        if move.origin % LINE:
            raise PlanError(f"not whole {LINE}-byte lines of K1's first bytes: from {move.origin:#x} on")
    if isinstance(move, Copy | Exchange) and Range.sized(move.dst, move.size).overlaps(Range.sized(move.src, move.size)):
        raise PlanError(f"a move onto itself: {describe_move(move)}")
    for part in (*move.read, *move.written):
        if part.start % LINE or part.end % LINE:
            raise PlanError(f"not whole {LINE}-byte lines: {describe_move(move)}")
        if not plan.memory.covers(part):
            raise PlanError(f"a move touches {part}, which is no memory")
        if not plan.real_mode.contains(part):
            raise PlanError(f"a move touches {part}, which a CPU with translation off does not reach: {describe_move(move)}")
        for region in plan.firmware:
            if part.overlaps(region.range):
                raise PlanError(f"a move touches {region.name!r} {region.range}: {describe_move(move)}")
    for part in move.written:
        if part.overlaps(purgatory) and not saved.contains(part):
            raise PlanError(f"a move writes over the purgatory that makes it: {part}")
        for segment in plan.segments:
            if segment.content not in ("kernel", "purgatory") and part.overlaps(segment.range):
                raise PlanError(f"a move writes over the {segment.content} {segment.range}: {describe_move(move)}")


def _check_checks(plan: LoadPlan) -> None:
    """Each check finds one content there, and what K2 needs is checked after the last move that touches it.

    Not needed is the memory behind K2's image in its own segment, which is zeros for K2's allocator.
    """
    checked = RangeSet([])
    layouts = [layout for _, layout in plan.stages()]
    for move, layout in zip(plan.moves, layouts[2:], strict=True):
        if isinstance(move, Check):
            found = layout.within(move.range)
            if len(found) != 1 or found[0].location != move.range or found[0].content in (K1, "free", "purgatory"):
                raise PlanError(f"nothing that was loaded lies whole at {move.range} when it is to be checked")
            checked |= RangeSet([move.range])
        checked -= RangeSet(move.written)
    for extent in loaded_contents(layouts[-1], plan.segment("purgatory").range):
        for needed in to_check(plan.real_mode, plan.entry, plan.kernel_span, extent):
            if not checked.covers(needed):
                raise PlanError(f"the {extent.content} at {needed} is not checked before K2 is entered")


def to_check(real_mode: Range, entry: int, kernel_span: int, loaded: Extent) -> RangeSet:
    """The part of what was loaded that the purgatory can reach and K2 needs as it is."""
    reached = RangeSet([real_mode]) & RangeSet([loaded.location])
    if loaded.content != "kernel":
        return reached
    # the image, and the copy of its head at 0
    return reached & RangeSet([Range(0, LOW_PAGE), Range.sized(entry, align_up(kernel_span, LINE))])


def loaded_contents(layout: Layout, purgatory: Range) -> tuple[Extent, ...]:
    """Where what was loaded for K2 lies; the purgatory and the copies it keeps in its segment are left out."""
    return tuple(
        extent
        for extent in layout.extents
        if extent.content in ("kernel", "initrd", "fdt", "elfcorehdr") and not extent.location.overlaps(purgatory)
    )


def loaded_layout(memory: RangeSet, reserved: Range, segments: Iterable[Segment]) -> Layout:
    """Memory while K1 runs and K2 is loaded."""
    k1 = [Extent(r, K1, r.start) for r in memory - RangeSet([reserved])]
    return Layout.of([*k1, Extent(reserved, "free", 0)]).overlaid(
        *(Extent(segment.range, segment.content, segment.origin) for segment in segments)
    )


def final_layout(memory: RangeSet, reserved: Range, segments: Iterable[Segment], moves: Iterable[Move]) -> Layout:
    """Memory when K2 is entered: K1 has died, and all moves are made."""
    segments = tuple(segments)
    purgatory = next(segment.range for segment in segments if segment.content == "purgatory")
    layout = loaded_layout(memory, reserved, segments)
    layout = layout.after(Copy(0, purgatory.start, HEAD_SIZE))  # kexec_sequence, arch/powerpc/kernel/misc_64.S
    for move in moves:
        layout = layout.after(move)
    return layout


def keep(
    memory: RangeSet, reserved: Range, segments: Iterable[Segment], moves: Iterable[Move], k2_memory: RangeSet
) -> tuple[Kept, ...]:
    """Where each byte of K1 lies once all moves are made, out of K2's reach.

    :raise PlanError: bytes of K1 are lost, with their range.
    """
    layout = final_layout(memory, reserved, segments, moves)
    found = sorted(
        (
            Kept(Range.sized(extent.origin + place.start - extent.location.start, place.size), place.start)
            for extent in layout.locations()
            for place in RangeSet([extent.location]) - k2_memory
        ),
        key=lambda each: (each.range.start, each.location),
    )
    kept: list[Kept] = []
    end = 0  # what lies below is kept already
    for each in found:
        start = max(each.range.start, end)
        if start < each.range.end:
            kept.append(Kept(Range(start, each.range.end), each.location + start - each.range.start))
            end = each.range.end
    lost = (memory - RangeSet([reserved])) - RangeSet(each.range for each in kept)
    if lost:
        raise PlanError(f"the moves lose K1's memory at {', '.join(str(r) for r in lost)}")
    return tuple(kept)


def describe_move(move: Move) -> str:
    """One line for people."""
    if isinstance(move, Check):
        return f"check {move.range}"
    to = Range.sized(move.dst, move.size)
    if isinstance(move, Put):
        return f"put K1's first bytes at {to}"
    source = Range.sized(move.src, move.size)
    return f"exchange {to} with {source}" if isinstance(move, Exchange) else f"copy {source} to {to}"


_CONTENTS: tuple[SegmentContent, ...] = ("kernel", "initrd", "fdt", "elfcorehdr", "purgatory")


def _move_to_json(move: Move) -> dict[str, str]:
    return {"move": type(move).__name__.lower(), **{name: hex(value) for name, value in asdict(move).items()}}


def _move_from_json(raw: Any) -> Move:
    kind = {"copy": Copy, "exchange": Exchange, "put": Put, "check": Check}[
        fields.one_of(raw["move"], ("copy", "exchange", "put", "check"))
    ]
    values = {field.name: fields.number(raw[field.name]) for field in dataclasses.fields(kind)}
    if values["size"] == 0:
        raise ValueError("a move of nothing")
    return cast("Move", kind(**values))


def _services_to_json(services: Services) -> dict[str, Any]:
    return {
        "kind": services.kind,
        "console": None if services.console is None else hex(services.console),
        "opal": [hex(value) for value in services.opal],
        "rtas": [hex(value) for value in services.rtas],
        "rtas_reboot": hex(services.rtas_reboot),
        "rtas_nmi": hex(services.rtas_nmi),
    }


def _services_from_json(raw: Any) -> Services:
    return Services(
        kind=fields.one_of(raw["kind"], ("none", "papr", "opal")),
        console=None if raw["console"] is None else fields.number(raw["console"]),
        opal=fields.pair(raw["opal"]),
        rtas=fields.pair(raw["rtas"]),
        rtas_reboot=fields.number(raw["rtas_reboot"]),
        rtas_nmi=fields.number(raw["rtas_nmi"]),
    )


def _regions(raw: Any) -> tuple[Region, ...]:
    return tuple(Region(fields.text(each["name"]), fields.one_range(each["range"])) for each in fields.items(raw))


def _hazard_to_json(hazard: Hazard) -> dict[str, Any]:
    return {
        "name": hazard.name,
        "title": hazard.title,
        "verdict": hazard.verdict,
        "reason": hazard.reason,
        "ranges": [str(r) for r in hazard.ranges],
        "advice": hazard.advice,
        "source": hazard.source,
    }


def _hazard_from_json(raw: Any) -> Hazard:
    return Hazard(
        name=fields.text(raw["name"]),
        title=fields.text(raw["title"]),
        verdict=fields.one_of(raw["verdict"], HAZARD_VERDICTS),
        reason=fields.text(raw["reason"]),
        ranges=tuple(fields.ranges(raw["ranges"])),
        advice=fields.text(raw["advice"]),
        source=fields.text(raw["source"]),
    )
