"""Every fusion against a direct computation of its paper's equations, and what padding may not change."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig

from modeling_xlfa import AFF, AIF, DLFA, ScalarMix, XLFAConfig, XLFAModel
from modeling_xlfa.fusion_xlfa import MaskedBatchNorm, build_fusion, mean_over_tokens

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


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_aff_gates_the_layers_by_the_attention_of_their_sum(states, mask, norm):
    aff = AFF(CHANNELS, reduction=2, norm=norm).double().train()
    lower, last = states, states.flip(2) * 0.5
    weights = direct_attention(aff.aif, lower + last, mask, norm)
    expected = lower[mask.bool()] * weights + last[mask.bool()] * (1 - weights)
    torch.testing.assert_close(aff(lower, last, mask)[mask.bool()], expected)


def test_with_batch_norm_aff_is_dlfa_with_the_sigmoid_gate(states, mask):
    """Sum and average differ by a factor, which batch statistics take out."""
    aff, dlfa = AFF(CHANNELS).double().train(), DLFA(CHANNELS, gate="sigmoid").double().train()
    dlfa.load_state_dict(aff.state_dict())
    for module in [*aff.modules(), *dlfa.modules()]:
        if isinstance(module, MaskedBatchNorm):
            module.eps = 0.0
    torch.testing.assert_close(aff(states, states.flip(2), mask), dlfa(states, states.flip(2), mask))


@pytest.fixture
def layers(states):
    return [states, states.flip(2) * 3, states.flip(0) + 1]


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_scalar_mix_equals_equation_1(layers, scaled, layer_norm):
    mix = ScalarMix(3, CHANNELS, layer_norm, scaled).double()
    mix.logits.data = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    gamma = 1.0
    if scaled:
        gamma = 0.7
        mix.gamma.data.fill_(gamma)
    weights = mix.logits.exp() / mix.logits.exp().sum()
    normalised = [F.layer_norm(layer, (CHANNELS,)) if layer_norm else layer for layer in layers]
    expected = gamma * torch.einsum("j,jbte->bte", weights, torch.stack(normalised))
    torch.testing.assert_close(mix(layers), expected)
    torch.testing.assert_close(mix.weights, weights)


def test_scalar_mix_starts_as_the_mean_and_learns_all_its_weights(layers):
    mix = ScalarMix(3, CHANNELS).double()
    torch.testing.assert_close(mix(layers), torch.stack(layers).mean(0))
    mix(layers).square().sum().backward()
    assert (mix.logits.grad != 0).all() and mix.gamma.grad != 0


def test_scalar_mix_of_another_number_of_layers_is_an_error(layers):
    with pytest.raises(ValueError):
        ScalarMix(4, CHANNELS)(layers)


def test_scalar_mix_of_half_precision_states_is_rounded_once():
    mix = ScalarMix(13, CHANNELS).bfloat16()
    layers = [torch.randn(2, 3, CHANNELS, dtype=torch.bfloat16) for _ in range(13)]
    exact = torch.stack(layers).double().mean(0)
    assert mix(layers).dtype == torch.bfloat16
    # Half a unit in the last of bfloat16's 8 digits.
    torch.testing.assert_close(mix(layers).double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("fusion", [DLFA, AFF])
def test_a_learned_lower_layer_is_the_fusion_of_a_scalar_mix(layers, mask, fusion, layer_norm):
    learned = fusion(CHANNELS, layer_norm=layer_norm, mixed_layers=3).double().train()
    learned.lower_mix.logits.data = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    fixed = fusion(CHANNELS).double().train()
    fixed.aif.load_state_dict(learned.aif.state_dict())
    last = layers[0].flip(1)
    normalised = [F.layer_norm(state, (CHANNELS,)) if layer_norm else state for state in (*layers, last)]
    weights = learned.lower_mix.logits.softmax(0)
    lower = sum(weight * state for weight, state in zip(weights, normalised[:3], strict=True))
    fused = learned(layers, last, mask)
    torch.testing.assert_close(fused, fixed(lower, normalised[3], mask))
    fused.square().sum().backward()
    assert (learned.lower_mix.logits.grad != 0).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("mixed_layers", [None, 2])
@pytest.mark.parametrize("fusion", [DLFA, AFF])
def test_padding_changes_nothing(states, mask, fusion, mixed_layers, norm, training):
    module = fusion(CHANNELS, norm=norm, layer_norm=True, mixed_layers=mixed_layers).double().train(training)

    def fuse(states, last, mask):
        return module(states if mixed_layers is None else (states, states.square()), last, mask)

    before = fuse(states, states.flip(2), mask)
    noisy = torch.where(mask.bool().unsqueeze(-1), states, torch.full_like(states, 1e3))
    longer = F.pad(noisy, (0, 0, 0, 4), value=-50.0)
    after = fuse(longer, F.pad(states.flip(2), (0, 0, 0, 4)), F.pad(mask, (0, 4)))
    torch.testing.assert_close(after[:, :LENGTH][mask.bool()], before[mask.bool()])


def test_batch_norm_equals_torch_on_the_valid_tokens(states, mask):
    ours = MaskedBatchNorm(CHANNELS).double().train()
    reference = torch.nn.BatchNorm1d(CHANNELS).double().train()
    expected = reference(states[mask.bool()])
    torch.testing.assert_close(ours(states, mask)[mask.bool()], expected)
    torch.testing.assert_close(ours.running_mean, reference.running_mean)
    torch.testing.assert_close(ours.running_var, reference.running_var)


def test_without_momentum_the_running_statistics_are_means_over_batches(states):
    """As torch.optim.swa_utils.update_bn sets them anew."""
    ours, theirs = MaskedBatchNorm(CHANNELS).double().train(), torch.nn.BatchNorm1d(CHANNELS).double().train()
    ours.momentum = theirs.momentum = None
    for batch in (states, states * 3 + 1):
        ours(batch, torch.ones(BATCH, LENGTH))
        theirs(batch.flatten(0, 1))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_alignment_sequences_use_running_statistics_and_leave_them_alone(states, mask):
    norm = MaskedBatchNorm(CHANNELS).double().train()
    norm(states, mask)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    aligned = norm(states * 3 + 1, mask, update_statistics=False)
    torch.testing.assert_close(aligned, norm.eval()(states * 3 + 1, mask))
    assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, variance)


def test_a_compiled_fusion_learns_after_two_forward_passes(states, mask):
    """As a step's alignment sequences and task batch make them: the second updates what the first was normalised by."""
    torch._dynamo.reset()
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        dlfa = DLFA(CHANNELS).double().train()
        fuse = torch.compile(dlfa, backend="aot_eager") if compiled else dlfa
        aligned, encoded = (fuse(states, states.flip(2), mask, update) for update in (False, True))
        (aligned.square().mean() + encoded.square().mean()).backward()
        gradients.append([parameter.grad for parameter in dlfa.parameters()])
    torch.testing.assert_close(*gradients)


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


