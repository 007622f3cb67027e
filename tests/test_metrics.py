"""The metrics against values worked out by hand, and against what the published evaluation scripts do, on any text."""

from functools import partial
from pathlib import Path

import evaluate
import pytest
import reference_metrics as reference
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

import xlfa.metrics
from xlfa.metrics.extractive_qa import MLQA_ARTICLES, f1_score, normalize_mlqa, normalize_squad, question_scores

FOLDER = Path(xlfa.metrics.__file__).parent


@pytest.fixture(scope="module")
def accuracy():
    return evaluate.load(str(FOLDER / "accuracy.py"))


@pytest.fixture(scope="module")
def extractive_qa():
    return evaluate.load(str(FOLDER / "extractive_qa.py"))


def score(metric, prediction, answers, language="en"):
    return metric.compute(predictions=[prediction], references=[answers], language=language)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Quick, brown\tfox!", "quick brown fox"),
        ("An apple a day", "apple day"),
        ("theatre and banana", "theatre and banana"),
        ("U.S.A. (1887)", "usa 1887"),
        ("it's the-end", "its theend"),
        ("the", ""),
        ("", ""),
        # Only ASCII punctuation goes, and only English articles.
        ("“Der Markt” – 50 %", "“der markt” – 50"),
        ("鱼市场。", "鱼市场。"),
        ("ตลาดปลา ในเมือง", "ตลาดปลา ในเมือง"),
        ("السوق، ١٨٨٧", "السوق، ١٨٨٧"),
        ("मछली बाज़ार।", "मछली बाज़ार।"),
    ],
)
def test_squad_normaliser(text, expected):
    assert normalize_squad(text) == expected


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "“The” Quick – an answer’s end", "quick answers end"),
        ("es", "¿El mercado de la ciudad, una Plaza?", "mercado de ciudad plaza"),
        ("es", "unos elefantes", "elefantes"),
        ("de", "Der Markt „am“ des Kaisers, eine derbe Art", "markt am kaisers derbe art"),
        ("de", "Dem Einen einem", ""),
        ("vi", "Những con cá của làng là cái gì?", "con cá làng gì"),
        ("hi", "मछली बाज़ार। १८८७", "मछली बाज़ार १८८७"),
        ("hi", "The answer", "the answer"),
        # MLQA's pattern takes the article off anywhere, also inside words, and leaves a space for it.
        ("ar", "السوق القديم، ١٨٨٧؟", "سوق قديم ١٨٨٧"),
        ("ar", "والسوق", "و سوق"),
        ("zh", "鱼市场，1887年 Tobias Arn。", "鱼 市 场 1887 年 tobias arn"),
        ("zh", "《论语》abc中", "论 语 abc 中"),
        ("zh", "the 的", "the 的"),
    ],
)
def test_mlqa_normaliser(language, text, expected):
    assert normalize_mlqa(text, language) == expected


def test_mlqa_normaliser_knows_the_seven_languages_of_mlqa():
    assert set(MLQA_ARTICLES) == {"en", "es", "hi", "vi", "de", "ar", "zh"}


def test_mlqa_normaliser_takes_unicode_and_ascii_punctuation():
    assert normalize_mlqa("a$b+c¿d…e—f\u3001g·h", "hi") == "abcdefgh"


def test_f1_counts_repeated_tokens_as_often_as_both_have_them():
    # 2 of 3 predicted tokens, 2 of 4 right ones.
    assert f1_score("cat cat dog", "cat cat fish bird") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))


# What normalisers look at: articles and words that hold them, scripts, digits, marks and spaces of several kinds.
CHARACTERS = "aA1_-'.,“”¿।؟、。鱼一龥éßİ² \t\u00a0\u3000\n\ufeff\u200d"
WORDS = "the The an der Dem la unos của là theatre derbe ال سوق 市场 मछली ตลาด".split()
PIECES = st.sampled_from([*CHARACTERS, *WORDS, "e\u0301"])
TEXT = st.lists(PIECES, max_size=8).map("".join)


