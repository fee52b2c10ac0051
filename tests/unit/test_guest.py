"""The guests' root file systems, made of small trees and read back."""

import gzip
import importlib.util
import lzma
import marshal
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from crashkernel.drill import guest
from crashkernel.drill.debian import Kernel
from crashkernel.drill.guest import (
    NONCE_SIZE,
    Userland,
    build_capture_image,
    build_crash_image,
    compile_module,
    read_module,
    resolve_modules,
)
from crashkernel.errors import EnvironmentFault, UsageError
from crashkernel.formats import cpio

NONCE = bytes(range(NONCE_SIZE))
LIBRARIES = "usr/lib/powerpc64le-linux-gnu"
STDLIB = "usr/lib/python3.11"


def module(*depends: str) -> bytes:
    return b"\x7fELF..\0license=GPL\0depends=" + ",".join(depends).encode() + b"\0name=x\0"


def write(path: Path, data: bytes = b"", mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """Debian 6.1's virtio: everything a module."""
    modules = tmp_path / "modules" / "6.1"
    drivers = modules / "kernel" / "drivers"
    write(modules / "modules.builtin", b"kernel/drivers/char/hw_random/rng-core.ko\n")
    write(drivers / "virtio" / "virtio.ko", module())
    write(drivers / "virtio" / "virtio_ring.ko", module("virtio"))
    write(drivers / "virtio" / "virtio_pci.ko.xz", lzma.compress(module("virtio_ring", "virtio", "virtio-pci-modern-dev")))
    write(drivers / "virtio" / "virtio_pci_modern_dev.ko", module())
    write(drivers / "char" / "virtio_console.ko.gz", gzip.compress(module("virtio_ring", "rng-core")))
    write(drivers / "block" / "virtio_blk.ko", module("virtio", "virtio_ring"))
    return Kernel("test", "6.1", write(tmp_path / "vmlinux", b"K1 kernel"), modules)


@pytest.fixture
def capture_kernel(tmp_path: Path) -> Kernel:
    return Kernel("test", "7.2", write(tmp_path / "vmlinux-k2", b"K2 kernel"), tmp_path / "nowhere" / "7.2")


@pytest.fixture
def userland(tmp_path: Path) -> Userland:
    tree = tmp_path / "python"
    write(tree / "usr/bin/python3.11", b"interpreter", 0o755)
    write(tree / "lib/powerpc64le-linux-gnu/ld64.so.2", b"linker", 0o755)
    (tree / "lib64").mkdir()
    (tree / "lib64/ld64.so.2").symlink_to("/lib/powerpc64le-linux-gnu/ld64.so.2")
    write(tree / "lib/powerpc64le-linux-gnu/libc.so.6", b"libc", 0o755)
    write(tree / LIBRARIES / "libffi.so.8.1.2", b"ffi")
    (tree / LIBRARIES / "libffi.so.8").symlink_to("libffi.so.8.1.2")
    write(tree / LIBRARIES / "gconv/IBM880.so")
    write(tree / "usr/share/doc/libc6/copyright")
    write(tree / STDLIB / "json/decoder.py", b"x = 1\n")
    write(tree / STDLIB / "encodings/utf_8.py")
    write(tree / STDLIB / "encodings/cp037.py")
    write(tree / STDLIB / "unittest/case.py")
    write(tree / STDLIB / "test/bad.py", b"(")
    write(tree / STDLIB / "broken.py", b"(")
    write(tree / STDLIB / "lib-dynload/_ctypes.cpython-311-powerpc64le-linux-gnu.so")
    write(tree / STDLIB / "lib-dynload/_ssl.cpython-311-powerpc64le-linux-gnu.so")
    kexec = tmp_path / "kexec"
    write(kexec / "sbin/kexec", b"kexec", 0o755)
    return Userland(write(tmp_path / "busybox", b"busybox", 0o755), tree, kexec)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    root = tmp_path / "src" / "crashkernel"
    write(root / "__init__.py", b"")
    write(root / "purgatory/purgatory.bin", b"\x01\x02")
    write(root / "__pycache__/__init__.cpython-312.pyc", b"stale")
    write(root / "drill/guest.py", b"")
    return root


@pytest.fixture
def capture_image(capture_kernel: Kernel, userland: Userland, tmp_path: Path) -> Path:
    return build_capture_image(capture_kernel, userland, tmp_path / "k2.cpio")


def read(image: Path) -> dict[str, cpio.Entry]:
    entries = list(cpio.unpack(image.read_bytes()))
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names)
    for place, name in enumerate(names):
        parent = name.rpartition("/")[0]
        assert not parent or parent in names[:place], f"{name} before its directory"
    return {entry.name: entry for entry in entries}


