"""Tests for few seeds: permutations within seeds, omega squared, Holm, and the smallest effect that can be detected."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import ndtr

ALPHA = 0.05
POWER = 0.8
# All rearrangements are tried where there are no more than this, else as many random ones.
MOST_ARRANGEMENTS = 9999


@dataclass(frozen=True)
class Response:
    """One number for each pair of a seed and a level of the grid's field; not every pair need be there.

    Attributes:
        values: N.
        seeds: numbers of the blocks, N.
        levels: numbers of the levels, N.
        positions: of the levels on an axis, L; None for levels without an order.
    """

    values: np.ndarray
    seeds: np.ndarray
    levels: np.ndarray
    positions: np.ndarray | None

    def centred_positions(self) -> np.ndarray:
        """Positions less the mean position of the seed, N: what a slope within seeds is a sum over."""
        position = self.positions[self.levels]
        return position - within(position, self.seeds)


@dataclass(frozen=True)
class PermutationTest:
    """What permuting the levels within seeds says about a response.

    Attributes:
        slope: per unit of the axis, pooled within seeds; None for levels without an order.
        slope_p: two-sided p value of no slope.
        smallest_slope_p: no arrangement of these values has a smaller one.
        omega_squared: partial, of the levels as a factor; None where nothing is left for the error.
        omega_squared_p: p value of no difference between levels.
        smallest_omega_p: no arrangement of these values has a smaller one.
        null_mean, null_high: mean and 95 % quantile of omega squared over the arrangements.
        arrangements: how many were tried.
        exact: whether these are all there are.
    """

    slope: float | None
    slope_p: float | None
    smallest_slope_p: float | None
    omega_squared: float | None
    omega_squared_p: float | None
    smallest_omega_p: float | None
    null_mean: float | None
    null_high: float | None
    arrangements: int
    exact: bool


def within(values: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """The mean of each value's block, N."""
    sums = np.bincount(blocks, weights=values)
    return (sums / np.maximum(np.bincount(blocks), 1))[blocks]


def arrange(seeds: np.ndarray) -> tuple[np.ndarray, bool]:
    """Rearrangements of N values within their seeds, P x N indices, and whether they are all.

    Where all are more than `MOST_ARRANGEMENTS`, that many random ones follow the one that was observed.
    """
    return _arrange(tuple(seeds.tolist()))


@functools.lru_cache(maxsize=16)
def _arrange(seeds: tuple[int, ...]) -> tuple[np.ndarray, bool]:
    members = [np.flatnonzero(np.array(seeds) == number) for number in sorted(set(seeds))]
    observed = np.concatenate(members)
    exact = math.prod(math.factorial(len(own)) for own in members) <= MOST_ARRANGEMENTS
    if exact:
        orders = itertools.product(*(itertools.permutations(own.tolist()) for own in members))
        permuted = np.array([list(itertools.chain(*order)) for order in orders])
    else:
        rng = np.random.default_rng(0)
        shuffled = [rng.permuted(np.tile(own, (MOST_ARRANGEMENTS, 1)), axis=1) for own in members]
        permuted = np.concatenate([observed[None], np.concatenate(shuffled, axis=1)])
    indices = np.empty_like(permuted)
    indices[:, observed] = permuted
    return indices, exact


def slopes(response: Response, arrangements: np.ndarray) -> np.ndarray:
    """Least-squares slope with an intercept for each seed, P."""
    x = response.centred_positions()
    return response.values[arrangements] @ x / (x @ x)


def slopes_by_seed(response: Response) -> np.ndarray:
    """Each seed's own least-squares slope, in the order of the seeds, each of which has two levels at least.

    Permuting levels within seeds asks whether these seeds depend on the axis at all. Where each of them has a slope of
    its own, about a mean of 0, that is so, and the permutation test rejects the oftener the more levels there are. Only
    the spread of the slopes over seeds says what other seeds would do.
    """
    x = response.centred_positions()
    return np.bincount(response.seeds, weights=x * response.values) / np.bincount(response.seeds, weights=x * x)


def omega_squared(response: Response, arrangements: np.ndarray) -> np.ndarray | None:
    """Partial omega squared of the levels, with seeds as blocks, P; None without degrees of freedom for the error.

    omega² = k (F - 1) / (k (F - 1) + N) with k degrees of freedom of the levels (Keppel 1991, chapter 16; Olejnik and
    Algina 2003, equation 9). Its expectation is about 0 where levels make no difference, unlike that of the share of
    variance, SS_levels / SS_total, which is k / (k + error degrees of freedom) then. It may be negative.
    """
    number = len(response.values)
    blocks = np.eye(response.seeds.max() + 1)[response.seeds]
    full = np.concatenate([blocks, np.eye(response.levels.max() + 1)[response.levels]], axis=1)
    degrees = np.linalg.matrix_rank(full) - np.linalg.matrix_rank(blocks)
    error_degrees = number - np.linalg.matrix_rank(full)
    if degrees < 1 or error_degrees < 1:
        return None
    values = response.values[arrangements] - within(response.values, response.seeds)
    error = np.square(values - values @ (full @ np.linalg.pinv(full))).sum(-1)
    total = np.square(values).sum(-1)
    # Rounding must not make an error of 0 a huge F, nor a constant response an effect.
    floor = 1e-12 * max(float(np.square(response.values).sum()), np.finfo(float).tiny)
    f = ((total - error) / degrees + floor) / (error / error_degrees + floor)
    return degrees * (f - 1) / (degrees * (f - 1) + number)


