"""Sentence retrieval: P@1 by layer on vectors and sentences whose answer is known, and bad input."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from modeling_xlfa import XLFAForSequenceClassification, XLFAModel
from xlfa.errors import XLFAError
from xlfa.inference import InferenceOptions
from xlfa.retrieval import CONFIGS, embed_sentences, load_states_model, main, precision_by_layer

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
    scores = precision_by_layer(foreign, english)["0"]
    assert scores["to_english"] == scores["from_english"] == scores["mean"] == 50.0
    low, high = scores["to_english_interval"]
    assert 0 < low < 50 < high < 100
    english["0"][3] = torch.tensor([0.0, 0.0, 1.0, 0.1])
    uneven = precision_by_layer(foreign, english)["0"]
    assert (uneven["to_english"], uneven["from_english"]) == (50.0, 25.0)


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
    assert "fused" in capsys.readouterr().out


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


def test_the_help_names_the_languages(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"by default {' '.join(CONFIGS)}" in " ".join(capsys.readouterr().out.split())
