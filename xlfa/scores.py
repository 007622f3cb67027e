"""`scores.json`: what a scoring run found, in the format of `scores.schema.json`, and its table and figure."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from modeling_xlfa import XLFAConfig
from xlfa.environment import versions
from xlfa.files import replacing, write_text
from xlfa.tasks import Prediction, Task

SCORES_FILE = "scores.json"
SCORES_SCHEMA = Path(__file__).parent / "scores.schema.json"
FIGURE_FILE = "scores.png"
SCHEMA_VERSION = 1
# The DLFA paper's groups: enf, and noenf for the rest.
ENGLISH_FAMILY = ("en", "de")
SUMMARIES = ("average", "average_xtreme", "enf", "noenf", "transfer_gap")

Scores = dict[str, float | None]


def summarise(task: Task, languages: dict[str, Scores]) -> dict[str, Scores]:
    """Means over groups of languages, by metric.

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
        name: None if None in (english[name], elsewhere[name]) else english[name] - elsewhere[name]
        for name in task.metrics
    }
    return summary


def _group_mean(task: Task, languages: dict[str, Scores], group: list[str]) -> Scores:
    if not group or any(code not in languages for code in group):
        return dict.fromkeys(task.metrics)
    means = {}
    for name in task.metrics:
        values = [languages[code][name] for code in group if languages[code][name] is not None]
        means[name] = mean(values) if values else None
    return means


def build_scores(
    task: Task, languages: dict[str, Scores], ids: list[str], config: XLFAConfig, settings: dict[str, Any]
) -> dict[str, Any]:
    """The content of `scores.json`.

    Args:
        languages: ISO 639-1 code → score by metric, 0 to 100.
        ids: the examples scored, the same in every language.
        config: of the model; its fusion and transport fields are recorded.
        settings: how it was scored.
    """
    recorded = ("fusion", "ot_", "classifier_pooling")
    return {
        "schema_version": SCHEMA_VERSION,
        "task": task.name,
        "dataset": task.test_dataset,
        "split": task.test_split,
        "primary_metric": task.metrics[0],
        "languages": languages,
        **summarise(task, languages),
        "examples": len(ids),
        "ids": ids,
        "model": {
            "encoder": config.text_config.model_type,
            **{name: value for name, value in config.to_dict().items() if name.startswith(recorded)},
        },
        "settings": settings,
        "versions": versions(),
    }


def write_scores(folder: Path, scores: dict[str, Any]) -> None:
    """`scores.json` and `scores.png` in `folder`, each complete or not there."""
    write_text(folder / SCORES_FILE, json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    draw_scores(scores, folder / FIGURE_FILE)


def write_predictions(path: Path, predictions: list[Prediction]) -> None:
    """One JSON object a line: id, prediction, label, score (the model's probability of its prediction)."""
    lines = (json.dumps(vars(prediction), ensure_ascii=False) for prediction in predictions)
    write_text(path, "".join(f"{line}\n" for line in lines))


def format_table(scores: dict[str, Any]) -> str:
    """A table of all languages and means for the terminal."""
    metrics = list(scores["average"])
    rows = [(code, values) for code, values in scores["languages"].items()]
    rows += [(name, scores[name]) for name in SUMMARIES]
    width = max(len(name) for name, _ in rows)
    lines = [f"{scores['task']}, {scores['dataset']} ({scores['split']}), {scores['examples']} examples a language"]
    lines.append(" ".join([" " * width, *(f"{metric:>17}" for metric in metrics)]))
    for name, values in rows:
        cells = ("-" if values[metric] is None else f"{values[metric]:.2f}" for metric in metrics)
        lines.append(" ".join([f"{name:<{width}}", *(f"{cell:>17}" for cell in cells)]))
    return "\n".join(lines)


def draw_scores(scores: dict[str, Any], path: Path) -> None:
    """A bar for each language, best first, and a line at the average, of the primary metric."""
    from matplotlib.figure import Figure

    metric = scores["primary_metric"]
    ordered = sorted(scores["languages"].items(), key=lambda item: -item[1][metric])
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(
        [code for code, _ in ordered],
        [values[metric] for _, values in ordered],
        color=["#1b4f72" if code == "en" else "#5d8aa8" for code, _ in ordered],
    )
    axes.bar_label(bars, fmt="%.1f", fontsize=8)
    average = scores["average"][metric]
    axes.axhline(average, color="#922b21", linewidth=1, linestyle="--", label=f"average {average:.1f}")
    axes.set_ylim(0, 100)
    axes.set_ylabel(metric)
    axes.set_title(f"{scores['task']}: {metric} by language ({scores['examples']} examples each)")
    axes.legend(loc="upper right", frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
