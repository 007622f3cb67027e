"""The transport solver against POT in float64, its gradient, and its edge cases."""

import numpy as np
import ot
import pytest
import torch

from modeling_xlfa.transport_xlfa import alignment_loss, cost_scale, exact_plan, pairwise_cost, product_plan, sinkhorn

EPSILONS = [0.01, 0.03, 0.1, 1.0, 10.0]


def clustered_pair(seed, source_length, target_length, size=24):
    """Tokens around few centres: the case that needs many sweeps at small epsilon."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, size, generator=generator)
    sides = []
    for length in (source_length, target_length):
        chosen = torch.randint(0, 4, (length,), generator=generator)
        sides.append(centres[chosen] + 0.4 * torch.randn(length, size, generator=generator))
    return sides


def padded_batch(lengths, seed=0, pad_value=0.0):
    """Pairs of the given (source, target) lengths, padded; states and masks of both sides."""
    pairs = [clustered_pair(seed + index, *both) for index, both in enumerate(lengths)]
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


def pot_solution(cost, epsilon):
    cost = np.asarray(cost, dtype=np.float64)
    return ot.solve(cost, reg=float(epsilon), reg_type="KL", max_iter=20_000, tol=1e-8)


@pytest.mark.filterwarnings("ignore:.*(overflow|converge).*")
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
def test_value_and_plan_equal_pot_in_float64(cost, epsilon):
    lengths = [(8, 15), (14, 11), (12, 12)]
    source, source_mask, target, target_mask = padded_batch(lengths)
    matrix = pairwise_cost(source, target, cost).requires_grad_()
    unit = cost_scale(matrix, source_mask, target_mask)
    result = sinkhorn(matrix, epsilon * unit, source_mask, target_mask, max_iter=50_000, tol=1e-5, return_plan=True)
    assert result.converged.all() and (result.marginal_error < 2e-5).all()
    result.value.sum().backward()
    for index, (n, m) in enumerate(lengths):
        reference = pot_solution(matrix[index, :n, :m].detach(), epsilon * unit[index])
        assert result.value[index].item() == pytest.approx(float(reference.value), rel=1e-4)
        plan = torch.as_tensor(reference.plan)
        for found in (result.plan[index], matrix.grad[index]):
            assert torch.linalg.norm(found[:n, :m].double() - plan) < 1e-3 * torch.linalg.norm(plan)
            assert found[n:].abs().sum() == 0 and found[:, m:].abs().sum() == 0


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


@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_padding_changes_nothing(epsilon):
    lengths = [(8, 21), (12, 5)]
    plain = padded_batch(lengths)
    source, source_mask, target, target_mask = padded_batch(lengths, pad_value=float("nan"))
    grown = [
        torch.nn.functional.pad(source, (0, 0, 0, 9)),
        torch.nn.functional.pad(source_mask, (0, 9)),
        target,
        target_mask,
    ]
    loss, result = alignment_loss(plain[0], plain[2], plain[1], plain[3], epsilon=epsilon)
    padded_loss, padded = alignment_loss(grown[0], grown[2], grown[1], grown[3], epsilon=epsilon)
    assert padded_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(padded.plan_entropy, result.plan_entropy, rtol=1e-3, atol=1e-4)


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


def test_a_pair_that_did_not_converge_says_so():
    source, source_mask, target, target_mask = padded_batch([(30, 30), (2, 2)])
    _, result = alignment_loss(source, target, source_mask, target_mask, epsilon=0.003, max_iter=3)
    assert result.converged.tolist() == [False, True] or not result.converged[0]
    assert result.marginal_error[0] > 1e-3 and result.iterations[0] == 3
    assert torch.isfinite(result.value).all()


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


def test_a_batch_of_empty_pairs_has_loss_zero():
    mask = torch.zeros(2, 3, dtype=torch.long)
    loss, _ = alignment_loss(torch.randn(2, 3, 4), torch.randn(2, 3, 4), mask, mask)
    assert loss.item() == 0


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


def test_half_precision_states_give_a_float32_solve():
    source, source_mask, target, target_mask = padded_batch([(12, 15)])
    rounded = source.bfloat16(), target.bfloat16()
    _, half = alignment_loss(*rounded, source_mask, target_mask, epsilon=0.05, tol=1e-5)
    _, full = alignment_loss(rounded[0].double(), rounded[1].double(), source_mask, target_mask, epsilon=0.05, tol=1e-5)
    assert half.value.dtype == torch.float32
    assert half.value.item() == pytest.approx(full.value.item(), rel=1e-4)


def generalised_kl(plan, reference):
    return (torch.special.xlogy(plan, plan / reference) - plan + reference).sum()


@pytest.mark.filterwarnings("ignore:.*(overflow|converge|numerical).*")
@pytest.mark.parametrize("tau", [0.05, 1.0])
@pytest.mark.parametrize("epsilon", [0.05, 1.0])
def test_unbalanced_plan_and_value_equal_pot(epsilon, tau):
    """The value is compared at POT's plan: the `value` that POT 0.9.7 reports for soft marginals is zero."""
    n, m = 12, 17
    source, source_mask, target, target_mask = padded_batch([(n, m), (20, 9)])
    matrix = pairwise_cost(source, target).requires_grad_()
    result = sinkhorn(matrix, epsilon, source_mask, target_mask, 20_000, 1e-6, return_plan=True, tau=tau)
    block = matrix[0, :n, :m].detach().double()
    options = {"reg_type": "KL", "unbalanced": tau, "unbalanced_type": "KL", "max_iter": 100_000, "tol": 1e-12}
    plan = torch.as_tensor(ot.solve(block.numpy(), reg=epsilon, **options).plan)
    a, b = torch.full((n,), 1 / n, dtype=torch.float64), torch.full((m,), 1 / m, dtype=torch.float64)
    value = (plan * block).sum() + epsilon * generalised_kl(plan, a.unsqueeze(1) * b)
    value += tau * (generalised_kl(plan.sum(1), a) + generalised_kl(plan.sum(0), b))
    assert result.value[0].item() == pytest.approx(value.item(), rel=1e-4)
    result.value.sum().backward()
    for found in (result.plan[0], matrix.grad[0]):
        assert torch.linalg.norm(found[:n, :m].double() - plan) < 1e-3 * torch.linalg.norm(plan)


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


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 1.0])
def test_the_divergence_combines_three_values_of_pot(epsilon):
    n, m = 12, 17
    source, source_mask, target, target_mask = padded_batch([(n, m)])
    loss, _ = alignment_loss(
        source, target, source_mask, target_mask, epsilon, "absolute", debiased=True, tol=1e-6, max_iter=50_000
    )
    x, y = source[0, :n], target[0, :m]
    between, first, second = (
        float(pot_solution(pairwise_cost(p.unsqueeze(0), q.unsqueeze(0))[0], epsilon).value)
        for p, q in ((x, y), (x, x), (y, y))
    )
    assert loss.item() == pytest.approx(between - (first + second) / 2, abs=1e-4 * between)


def test_the_divergence_is_zero_on_identical_sentences_and_never_negative():
    source, source_mask, target, target_mask = padded_batch([(12, 17), (9, 9), (1, 3)])
    for epsilon in (0.05, 0.5, 5.0):
        options = {"epsilon": epsilon, "debiased": True, "tol": 1e-5}
        _, same = alignment_loss(source, source, source_mask, source_mask, **options)
        _, different = alignment_loss(source, target, source_mask, target_mask, **options)
        torch.testing.assert_close(same.value, torch.zeros(3), atol=1e-5, rtol=0)
        assert (different.value > -1e-6).all()


def test_the_gradient_of_the_divergence_equals_finite_differences():
    source, source_mask, target, target_mask = padded_batch([(4, 5), (3, 3)])
    states = source.double().requires_grad_()

    def value(states):
        options = {"epsilon_scale": "absolute", "debiased": True, "tol": 1e-12, "max_iter": 100_000}
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
