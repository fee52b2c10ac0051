"""`crashkernel receive` in a process of its own, which a test may kill and start again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

TOKEN = "0123456789abcdef0123456789abcdef"


class ReceiverProcess:
    """Serves `directory` on the loopback address until it is stopped."""

    def __init__(self, directory: Path, token_file: Path, port: int = 0, *options: str) -> None:
        token_file.write_text(TOKEN)
        token_file.chmod(0o600)
        where = ("--listen", f"127.0.0.1:{port}", "--token-file", token_file)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "crashkernel", "receive", directory, *where, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        found = re.search(r" on 127\.0\.0\.1:(\d+), https?", first)
        if not found:
            self._process.kill()
            raise RuntimeError(f"no receiver: {first}{self._process.communicate()[1]}")
        self.port = int(found[1])

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """End it; its exit status and what it printed after its first line."""
        self._process.send_signal(number)
        output, _ = self._process.communicate(timeout=30)
        return self._process.returncode, output

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self.stop(signal.SIGKILL)
