"""The figures of a study's report, from the content of `report.json`, once as SVG for the page and once as PNG.

Colours are those of Okabe and Ito (2008), which readers with a colour-vision deficiency can tell apart; a task has the
same one everywhere. An SVG follows the reader's light or dark mode by itself.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from xlfa.study.conditions import BASELINES, CONTROL, GRID
from xlfa.study.resampling import ENF, HEADLINE, NOENF, leaves_zero_out
from xlfa.study.results import MAIN_ARM, SEPARATOR

# Light mode's ink, faint ink and paper. As written here they stand for the reader's own in an SVG, so nothing else may
# have these very colours.
INK, FAINT, PAPER = "#1f2328", "#8c959f", "#fffffe"
TASK_COLOURS = {"xnli": "#0072b2", "xquad": "#d55e00", "wikiann": "#009e73", "pawsx": "#56b4e9", "mlqa": "#e69f00"}
OTHER_COLOUR = "#cc79a7"
CONTROL_COLOURS = {"exact": "#009e73", "product": "#cc79a7", "shuffled_pairs": "#e69f00"}
CONTROL_LINES = {"exact": "--", "product": ":", "shuffled_pairs": "-."}
DARK_MODE = {INK: "#e6edf3", FAINT: "#8b949e", PAPER: "#161b22", "#0072b2": "#58a6ff", "#d55e00": "#ff8f3f"}
# Controls that are limits of epsilon stand where the limit is; the others to the right.
LEFT_CONTROLS = ("exact",)
METRIC_NAMES = {"accuracy": "accuracy", "f1": "F1", "exact_match": "exact match"}
TASK_NAMES = {"xnli": "XNLI", "xquad": "XQuAD", "pawsx": "PAWS-X", "mlqa": "MLQA", "tydiqa": "TyDiQA", "udpos": "UDPOS"}
CONTROL_NAMES = {
    "no_ot": "no OT",
    "exact": "exact (ε → 0)",
    "product": "product (ε → ∞)",
    "shuffled_pairs": "shuffled pairs",
}
STYLE = {
    **{"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK},
    **{"figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10},
    **{
        "axes.titleweight": "bold",
        "svg.hashsalt": "xlfa",
        "text.parse_math": False,
        "svg.fonttype": "path",
        "figure.dpi": 100,
    },
}


@dataclass(frozen=True)
class Drawing:
    """A figure of the report.

    Attributes:
        name: of its file, without an ending.
        title: stands above it.
        caption: says how to read it.
        figure: drawn.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    def svg(self) -> str:
        """For a page: in light or dark mode, as the reader has it."""
        buffer = io.StringIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        names = {colour: f"--c{number}" for number, colour in enumerate(DARK_MODE)}
        light = ";".join(f"{names[colour]}:{colour}" for colour in DARK_MODE)
        dark = ";".join(f"{names[colour]}:{other}" for colour, other in DARK_MODE.items())
        for colour, name in names.items():
            text = text.replace(colour, f"var({name})")
        style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
        start = text.index(">", text.index("<svg")) + 1
        return text[text.index("<svg") : start] + style + text[start:]

    def png(self) -> bytes:
        """For papers and terminals, in light mode."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        return buffer.getvalue()


def task_name(task: str) -> str:
    """As papers write it."""
    return TASK_NAMES.get(task, task)


def control_name(name: str) -> str:
    """In words."""
    return CONTROL_NAMES.get(name, name.replace("_", " "))


def condition_name(report: dict[str, Any], condition: dict[str, Any]) -> str:
    """A grid point's level with its field, or a control in words."""
    if condition["kind"] == CONTROL:
        return control_name(condition["condition"])
    axis = report["axis"]
    return condition["condition"] if axis["kind"] == "categorical" else f"{axis['name']} {condition['condition']}"


def draw_all(report: dict[str, Any]) -> list[Drawing]:
    """Every figure that the report has data for."""
    with matplotlib.rc_context(STYLE):
        return [drawing for draw in (_differences, _scores, _groups, _heat_maps, _curves) for drawing in draw(report)]


def of_line(report: dict[str, Any], task: str, line: str, kind: str = GRID) -> list[dict[str, Any]]:
    """The conditions of a task and line by level, or the controls that the line is held against."""
    return [
        each for each in report["conditions"] if (each["task"], each["kind"]) == (task, kind) and line in each["lines"]
    ]


def _colour(task: str) -> str:
    return TASK_COLOURS.get(task, OTHER_COLOUR)


