"""Entropic optimal transport between the tokens of sentence pairs.

For a pair with token vectors X (n x E) and Y (m x E), cost C (n x m) and marginals a, b that sum to 1:

    OT_eps(a, b) = min_{P 1 = a, P^T 1 = b} <P, C> + eps KL(P || a b^T)

Its dual potentials f, g give the plan P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps) and, at convergence, the gradient
d OT_eps / dC = P (envelope theorem): nothing of the iterations enters the autograd graph.

Unbalanced, the marginals are met softly: + tau KL(P 1 || a) + tau KL(P^T 1 || b) replaces the constraints (Chizat et
al. 2018, arXiv 1607.05816); tau → infinity is the balanced problem. Debiased, the value is the Sinkhorn divergence
OT_eps(a, b) - OT_eps(a, a) / 2 - OT_eps(b, b) / 2 (Feydy et al. 2019, arXiv 1810.08278).
"""

import logging
from collections.abc import Callable
from functools import lru_cache

import torch

from .sinkhorn_xlfa import TransportProblem, TransportResult, solve_with_torch

logger = logging.getLogger(__name__)

# Solvers by name. A package around these files may add its own: see `sinkhorn`.
BACKENDS: dict[str, Callable[[TransportProblem], TransportResult]] = {"torch": solve_with_torch}
# Below this part of the mean cost, its spread is rounding: equal costs have none to measure epsilon in.
SMALLEST_SPREAD = 1e-6


def pairwise_cost(source: torch.Tensor, target: torch.Tensor, cost: str = "cosine") -> torch.Tensor:
    """Cost matrix B x n x m of token vectors B x n x E and B x m x E, float32 at least.

    `"cosine"` is 1 - cos(x, y), in [0, 2], and 1 without a gradient where a vector is zero; `"sqeuclidean"` is
    ||x - y||² / 2.

    Raises:
        ValueError: for another name.
    """
    dtype = torch.promote_types(source.dtype, torch.float32)
    source, target = source.to(dtype), target.to(dtype)
    # A product in half precision would put errors of 0.1 into the plan at small epsilon.
    with torch.autocast(source.device.type, enabled=False):
        if cost == "cosine":
            return 1 - _unit_vectors(source) @ _unit_vectors(target).transpose(1, 2)
        if cost == "sqeuclidean":
            # A common shift changes no distance; without it, states far from the origin lose theirs to rounding.
            shift = target.detach().mean(1, keepdim=True).nan_to_num()
            source, target = source - shift, target - shift
            products = source @ target.transpose(1, 2)
            norms = source.square().sum(-1).unsqueeze(2) + target.square().sum(-1).unsqueeze(1)
            return (norms / 2 - products).clamp(min=0)
    raise ValueError(f"cost={cost!r} is not allowed: it must be 'cosine' or 'sqeuclidean'")


def _unit_vectors(states: torch.Tensor) -> torch.Tensor:
    """States over their norms. A zero vector stays one and gets no gradient, which 0 / 1e-12 would not give."""
    norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return states * torch.where(norms > 0, 1 / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0)


