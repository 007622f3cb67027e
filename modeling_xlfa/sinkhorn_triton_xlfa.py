"""Sinkhorn's algorithm for a batch of small problems, as one Triton kernel.

One program solves one pair from the first sweep to its plan: a batch is a single launch, and a pair that has converged
costs nothing more. The sweeps are those of `sinkhorn_xlfa.py`, without the Newton steps.
"""

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError as error:
    raise ImportError("this back end needs the package triton: pip install triton (Linux)") from error

from .sinkhorn_xlfa import (
    ABSORB_EXPONENT,
    FIRST_BLOCK,
    LAST_BLOCK,
    MAX_EXPONENT,
    MAX_RELAXATION,
    MAX_SCALING_EXPONENT,
    MIN_EXPONENT,
    RAMP,
    TINY,
    TransportProblem,
    TransportResult,
)

# Most tokens of a side.
MAX_TOKENS = 256
# Entries of the kernel matrix K that stay in registers (128 KiB of an SM's 256). A larger K is written where the plan
# will be, and every sweep streams it from there by slabs of rows.
ON_CHIP_ENTRIES = 128 * 256
STREAMED_ROWS = 64

# A block of K has the shape M/16 x N x 16: column 16 k + l lies at [k, :, l]. A warp's lanes then cover 2 rows and 16
# columns, which halves both the shuffles of a sweep and the logarithms that lanes repeat; on a plain N x M block they
# would cover 1 row and 32 columns. Vectors over the rows are 1 x N x 1, over the columns M/16 x 1 x 16.
LANES = tl.constexpr(16)

# Kernels see no other globals than these.
_MIN_EXPONENT, _MAX_EXPONENT = tl.constexpr(MIN_EXPONENT), tl.constexpr(MAX_EXPONENT)
_ABSORB_EXPONENT, _MAX_SCALING_EXPONENT = tl.constexpr(ABSORB_EXPONENT), tl.constexpr(MAX_SCALING_EXPONENT)
_FIRST_BLOCK, _LAST_BLOCK = tl.constexpr(FIRST_BLOCK), tl.constexpr(LAST_BLOCK)
_RAMP, _MAX_RELAXATION = tl.constexpr(RAMP), tl.constexpr(MAX_RELAXATION)
_TINY = tl.constexpr(TINY)


def solve_with_triton(problem: TransportProblem) -> TransportResult:
    """Solve every pair of a float32 problem on a CUDA device, or on the CPU under Triton's interpreter.

    Raises:
        ValueError: for more than `MAX_TOKENS` tokens on a side, another type than float32, or another device.
    """
    cost = problem.cost
    pairs, n, m = cost.shape
    if max(n, m) > MAX_TOKENS:
        raise ValueError(f"the Triton back end takes at most {MAX_TOKENS} tokens a side, got {n} x {m}")
    if cost.dtype != torch.float32:
        raise ValueError(f"the Triton back end wants float32 costs, got {cost.dtype}")
    if not cost.is_cuda and not _INTERPRETED:
        raise ValueError(f"the Triton back end wants costs on a CUDA device, got {cost.device}")

    epsilon = problem.epsilon.contiguous()
    a, b = problem.source_marginal.contiguous(), problem.target_marginal.contiguous()
    result = TransportResult.of_empty_pairs(problem)
    rows, columns = (max(LANES.value, triton.next_power_of_2(size)) for size in (n, m))
    slab = rows if rows * columns <= ON_CHIP_ENTRIES else STREAMED_ROWS
    with torch.cuda.device_of(cost):
        _solve_pair[(pairs,)](
            cost,
            epsilon,
            epsilon if problem.tau is None else problem.tau.contiguous(),
            a,
            b,
            result.value,
            result.source_potential,
            result.target_potential,
            result.iterations,
            result.marginal_error,
            result.converged,
            result.plan_entropy,
            result.plan,
            n,
            m,
            problem.max_iter,
            problem.tol,
            ROWS=rows,
            COLUMNS=columns,
            SLAB=slab,
            SOFT=problem.tau is not None,
            SYMMETRIC=problem.symmetric,
            num_warps=_warps(slab * columns),
        )
    return result


