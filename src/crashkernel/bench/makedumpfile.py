"""makedumpfile as Debian ships it, for the benches to measure this package against. Nothing of it is part of the package.

Each release is run from an unpacked tree, through its own dynamic linker with its own libraries, so that the development
release's runs on any host. On ppc64le's dumps it is the package of that architecture, through QEMU's user-mode emulation.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crashkernel.drill.debian import Archive, Progress, default_cache, silent
from crashkernel.errors import EnvironmentFault

Architecture = Literal["amd64", "ppc64el"]

SUITES = ("bookworm", "sid")
"""Debian's releases, the newest last."""

_LINKERS: dict[Architecture, tuple[str, str, str]] = {
    # dynamic linker, directory of the libraries, emulator: of the host's own architecture it is not needed
    "amd64": ("ld-linux-x86-64.so.2", "x86_64-linux-gnu", "qemu-x86_64-static"),
    "ppc64el": ("ld64.so.2", "powerpc64le-linux-gnu", "qemu-ppc64le-static"),
}
_NOT_NEEDED = ("perl",)  # for makedumpfile-R.pl, which only reassembles flattened streams
_DEADLINE = 60.0  # seconds to say its version


@dataclass(frozen=True, slots=True)
class Makedumpfile:
    """One build of it: its `version`, and the `command` that runs it, without arguments."""

    version: str
    codecs: frozenset[str]
    command: tuple[str, ...]

    def __str__(self) -> str:
        return f"makedumpfile {self.version}"


def provide(
    suite: str, architecture: Architecture = "amd64", cache: Path | None = None, progress: Progress = silent
) -> Makedumpfile:
    """The makedumpfile of a Debian suite, unpacked the first time.

    :raise EnvironmentFault: a package cannot be had, or what is in it does not run here.
    """
    archive = Archive(cache or default_cache(), suite, progress, architecture=architecture)
    packages = ["makedumpfile"]
    for package in packages:  # grows as it is walked
        packages += [name for name in archive.depends(package) if name not in packages and name not in _NOT_NEEDED]
    tree = archive.unpack(*packages)
    command = _command(tree, architecture)
    version, codecs = _about(command)
    return Makedumpfile(version, codecs, command)


def installed() -> Makedumpfile | None:
    """The host's own, if it has one: other distributions build it with codecs that Debian leaves out."""
    path = shutil.which("makedumpfile")
    if path is None:
        return None
    version, codecs = _about((path,))
    return Makedumpfile(f"{version} ({path})", codecs, (path,))


def _command(tree: Path, architecture: Architecture) -> tuple[str, ...]:
    linker, triplet, emulator = _LINKERS[architecture]
    program = next(
        (path for place in ("usr/bin", "usr/sbin", "sbin") if (path := tree / place / "makedumpfile").is_file()), None
    )
    libraries = [path for base in ("lib", "usr/lib") if (path := tree / base / triplet).is_dir()]
    loader = next((path / linker for path in libraries if (path / linker).is_file()), None)
    if program is None or loader is None:
        raise EnvironmentFault(
            "the packages of makedumpfile hold no such program, or no dynamic linker", hint=f"unpacked in {tree}"
        )
    own = (str(loader), "--library-path", ":".join(map(str, libraries)), str(program))
    if architecture == _host_architecture():
        return own
    if shutil.which(emulator) is None:
        raise EnvironmentFault(f"{emulator} is not installed", hint="apt-get install qemu-user-static")
    return (emulator, *own)


def _host_architecture() -> str:
    try:
        result = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, timeout=_DEADLINE, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentFault(f"dpkg does not say what this host is: {error}", hint="apt-get install dpkg") from error
    return result.stdout.strip()


def _about(command: tuple[str, ...]) -> tuple[str, frozenset[str]]:
    """Version and codecs, from ``makedumpfile -v``: "makedumpfile: version 1.7.8 (...)", then lines such as "lzo enabled"."""
    try:
        said = subprocess.run(
            [*command, "-v"], capture_output=True, text=True, errors="replace", timeout=_DEADLINE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFault(f"makedumpfile does not run here: {error}") from error
    lines = said.stdout.splitlines()
    version = next((line.split()[2] for line in lines if line.startswith("makedumpfile: version ")), None)
    if version is None:
        text = (said.stderr or said.stdout).strip()
        raise EnvironmentFault(f"makedumpfile does not run here: {text.splitlines()[-1] if text else said.returncode}")
    codecs = {words[0] for line in lines if len(words := line.split()) == 2 and words[1] == "enabled"}
    return version, frozenset({"zlib", "none", *codecs})
