"""`capture`'s survey of a vmcore, and nothing else: ``python -m crashkernel.bench.filterpass VMCORE LEVEL WORKERS``.

What the bench times against makedumpfile's "Excluding unnecessary pages": a process from its start to the last page's class.
"""

from __future__ import annotations

import sys

import numpy as np

from crashkernel.bench.pagecounts import FilterPass, PageCounts
from crashkernel.capture.codec import codec_by_name
from crashkernel.capture.crew import Crew
from crashkernel.capture.pagefilter import PageFilter
from crashkernel.capture.selection import PageClass
from crashkernel.vmcore.kernel import CrashedKernel
from crashkernel.vmcore.source import ElfVmcore


def main() -> None:
    """Print how many pages the filter finds of each class, and what it doubts, as one line of JSON."""
    source = ElfVmcore(sys.argv[1])
    kernel = CrashedKernel(source)
    selection = PageFilter(kernel, source, int(sys.argv[2]))
    with Crew(source, selection, codec_by_name("none"), int(sys.argv[3]), drop_zeros=False) as crew:
        while True:
            counts = sum((block.classes for block in crew.survey()), np.zeros(256, np.int64))
            if not selection.conclude(counts):
                break
            crew.renew()
    found = PageCounts(
        kept=int(counts[PageClass.KEPT]),
        cache=int(counts[PageClass.CACHE]),
        cache_private=int(counts[PageClass.CACHE_PRIVATE]),
        user=int(counts[PageClass.USER]),
        free=int(counts[PageClass.FREE]),
        poisoned=int(counts[PageClass.POISONED]),
        offline=int(counts[PageClass.OFFLINE]),
    )
    print(FilterPass(found, tuple(dict.fromkeys((*kernel.doubts, *selection.findings.doubts())))).to_json())


if __name__ == "__main__":
    main()
