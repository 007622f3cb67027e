"""The back ends of the transport solver against POT in float64, at every epsilon that is studied, and as properties."""

import importlib.util

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_data import padded_batch, pot_batch, pot_loss_batch, pot_soft_batch, pot_solution

from modeling_xlfa import sinkhorn_xlfa
from modeling_xlfa.sinkhorn_xlfa import TransportProblem, solve_with_torch
from modeling_xlfa.transport_xlfa import BACKENDS, alignment_loss, pairwise_cost, sinkhorn, uniform_marginals

if importlib.util.find_spec("numba") is not None:
    import xlfa.compiled_sinkhorn  # noqa: F401  (adds its back end)

EPSILONS = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0]
SHORT = ((8, 15), (31, 24), (17, 40))
LONG = ((8, 128), (128, 97), (61, 113))
needs_numba = pytest.mark.skipif("compiled" not in BACKENDS, reason='the extra "compiled" (numba) is not installed')
pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|converge|numerical).*")


@pytest.fixture(params=["torch", pytest.param("compiled", marks=needs_numba)])
def backend(request):
    return request.param


def assert_equal_to_pot(backend, kind, lengths, epsilon, cost):
    matrix, source_mask, target_mask, answers = pot_batch(kind, lengths, epsilon, cost)
    matrix = matrix.clone().requires_grad_()
    result = sinkhorn(
        matrix, epsilon, source_mask, target_mask, 100_000, 1e-5, True, epsilon_scale="mean", backend=backend
    )
    assert result.converged.all() and (result.marginal_error < 2e-5).all()
    result.value.sum().backward()
    for index, (value, plan) in enumerate(answers):
        n, m = plan.shape
        assert result.value[index].item() == pytest.approx(value, rel=1e-4)
        for found in (result.plan[index], matrix.grad[index]):
            assert torch.linalg.norm(found[:n, :m].double() - plan) < 1e-3 * torch.linalg.norm(plan)
            assert found[n:].abs().sum() == 0 and found[:, m:].abs().sum() == 0
        entropy = torch.special.entr(plan).sum() - torch.special.entr(plan.sum(1)).sum()
        assert result.plan_entropy[index].item() == pytest.approx(entropy.item(), abs=2e-3)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize(
    ("kind", "cost"), [("random", "cosine"), ("clustered", "cosine"), ("clustered", "sqeuclidean")]
)
def test_value_gradient_and_entropy_equal_pot(backend, kind, cost, epsilon):
    assert_equal_to_pot(backend, kind, SHORT, epsilon, cost)


@pytest.mark.full
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_long_sentences_equal_pot(backend, kind, epsilon):
    assert_equal_to_pot(backend, kind, LONG, epsilon, "cosine")


def assert_loss_equals_pot(backend, kind, epsilon, dtype=torch.float32, debiased=False):
    source, source_mask, target, target_mask, answers = pot_loss_batch(kind, SHORT, epsilon, dtype, debiased)
    source, target = source.clone().requires_grad_(), target.clone().requires_grad_()
    options = {"tol": 1e-6 if debiased else 1e-5, "max_iter": 100_000, "debiased": debiased, "backend": backend}
    _, result = alignment_loss(source, target, source_mask, target_mask, epsilon, "mean", **options)
    assert result.converged.all() and result.value.dtype == torch.float32
    result.value.sum().backward()
    # The gradient comes back in the states' type: its entries are rounded, by at most this part of them.
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for index, (between, value, gradients) in enumerate(answers):
        # The divergence may be near 0, as the difference of values that are not.
        assert result.value[index].item() == pytest.approx(value, abs=1e-4 * between)
        for states, gradient in zip((source, target), gradients):
            found = states.grad[index].double()
            error = torch.linalg.norm(found[: len(gradient)] - gradient)
            assert error < (1e-3 + rounding) * torch.linalg.norm(gradient)
            assert not found[len(gradient) :].any()


