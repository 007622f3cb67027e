"""Pharaoh lines there and back, JSON that can be read, and tables whose columns stand under one another."""

import json
import math
from dataclasses import replace

import pytest
from alignment_data import make_alignment
from hypothesis import given
from hypothesis import strategies as st

from xlfa.alignment.formats import (
    PharaohLinks,
    display_width,
    format_json,
    format_pharaoh,
    format_table,
    parse_pharaoh,
    read_pharaoh,
)
from xlfa.alignment.links import Link, extract_links
from xlfa.errors import XLFAError


@given(st.sets(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=8))
def test_pharaoh_there_and_back(pairs):
    line = format_pharaoh([Link(source, target, 0.5) for source, target in pairs])
    assert parse_pharaoh(line + "\n") == PharaohLinks(frozenset(pairs), frozenset(pairs))


def test_pharaoh_is_sorted_by_numbers():
    assert format_pharaoh([Link(10, 0, 1), Link(2, 11, 1), Link(2, 3, 1)]) == "2-3 2-11 10-0"


def test_possible_links_are_read_in_both_notations():
    links = parse_pharaoh("0-0 1?2\t3p4 ")
    assert links.sure == {(0, 0)}
    assert links.possible == {(0, 0), (1, 2), (3, 4)}


@pytest.mark.parametrize("item", ["0", "0-", "a-b", "-1-0", "0:1", "0-1-2", "٣-٤", "1.5-2"])
def test_what_is_no_link_is_named_with_its_file_and_line(tmp_path, item):
    path = tmp_path / "gold.txt"
    path.write_text(f"0-0\n\n1-1 {item}\n", encoding="utf-8")
    lines = read_pharaoh(path)
    assert [next(lines), next(lines)] == [parse_pharaoh("0-0"), parse_pharaoh("")]
    with pytest.raises(XLFAError, match=rf"gold.txt, line 3: '{item}' is no link"):
        next(lines)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(XLFAError, match="cannot read .*none.txt: No such file"):
        list(read_pharaoh(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes(b"0-0 \xe9")
    with pytest.raises(XLFAError, match="latin.txt is not UTF-8"):
        list(read_pharaoh(tmp_path / "latin.txt"))


def test_json_is_one_line_with_words_links_and_masses():
    alignment = make_alignment([[0.5, 0], [0, 0.1]], [0.5, 0.5], [0.6, 0.4], source=["a", "猫"], target=['"', "\n"])
    alignment = replace(alignment, epsilon=math.inf)
    line = format_json(alignment, extract_links(alignment))
    assert "\n" not in line and "猫" in line
    content = json.loads(line, parse_constant=pytest.fail)
    assert content["source"] == ["a", "猫"] and content["target"] == ['"', "\n"]
    assert content["links"] == [{"source": 0, "target": 0, "weight": 0.5}]
    assert content["null_source"] == pytest.approx([0, 0.4])
    assert content["null_target"] == pytest.approx([0.1, 0.3])
    assert content["epsilon"] is None


def test_table_has_links_unlinked_and_null_words():
    alignment = make_alignment(
        [[0.4, 0, 0], [0, 0.3, 0], [0.02, 0, 0]],
        [0.4, 0.4, 0.2],
        [0.5, 0.4, 0.1],
        ["cat", "坐在", "x"],
        ["猫", "e", "!"],
    )
    lines = format_table(alignment, extract_links(alignment)).splitlines()
    assert lines[:5] == [
        "source  target  weight  share",
        "cat     猫      0.4000   100%",
        "坐在    e       0.3000    75%",
        "source words without a link: x (null)",
        "target words without a link: ! (null)",
    ]
    assert "0.72 of the mass" in lines[5]
    alignment = replace(alignment, converged=False, marginal_error=0.25)
    assert format_table(alignment, []).splitlines()[-1] == "the plan did not converge: its marginals are off by 2.5e-01"


@pytest.mark.parametrize(
    ("text", "width"), [("", 0), ("abc", 3), ("猫が", 4), ("e\u0301", 1), ("a\u200d", 1), ("ｆ", 2)]
)
def test_display_width(text, width):
    assert display_width(text) == width
