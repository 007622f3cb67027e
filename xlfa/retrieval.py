"""Sentence retrieval: how often the nearest sentence of the other language is the translation, layer by layer.

The protocol of XTREME's Tatoeba task (Hu et al. 2020, arXiv 2003.11080): sentence vectors are means of token states,
neighbours are by cosine, the score is P@1. All layers come from one pass: a table over them costs what one layer does.
"""

import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from scipy.stats import binomtest
from tqdm.auto import tqdm
from transformers import AutoConfig, BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

import modeling_xlfa
from modeling_xlfa import XLFAModel
from xlfa.adapters import is_adapter, load_adapter
from xlfa.arguments import InferenceArguments, check_positive, option, parse_arguments
from xlfa.backbones import load_tokenizer, naming_model, resolve_encoder
from xlfa.cli import start_logging
from xlfa.data import load_rows
from xlfa.encoding import check_length, check_room
from xlfa.environment import describe_threads, versions
from xlfa.errors import XLFAError
from xlfa.files import writable_folder, write_text
from xlfa.inference import InferenceOptions, infer
from xlfa.languages import FAMILIES
from xlfa.statistics import CONFIDENCE, Clusters, Counts, Table, bootstrap, number_of_draws

logger = logging.getLogger(__name__)

DATASET, SPLIT, COLUMNS = "mteb/tatoeba-bitext-mining", "test", ("sentence1", "sentence2")
# ISO 639-1 code → configuration; `sentence2` is English.
CONFIGS = {
    code: f"{name}-eng"
    for code, name in (
        pair.split(":")
        for pair in "ar:ara bg:bul de:deu el:ell es:spa fr:fra hi:hin ro:ron ru:rus sw:swh th:tha tr:tur ur:urd vi:vie "
        "zh:cmn".split()
    )
}
DIRECTIONS = ("to_english", "from_english")
# Layer → sentences x directions: whether the nearest sentence is the translation.
Hits = dict[str, np.ndarray]
AVERAGE = "average"
FUSED = "fused"
RETRIEVAL_FILE = "retrieval.json"
# Version 1 had no intervals of means, and no families.
SCHEMA_VERSION = 2
DESCRIPTION = "Sentence retrieval (Tatoeba) by the mean-pooled states of every layer and of the fused ones."
EXAMPLES = """examples:
  xlfa retrieval --model runs/xnli-dlfa --languages de ru
  xlfa retrieval --model packaged:multilingual-e5-small --output_dir runs/retrieval
"""


