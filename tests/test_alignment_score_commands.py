"""The command line of `xlfa align-score` and the table behind it, with a tiny encoder and gold written by hand."""

import csv
import io
import json
import subprocess
import sys

import pytest
from datasets import Dataset

from xlfa.alignment.aligner import Aligner, TransportOptions
from xlfa.alignment.formats import PharaohLinks
from xlfa.alignment.gold import DATASET, TARGET_LANGUAGES, GoldSet
from xlfa.alignment.links import argmax_links, extract_links, softmax_links
from xlfa.alignment.score_commands import main
from xlfa.alignment.score_table import (
    BALANCED,
    UNBALANCED,
    Condition,
    Proposal,
    choose,
    compare_chosen,
    format_csv,
    format_table,
    grid,
    propose,
    score_proposals,
)
from xlfa.errors import XLFAError

pytestmark = pytest.mark.usefixtures("own_cache")
PAIRS = [("the cat sat .", "die katze sass ."), ("a dog", "ein hund"), ("yes", "ja")]


def links(sure, possible=()):
    return PharaohLinks(frozenset(sure), frozenset(sure) | frozenset(possible))


@pytest.fixture
def files(tmp_path):
    """Gold, links and sentences, with 6 sure links and 1 possible one."""
    contents = {
        "gold.txt": ["0-0 1-1 2-2 3?3", "0-0 1-1", "0-0"],
        "links.txt": ["0-0 1-1 3-3 2-3", "0-1", "0-0"],
        "pairs.tsv": ["\t".join(pair) for pair in PAIRS],
    }
    for name, lines in contents.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    return {name.partition(".")[0]: str(tmp_path / name) for name in contents}


@pytest.fixture
def gold():
    pairs = [(source.split(), target.split()) for source, target in PAIRS]
    diagonal = [links({(i, i) for i in range(len(source))}) for source, _ in pairs]
    return GoldSet("en-de", diagonal, pairs, ("en", "de"))


@pytest.fixture
def data_root(write_mirror):
    rows = [
        {"source": source.split(), "target": target.split(), "alignment": [[i, i] for i in range(len(source.split()))]}
        for source, target in PAIRS
    ]
    return write_mirror(DATASET, {name: {"test": Dataset.from_list(rows)} for name in ("en-fr", "en-hi")})


