"""A campaign's figures for scripts: those of its page and of the terminal, as values of JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crashkernel.report.campaign import Campaign, Drill, Spread, Table


def figures(campaign: Campaign) -> dict[str, Any]:
    """All of them: times in seconds, sizes in bytes, null for what is not known."""
    shares = campaign.shares
    return {
        "name": campaign.name,
        "headline": campaign.headline,
        "exit_status": campaign.exit_status,
        "counts": campaign.counts,
        "wall_seconds": campaign.wall_seconds,
        "core_seconds": campaign.core_seconds,
        "drills_per_core_hour": campaign.rate,
        "shares": None if shares is None else dict(zip(("boots", "rest_of_drills", "waiting"), shares, strict=True)),
        "created": campaign.created,
        "version": campaign.version,
        "host": dict(campaign.host),
        "failures": [
            {
                "standing": group.standing,
                "stage": group.stage,
                "reason": group.reason,
                "known": group.known,
                "drills": [drill.number for drill in group.drills],
            }
            for group in campaign.failures
        ],
        "matrix": _table(campaign.matrix),
        "faults": _table(campaign.faults),
        "stages": {name: _spreads(by_placement) for name, by_placement in campaign.stage_times.items()},
        "whole_drill": _spreads(campaign.totals),
        "sizes": [
            {"title": size.title, "found": size.found, "recommended": size.recommended, "result": dict(size.result)}
            for size in campaign.sizes
        ],
        "drills": [_drill(drill) for drill in campaign.drills],
    }


def _table(table: Table) -> dict[str, Any]:
    return {
        "heads": list(table.heads),
        "columns": [{"machine": side, "placement": placement} for side, placement in table.columns],
        "alike": list(table.alike),
        "rows": [
            {
                "heads": list(row.heads),
                "cells": [
                    None
                    if cell is None
                    else {"standing": cell.standing, "passed": cell.passed, "drills": [drill.number for drill in cell.drills]}
                    for cell in row.cells
                ],
            }
            for row in table.rows
        ],
    }


def _spreads(by_placement: Mapping[str, Spread]) -> dict[str, dict[str, float]]:
    return {
        placement: {
            "drills": len(spread.values),
            "least": spread.values[0],
            "quartile": spread.quantile(0.25),
            "median": spread.median,
            "upper_quartile": spread.quantile(0.75),
            "p95": spread.quantile(0.95),
            "most": spread.values[-1],
        }
        for placement, spread in by_placement.items()
    }


def _drill(drill: Drill) -> dict[str, Any]:
    result = drill.result
    return {
        "number": drill.number,
        "title": drill.title,
        "command": drill.command,
        "standing": drill.standing,
        "verdict": result.verdict if result else None,
        "stage": result.stage if result else None,
        "reason": result.reason if result else None,
        "seconds": result.seconds if result else None,
        "bytes_compared": result.compared if result else None,
    }
