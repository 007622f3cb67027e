"""Answers read from a fusion's parts: how much of the lower layer the gate lets through, and what each part says alone.

Both gated fusions and the scalar mix are L = lower * gate + last * (1 - gate), the mix with one gate for all tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_xlfa import XLFAForQuestionAnswering
from modeling_xlfa.fusion_xlfa import ScalarMix
from modeling_xlfa.outputs_xlfa import XLFAQuestionAnsweringOutput
from xlfa.answering import TASK
from xlfa.arguments import InferenceArguments
from xlfa.errors import XLFAError
from xlfa.evaluation import input_lengths
from xlfa.inference import INPUT_NAMES, InferenceOptions, infer
from xlfa.tasks.question_answering import MAX_QUESTION_TOKENS, Answer, cut_questions, find_answers


@dataclass(frozen=True)
class FusedParts:
    """What a fusion adds up: lower * gate + last * (1 - gate).

    Attributes:
        lower: B x T x E, the lower layer or the mix of several, as the fusion sees it.
        last: B x T x E.
        gate: B x T x E. A literal one may leave 0 to 1.
    """

    lower: torch.Tensor
    last: torch.Tensor
    gate: torch.Tensor


@dataclass(frozen=True)
class PartAnswer:
    """What the head says about some states, in the window of the model's answer.

    Attributes:
        states: which ones, in words.
        score: the probability of the model's answer.
        own: the best answer.
    """

    states: str
    score: float
    own: Answer


@dataclass(frozen=True)
class FusedAnswer:
    """A model's answer and where it comes from.

    Attributes:
        answer: the model's.
        gate_of_answer, gate_of_context: means over the channels, and the tokens of the answer or of all of the context
            in its window; None without fusion.
        parts: as trained, the last layer alone, the lower ones alone; nothing without fusion.
    """

    answer: Answer
    gate_of_answer: float | None
    gate_of_context: float | None
    parts: list[PartAnswer]


def answer_question(
    model: XLFAForQuestionAnswering, tokenizer: PreTrainedTokenizerBase, question: str, context: str
) -> FusedAnswer:
    """The model's answer, as `xlfa predict` finds it in float32, and what its fusion had to do with it.

    Raises:
        XLFAError: for a context in which the tokenizer finds nothing, or a question that would be cut.
    """
    lengths = input_lengths(None, None, model, TASK)
    columns = {"question": [question], "context": [context]}
    windows = Dataset.from_dict(TASK.encode(columns, range(1), tokenizer, *lengths))
    if cut_questions(windows):
        raise XLFAError(f"the question has more than {MAX_QUESTION_TOKENS} tokens: shorten it")
    # In bfloat16 the parts, of which one window is computed, would not agree with the answer.
    options = InferenceOptions.of(InferenceArguments(bf16=False), model.device)
    readings = infer(model, tokenizer, windows, TASK.read_outputs, options, columns=TASK.read_columns)
    (answer,) = find_answers([context], windows, readings)
    fusion = model.base_model.fusion
    if fusion is None:
        return FusedAnswer(answer, None, None, [])
    # The first of the best, as in `find_answers`.
    best = max(range(len(readings)), key=lambda index: readings[index][0])
    span = tuple(int(position) for position in readings[best][2:])
    return _read_parts(model, tokenizer, context, windows.select([best]), span, answer)


def _read_parts(
    model: XLFAForQuestionAnswering,
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    window: Dataset,
    span: tuple[int, int],
    answer: Answer,
) -> FusedAnswer:
    """`span`: first and last token of the answer, from the first one of the context."""
    names = [name for name in INPUT_NAMES if name in window.column_names]
    inputs = tokenizer.pad({name: window[name][:] for name in names}, return_tensors="pt").to(model.device)
    with torch.inference_mode(), recording(model.base_model.fusion) as recorded:
        outputs = model(**inputs)
        (parts,) = recorded
        by_states = {
            "fused, as trained": outputs,
            f"layer {model.config.num_hidden_layers} (the last) alone": _read(model, parts.last),
            f"{_name(model.base_model.fused_layers)} alone": _read(model, parts.lower),
        }
        columns = {name: window[name][:] for name in TASK.read_columns}
        start, length = (columns[name][0] for name in TASK.read_columns)
        first, last = (start + position for position in span)
        answers = []
        for states, own in by_states.items():
            (found,) = find_answers([context], window, TASK.read_outputs(own, inputs, columns).cpu().numpy())
            answers.append(PartAnswer(states, _span_probability(own, first, last), found))
        gate = parts.gate[0].float().mean(-1)
        means = (gate[tokens].mean().item() for tokens in (slice(first, last + 1), slice(start, start + length)))
        return FusedAnswer(answer, *means, answers)


@contextmanager
def recording(fusion: nn.Module) -> Iterator[list[FusedParts]]:
    """The parts that the fusion adds up in each forward pass, by a hook."""
    recorded: list[FusedParts] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        recorded.append(fused_parts(module, inputs))

    hook = fusion.register_forward_hook(record)
    try:
        yield recorded
    finally:
        hook.remove()


def fused_parts(fusion: nn.Module, inputs: tuple[Any, ...]) -> FusedParts:
    """What a fusion in evaluation mode adds up, from the arguments of its forward pass."""
    if isinstance(fusion, ScalarMix):
        *lower, last = (fusion.gamma * norm(layer) for norm, layer in zip(fusion.norms, inputs[0], strict=True))
        *weights, _ = fusion.weights
        gate = torch.stack(weights).sum()
        mixed = sum(weight / gate * layer for weight, layer in zip(weights, lower))
        return FusedParts(mixed, last, gate.expand(last.shape))
    lower, last, mask, _ = inputs
    lower = fusion.lower_norm(lower) if fusion.lower_mix is None else fusion.lower_mix(lower)
    last = fusion.last_norm(last)
    return FusedParts(lower, last, fusion.gate_weights(lower, last, mask, update_statistics=False))


def _read(model: XLFAForQuestionAnswering, states: torch.Tensor) -> XLFAQuestionAnsweringOutput:
    start_logits, end_logits = model.qa_outputs(states).unbind(-1)
    return XLFAQuestionAnsweringOutput(start_logits=start_logits, end_logits=end_logits)


def _span_probability(outputs: XLFAQuestionAnsweringOutput, first: int, last: int) -> float:
    start, end = (logits[0].float().log_softmax(-1) for logits in (outputs.start_logits, outputs.end_logits))
    return (start[first] + end[last]).exp().item()


def _name(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}, mixed as trained,"
