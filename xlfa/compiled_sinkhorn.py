"""Sinkhorn's algorithm as one compiled loop per pair, on the CPU (numba; the extra `compiled`).

Importing this module adds the back end `"compiled"` to `modeling_xlfa.transport_xlfa.BACKENDS`, where `"auto"` finds
it. The method is that of `modeling_xlfa/sinkhorn_xlfa.py`. What the loop adds: a pair's kernel stays in the processor's
cache, padding is never touched, and each pair has its own pace.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from modeling_xlfa.sinkhorn_xlfa import (
    ABSORB_EXPONENT,
    FIRST_BLOCK,
    LAST_BLOCK,
    MAX_EXPONENT,
    MAX_RELAXATION,
    MAX_SCALING_EXPONENT,
    MIN_EXPONENT,
    NEWTON_AFTER,
    NEWTON_BELOW,
    NEWTON_STEP,
    RAMP,
    TINY,
    TransportProblem,
    TransportResult,
    solve_with_torch,
)
from modeling_xlfa.transport_xlfa import BACKENDS

# Rows of the kernel are padded to whole vectors: the inner loops have no remainder.
LANES = 16

# Sums may be reordered and fused; NaN and infinities keep their meaning.
OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "arcp", "nsz", "afn"}}
# The constants above are compiled in: a change of theirs shows only once this file is newer than numba's cache.
jit = njit(cache=True, **OPTIONS)
inline = njit(inline="always", **OPTIONS)


@inline
def _exp(x):
    """exp for float32 in [-87, 88], relative error 1.2e-7 (Cephes); numba's own is not vectorised."""
    k = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - k * np.float32(0.693359375) + k * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)


@inline
def _log(x):
    """log for normal positive float32, relative error 1e-7 (Cephes)."""
    # Mantissa in [sqrt(1/2), sqrt(2)): the bits of sqrt(1/2) are taken off before the exponent is read.
    offset = np.float32(x).view(np.int32) - np.int32(0x3F3504F3)
    exponent = offset >> np.int32(23)
    m = np.int32((offset & np.int32(0x007FFFFF)) + np.int32(0x3F3504F3)).view(np.float32) - np.float32(1.0)
    e = np.float32(exponent)
    p = np.float32(7.0376836292e-2)
    p = p * m - np.float32(1.1514610310e-1)
    p = p * m + np.float32(1.1676998740e-1)
    p = p * m - np.float32(1.2420140846e-1)
    p = p * m + np.float32(1.4249322787e-1)
    p = p * m - np.float32(1.6668057665e-1)
    p = p * m + np.float32(2.0000714765e-1)
    p = p * m - np.float32(2.4999993993e-1)
    p = p * m + np.float32(3.3333331174e-1)
    square = m * m
    return (
        m + (p * m * square - np.float32(0.5) * square + e * np.float32(-2.12194440e-4)) + e * np.float32(0.693359375)
    )


class _Pair(NamedTuple):
    """What `_Sweeps` holds of one pair, without its padding: arrays of n, of m, or n x m entries.

    Arrays over the columns that meet the kernel are as wide as its rows: m rounded up to whole vectors.
    """

    reduced: np.ndarray
    kernel: np.ndarray
    a: np.ndarray
    b: np.ndarray
    phi: np.ndarray
    gamma: np.ndarray
    row: np.ndarray
    column: np.ndarray
    # Marginal times scaling, the kernel's products with the other side's, and what soft marginals take from an update.
    row_weights: np.ndarray
    column_weights: np.ndarray
    row_product: np.ndarray
    column_product: np.ndarray
    row_shift: np.ndarray
    column_shift: np.ndarray


@jit
def _new_pair(n, m):
    width = (m + LANES - 1) // LANES * LANES
    return _Pair(
        np.empty((n, width), dtype=np.float32),
        np.empty((n, width), dtype=np.float32),
        np.empty(n, dtype=np.float32),
        np.zeros(width, dtype=np.float32),
        np.empty(n),
        np.empty(m),
        np.empty(n, dtype=np.float32),
        np.zeros(width, dtype=np.float32),
        np.empty(n, dtype=np.float32),
        np.zeros(width, dtype=np.float32),
        np.empty(n, dtype=np.float32),
        np.zeros(width, dtype=np.float32),
        np.empty(n, dtype=np.float32),
        np.empty(width, dtype=np.float32),
    )


