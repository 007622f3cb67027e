"""`xlfa align`: one pair and files, every format, streams that are read no further than needed, and bad input."""

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from alignment_data import TEXTS
from hypothesis import HealthCheck, given, settings

from xlfa.alignment import aligner, pairs
from xlfa.alignment.aligner import Aligner, TransportOptions
from xlfa.alignment.commands import main
from xlfa.alignment.formats import format_pharaoh, parse_pharaoh
from xlfa.alignment.links import extract_links
from xlfa.errors import XLFAError

LINES = ["the cat sat.\tdie katze sass.", "a\tb", "we read, he said\twir lesen, sagte er", "7 cats\t7 katzen"]


@pytest.fixture(scope="module")
def model(tiny_encoder):
    """Loaded once for all examples of the property tests."""
    return Aligner.from_pretrained(tiny_encoder)


@pytest.fixture
def align(tiny_encoder, capsys):
    """Runs the command line and returns what it printed."""

    def run(*flags):
        main(["--model", tiny_encoder, *flags])
        return capsys.readouterr().out

    return run


@pytest.fixture
def tsv(tmp_path):
    def write(lines, name="pairs.tsv"):
        path = tmp_path / name
        content = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write


def expected_lines(model, **options):
    states = model.states([line.split("\t") for line in LINES])
    return [format_pharaoh(extract_links(each)) for each in model.align(states, TransportOptions(**options))]


def test_help_needs_no_torch_and_fits_a_screen():
    code = (
        "import sys\nfrom xlfa.alignment.commands import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    assert 'torch' not in sys.modules\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "xlfa align --file pairs.tsv.gz" in shown
    assert len(shown.splitlines()) <= 55


def test_a_pair_in_every_format(align, model):
    table, pharaoh, described = (align("a cat.", "b, c", "--format", name) for name in ("table", "pharaoh", "json"))
    assert align("a cat.", "b, c") == table
    (alignment,) = model.align(model.states([("a cat.", "b, c")]), TransportOptions())
    links = extract_links(alignment)
    assert pharaoh == format_pharaoh(links) + "\n"
    assert json.loads(described)["links"] == [vars(link) for link in links]
    assert json.loads(described)["source"] == ["a", "cat", "."]
    assert [row.split()[:2] for row in table.splitlines()[1 : len(links) + 1]] == [
        [alignment.source[link.source], alignment.target[link.target]] for link in links
    ]


def test_options_reach_the_plan(align, model):
    flags = [
        "--epsilon",
        "0.4",
        "--epsilon_scale",
        "mean",
        "--unbalanced",
        "3",
        "--cost",
        "sqeuclidean",
        "--layer",
        "1",
    ]
    links = ["--method", "threshold", "--threshold", "1.1", "--format", "json"]
    described = json.loads(align("a cat.", "b, c", *flags, *links))
    options = TransportOptions(0.4, "mean", 3, "sqeuclidean")
    (alignment,) = model.align(model.at_layer(1).states([("a cat.", "b, c")]), options)
    assert described["epsilon"] == pytest.approx(alignment.epsilon)
    assert (
        described["null_source"] == pytest.approx(alignment.null_source.tolist()) and sum(described["null_source"]) > 0
    )
    assert described["links"] == [vars(link) for link in extract_links(alignment, "threshold", 1.1)]


def test_words_between_blanks_are_those_of_the_corpus(align, model, tsv):
    text = ("it 's a well-known cat .", "die katze .")
    described = json.loads(align(*text, "--words", "blanks", "--format", "json"))
    assert (described["source"], described["target"]) == (text[0].split(), text[1].split())
    assert sum(described["source_mass"]) == pytest.approx(1) == sum(described["target_mass"])
    (alignment,) = model.align(model.states([tuple(side.split() for side in text)]), TransportOptions())
    found = align("--file", tsv(["\t".join(text)]), "--words", "blanks")
    assert found == format_pharaoh(extract_links(alignment)) + "\n"
    assert json.loads(align(*text, "--format", "json"))["source"] != text[0].split()


def test_pipes_are_read_and_written_as_they_are(align, model, tmp_path):
    source, target = tmp_path / "pairs", tmp_path / "links"
    for path in (source, target):
        os.mkfifo(path)
    with ThreadPoolExecutor() as pool:
        pool.submit(source.write_text, "\n".join(LINES))
        read = pool.submit(target.read_text)
        align("--file", str(source), "--output", str(target))
        assert read.result().splitlines() == expected_lines(model)
    assert target.is_fifo()


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.tsv.gz"])
def test_a_file_in_chunks_is_aligned_line_by_line(align, model, tsv, tmp_path, monkeypatch, name):
    monkeypatch.setattr(aligner, "CHUNK", 3)
    path = tsv(["\ufeff" + LINES[0] + "\r", *LINES[1:]], name)
    assert align("--file", path).splitlines() == expected_lines(model)
    assert align("--file", path, "--output", str(tmp_path / "links.txt"), "--epsilon", "1") == ""
    assert (tmp_path / "links.txt").read_text().splitlines() == expected_lines(model, epsilon=1)


def test_the_standard_input(align, model, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("\n".join(LINES).encode())))
    assert align("--file", "-").splitlines() == expected_lines(model)