def cost_scale(
    cost: torch.Tensor, source_mask: torch.Tensor, target_mask: torch.Tensor, scale: str = "centered_std"
) -> torch.Tensor:
    """The unit of epsilon for each pair, shape B, without gradient.

    `"centered_std"`: standard deviation of the double-centred cost. Adding f_i + g_j to the cost changes nothing in the
    plan, so this is the unit that compares encoders and layers. `"std"`, `"mean"`, `"max"`: of the valid entries.
    `"absolute"`: 1. What stands outside the masks must be finite.

    Raises:
        ValueError: for another name.
    """
    cost = cost.detach()
    if scale == "absolute":
        return cost.new_ones(cost.shape[0])
    if scale == "max":
        valid = torch.where(_valid_entries(source_mask, target_mask), cost, 0)
        return valid.amax(dim=(1, 2)) if valid.numel() else cost.new_zeros(cost.shape[0])
    # Sums over the valid entries as products with the masks: no copy of the cost is made. Row vectors times a matrix
    # are 10 times faster on a CPU than a matrix times columns.
    rows_valid, columns_valid = source_mask.to(cost.dtype).unsqueeze(1), target_mask.to(cost.dtype).unsqueeze(1)
    row_count, column_count = (
        valid.sum(dim=(1, 2), keepdim=True).clamp(min=1) for valid in (rows_valid, columns_valid)
    )
    row_means = columns_valid @ cost.transpose(1, 2) / column_count
    mean = (rows_valid * row_means).sum(2, keepdim=True) / row_count
    if scale == "mean":
        return mean.view(-1)
    if scale == "std":
        centred = cost - mean
    elif scale == "centered_std":
        centred = cost - row_means.transpose(1, 2)
        centred -= rows_valid @ centred / row_count
    else:
        raise ValueError(
            f"scale={scale!r} is not allowed: it must be 'centered_std', 'std', 'mean', 'max' or 'absolute'"
        )
    squares = (rows_valid @ centred.square_() * columns_valid).sum(2)
    return (squares / (row_count * column_count).squeeze(2)).sqrt().view(-1)


def _unit_or_mean(cost: torch.Tensor, source_mask: torch.Tensor, target_mask: torch.Tensor, scale: str) -> torch.Tensor:
    """The unit of epsilon, B; where the costs of a pair are all equal, their mean; where they are all 0, 1."""
    unit = cost_scale(cost, source_mask, target_mask, scale)
    if scale == "absolute":
        return unit
    mean = unit if scale == "mean" else cost_scale(cost, source_mask, target_mask, "mean").abs()
    return torch.where(unit > SMALLEST_SPREAD * mean, unit, torch.where(mean > 0, mean, 1))


