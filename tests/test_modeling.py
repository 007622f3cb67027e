"""The models: heads on every encoder family, losses, saving and loading, and what Trainer gets from predict()."""

import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from modeling_xlfa import (
    XLFAConfig,
    XLFAForQuestionAnswering,
    XLFAForSequenceClassification,
    XLFAForTokenClassification,
    XLFAModel,
)
from modeling_xlfa.modeling_xlfa import XLFAPreTrainedModel

HEADS = [XLFAForQuestionAnswering, XLFAForSequenceClassification, XLFAForTokenClassification]

FUSIONS = {
    "dlfa": {"fusion": "dlfa"},
    "learned": {"fusion": "dlfa", "fusion_layer": "learned"},
    "scalar_mix": {"fusion": "scalar_mix"},
    "aff": {"fusion": "aff"},
    "learned_aff": {"fusion": "aff", "fusion_layer": "learned", "fusion_layer_norm": True},
}
# For tests that have a twin of all heads and families with the default, dlfa.
other_fusions = pytest.mark.parametrize("fusion_fields", [name for name in FUSIONS if name != "dlfa"], indirect=True)


@pytest.fixture(params=list(FUSIONS))
def fusion_fields(request):
    """The fields of each kind of fusion."""
    return FUSIONS[request.param]


def randomise(module):
    """Move a module's weights away from their start."""
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)


