"""Executes a `LoadPlan` on the running kernel: builds the segments' bytes and hands them to `kexec_load(2)`.

The same code runs on a host and in the drill's K1. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from crashkernel.errors import EnvironmentFault, FormatError, LoadRefused, PlanError
from crashkernel.formats.elf import EM_PPC64, CoreLoad, build_core_header
from crashkernel.machine.live import PAGE_OFFSET
from crashkernel.memory import format_size
from crashkernel.placement import slaves_of
from crashkernel.placement.plan import DAMAGE_POLICIES, PLACEMENTS, DamagePolicy, LoadPlan, PlacementName, Segment
from crashkernel.placement.tree import capture_tree
from crashkernel.purgatory import purgatory_bytes

if TYPE_CHECKING:
    from crashkernel.machine import Machine
    from crashkernel.placement.image import KernelImage
    from crashkernel.quarantine import Quarantine

_SYS_KEXEC_LOAD = 268  # arch/powerpc/kernel/syscalls/syscall.tbl
_KEXEC_ON_CRASH = 1  # include/uapi/linux/kexec.h
_KEXEC_ARCH_PPC64 = EM_PPC64 << 16

STATE = Path("run/crashkernel/plan.json")
"""Where the plan of what is loaded is kept, below the root directory."""

REQUEST = Path("run/crashkernel/request.json")
"""Where what was asked for is kept, so that it can be loaded again."""


@dataclass(frozen=True, slots=True)
class Payload:
    """A segment and the bytes that go to its start; the kernel zeroes the rest."""

    segment: Segment
    data: bytes


@dataclass(frozen=True, slots=True)
class Request:
    """What a load was asked for: enough to load the same again on a machine that has changed since."""

    placement: PlacementName
    on_damage: DamagePolicy
    kernel: str  # absolute path
    initrd: str  # absolute path, "" for none
    cmdline: str  # K2's, without elfcorehdr=
    quarantine: bool  # whether what K1 could hand out of K2's memory at zero is taken out of its hands

    @classmethod
    def from_json(cls, text: str, source: str = "request") -> Request:
        """Read a request back.

        :raise FormatError: it is none.
        """
        try:
            raw = json.loads(text)
            kinds = {"quarantine": bool}
            if {name: type(value) for name, value in raw.items()} != {
                field: kinds.get(field, str) for field in cls.__dataclass_fields__
            }:
                raise ValueError("its fields are not those of a request")
            if raw["placement"] not in PLACEMENTS or raw["on_damage"] not in DAMAGE_POLICIES:
                raise ValueError("a choice is unknown")
        except (ValueError, AttributeError, RecursionError) as error:
            raise FormatError(f"not a record of a load: {error}", source=source, hint="load with your options again") from error
        return cls(**cast("dict[str, str | bool]", raw))  # type: ignore[arg-type]


def assemble(plan: LoadPlan, machine: Machine, image: KernelImage, initrd: bytes) -> tuple[Payload, ...]:
    """The bytes of every segment of `plan`.

    :raise PlanError: something outgrew the room the plan gave it, or K1 and K2 differ in byte order.
    """
    if image.byteorder != machine.byteorder:
        # K2 reads the core header in its own order (parse_crash_elf64_headers, fs/proc/vmcore.c), K1 wrote its notes in its own
        raise PlanError(
            f"K2 is {image.byteorder}-endian and K1 {machine.byteorder}-endian: no dump would be readable",
            hint="give a capture kernel of K1's byte order",
        )
    contents: dict[str, bytes] = {
        "kernel": image.bytes_to_load(in_place=plan.placement == "reserved"),
        "initrd": initrd,
        "fdt": capture_tree(machine, plan, len(initrd)).to_bytes(),
        "elfcorehdr": core_header(plan, machine),
    }
    contents["purgatory"] = purgatory_bytes(plan, machine.head, contents)  # it knows the digests of all others
    payloads = []
    for segment in plan.segments:
        data = contents[segment.content][segment.origin :]
        if segment.content == "kernel":
            data = data[: segment.range.size]  # the rest is another segment's
        if len(data) > segment.range.size:
            raise PlanError(f"the {segment.content} is {len(data)} bytes, its segment holds {segment.range.size}")
        payloads.append(Payload(segment, data))
    return tuple(payloads)


def core_header(plan: LoadPlan, machine: Machine) -> bytes:
    """The elfcorehdr: one PT_LOAD per stretch of K1's memory, whose offset is where the bytes lie at capture time."""
    return build_core_header(
        machine.byteorder,
        EM_PPC64,
        [(plan.locate(note), note.size) for note in plan.notes],
        [CoreLoad(k.range.start, k.range.size, k.location, PAGE_OFFSET + k.range.start) for k in plan.kept],
    )


