"""Running a model over windows: length-sorted batches, shared among processes, outputs back in order."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xlfa.tasks import Prediction, Task

# The model's inputs among what a window holds.
INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Dataset,
    ids: list[str],
    *,
    max_length: int,
    doc_stride: int,
    batch_size: int,
    bf16: bool = False,
    description: str = "",
) -> list[Prediction]:
    """One prediction for each row, in order. Every process of a launch gets all of them.

    Args:
        model: a head that fits the task; it is put into evaluation mode.
        ids: one a row.
        bf16: run the matrix products in bfloat16.
        description: stands before the progress bar.
    """
    windows = task.scoring_windows(rows, tokenizer, max_length, doc_stride)
    order = sorted(range(len(windows)), key=lambda index: len(windows[index]["input_ids"]), reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    state = PartialState()
    mine = batches[state.process_index :: state.num_processes]
    model.eval()
    found: list[tuple[int, Any]] = []
    for batch in tqdm(mine, desc=description, disable=not state.is_main_process, leave=False):
        chosen = [windows[index] for index in batch]
        inputs = {name: [window[name] for window in chosen] for name in INPUT_NAMES if name in chosen[0]}
        inputs = tokenizer.pad(inputs, return_tensors="pt").to(model.device)
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            outputs = model(**inputs)
        found += zip(batch, task.read_outputs(outputs, chosen))
    gathered = gather_object(found) if state.num_processes > 1 else found
    readings: list[Any] = [None] * len(windows)
    for index, reading in gathered:
        readings[index] = reading
    return task.predictions(rows, ids, windows, readings)
