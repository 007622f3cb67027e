"""The benchmark of a study: its sides have the same cells, and its verdict follows from seconds and scores."""

import sys

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import study as benchmark  # noqa: E402

from xlfa.study.grid import load_plan  # noqa: E402

SMALL = ["--data_root", "sample", "--steps", "2", "--examples", "18", "--epsilons", "0.1", "--tasks", "xnli"]


@pytest.fixture
def options(tiny_encoder):
    return benchmark.parse_arguments([*SMALL, "--model", tiny_encoder, "--seeds", "1"])


def sweep(seconds, *scores, train=1.0):
    found = {("xnli", 0.1, seed): score for seed, score in enumerate(scores)}
    return benchmark.Sweep(seconds, {cell: {"train": train, "score": 2.0} for cell in found}, found)


def test_sides_differ_in_the_cache_and_the_frozen_layers_alone(options, tmp_path):
    def cells(side):
        file = tmp_path / "study.yaml"
        file.write_text(benchmark.yaml.safe_dump(benchmark.study_of_side(side, options, tmp_path)))
        return load_plan(file).cells

    options.seeds, options.epsilons = 2, [0.1, 1.0]
    cached, frozen, unfrozen = map(cells, benchmark.SIDES)
    assert (len(cached), len(frozen), len(unfrozen)) == (4, 4, 1)
    assert unfrozen[0].point["ot_epsilon"] == 1.0
    for own, other in zip(cached, frozen):
        assert own.settings["train"] | {"cache_trunk": False} == other.settings["train"]
        assert (own.settings["score"]["cache_trunk"], other.settings["score"]["cache_trunk"]) == (True, False)
    # Two steps of 16 examples and as many pairs, of ten languages.
    train = cached[0].settings["train"]
    assert (train["max_train_examples"], train["parallel_pairs_per_language"]) == (32, 4)
    assert frozen[0].settings["train"]["freeze_layers"] == 8 and unfrozen[0].settings["train"]["freeze_layers"] == 0


@pytest.mark.parametrize(
    ("cached", "scores", "met"), [(64, (50.0, 51.0), True), (66, (50.0, 51.0), False), (64, (50.0, 54.0), False)]
)
def test_the_verdict(options, cached, scores, met):
    sweeps = {
        benchmark.CACHED: sweep(cached, *scores),
        benchmark.REFERENCE: sweep(100, 50.5, 51.0),
        benchmark.UNFROZEN: sweep(80, 60.0, train=4.0),
    }
    text, found = benchmark.report(options, [], sweeps)
    assert found is met and text.splitlines()[-2].startswith("met" if met else "NOT MET")
    assert f"{cached / 100:.3f} of the same cells" in text
    # Of the one cell that all sides have: 3 s beside 6.
    rows = [[field.strip() for field in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [row[-2:] for row in rows[2:]] == [["3.0", "0.500"], ["3.0", "0.500"], ["6.0", "1.000"]]


@pytest.mark.full
def test_the_benchmark_runs(tiny_encoder, tmp_path, capsys):
    study = tmp_path / "study.yaml"
    content = benchmark.read_mapping(benchmark.STUDY)
    content["train"] |= {"freeze_layers": 1, "parallel_filter": None, "parallel_pairs_per_language": 8}
    content["train"]["parallel_languages"] = ["de"]
    content["tasks"]["xnli"]["train"].pop("train_dataset")
    study.write_text(benchmark.yaml.safe_dump(content))
    output = tmp_path / "report.txt"
    with pytest.raises(SystemExit):
        benchmark.main(
            [
                *SMALL,
                "--seeds",
                "2",
                "--tasks",
                "xnli",
                "--model",
                tiny_encoder,
                "--study",
                str(study),
                "--output",
                str(output),
            ]
        )
    text = output.read_text()
    assert text == capsys.readouterr().out
    assert "| frozen, cached | 2 " in text and "| unfrozen       | 1 " in text
