"""What XLFA's additions cost a training step, and how fast it trains beside a plain reading of the field's scripts.

additions: a step (forward, backward, clipping, AdamW) of the plain encoder, with DLFA, with the transport term, and
with both, on the same batches in turns. Every side reads the parallel pairs: the plain one encodes them too, and takes
the mean of their states for a loss, so that the ratio is the cost of fusion and transport and not of more text. The
peak memory of each side is that of a process of its own, which runs these steps and no others. "one call" is the plain
side with examples and pairs in one call of the encoder, padded to the longer of the two.

peers: examples a second of one pass over the same examples in the same batches. "peers" is transformers' Trainer as
run_xnli and run_qa set it up: every input padded to the longest length (128, 384), float32. "ours" is `XLFATrainer` as
`train_xlfa.py` sets it up: padded to the batch, in parts of --max_tokens_per_batch, matrix products in bfloat16 where
the machine has them. Neither has dropout, fusion or transport, so that the losses of both can be compared step by step.
"""

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from datasets import Dataset
from reporting import header, table
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed

from modeling_xlfa.modeling_xlfa import XLFAPreTrainedModel
from modeling_xlfa.outputs_xlfa import XLFAModelOutput
from xlfa.arguments import XLFATrainingArguments
from xlfa.backbones import resolve_encoder
from xlfa.batching import GlobalBatches
from xlfa.environment import has_fast_bf16
from xlfa.errors import exit_with_message
from xlfa.files import write_text
from xlfa.parallel import PairSampler, load_parallel
from xlfa.tasks import Task, get_task
from xlfa.trainer import XLFATrainer
from xlfa.training import use_compiled_solver
from xlfa.vocabulary.trimming import trim_vocabulary

# Side → fields of the config; where there is no transport term, the pairs are encoded all the same.
SIDES = {
    "plain": {"fusion": "none"},
    "one call": {"fusion": "none"},
    "+ DLFA": {"fusion": "dlfa"},
    "+ OT": {"fusion": "none", "ot_weight": 0.1},
    "+ DLFA + OT": {"fusion": "dlfa", "ot_weight": 0.1},
}
MOST_TIME, MOST_MEMORY, LEAST_SPEED = 1.10, 1.05, 2.0
# Losses of the pass that count as equal, relative.
LOSS_TOLERANCE = 0.02
TRAINING_SETS = {"xnli": "local/nli-en", "xquad": "local/qa-en"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass
class Workload:
    """What all sides are trained on.

    Attributes:
        encoder: its folder.
        features: tokenised training examples, shuffled.
        pairs: parallel text.
    """

    task: Task
    encoder: str
    tokenizer: PreTrainedTokenizerBase
    features: Dataset
    pairs: PairSampler
    options: argparse.Namespace

    @classmethod
    def load(cls, task: Task, options: argparse.Namespace) -> "Workload":
        """The task's training examples, and the pairs of all languages, with a vocabulary of what they hold."""
        dataset = None if options.data_root == "sample" else TRAINING_SETS[task.name]
        examples = max(options.examples, options.steps * options.batch_size)
        rows = task.load_training(dataset, options.data_root, examples, options.seed)
        languages = options.languages or [code for code in task.test_configs if code != "en"]
        texts = load_parallel("local/parallel", languages, options.data_root, None, options.pairs, options.seed)
        every = [*task.texts(rows), *(text for pairs in texts.values() for pair in pairs for text in pair)]
        encoder = resolve_encoder(options.model)
        if options.trim_vocab:
            encoder = trim_vocabulary(encoder, every)
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        features = task.training_features(rows, tokenizer, options.max_length or task.defaults.max_length, 128)
        pairs = PairSampler.from_texts(texts, tokenizer, 128, options.seed)
        return cls(task, encoder, tokenizer, features, pairs, options)

    def model(self, **fields: Any) -> XLFAPreTrainedModel:
        """The head on the encoder; the same weights for the same fields."""
        if self.task.label_names:
            fields["num_labels"] = len(self.task.label_names)
        set_seed(self.options.seed)
        return self.task.model_class.from_encoder(self.encoder, **fields).to(self.options.device)

    def batches(self) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
        """Examples and pairs of each step, in batches grouped by length."""
        lengths = self.features["length"][:]
        sampler = GlobalBatches(lengths, self.options.batch_size, "group_by_length", self.options.seed, drop_last=True)
        collate = self.task.collator(self.tokenizer)
        rows = self.features.remove_columns("length")
        for step, positions in enumerate(cycle(sampler)):
            examples = collate([rows[position] for position in positions])
            pairs = self.pairs.batch(step, range(self.options.batch_size))
            yield (
                {name: values.to(self.options.device) for name, values in examples.items()},
                {name: values.to(self.options.device) for name, values in pairs.items()},
            )


def make_step(workload: Workload, side: str) -> Callable[[dict, dict], float]:
    """A training step of a side: takes examples and pairs, returns its seconds."""
    model = workload.model(**SIDES[side]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    device = torch.device(workload.options.device)

    def step(examples: dict[str, torch.Tensor], pairs: dict[str, torch.Tensor]) -> float:
        synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device)):
            if model.config.ot_weight:
                loss = model(**examples, **pairs).loss
            elif side == "one call":
                loss = loss_of_one_call(model, examples, pairs)
            else:
                loss = model(**examples).loss + encode_pairs(model, pairs).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - start

    return step


