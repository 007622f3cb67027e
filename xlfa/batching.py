"""Training batches: the same global batch at any number of processes, and its parts by a budget of tokens."""

import math
from collections.abc import Iterator
from itertools import zip_longest

import torch
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from xlfa.errors import XLFAError
from xlfa.inference import token_batches

SIDES = ("source", "target")


class GlobalBatches(Sampler):
    """One process's share of each global batch of training examples; a batch sampler of torch's `DataLoader`.

    The order is a function of seed and epoch: the same after a resume and at any number of processes. Every process
    takes part in every batch. Of a last batch with fewer examples than processes, some get its first example as a
    stand-in, which `share` does not count.

    Args:
        lengths: tokens of each example.
        batch_size: of the global batch.
        strategy: `random`, `group_by_length` or `sequential`, as transformers' `train_sampling_strategy`.
        seed: of the order.
        processes, rank: of the launch.
        grouped: batches that are grouped by length together (those of one optimizer step).
        drop_last: leave out a last batch that is not full.

    Raises:
        XLFAError: for another strategy.
    """

    def __init__(
        self,
        lengths: list[int],
        batch_size: int,
        strategy: str,
        seed: int,
        processes: int = 1,
        rank: int = 0,
        grouped: int = 1,
        drop_last: bool = False,
    ):
        self.generator = torch.Generator()
        self.size, self.batch_size, self.seed, self.epoch = len(lengths), batch_size, seed, 0
        self.processes, self.rank, self.drop_last = processes, rank, drop_last
        if strategy == "random":
            self.sampler = RandomSampler(lengths, generator=self.generator)
        elif strategy == "sequential":
            self.sampler = SequentialSampler(lengths)
        elif strategy == "group_by_length":
            self.sampler = LengthGroupedSampler(batch_size * grouped, lengths=lengths, generator=self.generator)
        else:
            raise XLFAError(
                f"--train_sampling_strategy {strategy}: it must be random, group_by_length or sequential; lengths are "
                "balanced by --max_tokens_per_batch"
            )

    def set_epoch(self, epoch: int) -> None:
        """accelerate's data loader calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.batch_size if self.drop_last else math.ceil(self.size / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        self.generator.manual_seed(self.seed + self.epoch)
        order = list(self.sampler)
        for number in range(len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield batch[self.rank :: self.processes] or batch[:1]

    def share(self, number: int) -> range:
        """Positions, in the global batch with that number in the epoch, of this process's examples."""
        return range(self.rank, min(self.batch_size, self.size - number * self.batch_size), self.processes)


def label_counts(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """How many labels each example of a batch adds to the mean that its loss is, B: 1, or its labelled tokens."""
    labels = batch.get("labels")
    if labels is None:
        return torch.ones(len(batch["input_ids"]), dtype=torch.long)
    return (labels != -100).long().reshape(len(labels), -1).sum(dim=1)


def split_batch(
    batch: dict[str, torch.Tensor], max_example_tokens: int | None, max_pair_tokens: int | None
) -> list[tuple[dict[str, torch.Tensor], float, float]]:
    """A batch in parts of examples, and of pairs, of similar length.

    Args:
        batch: task examples and perhaps parallel pairs, padded on the right.
        max_example_tokens, max_pair_tokens: of a part, padding included; None leaves them together.

    Returns:
        Parts, each with its share of the batch's labels and its share of the pairs. The last part has of both, where
        both are in the batch: distributed training reduces gradients there.
    """
    sides = [{name: tensor for name, tensor in batch.items() if name.startswith(side)} for side in SIDES]
    examples = {name: tensor for name, tensor in batch.items() if not name.startswith(SIDES)}
    counts = label_counts(examples)
    example_parts = [
        (_rows(examples, positions), int(counts[positions].sum()) / int(counts.sum()))
        for positions in _groups(_lengths(examples), max_example_tokens)
    ]
    pair_parts = []
    if all(sides):
        # Both sides are encoded in one call, padded to the longer one.
        lengths = 2 * torch.stack([_lengths(side) for side in sides]).amax(dim=0)
        pair_parts = [
            ({**_rows(sides[0], positions), **_rows(sides[1], positions)}, len(positions) / len(lengths))
            for positions in _groups(lengths, max_pair_tokens)
        ]
    parts = list(zip_longest(example_parts, pair_parts, fillvalue=({}, 0.0)))
    # The longest, which are in the first parts, come last.
    return [
        ({**some_examples, **some_pairs}, label_share, pair_share)
        for (some_examples, label_share), (some_pairs, pair_share) in reversed(parts)
    ]


def _groups(lengths: torch.Tensor, max_tokens: int | None) -> list[list[int]]:
    return [list(range(len(lengths)))] if max_tokens is None else token_batches(lengths.tolist(), max_tokens)


def _lengths(group: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of each row of columns with one attention mask among them, B."""
    return next(tensor for name, tensor in group.items() if name.endswith("attention_mask")).sum(dim=1)


def _rows(group: dict[str, torch.Tensor], positions: list[int]) -> dict[str, torch.Tensor]:
    """Rows of columns that share a length, without what is padding in all of them."""
    # None for a stand-in without a token.
    longest = int(_lengths(group)[positions].max()) or None
    return {
        name: tensor[positions, :longest] if tensor.dim() == 2 else tensor[positions] for name, tensor in group.items()
    }
