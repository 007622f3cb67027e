"""Parallel sentences for the alignment term: loading, filtering, and a draw that depends on seed and step alone."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from xlfa.data import UnknownConfiguration, load_rows
from xlfa.errors import XLFAError

logger = logging.getLogger(__name__)

SOURCE_LANGUAGE = "en"
# Permutations that are tried where equal sentences stand in the way.
SHUFFLING_ATTEMPTS = 20


def load_parallel(
    dataset: str,
    languages: list[str],
    data_root: str | None = None,
    filters: list[str] | None = None,
    pairs_per_language: int | None = None,
    seed: int = 0,
) -> dict[str, list[tuple[str, str]]]:
    """English-X sentence pairs by language from a data set with a `translation` column (as in Helsinki-NLP/opus-100).

    Args:
        dataset: a Hub id; its configurations are named `en-de` or `de-en`.
        languages: ISO 639-1 codes of X.
        data_root: see `xlfa.data.load_rows`.
        filters: `column=value` each; all must hold.
        pairs_per_language: a seeded sample of that many pairs of each language; None for all.
        seed: of that sample.

    Raises:
        XLFAError: without a `translation` column, a language, a filter's column, or any pair that passes the filters.
    """
    if pairs_per_language is not None and pairs_per_language < 1:
        raise XLFAError(f"--parallel_pairs_per_language {pairs_per_language} must be at least 1")
    pairs = {}
    for language in languages:
        rows = _load_language(dataset, language, data_root)
        rows = _filtered(rows, filters or [], f"{dataset} ({language})")
        if pairs_per_language is not None and pairs_per_language < len(rows):
            rows = rows.shuffle(seed=seed).select(range(pairs_per_language))
        pairs[language] = []
        for position, row in enumerate(rows["translation"][:]):
            if not isinstance(row, dict) or row.get(SOURCE_LANGUAGE) is None or row.get(language) is None:
                raise XLFAError(
                    f"{dataset} (en-{language}): `translation` of row {position} is {row!r}; it must hold "
                    f"{SOURCE_LANGUAGE!r} and {language!r}"
                )
            pairs[language].append((row[SOURCE_LANGUAGE], row[language]))
    return pairs


def _load_language(dataset: str, language: str, data_root: str | None) -> Dataset:
    names = [f"{SOURCE_LANGUAGE}-{language}", f"{language}-{SOURCE_LANGUAGE}"]
    errors = []
    for name in names:
        try:
            return load_rows(dataset, name, "train", data_root, ("translation",))
        except UnknownConfiguration as error:
            errors.append(str(error))
    raise XLFAError(f"no parallel text for language {language!r}, as {' or '.join(names)}: {errors[0]}")


def _filtered(rows: Dataset, filters: list[str], place: str) -> Dataset:
    for text in filters:
        column, equals, value = text.partition("=")
        if not equals or column not in rows.column_names:
            raise XLFAError(
                f"--parallel_filter {text!r} must be column=value with a column of {place}: "
                + ", ".join(rows.column_names)
            )
        kept = [position for position, found in enumerate(rows[column][:]) if str(found) == value]
        if not kept:
            raise XLFAError(f"--parallel_filter {text!r} leaves no pair of {place}")
        rows = rows.select(kept)
    return rows


@dataclass
class PairSampler:
    """Draws batches of tokenised pairs: languages uniformly, then a pair of the language uniformly.

    The draw for an optimizer step is a pure function of `seed` and the step, so it is the same at any number of workers
    or processes and after a resume; with replacement, so it never runs out.

    Attributes:
        pairs: language → list of (English ids, other ids), special tokens included.
        tokenizer: pads.
        seed: of the draws.
    """

    pairs: dict[str, list[tuple[list[int], list[int]]]]
    tokenizer: PreTrainedTokenizerBase
    seed: int

    @classmethod
    def from_texts(
        cls,
        texts: dict[str, list[tuple[str, str]]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int,
        shuffled: bool = False,
    ) -> "PairSampler":
        """Tokenise once. Pairs with an empty side, or one of more than `max_length` tokens, are left out and counted.

        Args:
            shuffled: the same sentences, but no source sentence with its translation; see `mispairing`.

        Raises:
            XLFAError: if that leaves a language without a pair, or its pairs cannot be shuffled.
        """
        pairs = {}
        # Special tokens alone.
        bare = len(tokenizer("")["input_ids"])
        for language, both in texts.items():
            sources, targets = (tokenizer(list(side))["input_ids"] for side in zip(*both))
            lengths = [sorted(map(len, pair)) for pair in zip(sources, targets)]
            kept = [
                position
                for position, (shorter, longer) in enumerate(lengths)
                if shorter > bare and longer <= max_length
            ]
            empty = sum(shorter <= bare for shorter, _ in lengths)
            logger.info(
                "parallel text en-%s: %d pairs, %d too long, %d with an empty side",
                *(language, len(kept), len(both) - len(kept) - empty, empty),
            )
            if not kept:
                raise XLFAError(f"no pair of en-{language} fits --parallel_max_length {max_length}")
            partners = kept
            if shuffled:
                order = mispairing([both[position] for position in kept], language, seed)
                partners = [kept[position] for position in order]
            pairs[language] = [(sources[position], targets[partner]) for position, partner in zip(kept, partners)]
        return cls(pairs, tokenizer, seed)

    def sequences(self) -> Dataset:
        """The column `input_ids` of both sides of all pairs."""
        both = [ids for pairs in self.pairs.values() for pair in pairs for ids in pair]
        return Dataset.from_dict({"input_ids": both})

    def inverse_document_frequencies(self, vocab_size: int) -> torch.Tensor:
        """log((1 + N) / (1 + df)) + 1 of every piece over the N sentences of both sides, shape (vocab_size,)."""
        sentences = [ids for pairs in self.pairs.values() for pair in pairs for ids in pair]
        occurring = np.concatenate([np.unique(ids) for ids in sentences])
        frequencies = np.bincount(occurring, minlength=vocab_size)
        return torch.from_numpy(np.log((1 + len(sentences)) / (1 + frequencies)) + 1).float()

    def draw(self, step: int, positions: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """The pairs at some positions of the step's draw."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        uniform = generator.random((max(positions) + 1, 2))[list(positions)]
        languages = list(self.pairs)
        drawn = []
        for language_draw, pair_draw in uniform:
            candidates = self.pairs[languages[int(language_draw * len(languages))]]
            drawn.append(candidates[int(pair_draw * len(candidates))])
        return drawn

    def batch(self, step: int, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        """The same pairs as model inputs: ids, attention mask and special-token mask of both sides."""
        # An unknown piece is a token of the sentence like the others.
        special = torch.tensor(sorted(set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}))
        inputs = {}
        for side, sentences in zip(("source", "target"), zip(*self.draw(step, positions))):
            padded = self.tokenizer.pad({"input_ids": list(sentences)}, return_tensors="pt")
            inputs[f"{side}_input_ids"] = padded["input_ids"]
            inputs[f"{side}_attention_mask"] = padded["attention_mask"]
            inputs[f"{side}_special_tokens_mask"] = torch.isin(padded["input_ids"], special).long()
        return inputs