def task_inputs(head=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[0, 6:] = 0
    inputs = {"input_ids": torch.randint(4, 99, (4, 10), generator=generator), "attention_mask": mask}
    if head is XLFAForQuestionAnswering:
        inputs |= {"start_positions": torch.tensor([1, 2, 0, 3]), "end_positions": torch.tensor([2, 2, 0, 30])}
    elif head is XLFAForSequenceClassification:
        inputs["labels"] = torch.tensor([0, 1, 0, 1])
    elif head is XLFAForTokenClassification:
        inputs["labels"] = torch.randint(0, 2, (4, 10), generator=generator).masked_fill(mask == 0, -100)
    return inputs


def pair_inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for side, length in (("source", 7), ("target", 9)):
        ids = torch.randint(4, 99, (3, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        special = torch.zeros_like(ids)
        special[:, 0] = 1
        inputs |= {
            f"{side}_input_ids": ids,
            f"{side}_attention_mask": mask,
            f"{side}_special_tokens_mask": special,
        }
    return inputs


@pytest.mark.parametrize("head", HEADS)
def test_every_head_trains_on_every_encoder_family(encoder_config, head):
    model = head(XLFAConfig(text_config=encoder_config, ot_weight=0.5)).train()
    output = model(**task_inputs(head), **pair_inputs())
    torch.testing.assert_close(output.loss, output.task_loss + 0.5 * output.ot_loss)
    assert output.ot_loss > 0
    output.loss.backward()
    without_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without_gradient == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_save_and_load_keeps_every_weight_and_logit(encoder_config, head, tmp_path):
    model = head(XLFAConfig(text_config=encoder_config, num_labels=2)).train()
    model(**task_inputs(head))  # moves the running statistics away from their start
    model.eval().save_pretrained(tmp_path)
    loaded, report = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = task_inputs()
    for name in ("logits", "start_logits", "end_logits"):
        if name in model(**inputs):
            assert torch.equal(model(**inputs)[name], loaded.eval()(**inputs)[name])


@other_fusions
def test_every_fusion_trains_on_every_encoder_family(encoder_config, fusion_fields):
    config = XLFAConfig(text_config=encoder_config, ot_weight=0.5, ot_solver="product", **fusion_fields)
    model = XLFAForTokenClassification(config).train()
    model(**task_inputs(XLFAForTokenClassification), **pair_inputs()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    for name, parameter in model.xlfa.fusion.named_parameters():
        if name.endswith(("logits", "gamma")):
            assert (parameter.grad != 0).all()


@other_fusions
@pytest.mark.parametrize("head", HEADS)
def test_every_head_takes_every_fusion(bert_config, head, fusion_fields):
    config = XLFAConfig(text_config=bert_config, ot_weight=0.5, ot_solver="product", **fusion_fields)
    model = head(config).train()
    output = model(**task_inputs(head), **pair_inputs())
    torch.testing.assert_close(output.loss, output.task_loss + 0.5 * output.ot_loss)
    output.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@other_fusions
def test_save_and_load_keeps_every_fusion(encoder_config, fusion_fields, tmp_path):
    model = XLFAModel(XLFAConfig(text_config=encoder_config, **fusion_fields)).train()
    randomise(model.fusion)
    model(**task_inputs())  # moves the running statistics away from their start
    model.eval().save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded.eval()(**task_inputs()).last_hidden_state, model(**task_inputs()).last_hidden_state)


@pytest.mark.parametrize("name", ["learned", "scalar_mix"])
def test_layer_weights_that_a_checkpoint_lacks_start_as_in_a_new_model(bert_config, tmp_path, name):
    XLFAModel(XLFAConfig(text_config=bert_config, fusion="none")).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, **FUSIONS[name])
    mix = loaded.fusion if name == "scalar_mix" else loaded.fusion.lower_mix
    assert torch.equal(mix.logits, torch.zeros(5 if name == "scalar_mix" else 3))
    assert mix.gamma is None or torch.equal(mix.gamma, torch.ones(1))


def test_the_scalar_mix_starts_as_the_mean_of_all_layers(encoder_config):
    model = XLFAModel(XLFAConfig(text_config=encoder_config, fusion="scalar_mix")).eval()
    output = model(**task_inputs(), output_hidden_states=True)
    assert len(output.hidden_states) == 5
    torch.testing.assert_close(output.last_hidden_state, torch.stack(output.hidden_states).mean(0))


@pytest.mark.parametrize("fusion", ["dlfa", "aff"])
@pytest.mark.parametrize("layer", [1, 3, "learned"])
def test_the_fused_layers_are_those_of_fusion_layer(bert_config, fusion, layer):
    model = XLFAModel(XLFAConfig(text_config=bert_config, fusion=fusion, fusion_layer=layer)).eval()
    inputs = task_inputs()
    output = model(**inputs, output_hidden_states=True)
    states = output.hidden_states
    lower = states[1:4] if layer == "learned" else states[layer]
    assert torch.equal(output.last_hidden_state, model.fusion(lower, states[4], inputs["attention_mask"]))


def test_every_fusion_computes_in_float64_and_under_bfloat16_autocast(bert_config, fusion_fields):
    model = XLFAModel(XLFAConfig(text_config=bert_config, **fusion_fields)).eval()
    randomise(model.fusion)
    single = model(**task_inputs(), **pair_inputs())
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**task_inputs(), **pair_inputs())
    double = model.double()(**task_inputs(), **pair_inputs())
    assert double.last_hidden_state.dtype == torch.float64
    torch.testing.assert_close(single.last_hidden_state.double(), double.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single.last_hidden_state, half.last_hidden_state.float(), rtol=0.1, atol=0.1)
    torch.testing.assert_close(single.ot_loss, half.ot_loss, rtol=0.1, atol=0.01)


def test_automodel_on_a_head_checkpoint_is_the_encoder_with_fusion(bert_config, tmp_path):
    model = XLFAForQuestionAnswering(XLFAConfig(text_config=bert_config)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, XLFAModel)
    inputs = task_inputs()
    expected = model.xlfa(**inputs).last_hidden_state
    assert torch.equal(loaded(**inputs).last_hidden_state, expected)


def test_without_pairs_there_is_no_alignment_loss(bert_config):
    model = XLFAForSequenceClassification(XLFAConfig(text_config=bert_config, ot_weight=1.0))
    output = model(**task_inputs(XLFAForSequenceClassification))
    assert output.ot_loss is None and output.ot_statistics is None
    assert torch.equal(output.loss, output.task_loss)


def test_pairs_alone_give_the_weighted_alignment_loss(bert_config):
    model = XLFAForSequenceClassification(XLFAConfig(text_config=bert_config, ot_weight=0.25)).eval()
    output = model(**pair_inputs())
    assert output.logits is None and output.task_loss is None
    torch.testing.assert_close(output.loss, 0.25 * output.ot_loss)


def test_one_side_of_the_pairs_alone_is_an_error(bert_config):
    inputs = {name: value for name, value in pair_inputs().items() if name.startswith("source")}
    with pytest.raises(ValueError, match="both source_input_ids and target_input_ids"):
        XLFAModel(XLFAConfig(text_config=bert_config))(**inputs)


def test_different_numbers_of_sentences_are_an_error(bert_config):
    inputs = pair_inputs()
    inputs |= {name: value[:2] for name, value in inputs.items() if name.startswith("target")}
    with pytest.raises(ValueError, match="source_input_ids has 3 sentences and target_input_ids 2"):
        XLFAModel(XLFAConfig(text_config=bert_config))(**inputs)


@torch.no_grad()
def test_the_encoder_s_output_has_its_fields_as_keys_too(bert_config):
    model = XLFAModel(XLFAConfig(text_config=bert_config)).eval()
    output = model(**task_inputs(), **pair_inputs())
    assert list(output) == ["last_hidden_state", "ot_loss", "ot_statistics"]
    assert output[0] is output["last_hidden_state"] is output.last_hidden_state is output.to_tuple()[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_labels": 1}, "num_labels=1 is not allowed: .* at least 2"),
        ({"problem_type": "multi_label_classification"}, "problem_type='multi_label_classification' is not allowed"),
    ],
)
@pytest.mark.parametrize("head", [XLFAForSequenceClassification, XLFAForTokenClassification])
def test_what_the_classifiers_cannot_do_is_refused(bert_config, head, fields, words):
    with pytest.raises(ValueError, match=words):
        head(XLFAConfig(text_config=bert_config, **fields))
    head(XLFAConfig(text_config=bert_config, problem_type="single_label_classification"))