def test_a_file_is_read_no_further_than_a_chunk_ahead(tiny_encoder, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr("sys.stdout", written)
    monkeypatch.setattr(aligner, "CHUNK", 2)
    seen = []

    def lines():
        for number in range(7):
            seen.append(written.getvalue().count("\n"))
            yield f"a{number}\tb".encode()

    monkeypatch.setattr(pairs, "reading_lines", lambda path: contextlib.closing(lines()))
    main(["--model", tiny_encoder, "--file", "-"])
    assert seen == [0, 0, 2, 2, 4, 4, 6]


BAD_LINES = [
    ("", "it is empty"),
    ("only one", "it has 0 tabs"),
    ("a\tb\tc", "it has 2 tabs"),
    ("a\t \u200b", "the target sentence: no word"),
    (b"a\t\xff", "it is not UTF-8"),
    ("a\t" + "b" * 600, "602 tokens .* more than 512"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_and_leaves_no_file(align, tsv, tmp_path, line, message):
    path = tsv([*LINES, line])
    with pytest.raises(XLFAError, match=rf"--file {path}, line 5: .*{message}"):
        align("--file", path, "--output", str(tmp_path / "links.txt"))
    assert [each.name for each in tmp_path.iterdir()] == ["pairs.tsv"]


def test_bad_lines_are_skipped_on_demand_and_keep_their_place(tiny_encoder, model, tsv, capsys):
    path = tsv([LINES[0], *(line for line, _ in BAD_LINES), *LINES[1:]])
    flags = ["--model", tiny_encoder, "--file", path, "--skip_unusable"]
    main(flags)
    printed = capsys.readouterr()
    first, *others = expected_lines(model)
    assert printed.out.splitlines() == [first, *[""] * len(BAD_LINES), *others]
    assert f"6 lines could not be aligned; the first: --file {path}, line 2: it is empty" in printed.err
    main([*flags, "--format", "json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in row for row in rows] == [False, *[True] * len(BAD_LINES), False, False, False]


def test_a_broken_archive(align, tsv):
    path = tsv(LINES * 100, "pairs.tsv.gz")
    with open(path, "r+b") as file:
        file.truncate(60)
    with pytest.raises(XLFAError, match="cannot read .*pairs.tsv.gz"):
        align("--file", path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a"], "give either a SOURCE and a TARGET"),
        (["a", "b", "--file", "c"], "give either"),
        (["--file", "none.tsv"], "--file none.tsv: no such file"),
        (["a", "b", "--skip_unusable"], "goes with --file"),
        (["--file", "n" * 300], "--file n+: no such file"),
        (["a", "b", "--output", "n" * 300], "cannot write to --output n+: File name too long"),
        (["a", "b", "--plot", "n" * 300 + ".png"], "cannot write to --plot n+.png: File name too long"),
        (["a", "b", "--html", "n" * 300], "cannot write to --html n+: File name too long"),
        (["--file", "-", "--plot", "a.png"], "one pair of sentences"),
        (["--file", "-", "--format", "table"], "--file takes pharaoh or json"),
        (["--file", "README.md", "--output", "./README.md"], "--output ./README.md is the file that is read"),
        (["a", "b", "--plot", "a.jpg"], "a.jpg: a picture of an alignment is one of .png"),
        (["a", "b", "--output", "."], "--output . is a folder"),
        (["a", "b", "--threshold", "2"], "--threshold 2 goes with --method threshold"),
        (["a", "b", "--method", "best"], "method 'best'"),
        (["a", "b", "--method", "threshold", "--threshold", "0"], "threshold 0.0"),
        (["a", "b", "--epsilon", "-1"], "epsilon -1"),
        (["a", "b", "--unbalanced", "1", "--epsilon", "0"], "hard marginals only"),
        (["a", "b", "--cost", "l2"], "cost 'l2'"),
        (["a", "b", "--layer", "9"], "--layer 9: the model has the layers 0 to 4"),
        (["a", "b", "--max_length", "9999"], "--max_length 9999"),
        (["a", "b", "--max_tokens_per_batch", "0"], "--max_tokens_per_batch 0: at least 1"),
        (["a", "b", "--source_language", "English"], "language 'English' is no ISO 639-1 code"),
        (["a", "\u2066 \u2069"], "the target sentence: no word"),
        (["a", "\udcff"], "not valid Unicode"),
        (["a", "b" * 600], "602 tokens"),
    ],
)
def test_bad_input_is_one_error(align, flags, message):
    with pytest.raises(XLFAError, match=message):
        align(*flags)


def test_pictures_get_the_plan_and_plans_from_hard_to_uniform(align, monkeypatch, tmp_path):
    drawn = {}
    for module, function in (("heatmap", "draw_alignment"), ("page", "write_page")):
        fake = SimpleNamespace(**{function: lambda alignments, path: drawn.update({path.name: alignments})})
        fake.check_format = lambda path: None
        monkeypatch.setitem(sys.modules, f"xlfa.alignment.{module}", fake)
    flags = ["--plot", str(tmp_path / "plan.png"), "--html", str(tmp_path / "plan.html")]
    align("a cat sat", "b cad zat", *flags)
    plans = drawn["plan.png"]
    assert list(plans) == ["epsilon 0.1", "exact (0)", "0.03", "0.1", "0.3", "1", "3", "uniform (∞)"]
    assert list(drawn["plan.html"]) == list(plans)
    perplexities = [plan.perplexity for plan in list(plans.values())[1:]]
    assert perplexities == sorted(perplexities) and perplexities[-1] == pytest.approx(7)
    align("a cat sat", "b cad zat", *flags, "--unbalanced", "2")
    assert list(drawn["plan.png"]) == ["epsilon 0.1", "0.03", "0.1", "0.3", "1", "3"]


def test_a_plan_that_did_not_converge_is_reported(align, monkeypatch, caplog):
    monkeypatch.setattr(TransportOptions, "__post_init__", lambda options: vars(options).update(max_iter=1, tol=1e-12))
    assert parse_pharaoh(align("we read, he said", "wir lesen, sagte er", "--format", "pharaoh")).sure
    assert "the plan of 'we read , he said' did not converge" in caplog.text


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=TEXTS, target=TEXTS)
def test_what_comes_out_is_made_of_the_words_that_went_in(model, source, target):
    try:
        pair = model.encode(source, target)
    except XLFAError as error:
        assert "no word" in str(error)
        return
    (alignment,) = model.align(model.run([pair]), TransportOptions())
    for text, words in ((source, alignment.source), (target, alignment.target)):
        assert all(word in text for word in words)
    assert alignment.weights.shape == (len(alignment.source), len(alignment.target))
    assert alignment.weights.sum() == pytest.approx(1) and (alignment.weights >= 0).all()
    links = parse_pharaoh(format_pharaoh(extract_links(alignment))).sure
    assert all(row < len(alignment.source) and column < len(alignment.target) for row, column in links)
