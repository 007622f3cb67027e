"""Sentences as a tokenizer's pieces, each with the word that it belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from xlfa.alignment.words import Word, pretokenised, split_words
from xlfa.errors import XLFAError

# Text that is split into words, or words that were split before.
SentenceOrWords = str | Sequence[str]
# SentencePiece's mark of a word's beginning. Alone, it is a piece whose offsets are those of the next one.
WORD_MARK = "▁"


@dataclass(frozen=True)
class EncodedSentence:
    """A sentence as the model reads it, and the pieces of its words.

    Attributes:
        words: in order; one whose characters the tokenizer leaves out has no piece.
        input_ids: of the whole sentence, special tokens included.
        pieces: the characters of the sentence that each piece stands for.
        word_of_piece: index of each piece's word. A piece that reaches into several words is there once for each.
        positions: of the pieces in `input_ids`.
    """

    words: list[Word]
    input_ids: list[int]
    pieces: list[str]
    word_of_piece: np.ndarray
    positions: np.ndarray

    @property
    def marginal(self) -> np.ndarray:
        """Mass of each piece, alike for all of the tokenizer's; parts of the same one share its mass. Sums to 1."""
        _, piece, parts = np.unique(self.positions, return_inverse=True, return_counts=True)
        return 1 / (parts[piece] * len(parts))


def encode_sentence(
    sentence: SentenceOrWords, language: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedSentence:
    """The words and pieces of a sentence, without a prefix such as E5's "query: ".

    Raises:
        XLFAError: for a sentence without a word, or with more than `max_length` tokens: none is cut.
    """
    if isinstance(sentence, str):
        text, words = sentence, split_words(sentence, language)
    else:
        text, words = pretokenised(sentence, language)
    if not words:
        raise XLFAError(f"no word in {text!r}")
    # What the user wrote is text, also where it reads like a special token.
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, split_special_tokens=True)
    if len(encoded["input_ids"]) > max_length:
        raise XLFAError(
            f"{len(encoded['input_ids'])} tokens in {text[:40]!r}…, more than {max_length}, and none is cut: split it "
            "into sentences"
        )
    found = []
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    marks = zip(tokens, encoded["offset_mapping"], encoded["special_tokens_mask"])
    for position, (token, (start, end), is_special) in enumerate(marks):
        if is_special or token == WORD_MARK:
            continue
        for index, word in _words_within(words, start, end):
            found.append((text[max(start, word.start) : min(end, word.end)], index, position))
    if not found:
        raise XLFAError(f"the model's tokenizer has no piece for any word of {text!r}")
    pieces, word_of_piece, positions = zip(*found)
    return EncodedSentence(words, encoded["input_ids"], list(pieces), np.array(word_of_piece), np.array(positions))


def _words_within(words: list[Word], start: int, end: int) -> list[tuple[int, Word]]:
    """The words, with their indices, that have a character in start:end."""
    return [(index, word) for index, word in enumerate(words) if word.start < end and start < word.end]
