"""What a study compares: the axis of its grid, and conditions, whose cells differ by their seed alone."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from xlfa.study.resampling import TaskScores
from xlfa.study.results import SEPARATOR, Cell, Study, Value, as_number, describe_point, describe_value

# What differences are taken to, and what the primary test takes differences to, as the study's files name them.
BASELINES = ("no_ot", "baseline")
REFERENCES = ("shuffled_pairs", *BASELINES)
GRID, CONTROL = "grid", "control"
# Fields whose values differ by factors: by name, since two values that happen to be finished would not tell.
LOG_FIELDS = (
    *("ot_epsilon", "ot_weight", "ot_tau", "ot_tol", "learning_rate", "parallel_pairs_per_language"),
    *("max_train_examples", "max_steps", "num_train_epochs", "lora_r", "lora_alpha"),
)


@dataclass(frozen=True)
class Axis:
    """The field that scores are drawn against.

    Attributes:
        name: of the field, or of all fields where none is a number.
        kind: `log`, `linear` or `categorical`.
        levels: labels in order.
        values: of the levels; None where categorical.
        rest: the grid's other fields; each combination of them is a line of its own.
    """

    name: str
    kind: str
    levels: list[str]
    values: list[float] | None
    rest: list[str]

    @property
    def places(self) -> np.ndarray:
        """Where the levels stand: by value, log10 of it on a log axis; one beside the other where categorical."""
        if self.values is None:
            return np.arange(len(self.levels), dtype=float)
        return np.log10(self.values) if self.kind == "log" else np.array(self.values, dtype=float)

    @property
    def unit(self) -> str:
        """What a slope is per."""
        return {"log": f"factor of 10 in {self.name}", "linear": f"unit of {self.name}"}.get(self.kind, self.name)

    def level(self, point: dict[str, Value], fields: Iterable[str]) -> int:
        """The number of a grid point's level."""
        label = describe_point(point, fields) if self.values is None else describe_value(point.get(self.name))
        return self.levels.index(label)


@dataclass(frozen=True)
class Condition:
    """Cells that differ by their seed alone.

    Attributes:
        task, arm: of all.
        line: the arm, with the values of the grid's fields beside the axis; of a control the arm alone.
        name: the level, or the control.
        kind: `grid` or `control`.
        level: its number on the axis; None of a control.
        rest: values of the grid's fields beside the axis, as it was trained with them.
        members: seed → position among the cells of the task.
    """

    task: str
    arm: str
    line: str
    name: str
    kind: str
    level: int | None
    rest: tuple[Value, ...]
    members: dict[int, int] = field(default_factory=dict)


def choose_axis(fields: dict[str, list[Value]]) -> Axis | None:
    """`ot_epsilon`, else the first field of numbers, else all fields as one; None for a study without a grid."""
    if not fields:
        return None
    numeric = [name for name, values in fields.items() if all(as_number(value) is not None for value in values)]
    if not numeric:
        labels = [describe_point(dict(zip(fields, values)), fields) for values in itertools.product(*fields.values())]
        return Axis(SEPARATOR.join(fields), "categorical", labels, None, [])
    name = "ot_epsilon" if "ot_epsilon" in numeric else numeric[0]
    values = [as_number(value) for value in fields[name]]
    kind = "log" if name in LOG_FIELDS and min(values) > 0 else "linear"
    return Axis(
        name, kind, [describe_value(value) for value in fields[name]], values, [own for own in fields if own != name]
    )


def group_conditions(study: Study, axis: Axis | None, scores: dict[str, TaskScores]) -> list[Condition]:
    """All conditions, those of the grid first and by line and level, each with its cells."""
    found: dict[tuple, Condition] = {}

    def add(cell: Cell, position: int, line: str, name: str, kind: str, level: int | None) -> None:
        rest = () if axis is None else tuple(cell.settings["train"].get(own) for own in axis.rest)
        key = (cell.task, kind, line, name)
        condition = found.setdefault(key, Condition(cell.task, cell.arm, line, name, kind, level, rest))
        condition.members[cell.seed] = position

    for task in study.tasks:
        for position, cell in enumerate(scores[task].cells):
            if cell.point is not None and axis is not None:
                level = axis.level(cell.point, study.fields)
                rest = [describe_point(cell.point, axis.rest)] if axis.rest else []
                add(cell, position, SEPARATOR.join([cell.arm, *rest]), axis.levels[level], GRID, level)
            for control in cell.controls:
                add(cell, position, cell.arm, control, CONTROL, None)
    lines = order_lines(list(found.values()), study.arms)

    def place(own: Condition) -> tuple:
        line = lines.index(own.line) if own.kind == GRID else study.arms.index(own.arm)
        return study.tasks.index(own.task), own.kind != GRID, line, own.level or 0, own.name

    return sorted(found.values(), key=place)


def order_lines(conditions: Sequence[Condition], arms: Sequence[str]) -> list[str]:
    """The grid's lines: by arm, and in an arm first the one that its controls were trained like, then by value."""
    shared = [(own.arm, own.rest) for own in conditions if own.kind == CONTROL and own.name not in BASELINES]

    def place(own: Condition) -> tuple:
        numbers = [(as_number(value) is None, as_number(value) or 0.0, str(value)) for value in own.rest]
        return arms.index(own.arm), -shared.count((own.arm, own.rest)), numbers

    return list(dict.fromkeys(own.line for own in sorted((own for own in conditions if own.kind == GRID), key=place)))


def controls_of(conditions: Sequence[Condition], like: Condition) -> list[Condition]:
    """The controls that a condition's line may be held against.

    Of the controls of the task and arm these are the baselines, and those that were trained with the line's values of
    the fields beside the axis: a plan's limit at one weight is not the limit at another. Where they are like no line at
    all, every one.
    """
    own = [each for each in conditions if (each.task, each.arm) == (like.task, like.arm)]
    controls = [each for each in own if each.kind == CONTROL]
    lines = {each.rest for each in own if each.kind == GRID}
    if not any(each.rest in lines for each in controls if each.name not in BASELINES):
        return controls
    return [each for each in controls if each.name in BASELINES or each.rest == like.rest]