class TestModules:
    def test_order_is_that_of_loading_and_each_comes_once(self, kernel):
        found = resolve_modules(kernel, ["virtio_console", "virtio_blk", "virtio_pci"])
        assert [each.name for each in found] == [
            *("virtio", "virtio_ring", "virtio_console", "virtio_blk", "virtio_pci_modern_dev", "virtio_pci"),
        ]

    def test_they_are_decompressed(self, kernel):
        assert all(each.data.startswith(b"\x7fELF") for each in resolve_modules(kernel, ["virtio_console", "virtio_pci"]))

    def test_built_in_ones_are_left_out(self, kernel):
        write(
            kernel.modules / "modules.builtin",
            b"kernel/drivers/virtio/virtio-ring.ko\nkernel/drivers/virtio/virtio.ko\n",
        )
        assert [each.name for each in resolve_modules(kernel, ["virtio_blk", "virtio_ring"])] == ["virtio_blk"]

    def test_a_missing_one_is_named_with_who_needs_it(self, kernel):
        (kernel.modules / "kernel/drivers/virtio/virtio_ring.ko").unlink()
        with pytest.raises(EnvironmentFault, match="no module virtio_ring, needed by virtio_blk"):
            resolve_modules(kernel, ["virtio_blk"])

    def test_a_circle_ends(self, kernel):
        write(kernel.modules / "kernel/a.ko", module("b"))
        write(kernel.modules / "kernel/b.ko", module("a"))
        assert {each.name for each in resolve_modules(kernel, ["a"])} == {"a", "b"}

    def test_a_kernel_without_modules_has_all_built_in(self, capture_kernel):
        assert resolve_modules(capture_kernel, ["virtio_blk"]) == ()

    @pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
    def test_a_broken_one(self, tmp_path, suffix):
        if suffix == ".zst" and not shutil.which("zstd"):
            pytest.skip("zstd is not installed")
        with pytest.raises(EnvironmentFault, match="cannot be decompressed"):
            read_module(write(tmp_path / f"a.ko{suffix}", b"nothing of the kind"))

    def test_zstd(self, tmp_path):
        if not shutil.which("zstd"):
            pytest.skip("zstd is not installed")
        plain = write(tmp_path / "a.ko", module())
        subprocess.run(["zstd", "-q", str(plain)], check=True, timeout=60)
        assert read_module(tmp_path / "a.ko.zst") == module()

    def test_zstd_is_asked_for(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(EnvironmentFault, match="install zstd"):
            read_module(write(tmp_path / "a.ko.zst"))


class TestCaptureImage:
    def test_what_is_in_it(self, kernel, userland, tmp_path):
        entries = read(build_capture_image(kernel, userland, tmp_path / "out" / "k2.cpio"))
        assert entries["bin/busybox"].data == b"busybox"
        assert entries["bin/busybox"].mode == stat.S_IFREG | 0o755
        assert entries["bin/dd"].data == b"busybox"
        assert stat.S_ISLNK(entries["bin/dd"].mode)
        assert entries["init"].mode == stat.S_IFREG | 0o755
        assert b"/proc/vmcore" in entries["init"].data
        console = entries["dev/console"]
        assert (stat.S_ISCHR(console.mode), console.rdev_major, console.rdev_minor) == (True, 5, 1)
        order = entries["etc/crashkernel/modules"].data.decode().split()
        assert order[-1] == "virtio_blk.ko"
        assert {f"modules/{name}" for name in order} == {name for name in entries if name.startswith("modules/")}

    def test_it_appears_whole_or_not_at_all(self, kernel, userland, tmp_path, monkeypatch):
        def full_disk(_file, _entries):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(guest.cpio, "write", full_disk)
        with pytest.raises(OSError, match="No space"):
            build_capture_image(kernel, userland, tmp_path / "out" / "k2.cpio")
        assert list((tmp_path / "out").iterdir()) == []


class TestCaptureImageThatCaptures:
    @pytest.fixture
    def build(self, kernel, userland, package, tmp_path):
        tree = tmp_path / "captures"
        shutil.copytree(userland.python, tree, symlinks=True)
        site = tree / "usr/lib/python3/dist-packages"
        write(site / "numpy/__init__.py", b"x = 1\n")
        write(site / "numpy/tests/test_x.py")
        write(site / "numpy/core/_multiarray_umath.cpython-311-powerpc64le-linux-gnu.so", b"umath")
        write(site / "zstandard/_cffi.cpython-311-powerpc64le-linux-gnu.so")
        write(tree / LIBRARIES / "blas/libblas.so.3.11.0", b"blas")
        (tree / LIBRARIES / "blas/libblas.so.3").symlink_to("libblas.so.3.11.0")
        write(tree / LIBRARIES / "libzstd.so.1.5.4", b"zstd")
        write(package / "bench/machine.py")
        write(package / "capture/codec.py", b"y = 2\n")
        write(kernel.modules / "kernel/drivers/net/virtio_net.ko", module("net_failover"))
        write(kernel.modules / "kernel/drivers/net/net_failover.ko", module("failover"))
        write(kernel.modules / "kernel/net/core/failover.ko", module())

        def build(args=("--level=31",), **options):
            able = Userland(userland.busybox, userland.python, capture=tree)
            options = {"package": package, **options}
            return read(build_capture_image(kernel, able, tmp_path / "k2.cpio", capture_args=args, **options))

        return build

    def test_what_it_is_told(self, build):
        entries = build(("--level=31", "--to=/dev/vda"))
        assert entries["etc/crashkernel/capture-args"].data == b"--level=31\n--to=/dev/vda\n"
        assert "etc/crashkernel/token" not in entries
        assert "modules/virtio_net.ko" not in entries

    def test_the_network_is_there_when_the_dump_goes_over_it(self, build):
        entries = build(token="secret")
        assert (entries["etc/crashkernel/token"].data, entries["etc/crashkernel/token"].mode & 0o777) == (b"secret", 0o600)
        order = entries["etc/crashkernel/modules"].data.decode().split()
        assert order[-3:] == ["failover.ko", "net_failover.ko", "virtio_net.ko"]
        assert "bin/ifconfig" in entries
        assert "bin/ifconfig" not in build()

    def test_numpy_and_the_libraries_are_in_it_without_what_import_does_not_ask_for(self, build):
        entries = build()
        names = {name.removeprefix("usr/lib/python3/dist-packages/") for name in entries if "-packages/" in name}
        assert {name for name in names if entries[f"usr/lib/python3/dist-packages/{name}"].data} == {
            f"numpy/__init__.py{'c' if guest.same_bytecode() else ''}",
            "numpy/core/_multiarray_umath.cpython-311-powerpc64le-linux-gnu.so",
        }
        assert entries[f"{LIBRARIES}/libblas.so.3"].data == b"libblas.so.3.11.0", "where the linker looks"
        assert entries[f"{LIBRARIES}/libblas.so.3.11.0"].data == b"blas"
        assert entries[f"{LIBRARIES}/libzstd.so.1.5.4"].data == b"zstd"

    def test_modules_are_there_once_as_bytecode_if_the_guest_can_use_it(self, build, monkeypatch):
        root = "usr/lib/crashkernel/crashkernel"
        monkeypatch.setattr(guest, "same_bytecode", lambda: True)
        entries = build()
        assert entries[f"{root}/capture/codec.pyc"].data[4:8] == b"\1\0\0\0"  # PEP 552: by hash, not checked
        assert f"{root}/capture/codec.py" not in entries
        assert f"{STDLIB}/broken.py" in entries, "what does not compile stays what it is"
        assert not [name for name in entries if name.startswith((f"{root}/drill", f"{root}/bench"))]
        monkeypatch.setattr(guest, "same_bytecode", lambda: False)
        assert build()[f"{root}/capture/codec.py"].data == b"y = 2\n"

    def test_a_userland_that_was_not_fetched_for_it(self, kernel, userland, tmp_path):
        with pytest.raises(EnvironmentFault, match="without what `crashkernel capture` runs on"):
            build_capture_image(kernel, userland, tmp_path / "k2.cpio", capture_args=("--level=31",))

    def test_a_line_break_in_an_argument(self, build):
        with pytest.raises(UsageError, match="line break"):
            build(("--to=a\nb",))


class TestCrashImage:
    @pytest.fixture
    def build(self, kernel, capture_kernel, capture_image, userland, package, tmp_path):
        def build(**options):
            options = {"nonce": NONCE, "package": package, **options}
            output = tmp_path / "k1.cpio"
            who = options.pop("userland", userland)
            return read(build_crash_image(kernel, capture_kernel, capture_image, who, output, **options))

        return build

    def test_the_capture_kernel_is_in_it(self, build, capture_image):
        entries = build()
        assert entries["boot/vmlinux"].data == b"K2 kernel"
        assert entries["boot/initrd"].data == capture_image.read_bytes()
        assert "virtio_blk.ko" not in entries["etc/crashkernel/modules"].data.decode()

    def test_python_is_in_it_and_no_more_than_is_used(self, build):
        entries = build()
        assert entries["usr/bin/python3.11"].mode == stat.S_IFREG | 0o755
        assert entries["lib64/ld64.so.2"].data == b"/lib/powerpc64le-linux-gnu/ld64.so.2"
        assert entries[f"{LIBRARIES}/libffi.so.8"].data == b"libffi.so.8.1.2"
        files = {name.removeprefix(f"{STDLIB}/") for name in entries if name.startswith(STDLIB) and name.endswith(("y", "o"))}
        assert files == {
            *("json/decoder.py", "encodings/utf_8.py", "broken.py"),
            "lib-dynload/_ctypes.cpython-311-powerpc64le-linux-gnu.so",
        }
        assert not [name for name in entries if "gconv" in name or "/doc/" in name]

    def test_a_big_endian_userland_has_the_other_linker(self, build, userland):
        root = userland.python
        linker = write(root / "lib/powerpc64-linux-gnu/ld64.so.1", b"linker", 0o755)
        write(root / "lib/powerpc64-linux-gnu/libm.so.6", b"libm")
        (root / "lib64/ld64.so.1").symlink_to(f"/{linker.relative_to(root)}")
        entries = build()
        assert entries["lib64/ld64.so.1"].data == b"/lib/powerpc64-linux-gnu/ld64.so.1"
        assert entries["lib/powerpc64-linux-gnu/ld64.so.1"].data == b"linker"
        assert entries["lib/powerpc64-linux-gnu/libm.so.6"].data == b"libm"

    def test_the_package_is_in_it_without_the_drill(self, build):
        root = "usr/lib/crashkernel/crashkernel/"
        names = {name.removeprefix(root) for name, entry in build().items() if name.startswith(root) and entry.data}
        pyc = {"__pycache__/__init__.cpython-311.pyc"} if guest.same_bytecode() else set()
        assert names == {"purgatory/purgatory.bin", *pyc}

    def test_its_own_package_by_default(self, build):
        assert "usr/lib/crashkernel/crashkernel/errors.py" in build(package=None)

    def test_bytecode_goes_with_the_source_when_the_guest_can_use_it(self, build, monkeypatch):
        monkeypatch.setattr(guest, "same_bytecode", lambda: True)
        entries = build()
        pyc = entries[f"{STDLIB}/json/__pycache__/decoder.cpython-311.pyc"].data
        assert pyc[4:8] == b"\1\0\0\0"  # PEP 552: by hash, not checked
        assert f"{STDLIB}/__pycache__/broken.cpython-311.pyc" not in entries
        monkeypatch.setattr(guest, "same_bytecode", lambda: False)
        assert not [name for name in build() if name.endswith(".pyc")]

    def test_the_scenario(self, build):
        entries = build(load_args=("--placement=zero", "--append=console=hvc0 quiet"))
        assert entries["etc/crashkernel/scenario"].data == b"LOADER=crashkernel\nTASK=crash\nDRIVER=none\n"
        assert entries["etc/crashkernel/load-args"].data == b"--placement=zero\n--append=console=hvc0 quiet\n"
        assert "sbin/kexec" not in entries

    def test_a_machine_that_is_only_described_needs_no_capture_image(self, kernel, capture_kernel, userland, package, tmp_path):
        image = build_crash_image(
            kernel, capture_kernel, None, userland, tmp_path / "k1.cpio", nonce=NONCE, task="describe", package=package
        )
        entries = read(image)
        assert b"TASK=describe\n" in entries["etc/crashkernel/scenario"].data
        assert "boot/initrd" not in entries

    @pytest.mark.parametrize("driver", ["none", "late", "early"])
    def test_the_driver_is_in_it_when_there_is_to_be_one(self, build, driver):
        entries = build(driver=driver)
        assert f"DRIVER={driver}\n".encode() in entries["etc/crashkernel/scenario"].data
        assert ("usr/lib/crashkernel/driver.py" in entries) == (driver != "none")

    def test_the_dying_kernel_finds_its_own_file(self, kernel, capture_image, userland, package, tmp_path, build):
        assert build()["boot/vmlinux-6.1"].data == kernel.vmlinux.read_bytes(), "the capture kernel is another"
        output = tmp_path / "same.cpio"
        entries = read(build_crash_image(kernel, kernel, capture_image, userland, output, nonce=NONCE, package=package))
        assert entries["boot/vmlinux-6.1"].data == b"vmlinux"

    def test_the_peer(self, build):
        entries = build(loader="kexec-tools", append="console=hvc0")
        assert entries["etc/crashkernel/scenario"].data == b"LOADER=kexec-tools\nTASK=crash\nDRIVER=none\n"
        assert entries["etc/crashkernel/append"].data == b"console=hvc0"
        assert entries["sbin/kexec"].mode == stat.S_IFREG | 0o755

    def test_the_peer_was_not_fetched(self, build, userland):
        with pytest.raises(EnvironmentFault, match="without kexec-tools"):
            build(loader="kexec-tools", userland=Userland(userland.busybox, userland.python))

    def test_the_whole_nonce_is_nowhere_in_it(self, build, tmp_path):
        entries = build()
        assert entries["etc/crashkernel/nonce.0"].data + entries["etc/crashkernel/nonce.1"].data == NONCE
        assert NONCE not in (tmp_path / "k1.cpio").read_bytes()

    def test_a_nonce_of_another_size(self, build):
        with pytest.raises(UsageError, match="64 bytes"):
            build(nonce=b"short")

    @pytest.mark.parametrize("option", [{"load_args": ("--a", "b\nc")}, {"append": "a\n"}])
    def test_a_line_break_in_an_argument(self, build, option):
        with pytest.raises(UsageError, match="line break"):
            build(**option)


def test_bytecode_is_what_the_source_says():
    pyc = compile_module(b"answer = 6 * 7\n", "/usr/lib/x.py")
    assert pyc[:4] == importlib.util.MAGIC_NUMBER
    assert pyc[8:16] == importlib.util.source_hash(b"answer = 6 * 7\n")
    code = marshal.loads(pyc[16:])
    names: dict[str, object] = {}
    exec(code, names)
    assert names["answer"] == 42
    assert code.co_filename == "/usr/lib/x.py"


class TestKeptBytecode:
    source = b"answer = 6 * 7\n"

    @pytest.fixture
    def compiled(self, monkeypatch, tmp_path):
        """How often something was compiled; the cache is `tmp_path`."""
        count = []
        monkeypatch.setenv("CRASHKERNEL_CACHE", str(tmp_path))
        monkeypatch.setattr(guest, "compile_module", lambda *what: count.append(what) or compile_module(*what))
        return count

    def test_it_is_compiled_once(self, compiled):
        first = guest.kept_module(self.source, "/usr/lib/x.py")
        assert first == compile_module(self.source, "/usr/lib/x.py")
        assert guest.kept_module(self.source, "/usr/lib/x.py") == first
        assert len(compiled) == 1

    def test_another_source_or_place_is_another(self, compiled):
        for source, place in ((self.source, "/x.py"), (self.source, "/y.py"), (self.source + b"\n", "/x.py")):
            assert guest.kept_module(source, place) == compile_module(source, place)
        assert len(compiled) == 3

    def test_a_cache_that_cannot_be_written_is_none(self, compiled, tmp_path):
        (tmp_path / "bytecode").write_text("in the way")
        for _ in range(2):
            assert guest.kept_module(self.source, "/x.py") == compile_module(self.source, "/x.py")
        assert len(compiled) == 2

    def test_what_does_not_compile_is_not_kept(self, compiled, tmp_path):
        with pytest.raises(SyntaxError):
            guest.kept_module(b"answer =\n", "/x.py")
        assert not list(tmp_path.rglob("*"))


# Commands that busybox's sh does not have built in and a script might be tempted to use.
EXTERNAL = (
    *(
        "awk",
        "cat",
        "cp",
        "cut",
        "dd",
        "grep",
        "head",
        "hexdump",
        "ifconfig",
        "insmod",
        "ln",
        "ls",
        "mkdir",
        "modprobe",
        "mount",
        "mv",
        "poweroff",
    ),
    *("sed", "sleep", "stat", "sync", "tail", "tr", "umount", "wc"),
)


@pytest.mark.parametrize(
    ("script", "applets"),
    [("crash-init.sh", guest.CRASH_APPLETS), ("capture-init.sh", (*guest.CAPTURE_APPLETS, *guest.NETWORK_APPLETS))],
)
class TestScripts:
    def test_syntax(self, script, applets):
        path = Path(guest.__file__).parent / script
        subprocess.run(["sh", "-n", str(path)], check=True, timeout=60)

    def test_every_command_has_its_applet(self, script, applets):
        folder = Path(guest.__file__).parent
        text = (folder / "guest-common.sh").read_text() + (folder / script).read_text()
        lines = [line.split("#", 1)[0] for line in text.splitlines()]
        used = {word for line in lines for word in EXTERNAL if word in line.replace("$(", " ").replace(";", " ").split()}
        assert used == set(applets) - {"sh"}
