"""Parallel text: bad input is refused, and a batch is a pure function of the seed, the step and its positions."""

import json
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from xlfa.errors import XLFAError
from xlfa.parallel import PairSampler, load_parallel, mispairing, read_piece_weights

LANGUAGES = ("de", "fr", "th", "vi")


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def data_root(tmp_path):
    """org/pairs with en-de (50 pairs, alternating source), bg-en, and en-xx without a `translation` column."""
    rows = {
        "en-de": [
            {"translation": {"en": f"one {n}", "de": f"eins {n}"}, "source": "ab"[n % 2], "score": n} for n in range(50)
        ],
        "bg-en": [{"translation": {"bg": "едно", "en": "one"}, "source": "a", "score": 1}],
        "en-xx": [{"text": "one"}],
    }
    folder = tmp_path / "root" / "org" / "pairs"
    folder.mkdir(parents=True)
    card = ["---", "configs:"]
    for config, content in rows.items():
        (folder / f"{config}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        card += [f"- config_name: {config}", f"  data_files: {config}.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return str(tmp_path / "root")


@pytest.fixture
def tokenizer(tiny_encoder):
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture
def sampler(tokenizer):
    """Languages of 10 to 40 pairs; a pair's text tells its language and number."""
    texts = {
        language: [(f"en {language} {number}", f"{language} {number}") for number in range(10 * size)]
        for size, language in enumerate(LANGUAGES, start=1)
    }
    return PairSampler.from_texts(texts, tokenizer, max_length=32, seed=7)


def test_pairs_are_english_first_whichever_side_the_configuration_names_first(data_root):
    pairs = load_parallel("org/pairs", ["de", "bg"], data_root)
    assert list(pairs) == ["de", "bg"]
    assert pairs["de"] == [(f"one {number}", f"eins {number}") for number in range(50)]
    assert pairs["bg"] == [("one", "едно")]


def test_all_filters_must_hold(data_root):
    assert len(load_parallel("org/pairs", ["de"], data_root, filters=["source=a"])["de"]) == 25
    both = load_parallel("org/pairs", ["de"], data_root, filters=["source=b", "score=7"])
    assert both == {"de": [("one 7", "eins 7")]}


def test_a_sample_of_pairs_is_seeded(data_root):
    samples = [
        load_parallel("org/pairs", ["de"], data_root, pairs_per_language=10, seed=seed)["de"] for seed in (0, 0, 1)
    ]
    assert len(set(samples[0])) == 10
    assert samples[0] == samples[1] != samples[2]


def test_more_pairs_than_there_are_means_all(data_root):
    assert len(load_parallel("org/pairs", ["de"], data_root, pairs_per_language=1000)["de"]) == 50


def test_a_set_without_translation_column_is_refused(data_root):
    with pytest.raises(XLFAError, match="org/pairs.*en-xx.*translation.*text"):
        load_parallel("org/pairs", ["de", "xx"], data_root)


def test_a_language_without_parallel_text_is_named_with_what_exists(data_root):
    with pytest.raises(XLFAError, match="'sw'.*en-sw or sw-en.*en-de"):
        load_parallel("org/pairs", ["de", "sw"], data_root)


@pytest.mark.parametrize("text", ["source", "length=3", "=a", ""])
def test_a_filter_that_is_no_column_and_value_is_refused(data_root, text):
    with pytest.raises(XLFAError) as error:
        load_parallel("org/pairs", ["de"], data_root, filters=[text])
    assert f"--parallel_filter {text!r}" in str(error.value)
    assert "source" in str(error.value)


def test_a_filter_that_leaves_nothing_is_refused(data_root):
    with pytest.raises(XLFAError, match=r"'source=z' leaves no pair of org/pairs \(de\)"):
        load_parallel("org/pairs", ["de"], data_root, filters=["source=z"])


def test_a_draw_depends_on_seed_and_step_alone(sampler):
    first = sampler.draw(3, range(20))
    sampler.draw(9, range(5))
    assert sampler.draw(3, range(20)) == first
    assert PairSampler(sampler.pairs, sampler.tokenizer, 7).draw(3, range(20)) == first
    assert sampler.draw(4, range(20)) != first
    assert PairSampler(sampler.pairs, sampler.tokenizer, 8).draw(3, range(20)) != first


@pytest.mark.parametrize("positions", [[0], range(16), range(16, 32), range(1, 32, 2), [31]])
def test_the_positions_of_a_process_are_a_part_of_the_whole_draw(sampler, positions):
    whole = sampler.draw(2, range(32))
    assert sampler.draw(2, positions) == [whole[position] for position in positions]


def test_languages_are_drawn_alike_however_many_pairs_they_have(sampler, tokenizer):
    drawn = [tokenizer.decode(target).replace(" ", "")[5:7] for _, target in sampler.draw(0, range(4000))]
    counts = Counter(drawn)
    assert set(counts) == set(LANGUAGES)
    # 1000 each; the standard deviation is 27.
    assert all(abs(count - 1000) < 110 for count in counts.values())


def test_every_pair_of_a_language_can_be_drawn(sampler):
    drawn = {tuple(target) for step in range(50) for _, target in sampler.draw(step, range(64))}
    assert len(drawn) == sum(len(pairs) for pairs in sampler.pairs.values())


def test_pairs_with_a_long_side_are_left_out_and_not_cut(tokenizer):
    texts = {"de": [("abc", "abcdef"), ("abcdefg", "abc"), ("abc", "abcdefg"), ("abcdef", "ab")]}
    sampler = PairSampler.from_texts(texts, tokenizer, max_length=8, seed=0)
    kept = [tuple("".join(tokenizer.convert_ids_to_tokens(ids[1:-1])) for ids in pair) for pair in sampler.pairs["de"]]
    assert kept == [("abc", "abcdef"), ("abcdef", "ab")]


def test_pairs_with_an_empty_side_are_left_out_and_counted(tokenizer, caplog):
    texts = {"de": [("abc", "abd"), ("", "abc"), ("abc", " "), ("", "abcdefgh")]}
    with caplog.at_level("INFO", logger="xlfa.parallel"):
        sampler = PairSampler.from_texts(texts, tokenizer, max_length=8, seed=0)
    assert len(sampler.pairs["de"]) == 1
    assert "en-de: 1 pairs, 0 too long, 3 with an empty side" in caplog.text


def test_a_language_whose_pairs_are_all_too_long_is_named(tokenizer):
    texts = {"de": [("abc", "abc")], "fr": [("abcdef", "abc")]}
    with pytest.raises(XLFAError, match="en-fr fits --parallel_max_length 6"):
        PairSampler.from_texts(texts, tokenizer, max_length=6, seed=0)


def test_shuffled_pairs_have_the_same_sentences_and_none_its_translation(tokenizer):
    texts = {code: [(f"en {n}", f"{code} {n}") for n in range(40)] + [("w " * 40, "long")] for code in LANGUAGES}

    def pairs(seed, shuffled):
        return PairSampler.from_texts(texts, tokenizer, max_length=32, seed=seed, shuffled=shuffled).pairs

    true, shuffled = pairs(0, False), pairs(0, True)
    for language in LANGUAGES:
        assert [source for source, _ in shuffled[language]] == [source for source, _ in true[language]]
        targets = [[target for _, target in each[language]] for each in (true, shuffled)]
        assert sorted(targets[0]) == sorted(targets[1])
        assert not any(map(list.__eq__, *targets))
    assert pairs(0, True) == shuffled and pairs(1, True) != shuffled
    assert len({str([target[-3:] for _, target in shuffled[code]]) for code in LANGUAGES}) == len(LANGUAGES)


@pytest.mark.parametrize("seed", range(20))
def test_a_source_does_not_get_a_translation_of_an_equal_one(seed):
    pairs = [("a", "A"), ("a", "Á"), ("b", "B"), ("c", "B"), ("d", "d"), ("e", "d"), ("f", "F")]
    order = mispairing(pairs, "de", seed)
    assert sorted(order) == list(range(len(pairs)))
    for (source, target), partner in zip(pairs, order):
        assert pairs[partner][0] != source and pairs[partner][1] not in (source, target)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("a", "A")], "en-de has a single pair"),
        ([("a", "A"), ("a", "B"), ("b", "C")], "the 3 pairs of en-de have too many equal sentences"),
    ],
)
def test_pairs_that_cannot_be_shuffled_are_named(pairs, message):
    with pytest.raises(XLFAError, match=message):
        mispairing(pairs, "de", 0)


