"""The transport term around its solvers: costs, units of epsilon, limits, gradients, options, and bad input."""

import math
import sys
import types

import numpy as np
import ot
import pytest
import torch
from transport_data import padded_batch, pot_soft_solution

from modeling_xlfa import transport_xlfa
from modeling_xlfa.transport_xlfa import (
    BACKENDS,
    alignment_loss,
    cost_scale,
    exact_plan,
    pairwise_cost,
    product_plan,
    sinkhorn,
)

EPSILONS = [0.01, 0.03, 0.1, 1.0, 10.0]


def test_gradient_equals_finite_differences():
    source, source_mask, target, target_mask = padded_batch([(4, 6), (5, 3)])
    matrix = pairwise_cost(source.double(), target.double()).requires_grad_()

    def value(cost):
        return sinkhorn(cost, 0.07, source_mask, target_mask, max_iter=100_000, tol=1e-11).value

    assert torch.autograd.gradcheck(value, (matrix,), eps=1e-6, atol=1e-6)


def test_scale_carries_no_gradient():
    source, source_mask, target, target_mask = padded_batch([(4, 6)])
    matrix = pairwise_cost(source, target).requires_grad_()
    for scale in ("centered_std", "std", "mean", "max", "absolute"):
        assert not cost_scale(matrix, source_mask, target_mask, scale).requires_grad


def test_scales_equal_a_direct_computation():
    source, source_mask, target, target_mask = padded_batch([(4, 6), (5, 3)])
    matrix = pairwise_cost(source, target)
    for index, (n, m) in enumerate([(4, 6), (5, 3)]):
        block = matrix[index, :n, :m]
        centred = block - block.mean(1, keepdim=True) - block.mean(0, keepdim=True) + block.mean()
        expected = {
            "centered_std": centred.square().mean().sqrt(),
            "std": block.std(correction=0),
            "mean": block.mean(),
            "max": block.max(),
            "absolute": torch.tensor(1.0),
        }
        for scale, value in expected.items():
            found = cost_scale(matrix, source_mask, target_mask, scale)[index]
            assert found.item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize(("cost", "center"), [("cosine", False), ("cosine", True), ("sqeuclidean", False)])
@pytest.mark.parametrize("epsilon", [0.01, 0.3])
@pytest.mark.parametrize("pad_value", [math.nan, 7.0])
def test_padding_changes_nothing(pad_value, epsilon, cost, center):
    lengths = [(8, 21), (12, 5)]
    plain = padded_batch(lengths)
    source, source_mask, target, target_mask = padded_batch(lengths, pad_value=pad_value)
    grown = [
        torch.nn.functional.pad(source, (0, 0, 0, 9)),
        torch.nn.functional.pad(source_mask, (0, 9)),
        target,
        target_mask,
    ]
    options = {"epsilon": epsilon, "cost": cost, "center": center}
    loss, result = alignment_loss(plain[0].requires_grad_(), plain[2], plain[1], plain[3], **options)
    padded_loss, padded = alignment_loss(grown[0].requires_grad_(), grown[2], grown[1], grown[3], **options)
    assert padded_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(padded.plan_entropy, result.plan_entropy, rtol=1e-3, atol=1e-4)
    loss.backward()
    padded_loss.backward()
    length = plain[0].shape[1]
    torch.testing.assert_close(grown[0].grad[:, :length], plain[0].grad, rtol=1e-2, atol=1e-5)
    assert not grown[0].grad[:, length:].any()


