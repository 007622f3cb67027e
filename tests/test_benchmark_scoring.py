"""The scoring benchmark: both sides predict the same, its exit status says so, and the peers' search for a span."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from transformers import AutoTokenizer

from modeling_xlfa import XLFAForQuestionAnswering, XLFAForSequenceClassification

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import scoring  # noqa: E402
import scoring_peers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tiny_encoder, tmp_path_factory):
    """Folders of an untrained model with each head."""
    folders = {}
    # Contexts of the sample in Chinese and Thai fit into 480 tokens.
    for task, head, labels, length in (
        ("xnli", XLFAForSequenceClassification, 3, 128),
        ("xquad", XLFAForQuestionAnswering, 2, 480),
    ):
        torch.manual_seed(1)
        folders[task] = str(tmp_path_factory.mktemp(task))
        fields = {"num_labels": labels, "input_length": length, "input_stride": 32}
        model, tokenizer = head.from_encoder(tiny_encoder, **fields).eval(), AutoTokenizer.from_pretrained(tiny_encoder)
        if task == "xnli":
            tell_apart(model, tokenizer)
        model.save_pretrained(folders[task])
        tokenizer.save_pretrained(folders[task])
    return folders


@torch.no_grad()
def tell_apart(model, tokenizer):
    """Make an untrained classifier, to which all texts are alike, give several labels by clear margins."""
    rows = scoring.get_task("xnli").load_test("de", "sample")
    inputs = tokenizer(rows["premise"][:], rows["hypothesis"][:], padding=True, return_tensors="pt")
    model.classifier.weight *= 1000
    model.classifier.bias -= model(**inputs).logits.mean(dim=0)


def flags(models, task, others):
    """A command line on the sample; `others` as in a shell."""
    return ["--data_root", "sample", "--tasks", task, f"--model_{task}", models[task], *others.split()]


def test_labels_of_both_sides_are_equal(models, tmp_path):
    options = scoring.parse_arguments(flags(models, "xnli", "--max_examples 24 --repeats 2"))
    case = scoring.make_case(scoring.get_task("xnli"), ["de", "th"], options, tmp_path)
    assert list(case.measure()) == ["warm-up", *scoring.COLD_SIDES, *scoring.COLD_SIDES, scoring.OURS_WARM]
    ours, peers = case.runs[scoring.OURS_FLOAT32][0], case.runs[scoring.PEERS][0]
    found = [
        {language: {id: row.prediction for id, row in rows.items()} for language, rows in run.predictions.items()}
        for run in (ours, peers)
    ]
    assert found[0] == found[1] and ours.scores == peers.scores
    assert list(found[0]) == ["de", "th"] and len(set(found[0]["de"].values())) > 1
    # Two languages, 24 examples, two repeats.
    assert case.agrees and case.agreement(scoring.OURS_FLOAT32) == (1.0, 96)


def test_with_a_search_over_all_pairs_the_answers_are_equal_too(models, tmp_path, capsys, monkeypatch):
    # The 20 best of an untrained head lie anywhere. With them all, both sides look for the same span in one window.
    monkeypatch.setattr("scoring_peers.N_BEST", 480)
    output = tmp_path / "report.txt"
    command = flags(models, "xquad", "--languages th zh --max_examples 10 --threads 1")
    scoring.main([*command, "--output", str(output)])
    report = output.read_text()
    assert capsys.readouterr().out == report
    assert "ok: xquad: 100.00% of 20 predictions in float32" in report
    for name in ("date", "machine", "threads", "versions", "commit", "command", "seed"):
        assert f"\n{name}: " in f"\n{report}"
    sides = [line.split(" |")[0].strip("| ") for line in report.splitlines() if " cold " in line or " warm " in line]
    assert sides == [scoring.OURS, scoring.OURS_WARM, scoring.OURS_FLOAT32, scoring.PEERS]


def test_predictions_that_differ_give_exit_status_1_and_a_message(models, tmp_path, capsys, monkeypatch):
    def other_labels(*arguments):
        return {
            language: dataclasses.replace(
                scored, predictions=[dataclasses.replace(row, prediction="none") for row in scored.predictions]
            )
            for language, scored in scoring_peers.score_languages(*arguments).items()
        }

    monkeypatch.setattr("scoring.score_languages", other_labels)
    output = tmp_path / "report.txt"
    command = flags(models, "xnli", "--languages de --max_examples 6")
    with pytest.raises(SystemExit) as done:
        scoring.main([*command, "--output", str(output)])
    assert done.value.code == 1
    printed = capsys.readouterr()
    message = "FAILED: xnli: 0.00% of 6 predictions in float32 equal the peers', at least 99% must be"
    assert message in printed.err and message in printed.out and message in output.read_text()


def window_of(start_logits, end_logits, context):
    """A window whose context is the tokens `context`, each of three characters."""
    offsets = [(3 * token, 3 * token + 3) if token in context else None for token in range(len(start_logits))]
    return start_logits, end_logits, offsets


def brute_force(start_logits, end_logits, context):
    """First and last token of the best span of at most 30 tokens, over all pairs."""
    pairs = [(start, end) for start in context for end in context if start <= end < start + 30]
    return max(pairs, key=lambda pair: start_logits[pair[0]] + end_logits[pair[1]])


@pytest.mark.parametrize("seed", range(20))
def test_the_peers_search_finds_the_best_span_of_a_window(seed):
    # 20 tokens of context in 90: the highest ones outside it, and ends far before or behind, are to be passed over.
    start_logits, end_logits = np.random.default_rng(seed).normal(size=(2, 90)).astype(np.float32)
    context = [*range(10, 20), *range(60, 70)]
    start_logits[context] += 2
    end_logits[context] += 2
    start, end = brute_force(start_logits, end_logits, context)
    first, last, probability = scoring_peers.best_span([window_of(start_logits, end_logits, context)])
    assert (first, last) == (3 * start, 3 * end + 3)
    assert 1 / 20 <= probability <= 1


def test_the_peers_search_compares_windows_by_sums_of_logits():
    low, high = np.zeros(8, np.float32), np.zeros(8, np.float32)
    low[3], high[5] = 4, 5
    windows = [window_of(low, low, range(1, 8)), window_of(high, high, range(1, 8))]
    assert scoring_peers.best_span(windows)[:2] == (15, 18)


def test_the_peers_search_without_a_span_of_the_context_finds_none():
    logits = np.arange(40, dtype=np.float32)
    assert scoring_peers.best_span([window_of(logits, logits, range(5))]) is None


def test_the_peers_answers_are_spans_of_contexts_in_several_windows(models):
    task = scoring.get_task("xquad")
    rows = task.load_test("de", "sample").select(range(6))
    ids = task.example_ids(rows)
    scored = scoring_peers.score_languages(task, models["xquad"], ["de"], ids, "sample", max_length=160, doc_stride=32)
    predictions, windows = scored["de"].predictions, scored["de"].windows
    assert [row.id for row in predictions] == ids and min(windows) > 1
    for row, context in zip(predictions, rows["context"]):
        assert row.prediction == scoring_peers.NO_ANSWER or row.prediction in context
