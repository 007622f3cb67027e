"""Training: gradients under accumulation, resuming, the log, what a run folder holds, and bad input."""

import importlib.util
import json
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, DataCollatorWithPadding, TrainerCallback

from modeling_xlfa import XLFAForSequenceClassification
from modeling_xlfa.transport_xlfa import BACKENDS
from xlfa.arguments import XLFATrainingArguments
from xlfa.errors import XLFAError
from xlfa.parallel import PairSampler
from xlfa.run_file import RUN_FILE
from xlfa.tasks import get_task
from xlfa.trainer import XLFATrainer
from xlfa.training import main

TEXTS = ["the cat sat", "a dog ran far", "it rains", "we read books", "birds can fly", "he is late", "no", "see you"]


class Gradients(TrainerCallback):
    """Keeps the gradient that the optimizer is about to use."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def gradient_of_one_step(encoder, folder, batch_size, accumulation, norm, max_tokens=None, center=False):
    """Of eight examples and eight pairs, in float64 without dropout."""
    torch.manual_seed(0)
    model = XLFAForSequenceClassification.from_encoder(
        encoder,
        encoder_config={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        classifier_dropout=0.0,
        num_labels=2,
        fusion_norm=norm,
        ot_weight=0.5,
        ot_center=center,
    ).double()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    features = Dataset.from_dict({**tokenizer(TEXTS), "labels": [0, 1] * 4})
    pairs = {"de": list(zip(TEXTS, reversed(TEXTS))), "fr": list(zip(TEXTS, TEXTS[1:] + TEXTS[:1]))}
    gradients = Gradients()
    trainer = XLFATrainer(
        model=model,
        args=XLFATrainingArguments(
            output_dir=str(folder / f"{norm}-{accumulation}-{max_tokens}"),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_tokens_per_batch=max_tokens,
            max_steps=1,
            max_grad_norm=0.0,
            eval_strategy="no",
            save_strategy="no",
            seed=0,
        ),
        train_dataset=features,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[gradients],
        task=get_task("xnli"),
        pair_sampler=PairSampler.from_texts(pairs, tokenizer, max_length=64, seed=0),
        validation_rows=features,
        validation_windows=features,
    )
    trainer.train()
    return gradients.found


@pytest.mark.parametrize(
    ("norm", "batch_size", "accumulation", "max_tokens", "center"),
    [
        *((norm, *rest, False) for norm in ("none", "layer") for rest in [(2, 4, None), (8, 1, 32), (3, 3, 20)]),
        # Statistics of the batch: the examples stay together, the pairs do not.
        ("batch", 8, 1, 32, False),
        # A mean over the pairs: these stay together, the examples do not.
        ("layer", 8, 1, 32, True),
    ],
)
def test_a_step_in_parts_has_the_gradient_of_the_whole(
    tiny_encoder, tmp_path, norm, batch_size, accumulation, max_tokens, center
):
    whole = gradient_of_one_step(tiny_encoder, tmp_path, 8, 1, norm, center=center)
    parts = gradient_of_one_step(tiny_encoder, tmp_path, batch_size, accumulation, norm, max_tokens, center)
    assert whole.keys() == parts.keys()
    assert sum(gradient.abs().sum() for gradient in whole.values()) > 0
    # The transport plan has converged to ot_tol only: it is the same plan in both layouts, but for rounding.
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def train_on_sample(encoder, output, *flags, task="xnli"):
    common = ["--model", encoder, "--task", task, "--data_root", "sample", "--output_dir", str(output), "--seed", "3"]
    small = ["--max_train_examples", "48", "--max_eval_examples", "9", "--max_steps", "6", "--save_strategy", "steps"]
    steps = ["--save_steps", "3", "--logging_steps", "2", "--per_device_train_batch_size", "8"]
    aligned = ["--ot_weight", "0.5", "--parallel_dataset", "local/parallel", "--parallel_languages", "de", "fr"]
    main([*common, *small, *steps, *aligned, *flags])


@pytest.fixture(scope="module")
def finished_run(tiny_encoder, tmp_path_factory):
    """Six steps with dropout, fusion and the transport term, and a checkpoint after three."""
    folder = tmp_path_factory.mktemp("run") / "unbroken"
    train_on_sample(tiny_encoder, folder)
    return folder


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(tiny_encoder, finished_run, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(finished_run / "checkpoint-3", resumed / "checkpoint-3")
    train_on_sample(tiny_encoder, resumed, "--resume_from_checkpoint", "true")
    expected = load_file(finished_run / "model.safetensors")
    found = load_file(resumed / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    halfway = load_file(finished_run / "checkpoint-3" / "model.safetensors")
    assert not torch.equal(halfway["classifier.weight"], expected["classifier.weight"])


def test_parts_of_pairs_alone_leave_the_dropout_of_the_examples_as_it_is(tiny_encoder, tmp_path):
    """A vanishing weight and none end at the same weights, although the pairs come in parts of their own."""
    for name, weight in (("without", "0"), ("with", "1e-30")):
        torch.manual_seed(0)
        common = f"--model {tiny_encoder} --task xnli --data_root sample --output_dir {tmp_path / name} --fusion none"
        steps = "--max_train_examples 16 --max_steps 3 --per_device_train_batch_size 8 --max_tokens_per_batch 200"
        pairs = "--parallel_dataset local/parallel --parallel_languages de fr" if name == "with" else ""
        main(f"{common} {steps} --eval_strategy no --save_strategy no --ot_weight {weight} {pairs}".split())
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("without", "with"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_several_gpus_in_one_process_are_refused(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    with pytest.raises(XLFAError, match="one process and 2 GPUs.*accelerate launch"):
        train_on_sample(tiny_encoder, tmp_path)


def test_gradients_of_both_terms_are_compared_and_training_is_the_same(tiny_encoder, finished_run, tmp_path):
    train_on_sample(tiny_encoder, tmp_path, "--ot_gradient_steps", "2")
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "ot_gradient_ratio" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    for line in lines:
        expected = 0.5 * line["ot_gradient_norm"] / line["task_gradient_norm"]
        assert line["ot_gradient_ratio"] == pytest.approx(expected) and expected > 0
    expected, found = (load_file(folder / "model.safetensors") for folder in (finished_run, tmp_path))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_log_holds_the_parts_of_the_loss_apart(finished_run):
    history = json.loads((finished_run / "trainer_state.json").read_text())["log_history"]
    line = next(entry for entry in history if "loss" in entry)
    for name in ("task_loss", "ot_loss", "ot_plan_entropy", "ot_iterations", "ot_epsilon", "ot_not_converged"):
        assert name in line
    assert line["loss"] == pytest.approx(line["task_loss"] + 0.5 * line["ot_loss"], rel=1e-4)
    assert line["ot_iterations"] >= 1 and 0 <= line["ot_not_converged"] <= 1


def test_a_run_folder_holds_model_code_tokenizer_and_settings_and_no_pickle(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    code = {"modeling_xlfa.py", "configuration_xlfa.py", "fusion_xlfa.py", "transport_xlfa.py"}
    assert code | {"config.json", "model.safetensors", "tokenizer.json", RUN_FILE} <= names
    assert not any(name.endswith((".bin", ".pkl", ".pt", ".pth")) for name in names)
    run = json.loads((finished_run / RUN_FILE).read_text())
    assert run["task"] == "xnli" and "eval_accuracy" in run["validation"]
    config = json.loads((finished_run / "config.json").read_text())
    assert config["id2label"] == {"0": "entailment", "1": "neutral", "2": "contradiction"}
    assert (config["input_length"], config["input_stride"]) == (128, 128)


def test_question_answering_trains_on_windows(tiny_encoder, tmp_path):
    sizes = ["--max_length", "128", "--doc_stride", "32", "--max_steps", "1", "--save_strategy", "no"]
    train_on_sample(tiny_encoder, tmp_path / "qa", *sizes, task="xquad")
    assert "eval_f1" in json.loads((tmp_path / "qa" / RUN_FILE).read_text())["validation"]


def test_a_run_resumed_in_its_second_epoch_sees_the_same_order(tiny_encoder, tmp_path):
    """With length-grouped batches, whose order transformers draws from the global generator."""
    flags = ["--train_sampling_strategy", "group_by_length", "--max_steps", "10", "--save_steps", "8"]
    train_on_sample(tiny_encoder, tmp_path / "unbroken", *flags)
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-8", tmp_path / "resumed" / "checkpoint-8")
    train_on_sample(tiny_encoder, tmp_path / "resumed", *flags, "--resume_from_checkpoint", "true")
    expected, found = (load_file(tmp_path / run / "model.safetensors") for run in ("unbroken", "resumed"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_best_checkpoint_is_chosen_by_the_task_metric(tiny_encoder, tmp_path):
    flags = ["--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "3"]
    train_on_sample(tiny_encoder, tmp_path / "run", *flags)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["best_metric"] == max(entry.get("eval_accuracy", 0) for entry in state["log_history"])


def test_a_finished_run_and_a_checkpoint_of_another_model_are_no_checkpoints(tiny_encoder, finished_run, tmp_path):
    for checkpoint, flags, message in (
        (finished_run, [], "it lacks optimizer.pt"),
        (finished_run / "checkpoint-3", ["--fusion", "none"], "it was trained with fusion='dlfa', not 'none'"),
    ):
        with pytest.raises(XLFAError, match=message):
            train_on_sample(tiny_encoder, tmp_path, "--resume_from_checkpoint", str(checkpoint), *flags)


def test_idf_weights_come_from_the_parallel_text(tiny_encoder, tmp_path):
    train_on_sample(tiny_encoder, tmp_path / "run", "--ot_marginals", "idf", "--max_steps", "1")
    idf = load_file(tmp_path / "run" / "model.safetensors")["xlfa.ot_idf"]
    # The letter e (id 8) is in nearly every sentence, the digit 9 in few.
    assert idf.shape == (99,) and 1 < idf[8] < idf[39]


def test_idf_weights_come_from_a_file_where_one_is_given(tiny_encoder, tmp_path):
    weights = tmp_path / "idf.json"
    weights.write_text(json.dumps({"e": 0.5, "t": 0, "9": 7.25, "not-a-piece": 3}))
    train_on_sample(
        tiny_encoder, tmp_path / "run", "--ot_marginals", "idf", "--ot_idf_file", str(weights), "--max_steps", "1"
    )
    idf = load_file(tmp_path / "run" / "model.safetensors")["xlfa.ot_idf"]
    vocabulary = AutoTokenizer.from_pretrained(tiny_encoder).get_vocab()
    assert [idf[vocabulary[piece]].item() for piece in "et9"] == [0.5, 0.0, 7.25]
    # A piece that the file does not name counts as the rarest.
    assert idf[vocabulary["a"]] == 7.25


def test_pairs_that_did_not_converge_are_reported(tiny_encoder, tmp_path, caplog):
    flags = ["--ot_max_iter", "1", "--ot_epsilon", "0.003", "--max_steps", "2", "--save_strategy", "no"]
    train_on_sample(tiny_encoder, tmp_path / "run", *flags)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["ot_not_converged"] > 0.5 and history[0]["ot_marginal_error"] > 1e-3
    message = next(record.getMessage() for record in caplog.records if "did not converge" in record.getMessage())
    assert "within 1 sweeps" in message and "--ot_max_iter" in message


def test_training_takes_the_compiled_solver_where_it_is_installed(finished_run):
    if importlib.util.find_spec("numba") is None:
        pytest.skip('the extra "compiled" (numba) is not installed')
    assert "compiled" in BACKENDS
    assert "numba" in json.loads((finished_run / RUN_FILE).read_text())["versions"]


def test_an_earlier_run_is_not_overwritten(tiny_encoder, finished_run):
    with pytest.raises(XLFAError, match="holds an earlier run"):
        train_on_sample(tiny_encoder, finished_run)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/nowhere/at/all"], "--model /nowhere/at/all"),
        (["--model", "/nowhere/at/all", "--trim_vocab", "true"], "--model /nowhere/at/all"),
        (["--metric_for_best_model", "bleu"], "--metric_for_best_model bleu"),
        (["--attn_implementation", "bogus"], "bogus"),
        (["--model", "packaged:other"], "unknown packaged encoder 'other'"),
        (["--task", "squadron"], "squadron"),
        (["--data_root", "/nowhere"], "no data set 'facebook/xnli' under --data_root /nowhere"),
        (["--train_dataset", "local/none"], "no data set 'local/none'"),
        (["--train_dataset", "local/parallel"], "local/parallel"),
        (["--parallel_languages", "xx"], "no parallel text for language 'xx'"),
        (["--parallel_filter", "source=nothing"], "leaves no pair"),
        (["--parallel_filter", "quality=1"], "must be column=value"),
        (["--parallel_max_length", "3"], "--parallel_max_length 3"),
        (["--fusion_layer", "4"], "fusion_layer=4 is not allowed: it must be a layer index 1..3"),
        (["--fusion_layer", "0"], "fusion_layer=0"),
        (["--ot_epsilon", "0"], "ot_epsilon=0.0"),
        (["--ot_epsilon", "-0.1"], "ot_epsilon=-0.1"),
        (["--ot_layer", "9"], "ot_layer=9"),
        (["--encoder_config", "{"], "--encoder_config '{' is not valid JSON"),
        (["--encoder_config", '{"no_such_field": 1}'], "no field 'no_such_field'"),
        (["--resume_from_checkpoint", "true"], "there is no checkpoint"),
        (["--resume_from_checkpoint", "/tmp"], "not a training checkpoint"),
        (["--ot_idf_file", "idf.json"], "--ot_idf_file idf.json is read only with"),
        (["--ot_marginals", "idf", "--ot_idf_file", "/nowhere.json"], "--ot_idf_file /nowhere.json: No such file"),
        (["--no_such_flag", "1"], "unknown argument --no_such_flag"),
        (["--max_tokens_per_batch", "0"], "--max_tokens_per_batch 0: at least 1"),
        (["--ot_gradient_steps", "0"], "--ot_gradient_steps 0: at least 1"),
        (["--ot_gradient_steps", "2", "--ot_weight", "0"], "there is no transport term to look at"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor does not apply"),
        (["--train_sampling_strategy", "batch_rebalance"], "it must be random, group_by_length or sequential"),
    ],
)
def test_bad_input_gives_one_error_that_names_it(tiny_encoder, tmp_path, flags, message):
    with pytest.raises(XLFAError) as error:
        train_on_sample(tiny_encoder, tmp_path / "run", *flags)
    assert message in str(error.value)
    assert not (tmp_path / "run" / RUN_FILE).exists()


def test_an_encoder_without_a_tokenizer_is_an_error(untokenised_encoder, tmp_path):
    with pytest.raises(XLFAError, match=f"--model {untokenised_encoder}: it has no tokenizer files"):
        train_on_sample(untokenised_encoder, tmp_path / "run")


def test_the_term_without_parallel_text_is_an_error(tiny_encoder, tmp_path):
    with pytest.raises(XLFAError, match="name it with --parallel_dataset"):
        main(
            ["--model", tiny_encoder, "--task", "xnli", "--data_root", "sample", "--ot_weight", "1"]
            + ["--output_dir", str(tmp_path)]
        )


def write_dataset(root, rows):
    folder = root / "local" / "train"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"
    )
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"premise": "a", "hypothesis": "b", "label": 3}], "row 0 has label 3; the task 'xnli' knows 0..2"),
        ([{"premise": "a", "hypothesis": "b", "label": -1}], "row 0 has label -1"),
        ([{"premise": "a", "label": 0}], "has no column hypothesis"),
        ([], "local/train (default, train) is empty"),
    ],
)
def test_bad_training_rows_are_named(tiny_encoder, tmp_path, rows, message):
    write_dataset(tmp_path, rows)
    with pytest.raises(XLFAError) as error:
        main(
            ["--model", tiny_encoder, "--task", "xnli", "--data_root", str(tmp_path), "--train_dataset", "local/train"]
            + ["--output_dir", str(tmp_path / "run")]
        )
    assert message in str(error.value)
