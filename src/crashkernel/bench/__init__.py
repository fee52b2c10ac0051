"""The purgatory alone: the shipped bytes on an emulated CPU, in memory that the host maps and models byte by byte.

`cpus` is what to run on, `stubs` the machine code that stands for K1 and K2, `machine` one QEMU that runs thousands of cases,
`model` what memory must hold afterwards, `cases` the generated plans, `series` runs many and tells.
"""
