"""Bootstrap over clusters of examples: intervals of scores and of their differences, p values.

Examples that share a premise or a paragraph are not independent, so whole clusters are drawn (Davison and Hinkley 1997,
section 3.8). Every score here is a function of sums over examples, so a draw is a weighted sum of the clusters' sums.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
DRAWS = 9999
# Draws times clusters: sets with very many sentences get fewer draws, so that all intervals take seconds.
MOST_WORK = 200_000_000
FEWEST_DRAWS = 999
# Draws times clusters that are in memory at once.
BATCH_WORK = 4_000_000

# The cluster of each example: one list where the languages are parallel (one draw then serves them all), else a list
# for each language.
Clusters = list[int] | dict[str, list[int]]
# Language → name → what each example adds to the sums that a score is a function of, examples x k.
Counts = dict[str, dict[Hashable, np.ndarray]]
# Nested dictionaries with scores, or arrays of them, as leaves; None where a score does not exist.
Table = dict[str, Any]


def cluster_numbers(groups: Sequence[Hashable]) -> list[int]:
    """0, 1, … for the distinct values, in the order in which they first appear."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return [numbers[group] for group in groups]


def of_language(values: Any, language: str) -> Any:
    """What a dictionary by language has for this one; anything else is shared by all languages of a parallel set."""
    return values[language] if isinstance(values, dict) else values


def number_of_draws(clusters: Clusters) -> int:
    """How often `bootstrap` draws by default."""
    return max(FEWEST_DRAWS, min(DRAWS, MOST_WORK // sum(_sizes(clusters))))


def bootstrap(
    statistic: Callable[[Counts], Table], counts: Counts, clusters: Clusters, draws: int | None = None, seed: int = 0
) -> tuple[Table, Table, Table]:
    """Percentile intervals of everything in a table of scores, from one set of draws for all of it.

    scipy's bootstrap resamples the clusters' indices; the statistic sees sums over the drawn clusters. Percentile
    intervals and not BCa ones: they agree with the p values of the same draws, and exist where all draws are equal (two
    runs with the same predictions), where BCa gives NaN.

    Args:
        statistic: the table from summed counts, language → name → ... x k; it maps over the leading dimensions.
        counts: of the examples.
        clusters: of the examples, numbered from 0.
        draws: by default `number_of_draws`.
        seed: of the draws.

    Returns:
        Three tables with the statistic's keys: its values, [low, high] of each, and the value of each draw. The second
        and the third are None where the first is, and everywhere if a language has a single cluster: that shows no
        spread.
    """
    sizes = _sizes(clusters)
    sums = {
        language: {name: sum_by_cluster(values, of_language(clusters, language)) for name, values in own.items()}
        for language, own in counts.items()
    }
    table = statistic({language: map_table(own, lambda values: values.sum(0)) for language, own in sums.items()})
    if min(sizes) < 2 or next(_leaves(table), None) is None:
        nothing = map_table(table, lambda _: None)
        return table, nothing, nothing

    def resampled(*indices: np.ndarray, axis: int) -> np.ndarray:
        """Indices of drawn clusters, ... x clusters for each draw that is not shared, to leaves of the table x ..."""
        drawn = [_multiplicities(each) for each in indices]
        weights = dict(zip(clusters, drawn)) if isinstance(clusters, dict) else drawn[0]
        summed = {
            language: {name: of_language(weights, language) @ values for name, values in own.items()}
            for language, own in sums.items()
        }
        return np.stack(list(_leaves(statistic(summed))))

    draws = draws or number_of_draws(clusters)
    result = stats.bootstrap(
        [np.arange(size) for size in sizes],
        resampled,
        n_resamples=draws,
        batch=max(1, min(draws, BATCH_WORK // sum(sizes))),
        vectorized=True,
        axis=-1,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    bounds = iter(np.stack(result.confidence_interval, -1).tolist())
    values = iter(result.bootstrap_distribution)
    return table, map_table(table, lambda _: next(bounds)), map_table(table, lambda _: next(values))


def p_value(draws: np.ndarray) -> float:
    """Two-sided p value of the hypothesis that a difference is 0, from its bootstrap draws.

    It is below 1 - `CONFIDENCE` where the percentile interval leaves 0 out (Efron and Tibshirani 1993, section 15.4).
    Draws at 0 count for both sides; one draw is added to each, so that no p value is 0.
    """
    smaller_tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return min(1.0, 2.0 * (1 + int(smaller_tail)) / (1 + len(draws)))


def adjusted(p_values: Sequence[float]) -> list[float]:
    """p values of several hypotheses, adjusted to control the false discovery rate (Benjamini and Hochberg 1995)."""
    return stats.false_discovery_control(p_values).tolist() if p_values else []


def map_table(table: Table, function: Callable[[Any], Any]) -> Table:
    """A table of the same keys, with the function of each leaf; None stays."""
    return {
        key: map_table(value, function) if isinstance(value, dict) else None if value is None else function(value)
        for key, value in table.items()
    }


def _leaves(table: Table) -> Iterator[Any]:
    """The leaves that are not None, in the order of `map_table`."""
    for value in table.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        elif value is not None:
            yield value


def _sizes(clusters: Clusters) -> list[int]:
    """Number of clusters of each draw that is not shared."""
    return [1 + max(own) for own in (clusters.values() if isinstance(clusters, dict) else [clusters])]


def sum_by_cluster(values: np.ndarray, clusters: list[int]) -> np.ndarray:
    """Examples x k to clusters x k."""
    sums = np.zeros((1 + max(clusters), values.shape[1]))
    np.add.at(sums, clusters, values)
    return sums


def _multiplicities(indices: np.ndarray) -> np.ndarray:
    """How often each of n clusters was drawn: indices, ... x n, to numbers, ... x n."""
    rows = indices.reshape(-1, indices.shape[-1])
    starts = rows.shape[1] * np.arange(len(rows))[:, None]
    return np.bincount((rows + starts).ravel(), minlength=rows.size).reshape(indices.shape).astype(float)
