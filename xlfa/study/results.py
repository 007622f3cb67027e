"""What a study found: every `result.json` of its folder, checked, and what is still missing."""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlfa.errors import XLFAError
from xlfa.statistics import Counts
from xlfa.study.sums import DIGEST, read_sums
from xlfa.tasks import get_task

if TYPE_CHECKING:
    from xlfa.study.grid import PlannedCell

RESULT_FILE = "result.json"
FAILED_FILE = "failed.json"
CELLS_FOLDER = "cells"
# Version 1 kept the predictions.
SCHEMA_VERSION = 2
CONTROL_ROLE = "control:"
# Between an arm and a role, where a cell has that role in another arm than its own.
OF_ARM = "/"
MAIN_ARM = "main"
# The part of training that means over its log are of.
LAST_PART = 0.25
# What cells of a task must share to be compared, of `scores.json`.
SAME_EXAMPLES = ("dataset", "splits", DIGEST)
# Values of a condition's label, between fields.
SEPARATOR = " · "

# A value of a grid's field.
Value = str | int | float | bool | None


@dataclass(frozen=True)
class Cell:
    """A finished cell: its `result.json`, of which the fields have the names.

    Attributes:
        folder: of the cell.
        id, study, task, arm, seed: which one it is.
        point: the grid's fields; None of a control.
        control: the name of a control that is no grid point.
        roles: `grid`, and `control:NAME` for each control that has the same settings; as written, also
            `ARM/control:NAME` for controls of other arms, for which `read_study` makes cells of their own.
        settings: of `train` and `score`, without local paths.
        validation: English validation scores, by `eval_<metric>`.
        scores: the content of `scores.json`, with a digest of its examples; `sums.json` lies beside.
        retrieval: P@1 in per cent `before` and `after` training (`after_fused`: of the fused states), by language; None
            where it was not measured.
        transport: means over the last quarter of training; None without a transport term.
        curves: lists of equal length: `step`, `task_loss`, `ot_loss`, `plan_entropy`.
        gradient_ratio: `step`, `ratio` (of the weighted OT term's to the task's gradient norm); None without.
        seconds: by stage.
        threads, machine, versions, commit, finished: where and when.
    """

    folder: Path
    id: str
    study: str
    task: str
    arm: str
    seed: int
    point: dict[str, Value] | None
    control: str | None
    roles: list[str]
    settings: dict[str, dict[str, Any]]
    validation: dict[str, float]
    scores: dict[str, Any]
    retrieval: dict[str, dict[str, float]] | None
    transport: dict[str, float | None] | None
    curves: dict[str, list[float | None]]
    gradient_ratio: dict[str, list[float]] | None
    seconds: dict[str, float]
    threads: int
    machine: str
    versions: dict[str, str]
    commit: str | None
    finished: str

    @property
    def languages(self) -> list[str]:
        """ISO 639-1 codes of what was scored."""
        return list(self.scores["languages"])

    @property
    def controls(self) -> list[str]:
        """The controls that it stands for."""
        others = [role.removeprefix(CONTROL_ROLE) for role in self.roles if role.startswith(CONTROL_ROLE)]
        return list(dict.fromkeys([*([self.control] if self.control is not None else []), *others]))

    def read_sums(self) -> Counts:
        """Contributions to the scores, summed by cluster.

        Raises:
            XLFAError: if they are not there, or are of other languages than `scores`.
        """
        found = read_sums(self.folder)
        if list(found) != self.languages:
            raise XLFAError(
                f"{self.folder} has sums of {' '.join(found)} and scores of {' '.join(self.languages)}: remove it and "
                "run the study again"
            )
        return found


