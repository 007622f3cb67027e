"""One cell of a study: training, scores in every language, retrieval, and what the training log says of the alignment.

Each stage's files say whether it is finished, so a cell that was interrupted goes on where it stopped: training from
its last checkpoint, scoring from its last language.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME

from xlfa.adapters import ADAPTER_FOLDER
from xlfa.checkpoints import checkpoints_in, newest_complete
from xlfa.environment import code_state, processor_name, versions
from xlfa.evaluation import evaluate_model
from xlfa.files import write_text
from xlfa.resuming import UNFINISHED_FILE
from xlfa.retrieval import FUSED, RETRIEVAL_FILE, score_retrieval
from xlfa.run_file import RUN_FILE, has_finished_run
from xlfa.scores import SCORES_FILE
from xlfa.study.encoders import Encoders
from xlfa.study.grid import Plan, PlannedCell
from xlfa.study.results import LAST_PART, SCHEMA_VERSION
from xlfa.study.summaries import mean_or_none
from xlfa.study.sums import without_examples, write_sums
from xlfa.training import train

RUN_FOLDER, SCORES_FOLDER, RETRIEVAL_FOLDER = "run", "scores", "retrieval"
SECONDS_FILE = "seconds.json"
# Name in `result.json` → name in the training log.
TRANSPORT_NAMES = {
    "marginal_error": "ot_marginal_error",
    "iterations": "ot_iterations",
    "not_converged": "ot_not_converged",
    "epsilon": "ot_epsilon",
}
CURVES = {"task_loss": "task_loss", "ot_loss": "ot_loss", "plan_entropy": "ot_plan_entropy"}


def run_cell(plan: Plan, cell: PlannedCell, encoders: Encoders) -> dict[str, Any]:
    """Train and score a cell, or finish what an interrupted sitting left of it; returns the content of `result.json`.

    Raises:
        XLFAError: for anything about the settings or data that the user can mend.
    """
    folder = plan.folder(cell)
    with _timed(folder, "train"):
        validation = _train(plan, cell, folder, encoders)
    with _timed(folder, "score"):
        scores = _score(plan, cell, folder)
        write_sums(folder, folder / SCORES_FOLDER / cell.task, scores)
    retrieval = None
    if cell.settings["retrieval"] is not None:
        with _timed(folder, "retrieval"):
            after = _retrieve(plan, cell, folder)
        retrieval = describe_retrieval(encoders.retrieval_before(cell), after)
    run = json.loads((folder / RUN_FOLDER / RUN_FILE).read_text(encoding="utf-8"))
    state = json.loads((folder / RUN_FOLDER / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    log = state["log_history"]
    code = code_state() or {}
    return {
        "schema_version": SCHEMA_VERSION,
        "id": cell.id,
        "study": plan.name,
        "task": cell.task,
        "arm": cell.arm,
        "seed": cell.seed,
        "point": cell.point,
        "control": cell.control,
        "roles": list(cell.roles),
        "settings": cell.settings,
        "validation": {name: value for name, value in validation.items() if name.startswith("eval_")},
        "scores": without_examples(scores),
        "retrieval": retrieval,
        "transport": describe_transport(log, state["global_step"], run["model_arguments"]["ot_weight"]),
        "curves": loss_curves(log),
        "gradient_ratio": gradient_ratios(log),
        "seconds": json.loads((folder / SECONDS_FILE).read_text(encoding="utf-8")),
        "sittings": len(run["sittings"]),
        "threads": torch.get_num_threads(),
        "machine": describe_machine(),
        "versions": versions(),
        "commit": None if not code else code["commit"] + ("-dirty" if code["dirty"] else ""),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def remove_weights(folder: Path, keep_models: bool) -> None:
    """Of a finished cell: its checkpoints, and unless `keep_models` its weights."""
    run = folder / RUN_FOLDER
    spare = checkpoints_in(run)
    if not keep_models:
        spare += [run / ADAPTER_FOLDER, *_weights(run)]
    for path in spare:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _train(plan: Plan, cell: PlannedCell, folder: Path, encoders: Encoders) -> dict[str, float]:
    """Validation scores of the trained model in `run/`."""
    run = folder / RUN_FOLDER
    if has_finished_run(run):
        measured = _is_scored(folder, cell) and (cell.settings["retrieval"] is None or _retrieval(folder).is_file())
        if measured or _weights(run):
            return json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["validation"]
        # Somebody removed the result of a cell whose weights are gone.
        shutil.rmtree(run)
    model_args, data_args, training_args = cell.training_arguments(
        data_root=plan.data_root,
        output_dir=str(run),
        resume_from_checkpoint=None if newest_complete(run) is None else "true",
    )
    model_args = replace(model_args, model=encoders.encoder(cell), trim_vocab=False)
    command = ["xlfa", "study", "run", str(plan.file), "--cell", str(plan.positions[cell.id])]
    return train(model_args, data_args, training_args, command)


def _score(plan: Plan, cell: PlannedCell, folder: Path) -> dict[str, Any]:
    scores = folder / SCORES_FOLDER / cell.task
    if _is_scored(folder, cell):
        return json.loads((scores / SCORES_FILE).read_text(encoding="utf-8"))
    return evaluate_model(
        cell.evaluation_arguments(model=str(folder / RUN_FOLDER), output_dir=str(scores), data_root=plan.data_root)
    )


def _is_scored(folder: Path, cell: PlannedCell) -> bool:
    scores = folder / SCORES_FOLDER / cell.task
    return (scores / SCORES_FILE).is_file() and not (scores / UNFINISHED_FILE).exists()


def _retrieve(plan: Plan, cell: PlannedCell, folder: Path) -> dict[str, Any]:
    path = _retrieval(folder)
    if not path.is_file():
        arguments = cell.retrieval_arguments(model=str(folder / RUN_FOLDER), data_root=plan.data_root)
        write_text(path, json.dumps(score_retrieval(arguments), indent=1) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def _retrieval(folder: Path) -> Path:
    return folder / RETRIEVAL_FOLDER / RETRIEVAL_FILE


def _weights(run: Path) -> list[Path]:
    return list(run.glob("*.safetensors"))


def describe_retrieval(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, float]]:
    """P@1 in per cent, the mean of both directions, of the last layer `before` and `after` training, by language.

    `after_fused` holds those of the fused states, where the model has any.
    """
    last = str(max(int(layer) for layer in after["average"] if layer != FUSED))
    found = {"before": _by_language(before, last), "after": _by_language(after, last)}
    return found | ({"after_fused": _by_language(after, FUSED)} if FUSED in after["average"] else {})


def _by_language(scores: dict[str, Any], layer: str) -> dict[str, float]:
    return {language: each["layers"][layer]["mean"] for language, each in scores["languages"].items()}


def describe_transport(log: list[dict[str, Any]], last_step: int, weight: float | None) -> dict[str, Any] | None:
    """Means of the logged statistics over the last quarter of training; None without the transport term.

    Args:
        log: `log_history` of the training.
        weight: `ot_weight`.
    """
    entries = [entry for entry in log if "ot_loss" in entry]
    if not entries:
        return None
    late = [entry for entry in entries if entry["step"] > (1 - LAST_PART) * last_step] or entries[-1:]
    entropy = mean_or_none(entry.get("ot_plan_entropy") for entry in late)
    return {
        "plan_perplexity": None if entropy is None else math.exp(entropy),
        # Limits of epsilon have no iterations, and no finite epsilon.
        **{name: mean_or_none(entry.get(logged) for entry in late) for name, logged in TRANSPORT_NAMES.items()},
        "ot_weight": weight,
    }


def loss_curves(log: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Lists of equal length: `step`, and the means of `CURVES` since the step before."""
    entries = [entry for entry in log if "task_loss" in entry]
    return {
        "step": [entry["step"] for entry in entries],
        **{name: [mean_or_none([entry.get(logged)]) for entry in entries] for name, logged in CURVES.items()},
    }


def gradient_ratios(log: list[dict[str, Any]]) -> dict[str, list[float]] | None:
    """`step` and `ratio`, of the weighted transport term's to the task's gradient norm; None if it was not logged."""
    entries = [entry for entry in log if "ot_gradient_ratio" in entry]
    if not entries:
        return None
    return {
        "step": [entry["step"] for entry in entries],
        "ratio": [entry["ot_gradient_ratio"] for entry in entries],
    }


def describe_machine() -> str:
    """The kind of machine, without its name."""
    accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([f"{processor_name()}, {os.cpu_count()} logical cores", *accelerators])


@contextmanager
def _timed(folder: Path, stage: str) -> Iterator[None]:
    """Add the seconds of a stage to those of earlier sittings; what a killed sitting took is not known."""
    start = time.monotonic()
    try:
        yield
    finally:
        path = folder / SECONDS_FILE
        seconds = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        total = seconds.get(stage, 0.0) + time.monotonic() - start
        write_text(path, json.dumps(seconds | {stage: round(total, 2)}) + "\n")
