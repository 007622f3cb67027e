"""Running the cells of a study: one after the other in a process, in several processes, or on several machines."""

import contextlib
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import transformers
from tqdm.auto import tqdm

from xlfa.errors import XLFAError
from xlfa.files import writable_folder, write_text
from xlfa.study.cell import remove_weights
from xlfa.study.encoders import data_kind
from xlfa.study.grid import Plan, PlannedCell
from xlfa.study.leases import LeaseLost, take
from xlfa.study.results import FAILED_FILE, RESULT_FILE

logger = logging.getLogger(__name__)

LOG_FILE = "log.txt"
STUDY_FILE = "study.json"
WORKERS_FOLDER = "workers"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")
POLL_SECONDS = 1.0
# How `xlfa study run` ends where cells failed, which their folders say; 1 is that of an exception.
FAILED_STATUS = 3
# What is left to workers, after they were told to end, to release their cells.
GRACE_SECONDS = 30.0

# What runs a cell: returns the content of its `result.json`.
Run = Callable[[PlannedCell], dict[str, Any]]


def claim_folder(plan: Plan) -> None:
    """Raise `XLFAError` if the study's folder is another study's, or of other data: their cells would be mixed."""
    path = writable_folder(plan.output_dir) / STUDY_FILE
    claim = {"name": plan.name, "data": data_kind(plan.data_root)}
    if not path.is_file():
        write_text(path, json.dumps(claim, indent=2) + "\n")
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise XLFAError(
            f"{path} is damaged: write {json.dumps(claim)} into it, if the cells are of this study"
        ) from None
    for name, value in claim.items():
        if found.get(name) != value:
            raise XLFAError(
                f"{plan.output_dir} holds a study of {name} {found.get(name)!r}, and {plan.file} is one of {name} "
                f"{value!r}: name another --output_dir"
            )


def clear_failures(plan: Plan, cells: Sequence[PlannedCell]) -> None:
    """Let failed cells be run again."""
    for cell in cells:
        (plan.folder(cell) / FAILED_FILE).unlink(missing_ok=True)


def failed_cells(plan: Plan) -> list[PlannedCell]:
    """Cells that failed and were not run again since."""
    return [cell for cell in plan.cells if _is_settled(plan.folder(cell)) and not _has(plan, cell, RESULT_FILE)]


def finished_cells(plan: Plan) -> list[PlannedCell]:
    """Cells with a result."""
    return [cell for cell in plan.cells if _has(plan, cell, RESULT_FILE)]


def work(plan: Plan, cells: Sequence[PlannedCell], run: Run, lease_seconds: float) -> None:
    """Run, one after the other, the cells that are neither finished, failed nor another worker's.

    A cell that fails is recorded in its folder, and the next one begins.
    """
    with cell_bar(plan) as bar:
        # Anew while there was something to do: meanwhile another worker may have died.
        while any([_run_leased(plan, cell, run, lease_seconds, bar) for cell in cells]):
            pass


def _run_leased(plan: Plan, cell: PlannedCell, run: Run, lease_seconds: float, bar: tqdm) -> bool:
    """Whether the cell was this worker's."""
    folder = plan.folder(cell)
    if _has(plan, cell, RESULT_FILE):
        # A worker may have been killed between the result and this.
        remove_weights(folder, plan.keep_models)
    if _is_settled(folder):
        return False
    lease = take(folder, lease_seconds)
    if lease is None:
        return False
    try:
        with lease:
            # Another worker may have finished it since.
            if _is_settled(folder):
                return False
            bar.set_postfix_str(cell.id)
            with cell_log(folder / LOG_FILE):
                name, outcome = _outcome(cell, run)
            lease.confirm()
            write_text(folder / name, json.dumps(outcome, indent=1, ensure_ascii=False) + "\n")
            if name == RESULT_FILE:
                remove_weights(folder, plan.keep_models)
    except (KeyboardInterrupt, LeaseLost):
        if not lease.lost:
            raise
        logger.warning("%s was taken over by another worker", cell.id)
    bar.n = len(finished_cells(plan))
    bar.refresh()
    return True


def _outcome(cell: PlannedCell, run: Run) -> tuple[str, dict[str, Any]]:
    """The file that tells what came out, and its content."""
    try:
        return RESULT_FILE, run(cell)
    except Exception as error:
        message = str(error) if isinstance(error, XLFAError) else f"{type(error).__name__}: {error}"
        logger.error("failed: %s", message, exc_info=True)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        return FAILED_FILE, {"error": message, "traceback": traceback.format_exc(), "failed": when}


