"""`make quickstart` in a folder that has nothing but the checkout's files: both tasks are trained and scored."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from xlfa.tasks import get_task


@pytest.fixture
def checkout(tmp_path):
    """A working folder like a checkout with this environment installed in it."""
    for name in ("configs", "constraints.txt", "eval_xlfa.py", "pyproject.toml", "train_xlfa.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    # Newer than what it is made from: nothing is installed.
    (tmp_path / ".venv" / ".installed").touch()
    return tmp_path


@pytest.mark.full
@pytest.mark.offline
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_quickstart_trains_and_scores_both_tasks(checkout):
    command = ["make", "--file", str(REPOSITORY / "Makefile"), f"PYTHON={sys.executable}", "quickstart"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for name in ("xnli", "xquad"):
        languages = sorted(get_task(name).check_languages(None, "sample"))
        folder = checkout / "runs" / "quickstart" / name / "scores" / name
        scores = json.loads((folder / "scores.json").read_text())
        assert sorted(scores["languages"]) == languages
        assert (folder / "scores.png").stat().st_size > 1000
        assert sorted(path.stem for path in (folder / "predictions").iterdir()) == languages
        for language in languages:
            rows = (folder / "predictions" / f"{language}.jsonl").read_text().splitlines()
            assert [json.loads(row)["id"] for row in rows] == scores["ids"]
    assert done.stdout.count("average_xtreme") == 2
