"""What the bootstrap of a study needs of a cell's predictions: contributions to the scores, summed by cluster.

Unlike predictions they repeat no text of a data set, and are small: a study's results can be kept in a repository.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from xlfa.errors import XLFAError
from xlfa.files import write_text
from xlfa.scores import predictions_file, read_predictions
from xlfa.statistics import Counts, of_language, sum_by_cluster
from xlfa.tasks import get_task

SUMS_FILE = "sums.json"
# Of `scores.json`, in `sums.json` or the digest.
BY_EXAMPLE = ("ids", "clusters")
DIGEST = "examples_digest"
# Sums of F1 over a cluster are below 1000: seven significant digits or more.
DECIMALS = 6


def write_sums(folder: Path, scores_folder: Path, scores: dict[str, Any]) -> None:
    """`sums.json` in `folder`: language → metric → clusters x k.

    Args:
        folder: of the cell.
        scores_folder: with the predictions.
        scores: the content of its `scores.json`.

    Raises:
        XLFAError: if predictions cannot be read, or are of other examples than the scores.
    """
    task, sums = get_task(scores["task"]), {}
    for language in scores["languages"]:
        path = predictions_file(scores_folder, language)
        rows = read_predictions(path)
        if [row.id for row in rows] != of_language(scores["ids"], language):
            raise XLFAError(
                f"{path} has other examples than the scores beside it: remove the cell's folder, run it again"
            )
        clusters = of_language(scores["clusters"], language)
        sums[language] = {
            metric: sum_by_cluster(values, clusters).round(DECIMALS).tolist()
            for metric, values in task.contributions(rows, language).items()
        }
    write_text(folder / SUMS_FILE, json.dumps(sums, separators=(",", ":")) + "\n")


def read_sums(folder: Path) -> Counts:
    """What `write_sums` wrote there.

    Raises:
        XLFAError: if the file is not there or holds something else.
    """
    path = folder / SUMS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            language: {metric: np.array(values, dtype=float) for metric, values in own.items()}
            for language, own in content.items()
        }
    except OSError as error:
        raise XLFAError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise XLFAError(f"{path} holds no sums by cluster: {error}") from None


def without_examples(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores with a digest in place of the lists of examples and their clusters."""
    listed = json.dumps([scores[name] for name in BY_EXAMPLE])
    kept = {name: value for name, value in scores.items() if name not in BY_EXAMPLE}
    return kept | {DIGEST: hashlib.sha256(listed.encode()).hexdigest()}
