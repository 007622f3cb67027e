"""The file of a study (YAML), and its cells: every combination of a grid or a control, arms, tasks and seeds."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from modeling_xlfa import XLFAConfig
from xlfa.arguments import (
    COMMON_TRAINING_FLAGS,
    DataArguments,
    ModelArguments,
    XLFATrainingArguments,
    mapping_flags,
    parse_arguments,
    read_mapping,
)
from xlfa.backbones import naming_model, resolve_encoder
from xlfa.errors import XLFAError
from xlfa.evaluation import EvaluationArguments
from xlfa.retrieval import RetrievalArguments
from xlfa.study.conditions import BASELINES
from xlfa.study.results import CELLS_FOLDER, CONTROL_ROLE, MAIN_ARM, OF_ARM
from xlfa.tasks import TASKS, get_task
from xlfa.training import parse_encoder_config

GRID_ROLE = "grid"
KEYS = (
    *("name", "output_dir", "data_root", "seeds", "train", "score", "tasks", "retrieval", "grid", "controls", "arms"),
    "keep_models",
)
TRAINING_TYPES = (ModelArguments, DataArguments, XLFATrainingArguments)
# Flags that a study sets for each cell, and where its file says what they are to be.
SET_BY_STUDY = {
    "task": "give it as a name under `tasks`",
    "seed": "give them as `seeds`",
    "data_root": "give it once, as `data_root`",
    "output_dir": "give the study's, as `output_dir`",
    "model": "a cell's own model is used",
    "resume_from_checkpoint": "an interrupted cell always goes on from its last checkpoint",
    "push_to_hub": "the models of a study are not published",
    "compare": "`xlfa study report` compares the cells",
}
# Fields without influence on what a cell finds: its id must not depend on them.
WITHOUT_INFLUENCE = (
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("disable_tqdm", "report_to", "run_name", "save_total_limit"),
)
CHECKPOINTING = ("save_strategy", "save_steps")
# Solvers that know no epsilon, and what belongs to it.
LIMITS = ("exact", "product")
OF_EPSILON = ("ot_epsilon", "ot_epsilon_scale", "ot_epsilon_start", "ot_max_iter", "ot_tol")


@dataclass(frozen=True)
class PlannedCell:
    """A training run with its scoring.

    Attributes:
        id: of its settings, and readable at its beginning.
        task, arm, seed: names.
        point: the grid's fields; None of a control.
        control: the control's name; None of a grid point.
        roles: `grid`, and `control:NAME` for each control with the same settings; `ARM/control:NAME` for a control of
            another arm that could find nothing else.
        settings: of `train`, `score` and `retrieval` (None without), without local paths.
    """

    id: str
    task: str
    arm: str
    seed: int
    point: dict[str, Any] | None
    control: str | None
    roles: tuple[str, ...]
    settings: dict[str, dict[str, Any] | None]

    def training_arguments(self, **others: Any) -> tuple[ModelArguments, DataArguments, XLFATrainingArguments]:
        """What `train` takes; `others` are flags that the settings do not hold, or that are to replace theirs."""
        return parse_training(self.settings["train"] | others)

    def evaluation_arguments(self, **others: Any) -> EvaluationArguments:
        """What `evaluate_model` takes."""
        return parse_evaluation({"task": self.task} | self.settings["score"] | others)

    def retrieval_arguments(self, **others: Any) -> RetrievalArguments:
        """What `score_retrieval` takes."""
        return parse_retrieval(self.settings["retrieval"] | others)


@dataclass(frozen=True)
class Plan:
    """All cells of a study.

    Attributes:
        file: what it was read from.
        output_dir: the folder of the study.
        data_root: of all data; None for the Hub.
        keep_models: whether trained weights stay on the disk.
        cells: in the order in which they are run.
    """

    file: Path
    name: str
    output_dir: Path
    data_root: str | None
    keep_models: bool
    cells: tuple[PlannedCell, ...]

    def folder(self, cell: PlannedCell) -> Path:
        """Where the cell's files lie."""
        return self.output_dir / CELLS_FOLDER / cell.id

    @cached_property
    def positions(self) -> dict[str, int]:
        """Cell id → the number that `--cell` takes."""
        return {cell.id: number for number, cell in enumerate(self.cells)}

    def cell(self, number: int) -> PlannedCell:
        """The cell with that number.

        Raises:
            XLFAError: for a number that none has.
        """
        if not 0 <= number < len(self.cells):
            raise XLFAError(f"--cell {number}: {self.file} has {len(self.cells)} cells, 0 to {len(self.cells) - 1}")
        return self.cells[number]