@dataclass(kw_only=True)
class RetrievalArguments(InferenceArguments):
    """What is embedded and where the scores go."""

    model: str = field(
        metadata={
            "help": "A trained XLFA model, or an encoder as for training: a folder, a Hub id or a packaged: name."
        }
    )
    languages: list[str] | None = option(f"ISO 639-1 codes; by default {' '.join(CONFIGS)}.")
    data_root: str | None = option("Folder with data sets as <org>/<name> instead of the Hub.")
    output_dir: str | None = option(f"Where to write {RETRIEVAL_FILE}; by default <model>/scores/retrieval.")
    max_examples: int | None = option("Use the first that many pairs of each language.")
    max_length: int = option("Longest sentence in tokens; longer ones are cut and counted.", 128)

    def __post_init__(self):
        super().__post_init__()
        check_positive("max_examples", self.max_examples)
        check_positive("max_length", self.max_length)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `xlfa retrieval`."""
    (arguments,) = parse_arguments(
        [RetrievalArguments], sys.argv[1:] if argv is None else argv, "xlfa retrieval", DESCRIPTION, EXAMPLES
    )
    start_logging(logging.INFO)
    folder = scores_folder(arguments.model, arguments.output_dir, "retrieval")
    scores = score_retrieval(arguments)
    write_text(folder / RETRIEVAL_FILE, json.dumps(scores, indent=1) + "\n")
    print(format_table(scores))
    print(f"written to {folder / RETRIEVAL_FILE}")


def scores_folder(model: str, output_dir: str | None, name: str) -> Path:
    """`--output_dir`; else `scores/<name>` in the model's folder. It is there afterwards.

    Raises:
        XLFAError: if the model is no folder and none is given, or the folder cannot be written to.
    """
    if output_dir is None and not os.path.isdir(model):
        raise XLFAError(f"--model {model} is no folder to write into: name one with --output_dir")
    return writable_folder(output_dir or Path(model) / "scores" / name)


def score_retrieval(arguments: RetrievalArguments) -> dict[str, Any]:
    """P@1 both ways for every language and layer, with 95 % intervals; the content of `retrieval.json`.

    Raises:
        XLFAError: for an unknown language, model or data set.
    """
    languages = arguments.languages or list(CONFIGS)
    unknown = [code for code in languages if code not in CONFIGS]
    if unknown:
        raise XLFAError(f"--languages {unknown[0]}: xlfa retrieval knows {' '.join(CONFIGS)}")
    logger.info(describe_threads())
    model, tokenizer = load_states_model(arguments.model)
    check_length("max_length", arguments.max_length, model)
    options = InferenceOptions.of(arguments, model.device)
    hits = {}
    for language in tqdm(languages, desc="languages"):
        rows = load_pairs(language, arguments.data_root)
        rows = rows.select(range(min(len(rows), arguments.max_examples or len(rows))))
        sides = [
            embed_sentences(model, tokenizer, rows[column][:], options, arguments.max_length, description=language)
            for column in COLUMNS
        ]
        hits[language] = hits_by_layer(*sides)
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset": DATASET,
        "split": SPLIT,
        "model_type": model.config.text_config.model_type,
        "fusion": model.config.fusion,
        **summarise_hits(hits),
        "settings": {"max_examples": arguments.max_examples, "max_length": arguments.max_length, **vars(options)},
        "versions": versions(),
    }


def load_pairs(language: str, data_root: str | None) -> Dataset:
    """Sentences of a language of `CONFIGS` and their English translations, the columns of `COLUMNS`."""
    return load_rows(DATASET, CONFIGS[language], SPLIT, data_root, COLUMNS)


def load_states_model(name: str) -> tuple[XLFAModel, PreTrainedTokenizerBase]:
    """The encoder part of a trained XLFA model with its fusion, or a plain encoder, and its tokenizer.

    Adapters are merged into the encoder that they name.

    Raises:
        XLFAError: where there is no such model, or none of its tokenizer.
    """
    source = resolve_encoder(name)
    with naming_model(name):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type != "xlfa":
            model = XLFAModel.from_encoder(source, fusion="none")
        elif is_adapter(source):
            # transformers would load the encoder that the adapters name, without them.
            head = getattr(modeling_xlfa, config.architectures[0])
            model = load_adapter(head, source).merge_and_unload().base_model
        else:
            model = XLFAModel.from_pretrained(source, use_safetensors=True)
        return model.to(PartialState().device), load_tokenizer(source)


def embed_sentences(
    model: XLFAModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[str],
    options: InferenceOptions,
    max_length: int = 128,
    only: str | None = None,
    description: str = "",
) -> dict[str, torch.Tensor]:
    """Mean-pooled states, sentences x E, float32 and of unit length, by layer ("0" to "N", and "fused" where it is).

    Args:
        only: a layer's name; no other is kept.
        description: stands before the progress bar and in the warning about long sentences.

    Raises:
        XLFAError: for a `max_length` that the special tokens fill.
    """
    check_room(max_length, tokenizer)
    encoded = tokenizer(sentences, truncation=True, max_length=max_length, return_length=True)
    cut = sum(length == max_length for length in encoded["length"])
    if cut:
        logger.warning("%s: %d sentences reach --max_length %d and may be cut", description, cut, max_length)
    layers = [str(layer) for layer in range(model.config.num_hidden_layers + 1)]
    names = [only] if only is not None else layers if model.fusion is None else [*layers, FUSED]

    def pool(outputs: ModelOutput, inputs: BatchEncoding, columns: dict) -> torch.Tensor:
        """B x layers x E."""
        weights = inputs["attention_mask"].unsqueeze(-1).float()
        states = [outputs.last_hidden_state if name == FUSED else outputs.hidden_states[int(name)] for name in names]
        means = [(tensor.float() * weights).sum(1) / weights.sum(1) for tensor in states]
        return torch.nn.functional.normalize(torch.stack(means, dim=1), dim=-1)

    inputs = Dataset.from_dict(dict(encoded))
    kept = names != [FUSED]
    vectors = infer(model, tokenizer, inputs, pool, options, description=description, output_hidden_states=kept)
    return dict(zip(names, torch.from_numpy(np.stack(vectors, axis=1))))


def hits_by_layer(foreign: dict[str, torch.Tensor], english: dict[str, torch.Tensor]) -> Hits:
    """Of the vectors by layer of a language's sentences and of their translations."""
    hits = {}
    for name in foreign:
        similarity = foreign[name] @ english[name].T
        wanted = torch.arange(len(similarity))
        hits[name] = torch.stack([similarity.argmax(axis) == wanted for axis in (1, 0)], dim=-1).numpy()
    return hits


