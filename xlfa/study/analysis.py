"""The analysis of a study, fixed before its runs: scores, differences, tests and choices of a level, as plain data.

Its result is `report.json`; figures, tables and words are made from it alone, so that all say the same.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from xlfa.statistics import CONFIDENCE
from xlfa.study.resampling import HEADLINE, TARGETS, Estimate, TaskScores, estimate, interval, score_cells
from xlfa.study.results import SEPARATOR, Cell, Study, Value, as_number, describe_point, describe_value
from xlfa.study.significance import (
    ALPHA,
    Response,
    detectable_effect,
    detectable_slope,
    holm,
    paired_t,
    permutation_test,
    pooled_deviation,
    seed_weights,
)

REPORT_VERSION = 1
# What differences are taken to, and what the primary test takes differences to, as the study's files name them.
BASELINES = ("no_ot", "baseline")
REFERENCES = ("shuffled_pairs", *BASELINES)
GRID, CONTROL = "grid", "control"
# Fields whose values differ by factors; fixed, so that an axis does not change while a study goes on.
LOG_FIELDS = (
    *("ot_epsilon", "ot_weight", "ot_tau", "ot_tol", "learning_rate", "parallel_pairs_per_language"),
    *("max_train_examples", "max_steps", "num_train_epochs", "lora_r", "lora_alpha"),
)
POINTS, DEVIATIONS = "points", "pooled seed deviations"


@dataclass(frozen=True)
class Axis:
    """The field that scores are drawn against.

    Attributes:
        name: of the field, or of all fields where none is a number.
        kind: `log`, `linear` or `categorical`.
        levels: labels in order.
        values: of the levels; None where categorical.
        rest: the grid's other fields; each combination of them is a line of its own.
    """

    name: str
    kind: str
    levels: list[str]
    values: list[float] | None
    rest: list[str]

    @property
    def positions(self) -> np.ndarray | None:
        """Where the levels stand: log10 of the value on a log axis; None where categorical."""
        if self.values is None:
            return None
        return np.log10(self.values) if self.kind == "log" else np.array(self.values, dtype=float)

    @property
    def unit(self) -> str:
        """What a slope is per."""
        return {"log": f"factor of 10 in {self.name}", "linear": f"unit of {self.name}"}.get(self.kind, self.name)

    def level(self, point: dict[str, Value], fields: Iterable[str]) -> int:
        """The number of a grid point's level."""
        label = describe_point(point, fields) if self.values is None else describe_value(point.get(self.name))
        return self.levels.index(label)


@dataclass(frozen=True)
class Condition:
    """Cells that differ by their seed alone.

    Attributes:
        task, arm: of all.
        line: the arm, with the values of the grid's fields beside the axis.
        name: the level, or the control.
        kind: `grid` or `control`.
        level: its number on the axis; None of a control.
        members: seed → position among the cells of the task.
    """

    task: str
    arm: str
    line: str
    name: str
    kind: str
    level: int | None
    members: dict[int, int] = field(default_factory=dict)


def choose_axis(fields: dict[str, list[Value]]) -> Axis | None:
    """`ot_epsilon`, else the first field of numbers, else all fields as one; None for a study without a grid."""
    if not fields:
        return None
    numeric = [name for name, values in fields.items() if all(as_number(value) is not None for value in values)]
    if not numeric:
        labels = [describe_point(dict(zip(fields, values)), fields) for values in itertools.product(*fields.values())]
        return Axis(SEPARATOR.join(fields), "categorical", labels, None, [])
    name = "ot_epsilon" if "ot_epsilon" in numeric else numeric[0]
    values = [as_number(value) for value in fields[name]]
    kind = "log" if name in LOG_FIELDS and min(values) > 0 else "linear"
    return Axis(
        name, kind, [describe_value(value) for value in fields[name]], values, [own for own in fields if own != name]
    )


