"""Entropic optimal transport between the tokens of sentence pairs.

For a pair with token vectors X (n x E) and Y (m x E), cost C (n x m) and marginals a, b that sum to 1:

    OT_eps(a, b) = min_{P 1 = a, P^T 1 = b} <P, C> + eps KL(P || a b^T)

Its dual potentials f, g give the plan P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps) and, at convergence, the gradient
d OT_eps / dC = P (envelope theorem): nothing of the iterations enters the autograd graph.

Unbalanced, the marginals are met softly: + tau KL(P 1 || a) + tau KL(P^T 1 || b) replaces the constraints (Chizat et
al. 2018, arXiv 1607.05816); tau → infinity is the balanced problem. Debiased, the value is the Sinkhorn divergence
OT_eps(a, b) - OT_eps(a, a) / 2 - OT_eps(b, b) / 2 (Feydy et al. 2019, arXiv 1810.08278).
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
        converged: B, whether the error came below the tolerance (of the self terms too, where the value is debiased).
        plan_entropy: B, mean entropy in nats of the plan's rows as distributions over the target tokens.
        epsilon: B, the absolute epsilon that was used.
        plan: B x n x m where it was asked for, else None; the closed forms always have it.
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

    @property
    def effective_links(self) -> torch.Tensor:
        """B, the number of target tokens a source token is linked to: the perplexity of the plan's rows."""
        return self.plan_entropy.exp()


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
    source_marginal: torch.Tensor | None = None,
    target_marginal: torch.Tensor | None = None,
    tau: float | None = None,
    symmetric: bool = False,
) -> TransportResult:
    """Solve OT_eps for a batch of pairs.

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
        source_marginal, target_marginal: B x n and B x m, each row summing to 1 over its mask; by default uniform.
        tau: strength of the soft marginals, absolute, > 0; None for hard ones.
        symmetric: source and target are the same tokens (cost symmetric with a zero diagonal): the averaged symmetric
            fixed point of Feydy et al. (section 3.1) replaces the alternating updates.

    Raises:
        ValueError: if epsilon or tau is not positive and finite, or the cost has a NaN or an infinity at a valid entry.
    """
    with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
        valid = _valid_entries(source_mask, target_mask)
        problem = _finite_cost(cost, valid)
        epsilon = _positive_per_pair("epsilon", epsilon, problem)
        # tau / eps; without tau the exponent tau / (tau + eps) is 1.
        softness = None if tau is None else _positive_per_pair("tau", tau, problem) / epsilon
        scaled = problem / epsilon.view(-1, 1, 1)
        # Padding costs more than every token: finite, so that no product meets an infinity.
        scaled = torch.where(valid, scaled, scaled.amax() - MIN_EXPONENT)
        a = _marginal(source_marginal, source_mask, scaled.dtype)
        b = _marginal(target_marginal, target_mask, scaled.dtype)
        empty = ~valid.any(dim=(1, 2))
        phi, gamma, iterations, converged = _solve(scaled, a, b, softness, symmetric, empty, max_iter, tol)

        plan = torch.exp((phi.unsqueeze(2) + gamma.unsqueeze(1) - scaled).to(scaled.dtype))
        plan = plan * a.unsqueeze(2) * b.unsqueeze(1)
        error = (plan.sum(2) - _soft_marginal(a, phi, softness)).abs().sum(1)
        error = error + (plan.sum(1) - _soft_marginal(b, gamma, softness)).abs().sum(1)
        # The dual value is 4 to 70 times more accurate than <P, C> + eps KL at the same potentials.
        value = epsilon * (_dual_part(a, phi, softness) + _dual_part(b, gamma, softness) - plan.sum(dim=(1, 2)) + 1)
        source_potential = torch.where(source_mask.bool(), phi * epsilon.unsqueeze(1), 0).to(scaled.dtype)
        target_potential = torch.where(target_mask.bool(), gamma * epsilon.unsqueeze(1), 0).to(scaled.dtype)
    return TransportResult(
        value=_PlanGradient.apply(cost, plan, torch.where(empty, 0, value).to(plan.dtype)),
        source_potential=source_potential,
        target_potential=target_potential,
        iterations=iterations,
        marginal_error=torch.where(empty, 0, error).to(plan.dtype),
        converged=converged,
        plan_entropy=_row_entropy(plan),
        epsilon=epsilon,
        plan=plan if return_plan else None,
    )


