"""`python -m crashkernel`."""

import sys

from crashkernel.cli import main

sys.exit(main())
