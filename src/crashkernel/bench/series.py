"""Many generated cases, one after the other: which there are, how they went, and what is told of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from crashkernel.bench.cpus import CPUS
from crashkernel.bench.machine import Machine
from crashkernel.bench.plans import KINDS, CaseName, Kind

MAX_FAILURES = 10
"""A series ends with this many: if nothing works, each case costs its deadline."""


@dataclass(frozen=True, slots=True)
class Result:
    """How one case went; `problems` is empty if it passed."""

    name: CaseName
    problems: tuple[str, ...]
    seconds: float


@dataclass(slots=True)
class Cell:
    """The results of one CPU, byte order and kind."""

    cpu: str
    little: bool
    kind: Kind
    cases: int
    results: list[Result] = field(default_factory=list)

    @property
    def passed(self) -> int:
        """How many did."""
        return sum(not result.problems for result in self.results)

    @property
    def milliseconds(self) -> float:
        """Mean of a case, generating and judging it included."""
        return 1000 * sum(result.seconds for result in self.results) / len(self.results) if self.results else 0.0


@dataclass(slots=True)
class Series:
    """What is to be run with a seed, and what has been."""

    seed: int
    cells: list[Cell]

    @classmethod
    def of(cls, seed: int, cpus: Iterable[str], cases: int) -> Series:
        """So many cases for each of the CPUs, in each byte order it has, of each kind."""
        orders = ((cpu, little) for cpu in cpus for little in ((False, True) if CPUS[cpu].little else (False,)))
        return cls(seed, [Cell(cpu, little, kind, cases) for cpu, little in orders for kind in KINDS])

    @property
    def results(self) -> Iterator[Result]:
        """All there are."""
        return (result for cell in self.cells for result in cell.results)

    @property
    def failures(self) -> list[Result]:
        """Those that did not pass."""
        return [result for result in self.results if result.problems]

    @property
    def passed(self) -> bool:
        """Whether all cases were run and passed."""
        return all(cell.passed == cell.cases for cell in self.cells)

    def run(self, tell: Callable[[Result], object]) -> None:
        """Run it, `MAX_FAILURES` of them at most; `tell` hears of each case."""
        for _, group in groupby(self.cells, key=lambda cell: cell.cpu):
            cells = {(cell.little, cell.kind): cell for cell in group}
            names = [CaseName(c.cpu, c.little, c.kind, number) for c in cells.values() for number in range(c.cases)]
            with contextlib.closing(run_cases(self.seed, names)) as results:
                for result in results:
                    cells[result.name.little, result.name.kind].results.append(result)
                    tell(result)
                    if len(self.failures) >= MAX_FAILURES:
                        return

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": "PASS" if self.passed else "FAIL",
            "seed": self.seed,
            "cells": [
                {
                    "cpu": cell.cpu,
                    "byte_order": "LE" if cell.little else "BE",
                    "kind": cell.kind,
                    "cases": cell.cases,
                    "run": len(cell.results),
                    "passed": cell.passed,
                    "milliseconds": round(cell.milliseconds, 2),
                }
                for cell in self.cells
            ],
            "failures": [
                {"case": str(result.name), "problems": result.problems, "reproduce": self.command(result.name)}
                for result in self.failures
            ],
        }

    def command(self, name: CaseName) -> str:
        """What runs one case again."""
        return f"crashkernel bench purgatory --seed {self.seed} --case {name}"


def run_cases(seed: int, names: Sequence[CaseName]) -> Generator[Result, None, None]:
    """Run the cases of one CPU: those with a second CPU of K1's last, for that costs a host CPU while nothing is to be done."""
    for count, group in groupby(sorted(names, key=lambda name: name.cpus), key=lambda name: name.cpus):
        first, *rest = group
        with Machine(CPUS[first.cpu], count) as machine:
            machine.start()
            for name in (first, *rest):
                started = time.monotonic()
                problems = machine.judge(name.generate(seed))
                yield Result(name, problems, time.monotonic() - started)
