"""The registry: every task fits the command lines, and one new entry is trained and scored like the others."""

import json

import jsonschema
import pytest
from datasets import Dataset

from xlfa.arguments import DataArguments, ModelArguments, XLFATrainingArguments, parse_arguments
from xlfa.evaluation import EvaluationArguments, evaluate_model
from xlfa.languages import FAMILIES
from xlfa.scores import SCORES_SCHEMA
from xlfa.tasks import TASKS, get_task
from xlfa.tasks.sequence_classification import SequenceClassificationTask
from xlfa.tasks.task import Defaults, Source
from xlfa.training import train


def test_the_tasks_of_xtreme_that_have_a_head_are_there():
    assert list(TASKS) == ["xnli", "pawsx", "wikiann", "udpos", "xquad", "mlqa", "tydiqa"]
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("name", list(TASKS))
def test_both_command_lines_know_the_task_and_its_recipe(name, tmp_path):
    types = [ModelArguments, DataArguments, XLFATrainingArguments]
    argv = ["--model", "m", "--task", name, "--output_dir", str(tmp_path)]
    _, data, training = parse_arguments(types, argv, "xlfa train", "")
    recipe = get_task(name).defaults
    assert (training.learning_rate, training.num_train_epochs) == (recipe.learning_rate, recipe.epochs)
    assert (data.max_length, training.metric_for_best_model) == (recipe.max_length, get_task(name).metrics[0])
    (evaluation,) = parse_arguments([EvaluationArguments], argv, "xlfa eval", "")
    assert evaluation.task == name


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_languages_are_iso_codes_of_a_known_family_with_english_among_them(task):
    assert "en" in task.test_configs and set(task.xtreme_languages) <= set(task.test_configs)
    assert all(len(code) == 2 and code in FAMILIES for code in task.test_configs)


def test_a_new_entry_needs_no_other_change(monkeypatch, own_cache, write_mirror, tiny_encoder, tmp_path):
    source = Source("org/weather", "en", "train")
    task = SequenceClassificationTask(
        name="weather",
        train=source,
        validation=None,
        test_dataset="org/weather",
        test_split="test",
        test_configs={"de": "de", "en": "en"},
        xtreme_languages=("de", "en"),
        defaults=Defaults(learning_rate=1e-4, batch_size=4, epochs=1, max_length=32),
        columns=("place", "report", "label"),
        group_columns=("place",),
        sentence_columns=("place", "report"),
        label_names=("dry", "wet"),
    )
    monkeypatch.setitem(TASKS, "weather", task)
    rows = Dataset.from_list(
        [
            {"place": f"town {number // 2}", "report": "rain" if number % 2 else "sun", "label": number % 2}
            for number in range(8)
        ]
    )
    root = write_mirror("org/weather", {"en": {"train": rows, "test": rows}, "de": {"test": rows}})
    train(
        ModelArguments(model=tiny_encoder),
        DataArguments(task="weather", data_root=root, max_length=32),
        XLFATrainingArguments(output_dir=str(tmp_path / "run"), max_steps=1, save_strategy="no"),
    )
    scores = evaluate_model(EvaluationArguments(model=str(tmp_path / "run"), task="weather", data_root=root))
    jsonschema.validate(scores, json.loads(SCORES_SCHEMA.read_text()))
    assert set(scores["languages"]) == {"de", "en"} and scores["examples"] == 8
