"""How the transport benchmark drives each solver, ours and its peers, each in its best mode.

A solver is a class: its constructor takes the case and does what is not timed (imports, compilation, finding the
tolerance that means the benchmark's marginal L1 error); `solve` and `end_to_end` are what is timed. Peers whose epsilon
is one scalar get the cost over epsilon, pair by pair, and epsilon 1: the same problem.
"""

import contextlib
import functools
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from transport_cases import Answer, Case

from modeling_xlfa.transport_xlfa import alignment_loss, pairwise_cost, sinkhorn

SOLVE, END_TO_END = "solve only", "end to end"
# POT looks at its error at every tenth sweep.
POT_CHECK = 10


class NotReachedError(Exception):
    """The solver does not reach the tolerance. `seconds`: how long it tried, where going on might have helped."""

    def __init__(self, message: str, seconds: float | None = None):
        super().__init__(message)
        self.seconds = seconds


class SkippedError(Exception):
    """The row is not run, and why."""


class Solver:
    """One solver on one case."""

    def __init__(self, case: Case):
        self.case = case

    def transport(self, cost: torch.Tensor, epsilon: torch.Tensor) -> Answer:
        """Values and plan for a cost without gradient (B x n x m) and epsilon (B, absolute)."""
        raise NotImplementedError

    def solve(self) -> Answer:
        """The problem with its cost matrix given: values and plan."""
        return self.transport(self.case.cost, self.case.epsilon)

    def end_to_end(self) -> Answer:
        """From states to gradients. By hand: at convergence the gradient with respect to the cost is the plan."""
        leaves = self.case.leaves()
        cost = pairwise_cost(*leaves)
        answer = self.transport(cost.detach(), self.case.epsilon_for(cost))
        cost.backward(torch.as_tensor(answer.plan) / self.case.pairs)
        answer.gradients = tuple(leaf.grad for leaf in leaves)
        return answer


class Ours(Solver):
    """XLFA with one of its back ends, through its public functions."""

    def __init__(self, case: Case, backend: str):
        super().__init__(case)
        if backend == "compiled":
            importlib.import_module("xlfa.compiled_sinkhorn")
        self.options = {"max_iter": case.limits.max_iter, "tol": case.limits.tol, "backend": backend}
        # Back ends that compile do so at their first call.
        self.solve()

    def transport(self, cost: torch.Tensor, epsilon: torch.Tensor) -> Answer:
        result = sinkhorn(cost, epsilon, *self.case.masks, return_plan=True, **self.options)
        return Answer(result.value, result.iterations, plan=result.plan)

    def end_to_end(self) -> Answer:
        leaves = self.case.leaves()
        loss, result = alignment_loss(
            *leaves, *self.case.masks, epsilon=self.case.relative, epsilon_scale="mean", **self.options
        )
        loss.backward()
        return Answer(
            result.value.detach(),
            result.iterations,
            potentials=(result.source_potential, result.target_potential),
            gradients=tuple(leaf.grad for leaf in leaves),
        )


class _L1Stop:
    """Stands in for POT's norm during one run that is not timed.

    POT stops at an L2 norm, of one marginal (the other is exact), which relates to L1 by anything from 1 to the square
    root of the length. So this run stops at L1, and notes the L2 norm at that moment as the tolerance for the timed
    runs of the unchanged solver. It also ends runs that would take too long.
    """

    def __init__(self, case: Case):
        self.limits = case.limits
        self.began = time.perf_counter()
        self.start()

    def start(self) -> None:
        """Begin with a new problem."""
        self.checks, self.error, self.own, self.safe = 0, float("nan"), float("nan"), 0.0

    def __call__(self, difference: Any, **_: Any) -> Any:
        norms = abs(difference).sum(-1)
        self.checks += 1
        self.error, self.own = float(norms.max()), float((difference**2).sum(-1).max()) ** 0.5
        self.safe = self.limits.tol / difference.shape[-1] ** 0.5
        if np.isnan(self.error):
            raise NotReachedError(f"NaN at sweep {self.sweeps}")
        if time.perf_counter() - self.began > self.limits.seconds:
            raise self.given_up(f"stopped after {self.limits.seconds:g} s")
        return norms

    @property
    def sweeps(self) -> int:
        """Done so far, to within POT_CHECK."""
        return POT_CHECK * (self.checks - 1) + 1

    def given_up(self, why: str) -> NotReachedError:
        message = f"{why} at sweep {self.sweeps}, L1 error {self.error:.1e}"
        return NotReachedError(message, time.perf_counter() - self.began)

    def tolerance(self) -> float:
        """The L2 norm to stop at.

        Raises:
            NotReachedError: if the last run ended at the cap on sweeps.
        """
        if self.error >= self.limits.tol:
            raise self.given_up("stopped")
        # The error may be far below the tolerance at the first look; an L2 norm that implies it is then enough.
        return max(1.001 * self.own, self.safe)