def test_padding_changes_no_logit_and_no_alignment_loss(encoder_config, fusion_fields):
    model = XLFAForSequenceClassification(
        XLFAConfig(text_config=encoder_config, classifier_pooling="mean", ot_weight=1.0, **fusion_fields)
    ).eval()
    inputs = {**task_inputs(), **pair_inputs()}
    padded = {
        name: torch.nn.functional.pad(value, (0, 3), value=int(name.endswith("special_tokens_mask")))
        for name, value in inputs.items()
    }
    before, after = model(**inputs), model(**padded)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after.ot_loss, before.ot_loss, atol=1e-5, rtol=1e-4)


def test_special_tokens_are_not_aligned(bert_config):
    model = XLFAModel(XLFAConfig(text_config=bert_config, ot_layer=0)).eval()
    inputs = pair_inputs()
    changed = {name: value.clone() for name, value in inputs.items()}
    for side in ("source", "target"):
        changed[f"{side}_input_ids"][:, 0] = 50
    as_booleans = {name: value.bool() if "special" in name else value for name, value in inputs.items()}
    losses = [model(**given).ot_loss for given in (inputs, changed, as_booleans)]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


def aligned(model, inputs):
    """The states of `ot_layer` and the masks of alignable tokens, of both sides."""
    layer = model.config.ot_layer
    states, masks = [], []
    for side in ("source", "target"):
        ids, mask = inputs[f"{side}_input_ids"], inputs[f"{side}_attention_mask"]
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        states.append(output.last_hidden_state if layer == "fused" else output.hidden_states[layer])
        masks.append(mask * (1 - inputs[f"{side}_special_tokens_mask"]))
    return *states, *masks


