"""Scoring a trained model in every language of a task, zero-shot from English."""

import logging
import os
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from modeling_xlfa.modeling_xlfa import XLFAPreTrainedModel
from xlfa.adapters import is_adapter, load_adapter
from xlfa.arguments import InferenceArguments, check_positive, option, parse_arguments
from xlfa.backbones import load_tokenizer
from xlfa.cli import start_logging
from xlfa.comparison import compare_runs, format_comparison, write_comparison
from xlfa.data import SAMPLE, data_state, sample_clusters
from xlfa.encoding import check_length
from xlfa.environment import describe_threads, versions
from xlfa.errors import XLFAError, exit_with_message
from xlfa.files import writable_folder
from xlfa.hub_errors import naming_read_errors
from xlfa.inference import InferenceOptions, on_main_process, prefetched
from xlfa.prediction import predict
from xlfa.resuming import begin, finish, model_origin, writing_alone
from xlfa.run_file import weights_digest
from xlfa.scores import build_scores, format_table, predictions_file, write_predictions, write_scores
from xlfa.statistics import Clusters, cluster_numbers
from xlfa.tasks import TASKS, Prediction, Task, get_task
from xlfa.trunk import TrunkCache

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Score a trained XLFA model in every language of a task (--model); writes scores.json, predictions and a figure. "
    "Or compare two runs that were scored (--compare)."
)
EXAMPLES = """examples:
  xlfa eval --model runs/xnli-dlfa --task xnli --languages de en zh
  xlfa eval --compare runs/xnli-plain runs/xnli-dlfa --task xnli
  accelerate launch eval_xlfa.py --model runs/xnli-dlfa --task xnli
"""


