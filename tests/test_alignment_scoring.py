"""Alignment scores against worked examples, nltk's published ones and the definitions on random links."""

import numpy as np
import pytest

from xlfa.alignment.formats import PharaohLinks
from xlfa.alignment.scoring import (
    AVERAGE,
    alignment_scores,
    error_name,
    link_counts,
    score_differences,
    score_sets,
)
from xlfa.errors import XLFAError


def gold(sure, possible=()):
    return PharaohLinks(frozenset(sure), frozenset(sure) | frozenset(possible))


def scores_of(proposed, golds, told_apart=True):
    return alignment_scores(link_counts(proposed, golds).sum(0), told_apart)


def random_sets(seed, sentences=12):
    generator = np.random.default_rng(seed)

    def links(density):
        return {(int(i), int(j)) for i, j in np.argwhere(generator.random((5, 6)) < density)}

    golds = [gold(links(0.2) | {(0, 0)}, links(0.2)) for _ in range(sentences)]
    return [links(0.25) for _ in range(sentences)], golds


def test_a_worked_example():
    # A = {00 11 12}, S = {00 22}, P = {00 22 11}: 1 hit of S, 2 of P.
    scores = scores_of([{(0, 0), (1, 1), (1, 2)}], [gold({(0, 0), (2, 2)}, {(1, 1)})])
    assert scores["precision"] == pytest.approx(100 * 2 / 3)
    assert scores["recall"] == pytest.approx(50)
    assert scores["aer"] == pytest.approx(100 * (1 - 3 / 5))
    assert scores["f1"] == pytest.approx(100 * 2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))


def test_the_published_example_of_nltk():
    # nltk.translate.metrics.alignment_error_rate's documentation: 0.6666666666666667.
    scores = scores_of([{(0, 0), (1, 2), (2, 1)}], [gold({(0, 0), (1, 1), (2, 2)})], told_apart=False)
    assert scores["aer_all_sure"] == pytest.approx(66.66666666666667)


def test_all_possible_links_without_the_sure_ones_cost_recall_only():
    scores = scores_of([{(1, 1)}], [gold({(0, 0)}, {(1, 1)})])
    assert (scores["precision"], scores["recall"], scores["aer"]) == (100, 0, 50)


def test_sums_run_over_the_corpus_and_not_over_means_of_sentences():
    # One short perfect sentence beside a long one without a hit.
    long = {(i, i) for i in range(9)}
    scores = scores_of([{(0, 0)}, {(i, i + 1) for i in range(9)}], [gold({(0, 0)}), gold(long)], told_apart=False)
    assert scores["aer_all_sure"] == pytest.approx(90)


@pytest.mark.parametrize("seed", range(5))
def test_random_links_agree_with_the_definitions(seed):
    proposed, golds = random_sets(seed)
    # Links as triples with their sentence's number, so that the definitions apply to the corpus as one set.
    everything = {(n, *link) for n, links in enumerate(proposed) for link in links}
    sure = {(n, *link) for n, each in enumerate(golds) for link in each.sure}
    possible = {(n, *link) for n, each in enumerate(golds) for link in each.possible}
    precision = sum(link in possible for link in everything) / len(everything)
    recall = sum(link in everything for link in sure) / len(sure)
    hits = sum((link in sure) + (link in possible) for link in everything)
    scores = scores_of(proposed, golds)
    assert scores["precision"] == pytest.approx(100 * precision)
    assert scores["recall"] == pytest.approx(100 * recall)
    assert scores["aer"] == pytest.approx(100 - 100 * hits / (len(everything) + len(sure)))
    assert scores["f1"] == pytest.approx(200 / (1 / precision + 1 / recall))


@pytest.mark.parametrize("seed", range(3))
def test_without_possible_links_the_error_rate_is_what_f1_lacks(seed):
    proposed, golds = random_sets(seed)
    scores = scores_of(proposed, [gold(each.sure) for each in golds], told_apart=False)
    assert scores["aer_all_sure"] == pytest.approx(100 - scores["f1"])


def test_no_proposed_link_is_all_wrong_and_no_division_by_zero():
    scores = scores_of([set(), set()], [gold({(0, 0)}), gold(set())])
    assert {name: float(value) for name, value in scores.items()} == {
        "aer": 100,
        "precision": 0,
        "recall": 0,
        "f1": 0,
    }


def test_a_link_proposed_twice_counts_once():
    golds = [gold({(0, 0)})]
    assert link_counts([[(0, 0), (0, 0)]], golds).tolist() == link_counts([{(0, 0)}], golds).tolist()


def test_the_error_rate_is_named_by_what_the_gold_tells():
    assert error_name(True) == "aer"
    assert error_name(False) == "aer_all_sure"
    assert "aer" not in alignment_scores(np.ones(4), told_apart=False)


def test_other_numbers_of_sentences_and_gold_without_links_are_refused():
    with pytest.raises(XLFAError, match="2 sentence pairs .* of 1"):
        link_counts([set(), set()], [gold({(0, 0)})])
    with pytest.raises(XLFAError, match="no sure link in 2"):
        link_counts([set(), set()], [gold(set()), gold(set(), {(0, 0)})])


def test_intervals_hold_their_score_and_agree_with_draws_by_hand():
    proposed, golds = random_sets(0, sentences=40)
    counts = link_counts(proposed, golds)
    found = score_sets({"set": {"one": counts}}, told_apart=True)["set"]["one"]
    drawn = np.random.default_rng(1).integers(0, 40, (4000, 40))
    for name in ("aer", "precision", "recall", "f1"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high
        by_hand = np.percentile(alignment_scores(counts[drawn].sum(1), True)[name], [2.5, 97.5])
        np.testing.assert_allclose([low, high], by_hand, atol=0.5)


def test_one_sentence_has_no_interval_and_one_set_no_average():
    counts = link_counts([{(0, 0)}], [gold({(0, 0)})])
    found = score_sets({"set": {"one": counts}}, told_apart=True)
    assert list(found) == ["set"]
    assert found["set"]["one"]["aer_interval"] is None


def test_the_average_is_the_mean_of_the_sets_whatever_their_sizes():
    counts = {
        name: {"one": link_counts(*random_sets(seed, sentences))}
        for name, seed, sentences in (("a", 1, 5), ("b", 2, 50))
    }
    found = score_sets(counts, told_apart=True, draws=99)
    assert found[AVERAGE]["one"]["f1"] == pytest.approx((found["a"]["one"]["f1"] + found["b"]["one"]["f1"]) / 2)


def test_differences_are_paired():
    proposed, golds = random_sets(3, sentences=30)
    counts = link_counts(proposed, golds)
    # The same alignment with one more wrong link in every sentence: always worse, by about the same.
    worse = link_counts([links | {(9, 9)} for links in proposed], golds)
    found = score_differences({"set": {"base": counts, "worse": worse, "same": counts}}, "base", True, draws=999)["set"]
    assert list(found) == ["worse", "same"]
    assert found["same"]["aer"] == 0 and found["same"]["aer_interval"] == [0, 0]
    low, high = found["worse"]["aer_interval"]
    assert 0 < low < found["worse"]["aer"] < high
    wide = score_sets({"set": {"base": counts}}, True, draws=999)["set"]["base"]["aer_interval"]
    assert high - low < wide[1] - wide[0]
