"""What the cells of a study share: the encoder with its vocabulary trimmed once, and its retrieval before training."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from filelock import FileLock

from xlfa.backbones import naming_model, writable_cache
from xlfa.data import SAMPLE
from xlfa.files import write_text
from xlfa.retrieval import COLUMNS, CONFIGS, load_pairs, score_retrieval
from xlfa.study.grid import Plan, PlannedCell
from xlfa.tasks import get_task
from xlfa.training import load_pair_texts, vocabulary_texts
from xlfa.vocabulary.folders import Source
from xlfa.vocabulary.trimming import kept_ids, trimmed_encoder

logger = logging.getLogger(__name__)

VOCABULARY_FOLDER = "vocabulary"
RETRIEVAL_FOLDER = "retrieval_before"


class Encoders:
    """The encoders that a study's cells start from.

    With `trim_vocab` the vocabulary is that of all texts of the study: its tasks' whole training and test sets, all
    parallel text, and the sentences of the retrieval. Of its own training sample each seed would make another one, and
    another encoder, whose frozen states could not be shared.

    Both the vocabulary and the retrieval before training are written to the study's folder once, and read from then on.

    Args:
        plan: of the study.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self._folders: dict[str, str] = {}
        self._retrieval: dict[str, dict[str, Any]] = {}

    def prepare(self) -> None:
        """Make what any cell needs; raises `XLFAError` for data that are not there."""
        for cell in self.plan.cells:
            self.encoder(cell)
            if cell.settings["retrieval"] is not None:
                self.retrieval_before(cell)

    def encoder(self, cell: PlannedCell) -> str:
        """What the cell's training starts from: the encoder as its settings name it, or a folder."""
        model, trimmed = cell.settings["train"]["model"], cell.settings["train"].get("trim_vocab", False)
        if not trimmed:
            return model
        if model not in self._folders:
            self._folders[model] = self._trim(model)
        return self._folders[model]

    def _trim(self, model: str) -> str:
        cells = [cell for cell in self.plan.cells if cell.settings["train"]["model"] == model]
        cells = [cell for cell in cells if cell.settings["train"].get("trim_vocab", False)]
        sources = self._text_sources(cells)
        retrieval = cells[0].settings["retrieval"]
        key = [model, sorted(sources), retrieval and (retrieval.get("languages") or list(CONFIGS))]
        with naming_model(model):
            source = Source.open(model)

        def read() -> list[int]:
            logger.info("vocabulary of %s: reading all texts of the study, once", model)
            return kept_ids(source, self._texts(sources, cells))

        return trimmed_encoder(source, self._once(VOCABULARY_FOLDER, key, read))

    def _text_sources(self, cells: list[PlannedCell]) -> dict[str, PlannedCell]:
        """A cell for each combination of data that are read."""
        names = ("task", "train_dataset", "parallel_dataset", "parallel_languages", "parallel_filter")
        found = {}
        for cell in cells:
            train = cell.settings["train"]
            found.setdefault(json.dumps([_is_aligned(cell), *(train.get(name) for name in names)]), cell)
        return found

    def _texts(self, sources: dict[str, PlannedCell], cells: list[PlannedCell]) -> Iterator[str]:
        root = self.plan.data_root
        for cell in sources.values():
            task = get_task(cell.task)
            _, data_args, _ = cell.training_arguments(data_root=root)
            rows = [task.load_training(data_args.train_dataset, root, None, seed=0)]
            rows.append(task.load_validation(data_args.train_dataset, root))
            every_pair = replace(data_args, parallel_pairs_per_language=None)
            pairs = load_pair_texts(task, every_pair, seed=0) if _is_aligned(cell) else {}
            yield from vocabulary_texts(task, data_args, rows, pairs)
        if cells[0].settings["retrieval"] is not None:
            for language in cells[0].settings["retrieval"].get("languages") or CONFIGS:
                rows = load_pairs(language, root)
                for column in COLUMNS:
                    yield from rows[column]

    def retrieval_before(self, cell: PlannedCell) -> dict[str, Any]:
        """Content of `retrieval.json` of the encoder as it comes."""
        model, settings = cell.settings["train"]["model"], cell.settings["retrieval"]
        if model not in self._retrieval:

            def score() -> dict[str, Any]:
                arguments = cell.retrieval_arguments(model=self.encoder(cell), data_root=self.plan.data_root)
                with naming_model(model):
                    return score_retrieval(arguments)

            self._retrieval[model] = self._once(RETRIEVAL_FOLDER, [model, settings], score)
        return self._retrieval[model]

    def _once(self, folder: str, key: list[Any], compute: Callable[[], Any]) -> Any:
        """What `compute` returns, from the study's folder where it is there already."""
        digest = hashlib.sha256(json.dumps([data_kind(self.plan.data_root), *key]).encode()).hexdigest()[:16]
        path = self.plan.output_dir / folder / f"{digest}.json"
        # Of this machine's workers one computes; another machine may do so at the same time, and finds the same.
        with FileLock(writable_cache() / f"study-{digest}.lock"):
            if not path.is_file():
                write_text(path, json.dumps(compute()) + "\n")
            return json.loads(path.read_text(encoding="utf-8"))


def data_kind(data_root: str | None) -> str:
    """What stands for the data in a study's folder: a mirror may lie anywhere."""
    return SAMPLE if data_root == SAMPLE else "full"


def _is_aligned(cell: PlannedCell) -> bool:
    return cell.settings["train"].get("ot_weight", 0) > 0
