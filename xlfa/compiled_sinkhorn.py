"""Sinkhorn's algorithm as one compiled loop per pair, on the CPU (numba; the extra `compiled`).

Importing this module adds the back end `"compiled"` to `modeling_xlfa.transport_xlfa.BACKENDS`, where `"auto"` finds
it. The method is that of `modeling_xlfa/sinkhorn_xlfa.py`. What the loop adds: a pair's kernel stays in the processor's
cache, padding is never touched, and each pair has its own pace.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

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


@inline
def _zeros(size):
    return np.zeros(size, dtype=np.float32)


@jit
def _fill_kernel(reduced, kernel, n, m):
    """K = exp(-R); 0 in the padding of its rows."""
    for i in range(n):
        for j in range(m):
            exponent = min(max(-reduced[i, j], np.float32(MIN_EXPONENT)), np.float32(MAX_EXPONENT))
            kernel[i, j] = _exp(exponent)
        kernel[i, m:] = np.float32(0.0)


@jit
def _row_products(kernel, weights, products, n):
    """products_i = sum_j K_ij weights_j. Four rows at a time: each weight is read once for all of them."""
    width = kernel.shape[1]
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
def _column_products(kernel, weights, products, n):
    """products_j = sum_i weights_i K_ij. Four rows at a time: each product is read and written once for all of them."""
    width = kernel.shape[1]
    products[:width] = np.float32(0.0)
    for i in range(0, n - 3, 4):
        w0, w1, w2, w3 = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        for j in range(width):
            products[j] += kernel[i, j] * w0 + kernel[i + 1, j] * w1 + kernel[i + 2, j] * w2 + kernel[i + 3, j] * w3
    for i in range(n - n % 4, n):
        w0 = weights[i]
        for j in range(width):
            products[j] += kernel[i, j] * w0


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
def _set_shift(shift, potential, exponent, count):
    """What soft marginals take from the potential that the kernel has absorbed."""
    for i in range(count):
        shift[i] = (exponent - 1) * potential[i]


@jit
def _wanted(marginal, potential, softness):
    return marginal * np.exp(-potential / softness) if softness > 0 else marginal


@jit
def _marginal_error(weights, product, marginal, potential, scaling, softness, count):
    """sum_i |weights_i · product_i - wanted_i|."""
    error = 0.0
    for i in range(count):
        error += abs(weights[i] * product[i] - _wanted(marginal[i], potential[i] + scaling[i], softness))
    return error


@jit
def _absorb(reduced, kernel, phi, gamma, row, column, row_weights, column_weights, a, b, n, m):
    """Move the scalings into the potentials and make the kernel anew."""
    for i in range(n):
        phi[i] += row[i]
        for j in range(m):
            reduced[i, j] -= row[i] + column[j]
    for j in range(m):
        gamma[j] += column[j]
    row[:n], column[:m] = np.float32(0.0), np.float32(0.0)
    row_weights[:n], column_weights[:m] = a[:n], b[:m]
    _fill_kernel(reduced, kernel, n, m)


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
def _newton(reduced, kernel, phi, gamma, a, b, softness, n, m, schur):
    """A damped Newton step on the dual (see `_Sweeps.newton`), applied to R, the kernel and the potentials."""
    plan = np.empty((n, m))
    diagonal_a, diagonal_b = np.zeros(n), np.zeros(m)
    for i in range(n):
        for j in range(m):
            plan[i, j] = np.float64(kernel[i, j]) * a[i] * b[j]
            diagonal_a[i] += plan[i, j]
            diagonal_b[j] += plan[i, j]
    step_a, step_b = np.empty(n), np.empty(m)
    for i in range(n):
        wanted = _wanted(np.float64(a[i]), phi[i], softness)
        step_a[i] = wanted - diagonal_a[i]
        if softness > 0:
            diagonal_a[i] += wanted / softness
    for j in range(m):
        wanted = _wanted(np.float64(b[j]), gamma[j], softness)
        step_b[j] = wanted - diagonal_b[j]
        if softness > 0:
            diagonal_b[j] += wanted / softness
    for j in range(m):
        for k in range(j + 1):
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
    longest = 0.0
    for j in range(m):
        longest = max(longest, abs(step_b[j]))
    for i in range(n):
        for j in range(m):
            step_a[i] -= plan[i, j] * step_b[j]
        step_a[i] /= diagonal_a[i]
        longest = max(longest, abs(step_a[i]))
    length = min(1.0, NEWTON_STEP / longest) if longest > 0 else 0.0
    for i in range(n):
        phi[i] += length * step_a[i]
        for j in range(m):
            reduced[i, j] -= np.float32(length * (step_a[i] + step_b[j]))
    for j in range(m):
        gamma[j] += length * step_b[j]
    _fill_kernel(reduced, kernel, n, m)


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
    """Solve the pairs `order` one after the other and write what `TransportResult` holds of them; tau 0 is hard."""
    most_rows, most_columns = cost.shape[1:]
    width = (most_columns + LANES - 1) // LANES * LANES
    reduced_space = np.empty(most_rows * width, dtype=np.float32)
    kernel_space = np.empty(most_rows * width, dtype=np.float32)
    schur = np.empty((0, 0))
    rows, columns = np.empty(most_rows, dtype=np.int64), np.empty(most_columns, dtype=np.int64)
    # One array each: the rows of a common one would have strides that the compiler does not know.
    a, row, row_weights = _zeros(most_rows), _zeros(most_rows), _zeros(most_rows)
    b, column, column_weights = _zeros(width), _zeros(width), _zeros(width)
    row_product, row_shift = _zeros(most_rows), _zeros(most_rows)
    column_product, column_shift = _zeros(width), _zeros(width)
    phi, gamma = np.empty(most_rows), np.empty(most_columns)
    for pair in order:
        n = m = 0
        for i in range(most_rows):
            source_potential[pair, i] = np.float32(0.0)
            if source_marginal[pair, i] > 0:
                rows[n], a[n] = i, source_marginal[pair, i]
                n += 1
        for j in range(most_columns):
            target_potential[pair, j] = np.float32(0.0)
            if target_marginal[pair, j] > 0:
                columns[m], b[m] = j, target_marginal[pair, j]
                m += 1
        plan[pair] = np.float32(0.0)
        if n == 0 or m == 0:
            value[pair], marginal_error[pair], plan_entropy[pair] = 0, 0, 0
            iterations[pair], converged[pair] = 0, True
            continue
        stride = (m + LANES - 1) // LANES * LANES
        b[m:], column_weights[m:] = np.float32(0.0), np.float32(0.0)
        reduced = reduced_space[: n * stride].reshape(n, stride)
        kernel = kernel_space[: n * stride].reshape(n, stride)
        softness = tau[pair] / epsilon[pair]
        exponent = np.float32(softness / (softness + 1) if softness > 0 else 1.0)

        # c-transforms, or zero potentials for a sentence against itself.
        scale = 1 / np.float64(epsilon[pair])
        gamma[:m] = 0.0 if symmetric else np.inf
        for i in range(n):
            smallest = np.inf
            for j in range(m):
                smallest = min(smallest, np.float64(cost[pair, rows[i], columns[j]]))
            phi[i] = 0.0 if symmetric else smallest * scale
            for j in range(m):
                scaled = cost[pair, rows[i], columns[j]] * scale - phi[i]
                reduced[i, j] = scaled
                if not symmetric:
                    gamma[j] = min(gamma[j], scaled)
        for i in range(n):
            for j in range(m):
                reduced[i, j] -= gamma[j]
        row[:n], column[:m] = np.float32(0.0), np.float32(0.0)
        row_weights[:n], column_weights[:m] = a[:n], b[:m]
        _fill_kernel(reduced, kernel, n, m)
        _set_shift(row_shift, phi, exponent, n)
        _set_shift(column_shift, gamma, exponent, m)
        _row_products(kernel, column_weights, row_product, n)

        count, age, block, newton_after, last_error = 0, 0, FIRST_BLOCK, NEWTON_AFTER, np.inf
        done = False
        while True:
            block = min(block, max_iter - count)
            for step in range(block):
                if symmetric:
                    _move(row, row_weights, a, row_product, row_shift, np.float32(0.5), exponent, n)
                    _row_products(kernel, row_weights, row_product, n)
                    continue
                relaxation = np.float32(1.0 if step == block - 1 else min(2 - RAMP / (RAMP + age), MAX_RELAXATION))
                _move(row, row_weights, a, row_product, row_shift, relaxation, exponent, n)
                _column_products(kernel, row_weights, column_product, n)
                _move(column, column_weights, b, column_product, column_shift, relaxation, exponent, m)
                _row_products(kernel, column_weights, row_product, n)
            if symmetric:
                column[:m], column_weights[:m] = row[:n], row_weights[:n]
            count, age = count + block, age + block
            error = _marginal_error(row_weights, row_product, a, phi, row, softness, n) * (2 if symmetric else 1)
            stretched = max(np.abs(row[:n]).max(), np.abs(column[:m]).max()) > ABSORB_EXPONENT
            done = error <= tol and not stretched
            if done or count >= max_iter:
                break
            if error > 2 * last_error:
                age = 0
            due = count >= newton_after or (error < last_error / 2 and count >= NEWTON_AFTER)
            newton = due and error < NEWTON_BELOW and not symmetric
            last_error = error
            block = min(LAST_BLOCK, block + block // 2)
            if newton or stretched:
                _absorb(reduced, kernel, phi, gamma, row, column, row_weights, column_weights, a, b, n, m)
            if newton:
                if schur.shape[0] == 0:
                    schur = np.empty((most_columns, most_columns))
                _newton(reduced, kernel, phi, gamma, a, b, softness, n, m, schur)
                newton_after, age, block = count + count // 2, 0, FIRST_BLOCK
            if newton or stretched:
                _set_shift(row_shift, phi, exponent, n)
                _set_shift(column_shift, gamma, exponent, m)
                _row_products(kernel, column_weights, row_product, n)

        # As in `_Sweeps.write`: the dual value, and the entropy by the plan's exponents.
        dual = error = entropy = mass = 0.0
        column_product[:m] = np.float32(0.0)
        for i in range(n):
            found = 0.0
            logarithm = 0.0
            for j in range(m):
                entry = kernel[i, j] * row_weights[i] * column_weights[j]
                plan[pair, rows[i], columns[j]] = entry
                column_product[j] += entry
                found += entry
                logarithm += entry * (column[j] - reduced[i, j])
            mass += found
            potential = phi[i] + row[i]
            wanted = _wanted(np.float64(a[i]), potential, softness)
            error += abs(found - wanted)
            entropy -= logarithm + found * (np.log(a[i]) + row[i]) - found * np.log(found)
            dual += softness * (a[i] - wanted) if softness > 0 else a[i] * potential
            source_potential[pair, rows[i]] = potential * epsilon[pair]
        for j in range(m):
            potential = gamma[j] + column[j]
            wanted = _wanted(np.float64(b[j]), potential, softness)
            error += abs(column_product[j] - wanted)
            entropy -= column_product[j] * np.log(b[j])
            dual += softness * (b[j] - wanted) if softness > 0 else b[j] * potential
            target_potential[pair, columns[j]] = potential * epsilon[pair]
        if softness > 0 or symmetric:
            dual += 1 - mass
        value[pair], marginal_error[pair], plan_entropy[pair] = epsilon[pair] * dual, error, entropy / mass
        iterations[pair], converged[pair] = count, done


def solve_compiled(problem: TransportProblem) -> TransportResult:
    """Solve every pair of the batch on torch's number of threads; see `sinkhorn` in `transport_xlfa.py`.

    The loop is float32 with float64 potentials; float64 costs, which want more, go to `solve_with_torch`.
    """
    if problem.cost.dtype != torch.float32:
        return solve_with_torch(problem)
    pairs = len(problem.cost)
    result = TransportResult(
        value=torch.empty(pairs),
        source_potential=torch.empty_like(problem.source_marginal),
        target_potential=torch.empty_like(problem.target_marginal),
        iterations=torch.empty(pairs, dtype=torch.long),
        marginal_error=torch.empty(pairs),
        converged=torch.empty(pairs, dtype=torch.bool),
        plan_entropy=torch.empty(pairs),
        epsilon=problem.epsilon,
        plan=torch.empty_like(problem.cost),
    )
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
