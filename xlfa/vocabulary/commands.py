"""The command line of `xlfa vocab`: trim or augment the vocabulary of an encoder."""

import argparse
import logging
import sys

from xlfa.backbones import naming_model
from xlfa.cli import add_command, start_logging
from xlfa.vocabulary.augmentation import INITIALISATIONS, choose_pieces, piece_model, write_augmented
from xlfa.vocabulary.folders import NEW_PIECES_FILE, Source, check_new_folder, new_folder
from xlfa.vocabulary.texts import check_text_files, read_sentences
from xlfa.vocabulary.trimming import kept_ids, write_trimmed

TRIM = "trim"
TRIM_EXAMPLE = "xlfa vocab trim --model xlm-roberta-base --texts el.txt en.txt --output_dir encoders/small"
AUGMENT_EXAMPLE = "xlfa vocab augment --model xlm-roberta-base --texts el.txt --pieces 1000 --output_dir encoders/greek"
EPILOG = f"""examples:
  {TRIM_EXAMPLE}
  {AUGMENT_EXAMPLE}
  xlfa train --model encoders/greek …

trim keeps the pieces that the texts use; on these texts the encoder computes the same as before.
augment adds pieces trained on the texts (Chau & Smith 2021); they want training: old pieces keep their ids.
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of `xlfa vocab`."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    start_logging(logging.WARNING)
    check_text_files(arguments.texts)
    check_new_folder(arguments.output_dir)
    with naming_model(arguments.model):
        source = Source.open(arguments.model)
    if arguments.command == TRIM:
        _trim(source, arguments)
    else:
        _augment(source, arguments)
    print(f"written to {arguments.output_dir}: a folder for --model")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xlfa vocab",
        description="Fit the vocabulary of an encoder to text.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="trim|augment")
    trim = add_command(commands, TRIM, "keep only the pieces that texts use", TRIM_EXAMPLE)
    augment = add_command(commands, "augment", "add pieces of a language", AUGMENT_EXAMPLE)
    for command in (trim, augment):
        command.add_argument("--model", required=True, metavar="ENCODER", help="Hub id, folder or packaged: name")
        command.add_argument(
            "--texts", required=True, nargs="+", metavar="FILE", help="UTF-8 text of any size, one sentence a line"
        )
        command.add_argument(
            "--output_dir", "--output-dir", required=True, metavar="DIR", help="new folder for encoder and tokenizer"
        )
    augment.add_argument("--pieces", required=True, type=_positive, metavar="N", help="how many pieces are added")
    augment.add_argument(
        "--initialisation",
        choices=INITIALISATIONS,
        default=INITIALISATIONS[0],
        help="of new embeddings: mean of the old pieces each replaces (default), or random",
    )
    augment.add_argument("--seed", type=int, default=0, help="of --initialisation random (0)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return number


def _trim(source: Source, arguments: argparse.Namespace) -> None:
    kept = kept_ids(source, read_sentences(arguments.texts, "reading"))
    with new_folder(arguments.output_dir) as folder:
        write_trimmed(source, kept, folder)
    print(f"kept {len(kept)} of {len(source.tokenizer)} pieces")


def _augment(source: Source, arguments: argparse.Namespace) -> None:
    model = piece_model(source)
    augmentation = choose_pieces(
        model, lambda description: read_sentences(arguments.texts, description), arguments.pieces
    )
    with new_folder(arguments.output_dir) as folder:
        write_augmented(source, model, augmentation, arguments.initialisation, arguments.seed, folder)
    last = model.first_id + len(augmentation.pieces) - 1
    print(f"added {len(augmentation.pieces)} pieces with the ids {model.first_id} to {last}, in {NEW_PIECES_FILE}")
    print("first of them:", *augmentation.pieces[:10])
    for name, found in (("before", augmentation.before), ("after", augmentation.after)):
        print(f"{name}: {found.pieces_per_word:.3f} pieces a word, {100 * found.unknown_rate:.3f} % of them unknown")
