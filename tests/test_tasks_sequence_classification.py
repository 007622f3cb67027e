"""Sentence pairs become inputs and logits become labelled predictions; labels the task does not know are refused."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import AutoTokenizer

from xlfa.errors import XLFAError
from xlfa.tasks import Prediction, get_task

TASK, PAWSX = get_task("xnli"), get_task("pawsx")
ROWS = Dataset.from_list(
    [
        {"premise": "a cat sat", "hypothesis": "a cat", "label": 0},
        {"premise": "a cat sat", "hypothesis": "it was a big red one", "label": 1},
        {"premise": "a dog ran far away from home", "hypothesis": "no dog", "label": 2},
    ]
)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def tokenizer(tiny_encoder):
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture
def mirror_with_label(tmp_path):
    """facebook/xnli whose last row has a given label, in every split; returns the data root."""

    def write(label):
        folder = tmp_path / "root" / "facebook" / "xnli"
        folder.mkdir(parents=True)
        rows = [*ROWS.to_list()[:2], {"premise": "x", "hypothesis": "y", "label": label}]
        card = ["---", "configs:", "- config_name: en", "  data_files:"]
        for split in ("train", "validation", "test"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            card += [f"  - split: {split}", f"    path: {split}.jsonl"]
        (folder / "README.md").write_text("\n".join([*card, "---", ""]))
        return str(tmp_path / "root")

    return write


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["contradiction", "entailment", "neutral"], True),
        (["Neutral", "Entailment", "Contradiction"], True),
        (["Entailment", "Neutral", "Contradiction"], False),
        (["0", "1", "2"], False),
    ],
)
def test_labels_in_another_order_are_refused(names, refused):
    rows = ROWS.cast_column("label", ClassLabel(names=names))
    if refused:
        with pytest.raises(XLFAError, match=f"the set: the labels are {', '.join(names).lower()}; the task 'xnli'"):
            TASK.check_rows(rows, "the set")
    else:
        TASK.check_rows(rows, "the set")


def plain(tokenizer, ids):
    return tokenizer.decode(ids).replace(" ", "")


def test_training_features_hold_both_sentences_and_the_label(tokenizer):
    features = TASK.training_features(ROWS, tokenizer, max_length=64, doc_stride=0)
    assert features["labels"][:] == [0, 1, 2]
    assert plain(tokenizer, features[0]["input_ids"]) == "[CLS]acatsat[SEP]acat[SEP]"
    assert set(features.column_names) <= {"input_ids", "attention_mask", "token_type_ids", "length", "labels"}


def test_pairs_are_cut_to_the_limit_at_the_longer_sentence(tokenizer):
    features = TASK.training_features(ROWS, tokenizer, max_length=14, doc_stride=0)
    assert [len(ids) for ids in features["input_ids"]] == [14, 14, 14]
    assert plain(tokenizer, features[2]["input_ids"]) == "[CLS]adogra[SEP]nodog[SEP]"


def test_windows_are_one_an_example_and_the_same_inputs_as_in_training(tokenizer):
    windows = TASK.windows(ROWS, tokenizer, max_length=14, doc_stride=0)
    features = TASK.training_features(ROWS, tokenizer, max_length=14, doc_stride=0)
    assert [window["example"] for window in windows] == [0, 1, 2]
    assert [window["input_ids"] for window in windows] == features["input_ids"][:]


def test_the_label_with_the_highest_logit_is_predicted_with_its_probability():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, math.log(2)]], dtype=torch.bfloat16)
    readings = TASK.read_outputs(SimpleNamespace(logits=logits), {}, {})
    predictions = TASK.predictions(ROWS.select([0, 1]), ["7", "8"], ROWS, readings.numpy())
    total = math.e**2 + math.e + 1
    assert [(row.id, row.prediction, row.label) for row in predictions] == [
        ("7", "entailment", "entailment"),
        ("8", "contradiction", "neutral"),
    ]
    assert [row.score for row in predictions] == pytest.approx([math.e**2 / total, 0.5], abs=2e-3)


def test_a_missing_reading_is_not_passed_over():
    with pytest.raises(ValueError):
        TASK.predictions(ROWS, ["0", "1", "2"], [], [(0, 0.9), (1, 0.9)])


def test_accuracy_is_the_share_of_right_labels():
    names = ["entailment", "neutral", "contradiction", "neutral"]
    predictions = [Prediction(str(number), "neutral", name, 0.5) for number, name in enumerate(names)]
    assert TASK.score(predictions, "th") == {"accuracy": 50.0}


@pytest.mark.parametrize("label", [3, -1, None])
def test_a_label_outside_the_range_is_named_with_its_row(mirror_with_label, label):
    root = mirror_with_label(label)
    for load in (lambda: TASK.load_test("en", root), lambda: TASK.load_training(None, root, None, 0)):
        with pytest.raises(XLFAError, match=rf"facebook/xnli.*row 2 has label {label}.*0\.\.2.*entailment"):
            load()


def test_a_label_outside_the_range_is_refused_in_validation_too(mirror_with_label):
    with pytest.raises(XLFAError, match="row 2 has label -1"):
        TASK.load_validation(None, mirror_with_label(-1))


def test_all_texts_are_listed_for_the_vocabulary():
    assert sorted(TASK.texts(ROWS)) == sorted(ROWS["premise"][:] + ROWS["hypothesis"][:])


def test_training_rows_are_shuffled_and_cut_by_seed():
    whole = TASK.load_training(None, "sample", None, seed=0)
    assert whole["hypothesis"][:20] != TASK.load_training(None, "sample", None, seed=1)["hypothesis"][:20]
    assert TASK.load_training(None, "sample", 20, seed=0)["hypothesis"][:] == whole["hypothesis"][:20]
    assert len(TASK.load_training(None, "sample", 10**6, seed=0)) == len(whole)


def test_another_training_set_can_be_named(mirror_with_label, tmp_path):
    root = mirror_with_label(2)
    (tmp_path / "root" / "facebook").rename(tmp_path / "root" / "org")
    assert sorted(TASK.load_training("org/xnli", root, None, 0)["premise"]) == ["a cat sat", "a cat sat", "x"]
    with pytest.raises(XLFAError, match="'org/none'"):
        TASK.load_training("org/none", root, None, 0)


def test_a_validation_sample_holds_whole_premises_of_the_validation_split():
    rows = TASK.load_validation(None, "sample")
    sample = TASK.load_validation(None, "sample", max_examples=10)
    assert 0 < len(sample) <= 10
    for premise in set(sample["premise"]):
        assert list(sample["premise"]).count(premise) == list(rows["premise"]).count(premise)


def test_examples_without_ids_are_numbered_alike_in_every_language():
    english, thai = (TASK.example_ids(TASK.load_test(code, "sample")) for code in ("en", "th"))
    assert english == thai == [str(number) for number in range(len(english))]


def test_the_default_languages_are_all_of_the_task():
    assert TASK.check_languages(None) == "ar bg de el en es fr hi ru sw th tr ur vi zh".split()
    assert TASK.check_languages(["th", "en"]) == ["th", "en"]


def test_unknown_languages_are_named_with_those_that_exist():
    with pytest.raises(XLFAError, match="'xnli' has no language 'xx', 'ro'; it has: ar, bg"):
        TASK.check_languages(["en", "xx", "ro"])


def test_an_unknown_task_is_named_with_those_that_exist():
    with pytest.raises(XLFAError, match="'mnist'; there are: xnli, pawsx, wikiann"):
        get_task("mnist")


def paraphrases(pairs):
    return Dataset.from_list(
        [
            {"id": number, "sentence1": first, "sentence2": second, "label": label}
            for number, (first, second, label) in enumerate(pairs)
        ]
    )


def test_paraphrases_that_share_a_sentence_stay_together():
    rows = paraphrases([("a", "b", 1), ("c", "d", 0), ("b", "e", 0), ("e", "f", 1)])
    groups = PAWSX.groups(rows)
    assert groups[0] == groups[2] == groups[3] != groups[1]


def test_the_majority_rate_of_each_language_stands_beside_the_accuracy():
    predictions = [
        Prediction(str(number), "paraphrase", name, 0.5)
        for number, name in enumerate(["different"] * 3 + ["paraphrase"])
    ]
    assert PAWSX.score(predictions, "ko") == {"accuracy": 25.0, "majority_rate": 75.0}
    contributions = PAWSX.contributions(predictions, "ko")
    for name, score in PAWSX.score(predictions, "ko").items():
        assert PAWSX.score_of_sums(name, contributions[name].sum(0)) == score


def test_the_official_test_split_is_scored_where_it_is_there(write_mirror):
    rows = paraphrases([("a", "b", 1)])
    root = write_mirror(PAWSX.test_dataset, {"en": {"validation": rows, "test": rows}, "de": {"validation": rows}})
    assert str(PAWSX.load_test("en", root).split) == "test"
    assert str(PAWSX.load_test("de", root).split) == "validation"
    with pytest.raises(XLFAError, match=r"paws-x \(en\) has no split 'train'; it has: validation, test"):
        PAWSX.load_training(None, root, None, 0)


@pytest.mark.shared
def test_paraphrases_of_the_mirror_are_parallel(mirror):
    languages = {code: PAWSX.load_test(code, mirror) for code in PAWSX.check_languages(None, mirror)}
    assert len(languages) == 7
    assert {tuple(PAWSX.example_ids(rows)) for rows in languages.values()} == {tuple(map(str, range(2000)))}
    assert len(set(PAWSX.groups(languages["en"]))) == 1201