def group_conditions(study: Study, axis: Axis | None, scores: dict[str, TaskScores]) -> list[Condition]:
    """All conditions, those of the grid first, each with its cells."""
    found: dict[tuple, Condition] = {}

    def add(cell: Cell, position: int, line: str, name: str, kind: str, level: int | None) -> None:
        key = (study.tasks.index(cell.task), study.arms.index(cell.arm), kind != GRID, line, level or 0, name)
        condition = found.setdefault(key, Condition(cell.task, cell.arm, line, name, kind, level))
        condition.members[cell.seed] = position

    for task in study.tasks:
        for position, cell in enumerate(scores[task].cells):
            if cell.point is not None and axis is not None:
                level = axis.level(cell.point, study.fields)
                rest = [describe_point(cell.point, axis.rest)] if axis.rest else []
                add(cell, position, SEPARATOR.join([cell.arm, *rest]), axis.levels[level], GRID, level)
            for control in cell.controls:
                add(cell, position, cell.arm, control, CONTROL, None)
    return [found[key] for key in sorted(found)]


def analyse(study: Study) -> dict[str, Any]:
    """The content of `report.json`, but for the statements.

    Raises:
        XLFAError: if sums by cluster are missing.
    """
    scores = {
        # Seeds of the draws differ, for tasks have different examples.
        task: score_cells(task, [cell for cell in study.cells if cell.task == task], study.headline, seed=number)
        for number, task in enumerate(study.tasks)
    }
    return Analysis(study, scores).report()


