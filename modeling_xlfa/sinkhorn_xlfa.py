"""Sinkhorn's algorithm for a batch of small problems, in torch.

A back end takes a `TransportProblem` and returns a `TransportResult`. The one here needs nothing but torch;
`transport_xlfa.py` says which others there are and when they are taken.
"""

import copy
from dataclasses import dataclass

import torch

# exp(-80) is 1.8e-35: above the denormals that would slow the products down, and never a zero to divide by.
MIN_EXPONENT, MAX_EXPONENT = -80.0, 25.0
# Scalings beyond exp(±25) are absorbed into the potentials; the floor of the kernel then still weighs below 1e-13.
ABSORB_EXPONENT = 25.0
# Inside one block of sweeps: a product of weight, scaling and kernel cannot overflow float32 below this.
MAX_SCALING_EXPONENT = 55.0
# Added to products before their logarithm is taken: a row far from every column must not give an infinity.
TINY = 1e-37
# Sweeps between two looks at the error (each look synchronises with the device once).
FIRST_BLOCK, LAST_BLOCK = 3, 24
# After k sweeps the relaxation is 2 - RAMP / (RAMP + k): what suits problems that need about k sweeps.
RAMP, MAX_RELAXATION = 8.0, 1.95
# One Newton step costs as much as 60 sweeps or so: it is tried on pairs that need many, once they are near.
NEWTON_AFTER, NEWTON_BELOW = 600, 0.1
# Longest Newton step of a potential, in units of epsilon: beyond, the quadratic model says nothing about the dual.
NEWTON_STEP = 2.0


@dataclass
class TransportProblem:
    """B pairs of at most n and m tokens as a back end gets them: checked, and without gradient.

    Attributes:
        cost: B x n x m, float32 or float64, contiguous and finite; what stands outside the tokens is finite too.
        epsilon: B, absolute, > 0, of the cost's type.
        source_marginal, target_marginal: B x n and B x m, each row summing to 1; 0 where there is no token. A pair with
            an empty side has a row of zeros there: its value is 0.
        tau: B, absolute, > 0, strength of the soft marginals; None for hard ones.
        symmetric: source and target are the same tokens with the same weights, and the cost is symmetric: one potential
            serves both sides.
        max_iter: most sweeps for a pair.
        tol: L1 error of the marginals at which a pair has converged.
    """

    cost: torch.Tensor
    epsilon: torch.Tensor
    source_marginal: torch.Tensor
    target_marginal: torch.Tensor
    tau: torch.Tensor | None = None
    symmetric: bool = False
    max_iter: int = 5000
    tol: float = 1e-3

    @property
    def empty(self) -> torch.Tensor:
        """B, pairs with no token on a side."""
        return ~((self.source_marginal > 0).any(1) & (self.target_marginal > 0).any(1))


@dataclass
class TransportResult:
    """What a solver returns for B pairs of at most n and m tokens.

    Attributes:
        value: B, OT_eps as its dual value; differentiable in the cost.
        source_potential, target_potential: B x n and B x m, f and g in units of the cost; 0 where there is no token.
        iterations: B, sweeps until convergence, Newton steps not counted (0 for the closed forms).
        marginal_error: B, ||P 1 - a||_1 + ||P^T 1 - b||_1; with soft marginals a exp(-f / tau) takes the place of a.
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

    @classmethod
    def of_empty_pairs(cls, problem: TransportProblem) -> "TransportResult":
        """Value, plan and error 0, converged without a sweep: what a back end fills in where pairs have tokens."""
        per_pair = torch.zeros_like(problem.epsilon)
        return cls(
            value=per_pair,
            source_potential=torch.zeros_like(problem.source_marginal),
            target_potential=torch.zeros_like(problem.target_marginal),
            iterations=torch.zeros_like(per_pair, dtype=torch.long),
            marginal_error=per_pair.clone(),
            converged=torch.ones_like(per_pair, dtype=torch.bool),
            plan_entropy=per_pair.clone(),
            epsilon=problem.epsilon,
            plan=torch.zeros_like(problem.cost),
        )

    @property
    def effective_links(self) -> torch.Tensor:
        """B, the number of target tokens a source token is linked to: the perplexity of the plan's rows."""
        return self.plan_entropy.exp()


