"""The console script and the entry scripts: help, version, and user errors without a traceback."""

import dataclasses
import logging
import os
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

import xlfa
from xlfa.arguments import COMMON_TRAINING_FLAGS
from xlfa.cli import main, start_logging
from xlfa.study.grid import TRAINING_TYPES


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and xlfa.__version__ in capsys.readouterr().out


def test_help_has_examples_and_needs_no_torch():
    code = "import sys; sys.argv = ['xlfa', '--help']\nfrom xlfa.cli import main\n"
    check = "try:\n    main()\nexcept SystemExit:\n    assert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True, timeout=60)
    assert "examples:" in done.stdout


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_requests_whose_addresses_may_be_signed_are_not_logged(library, monkeypatch):
    logger = logging.getLogger(library)
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    logger.manager._clear_cache()
    start_logging(logging.INFO)
    assert not logger.isEnabledFor(logging.INFO) and logger.isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_to_a_file_is_utf_8_whatever_the_locale(encoding):
    """On Windows Python writes to files and pipes in the code page."""
    code = "from xlfa.cli import main; main(['align-score', '--help'])"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    printed = "from xlfa.errors import exit_with_message; exit_with_message(lambda argv: print('猫 …'))"
    for program in (code, printed):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == "猫 …\n"


def test_a_reader_that_wants_no_more_ends_the_command_quietly():
    lines = "[print('a' * 99) for _ in range(99999)]"
    code = f"from xlfa.errors import exit_with_message\nexit_with_message(lambda argv: {lines})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"a" * 99 + b"\n"
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 1)


@pytest.mark.parametrize("command", ["train", "eval", "retrieval", "rankc"])
def test_help_of_a_command_explains_its_flags(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert "--data_root" in capsys.readouterr().out


def test_help_of_training_shows_what_most_runs_set_and_help_all_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = []
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as done:
            main(["train", flag])
        assert done.value.code == 0
        shown.append(set(re.findall(r"^  (?:-h, )?--(\w+)", capsys.readouterr().out, re.M)))
    common, complete = shown
    assert common == {*COMMON_TRAINING_FLAGS, "help", "help_all"}
    fields = {field.name for kind in TRAINING_TYPES for field in dataclasses.fields(kind)}
    assert fields <= complete and common < complete


def test_help_names_a_flag_once_with_its_kind_and_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "--seed INT Of that sample. (default: 0)" in lines
    assert "Task to score. Needed." in lines
    assert not [line for line in lines if "max-examples" in line or "None" in line]


def test_a_missing_or_unknown_flag_of_training_leads_to_the_whole_list(capsys):
    for argv in (["--task", "xnli"], ["--model", "m", "--task", "xnli", "--learning_rat", "1"]):
        with pytest.raises(SystemExit) as done:
            main(["train", *argv, "--output_dir", "/nowhere"])
        assert done.value.code == 2
        assert "xlfa train --help_all lists all arguments" in capsys.readouterr().err


def test_help_of_vocab_has_its_commands(capsys):
    with pytest.raises(SystemExit) as done:
        main(["vocab", "--help"])
    assert done.value.code == 0
    assert "xlfa vocab augment --model" in capsys.readouterr().out


def test_a_user_error_is_one_line_and_exit_status_2(capsys):
    with pytest.raises(SystemExit) as done:
        main(["eval", "--model", "/nowhere", "--task", "xnli", "--data_root", "sample"])
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --model /nowhere") and "Traceback" not in error


def test_entry_scripts_report_user_errors_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "train_xlfa.py", "configs/none.yaml"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: no configuration file configs/none.yaml"
    assert "Traceback" not in done.stderr
