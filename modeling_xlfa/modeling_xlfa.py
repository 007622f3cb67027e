"""XLFA models: an encoder with feature aggregation, an alignment term in `forward`, and three heads."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import CrossEntropyLoss
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_xlfa import XLFAConfig
from .encoder_xlfa import encoder_layers, load_encoder, run_layers
from .fusion_xlfa import AIF, ScalarMix, build_fusion, mean_over_tokens
from .outputs_xlfa import (
    XLFAClassifierOutput,
    XLFAModelOutput,
    XLFAQuestionAnsweringOutput,
    transport_statistics,
)
from .sinkhorn_xlfa import TransportResult
from .transport_xlfa import alignment_loss

if TYPE_CHECKING:
    # Never run, but read: from a local folder transformers 4 and 5.0 copy only the files that this one itself names,
    # and transport_xlfa.py imports this one on a GPU.
    from .sinkhorn_triton_xlfa import solve_with_triton  # noqa: F401

# Of `from_pretrained`, and no fields of a config: a token must not be saved in one.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


class XLFAPreTrainedModel(PreTrainedModel):
    config_class = XLFAConfig
    base_model_prefix = "xlfa"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # `XLFAModel` and its encoder add what they contain.
    _no_split_modules = []
    # With loss kwargs Trainer would leave the division by the accumulation steps to the model, and the loss would be
    # that many times too large (transformers issue 47688).
    accepts_loss_kwargs = False

    def __init__(self, config: XLFAConfig, *args, **kwargs):
        config.check_fields()
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, XLFAModel) and module.ot_idf is not None:
            nn.init.ones_(module.ot_idf)
        elif isinstance(module, (AIF, ScalarMix)):
            module.reset_parameters()

    @classmethod
    def from_encoder(
        cls, name_or_path: str, encoder_config: dict | None = None, **config_fields
    ) -> "XLFAPreTrainedModel":
        """Build a model on a pretrained encoder; fusion and head start from random weights.

        Args:
            name_or_path: a Hub id or a folder of an encoder (not of an XLFA model).
            encoder_config: fields of the encoder's own config to change, such as its dropout.
            config_fields: fields of `XLFAConfig`, and `num_labels` or `id2label` for the classification heads;
                `attn_implementation` goes to the encoder, and `revision`, `token`, `cache_dir`, `local_files_only` say
                how it is loaded.

        Raises:
            ValueError: for a bad field, a model that is no encoder, or an XLFA checkpoint.
            OSError: where transformers finds no model of that name.

        Example:

        ```python
        >>> from modeling_xlfa import XLFAForQuestionAnswering
        >>> model = XLFAForQuestionAnswering.from_encoder("xlm-roberta-base", ot_weight=0.1)  # doctest: +SKIP
        ```
        """
        attn_implementation = config_fields.pop("attn_implementation", None)
        hub_options = {name: config_fields.pop(name) for name in HUB_OPTIONS if name in config_fields}
        text_config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **hub_options)
        if text_config.model_type == XLFAConfig.model_type:
            raise ValueError(f"{name_or_path!r} is an XLFA checkpoint: load it with from_pretrained")
        known = XLFAConfig(text_config=text_config, fusion="none")
        for field in config_fields:
            # The config would keep what is misspelt, and a secret given under another name would be published with it.
            if not hasattr(known, field):
                raise ValueError(f"{field}: XLFAConfig has no such field")
        for field, value in (encoder_config or {}).items():
            if not hasattr(text_config, field):
                raise ValueError(f"encoder_config: the {text_config.model_type} config has no field {field!r}")
            setattr(text_config, field, value)
        # The encoder is trained in float32 with the fusion and the head, whatever type its weights were published in.
        text_config.dtype = torch.float32
        if attn_implementation is not None:
            config_fields["attn_implementation"] = attn_implementation
        model = cls(XLFAConfig(text_config=text_config, **config_fields))
        encoder = load_encoder(name_or_path, text_config, **hub_options)
        model.base_model.encoder.load_state_dict(encoder.state_dict())
        return model

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """transformers' own; a table of `ot_marginals="idf"` keeps in step, and new pieces count as its rarest."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        table = self.base_model.ot_idf
        if table is not None:
            new = embeddings.weight.shape[0] - len(table)
            # A negative number cuts.
            self.base_model.ot_idf = nn.functional.pad(table, (0, new), value=table.max().item())
        return embeddings

    def combine_losses(self, task_loss: torch.Tensor | None, ot_loss: torch.Tensor | None) -> torch.Tensor | None:
        """task_loss + ot_weight · ot_loss, of the parts that are there."""
        parts = [
            loss
            for loss in (task_loss, None if ot_loss is None else self.config.ot_weight * ot_loss)
            if loss is not None
        ]
        return sum(parts[1:], start=parts[0]) if parts else None


class XLFAModel(XLFAPreTrainedModel):
    """Encoder, fusion of its layers, and the alignment term on parallel sentences."""

    # A head's checkpoint loads as its encoder part; the head's own weights are not missed.
    _keys_to_ignore_on_load_unexpected = [r"^classifier\.", r"^qa_outputs\."]

    def __init__(self, config: XLFAConfig):
        super().__init__(config)
        # In the type that fusion and head are built in, whatever the encoder was published in. Its own auto_map is not
        # followed, also where this file's code is trusted.
        self.encoder = AutoModel.from_config(
            config.text_config, trust_remote_code=False, dtype=torch.get_default_dtype()
        )
        if hasattr(self.encoder, "pooler"):
            # Unused: without a gradient it would break distributed training.
            self.encoder.pooler = None
        if not self.encoder._no_split_modules:
            # DistilBERT's class names none; within a layer the terms of a sum would land on different devices.
            layers = (module for module in self.encoder.modules() if isinstance(module, GradientCheckpointingLayer))
            self.encoder._no_split_modules = sorted({type(layer).__name__ for layer in layers})
        # A table of weights by piece, saved with the model; training fills it from the parallel text.
        self.register_buffer(
            "ot_idf", torch.ones(self.encoder.config.vocab_size) if config.ot_marginals == "idf" else None
        )
        # Share of the training that is done; below 1 only while a trainer runs a schedule of epsilon.
        self.ot_progress = 1.0
        # Where a trainer has stored states of the trunk: called with the inputs of the encoder, it gives layer → states
        # of the layers that are needed up to `freeze_layers`, and the encoder goes on from there.
        self.stored_trunk: Callable[[dict[str, torch.Tensor]], dict[int, torch.Tensor]] | None = None
        # From random numbers of its own: the head, which is built next, gets the same first weights with a fusion and
        # without it, so that runs of one seed are comparable.
        with fork_generator(torch.device("cpu")):
            # The CPU's alone: torch.manual_seed would seed those of the devices, which are not put back.
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), device="cpu")))
            self.fusion = build_fusion(config)
            if self.fusion is not None:
                # For device_map: a fusion reads several layers at once. FSDP refuses names of absent classes.
                self._no_split_modules = [type(self.fusion).__name__]
            self.post_init()
        self.train(self.training)

    def train(self, mode: bool = True) -> "XLFAModel":
        """As in torch, but the trunk (`freeze_layers`) stays in evaluation mode and without gradient."""
        super().train(mode)
        if self.config.freeze_layers:
            self.encoder.eval()
            encoder_layers(self.encoder)[self.config.freeze_layers :].train(mode)
            self.freeze_trunk()
        return self

    def freeze_trunk(self) -> None:
        """No gradient for all of the encoder but its layers above `freeze_layers`, where that is not 0.

        Those layers are left as they are: somebody may have frozen some of their parameters.
        """
        if self.config.freeze_layers:
            upper = set(encoder_layers(self.encoder)[self.config.freeze_layers :].parameters())
            for parameter in self.encoder.parameters():
                if parameter not in upper:
                    parameter.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        source_input_ids: torch.Tensor | None = None,
        source_attention_mask: torch.Tensor | None = None,
        source_special_tokens_mask: torch.Tensor | None = None,
        target_input_ids: torch.Tensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        target_special_tokens_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> XLFAModelOutput:
        """Encode the task batch, the parallel pairs, or both.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds: the task batch, as for the encoder.
            source_input_ids, target_input_ids: P x S and P x U, both sides of P parallel sentence pairs.
            source_attention_mask, target_attention_mask: 1 on tokens, 0 on padding; by default all ones.
            source_special_tokens_mask, target_special_tokens_mask: 1 on special tokens, which are not aligned; by
                default none are special.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        # An output gets all its parts when it is made: older transformers make no keys of those that are set later
        # (issue 44079).
        parts = {}
        # Before the task batch, whose statistics batch norm would already have taken in.
        if source_input_ids is not None and target_input_ids is not None:
            parts["ot_loss"], result = self.align(
                _Sentences(source_input_ids, source_attention_mask, source_special_tokens_mask),
                _Sentences(target_input_ids, target_attention_mask, target_special_tokens_mask),
                beside_task=input_ids is not None or inputs_embeds is not None,
            )
            parts["ot_statistics"] = transport_statistics(result, self.config.ot_solver)
        elif (source_input_ids is None) != (target_input_ids is None):
            raise ValueError("alignment needs both source_input_ids and target_input_ids; one of them is missing")
        if input_ids is not None or inputs_embeds is not None:
            optional = {"token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
            if attention_mask is None:
                given = input_ids if inputs_embeds is None else inputs_embeds
                attention_mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
            if attention_mask.dim() != 2 and self.fusion is not None:
                raise ValueError(f"attention_mask must be B x T for the fusion, not {tuple(attention_mask.shape)}")
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            inputs |= {name: value for name, value in optional.items() if value is not None}
            if output_attentions:
                inputs["output_attentions"] = True
            every = range(self.config.num_hidden_layers + 1)
            states, encoded = self._encode(inputs, list(every) if output_hidden_states else self.fused_layers)
            parts["last_hidden_state"] = self._fuse(states, attention_mask)
            parts["hidden_states"] = tuple(states[layer] for layer in every) if output_hidden_states else None
            parts["attentions"] = encoded.attentions if output_attentions else None
        output = XLFAModelOutput(**parts)
        return output if return_dict else output.to_tuple()

    @property
    def ot_epsilon_now(self) -> float:
        """Epsilon at `ot_progress`: from `ot_epsilon_start`, where there is one, geometrically to `ot_epsilon`."""
        start = self.config.ot_epsilon_start or self.config.ot_epsilon
        return start ** (1 - self.ot_progress) * self.config.ot_epsilon**self.ot_progress

    def align(
        self, source: "_Sentences", target: "_Sentences", beside_task: bool = False
    ) -> tuple[torch.Tensor, TransportResult]:
        """The alignment term of a batch of pairs and what the solver did.

        Args:
            beside_task: whether a task batch follows, which is to see the same dropout as without the term.

        Raises:
            ValueError: for different numbers of source and target sentences.
        """
        config = self.config
        numbers = [len(side.input_ids) for side in (source, target)]
        if numbers[0] != numbers[1]:
            raise ValueError(
                f"source_input_ids has {numbers[0]} sentences and target_input_ids {numbers[1]}: pair them"
            )
        input_ids, states, mask = self._alignment_states(source, target, beside_task)
        marginal = self._marginals(input_ids, states, mask)
        pairs = source.input_ids.shape[0]
        return alignment_loss(
            states[:pairs],
            states[pairs:],
            mask[:pairs],
            mask[pairs:],
            source_marginal=marginal[:pairs],
            target_marginal=marginal[pairs:],
            tau=config.ot_tau,
            debiased=config.ot_debiased,
            center=config.ot_center,
            epsilon=self.ot_epsilon_now,
            epsilon_scale=config.ot_epsilon_scale,
            cost=config.ot_cost,
            solver=config.ot_solver,
            max_iter=config.ot_max_iter,
            tol=config.ot_tol,
        )

    def _marginals(self, input_ids: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Weights of the tokens by `ot_marginals`, B x T, each row summing to 1 over the mask; without gradient."""
        numbers = torch.promote_types(states.dtype, torch.float32)
        if self.config.ot_marginals == "norm":
            weights = torch.linalg.vector_norm(states.detach().to(numbers), dim=-1) * mask
        elif self.config.ot_marginals == "idf":
            weights = self.ot_idf.to(numbers)[input_ids] * mask
        else:
            weights = mask.to(numbers)
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)

    def _alignment_states(
        self, source: "_Sentences", target: "_Sentences", beside_task: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, states of `ot_layer` and mask of alignable tokens, source sentences first; one encoder call for both."""
        length = max(source.input_ids.shape[1], target.input_ids.shape[1])
        pad = self.config.pad_token_id or 0
        input_ids = torch.cat([_pad_to(side.input_ids, length, pad) for side in (source, target)])
        attention_mask = torch.cat([_pad_to(side.attention_mask, length, 0) for side in (source, target)])
        special = torch.cat([_pad_to(side.special_tokens_mask, length, 1) for side in (source, target)])

        layer = self.config.ot_layer
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        with fork_generator(input_ids.device) if beside_task and self.training else nullcontext():
            if layer == "fused":
                encoded, _ = self._encode(inputs, self.fused_layers)
                states = self._fuse(encoded, attention_mask, update_statistics=False)
            else:
                encoded, _ = self._encode(inputs, [layer], last=max(1, layer))
                states = encoded[layer]
        return input_ids, states, attention_mask * (special == 0)

    @property
    def fused_layers(self) -> list[int]:
        """The layers below the last one whose states are fused with it; no other layer's states are kept."""
        if self.fusion is None:
            return []
        if self.config.fusion == "scalar_mix":
            return list(range(self.config.num_hidden_layers))
        if self.config.fusion_layer == "learned":
            return list(range(1, self.config.num_hidden_layers))
        return [self.config.fusion_layer]

    def _encode(
        self, inputs: dict[str, torch.Tensor], kept: list[int], last: int | None = None
    ) -> tuple[dict[int, torch.Tensor], ModelOutput]:
        """The states of the layers `kept` and of the last one that is run, and what the encoder returned."""
        if self.stored_trunk is None:
            return run_layers(self.encoder, inputs, kept, last=last)
        first = self.config.freeze_layers
        stored = self.stored_trunk(inputs)
        absent = [layer for layer in kept if layer < first and layer not in stored]
        if absent:
            raise ValueError(f"the states of layer {absent[0]} are not stored: stored are those of {sorted(stored)}")
        states, encoded = run_layers(
            self.encoder, inputs, [layer for layer in kept if layer >= first], first, stored[first], last
        )
        return stored | states, encoded

    def _fuse(
        self, states: dict[int, torch.Tensor], attention_mask: torch.Tensor, update_statistics: bool = True
    ) -> torch.Tensor:
        """The fused states, B x T x E, of those of `fused_layers` and of the last layer."""
        last = states[self.config.num_hidden_layers]
        if self.fusion is None:
            return last
        lower = [states[layer] for layer in self.fused_layers]
        if self.config.fusion == "scalar_mix":
            return self.fusion([*lower, last])
        learned = self.config.fusion_layer == "learned"
        return self.fusion(lower if learned else lower[0], last, attention_mask, update_statistics)


class _Sentences:
    """One side of a batch of sentence pairs; missing masks mean: no padding, no special tokens."""

    def __init__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        special_tokens_mask: torch.Tensor | None = None,
    ):
        self.input_ids = input_ids
        self.attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.special_tokens_mask = torch.zeros_like(input_ids) if special_tokens_mask is None else special_tokens_mask


