"""Links against their definitions, pair by pair in plain Python, and null words."""

import math
from itertools import product

import numpy as np
import ot
import pytest
import torch
from alignment_data import make_alignment, make_states
from hypothesis import given
from hypothesis import strategies as st

from xlfa.alignment.links import argmax_links, extract_links, null_words, relative_weights, softmax_links
from xlfa.errors import XLFAError


@st.composite
def plans(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    cells = st.integers(0, 4)
    weights = np.array(draw(st.lists(cells, min_size=rows * columns, max_size=rows * columns)), dtype=float) + 0.1
    return make_alignment((weights / weights.sum()).reshape(rows, columns))


def pairs(links):
    return [(link.source, link.target) for link in links]


@given(plans(), st.sampled_from([0.5, 1.0, 1.7, 3.0]))
def test_threshold_is_relative_to_the_uniform_plan(alignment, threshold):
    weights = alignment.weights
    expected = [
        (row, column)
        for row, column in product(range(weights.shape[0]), range(weights.shape[1]))
        if weights[row, column] / (weights[row].sum() * weights[:, column].sum()) >= threshold - 1e-9
    ]
    links = extract_links(alignment, "threshold", threshold)
    assert pairs(links) == expected
    assert all(link.weight == weights[link.source, link.target] for link in links)


@given(plans())
def test_mutual_argmax_is_largest_in_row_and_column(alignment):
    weights = alignment.weights.tolist()
    columns = list(zip(*weights))
    expected = [
        (row, column)
        for row, column in product(range(len(weights)), range(len(columns)))
        if weights[row].index(max(weights[row])) == column and columns[column].index(max(columns[column])) == row
    ]
    assert pairs(extract_links(alignment)) == expected != []


def test_one_word_has_the_uniform_plan_and_its_link():
    (link,) = extract_links(make_alignment([[1.0]]), "threshold", 1.0)
    assert (link.source, link.target, link.weight) == (0, 0, 1.0)


def test_words_without_a_piece_have_no_link():
    alignment = make_alignment([[0.6, 0.0], [0.4, 0.0], [0.0, 0.0]])
    assert relative_weights(alignment).tolist() == [[1, 0], [1, 0], [0, 0]]
    assert pairs(extract_links(alignment, "threshold", 0.1)) == [(0, 0), (1, 0)]
    assert pairs(extract_links(alignment)) == [(0, 0)]


def test_words_that_are_left_unmatched_are_null():
    alignment = make_alignment(
        [[0.30, 0.00, 0.02], [0.00, 0.30, 0.02], [0.02, 0.00, 0.06]], [1 / 3] * 3, [0.36, 0.34, 0.3]
    )
    # Of |P| = 0.72 a word must keep more than 0.36 of its mass: 0.08 of 1/3 is less, 0.1 of 0.3 too.
    source, target = null_words(alignment)
    assert source.tolist() == [False, False, True] == target.tolist()
    for method in ("threshold", "mutual_argmax"):
        assert pairs(extract_links(alignment, method)) == [(0, 0), (1, 1)]


def test_a_constant_in_the_cost_changes_no_link():
    cost = np.random.default_rng(0).random((4, 6))
    a, b, epsilon, tau = np.full(4, 1 / 4), np.full(6, 1 / 6), 0.1, 0.3
    near, far = (
        ot.unbalanced.sinkhorn_unbalanced(a, b, shifted, epsilon, tau, reg_type="kl", stopThr=1e-14, numItermax=10**5)
        for shifted in (cost, cost + 1)
    )
    np.testing.assert_allclose(far, near * math.exp(-1 / (epsilon + 2 * tau)), rtol=1e-6)
    for method in ("threshold", "mutual_argmax"):
        links = [pairs(extract_links(make_alignment(plan, a, b), method, 1.5)) for plan in (near, far)]
        assert links[0] == links[1] != []


SOURCE_WORDS, TARGET_WORDS = [0, 0, 1, 2], [0, 1, 1, 2, 2]


def by_any_piece(linked):
    return sorted({(SOURCE_WORDS[row], TARGET_WORDS[column]) for row, column in linked})


@pytest.mark.parametrize("threshold", [1e-3, 0.1, 0.4])
def test_softmax_links_by_definition(threshold):
    source, target = torch.randn(4, 6), torch.randn(5, 6)
    similarity = [[float(x @ y) for y in target] for x in source]
    linked = []
    for row, column in product(range(4), range(5)):
        forward = math.exp(similarity[row][column]) / sum(math.exp(value) for value in similarity[row])
        backward = math.exp(similarity[row][column]) / sum(math.exp(other[column]) for other in similarity)
        if forward > threshold and backward > threshold:
            linked.append((row, column))
    states = make_states(source, target, SOURCE_WORDS, TARGET_WORDS)
    assert pairs(softmax_links(states, threshold)) == by_any_piece(linked) != []


def test_argmax_links_by_definition():
    source, target = torch.randn(4, 6) * torch.tensor([[1.0], [9.0], [0.1], [1.0]]), torch.randn(5, 6)
    similarity = [[float(torch.cosine_similarity(x, y, dim=0)) for y in target] for x in source]
    linked = [
        (row, column)
        for row, column in product(range(4), range(5))
        if similarity[row][column] == max(similarity[row])
        and similarity[row][column] == max(other[column] for other in similarity)
    ]
    links = argmax_links(make_states(source, target, SOURCE_WORDS, TARGET_WORDS))
    assert pairs(links) == by_any_piece(linked) != []
    assert max(link.weight for link in links) == pytest.approx(max(map(max, similarity)), abs=1e-6)


@pytest.mark.parametrize(
    ("method", "threshold", "message"),
    [
        ("argmax", 1.0, "method 'argmax': it must be one of"),
        ("threshold", 0.0, "threshold 0.0: it must be above 0"),
        ("threshold", math.nan, "threshold nan: it must be above 0"),
    ],
)
def test_bad_methods_are_named(method, threshold, message):
    with pytest.raises(XLFAError, match=message):
        extract_links(make_alignment([[1.0]]), method, threshold)
