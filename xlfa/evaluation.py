"""Scoring a trained model in every language of a task, zero-shot from English."""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from modeling_xlfa.modeling_xlfa import XLFAPreTrainedModel
from xlfa.arguments import option, parse_arguments
from xlfa.data import SAMPLE, sample_clusters
from xlfa.environment import describe_threads
from xlfa.errors import XLFAError, exit_with_message
from xlfa.prediction import predict
from xlfa.scores import Scores, build_scores, format_table, write_predictions, write_scores
from xlfa.tasks import TASKS, Task, get_task

logger = logging.getLogger(__name__)

DESCRIPTION = "Score a trained XLFA model in every language of a task; writes scores.json, predictions and a figure."


@dataclass
class EvaluationArguments:
    """What is scored, and how."""

    model: str = field(metadata={"help": "Trained XLFA model: a folder or a Hub id."})
    task: str = field(metadata={"help": "Task to score.", "choices": list(TASKS)})
    languages: list[str] | None = option("ISO 639-1 codes; by default all of the task.")
    data_root: str | None = option(
        "Folder with data sets as <org>/<name> instead of the Hub, or 'sample' for the embedded texts."
    )
    output_dir: str | None = option("Where to write; by default <model>/scores/<task>.")
    max_examples: int | None = option(
        "Score a seeded sample of whole premises or paragraphs, at most that many examples, the same in every language."
    )
    seed: int = option("Of that sample.", 0)
    batch_size: int = option("Inputs a batch.", 32)
    max_length: int | None = option("Longest input in tokens; by default as in training.")
    doc_stride: int | None = option("Tokens that neighbouring windows share (QA); by default as in training.")
    bf16: bool = option("Matrix products in bfloat16.", False)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `eval_xlfa.py` and `xlfa eval`."""
    (arguments,) = parse_arguments(
        [EvaluationArguments], sys.argv[1:] if argv is None else argv, "eval_xlfa.py", DESCRIPTION
    )
    state = PartialState(cpu=not torch.accelerator.is_available())
    logging.basicConfig(level=logging.INFO if state.is_main_process else logging.WARNING, format="%(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    scores = evaluate_model(arguments)
    if state.is_main_process:
        print(format_table(scores))
        print(f"written to {output_folder(arguments)}")


def evaluate_model(arguments: EvaluationArguments) -> dict[str, Any]:
    """Score all languages with one load of the model; returns the content of `scores.json`.

    Raises:
        XLFAError: for anything about the arguments, model or data that the user can mend.
    """
    task = get_task(arguments.task)
    languages = task.check_languages(arguments.languages)
    logger.info(describe_threads())
    model, tokenizer = load_model(task, arguments.model)
    state = PartialState()
    model.to(state.device)
    max_length = first_given(arguments.max_length, model.config.input_length, task.defaults.max_length)
    doc_stride = first_given(arguments.doc_stride, model.config.input_stride, task.defaults.doc_stride)

    ids = chosen_ids(task, arguments)
    by_language: dict[str, Scores] = {}
    for language in tqdm(languages, desc="languages", disable=not state.is_main_process):
        rows = select_ids(task, task.load_test(language, arguments.data_root), ids, language)
        predictions = predict(
            model,
            tokenizer,
            task,
            rows,
            ids,
            max_length=max_length,
            doc_stride=doc_stride,
            batch_size=arguments.batch_size,
            bf16=arguments.bf16,
            description=language,
        )
        by_language[language] = task.score(predictions, language)
        if state.is_main_process:
            write_predictions(output_folder(arguments) / "predictions" / f"{language}.jsonl", predictions)

    settings = {
        "data": {None: "hub", SAMPLE: SAMPLE}.get(arguments.data_root, "local mirror"),
        "max_examples": arguments.max_examples,
        "seed": arguments.seed,
        "max_length": max_length,
        "doc_stride": doc_stride,
        "batch_size": arguments.batch_size,
        "bf16": arguments.bf16,
        "processes": state.num_processes,
    }
    scores = build_scores(task, by_language, ids, model.config, settings)
    if state.is_main_process:
        write_scores(output_folder(arguments), scores)
    return scores


def first_given(*values: int | None) -> int:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


def output_folder(arguments: EvaluationArguments) -> Path:
    """`--output_dir`; else `scores/<task>` in the model's folder, or for a Hub id in a folder of its name here."""
    if arguments.output_dir is not None:
        return Path(arguments.output_dir)
    model = Path(arguments.model)
    return (model if model.is_dir() else Path(model.name)) / "scores" / arguments.task


def load_model(task: Task, name_or_path: str) -> tuple[XLFAPreTrainedModel, PreTrainedTokenizerBase]:
    """The trained model by the installed class (no remote code runs) and its tokenizer.

    Raises:
        XLFAError: for a folder that is no XLFA model, an unknown Hub id, or a model with another head.
    """
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise XLFAError(f"--model {name_or_path}: the folder holds no trained model (it has no config.json)")
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError, ImportError) as error:
        raise XLFAError(f"--model {name_or_path}: no model there ({error})") from None
    if config.model_type != "xlfa":
        raise XLFAError(f"--model {name_or_path}: a {config.model_type!r} model, not an XLFA one: train it first")
    head = task.model_class.__name__
    if config.architectures != [head]:
        raise XLFAError(
            f"--model {name_or_path} has the head {', '.join(config.architectures or ['none'])}; the task "
            f"{task.name!r} needs {head}"
        )
    try:
        return task.model_class.from_pretrained(name_or_path, config=config), AutoTokenizer.from_pretrained(
            name_or_path
        )
    except (OSError, ValueError) as error:
        raise XLFAError(f"--model {name_or_path}: cannot load it ({error})") from None


def chosen_ids(task: Task, arguments: EvaluationArguments) -> list[str]:
    """Ids of the examples to score: clusters are those of the English rows, so they are the same in every language."""
    rows = task.load_test("en", arguments.data_root)
    positions = sample_clusters(rows[task.group_column], arguments.max_examples, arguments.seed)
    ids = task.example_ids(rows)
    return [ids[position] for position in positions]


def select_ids(task: Task, rows: Dataset, ids: list[str], language: str) -> Dataset:
    """The rows with these ids, in this order.

    Raises:
        XLFAError: if a language lacks one: the sets are not parallel then.
    """
    positions = {id: position for position, id in enumerate(task.example_ids(rows))}
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
