"""Scoring: every language with one load, order and batch size, subsets, what is written, and bad input."""

import json
import os
import shutil

import jsonschema
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from modeling_xlfa import XLFAForQuestionAnswering, XLFAForSequenceClassification
from xlfa.data import SAMPLE_ROOT
from xlfa.errors import XLFAError
from xlfa.evaluation import EvaluationArguments, load_model, main, output_folder, select_ids
from xlfa.inference import InferenceOptions
from xlfa.prediction import predict
from xlfa.resuming import model_origin, writing_alone
from xlfa.scores import SCORES_SCHEMA
from xlfa.tasks import Task, get_task


@pytest.fixture(scope="module")
def models(tiny_encoder, tmp_path_factory):
    """Folders of an untrained model with each head."""
    folders = {}
    for task, head, labels in (("xnli", XLFAForSequenceClassification, 3), ("xquad", XLFAForQuestionAnswering, 2)):
        torch.manual_seed(1)
        folders[task] = str(tmp_path_factory.mktemp(task))
        fields = {"num_labels": labels, "ot_epsilon": 0.3, "input_length": 160, "input_stride": 32}
        head.from_encoder(tiny_encoder, **fields).save_pretrained(folders[task])
        AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folders[task])
    return folders


def score(models, task, output, *flags):
    small = ["--max_length", "160", "--doc_stride", "32"] if task == "xquad" else []
    main(
        ["--model", models[task], "--task", task, "--data_root", "sample", "--output_dir", str(output), *small, *flags]
    )
    return json.loads((output / "scores.json").read_text())


