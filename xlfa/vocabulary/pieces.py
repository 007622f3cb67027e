"""The two kinds of piece models that can get new pieces: how each is trained, splits text, and is extended.

Both keep every old piece under its id. What they do to other text is bounded by how they choose pieces:

- A unigram model takes the segmentation with the highest sum of scores. A new piece scores what its old pieces score
  together, plus a little: it wins over them, the more so the more it replaces, and over nothing else. So the new
  segmentation is the old one with runs of pieces merged. No score is below the old lowest one, on which the cost of an
  unknown character hangs; new pieces whose old ones together score less have the lowest score, and also win over
  other, costlier, segmentations.
- WordPiece takes the longest piece from the left: a new piece changes the words in which it is that.

Text in which no new piece occurs as a string is split as before.
"""

import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from tokenizers import Tokenizer, models, trainers

from xlfa.errors import XLFAError
from xlfa.vocabulary.folders import Source, lowest_score

BATCH = 10_000
# What a merge of two pieces adds to a unigram score: above the rounding of sums in float32, below the distance of
# segmentations that differ by more than a merge.
MERGE_BONUS = 1e-4
WORD_BOUNDARY = "▁"


class Segmentation(NamedTuple):
    """Pieces of a word.

    Args:
        ids: of its pieces.
        cost: how many they are; an unknown token, which loses its text, counts one more than its characters.
        unknown: how many are the unknown token.
    """

    ids: list[int]
    cost: int
    unknown: int


class PieceModel(ABC):
    """The piece model of an encoder's tokenizer, with what leads from text to its words."""

    def __init__(self, source: Source):
        self.state, self.model = source.state, source.state["model"]
        self.backend: Tokenizer = source.tokenizer.backend_tokenizer
        # With the tokens that were added to the tokenizer alone.
        self.old_pieces: dict[str, int] = source.tokenizer.get_vocab()
        self.first_id = 1 + max(self.old_pieces.values())
        self.unknown_id = self.old_pieces.get(source.tokenizer.unk_token)

    @abstractmethod
    def trained_pieces(self, sentences: Iterable[str], size: int, characters: list[str]) -> list[str]:
        """Pieces of a model of the same kind, trained on the sentences: at most `size` and those of the characters."""

    @abstractmethod
    def old_parts(self, pieces: Sequence[str]) -> list[list[int]]:
        """The ids of old pieces that each new piece stands for."""

    @abstractmethod
    def extended(self, pieces: Sequence[str]) -> dict[str, Any]:
        """The model of a `tokenizer.json` with new pieces under `first_id` and the ids that follow."""

    def can_be_added(self, piece: str) -> bool:
        """Whether a trained piece is new and such as this model has."""
        return piece not in self.old_pieces

    def words(self, sentence: str) -> list[str]:
        """The words of a sentence as the piece model gets them."""
        normalizer, pre_tokenizer = self.backend.normalizer, self.backend.pre_tokenizer
        text = sentence if normalizer is None else normalizer.normalize_str(sentence)
        return [text] if pre_tokenizer is None else [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]

    def segment(self, words: Iterable[str], pieces: Sequence[str] = ()) -> Iterator[Segmentation]:
        """The segmentation of each word by the model with new pieces."""
        tokenizer = bare_tokenizer(self.extended(pieces)) if pieces else self._old_tokenizer
        words = iter(words)
        while batch := list(islice(words, BATCH)):
            for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                lost = [
                    1 + end - start
                    for token, (start, end) in zip(encoding.ids, encoding.offsets)
                    if token == self.unknown_id
                ]
                yield Segmentation(encoding.ids, len(encoding.ids) - len(lost) + sum(lost), len(lost))

    @cached_property
    def _old_tokenizer(self) -> Tokenizer:
        return bare_tokenizer(self.extended(()))

    def _train(self, model: models.Model, trainer: trainers.Trainer, sentences: Iterable[str]) -> dict[str, int]:
        tokenizer = Tokenizer(model)
        if self.backend.normalizer is not None:
            tokenizer.normalizer = self.backend.normalizer
        if self.backend.pre_tokenizer is not None:
            tokenizer.pre_tokenizer = self.backend.pre_tokenizer
        tokenizer.train_from_iterator(sentences, trainer)
        return tokenizer.get_vocab(with_added_tokens=False)

    def _added_tokens(self) -> list[tuple[str, int]]:
        """Tokens that stand behind the model's own pieces: inside it they keep their ids when it grows."""
        own = self.backend.get_vocab(with_added_tokens=False)
        tokens = [
            (token["content"], token["id"]) for token in self.state["added_tokens"] if token["content"] not in own
        ]
        return sorted(tokens, key=lambda token: token[1])