def test_a_sentence_without_weight_counts_for_nothing():
    source, source_mask, target, target_mask = padded_batch([(4, 6), (5, 3)])
    marginals = {"source_marginal": torch.ones(2, 5) / 4 * source_mask, "target_marginal": target_mask / 6}
    marginals["source_marginal"][1] = 0
    marginals["target_marginal"][1] *= 2
    for options in ({}, {"debiased": True}, {"debiased": True, "solver": "product"}):
        target.grad = None
        loss, result = alignment_loss(source, target.requires_grad_(), source_mask, target_mask, **marginals, **options)
        alone, _ = alignment_loss(
            *(source[:1, :4], target[:1], source_mask[:1, :4], target_mask[:1]),
            **{
                "source_marginal": marginals["source_marginal"][:1, :4],
                "target_marginal": marginals["target_marginal"][:1],
            },
            **options,
        )
        assert result.value[1] == 0
        assert loss.item() == pytest.approx(alone.item(), rel=1e-4)
        loss.backward()
        assert not target.grad[1].any()


def test_marginals_in_half_precision_are_met():
    """Sums of float16 thirds and quarters differ by more than `tol`: no plan has both."""
    mask = torch.ones(1, 3), torch.ones(1, 4)
    marginals = [torch.full(side.shape, 1 / side.shape[1], dtype=torch.float16) for side in mask]
    result = sinkhorn(
        torch.rand(1, 3, 4), 0.1, *mask, tol=1e-5, source_marginal=marginals[0], target_marginal=marginals[1]
    )
    assert result.converged.all() and result.iterations.max() < 500


def test_an_exact_plan_that_is_cut_off_has_not_converged(monkeypatch):
    solve = ot.emd
    monkeypatch.setattr(ot, "emd", lambda *problem, log: solve(*problem, log=log, numItermax=1))
    mask = torch.ones(2, 6), torch.ones(2, 7)
    with pytest.warns(UserWarning, match="numItermax"):
        result = exact_plan(torch.rand(2, 6, 7), *mask)
    assert not result.converged.any() and result.marginal_error.shape == (2,)
    monkeypatch.undo()
    result = exact_plan(torch.rand(2, 6, 7), *mask)
    assert result.converged.all() and result.marginal_error.max() < 1e-5


def test_auto_solves_with_torch_on_devices_that_no_other_back_end_knows(monkeypatch):
    monkeypatch.setattr(transport_xlfa, "BACKENDS", {"torch": "torch", "compiled": "compiled"})
    for device, expected in (("cpu", "compiled"), ("meta", "torch")):
        problem = types.SimpleNamespace(cost=torch.empty(1, 3, 4, device=device))
        assert transport_xlfa._backend("auto", problem) == expected


def test_a_pair_alone_equals_the_pair_in_a_batch():
    lengths = [(8, 21), (30, 17), (3, 4)]
    source, source_mask, target, target_mask = padded_batch(lengths)
    _, together = alignment_loss(source, target, source_mask, target_mask, epsilon=0.03, tol=1e-6, max_iter=50_000)
    for index, (n, m) in enumerate(lengths):
        side = slice(index, index + 1)
        _, alone = alignment_loss(
            source[side, :n], target[side, :m], source_mask[side, :n], target_mask[side, :m],
            epsilon=0.03, tol=1e-6, max_iter=50_000,
        )  # fmt: skip
        assert alone.value.item() == pytest.approx(together.value[index].item(), rel=1e-5)


def test_limits_of_epsilon():
    source, source_mask, target, target_mask = padded_batch([(9, 9)])
    matrix = pairwise_cost(source, target)
    exact, product = exact_plan(matrix, source_mask, target_mask), product_plan(matrix, source_mask, target_mask)
    assert exact.value.item() == pytest.approx(float(ot.emd2([], [], matrix[0].double().numpy())), rel=1e-5)
    assert product.value.item() == pytest.approx(matrix.mean().item(), rel=1e-5)
    small = sinkhorn(matrix, 1e-4, source_mask, target_mask, max_iter=100_000, tol=1e-4)
    large = sinkhorn(matrix, 1e4, source_mask, target_mask)
    # OT_eps holds eps KL(P || a b^T), at most eps log n.
    assert small.value.item() == pytest.approx(exact.value.item(), abs=1e-4 * np.log(9) + 1e-5)
    assert large.value.item() == pytest.approx(product.value.item(), rel=1e-3)
    assert small.plan_entropy.exp().item() == pytest.approx(1.0, abs=0.1)
    assert large.plan_entropy.exp().item() == pytest.approx(9.0, rel=1e-4)


