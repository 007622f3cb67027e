"""Sentence retrieval: P@1 by layer on vectors and sentences whose answer is known, and bad input."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from modeling_xlfa import XLFAForSequenceClassification, XLFAModel
from xlfa.adapters import add_adapters
from xlfa.arguments import ModelArguments
from xlfa.errors import XLFAError
from xlfa.inference import InferenceOptions
from xlfa.languages import FAMILIES
from xlfa.retrieval import (
    CONFIGS,
    embed_sentences,
    format_table,
    hits_by_layer,
    load_states_model,
    main,
    precision_by_layer,
    summarise_hits,
    wilson_intervals,
)

pytestmark = pytest.mark.usefixtures("own_cache")
SENTENCES = ["a cat", "the dogs ran over there", "7", "it is late, is it?", "we read books in the sun"]

OPTIONS = InferenceOptions(max_tokens_per_batch=40, bf16=False)


@pytest.fixture
def data_root(write_mirror):
    """Tatoeba's layout: deu-eng, where both sides are the same text, and fra-eng, where the order is reversed."""
    sides = {"deu-eng": SENTENCES, "fra-eng": SENTENCES[::-1]}
    return write_mirror(
        "mteb/tatoeba-bitext-mining",
        {
            name: {"test": Dataset.from_dict({"sentence1": foreign, "sentence2": SENTENCES})}
            for name, foreign in sides.items()
        },
    )


@pytest.fixture
def trained(tiny_encoder, tmp_path):
    """A folder with a trained head on a fused encoder."""
    folder = tmp_path / "trained"
    XLFAForSequenceClassification.from_encoder(tiny_encoder, num_labels=3).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    return str(folder)


def test_precision_counts_both_directions():
    foreign = {"0": torch.eye(4)}
    # The first two rows are swapped; the last is nearest to its own, but another English row is nearer to foreign 2.
    english = {"0": torch.eye(4)[[1, 0, 2, 3]]}
    hits = hits_by_layer(foreign, english)
    assert hits["0"].tolist() == [[False, False], [False, False], [True, True], [True, True]]
    assert precision_by_layer(hits)["0"] == {"to_english": 50.0, "from_english": 50.0, "mean": 50.0}
    low, high = wilson_intervals(hits["0"])["to_english_interval"]
    assert 0 < low < 50 < high < 100
    english["0"][3] = torch.tensor([0.0, 0.0, 1.0, 0.1])
    uneven = hits_by_layer(foreign, english)
    assert uneven["0"].tolist() == [[False, False], [False, False], [True, True], [True, False]]
    assert precision_by_layer(uneven)["0"] == {"to_english": 50.0, "from_english": 25.0, "mean": 37.5}


def some_hits(number, share=0.6, seed=0):
    """Two layers of hits and misses; the second layer has the misses of the first one as hits."""
    found = np.random.default_rng(seed).random((number, 2)) < share
    return {"0": found, "1": ~found}


def width(interval):
    return interval[1] - interval[0]


def test_means_over_languages_and_families_by_hand():
    one, other = np.array([[True, True], [False, False]]), np.array([[True, False]] * 4)
    scores = summarise_hits({"bg": {"0": one}, "de": {"0": other}, "ru": {"0": other & False}})
    assert {code: each["pairs"] for code, each in scores["languages"].items()} == {"bg": 2, "de": 4, "ru": 4}
    means = {code: each["layers"]["0"]["mean"] for code, each in scores["languages"].items()}
    assert means == {"bg": 50.0, "de": 50.0, "ru": 0.0}
    expected = {"to_english": 25.0, "from_english": 25.0, "mean": 25.0}
    assert list(scores["families"]) == ["germanic", "slavic"]
    assert scores["families"]["slavic"]["0"].items() >= expected.items()
    assert scores["average"]["0"]["mean"] == pytest.approx(100 / 3)
    # Both sentences of bg are hit in a quarter of the draws, and none in another; each of de is half a hit.
    intervals = {code: each["layers"]["0"]["mean_interval"] for code, each in scores["languages"].items()}
    assert intervals == {"bg": [0.0, 100.0], "de": [50.0, 50.0], "ru": [0.0, 0.0]}
    assert scores["families"]["slavic"]["0"]["mean_interval"] == [0.0, 50.0]
    assert scores["families"]["germanic"]["0"]["mean_interval"] == [50.0, 50.0]
    assert scores["average"]["0"]["mean_interval"] == pytest.approx([50 / 3, 50.0])


