"""The tab that compares two scored runs by language."""

import functools
from pathlib import Path
from typing import Any

import gradio as gr
from matplotlib.figure import Figure

from xlfa.app.elements import facts, message, picture
from xlfa.comparison import compare_runs, read_scores
from xlfa.errors import XLFAError
from xlfa.scores import SCORES_FILE, describe_examples
from xlfa.tasks import get_task

HEADERS = ["", "A", "B", "B − A", "95 % interval", "p", "p adjusted"]
CERTAIN, UNCERTAIN, INK = "#1b4f72", "#a9bfcf", "#1f2328"

# Picture or message, facts, table.
View = tuple[str, str, list[list[str]]]


def find_runs(folder: Path) -> dict[str, Path]:
    """The scored runs below a folder: name → folder that holds `scores.json`."""
    found = {}
    for file in sorted(folder.rglob(SCORES_FILE)):
        scores = file.parent
        model = scores.parent.parent
        # Not where the folder itself is a model's `scores`.
        is_of_model = scores.parent.name == "scores" and model.is_relative_to(folder)
        name = (model if is_of_model else scores).relative_to(folder).as_posix()
        found[f"{name} ({scores.name})" if is_of_model else name] = scores
    return found


def show_comparison(folder: Path, a: str | None, b: str | None) -> View:
    """Differences of two of the runs of `find_runs`: picture, facts and table; or a message and nothing else."""
    try:
        comparison = compare(folder, a, b)
    except XLFAError as error:
        # Visitors see neither where the folder lies nor flags that they cannot give.
        return message(str(error).replace(f"{folder}/", "").replace("--compare ", "")), "", []
    description = f"Differences of {comparison['primary_metric']} by language, B minus A, as in the table"
    return picture(draw_differences(comparison), description), facts(describe(comparison)), table_rows(comparison)


def compare(folder: Path, a: str | None, b: str | None) -> dict[str, Any]:
    """`compare_runs` of two runs by their names in `find_runs`; nothing but these can be read.

    Raises:
        XLFAError: for another name, and for runs that cannot be compared.
    """
    runs = find_runs(folder)
    for side, name in (("A", a), ("B", b)):
        if name not in runs:
            raise XLFAError(f"run {side}: choose one of the {len(runs)} scored runs, not {name!r}")
    try:
        task = get_task(read_scores(runs[a] / SCORES_FILE)["task"])
        comparison = compare_runs(task, runs[a], runs[b])
    except XLFAError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, OSError) as error:
        # The page outlives a file that was cut or written by hand.
        raise XLFAError(f"the scores of {a} or {b} are damaged ({error!r}): score the run again") from None
    return {**comparison, "a": a, "b": b}


def describe(comparison: dict[str, Any]) -> dict[str, str]:
    """Names and values of what is compared."""
    settings = comparison["bootstrap"]
    return {
        "A": comparison["a"],
        "B": comparison["b"],
        "score": f"{comparison['task']}, {comparison['primary_metric']}, {describe_examples(comparison)}",
        "interval and p": f"paired bootstrap over clusters of examples, {settings['draws']} draws; p adjusted for "
        f"{len(comparison['languages'])} languages (Benjamini-Hochberg)",
    }


def table_rows(comparison: dict[str, Any]) -> list[list[str]]:
    """The rows of the table of differences, as `HEADERS`: languages, means and families that were scored."""
    metric, rows = comparison["primary_metric"], []
    for name, cells in comparison["differences"].items():
        cell = cells[metric]
        if cell["difference"] is None:
            continue
        interval = "" if cell["interval"] is None else "[{:+.2f}, {:+.2f}]".format(*cell["interval"])
        p_values = ("" if cell.get(key) is None else f"{cell[key]:.4f}" for key in ("p", "p_adjusted"))
        rows.append(
            [name, f"{cell['a']:.2f}", f"{cell['b']:.2f}", f"{cell['difference']:+.2f}", interval, *p_values],
        )
    return rows


def draw_differences(comparison: dict[str, Any]) -> Figure:
    """A bar for each language, best first, with its interval; pale where the interval holds 0."""
    metric = comparison["primary_metric"]
    cells = {language: comparison["differences"][language][metric] for language in comparison["languages"]}
    cells = {language: cell for language, cell in cells.items() if cell["difference"] is not None}
    ordered = sorted(cells, key=lambda language: -cells[language]["difference"])
    figure = Figure(figsize=(max(5.0, 0.5 * len(ordered) + 1), 3.4), layout="constrained")
    axes = figure.subplots()
    for place, language in enumerate(ordered):
        difference, interval = cells[language]["difference"], cells[language]["interval"]
        is_certain = interval is not None and not interval[0] <= 0 <= interval[1]
        axes.bar(place, difference, color=CERTAIN if is_certain else UNCERTAIN, width=0.7)
        if interval is not None:
            axes.vlines(place, *interval, color=INK, linewidth=1)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(ordered)), ordered)
    axes.set_ylabel(f"{metric}, B − A")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{comparison['task']}: pale bars have an interval with 0 in it", size=10, loc="left")
    return figure


def build_comparison_tab(page: gr.Blocks, folder: Path) -> None:
    """The tab's fields, and what happens when two runs are chosen."""
    gr.Markdown(
        f"Runs below the folder `{folder.resolve().name}` that were scored (`xlfa eval --model RUN --task TASK`). A "
        "and B must have been scored on the same examples of the same task."
    )
    names = list(find_runs(folder))
    with gr.Row():
        a = gr.Dropdown(names, label="Run A", elem_id="run-a")
        b = gr.Dropdown(names, label="Run B", elem_id="run-b")
        button = gr.Button("Compare", variant="primary", elem_id="compare", scale=0, min_width=110)
    drawn = gr.HTML(elem_id="differences")
    found = gr.HTML(elem_id="differences-facts")
    table = gr.Dataframe(headers=HEADERS, interactive=False, label="By language", elem_id="differences-table")

    def offer() -> tuple[gr.Dropdown, gr.Dropdown]:
        """The runs that there are now."""
        names = list(find_runs(folder))
        first, second = (names[place] if place < len(names) else None for place in (0, 1))
        return gr.Dropdown(names, value=first), gr.Dropdown(names, value=second)

    page.load(offer, outputs=[a, b], api_visibility="private")
    button.click(
        functools.partial(show_comparison, folder),
        inputs=[a, b],
        outputs=[drawn, found, table],
        show_progress="minimal",
        concurrency_limit=1,
        concurrency_id="computing",
        api_name="compare",
    )
