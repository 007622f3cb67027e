"""Atomic output: a file or folder appears under its final name complete, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` through a temporary file beside it, then move it into place."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file name beside `path`; on success move it to `path`, on an exception remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by the process's number: containers that share a folder have numbers of their own.
    temporary = path.with_name(f".{path.stem}.{uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def building_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success move it to `target`, on an exception remove it.

    Where another process put `target` in place first, theirs stays: folders built here are functions of their name.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        # mkdtemp and safetensors make private ones; the finished folder and its files get the parent's permissions.
        mode = target.parent.stat().st_mode
        temporary.chmod(mode & 0o777)
        for path in temporary.rglob("*"):
            path.chmod(mode & (0o777 if path.is_dir() else 0o666))
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
