"""Text files, one sentence a line, read as a stream."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from xlfa.errors import XLFAError


def check_text_files(paths: Sequence[str]) -> None:
    """Raise `XLFAError` for a file that is not there: before anything is read."""
    for path in paths:
        if not Path(path).is_file():
            raise XLFAError(f"--texts {path}: no such file")


def read_sentences(paths: Sequence[str], description: str) -> Iterator[str]:
    """The lines of UTF-8 files without those that are blank, with a progress bar over their bytes.

    Raises:
        XLFAError: for a line that is not UTF-8, and, at the end, where no file has any text.
    """
    size = sum(Path(path).stat().st_size for path in paths)
    empty = True
    with tqdm(desc=description, total=size, unit="B", unit_scale=True) as bar:
        for path in paths:
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    bar.update(len(line))
                    sentence = _decode(line, path, number).strip()
                    if sentence:
                        empty = False
                        yield sentence
    if empty:
        raise XLFAError(f"--texts {' '.join(paths)}: there is no text in it")


def _decode(line: bytes, path: str, number: int) -> str:
    try:
        # A byte order mark at the beginning of a file is no text.
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise XLFAError(
            f"--texts {path}, line {number}: not UTF-8 (byte {error.start + 1} of the line): convert the file to UTF-8"
        ) from None
