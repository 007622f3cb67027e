"""The cluster bootstrap: coverage, what clusters and a shared draw change, p values, and sums that give every score."""

import numpy as np
import pytest
from scipy import stats

from xlfa.statistics import CONFIDENCE, adjusted, bootstrap, cluster_numbers, number_of_draws, p_value
from xlfa.tasks import TASKS, Prediction
from xlfa.tasks.question_answering import QuestionAnsweringTask
from xlfa.tasks.token_classification import TokenClassificationTask


def means(sums):
    """The mean of each language and their difference, where there are two."""
    table = {language: {"mean": own["x"][..., 0] / own["x"][..., 1]} for language, own in sums.items()}
    if len(table) == 2:
        table["gap"] = {"mean": table["en"]["mean"] - table["de"]["mean"]}
    return table


def counts(**values):
    return {language: {"x": np.stack([x, np.ones_like(x)], -1)} for language, x in values.items()}


def correlated(rng, clusters, size):
    """Normal values with mean 0; 0.8 of their variance is between clusters."""
    between, within = rng.normal(size=clusters), rng.normal(size=(clusters, size))
    return (np.sqrt(0.8) * between[:, None] + np.sqrt(0.2) * within).ravel()


def some_predictions(task, rng, number=60):
    """Right and wrong predictions with everything that a task's scores look at."""
    words = "the fish market of 1887 der Markt السوق 鱼市场 a".split()
    rows = []
    for position in range(number):
        if isinstance(task, QuestionAnsweringTask):
            answers = [" ".join(rng.choice(words, rng.integers(1, 4))) for _ in range(rng.integers(1, 3))]
            prediction = answers[0] if rng.random() < 0.3 else " ".join(rng.choice(words, rng.integers(0, 4)))
            rows.append(Prediction(str(position), prediction, answers, 0.5))
        elif isinstance(task, TokenClassificationTask):
            tags = [str(tag) for tag in rng.choice(task.label_names, rng.integers(1, 9))]
            guesses = [None, *task.label_names]
            predicted = [guesses[rng.integers(len(guesses))] if rng.random() < 0.4 else tag for tag in tags]
            rows.append(Prediction(str(position), predicted, tags, 0.5))
        else:
            label, prediction = rng.choice(task.label_names, 2)
            rows.append(Prediction(str(position), str(prediction), str(label), 0.5))
    return rows


@pytest.mark.parametrize("language", ["en", "ar", "ko"])
@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_summed_contributions_give_the_scores_of_the_task(task, language):
    predictions = some_predictions(task, np.random.default_rng(4))
    contributions = task.contributions(predictions, language)
    found = {metric: task.score_of_sums(metric, values.sum(0)) for metric, values in contributions.items()}
    expected = {metric: value for metric, value in task.score(predictions, language).items() if value is not None}
    assert all(values.shape[0] == len(predictions) for values in contributions.values())
    assert found == pytest.approx(expected)
    assert all(0 < value < 100 for value in found.values())


def test_a_ratio_with_nothing_in_the_whole_is_zero():
    task = TASKS["wikiann"]
    nothing = [Prediction("0", ["O"], ["O"], 1.0), Prediction("1", ["O", "O"], ["O", "O"], 1.0)]
    values = task.contributions(nothing, "en")["f1"]
    assert task.score_of_sums("f1", np.stack([values.sum(0)] * 3)).tolist() == [0.0] * 3


