"""Plans against POT on the same cost, summed to words by hand; states against transformers; padding and batches."""

import math
from dataclasses import replace

import numpy as np
import ot
import pytest
import torch
from alignment_data import make_states
from transformers import AutoModel, AutoTokenizer

from modeling_xlfa import XLFAModel
from xlfa.alignment import aligner as module
from xlfa.alignment.aligner import Aligner, TransportOptions
from xlfa.errors import XLFAError

PAIRS = [
    ("the cat sat.", "die katze sass."),
    ("a", "eine sehr lange zeile, mit vielen buchstaben darin"),
    (["it's", "7"], ["es", "ist", "7"]),
]


@pytest.fixture(scope="module")
def aligner(tiny_encoder):
    return Aligner.from_pretrained(tiny_encoder)


@pytest.fixture(scope="module")
def states(aligner):
    return aligner.states(PAIRS)


@pytest.fixture
def random_states():
    """Pieces of 3 and 4 words, near enough to one another for soft plans."""
    torch.manual_seed(1)
    return make_states(torch.randn(5, 8), torch.randn(7, 8), [0, 0, 1, 2, 2], [0, 1, 1, 1, 2, 3, 3])


def cosine_cost(states):
    source, target = (side.double().numpy() for side in (states.source_states, states.target_states))
    products = source @ target.T
    return 1 - products / np.linalg.norm(source, axis=1)[:, None] / np.linalg.norm(target, axis=1)


def centred_deviation(cost):
    return (cost - cost.mean(0) - cost.mean(1)[:, None] + cost.mean()).std()


def sum_to_words(plan, states):
    weights = np.zeros((len(states.source_words), len(states.target_words)))
    for row, source in enumerate(states.source_word_of_piece):
        for column, target in enumerate(states.target_word_of_piece):
            weights[source, target] += plan[row, column]
    return weights


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 2.0])
def test_balanced_plan_is_that_of_pot(random_states, epsilon):
    (alignment,) = Aligner.align([random_states], TransportOptions(epsilon, tol=1e-9, max_iter=100_000))
    cost = cosine_cost(random_states)
    absolute = epsilon * centred_deviation(cost)
    expected = ot.sinkhorn(
        *(random_states.source_marginal, random_states.target_marginal, cost, absolute),
        method="sinkhorn_log",
        stopThr=1e-12,
        numItermax=100_000,
    )
    np.testing.assert_allclose(alignment.piece_plan, expected, atol=1e-8)
    np.testing.assert_allclose(alignment.weights, sum_to_words(expected, random_states), atol=1e-8)
    np.testing.assert_allclose(alignment.source_mass, [2 / 5, 1 / 5, 2 / 5])
    np.testing.assert_allclose(alignment.target_mass, [1 / 7, 3 / 7, 1 / 7, 2 / 7])
    assert alignment.epsilon == pytest.approx(absolute)
    rows = expected / expected.sum(1, keepdims=True)
    assert alignment.perplexity == pytest.approx(np.exp(-(rows * np.log(rows)).sum(1).mean()), rel=1e-5)
    assert alignment.converged and alignment.marginal_error < 1e-8
    assert not alignment.null_source.any() and not alignment.null_target.any()


@pytest.mark.parametrize(("epsilon", "tau"), [(1e-300, None), (0.001, 0.001)])
def test_a_plan_beyond_the_numbers_is_refused(random_states, epsilon, tau):
    with pytest.raises(XLFAError, match=f"epsilon {epsilon:g}.*too small for 64-bit numbers"):
        list(Aligner.align([random_states], TransportOptions(epsilon, unbalanced=tau)))