@pytest.mark.parametrize("ot_layer", ["fused", 0, 2, 4])
@pytest.mark.parametrize("fusion", ["dlfa", "none", "scalar_mix", "aff"])
def test_the_aligned_states_are_those_of_ot_layer(bert_config, fusion, ot_layer):
    from modeling_xlfa import alignment_loss

    model = XLFAModel(XLFAConfig(text_config=bert_config, fusion=fusion, ot_layer=ot_layer)).eval()
    inputs = pair_inputs()
    expected, _ = alignment_loss(*aligned(model, inputs))
    torch.testing.assert_close(model(**inputs).ot_loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("option", "value"),
    [("tau", 0.5), ("debiased", True), ("center", True), ("cost", "sqeuclidean"), ("epsilon_scale", "mean")],
)
def test_the_options_of_the_term_reach_it(bert_config, option, value):
    from modeling_xlfa import alignment_loss

    fields = {"fusion": "none", "ot_layer": 2, "ot_epsilon": 0.3}
    model = XLFAModel(XLFAConfig(text_config=bert_config, **fields, **{f"ot_{option}": value})).eval()
    inputs = pair_inputs()
    given = aligned(model, inputs)
    plain, _ = alignment_loss(*given, 0.3)
    expected, _ = alignment_loss(*given, 0.3, **{option: value})
    found = model(**inputs).ot_loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert abs(found.item() - plain.item()) > 1e-3 * abs(plain.item())


def test_switching_the_term_on_changes_no_statistics_and_no_dropout(bert_config, fusion_fields):
    """A step with a vanishing weight equals a step without pairs: same dropout, same running statistics."""
    results = []
    for pairs in ({}, pair_inputs()):
        torch.manual_seed(0)
        config = XLFAConfig(text_config=bert_config, ot_weight=0.0, **fusion_fields)
        model = XLFAForSequenceClassification(config).train()
        torch.manual_seed(1)
        losses = [model(**task_inputs(XLFAForSequenceClassification), **pairs).task_loss for _ in range(2)]
        results.append((losses, {name: value.clone() for name, value in model.named_buffers()}))
    (losses, buffers), (losses_with, buffers_with) = results
    assert [loss.item() for loss in losses] == [loss.item() for loss in losses_with]
    assert all(torch.equal(buffers[name], buffers_with[name]) for name in buffers)


def test_pairs_alone_see_another_dropout_in_every_call(bert_config):
    model = XLFAModel(XLFAConfig(text_config=bert_config, ot_weight=1.0)).train()
    losses = [model(**pair_inputs()).ot_loss.item() for _ in range(3)]
    assert len(set(losses)) == 3


def test_a_head_starts_from_the_same_weights_with_any_fusion(bert_config):
    heads, draws = [], []
    for fields in (
        {"fusion": "none"},
        {"fusion": "dlfa"},
        {"fusion": "dlfa", "fusion_reduction": 8},
        {"fusion": "aff"},
    ):
        torch.manual_seed(0)
        heads.append(XLFAForSequenceClassification(XLFAConfig(text_config=bert_config, **fields)).classifier.weight)
        draws.append(torch.rand(3))
    assert all(torch.equal(heads[0], other) for other in heads[1:])
    assert all(torch.equal(draws[0], other) for other in draws[1:])


def test_an_encoder_published_in_half_precision_makes_a_model_of_one_type(bert_config):
    bert_config.dtype = torch.bfloat16
    model = XLFAForSequenceClassification(XLFAConfig(text_config=bert_config))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.isfinite(model(**task_inputs()).logits).all()


def test_the_trunk_is_frozen_before_anybody_calls_train(bert_config):
    model = XLFAForSequenceClassification(XLFAConfig(text_config=bert_config, freeze_layers=2))
    lower, upper = model.xlfa.encoder.encoder.layer[0], model.xlfa.encoder.encoder.layer[2]
    assert (lower.training, upper.training) == (False, True)
    assert not any(parameter.requires_grad for parameter in lower.parameters())
    assert all(parameter.requires_grad for parameter in upper.parameters())


