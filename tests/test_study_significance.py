"""Permutations within seeds, omega squared, Holm and detectable effects: by hand, by formula and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from xlfa.study.significance import (
    MOST_ARRANGEMENTS,
    Response,
    arrange,
    detectable_effect,
    holm,
    omega_squared,
    paired_t,
    permutation_test,
    pooled_deviation,
    seed_weights,
    slopes_by_seed,
)


def response(values, positions=True):
    """Of a table, seeds x levels; NaN where a pair is missing."""
    values = np.asarray(values, dtype=float)
    seeds, levels = np.nonzero(~np.isnan(values))
    places = np.arange(values.shape[1], dtype=float) if positions else None
    return Response(values[seeds, levels], seeds, levels, places)


@pytest.fixture(scope="module")
def null_tests():
    """Tests of 400 studies of 4 seeds and 3 levels without an effect, and their raw shares of variance."""
    rng = np.random.default_rng(0)
    tests, shares = [], []
    for _ in range(400):
        values = rng.normal(size=(4, 3)) + 5 * rng.normal(size=(4, 1))
        tests.append(permutation_test(response(values)))
        centred = values - values.mean(1, keepdims=True)
        shares.append(4 * np.square(centred.mean(0)).sum() / np.square(centred).sum())
    return tests, shares


def test_p_values_are_uniform_where_there_is_no_effect(null_tests):
    for name in ("slope_p", "omega_squared_p"):
        p = np.array([getattr(test, name) for test in null_tests[0]])
        # 0.05 ± 2.6 standard errors of 400 studies; exact tests reject at most as often as they say.
        assert 0.02 <= (p < 0.05).mean() <= 0.08
        assert p.mean() == pytest.approx(0.5, abs=0.05)
        assert stats.kstest(p, "uniform").pvalue > 0.001


def test_omega_squared_of_noise_is_near_its_null_mean_and_the_raw_share_is_not_near_zero(null_tests):
    tests, shares = null_tests
    found = np.mean([test.omega_squared for test in tests])
    assert found == pytest.approx(np.mean([test.null_mean for test in tests]), abs=0.03)
    assert found == pytest.approx(0, abs=0.05)
    # 2 of 2 + 6 degrees of freedom.
    assert np.mean(shares) == pytest.approx(0.25, abs=0.04)
    above = [test.omega_squared > test.null_high for test in tests]
    assert np.mean(above) == pytest.approx(0.05, abs=0.03)


def test_a_planted_slope_is_found():
    rng = np.random.default_rng(1)
    tests = [permutation_test(response(rng.normal(size=(5, 3)) + 2 * np.arange(3))) for _ in range(50)]
    assert np.mean([test.slope_p < 0.05 for test in tests]) > 0.95
    assert np.mean([test.slope for test in tests]) == pytest.approx(2, abs=0.2)
    assert np.mean([test.omega_squared for test in tests]) > 0.5


def test_slope_and_p_by_hand():
    # Slopes of the two seeds are 1 and 3; flipping none, one or both gives 2, 1 (-1 and 3), -1 and -2.
    test = permutation_test(response([[0, 1], [5, 8]]))
    assert (test.slope, test.slope_p, test.smallest_slope_p) == (2, 0.5, 0.5)
    assert (test.arrangements, test.exact) == (4, True)


def test_omega_squared_by_hand():
    # Levels: 3 (1 + 0 + 1) = 6 with 2 degrees of freedom; error: 1 with 4; F = 3 / 0.25 = 12.
    table = np.array([[-1, 0, 1], [-1, 0, 1], [-1, 0, 1]]) + np.array([[0.5, -0.5, 0], [-0.5, 0.5, 0], [0, 0, 0]])
    found = omega_squared(response(table + [[10], [20], [30]]), np.arange(9)[None])
    assert found == pytest.approx([2 * 11 / (2 * 11 + 9)])


def test_what_a_seed_adds_to_all_levels_does_not_matter():
    values = np.random.default_rng(2).normal(size=(4, 3))
    a, b = (permutation_test(response(each)) for each in (values, values + 100 * np.arange(4)[:, None]))
    for name in ("slope", "slope_p", "omega_squared", "omega_squared_p", "null_mean"):
        assert getattr(a, name) == pytest.approx(getattr(b, name))


def test_missing_pairs_are_no_effect():
    values = np.arange(5.0)[:, None] + np.zeros(4)
    values[0, 3] = values[2, 0] = math.nan
    test = permutation_test(response(values))
    assert test.slope == pytest.approx(0, abs=1e-12)
    assert test.slope_p == test.omega_squared_p == 1
    values += np.arange(4.0)
    assert permutation_test(response(values)).slope == pytest.approx(1)


def test_levels_without_an_order_have_no_slope():
    test = permutation_test(response(np.random.default_rng(3).normal(size=(3, 4)), positions=False))
    assert test.slope is test.slope_p is test.smallest_slope_p is None
    assert 0 < test.smallest_omega_p <= test.omega_squared_p <= 1


def test_one_seed_leaves_nothing_for_the_error():
    test = permutation_test(response([[1, 2, 3]]))
    assert test.omega_squared is None
    # 123 and 321 of 6 orders.
    assert test.slope_p == test.smallest_slope_p == pytest.approx(1 / 3)


def test_many_arrangements_are_drawn_and_hold_the_observed_one():
    seeds = np.repeat(np.arange(5), 6)
    arrangements, exact = arrange(seeds)
    assert (len(arrangements), exact) == (MOST_ARRANGEMENTS + 1, False)
    assert (arrangements[0] == np.arange(30)).all()
    assert (np.sort(arrangements, axis=1) == np.arange(30)).all()
    assert (seeds[arrangements] == seeds).all()
    test = permutation_test(response(np.tile(np.arange(6.0), (5, 1))))
    assert test.slope_p == 1 / (MOST_ARRANGEMENTS + 1)


def test_all_arrangements_are_different():
    arrangements, exact = arrange(np.array([0, 1, 0, 1, 1]))
    assert exact
    assert len({tuple(row) for row in arrangements.tolist()}) == len(arrangements) == 2 * 6


def test_holm_by_hand():
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_share_of_studies_with_a_false_finding():
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(1000):
        # Differences of six levels to one baseline: the baseline's noise is in all of them.
        differences = rng.normal(size=(5, 6)) - rng.normal(size=(5, 1))
        wrong += min(holm([paired_t(column) for column in differences.T])) < 0.05
    assert 0.005 < wrong / 1000 < 0.065


def test_paired_t_is_the_t_test():
    differences = np.array([0.3, 1.2, -0.4, 0.9])
    t = differences.mean() / (differences.std(ddof=1) / 2)
    assert paired_t(differences) == pytest.approx(2 * stats.t.sf(t, 3))
    assert paired_t(np.array([1.0])) is paired_t(np.array([1.0, 1.0])) is None


@pytest.mark.parametrize("degrees", [4, 9, 30])
def test_the_detectable_effect_is_that_of_the_noncentral_t(degrees):
    effect = detectable_effect(1.0, degrees)
    critical = stats.t.ppf(0.975, degrees)
    power = stats.nct.sf(critical, degrees, effect) + stats.nct.cdf(-critical, degrees, effect)
    assert power == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_detectable_effect_is_detected_in_four_of_five_studies(seeds):
    effect = detectable_effect(1.5 / math.sqrt(seeds), seeds - 1)
    samples = effect + 1.5 * np.random.default_rng(5).normal(size=(40000, seeds))
    assert (stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)


def test_slopes_of_seeds_by_hand():
    # Missing pairs leave a seed the levels that it has.
    assert slopes_by_seed(response([[0, 1, 2], [5, math.nan, 1], [1, 1, 1]])) == pytest.approx([1, -2, 0])
    assert detectable_effect(1.0, 0) is None


def test_slopes_that_differ_by_seed_are_told_by_the_t_test_over_seeds_alone():
    rng = np.random.default_rng(6)
    permutation, over_seeds = [], []
    for _ in range(200):
        own = response(rng.normal(size=(4, 1)) * (np.arange(3) - 1) + 0.3 * rng.normal(size=(4, 3)))
        permutation.append(permutation_test(own).slope_p)
        over_seeds.append(paired_t(slopes_by_seed(own)))
    # The mean slope is 0: 0.05 ± 2.6 standard errors of 200 studies.
    assert 0.01 <= np.mean(np.array(over_seeds) < 0.05) <= 0.09
    assert np.mean(np.array(permutation) < 0.05) > 0.12


def test_pooled_deviation_by_hand():
    # (2 + 8) / (1 + 1)
    assert pooled_deviation([np.array([1.0, 3.0]), np.array([0.0, 4.0])]) == pytest.approx(math.sqrt(5))
    assert pooled_deviation([np.array([1.0]), np.array([])]) is None


@pytest.mark.parametrize("number", [2, 3, 5])
def test_draws_of_seeds_vary_as_the_mean_does(number):
    values = np.random.default_rng(7).normal(size=number)
    weights = seed_weights(number, 40000)
    assert weights.sum(1) == pytest.approx(np.ones(40000))
    assert (weights @ values).var() == pytest.approx(values.var(ddof=1) / number, rel=0.05)


def test_one_seed_is_always_drawn():
    assert (seed_weights(1, 7) == np.ones((7, 1))).all()
