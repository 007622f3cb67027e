"""SQuAD's and MLQA's scores, written step by step after what their published scripts do, to compare ours with.

SQuAD: evaluate-v1.1.py (Rajpurkar et al. 2016); MLQA: mlqa_evaluation_v1.py (Lewis et al. 2020).
"""

import re
import string
import unicodedata

ARTICLES = {
    "en": ["a", "an", "the"],
    "es": ["un", "una", "unos", "unas", "el", "la", "los", "las"],
    "hi": [],
    "vi": ["của", "là", "cái", "chiếc", "những"],
    "de": ["ein", "eine", "einen", "einem", "eines", "einer", "der", "die", "das", "den", "dem", "des"],
    "zh": [],
}


def squad_tokens(text):
    kept = [character for character in text.lower() if character not in string.punctuation]
    return without_words("".join(kept), ARTICLES["en"]).split()


def mlqa_tokens(text, language):
    kept = ""
    for character in text.lower():
        if character not in string.punctuation and not unicodedata.category(character).startswith("P"):
            kept += character
    # Of Arabic the script takes "al" anywhere, in words too.
    kept = kept.replace("ال", " ") if language == "ar" else without_words(kept, ARTICLES[language])
    if language != "zh":
        return kept.split()
    tokens, word = [], ""
    for character in kept:
        if "\u4e00" <= character <= "\u9fa5":
            tokens += [*word.split(), character]
            word = ""
        else:
            word += character
    return tokens + word.split()


def without_words(text, words):
    """With a space in place of each whole word, as `re` tells words."""
    parts = re.split(r"(\w+)", text)
    return "".join(" " if part in words else part for part in parts)


def exact_match(prediction, answers, tokens):
    return max(float(tokens(prediction) == tokens(answer)) for answer in answers)


def f1(prediction, answers, tokens):
    return max(f1_of_one(tokens(prediction), tokens(answer)) for answer in answers)


def f1_of_one(predicted, right):
    rest, common = list(right), 0
    for token in predicted:
        if token in rest:
            rest.remove(token)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(right)
    return 2 * precision * recall / (precision + recall)