@jit
def _start(pair, cost, rows, columns, epsilon, symmetric):
    """R by c-transforms, or by half the diagonal for a sentence against itself, as `start` of the torch classes."""
    reduced, phi, gamma = pair.reduced, pair.phi, pair.gamma
    n, m = phi.size, gamma.size
    scale = 1 / np.float64(epsilon)
    line, smallest = np.empty(m, dtype=np.float32), np.full(m, np.float32(np.inf))
    if symmetric:
        for j in range(m):
            smallest[j] = cost[rows[j], columns[j]] * scale / 2
    for i in range(n):
        _gather(line, cost[rows[i]], columns)
        base = np.float64(smallest[i]) if symmetric else _smallest(line) * scale
        phi[i] = base
        for j in range(m):
            reduced[i, j] = line[j] * scale - base
        if not symmetric:
            for j in range(m):
                smallest[j] = min(smallest[j], reduced[i, j])
    for i in range(n):
        for j in range(m):
            reduced[i, j] -= smallest[j]
    gamma[:] = smallest


# A minimum is vectorised only where NaN is ruled out, as the checks of `sinkhorn` do.
@njit(nogil=True, fastmath=True)
def _smallest(line):
    smallest = line[0]
    for j in range(line.size):
        smallest = min(smallest, line[j])
    return smallest


@jit
def _copy(source, target):
    # A slice assignment checks for overlap and goes entry by entry.
    for j in range(target.size):
        target[j] = source[j]


@jit
def _gather(line, source, columns):
    """The tokens' entries of a row; in one piece where no hole is between them."""
    first, count = columns[0], line.size
    if columns[count - 1] - first == count - 1:
        _copy(source[first : first + count], line)
    else:
        for j in range(count):
            line[j] = source[columns[j]]


@jit
def _scatter(target, columns, line):
    """The reverse of `_gather`."""
    first, count = columns[0], columns.size
    if columns[count - 1] - first == count - 1:
        _copy(line, target[first : first + count])
    else:
        for j in range(count):
            target[columns[j]] = line[j]


@jit
def _row_products(kernel, weights, products):
    """products_i = sum_j K_ij weights_j. Four rows at a time: a weight is read once for all of them."""
    n, width = products.size, kernel.shape[1]
    for i in range(0, n - 3, 4):
        s0 = s1 = s2 = s3 = np.float32(0.0)
        for j in range(width):
            w = weights[j]
            s0 += kernel[i, j] * w
            s1 += kernel[i + 1, j] * w
            s2 += kernel[i + 2, j] * w
            s3 += kernel[i + 3, j] * w
        products[i], products[i + 1], products[i + 2], products[i + 3] = s0, s1, s2, s3
    for i in range(n - n % 4, n):
        s0 = np.float32(0.0)
        for j in range(width):
            s0 += kernel[i, j] * weights[j]
        products[i] = s0


@jit
def _column_products(kernel, weights, products):
    """products_j = sum_i weights_i K_ij. Four rows at a time: a product is read and written once for all of them."""
    n, width = weights.size, kernel.shape[1]
    products[:] = np.float32(0.0)
    for i in range(0, n - 3, 4):
        w0, w1, w2, w3 = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        for j in range(width):
            products[j] += kernel[i, j] * w0 + kernel[i + 1, j] * w1 + kernel[i + 2, j] * w2 + kernel[i + 3, j] * w3
    for i in range(n - n % 4, n):
        w0 = weights[i]
        for j in range(width):
            products[j] += kernel[i, j] * w0


@jit
def _build_kernel(pair, exponent):
    """K = exp(-R), 0 in the padding of its rows; the scalings start again from 1."""
    reduced, kernel, m = pair.reduced, pair.kernel, pair.gamma.size
    for i in range(pair.phi.size):
        for j in range(m):
            kernel[i, j] = _exp(min(max(-reduced[i, j], np.float32(MIN_EXPONENT)), np.float32(MAX_EXPONENT)))
        kernel[i, m:] = np.float32(0.0)
    pair.row[:], pair.column[:] = np.float32(0.0), np.float32(0.0)
    pair.row_weights[:], pair.column_weights[:] = pair.a, pair.b
    for i in range(pair.phi.size):
        pair.row_shift[i] = (exponent - 1) * pair.phi[i]
    for j in range(m):
        pair.column_shift[j] = (exponent - 1) * pair.gamma[j]
    _row_products(kernel, pair.column_weights, pair.row_product)


