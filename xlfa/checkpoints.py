"""Checkpoints of a training run: when one is complete, which one to go on from, and whether it is of the same run.

Trainer writes the files of a checkpoint in place. The last one written is a manifest with their names and sizes and
what the run was trained on: a folder without it, or with other sizes, is what an interruption left, and does not count.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from modeling_xlfa import XLFAConfig
from xlfa.arguments import XLFATrainingArguments
from xlfa.errors import XLFAError
from xlfa.files import write_text
from xlfa.parallel import PairSampler
from xlfa.run_file import RUN_FILE, has_finished_run

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
ROWS_A_BLOCK = 10_000
# What a full disk, a full quota and a limit on the size of files say.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch's writer says no more than that it failed, and where.
TORCH_WRITER = ("inline_container", "iostream error", "PytorchStreamWriter")
# Fields of an encoder's config that change nothing in it.
OTHER_ENCODER_FIELDS = {"_name_or_path", "dtype", "transformers_version"}
ANOTHER_RUN = "or start a new run in another --output_dir"


# Which one to go on from


def find_checkpoint(training_args: XLFATrainingArguments, weights_name: str) -> str | None:
    """The checkpoint to go on from, with its weights in a file `weights_name`; None for a new run.

    Of those in the run folder it is the newest complete one; the log names what is passed over.

    Raises:
        XLFAError: if there is none, the one asked for or the best one so far is incomplete, or a new run would
            overwrite an older one.
    """
    wanted = training_args.resume_from_checkpoint
    folder = Path(training_args.output_dir)
    if wanted is None or wanted.lower() == "false":
        check_unused(folder)
        return None
    if wanted.lower() != "true":
        checkpoint = Path(wanted)
        defect = find_defect(checkpoint, weights_name)
        if defect is not None:
            raise XLFAError(
                f"--resume_from_checkpoint {wanted}: the folder is not a training checkpoint, or not a whole one: "
                + defect
            )
    else:
        checkpoint = newest_complete(folder, weights_name)
        if checkpoint is None:
            raise XLFAError(
                f"--resume_from_checkpoint true: there is no checkpoint in {folder} that is complete; without the "
                "flag the run begins anew"
            )
    if training_args.load_best_model_at_end:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        # The run may have been moved, or begun in another working directory.
        best = state["best_model_checkpoint"] and checkpoint.parent / Path(state["best_model_checkpoint"]).name
        defect = None if best is None else find_defect(best, weights_name)
        if defect is not None:
            raise XLFAError(
                f"--resume_from_checkpoint {checkpoint}: --load_best_model_at_end needs its best checkpoint so far, "
                f"{best}: {defect}"
            )
    return str(checkpoint)


class BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint of a run that was moved beside the one that is resumed: Trainer looks at the old place.

    Args:
        resumed: the checkpoint that `find_checkpoint` returned.
    """

    def __init__(self, resumed: str):
        self.resumed = Path(resumed)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        best = self.resumed.parent / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_global_step is not None and best.is_dir():
            state.best_model_checkpoint = str(best)


def check_unused(folder: Path) -> None:
    """Raise `XLFAError` if the folder holds a run; one that was interrupted before its first checkpoint is none."""
    found = checkpoints_in(folder)
    begun = (folder / RUN_FILE).exists()
    if has_finished_run(folder) or (found and not begun) or any(is_complete(each) for each in found):
        raise XLFAError(
            f"{folder} holds an earlier run: go on with --resume_from_checkpoint true, or name another --output_dir"
        )


def newest_complete(folder: Path, weights_name: str | None = None) -> Path | None:
    """The newest complete checkpoint in a run folder, None without one; the log names what is passed over."""
    for checkpoint in checkpoints_in(folder):
        defect = find_defect(checkpoint, weights_name)
        if defect is None:
            return checkpoint
        logger.warning("%s is passed over: %s", checkpoint, defect)
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """All folders `checkpoint-N` in it, complete or not, the newest (largest N) first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int | None:
    """The optimizer step after which a checkpoint was written, by its name."""
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, and is as it was then."""
    return find_defect(checkpoint) is None


def find_defect(checkpoint: Path, weights_name: str | None = None) -> str | None:
    """What a folder lacks to be a checkpoint that can be gone on from, in words; None if nothing.

    Args:
        weights_name: the file that must hold the weights; None where it need only be complete.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    if weights_name is not None:
        missing = [
            name for name in (CONFIG_NAME, TRAINER_STATE_NAME, weights_name) if not (checkpoint / name).is_file()
        ]
        # FSDP and DeepSpeed have their own names for it; with --save_only_model there is none.
        if not [path for pattern in ("optimizer*", "global_step*") for path in checkpoint.glob(pattern)]:
            missing.append(OPTIMIZER_NAME)
        if missing:
            return f"it lacks {', '.join(missing)}"
    try:
        sizes = dict(read_manifest(checkpoint)["files"])
    except FileNotFoundError:
        return f"it lacks {MANIFEST_FILE}, which is written last"
    except (KeyError, OSError, TypeError, ValueError) as error:
        return f"its {MANIFEST_FILE} is damaged ({error!r})"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"it lacks {name}"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What `complete` wrote.

    Raises:
        OSError, ValueError: if it cannot be read.
    """
    return json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))


# Writing