@given(prediction=TEXT, answers=st.lists(TEXT, min_size=1), language=st.sampled_from([*MLQA_ARTICLES, "th"]))
def test_scores_are_those_of_the_published_scripts(prediction, answers, language):
    found = question_scores([prediction], [answers], language)
    tokens = {"": reference.squad_tokens}
    if language in MLQA_ARTICLES:
        tokens["_mlqa"] = partial(reference.mlqa_tokens, language=language)
    assert found == {
        name + suffix: [published(prediction, answers, own)]
        for suffix, own in tokens.items()
        for name, published in (("f1", reference.f1), ("exact_match", reference.exact_match))
    }


@given(pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1))
def test_accuracy_is_that_of_scikit_learn(accuracy, pairs):
    predictions, references = zip(*pairs)
    found = accuracy.compute(predictions=predictions, references=references)
    assert found["accuracy"] == pytest.approx(100 * accuracy_score(references, predictions))


def test_a_right_answer_scores_100_by_every_score(extractive_qa):
    assert score(extractive_qa, "The year 1887.", ["year 1887"]) == {
        "f1": 100.0,
        "exact_match": 100.0,
        "f1_mlqa": 100.0,
        "exact_match_mlqa": 100.0,
    }


def test_the_best_of_several_answers_counts(extractive_qa):
    result = score(extractive_qa, "in 1887", ["the nineteenth century", "1887", "year 1887 or so"])
    assert result["f1"] == pytest.approx(100 * 2 / 3)
    assert result["exact_match"] == 0.0
    assert score(extractive_qa, "in 1887", ["1887", "in 1887"])["exact_match"] == 100.0


def test_scores_are_means_over_questions(extractive_qa):
    result = extractive_qa.compute(
        predictions=["blue fish", "green", "goat cheese"],
        references=[["blue fish"], ["red"], ["cheese"]],
        language="en",
    )
    assert result["f1"] == pytest.approx((100 + 0 + 200 / 3) / 3)
    assert result["exact_match"] == pytest.approx(100 / 3)


def test_an_empty_prediction_scores_zero(extractive_qa):
    assert set(score(extractive_qa, "", ["1887"]).values()) == {0.0}


def test_an_answer_that_is_an_article_matches_an_empty_prediction_exactly_but_has_no_f1(extractive_qa):
    assert score(extractive_qa, "", ["the"]) == {
        "f1": 0.0,
        "exact_match": 100.0,
        "f1_mlqa": 0.0,
        "exact_match_mlqa": 100.0,
    }


def test_thai_is_one_token_and_has_no_mlqa_score(extractive_qa):
    result = score(extractive_qa, "พ่อค้าชื่อโทเบียส", ["โทเบียส"], "th")
    assert result == {"f1": 0.0, "exact_match": 0.0, "f1_mlqa": None, "exact_match_mlqa": None}
    assert score(extractive_qa, "โทเบียส", ["โทเบียส"], "th")["f1"] == 100.0


def test_digits_of_other_scripts_are_not_ascii_digits(extractive_qa):
    for language, digits in (("ar", "١٨٨٧"), ("hi", "१८८७")):
        assert set(score(extractive_qa, digits, [digits], language).values()) == {100.0}
        assert set(score(extractive_qa, digits, ["1887"], language).values()) == {0.0}


def test_chinese_is_cut_into_characters_by_mlqa_alone(extractive_qa):
    result = score(extractive_qa, "鱼市场", ["市场"], "zh")
    assert result["f1"] == 0.0
    assert result["f1_mlqa"] == pytest.approx(100 * 2 * (2 / 3) * 1 / (2 / 3 + 1))


def test_the_article_of_another_language_is_kept_by_squad_and_dropped_by_mlqa(extractive_qa):
    result = score(extractive_qa, "der Markt", ["Markt"], "de")
    assert (result["exact_match"], result["exact_match_mlqa"]) == (0.0, 100.0)
    assert result["f1"] == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("predictions", "expected"), [([0, 1, 2], 100.0), ([0, 1, 1], 200 / 3), ([0, 0, 0], 100 / 3), ([2, 0, 1], 0.0)]
)
def test_accuracy_is_from_0_to_100(accuracy, predictions, expected):
    result = accuracy.compute(predictions=predictions, references=[0, 1, 2])
    assert result == {"accuracy": pytest.approx(expected), "majority_rate": pytest.approx(100 / 3)}
