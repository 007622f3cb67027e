"""The Triton back end: its numbers, on a GPU or in Triton's interpreter, and that it compiles for a GPU.

The interpreter is chosen when triton is imported, which `conftest.py` already does by way of transformers: it needs
TRITON_INTERPRET=1 in the environment of pytest.
"""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import ot
import pytest
import torch

from modeling_xlfa.sinkhorn_xlfa import TransportProblem, solve_with_torch

pytest.importorskip("triton", reason="the package triton is not installed")

from modeling_xlfa import sinkhorn_triton_xlfa  # noqa: E402
from modeling_xlfa.sinkhorn_triton_xlfa import MAX_TOKENS, solve_with_triton  # noqa: E402

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available() else "cuda"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU: these tests need TRITON_INTERPRET=1 here", allow_module_level=True)

pytestmark = pytest.mark.triton


def tokens(length, generator):
    """Unit vectors around few centres: the case that needs many sweeps at small epsilon."""
    centres = torch.randn(4, 12, generator=torch.Generator().manual_seed(7))
    chosen = torch.randint(0, 4, (length,), generator=generator)
    vectors = centres[chosen] + 0.4 * torch.randn(length, 12, generator=generator)
    return torch.nn.functional.normalize(vectors, dim=-1)


def weights(mask, generator):
    values = mask * (0.5 + torch.rand(mask.shape, generator=generator))
    return values / values.sum(1, keepdim=True).clamp(min=1e-9)


def make_problem(masks, epsilon, softness=None, seed=0, **options):
    """Cosine costs between the tokens of masks B x n and B x m; epsilon over the mean cost, softness tau / epsilon."""
    source_mask, target_mask = masks
    generator = torch.Generator().manual_seed(seed)
    source = torch.stack([tokens(source_mask.shape[1], generator) for _ in source_mask])
    target = torch.stack([tokens(target_mask.shape[1], generator) for _ in target_mask])
    a, b = weights(source_mask, generator), weights(target_mask, generator)
    if options.get("symmetric"):
        target, b = source, a
    cost = 1 - source @ target.transpose(1, 2)
    epsilons = epsilon * cost.mean(dim=(1, 2))
    tau = None if softness is None else softness * epsilons
    return converted(TransportProblem(cost, epsilons, a, b, tau, **options), device=DEVICE)


