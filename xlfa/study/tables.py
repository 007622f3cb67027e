"""The tables of a study's report, from the content of `report.json`: shown on the page, and complete as CSV."""

import csv
import io
from dataclasses import dataclass
from typing import Any

from xlfa.study.conclusions import format_p
from xlfa.study.resampling import ALL, ENF, HEADLINE, NOENF, TARGETS

# Of `Cell.transport` and beside it: heading → (key, format).
TRANSPORT = {
    "plan perplexity": ("plan_perplexity", ".2f"),
    "marginal error": ("marginal_error", ".1e"),
    "iterations": ("iterations", ".1f"),
    "not converged": ("not_converged", ".2%"),
    "absolute epsilon": ("epsilon", ".3g"),
    "OT weight": ("ot_weight", ".3g"),
}
GROUPS = (HEADLINE, TARGETS, ENF, NOENF, ALL)


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: its heading.
        format: of its numbers on the page, as for `format`, or `p`; empty for text.
    """

    name: str
    format: str = ""

    def show(self, value: Any) -> str:
        """A value as the page has it."""
        if value is None:
            return "–"
        if self.format == "p":
            return format_p(value).removeprefix("p ").removeprefix("= ")
        return format(value, self.format).replace("-", "\N{MINUS SIGN}") if self.format else str(value)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: of its file, without an ending.
        title, caption: above it.
        columns: named.
        rows: values in the order of the columns; None where there is none.
        on_page: whether the page shows it, or only its file has it.
    """

    name: str
    title: str
    caption: str
    columns: list[Column]
    rows: list[list[Any]]
    on_page: bool = True

    def csv(self) -> str:
        """Every number in full; empty where there is none."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([column.name for column in self.columns])
        writer.writerows(self.rows)
        return buffer.getvalue()


def make_tables(report: dict[str, Any]) -> list[Table]:
    """All that the report has data for."""
    tables = [
        tests_table(report),
        differences_table(report),
        effects_table(report),
        scores_table(report),
        selection_table(report),
        transport_table(report),
        retrieval_table(report),
        languages_table(report),
    ]
    return [table for table in tables if table.rows]


def tests_table(report: dict[str, Any]) -> Table:
    """The primary test (interaction) and each task's dependence on the axis."""
    columns = [
        *(Column(name) for name in ("test", "line", "unit", "reference")),
        *(Column("seeds", "d"), Column("observations", "d"), Column("slope", "+.3f"), Column("low", "+.3f")),
        *(Column("high", "+.3f"), Column("p", "p"), Column("p over seeds", "p"), Column("detectable slope", ".3f")),
        *(Column("omega²", ".3f"), Column("its p", "p"), Column("null mean", ".3f"), Column("null 95 %", ".3f")),
        *(Column("permutations", "d"), Column("levels")),
    ]
    entries = [(f"{entry['tasks'][1]} − {entry['tasks'][0]}", entry) for entry in report["interactions"]]
    entries += [(entry["task"], entry) for entry in report["trends"]]
    names = ("omega_squared", "omega_squared_p", "null_mean", "null_high", "arrangements")
    rows = []
    for name, entry in entries:
        test = entry["test"] or {}
        low, high = entry["interval"] or (None, None)
        about = [name, entry["line"], entry["unit"], entry["reference"], len(entry["seeds"]), entry["observations"]]
        slope = [test.get("slope"), low, high, test.get("slope_p"), entry["slopes_p"], entry["detectable"]]
        rows.append([*about, *slope, *(test.get(key) for key in names), ", ".join(entry["levels"])])
    axis = report["axis"]
    unit = f" Slopes are per {axis['unit']}." if axis is not None and axis["values"] is not None else ""
    caption = (
        "Rows with two tasks are the interaction of the task with the field: of the first line and in points it is the "
        "primary test, others are secondary. The other rows are each task's own dependence on the field. None is "
        f"adjusted.{unit} p: by permuting levels within seeds; p over seeds: Student's t of the seeds' own slopes, by "
        "which a slope is detectable with probability 0.8. The deviation over seeds that is a unit is that of the "
        "differences to the reference, and is taken as known."
    )
    return Table("tests", "Primary test and dependence by task", caption, columns, rows)