@pytest.mark.parametrize("tau", [0.5, 3.0])
def test_unbalanced_plan_is_that_of_pot_and_leaves_words_unmatched(random_states, tau):
    options = TransportOptions(0.2, "absolute", unbalanced=tau, tol=1e-9, max_iter=100_000)
    (alignment,) = Aligner.align([random_states], options)
    expected = ot.unbalanced.sinkhorn_unbalanced(
        *(random_states.source_marginal, random_states.target_marginal, cosine_cost(random_states), 0.2, tau),
        reg_type="kl",
        stopThr=1e-12,
        numItermax=100_000,
    )
    np.testing.assert_allclose(alignment.piece_plan, expected, atol=1e-8)
    weights = sum_to_words(expected, random_states)
    np.testing.assert_allclose(alignment.null_source, (alignment.source_mass - weights.sum(1)).clip(0), atol=1e-8)
    np.testing.assert_allclose(alignment.null_target, (alignment.target_mass - weights.sum(0)).clip(0), atol=1e-8)
    assert alignment.null_source.sum() > 0.01


def test_limits_of_epsilon_are_the_exact_plan_and_the_product(random_states):
    exact, product = (Aligner.align([random_states], TransportOptions(epsilon))[0] for epsilon in (0, math.inf))
    cost = cosine_cost(random_states)
    best = ot.emd2(random_states.source_marginal, random_states.target_marginal, cost)
    assert (exact.piece_plan * cost).sum() == pytest.approx(best)
    assert exact.epsilon == 0
    np.testing.assert_allclose(exact.piece_plan.sum(0), 1 / 7)
    np.testing.assert_allclose(product.weights, np.outer(product.source_mass, product.target_mass))
    assert product.perplexity == pytest.approx(7)


@pytest.mark.parametrize("epsilon", [0, 0.1, math.inf])
def test_a_plan_does_not_depend_on_its_batch(states, epsilon, monkeypatch):
    options = TransportOptions(epsilon, tol=1e-9)
    together = Aligner.align(states, options)
    monkeypatch.setattr(module, "ENTRIES_PER_BATCH", 1)
    for pair, alignment, alone in zip(states, together, Aligner.align(states, options), strict=True):
        assert alignment.weights.shape == (len(pair.source_words), len(pair.target_words))
        np.testing.assert_allclose(alignment.piece_plan, alone.piece_plan, atol=1e-7)
    assert Aligner.align([], options) == []


def test_parts_of_a_piece_share_its_plan(random_states):
    """A piece in two words is as good as the whole one: both parts have half of its row."""
    (whole,) = Aligner.align([random_states], TransportOptions(0.3, "absolute", tol=1e-9))
    parts = [0, 1, 2, 2, 3, 4]
    shared = replace(
        random_states,
        source_pieces=[random_states.source_pieces[part] for part in parts],
        source_word_of_piece=np.array([0, 0, 1, 2, 2, 2]),
        source_states=random_states.source_states[parts],
        source_marginal=np.array([1 / 5, 1 / 5, 1 / 10, 1 / 10, 1 / 5, 1 / 5]),
    )
    (split,) = Aligner.align([shared], TransportOptions(0.3, "absolute", tol=1e-9))
    np.testing.assert_allclose(split.piece_plan[[2, 3]], whole.piece_plan[[2, 2]] / 2, atol=1e-8)
    np.testing.assert_allclose(split.weights.sum(0), whole.weights.sum(0), atol=1e-8)


@pytest.mark.parametrize("layer", [0, 2, "last", "fused"])
def test_states_are_those_of_transformers(aligner, tiny_encoder, layer):
    encoder, tokenizer = AutoModel.from_pretrained(tiny_encoder).eval(), AutoTokenizer.from_pretrained(tiny_encoder)
    found = aligner.at_layer(layer).states(PAIRS[:2])
    for texts, pair in zip(PAIRS, found):
        for text, states in zip(texts, (pair.source_states, pair.target_states)):
            with torch.no_grad():
                hidden = encoder(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            expected = hidden[layer if isinstance(layer, int) else 4][0, 1:-1]
            torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)


def test_words_that_are_given_stay_words(states):
    assert [word.text for word in states[2].source_words] == ["it's", "7"]
    assert [word.text for word in states[2].target_words] == ["es", "ist", "7"]


