"""Reading a study's folder: what is there, what is missing, and one clear error for what cannot be read or compared."""

import json
import shutil
from dataclasses import replace

import pytest
from study_data import CONTROLS, EPSILONS, HEADLINE, LANGUAGES, write_study

from xlfa.errors import XLFAError
from xlfa.study.analysis import analyse
from xlfa.study.grid import PlannedCell
from xlfa.study.results import as_number, describe_point, in_order, read_study


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), seeds=(0, 1), clusters=4)


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "study")


def change(folder, cell, **changes):
    path = folder / "cells" / cell / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def planned_cells(ids):
    """A plan's cells, as far as reading results needs them: each another control."""
    settings = {"train": {}, "score": {}, "retrieval": None}
    return [PlannedCell(id, *id.split("-")[:2], 0, None, id, (f"control:{id}",), settings) for id in ids]


def test_a_study_has_all_its_cells(written):
    study = read_study(written)
    assert len(study.cells) == 2 * 2 * (len(EPSILONS) + len(CONTROLS))
    assert (study.name, study.tasks, study.arms) == ("epsilon", ["xnli", "xquad"], ["main"])
    assert study.fields == {"ot_epsilon": EPSILONS}
    assert study.headline == HEADLINE
    assert (study.unfinished, study.missing()) == ({}, [])
    cell = study.cells[0]
    assert list(cell.read_sums()) == cell.languages == LANGUAGES["xnli"]


def test_missing_and_failed_cells_are_named(folder):
    cells = folder / "cells"
    shutil.rmtree(cells / "xnli-main-no_ot-s1")
    (cells / "xquad-main-exact-s0" / "result.json").unlink()
    (cells / "xquad-main-product-s1" / "result.json").unlink()
    (cells / "xquad-main-product-s1" / "failed.json").write_text('{"error": "no memory"}')
    study = read_study(folder)
    assert study.unfinished == {"xquad-main-exact-s0": "", "xquad-main-product-s1": "no memory"}
    assert study.missing() == [
        "xnli main no_ot seed 1",
        "xquad main exact seed 0",
        "xquad main product seed 1",
    ]


def test_with_a_plan_exactly_its_cells_count(folder):
    cells = folder / "cells"
    planned = planned_cells([path.name for path in cells.iterdir() if "-product-" not in path.name])
    planned += planned_cells(["xnli-main-new-s0"])
    (cells / "xquad-main-exact-s0" / "result.json").unlink()
    study = read_study(folder, planned)
    assert not any("product" in cell.id for cell in study.cells)
    assert study.missing() == ["xnli-main-new-s0"]
    assert list(study.unfinished) == ["xquad-main-exact-s0"]


def test_what_a_cell_stands_for_is_what_the_plan_says_now(folder):
    """A second field was added to the grid, a control that is a grid point too, and an order of arms."""
    names = ["xnli-main-ot_epsilon_0.1-s0", "xnli-main-no_ot-s0"]
    change(folder, names[1], arm="first")
    planned = planned_cells(names)
    point = {"ot_epsilon": 0.1, "ot_weight": 0.3}
    planned[0] = replace(planned[0], point=point, control=None, roles=("grid", "control:usual"))
    planned[1] = replace(planned[1], arm="first", control="without", roles=("control:without",))
    study = read_study(folder, planned)
    assert study.fields == {"ot_epsilon": [0.1], "ot_weight": [0.3]}
    found = {cell.id: study.conditions(cell) for cell in study.cells}
    assert found == {names[0]: ["ot_epsilon 0.1 · ot_weight 0.3", "usual"], names[1]: ["without"]}
    assert study.arms == ["main", "first"]
    assert read_study(folder, planned[::-1]).arms == ["first", "main"]


def test_a_cell_may_be_a_control_of_several_arms(folder):
    for task in ("xnli", "xquad"):
        for seed in (0, 1):
            roles = ["control:no_ot", "other/control:none", "later/control:none"]
            change(folder, f"{task}-main-no_ot-s{seed}", roles=roles)
            change(folder, f"{task}-main-exact-s{seed}", arm="other")
    study = read_study(folder)
    assert study.arms == ["main", "other"]
    found = [(cell.arm, cell.controls, cell.point) for cell in study.cells if cell.id == "xnli-main-no_ot-s0"]
    assert found == [("main", ["no_ot"], None), ("other", ["none"], None)]
    report = analyse(study)
    assert report["cells"] == len(list((folder / "cells").iterdir()))
    assert {(own["arm"], own["condition"]) for own in report["conditions"] if own["arm"] == "other"} == {
        ("other", "exact"),
        ("other", "none"),
    }


