"""A dead kernel with the page structs of any year and free lists that lead through them: what decides what each page was."""

from itertools import pairwise

import numpy as np

from crashkernel.drill.oracle import May, Oracle
from crashkernel.formats.vmcoreinfo import VmcoreInfo
from support.pages import ERA_5_10, PageArray
from support.vmcores import MIB, SyntheticKernel

SIZE = 48 * MIB
LAYOUTS = (("radix", 0x1000, 12), ("radix", 0x1000, 21), ("radix", 0x10000, 16), ("hash", 0x1000, 24), ("hash", 0x10000, 24))
ORDERS, TYPES = 5, 3
_NR_ZONES, _ZONE, _AREA = 4096, 1024, 64  # offset in the node, size of a zone, offset of its free areas


class DeadKernel:
    """A kernel whose page structs are those of an era, with free lists that hold what they are told to hold."""

    def __init__(self, era=ERA_5_10, layout=LAYOUTS[0], arch="ppc64le"):
        mmu, page_size, shift = layout
        self.kernel = SyntheticKernel(arch, page_size, mmu, ranges=((0, SIZE),), vmemmap_shift=shift)
        self.pages = SIZE // page_size
        self.structs = PageArray(era, self.pages, self.kernel.byteorder, page_size, ORDERS)
        self.lists = {}  # (zone, order, type) -> pages
        self.info = VmcoreInfo.from_bytes((self.structs.era.vmcoreinfo(page_size, ORDERS)).encode()).lines
        self.node, _ = self.kernel.alloc(8192)
        self.put(self.node + _NR_ZONES, 2, 4)
        table, _ = self.kernel.alloc(32)
        self.put(table + 8, self.node)  # nodes 0, 2 and 3 are not there
        self.table = table

    def put(self, vaddr, value, size=8):
        self.kernel.memory.put(self.kernel.paddr(vaddr), value, size)

    def lru(self, pfn):
        return self.kernel.vmemmap + pfn * self.structs.era.size + 8

    def free(self, pfn, order, zone=1, kind=0):
        """A free block: marked, and on its list."""
        self.structs.free(pfn, order)
        self.list(pfn, order, zone, kind)

    def list(self, pfn, order, zone=1, kind=0):
        self.lists.setdefault((zone, order, kind), []).append(pfn)

    def head(self, zone, order, kind):
        return self.node + zone * _ZONE + _AREA + order * (16 * TYPES + 8) + kind * 16

    def build(self):
        """Put everything into memory; VMCOREINFO."""
        kernel = self.kernel
        for zone in range(2):
            for order in range(ORDERS):
                for kind in range(TYPES):
                    head, *nodes = self.head(zone, order, kind), *map(self.lru, self.lists.get((zone, order, kind), ()))
                    ring = [head, *nodes, head]
                    self.put(head, ring[1])
                    for at, following in pairwise(ring[1:]):
                        self.structs.put((at - kernel.vmemmap) // self.structs.era.size, 8, 8, following)
        for pfn in range(self.pages):
            kernel.memory.write(kernel.struct_paddr(pfn), self.structs.data[pfn].tobytes())
        info = {key: value for key, value in kernel.info.items() if not key.startswith("OFFSET(page.")} | self.info
        info |= {
            "SYMBOL(node_data)": f"{self.table:x}",
            "OFFSET(pglist_data.nr_zones)": str(_NR_ZONES),
            "OFFSET(zone.free_area)": str(_AREA),
            "SIZE(free_area)": str(16 * TYPES + 8),
            "OFFSET(free_area.free_list)": "0",
            "LENGTH(free_area.free_list)": str(TYPES),
            "SIZE(list_head)": "16",
            "OFFSET(list_head.next)": "0",
            "OFFSET(page.lru)": "8",
        }
        return "".join(f"{key}={value}\n" for key, value in info.items()).encode()

    def oracle(self):
        text = self.build()
        memory = np.frombuffer(self.kernel.memory.read(0, SIZE), np.uint8)
        return Oracle(memory, VmcoreInfo.from_bytes(text), self.kernel.byteorder)

    def may_be(self):
        return [May(each) for each in self.oracle().may_be().tolist()]
