"""What the trunk cache saves in a study: seconds of a sweep of cells with it, without it, and with nothing frozen.

Every side is `xlfa study run` in a process of its own, from the same study file, cut to some epsilons, seeds, steps and
examples; training examples and parallel pairs are as many as the steps of a seed take. A cell is all that a cell of the
study is (training, validation, scores in every language). The two frozen sides begin with empty caches of their own.
The unfrozen side trains another model; it has the cells of one epsilon, the last one, and is compared by the stages of
these cells alone, for which the other sides have filled their caches before. Cells with and without the cache must find
the same scores, but for the rounding of stored states to bfloat16.

    python benchmarks/study.py --data_root ../shared/hub/datasets
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from reporting import header, table

from xlfa.arguments import read_mapping
from xlfa.backbones import resolve_encoder
from xlfa.errors import exit_with_message
from xlfa.files import write_text
from xlfa.study.results import read_study

STUDY = Path(__file__).parents[1] / "configs/study/epsilon.yaml"
# Side → training flags, scoring flags.
SIDES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "frozen, cached": ({"cache_trunk": True}, {"cache_trunk": True}),
    "frozen": ({"cache_trunk": False}, {"cache_trunk": False}),
    "unfrozen": ({"cache_trunk": False, "freeze_layers": 0}, {"cache_trunk": False}),
}
CACHED, REFERENCE, UNFROZEN = SIDES
MOST_TIME = 0.65
# Points between the scores of a cell with and without the cache.
SCORE_TOLERANCE = 2.0
RUN = "from xlfa.cli import main; main()"
# Task, epsilon and seed.
Cell = tuple[str, float, int]


@dataclass(frozen=True)
class Sweep:
    """The cells of one side.

    Attributes:
        seconds: of the whole process.
        stages: (task, epsilon, seed) → seconds of the cell by stage.
        scores: (task, epsilon, seed) → mean over languages of the primary metric.
    """

    seconds: float
    stages: dict[Cell, dict[str, float]]
    scores: dict[Cell, float]

    def mean_seconds(self, stage: str) -> float:
        """Of a stage, over the cells."""
        return statistics.mean(seconds[stage] for seconds in self.stages.values())

    def seconds_of(self, cells: Iterable[Cell]) -> float:
        """Of all stages of some cells."""
        return sum(sum(self.stages[cell].values()) for cell in cells)


def study_of_side(side: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The content of a side's study file."""
    study = read_mapping(options.study)
    (train, score), unfrozen = SIDES[side], side == UNFROZEN
    examples = options.steps * study["train"]["per_device_train_batch_size"]
    pairs = math.ceil(examples / len(study["train"]["parallel_languages"]))
    short = {
        "max_steps": options.steps,
        "warmup_steps": 1,
        "save_steps": options.steps,
        "logging_steps": options.steps,
        "ot_gradient_steps": None,
        "max_train_examples": examples,
        "parallel_pairs_per_language": min(pairs, study["train"]["parallel_pairs_per_language"]),
        "max_eval_examples": options.examples,
    }
    model = {} if options.model is None else {"model": options.model, "trim_vocab": False}
    changed = short | model | train
    tasks = {
        name: {
            "train": {key: value for key, value in study["tasks"][name]["train"].items() if key not in changed},
            "score": {key: value for key, value in study["tasks"][name]["score"].items() if key != "max_examples"},
        }
        for name in options.tasks
    }
    return {
        "name": "benchmark",
        "output_dir": str(folder),
        "seeds": [0] if unfrozen else list(range(options.seeds)),
        "train": study["train"] | {"fusion": "none"} | changed,
        "score": {"max_examples": options.examples} | score,
        "tasks": tasks,
        "grid": {"ot_epsilon": options.epsilons[-1:] if unfrozen else options.epsilons},
    }


