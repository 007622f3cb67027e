"""Tags stand at the first piece of each word, words without a prediction count as missed, and bad rows are refused."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoTokenizer

from xlfa.arguments import DataArguments, ModelArguments, XLFATrainingArguments
from xlfa.errors import XLFAError
from xlfa.evaluation import EvaluationArguments, evaluate_model
from xlfa.tasks import Prediction, get_task
from xlfa.tasks.token_classification import NOT_SCORED, marks_spaces
from xlfa.training import train

TASK, POS = get_task("wikiann"), get_task("udpos")
FEATURES = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=list(TASK.label_names)))})
ROWS = Dataset.from_list(
    [
        {"tokens": ["anna", "lee", "saw", "rome"], "ner_tags": [1, 2, 0, 5]},
        {"tokens": ["in", "", "un"], "ner_tags": [0, 0, 3]},
    ],
    FEATURES,
)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def tokenizer(tiny_encoder):
    """One token a character."""
    return AutoTokenizer.from_pretrained(tiny_encoder)


def logits_of(windows, tags, peak=20.0):
    """Outputs of a model that is sure of a tag for each word; the other pieces get another one."""
    length = max(len(window["input_ids"]) for window in windows)
    logits = torch.zeros(len(windows), length, len(TASK.label_names))
    logits[:, :, 4] = peak
    for row, window in enumerate(windows):
        for piece, tag in zip(window["first_pieces"], tags[row]):
            if piece is not None:
                logits[row, piece] = 0.0
                logits[row, piece, tag] = peak
    return SimpleNamespace(logits=logits)


def predict(tokenizer, rows, max_length, tags=None):
    windows = TASK.windows(rows, tokenizer, max_length, 0)
    readings = TASK.read_outputs(logits_of(windows, rows["ner_tags"] if tags is None else tags), {}, {}).numpy()
    return TASK.predictions(rows, TASK.example_ids(rows), windows, readings)


def test_labels_stand_at_the_first_piece_of_each_word(tokenizer):
    features = TASK.training_features(ROWS, tokenizer, 64, 0)
    assert "".join(tokenizer.convert_ids_to_tokens(features[0]["input_ids"])) == "[CLS]annaleesawrome[SEP]"
    scored = {place: label for place, label in enumerate(features[0]["labels"]) if label != NOT_SCORED}
    assert scored == {1: 1, 5: 2, 8: 0, 11: 5}
    assert [label for label in features[1]["labels"] if label != NOT_SCORED] == [0, 3]
    assert set(features.column_names) <= {"input_ids", "attention_mask", "token_type_ids", "length", "labels"}


def test_scoring_reads_the_same_inputs_as_training(tokenizer):
    windows = TASK.windows(ROWS, tokenizer, 64, 0)
    assert [window["input_ids"] for window in windows] == TASK.training_features(ROWS, tokenizer, 64, 0)["input_ids"][:]
    assert [window["first_pieces"] for window in windows] == [[1, 5, 8, 11], [1, None, 3]]


def test_a_batch_is_padded_with_labels_that_are_not_scored(tokenizer):
    features = TASK.training_features(ROWS, tokenizer, 64, 0)
    batch = TASK.collator(tokenizer)([dict(feature) for feature in features])
    assert batch["input_ids"].shape == batch["labels"].shape
    assert (batch["labels"][1, len(features[1]["labels"]) :] == NOT_SCORED).all()


def test_the_tag_of_the_first_piece_is_predicted_with_the_mean_probability(tokenizer):
    first, second = predict(tokenizer, ROWS, 64)
    assert first == Prediction("0", ["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "I-PER", "O", "B-LOC"], first.score)
    assert first.score == pytest.approx(1.0, abs=1e-3)
    assert (second.prediction, second.label) == (["O", None, "B-ORG"], ["O", "O", "B-ORG"])


def test_words_behind_the_limit_are_missed_and_reported(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        # Room for eight characters: "anna", "lee", and the first of "saw".
        first, second = predict(tokenizer, ROWS, 10)
    assert "wikiann, limit of 10 tokens: 2 words are missed: behind the limit" in caplog.text
    assert first.prediction == ["B-PER", "I-PER", "O", None]
    scores = TASK.score([first, second], "de")
    assert scores == {
        "f1": pytest.approx(80.0),
        "precision": 100.0,
        "recall": pytest.approx(200 / 3),
        "missed_words": pytest.approx(100 * 2 / 7),
    }


def test_a_missed_part_of_speech_is_wrong():
    predictions = [Prediction("0", ["NOUN", None], ["NOUN", "VERB"], 0.9)]
    assert POS.score(predictions, "de") == {"f1": pytest.approx(200 / 3), "accuracy": 50.0, "missed_words": 50.0}


def test_a_word_longer_than_the_limit_is_predicted_from_its_first_piece(tokenizer):
    rows = Dataset.from_list([{"tokens": ["a" * 50, "b"], "ner_tags": [1, 5]}], FEATURES)
    assert predict(tokenizer, rows, 10)[0].prediction == ["B-PER", None]


def test_a_sentence_without_a_piece_is_missed_and_not_trained_on(tokenizer):
    rows = Dataset.from_list([{"tokens": ["", " "], "ner_tags": [1, 0]}, *ROWS], FEATURES)
    assert predict(tokenizer, rows, 64)[0] == Prediction("0", [None, None], ["B-PER", "O"], 0.0)
    assert len(TASK.training_features(rows, tokenizer, 64, 0)) == 2
    with pytest.raises(XLFAError, match="no training sentence of the task 'wikiann' has a word"):
        TASK.training_features(rows.select([0]), tokenizer, 64, 0)


def test_words_of_a_byte_level_tokenizer_have_the_pieces_of_running_text(byte_level_tokenizer):
    tokenizer = byte_level_tokenizer
    assert marks_spaces(tokenizer)
    windows = TASK.windows(ROWS, tokenizer, 64, 0)
    assert windows["input_ids"][0] == tokenizer("anna lee saw rome")["input_ids"]
    assert [
        tokenizer.convert_ids_to_tokens(windows["input_ids"][0][piece]) for piece in windows["first_pieces"][0]
    ] == [
        "anna",
        "Ġlee",
        "Ġsaw",
        "Ġrome",
    ]
    assert windows["first_pieces"][1][1] is None


def test_tokenizers_that_set_words_apart_themselves_get_them_as_they_are(tokenizer):
    assert not marks_spaces(tokenizer)


def test_a_limit_without_room_for_a_word_is_refused(tokenizer):
    with pytest.raises(XLFAError, match="--max_length 2 leaves no room for a word"):
        TASK.windows(ROWS, tokenizer, 2, 0)


def test_a_missing_reading_is_not_passed_over(tokenizer):
    with pytest.raises(ValueError):
        TASK.predictions(ROWS, ["0", "1"], TASK.windows(ROWS, tokenizer, 64, 0), [np.zeros((20, 2))])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"], "ner_tags": [7]}, r"row 1 has the tag 7; the task 'wikiann' knows 0\.\.6 \(O, B-PER"),
        ({"tokens": ["a"], "ner_tags": [-1]}, "row 1 has the tag -1"),
        ({"tokens": ["a"], "ner_tags": [None]}, "row 1 has the tag None"),
        ({"tokens": ["a", "b"], "ner_tags": [0]}, "row 1 has 2 words and 1 tags"),
        ({"tokens": ["a"], "ner_tags": None}, "row 1 has 1 words and 0 tags"),
        ({"tokens": [], "ner_tags": []}, "row 1 has no words"),
        ({"tokens": ["a", None], "ner_tags": [0, 0]}, "row 1 has no words, or a word that is null"),
    ],
)
def test_rows_that_cannot_be_used_are_named(row, message):
    rows = Dataset.from_list([{"tokens": ["a"], "ner_tags": [0]}, row])
    with pytest.raises(XLFAError, match=f"here: {message}"):
        TASK.check_rows(rows, "here")


def test_tags_in_another_order_are_refused():
    names = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER", "B-ORG", "I-ORG"]
    rows = ROWS.cast_column("ner_tags", List(ClassLabel(names=names)))
    with pytest.raises(XLFAError, match="the tags of 'ner_tags' are O, B-LOC.*needs O, B-PER.*in this order"):
        TASK.check_rows(rows, "here")


def test_each_word_once_is_listed_for_the_vocabulary():
    rows = Dataset.from_list([*ROWS, ROWS[0]], FEATURES)
    assert TASK.texts(rows) == ["anna", "lee", "saw", "rome", "in", "", "un"]


@pytest.mark.parametrize("task", [TASK, POS])
def test_contributions_sum_to_the_scores(task):
    names = task.label_names
    predictions = [
        Prediction("0", [names[1], None, names[3]], [names[1], names[2], names[3]], 0.5),
        Prediction("1", [names[5], names[5]], [names[5], names[0]], 0.5),
    ]
    contributions = task.contributions(predictions, "de")
    assert list(contributions) == list(task.metrics)
    for name, score in task.score(predictions, "de").items():
        assert task.score_of_sums(name, contributions[name].sum(0)) == pytest.approx(score)


@pytest.mark.parametrize("stripped", [True, False])
def test_training_and_scoring_from_a_mirror_without_a_test_split(write_mirror, tiny_encoder, tmp_path, stripped):
    validation = {"validation": ROWS, **({} if stripped else {"test": ROWS.select([1])})}
    root = write_mirror("unimelb-nlp/wikiann", {"en": {"train": ROWS, **validation}, "de": {"validation": ROWS}})
    folder = str(tmp_path / "run")
    train(
        ModelArguments(model=tiny_encoder),
        DataArguments(task="wikiann", data_root=root, max_length=64),
        XLFATrainingArguments(output_dir=folder, max_steps=2, save_strategy="no", metric_for_best_model="f1"),
    )
    scores = evaluate_model(EvaluationArguments(model=folder, task="wikiann", data_root=root))
    # Of the task's languages, those that the mirror has.
    assert list(scores["languages"]) == ["de", "en"]
    assert scores["splits"] == {"de": "validation", "en": "validation" if stripped else "test"}
    assert scores["ids"] == {"de": ["0", "1"], "en": ["0", "1"] if stripped else ["0"]}
    rows = [
        json.loads(line) for line in (tmp_path / "run/scores/wikiann/predictions/de.jsonl").read_text().splitlines()
    ]
    assert rows[1]["prediction"][1] is None and rows[1]["label"] == ["O", "O", "B-ORG"]
    assert scores["languages"]["de"]["missed_words"] == pytest.approx(100 / 7)


def test_each_language_has_a_sample_of_its_own_sentences(write_mirror, tiny_encoder, tmp_path):
    def sentences(count):
        return Dataset.from_list([ROWS[0]] * count, FEATURES)

    root = write_mirror(
        "unimelb-nlp/wikiann",
        {"en": {"train": sentences(3), "validation": sentences(9)}, "de": {"validation": sentences(30)}},
    )
    folder = str(tmp_path / "run")
    train(
        ModelArguments(model=tiny_encoder),
        DataArguments(task="wikiann", data_root=root, max_length=64, max_eval_examples=2),
        XLFATrainingArguments(output_dir=folder, max_steps=1, save_strategy="no", metric_for_best_model="f1"),
    )
    score = {"model": folder, "task": "wikiann", "data_root": root, "max_examples": 4}
    scores = evaluate_model(EvaluationArguments(**score))
    assert {language: len(ids) for language, ids in scores["ids"].items()} == {"de": 4, "en": 4}
    assert any(int(id) >= 9 for id in scores["ids"]["de"])
    assert evaluate_model(EvaluationArguments(**score))["ids"] == scores["ids"]
    assert evaluate_model(EvaluationArguments(**score, seed=1))["ids"] != scores["ids"]


def test_scoring_the_split_that_models_are_selected_on_is_logged(write_mirror, caplog):
    root = write_mirror("unimelb-nlp/wikiann", {code: {"validation": ROWS} for code in ("en", "de")})
    TASK.load_test("de", root)
    assert "selected on" not in caplog.text
    TASK.load_test("en", root)
    assert "unimelb-nlp/wikiann (en): validation is also the split that models are selected on" in caplog.text


def test_a_language_that_the_mirror_lacks_is_named_with_those_that_it_has(write_mirror):
    root = write_mirror("unimelb-nlp/wikiann", {"en": {"validation": ROWS}})
    with pytest.raises(XLFAError, match="unimelb-nlp/wikiann has no configuration 'sw'; it has: en"):
        TASK.load_test("sw", root)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("task", "language", "split", "examples"),
    [("wikiann", "sw", "validation", 1000), ("udpos", "th", "test", 1000), ("udpos", "de", "validation", 19233)],
)
def test_the_mirror_is_scored_on_the_first_split_that_it_has(mirror, task, language, split, examples):
    rows = get_task(task).load_test(language, mirror)
    assert (str(rows.split), len(rows)) == (split, examples)


@pytest.mark.shared
def test_languages_that_the_mirror_lacks_are_left_out_and_named(mirror, caplog):
    assert TASK.check_languages(None, mirror) == "ar bg de el en es fr hi ro ru sw tr ur vi zh".split()
    assert "lacks af, bn" in caplog.text
    assert len(POS.check_languages(None, mirror)) == 20


@pytest.mark.shared
@pytest.mark.parametrize("task", [TASK, POS])
def test_training_and_validation_rows_of_the_mirror(mirror, task):
    assert len(task.load_training(None, mirror, 100, 0)) == 100
    assert len(task.load_validation(None, mirror, 50)) == 50
