"""The options of training that researchers rely on, each seen in what a run does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xlfa.arguments import XLFATrainingArguments
from xlfa.errors import XLFAError
from xlfa.tasks.sequence_classification import SequenceClassificationTask
from xlfa.trainer import XLFATrainer
from xlfa.training import main

NO_DROPOUT = ["--encoder_config", '{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}']
ALIGNED = ["--ot_weight", "0.5", "--parallel_dataset", "local/parallel", "--parallel_languages", "de"]
STEPWISE = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
BEST = [*STEPWISE, "--load_best_model_at_end", "true", "--save_total_limit", "9"]


def train(encoder, output, *flags):
    """Twelve examples in steps of four; the final weights."""
    data = ["--task", "xnli", "--data_root", "sample", "--max_train_examples", "12", "--max_eval_examples", "3"]
    steps = ["--per_device_train_batch_size", "4", "--logging_steps", "1", "--learning_rate", "1e-3", "--seed", "3"]
    quiet = ["--eval_strategy", "no", "--save_strategy", "no"]
    main(["--model", encoder, "--output_dir", str(output), *data, *steps, *quiet, *flags])
    return load_file(Path(output) / "model.safetensors")


def state_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())


def log_of(folder, name):
    """The steps and values of one entry of the log."""
    return [(entry["step"], entry[name]) for entry in state_of(folder)["log_history"] if name in entry]


def are_equal(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_seed_fixes_the_weights(tiny_encoder, tmp_path):
    """With dropout, fusion and parallel pairs."""
    flags = ["--max_steps", "3", "--num_train_epochs", "1", *ALIGNED]
    first, second = (train(tiny_encoder, tmp_path / name, *flags) for name in ("first", "second"))
    assert are_equal(first, second)
    assert not are_equal(first, train(tiny_encoder, tmp_path / "other", *flags, "--seed", "4"))


def test_steps_of_training_and_validation(tiny_encoder, tmp_path):
    train(tiny_encoder, tmp_path, "--max_steps", "5", "--eval_strategy", "steps", "--eval_steps", "2")
    assert state_of(tmp_path)["global_step"] == 5
    assert [step for step, _ in log_of(tmp_path, "eval_accuracy")] == [2, 4, 5]


@pytest.fixture
def scored(monkeypatch):
    """Sets what the validations of the next run give, one after the other; returns the languages that are scored."""

    def give(*values):
        found, languages = iter(values), []

        def score(task, predictions, language):
            languages.append(language)
            return {"accuracy": next(found)}

        monkeypatch.setattr(SequenceClassificationTask, "score", score)
        return languages

    return give


def test_early_stopping_keeps_the_best_by_the_english_validation(tiny_encoder, tmp_path, scored):
    languages = scored(20.0, 60.0, 50.0, 60.0, 60.0)
    weights = train(tiny_encoder, tmp_path / "run", *BEST, "--max_steps", "9", "--early_stopping_patience", "2")
    # The fifth value is that of the best model, which the run ends with.
    assert len(languages) == 5 and set(languages) == {"en"}
    state = state_of(tmp_path / "run")
    assert state["global_step"] == 4 and state["best_metric"] == 60.0
    saved = {step: load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4)}
    assert are_equal(weights, saved[2]) and not are_equal(weights, saved[4])


@pytest.mark.parametrize(("step", "left"), [(3, [60.0, 60.0]), (4, [60.0])])
def test_a_resumed_run_stops_where_the_unbroken_one_does(tiny_encoder, tmp_path, scored, step, left):
    """Also if it was interrupted after the decision to stop."""
    flags = [*BEST, "--max_steps", "9", "--early_stopping_patience", "2"]
    scored(20.0, 60.0, 50.0, 60.0, 60.0)
    weights = train(tiny_encoder, tmp_path, *flags)
    scored(*left)
    checkpoint = str(tmp_path / f"checkpoint-{step}")
    assert are_equal(weights, train(tiny_encoder, tmp_path, *flags, "--resume_from_checkpoint", checkpoint))
    assert state_of(tmp_path)["global_step"] == 4


def test_a_gain_below_the_threshold_is_none(tiny_encoder, tmp_path, scored):
    scored(20.0, 20.4, 20.8, 20.8)
    flags = ["--early_stopping_patience", "2", "--early_stopping_threshold", "1"]
    train(tiny_encoder, tmp_path, *BEST, "--max_steps", "9", *flags)
    assert state_of(tmp_path)["global_step"] == 3


@pytest.mark.parametrize("in_hardware", [True, False])
def test_bfloat16_is_the_default_where_the_processor_multiplies_it(tmp_path, monkeypatch, in_hardware):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": in_hardware})
    assert XLFATrainingArguments(str(tmp_path), use_cpu=True).bf16 is in_hardware
    for given in (True, False):
        assert XLFATrainingArguments(str(tmp_path), use_cpu=True, bf16=given).bf16 is given


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--early_stopping_patience", "2"], "--early_stopping_patience 2 needs --load_best_model_at_end true"),
        ([*BEST, "--early_stopping_patience", "0"], "--early_stopping_patience 0: at least 1"),
        (["--early_stopping_threshold", "1"], "1.0 applies only with --early_stopping_patience"),
        (["--early_stopping_threshold", "-1"], "--early_stopping_threshold -1.0: at least 0"),
        (["--logging_nan_inf_filter", "true"], "--logging_nan_inf_filter does not apply"),
        (["--auto_find_batch_size", "true"], "--auto_find_batch_size does not apply"),
        (["--save_only_model", "true"], "--save_only_model does not apply"),
        (["--bf16_full_eval", "true"], "--bf16_full_eval does not apply"),
        (["--eval_accumulation_steps", "2"], "--eval_accumulation_steps does not apply"),
        (["--max_train_examples", "0"], "--max_train_examples 0: at least 1"),
        (["--max_eval_examples", "1"], "--max_eval_examples 1 is smaller than one cluster"),
        (["--max_length", "513"], "--max_length 513: the encoder has positions for 512 tokens"),
        (["--report_to", "paper"], "--report_to paper: there are .*tensorboard, trackio, wandb"),
    ],
)
def test_options_that_do_not_go_together(tiny_encoder, tmp_path, flags, message):
    with pytest.raises(XLFAError, match=message):
        train(tiny_encoder, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_gradients_are_clipped(tiny_encoder, tmp_path):
    """A step of plain SGD with rate 1 changes the weights by the gradient that it is given."""
    flags = ["--max_steps", "1", "--optim", "sgd", "--lr_scheduler_type", "constant"]
    before = train(tiny_encoder, tmp_path / "before", *flags, "--learning_rate", "0")
    for limit in (0.05, 100.0):
        folder = tmp_path / str(limit)
        after = train(tiny_encoder, folder, *flags, "--learning_rate", "1", "--max_grad_norm", str(limit))
        [(_, norm)] = log_of(folder, "grad_norm")
        assert 0.05 < norm < 100
        # Running statistics of a batch norm are no weights.
        trained = [name for name, values in after.items() if values.is_floating_point() and "running" not in name]
        change = torch.stack([(after[name] - before[name]).norm() for name in trained]).norm().item()
        assert change == pytest.approx(min(norm, limit), rel=1e-4)


def test_the_rate_warms_up(tiny_encoder, tmp_path):
    train(tiny_encoder, tmp_path, "--max_steps", "4", "--warmup_steps", "2")
    assert [rate for _, rate in log_of(tmp_path, "learning_rate")] == pytest.approx([0, 5e-4, 1e-3, 5e-4])


def test_gradient_checkpointing_gives_the_same_weights(tiny_encoder, tmp_path, monkeypatch):
    """With fusion and parallel pairs, whose states are computed again in the backward pass."""
    seen, plain_step = [], XLFATrainer.training_step

    def training_step(trainer, model, *arguments):
        seen.append(model.is_gradient_checkpointing)
        return plain_step(trainer, model, *arguments)

    monkeypatch.setattr(XLFATrainer, "training_step", training_step)
    flags = ["--max_steps", "3", "--classifier_dropout", "0", *NO_DROPOUT, *ALIGNED]
    expected = train(tiny_encoder, tmp_path / "plain", *flags)
    found = train(tiny_encoder, tmp_path / "checkpointing", *flags, "--gradient_checkpointing", "true")
    assert seen == [False] * 3 + [True] * 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.full
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler, which torch.compile needs")
def test_a_compiled_model_gets_the_same_weights(tiny_encoder, tmp_path):
    """With fusion and parallel pairs. AdamW would make steps of the rounding, where a bias before a batch norm has no
    gradient."""
    sgd = ["--optim", "sgd", "--learning_rate", "0.1"]
    flags = ["--max_steps", "2", "--bf16", "false", "--classifier_dropout", "0", *NO_DROPOUT, *ALIGNED, *sgd]
    expected = train(tiny_encoder, tmp_path / "plain", *flags)
    compiled_before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = train(tiny_encoder, tmp_path / "compiled", *flags, "--torch_compile", "true")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled_before
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tensorboard_gets_losses_scores_and_settings(tiny_encoder, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ["--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1", "--report_to", "tensorboard"]
    train(tiny_encoder, tmp_path, *flags, *ALIGNED)
    [events] = tmp_path.rglob("events.out.tfevents.*")
    found = accumulator.EventAccumulator(str(events))
    found.Reload()
    for name in ("loss", "task_loss", "ot_loss", "grad_norm", "learning_rate"):
        values = {event.step: event.value for event in found.Scalars(f"train/{name}")}
        assert values == pytest.approx(dict(log_of(tmp_path, name))), name
    assert [event.step for event in found.Scalars("eval/accuracy")] == [1, 2]
    for tag, name, value in (("args", "max_steps", 2), ("model_config", "ot_weight", 0.5)):
        [text] = found.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val
        assert json.loads(text)[name] == value


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(tiny_encoder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{name}_available", lambda: False)
    with pytest.raises(XLFAError, match=f"--report_to {name}: its package is not installed: pip install {name}"):
        train(tiny_encoder, tmp_path / "run", "--report_to", name)
    assert not (tmp_path / "run").exists()