@dataclass(kw_only=True)
class EvaluationArguments(InferenceArguments):
    """What is scored, and how."""

    task: str = field(metadata={"help": "Task to score.", "choices": TASKS})
    model: str | None = option("Trained XLFA model: a folder or a Hub id.")
    compare: list[str] | None = option(
        "Instead of --model: two runs, A and B, scored on the same examples. Prints B - A by language, with intervals "
        "and p values; --output_dir gets compare.json. Only --task and --output_dir apply."
    )
    languages: list[str] | None = option("ISO 639-1 codes; by default all of the task.")
    data_root: str | None = option(
        "Folder with data sets as <org>/<name> instead of the Hub, or 'sample' for the embedded texts."
    )
    output_dir: str | None = option("Where to write; by default <model>/scores/<task>.")
    max_examples: int | None = option(
        "Score a seeded sample of whole premises or paragraphs, at most that many examples a language; the same in "
        "every language of a parallel set."
    )
    seed: int = option("Of that sample.", 0)
    max_length: int | None = option("Longest input in tokens; by default as in training.")
    doc_stride: int | None = option("Tokens that neighbouring windows share (QA); by default as in training.")
    cache_trunk: bool = option(
        "Of a model with frozen layers: read their states from disk, after storing those that are not there.", False
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive("max_examples", self.max_examples)
        if (self.model is None) == (self.compare is None):
            raise ValueError("give either --model, to score it, or --compare with two runs that were scored")
        if self.compare is not None and len(self.compare) != 2:
            raise ValueError(f"--compare takes two runs, not {len(self.compare)}: {' '.join(self.compare)}")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `eval_xlfa.py` and `xlfa eval`."""
    (arguments,) = parse_arguments(
        [EvaluationArguments], sys.argv[1:] if argv is None else argv, "xlfa eval", DESCRIPTION, EXAMPLES
    )
    state = PartialState(cpu=not torch.accelerator.is_available())
    start_logging(logging.INFO if state.is_main_process else logging.WARNING)
    if arguments.compare is not None:
        if state.is_main_process:
            compare(arguments)
        return
    print_scores(arguments, evaluate_model(arguments))


def print_scores(arguments: EvaluationArguments, scores: dict[str, Any]) -> None:
    """The table of the scores and where they lie, from the main process."""
    if PartialState().is_main_process:
        print(format_table(scores))
        print(f"written to {output_folder(arguments)}")


def compare(arguments: EvaluationArguments) -> None:
    """Print the comparison of two scored runs; write it to `--output_dir` if that is given."""
    comparison = compare_runs(get_task(arguments.task), *map(Path, arguments.compare))
    folder = None if arguments.output_dir is None else writable_folder(arguments.output_dir)
    print(format_comparison(comparison))
    if folder is not None:
        print(f"written to {write_comparison(folder, comparison)}")


def evaluate_model(arguments: EvaluationArguments) -> dict[str, Any]:
    """Score all languages with one load of the model; returns the content of `scores.json`.

    Languages that a run of the same model, data and settings finished before it was interrupted are not scored again.

    Raises:
        XLFAError: for anything about the arguments, model or data that the user can mend; also where another run is
            writing to the same folder.
    """
    with ExitStack() as stack:
        on_main_process(lambda: stack.enter_context(writing_alone(writable_folder(output_folder(arguments)))))
        return _evaluate(arguments)


def _evaluate(arguments: EvaluationArguments) -> dict[str, Any]:
    task = get_task(arguments.task)
    languages = task.check_languages(arguments.languages, arguments.data_root)
    logger.info(describe_threads())
    model, tokenizer = load_model(task, arguments.model)
    state = PartialState()
    model.to(state.device)
    max_length, doc_stride = input_lengths(arguments.max_length, arguments.doc_stride, model, task)

    options = InferenceOptions.of(arguments, model.device)
    shared_ids: list[str] | None = None
    clusters: Clusters = {}
    if task.parallel:
        english = task.load_test("en", arguments.data_root)
        shared_ids = chosen_ids(task, english, arguments)
        clusters = cluster_numbers(task.groups(select_ids(task, english, shared_ids, "en")))
    trunk = None
    if arguments.cache_trunk:
        trunk = model.base_model.stored_trunk = TrunkCache(model.base_model, tokenizer, options)
    settings = {
        "data": {None: "hub", SAMPLE: SAMPLE}.get(arguments.data_root, "local mirror"),
        "max_examples": arguments.max_examples,
        "seed": arguments.seed,
        "max_length": max_length,
        "doc_stride": doc_stride,
        **vars(options),
        "cache_trunk": arguments.cache_trunk,
        "processes": state.num_processes,
    }
    kept = kept_predictions(arguments, settings, languages)

    def prepare(language: str) -> tuple[str, Dataset, list[str], Dataset | None]:
        """The language's split, rows, ids, and windows unless its predictions are kept."""
        rows = task.load_test(language, arguments.data_root)
        split = str(rows.split)
        if task.parallel and split != str(english.split):
            raise XLFAError(
                f"{task.test_dataset} has the split {str(english.split)!r} in English, and {split!r} alone in "
                f"{language!r}: these are not parallel; name languages that have the same one (--languages)"
            )
        ids = shared_ids or chosen_ids(task, rows, arguments)
        rows = select_ids(task, rows, ids, language)
        is_kept = [row.id for row in kept.get(language, [])] == ids
        return split, rows, ids, None if is_kept else task.windows(rows, tokenizer, max_length, doc_stride)

    splits: dict[str, str] = {}
    predictions: dict[str, list[Prediction]] = {}
    prepared = zip(languages, prefetched(prepare, languages))
    for language, (split, rows, ids, windows) in tqdm(
        prepared, desc="languages", total=len(languages), disable=not state.is_main_process
    ):
        splits[language] = split
        if isinstance(clusters, dict):
            clusters[language] = cluster_numbers(task.groups(rows))
        if windows is None:
            logger.info("%s: kept from the interrupted run", language)
            predictions[language] = kept[language]
            continue
        if trunk is not None:
            trunk.fill(windows, description=language)
        predictions[language] = predict(model, tokenizer, task, rows, ids, windows, options, description=language)
        if state.is_main_process:
            write_predictions(predictions_file(output_folder(arguments), language), predictions[language])

    folder = Path(arguments.model)
    weights = weights_digest(folder) if folder.is_dir() else None
    scores = build_scores(task, predictions, clusters, splits, model.config, settings, weights)
    if state.is_main_process:
        write_scores(output_folder(arguments), scores)
        finish(output_folder(arguments), languages)
    return scores


def kept_predictions(
    arguments: EvaluationArguments, settings: dict[str, Any], languages: list[str]
) -> dict[str, list[Prediction]]:
    """Those of the languages that an interrupted run finished, in every process; see `xlfa.resuming`."""

    def find() -> dict[str, list[Prediction]]:
        origin = {
            "model": model_origin(arguments.model),
            "data_root": arguments.data_root,
            "data": data_state(get_task(arguments.task).test_dataset, arguments.data_root),
            "settings": settings,
            "versions": versions(),
        }
        return begin(output_folder(arguments), origin, languages)

    # The processes share the work of a language: they must agree on which ones are left.
    return on_main_process(find)


def input_lengths(
    max_length: int | None, doc_stride: int | None, model: XLFAPreTrainedModel, task: Task
) -> tuple[int, int]:
    """`--max_length` and `--doc_stride`; what is not given is as in training, or else the task's.

    Raises:
        XLFAError: for inputs that are too long for the model, or a number that is no length.
    """
    if doc_stride is not None and doc_stride < 0:
        raise XLFAError(f"--doc_stride {doc_stride}: at least 0")
    check_length("max_length", max_length, model)
    lengths = (max_length, model.config.input_length, task.defaults.max_length)
    strides = (doc_stride, model.config.input_stride, task.defaults.doc_stride)
    longest, stride = (next(value for value in values if value is not None) for values in (lengths, strides))
    return longest, stride


def output_folder(arguments: EvaluationArguments) -> Path:
    """`--output_dir`; else `scores/<task>` in the model's folder, or for a Hub id in a folder `<org>--<name>` here."""
    if arguments.output_dir is not None:
        return Path(arguments.output_dir)
    model = Path(arguments.model)
    return (model if model.is_dir() else Path(arguments.model.replace("/", "--"))) / "scores" / arguments.task


def load_model(
    task: Task, name_or_path: str, flag: str = "model"
) -> tuple[XLFAPreTrainedModel, PreTrainedTokenizerBase]:
    """The trained model by the installed class (no remote code runs) and its tokenizer; adapters are merged.

    Args:
        flag: that the model was given by, for the errors.

    Raises:
        XLFAError: for a folder that is no XLFA model, an unknown Hub id, a Hub that fails, a model with another head,
            or one without tokenizer files.
    """
    place = f"--{flag} {name_or_path}"
    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, "config.json")):
        raise XLFAError(f"{place}: the folder holds no trained model (it has no config.json)")
    try:
        with naming_read_errors(place, name_or_path, "no model there"):
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
            check_model(task, name_or_path, config, flag)
            tokenizer = load_tokenizer(name_or_path)
            if is_adapter(name_or_path):
                return load_adapter(task.model_class, name_or_path).merge_and_unload(), tokenizer
            return task.model_class.from_pretrained(name_or_path, config=config, use_safetensors=True), tokenizer
    except XLFAError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise XLFAError(f"{place}: cannot load it ({error})") from None


