"""The transport benchmark's rows, table and targets, as text."""

import argparse
import importlib.metadata
import shlex
import statistics
import sys
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from reporting import describe_commit, describe_processor
from transport_cases import SETTINGS
from transport_peers import END_TO_END, SOLVE, SOLVERS

FLOOR, REFERENCE, ENCODER = "floor", "reference", "encoder step"
VERSIONS = ("torch", "POT", "geomloss", "ott-jax", "jax", "numba", "triton", "transformers")


@dataclass
class Row:
    """A line of the table: what one solver did on one case. Errors are None where there is no answer to judge."""

    setting: str
    data: str
    lengths: str
    epsilon: float
    centred_std: float
    solver: str = ""
    mode: str = ""
    seconds: list[float] = field(default_factory=list)
    # Where the solver was stopped: it needs more than this.
    more_than_seconds: float | None = None
    floor: float | None = None
    sweeps: int | None = None
    marginal_error: float | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    peak_bytes: int | None = None
    failed: bool = False
    note: str = ""

    def like(self, solver: str, mode: str) -> "Row":
        """An empty row on the same case."""
        return replace(self, solver=solver, mode=mode, seconds=[])

    @property
    def case(self) -> tuple:
        """Which problem it is about."""
        return self.setting, self.data, self.lengths, self.epsilon

    @property
    def median(self) -> float | None:
        """Seconds; a lower bound where the solver was stopped."""
        return statistics.median(self.seconds) if self.seconds else self.more_than_seconds

    def cells(self) -> list[str]:
        """The row as the table shows it."""

        def number(value: float | None, form: str, factor: float = 1) -> str:
            return "" if value is None else format(value * factor, form)

        bound = ">" if self.more_than_seconds else ""
        ratio = self.median / self.floor if self.median and self.floor else None
        return [
            *(self.setting, self.data, self.lengths, f"{self.epsilon:g}", f"{self.centred_std:.3g}"),
            *(self.solver, self.mode),
            bound + number(self.median, ".4g", 1e3),
            bound + number(ratio, ".3g"),
            number(self.sweeps, "d"),
            *(number(error, ".1e") for error in (self.marginal_error, self.value_error, self.gradient_error)),
            number(self.peak_bytes, ".1f", 2**-20),
            str(len(self.seconds) or ""),
            self.note,
        ]


HEADINGS = (
    "setting data lengths eps/mean eps/cstd solver mode ms xfloor sweeps marginal value gradient MiB runs note"
).split()


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, aligned."""
    lines = [list(HEADINGS), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


@dataclass(frozen=True)
class Target:
    """A ratio of medians that ours should reach on clustered tokens, for epsilons (of the mean cost) in a range."""

    solver: str
    mode: str
    lowest: float
    highest: float
    limit: float
    # At least `limit` times faster than this peer; without one, at most `limit` times the floor.
    ahead_of: str | None = None

    def speaks_of(self, row: Row) -> bool:
        """Whether it is about this row."""
        return (row.solver, row.mode) == (self.solver, self.mode) and self.lowest <= row.epsilon <= self.highest

    def line(self, row: Row, rows: dict[tuple, Row]) -> str:
        """The target, and what was measured for it on the row's case."""
        if self.ahead_of is None:
            wanted, other = f"<= {self.limit:g} floors", None
        else:
            wanted = f"at least {self.limit:g} x ahead of {self.ahead_of}"
            other = rows.get((*row.case, self.ahead_of, self.mode))
            if other is None or other.median is None:
                return _target_line("not known", row, wanted, other.note if other else "not measured")
        if row.failed or row.median is None:
            return _target_line("NOT met" if row.failed else "not known", row, wanted, row.note)
        ratio = row.median / row.floor if other is None else other.median / row.median
        met = ratio <= self.limit if other is None else ratio >= self.limit
        bound = other is not None and other.more_than_seconds is not None
        verdict = "met" if met else "not known" if bound else "NOT met"
        return _target_line(verdict, row, wanted, f"{'more than ' if bound else ''}{ratio:.3g}")


