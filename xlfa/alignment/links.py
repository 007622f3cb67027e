"""Hard links between words: from a transport plan, and by two published methods from the same states."""

from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from xlfa.alignment.aligner import Alignment, PairStates
from xlfa.errors import XLFAError

METHODS = ("mutual_argmax", "threshold")
# Of `threshold`: a link has that many times the weight that it has in the uniform plan.
DEFAULT_THRESHOLD = 2.0
# Weights that differ by rounding alone count as alike: a sentence of one word has exactly the uniform plan.
ROUNDING = 1e-9
# AWESoME-align's c (Dou & Neubig 2021).
SOFTMAX_THRESHOLD = 1e-3


@dataclass(frozen=True)
class Link:
    """A source word and a target word by their positions, and how strongly they are linked."""

    source: int
    target: int
    weight: float


def extract_links(
    alignment: Alignment, method: str = "mutual_argmax", threshold: float = DEFAULT_THRESHOLD
) -> list[Link]:
    """Links by source, then target position, each with its weight in the plan.

    Words that an unbalanced plan leaves unmatched (`null_words`) have no link, nor have words without a piece.

    Args:
        method: `"mutual_argmax"`: pairs of words each of which shares its largest weight with the other (the first, of
            several); `"threshold"`: all pairs with `relative_weights` of at least `threshold`.
        threshold: of the method of that name. Two sentences of n words reach n at most, unrelated words have 1.

    Raises:
        XLFAError: for another method or threshold; see `check_method`.
    """
    check_method(method, threshold)
    if method == "mutual_argmax":
        chosen = _mutual_argmax(alignment.weights)
    else:
        chosen = relative_weights(alignment) >= threshold - ROUNDING
    chosen &= alignment.weights > 0
    null_source, null_target = null_words(alignment)
    chosen[null_source] = False
    chosen[:, null_target] = False
    return _links(chosen, alignment.weights)


def check_method(method: str, threshold: float) -> None:
    """Nothing, for a method of extraction and a threshold that it could use.

    Raises:
        XLFAError: for another method, or a threshold that is not positive.
    """
    if method not in METHODS:
        raise XLFAError(f"method {method!r}: it must be one of {', '.join(METHODS)}")
    if not threshold > 0:
        raise XLFAError(f"threshold {threshold}: it must be above 0")


def relative_weights(alignment: Alignment) -> np.ndarray:
    """Weights over those of the uniform plan of the same mass, P_ij / (|P| a_i b_j); 0 for words without a piece."""
    uniform = alignment.weights.sum() * np.outer(alignment.source_mass, alignment.target_mass)
    return np.divide(alignment.weights, uniform, out=np.zeros_like(uniform), where=uniform > 0)


def null_words(alignment: Alignment) -> tuple[np.ndarray, np.ndarray]:
    """True for source and target words that keep less than half of the share that the pair as a whole keeps.

    Relative to the pair: a constant added to the cost scales an unbalanced plan by exp(-constant / (epsilon + 2 tau)),
    so the share itself says as much about the encoder as about the word. A balanced plan has no null word.
    """
    total = alignment.weights.sum()
    return (
        alignment.weights.sum(1) < total * alignment.source_mass / 2,
        alignment.weights.sum(0) < total * alignment.target_mass / 2,
    )


def softmax_links(states: PairStates, threshold: float = SOFTMAX_THRESHOLD) -> list[Link]:
    """AWESoME-align's softmax extraction (Dou & Neubig 2021, arXiv 2101.08231: probability thresholding).

    S = X Y^T over pieces. Pieces are linked where softmax(S) over target pieces > c and softmax(S) over source pieces
    > c, words where any of their pieces are. The weight is the largest product of the two probabilities.

    Args:
        threshold: c.
    """
    similarity = (states.source_states.double() @ states.target_states.double().T).numpy()
    forward, backward = softmax(similarity, axis=1), softmax(similarity, axis=0)
    return _any_piece(states, (forward > threshold) & (backward > threshold), forward * backward)


def argmax_links(states: PairStates) -> list[Link]:
    """SimAlign's Argmax (Jalili Sabet et al. 2020, arXiv 2004.08728) by cosine similarity S over pieces.

    Pieces i and j are linked where i = argmax_k S_kj and j = argmax_k S_ik, words where any of their pieces are. The
    weight is the largest similarity.
    """
    source, target = (
        side / side.norm(dim=1, keepdim=True).clamp(min=1e-12)
        for side in (states.source_states.double(), states.target_states.double())
    )
    similarity = (source @ target.T).numpy()
    return _any_piece(states, _mutual_argmax(similarity), similarity)


def _mutual_argmax(scores: np.ndarray) -> np.ndarray:
    """True where an entry is the first largest one of its row and of its column."""
    rows, columns = np.arange(scores.shape[0]), np.arange(scores.shape[1])
    best = scores.argmax(axis=1)[:, None] == columns
    return best & (scores.argmax(axis=0) == rows[:, None])


def _any_piece(states: PairStates, chosen: np.ndarray, scores: np.ndarray) -> list[Link]:
    """Links of words any of whose pieces are linked, with the largest score of these."""
    best = np.full((len(states.source_words), len(states.target_words)), -np.inf)
    source, target = chosen.nonzero()
    words = states.source_word_of_piece[source], states.target_word_of_piece[target]
    np.maximum.at(best, words, scores[source, target])
    return _links(best > -np.inf, best)


def _links(chosen: np.ndarray, weights: np.ndarray) -> list[Link]:
    return [Link(int(source), int(target), float(weights[source, target])) for source, target in np.argwhere(chosen)]