class _KexecSegment(ctypes.Structure):
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("bufsz", ctypes.c_size_t),
        ("mem", ctypes.c_void_p),
        ("memsz", ctypes.c_size_t),
    )


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of a load.

    `unprotected` is in seconds: how long the kernel had no capture kernel at the most, None if it had none before. It frees the
    old one before it copies the new one in (do_kexec_load, kernel/kexec.c), and there is no other way into the region.
    """

    remembered: bool  # whether `status` and a refresh will know of it
    unprotected: float | None


def load(plan: LoadPlan, payloads: tuple[Payload, ...], request: Request, root: Path = Path("/")) -> Loaded:
    """Load into the running kernel, replacing what was loaded before, and remember plan and request.

    :raise LoadRefused: the kernel's refusal, translated.
    """
    segments = (_KexecSegment * len(payloads))()
    buffers = []  # keeps the bytes alive during the call
    for slot, payload in zip(segments, payloads, strict=True):
        buffer = ctypes.c_char_p(payload.data)
        buffers.append(buffer)
        slot.buf = ctypes.cast(buffer, ctypes.c_void_p)
        slot.bufsz = len(payload.data)
        slot.mem = payload.segment.range.start
        slot.memsz = payload.segment.range.size
    replaces = status(root).loaded
    begin = time.monotonic()
    _kexec_load(plan.segment("purgatory").range.start, segments, plan)
    seconds = time.monotonic() - begin
    remembered = [_remember(root / STATE, plan.to_json()), _remember(root / REQUEST, json.dumps(asdict(request), indent=1))]
    return Loaded(all(remembered), seconds if replaces else None)


def unload(root: Path = Path("/")) -> bool:
    """Take the capture kernel out again. False when none was loaded.

    :raise LoadRefused: the kernel's refusal, translated.
    """
    was_loaded = status(root).loaded
    _kexec_load(0, (_KexecSegment * 0)(), None)
    _forget(root / STATE)
    _forget(root / REQUEST)
    return was_loaded


def requested(root: Path = Path("/")) -> Request:
    """What the last load by crashkernel was asked for.

    :raise EnvironmentFault: there is no record of one.
    :raise FormatError: the record cannot be read.
    """
    try:
        text = (root / REQUEST).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentFault(
            f"no record of a load by crashkernel in /{REQUEST}", hint="run `crashkernel load` with your options"
        ) from error
    return Request.from_json(text, str(root / REQUEST))


def outdated(plan: LoadPlan, machine: Machine) -> tuple[str, ...]:
    """What has changed on the machine since `plan` was made for it, one line each; nothing when it still holds."""
    changes = []
    if added := machine.memory - plan.memory:
        changes.append(f"{format_size(added.total)} of memory came at {added}: it would not be in the dump")
    if gone := plan.memory - machine.memory:
        changes.append(f"{format_size(gone.total)} of memory went at {gone}: the capture would fail there")
    if machine.reserved != plan.reserved:
        changes.append(f"the reserved region is {machine.reserved or 'gone'}, K2 was planned into {plan.reserved}")
    notes = [note for note in (machine.vmcoreinfo, *(cpu.note for cpu in machine.cpus)) if note is not None]
    if new := [note for note in notes if note not in plan.notes]:
        changes.append(f"{len(new)} note buffers of CPUs are not in the dump's header: their registers would be missing")
    if (slaves := slaves_of(machine)) != plan.slaves:
        # K2 cannot boot on a CPU that its device tree does not have: seen to die before its console works
        came = ": if one that was plugged in since is the one that crashes, there is no K2" if slaves > plan.slaves else ""
        changes.append(f"{slaves + 1} CPUs are online, the handover waits for {plan.slaves + 1}{came}")
    return tuple(changes)


@dataclass(frozen=True, slots=True)
class Status:
    """What the running kernel says of its capture kernel.

    `plan` is that of our last load, None if there is no record of one. The kernel does not tell what is loaded now: after
    another tool replaced our load, `plan` is still ours.
    """

    loaded: bool
    reserved_size: int  # bytes
    plan: LoadPlan | None


def status(root: Path = Path("/")) -> Status:
    """Ask `/sys/kernel/kexec_crash_loaded` and `kexec_crash_size` (kernel/ksysfs.c).

    :raise LoadRefused: this kernel has no kexec.
    """
    sys_kernel = root / "sys/kernel"
    try:
        loaded = (sys_kernel / "kexec_crash_loaded").read_text().strip() == "1"
        size = int((sys_kernel / "kexec_crash_size").read_text())
    except OSError as error:
        raise LoadRefused(
            "this kernel has no kexec", errno=errno.ENOSYS, hint="boot one with CONFIG_KEXEC=y and CONFIG_CRASH_DUMP=y"
        ) from error
    plan = None
    if loaded:
        try:
            plan = LoadPlan.from_json((root / STATE).read_text(), source=str(root / STATE))
        except (OSError, UnicodeDecodeError, FormatError):
            plan = None  # loaded by somebody else, or before our record was lost
    return Status(loaded, size, plan)


def _kexec_load(entry: int, segments: ctypes.Array[_KexecSegment], plan: LoadPlan | None) -> None:
    if platform.machine() not in ("ppc64le", "ppc64"):
        raise LoadRefused(
            f"this is a {platform.machine()} kernel: it cannot take a POWER capture kernel",
            hint="use `crashkernel plan` or `crashkernel drill` here, `load` on the POWER host",
        )
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(
        ctypes.c_long(_SYS_KEXEC_LOAD),
        ctypes.c_ulong(entry),
        ctypes.c_ulong(len(segments)),
        ctypes.byref(segments),
        ctypes.c_ulong(_KEXEC_ON_CRASH | _KEXEC_ARCH_PPC64),
    )
    if result != 0:
        raise refusal(ctypes.get_errno(), plan, _lockdown())


def refusal(code: int, plan: LoadPlan | None, lockdown: str) -> LoadRefused:
    """The kernel's answer to `kexec_load` as a line that says what to change (kernel/kexec.c, kernel/kexec_core.c).

    `lockdown` is the active lockdown mode, "" or "none" when there is none.
    """
    region = f" {plan.reserved}" if plan else ""
    message, hint = {
        errno.EADDRNOTAVAIL: (
            f"the kernel says the plan leaves its reserved region{region}",
            "the region was shrunk or is not reserved: compare /sys/kernel/kexec_crash_size and /proc/iomem, then plan anew",
        ),
        errno.ETXTBSY: (
            f"the reserved region{region} overlaps the running kernel",
            "move it: boot with crashkernel=SIZE@OFFSET above the kernel's end, or without @OFFSET",
        ),
        errno.EBUSY: (
            "another kexec load or a crash is in progress",
            "wait for it, then try again; stop other kdump services",
        ),
        errno.EPERM: (
            (
                f"kernel lockdown ({lockdown}) forbids kexec_load",
                "a signed kernel and kexec_file_load are needed under Secure Boot",
            )
            if lockdown not in ("", "none")
            else ("kexec_load is not permitted", "run as root, and see that kernel.kexec_load_disabled is 0")
        ),
        errno.ENOMEM: ("the kernel has no memory left for the load", "free some memory and try again"),
        errno.ENOSYS: ("this kernel has no kexec_load", "boot one with CONFIG_KEXEC=y"),
        errno.EINVAL: (
            "the kernel calls the load invalid: overlapping or unaligned segments",
            "this is a bug of ours: report it with the output of `crashkernel plan --json`",
        ),
    }.get(code, (f"kexec_load failed: {os.strerror(code)}", "see the kernel's log: dmesg | tail"))
    return LoadRefused(message, errno=code, hint=hint)


def _lockdown() -> str:
    # security/lockdown/lockdown.c: "none [integrity] confidentiality", the active one in brackets
    try:
        modes = Path("/sys/kernel/security/lockdown").read_text().split()
    except OSError:
        return ""
    return next((mode.strip("[]") for mode in modes if mode.startswith("[")), "")


def _remember(path: Path, text: str) -> bool:
    """Whether the record could be kept. One that could not leaves none: an old one would speak of another load."""
    temporary = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        _forget(temporary)
        _forget(path)
        return False
    return True


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):  # what cannot be removed is a stale record at worst, and no fault of the load
        path.unlink(missing_ok=True)


def status_json(now: Status, changes: tuple[str, ...] | None, kept: Quarantine | None) -> str:
    """`Status` for scripts; what has changed since the load, None when that could not be read; and the quarantine, if any."""
    return json.dumps(
        {
            "loaded": now.loaded,
            "reserved_size": now.reserved_size,
            "outdated": None if changes is None else list(changes),
            "quarantine": None
            if kept is None
            else {
                "taken": [str(r) for r in kept.taken],
                "held": [{"range": str(piece.range), "use": piece.use} for piece in kept.held],
                "reason": kept.reason,
            },
            "plan": json.loads(now.plan.to_json()) if now.plan else None,
        },
        indent=1,
    )