def load_plan(path: Path, data_root: str | None = None, output_dir: str | None = None) -> Plan:
    """The cells of a study's file.

    They come in the order: arms, parts of the grid (the controls belong to the first), seeds, points, tasks. So a study
    that is stopped early has whole seeds of what stands first.

    Args:
        path: of the file.
        data_root: instead of the file's.
        output_dir: instead of the file's.

    Raises:
        XLFAError: for a key or flag that does not exist or is set by the study, or a value that a flag refuses; the
            message names the file and the key.
    """
    reader = _Reader(path, read_mapping(path))
    return Plan(
        file=path,
        name=reader.text("name"),
        # As `TrainingArguments` does.
        output_dir=Path(output_dir or reader.text("output_dir")).expanduser(),
        data_root=data_root or (reader.text("data_root") if "data_root" in reader.content else None),
        keep_models=reader.boolean("keep_models"),
        cells=tuple(reader.cells()),
    )


def check_models(plan: Plan) -> None:
    """Raise `XLFAError` for a model field that is not allowed with the cell's encoder: before anything is run."""
    encoders: dict[str, PretrainedConfig] = {}
    checked = set()
    for cell in plan.cells:
        # Seeds do not matter.
        settings = json.dumps(cell.settings["train"] | {"seed": 0})
        if settings in checked:
            continue
        checked.add(settings)
        model_args, _, _ = cell.training_arguments()
        try:
            with naming_model(model_args.model):
                if model_args.model not in encoders:
                    encoders[model_args.model] = AutoConfig.from_pretrained(
                        resolve_encoder(model_args.model), trust_remote_code=False
                    )
                given = model_args.config_fields()
                given.pop("attn_implementation", None)
                if model_args.encoder_config is not None:
                    parse_encoder_config(model_args.encoder_config)
                XLFAConfig(text_config=encoders[model_args.model], **given)
        except XLFAError as error:
            raise XLFAError(f"{plan.file}, cell {cell.id}: {error}") from None


