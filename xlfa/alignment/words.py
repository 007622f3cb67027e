"""Words of a sentence with their places in it, in languages written with spaces and without.

ICU splits them (UAX 29, Unicode Text Segmentation; dictionaries and models for Thai, Lao, Khmer, Burmese, Chinese and
Japanese): one library for all scripts.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from xlfa.errors import XLFAError

LANGUAGE_CODE = re.compile("[a-z]{2,3}")
# Written without spaces between words, by their codes of two and of three letters.
UNSPACED_LANGUAGES = {"zh", "ja", "th", "lo", "km", "my", "zho", "jpn", "tha", "lao", "khm", "mya", "yue"}
# Their scripts, by the beginnings of the characters' Unicode names.
UNSPACED_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "IDEOGRAPHIC", "FULLWIDTH")
# Unicode's categories of separators, controls, format characters and surrogates.
INVISIBLE = {"Zs", "Zl", "Zp", "Cc", "Cf", "Cs"}
# ICU's name for rules of no language: they go by script.
UNDETERMINED = "und"


@dataclass(frozen=True)
class Word:
    """A word and the characters start:end of its sentence that it stands at."""

    text: str
    start: int
    end: int


def split_words(text: str, language: str | None = None) -> list[Word]:
    """The words of a text in order; punctuation marks and emoji are words, white space and invisible characters none.

    Args:
        language: ISO 639-1 code; by default the script decides.

    Raises:
        XLFAError: for another code, text with half a surrogate pair, or without the extra `align`.
    """
    check_language(language)
    check_text(text)
    try:
        from icu4py.breakers import WordBreaker
    except ImportError:
        raise XLFAError('splitting text into words needs ICU: pip install "xlfa[align]"') from None
    words, start = [], 0
    # Lengths, not ICU's own offsets: those count UTF-16 units.
    for segment in WordBreaker(text, language or UNDETERMINED):
        word = segment.strip()
        if _is_visible(word):
            begin = start + segment.index(word)
            words.append(Word(word, begin, begin + len(word)))
        start += len(segment)
    return words


def pretokenised(words: Sequence[str], language: str | None = None) -> tuple[str, list[Word]]:
    """The text of given words, joined as their script is written, and where they stand in it.

    Raises:
        XLFAError: for a word without a visible character, or as `split_words`.
    """
    check_language(language)
    text, placed = "", []
    for number, word in enumerate(words, start=1):
        check_text(word)
        if not _is_visible(word):
            raise XLFAError(f"word {number} of {' '.join(words)!r} is empty: {word!r}")
        if text and not _is_joined(text[-1], word[0], language):
            text += " "
        placed.append(Word(word, len(text), len(text) + len(word)))
        text += word
    return text, placed


def check_language(language: str | None) -> None:
    """Nothing, for an ISO 639 code or None.

    Raises:
        XLFAError: otherwise.
    """
    if language is not None and not LANGUAGE_CODE.fullmatch(language):
        raise XLFAError(f"language {language!r} is no ISO 639-1 code such as de, th or zh")


def check_text(text: str, name: str = "the text") -> None:
    """Nothing, for text that can be encoded.

    Args:
        name: of the text, in the error.

    Raises:
        XLFAError: for half a surrogate pair: bytes that were not UTF-8 in a command line, or broken JSON.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise XLFAError(f"{name} is not valid Unicode at character {error.start}: {ascii(text)}") from None


def _is_visible(text: str) -> bool:
    """Whether anything but separators, controls and format characters is there.

    What Python's Unicode does not know yet, such as an emoji of next year, is visible.
    """
    return any(unicodedata.category(character) not in INVISIBLE for character in text)


def _is_joined(before: str, after: str, language: str | None) -> bool:
    """Whether no space stands between words that end and begin with these characters."""
    if language is not None:
        # Numbers and foreign words keep the space between them in every script.
        return language in UNSPACED_LANGUAGES and not (before.isascii() and after.isascii())
    return any(unicodedata.name(character, "").startswith(UNSPACED_SCRIPTS) for character in (before, after))
