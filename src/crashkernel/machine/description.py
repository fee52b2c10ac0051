"""A machine as a file that can be sent to whoever plans for it: all that planning asks, and no secret.

JSON of two parts: what the device tree says, and what only the running kernel knew. Of the tree it holds what is named here,
nothing else: no serial or part numbers, MAC addresses, seeds, partition names, keys. The command line keeps the options that
planning reads. The one piece of memory in it is K1's first 256 bytes, which are code.

`machine_from_description` reads such a file as if it were the machine: through `machine_from_tree`, and by the same rules.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

from crashkernel.errors import FormatError
from crashkernel.formats import fields
from crashkernel.formats.fdt import MAX_DEPTH, Node
from crashkernel.machine import HEAD_SIZE, PAGE_SIZES, ByteOrder, Cpu, Machine, Mmu, Pages, PageUse, Region
from crashkernel.machine.devicetree import DYNAMIC_MEMORY_NODE, machine_from_tree
from crashkernel.machine.drmem import DynamicMemory
from crashkernel.memory import Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FORMAT = 1
"""Version of the JSON form."""

CMDLINE_OPTIONS = (
    *("console", "crashkernel", "disable_radix", "fadump", "fadump_reserve_mem", "maxcpus", "mem", "nosmp", "nr_cpus"),
    "possible_cpus",
)
"""The options of K1's command line that a description keeps: they reserve memory for a dump, limit memory or CPUs, choose the
MMU or name the console."""

_MAX_CPUS = 8192  # NR_CPUS, arch/powerpc/platforms/Kconfig.cputype
_MAX_TREE = 1 << 32  # totalsize of a flattened tree is a 32-bit number

_CELLS = ("#address-cells", "#size-cells")
_ROOT = (*_CELLS, "compatible", "model", "reserved-ranges")
_CHOSEN = (
    *("ibm,architecture-vec-5", "linux,crashkernel-base", "linux,crashkernel-size", "linux,htab-base", "linux,htab-size"),
    *("linux,initrd-start", "linux,initrd-end", "linux,kernel-end", "linux,memory-limit", "stdout-path", "linux,stdout-path"),
    *("linux,tce-alloc-start", "linux,tce-alloc-end"),
)
_CPU = (
    *("device_type", "reg", "ibm,ppc-interrupt-server#s", "timebase-frequency", "altivec", "ibm,vmx", "ibm,pft-size"),
    "ibm,processor-radix-AP-encodings",
)
_RTAS = (
    *("ibm,hypertas-functions", "linux,rtas-base", "linux,rtas-entry", "rtas-size", "system-reboot", "ibm,nmi-register"),
    *("ibm,configure-kernel-dump", "ibm,lrdr-capacity"),
)
_OPAL = ("compatible", "opal-base-address", "opal-entry-address", "opal-runtime-size")
_PROPERTIES: dict[tuple[str, ...], tuple[str, ...]] = {
    (): _ROOT,
    ("chosen",): _CHOSEN,
    ("cpus",): _CELLS,
    ("rtas",): _RTAS,
    ("ibm,opal",): _OPAL,
    ("reserved-memory",): _CELLS,
}
_PROPERTIES_OF_CHILDREN: dict[tuple[str, ...], tuple[str, ...]] = {
    ("cpus",): _CPU,
    ("reserved-memory",): ("reg",),
    ("ibm,opal", "consoles"): ("compatible", "reg"),
}
_KEPT_FOR_BEING_THERE = {(), ("reserved-memory",), ("ibm,opal",), ("ibm,opal", "consoles"), ("ibm,opal", "dump")}
_TEXTS = frozenset({"device_type", "compatible", "model", "stdout-path", "linux,stdout-path", "ibm,hypertas-functions"})


def describe(machine: Machine) -> str:
    """The machine as JSON; addresses are hexadecimal strings, ranges half-open "0x0-0x10000".

    A property of the device tree is the list of its strings, or its bytes in hexadecimal, a space between words of 32 bits.
    """
    return json.dumps(
        {
            "format": FORMAT,
            "release": machine.release,
            "cmdline": " ".join(kept_options(machine.cmdline)),
            "mmu": machine.mmu,
            "byteorder": machine.byteorder,
            "page_size": machine.page_size,
            "cpus": [_cpus_to_json(run) for run in _cpu_runs(machine.cpus)],
            "vmcoreinfo": None if machine.vmcoreinfo is None else str(machine.vmcoreinfo),
            "head": machine.head.hex(),
            "kernel_end": hex(machine.kernel_end),
            "layout": [{"name": region.name, "range": str(region.range)} for region in machine.layout],
            "pages": {
                use: [str(pages.range) for pages in machine.pages if pages.use == use]
                for use in sorted({pages.use for pages in machine.pages})
            },
            "tree_size": machine.tree_size,
            "device_tree": _node_to_json(reduced_tree(machine.device_tree)),
        },
        indent=1,
    )


def machine_from_description(text: str, source: str = "description") -> Machine:
    """The machine that was described.

    Its `device_tree` is what the description keeps of it; `tree_size` is that of the whole.
    :raise FormatError: not a description, a field is missing or not what it must be, or it is no machine.
    """
    hint = "write one with `crashkernel describe --out machine.json`"
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}", source=source, hint=hint) from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise FormatError(f"not a machine description of format {FORMAT}", source=source, hint=hint)
    try:
        machine = machine_from_tree(_node_from_json(raw["device_tree"], MAX_DEPTH), source=source)
        return replace(
            machine,
            release=fields.line(raw["release"]),
            cmdline=fields.line(raw["cmdline"]),
            mmu=fields.one_of(raw["mmu"], get_args(Mmu)),
            byteorder=fields.one_of(raw["byteorder"], get_args(ByteOrder)),
            page_size=_page_size(raw["page_size"]),
            cpus=_cpus_from_json(raw["cpus"]),
            vmcoreinfo=None if raw["vmcoreinfo"] is None else fields.one_range(raw["vmcoreinfo"]),
            head=_head(raw["head"]),
            kernel_end=fields.number(raw["kernel_end"]),
            layout=_layout(raw["layout"]),
            pages=_pages(raw["pages"]),
            tree_size=fields.count(raw["tree_size"], _MAX_TREE),
        )
    except FormatError as error:
        raise FormatError(error.message, source="" if error.source else source, hint=error.hint or hint) from error
    except KeyError as error:
        raise FormatError(f"field {error} is missing", source=source, hint=hint) from error
    except (TypeError, ValueError) as error:
        raise FormatError(f"a field is not what it must be: {error}", source=source, hint=hint) from error


def kept_options(cmdline: str) -> tuple[str, ...]:
    """The options of a kernel command line that a description keeps, whole.

    Words are the kernel's: a quoted part may hold blanks, and what follows "--" is init's (next_arg, lib/cmdline.c; parse_args,
    kernel/params.c).
    """
    kept = []
    for word in re.findall(r'(?:[^\s"]|"[^"]*(?:"|$))+', cmdline):
        if word == "--":
            break
        name, _, value = word.partition("=")
        # parameq, kernel/params.c: a dash in a name is as good as an underscore
        if name.replace("-", "_") in CMDLINE_OPTIONS and re.fullmatch(r"[\w.,:@+*-]*", value, re.ASCII):
            kept.append(word)
    return tuple(kept)


def reduced_tree(root: Node) -> Node:
    """The nodes and properties that planning asks for, in the tree's order, and no others."""
    return _reduced(root, ()) or Node("")


