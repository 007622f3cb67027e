"""A task's predictions for rows, by a model."""

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xlfa.inference import InferenceOptions, infer
from xlfa.tasks import Prediction, Task


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Dataset,
    ids: list[str],
    windows: Dataset,
    options: InferenceOptions,
    description: str = "",
) -> list[Prediction]:
    """One prediction for each row, in order. Every process of a launch gets all of them.

    Args:
        model: a head that fits the task; it is put into evaluation mode.
        ids: one a row.
        windows: of the rows, by `task.windows` with this tokenizer.
        description: stands before the progress bar.
    """
    readings = infer(
        model, tokenizer, windows, task.read_outputs, options, columns=task.read_columns, description=description
    )
    return task.predictions(rows, ids, windows, readings)
