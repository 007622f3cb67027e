"""Means by hand, their intervals, a scores.json that its schema accepts, and files that are whole or not there."""

import dataclasses
import errno
import json
import os

import jsonschema
import pytest
from transformers import BertConfig

from modeling_xlfa import XLFAConfig
from xlfa.files import building_folder, replacing, write_text
from xlfa.languages import FAMILIES
from xlfa.scores import (
    FIGURE_FILE,
    SCORES_FILE,
    SCORES_SCHEMA,
    build_scores,
    format_table,
    read_predictions,
    summarise,
    write_predictions,
    write_scores,
)
from xlfa.tasks import TASKS, Prediction, get_task

XNLI, XQUAD = get_task("xnli"), get_task("xquad")
SETTINGS = {
    "data": "sample",
    "max_examples": None,
    "seed": 0,
    "max_length": 128,
    "doc_stride": 128,
    "max_tokens_per_batch": 4096,
    "bf16": False,
    "processes": 1,
}


def answers(right):
    """Predictions for 20 questions, of which the first ones are right."""
    return [Prediction(str(number), "fish" if number < right else "no", ["fish"], 0.5) for number in range(20)]


def accuracies(**values):
    return {language: {"accuracy": value} for language, value in values.items()}


def answer_scores(value, mlqa):
    return {"f1": value, "exact_match": value / 2, "f1_mlqa": mlqa, "exact_match_mlqa": mlqa}


