"""The tab that compares: the numbers are those of `--compare`, and nothing but scored runs below the folder is read."""

import json
import shutil

import numpy as np
import pytest
from test_comparison import LANGUAGES, XNLI, guesses, write_run

pytest.importorskip("gradio")

from xlfa.app.comparison_tab import compare, draw_differences, find_runs, show_comparison, table_rows
from xlfa.comparison import compare_runs
from xlfa.errors import XLFAError
from xlfa.scores import SCORES_FILE

CLUSTERS = [index // 3 for index in range(300)]
PLAIN, ALIGNED = "old/plain (xnli)", "aligned"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "old" / "plain" / "scores" / "xnli", guesses(1, 0.5), CLUSTERS)
    write_run(folder / "aligned", guesses(2, 0.7), CLUSTERS)
    return folder


@pytest.fixture
def runs(written, tmp_path):
    return shutil.copytree(written, tmp_path / "runs")


def test_runs_are_found_by_name(runs):
    assert find_runs(runs) == {ALIGNED: runs / "aligned", PLAIN: runs / "old" / "plain" / "scores" / "xnli"}
    assert find_runs(runs / "none") == {}


def test_the_folder_may_be_that_of_a_model_or_of_its_scores(runs):
    model = runs / "old" / "plain"
    assert find_runs(model) == {". (xnli)": model / "scores" / "xnli"}
    assert find_runs(model / "scores") == {"xnli": model / "scores" / "xnli"}
    assert find_runs(model / "scores" / "xnli") == {".": model / "scores" / "xnli"}


def test_the_table_and_the_picture_have_the_numbers_of_the_comparison(runs):
    expected = compare_runs(XNLI, runs / "old" / "plain", runs / "aligned")["differences"]
    comparison = compare(runs, PLAIN, ALIGNED)
    rows = {row[0]: row[1:] for row in table_rows(comparison)}
    assert {*LANGUAGES, "average", "germanic"} <= set(rows) and "average_xtreme" not in rows
    for language in LANGUAGES:
        cell = expected[language]["accuracy"]
        low, high = map(float, rows[language][3].strip("[]").split(", "))
        shown = [*map(float, rows[language][:3]), low, high]
        np.testing.assert_allclose(shown, [cell["a"], cell["b"], cell["difference"], *cell["interval"]], atol=0.0051)
        assert rows[language][4:] == [f"{cell['p']:.4f}", f"{cell['p_adjusted']:.4f}"]
    assert rows["average"][5] == ""
    (axes,) = draw_differences(comparison).axes
    heights = {label.get_text(): bar.get_height() for label, bar in zip(axes.get_xticklabels(), axes.patches)}
    assert heights == pytest.approx({language: expected[language]["accuracy"]["difference"] for language in LANGUAGES})
    bounds = [line.get_segments()[0][:, 1] for line in axes.collections]
    ordered = sorted(LANGUAGES, key=heights.get, reverse=True)
    np.testing.assert_allclose(bounds, [expected[language]["accuracy"]["interval"] for language in ordered])


def test_it_shows_who_is_compared(runs):
    picture, facts, rows = show_comparison(runs, PLAIN, ALIGNED)
    assert picture.startswith("<img") and PLAIN in facts and "300 examples" in facts and rows
    assert str(runs) not in facts


def test_a_run_against_itself(runs):
    rows = show_comparison(runs, ALIGNED, ALIGNED)[2]
    assert {row[3] for row in rows} == {"+0.00"}


@pytest.mark.parametrize("name", [None, "", "none", "..", "../secret", "/etc", "<script>", "aligned/../aligned"])
def test_nothing_but_the_runs_found_is_read(runs, name):
    write_run(runs.parent / "secret", guesses(2, 0.7), CLUSTERS)
    for pair in ((name, ALIGNED), (ALIGNED, name)):
        picture, facts, rows = show_comparison(runs, *pair)
        assert 'role="alert"' in picture and "<script" not in picture
        assert (facts, rows) == ("", [])


def damage(scores, content):
    (scores / SCORES_FILE).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "\ud7ff", {}, {"task": "xnli"}, {"task": []}, {"task": "other"}, {"task": "xnli", "schema_version": 3}],
)
def test_damaged_scores_are_a_message(runs, content):
    damage(runs / "aligned", content)
    for pair in ((PLAIN, ALIGNED), (ALIGNED, PLAIN)):
        shown = show_comparison(runs, *pair)[0]
        assert 'role="alert"' in shown and str(runs) not in shown and "--compare" not in shown


def test_runs_of_other_examples_are_not_compared(runs):
    write_run(runs / "fewer", guesses(2, 0.7, 30), CLUSTERS[:30])
    with pytest.raises(XLFAError, match="same examples"):
        compare(runs, PLAIN, "fewer")
    (runs / "aligned" / "predictions" / "de.jsonl").unlink()
    with pytest.raises(XLFAError, match=r"de\.jsonl"):
        compare(runs, PLAIN, ALIGNED)