def test_more_epsilon_means_more_entropy_and_a_larger_value():
    source, source_mask, target, target_mask = padded_batch([(20, 23)])
    results = [alignment_loss(source, target, source_mask, target_mask, epsilon=e, tol=1e-5)[1] for e in EPSILONS]
    values, entropies = [r.value.item() for r in results], [r.plan_entropy.item() for r in results]
    assert values == sorted(values) and entropies == sorted(entropies)


def test_empty_one_token_identical_and_equal_cost_pairs():
    source = torch.randn(4, 5, 8)
    target = source.clone()
    source[3], target[3] = 1.0, 1.0
    source_mask = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    target_mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    source.requires_grad_()
    loss, result = alignment_loss(source, target, source_mask, target_mask, epsilon=0.05)
    loss.backward()
    assert torch.isfinite(result.value).all() and torch.isfinite(source.grad).all()
    assert result.value[0] == 0 and result.converged.all()
    assert result.value[3].item() == pytest.approx(0.0, abs=1e-5)
    assert loss.item() == pytest.approx(result.value[1:].mean().item(), rel=1e-6)


@pytest.mark.parametrize("scale", ["absolute", "centered_std", "mean", "max"])
def test_a_side_of_no_width_has_value_zero(scale):
    result = sinkhorn(torch.ones(2, 3, 0), 0.1, torch.ones(2, 3), torch.ones(2, 0), epsilon_scale=scale)
    assert result.value.tolist() == [0, 0]


def test_a_batch_of_empty_pairs_has_loss_zero():
    mask = torch.zeros(2, 3, dtype=torch.long)
    loss, _ = alignment_loss(torch.randn(2, 3, 4), torch.randn(2, 3, 4), mask, mask)
    assert loss.item() == 0


@pytest.mark.parametrize("solve", [lambda *own: sinkhorn(own[0], 0.1, *own[1:]), exact_plan, product_plan])
@pytest.mark.parametrize(
    ("source", "target"), [((1, 4), (1, 5)), ((3, 5), (3, 5)), ((3, 4), (3, 4)), ((4,), (5,)), ((3, 4, 1), (3, 5))]
)
def test_masks_of_another_shape_are_refused(solve, source, target):
    """A mask for all pairs would be taken for one of the first, and a longer one read beyond the cost."""
    with pytest.raises(ValueError, match="the cost must be B x n x m, source_mask B x n and target_mask B x m; they"):
        solve(torch.rand(3, 4, 5), torch.ones(source), torch.ones(target))


def test_a_nan_among_the_tokens_is_an_error():
    source, source_mask, target, target_mask = padded_batch([(4, 4)])
    source[0, 1, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        alignment_loss(source, target, source_mask, target_mask)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("inf"), float("nan")])
def test_epsilon_must_be_positive_and_finite(epsilon):
    mask = torch.ones(1, 2)
    with pytest.raises(ValueError, match="epsilon must be positive and finite"):
        sinkhorn(torch.rand(1, 2, 2), epsilon, mask, mask)


def test_unbalanced_with_a_large_tau_is_balanced():
    source, source_mask, target, target_mask = padded_batch([(12, 17)])
    options = {"epsilon": 0.3, "tol": 1e-6}
    _, hard = alignment_loss(source, target, source_mask, target_mask, **options)
    _, soft = alignment_loss(source, target, source_mask, target_mask, tau=1e6, **options)
    assert soft.value.item() == pytest.approx(hard.value.item(), rel=1e-4)


def test_soft_marginals_have_no_closed_form():
    source, source_mask, target, target_mask = padded_batch([(4, 4)])
    with pytest.raises(ValueError, match="hard marginals only"):
        alignment_loss(source, target, source_mask, target_mask, tau=1.0, solver="exact")