def test_clusters_are_numbered_as_they_appear():
    assert cluster_numbers(["b", "a", "b", "c"]) == [0, 1, 0, 2]


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(300):
        interval = bootstrap(
            means, counts(en=correlated(rng, 50, 3)), [number // 3 for number in range(150)], draws=499, seed=seed
        )[1]["en"]["mean"]
        held += interval[0] <= 0 <= interval[1]
    # Three standard errors of 300 tries, and a percentile interval over 50 clusters is a little short.
    assert CONFIDENCE - 0.05 <= held / 300 <= CONFIDENCE + 0.04


def test_intervals_over_correlated_clusters_are_wider_than_over_examples():
    values = counts(en=correlated(np.random.default_rng(2), 100, 5))
    (low, high), (low_alone, high_alone) = (
        bootstrap(means, values, clusters)[1]["en"]["mean"]
        for clusters in ([number // 5 for number in range(500)], list(range(500)))
    )
    # The variance of the mean has the factor 1 + (5 - 1) 0.8.
    assert (high - low) / (high_alone - low_alone) == pytest.approx(np.sqrt(4.2), rel=0.15)


def test_clusters_of_one_agree_with_the_bootstrap_of_scipy():
    values = np.random.default_rng(3).exponential(size=80)
    table, intervals, draws = bootstrap(means, counts(en=values), list(range(80)))
    expected = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(5))
    assert table["en"]["mean"] == pytest.approx(values.mean())
    assert intervals["en"]["mean"] == pytest.approx(list(expected.confidence_interval), abs=0.02)
    assert draws["en"]["mean"].std() == pytest.approx(expected.standard_error, rel=0.03)


def test_the_seed_decides_the_draws():
    values, clusters = counts(en=np.arange(30.0)), list(range(30))
    first, again, other = (bootstrap(means, values, clusters, draws=200, seed=seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_parallel_languages_share_a_draw_and_others_do_not():
    x = np.random.default_rng(6).normal(size=200)
    values, clusters = counts(en=x, de=x + 1.0), list(range(200))
    assert bootstrap(means, values, clusters)[1]["gap"]["mean"] == pytest.approx([-1.0, -1.0])
    low, high = bootstrap(means, values, {"en": clusters, "de": clusters})[1]["gap"]["mean"]
    assert high - low == pytest.approx(2 * 1.96 * x.std() * np.sqrt(2 / 200), rel=0.1)


def test_batches_of_draws_leave_the_draws_as_they_are(monkeypatch):
    values, clusters = counts(en=np.arange(30.0)), list(range(30))
    whole = bootstrap(means, values, clusters, draws=100)[2]["en"]["mean"]
    monkeypatch.setattr("xlfa.statistics.BATCH_WORK", 30 * 10)
    assert bootstrap(means, values, clusters, draws=100)[2]["en"]["mean"].tolist() == whole.tolist()


def test_very_large_sets_get_fewer_draws():
    assert number_of_draws(list(range(5000))) == 9999
    assert number_of_draws({code: list(range(10_000)) for code in ("en", "de", "ru", "fr")}) == 5000
    assert number_of_draws([10**7]) == 999


def test_p_is_1_without_a_difference_and_small_for_a_known_shift():
    rng = np.random.default_rng(7)
    clusters = list(range(100))
    x = rng.normal(size=100)
    values = {"same": x - x, "noise": x - x.mean(), "shift": x + 0.5}
    draws = {name: bootstrap(means, counts(en=value), clusters)[2]["en"]["mean"] for name, value in values.items()}
    assert p_value(draws["same"]) == 1.0
    assert p_value(draws["noise"]) > 0.9
    assert p_value(draws["shift"]) < 0.001
    assert p_value(np.ones(9999)) == pytest.approx(2 / 10_000)


def test_p_is_small_as_often_as_it_says_where_there_is_no_difference():
    rng = np.random.default_rng(8)
    small = [
        p_value(
            bootstrap(means, counts(en=rng.normal(size=60)), list(range(60)), draws=499, seed=seed)[2]["en"]["mean"]
        )
        < 0.1
        for seed in range(300)
    ]
    assert np.mean(small) == pytest.approx(0.1, abs=0.06)


def test_p_values_of_several_hypotheses_are_adjusted_after_benjamini_and_hochberg():
    assert adjusted([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.04 * 4 / 3, 0.04 * 4 / 3, 0.5])
    assert adjusted([]) == []