@pytest.mark.parametrize(
    "epsilon", [pytest.param(epsilon, marks=[pytest.mark.full] if epsilon < 0.01 else []) for epsilon in EPSILONS]
)
@pytest.mark.parametrize("kind", ["random", "clustered"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_equal_float64_on_the_same_rounded_values(backend, dtype, kind, epsilon):
    assert_loss_equals_pot(backend, kind, epsilon, dtype)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_the_divergence_and_its_gradient_combine_three_of_pot(backend, kind, epsilon):
    assert_loss_equals_pot(backend, kind, epsilon, debiased=True)


# With a large tau POT takes seconds a pair at small epsilon.
@pytest.mark.parametrize("tau", [0.05, 1.0, pytest.param(10.0, marks=pytest.mark.full)])
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_soft_marginals_equal_pot(backend, kind, epsilon, tau):
    matrix, source_mask, target_mask, answers = pot_soft_batch(kind, SHORT, epsilon, tau)
    matrix = matrix.clone().requires_grad_()
    # In float32 the marginals of tau 10 at epsilon 0.003 settle at an error of 5e-6.
    options = {"tol": 1e-6 if tau < 10 else 1e-5, "max_iter": 20_000, "epsilon_scale": "mean", "backend": backend}
    result = sinkhorn(matrix, epsilon, source_mask, target_mask, return_plan=True, tau=tau, **options)
    assert result.converged.all()
    result.value.sum().backward()
    for index, (value, plan) in enumerate(answers):
        n, m = plan.shape
        assert result.value[index].item() == pytest.approx(value, rel=1e-4)
        for found in (result.plan[index], matrix.grad[index]):
            assert torch.linalg.norm(found[:n, :m].double() - plan) < 1e-3 * torch.linalg.norm(plan)
            assert found[n:].abs().sum() == 0 and found[:, m:].abs().sum() == 0


@needs_numba
def test_both_back_ends_give_the_same_numbers():
    source, source_mask, target, target_mask = padded_batch(SHORT)
    matrix = pairwise_cost(source, target)
    marginals = [torch.rand(mask.shape) * mask for mask in (source_mask, target_mask)]
    marginals = [weights / weights.sum(1, keepdim=True) for weights in marginals]
    for options in ({}, {"tau": 0.5}, {"source_marginal": marginals[0], "target_marginal": marginals[1]}):
        results = [
            sinkhorn(matrix, 0.05, source_mask, target_mask, 20_000, 1e-6, True, backend=name, **options)
            for name in ("torch", "compiled")
        ]
        for name in ("value", "plan", "plan_entropy", "source_potential", "target_potential"):
            values = [getattr(result, name) for result in results]
            if "potential" in name and "tau" not in options:
                # A constant may pass from one side to the other.
                values = [value - value[:, :1] for value in values]
                values = [torch.where(value.abs() > 0, value, 0) for value in values]
            torch.testing.assert_close(values[0], values[-1], rtol=1e-4, atol=2e-5)


def test_potentials_give_the_plan(backend):
    source, source_mask, target, target_mask = padded_batch(SHORT)
    matrix = pairwise_cost(source, target)
    result = sinkhorn(matrix, 0.1, source_mask, target_mask, tol=1e-6, return_plan=True, backend=backend)
    f, g = result.source_potential.unsqueeze(2), result.target_potential.unsqueeze(1)
    a, b = (uniform_marginals(mask, matrix.dtype) for mask in (source_mask, target_mask))
    plan = a.unsqueeze(2) * b.unsqueeze(1) * torch.exp((f + g - matrix) / 0.1)
    torch.testing.assert_close(plan, result.plan, rtol=1e-4, atol=1e-7)


def test_the_reported_error_is_the_plans(backend):
    source, source_mask, target, target_mask = padded_batch(SHORT)
    matrix = pairwise_cost(source, target)
    for epsilon, max_iter in ((0.3, 5000), (0.003, 7), (0.003, 200)):
        result = sinkhorn(matrix, epsilon, source_mask, target_mask, max_iter, return_plan=True, backend=backend)
        a, b = (uniform_marginals(mask, matrix.dtype) for mask in (source_mask, target_mask))
        error = (result.plan.sum(2) - a).abs().sum(1) + (result.plan.sum(1) - b).abs().sum(1)
        torch.testing.assert_close(result.marginal_error, error, rtol=1e-2, atol=1e-6)
        assert ((error < 1.01e-3) == result.converged).all()
        assert (result.iterations <= max_iter).all()


def test_a_pair_that_did_not_converge_says_so_and_the_others_are_right(backend):
    source, source_mask, target, target_mask = padded_batch([(30, 30), (1, 2)])
    matrix = pairwise_cost(source, target)
    result = sinkhorn(matrix, 1e-3, source_mask, target_mask, max_iter=3, backend=backend)
    assert result.converged.tolist() == [False, True]
    assert result.marginal_error[0] > 1e-3 and result.iterations[0] == 3
    assert result.value[1].item() == pytest.approx(matrix[1, 0, :2].mean().item(), rel=1e-5)
    assert torch.isfinite(result.value).all()


def test_newton_ends_what_sweeps_alone_do_not(monkeypatch):
    """Clusters that hardly exchange mass: the sweeps alone need tens of thousands."""
    n, m = 60, 64
    source, source_mask, target, target_mask = padded_batch([(n, m)], seed=2)
    matrix = pairwise_cost(source, target).double()

    def solve():
        options = {"epsilon_scale": "mean", "backend": "torch"}
        return sinkhorn(matrix, 0.001, source_mask, target_mask, max_iter=3000, tol=1e-9, **options)

    with_newton = solve()
    monkeypatch.setattr(sinkhorn_xlfa, "NEWTON_AFTER", 10**9)
    without = solve()
    assert with_newton.converged.all() and with_newton.iterations[0] < 1000
    assert not without.converged.all()


def test_no_iteration_enters_the_autograd_graph(backend):
    source, source_mask, target, target_mask = padded_batch(SHORT)
    matrix = pairwise_cost(source, target).requires_grad_()
    result = sinkhorn(matrix, 0.01, source_mask, target_mask, backend=backend)
    assert result.iterations.max() > 30
    (node,) = [following for following, _ in result.value.grad_fn.next_functions if following is not None]
    assert node.variable is matrix and [tensor.shape for tensor in result.value.grad_fn.saved_tensors] == [matrix.shape]


def test_the_torch_solver_looks_at_its_error_once_a_block_only(monkeypatch):
    looks = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: looks.append(tensor.shape) or original(tensor))
    source, source_mask, target, target_mask = padded_batch([(60, 64), (31, 24)])
    result = sinkhorn(pairwise_cost(source, target), 0.003, source_mask, target_mask, backend="torch")
    assert result.iterations.max() > 100
    assert len(looks) <= 8 + result.iterations.max() / sinkhorn_xlfa.LAST_BLOCK


def test_the_limit_of_small_epsilon_is_pots_exact_value(backend):
    source, source_mask, target, target_mask = padded_batch([(12, 12), (9, 17)])
    matrix = pairwise_cost(source, target)
    result = sinkhorn(matrix, 5e-4, source_mask, target_mask, 200_000, 1e-4, backend=backend)
    for index, (n, m) in enumerate([(12, 12), (9, 17)]):
        exact = float(ot.emd2([], [], matrix[index, :n, :m].double().numpy()))
        # OT_eps holds eps KL(P || a b^T), at most eps times the entropy of the smaller side.
        assert exact - 1e-4 <= result.value[index].item() <= exact + 5e-4 * 2.9


EDGES = {
    "one token a side": (torch.rand(1, 1, 1), [[1]], [[1]]),
    "one token against many": (torch.rand(1, 1, 7), [[1]], [[1] * 7]),
    "512 against 2": (torch.rand(1, 512, 2), [[1] * 512], [[1, 1]]),
    "equal costs": (torch.full((1, 5, 6), 0.7), [[1] * 5], [[1] * 6]),
    "zero costs": (torch.zeros(1, 5, 6), [[1] * 5], [[1] * 6]),
    "a hole in a mask": (torch.rand(1, 5, 4), [[0, 1, 0, 1, 1]], [[1, 0, 0, 1]]),
    "an empty source": (torch.rand(2, 3, 4), [[0, 0, 0], [1, 1, 1]], [[1] * 4, [1] * 4]),
    "all empty": (torch.rand(2, 3, 4), [[0] * 3] * 2, [[1] * 4, [0] * 4]),
    "huge costs": (torch.rand(1, 9, 8) * 1e6, [[1] * 9], [[1] * 8]),
    "tiny costs": (torch.rand(1, 9, 8) * 1e-5, [[1] * 9], [[1] * 8]),
}


@pytest.mark.parametrize("epsilon", [0.003, 0.1, 10.0])
@pytest.mark.parametrize("case", list(EDGES))
def test_edge_cases_are_right(backend, case, epsilon):
    cost, source_mask, target_mask = EDGES[case]
    source_mask, target_mask = torch.tensor(source_mask), torch.tensor(target_mask)
    result = sinkhorn(
        cost, epsilon, source_mask, target_mask, 100_000, 1e-5, True, epsilon_scale="mean", backend=backend
    )
    assert result.converged.all()
    for index in range(len(cost)):
        block = cost[index][source_mask[index].bool()][:, target_mask[index].bool()]
        if block.numel() == 0:
            assert result.value[index] == 0 and result.plan[index].sum() == 0 and result.iterations[index] == 0
            continue
        plan = result.plan[index][source_mask[index].bool()][:, target_mask[index].bool()]
        torch.testing.assert_close(plan.sum(1), torch.full((len(plan),), 1 / len(plan)), rtol=0, atol=2e-5)
        if block.mean() == 0:
            assert result.value[index] == 0
        else:
            expected = pot_solution(block, epsilon * block.mean()).value
            assert result.value[index].item() == pytest.approx(float(expected), rel=1e-4)


def test_a_strided_cost_equals_its_copy(backend):
    source, source_mask, target, target_mask = padded_batch(SHORT)
    strided = pairwise_cost(target, source).transpose(1, 2)
    assert not strided.is_contiguous()
    results = [
        sinkhorn(cost, 0.1, source_mask, target_mask, backend=backend).value for cost in (strided, strided.contiguous())
    ]
    torch.testing.assert_close(*results)


def test_half_precision_costs_are_solved_in_float32(backend):
    cost = pairwise_cost(torch.randn(2, 5, 8), torch.randn(2, 6, 8)).bfloat16().requires_grad_()
    mask = torch.ones(2, 5), torch.ones(2, 6)
    result = sinkhorn(cost, 0.1, *mask, tol=1e-5, backend=backend)
    result.value.sum().backward()
    expected = sinkhorn(cost.detach().float(), 0.1, *mask, tol=1e-5, backend=backend)
    torch.testing.assert_close(result.value, expected.value)
    assert cost.grad.dtype == torch.bfloat16 and cost.grad.float().sum().item() == pytest.approx(2.0, rel=0.02)


lengths = st.integers(1, 14)
relative_epsilons = st.sampled_from([0.02, 0.1, 0.5, 3.0])
seeds = st.integers(0, 10_000)
properties = settings(max_examples=25, deadline=None, derandomize=True)


def solve(matrix, source_mask, target_mask, epsilon, **options):
    return sinkhorn(
        matrix, epsilon, source_mask, target_mask, 50_000, 1e-6, return_plan=True, epsilon_scale="mean", **options
    )


@properties
@given(n=lengths, m=lengths, epsilon=relative_epsilons, seed=seeds, backend=st.sampled_from(list(BACKENDS)))
def test_both_directions_have_the_same_value_and_transposed_plans(n, m, epsilon, seed, backend):
    source, source_mask, target, target_mask = padded_batch([(n, m)], seed)
    there = solve(pairwise_cost(source, target), source_mask, target_mask, epsilon, backend=backend)
    back = solve(pairwise_cost(target, source), target_mask, source_mask, epsilon, backend=backend)
    torch.testing.assert_close(there.value, back.value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(there.plan, back.plan.transpose(1, 2), rtol=1e-3, atol=1e-5)


@properties
@given(
    n=lengths, m=lengths, extra=st.tuples(lengths, lengths), epsilon=relative_epsilons, seed=seeds,
    backend=st.sampled_from(list(BACKENDS)),
)  # fmt: skip
def test_padding_and_the_order_of_tokens_change_nothing(n, m, extra, epsilon, seed, backend):
    source, source_mask, target, target_mask = padded_batch([(n, m)], seed)
    plain = solve(pairwise_cost(source, target), source_mask, target_mask, epsilon, backend=backend)
    grown, permutations = [], []
    generator = torch.Generator().manual_seed(seed)
    for states, mask, more in ((source, source_mask, extra[0]), (target, target_mask, extra[1])):
        permutation = torch.randperm(states.shape[1] + more, generator=generator)
        padding = torch.randn(1, more, states.shape[2], generator=generator)
        grown += [torch.cat([states, padding], 1)[:, permutation]]
        grown += [torch.nn.functional.pad(mask, (0, more))[:, permutation]]
        permutations.append(permutation)
    other = solve(pairwise_cost(grown[0], grown[2]), grown[1], grown[3], epsilon, backend=backend)
    torch.testing.assert_close(other.value, plain.value, rtol=1e-4, atol=1e-6)
    restored = torch.zeros_like(other.plan[0])
    restored[permutations[0].unsqueeze(1), permutations[1]] = other.plan[0]
    torch.testing.assert_close(restored[:n, :m], plain.plan[0], rtol=1e-3, atol=1e-5)
    assert restored[n:].sum() == 0 and restored[:, m:].sum() == 0


@properties
@given(n=lengths, m=lengths, seed=seeds, backend=st.sampled_from(list(BACKENDS)))
def test_the_value_and_the_entropy_grow_with_epsilon(n, m, seed, backend):
    source, source_mask, target, target_mask = padded_batch([(n, m)], seed)
    matrix = pairwise_cost(source, target)
    results = [solve(matrix, source_mask, target_mask, epsilon, backend=backend) for epsilon in (0.02, 0.1, 0.5, 3.0)]
    for smaller, larger in zip(results, results[1:]):
        assert larger.value.item() >= smaller.value.item() - 1e-5
        assert larger.plan_entropy.item() >= smaller.plan_entropy.item() - 1e-4


@properties
@given(n=lengths, m=lengths, epsilon=relative_epsilons, seed=seeds, backend=st.sampled_from(list(BACKENDS)))
def test_any_marginals_are_met(n, m, epsilon, seed, backend):
    source, source_mask, target, target_mask = padded_batch([(n, m)], seed)
    generator = torch.Generator().manual_seed(seed)
    # Weights from 0 to 1: some tokens carry nothing.
    marginals = [
        torch.rand(mask.shape, generator=generator).sub(0.2).clamp(min=0) for mask in (source_mask, target_mask)
    ]
    marginals = [weights + (weights.sum() == 0) for weights in marginals]
    marginals = [weights / weights.sum() for weights in marginals]
    result = solve(
        pairwise_cost(source, target), source_mask, target_mask, epsilon, backend=backend,
        source_marginal=marginals[0], target_marginal=marginals[1],
    )  # fmt: skip
    torch.testing.assert_close(result.plan.sum(2), marginals[0], rtol=0, atol=3e-6)
    torch.testing.assert_close(result.plan.sum(1), marginals[1], rtol=0, atol=3e-6)


@properties
@given(n=lengths, m=lengths, epsilon=relative_epsilons, seed=seeds, backend=st.sampled_from(list(BACKENDS)))
def test_the_divergence_is_zero_on_identical_sentences_and_never_negative(n, m, epsilon, seed, backend):
    source, source_mask, target, target_mask = padded_batch([(n, m)], seed)
    options = {"epsilon": epsilon, "epsilon_scale": "mean", "debiased": True, "tol": 1e-6, "max_iter": 50_000}
    _, same = alignment_loss(source, source, source_mask, source_mask, backend=backend, **options)
    _, different = alignment_loss(source, target, source_mask, target_mask, backend=backend, **options)
    assert abs(same.value.item()) < 2e-5 and different.value.item() > -2e-5


def test_the_symmetric_fixed_point_equals_the_full_solve(backend):
    source, source_mask, _, _ = padded_batch(SHORT)
    matrix = pairwise_cost(source, source)
    for options in ({}, {"tau": 0.4}):
        results = [
            sinkhorn(
                matrix,
                0.1,
                source_mask,
                source_mask,
                20_000,
                1e-6,
                True,
                symmetric=symmetric,
                backend=backend,
                **options,
            )
            for symmetric in (True, False)
        ]
        torch.testing.assert_close(results[0].value, results[1].value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(results[0].plan, results[1].plan, rtol=1e-3, atol=1e-5)
        assert (results[0].iterations < results[1].iterations).all() or (results[0].iterations <= 35).all()


def test_a_problem_in_float64_stays_in_float64(backend):
    problem = TransportProblem(
        cost=torch.rand(2, 4, 5, dtype=torch.float64),
        epsilon=torch.full((2,), 0.1, dtype=torch.float64),
        source_marginal=torch.full((2, 4), 0.25, dtype=torch.float64),
        target_marginal=torch.full((2, 5), 0.2, dtype=torch.float64),
        tol=1e-12,
    )
    result = BACKENDS[backend](problem)
    assert result.value.dtype == torch.float64 and (result.marginal_error < 1e-11).all()
    torch.testing.assert_close(result.value, solve_with_torch(problem).value, rtol=1e-12, atol=0)
