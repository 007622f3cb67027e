"""Windows cover the whole context, spans are found exactly, and answers come back as they stand in the text."""

import itertools
import json
import math
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from datasets import Dataset, Features, List, Value
from transformers import AutoTokenizer

from modeling_xlfa import XLFAForQuestionAnswering
from xlfa.backbones import resolve_encoder
from xlfa.errors import XLFAError
from xlfa.evaluation import EvaluationArguments, evaluate_model
from xlfa.scores import SCORES_SCHEMA
from xlfa.tasks import Prediction, get_task
from xlfa.tasks.question_answering import MAX_QUESTION_TOKENS, answer_tokens, best_spans

TASK, MLQA, TYDIQA = get_task("xquad"), get_task("mlqa"), get_task("tydiqa")
MAX_LENGTH, STRIDE = 100, 8
CONTEXT = " ".join(f"word{number}" for number in range(60))
OFFSETS = [(0, 3), (4, 7), (7, 9), (10, 14)]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def tokenizer(tiny_encoder):
    """One token a character that is no space."""
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture(scope="module")
def packaged_tokenizer():
    return AutoTokenizer.from_pretrained(resolve_encoder("packaged:multilingual-e5-small"))


def question_rows(context, answers, question="which one?"):
    rows = []
    for number, (text, start) in enumerate(answers):
        answer = {"text": [text], "answer_start": [start]}
        rows.append({"id": str(number), "context": context, "question": question, "answers": answer})
    return Dataset.from_list(rows)


def logits_at(windows, spans, peak=20.0):
    """Outputs of a model that is sure of the token span of each window; None points at the first token."""
    length = max(len(window["input_ids"]) for window in windows)
    start, end = torch.zeros(len(windows), length), torch.zeros(len(windows), length)
    for row, (window, span) in enumerate(zip(windows, spans)):
        first, last = (0, 0) if span is None else (window["context_start"] + index for index in span)
        start[row, first] = end[row, last] = peak
    return SimpleNamespace(start_logits=start, end_logits=end)


def offsets_of(window):
    """(first, past the last) character of each context token."""
    return list(zip(window["first_characters"], window["past_characters"]))


def read(outputs, windows):
    """What is kept of these outputs as one batch."""
    width = outputs.start_logits.shape[1]
    mask = torch.stack([(torch.arange(width) < length).long() for length in windows["length"]])
    columns = {name: windows[name][:] for name in TASK.read_columns}
    return TASK.read_outputs(outputs, {"attention_mask": mask}, columns).numpy()


def test_windows_cover_the_context_and_neighbours_share_the_stride(tokenizer):
    windows = TASK.windows(question_rows(CONTEXT, [("word0", 0)]), tokenizer, MAX_LENGTH, STRIDE)
    assert len(windows) > 2
    covered = {place for window in windows for offsets in offsets_of(window) for place in range(*offsets)}
    assert covered == {place for place, character in enumerate(CONTEXT) if character != " "}
    for one, following in itertools.pairwise(windows):
        assert offsets_of(one)[-STRIDE:] == offsets_of(following)[:STRIDE]


def test_context_offsets_belong_to_the_tokens_at_context_start(tokenizer):
    for window in TASK.windows(question_rows(CONTEXT, [("word0", 0)]), tokenizer, MAX_LENGTH, STRIDE):
        assert len(window["input_ids"]) <= MAX_LENGTH
        first = window["context_start"]
        ids = window["input_ids"][first : first + window["context_length"]]
        assert tokenizer.convert_ids_to_tokens(ids) == [CONTEXT[slice(*place)] for place in offsets_of(window)]


def test_every_example_has_its_own_windows(tokenizer):
    rows = [*question_rows(CONTEXT, [("word0", 0)]), *question_rows("short text", [("text", 6)])]
    windows = TASK.windows(Dataset.from_list(rows), tokenizer, MAX_LENGTH, STRIDE)
    examples = [window["example"] for window in windows]
    assert examples == [0] * (len(windows) - 1) + [1]


