"""Batches within the budget, results in order, an error of the background thread, and two processes like one."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from datasets import Dataset
from transformers import AutoTokenizer

from modeling_xlfa import XLFAForQuestionAnswering, XLFAForSequenceClassification
from xlfa.arguments import InferenceArguments
from xlfa.inference import InferenceOptions, has_fast_bf16, infer, prefetched, token_batches
from xlfa.tasks import get_task

pytestmark = pytest.mark.usefixtures("own_cache")
CPU = torch.device("cpu")


@pytest.mark.parametrize("max_tokens", [1, 7, 64, 10_000])
def test_batches_hold_every_position_once_within_the_budget(max_tokens):
    lengths = np.random.default_rng(0).integers(1, 40, size=100).tolist()
    batches = token_batches(lengths, max_tokens)
    assert sorted(position for batch in batches for position in batch) == list(range(100))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[position] for position in batch) <= max_tokens
    order = [lengths[position] for batch in batches for position in batch]
    assert order == sorted(lengths, reverse=True)


def test_a_batch_is_as_large_as_the_budget_allows():
    assert [len(batch) for batch in token_batches([10] * 7, 30)] == [3, 3, 1]
    assert token_batches([], 30) == []


def test_results_come_in_order_and_one_ahead():
    started = []

    def double(number):
        started.append(number)
        return 2 * number

    results = prefetched(double, range(5))
    assert next(results) == 0
    assert list(results) == [2, 4, 6, 8] and started == list(range(5))


def test_an_error_in_the_thread_reaches_the_caller_and_ends_the_thread():
    def fail(number):
        raise ValueError(f"number {number}")

    with pytest.raises(ValueError, match="number 3"):
        list(prefetched(fail, [3, 4, 5]))
    assert not [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]


def test_what_the_arguments_leave_open_follows_from_the_device(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert has_fast_bf16(CPU)
    assert InferenceOptions.of(InferenceArguments(), CPU) == InferenceOptions(2048, bf16=True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert InferenceOptions.of(InferenceArguments(), CPU) == InferenceOptions(2048, bf16=False)
    assert InferenceOptions.of(InferenceArguments(max_tokens_per_batch=7, bf16=True), CPU) == InferenceOptions(7, True)


def test_an_empty_budget_is_refused():
    with pytest.raises(ValueError, match="--max_tokens_per_batch 0"):
        InferenceArguments(max_tokens_per_batch=0)


def test_readings_are_in_the_order_of_the_inputs(tiny_encoder):
    model = XLFAForSequenceClassification.from_encoder(tiny_encoder, num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    texts = ["a", "the longest of all the texts", "some more", "b"]
    inputs = Dataset.from_dict({**tokenizer(texts, return_length=True), "number": [5, 6, 7, 8]})
    seen = []

    def read(outputs, padded, columns):
        seen.append((padded["input_ids"].shape, columns["number"]))
        return outputs.logits

    found = infer(model, tokenizer, inputs, read, InferenceOptions(40, bf16=False), columns=["number"])
    assert not model.training and seen[0] == ((1, inputs["length"][1]), [6])
    for text, logits in zip(texts, found):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
        np.testing.assert_allclose(logits, alone, rtol=1e-4, atol=1e-5)


def test_only_the_fused_layers_states_are_kept(tiny_encoder):
    model = XLFAForSequenceClassification.from_encoder(tiny_encoder, num_labels=3, fusion_layer=2)
    kept = []
    model.xlfa.encoder.register_forward_hook(lambda module, args, output: kept.append(output.hidden_states))
    model(torch.ones(1, 5, dtype=torch.long))
    assert [layer for layer, states in enumerate(kept[0]) if states is not None] == [2]


# Prints, from the first process, the logits of an odd number of inputs and the predictions of both tasks; then runs
# eval_xlfa.py, into a folder beside the models.
PROCESS = """
import json, runpy, sys
from transformers import AutoTokenizer
from accelerate import PartialState
from modeling_xlfa import XLFAForQuestionAnswering, XLFAForSequenceClassification
from xlfa.inference import InferenceOptions, infer
from xlfa.prediction import predict
from xlfa.tasks import get_task

