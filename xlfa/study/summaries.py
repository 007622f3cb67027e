"""Means over the cells of a condition, and what all cells of a study have in common."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from xlfa.study.results import LAST_PART, Cell, Study


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """Of the values that are there and finite."""
    there = [value for value in values if value is not None and math.isfinite(value)]
    return sum(there) / len(there) if there else None


def mean_by_key(tables: Sequence[dict[str, float] | None]) -> dict[str, float | None] | None:
    """Means by key over the dictionaries that are there; None without any."""
    there = [table for table in tables if table is not None]
    names = dict.fromkeys(name for table in there for name in table)
    return {name: mean_or_none([table.get(name) for table in there]) for name in names} if there else None


def describe_retrieval(cells: list[Cell]) -> dict[str, Any] | None:
    """P@1 `before` and `after` training: by language and over the languages, means over seeds."""
    there = [cell.retrieval for cell in cells if cell.retrieval is not None]
    if not there:
        return None
    found = {when: mean_by_key([own[when] for own in there]) for when in there[0]}
    return {when: {"mean": mean_or_none(values.values()), "languages": values} for when, values in found.items()}


def mean_curves(cells: list[Cell]) -> dict[str, list[float | None]]:
    """Losses at the steps that all seeds logged, means over seeds."""
    names = ("task_loss", "ot_loss")
    by_step = [
        {step: [cell.curves[name][number] for name in names] for number, step in enumerate(cell.curves["step"])}
        for cell in cells
    ]
    steps = sorted(set.intersection(*map(set, by_step)))
    curves = {
        name: [mean_or_none(own[step][column] for own in by_step) for step in steps]
        for column, name in enumerate(names)
    }
    return {"step": steps, **curves}


def mean_gradient_ratio(cells: list[Cell]) -> dict[str, float | None]:
    """Of the norms of the weighted transport term's and the task's gradient: at the `first` logged step, and the mean
    over those in the last quarter of training (`late`); means over seeds."""
    first, late = [], []
    for cell in cells:
        if cell.gradient_ratio is not None:
            steps, ratios = cell.gradient_ratio["step"], cell.gradient_ratio["ratio"]
            begin = (1 - LAST_PART) * max([*steps, *cell.curves["step"]])
            first.append(ratios[0])
            late.append(mean_or_none(ratio for step, ratio in zip(steps, ratios) if step > begin))
    return {"first": mean_or_none(first), "late": mean_or_none(late)}


def describe_facts(study: Study) -> dict[str, Any]:
    """What the cells have in common, or how they differ: encoder, data, machines, versions."""

    def distinct(values: Iterable[Any]) -> list[Any]:
        return list(dict.fromkeys(value for value in values if value is not None))

    def setting(cells: list[Cell], part: str, name: str) -> list[Any]:
        return distinct(cell.settings.get(part, {}).get(name) for cell in cells)

    by_task = {task: [cell for cell in study.cells if cell.task == task] for task in study.tasks}
    machines: dict[tuple[str, int], set[str]] = defaultdict(set)
    for cell in study.cells:
        machines[cell.task, cell.seed].add(cell.machine)
    return {
        "encoders": setting(study.cells, "train", "model"),
        "tasks": {
            task: {
                "train_dataset": setting(cells, "train", "train_dataset"),
                "max_train_examples": setting(cells, "train", "max_train_examples"),
                "max_examples": setting(cells, "score", "max_examples"),
                "ot_weight": setting([cell for cell in cells if cell.point is not None], "train", "ot_weight"),
            }
            for task, cells in by_task.items()
        },
        "seeds": sorted({cell.seed for cell in study.cells}),
        "machines": distinct(cell.machine for cell in study.cells),
        "seeds_on_several_machines": sorted({seed for (_, seed), kinds in machines.items() if len(kinds) > 1}),
        "threads": distinct(cell.threads for cell in study.cells),
        "commits": distinct(cell.commit for cell in study.cells),
        "versions": {
            name: distinct(cell.versions.get(name) for cell in study.cells)
            for name in dict.fromkeys(name for cell in study.cells for name in cell.versions)
        },
        "hours": sum({cell.id: sum(cell.seconds.values()) for cell in study.cells}.values()) / 3600,
        "finished": [min(cell.finished for cell in study.cells), max(cell.finished for cell in study.cells)],
    }
