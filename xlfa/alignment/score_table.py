"""The table of alignment scores: layers, epsilons, balanced and unbalanced plans, and ways to extract links.

All conditions see the same states. Two of the ways need no plan and are published baselines: the softmax of
AWESoME-align and the mutual argmax of SimAlign (`xlfa.alignment.links`).
"""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from xlfa.alignment.aligner import Aligner, Alignment, EncodedPair, PairStates, TransportOptions
from xlfa.alignment.gold import GoldSet
from xlfa.alignment.links import METHODS, Link, argmax_links, extract_links, softmax_links
from xlfa.alignment.scoring import error_name, link_counts, score_differences, score_sets
from xlfa.environment import code_state, describe_environment
from xlfa.errors import XLFAError
from xlfa.files import write_text

TABLE_JSON, TABLE_CSV = "table.json", "table.csv"
BALANCED, UNBALANCED = "transport, balanced", "transport, unbalanced"


@dataclass(frozen=True)
class Condition:
    """How links are found: a way to extract them, and of what.

    Attributes:
        method: of `METHODS` or `BASELINES`; or the name of a file that the links came from.
        layer: whose states are aligned; None for a file.
        transport: how the plan is computed; None where there is none.
        threshold: of the method `threshold`, else None.
    """

    method: str
    layer: int | str | None = None
    transport: TransportOptions | None = None
    threshold: float | None = None

    @property
    def kind(self) -> str:
        """What conditions are grouped by where one is chosen of each group."""
        if self.transport is None:
            return self.method
        return BALANCED if self.transport.unbalanced is None else UNBALANCED

    def describe(self) -> dict[str, Any]:
        """The condition as columns of the table."""
        epsilon = None if self.transport is None else self.transport.epsilon
        return {
            "method": self.method,
            "threshold": self.threshold,
            "layer": self.layer,
            # JSON has no infinity, the epsilon of the product plan.
            "epsilon": "inf" if epsilon == math.inf else epsilon,
            "unbalanced": None if self.transport is None else self.transport.unbalanced,
        }


@dataclass(frozen=True)
class Proposal:
    """The links that a condition proposes for each sentence pair, and how many plans did not converge."""

    links: list[frozenset[tuple[int, int]]]
    unconverged: int = 0


# Gold set's name → condition → what it proposes; every set has the same conditions.
Proposals = dict[str, dict[Condition, Proposal]]


# Ways to extract links that need no plan.
BASELINES: dict[str, Callable[[PairStates], list[Link]]] = {"softmax": softmax_links, "argmax": argmax_links}
ALL_METHODS = (*METHODS, *BASELINES)


def grid(
    layers: Sequence[int | str],
    epsilons: Sequence[float],
    unbalanced: Sequence[float | None],
    methods: Sequence[str],
    threshold: float,
) -> list[Condition]:
    """Every combination; the baselines once a layer, since they know no epsilon.

    Raises:
        XLFAError: for an unknown method, and as `TransportOptions`.
    """
    unknown = [method for method in methods if method not in ALL_METHODS]
    if unknown:
        raise XLFAError(f"--method {unknown[0]}: it must be one of {', '.join(ALL_METHODS)}")
    plans = [TransportOptions(epsilon=epsilon, unbalanced=strength) for strength in unbalanced for epsilon in epsilons]
    conditions = []
    for layer in layers:
        for method in methods:
            if method in BASELINES:
                conditions.append(Condition(method, layer))
            else:
                kept = threshold if method == "threshold" else None
                conditions += [Condition(method, layer, plan, kept) for plan in plans]
    return list(dict.fromkeys(conditions))


