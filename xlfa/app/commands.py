"""The command line of `xlfa app`: a page on this machine."""

import argparse
import importlib.util
import ipaddress
import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xlfa.cli import start_logging
from xlfa.errors import XLFAError

if TYPE_CHECKING:
    from xlfa.alignment.aligner import Aligner
    from xlfa.app.answering_tab import QuestionModel

logger = logging.getLogger(__name__)

EPILOG = """examples:
  xlfa app
  xlfa app --model runs/xnli-dlfa-ot --question_model runs/quickstart/xquad --runs runs --port 8000

The page asks no other machine for anything and sends nothing. Only this machine can reach it, unless --host says
otherwise. It stops with Ctrl-C.
"""
DEFAULT_RUNS = Path("runs")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `xlfa app`."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    start_logging(logging.WARNING)
    # Read by gradio when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    _check(arguments)
    from xlfa.alignment.aligner import Aligner
    from xlfa.app.page import build_page, serve

    aligner = Aligner.from_pretrained(arguments.model)
    page = build_page(aligner, _load_question_model(arguments, aligner), arguments.runs or DEFAULT_RUNS)
    print(f"{serve(page, arguments.host, arguments.port)} (stop with Ctrl-C)", flush=True)
    page.block_thread()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xlfa app",
        description="A local page: align two sentences, ask a question about a paragraph, compare two runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        default="packaged:multilingual-e5-small",
        metavar="NAME",
        help="aligns: an encoder or a trained XLFA model, a folder or a Hub id (%(default)s)",
    )
    add("--question_model", metavar="RUN", help="answers; by default --model, if it was trained to answer questions")
    add("--runs", type=Path, metavar="DIR", help=f"scored runs below this folder can be compared ({DEFAULT_RUNS})")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (%(default)s: this machine alone)")
    add("--port", type=int, default=7860, metavar="N", help="%(default)s")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Everything that can be refused before a model is loaded."""
    if arguments.runs is not None and not os.path.isdir(arguments.runs):
        raise XLFAError(f"--runs {arguments.runs}: no such folder")
    if not 1 <= arguments.port <= 65535:
        raise XLFAError(f"--port {arguments.port}: it must be 1 to 65535")
    if importlib.util.find_spec("gradio") is None:
        raise XLFAError('the page needs Gradio: pip install "xlfa[app]"')
    _check_address(arguments.host, arguments.port)
    if not _is_loopback(arguments.host):
        logger.warning("--host %s: anyone who reaches this machine over the network can use the page", arguments.host)


def _check_address(host: str, port: int) -> None:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise XLFAError(
            f"cannot listen on --host {host} --port {port} ({reason}): choose another --port, or an address of this "
            "machine"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _load_question_model(arguments: argparse.Namespace, aligner: "Aligner") -> "QuestionModel | None":
    """The model of `--question_model`, or that of `--model` if it has the head, else None."""
    from xlfa.answering import TASK
    from xlfa.app.answering_tab import QuestionModel
    from xlfa.evaluation import load_model

    name = arguments.question_model
    if name is None and aligner.model.config.architectures == [TASK.model_class.__name__]:
        name = arguments.model
    if name is None:
        return None
    model, tokenizer = load_model(TASK, name, "model" if arguments.question_model is None else "question_model")
    return QuestionModel(name, model.to(aligner.model.device), tokenizer)
