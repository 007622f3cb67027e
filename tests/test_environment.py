"""What is recorded of machine, threads, versions and the state of the code."""

import json
import subprocess

import pytest
import torch

import xlfa
from xlfa.environment import VARIABLES, code_state, describe_environment, describe_threads, processor_name, versions


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with the two packages, committed, of which this one seems to be run."""
    for package in ("xlfa", "modeling_xlfa"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "README.md").write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    monkeypatch.setattr(xlfa, "__file__", str(tmp_path / "xlfa" / "__init__.py"))
    return tmp_path


def test_the_commit_of_a_checkout_and_whether_its_code_was_changed(checkout):
    commit = git(checkout, "rev-parse", "HEAD").stdout.strip()
    (checkout / "README.md").write_text("not code")
    assert code_state() == {"commit": commit, "dirty": False}
    (checkout / "modeling_xlfa" / "__init__.py").write_text("changed")
    assert code_state() == {"commit": commit, "dirty": True}
    git(checkout, "commit", "-am", "second")
    assert code_state() == {"commit": git(checkout, "rev-parse", "HEAD").stdout.strip(), "dirty": False}
    (checkout / "xlfa" / "new.py").write_text("")
    assert code_state()["dirty"]


def test_an_installed_package_has_no_commit(checkout, monkeypatch):
    """Also where the environment lies in somebody's repository."""
    installed = checkout / ".venv" / "xlfa"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(xlfa, "__file__", str(installed / "__init__.py"))
    assert code_state() is None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert code_state() is None


def test_the_environment_holds_what_results_depend_on_and_no_token(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "very-secret")
    found = describe_environment()
    assert found["threads"] == torch.get_num_threads() and found["cpu_count"] >= 1 and found["processes"] == 1
    assert found["versions"] == versions() and found["versions"]["torch"] == torch.__version__
    assert found["variables"]["OMP_NUM_THREADS"] == "3" and "CUDA_VISIBLE_DEVICES" not in found["variables"]
    assert found["processor"] == processor_name() != ""
    assert "very-secret" not in json.dumps(found)
    assert not any("TOKEN" in name or "KEY" in name for name in set(VARIABLES) - {"TOKENIZERS_PARALLELISM"})


def test_threads_are_named():
    assert describe_threads().startswith(f"{torch.get_num_threads()} threads on ")
