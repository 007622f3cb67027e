"""Cross-lingual consistency (RankC): do two languages rank the candidate answers of a question alike?

Qi, Fernández, Bisazza 2023 (arXiv 2310.10378). For query i with N candidates, ranked by a score in languages l and l':

    RankC(l, l') = mean_i sum_j w_j · |top_j(l) ∩ top_j(l')| / j,    w = softmax(N, N - 1, …, 1)

Candidates are matched by their index across languages. Whether the answers are right does not enter.
"""

import functools
import itertools
import json
import logging
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from scipy.special import softmax
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForMaskedLM, BatchEncoding
from transformers.utils import ModelOutput

from modeling_xlfa.configuration_xlfa import check_weights_file
from xlfa.arguments import InferenceArguments, check_positive, option, parse_arguments
from xlfa.backbones import load_tokenizer, naming_model, resolve_encoder
from xlfa.cli import start_logging
from xlfa.data import load_rows
from xlfa.encoding import check_length
from xlfa.environment import describe_threads, versions
from xlfa.errors import XLFAError
from xlfa.files import write_text
from xlfa.inference import InferenceOptions, infer
from xlfa.retrieval import FUSED, embed_sentences, format_interval, load_states_model, scores_folder
from xlfa.statistics import CONFIDENCE, Clusters, Counts, Table, bootstrap, number_of_draws
from xlfa.tasks.token_classification import marks_spaces

logger = logging.getLogger(__name__)

SPLIT, COLUMNS = "test", ("prompt", "candidates")
LANGUAGES = "ar ca el en es fa fr he hu ja ko nl ru tr uk vi zh".split()
BLANK = "<mask>"
RANKC_FILE = "rankc.json"
# Version 1 had no intervals, and no means of languages.
SCHEMA_VERSION = 2
DESCRIPTION = "RankC: consistency of the ranking of candidate answers between languages (BMLAMA-17's layout)."
EXAMPLES = """examples:
  xlfa rankc --model runs/xnli-dlfa --dataset local/bmlama17 --data_root DATA
"""


