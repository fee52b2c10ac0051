"""One pass of `capture`'s filter over a vmcore, and nothing else: ``python -m crashkernel.bench.filterpass VMCORE LEVEL``.

What the bench times against makedumpfile's "Excluding unnecessary pages": a process from its start to the last page's class.
"""

from __future__ import annotations

import sys

import numpy as np

from crashkernel.capture.kernel import CrashedKernel
from crashkernel.capture.pagefilter import PageFilter
from crashkernel.capture.selection import PageClass
from crashkernel.capture.source import ElfVmcore


def main() -> None:
    """Print how many pages the level keeps and how many it drops, and what the filter doubts."""
    source = ElfVmcore(sys.argv[1])
    selection = PageFilter(CrashedKernel(source), source, int(sys.argv[2]))
    counts = np.zeros(256, np.int64)
    for chunk in selection.chunks():
        counts += np.bincount(chunk.classes, minlength=256)
    kept, absent = int(counts[PageClass.KEPT]), int(counts[PageClass.ABSENT])
    print(kept, int(counts.sum()) - kept - absent)
    for doubt in selection.doubts:
        print(doubt, file=sys.stderr)


if __name__ == "__main__":
    main()
