"""Entropic optimal transport between the tokens of sentence pairs.

For a pair with token vectors X (n x E) and Y (m x E), cost C (n x m) and uniform marginals a, b:

    OT_eps(a, b) = min_{P 1 = a, P^T 1 = b} <P, C> + eps KL(P || a b^T)

Its dual potentials f, g give the plan P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps) and, at convergence, the gradient
d OT_eps / dC = P (envelope theorem): nothing of the iterations enters the autograd graph.
"""

from dataclasses import dataclass

import torch

# exp(-80) is 1.8e-35: above the denormals that would slow the products down, and never a zero to divide by.
MIN_EXPONENT = -80.0
# Scalings beyond exp(±25) are absorbed into the potentials; the floor of the kernel then still weighs below 1e-13.
ABSORB_EXPONENT = 25.0
# A safety net inside one block of sweeps: float32 products of a scaling and the kernel cannot overflow below this.
MAX_SCALING = 1e30
# Relaxation beyond this gains little and makes the error oscillate.
MAX_RELAXATION = 1.9
# Sweeps between two looks at the error (each look synchronises with the device once).
FIRST_BLOCK, LAST_BLOCK = 3, 24


@dataclass
class TransportResult:
    """What a solver returns for B pairs of at most n and m tokens.

    Attributes:
        value: B, OT_eps as its dual value; differentiable in the cost.
        source_potential, target_potential: B x n and B x m, f and g in units of the cost; 0 outside the masks.
        iterations: B, sweeps until convergence (0 for the closed forms).
        marginal_error: B, ||P 1 - a||_1 + ||P^T 1 - b||_1.
        converged: B, whether the error came below the tolerance.
        plan_entropy: B, mean entropy in nats of the plan's rows as distributions over the target tokens; its
            exponential is the number of target tokens a source token is linked to.
        epsilon: B, the absolute epsilon that was used.
        plan: B x n x m where it was asked for, else None.
    """

    value: torch.Tensor
    source_potential: torch.Tensor
    target_potential: torch.Tensor
    iterations: torch.Tensor
    marginal_error: torch.Tensor
    converged: torch.Tensor
    plan_entropy: torch.Tensor
    epsilon: torch.Tensor
    plan: torch.Tensor | None = None


def pairwise_cost(source: torch.Tensor, target: torch.Tensor, cost: str = "cosine") -> torch.Tensor:
    """Cost matrix B x n x m of token vectors B x n x E and B x m x E, float32 at least.

    `"cosine"` is 1 - cos(x, y), in [0, 2]; `"sqeuclidean"` is ||x - y||² / 2.

    Raises:
        ValueError: for another name.
    """
    dtype = torch.promote_types(source.dtype, torch.float32)
    source, target = source.to(dtype), target.to(dtype)
    # A product in half precision would put errors of 0.1 into the plan at small epsilon.
    with torch.autocast(source.device.type, enabled=False):
        if cost == "cosine":
            source = torch.nn.functional.normalize(source, dim=-1)
            target = torch.nn.functional.normalize(target, dim=-1)
            return 1 - source @ target.transpose(1, 2)
        if cost == "sqeuclidean":
            products = source @ target.transpose(1, 2)
            norms = source.square().sum(-1).unsqueeze(2) + target.square().sum(-1).unsqueeze(1)
            return (norms / 2 - products).clamp(min=0)
    raise ValueError(f"cost={cost!r} is not allowed: it must be 'cosine' or 'sqeuclidean'")


def cost_scale(
    cost: torch.Tensor, source_mask: torch.Tensor, target_mask: torch.Tensor, scale: str = "centered_std"
) -> torch.Tensor:
    """The unit of epsilon for each pair, shape B, without gradient.

    `"centered_std"`: standard deviation of the double-centred cost. Adding f_i + g_j to the cost changes nothing in the
    plan, so this is the unit that compares encoders and layers. `"std"`, `"mean"`, `"max"`: of the valid entries.
    `"absolute"`: 1.

    Raises:
        ValueError: for another name.
    """
    cost = cost.detach()
    if scale == "absolute":
        return cost.new_ones(cost.shape[0])
    mask = _valid_entries(source_mask, target_mask)
    valid = mask.to(cost.dtype)
    count = valid.sum(dim=(1, 2)).clamp(min=1)
    values = torch.where(mask, cost, 0)
    if scale == "mean":
        return values.sum(dim=(1, 2)) / count
    if scale == "max":
        return values.amax(dim=(1, 2))
    if scale == "std":
        centred = (values - (values.sum(dim=(1, 2)) / count).view(-1, 1, 1)) * valid
    elif scale == "centered_std":
        rows = values.sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp(min=1)
        columns = values.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        mean = (values.sum(dim=(1, 2)) / count).view(-1, 1, 1)
        centred = (values - rows - columns + mean) * valid
    else:
        raise ValueError(
            f"scale={scale!r} is not allowed: it must be 'centered_std', 'std', 'mean', 'max' or 'absolute'"
        )
    return (centred.square().sum(dim=(1, 2)) / count).sqrt()


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
) -> TransportResult:
    """Solve OT_eps for a batch of pairs with uniform marginals over the masks.

    The iterations are the scaling form of Sinkhorn's algorithm: batched row-vector products with the kernel
    exp((f + g - C) / eps), whose potentials absorb the scalings in float64 whenever those grow (Schmitzer 2019,
    arXiv 1610.06519, algorithm 2), over-relaxed with a factor fitted to the observed contraction (Thibault et al. 2021,
    arXiv 1711.01851). They start from the c-transform potentials, the solution's form at epsilon → 0.
    Pairs that have converged leave the batch.

    Args:
        cost: B x n x m. The gradient of `value` with respect to it is the plan.
        epsilon: absolute, > 0; one number or one a pair (B).
        source_mask, target_mask: B x n and B x m, 1 on tokens; padding changes nothing. A pair with an empty side has
            value 0.
        max_iter: most sweeps for a pair.
        tol: L1 error of the marginals at which a pair has converged. Checked on plain, not over-relaxed, sweeps.
        return_plan: also return the plan, B x n x m.

    Raises:
        ValueError: if epsilon is not positive and finite, or the cost has a NaN or an infinity at a valid entry.
    """
    with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
        valid = _valid_entries(source_mask, target_mask)
        problem = torch.where(valid, cost.detach(), 0).to(torch.promote_types(cost.dtype, torch.float32))
        if not torch.isfinite(problem).all():
            raise ValueError("the cost has a NaN or an infinite entry: check the token states it was computed from")
        epsilon = _epsilon_per_pair(epsilon, problem)
        scaled = problem / epsilon.view(-1, 1, 1)
        # Padding costs more than every token: finite, so that no product meets an infinity.
        scaled = torch.where(valid, scaled, scaled.amax() - MIN_EXPONENT)
        a, b = uniform_marginals(source_mask, scaled.dtype), uniform_marginals(target_mask, scaled.dtype)
        empty = ~valid.any(dim=(1, 2))
        phi, gamma, iterations, converged = _solve(scaled, a, b, empty, max_iter, tol)

        plan = torch.exp((phi.unsqueeze(2) + gamma.unsqueeze(1) - scaled).to(scaled.dtype))
        plan = plan * a.unsqueeze(2) * b.unsqueeze(1)
        row_error = (plan.sum(2) - a).abs().sum(1)
        error = torch.where(empty, 0, row_error + (plan.sum(1) - b).abs().sum(1))
        # The dual value is 4 to 70 times more accurate than <P, C> + eps KL at the same potentials.
        mass_gap = torch.where(empty, 0, plan.sum(dim=(1, 2)) - 1)
        value = torch.where(empty, 0, epsilon * ((a * phi).sum(1) + (b * gamma).sum(1) - mass_gap))
        source_potential = torch.where(source_mask.bool(), phi * epsilon.unsqueeze(1), 0).to(scaled.dtype)
        target_potential = torch.where(target_mask.bool(), gamma * epsilon.unsqueeze(1), 0).to(scaled.dtype)
    return TransportResult(
        value=_PlanGradient.apply(cost, plan, value.to(plan.dtype)),
        source_potential=source_potential,
        target_potential=target_potential,
        iterations=iterations,
        marginal_error=error,
        converged=converged,
        plan_entropy=_row_entropy(plan, a),
        epsilon=epsilon,
        plan=plan if return_plan else None,
    )