def _is_settled(folder: Path) -> bool:
    return (folder / RESULT_FILE).is_file() or (folder / FAILED_FILE).is_file()


def _has(plan: Plan, cell: PlannedCell, name: str) -> bool:
    return (plan.folder(cell) / name).is_file()


class CellBar(tqdm):
    """Has its own list of bars: those within a cell, which go to its log, must not be placed below this one."""

    _instances = WeakSet()


def cell_bar(plan: Plan) -> CellBar:
    """A progress bar over the cells of the study."""
    return CellBar(desc=f"study {plan.name}", total=len(plan.cells), initial=len(finished_cells(plan)), unit="cell")


@contextmanager
def cell_log(path: Path) -> Iterator[None]:
    """Append what is logged and printed to a file; of progress bars their last state alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    with path.open("a", encoding="utf-8") as file:
        print(f"--- {datetime.now(UTC).isoformat(timespec='seconds')}, process {os.getpid()}", file=file, flush=True)
        stream = _LogStream(file)
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        others, level = root.handlers[:], root.level
        root.handlers[:] = [handler]
        root.setLevel(logging.INFO)
        # Its own handler has the terminal's stream.
        transformers.utils.logging.disable_default_handler()
        transformers.utils.logging.enable_propagation()
        try:
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                yield
        finally:
            transformers.utils.logging.disable_propagation()
            transformers.utils.logging.enable_default_handler()
            root.handlers[:] = others
            root.setLevel(level)


class _LogStream(io.TextIOBase):
    """Text to a file, but of a line that is written over again and again (`\\r`) the last state alone."""

    UP = "\x1b[A"

    def __init__(self, file: io.TextIOBase):
        self.file = file
        self.line = ""

    def write(self, text: str) -> int:
        *complete, self.line = (self.line + text.replace(self.UP, "")).split("\n")
        for line in complete:
            self.file.write(line.rstrip("\r").rpartition("\r")[2] + "\n")
        self.line = self.line.rpartition("\r")[2] if not self.line.endswith("\r") else self.line
        self.file.flush()
        return len(text)


def start_workers(plan: Plan, number: int, flags: list[str]) -> None:
    """Run the study in that many processes, with the machine's threads divided among them.

    Args:
        flags: of `xlfa study run`, for each.

    Raises:
        XLFAError: if a worker ended otherwise than by coming to the end of the cells.
    """
    logs = [plan.output_dir / WORKERS_FOLDER / f"{socket.gethostname()}-{index}.txt" for index in range(number)]
    logs[0].parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", "from xlfa.cli import main; main()", "study", "run", str(plan.file), *flags]
    workers = []
    try:
        for index, log in enumerate(logs):
            with log.open("w", encoding="utf-8") as file:
                environment = os.environ | worker_environment(index, number)
                # In a session of its own: Ctrl-C reaches this process alone, which ends each worker once.
                workers.append(
                    subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
                )
        with cell_bar(plan) as bar:
            while any(worker.poll() is None for worker in workers):
                bar.n = len(finished_cells(plan))
                bar.refresh()
                time.sleep(POLL_SECONDS)
            bar.n = len(finished_cells(plan))
            bar.refresh()
    finally:
        _end(workers)
    for worker, log in zip(workers, logs):
        if worker.returncode not in (0, FAILED_STATUS):
            raise XLFAError(f"a worker ended with status {worker.returncode}: {_last_line(log)} ({log}); run it again")


def worker_environment(index: int, number: int) -> dict[str, str]:
    """The environment variables of one of `number` workers: its share of the threads, and its accelerator."""
    available = int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads())
    threads = str(max(1, available // number))
    found = dict.fromkeys(THREAD_VARIABLES, threads)
    devices = torch.cuda.device_count()
    if devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
        found["CUDA_VISIBLE_DEVICES"] = visible[index % devices]
    return found


def _end(workers: list[subprocess.Popen]) -> None:
    running = [worker for worker in workers if worker.poll() is None]
    for worker in running:
        worker.terminate()
    for worker in running:
        try:
            worker.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "without a word"


@contextmanager
def ending_on_signal() -> Iterator[None]:
    """Let a SIGTERM (of a scheduler, the process that started this one, or a lost lease) interrupt as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
