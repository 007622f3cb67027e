"""Compare how fast XLFA scores a model in all languages with the usual protocol of XTREME's and transformers' scripts.

Two sides score the same examples with the same model, in turns, in one process. "ours" is one call of what
`eval_xlfa.py` does, as it is by default and once more in float32; "peers" is a plain reading of the scripts' protocol
(`scoring_peers.py`): padding to the longest length, batches of 8, float32, a load of the model a language, the n-best
search in Python. A side's clock runs from before it loads model and data until its predictions are there and scored;
ours also has the bootstrap, the files and the figure inside. Each timed run reads the data into an empty cache of
datasets, but for the last one of ours, "warm". One language of each side is run before, without a clock.

That both sides predict the same is checked too: in float32 at least 99 % of the predictions must be equal, or else the
exit status is 1. In bfloat16 near ties may flip, and that share is only reported. Differences in XQuAD that remain have
a known cause: the scripts' n-best search sees the 20 best starts and ends alone, wherever these lie. An untrained
head's best ones often lie outside the context or make no span, and the check fails: give a trained model for xquad.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
import transformers
from accelerate import PartialState
from reporting import header, table
from scoring_peers import BATCH_SIZE, N_BEST, Scored, score_languages
from tqdm.auto import tqdm
from transformers import AutoTokenizer

import xlfa.data
from xlfa.backbones import resolve_encoder
from xlfa.errors import exit_with_message
from xlfa.evaluation import EvaluationArguments, evaluate_model
from xlfa.files import write_text
from xlfa.scores import predictions_file, read_predictions
from xlfa.tasks import Prediction, Task, get_task

OURS, OURS_FLOAT32, OURS_WARM, PEERS = "ours", "ours, float32", "ours, warm", "peers"
COLD_SIDES = (OURS, PEERS, OURS_FLOAT32)
REQUIRED_AGREEMENT = 0.99
ENCODER = "packaged:multilingual-e5-small"


@dataclass(frozen=True)
class Run:
    """One side, once through all languages.

    Attributes:
        seconds: by the side's clock.
        numbers: the type that matrix products were in.
        predictions: of each language, by the examples' ids.
        scores: 0 to 100, by language and metric.
    """

    seconds: float
    numbers: str
    predictions: dict[str, dict[str, Prediction]]
    scores: dict[str, dict[str, float | None]]

    @property
    def examples(self) -> int:
        """How many were scored, all languages together."""
        return sum(map(len, self.predictions.values()))


@dataclass
class Case:
    """What both sides score, and what they found.

    Attributes:
        model: folder of a model with a head for the task, and its tokenizer.
        origin: where that model comes from, in words.
        folder: for caches and outputs.
        ids: the examples of every language, in order; like the two lengths, known from ours after `warm_up`.
        max_length, doc_stride: of the inputs, in tokens.
        single: language and id of the examples that fit into one window.
        runs: those with a clock, by side.
    """

    task: Task
    model: str
    origin: str
    languages: list[str]
    options: argparse.Namespace
    folder: Path
    ids: list[str] = field(default_factory=list)
    max_length: int = 0
    doc_stride: int = 0
    single: set[tuple[str, str]] = field(default_factory=set)
    runs: dict[str, list[Run]] = field(default_factory=lambda: {side: [] for side in (*COLD_SIDES, OURS_WARM)})

    @property
    def metric(self) -> str:
        """The score that the report shows."""
        return self.task.metrics[0]

    def new_folder(self) -> Path:
        """An empty folder, for one run."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def warm_up(self) -> None:
        """The first language on both sides, without a clock: imports, thread pools and the metric are there after it,
        and it is known which examples and lengths ours takes."""
        output, languages = self.new_folder(), self.languages[:1]
        scores, _ = self.score_by_ours(languages, output, self.new_folder())
        self.ids = scores["ids"]
        self.max_length, self.doc_stride = scores["settings"]["max_length"], scores["settings"]["doc_stride"]
        self.score_by_peers(languages, self.new_folder())

    def measure(self) -> Iterator[str]:
        """All runs; yields the name of each before it begins."""
        yield "warm-up"
        self.warm_up()
        for _ in range(self.options.repeats):
            for side in COLD_SIDES:
                yield side
                # What the run before left must not be cleared away inside this one's clock.
                gc.collect()
                cache = self.new_folder()
                self.runs[side].append(self.run_peers(cache) if side == PEERS else self.run_ours(side, cache))
                if side == OURS:
                    warm_cache = cache
        yield OURS_WARM
        self.runs[OURS_WARM].append(self.run_ours(OURS_WARM, warm_cache))

    def run_ours(self, side: str, cache: Path) -> Run:
        """`evaluate_model` with a clock."""
        output = self.new_folder()
        options = {"bf16": False} if side == OURS_FLOAT32 else {}
        scores, seconds = self.score_by_ours(self.languages, output, cache, **options)
        rows = {language: read_predictions(predictions_file(output, language)) for language in self.languages}
        numbers = "bfloat16" if scores["settings"]["bf16"] else "float32"
        return Run(seconds, numbers, by_id(rows), scores["languages"])

    def run_peers(self, cache: Path) -> Run:
        """The peers' protocol with a clock."""
        found, seconds = self.score_by_peers(self.languages, cache)
        for language, scored in found.items():
            self.single |= {
                (language, row.id) for row, windows in zip(scored.predictions, scored.windows) if windows == 1
            }
        rows = {language: scored.predictions for language, scored in found.items()}
        return Run(seconds, "float32", by_id(rows), {language: scored.scores for language, scored in found.items()})

    def score_by_ours(
        self, languages: list[str], output: Path, cache: Path, **options: Any
    ) -> tuple[dict[str, Any], float]:
        """The content of `scores.json`, and seconds."""
        arguments = EvaluationArguments(
            task=self.task.name,
            model=self.model,
            languages=languages,
            data_root=self.options.data_root,
            output_dir=str(output),
            max_examples=self.options.max_examples,
            seed=self.options.seed,
            **options,
        )
        with datasets_cache(cache):
            began = time.perf_counter()
            scores = evaluate_model(arguments)
            return scores, time.perf_counter() - began

    def score_by_peers(self, languages: list[str], cache: Path) -> tuple[dict[str, Scored], float]:
        """What the peers' protocol finds in each language, and seconds."""
        with datasets_cache(cache):
            began = time.perf_counter()
            found = score_languages(
                self.task,
                self.model,
                languages,
                self.ids,
                self.options.data_root,
                self.max_length,
                self.doc_stride,
            )
            return found, time.perf_counter() - began

    def agreement(
        self, side: str, languages: list[str] | None = None, *, single: bool = False
    ) -> tuple[float | None, int]:
        """Share of predictions that are equal to the peers' of the same repeat, and how many were compared.

        Args:
            side: one of ours.
            languages: by default all.
            single: only the examples that fit into one window; where there is none the share is None.
        """
        equal = [
            # Spaces around an answer count for no metric, and the scripts keep them.
            prediction.prediction.strip() == peers.predictions[language][id].prediction.strip()
            for ours, peers in zip(self.runs[side], self.runs[PEERS])
            for language in languages or self.languages
            for id, prediction in ours.predictions[language].items()
            if not single or (language, id) in self.single
        ]
        return (sum(equal) / len(equal) if equal else None), len(equal)

    @property
    def agrees(self) -> bool:
        """Whether both sides predict the same in float32."""
        return self.agreement(OURS_FLOAT32)[0] >= REQUIRED_AGREEMENT


