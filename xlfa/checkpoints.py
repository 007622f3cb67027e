"""Checkpoints of a training run: which one to go on from, and whether it is of the same model."""

from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME

from modeling_xlfa import XLFAConfig
from xlfa.arguments import XLFATrainingArguments
from xlfa.errors import XLFAError
from xlfa.publishing import RUN_FILE


def find_checkpoint(training_args: XLFATrainingArguments, weights_name: str) -> str | None:
    """The checkpoint to go on from, with its weights in a file `weights_name`; None for a new run.

    Raises:
        XLFAError: if the checkpoint asked for does not exist, or a new run would overwrite an older one.
    """
    wanted = training_args.resume_from_checkpoint
    folder = Path(training_args.output_dir)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if wanted is None or wanted.lower() == "false":
        if last is not None or (folder / RUN_FILE).exists():
            raise XLFAError(
                f"{folder} holds an earlier run: go on with --resume_from_checkpoint true, or name another --output_dir"
            )
        return None
    checkpoint = last if wanted.lower() == "true" else wanted
    if checkpoint is None:
        raise XLFAError(f"--resume_from_checkpoint true: there is no checkpoint in {folder}")
    needed = (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, CONFIG_NAME, weights_name)
    missing = [name for name in needed if not (Path(checkpoint) / name).is_file()]
    if missing:
        raise XLFAError(
            f"--resume_from_checkpoint {checkpoint}: the folder is not a training checkpoint, it lacks "
            + ", ".join(missing)
        )
    return checkpoint


def check_same_model(checkpoint: str, config: XLFAConfig) -> None:
    """Raise `XLFAError` if the checkpoint is of a model with other fields than `config`."""
    trained = XLFAConfig.from_pretrained(checkpoint)
    ours, theirs = config.to_dict(), trained.to_dict()
    own_fields = [name for name in ours if name.startswith(("fusion", "ot_", "classifier_", "input_"))]
    for name in (*own_fields, "id2label"):
        if ours[name] != theirs[name]:
            raise XLFAError(
                f"--resume_from_checkpoint {checkpoint}: it was trained with {name}={theirs[name]!r}, not "
                f"{ours[name]!r}: give the settings of that run, or start a new one in another --output_dir"
            )
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        ours_value, theirs_value = (getattr(each.text_config, name) for each in (config, trained))
        if ours_value != theirs_value:
            raise XLFAError(
                f"--resume_from_checkpoint {checkpoint}: its encoder has {name}={theirs_value!r}, this one "
                f"{ours_value!r}"
            )