class UnigramModel(PieceModel):
    """The model of SentencePiece-like tokenizers (Kudo 2018, arXiv 1804.10959)."""

    def __init__(self, source: Source):
        super().__init__(source)
        self.scores = [score for _, score in self.model["vocab"]]
        self.lowest = lowest_score(self.model)
        # A selection asks for the same pieces in every round.
        self._parts: dict[str, list[int]] = {}
        # Their scores are no measure of what they cost.
        self.without_score = {
            index
            for index, (piece, _) in enumerate(self.model["vocab"])
            if index == self.model["unk_id"] or (self.model.get("byte_fallback") and is_byte_piece(piece))
        }

    def trained_pieces(self, sentences: Iterable[str], size: int, characters: list[str]) -> list[str]:
        trainer = trainers.UnigramTrainer(vocab_size=size + len(characters))
        return list(self._train(models.Unigram(), trainer, sentences))

    def can_be_added(self, piece: str) -> bool:
        return super().can_be_added(piece) and is_of_one_kind(piece)

    def old_parts(self, pieces: Sequence[str]) -> list[list[int]]:
        unseen = [piece for piece in pieces if piece not in self._parts]
        self._parts.update(zip(unseen, (found.ids for found in self.segment(unseen))))
        return [self._parts[piece] for piece in pieces]

    def extended(self, pieces: Sequence[str]) -> dict[str, Any]:
        vocabulary = list(self.model["vocab"])
        for content, token_id in self._added_tokens():
            if token_id != len(vocabulary):
                raise XLFAError(f"the tokenizer has no token {len(vocabulary)}: its vocabulary cannot be augmented")
            vocabulary.append([content, self.lowest])
        if pieces:
            vocabulary += [[piece, self._score(parts)] for piece, parts in zip(pieces, self.old_parts(pieces))]
        return {**self.model, "vocab": vocabulary}

    def _score(self, parts: list[int]) -> float:
        if not self.without_score.isdisjoint(parts):
            return self.lowest
        return max(self.lowest, sum(self.scores[part] for part in parts) + MERGE_BONUS * (len(parts) - 1))


class WordPieceModel(PieceModel):
    """The model of BERT's tokenizer: the longest piece from the left, the unknown token for the whole word if none."""

    @property
    def prefix(self) -> str:
        """What pieces inside a word begin with."""
        return self.model["continuing_subword_prefix"]

    def trained_pieces(self, sentences: Iterable[str], size: int, characters: list[str]) -> list[str]:
        # The trainer numbers the characters inside words in the order of a hash table that differs from run to run, and
        # decides ties by number (tokenizers issue 1794). Given as special tokens, they have fixed numbers.
        inside = [self.prefix + character for character in characters]
        trainer = trainers.WordPieceTrainer(
            vocab_size=size + 2 * len(characters),
            limit_alphabet=len(characters),
            special_tokens=inside,
            continuing_subword_prefix=self.prefix,
        )
        return list(self._train(models.WordPiece(unk_token=self.model["unk_token"]), trainer, sentences))

    def old_parts(self, pieces: Sequence[str]) -> list[list[int]]:
        at_start = [piece for piece in pieces if not piece.startswith(self.prefix)]
        inside = [piece.removeprefix(self.prefix) for piece in pieces if piece.startswith(self.prefix)]
        parts = dict(zip(at_start, (found.ids for found in self.segment(at_start))))
        tokenizer = bare_tokenizer(self._inside_words())
        for piece, encoding in zip(inside, tokenizer.encode_batch(inside, add_special_tokens=False)):
            parts[self.prefix + piece] = encoding.ids
        return [parts[piece] for piece in pieces]

    def _inside_words(self) -> dict[str, Any]:
        """The model of the pieces that stand inside words, as if words began there."""
        vocabulary = {
            piece.removeprefix(self.prefix): token_id
            for piece, token_id in self.model["vocab"].items()
            if piece.startswith(self.prefix)
        }
        unknown = self.model["unk_token"]
        vocabulary[unknown] = self.model["vocab"][unknown]
        return {**self.model, "continuing_subword_prefix": "", "vocab": vocabulary}

    def extended(self, pieces: Sequence[str]) -> dict[str, Any]:
        new = {piece: self.first_id + position for position, piece in enumerate(pieces)}
        return {**self.model, "vocab": {**self.model["vocab"], **dict(self._added_tokens()), **new}}


def bare_tokenizer(model: dict[str, Any]) -> Tokenizer:
    """The piece model of a `tokenizer.json` alone: it takes words as they come out of the pre-tokenizer."""
    return Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def is_of_one_kind(piece: str) -> bool:
    """Whether it is all letters or has none, and lies in one word: SentencePiece trains such pieces alone."""
    text = piece.removeprefix(WORD_BOUNDARY)
    kinds = {unicodedata.category(character)[0] in "LM" for character in text}
    return len(kinds) == 1 and WORD_BOUNDARY not in text


def is_byte_piece(piece: str) -> bool:
    """Whether it stands for a byte of a character that has no piece, as `<0xE2>` does."""
    return re.fullmatch("<0x[0-9A-F]{2}>", piece) is not None
