"""Alignments of sentence pairs: states of an encoder's layer, and transport plans between them, summed to words."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from modeling_xlfa import XLFAConfig, XLFAModel
from modeling_xlfa.configuration_xlfa import CHOICES
from modeling_xlfa.sinkhorn_xlfa import TransportResult
from modeling_xlfa.transport_xlfa import exact_plan, pairwise_cost, product_plan, sinkhorn
from xlfa.alignment.pieces import EncodedSentence, SentenceOrWords, encode_sentence
from xlfa.alignment.words import Word
from xlfa.arguments import InferenceArguments
from xlfa.encoding import longest_input, tokenizer_digest
from xlfa.errors import XLFAError
from xlfa.inference import InferenceOptions, infer, token_batches
from xlfa.retrieval import FUSED, load_states_model

DEFAULT_MODEL = "packaged:multilingual-e5-small"
LAST = "last"
# ISO 639-1 codes of source and target; None where the script decides.
Languages = tuple[str | None, str | None]
# Longest sentence in tokens, if the model reads that many: plans grow with the square.
LONGEST_SENTENCE = 512
# Pairs that are in memory at a time in a stream: enough for full batches of similar length.
CHUNK = 256
# Entries of the plans that are solved together.
ENTRIES_PER_BATCH = 2**20


@dataclass(frozen=True)
class TransportOptions:
    """How plans are computed; meanings as of the fields `ot_*` of `XLFAConfig`.

    Attributes:
        epsilon: strength of the entropic regularisation in units of `epsilon_scale`. The limits are allowed: 0 is the
            exact plan, infinity the product of the marginals.
        epsilon_scale: `"centered_std"`, `"std"`, `"mean"`, `"max"` or `"absolute"`.
        unbalanced: strength of soft marginals (`ot_tau`) in the same units; None for hard ones.
        cost: `"cosine"` or `"sqeuclidean"`.
        tol: L1 error of the marginals at which a plan has converged.
        max_iter: most sweeps for a pair.

    Raises:
        XLFAError: for a value that is not allowed.
    """

    epsilon: float = 0.1
    epsilon_scale: str = "centered_std"
    unbalanced: float | None = None
    cost: str = "cosine"
    tol: float = 1e-5
    max_iter: int = 5000

    def __post_init__(self):
        for name in ("epsilon_scale", "cost"):
            value, allowed = getattr(self, name), CHOICES[f"ot_{name}"]
            if value not in allowed:
                raise XLFAError(f"{name} {value!r}: it must be one of {', '.join(allowed)}")
        if not self.epsilon >= 0:
            raise XLFAError(f"epsilon {self.epsilon}: 0 (the exact plan), a positive number, or inf (the product plan)")
        if self.unbalanced is not None:
            if not 0 < self.unbalanced < math.inf:
                raise XLFAError(f"unbalanced {self.unbalanced}: a positive number; leave it out for hard marginals")
            if not 0 < self.epsilon < math.inf:
                raise XLFAError(f"epsilon {self.epsilon} has hard marginals only: leave unbalanced out")
        if not 0 < self.tol < math.inf or self.max_iter < 1:
            raise XLFAError(f"tol {self.tol} and max_iter {self.max_iter}: both must be positive")


@dataclass(frozen=True)
class EncodedPair:
    """Two sentences as the model reads them."""

    source: EncodedSentence
    target: EncodedSentence


@dataclass(frozen=True)
class PairStates:
    """The pieces of a sentence pair and their states; no special token and no padding is among them.

    Attributes:
        source_words, target_words: with their places in the sentence.
        source_pieces, target_pieces: the characters of the sentence that each piece stands for.
        source_word_of_piece, target_word_of_piece: index of each piece's word. A piece that reaches into several words
            is there once for each of them.
        source_states, target_states: pieces x E, float32.
        source_marginal, target_marginal: mass of each piece, sums to 1; see `EncodedSentence.marginal`.
    """

    source_words: list[Word]
    target_words: list[Word]
    source_pieces: list[str]
    target_pieces: list[str]
    source_word_of_piece: np.ndarray
    target_word_of_piece: np.ndarray
    source_states: torch.Tensor
    target_states: torch.Tensor
    source_marginal: np.ndarray
    target_marginal: np.ndarray


@dataclass(frozen=True)
class Alignment:
    """A transport plan between the words of two sentences.

    Attributes:
        source, target: the words.
        weights: source words x target words, the plan over pieces summed to words; sums to 1 where it is balanced.
        source_mass, target_mass: mass of each word before transport, the marginals a and b; each sums to 1. 0 for a
            word without a piece.
        null_source, null_target: mass of each word that an unbalanced plan leaves unmatched; 0 where it is balanced.
        source_pieces, target_pieces, piece_plan: the plan over pieces.
        source_word_of_piece, target_word_of_piece: index of each piece's word.
        epsilon: absolute, in units of the cost.
        perplexity: effective number of target pieces of a source piece, exp of the mean entropy of the plan's rows.
        marginal_error: L1 error of the marginals.
        converged: whether it came below the tolerance.
    """

    source: list[str]
    target: list[str]
    weights: np.ndarray
    source_mass: np.ndarray
    target_mass: np.ndarray
    null_source: np.ndarray
    null_target: np.ndarray
    source_pieces: list[str]
    target_pieces: list[str]
    piece_plan: np.ndarray
    source_word_of_piece: np.ndarray
    target_word_of_piece: np.ndarray
    epsilon: float
    perplexity: float
    marginal_error: float
    converged: bool


class Aligner:
    """An encoder and the layer whose states are aligned.

    `states` runs the encoder; `align` computes plans from its states as often as wanted, which is cheap.

    Args:
        model, tokenizer: as `load_states_model` returns them.
        layer: a layer index 0..N, `"fused"` (the last one without fusion) or `"last"`. By default the layer that the
            model was trained to align, or else the one at two thirds of the depth (8 of 12).
        max_length: longest sentence in tokens; by default 512, or what the model reads.
        max_tokens_per_batch: by default by the device.

    Raises:
        XLFAError: for a layer or a length that the model does not have.
    """

    def __init__(
        self,
        model: XLFAModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: int | str | None = None,
        max_length: int | None = None,
        max_tokens_per_batch: int | None = None,
    ):
        # Refuses tokenizers that know no offsets.
        tokenizer_digest(tokenizer)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.layer = _check_layer(default_layer(model.config) if layer is None else layer, model.config)
        limit = min(tokenizer.model_max_length, longest_input(model))
        if max_length is not None and not 1 <= max_length <= limit:
            raise XLFAError(f"--max_length {max_length}: the model reads 1 to {limit} tokens")
        self.max_length = max_length or min(limit, LONGEST_SENTENCE)
        # In bfloat16 plans at small epsilon would differ from machine to machine.
        arguments = InferenceArguments(max_tokens_per_batch=max_tokens_per_batch, bf16=False)
        self.options = InferenceOptions.of(arguments, model.device)

    @classmethod
    def from_pretrained(
        cls,
        name: str = DEFAULT_MODEL,
        layer: int | str | None = None,
        max_length: int | None = None,
        max_tokens_per_batch: int | None = None,
    ) -> "Aligner":
        """An encoder or a trained XLFA model: a folder, a Hub id or a `packaged:` name. Arguments as of the class.

        Raises:
            XLFAError: where there is no such model, and as the class.
        """
        return cls(*load_states_model(name), layer, max_length, max_tokens_per_batch)

    def at_layer(self, layer: int | str) -> "Aligner":
        """The same encoder, aligned at another layer; no weights are loaded.

        Raises:
            XLFAError: for a layer that the model does not have.
        """
        other = copy.copy(self)
        other.layer = _check_layer(layer, self.model.config)
        return other

    def encode(
        self, source: SentenceOrWords, target: SentenceOrWords, languages: Languages = (None, None)
    ) -> EncodedPair:
        """A pair's words and pieces.

        Raises:
            XLFAError: for a side without a word or with too many tokens, and for a language that is none.
        """
        sides = []
        for name, sentence, language in zip(("source", "target"), (source, target), languages):
            try:
                sides.append(encode_sentence(sentence, language, self.tokenizer, self.max_length))
            except XLFAError as error:
                raise XLFAError(f"the {name} sentence: {error}") from None
        return EncodedPair(*sides)

    def run(self, pairs: Sequence[EncodedPair]) -> list[PairStates]:
        """The states of encoded pairs, in their order: one pass of the encoder for both sides."""
        if not pairs:
            return []
        sentences = [sentence for pair in pairs for sentence in (pair.source, pair.target)]
        inputs = Dataset.from_dict(
            {
                "input_ids": [sentence.input_ids for sentence in sentences],
                "length": [len(sentence.input_ids) for sentence in sentences],
                "positions": [sentence.positions for sentence in sentences],
            }
        )

        def read(outputs: ModelOutput, batch: BatchEncoding, columns: dict) -> list[torch.Tensor]:
            if self.layer == FUSED:
                states = outputs.last_hidden_state
            else:
                states = outputs.hidden_states[-1 if self.layer == LAST else self.layer]
            return [row[positions].float() for row, positions in zip(states, columns["positions"])]

        needed = {"columns": ["positions"], "output_hidden_states": self.layer != FUSED}
        readings = infer(self.model, self.tokenizer, inputs, read, self.options, **needed)
        states = [torch.from_numpy(reading) for reading in readings]
        return [_pair_states(*both) for both in zip(pairs, states[::2], states[1::2], strict=True)]

    def states(
        self,
        pairs: Sequence[tuple[SentenceOrWords, SentenceOrWords]],
        languages: Languages = (None, None),
        first: int = 1,
    ) -> list[PairStates]:
        """The states of pairs of texts, or of given words, in their order.

        Args:
            first: number of the first pair, for the error.

        Raises:
            XLFAError: for a pair that cannot be aligned, with its number; see `encode`.
        """
        encoded = []
        for number, (source, target) in enumerate(pairs, start=first):
            try:
                encoded.append(self.encode(source, target, languages))
            except XLFAError as error:
                raise XLFAError(f"pair {number}: {error}") from None
        return self.run(encoded)

    def stream(
        self, pairs: Iterable[tuple[SentenceOrWords, SentenceOrWords]], languages: Languages = (None, None)
    ) -> Iterator[PairStates]:
        """`states` of any number of pairs; `CHUNK` of them are in memory at a time."""
        pairs, first = iter(pairs), 1
        while chunk := list(islice(pairs, CHUNK)):
            yield from self.states(chunk, languages, first)
            first += len(chunk)

    @staticmethod
    def align(states: Sequence[PairStates], options: TransportOptions) -> list[Alignment]:
        """A plan for each pair, in their order; no pass of the encoder.

        Raises:
            XLFAError: for states that are not finite, with the pair's number from 1.
        """
        # The solver would count within its batch.
        for number, pair in enumerate(states, start=1):
            for side, own in (("source", pair.source_states), ("target", pair.target_states)):
                if not own.isfinite().all():
                    raise XLFAError(
                        f"pair {number}: the {side} states have a NaN or an infinity: choose another layer or model"
                    )
        # Plans of similar size together: a batch is as large as its largest one.
        sizes = [max(len(pair.source_pieces), len(pair.target_pieces)) ** 2 for pair in states]
        alignments: dict[int, Alignment] = {}
        for positions in token_batches(sizes, ENTRIES_PER_BATCH):
            pairs = [states[position] for position in positions]
            alignments |= zip(positions, _align_batch(pairs, options))
        return [alignments[position] for position in range(len(states))]


def default_layer(config: XLFAConfig) -> int | str:
    """The layer that the model was trained to align; without that, the one at two thirds of the depth."""
    if config.ot_weight > 0:
        return config.ot_layer
    return XLFAConfig(text_config=config.text_config, fusion="none").fusion_layer


def _check_layer(layer: int | str, config: XLFAConfig) -> int | str:
    depth = config.num_hidden_layers
    is_index = isinstance(layer, int) and 0 <= layer <= depth
    if not is_index and layer not in (FUSED, LAST):
        raise XLFAError(f"--layer {layer}: the model has the layers 0 to {depth}, {FUSED} and {LAST}")
    return layer


def _pair_states(pair: EncodedPair, source_states: torch.Tensor, target_states: torch.Tensor) -> PairStates:
    return PairStates(
        source_words=pair.source.words,
        target_words=pair.target.words,
        source_pieces=pair.source.pieces,
        target_pieces=pair.target.pieces,
        source_word_of_piece=pair.source.word_of_piece,
        target_word_of_piece=pair.target.word_of_piece,
        source_states=source_states,
        target_states=target_states,
        source_marginal=pair.source.marginal,
        target_marginal=pair.target.marginal,
    )


def _align_batch(pairs: list[PairStates], options: TransportOptions) -> Iterator[Alignment]:
    result = _solve(pairs, options)
    perplexities = result.plan_entropy.exp()
    for index, pair in enumerate(pairs):
        plan = result.plan[index, : len(pair.source_pieces), : len(pair.target_pieces)].numpy()
        # Beyond the solver's reach: no piece has more partners than there are.
        if not (np.isfinite(plan).all() and perplexities[index] <= 1.01 * len(pair.target_pieces)):
            given = f"epsilon {options.epsilon:g}"
            given += "" if options.unbalanced is None else f", unbalanced {options.unbalanced:g}"
            raise XLFAError(f"{given}: too small for 64-bit numbers on these sentences; take a larger value")
        source_word_of_piece = _memberships(pair.source_word_of_piece, len(pair.source_words))
        target_word_of_piece = _memberships(pair.target_word_of_piece, len(pair.target_words))
        weights = source_word_of_piece @ plan @ target_word_of_piece.T
        source_mass = source_word_of_piece @ pair.source_marginal
        target_mass = target_word_of_piece @ pair.target_marginal
        balanced = options.unbalanced is None
        yield Alignment(
            source=[word.text for word in pair.source_words],
            target=[word.text for word in pair.target_words],
            weights=weights,
            source_mass=source_mass,
            target_mass=target_mass,
            # What is left in a balanced plan is the solver's error.
            null_source=np.zeros_like(source_mass) if balanced else (source_mass - weights.sum(1)).clip(min=0),
            null_target=np.zeros_like(target_mass) if balanced else (target_mass - weights.sum(0)).clip(min=0),
            source_pieces=pair.source_pieces,
            target_pieces=pair.target_pieces,
            piece_plan=plan,
            source_word_of_piece=pair.source_word_of_piece,
            target_word_of_piece=pair.target_word_of_piece,
            epsilon=float(result.epsilon[index]),
            perplexity=float(perplexities[index]),
            marginal_error=float(result.marginal_error[index]),
            converged=bool(result.converged[index]),
        )


def _solve(pairs: list[PairStates], options: TransportOptions) -> TransportResult:
    """Plans of a batch. In float64: a tolerance fit for figures is near the rounding of float32."""
    sides = []
    for name in ("source", "target"):
        states = [getattr(pair, f"{name}_states").double() for pair in pairs]
        marginals = [torch.from_numpy(getattr(pair, f"{name}_marginal")) for pair in pairs]
        sides.append((pad_sequence(states, batch_first=True), pad_sequence(marginals, batch_first=True)))
    (source, source_marginal), (target, target_marginal) = sides
    cost = pairwise_cost(source, target, options.cost)
    masks = (source_marginal > 0).to(cost.dtype), (target_marginal > 0).to(cost.dtype)
    if options.epsilon == 0:
        return exact_plan(cost, *masks, source_marginal, target_marginal)
    if options.epsilon == math.inf:
        return product_plan(cost, *masks, source_marginal, target_marginal)
    return sinkhorn(
        cost,
        options.epsilon,
        *masks,
        max_iter=options.max_iter,
        tol=options.tol,
        return_plan=True,
        source_marginal=source_marginal,
        target_marginal=target_marginal,
        tau=options.unbalanced,
        epsilon_scale=options.epsilon_scale,
    )


def _memberships(word_of_piece: np.ndarray, words: int) -> np.ndarray:
    """Words x pieces, 1 where the piece belongs to the word."""
    return (np.arange(words)[:, None] == word_of_piece).astype(float)
