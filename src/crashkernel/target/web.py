"""A receiver (`crashkernel receive`), by HTTP or HTTPS: the dump goes in pieces of 4 MiB that are each acknowledged.

A piece that got no answer is sent again, over a new connection if need be: until the receiver has it, or nothing has got
through for the time that a network is given. The protocol is described in `target/receiver.py`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crashkernel.errors import CrashkernelError, EnvironmentFault, UsageError
from crashkernel.target.base import SLOWEST, Heartbeat, Saved, TargetFailed
from crashkernel.target.encryption import Encryption
from crashkernel.target.manifest import PIECE_SIZE, Manifest
from crashkernel.target.stream import StreamTarget

if TYPE_CHECKING:
    import ssl

_TIMEOUT = 15.0  # seconds for a connection, and for each step of an answer
_SHORTEST_TIMEOUT = 1.0
_FIRST_PAUSE = 0.1  # seconds before the second try; each further one waits twice as long
_LONGEST_PAUSE = 5.0
_LARGEST_ANSWER = 1 << 20
_SHORTEST_TOKEN = 16  # characters
_TRY_AGAIN = (400, 408, 429, 500, 502, 503, 504, 507)
"""What may be better the next time: 400 is damage on the way, a full disk may be given room."""


class WebTarget(StreamTarget):
    """A directory for each crash at a receiver."""

    def __init__(
        self,
        host: str,
        port: int | None,
        prefix: str,
        token_file: Path,
        *,
        tls: bool,
        ca_file: Path | None = None,
        stall: float,
        encryption: Encryption | None = None,
    ) -> None:
        """A receiver at host and port (default: HTTP's), which keeps crashes in its directory `prefix` ("" for its own).

        :raise UsageError: the token or the certificates cannot be read.
        :raise EnvironmentFault: this Python has no TLS.
        """
        scheme = "https" if tls else "http"
        where = f"[{host}]" if ":" in host else host
        self._url = f"{scheme}://{where}{f':{port}' if port else ''}/"
        super().__init__(self._url + prefix, encryption)
        self._host, self._port, self._prefix = host, port, prefix
        self._token = read_token(token_file)
        self._tls = _trusting(ca_file) if tls else None
        self._stall = stall
        self._stopped = threading.Event()
        self._connection: http.client.HTTPConnection | None = None
        self._upload = f"/uploads/{os.urandom(16).hex()}"
        self._piece = bytearray(PIECE_SIZE)
        self._filled = 0  # bytes in it
        self._sent = 0  # bytes that the receiver has

    def begin(self, crash: str, alive: Heartbeat) -> None:
        """Get a directory for the crash there.

        :raise TargetFailed: the receiver cannot be reached, or refuses.
        """
        super().begin(crash, alive)
        path = f"{self._prefix}/{crash}" if self._prefix else crash
        self._put_there(self._upload, json.dumps({"path": path}).encode())

    def _put(self, name: str, data: bytes) -> None:
        self._put_there(f"{self._upload}/files/{name}", data)

    def _start(self) -> None:
        pass

    def _send(self, data: memoryview) -> None:
        while data:
            some = data[: PIECE_SIZE - self._filled]
            self._piece[self._filled : self._filled + len(some)] = some
            self._filled += len(some)
            data = data[len(some) :]
            if self._filled == PIECE_SIZE:
                self._send_piece()

    def _send_piece(self) -> None:
        end = self._sent + self._filled
        answer = self._put_there(f"{self._upload}/dump/{self._sent}", memoryview(self._piece)[: self._filled])
        if answer.get("received") != end:
            raise TargetFailed(self.name, f"the receiver says that it has {answer.get('received')} bytes of {end}")
        self._sent, self._filled = end, 0

    def _finish(self, manifest: Manifest) -> Saved:
        if self._filled or not self._sent:
            self._send_piece()
        # the receiver flushes and reads back what it has stored before it answers
        answer = self._put_there(f"{self._upload}/manifest", manifest.to_json().encode(), manifest.size / SLOWEST)
        self._stop()
        try:
            return Saved(
                self._url + str(answer["saved"]), Manifest.from_json(str(answer["manifest"]), "the receiver's manifest")
            )
        except (KeyError, CrashkernelError) as error:
            raise TargetFailed(self.name, f"the receiver does not say what it saved: {error}") from error

    def _stop(self) -> None:
        self._stopped.set()
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError, AttributeError):  # it may be closed meanwhile, by the thread that uses it
                connection.sock.shutdown(socket.SHUT_RDWR)

    # -- requests

    def _put_there(self, path: str, data: bytes | memoryview, patience: float = 0) -> dict[str, Any]:
        """Make a request until it is answered; the answer.

        :raise TargetFailed: the receiver refuses, or nothing came through for as long as a network may do nothing.
        """
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        headers = {"Authorization": f"Bearer {self._token}", "Content-Digest": f"sha-256=:{digest}:"}
        deadline = time.monotonic() + self._stall + patience
        self._alive.beat(allow=patience)
        pause = _FIRST_PAUSE
        while True:
            timeout = min(_TIMEOUT + patience, max(_SHORTEST_TIMEOUT, deadline - time.monotonic()))
            try:
                status, answer = self._request(path, data, headers, timeout)
                if status in (200, 201):
                    self._alive.beat()
                    return answer
                reason = f"the receiver says: {answer.get('error') or f'status {status}'}"
                if status not in _TRY_AGAIN:
                    raise TargetFailed(self.name, reason)
            except (OSError, http.client.HTTPException) as error:
                if verdict := getattr(error, "verify_message", ""):  # ssl.SSLCertVerificationError, without ssl
                    reason = f"its certificate is not to be trusted: {verdict}"
                    raise TargetFailed(self.name, reason, hint="name who signed it: --ca-file") from error
                reason = str(getattr(error, "strerror", None) or error) or type(error).__name__
            self._disconnect()
            if time.monotonic() + pause > deadline or self._stopped.wait(pause):
                raise TargetFailed(self.name, reason)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _request(
        self, path: str, data: bytes | memoryview, headers: dict[str, str], timeout: float
    ) -> tuple[int, dict[str, Any]]:
        if self._connection is None:
            if self._tls:
                self._connection = http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._tls)
            else:
                self._connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
            self._connection.connect()
        self._connection.sock.settimeout(timeout)
        self._connection.request("PUT", path, body=data, headers={**headers, "Content-Length": str(len(data))})
        response = self._connection.getresponse()
        body = response.read(_LARGEST_ANSWER)
        if response.will_close:
            self._disconnect()
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = {}
        return response.status, answer if isinstance(answer, dict) else {}

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _trusting(ca_file: Path | None) -> ssl.SSLContext:
    try:
        import ssl  # noqa: PLC0415 - megabytes of libraries that a capture kernel without https need not have
    except ImportError as error:
        raise EnvironmentFault("this Python has no TLS", hint="its module _ssl and OpenSSL's libraries are missing") from error
    try:
        return ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"cannot read the certificates in {ca_file}: {error}", hint="a PEM file is wanted") from error


def read_token(path: Path) -> str:
    """The secret that a receiver and its senders share, from a file of its own.

    :raise UsageError: it cannot be read, or is none.
    """
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no ASCII text"
        raise UsageError(
            f"cannot read the token in {path}: {reason}", hint="name the file that has it: --token-file"
        ) from error
    if len(token) < _SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise UsageError(
            f"{path} has no token: it must be one word of {_SHORTEST_TOKEN} characters or more",
            hint=f"make one: openssl rand -hex 32 > {path}",
        )
    return token
