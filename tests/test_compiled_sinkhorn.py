"""What the compiled back end adds to `test_sinkhorn.py`: threads, forks, holes in masks, and its own exp and log."""

import multiprocessing

import numpy as np
import pytest
import torch
from transport_data import padded_batch

pytest.importorskip("numba", reason='the extra "compiled" (numba) is not installed')

from modeling_xlfa.sinkhorn_xlfa import TransportProblem, solve_with_torch  # noqa: E402
from modeling_xlfa.transport_xlfa import BACKENDS, pairwise_cost, uniform_marginals  # noqa: E402
from xlfa.compiled_sinkhorn import _exp, _log, jit, solve_compiled  # noqa: E402

LENGTHS = [(9, 30), (28, 7), (16, 16), (1, 5), (33, 32)]
FIELDS = ("value", "plan", "source_potential", "target_potential", "iterations", "marginal_error", "plan_entropy")


def make_problem(epsilon=0.03, **options):
    source, source_mask, target, target_mask = padded_batch(LENGTHS)
    cost = pairwise_cost(source, target)
    marginals = (uniform_marginals(mask, cost.dtype) for mask in (source_mask, target_mask))
    return TransportProblem(cost, torch.full((len(cost),), epsilon), *marginals, **options)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_it_is_among_the_back_ends():
    assert BACKENDS["compiled"] is solve_compiled


def test_the_result_is_the_same_at_any_number_of_threads(threads):
    results = []
    # More threads than pairs as well.
    for count in (1, 2, 7):
        threads(count)
        results.append(solve_compiled(make_problem()))
    for other in results[1:]:
        for name in FIELDS:
            assert torch.equal(getattr(results[0], name), getattr(other, name)), name


def test_a_forked_process_gets_threads_of_its_own(threads):
    threads(2)
    problem = make_problem()
    expected = solve_compiled(problem).value.tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    # The problem is made before the fork: torch's own products can hang after it.
    child = context.Process(target=lambda: queue.put(solve_compiled(problem).value.tolist()))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(timeout=10)
        child.kill()


def test_tokens_with_holes_between_them_are_gathered():
    problem = make_problem(tol=1e-6)
    for marginal in (problem.source_marginal, problem.target_marginal):
        marginal[:, 1::3] = 0
        marginal /= marginal.sum(1, keepdim=True).clamp(min=1e-9)
    found, expected = solve_compiled(problem), solve_with_torch(problem)
    torch.testing.assert_close(found.plan, expected.plan, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-5, atol=1e-7)
    assert (found.source_potential[problem.source_marginal == 0] == 0).all()


@pytest.mark.parametrize("tau", [None, 0.02])
def test_newton_steps_end_hard_problems(tau):
    source, source_mask, target, target_mask = padded_batch([(60, 64)], seed=2)
    cost = pairwise_cost(source, target)
    marginals = [uniform_marginals(mask, cost.dtype) for mask in (source_mask, target_mask)]
    tau = None if tau is None else torch.tensor([tau])
    problem = TransportProblem(cost, torch.tensor([8e-4]), *marginals, tau=tau, max_iter=20_000, tol=1e-5)
    found, expected = solve_compiled(problem), solve_with_torch(problem)
    assert found.converged.all() and found.iterations[0] < 4000
    torch.testing.assert_close(found.value, expected.value, rtol=1e-4, atol=0)


@jit
def exp_of_all(x, y):
    for i in range(x.size):
        y[i] = _exp(x[i])


@jit
def log_of_all(x, y):
    for i in range(x.size):
        y[i] = _log(x[i])


def test_exp_and_log_are_right_to_float32():
    x = np.linspace(-86, 86, 200_001).astype(np.float32)
    found = np.empty_like(x)
    exp_of_all(x, found)
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() < 3e-7
    positive = np.exp(np.linspace(-86, 86, 200_001)).astype(np.float32)
    log_of_all(positive, found)
    expected = np.log(positive.astype(np.float64))
    assert (np.abs(found - expected) <= 3e-7 * np.maximum(np.abs(expected), 1)).all()
    near_one = (1 + np.linspace(-0.2, 0.2, 200_001)).astype(np.float32)
    log_of_all(near_one, found)
    assert np.abs(found - np.log(near_one.astype(np.float64))).max() < 1e-7
