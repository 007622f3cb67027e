"""Which fonts draw which words, so that no letter comes out as a box.

matplotlib (from 3.11) shapes and orders text by libraqm (HarfBuzz, and Unicode's bidirectional algorithm) and goes
through a list of families for glyphs that the first one lacks. Which families those are is decided here: the Noto fonts
of two PyPI packages, then the font that matplotlib carries, then whatever else the system has.
"""

import importlib.util
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from matplotlib import font_manager
from matplotlib.font_manager import FontEntry
from matplotlib.ft2font import FT2Font

logger = logging.getLogger(__name__)

# Importable name → what pip calls it. Both are Noto, under the SIL Open Font License.
PACKAGES = {"manimgx_fonts": "manimgx-fonts", "noto_cjk_sans_otc": "noto-cjk-sans-otc"}
# For ordinary text, and to draw what has no letters.
FIRST_FAMILY = "Noto Sans"
FALLBACK_FAMILY = "DejaVu Sans"
# Fonts with a picture of a box for every character, and those of coloured bitmaps, which matplotlib cannot draw.
UNFIT = ("lastresort", "last resort", "color emoji")
LONGEST_WORD = 24


@dataclass(frozen=True)
class Label:
    """A word as a figure shows it.

    Attributes:
        text: shortened where it is very long; a character that no font has stands as its code point, as in `[1F9FF]`.
        families: fonts, in matplotlib's words "families", that together have every character of the text.
    """

    text: str
    families: list[str]


def make_labels(words: Sequence[str], longest: int = LONGEST_WORD) -> list[Label]:
    """The labels of a sentence's words; logs a warning with the remedy where no font has a character.

    Args:
        longest: characters of a label.
    """
    texts = [shorten(" ".join(word.split()), longest) for word in words]
    visible = {character for text in texts for character in text if _is_visible(character)}
    faces = _faces(everywhere=False)
    if not _covers(faces, visible):
        faces = _faces(everywhere=True)
    missing = {character for character in visible if not _covers(faces, {character})}
    if missing:
        _warn(missing)
    codes = {ord(character): f"[{ord(character):04X}]" for character in missing}
    faces = _regional(faces, texts)
    return [Label(text, _families(text, faces)) for text in (text.translate(codes) for text in texts)]


def shorten(text: str, longest: int) -> str:
    """At most `longest` characters, the last an ellipsis where there were more; no accent is cut from its letter."""
    if len(text) <= longest:
        return text
    end = longest - 1
    while end > 1 and unicodedata.category(text[end]) in ("Mn", "Mc", "Me", "Cf"):
        end -= 1
    return text[:end] + "…"


def is_right_to_left(words: Iterable[str]) -> bool:
    """Whether a sentence runs from right to left: by its first strong character (Unicode Annex 9, rules P2 and P3)."""
    kinds = (unicodedata.bidirectional(character) for word in words for character in word)
    return next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") != "L"


def _is_visible(character: str) -> bool:
    """Whether it needs a glyph: spaces, joiners, marks of direction and variation selectors do not."""
    selects = "VARIATION SELECTOR" in unicodedata.name(character, "")
    return not selects and unicodedata.category(character) not in ("Cf", "Zs")


def _covers(faces: dict[str, FT2Font], characters: set[str]) -> bool:
    return all(any(_has(face, character) for face in faces.values()) for character in characters)


def _has(face: FT2Font, character: str) -> bool:
    return face.get_char_index(ord(character)) != 0


def _families(text: str, faces: dict[str, FT2Font]) -> list[str]:
    """As few as will do for the letters, whose shaping stops where the font changes; then for digits and signs."""
    visible = {character for character in text if _is_visible(character)}
    letters = {character for character in visible if unicodedata.category(character)[0] in "LM"}
    families: list[str] = []
    for wanted in (letters, visible):
        while left := {each for each in wanted if not any(_has(faces[name], each) for name in families)}:
            families.append(max(faces, key=partial(_count, faces, left)))
    return families or [next(iter(faces))]


def _count(faces: dict[str, FT2Font], characters: set[str], name: str) -> int:
    return sum(_has(faces[name], character) for character in characters)


def _regional(faces: dict[str, FT2Font], texts: Sequence[str]) -> dict[str, FT2Font]:
    """The same, with fonts for the sentence's region earlier: Han characters look different in China, Japan, Korea."""
    names = " ".join(unicodedata.name(character, "") for text in texts for character in text)
    region = "JP" if "HIRAGANA" in names or "KATAKANA" in names else "KR" if "HANGUL" in names else "SC"
    first, *rest = faces
    return {name: faces[name] for name in [first, *sorted(rest, key=lambda name: not name.endswith(f" {region}"))]}


@cache
def _faces(everywhere: bool) -> dict[str, FT2Font]:
    """Family → face, the preferred ones first: of the packages and matplotlib, or of all of the system as well."""
    packaged = [path for package in PACKAGES for path in _files(package)]
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    # matplotlib's list of the system's fonts is as old as its cache.
    system = font_manager.findSystemFonts() if everywhere else []
    for path in [*map(str, packaged), *sorted(system)]:
        if path not in known:
            _add(path)
    folders = {path.parent for path in packaged}
    upright = [entry for entry in font_manager.fontManager.ttflist if entry.style == "normal"]
    own = [entry for entry in upright if Path(entry.fname).parent in folders]
    own += [entry for entry in upright if entry.name == FALLBACK_FAMILY]
    others = sorted(upright, key=lambda entry: (not entry.name.startswith("Noto Sans"), entry.name, entry.fname))
    chosen = sorted(own, key=lambda entry: entry.name != FIRST_FAMILY) + (others if everywhere else [])
    faces: dict[str, FT2Font] = {}
    for entry in chosen:
        if entry.name not in faces and (face := _open(entry)) is not None:
            faces[entry.name] = face
    return faces


def _files(package: str) -> list[Path]:
    """The font files of a package, none where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
    return sorted(path for path in Path(spec.origin).parent.iterdir() if path.suffix in (".ttf", ".otf", ".ttc"))


def _add(path: str) -> None:
    try:
        font_manager.fontManager.addfont(path)
    except (OSError, RuntimeError) as error:
        logger.info("%s is left out, matplotlib cannot read it: %s", path, error)


def _open(entry: FontEntry) -> FT2Font | None:
    """The face, or none where its file is gone or it is of a kind that says nothing or cannot be drawn."""
    if any(word in entry.name.lower() for word in UNFIT):
        return None
    try:
        face = FT2Font(entry.fname, face_index=entry.index)
    except (OSError, RuntimeError):
        return None
    return face if face.scalable else None


def _warn(missing: set[str]) -> None:
    names = [f"U+{ord(each):04X} {unicodedata.name(each, '')}".strip() for each in sorted(missing)]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    absent = [name for package, name in PACKAGES.items() if not _files(package)]
    remedy = f"pip install {' '.join(absent)}" if absent else "install a font of that script in the system"
    logger.warning("no font here has %s: shown by code point; %s", shown, remedy)
