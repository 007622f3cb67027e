"""The tagging metric against seqeval, whose scores XTREME reports, and against counts by hand."""

import random
import warnings
from pathlib import Path

import evaluate
import pytest

import xlfa.metrics
from xlfa.metrics.tagging import count_tags, spans
from xlfa.tasks import get_task

ENTITY_TAGS, POS_TAGS = get_task("wikiann").label_names, get_task("udpos").label_names
# Prefixes and tags that the tasks do not use, but seqeval reads.
OTHER_TAGS = ("O", "B-PER", "I-PER", "E-PER", "S-PER", "I-LOC-X", "B", "I", "E", "S", ".", "X")


@pytest.fixture(scope="module")
def tagging():
    return evaluate.load(str(Path(xlfa.metrics.__file__).parent / "tagging.py"))


@pytest.fixture(scope="module")
def seqeval():
    pytest.importorskip("seqeval", reason='the extra "test" is not installed (seqeval)')
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    def score(predictions, references):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It warns of tags without a prefix and of 0/0.
            named = {
                "f1": f1_score,
                "precision": precision_score,
                "recall": recall_score,
                "accuracy": accuracy_score,
            }
            return {name: 100 * function(references, predictions) for name, function in named.items()}

    return score


def random_sentences(tags, seed, missing=False):
    """References, and predictions of which about two thirds are right and, where asked for, some are missing."""
    draw = random.Random(seed)
    references = [[draw.choice(tags) for _ in range(draw.randint(1, 12))] for _ in range(40)]
    wrong = (*tags, None) if missing else tags
    predictions = [[tag if draw.random() < 0.6 else draw.choice(wrong) for tag in row] for row in references]
    return predictions, references


@pytest.mark.parametrize("tags", [ENTITY_TAGS, POS_TAGS, OTHER_TAGS], ids=["entities", "parts of speech", "others"])
@pytest.mark.parametrize("seed", range(8))
def test_scores_are_those_of_seqeval(tagging, seqeval, tags, seed):
    predictions, references = random_sentences(tags, seed)
    result = tagging.compute(predictions=predictions, references=references)
    assert result.pop("missed_words") == 0.0
    assert result == pytest.approx(seqeval(predictions, references))


@pytest.mark.parametrize("tags", [ENTITY_TAGS, POS_TAGS], ids=["entities", "parts of speech"])
def test_a_missed_word_is_outside_for_seqeval(tagging, seqeval, tags):
    predictions, references = random_sentences(tags, 0, missing=True)
    result = tagging.compute(predictions=predictions, references=references)
    assert result.pop("missed_words") > 0.0
    filled = [[tag or "O" for tag in row] for row in predictions]
    assert result == pytest.approx(seqeval(filled, references))


@pytest.mark.shared
@pytest.mark.parametrize(("task", "language"), [("wikiann", "sw"), ("udpos", "vi")])
def test_scores_on_real_tags_are_those_of_seqeval(tagging, seqeval, mirror, task, language):
    task = get_task(task)
    rows = task.load_test(language, mirror)
    references = [[task.label_names[tag] for tag in tags] for tags in rows[task.tag_column]]
    draw = random.Random(0)
    predictions = [[tag if draw.random() < 0.8 else draw.choice(task.label_names) for tag in row] for row in references]
    result = tagging.compute(predictions=predictions, references=references)
    del result["missed_words"]
    assert result == pytest.approx(seqeval(predictions, references))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["B-PER", "I-PER", "O", "B-LOC"], {("PER", 0, 1), ("LOC", 3, 3)}),
        (["B-PER", "B-PER"], {("PER", 0, 0), ("PER", 1, 1)}),
        # As conlleval: an I after another type, or after O, begins a span.
        (["O", "I-ORG", "I-LOC"], {("ORG", 1, 1), ("LOC", 2, 2)}),
        (["O", "O"], set()),
        # Neighbours with the same part of speech are one span, but for tags that begin with S.
        (["NOUN", "NOUN", "VERB"], {("OUN", 0, 1), ("ERB", 2, 2)}),
        (["SYM", "SYM"], {("YM", 0, 0), ("YM", 1, 1)}),
        # X reads as a tag without a type, like O: nothing ends it at the end of a sentence.
        (["NOUN", "X"], {("OUN", 0, 0)}),
    ],
)
def test_spans_of_a_sentence(tags, expected):
    assert spans([tags]) == expected


def test_a_span_ends_with_its_sentence():
    assert spans([["B-PER"], ["I-PER"]]) == {("PER", 0, 0), ("PER", 2, 2)}


def test_half_right_spans_by_hand(tagging):
    result = tagging.compute(
        predictions=[["B-PER", "I-PER", "O", "B-LOC"], [None]], references=[["B-PER", "I-PER", "O", "O"], ["B-ORG"]]
    )
    # One of two predicted spans is right, and one of two true ones is found.
    assert result == {"f1": 50.0, "precision": 50.0, "recall": 50.0, "accuracy": 60.0, "missed_words": 20.0}


def test_without_spans_the_scores_are_zero(tagging):
    result = tagging.compute(predictions=[["O"]], references=[["O"]])
    assert (result["f1"], result["precision"], result["recall"], result["accuracy"]) == (0.0, 0.0, 0.0, 100.0)


def test_counts_are_those_of_each_sentence():
    predictions = [["B-PER", "O"], ["B-LOC", None, "O"]]
    references = [["B-PER", "O"], ["B-ORG", "I-ORG", "B-PER"]]
    counts = count_tags(predictions, references)
    assert counts["f1"] == [(2, 2), (0, 3)]
    assert counts["recall"] == [(1, 1), (0, 2)]
    assert counts["accuracy"] == [(2, 2), (0, 3)]
    assert counts["missed_words"] == [(0, 2), (1, 3)]