class PotBatch(Solver):
    """POT's `ot.batch.solve_batch` with a detached cost: its default records the whole loop."""

    def __init__(self, case: Case, method: str):
        super().__init__(case)
        self.method = method
        self.marginals = case.marginals
        if method == "log_sinkhorn":
            # Zero masses give infinite logarithms, and much smaller ones denormals: both slow its loop 2 times.
            self.marginals = tuple(marginal.clamp(min=1e-9) for marginal in case.marginals)
        # KL(P || a b^T) is H(a) + H(b) more than the -H(P) that POT adds (its "kl" gives NaN with zero masses).
        self.entropies = sum(torch.special.entr(marginal).sum(1) for marginal in case.marginals)
        self.tolerance, self.sweeps = self._stop()

    def _stop(self) -> tuple[float, int]:
        """The tolerance, and the sweeps it takes; found once for all rows with this method.

        Raises:
            NotReachedError: if it is not reached.
        """
        import ot.batch._utils

        notes = self.case.notes
        if self.method not in notes:
            watch = _L1Stop(self.case)
            try:
                with mock.patch.object(ot.batch._utils, "norm_batch", watch):
                    self._run(self.case.cost, self.case.epsilon, self.case.limits.tol, "detach")
                notes[self.method] = watch.tolerance(), watch.sweeps
            except NotReachedError as error:
                notes[self.method] = error
        if isinstance(notes[self.method], NotReachedError):
            raise notes[self.method]
        return notes[self.method]

    def _run(self, cost: torch.Tensor, epsilon: torch.Tensor, tolerance: float, grad: str) -> Answer:
        from ot.batch import solve_batch

        # POT creates its scalings on the default device.
        with contextlib.nullcontext() if cost.device.type == "cpu" else cost.device:
            options = {"method": self.method, "max_iter": self.case.limits.max_iter, "tol": tolerance, "grad": grad}
            result = solve_batch(cost / epsilon.view(-1, 1, 1), 1.0, *self.marginals, **options)
        return Answer(epsilon * (result.value + self.entropies), result.log["n_iter"] + 1, plan=result.plan)

    def transport(self, cost: torch.Tensor, epsilon: torch.Tensor) -> Answer:
        return self._run(cost, epsilon, self.tolerance, "detach")


class PotBatchWithGradient(PotBatch):
    """The same by POT's own gradients: both of its modes that give right ones record the loop."""

    # Matrices B x n x m that a recorded sweep costs: the arguments of two logsumexp; or holes between its vectors.
    KEPT = {"log_sinkhorn": 2.4, "sinkhorn": 1.1}

    def __init__(self, case: Case, method: str, grad: str):
        super().__init__(case, method)
        self.grad = grad
        needed = self.KEPT[method] * self.sweeps * case.cost.nbytes
        if needed > case.limits.bytes:
            raise SkippedError(f"would need {needed / 1e9:.2g} GB")

    def end_to_end(self) -> Answer:
        leaves = self.case.leaves()
        cost = pairwise_cost(*leaves)
        answer = self._run(cost, self.case.epsilon_for(cost), self.tolerance, self.grad)
        answer.values.mean().backward()
        answer.values, answer.plan = answer.values.detach(), answer.plan.detach()
        answer.gradients = tuple(leaf.grad for leaf in leaves)
        return answer


