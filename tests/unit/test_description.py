"""A machine written down: what is in the file, what is not, and that a plan made from it is the plan of the machine."""

import json
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.cli import describe as command
from crashkernel.errors import FormatError, UsageError
from crashkernel.formats.fdt import DeviceTree, Node
from crashkernel.machine import Cpu, Machine, Pages, Region
from crashkernel.machine.description import describe, kept_options, machine_from_description, reduced_tree
from crashkernel.machine.devicetree import dynamic_memory, machine_from_tree
from crashkernel.memory import Range
from crashkernel.placement import plan_load
from crashkernel.placement.reservation import reserve
from support.bigmachine import CORES, MEMORY, THREADS, big_machine, big_tree, captured
from support.machines import (
    GIB,
    MIB,
    Block,
    drmem_node,
    initrd,
    kernel,
    machine,
    memory_node,
    small_machine,
    tree,
    u32,
    u64,
    vmlinux,
)

# What a description may change: the tree is reduced to what is asked of it, the command line to options that are.
REDUCED = {"device_tree", "cmdline"}

SECRET = b"SECRET"


def full_machine(**changes) -> Machine:
    """A machine of which every field is filled."""
    found = small_machine(**changes)
    return replace(
        found,
        layout=(Region("K1 text", Range(0, 0x100000)), Region("K1 freed init", Range(0x100000, 0x200000))),
        kernel_end=0x200000,
        pages=(Pages(Range(0, 0x200000), "kernel"), Pages(Range(0x200000, 0x210000), "free")),
    )


def same(first: Machine, second: Machine) -> None:
    for field in fields(Machine):
        if field.name not in REDUCED:
            assert getattr(first, field.name) == getattr(second, field.name), field.name


def partition() -> Machine:
    dynamic = drmem_node(16 * MIB, [Block(256 * MIB, 4), Block(320 * MIB, 1, 0), Block(336 * MIB, 1, 0x80)], 1)
    return full_machine(extra=[dynamic], initrd=Range(0x2000000, 0x2100000))


def bare_metal() -> Machine:
    serial = Node("serial@1", {"reg": u32(1), "compatible": b"ibm,opal-console-raw\0"})
    opal = {"compatible": b"ibm,opal-v3\0", "opal-base-address": u64(0x30000000), "opal-entry-address": u64(0x30000810)}
    node = Node("ibm,opal", opal | {"opal-runtime-size": u64(0x2200000)}, (Node("consoles", {}, (serial,)), Node("dump")))
    cells = {"#address-cells": u32(2), "#size-cells": u32(2)}
    named = Node("reserved-memory", cells, (Node("ibm,hbrt-code@39c00000", {"reg": u64(0x39C00000, 0x100000)}), Node("none")))
    bridge = Node("pci@1", {"linux,tce-base": u64(0x3F000000), "linux,tce-size": u32(0x400000), "serial": SECRET})
    extra = [node, named, Node("axon", {"x": SECRET}, (bridge,))]
    root = tree(platform="none", memory=[memory_node(0, 2 * GIB)], region=Range(64 * MIB, 192 * MIB), extra=extra)
    return machine(root, notes_at=0x300000)