state, found = PartialState(cpu=True), {}
assert state.num_processes == int(sys.argv[3])
for name, head, folder in [
    ("xnli", XLFAForSequenceClassification, sys.argv[1]), ("xquad", XLFAForQuestionAnswering, sys.argv[2])
]:
    task, model, tokenizer = get_task(name), head.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = task.load_test("de", "sample").select(range(11))
    windows, options = task.windows(rows, tokenizer, 160, 32), InferenceOptions(700, bf16=False)
    logits = infer(model, tokenizer, windows, lambda outputs, *_: outputs[0], options)
    rows_found = predict(model, tokenizer, task, rows, task.example_ids(rows), windows, options)
    found[name] = {
        "windows": len(windows),
        "logits": [each.tolist() for each in logits],
        "predictions": [vars(row) for row in rows_found],
    }
if state.is_main_process:
    print("FOUND", json.dumps(found))
for name, folder in zip(found, sys.argv[1:3]):
    sys.argv[1:] = f"--model {folder} --task {name} --data_root sample --languages de en --bf16 false".split()
    sys.argv += f"--max_tokens_per_batch 700 --output_dir {folder}-{state.num_processes}".split()
    runpy.run_path(%r, run_name="__main__")
"""


@pytest.fixture
def process_arguments(tiny_encoder, tmp_path):
    (tmp_path / "process.py").write_text(PROCESS % str(REPOSITORY / "eval_xlfa.py"))
    folders = [str(tmp_path / "xnli"), str(tmp_path / "xquad")]
    for folder, head, labels in zip(folders, (XLFAForSequenceClassification, XLFAForQuestionAnswering), (3, 2)):
        head.from_encoder(tiny_encoder, num_labels=labels).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    return [str(tmp_path / "process.py"), *folders]


def found_by(launcher, arguments, processes):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *arguments, str(processes)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


def test_two_processes_score_every_input_once_as_one_process_does(process_arguments):
    one = found_by([], process_arguments, 1)
    two = found_by(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], process_arguments, 2)
    for name in ("xnli", "xquad"):
        ids = [row["id"] for row in one[name]["predictions"]]
        assert len(set(ids)) == 11 and [row["id"] for row in two[name]["predictions"]] == ids
        assert one[name]["windows"] == len(two[name]["logits"])
        for logits, shared in zip(one[name]["logits"], two[name]["logits"], strict=True):
            np.testing.assert_allclose(shared, logits, atol=1e-4)
        for row, shared in zip(one[name]["predictions"], two[name]["predictions"]):
            assert {**row, "score": 0} == {**shared, "score": 0}
            assert shared["score"] == pytest.approx(row["score"], abs=1e-5)
    task = get_task("xnli")
    assert task.label_names.index(one["xnli"]["predictions"][0]["prediction"]) == np.argmax(one["xnli"]["logits"][0])
    for folder in process_arguments[1:]:
        assert_same_scores(Path(f"{folder}-1"), Path(f"{folder}-2"))


def assert_same_scores(one, two):
    """What eval_xlfa.py wrote in one process and in two: a row for every example, and the same scores of them."""
    alone, shared = (json.loads((folder / "scores.json").read_text()) for folder in (one, two))
    assert (alone["settings"].pop("processes"), shared["settings"].pop("processes")) == (1, 2)
    assert alone == shared and set(alone["languages"]) == {"de", "en"}
    for language in ("de", "en"):
        rows, others = (
            [json.loads(line) for line in (folder / "predictions" / f"{language}.jsonl").read_text().splitlines()]
            for folder in (one, two)
        )
        assert [row["id"] for row in rows] == alone["ids"]
        for row, other in zip(rows, others, strict=True):
            assert {**row, "score": 0} == {**other, "score": 0}
            assert other["score"] == pytest.approx(row["score"], abs=1e-4)
    assert sorted(path.name for path in two.iterdir()) == ["predictions", "scores.json", "scores.png"]