class PotLoop(Solver):
    """POT's `ot.solve` pair by pair on the tokens alone, in numpy and float32, its fastest here."""

    def __init__(self, case: Case):
        super().__init__(case)
        import ot

        self.sizes = list(zip(*(mask.sum(1).tolist() for mask in case.masks)))
        self.tolerances, self.sweeps = [case.limits.tol] * case.pairs, None
        watch, found = _L1Stop(case), []

        def pair_done() -> None:
            found.append((watch.tolerance(), watch.sweeps))
            watch.start()

        with mock.patch.object(ot.backend.NumpyBackend, "norm", watch):
            self._run(case.cost, case.epsilon, pair_done)
        self.tolerances, self.sweeps = zip(*found)

    def _run(self, cost: torch.Tensor, epsilon: torch.Tensor, pair_done: Callable[[], None] = lambda: None) -> Answer:
        import ot

        scaled = (cost / epsilon.view(-1, 1, 1)).numpy()
        plan, values = np.zeros_like(scaled), np.zeros_like(scaled[:, 0, 0])
        options = {"reg": 1.0, "reg_type": "KL", "grad": "detach", "max_iter": self.case.limits.max_iter}
        for index, (rows, columns) in enumerate(self.sizes):
            a, b = (np.full(size, 1 / size, np.float32) for size in (rows, columns))
            result = ot.solve(scaled[index, :rows, :columns], a, b, tol=self.tolerances[index], **options)
            plan[index, :rows, :columns], values[index] = result.plan, result.value
            pair_done()
        return Answer(epsilon * torch.from_numpy(values), self.sweeps, plan=plan)

    def transport(self, cost: torch.Tensor, epsilon: torch.Tensor) -> Answer:
        return self._run(cost, epsilon)


class GeomLoss(Solver):
    """GeomLoss's annealed Sinkhorn loop. It has no tolerance: `scaling`, the ratio of its steps, sets the accuracy."""

    def __init__(self, case: Case, scaling: float):
        super().__init__(case)
        from geomloss import SamplesLoss

        self.loss = partial(SamplesLoss, "sinkhorn", p=2, blur=1.0, scaling=scaling, debias=False, backend="tensorized")
        # It wants points; the cost function looks them up in the matrix instead.
        self.points = [mask.new_zeros((*mask.shape, 1), dtype=torch.float32) for mask in case.masks]

    def transport(self, cost: torch.Tensor, epsilon: torch.Tensor) -> Answer:
        """Its gradient with respect to the matrix is a plan whose rows are exact."""
        # Its loop switches gradients on and off for the whole process.
        with torch.enable_grad():
            scaled = (cost / epsilon.view(-1, 1, 1)).requires_grad_()
            matrices = iter((scaled, scaled.detach().transpose(1, 2).contiguous()))
            diameter = (2 * scaled.detach().max().item()) ** 0.5
            loss = self.loss(cost=lambda *_: next(matrices), diameter=max(diameter, 1.0))
            (a, b), (x, y) = self.case.marginals, self.points
            values = loss(a, x, b, y)
            (plan,) = torch.autograd.grad(values.sum(), scaled)
        return Answer(epsilon * values.detach(), plan=plan)


class Ott(Solver):
    """OTT-JAX, vmap and jit, on arrays that are JAX's already; compiled before it is timed."""

    PROBE = 100

    def __init__(self, case: Case):
        super().__init__(case)
        self.tensors = (case.batch.source, case.batch.target, case.cost, case.epsilon, *case.marginals)
        self.tensors = tuple(_jax_array(tensor) for tensor in self.tensors)
        # A compiled loop cannot be interrupted, so its cap follows from the time of one sweep.
        _, _, seconds = self._sweeps_and_seconds(self.PROBE, 0.0)
        cap = int(min(case.limits.max_iter, self.PROBE * case.limits.seconds / seconds))
        sweeps, error, seconds = self._sweeps_and_seconds(_power_of_two(cap), case.limits.tol)
        if not error < case.limits.tol:
            more_than = None if np.isnan(error) else seconds
            raise NotReachedError(f"stopped at sweep {sweeps}, L1 error {error:.1e}", more_than)
        # The loop carries an array of errors as long as its cap.
        self.solver, self.gradient = _ott_functions(_power_of_two(sweeps), case.limits.tol)
        self.solve()
        self.end_to_end()

    def _sweeps_and_seconds(self, max_iterations: int, threshold: float) -> tuple[int, float, float]:
        """Of the slowest pair, with its last error. A cost of zero comes first, to compile."""
        solve, _ = _ott_functions(max_iterations, threshold)
        cost, *rest = self.tensors[2:]
        solve(0 * cost, *rest)[0].block_until_ready()
        began = time.perf_counter()
        _, _, iterations, errors = solve(cost, *rest)
        return int(iterations.max()), float(errors.max()), time.perf_counter() - began

    def solve(self) -> Answer:
        values, plan, iterations, _ = self.solver(*self.tensors[2:])
        return Answer(values.block_until_ready(), iterations, plan=plan)

    def end_to_end(self) -> Answer:
        source, target, _, _, *marginals = self.tensors
        (_, (values, potentials, iterations)), gradients = self.gradient(source, target, *marginals, self.case.relative)
        gradients[0].block_until_ready()
        return Answer(values, iterations, potentials=potentials, gradients=gradients)


