"""Faults as a library: what may go wrong around a crash, each as a word of `crashkernel drill --fault` (docs/faults.md)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from crashkernel.drill.faults.base import Ending, Expects, Fault, Kind, Running, console_text
from crashkernel.drill.faults.change import CpuAdded, MemoryAdded, StuckCpu
from crashkernel.drill.faults.crash import DoubleCrash, InInterrupt, InNotifier, MemoryPressure, Nmi, OnOtherCpu, Oops
from crashkernel.drill.faults.damage import Flip, RogueDma
from crashkernel.drill.faults.k2 import DiskFailing, DiskGone, DiskSlow, K2OutOfMemory, NetworkGone
from crashkernel.errors import UsageError

if TYPE_CHECKING:
    from crashkernel.drill.request import DrillRequest

__all__ = [
    "FAULTS",
    "KINDS",
    "Ending",
    "Expects",
    "Fault",
    "Kind",
    "Running",
    "console_text",
    "fault_lines",
    "parse_fault",
    "parse_faults",
]

KINDS: Mapping[Kind, str] = {
    "change": "after the load",
    "crash": "how K1 dies",
    "damage": "when K1 is dead",
    "k2": "what K2 meets",
}

FAULTS: Mapping[str, type[Fault]] = {
    fault.name: fault
    for fault in (
        *(CpuAdded, MemoryAdded, StuckCpu),
        *(OnOtherCpu, InInterrupt, Oops, Nmi, MemoryPressure, InNotifier, DoubleCrash),
        *(Flip, RogueDma),
        *(DiskGone, DiskFailing, DiskSlow, NetworkGone, K2OutOfMemory),
    )
}
"""Every fault by its name, in the order in which they act."""

_INDENT = 28  # of what a fault does, in a list of them


def parse_fault(word: str, seed: int = 0) -> Fault:
    """The fault that a word names: `NAME` or `NAME:ARGUMENT`.

    :raise UsageError: there is none, or it does not take that argument.
    """
    name, _, argument = word.partition(":")
    if name not in FAULTS:
        raise UsageError(f"{word!r} is no fault", hint=f"choose of {', '.join(FAULTS)}")
    return FAULTS[name](argument, seed)


def parse_faults(request: DrillRequest) -> tuple[Fault, ...]:
    """The faults of a drill, in the order in which they act. Each call makes them anew: a fault lives for one drill.

    :raise UsageError: one makes no sense there, or not together with another.
    """
    faults = [parse_fault(word, request.seed) for word in request.fault]
    for kind, when in KINDS.items():
        if len(alike := [fault.word for fault in faults if fault.kind == kind]) > 1:
            raise UsageError(
                f"faults {' and '.join(alike)} are both of {when!r}: what was seen would tell of neither",
                hint="give one of them",
            )
    for fault in faults:
        fault.fit(request)
    if len(telling := [fault.word for fault in faults if fault.expects == "told"]) > 1:
        raise UsageError(
            f"faults {' and '.join(telling)} each keep a dump from being whole: what was told would be of one",
            hint="give one of them",
        )
    order = list(KINDS)
    last = next((fault for fault in faults if fault.expects == "told" and not fault.seen_in_dump), None)
    for fault in faults:
        if last is None or fault is last:
            continue
        if fault.seen_in_dump or order.index(fault.kind) > order.index(last.kind):
            raise UsageError(
                f"with fault {last.word} there is no dump, and without one nobody sees what {fault.word} did",
                hint="give one of them",
            )
    return tuple(sorted(faults, key=lambda fault: order.index(fault.kind)))


def fault_lines(width: int = 112) -> list[str]:
    """Every fault for people: its word and what it does, by the time when it acts."""
    lines = []
    for kind, when in KINDS.items():
        lines.append(f"{when}:")
        for fault in FAULTS.values():
            if fault.kind == kind:
                text = textwrap.wrap(fault.summary, width - _INDENT)
                beside = text.pop(0) if len(fault.pattern()) + 4 < _INDENT else ""
                lines.append(f"  {fault.pattern():<{_INDENT - 3}} {beside}".rstrip())
                lines += [" " * _INDENT + each for each in text]
    return lines
