"""What every transformers model can do, on ours: resizing, checkpointing, compiling, precision, devices, pipelines."""

import pytest
import torch
from accelerate import infer_auto_device_map
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_xlfa import (
    XLFAConfig,
    XLFAForQuestionAnswering,
    XLFAForSequenceClassification,
    XLFAForTokenClassification,
    XLFAModel,
)

FUSIONS = {
    "none": {"fusion": "none"},
    "dlfa": {"fusion": "dlfa"},
    "learned": {"fusion": "aff", "fusion_layer": "learned"},
    "scalar_mix": {"fusion": "scalar_mix"},
}


def task_inputs(shape=(3, 9), vocabulary=99):
    ids = torch.randint(4, vocabulary, shape, generator=torch.Generator().manual_seed(shape[1]))
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pair_inputs(vocabulary=99):
    sides = {"source": task_inputs((2, 7), vocabulary), "target": task_inputs((2, 8), vocabulary)}
    return {f"{side}_{name}": value for side, inputs in sides.items() for name, value in inputs.items()}


# Resizing


@pytest.mark.parametrize("size", [120, 90])
def test_a_resized_vocabulary_is_saved_and_loaded(encoder_config, size, tmp_path):
    model = XLFAForTokenClassification(XLFAConfig(text_config=encoder_config, ot_weight=1.0)).eval()
    before = model(**task_inputs(vocabulary=90)).logits
    assert len(model.resize_token_embeddings(size).weight) == size
    assert torch.equal(model(**task_inputs(vocabulary=90)).logits, before)
    assert model.config.text_config.vocab_size == size
    model.save_pretrained(tmp_path)
    loaded = XLFAForTokenClassification.from_pretrained(tmp_path)
    inputs = task_inputs(vocabulary=size) | pair_inputs(vocabulary=size)
    for name in ("logits", "ot_loss"):
        assert torch.equal(loaded(**inputs)[name], model(**inputs)[name])


@pytest.mark.parametrize("head", [XLFAModel, XLFAForQuestionAnswering])
def test_the_table_of_piece_weights_is_resized_with_the_vocabulary(bert_config, head, tmp_path):
    model = head(XLFAConfig(text_config=bert_config, ot_marginals="idf", ot_weight=1.0)).eval()
    table = torch.rand(99) + 0.1
    model.base_model.ot_idf.copy_(table)
    model.resize_token_embeddings(101, pad_to_multiple_of=8)
    found = model.base_model.ot_idf
    # A new piece counts as the rarest one.
    assert torch.equal(found[:99], table) and torch.equal(found[99:], table.max().expand(5))
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path)
    assert torch.equal(loaded.base_model.ot_idf, found)
    assert torch.equal(loaded(**pair_inputs(104)).ot_loss, model(**pair_inputs(104)).ot_loss)
    model.resize_token_embeddings(90)
    assert torch.equal(model.base_model.ot_idf, table[:90])


# Activation checkpointing


def gradients(model, inputs):
    """Of a training step from the same running statistics and random state, which it leaves as they were."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    torch.manual_seed(1)
    model.zero_grad()
    model.train()(**inputs).loss.backward()
    for name, value in model.named_buffers():
        value.copy_(buffers[name])
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def enable_checkpointing(model, kwargs):
    """By the name of transformers 5.x, or its older one."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(kwargs)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_checkpointing_changes_no_gradient(encoder_config, fusion):
    """With dropout, a fused lower layer, and the alignment term, whose dropout draws from a copy of the generator."""
    config = XLFAConfig(text_config=encoder_config, ot_weight=0.5, ot_solver="product", **FUSIONS[fusion])
    model = XLFAForSequenceClassification(config)
    inputs = task_inputs() | pair_inputs() | {"labels": torch.tensor([0, 1, 0])}
    calls = []
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            next(layer.children()).register_forward_hook(lambda *_: calls.append(1))
    expected = gradients(model, inputs)
    without = len(calls)
    for reentrant in (False, True):
        calls.clear()
        enable_checkpointing(model, {"use_reentrant": reentrant})
        found = gradients(model, inputs)
        assert len(calls) == 2 * without > 0
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=f"{name}, {reentrant=}")


def test_the_older_name_of_checkpointing_works_too(bert_config):
    model = XLFAForSequenceClassification(XLFAConfig(text_config=bert_config))
    inputs = task_inputs() | {"labels": torch.tensor([0, 1, 0])}
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    assert all(torch.allclose(gradient, expected[name]) for name, gradient in gradients(model, inputs).items())


# Compiling


