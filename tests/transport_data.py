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


def generalised_kl(plan, reference):
    return (torch.special.xlogy(plan, plan / reference) - plan + reference).sum()
