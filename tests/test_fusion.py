"""AIF and DLFA against a direct computation of the paper's equations, and what padding may not change."""

import pytest
import torch
from torch.nn import functional as F

from modeling_xlfa import AIF, DLFA
from modeling_xlfa.fusion_xlfa import MaskedBatchNorm

BATCH, LENGTH, CHANNELS = 5, 7, 8


@pytest.fixture
def states():
    torch.manual_seed(1)
    return torch.randn(BATCH, LENGTH, CHANNELS, dtype=torch.float64)


@pytest.fixture
def mask():
    lengths = torch.tensor([7, 3, 5, 1, 6])
    return (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()


def direct_attention(aif, states, mask, norm):
    """sigmoid(W_global + W_local) sentence by sentence with convolutions, on valid tokens only."""
    pooled = torch.stack([states[i, : mask[i].sum()].mean(0) for i in range(len(states))])
    tokens = torch.cat([states[i, : mask[i].sum()] for i in range(len(states))])

    def normalise(values, module):
        if norm == "batch":
            return F.batch_norm(values, None, None, module.weight, module.bias, training=True, eps=module.eps)
        if norm == "layer":
            return F.layer_norm(values, values.shape[-1:], module.weight, module.bias, module.eps)
        return values

    def branch(values, module):
        hidden = F.conv1d(values.T.unsqueeze(0), module.reduce.weight.unsqueeze(-1), module.reduce.bias)[0].T
        hidden = normalise(hidden, module.reduce_norm).relu()
        output = F.conv1d(hidden.T.unsqueeze(0), module.expand.weight.unsqueeze(-1), module.expand.bias)[0].T
        return normalise(output, module.expand_norm)

    global_part = branch(pooled, aif.global_branch)
    local_part = branch(tokens, aif.local_branch)
    sentence = torch.repeat_interleave(torch.arange(len(states)), mask.sum(1))
    return torch.sigmoid(global_part[sentence] + local_part)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_aif_equals_equation_1(states, mask, norm):
    aif = AIF(CHANNELS, reduction=2, norm=norm).double().train()
    expected = states[mask.bool()] * direct_attention(aif, states, mask, norm)
    torch.testing.assert_close(aif(states, mask)[mask.bool()], expected)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("gate", ["literal", "sigmoid"])
def test_dlfa_equals_equation_2(states, mask, gate, norm):
    dlfa = DLFA(CHANNELS, gate=gate, reduction=2, norm=norm).double().train()
    lower, last = states, states.flip(2) * 0.5
    average = (lower + last) / 2
    weights = direct_attention(dlfa.aif, average, mask, norm)
    if gate == "literal":
        weights = average[mask.bool()] * weights
    expected = lower[mask.bool()] * weights + last[mask.bool()] * (1 - weights)
    torch.testing.assert_close(dlfa(lower, last, mask)[mask.bool()], expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_padding_changes_nothing(states, mask, norm, training):
    dlfa = DLFA(CHANNELS, norm=norm, layer_norm=True).double().train(training)
    before = dlfa(states, states.flip(2), mask)
    noisy = torch.where(mask.bool().unsqueeze(-1), states, torch.full_like(states, 1e3))
    longer = F.pad(noisy, (0, 0, 0, 4), value=-50.0)
    after = dlfa(longer, F.pad(states.flip(2), (0, 0, 0, 4)), F.pad(mask, (0, 4)))
    torch.testing.assert_close(after[:, :LENGTH][mask.bool()], before[mask.bool()])


def test_batch_norm_equals_torch_on_the_valid_tokens(states, mask):
    ours = MaskedBatchNorm(CHANNELS).double().train()
    reference = torch.nn.BatchNorm1d(CHANNELS).double().train()
    expected = reference(states[mask.bool()])
    torch.testing.assert_close(ours(states, mask)[mask.bool()], expected)
    torch.testing.assert_close(ours.running_mean, reference.running_mean)
    torch.testing.assert_close(ours.running_var, reference.running_var)


def test_alignment_sequences_use_running_statistics_and_leave_them_alone(states, mask):
    norm = MaskedBatchNorm(CHANNELS).double().train()
    norm(states, mask)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    aligned = norm(states * 3 + 1, mask, update_statistics=False)
    torch.testing.assert_close(aligned, norm.eval()(states * 3 + 1, mask))
    assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, variance)


def test_a_single_value_a_channel_falls_back_to_the_running_statistics():
    dlfa = DLFA(CHANNELS).train()
    mask = torch.ones(1, 3, dtype=torch.long)
    state = torch.randn(1, 3, CHANNELS)
    before = dlfa.aif.global_branch.reduce_norm.running_mean.clone()
    assert torch.isfinite(dlfa(state, state, mask)).all()
    # The pooled branch saw one value, the local branch three.
    assert torch.equal(dlfa.aif.global_branch.reduce_norm.running_mean, before)
    assert dlfa.aif.global_branch.reduce_norm.num_batches_tracked == 0
    assert dlfa.aif.local_branch.reduce_norm.num_batches_tracked == 1


def test_an_empty_sentence_gives_finite_states():
    dlfa = DLFA(CHANNELS).train()
    mask = torch.tensor([[1, 1], [0, 0], [1, 0]])
    states = torch.randn(3, 2, CHANNELS)
    assert torch.isfinite(dlfa(states, states, mask)).all()


def test_initial_state_is_as_documented(states, mask):
    """Without a norm and with zero weights: literal L2 + W (L1 - L2) / 2, sigmoid the average."""
    for gate in ("literal", "sigmoid"):
        dlfa = DLFA(CHANNELS, gate=gate, norm="none").double()
        for parameter in dlfa.parameters():
            torch.nn.init.zeros_(parameter)
        lower, last = states, states.flip(0)
        average = (lower + last) / 2
        expected = average if gate == "sigmoid" else last + average * (lower - last) / 2
        torch.testing.assert_close(dlfa(lower, last, mask), expected)