@pytest.fixture
def scores():
    right = dict.fromkeys(XQUAD.test_configs, 12) | {"en": 16, "de": 14, "ar": 0}
    predictions = {code: answers(number) for code, number in right.items()}
    config = XLFAConfig(text_config=BertConfig(num_hidden_layers=4), ot_weight=0.1)
    return build_scores(
        XQUAD,
        predictions,
        [position // 2 for position in range(20)],
        dict.fromkeys(predictions, "test"),
        config,
        SETTINGS,
    )


@pytest.fixture(scope="module")
def schema():
    return json.loads(SCORES_SCHEMA.read_text(encoding="utf-8"))


def test_means_are_over_all_over_the_english_family_and_over_the_rest():
    summary = summarise(XNLI, accuracies(en=80.0, de=70.0, th=50.0, sw=40.0, ur=45.0))
    assert summary["average"] == {"accuracy": pytest.approx(57.0)}
    assert summary["enf"] == {"accuracy": 75.0}
    assert summary["noenf"] == {"accuracy": pytest.approx(45.0)}


def test_the_transfer_gap_is_english_minus_the_mean_of_the_others():
    summary = summarise(XNLI, accuracies(en=80.0, de=70.0, th=50.0, sw=40.0, ur=44.0))
    assert summary["transfer_gap"] == {"accuracy": pytest.approx(80.0 - 51.0)}
    assert summarise(XNLI, accuracies(en=50.0, th=60.0))["transfer_gap"] == {"accuracy": -10.0}


def test_a_mean_over_a_group_that_is_not_all_scored_is_none():
    summary = summarise(XNLI, accuracies(en=80.0, th=50.0))
    assert summary["average_xtreme"] == summary["enf"] == {"accuracy": None}
    assert summary["average"] == {"accuracy": 65.0}


def test_without_english_there_is_no_transfer_gap():
    assert summarise(XNLI, accuracies(de=70.0, th=50.0))["transfer_gap"] == {"accuracy": None}


def test_english_alone_has_no_other_languages_to_compare_with():
    summary = summarise(XNLI, accuracies(en=80.0))
    assert summary["noenf"] == summary["transfer_gap"] == {"accuracy": None}


def test_the_average_of_xtreme_has_its_languages_alone():
    languages = {code: answer_scores(50.0, None) for code in XQUAD.test_configs}
    languages["ro"] = answer_scores(98.0, None)
    summary = summarise(XQUAD, languages)
    assert summary["average"]["f1"] == pytest.approx(54.0)
    assert summary["average_xtreme"]["f1"] == pytest.approx(50.0)


def test_a_language_without_a_metric_is_left_out_of_its_means_alone():
    languages = {code: answer_scores(60.0, None) for code in XQUAD.test_configs}
    languages.update(en=answer_scores(80.0, 90.0), de=answer_scores(70.0, 75.0), ar=answer_scores(0.0, 30.0))
    summary = summarise(XQUAD, languages)
    assert summary["average"]["f1_mlqa"] == pytest.approx((90 + 75 + 30) / 3)
    assert summary["average"]["f1"] == pytest.approx((80 + 70 + 0 + 9 * 60) / 12)
    assert summary["noenf"]["f1_mlqa"] == 30.0
    assert summary["transfer_gap"]["f1_mlqa"] == pytest.approx(90 - (75 + 30) / 2)


def test_families_are_means_over_the_scored_languages_of_each():
    families = summarise(XNLI, accuracies(en=80.0, de=70.0, ru=50.0, zh=40.0))["families"]
    assert families == {
        "germanic": {"accuracy": 75.0},
        "sino_tibetan": {"accuracy": 40.0},
        "slavic": {"accuracy": 50.0},
    }


def test_every_language_of_every_task_has_a_family():
    assert all(code in FAMILIES for task in TASKS.values() for code in task.test_configs)


def test_scores_and_means_have_intervals_around_them(scores):
    assert scores["languages"]["de"]["f1"] == pytest.approx(70.0)
    low, high = scores["intervals"]["languages"]["de"]["f1"]
    assert low < 70 < high
    assert set(scores["intervals"]["families"]) == set(scores["families"])
    for name in ("average", "average_xtreme", "enf", "noenf", "transfer_gap"):
        low, high = scores["intervals"][name]["f1"]
        assert low < scores[name]["f1"] < high
    assert scores["intervals"]["languages"]["ar"]["f1"] == [0.0, 0.0]
    assert scores["intervals"]["languages"]["th"]["f1_mlqa"] is None


def test_a_single_cluster_has_scores_and_no_intervals(scores, tmp_path):
    config = XLFAConfig(text_config=BertConfig(num_hidden_layers=4))
    single = build_scores(XQUAD, {"en": answers(15)}, [0] * 20, {"en": "test"}, config, SETTINGS)
    assert single["languages"]["en"]["f1"] == 75.0
    assert single["intervals"]["languages"] == {"en": dict.fromkeys(XQUAD.metrics)}
    write_scores(tmp_path, single)
    assert "75.00 [" not in format_table(single)


def test_languages_that_are_not_parallel_have_their_own_ids_and_clusters(schema):
    task = dataclasses.replace(XQUAD, parallel=False)
    predictions = {"en": answers(15), "de": answers(10)[:8]}
    clusters = {"en": list(range(20)), "de": list(range(8))}
    config = XLFAConfig(text_config=BertConfig(num_hidden_layers=4))
    scores = build_scores(task, predictions, clusters, dict.fromkeys(predictions, "test"), config, SETTINGS)
    jsonschema.validate(scores, schema)
    assert scores["examples"] == {"en": 20, "de": 8} and scores["clusters"] == clusters
    assert scores["ids"]["de"] == [str(number) for number in range(8)]
    assert "8 to 20 examples a language" in format_table(scores)


def test_a_metric_that_no_language_of_a_group_has_is_none():
    languages = {"en": answer_scores(80.0, 90.0), "th": answer_scores(60.0, None)}
    summary = summarise(XQUAD, languages)
    assert summary["noenf"]["f1_mlqa"] is None
    assert summary["transfer_gap"]["f1_mlqa"] is None
    assert summary["transfer_gap"]["f1"] == 20.0


def test_the_written_file_keeps_to_its_schema(scores, schema, tmp_path):
    write_scores(tmp_path / "new", scores)
    written = json.loads((tmp_path / "new" / SCORES_FILE).read_text(encoding="utf-8"))
    jsonschema.validate(written, schema, jsonschema.Draft202012Validator)
    assert written == scores
    assert written["model"]["encoder"] == "bert"
    assert (written["model"]["ot_weight"], written["model"]["fusion"]) == (0.1, "dlfa")
    assert written["primary_metric"] == "f1"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("languages", {"english": {"f1": 1.0}}),
        ("languages", {"en": {"f1": 101.0}}),
        ("ids", ["a", "a"]),
        ("transfer_gap", {"f1": -101.0}),
        ("schema_version", 1),
        ("intervals", {}),
        ("clusters", []),
    ],
)
def test_the_schema_refuses_what_no_run_may_write(scores, schema, key, value):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**scores, key: value}, schema)


