"""The page: the plan's own numbers, words as text and nothing else, nothing that loads or runs."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from drawn_alignments import ENGLISH, make_alignment, make_strip
from matplotlib.image import imread

from xlfa.alignment.page import render, write_page
from xlfa.errors import XLFAError

VOID = {"meta", "rect"}
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
HOSTILE = [
    "<script>document.title='run'</script>",
    "\"onmouseover=\"document.title='run'",
    "</title></svg></table>",
    "<img/src=x/onerror=document.title='run'>",
    "{{7*7}}",
    "&lt;",
    "'",
]


class Page(HTMLParser):
    """Checks nesting; gathers the table, the lists, lines, squares and all attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.rows, self.cells, self.words, self.lines, self.plans, self.hints = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        own = dict(attributes)
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "tr":
            self.rows.append([])
            self.cells.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.cells[-1].append(own)
        if tag == "ol":
            self.words.append([])
        if tag == "li":
            self.words[-1].append("")
        if tag == "line":
            self.lines.append(own)
        if tag == "svg" and not own["aria-label"].startswith("Lines"):
            self.plans.append({"box": own["viewbox"], "squares": []})
        if tag == "rect":
            self.plans[-1]["squares"].append({name: float(value) for name, value in own.items()})
        if tag == "table":
            self.direction = own["dir"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "li":
            self.words[-1][-1] += data
        if self.open[-2:] == ["line", "title"]:
            self.hints.append(data)


def share(attributes):
    return float(re.search(r"--share:([\d.]+)", attributes["style"])[1])


def test_the_table_shows_the_plan():
    alignment = make_alignment(ENGLISH, "Die Katze saß auf der Matte .".split())
    page = Page(render({"plan": alignment}))
    assert page.rows[0] == ["", *alignment.target]
    assert [row[0] for row in page.rows[1:]] == alignment.source
    assert page.direction == "ltr"
    for row, cells, masses in zip(page.rows[1:], page.cells[1:], alignment.weights, strict=True):
        np.testing.assert_allclose([float(number or 0) for number in row[1:]], 100 * masses, atol=0.051)
        np.testing.assert_allclose([share(own) for own in cells[1:]], masses / alignment.weights.max(), atol=6e-4)
    row, column = np.unravel_index(alignment.weights.argmax(), alignment.weights.shape)
    hint = page.cells[row + 1][column + 1]["title"]
    assert alignment.source[row] in hint and alignment.target[column] in hint
    assert float(re.search(r"([\d.]+) %", hint)[1]) == pytest.approx(100 * alignment.weights.max(), rel=0.05)
    assert "strip" not in [value for name, value in page.attributes if name == "id"]


def test_lines_link_the_words():
    alignment = make_alignment(ENGLISH, "Die Katze saß".split())
    page = Page(render({"plan": alignment}))
    assert page.words == [alignment.source, alignment.target]
    shares = alignment.weights / alignment.weights.max()
    drawn = {(int(float(own["y1"])), int(float(own["y2"]))): share(own) for own in page.lines}
    assert set(drawn) == set(zip(*map(list, np.nonzero(shares >= 0.05))))
    assert all(drawn[pair] == pytest.approx(shares[pair], abs=6e-4) for pair in drawn)
    assert len(page.hints) == len(drawn)
    assert [share(own) for own in page.lines] == sorted(drawn.values())


@pytest.mark.parametrize("target, backwards", [("Die Katze saß auf".split(), False), ("جلست القطة على".split(), True)])
def test_the_strip_has_the_colours_of_the_table(target, backwards):
    strip = make_strip(ENGLISH, target)
    page = Page(render(strip))
    assert page.direction == ("rtl" if backwards else "ltr")
    largest = max(own.weights.max() for own in strip.values())
    assert share(max(page.cells[1], key=lambda own: share(own) if "style" in own else 0)) < 1
    for plan, own in zip(page.plans, list(strip.values())[1:], strict=True):
        shown = np.zeros(own.weights.shape)
        for square in plan["squares"]:
            shown[int(square["y"]), int(square["x"])] = square["fill-opacity"]
        expected = own.weights / largest
        np.testing.assert_allclose(shown, expected[:, ::-1] if backwards else expected, atol=0.0051)
        assert plan["box"] == f"0 0 {len(target)} {len(ENGLISH)}"
        assert f"perplexity {own.perplexity:.1f}" in "".join(page.texts)


def test_unmatched_mass_has_a_row_and_a_column():
    alignment = make_alignment(ENGLISH, ["Katze", "Matte"], unmatched=0.3)
    page = Page(render({"plan": alignment}))
    assert page.rows[0][-1] == page.rows[-1][0] == "∅"
    unmatched = [float(row[-1] or 0) for row in page.rows[1:-1]]
    np.testing.assert_allclose(unmatched, 100 * alignment.null_source, atol=0.051)
    np.testing.assert_allclose(
        [float(each or 0) for each in page.rows[-1][1:-1]], 100 * alignment.null_target, atol=0.051
    )
    assert page.words == [alignment.source, alignment.target]
    assert "words keep for themselves" in "".join(page.texts)


def test_words_are_only_text():
    plans = {title: make_alignment(HOSTILE, HOSTILE[::-1]) for title in HOSTILE}
    page = Page(render(plans))
    assert page.rows[0][1:] == HOSTILE[::-1]
    assert page.words == [HOSTILE, HOSTILE[::-1]]
    assert not {"script", "img", "link", "iframe", "a", "image", "use"} & set(page.tags)
    assert not {name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "srcset")}
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_the_style_loads_nothing():
    style = re.search(r"<style>(.*?)</style>", render({"plan": make_alignment(["a"], ["b"])}), re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style


def test_many_words_are_shown_without_numbers(tmp_path):
    words = [f"w{number}" for number in range(80)]
    write_page({"plan": make_alignment(words, words)}, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert ("class", "dense") in page.attributes
    assert len(page.rows) == 81 and {len(row) for row in page.rows} == {81}
    assert len(text) < 3e6


def test_the_page_is_the_same_every_time():
    strip = make_strip(["a"], ["b", "c"])
    assert render(strip) == render(strip)


@pytest.mark.parametrize("mass, shown", [(1.0, "100"), (0.996, "99.6"), (0.0123, "1.23")])
def test_a_mass_is_a_plain_number(mass, shown):
    plan = make_alignment(["a"], ["b", "c"], weights=np.array([[mass, 1 - mass]]))
    assert f"b\u2069: {shown} % of the mass" in Page(render({"plan": plan})).cells[1][1]["title"]


@pytest.mark.parametrize("alignments", [{}, {"plan": make_alignment([], ["a"])}])
def test_what_cannot_be_shown(alignments, tmp_path):
    with pytest.raises(XLFAError):
        write_page(alignments, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def browse(tmp_path, path, *options):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: {', '.join(BROWSERS)}")
    quiet = "quic background-networking component-update sync"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += [f"--disable-{each}" for each in quiet.split()] + [f"--user-data-dir={tmp_path / 'profile'}", *options]
    return subprocess.run([*command, f"file://{path}"], check=True, timeout=240, capture_output=True, text=True).stdout


@pytest.mark.full
def test_no_word_runs_in_a_real_browser(tmp_path):
    write_page({title: make_alignment(HOSTILE, HOSTILE) for title in HOSTILE}, tmp_path / "page.html")
    document = browse(tmp_path, tmp_path / "page.html", "--dump-dom")
    assert "<title>Word alignment</title>" in document
    assert "<script" not in document and "<img" not in document


@pytest.mark.full
@pytest.mark.parametrize("target, first_is_left", [("Die Katze saß".split(), True), ("جلست القطة على".split(), False)])
def test_the_page_in_a_real_browser(tmp_path, target, first_is_left):
    """A screenshot: the first words' pair, which has all of the mass, is dark on the side where the target begins."""
    weights = np.zeros((6, 3))
    weights[0, 0] = 1
    write_page({"plan": make_alignment(ENGLISH, target, weights=weights)}, tmp_path / "page.html")
    shot = tmp_path / "page.png"
    options = ["--window-size=900,900", "--blink-settings=preferredColorScheme=1", f"--screenshot={shot}"]
    browse(tmp_path, tmp_path / "page.html", *options)
    image = np.round(255 * imread(shot)[..., :3]).astype(int)
    assert tuple(image[5, 5]) == tuple(image[-5, -5]) == (255, 255, 254)
    table = image[:400]
    dark = np.argwhere((table == (8, 48, 107)).all(-1))
    assert len(dark) > 800
    borders = np.flatnonzero((table[dark[0, 0] + 3] == (209, 217, 224)).all(-1))
    assert len(borders) >= 3
    assert (dark[:, 1].mean() < borders.mean()) == first_is_left
