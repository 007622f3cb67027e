"""A model over inputs of many lengths, without gradients: batches by a budget of tokens, shared among processes.

Batches are the same at any number of processes, so are the outputs; the next ones are padded while one is computed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from xlfa.arguments import InferenceArguments
from xlfa.environment import has_fast_bf16
from xlfa.errors import XLFAError

Item, Result = TypeVar("Item"), TypeVar("Result")

# The model's inputs among the columns of a data set.
INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
# Padded tokens a batch. On a CPU more are no faster, and a batch has more padding; an accelerator wants many.
TOKENS_ON_CPU, TOKENS_ELSEWHERE = 2048, 32768
# What is kept of a batch: a tensor with a row for each input, or a tensor for each input.
Reading = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True)
class InferenceOptions:
    """How a model is run: padded tokens a batch, and whether matrix products are in bfloat16."""

    max_tokens_per_batch: int
    bf16: bool

    @classmethod
    def of(cls, arguments: InferenceArguments, device: torch.device) -> "InferenceOptions":
        """What the arguments say; what they leave open by the device."""
        tokens = arguments.max_tokens_per_batch or (TOKENS_ON_CPU if device.type == "cpu" else TOKENS_ELSEWHERE)
        return cls(tokens, has_fast_bf16(device) if arguments.bf16 is None else arguments.bf16)


def token_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Positions in batches of similar length, the longest first: number x longest length <= `max_tokens`.

    An input that is longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for position in sorted(range(len(lengths)), key=lambda position: lengths[position], reverse=True):
        if batches and (len(batches[-1]) + 1) * longest <= max_tokens:
            batches[-1].append(position)
        else:
            batches.append([position])
            longest = lengths[position]
    return batches


def prefetched(function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 1) -> Iterator[Result]:
    """`function` of each item in order; the next `ahead` are computed in a thread while one is used."""
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def on_main_process(work: Callable[[], Result]) -> Result:
    """What `work` returns in the main process, in every process of a launch; others wait for it.

    Raises:
        XLFAError: in every process, where it is raised in the main one: none is left waiting for the others.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except XLFAError as error:
            outcome[1] = str(error)
    result, message = broadcast_object_list(outcome)
    if message is not None:
        raise XLFAError(message)
    return result


def infer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Dataset,
    read: Callable[[ModelOutput, BatchEncoding, dict[str, list[Any]]], Reading],
    options: InferenceOptions,
    *,
    columns: Sequence[str] = (),
    description: str = "",
    **forward_options: Any,
) -> list[np.ndarray]:
    """What `read` keeps of each input, in the order of the inputs. Every process of a launch gets all of it.

    Args:
        model: it is put into evaluation mode.
        tokenizer: pads.
        inputs: the columns `input_ids`, `length` (of each) and others of `INPUT_NAMES`.
        read: called with the outputs of a batch, its padded inputs and its rows of `columns`. What it returns stays on
            the device until the last batch is through.
        columns: other columns that `read` needs.
        description: stands before the progress bar.
        forward_options: for every call of the model.
    """
    state = PartialState()
    batches = token_batches(inputs["length"][:], options.max_tokens_per_batch)
    mine = batches[state.process_index :: state.num_processes]
    if isinstance(model, FSDPModule) and len(mine) < -(-len(batches) // state.num_processes):
        # Its weights are gathered from all processes, each of which must run as many batches.
        mine = [*mine, batches[0]]
    names = [name for name in INPUT_NAMES if name in inputs.column_names]
    needed = inputs.select_columns([*names, *columns])

    def collate(positions: list[int]) -> tuple[list[int], BatchEncoding, dict[str, list[Any]]]:
        batch = needed[positions]
        padded = tokenizer.pad({name: batch[name] for name in names}, return_tensors="pt")
        return positions, padded, {name: batch[name] for name in columns}

    model.eval()
    found: list[tuple[list[int], Reading]] = []
    bar = tqdm(total=len(mine), desc=description, disable=not state.is_main_process, leave=False)
    with bar, torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=options.bf16):
        for positions, padded, rows in prefetched(collate, mine, ahead=2):
            padded = padded.to(model.device)
            found.append((positions, read(model(**padded, **forward_options), padded, rows)))
            bar.update()
    own = [pair for positions, reading in found for pair in zip(positions, _to_numpy(reading), strict=True)]
    readings: list[Any] = [None] * len(inputs)
    for position, reading in gather_object(own) if state.num_processes > 1 else own:
        readings[position] = reading
    return readings


def _to_numpy(reading: Reading) -> Iterable[np.ndarray]:
    if isinstance(reading, torch.Tensor):
        return reading.cpu().numpy()
    return [each.cpu().numpy() for each in reading]
