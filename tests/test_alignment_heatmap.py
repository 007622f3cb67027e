"""Pictures: the plan's own numbers, words at their places, one scale of colours, nothing cut or on top of another."""

import dataclasses
import math
import warnings

import matplotlib
import numpy as np
import pytest
from drawn_alignments import ENGLISH, make_alignment, make_strip
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from xlfa.alignment.heatmap import NULL, draw_alignment, figure
from xlfa.errors import XLFAError

SENTENCES = {
    "german": "Die Katze saß auf der Matte .".split(),
    "arabic": "جلست القطة على السجادة".split(),
    "hindi": "बिल्ली क्षत्रिय चटाई पर बैठी ।".split(),
    "thai": "แมว นั่ง อยู่ บน ที่นี่".split(),
    "chinese": "猫 坐 在 垫子 上 。".split(),
    "emoji": "😀 👩\u200d👩\u200d👧 ❤\ufe0f 🇩🇪".split(),
    "one": ["Katze"],
    "eighty": [f"Wort{number}" for number in range(80)],
    "long": ["Donaudampfschifffahrtsgesellschaftskapitänsmütze", "x" * 500, "a"],
    "formulas": ["$x$", "\\frac{", "100%", "a_b^c", "$"],
}


def is_bar(axes):
    return axes.get_ylabel() == "share of the mass, %"


def maps(drawn):
    """Axes with a plan, the large one first."""
    return [axes for axes in drawn.axes if not is_bar(axes)]


