"""Extractive question answering (XQuAD, MLQA, TyDiQA): windows over long contexts, and the best span back from them."""

import functools
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from modeling_xlfa import XLFAForQuestionAnswering
from xlfa.errors import XLFAError
from xlfa.metrics.extractive_qa import question_scores
from xlfa.tasks.task import Prediction, Task

logger = logging.getLogger(__name__)

EXTRACTIVE_QA = Path(__file__).parent.parent / "metrics" / "extractive_qa.py"
# XTREME's limits, in tokens.
MAX_QUESTION_TOKENS = 64
MAX_ANSWER_TOKENS = 30


@dataclass(frozen=True, kw_only=True)
class QuestionAnsweringTask(Task):
    """An answer is a span of the context; every question has one (SQuAD v1.1)."""

    metrics: tuple[str, ...] = ("f1", "exact_match", "f1_mlqa", "exact_match_mlqa")
    columns: tuple[str, ...] = ("id", "context", "question", "answers")
    group_columns: tuple[str, ...] = ("context",)

    @property
    def model_class(self) -> type:
        return XLFAForQuestionAnswering

    def texts(self, rows: Dataset) -> list[str]:
        return list(dict.fromkeys(rows["context"])) + list(rows["question"])

    def check_rows(self, rows: Dataset, place: str) -> None:
        for position, row in enumerate(rows):
            if not (row["context"] or "").strip() or not (row["question"] or "").strip():
                raise XLFAError(f"{place}: row {position} has an empty context or question")
            if not row["answers"]["text"]:
                raise XLFAError(f"{place}: row {position} has no answer; SQuAD v1.1 has one for every question")

    def _encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
    ) -> list[dict[str, Any]]:
        """Windows over the contexts: `doc_stride` tokens of each are in the next one too."""
        questions = _cut_questions([question.lstrip() for question in rows["question"]], tokenizer)
        room = max_length - MAX_QUESTION_TOKENS - tokenizer.num_special_tokens_to_add(pair=True)
        if room <= 0:
            raise XLFAError(
                f"--max_length {max_length} leaves no room for a context beside a question of "
                f"{MAX_QUESTION_TOKENS} tokens"
            )
        encoded = tokenizer(
            questions,
            list(rows["context"]),
            truncation="only_second",
            max_length=max_length,
            # The tokenizer refuses a stride that is longer than the room a long question leaves.
            stride=min(doc_stride, room - 1),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        names = [name for name in encoded if name not in ("overflow_to_sample_mapping", "offset_mapping")]
        windows = []
        for index, example in enumerate(encoded["overflow_to_sample_mapping"]):
            sequence = encoded.sequence_ids(index)
            first = sequence.index(1)
            last = len(sequence) - 1 - sequence[::-1].index(1)
            windows.append(
                {
                    "example": example,
                    **{name: encoded[name][index] for name in names},
                    "context_start": first,
                    "context_offsets": encoded["offset_mapping"][index][first : last + 1],
                }
            )
        return windows

    def training_features(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
    ) -> Dataset:
        windows = self._encode(rows, tokenizer, max_length, doc_stride)
        contexts, answers = rows["context"], rows["answers"]
        for window in windows:
            answer = answers[window["example"]]
            start_char = answer["answer_start"][0]
            end_char = start_char + len(answer["text"][0])
            if contexts[window["example"]][start_char:end_char] != answer["text"][0]:
                raise XLFAError(
                    f"training row {window['example']}: the answer {answer['text'][0]!r} does not stand at character "
                    f"{start_char} of its context"
                )
            span = answer_tokens(window["context_offsets"], start_char, end_char)
            # As in the field: where the window does not hold the answer, both positions point at the first token.
            start, end = (0, 0) if span is None else (position + window["context_start"] for position in span)
            window["start_positions"], window["end_positions"] = start, end
        names = [name for name in windows[0] if name not in ("example", "context_start", "context_offsets")]
        return Dataset.from_dict({name: [window[name] for window in windows] for name in names})

    def scoring_windows(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
    ) -> list[dict[str, Any]]:
        return self._encode(rows, tokenizer, max_length, doc_stride)

    def read_outputs(self, outputs: ModelOutput, windows: list[dict[str, Any]]) -> list[Any]:
        """(log probability inside the window, first character, past the last character) of each window's best span."""
        device = outputs.start_logits.device
        length = outputs.start_logits.shape[1]
        first = torch.tensor([window["context_start"] for window in windows], device=device).unsqueeze(1)
        count = torch.tensor([len(window["context_offsets"]) for window in windows], device=device).unsqueeze(1)
        positions = torch.arange(length, device=device)
        outside = (positions < first) | (positions >= first + count)
        # Padding is no token of the window: without this the probabilities would depend on the batch.
        padding = positions >= torch.tensor([len(window["input_ids"]) for window in windows], device=device).unsqueeze(
            1
        )
        start_logits = outputs.start_logits.float().masked_fill(padding, -torch.inf)
        end_logits = outputs.end_logits.float().masked_fill(padding, -torch.inf)
        scores, starts, ends = best_spans(start_logits, end_logits, outside)
        readings = []
        for window, score, start, end in zip(windows, scores.tolist(), starts.tolist(), ends.tolist()):
            offsets = window["context_offsets"]
            readings.append(
                (score, offsets[start - window["context_start"]][0], offsets[end - window["context_start"]][1])
            )
        return readings

    def predictions(
        self, rows: Dataset, ids: list[str], windows: list[dict[str, Any]], readings: list[Any]
    ) -> list[Prediction]:
        best: dict[int, tuple[float, int, int]] = {}
        for window, reading in zip(windows, readings, strict=True):
            example = window["example"]
            if example not in best or reading[0] > best[example][0]:
                best[example] = reading
        contexts, answers = rows["context"], rows["answers"]
        predictions = []
        for position, id in enumerate(ids):
            score, start, end = best[position]
            text = contexts[position][start:end].strip()
            predictions.append(Prediction(id, text, list(answers[position]["text"]), math.exp(score)))
        return predictions

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


def answer_tokens(offsets: list[tuple[int, int]], start_char: int, end_char: int) -> tuple[int, int] | None:
    """First and last token that the characters [start_char, end_char) touch; None if the window lacks some."""
    if offsets[0][0] > start_char or offsets[-1][1] < end_char:
        return None
    start = next(index for index, (_, past) in enumerate(offsets) if past > start_char)
    end = next(index for index in range(len(offsets) - 1, -1, -1) if offsets[index][0] < end_char)
    return start, max(start, end)


def best_spans(
    start_logits: torch.Tensor, end_logits: torch.Tensor, outside: torch.Tensor, max_length: int = MAX_ANSWER_TOKENS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best span of each window over all pairs start <= end < start + max_length, not an n-best heuristic.

    Args:
        start_logits, end_logits: B x T.
        outside: B x T, true where no answer may stand (question, special tokens, padding).
        max_length: longest span in tokens.

    Returns:
        Log probability, first and last token, each B. The probability is over all tokens of the window, so that windows
        whose answer lies elsewhere, and point at their first token, compare low.
    """
    length = start_logits.shape[1]
    start_scores = start_logits.log_softmax(-1).masked_fill(outside, -torch.inf)
    end_scores = end_logits.log_softmax(-1).masked_fill(outside, -torch.inf)
    # Row d holds the spans of d + 1 tokens: B x max_length x T instead of B x T x T.
    padded = torch.nn.functional.pad(end_scores, (0, max_length - 1), value=-torch.inf)
    spans = start_scores.unsqueeze(1) + padded.unfold(1, length, 1)
    scores, flat = spans.flatten(1).max(-1)
    starts = flat % length
    return scores, starts, starts + flat // length


def _cut_questions(questions: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Questions of at most `MAX_QUESTION_TOKENS` tokens; longer ones lose their end, which is logged."""
    offsets = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    cut = [index for index, pieces in enumerate(offsets) if len(pieces) > MAX_QUESTION_TOKENS]
    if cut:
        logger.warning("%d questions are cut to %d tokens", len(cut), MAX_QUESTION_TOKENS)
    questions = list(questions)
    for index in cut:
        questions[index] = questions[index][: offsets[index][MAX_QUESTION_TOKENS - 1][1]]
    return questions


@functools.cache
def _extractive_qa() -> evaluate.EvaluationModule:
    return evaluate.load(str(EXTRACTIVE_QA))