def _warps(entries: int) -> int:
    """Warps for a block of K: beyond 8 they issue more instructions in all, as each repeats the columns' logarithms."""
    return max(1, min(8, entries // 1024))


# Sizes are not specialised: one compiled kernel serves a whole bucket, and the loads, which then cannot be vectorised,
# leave the layout of K as described above.
@triton.jit(do_not_specialize=["n", "m", "max_iter"])
def _solve_pair(
    cost_ptr,
    epsilon_ptr,
    tau_ptr,
    a_ptr,
    b_ptr,
    value_ptr,
    source_potential_ptr,
    target_potential_ptr,
    iterations_ptr,
    error_ptr,
    converged_ptr,
    entropy_ptr,
    plan_ptr,
    n,
    m,
    max_iter,
    tol,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLAB: tl.constexpr,
    SOFT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Solve this program's pair and write all of its result.

    K is padded to ROWS x COLUMNS and on chip if SLAB is ROWS. The potentials phi and gamma are over epsilon and
    float64: float32 ones have a floor of |C/eps| · 6e-8 in the marginals. `row` and `column` are the logarithms of the
    scalings on top of them: the plan is diag(a exp(row)) K diag(b exp(column)).
    """
    pair = tl.program_id(0).to(tl.int64)
    cost_ptr += pair * n * m
    plan_ptr += pair * n * m
    i, j = _row_index(ROWS), _column_index(COLUMNS)
    epsilon = tl.load(epsilon_ptr + pair).to(tl.float64)
    softness = tl.load(tau_ptr + pair) / epsilon
    a = tl.load(a_ptr + pair * n + i, mask=i < n, other=0.0)
    b = tl.load(b_ptr + pair * m + j, mask=j < m, other=0.0)
    empty = (tl.max(a) == 0) | (tl.max(b) == 0)
    a, b = tl.where(empty, 0.0, a), tl.where(empty, 0.0, b)

    row, column = tl.zeros_like(a), tl.zeros_like(b)
    if SYMMETRIC:
        phi, gamma = _half_diagonal(cost_ptr, a, i, n, epsilon), _half_diagonal(cost_ptr, b, j, n, epsilon)
    else:
        phi, gamma = _c_transforms(cost_ptr, a, b, epsilon, n, m, SLAB)
    kernel = _build_kernel(cost_ptr, plan_ptr, phi, gamma, a, b, epsilon, n, m, SLAB)

    count = 0
    block = _FIRST_BLOCK
    age = 0
    last_error = float("inf")
    converged = empty
    active = (max_iter > 0) & (not empty)
    while active:
        steps = tl.minimum(block, max_iter - count)
        relaxation = 0.5 if SYMMETRIC else tl.minimum((2 * age + _RAMP) / (age + _RAMP), _MAX_RELAXATION)
        for step in range(steps):
            # The last sweep before a look is plain: after a relaxed one the error seems up to 20 times smaller.
            weight = relaxation if SYMMETRIC else tl.where(step < steps - 1, relaxation, 1.0)
            row, column = _sweep(
                kernel, plan_ptr, row, column, phi, gamma, a, b, softness, weight, n, m, SOFT, SYMMETRIC
            )
        count += steps
        error = _row_error(kernel, plan_ptr, row, column, phi, a, b, softness, n, m, SOFT)
        if SYMMETRIC:
            error *= 2
        age = tl.where(error > 2 * last_error, 0, age + steps)
        last_error = error
        stretched = _largest(row, a, column, b) > _ABSORB_EXPONENT
        # While the scalings are large, the kernel's floor carries mass that the plan does not have.
        converged = (error <= tol) & (not stretched)
        active = (count < max_iter) & (not converged)
        if stretched:
            phi, gamma = _absorbed(phi, row, a), _absorbed(gamma, column, b)
            row, column = tl.zeros_like(row), tl.zeros_like(column)
            kernel = _build_kernel(cost_ptr, plan_ptr, phi, gamma, a, b, epsilon, n, m, SLAB)
        block = tl.minimum(_LAST_BLOCK, block + block // 2)

    phi, gamma = _absorbed(phi, row, a), _absorbed(gamma, column, b)
    weights = b * tl.exp(column)
    found = tl.zeros_like(b)
    error = 0.0
    entropy = 0.0
    for start in range(0, ROWS, SLAB):
        a_slab = _take(a, start, SLAB)
        plan = _slab(kernel, plan_ptr, start, n, m, ROWS) * (a_slab * tl.exp(_take(row, start, SLAB))) * weights
        mass = _over_columns(plan)
        error += tl.sum(tl.abs(mass - _wanted(a_slab, _take(phi, start, SLAB), softness, SOFT)))
        entropy += tl.sum(plan * (tl.log(mass + _TINY) - tl.log(plan + _TINY)))
        found += _over_rows(plan)
        _store(plan_ptr, plan, start, n, m)
    error += tl.sum(tl.abs(found - _wanted(b, gamma, softness, SOFT)))
    mass = tl.sum(found)
    value = epsilon * (_dual_part(a, phi, softness, SOFT) + _dual_part(b, gamma, softness, SOFT) - mass + 1)
    tl.store(value_ptr + pair, tl.where(empty, 0.0, value))
    tl.store(source_potential_ptr + pair * n + i, phi * epsilon, mask=i < n)
    tl.store(target_potential_ptr + pair * m + j, gamma * epsilon, mask=j < m)
    tl.store(iterations_ptr + pair, count)
    tl.store(error_ptr + pair, error)
    tl.store(converged_ptr + pair, converged)
    tl.store(entropy_ptr + pair, entropy / (mass + _TINY))


@triton.jit
def _c_transforms(cost_ptr, a, b, epsilon, n, m, SLAB: tl.constexpr):
    """Potentials to start from, the form of the solution at epsilon → 0: every row and column of K has a 1."""
    phi = tl.zeros_like(a)
    gamma = tl.full(b.shape, float("inf"), tl.float32)
    for start in range(0, a.shape[1], SLAB):
        a_slab = _take(a, start, SLAB)
        scaled = _load(cost_ptr, start, n, m, SLAB, b.shape[0]) / epsilon.to(tl.float32)
        scaled = tl.where((a_slab > 0) & (b > 0), scaled, float("inf"))
        smallest = tl.min(tl.min(scaled, 0, keep_dims=True), 2, keep_dims=True)
        slab = tl.where(a_slab > 0, smallest, 0.0)
        gamma = tl.minimum(gamma, tl.min(scaled - slab, 1, keep_dims=True))
        phi = _put(phi, slab, start)
    return phi.to(tl.float64), tl.where(b > 0, gamma, 0.0).to(tl.float64)


@triton.jit
def _half_diagonal(cost_ptr, marginal, index, n, epsilon):
    """Potentials to start from for a sentence against itself: every diagonal entry of K is 1."""
    diagonal = tl.load(cost_ptr + index * (n + 1), mask=index < n, other=0.0)
    return tl.where(marginal > 0, diagonal, 0.0).to(tl.float64) / (2 * epsilon)


@triton.jit
def _build_kernel(cost_ptr, plan_ptr, phi, gamma, a, b, epsilon, n, m, SLAB: tl.constexpr):
    """K of the present potentials, 1 outside the tokens: all of it, or its last slab where it is streamed."""
    kernel = tl.zeros([b.shape[0], SLAB, LANES], tl.float32)
    for start in range(0, a.shape[1], SLAB):
        scaled = _load(cost_ptr, start, n, m, SLAB, b.shape[0]) * (1 / epsilon)
        exponent = (_take(phi, start, SLAB) + gamma - scaled).to(tl.float32)
        exponent = tl.minimum(tl.maximum(exponent, _MIN_EXPONENT), _MAX_EXPONENT)
        kernel = tl.where((_take(a, start, SLAB) > 0) & (b > 0), tl.exp(exponent), 1.0)
        if a.shape[1] > SLAB:
            _store(plan_ptr, kernel, start, n, m)
    if a.shape[1] > SLAB:
        # Other threads than those that wrote will read.
        tl.debug_barrier()
    return kernel


@triton.jit
def _sweep(
    kernel, plan_ptr, row, column, phi, gamma, a, b, softness, weight, n, m, SOFT: tl.constexpr, SYMMETRIC: tl.constexpr
):
    """Both scalings after an update, in one pass over K: a slab's rows are done before its columns are summed."""
    weights = b * tl.exp(column)
    product = tl.zeros_like(b)
    for start in range(0, row.shape[1], kernel.shape[1]):
        slab = _slab(kernel, plan_ptr, start, n, m, row.shape[1])
        row_slab, phi_slab = _take(row, start, slab.shape[1]), _take(phi, start, slab.shape[1])
        row_slab = _moved(row_slab, _over_columns(slab * weights), phi_slab, softness, weight, SOFT)
        product += _over_rows(slab * (_take(a, start, slab.shape[1]) * tl.exp(row_slab)))
        row = _put(row, row_slab, start)
    column = tl.reshape(row, column.shape) if SYMMETRIC else _moved(column, product, gamma, softness, weight, SOFT)
    return row, column


@triton.jit
def _moved(scaling, product, potential, softness, weight, SOFT: tl.constexpr):
    """The scaling's logarithm, moved by `weight` times its way to the update from its product with K.

    Hard marginals: the update is -log product. Soft ones: the whole potential, absorbed part included, shrinks by
    tau / (tau + eps).
    """
    # The logarithm of what the marginal has over what it should have: near 0 at the end, where `_fast_log` is best, and
    # free of the error of the exponential, which is in the sums too.
    excess = _fast_log(product * tl.exp(scaling) + _TINY)
    step = -excess
    if SOFT:
        exponent = softness / (softness + 1)
        step = exponent.to(tl.float32) * (scaling - excess) + ((exponent - 1) * potential).to(tl.float32) - scaling
    return tl.minimum(tl.maximum(scaling + weight * step, -_MAX_SCALING_EXPONENT), _MAX_SCALING_EXPONENT)


@triton.jit
def _fast_log(x):
    """Natural logarithm, absolute error 2e-7 near 1: a GPU has an instruction for it, and the exact one takes 20."""
    return libdevice.fast_logf(x) if _HAS_FAST_LOG else tl.log(x)


@triton.jit
def _row_error(kernel, plan_ptr, row, column, phi, a, b, softness, n, m, SOFT: tl.constexpr):
    """L1 error of the rows' marginals; after a plain sweep the columns have none."""
    weights = b * tl.exp(column)
    error = 0.0
    for start in range(0, row.shape[1], kernel.shape[1]):
        slab = _slab(kernel, plan_ptr, start, n, m, row.shape[1])
        row_slab, a_slab = _take(row, start, slab.shape[1]), _take(a, start, slab.shape[1])
        wanted = _wanted(a_slab, _take(phi, start, slab.shape[1]) + row_slab, softness, SOFT)
        error += tl.sum(tl.abs(a_slab * tl.exp(row_slab) * _over_columns(slab * weights) - wanted))
    return error


@triton.jit
def _largest(row, a, column, b):
    """Largest absolute logarithm of a scaling on the tokens."""
    return tl.maximum(tl.max(tl.where(a > 0, tl.abs(row), 0.0)), tl.max(tl.where(b > 0, tl.abs(column), 0.0)))


@triton.jit
def _absorbed(potential, scaling, marginal):
    return potential + tl.where(marginal > 0, scaling, 0.0)


@triton.jit
def _wanted(marginal, potential, softness, SOFT: tl.constexpr):
    """What the plan's marginal is at the optimum: itself, or times exp(-f / tau) where it is met softly."""
    return marginal * tl.exp((-potential / softness).to(tl.float32)) if SOFT else marginal


@triton.jit
def _dual_part(marginal, potential, softness, SOFT: tl.constexpr):
    """One side's part of the dual value over epsilon, float64: <a, f>, or tau <a, 1 - exp(-f / tau)>."""
    return tl.sum(marginal * (softness * (1 - tl.exp(-potential / softness)) if SOFT else potential))


@triton.jit
def _slab(kernel, plan_ptr, start, n, m, ROWS: tl.constexpr):
    """The rows of K from `start` on, as many as `kernel` has."""
    return kernel if kernel.shape[1] == ROWS else _load(plan_ptr, start, n, m, kernel.shape[1], kernel.shape[0])


@triton.jit
def _take(vector, start, SLAB: tl.constexpr):
    """A slab's part of a vector over the rows."""
    return vector if vector.shape[1] == SLAB else _gather(vector, start + tl.arange(0, SLAB))


@triton.jit
def _put(vector, slab, start):
    """The vector over the rows with a slab's part replaced."""
    if vector.shape[1] == slab.shape[1]:
        return slab
    else:
        index = _row_index(vector.shape[1]) - start
        repeated = _gather(slab, tl.arange(0, vector.shape[1]) % slab.shape[1])
        return tl.where((index >= 0) & (index < slab.shape[1]), repeated, vector)


@triton.jit
def _gather(vector, index):
    # In one dimension: the compiler of Triton 3.8 fails on a gather along the middle axis of three.
    return tl.reshape(tl.gather(tl.reshape(vector, [vector.shape[1]]), index, 0), [1, index.shape[0], 1])


@triton.jit
def _load(matrix_ptr, start, n, m, SLAB: tl.constexpr, GROUPS: tl.constexpr):
    """The block of SLAB rows from `start` on of an n x m matrix, 1 beyond it."""
    i, j = start + _row_index(SLAB), _column_index(LANES * GROUPS)
    return tl.load(matrix_ptr + i * m + j, mask=(i < n) & (j < m), other=1.0)


@triton.jit
def _store(matrix_ptr, block, start, n, m):
    i, j = start + _row_index(block.shape[1]), _column_index(LANES * block.shape[0])
    tl.store(matrix_ptr + i * m + j, block, mask=(i < n) & (j < m))


@triton.jit
def _row_index(ROWS: tl.constexpr):
    return tl.arange(0, ROWS)[None, :, None]


@triton.jit
def _column_index(COLUMNS: tl.constexpr):
    return tl.arange(0, COLUMNS // LANES)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]


@triton.jit
def _over_columns(block):
    """Sums over the columns; first over the axis that lies in a thread's own registers."""
    return tl.sum(tl.sum(block, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _over_rows(block):
    return tl.sum(block, 1, keep_dims=True)


_INTERPRETED = not isinstance(_solve_pair, triton.runtime.JITFunction)
_HAS_FAST_LOG = tl.constexpr(torch.version.cuda is not None and not _INTERPRETED)
