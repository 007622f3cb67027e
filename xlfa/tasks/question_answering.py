"""Extractive question answering (XQuAD, MLQA, TyDiQA): windows over long contexts, and the best span back from them."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import evaluate
import numpy as np
import torch
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from modeling_xlfa import XLFAForQuestionAnswering
from xlfa.errors import XLFAError
from xlfa.metrics.extractive_qa import question_scores
from xlfa.tasks.task import Prediction, Task

EXTRACTIVE_QA = Path(__file__).parent.parent / "metrics" / "extractive_qa.py"
# XTREME's limits, in tokens.
MAX_QUESTION_TOKENS = 64
MAX_ANSWER_TOKENS = 30


@dataclass(frozen=True)
class Answer:
    """What a model answers.

    Attributes:
        text: a part of the context, without space at its ends.
        start, end: where it stands there, in characters; `end` is past the last.
        score: the probability of its first and last token in the window it is from.
    """

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, kw_only=True)
class QuestionAnsweringTask(Task):
    """An answer is a span of the context; every question has one (SQuAD v1.1)."""

    metrics: tuple[str, ...] = ("f1", "exact_match", "f1_mlqa", "exact_match_mlqa")
    columns: tuple[str, ...] = ("id", "context", "question", "answers")
    group_columns: tuple[str, ...] = ("context",)
    cut_unit: ClassVar[str] = f"questions are cut to {MAX_QUESTION_TOKENS} tokens"
    read_columns: ClassVar[tuple[str, ...]] = ("context_start", "context_length")

    @property
    def model_class(self) -> type:
        return XLFAForQuestionAnswering

    def texts(self, rows: Dataset) -> list[str]:
        return list(dict.fromkeys(rows["context"][:])) + rows["question"][:]

    def check_rows(self, rows: Dataset, place: str) -> None:
        columns = [rows[column][:] for column in ("context", "question", "answers")]
        for position, (context, question, answers) in enumerate(zip(*columns)):
            if not (context or "").strip() or not (question or "").strip():
                raise XLFAError(f"{place}: row {position} has an empty context or question")
            if not answers["text"]:
                raise XLFAError(f"{place}: row {position} has no answer; SQuAD v1.1 has one for every question")

    def encode(
        self,
        batch: dict[str, list],
        positions: list[int],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        doc_stride: int,
    ) -> dict[str, list]:
        """Windows over the contexts: `doc_stride` tokens of each are in the next one too.

        The context stands in a window from token `context_start` on; `first_characters` and `past_characters` say for
        each of its tokens there where in the context it begins and ends.

        Raises:
            XLFAError: for a `max_length` without room for a context, and a context without a single token.
        """
        questions, cut = _cut_questions([question.lstrip() for question in batch["question"]], tokenizer)
        room = max_length - MAX_QUESTION_TOKENS - tokenizer.num_special_tokens_to_add(pair=True)
        if room <= 0:
            raise XLFAError(
                f"--max_length {max_length} leaves no room for a context beside a question of "
                f"{MAX_QUESTION_TOKENS} tokens"
            )
        encoded = tokenizer(
            questions,
            batch["context"],
            truncation="only_second",
            max_length=max_length,
            # The tokenizer refuses a stride that is longer than the room a long question leaves.
            stride=min(doc_stride, room - 1),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        examples, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        windows: dict[str, list] = {name: values for name, values in encoded.items()}
        windows["length"] = [len(ids) for ids in encoded["input_ids"]]
        windows["example"] = [positions[example] for example in examples]
        # An example's first window counts it.
        windows["cut"] = [
            int(example in cut and (index == 0 or examples[index - 1] != example))
            for index, example in enumerate(examples)
        ]
        spans = [_context_span(encoded.sequence_ids(index)) for index in range(len(examples))]
        if None in spans:
            number = examples[spans.index(None)]
            raise XLFAError(
                f"the model's tokenizer has no piece for any character of {batch['context'][number][:40]!r}, the "
                f"context of the question {batch['question'][number][:40]!r}: leave this question out"
            )
        windows["context_start"] = [first for first, _ in spans]
        windows["context_length"] = [past - first for first, past in spans]
        for name, side in (("first_characters", 0), ("past_characters", 1)):
            windows[name] = [
                [characters[side] for characters in each[first:past]] for each, (first, past) in zip(offsets, spans)
            ]
        return windows

    def training_features(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
    ) -> Dataset:
        windows = self.windows(rows, tokenizer, max_length, doc_stride)
        contexts, answers = rows["context"][:], rows["answers"][:]
        positions: dict[str, list[int]] = {"start_positions": [], "end_positions": []}
        read = ["example", "context_start", "first_characters", "past_characters"]
        for window in windows.select_columns(read):
            answer = answers[window["example"]]
            start_char = answer["answer_start"][0]
            end_char = start_char + len(answer["text"][0])
            if contexts[window["example"]][start_char:end_char] != answer["text"][0]:
                raise XLFAError(
                    f"training row {window['example']}: the answer {answer['text'][0]!r} does not stand at character "
                    f"{start_char} of its context"
                )
            span = answer_tokens(window["first_characters"], window["past_characters"], start_char, end_char)
            # As in the field: where the window does not hold the answer, both positions point at the first token.
            start, end = (0, 0) if span is None else (position + window["context_start"] for position in span)
            positions["start_positions"].append(start)
            positions["end_positions"].append(end)
        features = windows.remove_columns([*read, "context_length", "cut"])
        for name, values in positions.items():
            features = features.add_column(name, values)
        return features

    def read_outputs(self, outputs: ModelOutput, inputs: BatchEncoding, columns: dict[str, list[int]]) -> torch.Tensor:
        """Each window's best span: sum of its logits, log probability inside the window, first and last token, B x 4.

        Tokens are counted from the first one of the context.
        """
        device = outputs.start_logits.device
        first, count = (torch.tensor(columns[name], device=device).unsqueeze(1) for name in self.read_columns)
        positions = torch.arange(outputs.start_logits.shape[1], device=device)
        outside = (positions < first) | (positions >= first + count)
        # Padding is no token of the window: without this the probabilities would depend on the batch.
        padding = inputs["attention_mask"] == 0
        start_logits = outputs.start_logits.float().masked_fill(padding, -torch.inf)
        end_logits = outputs.end_logits.float().masked_fill(padding, -torch.inf)
        scores, starts, ends = best_spans(start_logits, end_logits, outside)
        log_probabilities = scores - start_logits.logsumexp(-1) - end_logits.logsumexp(-1)
        first = first.squeeze(1)
        return torch.stack([scores, log_probabilities, (starts - first).float(), (ends - first).float()], dim=-1)

    def predictions(
        self, rows: Dataset, ids: list[str], windows: Dataset, readings: list[np.ndarray]
    ) -> list[Prediction]:
        found = find_answers(rows["context"][:], windows, readings)
        return [
            Prediction(id, answer.text, list(right["text"]), answer.score)
            for id, answer, right in zip(ids, found, rows["answers"], strict=True)
        ]

    def score(self, predictions: list[Prediction], language: str) -> dict[str, float | None]:
        result = _extractive_qa().compute(
            predictions=[row.prediction for row in predictions],
            references=[row.label for row in predictions],
            language=language,
        )
        return {name: result[name] for name in self.metrics}

    def contributions(self, predictions: list[Prediction], language: str) -> dict[str, np.ndarray]:
        found = question_scores([row.prediction for row in predictions], [row.label for row in predictions], language)
        return {
            name: np.stack([found[name], np.ones(len(predictions))], axis=1) for name in self.metrics if name in found
        }


def find_answers(contexts: list[str], windows: Dataset, readings: list[np.ndarray]) -> list[Answer]:
    """The answer of each context: of its windows' best spans, the one with the highest sum of logits, as in the field.

    Args:
        windows: of `QuestionAnsweringTask.encode`, at least one a context.
        readings: of each window, by `QuestionAnsweringTask.read_outputs`.
    """
    best: dict[int, int] = {}
    for index, example in enumerate(windows["example"]):
        if example not in best or readings[index][0] > readings[best[example]][0]:
            best[example] = index
    chosen = [best[position] for position in range(len(contexts))]
    spans = windows.select_columns(["first_characters", "past_characters"]).select(chosen).with_format("numpy")
    answers = []
    for context, index, span in zip(contexts, chosen, spans, strict=True):
        _, log_probability, first, last = readings[index].tolist()
        start, end = int(span["first_characters"][int(first)]), int(span["past_characters"][int(last)])
        text = context[start:end]
        start += len(text) - len(text.lstrip())
        answers.append(Answer(text.strip(), start, start + len(text.strip()), math.exp(log_probability)))
    return answers


def answer_tokens(
    first_characters: list[int], past_characters: list[int], start_char: int, end_char: int
) -> tuple[int, int] | None:
    """First and last token that the characters [start_char, end_char) touch; None if the window lacks some."""
    if first_characters[0] > start_char or past_characters[-1] < end_char:
        return None
    start = next(index for index, past in enumerate(past_characters) if past > start_char)
    end = next(index for index in range(len(first_characters) - 1, -1, -1) if first_characters[index] < end_char)
    return start, max(start, end)


def _context_span(sequence_ids: list[int | None]) -> tuple[int, int] | None:
    """First token of the second sequence, and the one after its last; None where it has no token."""
    if 1 not in sequence_ids:
        return None
    return sequence_ids.index(1), len(sequence_ids) - sequence_ids[::-1].index(1)


def best_spans(
    start_logits: torch.Tensor, end_logits: torch.Tensor, outside: torch.Tensor, max_length: int = MAX_ANSWER_TOKENS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best span of each window over all pairs start <= end < start + max_length, not an n-best heuristic.

    Args:
        start_logits, end_logits: B x T.
        outside: B x T, true where no answer may stand (question, special tokens, padding).
        max_length: longest span in tokens.

    Returns:
        Sum of the two logits, first and last token, each B.
    """
    length = start_logits.shape[1]
    start_scores, end_scores = (logits.masked_fill(outside, -torch.inf) for logits in (start_logits, end_logits))
    # Row d holds the spans of d + 1 tokens: B x max_length x T instead of B x T x T.
    padded = torch.nn.functional.pad(end_scores, (0, max_length - 1), value=-torch.inf)
    spans = start_scores.unsqueeze(1) + padded.unfold(1, length, 1)
    scores, flat = spans.flatten(1).max(-1)
    starts = flat % length
    return scores, starts, starts + flat // length


def cut_questions(windows: Dataset) -> list[int]:
    """Of the windows that `encode` makes, the positions of the examples whose question lost its end."""
    return [example for example, cut in zip(windows["example"], windows["cut"]) if cut]


def _cut_questions(questions: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[int]]:
    """Questions of at most `MAX_QUESTION_TOKENS` tokens, and the indices of those that lost their end."""
    offsets = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    cut = [index for index, pieces in enumerate(offsets) if len(pieces) > MAX_QUESTION_TOKENS]
    questions = list(questions)
    for index in cut:
        questions[index] = questions[index][: offsets[index][MAX_QUESTION_TOKENS - 1][1]]
    return questions, cut


@functools.cache
def _extractive_qa() -> evaluate.EvaluationModule:
    return evaluate.load(str(EXTRACTIVE_QA))
