"""Running a part of an encoder's layers, whatever its family, and loading pretrained encoders."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import ModelOutput

from .configuration_xlfa import check_weights_file

# In older versions a layer's hooks run within what is checkpointed, and are gone when it is computed again.
HOOKS_ARE_CHECKPOINTED = "__call__" in vars(GradientCheckpointingLayer)


def load_encoder(name_or_path: str, text_config: PretrainedConfig, **hub_options) -> PreTrainedModel:
    """The pretrained encoder of that name in float32, without a pooler where its class has one.

    Args:
        hub_options: of `from_pretrained`, such as `revision` and `token`.

    Raises:
        ValueError: where its config names weights that are not safetensors.
    """
    check_weights_file(text_config)
    encoder_class = MODEL_MAPPING[type(text_config)]
    has_pooler = "add_pooling_layer" in inspect.signature(encoder_class.__init__).parameters
    options = {"add_pooling_layer": False} if has_pooler else {}
    return encoder_class.from_pretrained(
        name_or_path, config=text_config, dtype=torch.float32, use_safetensors=True, **options, **hub_options
    )


def encoder_layers(encoder: PreTrainedModel) -> nn.ModuleList:
    """The encoder's layers 1..N, in their order.

    Raises:
        ValueError: for an encoder that shares or nests its layers (ALBERT), or has the parts of a layer in several
            lists (XLM): they cannot be run one without another.
    """
    owner, name = _place_of_layers(encoder)
    return getattr(owner, name)


def _place_of_layers(encoder: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the list of layers, and the list's name in it."""
    depth = encoder.config.num_hidden_layers
    for owner in encoder.modules():
        lists = [name for name, own in owner.named_children() if isinstance(own, nn.ModuleList) and len(own) == depth]
        if len(lists) == 1:
            return owner, lists[0]
        if lists:
            break
    raise ValueError(f"a {encoder.config.model_type!r} encoder has no list of its layers: it runs as a whole only")


def run_layers(
    encoder: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    kept: list[int],
    first: int = 0,
    states: torch.Tensor | None = None,
    last: int | None = None,
) -> tuple[dict[int, torch.Tensor], ModelOutput]:
    """Run the layers first+1..last and no others.

    Args:
        inputs: of the whole encoder, also where it starts from `states`: masks and positions come from them.
        kept: layers in first..last whose states are returned; the last one always is.
        states: H_first, B x T x E; needed where `first` > 0.
        last: by default N.

    Returns:
        Layer → states, each B x T x E, where H_N is the encoder's output, after the final norm if it has one; and what
        the encoder returned.

    Raises:
        ValueError: for a part of an encoder whose layers cannot be run one without another; and in training, under
            gradient checkpointing of a version of transformers that recomputes layers without their hooks.
    """
    depth = encoder.config.num_hidden_layers
    last = depth if last is None else last
    # Encoders that know no selection (transformers 4 and the first of 5) take a list for true and keep all.
    selected = [layer - first for layer in kept if layer < last] or False
    with _layers_only(encoder, first, states, last) as last_states:
        encoded = encoder(**inputs, output_hidden_states=selected, return_dict=True)
    found = {layer: encoded.hidden_states[layer - first] for layer in kept if layer < last}
    if states is not None and first in kept:
        found[first] = states
    found[last] = encoded.last_hidden_state if last == depth else last_states[0]
    return found, encoded


@contextmanager
def _layers_only(
    encoder: PreTrainedModel, first: int, states: torch.Tensor | None, last: int
) -> Iterator[list[torch.Tensor]]:
    """Within the context the encoder has the layers first+1..last, and the first of them gets `states`.

    Yields a list that the encoder's call appends H_last to, before a final norm.
    """
    last_states: list[torch.Tensor] = []
    if first == 0 and last == encoder.config.num_hidden_layers:
        yield last_states
        return

    def start(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    def keep(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        last_states.append(output[0] if isinstance(output, tuple) else output)

    owner, name = _place_of_layers(encoder)
    layers = getattr(owner, name)
    if (first or last == 1) and getattr(owner, "conv", None) is not None:
        raise ValueError(
            f"this {encoder.config.model_type!r} encoder has a convolution after its first layer: it cannot start from "
            "stored states (freeze_layers), nor end there (ot_layer 0 or 1)"
        )
    if HOOKS_ARE_CHECKPOINTED and encoder.is_gradient_checkpointing and layers[last - 1].training:
        raise ValueError(
            "gradient checkpointing of a part of the encoder (ot_layer below the last one, or stored states of frozen "
            "layers) needs a newer transformers: pip install --upgrade transformers"
        )
    if states is not None and getattr(layers[first], "gradient_checkpointing", False) and torch.is_grad_enabled():
        # Reentrant checkpointing cuts the graph of a layer none of whose inputs has a gradient.
        states = states.detach().requires_grad_()
    hooks = [layers[last - 1].register_forward_hook(keep)]
    if states is not None:
        hooks.append(layers[first].register_forward_pre_hook(start, with_kwargs=True))
    setattr(owner, name, layers[first:last])
    try:
        yield last_states
    finally:
        setattr(owner, name, layers)
        for hook in hooks:
            hook.remove()
