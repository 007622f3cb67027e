"""Scores of a task's cells under one set of bootstrap draws over clusters, and means over seeds under draws of seeds.

Together they are a bootstrap of two ways (Owen 2007, "The pigeonhole bootstrap"): each draw takes some seeds and some
clusters of examples, the same ones for all cells and languages, so that differences are paired in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from xlfa.errors import XLFAError
from xlfa.scores import ENGLISH_FAMILY
from xlfa.statistics import CONFIDENCE, Counts, Table, bootstrap, number_of_draws
from xlfa.study.results import Cell
from xlfa.study.significance import seed_weights
from xlfa.tasks import Task, get_task

DRAWS = 1999
# Scores that are reported; the first of a task's metrics always is.
REPORTED = ("accuracy", "f1", "exact_match")
ENGLISH = "en"
HEADLINE, TARGETS, ENF, NOENF, ALL = "headline", "targets", "enf", "noenf", "all"


@dataclass(frozen=True)
class TaskScores:
    """Scores of all cells of a task, 0 to 100.

    Attributes:
        task: of the registry.
        cells: C.
        rows: names, R: languages, then groups, whose scores are means over their languages.
        groups: name → languages.
        values: by metric, C x R.
        draws: by metric, C x R x draws: under the drawn clusters.
        clusters: number of clusters by language.
    """

    task: Task
    cells: list[Cell]
    rows: list[str]
    groups: dict[str, list[str]]
    values: dict[str, np.ndarray]
    draws: dict[str, np.ndarray]
    clusters: dict[str, int]

    @property
    def metrics(self) -> list[str]:
        """The reported ones, the primary one first."""
        return list(self.values)

    @property
    def number_of_draws(self) -> int:
        """Of clusters."""
        return self.draws[self.metrics[0]].shape[-1]

    def with_draws(self, number: int) -> "TaskScores":
        """With the first `number` draws, as many as another task has."""
        return replace(self, draws={metric: own[..., :number] for metric, own in self.draws.items()})

    @property
    def languages(self) -> list[str]:
        """In the order of the rows."""
        return self.rows[: len(self.rows) - len(self.groups)]


@dataclass(frozen=True)
class Estimate:
    """Means over seeds, for all rows.

    Attributes:
        values: R.
        intervals: R x 2; from clusters x seeds, for one seed from clusters.
        by_seed: seeds x R.
    """

    values: np.ndarray
    intervals: np.ndarray
    by_seed: np.ndarray


def reported_metrics(task: Task) -> list[str]:
    """Names, the primary one first."""
    return [name for name in task.metrics if name in REPORTED or name == task.metrics[0]]


def language_groups(languages: list[str], headline: list[str]) -> dict[str, list[str]]:
    """Groups of languages by name; those without a language are left out.

    `headline`: scored on every task; `targets`: of these all but English; `enf` and `noenf`: of these English and
    German, and the rest; `all`: whatever this task scored.
    """
    groups = {
        HEADLINE: headline,
        TARGETS: [code for code in headline if code != ENGLISH],
        ENF: [code for code in headline if code in ENGLISH_FAMILY],
        NOENF: [code for code in headline if code not in ENGLISH_FAMILY],
        ALL: languages,
    }
    return {name: codes for name, codes in groups.items() if codes}


def score_cells(name: str, cells: list[Cell], headline: list[str], seed: int = 0) -> TaskScores:
    """Scores of a task's cells and their bootstrap draws, from the sums by cluster.

    Args:
        name: of the task.
        cells: all scored on the same examples.
        headline: the languages of the headline.
        seed: of the draws.

    Raises:
        XLFAError: if sums are missing, or a language has a single cluster.
    """
    task = get_task(name)
    metrics, languages = reported_metrics(task), cells[0].languages
    sums = [cell.read_sums() for cell in cells]
    sizes = {code: len(sums[0][code][metrics[0]]) for code in languages}
    if min(sizes.values()) < 2:
        raise XLFAError(
            f"{name}: all examples that were scored in {min(sizes, key=sizes.get)!r} are one cluster, which shows no "
            "spread: score more of them (score: max_examples in the study's file)"
        )
    # All cells beside each other in one array of sums, clusters x (C k): one product serves a draw of all.
    counts: Counts = {
        code: {
            metric: np.concatenate([own[code][metric] for own in sums], axis=1)
            for metric in metrics
            if metric in sums[0][code]
        }
        for code in languages
    }
    clusters = {code: list(range(size)) for code, size in sizes.items()}
    if task.parallel:
        # One draw serves all languages.
        clusters = clusters[languages[0]]

    def statistic(sums: Counts) -> Table:
        """Language → metric → position of the cell → scores, ...."""
        table: Table = {}
        for code, own in sums.items():
            table[code] = {}
            for metric, values in own.items():
                scores = task.score_of_sums(metric, values.reshape(*values.shape[:-1], len(cells), -1))
                table[code][metric] = {str(position): scores[..., position] for position in range(len(cells))}
        return table

    draws = min(DRAWS, number_of_draws(clusters))
    table, _, drawn = bootstrap(statistic, counts, clusters, draws=draws, seed=seed)
    groups = language_groups(languages, [code for code in headline if code in languages])
    means = np.stack([np.isin(languages, codes) / len(codes) for codes in groups.values()])
    to_rows = np.concatenate([np.eye(len(languages)), means])
    values = {metric: _gather(table, metric, languages, len(cells)) @ to_rows.T for metric in metrics}
    distributions = {
        metric: np.einsum("rl,cld->crd", to_rows, _gather(drawn, metric, languages, len(cells))) for metric in metrics
    }
    return TaskScores(task, cells, [*languages, *groups], groups, values, distributions, sizes)


def _gather(table: Table, metric: str, languages: list[str], number: int) -> np.ndarray:
    """C x languages x …, from language → metric → position of the cell → …."""
    return np.array([[table[code][metric][str(position)] for code in languages] for position in range(number)])


def estimate(values: np.ndarray, draws: np.ndarray) -> Estimate:
    """Means over seeds with percentile intervals from clusters x seeds.

    Args:
        values: scores or paired differences, seeds x R.
        draws: the same under the drawn clusters, seeds x R x draws.
    """
    weights = seed_weights(len(values), draws.shape[-1])
    return Estimate(values.mean(0), interval(np.einsum("ds,srd->rd", weights, draws)), values)


def leaves_zero_out(bounds: Sequence[float]) -> bool:
    """Whether all of an interval is above or below 0."""
    return bounds[0] > 0 or bounds[1] < 0


def interval(draws: np.ndarray) -> np.ndarray:
    """Percentile interval, ... x 2, of ... x draws."""
    tail = (1 - CONFIDENCE) / 2
    return np.moveaxis(np.quantile(draws, [tail, 1 - tail], axis=-1), 0, -1)