def _positions(report: dict[str, Any], levels: list[int]) -> np.ndarray:
    """Where levels stand on the horizontal axis."""
    return np.array(report["axis"]["places"])[levels]


def _parts(name: str, lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Lines side by side in one figure, and its name; more than three get several figures."""
    parts = [lines[start : start + 3] for start in range(0, len(lines), 3)]
    for number, part in enumerate(parts):
        yield (name if len(parts) == 1 else f"{name}_{number + 1}"), part


def _prepare_axis(axes: Axes, report: dict[str, Any], label: bool) -> None:
    """Ticks at the levels, and the field's name beneath."""
    axis = report["axis"]
    levels = list(range(len(axis["levels"])))
    places = _positions(report, levels)
    axes.set_xticks(places, [_level_label(axis, level) for level in axis["levels"]], fontsize=8)
    margin = 0.12 * (np.ptp(places) or 1.0)
    axes.set_xlim(places.min() - margin, places.max() + margin)
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
    if label:
        axes.set_xlabel(_axis_label(axis))


def _level_label(axis: dict[str, Any], level: str) -> str:
    """A level as a tick has it: of several fields the values alone, one below the other."""
    parts = level.split(SEPARATOR)
    return "\n".join(part.split(" ", 1)[-1] for part in parts) if axis["kind"] == "categorical" else "\n".join(parts)


def _axis_label(axis: dict[str, Any]) -> str:
    return f"{axis['name']} (log scale)" if axis["kind"] == "log" else axis["name"]


def _values(entries: list[dict[str, Any]], row: str) -> tuple[np.ndarray, np.ndarray]:
    """Values, n, and distances to the ends of the intervals, 2 x n."""
    values = np.array([entry[row]["value"] for entry in entries])
    bounds = np.array([entry[row]["interval"] for entry in entries]).T
    # A percentile interval need not hold the value.
    return values, np.maximum([values - bounds[0], bounds[1] - values], 0)


def _panel_title(report: dict[str, Any], line: str) -> str:
    return line if len(report["lines"]) > 1 or line != MAIN_ARM else ""


def _differences(report: dict[str, Any]) -> Iterator[Drawing]:
    """The headline's difference to the baseline, all tasks in one panel for each line."""
    lines = [line for line in report["lines"] if _with_difference(report, line)]
    if not lines:
        return
    columns = min(2, len(lines))
    rows = -(-len(lines) // columns)
    figure = Figure(figsize=(max(7.0, 5.6 * columns), 0.6 + 3.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes in panels[len(lines) :]:
        axes.set_axis_off()
    shown = [own for task in report["tasks"] for line in lines for own in _with_controls(report, task, line)]
    members = [own["difference"]["seeds"] for own in shown if own["difference"]]
    most = max(map(len, members))
    for axes, line in zip(panels, lines):
        _prepare_axis(axes, report, label=True)
        levels = _positions(report, list(range(len(report["axis"]["levels"]))))
        step = _step(levels)
        places = _place_controls(axes, _control_order(report, line), max(0.8 * step, 0.18 * float(np.ptp(levels))))
        for number, task in enumerate(report["tasks"]):
            shift = 0.1 * step * (number - (len(report["tasks"]) - 1) / 2)
            grid = [own for own in of_line(report, task, line) if own["difference"]]
            controls = [own for own in of_line(report, task, line, CONTROL) if own["difference"]]
            metric = report["tasks"][task]["metrics"][0]
            label = f"{task_name(task)} ({METRIC_NAMES.get(metric, metric)})"
            own_places = _positions(report, [each["level"] for each in grid])
            style = "o" if report["axis"]["kind"] == "categorical" else "o-"
            control_places = np.array([places[own["condition"]] for own in controls]) + shift
            _error_bars(axes, own_places + shift, grid, task, most, style, label=label)
            _error_bars(axes, control_places, controls, task, most, "D")
        axes.axhline(0, color=INK, linewidth=0.9)
        axes.set_title(_panel_title(report, line))
    baseline = _baseline(report)
    for axes in panels[::columns]:
        axes.set_ylabel(f"difference to {baseline}, points")
    legend = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        # The first panel's, whose lines may be of more seeds and so not faint.
        legend = dict(zip(labels, handles)) | legend
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=5, fontsize=8)
    caption = (
        f"Mean over the headline languages minus that of {baseline}, paired by seed. Bars: {_intervals(members)}. "
        f"Diamonds: controls.{_seeds(members)}"
    )
    yield Drawing("differences", f"Difference to {baseline}", caption, figure)


def _step(positions: np.ndarray) -> float:
    """The smallest distance between levels."""
    return float(np.diff(positions).min()) if len(positions) > 1 else 1.0


def _place_controls(axes: Axes, names: list[str], step: float) -> dict[str, float]:
    """Room for the controls beside the levels, with ticks and dotted lines between; name → where it stands."""
    low, high = axes.get_xlim()
    left = [name for name in names if name in LEFT_CONTROLS]
    right = [name for name in names if name not in LEFT_CONTROLS]
    places = {name: low - step * (len(left) - number - 0.3) for number, name in enumerate(left)}
    places |= {name: high + step * (number + 0.7) for number, name in enumerate(right)}
    labels = [text.get_text() for text in axes.get_xticklabels()]
    names_below = [control_name(name).replace(" ", "\n", 1) for name in places]
    axes.set_xticks([*axes.get_xticks(), *places.values()], [*labels, *names_below], fontsize=8)
    axes.set_xlim(low - step * (len(left) + 0.2 * bool(left)), high + step * (len(right) + 0.2 * bool(right)))
    for edge, there in ((low, left), (high, right)):
        if there:
            axes.axvline(edge, color=FAINT, linewidth=0.6, linestyle=":")
    return places


def _error_bars(
    axes: Axes,
    places: np.ndarray,
    conditions: list[dict[str, Any]],
    task: str,
    most: int,
    style: str,
    group: str = HEADLINE,
    **options: Any,
) -> None:
    """Differences to the baseline with their intervals, of a group of languages, in the colour of the task."""
    if conditions:
        metric = next(iter(conditions[0]["difference"]["scores"]))
        values, errors = _values([own["difference"]["scores"][metric] for own in conditions], group)
        look = {"color": _colour(task), "markersize": 5, "capsize": 2.5, "linewidth": 1.4}
        seeds = [own["difference"]["seeds"] for own in conditions]
        _points(axes, places, values, errors, seeds, most, style, **(look | options))


def _points(
    axes: Axes,
    places: np.ndarray,
    values: np.ndarray,
    errors: np.ndarray,
    seeds: list[list[int]],
    most: int,
    style: str,
    **look: Any,
) -> Any:
    """Points with their intervals; those of fewer seeds than the figure's `most` are faint.

    Joined are those that have as many as any of this line: one through means over different seeds would show the seeds,
    not the axis.
    """
    numbers = np.array([len(own) for own in seeds])
    joined = numbers == numbers.max()
    faint = {"alpha": 0.45}
    if not joined.all():
        apart = look | faint | {"label": None}
        axes.errorbar(places[~joined], values[~joined], errors[:, ~joined], fmt=style.rstrip("-"), **apart)
    look |= faint if numbers.max() < most else {}
    return axes.errorbar(places[joined], values[joined], errors[:, joined], fmt=style, **look)


def _with_difference(report: dict[str, Any], line: str) -> bool:
    return any(own["difference"] for task in report["tasks"] for own in of_line(report, task, line))


def _baseline(report: dict[str, Any]) -> str:
    names = {own["difference"]["baseline"] for own in report["conditions"] if own["difference"]}
    return control_name(names.pop()) if len(names) == 1 else "the baseline"


def _with_controls(report: dict[str, Any], task: str, line: str) -> list[dict[str, Any]]:
    return [*of_line(report, task, line), *of_line(report, task, line, CONTROL)]


def _intervals(members: list[list[int]]) -> str:
    """What the intervals of means over these seeds are from; a single one tells nothing of what another would do."""
    single = any(len(seeds) == 1 for seeds in members)
    return "95 % intervals from clusters of examples x seeds" + (
        ", of a single seed from clusters alone" if single else ""
    )


def _seeds(members: list[list[int]]) -> str:
    """A warning where means are over different numbers of seeds."""
    numbers = {len(seeds) for seeds in members}
    if len(numbers) == 1:
        return ""
    return f" Means are over {min(numbers)} to {max(numbers)} seeds: faint points have fewer than the others."


def _control_order(report: dict[str, Any], line: str) -> list[str]:
    """Names of the line's controls but the baseline, the limit epsilon → 0 first."""
    names = dict.fromkeys(
        own["condition"]
        for task in report["tasks"]
        for own in of_line(report, task, line, CONTROL)
        if own["difference"]
    )
    order = ["exact", "product", "shuffled_pairs"]
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def _scores(report: dict[str, Any]) -> Iterator[Drawing]:
    """Scores against the axis, a row for each task and metric, a column for each line, controls as lines with bands."""
    shown = [(task, metric) for task, own in reversed(report["tasks"].items()) for metric in own["metrics"]]
    for name, lines in _parts("scores", report["lines"]):
        yield _draw_scores(report, name, lines, shown)


def _draw_scores(report: dict[str, Any], name: str, lines: list[str], shown: list[tuple[str, str]]) -> Drawing:
    figure = Figure(figsize=(max(7.0, 4.0 * len(lines)), 2.5 * len(shown) + 0.8), layout="constrained")
    panels = figure.subplots(len(shown), len(lines), sharey="row", squeeze=False)
    handles: dict[str, Any] = {}
    drawn = [own["seeds"] for task in report["tasks"] for line in lines for own in _with_controls(report, task, line)]
    most = max(map(len, drawn))
    for number, ((task, metric), row) in enumerate(zip(shown, panels)):
        for line, axes in zip(lines, row):
            _prepare_axis(axes, report, label=number == len(shown) - 1)
            handles |= _draw_controls(axes, of_line(report, task, line, CONTROL), metric)
            grid = of_line(report, task, line)
            if grid:
                places = _positions(report, [own["level"] for own in grid])
                values, errors = _values([own["scores"][metric] for own in grid], HEADLINE)
                style = "o" if report["axis"]["kind"] == "categorical" else "o-"
                look = {"color": _colour(task), "markersize": 5, "capsize": 2.5, "linewidth": 1.6, "zorder": 3}
                members = [own["seeds"] for own in grid]
                handles[task_name(task)] = _points(axes, places, values, errors, members, most, style, **look)
                for place, own in zip(places, grid):
                    seeds = own["by_seed"][metric]
                    axes.plot([place] * len(seeds), seeds, "_", color=_colour(task), alpha=0.6, markersize=7, zorder=2)
            if number == 0:
                axes.set_title(_panel_title(report, line))
        row[0].set_ylabel(f"{task_name(task)}\n{METRIC_NAMES.get(metric, metric)}")
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=min(6, len(handles)), fontsize=8
    )
    caption = (
        f"Mean over the headline languages ({' '.join(report['headline'])}). Bars and bands: {_intervals(drawn)}, "
        "those of the controls but the baseline at the right edge; dashes: single seeds. Intervals hold what all "
        "conditions share (the same examples and seeds), so they may overlap where the paired difference is clear: see "
        f"the differences above.{_seeds(drawn)}"
    )
    title = f"Score against {report['axis']['name']}{_of_lines(report, lines)}"
    return Drawing(name, title, caption, figure)


def _draw_controls(axes: Axes, controls: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Lines at the controls' scores, with their intervals; name → what a legend shows."""
    handles = {}
    beside = [own["condition"] for own in controls if own["condition"] not in BASELINES]
    for control in controls:
        name, entry = control["condition"], control["scores"][metric][HEADLINE]
        colour = CONTROL_COLOURS.get(name, INK)
        # One band across the panel; four would cover each other.
        if name in BASELINES or len(controls) == 1:
            axes.axhspan(*entry["interval"], color=colour, alpha=0.1, linewidth=0)
        else:
            left = 1 - 0.012 * (len(beside) - beside.index(name))
            axes.axhspan(*entry["interval"], left, left + 0.008, color=colour, alpha=0.7, linewidth=0)
        style = CONTROL_LINES.get(name, "-")
        handles[control_name(name)] = axes.axhline(entry["value"], color=colour, linestyle=style, linewidth=1.2)
    return handles


def _of_lines(report: dict[str, Any], lines: list[str]) -> str:
    """Which lines a figure is of, where it is not of all."""
    return "" if len(lines) == len(report["lines"]) else f": {', '.join(lines)}"


def _groups(report: dict[str, Any]) -> Iterator[Drawing]:
    """English and German against the other languages: differences to the baseline."""
    lines = [line for line in report["lines"] if _with_difference(report, line)]
    tasks = [task for task, own in report["tasks"].items() if {ENF, NOENF} <= own["groups"].keys()]
    if not lines or not tasks:
        return
    for name, part in _parts("groups", lines):
        yield _draw_groups(report, name, part, tasks)


def _draw_groups(report: dict[str, Any], name: str, lines: list[str], tasks: list[str]) -> Drawing:
    figure = Figure(figsize=(max(7.0, 3.8 * len(lines)), 2.4 * len(tasks) + 0.8), layout="constrained")
    panels = figure.subplots(len(tasks), len(lines), sharey=True, squeeze=False)
    shown = [own for task in tasks for line in lines for own in of_line(report, task, line)]
    drawn = [own["difference"]["seeds"] for own in shown if own["difference"]]
    most = max(map(len, drawn))
    for number, (task, row) in enumerate(zip(tasks, panels)):
        for line, axes in zip(lines, row):
            _prepare_axis(axes, report, label=number == len(tasks) - 1)
            grid = [own for own in of_line(report, task, line) if own["difference"]]
            places = _positions(report, [own["level"] for own in grid])
            step = _step(places)
            for group, shift, style, face in ((ENF, -0.04, "o-", _colour(task)), (NOENF, 0.04, "s--", PAPER)):
                style = style.rstrip("-") if report["axis"]["kind"] == "categorical" else style
                label = f"{task_name(task)} {group}"
                look = {"markerfacecolor": face, "label": label}
                _error_bars(axes, places + shift * step, grid, task, most, style, group, **look)
            axes.axhline(0, color=INK, linewidth=0.9)
            if number == 0:
                axes.set_title(_panel_title(report, line))
        row[0].set_ylabel(f"{task_name(task)}\ndifference, points")
        row[0].legend(loc="best", fontsize=8, ncols=2)
    members = {group: " ".join(report["tasks"][tasks[0]]["groups"][group]) for group in (ENF, NOENF)}
    caption = (
        f"Difference to {_baseline(report)}: {ENF} ({members[ENF]}) and {NOENF} ({members[NOENF]}), "
        f"{_intervals(drawn)}. Both share seeds and clusters: whether they differ is in the table of differences."
        f"{_seeds(drawn)}"
    )
    title = f"English and German against the other languages{_of_lines(report, lines)}"
    return Drawing(name, title, caption, figure)


def _heat_maps(report: dict[str, Any]) -> Iterator[Drawing]:
    """Language x level: differences to the baseline, a figure for each line, a panel for each task."""
    for number, line in enumerate(report["lines"]):
        tasks = [task for task in report["tasks"] if any(own["difference"] for own in of_line(report, task, line))]
        if not tasks:
            continue
        columns = {task: _heat_columns(report, task, line) for task in tasks}
        rows = {task: _heat_rows(report, task) for task in tasks}
        tallest = max(len(own) for own in rows.values())
        widths = [len(own) + 1.5 for own in columns.values()]
        figure = Figure(figsize=(max(7.0, 0.55 * sum(widths) + 1.2), 0.27 * tallest + 1.9), layout="constrained")
        panels = figure.subplots(1, len(tasks), squeeze=False, width_ratios=widths)[0]
        entries = {
            task: [
                [own["difference"]["scores"][report["tasks"][task]["metrics"][0]][row] for own in columns[task]]
                for row in rows[task]
            ]
            for task in tasks
        }
        largest = max(abs(each["value"]) for own in entries.values() for row in own for each in row) or 1.0
        image = None
        for task, axes in zip(tasks, panels):
            image = _heat_map(axes, report, task, columns[task], rows[task], entries[task], largest)
            axes.set_ylim(tallest - 0.5, -0.5)
        bar = figure.colorbar(image, ax=list(panels), shrink=0.8, pad=0.02)
        bar.set_label(f"difference to {_baseline(report)}, points")
        bar.outline.set_visible(False)
        caption = (
            "Rows above the line are the headline languages, which every task scored; those below only this task did. "
            "Bold: the 95 % interval (clusters x seeds, one language at a time, not adjusted for their number) "
            "leaves 0 out; never with a single seed."
        )
        title = f"Difference to {_baseline(report)} by language{_of_lines(report, [line])}"
        yield Drawing(f"languages_{number + 1}" if len(report["lines"]) > 1 else "languages", title, caption, figure)


def _heat_columns(report: dict[str, Any], task: str, line: str) -> list[dict[str, Any]]:
    grid = [own for own in of_line(report, task, line) if own["difference"]]
    controls = {own["condition"]: own for own in of_line(report, task, line, CONTROL) if own["difference"]}
    names = [name for name in _control_order(report, line) if name in controls]
    left = [controls[name] for name in names if name in LEFT_CONTROLS]
    return [*left, *grid, *(controls[name] for name in names if name not in LEFT_CONTROLS)]


def _heat_rows(report: dict[str, Any], task: str) -> list[str]:
    """Headline languages, then the others."""
    headline = report["headline"]
    return [*headline, *(code for code in report["tasks"][task]["languages"] if code not in headline)]


def _heat_map(
    axes: Axes,
    report: dict[str, Any],
    task: str,
    columns: list[dict[str, Any]],
    rows: list[str],
    entries: list[list[dict[str, Any]]],
    largest: float,
) -> Any:
    several = [len(own["difference"]["seeds"]) > 1 for own in columns]
    values = np.array([[each["value"] for each in row] for row in entries])
    # Blue is better. The colour map of a heat map is the same in light and dark mode, and so is the ink on it.
    norm = TwoSlopeNorm(0.0, -largest, largest)
    image = axes.imshow(values, cmap="RdBu", norm=norm, aspect="auto", interpolation="nearest")
    for y, row in enumerate(entries):
        for x, each in enumerate(row):
            shown = several[x] and leaves_zero_out(each["interval"])
            colour = "#f0f0f0" if abs(each["value"]) > 0.65 * largest else "#101010"
            text = f"{each['value']:+.1f}".replace("-", "\N{MINUS SIGN}")
            axes.text(
                x, y, text, ha="center", va="center", color=colour, fontsize=7.5, weight="bold" if shown else None
            )
    names = [
        _level_label(report["axis"], own["condition"])
        if own["kind"] == GRID
        else control_name(own["condition"]).replace(" ", "\n", 1)
        for own in columns
    ]
    axes.set_xticks(range(len(columns)), names, fontsize=7.5)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    for number, (own, following) in enumerate(zip(columns, columns[1:])):
        if own["kind"] != following["kind"]:
            axes.axvline(number + 0.5, color=PAPER, linewidth=4)
    headline = sum(row in report["headline"] for row in rows)
    if headline < len(rows):
        axes.axhline(headline - 0.5, color=INK, linewidth=1.2)
    axes.spines[:].set_visible(False)
    metric = report["tasks"][task]["metrics"][0]
    axes.set_title(f"{task_name(task)}, {METRIC_NAMES.get(metric, metric)}", color=_colour(task))
    axes.set_xlabel(_axis_label({**report["axis"], "kind": None}))
    return image


def _curves(report: dict[str, Any]) -> Iterator[Drawing]:
    """Task and OT loss by step, a figure for each line, colours by level."""
    for number, line in enumerate(report["lines"]):
        tasks = [task for task in report["tasks"] if of_line(report, task, line)]
        kinds = [("task_loss", "task loss"), ("ot_loss", "OT loss")]
        drawn = {task: _with_controls(report, task, line) for task in tasks}
        if not any(value is not None for own in drawn.values() for each in own for value in each["curves"]["ot_loss"]):
            kinds = kinds[:1]
        if not any(each["curves"]["step"] for own in drawn.values() for each in own):
            continue
        figure = Figure(figsize=(max(7.0, 3.6 * len(tasks)), 2.3 * len(kinds) + 0.9), layout="constrained")
        panels = figure.subplots(len(kinds), len(tasks), sharex="col", squeeze=False)
        levels = len(report["axis"]["levels"])
        colours = matplotlib.colormaps["viridis"](np.linspace(0.3, 0.9, levels))
        handles: dict[str, Any] = {}
        for column, task in enumerate(tasks):
            for own in drawn[task]:
                grid = own["kind"] == GRID
                colour = colours[own["level"]] if grid else CONTROL_COLOURS.get(own["condition"], INK)
                style = "-" if grid else CONTROL_LINES.get(own["condition"], "--")
                for axes, (key, _) in zip(panels[:, column], kinds):
                    values = [np.nan if value is None else value for value in own["curves"][key]]
                    if not np.isnan(values).all():
                        (drawn_line,) = axes.plot(own["curves"]["step"], values, style, color=colour, linewidth=1.2)
                        handles[condition_name(report, own)] = drawn_line
            panels[0, column].set_title(task_name(task), color=_colour(task))
            panels[-1, column].set_xlabel("step")
        for row, (_, label) in zip(panels, kinds):
            row[0].set_ylabel(label)
            for axes in row:
                axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=min(4, len(handles)), fontsize=8
        )
        several = len(report["lines"]) > 1
        title = f"Losses during training{_of_lines(report, [line])}"
        caption = "Means over seeds at the logged steps; the OT loss is before its weight."
        yield Drawing(f"curves_{number + 1}" if several else "curves", title, caption, figure)
