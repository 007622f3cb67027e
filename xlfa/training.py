"""Training one model, from the command line to the saved run folder."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME

from modeling_xlfa.modeling_xlfa import XLFAPreTrainedModel
from xlfa.adapters import add_adapters, check_same_adapters
from xlfa.arguments import (
    COMMON_TRAINING_FLAGS,
    DataArguments,
    InferenceArguments,
    ModelArguments,
    XLFATrainingArguments,
    parse_arguments,
)
from xlfa.backbones import load_tokenizer, naming_model, resolve_encoder
from xlfa.checkpoints import BestCheckpoint, check_same_model, check_same_run, find_checkpoint, naming_full_disk
from xlfa.cli import start_logging
from xlfa.encoding import check_length
from xlfa.environment import describe_threads
from xlfa.errors import XLFAError, exit_with_message
from xlfa.evaluation import EvaluationArguments, evaluate_model, print_scores
from xlfa.inference import InferenceOptions
from xlfa.parallel import SOURCE_LANGUAGE, PairSampler, load_parallel, read_piece_weights
from xlfa.publishing import check_names, check_token, push
from xlfa.run_file import record_end, record_start
from xlfa.tasks import Task, get_task
from xlfa.trainer import XLFATrainer
from xlfa.trunk import TrunkCache
from xlfa.vocabulary.rates import new_piece_rows
from xlfa.vocabulary.trimming import trim_vocabulary

logger = logging.getLogger(__name__)

DESCRIPTION = "Fine-tune an encoder with feature aggregation and optimal-transport alignment on an English task."
EXAMPLES = """examples:
  xlfa train configs/quickstart.yaml --output_dir runs/first
  xlfa train --model xlm-roberta-base --task xnli --fusion dlfa --output_dir runs/xnli-dlfa
  accelerate launch train_xlfa.py --model xlm-roberta-base --task xquad --output_dir runs/xquad
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of `train_xlfa.py` and `xlfa train`."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, training_args = parse_arguments(
        [ModelArguments, DataArguments, XLFATrainingArguments],
        argv,
        "xlfa train",
        DESCRIPTION,
        EXAMPLES,
        COMMON_TRAINING_FLAGS,
    )
    start_logging(logging.INFO if training_args.should_log else logging.WARNING)
    published = training_args.push_to_hub
    if published:
        check_publishing(training_args)
        # Trainer would commit every checkpoint; the run is published once, when it is scored.
        training_args.push_to_hub = False
    train(model_args, data_args, training_args, command=["xlfa", "train", *argv])
    if published:
        score_and_publish(data_args, training_args)


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: XLFATrainingArguments,
    command: list[str] | None = None,
) -> dict[str, float]:
    """Train one model and save it, with `run.json`, into `training_args.output_dir`; returns the validation scores.

    Args:
        command: the command line that the arguments come from, for `run.json`.

    Raises:
        XLFAError: for anything about the arguments or data that the user can mend, and for a full disk.
    """
    with naming_full_disk(Path(training_args.output_dir)):
        return _train(model_args, data_args, training_args, command)


