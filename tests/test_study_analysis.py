"""The analysis of a study: simulated truths are found as often as promised, and comparisons are paired by seed."""

import json
import math

import numpy as np
import pytest
from study_data import CONTROLS, EPSILONS, HEADLINE, LANGUAGES, cell_predictions, study_of, write_study

from xlfa.errors import XLFAError
from xlfa.study.analysis import Analysis, analyse, held_out_cost
from xlfa.study.conclusions import is_slope_shown
from xlfa.study.conditions import choose_axis
from xlfa.study.resampling import estimate, score_cells
from xlfa.study.results import read_study
from xlfa.study.significance import detectable_effect, paired_t
from xlfa.study.sums import read_sums
from xlfa.tasks import get_task

SEEDS = range(4)


def simulated(rng, slopes, deviations=(1.0, 2.0), seeds=SEEDS):
    """Scores of both tasks: what seeds share, own noise, a slope on log epsilon; and of no OT and shuffled pairs."""
    values = {}
    for task, slope, deviation in zip(("xnli", "xquad"), slopes, deviations):
        for seed in seeds:
            common = 60 + 3 * rng.normal()
            for epsilon in EPSILONS:
                effect = slope * (math.log10(epsilon) + 1)
                values[task, epsilon, seed] = common + effect + deviation * rng.normal()
            for control in ("no_ot", "shuffled_pairs"):
                values[task, control, seed] = common + deviation * rng.normal()
    return values


def interactions(slopes, number, seed=0):
    """The interactions of simulated studies in points, and in units of the seeds' deviation."""
    rng = np.random.default_rng(seed)
    return [Analysis(*study_of(simulated(rng, slopes))).interactions() for _ in range(number)]


def share_rejected(found, unit, name="slope_p"):
    return np.mean([entries[unit]["test"][name] < 0.05 for entries in found])


@pytest.fixture(scope="module")
def null_interactions():
    return interactions((0, 0), 300)


@pytest.mark.parametrize("unit", [0, 1])
@pytest.mark.parametrize("name", ["slope_p", "omega_squared_p"])
def test_without_an_effect_one_in_twenty_studies_shows_an_interaction(null_interactions, unit, name):
    # 0.05 ± 2.6 standard errors of 300 studies.
    assert 0.017 <= share_rejected(null_interactions, unit, name) <= 0.083


def test_omega_squared_of_an_interaction_is_near_its_null_mean(null_interactions):
    tests = [points["test"] for points, _ in null_interactions]
    difference = np.mean([test["omega_squared"] - test["null_mean"] for test in tests])
    assert difference == pytest.approx(0, abs=0.03)


def test_a_planted_interaction_is_found_with_its_size():
    found = interactions((0, 4), 40)
    assert share_rejected(found, 0) > 0.8
    assert share_rejected(found, 1) > 0.6
    assert np.mean([points["test"]["slope"] for points, _ in found]) == pytest.approx(4, abs=0.5)


def test_an_equal_effect_in_both_tasks_is_no_interaction():
    rng = np.random.default_rng(1)
    analyses = [Analysis(*study_of(simulated(rng, (4, 4), deviations=(1, 1)))) for _ in range(150)]
    assert np.mean([own.interactions()[0]["test"]["slope_p"] < 0.05 for own in analyses]) <= 0.1
    trends = [own.trends() for own in analyses[:40]]
    assert np.mean([trend["test"]["slope_p"] < 0.05 for both in trends for trend in both]) > 0.95


def test_equal_effects_in_units_of_the_seeds_are_no_interaction_in_these_units():
    rng = np.random.default_rng(2)
    # Twice the effect where seeds differ twice as much: common noise is left out, for the unit is that of differences.
    found = [Analysis(*study_of(simulated(rng, (3, 6), deviations=(1, 2)))).interactions() for _ in range(100)]
    assert share_rejected(found, 0) > share_rejected(found, 1)
    slopes = [units["test"]["slope"] for _, units in found]
    assert np.mean(slopes) == pytest.approx(0, abs=3 * np.std(slopes) / 10)


def test_the_reference_is_the_shuffled_cell_and_cancels_in_the_slope():
    values = simulated(np.random.default_rng(3), (1, 2))
    without = {key: value for key, value in values.items() if key[1] != "shuffled_pairs"}
    own, other = (Analysis(*study_of(each)).interactions()[0] for each in (values, without))
    assert (own["reference"], other["reference"]) == ("shuffled_pairs", "no_ot")
    assert own["test"]["slope"] == pytest.approx(other["test"]["slope"])
    assert own["test"]["slope_p"] == other["test"]["slope_p"]