class TestThereAndBack:
    @pytest.mark.parametrize("make", [full_machine, partition, bare_metal, lambda: machine_from_tree(tree()), captured])
    def test_every_field(self, make):
        found = make()
        text = describe(found)
        again = machine_from_description(text)
        same(again, found)
        assert describe(again) == text
        assert again.device_tree == reduced_tree(found.device_tree)

    @pytest.mark.parametrize("placement", ["zero", "reserved"])
    @pytest.mark.parametrize("make", [full_machine, partition, bare_metal, captured])
    def test_the_plan_is_the_machine_s(self, make, placement):
        found = make()
        again = machine_from_description(describe(found))
        plans = [plan_load(each, kernel(), initrd(5 * MIB), "console=hvc0", placement) for each in (found, again)]
        assert plans[0].placement == plans[1].placement
        assert plans[0].segments == plans[1].segments, "the tree's segment too, though the tree is not there"
        assert plans[0] == plans[1]

    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("flags", [0x8, 0x108, 0x88, 0x188, 0x148])
    def test_the_reservation_is_the_machine_s(self, version, flags):
        """A block that can be removed again is memory of its own, and no region reaches into it."""
        found = full_machine(
            memory=[memory_node(0, 2 * GIB)], extra=[drmem_node(256 * MIB, [Block(2 * GIB, 4, flags)], version)]
        )
        described = machine_from_description(describe(found))
        for spec in ("512M@1792M", "512M@2048M", "512M"):
            assert reserve(described, spec) == reserve(found, spec)
        reaches = reserve(described, "512M@1792M").range is not None
        assert reaches is (flags == 0x8), "else the machines above have nothing that could be lost"

    def test_a_machine_known_by_its_tree_alone(self):
        found = machine_from_description(describe(machine_from_tree(tree(bootargs="crashkernel=1G quiet"))))
        assert (found.head, found.release, found.layout, found.pages, found.kernel_end) == (b"", "", (), (), 0)
        assert found.cmdline == "crashkernel=1G"

    @pytest.mark.parametrize("size", [0, 1 << 12, 1 << 14, 1 << 16, 1 << 18])
    def test_every_page_size_a_kernel_can_have(self, size):
        """arch/powerpc/Kconfig, PPC_4K_PAGES to PPC_256K_PAGES; 0 when unknown."""
        found = replace(small_machine(), page_size=size)
        assert machine_from_description(describe(found)).page_size == size

    numbers = st.lists(st.integers(0, 8191), unique=True, max_size=40).map(sorted)

    @given(numbers, st.data())
    def test_any_cpus(self, numbers, data):
        note = st.none() | st.builds(Range.sized, st.integers(0, 1 << 40).map(lambda n: n * 8), st.sampled_from((0x188, 0x218)))
        cpus = tuple(Cpu(number, data.draw(note), data.draw(st.booleans())) for number in numbers)
        found = replace(small_machine(), cpus=cpus)
        assert machine_from_description(describe(found)).cpus == cpus

    @given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(("free", "slab", "poisoned"))), max_size=20))
    def test_any_pages(self, runs):
        pages, at = [], 0
        for size, use in runs:
            pages.append(Pages(Range.sized(at * 0x1000, size * 0x1000), use))
            at += size + size % 2
        found = replace(small_machine(), pages=tuple(pages))
        assert machine_from_description(describe(found)).pages == tuple(pages)

    def test_what_was_captured(self):
        """Debian's 6.1 under QEMU, by this package's own `describe`: the values are that kernel's."""
        found = captured()
        assert (found.platform, found.mmu, found.page_size, found.release) == (
            "pseries",
            "radix",
            0x10000,
            "6.1.0-50-powerpc64le",
        )
        assert found.memory.total == 2 * GIB
        assert found.reserved == Range.sized(512 * MIB, 512 * MIB)
        assert [region.name for region in found.layout] == ["K1 text", "K1 read-only data", "K1 freed init", "K1 data"]
        assert found.layout[-1].range.end <= found.kernel_end < found.layout[-1].range.end + found.page_size
        assert found.head[0x5C:0x60] == (0x72756E30).to_bytes(4, "little"), "__run_at_load"
        text_of_k1 = [pages for pages in found.pages if pages.range.overlaps(found.layout[0].range)]
        assert {pages.use for pages in text_of_k1} == {"kernel"}
        assert {"free", "kernel", "slab", "anonymous", "cache", "pagetable"} == {pages.use for pages in found.pages}
        init = found.layout[2].range
        assert any(pages.range.overlaps(init) and pages.use != "kernel" for pages in found.pages), "the mail's freed init pages"


