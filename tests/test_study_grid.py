"""The cells of a study's file: their number, order, ids and roles, and what is refused."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from xlfa.errors import XLFAError
from xlfa.study.grid import check_models, load_plan

CONTENT = {
    "name": "small",
    "output_dir": "runs/small",
    "seeds": [0, 1],
    "train": {"model": "some/encoder", "ot_weight": 0.1, "parallel_dataset": "local/parallel", "learning_rate": "1e-4"},
    "tasks": {"xnli": {}, "xquad": {"train": {"max_length": 256}, "score": {"max_examples": 50}}},
    "grid": {"ot_epsilon": [0.1, 1]},
    "controls": {"no_ot": {"ot_weight": 0}, "shuffled": {"parallel_shuffled": True}},
}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        path = tmp_path / "study.yaml"
        content = {name: value for name, value in (CONTENT | changes).items() if value is not None}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture
def load(write):
    return lambda **changes: load_plan(write(**changes))


def prefixes(plan):
    return [cell.id.rpartition("-")[0] for cell in plan.cells]


def test_every_condition_is_planned_for_each_task_and_seed_seeds_first(load):
    plan = load()
    assert prefixes(plan)[:9] == [
        "xnli-main-ot_epsilon_0.1-s0",
        "xquad-main-ot_epsilon_0.1-s0",
        "xnli-main-ot_epsilon_1-s0",
        "xquad-main-ot_epsilon_1-s0",
        "xnli-main-no_ot-s0",
        "xquad-main-no_ot-s0",
        "xnli-main-shuffled-s0",
        "xquad-main-shuffled-s0",
        "xnli-main-ot_epsilon_0.1-s1",
    ]
    assert len(plan.cells) == len({cell.id for cell in plan.cells}) == 2 * 2 * 4
    assert str(plan.folder(plan.cells[0])) == f"runs/small/cells/{plan.cells[0].id}"


def test_settings_are_those_of_study_task_arm_and_condition_in_this_order(load):
    plan = load(arms={"main": {"fusion": "none"}, "dlfa": {"fusion": "dlfa", "ot_weight": 0.2}})
    cell = next(cell for cell in plan.cells if cell.arm == "dlfa" and cell.task == "xquad" and cell.control == "no_ot")
    assert cell.settings["train"] == {
        "model": "some/encoder",
        "ot_weight": 0.0,
        "parallel_dataset": "local/parallel",
        "learning_rate": 1e-4,
        "max_length": 256,
        "fusion": "dlfa",
        "task": "xquad",
        "seed": 0,
    }
    assert cell.settings["score"] == {"max_examples": 50} and cell.settings["retrieval"] is None
    assert cell.point is None and cell.roles == ("control:no_ot",)
    assert next(cell for cell in plan.cells if cell.arm == "dlfa").settings["train"]["ot_weight"] == 0.2


def test_null_takes_a_flag_back(load):
    plan = load(controls={"no_ot": {"ot_weight": 0, "learning_rate": None}})
    assert "learning_rate" not in next(cell for cell in plan.cells if cell.control == "no_ot").settings["train"]


def test_parts_of_a_grid_come_one_after_the_other_and_their_points_have_the_same_fields(load):
    plan = load(grid=[{"ot_epsilon": [0.1]}, {"ot_epsilon": [0.1, 1], "ot_weight": [0.1, 0.3]}], seeds=[0, 1])
    points = [(cell.seed, cell.point or cell.control) for cell in plan.cells if cell.task == "xnli"]
    first = {"ot_epsilon": 0.1, "ot_weight": 0.1}
    assert points[:6] == [(0, first), (0, "no_ot"), (0, "shuffled"), (1, first), (1, "no_ot"), (1, "shuffled")]
    # What the first part has is not planned again.
    assert points[6:9] == [
        (0, {"ot_epsilon": 0.1, "ot_weight": 0.3}),
        (0, {"ot_epsilon": 1.0, "ot_weight": 0.1}),
        (0, {"ot_epsilon": 1.0, "ot_weight": 0.3}),
    ]
    assert len(points) == 2 * (3 + 3)


def test_a_control_that_finds_the_same_in_another_arm_is_one_cell(load):
    controls = {"no_ot": {"ot_weight": 0}, "exact": {"ot_solver": "exact"}, "product": {"ot_solver": "product"}}
    arms = {"main": {}, "debiased": {"ot_debiased": True}, "dlfa": {"fusion": "dlfa"}}
    plan = load(arms=arms, controls=controls, tasks={"xnli": {}}, seeds=[0])
    assert [(cell.arm, cell.control) for cell in plan.cells if cell.control] == [
        *(("main", name) for name in controls),
        ("debiased", "product"),
        *(("dlfa", name) for name in controls),
    ]
    roles = {cell.control: cell.roles for cell in plan.cells if cell.arm == "main" and cell.control}
    assert roles == {
        "no_ot": ("control:no_ot", "debiased/control:no_ot"),
        "exact": ("control:exact", "debiased/control:exact"),
        "product": ("control:product",),
    }
    # Its id is that of a study without the other arms.
    alone = load(controls=controls, tasks={"xnli": {}}, seeds=[0], arms={"main": {}})
    assert {cell.id for cell in alone.cells} <= {cell.id for cell in plan.cells}


def test_a_control_that_is_a_grid_point_is_one_cell_in_both_roles(load):
    plan = load(controls={"middle": {"ot_epsilon": 0.1}})
    assert len(plan.cells) == 2 * 2 * 2
    cell = plan.cells[0]
    assert (cell.point, cell.control, cell.roles) == ({"ot_epsilon": 0.1}, None, ("grid", "control:middle"))


def test_an_id_depends_on_what_has_influence_alone(write):
    def ids(data_root=None, output_dir=None, **train):
        plan = load_plan(write(train=CONTENT["train"] | train), data_root, output_dir)
        return [cell.id for cell in plan.cells]

    before = ids()
    assert ids(data_root="/data", output_dir="/elsewhere") == before
    assert ids(learning_rate=0.0001) == before
    assert ids(dataloader_num_workers=2, save_strategy="steps", save_steps=7, save_total_limit=1) == before
    assert not {*ids(learning_rate=0.0002)} & {*before}
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
    assert not {*ids(**best, save_steps=10, eval_steps=10)} & {*ids(**best, save_steps=20, eval_steps=10)}


def test_ids_do_not_change_from_version_to_version(load):
    assert load().cells[0].id == "xnli-main-ot_epsilon_0.1-s0-59f5c527"


def test_a_layer_stays_a_number(load):
    assert load(grid={"fusion_layer": [2, "learned"]}).cells[0].point == {"fusion_layer": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "sedes: there is no such key"),
        ({"name": None}, "name: None must be some text"),
        ({"seeds": [0, 0]}, r"seeds: \[0, 0\] must be a list of different numbers"),
        ({"seeds": None}, "seeds: None must be"),
        ({"data_root": 7}, "data_root: 7 must be some text"),
        ({"keep_models": "yes"}, "keep_models: 'yes' must be true or false"),
        ({"tasks": {}}, "tasks: name at least one of xnli"),
        ({"tasks": {"xnil": {}}}, "tasks: unknown task 'xnil'"),
        ({"tasks": {"xnli": {"trian": {}}}}, "tasks.xnli.trian: there is no such key"),
        (
            {"tasks": {"xnli": {"train": {"lr": 1}}}},
            r"tasks.xnli.train.lr: there is no flag --lr \(xlfa train --help_all",
        ),
        ({"tasks": {"xnli": {"score": {"lr": 1}}}}, r"tasks.xnli.score.lr: there is no flag --lr \(xlfa eval --help"),
        ({"train": {"seed": 3}}, "train.seed: the study sets it: give them as `seeds`"),
        ({"score": {"model": "x"}}, "score.model: the study sets it"),
        ({"retrieval": {"output_dir": "x"}}, "retrieval.output_dir: the study sets it"),
        ({"arms": {"a/b": {}}}, "arms: the name 'a/b' must be of letters"),
        ({"arms": {"a": {"task": "xnli"}}}, "arms.a.task: the study sets it"),
        ({"controls": {"c": {"ot_wieght": 0}}}, "controls.c.ot_wieght: there is no flag"),
        ({"controls": {"a": {}, "b": {}}}, "controls: of several one must be named no_ot or baseline"),
        ({"controls": [1]}, r"controls: \[1\] must be a mapping"),
        ({"grid": {"ot_epsilon": 0.1}}, "grid.ot_epsilon: 0.1 must be a list of values"),
        ({"grid": {"parallel_languages": [["de"], ["de", "fr"]]}}, r"parallel_languages: \['de'\] is no single value"),
        ({"grid": [{"epsilon": [1]}]}, r"grid\[0\].epsilon: there is no flag --epsilon"),
        ({"grid": None, "controls": None}, "grid: there is neither a grid nor a control"),
        ({"grid": {"ot_solver": ["fast"]}}, "cell xnli-main-ot_solver_fast-s0: .*ot_solver.*: invalid choice: 'fast'"),
        ({"grid": {"max_steps": ["many"]}}, "cell xnli-main-max_steps_many-s0: .*max_steps.*invalid int value"),
        (
            {"grid": {"cache_trunk": [True]}},
            "cell xnli-main-cache_trunk_True-s0: --cache_trunk .* needs --freeze_layers",
        ),
    ],
)
def test_a_mistake_is_named_with_file_and_key(write, changes, message):
    path = write(**changes)
    with pytest.raises(XLFAError, match=message) as error:
        load_plan(path)
    assert str(error.value).startswith(str(path))


def test_fields_of_the_model_are_checked_with_its_encoder(load, tiny_encoder):
    plan = load(train=CONTENT["train"] | {"model": tiny_encoder}, grid={"ot_epsilon": [0.1, -1]})
    with pytest.raises(XLFAError, match=r"study.yaml, cell xnli-main-ot_epsilon_-1-s0-\w+: .*ot_epsilon=-1.0"):
        check_models(plan)
    check_models(load(train=CONTENT["train"] | {"model": tiny_encoder}, grid={"fusion_layer": [1, "learned"]}))


def test_the_home_in_the_study_s_folder_is_that_of_its_cells(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    plan = load(output_dir="~/study")
    folder = plan.folder(plan.cells[0])
    assert plan.output_dir == Path("/home/anna/study")
    assert plan.cells[0].training_arguments(output_dir=str(folder))[2].output_dir == str(folder)


def test_a_number_beyond_the_cells_is_refused(load):
    plan = load()
    assert plan.cell(15) is plan.cells[15]
    for number in (-1, 16):
        with pytest.raises(XLFAError, match=f"--cell {number}: .*study.yaml has 16 cells, 0 to 15"):
            plan.cell(number)


@pytest.mark.parametrize("name", ["epsilon", "epsilon_gpu", "layers", "fusion", "sample"])
def test_the_studies_of_the_repository_can_be_planned(name):
    plan = load_plan(REPOSITORY / "configs" / "study" / f"{name}.yaml")
    # In the arm debiased, no OT and the exact assignment are those of main.
    sizes = {
        "epsilon": (4 * 16 - 2) * 5 * 2,
        "layers": 3 * 7 * 2,
        "fusion": 3 * 7,
        "sample": 6,
        "epsilon_gpu": 7 * 5 * 2,
    }
    assert len(plan.cells) == sizes[name]
    assert json.loads(json.dumps([cell.settings for cell in plan.cells])) == [cell.settings for cell in plan.cells]


@pytest.mark.offline
@pytest.mark.parametrize("name", ["epsilon", "epsilon_gpu", "layers", "fusion", "sample"])
def test_their_models_can_be_built(name):
    check_models(load_plan(REPOSITORY / "configs" / "study" / f"{name}.yaml"))
