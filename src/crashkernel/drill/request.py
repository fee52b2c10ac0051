"""What to drill, by names alone: what a command line says, a campaign file lists, a database keeps and a worker is sent.

One vocabulary serves all four, the long options of `crashkernel drill` without their dashes in front. `options` and
`from_options` are inverse, and so are `command` and the command's own parser.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

from crashkernel.drill.budget import Share, drill_share
from crashkernel.drill.faults import parse_faults
from crashkernel.drill.saving import CODECS, DESTINATIONS, Saving
from crashkernel.drill.twin import CPUS, MACHINES, MMUS, Twin
from crashkernel.errors import EnvironmentFault, UsageError
from crashkernel.memory import align_up, parse_size
from crashkernel.placement.image import KernelImage
from crashkernel.placement.plan import DAMAGE_POLICIES, PLACEMENTS, DamagePolicy, PlacementName

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from crashkernel.drill.debian import Kernel
    from crashkernel.drill.guest import Userland

DEFAULT_KERNEL = "debian:bookworm"
BEHIND_K1 = "@k1-end"
"""At the end of a `crashkernel=`: the first MiB behind K1's image, the mail's variant of a region close to K1."""

_OWN_CPU = {"powernv9": "POWER9", "powernv10": "POWER10"}


@dataclass(frozen=True, slots=True)
class DrillRequest:
    """One drill. The kernels are specs of `crashkernel drill --kernel`; `capture_kernel` "" is the same as K1's.

    `memory` and `crashkernel` are as they were given ("2G", "512M@128M"): a command that repeats the drill says the same.
    """

    kernel: str = DEFAULT_KERNEL
    capture_kernel: str = ""
    machine: str = "pseries"
    cpu: str = "POWER9"
    mmu: str = "radix"
    smp: int = 1
    memory: str = "2G"
    crashkernel: str = "512M"
    placement: PlacementName = "zero"
    all_cpus: bool = False  # K2 starts every CPU, not only the one that crashed
    initrd: str = ""  # K2 unpacks this too: the user's own, for what it takes of K2's memory
    on_damage: DamagePolicy = "reboot"
    no_quarantine: bool = False
    capture: int | None = None  # the dump level of `crashkernel capture`; None: a raw copy of /proc/vmcore
    capture_codec: str = "zstd"
    capture_to: str = "disk"
    fault: tuple[str, ...] = ()  # words of the fault library
    seed: int = 0  # of the faults

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DrillRequest:
        """A drill of options by name, as `capture-kernel`; those that are left out have their defaults.

        What is not said of the CPU and the MMU follows from the machine and the CPU.

        :raise UsageError: an option that is none, a value that it cannot have, or options that do not go together.
        """
        request = cls.sketch(options)
        if request.capture is None and (options.keys() & {"capture-codec", "capture-to"}):
            raise UsageError("capture-codec and capture-to say how `crashkernel capture` saves", hint="add capture = LEVEL")
        _ = request.twin, request.saving, parse_faults(request)  # they have rules of their own
        return request

    @classmethod
    def sketch(cls, options: Mapping[str, Any]) -> DrillRequest:
        """The same, but each option is looked at alone: what comes out can be matched, and need not be had by any machine.

        :raise UsageError: an option that is none, or a value that no drill has.
        """
        known = {field.name.replace("_", "-"): field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise UsageError(f"{name!r} is no option of a drill", hint=f"choose of {', '.join(known)}")
        given = {known[name]: _checked(name, value) for name, value in options.items()}
        cpu = given.setdefault("cpu", _OWN_CPU.get(given.get("machine", ""), "POWER9"))
        given.setdefault("mmu", "hash" if cpu == "POWER8" else "radix")
        return cls(**given)

    def options(self) -> dict[str, Any]:
        """What differs from the defaults, by option name: values of JSON."""
        kept = {
            field.name.replace("_", "-"): value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}

    def command(self) -> list[str]:
        """The command line that drills this, from `crashkernel` on."""
        words = ["crashkernel", "drill", f"--placement={self.placement}"]
        for name, value in self.options().items():
            match value:
                case _ if name == "placement":
                    continue
                case True:
                    words.append(f"--{name}")
                case list():
                    words += [f"--{name}={each}" for each in value]
                case _:
                    words.append(f"--{name}={value}")
        return words

    @property
    def twin(self) -> Twin:
        """The machine to emulate; a region behind K1's image is still a name (`resolved`)."""
        return Twin(
            cast("Any", self.machine), self.cpu, cast("Any", self.mmu), self.smp, parse_size(self.memory), self.crashkernel
        )  # _checked has seen to both

    @property
    def saving(self) -> Saving | None:
        """How K2 saves the dump."""
        return None if self.capture is None else Saving(self.capture, self.capture_codec, cast("Any", self.capture_to))

    @property
    def share(self) -> Share:
        """What the host's ledger is asked for by this drill."""
        return drill_share(parse_size(self.memory), self.smp, saved=self.capture is not None)

    @property
    def kernels(self) -> tuple[str, str]:
        """The specs of K1 and K2."""
        return self.kernel, self.capture_kernel or self.kernel

    @property
    def title(self) -> str:
        """One line for people, without what is as always."""
        k1, k2 = self.kernels
        extras = [
            *([f"K2 {k2}"] if k2 != k1 else []),
            *(["all CPUs in K2"] if self.all_cpus else []),
            *([f"initrd {self.initrd}"] if self.initrd else []),
            *(["no quarantine"] if self.no_quarantine else []),
            *([f"{self.on_damage} on damage"] if self.on_damage != "reboot" else []),
            *([f"capture {self.capture} {self.capture_codec} to {self.capture_to}"] if self.capture is not None else []),
            *self.fault,
        ]
        return ", ".join([k1, self.twin.title, self.placement, *extras])

    def resolved(self, vmlinux: Path) -> Twin:
        """The twin with its region at an address, behind the image of K1's `vmlinux` where that was asked for.

        :raise FormatError: it is no kernel.
        """
        twin = self.twin
        if not twin.crashkernel.endswith(BEHIND_K1):
            return twin
        span = KernelImage.from_bytes(vmlinux.read_bytes(), str(vmlinux)).span
        behind = f"{twin.crashkernel.removesuffix(BEHIND_K1)}@{align_up(span, 1 << 20) >> 20}M"
        return replace(twin, crashkernel=behind)


