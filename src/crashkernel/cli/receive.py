"""receive: the other end of http(s):// targets. Standard library only."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from crashkernel.cli.command import add_command
from crashkernel.errors import CrashkernelError, UsageError
from crashkernel.memory import format_size, parse_size
from crashkernel.report.terminal import visible

if TYPE_CHECKING:
    import ssl

    from crashkernel.target.receiver import Receiver

_DEFAULT_ADDRESS = "0.0.0.0:8790"

_EPILOG = """examples:
  openssl rand -hex 32 > token; chmod 600 token
  crashkernel receive /srv/crash --token-file token
  crashkernel receive /srv/crash --token-file token --tls-cert cert.pem --tls-key key.pem --listen [::]:8790

and on the machines that may crash, with the same token in their capture kernel:
  crashkernel capture --to https://HOST:8790/ --token-file /etc/kdump.token --ca-file /etc/kdump.pem

Any number of them may send at once; each crash gets a directory of its own. A dump has `incomplete` in its name until all of
it has arrived and was compared with its manifest. An upload that is cut, or a receiver that is killed, goes on where it was.
DIR/.crashkernel has a journal for each upload, small once its dump is saved. It lets a sender go on, or hear again that all is
well; a journal that did not change for a day may be deleted, and with an upload that was given up its directory, too.
Without --tls-cert the token and the dumps go over the network in the clear: let senders encrypt (--encrypt-to).

exit status: 0 stopped (SIGTERM, ^C), 2 usage, 3 the directory or the address cannot be had,
70 it ended and was not told to
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add receive to the parser."""
    receive = add_command(commands, "receive", "receive dumps over the network", _EPILOG)
    receive.add_argument("directory", type=Path, metavar="DIR", help="where they are stored")
    receive.add_argument("--listen", default=_DEFAULT_ADDRESS, metavar="HOST:PORT", help="(default: %(default)s)")
    receive.add_argument(
        "--token-file",
        type=Path,
        required=True,
        metavar="FILE",
        help="holds the secret that senders must know; only its owner may read it",
    )
    receive.add_argument("--tls-cert", type=Path, metavar="FILE", help="the certificate (PEM, with its chain): serve https")
    receive.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key (default: in the same file)")
    receive.add_argument("--limit", metavar="SIZE", help="refuse dumps that are larger, like 100G")
    receive.set_defaults(run=_receive)


def _receive(arguments: argparse.Namespace) -> int:
    # imported here: http.server and ssl are nothing that `load` should pay for
    from crashkernel.target.receiver import Receiver  # noqa: PLC0415
    from crashkernel.target.web import read_token  # noqa: PLC0415

    address = _address(arguments.listen)
    limit = None if arguments.limit is None else parse_size(arguments.limit)
    token = read_token(arguments.token_file)
    if arguments.token_file.stat().st_mode & 0o077:
        raise UsageError(f"others may read {arguments.token_file}", hint=f"chmod 600 {arguments.token_file}")
    tls = _tls(arguments.tls_cert, arguments.tls_key)
    receiver = Receiver(arguments.directory, address, token, tls=tls, limit=limit, log=_say)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    died: list[Exception] = []
    serving = threading.Thread(target=_serve, args=(receiver, died), daemon=True)
    serving.start()
    host, port = receiver.address
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    bounds = f", dumps of up to {format_size(limit)}" if limit is not None else ""
    _say(f"receiving into {arguments.directory} on {where}, {'https' if tls else 'http'}{bounds}")
    while serving.is_alive() and not stop.wait(1):
        pass
    receiver.stop()
    receiver.close()
    if not stop.is_set():
        why = f"{type(died[0]).__name__}: {died[0]}" if died else "without a word"
        raise CrashkernelError(f"the server ended, and nobody told it to: {why}", hint="start it again: uploads go on")
    _say("stopped; uploads on their way go on when it is started again")
    return 0


def _serve(receiver: Receiver, died: list[Exception]) -> None:
    try:
        receiver.serve()
    except Exception as error:
        died.append(error)


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {visible(text)}", flush=True, file=sys.stdout)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise UsageError(f"{text!r} is no address to listen on", hint="write HOST:PORT, like 0.0.0.0:8790 or [::]:8790")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    import ssl  # noqa: PLC0415

    if certificate is None:
        if key is not None:
            raise UsageError("--tls-key is nothing without --tls-cert")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(
            f"cannot use {certificate}: {error}", hint="both must be PEM files, the key without a passphrase"
        ) from error
    return context