def test_the_interaction_is_the_difference_of_the_slopes():
    analysis = Analysis(*study_of(simulated(np.random.default_rng(4), (1, 2))))
    slopes = [trend["test"]["slope"] for trend in analysis.trends()]
    assert analysis.interactions()[0]["test"]["slope"] == pytest.approx(slopes[1] - slopes[0])


def test_what_is_shown_of_a_slope_is_not_what_a_seed_does_alone():
    """Slopes differ by seed about a mean of 0: the permutation test rejects too often."""
    rng = np.random.default_rng(10)
    permutation, shown = [], []
    for _ in range(150):
        values = {}
        for seed in range(5):
            own = rng.normal()
            for epsilon in EPSILONS:
                values["xnli", epsilon, seed] = 60 + own * (math.log10(epsilon) + 1) + 0.3 * rng.normal()
        (trend,) = Analysis(*study_of(values)).trends()
        permutation.append(trend["test"]["slope_p"] < 0.05)
        shown.append(is_slope_shown(trend))
    assert np.mean(permutation) > 0.12
    # The interval hardly refuses what the t test lets pass: 0.05 + 2.6 standard errors of 150 studies.
    assert np.mean(shown) <= 0.096


def test_the_slope_that_can_be_detected_is_that_of_the_t_test():
    values = {("xnli", epsilon, seed): 60.0 for epsilon in EPSILONS for seed in range(3)}
    for seed, slope in enumerate((1.0, 2.0, 6.0)):
        values["xnli", 1.0, seed] += slope
        values["xnli", 0.01, seed] -= slope
    (trend,) = Analysis(*study_of(values)).trends()
    assert trend["slopes"] == pytest.approx({"0": 1, "1": 2, "2": 6})
    assert trend["slopes_p"] == pytest.approx(paired_t(np.array([1.0, 2.0, 6.0])))
    assert trend["detectable"] == pytest.approx(detectable_effect(math.sqrt(7) / math.sqrt(3), 2))


def test_pairs_are_by_seed():
    """What a seed adds to all of its cells is in no difference; unequal seeds are compared by those of both sides."""
    values = {}
    for seed in range(4):
        values["xnli", "no_ot", seed] = 50 + 10 * seed
        values["xnli", 0.1, seed] = 51 + 10 * seed
        values["xnli", 1.0, seed] = 50 + 10 * seed + (-1) ** seed
    del values["xnli", 0.1, 3], values["xnli", "no_ot", 0]
    conditions = {own["condition"]: own for own in Analysis(*study_of(values)).describe_conditions()}
    one = conditions["0.1"]
    assert (one["seeds"], one["difference"]["seeds"]) == ([0, 1, 2], [1, 2])
    entry = one["difference"]["scores"]["accuracy"]["headline"]
    assert (entry["value"], entry["interval"], entry["deviation"]) == (1, [1, 1], 0)
    assert one["difference"]["p"] is None
    assert one["scores"]["accuracy"]["headline"]["value"] == 61
    other = conditions["1"]["difference"]
    assert (other["seeds"], other["by_seed"]) == ([1, 2, 3], {"1": -1, "2": 1, "3": -1})
    assert conditions["no_ot"]["difference"] is None


def test_a_seed_with_one_level_is_left_out_of_tests():
    values = simulated(np.random.default_rng(5), (0, 0))
    for epsilon in EPSILONS[1:]:
        del values["xquad", epsilon, 3]
    entry = Analysis(*study_of(values)).interactions()[0]
    assert (entry["seeds"], entry["observations"]) == ([0, 1, 2], 9)
    assert entry["levels"] == ["0.01", "0.1", "1"]


def test_a_study_of_one_level_has_no_test():
    values = {key: value for key, value in simulated(np.random.default_rng(6), (0, 0)).items() if key[1] != 0.01}
    values = {key: value for key, value in values.items() if key[1] != 1.0}
    analysis = Analysis(*study_of(values))
    assert [entry["test"] for entry in analysis.trends() + analysis.interactions()] == [None] * 4
    assert analysis.selections() == []


def test_holm_is_over_the_levels_of_a_task():
    analysis = Analysis(*study_of(simulated(np.random.default_rng(7), (2, 0))))
    grid = [
        own["difference"] for own in analysis.describe_conditions() if own["kind"] == "grid" and own["task"] == "xnli"
    ]
    ordered = sorted(grid, key=lambda own: own["p"])
    assert ordered[0]["p_holm"] == pytest.approx(min(1, 3 * ordered[0]["p"]))
    assert ordered[1]["p_holm"] == pytest.approx(min(1, max(3 * ordered[0]["p"], 2 * ordered[1]["p"])))
    assert all(own["detectable"] < own["detectable_holm"] for own in grid)


