"""The scoring benchmark's other side: how the example scripts of XTREME and transformers score a model, read plainly.

Written from what those scripts do (run_xnli.py; run_qa.py and its n-best search; XTREME's limit on questions), not
from their code: a language at a time, each with its own load of model and tokenizer; every input padded to the longest
length; batches of 8 in the data set's order; float32; for questions, all logits moved to the CPU and the best span
found by a loop in Python. Two things are in this side's favour: it stays in one process, where the scripts would start,
and import everything, once a language; and it writes nothing to disk, neither tokenised inputs nor predictions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from xlfa.tasks import Prediction, Task

BATCH_SIZE = 8
N_BEST = 20
MAX_ANSWER_TOKENS = 30
MAX_QUESTION_TOKENS = 64
INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
# What run_qa.py answers where the n best starts and ends make no span of the context.
NO_ANSWER = "empty"

# Of each token of a window: its first character and the one past its last in the context; None outside the context.
Offsets = list[tuple[int, int] | None]
# Start logits and end logits of a window's tokens, each T, and their offsets.
Window = tuple[np.ndarray, np.ndarray, Offsets]


@dataclass(frozen=True)
class Scored:
    """What is found in one language.

    Attributes:
        predictions: one an example, in the data set's order.
        windows: how many inputs each of these examples was cut into.
        scores: 0 to 100 by metric, by the task's own metric.
    """

    predictions: list[Prediction]
    windows: list[int]
    scores: dict[str, float | None]


def score_languages(
    task: Task,
    model_folder: str,
    languages: list[str],
    ids: list[str],
    data_root: str,
    max_length: int,
    doc_stride: int,
) -> dict[str, Scored]:
    """The examples `ids` of every language.

    Args:
        model_folder: a trained model with its tokenizer.
        max_length: tokens that every input is padded to.
        doc_stride: tokens that neighbouring windows share.
    """
    found = {}
    for language in tqdm(languages, desc="peers: languages"):
        rows = chosen_rows(task, language, ids, data_root)
        model = task.model_class.from_pretrained(model_folder).to(PartialState().device).eval()
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        if task.label_names:
            predictions = predict_labels(task, model, tokenizer, rows, max_length)
            windows = [1] * len(rows)
        else:
            predictions, windows = predict_answers(task, model, tokenizer, rows, max_length, doc_stride)
        found[language] = Scored(predictions, windows, task.score(predictions, language))
    return found


def chosen_rows(task: Task, language: str, ids: list[str], data_root: str) -> Dataset:
    """The rows with these ids, in the data set's order; their column `id` holds the ids."""
    rows = task.load_test(language, data_root)
    own, wanted = task.example_ids(rows), set(ids)
    positions = [position for position, id in enumerate(own) if id in wanted]
    if "id" not in rows.column_names:
        rows = rows.add_column("id", own)
    return rows.select(positions)


def run_batches(model: PreTrainedModel, inputs: dict[str, list], outputs: tuple[str, ...]) -> list[np.ndarray]:
    """The named outputs for all N inputs, on the CPU: N x ... each.

    Args:
        inputs: by the model's name for them, N lists of one length; others than the model's are not used.
    """
    inputs = {name: inputs[name] for name in INPUT_NAMES if name in inputs}
    parts = []
    for start in tqdm(range(0, len(inputs["input_ids"]), BATCH_SIZE), desc="peers: batches", leave=False):
        batch = {
            name: torch.tensor(values[start : start + BATCH_SIZE], device=model.device)
            for name, values in inputs.items()
        }
        with torch.no_grad():
            found = model(**batch)
        parts.append([found[name].cpu() for name in outputs])
    return [torch.cat(of_one_name).numpy() for of_one_name in zip(*parts)]


def predict_labels(
    task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_length: int
) -> list[Prediction]:
    """The most likely label of each pair of sentences."""
    first, second = (list(rows[column]) for column in task.sentence_columns)
    encoded = tokenizer(first, second, padding="max_length", max_length=max_length, truncation=True)
    (logits,) = run_batches(model, encoded, ("logits",))
    probabilities = softmax(logits)
    return [
        Prediction(id, task.label_names[own.argmax()], task.label_names[label], float(own.max()))
        for id, label, own in zip(rows["id"], rows["label"], probabilities, strict=True)
    ]


def predict_answers(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    max_length: int,
    doc_stride: int,
) -> tuple[list[Prediction], list[int]]:
    """The best span of each question's context, and into how many windows that context was cut."""
    contexts = list(rows["context"])
    encoded = tokenizer(
        cut_questions([question.lstrip() for question in rows["question"]], tokenizer),
        contexts,
        truncation="only_second",
        padding="max_length",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    start_logits, end_logits = run_batches(model, encoded, ("start_logits", "end_logits"))
    windows: list[list[Window]] = [[] for _ in contexts]
    for index, example in enumerate(encoded["overflow_to_sample_mapping"]):
        sequence = encoded.sequence_ids(index)
        offsets = [
            offset if of_sequence == 1 else None
            for offset, of_sequence in zip(encoded["offset_mapping"][index], sequence)
        ]
        windows[example].append((start_logits[index], end_logits[index], offsets))

    predictions = []
    for id, context, answers, own in zip(rows["id"], contexts, rows["answers"], windows, strict=True):
        span = best_span(own)
        text, probability = (NO_ANSWER, 0.0) if span is None else (context[span[0] : span[1]], span[2])
        predictions.append(Prediction(id, text, list(answers["text"]), probability))
    return predictions, [len(own) for own in windows]


def cut_questions(questions: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The beginnings of the questions, of at most `MAX_QUESTION_TOKENS` tokens, as in XTREME."""
    encoded = tokenizer(
        questions,
        add_special_tokens=False,
        truncation=True,
        max_length=MAX_QUESTION_TOKENS,
        return_offsets_mapping=True,
    )
    return [question[: offsets[-1][1]] for question, offsets in zip(questions, encoded["offset_mapping"])]


def best_span(windows: list[Window]) -> tuple[int, int, float] | None:
    """The n-best search of run_qa.py over all windows of one example.

    Only pairs of a window's `N_BEST` highest starts and ends are looked at, wherever these lie, so that a span may be
    missed; the sums of logits are compared across windows as they are, though each window has a scale of its own.

    Returns:
        First character, the one past the last, and the probability among the `N_BEST` best spans; None where no pair
        makes a span of the context.
    """
    found: list[tuple[float, int, int]] = []
    for start_logits, end_logits, offsets in windows:
        starts, ends = (np.argsort(-logits)[:N_BEST].tolist() for logits in (start_logits, end_logits))
        for start in starts:
            for end in ends:
                if offsets[start] is None or offsets[end] is None:
                    continue
                if end < start or end - start >= MAX_ANSWER_TOKENS:
                    continue
                found.append((start_logits[start] + end_logits[end], offsets[start][0], offsets[end][1]))
    if not found:
        return None
    best = sorted(found, key=lambda candidate: candidate[0], reverse=True)[:N_BEST]
    probabilities = softmax(np.array([score for score, _, _ in best]))
    return best[0][1], best[0][2], float(probabilities[0])


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities from scores over the last dimension: ... x k to ... x k."""
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)