def run(capsys, *flags):
    """What the command prints as JSON."""
    main([*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


def test_links_are_scored_as_by_hand(files, capsys):
    (row,) = run(capsys, files["gold"], files["links"])["rows"]
    # 6 proposed: 3 of the 6 sure ones, 4 of the possible ones.
    assert row["pairs"] == 3
    assert row["precision"] == pytest.approx(100 * 4 / 6)
    assert row["recall"] == pytest.approx(50)
    assert row["aer"] == pytest.approx(100 * (1 - 7 / 12))
    assert row["aer_interval"][0] <= row["aer"] <= row["aer_interval"][1]


def test_the_printed_scores_name_what_the_gold_tells(files, tmp_path, capsys):
    main([files["gold"], files["links"]])
    assert "gold.txt: aer 41.7 [" in capsys.readouterr().out
    all_sure = tmp_path / "sure.txt"
    all_sure.write_text("0-0\n0-0\n0-0\n")
    main([str(all_sure), files["links"]])
    printed = capsys.readouterr().out
    assert "sure.txt: aer_all_sure " in printed and "aer " not in printed


def test_gold_may_count_from_1(files, tmp_path, capsys):
    from_one = tmp_path / "one.txt"
    from_one.write_text("1-1 2-2 3-3 4?4\n1-1 2-2\n1-1\n")
    (row,) = run(capsys, files["gold"], files["links"])["rows"]
    (other,) = run(capsys, from_one, files["links"], "--index_base", 1)["rows"]
    assert {**other, "set": row["set"]} == row


def test_links_are_checked_against_the_sentences_where_these_are_given(files, tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("0-0\n0-2\n0-0\n")
    main([files["gold"], str(outside)])
    with pytest.raises(XLFAError, match="outside.txt, line 2: no target word 2"):
        main([files["gold"], str(outside), "--file", files["pairs"]])


def test_sentences_are_aligned_and_scored(files, tiny_encoder, capsys):
    flags = ["--file", files["pairs"], "--model", tiny_encoder, "--layer", 2, "--epsilon", 0.3]
    table = run(capsys, files["gold"], *flags, "--method", "mutual_argmax")
    (row,) = table["rows"]
    assert (row["set"], row["method"], row["layer"], row["epsilon"]) == ("gold.txt", "mutual_argmax", 2, 0.3)
    aligner = Aligner.from_pretrained(tiny_encoder, layer=2)
    states = aligner.states([(source.split(), target.split()) for source, target in PAIRS])
    found = [extract_links(each) for each in aligner.align(states, TransportOptions(epsilon=0.3))]
    hits = sum((link.source, link.target) in sure for each, sure in zip(found, gold_links()) for link in each)
    assert row["recall"] == pytest.approx(100 * hits / 6)


def gold_links():
    """The sure links of the fixture `files`."""
    return [{(0, 0), (1, 1), (2, 2)}, {(0, 0), (1, 1)}, {(0, 0)}]


def test_a_data_set_gives_a_table_of_all_conditions(data_root, tiny_encoder, tmp_path, capsys):
    flags = ["--dataset", DATASET, "--data_root", data_root, "--model", tiny_encoder, "--layers", 1, 3]
    flags += ["--epsilons", 0.1, 1, "--unbalanced", "none", 0.5, "--output_dir", tmp_path / "out"]
    table = run(capsys, *flags)
    # 2 layers x (2 methods x 2 epsilons x 2 kinds of marginals + 2 baselines), for two languages and their average.
    assert len(table["conditions"]) == 2 * (8 + 2)
    assert len(table["rows"]) == 3 * 20
    assert table["error"] == "aer_all_sure"
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == table
    with (tmp_path / "out" / "table.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 60
    for row, described in zip(rows, table["rows"]):
        assert row["set"] == described["set"]
        assert float(row["aer_all_sure"]) == pytest.approx(described["aer_all_sure"], abs=0.006)
        assert float(row["f1_low"]) <= float(row["f1"]) <= float(row["f1_high"])
    # The two languages have the same text.
    for name in ("en-hi", "average"):
        own = [row["f1"] for row in table["rows"] if row["set"] == name]
        assert own == pytest.approx([row["f1"] for row in table["rows"] if row["set"] == "en-fr"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["table.csv", "table.json"]


def test_conditions_propose_what_the_library_extracts(gold, tiny_encoder):
    aligner = Aligner.from_pretrained(tiny_encoder)
    conditions = grid([1, 2], [0.1], [0.5], ["threshold", "softmax", "argmax"], 1.5)
    proposals = propose(aligner, [gold], conditions)["en-de"]
    assert list(proposals) == sorted(proposals, key=lambda condition: condition.layer)
    for layer in (1, 2):
        states = aligner.at_layer(layer).states(gold.pairs, gold.languages)
        transport = TransportOptions(epsilon=0.1, unbalanced=0.5)
        wanted = {
            Condition("threshold", layer, transport, 1.5): [
                extract_links(each, "threshold", 1.5) for each in aligner.align(states, transport)
            ],
            Condition("softmax", layer): [softmax_links(each) for each in states],
            Condition("argmax", layer): [argmax_links(each) for each in states],
        }
        for condition, found in wanted.items():
            as_pairs = [{(link.source, link.target) for link in each} for each in found]
            assert [set(each) for each in proposals[condition].links] == as_pairs


def test_baselines_are_there_once_a_layer():
    conditions = grid([1, 2], [0.1, 0.3, 1], [None], ["mutual_argmax", "argmax"], 2.0)
    assert sum(condition.method == "argmax" for condition in conditions) == 2
    assert sum(condition.method == "mutual_argmax" for condition in conditions) == 6


def test_the_limits_of_epsilon_are_in_the_table_as_json_knows_them(data_root, tiny_encoder, tmp_path, capsys):
    flags = ["--data_root", data_root, "--model", tiny_encoder, "--method", "mutual_argmax", "--epsilons", 0, "inf"]
    table = run(capsys, *flags, "--output_dir", tmp_path)

    def refuse(name):
        pytest.fail(f"{name} is no JSON")

    assert json.loads((tmp_path / "table.json").read_text(), parse_constant=refuse) == table
    assert [row["epsilon"] for row in table["rows"][:2]] == [0, "inf"]
    assert "epsilon inf, mutual_argmax" in format_table(table)


def test_unconverged_plans_are_counted(gold, tiny_encoder):
    aligner = Aligner.from_pretrained(tiny_encoder)
    stopped = Condition("mutual_argmax", 2, TransportOptions(epsilon=0.01, max_iter=1, tol=1e-12))
    proposals = propose(aligner, [gold], [stopped, Condition("argmax", 2)])
    rows = score_proposals([gold], proposals)["rows"]
    assert rows[0]["unconverged"] > 0 and rows[1]["unconverged"] == 0


def proposals_of(gold, **wrong):
    """Condition → the gold links, with that many of the first sentence's replaced by wrong ones."""
    conditions = {
        "softmax": Condition("softmax", 1),
        "balanced": Condition("threshold", 1, TransportOptions(), 2.0),
        "worse": Condition("threshold", 2, TransportOptions(), 2.0),
        "unbalanced": Condition("threshold", 1, TransportOptions(unbalanced=0.5), 2.0),
    }
    found = {}
    for name, number in wrong.items():
        first = sorted(gold.links[0].sure)
        replaced = frozenset({*first[number:], *((9, index) for index in range(number))})
        found[conditions[name]] = Proposal([replaced, *(each.sure for each in gold.links[1:])])
    return {gold.name: found}


def test_the_best_of_each_kind_is_chosen_elsewhere_and_compared_with_the_baselines(gold):
    # What is best on the development gold is not best on the scored one.
    chosen = choose([gold], proposals_of(gold, softmax=2, worse=0, balanced=1, unbalanced=3))
    assert {kind: condition.layer for kind, (condition, _) in chosen.items()} == {
        "softmax": 1,
        BALANCED: 2,
        UNBALANCED: 1,
    }
    comparison = compare_chosen([gold], proposals_of(gold, softmax=1, worse=3, balanced=0, unbalanced=1), chosen)
    assert comparison["chosen"][BALANCED]["scores"]["aer_all_sure"] == 0
    differences = comparison["differences"]["softmax"]["en-de"]
    # 7 links proposed and 7 in the gold: each wrong one costs 1/7.
    assert differences[BALANCED]["aer_all_sure"] == pytest.approx(100 * 2 / 7)
    assert differences[UNBALANCED]["aer_all_sure"] == pytest.approx(0)
    assert "softmax" not in differences


def test_choosing_from_the_command_line_scores_the_embedded_gold_too(data_root, tiny_encoder, capsys):
    flags = ["--data_root", data_root, "--languages", "fr", "--model", tiny_encoder, "--layers", 1, 2, "--choose"]
    table = run(capsys, *flags)
    assert set(table["comparison"]["chosen"]) == {BALANCED, "softmax", "argmax"}
    assert "aer" in table["comparison"]["chosen"]["softmax"]["scores"]
    assert set(table["comparison"]["differences"]["argmax"]["en-fr"]) == {BALANCED, "softmax"}
    printed = format_table(table)
    assert "chosen on the embedded gold" in printed
    # Of all conditions only those that were chosen, not the best ones on the scored sentences.
    assert len(table["conditions"]) == 8
    assert sum(line.startswith("layer ") for line in printed.splitlines()) == 3


def test_a_single_pair_has_no_interval_in_any_output(gold):
    one = GoldSet("one", gold.links[:1], gold.pairs[:1])
    condition = Condition("argmax", 1)
    table = score_proposals([one], {"one": {condition: Proposal([one.links[0].sure])}})
    assert table["rows"][0]["f1_interval"] is None
    (row,) = csv.DictReader(io.StringIO(format_csv(table["rows"])))
    assert (row["f1"], row["f1_low"], row["f1_high"]) == ("100.00", "", "")
    assert "one: aer_all_sure 0.0, precision 100.0" in format_table(table)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{gold}"], "gold.txt has links alone"),
        (["{gold}", "{links}", "--languages", "fr"], "--languages goes with a data set"),
        (["{gold}", "{links}", "--layer", "3"], "--layers goes with aligning"),
        (["{gold}", "{links}", "--epsilon", "3"], "--epsilons goes with aligning"),
        (["--file", "{pairs}"], "--file goes with a file GOLD"),
        (["--index_base", "1"], "--index_base goes with a file GOLD"),
        (["--choose"], "--choose chooses on the embedded gold"),
        (["--method", "nearest"], "--method nearest: it must be one of mutual_argmax"),
        (["--threshold", "0"], "threshold 0"),
        (["--epsilon", "-1"], "epsilon -1"),
        (["--unbalanced", "0"], "unbalanced 0"),
        (["--data_root", "/nowhere"], "the folder /nowhere/local/word-alignment does not exist"),
        (
            ["{gold}", "{links}", "--output_dir", "{gold}"],
            "cannot write to .*gold.txt .File exists.: name another folder",
        ),
        (["--output_dir", "n" * 300], "cannot write to n+ .File name too long.: name another folder"),
        (
            ["{gold}", "{links}", "--threshold", "0"],
            "--threshold goes with aligning, not with the links of .*links.txt",
        ),
        (["{gold}", "{links}", "--source_language", "de"], "--source_language goes with aligning"),
        (["{gold}", "{links}", "--target_language", "de"], "--target_language goes with aligning"),
        (["--method", "argmax", "--threshold", "3"], "--threshold goes with --method threshold"),
        (
            ["--methods", "argmax", "softmax", "--epsilon", "1"],
            "--epsilons goes with --method mutual_argmax or threshold",
        ),
        (["--method", "softmax", "--unbalanced", "1"], "--unbalanced goes with --method mutual_argmax or threshold"),
    ],
)
def test_bad_flags_are_refused_before_a_model_is_loaded(files, monkeypatch, flags, message):
    monkeypatch.setattr(Aligner, "from_pretrained", lambda *arguments: pytest.fail("a model was loaded"))
    with pytest.raises(XLFAError, match=message):
        main([flag.format(**files) for flag in flags])


def test_a_sentence_that_cannot_be_aligned_names_its_set_and_number(tiny_encoder):
    gold = GoldSet("gold.txt", [links({(0, 0)})] * 2, [(["a"], ["b"]), ([], ["b"])])
    with pytest.raises(XLFAError, match="gold.txt, sentence pair 2: the source sentence"):
        propose(Aligner.from_pretrained(tiny_encoder), [gold], [Condition("argmax", 1)])


def test_the_help_fits_a_screen_has_examples_and_waits_for_no_torch():
    code = (
        "import sys; from xlfa.alignment.score_commands import main\n"
        "try: main(['--help'])\n"
        "finally: print('torch' in sys.modules or 'transformers' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"COLUMNS": "120"})
    assert done.returncode == 0
    assert done.stderr.strip().endswith("False")
    assert "examples:" in done.stdout and " ".join(TARGET_LANGUAGES) in done.stdout
    assert len(done.stdout.splitlines()) <= 50


def test_the_embedded_gold_is_the_default(tiny_encoder, capsys):
    table = run(capsys, "--model", tiny_encoder, "--method", "argmax")
    assert len(table["sets"]) == 9 and set(table["sets"].values()) == {2}
    assert table["error"] == "aer"
    assert [row["pairs"] for row in table["rows"]] == [2] * 9 + [18]


@pytest.mark.offline
def test_a_multilingual_encoder_aligns_the_embedded_gold(capsys):
    flags = ["--data_root", "sample", "--languages", "de", "es", "--method", "mutual_argmax", "argmax"]
    for row in run(capsys, *flags)["rows"]:
        # Short sentences of common words, most of which a random encoder would not find.
        assert row["aer"] < 20