def test_intervals_hold_a_difference_about_as_often_as_they_say():
    """Two conditions over 5 seeds and 60 clusters, with noise of seeds, clusters and of both together."""
    rng = np.random.default_rng(8)
    held = 0
    for _ in range(300):
        noise = rng.normal(size=(5, 1)) + 2 * rng.normal(size=60) + 3 * rng.normal(size=(5, 60))
        weights = rng.multinomial(60, np.full(60, 1 / 60), size=400) / 60
        found = estimate(noise.mean(1)[:, None], (noise @ weights.T)[:, None])
        held += found.intervals[0, 0] <= 0 <= found.intervals[0, 1]
    # Percentiles of 5 seeds are not Student's t: they hold less than 95 %.
    assert 0.86 <= held / 300 <= 0.99


def test_an_interval_is_wider_for_seeds_that_differ():
    same = np.zeros((4, 1))
    draws = np.random.default_rng(9).normal(size=(1, 1, 500)).repeat(4, axis=0)
    apart = np.array([[-3.0], [3.0], [-2.0], [2.0]])
    narrow, wide = estimate(same, draws), estimate(apart, draws + apart[..., None])
    assert np.ptp(wide.intervals) > 1.3 * np.ptp(narrow.intervals)
    assert narrow.values == wide.values == 0


def test_the_choice_by_english_and_its_cost():
    values = {("xnli", 0.1, seed): 60.0 for seed in range(3)} | {("xnli", 1.0, seed): 62.0 + seed for seed in range(3)}
    study, scores = study_of(values)
    for cell in study.cells:
        cell.validation["eval_accuracy"] = 70.0 if cell.point["ot_epsilon"] == 0.1 else 69.0
    (found,) = Analysis(study, scores).selections()
    assert (found["chosen_by_english"], found["best_by_targets"], found["cost"]) == ("0.1", "1", 3)
    assert found["held_out_cost"] == 3
    assert 2 <= found["interval"][0] < 3 < found["interval"][1] <= 4


def test_a_level_with_fewer_seeds_is_no_choice():
    values = {("xnli", epsilon, seed): 60.0 + epsilon for epsilon in (0.1, 1.0) for seed in range(3)}
    study, scores = study_of(values | {("xnli", 10.0, 0): 99.0})
    (found,) = Analysis(study, scores).selections()
    assert (found["seeds"], found["levels"], found["left_out"]) == ([0, 1, 2], ["0.1", "1"], ["10"])
    assert found["best_by_targets"] == "1"


def test_tasks_have_as_many_draws_and_a_language_in_common(written, monkeypatch):
    study = read_study(written)
    monkeypatch.setattr("xlfa.study.resampling.number_of_draws", lambda clusters: 50 + 10 * isinstance(clusters, dict))
    report = analyse(study)
    assert set(report["bootstrap"]["draws"].values()) == {50}
    study.headline.clear()
    with pytest.raises(XLFAError, match="xnli and xquad have no language in common"):
        analyse(study)


def test_held_out_cost_may_be_negative():
    # The best of the other seed is the worse one of each seed.
    targets = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert held_out_cost(np.array([[0.0, 1.0], [1.0, 0.0]]), targets) == -1
    assert held_out_cost(targets[:, :1], targets[:, :1]) is None


@pytest.mark.parametrize(
    "fields, name, kind, levels, rest",
    [
        ({"ot_epsilon": [0.01, 0.1, 1.0]}, "ot_epsilon", "log", ["0.01", "0.1", "1"], []),
        ({"ot_weight": [0.1, 0.3], "ot_epsilon": [0.1, 1]}, "ot_epsilon", "log", ["0.1", "1"], ["ot_weight"]),
        ({"fusion_layer": ["2", "4", "11"]}, "fusion_layer", "linear", ["2", "4", "11"], []),
        ({"ot_weight": [0.0, 0.1]}, "ot_weight", "linear", ["0", "0.1"], []),
        ({"ot_cost": ["cosine", "euclidean"]}, "ot_cost", "categorical", ["ot_cost cosine", "ot_cost euclidean"], []),
    ],
)
def test_the_axis(fields, name, kind, levels, rest):
    axis = choose_axis(fields)
    assert (axis.name, axis.kind, axis.levels, axis.rest) == (name, kind, levels, rest)


def test_two_fields_without_an_order_are_one_axis():
    axis = choose_axis({"fusion_gate": ["literal", "sigmoid"], "fusion_norm": ["batch", "none"]})
    assert (axis.name, axis.levels[2], axis.values) == (
        "fusion_gate · fusion_norm",
        "fusion_gate sigmoid · fusion_norm batch",
        None,
    )
    assert axis.places.tolist() == [0, 1, 2, 3]
    assert axis.level({"fusion_gate": "sigmoid", "fusion_norm": "batch"}, ["fusion_gate", "fusion_norm"]) == 2
    assert choose_axis({}) is None


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), seeds=(0, 1, 2), clusters=8)


