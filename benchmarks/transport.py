"""Compare XLFA's transport solver with its peers: speed, memory, accuracy and failures, in one table.

Every solver stops at the same L1 error of the marginals, which is checked afterwards, in float64, on the plan it
returned. "solve only" starts from a cost matrix and ends at value and plan; "end to end" starts from token states and
ends at their gradients. The yardstick, "floor", is the cost matrix and its backward alone. Times are medians of
repetitions that take turns in one process; compilation and first calls are not timed. A solver that ends above twice
the tolerance, gives NaN or meets a limit has failed, and its row says so.
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transport_cases import SETTINGS, Answer, Batch, Case, Limits, errors_of, make_batch
from transport_peers import SOLVE, SOLVERS, NotReachedError, SkippedError
from transport_report import ENCODER, FLOOR, REFERENCE, Row, header, report

from modeling_xlfa.transport_xlfa import pairwise_cost
from xlfa.files import write_text

# Above it the float64 reference is not one for errors of the size that is studied here.
REFERENCE_ERROR = 1e-6


@contextmanager
def noted(*rows: Row) -> Iterator[None]:
    """Whatever goes wrong inside becomes the note of the rows: a peer's failure is a result."""
    try:
        yield
        return
    except ModuleNotFoundError as error:
        note, failed = f"not installed: {error}", False
    except SkippedError as error:
        note, failed = f"skipped: {error}", False
    except NotReachedError as error:
        note, failed = f"FAILED: {error}", True
        for row in rows:
            row.more_than_seconds = error.seconds
    except Exception as error:
        note, failed = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:100]}", True
    for row in rows:
        row.note, row.failed = note, failed


def timed(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What the call returns, and its seconds."""
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronise()
    began = time.perf_counter()
    answer = call()
    synchronise()
    return answer, time.perf_counter() - began


def watched(call: Callable[[], Any], device: str) -> tuple[Any, float, int | None]:
    """What the call returns, its seconds, and the bytes of memory it needed at its peak beyond what was there."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        answer, seconds = timed(call, device)
        return answer, seconds, torch.cuda.max_memory_allocated() - before
    try:
        # Freed memory that the allocator keeps would hide what the call allocates; then the kernel's peak starts again.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        return *timed(call, device), None
    answer, seconds = timed(call, device)
    return answer, seconds, _resident("VmHWM") - before


def _resident(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry))


@dataclass
class Run:
    """A row that can be timed."""

    row: Row
    call: Callable[[], Any]
    repetitions: int


class Bench:
    """Measures cases with the options of the command line."""

    def __init__(self, options: argparse.Namespace, bar: tqdm):
        self.options, self.bar = options, bar

    def measure(self, case: Case, blank: Row) -> list[Row]:
        """All rows of a case; `blank` says which case it is."""
        reference, floor = blank.like(REFERENCE, "float64"), blank.like(FLOOR, "cost + backward")
        reference.sweeps, reference.marginal_error = case.reference.iterations, case.reference.marginal_error
        if not reference.marginal_error < REFERENCE_ERROR:
            reference.note = "not converged: the errors below are no smaller than its own"
        rows, runs = [reference, floor], [self._first_run(floor, _floor_call(case.batch))]
        for name in self.options.solvers:
            for row, run in self._prepare(name, case, blank):
                rows.append(row)
                runs += [run] if run else []
        for turn in range(self.options.repetitions):
            self.bar.set_postfix_str(f"turn {turn + 1}/{self.options.repetitions}")
            for run in runs:
                if turn < run.repetitions:
                    with noted(run.row):
                        run.row.seconds.append(timed(run.call, self.options.device)[1])
        for row in rows:
            row.floor = floor.median
        return rows

    def _prepare(self, name: str, case: Case, blank: Row) -> Iterator[tuple[Row, Run | None]]:
        """The solver's rows, judged, each with what is to be timed unless there is nothing."""
        gc.collect()
        entry = SOLVERS[name]
        rows = [blank.like(name, mode) for mode in entry.modes]
        self.bar.set_postfix_str(name)
        with noted(*rows):
            solver = entry.build(case)
        for row in rows:
            run = None
            if not row.note:
                with noted(row):
                    run = self._first_run(row, solver.solve if row.mode == SOLVE else solver.end_to_end, case)
            if not entry.memory_seen:
                row.peak_bytes = None
            self.bar.update()
            yield row, run

    def _first_run(self, row: Row, call: Callable[[], Any], case: Case | None = None) -> Run:
        """Warm up, measure the memory, judge the answer and see how many repetitions there is time for."""
        answer, seconds, row.peak_bytes = watched(call, self.options.device)
        if seconds < self.options.row_seconds / 10:
            # The first call also pays for caches and thread pools.
            answer, seconds, row.peak_bytes = watched(call, self.options.device)
        if case is not None:
            judge(row, answer, case)
        repetitions = min(self.options.repetitions, int(self.options.row_seconds / seconds))
        if repetitions < 2:
            row.seconds.append(seconds)
            repetitions = 0
        return Run(row, call, repetitions)


def judge(row: Row, answer: Answer, case: Case) -> None:
    """Fill in the errors against the float64 reference, and whether the solver has failed."""
    row.sweeps, row.marginal_error, row.value_error, row.gradient_error = errors_of(answer, case)
    if not row.marginal_error <= 2 * case.limits.tol:
        row.failed, row.note = True, "FAILED: not at the tolerance"


