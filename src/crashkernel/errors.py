"""The error tree. Who is at fault decides the class; what to do next is the hint.

::

    CrashkernelError                 everything this package raises on purpose
    ├── UsageError                   the caller asked for something that makes no sense       exit 2
    │   └── FormatError              bytes are not the format they claim to be                exit 2
    ├── EnvironmentFault             this machine lacks something, or refuses                 exit 3
    │   ├── PlanError                no placement fits this machine and these files           exit 3
    │   ├── LoadRefused              the running kernel refused the load                      exit 3
    │   ├── TargetFailed             a target did not take the dump (`capture.target`)        exit 3
    │   └── NoTargetLeft             none of them did: the dump is not saved                  exit 3
    └── VerificationError            the handover or the dump is wrong: the product failed    exit 1
        └── StageFailed              a stage of the drill did not complete                    exit 1

Anything else that escapes is a bug of ours (exit 70). The library never prints and never exits: ``crashkernel.cli`` does.
"""

from __future__ import annotations


class CrashkernelError(Exception):
    """Base of all deliberate errors: one line saying what is wrong and, in `hint`, what to do about it."""

    exit_code = 70

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(CrashkernelError):
    """The request itself is wrong: a bad option, a file that is not there."""

    exit_code = 2


class FormatError(UsageError):
    """Bytes that are not what they claim to be: says which file (`source`), which format, and where.

    `offset` is in bytes from the start of the source, or None when the fault has no place (an empty file).
    """

    def __init__(self, message: str, *, source: str = "", offset: int | None = None, hint: str = "") -> None:
        place = "" if offset is None else f" at offset {offset:#x}"
        super().__init__(f"{source + ': ' if source else ''}{message}{place}", hint=hint)
        self.source = source
        self.offset = offset


class EnvironmentFault(CrashkernelError):
    """The machine lacks something or refuses: nothing is wrong with the request."""

    exit_code = 3


class PlanError(EnvironmentFault):
    """No placement fits: the message names the ranges that collide or the bytes that are short."""


class LoadRefused(EnvironmentFault):
    """`kexec_load(2)` refused. `errno` is the kernel's answer, 0 when refused before asking it."""

    def __init__(self, message: str, *, errno: int = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class VerificationError(CrashkernelError):
    """The product failed: the machine was not handed over, or a dump does not hold what it must."""

    exit_code = 1


class StageFailed(VerificationError):
    """A stage of the drill missed its deadline or broke. `console` holds the twin's last lines."""

    def __init__(self, stage: str, message: str, *, console: tuple[str, ...] = (), hint: str = "") -> None:
        super().__init__(f"{stage}: {message}", hint=hint)
        self.stage = stage
        self.console = console