def complete(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Declare a checkpoint complete: all its files are on the disk, and the manifest is written.

    Args:
        identity: from `run_identity`.
    """
    sizes = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST_FILE):
        # A manifest that outlives a loss of power must not stand for files that did not.
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    manifest = {"files": sizes, "run": identity}
    write_text(checkpoint / MANIFEST_FILE, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def remove_old(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove what an interruption left beside a complete checkpoint, and complete ones beyond `limit` (None: keep all).

    The best checkpoint stays, and `newest`; one of a later step is of a run that was not gone on with, and goes first.
    """
    kept = {newest.name} | (set() if best is None else {Path(best).name})
    others = [path for path in checkpoints_in(newest.parent) if path.name not in kept]
    spare = [path for path in others if is_complete(path)]
    if limit:
        spare.sort(key=lambda path: step_of(path) < step_of(newest), reverse=True)
        spare = spare[: max(0, limit - len(kept))]
    for path in others:
        if path not in spare:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Turn what the writers of a run folder raise on a full disk into an `XLFAError` with place and remedy."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_out_of_space(error):
            raise
        last = newest_complete(folder)
        remedy = "run the command again" if last is None else f"go on from {last.name} (--resume_from_checkpoint true)"
        raise XLFAError(
            f"cannot write to {folder} (is the disk full? {error}): free some space, then {remedy}"
        ) from None


def is_out_of_space(error: Exception) -> bool:
    """Whether a writer (of Python, safetensors or torch) failed for want of space."""
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    if isinstance(error, SafetensorError):
        return any(f"(os error {number})" in str(error) for number in NO_SPACE)
    return any(part in str(error) for part in TORCH_WRITER)


# Whether it is of the same run


def run_identity(
    features: Dataset,
    validation_windows: Dataset,
    pair_sampler: PairSampler | None,
    piece_weights: torch.Tensor | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What a resumed run must have in common with the one it goes on from: digests of its data, and some settings."""
    digests = {
        "training examples": digest_of_rows(features),
        "validation examples": digest_of_rows(validation_windows),
    }
    if pair_sampler is not None:
        digests["parallel pairs"] = digest_of_pairs(pair_sampler)
    if piece_weights is not None:
        digests["piece weights"] = hashlib.sha256(piece_weights.detach().cpu().numpy().tobytes()).hexdigest()
    return {"digests": digests, "settings": settings}


def digest_of_rows(rows: Dataset) -> str:
    """SHA-256 of the content of all columns, however the rows are cut into blocks or cached.

    Blocks of a fixed number of rows are written as Arrow's IPC format.
    """
    digest = hashlib.sha256()
    arrow = rows.with_format("arrow")
    for start in range(0, len(rows), ROWS_A_BLOCK):
        block = arrow[start : start + ROWS_A_BLOCK].replace_schema_metadata(None)
        # A copy has buffers of its own; those of a slice may be parts of others, and be written otherwise.
        block = block.take(np.arange(len(block))).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, block.schema) as writer:
            writer.write_table(block)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def digest_of_pairs(pair_sampler: PairSampler) -> str:
    """SHA-256 of the tokenised pairs, in order."""
    digest = hashlib.sha256()
    for language, pairs in pair_sampler.pairs.items():
        sides = list(chain.from_iterable(pairs))
        digest.update(f"{language}\0{len(sides)}\0".encode())
        digest.update(np.fromiter(map(len, sides), dtype=np.int64).tobytes())
        digest.update(np.fromiter(chain.from_iterable(sides), dtype=np.int64).tobytes())
    return digest.hexdigest()


def check_same_run(checkpoint: str, identity: dict[str, Any]) -> None:
    """Raise `XLFAError` if the checkpoint was trained on other data than `identity`, or in another way."""
    trained = read_manifest(Path(checkpoint))["run"]
    place = f"--resume_from_checkpoint {checkpoint}: "
    for name in sorted({*identity["digests"], *trained["digests"]}):
        if identity["digests"].get(name) != trained["digests"].get(name):
            raise XLFAError(
                f"{place}its {name} had another content than now: give the data, the tokenizer and the limits of that "
                f"run, {ANOTHER_RUN}"
            )
    for name, value in identity["settings"].items():
        if trained["settings"].get(name) != value:
            raise XLFAError(
                f"{place}it was trained with {name}={trained['settings'].get(name)!r}, not {value!r}: give the "
                f"settings of that run, {ANOTHER_RUN}"
            )


def check_same_model(checkpoint: str, config: XLFAConfig) -> None:
    """Raise `XLFAError` if the checkpoint is of a model with other fields than `config`."""
    trained = XLFAConfig.from_pretrained(checkpoint)
    ours, theirs = config.to_dict(), trained.to_dict()
    own_fields = [name for name in ours if name.startswith(("fusion", "ot_", "freeze_", "classifier_", "input_"))]
    for name in (*own_fields, "id2label"):
        if ours[name] != theirs[name]:
            raise XLFAError(
                f"--resume_from_checkpoint {checkpoint}: it was trained with {name}={theirs[name]!r}, not "
                f"{ours[name]!r}: give the settings of that run, {ANOTHER_RUN}"
            )
    # As JSON, which the checkpoint's has gone through.
    ours, theirs = (json.loads(json.dumps(each.text_config.to_dict(), default=str)) for each in (config, trained))
    for name in sorted({*ours, *theirs} - OTHER_ENCODER_FIELDS):
        if ours.get(name) != theirs.get(name):
            raise XLFAError(
                f"--resume_from_checkpoint {checkpoint}: its encoder has {name}={theirs.get(name)!r}, this one "
                f"{ours.get(name)!r}: give the --model and --encoder_config of that run, {ANOTHER_RUN}"
            )