def test_a_batch_holds_the_drawn_pairs(sampler):
    batch, drawn = sampler.batch(5, range(2, 8)), sampler.draw(5, range(2, 8))
    for side, name in enumerate(("source", "target")):
        ids, mask = batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"].bool()
        assert [row[keep].tolist() for row, keep in zip(ids, mask)] == [pair[side] for pair in drawn]


def test_special_tokens_and_padding_are_marked_and_nothing_else(tokenizer):
    sampler = PairSampler.from_texts({"de": [("ab", "abcd"), ("abc", "a")]}, tokenizer, max_length=8, seed=0)
    batch = sampler.batch(0, range(16))
    for name in ("source", "target"):
        ids = batch[f"{name}_input_ids"]
        special = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id])
        assert torch.equal(batch[f"{name}_special_tokens_mask"].bool(), torch.isin(ids, special))
        words = batch[f"{name}_attention_mask"] * (1 - batch[f"{name}_special_tokens_mask"])
        assert sorted(set(words.sum(1).tolist())) == ([2, 3] if name == "source" else [1, 4])


def test_an_unknown_piece_is_a_token_of_its_sentence(tokenizer):
    sampler = PairSampler.from_texts({"de": [("aü", "ü")]}, tokenizer, max_length=8, seed=0)
    batch = sampler.batch(0, range(1))
    assert batch["target_input_ids"][0, 1] == tokenizer.unk_token_id
    assert batch["target_special_tokens_mask"].tolist() == [[1, 0, 1]]
    assert batch["source_special_tokens_mask"].tolist() == [[1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1, 2]", "must hold a JSON object"),
        ("{}", "must hold a JSON object"),
        ('{"e": -1}', "the weight of 'e' is -1; it must be a finite number >= 0"),
        ('{"e": NaN}', "the weight of 'e' is nan"),
        ('{"e": "high"}', "the weight of 'e' is 'high'"),
        ('{"e": true}', "the weight of 'e' is True"),
        ('{"no such piece": 1}', "names no piece of the tokenizer"),
    ],
)
def test_bad_piece_weights_are_named(tiny_encoder, tmp_path, content, message):
    path = tmp_path / "idf.json"
    path.write_text(content)
    with pytest.raises(XLFAError, match="--ot_idf_file") as error:
        read_piece_weights(str(path), AutoTokenizer.from_pretrained(tiny_encoder), 99)
    assert message in str(error.value)
