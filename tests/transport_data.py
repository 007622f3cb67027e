"""Sentence pairs for the tests of the transport solver: token states, masks, and POT's answer for them."""

from functools import lru_cache

import numpy as np
import ot
import torch

from modeling_xlfa.transport_xlfa import cost_scale, pairwise_cost


def random_pair(seed, source_length, target_length, size=24):
    """Tokens that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, size, generator=generator) for length in (source_length, target_length)]


def clustered_pair(seed, source_length, target_length, size=24):
    """Tokens around few centres: the case that needs many sweeps at small epsilon."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, size, generator=generator)
    sides = []
    for length in (source_length, target_length):
        chosen = torch.randint(0, 4, (length,), generator=generator)
        sides.append(centres[chosen] + 0.4 * torch.randn(length, size, generator=generator))
    return sides


KINDS = {"random": random_pair, "clustered": clustered_pair}


def padded_batch(lengths, seed=0, pad_value=0.0, kind="clustered"):
    """Pairs of the given (source, target) lengths, padded; states and masks of both sides."""
    pairs = [KINDS[kind](seed + index, *both) for index, both in enumerate(lengths)]
    result = []
    for side in (0, 1):
        longest = max(both[side] for both in lengths)
        states = torch.full((len(pairs), longest, pairs[0][0].shape[1]), pad_value)
        mask = torch.zeros(len(pairs), longest, dtype=torch.long)
        for index, pair in enumerate(pairs):
            states[index, : len(pair[side])] = pair[side]
            mask[index, : len(pair[side])] = 1
        result += [states, mask]
    return result


def pot_solution(cost, epsilon, **options):
    """POT's float64 answer for one cost matrix with uniform marginals."""
    cost = np.asarray(cost, dtype=np.float64)
    options = {"max_iter": 200_000, "tol": 1e-9} | options
    return ot.solve(cost, reg=float(epsilon), reg_type="KL", **options)


def pot_soft_solution(cost, epsilon, tau):
    """POT's plan with soft marginals, and the value there: the `value` that POT 0.9.7 reports for them is zero."""
    plan = torch.as_tensor(pot_solution(cost, epsilon, unbalanced=tau, unbalanced_type="KL", tol=1e-12).plan)
    a, b = (torch.full((length,), 1 / length, dtype=torch.float64) for length in plan.shape)
    value = (plan * cost).sum() + epsilon * generalised_kl(plan, a.unsqueeze(1) * b)
    return plan, value + tau * (generalised_kl(plan.sum(1), a) + generalised_kl(plan.sum(0), b))


@lru_cache
def pot_batch(kind, lengths, epsilon, cost="cosine"):
    """Cost matrices (float32, padded) and masks of a batch, and for each pair POT's value and plan at `epsilon` times
    the mean cost."""
    source, source_mask, target, target_mask = padded_batch(lengths, kind=kind)
    matrix = pairwise_cost(source, target, cost)
    unit = cost_scale(matrix.double(), source_mask, target_mask, "mean")
    answers = []
    for index, (n, m) in enumerate(lengths):
        answer = pot_solution(matrix[index, :n, :m], epsilon * unit[index])
        answers.append((float(answer.value), torch.as_tensor(answer.plan)))
    return matrix, source_mask, target_mask, answers


@lru_cache
def pot_soft_batch(kind, lengths, epsilon, tau):
    """As `pot_batch`, with soft marginals; `tau` too is in units of the mean cost."""
    source, source_mask, target, target_mask = padded_batch(lengths, kind=kind)
    matrix = pairwise_cost(source, target)
    unit = cost_scale(matrix.double(), source_mask, target_mask, "mean").tolist()
    answers = []
    for index, (n, m) in enumerate(lengths):
        block = matrix[index, :n, :m].double()
        plan, value = pot_soft_solution(block, epsilon * unit[index], tau * unit[index])
        answers.append((value.item(), plan))
    return matrix, source_mask, target_mask, answers


@lru_cache
def pot_loss_batch(kind, lengths, epsilon, dtype=torch.float32, debiased=False):
    """Token states and masks of a batch, the states rounded to `dtype`, and for each pair, at `epsilon` times the mean
    cost: OT_eps, the value asked for (OT_eps or the divergence), and its gradient with respect to the states of both
    sides. All by POT in float64 on the rounded values."""
    source, source_mask, target, target_mask = padded_batch(lengths, kind=kind)
    source, target = source.to(dtype), target.to(dtype)
    answers = []
    for index, (n, m) in enumerate(lengths):
        x, y = (states.double().requires_grad_() for states in (source[index, :n], target[index, :m]))
        cost = pairwise_cost(x.unsqueeze(0), y.unsqueeze(0))[0]
        absolute = epsilon * cost.mean().item()
        between = pot_solution(cost.detach(), absolute)
        value, objective = float(between.value), (torch.as_tensor(between.plan) * cost).sum()
        for states in (x, y) if debiased else ():
            cost = pairwise_cost(states.unsqueeze(0), states.unsqueeze(0))[0]
            # Clusters of tokens against themselves at 0.1: POT needs 8000 sweeps for this error, and for its usual 1e-9
            # more than 200 000.
            own = pot_solution(cost.detach(), absolute, tol=1e-6)
            value -= float(own.value) / 2
            objective = objective - (torch.as_tensor(own.plan) * cost).sum() / 2
        answers.append((float(between.value), value, torch.autograd.grad(objective, (x, y))))
    return source, source_mask, target, target_mask, answers


def generalised_kl(plan, reference):
    return (torch.special.xlogy(plan, plan / reference) - plan + reference).sum()