@dataclass(kw_only=True)
class ConsistencyArguments(InferenceArguments):
    """What is ranked, by what, and where the matrix goes."""

    model: str = field(
        metadata={
            "help": "A trained XLFA model, or an encoder as for training: a folder, a Hub id or a packaged: name."
        }
    )
    dataset: str = field(
        metadata={
            "help": "Data set with a configuration a language, in each row by row the same queries: `prompt` with one "
            "<mask>, and `candidates`."
        }
    )
    scoring: str = field(
        default="cosine",
        metadata={
            "help": "cosine: of the filled prompt and the prompt with its blank left in; masked_lm: the candidate's "
            "mean log probability in the blank, by an encoder that has such a head.",
            "choices": ["cosine", "masked_lm"],
        },
    )
    layer: str = option("States for cosine: fused (the last layer where there is no fusion) or a layer index.", FUSED)
    languages: list[str] | None = option("Configurations of the data set; by default the 17 of BMLAMA-17.")
    data_root: str | None = option("Folder with data sets as <org>/<name> instead of the Hub.")
    output_dir: str | None = option(f"Where to write {RANKC_FILE}; by default <model>/scores/rankc.")
    max_examples: int | None = option("A seeded sample of that many queries, the same in every language.")
    seed: int = option("Of that sample.", 0)
    max_length: int = option("Longest prompt in tokens, for cosine; longer ones are cut and counted.", 128)

    def __post_init__(self):
        super().__post_init__()
        check_positive("max_examples", self.max_examples)
        check_positive("max_length", self.max_length)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `xlfa rankc`."""
    (arguments,) = parse_arguments(
        [ConsistencyArguments], sys.argv[1:] if argv is None else argv, "xlfa rankc", DESCRIPTION, EXAMPLES
    )
    start_logging(logging.INFO)
    folder = scores_folder(arguments.model, arguments.output_dir, "rankc")
    scores = score_consistency(arguments)
    write_text(folder / RANKC_FILE, json.dumps(scores, indent=1) + "\n")
    print(format_matrix(scores))
    print(f"written to {folder / RANKC_FILE}")


def score_consistency(arguments: ConsistencyArguments) -> dict[str, Any]:
    """RankC of every pair of languages, 0 to 100; the content of `rankc.json`.

    Raises:
        XLFAError: for a model without the head that is asked for, an unknown layer, or rows that are not aligned.
    """
    languages = list(dict.fromkeys(arguments.languages or LANGUAGES))
    if len(languages) < 2:
        raise XLFAError(f"--languages {' '.join(languages)}: consistency needs at least two")
    logger.info(describe_threads())
    rows = load_aligned(arguments, languages)
    rank = CosineRanker(arguments) if arguments.scoring == "cosine" else MaskedLMRanker(arguments)
    ranks = {language: rank(rows[language], language) for language in tqdm(languages, desc="languages")}
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset": arguments.dataset,
        "scoring": arguments.scoring,
        "layer": rank.layer,
        "queries": len(next(iter(rows.values()))),
        **summarise_ranks(ranks),
        "settings": {"max_examples": arguments.max_examples, "seed": arguments.seed, **vars(rank.options)},
        "versions": versions(),
    }


def load_aligned(arguments: ConsistencyArguments, languages: list[str]) -> dict[str, Dataset]:
    """The same queries in every language.

    Raises:
        XLFAError: if the languages differ in their rows or in a query's number of candidates, or a prompt has not
            exactly one blank.
    """
    rows = {
        language: load_rows(arguments.dataset, language, SPLIT, arguments.data_root, COLUMNS) for language in languages
    }
    first = languages[0]
    for language in languages:
        if len(rows[language]) != len(rows[first]):
            raise XLFAError(
                f"{arguments.dataset}: {language} has {len(rows[language])} rows and {first} {len(rows[first])}; row i "
                "must be the same query in every language"
            )
    count = len(rows[first])
    if arguments.max_examples is not None and arguments.max_examples < count:
        chosen = np.sort(np.random.default_rng(arguments.seed).choice(count, arguments.max_examples, replace=False))
        rows = {language: each.select(chosen) for language, each in rows.items()}
    sizes = [len(candidates) for candidates in rows[first]["candidates"]]
    for language, each in rows.items():
        for position, (prompt, candidates) in enumerate(zip(each["prompt"], each["candidates"])):
            place = f"{arguments.dataset} ({language}): query {position}"
            if len(candidates) != sizes[position] or not candidates:
                raise XLFAError(f"{place} has {len(candidates)} candidates, in {first} it has {sizes[position]}")
            if prompt.count(BLANK) != 1:
                raise XLFAError(f"{place} is {prompt!r}; a prompt has one {BLANK}")
    return rows


class CosineRanker:
    """Ranks candidates by the cosine of the filled prompt's vector and the vector of the prompt with its blank."""

    def __init__(self, arguments: ConsistencyArguments):
        self.model, self.tokenizer = load_states_model(arguments.model)
        self.options = InferenceOptions.of(arguments, self.model.device)
        check_length("max_length", arguments.max_length, self.model)
        self.max_length = arguments.max_length
        depth = self.model.config.num_hidden_layers
        self.layer = str(depth) if arguments.layer == FUSED and self.model.fusion is None else arguments.layer
        if self.layer != FUSED and self.layer not in map(str, range(depth + 1)):
            raise XLFAError(f"--layer {arguments.layer}: the model has fused states and layers 0 to {depth}")

    def __call__(self, rows: Dataset, language: str) -> list[np.ndarray]:
        """For each query the ranks of its candidates, 0 the best."""
        sentences, starts = [], []
        for prompt, candidates in zip(rows["prompt"], rows["candidates"]):
            starts.append(len(sentences))
            sentences.append(prompt.replace(BLANK, self.tokenizer.mask_token or BLANK))
            sentences += [prompt.replace(BLANK, candidate) for candidate in candidates]
        vectors = embed_sentences(
            self.model, self.tokenizer, sentences, self.options, self.max_length, self.layer, language
        )[self.layer].numpy()
        ends = [*starts[1:], len(sentences)]
        return [ranks_of(vectors[start + 1 : end] @ vectors[start]) for start, end in zip(starts, ends)]


