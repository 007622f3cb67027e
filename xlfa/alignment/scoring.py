"""Scores of word alignments against links that people drew: alignment error rate, precision, recall, F1.

Of the proposed links A, the sure links S and the possible links P, which contain S (Och and Ney 2003, A Systematic
Comparison of Various Statistical Alignment Models, section 5, Evaluation Methodology):

    precision = |A ∩ P| / |A|    recall = |A ∩ S| / |S|    AER = 1 - (|A ∩ S| + |A ∩ P|) / (|A| + |S|)

over all sentences at once, not as means over sentences. F1 is the harmonic mean of this precision and this recall.
Without possible links beside the sure ones, P = S and AER = 1 - F1. Such an error rate is named `aer_all_sure`: it
counts as wrong what a gold standard with both kinds lets pass.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import numpy as np

from xlfa.alignment.formats import PharaohLinks
from xlfa.errors import XLFAError
from xlfa.statistics import Counts, Table, bootstrap

Link = tuple[int, int]
AVERAGE = "average"
AER, AER_ALL_SURE = "aer", "aer_all_sure"


def error_name(told_apart: bool) -> str:
    """The key of the alignment error rate: whether the gold standard tells sure links from possible ones."""
    return AER if told_apart else AER_ALL_SURE


def link_counts(proposed: Sequence[Collection[Link]], gold: Sequence[PharaohLinks]) -> np.ndarray:
    """|A|, |S|, |A ∩ S| and |A ∩ P| of each sentence pair, sentences x 4.

    Raises:
        XLFAError: if the two have different numbers of sentence pairs, or the gold standard has no sure link at all.
    """
    if len(proposed) != len(gold):
        raise XLFAError(f"links of {len(proposed)} sentence pairs cannot be scored against gold links of {len(gold)}")
    if not any(each.sure for each in gold):
        raise XLFAError(f"the gold standard has no sure link in {len(gold)} sentence pairs: there is nothing to find")
    rows = []
    for links, wanted in zip(proposed, gold):
        links = set(links)
        rows.append((len(links), len(wanted.sure), len(links & wanted.sure), len(links & wanted.possible)))
    return np.array(rows)


def alignment_scores(counts: np.ndarray, told_apart: bool) -> dict[str, np.ndarray]:
    """Scores in per cent from summed `link_counts`, ... x 4, each of the leading shape.

    A proportion of nothing (the precision where no link is proposed) is 0.
    """
    proposed, sure, sure_hits, possible_hits = np.moveaxis(np.asarray(counts, dtype=float), -1, 0)
    precision, recall = _proportion(possible_hits, proposed), _proportion(sure_hits, sure)
    scores = {
        error_name(told_apart): 1 - _proportion(sure_hits + possible_hits, proposed + sure),
        "precision": precision,
        "recall": recall,
        "f1": _proportion(2 * precision * recall, precision + recall),
    }
    return {name: 100 * values for name, values in scores.items()}


def score_sets(counts: Counts, told_apart: bool, draws: int | None = None) -> dict[str, dict[Hashable, dict[str, Any]]]:
    """Scores of several alignments of each set of sentence pairs, with 95 % bootstrap intervals over sentence pairs.

    Args:
        counts: set → alignment → its `link_counts`; each set has the same alignments.
        told_apart: see `error_name`.
        draws: see `bootstrap`.

    Returns:
        Set → alignment → {score: value, score_interval: [low, high]}; where there are several sets also their
        unweighted means, as the set `average`. Intervals are None where a set has a single sentence pair.
    """
    table, intervals, _ = _resample(counts, lambda scores: scores, told_apart, draws)
    return {
        name: {alignment: _with_intervals(scores, intervals[name][alignment]) for alignment, scores in own.items()}
        for name, own in table.items()
    }


def score_differences(
    counts: Counts, reference: Hashable, told_apart: bool, draws: int | None = None
) -> dict[str, dict[Hashable, dict[str, Any]]]:
    """As `score_sets`, each alignment's scores minus those of the alignment `reference` of the same drawn sentences."""

    def minus_reference(scores: Table) -> Table:
        return {
            name: {alignment: _minus(values, own[reference]) for alignment, values in own.items()}
            for name, own in scores.items()
        }

    table, intervals, _ = _resample(counts, minus_reference, told_apart, draws)
    return {
        name: {
            alignment: _with_intervals(scores, intervals[name][alignment])
            for alignment, scores in own.items()
            if alignment != reference
        }
        for name, own in table.items()
    }


def _resample(
    counts: Counts, transform: Callable[[Table], Table], told_apart: bool, draws: int | None
) -> tuple[Table, Table, Table]:
    """`bootstrap` of what `transform` makes of the scores of every set and of their average."""

    def statistic(sums: Counts) -> Table:
        scores = {
            name: {alignment: alignment_scores(values, told_apart) for alignment, values in own.items()}
            for name, own in sums.items()
        }
        return transform(scores if len(scores) == 1 else {**scores, AVERAGE: _average(list(scores.values()))})

    clusters = {name: list(range(len(next(iter(own.values()))))) for name, own in counts.items()}
    return bootstrap(statistic, counts, clusters, draws)


def _average(tables: list[Table]) -> Table:
    return {
        alignment: {score: np.mean([table[alignment][score] for table in tables], axis=0) for score in scores}
        for alignment, scores in tables[0].items()
    }


def _minus(scores: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values - reference[name] for name, values in scores.items()}


def _with_intervals(scores: dict[str, np.ndarray], intervals: dict[str, list[float] | None]) -> dict[str, Any]:
    """{score: number, score_interval: [low, high] or None}."""
    described: dict[str, Any] = {}
    for name, value in scores.items():
        described |= {name: float(value), f"{name}_interval": intervals[name]}
    return described


def _proportion(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
