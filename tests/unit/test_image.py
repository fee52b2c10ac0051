"""The capture kernel's image, from ELF files written here."""

import os
import struct
import threading
from itertools import pairwise
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashkernel.errors import FormatError, UsageError
from crashkernel.machine import Region
from crashkernel.memory import Range
from crashkernel.placement.image import RUN_AT_LOAD_OFFSET, KernelImage
from support.elfwriter import Part, write_elf
from support.hostile import corrupted, peak_memory, survives, truncations
from support.machines import KERNEL_BASE, vmlinux, with_sections

both_orders = pytest.mark.parametrize("byteorder", ["little", "big"])


class TestRead:
    @both_orders
    def test_the_flat_bytes(self, byteorder):
        image = KernelImage.from_bytes(vmlinux(byteorder), "vmlinux")
        assert image.byteorder == byteorder
        assert image.release == "6.1.0-49-powerpc64le"
        assert image.source == "vmlinux"
        assert image.span == 0x9000
        assert len(image.data) == 0x6000 + 0x800, "bss is not in the data"
        assert int.from_bytes(image.data[0x100:0x104], byteorder) == 0x100
        assert image.data[0x4000:0x6000] == bytes(0x2000), "the gap between two segments is zero"
        assert image.data[0x6000:] == bytes(range(256)) * 8

    @both_orders
    @pytest.mark.parametrize(("in_place", "flag"), [(True, 1), (False, 0x72756E30)])
    @pytest.mark.parametrize("built_with", [1, 0x72756E30])
    def test_run_at_load_is_set_for_the_placement(self, byteorder, in_place, flag, built_with):
        image = KernelImage.from_bytes(vmlinux(byteorder, flag=built_with))
        assert image.run_at_load == built_with
        data = image.bytes_to_load(in_place=in_place)
        order = ">" if byteorder == "big" else "<"
        assert struct.unpack_from(order + "I", data, RUN_AT_LOAD_OFFSET) == (flag,)
        assert data[:RUN_AT_LOAD_OFFSET] == image.data[:RUN_AT_LOAD_OFFSET]
        assert data[RUN_AT_LOAD_OFFSET + 4 :] == image.data[RUN_AT_LOAD_OFFSET + 4 :]
        assert len(data) == len(image.data)
        assert RUN_AT_LOAD_OFFSET == 0x5C

    @pytest.mark.parametrize(
        ("banner", "release"),
        [
            (b"Linux version 6.12.0-rc3+ (me@here) #1\n", "6.12.0-rc3+"),
            (b"%s version %s\0Linux version %s\0Linux version 7.2.13 (x)", "7.2.13"),
            (b"Linux version", "unknown"),
            (b"Linux version %s (%s)", "unknown"),
            (b"no banner at all", "unknown"),
        ],
    )
    def test_the_release(self, banner, release):
        assert KernelImage.from_bytes(vmlinux(banner=banner)).release == release

    @pytest.mark.parametrize(
        "banner", [b"Linux version 6.1\nPASS (x)", b"Linux version 6.1\x1b[2J (x)", b"Linux version 6" + bytes(200)]
    )
    def test_a_release_is_one_printable_word(self, banner):
        assert KernelImage.from_bytes(vmlinux(banner=banner)).release.isprintable()

    def test_a_banner_before_the_read_only_data_is_found_too(self):
        sections = {".rodata": KERNEL_BASE + 0x3000, ".init.text": KERNEL_BASE + 0x4000, ".data": KERNEL_BASE + 0x6000}
        assert KernelImage.from_bytes(with_sections(vmlinux(), sections)).release == "6.1.0-49-powerpc64le"

    def test_the_banner_in_the_read_only_data_is_the_kernel_s(self):
        """Another, in front of it, may be an initramfs built in."""
        blob = bytearray(vmlinux(banner=b"Linux version 1.0 (x)"))
        at = blob.index(b"Linux version 1.0") + 0x1000
        blob[at : at + 21] = b"Linux version 2.0 (x)"
        sections = {".rodata": KERNEL_BASE + 0x3000, ".init.text": KERNEL_BASE + 0x4000, ".data": KERNEL_BASE + 0x6000}
        assert KernelImage.from_bytes(bytes(blob)).release == "1.0"
        assert KernelImage.from_bytes(with_sections(bytes(blob), sections)).release == "2.0"

    def test_segments_in_any_order(self):
        text = bytearray(0x1000)
        text[0x5C:0x60] = (1).to_bytes(4, "big")
        parts = [Part(vaddr=KERNEL_BASE + 0x2000, data=b"data"), Part(vaddr=KERNEL_BASE, data=bytes(text))]
        image = KernelImage.from_bytes(write_elf("big", parts))
        assert image.span == 0x2004
        assert image.data[0x2000:] == b"data"


