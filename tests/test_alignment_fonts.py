"""Every word gets fonts that have its letters, in the order and the shapes of its script."""

import dataclasses
import logging
import shutil
import warnings
from functools import cache

import bidi
import matplotlib
import numpy as np
import pytest
import uharfbuzz
from bidi.algorithm import get_display
from fontTools.ttLib import TTFont
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from xlfa.alignment import fonts
from xlfa.alignment.fonts import is_right_to_left, make_labels, shorten

# What needs no glyph of its own: joiners, marks of direction, variation selectors, tags.
IGNORABLE = {0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0xFE0E, 0xFE0F, *range(0xE0020, 0xE0080)}
SENTENCES = {
    "latin": "Größe naïve łódź Tiếng Việt",
    "greek": "Καλημέρα κόσμε",
    "cyrillic": "Съешь ещё этих",
    "arabic": "السلام خير من الحرب",
    "hebrew": "שלום עולם",
    "urdu": "اردو زبان ٹھیک ہے",
    "devanagari": "क्षत्रिय हिन्दी में पढ़ता है ।",
    "bengali": "বাংলা ক্ষমা",
    "tamil": "தமிழ் மொழி",
    "telugu": "తెలుగు భాష",
    "thai": "ภาษาไทย อยู่ที่นี่",
    "chinese": "中文 在 武汉 。 繁體",
    "japanese": "日本語 は カタカナ 直接",
    "korean": "한국어와 일본어",
    "emoji": "😀 👩\u200d👩\u200d👧 ❤\ufe0f 🇩🇪 👍🏽 1\ufe0f\u20e3",
    "mixed": "COVID-19疫情 iPhone은 שלום(abc) ok👍",
}


@pytest.fixture(autouse=True)
def fresh_fonts():
    """No test sees the faces that another one found."""
    fonts._faces.cache_clear()
    yield
    fonts._faces.cache_clear()


@pytest.fixture
def bare_system(monkeypatch):
    """A machine with matplotlib's own fonts alone."""
    own = [entry for entry in font_manager.fontManager.ttflist if entry.name.startswith("DejaVu Sans")]
    monkeypatch.setattr(fonts, "PACKAGES", {"no_such_package": "no-such-package"})
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])


@cache
def characters_of(family):
    """What fontTools reads in the file that matplotlib takes for the family."""
    path = font_manager.findfont(FontProperties(family=[family]), fallback_to_default=False)
    number = getattr(path, "face_index", 0)
    return set(TTFont(path, fontNumber=number if str(path).endswith("ttc") else -1, lazy=True).getBestCmap())


def drawn_width(label, size=100):
    properties = FontProperties(family=label.families, size=size)
    return TextToPath().get_text_width_height_descent(label.text, properties, ismath=False)[0]


@pytest.mark.parametrize("script", SENTENCES)
def test_fonts_have_every_letter(script):
    words = SENTENCES[script].split()
    for word, label in zip(words, make_labels(words), strict=True):
        assert label.text == word
        available = set().union(*map(characters_of, label.families))
        assert {ord(character) for character in word} - IGNORABLE <= available, (word, label.families)


@pytest.mark.parametrize("script", SENTENCES)
def test_matplotlib_finds_every_glyph(script, tmp_path):
    figure = Figure()
    for number, label in enumerate(make_labels(SENTENCES[script].split())):
        figure.text(0.1, 0.1 * number, label.text, family=label.families)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(tmp_path / "words.png")


@pytest.mark.parametrize("script", list(SENTENCES)[:-1])
def test_a_word_of_one_script_is_in_one_font(script):
    assert {len(label.families) for label in make_labels(SENTENCES[script].split())} == {1}


@pytest.mark.parametrize("script", ["arabic", "hebrew", "urdu", "devanagari", "bengali", "tamil", "telugu", "thai"])
def test_letters_are_joined_as_harfbuzz_joins_them(script):
    """The widths of shaped words are HarfBuzz's own; of the letters one by one they are others."""
    differences = []
    for label in make_labels(SENTENCES[script].split()):
        path = font_manager.findfont(FontProperties(family=label.families))
        face = uharfbuzz.Face(uharfbuzz.Blob.from_file_path(str(path)))
        buffer = uharfbuzz.Buffer()
        buffer.add_str(label.text)
        buffer.guess_segment_properties()
        uharfbuzz.shape(uharfbuzz.Font(face), buffer)
        width = 100 * sum(place.x_advance for place in buffer.glyph_positions) / face.upem
        assert drawn_width(label) == pytest.approx(width, abs=0.2)
        alone = sum(drawn_width(dataclasses.replace(label, text=letter)) for letter in label.text)
        differences.append(abs(alone - width))
    # Hebrew's letters do not join.
    assert (max(differences) > 2) == (script != "hebrew")