def by_id(rows: dict[str, list[Prediction]]) -> dict[str, dict[str, Prediction]]:
    """Predictions of each language by the examples' ids."""
    return {language: {row.id: row for row in own} for language, own in rows.items()}


def datasets_cache(folder: Path) -> Any:
    """While inside, xlfa reads data sets through the cache `folder`."""
    return mock.patch.object(xlfa.data, "HF_DATASETS_CACHE", folder)


def untrained_model(task: Task, seed: int, folder: Path) -> None:
    """Write a model with a random head for the task on `ENCODER` to `folder`, with its tokenizer."""
    encoder = resolve_encoder(ENCODER)
    torch.manual_seed(seed)
    labels = {"id2label": dict(enumerate(task.label_names))} if task.label_names else {}
    task.model_class.from_encoder(encoder, **labels).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)


def percent(share: float | None) -> str:
    """A share as the tables show it."""
    return "-" if share is None else f"{share:.2%}"


def sides_table(case: Case) -> list[str]:
    """A line a side: how fast, how good, and how much like the peers."""
    headings = ["side", "numbers", "data", "runs", "seconds", "examples/s", f"mean {case.metric}"]
    lines = [[*headings, "equal", "equal (one window)"]]
    for side in (OURS, OURS_WARM, OURS_FLOAT32, PEERS):
        runs = case.runs[side]
        seconds = statistics.median(run.seconds for run in runs)
        mean = statistics.mean(scores[case.metric] for scores in runs[0].scores.values())
        shares = ["", ""]
        if side != PEERS:
            shares = [percent(case.agreement(side)[0]), percent(case.agreement(side, single=True)[0])]
        lines.append(
            [
                *(side, runs[0].numbers, "warm" if side == OURS_WARM else "cold", str(len(runs))),
                *(f"{seconds:.1f}", f"{runs[0].examples / seconds:.2f}", f"{mean:.2f}"),
                *shares,
            ]
        )
    return table(lines)


def ratio_lines(case: Case) -> list[str]:
    """How many times as fast as the peers ours is, in each repeat and in the middle."""
    lines = []
    for side in (OURS, OURS_FLOAT32):
        ratios = [peers.seconds / ours.seconds for ours, peers in zip(case.runs[side], case.runs[PEERS])]
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"{side}: {statistics.median(ratios):.2f} times as fast as peers (median; each repeat: {each})")
    return lines