def test_positions_in_padding_and_negative_ones_do_not_count(bert_config):
    model = XLFAForQuestionAnswering(XLFAConfig(text_config=bert_config)).eval()
    inputs = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])}
    expected = model(**inputs, start_positions=torch.tensor([9, 2]), end_positions=torch.tensor([9, 2])).loss
    for outside in (3, -100):
        positions = torch.tensor([outside, 2])
        torch.testing.assert_close(model(**inputs, start_positions=positions, end_positions=positions).loss, expected)


def test_positions_may_be_a_column(bert_config):
    model = XLFAForQuestionAnswering(XLFAConfig(text_config=bert_config)).eval()
    inputs = {"input_ids": torch.arange(8).view(2, 4)}
    row = torch.tensor([1, 2])
    expected, found = (model(**inputs, start_positions=own, end_positions=own).loss for own in (row, row[:, None]))
    assert torch.equal(expected, found)


def test_a_mask_of_pairs_of_tokens_is_refused_where_layers_are_fused(bert_config):
    model = XLFAModel(XLFAConfig(text_config=bert_config)).eval()
    with pytest.raises(ValueError, match=r"attention_mask must be B x T for the fusion, not \(1, 1, 4, 4\)"):
        model(input_ids=torch.arange(4)[None], attention_mask=torch.ones(1, 1, 4, 4))


def test_a_plain_encoder_is_not_taken_for_an_xlfa_model(tiny_encoder):
    """Its weights would have other names, and all of the model would be random."""
    for kind in (XLFAModel, XLFAForSequenceClassification, XLFAConfig):
        with pytest.raises(ValueError, match="a 'bert' model, and no XLFA one: build one on it with from_encoder"):
            kind.from_pretrained(tiny_encoder)


def test_a_batch_without_an_answer_in_it_has_loss_0_and_no_nan(bert_config):
    """Such as the stand-in of a process that has no example of a step."""
    model = XLFAForQuestionAnswering(XLFAConfig(text_config=bert_config)).eval()
    inputs = {"input_ids": torch.arange(4)[None], "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    loss = model(**inputs, start_positions=torch.tensor([1]), end_positions=torch.tensor([2])).loss
    loss.backward()
    assert loss == 0 and all(weight.grad is None or not weight.grad.any() for weight in model.parameters())


def test_answers_outside_the_window_and_padding_do_not_count(bert_config):
    model = XLFAForQuestionAnswering(XLFAConfig(text_config=bert_config)).eval()
    inputs = task_inputs(XLFAForQuestionAnswering)
    output = model(**task_inputs())
    padding = inputs["attention_mask"] == 0
    log_start, log_end = (
        logits.masked_fill(padding, -torch.inf).log_softmax(-1) for logits in (output.start_logits, output.end_logits)
    )
    rows = torch.arange(4)
    start_loss = -log_start[rows, inputs["start_positions"]].mean()
    # The fourth end position, 30, lies past the window of 10 tokens.
    end_loss = -log_end[rows[:3], inputs["end_positions"][:3]].mean()
    torch.testing.assert_close(model(**inputs).loss, (start_loss + end_loss) / 2)


def test_predict_of_trainer_returns_logits_first(bert_config, tmp_path, tiny_encoder):
    from transformers import AutoTokenizer

    model = XLFAForSequenceClassification(XLFAConfig(text_config=bert_config, ot_weight=1.0, num_labels=3))
    rows = [{"input_ids": [1, 5, 6, 2], "labels": 0}, {"input_ids": [1, 7, 2], "labels": 2}]
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(tiny_encoder)),
    )
    predictions = trainer.predict(rows).predictions
    assert predictions.shape == (2, 3)