class Analysis:
    """The analysis of one study.

    Attributes:
        study: analysed.
        scores: of its cells, by task.
        axis: of the grid.
        conditions: of all tasks and arms.
    """

    def __init__(self, study: Study, scores: dict[str, TaskScores]):
        self.study = study
        self.scores = scores
        self.axis = choose_axis(study.fields)
        self.conditions = group_conditions(study, self.axis, scores)

    def report(self) -> dict[str, Any]:
        """The content of `report.json`, but for the statements."""
        axis = self.axis
        return {
            "schema_version": REPORT_VERSION,
            "study": self.study.name,
            "cells": len(self.study.cells),
            "unfinished": self.study.unfinished,
            "missing": self.study.missing(),
            "facts": describe_facts(self.study),
            "headline": self.study.headline,
            "axis": None if axis is None else {**asdict(axis), "unit": axis.unit},
            "bootstrap": {
                "confidence": CONFIDENCE,
                "draws": {task: own.number_of_draws for task, own in self.scores.items()},
            },
            "tasks": {task: self._describe_task(scores) for task, scores in self.scores.items()},
            "arms": self.study.arms,
            "lines": list(dict.fromkeys(own.line for own in self.conditions if own.kind == GRID)),
            "conditions": self.describe_conditions(),
            "interactions": self.interactions(),
            "trends": self.trends(),
            "selection": self.selections(),
        }

    def _describe_task(self, scores: TaskScores) -> dict[str, Any]:
        sizes = list(scores.clusters.values())
        return {
            "metrics": scores.metrics,
            "languages": scores.languages,
            "groups": scores.groups,
            "examples": scores.cells[0].scores["examples"],
            "clusters": sizes[0] if len(set(sizes)) == 1 else scores.clusters,
            "dataset": scores.cells[0].scores["dataset"],
        }

    def control(self, like: Condition, names: Sequence[str]) -> Condition | None:
        """The first of the named controls that the condition's task and arm have."""
        own = {each.name: each for each in self._of(like.task, like.arm, CONTROL)}
        return next((own[name] for name in names if name in own), None)

    def baseline(self, like: Condition) -> Condition | None:
        """What differences of a condition are taken to: `BASELINES`, else the only control."""
        controls = self._of(like.task, like.arm, CONTROL)
        return self.control(like, BASELINES) or (controls[0] if len(controls) == 1 else None)

    def _of(self, task: str, arm: str, kind: str) -> list[Condition]:
        return [own for own in self.conditions if (own.task, own.arm, own.kind) == (task, arm, kind)]

    def _grid_lines(self) -> dict[tuple[str, str], list[Condition]]:
        """Task and line → the conditions of the grid, by level."""
        lines: dict[tuple[str, str], list[Condition]] = {}
        for condition in self.conditions:
            if condition.kind == GRID:
                lines.setdefault((condition.task, condition.line), []).append(condition)
        return lines

    def describe_conditions(self) -> list[dict[str, Any]]:
        """Scores, differences to the baseline with their tests, and diagnostics of every condition."""
        described = [self._describe_condition(condition) for condition in self.conditions]
        families: dict[tuple, list[dict[str, Any]]] = {}
        for own in described:
            if own["difference"] is not None:
                families.setdefault((own["task"], own["line"], own["kind"]), []).append(own["difference"])
        for family in families.values():
            tested = [own for own in family if own["p"] is not None]
            for own, adjusted in zip(family, holm([own["p"] for own in family])):
                own["p_holm"], own["family"] = adjusted, len(tested)
            self._add_detectable(family)
        return described

    def _add_detectable(self, family: list[dict[str, Any]]) -> None:
        """The smallest differences that the tests of a family can find, from the deviation pooled over it."""
        deviation = pooled_deviation([np.array(list(own["by_seed"].values())) for own in family])
        for own in family:
            n = len(own["seeds"])
            own["pooled_deviation"] = deviation
            error = None if deviation is None or n < 2 else deviation / math.sqrt(n)
            own["detectable"] = None if error is None else detectable_effect(error, n - 1)
            strictest = ALPHA / max(own["family"], 1)
            own["detectable_holm"] = None if error is None else detectable_effect(error, n - 1, alpha=strictest)

    def _describe_condition(self, condition: Condition) -> dict[str, Any]:
        scores = self.scores[condition.task]
        seeds = sorted(condition.members)
        cells = [scores.cells[condition.members[seed]] for seed in seeds]
        primary, headline = scores.metrics[0], scores.rows.index(HEADLINE)
        estimates = {metric: self._estimate(condition, seeds, metric) for metric in scores.metrics}
        baseline = self.baseline(condition)
        return {
            "task": condition.task,
            "arm": condition.arm,
            "line": condition.line,
            "condition": condition.name,
            "kind": condition.kind,
            "level": condition.level,
            "seeds": seeds,
            "cells": [cell.id for cell in cells],
            "scores": {metric: self._rows(scores, found) for metric, found in estimates.items()},
            "by_seed": {metric: found.by_seed[:, headline].tolist() for metric, found in estimates.items()},
            "difference": None if baseline is None or baseline is condition else self._difference(condition, baseline),
            "validation": mean_or_none([cell.validation.get(f"eval_{primary}") for cell in cells]),
            "transport": mean_by_key([cell.transport for cell in cells]),
            "gradient_ratio": mean_or_none(
                [None if cell.gradient_ratio is None else mean_or_none(cell.gradient_ratio["ratio"]) for cell in cells]
            ),
            "retrieval": describe_retrieval(cells),
            "curves": mean_curves(cells),
        }

    def _difference(self, condition: Condition, baseline: Condition) -> dict[str, Any] | None:
        """To the baseline, by the seeds that both have; None without one."""
        scores = self.scores[condition.task]
        seeds = sorted(condition.members.keys() & baseline.members.keys())
        if not seeds:
            return None
        estimates = {metric: self._estimate(condition, seeds, metric, baseline=baseline) for metric in scores.metrics}
        headline = estimates[scores.metrics[0]].by_seed[:, scores.rows.index(HEADLINE)]
        return {
            "baseline": baseline.name,
            "seeds": seeds,
            "scores": {metric: self._rows(scores, found) for metric, found in estimates.items()},
            "by_seed": dict(zip(map(str, seeds), headline.tolist())),
            "p": paired_t(headline),
        }

    def _estimate(
        self, condition: Condition, seeds: list[int], metric: str, baseline: Condition | None = None
    ) -> Estimate:
        """Means over the seeds of a score, or of its difference to a baseline."""
        scores = self.scores[condition.task]
        own = [condition.members[seed] for seed in seeds]
        values, draws = scores.values[metric][own], scores.draws[metric][own]
        if baseline is not None:
            other = [baseline.members[seed] for seed in seeds]
            values, draws = values - scores.values[metric][other], draws - scores.draws[metric][other]
        return estimate(values, draws)

    @staticmethod
    def _rows(scores: TaskScores, found: Estimate) -> dict[str, dict[str, Any]]:
        """By row: value, interval and standard deviation over seeds."""
        deviations = found.by_seed.std(0, ddof=1).tolist() if len(found.by_seed) > 1 else [None] * len(scores.rows)
        return {
            row: {"value": value, "interval": bounds, "deviation": deviation}
            for row, value, bounds, deviation in zip(
                scores.rows, found.values.tolist(), found.intervals.tolist(), deviations
            )
        }

    def _responses(self, line: list[Condition]) -> tuple[dict[tuple[int, int], tuple[float, np.ndarray]], str | None]:
        """(seed, level) → the headline's difference to the reference, and its draws; and the reference's name.

        Within a seed the reference is one number: it cancels in slopes and in comparisons between levels, not in the
        deviation over seeds.
        """
        scores = self.scores[line[0].task]
        metric, row = scores.metrics[0], scores.rows.index(HEADLINE)
        values, draws = scores.values[metric][:, row], scores.draws[metric][:, row]
        reference = self.control(line[0], REFERENCES)
        found = {}
        for condition in line:
            for seed, position in condition.members.items():
                if reference is None:
                    found[seed, condition.level] = values[position], draws[position]
                elif seed in reference.members:
                    other = reference.members[seed]
                    found[seed, condition.level] = values[position] - values[other], draws[position] - draws[other]
        return found, None if reference is None else reference.name

    def trends(self) -> list[dict[str, Any]]:
        """Whether a task's score depends on the axis, for each line."""
        trends = []
        for (task, line), conditions in self._grid_lines().items():
            responses, reference = self._responses(conditions)
            tested = self._test(responses)
            trends.append({"task": task, "line": line, "unit": POINTS, "reference": reference, **tested})
        return trends

    def interactions(self) -> list[dict[str, Any]]:
        """For each two tasks and each line: whether the second one's dependence on the axis differs from the first's.

        By seeds and levels that both tasks have; in points, and in units of each task's deviation over seeds.
        """
        lines = self._grid_lines()
        interactions = []
        for first, second in itertools.combinations(self.study.tasks, 2):
            for line in dict.fromkeys(line for _, line in lines):
                if (first, line) not in lines or (second, line) not in lines:
                    continue
                (a, reference), (b, _) = (self._responses(lines[task, line]) for task in (first, second))
                scales = [deviation_over_seeds(responses) for responses in (a, b)]
                common = sorted(a.keys() & b.keys())
                for unit, (scale_a, scale_b) in ((POINTS, (1.0, 1.0)), (DEVIATIONS, scales)):
                    entry = {"tasks": [first, second], "line": line, "unit": unit, "reference": reference}
                    if not scale_a or not scale_b:
                        interactions.append({**entry, **self._test({})})
                        continue
                    difference = {
                        key: tuple(own / scale_b - other / scale_a for own, other in zip(b[key], a[key]))
                        for key in common
                    }
                    interactions.append({**entry, **self._test(difference), "scales": [scale_a, scale_b]})
        return interactions

    def _test(self, responses: dict[tuple[int, int], tuple[float, np.ndarray]]) -> dict[str, Any]:
        """The permutation test of responses by seed and level, and the slope's interval.

        Seeds with a single level say nothing about a dependence, and are left out.
        """
        several = {seed for seed, _ in responses if sum(seed == other for other, _ in responses) > 1}
        keys = sorted(key for key in responses if key[0] in several)
        seeds, levels = sorted(several), sorted({level for _, level in keys})
        described: dict[str, Any] = {"seeds": seeds, "levels": [self.axis.levels[level] for level in levels]}
        if not keys:
            return {**described, "observations": 0, "test": None, "interval": None, "detectable": None}
        positions = self.axis.positions
        response = Response(
            values=np.array([responses[key][0] for key in keys]),
            seeds=np.array([seeds.index(seed) for seed, _ in keys]),
            levels=np.array([levels.index(level) for _, level in keys]),
            positions=None if positions is None else positions[levels],
        )
        described |= {"observations": len(keys), "test": asdict(permutation_test(response))}
        if positions is None:
            return {**described, "interval": None, "detectable": None}
        draws = np.stack([responses[key][1] for key in keys])
        bounds = interval(slope_draws(response, draws)).tolist()
        return {**described, "interval": bounds, "detectable": detectable_slope(response)}

    def selections(self) -> list[dict[str, Any]]:
        """What choosing the level on English validation costs in the target languages, for each task and line."""
        found = []
        for (task, line), conditions in self._grid_lines().items():
            scores = self.scores[task]
            seeds = sorted(set.intersection(*(set(own.members) for own in conditions)))
            if len(conditions) < 2 or not seeds or TARGETS not in scores.groups:
                continue
            metric, row = scores.metrics[0], scores.rows.index(TARGETS)
            members = np.array([[own.members[seed] for seed in seeds] for own in conditions])
            english = np.array(
                [[scores.cells[own].validation.get(f"eval_{metric}", math.nan) for own in line] for line in members]
            )
            if np.isnan(english).any():
                continue
            targets = scores.values[metric][members, row]
            chosen, best = int(english.mean(1).argmax()), int(targets.mean(1).argmax())
            cost = estimate(
                (targets[best] - targets[chosen])[:, None],
                (scores.draws[metric][members[best], row] - scores.draws[metric][members[chosen], row])[:, None],
            )
            found.append(
                {
                    "task": task,
                    "line": line,
                    "seeds": seeds,
                    "levels": [own.name for own in conditions],
                    "validation": english.mean(1).tolist(),
                    "targets": targets.mean(1).tolist(),
                    "chosen_by_english": conditions[chosen].name,
                    "best_by_targets": conditions[best].name,
                    "cost": float(cost.values[0]),
                    "interval": cost.intervals[0].tolist(),
                    "held_out_cost": held_out_cost(english, targets),
                }
            )
        return found