def texts_of(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


@pytest.mark.parametrize("name", ["german", "chinese", "thai"])
def test_the_map_shows_the_plan(name):
    alignment = make_alignment(ENGLISH, SENTENCES[name])
    drawn = figure({"plan": alignment})
    (axes,) = maps(drawn)
    (mesh,) = axes.collections
    np.testing.assert_allclose(mesh.get_array(), 100 * alignment.weights)
    assert texts_of(axes.xaxis) == alignment.target
    assert texts_of(axes.yaxis) == alignment.source
    assert list(axes.get_xticks()) == [number + 0.5 for number in range(len(alignment.target))]
    assert axes.yaxis_inverted() and not axes.xaxis_inverted()
    assert sum(map(is_bar, drawn.axes)) == 1


def test_a_target_from_right_to_left_starts_at_the_right():
    strip = make_strip(ENGLISH, SENTENCES["arabic"])
    for axes in maps(figure(strip)):
        assert axes.xaxis_inverted()
    axes, *_ = maps(figure(strip))
    assert texts_of(axes.xaxis) == SENTENCES["arabic"]
    assert "right to left" in axes.get_xlabel()


def test_one_scale_of_colours_for_all():
    strip = make_strip(ENGLISH, SENTENCES["german"])
    drawn = figure(strip)
    assert len(maps(drawn)) == 5
    largest = 100 * max(own.weights.max() for own in strip.values())
    assert largest > 100 * strip["ε = 3"].weights.max()
    for axes, own in zip(maps(drawn), strip.values(), strict=True):
        mesh = axes.collections[0]
        assert mesh.get_clim() == pytest.approx((0, largest))
        np.testing.assert_allclose(mesh.get_array(), 100 * own.weights)
    shown = [text.get_text() for text in drawn.texts]
    for title, own in strip.items():
        assert shown[shown.index(title) + 1] == f"perplexity {own.perplexity:.1f}"
    assert f"perplexity {len(SENTENCES['german'])}.0" in shown


def test_a_plan_that_did_not_converge_says_so():
    drawn = figure({"plan": make_alignment(ENGLISH, ENGLISH, converged=False)})
    assert any("not converged" in text.get_text() for text in drawn.texts)


def test_unmatched_mass_has_a_row_and_a_column():
    alignment = make_alignment(ENGLISH, SENTENCES["german"], unmatched=0.3)
    (axes,) = maps(figure({"plan": alignment}))
    masses = axes.collections[0].get_array()
    np.testing.assert_allclose(masses[:-1, -1], 100 * alignment.null_source)
    np.testing.assert_allclose(masses[-1, :-1], 100 * alignment.null_target)
    assert masses.mask[-1, -1] and masses.mask.sum() == 1
    assert texts_of(axes.xaxis)[-1] == texts_of(axes.yaxis)[-1] == NULL
    assert axes.collections[0].get_clim()[1] == pytest.approx(masses.max())


@pytest.mark.parametrize("name", SENTENCES)
def test_nothing_is_cut_or_covered(name, tmp_path):
    """Every text is within the picture, and none lies on another; every glyph is there."""
    source = ENGLISH if name != "eighty" else [f"word{number}" for number in range(80)]
    strip = make_strip(SENTENCES["long"] if name == "long" else source, SENTENCES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figure(strip)
        FigureCanvasAgg(drawn).draw()
    assert drawn.canvas.get_renderer() is not None
    axes, *_ = maps(drawn)
    columns = axes.get_xticklabels()
    level = [*drawn.texts, *axes.get_yticklabels(), axes.xaxis.label]
    for each in drawn.axes:
        if is_bar(each):
            level += [*each.get_yticklabels(), each.yaxis.label]
    slanted = columns[0].get_rotation() == 45
    level += [] if slanted else columns
    boxes = [text.get_window_extent() for text in level if text.get_text()]
    for box in boxes + [text.get_window_extent() for text in columns]:
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= drawn.bbox.width and box.y1 <= drawn.bbox.height
    for number, box in enumerate(boxes):
        for other in boxes[number + 1 :]:
            assert min(box.x1, other.x1) - max(box.x0, other.x0) < 1 or min(box.y1, other.y1) - max(
                box.y0, other.y0
            ) < 0.3 * min(box.height, other.height)
    if slanted:
        step = axes.get_window_extent().width / len(columns)
        letters = columns[0].get_fontsize() / 72 * drawn.dpi
        assert step * math.sqrt(0.5) > 0.9 * letters


def test_very_long_sentences_have_every_few_words_named(tmp_path):
    words = [f"w{number}" for number in range(300)]
    drawn = figure({"plan": make_alignment(words, words)})
    assert max(drawn.get_size_inches()) < 34
    (axes,) = maps(drawn)
    assert texts_of(axes.xaxis) == words[:: 300 // len(axes.get_xticks())]
    assert 100 <= len(axes.get_xticks()) < 300


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
@pytest.mark.parametrize("name", ["arabic", "chinese"])
def test_files_are_the_same_every_time(tmp_path, suffix, name):
    strip = make_strip(ENGLISH, SENTENCES[name], unmatched=0.2)
    files = [tmp_path / folder / f"plan{suffix}" for folder in "ab"]
    for file in files:
        draw_alignment(strip, file)
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert first.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    assert [path.name for path in files[0].parent.iterdir()] == [f"plan{suffix}"]


@pytest.mark.parametrize("target, dark", [(["a", "b", "c"], 0), (["א", "ב", "ג"], 2)])
def test_the_heaviest_pair_is_dark_where_its_words_are(tmp_path, target, dark):
    """In the pixels, counted from the left."""
    weights = np.zeros((2, 3))
    weights[1, 0] = 1.0
    alignment = dataclasses.replace(make_alignment(["x", "y"], target), weights=weights)
    draw_alignment({"plan": alignment}, tmp_path / "plan.png")
    image = imread(tmp_path / "plan.png")[..., :3]
    drawn = figure({"plan": alignment})
    place = maps(drawn)[0].get_position()
    for row in range(2):
        for column in range(3):
            x = place.x0 + place.width * (column + 0.5) / 3
            y = 1 - place.y1 + place.height * (row + 0.5) / 2
            pixel = image[round(y * image.shape[0]), round(x * image.shape[1])]
            assert (pixel.sum() < 1) == ((row, column) == (1, dark))


def test_no_figure_stays_with_pyplot():
    import matplotlib.pyplot as pyplot

    style = dict(matplotlib.rcParams)
    figure({"plan": make_alignment(ENGLISH, ENGLISH)})
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == style


def test_a_plan_without_mass():
    alignment = dataclasses.replace(make_alignment(["a"], ["b"]), weights=np.zeros((1, 1)))
    (axes,) = maps(figure({"plan": alignment}))
    assert axes.collections[0].get_clim() == (0, 100)


@pytest.mark.parametrize(
    "alignments, message",
    [
        ({}, "no alignment"),
        ({"plan": make_alignment([], ["a"])}, "source sentence has no words"),
        ({"plan": make_alignment(["a"], [])}, "target sentence has no words"),
        ({"one": make_alignment(["a"], ["b"]), "two": make_alignment(["a"], ["c"])}, "'two' is of other words"),
    ],
)
def test_what_cannot_be_drawn(alignments, message):
    with pytest.raises(XLFAError, match=message):
        figure(alignments)


@pytest.mark.parametrize("name", ["plan.jpeg", "plan"])
def test_other_formats(tmp_path, name):
    with pytest.raises(XLFAError, match=r"\.png \.svg \.pdf"):
        draw_alignment({"plan": make_alignment(["a"], ["b"])}, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
