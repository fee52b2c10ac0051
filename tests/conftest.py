"""Makes the builders importable as `support.*`, whichever test directory is run, and settles how properties run."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# A machine that also runs twins is slow at times; an example has no deadline of its own, the test has pytest's.
settings.register_profile("crashkernel", deadline=None)
settings.load_profile("crashkernel")