def differences_table(report: dict[str, Any]) -> Table:
    """Every condition against the baseline, on the headline."""
    columns = [
        *(Column(name) for name in ("task", "line", "condition", "baseline", "metric")),
        *(Column("seeds", "d"), Column("difference", "+.2f"), Column("low", "+.2f"), Column("high", "+.2f")),
        *(Column("seed deviation", ".2f"), Column("p", "p"), Column("p (Holm)", "p"), Column("detectable", ".2f")),
        *(Column("detectable (Holm)", ".2f"), Column(ENF, "+.2f"), Column(NOENF, "+.2f")),
        *(Column(f"{ENF} − {NOENF}", "+.2f"), Column("its low", "+.2f"), Column("its high", "+.2f")),
        Column("its p (Holm)", "p"),
    ]
    rows = []
    for own in report["conditions"]:
        difference = own["difference"]
        if difference is None:
            continue
        for number, (metric, scores) in enumerate(difference["scores"].items()):
            # Only the primary metric is tested.
            names = ("p", "p_holm", "detectable", "detectable_holm")
            tests = [difference[name] if number == 0 else None for name in names]
            groups = [scores.get(group, {}).get("value") for group in (ENF, NOENF)]
            about = [own["task"], own["line"], own["condition"], difference["baseline"], metric]
            contrast = [None] * 4
            if number == 0 and difference["contrast"] is not None:
                found = difference["contrast"]
                contrast = [found["value"], *found["interval"], found["p_holm"]]
            rows.append([*about, len(difference["seeds"]), *_four(scores[HEADLINE]), *tests, *groups, *contrast])
    caption = (
        "Points, means over the headline languages, paired by seed. p: Student's t over seeds; Holm: adjusted for the "
        "levels, or the controls, of a task and line; detectable: with probability 0.8 at p < 0.05, and at the "
        f"strictest of Holm's steps. {ENF} − {NOENF}: what English and German gain more, or lose less, than the others."
    )
    return Table("differences", "Differences to the baseline", caption, columns, rows)


def effects_table(report: dict[str, Any]) -> Table:
    """Values of fields beside the axis, and arms, against each other."""
    columns = [
        *(Column(name) for name in ("task", "arm", "field", "difference of", "at")),
        *(Column("other settings", "d"), Column("seeds", "d"), Column("difference", "+.2f"), Column("low", "+.2f")),
        *(Column("high", "+.2f"), Column("seed deviation", ".2f"), Column("p", "p"), Column("p (Holm)", "p")),
        *(Column("detectable", ".2f"), Column(ENF, "+.2f"), Column(NOENF, "+.2f")),
    ]
    rows = []
    for own in report["effects"]:
        scores = own["scores"][report["tasks"][own["task"]]["metrics"][0]]
        about = [own["task"], own["arm"], own["field"], f"{own['second']} − {own['first']}", own["at"], own["pairs"]]
        tests = [own["p"], own["p_holm"], own["detectable"]]
        groups = [scores.get(group, {}).get("value") for group in (ENF, NOENF)]
        rows.append([*about, len(own["seeds"]), *_four(scores[HEADLINE]), *tests, *groups])
    caption = (
        "Points, means over the headline languages, paired by seed; first means over the other settings of the grid "
        "that both values have, then at each of these. p: Student's t over seeds; Holm: adjusted for the rows of a "
        "task, arm and field, means and single ones apart; detectable: with probability 0.8 at p < 0.05."
    )
    return Table("effects", "Values of a field against each other", caption, columns, rows)


def scores_table(report: dict[str, Any]) -> Table:
    """Scores of every condition."""
    columns = [
        *(Column(name) for name in ("task", "line", "condition", "metric")),
        *(Column("seeds", "d"), Column(HEADLINE, ".2f"), Column("low", ".2f"), Column("high", ".2f")),
        *(Column("seed deviation", ".2f"), *(Column(group, ".2f") for group in GROUPS[1:])),
        Column("English validation", ".2f"),
    ]
    rows = []
    for own in report["conditions"]:
        for number, (metric, scores) in enumerate(own["scores"].items()):
            groups = [scores.get(group, {}).get("value") for group in GROUPS[1:]]
            about = [own["task"], own["line"], own["condition"], metric, len(own["seeds"])]
            validation = own["validation"] if number == 0 else None
            rows.append([*about, *_four(scores[HEADLINE]), *groups, validation])
    caption = (
        f"{HEADLINE}: {' '.join(report['headline'])}; {TARGETS}: these without English; {ENF}: English and German; "
        f"{NOENF}: the others of the headline; {ALL}: all that the task scored."
    )
    return Table("scores", "Scores", caption, columns, rows)


