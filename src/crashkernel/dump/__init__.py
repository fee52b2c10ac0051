"""A dump read back: a source of memory again, and what can be said of it.

`dumpbytes` (a file, a flattened stream or a device as bytes at offsets) · `bitmap` · `dumpfile` (a dump as a source) ·
`structure` (every fault) · `inspection`, `backtrace` (what crashed, and is it whole) · `conversion`.
"""