@jit
def _absorb(pair):
    """Move the scalings into the potentials; a new kernel must follow."""
    reduced, row, column, m = pair.reduced, pair.row, pair.column, pair.gamma.size
    for i in range(row.size):
        pair.phi[i] += row[i]
        for j in range(m):
            reduced[i, j] -= row[i] + column[j]
    for j in range(m):
        pair.gamma[j] += column[j]


@jit
def _move(scaling, weights, marginal, product, shift, weight, exponent, count):
    """Move the scaling's logarithm by `weight` times its way to the update; `weights` become marginal · exp(scaling).

    The update is -log product with hard marginals (exponent 1, shift 0). With soft ones the whole potential shrinks by
    the exponent tau / (tau + eps): the shift is what that takes from the part absorbed in the kernel.
    """
    limit = np.float32(MAX_SCALING_EXPONENT)
    for i in range(count):
        update = shift[i] - exponent * _log(product[i] + np.float32(TINY))
        moved = min(max(scaling[i] + weight * (update - scaling[i]), -limit), limit)
        scaling[i] = moved
        weights[i] = marginal[i] * _exp(moved)


@jit
def _sweeps(pair, count, age, exponent):
    """`count` updates of both scalings, the last one plain; the rows' products are those of the new columns."""
    kernel, a, b, row, column = pair.kernel, pair.a, pair.b, pair.row, pair.column
    row_weights, column_weights = pair.row_weights, pair.column_weights
    row_product, column_product = pair.row_product, pair.column_product
    row_shift, column_shift = pair.row_shift, pair.column_shift
    n, m = pair.phi.size, pair.gamma.size
    for step in range(count):
        relaxation = np.float32(1.0 if step == count - 1 else min(2 - RAMP / (RAMP + age), MAX_RELAXATION))
        _move(row, row_weights, a, row_product, row_shift, relaxation, exponent, n)
        _column_products(kernel, row_weights, column_product)
        _move(column, column_weights, b, column_product, column_shift, relaxation, exponent, m)
        _row_products(kernel, column_weights, row_product)


@jit
def _symmetric_sweeps(pair, count, exponent):
    """`count` averaged updates of the one scaling that serves both sides."""
    n, row_weights, column_weights = pair.phi.size, pair.row_weights, pair.column_weights
    half = np.float32(0.5)
    for _ in range(count):
        _move(pair.row, row_weights, pair.a, pair.row_product, pair.row_shift, half, exponent, n)
        column_weights[:n] = row_weights
        _row_products(pair.kernel, column_weights, pair.row_product)
    pair.column[:n] = pair.row


@jit
def _wanted(marginal, potential, softness):
    """What the plan's marginal is at the optimum; softness 0 means hard marginals."""
    return marginal * np.exp(-potential / softness) if softness > 0 else marginal


@jit
def _row_error(pair, softness):
    """L1 error of the rows' marginals."""
    error = 0.0
    for i in range(pair.phi.size):
        wanted = _wanted(np.float64(pair.a[i]), pair.phi[i] + pair.row[i], softness)
        error += abs(pair.row_weights[i] * pair.row_product[i] - wanted)
    return error


@jit
def _cholesky_solve(matrix, x, size):
    """Overwrite `x` by the solution y of matrix · y = x, from the lower triangle, which is overwritten too.

    False where the matrix is not positive definite.
    """
    for j in range(size):
        for i in range(j + 1):
            total = matrix[j, i]
            for k in range(i):
                total -= matrix[j, k] * matrix[i, k]
            if i < j:
                matrix[j, i] = total / matrix[i, i]
            else:
                if not total > 0:
                    return False
                matrix[j, j] = np.sqrt(total)
    for j in range(size):
        for k in range(j):
            x[j] -= matrix[j, k] * x[k]
        x[j] /= matrix[j, j]
    for j in range(size - 1, -1, -1):
        x[j] /= matrix[j, j]
        for k in range(j):
            x[k] -= matrix[j, k] * x[j]
    return True


