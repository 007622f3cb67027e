"""Checkpoints: which count, what a changed run, a full disk and a broken loss do, and that the last good one stays."""

import errno
import json
import resource
import shutil
from contextlib import contextmanager
from functools import wraps

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file
from transformers import TrainerState

from modeling_xlfa import XLFAForSequenceClassification
from xlfa.arguments import XLFATrainingArguments
from xlfa.checkpoints import (
    MANIFEST_FILE,
    BestCheckpoint,
    check_unused,
    checkpoints_in,
    complete,
    digest_of_rows,
    find_checkpoint,
    find_defect,
    is_complete,
    is_out_of_space,
    newest_complete,
    remove_old,
)
from xlfa.errors import XLFAError
from xlfa.run_file import RUN_FILE
from xlfa.trainer import XLFATrainer
from xlfa.training import main

WEIGHTS = "model.safetensors"
FILES = ("config.json", WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


# Folders


@pytest.fixture
def write_checkpoint(tmp_path):
    """Writes the files of a checkpoint, without looking like one inside, and declares it complete."""

    def write(step, whole=True):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name in FILES:
            (checkpoint / name).write_text(json.dumps({"best_model_checkpoint": None, "file": name}))
        if whole:
            complete(checkpoint, {"digests": {}, "settings": {}})
        return checkpoint

    return write


def arguments(folder, resume=None, **options):
    return XLFATrainingArguments(output_dir=str(folder), resume_from_checkpoint=resume, **options)


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
def test_a_truncated_checkpoint_is_passed_over_and_named(write_checkpoint, tmp_path, caplog, name):
    older, newer = write_checkpoint(3), write_checkpoint(12)
    assert find_checkpoint(arguments(tmp_path, "true"), WEIGHTS) == str(newer)
    cut(newer / name)
    assert find_checkpoint(arguments(tmp_path, "true"), WEIGHTS) == str(older)
    assert f"{newer} is passed over: " in caplog.text and name in caplog.text
    with pytest.raises(XLFAError, match=f"checkpoint-12: .*not a whole one: .*{name}"):
        find_checkpoint(arguments(tmp_path, str(newer)), WEIGHTS)
    (newer / name).unlink()
    with pytest.raises(XLFAError, match=f"not a whole one: it lacks {name}"):
        find_checkpoint(arguments(tmp_path, str(newer)), WEIGHTS)


def test_without_a_complete_checkpoint_there_is_none_to_go_on_from(write_checkpoint, tmp_path):
    write_checkpoint(3, whole=False)
    with pytest.raises(XLFAError, match="there is no checkpoint in .* that is complete; without the flag"):
        find_checkpoint(arguments(tmp_path, "true"), WEIGHTS)
    with pytest.raises(XLFAError, match="nowhere: .*there is no such folder"):
        find_checkpoint(arguments(tmp_path, str(tmp_path / "nowhere")), WEIGHTS)


def test_a_checkpoint_without_the_weights_that_the_run_needs_is_none(write_checkpoint, tmp_path):
    write_checkpoint(3)
    with pytest.raises(XLFAError, match="no checkpoint"):
        find_checkpoint(arguments(tmp_path, "true"), "adapter_model.safetensors")


def test_a_checkpoint_without_an_optimizer_is_complete_and_none_to_go_on_from(write_checkpoint, tmp_path):
    """As --save_only_model leaves it."""
    checkpoint = write_checkpoint(3, whole=False)
    (checkpoint / "optimizer.pt").unlink()
    complete(checkpoint, {"digests": {}, "settings": {}})
    assert is_complete(checkpoint)
    with pytest.raises(XLFAError, match="checkpoint-3: .* it lacks optimizer.pt"):
        find_checkpoint(arguments(tmp_path, str(checkpoint)), WEIGHTS)
    # Another name, as FSDP has it.
    (checkpoint / "optimizer.bin").write_text("")
    complete(checkpoint, {"digests": {}, "settings": {}})
    assert find_checkpoint(arguments(tmp_path, str(checkpoint)), WEIGHTS) == str(checkpoint)


def test_the_best_checkpoint_must_be_there_too(write_checkpoint, tmp_path):
    best, last = write_checkpoint(3), write_checkpoint(6, whole=False)
    # The run was begun in another working directory, or moved.
    (last / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": "runs/a/checkpoint-3"}))
    complete(last, {"digests": {}, "settings": {}})
    options = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    assert find_checkpoint(arguments(tmp_path, "true", **options), WEIGHTS) == str(last)
    cut(best / WEIGHTS)
    with pytest.raises(XLFAError, match="its best checkpoint so far, .*checkpoint-3: model.safetensors has"):
        find_checkpoint(arguments(tmp_path, "true", **options), WEIGHTS)
    assert find_checkpoint(arguments(tmp_path, "true"), WEIGHTS) == str(last)


def test_the_best_checkpoint_of_a_run_that_was_moved_lies_beside_the_resumed_one(write_checkpoint):
    best, last = write_checkpoint(3), write_checkpoint(6)
    for step, expected in ((3, str(best)), (4, None), (None, None)):
        state = TrainerState(best_global_step=step)
        BestCheckpoint(str(last)).on_train_begin(None, state, None)
        assert state.best_model_checkpoint == expected


def test_only_a_run_that_left_nothing_may_begin_anew(write_checkpoint, tmp_path):
    check_unused(tmp_path / "new")
    check_unused(tmp_path)
    checkpoint = write_checkpoint(3, whole=False)
    # Somebody else's: there is no run.json.
    with pytest.raises(XLFAError, match="holds an earlier run"):
        check_unused(tmp_path)
    (tmp_path / RUN_FILE).write_text('{"validation": null}')
    check_unused(tmp_path)
    complete(checkpoint, {})
    with pytest.raises(XLFAError, match="holds an earlier run"):
        check_unused(tmp_path)
    shutil.rmtree(checkpoint)
    (tmp_path / RUN_FILE).write_text('{"validation": {"eval_accuracy": 1.0}}')
    with pytest.raises(XLFAError, match="holds an earlier run"):
        check_unused(tmp_path)
    (tmp_path / RUN_FILE).write_text("{")
    with pytest.raises(XLFAError, match="cannot read .*run.json"):
        check_unused(tmp_path)


@pytest.mark.parametrize(
    ("newest", "limit", "best", "left"),
    [
        (10, None, None, [10, 8, 6, 4]),
        (10, 2, None, [10, 8]),
        (10, 1, None, [10]),
        (10, 1, 4, [10, 4]),
        (10, 3, 4, [10, 8, 4]),
        # The run went on from 6: 8 and 10 are of a branch that was left.
        (6, 2, None, [6, 4]),
        (6, 1, 10, [10, 6]),
    ],
)
def test_old_checkpoints_are_removed_beside_a_complete_one(write_checkpoint, tmp_path, newest, limit, best, left):
    for step in (4, 6, 8, 10):
        write_checkpoint(step)
    write_checkpoint(5, whole=False)
    write_checkpoint(9, whole=False)
    remove_old(tmp_path / f"checkpoint-{newest}", limit, None if best is None else f"elsewhere/checkpoint-{best}")
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_only_a_lack_of_space_is_called_one():
    assert is_out_of_space(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_out_of_space(OSError(errno.EACCES, "Permission denied"))
    assert not is_out_of_space(RuntimeError("CUDA out of memory"))


# Digests of data


def rows_of(number):
    return Dataset.from_dict(
        {
            "input_ids": [list(range(index % 7)) for index in range(number)],
            "text": [None if index % 5 == 0 else f"text {index}" for index in range(number)],
            "flag": [index % 3 == 0 for index in range(number)],
        }
    )


def test_a_digest_depends_on_the_content_and_not_on_its_layout(monkeypatch):
    monkeypatch.setattr("xlfa.checkpoints.ROWS_A_BLOCK", 16)
    rows = rows_of(61)
    digest = digest_of_rows(rows)
    parts = concatenate_datasets([rows.select(range(13)), rows.select(range(13, 61))])
    padded = rows_of(90).select(range(61))
    shuffled_back = rows.select(list(reversed(range(61)))).select(list(reversed(range(61))))
    assert {digest_of_rows(each) for each in (parts, padded, shuffled_back, rows_of(61))} == {digest}


def test_a_digest_changes_with_any_value(monkeypatch):
    monkeypatch.setattr("xlfa.checkpoints.ROWS_A_BLOCK", 16)
    changed = [rows_of(60), rows_of(61).select(list(reversed(range(61)))), rows_of(61).remove_columns("flag")]
    for column, value in (("input_ids", [1, 2]), ("text", "other"), ("text", None), ("flag", None)):
        columns = rows_of(61).to_dict()
        columns[column][31] = value
        changed.append(Dataset.from_dict(columns))
    digests = [digest_of_rows(each) for each in (rows_of(61), *changed)]
    assert len(set(digests)) == len(digests)


# Runs

BEST = ["--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "2"]


def train(encoder, output, *flags):
    """Five steps with dropout, fusion and the transport term, three an epoch; checkpoints after 2, 4 and 5."""
    common = ["--model", encoder, "--task", "xnli", "--data_root", "sample", "--output_dir", str(output), "--seed", "3"]
    small = ["--max_train_examples", "12", "--max_eval_examples", "3", "--max_steps", "5", "--save_strategy", "steps"]
    steps = ["--save_steps", "2", "--per_device_train_batch_size", "4", "--save_total_limit", "3"]
    # One pair serves all steps: pairs are drawn with replacement.
    aligned = ["--ot_weight", "0.5", "--parallel_dataset", "local/parallel", "--parallel_languages", "de"]
    main([*common, *small, *steps, *aligned, "--parallel_pairs_per_language", "1", *flags])


@pytest.fixture(scope="module")
def unbroken(tiny_encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "unbroken"
    train(tiny_encoder, folder)
    return folder


def weights_of(folder):
    return load_file(folder / WEIGHTS)


def check_same_weights(folder, other):
    expected, found = weights_of(folder), weights_of(other)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_leaves_complete_checkpoints(unbroken):
    assert [path.name for path in checkpoints_in(unbroken)] == ["checkpoint-5", "checkpoint-4", "checkpoint-2"]
    for checkpoint in checkpoints_in(unbroken):
        assert find_defect(checkpoint, WEIGHTS) is None
        sizes = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
        assert set(FILES) < sizes.keys() and MANIFEST_FILE not in sizes


def test_one_pair_serves_many_steps(unbroken):
    history = json.loads((unbroken / "checkpoint-5" / "trainer_state.json").read_text())
    assert history["global_step"] == 5
    assert not torch.equal(
        weights_of(unbroken / "checkpoint-2")["classifier.weight"], weights_of(unbroken)["classifier.weight"]
    )


@pytest.mark.parametrize("step", [4, 5])
def test_a_run_that_is_resumed_after_its_last_step_takes_no_further_one(tiny_encoder, unbroken, tmp_path, step):
    """Step 5 is in the middle of an epoch."""
    shutil.copytree(unbroken / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    train(tiny_encoder, tmp_path, "--resume_from_checkpoint", "true")
    check_same_weights(unbroken, tmp_path)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_train_examples", "11"], "its training examples had another content than now"),
        (["--max_length", "12"], "it was trained with input_length=128, not 12"),
        (["--max_eval_examples", "6"], "its validation examples had another content"),
        (["--parallel_pairs_per_language", "2"], "its parallel pairs had another content"),
        (["--ot_weight", "0"], "it was trained with ot_weight=0.5, not 0.0"),
        (["--data_seed", "4"], "it was trained with seed=3, not 4"),
        (["--per_device_train_batch_size", "2"], "it was trained with examples_a_step=4, not 2"),
        ([*BEST, "--early_stopping_patience", "2"], "it was trained with early_stopping_patience=None, not 2"),
        (["--train_sampling_strategy", "sequential"], "train_sampling_strategy='random', not 'sequential'"),
        (["--freeze_word_embeddings", "true"], "it was trained with freeze_word_embeddings=False, not True"),
        (
            ["--encoder_config", '{"attention_probs_dropout_prob": 0.2}'],
            "its encoder has attention_probs_dropout_prob=0.1, this one 0.2",
        ),
    ],
)
def test_a_changed_run_is_not_gone_on_with(tiny_encoder, unbroken, tmp_path, flags, message):
    checkpoint = str(unbroken / "checkpoint-2")
    with pytest.raises(XLFAError) as error:
        train(tiny_encoder, tmp_path / "run", "--resume_from_checkpoint", checkpoint, *flags)
    assert message in str(error.value) and f"--resume_from_checkpoint {checkpoint}: " in str(error.value)
    assert not (tmp_path / "run" / RUN_FILE).exists()


def test_a_run_goes_on_with_the_rate_that_is_given_now(tiny_encoder, unbroken, tmp_path, caplog):
    """The optimizer's state has the rate and the penalty of the run that was interrupted."""
    rate = json.loads((unbroken / RUN_FILE).read_text())["training_arguments"]["learning_rate"]
    flags = ["--learning_rate", str(rate / 10), "--weight_decay", "0.5", "--save_steps", "4"]
    train(tiny_encoder, tmp_path, "--resume_from_checkpoint", str(unbroken / "checkpoint-2"), *flags)
    assert f"--learning_rate {rate / 10:g} instead of {rate:g}" in caplog.text
    state = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.0, 0.5}
    assert {group["initial_lr"] for group in state["param_groups"]} == {rate / 10}
    # Linear decay, after four of five steps.
    assert [group["lr"] for group in state["param_groups"]] == pytest.approx([rate / 10 / 5] * 2)


def test_a_rate_that_follows_the_scores_is_lowered_too(tiny_encoder, tmp_path, caplog):
    flags = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps", "--eval_steps", "2"]
    train(tiny_encoder, tmp_path / "a", *flags, "--learning_rate", "1e-3", "--max_steps", "2")
    again = ["--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-2"), "--learning_rate", "1e-4"]
    train(tiny_encoder, tmp_path / "b", *flags, *again)
    assert "--learning_rate 0.0001 instead of 0.001" in caplog.text
    state = torch.load(tmp_path / "b" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert {group["lr"] for group in state["param_groups"]} == {1e-4}


def test_the_last_checkpoint_stays_though_another_one_is_better(tiny_encoder, tmp_path, monkeypatch):
    evaluate = XLFATrainer.evaluate

    def worse_and_worse(trainer, *args, **kwargs):
        return evaluate(trainer, *args, **kwargs) | {"eval_accuracy": 1 / trainer.state.global_step}

    monkeypatch.setattr(XLFATrainer, "evaluate", worse_and_worse)
    train(tiny_encoder, tmp_path, "--save_total_limit", "1", "--eval_strategy", "steps", "--eval_steps", "2")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-5", "checkpoint-2"]


def test_the_same_examples_a_step_may_be_cut_otherwise(tiny_encoder, unbroken, tmp_path):
    flags = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    train(tiny_encoder, tmp_path / "run", "--resume_from_checkpoint", str(unbroken / "checkpoint-4"), *flags)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 5


def test_a_tokenizer_that_changed_changes_the_examples(tiny_encoder, unbroken, tmp_path):
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny_encoder, encoder)
    tokenizer = json.loads((encoder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (encoder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(XLFAError, match="its parallel pairs had another content.* the tokenizer"):
        train(str(encoder), tmp_path / "run", "--resume_from_checkpoint", str(unbroken / "checkpoint-2"))


# A loss that is not finite


def break_transport_loss(monkeypatch, call):
    """NaN as the alignment term of one call of the model in training."""
    plain, calls = XLFAForSequenceClassification.forward, []

    # Trainer reads the names of the arguments.
    @wraps(plain)
    def forward(model, **inputs):
        outputs = plain(model, **inputs)
        calls.append(model.training)
        if sum(calls) == call and model.training:
            outputs.ot_loss = outputs.ot_loss * float("nan")
        return outputs

    monkeypatch.setattr(XLFAForSequenceClassification, "forward", forward)


def test_a_nan_loss_ends_the_training_before_the_next_checkpoint(tiny_encoder, unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_transport_loss(patch, call=3)
        with pytest.raises(XLFAError, match=r"step 3: the loss is not finite \(task_loss 1\.\d+, ot_loss nan\)"):
            train(tiny_encoder, tmp_path)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2"]
    assert not (tmp_path / WEIGHTS).exists()
    train(tiny_encoder, tmp_path, "--resume_from_checkpoint", "true")
    check_same_weights(unbroken, tmp_path)


def test_a_nan_loss_ends_the_training_before_the_next_line_of_the_log(tiny_encoder, tmp_path, monkeypatch):
    break_transport_loss(monkeypatch, call=1)
    flags = ["--save_strategy", "no", "--logging_steps", "2"]
    with pytest.raises(XLFAError, match="step 1: the loss is not finite"):
        train(tiny_encoder, tmp_path, *flags)
    assert not (tmp_path / "trainer_state.json").exists()


def test_weights_that_are_not_finite_are_not_saved(tiny_encoder, tmp_path):
    """With this rate the last update overflows, and no loss comes after it."""
    flags = ["--learning_rate", "1e39", "--max_steps", "1", "--ot_weight", "0", "--eval_strategy", "no"]
    for strategy in ("no", "steps"):
        with pytest.raises(XLFAError, match="step 1: the weights of .* are not finite; they were not saved"):
            train(tiny_encoder, tmp_path / strategy, *flags, "--save_strategy", strategy)
        assert not (tmp_path / strategy / WEIGHTS).exists() and not checkpoints_in(tmp_path / strategy)


# A full disk


@contextmanager
def largest_file(size):
    """The kernel refuses to let a file grow beyond that many bytes: the writers see what a full disk gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_at_step_4(monkeypatch, owner, name, size):
    plain = getattr(owner, name)

    def method(trainer, *arguments, **options):
        if trainer.state.global_step < 4:
            return plain(trainer, *arguments, **options)
        with largest_file(size):
            return plain(trainer, *arguments, **options)

    monkeypatch.setattr(owner, name, method)


def refuse_state(monkeypatch):
    plain = TrainerState.save_to_json

    def save_to_json(state, path):
        if state.global_step >= 4:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        plain(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", save_to_json)


FULL_DISKS = {
    "weights": lambda patch: fail_at_step_4(patch, XLFATrainer, "_save", 50_000),
    "optimizer": lambda patch: fail_at_step_4(patch, XLFATrainer, "_save_optimizer_and_scheduler", 50_000),
    "random state": lambda patch: fail_at_step_4(patch, XLFATrainer, "_save_rng_state", 1_000),
    "trainer state": refuse_state,
}


@pytest.mark.parametrize("case", FULL_DISKS)
def test_a_full_disk_is_one_error_and_the_last_checkpoint_survives(tiny_encoder, unbroken, tmp_path, monkeypatch, case):
    with monkeypatch.context() as patch:
        FULL_DISKS[case](patch)
        with pytest.raises(XLFAError) as error:
            # With one checkpoint to keep, the older one goes when the newer one is complete, and no earlier.
            train(tiny_encoder, tmp_path, "--save_total_limit", "1")
    message = str(error.value)
    assert f"cannot write to {tmp_path}" in message and "free some space, then go on from checkpoint-2" in message
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2"]
    assert is_complete(tmp_path / "checkpoint-2")
    if case == "optimizer":
        train(tiny_encoder, tmp_path, "--resume_from_checkpoint", "true")
        check_same_weights(unbroken, tmp_path)


def test_a_disk_that_is_full_before_the_first_checkpoint(tiny_encoder, tmp_path):
    with largest_file(100), pytest.raises(XLFAError, match="free some space, then run the command again"):
        train(tiny_encoder, tmp_path)
    assert newest_complete(tmp_path) is None