def _finite_cost(cost: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The cost without gradient, float32 at least, 0 outside the masks.

    Raises:
        ValueError: for a NaN or an infinity at a valid entry.
    """
    cost = torch.where(valid, cost.detach(), 0).to(torch.promote_types(cost.dtype, torch.float32))
    if not torch.isfinite(cost).all():
        raise ValueError("the cost has a NaN or an infinite entry: check the token states it was computed from")
    return cost


def _positive_per_pair(name: str, value: float | torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    value = torch.as_tensor(value, dtype=cost.dtype, device=cost.device).detach().expand(cost.shape[0])
    if not (torch.isfinite(value) & (value > 0)).all():
        raise ValueError(f"{name} must be positive and finite, got {value.tolist()}")
    return value


def _marginal(marginal: torch.Tensor | None, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return uniform_marginals(mask, dtype) if marginal is None else marginal.detach().to(dtype) * mask.to(dtype)


def _soft_marginal(marginal: torch.Tensor, potential: torch.Tensor, softness: torch.Tensor | None) -> torch.Tensor:
    """What the plan's marginal is at the optimum: itself, or times exp(-f / tau) where it is met softly."""
    if softness is None:
        return marginal
    return marginal * torch.exp(-potential / softness.unsqueeze(1))


def _dual_part(marginal: torch.Tensor, potential: torch.Tensor, softness: torch.Tensor | None) -> torch.Tensor:
    """One side's part of the dual value over epsilon: <a, f>, or tau <a, 1 - exp(-f / tau)>, shape B."""
    if softness is None:
        return (marginal * potential).sum(1)
    return -softness * (marginal * torch.expm1(-potential / softness.unsqueeze(1))).sum(1)


def _solve(
    scaled: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    softness: torch.Tensor | None,
    symmetric: bool,
    empty: torch.Tensor,
    max_iter: int,
    tol: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Potentials over epsilon (float64, B x n and B x m), sweeps and convergence flags for the cost over epsilon."""
    phi, gamma = _c_transforms(scaled, a, b)
    iterations = torch.zeros(scaled.shape[0], dtype=torch.long, device=scaled.device)
    converged = empty.clone()

    active = torch.nonzero(~empty).squeeze(1)
    if active.numel() == 0:
        return phi, gamma, iterations, converged
    form = _SymmetricForm if symmetric else _ScalingForm
    problem = form(scaled, a, b, phi, gamma, softness)
    problem.select(active)
    previous_error = None
    block = FIRST_BLOCK
    sweeps = 0
    while True:
        block = min(block, max_iter - sweeps)
        problem.sweep(block)
        sweeps += block
        error = problem.error()
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

    def __init__(
        self,
        scaled: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        phi: torch.Tensor,
        gamma: torch.Tensor,
        softness: torch.Tensor | None,
    ):
        self.scaled, self.phi, self.gamma, self.softness = scaled, phi, gamma, softness
        self.a, self.b = a.unsqueeze(1), b.unsqueeze(1)
        self.relaxation = scaled.new_ones(scaled.shape[0], 1, 1)

    def select(self, index: torch.Tensor) -> None:
        """Keep these pairs only; the potentials must have absorbed the scalings before."""
        self.scaled, self.phi, self.gamma = self.scaled[index], self.phi[index], self.gamma[index]
        self.a, self.b, self.relaxation = self.a[index], self.b[index], self.relaxation[index]
        self.softness = None if self.softness is None else self.softness[index]
        self.build_kernel()

    def build_kernel(self) -> None:
        """The kernel of the present potentials; the scalings start again from 1."""
        exponent = (self.phi.unsqueeze(2) + self.gamma.unsqueeze(1) - self.scaled).to(self.scaled.dtype)
        self.kernel = exponent.clamp_(min=MIN_EXPONENT, max=-MIN_EXPONENT).exp_()
        self.transposed = self.kernel.transpose(1, 2).contiguous()
        self.row, self.column = torch.ones_like(self.a), torch.ones_like(self.b)

    def updated(self, product: torch.Tensor, potential: torch.Tensor) -> torch.Tensor:
        """Logarithm of the plain update of a scaling from its kernel product.

        Hard marginals: -log product. Soft ones: the whole potential, absorbed part included, shrinks by
        tau / (tau + eps).
        """
        logarithm = -product.log()
        if self.softness is None:
            return logarithm
        exponent = (self.softness / (self.softness + 1)).view(-1, 1, 1)
        return exponent * logarithm + ((exponent - 1) * potential.unsqueeze(1)).to(logarithm.dtype)

    def relaxed(self, scaling: torch.Tensor, product: torch.Tensor, potential: torch.Tensor) -> torch.Tensor:
        """scaling^(1 - w) · update^w, in logarithms and bounded."""
        logarithm = scaling.log()
        logarithm = logarithm + self.relaxation * (self.updated(product, potential) - logarithm)
        return logarithm.exp_().clamp_(1 / MAX_SCALING, MAX_SCALING)

    def plain(self, product: torch.Tensor, potential: torch.Tensor) -> torch.Tensor:
        if self.softness is None:
            return product.reciprocal().clamp_(1 / MAX_SCALING, MAX_SCALING)
        return self.updated(product, potential).exp_().clamp_(1 / MAX_SCALING, MAX_SCALING)

    def sweep(self, count: int) -> None:
        """`count` updates of both scalings, the last one plain so that the columns are met exactly."""
        for _ in range(count - 1):
            self.row = self.relaxed(self.row, (self.b * self.column) @ self.transposed, self.phi)
            self.column = self.relaxed(self.column, (self.a * self.row) @ self.kernel, self.gamma)
        self.row = self.plain((self.b * self.column) @ self.transposed, self.phi)
        self.column = self.plain((self.a * self.row) @ self.kernel, self.gamma)

    def error(self) -> torch.Tensor:
        """L1 error of the rows' marginals; after a plain sweep the columns have none."""
        potential = self.phi + self.row.squeeze(1).log()
        wanted = _soft_marginal(self.a.squeeze(1), potential, self.softness)
        found = (self.a * self.row * ((self.b * self.column) @ self.transposed)).squeeze(1)
        return (found - wanted).abs().sum(1).to(self.scaled.dtype)

    def absorb(self) -> None:
        """Move the scalings into the potentials, in float64: float32 ones have a floor of |C/eps| · 6e-8."""
        self.phi = self.phi + torch.where(self.a > 0, self.row.log(), 0).squeeze(1)
        self.gamma = self.gamma + torch.where(self.b > 0, self.column.log(), 0).squeeze(1)
        self.row, self.column = torch.ones_like(self.a), torch.ones_like(self.b)

    def largest_exponent(self) -> torch.Tensor:
        """Per pair, the largest absolute logarithm of its scalings."""
        row = torch.where(self.a > 0, self.row.log(), 0).abs().amax(dim=(1, 2))
        return torch.maximum(row, torch.where(self.b > 0, self.column.log(), 0).abs().amax(dim=(1, 2)))

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


class _SymmetricForm(_ScalingForm):
    """Sweeps for a sentence against itself: one scaling, averaged with its update, serves both sides."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        # The cost has a zero diagonal: zero potentials are feasible and meet it there.
        self.phi, self.gamma = torch.zeros_like(self.phi), torch.zeros_like(self.gamma)

    def sweep(self, count: int) -> None:
        """`count` averaged updates."""
        for _ in range(count):
            logarithm = self.row.log()
            update = self.updated((self.b * self.row) @ self.kernel, self.phi)
            self.row = ((logarithm + update) / 2).exp_().clamp_(1 / MAX_SCALING, MAX_SCALING)
        self.column = self.row

    def error(self) -> torch.Tensor:
        """L1 error of both marginals, which are the same."""
        return 2 * super().error()

    def adapt_relaxation(self, error: torch.Tensor, previous: torch.Tensor | None, sweeps: int) -> None:
        """Nothing to fit: the averaging is the relaxation."""


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


def _row_entropy(plan: torch.Tensor) -> torch.Tensor:
    """Mean, by the mass they carry, of the entropy (nats) of the plan's rows: H(P) - H(P 1) over the mass, shape B."""
    mass = plan.sum(dim=(1, 2)).clamp(min=torch.finfo(plan.dtype).tiny)
    return (torch.special.entr(plan).sum(dim=(1, 2)) - torch.special.entr(plan.sum(2)).sum(1)) / mass


def product_plan(
    cost: torch.Tensor,
    source_mask: torch.Tensor,
    target_mask: torch.Tensor,
    source_marginal: torch.Tensor | None = None,
    target_marginal: torch.Tensor | None = None,
) -> TransportResult:
    """The limit epsilon → infinity: P = a b^T, value <P, C>. Arguments and result as for `sinkhorn`."""
    dtype = torch.promote_types(cost.dtype, torch.float32)
    a, b = _marginal(source_marginal, source_mask, dtype), _marginal(target_marginal, target_mask, dtype)
    problem = _finite_cost(cost, _valid_entries(source_mask, target_mask))
    return _closed_form(cost, problem, a.unsqueeze(2) * b.unsqueeze(1), a, b, epsilon=torch.inf)


def exact_plan(
    cost: torch.Tensor,
    source_mask: torch.Tensor,
    target_mask: torch.Tensor,
    source_marginal: torch.Tensor | None = None,
    target_marginal: torch.Tensor | None = None,
) -> TransportResult:
    """The limit epsilon → 0: the exact plan of each pair by POT's network simplex, on the CPU in float64.

    Arguments and result as for `sinkhorn`.

    Raises:
        ImportError: without POT.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError('ot_solver="exact" needs the package POT: pip install POT') from error
    dtype = torch.promote_types(cost.dtype, torch.float32)
    a, b = _marginal(source_marginal, source_mask, dtype), _marginal(target_marginal, target_mask, dtype)
    problems = _finite_cost(cost, _valid_entries(source_mask, target_mask))
    plan = torch.zeros_like(problems)
    for index in range(cost.shape[0]):
        rows, columns = source_mask[index].nonzero().squeeze(1), target_mask[index].nonzero().squeeze(1)
        if rows.numel() and columns.numel():
            problem = [problems[index][rows][:, columns], a[index, rows], b[index, columns]]
            block, weights_a, weights_b = (tensor.double().cpu().numpy() for tensor in problem)
            # The simplex wants equal masses to the last bit, which float32 marginals lose.
            solved = ot.emd(weights_a / weights_a.sum(), weights_b / weights_b.sum(), block)
            plan[index, rows.unsqueeze(1), columns] = torch.as_tensor(solved, dtype=dtype, device=cost.device)
    return _closed_form(cost, problems, plan, a, b, epsilon=0.0)


def _closed_form(
    cost: torch.Tensor, problem: torch.Tensor, plan: torch.Tensor, a: torch.Tensor, b: torch.Tensor, epsilon: float
) -> TransportResult:
    """A result from a plan that needed no sweeps, for the cost `problem`; its potentials are not computed (zeros)."""
    pairs = cost.shape[0]
    value = (plan * problem).sum(dim=(1, 2))
    return TransportResult(
        value=_PlanGradient.apply(cost, plan, value),
        source_potential=torch.zeros_like(a),
        target_potential=torch.zeros_like(b),
        iterations=torch.zeros(pairs, dtype=torch.long, device=cost.device),
        marginal_error=torch.zeros_like(value),
        converged=torch.ones(pairs, dtype=torch.bool, device=cost.device),
        plan_entropy=_row_entropy(plan),
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
) -> tuple[torch.Tensor, TransportResult]:
    """Mean transport value over the pairs of a batch that have tokens on both sides (method.md, section 2).

    Args:
        source_states, target_states: B x n x E and B x m x E token states.
        source_mask, target_mask: B x n and B x m, 1 on the tokens to align (no padding, no special tokens).
        epsilon, tau: in units of `epsilon_scale`; tau None for hard marginals.
        epsilon_scale, cost, solver, max_iter, tol: see `XLFAConfig`.
        source_marginal, target_marginal: see `sinkhorn`; by default uniform.
        debiased: subtract half of each side's value against itself: the Sinkhorn divergence.
        center: subtract from each side's states their mean over the tokens of the batch first.

    Returns:
        The loss (a scalar, 0 where no pair has tokens on both sides) and the solver's result for the pairs; its `value`
        is the divergence where `debiased`.

    Raises:
        ValueError: for an unknown solver or one that does not go with `tau`, and as `sinkhorn`.
    """
    if center:
        source_states = _centred(source_states, source_mask)
        target_states = _centred(target_states, target_mask)
    matrix = pairwise_cost(source_states, target_states, cost)
    sides = [
        (source_states, source_mask, _marginal(source_marginal, source_mask, matrix.dtype)),
        (target_states, target_mask, _marginal(target_marginal, target_mask, matrix.dtype)),
    ]
    # Equal costs have no spread to measure epsilon in. The floor is above their rounding only.
    unit = cost_scale(matrix, source_mask, target_mask, epsilon_scale).clamp(min=1e-6)
    if solver not in ("sinkhorn", "exact", "product"):
        raise ValueError(f"solver={solver!r} is not allowed: it must be 'sinkhorn', 'exact' or 'product'")
    if tau is not None and solver != "sinkhorn":
        raise ValueError(f"solver={solver!r} has hard marginals only: leave tau out, or use solver='sinkhorn'")

    def solve(matrix, first, second, symmetric=False):
        (_, first_mask, first_marginal), (_, second_mask, second_marginal) = first, second
        common = (matrix, first_mask, second_mask)
        if solver != "sinkhorn":
            closed_form = product_plan if solver == "product" else exact_plan
            return closed_form(*common, first_marginal, second_marginal)
        return sinkhorn(
            matrix,
            epsilon * unit,
            first_mask,
            second_mask,
            max_iter=max_iter,
            tol=tol,
            source_marginal=first_marginal,
            target_marginal=second_marginal,
            tau=None if tau is None else tau * unit,
            symmetric=symmetric,
        )

    result = solve(matrix, *sides)
    pairs = _valid_entries(source_mask, target_mask).any(dim=(1, 2))
    if debiased:
        selves = [solve(pairwise_cost(side[0], side[0], cost), side, side, symmetric=True) for side in sides]
        result.value = torch.where(pairs, result.value - (selves[0].value + selves[1].value) / 2, 0)
        for term in selves:
            result.converged = result.converged & (term.converged | ~pairs)
    return result.value.sum() / pairs.sum().clamp(min=1), result


def _centred(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    weights = mask.unsqueeze(-1).to(states.dtype)
    return states - (states * weights).sum(dim=(0, 1)) / weights.sum().clamp(min=1)