@jit
def _newton(pair, softness, schur):
    """A damped Newton step on the dual (see `_Sweeps.newton`); the scalings are absorbed, a new kernel must follow."""
    reduced, kernel, phi, gamma, a, b = pair.reduced, pair.kernel, pair.phi, pair.gamma, pair.a, pair.b
    n, m = phi.size, gamma.size
    plan = np.empty((n, m))
    diagonal_a, diagonal_b = np.zeros(n), np.zeros(m)
    for i in range(n):
        for j in range(m):
            plan[i, j] = np.float64(kernel[i, j]) * a[i] * b[j]
            diagonal_a[i] += plan[i, j]
            diagonal_b[j] += plan[i, j]
    step_a, step_b = np.empty(n), np.empty(m)
    for step, diagonal, marginal, potential in (
        (step_a, diagonal_a, a, phi),
        (step_b, diagonal_b, b, gamma),
    ):
        for i in range(step.size):
            wanted = _wanted(np.float64(marginal[i]), potential[i], softness)
            step[i] = wanted - diagonal[i]
            if softness > 0:
                diagonal[i] += wanted / softness
    for j in range(m):
        for k in range(j + 1):
            # With hard marginals a constant shift between the sides changes nothing: it is held at 0.
            schur[j, k] = 0.0 if softness > 0 else np.float64(b[j]) * b[k]
        schur[j, j] += diagonal_b[j]
    for i in range(n):
        scale = 1 / diagonal_a[i]
        residual = step_a[i] * scale
        for j in range(m):
            factor = plan[i, j] * scale
            step_b[j] -= plan[i, j] * residual
            for k in range(j + 1):
                schur[j, k] -= factor * plan[i, k]
    if not _cholesky_solve(schur, step_b, m):
        return
    for i in range(n):
        for j in range(m):
            step_a[i] -= plan[i, j] * step_b[j]
        step_a[i] /= diagonal_a[i]
    longest = max(np.abs(step_a).max(), np.abs(step_b).max())
    length = min(1.0, NEWTON_STEP / longest) if longest > 0 else 0.0
    for i in range(n):
        phi[i] += length * step_a[i]
        for j in range(m):
            reduced[i, j] -= np.float32(length * (step_a[i] + step_b[j]))
    for j in range(m):
        gamma[j] += length * step_b[j]


