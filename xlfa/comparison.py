"""Two runs on the same examples: differences by language, with a paired bootstrap over clusters."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlfa.errors import XLFAError
from xlfa.files import write_text
from xlfa.scores import (
    SCHEMA_VERSION,
    SCORES_FILE,
    describe_examples,
    predictions_file,
    read_predictions,
    table_rows,
    tabulate,
)
from xlfa.statistics import (
    CONFIDENCE,
    Clusters,
    Counts,
    Table,
    adjusted,
    bootstrap,
    map_table,
    number_of_draws,
    of_language,
    p_value,
)
from xlfa.tasks import Prediction, Task

COMPARISON_FILE = "compare.json"
COMPARISON_VERSION = 1
# Of `scores.json`.
COMPARED = ("dataset", "splits", "languages", "examples", "ids", "clusters")


@dataclass(frozen=True)
class ScoredRun:
    """What a scoring run wrote.

    Attributes:
        name: as the user gave it.
        scores: its `scores.json`.
        predictions: by language.
    """

    name: str
    scores: dict[str, Any]
    predictions: dict[str, list[Prediction]]


def compare_runs(task: Task, path_a: Path, path_b: Path) -> dict[str, Any]:
    """The content of `compare.json`.

    Its `differences` hold, by row (languages, means, families) and metric: the scores `a` and `b`, `difference`
    (b - a), its `interval`, `p` (two-sided, of no difference) and for languages `p_adjusted`, as they are several. They
    are None where the score does not exist; `interval` and the p values are also None for a single cluster.

    Args:
        path_a, path_b: run folders that hold `scores/<task>`, or folders that hold `scores.json`.

    Raises:
        XLFAError: for a folder without usable scores of the task, and for runs that scored different examples.
    """
    a, b = (read_run(task, path) for path in (path_a, path_b))
    check_same_examples(a, b)
    # Both runs' under one language, so that one draw serves both.
    counts: Counts = {
        language: {
            (name, metric): values
            for name, run in (("a", a), ("b", b))
            for metric, values in task.contributions(run.predictions[language], language).items()
        }
        for language in a.predictions
    }

    def statistic(sums: Counts) -> Table:
        rows_a, rows_b = (_rows(task, sums, run) for run in ("a", "b"))
        difference = {
            row: {metric: None if value is None else rows_b[row][metric] - value for metric, value in own.items()}
            for row, own in rows_a.items()
        }
        return {"a": rows_a, "b": rows_b, "difference": difference}

    clusters: Clusters = a.scores["clusters"]
    table, intervals, draws = bootstrap(statistic, counts, clusters)
    columns = {**table, "interval": intervals["difference"], "p": map_table(draws["difference"], p_value)}
    differences = {
        row: {metric: {key: column[row][metric] for key, column in columns.items()} for metric in task.metrics}
        for row in columns["difference"]
    }
    for metric in task.metrics:
        cells = [differences[language][metric] for language in a.predictions]
        for cell in cells:
            cell["p_adjusted"] = None
        tested = [cell for cell in cells if cell["p"] is not None]
        for cell, p_adjusted in zip(tested, adjusted([cell["p"] for cell in tested])):
            cell["p_adjusted"] = p_adjusted
    return {
        "schema_version": COMPARISON_VERSION,
        "task": task.name,
        "primary_metric": task.metrics[0],
        "a": a.name,
        "b": b.name,
        "languages": list(a.predictions),
        "examples": a.scores["examples"],
        "bootstrap": {"confidence": CONFIDENCE, "draws": number_of_draws(clusters), "adjustment": "benjamini-hochberg"},
        "differences": differences,
    }


def _rows(task: Task, sums: Counts, run: str) -> dict[str, Any]:
    """The rows of one run's table of scores, from the sums of both: language → (run, metric) → ... x k."""
    own = {
        language: {metric: values for (name, metric), values in both.items() if name == run}
        for language, both in sums.items()
    }
    return table_rows(tabulate(task, own))


