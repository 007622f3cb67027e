"""What the transport benchmark solves, batches of token states, and how it judges an answer."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from modeling_xlfa.transport_xlfa import cost_scale, pairwise_cost, sinkhorn, uniform_marginals

SHORTEST = 8
CENTRES, CENTRE_NOISE = 8, 0.3
COPY_NOISE = 0.5


@dataclass(frozen=True)
class Setting:
    """Size of a batch: pairs, most tokens a side, width of a state."""

    pairs: int
    tokens: int
    width: int


SETTINGS = {"small": Setting(32, 128, 384), "large": Setting(64, 256, 768)}


@dataclass
class Batch:
    """Token states B x L x d, float32, and their masks B x L. Padding holds states too, as an encoder's does."""

    source: torch.Tensor
    target: torch.Tensor
    source_mask: torch.Tensor
    target_mask: torch.Tensor


def make_batch(setting: Setting, data: str, lengths: str, seed: int, device: str) -> Batch:
    """A batch of kind `data`, a function of the arguments only (drawn on the CPU).

    `"clustered"`: a token is one of its pair's few centres plus noise, chosen independently on both sides: many tokens
    compete for few partners, which is what trained encoders give and what needs many sweeps. `"noisy_copies"`: target
    token j is source token j plus noise.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (setting.pairs, setting.tokens, setting.width)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    if data == "clustered":
        centres = noise(setting.pairs, CENTRES, setting.width)

        def side() -> torch.Tensor:
            chosen = torch.randint(CENTRES, shape[:2], generator=generator)
            return centres.gather(1, chosen.unsqueeze(2).expand(shape)) + CENTRE_NOISE * noise(*shape)

        source, target = side(), side()
    else:
        source = noise(*shape)
        target = source + COPY_NOISE * noise(*shape)
    masks = [_mask(setting, lengths, generator) for _ in range(2)]
    return Batch(*(tensor.to(device) for tensor in (source, target, *masks)))


def _mask(setting: Setting, lengths: str, generator: torch.Generator) -> torch.Tensor:
    """B x L: all ones, or ones up to a length drawn uniformly from SHORTEST..L, with one pair at full length."""
    drawn = torch.full((setting.pairs,), setting.tokens)
    if lengths == "ragged":
        drawn = torch.randint(min(SHORTEST, setting.tokens), setting.tokens + 1, (setting.pairs,), generator=generator)
        drawn[torch.randint(setting.pairs, (), generator=generator)] = setting.tokens
    return (torch.arange(setting.tokens) < drawn.unsqueeze(1)).long()


@dataclass(frozen=True)
class Limits:
    """When a solver has to stop: at the tolerance, or else a cap on sweeps, on a run's seconds or on its bytes."""

    tol: float
    max_iter: int
    seconds: float
    bytes: float