def mispairing(pairs: list[tuple[str, str]], language: str, seed: int) -> list[int]:
    """For each pair, the position of the one whose target sentence its source gets: a seeded permutation.

    No source keeps its translation, nor gets one of an equal source, an equal target, or itself as a target.

    Args:
        pairs: (English, other) sentences of one language.
        language: so that languages with the same English sentences are permuted apart.

    Raises:
        XLFAError: where there is no such permutation, or none is found because most sentences are equal.
    """
    if len(pairs) < 2:
        raise XLFAError(
            f"--parallel_shuffled: en-{language} has a single pair; it takes at least two to exchange sides"
        )

    def fits(source: int, target: int) -> bool:
        (own_source, own_target), (other_source, other_target) = pairs[source], pairs[target]
        return source != target and own_source not in (other_source, other_target) and own_target != other_target

    generator = np.random.default_rng([seed, *language.encode()])
    for _ in range(SHUFFLING_ATTEMPTS):
        order = generator.permutation(len(pairs)).tolist()
        for source in range(len(pairs)):
            if fits(source, order[source]):
                continue
            for other in generator.permutation(len(pairs)).tolist():
                if fits(source, order[other]) and fits(other, order[source]):
                    order[source], order[other] = order[other], order[source]
                    break
        if all(map(fits, range(len(pairs)), order)):
            return order
    raise XLFAError(
        f"--parallel_shuffled: the {len(pairs)} pairs of en-{language} have too many equal sentences to give each "
        "source one that is not its translation"
    )


def read_piece_weights(path: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """Weights of the pieces for `ot_marginals="idf"` from a JSON object {piece: weight}, shape (vocab_size,).

    A piece that the file does not name counts as the rarest: it has the file's largest weight.

    Raises:
        XLFAError: for a file that is no such object, a weight that is negative or not finite, or a file that names no
            piece of the tokenizer.
    """
    place = f"--ot_idf_file {path}"
    try:
        weights = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise XLFAError(f"{place}: {error.strerror}") from None
    except ValueError as error:
        raise XLFAError(f"{place} is not valid JSON: {error}") from None
    if not isinstance(weights, dict) or not weights:
        raise XLFAError(f"{place} must hold a JSON object of pieces and their weights")
    for piece, weight in weights.items():
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 <= weight < math.inf:
            raise XLFAError(f"{place}: the weight of {piece!r} is {weight!r}; it must be a finite number >= 0")
    vocabulary = tokenizer.get_vocab()
    known = [piece for piece in weights if piece in vocabulary]
    if not known:
        raise XLFAError(f"{place} names no piece of the tokenizer, such as {next(iter(vocabulary))!r}")
    logger.info("%s: weights of %d pieces, %d of them in the vocabulary", place, len(weights), len(known))
    result = torch.full((vocab_size,), float(max(weights.values())))
    result[[vocabulary[piece] for piece in known]] = torch.tensor([float(weights[piece]) for piece in known])
    return result
