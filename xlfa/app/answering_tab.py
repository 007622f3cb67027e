"""The tab that asks a trained model a question about a paragraph."""

import functools
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from transformers import PreTrainedTokenizerBase

from modeling_xlfa import XLFAForQuestionAnswering
from xlfa.app.elements import facts, message, passage
from xlfa.app.fused_answers import FusedAnswer, answer_question
from xlfa.app.inputs import check_input
from xlfa.errors import XLFAError

EXAMPLE_PARAGRAPH = (
    "Die Zugspitze ist mit 2962 Metern der höchste Berg Deutschlands. Sie wurde am 27. August 1820 von Josef Naus und "
    "seinem Bergführer Johann Georg Tauschl zum ersten Mal bestiegen."
)
EXAMPLE_QUESTION = "When was the Zugspitze first climbed?"
NO_MODEL = """**No model that answers questions is loaded.** The page invents no answers: an encoder alone has no head
for them. This trains one on the embedded sample, offline, in a few minutes:

    make quickstart

and this starts the page with it:

    xlfa app --question_model runs/quickstart/xquad

The sample is for trying the tool out; train on SQuAD (`xlfa train --task xquad …`) for answers that mean something.
"""
PART_HEADERS = ["read from", "score", "its own answer", "its score"]

# Paragraph or message, facts, scores by part.
View = tuple[str, str, list[list[str]]]


@dataclass(frozen=True)
class QuestionModel:
    """A trained model with a question-answering head.

    Attributes:
        name: as the user gave it.
    """

    name: str
    model: XLFAForQuestionAnswering
    tokenizer: PreTrainedTokenizerBase


def show_answer(question_model: QuestionModel, question: str | None, paragraph: str | None) -> View:
    """The paragraph with the answer marked, facts, and scores by the fusion's parts; or a message and nothing else."""
    try:
        question, paragraph = check_input("the question", question), check_input("the paragraph", paragraph)
        found = answer_question(question_model.model, question_model.tokenizer, question, paragraph)
    except XLFAError as error:
        return message(str(error)), "", []
    return passage(paragraph, found.answer.start, found.answer.end), facts(describe(found)), part_rows(found)


def describe(found: FusedAnswer) -> dict[str, str]:
    """Names and values of what is worth knowing about an answer."""
    known = {"answer": found.answer.text, "score": f"{found.answer.score:.4f}"}
    if found.gate_of_answer is None:
        return {**known, "gate": "this model fuses no layers: it answers from the last one"}
    return {
        **known,
        "mean gate, answer": f"{found.gate_of_answer:.3f}",
        "mean gate, paragraph": f"{found.gate_of_context:.3f}",
    }


def part_rows(found: FusedAnswer) -> list[list[str]]:
    """The rows of the table of scores, as `PART_HEADERS`."""
    return [
        [part.states, f"{part.score:.4f}", " ".join(part.own.text.split()), f"{part.own.score:.4f}"]
        for part in found.parts
    ]


def build_answering_tab(question_model: QuestionModel | None) -> None:
    """The tab's fields, and what happens when a question is asked; without a model, what to do for one."""
    if question_model is None:
        gr.Markdown(NO_MODEL, elem_id="no-model")
    usable = question_model is not None
    paragraph = gr.Textbox(EXAMPLE_PARAGRAPH, label="Paragraph", lines=5, interactive=usable, elem_id="paragraph")
    with gr.Row():
        question = gr.Textbox(EXAMPLE_QUESTION, label="Question", interactive=usable, elem_id="question")
        button = gr.Button("Ask", variant="primary", interactive=usable, elem_id="ask", scale=0, min_width=110)
    if question_model is None:
        return
    marked = gr.HTML(elem_id="answer")
    found = gr.HTML(elem_id="answer-facts")
    table = gr.Dataframe(
        headers=PART_HEADERS,
        column_widths=["28%", "14%", "44%", "14%"],
        wrap=True,
        interactive=False,
        label="Scores by fused layer",
        elem_id="parts",
    )
    gr.Markdown(
        "The gate is the share of the lower layer in the fused states, 0 to 1 (a literal gate may leave this range), "
        "averaged over channels and tokens. *Alone*: the head reads that layer without fusion, for which it was not "
        f"trained. Model: `{Path(question_model.name).name}`."
    )
    gr.on(
        [button.click, question.submit],
        fn=functools.partial(show_answer, question_model),
        inputs=[question, paragraph],
        outputs=[marked, found, table],
        show_progress="minimal",
        concurrency_limit=1,
        concurrency_id="computing",
        api_name="ask",
    )
