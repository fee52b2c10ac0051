"""Encryption of a dump on its way, to a public key: a dump is full of secrets, and the machine that died has no key to read it.

By the program `age` (https://age-encryption.org/v1), which Debian ships for ppc64el and amd64: an audited implementation of a
small, versioned format by its author, with no configuration. A cipher of our own, or one put together from a library's parts,
would be ours to get right; a Python binding (pyrage) would have to be built for the capture kernel. It streams: memory does not
grow, and its speed (ChaCha20-Poly1305) is above that of compression. What it encrypts is a flattened stream, since its output
cannot be written at offsets.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from crashkernel.errors import EnvironmentFault, UsageError

SUFFIX = ".age"

_PREFIXES = ("age1", "ssh-ed25519 ", "ssh-rsa ")
_LONGEST = 60  # seconds to encrypt a small file
_MAX_RECIPIENTS = 1 << 20  # bytes of a recipients file


@dataclass(frozen=True, slots=True)
class Encryption:
    """To whom a dump is encrypted: public keys as `age -r` takes them, one or more."""

    recipients: tuple[str, ...]

    @classmethod
    def to(cls, text: str) -> Encryption:
        """Encryption to `text`: a public key (age1…, ssh-ed25519 …, ssh-rsa …), or a file with one a line, as for `age -R`.

        Nothing is encrypted to it at once, to see whether age takes the keys, before anything else is done.

        :raise UsageError: it is no key, and the file cannot be read or has none; or age does not take a key.
        :raise EnvironmentFault: the program `age` is missing, or cannot be run.
        """
        if shutil.which("age") is None:
            raise EnvironmentFault("the program age is missing", hint="install age, also in the capture kernel's initramfs")
        if text.startswith(_PREFIXES):
            return cls((_checked(text),))._tried()
        try:
            with Path(text).open("rb") as file:
                data = file.read(_MAX_RECIPIENTS)
        except OSError as error:
            raise UsageError(
                f"cannot encrypt to {text}: it is no public key, and no file that can be read ({error.strerror})",
                hint="give an age recipient (age1…), an ssh public key, or a file with one a line",
            ) from error
        lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
        keys = tuple(_checked(line) for line in lines if line and not line.startswith("#"))
        if not keys:
            raise UsageError(f"cannot encrypt to {text}: it has no public key", hint="put age recipients in it, one a line")
        return cls(keys)._tried()

    def _tried(self) -> Encryption:
        done = self._run(b"")
        if done.returncode:
            raise UsageError(f"cannot encrypt to {self}: {_said(done)}", hint="is the key copied as a whole?")
        return self

    def __str__(self) -> str:
        return ", ".join(self.recipients)

    def _command(self) -> list[str]:
        return ["age", "--encrypt", *(argument for key in self.recipients for argument in ("-r", key))]

    def start(self, source: int, sink: int, messages: BinaryIO) -> subprocess.Popen[bytes]:
        """Start encrypting what comes out of descriptor `source` into `sink`; `messages` gets what age has to say.

        :raise OSError: it cannot be started.
        """
        return subprocess.Popen(self._command(), stdin=source, stdout=sink, stderr=messages)

    def encrypt(self, data: bytes) -> bytes:
        """A small file, encrypted.

        :raise EnvironmentFault: age cannot be started, or fails.
        """
        done = self._run(data)
        if done.returncode:
            raise EnvironmentFault(f"cannot encrypt to {self}: {_said(done)}")
        return done.stdout

    def _run(self, data: bytes) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(self._command(), input=data, capture_output=True, timeout=_LONGEST, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EnvironmentFault(f"cannot run age: {error}") from error


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    said = os.fsdecode(done.stderr).strip().splitlines()[:1]
    return " ".join(said) or f"age ended with status {done.returncode}"


def _checked(key: str) -> str:
    if not key.startswith(_PREFIXES) or not key.isprintable():
        raise UsageError(f"{key!r} is no public key for age", hint="it begins with age1, ssh-ed25519 or ssh-rsa")
    return key
