"""Scoring that was interrupted: the languages that it finished are read and not predicted again.

Until a run is finished, a file in its folder says what its predictions come from: model, data and settings.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import try_to_load_from_cache

from xlfa.backbones import writable_cache
from xlfa.errors import XLFAError
from xlfa.files import write_text
from xlfa.scores import SCORES_FILE, predictions_file, read_predictions
from xlfa.tasks import Prediction

UNFINISHED_FILE = "unfinished.json"


@contextmanager
def writing_alone(folder: Path) -> Iterator[None]:
    """Keep other scoring runs of this machine out of `folder`.

    Raises:
        XLFAError: where one is writing to it.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(writable_cache("locks") / f"scoring-{digest}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise XLFAError(f"another run is scoring into {folder}: wait for it, or name another --output_dir") from None
    try:
        yield
    finally:
        lock.release()


def begin(folder: Path, origin: dict[str, Any], languages: list[str]) -> dict[str, list[Prediction]]:
    """The predictions that an unfinished run of the same origin left in `folder`, by language; others are removed.

    Raises:
        XLFAError: if scores or predictions of other languages would be lost.
    """
    marker = folder / UNFINISHED_FILE
    text = json.dumps(origin, indent=2, sort_keys=True) + "\n"
    if marker.is_file() and marker.read_text(encoding="utf-8") == text:
        files = {language: predictions_file(folder, language) for language in languages}
        return {language: read_predictions(path) for language, path in files.items() if path.is_file()}
    predicted = _prediction_files(folder)
    lost = sorted({*finished_languages(folder), *predicted} - set(languages))
    if lost:
        raise XLFAError(
            f"{folder} has scores of another run of {', '.join(lost)} too, which would be removed: name another "
            "--output_dir, or remove that folder"
        )
    for path in predicted.values():
        path.unlink()
    write_text(marker, text)
    return {}


def finished_languages(folder: Path) -> list[str]:
    """Those in the `scores.json` of a folder; none where there is no such file that can be read."""
    try:
        return list(json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))["languages"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def finish(folder: Path, languages: list[str]) -> None:
    """From now on a run into `folder` begins anew, unless predictions of other languages wait for a run of more."""
    if _prediction_files(folder).keys() <= set(languages):
        (folder / UNFINISHED_FILE).unlink()


def _prediction_files(folder: Path) -> dict[str, Path]:
    """Those that lie in a folder, by language."""
    return {path.stem: path for path in folder.glob("predictions/*.jsonl")}


def model_origin(name_or_path: str) -> dict[str, Any]:
    """What tells a loaded model from another one, or from one trained again: its files' sizes and times, its commit."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        # The path has the commit in it.
        return {"name": name_or_path, "cached": str(try_to_load_from_cache(name_or_path, "config.json"))}
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {
        "name": str(folder.resolve()),
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }
