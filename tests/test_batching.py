"""Training batches: shares of a global batch, an order by seed and epoch, parts by a budget of tokens."""

from itertools import chain

import pytest
import torch

from xlfa.batching import GlobalBatches, label_counts, split_batch
from xlfa.errors import XLFAError

LENGTHS = [3 + 7 * number % 31 for number in range(37)]


def epoch(strategy="random", number=0, **options):
    batches = GlobalBatches(LENGTHS, 8, strategy, seed=5, **options)
    batches.set_epoch(number)
    return batches, list(batches)


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
def test_an_epoch_holds_every_example_once_in_an_order_of_its_own(strategy):
    batches, first = epoch(strategy)
    assert sorted(chain(*first)) == list(range(37)) and [len(batch) for batch in first] == [8, 8, 8, 8, 5]
    assert len(batches) == 5
    assert epoch(strategy)[1] == first == list(batches)
    assert (epoch(strategy, number=1)[1] == first) == (strategy == "sequential")


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_share_the_batches_of_one(processes):
    whole = epoch("group_by_length")[1]
    shares = [epoch("group_by_length", processes=processes, rank=rank) for rank in range(processes)]
    for number, batch in enumerate(whole):
        found = {}
        for sampler, own in shares:
            positions = sampler.share(number)
            # A process without an example runs a stand-in.
            assert len(own[number]) == max(1, len(positions))
            found |= dict(zip(positions, own[number]))
        assert [found[position] for position in range(len(batch))] == batch


def test_a_last_batch_that_is_not_full_can_be_left_out():
    batches, found = epoch(drop_last=True)
    assert len(batches) == 4 and [len(batch) for batch in found] == [8] * 4


def test_grouped_batches_are_of_similar_length():
    lengths = 10 * LENGTHS
    spread = {
        strategy: sum(
            max(lengths[index] for index in batch) - min(lengths[index] for index in batch)
            for batch in GlobalBatches(lengths, 8, strategy, seed=5)
        )
        for strategy in ("random", "group_by_length")
    }
    assert spread["group_by_length"] < spread["random"] / 2


def test_another_strategy_is_refused():
    with pytest.raises(XLFAError, match="batch_rebalance.*random, group_by_length or sequential"):
        epoch("batch_rebalance")


def padded(lengths, prefix=""):
    width = max(lengths)
    mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
    ids = torch.arange(mask.numel()).reshape(mask.shape) * mask
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}


@pytest.fixture
def batch():
    return {
        **padded([4, 9, 2, 12, 5]),
        "labels": torch.tensor([0, 1, 2, 0, -100]),
        **padded([3, 6, 2], "source_"),
        **padded([5, 1, 2], "target_"),
    }


def test_parts_hold_every_example_and_pair_once_within_the_budget(batch):
    parts = split_batch(batch, 16, 16)
    assert len(parts) > 2
    labels, sources = [], []
    for part, label_share, pair_share in parts:
        if "input_ids" in part:
            assert part["input_ids"].numel() <= 16
            assert (part["attention_mask"].sum(dim=0) > 0).all()
            assert label_share == pytest.approx((part["labels"] != -100).sum().item() / 4)
            labels += part["labels"].tolist()
        if "source_input_ids" in part:
            width = max(part[f"{side}_input_ids"].shape[1] for side in ("source", "target"))
            assert 2 * width * len(part["source_input_ids"]) <= 16
            assert pair_share == len(part["source_input_ids"]) / 3
            sources += [row[row > 0].tolist() for row in part["source_input_ids"]]
    assert sorted(labels) == [-100, 0, 0, 1, 2]
    assert sorted(sources) == sorted(row[row > 0].tolist() for row in batch["source_input_ids"])
    assert sum(share for _, share, _ in parts) == pytest.approx(1)
    assert sum(share for _, _, share in parts) == pytest.approx(1)
    assert {"input_ids", "source_input_ids"} < parts[-1][0].keys()


def test_a_budget_for_all_leaves_one_part(batch):
    [(part, label_share, pair_share)] = split_batch(batch, 1000, 1000)
    assert (label_share, pair_share) == (1, 1)
    assert part.keys() == batch.keys() and sorted(part["labels"].tolist()) == [-100, 0, 0, 1, 2]


@pytest.mark.parametrize(("limits", "sizes"), [((None, 12), [5, 3]), ((30, None), [5, 3]), ((None, None), [5, 3])])
def test_examples_or_pairs_can_stay_together(batch, limits, sizes):
    parts = split_batch(batch, *limits)
    found = [[len(part[name]) for part, _, _ in parts if name in part] for name in ("input_ids", "source_input_ids")]
    for limit, size, own in zip(limits, sizes, found):
        assert sum(own) == size and (len(own) == 1) == (limit is None)


def test_labels_are_counted_by_example():
    assert label_counts({"input_ids": torch.ones(2, 3), "labels": torch.tensor([1, -100])}).tolist() == [1, 0]
    assert label_counts({"input_ids": torch.ones(1, 3), "labels": torch.tensor([[1, -100, 2]])}).tolist() == [2]
    spans = {"input_ids": torch.ones(2, 3), "start_positions": torch.tensor([0, 1])}
    assert label_counts(spans).tolist() == [1, 1]
