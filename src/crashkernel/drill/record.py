"""A drill's outcome as JSON, and the evidence of a kept drill, so that it can be judged again by anyone."""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from crashkernel.drill.accounting import account
from crashkernel.drill.arrival import LOG, MANIFEST
from crashkernel.drill.faults.damage import RogueDma
from crashkernel.drill.filtered import SavedDump, judge_filtered
from crashkernel.drill.guest_driver import ELSEWHERE
from crashkernel.drill.saving import Saving
from crashkernel.drill.sparse import copy_sparse
from crashkernel.drill.stages import CONSOLE
from crashkernel.drill.verdict import Truth, Verdict, judge
from crashkernel.errors import FormatError, UsageError
from crashkernel.formats import fields
from crashkernel.machine import Region
from crashkernel.memory import RangeSet
from crashkernel.placement.plan import LoadPlan

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from crashkernel.drill.dma import DmaReport
    from crashkernel.drill.scenario import Outcome
    from crashkernel.memory import Range

DUMP, TRUTH, PLAN, EVIDENCE = "vmcore", "truth", "plan.json", "evidence.json"
"""Names of the files of a kept drill."""


def outcome_record(outcome: Outcome) -> dict[str, Any]:
    """One placement's result; the fields are the documented ones, sizes in bytes, times in seconds."""
    verdict = outcome.verdict or Verdict()
    failure = outcome.failure
    accounting = account(outcome.footprint, outcome.plan, outcome.scenario.twin.mmu) if outcome.plan else None
    return {
        "placement": outcome.scenario.placement,
        "command": shlex.join(outcome.scenario.request.command()),
        "verdict": "PASS" if outcome.passed else "FAIL",
        **verdict_record(verdict),
        "quarantine": not outcome.scenario.request.no_quarantine,
        "faults": [
            {"word": fault.word, "title": fault.title, "expects": fault.expects, "told": fault.told} for fault in outcome.faults
        ],
        "dma": next((dma_record(fault.report) for fault in outcome.faults if isinstance(fault, RogueDma)), None),
        "capture": None if outcome.scenario.saving is None else capture_record(outcome.scenario.saving, outcome),
        "accounting": None if accounting is None else accounting.record(),
        "failure": None
        if failure is None
        else {"stage": failure.stage, "message": failure.message, "likely": failure.hint, "console": list(failure.console)},
        "stages": outcome.stages,
        "seconds": outcome.seconds,
        "kernel": outcome.scenario.k1.name,
        "capture_kernel": outcome.scenario.k2.name,
        "machine": outcome.scenario.twin.title,
        "dump": str(outcome.dump) if outcome.dump else None,
        "plan": json.loads(outcome.plan.to_json()) if outcome.plan else None,
    }


def verdict_record(verdict: Verdict) -> dict[str, Any]:
    """The verdict's part of the record."""
    return {
        "k1_bytes": verdict.k1_bytes,
        "bytes_compared": verdict.bytes_compared,
        "bytes_wrong": verdict.bytes_wrong,
        "bytes_missing": verdict.bytes_missing,
        "bytes_in_device_buffers": verdict.bytes_in_device_buffers,
        "wrong_ranges": [
            {"range": str(wrong.range), "wrong": wrong.wrong, "what": wrong.what, "note": wrong.note}
            for wrong in verdict.wrong_ranges
        ],
        "exempt": [{"range": str(e.range), "what": e.what, "changed": e.changed} for e in verdict.exempt],
        "first_256_bytes_ok": verdict.first_256_bytes_ok,
        "nonce_found": verdict.nonce_found,
        "panic_found": verdict.panic_found,
        "registers_ok": verdict.registers_ok,
        "bytes_left_out": verdict.bytes_left_out,
        "pages": None if verdict.pages is None else asdict(verdict.pages),
        "problems": verdict.problems,
    }


def capture_record(saving: Saving, outcome: Outcome) -> dict[str, Any]:
    """How `crashkernel capture` saved the dump, and what of K2's memory it took; sizes in bytes."""
    footprint = outcome.footprint
    return {
        "level": saving.level,
        "codec": saving.codec,
        "to": saving.to,
        "memory": footprint.total,
        "available_before": footprint.available,
        "available_least": footprint.least,
        "peak_resident": footprint.peak,
        "peak_resident_of_a_child": footprint.peak_of_child,
    }


