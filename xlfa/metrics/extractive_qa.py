"""F1 and exact match of extractive question answering, with the two normalisers of the field."""

import collections
import functools
import re
import string
import sys
import unicodedata

import datasets
import evaluate

_DESCRIPTION = """
F1 and exact match from 0 to 100, the best over each question's answers, averaged over questions. `f1` and `exact_match`
use SQuAD's English normaliser in every language, as XTREME scores XQuAD; `f1_mlqa` and `exact_match_mlqa` use the
normaliser of the language from MLQA, and are None for a language that MLQA does not have.
"""
_INPUTS = """
predictions: list of answer texts. references: list of lists of right answers, at least one each. language: ISO 639-1.
"""
_CITATION = """
Rajpurkar et al. 2016, SQuAD (arXiv 1606.05250); Lewis et al. 2020, MLQA (arXiv 1910.07475); Hu et al. 2020, XTREME
(arXiv 2003.11080)
"""

# MLQA takes every character of Unicode's punctuation categories, SQuAD only ASCII's.
UNICODE_PUNCTUATION = {
    chr(code) for code in range(sys.maxunicode) if unicodedata.category(chr(code)).startswith("P")
} | set(string.punctuation)

# The articles that MLQA removes, as regular expressions, in the languages it has. The Arabic pattern is MLQA's own.
MLQA_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "hi": None,
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": r"\sال^|ال",
    "zh": None,
}


class ExtractiveQA(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions, references, language="en"):
        result = {"f1_mlqa": None, "exact_match_mlqa": None}
        for name, values in question_scores(predictions, references, language).items():
            result[name] = 100.0 * sum(values) / len(values)
        return result


def question_scores(predictions, references, language):
    """Score → its value for each question, 0 to 1: the best over the question's answers.

    MLQA's scores are there only in the languages that MLQA has.
    """
    normalizers = {"": normalize_squad}
    if language in MLQA_ARTICLES:
        normalizers["_mlqa"] = functools.partial(normalize_mlqa, language=language)
    scores = {}
    for suffix, normalize in normalizers.items():
        f1, exact = scores[f"f1{suffix}"], scores[f"exact_match{suffix}"] = [], []
        for prediction, answers in zip(predictions, references):
            prediction = normalize(prediction)
            answers = [normalize(answer) for answer in answers]
            f1.append(max(f1_score(prediction, answer) for answer in answers))
            exact.append(float(prediction in answers))
    return scores


def normalize_squad(text):
    """SQuAD v1.1: lower case, no ASCII punctuation, no English articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def normalize_mlqa(text, language):
    """MLQA v1: lower case, no Unicode punctuation, no articles of the language, Chinese cut into characters."""
    text = "".join(character for character in text.lower() if character not in UNICODE_PUNCTUATION)
    if MLQA_ARTICLES[language] is not None:
        text = re.sub(MLQA_ARTICLES[language], " ", text)
    if language == "zh":
        text = re.sub(r"([\u4e00-\u9fa5])", r" \1 ", text)
    return " ".join(text.split())


def f1_score(prediction, answer):
    """Harmonic mean of token precision and recall; both arguments are normalised."""
    predicted, right = prediction.split(), answer.split()
    common = sum((collections.Counter(predicted) & collections.Counter(right)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(right)
    return 2 * precision * recall / (precision + recall)
