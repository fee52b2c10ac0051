"""The way that the task which crashed had come, by the kernel's debug symbols and drgn, which reads them.

References: 64-Bit ELF V2 ABI Specification, Power Architecture, 2.2.2 (a stack frame begins with the address of its caller's,
and 16 bytes into that is where the callee returns to); Linux `arch/powerpc/kernel/stacktrace.c`.

On x86_64 drgn unwinds the stack itself. On ppc64 it stops at the panic, and cannot read kdump-compressed dumps of 4 KiB pages;
there the chain of frames is followed here, through our own reader, and drgn only names the addresses.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crashkernel.dump.dumpfile import Dump
from crashkernel.errors import EnvironmentFault, FormatError
from crashkernel.formats.elf import EM_PPC64
from crashkernel.vmcore.kernel import PPC64_LINEAR, CrashedKernel

_MOST_FRAMES = 64
_LR_SAVE = 16  # of a caller's frame: where its callee returns to
_ANY_SYMBOL = "panic"
_INSTRUCTION = 4  # bytes; a call's return address is that of the next one


def backtrace(dump: Dump, registers: Mapping[str, int], vmlinux: Path) -> tuple[str, ...]:
    """The frames of a CPU with these registers, the innermost first, in words.

    :raise EnvironmentFault: drgn is not installed, or cannot make sense of the dump or of the symbols.
    """
    try:
        drgn = importlib.import_module("drgn")
    except ImportError as error:
        raise EnvironmentFault("a backtrace needs drgn, which is not installed", hint="pip install drgn") from error
    logging.getLogger("drgn").setLevel(logging.CRITICAL)  # it would tell about modules, for which nobody asked
    program = drgn.Program()
    try:
        program.set_core_dump(dump.name)
        _load(drgn, program, vmlinux)
        if dump.machine != EM_PPC64:
            return tuple(str(program.crashed_thread().stack_trace()).splitlines())
        places = _back_chain(CrashedKernel(dump), registers)
        frames = [frame for number, place in enumerate(places) for frame in _frames(program, place, inner=number == 0)]
        return tuple(f"#{number:<2} {frame}" for number, frame in enumerate(frames))
    except FormatError as error:
        raise EnvironmentFault(f"no backtrace: {error}") from error
    except Exception as error:  # drgn's own, of which not all have a public name
        text = "; ".join(str(error).split("\n"))
        raise EnvironmentFault(
            f"drgn: {text}", hint=f"is {vmlinux} the vmlinux, with debug symbols, of this very kernel?"
        ) from error


def _load(drgn: Any, program: Any, vmlinux: Path) -> None:
    """Load the kernel's symbols. That those of its modules are missing drgn may call an error; another kernel's it ignores."""
    with contextlib.suppress(drgn.MissingDebugInfoError):
        program.load_debug_info([str(vmlinux)])
    program.symbol(_ANY_SYMBOL)


def _back_chain(kernel: CrashedKernel, registers: Mapping[str, int]) -> Iterator[int]:
    """Where each frame is, ppc64: at first where the CPU was, then where each function was to return to."""
    yield registers["nip"]
    frame = registers["gpr1"]
    for _ in range(_MOST_FRAMES):
        try:
            caller = kernel.pointer(frame)
            if not frame < caller or caller < PPC64_LINEAR:
                return
            place = kernel.pointer(caller + _LR_SAVE)
        except FormatError:
            return  # the stack is not in the dump, or ends here
        if place < PPC64_LINEAR:
            return
        yield place
        frame = caller


def _frames(program: Any, place: int, *, inner: bool) -> list[str]:
    """A frame, and before it those of functions that were inlined into it, in the words that drgn uses for its own."""
    call = place if inner else place - _INSTRUCTION
    try:
        symbol = program.symbol(call)
        name = f"{symbol.name}+{place - symbol.address:#x}"
    except LookupError:
        name = f"{place:#x}"
    try:
        locations = program.source_location(call)
    except LookupError:
        return [name]
    return [f"{each.name() or name} ({each.filename}:{each.line}:{each.column})" for each in locations]
