"""Saving a dead kernel's memory: source → filter → codec → writer → target, and reading back what was saved.

`source` (K1's physical memory, from a vmcore) · `kernel` (K1's own view of it: virtual addresses, its log) · `selection` and
`pagefilter` (which pages a dump level keeps) · `codec` · `writer` (the formats, on many processes) · `target` (where a
dump goes, and what makes it whole) · `dumpfile` (a finished dump as a source again).

The only room of the rescue path that stands on numpy: nothing else imports it before somebody captures.
"""