def _power_of_two(least: int) -> int:
    """Few different caps, so that few functions are compiled."""
    return 1 << (least - 1).bit_length()


def _jax_array(tensor: torch.Tensor) -> Any:
    import jax.numpy

    return jax.numpy.asarray(tensor.numpy())


@functools.cache
def _ott_functions(max_iterations: int, threshold: float) -> tuple[Callable, Callable]:
    """Compiled: values, plan, sweeps and errors of (cost, epsilon, a, b); and the loss with gradients, from states."""
    import jax
    import jax.numpy as jnp
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    # Its error is the L1 norm of one marginal, the other being exact: the benchmark's.
    solver = Sinkhorn(threshold=threshold, max_iterations=max_iterations, norm_error=1)

    def last_error(pair):
        return pair.errors[pair.n_iters // pair.inner_iterations - 1]

    def solve_pair(scaled, a, b):
        return solver(LinearProblem(Geometry(cost_matrix=scaled, epsilon=1.0), a, b))

    def solve(cost, epsilon, a, b):
        output = jax.vmap(solve_pair)(cost / epsilon[:, None, None], a, b)
        plan, *progress = jax.vmap(lambda pair: (pair.matrix, pair.n_iters, last_error(pair)))(output)
        return epsilon * output.reg_ot_cost, plan, *progress

    def loss(source, target, a, b, relative):
        def normalised(states):
            return states / jnp.maximum(jnp.linalg.norm(states, axis=-1, keepdims=True), 1e-12)

        cost = 1 - normalised(source) @ normalised(target).transpose(0, 2, 1)
        valid = (a > 0)[:, :, None] & (b > 0)[:, None, :]
        mean = jnp.where(valid, cost, 0).sum((1, 2)) / valid.sum((1, 2))
        epsilon = relative * jax.lax.stop_gradient(mean)
        output = jax.vmap(solve_pair)(cost / epsilon[:, None, None], a, b)
        values = epsilon * output.reg_ot_cost
        # Its potentials include the logarithms of the weights.
        f, g = jnp.where(a > 0, output.f - jnp.log(a), 0), jnp.where(b > 0, output.g - jnp.log(b), 0)
        potentials = epsilon[:, None] * f, epsilon[:, None] * g
        return values.mean(), (values, potentials, jax.vmap(lambda pair: pair.n_iters)(output))

    return jax.jit(solve), jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@dataclass(frozen=True)
class Entry:
    """How to build a solver for a case, which rows it has, where it runs, and whether its memory can be seen."""

    build: Callable[[Case], Solver]
    modes: tuple[str, ...] = (SOLVE, END_TO_END)
    devices: tuple[str, ...] = ("cpu", "cuda")
    memory_seen: bool = True


def _pot_with_gradient(method: str, grad: str) -> Entry:
    return Entry(partial(PotBatchWithGradient, method=method, grad=grad), modes=(END_TO_END,))


# Every solver of the table, in its order, by the name that `--solvers` takes.
SOLVERS = {
    "ours-torch": Entry(partial(Ours, backend="torch")),
    "ours-compiled": Entry(partial(Ours, backend="compiled"), devices=("cpu",)),
    "ours-triton": Entry(partial(Ours, backend="triton"), devices=("cuda",)),
    "pot-log": Entry(partial(PotBatch, method="log_sinkhorn")),
    "pot-log-envelope": _pot_with_gradient("log_sinkhorn", "envelope"),
    "pot-log-autodiff": _pot_with_gradient("log_sinkhorn", "autodiff"),
    "pot-sinkhorn": Entry(partial(PotBatch, method="sinkhorn")),
    "pot-sinkhorn-envelope": _pot_with_gradient("sinkhorn", "envelope"),
    "pot-sinkhorn-autodiff": _pot_with_gradient("sinkhorn", "autodiff"),
    "pot-loop": Entry(PotLoop, devices=("cpu",)),
    "geomloss-0.5": Entry(partial(GeomLoss, scaling=0.5)),
    "geomloss-0.9": Entry(partial(GeomLoss, scaling=0.9)),
    "geomloss-0.99": Entry(partial(GeomLoss, scaling=0.99)),
    # XLA keeps the memory it frees.
    "ott": Entry(Ott, devices=("cpu",), memory_seen=False),
}