def test_a_long_question_is_cut_and_leaves_room_for_the_context(tokenizer):
    rows = question_rows(CONTEXT, [("word0", 0)], question="  " + "why " * 100)
    for window in TASK.windows(rows, tokenizer, MAX_LENGTH, 90):
        assert window["context_start"] == MAX_QUESTION_TOKENS + 2
        assert len(window["input_ids"]) <= MAX_LENGTH


def test_a_context_without_a_token_is_refused(tokenizer):
    rows = question_rows(CONTEXT, [("word0", 0), ("word0", 0)]).to_dict()
    rows["context"][1] = " "
    with pytest.raises(XLFAError, match="no piece for any character of ' ', the context"):
        TASK.encode(rows, range(2), tokenizer, MAX_LENGTH, STRIDE)


def test_a_limit_without_room_for_a_context_is_refused(tokenizer):
    with pytest.raises(XLFAError, match="--max_length 67 leaves no room"):
        TASK.windows(question_rows(CONTEXT, [("word0", 0)]), tokenizer, 67, STRIDE)


@pytest.mark.parametrize(
    ("characters", "tokens"),
    [((0, 3), (0, 0)), ((4, 9), (1, 2)), ((0, 14), (0, 3)), ((5, 8), (1, 2)), ((11, 12), (3, 3)), ((3, 7), (1, 1))],
)
def test_an_answer_inside_the_window_is_the_tokens_it_touches(characters, tokens):
    assert answer_tokens(*zip(*OFFSETS), *characters) == tokens


@pytest.mark.parametrize("characters", [(20, 22), (13, 15), (14, 15)])
def test_an_answer_that_ends_behind_the_window_is_not_in_it(characters):
    assert answer_tokens(*zip(*OFFSETS), *characters) is None


@pytest.mark.parametrize("characters", [(0, 2), (3, 5), (2, 9)])
def test_an_answer_that_begins_before_the_window_is_not_in_it(characters):
    assert answer_tokens(*zip(*OFFSETS[1:]), *characters) is None


def test_training_positions_are_the_answer_or_the_first_token(tokenizer):
    start = CONTEXT.index("word30")
    features = TASK.training_features(question_rows(CONTEXT, [("word30", start)]), tokenizer, MAX_LENGTH, STRIDE)
    found = 0
    for feature in features:
        span = slice(feature["start_positions"], feature["end_positions"] + 1)
        text = "".join(tokenizer.convert_ids_to_tokens(feature["input_ids"][span]))
        assert text in ("word30", "[CLS]")
        found += text == "word30"
    assert 1 <= found < len(features)
    model_inputs = {"input_ids", "attention_mask", "token_type_ids", "length", "start_positions", "end_positions"}
    assert set(features.column_names) <= model_inputs


def test_a_training_answer_that_does_not_stand_at_its_place_is_refused(tokenizer):
    rows = question_rows(CONTEXT, [("word0", 0), ("word3", 17)])
    with pytest.raises(XLFAError, match="row 1: the answer 'word3' does not stand at character 17"):
        TASK.training_features(rows, tokenizer, MAX_LENGTH, STRIDE)


@pytest.mark.parametrize("max_length", [1, 3, 30])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_span_is_that_of_a_search_over_all_spans(max_length, seed):
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(6, 17, generator=generator), torch.randn(6, 17, generator=generator)
    outside = torch.rand(6, 17, generator=generator) < 0.4
    outside[:, 8] = False
    scores, starts, ends = best_spans(start, end, outside, max_length)
    for row in range(6):
        spans = [
            (float(start[row, first] + end[row, last]), first, last)
            for first in range(17)
            for last in range(first, min(17, first + max_length))
            if not outside[row, first] and not outside[row, last]
        ]
        best = max(spans)
        assert (int(starts[row]), int(ends[row])) == best[1:]
        assert float(scores[row]) == pytest.approx(best[0], abs=1e-5)


