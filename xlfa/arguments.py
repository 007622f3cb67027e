"""Command lines: flags as dataclass fields, with a YAML file and a task's recipe as lower layers."""

import argparse
import copy
import dataclasses
import json
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from modeling_xlfa.configuration_xlfa import CHOICES
from xlfa.environment import has_fast_bf16
from xlfa.errors import XLFAError
from xlfa.tasks import TASKS, get_task

# Columns of descriptions in `--help`, and where the explanations of flags begin.
HELP_WIDTH = 100
HELP_INDENT = 33
BOOLEAN = "tag:yaml.org,2002:bool"
# What most trainings set; --help_all has the other flags.
COMMON_TRAINING_FLAGS = (
    *("model", "task", "output_dir", "data_root", "max_train_examples", "max_length"),
    *("fusion", "fusion_layer", "fusion_gate", "fusion_norm"),
    *("ot_weight", "ot_epsilon", "parallel_dataset", "freeze_layers", "trim_vocab", "peft"),
    *("learning_rate", "per_device_train_batch_size", "num_train_epochs", "max_steps", "bf16", "seed"),
    *("eval_strategy", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id"),
)
# Kinds of values in `--help`; TEXT for all others.
METAVARS = {int: "INT", float: "FLOAT", string_to_bool: "BOOL"}


def choice(name: str, help: str) -> Any:
    return field(default=None, metadata={"help": help, "choices": list(CHOICES[name])})


def option(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


def check_positive(name: str, value: int | None) -> None:
    """Raise `ValueError` for a number, where one was given, below 1."""
    if value is not None and value < 1:
        raise ValueError(f"--{name} {value}: at least 1")


@dataclass
class ModelArguments:
    """The encoder and every field of `XLFAConfig`; a field that is not given has the config's default."""

    model: str = field(
        metadata={"help": "Encoder to start from: a Hub id, a folder, or packaged:multilingual-e5-small."}
    )
    fusion: str | None = choice(
        "fusion", "dlfa (default), aff: a lower layer and the last one; scalar_mix: all; none: the last alone."
    )
    fusion_layer: str | None = option("Lower layer, 1..N-1 (default: at two thirds of the depth), or learned.")
    fusion_gate: str | None = choice("fusion_gate", "Of dlfa. literal: as published; sigmoid: a gate in (0, 1).")
    fusion_gate_bias: float | None = option(
        "Of dlfa and aff: where a trained bias of the gate starts, such as -6 for the plain last layer; 0: none."
    )
    fusion_reduction: int | None = option("Bottleneck of the gate: hidden size / r channels (4).")
    fusion_norm: str | None = choice("fusion_norm", "Normalisation inside the gate; batch as published.")
    fusion_layer_norm: bool | None = option("A LayerNorm on each fused layer.")
    ot_weight: float | None = option("Weight of the optimal-transport term; 0 (default) switches it off.")
    ot_epsilon: float | None = option("Entropic regularisation in units of --ot_epsilon_scale (0.1).")
    ot_epsilon_note: str | None = option("How it was chosen, in a sentence for the model card.")
    ot_solver: str | None = choice("ot_solver", "sinkhorn, or a limit of epsilon: exact (0), product (infinity).")
    ot_epsilon_scale: str | None = choice("ot_epsilon_scale", "Unit of epsilon (centered_std).")
    ot_cost: str | None = choice("ot_cost", "Cost between token states (cosine).")
    ot_layer: str | None = option("States that are aligned: fused (default) or a layer index 0..N.")
    ot_tau: float | None = option("Strength of soft marginals in units of --ot_epsilon_scale; hard without it.")
    ot_debiased: bool | None = option("The Sinkhorn divergence instead of the plain transport value.")
    ot_marginals: str | None = choice("ot_marginals", "Weights of a sentence's tokens (uniform).")
    ot_center: bool | None = option("Subtract each side's mean state over the batch before the cost.")
    ot_epsilon_start: float | None = option("Epsilon at the start of training; decays to --ot_epsilon.")
    ot_max_iter: int | None = option("Most Sinkhorn sweeps for a pair (5000).")
    ot_tol: float | None = option("Marginal L1 error at which a pair has converged (0.001).")
    classifier_dropout: float | None = option("Dropout in front of the head.")
    classifier_pooling: str | None = choice("classifier_pooling", "Sentence vector for sequence classification.")
    encoder_config: str | None = option(
        'Fields of the encoder\'s own config as JSON, such as {"attention_probs_dropout_prob": 0.0}.'
    )
    attn_implementation: str | None = option("Attention of the encoder: sdpa, eager, flash_attention_2, ….")
    freeze_word_embeddings: bool = option("Do not train the word embeddings.", False)
    freeze_layers: int | None = option("Train only the encoder's layers above this number; 0 (default): all of it.")
    cache_trunk: bool = option(
        "With --freeze_layers: store the frozen layers' states on disk once, and start every pass from them.", False
    )
    trim_vocab: bool = option("Keep only the vocabulary of the task's training, parallel and scored texts.", False)
    new_pieces_learning_rate: float | None = option(
        "Learning rate of the embeddings that `xlfa vocab augment` added; by default --learning_rate."
    )
    peft: str | None = field(
        default=None,
        metadata={
            "help": "lora: train adapters of the encoder, fusion and head in full; the run folder gets the merged "
            "model and adapter/. Wants a larger --learning_rate, such as 3e-4.",
            "choices": ["lora"],
        },
    )
    lora_r: int | None = option("Rank of the adapters (8).")
    lora_alpha: int | None = option("Their scale: what they add is multiplied by alpha / r (16).")
    lora_dropout: float | None = option("Dropout in front of the adapters (0.1).")
    lora_target_modules: list[str] | None = option(
        "Names of the encoder's linear layers that get adapters, by default those of PEFT's table (query and value)."
    )

    def __post_init__(self):
        rate = self.new_pieces_learning_rate
        if rate is not None:
            if rate <= 0:
                raise ValueError(f"--new_pieces_learning_rate {rate}: above 0")
            if self.peft is not None or self.freeze_word_embeddings or self.freeze_layers:
                raise ValueError(
                    f"--new_pieces_learning_rate {rate}: word embeddings are not trained with --peft, "
                    "--freeze_word_embeddings or --freeze_layers: leave one of the two out"
                )
        if self.cache_trunk and not self.freeze_layers:
            raise ValueError("--cache_trunk stores the states of frozen layers: it needs --freeze_layers")
        if self.freeze_layers and self.peft is not None:
            raise ValueError(f"--freeze_layers {self.freeze_layers} does not go with --peft: all layers have adapters")
        given = [name for name, value in vars(self).items() if name.startswith("lora_") and value is not None]
        if given and self.peft is None:
            raise ValueError(f"--{given[0]} applies only with --peft lora")
        for name in ("lora_r", "lora_alpha"):
            check_positive(name, getattr(self, name))
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout}: a number in [0, 1)")

    def config_fields(self) -> dict[str, Any]:
        """The `XLFAConfig` fields that were given."""
        own = {"model", "encoder_config", "freeze_word_embeddings", "cache_trunk", "trim_vocab", "peft"}
        own |= {"new_pieces_learning_rate", "ot_epsilon_note"}
        own |= {name for name in vars(self) if name.startswith("lora_")}
        given = {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None and name not in own
        }
        for name in ("fusion_layer", "ot_layer"):
            if str(given.get(name, "")).isdigit():
                given[name] = int(given[name])
        return given


@dataclass
class DataArguments:
    """What is trained on."""

    task: str = field(metadata={"help": "Task to train.", "choices": TASKS})
    data_root: str | None = option(
        "Folder with data sets as <org>/<name> instead of the Hub, or 'sample': embedded texts."
    )
    train_dataset: str | None = option("Training set instead of the task's own; same columns.")
    max_train_examples: int | None = option("Train on a seeded sample of that many examples.")
    max_eval_examples: int | None = option("Validate on a seeded sample of at most that many English examples.")
    max_length: int | None = option("Longest input in tokens, by default XTREME's.")
    doc_stride: int | None = option("Tokens that neighbouring windows of a context share (QA).")
    parallel_dataset: str | None = option("Data set with a `translation` column; needed where ot_weight > 0.")
    parallel_languages: list[str] | None = option("Languages of the parallel text, by default the task's.")
    parallel_filter: list[str] | None = option("column=value; only pairs for which all filters hold.")
    parallel_pairs_per_language: int | None = option("Use a seeded sample of that many pairs a language.")
    parallel_max_length: int = option("Pairs with a longer side, in tokens, are left out.", 128)
    parallel_shuffled: bool = option(
        "Pair each sentence with another one's translation: a control for what the alignment of true pairs does.", False
    )
    ot_idf_file: str | None = option(
        "JSON object {piece: weight} for --ot_marginals idf; by default counted on the parallel text."
    )

    def __post_init__(self):
        for name in ("max_train_examples", "max_eval_examples", "parallel_pairs_per_language", "parallel_max_length"):
            check_positive(name, getattr(self, name))


@dataclass(kw_only=True)
class InferenceArguments:
    """How a model is run over the inputs."""

    max_tokens_per_batch: int | None = option(
        "Tokens a batch, padding included (2048 on a CPU, 32768 on an accelerator); lower it where memory runs out."
    )
    bf16: bool | None = option("Matrix products in bfloat16; by default where the machine has them in hardware.")

    def __post_init__(self):
        check_positive("max_tokens_per_batch", self.max_tokens_per_batch)


@dataclass
class XLFATrainingArguments(TrainingArguments):
    """transformers' own arguments with other defaults: validation and a checkpoint after every epoch."""

    learning_rate: float = option("Highest learning rate, by default XTREME's for the task.", 5e-5)
    per_device_train_batch_size: int = option("Examples a step and device, by default XTREME's for the task.", 8)
    num_train_epochs: float = option("Passes over the training set, by default XTREME's for the task.", 3.0)
    max_steps: int = option("Optimizer steps, instead of --num_train_epochs where it is above 0.", -1)
    push_to_hub: bool = option("Publish the run with its scores and card when it is done; needs --hub_model_id.", False)
    resume_from_checkpoint: str | None = option("true: go on from the newest checkpoint; or a checkpoint's folder.")
    hub_model_id: str | None = option("Hub repository to publish to, such as org/name.")
    eval_strategy: str = option("When to score the English validation split: no, steps, epoch.", "epoch")
    save_strategy: str = option("When to save a checkpoint: no, steps, epoch, best.", "epoch")
    save_total_limit: int | None = option("Checkpoints that are kept.", 2)
    per_device_eval_batch_size: int = option("Not used: the validation is batched by tokens, as all scoring is.", 8)
    early_stopping_patience: int | None = option(
        "End after that many validations in a row without a better score; with --load_best_model_at_end."
    )
    early_stopping_threshold: float = option("With it, a score is better from that much more than the best one.", 0.0)
    logging_steps: float = option("Steps between two lines of the log.", 50)
    logging_nan_inf_filter: bool = option("Not used: a loss that is not finite ends the training.", False)
    ddp_find_unused_parameters: bool | None = option("Look for weights without gradient: there are none.", False)
    report_to: None | str | list[str] = option("Trackers: tensorboard, trackio, wandb, …", "none")
    max_tokens_per_batch: int | None = option(
        "Run a batch in parts of examples, and of pairs, of similar length, with at most that many tokens, padding "
        "included (2048 on a CPU; whole elsewhere): less padding and memory at the same loss. What batch norm or "
        "--ot_center sees stays whole."
    )

    bf16: bool | None = option(
        "Matrix products in bfloat16; by default on a CPU that has them in hardware, on a GPU only where it is told."
    )
    ot_gradient_steps: int | None = option(
        "Log every so many steps how large the transport term's gradient is beside the task's; costs one more pass."
    )

    def __post_init__(self):
        # transformers refuses --bf16 on a machine without an accelerator unless it is told that there is none.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = self.use_cpu and not self.fp16 and has_fast_bf16(torch.device("cpu"))
        super().__post_init__()
        for name in ("max_tokens_per_batch", "ot_gradient_steps"):
            check_positive(name, getattr(self, name))
        if self.label_smoothing_factor:
            raise ValueError("--label_smoothing_factor does not apply: the heads compute their own losses")
        if self.auto_find_batch_size:
            raise ValueError(
                "--auto_find_batch_size does not apply: --max_tokens_per_batch bounds the memory, whatever the batch"
            )
        for name in ("bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "batch_eval_metrics"):
            if getattr(self, name):
                raise ValueError(f"--{name} does not apply: validation is scored as every language is")
        if self.eval_accumulation_steps is not None:
            raise ValueError("--eval_accumulation_steps does not apply: validation is scored as every language is")
        if self.logging_nan_inf_filter:
            raise ValueError("--logging_nan_inf_filter does not apply: a loss that is not finite ends the training")
        if self.save_only_model:
            raise ValueError("--save_only_model does not apply: a run could not go on from such a checkpoint")
        if self.hub_token is not None:
            raise ValueError("--hub_token would be seen by others: log in with `hf auth login`, or set HF_TOKEN")
        self._check_early_stopping()

    def _check_early_stopping(self) -> None:
        patience, threshold = self.early_stopping_patience, self.early_stopping_threshold
        if threshold < 0:
            raise ValueError(f"--early_stopping_threshold {threshold}: at least 0")
        if patience is None:
            if threshold > 0:
                raise ValueError(f"--early_stopping_threshold {threshold} applies only with --early_stopping_patience")
            return
        check_positive("early_stopping_patience", patience)
        if not self.load_best_model_at_end:
            raise ValueError(
                f"--early_stopping_patience {patience} needs --load_best_model_at_end true (and so the same "
                "--eval_strategy and --save_strategy): the last model is not the best one then"
            )
        # A resumed run must count on where the interrupted one was.
        self.restore_callback_states_from_checkpoint = True


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows examples line by line, and a flag in one spelling: `--max-length` is taken too, but fills half the help."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=HELP_INDENT)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
        return super()._format_action_invocation(shown)


class _Parser(HfArgumentParser):
    """A parser whose help fits a screen, and which reports what is wrong without the usage lines.

    Args:
        types: dataclasses; their fields are the flags.
        program, description, examples: of the help.
        common: names of the flags that `--help` shows; all others are left to `--help_all`. All of them if empty.
        complete: show them all.
    """

    def __init__(
        self, types: list[type], program: str, description: str, examples: str, common: Sequence[str], complete: bool
    ):
        self._shown = () if complete else common
        self.help_flag = "--help_all" if common else "--help"
        super().__init__(
            types,
            prog=program,
            usage="%(prog)s [FILE.yaml] [--flag value …]",
            description=textwrap.fill(description, HELP_WIDTH),
            epilog=examples,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        if common:
            self.add_argument("--help_all", action="help", help="Show all flags, transformers' own too, and exit.")

    def add_argument(self, *flags: str, **settings: Any) -> argparse.Action:
        """As `argparse` has it; the help names the kind of value, and a default where there is one to speak of."""
        name = flags[-1].lstrip("-").replace("-", "_")
        explained, default = settings.get("help") or "", settings.get("default")
        if self._shown and name not in (*self._shown, "help", "help_all"):
            settings["help"] = argparse.SUPPRESS
        elif settings.get("required"):
            settings["help"] = f"{explained} Needed."
        elif "type" in settings and default is not None and default is not False and "default" not in explained:
            settings["help"] = f"{explained} (default: %(default)s)"
        if "type" in settings and "choices" not in settings:
            settings["metavar"] = METAVARS.get(settings["type"], "TEXT")
        return super().add_argument(*flags, **settings)

    def error(self, message: str) -> NoReturn:
        raise XLFAError(f"{message} ({self.prog} {self.help_flag} lists all arguments)")


def parse_arguments(
    types: list[type],
    argv: list[str],
    program: str,
    description: str,
    examples: str = "",
    common: Sequence[str] = (),
) -> tuple:
    """Instances of the dataclasses `types` from a command line that may begin with a YAML file.

    Later layers win: XTREME's recipe of the task, the YAML file, the flags.

    Args:
        types: their fields are the flags.
        argv: the command line.
        program, description, examples: of `--help`.
        common: names of the flags that `--help` shows; there is a `--help_all` then. By default all of them.

    Raises:
        XLFAError: for a file that is no mapping, an unknown flag or key, or a value that a dataclass refuses.
    """
    argv = list(argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = yaml_flags(Path(argv[0])) + argv[1:]
    parser = _Parser(types, program, description, examples, common, complete="--help_all" in argv)
    if XLFATrainingArguments in types:
        argv = task_flags(argv) + argv
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError) as error:
        raise XLFAError(str(error)) from None
    if unknown:
        raise XLFAError(f"unknown argument {' '.join(unknown)} ({program} {parser.help_flag} lists all arguments)")
    return tuple(instances)


def yaml_flags(path: Path) -> list[str]:
    """The mapping in a YAML file as flags; see `mapping_flags`."""
    return mapping_flags(read_mapping(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        XLFAError: for a file that cannot be read, or holds something else.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except FileNotFoundError:
        raise XLFAError(f"no configuration file {path}") from None
    except OSError as error:
        raise XLFAError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise XLFAError(f"{path} is not UTF-8: {error}") from None
    except yaml.YAMLError as error:
        raise XLFAError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise XLFAError(f"{path} must hold a mapping of names to values")
    return content


class StrictLoader(yaml.SafeLoader):
    """YAML whose `no` is text, such as the language or `eval_strategy`, as in YAML 1.2, and no key is given twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOLEAN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver(BOOLEAN, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))


def mapping_flags(content: dict[str, Any]) -> list[str]:
    """A mapping as flags: `--key value`, lists as several values, mappings as JSON, null left out, ~ for the home."""
    flags = []
    for key, value in content.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        flags += [f"--{key}", *(json.dumps(item) if isinstance(item, dict) else _text(item) for item in values)]
    return flags


def _text(value: Any) -> str:
    # What a shell does for flags.
    return os.path.expanduser(value) if str(value).startswith("~/") else str(value)


def task_flags(argv: list[str]) -> list[str]:
    """XTREME's recipe for the task that the command line names."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--task")
    name = finder.parse_known_args(argv)[0].task
    if name is None:
        return []
    defaults = get_task(name).defaults
    return [
        *("--learning_rate", str(defaults.learning_rate)),
        *("--per_device_train_batch_size", str(defaults.batch_size)),
        *("--num_train_epochs", str(defaults.epochs)),
        *("--max_length", str(defaults.max_length)),
        *("--doc_stride", str(defaults.doc_stride)),
        *("--metric_for_best_model", get_task(name).metrics[0]),
    ]