class TestNoSecrets:
    """The file is made to be sent: an allow-list, held against a tree full of secrets."""

    KEPT = ("console=hvc0", "crashkernel=512M@128M", "mem=4G", "disable_radix", "nr-cpus=4", "fadump=nocma")

    def machine(self) -> Machine:
        def poisoned(node: Node) -> Node:
            properties = dict(node.properties)
            for name in ("system-id", "host-serial", "local-mac-address", "rng-seed", "kaslr-seed", "ibm,vpd", "ibm,loc-code"):
                properties[name] = SECRET
            return Node(node.name, properties | {"ibm,partition-name": SECRET}, tuple(map(poisoned, node.children)))

        ethernet = Node("l-lan@30000002", {"compatible": b"IBM,l-lan\0", "reg": u32(0x30000002)})
        words = [*self.KEPT, "rd.luks.key=SECRET", 'dyndbg="console=SECRET x"', "SECRET", "consoleSECRET=1", "--", "mem=SECRET"]
        root = tree(
            region=Range(64 * MIB, 192 * MIB),
            rtas=Range.sized(160 * MIB, 0x10000),
            bootargs=" ".join(words),
            extra=[drmem_node(256 * MIB, [Block(4 * GIB, 8)], 1), Node("SECRET", {}, (ethernet,))],
        )
        return machine(poisoned(root), notes_at=0x300000)

    def test_none_is_in_the_file(self):
        text = describe(self.machine())
        assert "SECRET" not in text
        assert SECRET.hex() not in text.replace(" ", "")
        assert machine_from_description(text).cmdline == " ".join(self.KEPT)
        for name in ("l-lan", "mac", "serial", "seed", "vpd", "partition-name"):
            assert name not in text

    def test_the_device_tree_is_one_of_known_names(self):
        """A property that joins this list is to be looked at by someone who has secrets in mind."""
        kept = {
            name
            for found in (self.machine(), bare_metal(), captured())
            for _, node in reduced_tree(found.device_tree).walk()
            for name in node.properties
        }
        assert kept <= {
            *("#address-cells", "#size-cells", "compatible", "model", "device_type", "reg", "stdout-path", "linux,stdout-path"),
            *("linux,crashkernel-base", "linux,crashkernel-size", "linux,initrd-start", "linux,initrd-end", "linux,kernel-end"),
            *("linux,memory-limit", "ibm,architecture-vec-5", "timebase-frequency", "ibm,ppc-interrupt-server#s", "ibm,vmx"),
            *("ibm,processor-radix-AP-encodings", "ibm,lmb-size", "ibm,dynamic-memory-v2", "ibm,hypertas-functions"),
            *("linux,rtas-base", "linux,rtas-entry", "rtas-size", "system-reboot", "ibm,nmi-register", "ibm,lrdr-capacity"),
            *(
                "opal-base-address",
                "opal-entry-address",
                "opal-runtime-size",
                "linux,tce-base",
                "linux,tce-size",
                "ibm,pft-size",
            ),
            *("linux,htab-base", "linux,htab-size", "altivec", "ibm,configure-kernel-dump", "reserved-ranges"),
        }

    @pytest.mark.parametrize(
        ("cmdline", "kept"),
        [
            ("", ""),
            ("root=/dev/sda1 quiet", ""),
            ("crashkernel=2G-4G:320M,4G-:512M@128M,high", "crashkernel=2G-4G:320M,4G-:512M@128M,high"),
            ("console=tty0 console=hvc0,115200n8", "console=tty0 console=hvc0,115200n8"),
            ("disable_radix=no maxcpus=1", "disable_radix=no maxcpus=1"),
            ('a="b mem=1G', ""),
            ('a="b" mem=1G', "mem=1G"),
            ('console="hvc0 key=x"', ""),
            ("console=caf\udce9", ""),
            ("mem=1G -- mem=2G", "mem=1G"),
            ("--x mem=2G", "mem=2G"),
            ("nr-cpus=2 fadump-reserve-mem=1G", "nr-cpus=2 fadump-reserve-mem=1G"),
            ("memory=1G mem", "mem"),
        ],
    )
    def test_the_command_line(self, cmdline, kept):
        assert " ".join(kept_options(cmdline)) == kept
        assert kept_options(kept) == tuple(kept.split())