def _floor_call(batch: Batch) -> Callable[[], Any]:
    """Cost matrix, and backward from one fixed random gradient."""
    shape = pairwise_cost(batch.source, batch.target).shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(batch.source.device)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        leaves = batch.source.detach().requires_grad_(), batch.target.detach().requires_grad_()
        pairwise_cost(*leaves).backward(cotangent)
        return leaves

    return call


def encoder_row(blank: Row, options: argparse.Namespace) -> Row:
    """Forward and backward of a BERT-base-size encoder in bfloat16, 32 x 128 tokens: the term is a share of it."""
    from transformers import BertConfig, BertModel

    encoder = BertModel(BertConfig(), add_pooling_layer=False).to(options.device)
    tokens = torch.randint(1000, 20000, (32, 128), device=options.device)

    def call() -> None:
        encoder.zero_grad()
        with torch.autocast(options.device, torch.bfloat16):
            states = encoder(tokens).last_hidden_state
        states.float().square().mean().backward()

    watched(call, options.device)
    *_, peak = watched(call, options.device)
    row = blank.like(ENCODER, "forward + backward")
    row.peak_bytes = peak
    row.seconds = [timed(call, options.device)[1] for _ in range(options.repetitions)]
    return row


def parse_arguments() -> argparse.Namespace:
    """The command line, with what `both` and the defaults stand for put in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--setting", choices=(*SETTINGS, "both"), default="both", help="size of the batch (default: %(default)s)")
    add(
        "--epsilons",
        type=float,
        nargs="+",
        default=[0.003, 0.01, 0.03, 0.1, 0.3, 1.0],
        metavar="E",
        help="in units of each pair's mean cost (default: %(default)s)",
    )
    add(
        "--data",
        nargs="+",
        choices=("clustered", "noisy_copies"),
        default=["clustered", "noisy_copies"],
        help="kinds of token states (default: both)",
    )
    add(
        "--lengths",
        nargs="+",
        choices=("ragged", "full"),
        default=["ragged", "full"],
        help="8 to all tokens, or all in every pair (default: both)",
    )
    add(
        "--solvers",
        nargs="+",
        choices=tuple(SOLVERS),
        default=list(SOLVERS),
        metavar="NAME",
        help=f"rows to measure, of: {', '.join(SOLVERS)} (default: all)",
    )
    add("--repetitions", type=int, default=15, help="timed calls a row, in turns (default: %(default)s)")
    add(
        "--row-seconds",
        type=float,
        default=10,
        help="a row gets as many repetitions as fit into this, by its first call (default: %(default)s)",
    )
    add(
        "--time-limit",
        type=float,
        default=20,
        help="seconds after which a peer that has not reached the tolerance is stopped (default: %(default)s)",
    )
    add(
        "--memory-limit",
        type=float,
        default=6,
        help="GB; rows that would record more than this are skipped (default: %(default)s)",
    )
    add("--tol", type=float, default=1e-3, help="L1 error of the marginals to stop at (default: %(default)s)")
    add("--max-iter", type=int, default=100_000, help="cap on sweeps for every solver (default: %(default)s)")
    add("--threads", type=int, default=1, help="of every solver (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the data (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="also write the report here, anew after every case")
    add("--json", type=Path, metavar="FILE", help="also write header and rows here, as JSON")
    options = parser.parse_args()
    options.setting = list(SETTINGS) if options.setting == "both" else [options.setting]
    options.solvers = [name for name in SOLVERS if name in options.solvers and options.device in SOLVERS[name].devices]
    return options


def set_threads(count: int) -> None:
    """For torch, numba and XLA; the last two read it when they are imported, which is later."""
    torch.set_num_threads(count)
    os.environ["NUMBA_NUM_THREADS"] = os.environ["NPROC"] = str(count)
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(count > 1).lower()}"


def main() -> None:
    """Measure, print and write."""
    options = parse_arguments()
    set_threads(options.threads)
    # Peers warn of what the table says.
    warnings.simplefilter("ignore")
    about = header(options)
    limits = Limits(options.tol, options.max_iter, options.time_limit, options.memory_limit * 1e9)
    batches = list(itertools.product(options.setting, options.data, options.lengths))
    steps = len(batches) * len(options.epsilons) * sum(len(SOLVERS[name].modes) for name in options.solvers)
    rows = []
    with tqdm(total=steps, unit="row", file=sys.stderr) as bar:
        for setting, data, lengths in batches:
            batch = make_batch(SETTINGS[setting], data, lengths, options.seed, options.device)
            for epsilon in options.epsilons:
                case = Case(batch, epsilon, limits)
                bar.set_description(f"{setting} {data} {lengths} {epsilon:g}")
                rows += Bench(options, bar).measure(case, Row(setting, data, lengths, epsilon, case.in_centred_std))
                save(options, about, rows)
        if options.device == "cuda":
            rows.append(encoder_row(Row("small", "", "full", 0, 0), options))
            save(options, about, rows)
    print(report(about, rows, options.device), end="")


def save(options: argparse.Namespace, about: dict[str, str], rows: list[Row]) -> None:
    """Write what is known so far, where it was asked for."""
    if options.output:
        write_text(options.output, report(about, rows, options.device))
    if options.json:
        write_text(options.json, json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
