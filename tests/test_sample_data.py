"""The embedded sample has the layout, columns and parallel examples of the sets that it stands for."""

from collections import Counter

import pytest
from datasets import get_dataset_config_names

from xlfa.data import SAMPLE_ROOT, load_rows
from xlfa.tasks import get_task

XNLI, XQUAD = get_task("xnli"), get_task("xquad")
PARALLEL_LANGUAGES = sorted({*XNLI.test_configs, *XQUAD.test_configs} - {"en"})


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xlfa.data.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def xnli(own_cache):
    return {code: load_rows("facebook/xnli", code, "test", "sample") for code in XNLI.test_configs}


@pytest.fixture(scope="module")
def xquad(own_cache):
    return {code: load_rows("google/xquad", f"xquad.{code}", "validation", "sample") for code in XQUAD.test_configs}


def test_xnli_has_its_15_languages_with_45_pairs_of_15_a_class(xnli):
    assert set(get_dataset_config_names(str(SAMPLE_ROOT / "facebook/xnli"))) == set(xnli)
    assert len(xnli) == 15
    for rows in xnli.values():
        assert Counter(rows["label"]) == {0: 15, 1: 15, 2: 15}


def test_xnli_has_the_same_labels_in_every_language(xnli):
    assert len({tuple(rows["label"]) for rows in xnli.values()}) == 1


def test_xnli_groups_by_premise_alike_in_every_language(xnli):
    patterns = set()
    for rows in xnli.values():
        premises = list(rows["premise"])
        patterns.add(tuple(premises.index(premise) for premise in premises))
    assert len(patterns) == 1


def test_xnli_texts_are_all_there_and_translated(xnli):
    for code, rows in xnli.items():
        for column in ("premise", "hypothesis"):
            assert all(text.strip() for text in rows[column])
            assert code == "en" or not set(rows[column]) & set(xnli["en"][column])


def test_xquad_has_its_12_languages_with_30_questions_over_15_paragraphs(xquad):
    assert set(get_dataset_config_names(str(SAMPLE_ROOT / "google/xquad"))) == {f"xquad.{code}" for code in xquad}
    assert len(xquad) == 12
    for rows in xquad.values():
        assert len(rows) == 30
        assert set(Counter(rows["context"]).values()) == {2}


def test_xquad_answers_stand_at_their_place(xquad):
    for code, rows in xquad.items():
        for row in rows:
            texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
            assert len(texts) == len(starts) >= 1
            for text, start in zip(texts, starts):
                assert text and row["context"][start : start + len(text)] == text, (code, row["id"])


def test_xquad_ids_are_unique_and_the_same_in_every_language(xquad):
    assert {tuple(rows["id"]) for rows in xquad.values()} == {tuple(xquad["en"]["id"])}
    assert len(set(xquad["en"]["id"])) == 30


def test_parallel_text_has_60_pairs_for_each_language_of_the_tasks():
    names = get_dataset_config_names(str(SAMPLE_ROOT / "local/parallel"))
    assert sorted(names) == [f"en-{code}" for code in PARALLEL_LANGUAGES]
    assert len(names) == 15
    for code in PARALLEL_LANGUAGES:
        pairs = load_rows("local/parallel", f"en-{code}", "train", "sample", ("translation",))["translation"]
        assert len(pairs) == 60
        assert all(set(pair) == {"en", code} and all(text.strip() for text in pair.values()) for pair in pairs)


def test_english_training_and_validation_pairs_do_not_share_a_premise():
    train, validation = (load_rows("facebook/xnli", "en", split, "sample") for split in ("train", "validation"))
    assert len(train) >= 240
    assert set(train["label"]) == set(validation["label"]) == {0, 1, 2}
    assert not set(train["premise"]) & set(validation["premise"])


def test_no_scored_text_is_trained_on(xnli, xquad):
    assert not set(load_rows("facebook/xnli", "en", "train", "sample")["premise"]) & set(xnli["en"]["premise"])
    trained = set(load_rows("rajpurkar/squad", None, "train", "sample")["context"])
    assert not trained & set(xquad["en"]["context"])


def test_english_training_questions_have_answers_at_their_place():
    rows = load_rows("rajpurkar/squad", None, "train", "sample")
    assert len(rows) >= 160
    assert len(set(rows["id"])) == len(rows)
    for row in rows:
        text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        assert text and row["context"][start : start + len(text)] == text, row["id"]


def test_columns_are_those_of_the_sets_on_the_hub(xnli, xquad):
    for rows in (*xnli.values(), load_rows("facebook/xnli", "en", "train", "sample")):
        assert sorted(rows.column_names) == ["hypothesis", "label", "premise"]
    for rows in (*xquad.values(), load_rows("rajpurkar/squad", None, "train", "sample")):
        assert {"id", "context", "question", "answers"} <= set(rows.column_names)
        assert sorted(rows[0]["answers"]) == ["answer_start", "text"]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("dataset", "config", "split"),
    [("facebook/xnli", "th", "test"), ("google/xquad", "xquad.th", "validation"), ("rajpurkar/squad", None, "train")],
)
def test_columns_the_tasks_need_are_those_of_the_mirror(mirror, dataset, config, split):
    sample, whole = load_rows(dataset, config, split, "sample"), load_rows(dataset, config, split, mirror)
    assert set(sample.column_names) <= set(whole.column_names)
    for column in set(sample.column_names):
        assert type(sample[0][column]) is type(whole[0][column])


@pytest.mark.parametrize("name", ["facebook/xnli", "google/xquad", "rajpurkar/squad", "local/parallel"])
def test_every_card_says_that_this_is_not_the_set_it_is_named_after(name):
    card = (SAMPLE_ROOT / name / "README.md").read_text(encoding="utf-8")
    assert "license: cc0-1.0" in card
    assert "Embedded sample" in card