class TestBig:
    """64 TiB, 1,920 CPUs."""

    def test_it_is_that_big_and_the_file_is_not(self):
        found = big_machine()
        assert found.memory.total > MEMORY * 99 // 100
        assert len(found.cpus) == CORES * THREADS == 1920
        assert dynamic_memory(found.device_tree).usable_blocks > 260_000
        text = describe(found)
        assert len(text) < 300_000
        assert text.count('"stride"') == 1
        same(machine_from_description(text), found)

    def test_either_version_of_dynamic_memory_is_described_alike(self):
        trees = [reduced_tree(big_tree(version)) for version in (1, 2)]
        assert trees[0] == trees[1]
        assert machine_from_tree(big_tree(1)).memory == big_machine().memory

    @pytest.mark.parametrize("placement", ["zero", "reserved"])
    def test_planning_takes_less_than_100_mb(self, tmp_path, placement):
        """The whole command, interpreter and a kernel file of 64 MB included. `pytest -s` shows how long it took, too."""
        (tmp_path / "machine.json").write_text(describe(big_machine()))
        with (tmp_path / "vmlinux").open("wb") as file:
            file.write(vmlinux())
            file.truncate(64 << 20)
        # Asked of the process itself: ru_maxrss a process inherits from whoever started it.
        script = f"""
import sys
from crashkernel.cli import main
assert main("plan --machine machine.json --kernel vmlinux --placement {placement}".split()) == 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")), file=sys.stderr)
"""
        started = time.monotonic()
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        elapsed = time.monotonic() - started
        assert done.returncode == 0, done.stderr
        peak = int(done.stderr.split()[-1])  # KiB
        print(f"plan --placement {placement}, 64 TiB and 1,920 CPUs: {elapsed * 1000:.0f} ms, {peak / 1024:.1f} MiB")
        assert "64.0 TiB" in done.stdout
        assert peak < 100 * 1000


def refuse(change) -> FormatError:
    raw = json.loads(describe(partition()))
    change(raw)
    with pytest.raises(FormatError) as caught:
        machine_from_description(json.dumps(raw), "machine.json")
    assert caught.value.hint
    assert "machine.json" in str(caught.value) or "device tree" in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def setting(name, value):
    return lambda raw: raw.update({name: value})


def cpus(*runs, **more):
    """(first, count) of each."""
    return setting("cpus", [{"first": first, "count": count, "online": True} | more for first, count in runs])


def with_child(**node):
    return lambda raw: raw["device_tree"]["children"].append(node)


class TestRefused:
    @pytest.mark.parametrize(
        "text", ["", "{}", "[]", "null", "9" * 5000, '{"a":' * 100_000, "NaN", '{"format": 2}', '{"format": 1}']
    )
    def test_what_is_no_description(self, text):
        with pytest.raises(FormatError, match=r"machine\.json") as caught:
            machine_from_description(text, "machine.json")
        assert "crashkernel describe" in caught.value.hint

    @pytest.mark.parametrize("name", sorted(json.loads(describe(small_machine()))))
    def test_every_field_is_needed_and_typed(self, name):
        refuse(lambda raw: raw.pop(name))
        for value in ({"a": 1}, 1.5, [1], "\ud800", None if name == "format" else True):
            refuse(setting(name, value))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (setting("mmu", "turbo"), "turbo"),
            (setting("byteorder", "middle"), "middle"),
            (setting("page_size", -1), "count"),
            (setting("page_size", 1 << 30), "count"),
            (setting("page_size", 3), "no page of a ppc64 kernel's"),
            (setting("page_size", 0x2000), "no page of a ppc64 kernel's"),
            (setting("page_size", 1 << 18 | 1), "count"),
            (setting("tree_size", 1 << 32), "count"),
            (setting("head", "00" * 255), "255"),
            (setting("head", "zz"), "hexadecimal"),
            (setting("kernel_end", "0x1ffffffffffffffff"), "64-bit"),
            (setting("vmcoreinfo", "0x5-0x5"), "not a range"),
            (setting("vmcoreinfo", "0x0"), "not what it must be"),
            (setting("release", "6.1\x1b[2J"), "printable"),
            (setting("cmdline", "a\nb"), "printable"),
            (cpus((0, 8193)), "count"),
            (cpus((0, 1 << 40)), "count"),
            (cpus((8192, 1)), "count"),
            (cpus((0, 0)), "ascending"),
            (cpus((1, 2), (2, 1)), "ascending"),
            (
                setting("cpus", [{"first": 0, "count": 2, "online": True, "note": "0x0-0x8", "stride": "0x" + "f" * 16}]),
                "beyond",
            ),
            (setting("layout", [{"name": "a", "range": "0x0-0x2"}, {"name": "b", "range": "0x1-0x3"}]), "one behind the other"),
            (setting("pages", {"free": ["0x0-0x2"], "slab": ["0x1-0x3"]}), "one behind the other"),
            (setting("pages", {"mine": ["0x0-0x2"]}), "mine"),
            (setting("device_tree", {"name": ""}), "not a PowerNV or PAPR machine"),
            (setting("device_tree", {"name": "x"}), "PAPR"),
            (lambda raw: raw["device_tree"]["properties"].update({"#size-cells": "00000009"}), "#size-cells 9"),
            (lambda raw: raw["device_tree"]["properties"].update({"reg": "0g"}), "hexadecimal"),
            (with_child(name="a/b"), "no name for a node"),
            (with_child(name="é"), "no name"),
            (with_child(name="a", properties={"b" * 300: ""}), "no name for a property"),
        ],
    )
    def test_each_says_what(self, change, says):
        assert says in str(refuse(change))

    def test_nodes_too_deep(self):
        def deepen(raw):
            node = raw["device_tree"]
            for _ in range(80):
                node.setdefault("children", []).append({"name": "x"})
                node = node["children"][-1]

        assert "64 deep" in str(refuse(deepen))


