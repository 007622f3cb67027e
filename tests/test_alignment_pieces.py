"""Pieces of three kinds of tokenizers, each with its word: nothing of the tokenizer's own is among them."""

import numpy as np
import pytest
from alignment_data import SENTENCES, TEXTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xlfa.alignment.pieces import encode_sentence
from xlfa.backbones import resolve_encoder
from xlfa.errors import XLFAError

SPECIAL = ["</s>", "<pad>", "[CLS]", "[SEP]", "<mask>", "▁"]
sentences = st.lists(TEXTS | st.sampled_from(SPECIAL), max_size=6).map(" ".join)


@pytest.fixture(scope="module")
def characters(tiny_encoder):
    """One piece a character, most of them unknown."""
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture(scope="module")
def byte_pairs():
    """Byte-level BPE: pieces are parts of characters, and begin with the space before a word."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([text for text, _ in SENTENCES.values()] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def sentence_pieces():
    return AutoTokenizer.from_pretrained(resolve_encoder("packaged:multilingual-e5-small"))


def check_pieces(tokenizer, text):
    try:
        encoded = encode_sentence(text, None, tokenizer, max_length=10_000)
    except XLFAError as error:
        assert "no word" in str(error) or "no piece" in str(error)
        return
    assert encoded.input_ids == tokenizer(text, split_special_tokens=True)["input_ids"]
    for piece, index in zip(encoded.pieces, encoded.word_of_piece, strict=True):
        assert piece.strip() and piece in encoded.words[index].text
    order = list(zip(encoded.word_of_piece, encoded.positions))
    assert order == sorted(set(order))
    # The first and the last token are the tokenizer's.
    assert encoded.positions.min() > 0 and encoded.positions.max() < len(encoded.input_ids) - 1
    masses = np.bincount(encoded.positions, encoded.marginal)
    np.testing.assert_allclose(masses[masses > 0], 1 / np.count_nonzero(masses))


# The fixtures are tokenizers that no example changes.
many = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(text=sentences)
def test_pieces_of_characters(characters, text):
    check_pieces(characters, text)


@many
@given(text=sentences)
def test_pieces_of_bytes(byte_pairs, text):
    check_pieces(byte_pairs, text)


@pytest.mark.offline
@many
@given(text=sentences)
def test_pieces_of_sentence_pieces(sentence_pieces, text):
    check_pieces(sentence_pieces, text)


@pytest.mark.offline
def test_a_lone_mark_is_no_piece_and_a_piece_in_two_words_is_shared(sentence_pieces):
    encoded = encode_sentence("แมวนั่งอยู่บน พรม", "th", sentence_pieces, 512)
    assert sentence_pieces.convert_ids_to_tokens(encoded.input_ids) == [
        *("<s>", "▁", "แมว", "นั่ง", "อยู่บน", "▁", "พรม", "</s>")
    ]
    assert [word.text for word in encoded.words] == ["แมว", "นั่ง", "อยู่", "บน", "พรม"] == encoded.pieces
    assert encoded.positions.tolist() == [2, 3, 4, 4, 6]
    assert encoded.marginal.tolist() == [1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 4]


@pytest.mark.offline
def test_characters_that_normalisation_changes_keep_their_words(sentence_pieces):
    encoded = encode_sentence("ﬁne ½ ｆｕｌｌ e\u0301t\u200be", None, sentence_pieces, 512)
    assert encoded.pieces[:3] == ["ﬁne", "½", "ｆｕｌｌ"]
    assert encoded.word_of_piece[:3].tolist() == [0, 1, 2]


def test_words_that_are_given_are_not_split_again(characters):
    encoded = encode_sentence(["don't", "e-mail"], "en", characters, 512)
    assert [word.text for word in encoded.words] == ["don't", "e-mail"]
    assert encoded.word_of_piece.tolist() == [0] * 5 + [1] * 6


def test_what_the_user_writes_is_no_special_token(characters):
    encoded = encode_sentence("a [SEP] b", None, characters, 512)
    assert encoded.input_ids.count(characters.sep_token_id) == 1
    assert "".join(encoded.pieces) == "a[SEP]b"


def test_long_sentences_are_not_cut(characters):
    assert len(encode_sentence("a" * 18, None, characters, 20).pieces) == 18
    with pytest.raises(XLFAError, match="21 tokens .* more than 20"):
        encode_sentence("a" * 19, None, characters, 20)