def read_scores(file: Path) -> dict[str, Any]:
    """The content of a `scores.json` of any version; it names its version and its task.

    Raises:
        XLFAError: if the file cannot be read or holds something else.
    """
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))
        scores["schema_version"], scores["task"]
    except OSError as error:
        raise XLFAError(f"cannot read the scores {file}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise XLFAError(f"{file} holds no scores as XLFA writes them: {error!r}") from None
    return scores


def read_run(task: Task, path: Path) -> ScoredRun:
    """The scores of a task and their predictions.

    Raises:
        XLFAError: if they are not there, cannot be read, are of another task or of another version of the format.
    """
    folders = (path, path / "scores" / task.name)
    try:
        folder = next((folder for folder in folders if (folder / SCORES_FILE).is_file()), None)
    except OSError as error:
        raise XLFAError(f"--compare {path}: cannot read it: {error.strerror}") from None
    if folder is None:
        raise XLFAError(
            f"--compare {path}: neither it nor its scores/{task.name} holds {SCORES_FILE}: score the run first, with "
            f"--model and --task {task.name}"
        )
    file = folder / SCORES_FILE
    scores = read_scores(file)
    version, name = scores["schema_version"], scores["task"]
    if name != task.name:
        raise XLFAError(f"--compare {path}: it was scored on the task {name!r}, not on {task.name!r}")
    if version != SCHEMA_VERSION:
        raise XLFAError(
            f"{file} has schema_version {version}, and a comparison needs {SCHEMA_VERSION}, which has the clusters of "
            "the examples: score the run again"
        )
    missing = [name for name in COMPARED if name not in scores]
    if missing:
        raise XLFAError(f"{file} lacks {missing[0]!r}, which a comparison needs: score the run again")
    predictions = {language: read_predictions(predictions_file(folder, language)) for language in scores["languages"]}
    for language, rows in predictions.items():
        if [row.id for row in rows] != of_language(scores["ids"], language):
            raise XLFAError(f"{predictions_file(folder, language)} has other examples than {file}: score the run again")
    return ScoredRun(str(path), scores, predictions)


def check_same_examples(a: ScoredRun, b: ScoredRun) -> None:
    """Raise `XLFAError` that names the first difference between what two runs were scored on."""

    def differ(what: str, of_a: Any, of_b: Any) -> XLFAError:
        return XLFAError(
            f"--compare {a.name} {b.name}: the runs were not scored on the same examples: {what} {of_a} in the first, "
            f"{of_b} in the second"
        )

    for field in ("dataset", "splits"):
        if a.scores[field] != b.scores[field]:
            raise differ(field, repr(a.scores[field]), repr(b.scores[field]))
    if set(a.predictions) != set(b.predictions):
        raise differ("languages", " ".join(a.predictions), " ".join(b.predictions))
    for language, rows in a.predictions.items():
        others = b.predictions[language]
        if len(rows) != len(others):
            raise differ(f"number of examples in {language!r}", len(rows), len(others))
        clusters, other_clusters = (of_language(run.scores["clusters"], language) for run in (a, b))
        for number, (row, other) in enumerate(zip(rows, others)):
            if row.id != other.id:
                raise differ(f"id of example {number + 1} in {language!r}", repr(row.id), repr(other.id))
            if row.label != other.label:
                raise differ(f"label of example {row.id!r} in {language!r}", repr(row.label), repr(other.label))
            if clusters[number] != other_clusters[number]:
                raise differ(f"cluster of example {row.id!r} in {language!r}", clusters[number], other_clusters[number])


def write_comparison(folder: Path, comparison: dict[str, Any]) -> Path:
    """`compare.json` in `folder`, complete or not there; returns its path."""
    path = folder / COMPARISON_FILE
    write_text(path, json.dumps(comparison, indent=2, ensure_ascii=False) + "\n")
    return path


def format_comparison(comparison: dict[str, Any]) -> str:
    """A table of the primary metric for the terminal."""
    metric, rows = comparison["primary_metric"], comparison["differences"]
    width = max(map(len, rows))
    lines = [
        f"{comparison['task']}, {metric}: B - A, {describe_examples(comparison)}",
        f"A: {comparison['a']}",
        f"B: {comparison['b']}",
        f"{'':<{width}} {'A':>7} {'B':>7} {'B - A':>7} {'interval':>18} {'p':>7} {'p adj.':>7}",
    ]
    for row, by_metric in rows.items():
        cell = by_metric[metric]
        interval = "-" if cell["interval"] is None else "[{:+.2f}, {:+.2f}]".format(*cell["interval"])
        a, b, difference, p, p_adjusted = (
            "-" if cell.get(name) is None else format(cell[name], spec)
            for name, spec in (("a", ".2f"), ("b", ".2f"), ("difference", "+.2f"), ("p", ".4f"), ("p_adjusted", ".4f"))
        )
        lines.append(f"{row:<{width}} {a:>7} {b:>7} {difference:>7} {interval:>18} {p:>7} {p_adjusted:>7}")
    settings = comparison["bootstrap"]
    lines += [
        f"interval ({settings['confidence']:.0%}) and p (two-sided): paired bootstrap over clusters of examples, "
        f"{settings['draws']} draws",
        f"p adj.: adjusted for {len(comparison['languages'])} languages (Benjamini-Hochberg): of the languages below "
        "0.05, at most 5 % are expected to be false discoveries",
    ]
    return "\n".join(lines)