def _epsilon_per_pair(epsilon: float | torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    epsilon = torch.as_tensor(epsilon, dtype=cost.dtype, device=cost.device).detach().expand(cost.shape[0])
    if not (torch.isfinite(epsilon) & (epsilon > 0)).all():
        raise ValueError(f"epsilon must be positive and finite, got {epsilon.tolist()}")
    return epsilon


def _solve(
    scaled: torch.Tensor, a: torch.Tensor, b: torch.Tensor, empty: torch.Tensor, max_iter: int, tol: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Potentials over epsilon (float64, B x n and B x m), sweeps and convergence flags for the cost over epsilon."""
    phi, gamma = _c_transforms(scaled, a, b)
    iterations = torch.zeros(scaled.shape[0], dtype=torch.long, device=scaled.device)
    converged = empty.clone()

    active = torch.nonzero(~empty).squeeze(1)
    if active.numel() == 0:
        return phi, gamma, iterations, converged
    problem = _ScalingForm(scaled[active], a[active], b[active], phi[active], gamma[active])
    previous_error = None
    block = FIRST_BLOCK
    sweeps = 0
    while True:
        block = min(block, max_iter - sweeps)
        problem.sweep(block)
        sweeps += block
        error = problem.row_error()
        stretched = problem.largest_exponent() > ABSORB_EXPONENT
        # While the scalings are large, the kernel's floor carries mass that the plan does not have.
        done = (error <= tol) & ~stretched
        # The one synchronisation of the block.
        done_list, stretched_list = torch.stack([done, stretched]).tolist()
        if any(done_list) or sweeps >= max_iter:
            iterations[active] = sweeps
            converged[active] = done
            problem.absorb()
            phi[active], gamma[active] = problem.phi, problem.gamma
            if all(done_list) or sweeps >= max_iter:
                return phi, gamma, iterations, converged
            remaining = torch.nonzero(~done).squeeze(1)
            active = active[remaining]
            problem.select(remaining)
            error = error[remaining]
            previous_error = None if previous_error is None else previous_error[remaining]
        elif any(stretched_list):
            problem.absorb()
            problem.build_kernel()
        problem.adapt_relaxation(error, previous_error, block)
        previous_error = error
        block = min(LAST_BLOCK, block + block // 2)


def _c_transforms(scaled: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dual feasible potentials: every row and column of exp(phi + gamma - C/eps) has an entry 1 and none above."""
    phi = torch.where(a > 0, scaled.amin(2), 0)
    gamma = torch.where(b > 0, (scaled - phi.unsqueeze(2)).amin(1), 0)
    return phi.double(), gamma.double()


class _ScalingForm:
    """The state of the sweeps: an absorbed kernel K, its transpose, and scalings relative to the marginals.

    The plan is diag(a · row) K diag(b · column). Row vectors times a contiguous matrix are the fast form of these
    products on a CPU, hence K and its transpose.
    """

    def __init__(self, scaled: torch.Tensor, a: torch.Tensor, b: torch.Tensor, phi: torch.Tensor, gamma: torch.Tensor):
        self.scaled, self.phi, self.gamma = scaled, phi, gamma
        self.a, self.b = a.unsqueeze(1), b.unsqueeze(1)
        self.relaxation = scaled.new_ones(scaled.shape[0], 1, 1)
        self.build_kernel()

    def build_kernel(self) -> None:
        """The kernel of the present potentials; the scalings start again from 1."""
        exponent = (self.phi.unsqueeze(2) + self.gamma.unsqueeze(1) - self.scaled).to(self.scaled.dtype)
        self.kernel = exponent.clamp_(min=MIN_EXPONENT, max=-MIN_EXPONENT).exp_()
        self.transposed = self.kernel.transpose(1, 2).contiguous()
        self.row, self.column = torch.ones_like(self.a), torch.ones_like(self.b)

    def _relaxed(self, scaling: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """scaling^(1 - w) · (1 / product)^w, in logarithms and bounded."""
        logarithm = scaling.log()
        logarithm = logarithm - self.relaxation * (logarithm + product.log())
        return logarithm.exp_().clamp_(1 / MAX_SCALING, MAX_SCALING)

    def sweep(self, count: int) -> None:
        """`count` updates of both scalings, the last one plain so that the columns are met exactly."""
        for _ in range(count - 1):
            self.row = self._relaxed(self.row, (self.b * self.column) @ self.transposed)
            self.column = self._relaxed(self.column, (self.a * self.row) @ self.kernel)
        self.row = ((self.b * self.column) @ self.transposed).reciprocal().clamp_(1 / MAX_SCALING, MAX_SCALING)
        self.column = ((self.a * self.row) @ self.kernel).reciprocal().clamp_(1 / MAX_SCALING, MAX_SCALING)

    def row_error(self) -> torch.Tensor:
        """L1 error of the rows' marginals; after a plain sweep the columns have none."""
        return (self.a * (self.row * ((self.b * self.column) @ self.transposed) - 1)).abs().sum(dim=(1, 2))

    def absorb(self) -> None:
        """Move the scalings into the potentials, in float64: float32 ones have a floor of |C/eps| · 6e-8."""
        self.phi = self.phi + torch.where(self.a > 0, self.row.log(), 0).squeeze(1)
        self.gamma = self.gamma + torch.where(self.b > 0, self.column.log(), 0).squeeze(1)
        self.row, self.column = torch.ones_like(self.a), torch.ones_like(self.b)

    def largest_exponent(self) -> torch.Tensor:
        """Per pair, the largest absolute logarithm of its scalings."""
        row = torch.where(self.a > 0, self.row.log(), 0).abs().amax(dim=(1, 2))
        return torch.maximum(row, torch.where(self.b > 0, self.column.log(), 0).abs().amax(dim=(1, 2)))

    def select(self, index: torch.Tensor) -> None:
        """Keep these pairs only; the potentials must have absorbed the scalings before."""
        self.scaled, self.phi, self.gamma = self.scaled[index], self.phi[index], self.gamma[index]
        self.a, self.b, self.relaxation = self.a[index], self.b[index], self.relaxation[index]
        self.build_kernel()

    def adapt_relaxation(self, error: torch.Tensor, previous: torch.Tensor | None, sweeps: int) -> None:
        """Fit the relaxation factor of each pair to the contraction seen over the last block.

        A plain sweep that contracts by c has its best factor at 2 / (1 + sqrt(1 - c)). It is fitted once a pair, while
        its sweeps are still plain; where the relaxed error grows, the pair goes back to plain sweeps.
        """
        if previous is None:
            return
        contraction = (error / previous.clamp(min=torch.finfo(error.dtype).tiny)) ** (1 / sweeps)
        best = (2 / (1 + (1 - contraction.clamp(max=1)).sqrt())).clamp(max=MAX_RELAXATION).view(-1, 1, 1)
        plain = self.relaxation == 1
        grows = (contraction >= 1).view(-1, 1, 1)
        self.relaxation = torch.where(grows, 1, torch.where(plain, best, self.relaxation)).to(error.dtype)


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


def _row_entropy(plan: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Mean over source tokens of the entropy (nats) of their rows: H(P) - H(a), shape B."""
    return torch.special.entr(plan).sum(dim=(1, 2)) - torch.special.entr(a).sum(1)


def product_plan(cost: torch.Tensor, source_mask: torch.Tensor, target_mask: torch.Tensor) -> TransportResult:
    """The limit epsilon → infinity: P = a b^T, value <P, C>. Arguments and result as for `sinkhorn`."""
    dtype = torch.promote_types(cost.dtype, torch.float32)
    a, b = uniform_marginals(source_mask, dtype), uniform_marginals(target_mask, dtype)
    return _closed_form(cost, a.unsqueeze(2) * b.unsqueeze(1), a, b, epsilon=torch.inf)


def exact_plan(cost: torch.Tensor, source_mask: torch.Tensor, target_mask: torch.Tensor) -> TransportResult:
    """The limit epsilon → 0: the exact plan of each pair by POT's network simplex, on the CPU in float64.

    Raises:
        ImportError: without POT.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError('ot_solver="exact" needs the package POT: pip install POT') from error
    dtype = torch.promote_types(cost.dtype, torch.float32)
    a, b = uniform_marginals(source_mask, dtype), uniform_marginals(target_mask, dtype)
    plan = torch.zeros_like(cost, dtype=dtype)
    for index in range(cost.shape[0]):
        rows, columns = source_mask[index].nonzero().squeeze(1), target_mask[index].nonzero().squeeze(1)
        if rows.numel() and columns.numel():
            block = cost[index].detach()[rows][:, columns].double().cpu().numpy()
            solved = torch.as_tensor(ot.emd([], [], block), dtype=dtype, device=cost.device)
            plan[index, rows.unsqueeze(1), columns] = solved
    return _closed_form(cost, plan, a, b, epsilon=0.0)


def _closed_form(
    cost: torch.Tensor, plan: torch.Tensor, a: torch.Tensor, b: torch.Tensor, epsilon: float
) -> TransportResult:
    """A result from a plan that needed no sweeps; its potentials are not computed (zeros)."""
    pairs = cost.shape[0]
    value = torch.where(plan > 0, plan * cost.detach(), 0).sum(dim=(1, 2))
    return TransportResult(
        value=_PlanGradient.apply(cost, plan, value),
        source_potential=torch.zeros_like(a),
        target_potential=torch.zeros_like(b),
        iterations=torch.zeros(pairs, dtype=torch.long, device=cost.device),
        marginal_error=torch.zeros_like(value),
        converged=torch.ones(pairs, dtype=torch.bool, device=cost.device),
        plan_entropy=_row_entropy(plan, a),
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
) -> tuple[torch.Tensor, TransportResult]:
    """Mean transport value over the pairs of a batch that have tokens on both sides (method.md, section 2).

    Args:
        source_states, target_states: B x n x E and B x m x E token states.
        source_mask, target_mask: B x n and B x m, 1 on the tokens to align (no padding, no special tokens).
        epsilon: in units of `epsilon_scale`.
        epsilon_scale, cost, solver, max_iter, tol: see `XLFAConfig`.

    Returns:
        The loss (a scalar, 0 where no pair has tokens on both sides) and the solver's result.
    """
    matrix = pairwise_cost(source_states, target_states, cost)
    if solver == "product":
        result = product_plan(matrix, source_mask, target_mask)
    elif solver == "exact":
        result = exact_plan(matrix, source_mask, target_mask)
    else:
        # Equal costs have no spread to measure epsilon in; every positive unit gives them the same product plan.
        unit = cost_scale(matrix, source_mask, target_mask, epsilon_scale).clamp(min=1e-6)
        result = sinkhorn(matrix, epsilon * unit, source_mask, target_mask, max_iter, tol)
    pairs = _valid_entries(source_mask, target_mask).any(dim=(1, 2)).to(result.value.dtype)
    return (result.value * pairs).sum() / pairs.sum().clamp(min=1), result
