"""Running a study: each cell once, failures kept apart, interruptions, and cells end to end on the embedded sample."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from tqdm.auto import tqdm

import xlfa.study.running as running
from xlfa.data import SAMPLE_ROOT
from xlfa.errors import XLFAError
from xlfa.retrieval import CONFIGS
from xlfa.study.cell import describe_transport, gradient_ratios, loss_curves
from xlfa.study.commands import main
from xlfa.study.grid import Plan, PlannedCell, load_plan
from xlfa.study.leases import owner_of, take
from xlfa.study.results import RESULT_FILE, read_study
from xlfa.study.running import cell_log, claim_folder, failed_cells, finished_cells, work, worker_environment
from xlfa.study.status import FAILED_FILE, describe_status, format_seconds, format_status, survey

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = 1000.0


@pytest.fixture
def plan(tmp_path):
    """Twelve cells that only a stub can run."""
    cells = [
        PlannedCell(f"cell-{n}", ("xnli", "xquad")[n % 2], "main", n, {"n": n}, None, ("grid",), {}) for n in range(12)
    ]
    return Plan(tmp_path / "study.yaml", "stub", tmp_path / "study", None, True, tuple(cells))


def stub(cell):
    return {"id": cell.id, "seconds": {"train": 60.0, "score": 30.0 + 60 * (cell.task == "xquad")}}


def race(plan, runs, barrier, lease_seconds):
    def run(cell):
        descriptor = os.open(runs / cell.id, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        os.close(descriptor)
        time.sleep(0.02)
        return stub(cell)

    barrier.wait()
    work(plan, plan.cells, run, lease_seconds)


@pytest.mark.parametrize("left", ["nothing", "leases of dead workers"])
def test_four_processes_run_each_of_twelve_cells_once(plan, tmp_path, left):
    if left != "nothing":
        for cell in plan.cells:
            path = take(plan.folder(cell), LONG).path
            path.write_text(json.dumps({"host": "other", "machine": ["other"], "pid": 1}) + "\n")
            os.utime(path, (0, 0))
    runs = tmp_path / "runs"
    runs.mkdir()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=race, args=(plan, runs, barrier, LONG)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    by_cell = {path.name: path.read_text().splitlines() for path in runs.iterdir()}
    assert by_cell.keys() == {cell.id for cell in plan.cells}
    assert all(len(pids) == 1 for pids in by_cell.values())
    assert len({pids[0] for pids in by_cell.values()}) > 1
    assert finished_cells(plan) == list(plan.cells)


def test_a_cell_that_fails_is_recorded_and_the_others_run(plan):
    calls = []

    def run(cell):
        calls.append(cell.seed)
        if cell.seed == 1:
            raise XLFAError("--learning_rate 9: too much")
        if cell.seed == 2:
            raise ZeroDivisionError("by zero")
        return stub(cell)

    work(plan, plan.cells, run, LONG)
    assert calls == list(range(12)) and len(finished_cells(plan)) == 10
    assert failed_cells(plan) == list(plan.cells[1:3])
    first, second = (json.loads((plan.folder(cell) / FAILED_FILE).read_text()) for cell in plan.cells[1:3])
    assert first["error"] == "--learning_rate 9: too much" and second["error"] == "ZeroDivisionError: by zero"
    assert 'raise ZeroDivisionError("by zero")' in second["traceback"]
    assert "by zero" in (plan.folder(plan.cells[2]) / "log.txt").read_text()
    work(plan, plan.cells, run, LONG)
    assert len(calls) == 12
    running.clear_failures(plan, plan.cells[1:2])
    work(plan, plan.cells, run, LONG)
    assert calls[12:] == [1] and failed_cells(plan) == list(plan.cells[1:3])


def test_an_interruption_releases_the_cell_and_leaves_it_waiting(plan):
    def run(cell):
        if cell.seed == 1:
            raise KeyboardInterrupt
        return stub(cell)

    with pytest.raises(KeyboardInterrupt):
        work(plan, plan.cells, run, LONG)
    assert [each.state for each in survey(plan)] == ["done"] + ["waiting"] * 11
    work(plan, plan.cells, stub, LONG)
    assert finished_cells(plan) == list(plan.cells)


def test_cells_of_others_are_left_to_them(plan):
    with take(plan.folder(plan.cells[3]), LONG):
        work(plan, plan.cells, stub, LONG)
        assert [each.state for each in survey(plan)] == ["done"] * 3 + ["running"] + ["done"] * 8


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_worker_finds_for_a_cell_that_it_has_lost_does_not_count(plan, fails):
    def run(cell):
        if cell.seed == 0:
            (plan.folder(cell) / "leases" / "1.json").write_text(
                json.dumps({"host": "other", "machine": ["other"], "pid": 1}) + "\n"
            )
            if fails:
                raise OSError("both have written to the same file")
        return stub(cell)

    work(plan, plan.cells, run, LONG)
    assert finished_cells(plan) == list(plan.cells[1:]) and not failed_cells(plan)
    assert owner_of(plan.folder(plan.cells[0]), LONG)["host"] == "other"


def test_a_cell_that_was_finished_meanwhile_is_not_run_again(plan, monkeypatch):
    def take_late(folder, seconds):
        folder.mkdir(parents=True)
        (folder / RESULT_FILE).write_text("{}")
        return take(folder, seconds)

    monkeypatch.setattr(running, "take", take_late)
    work(plan, plan.cells[:1], lambda cell: pytest.fail("run again"), LONG)
    assert owner_of(plan.folder(plan.cells[0]), LONG) is None


def test_a_log_holds_what_is_printed_and_logged_and_the_end_of_each_bar(tmp_path, capsys):
    before = logging.getLogger().handlers[:], logging.getLogger().level
    for number in range(2):
        with cell_log(tmp_path / "log.txt"):
            print("printed", number)
            logging.getLogger("xlfa.anything").info("logged %d", number)
            for _ in tqdm(range(50), desc="outer", mininterval=0):
                for _ in tqdm(range(3), leave=False, mininterval=0):
                    pass
    text = (tmp_path / "log.txt").read_text()
    assert (logging.getLogger().handlers, logging.getLogger().level) == before
    assert "printed 0\n" in text and "logged 1\n" in text and text.count("---") == 2
    assert text.count("outer: 100%") == 2 and "\r" not in text and "\x1b" not in text
    assert capsys.readouterr() == ("", "")


def test_the_time_left_is_estimated_by_task(plan):
    folders = [plan.folder(cell) for cell in plan.cells]
    assert describe_status(plan, survey(plan))["seconds_left"] is None
    for cell, folder in zip(plan.cells[:3], folders):
        folder.mkdir(parents=True)
        (folder / RESULT_FILE).write_text(json.dumps(stub(cell)))
    folders[3].mkdir()
    (folders[3] / FAILED_FILE).write_text(json.dumps({"error": "too hot"}))
    with take(folders[4], LONG), take(folders[5], LONG):
        cells = survey(plan)
    status = describe_status(plan, cells)
    assert {name: status[name] for name in ("total", "done", "running", "failed", "waiting")} == {
        **{"total": 12, "done": 3, "running": 2, "failed": 1, "waiting": 6},
    }
    assert status["seconds_a_cell"] == {"xnli": 90.0, "xquad": 150.0}
    # Four cells of each task, by two workers.
    assert status["seconds_left"] == (4 * 90 + 4 * 150) / 2
    table = format_status(plan, cells)
    assert " 3 cell-3  failed  too hot\n" in table and f"process {os.getpid()}" in table
    assert table.endswith("xnli: 1 min 30 s a cell\nxquad: 2 min 30 s a cell\ntime left: 8 min 00 s")


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b'{"seconds": 1}', b"\xff"])
def test_a_damaged_result_is_told_and_does_not_hide_the_others(plan, content):
    folder = plan.folder(plan.cells[2])
    folder.mkdir(parents=True)
    (folder / "result.json").write_bytes(content)
    other = plan.folder(plan.cells[3])
    other.mkdir()
    (other / "failed.json").write_bytes(content)
    cells = survey(plan)
    assert [each.state for each in cells] == ["waiting", "waiting", "failed", "failed", *["waiting"] * 8]
    assert cells[2].error.startswith(f"{folder}/result.json is damaged") and "failed.json" in cells[3].error


def test_a_damaged_study_file_is_named(plan):
    claim_folder(plan)
    (plan.output_dir / "study.json").write_text("{")
    with pytest.raises(XLFAError, match="study.json is damaged"):
        claim_folder(plan)


def test_seconds_are_written_as_people_do():
    assert [format_seconds(seconds) for seconds in (0.4, 59.6, 3599.7, 7500)] == [
        *("0 s", "1 min 00 s", "1 h 00 min", "2 h 05 min")
    ]


def test_a_worker_that_breaks_down_is_an_error(plan, monkeypatch):
    start = subprocess.Popen
    code = "raise OSError('no space')"
    monkeypatch.setattr("subprocess.Popen", lambda command, **options: start([sys.executable, "-c", code], **options))
    with pytest.raises(XLFAError, match="a worker ended with status 1: OSError: no space"):
        running.start_workers(plan, 1, [])


def test_workers_share_the_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert {worker_environment(index, 4)["OMP_NUM_THREADS"] for index in range(4)} == {"2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert worker_environment(0, 4)["MKL_NUM_THREADS"] == "1"


def test_workers_share_the_accelerators(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [worker_environment(index, 3)["CUDA_VISIBLE_DEVICES"] for index in range(3)] == ["5", "7", "5"]


@pytest.mark.parametrize("change", [{"name": "other"}, {"data_root": "sample"}])
def test_a_folder_belongs_to_one_study_and_its_data(plan, change):
    claim_folder(plan)
    claim_folder(Plan(**vars(plan) | {"data_root": "/a/mirror"}))
    with pytest.raises(XLFAError, match="name another --output_dir"):
        claim_folder(Plan(**vars(plan) | change))


def test_means_of_the_transport_term_are_over_the_last_quarter():
    log = [
        {"step": step, "loss": 1.0, "task_loss": 0.5, "ot_loss": 0.1, "ot_plan_entropy": entropy, "ot_epsilon": 0.02}
        for step, entropy in [(2, 9.0), (6, 9.0), (7, 1.0), (8, 3.0)]
    ]
    log += [{"step": 4, "ot_gradient_ratio": 0.3, "task_gradient_norm": 1.0}, {"step": 8, "eval_accuracy": 50.0}]
    found = describe_transport(log, last_step=8, weight=0.1)
    assert found["plan_perplexity"] == pytest.approx(7.389, abs=1e-3)
    assert (found["epsilon"], found["iterations"], found["ot_weight"]) == (0.02, None, 0.1)
    assert loss_curves(log)["plan_entropy"] == [9.0, 9.0, 1.0, 3.0]
    assert gradient_ratios(log) == {"step": [4], "ratio": [0.3]}
    assert describe_transport([{"step": 1, "task_loss": 1.0}], 1, None) is None and gradient_ratios([]) is None


# End to end


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """The sample, and retrieval for two languages."""
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(SAMPLE_ROOT, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    folder = root / "mteb" / "tatoeba-bitext-mining"
    card = ["---", "configs:"]
    for language in ("de", "fr"):
        rows = Dataset.from_dict({"sentence1": [f"{language} a b", "c d e", "7"], "sentence2": ["a b", "d e", "7, 8"]})
        rows.to_parquet(folder / language / "test.parquet")
        card += [f"- config_name: {CONFIGS[language]}", "  data_files:", "  - split: test"]
        card += [f"    path: {language}/test.parquet"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return str(root)


@pytest.fixture
def study(tiny_encoder, tmp_path, data_root):
    """A study's file whose cells train for six steps, and its folder."""

    def write(name="study", **changes):
        content = {
            "name": "tiny",
            "output_dir": str(tmp_path / name),
            "data_root": data_root,
            "seeds": [0],
            "train": {
                "model": tiny_encoder,
                "fusion": "none",
                "freeze_layers": 2,
                "cache_trunk": True,
                "ot_weight": 0.5,
                "ot_gradient_steps": 3,
                "parallel_dataset": "local/parallel",
                "parallel_languages": ["de", "fr"],
                "max_train_examples": 48,
                "max_eval_examples": 9,
                "max_length": 128,
                "doc_stride": 32,
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "eval_strategy": "no",
                "save_strategy": "steps",
                "save_steps": 2,
                "logging_steps": 1,
            },
            "score": {"languages": ["de", "en"], "max_examples": 9, "cache_trunk": True},
            "tasks": {"xnli": {}},
            "retrieval": {"languages": ["de", "fr"]},
            "grid": {"ot_epsilon": [0.1]},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return path, tmp_path / name

    return write


@pytest.fixture(autouse=True)
def own_trunk_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XLFA_CACHE", str(tmp_path / "cache"))


def test_a_study_trains_scores_and_describes_each_cell(study, capsys):
    controls = {"no_ot": {"ot_weight": 0, "ot_gradient_steps": None}, "shuffled_pairs": {"parallel_shuffled": True}}
    path, folder = study(tasks={"xnli": {}, "xquad": {}}, controls=controls)
    main(["run", str(path)])
    assert "6 of 6 cells are finished" in capsys.readouterr().out
    found = read_study(folder)
    cells = {(cell.task, cell.control): cell for cell in found.cells}
    assert cells.keys() == {(task, control) for task in ("xnli", "xquad") for control in (None, *controls)}
    for task in ("xnli", "xquad"):
        # The same head, examples and source sentences at the first step, but other translations.
        true, plain, shuffled = (cells[task, control].curves for control in (None, *controls))
        assert true["task_loss"][0] == plain["task_loss"][0] == shuffled["task_loss"][0]
        assert true["ot_loss"][0] != shuffled["ot_loss"][0]
    for cell in found.cells:
        aligned = cell.control != "no_ot"
        assert (cell.study, cell.arm, cell.seed) == ("tiny", "main", 0)
        assert cell.validation.keys() >= {"eval_accuracy" if cell.task == "xnli" else "eval_f1"}
        assert set(cell.scores["languages"]) == {"de", "en"} == set(cell.read_sums())
        assert set(cell.retrieval["before"]) == set(cell.retrieval["after"]) == {"de", "fr"}
        assert cell.curves["step"] == [1, 2, 3, 4, 5, 6] and None not in cell.curves["task_loss"]
        assert (None in cell.curves["ot_loss"]) is not aligned
        assert (cell.transport is not None) is aligned
        assert (cell.gradient_ratio is not None) is aligned
        assert not aligned or cell.gradient_ratio["step"] == [0, 3]
        assert cell.seconds.keys() == {"train", "score", "retrieval"} and cell.threads >= 1
        run = cell.folder / "run"
        assert not [*run.glob("checkpoint-*"), *run.glob("*.safetensors")]
        assert str(folder) not in json.dumps(cell.settings)
    assert len(list((folder / "retrieval_before").iterdir())) == 1
    before = {cell.id: (cell.folder / RESULT_FILE).stat().st_mtime_ns for cell in found.cells}
    main(["run", str(path)])
    assert {cell.id: (cell.folder / RESULT_FILE).stat().st_mtime_ns for cell in found.cells} == before


KILLED_WORKER = """
import os, signal, sys
from transformers import TrainerCallback
from xlfa import training

class Kill(TrainerCallback):
    def on_save(self, args, state, control, **_):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

training.early_stopping = lambda args: [Kill()]
from xlfa.study.commands import main
main(["run", sys.argv[1]])
"""


# Takes over the cell, and runs an unbroken one. Not in the process of the tests: what ran before in a process may
# change the last bits of a result.
OTHER_WORKER = """
import sys
from xlfa.study.commands import main
# Nobody has to wait for the time limit on the machine of the dead worker.
main(["run", sys.argv[1], "--lease_seconds", "100000"])
main(["run", sys.argv[2]])
"""


def test_a_cell_whose_worker_was_killed_ends_as_an_unbroken_one(study):
    path, folder = study(keep_models=True)
    whole_path, whole_folder = study("whole", keep_models=True)
    done = subprocess.run([sys.executable, "-c", KILLED_WORKER, str(path)], capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL
    (cell,) = load_plan(path).cells
    cell_folder = folder / "cells" / cell.id
    assert (cell_folder / "run" / "checkpoint-4").is_dir() and not (cell_folder / RESULT_FILE).exists()
    subprocess.run([sys.executable, "-c", OTHER_WORKER, str(path), str(whole_path)], check=True, timeout=300)
    broken = json.loads((cell_folder / RESULT_FILE).read_text())
    run = json.loads((cell_folder / "run" / "run.json").read_text())
    assert broken["sittings"] == 2 and run["sittings"][1]["resumed_from"].endswith("checkpoint-4")

    unbroken = json.loads((whole_folder / "cells" / cell.id / RESULT_FILE).read_text())
    assert unbroken["sittings"] == 1
    differing = {name for name in unbroken if broken[name] != unbroken[name]}
    assert differing <= {"seconds", "sittings", "finished"}
    weights = [load_file(each / "cells" / cell.id / "run" / "model.safetensors") for each in (folder, whole_folder)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_failed_cells_end_with_a_status_of_their_own_and_are_run_again_on_request(study, tmp_path, capsys):
    path, folder = study(retrieval=None)
    parallel = Path(yaml.safe_load(path.read_text())["data_root"]) / "local" / "parallel"
    shutil.move(parallel, tmp_path / "elsewhere")
    try:
        for _ in range(2):
            with pytest.raises(SystemExit) as done:
                main(["run", str(path)])
            assert done.value.code == running.FAILED_STATUS
            printed = capsys.readouterr()
            assert "0 of 1 cells are finished" in printed.out and "--retry_failed" in printed.err
            assert "no data set 'local/parallel'" in printed.err and "Traceback" not in printed.err
    finally:
        shutil.move(tmp_path / "elsewhere", parallel)
    main(["status", str(path)])
    assert "failed  no data set 'local/parallel'" in capsys.readouterr().out
    main(["run", str(path), "--retry_failed"])
    capsys.readouterr()
    main(["status", str(path), "--json"])
    status = json.loads(capsys.readouterr().out)
    assert (status["done"], status["failed"], status["seconds_left"]) == (1, 0, 0)
    assert status["cells"][0]["seconds"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cell", "1"], "--cell 1: .* has 1 cells, 0 to 0"),
        (["--workers", "0"], "--workers 0: at least 1"),
        (["--workers", "2", "--cell", "0"], "--cell 0 is one cell"),
        (["--lease_seconds", "0"], "--lease_seconds 0: more than 0"),
        (["--data_root", "/nowhere"], "--data_root /nowhere"),
    ],
)
def test_bad_flags_are_refused(study, flags, message):
    path, _ = study()
    with pytest.raises(XLFAError, match=message):
        main(["run", str(path), *flags])


def test_a_launcher_of_several_processes_is_refused(study, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(XLFAError, match="started 2 processes .* --workers"):
        main(["run", str(study()[0])])


@pytest.mark.full
def test_workers_finish_a_study_and_an_interrupted_one_goes_on(study):
    path, folder = study(seeds=[0, 1, 2])
    code = "from xlfa.cli import main; main()"
    command = [sys.executable, "-c", code, "study", "run", str(path), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    plan = load_plan(path)
    while not any(owner_of(plan.folder(cell)) for cell in plan.cells):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert not any(owner_of(plan.folder(cell)) for cell in plan.cells)
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 cells are finished" in done.stdout
    assert len(read_study(folder).cells) == 3
