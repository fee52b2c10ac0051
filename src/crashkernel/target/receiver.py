"""The receiver: many senders at once store dumps below one directory, by HTTP or HTTPS.

Each request is a PUT that may be repeated: a sender that did not hear the answer asks again. All have
`Authorization: Bearer TOKEN`; ID is 32 hexadecimal digits that the sender chose at random; answers are JSON::

    PUT /uploads/ID                  {"path": "prefix/crash"}        {"path": "prefix/crash", "received": 0}
    PUT /uploads/ID/files/NAME       the file                        {}
    PUT /uploads/ID/dump/OFFSET      the next 4 MiB of the dump      {"received": bytes so far}
    PUT /uploads/ID/manifest         the manifest of what was sent   {"saved": "prefix/crash/vmcore", "manifest": "..."}

Files and pieces have `Content-Digest: sha-256=:...:` (RFC 9530). The directory is the one asked for, or, if that exists, the
first of `crash-1`, `crash-2`, ... that does not. Errors are {"error": "...", "received": ...} with a status: 400 what arrived
is not what was sent, 401 the token, 403 the path, 404 no such upload, 409 not the next piece, 413 too large, 422 the dump is
not whole, 507 the disk is full.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import hmac
import io
import json
import os
import select
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from crashkernel.errors import CrashkernelError, EnvironmentFault, FormatError
from crashkernel.memory import format_size
from crashkernel.target.manifest import PIECE_SIZE, Manifest
from crashkernel.target.uploads import Refused, Upload, Uploads

IDLE = 60.0
"""Seconds that a sender may say nothing."""

_STRANGER = 15.0
"""Seconds that somebody has for keys and a request's head who has not shown the token yet."""

