"""What the head of a dump says of the kernel it is of; readers choose their ways by it before they have read a page."""

from __future__ import annotations

from dataclasses import dataclass

from crashkernel.errors import CrashkernelError
from crashkernel.formats.diskdump import NAME_SIZE, UTSNAME_SIZE, Utsname
from crashkernel.formats.elf import EM_PPC64, EM_X86_64
from crashkernel.vmcore.kernel import PPC64_LINEAR, CrashedKernel

MACHINES = {(EM_PPC64, "little"): "ppc64le", (EM_PPC64, "big"): "ppc64", (EM_X86_64, "little"): "x86_64"}
"""What `uname -m` calls an ELF machine of a byte order."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the dead kernel was.

    `phys_base` is x86_64's (0 elsewhere), `linear_base` the virtual address of physical address 0 in its linear mapping, None
    where that is not known; `crash_time` in seconds since 1970, 0 when it is not known.
    """

    utsname: Utsname
    phys_base: int
    linear_base: int | None
    crash_time: int

    @classmethod
    def of(cls, kernel: CrashedKernel) -> Identity:
        """Ask a dead kernel. What its memory does not say (it may be damaged) comes from VMCOREINFO and the ELF header."""
        info, source = kernel.info, kernel.source
        phys_base = info.number("phys_base") if "NUMBER(phys_base)" in info else 0
        linear_base = PPC64_LINEAR if source.machine == EM_PPC64 else source.linear_base
        return cls(_utsname(kernel), phys_base, linear_base, info.crash_time or 0)


def _utsname(kernel: CrashedKernel) -> Utsname:
    """The struct new_utsname of init_uts_ns, if it is that of this release."""
    info = kernel.info
    machine = MACHINES[kernel.source.machine, kernel.source.byteorder]
    known = Utsname(release=info.release[:NAME_SIZE], machine=machine)
    try:
        place = info.symbol("init_uts_ns") + info.offset("uts_namespace.name")
        found = Utsname.from_bytes(kernel.read(place, UTSNAME_SIZE))
    except CrashkernelError as error:
        kernel.doubt(f"the kernel's name cannot be read ({error}): the dump has its release only")
        return known
    if (found.release, found.machine) != (known.release, known.machine):
        kernel.doubt(f"the kernel calls itself {found.release} {found.machine}, VMCOREINFO and the ELF header differ")
        return known
    return found
