"""The one exception for input that a user can mend, and how command lines print it."""

import os
import sys
from collections.abc import Callable
from io import TextIOWrapper


class XLFAError(ValueError):
    """Input that cannot be used: names the value, the place it came from and the remedy.

    A `ValueError`, so that callers of the Python API need not know this class; command lines print the message
    alone, without a traceback.
    """


def _write_utf8() -> None:
    """Let output hold every script, whatever the locale: UTF-8 in files and pipes; a terminal shows what it can."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")


def exit_with_message(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Run the command line `main` on `argv`; on `XLFAError` print `error: …` to stderr and exit with status 2.

    A reader of the output that wants no more of it, such as `head`, ends the command quietly.
    """
    _write_utf8()
    try:
        main(argv)
        sys.stdout.flush()
    except XLFAError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        # What is still in the buffer would be an error again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