def test_a_stream_is_read_a_chunk_at_a_time(aligner, states, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    read = []

    def pairs():
        for pair in PAIRS:
            read.append(pair)
            yield pair

    stream = aligner.stream(pairs())
    torch.testing.assert_close(next(stream).source_states, states[0].source_states)
    assert len(read) == 2
    assert [pair.source_pieces for pair in stream] == [pair.source_pieces for pair in states[1:]]


def test_default_layer_is_the_trained_one_or_two_thirds_of_the_depth(tiny_encoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    trained = {"ot_weight": 0.1, "ot_layer": 1}
    for fields, expected in (({}, 3), (trained, 1), ({"ot_weight": 0.1}, "fused"), ({"ot_layer": 1}, 3)):
        assert Aligner(XLFAModel.from_encoder(tiny_encoder, **fields), tokenizer).layer == expected


@pytest.mark.parametrize("layer", [5, -1, "first", "3"])
def test_a_layer_that_is_not_there(aligner, layer):
    with pytest.raises(XLFAError, match=f"--layer {layer}: the model has the layers 0 to 4, fused and last"):
        aligner.at_layer(layer)


def test_bad_pairs_are_named(aligner):
    for target, message in (("", "no word"), (" \u200b", "no word"), ("a" * 511, "513 tokens"), ("\ud800", "Unicode")):
        with pytest.raises(XLFAError, match=f"pair 2: the target sentence: .*{message}"):
            aligner.states([("a", "b"), ("a", target)])
    with pytest.raises(XLFAError, match="--max_length 600: the model reads 1 to 512 tokens"):
        Aligner(aligner.model, aligner.tokenizer, max_length=600)


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": -0.1},
        {"epsilon": math.nan},
        {"epsilon_scale": "metres"},
        {"cost": "euclidean"},
        {"unbalanced": 0},
        {"unbalanced": 1, "epsilon": 0},
        {"unbalanced": 1, "epsilon": math.inf},
        {"tol": 0},
        {"max_iter": 0},
    ],
)
def test_bad_options_are_named(options):
    name = next(iter(options))
    with pytest.raises(XLFAError, match=name):
        TransportOptions(**options)


def test_a_bad_pair_of_a_stream_is_counted_from_its_beginning(aligner, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    with pytest.raises(XLFAError, match="pair 4: the target sentence: no word"):
        list(aligner.stream([*PAIRS, ("a", "")]))


@pytest.mark.parametrize("epsilon", [0, 0.1, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite(states, epsilon, value):
    broken = replace(states[1], target_states=states[1].target_states.clone())
    broken.target_states[2, 3] = value
    with pytest.raises(XLFAError, match="pair 2: the target states have a NaN or an infinity"):
        Aligner.align([states[0], broken, states[2]], TransportOptions(epsilon))


@pytest.mark.offline
def test_a_real_encoder_aligns_words_across_scripts():
    real = Aligner.from_pretrained()
    pairs = [
        ("The cat sat on the mat.", "Die Katze saß auf der Matte."),
        ("The cat sat on the mat.", "猫坐在垫子上。"),
        ("The cat drinks water.", "القطة تشرب الماء."),
    ]
    expected = [
        {("cat", "Katze"), ("sat", "saß"), ("on", "auf"), ("mat", "Matte"), (".", ".")},
        {("cat", "猫"), ("sat", "坐在"), ("on", "上"), ("mat", "垫子"), (".", "。")},
        {("cat", "القطة"), ("drinks", "تشرب"), ("water", "الماء"), (".", ".")},
    ]
    assert real.layer == 8
    for alignment, wanted in zip(Aligner.align(real.states(pairs), TransportOptions()), expected, strict=True):
        best = {(word, alignment.target[row.argmax()]) for word, row in zip(alignment.source, alignment.weights)}
        assert wanted <= best
        assert alignment.weights.sum() == pytest.approx(1)