@dataclass(frozen=True)
class Study:
    """The finished cells of a study, and what is missing.

    Attributes:
        folder: of the study.
        name: as the study's file has it.
        cells: finished, by task, arm and seed; one that is a control of several arms is there for each of them.
        unfinished: cells that were begun and have no result → what they failed with; empty where nothing is recorded.
        planned: all cells, in the order in which they are run; None where the plan is not known.
    """

    folder: Path
    name: str
    cells: list[Cell]
    unfinished: dict[str, str]
    planned: "Sequence[PlannedCell] | None" = None

    @cached_property
    def tasks(self) -> list[str]:
        """Names, in alphabetical order."""
        return sorted({cell.task for cell in self.cells})

    @cached_property
    def arms(self) -> list[str]:
        """Names: in the order of the plan, without one `main` first."""
        there = {cell.arm for cell in self.cells}
        if self.planned is not None:
            return [arm for arm in dict.fromkeys(cell.arm for cell in self.planned) if arm in there]
        return sorted(there, key=lambda arm: (arm != MAIN_ARM, arm))

    @cached_property
    def fields(self) -> dict[str, list[Value]]:
        """The grid's fields that vary, or all where none does, and their values in order."""
        values: dict[str, list[Value]] = {}
        for cell in self.cells:
            for name, value in (cell.point or {}).items():
                values.setdefault(name, []).append(value)
        values = {name: in_order(own) for name, own in values.items()}
        varied = {name: own for name, own in values.items() if len(own) > 1}
        return varied or values

    @cached_property
    def headline(self) -> list[str]:
        """The languages that every task scored: means over them are comparable between tasks."""
        scored = [set(cell.languages) for cell in self.cells]
        return sorted(set.intersection(*scored)) if scored else []

    def missing(self) -> list[str]:
        """Planned cells that were not begun; without a plan, what the grid lacks to be complete.

        Then every task, arm, condition and seed that occurs is taken to go with every other one; conditions without a
        single cell are not known.
        """
        if self.planned is not None:
            there = {cell.id for cell in self.cells} | self.unfinished.keys()
            return [cell.id for cell in self.planned if cell.id not in there]
        there = {
            (cell.task, cell.arm, condition, cell.seed) for cell in self.cells for condition in self.conditions(cell)
        }
        wanted = set(itertools.product(*(dict.fromkeys(column) for column in zip(*there))))
        return [" ".join([task, arm, name, f"seed {seed}"]) for task, arm, name, seed in sorted(wanted - there)]

    def conditions(self, cell: Cell) -> list[str]:
        """Names of what a cell stands for: its grid point, the controls, or both."""
        point = [] if cell.point is None else [describe_point(cell.point, self.fields)]
        return [*point, *cell.controls]