def read_predictions(output, language):
    return [json.loads(line) for line in (output / "predictions" / f"{language}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("task", "languages", "examples"), [("xnli", 15, 45), ("xquad", 12, 30)])
def test_every_language_is_scored_and_written_in_the_schema(models, tmp_path, capsys, task, languages, examples):
    scores = score(models, task, tmp_path)
    jsonschema.validate(scores, json.loads(SCORES_SCHEMA.read_text()))
    assert len(scores["languages"]) == languages and scores["examples"] == examples
    assert (scores["settings"]["max_length"], scores["settings"]["doc_stride"]) == (160, 32)
    assert scores["model"]["ot_epsilon"] == 0.3 and scores["model"]["ot_epsilon_scale"] == "centered_std"
    for language in scores["languages"]:
        rows = read_predictions(tmp_path, language)
        assert [row["id"] for row in rows] == scores["ids"]
        assert all(set(row) == {"id", "prediction", "label", "score"} and 0 <= row["score"] <= 1 for row in rows)
    assert (tmp_path / "scores.png").stat().st_size > 1000
    table = capsys.readouterr().out
    assert all(scores["intervals"]["languages"][code][scores["primary_metric"]] for code in scores["languages"])
    assert len(scores["clusters"]) == examples and max(scores["clusters"]) + 1 < examples
    assert "average_xtreme" in table and f"{examples} examples a language" in table


def test_accuracy_is_that_of_the_predictions(models, tmp_path):
    scores = score(models, "xnli", tmp_path, "--languages", "de", "th")
    for language in ("de", "th"):
        rows = read_predictions(tmp_path, language)
        right = sum(row["prediction"] == row["label"] for row in rows)
        assert scores["languages"][language]["accuracy"] == pytest.approx(100 * right / len(rows))
    assert scores["enf"]["accuracy"] is None and scores["transfer_gap"]["accuracy"] is None


def test_order_and_token_budget_change_no_prediction(models):
    task = get_task("xquad")
    model = XLFAForQuestionAnswering.from_pretrained(models["xquad"])
    tokenizer = AutoTokenizer.from_pretrained(models["xquad"])
    rows = task.load_test("de", "sample").select(range(12))
    ids, windows = task.example_ids(rows), task.windows(rows, tokenizer, 160, 32)
    results = [
        predict(model, tokenizer, task, rows, ids, windows, InferenceOptions(max_tokens, bf16=False))
        for max_tokens in (1, 1000)
    ]
    assert [row.id for row in results[0]] == ids
    assert [row.prediction for row in results[0]] == [row.prediction for row in results[1]]
    assert [row.score for row in results[0]] == pytest.approx([row.score for row in results[1]], rel=1e-4)
    context = rows["context"]
    assert all(row.prediction in context[index] for index, row in enumerate(results[0]))


def test_a_subset_is_whole_paragraphs_and_the_same_in_every_language(models, tmp_path):
    scores = score(models, "xquad", tmp_path, "--max_examples", "9", "--seed", "5", "--languages", "ar", "zh")
    paragraphs = [id.rsplit("-", 1)[0] for id in scores["ids"]]
    assert len(scores["ids"]) == 8 and all(paragraphs.count(name) == 2 for name in paragraphs)
    for language in ("ar", "zh"):
        assert [row["id"] for row in read_predictions(tmp_path, language)] == scores["ids"]
    other = score(models, "xquad", tmp_path / "b", "--max_examples", "9", "--seed", "6", "--languages", "ar")
    assert other["ids"] != scores["ids"]


@pytest.fixture
def predicted(monkeypatch):
    """The languages that are predicted; with "stop" among them, scoring is interrupted before English."""
    languages = []

    def recording_predict(*arguments, description, **options):
        if "stop" in languages and description == "en":
            raise KeyboardInterrupt
        languages.append(description)
        return predict(*arguments, description=description, **options)

    monkeypatch.setattr("xlfa.evaluation.predict", recording_predict)
    return languages


def score_until_english(models, output, predicted):
    predicted.append("stop")
    with pytest.raises(KeyboardInterrupt):
        score(models, "xnli", output, "--languages", "ar", "de", "en")
    predicted.clear()


def test_an_interrupted_run_goes_on_with_the_languages_that_are_left(models, tmp_path, predicted):
    score_until_english(models, tmp_path / "a", predicted)
    scores = [score(models, "xnli", tmp_path / name, "--languages", "ar", "de", "en") for name in ("a", "b")]
    assert predicted == ["en", "ar", "de", "en"]
    assert scores[0] == scores[1]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["predictions", "scores.json", "scores.png"]


def test_a_finished_run_and_one_with_other_settings_begin_anew(models, tmp_path, predicted):
    score_until_english(models, tmp_path, predicted)
    for _ in range(2):
        score(models, "xnli", tmp_path, "--languages", "ar", "de", "en", "--max_tokens_per_batch", "800")
    assert predicted == ["ar", "de", "en"] * 2


def test_predictions_of_an_interrupted_run_are_not_lost_to_one_of_fewer_languages(models, tmp_path, predicted):
    score_until_english(models, tmp_path, predicted)
    with pytest.raises(XLFAError, match=f"{tmp_path} has scores of another run of de too"):
        score(models, "xnli", tmp_path, "--languages", "ar", "en", "--max_tokens_per_batch", "800")
    score(models, "xnli", tmp_path, "--languages", "ar", "en")
    assert predicted == ["en"]
    assert sorted(path.stem for path in (tmp_path / "predictions").iterdir()) == ["ar", "de", "en"]
    score(models, "xnli", tmp_path, "--languages", "ar", "de", "en")
    assert predicted == ["en"] and not (tmp_path / "unfinished.json").exists()


def test_a_model_that_was_trained_again_is_another_one(models, tmp_path, predicted):
    model = tmp_path / "model"
    shutil.copytree(models["xnli"], model)
    score_until_english({"xnli": str(model)}, tmp_path / "out", predicted)
    os.utime(model / "model.safetensors", (1, 1))
    score({"xnli": str(model)}, "xnli", tmp_path / "out", "--languages", "ar", "de")
    assert predicted == ["ar", "de"]


def test_labels_that_changed_are_read_anew(models, tmp_path, predicted):
    data = tmp_path / "data" / "facebook" / "xnli"
    shutil.copytree(SAMPLE_ROOT / "facebook" / "xnli", data)
    root = ["--data_root", str(tmp_path / "data")]
    predicted.append("stop")
    with pytest.raises(KeyboardInterrupt):
        score(models, "xnli", tmp_path / "out", "--languages", "de", "en", *root)
    predicted.clear()
    path = next(path for path in data.rglob("*") if path.is_file() and "de" in path.relative_to(data).as_posix())
    os.utime(path, (1, 1))
    score(models, "xnli", tmp_path / "out", "--languages", "de", "en", *root)
    assert predicted == ["de", "en"]


def test_finished_scores_of_more_languages_are_not_lost(models, tmp_path):
    score(models, "xnli", tmp_path, "--languages", "de", "en")
    before = (tmp_path / "scores.json").read_bytes()
    with pytest.raises(XLFAError, match=f"{tmp_path} has scores of another run of de too.*--output_dir"):
        score(models, "xnli", tmp_path, "--languages", "en")
    assert (tmp_path / "scores.json").read_bytes() == before and (tmp_path / "predictions" / "de.jsonl").exists()
    score(models, "xnli", tmp_path, "--languages", "de", "en", "fr")


def test_a_folder_that_cannot_be_written_is_named_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(XLFAError, match=f"cannot write to {tmp_path}/file/xnli .*--output_dir"):
        score({"xnli": f"{tmp_path}/none"}, "xnli", tmp_path / "file" / "xnli")


def test_two_runs_do_not_write_to_one_folder(models, tmp_path):
    with writing_alone(tmp_path), pytest.raises(XLFAError, match=f"another run is scoring into {tmp_path}"):
        score(models, "xnli", tmp_path, "--languages", "en")
    score(models, "xnli", tmp_path, "--languages", "en")


def test_the_default_folder_of_a_model_of_the_hub_has_its_whole_name():
    arguments = [EvaluationArguments(task="xnli", model=f"{org}/no-such-model") for org in ("a", "b")]
    assert [str(output_folder(own)) for own in arguments] == [f"{org}--no-such-model/scores/xnli" for org in ("a", "b")]


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    for commit in ("1" * 40, "2" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        (repository / "refs" / "main").write_text(commit)
        assert commit in str(model_origin("org/name"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--languages", "de", "xx"], "has no language 'xx'"),
        (["--task", "mnist"], "mnist"),
        (["--model", "/nowhere"], "--model /nowhere"),
        (["--data_root", "/nowhere"], "no data set 'facebook/xnli'"),
        (["--max_examples", "2"], "--max_examples 2"),
    ],
)
def test_bad_input_gives_one_error_that_names_it(models, tmp_path, flags, message):
    with pytest.raises(XLFAError) as error:
        score(models, "xnli", tmp_path, *flags)
    assert message in str(error.value)
    assert not (tmp_path / "scores.json").exists()


def test_languages_with_another_split_than_english_are_not_parallel(models, tmp_path, monkeypatch):
    load = Task.load_test

    def load_validation(self, language, data_root):
        rows = load(self, language, data_root)
        return rows if language != "de" else Dataset(rows.data, split="validation")

    monkeypatch.setattr(Task, "load_test", load_validation)
    with pytest.raises(XLFAError, match="the split 'test' in English, and 'validation' alone in 'de'"):
        score(models, "xnli", tmp_path, "--languages", "en", "de")


def test_an_id_that_stands_twice_is_named():
    task = get_task("xquad")
    rows = Dataset.from_dict({"id": ["a", "b", "a"]})
    with pytest.raises(XLFAError, match=r"google/xquad \(de\) has several examples with the id 'a'"):
        select_ids(task, rows, ["a"], "de")


@pytest.mark.parametrize("labels", [["different", "paraphrase"], ["neutral", "entailment", "contradiction"]])
def test_a_model_with_other_labels_is_refused(tiny_encoder, tmp_path, labels):
    model = XLFAForSequenceClassification.from_encoder(tiny_encoder, id2label=dict(enumerate(labels)))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        XLFAError, match=f"has the labels {', '.join(labels)}; the task 'xnli' needs entailment, neutral"
    ):
        score({"xnli": str(tmp_path)}, "xnli", tmp_path / "out")


@pytest.mark.parametrize("flag", ["model", "question_model"])
def test_a_model_without_its_tokenizer_is_refused_by_its_flag(models, tmp_path, flag):
    folder = shutil.copytree(models["xnli"], tmp_path / "run")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(XLFAError, match=rf"--{flag} {folder}: cannot load it \(it has no tokenizer files"):
        load_model(get_task("xnli"), str(folder), flag)


def test_a_folder_that_is_no_model_another_model_and_another_head_are_refused(models, tiny_encoder, tmp_path):
    for model, message in (
        (str(tmp_path), "holds no trained model"),
        (tiny_encoder, "a 'bert' model, not an XLFA one"),
        (models["xquad"], "needs XLFAForSequenceClassification"),
    ):
        with pytest.raises(XLFAError, match=message):
            score({"xnli": model}, "xnli", tmp_path / "out")
