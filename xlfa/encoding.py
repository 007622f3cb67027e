"""Tokenised rows, cached on disk beside the rows by all that they depend on."""

import functools
import hashlib
import inspect
import json
import math
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from xlfa.errors import XLFAError

if TYPE_CHECKING:
    from xlfa.tasks import Task


def encode_rows(
    task: "Task", rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
) -> Dataset:
    """The task's inputs of the rows (`Task.encode`), one or more an example, with the position `example` of each.

    Rows that lie in a cache of datasets are tokenised once for each tokenizer, limit and version of the code.
    """
    key = [rows._fingerprint, task_digest(task), tokenizer_digest(tokenizer), max_length, doc_stride]
    return rows.map(
        task.encode,
        with_indices=True,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, "doc_stride": doc_stride},
        remove_columns=rows.column_names,
        # Ours: datasets' own would change with the padding and warnings that a tokenizer remembers of earlier calls.
        new_fingerprint=hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32],
        desc="tokenising",
    )


def longest_input(model: nn.Module) -> float:
    """The most tokens that a model has learned positions for; infinity where positions are relative or rotary."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    # RoBERTa's positions begin after the one of padding.
    return min(
        (
            table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
            for table in tables
            if isinstance(table, nn.Embedding)
        ),
        default=math.inf,
    )


def check_length(name: str, length: int | None, model: nn.Module) -> None:
    """Raise `XLFAError` for a longest input, given by the flag `name`, below 1 or beyond the model's positions."""
    if length is not None and length < 1:
        raise XLFAError(f"--{name} {length}: at least 1")
    limit = longest_input(model)
    if length is not None and length > limit:
        raise XLFAError(f"--{name} {length}: the encoder has positions for {limit} tokens; give no more than that")


def check_room(max_length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `XLFAError` for a `--max_length` that the special tokens of a single text fill."""
    if max_length <= tokenizer.num_special_tokens_to_add():
        raise XLFAError(f"--max_length {max_length} leaves no room for a word beside the special tokens: raise it")


def task_digest(task: "Task") -> str:
    """Changes with the task's fields and with the modules that its class and bases are written in."""
    digest = hashlib.sha256(repr(task).encode())
    for part in type(task).__mro__[:-1]:
        digest.update(Path(inspect.getfile(part)).read_bytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with the vocabulary, the settings and the version of a tokenizer, not with earlier calls of it.

    Raises:
        XLFAError: for a tokenizer in Python, which knows no offsets and no words.
    """
    if not tokenizer.is_fast:
        raise XLFAError(
            f"the tokenizer {type(tokenizer).__name__} of {tokenizer.name_or_path} is one in Python; XLFA needs a fast "
            "one (a tokenizer.json beside the model)"
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # What the last call asked for.
    del state["truncation"], state["padding"]
    settings = [type(tokenizer).__name__, tokenizer.model_input_names, state, metadata.version("tokenizers")]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