def test_no_span_is_found_in_the_question_or_behind_the_context(tokenizer):
    windows = TASK.windows(question_rows("short text", [("text", 6)]), tokenizer, MAX_LENGTH, STRIDE)
    outputs = logits_at(windows, [None])
    for logits in (outputs.start_logits, outputs.end_logits):
        logits[0, : windows[0]["context_start"]] = logits[0, -1] = 30.0
    ((_, _, start, end),) = read(outputs, windows)
    assert 0 <= start <= end < windows[0]["context_length"]


def test_the_window_that_is_surest_gives_the_answer(tokenizer):
    start = CONTEXT.index("word50")
    rows = question_rows(CONTEXT, [("word50", start)])
    windows = TASK.windows(rows, tokenizer, MAX_LENGTH, STRIDE)
    spans = [answer_tokens(*zip(*offsets_of(window)), start, start + 6) for window in windows]
    assert None in spans
    (prediction,) = TASK.predictions(rows, ["q"], windows, read(logits_at(windows, spans), windows))
    assert prediction == Prediction("q", "word50", ["word50"], pytest.approx(1.0, abs=1e-3))


def test_windows_are_compared_by_the_sum_of_logits_as_in_the_field(tokenizer):
    rows = question_rows(CONTEXT, [("word0", 0)])
    windows = TASK.windows(rows, tokenizer, MAX_LENGTH, STRIDE)
    outputs = logits_at(windows, [(0, 4)] * len(windows), peak=5.0)
    # The second window is less sure of its span, since other tokens are high too, and has the higher sum.
    for logits in (outputs.start_logits, outputs.end_logits):
        logits[1] += 4.0
        logits[1, 0] += 5.0
    (prediction,) = TASK.predictions(rows, ["q"], windows, read(outputs, windows))
    span = slice(windows[1]["first_characters"][0], windows[1]["past_characters"][4])
    assert prediction.prediction == CONTEXT[span].strip() and prediction.score < math.exp(read(outputs, windows)[0][1])


def test_the_score_is_the_probability_of_start_and_end(tokenizer):
    rows = question_rows("ab", [("a", 0)], question="c")
    windows = TASK.windows(rows, tokenizer, MAX_LENGTH, STRIDE)
    outputs = logits_at(windows, [(0, 1)], peak=1.0)
    share = math.e / (math.e + len(windows[0]["input_ids"]) - 1)
    (prediction,) = TASK.predictions(rows, ["q"], windows, read(outputs, windows))
    assert (prediction.prediction, prediction.score) == ("ab", pytest.approx(share**2))


def test_padding_changes_neither_span_nor_score(tokenizer):
    windows = TASK.windows(question_rows("short text", [("text", 6)]), tokenizer, MAX_LENGTH, STRIDE)
    outputs = logits_at(windows, [(5, 8)], peak=3.0)
    longer = {name: torch.cat([logits, torch.ones(1, 40)], 1) for name, logits in vars(outputs).items()}
    padded = SimpleNamespace(**longer)
    assert read(padded, windows)[0] == pytest.approx(read(outputs, windows)[0])


@pytest.mark.offline
@pytest.mark.parametrize("language", ["th", "ar", "zh", "hi"])
def test_the_exact_answer_comes_back_where_the_logits_point_at_it(packaged_tokenizer, language):
    rows = TASK.load_test(language, "sample")
    windows = TASK.windows(rows, packaged_tokenizer, MAX_LENGTH, 32)
    spans = []
    for window in windows:
        answer = rows[window["example"]]["answers"]
        start, text = answer["answer_start"][0], answer["text"][0]
        spans.append(answer_tokens(*zip(*offsets_of(window)), start, start + len(text)))
    readings = read(logits_at(windows, spans), windows)
    predictions = TASK.predictions(rows, TASK.example_ids(rows), windows, readings)
    # A piece may reach over the answer's edge in scripts without spaces: 1 of 30 in Thai, 2 of 30 in Chinese.
    assert all(row.label[0] in row.prediction for row in predictions)
    assert sum(row.prediction == row.label[0] for row in predictions) >= 28
    assert TASK.score(predictions, language)["f1"] > 90