@jit
def _iterate(pair, softness, symmetric, max_iter, tol):
    """Sweeps and Newton steps until convergence, as in `solve_with_torch`: their number, and whether it was reached."""
    exponent = np.float32(softness / (softness + 1) if softness > 0 else 1.0)
    schur = np.empty((0, 0))
    count, age, block, newton_after, last_error = 0, 0, FIRST_BLOCK, NEWTON_AFTER, np.inf
    _build_kernel(pair, exponent)
    while True:
        block = min(block, max_iter - count)
        if symmetric:
            _symmetric_sweeps(pair, block, exponent)
        else:
            _sweeps(pair, block, age, exponent)
        count, age = count + block, age + block
        error = _row_error(pair, softness) * (2 if symmetric else 1)
        stretched = max(np.abs(pair.row).max(), np.abs(pair.column).max()) > ABSORB_EXPONENT
        if error <= tol and not stretched:
            return count, True
        if count >= max_iter:
            return count, False
        if error > 2 * last_error:
            age = 0
        due = count >= newton_after or (error < last_error / 2 and count >= NEWTON_AFTER)
        newton = due and error < NEWTON_BELOW and not symmetric
        grown = min(LAST_BLOCK, block + block // 2)
        # At the pace of the last block; looking is cheap here, so the last blocks are as short as they need be.
        needed = block * np.log(error / tol) / np.log(last_error / error) if error < last_error < np.inf else np.inf
        block = grown if needed > grown else max(FIRST_BLOCK, int(needed) + 1)
        last_error = error
        if newton or stretched:
            _absorb(pair)
            _build_kernel(pair, exponent)
        if newton:
            if schur.shape[0] == 0:
                schur = np.empty((pair.gamma.size, pair.gamma.size))
            _newton(pair, softness, schur)
            _build_kernel(pair, exponent)
            newton_after, age, block = count + count // 2, 0, FIRST_BLOCK


@jit
def _finish(pair, softness, symmetric, plan, rows, columns):
    """Write the plan; dual value over epsilon, error of the marginals and entropy of the plan, as `_Sweeps.write`."""
    reduced, kernel, column, column_weights = pair.reduced, pair.kernel, pair.column, pair.column_weights
    n, m = pair.phi.size, pair.gamma.size
    line, found = np.empty(m, dtype=np.float32), np.zeros(m, dtype=np.float32)
    dual = error = entropy = mass = 0.0
    for i in range(n):
        weight = pair.row_weights[i]
        for j in range(m):
            line[j] = kernel[i, j] * weight * column_weights[j]
        row_mass = logarithm = np.float32(0.0)
        for j in range(m):
            found[j] += line[j]
            row_mass += line[j]
        for j in range(m):
            logarithm += line[j] * (column[j] - reduced[i, j])
        _scatter(plan[rows[i]], columns, line)
        mass += row_mass
        potential = pair.phi[i] + pair.row[i]
        wanted = _wanted(np.float64(pair.a[i]), potential, softness)
        error += abs(row_mass - wanted)
        if row_mass > 0:
            entropy -= logarithm + row_mass * (np.log(pair.a[i]) + pair.row[i] - np.log(row_mass))
        dual += softness * (pair.a[i] - wanted) if softness > 0 else pair.a[i] * potential
    for j in range(m):
        potential = pair.gamma[j] + column[j]
        wanted = _wanted(np.float64(pair.b[j]), potential, softness)
        error += abs(found[j] - wanted)
        entropy -= found[j] * np.log(pair.b[j])
        dual += softness * (pair.b[j] - wanted) if softness > 0 else pair.b[j] * potential
    # Hard marginals of the columns have just been met: what mass is missing there is rounding.
    if softness > 0 or symmetric:
        dual += 1 - mass
    return dual, error, entropy / max(mass, TINY)


@jit
def _solve_pairs(
    order,
    cost,
    epsilon,
    source_marginal,
    target_marginal,
    tau,
    symmetric,
    max_iter,
    tol,
    value,
    source_potential,
    target_potential,
    iterations,
    marginal_error,
    converged,
    plan_entropy,
    plan,
):
    """Solve the pairs `order` one after the other and write what `TransportResult` holds of them; tau 0 is hard.

    The outputs hold an empty pair's result already, and its zeros where there is no token.
    """
    for index in order:
        rows, columns = source_marginal[index].nonzero()[0], target_marginal[index].nonzero()[0]
        if rows.size == 0 or columns.size == 0:
            continue
        pair = _new_pair(rows.size, columns.size)
        for i in range(rows.size):
            pair.a[i] = source_marginal[index, rows[i]]
        for j in range(columns.size):
            pair.b[j] = target_marginal[index, columns[j]]
        softness = tau[index] / epsilon[index]
        _start(pair, cost[index], rows, columns, epsilon[index], symmetric)
        iterations[index], converged[index] = _iterate(pair, softness, symmetric, max_iter, tol)
        dual, error, entropy = _finish(pair, softness, symmetric, plan[index], rows, columns)
        value[index], marginal_error[index], plan_entropy[index] = epsilon[index] * dual, error, entropy
        for i in range(rows.size):
            source_potential[index, rows[i]] = (pair.phi[i] + pair.row[i]) * epsilon[index]
        for j in range(columns.size):
            target_potential[index, columns[j]] = (pair.gamma[j] + pair.column[j]) * epsilon[index]


# torch.compile would trace into what numba has compiled.
@torch.compiler.disable
def solve_compiled(problem: TransportProblem) -> TransportResult:
    """Solve every pair of the batch on torch's number of threads; see `sinkhorn` in `transport_xlfa.py`.

    The loop is float32 with float64 potentials; float64 costs, which want more, go to `solve_with_torch`.
    """
    if problem.cost.dtype != torch.float32:
        return solve_with_torch(problem)
    pairs = len(problem.cost)
    result = TransportResult.of_empty_pairs(problem)
    tau = torch.zeros(pairs) if problem.tau is None else problem.tau
    inputs = (problem.cost, problem.epsilon, problem.source_marginal, problem.target_marginal, tau)
    outputs = (
        result.value,
        result.source_potential,
        result.target_potential,
        result.iterations,
        result.marginal_error,
        result.converged,
        result.plan_entropy,
        result.plan,
    )
    arguments = (
        *(tensor.contiguous().numpy() for tensor in inputs),
        problem.symmetric,
        problem.max_iter,
        problem.tol,
        *(tensor.numpy() for tensor in outputs),
    )
    threads = min(torch.get_num_threads(), pairs)
    if threads == 1:
        _solve_pairs(np.arange(pairs), *arguments)
        return result
    # Large pairs first and several portions a thread: what a pair costs is known only when it is solved.
    tokens = (problem.source_marginal > 0).sum(1) * (problem.target_marginal > 0).sum(1)
    order = tokens.argsort(descending=True).numpy()
    portions = [order[start :: 4 * threads] for start in range(min(4 * threads, pairs))]
    list(_pool(os.getpid(), threads).map(lambda portion: _solve_pairs(portion, *arguments), portions))
    return result


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has the parent's pool object, but none of its threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="xlfa-sinkhorn")


BACKENDS["compiled"] = solve_compiled
