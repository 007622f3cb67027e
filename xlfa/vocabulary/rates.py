"""A learning rate of its own for the embeddings of new pieces, which are rows of one parameter."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from xlfa.errors import XLFAError
from xlfa.vocabulary.folders import NEW_PIECES_FILE, read_new_pieces


def new_piece_rows(path: str) -> slice:
    """The rows of the embeddings that `xlfa vocab augment` added to the encoder in a folder or on the Hub.

    Raises:
        XLFAError: where it added none.
    """
    record = read_new_pieces(path)
    if record is None:
        raise XLFAError(
            f"--new_pieces_learning_rate: {path} has no {NEW_PIECES_FILE}: it is for encoders of `xlfa vocab augment`"
        )
    return slice(record["first_id"], record["first_id"] + len(record["pieces"]))


def scale_row_steps(
    optimizer: Optimizer, weight: torch.nn.Parameter, rows: slice, ratio: float
) -> list[RemovableHandle]:
    """Let every step of the optimizer move some rows of a parameter `ratio` times as far.

    That multiplies their learning rate: with AdamW, Adam and SGD a step, weight decay included, is proportional to the
    rate, and no state of the optimizer depends on it. Larger gradients would do nothing: AdamW divides by their size.

    Args:
        weight: V x E, one of the optimizer's parameters.
        rows: of `weight`.
        ratio: rate of the rows / rate of their parameter group; a schedule of the rate holds for both.

    Returns:
        Handles, whose `remove` undoes it.

    Raises:
        XLFAError: where the optimizer does not train `weight` as a whole: it is frozen, or cut up among devices.
    """
    if not any(weight is parameter for group in optimizer.param_groups for parameter in group["params"]):
        raise XLFAError(
            "--new_pieces_learning_rate: the word embeddings are not trained as one parameter: leave out "
            "--freeze_word_embeddings and --peft, and train with data parallelism or on one device"
        )
    before: list[torch.Tensor] = []

    def remember(*_: Any) -> None:
        before.append(weight.detach()[rows].clone())

    def stretch(*_: Any) -> None:
        start = before.pop()
        moved = weight.detach()[rows]
        moved.copy_(start + ratio * (moved - start))

    hooks: list[tuple[Callable, Callable]] = [
        (optimizer.register_step_pre_hook, remember),
        (optimizer.register_step_post_hook, stretch),
    ]
    return [register(hook) for register, hook in hooks]