class _Reader:
    """Reads and checks the parts of a study's file."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path, self.content = path, content
        unknown = [key for key in content if key not in KEYS]
        if unknown:
            self.refuse(str(unknown[0]), f"there is no such key: there are {', '.join(KEYS)}")

    def refuse(self, key: str, reason: str) -> None:
        raise XLFAError(f"{self.path}: {key}: {reason}")

    def text(self, key: str) -> str:
        value = self.content.get(key)
        if not isinstance(value, str) or not value:
            self.refuse(key, f"{value!r} must be some text")
        return value

    def boolean(self, key: str) -> bool:
        value = self.content.get(key, False)
        if not isinstance(value, bool):
            self.refuse(key, f"{value!r} must be true or false")
        return value

    def mapping(self, parent: dict[str, Any], key: str, place: str) -> dict[str, Any]:
        value = parent.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(place, f"{value!r} must be a mapping of names to values")
        return value

    def flags(self, parent: dict[str, Any], key: str, place: str, types: tuple[type, ...]) -> dict[str, Any]:
        """A mapping whose names are flags of `types` and not set by the study."""
        found = self.mapping(parent, key, place)
        self.check_flags(found, place, types)
        return found

    def check_flags(self, found: dict[str, Any], place: str, types: tuple[type, ...]) -> None:
        known = {field.name for each in types for field in fields(each)}
        for name in found:
            if name not in known:
                self.refuse(f"{place}.{name}", f"there is no flag --{name} ({_help_command(types)} lists all)")
            if name in SET_BY_STUDY and not (name == "model" and types == TRAINING_TYPES):
                self.refuse(f"{place}.{name}", f"the study sets it: {SET_BY_STUDY[name]}")

    def named(self, key: str) -> dict[str, dict[str, Any]]:
        """Name → training flags, of `controls` or `arms`."""
        found = self.mapping(self.content, key, key)
        for name in found:
            self.check_name(name, key)
        return {name: self.flags(found, name, f"{key}.{name}", TRAINING_TYPES) for name in found}

    def check_name(self, name: Any, place: str) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.]+", name, re.ASCII):
            self.refuse(
                place, f"the name {name!r} must be of letters, digits, '_' and '.': it stands in folders' names"
            )

    def seeds(self) -> list[int]:
        seeds = self.content.get("seeds")
        sound = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
        if not sound or len(set(seeds)) < len(seeds):
            self.refuse("seeds", f"{seeds!r} must be a list of different numbers, such as [0, 1, 2]")
        return seeds

    @cached_property
    def points(self) -> list[list[dict[str, Any]]]:
        """The grid's parts, each the combinations of its fields."""
        grid = self.content.get("grid") or []
        parts = grid if isinstance(grid, list) else [grid]
        found = []
        for number, part in enumerate(parts):
            place = f"grid[{number}]" if isinstance(grid, list) else "grid"
            if not isinstance(part, dict) or not part:
                self.refuse(place, f"{part!r} must be a mapping of training flags to lists of values")
            self.check_flags(part, place, TRAINING_TYPES)
            for name, values in part.items():
                if not isinstance(values, list) or not values:
                    self.refuse(f"{place}.{name}", f"{values!r} must be a list of values")
                for value in values:
                    if isinstance(value, (list, dict)):
                        self.refuse(
                            f"{place}.{name}", f"{value!r} is no single value: name an arm for each such setting"
                        )
            found.append([dict(zip(part, values)) for values in itertools.product(*part.values())])
        return found

    def tasks(self) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        """Task → its flags of training and of scoring, those of all tasks among them."""
        train = self.flags(self.content, "train", "train", TRAINING_TYPES)
        score = self.flags(self.content, "score", "score", (EvaluationArguments,))
        tasks = self.mapping(self.content, "tasks", "tasks")
        if not tasks:
            self.refuse("tasks", f"name at least one of {', '.join(TASKS)}")
        found = {}
        for name in tasks:
            try:
                get_task(name)
            except XLFAError as error:
                self.refuse("tasks", str(error))
            own = self.mapping(tasks, name, f"tasks.{name}")
            for key in own:
                if key not in ("train", "score"):
                    self.refuse(f"tasks.{name}.{key}", "there is no such key: there are train, score")
            found[name] = (
                train | self.flags(own, "train", f"tasks.{name}.train", TRAINING_TYPES),
                score | self.flags(own, "score", f"tasks.{name}.score", (EvaluationArguments,)),
            )
        return found

    def cells(self) -> list[PlannedCell]:
        tasks, seeds, arms = self.tasks(), self.seeds(), self.named("arms") or {MAIN_ARM: {}}
        retrieval = None
        if self.content.get("retrieval") is not None:
            retrieval = self.flags(self.content, "retrieval", "retrieval", (RetrievalArguments,))
        planned: dict[tuple[str, str], PlannedCell] = {}
        # What a control finds depends on → the key of the first one.
        found: dict[str, tuple[str, str]] = {}
        for arm, condition, seed, task in self._combinations(arms, seeds, list(tasks)):
            role, own = condition
            train, score = tasks[task]
            train = {**train, **arms[arm], **own, "task": task, "seed": seed}
            settings = {"train": train, "score": score, "retrieval": retrieval}
            cell, digest = self._cell(task, arm, role, own, seed, settings)
            key = (arm, digest)
            twin = found.setdefault(_outcome_of(cell), key) if cell.control is not None else key
            if twin[0] != arm:
                planned[twin] = replace(planned[twin], roles=(*planned[twin].roles, f"{arm}{OF_ARM}{role}"))
            else:
                planned[key] = _merged(planned[key], cell) if key in planned else cell
        return list(planned.values())

    def _combinations(
        self, arms: dict[str, Any], seeds: list[int], tasks: list[str]
    ) -> Iterator[tuple[str, tuple[str, dict[str, Any]], int, str]]:
        """Arm, (role, training flags), seed and task of each cell, in the order in which they are run."""
        parts = [[(GRID_ROLE, point) for point in points] for points in self.points]
        controls = [(CONTROL_ROLE + name, own) for name, own in self.named("controls").items()]
        if not parts and not controls:
            self.refuse("grid", "there is neither a grid nor a control")
        if len(controls) > 1 and not any(role.removeprefix(CONTROL_ROLE) in BASELINES for role, _ in controls):
            self.refuse(
                "controls", f"of several one must be named {' or '.join(BASELINES)}: differences are taken to it"
            )
        conditions = [controls] if not parts else [parts[0] + controls, *parts[1:]]
        for arm, part in itertools.product(arms, conditions):
            yield from ((arm, condition, seed, task) for seed in seeds for condition in part for task in tasks)

    def _cell(
        self, task: str, arm: str, role: str, own: dict[str, Any], seed: int, given: dict[str, dict[str, Any] | None]
    ) -> tuple[PlannedCell, str]:
        """The cell, and a digest of its settings."""
        control = None if role == GRID_ROLE else role.removeprefix(CONTROL_ROLE)
        label = control or "-".join(f"{name}_{value}" for name, value in own.items())
        name = f"{task}-{arm}-{re.sub(r'[^A-Za-z0-9_.+-]+', '_', label)[:80]}-s{seed}"
        settings = {part: None if values is None else _without_null(values) for part, values in given.items()}
        cell = PlannedCell(name, task, arm, seed, None, control, (role,), settings)
        try:
            settings, of_id = _effective(cell)
        except XLFAError as error:
            raise XLFAError(f"{self.path}, cell {name}: {error}") from None
        point = None
        if control is None:
            # The same fields in every part of the grid.
            point = {field: settings["train"].get(field) for field in self.varied}
        digest = hashlib.sha256(json.dumps(of_id, sort_keys=True).encode()).hexdigest()
        return PlannedCell(f"{name}-{digest[:8]}", task, arm, seed, point, control, (role,), settings), digest

    @cached_property
    def varied(self) -> list[str]:
        """The grid's fields."""
        return list(dict.fromkeys(name for points in self.points for point in points for name in point))


