"""`--compare`: differences, intervals and p values of two runs, and one clear error where runs cannot be compared."""

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import BertConfig

from modeling_xlfa import XLFAConfig
from xlfa.cli import main as xlfa_main
from xlfa.comparison import compare_runs
from xlfa.errors import XLFAError
from xlfa.evaluation import main
from xlfa.files import write_text
from xlfa.scores import SCORES_FILE, build_scores, predictions_file, write_predictions
from xlfa.tasks import Prediction, get_task

XNLI, WIKIANN = get_task("xnli"), get_task("wikiann")
LANGUAGES = ("en", "de", "th")


def write_run(folder, predictions, clusters, task=XNLI):
    config = XLFAConfig(text_config=BertConfig(num_hidden_layers=4))
    scores = build_scores(task, predictions, clusters, dict.fromkeys(predictions, "test"), config, {})
    write_text(folder / SCORES_FILE, json.dumps(scores))
    for language, rows in predictions.items():
        write_predictions(predictions_file(folder, language), rows)


def guesses(seed, accuracy, number=300):
    """Predictions by language, right with a probability."""
    labels = [XNLI.label_names[index % 3] for index in range(number)]
    rng = np.random.default_rng(seed)
    return {
        language: [
            Prediction(str(index), label if right else XNLI.label_names[index % 3 - 1], label, 0.5)
            for index, (label, right) in enumerate(zip(labels, rng.random(number) < accuracy))
        ]
        for language in LANGUAGES
    }