_CHOICES: Mapping[str, Sequence[str]] = {
    "machine": MACHINES,
    "cpu": CPUS,
    "mmu": MMUS,
    "placement": PLACEMENTS,
    "on-damage": DAMAGE_POLICIES,
    "capture-codec": CODECS,
    "capture-to": DESTINATIONS,
}
_FLAGS = ("all-cpus", "no-quarantine")
_NUMBERS = {
    "smp": range(1, 2049),  # CONFIG_NR_CPUS of Debian's kernels; QEMU's powernv machines take no more either
    "seed": range(1 << 63),  # what a column of SQLite's holds
    "capture": range(32),
}
_LONGEST_NUMBER = 256  # bits that are worth showing; Python itself refuses to write some thousands
_KERNELS = ("kernel", "capture-kernel")
_SIZE = "(?:0[xX][0-9a-fA-F]+|[1-9][0-9]*)[KMGTkmgt]?"
_RANGE = f"(?:0[KMGTkmgt]?|{_SIZE})-(?:{_SIZE})?:{_SIZE}"
_RESERVATION = re.compile(f"(?:{_SIZE}|{_RANGE}(?:,{_RANGE})*)(?:@{_SIZE}|@0|{BEHIND_K1})?(?: .*)?")
"""What a kernel reads of `crashkernel=` (parse_crashkernel, kernel/crash_reserve.c), and other options of K1's behind it."""