def propose(aligner: Aligner, sets: Sequence[GoldSet], conditions: Sequence[Condition]) -> Proposals:
    """The links of every condition for every gold set; the sentences are tokenised once.

    Raises:
        XLFAError: for a sentence pair that cannot be aligned; it names the set and the pair.
    """
    proposals: Proposals = {}
    for gold in tqdm(sets, desc="sets", disable=len(sets) == 1):
        encoded = [_encode(aligner, gold, number) for number in range(len(gold.links))]
        with tqdm(total=len(conditions), desc=gold.name, leave=False) as bar:
            proposals[gold.name] = {}
            for layer in dict.fromkeys(condition.layer for condition in conditions):
                states = aligner.at_layer(layer).run(encoded)
                own = [condition for condition in conditions if condition.layer == layer]
                for transport in dict.fromkeys(condition.transport for condition in own):
                    alignments = [] if transport is None else aligner.align(states, transport)
                    same = [condition for condition in own if condition.transport == transport]
                    for condition in same:
                        proposals[gold.name][condition] = _extract(condition, states, alignments)
                    bar.update(len(same))
    return proposals


def _encode(aligner: Aligner, gold: GoldSet, number: int) -> EncodedPair:
    try:
        return aligner.encode(*gold.pairs[number], gold.languages)
    except XLFAError as error:
        raise XLFAError(f"{gold.name}, sentence pair {number + 1}: {error}") from None


def _extract(condition: Condition, states: Sequence[PairStates], alignments: Sequence[Alignment]) -> Proposal:
    if condition.method in BASELINES:
        found = map(BASELINES[condition.method], states)
    else:
        threshold = {} if condition.threshold is None else {"threshold": condition.threshold}
        found = (extract_links(alignment, condition.method, **threshold) for alignment in alignments)
    links = [frozenset((link.source, link.target) for link in each) for each in found]
    return Proposal(links, sum(not alignment.converged for alignment in alignments))


def score_proposals(sets: Sequence[GoldSet], proposals: Proposals) -> dict[str, Any]:
    """The content of `table.json` without a model: what was scored, and a row for each gold set and condition."""
    told_apart = any(gold.told_apart for gold in sets)
    scores = score_sets(_counts(sets, proposals), told_apart)
    pairs = {gold.name: len(gold.links) for gold in sets}
    rows = []
    for name, by_condition in scores.items():
        # The average over the sets has the pairs of all of them.
        names = [name] if name in pairs else list(pairs)
        for condition, values in by_condition.items():
            unconverged = sum(proposals[each][condition].unconverged for each in names)
            counted = {"pairs": sum(pairs[each] for each in names), "unconverged": unconverged}
            rows.append({"set": name, **condition.describe(), **counted, **values})
    return {
        "schema_version": 1,
        "error": error_name(told_apart),
        "sets": pairs,
        "conditions": [label(condition.describe()) for condition in scores[sets[0].name]],
        "rows": rows,
        "environment": describe_environment(),
        "code": code_state(),
    }


def choose(sets: Sequence[GoldSet], proposals: Proposals) -> dict[str, tuple[Condition, dict[str, Any]]]:
    """Of each kind of condition the one with the least error on all pairs of these gold sets, and its scores there."""
    told_apart = any(gold.told_apart for gold in sets)
    counts = _counts(sets, proposals)
    conditions = next(iter(counts.values()))
    pooled = {condition: np.concatenate([own[condition] for own in counts.values()]) for condition in conditions}
    scores = score_sets({"pooled": pooled}, told_apart)["pooled"]
    chosen: dict[str, tuple[Condition, dict[str, Any]]] = {}
    for condition, values in scores.items():
        best = chosen.get(condition.kind)
        if best is None or values[error_name(told_apart)] < best[1][error_name(told_apart)]:
            chosen[condition.kind] = condition, values
    return chosen


def compare_chosen(
    sets: Sequence[GoldSet], proposals: Proposals, chosen: dict[str, tuple[Condition, dict[str, Any]]]
) -> dict[str, Any]:
    """The chosen conditions, and how far their scores are from those of each chosen baseline.

    Returns:
        `chosen`: kind → the condition and its scores where it was chosen; `differences`: baseline → set → kind → scores
        minus the baseline's, with paired 95 % intervals.
    """
    counts = {
        name: {kind: own[condition] for kind, (condition, _) in chosen.items()}
        for name, own in _counts(sets, proposals).items()
    }
    told_apart = any(gold.told_apart for gold in sets)
    return {
        "chosen": {kind: {**condition.describe(), "scores": scores} for kind, (condition, scores) in chosen.items()},
        "differences": {
            baseline: score_differences(counts, baseline, told_apart) for baseline in BASELINES if baseline in chosen
        },
    }


