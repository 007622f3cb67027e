"""Sums by cluster: they give the scores of the predictions, and hold no text of them."""

import json

import numpy as np
import pytest
from study_data import LANGUAGES, cell_predictions, write_study

from xlfa.errors import XLFAError
from xlfa.study.results import read_study
from xlfa.study.sums import read_sums, without_examples, write_sums
from xlfa.tasks import get_task


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("study"), seeds=(0,), clusters=5)
    return {cell.task: cell for cell in read_study(folder).cells if cell.control == "no_ot"}


@pytest.mark.parametrize("task", ["xnli", "xquad"])
def test_scores_of_the_sums_are_those_of_the_predictions(cells, task):
    registered, sums = get_task(task), read_sums(cells[task].folder)
    predictions = cell_predictions(cells[task])
    assert list(sums) == LANGUAGES[task]
    for code, own in sums.items():
        expected = registered.score(predictions[code], code)
        assert registered.metrics[0] in own
        for metric, values in own.items():
            assert values.shape == (5, 2)
            assert registered.score_of_sums(metric, values.sum(0)) == pytest.approx(expected[metric], abs=1e-4)


def test_a_row_is_the_sum_over_one_cluster(cells):
    rows = cell_predictions(cells["xnli"])["de"]
    right = [row.prediction == row.label for row in rows]
    expected = [[sum(right[start : start + 3]), 3] for start in range(0, 15, 3)]
    assert np.array_equal(read_sums(cells["xnli"].folder)["de"]["accuracy"], expected)


def test_no_text_of_the_data_set_is_kept(cells):
    text = (cells["xquad"].folder / "sums.json").read_text()
    assert "fish" not in text and "market" not in text


def test_predictions_of_other_examples(cells):
    cell = cells["xnli"]
    scores = cell.scores | {"ids": ["another"], "clusters": [0]}
    with pytest.raises(XLFAError, match="other examples"):
        write_sums(cell.folder, cell.folder / "scores" / "xnli", scores)


@pytest.mark.parametrize("text", ["{", "[]", '{"de": 1}', '{"de": {"accuracy": ["x"]}}'])
def test_a_file_without_sums(tmp_path, text):
    (tmp_path / "sums.json").write_text(text)
    with pytest.raises(XLFAError, match="sums.json holds no sums"):
        read_sums(tmp_path)


def test_the_digest_is_of_the_examples_and_their_clusters():
    scores = {"task": "xnli", "ids": ["a", "b"], "clusters": [0, 1]}
    kept = without_examples(scores)
    assert json.loads(json.dumps(kept)) == kept and kept.keys() == {"task", "examples_digest"}
    assert without_examples(scores) == kept
    for other in ({"ids": ["a", "c"]}, {"clusters": [0, 0]}):
        assert without_examples(scores | other)["examples_digest"] != kept["examples_digest"]