def _checked(name: str, value: Any) -> Any:
    """The value, if the option can have it."""
    if name in _CHOICES:
        good, wanted = value in _CHOICES[name], f"one of {', '.join(_CHOICES[name])}"
    elif name in _FLAGS:
        good, wanted = isinstance(value, bool), "true or false"
    elif name in _NUMBERS:
        allowed = _NUMBERS[name]
        good = isinstance(value, int) and not isinstance(value, bool) and value in allowed
        wanted = f"a whole number from {allowed[0]} to {allowed[-1]}"
    elif name == "fault":
        good, wanted = isinstance(value, list | tuple) and all(isinstance(word, str) for word in value), "a list of words"
        value = tuple(value) if good else value
    elif name == "memory":
        good, wanted = isinstance(value, str) and _is_size(value), "a size, like 2G"
    else:
        good, wanted = isinstance(value, str) and value.isprintable() and (value != "" or name == "capture-kernel"), "a text"
    if good and name in _KERNELS and not {"*", "?"}.isdisjoint(value):
        good, wanted = False, "one kernel: * and ? are for exclude and match"
    if good and name == "crashkernel" and not _RESERVATION.fullmatch(value):
        good, wanted = False, f"what K1 can read, like 512M, 512M@128M, 512M{BEHIND_K1} or 1G-8G:512M,8G-:1G"
    if not good:
        shown = "…" if isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER else repr(value)
        raise UsageError(f"{name} = {shown}: must be {wanted}")
    return value


def _is_size(text: str) -> bool:
    try:
        return parse_size(text) > 0
    except UsageError:
        return False


@dataclass(frozen=True, slots=True)
class Supplies:
    """What a drill needs of Debian: both kernels, and the guests' programs."""

    k1: Kernel
    k2: Kernel
    userland: Userland

    @property
    def title(self) -> str:
        """The kernels, for people."""
        return self.k1.name + (f", K2 {self.k2.name}" if self.k2 != self.k1 else "")


def fetch(request: DrillRequest, progress: Callable[[str], None], *, kexec_tools: bool = False) -> Supplies:
    """Have everything at hand that a drill of this needs; the first time it is downloaded.

    :raise EnvironmentFault: something cannot be had, or QEMU is missing.
    :raise UsageError: what is asked for does not go together.
    """
    from crashkernel.drill import bigendian  # noqa: PLC0415
    from crashkernel.drill.debian import resolve_kernel  # noqa: PLC0415
    from crashkernel.drill.guest import fetch_userland  # noqa: PLC0415
    from crashkernel.drill.qemu import QEMU  # noqa: PLC0415

    if shutil.which(QEMU) is None:
        raise EnvironmentFault(f"{QEMU} is not installed", hint="apt-get install qemu-system-ppc")
    if request.initrd and not os.access(request.initrd, os.R_OK):
        raise UsageError(f"cannot read the initrd {request.initrd}", hint="give the path of an existing, readable file")
    found = {
        spec: bigendian.find_kernel() if spec == bigendian.SPEC else resolve_kernel(spec, progress=progress)
        for spec in dict.fromkeys(request.kernels)
    }
    k1, k2 = (found[spec] for spec in request.kernels)
    if k1.byteorder != k2.byteorder:
        raise UsageError(f"{k1.name} and {k2.name} are of different byte order: K2 could not read what K1 left it")
    if k1.byteorder == "little":
        capture = request.capture is not None
        return Supplies(k1, k2, fetch_userland(progress=progress, kexec_tools=kexec_tools, capture=capture))
    if request.capture is not None:
        raise UsageError(f"{k1.name} is big-endian, and Debian has no numpy for it: it saves raw copies only")
    if kexec_tools:
        raise UsageError(f"{k1.name} is big-endian, and Debian has no kexec-tools for it to be measured against")
    return Supplies(k1, k2, bigendian.find_userland())