class TestOpen:
    """From a file, of which no more is read than is asked for."""

    def test_it_is_what_its_bytes_are(self, tmp_path):
        path = tmp_path / "vmlinux"
        path.write_bytes(vmlinux())
        found, expected = KernelImage.open(path), KernelImage.from_bytes(vmlinux())
        assert (found.source, found.release, found.span) == (str(path), expected.release, expected.span)
        assert found.data == expected.data
        assert found.bytes_to_load(in_place=True) == expected.bytes_to_load(in_place=True)

    def test_it_costs_no_memory_until_its_bytes_are_asked_for(self, tmp_path):
        path = tmp_path / "vmlinux"
        text = bytearray(32 << 20)
        text[RUN_AT_LOAD_OFFSET : RUN_AT_LOAD_OFFSET + 4] = (1).to_bytes(4, "little")
        path.write_bytes(write_elf("little", [Part(vaddr=KERNEL_BASE, data=bytes(text))]))
        images = []
        assert peak_memory(lambda _: images.append(KernelImage.open(path)), b"") < 1 << 20
        assert images[0].data == bytes(text)

    def test_a_pipe(self, tmp_path):
        path = tmp_path / "pipe"
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_bytes, args=(vmlinux(),))
        writer.start()
        assert KernelImage.open(path).data == KernelImage.from_bytes(vmlinux()).data
        writer.join()

    @pytest.mark.parametrize("name", ["nowhere", ""])
    def test_a_file_that_cannot_be_read(self, tmp_path, name):
        with pytest.raises(UsageError, match="cannot read") as caught:
            KernelImage.open(tmp_path / name)
        assert caught.value.hint
        assert caught.value.exit_code == 2

    def test_an_empty_file(self, tmp_path):
        (tmp_path / "vmlinux").touch()
        with pytest.raises(FormatError, match="not an ELF file"):
            KernelImage.open(tmp_path / "vmlinux")


class TestLayout:
    SECTIONS: ClassVar = {".text": 0, ".rodata": 0x1000, ".init.text": 0x2000, ".data": 0x4000, ".bss": 0x7000}

    def layout(self, byteorder="little", **changes):
        addresses = {name: KERNEL_BASE + at for name, at in (self.SECTIONS | changes).items() if at is not None}
        return KernelImage.from_bytes(with_sections(vmlinux(byteorder), addresses, byteorder)).layout

    @both_orders
    def test_by_the_file_s_sections(self, byteorder):
        assert self.layout(byteorder) == (
            Region("K1 text", Range(0, 0x1000)),
            Region("K1 read-only data", Range(0x1000, 0x2000)),
            Region("K1 freed init", Range(0x2000, 0x4000)),
            Region("K1 data", Range(0x4000, 0x9000)),
        )

    @pytest.mark.parametrize("name", [".rodata", ".init.text", ".data"])
    @pytest.mark.parametrize("address", [None, 0, 0x9000, 1 << 40])
    def test_none_when_they_make_no_sense(self, name, address):
        assert self.layout(**{name: address}) == ()

    def test_none_without_sections(self):
        assert KernelImage.from_bytes(vmlinux()).layout == ()

    @given(st.data())
    def test_damaged_section_headers_never_spoil_the_image(self, data):
        good = with_sections(vmlinux(), {name: KERNEL_BASE + at for name, at in self.SECTIONS.items()})
        blob = bytearray(good)
        at = data.draw(st.integers(len(vmlinux()), len(blob) - 1) | st.sampled_from((40, 41, 47, 58, 60, 61, 62, 63)))
        blob[at] = data.draw(st.integers(0, 255))
        image = KernelImage.from_bytes(bytes(blob))
        assert image.data == KernelImage.from_bytes(good).data
        for before, after in pairwise(image.layout):
            assert before.range.end == after.range.start


class TestRefused:
    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (b"", "not an ELF file"),
            (b"\x1f\x8b\x08" + bytes(100), "compressed.*uncompressed ELF vmlinux"),
            (b"\xfd7zXZ\0" + bytes(100), "compressed"),
            (b"MZ" + bytes(100), "not an ELF file"),
            (vmlinux(machine_number=62), "ELF machine 62 is not ppc64.*ppc64"),
            (vmlinux(machine_number=20), "ELF machine 20 is not ppc64"),
            (vmlinux(vaddr=0xC000000002000000), "linked at 0xc000000002000000.*relocatable"),
            (vmlinux(vaddr=0), "linked at 0x0"),
            (vmlinux(flag=0), "no __run_at_load flag.*CONFIG_RELOCATABLE=y.*"),
            (vmlinux(flag=0x306E7572), "no __run_at_load flag"),
            (write_elf("little", []), "nothing to load"),
            (write_elf("little", [Part(vaddr=KERNEL_BASE, data=bytes(0x40))]), "no __run_at_load"),
            (vmlinux(span=(1 << 30) + 1), "no kernel is that big"),
            (vmlinux()[:-1], "lacks 0x1 of its"),
            (vmlinux()[:100], "beyond the 0x64 bytes"),
        ],
        ids=lambda value: value[:20] if isinstance(value, str) else "",
    )
    def test_each_says_what_to_give_instead(self, data, says):
        with pytest.raises(FormatError, match=says) as caught:
            KernelImage.from_bytes(data, "/boot/vmlinux")
        assert caught.value.source == "/boot/vmlinux"
        assert "\n" not in str(caught.value)

    def test_every_truncation(self):
        data = vmlinux()
        assert not any(survives(KernelImage.from_bytes, cut) for cut in truncations(data, 61))

    def test_a_huge_segment_costs_no_memory(self):
        parts = [Part(vaddr=KERNEL_BASE, data=bytes(0x100)), Part(vaddr=KERNEL_BASE + (1 << 40), data=b"x")]
        assert peak_memory(KernelImage.from_bytes, write_elf("little", parts)) < 1 << 20

    @given(corrupted(vmlinux()))
    def test_corruption_is_refused_or_survived(self, data):
        survives(KernelImage.from_bytes, data)
