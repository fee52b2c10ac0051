"""A dump made into one of another format or codec, whole or not at all.

If only the form changes (kdump-compressed to flattened or back) its bytes are put elsewhere and nothing is compressed anew.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from crashkernel.capture.codec import CODECS, Codec, codec_by_name, codec_for_flag, missing
from crashkernel.capture.crew import Crew
from crashkernel.capture.selection import DL_ZERO, PageClass, Selection
from crashkernel.capture.writer import Progress, Written, write_dump
from crashkernel.dump.dumpfile import Dump, KdumpFile, count_pages, how_whole, open_dump, require_file, stored_pages
from crashkernel.dump.inspection import Counter, Tell, check_digest, find_manifest
from crashkernel.dump.structure import FaultList
from crashkernel.errors import CrashkernelError, EnvironmentFault, FormatError, UsageError, VerificationError
from crashkernel.formats import diskdump, flattened
from crashkernel.formats.elf import EM_PPC64
from crashkernel.target.files import create_file, flush_directory, give_name, name_dump, write_all
from crashkernel.target.manifest import PIECE_SIZE, Contents, DumpFormat, Manifest, PageCounts, digest_file
from crashkernel.target.unpacking import Unpacker
from crashkernel.vmcore.identity import Identity
from crashkernel.vmcore.kernel import CrashedKernel

Form = Literal["kdump", "flattened", "elf"]
FORMS: tuple[Form, ...] = ("kdump", "flattened", "elf")

STANDARD = Path("-")
"""Standard input or output."""

_FORMAT_NAMES: dict[Form, DumpFormat] = {"kdump": "kdump-compressed", "flattened": "flattened", "elf": "elf"}
_COPY_SIZE = 1 << 20
# Where the kernel's linear mapping may begin and vmalloc may end, with 4 and with 5 levels of page tables (mm.rst).
_X86_64_LINEAR = ((0xFFFF_8880_0000_0000, 0xFFFF_E900_0000_0000), (0xFF11_0000_0000_0000, 0xFFD2_0000_0000_0000))


@dataclass(frozen=True, slots=True)
class Converted:
    """What was made: its size in bytes, and its manifest if the dump that it was made from had one."""

    size: int
    manifest: Manifest | None


def convert(
    source: Path, output: Path, form: Form, codec: str | None = None, *, tell: Tell = lambda *_: None
) -> Converted | None:
    """Make `source` into `output`. `codec` None keeps the dump's own.

    Either may be `STANDARD`: what is read there is put into a file first, and must be a flattened stream; what is written there
    must be a format that is written in order, so flattened or ELF, and nothing is returned. A new manifest is written only for
    a dump that was held against its own.

    :raise UsageError: the request makes no sense: the output is there already, or cannot be of that format.
    :raise FormatError: the source is no dump.
    :raise VerificationError: the source is not whole, or not what its manifest says: no dump that looks whole is made of it.
    :raise EnvironmentFault: the source cannot be read, the output not be written, or a codec is not installed.
    """
    if output == STANDARD and form == "kdump":
        raise UsageError(
            "a kdump-compressed dump is not written in order, so not to standard output",
            hint="give a file, or --format flattened",
        )
    if form == "elf" and codec not in (None, "none"):
        raise UsageError(f"a plain ELF dump is not compressed with {codec}", hint="leave --codec out")
    if source != STANDARD:
        require_file(source)
    if output != STANDARD and os.path.lexists(output):
        same = source != STANDARD and output.exists() and source.samefile(output)
        raise UsageError(
            f"{output} is the dump to be converted" if same else f"{output} is there already",
            hint="give the name of a new file",
        )
    with contextlib.ExitStack() as stack:
        path = source
        if source == STANDARD:
            path = stack.enter_context(_spooled(output))
        manifest = _checked_manifest(path, tell) if source != STANDARD else None
        dump = open_dump(path)
        stack.callback(dump.close)
        _refuse_partial(dump)
        own = _codec_of(dump)
        moved = form != "elf" and isinstance(dump, KdumpFile) and codec in (None, own.name)
        chosen = own if moved else _codec(dump, form, codec)

        selection = stored_pages(dump, None if manifest is None else manifest.contents.level)

        def write(descriptor: int) -> Contents | None:
            written = None
            if isinstance(dump, KdumpFile) and moved:
                _move(dump, descriptor, form, tell)
            else:
                written = _rewrite(dump, selection, descriptor, form, chosen, tell, output == STANDARD)
            if manifest is None:
                return None
            contents = replace(manifest.contents, format=_FORMAT_NAMES[form], codec=chosen.name, level=selection.level)
            return contents if written is None else replace(contents, pages=_counted(contents.pages, written))

        if output == STANDARD:
            _write_out(write)
            return None
        return _write_whole(output, write, tell)


def _counted(before: PageCounts, written: Written) -> PageCounts:
    """The pages of a dump made of another, of which its writer counted `before`.

    In a plain ELF dump pages that were dropped stand between kept ones that were near to each other. They are kept by now; of
    which class they were nobody can say, so these numbers stay what the filter counted.
    """
    return replace(before, kept=written.classes[PageClass.KEPT], zero=written.zero)


def _codec(dump: Dump, form: Form, name: str | None) -> Codec:
    """The codec to write pages anew with.

    :raise EnvironmentFault: its library is not here, or that of the dump's own.
    """
    own = _codec_of(dump)
    if own.name != "zlib" and (why := missing(own)):  # zlib's decompressor is Python's own
        raise EnvironmentFault(why)
    if form == "elf":
        return codec_by_name("none")
    if name is None:
        return next(codec for codec in CODECS if not missing(codec))
    codec = codec_by_name(name)
    if why := missing(codec):
        raise EnvironmentFault(why)
    return codec


def _codec_of(dump: Dump) -> Codec:
    flag = dump.header.status & diskdump.COMPRESSED if isinstance(dump, KdumpFile) else 0
    return codec_for_flag(flag)


def _checked_manifest(path: Path, tell: Tell) -> Manifest | None:
    """The manifest of the dump, which its bytes match, if it has one."""
    try:
        manifest, start = find_manifest(path)
    except FormatError as error:
        raise VerificationError(str(error), hint="crashkernel verify says more") from error
    if manifest is None or manifest.encrypted_to is not None:
        return None
    faults = FaultList()
    check_digest(path, manifest, start, faults, tell)
    if faults.count:
        raise VerificationError(f"{path}: {faults.first[0]}", hint="crashkernel verify says more")
    return manifest


def _refuse_partial(dump: Dump) -> None:
    whole = how_whole(dump, count_pages(dump))
    if whole.completeness != "whole":
        raise VerificationError(
            f"{dump.name} is incomplete ({whole.reasons[0]}): what is made of it would look like a whole dump",
            hint="crashkernel inspect reads it",
        )


# ------------------------------------------------------------------------------------------------------ in and out


@contextlib.contextmanager
def _spooled(output: Path) -> Iterator[Path]:
    """What comes in on standard input, as a file beside the output."""
    directory = None if output == STANDARD else output.absolute().parent
    with contextlib.ExitStack() as stack:
        try:
            spool = stack.enter_context(
                tempfile.NamedTemporaryFile(dir=directory, prefix=".crashkernel-", suffix=".incomplete")
            )
            unpacker = Unpacker(spool.fileno())
            while data := sys.stdin.buffer.read(_COPY_SIZE):
                unpacker.put(data)
            unpacker.finish()
        except OSError as error:
            raise EnvironmentFault(f"cannot keep what comes in on standard input: {error.strerror}") from error
        try:
            yield Path(spool.name)
        except CrashkernelError as error:  # of a file that nobody but us has heard of
            error.message = error.message.replace(spool.name, "standard input")
            error.args = (error.message,)
            raise


def _write_out(write: Callable[[int], object]) -> None:
    """Have a dump written to standard output."""
    try:
        write(sys.stdout.fileno())
    except BrokenPipeError:
        raise  # its reader has had enough
    except OSError as error:
        raise EnvironmentFault(f"cannot write to standard output: {error.strerror}") from error


def _write_whole(output: Path, write: Callable[[int], Contents | None], tell: Tell) -> Converted:
    """Have a file written, and give it its name when it is whole; `write` says what its manifest, if any, says of it."""
    try:
        descriptor, scratch = create_file(output.parent, output.name)
        try:
            contents = write(descriptor)
            size = os.fstat(descriptor).st_size
            os.fsync(descriptor)
            if contents is None:
                give_name(scratch, output)
                flush_directory(output.parent)
                return Converted(size, None)
            pieces = Counter("digest", -(-size // PIECE_SIZE), tell)
            manifest = Manifest(output.name, size, digest_file(descriptor, size, progress=pieces.count), contents)
            name_dump(scratch, manifest)
            return Converted(size, manifest)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise EnvironmentFault(f"cannot write {output}: {error.strerror}") from error


_PADDING = 1 << 26
"""Bytes that a dump has beside its headers and pages at the most: erase information, and what its writer aligned."""


def _move(dump: KdumpFile, descriptor: int, form: Form, tell: Tell) -> None:
    """Write a dump's bytes as they are, as a file or as a flattened stream.

    :raise FormatError: it ends far behind all that it has: one record of a stream, put there, would fill the disk.
    :raise EnvironmentFault: it became shorter meanwhile.
    """
    header, size = dump.header, dump.data.size
    # each page's data at their largest
    end = header.descriptors_offset + dump.pages * (diskdump.DESCRIPTOR_SIZE + dump.page_size)
    # what of a stream no record is about is zeros, as parts of the bitmaps can be
    stored = dump.data.stored + 2 * -(-dump.max_pfn // 8)
    if size > min(end, stored) + _PADDING:
        raise FormatError(
            f"it ends at {size:#x}, far behind all that is in it",
            source=dump.name,
            hint="a damaged stream, or a device that is larger than its dump",
        )
    if form == "flattened":
        write_all(descriptor, flattened.HEADER)
    for at in range(0, size, _COPY_SIZE):
        data = dump.data.read(at, min(_COPY_SIZE, size - at))
        if len(data) < min(_COPY_SIZE, size - at):
            raise EnvironmentFault(f"{dump.name} ends at offset {at + len(data):#x}: it became shorter while it was read")
        if form == "flattened":
            write_all(descriptor, flattened.record_header(at, len(data)))
        write_all(descriptor, data)
        tell("bytes", at + len(data), size)
    if form == "flattened":
        write_all(descriptor, flattened.END)


def _rewrite(
    dump: Dump, selection: Selection, descriptor: int, form: Form, codec: Codec, tell: Tell, streamed: bool
) -> Written:
    """Read all pages of a dump and write them anew; `streamed` out of our hands, not to a file that can be taken back.

    :raise VerificationError: a page cannot be read; what was written lacks its end.
    """
    kernel = CrashedKernel(dump)
    drop_zeros = form != "elf" and bool(selection.level & DL_ZERO)

    def listen(progress: Progress) -> None:
        if progress.unreadable:  # now, before the writer comes to its end: a reader would take that for a whole dump
            raise VerificationError(f"{dump.name}: a page of it cannot be read", hint="crashkernel verify says which, and why")
        if progress.copying:
            tell("pages", progress.done, progress.total)

    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(Crew(dump, selection, codec, len(os.sched_getaffinity(0)), drop_zeros))
        # the workers are forked by now, or they would hold the pipe open
        where = stack.enter_context(_in_order(descriptor)) if streamed or form == "flattened" else descriptor
        return write_dump(_identity(dump, kernel), crew, where, "elf" if form == "elf" else "kdump", listen)


@contextlib.contextmanager
def _in_order(descriptor: int) -> Iterator[int]:
    """A pipe whose other end is copied to `descriptor`: the writer makes a flattened stream of what it cannot seek in.

    The last piece goes only when all went well. A plain ELF dump would else be whole before its last page is known to be bad.
    """
    reader, writer = os.pipe()
    failed: list[OSError] = []
    well = False

    def copy() -> None:
        last = b""
        try:
            while data := os.read(reader, _COPY_SIZE):
                write_all(descriptor, last)
                last = data
            if well:
                write_all(descriptor, last)
        except OSError as error:
            failed.append(error)
        finally:
            os.close(reader)

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield writer
        well = True
    except BrokenPipeError:
        if not failed:
            raise
    finally:
        os.close(writer)
        thread.join()
    if failed:
        raise failed[0]


# ------------------------------------------------------------------------------------------------------------ who it was


def _identity(dump: Dump, kernel: CrashedKernel) -> Identity:
    if not isinstance(dump, KdumpFile):
        return Identity.of(kernel)
    phys_base = dump.sub_header.phys_base
    linear_base = dump.linear_base if dump.machine == EM_PPC64 else _x86_64_linear_base(kernel)
    return Identity(dump.header.utsname, phys_base - (phys_base >> 63 << 64), linear_base, dump.header.timestamp)


def _x86_64_linear_base(kernel: CrashedKernel) -> int | None:
    """Where physical memory is mapped, by the kernel's page table; a kdump-compressed dump does not say."""
    five_levels = kernel.info.get("NUMBER(pgtable_l5_enabled)", "0") != "0"
    for span in kernel.spans(*_X86_64_LINEAR[five_levels]):
        return span.vaddr - span.paddr
    return None
