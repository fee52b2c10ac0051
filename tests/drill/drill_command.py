"""How the tests call the command under test."""

import sys

COMMAND = [sys.executable, "-m", "crashkernel"]
