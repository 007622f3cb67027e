"""RankC against the formula written out, rankings by cosine and by a masked-language head, and bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from xlfa.consistency import (
    BLANK,
    ConsistencyArguments,
    CosineRanker,
    MaskedLMRanker,
    consistency,
    format_matrix,
    load_aligned,
    main,
    ranks_of,
    summarise_ranks,
)
from xlfa.errors import XLFAError
from xlfa.retrieval import embed_sentences

pytestmark = pytest.mark.usefixtures("own_cache")
DATASET = "local/bmlama17"
PROMPTS = ["the capital is <mask>.", "<mask> is a river", "he was born in <mask>, it seems"]
CANDIDATES = [["rome", "paris", "oslo", "7"], ["rhine", "elbe"], ["a", "b", "c"]]


def written_out(one, other):
    """The formula of Qi et al. 2023, set by set."""
    values = []
    for ranks, other_ranks in zip(one, other):
        count = len(ranks)
        order, other_order = np.argsort(ranks), np.argsort(other_ranks)
        exponents = [np.exp(count - j) for j in range(count)]
        weights = [exponent / sum(exponents) for exponent in exponents]
        overlap = [len(set(order[: j + 1]) & set(other_order[: j + 1])) / (j + 1) for j in range(count)]
        values.append(sum(weight * share for weight, share in zip(weights, overlap)))
    return np.mean(values)


def rows_of(prompts=PROMPTS, candidates=CANDIDATES):
    """A test split."""
    rows = [{"prompt": prompt, "candidates": each} for prompt, each in zip(prompts, candidates)]
    return {"test": Dataset.from_list(rows)}


@pytest.fixture
def data_root(write_mirror):
    """Two languages with the same text, and one with other prompts."""
    other = ["is <mask> the capital?", "river <mask>", "<mask>"]
    return write_mirror(DATASET, {"en": rows_of(), "nl": rows_of(), "es": rows_of(other)})


@pytest.fixture
def masked_lm(tiny_encoder, tmp_path):
    """The tiny tokenizer with a mask token, and a random encoder with a masked-language head."""
    folder = tmp_path / "masked"
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return str(folder)


def test_rankc_equals_the_formula_written_out():
    generator = np.random.default_rng(0)
    for _ in range(20):
        one, other = ([generator.permutation(size) for size in (10, 10, 3, 1, 7)] for _ in range(2))
        assert consistency(one, other).mean() == pytest.approx(written_out(one, other))
        assert consistency(one, one) == pytest.approx(np.ones(5))
        assert consistency(one, other) == pytest.approx(consistency(other, one))


def test_the_order_of_the_top_ranks_weighs_most():
    straight = [np.arange(10)]
    top_swapped, bottom_swapped = np.arange(10), np.arange(10)
    top_swapped[:2], bottom_swapped[-2:] = [1, 0], [9, 8]
    (top,), (bottom,) = (consistency(straight, [swapped]) for swapped in (top_swapped, bottom_swapped))
    assert top < 0.4 < 0.99 < bottom < 1


def some_ranks(number, languages=("en", "nl", "es"), seed=0):
    """Of seven candidates a query, in a random order in each language."""
    generator = np.random.default_rng(seed)
    return {language: [generator.permutation(7) for _ in range(number)] for language in languages}


def width(interval):
    return interval[1] - interval[0]


def test_means_and_intervals_by_hand():
    # Two candidates: the same order gives 1, the other one half the weight of the second, 1 / (1 + e).
    straight, swapped, half = np.array([0, 1]), np.array([1, 0]), 100 / (1 + np.e)
    ranks = {"en": [straight, straight], "nl": [straight, swapped], "es": [swapped, straight]}
    scores = summarise_ranks(ranks)
    mean = (100 + half) / 2
    assert scores["matrix"]["nl"] == pytest.approx({"en": mean, "nl": 100.0, "es": half})
    assert scores["languages"] == pytest.approx({"en": mean, "nl": (mean + half) / 2, "es": (mean + half) / 2})
    assert scores["average"] == pytest.approx((2 * mean + half) / 3)
    assert scores["average_with_english"] == pytest.approx(mean)
    intervals = scores["intervals"]
    # Of two queries a draw holds only the first or only the second one in a quarter of the draws each.
    assert intervals["matrix"]["en"]["nl"] == pytest.approx([half, 100.0])
    assert intervals["matrix"]["nl"]["es"] == pytest.approx([half, half])
    assert intervals["languages"]["nl"] == pytest.approx([half, mean])
    # One draw serves all languages: where English agrees with one of the others, it does not with the other one.
    assert intervals["languages"]["en"] == pytest.approx([mean, mean])
    assert intervals["average"] == pytest.approx([scores["average"]] * 2)
    assert intervals["average_with_english"] == intervals["languages"]["en"]


def test_intervals_hold_their_means_and_shrink_with_more_queries():
    few, many = (summarise_ranks(some_ranks(number)) for number in (100, 900))
    for scores in (few, many):
        pairs = [(scores[name], scores["intervals"][name]) for name in ("average", "average_with_english")]
        for one in scores["languages"]:
            pairs.append((scores["languages"][one], scores["intervals"]["languages"][one]))
            for other in scores["languages"].keys() - {one}:
                pairs.append((scores["matrix"][one][other], scores["intervals"]["matrix"][one][other]))
        assert all(0 < low < value < high < 100 for value, (low, high) in pairs) and len(pairs) == 2 + 3 + 6
    assert width(few["intervals"]["average"]) / width(many["intervals"]["average"]) == pytest.approx(3, rel=0.2)
    values = 100 * consistency(*(some_ranks(900)[language] for language in ("en", "nl")))
    assert width(many["intervals"]["matrix"]["en"]["nl"]) == pytest.approx(2 * 1.96 * values.std() / 30, rel=0.1)
    assert summarise_ranks(some_ranks(900)) == many


def test_a_single_query_shows_no_spread():
    scores = summarise_ranks(some_ranks(1, ("nl", "es")))
    assert scores["average_with_english"] is None and scores["average"] == scores["matrix"]["nl"]["es"]
    nothing = {"nl": None, "es": None}
    assert scores["intervals"] == {
        "matrix": {"nl": nothing, "es": nothing},
        "languages": nothing,
        "average": None,
        "average_with_english": None,
    }
    described = {"dataset": "d", "scoring": "cosine", "layer": "4", "queries": 1}
    assert format_matrix(described | scores).endswith(f"average of the pairs {scores['average']:.2f}")


def test_ranks_put_the_highest_score_first_and_ties_in_order():
    assert ranks_of(np.array([0.1, 0.9, 0.1, 0.5])).tolist() == [2, 0, 3, 1]


def test_cosine_ranks_by_the_prompt_with_its_blank(tiny_encoder, data_root):
    arguments = ConsistencyArguments(dataset=DATASET, model=tiny_encoder, data_root=data_root)
    ranker = CosineRanker(arguments)
    assert ranker.layer == "4"
    found = ranker(load_aligned(arguments, ["en", "es"])["es"], "es")
    sentences = ["is <mask> the capital?", *(f"is {candidate} the capital?" for candidate in CANDIDATES[0])]
    vectors = embed_sentences(ranker.model, ranker.tokenizer, sentences, ranker.options)["4"]
    assert found[0].tolist() == ranks_of((vectors[1:] @ vectors[0]).numpy()).tolist()


def test_masked_lm_scores_are_mean_log_probabilities_in_the_blanks(masked_lm, data_root):
    arguments = ConsistencyArguments(
        dataset=DATASET, model=masked_lm, scoring="masked_lm", data_root=data_root, max_tokens_per_batch=60
    )
    ranker = MaskedLMRanker(arguments)
    found = ranker(load_aligned(arguments, ["en", "nl"])["en"], "en")
    expected = []
    for candidate in CANDIDATES[0]:
        pieces = ranker.tokenizer(candidate, add_special_tokens=False)["input_ids"]
        text = PROMPTS[0].replace("<mask>", " ".join(["[MASK]"] * len(pieces)))
        inputs = ranker.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = ranker.model(**inputs).logits[inputs["input_ids"] == ranker.tokenizer.mask_token_id]
        assert len(logits) == len(pieces)
        expected.append(logits.log_softmax(-1)[range(len(pieces)), pieces].mean().item())
    assert found[0].tolist() == ranks_of(np.array(expected)).tolist()


def test_a_blank_after_a_space_has_the_pieces_of_a_word_after_a_space(tmp_path):
    """In byte-level BPE these are others than those of the word alone."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>", "<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["it is rome", "it is oslo", "rome and oslo"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True)})
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    ranker = MaskedLMRanker(ConsistencyArguments(dataset=DATASET, model=str(tmp_path), scoring="masked_lm"))
    assert ranker.marks_spaces
    read = []

    def note(outputs, inputs, columns):
        read.extend(columns["pieces"])
        return [torch.zeros(len(pieces)) for pieces in columns["pieces"]]

    ranker._mean_log_probabilities = note
    prompts = ["it is [X]", "[X] it is"]
    ranker(
        Dataset.from_dict({"prompt": [p.replace("[X]", BLANK) for p in prompts], "candidates": [["rome"]] * 2}), "en"
    )
    words = sorted(tokenizer.decode(pieces) for (pieces,) in read)
    assert words == [" rome", "rome"]


