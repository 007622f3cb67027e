"""Gold alignments: Pharaoh files with what can be wrong in them, data sets, and the embedded sentence pairs."""

import pytest
from datasets import Dataset

from xlfa.alignment.formats import PharaohLinks
from xlfa.alignment.gold import (
    DATASET,
    TARGET_LANGUAGES,
    GoldSet,
    load_gold,
    read_gold,
    read_hypothesis,
    read_word_pairs,
)
from xlfa.data import SAMPLE, SAMPLE_ROOT
from xlfa.errors import XLFAError

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def write(tmp_path):
    def write(name, *lines):
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


def links(sure, possible=()):
    return PharaohLinks(frozenset(sure), frozenset(sure) | frozenset(possible))


def mirror_rows(alignment=([0, 0], [1, 1]), **columns):
    row = {"source": ["a", "b"], "target": ["c", "d"], "alignment": alignment, **columns}
    return {"test": Dataset.from_list([row, row])}


def test_a_file_tells_sure_from_possible_links(write):
    gold = read_gold(write("gold.txt", "0-0 1?1 2p1", "", "0-1"))
    assert gold.links == [links({(0, 0)}, {(1, 1), (2, 1)}), links(()), links({(0, 1)})]
    assert (gold.name, gold.told_apart, gold.pairs) == ("gold.txt", True, None)


def test_a_file_of_sure_links_alone_does_not_tell_them_apart(write):
    assert not read_gold(write("gold.txt", "0-0 1-1")).told_apart


def test_positions_may_count_from_1(write):
    from_one = read_gold(write("one.txt", "1-1 2?3"), index_base=1)
    assert from_one.links == read_gold(write("zero.txt", "0-0 1?2")).links


def test_position_0_in_a_file_that_counts_from_1_is_refused(write):
    with pytest.raises(XLFAError, match=r"one.txt, line 2: position 0 .* leave out --index_base 1"):
        read_gold(write("one.txt", "1-1", "0-1"), index_base=1)


def test_malformed_lines_name_file_and_line(write):
    with pytest.raises(XLFAError, match=r"gold.txt, line 2: '1:1' is no link"):
        read_gold(write("gold.txt", "0-0", "0-0 1:1"))


def test_empty_and_missing_files_are_refused(write, tmp_path):
    with pytest.raises(XLFAError, match="gold.txt is empty"):
        read_gold(write("gold.txt"))
    with pytest.raises(XLFAError, match="cannot read .*nowhere.txt"):
        read_gold(tmp_path / "nowhere.txt")


def test_words_are_what_stands_between_blanks(write):
    pairs = read_word_pairs(str(write("pairs.tsv", "It 's a  cat .\tC' est un chat .")))
    assert pairs == [(["It", "'s", "a", "cat", "."], ["C'", "est", "un", "chat", "."])]


def test_a_line_without_a_tab_names_file_and_line(write):
    with pytest.raises(XLFAError, match="pairs.tsv, line 2: it has 0 tabs"):
        read_word_pairs(str(write("pairs.tsv", "a\tb", "a b")))


def test_links_outside_the_sentences_are_refused_as_the_file_counts(write):
    pairs = str(write("pairs.tsv", "a b\tc", "a\tb"))
    assert read_gold(write("good.txt", "1-0", "0-0"), sentences=pairs).pairs == [(["a", "b"], ["c"]), (["a"], ["b"])]
    with pytest.raises(XLFAError, match="gold.txt, line 2: no source word 1, there are 1, counted from 0"):
        read_gold(write("gold.txt", "1-0", "1-0"), sentences=pairs)
    with pytest.raises(XLFAError, match="gold.txt, line 1: no target word 2, there are 1, counted from 1"):
        read_gold(write("gold.txt", "1-2", "1-1"), index_base=1, sentences=pairs)


def test_sentences_and_links_must_be_as_many(write):
    with pytest.raises(XLFAError, match=r"gold.txt has 2 lines and .*pairs.tsv 1"):
        read_gold(write("gold.txt", "0-0", "0-0"), sentences=str(write("pairs.tsv", "a\tb")))


def test_a_hypothesis_is_checked_against_its_gold(write):
    gold = GoldSet("gold.txt", [links({(0, 0)}), links({(0, 0)})], [(["a"], ["b"])] * 2)
    assert read_hypothesis(write("links.txt", "0-0", ""), gold) == [frozenset({(0, 0)}), frozenset()]
    with pytest.raises(XLFAError, match="links.txt has 1 lines and gold.txt 2"):
        read_hypothesis(write("links.txt", "0-0"), gold)
    with pytest.raises(XLFAError, match="links.txt has 3 lines and gold.txt 2"):
        read_hypothesis(write("links.txt", "0-0", "0-0", "0-0"), gold)
    with pytest.raises(XLFAError, match="links.txt, line 2: no target word 4"):
        read_hypothesis(write("links.txt", "0-0", "0-4"), gold)
    with pytest.raises(XLFAError, match="links.txt, line 1 has possible links"):
        read_hypothesis(write("links.txt", "0?0", "0-0"), gold)