def dma_record(report: DmaReport) -> dict[str, Any]:
    """What the rogue device was aimed at, did and caused; addresses as in the plan."""

    def strings(ranges: Iterable[Range]) -> list[str]:
        return [str(each) for each in ranges]

    return {
        "rate": report.dma.rate,
        "when": report.dma.when,
        "seed": report.dma.seed,
        "regions": [
            {
                "name": name,
                "where": strings(report.wanted.get(name, ())),
                "targets": strings(report.targets.get(name, ())),
                "plan_had_said": None
                if (hazard := report.hazards.get(name)) is None
                else {"hazard": hazard.name, "verdict": hazard.verdict, "reason": hazard.reason},
            }
            for name in report.dma.regions
        ],
        "elsewhere": strings(report.targets.get(ELSEWHERE, ())),
        "pages_looked_at": report.pages_looked_at,
        "page_size": report.page_size,
        "writes": report.writes,
        "bytes_written": report.bytes_written,
        "writes_into_k2": report.writes_into_k2,
        "writes_by_page": {hex(page): count for page, count in sorted(report.per_page.items())},
        "problem": report.problem,
        "effect": report.effect,
    }


def evidence_json(truth: Truth, saving: Saving | None = None) -> str:
    """What the host knew of the crash, but for the memory itself, which lies beside it in the file `truth`.

    And how the dump was saved, None for a raw copy.
    """
    return json.dumps(
        {
            "head": truth.head.hex(),
            "memory_size": truth.memory_size,
            "reserved": str(truth.reserved),
            "nonce": truth.nonce.hex(),
            "panic": truth.panic,
            "release": truth.release,
            "crashed_pid": truth.crashed_pid,
            "cpus": truth.cpus,
            "firmware": [{"name": region.name, "range": str(region.range)} for region in truth.firmware],
            "device_buffers": [str(each) for each in truth.device_buffers],
            "device_problem": truth.device_problem,
            "says_why": truth.says_why,
            "crashed_cpu": truth.crashed_cpu,
            "registers": [dict(each) for each in truth.registers],
            "capture": None if saving is None else asdict(saving),
        },
        indent=1,
    )


def require_keepable(keep: Path) -> None:
    """Say before a drill, not after it, that its evidence cannot be kept there.

    :raise UsageError: the directory cannot be made or written.
    """
    try:
        keep.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=keep):
            pass
    except OSError as error:
        raise UsageError(f"cannot keep a drill in {keep}: {error.strerror}", hint="choose another --keep") from error


def keep_evidence(directory: Path, keep: Path, *, saved: bool, judged: bool) -> Path | None:
    """Keep the files of the drill that ran in `directory` and no other's; the dump last, and whole or not at all.

    `saved`: by `crashkernel capture`; `judged`: there is a dump. Where that lies then.
    """
    dump = "dump" if saved else "disk"
    files = {dump: DUMP, **{name: name for name in (CONSOLE, PLAN, EVIDENCE, TRUTH, LOG, MANIFEST)}}
    for kept in files.values():
        (keep / kept).unlink(missing_ok=True)
    for name, kept in reversed(files.items()):
        source = directory / name
        # a disk that no verdict was reached on holds no dump
        if source.exists() and (name != dump or judged):
            try:
                source.rename(keep / kept)
            except OSError:  # on another file system
                temporary = keep / f"{kept}.new"
                copy_sparse(source, temporary)
                temporary.replace(keep / kept)
    return keep / DUMP if (keep / DUMP).exists() else None


def judge_kept(directory: Path) -> Verdict:
    """Judge the drill kept in `directory` once more.

    :raise UsageError: it holds no kept drill.
    """
    try:
        plan = LoadPlan.from_json((directory / PLAN).read_text(), str(directory / PLAN))
        raw = json.loads((directory / EVIDENCE).read_text())
        truth = Truth(
            memory=directory / TRUTH,
            head=bytes.fromhex(raw["head"]),
            memory_size=int(raw["memory_size"]),
            reserved=fields.one_range(raw["reserved"]),
            nonce=bytes.fromhex(raw["nonce"]),
            panic=str(raw["panic"]),
            release=str(raw["release"]),
            crashed_pid=None if raw["crashed_pid"] is None else int(raw["crashed_pid"]),
            cpus=int(raw["cpus"]),
            firmware=tuple(Region(str(r["name"]), fields.one_range(r["range"])) for r in raw["firmware"]),
            device_buffers=RangeSet(fields.one_range(each) for each in raw["device_buffers"]),
            device_problem=str(raw["device_problem"]),
            says_why=bool(raw["says_why"]),
            crashed_cpu=None if raw["crashed_cpu"] is None else int(raw["crashed_cpu"]),
            registers=tuple({str(name): int(value) for name, value in each.items()} for each in raw["registers"]),
        )
        if raw.get("capture") is None:
            return judge(directory / DUMP, truth, plan)
        saved = SavedDump(directory / DUMP, directory / LOG, directory / MANIFEST)
        return judge_filtered(saved, Saving(**raw["capture"]), truth, plan)
    except OSError as error:
        raise UsageError(
            f"{directory} holds no kept drill: {error.filename}: {error.strerror}",
            hint="keep one with `crashkernel drill --keep DIR`",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"not the evidence of a drill: {error!r}", source=str(directory / EVIDENCE)) from error
