"""`run.json`: the exact command, the settings and the environment of every sitting, from the start on."""

import json

import pytest

from xlfa.errors import XLFAError
from xlfa.publishing import read_run
from xlfa.run_file import RUN_FILE, has_finished_run, is_finished
from xlfa.trainer import XLFATrainer
from xlfa.training import main


def flags_for(encoder, output):
    data = ["--task", "xnli", "--data_root", "sample", "--max_train_examples", "8", "--max_eval_examples", "3"]
    steps = ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "4"]
    return ["--model", encoder, "--output_dir", str(output), *data, *steps]


class Interruption(Exception):
    pass


def interrupt(monkeypatch, step):
    """Ends the training, as a kill would, before the optimizer step after `step`."""
    plain = XLFATrainer.training_step

    def training_step(trainer, *arguments):
        if trainer.state.global_step == step:
            raise Interruption
        return plain(trainer, *arguments)

    monkeypatch.setattr(XLFATrainer, "training_step", training_step)


def read(folder):
    return json.loads((folder / RUN_FILE).read_text())


@pytest.fixture(scope="module")
def runs(tiny_encoder, tmp_path_factory):
    """A run that is interrupted before its first checkpoint, begun anew, interrupted after it, and resumed; and what
    `run.json` held at each of these times."""
    folder = tmp_path_factory.mktemp("run") / "run"
    flags, found = flags_for(tiny_encoder, folder), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "very-secret")
        for step, more in ((0, []), (1, []), (2, ["--resume_from_checkpoint", "true"])):
            with patch.context() as inner:
                interrupt(inner, step)
                if step < 2:
                    with pytest.raises(Interruption):
                        main([*flags, *more])
                else:
                    main([*flags, *more])
            found.append(read(folder))
    return folder, flags, found


def test_it_is_there_from_the_start_and_has_scores_only_at_the_end(runs):
    _, flags, (first, second, last) = runs
    assert first["validation"] is None and not is_finished(first)
    assert len(first["sittings"]) == len(second["sittings"]) == 1
    assert first["sittings"][0]["command"] == ["xlfa", "train", *flags]
    assert "eval_accuracy" in last["validation"] and is_finished(last)


def test_every_sitting_has_its_command_and_environment(runs):
    folder, flags, (_, second, last) = runs
    earlier, sitting = last["sittings"]
    assert [earlier] == second["sittings"] and earlier["resumed_from"] is None
    assert sitting["command"] == ["xlfa", "train", *flags, "--resume_from_checkpoint", "true"]
    assert sitting["resumed_from"] == str(folder / "checkpoint-1")
    assert sitting["environment"]["threads"] == last["threads"] >= 1
    assert sitting["environment"]["versions"] == last["versions"]
    assert {"platform", "processor", "distributed_type", "variables"} <= sitting["environment"].keys()
    assert sitting["code"] is None or len(sitting["code"]["commit"]) == 40


def test_it_holds_every_setting(runs):
    run = read(runs[0])
    assert run["task"] == "xnli" and run["data_arguments"]["max_train_examples"] == 8
    assert run["training_arguments"]["max_steps"] == 2 and run["model_arguments"]["ot_weight"] is None


def test_no_token_is_in_any_file(runs):
    files = [path for path in runs[0].rglob("*") if path.is_file()]
    assert len(files) > 20 and not any(b"very-secret" in path.read_bytes() for path in files)


def test_a_token_on_the_command_line_is_refused(tiny_encoder, tmp_path):
    with pytest.raises(XLFAError, match="--hub_token would be seen by others: .* set HF_TOKEN") as error:
        main([*flags_for(tiny_encoder, tmp_path / "run"), "--hub_token", "very-secret"])
    assert "very-secret" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_finished_run_is_not_begun_again(runs, tiny_encoder):
    assert has_finished_run(runs[0])
    with pytest.raises(XLFAError, match="holds an earlier run"):
        main(flags_for(tiny_encoder, runs[0]))


def test_an_unfinished_run_is_not_published(tmp_path, runs):
    (tmp_path / RUN_FILE).write_text(json.dumps(runs[2][0]))
    with pytest.raises(XLFAError, match="a run that was not finished .*--resume_from_checkpoint true"):
        read_run(tmp_path)