def assert_compiled_is_equal(config, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = XLFAForSequenceClassification(config).eval()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for shape in ((4, 10), (2, 7), (3, 13)):
            expected, found = (run(**task_inputs(shape)).logits for run in (model, compiled))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # One graph for all three shapes.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiled_model_gives_the_same_logits_for_every_shape(bert_config):
    # Without the C++ code that the default backend writes, which takes a minute to compile.
    bert_config.num_hidden_layers = 2
    assert_compiled_is_equal(XLFAConfig(text_config=bert_config), "aot_eager")


@pytest.mark.full
def test_every_compiled_family_gives_the_same_logits_for_every_shape(encoder_config):
    assert_compiled_is_equal(XLFAConfig(text_config=encoder_config), "inductor")


# Attention and precision


def test_attention_implementations_agree(encoder_config, tmp_path):
    config = XLFAConfig(text_config=encoder_config, ot_weight=1.0)
    XLFAForSequenceClassification(config).save_pretrained(tmp_path)
    eager, sdpa = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation=name)
        for name in ("eager", "sdpa")
    )
    assert (eager.xlfa.encoder.config._attn_implementation, sdpa.xlfa.encoder.config._attn_implementation) == (
        "eager",
        "sdpa",
    )
    inputs = task_inputs() | pair_inputs()
    for name in ("logits", "ot_loss"):
        torch.testing.assert_close(sdpa(**inputs)[name], eager(**inputs)[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_model_loaded_in_bfloat16_trains_with_losses_in_float32(encoder_config, fusion, tmp_path):
    config = XLFAConfig(text_config=encoder_config, ot_weight=1.0, ot_marginals="idf", **FUSIONS[fusion])
    XLFAForSequenceClassification(config).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    output = model.train()(**task_inputs(), **pair_inputs(), labels=torch.tensor([0, 1, 0]))
    assert (output.logits.dtype, output.loss.dtype) == (torch.bfloat16, torch.float32)
    assert output.task_loss.dtype == output.ot_loss.dtype == torch.float32
    assert all(value.dtype != torch.bfloat16 for value in output.ot_statistics.values())
    output.loss.backward()
    assert torch.isfinite(output.loss) and all(torch.isfinite(weight.grad).all() for weight in model.parameters())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_model_loaded_in_bfloat16_differs_by_rounding_alone(encoder_config, fusion, tmp_path):
    XLFAForSequenceClassification(XLFAConfig(text_config=encoder_config, **FUSIONS[fusion])).save_pretrained(tmp_path)
    half, single = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=name)(**task_inputs(), **pair_inputs())
        for name in ("bfloat16", "float32")
    )
    torch.testing.assert_close(half.logits.float(), single.logits, rtol=0.05, atol=0.05)
    torch.testing.assert_close(half.ot_loss, single.ot_loss, rtol=0.1, atol=0.02)


# Devices


@pytest.mark.parametrize("fusion", FUSIONS)
def test_no_layer_and_no_fusion_is_split_between_devices(encoder_config, fusion):
    model = XLFAForSequenceClassification(XLFAConfig(text_config=encoder_config, **FUSIONS[fusion]))
    whole = {name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    assert len(whole) == 4
    whole |= {"xlfa.fusion"}
    size = 4 * model.num_parameters()
    entries = set()
    for share in range(20, 140, 3):
        budget = {"cpu": share * size // 100, "disk": 2 * size}
        placed = infer_auto_device_map(model, budget, no_split_module_classes=list(model._no_split_modules))
        entries |= set(placed)
    # Some budget ends between two layers, others end in the fusion (accelerate keeps room for a layer free).
    assert len(entries & whole) >= 4
    assert [entry for entry in entries for name in whole if entry.startswith(f"{name}.")] == []


def test_device_map_auto_gives_the_same_logits(encoder_config, tmp_path):
    model = XLFAForSequenceClassification(XLFAConfig(text_config=encoder_config, ot_weight=1.0)).eval()
    model.save_pretrained(tmp_path)
    inputs = task_inputs() | pair_inputs()
    expected = model(**inputs)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(loaded(**inputs).logits, expected.logits)
    # The fused layers on two "devices": what does not fit into the memory that is allowed is read from the disk.
    memory = {"cpu": int(0.8 * 4 * model.num_parameters())}
    split = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, device_map="auto", max_memory=memory, offload_folder=tmp_path / "offloaded"
    )
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        found = split(**inputs)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.ot_loss, expected.ot_loss)


# Pipelines


@pytest.fixture
def save_with_tokenizer(tiny_encoder, tmp_path):
    """A folder with a head on the tiny encoder, its tokenizer and names for its labels."""

    def save(head, labels):
        model = head.from_encoder(tiny_encoder, id2label=dict(enumerate(labels)))
        model.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
        return str(tmp_path), model.eval()

    return save


def test_pipeline_text_classification_gives_labels(save_with_tokenizer):
    labels = ["entailment", "neutral", "contradiction"]
    folder, model = save_with_tokenizer(XLFAForSequenceClassification, labels)
    classify = pipeline("text-classification", model=folder)
    inputs = classify.tokenizer(["der hund ist wach"], ["das tier ruht"], return_tensors="pt")
    expected = model(**inputs).logits.softmax(-1)[0]
    (found,) = classify([{"text": "der hund ist wach", "text_pair": "das tier ruht"}], top_k=None)
    assert {row["label"] for row in found} == set(labels)
    for row in found:
        assert row["score"] == pytest.approx(expected[labels.index(row["label"])].item(), abs=1e-5)
    assert classify("der hund")[0]["label"] in labels


def test_pipeline_token_classification_gives_labels(save_with_tokenizer):
    labels = ["O", "B-PER", "I-PER"]
    folder, model = save_with_tokenizer(XLFAForTokenClassification, labels)
    tag = pipeline("token-classification", model=folder, ignore_labels=[])
    inputs = tag.tokenizer("anna ist hier", return_tensors="pt")
    expected = model(**inputs).logits[0, 1:-1].argmax(-1)
    found = tag("anna ist hier")
    assert "".join(row["word"] for row in found) == "annaisthier"
    assert [row["entity"] for row in found] == [labels[number] for number in expected]


def test_a_pipeline_reads_another_language_in_batches(save_with_tokenizer):
    folder, _ = save_with_tokenizer(XLFAForSequenceClassification, ["no", "yes"])
    classify = pipeline("text-classification", model=folder, batch_size=2)
    texts = ["ein satz", "noch ein viel längerer satz", "drei"]
    one_by_one = [classify(text)[0] for text in texts]
    for found, expected in zip(classify(texts), one_by_one, strict=True):
        assert found["label"] == expected["label"]
        assert found["score"] == pytest.approx(expected["score"], abs=1e-5)