@pytest.mark.offline
@pytest.mark.parametrize("name", ["tokenizer", "packaged_tokenizer"])
@pytest.mark.parametrize("answer", ["Markt", "Fluss"])
def test_a_byte_order_mark_in_the_context_moves_no_answer(request, name, answer):
    """Files of some data sets have it at their beginning, and so inside what was joined from them."""
    tokenizer = request.getfixturevalue(name)
    context = "\ufeffDer Markt liegt\ufeff am Fluss."
    rows = question_rows(context, [(answer, context.index(answer))])
    (window,) = windows = TASK.windows(rows, tokenizer, MAX_LENGTH, STRIDE)
    span = answer_tokens(*zip(*offsets_of(window)), context.index(answer), context.index(answer) + len(answer))
    (prediction,) = TASK.predictions(rows, ["q"], windows, read(logits_at(windows, [span]), windows))
    assert TASK.score([prediction], "de")["exact_match"] == 100.0
    (feature,) = TASK.training_features(rows, tokenizer, MAX_LENGTH, STRIDE)
    first = window["context_start"]
    assert (feature["start_positions"], feature["end_positions"]) == (first + span[0], first + span[1])


def test_scores_are_those_of_both_normalisers():
    predictions = [Prediction("1", "der Markt", ["Markt"], 0.5)]
    assert TASK.score(predictions, "de")["exact_match_mlqa"] == 100.0
    assert TASK.score(predictions, "th")["exact_match_mlqa"] is None
    assert tuple(TASK.score(predictions, "de")) == TASK.metrics


def test_held_out_contexts_are_not_trained_on_and_do_not_depend_on_the_seed():
    held_out = TASK.load_validation(None, "sample")
    for seed in (0, 1):
        training = TASK.load_training(None, "sample", None, seed)
        assert len(training) + len(held_out) == 176
        assert not set(training["context"]) & set(held_out["context"])
    assert len(set(held_out["context"])) == round(0.1 * 44)


def test_a_question_without_answer_is_named_with_its_row(tmp_path):
    folder = tmp_path / "rajpurkar" / "squad"
    folder.mkdir(parents=True)
    rows = question_rows("ab", [("a", 0), ("b", 1)]).to_list()
    rows[1]["answers"] = {"text": [], "answer_start": []}
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(XLFAError, match="rajpurkar/squad: row 1 has no answer"):
        TASK.load_training(None, str(tmp_path), None, 0)


def test_each_context_once_and_every_question_is_listed_for_the_vocabulary():
    rows = question_rows("some text", [("some", 0), ("text", 5)])
    assert TASK.texts(rows) == ["some text", "which one?", "which one?"]


def test_example_ids_are_those_of_the_data_set():
    assert TASK.example_ids(question_rows("ab", [("a", 0), ("b", 1)])) == ["0", "1"]
    english, thai = (TASK.example_ids(TASK.load_test(code, "sample")) for code in ("en", "th"))
    assert english == thai
    assert english[0] == "sample-00-0"


def test_an_unknown_language_is_named_with_those_that_exist():
    with pytest.raises(XLFAError, match="'xquad' has no language 'fr'; it has: ar, de"):
        TASK.check_languages(["en", "fr"])


def answers_of(texts):
    """Rows in MLQA's and TyDiQA's schema on the Hub, id → text whose first word is the answer."""
    rows = [
        {
            "id": id,
            "title": "Weather",
            "context": text,
            "question": "which one?",
            "answers": {"text": [text.split()[0]], "answer_start": [0]},
        }
        for id, text in texts.items()
    ]
    answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    strings = dict.fromkeys(("id", "title", "context", "question"), Value("string"))
    return Dataset.from_list(rows, Features({**strings, "answers": answers}))