def run_sweep(side: str, options: argparse.Namespace, folder: Path) -> Sweep:
    """Run the side's study to its end.

    Args:
        folder: for its file and its results.
    """
    results = folder / side.replace(", ", "_")
    file = results.with_suffix(".yaml")
    study = study_of_side(side, options, results)
    write_text(file, yaml.safe_dump(study))
    command = [sys.executable, "-c", RUN, "study", "run", str(file), "--data_root", options.data_root]
    texts = REFERENCE if side == UNFROZEN else side
    caches = {"XLFA_CACHE": f"{results}_cache", "HF_DATASETS_CACHE": str(folder / f"texts of {texts}")}
    with mock.patch.dict(os.environ, caches):
        # Weights from a package are made into an encoder once, which is not timed.
        resolve_encoder(study["train"]["model"])
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    cells = {(cell.task, cell.point["ot_epsilon"], cell.seed): cell for cell in read_study(results).cells}
    stages = {key: cell.seconds for key, cell in cells.items()}
    scores = {key: cell.scores["average"][cell.scores["primary_metric"]] for key, cell in cells.items()}
    return Sweep(seconds, stages, scores)


def report(options: argparse.Namespace, argv: list[str], sweeps: dict[str, Sweep]) -> tuple[str, bool]:
    """The benchmark's text, and whether the target is met."""
    cached, frozen, unfrozen = sweeps[CACHED], sweeps[REFERENCE], sweeps[UNFROZEN]
    stages = list(next(iter(frozen.stages.values())))
    common = list(unfrozen.stages)
    compared = [f"stages of {len(common)} cells", "times unfrozen"]
    lines = [["side", "cells", "seconds", *(f"{stage} a cell" for stage in stages), *compared]]
    for side, sweep in sweeps.items():
        lines.append(
            [side, str(len(sweep.scores)), f"{sweep.seconds:.0f}"]
            + [f"{sweep.mean_seconds(stage):.1f}" for stage in stages]
            + [f"{sweep.seconds_of(common):.1f}", f"{sweep.seconds_of(common) / unfrozen.seconds_of(common):.3f}"]
        )
    ratio = cached.seconds / frozen.seconds
    furthest = max(abs(cached.scores[cell] - frozen.scores[cell]) for cell in frozen.scores)
    met = ratio <= MOST_TIME and furthest <= SCORE_TOLERANCE
    summary = [
        f"{'met' if met else 'NOT MET'}: a sweep of {len(cached.scores)} cells takes {ratio:.3f} of the same cells "
        f"without the cache (at most {MOST_TIME}, the filling included)",
        f"scores of a cell differ by at most {furthest:.2f} points between both (at most {SCORE_TOLERANCE:g})",
    ]
    shown = {name: value for name, value in vars(options).items() if name not in ("study", "output")}
    settings = f"study: {options.study.name}; {json.dumps(shown)}"
    text = [*header("benchmarks/study.py", argv, "cpu"), settings, "", *table(lines), "", *summary]
    return "\n".join(text) + "\n", met


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The benchmark's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=STUDY, help="the study's file (epsilon.yaml)")
    parser.add_argument("--data_root", required=True, help="folder with the data sets, or 'sample'")
    parser.add_argument("--model", help="instead of the study's encoder, with its whole vocabulary")
    parser.add_argument("--tasks", nargs="+", default=["xnli", "xquad"], help="of the study (xnli xquad)")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.01, 0.1, 1.0], help="(0.01 0.1 1)")
    parser.add_argument(
        "--seeds", type=int, default=2, help="number of them (%(default)s); unfrozen: one, last epsilon"
    )
    parser.add_argument("--steps", type=int, default=16, help="of a cell's training (%(default)s)")
    parser.add_argument("--examples", type=int, default=40, help="validated, and scored a language (%(default)s)")
    parser.add_argument("--output", type=Path, help="write the report to this file as well")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Run all sides and print the report; exit 1 if the target is not met."""
    options = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        sweeps = {}
        for side in SIDES:
            sweeps[side] = run_sweep(side, options, Path(folder))
            print(f"{side}: {sweeps[side].seconds:.0f} s", file=sys.stderr)
    text, met = report(options, argv, sweeps)
    print(text, end="")
    if options.output is not None:
        write_text(options.output, text)
    raise SystemExit(not met)


if __name__ == "__main__":
    exit_with_message(main, sys.argv[1:])
