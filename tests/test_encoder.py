"""Running a part of an encoder's layers, for each family of encoders."""

import pytest
import torch
from test_modeling import task_inputs
from torch import nn
from transformers import AlbertConfig, AutoModel, DebertaV2Config, XLMConfig

from modeling_xlfa import encoder_xlfa
from modeling_xlfa.encoder_xlfa import encoder_layers, run_layers

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99, "num_hidden_layers": 3}


@pytest.fixture
def encoder(encoder_config):
    return AutoModel.from_config(encoder_config).eval()


def whole(encoder):
    output = encoder(**task_inputs(), output_hidden_states=True)
    return (*output.hidden_states[:-1], output.last_hidden_state)


def counting(encoder):
    """How often each layer is run, filled in as it is."""
    calls = [0] * 4
    for number, layer in enumerate(encoder_layers(encoder)):

        def count(module, args, output, number=number):
            calls[number] += 1

        layer.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("first", [0, 1, 3])
def test_the_upper_layers_go_on_from_stored_states(encoder, first):
    expected = whole(encoder)
    calls = counting(encoder)
    kept = [layer for layer in (1, 2, 3) if layer >= first]
    start = None if first == 0 else expected[first]
    states, _ = run_layers(encoder, task_inputs(), kept, first, start)
    assert calls == [0] * first + [1] * (4 - first)
    assert set(states) == {*kept, 4}
    for layer, found in states.items():
        torch.testing.assert_close(found, expected[layer])


@pytest.mark.parametrize("last", [1, 2, 4])
def test_no_layer_above_the_last_one_is_run(encoder, last):
    expected = whole(encoder)
    calls = counting(encoder)
    states, _ = run_layers(encoder, task_inputs(), [0, last], last=last)
    assert calls == [1] * last + [0] * (4 - last)
    assert set(states) == {0, last}
    for layer, found in states.items():
        torch.testing.assert_close(found, expected[layer])


def test_layers_in_the_middle_alone(encoder):
    expected = whole(encoder)
    states, _ = run_layers(encoder, task_inputs(), [2], first=1, states=expected[1], last=3)
    for layer in (2, 3):
        torch.testing.assert_close(states[layer], expected[layer])


def test_the_encoder_is_whole_again_afterwards_even_after_an_error(encoder):
    expected = whole(encoder)
    layers = list(encoder_layers(encoder))
    with pytest.raises(Exception, match="."):
        run_layers(encoder, {"input_ids": torch.tensor([[10**9]])}, [1], last=1)
    run_layers(encoder, task_inputs(), [1], last=1)
    assert list(encoder_layers(encoder)) == layers
    for found, wanted in zip(whole(encoder), expected, strict=True):
        assert torch.equal(found, wanted)


def test_gradients_reach_the_states_that_it_starts_from(encoder):
    start = whole(encoder)[2].detach().requires_grad_()
    states, _ = run_layers(encoder, task_inputs(), [], 2, start)
    states[4].square().sum().backward()
    assert start.grad.abs().sum() > 0
    touched = [layer for layer, module in enumerate(encoder_layers(encoder)) if has_gradient(module)]
    assert touched == [2, 3]


def has_gradient(module: nn.Module) -> bool:
    return any(weight.grad is not None for weight in module.parameters())


def test_an_encoder_that_shares_its_layers_is_refused():
    with pytest.raises(ValueError, match="'albert'.*no list of its layers"):
        encoder_layers(AutoModel.from_config(AlbertConfig(**SIZES)))


def test_an_encoder_with_the_parts_of_its_layers_in_several_lists_is_refused():
    with pytest.raises(ValueError, match="'xlm'.*no list of its layers"):
        encoder_layers(AutoModel.from_config(XLMConfig(emb_dim=32, n_heads=4, n_layers=3, vocab_size=99, n_words=99)))


def test_a_convolution_after_the_first_layer_is_not_left_out():
    encoder = AutoModel.from_config(DebertaV2Config(**SIZES, conv_kernel_size=3)).eval()
    states, _ = run_layers(encoder, task_inputs(), [1])
    with pytest.raises(ValueError, match="convolution .* stored states"):
        run_layers(encoder, task_inputs(), [], first=1, states=states[1])
    with pytest.raises(ValueError, match="convolution .*ot_layer"):
        run_layers(encoder, task_inputs(), [], last=1)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_above_stored_states_have_gradients_under_checkpointing(bert_config, use_reentrant):
    encoder = AutoModel.from_config(bert_config).train()
    stored = run_layers(encoder, task_inputs(), [1])[0][1].detach()
    encoder.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    states, _ = run_layers(encoder, task_inputs(), [], first=1, states=stored)
    states[bert_config.num_hidden_layers].sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.encoder.layer[1:].parameters())


def test_layers_are_not_computed_again_without_their_hooks(bert_config, monkeypatch):
    """As older transformers do under gradient checkpointing; this one runs hooks outside."""
    encoder = AutoModel.from_config(bert_config).train()
    encoder.gradient_checkpointing_enable()
    run_layers(encoder, task_inputs(), [2], last=2)
    monkeypatch.setattr(encoder_xlfa, "HOOKS_ARE_CHECKPOINTED", True)
    run_layers(encoder, task_inputs(), [2])
    run_layers(encoder.eval(), task_inputs(), [2], last=2)
    with pytest.raises(ValueError, match="gradient checkpointing .* newer transformers"):
        run_layers(encoder.train(), task_inputs(), [2], last=2)
