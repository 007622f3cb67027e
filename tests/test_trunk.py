"""The trunk cache: frozen layers, stored states, what is refused, and writers that are killed."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoTokenizer

from modeling_xlfa import XLFAConfig, XLFAForSequenceClassification, XLFAModel
from modeling_xlfa.encoder_xlfa import encoder_layers
from xlfa.errors import XLFAError
from xlfa.evaluation import main as evaluate
from xlfa.inference import InferenceOptions
from xlfa.training import main as train
from xlfa.trunk import TrunkCache

TEXTS = ["the cat sat", "a dog ran far away", "it rains", "we read books", "no", "see you at nine o'clock then"]
OPTIONS = InferenceOptions(max_tokens_per_batch=64, bf16=False)


@pytest.fixture
def tokenizer(tiny_encoder):
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture
def model(tiny_encoder):
    fields = {"num_labels": 3, "fusion_norm": "none", "fusion_layer": 1, "freeze_layers": 2, "ot_weight": 0.5}
    return XLFAForSequenceClassification.from_encoder(tiny_encoder, **fields)


def sequences(tokenizer, texts=TEXTS):
    return Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]})


@pytest.fixture
def filled(model, tokenizer, tmp_path):
    cache = TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path)
    cache.fill(sequences(tokenizer), "texts")
    return cache


def test_frozen_layers_have_no_gradient_and_stay_in_evaluation_mode(model):
    model.train()
    layers = encoder_layers(model.xlfa.encoder)
    assert [layer.training for layer in layers] == [False, False, True, True]
    assert not model.xlfa.encoder.embeddings.training and model.dropout.training
    trained = {name.split(".layer.")[1][0] for name, weight in encoder_weights(model) if weight.requires_grad}
    assert trained == {"2", "3"}
    assert all(weight.requires_grad for weight in model.xlfa.fusion.parameters())


def encoder_weights(model):
    return [(name, weight) for name, weight in model.named_parameters() if ".encoder." in name]


def test_a_loaded_model_freezes_what_its_config_says(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = XLFAForSequenceClassification.from_pretrained(tmp_path).train()
    assert [weight.requires_grad for _, weight in encoder_weights(loaded)] == [
        weight.requires_grad for _, weight in encoder_weights(model)
    ]
    free = XLFAForSequenceClassification.from_pretrained(tmp_path, freeze_layers=0).train()
    assert all(weight.requires_grad for weight in free.parameters())


def test_what_somebody_froze_above_the_trunk_stays_frozen(model):
    name, weight = encoder_weights(model)[-1]
    weight.requires_grad_(False)
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    for mode in (True, False, True):
        model.train(mode)
        assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before
    assert not before[name] and any(before.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze_layers": 4}, "freeze_layers=4 is not allowed: it must be a number of layers 0..3"),
        ({"freeze_layers": -1}, "freeze_layers=-1"),
        ({"freeze_layers": True}, "freeze_layers=True"),
        (
            {"freeze_layers": 2, "ot_layer": 2},
            "ot_layer=2 is not allowed: it must be 'fused' or a layer above the frozen",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_named(bert_config, fields, message):
    with pytest.raises(ValueError) as error:
        XLFAConfig(text_config=bert_config, **fields)
    assert message in str(error.value)


def test_outputs_from_stored_states_are_those_of_the_whole_model(model, filled, tokenizer):
    model.eval()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    pairs = {f"{side}_{name}": tensor for side in ("source", "target") for name, tensor in inputs.items()}
    expected = model(**inputs, **pairs)
    runs = []
    layers = encoder_layers(model.xlfa.encoder)
    layers[0].register_forward_hook(lambda *_: runs.append(0))
    layers[2].register_forward_hook(lambda *_: runs.append(2))
    model.xlfa.stored_trunk = filled
    found = model(**inputs, **pairs)
    assert runs == [2, 2]
    # bfloat16 keeps 8 bits.
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found.ot_loss, expected.ot_loss, rtol=0.02, atol=0.005)
    assert not torch.equal(found.logits, expected.logits)


def test_each_sequence_is_stored_once_with_the_layers_that_are_needed(filled, tokenizer, monkeypatch):
    assert filled.layers == [1, 2]
    before = sorted(filled.folder.glob("*.safetensors"))
    content = load_file(before[0])
    tokens = sum(map(len, tokenizer(TEXTS)["input_ids"]))
    assert content["states"].shape == (tokens, 2, 32) and content["states"].dtype == torch.bfloat16
    filled.fill(sequences(tokenizer, TEXTS[::-1] + TEXTS), "again")
    assert sorted(filled.folder.glob("*.safetensors")) == before
    filled.fill(sequences(tokenizer, [*TEXTS, "one more"]), "more")
    assert len(list(filled.folder.glob("*.safetensors"))) == 2


def test_large_sets_become_several_files(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("xlfa.trunk.FILE_SIZE", 20 * 2 * 32 * 2)
    cache = TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path)
    cache.fill(sequences(tokenizer), "texts")
    files = [load_file(path) for path in cache.folder.glob("*.safetensors")]
    assert len(files) > 2 and sum(len(content["keys"]) for content in files) == len(TEXTS)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    whole = TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path / "other")
    whole.fill(sequences(tokenizer), "texts")
    for layer, states in cache(inputs).items():
        torch.testing.assert_close(states, whole(inputs)[layer], rtol=0.01, atol=0.01)


def test_padding_on_either_side_is_left_out(filled, tokenizer):
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    right = filled(inputs)[2]
    left = filled(tokenizer(TEXTS, padding=True, padding_side="left", return_tensors="pt"))[2]
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1)):
        assert torch.equal(right[row, :length], left[row, -length:])
        assert not right[row, length:].any()
    inputs["attention_mask"][1] = 0
    assert not filled(inputs)[2][1].any() and torch.equal(filled(inputs)[2][0], right[0])


def test_another_trunk_has_a_cache_of_its_own(model, tokenizer, tmp_path):
    def folder(options=OPTIONS):
        return TrunkCache(model.base_model, tokenizer, options, tmp_path).folder

    first = folder()
    assert folder(InferenceOptions(999, bf16=False)) == first
    assert folder(InferenceOptions(64, bf16=True)) != first
    layers = encoder_layers(model.xlfa.encoder)
    with torch.no_grad():
        # Not of the trunk: what training changes.
        layers[2].output.dense.bias += 1
        assert folder() == first
        layers[1].output.dense.bias += 1
    assert folder() != first


def test_a_sequence_that_is_not_there_is_an_error_and_not_computed_unseen(model, filled, tokenizer):
    model.xlfa.stored_trunk = filled
    with pytest.raises(XLFAError, match="no states of a sequence of 6 tokens, the ids .* fill the cache"):
        model(**tokenizer(["what"], return_tensors="pt"))
    with pytest.raises(XLFAError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_a_layer_that_is_not_stored_is_an_error(model, filled, tokenizer):
    model.xlfa.stored_trunk = filled
    with pytest.raises(ValueError, match=r"states of layer 0 are not stored: stored are those of \[1, 2\]"):
        model(**tokenizer(TEXTS[:2], padding=True, return_tensors="pt"), output_hidden_states=True)


def test_a_model_without_frozen_layers_has_no_trunk(bert_config, tokenizer, tmp_path):
    with pytest.raises(XLFAError, match="this model has none: train it with --freeze_layers"):
        TrunkCache(XLFAModel(XLFAConfig(text_config=bert_config)), tokenizer, OPTIONS, tmp_path)


def test_a_process_without_an_example_gets_zeros(filled):
    inputs = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.zeros(1, 2, dtype=torch.long)}
    assert all(not states.any() for states in filled(inputs).values())


def test_machines_that_do_not_share_the_folder_are_told(model, tokenizer, tmp_path, monkeypatch):
    cache = TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path)
    # The other one finds none, before and after the work.
    monkeypatch.setattr("xlfa.trunk.gather_object", lambda own: [*own, True])
    with pytest.raises(XLFAError, match="XLFA_CACHE must be a folder that all of them share"):
        cache.fill(sequences(tokenizer), "texts")


def test_a_damaged_file_is_named(filled, model, tokenizer, tmp_path):
    [path] = filled.folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(XLFAError, match=f"{path.name} is damaged.*remove it"):
        TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path)


def test_a_full_disk_is_told_before_the_work(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(XLFAError, match="GiB of states do not fit on the disk"):
        TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path).fill(sequences(tokenizer), "texts")


def test_a_write_that_fails_leaves_nothing(model, tokenizer, tmp_path, monkeypatch):
    def full(content, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xlfa.trunk.save_file", full)
    cache = TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path)
    with pytest.raises(XLFAError, match="cannot write to .*No space left"):
        cache.fill(sequences(tokenizer), "texts")
    assert [path.name for path in cache.folder.iterdir()] == ["locks"]


def test_what_is_stored_is_there_without_a_lock(filled, model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("xlfa.trunk.FileLock", None)
    cache = TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path)
    cache.fill(sequences(tokenizer), "texts")
    assert len(cache._places) == len(TEXTS)


def test_the_parts_of_a_set_are_the_same_in_any_order(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("xlfa.trunk.FILE_SIZE", 20 * 2 * 32 * 2)
    parts = []
    for order, texts in {"one": TEXTS, "other": TEXTS[::-1]}.items():
        cache = TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path / order)
        cache.fill(sequences(tokenizer, texts), "texts")
        parts.append({path.name for path in (cache.folder / "locks").iterdir()})
    assert parts[0] == parts[1] and 1 < len(parts[0]) < len(TEXTS)


def test_what_another_run_is_at_comes_last(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("xlfa.trunk.FILE_SIZE", 1)
    whole = TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path / "whole")
    whole.fill(sequences(tokenizer), "texts")
    [name, *others] = [path.name for path in (whole.folder / "locks").iterdir()]
    assert len(others) == len(TEXTS) - 1
    cache = TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path)
    (cache.folder / "locks").mkdir()
    lock = FileLock(cache.folder / "locks" / name)
    lock.acquire()

    def told(message, *values):
        if "waiting for %d parts" in message:
            assert values[0] == 1 and len(list(cache.folder.glob("*.safetensors"))) == len(others)
            lock.release()

    monkeypatch.setattr("xlfa.trunk.logger.info", told)
    cache.fill(sequences(tokenizer), "texts")
    assert not lock.is_locked and len(cache._places) == len(TEXTS)


def test_a_folder_that_cannot_be_written_to_is_named(model, tokenizer, tmp_path):
    cache = TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path)
    (cache.folder / "locks").write_text("no folder")
    with pytest.raises(XLFAError, match="cannot write to .*locks"):
        cache.fill(sequences(tokenizer), "texts")


# Fills a cache in many small files, and tells when each one is in place.
WRITER = """
import sys
from pathlib import Path
from datasets import Dataset
from transformers import AutoTokenizer
from modeling_xlfa import XLFAForSequenceClassification
import xlfa.trunk
from xlfa.inference import InferenceOptions

