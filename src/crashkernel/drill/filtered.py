"""The verdict on a dump of `crashkernel capture`: is what it has K1's, and was it allowed to lack what it has not?

A filtered dump cannot be compared whole. So each page of K1's memory must be in it with the truth's bytes, or be of a class
that the dump level drops, as `oracle` sees it in the truth. The file is read by `kdump`, the log and the manifest beside it
are read here: nothing of `capture` grades itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crashkernel.drill.kdump import KdumpFile
from crashkernel.drill.oracle import May, Oracle, droppable
from crashkernel.drill.saving import Saving
from crashkernel.drill.verdict import (
    PageCount,
    Truth,
    Verdict,
    WrongRange,
    begin_verdict,
    count_wrong,
    describe_place,
    excuse,
    judge_registers,
    summarise,
    wrong_blocks,
)
from crashkernel.errors import CrashkernelError, EnvironmentFault, VerificationError
from crashkernel.formats.elf import ByteOrder, iter_notes
from crashkernel.formats.vmcoreinfo import VmcoreInfo
from crashkernel.machine import HEAD_SIZE
from crashkernel.memory import Range, RangeSet

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from crashkernel.drill.verdict import Wrong
    from crashkernel.placement.plan import LoadPlan

_CHUNK = 8 << 20  # bytes compared at once
_BYTEORDER: ByteOrder = "little"  # of every K1 that Debian has numpy for
_MACHINE = "ppc64le"
_PIECE = 4 << 20  # bytes of a dump that are hashed at once; the digest is over the hashes
_MAX_RANGES = 64
_NEEDLESS = 0.05  # of the pages that the level drops may be kept: more, and the filter did not do its work
_STATUS = {"none": 0, "zlib": 1, "lzo": 2, "snappy": 4, "zstd": 0x20}  # DUMP_DH_COMPRESSED_* of diskdump_mod.h
_NAME = "vmcore"  # of a dump where it was saved; on the host it may have another

CLASSES = {
    May.CACHE: "page cache",
    May.CACHE_PRIVATE: "page cache with private data",
    May.USER: "user",
    May.FREE: "free",
    May.POISONED: "poisoned",
    May.OFFLINE: "offline",
    May.ZERO: "zeros",  # last: what is free, and zeros, is free
}
_MANIFEST_FIELDS = {
    May.CACHE: "cache",
    May.CACHE_PRIVATE: "cache_private",
    May.USER: "user",
    May.FREE: "free",
    May.POISONED: "poisoned",
    May.OFFLINE: "offline",
}


@dataclass(frozen=True, slots=True)
class SavedDump:
    """What came out of K2, as files on the host."""

    dump: Path
    log: Path
    manifest: Path


def judge_filtered(saved: SavedDump, saving: Saving, truth: Truth, plan: LoadPlan) -> Verdict:
    """Hold a filtered dump against the truth. Never raises for a bad dump: what is wrong with it is in the verdict.

    :raise EnvironmentFault: a library to decompress it with is missing.
    """
    verdict = begin_verdict(truth, plan)
    memory = np.memmap(truth.memory, np.uint8, "r")
    try:
        with KdumpFile(saved.dump, _BYTEORDER) as file:
            _Judge(file, memory, saving, truth, plan, verdict).judge()
            _judge_manifest(saved, saving, file, truth, verdict)
        _judge_log(saved.log, truth, verdict)
    except EnvironmentFault:
        raise
    except CrashkernelError as error:
        verdict.problems.append(error.message)
    except OSError as error:
        verdict.problems.append(f"{error.filename}: {error.strerror}")
    summarise(verdict)
    return verdict


class _Judge:
    """One dump that could be opened."""

    def __init__(
        self, file: KdumpFile, memory: NDArray[np.uint8], saving: Saving, truth: Truth, plan: LoadPlan, verdict: Verdict
    ) -> None:
        self._file, self._memory, self._saving = file, memory, saving
        self._truth, self._plan, self._verdict = truth, plan, verdict
        self._size = file.page_size
        self._pages = len(memory) // self._size
        self._k1 = self._as_pages(truth.k1_memory)
        self._kept = self._from_numbers(file.pfns)
        self._right = np.zeros(self._pages, np.bool_)  # kept, with the truth's bytes

    def judge(self) -> None:
        self._judge_header()
        self._judge_extent()
        self._compare()
        self._judge_what_is_left_out()
        self._judge_marks()

    def _problem(self, text: str) -> None:
        self._verdict.problems.append(text)

    def _as_pages(self, ranges: RangeSet) -> NDArray[np.bool_]:
        pages = np.zeros(self._pages, np.bool_)
        for each in ranges:
            pages[each.start // self._size : each.end // self._size] = True
        return pages

    def _from_numbers(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        pages = np.zeros(self._pages, np.bool_)
        pages[numbers[numbers < self._pages]] = True
        return pages

    def _places(self, pages: NDArray[np.bool_]) -> str:
        """Pages as ranges of physical addresses, the first few."""
        ranges = list(self._ranges(pages))
        more = f" and {len(ranges) - 4} more" if len(ranges) > 4 else ""
        return " ".join(str(each) for each in ranges[:4]) + more

    def _ranges(self, pages: NDArray[np.bool_]) -> Iterator[Range]:
        edges = np.flatnonzero(np.diff(pages.astype(np.int8), prepend=0, append=0))
        for start, end in edges.reshape(-1, 2).tolist():
            yield Range(start * self._size, end * self._size)

    # -- what it says of itself

    def _judge_header(self) -> None:
        file, truth = self._file, self._truth
        if file.level != self._saving.level:
            self._problem(f"the dump says level {file.level}, level {self._saving.level} was asked for")
        if file.status != _STATUS[self._saving.codec]:
            said = next((name for name, status in _STATUS.items() if status == file.status), f"status {file.status:#x}")
            self._problem(f"the dump says {said}, {self._saving.codec} was asked for")
        if (file.utsname[2], file.utsname[4]) != (truth.release, _MACHINE):
            self._problem(f"the dump says it is of {file.utsname[2]} {file.utsname[4]}, K1 was {truth.release} {_MACHINE}")
        if file.vmcoreinfo != self._true_vmcoreinfo:
            self._problem("the dump's VMCOREINFO is not what K1 had in memory")
        notes = iter_notes(file.notes, _BYTEORDER, file.name)
        judge_registers(notes, _BYTEORDER, truth, self._plan, self._verdict)

    @property
    def _true_vmcoreinfo(self) -> bytes:
        """VMCOREINFO as it lies in the truth; the plan says where K1's notes are.

        :raise VerificationError: it is not there.
        """
        for place in self._plan.notes:
            data = self._memory[place.start : place.end].tobytes()
            for note in iter_notes(data, _BYTEORDER, "the truth"):
                if note.name == "VMCOREINFO":
                    return note.desc
        raise VerificationError("K1 left no VMCOREINFO where the plan says")

    def _judge_extent(self) -> None:
        described = self._from_numbers(self._file.described)
        beyond = int((self._file.described >= self._pages).sum())
        if beyond or (described & ~self._k1).any():
            where = self._places(described & ~self._k1) or f"beyond {self._truth.memory_size:#x}"
            self._problem(f"the dump has pages that are no memory of K1's: {where}")
        if (self._k1 & ~described).any():
            self._problem(f"the dump knows nothing of K1's {self._places(self._k1 & ~described)}")

    # -- what it has

    def _compare(self) -> None:
        """Every kept page against the truth."""
        verdict, size = self._verdict, self._size
        at_once = _CHUNK // size
        ours = bytearray(_CHUNK)
        wrong: list[Wrong] = []
        rows = self._memory[: self._pages * size].reshape(self._pages, size)
        for first in range(0, len(self._file.pfns), at_once):
            numbers = self._file.pfns[first : first + at_once]
            if numbers[-1] >= self._pages:
                break  # told already
            self._file.read(first, len(numbers), ours)
            mine = np.frombuffer(ours, np.uint8, len(numbers) * size).reshape(-1, size)
            theirs = rows[numbers]
            if numbers[0] == 0:
                theirs[0, :HEAD_SIZE] = np.frombuffer(self._truth.head, np.uint8)
                verdict.first_256_bytes_ok = bool((mine[0, :HEAD_SIZE] == theirs[0, :HEAD_SIZE]).all())
            same = (mine == theirs).all(axis=1)
            self._right[numbers] = same
            for number in np.flatnonzero(~same).tolist():
                pair = memoryview(mine[number].tobytes()), memoryview(theirs[number].tobytes())
                bad = list(excuse(wrong_blocks(*pair, size, int(numbers[number]) * size), self._truth, verdict))
                self._right[numbers[number]] = not bad
                wrong += bad
        verdict.bytes_compared = int((self._kept & self._k1).sum()) * size
        count_wrong(wrong, self._plan, verdict)

    # -- what it has not

    def _judge_what_is_left_out(self) -> None:
        verdict, size = self._verdict, self._size
        may_be = Oracle(self._memory, VmcoreInfo.from_bytes(self._true_vmcoreinfo, "the truth"), _BYTEORDER).may_be()
        out = self._k1 & ~self._kept
        self._judge_needless(may_be)
        may_be[self._zeros(out)] |= np.uint8(May.ZERO)
        allowed = may_be & np.uint8(droppable(self._saving.level)) != 0
        lost = out & ~allowed
        verdict.bytes_left_out = int((out & allowed).sum()) * size
        verdict.bytes_missing = int(lost.sum()) * size
        self._lost(lost)
        left_out, uncounted = {}, out & allowed
        for each, name in CLASSES.items():
            those = uncounted & (may_be & np.uint8(each) != 0)
            if those.any():
                left_out[name] = int(those.sum())
            uncounted &= ~those
        verdict.pages = PageCount(
            level=self._saving.level,
            page_size=size,
            kept=len(self._file.pfns),
            zeros=self._file.zero_pages,
            left_out=left_out,
            lost=int(lost.sum()),
            needless=int((self._kept & self._k1 & allowed).sum()),
            dump_bytes=self._file.size,
        )

    def _judge_needless(self, may_be: NDArray[np.uint8]) -> None:
        """A filter that keeps what it should drop loses nothing, but is none. Zeros do not count: kept ones take no room."""
        wanted = self._k1 & (may_be & np.uint8(droppable(self._saving.level)) != 0)
        needless = wanted & self._kept
        count, total = int(needless.sum()), int(wanted.sum())
        if count > total * _NEEDLESS:
            classes = [
                f"{of_class:,} {name}"
                for each, name in CLASSES.items()
                if (of_class := int((needless & (may_be & np.uint8(each) != 0)).sum()))
            ]
            self._problem(
                f"{count:,} of the {total:,} pages that level {self._saving.level} drops are kept, "
                f"more than {_NEEDLESS:.0%}: {', '.join(classes)}"
            )

    def _zeros(self, pages: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Which of them are all zeros in the truth."""
        numbers = np.flatnonzero(pages)
        words = self._memory[: self._pages * self._size].view(np.uint64).reshape(self._pages, -1)
        at_once = _CHUNK // self._size
        chunks = (numbers[at : at + at_once] for at in range(0, len(numbers), at_once))
        return np.concatenate([np.empty(0, np.int64), *(chunk[~words[chunk].any(axis=1)] for chunk in chunks)])

    def _lost(self, lost: NDArray[np.bool_]) -> None:
        for each in list(self._ranges(lost))[:_MAX_RANGES]:
            what = describe_place(each.start, self._plan)
            self._verdict.wrong_ranges.append(WrongRange(each, each.size, what, "left out of the dump"))
        if lost.any():
            self._problem(f"{int(lost.sum()):,} pages are left out that level {self._saving.level} keeps: {self._places(lost)}")

    # -- is it this crash's?

    def _judge_marks(self) -> None:
        truth, verdict = self._truth, self._verdict
        verdict.nonce_found = self._has(truth.nonce.hex().encode())
        verdict.panic_found = self._has(truth.panic.encode()) if truth.panic else not truth.says_why
        if not verdict.nonce_found:
            self._problem("this run's nonce, which K1's log has, is not in the dump: another crash's dump, or memory is lost")
        if not verdict.panic_found:
            self._problem(f"this crash's panic message is not in the dump: {truth.panic!r}")

    def _has(self, mark: bytes) -> bool:
        """Whether the dump has, somewhere, the pages where the truth has `mark`, with the truth's bytes."""
        with self._truth.memory.open("rb") as file:
            return any(
                self._right[at // self._size : (end - 1) // self._size + 1].all() for at, end in _occurrences(file, mark)
            )


def _occurrences(file: Any, mark: bytes) -> Iterator[tuple[int, int]]:
    """Where `mark` lies in a file, from and to."""
    tail, base = b"", 0
    while chunk := file.read(_CHUNK):
        data = tail + chunk
        at = data.find(mark)
        while at >= 0:
            yield base + at, base + at + len(mark)
            at = data.find(mark, at + 1)
        tail = data[-(len(mark) - 1) :]
        base += len(data) - len(tail)


# ------------------------------------------------------------------------------------------------------ what lies beside


def _judge_log(log: Path, truth: Truth, verdict: Verdict) -> None:
    """K1's log, saved before the dump, must have this run's nonce and the panic."""
    text = log.read_text("utf-8", "replace")
    for what, mark in (("this run's nonce", truth.nonce.hex()), ("the panic message", truth.panic)):
        if mark not in text:
            verdict.problems.append(f"{log.name} does not have {what}")


def _judge_manifest(saved: SavedDump, saving: Saving, file: KdumpFile, truth: Truth, verdict: Verdict) -> None:
    """The manifest must be true, all of it but the time of the crash: the file, its digest, the pages, the crash, itself."""
    try:
        raw = json.loads(saved.manifest.read_text())
        pages, said, digest = raw["pages"], raw["dump"], raw["digest"]
        facts = {
            "version": (raw["manifest"], 1),
            "file": (raw["file"], _NAME),
            "complete": (raw["complete"], True),
            "bytes": (raw["bytes"], file.size),
            "digest's algorithm": (digest["algorithm"], "sha256-pieces"),
            "digest's piece size": (digest["piece_size"], _PIECE),
            "digest": (digest["root"], _digest(saved.dump)),
            "recipient": (raw["encrypted_to"], None),
            "format": (said["format"], "kdump-compressed"),
            "level": (said["level"], saving.level),
            "codec": (said["codec"], saving.codec),
            "page size": (said["page_size"], file.page_size),
            "kernel": (raw["crash"]["release"], truth.release),
            "machine": (raw["crash"]["machine"], _MACHINE),
            "panic message": (raw["crash"]["panic"], truth.panic),
            "sign-off": (raw["sign_off"], _sign_off(raw)),
        }
        counts = {name: int(pages[name]) for name in ("kept", "zero", "unreadable", *_MANIFEST_FIELDS.values())}
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(f"{saved.manifest.name} is no manifest: {error!r}") from error
    for what, (claimed, true) in facts.items():
        if claimed != true:
            verdict.problems.append(f"the manifest's {what} is {claimed!r}, not {true!r}")
    _judge_counts(counts, file, verdict)


def _judge_counts(counts: dict[str, int], file: KdumpFile, verdict: Verdict) -> None:
    """The manifest's page counts, each as the dump and the oracle have it: what is kept, what is zeros, what is left out."""
    found = verdict.pages
    if found is None:
        return
    true = {"kept": found.kept, "zero": found.zeros}
    true |= {name: found.left_out.get(CLASSES[each], 0) for each, name in _MANIFEST_FIELDS.items()}
    for name, count in true.items():
        if counts[name] != count:
            verdict.problems.append(f"the manifest counts {counts[name]:,} pages {name}, the dump has {count:,}")
    if counts["unreadable"]:
        verdict.problems.append(f"{counts['unreadable']:,} pages could not be read")
    total = sum(count for name, count in counts.items() if name not in ("zero", "unreadable"))  # which are among those kept
    if total != len(file.described):
        verdict.problems.append(f"the manifest counts {total:,} pages, the dump tells of {len(file.described):,}")


def _sign_off(raw: dict[str, Any]) -> str:
    """The sha256 of all the other fields: their JSON, keys sorted, without a space, other characters than ASCII escaped."""
    others = {name: value for name, value in raw.items() if name != "sign_off"}
    return hashlib.sha256(json.dumps(others, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest(path: Path) -> str:
    """The sha256 of the sha256s of the file's pieces."""
    root = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            root.update(hashlib.sha256(piece).digest())
    return root.hexdigest()
