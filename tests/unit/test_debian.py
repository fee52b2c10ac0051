"""Debian's packages without a network: apt and its archive are stood in for by scripts and small trees."""

import gzip
import lzma
import os
import re
import struct
import sys
import textwrap
import time
from pathlib import Path

import pytest

from crashkernel.drill import debian
from crashkernel.drill.debian import Archive, Sources, default_cache, find_mirror, plain_vmlinux, read_release, resolve_kernel
from crashkernel.errors import EnvironmentFault, UsageError

RELEASE = "6.1.0-50-powerpc64le"

FAKE_APT = """
    import os, sys, time
    from pathlib import Path

    state = Path(os.environ["FAKE_APT"])
    argv = sys.argv[1:]
    with (state / "calls").open("a") as calls:
        print(Path(sys.argv[0]).name, *argv, file=calls)
    if Path(sys.argv[0]).name == "dpkg-deb":
        deb, target = Path(argv[1]), Path(argv[2])
        for line in deb.read_text().splitlines():
            name, _, content = line.partition("=")
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(bytes.fromhex(content))
        sys.exit((state / "dpkg-fails").exists())
    if argv[0] == "indextargets":
        print((state / "targets").read_text(), end="")
    elif argv[0] == "shell":
        print(f"LIST='{state}/sources.list'")
        print(f"PARTS='{state}/sources.list.d/'")
    elif "update" in argv:
        if (state / "offline").exists():
            sys.exit("E: Could not connect to the mirror")
        (state / "index").write_text((state / "archive").read_text())
    elif "show" in argv:
        wanted = argv[argv.index("show") + 2 :]
        index = (state / "index").read_text().strip()
        for stanza in index.split("\\n\\n"):
            if stanza.splitlines()[0].removeprefix("Package: ") in wanted:
                print(stanza + "\\n")
    elif "source" in argv:
        if (state / "offline").exists():
            sys.exit("E: Could not connect to the mirror")
        for suffix in (".dsc", ".debian.tar.xz", ".orig.tar.gz", ".orig.tar.gz.asc"):
            Path(f"{argv[-1]}_1{suffix}").write_text(suffix)
    elif "download" in argv:
        if (state / "offline").exists():
            sys.exit("E: Could not connect to the mirror")
        name, _, version = argv[-1].partition("=")
        pool = state / "pool" / f"{name}_{version}_ppc64el.deb"
        if not pool.exists():
            sys.exit("E: 404 Not Found")
        Path(pool.name).write_bytes(pool.read_bytes())
"""


