"""Answers to questions by a trained model: the predictor that transformers 5 no longer has as a pipeline.

Questions are read, answered and written in chunks, so that a file of any size takes the same memory.
"""

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import IO, Any

from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xlfa.alignment.words import check_text
from xlfa.arguments import InferenceArguments, option, parse_arguments
from xlfa.cli import start_logging
from xlfa.errors import XLFAError
from xlfa.evaluation import input_lengths, load_model
from xlfa.files import STANDARD_STREAM, check_output, naming_output, replacing
from xlfa.inference import InferenceOptions, infer
from xlfa.tasks import get_task
from xlfa.tasks.question_answering import (
    MAX_QUESTION_TOKENS,
    Answer,
    QuestionAnsweringTask,
    cut_questions,
    find_answers,
)

logger = logging.getLogger(__name__)

# Of the tasks with this head any will do: they read questions alike.
TASK: QuestionAnsweringTask = get_task("xquad")
# Enough for full batches of similar length.
CHUNK = 1024
DESCRIPTION = (
    "Answer questions about contexts in any language with a trained question-answering model: one question by "
    "--question and --context, or many from a JSON-lines file with the fields question, context and, if wanted, id."
)
EXAMPLES = """examples:
  xlfa predict --model runs/xquad --question "Who sleeps?" --context "The cat sleeps on the mat."
  xlfa predict --model runs/xquad --input questions.jsonl --output answers.jsonl
"""


@dataclass(kw_only=True)
class AnsweringArguments(InferenceArguments):
    """What is answered, by which model, and how it is written."""

    model: str = field(metadata={"help": "Trained XLFA model with a question-answering head: a folder or a Hub id."})
    question: str | None = option("A question.")
    context: str | None = option("The text that it is about.")
    input: str | None = option("JSON-lines file of questions; - reads the standard input.")
    output: str = option(
        "File for the answers, in the order of the questions; - (default) is the standard output.", "-"
    )
    format: str = field(
        default="json",
        metadata={
            "help": "json: one object a line with id, answer, start and end (characters) and score; text: the answer "
            "alone, its line breaks as spaces.",
            "choices": ["json", "text"],
        },
    )
    max_length: int | None = option("Longest input in tokens; by default as in training.")
    doc_stride: int | None = option("Tokens that neighbouring windows share; by default as in training.")

    def __post_init__(self):
        super().__post_init__()
        if (self.input is None) == (self.question is None) or (self.question is None) != (self.context is None):
            raise ValueError("give either --question with its --context, or --input with a JSON-lines file")
        check_output(self.output, self.input)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `xlfa predict`."""
    (arguments,) = parse_arguments(
        [AnsweringArguments], sys.argv[1:] if argv is None else argv, "xlfa predict", DESCRIPTION, EXAMPLES
    )
    start_logging(logging.WARNING)
    model, tokenizer = load_model(TASK, arguments.model)
    model.to(PartialState().device)
    with reading(arguments) as rows, writing(arguments.output) as output:
        for row, answer in answer_rows(model, tokenizer, rows, arguments):
            output.write(format_answer(row["id"], answer, arguments.format) + "\n")


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[dict[str, Any]],
    arguments: AnsweringArguments,
) -> Iterator[tuple[dict[str, Any], Answer]]:
    """Each row, with its `question` and `context`, and its answer, in order; `CHUNK` rows are in memory at a time."""
    max_length, doc_stride = input_lengths(arguments.max_length, arguments.doc_stride, model, TASK)
    options = InferenceOptions.of(arguments, model.device)
    rows = iter(rows)
    with tqdm(desc="questions", disable=arguments.input is None) as bar:
        while chunk := list(islice(rows, CHUNK)):
            columns = {name: [row[name] for row in chunk] for name in ("question", "context")}
            windows = Dataset.from_dict(TASK.encode(columns, range(len(chunk)), tokenizer, max_length, doc_stride))
            for example in cut_questions(windows):
                logger.warning("question %s is cut to its first %d tokens", chunk[example]["id"], MAX_QUESTION_TOKENS)
            readings = infer(model, tokenizer, windows, TASK.read_outputs, options, columns=TASK.read_columns)
            yield from zip(chunk, find_answers(columns["context"], windows, readings))
            bar.update(len(chunk))


@contextmanager
def reading(arguments: AnsweringArguments) -> Iterator[Iterator[dict[str, Any]]]:
    """The rows to answer, read line by line.

    Raises:
        XLFAError: for a file that cannot be read; while rows are read, for a line that is no question.
    """
    if arguments.input is None:
        row = {"id": "0", "question": arguments.question, "context": arguments.context}
        yield iter([check_row(row, "the command line")])
    elif arguments.input == STANDARD_STREAM:
        yield read_lines(TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig"), "the standard input")
    else:
        if not Path(arguments.input).exists() or Path(arguments.input).is_dir():
            raise XLFAError(f"--input {arguments.input}: no such file")
        # A byte order mark at its beginning is no text.
        with open(arguments.input, encoding="utf-8-sig") as lines:
            yield read_lines(lines, f"--input {arguments.input}")


def read_lines(lines: Iterable[str], place: str) -> Iterator[dict[str, Any]]:
    """The rows of JSON lines; one without an `id` gets the number of its line."""
    try:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise XLFAError(f"{place}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise XLFAError(f"{place}, line {number} is no JSON object with question and context")
            yield check_row({"id": str(number), **row}, f"{place}, line {number}")
    except UnicodeDecodeError as error:
        raise XLFAError(f"{place} is not UTF-8: {error}") from None


def check_row(row: dict[str, Any], place: str) -> dict[str, Any]:
    """The row.

    Raises:
        XLFAError: without a question or a context that is text, and valid Unicode.
    """
    if isinstance(row["id"], str):
        check_text(row["id"], f"{place}: the field 'id'")
    for name in ("question", "context"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise XLFAError(f"{place}: the field {name!r} must be text that is not empty, not {row.get(name)!r}")
        check_text(row[name], f"{place}: the field {name!r}")
    return row


@contextmanager
def writing(path: str) -> Iterator[IO[str]]:
    """A stream for the answers; a file appears when all are written. A pipe or a device is written to as it is.

    Raises:
        XLFAError: for a place that cannot be written to, or a full disk.
    """
    if path == STANDARD_STREAM:
        yield sys.stdout
        return
    file = Path(path)
    with naming_output("output", path):
        place = nullcontext(file) if file.exists() and not file.is_file() else replacing(file)
        with place as target, target.open("w", encoding="utf-8") as output:
            yield output


def format_answer(id: str, answer: Answer, format: str) -> str:
    """The line that is written for an answer."""
    if format == "text":
        return " ".join(answer.text.split())
    return json.dumps(
        {"id": id, "answer": answer.text, "start": answer.start, "end": answer.end, "score": answer.score},
        ensure_ascii=False,
    )
