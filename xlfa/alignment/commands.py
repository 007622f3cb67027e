"""The command line of `xlfa align`: one pair of sentences, or a file of any size."""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from xlfa.alignment.words import check_language
from xlfa.cli import start_logging
from xlfa.errors import XLFAError
from xlfa.files import check_output, naming_output

if TYPE_CHECKING:
    from xlfa.alignment.aligner import Aligner, Alignment, EncodedPair, PairStates, TransportOptions

logger = logging.getLogger(__name__)

EPILOG = """examples:
  xlfa align "The cat sat on the mat." "Die Katze saß auf der Matte."
  xlfa align "The cat sat." "猫が座った。" --target_language ja --plot cat.png
  xlfa align --file pairs.tsv.gz --output links.txt --method threshold --threshold 3
"""
# Of the strip of pictures, from the exact plan to the uniform one.
STRIP_EPSILONS = (0, 0.03, 0.1, 0.3, 1, 3, math.inf)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `xlfa align`."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    start_logging(logging.WARNING)
    _check(arguments)
    if arguments.file is None:
        _align_sentences(arguments)
    else:
        _align_file(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xlfa align",
        usage="xlfa align SOURCE TARGET [options]\n       xlfa align --file PAIRS [--output LINKS] [options]",
        description="Which words of two sentences belong together, by optimal transport between an encoder's states.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="a sentence")
    add("target", nargs="?", metavar="TARGET", help="its translation")
    add("--file", metavar="TSV", help="many pairs, a line each: source, tab, target; also .gz; - is the standard input")
    add("--output", metavar="FILE", default="-", help="where to write; by default the standard output")
    add("--format", choices=["table", "pharaoh", "json"], help="table (default), or pharaoh (default of --file): 0-0 …")
    add("--skip_unusable", action="store_true", help="with --file: no links for a line that cannot be aligned")
    add("--model", default="packaged:multilingual-e5-small", metavar="NAME", help="an encoder or a trained XLFA model")
    add(
        "--layer",
        type=parse_layer,
        metavar="N",
        help="0..N, fused or last; default: as trained, else at 2/3 of the depth",
    )
    add("--epsilon", type=float, default=0.1, metavar="E", help="0: exact plan; small: hard; inf: uniform (0.1)")
    add(
        "--epsilon_scale",
        default="centered_std",
        metavar="UNIT",
        help="centered_std (default), std, mean, max, absolute",
    )
    add(
        "--unbalanced", type=float, metavar="TAU", help="words may stay unmatched; strength of the marginals, such as 2"
    )
    add("--words", default="icu", choices=["icu", "blanks"], help="by the language's rules (icu), or between blanks")
    add("--cost", default="cosine", metavar="NAME", help="cosine (default) or sqeuclidean")
    add("--method", default="mutual_argmax", metavar="NAME", help="of links: mutual_argmax (default) or threshold")
    add("--threshold", type=float, metavar="T", help="of the weight, 1: as in the uniform plan (2)")
    add("--source_language", metavar="CODE", help="ISO 639-1 code for splitting words; by default the script decides")
    add("--target_language", metavar="CODE", help="likewise")
    add(
        "--max_length",
        type=int,
        metavar="N",
        help="longest sentence in tokens; longer ones are errors, never cut (512)",
    )
    add("--max_tokens_per_batch", type=int, metavar="N", help="lower it where memory runs out")
    add("--plot", metavar="PNG", help="draw the plan, and plans from hard to uniform")
    add("--html", metavar="HTML", help="a page with the same")
    return parser


def parse_layer(text: str) -> int | str:
    """A layer as `Aligner` takes it, from a command line."""
    return int(text) if text.isdecimal() else text


def _check(arguments: argparse.Namespace) -> None:
    """Everything that can be refused before a model is loaded."""
    pair = [arguments.source, arguments.target]
    if (arguments.file is None and None in pair) or (arguments.file is not None and pair != [None, None]):
        raise XLFAError("give either a SOURCE and a TARGET sentence, or --file (xlfa align --help)")
    if arguments.file is None and arguments.skip_unusable:
        raise XLFAError("--skip_unusable goes with --file")
    if arguments.file is not None and (arguments.plot or arguments.html):
        raise XLFAError("--plot and --html show one pair of sentences, not --file")
    # Pipes are files too.
    if arguments.file not in (None, "-") and (not os.path.exists(arguments.file) or os.path.isdir(arguments.file)):
        raise XLFAError(f"--file {arguments.file}: no such file")
    if arguments.file is not None and arguments.format == "table":
        raise XLFAError("--format table shows one pair of sentences; --file takes pharaoh or json")
    for name in ("output", "plot", "html"):
        path = getattr(arguments, name)
        if path is not None and os.path.isdir(path):
            raise XLFAError(f"--{name} {path} is a folder: name a file")
    check_output(arguments.output, arguments.file)
    if arguments.plot is not None:
        from xlfa.alignment.heatmap import check_format

        check_format(Path(arguments.plot))
    if arguments.threshold is not None and arguments.method != "threshold":
        raise XLFAError(f"--threshold {arguments.threshold:g} goes with --method threshold")
    for language in _languages(arguments):
        check_language(language)
    if arguments.max_tokens_per_batch is not None and arguments.max_tokens_per_batch < 1:
        raise XLFAError(f"--max_tokens_per_batch {arguments.max_tokens_per_batch}: at least 1")


def _align_sentences(arguments: argparse.Namespace) -> None:
    from xlfa.answering import writing

    options, formatted = _options(arguments), _formatter(arguments)
    aligner = _load_aligner(arguments)
    pair = aligner.encode(*_in_words((arguments.source, arguments.target), arguments), _languages(arguments))
    states = aligner.run([pair])
    (alignment,) = aligner.align(states, options)
    with writing(arguments.output) as output:
        output.write(formatted(alignment) + "\n")
    if arguments.plot is not None or arguments.html is not None:
        _draw({f"epsilon {options.epsilon:g}": alignment, **strip(aligner, states, options)}, arguments)


def _draw(alignments: "dict[str, Alignment]", arguments: argparse.Namespace) -> None:
    if arguments.plot is not None:
        from xlfa.alignment.heatmap import draw_alignment

        with naming_output("plot", arguments.plot):
            draw_alignment(alignments, Path(arguments.plot))
    if arguments.html is not None:
        from xlfa.alignment.page import write_page

        with naming_output("html", arguments.html):
            write_page(alignments, Path(arguments.html))


def strip(aligner: "Aligner", states: "list[PairStates]", options: "TransportOptions") -> "dict[str, Alignment]":
    """Title → plan of one pair over epsilon, from hard to uniform; unbalanced ones have no exact and no uniform end."""
    ends = {0: "exact (0)", math.inf: "uniform (∞)"}
    epsilons = [epsilon for epsilon in STRIP_EPSILONS if options.unbalanced is None or epsilon not in ends]
    plans = (aligner.align(states, replace(options, epsilon=epsilon))[0] for epsilon in epsilons)
    return dict(zip((ends.get(epsilon, f"{epsilon:g}") for epsilon in epsilons), plans))


def _align_file(arguments: argparse.Namespace) -> None:
    from xlfa.alignment.aligner import CHUNK
    from xlfa.alignment.pairs import reading_lines
    from xlfa.answering import writing

    options, formatted = _options(arguments), _formatter(arguments)
    aligner = _load_aligner(arguments)
    skipped, first_error = 0, None
    with reading_lines(arguments.file) as lines, writing(arguments.output) as output, tqdm(desc="pairs") as bar:
        numbered = enumerate(lines, start=1)
        while chunk := list(islice(numbered, CHUNK)):
            pairs = [_encode(aligner, number, line, arguments) for number, line in chunk]
            errors = [pair for pair in pairs if isinstance(pair, XLFAError)]
            usable = [pair for pair in pairs if not isinstance(pair, XLFAError)]
            try:
                alignments = iter(aligner.align(aligner.run(usable), options))
            except XLFAError as error:
                first, last = chunk[0][0], chunk[-1][0]
                raise XLFAError(f"--file {arguments.file}, lines {first} to {last}: {error}") from None
            for pair in pairs:
                failed = isinstance(pair, XLFAError)
                output.write((_format_error(pair, arguments) if failed else formatted(next(alignments))) + "\n")
            skipped, first_error = skipped + len(errors), first_error or next(iter(errors), None)
            bar.update(len(chunk))
    if skipped:
        print(f"{skipped} lines could not be aligned; the first: {first_error}", file=sys.stderr)


def _encode(aligner: "Aligner", number: int, line: bytes, arguments: argparse.Namespace) -> "EncodedPair | XLFAError":
    """A line's pair, or with --skip_unusable what is wrong with it.

    Raises:
        XLFAError: for a line that cannot be aligned, with its number.
    """
    from xlfa.alignment.pairs import parse_pair

    try:
        return aligner.encode(*_in_words(parse_pair(line), arguments), _languages(arguments))
    except XLFAError as error:
        located = XLFAError(f"--file {arguments.file}, line {number}: {error}")
    if not arguments.skip_unusable:
        raise located
    return located


def _in_words(pair: tuple[str, str], arguments: argparse.Namespace) -> "tuple[str, str] | tuple[list[str], list[str]]":
    """The sentences, or with `--words blanks` their words."""
    return pair if arguments.words == "icu" else tuple(sentence.split() for sentence in pair)


def _options(arguments: argparse.Namespace) -> "TransportOptions":
    from xlfa.alignment.aligner import TransportOptions

    return TransportOptions(arguments.epsilon, arguments.epsilon_scale, arguments.unbalanced, arguments.cost)


def _load_aligner(arguments: argparse.Namespace) -> "Aligner":
    from xlfa.alignment.aligner import Aligner

    settings = (arguments.layer, arguments.max_length, arguments.max_tokens_per_batch)
    return Aligner.from_pretrained(arguments.model, *settings)


def _languages(arguments: argparse.Namespace) -> tuple[str | None, str | None]:
    return arguments.source_language, arguments.target_language


def _formatter(arguments: argparse.Namespace) -> "Callable[[Alignment], str]":
    """What writes an alignment with its links."""
    from xlfa.alignment.formats import format_json, format_pharaoh, format_table
    from xlfa.alignment.links import DEFAULT_THRESHOLD, check_method, extract_links

    method = arguments.method
    threshold = DEFAULT_THRESHOLD if arguments.threshold is None else arguments.threshold
    check_method(method, threshold)
    name = _format_name(arguments)

    def formatted(alignment: "Alignment") -> str:
        links = extract_links(alignment, method, threshold)
        if name != "pharaoh":
            return format_json(alignment, links) if name == "json" else format_table(alignment, links)
        if not alignment.converged:
            # The other formats say so themselves.
            words, error = " ".join(alignment.source), alignment.marginal_error
            logger.warning("the plan of %.60r did not converge: its marginals are off by %.1e", words, error)
        return format_pharaoh(links)

    return formatted


def _format_name(arguments: argparse.Namespace) -> str:
    return arguments.format or ("table" if arguments.file is None else "pharaoh")


def _format_error(error: XLFAError, arguments: argparse.Namespace) -> str:
    """What stands in the place of an alignment that there is not, so that lines still match the file's."""
    return json.dumps({"error": str(error)}, ensure_ascii=False) if _format_name(arguments) == "json" else ""
