"""The command line of `xlfa align-score`: score links against gold, or align gold sentences in many ways and score."""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlfa.alignment.commands import parse_layer
from xlfa.cli import start_logging
from xlfa.errors import XLFAError
from xlfa.files import writable_folder

if TYPE_CHECKING:
    from xlfa.alignment.gold import GoldSet

EPILOG = """examples:
  xlfa align-score gold.txt links.txt                      # Pharaoh files: 0-0 sure, 0?0 or 0p0 possible
  xlfa align-score gold.txt --file pairs.tsv --layer 8 --epsilon 0.1 --method mutual_argmax
  xlfa align-score --dataset local/word-alignment --data_root DATA --languages fr hi --layers 6 8 \\
    --epsilons 0.03 0.1 --unbalanced none 0.5 --choose --output_dir runs/align
  xlfa align-score                                         # the embedded gold

Scores after Och & Ney 2003, over all sentences at once, with 95 % bootstrap intervals over sentence pairs. Gold without
possible links gives aer_all_sure.
"""
MODEL_FLAGS = ("model", "layers", "epsilons", "unbalanced", "methods", "threshold", "choose")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `xlfa align-score`."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    start_logging(logging.WARNING)
    _check(arguments)
    from xlfa.alignment.score_table import format_table, write_table

    table = _score_hypothesis(arguments) if arguments.hypothesis is not None else _score_model(arguments)
    print(json.dumps(table, indent=1, ensure_ascii=False) if arguments.json else format_table(table))
    if arguments.output_dir is not None:
        write_table(arguments.output_dir, table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xlfa align-score",
        usage="xlfa align-score [GOLD [LINKS]] [options]",
        description="Alignment error rate, precision, recall and F1 of word alignments.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("gold", nargs="?", type=Path, metavar="GOLD", help="Pharaoh file with the links that people drew")
    add("hypothesis", nargs="?", type=Path, metavar="LINKS", help="Pharaoh file to score; else --file is aligned")
    add("--file", metavar="TSV", help="the sentences of GOLD: words with blanks between them, a tab between the sides")
    add("--index_base", type=int, choices=(0, 1), default=0, help="position of the first word in GOLD (0)")
    add("--dataset", metavar="ID", help="instead of GOLD; by default local/word-alignment")
    add("--data_root", metavar="DIR", help="where it lies as <org>/<name>, or sample (default without --dataset)")
    add("--languages", nargs="+", metavar="CODE", help="by default those of ar de es fr hi ro ru th zh that it has")
    add("--max_examples", type=_positive, metavar="N", help="the first N pairs of each language")
    add("--source_language", metavar="CODE", help="of --file, ISO 639-1; by default the script decides")
    add("--target_language", metavar="CODE", help="likewise")
    add("--model", metavar="NAME", help="an encoder or a trained XLFA model (packaged:multilingual-e5-small)")
    add("--layers", "--layer", nargs="+", type=parse_layer, metavar="N", help="0..N, fused or last (as xlfa align)")
    add("--epsilons", "--epsilon", nargs="+", type=float, metavar="E", help="of the plans (0.1)")
    add("--unbalanced", nargs="+", type=_strength, metavar="TAU", help="of the plans, or none (none)")
    add("--methods", "--method", nargs="+", metavar="NAME", help="mutual_argmax threshold softmax argmax (all four)")
    add("--threshold", type=float, metavar="T", help="of the method threshold (as xlfa align)")
    add("--choose", action="store_true", help="choose settings on the embedded gold and compare these with baselines")
    add("--output_dir", type=Path, metavar="DIR", help="write table.csv and table.json there")
    add("--json", action="store_true", help="print JSON")
    return parser


def _strength(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a number, or none") from None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return number


def _check(arguments: argparse.Namespace) -> None:
    """Everything that can be refused before a model is loaded."""
    data_flags = ("dataset", "data_root", "languages", "max_examples")
    if arguments.gold is not None:
        _refuse(arguments, data_flags, f"a data set, not with the file {arguments.gold}")
        if arguments.hypothesis is None and arguments.file is None:
            raise XLFAError(
                f"{arguments.gold} has links alone: name a file of links to score, or its sentences by --file"
            )
    else:
        _refuse(arguments, ("file", "source_language", "target_language"), "a file GOLD")
        if arguments.index_base:
            raise XLFAError("--index_base goes with a file GOLD: data sets count from 0")
    if arguments.hypothesis is not None:
        flags = (*MODEL_FLAGS, "source_language", "target_language")
        _refuse(arguments, flags, f"aligning, not with the links of {arguments.hypothesis}")
    if arguments.choose and arguments.gold is None and _data_root(arguments) == "sample":
        raise XLFAError("--choose chooses on the embedded gold, which would then be scored: name another --data_root")
    if arguments.output_dir is not None:
        writable_folder(arguments.output_dir)


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], place: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        # A threshold of 0 is given too.
        if value is not None and value is not False:
            raise XLFAError(f"--{name} goes with {place}")


def _score_hypothesis(arguments: argparse.Namespace) -> dict[str, Any]:
    from xlfa.alignment.gold import read_gold, read_hypothesis
    from xlfa.alignment.score_table import Condition, Proposal, score_proposals

    gold = read_gold(arguments.gold, arguments.index_base, arguments.file)
    proposal = Proposal(read_hypothesis(arguments.hypothesis, gold))
    return score_proposals([gold], {gold.name: {Condition(arguments.hypothesis.name): proposal}})


def _score_model(arguments: argparse.Namespace) -> dict[str, Any]:
    from xlfa.alignment.aligner import DEFAULT_MODEL, Aligner, TransportOptions
    from xlfa.alignment.gold import load_gold
    from xlfa.alignment.links import DEFAULT_THRESHOLD, check_method
    from xlfa.alignment.score_table import ALL_METHODS, choose, compare_chosen, grid, propose, score_proposals
    from xlfa.data import SAMPLE

    threshold = DEFAULT_THRESHOLD if arguments.threshold is None else arguments.threshold
    check_method("threshold", threshold)
    epsilons, unbalanced = arguments.epsilons or [TransportOptions.epsilon], arguments.unbalanced or [None]
    settings = (epsilons, unbalanced, arguments.methods or ALL_METHODS, threshold)
    # Refuses what no layer can have, before a model is loaded.
    conditions = grid([0], *settings)
    if all(condition.threshold is None for condition in conditions):
        _refuse(arguments, ("threshold",), "--method threshold")
    if all(condition.transport is None for condition in conditions):
        _refuse(arguments, ("epsilons", "unbalanced"), "--method mutual_argmax or threshold: the others need no plan")
    sets = _load_sets(arguments)
    model = arguments.model or DEFAULT_MODEL
    aligner = Aligner.from_pretrained(model)
    conditions = grid(arguments.layers or [aligner.layer], *settings)
    proposals = propose(aligner, sets, conditions)
    table = {"model": model, **score_proposals(sets, proposals)}
    if arguments.choose:
        embedded = load_gold(data_root=SAMPLE)
        chosen = choose(embedded, propose(aligner, embedded, conditions))
        table["comparison"] = compare_chosen(sets, proposals, chosen)
    return table


def _load_sets(arguments: argparse.Namespace) -> "list[GoldSet]":
    from dataclasses import replace

    from xlfa.alignment.gold import DATASET, load_gold, read_gold

    if arguments.gold is None:
        dataset = arguments.dataset or DATASET
        return load_gold(dataset, _data_root(arguments), arguments.languages, arguments.max_examples)
    gold = read_gold(arguments.gold, arguments.index_base, arguments.file)
    return [replace(gold, languages=(arguments.source_language, arguments.target_language))]


def _data_root(arguments: argparse.Namespace) -> str | None:
    """The embedded gold where neither data set nor folder is named."""
    return "sample" if arguments.dataset is None and arguments.data_root is None else arguments.data_root