def solve_with_torch(problem: TransportProblem) -> TransportResult:
    """Solve every pair of the batch; see `sinkhorn` in `transport_xlfa.py` for the method."""
    result = TransportResult.of_empty_pairs(problem)
    active = torch.nonzero(~problem.empty).squeeze(1)
    if active.numel() == 0:
        return result
    state = (_SymmetricSweeps if problem.symmetric else _Sweeps)(problem, active)
    count, block = 0, FIRST_BLOCK
    while True:
        block = min(block, problem.max_iter - count)
        state.run(block)
        count += block
        error, stretched = state.error(), state.stretched()
        # While the scalings are large, the kernel's floor carries mass that the plan does not have.
        done = (error <= problem.tol) & ~stretched
        newton = state.plan_ahead(error, count) & ~done
        # The one synchronisation of a block in which no pair finishes.
        any_done, all_done, any_stretched, any_newton = torch.stack(
            [done.any(), done.all(), stretched.any(), newton.any()]
        ).tolist()
        if all_done or count >= problem.max_iter:
            state.write(result, active, done, count)
            return result
        if any_done:
            # Indices, not masks: on a GPU, every choice by a mask would wait for the device.
            finished, unfinished = torch.nonzero(done).squeeze(1), torch.nonzero(~done).squeeze(1)
            state.chosen(finished).write(result, active[finished], done[finished], count)
            active, newton = active[unfinished], newton[unfinished]
            state = state.chosen(unfinished)
        if any_newton or any_stretched:
            state.absorb()
        if any_newton:
            state.newton(torch.nonzero(newton).squeeze(1))
        block = FIRST_BLOCK if any_newton else min(LAST_BLOCK, block + block // 2)


class _Sweeps:
    """The pairs that are still being solved: potentials, the kernel they absorb into, and scalings in logarithms.

    With the reduced cost R = C / eps - phi - gamma and the kernel K = exp(-R), the plan is
    diag(a exp(row)) K diag(b exp(column)). Row vectors times a contiguous matrix are the fast form of these products on
    a CPU, hence K and its transpose. R is kept in float32: where the plan has mass, R is small after the first
    absorption and loses nothing. The potentials over epsilon, phi and gamma, are float64.

    Vectors over tokens are k x 1 x n or k x 1 x m for k pairs, numbers a pair k x 1 x 1.
    """

    def __init__(self, problem: TransportProblem, active: torch.Tensor):
        def pick(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if len(active) == len(problem.cost) else tensor[active]

        self.epsilon = pick(problem.epsilon).view(-1, 1, 1)
        self.a, self.b = pick(problem.source_marginal).unsqueeze(1), pick(problem.target_marginal).unsqueeze(1)
        self.softness = None if problem.tau is None else pick(problem.tau).view(-1, 1, 1) / self.epsilon
        # Sweeps since the relaxation began to grow, the error at the last look, and when Newton's method is tried next.
        self.age = torch.zeros_like(self.epsilon)
        self.last_error = torch.full_like(self.epsilon, torch.inf).view(-1)
        self.newton_after = torch.full_like(self.last_error, NEWTON_AFTER)
        self.start(pick(problem.cost) / self.epsilon)
        self.build_kernel()

    def start(self, scaled: torch.Tensor) -> None:
        """Potentials by c-transforms, the form of the solution at epsilon → 0: every row and column of K has a 1."""
        valid = (self.a > 0).transpose(1, 2) & (self.b > 0)
        reduced = torch.where(valid, scaled, torch.inf)
        phi = torch.where(self.a > 0, reduced.amin(2, keepdim=True).transpose(1, 2), 0)
        reduced -= phi.transpose(1, 2)
        gamma = torch.where(self.b > 0, reduced.amin(1, keepdim=True), 0)
        reduced -= gamma
        # Padding: any finite number would do, since its weights are zero; 0 keeps the products there near 1.
        self.reduced = torch.where(valid, reduced, 0)
        self.phi, self.gamma = phi.double(), gamma.double()

    def build_kernel(self) -> None:
        """The kernel of the present potentials; the scalings start again from 1."""
        self.kernel = self.reduced.neg().clamp_(MIN_EXPONENT, MAX_EXPONENT).exp_()
        self.transposed = self.kernel.transpose(1, 2).contiguous()
        self.row, self.column = torch.zeros_like(self.a), torch.zeros_like(self.b)
        self.row_product = self.b @ self.transposed

    def chosen(self, index: torch.Tensor) -> "_Sweeps":
        """The same for these pairs only."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            if value is not None:
                setattr(part, name, value[index])
        return part

    def run(self, count: int) -> None:
        """`count` updates of both scalings, over-relaxed but for the last, so that the columns are met exactly."""
        relaxation = (2 - RAMP / (RAMP + self.age)).clamp(max=MAX_RELAXATION)
        for step in range(1, count + 1):
            weight = relaxation if step < count else torch.ones_like(relaxation)
            self.row = self._moved(self.row, self.row_product, self.phi, weight)
            column_product = (self.a * self.row.exp()) @ self.kernel
            self.column = self._moved(self.column, column_product, self.gamma, weight)
            self.row_product = (self.b * self.column.exp()) @ self.transposed
        self.age += count

    def _moved(
        self, scaling: torch.Tensor, product: torch.Tensor, potential: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """The scaling's logarithm, moved by `weight` times its way to the update from its kernel product.

        Hard marginals: the update is -log product. Soft ones: the whole potential, absorbed part included, shrinks by
        tau / (tau + eps).
        """
        update = -(product + TINY).log()
        if self.softness is not None:
            exponent = self.softness / (self.softness + 1)
            update = exponent * update + ((exponent - 1) * potential).to(update.dtype)
        return torch.lerp(scaling, update, weight).clamp_(-MAX_SCALING_EXPONENT, MAX_SCALING_EXPONENT)

    def error(self) -> torch.Tensor:
        """L1 error of the rows' marginals, k; after a plain sweep the columns have none."""
        found = self.a * self.row.exp() * self.row_product
        return (found - self._wanted(self.a, self.phi + self.row)).abs().sum(dim=(1, 2)).to(found.dtype)

    def _wanted(self, marginal: torch.Tensor, potential: torch.Tensor) -> torch.Tensor:
        """What the plan's marginal is at the optimum: itself, or times exp(-f / tau) where it is met softly."""
        return marginal if self.softness is None else marginal * torch.exp(-potential / self.softness)

    def stretched(self) -> torch.Tensor:
        """k, whether a scaling has grown so far that it must be absorbed."""
        row, column = self._on_tokens()
        return torch.maximum(row.abs().amax(dim=(1, 2)), column.abs().amax(dim=(1, 2))) > ABSORB_EXPONENT

    def _on_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The scalings' logarithms, 0 on padding."""
        return torch.where(self.a > 0, self.row, 0), torch.where(self.b > 0, self.column, 0)

    def plan_ahead(self, error: torch.Tensor, count: int) -> torch.Tensor:
        """Set the pace of the next block from the error (k) after `count` sweeps; k, which pairs take a Newton step.

        Where the error has doubled, the relaxation starts again from plain sweeps. A pair whose Newton step did not
        halve it goes on with sweeps, half as many as it has taken so far.
        """
        self.age = torch.where((error > 2 * self.last_error).view(-1, 1, 1), 0, self.age)
        halved = error < self.last_error / 2
        newton = ((count >= self.newton_after) | (halved & (count >= NEWTON_AFTER))) & (error < NEWTON_BELOW)
        self.newton_after = torch.where(newton, count + count // 2, self.newton_after)
        self.last_error = error
        return newton

    def absorb(self) -> None:
        """Move the scalings into the potentials, in float64: float32 ones have a floor of |C/eps| · 6e-8."""
        row, column = self._on_tokens()
        self.phi, self.gamma = self.phi + row, self.gamma + column
        self.reduced -= row.transpose(1, 2)
        self.reduced -= column
        self.build_kernel()

    def newton(self, index: torch.Tensor) -> None:
        """A damped Newton step on the dual for the pairs `index`, whose scalings have just been absorbed.

        With r, c the plan's marginals and t the ones wanted, the step solves (Brauer et al. 2017, arXiv 1710.06635)
        [D_a P; P^T D_b] (d phi, d gamma) = (t_a - r, t_b - c), where D_a = r (+ t_a eps / tau if soft). The larger side
        is eliminated; what remains is dense, positive definite once the constant shift is taken out, and solved in
        float64.
        """
        a, b = self.a[index].double().squeeze(1), self.b[index].double().squeeze(1)
        plan = self.reduced[index].double().neg_().exp_() * a.unsqueeze(2) * b.unsqueeze(1)
        sides = []
        for marginal, potential, found in ((a, self.phi, plan.sum(2)), (b, self.gamma, plan.sum(1))):
            wanted, diagonal = marginal, found
            if self.softness is not None:
                softness = self.softness[index].double().view(-1, 1)
                wanted = marginal * torch.exp(-potential[index].squeeze(1) / softness)
                diagonal = found + wanted / softness
            # Padding has no mass and moves nothing: any positive diagonal will do.
            sides.append((wanted - found, torch.where(marginal > 0, diagonal, 1), marginal))
        if plan.shape[1] < plan.shape[2]:
            step_b, step_a = _eliminate(plan.transpose(1, 2), *reversed(sides), self.softness is None)
        else:
            step_a, step_b = _eliminate(plan, *sides, self.softness is None)
        longest = torch.maximum(step_a.abs().amax(1), step_b.abs().amax(1)).view(-1, 1)
        # A factorisation that failed gives no number: such a pair stays where it is.
        length = torch.where(torch.isfinite(longest), (NEWTON_STEP / longest).clamp(max=1), 0)
        step_a, step_b = (torch.nan_to_num(step * length, nan=0.0) for step in (step_a, step_b))
        self.phi[index] += step_a.unsqueeze(1)
        self.gamma[index] += step_b.unsqueeze(1)
        self.reduced[index] -= (step_a.unsqueeze(2) + step_b.unsqueeze(1)).to(self.reduced.dtype)
        self.age[index] = 0
        self.build_kernel()

    def write(self, result: TransportResult, index: torch.Tensor, converged: torch.Tensor, count: int) -> None:
        """Put what is known of the pairs into their places `index` (k) of the result."""
        row, column = self._on_tokens()
        plan = self.kernel * (self.a * row.exp()).transpose(1, 2)
        plan *= self.b * column.exp()
        phi, gamma = self.phi + row, self.gamma + column
        rows, columns = plan.sum(2), plan.sum(1)
        mass = rows.sum(1)
        # The dual value is 4 to 70 times more accurate than <P, C> + eps KL at the same potentials.
        value = self._dual_part(self.a, phi) + self._dual_part(self.b, gamma) + self._missing_mass(mass)
        error = (rows - self._wanted(self.a, phi).squeeze(1)).abs().sum(1)
        error = error + (columns - self._wanted(self.b, gamma).squeeze(1)).abs().sum(1)
        # Sum of P log P by its exponents: no logarithm of k x n x m entries.
        logarithm = torch.xlogy(rows, self.a.squeeze(1)) + rows * row.squeeze(1)
        logarithm = logarithm.sum(1) + (torch.xlogy(columns, self.b.squeeze(1)) + columns * column.squeeze(1)).sum(1)
        logarithm -= torch.linalg.vecdot(plan.flatten(1), self.reduced.flatten(1))

        def put(name: str, values: torch.Tensor) -> None:
            wanted = getattr(result, name)
            values = values.to(wanted.dtype)
            if len(index) == len(result.value):
                setattr(result, name, values)
            else:
                wanted[index] = values

        put("value", self.epsilon.view(-1) * value)
        put("source_potential", (phi * self.epsilon).squeeze(1))
        put("target_potential", (gamma * self.epsilon).squeeze(1))
        put("iterations", torch.full_like(index, count))
        put("marginal_error", error)
        put("converged", converged)
        put("plan_entropy", -(logarithm + torch.special.entr(rows).sum(1)) / mass.clamp(min=TINY))
        put("plan", plan)

    def _missing_mass(self, mass: torch.Tensor) -> torch.Tensor:
        """1 less the plan's mass, k. Hard marginals of the columns have just been met: what is missing is rounding."""
        return torch.zeros_like(mass) if self.softness is None else 1 - mass

    def _dual_part(self, marginal: torch.Tensor, potential: torch.Tensor) -> torch.Tensor:
        """One side's part of the dual value over epsilon, k: <a, f>, or tau <a, 1 - exp(-f / tau)>."""
        if self.softness is None:
            return (marginal * potential).sum(dim=(1, 2))
        return -(self.softness * marginal * torch.expm1(-potential / self.softness)).sum(dim=(1, 2))


class _SymmetricSweeps(_Sweeps):
    """Sweeps for a sentence against itself: one scaling, averaged with its update, serves both sides.

    This is the fixed point of Feydy et al. 2019, section 3.1. The kernels of the costs here are positive semidefinite,
    so an averaged update at least halves the error: there is nothing to relax, and no need of Newton's method.
    """

    def start(self, scaled: torch.Tensor) -> None:
        """Half the diagonal as potentials, which makes it 0 in R: the solution's form at epsilon → 0."""
        valid = (self.a > 0).transpose(1, 2) & (self.b > 0)
        half = torch.where(self.a > 0, scaled.diagonal(dim1=1, dim2=2).unsqueeze(1) / 2, 0)
        self.reduced = torch.where(valid, scaled - half - half.transpose(1, 2), 0)
        self.phi = self.gamma = half.double()

    def run(self, count: int) -> None:
        """`count` averaged updates."""
        half = torch.full_like(self.epsilon, 0.5)
        for _ in range(count):
            self.row = self._moved(self.row, self.row_product, self.phi, half)
            self.row_product = (self.b * self.row.exp()) @ self.kernel
        self.column = self.row

    def error(self) -> torch.Tensor:
        """L1 error of both marginals, k: they are the same, and neither is met exactly."""
        return 2 * super().error()

    def _missing_mass(self, mass: torch.Tensor) -> torch.Tensor:
        return 1 - mass

    def plan_ahead(self, error: torch.Tensor, count: int) -> torch.Tensor:
        """k, no pair takes a Newton step."""
        return torch.zeros_like(error, dtype=torch.bool)


def _eliminate(
    plan: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    hard: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve [D_a P; P^T D_b] (x, y) = (u, v) by the Schur complement of D_a, float64.

    Args:
        plan: k x n x m.
        first: u, D_a and the marginal a, each k x n.
        second: v, D_b and the marginal b, each k x m.
        hard: with hard marginals a constant shift between the sides changes nothing: it is held at 0.
    """
    residual_a, diagonal_a, _ = first
    residual_b, diagonal_b, b = second
    quotient = plan / diagonal_a.unsqueeze(2)
    schur = torch.diag_embed(diagonal_b) - plan.transpose(1, 2) @ quotient
    if hard:
        schur += b.unsqueeze(2) * b.unsqueeze(1)
    right = residual_b.unsqueeze(2) - quotient.transpose(1, 2) @ residual_a.unsqueeze(2)
    factor, failed = torch.linalg.cholesky_ex(schur)
    step_b = torch.cholesky_solve(right, factor)
    step_b = torch.where(failed.view(-1, 1, 1) == 0, step_b, torch.nan)
    step_a = (residual_a.unsqueeze(2) - plan @ step_b) / diagonal_a.unsqueeze(2)
    return step_a.squeeze(2), step_b.squeeze(2)