def test_mlqa_is_scored_by_its_own_normaliser_first():
    predictions = [Prediction("1", "der Markt", ["Markt"], 0.5)]
    scores = MLQA.score(predictions, "de")
    assert tuple(scores) == MLQA.metrics == ("f1_mlqa", "exact_match_mlqa", "f1", "exact_match")
    assert (scores["exact_match_mlqa"], scores["exact_match"]) == (100.0, 0.0)


def test_mlqa_has_context_and_question_in_the_same_language(write_mirror):
    configs = {
        "mlqa.de.de": answers_of({"a1": "sonne scheint"}),
        "mlqa.de.en": answers_of({"b1": "rain falls"}),
        "mlqa.en.en": answers_of({"c1": "snow lies"}),
    }
    root = write_mirror("facebook/mlqa", {name: {"test": rows, "validation": rows} for name, rows in configs.items()})
    assert MLQA.check_languages(None, root) == ["de", "en"]
    assert [MLQA.load_test(code, root)["id"][:] for code in ("de", "en")] == [["a1"], ["c1"]]


@pytest.fixture
def tydiqa_root(write_mirror):
    """All languages of a split in one configuration, told apart by their ids."""
    return write_mirror(
        "google-research-datasets/tydiqa",
        {
            "secondary_task": {
                "train": answers_of(
                    {**{f"english-{number}-0": f"rain on day {number}" for number in range(4)}, "korean-9-1": "rain"}
                ),
                "validation": answers_of(
                    {"arabic-1-0": "rain", "english-5-2": "snow", "arabic-2-0": "sun", "swahili-1-1": "wind"}
                ),
            }
        },
    )


def test_tydiqa_rows_are_told_apart_by_language(tydiqa_root):
    found = {code: TYDIQA.load_test(code, tydiqa_root) for code in ("ar", "en", "sw")}
    assert {code: rows["id"][:] for code, rows in found.items()} == {
        "ar": ["arabic-1-0", "arabic-2-0"],
        "en": ["english-5-2"],
        "sw": ["swahili-1-1"],
    }
    with pytest.raises(XLFAError, match=r"tydiqa \(te\): no row has an id that begins with 'telugu-'"):
        TYDIQA.load_test("te", tydiqa_root)


def test_tydiqa_is_trained_in_english_or_on_another_set(tydiqa_root, write_mirror):
    training, held_out = TYDIQA.load_training(None, tydiqa_root, None, 0), TYDIQA.load_validation(None, tydiqa_root)
    assert sorted([*training["id"], *held_out["id"]]) == [f"english-{number}-0" for number in range(4)]
    write_mirror("rajpurkar/squad", {"default": {"train": answers_of({"7": "rain", "8": "snow"})}})
    assert len(TYDIQA.load_training("rajpurkar/squad", tydiqa_root, None, 0)) == 1


@pytest.mark.parametrize(("name", "languages"), [("mlqa", ["de", "en"]), ("tydiqa", ["ar", "en"])])
def test_each_language_is_scored_on_its_own_questions(
    write_mirror, tydiqa_root, tiny_encoder, tmp_path, name, languages
):
    write_mirror(
        "facebook/mlqa",
        {
            "mlqa.de.de": {"test": answers_of({"a": "sonne scheint", "b": "regen"})},
            "mlqa.en.en": {"test": answers_of({"c": "snow lies"})},
        },
    )
    folder = str(tmp_path / "model")
    XLFAForQuestionAnswering.from_encoder(tiny_encoder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    arguments = EvaluationArguments(
        model=folder, task=name, languages=languages, data_root=tydiqa_root, max_length=100, doc_stride=8
    )
    scores = evaluate_model(arguments)
    jsonschema.validate(scores, json.loads(SCORES_SCHEMA.read_text()))
    assert scores["examples"] == {languages[0]: 2, "en": 1}
    assert scores["primary_metric"] == get_task(name).metrics[0]
    assert len(scores["ids"]["en"]) == 1
