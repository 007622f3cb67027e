"""Words and their offsets, in scripts with spaces and without, and what is none."""

import sys
import unicodedata

import pytest
from alignment_data import SENTENCES, TEXTS
from hypothesis import given

from xlfa.alignment.words import Word, pretokenised, split_words
from xlfa.errors import XLFAError


@pytest.mark.parametrize("language", SENTENCES)
def test_words_of_a_language_with_and_without_its_code(language):
    text, expected = SENTENCES[language]
    assert [word.text for word in split_words(text, language)] == expected
    assert split_words(text) == split_words(text, language)


def test_offsets_count_characters_also_behind_emoji():
    family = "👩‍👩‍👧‍👦"
    assert split_words(f"{family}👍🏽 hi  אבג!") == [
        Word(family, 0, 7),
        Word("👍🏽", 7, 9),
        Word("hi", 10, 12),
        Word("אבג", 14, 17),
        Word("!", 17, 18),
    ]


@pytest.mark.parametrize("text", ["", "  \t\n", "\u200b\u200f\u2066", "\x00\x07"])
def test_what_cannot_be_seen_is_no_word(text):
    assert split_words(text) == []


@given(TEXTS)
def test_every_visible_character_is_in_exactly_one_word(text):
    words = split_words(text)
    assert all(text[word.start : word.end] == word.text == word.text.strip() for word in words)
    covered = [place for word in words for place in range(word.start, word.end)]
    assert covered == sorted(set(covered))
    outside = set(range(len(text))) - set(covered)
    # Not all of Unicode's other ones (C): Python may not know yet what is new, and private ones are somebody's letters.
    assert all(unicodedata.category(text[place]) in ("Zs", "Zl", "Zp", "Cc", "Cf", "Cs") for place in outside)


@pytest.mark.parametrize("character", ["\U0001fae8", "\ue000", "\U0001faff"])
def test_an_emoji_that_python_does_not_know_is_a_word(character):
    assert [word.text for word in split_words(f"{character} a")] == [character, "a"]


@pytest.mark.parametrize("language", ["english", "EN", "de-DE", ""])
def test_a_language_that_is_no_code(language):
    with pytest.raises(XLFAError, match="ISO 639-1"):
        split_words("a", language)


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(XLFAError, match="not valid Unicode at character 2"):
        split_words("ab\udcff")


def test_without_icu_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "icu4py.breakers", None)
    with pytest.raises(XLFAError, match=r'pip install "xlfa\[align\]"'):
        split_words("a")
    assert pretokenised(["a", "b"]) == ("a b", [Word("a", 0, 1), Word("b", 2, 3)])


@pytest.mark.parametrize("language", SENTENCES)
def test_given_words_are_joined_as_their_script_is_written(language):
    words = SENTENCES[language][1]
    text, placed = pretokenised(words, language)
    assert [word.text for word in placed] == words
    assert all(text[word.start : word.end] == word.text for word in placed)
    assert (" " in text) == (language in ("en", "ar", "hi"))
    assert pretokenised(words) == (text, placed)


def test_numbers_and_latin_words_keep_their_space_in_chinese():
    for language in ("zh", "zho", None):
        assert pretokenised(["我", "有", "iPhone", "15", "。"], language)[0] == "我有iPhone 15。"


def test_one_character_of_an_unspaced_script_joins_no_other_words():
    assert pretokenised(["слово", "猫", "значит", "кошка", "."])[0] == "слово猫значит кошка ."
    assert pretokenised(["слово", "猫", "значит"], "ru")[0] == "слово 猫 значит"


@pytest.mark.parametrize("words", [["a", ""], ["a", " "], ["a", "\u200b"]])
def test_an_empty_given_word_is_an_error(words):
    with pytest.raises(XLFAError, match="word 2 of"):
        pretokenised(words)
