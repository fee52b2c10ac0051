"""How every command of the house presents itself."""

from __future__ import annotations

import argparse


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