def converted(problem, **options):
    values = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    tensors = {name: value.to(**options) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(problem, **tensors)


def ragged_masks(lengths, size):
    """Masks of the given lengths, padded to `size` tokens; the first pair's have holes."""
    masks = [(torch.arange(size[side]) < torch.tensor(lengths)[:, side, None]).float() for side in (0, 1)]
    masks[0][0, 2] = masks[1][0, 0] = masks[1][0, 3] = 0
    return masks


def reference(problem):
    """The torch back end in float64, close to the solution."""
    problem = converted(problem, device="cpu", dtype=torch.float64)
    # Sums that differ in the eighth digit, as float32 ones do, have no plan.
    for marginal in (problem.source_marginal, problem.target_marginal):
        marginal /= marginal.sum(1, keepdim=True)
    return solve_with_torch(dataclasses.replace(problem, tol=1e-10, max_iter=50_000))


def assert_consistent(problem, result):
    """Plan, error and padding are what the returned potentials make them."""
    a, b = problem.source_marginal.double(), problem.target_marginal.double()
    f, g = result.source_potential.double(), result.target_potential.double()
    exponent = (f.unsqueeze(2) + g.unsqueeze(1) - problem.cost) / problem.epsilon.double().view(-1, 1, 1)
    plan = torch.where(problem.empty.view(-1, 1, 1), 0, a.unsqueeze(2) * b.unsqueeze(1) * exponent.exp())
    assert torch.allclose(result.plan.double(), plan, rtol=1e-4, atol=1e-7)
    if problem.tau is not None:
        a = a * torch.exp(-f / problem.tau.unsqueeze(1))
        b = b * torch.exp(-g / problem.tau.unsqueeze(1))
    error = (result.plan.sum(2) - a).abs().sum(1) + (result.plan.sum(1) - b).abs().sum(1)
    error = torch.where(problem.empty, 0, error).float()
    assert torch.allclose(result.marginal_error, error, rtol=1e-3, atol=2e-6)
    assert (f[problem.source_marginal == 0] == 0).all() and (g[problem.target_marginal == 0] == 0).all()


@pytest.mark.filterwarnings("ignore:.*(overflow|converge).*")
@pytest.mark.parametrize("epsilon", [0.01, 0.03, 0.1, 1.0, 10.0])
def test_value_and_plan_equal_pot_in_float64(epsilon):
    masks = ragged_masks([(11, 17), (9, 4), (14, 18)], (14, 18))
    problem = make_problem(masks, epsilon, tol=1e-5)
    result = solve_with_triton(problem)
    assert result.converged.all() and (result.marginal_error < 2e-5).all()
    for index in range(3):
        a, b = problem.source_marginal[index].double().cpu(), problem.target_marginal[index].double().cpu()
        rows, columns = a.nonzero().squeeze(1), b.nonzero().squeeze(1)
        cost = problem.cost[index].double().cpu()[rows][:, columns]
        sides = [(side[side > 0] / side.sum()).numpy() for side in (a, b)]
        solved = ot.solve(
            cost.numpy(), *sides, reg=problem.epsilon[index].item(), reg_type="KL", max_iter=50_000, tol=1e-9
        )
        assert result.value[index].item() == pytest.approx(float(solved.value), rel=1e-4)
        plan = result.plan[index].double().cpu()
        found = plan[rows][:, columns].numpy()
        assert np.linalg.norm(found - solved.plan) < 1e-3 * np.linalg.norm(solved.plan)
        assert plan.sum().item() == pytest.approx(found.sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("softness", [None, 0.5, 20.0])
@pytest.mark.parametrize("epsilon", [0.05, 0.5, 5.0])
def test_equals_the_torch_back_end(epsilon, softness, symmetric):
    masks = ragged_masks([(12, 18), (5, 7), (1, 18), (16, 1)], (16, 18))
    if symmetric:
        masks = [masks[1], masks[1]]
    problem = make_problem(masks, epsilon, softness, symmetric=symmetric, tol=2e-6)
    result, wanted = solve_with_triton(problem), reference(problem)
    assert result.converged.all() and wanted.converged.all()
    for name in ("value", "plan", "plan_entropy"):
        found = getattr(result, name).double().cpu()
        assert torch.allclose(found, getattr(wanted, name), rtol=1e-5, atol=1e-5), name
    assert_consistent(problem, result)


def test_empty_pairs_and_single_tokens():
    source_mask, target_mask = torch.ones(4, 3), torch.ones(4, 5)
    source_mask[0] = 0
    target_mask[1] = 0
    source_mask[2, 1:] = target_mask[2, 1:] = 0
    source_mask[3, :2] = 0
    problem = make_problem((source_mask, target_mask), 0.1)
    result = solve_with_triton(problem)
    assert_consistent(problem, result)
    assert result.converged.all()
    for name, zeros in vars(solve_with_torch(converted(problem, device="cpu"))).items():
        assert torch.equal(getattr(result, name)[:2].cpu(), zeros[:2]), name
    assert result.value[2].item() == pytest.approx(problem.cost[2, 0, 0].item(), rel=1e-5)
    product = problem.target_marginal[3] @ problem.cost[3, 2]
    assert result.value[3].item() == pytest.approx(product.item(), rel=1e-5)


def test_stops_at_max_iter_and_says_so():
    problem = make_problem(ragged_masks([(12, 18), (9, 4)], (12, 18)), 0.02, tol=1e-6, max_iter=8)
    result = solve_with_triton(problem)
    assert not result.converged.any() and (result.iterations == 8).all()
    assert (result.marginal_error > 1e-6).all()
    assert_consistent(problem, result)


def test_a_pair_stops_by_itself():
    problem = make_problem(ragged_masks([(12, 18), (12, 18)], (12, 18)), 1.0)
    problem.epsilon[1] *= 0.03
    both = solve_with_triton(problem)
    assert both.converged.all() and both.iterations[0] < both.iterations[1]


def test_equal_costs_give_the_product_plan():
    a, b = weights(torch.ones(2, 7), torch.Generator()), weights(torch.ones(2, 9), torch.Generator())
    cost = torch.tensor([0.0, 0.4]).view(-1, 1, 1).expand(-1, 7, 9).contiguous()
    problem = converted(TransportProblem(cost, torch.tensor([1e-6, 0.1]), a, b), device=DEVICE)
    result = solve_with_triton(problem)
    assert torch.allclose(result.plan.cpu(), a.unsqueeze(2) * b.unsqueeze(1), rtol=1e-5)
    assert torch.allclose(result.value.cpu(), torch.tensor([0.0, 0.4]), atol=1e-6)


def test_one_cost_between_identical_sides_is_an_assignment():
    vectors = tokens(6, torch.Generator().manual_seed(1))
    cost = (1 - vectors @ vectors.T).clamp(min=0).expand(2, -1, -1).contiguous()
    uniform = torch.full((2, 6), 1 / 6)
    problem = converted(TransportProblem(cost, torch.full((2,), 1e-4), uniform, uniform), device=DEVICE)
    for symmetric in (True, False):
        result = solve_with_triton(dataclasses.replace(problem, symmetric=symmetric))
        assert result.converged.all()
        assert torch.allclose(result.plan.cpu(), torch.eye(6).expand(2, -1, -1) / 6, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.003, 0.0005])
def test_extreme_exponents_stay_finite(epsilon):
    problem = make_problem(ragged_masks([(12, 18), (9, 4)], (12, 18)), epsilon, max_iter=200)
    problem.cost[0, 0] += 50
    result = solve_with_triton(problem)
    for field in dataclasses.fields(result):
        assert torch.isfinite(getattr(result, field.name)).all(), field.name
    # Whatever the epsilon, the last sweep meets the columns.
    assert (result.plan.sum(1) - problem.target_marginal).abs().sum(1).max() < 1e-4


@pytest.mark.parametrize("options", [{}, {"softness": 3.0}, {"symmetric": True}])
def test_streamed_kernel_equals_the_one_on_chip(monkeypatch, options):
    masks = ragged_masks([(40, 60), (17, 9)], (60, 60) if "symmetric" in options else (40, 60))
    problem = make_problem([masks[0]] * 2 if "symmetric" in options else masks, 0.05, tol=1e-5, **options)
    on_chip = solve_with_triton(problem)
    monkeypatch.setattr(sinkhorn_triton_xlfa, "ON_CHIP_ENTRIES", 0)
    monkeypatch.setattr(sinkhorn_triton_xlfa, "STREAMED_ROWS", 16)
    streamed = solve_with_triton(problem)
    assert (streamed.iterations == on_chip.iterations).all() and streamed.converged.all()
    assert torch.allclose(streamed.plan, on_chip.plan, rtol=1e-3, atol=1e-6)
    assert torch.allclose(streamed.value, on_chip.value, rtol=1e-6)
    assert torch.allclose(streamed.plan_entropy, on_chip.plan_entropy, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(130, 10), (10, 130), (130, 150)])