_POLL = 10.0  # seconds
_SLOWEST = 32 << 10  # bytes a second, of one request's body
_MOST_CONNECTIONS = 256
_MOST_OF_ONE_ADDRESS = 64  # a sender has one; many may come through one gateway
_LARGEST_HEAD = 128 << 10  # bytes
_THROWN_AWAY = 64 << 10  # bytes at a time
_LARGEST_REQUEST = 64 << 10  # bytes, of what is no file
_LARGEST_FILE = 16 << 20  # bytes, of a log
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Receiver:
    """Serves below `directory` on `address` until it is closed."""

    def __init__(
        self,
        directory: Path,
        address: tuple[str, int],
        token: str,
        *,
        tls: ssl.SSLContext | None = None,
        limit: int | None = None,
        idle: float = IDLE,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Take the directory and the address; `limit` is a dump's in bytes. `log` is told of each upload.

        :raise EnvironmentFault: one of them cannot be had.
        """
        self.uploads = Uploads(directory, limit)
        self.token = hashlib.sha256(token.encode()).digest()
        self.idle = idle
        self.tls = tls
        self.log = log
        try:
            self._server = _Server(address, self)
        except OSError as error:
            self.uploads.close()
            host, port = address
            raise EnvironmentFault(f"cannot listen on {host}:{port}: {error.strerror or error}") from error

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens; the port is the system's choice if 0 was asked for."""
        host, port = self._server.server_address[:2]
        return str(host), port

    def serve(self) -> None:
        """Serve until `stop` is called, by another thread."""
        self._server.serve_forever(poll_interval=_POLL)

    def stop(self) -> None:
        """Make `serve` return."""
        with contextlib.suppress(OSError):
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes it; it would look only at the end of its interval
        self._server.shutdown()

    def close(self) -> None:
        """Let go of address and directory, once what has arrived is stored. Uploads can be resumed with another receiver."""
        self._server.server_close()
        self._server.end_connections(self.idle)
        self.uploads.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], receiver: Receiver) -> None:
        self.receiver = receiver
        self._room = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._callers: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without the reverse look-up of http.server, which waits for a name server."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection its thread, if there is one to be had."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        with self._lock:
            self._callers[client_address[0]] += 1
            many = self._callers[client_address[0]] > _MOST_OF_ONE_ADDRESS
        try:
            if many:
                self.shutdown_request(request)
                self._leave(client_address)
            else:
                super().process_request(request, client_address)
        except Exception:  # there is no thread to be had
            self._leave(client_address)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(client_address)

    def _leave(self, client_address: Any) -> None:
        with self._lock:
            self._callers[client_address[0]] -= 1
            if not self._callers[client_address[0]]:
                del self._callers[client_address[0]]
        self._room.release()

    def note(self, connection: socket.socket, *, here: bool) -> None:
        """A connection has come, or gone."""
        if here:
            self._connections.add(connection)
        else:
            self._connections.discard(connection)

    def end_connections(self, patience: float) -> None:
        """Cut all connections, and wait so many seconds at the most for what is being stored."""
        deadline = time.monotonic() + patience
        for _ in range(_MOST_CONNECTIONS):
            for connection in list(self._connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._room.acquire(timeout=max(0.0, deadline - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is the sender's to notice; it comes again. Anything else is ours."""
        error = sys.exc_info()[1]
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self.receiver.log(f"{client_address[0]}: {_bug(error)}")


class _Timed(io.RawIOBase):
    """What a connection says, up to a deadline: a byte now and then does not keep it open. And no more than is wanted."""

    def __init__(self, connection: socket.socket, idle: float) -> None:
        self._connection = connection
        self._idle = idle
        self._deadline = 0.0
        self._room = 0

    def allow(self, seconds: float, size: int) -> None:
        """From now on, so many seconds and bytes."""
        self._deadline = time.monotonic() + seconds
        self._room = size

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive some bytes.

        :raise TimeoutError: none come.
        :raise ConnectionError: they are too many.
        """
        if not self._room:
            raise ConnectionError
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(min(left, self._idle))
        size = self._connection.recv_into(buffer, min(len(buffer), self._room))
        self._room -= size
        return size


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "crashkernel"
    sys_version = ""
    disable_nagle_algorithm = True  # an answer waits for nothing
    wbufsize = -1  # and goes in one packet
    server: _Server
    _timed: _Timed
    _unread: bool
    _known = False  # whether this connection has shown the token

    def setup(self) -> None:
        """Agree on keys, in this connection's own thread, and put the clock on what it says."""
        receiver = self.server.receiver
        if receiver.tls:
            self.request = receiver.tls.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
        self.server.note(self.request, here=True)
        try:
            if isinstance(self.request, ssl.SSLSocket):
                _shake_hands(self.request, min(_STRANGER, receiver.idle))
                self.request.settimeout(receiver.idle)
            super().setup()
        except BaseException:  # nobody calls `finish` then
            self._let_go()
            raise
        self._timed = _Timed(self.connection, receiver.idle)
        self.rfile = io.BufferedReader(self._timed, 1 << 16)

    def finish(self) -> None:
        """End it."""
        try:
            super().finish()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Forget the connection; what is wrapped for TLS is not the socket that the server closes."""
        self.server.note(self.request, here=False)
        if isinstance(self.request, ssl.SSLSocket):
            with contextlib.suppress(OSError):
                self.request.close()

    def handle_one_request(self) -> None:
        """Give the head of a request its time."""
        patience = 2 * self.server.receiver.idle
        self._timed.allow(patience if self._known else min(_STRANGER, patience), _LARGEST_HEAD)
        super().handle_one_request()

    def do_PUT(self) -> None:
        """Answer."""
        self._unread = True
        try:
            answer, status = self._put()
        except Refused as refused:
            answer = {"error": refused.message, "received": refused.received}
            status = refused.status
        except (TimeoutError, ConnectionError, ssl.SSLError):
            self.close_connection = True
            return
        except OSError as error:
            status = 507 if error.errno in _FULL else 413 if error.errno == errno.EFBIG else 500
            answer = {"error": os.strerror(error.errno) if error.errno else str(error)}
        except CrashkernelError as error:  # what it stored itself is damaged: a journal, a manifest
            answer, status = {"error": str(error)}, 500
        except Exception as error:
            answer, status = {"error": _bug(error)}, 500
        if status >= 400:
            self.close_connection = True
            self._drain()
            if status not in (400, 404, 409):
                self.server.receiver.log(f"{self.client_address[0]}: {status}: {answer['error']}")
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _put(self) -> tuple[dict[str, Any], int]:
        scheme, _, given = self.headers.get("Authorization", "").strip().partition(" ")
        right = hmac.compare_digest(hashlib.sha256(given.strip().encode()).digest(), self.server.receiver.token)
        if scheme.lower() != "bearer" or not right:
            self._known = False
            raise Refused(401, "the token is not the receiver's")
        self._known = True
        uploads = self.server.receiver.uploads
        match self.path.split("/")[1:]:
            case ["uploads", identity]:
                return self._begin(identity), 201
            case ["uploads", identity, "files", name]:
                upload = uploads.find(identity)
                uploads.put_file(upload, name, self._checked_body(_LARGEST_FILE))
                return {}, 201
            case ["uploads", identity, "dump", offset] if offset.isascii() and offset.isdecimal() and len(offset) < 20:
                upload = uploads.find(identity)
                return {"received": uploads.put_piece(upload, int(offset), self._checked_body(PIECE_SIZE))}, 200
            case ["uploads", identity, "manifest"]:
                return self._finish(uploads.find(identity)), 201
        raise Refused(404, "there is nothing of this name")

    def _begin(self, identity: str) -> dict[str, Any]:
        try:
            path = json.loads(self._body(_LARGEST_REQUEST))["path"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise Refused(400, "an upload begins with its path") from error
        if not isinstance(path, str):
            raise Refused(400, "an upload begins with its path")
        upload = self.server.receiver.uploads.begin(identity, path)
        return {"path": upload.path, "received": upload.received}

    def _finish(self, upload: Upload) -> dict[str, Any]:
        try:
            sent = Manifest.from_json(self._body(_LARGEST_REQUEST))
        except FormatError as error:
            raise Refused(400, str(error)) from error
        known = upload.saved
        manifest = self.server.receiver.uploads.finish(upload, sent)
        place = f"{upload.path}/{manifest.file}"
        if known is None:
            contents = manifest.contents
            self.server.receiver.log(
                f"{self.client_address[0]}: saved {place}, {format_size(manifest.size)}, of {contents.release} "
                f"{contents.machine}: {contents.panic or 'no panic message'}"
            )
        return {"saved": place, "manifest": manifest.to_json()}

    def _size_of_body(self, largest: int) -> int:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal() and len(length) < 20) or "Transfer-Encoding" in self.headers:
            raise Refused(411, "a request says how long it is")
        size = int(length)
        if size > largest:
            raise Refused(413, f"{size:,} bytes are more than {largest:,}")
        return size

    def _body(self, largest: int) -> bytes:
        size = self._size_of_body(largest)
        self._unread = False
        self._timed.allow(self.server.receiver.idle + size / _SLOWEST, size)
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError
        return data

    def _drain(self) -> None:
        """Read what was not: a connection that is closed before that is reset, and its answer may be lost."""
        if self._unread:
            with contextlib.suppress(Refused, OSError):
                left = self._size_of_body(PIECE_SIZE)
                patience = self.server.receiver.idle + left / _SLOWEST
                self._timed.allow(patience if self._known else min(_STRANGER, patience), left)
                while left and (some := len(self.rfile.read(min(left, _THROWN_AWAY)))):
                    left -= some

    def _checked_body(self, largest: int) -> bytes:
        data = self._body(largest)
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        if self.headers.get("Content-Digest", "").strip() != f"sha-256=:{digest}:":
            raise Refused(400, "what arrived is not what was sent")
        return data

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        """Requests are not logged, uploads are."""


def _bug(error: Exception) -> str:
    return f"a bug of ours: {type(error).__name__}: {error}"


def _shake_hands(connection: ssl.SSLSocket, patience: float) -> None:
    """Agree on keys within so many seconds, however slowly the other end speaks.

    :raise OSError: it does not (`ssl.SSLError`, `TimeoutError`).
    """
    deadline = time.monotonic() + patience
    connection.settimeout(0)
    while True:
        try:
            connection.do_handshake()
        except ssl.SSLWantReadError:
            event = select.POLLIN
        except ssl.SSLWantWriteError:
            event = select.POLLOUT
        else:
            return
        poll = select.poll()
        poll.register(connection, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            raise TimeoutError
