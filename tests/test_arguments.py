"""Layers of a command line: the task's recipe, then the YAML file, then the flags; what is unknown is refused."""

import pytest
import yaml

from xlfa.arguments import (
    DataArguments,
    ModelArguments,
    XLFATrainingArguments,
    parse_arguments,
    yaml_flags,
)
from xlfa.errors import XLFAError
from xlfa.evaluation import EvaluationArguments
from xlfa.tasks import get_task


@pytest.fixture
def parse(tmp_path):
    """Parses flags for training, behind a YAML file where `settings` are given."""

    def run(*flags, settings=None):
        argv = [*flags]
        if settings is not None:
            (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
            argv = [str(tmp_path / "run.yaml"), *argv]
        types = [ModelArguments, DataArguments, XLFATrainingArguments]
        return parse_arguments(types, [*argv, "--output_dir", str(tmp_path / "out")], "xlfa train", "")

    return run


@pytest.mark.parametrize("name", ["xnli", "xquad"])
def test_the_recipe_of_the_task_is_the_lowest_layer(parse, name):
    _, data, training = parse("--model", "m", "--task", name)
    recipe = get_task(name).defaults
    assert training.learning_rate == recipe.learning_rate
    assert training.per_device_train_batch_size == recipe.batch_size
    assert training.num_train_epochs == recipe.epochs
    assert (data.max_length, data.doc_stride) == (recipe.max_length, recipe.doc_stride)


def test_the_file_wins_over_the_recipe_and_a_flag_over_the_file(parse):
    settings = {"model": "m", "task": "xnli", "learning_rate": 1e-5, "max_length": 96, "fusion_gate": "sigmoid"}
    model, data, training = parse("--max_length", "64", "--fusion_gate=literal", settings=settings)
    assert training.learning_rate == 1e-5
    assert (data.max_length, model.fusion_gate) == (64, "literal")
    assert training.num_train_epochs == get_task("xnli").defaults.epochs


def test_a_flag_wins_over_the_recipe(parse):
    _, _, training = parse("--model", "m", "--task", "xquad", "--num_train_epochs", "7")
    assert training.num_train_epochs == 7


def test_the_recipe_is_that_of_a_task_named_by_flag_over_the_file(parse):
    _, data, _ = parse("--task", "xquad", settings={"model": "m", "task": "xnli"})
    assert (data.task, data.max_length) == ("xquad", get_task("xquad").defaults.max_length)


def test_lists_mappings_booleans_and_nulls_of_a_file_arrive(parse):
    settings = {
        "model": "m",
        "task": "xnli",
        "parallel_languages": ["de", "th"],
        "parallel_filter": ["source=a b"],
        "encoder_config": {"attention_probs_dropout_prob": 0.0},
        "trim_vocab": True,
        "freeze_word_embeddings": False,
        "fusion_layer_norm": True,
        "ot_weight": None,
        "ot_epsilon": 0.05,
    }
    model, data, _ = parse(settings=settings)
    assert data.parallel_languages == ["de", "th"]
    assert data.parallel_filter == ["source=a b"]
    assert model.encoder_config == '{"attention_probs_dropout_prob": 0.0}'
    assert (model.trim_vocab, model.freeze_word_embeddings, model.fusion_layer_norm) == (True, False, True)
    assert model.config_fields() == {"fusion_layer_norm": True, "ot_epsilon": 0.05}


def test_a_list_of_a_flag_replaces_that_of_the_file(parse):
    settings = {"model": "m", "task": "xnli", "parallel_languages": ["de", "th"]}
    assert parse("--parallel_languages", "sw", settings=settings)[1].parallel_languages == ["sw"]


def test_a_floating_number_without_point_in_a_file_arrives_as_a_number(parse, tmp_path):
    (tmp_path / "own.yaml").write_text("model: m\ntask: xnli\nlearning_rate: 5e-6\n")
    types = [ModelArguments, DataArguments, XLFATrainingArguments]
    argv = [str(tmp_path / "own.yaml"), "--output_dir", str(tmp_path)]
    assert parse_arguments(types, argv, "xlfa train", "")[2].learning_rate == 5e-6


@pytest.mark.parametrize(("field", "name"), [("ot_layer", "fused"), ("fusion_layer", "learned")])
def test_a_layer_index_becomes_a_number_and_a_name_stays_one(parse, field, name):
    def found(*flags, **settings):
        return parse(*flags, settings={"model": "m", "task": "xnli"} | settings)[0].config_fields()[field]

    assert found(f"--{field}", "8") == found(f"--{field}=8") == found(**{field: 8}) == 8
    assert found(f"--{field}", name, **{field: 8}) == found(**{field: name}) == name


def test_fields_that_are_not_given_are_left_to_the_config(parse):
    assert parse("--model", "m", "--task", "xnli")[0].config_fields() == {}


def test_an_unknown_key_of_a_file_is_named(parse):
    with pytest.raises(XLFAError, match="--ot_epsilom 0.1.*xlfa train --help"):
        parse(settings={"model": "m", "task": "xnli", "ot_epsilom": 0.1})


def test_an_unknown_flag_is_named_and_not_taken_for_a_longer_one(parse):
    with pytest.raises(XLFAError, match="--ot_eps 0.1"):
        parse("--model", "m", "--task", "xnli", "--ot_eps", "0.1")


def test_an_unknown_task_is_named(parse):
    with pytest.raises(XLFAError, match="'squadron'"):
        parse("--model", "m", "--task", "squadron")


def test_a_choice_that_does_not_exist_is_named_with_those_that_do(parse):
    with pytest.raises(XLFAError, match="--ot_solver.*'emd'.*'exact'"):
        parse("--model", "m", "--task", "xnli", "--ot_solver", "emd")


def test_a_missing_flag_is_named(parse):
    with pytest.raises(XLFAError, match="--model.*xlfa train --help"):
        parse("--task", "xnli")


def test_a_value_that_training_arguments_refuse_is_a_user_error(parse):
    with pytest.raises(XLFAError, match="fortnight"):
        parse("--model", "m", "--task", "xnli", "--save_strategy", "fortnight")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(XLFAError, match="no configuration file .*absent.yaml"):
        parse_arguments([EvaluationArguments], [str(tmp_path / "absent.yaml")], "xlfa eval", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "mapping"),
        ("", "mapping"),
        ("a: [1", "not valid YAML"),
        ("a: Bücher", "not UTF-8"),
        ("a: {b: 1,\n    b: 2}", "the key 'b' is given twice(.|\n)*line 2"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(XLFAError, match=f"bad.yaml.*{message}"):
        yaml_flags(tmp_path / "bad.yaml")


def test_a_file_may_say_no_and_name_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    text = "eval_strategy: no\nlanguages: [no, de]\nbf16: false\nother: {<<: {a: 1}, a: 2}\noutput_dir: ~/runs\n"
    (tmp_path / "run.yaml").write_text(text)
    flags = ["--eval_strategy", "no", "--languages", "no", "de", "--bf16", "False", "--other", '{"a": 2}']
    assert yaml_flags(tmp_path / "run.yaml") == [*flags, "--output_dir", "/home/anna/runs"]


def test_scoring_takes_no_recipe_so_that_the_settings_of_the_run_hold():
    (arguments,) = parse_arguments([EvaluationArguments], ["--model", "m", "--task", "xnli"], "xlfa eval", "")
    assert arguments.max_length is None
    assert arguments.doc_stride is None


def test_training_validates_and_saves_after_every_epoch_by_default(parse):
    training = parse("--model", "m", "--task", "xnli")[2]
    assert (str(training.eval_strategy.value), str(training.save_strategy.value)) == ("epoch", "epoch")