@pytest.mark.parametrize("mixed_layers", [None, 2])
@pytest.mark.parametrize("fusion", ["literal", "sigmoid", "aff"])
def test_initial_state_is_as_documented(states, mask, fusion, mixed_layers):
    """Without a norm and with zero weights: literal L2 + W (L1 - L2) / 2, sigmoid and AFF the average."""
    options = {"norm": "none", "mixed_layers": mixed_layers}
    module = AFF(CHANNELS, **options) if fusion == "aff" else DLFA(CHANNELS, gate=fusion, **options)
    for parameter in module.double().parameters():
        torch.nn.init.zeros_(parameter)
    lower, last = states, states.flip(0)
    average = (lower + last) / 2
    expected = last + average * (lower - last) / 2 if fusion == "literal" else average
    # The mean of the two mixed layers is L1.
    given = lower if mixed_layers is None else (lower - 1, lower + 1)
    torch.testing.assert_close(module(given, last, mask), expected)


@pytest.mark.parametrize("fusion", ["dlfa", "aff"])
def test_a_gate_bias_starts_where_the_config_says_and_is_trained(bert_config, tmp_path, fusion):
    lower, last = torch.randn(2, 3, 5, bert_config.hidden_size)
    mask = torch.ones(3, 5)
    fields = {"text_config": bert_config, "fusion": fusion, "fusion_norm": "layer"}
    for start in (-20.0, 0.5):
        XLFAModel(XLFAConfig(**fields, fusion_gate_bias=start)).save_pretrained(tmp_path)
        model = XLFAModel.from_pretrained(tmp_path)
        bias = model.fusion.aif.gate_bias
        assert bias.tolist() == [start] * bert_config.hidden_size
        fused = model.fusion(lower, last, mask)
        assert torch.allclose(fused, last, atol=1e-5) is (start == -20)
    fused.square().sum().backward()
    assert bias.grad.abs().sum() > 0
    assert not any("gate_bias" in name for name in XLFAModel(XLFAConfig(**fields)).state_dict())