@pytest.mark.parametrize("word", ["שלום", "(שלום)", "שלום!", "abc-שלום", "שלום-12"])
def test_letters_run_from_right_to_left(word):
    """Drawn as the letters in the order for display that a bidi library gives, forced from left to right."""
    (label,) = make_labels([word])
    properties = FontProperties(family=label.families, size=100)
    forced, backwards = (f"\u202d{text}\u202c" for text in (get_display(word), word))
    ours, reference, wrong = (
        np.array(TextToPath().get_text_path(properties, text)[0]) for text in (label.text, forced, backwards)
    )
    np.testing.assert_allclose(ours, reference, atol=0.1)
    assert abs(ours - wrong).max() > 10


@pytest.mark.parametrize(
    "sentence", ["שלום עולם", "123 שלום", "« مرحبا »", "abc שלום", "12 , 34", "😀 اردو", "Hello", "中文", "हिन्दी"]
)
def test_direction_of_a_sentence(sentence):
    assert is_right_to_left(sentence.split()) == (bidi.get_base_level(sentence) == 1)


def test_no_word_has_no_direction():
    assert not is_right_to_left([])
    assert not is_right_to_left([""])


@pytest.mark.parametrize("words, region", [("直接 の", "JP"), ("直接 한국어", "KR"), ("直接 了", "SC")])
def test_han_characters_look_as_in_the_sentence_s_region(words, region):
    assert make_labels(words.split())[0].families == [f"Noto Sans CJK {region}"]


def test_digits_and_signs_are_not_from_a_font_of_emoji():
    assert {tuple(label.families) for label in make_labels(["12", "#", "*", ".", ",", "©", "", "\u200d"])} == {
        ("Noto Sans",)
    }


def test_space_within_a_word_is_one_line():
    assert [label.text for label in make_labels(["New\nYork\t City"])] == ["New York City"]


def test_letters_without_a_font_are_code_points(bare_system, caplog):
    with caplog.at_level(logging.WARNING):
        labels = make_labels(["cat", "中文", "a\x07"])
    assert [label.text for label in labels] == ["cat", "[4E2D][6587]", "a[0007]"]
    assert {family for label in labels for family in label.families} == {"DejaVu Sans"}
    assert len(caplog.messages) == 1
    assert "U+4E2D CJK UNIFIED IDEOGRAPH-4E2D" in caplog.text
    assert "pip install no-such-package" in caplog.text


def test_letters_that_no_package_has(caplog):
    with caplog.at_level(logging.WARNING):
        (label,) = make_labels(["\U000f0000"])
    assert label.text == "[F0000]"
    assert "install a font" in caplog.text


def test_fonts_of_the_system_are_found(bare_system, tmp_path, monkeypatch):
    """One that is newer than matplotlib's list, and one that matplotlib cannot read."""
    import manimgx_fonts

    source = next(path for path in fonts._files(manimgx_fonts.__name__) if "Thai" in path.name)
    font = shutil.copy(source, tmp_path / "own.ttf")
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(font), str(broken)])
    (label,) = make_labels(["ภาษาไทย"])
    assert label == fonts.Label("ภาษาไทย", ["Noto Sans Thai"])


@pytest.mark.parametrize("name", ["LastResort", "Noto Color Emoji"])
def test_fonts_of_boxes_and_bitmaps_are_left_out(bare_system, monkeypatch, name):
    entry = font_manager.fontManager.ttflist[0]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [dataclasses.replace(entry, name=name)])
    assert fonts._open(font_manager.fontManager.ttflist[0]) is None


def test_shorten():
    assert shorten("x" * 24, 24) == "x" * 24
    assert shorten("x" * 25, 24) == "x" * 23 + "…"
    # The accent stays with its letter, or goes with it.
    assert shorten("abcde\u0301fgh", 6) == "abcd…"
    assert shorten("\u0301" * 50, 6) == "\u0301…"


def test_matplotlib_shapes():
    assert tuple(map(int, matplotlib.__version__.split(".")[:2])) >= (3, 11)