def test_a_cell_may_be_a_grid_point_and_a_control(folder):
    change(folder, "xnli-main-ot_epsilon_0.1-s0", roles=["grid", "control:usual"])
    study = read_study(folder)
    cell = next(cell for cell in study.cells if cell.id == "xnli-main-ot_epsilon_0.1-s0")
    assert study.conditions(cell) == ["ot_epsilon 0.1", "usual"]


def fails(folder, *words, planned=None):
    with pytest.raises(XLFAError) as error:
        read_study(folder, planned)
    assert all(str(word) in str(error.value) for word in words), str(error.value)


def test_a_folder_without_cells(tmp_path):
    fails(tmp_path, tmp_path, "cells/", "output_dir")


def test_a_study_without_a_finished_cell(tmp_path):
    (tmp_path / "cells" / "a").mkdir(parents=True)
    fails(tmp_path, "no finished cell", "1 begun")


def test_a_plan_without_a_finished_cell(written):
    fails(written, "no finished cell", planned=planned_cells(["xnli-another-s0"]))


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"schema_version": 1}'])
def test_a_file_that_is_no_result(folder, text):
    path = folder / "cells" / "xnli-main-no_ot-s0" / "result.json"
    path.write_text(text)
    fails(folder, path)


def test_a_result_of_another_version(folder):
    change(folder, "xnli-main-no_ot-s0", schema_version=1)
    fails(folder, "xnli-main-no_ot-s0", "schema_version 1", "run the cell again")


def test_a_result_without_a_field(folder):
    path = folder / "cells" / "xnli-main-no_ot-s0" / "result.json"
    result = json.loads(path.read_text())
    del result["scores"]["examples_digest"]
    path.write_text(json.dumps(result))
    fails(folder, path, "examples_digest")
    del result["curves"]
    path.write_text(json.dumps(result))
    fails(folder, path, "curves")


def test_an_unknown_task(folder):
    change(folder, "xnli-main-no_ot-s0", task="poetry")
    fails(folder, "poetry")


def test_cells_of_two_studies(folder):
    change(folder, "xnli-main-no_ot-s0", study="other")
    fails(folder, "several studies", "'other'", "output_dir")


def test_cells_that_were_scored_on_different_examples(folder):
    path = folder / "cells" / "xquad-main-no_ot-s1" / "result.json"
    result = json.loads(path.read_text())
    result["scores"]["examples_digest"] = "another"
    path.write_text(json.dumps(result))
    fails(folder, "xquad-main-no_ot-s1", "different examples", "examples_digest")


def test_two_cells_of_one_condition_and_seed(folder):
    cells = folder / "cells"
    shutil.copytree(cells / "xnli-main-no_ot-s0", cells / "xnli-main-no_ot-s0-old")
    change(folder, "xnli-main-no_ot-s0-old", id="xnli-main-no_ot-s0-old")
    fails(folder, "xnli-main-no_ot-s0-old", "no_ot seed 0", "out of date")


def test_sums_of_other_languages(folder):
    path = folder / "cells" / "xnli-main-no_ot-s0" / "sums.json"
    content = json.loads(path.read_text())
    cell = next(cell for cell in read_study(folder).cells if cell.id == "xnli-main-no_ot-s0")
    assert list(cell.read_sums()) == LANGUAGES["xnli"]
    del content["de"]
    path.write_text(json.dumps(content))
    with pytest.raises(XLFAError, match="sums of .* run the study again"):
        cell.read_sums()
    path.unlink()
    with pytest.raises(XLFAError, match="cannot read .*sums.json"):
        cell.read_sums()


def test_values_are_ordered_and_written_as_in_a_file():
    assert in_order([1, "learned", 0.1, 0.1, None, "10", "2"]) == [0.1, 1, "2", "10", "learned", None]
    assert [as_number(value) for value in (True, None, "nan", "learned", "8")] == [None, None, None, None, 8.0]
    point = {"ot_epsilon": 0.1, "ot_debiased": True, "ot_tau": None}
    assert describe_point(point, point) == "ot_epsilon 0.1 · ot_debiased true · ot_tau none"
