"""The pilot of the epsilon study: at which `ot_weight` is the transport term's gradient a third of the task's?

Prints, for each task, the ratio of the norms at weight 1 and epsilon 0.1 over 20 batches of a seed that is not among
the study's, at a learning rate of (almost) 0: the encoder as the study starts from it. Reads no score.

    python results/epsilon/pilot.py ../shared/hub/datasets
    python results/epsilon/pilot.py ../shared/hub/datasets configs/study/epsilon_gpu.yaml
"""

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from xlfa.study.grid import load_plan
from xlfa.training import train

STUDY = Path(__file__).parents[2] / "configs/study/epsilon.yaml"
SEED, EPSILON, STEPS, WANTED = 100, 0.1, 20, 1 / 3


def main(data_root: str, study: str | Path = STUDY) -> None:
    """Print the weights."""
    plan = load_plan(Path(study), data_root)
    for task in ("xnli", "xquad"):
        of_task = [cell for cell in plan.cells if cell.task == task]
        cell = next(cell for cell in of_task if cell.point and cell.point["ot_epsilon"] == EPSILON)
        with tempfile.TemporaryDirectory() as folder:
            model_args, data_args, training_args = cell.training_arguments(
                data_root=data_root,
                output_dir=folder,
                seed=SEED,
                ot_weight=1.0,
                learning_rate=1e-12,
                max_steps=STEPS,
                ot_gradient_steps=1,
                max_eval_examples=20,
            )
            # Trimming changes no norm, and would read all texts first.
            train(replace(model_args, fusion="none", trim_vocab=False), data_args, training_args)
            log = json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
        ratios = [entry["ot_gradient_ratio"] for entry in log if "ot_gradient_ratio" in entry]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{task}: ratio at weight 1 over {len(ratios)} batches: median {middle:.3f}, quartiles {low:.3f} {high:.3f}"
        )
        print(f"{task}: weight for a ratio of one third: {WANTED / middle:.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
