"""K1 as it lies dead: its memory, and its own view of it.

`source` (its physical memory, from an ELF vmcore) · `kernel`, `pagetable` (its virtual addresses, and where its page structs
are) · `dmesg` (its log) · `identity` (what the head of a dump says of it).
"""
