"""Training: transformers' Trainer with parallel pairs in every step and the parts of the loss in the log."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME, SAFE_WEIGHTS_NAME

from modeling_xlfa import XLFAConfig
from modeling_xlfa.modeling_xlfa import XLFAPreTrainedModel
from xlfa.adapters import ADAPTER_FOLDER, add_adapters, check_same_adapters, plain_model
from xlfa.arguments import DataArguments, InferenceArguments, ModelArguments, XLFATrainingArguments, parse_arguments
from xlfa.backbones import resolve_encoder
from xlfa.environment import describe_threads, versions
from xlfa.errors import XLFAError, exit_with_message
from xlfa.evaluation import EvaluationArguments, evaluate_model, print_scores
from xlfa.files import write_text
from xlfa.inference import InferenceOptions
from xlfa.parallel import SOURCE_LANGUAGE, PairSampler, load_parallel, read_piece_weights
from xlfa.portable_tokenizer import make_portable
from xlfa.prediction import predict
from xlfa.publishing import RUN_FILE, check_names, check_token, push
from xlfa.tasks import Task, get_task
from xlfa.vocabulary import trim_vocabulary

logger = logging.getLogger(__name__)

DESCRIPTION = "Fine-tune an encoder with feature aggregation and optimal-transport alignment on an English task."


class EpochSeededSampler(Sampler):
    """A length-grouped order that is a function of seed and epoch.

    transformers draws it from the global generator: a run resumed in a later epoch would see another order than the
    unbroken one, and processes could see different ones.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """accelerate's data loader calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


class XLFATrainer(Trainer):
    """Trainer that adds parallel pairs to every batch, logs the parts of the loss and validates on English.

    Args:
        task: gives predictions and scores of the validation rows.
        pair_sampler: None without the alignment term.
        validation_rows: English examples, scored by `evaluate`.
        validation_windows: of these rows.
    """

    def __init__(
        self,
        *args: Any,
        task: Task,
        pair_sampler: PairSampler | None,
        validation_rows: Dataset,
        validation_windows: Dataset,
        **kwargs: Any,
    ):
        super().__init__(*args, eval_dataset=validation_rows, **kwargs)
        self.task = task
        self.pair_sampler = pair_sampler
        self.validation_rows, self.validation_windows = validation_rows, validation_windows
        self._part_sums: dict[str, torch.Tensor] = {}
        self._part_counts: dict[str, int] = {}

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of one optimizer step, each with as many parallel pairs as it has task examples.

        The pairs are positions of the step's draw, laid out so that the same global batch holds the same pairs at any
        number of processes.
        """
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.pair_sampler is not None:
            encoder = plain_model(self.accelerator.unwrap_model(self.model)).base_model
            encoder.ot_progress = self.state.global_step / max(1, self.state.max_steps - 1)
            processes, rank = self.accelerator.num_processes, self.accelerator.process_index
            for index, batch in enumerate(batches):
                size = len(batch["input_ids"])
                first = (index * processes + rank) * self.args.train_batch_size
                batch.update(self.pair_sampler.batch(self.state.global_step, first, size))
        return batches, count

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        return EpochSeededSampler(sampler, self.args.seed) if isinstance(sampler, LengthGroupedSampler) else sampler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self._add_part("task_loss", outputs.task_loss)
        if outputs.ot_loss is not None:
            self._add_part("ot_loss", outputs.ot_loss)
            for name, values in outputs.ot_statistics.items():
                self._add_part(f"ot_{name}", values.float())
        return (loss, outputs) if return_outputs else loss

    def _add_part(self, name: str, value: torch.Tensor) -> None:
        # One value a device where torch's DataParallel runs the model.
        self._part_sums[name] = self._part_sums.get(name, 0) + value.detach().float().mean()
        self._part_counts[name] = self._part_counts.get(name, 0) + 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the loss parts since the last line of the training log."""
        if "loss" in logs:
            for name, total in self._part_sums.items():
                mean = self.accelerator.reduce(total / self._part_counts[name], reduction="mean").item()
                logs[name] = mean
            if logs.get("ot_not_converged", 0) > 0:
                logger.warning(
                    "step %d: %.2g of the pairs since the last line of the log did not converge within %d sweeps (mean "
                    "marginal error %.2g): raise --ot_max_iter, --ot_tol or --ot_epsilon",
                    self.state.global_step,
                    logs["ot_not_converged"],
                    self.accelerator.unwrap_model(self.model).config.ot_max_iter,
                    logs["ot_marginal_error"],
                )
            self._part_sums, self._part_counts = {}, {}
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Scores of the English validation rows, by the code that scores every language."""
        rows = self.validation_rows
        predictions = predict(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            self.task,
            rows,
            self.task.example_ids(rows),
            self.validation_windows,
            InferenceOptions.of(InferenceArguments(bf16=self.args.bf16), self.args.device),
            description="validation",
        )
        scores = self.task.score(predictions, SOURCE_LANGUAGE)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items() if value is not None}
        metrics["epoch"] = self.state.epoch
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def latest_validation(self) -> dict[str, float] | None:
        """The validation scores of the present step, None if it was not validated or another checkpoint is loaded."""
        if self.args.load_best_model_at_end:
            return None
        entries = [entry for entry in self.state.log_history if entry["step"] == self.state.global_step]
        return next((entry for entry in entries if any(name.startswith("eval_") for name in entry)), None)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        # A pickle of the arguments, with local paths in it, that nothing reads: run.json holds them.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        make_portable(self.processing_class, folder)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel) and self.args.should_save:
            # PEFT's own files do not say what the adapters are of.
            model.config.save_pretrained(folder)

    def merge_adapters(self) -> None:
        """Save the adapters to their own folder, then merge them: the model goes on as a plain one."""
        self._save(str(Path(self.args.output_dir) / ADAPTER_FOLDER))
        self.model = self.accelerator.unwrap_model(self.model).merge_and_unload()