def permutation_test(response: Response) -> PermutationTest:
    """Whether levels make a difference to the response, by permuting their labels within each seed.

    A seed is a block: it gives every level the same head, data and order of pairs, and what it adds to all levels does
    not matter. Exact where all arrangements are tried (Fisher 1935); with random ones the observed one is counted in,
    so that p is valid (Phipson and Smyth 2010).
    """
    arrangements, exact = arrange(response.seeds)
    slope = slope_p = smallest = None
    if response.positions is not None:
        found = slopes(response, arrangements)
        slope = float(response.values @ response.centred_positions() / np.square(response.centred_positions()).sum())
        slope_p = _share_as_large(np.abs(found), abs(slope))
        smallest = _share_as_large(np.abs(found), float(np.abs(found).max()))
    omegas = omega_squared(response, arrangements)
    omega = omega_p = smallest_omega = null_mean = null_high = None
    if omegas is not None:
        omega = float(omega_squared(response, np.arange(len(response.values))[None])[0])
        omega_p, smallest_omega = (_share_as_large(omegas, value) for value in (omega, float(omegas.max())))
        null_mean, null_high = float(omegas.mean()), float(np.quantile(omegas, 1 - ALPHA))
    return PermutationTest(
        slope=slope,
        slope_p=slope_p,
        smallest_slope_p=smallest,
        omega_squared=omega,
        omega_squared_p=omega_p,
        smallest_omega_p=smallest_omega,
        null_mean=null_mean,
        null_high=null_high,
        arrangements=len(arrangements),
        exact=exact,
    )


def _share_as_large(values: np.ndarray, observed: float) -> float:
    """Share of values that are at least the observed one, up to rounding."""
    return float((values >= observed - 1e-9 * max(abs(observed), 1e-12)).mean())


def paired_t(differences: np.ndarray) -> float | None:
    """Two-sided p value of Student's t test that differences by seed, n, have mean 0; None without spread."""
    # Equal differences of scores may differ by rounding.
    if len(differences) < 2 or np.ptp(differences) <= 1e-9 * max(1.0, float(np.abs(differences).max())):
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values adjusted to control the probability of any false rejection (Holm 1979); None stays, and counts for none.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none is below one before it.
    """
    adjusted: list[float | None] = [None] * len(p_values)
    tested = sorted((p, number) for number, p in enumerate(p_values) if p is not None)
    highest = 0.0
    for rank, (p, number) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        adjusted[number] = highest
    return adjusted


def pooled_deviation(samples: Sequence[np.ndarray]) -> float | None:
    """Standard deviation over seeds, pooled over conditions with their degrees of freedom; None without any."""
    degrees = sum(len(sample) - 1 for sample in samples if len(sample))
    if degrees < 1:
        return None
    return math.sqrt(sum(float(np.square(sample - sample.mean()).sum()) for sample in samples if len(sample)) / degrees)


def detectable_effect(standard_error: float, degrees: int, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """The smallest true effect that a two-sided t test rejects with probability `power`, in the unit of the error.

    The t value is (Z + effect / standard error) / S, with Z standard normal and S² a mean of `degrees` squared ones;
    the effect solves P(|t| > c) = power, c the critical value (Cohen 1988, chapter 2). For differences paired by n
    seeds the standard error is their deviation / sqrt(n), with n - 1 degrees of freedom. None without degrees of
    freedom.
    """
    return None if degrees < 1 else standard_error * _detectable_ratio(degrees, alpha, power)


@functools.cache
def _detectable_ratio(degrees: int, alpha: float, power: float) -> float:
    """The effect in standard errors."""
    # The expectation over S by its quantiles: scipy's noncentral t gives NaN in the far tail of one degree of freedom.
    nodes, weights = np.polynomial.legendre.leggauss(100)
    threshold = stats.t.ppf(1 - alpha / 2, degrees) * np.sqrt(stats.chi2.ppf((1 + nodes) / 2, degrees) / degrees)

    def shortfall(ratio: float) -> float:
        return float(weights @ (ndtr(ratio - threshold) + ndtr(-ratio - threshold))) / 2 - power

    upper = 2.0
    while shortfall(upper) < 0:
        upper *= 2
    return float(brentq(shortfall, 0.0, upper))


def seed_weights(number: int, draws: int, seed: int = 0) -> np.ndarray:
    """Weights of n seeds in each bootstrap draw, draws x n, with sum 1.

    Of n seeds n - 1 are drawn with replacement: the draws of a mean then have variance s² / n, where n of n would give
    a fraction 1 / n less, half of it for two seeds (Rao and Wu 1988, section 3; McCarthy and Snowden 1985).
    """
    if number == 1:
        return np.ones((draws, 1))
    drawn = np.random.default_rng([number, seed]).multinomial(number - 1, np.full(number, 1 / number), size=draws)
    return drawn / (number - 1)