@pytest.mark.parametrize("tau", [0.3, 2.0])
def test_the_divergence_of_soft_marginals_has_one_unit(tau):
    """Epsilon and tau of a sentence against itself are those of the pair, in units of the pair's mean cost."""
    n, m, epsilon = 12, 17, 0.1
    source, source_mask, target, target_mask = padded_batch([(n, m), (20, 9)])
    options = {"epsilon_scale": "mean", "tau": tau, "debiased": True, "tol": 1e-6, "max_iter": 50_000}
    _, result = alignment_loss(source, target, source_mask, target_mask, epsilon, **options)
    x, y = source[0, :n].double(), target[0, :m].double()
    unit = pairwise_cost(x.unsqueeze(0), y.unsqueeze(0)).mean().item()
    between, first, second = (
        pot_soft_solution(pairwise_cost(p.unsqueeze(0), q.unsqueeze(0))[0], epsilon * unit, tau * unit)[1]
        for p, q in ((x, y), (x, x), (y, y))
    )
    expected = between - (first + second) / 2
    assert result.value[0].item() == pytest.approx(expected.item(), abs=1e-4 * between.item())
    _, same = alignment_loss(source, source, source_mask, source_mask, epsilon, **options)
    assert same.value.abs().max() < 2e-5


@pytest.mark.parametrize("tau", [None, 0.5])
def test_the_gradient_of_the_divergence_equals_finite_differences(tau):
    source, source_mask, target, target_mask = padded_batch([(4, 5), (3, 3)])
    states = source.double().requires_grad_()

    def value(states):
        options = {"epsilon_scale": "absolute", "debiased": True, "tau": tau, "tol": 1e-12, "max_iter": 100_000}
        return alignment_loss(states, target.double(), source_mask, target_mask, 0.2, **options)[0]

    assert torch.autograd.gradcheck(value, (states,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ["sinkhorn", "exact", "product"])
def test_given_marginals_are_met(solver):
    source, source_mask, target, target_mask = padded_batch([(6, 9), (8, 4)])
    marginals = []
    for mask in (source_mask, target_mask):
        weights = torch.rand(mask.shape) * mask
        marginals.append(weights / weights.sum(1, keepdim=True))
    matrix = pairwise_cost(source, target)
    if solver == "sinkhorn":
        result = sinkhorn(matrix, 0.1, source_mask, target_mask, 5000, 1e-6, True, *marginals)
    else:
        result = {"exact": exact_plan, "product": product_plan}[solver](matrix, source_mask, target_mask, *marginals)
    torch.testing.assert_close(result.plan.sum(2), marginals[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(result.plan.sum(1), marginals[1], atol=2e-6, rtol=0)


def test_centring_makes_a_common_direction_harmless():
    source, source_mask, target, target_mask = padded_batch([(6, 9), (8, 4)])
    shifted = source + 20.0, target - 20.0
    options = {"epsilon": 0.3, "center": True, "tol": 1e-6}
    plain, _ = alignment_loss(source, target, source_mask, target_mask, **options)
    moved, _ = alignment_loss(*shifted, source_mask, target_mask, **options)
    assert moved.item() == pytest.approx(plain.item(), rel=1e-3)


def test_an_unknown_solver_is_an_error():
    source, source_mask, target, target_mask = padded_batch([(4, 4)])
    with pytest.raises(ValueError, match="solver='emd' is not allowed"):
        alignment_loss(source, target, source_mask, target_mask, solver="emd")


@pytest.mark.parametrize("solver", ["exact", "product"])
def test_a_nan_is_an_error_in_the_closed_forms_too(solver):
    source, source_mask, target, target_mask = padded_batch([(4, 4)])
    source[0, 1, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        alignment_loss(source, target, source_mask, target_mask, solver=solver)


def test_marginals_carry_no_gradient():
    source, source_mask, target, target_mask = padded_batch([(4, 6)])
    marginals = [(mask / mask.sum(1, keepdim=True)).requires_grad_() for mask in (source_mask, target_mask)]
    source.requires_grad_()
    alignment_loss(
        source, target, source_mask, target_mask, source_marginal=marginals[0], target_marginal=marginals[1]
    )[0].backward()
    assert source.grad.abs().sum() > 0 and marginals[0].grad is None and marginals[1].grad is None


@pytest.mark.parametrize(
    "wrong",
    [torch.tensor([[0.5, 0.6, -0.1]]), torch.tensor([[0.5, 0.1, 0.1]]), torch.tensor([[float("nan"), 1.0, 0.0]])],
)
def test_a_marginal_that_is_no_distribution_is_an_error(wrong):
    mask = torch.ones(1, 3)
    for solve in (product_plan, exact_plan):
        with pytest.raises(ValueError, match="marginal of pair 0 must be >= 0 and sum to 1"):
            solve(torch.rand(1, 3, 3), mask, mask, wrong)
    with pytest.raises(ValueError, match="marginal of pair 0 must be >= 0 and sum to 1"):
        sinkhorn(torch.rand(1, 3, 3), 0.1, mask, mask, target_marginal=wrong)


def test_the_error_about_a_nan_names_its_place():
    source, source_mask, target, target_mask = padded_batch([(4, 4), (5, 3)])
    target[1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match="pair 1, source token 0, target token 2"):
        alignment_loss(source, target, source_mask, target_mask)


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("options", [{}, {"debiased": True}, {"center": True}, {"tau": 0.5}])
def test_zero_vectors_and_duplicated_tokens_have_finite_values_and_gradients(cost, options):
    source, source_mask, target, target_mask = padded_batch([(6, 7), (5, 5)])
    source[0, 1] = source[0, 2]
    target[0, 3:5] = source[0, :2]
    source[1], target[1, 2] = 0.0, 0.0
    source.requires_grad_()
    loss, result = alignment_loss(source, target, source_mask, target_mask, 0.1, cost=cost, **options)
    loss.backward()
    assert result.converged.all() and torch.isfinite(result.value).all() and torch.isfinite(source.grad).all()
    assert source.grad.abs().max() < 10
    if cost == "cosine" and options == {}:
        # A zero vector is as far from everything as a right angle, and its direction is nobody's business.
        assert result.value[1].item() == pytest.approx(1.0) and source.grad[1].abs().sum() == 0


def test_squared_distances_do_not_depend_on_the_origin():
    source, target = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    near = pairwise_cost(source, target, "sqeuclidean")
    far = pairwise_cost(source + 300, target + 300, "sqeuclidean")
    torch.testing.assert_close(near, torch.cdist(source, target).square() / 2, rtol=1e-4, atol=1e-4)
    # What is lost is lost when 300 is added: 2e-5 of each coordinate.
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-3)


def test_the_closed_forms_have_the_potentials_of_their_limits():
    source, source_mask, target, target_mask = padded_batch([(9, 7), (4, 8)])
    matrix = pairwise_cost(source, target)
    exact, product = (solve(matrix, source_mask, target_mask) for solve in (exact_plan, product_plan))
    for result in (exact, product):
        a, b = (mask / mask.sum(1, keepdim=True) for mask in (source_mask, target_mask))
        dual = (a * result.source_potential).sum(1) + (b * result.target_potential).sum(1)
        torch.testing.assert_close(dual, result.value, rtol=1e-5, atol=1e-6)
    slack = matrix - exact.source_potential.unsqueeze(2) - exact.target_potential.unsqueeze(1)
    assert (slack[0, :9, :7] > -1e-6).all() and (slack * exact.plan).abs().max() < 1e-6
    large = sinkhorn(matrix, 1e3, source_mask, target_mask, tol=1e-7)
    for found, limit in ((large.source_potential, product.source_potential),):
        difference = (found - limit)[0, :9]
        torch.testing.assert_close(difference, difference.mean().expand(9), rtol=0, atol=2e-3)


def test_a_sentence_is_at_no_distance_from_itself_without_regularisation():
    source, source_mask, target, target_mask = padded_batch([(9, 7)])
    options = {"solver": "exact"}
    plain, _ = alignment_loss(source, target, source_mask, target_mask, **options)
    debiased, _ = alignment_loss(source, target, source_mask, target_mask, debiased=True, **options)
    same, _ = alignment_loss(source, source, source_mask, source_mask, debiased=True, **options)
    assert debiased.item() == plain.item() > 0 and same.item() == pytest.approx(0, abs=1e-6)


def test_exact_without_pot_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    mask = torch.ones(1, 2)
    with pytest.raises(ImportError, match='ot_solver="exact" needs the package POT: pip install POT'):
        exact_plan(torch.rand(1, 2, 2), mask, mask)


def test_a_back_end_that_is_not_there_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(transport_xlfa, "BACKENDS", {"torch": BACKENDS["torch"]})
    mask = torch.ones(1, 2)
    with pytest.raises(ValueError, match="backend='compiled' is not there, only 'auto', 'torch'"):
        sinkhorn(torch.rand(1, 2, 2), 0.1, mask, mask, backend="compiled")


def test_auto_takes_the_compiled_back_end_where_it_is_there(monkeypatch):
    taken = []
    for backends in ({"torch"}, {"torch", "compiled"}):
        table = {name: lambda problem, name=name: taken.append(name) or BACKENDS["torch"](problem) for name in backends}
        monkeypatch.setattr(transport_xlfa, "BACKENDS", table)
        alignment_loss(*(torch.rand(1, 3, 4), torch.rand(1, 2, 4)), torch.ones(1, 3), torch.ones(1, 2))
    assert taken == ["torch", "compiled"]


@pytest.mark.parametrize("failure", ["raises", "is wrong"])
def test_a_triton_that_fails_its_check_is_not_taken(monkeypatch, caplog, failure):
    def broken(problem):
        if failure == "raises":
            raise RuntimeError("no C compiler")
        result = BACKENDS["torch"](problem)
        result.plan = result.plan * 1.01
        return result

    module = types.ModuleType("modeling_xlfa.sinkhorn_triton_xlfa")
    module.solve_with_triton = broken
    monkeypatch.setitem(sys.modules, "modeling_xlfa.sinkhorn_triton_xlfa", module)
    monkeypatch.setattr(transport_xlfa, "BACKENDS", dict(BACKENDS))
    transport_xlfa._add_triton.cache_clear()
    transport_xlfa._add_triton(torch.device("cpu"))
    transport_xlfa._add_triton.cache_clear()
    assert "triton" not in transport_xlfa.BACKENDS
    assert "the Triton back end fails its check on cpu; torch solves instead" in caplog.text


def test_epsilon_has_one_unit_whatever_the_cost_is_multiplied_by():
    source, source_mask, target, target_mask = padded_batch([(9, 7), (4, 8)])
    matrix = pairwise_cost(source, target)
    for scale in ("centered_std", "std", "mean", "max"):
        results = [
            sinkhorn(cost, 0.2, source_mask, target_mask, tol=1e-6, return_plan=True, epsilon_scale=scale)
            for cost in (matrix, 50 * matrix)
        ]
        torch.testing.assert_close(results[0].plan, results[1].plan, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(50 * results[0].epsilon, results[1].epsilon)


def test_adding_row_and_column_terms_leaves_plan_and_unit_alone():
    source, source_mask, target, target_mask = padded_batch([(9, 7)])
    matrix = pairwise_cost(source, target)
    shifted = matrix + torch.rand(1, 9, 1) + torch.rand(1, 1, 7)
    results = [
        sinkhorn(cost, 0.2, source_mask, target_mask, tol=1e-6, return_plan=True, epsilon_scale="centered_std")
        for cost in (matrix, shifted)
    ]
    torch.testing.assert_close(results[0].epsilon, results[1].epsilon, rtol=1e-4, atol=0)
    torch.testing.assert_close(results[0].plan, results[1].plan, rtol=1e-2, atol=1e-5)