@pytest.mark.parametrize("head", [XLFAForSequenceClassification, XLFAForQuestionAnswering])
def test_predict_of_trainer_returns_logits_alone_whatever_else_there_is(bert_config, tmp_path, head):
    model = head(XLFAConfig(text_config=bert_config, ot_weight=1.0, output_hidden_states=True))
    # A pair for each example, as a batch of Trainer's has as many rows of every input.
    batch = task_inputs(head) | {name: torch.cat([value, value[:1]]) for name, value in pair_inputs().items()}
    rows = [{name: value[number] for name, value in batch.items()} for number in range(4)]
    outputs = model(**batch)
    assert outputs.ot_loss is not None and outputs.ot_statistics and outputs.hidden_states and outputs.task_loss
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    predictions = trainer.predict(rows).predictions
    if head is XLFAForQuestionAnswering:
        assert [each.shape for each in predictions] == [(4, 10), (4, 10)]
    else:
        assert predictions.shape == (4, 2)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_the_gradient_of_transformers_own_trainer_is_the_same_with_accumulation(bert_config, tmp_path, norm):
    """It divides the loss by the accumulation steps itself: `accepts_loss_kwargs` leaves that to it."""
    assert XLFAPreTrainedModel.accepts_loss_kwargs is False

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    batches = [task_inputs(XLFAForSequenceClassification, seed) for seed in (0, 1)]
    rows = [{name: value[number] for name, value in batch.items()} for batch in batches for number in range(4)]
    bert_config.hidden_dropout_prob = bert_config.attention_probs_dropout_prob = 0.0
    found = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        config = XLFAConfig(text_config=bert_config, fusion_norm=norm, classifier_dropout=0.0)
        arguments = TrainingArguments(
            str(tmp_path / str(accumulation)),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **{"max_steps": 1, "max_grad_norm": 0.0, "save_strategy": "no", "report_to": "none", "use_cpu": True},
        )
        gradients = Gradients()
        model = XLFAForSequenceClassification(config).double()
        Trainer(model, arguments, train_dataset=rows, callbacks=[gradients]).train()
        found.append(gradients.found)
    whole, parts = found
    assert sum(gradient.abs().sum() for gradient in whole.values()) > 0
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def test_from_encoder_takes_the_pretrained_weights(tiny_encoder):
    model = XLFAForSequenceClassification.from_encoder(tiny_encoder, fusion="none", num_labels=3).eval()
    encoder = AutoModel.from_pretrained(tiny_encoder, add_pooling_layer=False).eval()
    inputs = {name: value.clamp(max=40) for name, value in task_inputs().items()}
    assert torch.equal(model.xlfa(**inputs).last_hidden_state, encoder(**inputs).last_hidden_state)
    assert model.config.num_labels == 3 and model.xlfa.encoder.pooler is None


def test_from_encoder_changes_fields_of_the_encoder_and_refuses_unknown_ones(tiny_encoder):
    model = XLFAModel.from_encoder(tiny_encoder, encoder_config={"hidden_dropout_prob": 0.0})
    assert model.encoder.config.hidden_dropout_prob == 0.0
    with pytest.raises(ValueError, match="no field 'dropout_of_hidden'"):
        XLFAModel.from_encoder(tiny_encoder, encoder_config={"dropout_of_hidden": 0.0})