@pytest.mark.parametrize(("norm", "deviation"), [("batch", 0.26), ("layer", 0.26), ("none", 0.02)])
def test_the_gate_starts_scattered_around_one_half(norm, deviation):
    """As in `docs/fusion.md`: E = 384, standard normal states, transformers' initialisation."""
    encoder = AutoConfig.for_model("bert", hidden_size=384, num_hidden_layers=2, vocab_size=9)
    fusion = XLFAModel(XLFAConfig(text_config=encoder, fusion="aff", fusion_norm=norm)).fusion.train()
    gate = fusion.aif.attention(torch.randn(16, 32, 384) + torch.randn(16, 32, 384), torch.ones(16, 32))
    assert gate.mean().item() == pytest.approx(0.5, abs=0.01)
    assert gate.std().item() == pytest.approx(deviation, abs=0.01)


@pytest.mark.parametrize(
    ("fields", "formula", "number"),
    [
        ({"fusion": "dlfa"}, lambda e, b, n: 4 * e * b + 6 * (e + b), 150336),
        ({"fusion": "aff"}, lambda e, b, n: 4 * e * b + 6 * (e + b), 150336),
        ({"fusion": "aff", "fusion_norm": "none"}, lambda e, b, n: 4 * e * b + 2 * (e + b), 148416),
        ({"fusion_layer": "learned"}, lambda e, b, n: 4 * e * b + 6 * (e + b) + n - 1, 150347),
        ({"fusion": "scalar_mix"}, lambda e, b, n: n + 2, 14),
        ({"fusion_layer_norm": True}, lambda e, b, n: 4 * e * b + 6 * (e + b) + 4 * e, 151872),
        (
            {"fusion_layer": "learned", "fusion_layer_norm": True},
            lambda e, b, n: 4 * e * b + 6 * (e + b) + n - 1 + 2 * e * n,
            159563,
        ),
        ({"fusion": "scalar_mix", "fusion_layer_norm": True}, lambda e, b, n: n + 2 + 2 * e * (n + 1), 9998),
    ],
)
def test_parameter_counts_are_as_documented(fields, formula, number):
    """In `docs/fusion.md`; e is E, b is E / r, n is N."""
    for size, reduction, depth in [(384, 4, 12), (48, 3, 5)]:
        encoder = AutoConfig.for_model("bert", hidden_size=size, num_hidden_layers=depth)
        module = build_fusion(XLFAConfig(text_config=encoder, fusion_reduction=reduction, **fields))
        count = sum(parameter.numel() for parameter in module.parameters())
        assert count == formula(size, size // reduction, depth)
        assert count == number or size != 384


def test_the_mean_over_tokens_does_not_overflow_in_half_precision():
    states = torch.full((1, 400, 2), 200.0, dtype=torch.float16)
    assert mean_over_tokens(states, torch.ones(1, 400)).tolist() == [[[200.0, 200.0]]]
