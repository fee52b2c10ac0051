"""A real sshd on the loopback address, for the user that runs the tests, with a key and a configuration of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin")


@dataclass(frozen=True)
class Sshd:
    port: int
    user: str
    config: Path  # for the client
    identity: Path

    def url(self, directory: Path | str, port: int | None = None) -> str:
        return f"ssh://{self.user}@127.0.0.1:{port or self.port}{directory}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def sshd(home: Path) -> Iterator[Sshd]:
    assert SSHD is not None
    port, user = free_port(), getpass.getuser()
    for name in ("host", "identity"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / name], check=True)
    (home / "authorized").write_text((home / "identity.pub").read_text())
    server = home / "sshd_config"
    server.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nAuthorizedKeysFile {home}/authorized\nPidFile none\n"
        "KexAlgorithms curve25519-sha256\n"  # the fastest: tests make many connections
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\n"
    )
    # by any port, since tests put a proxy in between
    (home / "known").write_text("* " + " ".join((home / "host.pub").read_text().split()[:2]) + "\n")
    config = home / "ssh_config"
    config.write_text(f"UserKnownHostsFile {home}/known\nGlobalKnownHostsFile none\nStrictHostKeyChecking yes\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's privilege separation wants it
    log = (home / "log").open("wb")
    server_process = subprocess.Popen([SSHD, "-D", "-e", "-f", server], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if server_process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"sshd does not start: {(home / 'log').read_text()}")
            time.sleep(0.02)
        yield Sshd(port, user, config, home / "identity")
    finally:
        server_process.terminate()
        server_process.wait()
        log.close()