class TestCommand:
    @pytest.fixture
    def blob(self, tmp_path):
        path = tmp_path / "host.dtb"
        path.write_bytes(DeviceTree(tree(region=Range(64 * MIB, 192 * MIB))).to_bytes())
        return path

    def run(self, *arguments) -> int:
        import argparse

        parser = argparse.ArgumentParser()
        command.add_commands(parser.add_subparsers())
        parsed = parser.parse_args(["describe", *map(str, arguments)])
        return parsed.run(parsed)

    def test_to_standard_output(self, blob, capsys):
        assert self.run("--machine", blob) == 0
        assert machine_from_description(capsys.readouterr().out).reserved == Range(64 * MIB, 192 * MIB)

    def test_to_a_file(self, blob, tmp_path, capsys):
        out = tmp_path / "machine.json"
        out.write_text("old")
        assert self.run("--machine", blob, "--out", out) == 0
        assert machine_from_description(out.read_text()).memory.total == 2 * GIB
        assert str(out) in capsys.readouterr().out
        assert {path.name for path in tmp_path.iterdir()} == {"host.dtb", "machine.json"}, "nothing temporary is left"
        assert out.stat().st_mode & 0o400

    def test_a_link_is_followed_and_a_pipe_written_to(self, blob, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "target")
        assert self.run("--machine", blob, "--out", tmp_path / "link") == 0
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_text().startswith("{")
        assert self.run("--machine", blob, "--out", "/dev/null") == 0

    def test_a_write_that_fails_leaves_the_old_file(self, blob, tmp_path, monkeypatch):
        out = tmp_path / "machine.json"
        out.write_text("old")
        monkeypatch.setattr(type(out), "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UsageError, match="No space left"):
            self.run("--machine", blob, "--out", out)
        assert out.read_text() == "old"
        assert {path.name for path in tmp_path.iterdir()} == {"host.dtb", "machine.json"}

    @pytest.mark.parametrize("options", [("--machine", "/nowhere.dtb"), ("--out", "/nowhere/machine.json")])
    def test_files_that_are_not_there(self, blob, options):
        arguments = options if options[0] == "--machine" else ("--machine", blob, *options)
        with pytest.raises(UsageError, match="/nowhere"):
            self.run(*arguments)

    def test_the_help_says_what_is_in_it_and_what_is_not(self, capsys):
        with pytest.raises(SystemExit):
            self.run("--help")
        said = capsys.readouterr().out
        assert "not in the file" in said
        assert all(option in said for option in command.CMDLINE_OPTIONS)