def encode_pairs(model: XLFAPreTrainedModel, pairs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last states of both sides of the pairs, in one call as the transport term has them."""
    return model.base_model.encoder(**stacked(model, pairs, ("source_", "target_"))).last_hidden_state


def loss_of_one_call(
    model: XLFAPreTrainedModel, examples: dict[str, torch.Tensor], pairs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The plain side's loss, with the encoder called once."""
    inputs = stacked(model, examples | pairs, ("", "source_", "target_"))
    states = model.base_model.encoder(**inputs).last_hidden_state
    size, width = examples["input_ids"].shape
    # The head without its encoder: what remains of the model is small.
    with mock.patch.object(model.base_model, "forward", lambda **_: XLFAModelOutput(states[:size, :width])):
        return model(**examples).loss + states[size:].mean()


def stacked(
    model: XLFAPreTrainedModel, batch: dict[str, torch.Tensor], prefixes: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """The sequences of these prefixes under one another, padded to the longest."""
    width = max(batch[f"{prefix}input_ids"].shape[1] for prefix in prefixes)
    fillings = {"input_ids": model.config.pad_token_id, "attention_mask": 0}
    return {
        name: torch.cat(
            [
                nn.functional.pad(values, (0, width - values.shape[1]), value=filling)
                for values in (batch[prefix + name] for prefix in prefixes)
            ]
        )
        for name, filling in fillings.items()
    }


def synchronize(device: torch.device) -> None:
    """Wait for what the device is doing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_sides(workload: Workload) -> dict[str, list[float]]:
    """Seconds of each step by side; at each step every side has the same batch, in an order that rotates."""
    steps = {side: make_step(workload, side) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    warm_up = 2
    batches = zip(range(workload.options.steps + warm_up), workload.batches())
    for number, (examples, pairs) in tqdm(batches, total=workload.options.steps + warm_up, unit="step"):
        order = list(SIDES)
        for side in order[number % len(order) :] + order[: number % len(order)]:
            spent = steps[side](examples, pairs)
            if number >= warm_up:
                seconds[side].append(spent)
    return seconds


def peak_memory(workload: Workload, side: str) -> float:
    """MiB at the peak of some steps of one side, in this process, which must have run nothing else."""
    step = make_step(workload, side)
    if workload.options.device == "cpu":
        # The peak so far, of reading data and weights, is forgotten (Linux).
        Path("/proc/self/clear_refs").write_text("5")
    for _, (examples, pairs) in zip(range(workload.options.memory_steps), workload.batches()):
        step(examples, pairs)
    if workload.options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10


def memory_of_sides(task: Task, argv: list[str]) -> dict[str, float]:
    """The peak of each side, by processes of their own, one after the other."""
    found = {}
    for side in SIDES:
        command = [sys.executable, __file__, *argv, "--tasks", task.name, "--memory_of", side]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[side] = json.loads(run.stdout.splitlines()[-1])
    return found


class Losses(TrainerCallback):
    """Keeps the loss of every step, and when the first one was over: before it, buffers and threads are made."""

    def __init__(self):
        self.found: list[float] = []
        self.first_step_over = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.first_step_over = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.found.append(float(logs["loss"]))


def run_pass(workload: Workload, side: str, folder: str) -> tuple[float, list[float]]:
    """Examples a second of one pass after its first step, and the losses of its steps."""
    ours = side != "peers"
    options = workload.options
    features = workload.features.select(range(options.examples))
    length = options.max_length or workload.task.defaults.max_length
    if not ours:
        columns = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in features.column_names]
        padded = [
            workload.tokenizer.pad({name: row[name] for name in columns}, padding="max_length", max_length=length)
            for row in features
        ]
        for name in columns:
            features = features.remove_columns(name).add_column(name, [row[name] for row in padded])
    losses = Losses()
    arguments = XLFATrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=1,
        learning_rate=workload.task.defaults.learning_rate,
        train_sampling_strategy="sequential",
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        seed=options.seed,
        bf16=ours and has_fast_bf16(torch.device(options.device)),
        max_tokens_per_batch=options.max_tokens_per_batch if ours else None,
        torch_compile=side == "ours, compiled",
        disable_tqdm=True,
    )
    common = {
        "model": workload.model(fusion="none", encoder_config=NO_DROPOUT, classifier_dropout=0.0),
        "args": arguments,
        "train_dataset": features,
        "data_collator": workload.task.collator(workload.tokenizer),
        "processing_class": workload.tokenizer,
        "callbacks": [losses],
    }
    if ours:
        own = {"pair_sampler": None, "validation_rows": features, "validation_windows": features}
        trainer = XLFATrainer(task=workload.task, **own, **common)
    else:
        trainer = Trainer(**common)
    gc.collect()
    trainer.train()
    seconds = time.perf_counter() - losses.first_step_over
    return (options.examples - options.batch_size) / seconds, losses.found


def bootstrap_interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the medians of resampled step ratios."""
    draws = torch.tensor(ratios)[torch.randint(len(ratios), (2000, len(ratios)))].median(dim=1).values
    return tuple(torch.quantile(draws, torch.tensor([0.025, 0.975])).tolist())


def additions_report(task: Task, workload: Workload, argv: list[str]) -> tuple[list[str], bool]:
    """The costs of the additions in a table, and whether they are within the targets, by their intervals too."""
    seconds = time_sides(workload)
    memory = memory_of_sides(task, argv)
    lines = [["side", "seconds a step", "times plain", "95 % interval", "peak MiB", "times plain"]]
    met = shown = True
    for side in SIDES:
        ratios = [own / plain for own, plain in zip(seconds[side], seconds["plain"])]
        ratio, size = statistics.median(ratios), memory[side] / memory["plain"]
        met &= side == "one call" or (ratio <= MOST_TIME and size <= MOST_MEMORY)
        low, high = bootstrap_interval(ratios)
        shown &= side == "one call" or high <= MOST_TIME
        lines.append(
            [side, f"{statistics.median(seconds[side]):.3f}", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}"]
            + [f"{memory[side]:.0f}", f"{size:.3f}"]
        )
    text = f"additions to {task.name}: at most {MOST_TIME} times the plain step and {MOST_MEMORY} times its memory"
    verdict = "NOT MET" if not met else "met" if shown else "NOT SHOWN, an interval reaches beyond the target"
    return [*table(lines), "", f"{verdict}: {text}"], met and shown


def peers_report(task: Task, workload: Workload) -> tuple[list[str], bool]:
    """Examples a second of both sides in a table, and whether ours is as fast as it must be, at equal loss."""
    sides = ["peers", "ours", *(["ours, compiled"] if workload.options.compile else [])]
    found: dict[str, list[tuple[float, list[float]]]] = {side: [] for side in sides}
    for _ in range(workload.options.repeats):
        for side in found:
            with tempfile.TemporaryDirectory() as folder:
                found[side].append(run_pass(workload, side, folder))
    speeds = {side: statistics.median(speed for speed, _ in runs) for side, runs in found.items()}
    losses = {side: runs[0][1] for side, runs in found.items()}
    means = {side: statistics.mean(own) for side, own in losses.items()}
    furthest = max(abs(ours - peers) for ours, peers in zip(losses["ours"], losses["peers"], strict=True))
    lines = [["side", "examples/s", "each repeat", "mean loss", "first", "last"]]
    for side, runs in found.items():
        each = " ".join(f"{speed:.2f}" for speed, _ in runs)
        ends = [f"{losses[side][position]:.4f}" for position in (0, -1)]
        lines.append([side, f"{speeds[side]:.2f}", each, f"{means[side]:.4f}", *ends])
    ratio = speeds["ours"] / speeds["peers"]
    equal = abs(means["ours"] / means["peers"] - 1) <= LOSS_TOLERANCE
    met = ratio >= LEAST_SPEED and equal
    each = [ours / peers for (ours, _), (peers, _) in zip(found["ours"], found["peers"])]
    return [
        *table(lines),
        "",
        f"ours: {ratio:.2f} times as fast as peers (each repeat: {' '.join(f'{value:.2f}' for value in each)}); losses "
        f"of a step differ by at most {furthest:.4f}",
        f"{'met' if met else 'NOT MET'}: {task.name}: at least {LEAST_SPEED} times as fast, mean losses within "
        f"{LOSS_TOLERANCE:.0%}",
    ], met


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="training.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_root", required=True, metavar="FOLDER", help="local data sets as <org>/<name>, or 'sample'")
    add("--tasks", nargs="+", choices=tuple(TRAINING_SETS), default=list(TRAINING_SETS), help="(default: both)")
    add("--parts", nargs="+", choices=("additions", "peers"), default=["additions", "peers"], help="(default: both)")
    add("--model", default="packaged:multilingual-e5-small", help="encoder (default: %(default)s)")
    add("--no_trim_vocab", dest="trim_vocab", action="store_false", help="keep the whole vocabulary")
    add("--languages", nargs="+", metavar="CODE", help="of the parallel text (default: all of the task)")
    add("--pairs", type=int, default=200, metavar="N", help="parallel pairs a language (default: %(default)s)")
    add("--steps", type=int, default=24, metavar="N", help="of each side, timed in turns (default: %(default)s)")
    add("--memory_steps", type=int, default=8, metavar="N", help="of each side, for its peak (default: %(default)s)")
    add("--examples", type=int, default=320, metavar="N", help="of the pass beside peers (default: %(default)s)")
    add("--repeats", type=int, default=1, metavar="N", help="passes of each side, in turns (default: %(default)s)")
    add("--batch_size", type=int, default=32, metavar="N", help="(default: %(default)s)")
    add("--max_length", type=int, metavar="N", help="(default: XTREME's, 128 and 384)")
    add("--max_tokens_per_batch", type=int, default=2048, metavar="N", help="of ours (default: %(default)s)")
    add("--compile", action="store_true", help="beside peers also train with --torch_compile")
    add("--threads", type=int, metavar="N", help="of torch, for all sides (default: torch's choice)")
    add("--seed", type=int, default=0, help="of data, heads and dropout (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="also write the report here, anew after every part")
    add("--memory_of", choices=tuple(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write; exit status 1 if a target is not met."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_arguments(argv)
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.disable_progress_bar()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    use_compiled_solver()
    if options.memory_of is not None:
        print(json.dumps(peak_memory(Workload.load(get_task(options.tasks[0]), options), options.memory_of)))
        return
    lines = [
        *header("benchmarks/training.py", argv, options.device),
        f"seed: {options.seed}; batches of {options.batch_size} examples and as many pairs; encoder: {options.model}",
    ]
    all_met = True
    for name in options.tasks:
        task = get_task(name)
        workload = Workload.load(task, options)
        lengths = workload.features["length"][:]
        lines += ["", f"{name}: {len(lengths)} inputs of {statistics.mean(lengths):.0f} tokens on average"]
        for part in options.parts:
            report, met = (
                additions_report(task, workload, argv) if part == "additions" else peers_report(task, workload)
            )
            lines += ["", *report]
            all_met &= met
            if options.output:
                write_text(options.output, "\n".join(lines) + "\n")
    print("\n".join(lines))
    raise SystemExit(0 if all_met else 1)


if __name__ == "__main__":
    exit_with_message(main)