def _four(entry: dict[str, Any]) -> list[float | None]:
    """Value, ends of the interval, deviation over seeds."""
    return [entry["value"], *entry["interval"], entry["deviation"]]


def selection_table(report: dict[str, Any]) -> Table:
    """What choosing by English validation costs."""
    columns = [
        *(Column(name) for name in ("task", "line")),
        *(Column("seeds", "d"), Column("chosen by English"), Column("best in the target languages")),
        *(Column("cost", ".2f"), Column("low", "+.2f"), Column("high", "+.2f"), Column("cost, held-out seeds", "+.2f")),
        Column("levels with fewer seeds, left out"),
    ]
    rows = [
        [
            *(own["task"], own["line"], len(own["seeds"]), own["chosen_by_english"], own["best_by_targets"]),
            *(own["cost"], *own["interval"], own["held_out_cost"], ", ".join(own["left_out"]) or None),
        ]
        for own in report["selection"]
    ]
    caption = (
        "Points in the target languages that are lost by choosing the level on English validation. The cost cannot be "
        "below 0, for the best is chosen on the scores that are compared; with both choices made on other seeds it can."
    )
    return Table("selection", "Choosing by English validation", caption, columns, rows)


def transport_table(report: dict[str, Any]) -> Table:
    """Diagnostics of the transport term."""
    columns = [
        *(Column(name) for name in ("task", "line", "condition")),
        Column("seeds", "d"),
        *(Column(name, spec) for name, (_, spec) in TRANSPORT.items()),
        *(Column("gradient ratio, first step", ".3f"), Column("gradient ratio", ".3f")),
        *(Column("Tatoeba before", ".1f"), Column("Tatoeba after", ".1f"), Column("Tatoeba after, fused", ".1f")),
    ]
    rows = []
    for own in report["conditions"]:
        transport, retrieval = own["transport"] or {}, own["retrieval"] or {}
        if transport or retrieval:
            diagnostics = [transport.get(key) for key, _ in TRANSPORT.values()]
            tatoeba = [retrieval.get(when, {}).get("mean") for when in ("before", "after", "after_fused")]
            about = [own["task"], own["line"], own["condition"], len(own["seeds"])]
            ratios = [own["gradient_ratio"][name] for name in ("first", "late")]
            rows.append([*about, *diagnostics, *ratios, *tatoeba])
    caption = (
        "Means over seeds and the last quarter of training; gradient ratio: norm of the weighted OT term's gradient "
        "over the task's, and the same at the first step alone; Tatoeba: P@1 in per cent, both directions, last layer "
        "(fused: the states that heads with fusion see), mean over languages."
    )
    return Table("transport", "Transport and retrieval", caption, columns, rows)


def retrieval_table(report: dict[str, Any]) -> Table:
    """Tatoeba by language; a file alone."""
    rows = [
        [own["task"], own["line"], own["condition"], when, language, value]
        for own in report["conditions"]
        for when, measured in (own["retrieval"] or {}).items()
        for language, value in measured["languages"].items()
    ]
    columns = [Column(name) for name in ("task", "line", "condition", "when", "language")] + [Column("P@1", ".1f")]
    return Table("retrieval", "Tatoeba by language", "", columns, rows, on_page=False)


def languages_table(report: dict[str, Any]) -> Table:
    """Every language's scores and differences; a file alone."""
    columns = [
        *(Column(name) for name in ("task", "line", "condition", "metric", "language")),
        *(Column(name, ".2f") for name in ("score", "low", "high", "seed deviation")),
        *(Column(name, "+.2f") for name in ("difference", "difference low", "difference high")),
    ]
    rows = []
    for own in report["conditions"]:
        for metric, scores in own["scores"].items():
            for language in report["tasks"][own["task"]]["languages"]:
                difference: list[float | None] = [None] * 3
                if own["difference"] is not None:
                    difference = _four(own["difference"]["scores"][metric][language])[:3]
                about = [own["task"], own["line"], own["condition"], metric, language]
                rows.append([*about, *_four(scores[language]), *difference])
    return Table("languages", "Scores by language", "", columns, rows, on_page=False)