def slope_draws(response: Response, draws: np.ndarray) -> np.ndarray:
    """The slope pooled within seeds under draws of clusters and seeds.

    Args:
        response: N values.
        draws: of each value under the drawn clusters, N x draws.
    """
    x = response.centred_positions()
    seeds = np.eye(response.seeds.max() + 1)[response.seeds]
    weights = seed_weights(seeds.shape[1], draws.shape[1])
    above, below = seeds.T @ (x[:, None] * draws), seeds.T @ (x * x)
    return np.einsum("ds,sd->d", weights, above) / (weights @ below)


def deviation_over_seeds(responses: dict[tuple[int, int], tuple[float, np.ndarray]]) -> float | None:
    """Standard deviation over seeds, pooled over levels."""
    levels = {level for _, level in responses}
    return pooled_deviation(
        [np.array([own[0] for key, own in responses.items() if key[1] == level]) for level in levels]
    )


def held_out_cost(english: np.ndarray, targets: np.ndarray) -> float | None:
    """The cost where both choices are made on the other seeds and scored on each seed in turn, in points.

    The best of several levels on the very scores that are compared is too good (a choice cannot cost less than 0); on
    held-out seeds it may be. None for one seed.

    Args:
        english: validation scores, levels x seeds.
        targets: scores in the target languages, levels x seeds.
    """
    n = english.shape[1]
    if n < 2:
        return None
    costs = []
    for seed in range(n):
        others = np.arange(n) != seed
        best, chosen = (own[:, others].mean(1).argmax() for own in (targets, english))
        costs.append(targets[best, seed] - targets[chosen, seed])
    return float(np.mean(costs))


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


def describe_facts(study: Study) -> dict[str, Any]:
    """What the cells have in common, or how they differ: encoder, data, machines, versions."""

    def distinct(values: Iterable[Any]) -> list[Any]:
        return list(dict.fromkeys(value for value in values if value is not None))

    def setting(cells: list[Cell], part: str, name: str) -> list[Any]:
        return distinct(cell.settings.get(part, {}).get(name) for cell in cells)

    by_task = {task: [cell for cell in study.cells if cell.task == task] for task in study.tasks}
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
        "threads": distinct(cell.threads for cell in study.cells),
        "commits": distinct(cell.commit for cell in study.cells),
        "versions": {
            name: distinct(cell.versions.get(name) for cell in study.cells)
            for name in dict.fromkeys(name for cell in study.cells for name in cell.versions)
        },
        "hours": sum(sum(cell.seconds.values()) for cell in study.cells) / 3600,
        "finished": [min(cell.finished for cell in study.cells), max(cell.finished for cell in study.cells)],
    }
