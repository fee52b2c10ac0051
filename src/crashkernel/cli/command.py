"""What every command of the house does alike: it presents itself, reads the files it is given, and writes whole ones."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
from pathlib import Path

from crashkernel.errors import EnvironmentFault, UsageError


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, epilog: str = "", description: str = ""
) -> argparse.ArgumentParser:
    """A command whose one line in the list is `text`; `description`, above its own help, is the same unless given."""
    return commands.add_parser(
        name,
        help=text,
        description=description or text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def require_numpy() -> None:
    """Make ready for what stands on numpy: dumps, and saving them.

    :raise EnvironmentFault: it is not there.
    """
    if importlib.util.find_spec("numpy") is None:
        raise EnvironmentFault(
            "this command needs numpy", hint="pip install 'crashkernel[capture]', or apt install python3-numpy"
        )
    # numpy's linear algebra would start a thread for each CPU; nothing here uses it
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def read(path: Path) -> bytes:
    """A file named on the command line.

    :raise UsageError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="give the path of an existing, readable file") from error


def write_json(path: Path, record: object) -> None:
    """Write what `--json` names, whole or not at all; "-" is standard output.

    :raise UsageError: it cannot be written.
    """
    text = json.dumps(record, indent=1) + "\n"
    if str(path) == "-":
        print(text, end="")
    else:
        write(path, text, "--json")


def write(path: Path, text: str, option: str) -> None:
    """Write the file that `option` names, whole or not at all; a device or a pipe is written to, not replaced.

    :raise UsageError: it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():  # asked of the link: /dev/stdout leads to a pipe that has no name
            path.write_text(text, encoding="utf-8")
            return
        target = path.resolve()
        scratch = target.with_name(f".{target.name}-{os.getpid()}")
        try:
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(target)
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint=f"choose another {option}") from error
