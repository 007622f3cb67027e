"""Vocabulary augmentation: new pieces for a language that the tokenizer of an encoder splits much or does not know.

Chau & Smith 2021 (arXiv 2106.09063), after Chau, Lin & Smith 2020 (arXiv 2009.14124): pieces are trained on text of the
language alone, and of them those are added that do most for that text, by how many unknown tokens and pieces it has
fewer. The embeddings of the new pieces are to be trained; they start from the mean of the old ones they replace.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from xlfa.errors import XLFAError
from xlfa.vocabulary.folders import Source, write_folder
from xlfa.vocabulary.pieces import PieceModel, Segmentation, UnigramModel, WordPieceModel

# Size of the vocabulary that is trained on the text, as in Chau, Lin & Smith, or more for many pieces.
TRAINED_SIZE, TRAINED_FOR_ONE_ADDED = 5000, 4
# Candidates that a round of the selection keeps, as of the unigram trainer's.
KEPT_A_ROUND = 0.75
INITIALISATIONS = ("mean", "random")


@dataclass(frozen=True)
class TextStatistics:
    """How a text is split.

    Args:
        words: of the text, as the tokenizer splits it before it looks for pieces.
        pieces: of these words.
        unknown: how many of the pieces are the unknown token.
    """

    words: int
    pieces: int
    unknown: int

    @classmethod
    def of(cls, counts: Iterable[int], segmentations: Iterable[Segmentation]) -> "TextStatistics":
        """Of words that occur as often as `counts` says."""
        words = pieces = unknown = 0
        for count, segmentation in zip(counts, segmentations):
            words += count
            pieces += count * len(segmentation.ids)
            unknown += count * segmentation.unknown
        return cls(words, pieces, unknown)

    @property
    def pieces_per_word(self) -> float:
        """Also called fertility."""
        return self.pieces / self.words

    @property
    def unknown_rate(self) -> float:
        """Share of the pieces that are the unknown token, 0 to 1."""
        return self.unknown / self.pieces


@dataclass(frozen=True)
class Augmentation:
    """New pieces and what they do to the text they come from.

    Args:
        pieces: in the order of their ids, those that do most first.
        before: the text as the old pieces split it.
        after: as the new ones do.
    """

    pieces: list[str]
    before: TextStatistics
    after: TextStatistics


def piece_model(source: Source) -> PieceModel:
    """The piece model of the source's tokenizer."""
    kinds = {"Unigram": UnigramModel, "WordPiece": WordPieceModel}
    return kinds[source.state["model"]["type"]](source)


def choose_pieces(model: PieceModel, read: Callable[[str], Iterator[str]], number: int) -> Augmentation:
    """Train pieces on a text and choose those that it gains most from.

    Args:
        read: gives the sentences of the text, with a progress bar of the given name; called more than once. Only the
            different words of the text are held in memory.
        number: how many pieces are wanted.

    Raises:
        XLFAError: where the text has not so many that it gains from.
    """
    words = count_words(model, read("counting words"))
    characters = sorted({character for word in words for character in word})
    before = list(model.segment(words))
    size = max(TRAINED_SIZE, TRAINED_FOR_ONE_ADDED * number)
    while True:
        trained = model.trained_pieces(read("training pieces"), size, characters)
        candidates = sorted(filter(model.can_be_added, trained))
        chosen = select_pieces(model, candidates, words, [segmentation.cost for segmentation in before], number)
        if len(chosen) == number:
            break
        if len(trained) < size:
            raise XLFAError(
                f"--pieces {number}: the text has only {len(chosen)} new pieces that it would gain from: ask for at "
                "most so many, or give more text"
            )
        size *= 2
    after = model.segment(words, chosen)
    counts = words.values()
    return Augmentation(chosen, TextStatistics.of(counts, before), TextStatistics.of(counts, after))


def count_words(model: PieceModel, sentences: Iterable[str]) -> Counter[str]:
    """How often each word occurs."""
    words: Counter[str] = Counter()
    for sentence in sentences:
        words.update(model.words(sentence))
    return words


def select_pieces(
    model: PieceModel, candidates: Sequence[str], words: Counter[str], costs: Sequence[int], number: int
) -> list[str]:
    """At most `number` of the candidates, those that lower the cost of the words most first.

    Candidates compete: a long one takes words from a shorter one inside it, and gives them back when it goes. So they
    go in rounds, each a quarter of those that are left, with gains counted anew.

    Args:
        words: word → how often it occurs.
        costs: of each word with the old pieces.
    """
    with tqdm(desc="choosing pieces", total=len(candidates), unit="candidates") as bar:
        while True:
            gains = piece_gains(model, candidates, words, costs)
            ranked = sorted(candidates, key=lambda piece: (-gains[piece], piece))
            kept = ranked[: max(number, int(KEPT_A_ROUND * len(ranked)))]
            bar.update(len(candidates) - len(kept))
            if len(kept) == len(candidates):
                bar.update(len(kept))
                return [piece for piece in ranked if gains[piece] > 0]
            candidates = kept


def piece_gains(
    model: PieceModel, candidates: Sequence[str], words: Counter[str], costs: Sequence[int]
) -> dict[str, float]:
    """By how much each candidate lowers the cost of the text; new pieces of one word share its gain."""
    gains = dict.fromkeys(candidates, 0.0)
    for count, cost, segmentation in zip(words.values(), costs, model.segment(words, candidates)):
        new = [token_id - model.first_id for token_id in segmentation.ids if token_id >= model.first_id]
        for position in new:
            gains[candidates[position]] += count * (cost - segmentation.cost) / len(new)
    return gains


def write_augmented(
    source: Source, model: PieceModel, augmentation: Augmentation, initialisation: str, seed: int, folder: Path
) -> None:
    """Write the encoder with the new pieces, and `new_pieces.json`, which names them and their ids.

    Args:
        initialisation: of the new embeddings. mean: of the embeddings of the old pieces that each replaces; random:
            from the normal distribution, with the mean and deviation of all old ones in each unit.
        seed: of the random ones.
    """
    parts = model.old_parts(augmentation.pieces)

    def rows(weight: torch.Tensor) -> torch.Tensor:
        # Encoders may have more rows than their tokenizer has tokens: these are spare.
        old = weight[: model.first_id]
        if initialisation == "mean":
            new = torch.stack([old[part].mean(0) for part in parts])
        else:
            noise = torch.randn(len(parts), old.shape[1], generator=torch.Generator().manual_seed(seed))
            new = old.mean(0) + noise * old.std(0)
        return torch.cat([old, new, weight[model.first_id + len(new) :]])

    state = {**source.state, "model": model.extended(augmentation.pieces)}
    write_folder(source, state, rows, lambda old: old, _record(source, model, augmentation, initialisation), folder)


def _record(source: Source, model: PieceModel, augmentation: Augmentation, initialisation: str) -> dict[str, Any]:
    """The content of `new_pieces.json`, together with what an earlier augmentation added."""
    earlier = source.new_pieces()
    before = [] if earlier is None else earlier["pieces"]
    return {
        "schema_version": 1,
        "first_id": model.first_id - len(before),
        "initialisation": initialisation,
        "text": {
            name: {"words": found.words, "pieces": found.pieces, "unknown": found.unknown}
            for name, found in (("before", augmentation.before), ("after", augmentation.after))
        },
        "pieces": [*before, *augmentation.pieces],
    }