def test_a_data_set_without_the_column_sure_is_all_sure(write_mirror):
    (gold,) = load_gold(data_root=write_mirror(DATASET, {"en-fr": mirror_rows()}))
    assert (gold.name, gold.languages, gold.told_apart) == ("en-fr", ("en", "fr"), False)
    assert gold.links == [links({(0, 0), (1, 1)})] * 2
    assert gold.pairs == [(["a", "b"], ["c", "d"])] * 2


def test_languages_and_numbers_of_pairs_are_chosen(write_mirror):
    root = write_mirror(DATASET, {"en-fr": mirror_rows(), "en-hi": mirror_rows()})
    assert [gold.name for gold in load_gold(data_root=root)] == ["en-fr", "en-hi"]
    (gold,) = load_gold(data_root=root, languages=["hi", "hi"], max_examples=1)
    assert (gold.name, len(gold.links), len(gold.pairs)) == ("en-hi", 1, 1)
    with pytest.raises(XLFAError, match="no configuration 'en-xx'; it has: en-fr, en-hi"):
        load_gold(data_root=root, languages=["xx"])


def test_bad_links_of_a_data_set_name_the_pair(write_mirror):
    root = write_mirror(DATASET, {"en-fr": mirror_rows([[0, 2]]), "en-hi": mirror_rows(sure=[[0, 1]])})
    with pytest.raises(XLFAError, match=r"en-fr, test\), pair 1: no target word 2"):
        load_gold(data_root=root, languages=["fr"])
    with pytest.raises(XLFAError, match=r"en-hi, test\), pair 1: \(0, 1\) is in 'sure' and not in 'alignment'"):
        load_gold(data_root=root, languages=["hi"])


def test_a_data_set_with_other_configurations_is_named(write_mirror):
    root = write_mirror(DATASET, {"en-cs": mirror_rows(), "de-fr": mirror_rows()})
    with pytest.raises(XLFAError, match="has no configuration en-ar, .*, en-zh; it has: en-cs, de-fr"):
        load_gold(data_root=root)
    assert [gold.name for gold in load_gold(data_root=root, languages=["cs"])] == ["en-cs"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("source", "a b", "'source' must be a list of words such as .*, not 'a b'"),
        ("target", [1, 2], "'target' must be a list of words .*, not \\[1, 2\\]"),
        ("target", None, "'target' must be a list of words .*, not None"),
        ("alignment", "0-0 1-1", "'alignment' must be a list of positions such as .*, not '0-0 1-1'"),
        ("alignment", [[0, 0, 1]], "'alignment' must be a list of positions .*, not \\[\\[0, 0, 1\\]\\]"),
        ("alignment", [[0.0, 1.0]], "'alignment' must be a list of positions"),
        ("alignment", ["0-0"], "'alignment' must be a list of positions"),
        ("alignment", None, "'alignment' must be a list of positions"),
        ("sure", "0-0", "'sure' must be a list of positions"),
    ],
)
def test_columns_of_another_form_name_the_pair(write_mirror, column, value, message):
    root = write_mirror(DATASET, {"en-fr": mirror_rows(**{column: value})})
    with pytest.raises(XLFAError, match=rf"local/word-alignment \(en-fr, test\), pair 1: {message}"):
        load_gold(data_root=root)


def test_the_embedded_gold_has_two_pairs_of_each_language_with_both_kinds_of_links():
    sets = load_gold(data_root=SAMPLE)
    assert [gold.name for gold in sets] == [f"en-{code}" for code in TARGET_LANGUAGES]
    assert sum(len(gold.links) for gold in sets) == 18
    for gold in sets:
        assert gold.told_apart
        for each, (source, target) in zip(gold.links, gold.pairs):
            # Short and complete: all words but a few have a link of one of the kinds.
            linked = {i for i, _ in each.possible}, {j for _, j in each.possible}
            assert len(source) - len(linked[0]) <= 2 and len(target) - len(linked[1]) <= 2


def test_the_embedded_gold_is_not_the_set_that_it_is_named_after():
    card = (SAMPLE_ROOT / DATASET / "README.md").read_text(encoding="utf-8")
    assert "license: cc0-1.0" in card and "Embedded sample" in card


@pytest.mark.shared
def test_the_mirror_is_read_whole(mirror):
    sets = load_gold(data_root=mirror)
    # Numbers of pairs and links as its README has them.
    assert {gold.name: (len(gold.links), sum(len(each.sure) for each in gold.links)) for gold in sets} == {
        "en-es": (100, 835),
        "en-fr": (584, 5385),
        "en-hi": (90, 1385),
        "en-ro": (448, 11231),
    }
    assert not any(gold.told_apart for gold in sets)


@pytest.mark.shared
def test_no_embedded_sentence_is_one_of_the_mirror(mirror):
    scored = {" ".join(source).lower() for gold in load_gold(data_root=mirror) for source, _ in gold.pairs}
    embedded = {" ".join(source).lower() for gold in load_gold(data_root=SAMPLE) for source, _ in gold.pairs}
    assert not scored & embedded