@pytest.fixture
def runs(tmp_path):
    """Folders of a run of accuracy 0.5, in scores/xnli as of a trained model, and of one of 0.7."""
    clusters = [index // 3 for index in range(300)]
    write_run(tmp_path / "a" / "scores" / "xnli", guesses(1, 0.5), clusters)
    write_run(tmp_path / "b", guesses(2, 0.7), clusters)
    return tmp_path / "a", tmp_path / "b"


def compare(*runs, task="xnli", flags=()):
    main(["--compare", *map(str, runs), "--task", task, *map(str, flags)])


def test_a_better_run_is_better_in_every_language_and_mean(runs, tmp_path, capsys):
    compare(*runs, flags=["--output_dir", tmp_path / "out"])
    comparison = json.loads((tmp_path / "out" / "compare.json").read_text())
    scores = [json.loads((folder / SCORES_FILE).read_text()) for folder in (runs[0] / "scores" / "xnli", runs[1])]
    differences = comparison["differences"]
    for language in LANGUAGES:
        cell = differences[language]["accuracy"]
        a, b = (own["languages"][language]["accuracy"] for own in scores)
        assert (cell["a"], cell["b"], cell["difference"]) == pytest.approx((a, b, b - a))
        assert 0 < cell["interval"][0] < cell["difference"] < cell["interval"][1]
        assert cell["p"] <= cell["p_adjusted"] < 0.01
    average = differences["average"]["accuracy"]
    assert average["difference"] == pytest.approx(scores[1]["average"]["accuracy"] - scores[0]["average"]["accuracy"])
    # The mean over independent languages is the more certain one, and it is not among the hypotheses adjusted for.
    assert average["interval"][1] - average["interval"][0] < cell["interval"][1] - cell["interval"][0]
    assert "p_adjusted" not in average
    assert {"germanic", "kra_dai", "transfer_gap"} <= set(differences)
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert table["de"][2] == f"{differences['de']['accuracy']['difference']:+.2f}"
    assert table["average_xtreme"] == ["-"] * 6


def test_a_single_cluster_has_no_p_values(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write_run(tmp_path / name, guesses(seed, 0.5, 9), [0] * 9)
    cell = compare_runs(XNLI, tmp_path / "a", tmp_path / "b")["differences"]["de"]["accuracy"]
    assert cell["difference"] is not None
    assert (cell["interval"], cell["p"], cell["p_adjusted"]) == (None, None, None)


def test_a_run_against_itself_has_no_difference(runs, capsys):
    compare(runs[0], runs[0])
    for line in capsys.readouterr().out.splitlines()[4:7]:
        assert line.split()[3:] == ["+0.00", "[+0.00,", "+0.00]", "1.0000", "1.0000"]


def test_the_interval_is_of_pairs(tmp_path, capsys):
    """A run that is right where another one is, and twice more, differs for sure, though both are uncertain."""
    first = guesses(1, 0.5)
    second = {
        language: [
            dataclasses.replace(row, prediction=row.label) if index < 30 else row for index, row in enumerate(rows)
        ]
        for language, rows in first.items()
    }
    for name, predictions in (("a", first), ("b", second)):
        write_run(tmp_path / name, predictions, list(range(300)))
    compare(tmp_path / "a", tmp_path / "b", flags=["--output_dir", tmp_path])
    cell = json.loads((tmp_path / "compare.json").read_text())["differences"]["en"]["accuracy"]
    assert cell["p"] < 0.01
    own = json.loads((tmp_path / "a" / SCORES_FILE).read_text())["intervals"]["languages"]["en"]["accuracy"]
    assert cell["interval"][1] - cell["interval"][0] < 0.6 * (own[1] - own[0])


def test_languages_with_their_own_examples_are_compared(tmp_path, capsys):
    def tagged(shift):
        return {
            language: [
                Prediction(f"{index}", ["B-PER", "I-PER" if (index + shift) % 3 else "O"], ["B-PER", "I-PER"], 0.5)
                for index in range(number)
            ]
            for language, number in (("en", 40), ("ru", 25))
        }

    clusters = {"en": list(range(40)), "ru": list(range(25))}
    for name, shift in (("a", 0), ("b", 1)):
        write_run(tmp_path / name, tagged(shift), clusters, WIKIANN)
    compare(tmp_path / "a", tmp_path / "b", task="wikiann")
    assert "wikiann, f1: B - A, 25 to 40 examples a language" in capsys.readouterr().out


def change_scores(folder, **fields):
    path = folder / SCORES_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def without_clusters(folder):
    scores = json.loads((folder / SCORES_FILE).read_text())
    del scores["clusters"]
    (folder / SCORES_FILE).write_text(json.dumps(scores))


def without_a_language(folder):
    scores = json.loads((folder / SCORES_FILE).read_text())
    del scores["languages"]["th"]
    (folder / SCORES_FILE).write_text(json.dumps(scores))


def another_label(folder):
    path = predictions_file(folder, "de")
    path.write_text(path.read_text().replace('"label": "neutral"', '"label": "contradiction"', 1))


def fewer_examples(folder):
    write_run(folder, guesses(2, 0.7, 297), [index // 3 for index in range(297)])


def other_ids(folder):
    renamed = {
        language: [dataclasses.replace(row, id=f"x{row.id}") for row in rows]
        for language, rows in guesses(2, 0.7).items()
    }
    write_run(folder, renamed, [index // 3 for index in range(300)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fewer_examples, "number of examples in 'en' 300 in the first, 297 in the second"),
        (other_ids, "id of example 1 in 'en' '0' in the first, 'x0' in the second"),
        (another_label, "label of example '1' in 'de' 'neutral' in the first, 'contradiction' in the second"),
        (without_a_language, "languages en de th in the first, en de in the second"),
        (
            lambda folder: change_scores(folder, clusters=list(range(300))),
            "cluster of example '1' in 'en' 0 in the first, 1 in the second",
        ),
        (lambda folder: change_scores(folder, dataset="org/other"), "dataset 'facebook/xnli' in the first"),
        (lambda folder: change_scores(folder, task="xquad"), "scored on the task 'xquad', not on 'xnli'"),
        (lambda folder: change_scores(folder, schema_version=1), "schema_version 1"),
        (without_clusters, "lacks 'clusters', which a comparison needs: score the run again"),
        (lambda folder: (folder / SCORES_FILE).write_text("{"), "holds no scores"),
        (lambda folder: (folder / SCORES_FILE).unlink(), "holds scores.json"),
        (lambda folder: predictions_file(folder, "de").unlink(), "de.jsonl"),
        (lambda folder: predictions_file(folder, "de").write_text('{"a": 1}\n'), "de.jsonl holds no predictions"),
        (lambda folder: predictions_file(folder, "de").write_text(""), "de.jsonl has other examples"),
        (shutil.rmtree, "holds scores.json"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_by_what_differs(runs, tmp_path, change, message):
    change(runs[1])
    with pytest.raises(XLFAError) as error:
        compare(*runs, flags=["--output_dir", tmp_path / "out"])
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_read_or_written_are_named(runs, tmp_path, capsys, monkeypatch):
    with pytest.raises(XLFAError, match="--compare n+: cannot read it: File name too long"):
        compare(runs[0], "n" * 300)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(XLFAError, match=f"cannot write to {file} .File exists.: name another folder with --output_dir"):
        compare(*runs, flags=["--output_dir", file])
    assert not capsys.readouterr().out

    def refuse(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(XLFAError, match=f"cannot read the scores {runs[0]}/scores/xnli/scores.json: Permission denied"):
        compare(*runs)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --model"),
        (["--model", "m", "--compare", "a", "b"], "either --model"),
        (["--compare", "a"], "--compare takes two runs, not 1"),
        (["--compare", "a", "b", "c"], "--compare takes two runs, not 3"),
    ],
)
def test_the_command_line_wants_a_model_or_two_runs(flags, message):
    with pytest.raises(XLFAError, match=message):
        main([*flags, "--task", "xnli"])


def test_an_error_of_the_console_script_is_one_line(capsys):
    with pytest.raises(SystemExit) as done:
        xlfa_main(["eval", "--compare", "/nowhere/a", "/nowhere/b", "--task", "xnli"])
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith("error: --compare /nowhere/a: neither it nor its scores/xnli holds")
