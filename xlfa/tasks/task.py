"""What a task is: where its data lies, how it becomes model inputs, and how outputs become predictions and scores."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from xlfa.data import hold_out_groups, load_rows, sample_clusters
from xlfa.errors import XLFAError

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
        id: the example's id, the same in every language.
        prediction: a label name, or the answer's text.
        label: the right label name, or the list of right answers.
        score: the model's probability of its prediction.
    """

    id: str
    prediction: str
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
        test_configs: ISO 639-1 code → configuration of `test_dataset`.
        xtreme_languages: the languages of `average_xtreme`.
        defaults: XTREME's recipe.
        metrics: names of the scores, the primary one first.
        columns: what the data must have.
        group_column: rows with the same value belong together when data are split or sampled.
        label_names: of a classification task, in the order of the label numbers.
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
    group_column: str
    label_names: tuple[str, ...] = ()

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
    def scoring_windows(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
    ) -> list[dict[str, Any]]:
        """Tokenised inputs, one or more an example: `input_ids`, `attention_mask`, `example` (its position), and what
        `read_outputs` needs."""

    @abstractmethod
    def read_outputs(self, outputs: ModelOutput, windows: list[dict[str, Any]]) -> list[Any]:
        """What is kept of a batch's outputs, one small object a window."""

    @abstractmethod
    def predictions(
        self, rows: Dataset, ids: list[str], windows: list[dict[str, Any]], readings: list[Any]
    ) -> list[Prediction]:
        """One prediction an example, in the order of `rows`."""

    @abstractmethod
    def score(self, predictions: list[Prediction], language: str) -> dict[str, float | None]:
        """Scores from 0 to 100 by metric name."""

    def check_languages(self, languages: list[str] | None) -> list[str]:
        """The languages to score: all of the task by default.

        Raises:
            XLFAError: for a language that the task does not have.
        """
        unknown = [language for language in languages or [] if language not in self.test_configs]
        if unknown:
            raise XLFAError(
                f"task {self.name!r} has no language {', '.join(map(repr, unknown))}; it has: "
                + ", ".join(self.test_configs)
            )
        return list(languages or self.test_configs)

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
        """English rows that models are selected on: never the scored split."""
        if self.validation is None:
            _, rows = self._training_and_held_out(train_dataset, data_root)
        else:
            source = self.validation
            rows = load_rows(source.dataset, source.config, source.split, data_root, self.columns)
            self.check_rows(rows, f"{source.dataset} ({source.split})")
        return rows.select(sample_clusters(rows[self.group_column], max_examples, seed))

    def _training_and_held_out(
        self, train_dataset: str | None, data_root: str | None
    ) -> tuple[Dataset, Dataset | None]:
        dataset, config = (train_dataset, None) if train_dataset else (self.train.dataset, self.train.config)
        rows = load_rows(dataset, config, self.train.split, data_root, self.columns)
        self.check_rows(rows, dataset)
        if self.validation is not None:
            return rows, None
        kept, held_out = hold_out_groups(rows[self.group_column], HELD_OUT_FRACTION)
        return rows.select(kept), rows.select(held_out)

    @abstractmethod
    def check_rows(self, rows: Dataset, place: str) -> None:
        """Raise `XLFAError` for rows that no model can be trained on or scored with."""

    def load_test(self, language: str, data_root: str | None) -> Dataset:
        """All rows of the scored split in one language, in the data set's order."""
        rows = load_rows(self.test_dataset, self.test_configs[language], self.test_split, data_root, self.columns)
        self.check_rows(rows, f"{self.test_dataset} ({language})")
        return rows

    def example_ids(self, rows: Dataset) -> list[str]:
        """Ids that are the same in every language: the column `id`, else the position, as the sets are parallel."""
        if "id" in rows.column_names:
            return [str(value) for value in rows["id"]]
        return [str(position) for position in range(len(rows))]