def test_the_figure_is_a_picture_beside_the_scores(scores, tmp_path):
    write_scores(tmp_path, scores)
    assert sorted(path.name for path in tmp_path.iterdir()) == [SCORES_FILE, FIGURE_FILE]
    assert (tmp_path / FIGURE_FILE).read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_row_for_each_language_and_mean_and_a_dash_for_none(scores):
    low, high = scores["intervals"]["languages"]["th"]["f1"]
    lines = {line.split()[0]: line.split()[1:] for line in format_table(scores).splitlines()[2:]}
    assert lines["th"][:3] == ["60.00", f"[{low:.1f},", f"{high:.1f}]"] and lines["th"][6:] == ["-", "-"]
    assert lines["en"][0] == lines["en"][3] == "80.00"
    assert {"average", "average_xtreme", "enf", "noenf", "transfer_gap", "germanic"} | set(XQUAD.test_configs) <= set(
        lines
    )


def test_predictions_are_a_json_object_a_line_in_their_own_script(tmp_path):
    path = tmp_path / "predictions" / "th.jsonl"
    write_predictions(path, [Prediction("1", "ตลาด\nปลา", ["ปลา"], 0.5), Prediction("2", "", ["x"], 0.25)])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"id": "1", "prediction": "ตลาด\nปลา", "label": ["ปลา"], "score": 0.5}
    assert len(lines) == 2
    assert "ตลาด" in lines[0]


def test_separators_that_end_no_line_stay_in_a_prediction(tmp_path):
    rows = [Prediction("1", "a\u2028b\u2029c\x85d", ["e\x0bf"], 0.5), Prediction("2", "", ["x"], 0.25)]
    write_predictions(tmp_path / "de.jsonl", rows)
    assert read_predictions(tmp_path / "de.jsonl") == rows


def test_a_failing_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / SCORES_FILE
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_over_a_folder_leaves_no_temporary_file(tmp_path):
    (tmp_path / SCORES_FILE).mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / SCORES_FILE, "new")
    assert [path.name for path in tmp_path.iterdir()] == [SCORES_FILE]


def test_a_figure_that_cannot_be_drawn_leaves_no_temporary_file(scores, tmp_path):
    (tmp_path / FIGURE_FILE).mkdir()
    with pytest.raises(OSError):
        write_scores(tmp_path, scores)
    assert sorted(path.name for path in tmp_path.iterdir()) == [SCORES_FILE, FIGURE_FILE]


def test_a_folder_that_another_process_put_in_place_first_stays(tmp_path):
    target = tmp_path / "encoder"
    with building_folder(target, exist_ok=True) as folder:
        (folder / "mine").write_text("1")
        target.mkdir()
        (target / "theirs").write_text("1")
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("code", "exist_ok"), [(errno.EBUSY, True), (errno.ENOTEMPTY, False)])
def test_a_folder_that_cannot_be_put_in_place_is_no_success(tmp_path, monkeypatch, code, exist_ok):
    target = tmp_path / "encoder"
    target.mkdir()

    def refuse(*_):
        raise OSError(code, "refused")

    monkeypatch.setattr("os.rename", refuse)
    with pytest.raises(OSError, match="refused"), building_folder(target, exist_ok) as folder:
        (folder / "mine").write_text("1")
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_files_that_were_linked_into_a_folder_keep_their_mode(tmp_path):
    weights = tmp_path / "weights"
    weights.write_text("1")
    weights.chmod(0o600)
    with building_folder(tmp_path / "folder") as folder:
        os.link(weights, folder / "weights")
        (folder / "own").write_text("1")
        (folder / "own").chmod(0o600)
    (tmp_path / "ordinary").write_text("1")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes["weights"] == 0o600 and modes["own"] == modes["ordinary"]