def check_model(task: Task, name_or_path: str, config: PretrainedConfig, flag: str) -> None:
    """Raise `XLFAError` if it is no XLFA model, or has another head or other labels than the task."""
    if config.model_type != "xlfa":
        raise XLFAError(f"--{flag} {name_or_path}: a {config.model_type!r} model, not an XLFA one: train it first")
    head = task.model_class.__name__
    if config.architectures != [head]:
        raise XLFAError(
            f"--{flag} {name_or_path} has the head {', '.join(config.architectures or ['none'])}; the task "
            f"{task.name!r} needs {head}"
        )
    check_labels(task, name_or_path, config, flag)


def check_labels(task: Task, name_or_path: str, config: PretrainedConfig, flag: str) -> None:
    """Raise `XLFAError` if the model's labels are not those of a classification task, in their order.

    A model without names for its labels passes if their number is right.
    """
    labels = [config.id2label[number] for number in sorted(config.id2label)]
    unnamed = [f"LABEL_{number}" for number in range(len(task.label_names))]
    if task.label_names and labels not in (list(task.label_names), unnamed):
        raise XLFAError(
            f"--{flag} {name_or_path} has the labels {', '.join(labels)}; the task {task.name!r} needs "
            f"{', '.join(task.label_names)}, in this order"
        )


def chosen_ids(task: Task, rows: Dataset, arguments: EvaluationArguments) -> list[str]:
    """Ids of the examples to score: of the English rows for every language of a parallel set, else of its own rows."""
    positions = sample_clusters(task.groups(rows), arguments.max_examples, arguments.seed)
    ids = task.example_ids(rows)
    return [ids[position] for position in positions]


def select_ids(task: Task, rows: Dataset, ids: list[str], language: str) -> Dataset:
    """The rows with these ids, in this order.

    Raises:
        XLFAError: if a language lacks one: the sets are not parallel then; and if ids are not unique.
    """
    own_ids = task.example_ids(rows)
    positions = {id: position for position, id in enumerate(own_ids)}
    if len(positions) < len(own_ids):
        repeated = next(id for id, number in Counter(own_ids).items() if number > 1)
        raise XLFAError(f"{task.test_dataset} ({language}) has several examples with the id {repeated!r}")
    missing = [id for id in ids if id not in positions]
    if missing:
        raise XLFAError(
            f"{task.test_dataset} ({language}) lacks {len(missing)} of the {len(ids)} examples scored in English, "
            f"the first {missing[0]!r}: the languages are not parallel"
        )
    return rows.select([positions[id] for id in ids])


def run() -> None:
    """`main` with user errors as one line."""
    transformers.utils.logging.set_verbosity_warning()
    exit_with_message(main)