xlfa.trunk.FILE_SIZE = 1
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
fields = {"num_labels": 3, "fusion_norm": "none", "fusion_layer": 1, "freeze_layers": 2, "ot_weight": 0.5}
model = XLFAForSequenceClassification.from_encoder(sys.argv[1], **fields)
cache = xlfa.trunk.TrunkCache(model.base_model, tokenizer, InferenceOptions(64, bf16=False), Path(sys.argv[2]))
write = cache._write
def told(*arguments):
    write(*arguments)
    print("written", flush=True)
cache._write = told
texts = [f"number {number}" for number in range(int(sys.argv[3]))]
cache.fill(Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]}), "texts")
"""


def start_writer(tiny_encoder, folder, texts):
    command = [sys.executable, "-c", WRITER, tiny_encoder, str(folder), str(texts)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_what_a_killed_writer_finished_is_kept(model, tokenizer, tiny_encoder, tmp_path, monkeypatch):
    writer = start_writer(tiny_encoder, tmp_path, 500)
    for _ in range(5):
        assert writer.stdout.readline() == b"written\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    cache = TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path)
    kept = len(cache._places)
    assert 5 <= kept < 500
    monkeypatch.setattr("xlfa.trunk.FILE_SIZE", 1)
    texts = [f"number {number}" for number in range(20)]
    left, living = (cache.folder / f".states-{name}.123.safetensors" for name in ("left", "living"))
    for path in (left, living):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    cache.fill(sequences(tokenizer, texts), "texts")
    assert kept <= len(cache._places) <= kept + 20 and not left.exists() and living.exists()
    assert all(states.any() for states in cache(tokenizer(texts, padding=True, return_tensors="pt")).values())


def test_two_writers_share_the_work(tiny_encoder, tmp_path):
    writers = [start_writer(tiny_encoder, tmp_path, 30) for _ in range(2)]
    written = [writer.communicate(timeout=120)[0].count(b"written") for writer in writers]
    assert sum(written) == 30 and [writer.returncode for writer in writers] == [0, 0]


def run(encoder, output, *flags):
    common = ["--model", encoder, "--task", "xnli", "--data_root", "sample", "--output_dir", str(output), "--seed", "3"]
    small = ["--max_train_examples", "48", "--max_eval_examples", "9", "--max_steps", "8", "--save_strategy", "no"]
    steps = ["--logging_steps", "1", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3"]
    aligned = ["--ot_weight", "0.5", "--parallel_dataset", "local/parallel", "--parallel_languages", "de", "fr"]
    train([*common, *small, *steps, *aligned, "--freeze_layers", "2", "--bf16", "false", *flags])
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return np.array([[line["task_loss"], line["ot_loss"]] for line in history if "task_loss" in line])


@pytest.fixture(scope="module")
def typed_encoder(tiny_encoder, tmp_path_factory):
    """The tiny encoder as BERT has it: the second sentence of a pair has token type 1."""
    folder = tmp_path_factory.mktemp("typed")
    shutil.copytree(tiny_encoder, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_sequences_of_other_token_types_are_others(typed_encoder, model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(typed_encoder)
    pairs = tokenizer(["the cat sat"], ["it rains"])
    assert set(pairs["token_type_ids"][0]) == {0, 1}
    flat = {**pairs, "token_type_ids": [[0] * len(pairs["input_ids"][0])]}
    cache = TrunkCache(model.base_model, tokenizer, OPTIONS, tmp_path)
    cache.fill(Dataset.from_dict({**pairs}), "pairs")
    cache.fill(Dataset.from_dict(flat), "flat")
    states = [cache({name: torch.tensor(value) for name, value in inputs.items()})[2] for inputs in (pairs, flat)]
    assert not torch.allclose(*states, atol=0.1)


@pytest.mark.parametrize("name", ["tiny_encoder", "typed_encoder"])
def test_a_run_and_its_scoring_from_stored_states_equal_those_without(name, request, tmp_path, monkeypatch):
    monkeypatch.setenv("XLFA_CACHE", str(tmp_path / "cache"))
    encoder = request.getfixturevalue(name)
    plain = run(encoder, tmp_path / "plain")
    cached = run(encoder, tmp_path / "cached", "--cache_trunk", "true")
    # Dropout of the upper layers and of the head is on in both; the difference is the precision of the storage.
    np.testing.assert_allclose(cached, plain, rtol=0.01)
    before = load_file(tmp_path / "plain" / "model.safetensors")
    after = load_file(tmp_path / "cached" / "model.safetensors")
    assert torch.equal(
        before["xlfa.encoder.encoder.layer.1.output.dense.bias"],
        after["xlfa.encoder.encoder.layer.1.output.dense.bias"],
    )
    moved = torch.linalg.vector_norm(before["classifier.weight"] - after["classifier.weight"])
    assert moved < 0.02 * torch.linalg.vector_norm(before["classifier.weight"])

    [folder] = (tmp_path / "cache" / "trunks").iterdir()
    files = {path.name for path in folder.iterdir()}
    scoring = ["--task", "xnli", "--data_root", "sample", "--languages", "en", "de", "--bf16", "false"]
    scores = {}
    for name, flags in {"plain": [], "cached": ["--cache_trunk", "true"]}.items():
        evaluate([*scoring, "--model", str(tmp_path / "cached"), "--output_dir", str(tmp_path / name / "s"), *flags])
        scores[name] = [
            json.loads(line)["score"]
            for language in ("en", "de")
            for line in (tmp_path / name / "s" / "predictions" / f"{language}.jsonl").read_text().splitlines()
        ]
    np.testing.assert_allclose(scores["cached"], scores["plain"], atol=0.01)
    # The trained model has the encoder's trunk: its scoring adds to the cache of its training.
    assert files < {path.name for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_scoring_a_model_without_frozen_layers_from_a_cache_is_refused(bert_config, tiny_encoder, tmp_path):
    model = XLFAForSequenceClassification.from_encoder(tiny_encoder, num_labels=3)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
    with pytest.raises(XLFAError, match="--cache_trunk .* this model has none"):
        evaluate(["--task", "xnli", "--data_root", "sample", "--model", str(tmp_path), "--cache_trunk", "true"])