def test_intervals_hold_their_means_and_shrink_with_more_sentences():
    few, many = (
        summarise_hits({code: some_hits(number, seed=seed) for seed, code in enumerate(("de", "fr"))})
        for number in (100, 900)
    )
    for scores in (few, many):
        tables = [each["layers"] for each in scores["languages"].values()] + [scores["average"]]
        for row in [table[layer] for table in tables for layer in ("0", "1")]:
            low, high = row["mean_interval"]
            assert 0 < low < row["mean"] < high < 100
    ratio = width(few["average"]["0"]["mean_interval"]) / width(many["average"]["0"]["mean_interval"])
    assert ratio == pytest.approx(3, rel=0.2)
    # The directions are independent here: the variance of a language's mean is p (1 - p) / 2n.
    found = many["languages"]["de"]["layers"]["0"]
    share = found["mean"] / 100
    assert width(found["mean_interval"]) == pytest.approx(
        200 * 1.96 * math.sqrt(share * (1 - share) / 2 / 900), rel=0.1
    )


def test_languages_are_drawn_apart_and_layers_together():
    scores = summarise_hits({code: some_hits(300) for code in ("de", "fr")})
    (own, other), average = (each["layers"] for each in scores["languages"].values()), scores["average"]
    assert own["0"]["mean"] == other["0"]["mean"] == average["0"]["mean"]
    assert width(average["0"]["mean_interval"]) == pytest.approx(
        width(own["0"]["mean_interval"]) / math.sqrt(2), rel=0.1
    )
    assert own["1"]["mean_interval"] == pytest.approx([100 - bound for bound in own["0"]["mean_interval"][::-1]])
    again = summarise_hits({code: some_hits(300) for code in ("de", "fr")})
    assert again == scores


def test_a_single_sentence_shows_no_spread():
    scores = summarise_hits({"de": {"0": np.array([[True, False]])}, "fr": some_hits(50)})
    rows = [scores["languages"][code]["layers"]["0"] for code in ("de", "fr")]
    rows += [scores["average"]["0"], scores["families"]["romance"]["0"]]
    assert [row["mean_interval"] for row in rows] == [None] * 4
    assert rows[0]["mean"] == 50.0 and len(rows[0]["to_english_interval"]) == 2
    (line,) = [line for line in format_table({"dataset": "d", **scores}).splitlines() if line.startswith("      0 ")]
    assert "[" not in line and line.endswith(f"{scores['average']['0']['mean']:.1f}")


def test_vectors_are_means_over_tokens_in_the_order_of_the_sentences(trained):
    model, tokenizer = load_states_model(trained)
    vectors = embed_sentences(model, tokenizer, SENTENCES, OPTIONS)
    assert list(vectors) == ["0", "1", "2", "3", "4", "fused"]
    for position, sentence in enumerate(SENTENCES):
        with torch.no_grad():
            output = model(**tokenizer(sentence, return_tensors="pt"), output_hidden_states=True)
        for name, states in [("2", output.hidden_states[2]), ("fused", output.last_hidden_state)]:
            mean = torch.nn.functional.normalize(states[0].mean(0), dim=0)
            torch.testing.assert_close(vectors[name][position], mean, rtol=1e-4, atol=1e-5)
    assert list(embed_sentences(model, tokenizer, SENTENCES, OPTIONS, only="3")) == ["3"]


def test_a_plain_encoder_has_its_layers_and_no_fusion(tiny_encoder):
    model, _ = load_states_model(tiny_encoder)
    assert type(model) is XLFAModel and model.fusion is None


