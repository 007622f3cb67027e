"""The training benchmark: all sides train on the same tokens, both sides of the pass have the same losses."""

import sys

import pytest
import torch
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import training as benchmark  # noqa: E402

from xlfa.tasks import get_task  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["xnli", "xquad"])
def workload(request, tiny_encoder):
    small = ["--model", tiny_encoder, "--no_trim_vocab", "--languages", "de", "--examples", "24", "--batch_size", "8"]
    argv = ["--data_root", "sample", *small, "--steps", "2", "--memory_steps", "1", "--max_tokens_per_batch", "512"]
    return benchmark.Workload.load(get_task(request.param), benchmark.parse_arguments(argv))


@pytest.mark.parametrize("workload", ["xnli"], indirect=True)
def test_every_side_takes_every_step(workload):
    seconds = benchmark.time_sides(workload)
    assert list(seconds) == list(benchmark.SIDES)
    assert all(len(own) == 2 and min(own) > 0 for own in seconds.values())


def test_one_call_has_the_loss_of_two(workload):
    model = workload.model(**benchmark.SIDES["plain"]).eval()
    examples, pairs = next(workload.batches())
    with torch.inference_mode():
        two = model(**examples).loss + benchmark.encode_pairs(model, pairs).mean()
        # Means over the padding differ: the sentences are padded to the examples.
        one = benchmark.loss_of_one_call(model, examples, pairs)
    torch.testing.assert_close(one, two, rtol=0.02, atol=0.02)


def test_the_pass_has_the_losses_of_the_peers(workload, tmp_path):
    ours, peers = (benchmark.run_pass(workload, side, str(tmp_path / side)) for side in ("ours", "peers"))
    assert ours[0] > 0 and peers[0] > 0 and len(ours[1]) == 3
    assert ours[1] == pytest.approx(peers[1], abs=0.01)


def test_a_peak_is_that_of_the_steps(workload):
    resident = benchmark.peak_memory(workload, "+ DLFA + OT")
    assert 100 < resident < 20_000


def test_the_report_says_whether_the_targets_are_met(workload, monkeypatch):
    monkeypatch.setattr(benchmark, "memory_of_sides", lambda *_: dict.fromkeys(benchmark.SIDES, 100.0))
    slow = {side: [1.0, 1.0] for side in benchmark.SIDES} | {"+ OT": [1.2, 1.2]}
    monkeypatch.setattr(benchmark, "time_sides", lambda _: slow)
    lines, met = benchmark.additions_report(workload.task, workload, [])
    assert not met and lines[-1].startswith("NOT MET") and any("1.200" in line for line in lines)
    slow["+ OT"] = [1.05, 1.05]
    # One call of the encoder is shown and is no addition.
    slow["one call"] = [1.5, 1.5]
    lines, met = benchmark.additions_report(workload.task, workload, [])
    assert met and lines[-1].startswith("met")
    slow["+ OT"] = [1.3, 1.0]
    monkeypatch.setattr(benchmark.statistics, "median", min)
    lines, met = benchmark.additions_report(workload.task, workload, [])
    assert not met and lines[-1].startswith("NOT SHOWN, an interval")