def main(argv: list[str] | None = None) -> None:
    """Entry point of `train_xlfa.py` and `xlfa train`."""
    model_args, data_args, training_args = parse_arguments(
        [ModelArguments, DataArguments, XLFATrainingArguments],
        sys.argv[1:] if argv is None else argv,
        "train_xlfa.py",
        DESCRIPTION,
    )
    logging.basicConfig(level=logging.INFO if training_args.should_log else logging.WARNING, format="%(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    published = training_args.push_to_hub
    if published:
        check_publishing(training_args)
        # Trainer would commit every checkpoint; the run is published once, when it is scored.
        training_args.push_to_hub = False
    train(model_args, data_args, training_args)
    if published:
        score_and_publish(data_args, training_args)


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: XLFATrainingArguments
) -> dict[str, float]:
    """Train one model and save it, with `run.json`, into `training_args.output_dir`; returns the validation scores.

    Raises:
        XLFAError: for anything about the arguments or data that the user can mend.
    """
    adapted = model_args.peft is not None
    checkpoint = find_checkpoint(training_args, ADAPTER_SAFE_WEIGHTS_NAME if adapted else SAFE_WEIGHTS_NAME)
    task = get_task(data_args.task)
    selected_by = training_args.metric_for_best_model
    if selected_by is not None and selected_by.removeprefix("eval_") not in task.metrics:
        raise XLFAError(
            f"--metric_for_best_model {selected_by}: the task {task.name!r} is scored by {', '.join(task.metrics)}"
        )
    logger.info(describe_threads())
    set_seed(training_args.seed)

    rows = task.load_training(
        data_args.train_dataset, data_args.data_root, data_args.max_train_examples, training_args.seed
    )
    validation_rows = task.load_validation(data_args.train_dataset, data_args.data_root, data_args.max_eval_examples)
    aligned = (model_args.ot_weight or 0) > 0
    if data_args.ot_idf_file is not None and not (aligned and model_args.ot_marginals == "idf"):
        raise XLFAError(
            f"--ot_idf_file {data_args.ot_idf_file} is read only with --ot_weight > 0 and --ot_marginals idf"
        )
    pair_texts = load_pair_texts(task, data_args, training_args.seed) if aligned else {}
    encoder = resolve_encoder(model_args.model)
    with naming_model(model_args.model):
        if model_args.trim_vocab:
            encoder = trim_vocabulary(encoder, vocabulary_texts(task, data_args, [rows, validation_rows], pair_texts))
        model, tokenizer = build_model(task, model_args, data_args, encoder)
    if checkpoint is not None:
        check_same_model(checkpoint, model.config)
    features = task.training_features(rows, tokenizer, data_args.max_length, data_args.doc_stride)
    logger.info("%d training examples, %d inputs; %d for validation", len(rows), len(features), len(validation_rows))

    pair_sampler = None
    if aligned:
        use_compiled_solver()
        pair_seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
        pair_sampler = PairSampler.from_texts(pair_texts, tokenizer, data_args.parallel_max_length, pair_seed)
        if model.config.ot_marginals == "idf":
            fill_idf(model.base_model.ot_idf, pair_sampler, data_args.ot_idf_file)

    if adapted:
        model = add_adapters(model, model_args)
        if checkpoint is not None:
            check_same_adapters(checkpoint, model)
    trainer = XLFATrainer(
        model=model,
        args=training_args,
        train_dataset=features,
        data_collator=task.collator(tokenizer),
        processing_class=tokenizer,
        task=task,
        pair_sampler=pair_sampler,
        validation_rows=validation_rows,
        validation_windows=task.windows(validation_rows, tokenizer, data_args.max_length, data_args.doc_stride),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if adapted:
        trainer.merge_adapters()
    trainer.save_model()
    trainer.save_state()
    metrics = trainer.latest_validation() or trainer.evaluate()
    if trainer.is_world_process_zero():
        write_run_file(Path(training_args.output_dir), model_args, data_args, training_args, metrics)
        print(f"trained model in {training_args.output_dir}")
    return metrics


def check_publishing(training_args: XLFATrainingArguments) -> None:
    """Raise `XLFAError`, before the training, for what `--push_to_hub` lacks or does not do."""
    if training_args.hub_model_id is None:
        raise XLFAError("--push_to_hub needs the name of the repo: --hub_model_id org/name")
    if training_args.hub_token is not None:
        raise XLFAError("--hub_token would be seen by others: log in with `hf auth login`, or set HF_TOKEN")
    defaults = {field.name: field.default for field in fields(XLFATrainingArguments)}
    for name in ("hub_strategy", "hub_always_push", "hub_revision"):
        if getattr(training_args, name) != defaults[name]:
            raise XLFAError(f"--{name} does not apply: the finished run is published, in one commit")
    check_names(training_args.hub_model_id, tag=None, create_pr=False)
    check_token()


def score_and_publish(data_args: DataArguments, training_args: XLFATrainingArguments) -> None:
    """Score the trained model in every language of its task, and publish both."""
    scoring = EvaluationArguments(task=data_args.task, model=training_args.output_dir, data_root=data_args.data_root)
    print_scores(scoring, evaluate_model(scoring))
    if training_args.should_save:
        url = push(training_args.output_dir, training_args.hub_model_id, private=bool(training_args.hub_private_repo))
        print(f"published: {url}")


def find_checkpoint(training_args: XLFATrainingArguments, weights_name: str) -> str | None:
    """The checkpoint to go on from, with its weights in a file `weights_name`; None for a new run.

    Raises:
        XLFAError: if the checkpoint asked for does not exist, or a new run would overwrite an older one.
    """
    wanted = training_args.resume_from_checkpoint
    folder = Path(training_args.output_dir)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if wanted is None or wanted.lower() == "false":
        if last is not None or (folder / RUN_FILE).exists():
            raise XLFAError(
                f"{folder} holds an earlier run: go on with --resume_from_checkpoint true, or name another --output_dir"
            )
        return None
    checkpoint = last if wanted.lower() == "true" else wanted
    if checkpoint is None:
        raise XLFAError(f"--resume_from_checkpoint true: there is no checkpoint in {folder}")
    needed = (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, CONFIG_NAME, weights_name)
    missing = [name for name in needed if not (Path(checkpoint) / name).is_file()]
    if missing:
        raise XLFAError(
            f"--resume_from_checkpoint {checkpoint}: the folder is not a training checkpoint, it lacks "
            + ", ".join(missing)
        )
    return checkpoint


def check_same_model(checkpoint: str, config: XLFAConfig) -> None:
    """Raise `XLFAError` if the checkpoint is of a model with other fields than `config`."""
    trained = XLFAConfig.from_pretrained(checkpoint)
    ours, theirs = config.to_dict(), trained.to_dict()
    own_fields = [name for name in ours if name.startswith(("fusion", "ot_", "classifier_", "input_"))]
    for name in (*own_fields, "id2label"):
        if ours[name] != theirs[name]:
            raise XLFAError(
                f"--resume_from_checkpoint {checkpoint}: it was trained with {name}={theirs[name]!r}, not "
                f"{ours[name]!r}: give the settings of that run, or start a new one in another --output_dir"
            )
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        ours_value, theirs_value = (getattr(each.text_config, name) for each in (config, trained))
        if ours_value != theirs_value:
            raise XLFAError(
                f"--resume_from_checkpoint {checkpoint}: its encoder has {name}={theirs_value!r}, this one "
                f"{ours_value!r}"
            )


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


@contextmanager
def naming_model(name: str) -> Iterator[None]:
    """Turn what transformers raises for a model that cannot be built into an `XLFAError` that names `--model`."""
    try:
        yield
    except XLFAError:
        raise
    except OSError as error:
        raise XLFAError(f"--model {name}: no such encoder on the Hub or as a folder ({error})") from None
    except (ValueError, ImportError) as error:
        raise XLFAError(f"--model {name}: {error}") from None


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
    tokenizer = AutoTokenizer.from_pretrained(encoder)
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


def write_run_file(
    folder: Path,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: XLFATrainingArguments,
    validation: dict[str, float],
) -> None:
    """`run.json`: how the model came about. For the run folder, not for publishing: it holds local paths."""
    run = {
        "schema_version": 1,
        "task": data_args.task,
        "validation": validation,
        "model_arguments": asdict(model_args),
        "data_arguments": asdict(data_args),
        "training_arguments": training_args.to_sanitized_dict(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_text(folder / RUN_FILE, json.dumps(run, indent=2, ensure_ascii=False, default=str) + "\n")


def run() -> None:
    """`main` with user errors as one line."""
    transformers.utils.logging.set_verbosity_warning()
    exit_with_message(main)