def test_a_masked_language_model_without_a_tokenizer_is_named(masked_lm):
    for path in Path(masked_lm).glob("tokenizer*"):
        path.unlink()
    with pytest.raises(XLFAError, match=f"--model {masked_lm}: it has no tokenizer files"):
        MaskedLMRanker(ConsistencyArguments(dataset=DATASET, model=masked_lm, scoring="masked_lm"))


@pytest.mark.parametrize("scoring", ["cosine", "masked_lm"])
def test_the_matrix_is_written_and_printed(masked_lm, data_root, tmp_path, capsys, scoring):
    languages = ["--languages", "en", "nl", "es"]
    main(["--model", masked_lm, "--dataset", DATASET, "--data_root", data_root, "--scoring", scoring, *languages])
    scores = json.loads((tmp_path / "masked" / "scores" / "rankc" / "rankc.json").read_text())
    assert scores["matrix"]["en"]["nl"] == pytest.approx(100.0) and scores["queries"] == 3
    assert (
        scores["matrix"]["en"]["es"] == pytest.approx(scores["matrix"]["es"]["en"])
        and scores["matrix"]["en"]["es"] < 100
    )
    expected = np.mean([100.0, scores["matrix"]["en"]["es"], scores["matrix"]["nl"]["es"]])
    assert scores["average"] == pytest.approx(expected)
    with_english = np.mean([scores["matrix"]["en"][other] for other in ("nl", "es")])
    assert scores["average_with_english"] == scores["languages"]["en"] == pytest.approx(with_english)
    assert scores["schema_version"] == 2 and scores["bootstrap"] == {"confidence": 0.95, "draws": 9999}
    assert scores["intervals"].keys() == {"matrix", "languages", "average", "average_with_english"}
    low, high = scores["intervals"]["average"]
    assert f"average of the pairs {expected:.2f} [{low:.1f}, {high:.1f}]\n" in capsys.readouterr().out


