"""Tasks that give one label to a pair of sentences (XNLI, PAWS-X)."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import evaluate
import numpy as np
import torch
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from modeling_xlfa import XLFAForSequenceClassification
from xlfa.errors import XLFAError
from xlfa.tasks.task import Prediction, Task

ACCURACY = Path(__file__).parent.parent / "metrics" / "accuracy.py"


@dataclass(frozen=True, kw_only=True)
class SequenceClassificationTask(Task):
    """One label for a pair of sentences.

    Attributes:
        sentence_columns: the two text columns.
    """

    sentence_columns: tuple[str, str]
    metrics: tuple[str, ...] = ("accuracy",)
    cut_unit: ClassVar[str] = "pairs reach it and may be cut"

    @property
    def model_class(self) -> type:
        return XLFAForSequenceClassification

    def check_rows(self, rows: Dataset, place: str) -> None:
        names = [name.lower() for name in getattr(rows.features["label"], "names", None) or []]
        # Other names, such as PAWS-X's 0 and 1, tell nothing about the order.
        if set(names) == set(self.label_names) and names != list(self.label_names):
            raise XLFAError(
                f"{place}: the labels are {', '.join(names)}; the task {self.name!r} needs "
                f"{', '.join(self.label_names)}, in this order"
            )
        columns = [rows[column][:] for column in (*self.sentence_columns, "label")]
        for position, (*sentences, label) in enumerate(zip(*columns)):
            if any(sentence is None for sentence in sentences):
                raise XLFAError(f"{place}: row {position} has an empty {' or '.join(self.sentence_columns)}")
            if label not in range(len(self.label_names)):
                raise XLFAError(
                    f"{place}: row {position} has label {label!r}; the task {self.name!r} knows "
                    f"0..{len(self.label_names) - 1} ({', '.join(self.label_names)})"
                )

    def texts(self, rows: Dataset) -> list[str]:
        return [text for column in self.sentence_columns for text in rows[column][:]]

    def encode(
        self,
        batch: dict[str, list],
        positions: list[int],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        doc_stride: int,
    ) -> dict[str, list]:
        """One input a pair."""
        first, second = (batch[column] for column in self.sentence_columns)
        encoded = tokenizer(first, second, truncation=True, max_length=max_length, return_length=True)
        return {**encoded, "example": positions, "cut": [int(length == max_length) for length in encoded["length"]]}

    def training_features(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
    ) -> Dataset:
        windows = self.windows(rows, tokenizer, max_length, doc_stride)
        return windows.add_column("labels", rows["label"][:]).remove_columns(["example", "cut"])

    def read_outputs(self, outputs: ModelOutput, inputs: BatchEncoding, columns: dict[str, list[int]]) -> torch.Tensor:
        """Label number and its probability, B x 2."""
        probabilities, labels = outputs.logits.float().softmax(-1).max(-1)
        return torch.stack([labels.float(), probabilities], dim=-1)

    def predictions(
        self, rows: Dataset, ids: list[str], windows: Dataset, readings: list[np.ndarray]
    ) -> list[Prediction]:
        return [
            Prediction(id, self.label_names[int(predicted)], self.label_names[label], float(probability))
            for id, label, (predicted, probability) in zip(ids, rows["label"], readings, strict=True)
        ]

    def score(self, predictions: list[Prediction], language: str) -> dict[str, float | None]:
        numbers = {name: number for number, name in enumerate(self.label_names)}
        result = _accuracy().compute(
            predictions=[numbers[row.prediction] for row in predictions],
            references=[numbers[row.label] for row in predictions],
        )
        return {name: result[name] for name in self.metrics}

    def contributions(self, predictions: list[Prediction], language: str) -> dict[str, np.ndarray]:
        found = {
            "accuracy": np.array([[row.prediction == row.label, 1.0] for row in predictions]),
            "majority_rate": np.array([[float(row.label == name) for name in self.label_names] for row in predictions]),
        }
        return {name: found[name] for name in self.metrics}

    def score_of_sums(self, metric: str, sums: np.ndarray) -> np.ndarray:
        if metric == "majority_rate":
            return 100.0 * sums.max(-1) / sums.sum(-1)
        return super().score_of_sums(metric, sums)


@functools.cache
def _accuracy() -> evaluate.EvaluationModule:
    return evaluate.load(str(ACCURACY))