@dataclass(eq=False)
class Case:
    """One batch at one epsilon (`relative`: in units of each pair's mean cost)."""

    batch: Batch
    relative: float
    limits: Limits
    # What peers found out about this problem before they are timed, for the rows that share it.
    notes: dict = field(default_factory=dict)

    @cached_property
    def cost(self) -> torch.Tensor:
        """B x n x m, given to the rows that only solve."""
        return pairwise_cost(self.batch.source, self.batch.target)

    @cached_property
    def epsilon(self) -> torch.Tensor:
        """B, absolute."""
        return self.epsilon_for(self.cost)

    @cached_property
    def in_centred_std(self) -> float:
        """Epsilon in units of the standard deviation of the double-centred cost, mean over the pairs."""
        return (self.epsilon / self.scale_of(self.cost, "centered_std")).mean().item()

    @cached_property
    def marginals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B x n and B x m, uniform over the tokens, 0 on padding."""
        return tuple(uniform_marginals(mask, torch.float32) for mask in self.masks)

    @property
    def masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B x n and B x m."""
        return self.batch.source_mask, self.batch.target_mask

    @property
    def pairs(self) -> int:
        """B."""
        return len(self.batch.source)

    def scale_of(self, cost: torch.Tensor, unit: str) -> torch.Tensor:
        """B, the unit of epsilon."""
        return cost_scale(cost, *self.masks, unit)

    def epsilon_for(self, cost: torch.Tensor) -> torch.Tensor:
        """B, absolute: what every end-to-end row computes from its own cost matrix."""
        return self.relative * self.scale_of(cost, "mean")

    def leaves(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Source and target states that collect gradients, fresh ones at each call."""
        return tuple(side.detach().to(dtype).requires_grad_() for side in (self.batch.source, self.batch.target))

    @cached_property
    def reference(self) -> "Reference":
        """The solution in float64."""
        result = sinkhorn(
            self.cost.double(),
            self.epsilon.double(),
            *self.masks,
            tol=1e-9,
            max_iter=10**6,
            return_plan=True,
            backend="torch",
        )
        leaves = self.leaves(torch.float64)
        pairwise_cost(*leaves).backward(result.plan / self.pairs)
        return Reference(
            values=result.value.cpu(),
            plan=result.plan.cpu(),
            gradients=tuple(leaf.grad.cpu() for leaf in leaves),
            iterations=int(result.iterations.max()),
            marginal_error=marginal_error(self, result.plan.cpu()),
        )


@dataclass
class Reference:
    """Values (B), plan (B x n x m) and gradients of the mean value with respect to the states, all float64."""

    values: torch.Tensor
    plan: torch.Tensor
    gradients: tuple[torch.Tensor, torch.Tensor]
    iterations: int
    marginal_error: float


def marginal_error(case: Case, plan: torch.Tensor) -> float:
    """Worst pair's ||P 1 - a||_1 + ||P^T 1 - b||_1 of a float64 plan on the CPU."""
    a, b = (uniform_marginals(mask.cpu(), torch.float64) for mask in case.masks)
    return ((plan.sum(2) - a).abs().sum(1) + (plan.sum(1) - b).abs().sum(1)).max().item()


@dataclass
class Answer:
    """What a timed call returns, in the solver's own array type.

    Attributes:
        values: B, OT_eps with KL(P || a b^T) as the regularisation.
        iterations: sweeps, one number or one a pair; None where the solver does not say.
        plan: B x n x m; or else
        potentials: f and g, B x n and B x m, in units of the cost, from which the plan follows.
        gradients: of the mean value, with respect to source and target states.
    """

    values: Any
    iterations: Any = None
    plan: Any = None
    potentials: tuple[Any, Any] | None = None
    gradients: tuple[Any, Any] | None = None


def errors_of(answer: Answer, case: Case) -> tuple[int | None, float, float, float]:
    """Sweeps of the slowest pair; and errors against the float64 reference.

    The marginals' is the worst pair's L1 error, the value's the worst pair's relative one. The gradient's is the
    relative Frobenius norm over the batch, of the plan where the answer has no gradients.
    """
    reference = case.reference
    values = _as_double(answer.values)
    plan = _plan_of(answer, case) if answer.plan is None else _as_double(answer.plan)
    found, wanted = [plan], [reference.plan]
    if answer.gradients is not None:
        found, wanted = [_as_double(gradient) for gradient in answer.gradients], reference.gradients
    difference = sum((one - other).square().sum() for one, other in zip(found, wanted))
    return (
        None if answer.iterations is None else int(_as_double(answer.iterations).max()),
        marginal_error(case, plan),
        ((values - reference.values) / reference.values).abs().max().item(),
        (difference / sum(other.square().sum() for other in wanted)).sqrt().item(),
    )


def _as_double(array: Any) -> torch.Tensor:
    """Of torch, numpy or JAX, to the CPU."""
    array = array.detach().cpu() if isinstance(array, torch.Tensor) else np.asarray(array)
    return torch.as_tensor(array, dtype=torch.float64)


def _plan_of(answer: Answer, case: Case) -> torch.Tensor:
    """B x n x m, float64: a_i b_j exp((f_i + g_j - C_ij) / eps)."""
    f, g = (_as_double(potential) for potential in answer.potentials)
    a, b = (_as_double(marginal) for marginal in case.marginals)
    exponent = f.unsqueeze(2) + g.unsqueeze(1) - _as_double(case.cost)
    plan = a.unsqueeze(2) * b.unsqueeze(1) * torch.exp(exponent / _as_double(case.epsilon).view(-1, 1, 1))
    return torch.where((a > 0).unsqueeze(2) & (b > 0).unsqueeze(1), plan, 0)
