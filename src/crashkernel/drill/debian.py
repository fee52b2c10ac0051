"""Debian's packages, ppc64el's above all, fetched and unpacked without root and without touching the host's apt state.

The twin's kernels and its small userland are Debian's own packages, and so is what the benches measure this package
against. apt does the fetching and the checking of signatures and hashes, with every directory it would write to moved
below this package's cache; ``dpkg-deb`` does the unpacking. On any machine that has the two tools, whatever its own
architecture and release, this gives:

``Archive``
    one suite of one mirror, for one architecture: fetch a package, unpack it, read its dependencies.
``resolve_kernel``
    ``debian:SUITE[/FLAVOUR]`` or a path to a vmlinux → `Kernel`: the ELF file, its release and its modules.

Layout of the cache, one directory a suite (``<suite>-<architecture>`` for others than ppc64el), each complete in itself::

    <cache>/debian/<suite>/apt/      apt's lists, configuration and package cache
    <cache>/debian/<suite>/debs/     the packages, by the file name they have in the pool
    <cache>/debian/<suite>/trees/    the packages unpacked
    <cache>/debian/<suite>/lock      held while any of these changes

Everything appears by rename, under the lock, so that processes may share a cache and be killed at any time.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import lzma
import mmap
import os
import re
import shutil
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from crashkernel.errors import EnvironmentFault, UsageError
from crashkernel.formats.elf import ByteOrder

Progress = Callable[[str], None]

ARCHITECTURE = "ppc64el"
DEFAULT_FLAVOUR = "powerpc64le"

# Deadlines, in seconds. A kernel is 80 MB, an index 10 MB.
UPDATE_DEADLINE = 600.0
DOWNLOAD_DEADLINE = 1800.0
LOCAL_DEADLINE = 300.0  # tools that only read or write local files
LOCK_DEADLINE = UPDATE_DEADLINE + DOWNLOAD_DEADLINE  # as long as the holder may take

INDEX_AGE = 24 * 3600.0  # seconds an index is good for
RETRY_AGE = 600.0  # seconds after which a mirror that did not answer, or lacked a package, is worth asking again

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

SPEC_HINT = "a kernel is debian:SUITE[/FLAVOUR], such as debian:trixie/powerpc64le-64k, big-endian, or the path of a vmlinux"


def silent(_message: str) -> None:
    """Progress nobody asked for."""


def default_cache() -> Path:
    """The cache directory: ``$CRASHKERNEL_CACHE``, else ``$XDG_CACHE_HOME/crashkernel``, else ``~/.cache/crashkernel``.

    :raise EnvironmentFault: none of the three can be told.
    """
    if chosen := os.environ.get("CRASHKERNEL_CACHE"):
        return Path(chosen).absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "crashkernel"
    try:
        return Path.home() / ".cache" / "crashkernel"
    except RuntimeError as error:
        raise EnvironmentFault("no home directory to keep a cache in", hint="set CRASHKERNEL_CACHE") from error


def _run(argv: Sequence[str | Path], *, deadline: float, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end, keeping what it says.

    :raise EnvironmentFault: the tool is not installed or did not end within `deadline` seconds. Its exit status is the
        caller's to judge.
    """
    command = [str(argument) for argument in argv]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=deadline, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise EnvironmentFault(
            f"{command[0]} is not installed", hint="the drill takes Debian packages with apt and dpkg: install both"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFault(f"{command[0]} did not end within {deadline:.0f} s", hint="is the mirror reachable?") from error


def _complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The lines in which apt says what is wrong, joined; else the last line it said."""
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    blame = [line[2:].strip() for line in lines if line.startswith("E:")]
    return "; ".join(blame or lines[-1:]) or f"exit status {result.returncode}"


def _age(path: Path) -> float:
    """Seconds since `path` was written; infinite when it is not there."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return float("inf")


def _replace(path: Path, text: str) -> None:
    """Write a file that readers see whole."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    temporary.replace(path)


@contextlib.contextmanager
def locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, waiting for whoever has it.

    :raise EnvironmentFault: somebody kept it for longer than `LOCK_DEADLINE` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    give_up = time.monotonic() + LOCK_DEADLINE
    told = False
    with path.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > give_up:
                    raise EnvironmentFault(
                        f"{path} has been locked for {LOCK_DEADLINE:.0f} s", hint="is another crashkernel hanging?"
                    ) from error
                if not told:
                    progress(f"waiting for another process to finish with {path.parent}")
                    told = True
                time.sleep(0.1)
        yield


# --------------------------------------------------------------------------------------------------------- the mirror


def find_mirror() -> str:
    """The base URI of a Debian mirror: ``$CRASHKERNEL_MIRROR``, else the one this host's own apt uses.

    apt knows the origin of a source once it has its index; on a host whose lists are empty (a fresh container) the
    sources themselves are read.

    :raise EnvironmentFault: apt is missing, or knows no Debian source.
    """
    if chosen := os.environ.get("CRASHKERNEL_MIRROR"):
        return chosen.rstrip("/")
    listing = _run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(CODENAME)|$(REPO_URI)"], deadline=LOCAL_DEADLINE
    )
    for line in listing.stdout.splitlines():
        origin, label, codename, uri = [*line.split("|", 3), "", "", ""][:4]
        if origin == "Debian" and label == "Debian" and "security" not in codename and uri:
            return uri.rstrip("/")
    for uri in _source_uris():
        path = uri.rstrip("/")
        if "debian" in path.split("/") and "security" not in path:
            return path
    raise EnvironmentFault(
        "this host's apt knows no Debian mirror",
        hint="set CRASHKERNEL_MIRROR to the base URI of one, the part before /dists",
    )


def _source_uris() -> list[str]:
    """The URIs of the binary sources in apt's configuration, in both of its formats, main list first."""
    shell = _run(
        ["apt-config", "shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"],
        deadline=LOCAL_DEADLINE,
    )
    places = dict(re.findall(r"^(LIST|PARTS)='(.*)'$", shell.stdout, re.MULTILINE))
    files = [Path(places["LIST"])] if "LIST" in places else []
    if "PARTS" in places:
        files += sorted(Path(places["PARTS"]).glob("*"))
    uris: list[str] = []
    for file in files:
        if file.suffix in {".list", ".sources"} and file.is_file():
            uris += _uris_in(file.read_text(errors="replace"), deb822=file.suffix == ".sources")
    return uris


def _uris_in(text: str, *, deb822: bool) -> list[str]:
    """The URIs of one sources file: sources.list(5), one-line style or deb822 style."""
    if not deb822:
        return re.findall(r"^\s*deb\s+(?:\[[^\]]*\]\s*)?(\S+)", text, re.MULTILINE)
    uris: list[str] = []
    for stanza in re.split(r"\n\s*\n", text):
        fields = _fields("\n".join(line for line in stanza.splitlines() if not line.startswith("#")))
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() not in {"no", "false"}:
            uris += fields.get("uris", "").split()
    return uris


def _fields(stanza: str) -> dict[str, str]:
    """One deb822 paragraph: lower-case names, values with their continuation lines joined by newlines."""
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line[:1] in {" ", "\t"}:
            if name:
                fields[name] += "\n" + line.strip()
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


# ---------------------------------------------------------------------------------------------------------- the archive


@dataclass(frozen=True)
class Package:
    """What the index says of one package: all that is needed to get it and to follow it."""

    name: str
    version: str
    filename: str  # below the mirror's base; the last part names the cached file
    depends: tuple[str, ...]  # package names, Pre-Depends first, of each choice the first alternative

    @property
    def deb(self) -> str:
        """The name of its file."""
        return self.filename.rsplit("/", 1)[-1]

    @classmethod
    def from_stanza(cls, stanza: str) -> Package:
        """Read a paragraph of ``apt-cache show``.

        :raise EnvironmentFault: a field is missing that every index has.
        """
        fields = _fields(stanza)
        try:
            return cls(fields["package"], fields["version"], fields["filename"], _first_choices(fields))
        except KeyError as error:
            raise EnvironmentFault(f"apt describes a package without its {error.args[0]} field") from error


def _first_choices(fields: dict[str, str]) -> tuple[str, ...]:
    text = ",".join(fields.get(name, "") for name in ("pre-depends", "depends"))
    names = (re.match(r"[a-z0-9][a-z0-9+.-]*", choice.strip()) for choice in text.replace("\n", " ").split(","))
    return tuple(dict.fromkeys(name.group() for name in names if name))


class Archive:
    """One suite of Debian's archive for one `architecture`, kept below `cache`.

    Nothing is fetched before it is asked for. An object belongs to one thread; processes may share a cache.
    """

    def __init__(self, cache: Path, suite: str, progress: Progress = silent, *, architecture: str = ARCHITECTURE) -> None:
        self.suite = suite
        self.architecture = architecture
        self.root = cache.absolute() / "debian" / (suite if architecture == ARCHITECTURE else f"{suite}-{architecture}")
        self._progress = progress
        self._packages: dict[str, Package] = {}
        self._asked_mirror = False
        self._configured = False

    # -- the index

    @property
    def _config(self) -> Path:
        return self.root / "apt" / "apt.conf"

    @property
    def _stamp(self) -> Path:
        return self.root / "apt" / "stamp"  # its time is that of the last successful update

    @property
    def _failure(self) -> Path:
        return self.root / "apt" / "failure"  # its time is that of the last update that failed

    def _index_age(self) -> float:
        """Seconds since the index was fetched; infinite when there is none."""
        return _age(self._stamp)

    @property
    def _sources(self) -> Path:
        return self.root / "apt" / "sources.list"

    def _configure(self) -> None:
        """Write apt's private configuration.

        It is read *after* the host's (``apt-get -c``), so that the host's proxies and certificates stay in force while
        every directory, and every hook that would touch the host (Debian's container images empty /var/cache/apt after
        each update), is replaced. It names absolute paths, so each process writes it anew: the cache may have moved.
        """
        apt = self.root / "apt"
        for directory in (apt / "lists" / "partial", apt / "cache" / "archives" / "partial"):
            directory.mkdir(parents=True, exist_ok=True)
        (apt / "status").touch()
        settings = {
            "Dir::State": apt,
            "Dir::State::Lists": apt / "lists",
            "Dir::State::status": apt / "status",
            "Dir::State::extended_states": apt / "extended_states",
            "Dir::Cache": apt / "cache",
            "Dir::Cache::Archives": apt / "cache" / "archives",
            "Dir::Cache::pkgcache": apt / "cache" / "pkgcache.bin",
            "Dir::Cache::srcpkgcache": apt / "cache" / "srcpkgcache.bin",
            "Dir::Etc::SourceList": self._sources,
            "Dir::Etc::SourceParts": "/dev/null",
            "APT::Architecture": self.architecture,
            "APT::Architectures": self.architecture,
            "APT::Update::Error-Mode": "any",  # else a failed fetch is a warning and exit status 0
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Acquire::http::Timeout": "30",
            "Acquire::https::Timeout": "30",
        }
        if os.geteuid() == 0:
            # apt would drop to _apt, who may not read root's cache directory, and warn about it each time.
            settings["APT::Sandbox::User"] = "root"
        lines = ["#clear APT::Update;", "#clear APT::Architectures;", "#clear DPkg;"]
        lines += [f'{name} "{value}";' for name, value in settings.items()]
        _replace(self._config, "\n".join(lines) + "\n")

    def _source_line(self, mirror: str) -> str:
        options = f"arch={self.architecture} target=Packages lang=none pdiffs=no"
        if KEYRING.exists():  # from the package debian-archive-keyring, on a host that is not Debian too
            options += f" signed-by={KEYRING}"
        return f"deb [{options}] {mirror} {self.suite} main\n"

    def _mirror_changed(self) -> bool:
        """Whether the environment names another mirror than the index is from."""
        chosen = os.environ.get("CRASHKERNEL_MIRROR", "").rstrip("/")
        return bool(chosen) and self._sources.exists() and f" {chosen} " not in self._sources.read_text()

    def _update(self) -> None:
        """Fetch the index, once in the life of this object. An old one is good enough when the mirror does not answer.

        :raise EnvironmentFault: there is no index of this mirror and none can be fetched.
        """
        if self._asked_mirror:
            return
        age, changed = self._index_age(), self._mirror_changed()
        if age < float("inf") and not changed and _age(self._failure) < RETRY_AGE:
            return  # a machine without a network should not wait for it in every run
        before = self._sources.read_text() if self._sources.exists() else None
        self._progress(f"fetching the package index of Debian {self.suite}")
        try:
            _replace(self._sources, self._source_line(find_mirror()))
            result = _run(["apt-get", "-c", self._config, "-q", "update"], deadline=UPDATE_DEADLINE)
            if result.returncode:
                raise EnvironmentFault(
                    f"cannot fetch the package index of Debian {self.suite}: {_complaint(result)}",
                    hint=f"is {self.suite!r} a suite of Debian with {self.architecture}, and is the mirror reachable? "
                    "CRASHKERNEL_MIRROR names another",
                )
        except EnvironmentFault as fault:
            if before is not None:
                _replace(self._sources, before)
            if age == float("inf") or changed:
                raise
            self._failure.touch()
            self._progress(f"{fault.message}; going on with the index fetched {age / 3600:.0f} hours ago")
        else:
            self._stamp.touch()
            self._failure.unlink(missing_ok=True)
            self._packages.clear()
        self._asked_mirror = True

    def package(self, name: str) -> Package:
        """What the index knows of package `name`.

        :raise EnvironmentFault: the suite has no such package, or there is no index to be had.
        """
        with self._locked():
            return self._look_up([name])[0]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with locked(self.root / "lock", self._progress):
            if not self._configured:
                self._configure()
                self._configured = True
            yield

    def _look_up(self, names: Sequence[str]) -> list[Package]:
        if self._index_age() > INDEX_AGE or self._mirror_changed():
            self._update()
        if not self._known(names) and self._index_age() > RETRY_AGE:
            self._update()
        if not self._known(names):
            missing = next(name for name in names if name not in self._packages)
            raise EnvironmentFault(
                f"Debian {self.suite} has no package {missing} for {self.architecture}",
                hint="names of kernel flavours: powerpc64le, and powerpc64le-64k from trixie on"
                if self.architecture == ARCHITECTURE and missing.startswith("linux-")
                else "",
            )
        return [self._packages[name] for name in names]

    def _known(self, names: Sequence[str]) -> bool:
        """Whether the index has all of them. One call of apt-cache, a tenth of a second or more, for all that are new."""
        self._recall()
        wanted = [name for name in names if name not in self._packages]
        if wanted:
            # Of a purely virtual package it shows nothing and exits with 0; of an unknown one it complains, shows the
            # rest and exits with 100.
            command: list[str | Path] = ["apt-cache", "-c", self._config, "show", "--no-all-versions", *wanted]
            shown = _run(command, deadline=LOCAL_DEADLINE)
            for stanza in shown.stdout.split("\n\n"):
                if stanza.strip():
                    package = Package.from_stanza(stanza)
                    self._packages.setdefault(package.name, package)
            self._remember()
        return all(name in self._packages for name in names)

    @property
    def _memo(self) -> Path:
        return self.root / "apt" / "known.json"

    def _recall(self) -> None:
        """What apt-cache told others of this index: a drill would ask it ten times, and a campaign has hundreds of drills."""
        if self._packages or not self._stamp.exists():
            return
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # it is only a memo
            memo = json.loads(self._memo.read_text())
            if memo["stamp"] == self._stamp.stat().st_mtime_ns:
                packages = [Package(**{**each, "depends": tuple(each["depends"])}) for each in memo["packages"]]
                self._packages = {package.name: package for package in packages}

    def _remember(self) -> None:
        if self._stamp.exists():
            packages = [asdict(package) for package in self._packages.values()]
            _replace(self._memo, json.dumps({"stamp": self._stamp.stat().st_mtime_ns, "packages": packages}))

    # -- packages

    def depends(self, package: str) -> tuple[str, ...]:
        """Names of the packages that `package` depends on, of each choice the first alternative.

        :raise EnvironmentFault: as `package` does.
        """
        return self.package(package).depends

    def fetch(self, package: str) -> Path:
        """The ``.deb`` of `package`, downloaded and checked by apt the first time.

        :raise EnvironmentFault: no such package, or it cannot be fetched.
        """
        with self._locked():
            return self._fetch(package)

    def _fetch(self, name: str) -> Path:
        record = self._look_up([name])[0]
        target = self.root / "debs" / record.deb
        if target.exists():
            return target
        try:
            return self._download(record)
        except EnvironmentFault:
            # The pool keeps only what its index names: an index of yesterday may name files that are gone.
            if self._asked_mirror:
                raise
            self._update()
            return self._download(self._look_up([name])[0])

    def _download(self, record: Package) -> Path:
        target = self.root / "debs" / record.deb
        target.parent.mkdir(parents=True, exist_ok=True)
        self._progress(f"downloading {record.deb}")
        with tempfile.TemporaryDirectory(prefix=".get-", dir=target.parent) as scratch:
            wanted = f"{record.name}={record.version}"
            result = _run(
                ["apt-get", "-c", self._config, "-q", "download", wanted], deadline=DOWNLOAD_DEADLINE, cwd=Path(scratch)
            )
            found = list(Path(scratch).glob("*.deb"))
            if result.returncode or len(found) != 1:
                raise EnvironmentFault(
                    f"cannot download {record.deb}: {_complaint(result)}",
                    hint="is the mirror reachable? CRASHKERNEL_MIRROR names another",
                )
            found[0].replace(target)
        return target

    def unpack(self, *packages: str) -> Path:
        """The directory that holds the files of the `packages`, all in one tree, unpacked the first time.

        :raise EnvironmentFault: one cannot be fetched or unpacked.
        """
        with self._locked():
            self._look_up(packages)
            debs = [self._fetch(package) for package in packages]
            name = debs[0].stem
            if len(debs) > 1:
                name += "+" + hashlib.sha256("\n".join(deb.stem for deb in debs[1:]).encode()).hexdigest()[:12]
            target = self.root / "trees" / name
            if not target.exists():
                self._progress(f"unpacking {', '.join(deb.name for deb in debs)}")
                _unpack(debs, target)
            return target


class Sources(Archive):
    """One suite's source packages. Their index is one of its own: only who builds something has any use for it."""

    def __init__(self, cache: Path, suite: str, progress: Progress = silent) -> None:
        super().__init__(cache, f"{suite}-sources", progress)
        self.suite = suite

    def _source_line(self, mirror: str) -> str:
        options = "target=Sources lang=none pdiffs=no"
        if KEYRING.exists():
            options += f" signed-by={KEYRING}"
        return f"deb-src [{options}] {mirror} {self.suite} main\n"

    def upstream(self, name: str) -> Path:
        """The upstream archive (.orig.tar) of source package `name`, downloaded and checked by apt the first time.

        :raise EnvironmentFault: no such package, or it cannot be fetched.
        """
        target = self.root / "sources" / name
        with self._locked():
            if not target.exists():
                if self._index_age() > INDEX_AGE or self._mirror_changed():
                    self._update()
                self._download_source(name, target)
        return next(target.glob("*.orig.tar.[!a]*"))  # beside it lies its signature, .asc

    def _download_source(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._progress(f"downloading the source of {name}")
        with tempfile.TemporaryDirectory(prefix=".get-", dir=target.parent) as scratch:
            directory = Path(scratch) / name
            directory.mkdir()
            command: list[str | Path] = ["apt-get", "-c", self._config, "-q", "source", "--download-only", name]
            result = _run(command, deadline=DOWNLOAD_DEADLINE, cwd=directory)
            if result.returncode or not list(directory.glob("*.orig.tar.*")):
                raise EnvironmentFault(
                    f"cannot download the source of {name}: {_complaint(result)}",
                    hint="is the mirror reachable? CRASHKERNEL_MIRROR names another",
                )
            directory.rename(target)


def _unpack(debs: Sequence[Path], target: Path) -> None:
    """Unpack `debs` into the new directory `target`, which appears whole or not at all.

    :raise EnvironmentFault: dpkg-deb is missing or fails (a full disk, a broken file).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpack-", dir=target.parent))
    try:
        scratch.chmod(0o755)
        for deb in debs:
            result = _run(["dpkg-deb", "-x", deb, scratch], deadline=LOCAL_DEADLINE)
            if result.returncode:
                raise EnvironmentFault(
                    f"cannot unpack {deb}: {_complaint(result)}", hint="is the disk full? else remove the file"
                )
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------- the kernel


@dataclass(frozen=True)
class Kernel:
    """A kernel to boot as K1 or to load as K2."""

    spec: str  # what was asked for
    name: str  # its release, as `uname -r` says it
    vmlinux: Path  # a plain ELF64 file for PowerPC
    modules: Path  # …/modules/RELEASE; need not exist for a kernel given by path that has all it needs built in

    @property
    def byteorder(self) -> ByteOrder:
        """Its byte order, which is that of every program it runs."""
        with self.vmlinux.open("rb") as handle:
            return "little" if handle.read(_ELF_HEAD)[_ELF_DATA] == _ELF_DATA_LSB else "big"


def resolve_kernel(spec: str, cache: Path | None = None, progress: Progress = silent) -> Kernel:
    """The kernel that `spec` names: ``debian:SUITE[/FLAVOUR]`` or the path of a vmlinux.

    :raise UsageError: the specification is malformed, or the file does not exist or is no ppc64 kernel.
    :raise EnvironmentFault: the package cannot be had.
    """
    cache = cache or default_cache()
    if not spec.startswith("debian:"):
        return _kernel_from_path(spec, cache)
    match = re.fullmatch(r"debian:([a-z][a-z0-9-]*)(?:/([a-z0-9][a-z0-9+.-]*))?", spec)
    if not match:
        raise UsageError(f"{spec!r} names no kernel", hint=SPEC_HINT)
    return _kernel_from_debian(spec, Archive(cache, match[1], progress), match[2] or DEFAULT_FLAVOUR)


# Debian keeps the kernel and its modules in linux-image-RELEASE; newer releases split it into linux-binary-,
# linux-modules- and linux-base-RELEASE (modules.builtin). linux-base without a suffix is scripts.
_KERNEL_PACKAGE = re.compile(r"linux-(?:image|binary|modules|base)-.+")


def _kernel_from_debian(spec: str, archive: Archive, flavour: str) -> Kernel:
    packages = [f"linux-image-{flavour}"]
    for package in packages:  # grows as it is walked
        packages += [name for name in archive.depends(package) if _KERNEL_PACKAGE.fullmatch(name) and name not in packages]
    tree = archive.unpack(*packages)
    candidates = [
        path
        for pattern in ("boot/vmlinu[xz]-*", "usr/lib/modules/*/vmlinu[xz]", "lib/modules/*/vmlinu[xz]")
        for path in sorted(tree.glob(pattern))
    ]
    if len(candidates) != 1:
        raise EnvironmentFault(
            f"{len(candidates)} kernels in {', '.join(packages)} of Debian {archive.suite}, expected one",
            hint=f"unpacked in {tree}",
        )
    vmlinux = plain_vmlinux(candidates[0], archive.root / "vmlinux")
    name = read_release(vmlinux)
    for base in (tree / "usr" / "lib" / "modules", tree / "lib" / "modules"):
        if (base / name).is_dir():
            return Kernel(spec, name, vmlinux, base / name)
    raise EnvironmentFault(f"the packages of kernel {name} hold no modules", hint=f"unpacked in {tree}")


def _kernel_from_path(spec: str, cache: Path) -> Kernel:
    path = Path(spec).absolute()
    if not path.is_file():
        raise UsageError(f"{spec}: no such file", hint=SPEC_HINT)
    vmlinux = plain_vmlinux(path, cache / "vmlinux")
    name = read_release(vmlinux)
    # Beside it, in a package's tree (boot/ and lib/ or usr/lib/ are siblings), in an installed one, on this host.
    places = (
        path.parent / "lib" / "modules" / name,
        path.parent / "modules" / name,
        path.parent.parent / "lib" / "modules" / name,
        path.parent.parent / "usr" / "lib" / "modules" / name,
        path.parent,
        Path("/lib/modules") / name,
    )
    for place in places:
        if place.name == name and place.is_dir():
            return Kernel(spec, name, vmlinux, place)
    return Kernel(spec, name, vmlinux, places[0])


# The start of Elf64_Ehdr (System V gABI, chapter 4): e_ident (class at 4, byte order at 5), e_type, e_machine.
_ELF_HEAD = 20  # bytes
_ELF_CLASS64 = 2
_ELF_DATA = 5  # offset
_ELF_DATA_LSB = 1
_E_MACHINE = 18  # offset
_EM_PPC64 = 21


def plain_vmlinux(path: Path, store: Path) -> Path:
    """`path` itself if it is an ELF64 vmlinux for PowerPC, else one decompressed from it into the directory `store`.

    Debian's are plain on ppc64el, whatever they are called (sid's ``vmlinuz`` is one); other distributions compress the
    whole file with gzip or xz.

    :raise UsageError: it is neither.
    """
    with path.open("rb") as handle:
        head = handle.read(_ELF_HEAD)
    opener: Callable[[Path], gzip.GzipFile | lzma.LZMAFile]
    if head.startswith(b"\x1f\x8b"):
        opener = gzip.GzipFile
    elif head.startswith(b"\xfd7zXZ\0"):
        opener = lzma.LZMAFile
    else:
        _require_ppc64(path, head)
        return path
    status = path.stat()
    # A file replaced under its name has another size or time.
    key = hashlib.sha256(f"{path}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()[:16]
    target = store / f"vmlinux-{key}"
    if not target.exists():
        store.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=store, prefix=".vmlinux-")
        try:
            with open(descriptor, "wb") as sink, opener(path) as source:  # noqa: PTH123 - a descriptor, not a path
                shutil.copyfileobj(source, sink, 1 << 20)
            with Path(scratch).open("rb") as handle:
                _require_ppc64(path, handle.read(_ELF_HEAD))
            Path(scratch).rename(target)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise UsageError(f"{path}: cannot be decompressed: {error}", hint=SPEC_HINT) from error
        finally:
            Path(scratch).unlink(missing_ok=True)
    return target


def _require_ppc64(path: Path, head: bytes) -> None:
    hint = "the drill boots 64-bit PowerPC kernels: give the vmlinux, not a zImage"
    if len(head) < _ELF_HEAD or not head.startswith(b"\x7fELF"):
        raise UsageError(f"{path}: not an ELF file", hint=hint)
    machine = int.from_bytes(head[_E_MACHINE : _E_MACHINE + 2], "little" if head[_ELF_DATA] == _ELF_DATA_LSB else "big")
    if head[4] != _ELF_CLASS64 or machine != _EM_PPC64:
        raise UsageError(f"{path}: an ELF file, but not a 64-bit PowerPC one", hint=hint)


def read_release(vmlinux: Path) -> str:
    """The release of a kernel, from the banner in it (``linux_banner``, init/version.c): what ``uname -r`` will say.

    :raise UsageError: no banner: not a kernel.
    """
    with vmlinux.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        match = re.search(rb"Linux version ([0-9][!-~]{0,63}) \(", data)
        if not match:
            raise UsageError(f"{vmlinux}: no 'Linux version' banner in it", hint=SPEC_HINT)
        return match[1].decode()
