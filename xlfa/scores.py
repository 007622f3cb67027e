"""`scores.json`: what a scoring run found, in the format of `scores.schema.json`, and its table and figure."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from modeling_xlfa import XLFAConfig
from xlfa.environment import versions
from xlfa.errors import XLFAError
from xlfa.files import replacing, write_text
from xlfa.languages import FAMILIES
from xlfa.statistics import CONFIDENCE, Clusters, Counts, Table, bootstrap, number_of_draws, of_language
from xlfa.tasks import Prediction, Task

SCORES_FILE = "scores.json"
SCORES_SCHEMA = Path(__file__).parent / "scores.schema.json"
FIGURE_FILE = "scores.png"
# Version 1 had no intervals, families and clusters; version 2 no split by language.
SCHEMA_VERSION = 3
# The DLFA paper's groups: enf, and noenf for the rest.
ENGLISH_FAMILY = ("en", "de")
SUMMARIES = ("average", "average_xtreme", "enf", "noenf", "transfer_gap")

# Score by metric, 0 to 100, or an array of such scores, one a bootstrap draw.
Scores = dict[str, float | np.ndarray | None]


def summarise(task: Task, languages: dict[str, Scores]) -> Table:
    """Means over groups of languages, by metric; `families` holds those over the scored languages of each family.

    A mean is None where a language of the group was not scored; languages that a metric does not exist for are left out
    of its means. `transfer_gap` is English minus the mean of the others.
    """
    rest = [code for code in languages if code not in ENGLISH_FAMILY]
    others = [code for code in languages if code != "en"]
    summary = {
        "average": _group_mean(task, languages, list(languages)),
        "average_xtreme": _group_mean(task, languages, list(task.xtreme_languages)),
        "enf": _group_mean(task, languages, list(ENGLISH_FAMILY)),
        "noenf": _group_mean(task, languages, rest),
    }
    elsewhere = _group_mean(task, languages, others)
    english = languages.get("en", dict.fromkeys(task.metrics))
    summary["transfer_gap"] = {
        name: None if english[name] is None or elsewhere[name] is None else english[name] - elsewhere[name]
        for name in task.metrics
    }
    families: dict[str, list[str]] = {}
    for code in languages:
        families.setdefault(FAMILIES[code], []).append(code)
    summary["families"] = {family: _group_mean(task, languages, codes) for family, codes in sorted(families.items())}
    return summary


def _group_mean(task: Task, languages: dict[str, Scores], group: list[str]) -> Scores:
    if not group or any(code not in languages for code in group):
        return dict.fromkeys(task.metrics)
    means = {}
    for name in task.metrics:
        values = [languages[code][name] for code in group if languages[code][name] is not None]
        means[name] = sum(values) / len(values) if values else None
    return means


def tabulate(task: Task, sums: Counts) -> Table:
    """The scores of all languages and the means over them, from summed contributions: language → metric → ... x k."""
    languages = {
        language: {name: task.score_of_sums(name, own[name]) if name in own else None for name in task.metrics}
        for language, own in sums.items()
    }
    return {"languages": languages, **summarise(task, languages)}


def build_scores(
    task: Task,
    predictions: dict[str, list[Prediction]],
    clusters: Clusters,
    splits: dict[str, str],
    config: XLFAConfig,
    settings: dict[str, Any],
    weights: str | None = None,
) -> dict[str, Any]:
    """The content of `scores.json`.

    Args:
        predictions: ISO 639-1 code → all of a language; those of a parallel task in the same order in every language.
        clusters: of the examples; by language unless the task is parallel.
        splits: the split that was scored, by language.
        config: of the model; its fusion and transport fields are recorded.
        settings: how it was scored.
        weights: a digest of the model's weights; None for a model from the Hub, where its revision tells.
    """
    recorded = ("fusion", "ot_", "classifier_pooling")
    languages = {language: task.score(rows, language) for language, rows in predictions.items()}
    ids: dict[str, list[str]] | list[str] = {code: [row.id for row in rows] for code, rows in predictions.items()}
    examples: dict[str, int] | int = {language: len(rows) for language, rows in predictions.items()}
    if task.parallel:
        ids, examples = ids[next(iter(ids))], examples[next(iter(examples))]
    counts = {language: task.contributions(rows, language) for language, rows in predictions.items()}
    _, intervals, _ = bootstrap(functools.partial(tabulate, task), counts, clusters)
    return {
        "schema_version": SCHEMA_VERSION,
        "task": task.name,
        "dataset": task.test_dataset,
        "splits": splits,
        "primary_metric": task.metrics[0],
        "languages": languages,
        **summarise(task, languages),
        "intervals": intervals,
        "bootstrap": {"confidence": CONFIDENCE, "draws": number_of_draws(clusters)},
        "examples": examples,
        "ids": ids,
        "clusters": clusters,
        "model": {
            "encoder": config.text_config.model_type,
            **{name: value for name, value in config.to_dict().items() if name.startswith(recorded)},
            **({} if weights is None else {"weights": weights}),
        },
        "settings": settings,
        "versions": versions(),
    }


def write_scores(folder: Path, scores: dict[str, Any]) -> None:
    """`scores.json` and `scores.png` in `folder`, each complete or not there."""
    write_text(folder / SCORES_FILE, json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    draw_scores(scores, folder / FIGURE_FILE)


def predictions_file(folder: Path, language: str) -> Path:
    """Where the predictions of a language lie, beside `scores.json` in `folder`."""
    return folder / "predictions" / f"{language}.jsonl"


def write_predictions(path: Path, predictions: list[Prediction]) -> None:
    """One JSON object a line: id, prediction, label, score (the model's probability of its prediction)."""
    lines = (json.dumps(vars(prediction), ensure_ascii=False) for prediction in predictions)
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_predictions(path: Path) -> list[Prediction]:
    """What `write_predictions` wrote.

    Raises:
        XLFAError: if the file is not there or holds something else.
    """
    try:
        # Not splitlines: text may hold separators that are no ends of lines, such as U+2028.
        with path.open(encoding="utf-8") as lines:
            return [Prediction(**json.loads(line)) for line in lines]
    except OSError as error:
        raise XLFAError(f"cannot read the predictions {path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise XLFAError(f"{path} holds no predictions as XLFA writes them: {error}") from None


def table_rows(table: Table) -> dict[str, Any]:
    """The rows of a table of scores by name: languages, then means over all, then language families."""
    return {**table["languages"], **{name: table[name] for name in SUMMARIES}, **table["families"]}


def format_table(scores: dict[str, Any]) -> str:
    """A table of all languages and means, with intervals, for the terminal."""
    metrics = list(scores["average"])
    rows, intervals = table_rows(scores), table_rows(scores["intervals"])
    width = max(map(len, rows))

    def cell(name: str, metric: str) -> str:
        value, interval = rows[name][metric], intervals[name][metric]
        if value is None:
            return "-"
        return f"{value:.2f}" if interval is None else f"{value:.2f} [{interval[0]:.1f}, {interval[1]:.1f}]"

    lines = [f"{scores['task']}, {scores['dataset']} ({describe_splits(scores)}), {describe_examples(scores)}"]
    lines.append(" ".join([" " * width, *(f"{metric:>22}" for metric in metrics)]))
    for name in rows:
        lines.append(" ".join([f"{name:<{width}}", *(f"{cell(name, metric):>22}" for metric in metrics)]))
    lines.append(f"[low, high]: {scores['bootstrap']['confidence']:.0%} interval by bootstrap over clusters")
    return "\n".join(lines)


def describe_splits(scores: dict[str, Any]) -> str:
    """Which splits were scored: `test`, or `test; validation: de fr` where some languages have another one."""
    by_split: dict[str, list[str]] = {}
    for language, split in scores["splits"].items():
        by_split.setdefault(split, []).append(language)
    (first, _), *others = sorted(by_split.items(), key=lambda item: -len(item[1]))
    return "; ".join([first, *(f"{split}: {' '.join(languages)}" for split, languages in others)])


def describe_examples(scores: dict[str, Any]) -> str:
    """How many examples were scored: `45 examples a language`, or `30 to 45 examples a language`."""
    numbers = [of_language(scores["examples"], language) for language in scores["languages"]]
    return " to ".join(map(str, sorted({min(numbers), max(numbers)}))) + " examples a language"


def draw_scores(scores: dict[str, Any], path: Path) -> None:
    """A bar for each language, best first, with its interval, and a line at the average, of the primary metric."""
    from matplotlib.figure import Figure

    metric = scores["primary_metric"]
    ordered = sorted(scores["languages"].items(), key=lambda item: -item[1][metric])
    figure = Figure(figsize=(max(8.0, 0.4 * len(ordered)), 3.5), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(
        [code for code, _ in ordered],
        [values[metric] for _, values in ordered],
        color=["#1b4f72" if code == "en" else "#5d8aa8" for code, _ in ordered],
    )
    for bar, (code, values) in zip(bars, ordered):
        value, interval = values[metric], scores["intervals"]["languages"][code][metric] or [values[metric]] * 2
        # Ends of the interval and not lengths: a percentile interval need not hold the score.
        axes.vlines(bar.get_x() + bar.get_width() / 2, *interval, color="black", linewidth=0.8)
        axes.text(bar.get_x() + bar.get_width() / 2, max(value, interval[1]) + 1, f"{value:.1f}", ha="center", size=8)
    average = scores["average"][metric]
    axes.axhline(average, color="#922b21", linewidth=1, linestyle="--", label=f"average {average:.1f}")
    axes.set_ylim(0, 100)
    axes.set_ylabel(metric)
    axes.set_title(f"{scores['task']}: {metric} by language ({describe_examples(scores)})")
    axes.legend(loc="upper right", frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
