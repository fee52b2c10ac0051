"""Hazards of every verdict, for what draws them."""

from crashkernel.memory import Range
from crashkernel.placement.plan import Hazard

HAZARDS = (
    Hazard(
        "span", "K2's span against K1's", "safe", "K2's image takes the place of nothing but K1's own.", (Range(0, 0x300000),)
    ),
    Hazard(
        "freed-init",
        "K1's freed init pages",
        "dangerous",
        "K1 freed its init section at boot and has handed out 187 of its 256 pages again: a device may still write there.",
        (Range(0x200000, 0x300000),),
        "take these pages out of K1's hands at load time, or use --placement reserved",
        "free_initmem, arch/powerpc/mm/mem.c",
    ),
    Hazard("static-data", "DMA to K1's static data", "guarded", "No driver of this kernel maps any.", source="dma/debug.c"),
    Hazard("rma", "Reach with translation off", "impossible", "The region lies above the RMA.", advice="reserve lower"),
    Hazard("damage", "Pages K1 holds", "unknown", "/proc/kpageflags was not to be read.", advice="run as root"),
)
