"""The tab that answers: the answer is marked in the paragraph, text stays text, and without a model there are none."""

import html
import re

import pytest
from app_models import FUSIONS, HOSTILE, question_model

pytest.importorskip("gradio")

import gradio as gr

from xlfa.app.answering_tab import QuestionModel, build_answering_tab, show_answer
from xlfa.app.fused_answers import answer_question

QUESTION, PARAGRAPH = "who sat?", "the cat <b>sat</b> on the mat & ran.\nجلست القطة"


@pytest.fixture(scope="module", params=["sigmoid", "none"])
def model(request, tiny_encoder):
    return QuestionModel("qa", *question_model(tiny_encoder, **FUSIONS[request.param]))


def test_the_answer_is_marked_and_scored(model):
    shown, facts, parts = show_answer(model, QUESTION, PARAGRAPH)
    found = answer_question(model.model, model.tokenizer, QUESTION, PARAGRAPH)
    assert html.unescape(re.search("<mark>(.*)</mark>", shown, re.DOTALL)[1]) == found.answer.text
    assert html.unescape(re.sub("</?(div|mark).*?>", "", shown)) == PARAGRAPH
    assert f"{found.answer.score:.4f}" in facts
    if found.parts:
        assert f"{found.gate_of_answer:.3f}" in facts and f"{found.gate_of_context:.3f}" in facts
        assert [(row[0], row[1]) for row in parts] == [(part.states, f"{part.score:.4f}") for part in found.parts]
    else:
        assert parts == [] and "fuses no layers" in facts


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("field", ["question", "paragraph"])
def test_no_text_breaks_it(model, name, field):
    texts = {"question": QUESTION, "paragraph": PARAGRAPH, field: HOSTILE[name]}
    shown, facts, parts = show_answer(model, **texts)
    assert not re.search("<script|<img|<b>", shown + facts)
    assert ("<mark>" in shown) != ('role="alert"' in shown)
    if 'role="alert"' in shown:
        assert (facts, parts) == ("", []) and f"the {field}" in html.unescape(shown)


@pytest.mark.parametrize("name", ["none", "empty", "blanks", "half a surrogate pair", "too long"])
def test_what_cannot_be_read_is_a_message(model, name):
    assert 'role="alert"' in show_answer(model, QUESTION, HOSTILE[name])[0]


def test_without_a_model_the_tab_says_how_to_train_one_and_answers_nothing():
    with gr.Blocks() as page:
        build_answering_tab(None)
    components = [block for block in page.blocks.values() if hasattr(block, "elem_id")]
    fields = {block.elem_id: block for block in components if block.elem_id}
    assert "make quickstart" in fields["no-model"].value and "runs/quickstart/xquad" in fields["no-model"].value
    assert [fields[name].interactive for name in ("paragraph", "question", "ask")] == [False] * 3
    assert not page.fns
