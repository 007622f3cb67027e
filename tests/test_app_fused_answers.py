"""Answers by a fusion's parts: they add up, agree with `xlfa predict`, and with models that have that part alone."""

import pytest
import torch
from app_models import FUSIONS, question_model

from modeling_xlfa import XLFAConfig, XLFAForQuestionAnswering
from xlfa.answering import AnsweringArguments, answer_rows
from xlfa.app.fused_answers import answer_question, recording
from xlfa.errors import XLFAError

QUESTION, SHORT = "who sat on the mat?", "the cat sat on the mat. a dog ran."
LONG = " ".join(f"the cat {number} sat on the mat {number}." for number in range(30))


def assert_same(answer, expected):
    assert (answer.text, answer.start, answer.end) == (expected.text, expected.start, expected.end)
    assert answer.score == pytest.approx(expected.score, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in FUSIONS if name != "none"])
def test_the_parts_add_up_to_what_the_model_fuses(tiny_encoder, name):
    model, tokenizer = question_model(tiny_encoder, **FUSIONS[name])
    inputs = tokenizer(["the cat", SHORT], padding=True, return_tensors="pt")
    with torch.no_grad(), recording(model.xlfa.fusion) as recorded:
        fused = model.xlfa(**inputs).last_hidden_state
    (parts,) = recorded
    inside = inputs["attention_mask"].bool()
    torch.testing.assert_close((parts.lower * parts.gate + parts.last * (1 - parts.gate))[inside], fused[inside])
    assert not torch.allclose(parts.lower, parts.last)
    assert not model.xlfa.fusion._forward_hooks


@pytest.mark.parametrize("context", [SHORT, LONG])
@pytest.mark.parametrize("name", FUSIONS)
def test_the_answer_is_that_of_xlfa_predict(tiny_encoder, name, context):
    model, tokenizer = question_model(tiny_encoder, **FUSIONS[name])
    found = answer_question(model, tokenizer, QUESTION, context)
    arguments = AnsweringArguments(model="", question=QUESTION, context=context, bf16=False)
    ((_, expected),) = answer_rows(model, tokenizer, [{"question": QUESTION, "context": context}], arguments)
    assert_same(found.answer, expected)
    assert context[found.answer.start : found.answer.end] == found.answer.text
    if name == "none":
        assert (found.gate_of_answer, found.gate_of_context, found.parts) == (None, None, [])
    else:
        as_trained = found.parts[0]
        assert as_trained.score == pytest.approx(as_trained.own.score, rel=1e-4)
        assert_same(as_trained.own, expected)


def without_fusion(model, layers):
    """A model that has the layers of another one up to that number, its head, and no fusion."""
    text_config = type(model.config.text_config)(**{**model.config.text_config.to_dict(), "num_hidden_layers": layers})
    plain = XLFAForQuestionAnswering(XLFAConfig(text_config=text_config, fusion="none", input_length=160)).eval()
    wanted = plain.state_dict()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in wanted})
    return plain


@pytest.mark.parametrize("name, lower", [("literal", 2), ("aff", 2)])
def test_a_part_alone_is_a_model_that_has_no_other(tiny_encoder, name, lower):
    model, tokenizer = question_model(tiny_encoder, **FUSIONS[name])
    _, last_alone, lower_alone = answer_question(model, tokenizer, QUESTION, SHORT).parts
    assert "layer 4" in last_alone.states and "layer 2 alone" in lower_alone.states
    for part, layers in ((last_alone, 4), (lower_alone, lower)):
        expected = answer_question(without_fusion(model, layers), tokenizer, QUESTION, SHORT).answer
        assert_same(part.own, expected)
        assert part.score <= part.own.score * (1 + 1e-5)


@pytest.mark.parametrize("bias, gate, equal", [(0.0, 0.5, None), (50.0, 1.0, 2), (-50.0, 0.0, 1)])
def test_an_open_gate_answers_from_the_lower_layer_and_a_closed_one_from_the_last(tiny_encoder, bias, gate, equal):
    model, tokenizer = question_model(tiny_encoder, fusion="dlfa", fusion_gate="sigmoid", fusion_norm="none")
    with torch.no_grad():
        for branch in (model.xlfa.fusion.aif.global_branch, model.xlfa.fusion.aif.local_branch):
            branch.expand.weight.zero_()
            branch.expand.bias.fill_(bias)
    found = answer_question(model, tokenizer, QUESTION, SHORT)
    assert (found.gate_of_answer, found.gate_of_context) == pytest.approx((gate, gate), abs=1e-6)
    if equal is not None:
        assert found.parts[0].score == pytest.approx(found.parts[equal].score, rel=1e-5)


def test_the_gate_of_a_scalar_mix_is_the_share_of_its_lower_layers(tiny_encoder):
    model, tokenizer = question_model(tiny_encoder, fusion="scalar_mix")
    with torch.no_grad():
        model.xlfa.fusion.logits.copy_(torch.tensor([0.1, 0.2, 0.1, 0.2, 0.4]).log())
    found = answer_question(model, tokenizer, QUESTION, SHORT)
    assert (found.gate_of_answer, found.gate_of_context) == pytest.approx((0.6, 0.6))
    assert "layers 0 to 3" in found.parts[2].states


def test_a_context_without_a_piece_is_refused(tiny_encoder):
    model, tokenizer = question_model(tiny_encoder, fusion="none")
    with pytest.raises(XLFAError, match="no piece"):
        answer_question(model, tokenizer, QUESTION, " ")


def test_a_question_that_would_be_cut_is_refused(tiny_encoder):
    model, tokenizer = question_model(tiny_encoder, fusion="none")
    with pytest.raises(XLFAError, match="more than 64 tokens: shorten it"):
        answer_question(model, tokenizer, "who " * 65, "anna")