def test_from_encoder_keeps_what_is_for_the_hub_out_of_the_config(tiny_encoder, tmp_path):
    options = {"revision": "main", "token": "hf_secret", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    model = XLFAForSequenceClassification.from_encoder(tiny_encoder, num_labels=3, **options)
    model.save_pretrained(tmp_path / "saved")
    assert model.config.num_labels == 3
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not options.keys() & config.keys() and "hf_secret" not in json.dumps(config)


def test_from_encoder_refuses_unknown_fields(tiny_encoder):
    with pytest.raises(ValueError, match="fuson: XLFAConfig has no such field"):
        XLFAModel.from_encoder(tiny_encoder, fuson="none")


def test_from_encoder_refuses_an_xlfa_checkpoint(bert_config, tmp_path):
    XLFAModel(XLFAConfig(text_config=bert_config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load it with from_pretrained"):
        XLFAModel.from_encoder(str(tmp_path))


def test_an_override_at_loading_is_checked(bert_config, tmp_path):
    XLFAForSequenceClassification(XLFAConfig(text_config=bert_config)).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, ot_epsilon=0.5)
    assert model.config.ot_epsilon == 0.5
    with pytest.raises(ValueError, match="ot_epsilon=-1"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, ot_epsilon=-1)


def test_half_precision_weights_keep_losses_in_float32(bert_config, fusion_fields):
    config = XLFAConfig(text_config=bert_config, ot_weight=1.0, **fusion_fields)
    model = XLFAForSequenceClassification(config).bfloat16().eval()
    output = model(**task_inputs(XLFAForSequenceClassification), **pair_inputs())
    assert output.task_loss.dtype == torch.float32 and output.ot_loss.dtype == torch.float32


def test_idf_marginals_travel_with_the_model(bert_config, tmp_path):
    model = XLFAModel(XLFAConfig(text_config=bert_config, ot_marginals="idf")).eval()
    assert torch.equal(model.ot_idf, torch.ones(99))
    uniform = model(**pair_inputs()).ot_loss
    model.ot_idf.copy_(torch.rand(99) + 0.1)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.ot_idf, model.ot_idf)
    assert torch.equal(loaded(**pair_inputs()).ot_loss, model(**pair_inputs()).ot_loss)
    assert not torch.equal(loaded(**pair_inputs()).ot_loss, uniform)


def test_norm_marginals_are_the_norms_of_the_states(bert_config):
    model = XLFAModel(XLFAConfig(text_config=bert_config, ot_marginals="norm", ot_solver="product", ot_layer=0)).eval()
    states, mask = torch.randn(2, 4, 32), torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    norms = states.norm(dim=-1) * mask
    found = model._marginals(mask, states, mask)
    torch.testing.assert_close(found, norms / norms.sum(1, keepdim=True))


def test_epsilon_decays_from_its_start_to_its_final_value(bert_config):
    model = XLFAModel(XLFAConfig(text_config=bert_config, ot_epsilon=0.01, ot_epsilon_start=1.0))
    assert model.ot_epsilon_now == pytest.approx(0.01)
    model.ot_progress = 0.0
    assert model.ot_epsilon_now == pytest.approx(1.0)
    model.ot_progress = 0.5
    assert model.ot_epsilon_now == pytest.approx(0.1)
    assert model.config.ot_epsilon == 0.01


def test_the_attention_asked_for_reaches_the_encoder(tiny_encoder):
    for name in ("eager", "sdpa"):
        model = XLFAForSequenceClassification.from_encoder(tiny_encoder, attn_implementation=name)
        assert model.base_model.encoder.config._attn_implementation == name


def test_an_encoder_published_in_bfloat16_trains_in_float32(tiny_encoder, tmp_path):
    AutoModel.from_pretrained(tiny_encoder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = XLFAForSequenceClassification.from_encoder(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    inputs = {name: value.clamp(max=40) for name, value in task_inputs().items()}
    assert torch.isfinite(model(**inputs).logits).all()


def test_hidden_states_can_be_asked_for_in_the_config(bert_config, tmp_path):
    XLFAModel(XLFAConfig(text_config=bert_config)).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, output_hidden_states=True)
    assert len(model(**task_inputs()).hidden_states) == 5


def test_the_closed_forms_log_no_epsilon(bert_config):
    checked = {"marginal_error", "not_converged"}
    for solver, logged in (("exact", {"plan_entropy"} | checked), ("product", {"plan_entropy"})):
        model = XLFAModel(XLFAConfig(text_config=bert_config, ot_solver=solver))
        assert set(model(**pair_inputs()).ot_statistics) == logged
