"""Simulated studies with a known truth, as folders that `xlfa study run` might have left."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from scipy.stats import norm

from xlfa.files import write_text
from xlfa.scores import predictions_file, read_predictions, write_predictions
from xlfa.study.resampling import TaskScores, language_groups
from xlfa.study.results import SCHEMA_VERSION, Cell, Study
from xlfa.study.sums import without_examples, write_sums
from xlfa.tasks import Prediction, get_task

LANGUAGES = {
    "xnli": ["ar", "bg", "de", "en", "fr", "zh"],
    "xquad": ["ar", "de", "en", "ro", "zh"],
    "pawsx": ["de", "en", "fr", "zh"],
}
HEADLINE = ["ar", "de", "en", "zh"]
EPSILONS = [0.01, 0.1, 1.0]
CONTROLS = {
    "no_ot": {"ot_weight": 0},
    "exact": {"ot_solver": "exact"},
    "product": {"ot_solver": "product"},
    "shuffled_pairs": {"parallel_shuffled": True, "ot_epsilon": 0.1},
}
CLUSTERS, SIZE = 40, 3


def no_effect(task, point, control, language):
    """What a condition adds to the share of right answers."""
    return 0.0


def predictions(task, rng, right):
    """Predictions that are right where `right` says so; some wrong answers share a word with the right one."""
    if task != "xquad":
        names = get_task(task).label_names
        number = len(names)
        return [
            Prediction(str(n), names[n % number] if own else names[n % number - 1], names[n % number], 0.5)
            for n, own in enumerate(right)
        ]
    wrong = ["market square", "river bank"]
    return [
        Prediction(str(n), "fish market" if own else wrong[rng.integers(2)], ["fish market"], 0.5)
        for n, own in enumerate(right)
    ]


def write_study(
    folder,
    effect=no_effect,
    tasks=("xnli", "xquad"),
    seeds=(0, 1, 2, 3, 4),
    points=None,
    controls=CONTROLS,
    arms=("main",),
    name="epsilon",
    seed_deviation=0.01,
    clusters=CLUSTERS,
    seed=0,
):
    """A whole study; `effect(task, point, control, language)` is added to a share of 0.55 right answers."""
    points = [{"ot_epsilon": epsilon} for epsilon in EPSILONS] if points is None else points
    rng = np.random.default_rng(seed)
    number = clusters * SIZE
    for task in tasks:
        # How hard an example is, half of it shared by its cluster, is the same for all cells: they are paired.
        shared = np.repeat(rng.normal(size=clusters), SIZE)
        hard = {code: (shared + rng.normal(size=number)) / math.sqrt(2) for code in LANGUAGES[task]}
        for arm in arms:
            for run_seed in seeds:
                common = rng.normal() * seed_deviation
                for control, point in [*((None, own) for own in points), *((own, None) for own in controls)]:
                    own = common + rng.normal() * seed_deviation
                    found = {}
                    for code in LANGUAGES[task]:
                        share = 0.55 + own + effect(task, point, control, code)
                        # Nine tenths of what decides is the example's, the rest is the cell's.
                        luck = np.sqrt(0.9) * hard[code] + np.sqrt(0.1) * rng.normal(size=number)
                        found[code] = predictions(task, rng, luck < _normal_quantile(share))
                    write_cell(folder, name, task, arm, run_seed, point, control, found, rng)
    return folder


def _normal_quantile(share):
    return norm.ppf(np.clip(share, 0.01, 0.99))


def primary_score(task, rows, code):
    metric = task.metrics[0]
    return {metric: float(task.score_of_sums(metric, task.contributions(rows, code)[metric].sum(0)))}


def write_cell(folder, study, task, arm, seed, point, control, found, rng, **changes):
    """One finished cell with these predictions by language."""
    registered = get_task(task)
    label = control or "-".join(f"{key}_{value}" for key, value in point.items())
    id = f"{task}-{arm}-{label}-s{seed}".replace("/", "")
    cell = folder / "cells" / id
    languages, number = list(found), len(next(iter(found.values())))
    scores = {
        "schema_version": 3,
        "task": task,
        "dataset": registered.test_dataset,
        "splits": dict.fromkeys(languages, registered.test_split),
        "primary_metric": registered.metrics[0],
        "languages": {code: primary_score(registered, rows, code) for code, rows in found.items()},
        "examples": number,
        "ids": [str(n) for n in range(number)],
        "clusters": [n // SIZE for n in range(number)],
    }
    transported = control != "no_ot"
    steps = list(range(25, 251, 25))
    epsilon = (point or {}).get("ot_epsilon", 0.1)
    train = {"model": "packaged:multilingual-e5-small", "train_dataset": "local/nli-en", "max_train_examples": 3600}
    result = {
        "schema_version": SCHEMA_VERSION,
        "id": id,
        "study": study,
        "task": task,
        "arm": arm,
        "seed": seed,
        "point": point,
        "control": control,
        "roles": ["grid"] if control is None else [f"control:{control}"],
        "settings": {
            "train": {**train, "ot_weight": 0.1, **(point or CONTROLS.get(control, {}))},
            "score": {"max_examples": number},
        },
        "validation": {
            f"eval_{registered.metrics[0]}": scores["languages"]["en"][registered.metrics[0]] + rng.normal()
        },
        "scores": without_examples(scores),
        "retrieval": {
            "before": {"de": 95.0, "zh": 90.0},
            "after": {"de": 95.0 + rng.normal(), "zh": 88.0 + rng.normal()},
        },
        "transport": {
            "plan_perplexity": 20 * epsilon / (epsilon + 0.1) + 1,
            "marginal_error": 1e-4 * (1 + rng.random()),
            "iterations": 40 / (epsilon + 0.01),
            "not_converged": 0.01 if epsilon < 0.05 else 0.0,
            "epsilon": 0.08 * epsilon,
            "ot_weight": 0.1,
        }
        if transported
        else None,
        "curves": {
            "step": steps,
            "task_loss": [1.1 * math.exp(-step / 300) + 0.02 * rng.normal() for step in steps],
            "ot_loss": [0.3 * math.exp(-step / 200) + 0.05 * epsilon if transported else None for step in steps],
            "plan_entropy": [2.0 if transported else None for _ in steps],
        },
        "gradient_ratio": {"step": [50, 100], "ratio": [1.0 + 0.1 * rng.random(), 0.9]} if transported else None,
        "seconds": {"train": 120.0, "score": 60.0, "retrieval": 5.0},
        "threads": 2,
        "machine": "2 shared cores",
        "versions": {"torch": "2.13.0"},
        "commit": "0123abc",
        "finished": f"2026-01-0{1 + seed % 9}T00:00:00+00:00",
        **changes,
    }
    for code, rows in found.items():
        write_predictions(predictions_file(cell / "scores" / task, code), rows)
    write_sums(cell, cell / "scores" / task, scores)
    write_text(cell / "result.json", json.dumps(result))
    return cell


def cell_predictions(cell):
    """By language, of a cell that `write_cell` wrote."""
    return {
        code: read_predictions(predictions_file(cell.folder / "scores" / cell.task, code)) for code in cell.languages
    }


def study_of(values, deviation=0.0, seed=0):
    """A study and the scores of its tasks without files, for many simulated studies.

    Args:
        values: (task, epsilon or the name of a control, seed) → the score of every language.
        deviation: of what is added to a cell's score under each draw of clusters.
    """
    rng = np.random.default_rng(seed)
    cells, scores = [], {}
    for (task, condition, run_seed), _ in values.items():
        point = None if isinstance(condition, str) else {"ot_epsilon": condition}
        own = {name: None for name in (field.name for field in dataclasses.fields(Cell))}
        own |= {"id": f"{task}-{condition}-{run_seed}", "study": "simulated", "task": task, "arm": "main"}
        own |= {"seed": run_seed, "point": point, "control": condition if point is None else None}
        own |= {"roles": ["grid"] if point else [f"control:{condition}"], "scores": {"languages": {"de": {}, "en": {}}}}
        own |= {"curves": {"step": [], "task_loss": [], "ot_loss": [], "plan_entropy": []}}
        metric = get_task(task).metrics[0]
        cells.append(Cell(**{**own, "validation": {f"eval_{metric}": values[task, condition, run_seed]}}))
    study = Study(Path("simulated"), "simulated", cells, {})
    for task in study.tasks:
        of_task = [cell for cell in cells if cell.task == task]
        found = np.array(
            [values[task, (cell.point or {}).get("ot_epsilon", cell.control), cell.seed] for cell in of_task]
        )
        groups = language_groups(["de", "en"], ["de", "en"])
        rows = ["de", "en", *groups]
        table = np.repeat(found[:, None], len(rows), axis=1)
        draws = table[..., None] + deviation * rng.normal(size=(*table.shape, 199))
        metric = get_task(task).metrics[0]
        scores[task] = TaskScores(get_task(task), of_task, rows, groups, {metric: table}, {metric: draws}, {})
    return study, scores