class MaskedLMRanker:
    """Ranks candidates by the mean log probability of their pieces in as many blanks."""

    layer = "masked_lm"

    def __init__(self, arguments: ConsistencyArguments):
        source = resolve_encoder(arguments.model)
        with naming_model(arguments.model):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            check_weights_file(config)
            self.model, loading = AutoModelForMaskedLM.from_pretrained(
                source, config=config, output_loading_info=True, trust_remote_code=False, use_safetensors=True
            )
            self.tokenizer = load_tokenizer(source)
        if loading["missing_keys"]:
            raise XLFAError(
                f"--model {arguments.model} has no masked-language head (it lacks {min(loading['missing_keys'])}): use "
                "--scoring cosine"
            )
        if self.tokenizer.mask_token is None:
            raise XLFAError(f"--model {arguments.model}: the tokenizer has no mask token: use --scoring cosine")
        self.marks_spaces = marks_spaces(self.tokenizer)
        self.model.to(PartialState().device)
        self.options = InferenceOptions.of(arguments, self.model.device)

    def __call__(self, rows: Dataset, language: str) -> list[np.ndarray]:
        """For each query the ranks of its candidates, 0 the best."""
        prompts = rows["prompt"][:]
        # One input for each query and number of pieces serves all its candidates of that length.
        wanted: dict[tuple[int, int], list[tuple[int, list[int]]]] = defaultdict(list)
        scores = [np.zeros(len(candidates)) for candidates in rows["candidates"]]
        for query, candidates in enumerate(rows["candidates"]):
            # In byte-level BPE a word after a space has pieces of its own.
            spaced = self.marks_spaces and prompts[query].partition(BLANK)[0].endswith(" ")
            texts = [f" {candidate}" if spaced else candidate for candidate in candidates]
            for index, pieces in enumerate(self.tokenizer(texts, add_special_tokens=False)["input_ids"]):
                if not pieces:
                    raise XLFAError(f"{language}: candidate {index} of query {query} is empty: {candidates[index]!r}")
                wanted[query, len(pieces)].append((index, pieces))
        filled = [
            prompts[query].replace(BLANK, " ".join([self.tokenizer.mask_token] * count)) for query, count in wanted
        ]
        inputs = Dataset.from_dict(
            {
                **self.tokenizer(filled, return_length=True),
                "pieces": [[pieces for _, pieces in candidates] for candidates in wanted.values()],
            }
        )
        found = infer(
            self.model,
            self.tokenizer,
            inputs,
            self._mean_log_probabilities,
            self.options,
            columns=["pieces"],
            description=language,
        )
        for (query, _), candidates, means in zip(wanted, wanted.values(), found):
            scores[query][[index for index, _ in candidates]] = means
        return [ranks_of(each) for each in scores]

    def _mean_log_probabilities(
        self, outputs: ModelOutput, inputs: BatchEncoding, columns: dict[str, list[list[list[int]]]]
    ) -> list[torch.Tensor]:
        """Of each input's candidates, candidates x blanks, the mean log probability in the blanks."""
        blanks = inputs["input_ids"] == self.tokenizer.mask_token_id
        means = []
        for logits, where, candidates in zip(outputs.logits, blanks, columns["pieces"]):
            log_probabilities = logits[where].float().log_softmax(-1)
            pieces = torch.tensor(candidates, device=logits.device)
            means.append(log_probabilities.gather(1, pieces.T).mean(0))
        return means


def ranks_of(scores: np.ndarray) -> np.ndarray:
    """Rank of each candidate by descending score, 0 the best; equal scores in the order of the candidates."""
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return ranks


def summarise_ranks(ranks: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """RankC, 0 to 100: `matrix`, means, `intervals` of the same shape and `bootstrap` of `rankc.json`.

    A draw of queries serves all languages, as these have the same ones.

    Args:
        ranks: of each query's candidates, by language.
    """
    found: dict[tuple[str, str], np.ndarray] = {}
    for one, other in itertools.combinations_with_replacement(ranks, 2):
        found[one, other] = found[other, one] = 100 * consistency(ranks[one], ranks[other])
    # Beside each other in one array, queries x languages: one product serves a draw of all pairs of a language.
    counts: Counts = {one: {"rankc": np.stack([found[one, other] for other in ranks], axis=-1)} for one in ranks}
    queries: Clusters = list(range(len(next(iter(found.values())))))
    table, intervals, _ = bootstrap(functools.partial(tabulate, len(queries)), counts, queries)
    return {
        **table,
        "intervals": intervals,
        "bootstrap": {"confidence": CONFIDENCE, "draws": number_of_draws(queries)},
    }


def tabulate(queries: int, sums: Counts) -> Table:
    """`matrix`, its means over the other `languages`, and averages, from sums over queries: language → ... x languages.

    `average` is that of the pairs: each language has as many.
    """
    matrix = {one: dict(zip(sums, np.moveaxis(own["rankc"] / queries, -1, 0))) for one, own in sums.items()}
    languages = {
        one: sum(value for other, value in own.items() if other != one) / (len(matrix) - 1)
        for one, own in matrix.items()
    }
    return {
        "matrix": matrix,
        "languages": languages,
        "average": sum(languages.values()) / len(languages),
        "average_with_english": languages.get("en"),
    }


def consistency(one: list[np.ndarray], other: list[np.ndarray]) -> np.ndarray:
    """RankC of each query, 0 to 1, from two languages' ranks of its candidates."""
    values = []
    for ranks, other_ranks in zip(one, other, strict=True):
        count = len(ranks)
        # A candidate is in both top j from the worse of its two ranks on.
        shared = np.bincount(np.maximum(ranks, other_ranks), minlength=count).cumsum()
        values.append(softmax(np.arange(count, 0, -1)) @ (shared / np.arange(1, count + 1)))
    return np.array(values)


def format_matrix(scores: dict[str, Any]) -> str:
    """The matrix of language pairs for the terminal."""
    languages = list(scores["matrix"])
    lines = [f"{scores['dataset']}: RankC by {scores['scoring']} ({scores['layer']}), {scores['queries']} queries"]
    lines.append(" ".join(f"{name:>5}" for name in ("", *languages)))
    for one in languages:
        lines.append(" ".join([f"{one:>5}", *(f"{value:5.1f}" for value in scores["matrix"][one].values())]))
    interval = format_interval(scores["intervals"]["average"])
    return "\n".join([*lines, f"average of the pairs {scores['average']:.2f}{interval}"])
