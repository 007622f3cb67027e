"""How far a study is: the state of each cell, and the time left by what finished cells of the same task took."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlfa.study.grid import Plan, PlannedCell
from xlfa.study.leases import LEASE_SECONDS, owner_of
from xlfa.study.results import FAILED_FILE, RESULT_FILE, read_failure

STATES = ("done", "running", "failed", "waiting")


@dataclass(frozen=True)
class CellStatus:
    """A cell now.

    Attributes:
        state: of `STATES`.
        owner: `host`, `pid`, `taken`, … of the worker that runs it.
        error: what it failed with, in one line.
        seconds: what a finished cell took, all stages.
    """

    cell: PlannedCell
    state: str
    owner: dict[str, Any] | None = None
    error: str | None = None
    seconds: float | None = None


def survey(plan: Plan, lease_seconds: float = LEASE_SECONDS) -> list[CellStatus]:
    """The status of every cell, in the order of the plan."""
    return [cell_status(plan.folder(cell), cell, lease_seconds) for cell in plan.cells]


def cell_status(folder: Path, cell: PlannedCell, lease_seconds: float) -> CellStatus:
    """The status of the cell in `folder`."""
    if (folder / RESULT_FILE).is_file():
        try:
            result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
            return CellStatus(cell, "done", seconds=sum(result["seconds"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            error = f"{folder / RESULT_FILE} is damaged: remove the cell's folder, and run the cell again"
            return CellStatus(cell, "failed", error=error)
    owner = owner_of(folder, lease_seconds)
    if owner is not None:
        return CellStatus(cell, "running", owner=owner)
    if (folder / FAILED_FILE).is_file():
        return CellStatus(cell, "failed", error=read_failure(folder))
    return CellStatus(cell, "waiting")


def seconds_a_cell(cells: list[CellStatus]) -> dict[str, float | None]:
    """The mean over finished cells by task; None for a task without any."""
    found = {}
    for task in dict.fromkeys(each.cell.task for each in cells):
        taken = [each.seconds for each in cells if each.cell.task == task and each.seconds is not None]
        found[task] = sum(taken) / len(taken) if taken else None
    return found


def seconds_left(cells: list[CellStatus]) -> float | None:
    """Until all that runs and waits is done, by as many workers as run now (at least one).

    What a running cell has done already is not counted. None where a task has cells left and none finished.
    """
    means = seconds_a_cell(cells)
    left = [means[each.cell.task] for each in cells if each.state in ("running", "waiting")]
    workers = max(1, sum(each.state == "running" for each in cells))
    return None if None in left else sum(left) / workers


def describe_status(plan: Plan, cells: list[CellStatus]) -> dict[str, Any]:
    """What `xlfa study status --json` prints."""
    counts = Counter(each.state for each in cells)
    means = seconds_a_cell(cells)
    return {
        "study": plan.name,
        "folder": str(plan.output_dir),
        "total": len(cells),
        **{state: counts[state] for state in STATES},
        "seconds_left": seconds_left(cells),
        "seconds_a_cell": means,
        "cells": [
            {
                "number": number,
                "id": each.cell.id,
                "task": each.cell.task,
                "arm": each.cell.arm,
                "seed": each.cell.seed,
                "point": each.cell.point,
                "control": each.cell.control,
                "state": each.state,
                "owner": each.owner,
                "error": each.error,
                "seconds": each.seconds,
            }
            for number, each in enumerate(cells)
        ],
    }


def format_status(plan: Plan, cells: list[CellStatus]) -> str:
    """A line a cell, then the counts and the time left."""
    digits = len(str(len(cells) - 1))
    width = max(len(each.cell.id) for each in cells)
    lines = [f"study {plan.name} in {plan.output_dir}"]
    for number, each in enumerate(cells):
        lines.append(f"{number:>{digits}} {each.cell.id:<{width}} {each.state:<7} {_remark(each)}".rstrip())
    counts = Counter(each.state for each in cells)
    lines.append(", ".join(f"{counts[state]} {state}" for state in STATES) + f" of {len(cells)}")
    for task, mean in seconds_a_cell(cells).items():
        lines.append(f"{task}: {'no cell is finished' if mean is None else f'{format_seconds(mean)} a cell'}")
    left = seconds_left(cells)
    lines.append(
        f"time left: {'not known until each task has a finished cell' if left is None else format_seconds(left)}"
    )
    return "\n".join(lines)


def _remark(status: CellStatus) -> str:
    if status.state == "done":
        return format_seconds(status.seconds)
    if status.state == "running":
        owner = status.owner
        return f"on {owner['host']}, process {owner['pid']}, since {owner['taken']}" if owner else ""
    return status.error or ""


def format_seconds(seconds: float) -> str:
    """Such as `2 h 05 min`, `3 min 20 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