class XLFAForQuestionAnswering(XLFAPreTrainedModel):
    """Extractive question answering: start and end logits over the fused states."""

    def __init__(self, config: XLFAConfig):
        super().__init__(config)
        self.xlfa = XLFAModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        source_input_ids: torch.Tensor | None = None,
        source_attention_mask: torch.Tensor | None = None,
        source_special_tokens_mask: torch.Tensor | None = None,
        target_input_ids: torch.Tensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        target_special_tokens_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> XLFAQuestionAnsweringOutput:
        """See `XLFAModel.forward`; `start_positions` and `end_positions` are B, token indices of the answer."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        encoded = self.xlfa(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            source_input_ids=source_input_ids,
            source_attention_mask=source_attention_mask,
            source_special_tokens_mask=source_special_tokens_mask,
            target_input_ids=target_input_ids,
            target_attention_mask=target_attention_mask,
            target_special_tokens_mask=target_special_tokens_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        start_logits = end_logits = task_loss = None
        if encoded.last_hidden_state is not None:
            start_logits, end_logits = self.qa_outputs(self.dropout(encoded.last_hidden_state)).unbind(-1)
        if start_logits is not None and start_positions is not None and end_positions is not None:
            task_loss = (
                _position_loss(start_logits, start_positions, attention_mask)
                + _position_loss(end_logits, end_positions, attention_mask)
            ) / 2
        output = XLFAQuestionAnsweringOutput(
            loss=self.combine_losses(task_loss, encoded.ot_loss),
            start_logits=start_logits,
            end_logits=end_logits,
            task_loss=task_loss,
            ot_loss=encoded.ot_loss,
            ot_statistics=encoded.ot_statistics,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output if return_dict else output.to_tuple()


class _XLFAClassifier(XLFAPreTrainedModel):
    """A linear classifier over the fused states, shared by the two classification heads.

    Raises:
        ValueError: for fewer than two labels, or a `problem_type` that is not single-label classification.
    """

    def __init__(self, config: XLFAConfig):
        super().__init__(config)
        if config.num_labels < 2:
            raise ValueError(f"num_labels={config.num_labels} is not allowed: a classifier needs at least 2")
        if getattr(config, "problem_type", None) not in (None, "single_label_classification"):
            raise ValueError(
                f"problem_type={config.problem_type!r} is not allowed: it must be None or 'single_label_classification'"
            )
        self.num_labels = config.num_labels
        self.xlfa = XLFAModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def select_features(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The states that are classified, out of B x T x E."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        source_input_ids: torch.Tensor | None = None,
        source_attention_mask: torch.Tensor | None = None,
        source_special_tokens_mask: torch.Tensor | None = None,
        target_input_ids: torch.Tensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        target_special_tokens_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> XLFAClassifierOutput:
        """See `XLFAModel.forward`; `labels` are B for sequences and B x T for tokens, -100 where not scored."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        encoded = self.xlfa(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            source_input_ids=source_input_ids,
            source_attention_mask=source_attention_mask,
            source_special_tokens_mask=source_special_tokens_mask,
            target_input_ids=target_input_ids,
            target_attention_mask=target_attention_mask,
            target_special_tokens_mask=target_special_tokens_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = task_loss = None
        if encoded.last_hidden_state is not None:
            features = self.select_features(encoded.last_hidden_state, attention_mask)
            logits = self.classifier(self.dropout(features))
        if logits is not None and labels is not None:
            targets = labels.view(-1).to(logits.device)
            task_loss = CrossEntropyLoss()(_at_least_float32(logits).view(-1, self.num_labels), targets)
        output = XLFAClassifierOutput(
            loss=self.combine_losses(task_loss, encoded.ot_loss),
            logits=logits,
            task_loss=task_loss,
            ot_loss=encoded.ot_loss,
            ot_statistics=encoded.ot_statistics,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output if return_dict else output.to_tuple()


class XLFAForSequenceClassification(_XLFAClassifier):
    """One label a sequence, from the first token's state or the mean over tokens (`classifier_pooling`)."""

    def select_features(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if self.config.classifier_pooling == "cls":
            return states[:, 0]
        if attention_mask is None:
            return states.mean(dim=1)
        return mean_over_tokens(states, attention_mask).squeeze(1)


class XLFAForTokenClassification(_XLFAClassifier):
    """One label a token."""

    def select_features(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return states


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _position_loss(logits: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean cross-entropy of positions, B or B x 1, among the tokens, logits B x T; one outside of them counts as none.

    Where all are outside it is 0, and no NaN: so a process without examples takes part in a step.
    """
    # The first index past the window stands for none.
    none = logits.shape[1]
    positions = positions.view(-1).to(logits.device)
    inside = (positions >= 0) & (positions < none)
    scores = _at_least_float32(logits)
    if attention_mask is not None:
        attention_mask = attention_mask.to(logits.device)
        # No answer stands in padding, on whose length the loss would depend.
        scores = scores.masked_fill(attention_mask == 0, torch.finfo(scores.dtype).min)
        inside = inside & (attention_mask.gather(1, positions.clamp(0, none - 1).unsqueeze(1)).squeeze(1) != 0)
    total = CrossEntropyLoss(ignore_index=none, reduction="sum")(scores, torch.where(inside, positions, none))
    return total / inside.sum().clamp(min=1)


def fork_generator(device: torch.device) -> AbstractContextManager:
    """A context whose random numbers leave the generators of the CPU and of `device` as they were.

    Dropout of alignment sequences draws from such a copy, so that the task batches of a run see the same dropout with
    the term and without it.
    """
    kind = device.type if device.type in ("cuda", "xpu") else None
    # Older torch reads the name of the kind even where it forks no device of it.
    return torch.random.fork_rng([] if kind is None else [device], device_type=kind or "cuda")


def _pad_to(tensor: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=value)


XLFAModel.register_for_auto_class("AutoModel")
XLFAForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
XLFAForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
XLFAForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