def test_adapters_are_merged_into_the_encoder_that_they_name(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head = XLFAForSequenceClassification.from_encoder(tiny_encoder, num_labels=3)
    adapted = add_adapters(head, ModelArguments(model="lab/encoder", peft="lora")).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    for part in (AutoTokenizer.from_pretrained(tiny_encoder), adapted.config, adapted):
        part.save_pretrained("adapter")
    shutil.copytree(tiny_encoder, "lab/encoder")
    model, tokenizer = load_states_model("adapter")
    inputs = tokenizer(SENTENCES[0], return_tensors="pt")
    with torch.no_grad():
        expected = adapted.get_base_model().base_model(**inputs).last_hidden_state
        found = model(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    plain, _ = load_states_model("lab/encoder")
    assert (plain(**inputs).last_hidden_state - expected).abs().max() > 0.1


def test_scores_are_written_for_every_layer_and_language(trained, data_root, capsys, tmp_path):
    output = tmp_path / "out"
    main(["--model", trained, "--data_root", data_root, "--languages", "de", "fr", "--output_dir", str(output)])
    scores = json.loads((output / "retrieval.json").read_text())
    assert scores["languages"]["de"]["pairs"] == 5 and set(scores["average"]) == {"0", "1", "2", "3", "4", "fused"}
    for layer, found in scores["languages"]["de"]["layers"].items():
        assert found["mean"] == 100.0, layer
    # Reversed, only the sentence in the middle stands beside itself.
    assert scores["languages"]["fr"]["layers"]["0"]["mean"] == pytest.approx(20.0)
    assert scores["average"]["0"]["mean"] == pytest.approx(60.0)
    assert scores["schema_version"] == 2 and scores["bootstrap"] == {"confidence": 0.95, "draws": 9999}
    assert list(scores["families"]) == ["germanic", "romance"]
    assert scores["families"]["romance"]["0"].items() <= scores["languages"]["fr"]["layers"]["0"].items()
    assert scores["average"]["0"].keys() == {"to_english", "from_english", "mean", "mean_interval"}
    low, high = scores["average"]["0"]["mean_interval"]
    printed = capsys.readouterr().out
    assert f"      0   100.0    20.0    60.0 [{low:.1f}, {high:.1f}]" in printed and "fused" in printed
    assert "[low, high]: 95% interval by bootstrap over sentences" in printed


def test_long_sentences_are_reported(trained, caplog):
    model, tokenizer = load_states_model(trained)
    embed_sentences(model, tokenizer, SENTENCES, OPTIONS, max_length=6, description="de")
    assert "de: 4 sentences reach --max_length 6" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--languages", "xx"], "--languages xx: xlfa retrieval knows ar bg de"),
        (["--data_root", "/nowhere"], "no data set 'mteb/tatoeba-bitext-mining' under --data_root /nowhere"),
        (["--languages", "ru"], "rus-eng"),
        (["--max_length", "-1"], "--max_length -1: at least 1"),
        (["--languages", "de", "--max_length", "2"], "--max_length 2 leaves no room for a word"),
        (["--output_dir", "/dev/null"], "cannot write to /dev/null (File exists): name another folder"),
    ],
)
def test_bad_input_is_named(trained, data_root, flags, message):
    with pytest.raises(XLFAError) as error:
        main(["--model", trained, "--data_root", data_root, *flags])
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["org/name", "n" * 300])
def test_a_name_that_is_no_folder_needs_one_to_write_into(name):
    with pytest.raises(XLFAError, match="name one with --output_dir"):
        main(["--model", name])


def test_an_encoder_that_cannot_be_loaded_is_named(untokenised_encoder, tmp_path):
    with pytest.raises(XLFAError, match=f"--model {untokenised_encoder}: it has no tokenizer files"):
        load_states_model(untokenised_encoder)
    with pytest.raises(XLFAError, match=f"--model {tmp_path}/none: no such encoder on the Hub or as a folder"):
        load_states_model(f"{tmp_path}/none")


def test_every_language_has_a_family():
    assert CONFIGS.keys() <= FAMILIES.keys()


def test_the_help_names_the_languages(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"by default {' '.join(CONFIGS)}" in " ".join(capsys.readouterr().out.split())
