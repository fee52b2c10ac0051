"""A directory on another machine, through the system's ssh; the other end needs a POSIX shell, sha256sum and sync.

A connection that is cut looks like the end of the stream to what reads it there. So nothing gets a dump's name by the session
that brings it: that one only fills `vmcore.incomplete`. Another session brings the sha256 of the entire stream as it was sent;
the other end takes the sha256 of what its disk has, and only if they are the same gives the manifest and then the dump their
names, each flushed. The manifest has the digest over pieces of the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from pathlib import Path
from typing import BinaryIO

from crashkernel.target.base import DUMP, INCOMPLETE, SLOWEST, Heartbeat, Saved, TargetFailed
from crashkernel.target.encryption import Encryption
from crashkernel.target.manifest import Manifest, manifest_name
from crashkernel.target.stream import StreamTarget

_OPTIONS = (
    "BatchMode=yes",  # there is nobody to ask
    "ServerAliveInterval=5",  # a dead network is noticed after three of these
    "ServerAliveCountMax=3",
    "ForwardAgent=no",
    "ForwardX11=no",
    "ClearAllForwardings=yes",
    "PermitLocalCommand=no",
    "RequestTTY=no",
    "ControlMaster=no",
    "ControlPath=none",  # a connection that others share outlives a session, and keeps its output open
)
_CONNECT = 15  # seconds
_SAID = "crashkernel:"
"""Before what a script of ours says at the other end: its shell may say more, from its user's start-up files."""

_MISMATCH = 65
_EXISTS = 66

# Scripts for sh -c, in one line (a csh at the other end takes no newline in quotes); their arguments are $1, $2, ...
_BEGIN = (
    'umask 077; cd -- "$1" || exit; name=$2; i=0; '
    'until mkdir -- "$name"; do [ -e "$name" ] && [ $i -lt 99 ] || exit 1; i=$((i + 1)); name=$2-$i; done 2>&1; '
    f'sync .; echo "{_SAID} $name"'
)
_PUT = (
    'umask 077; set -C; cd -- "$1" && cat >"$2.incomplete" && sync "$2.incomplete" || exit; '
    f'[ "$(sha256sum <"$2.incomplete" | cut -c1-64)" = "$3" ] || exit {_MISMATCH}; '
    f'[ ! -e "$2" ] && [ ! -h "$2" ] || exit {_EXISTS}; '
    f'mv -- "$2.incomplete" "$2" && sync . && echo "{_SAID} done"'
)
_FILL = 'umask 077; set -C; cd -- "$1" && cat >"$2" && sync "$2" && sync . && echo "' + _SAID + ' done"'
_NAME = (
    f'cd -- "$1" || exit; [ ! -e "$3" ] && [ ! -h "$3" ] || exit {_EXISTS}; '
    f'[ "$(sha256sum <"$2" | cut -c1-64)" = "$4" ] || exit {_MISMATCH}; '
    f'[ -f "$3.manifest.json" ] || exit 1; mv -- "$2" "$3" && sync . && echo "{_SAID} done"'
)