def _effective(cell: PlannedCell) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings with each value as its dataclass has it, so `1e-4` and `0.0001` are equal; and those of the id."""
    train = cell.settings["train"]
    # A parse takes a while, and seeds differ in nothing else.
    fields_of_train = _parsed("train", json.dumps(train | {"seed": 0}))
    parsed = {
        "train": fields_of_train | {"seed": train["seed"]},
        "score": _parsed("score", json.dumps({"task": cell.task} | cell.settings["score"])),
    }
    if cell.settings["retrieval"] is not None:
        parsed["retrieval"] = _parsed("retrieval", json.dumps(cell.settings["retrieval"]))
    settings = {
        part: None if given is None else {name: _plain(value, parsed[part][name]) for name, value in given.items()}
        for part, given in cell.settings.items()
    }
    ignored = WITHOUT_INFLUENCE
    if not parsed["train"]["load_best_model_at_end"]:
        ignored += CHECKPOINTING
    of_id = settings | {"train": {name: value for name, value in settings["train"].items() if name not in ignored}}
    return settings, of_id


def _outcome_of(cell: PlannedCell) -> str:
    """The settings without those that cannot matter: of a transport term that is off, or of epsilon at its limits."""
    train = cell.settings["train"]
    idle: tuple[str, ...] = ()
    if not train.get("ot_weight"):
        idle = tuple(name for name in train if name.startswith(("ot_", "parallel_")))
    elif train.get("ot_solver") in LIMITS:
        # The exact value of a sentence against itself is 0: debiasing takes nothing away.
        idle = (*OF_EPSILON, "ot_debiased") if train["ot_solver"] == "exact" else OF_EPSILON
    matters = {name: value for name, value in train.items() if name not in idle}
    return json.dumps([cell.task, cell.seed, {**cell.settings, "train": matters}], sort_keys=True)


@cache
def _parsed(part: str, settings: str) -> dict[str, Any]:
    """Field → value, of settings in JSON."""
    given = json.loads(settings)
    if part == "train":
        instances = parse_training(given)
    elif part == "score":
        instances = [parse_evaluation(given | {"model": ""})]
    else:
        instances = [parse_retrieval(given | {"model": ""})]
    return {name: value for each in instances for name, value in vars(each).items()}


def parse_training(settings: dict[str, Any]) -> tuple[ModelArguments, DataArguments, XLFATrainingArguments]:
    """What `train` takes."""
    return parse_arguments(
        list(TRAINING_TYPES), mapping_flags(settings), "xlfa train", "", common=COMMON_TRAINING_FLAGS
    )


def parse_evaluation(settings: dict[str, Any]) -> EvaluationArguments:
    """What `evaluate_model` takes."""
    return parse_arguments([EvaluationArguments], mapping_flags(settings), "xlfa eval", "")[0]


def parse_retrieval(settings: dict[str, Any]) -> RetrievalArguments:
    """What `score_retrieval` takes."""
    return parse_arguments([RetrievalArguments], mapping_flags(settings), "xlfa retrieval", "")[0]


def _plain(given: Any, parsed: Any) -> Any:
    """A value for JSON. Mappings, which a flag takes as JSON, and numbers, which it takes as text, stay as given."""
    as_text = isinstance(parsed, str) and not isinstance(given, str)
    return given if isinstance(given, dict) or as_text else json.loads(json.dumps(parsed, default=str))


def _without_null(values: dict[str, Any]) -> dict[str, Any]:
    """null in a task, arm, point or control takes a flag back."""
    return {name: value for name, value in values.items() if value is not None}


def _merged(first: PlannedCell, second: PlannedCell) -> PlannedCell:
    """One cell in the roles of both, whose settings are equal."""
    point = first.point if first.point is not None else second.point
    return PlannedCell(
        id=first.id,
        task=first.task,
        arm=first.arm,
        seed=first.seed,
        point=point,
        control=first.control if point is None else None,
        roles=tuple(dict.fromkeys((*first.roles, *second.roles))),
        settings=first.settings,
    )


def _help_command(types: tuple[type, ...]) -> str:
    commands = {TRAINING_TYPES: "xlfa train --help_all", (EvaluationArguments,): "xlfa eval --help"}
    return commands.get(types, "xlfa retrieval --help")
