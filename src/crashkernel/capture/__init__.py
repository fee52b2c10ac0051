"""Which pages a dump keeps, and how they are written: filter → crew → writer → a target's descriptor.

`selection` (classes of pages, dump levels) · `pagefilter` (the class of each page of a dead kernel) · `codec` · `crew` (many
processes that read and compress) · `writer` (kdump-compressed, flattened, plain ELF).
"""
