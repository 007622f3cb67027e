"""The tab that aligns: what it shows is the plan, a slider costs no pass of the encoder, and no text breaks it."""

import base64
import html
import io
import re

import numpy as np
import pytest
from app_models import HOSTILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

pytest.importorskip("gradio")

from xlfa.alignment.aligner import Aligner, TransportOptions
from xlfa.alignment.links import extract_links
from xlfa.app.alignment_tab import LARGEST_STRIP, UNBALANCED, layer_choices, show_alignment
from xlfa.app.elements import RESOLUTION, SHOWN

PAIR = ("the cat sat on the mat.", "a cat sat.")
SETTINGS = {"power": -1.0, "unbalanced": False, "method": "mutual_argmax", "threshold": 2.0, "kept": None}


@pytest.fixture(scope="module")
def aligner(tiny_encoder):
    return Aligner.from_pretrained(tiny_encoder)


def show(aligner, source=PAIR[0], target=PAIR[1], layer=2, **changed):
    return show_alignment(aligner, source, target, layer, **{**SETTINGS, **changed})


def read_facts(text):
    pairs = re.findall("<dt>(.*?)</dt><dd[^>]*>(.*?)</dd>", text, re.DOTALL)
    return {name: html.unescape(value) for name, value in pairs}


def pixels(picture):
    return imread(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", picture)[1])))[..., :3]


@pytest.mark.parametrize("unbalanced", [False, True])
@pytest.mark.parametrize("method", ["mutual_argmax", "threshold"])
def test_it_shows_the_plan_and_its_links(aligner, unbalanced, method):
    picture, facts, links, _ = show(aligner, unbalanced=unbalanced, method=method, threshold=1.1)
    options = TransportOptions(0.1, unbalanced=UNBALANCED if unbalanced else None)
    (alignment,) = aligner.align(aligner.at_layer(2).states([PAIR]), options)
    expected = extract_links(alignment, method, 1.1)
    assert expected
    assert [row[:2] for row in links] == [
        [alignment.source[own.source], alignment.target[own.target]] for own in expected
    ]
    np.testing.assert_allclose([float(row[2]) for row in links], [100 * own.weight for own in expected], atol=0.051)
    facts = read_facts(facts)
    assert facts["Pharaoh"] == " ".join(f"{own.source}-{own.target}" for own in expected)
    assert facts["perplexity"].split()[0] == f"{alignment.perplexity:.2f}"
    assert facts["epsilon"] == f"0.1 × centered_std = {alignment.epsilon:.3g} of the cost"
    assert float(facts["marginal error"]) == pytest.approx(alignment.marginal_error, rel=0.06)
    assert ("unmatched" in facts) == unbalanced
    shown = pixels(picture)
    assert shown.std() > 0.02
    width = int(re.search(r'width="(\d+)"', picture)[1])
    assert width == pytest.approx(shown.shape[1] * SHOWN / RESOLUTION, abs=1)


def test_a_slider_needs_no_pass_of_the_encoder(aligner, monkeypatch):
    passes = []
    run = Aligner.run
    monkeypatch.setattr(Aligner, "run", lambda self, pairs: passes.append(self.layer) or run(self, pairs))
    kept, pictures, perplexities = None, [], []
    for power in (-2.0, -1.0, 0.0, 1.0):
        picture, facts, _, kept = show(aligner, power=power, kept=kept)
        pictures.append(picture)
        perplexities.append(float(read_facts(facts)["perplexity"].split()[0]))
    assert perplexities == sorted(perplexities) and perplexities[0] < perplexities[-1]
    assert len(set(pictures)) == 4
    for changed in ({"unbalanced": True}, {"method": "threshold"}, {"method": "threshold", "threshold": 5.0}):
        *_, kept = show(aligner, kept=kept, **changed)
    assert passes == [2]
    *_, kept = show(aligner, layer=3, kept=kept)
    *_, kept = show(aligner, layer=3, source="the cat", kept=kept)
    assert passes == [2, 3, 3]


def test_kept_states_give_what_fresh_ones_do(aligner):
    *_, kept = show(aligner, power=0.5)
    assert show(aligner, kept=kept)[:3] == show(aligner)[:3]


def test_a_long_pair_has_no_strip(aligner):
    words = int(LARGEST_STRIP**0.5)
    heights = []
    for number in (words, words + 1):
        sentence = " ".join(["ab", "cd", "ef"][index % 3] for index in range(number))
        heights.append(pixels(show(aligner, sentence, sentence)[0]).shape[0])
    assert heights[0] > heights[1] + 100


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("side", ["source", "target"])
def test_no_text_breaks_it(aligner, name, side):
    picture, facts, links, kept = show(aligner, **{side: HOSTILE[name]})
    assert not re.search("<script|<img src=x", picture + facts)
    if 'role="alert"' in facts:
        assert (picture, links, kept) == ("", [], None)
        assert f"the {side} sentence" in html.unescape(facts)
    else:
        assert picture.startswith("<img") and kept is not None
    # The next pair is shown as ever.
    assert show(aligner, kept=kept)[0].startswith("<img")


@pytest.mark.parametrize("name", ["empty", "blanks", "invisible", "half a surrogate pair", "long", "too long", "none"])
def test_what_cannot_be_aligned_is_a_message(aligner, name):
    assert 'role="alert"' in show(aligner, source=HOSTILE[name])[1]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=25), st.text(max_size=25), st.floats(-3, 1), st.booleans(), st.floats(0.5, 10))
def test_any_text_gives_a_picture_or_a_message(aligner, source, target, power, unbalanced, threshold):
    changed = {"power": power, "unbalanced": unbalanced, "method": "threshold", "threshold": threshold}
    picture, facts, *_ = show(aligner, source, target, **changed)
    assert picture.startswith("<img") != facts.startswith("<p")


def test_the_layers_are_those_of_the_model(aligner):
    assert [value for _, value in layer_choices(aligner)] == [0, 1, 2, 3, 4]
    assert 'role="alert"' in show(aligner, layer=5)[1]