def _train(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: XLFATrainingArguments,
    command: list[str] | None,
) -> dict[str, float]:
    check_trackers(training_args.report_to)
    adapted = model_args.peft is not None
    checkpoint = find_checkpoint(training_args, ADAPTER_SAFE_WEIGHTS_NAME if adapted else SAFE_WEIGHTS_NAME)
    task = get_task(data_args.task)
    selected_by = training_args.metric_for_best_model
    if selected_by is not None and selected_by.removeprefix("eval_") not in task.metrics:
        raise XLFAError(
            f"--metric_for_best_model {selected_by}: the task {task.name!r} is scored by {', '.join(task.metrics)}"
        )
    logger.info(describe_threads())

    rows = task.load_training(
        data_args.train_dataset, data_args.data_root, data_args.max_train_examples, training_args.seed
    )
    validation_rows = task.load_validation(data_args.train_dataset, data_args.data_root, data_args.max_eval_examples)
    aligned = (model_args.ot_weight or 0) > 0
    if data_args.ot_idf_file is not None and not (aligned and model_args.ot_marginals == "idf"):
        raise XLFAError(
            f"--ot_idf_file {data_args.ot_idf_file} is read only with --ot_weight > 0 and --ot_marginals idf"
        )
    if data_args.parallel_dataset is not None and not aligned:
        logger.warning("--parallel_dataset %s is not read: --ot_weight is 0", data_args.parallel_dataset)
    pair_texts = load_pair_texts(task, data_args, training_args.seed) if aligned else {}
    encoder = resolve_encoder(model_args.model)
    with naming_model(model_args.model):
        if model_args.trim_vocab:
            encoder = trim_vocabulary(encoder, vocabulary_texts(task, data_args, [rows, validation_rows], pair_texts))
        rate = model_args.new_pieces_learning_rate
        new_pieces = None if rate is None else (new_piece_rows(encoder), rate)
        # Not earlier: an encoder that is built for the cache, the first time, draws random numbers.
        set_seed(training_args.seed)
        model, tokenizer = build_model(task, model_args, data_args, encoder)
    check_length("max_length", data_args.max_length, model)
    if aligned:
        check_length("parallel_max_length", data_args.parallel_max_length, model)
    if checkpoint is not None:
        check_same_model(checkpoint, model.config)
    features = task.training_features(rows, tokenizer, data_args.max_length, data_args.doc_stride)
    logger.info("%d training examples, %d inputs; %d for validation", len(rows), len(features), len(validation_rows))

    pair_sampler = None
    if aligned:
        use_compiled_solver()
        pair_seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
        pair_sampler = PairSampler.from_texts(
            pair_texts, tokenizer, data_args.parallel_max_length, pair_seed, data_args.parallel_shuffled
        )
        if model.config.ot_marginals == "idf":
            fill_idf(model.base_model.ot_idf, pair_sampler, data_args.ot_idf_file)

    if adapted:
        model = add_adapters(model, model_args)
        if checkpoint is not None:
            check_same_adapters(checkpoint, model)
    validation_windows = task.windows(validation_rows, tokenizer, data_args.max_length, data_args.doc_stride)
    if model_args.cache_trunk:
        options = InferenceOptions.of(InferenceArguments(bf16=training_args.bf16), training_args.device)
        trunk = TrunkCache(model.base_model.to(training_args.device), tokenizer, options)
        trunk.fill(features, description="training examples")
        trunk.fill(validation_windows, description="validation")
        if pair_sampler is not None:
            trunk.fill(pair_sampler.sequences(), description="parallel text")
        model.base_model.stored_trunk = trunk
    trainer = XLFATrainer(
        model=model,
        args=training_args,
        train_dataset=features,
        data_collator=task.collator(tokenizer),
        processing_class=tokenizer,
        task=task,
        pair_sampler=pair_sampler,
        validation_rows=validation_rows,
        validation_windows=validation_windows,
        new_pieces=new_pieces,
        callbacks=early_stopping(training_args),
    )
    if checkpoint is not None:
        check_same_run(checkpoint, trainer.run_identity)
        trainer.add_callback(BestCheckpoint(checkpoint))
    if trainer.is_world_process_zero():
        record_start(model_args, data_args, training_args, command, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if adapted:
        trainer.merge_adapters()
    trainer.save_model()
    trainer.save_state()
    metrics = trainer.latest_validation() or trainer.evaluate()
    if trainer.is_world_process_zero():
        record_end(Path(training_args.output_dir), metrics)
        print(f"trained model in {training_args.output_dir}")
    return metrics


def check_publishing(training_args: XLFATrainingArguments) -> None:
    """Raise `XLFAError`, before the training, for what `--push_to_hub` lacks or does not do."""
    if training_args.hub_model_id is None:
        raise XLFAError("--push_to_hub needs the name of the repo: --hub_model_id org/name")
    defaults = {field.name: field.default for field in fields(XLFATrainingArguments)}
    for name in ("hub_strategy", "hub_always_push", "hub_revision"):
        if getattr(training_args, name) != defaults[name]:
            raise XLFAError(f"--{name} does not apply: the finished run is published, in one commit")
    check_names(training_args.hub_model_id, tag=None, create_pr=False)
    check_token()


def check_trackers(names: list[str]) -> None:
    """Raise `XLFAError` for a `--report_to` that transformers does not know, or whose package is not installed."""
    installed = get_available_reporting_integrations() if names else []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise XLFAError(f"--report_to {name}: there are {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name not in installed:
            raise XLFAError(f"--report_to {name}: its package is not installed: pip install {name}")


def early_stopping(training_args: XLFATrainingArguments) -> list[TrainerCallback]:
    """What ends the training when the English validation scores no longer rise, if that is asked for."""
    patience = training_args.early_stopping_patience
    if patience is None:
        return []
    return [EarlyStoppingCallback(patience, training_args.early_stopping_threshold)]


def score_and_publish(data_args: DataArguments, training_args: XLFATrainingArguments) -> None:
    """Score the trained model in every language of its task, and publish both."""
    scoring = EvaluationArguments(task=data_args.task, model=training_args.output_dir, data_root=data_args.data_root)
    print_scores(scoring, evaluate_model(scoring))
    if training_args.should_save:
        url = push(training_args.output_dir, training_args.hub_model_id, private=bool(training_args.hub_private_repo))
        print(f"published: {url}")


def load_pair_texts(task: Task, data_args: DataArguments, seed: int) -> dict[str, list[tuple[str, str]]]:
    """The parallel sentences that the arguments ask for.

    Raises:
        XLFAError: without `--parallel_dataset`.
    """
    if data_args.parallel_dataset is None:
        raise XLFAError("ot_weight > 0 needs parallel text: name it with --parallel_dataset")
    languages = data_args.parallel_languages or [code for code in task.test_configs if code != SOURCE_LANGUAGE]
    return load_parallel(
        data_args.parallel_dataset,
        languages,
        data_args.data_root,
        data_args.parallel_filter,
        data_args.parallel_pairs_per_language,
        seed,
    )


def use_compiled_solver() -> None:
    """Let the transport term use the compiled back end on the CPU, where numba is installed."""
    try:
        import xlfa.compiled_sinkhorn  # noqa: F401  (adds itself to the back ends)
    except ModuleNotFoundError:
        logger.info("transport solver: torch; on a CPU, `pip install xlfa[compiled]` makes it several times faster")


def fill_idf(table: torch.Tensor, pair_sampler: PairSampler, path: str | None) -> None:
    """Fill the model's table of piece weights from the file, or else from the parallel text."""
    if path is None:
        table.copy_(pair_sampler.inverse_document_frequencies(len(table)))
    else:
        table.copy_(read_piece_weights(path, pair_sampler.tokenizer, len(table)))


def vocabulary_texts(
    task: Task, data_args: DataArguments, rows: list[Dataset], pair_texts: dict[str, list[tuple[str, str]]]
) -> Iterator[str]:
    """All text that a model of the task reads: training, validation, parallel, and every language that is scored."""
    for part in rows:
        yield from task.texts(part)
    for pairs in pair_texts.values():
        for pair in pairs:
            yield from pair
    for language in task.check_languages(None, data_args.data_root):
        yield from task.texts(task.load_test(language, data_args.data_root))


def build_model(
    task: Task, model_args: ModelArguments, data_args: DataArguments, encoder: str
) -> tuple[XLFAPreTrainedModel, PreTrainedTokenizerBase]:
    """The task's head on the encoder, and the encoder's tokenizer.

    Raises:
        XLFAError, OSError, ValueError, ImportError: for an unknown encoder or a bad field.
    """
    fields = model_args.config_fields()
    fields |= {"input_length": data_args.max_length, "input_stride": data_args.doc_stride}
    if task.label_names:
        fields["id2label"] = dict(enumerate(task.label_names))
        fields["label2id"] = {name: number for number, name in enumerate(task.label_names)}
    if model_args.encoder_config is not None:
        fields["encoder_config"] = parse_encoder_config(model_args.encoder_config)
    tokenizer = load_tokenizer(encoder)
    model = task.model_class.from_encoder(encoder, **fields)
    if model_args.freeze_word_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    return model, tokenizer


def parse_encoder_config(text: str) -> dict[str, Any]:
    """A JSON object from the command line.

    Raises:
        XLFAError: if it is none.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise XLFAError(f"--encoder_config {text!r} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise XLFAError(f"--encoder_config {text!r} must be a JSON object of config fields")
    return fields


def run() -> None:
    """`main` with user errors as one line."""
    transformers.utils.logging.set_verbosity_warning()
    exit_with_message(main)
