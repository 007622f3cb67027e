"""LoRA by PEFT: what is trained, saving, loading, pushing and merging, and a training run with `--peft lora`."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ENCODER_CONFIGS
from datasets import Dataset
from hub.loopback_hub import LoopbackHub
from peft import PeftModel
from safetensors.torch import load_file
from test_training import TEXTS, Gradients, train_on_sample
from transformers import AutoTokenizer, DataCollatorWithPadding

from modeling_xlfa import (
    XLFAConfig,
    XLFAForQuestionAnswering,
    XLFAForSequenceClassification,
    XLFAForTokenClassification,
)
from xlfa.adapters import ADAPTER_FOLDER, add_adapters, load_adapter
from xlfa.arguments import ModelArguments, XLFATrainingArguments, parse_arguments
from xlfa.errors import XLFAError
from xlfa.evaluation import EvaluationArguments, evaluate_model
from xlfa.parallel import PairSampler
from xlfa.tasks import get_task
from xlfa.trainer import XLFATrainer

HEADS = {
    XLFAForQuestionAnswering: "qa_outputs",
    XLFAForSequenceClassification: "classifier",
    XLFAForTokenClassification: "classifier",
}
# PEFT's table of target modules has the first two families of tests/conftest.py.
TARGETS = {"distilbert": ["q_lin", "v_lin"], "modernbert": ["Wqkv"], "eurobert": ["q_proj", "v_proj"]}
INPUTS = {"input_ids": torch.arange(4, 34).view(3, 10), "attention_mask": torch.ones(3, 10, dtype=torch.long)}


def adapted(model, **fields):
    return add_adapters(model, ModelArguments(model="lab/encoder", peft="lora", **fields))


def train_some_steps(model):
    """Large steps with batch statistics, so that everything that is trained moves, and the running statistics too."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    model.train()
    for _ in range(3):
        sum(output.float().square().mean() for output in logits(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model):
    output = model(**INPUTS)
    return [output[name] for name in ("logits", "start_logits", "end_logits") if name in output]


def assert_same_logits(model, other):
    with torch.no_grad():
        for ours, theirs in zip(logits(model), logits(other), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", ["dlfa", "scalar_mix", "none"])
@pytest.mark.parametrize("head", HEADS)
def test_adapters_fusion_and_head_are_trained_and_nothing_else(bert_config, head, fusion, caplog):
    caplog.set_level(logging.INFO, "xlfa")
    plain = head(XLFAConfig(text_config=bert_config, fusion=fusion))
    expected = sum(p.numel() for name, p in plain.named_parameters() if "fusion" in name or HEADS[head] in name)
    # A and B of the query and the value, each 32 x 32, in 4 layers.
    expected += 4 * 2 * 2 * 32 * 5
    total = plain.num_parameters()
    model = adapted(plain, lora_r=5)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert sum(weight.numel() for weight in trained.values()) == expected
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert f"{expected} of {total} parameters are trained" in caplog.text


@pytest.mark.parametrize("family", ENCODER_CONFIGS)
@pytest.mark.parametrize("fusion", ["dlfa", "scalar_mix", "none"])
def test_adapters_are_saved_loaded_and_merged_by_peft(family, fusion, tmp_path):
    head = XLFAForTokenClassification
    config = XLFAConfig(text_config=ENCODER_CONFIGS[family](), fusion=fusion)
    plain, base = head(config).eval(), head(config)
    base.xlfa.encoder.load_state_dict(plain.xlfa.encoder.state_dict())
    expected_names = set(plain.state_dict())
    before = logits(plain)[0].detach()
    model = train_some_steps(adapted(plain, lora_target_modules=TARGETS.get(family)))
    assert (logits(model)[0] - before).abs().max() > 1e-2

    model.save_pretrained(tmp_path / "adapter")
    assert "base_model: lab/encoder\n" in (tmp_path / "adapter" / "README.md").read_text()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_same_logits(loaded, model)
    merged = loaded.merge_and_unload()
    assert type(merged) is head and set(merged.state_dict()) == expected_names
    assert_same_logits(merged, model)
    merged.save_pretrained(tmp_path / "merged")
    assert_same_logits(head.from_pretrained(tmp_path / "merged"), model)


def test_an_encoder_that_peft_does_not_know_needs_target_modules():
    model = XLFAForTokenClassification(XLFAConfig(text_config=ENCODER_CONFIGS["modernbert"]()))
    with pytest.raises(XLFAError, match="'modernbert' encoder: name .* --lora_target_modules, of Wqkv, Wo, Wi"):
        adapted(model)


def test_target_modules_are_those_of_the_encoder(bert_config):
    for name in ("nothing", "classifier", "expand"):
        model = XLFAForTokenClassification(XLFAConfig(text_config=bert_config))
        with pytest.raises(XLFAError, match=f"--lora_target_modules {name}: .* encoder are query, key, value, dense"):
            adapted(model, lora_target_modules=[name])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_r", "4"], "--lora_r applies only with --peft lora"),
        (["--peft", "lora", "--lora_r", "0"], "--lora_r 0: at least 1"),
        (["--peft", "lora", "--lora_dropout", "1"], r"--lora_dropout 1.0: a number in \[0, 1\)"),
        (["--peft", "ia3"], "invalid choice: 'ia3'"),
    ],
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(XLFAError, match=message):
        parse_arguments([ModelArguments], ["--model", "lab/encoder", *flags], "xlfa train", "")


@pytest.mark.parametrize("parallelism", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_adapters_of_a_split_model_are_refused(bert_config, parallelism):
    model = adapted(XLFAForTokenClassification(XLFAConfig(text_config=bert_config)))
    args = SimpleNamespace(n_gpu=0, ot_gradient_steps=None, max_tokens_per_batch=None)
    trainer = SimpleNamespace(args=args, model=model, is_fsdp_enabled=False, is_deepspeed_enabled=False)
    XLFATrainer._check_parts(trainer)
    setattr(trainer, parallelism, True)
    with pytest.raises(XLFAError, match="--peft lora: FSDP and DeepSpeed split .*: take DDP"):
        XLFATrainer._check_parts(trainer)


def gradient_of_one_step(encoder, folder, batch_size, accumulation):
    """Of eight examples and eight pairs with adapters that are not zero, in float64 without dropout."""
    torch.manual_seed(0)
    plain = XLFAForSequenceClassification.from_encoder(
        encoder,
        encoder_config={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        classifier_dropout=0.0,
        fusion_norm="layer",
        ot_weight=0.5,
    )
    model = adapted(plain, lora_dropout=0.0).double()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    features = Dataset.from_dict({**tokenizer(TEXTS), "labels": [0, 1] * 4})
    gradients = Gradients()
    trainer = XLFATrainer(
        model=model,
        args=XLFATrainingArguments(
            output_dir=str(folder / str(accumulation)),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
            eval_strategy="no",
            save_strategy="no",
        ),
        train_dataset=features,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[gradients],
        task=get_task("xnli"),
        pair_sampler=PairSampler.from_texts({"de": list(zip(TEXTS, reversed(TEXTS)))}, tokenizer, 64, seed=0),
        validation_rows=features,
        validation_windows=features,
    )
    trainer.train()
    return gradients.found


def test_accumulation_1_and_4_give_adapters_the_same_gradient(tiny_encoder, tmp_path, monkeypatch):
    # Gradients looks at every parameter: those that are frozen have none.
    monkeypatch.setattr(Gradients, "on_pre_optimizer_step", keep_gradients)
    whole = gradient_of_one_step(tiny_encoder, tmp_path, 8, 1)
    parts = gradient_of_one_step(tiny_encoder, tmp_path, 2, 4)
    assert whole.keys() == parts.keys() and any("lora_A" in name for name in whole)
    for name, gradient in whole.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def keep_gradients(self, args, state, control, model=None, **kwargs):
    self.found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


LORA = ["--peft", "lora", "--lora_r", "4", "--learning_rate", "0.01", "--ot_epsilon_start", "2", "--ot_epsilon", "0.05"]


@pytest.fixture(scope="module")
def finished_run(tiny_encoder, tmp_path_factory):
    """Six steps with adapters, fusion and the transport term, and a checkpoint after three."""
    folder = tmp_path_factory.mktemp("run") / "lora"
    train_on_sample(tiny_encoder, folder, *LORA, "--ot_marginals", "idf")
    return folder


def test_a_run_folder_holds_the_merged_model_and_the_adapters(finished_run, tiny_encoder):
    merged = XLFAForSequenceClassification.from_pretrained(finished_run)
    assert not any("lora" in name for name in merged.state_dict())
    assert merged.xlfa.ot_idf.max() > 1
    assert_same_logits(load_adapter(XLFAForSequenceClassification, str(finished_run / "adapter"), tiny_encoder), merged)
    names = {path.name for path in (finished_run / ADAPTER_FOLDER).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"} <= names
    assert json.loads((finished_run / "run.json").read_text())["model_arguments"]["peft"] == "lora"


def test_no_local_path_is_in_the_adapter_or_the_merged_config(finished_run, tiny_encoder):
    for path in [finished_run / "config.json", *(finished_run / ADAPTER_FOLDER).iterdir()]:
        content = path.read_bytes()
        assert Path(tiny_encoder).parent.as_posix().encode() not in content, path
        assert str(finished_run.parent).encode() not in content, path


def test_the_schedule_of_epsilon_reaches_the_model_under_the_adapters(finished_run):
    history = json.loads((finished_run / "trainer_state.json").read_text())["log_history"]
    epsilons = [entry["ot_epsilon"] for entry in history if "ot_epsilon" in entry]
    assert epsilons[0] > 5 * epsilons[-1]


def test_the_run_folder_is_scored_like_any_other_and_the_adapters_of_a_local_encoder_say_what_to_do(finished_run):
    arguments = {"task": "xnli", "languages": ["de", "en"], "data_root": "sample", "max_examples": 6}
    scores = evaluate_model(EvaluationArguments(model=str(finished_run), **arguments))
    assert set(scores["languages"]) == {"de", "en"}
    with pytest.raises(XLFAError, match="encoder that was a local folder: take the merged model"):
        evaluate_model(EvaluationArguments(model=str(finished_run / ADAPTER_FOLDER), **arguments))


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(tiny_encoder, finished_run, tmp_path):
    shutil.copytree(finished_run / "checkpoint-3", tmp_path / "checkpoint-3")
    flags = [*LORA, "--ot_marginals", "idf", "--resume_from_checkpoint", "true"]
    train_on_sample(tiny_encoder, tmp_path, *flags)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        expected, found = load_file(finished_run / file), load_file(tmp_path / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*LORA, "--lora_alpha", "32"], "trained with lora_alpha=16, not 32"),
        ([*LORA, "--lora_target_modules", "query"], "trained with target_modules="),
        ([], "it lacks model.safetensors"),
    ],
)
def test_a_checkpoint_of_other_adapters_is_refused(tiny_encoder, finished_run, tmp_path, flags, message):
    checkpoint = ["--resume_from_checkpoint", str(finished_run / "checkpoint-3"), "--ot_marginals", "idf"]
    epsilon = ["--ot_epsilon_start", "2", "--ot_epsilon", "0.05"]
    with pytest.raises(XLFAError, match=message):
        train_on_sample(tiny_encoder, tmp_path, *epsilon, *flags, *checkpoint)


def test_the_best_adapters_are_merged(tiny_encoder, tmp_path):
    best = ["--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "3"]
    # Steps of this size spoil the model: the first checkpoint is the best or as good.
    train_on_sample(tiny_encoder, tmp_path, *LORA, "--lora_dropout", "0", *best)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    chosen = load_file(tmp_path / Path(state["best_model_checkpoint"]).name / "adapter_model.safetensors")
    merged = load_file(tmp_path / "model.safetensors")
    assert torch.equal(merged["classifier.weight"], chosen["base_model.model.classifier.weight"])


PUSH_AND_LOAD = """
import torch
from peft import PeftModel
from transformers import AutoTokenizer
from modeling_xlfa import XLFAForSequenceClassification as Head
from xlfa.adapters import add_adapters
from xlfa.arguments import ModelArguments
from xlfa.evaluation import load_model
from xlfa.tasks import get_task

task, inputs = get_task("xnli"), {"input_ids": torch.arange(4, 34).view(3, 10)}
fields = {"fusion_gate": "sigmoid", "id2label": dict(enumerate(task.label_names))}
arguments = ModelArguments(model="lab/encoder", peft="lora")
model = add_adapters(Head.from_encoder("lab/encoder", **fields), arguments).eval()
for name, weight in model.named_parameters():
    if weight.requires_grad:
        torch.nn.init.normal_(weight, std=0.3)
for part in (AutoTokenizer.from_pretrained("lab/encoder"), model.config, model):
    part.push_to_hub("lab/adapter")

expected = model(**inputs).logits
by_peft = PeftModel.from_pretrained(Head.from_encoder("lab/encoder", **fields), "lab/adapter").eval()
torch.testing.assert_close(by_peft(**inputs).logits, expected)
by_name, _ = load_model(task, "lab/adapter")
assert type(by_name) is Head
torch.testing.assert_close(by_name.eval()(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
"""


def test_adapters_are_pushed_and_come_back_by_name(tiny_encoder, tmp_path):
    with LoopbackHub() as hub:
        hub.add_repo("lab/encoder", {path.name: path.read_bytes() for path in Path(tiny_encoder).iterdir()})
        done = subprocess.run(
            [sys.executable, "-c", PUSH_AND_LOAD],
            env=hub.client_environment(tmp_path / "home"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        files = hub.repo("lab/adapter").resolve("main").files
    assert json.loads(files["adapter_config.json"].content)["base_model_name_or_path"] == "lab/encoder"
    assert len(files["adapter_model.safetensors"].content) < 60_000
