"""What every tab refuses before it computes anything."""

from xlfa.alignment.words import check_text
from xlfa.errors import XLFAError

# Characters; some forty windows of a model that reads 512 tokens.
LONGEST_TEXT = 50_000


def check_input(name: str, text: str | None) -> str:
    """The text of a field.

    Raises:
        XLFAError: if it is empty, longer than `LONGEST_TEXT` characters, or no valid Unicode.
    """
    if not text or not text.strip():
        raise XLFAError(f"{name} is empty")
    if len(text) > LONGEST_TEXT:
        raise XLFAError(f"{name} has {len(text)} characters, more than the {LONGEST_TEXT} that this page takes")
    check_text(text, name)
    return text
