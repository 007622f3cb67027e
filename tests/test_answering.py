"""`xlfa predict`: the same answers as scoring, in the order of the input, in chunks, and one error for bad input."""

import io
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from modeling_xlfa import XLFAForQuestionAnswering, XLFAForSequenceClassification
from xlfa import answering
from xlfa.errors import XLFAError
from xlfa.evaluation import main as evaluate
from xlfa.tasks import get_task

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model(tiny_encoder, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("qa"))
    torch.manual_seed(1)
    XLFAForQuestionAnswering.from_encoder(tiny_encoder, input_length=160, input_stride=32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    return folder


@pytest.fixture
def questions(tmp_path):
    """A file of the sample's German questions, as rows, and its path."""
    rows = [
        {name: row[name] for name in ("id", "question", "context")}
        for row in get_task("xquad").load_test("de", "sample")
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return rows, str(path)


def test_answers_are_those_of_scoring_in_the_order_of_the_file(model, questions, tmp_path, monkeypatch):
    rows, path = questions
    monkeypatch.setattr(answering, "CHUNK", 7)
    answering.main(["--model", model, "--input", path, "--output", str(tmp_path / "answers.jsonl")])
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    evaluate(f"--model {model} --task xquad --languages de --data_root sample --output_dir {tmp_path}".split())
    scored = [json.loads(line) for line in (tmp_path / "predictions" / "de.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [row["id"] for row in rows]
    for row, answer, prediction in zip(rows, answers, scored, strict=True):
        assert row["context"][answer["start"] : answer["end"]] == answer["answer"] == prediction["prediction"]
        assert answer["score"] == pytest.approx(prediction["score"], rel=0.05)


def test_rows_are_read_no_further_than_a_chunk_ahead(model, monkeypatch):
    monkeypatch.setattr(answering, "CHUNK", 3)
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield {"id": str(len(read)), "question": "who?", "context": f"anna saw {len(read)} dogs"}

    arguments = answering.AnsweringArguments(model=model, input="-")
    found = answering.answer_rows(*answering.load_model(answering.TASK, model), endless(), arguments)
    for number in range(1, 8):
        row, answer = next(found)
        assert row["id"] == str(number) and answer.text in row["context"]
        assert len(read) == 3 * -(-number // 3)


def test_one_question_is_answered_as_text(model, capsys):
    context = "Anna saw\nthe dog."
    answering.main(["--model", model, "--question", "Who?", "--context", context, "--format", "text"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line and line in context.replace("\n", " ")


def test_the_standard_streams_are_read_and_written(model, monkeypatch, capsys):
    lines = '{"question": "who?", "context": "anna"}\n\n{"id": "ä", "question": "who?", "context": "lee"}\n'
    # With a byte order mark, and another encoding as the locale's.
    stdin = io.TextIOWrapper(io.BytesIO(lines.encode("utf-8-sig")), encoding="latin-1")
    monkeypatch.setattr(sys, "stdin", stdin)
    answering.main(["--model", model, "--input", "-"])
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == ["1", "ä"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no JSON", "questions.jsonl, line 2 is not JSON"),
        ("[1]", "questions.jsonl, line 2 is no JSON object"),
        ("9" * 5000, "questions.jsonl, line 2 is not JSON"),
        ("[" * 100_000, "questions.jsonl, line 2 is not JSON"),
        (r'{"id": "\ud800", "question": "a", "context": "b"}', "line 2: the field 'id' is not valid Unicode"),
        (
            '{"question": "who?"}',
            "questions.jsonl, line 2: the field 'context' must be text that is not empty, not None",
        ),
        ('{"question": " ", "context": "a"}', "line 2: the field 'question' must be text that is not empty"),
        ('{"question": 3, "context": "a"}', "line 2: the field 'question' must be text that is not empty, not 3"),
        (
            r'{"question": "a\ud800", "context": "b"}',
            "line 2: the field 'question' is not valid Unicode at character 1",
        ),
    ],
)
def test_bad_lines_are_named_and_leave_no_output(model, tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "who?", "context": "anna"}\n' + line + "\n")
    with pytest.raises(XLFAError) as error:
        answering.main(["--model", model, "--input", str(path), "--output", str(tmp_path / "answers.jsonl")])
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "/nowhere.jsonl"], "--input /nowhere.jsonl: no such file"),
        (["--question", "who?"], "give either --question with its --context, or --input"),
        (["--question", "who?", "--context", " "], "the command line: the field 'context'"),
        ([], "give either --question"),
        (["--input", "-", "--max_length", "50"], "--max_length 50 leaves no room for a context"),
        (["--input", "-", "--max_length", "-1"], "--max_length -1: at least 1"),
        (["--input", "-", "--doc_stride", "-1"], "--doc_stride -1: at least 0"),
        (["--input", "a.jsonl", "--output", "./a.jsonl"], "--output ./a.jsonl is the file that is read"),
    ],
)
def test_bad_arguments_are_named(model, monkeypatch, flags, message):
    stdin = io.TextIOWrapper(io.BytesIO(b'{"question": "who?", "context": "anna"}\n'))
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(XLFAError) as error:
        answering.main(["--model", model, *flags])
    assert message in str(error.value)


def test_a_question_that_is_cut_is_named(model, tmp_path, capsys, caplog):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"id": "short", "question": "who?", "context": "a"},
        {"id": "long", "question": "who " * 65, "context": "a"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answering.main(["--model", model, "--input", str(path)])
    assert [record.message for record in caplog.records if "cut" in record.message] == [
        "question long is cut to its first 64 tokens"
    ]


def test_another_head_is_refused(tiny_encoder, tmp_path):
    XLFAForSequenceClassification.from_encoder(tiny_encoder).save_pretrained(tmp_path)
    with pytest.raises(XLFAError, match="needs XLFAForQuestionAnswering"):
        answering.main(["--model", str(tmp_path), "--question", "who?", "--context", "anna"])


@pytest.mark.full
def test_memory_does_not_grow_with_the_file(model, tmp_path):
    """Peak memory of 40,000 questions is that of 4,000, but for a tenth."""
    script = (
        "import resource, sys; from xlfa.answering import main; main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    peaks = []
    for count in (4_000, 40_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text('{"question": "who saw it?", "context": "anna saw the dog and lee saw the sun"}\n' * count)
        command = [
            sys.executable,
            "-c",
            script,
            "--model",
            model,
            "--input",
            str(path),
            "--output",
            str(tmp_path / "out"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stderr.splitlines()[-1]))
        assert len((tmp_path / "out").read_text().splitlines()) == count
    assert peaks[1] < 1.1 * peaks[0]