class SshTarget(StreamTarget):
    """A directory for each crash, in a directory that exists at the other end."""

    def __init__(
        self,
        host: str,
        directory: str,
        *,
        user: str | None = None,
        port: int | None = None,
        identity: Path | None = None,
        config: Path | None = None,
        stall: float,
        encryption: Encryption | None = None,
    ) -> None:
        super().__init__(f"ssh {user + '@' if user else ''}{host}{f':{port}' if port else ''}:{directory}", encryption)
        self._command = ["ssh", *(argument for option in _OPTIONS for argument in ("-o", option))]
        self._command += ["-o", f"ConnectTimeout={max(1, min(_CONNECT, int(stall)))}"]
        if config:
            self._command += ["-F", str(config)]
        if identity:
            self._command += ["-i", str(identity), "-o", "IdentitiesOnly=yes"]
        if user:
            self._command += ["-l", user]
        if port:
            self._command += ["-p", str(port)]
        self._command += ["--", host]
        self._base = directory
        self._directory = directory
        self._stall = stall
        self._whole = hashlib.sha256()
        self._ssh: subprocess.Popen[bytes] | None = None
        self._says: BinaryIO | None = None

    def begin(self, crash: str, alive: Heartbeat) -> None:
        """Make the crash's directory there.

        :raise TargetFailed: the other end cannot be reached, or has no such directory.
        """
        super().begin(crash, alive)
        name = self._run_there(_BEGIN, self._base, crash)
        self._directory = f"{self._base.rstrip('/')}/{name}"

    def _put(self, name: str, data: bytes) -> None:
        self._run_there(_PUT, self._directory, name, hashlib.sha256(data).hexdigest(), data=data)

    def _start(self) -> None:
        self._says = os.fdopen(os.memfd_create("ssh"), "w+b")
        self._ssh = subprocess.Popen(
            self._remote(_FILL, self._directory, DUMP + INCOMPLETE),
            stdin=subprocess.PIPE,
            stdout=self._says,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )

    def _send(self, data: memoryview) -> None:
        assert self._ssh is not None
        assert self._ssh.stdin is not None
        self._whole.update(data)
        try:
            while data:
                data = data[os.write(self._ssh.stdin.fileno(), data) :]
                self._alive.beat()
        except BrokenPipeError:
            self._end_of_session()
            raise

    def _finish(self, manifest: Manifest) -> Saved:
        assert self._ssh is not None
        assert self._ssh.stdin is not None
        self._ssh.stdin.close()
        self._alive.beat(allow=manifest.size / SLOWEST)
        self._end_of_session()
        patience = manifest.size / SLOWEST
        self._alive.beat(allow=patience)
        self._put(manifest_name(manifest.file), manifest.to_json().encode())
        arguments = (self._directory, DUMP + INCOMPLETE, manifest.file, self._whole.hexdigest())
        self._run_there(_NAME, *arguments, patience=patience)
        return Saved(f"{self.name.removesuffix(self._base)}{self._directory}/{manifest.file}", manifest)

    def _stop(self) -> None:
        if self._ssh and self._ssh.poll() is None:
            self._ssh.kill()
            self._ssh.wait()

    # -- the other end

    def _remote(self, script: str, *arguments: str) -> list[str]:
        return [*self._command, " ".join(["exec", *map(shlex.quote, ("sh", "-c", script, "sh", *arguments))])]

    def _run_there(self, script: str, *arguments: str, data: bytes = b"", patience: float = 0) -> str:
        """Run a script there, with `data` for its input; what it said.

        :raise TargetFailed: it could not be run, or it failed, or it did not say that it was done.
        """
        command = self._remote(script, *arguments)
        timeout = self._stall + patience
        try:
            done = subprocess.run(
                command, input=data, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise TargetFailed(self.name, f"no answer within {timeout:.0f} s") from error
        except OSError as error:
            raise TargetFailed(self.name, f"cannot run ssh: {error.strerror}") from error
        return self._answer(done.returncode, done.stdout)

    def _end_of_session(self) -> None:
        """Wait for the session that the stream goes through, and hear how it ended."""
        assert self._ssh is not None
        assert self._says is not None
        status = self._ssh.wait()
        self._says.seek(0)
        self._answer(status, self._says.read(1 << 16))

    def _answer(self, status: int, output: bytes) -> str:
        lines = output.decode("utf-8", "replace").splitlines()
        said = [line.removeprefix(_SAID).strip() for line in lines if line.startswith(_SAID)]
        if status == 0 and said:
            return said[-1]
        if status == _MISMATCH:
            raise TargetFailed(self.name, "what arrived is not what was sent")
        if status == _EXISTS:
            raise TargetFailed(self.name, "the name exists by now")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        raise TargetFailed(self.name, last or f"ssh ended with status {status}")
