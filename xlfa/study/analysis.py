"""The analysis of a study, fixed before its runs: scores, differences, tests and choices of a level, as plain data.

Its result is `report.json`; figures, tables and words are made from it alone, so that all say the same.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from xlfa.errors import XLFAError
from xlfa.statistics import CONFIDENCE
from xlfa.study.conditions import (
    BASELINES,
    CONTROL,
    GRID,
    REFERENCES,
    Condition,
    choose_axis,
    controls_of,
    group_conditions,
    order_lines,
)
from xlfa.study.resampling import (
    ENF,
    HEADLINE,
    NOENF,
    TARGETS,
    Estimate,
    TaskScores,
    estimate,
    interval,
    score_cells,
)
from xlfa.study.results import Study, Value, describe_point, describe_value
from xlfa.study.significance import (
    ALPHA,
    Response,
    detectable_effect,
    holm,
    paired_t,
    permutation_test,
    pooled_deviation,
    seed_weights,
    slopes_by_seed,
)
from xlfa.study.summaries import (
    describe_facts,
    describe_retrieval,
    mean_by_key,
    mean_curves,
    mean_gradient_ratio,
    mean_or_none,
)

REPORT_VERSION = 1
POINTS, DEVIATIONS = "points", "pooled seed deviations"
# What an arm is called where arms are held against each other as the values of a field are.
ARM = "arm"


def analyse(study: Study) -> dict[str, Any]:
    """The content of `report.json`, but for the statements.

    Raises:
        XLFAError: if sums by cluster are missing, or the tasks have no language in common.
    """
    if not study.headline:
        raise XLFAError(f"{' and '.join(study.tasks)} have no language in common: make a study of each")
    scores = {
        # Seeds of the draws differ, for tasks have different examples.
        task: score_cells(task, [cell for cell in study.cells if cell.task == task], study.headline, seed=number)
        for number, task in enumerate(study.tasks)
    }
    fewest = min(own.number_of_draws for own in scores.values())
    return Analysis(study, {task: own.with_draws(fewest) for task, own in scores.items()}).report()


class Analysis:
    """The analysis of one study.

    Attributes:
        study: analysed.
        scores: of its cells, by task.
        axis: of the grid.
        conditions: of all tasks and arms.
        lines: of the grid; the primary test is that of the first.
    """

    def __init__(self, study: Study, scores: dict[str, TaskScores]):
        self.study = study
        self.scores = scores
        self.axis = choose_axis(study.fields)
        self.conditions = group_conditions(study, self.axis, scores)
        self.lines = order_lines(self.conditions, study.arms)

    def report(self) -> dict[str, Any]:
        """The content of `report.json`, but for the statements."""
        axis = self.axis
        return {
            "schema_version": REPORT_VERSION,
            "study": self.study.name,
            "cells": len({cell.id for cell in self.study.cells}),
            "unfinished": self.study.unfinished,
            "missing": self.study.missing(),
            "facts": describe_facts(self.study),
            "headline": self.study.headline,
            "axis": None if axis is None else {**asdict(axis), "unit": axis.unit, "places": axis.places.tolist()},
            "bootstrap": {
                "confidence": CONFIDENCE,
                "draws": {task: own.number_of_draws for task, own in self.scores.items()},
            },
            "tasks": {task: self._describe_task(scores) for task, scores in self.scores.items()},
            "arms": self.study.arms,
            "lines": self.lines,
            "conditions": self.describe_conditions(),
            "interactions": self.interactions(),
            "trends": self.trends(),
            "effects": self.effects(),
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
        """The first of the named controls that the condition's line has."""
        own = {each.name: each for each in controls_of(self.conditions, like)}
        return next((own[name] for name in names if name in own), None)

    def baseline(self, like: Condition) -> Condition | None:
        """What differences of a condition are taken to: `BASELINES`, else the arm's only control."""
        place = (CONTROL, like.task, like.arm)
        names = [each.name for each in self.conditions if (each.kind, each.task, each.arm) == place]
        return self.control(like, BASELINES) or self.control(like, names if len(names) == 1 else [])

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
            _adjust(family)
            _adjust([own["contrast"] for own in family if own["contrast"] is not None])
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
        estimates = {metric: estimate(*self._paired(condition, seeds, metric)) for metric in scores.metrics}
        baseline = self.baseline(condition)
        return {
            "task": condition.task,
            "arm": condition.arm,
            "line": condition.line,
            "lines": self._lines_of(condition),
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
            "gradient_ratio": mean_gradient_ratio(cells),
            "retrieval": describe_retrieval(cells),
            "curves": mean_curves(cells),
        }

    def _lines_of(self, condition: Condition) -> list[str]:
        """The lines that a condition is shown with."""
        if condition.kind == GRID:
            return [condition.line]
        own = [each for each in self.conditions if each.kind == GRID and each.task == condition.task]
        return list(dict.fromkeys(each.line for each in own if condition in controls_of(self.conditions, each)))

    def _difference(self, condition: Condition, baseline: Condition) -> dict[str, Any] | None:
        """To the baseline, by the seeds that both have; None without one."""
        compared = self._compare([(baseline, condition)])
        if compared is None:
            return None
        contrast = self._contrast(condition, baseline, compared["seeds"])
        return {"baseline": baseline.name, **compared, "contrast": contrast}

    def _compare(self, pairs: list[tuple[Condition, Condition]]) -> dict[str, Any] | None:
        """The second of each pair minus the first, a mean over the pairs, by seeds that all have; None without one."""
        if not pairs:
            return None
        seeds = sorted(set.intersection(*(set(own.members) for pair in pairs for own in pair)))
        if not seeds:
            return None
        scores = self.scores[pairs[0][0].task]
        estimates = {}
        for metric in scores.metrics:
            paired = [self._paired(second, seeds, metric, first) for first, second in pairs]
            estimates[metric] = estimate(*(np.mean(own, axis=0) for own in zip(*paired)))
        headline = estimates[scores.metrics[0]].by_seed[:, scores.rows.index(HEADLINE)]
        return {
            "seeds": seeds,
            "scores": {metric: self._rows(scores, found) for metric, found in estimates.items()},
            "by_seed": dict(zip(map(str, seeds), headline.tolist())),
            "p": paired_t(headline),
        }

    def _contrast(self, condition: Condition, baseline: Condition, seeds: list[int]) -> dict[str, Any] | None:
        """What the difference on English and German is more than that on the others; None without both groups."""
        scores = self.scores[condition.task]
        if not {ENF, NOENF} <= scores.groups.keys():
            return None
        near, far = (scores.rows.index(group) for group in (ENF, NOENF))
        values, draws = self._paired(condition, seeds, scores.metrics[0], baseline)
        found = estimate((values[:, near] - values[:, far])[:, None], (draws[:, near] - draws[:, far])[:, None])
        return {
            "value": float(found.values[0]),
            "interval": found.intervals[0].tolist(),
            "seeds": seeds,
            "p": paired_t(found.by_seed[:, 0]),
        }

    def _paired(
        self, condition: Condition, seeds: list[int], metric: str, baseline: Condition | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores of each seed, or their differences to a baseline, seeds x R, and the same under the drawn clusters."""
        scores = self.scores[condition.task]
        own = [condition.members[seed] for seed in seeds]
        values, draws = scores.values[metric][own], scores.draws[metric][own]
        if baseline is not None:
            other = [baseline.members[seed] for seed in seeds]
            values, draws = values - scores.values[metric][other], draws - scores.draws[metric][other]
        return values, draws

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

    def _reference(self, *lines: list[Condition]) -> str | None:
        """Name of the first of `REFERENCES` that all the lines have; None without one."""
        return next((name for name in REFERENCES if all(self.control(line[0], [name]) for line in lines)), None)

    def _responses(
        self, line: list[Condition], reference_name: str | None
    ) -> dict[tuple[int, int], tuple[float, np.ndarray]]:
        """(seed, level) → the headline's difference to the reference, and its draws.

        Within a seed the reference is one number: it cancels in slopes and in comparisons between levels, not in the
        deviation over seeds.
        """
        scores = self.scores[line[0].task]
        metric, row = scores.metrics[0], scores.rows.index(HEADLINE)
        values, draws = scores.values[metric][:, row], scores.draws[metric][:, row]
        reference = None if reference_name is None else self.control(line[0], [reference_name])
        found = {}
        for condition in line:
            for seed, position in condition.members.items():
                if reference is None:
                    found[seed, condition.level] = values[position], draws[position]
                elif seed in reference.members:
                    other = reference.members[seed]
                    found[seed, condition.level] = values[position] - values[other], draws[position] - draws[other]
        return found

    def trends(self) -> list[dict[str, Any]]:
        """Whether a task's score depends on the axis, for each line."""
        trends = []
        for (task, line), conditions in self._grid_lines().items():
            reference = self._reference(conditions)
            tested = self._test(self._responses(conditions, reference))
            trends.append({"task": task, "line": line, "unit": POINTS, "reference": reference, **tested})
        return trends

    def effects(self) -> list[dict[str, Any]]:
        """What a field beside the axis does: each two of its values, the second minus the first, paired by seed.

        Of an axis without an order these are all fields; what an axis of numbers does, `trends` describes. Arms are
        compared likewise, as values of `ARM`.

        First a mean over the combinations of the grid's other fields that both values have, by the seeds that all of
        these have; then, `at` each combination, its own, since a mean over a gain and a loss would hide both.
        """
        if self.axis is None:
            return []
        names = self.axis.rest if self.axis.values is not None else list(self.study.fields)
        effects = []
        for task in self.study.tasks:
            grid = [own for own in self.conditions if own.kind == GRID and own.task == task]
            for arm, name in itertools.product(self.study.arms, names):
                of_arm = [own for own in grid if own.arm == arm]
                by_value = {value: self._by_point(of_arm, name, value) for value in self.study.fields[name]}
                effects += self._effects_of({"task": task, "arm": arm, "field": name}, by_value)
            by_arm = {arm: self._by_point([own for own in grid if own.arm == arm]) for arm in self.study.arms}
            effects += self._effects_of({"task": task, "arm": None, "field": ARM}, by_arm)
        return effects

    def _effects_of(self, about: dict[str, Any], by_value: dict[Value, dict[str, Condition]]) -> list[dict[str, Any]]:
        """Of one field: value → what the other fields are → the condition."""
        means, singles = [], []
        for (first, one), (second, other) in itertools.combinations(by_value.items(), 2):
            pairs = {at: (one[at], other[at]) for at in one if at in other}
            of_two = about | {"first": describe_value(first), "second": describe_value(second)}
            compared = self._compare(list(pairs.values()))
            if compared is not None:
                means.append({**of_two, "at": None, "pairs": len(pairs), **compared})
            for at, pair in pairs.items() if len(pairs) > 1 else ():
                compared = self._compare([pair])
                if compared is not None:
                    singles.append({**of_two, "at": at, "pairs": 1, **compared})
        for family in (means, singles):
            _adjust(family)
            self._add_detectable(family)
        return means + singles

    def _by_point(
        self, conditions: list[Condition], name: str | None = None, value: Value = None
    ) -> dict[str, Condition]:
        """Grid conditions by what their fields are; with a field's name, those with this value, by the other fields."""
        found = {}
        for own in conditions:
            point = self.scores[own.task].cells[next(iter(own.members.values()))].point
            if name is None or point.get(name) == value:
                found[describe_point(point, (each for each in self.study.fields if each != name))] = own
        return found

    def interactions(self) -> list[dict[str, Any]]:
        """For each two tasks and each line: whether the second one's dependence on the axis differs from the first's.

        By seeds and levels that both tasks have; in points, and in units of each task's deviation over seeds. One test
        is the primary one: that of the study's first two tasks on its first line, in points.
        """
        lines = self._grid_lines()
        interactions = []
        for first, second in itertools.combinations(self.study.tasks, 2):
            for line in self.lines:
                if (first, line) not in lines or (second, line) not in lines:
                    continue
                reference = self._reference(lines[first, line], lines[second, line])
                a, b = (self._responses(lines[task, line], reference) for task in (first, second))
                scales = [deviation_over_seeds(responses) for responses in (a, b)]
                common = sorted(a.keys() & b.keys())
                for unit, (scale_a, scale_b) in ((POINTS, (1.0, 1.0)), (DEVIATIONS, scales)):
                    entry = {"tasks": [first, second], "line": line, "unit": unit, "reference": reference}
                    first_ones = (first, second) == tuple(self.study.tasks[:2]) and line == self.lines[0]
                    entry["primary"] = first_ones and unit == POINTS
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
        """The permutation test of responses by seed and level, the slope's interval, and a t test over seeds' slopes.

        Seeds with a single level say nothing about a dependence, and are left out.
        """
        several = {seed for seed, _ in responses if sum(seed == other for other, _ in responses) > 1}
        keys = sorted(key for key in responses if key[0] in several)
        seeds, levels = sorted(several), sorted({level for _, level in keys})
        described: dict[str, Any] = {"seeds": seeds, "levels": [self.axis.levels[level] for level in levels]}
        if not keys:
            nothing = dict.fromkeys(("test", "interval", "slopes", "slopes_p", "detectable"))
            return {**described, "observations": 0, **nothing}
        positions = None if self.axis.values is None else self.axis.places
        response = Response(
            values=np.array([responses[key][0] for key in keys]),
            seeds=np.array([seeds.index(seed) for seed, _ in keys]),
            levels=np.array([levels.index(level) for _, level in keys]),
            positions=None if positions is None else positions[levels],
        )
        described |= {"observations": len(keys), "test": asdict(permutation_test(response))}
        if positions is None:
            return described | dict.fromkeys(("interval", "slopes", "slopes_p", "detectable"))
        draws = np.stack([responses[key][1] for key in keys])
        slopes, n = slopes_by_seed(response), len(seeds)
        return {
            **described,
            "interval": interval(slope_draws(response, draws)).tolist(),
            "slopes": dict(zip(map(str, seeds), slopes.tolist())),
            "slopes_p": paired_t(slopes),
            "detectable": None if n < 2 else detectable_effect(slopes.std(ddof=1) / math.sqrt(n), n - 1),
        }

    def selections(self) -> list[dict[str, Any]]:
        """What choosing the level on English validation costs in the target languages, for each task and line.

        Of the levels that have all the seeds of the one with most; others would be compared by luck of their seeds.
        """
        found = []
        for (task, line), every in self._grid_lines().items():
            scores = self.scores[task]
            # Of those that two levels have at least: there is nothing to choose from one.
            shared = [own.members.keys() & other.members.keys() for own, other in itertools.combinations(every, 2)]
            seeds = sorted(max(shared, key=len, default=()))
            conditions = [own for own in every if own.members.keys() >= set(seeds)]
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
                    "left_out": [own.name for own in every if own not in conditions],
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


def _adjust(family: list[dict[str, Any]]) -> None:
    """Add p values adjusted by Holm, and how many were tested, to the tests of a family."""
    adjusted = holm([own["p"] for own in family])
    for own, p in zip(family, adjusted):
        own["p_holm"], own["family"] = p, sum(each is not None for each in adjusted)


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