def describe_value(value: Value) -> str:
    """A value as in a study file."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_point(point: dict[str, Value], fields: Iterable[str]) -> str:
    """A grid point in words: `ot_epsilon 0.1`."""
    return SEPARATOR.join(f"{name} {describe_value(point.get(name))}" for name in fields)


def as_number(value: Value) -> float | None:
    """A number, also one that a flag keeps as text, such as `fusion_layer`; None of anything else."""
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def in_order(values: Iterable[Value]) -> list[Value]:
    """The distinct values: numbers by size, then others as they come."""
    numbers = {value: as_number(value) for value in values}
    return sorted(numbers, key=lambda value: (numbers[value] is None, numbers[value] or 0.0))


def read_study(folder: Path, planned: "Sequence[PlannedCell] | None" = None) -> Study:
    """A study's finished cells.

    Args:
        folder: of the study.
        planned: its cells; others in the folder are left out, and what a cell stands for (its point of the grid, the
            controls) is what the plan says now: a part may have been added to the grid since. By default all that are
            there, as their results have it.

    Raises:
        XLFAError: for a folder without any, for a result that cannot be read, and where cells that are to be compared
            were scored on different examples.
    """
    cells_folder = folder / CELLS_FOLDER
    if not cells_folder.is_dir():
        raise XLFAError(f"{folder} is no study's folder (it has no {CELLS_FOLDER}/): name the output_dir of the study")
    folders = sorted(path for path in cells_folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    by_id = None if planned is None else {cell.id: cell for cell in planned}
    if by_id is not None:
        folders = [path for path in folders if path.name in by_id]
    finished = [path for path in folders if (path / RESULT_FILE).is_file()]
    if not finished:
        raise XLFAError(f"{folder} has no finished cell yet ({len(folders)} begun): `xlfa study run` makes them")
    cells = [read_cell(path) for path in finished]
    if by_id is not None:
        cells = [_as_planned(cell, by_id[cell.id]) for cell in cells]
    # An arm of which nothing was run yet is none.
    arms = {cell.arm for cell in cells}
    cells = [each for cell in cells for each in _by_arm(cell) if each.arm in arms]
    cells.sort(key=lambda cell: (cell.task, cell.arm, cell.seed, cell.id))
    names = {cell.study: cell for cell in cells}
    if len(names) > 1:
        places = ", ".join(f"{name!r} ({cell.id})" for name, cell in names.items())
        raise XLFAError(f"{folder} has cells of several studies: {places}: each needs an output_dir of its own")
    check_same_examples(cells)
    unfinished = {path.name: read_failure(path) for path in folders if path not in finished}
    study = Study(folder, cells[0].study, cells, unfinished, planned)
    check_unique(study)
    return study


def _as_planned(cell: Cell, planned: "PlannedCell") -> Cell:
    return replace(cell, point=planned.point, control=planned.control, roles=list(planned.roles))


def _by_arm(cell: Cell) -> list[Cell]:
    """The cell in its own arm, and as the control of others that it is."""
    found = [replace(cell, roles=[role for role in cell.roles if OF_ARM not in role])]
    for arm, _, role in (role.partition(OF_ARM) for role in cell.roles if OF_ARM in role):
        found.append(replace(cell, arm=arm, point=None, control=role.removeprefix(CONTROL_ROLE), roles=[role]))
    return found


def read_cell(folder: Path) -> Cell:
    """The result of one cell.

    Raises:
        XLFAError: if it is none, or of another version of the format.
    """
    path = folder / RESULT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise XLFAError(f"{path} has schema_version {version}, not {SCHEMA_VERSION}: remove it, run the cell again")
        cell = Cell(folder, **{field.name: content[field.name] for field in fields(Cell) if field.name != "folder"})
        missing = {"languages", *SAME_EXAMPLES} - cell.scores.keys()
    except OSError as error:
        raise XLFAError(f"cannot read {path}: {error.strerror}") from None
    except KeyError as error:
        raise XLFAError(f"{path} lacks {error.args[0]!r}: remove the cell's folder and run the study again") from None
    except (TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise XLFAError(f"{path} is no result of a cell: {error}") from None
    if missing:
        raise XLFAError(f"{path}: its scores lack {sorted(missing)[0]!r}: remove the cell's folder and run it again")
    get_task(cell.task)
    return cell


def read_failure(folder: Path) -> str:
    """What the cell failed with, in one line; empty for one that is running or was interrupted."""
    path = folder / FAILED_FILE
    if not path.is_file():
        return ""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["error"])
    except (OSError, ValueError, TypeError, KeyError):
        return f"an error that {FAILED_FILE} does not tell"


def check_same_examples(cells: list[Cell]) -> None:
    """Raise `XLFAError` if two cells of a task were scored on different languages or examples."""
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.task, cell)
        differing = [name for name in SAME_EXAMPLES if cell.scores[name] != other.scores[name]]
        if cell.languages != other.languages:
            differing.insert(0, "languages")
        if differing:
            raise XLFAError(
                f"cells {other.id} and {cell.id} in {cell.folder.parent} were scored on different examples "
                f"(their {differing[0]} differ): remove the one that is out of date and run the study again"
            )


def check_unique(study: Study) -> None:
    """Raise `XLFAError` if two cells stand for the same condition and seed."""
    first: dict[tuple[str, str, str, int], Cell] = {}
    for cell in study.cells:
        for condition in study.conditions(cell):
            other = first.setdefault((cell.task, cell.arm, condition, cell.seed), cell)
            if other is not cell:
                raise XLFAError(
                    f"{cell.folder.parent} has two cells for {cell.task} {cell.arm} {condition} seed {cell.seed}: "
                    f"{other.id} and {cell.id}, with different settings: remove the one that is out of date"
                )