def test_more_than_128_tokens(lengths):
    problem = make_problem(ragged_masks([lengths], lengths), 0.3, tol=1e-5)
    result, wanted = solve_with_triton(problem), reference(problem)
    assert result.converged.all() and wanted.converged.all()
    assert torch.allclose(result.plan.double().cpu(), wanted.plan, atol=1e-5, rtol=1e-4)
    assert torch.allclose(result.value.double().cpu(), wanted.value, rtol=1e-5)


def test_refuses_what_it_cannot_solve():
    with pytest.raises(ValueError, match=f"at most {MAX_TOKENS} tokens"):
        solve_with_triton(make_problem((torch.ones(1, MAX_TOKENS + 1), torch.ones(1, 2)), 0.1))
    problem = make_problem((torch.ones(1, 3), torch.ones(1, 2)), 0.1)
    with pytest.raises(ValueError, match="float32"):
        solve_with_triton(dataclasses.replace(problem, cost=problem.cost.double()))


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from modeling_xlfa import sinkhorn_triton_xlfa as module

module._HAS_FAST_LOG = tl.constexpr(True)
kernel = module._solve_pair
special = {"iterations_ptr": "*i64", "converged_ptr": "*i1", "n": "i32", "m": "i32", "max_iter": "i32", "tol": "fp32"}
for rows, columns, slab, soft, symmetric in [
    (128, 128, 128, False, False), (32, 16, 32, True, False), (64, 64, 64, True, True), (256, 256, 64, True, False)
]:
    constants = {"ROWS": rows, "COLUMNS": columns, "SLAB": slab, "SOFT": soft, "SYMMETRIC": symmetric}
    signature = {
        name: "constexpr" if name in constants else special.get(name, "*fp32") for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": module._warps(slab * columns)}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    # The layout that the kernel's data is arranged for.
    assert "threadsPerWarp = [1, 2, 16]" in compiled.asm["ttgir"]
    print(len(compiled.asm["cubin"]))
"""


def test_compiles_for_a_gpu_without_one():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4