def languages_table(case: Case) -> list[str]:
    """A line a language: the scores of the first repeat, and the share of equal predictions in all."""
    headings = [f"{case.metric}, {side}" for side in (OURS, OURS_FLOAT32, PEERS)]
    lines = [["language", *headings, f"equal, {OURS}", f"equal, {OURS_FLOAT32}", "in one window"]]
    for language in case.languages:
        scores = [case.runs[side][0].scores[language][case.metric] for side in (OURS, OURS_FLOAT32, PEERS)]
        shares = [case.agreement(side, [language])[0] for side in (OURS, OURS_FLOAT32)]
        single = sum(of_language == language for of_language, _ in case.single)
        lines.append([language, *(f"{score:.2f}" for score in scores), *map(percent, shares), str(single)])
    return table(lines)


def verdict(case: Case) -> str:
    """Whether both sides predict the same in float32, in one line."""
    share, compared = case.agreement(OURS_FLOAT32)
    text = (
        f"{case.task.name}: {percent(share)} of {compared} predictions in float32 equal the peers', at least "
        f"{REQUIRED_AGREEMENT:.0%} must be"
    )
    return f"ok: {text}" if case.agrees else f"FAILED: {text}; model: {case.origin}"


def case_report(case: Case) -> list[str]:
    """All that was found about one task."""
    inputs = f"inputs of at most {case.max_length} tokens"
    if not case.task.label_names:
        inputs += f", neighbouring windows share {case.doc_stride}"
    return [
        f"{case.task.name}: {len(case.languages)} languages, {len(case.ids)} examples each; {inputs}",
        f"model: {case.origin}",
        "",
        *sides_table(case),
        "",
        *ratio_lines(case),
        verdict(case),
        "",
        *languages_table(case),
    ]


LEGEND = f"""\
seconds: median of the runs, from before the model is loaded until predictions are scored. data: whether the cache of
datasets was empty (cold). equal: share of predictions equal to the peers', of all examples and of those that fit into
one window; "in one window" says how many these are. The mean of scores is that of the first repeat, over languages.
peers: batches of {BATCH_SIZE}, padded to the longest length, float32, {N_BEST} best starts and ends."""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scoring.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_root", required=True, metavar="FOLDER", help="local data sets as <org>/<name>, or 'sample'")
    add(
        "--tasks",
        nargs="+",
        choices=("xnli", "xquad"),
        default=["xnli", "xquad"],
        help="what to score (default: both)",
    )
    for name in ("xnli", "xquad"):
        add(
            f"--model_{name}",
            metavar="FOLDER",
            help=f"trained model for {name} (default: an untrained head on {ENCODER})",
        )
    add("--languages", nargs="+", metavar="CODE", help="ISO 639-1 (default: all of the task under --data_root)")
    add("--max_examples", type=int, default=310, metavar="N", help="a language, at most (default: %(default)s)")
    add("--repeats", type=int, default=1, metavar="N", help="runs of each side, in turns (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="of torch, for both sides (default: torch's choice)")
    add("--seed", type=int, default=0, help="of the examples and an untrained head (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="also write the report here, anew after every task")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def make_case(task: Task, languages: list[str], options: argparse.Namespace, folder: Path) -> Case:
    """The task's case, with the model that the command line names or an untrained one."""
    model = getattr(options, f"model_{task.name}")
    if model is not None:
        return Case(task, model, model, languages, options, folder)
    untrained_model(task, options.seed, folder / "model")
    origin = f"an untrained head (torch seed {options.seed}) on {ENCODER}"
    return Case(task, str(folder / "model"), origin, languages, options, folder)


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write; exit status 1 if the sides' predictions in float32 are not the same."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_arguments(argv)
    PartialState(cpu=not torch.accelerator.is_available())
    transformers.utils.logging.set_verbosity_warning()
    # Bars of every load of a model and of data would tear those of the runs apart.
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    tasks = [get_task(name) for name in options.tasks]
    # Before anything is measured: a language that one of the tasks lacks is an error.
    languages = [task.check_languages(options.languages, options.data_root) for task in tasks]
    lines = [
        *header("benchmarks/scoring.py", argv, str(PartialState().device)),
        f"seed: {options.seed}; at most {options.max_examples} examples a language, whole premises or paragraphs",
        "",
        LEGEND,
    ]
    cases = []
    runs_a_task = 2 + options.repeats * len(COLD_SIDES)
    with tqdm(total=len(tasks) * runs_a_task, unit="run") as bar:
        for task, own_languages in zip(tasks, languages):
            with tempfile.TemporaryDirectory() as folder:
                case = make_case(task, own_languages, options, Path(folder))
                for number, side in enumerate(case.measure()):
                    bar.update(min(number, 1))
                    bar.set_description(f"{task.name}: {side}")
                bar.update()
            cases.append(case)
            lines += ["", *case_report(case)]
            if options.output:
                write_text(options.output, "\n".join(lines) + "\n")
    print("\n".join(lines))
    if failed := [case for case in cases if not case.agrees]:
        print("\n".join(verdict(case) for case in failed), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    exit_with_message(main)