class FakeMirror:
    """The archive as apt sees it; `calls` are the commands it was asked to run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "pool").mkdir()
        (root / "archive").write_text("")
        (root / "targets").write_text("Debian|Debian|bookworm|http://mirror.test/debian/\n")

    def add(self, name: str, *, version: str = "1", depends: str = "", files: dict[str, bytes] | None = None) -> None:
        deb = f"{name}_{version}_ppc64el.deb"
        stanza = f"Package: {name}\nVersion: {version}\nDepends: {depends}\nFilename: pool/main/x/{deb}\n\n"
        with (self.root / "archive").open("a") as archive:
            archive.write(stanza)
        text = "".join(f"{path}={content.hex()}\n" for path, content in (files or {}).items())
        (self.root / "pool" / deb).write_text(text)

    def remove(self, name: str, version: str = "1") -> None:
        (self.root / "pool" / f"{name}_{version}_ppc64el.deb").unlink()
        text = (self.root / "archive").read_text()
        kept = [stanza for stanza in text.split("\n\n") if stanza and not stanza.startswith(f"Package: {name}\n")]
        (self.root / "archive").write_text("".join(stanza + "\n\n" for stanza in kept))

    @property
    def calls(self) -> list[str]:
        path = self.root / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def count(self, word: str) -> int:
        return sum(word in call.split() for call in self.calls)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMirror:
    tools = tmp_path / "tools"
    tools.mkdir()
    state = tmp_path / "apt"
    state.mkdir()
    for tool in ("apt-get", "apt-cache", "apt-config", "dpkg-deb"):
        script = tools / tool
        script.write_text(f"#!{sys.executable} -S\n" + textwrap.dedent(FAKE_APT))
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("FAKE_APT", str(state))
    monkeypatch.delenv("CRASHKERNEL_MIRROR", raising=False)
    return FakeMirror(state)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def vmlinux(release: str = RELEASE, *, machine: int = 21, elf_class: int = 2, order: str = "<") -> bytes:
    ident = b"\x7fELF" + bytes([elf_class, 1 if order == "<" else 2, 1]) + bytes(9)
    return ident + struct.pack(order + "HHI", 2, machine, 1) + bytes(40) + f"Linux version {release} (x@y) #1".encode()


def age_index(cache: Path, seconds: float, suite: str = "bookworm") -> None:
    stamp = cache / "debian" / suite / "apt" / "stamp"
    then = time.time() - seconds
    os.utime(stamp, (then, then))


class TestMirror:
    def test_the_environment_wins(self, mirror, monkeypatch):
        monkeypatch.setenv("CRASHKERNEL_MIRROR", "http://elsewhere.test/debian/")
        assert find_mirror() == "http://elsewhere.test/debian"
        assert mirror.calls == []

    def test_the_hosts_own_without_security_and_strangers(self, mirror):
        (mirror.root / "targets").write_text(
            "Google|Google|x|http://google.test/apt\n"
            "Debian|Debian-Security|bookworm-security|http://mirror.test/debian-security/\n"
            "Debian|Debian|bookworm|http://mirror.test/debian/\n"
        )
        assert find_mirror() == "http://mirror.test/debian"

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            (
                "sources.list",
                "# deb http://no.test/debian sid main\ndeb [arch=amd64] http://m.test/debian bookworm main\n",
            ),
            (
                "sources.list.d/a.list",
                "deb-src http://no.test/debian x main\ndeb http://m.test/debian/ bookworm main\n",
            ),
            (
                "sources.list.d/debian.sources",
                "Types: deb\nURIs: http://m.test/debian-security\nSuites: bookworm-security\n\n"
                "Types: deb\nEnabled: no\nURIs: http://no.test/debian\n\n"
                "# snapshot\nTypes: deb deb-src\n# more\nURIs: http://m.test/debian\nSuites: bookworm\n",
            ),
        ],
        ids=["one-line", "one-line in a part", "deb822"],
    )
    def test_from_the_sources_when_apt_has_no_index(self, mirror, name, text):
        (mirror.root / "targets").write_text("")
        (mirror.root / "sources.list.d").mkdir()
        (mirror.root / name).write_text(text)
        assert find_mirror() == "http://m.test/debian"

    def test_none_says_how_to_name_one(self, mirror):
        (mirror.root / "targets").write_text("")
        with pytest.raises(EnvironmentFault, match="CRASHKERNEL_MIRROR"):
            find_mirror()

    def test_no_apt_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CRASHKERNEL_MIRROR", raising=False)
        with pytest.raises(EnvironmentFault, match="apt-get is not installed"):
            find_mirror()


class TestCacheDirectory:
    def test_order_of_precedence(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("CRASHKERNEL_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert default_cache() == tmp_path / ".cache" / "crashkernel"
        monkeypatch.setenv("XDG_CACHE_HOME", "/x")
        assert default_cache() == Path("/x/crashkernel")
        monkeypatch.setenv("CRASHKERNEL_CACHE", "/y")
        assert default_cache() == Path("/y")


class TestArchive:
    def test_unpack_puts_packages_into_one_tree_once(self, mirror, cache):
        mirror.add("a", files={"usr/a": b"A"})
        mirror.add("b", files={"usr/b": b"B"})
        heard: list[str] = []
        tree = Archive(cache, "bookworm", heard.append).unpack("a", "b")
        assert {path.name: path.read_bytes() for path in (tree / "usr").iterdir()} == {"a": b"A", "b": b"B"}
        assert any("downloading a_1_ppc64el.deb" in line for line in heard)
        before = len(mirror.calls)
        assert Archive(cache, "bookworm").unpack("a", "b") == tree
        assert mirror.calls[before:] == []

    @pytest.mark.parametrize("memo", ["", "[]", '{"stamp": 1, "packages": []}', '{"stamp": null}'])
    def test_what_was_asked_of_another_index_or_is_damaged_is_asked_again(self, mirror, cache, memo):
        mirror.add("a", files={"a": b"A"})
        tree = Archive(cache, "bookworm").unpack("a")
        (cache / "debian" / "bookworm" / "apt" / "known.json").write_text(memo)
        before = len(mirror.calls)
        assert Archive(cache, "bookworm").unpack("a") == tree
        assert [call.split()[0] for call in mirror.calls[before:]] == ["apt-cache"]
        assert Archive(cache, "bookworm").unpack("a") == tree
        assert len(mirror.calls) == before + 1

    def test_a_second_run_needs_no_network(self, mirror, cache):
        mirror.add("a", files={"a": b"A"})
        tree = Archive(cache, "bookworm").unpack("a")
        (mirror.root / "offline").touch()
        assert Archive(cache, "bookworm").unpack("a") == tree

    def test_another_architecture_has_a_cache_and_an_index_of_its_own(self, mirror, cache):
        mirror.add("a", files={"a": b"A"})
        ours = Archive(cache, "bookworm")
        theirs = Archive(cache, "bookworm", architecture="amd64")
        assert (ours.root, theirs.root) == (cache / "debian" / "bookworm", cache / "debian" / "bookworm-amd64")
        ours.unpack("a")
        theirs.unpack("a")
        for archive in (ours, theirs):
            configuration = (archive.root / "apt" / "apt.conf").read_text()
            assert f'APT::Architecture "{archive.architecture}";' in configuration
            assert f'APT::Architectures "{archive.architecture}";' in configuration
            assert f"arch={archive.architecture} " in (archive.root / "apt" / "sources.list").read_text()
            assert (archive.root / "trees" / "a_1_ppc64el" / "a").read_bytes() == b"A"  # the fake mirror has one pool
        with pytest.raises(EnvironmentFault, match="no package b for amd64") as caught:
            theirs.fetch("b")
        assert not caught.value.hint, "flavours of POWER kernels are no help here"

    def test_depends_takes_first_alternatives(self, mirror, cache):
        mirror.add("a", depends="libc6 (>= 2.36), x | y, libc6 (<< 3),\n z:any [linux-any]")
        assert Archive(cache, "bookworm").depends("a") == ("libc6", "x", "z")

    def test_the_index_is_good_for_a_day(self, mirror, cache):
        mirror.add("a")
        Archive(cache, "bookworm").fetch("a")
        age_index(cache, 23 * 3600)
        Archive(cache, "bookworm").fetch("a")
        assert mirror.count("update") == 1
        age_index(cache, 25 * 3600)
        Archive(cache, "bookworm").fetch("a")
        assert mirror.count("update") == 2

    def test_an_old_index_does_when_the_mirror_is_away(self, mirror, cache):
        mirror.add("a", files={"a": b"A"})
        Archive(cache, "bookworm").unpack("a")
        age_index(cache, 50 * 3600)
        (mirror.root / "offline").touch()
        heard: list[str] = []
        assert Archive(cache, "bookworm", heard.append).unpack("a").is_dir()
        assert any("50 hours ago" in line and "Could not connect" in line for line in heard)
        updates = mirror.count("update")
        assert Archive(cache, "bookworm").unpack("a").is_dir()
        assert mirror.count("update") == updates, "asked again at once"

    def test_no_index_and_no_mirror(self, mirror, cache):
        (mirror.root / "offline").touch()
        with pytest.raises(EnvironmentFault, match="Could not connect") as caught:
            Archive(cache, "bookworm").fetch("a")
        assert "CRASHKERNEL_MIRROR" in caught.value.hint

    def test_a_missing_package_is_looked_for_again_when_the_index_is_not_fresh(self, mirror, cache):
        mirror.add("a")
        Archive(cache, "bookworm").fetch("a")
        mirror.add("new")
        with pytest.raises(EnvironmentFault, match="no package new"):
            Archive(cache, "bookworm").fetch("new")
        age_index(cache, 3600)
        assert Archive(cache, "bookworm").fetch("new").name == "new_1_ppc64el.deb"

    def test_a_package_replaced_in_the_pool_is_fetched_in_its_new_version(self, mirror, cache):
        mirror.add("a")
        mirror.add("b")
        Archive(cache, "bookworm").fetch("b")
        mirror.remove("a")
        mirror.add("a", version="2")
        assert Archive(cache, "bookworm").fetch("a").name == "a_2_ppc64el.deb"
        assert mirror.count("update") == 2

    def test_another_mirror_means_another_index(self, mirror, cache, monkeypatch):
        mirror.add("a")
        Archive(cache, "bookworm").fetch("a")
        monkeypatch.setenv("CRASHKERNEL_MIRROR", "http://other.test/debian")
        Archive(cache, "bookworm").fetch("a")
        assert mirror.count("update") == 2
        assert "http://other.test/debian" in (cache / "debian/bookworm/apt/sources.list").read_text()

    def test_a_mirror_that_does_not_answer_does_not_stay(self, mirror, cache, monkeypatch):
        mirror.add("a")
        Archive(cache, "bookworm").fetch("a")
        (mirror.root / "offline").touch()
        monkeypatch.setenv("CRASHKERNEL_MIRROR", "http://other.test/debian")
        with pytest.raises(EnvironmentFault, match="Could not connect"):
            Archive(cache, "bookworm").fetch("a")
        monkeypatch.delenv("CRASHKERNEL_MIRROR")
        assert Archive(cache, "bookworm").fetch("a").exists()

    def test_nothing_of_the_hosts_apt_is_written(self, mirror, cache):
        mirror.add("a")
        Archive(cache, "bookworm").fetch("a")
        config = (cache / "debian/bookworm/apt/apt.conf").read_text()
        root = str(cache / "debian" / "bookworm" / "apt")
        for name in ("Dir::State", "Dir::State::Lists", "Dir::State::status", "Dir::Cache", "Dir::Etc::SourceList"):
            line = next(line for line in config.splitlines() if line.startswith(f'{name} "'))
            assert root in line
        assert 'Dir::Etc::SourceParts "/dev/null";' in config
        assert "#clear APT::Update;" in config  # the host's hooks
        # Only the question for the mirror is asked without it.
        assert all(
            f"-c {root}/apt.conf" in call for call in mirror.calls if call.startswith("apt-") and "indextargets" not in call
        )

    def test_a_failed_unpacking_leaves_nothing(self, mirror, cache):
        mirror.add("a", files={"a": b"A"})
        (mirror.root / "dpkg-fails").touch()
        with pytest.raises(EnvironmentFault, match="cannot unpack"):
            Archive(cache, "bookworm").unpack("a")
        assert list((cache / "debian/bookworm/trees").iterdir()) == []
        (mirror.root / "dpkg-fails").unlink()
        assert (Archive(cache, "bookworm").unpack("a") / "a").read_bytes() == b"A"

    def test_a_lock_that_is_never_released_is_not_waited_for_forever(self, mirror, cache, monkeypatch):
        import fcntl

        mirror.add("a")
        Archive(cache, "bookworm").fetch("a")
        monkeypatch.setattr(debian, "LOCK_DEADLINE", 0.2)
        with (cache / "debian/bookworm/lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            with pytest.raises(EnvironmentFault, match="locked"):
                Archive(cache, "bookworm").fetch("a")


class TestSources:
    def test_the_upstream_archive_is_fetched_once(self, mirror, cache):
        archive = Sources(cache, "bookworm").upstream("a")
        assert archive.name == "a_1.orig.tar.gz"
        assert archive.read_text() == ".orig.tar.gz"
        (mirror.root / "offline").touch()
        assert Sources(cache, "bookworm").upstream("a") == archive
        assert mirror.count("source") == 1

    def test_the_binary_packages_keep_their_own_index(self, mirror, cache):
        mirror.add("a")
        Archive(cache, "bookworm").fetch("a")
        Sources(cache, "bookworm").upstream("a")
        assert mirror.count("update") == 2
        line = (cache / "debian/bookworm-sources/apt/sources.list").read_text()
        assert re.fullmatch(r"deb-src \[.*target=Sources.*\] http://mirror.test/debian bookworm main\n", line)

    def test_a_download_that_fails_leaves_nothing(self, mirror, cache):
        Sources(cache, "bookworm").upstream("a")
        (mirror.root / "offline").touch()
        with pytest.raises(EnvironmentFault, match="cannot download the source of b: Could not connect"):
            Sources(cache, "bookworm").upstream("b")
        assert [path.name for path in (cache / "debian/bookworm-sources/sources").iterdir()] == ["a"]


class TestResolveKernel:
    def test_the_kernel_and_its_modules_in_one_package(self, mirror, cache):
        image = f"linux-image-{RELEASE}"
        mirror.add("linux-image-powerpc64le", depends=f"{image} (= 1)")
        files = {f"boot/vmlinux-{RELEASE}": vmlinux(), f"lib/modules/{RELEASE}/modules.builtin": b""}
        mirror.add(image, depends="kmod, linux-base (>= 4.3~)", files=files)
        kernel = resolve_kernel("debian:bookworm", cache)
        assert kernel.name == RELEASE
        assert kernel.vmlinux.name == f"vmlinux-{RELEASE}"
        assert (kernel.modules / "modules.builtin").exists()
        assert "linux-base" not in " ".join(call for call in mirror.calls if "download" in call)

    def test_the_kernel_split_over_packages(self, mirror, cache):
        release = "7.2.13+deb14-powerpc64le-64k"
        modules = f"usr/lib/modules/{release}"
        flavour = "powerpc64le-64k"
        mirror.add(f"linux-image-{flavour}", depends=f"linux-base-{flavour}, linux-image-{release}")
        mirror.add(f"linux-base-{flavour}", depends=f"linux-base-{release}")
        mirror.add(
            f"linux-image-{release}",
            depends=f"dracut | initramfs-tools, linux-base-{release}, linux-binary-{release}, linux-modules-{release}",
        )
        mirror.add(f"linux-base-{release}", files={f"{modules}/modules.builtin": b"kernel/virtio.ko\n"})
        mirror.add(f"linux-binary-{release}", files={f"{modules}/vmlinuz": vmlinux(release)})
        mirror.add(f"linux-modules-{release}", depends="kmod", files={f"{modules}/kernel/a.ko": b""})
        kernel = resolve_kernel(f"debian:sid/{flavour}", cache)
        assert kernel.name == release
        assert kernel.vmlinux.parent == kernel.modules
        assert sorted(path.name for path in kernel.modules.iterdir()) == ["kernel", "modules.builtin", "vmlinuz"]

    def test_a_package_without_a_kernel(self, mirror, cache):
        mirror.add("linux-image-powerpc64le", files={"usr/share/doc/x": b""})
        with pytest.raises(EnvironmentFault, match="0 kernels"):
            resolve_kernel("debian:bookworm", cache)

    def test_an_unknown_flavour(self, mirror, cache):
        with pytest.raises(EnvironmentFault, match="no package linux-image-powerpc64le-1k"):
            resolve_kernel("debian:bookworm/powerpc64le-1k", cache)

    @pytest.mark.parametrize("spec", ["debian:", "debian:/powerpc64le", "debian:Sid", "debian:sid/", "debian:sid/a/b"])
    def test_a_malformed_specification(self, mirror, cache, spec):
        with pytest.raises(UsageError, match="names no kernel") as caught:
            resolve_kernel(spec, cache)
        assert "debian:SUITE" in caught.value.hint
        assert mirror.calls == []

    @pytest.mark.parametrize(
        "place", ["lib/modules", "boot/lib/modules", "usr/lib/modules", "boot/modules"], ids=lambda place: place
    )
    def test_a_path_with_modules_near_it(self, tmp_path, cache, place):
        (tmp_path / "boot").mkdir()
        (tmp_path / "boot" / "vmlinux").write_bytes(vmlinux())
        (tmp_path / place / RELEASE).mkdir(parents=True)
        kernel = resolve_kernel(str(tmp_path / "boot" / "vmlinux"), cache)
        assert kernel.name == RELEASE
        assert kernel.modules == tmp_path / place / RELEASE

    def test_a_path_among_its_modules(self, tmp_path, cache):
        path = tmp_path / RELEASE / "vmlinuz"
        path.parent.mkdir()
        path.write_bytes(vmlinux())
        assert resolve_kernel(str(path), cache).modules == tmp_path / RELEASE

    def test_a_path_without_modules(self, tmp_path, cache):
        (tmp_path / "vmlinux").write_bytes(vmlinux())
        assert not resolve_kernel(str(tmp_path / "vmlinux"), cache).modules.exists()

    def test_a_path_that_is_not_there(self, cache):
        with pytest.raises(UsageError, match="no such file"):
            resolve_kernel("/nowhere/vmlinux", cache)


class TestVmlinux:
    @pytest.mark.parametrize("compress", [gzip.compress, lzma.compress], ids=["gzip", "xz"])
    def test_a_compressed_one_is_decompressed_once(self, tmp_path, compress):
        path = tmp_path / "vmlinuz"
        path.write_bytes(compress(vmlinux()))
        plain = plain_vmlinux(path, tmp_path / "store")
        assert plain.read_bytes() == vmlinux()
        inode = plain.stat().st_ino
        assert plain_vmlinux(path, tmp_path / "store").stat().st_ino == inode
        path.write_bytes(compress(vmlinux("9.9")))
        assert read_release(plain_vmlinux(path, tmp_path / "store")) == "9.9"

    @pytest.mark.parametrize("order", ["<", ">"])
    def test_both_byte_orders(self, tmp_path, order):
        path = tmp_path / "vmlinux"
        path.write_bytes(vmlinux(order=order))
        assert plain_vmlinux(path, tmp_path) == path
        assert resolve_kernel(str(path), tmp_path).byteorder == {"<": "little", ">": "big"}[order]

    @pytest.mark.parametrize(
        ("data", "complaint"),
        [
            (b"", "not an ELF file"),
            (b"MZ" + bytes(100), "not an ELF file"),
            (vmlinux(machine=62), "not a 64-bit PowerPC"),
            (vmlinux(elf_class=1), "not a 64-bit PowerPC"),
            (gzip.compress(b"text"), "not an ELF file"),
            (gzip.compress(vmlinux())[:40], "cannot be decompressed"),
            (lzma.compress(vmlinux())[:40], "cannot be decompressed"),
        ],
        ids=["empty", "PE", "x86", "32-bit", "gzip of text", "gzip cut off", "xz cut off"],
    )
    def test_what_is_no_kernel_of_ours(self, tmp_path, data, complaint):
        path = tmp_path / "vmlinux"
        path.write_bytes(data)
        with pytest.raises(UsageError, match=complaint):
            plain_vmlinux(path, tmp_path / "store")
        assert not (tmp_path / "store").exists() or list((tmp_path / "store").iterdir()) == []

    def test_no_banner(self, tmp_path):
        path = tmp_path / "vmlinux"
        path.write_bytes(vmlinux().replace(b"Linux version", b"Linux vers"))
        with pytest.raises(UsageError, match="banner"):
            read_release(path)
