"""A run that is killed by SIGKILL at any moment, and resumed, ends as an unbroken one: weights and order of the data.

`tests/kill/kill_runs.py` trains; the long test writes what it did to `tests/kill/output.txt`.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file

from xlfa.run_file import RUN_FILE

SCRIPT = REPOSITORY / "tests" / "kill" / "kill_runs.py"
# A fork must not find threads that its parent began.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
LAST_CHECKPOINT = "checkpoint-24"


def train_and_kill(encoder, folder, runs, kills):
    """What the script printed: a line for each kill."""
    command = [sys.executable, str(SCRIPT), encoder, str(folder), str(runs), str(kills)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count(" killed in step ") == runs * kills
    return done.stdout


def inputs_of(folder, run, sitting):
    """Step and digest of each batch that a sitting was trained on; the last line may have been cut by the kill."""
    path = folder / "inputs" / run / str(sitting)
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(int(step), digest) for step, digest in lines]


def check_run(folder, run, kills):
    for name in ("model.safetensors", f"{LAST_CHECKPOINT}/model.safetensors"):
        expected, found = (load_file(folder / each / name) for each in ("unbroken", run))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), run
    expected, found = (torch.load(folder / each / LAST_CHECKPOINT / "optimizer.pt") for each in ("unbroken", run))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

    whole = inputs_of(folder, "unbroken", 0)
    assert len({digest for _, digest in whole}) == len(whole) == 2 * 24
    trained = set()
    for sitting in range(kills + 1):
        own = inputs_of(folder, run, sitting)
        # A sitting begins at a step, with that step's first batch.
        rest = [entry for entry in whole if own and entry[0] >= own[0][0]]
        assert own == rest[: len(own)], (run, sitting)
        trained.update(own)
    assert trained == set(whole)

    content = json.loads((folder / run / RUN_FILE).read_text())
    assert "eval_accuracy" in content["validation"]
    assert content["sittings"][-1]["resumed_from"].startswith(str(folder / run / "checkpoint-"))
    # With --save_total_limit 1: the last one, and the best one by the validation scores.
    assert (folder / run / LAST_CHECKPOINT).is_dir() and len(list((folder / run).glob("checkpoint-*"))) <= 2


def test_three_kills(tiny_encoder, tmp_path):
    train_and_kill(tiny_encoder, tmp_path, runs=1, kills=3)
    check_run(tmp_path, "killed-0", kills=3)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_twenty_kills(tiny_encoder, tmp_path):
    runs, kills = 5, 4
    output = train_and_kill(tiny_encoder, tmp_path, runs, kills)
    for number in range(runs):
        check_run(tmp_path, f"killed-{number}", kills)
    equal = f"{runs * kills} kills: weights, optimizer and order of the data equal those of the unbroken run\n"
    (SCRIPT.parent / "output.txt").write_text(output + equal)