CPU_TARGETS = (
    Target("ours-torch", END_TO_END, 0.3, 1.0, 1.5),
    Target("ours-torch", END_TO_END, 0.1, 0.1, 3),
    Target("ours-torch", END_TO_END, 0.01, 0.01, 10),
    Target("ours-torch", SOLVE, 0.0, 0.03, 10, ahead_of="pot-log"),
    Target("ours-compiled", END_TO_END, 0.01, 0.03, 1.6),
    Target("ours-compiled", END_TO_END, 0.1, 1.0, 1.4),
    Target("ours-compiled", SOLVE, 0.03, 0.1, 100, ahead_of="pot-log"),
    Target("ours-compiled", SOLVE, 0.03, 0.1, 10, ahead_of="pot-sinkhorn"),
)
NEVER_FAILS_AT = 0.003
ENCODER_SHARE = 0.1


def target_lines(rows: list[Row], device: str) -> list[str]:
    """One line a target and case it speaks of, in the order of the targets."""
    by_key = {(*row.case, row.solver, row.mode): row for row in rows}
    ours = [row for row in rows if row.solver.startswith("ours") and row.data == "clustered"]
    lines = []
    for target in CPU_TARGETS if device == "cpu" else ():
        lines += [target.line(row, by_key) for row in ours if target.speaks_of(row)]
    for row in ours:
        if row.epsilon == NEVER_FAILS_AT and (row.median or row.failed):
            lines.append(_target_line("NOT met" if row.failed else "met", row, "no failure", row.note or "none"))
    encoder = next((row for row in rows if row.solver == ENCODER), None)
    for row in ours if encoder else ():
        if row.mode == END_TO_END and row.setting == "small" and row.median:
            share = row.median / encoder.median
            met = share <= ENCODER_SHARE and not row.failed
            lines.append(_target_line("met" if met else "NOT met", row, "<= 10 % of the encoder step", f"{share:.1%}"))
    return lines


def _target_line(verdict: str, row: Row, wanted: str, measured: str) -> str:
    where = f"{row.solver}, {row.mode}, epsilon {row.epsilon:g}, {row.setting} {row.lengths}"
    return f"{verdict:9} {where}: {wanted}: {measured}"


def header(options: argparse.Namespace) -> dict[str, str]:
    """What the figures depend on, apart from the rows' own columns."""
    versions = []
    for package in VERSIONS:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    gpu = f"; {torch.cuda.get_device_name()}" if options.device == "cuda" else ""
    sizes = [
        f"{name}: B {SETTINGS[name].pairs}, {SETTINGS[name].tokens} tokens, d {SETTINGS[name].width}"
        for name in options.setting
    ]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{describe_processor()}{gpu}",
        "threads": f"{torch.get_num_threads()}",
        "versions": ", ".join(versions),
        "commit": describe_commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "settings": "; ".join(sizes),
        "stopping": f"marginal L1 error {options.tol:g}, float32",
        "limits": f"{options.time_limit:g} s a call, {options.max_iter} sweeps, {options.memory_limit:g} GB recorded",
        "seed": str(options.seed),
    }


LEGEND = """\
eps/mean, eps/cstd: epsilon in units of the mean cost and of the standard deviation of the double-centred cost.
xfloor: ms over the floor's. runs: repetitions behind the median; slow rows have fewer. sweeps: of the slowest pair.
marginal: worst pair, L1, of the plan. value: worst pair, relative. gradient: relative Frobenius norm; for solve only
that of the plan (the gradient with respect to the cost), end to end with respect to the states. Errors are against the
float64 reference. MiB: peak memory of one call beyond what was there before (not for OTT: XLA keeps what it frees)."""


def report(about: dict[str, str], rows: list[Row], device: str) -> str:
    """The whole output as text."""
    lines = [f"{name}: {value}" for name, value in about.items()]
    if left_out := [name for name, entry in SOLVERS.items() if device not in entry.devices]:
        lines.append(f"left out on {device}: {', '.join(left_out)}")
    targets = target_lines(rows, device) or ["none of the rows measured has one"]
    return "\n".join([*lines, "", LEGEND, "", table(rows), "", "Targets (clustered tokens)", *targets]) + "\n"
