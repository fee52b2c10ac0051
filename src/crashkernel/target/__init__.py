"""Where a dump goes, and what makes it whole.

`base` (what each is) · `local`, `files`, `filestream` (a file) · `device` (a block device) · `stream` (standard output, and
what all streams share) · `ssh` · `web` (our receiver) · `saving` (the first target that takes it) · `aside` (what may hang) ·
`manifest` · `encryption`; at the other end `receiver`, `uploads` and `unpacking`. A target's module, and what it needs of the
library, is imported when there is one: the capture kernel's initramfs may lack what another's would need.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from crashkernel.errors import UsageError
from crashkernel.target.aside import Kind, kind_of
from crashkernel.target.base import DUMP, INCOMPLETE, LOG, Heartbeat, Saved, Target, TargetFailed
from crashkernel.target.local import FileTarget
from crashkernel.target.saving import STALL, Beat, NoTargetLeft, Write, save

if TYPE_CHECKING:
    from crashkernel.target.encryption import Encryption

__all__ = [
    "DUMP",
    "INCOMPLETE",
    "LOG",
    "STALL",
    "Beat",
    "Heartbeat",
    "NoTargetLeft",
    "Saved",
    "Target",
    "TargetFailed",
    "TargetOptions",
    "Write",
    "crash_name",
    "parse_target",
    "save",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """What the targets of one capture have in common."""

    encryption: Encryption | None = None
    ssh_identity: Path | None = None  # a private key (default: ssh's own)
    ssh_config: Path | None = None  # in place of the user's ssh_config(5)
    token_file: Path | None = None  # holds the receiver's token
    ca_file: Path | None = None  # who signs for an https receiver (default: the system's)
    stall: float = STALL  # seconds that a network may do nothing


def parse_target(text: str, options: TargetOptions | None = None) -> Target:
    """The target that a command line means: a path, `-`, /dev/…, ssh://[user@]host[:port]/dir, http[s]://host[:port]/prefix.

    :raise UsageError: it is none of these, or lacks an option that it needs.
    """
    options = options or TargetOptions()
    if text == "-":
        from crashkernel.target.stream import StdoutTarget  # noqa: PLC0415

        return StdoutTarget(options.encryption)
    if "://" in text:
        return _network_target(text, options)
    if not text or not text.isprintable():
        raise UsageError(f"{text!r} is no target", hint="give a directory, a file, a block device, -, ssh://… or http(s)://…")
    kind = kind_of(text)
    if kind is Kind.DEVICE or (kind is Kind.MISSING and _in_dev(text)):
        from crashkernel.target.device import DeviceTarget  # noqa: PLC0415

        return DeviceTarget(text, options.encryption)
    if options.encryption:
        from crashkernel.target.filestream import FileStreamTarget  # noqa: PLC0415

        return FileStreamTarget(text, options.encryption, kind)
    return FileTarget(text, kind)


def _network_target(text: str, options: TargetOptions) -> Target:
    from urllib.parse import unquote, urlsplit  # noqa: PLC0415

    hint = "write ssh://[user@]host[:port]/directory or http[s]://host[:port]/prefix"
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError as error:
        raise UsageError(f"{text!r} is no target: {error}", hint=hint) from error
    if url.scheme not in ("ssh", "http", "https") or not url.hostname or url.query or url.fragment or not text.isprintable():
        raise UsageError(f"{text!r} is no target", hint=hint)
    if url.password is not None:
        raise UsageError("a password in a target is read by everyone", hint="use a key for ssh, a token file for a receiver")
    path = unquote(url.path)
    if not path.isprintable() or url.hostname.startswith("-") or (url.username or "").startswith("-"):
        raise UsageError(f"{text!r} is no target", hint=hint)
    if url.scheme == "ssh":
        from crashkernel.target.ssh import SshTarget  # noqa: PLC0415

        return SshTarget(
            url.hostname,
            f".{path[2:]}" if path == "/~" or path.startswith("/~/") else path or "/",  # where a session begins: at home
            user=unquote(url.username) if url.username else None,
            port=port,
            identity=options.ssh_identity,
            config=options.ssh_config,
            stall=options.stall,
            encryption=options.encryption,
        )
    if options.token_file is None:
        raise UsageError(f"{text} wants a token", hint="name the file that has it: --token-file")
    from crashkernel.target.web import WebTarget  # noqa: PLC0415

    return WebTarget(
        url.hostname,
        port,
        path.strip("/"),
        options.token_file,
        tls=url.scheme == "https",
        ca_file=options.ca_file,
        stall=options.stall,
        encryption=options.encryption,
    )


def _in_dev(path: str) -> bool:
    """Whether it would be a device, if it were there: no file is to be made in /dev, which is memory."""
    return path.startswith("/dev/") and not path.startswith("/dev/shm/")  # noqa: S108


def crash_name(host: str, when: float) -> str:
    """The name of a crash's directory, as kdump-utils names it, but for the colons, which FAT and URLs would not take.

    `host` is an address or a name (what is unfit for a file's name becomes "_"), `when` seconds since 1970.
    """
    fit = "".join(c if c.isascii() and (c.isalnum() or c in "-._") else "_" for c in host).lstrip(".-")[:64]
    return f"{fit or 'localhost'}-{datetime.fromtimestamp(when, UTC):%Y-%m-%d-%H.%M.%S}"
