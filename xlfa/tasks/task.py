"""What a task is: where its data lies, how it becomes model inputs, and how outputs become predictions and scores."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from xlfa.data import (
    connected_groups,
    held_configurations,
    hold_out_groups,
    load_first_split,
    load_rows,
    sample_clusters,
)
from xlfa.encoding import encode_rows
from xlfa.errors import XLFAError
from xlfa.parallel import SOURCE_LANGUAGE

logger = logging.getLogger(__name__)

# Share of the training contexts that is held out where a task has no English validation split.
HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class Source:
    """A split of a data set on the Hub."""

    dataset: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Defaults:
    """XTREME's training recipe for a task."""

    learning_rate: float
    batch_size: int
    epochs: float
    max_length: int
    doc_stride: int = 128


@dataclass(frozen=True)
class Prediction:
    """A row of `predictions/<language>.jsonl`.

    Attributes:
        id: the example's id; the same in every language of a parallel set.
        prediction: a label name, the answer's text, or a tag for each word (None for a word without one).
        label: the right label name, the list of right answers, or the right tags.
        score: the model's probability of its prediction; of tags, their mean probability.
    """

    id: str
    prediction: str | list[str | None]
    label: str | list[str]
    score: float


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task of the registry.

    Attributes:
        name: as on the command line.
        train: the English training split.
        validation: the English split that models are selected on; None holds out a tenth of the training groups.
        test_dataset, test_split: what is scored.
        fallback_splits: scored, in this order, in languages that have no `test_split`.
        test_configs: ISO 639-1 code → configuration of `test_dataset`.
        id_prefixes: ISO 639-1 code → how the ids of its rows begin, where one configuration holds all languages.
        parallel: whether every language has the same examples under the same ids.
        xtreme_languages: the languages of `average_xtreme`.
        defaults: XTREME's recipe.
        metrics: names of the scores, the primary one first.
        columns: what the data must have.
        group_columns: rows that share a value in any of them belong together when data are split or sampled; without
            one, each row is a group.
        label_names: of a classification task, in the order of the label numbers.
        cut_unit: what the column `cut` of the windows counts.
        read_columns: columns of the windows that `read_outputs` needs.
    """

    name: str
    train: Source
    validation: Source | None
    test_dataset: str
    test_split: str
    test_configs: dict[str, str]
    xtreme_languages: tuple[str, ...]
    defaults: Defaults
    metrics: tuple[str, ...]
    columns: tuple[str, ...]
    group_columns: tuple[str, ...]
    label_names: tuple[str, ...] = ()
    fallback_splits: tuple[str, ...] = ()
    id_prefixes: dict[str, str] = field(default_factory=dict)
    parallel: bool = True
    cut_unit: ClassVar[str]
    read_columns: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def model_class(self) -> type:
        """The head, a class of `modeling_xlfa`."""

    @abstractmethod
    def texts(self, rows: Dataset) -> list[str]:
        """All texts of the rows, for building a vocabulary."""

    @abstractmethod
    def training_features(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
    ) -> Dataset:
        """Tokenised training examples with the columns that the head's `forward` takes."""

    @abstractmethod
    def encode(
        self,
        batch: dict[str, list],
        positions: list[int],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        doc_stride: int,
    ) -> dict[str, list]:
        """Tokenised inputs of a batch of rows, one or more an example.

        Args:
            positions: of the rows among all.

        Returns:
            Columns: what the model takes, `length` (tokens), `example` (its position), `cut` (how much of the example
            the length limit left out, in the unit of `cut_unit`), and what else the task reads.
        """

    def windows(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int) -> Dataset:
        """The columns of `encode` for all rows, cached; what the limits cut off is logged."""
        windows = encode_rows(self, rows, tokenizer, max_length, doc_stride)
        cut = sum(windows["cut"])
        if cut:
            logger.warning("%s, limit of %d tokens: %d %s", self.name, max_length, cut, self.cut_unit)
        return windows

    @abstractmethod
    def read_outputs(self, outputs: ModelOutput, inputs: BatchEncoding, columns: dict[str, list[int]]) -> torch.Tensor:
        """What is kept of a batch's outputs, a few numbers a window: B x ..., on the model's device.

        Args:
            inputs: padded.
            columns: the windows' `read_columns`.
        """

    @abstractmethod
    def predictions(
        self, rows: Dataset, ids: list[str], windows: Dataset, readings: list[np.ndarray]
    ) -> list[Prediction]:
        """One prediction an example, in the order of `rows`, from what `read_outputs` kept of each window."""

    @abstractmethod
    def score(self, predictions: list[Prediction], language: str) -> dict[str, float | None]:
        """Scores from 0 to 100 by metric name."""

    def contributions(self, predictions: list[Prediction], language: str) -> dict[str, np.ndarray]:
        """What each example adds to the sums that a score is a function of: metric → examples x k.

        Metrics that do not exist for the language, or are no function of sums, are not there and get no interval.
        """
        return {}

    def score_of_sums(self, metric: str, sums: np.ndarray) -> np.ndarray:
        """Scores from 0 to 100, ..., from summed contributions, ... x k; by default k is 2, (part, whole)."""
        part, whole = sums[..., 0], sums[..., 1]
        return 100.0 * np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """What makes a batch of training features."""
        return DataCollatorWithPadding(tokenizer)

    def groups(self, rows: Dataset) -> list[str]:
        """The group of each row (`group_columns`)."""
        if not self.group_columns:
            return [str(position) for position in range(len(rows))]
        return connected_groups([rows[column] for column in self.group_columns])

    def check_languages(self, languages: list[str] | None, data_root: str | None = None) -> list[str]:
        """The languages to score: by default all of the task, but of a local mirror those that it holds.

        Raises:
            XLFAError: for a language that the task does not have, and for a mirror that holds none of them.
        """
        unknown = [language for language in languages or [] if language not in self.test_configs]
        if unknown:
            raise XLFAError(
                f"task {self.name!r} has no language {', '.join(map(repr, unknown))}; it has: "
                + ", ".join(self.test_configs)
            )
        if languages:
            return list(languages)
        held = held_configurations(self.test_dataset, list(self.test_configs.values()), data_root)
        absent = [language for language, config in self.test_configs.items() if config not in held]
        if absent:
            logger.warning("%s under %s lacks %s of the task", self.test_dataset, data_root, ", ".join(absent))
        return [language for language in self.test_configs if language not in absent]

    def load_training(
        self, train_dataset: str | None, data_root: str | None, max_examples: int | None, seed: int
    ) -> Dataset:
        """English training rows without the held-out ones, shuffled with `seed` and cut to `max_examples`."""
        rows, _ = self._training_and_held_out(train_dataset, data_root)
        rows = rows.shuffle(seed=seed)
        return rows if max_examples is None else rows.select(range(min(max_examples, len(rows))))

    def load_validation(
        self, train_dataset: str | None, data_root: str | None, max_examples: int | None = None, seed: int = 0
    ) -> Dataset:
        """English rows that models are selected on: not the scored split, unless that is a fallback (it is logged)."""
        if self.validation is None:
            _, rows = self._training_and_held_out(train_dataset, data_root)
        else:
            source = self.validation
            rows = load_rows(source.dataset, source.config, source.split, data_root, self.columns)
            self.check_rows(rows, f"{source.dataset} ({source.split})")
        return rows.select(sample_clusters(self.groups(rows), max_examples, seed, "max_eval_examples"))

    def _training_and_held_out(
        self, train_dataset: str | None, data_root: str | None
    ) -> tuple[Dataset, Dataset | None]:
        dataset, config = (train_dataset, None) if train_dataset else (self.train.dataset, self.train.config)
        rows = load_rows(dataset, config, self.train.split, data_root, self.columns)
        if train_dataset is None:
            rows = self._of_language(rows, SOURCE_LANGUAGE, dataset)
        self.check_rows(rows, dataset)
        if self.validation is not None:
            return rows, None
        kept, held_out = hold_out_groups(self.groups(rows), HELD_OUT_FRACTION)
        return rows.select(kept), rows.select(held_out)

    @abstractmethod
    def check_rows(self, rows: Dataset, place: str) -> None:
        """Raise `XLFAError` for rows that no model can be trained on or scored with."""

    def load_test(self, language: str, data_root: str | None) -> Dataset:
        """All rows of the scored split in one language, in the data set's order; their `split` names it."""
        place = f"{self.test_dataset} ({language})"
        config, splits = self.test_configs[language], (self.test_split, *self.fallback_splits)
        rows = load_first_split(self.test_dataset, config, splits, data_root, self.columns)
        if self.validation == Source(self.test_dataset, config, str(rows.split)):
            logger.warning("%s: %s is also the split that models are selected on", place, rows.split)
        rows = self._of_language(rows, language, place)
        self.check_rows(rows, place)
        return rows

    def _of_language(self, rows: Dataset, language: str, place: str) -> Dataset:
        """The rows of one language, where one configuration holds all."""
        if not self.id_prefixes:
            return rows
        prefix = self.id_prefixes[language]
        chosen = [position for position, id in enumerate(rows["id"][:]) if id.startswith(prefix)]
        if not chosen:
            raise XLFAError(f"{place}: no row has an id that begins with {prefix!r}, as those of {language!r} do")
        return rows.select(chosen)

    def example_ids(self, rows: Dataset) -> list[str]:
        """The column `id`, else the position among `rows`."""
        if "id" in rows.column_names:
            return [str(value) for value in rows["id"][:]]
        return [str(position) for position in range(len(rows))]
