"""Tasks that give a tag to each word of a sentence (named entities, parts of speech)."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import evaluate
import numpy as np
import torch
from datasets import ClassLabel, Dataset
from transformers import BatchEncoding, DataCollatorForTokenClassification, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from modeling_xlfa import XLFAForTokenClassification
from xlfa.encoding import check_room
from xlfa.errors import XLFAError
from xlfa.metrics.tagging import count_tags
from xlfa.tasks.task import Prediction, Task

TAGGING = Path(__file__).parent.parent / "metrics" / "tagging.py"
# The loss leaves out tokens with this label.
NOT_SCORED = -100


@dataclass(frozen=True, kw_only=True)
class TokenClassificationTask(Task):
    """A tag for each word, read from the word's first piece.

    A word that the length limit cuts off, or that the tokenizer gives no piece (an empty string, a zero-width space),
    is missed: its prediction is None. XTREME cuts longer sentences into several inputs instead.

    Attributes:
        tag_column: the numbers of the tags; the words stand in `tokens`.
    """

    tag_column: str
    group_columns: tuple[str, ...] = ()
    parallel: bool = False
    cut_unit: ClassVar[str] = "words are missed: behind the limit, or without a piece"

    @property
    def model_class(self) -> type:
        return XLFAForTokenClassification

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForTokenClassification:
        return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=NOT_SCORED)

    def texts(self, rows: Dataset) -> list[str]:
        return list(dict.fromkeys(word for words in rows["tokens"][:] for word in words))

    def check_rows(self, rows: Dataset, place: str) -> None:
        feature = getattr(rows.features[self.tag_column], "feature", None)
        if isinstance(feature, ClassLabel) and tuple(feature.names) != self.label_names:
            raise XLFAError(
                f"{place}: the tags of {self.tag_column!r} are {', '.join(feature.names)}; the task {self.name!r} "
                f"needs {', '.join(self.label_names)}, in this order"
            )
        known = range(len(self.label_names))
        for position, (words, tags) in enumerate(zip(rows["tokens"][:], rows[self.tag_column][:])):
            if not words or any(word is None for word in words):
                raise XLFAError(f"{place}: row {position} has no words, or a word that is null")
            if len(words) != len(tags or []):
                raise XLFAError(f"{place}: row {position} has {len(words)} words and {len(tags or [])} tags")
            unknown = [tag for tag in tags if tag not in known]
            if unknown:
                raise XLFAError(
                    f"{place}: row {position} has the tag {unknown[0]!r}; the task {self.name!r} knows "
                    f"0..{len(self.label_names) - 1} ({', '.join(self.label_names)})"
                )

    def encode(
        self,
        batch: dict[str, list],
        positions: list[int],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        doc_stride: int,
    ) -> dict[str, list]:
        """One input a sentence; `first_pieces` is the position of the first piece of each word, None if missed."""
        sentences = batch["tokens"]
        if marks_spaces(tokenizer):
            sentences = [[word and " " * bool(place) + word for place, word in enumerate(words)] for words in sentences]
        check_room(max_length, tokenizer)
        encoded = tokenizer(
            sentences, is_split_into_words=True, truncation=True, max_length=max_length, return_length=True
        )
        first_pieces: list[list[int | None]] = []
        for example, words in enumerate(sentences):
            first_pieces.append([None] * len(words))
            for piece, word in enumerate(encoded.word_ids(example)):
                if word is not None and first_pieces[-1][word] is None:
                    first_pieces[-1][word] = piece
        return {
            **encoded,
            "example": positions,
            "first_pieces": first_pieces,
            "cut": [pieces.count(None) for pieces in first_pieces],
        }

    def training_features(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
    ) -> Dataset:
        features: list[dict[str, list[int]]] = []
        windows = self.windows(rows, tokenizer, max_length, doc_stride).remove_columns(["example", "cut"])
        for window, tags in zip(windows, rows[self.tag_column]):
            labels = [NOT_SCORED] * len(window["input_ids"])
            for piece, tag in zip(window.pop("first_pieces"), tags):
                if piece is not None:
                    labels[piece] = tag
            # The mean loss of a batch without a label is no number.
            if any(label != NOT_SCORED for label in labels):
                features.append({**window, "labels": labels})
        if not features:
            raise XLFAError(f"no training sentence of the task {self.name!r} has a word that the tokenizer knows")
        return Dataset.from_list(features)

    def read_outputs(self, outputs: ModelOutput, inputs: BatchEncoding, columns: dict[str, list[int]]) -> torch.Tensor:
        """Tag number of each token and its probability, B x T x 2."""
        probabilities, tags = outputs.logits.float().softmax(-1).max(-1)
        return torch.stack([tags.float(), probabilities], dim=-1)

    def predictions(
        self, rows: Dataset, ids: list[str], windows: Dataset, readings: list[np.ndarray]
    ) -> list[Prediction]:
        predictions = []
        for id, tags, pieces, reading in zip(
            ids, rows[self.tag_column], windows["first_pieces"], readings, strict=True
        ):
            predicted = [None if piece is None else self.label_names[int(reading[piece, 0])] for piece in pieces]
            probabilities = [float(reading[piece, 1]) for piece in pieces if piece is not None]
            score = sum(probabilities) / max(1, len(probabilities))
            predictions.append(Prediction(id, predicted, [self.label_names[tag] for tag in tags], score))
        return predictions

    def score(self, predictions: list[Prediction], language: str) -> dict[str, float | None]:
        result = _tagging().compute(
            predictions=[row.prediction for row in predictions],
            references=[row.label for row in predictions],
        )
        return {name: result[name] for name in self.metrics}

    def contributions(self, predictions: list[Prediction], language: str) -> dict[str, np.ndarray]:
        counts = count_tags([row.prediction for row in predictions], [row.label for row in predictions])
        return {name: np.array(counts[name], dtype=float) for name in self.metrics}


def marks_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a word has other pieces after a space than alone, so that words need theirs back (byte-level BPE)."""
    alone = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    return alone != tokenizer("a a", add_special_tokens=False)["input_ids"]


@functools.cache
def _tagging() -> evaluate.EvaluationModule:
    return evaluate.load(str(TAGGING))