def _counts(sets: Sequence[GoldSet], proposals: Proposals) -> dict[str, dict[Condition, np.ndarray]]:
    return {
        gold.name: {
            condition: link_counts(proposal.links, gold.links) for condition, proposal in proposals[gold.name].items()
        }
        for gold in sets
    }


def write_table(folder: Path, table: dict[str, Any]) -> None:
    """Write `table.json`, all of it, and `table.csv`, its rows with two decimals."""
    write_text(folder / TABLE_JSON, json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / TABLE_CSV, format_csv(table["rows"]))


def format_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV: an interval in the columns `…_low` and `…_high`, nothing where there is no value."""
    flat = [_flattened(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flattened(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name.endswith("_interval"):
            stem = name.removesuffix("_interval")
            bounds = ("", "") if value is None else (f"{value[0]:.2f}", f"{value[1]:.2f}")
            flat |= dict(zip((f"{stem}_low", f"{stem}_high"), bounds))
        elif f"{name}_interval" in row:
            flat[name] = f"{value:.2f}"
        else:
            flat[name] = value
    return flat


def label(columns: dict[str, Any]) -> str:
    """A condition in words, from the columns of the table that `Condition.describe` gives."""
    given = [(name, columns[name]) for name in ("layer", "epsilon", "unbalanced") if columns[name] is not None]
    parts = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in given]
    return ", ".join([*parts, columns["method"]])


def format_table(table: dict[str, Any]) -> str:
    """Error rates for the terminal, a line a condition and a column a set; where some were chosen, these alone."""
    error, comparison = table["error"], table.get("comparison")
    shown = table["conditions"] if comparison is None else [label(each) for each in comparison["chosen"].values()]
    errors: dict[str, dict[str, float]] = {}
    for row in table["rows"]:
        errors.setdefault(row["set"], {})[label(row)] = row[error]
    widths = {name: max(7, len(name)) for name in errors}
    first = max(map(len, shown))
    lines = [
        f"{error} in per cent, sentence pairs: {sum(table['sets'].values())}, conditions: {len(table['conditions'])}"
    ]
    lines.append("  ".join([" " * first, *(name.rjust(width) for name, width in widths.items())]))
    for condition in shown:
        values = [f"{errors[name][condition]:{width}.1f}" for name, width in widths.items()]
        lines.append("  ".join([condition.ljust(first), *values]))
    if len(shown) == 1:
        lines += [_format_scores(row, error) for row in table["rows"]]
    return "\n".join(lines if comparison is None else [*lines, *_format_differences(comparison, error)])


def _format_scores(row: dict[str, Any], error: str) -> str:
    parts = [f"{name} {row[name]:.1f}{_format_interval(row, name)}" for name in (error, "precision", "recall", "f1")]
    return f"{row['set']}: {', '.join(parts)}"


def _format_differences(comparison: dict[str, Any], error: str) -> list[str]:
    lines = ["chosen on the embedded gold:"]
    lines += [f"  {kind}: {label(chosen)}" for kind, chosen in comparison["chosen"].items()]
    for baseline, sets in comparison["differences"].items():
        lines.append(f"{error} minus that of {baseline}, negative is better:")
        for name, kinds in sets.items():
            for kind, scores in kinds.items():
                lines.append(f"  {name}, {kind}: {scores[error]:+.1f}{_format_interval(scores, error, '+')}")
    return lines


def _format_interval(scores: dict[str, Any], name: str, sign: str = "") -> str:
    """The interval of a score in brackets; nothing where there is none."""
    interval = scores[f"{name}_interval"]
    return "" if interval is None else f" [{interval[0]:{sign}.1f}, {interval[1]:{sign}.1f}]"
