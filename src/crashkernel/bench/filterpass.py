"""`capture`'s survey of a vmcore, and nothing else: ``python -m crashkernel.bench.filterpass VMCORE LEVEL WORKERS``.

What the bench times against makedumpfile's "Excluding unnecessary pages": a process from its start to the last page's class.
"""

from __future__ import annotations

import sys

import numpy as np

from crashkernel.capture.codec import codec_by_name
from crashkernel.capture.crew import Crew
from crashkernel.capture.pagefilter import PageFilter
from crashkernel.capture.selection import PageClass
from crashkernel.vmcore.kernel import CrashedKernel
from crashkernel.vmcore.source import ElfVmcore


def main() -> None:
    """Print how many pages the level keeps and how many it drops, and what the filter doubts."""
    source = ElfVmcore(sys.argv[1])
    selection = PageFilter(CrashedKernel(source), source, int(sys.argv[2]))
    with Crew(source, selection, codec_by_name("none"), int(sys.argv[3]), drop_zeros=False) as crew:
        counts = sum((block.classes for block in crew.survey()), np.zeros(256, np.int64))
    kept, absent = int(counts[PageClass.KEPT]), int(counts[PageClass.ABSENT])
    print(kept, int(counts.sum()) - kept - absent)
    for doubt in selection.findings.doubts():
        print(doubt, file=sys.stderr)


if __name__ == "__main__":
    main()