def _valid_entries(source_mask: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
    """B x n x m, true where both tokens are."""
    return source_mask.bool().unsqueeze(2) & target_mask.bool().unsqueeze(1)


def uniform_marginals(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1/n on the n positions where the mask (B x n) is 1, else 0."""
    weights = mask.to(dtype)
    return weights / weights.sum(1, keepdim=True).clamp(min=1)


def sinkhorn(
    cost: torch.Tensor,
    epsilon: float | torch.Tensor,
    source_mask: torch.Tensor,
    target_mask: torch.Tensor,
    max_iter: int = 5000,
    tol: float = 1e-3,
    return_plan: bool = False,
    source_marginal: torch.Tensor | None = None,
    target_marginal: torch.Tensor | None = None,
    tau: float | torch.Tensor | None = None,
    symmetric: bool = False,
    epsilon_scale: str = "absolute",
    backend: str = "auto",
) -> TransportResult:
    """Solve OT_eps for a batch of pairs.

    The iterations are the scaling form of Sinkhorn's algorithm: batched row-vector products with the kernel
    exp((f + g - C) / eps), whose potentials absorb the scalings in float64 whenever those grow (Schmitzer 2019,
    arXiv 1610.06519, algorithm 2), over-relaxed (Thibault et al. 2021, arXiv 1711.01851) with a factor that grows with
    the sweeps a pair has needed. They start from the c-transform potentials, the solution's form at epsilon → 0. Pairs
    that take hundreds of sweeps end with Newton steps (Brauer et al. 2017, arXiv 1710.06635). Converged pairs leave
    the batch.

    Args:
        cost: B x n x m. The gradient of `value` with respect to it is the plan.
        epsilon: > 0, in units of `epsilon_scale`; one number or one a pair (B).
        source_mask, target_mask: B x n and B x m, 1 on tokens; padding changes nothing. A pair with an empty side has
            value 0.
        max_iter: most sweeps for a pair.
        tol: L1 error of the marginals at which a pair has converged. Checked on plain, not over-relaxed, sweeps.
        return_plan: also return the plan, B x n x m.
        source_marginal, target_marginal: B x n and B x m, each row summing to 1 over its mask; by default uniform.
        tau: strength of the soft marginals, > 0, in units of `epsilon_scale`; None for hard ones.
        symmetric: source and target are the same tokens, so the cost is symmetric: the averaged symmetric fixed point
            of Feydy et al. (section 3.1) replaces the alternating updates.
        epsilon_scale: see `cost_scale`; where all costs of a pair are equal, and so have no spread, their mean is the
            unit.
        backend: `"torch"` runs everywhere; `"triton"` needs a GPU and at most 256 tokens a side; `"compiled"` is there
            once `xlfa.compiled_sinkhorn` is imported; `"auto"` takes the fastest that is there.

    Raises:
        ValueError: if epsilon or tau is not positive and finite, a marginal is no distribution over its mask, a mask is
            of another shape, the cost has a NaN or an infinity at a valid entry, or the back end is not there.
    """
    with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
        clean = _finite_cost(cost, source_mask, target_mask)
        unit = _unit_or_mean(clean, source_mask, target_mask, epsilon_scale)
        problem = TransportProblem(
            cost=clean,
            epsilon=_positive("epsilon", epsilon, unit),
            source_marginal=_marginal(source_marginal, source_mask, clean.dtype),
            target_marginal=_marginal(target_marginal, target_mask, clean.dtype),
            tau=None if tau is None else _positive("tau", tau, unit),
            symmetric=symmetric,
            max_iter=max_iter,
            tol=tol,
        )
        result = _backend(backend, problem)(problem)
    result.value = _PlanGradient.apply(cost, result.plan, result.value)
    if not return_plan:
        result.plan = None
    return result


def _finite_cost(cost: torch.Tensor, source_mask: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
    """The cost without gradient, contiguous, float32 at least, and finite outside the masks too.

    Raises:
        ValueError: for masks of other shapes, and for a NaN or an infinity at a valid entry.
    """
    shapes = [tuple(tensor.shape) for tensor in (cost, source_mask, target_mask)]
    if cost.dim() != 3 or shapes[1:] != [shapes[0][:2], (shapes[0][0], shapes[0][2])]:
        raise ValueError(
            f"the cost must be B x n x m, source_mask B x n and target_mask B x m; they are {shapes[0]}, {shapes[1]} "
            f"and {shapes[2]}"
        )
    cost = cost.detach().to(torch.promote_types(cost.dtype, torch.float32)).contiguous()
    if not torch.isfinite(cost.sum()):
        cost = torch.where(_valid_entries(source_mask, target_mask), cost, 0)
        bad = (~torch.isfinite(cost)).nonzero()
        if len(bad):
            pair, row, column = bad[0].tolist()
            raise ValueError(
                f"the cost has a NaN or an infinite entry: {cost[pair, row, column].item()} at pair {pair}, source "
                f"token {row}, target token {column}; check the token states it was computed from"
            )
    return cost


def _positive(name: str, value: float | torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The value in absolute terms, one a pair, where it is positive and finite.

    Raises:
        ValueError: otherwise.
    """
    value = torch.as_tensor(value, dtype=unit.dtype, device=unit.device).detach().expand(len(unit))
    if not (torch.isfinite(value) & (value > 0)).all():
        raise ValueError(f"{name} must be positive and finite, got {value.tolist()}")
    return value * unit


def _marginal(marginal: torch.Tensor | None, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The marginal, 0 outside the mask, uniform where there is none.

    Raises:
        ValueError: if a row is not a distribution (all zeros, for a sentence without a token, are allowed).
    """
    if marginal is None:
        return uniform_marginals(mask, dtype)
    marginal = marginal.detach().to(dtype) * mask.to(dtype)
    sums = marginal.sum(1)
    proper = (marginal >= 0).all(1) & (((sums - 1).abs() < 1e-3) | (sums == 0))
    if not proper.all():
        pair = int((~proper).nonzero()[0])
        raise ValueError(
            f"the marginal of pair {pair} must be >= 0 and sum to 1 over its mask, not to {sums[pair].item()}"
        )
    # Both sides' sums must agree by more than half-precision marginals have: no plan has two different masses.
    return marginal / torch.where(sums > 0, sums, 1).unsqueeze(1)


def _backend(name: str, problem: TransportProblem) -> Callable[[TransportProblem], TransportResult]:
    """The solver of that name; for `"auto"` the fastest for the problem's device, type and size.

    Raises:
        ValueError: if it is not there.
    """
    device = problem.cost.device
    on_gpu = device.type == "cuda"
    fits_triton = on_gpu and max(problem.cost.shape[1:]) <= 256 and problem.cost.dtype == torch.float32
    if name == "triton" or (name == "auto" and fits_triton):
        _add_triton(device)
    if name == "auto":
        preferred = "triton" if fits_triton else "compiled" if device.type == "cpu" else "torch"
        name = preferred if preferred in BACKENDS else "torch"
    if name not in BACKENDS:
        raise ValueError(
            f"backend={name!r} is not there, only 'auto', {', '.join(map(repr, BACKENDS))}: 'triton' needs the package "
            "triton, 'compiled' needs numba and `import xlfa.compiled_sinkhorn`"
        )
    return BACKENDS[name]


@lru_cache
def _add_triton(device: torch.device) -> None:
    """Add the Triton back end if it is installed and gives torch's numbers on a small problem on this device.

    A machine can have Triton and still not run it, for want of a C compiler or by a driver too old.
    """
    try:
        from .sinkhorn_triton_xlfa import solve_with_triton
    except ImportError:
        return
    ramp = torch.linspace(0, 1, 35, device=device).view(1, 5, 7)
    problem = TransportProblem(
        cost=(ramp * 7).sin().abs(),
        epsilon=torch.full((1,), 0.1, device=device),
        source_marginal=torch.full((1, 5), 1 / 5, device=device),
        target_marginal=torch.full((1, 7), 1 / 7, device=device),
        tol=1e-5,
    )
    try:
        torch.testing.assert_close(
            solve_with_triton(problem).plan, solve_with_torch(problem).plan, rtol=1e-3, atol=1e-5
        )
    # Whatever a compiler or a driver raises, training goes on without them, and says so.
    except Exception as error:
        logger.warning("the Triton back end fails its check on %s; torch solves instead: %s", device, error)
        return
    BACKENDS["triton"] = solve_with_triton


class _PlanGradient(torch.autograd.Function):
    """Returns `value` and sends its gradient to `cost` as the plan (envelope theorem)."""

    @staticmethod
    def forward(ctx, cost, plan, value):
        ctx.save_for_backward(plan)
        ctx.cost_dtype = cost.dtype
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (plan,) = ctx.saved_tensors
        return (grad.view(-1, 1, 1) * plan).to(ctx.cost_dtype), None, None


def product_plan(
    cost: torch.Tensor,
    source_mask: torch.Tensor,
    target_mask: torch.Tensor,
    source_marginal: torch.Tensor | None = None,
    target_marginal: torch.Tensor | None = None,
) -> TransportResult:
    """The limit epsilon → infinity: P = a b^T, value <P, C>, potentials C b and C^T a, each less half the value.

    Arguments and result as for `sinkhorn`.
    """
    clean = _finite_cost(cost, source_mask, target_mask)
    a, b = _marginal(source_marginal, source_mask, clean.dtype), _marginal(target_marginal, target_mask, clean.dtype)
    plan = a.unsqueeze(2) * b.unsqueeze(1)
    half = (plan * clean).sum(dim=(1, 2)).view(-1, 1) / 2
    with torch.autocast(cost.device.type, enabled=False):
        f = torch.where(a > 0, (clean @ b.unsqueeze(2)).squeeze(2) - half, 0)
        g = torch.where(b > 0, (a.unsqueeze(1) @ clean).squeeze(1) - half, 0)
    return _closed_form(cost, clean, plan, f, g, epsilon=torch.inf)


def exact_plan(
    cost: torch.Tensor,
    source_mask: torch.Tensor,
    target_mask: torch.Tensor,
    source_marginal: torch.Tensor | None = None,
    target_marginal: torch.Tensor | None = None,
) -> TransportResult:
    """The limit epsilon → 0: the exact plan of each pair by POT's network simplex, on the CPU in float64.

    Arguments and result as for `sinkhorn`; a pair that takes more steps than POT allows has not converged.

    Raises:
        ImportError: without POT.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError('ot_solver="exact" needs the package POT: pip install POT') from error
    clean = _finite_cost(cost, source_mask, target_mask)
    a, b = _marginal(source_marginal, source_mask, clean.dtype), _marginal(target_marginal, target_mask, clean.dtype)
    plan, f, g = torch.zeros_like(clean), torch.zeros_like(a), torch.zeros_like(b)
    converged = torch.ones(len(clean), dtype=torch.bool, device=clean.device)
    for index in range(cost.shape[0]):
        rows, columns = a[index].nonzero().squeeze(1), b[index].nonzero().squeeze(1)
        if rows.numel() and columns.numel():
            problem = [clean[index][rows][:, columns], a[index, rows], b[index, columns]]
            block, weights_a, weights_b = (tensor.cpu().double().numpy() for tensor in problem)
            # The simplex wants equal masses to the last bit, which float32 marginals lose.
            solved, log = ot.emd(weights_a / weights_a.sum(), weights_b / weights_b.sum(), block, log=True)
            converged[index] = log["warning"] is None
            plan[index, rows.unsqueeze(1), columns] = torch.as_tensor(solved).to(plan)
            f[index, rows], g[index, columns] = torch.as_tensor(log["u"]).to(f), torch.as_tensor(log["v"]).to(g)
    result = _closed_form(cost, clean, plan, f, g, epsilon=0.0)
    result.converged = converged
    result.marginal_error = (plan.sum(2) - a).abs().sum(1) + (plan.sum(1) - b).abs().sum(1)
    return result


def _closed_form(
    cost: torch.Tensor, clean: torch.Tensor, plan: torch.Tensor, f: torch.Tensor, g: torch.Tensor, epsilon: float
) -> TransportResult:
    """A result from a plan and potentials that needed no sweeps; `clean` is the cost without gradient."""
    value = (plan * clean).sum(dim=(1, 2))
    rows = plan.sum(2)
    # Nats, by the mass the rows carry: all of it, or nothing for an empty pair.
    entropy = torch.special.entr(plan).sum(dim=(1, 2)) - torch.special.entr(rows).sum(1)
    return TransportResult(
        value=_PlanGradient.apply(cost, plan, value),
        source_potential=f,
        target_potential=g,
        iterations=torch.zeros_like(value, dtype=torch.long),
        marginal_error=torch.zeros_like(value),
        converged=torch.ones_like(value, dtype=torch.bool),
        plan_entropy=entropy,
        epsilon=torch.full_like(value, epsilon),
        plan=plan,
    )


def alignment_loss(
    source_states: torch.Tensor,
    target_states: torch.Tensor,
    source_mask: torch.Tensor,
    target_mask: torch.Tensor,
    epsilon: float = 0.1,
    epsilon_scale: str = "centered_std",
    cost: str = "cosine",
    solver: str = "sinkhorn",
    max_iter: int = 5000,
    tol: float = 1e-3,
    source_marginal: torch.Tensor | None = None,
    target_marginal: torch.Tensor | None = None,
    tau: float | None = None,
    debiased: bool = False,
    center: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, TransportResult]:
    """Mean transport value over the pairs of a batch that have tokens on both sides.

    Args:
        source_states, target_states: B x n x E and B x m x E token states.
        source_mask, target_mask: B x n and B x m, 1 on the tokens to align (no padding, no special tokens).
        epsilon, tau: in units of `epsilon_scale` of the pair's cost; tau None for hard marginals.
        epsilon_scale, cost, solver, max_iter, tol: see `XLFAConfig`.
        source_marginal, target_marginal, backend: see `sinkhorn`; by default uniform.
        debiased: subtract half of each side's value against itself, at the pair's epsilon: the Sinkhorn divergence.
        center: subtract from each side's states their mean over the tokens of the batch first.

    Returns:
        The loss (a scalar, 0 where no pair has tokens, with some weight, on both sides) and the solver's result for the
        pairs; its `value` is the divergence where `debiased`.

    Raises:
        ValueError: for an unknown solver or one that does not go with `tau`, and as `sinkhorn`.
    """
    if solver not in ("sinkhorn", "exact", "product"):
        raise ValueError(f"solver={solver!r} is not allowed: it must be 'sinkhorn', 'exact' or 'product'")
    if tau is not None and solver != "sinkhorn":
        raise ValueError(f"solver={solver!r} has hard marginals only: leave tau out, or use solver='sinkhorn'")
    source_states, target_states = _within(source_states, source_mask), _within(target_states, target_mask)
    if center:
        source_states = _centred(source_states, source_mask)
        target_states = _centred(target_states, target_mask)
    matrix = pairwise_cost(source_states, target_states, cost)
    marginals = {"source_marginal": source_marginal, "target_marginal": target_marginal}
    closed_forms = {"exact": exact_plan, "product": product_plan}
    options = {"max_iter": max_iter, "tol": tol, "backend": backend}
    if solver == "sinkhorn":
        options |= {"tau": tau, "epsilon_scale": epsilon_scale}
        result = sinkhorn(matrix, epsilon, source_mask, target_mask, **marginals, **options)
    else:
        result = closed_forms[solver](matrix, source_mask, target_mask, **marginals)
    source_weights, target_weights = (
        mask.bool() if marginal is None else mask.bool() & (marginal > 0)
        for mask, marginal in ((source_mask, source_marginal), (target_mask, target_marginal))
    )
    pairs = source_weights.any(1) & target_weights.any(1)
    # Without regularisation a sentence is at distance 0 from itself.
    if debiased and solver != "exact":
        for states, mask, marginal in (
            (source_states, source_mask, source_marginal),
            (target_states, target_mask, target_marginal),
        ):
            both = {"source_marginal": marginal, "target_marginal": marginal}
            own = pairwise_cost(states, states, cost)
            if solver == "sinkhorn":
                options |= {"epsilon_scale": "absolute", "symmetric": True}
                options["tau"] = None if tau is None else tau * (result.epsilon / epsilon)
                term = sinkhorn(own, result.epsilon, mask, mask, **both, **options)
            else:
                term = product_plan(own, mask, mask, **both)
            result.value = result.value - torch.where(pairs, term.value, 0) / 2
            result.converged = result.converged & (term.converged | ~pairs)
    return result.value.sum() / pairs.sum().clamp(min=1), result


def _within(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """States of which nothing outside the mask, even a NaN, reaches a mean or, times 0, a gradient.

    On a CPU the copy and its gradient take a tenth of the cost matrix's time and more: there it is made only where the
    sum of all states is not finite. To look at an accelerator's sum would wait for it.
    """
    if states.device.type == "cpu" and states.detach().sum().isfinite():
        return states
    return torch.where(mask.bool().unsqueeze(-1), states, 0)


def _centred(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    weights = mask.unsqueeze(-1).to(states.dtype)
    return states - (states * weights).sum(dim=(0, 1)) / weights.sum().clamp(min=1)
