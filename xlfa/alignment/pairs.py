"""Sentence pairs from a file of any size: two columns, divided by a tab."""

import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import BinaryIO

from xlfa.errors import XLFAError
from xlfa.files import STANDARD_STREAM


def reading_lines(path: str) -> AbstractContextManager[Iterator[bytes]]:
    """The lines of a file, of one packed by gzip (`.gz`), or of the standard input (`-`), one at a time.

    Raises:
        XLFAError: while lines are read, for a file that cannot be.
    """
    return closing(_lines(path))


def _lines(path: str) -> Iterator[bytes]:
    try:
        with _opened(path) as lines:
            yield from lines
    except (OSError, EOFError, zlib.error) as error:
        raise XLFAError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _opened(path: str) -> AbstractContextManager[BinaryIO]:
    if path == STANDARD_STREAM:
        return nullcontext(sys.stdin.buffer)
    return gzip.open(path, "rb") if Path(path).suffix == ".gz" else open(path, "rb")


def parse_pair(line: bytes) -> tuple[str, str]:
    """The source and the target sentence of a line.

    Raises:
        XLFAError: for a line that is not two texts in UTF-8 with a tab between them.
    """
    try:
        # A byte order mark at a file's beginning is no text.
        text = line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise XLFAError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise XLFAError("it is empty: every line holds a source and a target sentence with a tab between them")
    columns = text.split("\t")
    if len(columns) != 2:
        raise XLFAError(f"it has {len(columns) - 1} tabs, not the one between a source and a target sentence")
    return columns[0], columns[1]
