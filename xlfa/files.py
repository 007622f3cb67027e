"""Atomic output: a file or folder appears under its final name complete, or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from xlfa.errors import XLFAError

STANDARD_STREAM = "-"


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` through a temporary file beside it, then move it into place."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def writable_folder(path: str | Path, name: str = "", remedy: str = "name another folder with --output_dir") -> Path:
    """The folder `path`; it is there afterwards.

    Args:
        name: what stands before the path in the error.
        remedy: what the error says to do.

    Raises:
        XLFAError: if it cannot be written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else os.strerror(errno.EACCES)
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise XLFAError(f"cannot write to {name}{folder} ({reason}): {remedy}")
    return folder


@contextmanager
def naming_output(flag: str, path: str) -> Iterator[None]:
    """Turn what the system raises for the file of a flag into an `XLFAError` that names both."""
    try:
        yield
    except OSError as error:
        raise XLFAError(f"cannot write to --{flag} {path}: {error.strerror or error}") from None


def check_output(output: str, source: str | None) -> None:
    """Raise `XLFAError` where `--output` is the file `source` that is read; - is a standard stream."""
    if source not in (None, STANDARD_STREAM) and Path(output).resolve() == Path(source).resolve():
        raise XLFAError(f"--output {output} is the file that is read: name another one")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file name beside `path`; on success move it to `path`, on an exception remove it.

    A link stays one, also /dev/stdout of a redirected stream: what it names is replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by the process's number: containers that share a folder have numbers of their own.
    temporary = path.with_name(f".{path.stem}.{uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def building_folder(target: Path, exist_ok: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success move it to `target`, on an exception remove it.

    Args:
        target: a new name, or an empty folder.
        exist_ok: where another process put `target` in place first, theirs stays. For a cache, whose folders are
            functions of their name.

    Raises:
        OSError: where `target` cannot be put in place, such as a folder that something is mounted on.
    """
    target = Path(os.path.realpath(target))
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        # safetensors makes private files. Those that were linked here are somebody else's too.
        mode = temporary.stat().st_mode & 0o666
        for path in temporary.rglob("*"):
            if path.is_file() and path.stat().st_nlink == 1:
                path.chmod(mode)
        try:
            os.rename(temporary, target)
        except OSError as error:
            if not exist_ok or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