def _reduced(node: Node, way: tuple[str, ...]) -> Node | None:
    """What is kept of a node, `way` being the names from the root down to it; None when that is nothing."""
    names = _kept_names(node, way)
    children = [kept for child in node.children if (kept := _reduced(child, (*way, child.name))) is not None]
    kept = Node(node.name, {name: node.properties[name] for name in names if name in node.properties}, tuple(children))
    if way == (DYNAMIC_MEMORY_NODE,):
        blocks = DynamicMemory.of(node).reduced(node)
        kept = Node(node.name, {**blocks.properties, **kept.properties}, kept.children)
    return kept if kept.properties or kept.children or way in _KEPT_FOR_BEING_THERE else None


def _kept_names(node: Node, way: tuple[str, ...]) -> tuple[str, ...]:
    kind = node.properties.get("device_type", b"").split(b"\0")[0]
    names = _PROPERTIES.get(way, ())
    if way[:-1] in _PROPERTIES_OF_CHILDREN and (way[0] != "cpus" or kind == b"cpu"):
        names += _PROPERTIES_OF_CHILDREN[way[:-1]]
    if len(way) == 1 and kind == b"memory":
        names += ("device_type", "reg")
    if b"hvterm1" in node.properties.get("compatible", b"").split(b"\0"):
        names += ("compatible", "reg")
    return (*names, "linux,tce-base", "linux,tce-size")


def _node_to_json(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = {"name": node.name}
    if node.properties:
        found["properties"] = {name: _property_to_json(name, value) for name, value in node.properties.items()}
    if node.children:
        found["children"] = [_node_to_json(child) for child in node.children]
    return found


def _property_to_json(name: str, value: bytes) -> list[str] | str:
    if name in _TEXTS and value.endswith(b"\0") and value.isascii():
        strings = value[:-1].decode("ascii").split("\0")
        if all(each.isprintable() for each in strings):
            return strings
    return value.hex(" ", -4)


def _node_from_json(raw: Any, levels: int) -> Node:
    if levels == 0:
        raise ValueError(f"nodes are more than {MAX_DEPTH} deep")
    node = fields.mapping(raw)
    return Node(
        fields.line(node["name"]),
        {name: _property_from_json(value) for name, value in fields.mapping(node.get("properties", {})).items()},
        tuple(_node_from_json(child, levels - 1) for child in fields.items(node.get("children", []))),
    )


def _property_from_json(value: Any) -> bytes:
    if isinstance(value, list):
        return b"".join(fields.line(each).encode("ascii") + b"\0" for each in value)
    return bytes.fromhex(fields.text(value))


def _cpu_runs(cpus: tuple[Cpu, ...]) -> Iterator[tuple[Cpu, ...]]:
    """CPUs of consecutive numbers, all online or none, whose notes have one size and lie at one distance from each other."""
    run: list[Cpu] = []
    for cpu in cpus:
        if run and not _continues(run, cpu):
            yield tuple(run)
            run = []
        run.append(cpu)
    if run:
        yield tuple(run)


def _continues(run: list[Cpu], cpu: Cpu) -> bool:
    last = run[-1]
    if (cpu.number, cpu.online) != (last.number + 1, last.online) or (cpu.note is None) != (last.note is None):
        return False
    if cpu.note is None or last.note is None:
        return True
    stride = cpu.note.start - last.note.start
    return stride > 0 and cpu.note.size == last.note.size and (len(run) == 1 or stride == _stride(run))


def _stride(run: list[Cpu] | tuple[Cpu, ...]) -> int:
    """Bytes from the first CPU's note to the second's, 0 without."""
    first, second = (cpu.note for cpu in run[:2]) if len(run) > 1 else (None, None)
    return second.start - first.start if first is not None and second is not None else 0


def _cpus_to_json(run: tuple[Cpu, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {"first": run[0].number, "count": len(run), "online": run[0].online}
    if run[0].note is not None:
        found |= {"note": str(run[0].note), "stride": hex(_stride(run))}
    return found


def _cpus_from_json(raw: Any) -> tuple[Cpu, ...]:
    cpus: list[Cpu] = []
    for run in fields.items(raw):
        first = fields.count(run["first"], _MAX_CPUS)
        count = fields.count(run["count"], _MAX_CPUS + 1 - first)
        if not count or (cpus and first <= cpus[-1].number):
            raise ValueError(f"CPU {first} and {count - 1} more are not in ascending order")
        online = fields.boolean(run["online"])
        note, stride = (fields.one_range(run["note"]), fields.number(run["stride"])) if "note" in run else (None, 0)
        if note is not None and note.end + (count - 1) * stride >= 1 << 64:
            raise ValueError(f"the note of CPU {first + count - 1} lies beyond 64 bits")
        for number in range(count):
            place = None if note is None else Range.sized(note.start + number * stride, note.size)
            cpus.append(Cpu(first + number, place, online))
    return tuple(cpus)


def _page_size(raw: Any) -> int:
    size = fields.count(raw, max(PAGE_SIZES) + 1)
    if size and size not in PAGE_SIZES:
        raise ValueError(f"{size} bytes are no page of a ppc64 kernel's")
    return size


def _head(raw: Any) -> bytes:
    head = bytes.fromhex(fields.text(raw))
    if len(head) not in (0, HEAD_SIZE):
        raise ValueError(f"K1's first bytes are {HEAD_SIZE}, not {len(head)}")
    return head


def _layout(raw: Any) -> tuple[Region, ...]:
    layout = tuple(Region(fields.line(each["name"]), fields.one_range(each["range"])) for each in fields.items(raw))
    _ascending(region.range for region in layout)
    return layout


def _pages(raw: Any) -> tuple[Pages, ...]:
    pages = []
    for word, ranges in fields.mapping(raw).items():
        use = fields.one_of(word, get_args(PageUse))
        pages += [Pages(each, use) for each in fields.ranges(ranges)]
    pages.sort(key=lambda each: each.range.start)
    _ascending(each.range for each in pages)
    return tuple(pages)


def _ascending(ranges: Iterable[Range]) -> None:
    for before, after in pairwise(ranges):
        if after.start < before.end:
            raise ValueError(f"{before} and {after} are not one behind the other")