def test_a_sample_is_the_same_in_every_language(tiny_encoder, data_root):
    arguments = ConsistencyArguments(dataset=DATASET, model=tiny_encoder, data_root=data_root, max_examples=2, seed=1)
    rows = load_aligned(arguments, ["en", "es"])
    assert len(rows["en"]) == 2 and rows["en"]["candidates"] == rows["es"]["candidates"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_of(PROMPTS[:2]), "xx has 2 rows and en 3"),
        (rows_of(candidates=[["a"], *CANDIDATES[1:]]), "(xx): query 0 has 1 candidates, in en it has 4"),
        (rows_of(prompts=["no blank", *PROMPTS[1:]]), "(xx): query 0 is 'no blank'; a prompt has one <mask>"),
    ],
)
def test_rows_that_are_not_aligned_are_named(tiny_encoder, write_mirror, rows, message):
    root = write_mirror(DATASET, {"en": rows_of(), "xx": rows})
    with pytest.raises(XLFAError) as error:
        load_aligned(ConsistencyArguments(dataset=DATASET, model=tiny_encoder, data_root=root), ["en", "xx"])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--languages", "en"], "consistency needs at least two"),
        (["--languages", "en", "en"], "consistency needs at least two"),
        (["--languages", "en", "nl", "--max_length", "600"], "--max_length 600: the encoder has positions for"),
        (["--languages", "en", "nl", "--max_length", "2"], "--max_length 2 leaves no room for a word"),
        (["--languages", "en", "nl", "--layer", "9"], "--layer 9: the model has fused states and layers 0 to 4"),
        (["--languages", "en", "nl", "--scoring", "masked_lm"], "has no masked-language head"),
        (["--languages", "en", "qq"], "qq"),
    ],
)
def test_bad_input_is_named(tiny_encoder, data_root, tmp_path, flags, message):
    with pytest.raises(XLFAError) as error:
        main(
            [
                "--model",
                tiny_encoder,
                "--dataset",
                DATASET,
                "--data_root",
                data_root,
                "--output_dir",
                str(tmp_path / "out"),
                *flags,
            ]
        )
    assert message in str(error.value)
