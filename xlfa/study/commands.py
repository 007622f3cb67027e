"""The command line of `xlfa study`: run a study, see how far it is, report on it."""

import argparse
import json
import logging
import os
import sys
from functools import partial
from pathlib import Path

import transformers

from xlfa.cli import add_command, start_logging
from xlfa.errors import XLFAError
from xlfa.files import writable_folder
from xlfa.study.grid import Plan, PlannedCell, check_models, load_plan
from xlfa.study.leases import LEASE_SECONDS
from xlfa.study.results import FAILED_FILE
from xlfa.study.status import describe_status, format_status, survey

EPILOG = """examples:
  xlfa study run configs/study/sample.yaml                               # every cell, one after the other
  xlfa study run STUDY.yaml --data_root DATA --workers 4                 # four at a time
  xlfa study run STUDY.yaml --data_root DATA --cell $SLURM_ARRAY_TASK_ID # one cell
  xlfa study status configs/study/sample.yaml
  xlfa study report configs/study/sample.yaml

A finished cell is never run again, an interrupted one goes on. Any number of workers, on any machines that share the
folder, may run the same study at the same time.
"""
REPORT_FOLDER = "report"


def main(argv: list[str] | None = None) -> None:
    """Entry point of `xlfa study`."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    start_logging(logging.INFO)
    COMMANDS[arguments.command](arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xlfa study",
        description="A grid of training runs with controls and seeds: run it, see how far it is, report on it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|status|report")
    run = add_command(
        commands,
        "run",
        "run the cells that are not finished",
        "xlfa study run STUDY.yaml --data_root DATA --workers 4",
    )
    status = add_command(
        commands,
        "status",
        "which cells are done, running, failed or waiting, and the time left",
        "xlfa study status configs/study/sample.yaml --json",
    )
    report = add_command(
        commands,
        "report",
        "a page with figures, tables and tests",
        "xlfa study report configs/study/sample.yaml",
    )
    for command in (run, status):
        command.add_argument("file", type=Path, metavar="FILE", help="the study's YAML file")
        command.add_argument(
            "--data_root", metavar="DIR", help="folder with data sets as <org>/<name> instead of the Hub, or 'sample'"
        )
        command.add_argument(
            "--lease_seconds",
            type=float,
            default=LEASE_SECONDS,
            metavar="S",
            help="a worker without a sign of life for that long has lost its cell (%(default)g; alike on all machines)",
        )
    for command in (run, status, report):
        command.add_argument("--output_dir", metavar="DIR", help="the study's folder, instead of the file's")
    run.add_argument("--cell", type=int, metavar="I", help="run that cell alone, counted from 0")
    run.add_argument("--workers", type=int, metavar="N", help="run N processes, the threads divided among them")
    run.add_argument("--retry_failed", action="store_true", help="run failed cells again")
    status.add_argument("--json", action="store_true", help="print JSON")
    report.add_argument("study", type=Path, metavar="FILE_OR_FOLDER", help="the study's YAML file, or its folder")
    report.add_argument("--output", type=Path, metavar="DIR", help=f"where to write; by default {REPORT_FOLDER}/ there")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from xlfa.study.running import (
        FAILED_STATUS,
        claim_folder,
        clear_failures,
        ending_on_signal,
        failed_cells,
        finished_cells,
    )

    transformers.utils.logging.set_verbosity_warning()
    _check_run(arguments)
    plan = load_plan(arguments.file, arguments.data_root, arguments.output_dir)
    cells = plan.cells if arguments.cell is None else [plan.cell(arguments.cell)]
    check_models(plan)
    claim_folder(plan)
    if arguments.retry_failed:
        clear_failures(plan, cells)
    with ending_on_signal():
        try:
            _run_cells(plan, cells, arguments)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on", file=sys.stderr)
            raise SystemExit(130) from None
    finished = [cell for cell in finished_cells(plan) if cell in cells]
    print(f"{len(finished)} of {len(cells)} cells are finished, in {plan.output_dir}")
    failed = [cell for cell in failed_cells(plan) if cell in cells]
    for cell in failed:
        error = json.loads((plan.folder(cell) / FAILED_FILE).read_text(encoding="utf-8"))["error"]
        print(f"failed: {cell.id}: {error} ({plan.folder(cell) / FAILED_FILE})", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(cells)} cells failed: mend it, then add --retry_failed", file=sys.stderr)
        raise SystemExit(FAILED_STATUS)
    if len(finished) < len(cells):
        print("others are not finished, or run by other workers: `xlfa study status` tells which")


def _check_run(arguments: argparse.Namespace) -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise XLFAError(
            f"a launcher started {processes} processes for one run; a cell runs in one: start `xlfa study run` without "
            "it, with --workers for several cells at a time"
        )
    if arguments.workers is not None and arguments.workers < 1:
        raise XLFAError(f"--workers {arguments.workers}: at least 1")
    if arguments.workers is not None and arguments.cell is not None:
        raise XLFAError(f"--cell {arguments.cell} is one cell, which does not go with --workers {arguments.workers}")
    if arguments.lease_seconds <= 0:
        raise XLFAError(f"--lease_seconds {arguments.lease_seconds:g}: more than 0")


def _run_cells(plan: Plan, cells: list[PlannedCell], arguments: argparse.Namespace) -> None:
    from xlfa.study.cell import run_cell
    from xlfa.study.encoders import Encoders
    from xlfa.study.running import finished_cells, start_workers, work

    finished = finished_cells(plan)
    if all(cell in finished for cell in cells):
        return
    encoders = Encoders(plan)
    encoders.prepare()
    if arguments.workers is None:
        run = partial(run_cell, plan, encoders=encoders)
        work(plan, cells, run, arguments.lease_seconds)
    else:
        flags = ["--output_dir", str(plan.output_dir), "--lease_seconds", str(arguments.lease_seconds)]
        flags += [] if plan.data_root is None else ["--data_root", plan.data_root]
        start_workers(plan, arguments.workers, flags)


def _status(arguments: argparse.Namespace) -> None:
    plan = load_plan(arguments.file, arguments.data_root, arguments.output_dir)
    cells = survey(plan, arguments.lease_seconds)
    if arguments.json:
        print(json.dumps(describe_status(plan, cells), indent=2, ensure_ascii=False))
    else:
        print(format_status(plan, cells))


def _report(arguments: argparse.Namespace) -> None:
    from xlfa.study.report import write_report

    folder, planned = arguments.study, None
    if not folder.is_dir():
        plan = load_plan(folder, output_dir=arguments.output_dir)
        folder, planned = plan.output_dir, plan.cells
    elif arguments.output_dir is not None:
        raise XLFAError(f"--output_dir {arguments.output_dir} goes with a study's file; {folder} is a folder")
    output = writable_folder(arguments.output or folder / REPORT_FOLDER, remedy="name another folder with --output")
    print(f"written to {write_report(folder, output, planned)}")


COMMANDS = {"run": _run, "status": _status, "report": _report}
