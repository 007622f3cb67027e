"""`run.json` of a run folder: how the model came about. It is written before the first step and again at the end.

It is not published: it holds local paths.
"""

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xlfa.arguments import DataArguments, ModelArguments, XLFATrainingArguments
from xlfa.environment import code_state, describe_environment
from xlfa.errors import XLFAError
from xlfa.files import write_text

RUN_FILE = "run.json"


def record_start(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: XLFATrainingArguments,
    command: list[str] | None,
    checkpoint: str | None,
) -> None:
    """Write that a sitting of the run begins; a run that is interrupted and resumed has several.

    Args:
        command: the command line, None where the run was started from Python.
        checkpoint: the one that the sitting goes on from; the sittings before it are those of its run.
    """
    environment = describe_environment()
    sitting = {
        "command": command,
        "working_directory": str(Path.cwd()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from": checkpoint,
        "environment": environment,
        "code": code_state(),
    }
    earlier = [] if checkpoint is None else _earlier_sittings(Path(checkpoint).parent)
    run = {
        "schema_version": 2,
        "task": data_args.task,
        # None until the run is finished.
        "validation": None,
        "model_arguments": asdict(model_args),
        "data_arguments": asdict(data_args),
        "training_arguments": training_args.to_sanitized_dict(),
        # Of the last sitting, as all that stands above.
        "threads": environment["threads"],
        "versions": environment["versions"],
        "sittings": [*earlier, sitting],
    }
    _write(Path(training_args.output_dir), run)


def weights_digest(folder: Path) -> str:
    """SHA-256 over the weight files (safetensors) of a run folder, by which scores tell whose they are."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def record_end(folder: Path, validation: dict[str, float]) -> None:
    """Write that the run in `folder` is finished, with its validation scores."""
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    _write(folder, {**run, "validation": validation})


def is_finished(run: dict[str, Any]) -> bool:
    """Whether the run, the content of a `run.json`, came to its end."""
    return run.get("validation") is not None


def has_finished_run(folder: Path) -> bool:
    """Whether the folder holds a run that came to its end.

    Raises:
        XLFAError: for a `run.json` that is none.
    """
    path = folder / RUN_FILE
    return path.is_file() and is_finished(_read(path))


def _earlier_sittings(folder: Path) -> list[dict[str, Any]]:
    path = folder / RUN_FILE
    return _read(path).get("sittings", []) if path.is_file() else []


def _read(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise XLFAError(f"cannot read {path} ({error}): name another --output_dir") from None
    if not isinstance(run, dict):
        raise XLFAError(f"{path} holds no JSON object: name another --output_dir")
    return run


def _write(folder: Path, run: dict[str, Any]) -> None:
    write_text(folder / RUN_FILE, json.dumps(run, indent=2, ensure_ascii=False, default=str) + "\n")