def summarise_hits(hits: dict[str, Hits]) -> dict[str, Any]:
    """P@1 in per cent by layer: `languages`, `average`, `families` and `bootstrap` of `retrieval.json`.

    `mean` is that of both directions, and its interval is by bootstrap over the sentences, drawn for each language
    apart: a drawn sentence brings its hits both ways and in all layers. Those of a direction are Wilson's.
    """
    sizes = {code: len(next(iter(own.values()))) for code, own in hits.items()}

    def means_of_directions(sums: Counts) -> Table:
        languages = {
            code: {layer: {"mean": 100 * total[..., 0] / sizes[code]} for layer, total in own.items()}
            for code, own in sums.items()
        }
        return with_means(languages)

    rows = with_means({code: precision_by_layer(own) for code, own in hits.items()})
    counts: Counts = {
        code: {layer: found.mean(1, keepdims=True) for layer, found in own.items()} for code, own in hits.items()
    }
    clusters: Clusters = {code: list(range(size)) for code, size in sizes.items()}
    _, intervals, _ = bootstrap(means_of_directions, counts, clusters)
    for name, layers in rows.items():
        for layer, scores in layers.items():
            scores["mean_interval"] = intervals[name][layer]["mean"]
            if name in hits:
                scores |= wilson_intervals(hits[name][layer])
    return {
        "languages": {code: {"pairs": size, "layers": rows[code]} for code, size in sizes.items()},
        AVERAGE: rows[AVERAGE],
        "families": {name: layers for name, layers in rows.items() if name not in hits and name != AVERAGE},
        "bootstrap": {"confidence": CONFIDENCE, "draws": number_of_draws(clusters)},
    }


def precision_by_layer(hits: Hits) -> dict[str, dict[str, float]]:
    """P@1 in per cent by layer: `to_english`, `from_english`, and their `mean`."""
    scores = {}
    for layer, found in hits.items():
        both = (100 * found.sum(0) / len(found)).tolist()
        scores[layer] = {**dict(zip(DIRECTIONS, both)), "mean": sum(both) / len(both)}
    return scores


def wilson_intervals(found: np.ndarray) -> dict[str, list[float]]:
    """Of P@1 in per cent in each direction, at `CONFIDENCE`; `found` is a layer of `Hits`."""
    intervals = {}
    for direction, hits in zip(DIRECTIONS, found.sum(0).tolist()):
        interval = binomtest(hits, len(found)).proportion_ci(CONFIDENCE, method="wilson")
        intervals[f"{direction}_interval"] = [100 * interval.low, 100 * interval.high]
    return intervals


def with_means(languages: Table) -> Table:
    """Language → layer → name → score, then the same of their `average` and of the mean of each language family."""
    families: dict[str, list[str]] = {}
    for code in languages:
        families.setdefault(FAMILIES[code], []).append(code)
    groups = {AVERAGE: list(languages), **dict(sorted(families.items()))}
    return languages | {name: average_by_layer([languages[code] for code in codes]) for name, codes in groups.items()}


def average_by_layer(tables: list[Table]) -> Table:
    """Mean of tables of layer → name → score."""
    return {
        layer: {name: sum(table[layer][name] for table in tables) / len(tables) for name in scores}
        for layer, scores in tables[0].items()
    }


def format_table(scores: dict[str, Any]) -> str:
    """Mean P@1 of both directions, a line a layer and a column a language, and the average with its interval."""
    languages, average = scores["languages"], scores["average"]
    lines = [f"{scores['dataset']}: P@1, mean of both directions, by layer"]
    lines.append(" ".join(f"{name:>7}" for name in ("layer", *languages, "average")))
    for layer in average:
        values = [each["layers"][layer]["mean"] for each in languages.values()] + [average[layer]["mean"]]
        cells = " ".join([f"{layer:>7}", *(f"{value:7.1f}" for value in values)])
        lines.append(cells + format_interval(average[layer]["mean_interval"]))
    best = max(average, key=lambda layer: average[layer]["mean"])
    lines.append(f"best on average: layer {best}, {average[best]['mean']:.1f}")
    lines.append(f"[low, high]: {scores['bootstrap']['confidence']:.0%} interval by bootstrap over sentences")
    return "\n".join(lines)


def format_interval(interval: list[float] | None) -> str:
    """` [low, high]`, behind a score; nothing where there is none."""
    return "" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]"
