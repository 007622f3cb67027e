"""Batch norm over two processes: what DDP computes there is what one process computes on the whole batch."""

from dataclasses import dataclass

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from modeling_xlfa import AFF, DLFA
from modeling_xlfa.fusion_xlfa import MaskedBatchNorm

PROCESSES, CHANNELS, LENGTH = 2, 8, 7


class Norm(MaskedBatchNorm):
    """With the signature of a fusion, which takes two layers."""

    def forward(self, lower, last, mask, update_statistics=True):
        return super().forward(lower + last, mask, update_statistics)


@dataclass
class Case:
    """Sentence lengths of the whole batch, how many of them each process gets, and the module that reads them."""

    lengths: list[int]
    shares: list[int]
    build: type = DLFA
    offset: float = 0.0

    def module(self):
        torch.manual_seed(0)
        options = {} if self.build is Norm else {"reduction": 2}
        module = self.build(CHANNELS, **options).double().train()
        for name, parameter in module.named_parameters():
            if name.endswith(("norm.weight", "norm.bias")):
                torch.nn.init.normal_(parameter, mean=1.0)
        return module

    def batch(self):
        """Two layers, the mask, and weights of the outputs in a loss; padding holds values like any other."""
        torch.manual_seed(1)
        lower, last, weights = torch.randn(3, len(self.lengths), LENGTH, CHANNELS, dtype=torch.float64)
        mask = (torch.arange(LENGTH) < torch.tensor(self.lengths).unsqueeze(1)).long()
        return lower + self.offset, last, mask, weights

    def share(self, rank):
        first = sum(self.shares[:rank])
        return [part[first : first + self.shares[rank]] for part in self.batch()]


CASES = {
    "dlfa": Case([7, 3, 5, 1, 6], [3, 2]),
    "aff": Case([7, 3, 5, 1, 6], [3, 2], build=AFF),
    "norm": Case([7, 3, 5, 1, 6], [3, 2], build=Norm),
    # Squares of 1e8 leave float64 no digit of a variance of 2.
    "norm_far_from_zero": Case([7, 3, 5, 1, 6], [3, 2], build=Norm, offset=1e8),
    "only_padding_on_one": Case([4, 2, 7, 0, 0], [3, 2]),
    "nothing_on_one": Case([4, 2, 7], [3, 0]),
    "one_value_on_each": Case([1, 1], [1, 1]),
    "one_value_in_all": Case([1, 0], [1, 1]),
    "no_value": Case([0, 0], [1, 1]),
}


def run(module, batch, processes):
    """Outputs and gradients of a loss that is a mean over all examples of the processes."""
    lower, last, mask, weights = batch
    lower.requires_grad_()
    outputs = module(lower, last, mask)
    # DDP averages over the processes.
    (processes * (outputs * weights * mask.unsqueeze(-1)).sum()).backward()
    return {
        "outputs": outputs.detach()[mask.bool()],
        "input gradient": lower.grad / processes,
        "parameter gradients": {name: parameter.grad for name, parameter in module.named_parameters()},
        "statistics": dict(module.named_buffers()),
    }


def forbid_communication(*args, **kwargs):
    raise AssertionError("all_reduce")


def work(rank, folder):
    """One of the processes: every case, then what may not communicate."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    found = {}
    for name, case in CASES.items():
        parallel = DistributedDataParallel(case.module())
        result = run(parallel, case.share(rank), PROCESSES)
        for part in ("parameter gradients", "statistics"):
            result[part] = {name.removeprefix("module."): values for name, values in result[part].items()}
        found[name] = result
    distributed.all_reduce = forbid_communication
    case = CASES["dlfa"]
    module, (lower, last, mask, _) = case.module(), case.share(rank)
    found["alignment"] = module(lower, last, mask, update_statistics=False)
    found["evaluation"] = module.eval()(lower, last, mask)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_with_the_whole_batch(found, name):
    case = CASES[name]
    expected = run(case.module(), case.batch(), processes=1)
    # 1e8 itself is known to 1e-8.
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if case.offset else {"rtol": 1e-10, "atol": 1e-10}
    for part in ("outputs", "input gradient"):
        together = torch.cat([process[name][part] for process in found])
        torch.testing.assert_close(together, expected[part], **tolerance)
    for process in found:
        torch.testing.assert_close(process[name]["parameter gradients"], expected["parameter gradients"], **tolerance)
        torch.testing.assert_close(process[name]["statistics"], expected["statistics"], **tolerance)


def test_the_cases_reach_batch_statistics_and_every_parameter(found):
    """Else equal results would say nothing."""
    dlfa = found[0]["dlfa"]
    assert all((gradient != 0).any() for gradient in dlfa["parameter gradients"].values())
    tracked = {name: count.item() for name, count in dlfa["statistics"].items() if name.endswith("num_batches_tracked")}
    assert len(tracked) == 4 and set(tracked.values()) == {1}
    norm = found[0]["norm_far_from_zero"]["statistics"]
    assert norm["running_mean"].min() > 9e6 and norm["running_var"].max() < 2
    assert found[0]["one_value_in_all"]["statistics"]["aif.local_branch.reduce_norm.num_batches_tracked"] == 0


@pytest.mark.parametrize("name", ["alignment", "evaluation"])
def test_the_running_statistics_normalise_without_communication(found, name):
    case = CASES["dlfa"]
    module = case.module().train(name == "alignment")
    lower, last, mask, _ = case.batch()
    expected = module(lower, last, mask, update_statistics=False)
    torch.testing.assert_close(torch.cat([process[name] for process in found]), expected, rtol=1e-12, atol=1e-12)