def test_scores_are_those_of_the_predictions(written):
    study = read_study(written)
    cells = [cell for cell in study.cells if cell.task == "xquad"]
    scores = score_cells("xquad", cells, study.headline)
    assert scores.metrics == ["f1", "exact_match"]
    assert scores.languages == LANGUAGES["xquad"]
    for position in (0, 5):
        found = cell_predictions(cells[position])
        expected = {code: get_task("xquad").score(rows, code) for code, rows in found.items()}
        for metric in scores.metrics:
            own = dict(zip(scores.rows, scores.values[metric][position]))
            assert {code: own[code] for code in expected} == pytest.approx(
                {code: each[metric] for code, each in expected.items()}
            )
            assert own["headline"] == pytest.approx(np.mean([expected[code][metric] for code in HEADLINE]))
            assert own["targets"] == pytest.approx(
                np.mean([expected[code][metric] for code in HEADLINE if code != "en"])
            )
            assert own["enf"] == pytest.approx((own["en"] + own["de"]) / 2)
            assert own["noenf"] == pytest.approx((own["ar"] + own["zh"]) / 2)


def test_draws_of_clusters_are_the_same_in_all_cells_and_languages(written):
    """A cell with the same predictions in two languages has the same draws in both, and no interval of a difference."""
    study = read_study(written)
    cells = [cell for cell in study.cells if cell.task == "xnli"][:2]
    shared = read_sums(cells[0].folder)["de"]
    for cell in cells:
        own = {code: {name: values.tolist() for name, values in shared.items()} for code in cell.languages}
        (cell.folder / "sums.json").write_text(json.dumps(own))
    draws = score_cells("xnli", cells, study.headline).draws["accuracy"]
    assert np.ptp(draws[0, 0]) > 0
    assert np.allclose(draws, draws[0, 0], rtol=1e-12)


def test_one_cluster_shows_no_spread(tmp_path):
    write_study(tmp_path, seeds=(0,), clusters=1, tasks=("xnli",))
    with pytest.raises(XLFAError, match="one cluster.*max_examples"):
        analyse(read_study(tmp_path))


@pytest.mark.parametrize(
    ("controls", "compared"),
    [
        ({"plain": {"ot_weight": 0}, "exact": {}}, set()),
        ({"exact": {}}, {0.1}),
        ({"no_ot": {}, "exact": {}}, {0.1, 0.3}),
    ],
)
def test_differences_are_to_the_baseline_or_the_only_control(tmp_path, controls, compared):
    points = [{"ot_epsilon": epsilon, "ot_weight": weight} for weight in (0.1, 0.3) for epsilon in (0.1, 1)]
    write_study(tmp_path, tasks=("xnli",), seeds=(0, 1), clusters=4, points=points, controls=controls)
    found = [own for own in analyse(read_study(tmp_path))["conditions"] if own["kind"] == "grid"]
    assert {float(own["line"].split()[-1]) for own in found if own["difference"] is not None} == compared


def test_a_whole_report_of_arms_and_controls(tmp_path):
    points = [{"ot_epsilon": epsilon, "ot_weight": 0.1} for epsilon in EPSILONS] + [
        {"ot_epsilon": 0.1, "ot_weight": 0.3}
    ]
    write_study(tmp_path, seeds=(0, 1), clusters=4, arms=("main", "dlfa"), points=points)
    report = analyse(read_study(tmp_path))
    assert report["arms"] == ["main", "dlfa"]
    assert report["lines"] == [f"{arm} · ot_weight {weight}" for arm in ("main", "dlfa") for weight in (0.1, 0.3)]
    controls = [own for own in report["conditions"] if own["kind"] == "control"]
    assert {(own["arm"], own["condition"]) for own in controls} == {
        (arm, name) for arm in ("main", "dlfa") for name in CONTROLS
    }
    # The baseline is the one of the same arm.
    assert all(own["difference"] is None for own in controls if own["condition"] == "no_ot")
    tested = {(entry["line"], entry["unit"]) for entry in report["interactions"] if entry["test"] is not None}
    assert {line for line, _ in tested} == {"main · ot_weight 0.1", "dlfa · ot_weight 0.1"}
    own = report["conditions"][0]
    ratios = [cell.gradient_ratio["ratio"] for cell in read_study(tmp_path).cells if cell.id in own["cells"]]
    # The second ratio is of step 100, before the last quarter of 250.
    assert own["gradient_ratio"] == {"first": pytest.approx(np.mean([first for first, _ in ratios])), "late": None}
    assert own["transport"]["plan_perplexity"] == pytest.approx(20 * 0.01 / 0.11 + 1)
    assert own["retrieval"]["before"]["mean"] == 92.5
    assert own["curves"]["step"][-1] == 250
