"""Configuration of XLFA models."""

import copy
import math

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, __version__
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

SCHEMA_VERSION = 1

# The whole map stands in every saved config: transformers alone would write the entry of the saved class, and
# `AutoModel.from_pretrained` on a question-answering checkpoint would fail.
AUTO_MAP = {
    "AutoConfig": "configuration_xlfa.XLFAConfig",
    "AutoModel": "modeling_xlfa.XLFAModel",
    "AutoModelForQuestionAnswering": "modeling_xlfa.XLFAForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_xlfa.XLFAForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_xlfa.XLFAForTokenClassification",
}

CHOICES = {
    "fusion": ("dlfa", "none", "scalar_mix", "aff"),
    "fusion_gate": ("literal", "sigmoid"),
    "fusion_norm": ("batch", "layer", "none"),
    "ot_solver": ("sinkhorn", "exact", "product"),
    "ot_epsilon_scale": ("centered_std", "std", "mean", "max", "absolute"),
    "ot_cost": ("cosine", "sqeuclidean"),
    "ot_marginals": ("uniform", "norm", "idf"),
    "classifier_pooling": ("cls", "mean"),
}


class XLFAConfig(PretrainedConfig):
    r"""Configuration of an XLFA model: an encoder, the fusion of its layers and the alignment term.

    Args:
        text_config (`PretrainedConfig` or `dict`, *optional*):
            Any encoder that `AutoConfig` knows; by default transformers' own default for XLM-R, whose vocabulary is
            smaller than that of any XLM-R.
        fusion (`str`, defaults to `"dlfa"`):
            `"dlfa"` fuses a lower layer with the last one (Chen et al. 2022, eq. 2), and so does `"aff"` (Dai et al.
            2021); `"scalar_mix"` mixes all layers 0..N (Peters et al. 2018, eq. 1); `"none"` is the plain last layer.
        fusion_layer (`int` or `str`, *optional*):
            The lower layer of `"dlfa"` and `"aff"`, 1..N-1 of N; by default at two thirds of the depth (8 of 12).
            `"learned"`: a mix of the layers 1..N-1 with learned softmax weights.
        fusion_gate (`str`, defaults to `"literal"`):
            Of `"dlfa"`. `"literal"`: AIF's output gates, as published; `"sigmoid"`: AIF's attention in (0, 1), as in
            AFF.
        fusion_gate_bias (`float`, defaults to 0.0):
            Of `"dlfa"` and `"aff"` (ours): where a trained bias within the gate's sigmoid starts. Below 0, training
            starts near the plain last layer: at -6 a gate of 0.0025. 0: there is no such bias, as published.
        fusion_reduction (`int`, defaults to 4):
            r of the bottleneck: hidden size / r channels.
        fusion_norm (`str`, defaults to `"batch"`):
            Normalisation inside AIF: `"batch"` as published, `"layer"`, or `"none"`. Batch statistics are those of
            one forward call: with gradient accumulation they differ from the whole batch's, so the gradient does too.
        fusion_layer_norm (`bool`, defaults to `False`):
            A LayerNorm on each fused layer, for encoders whose intermediate states are not normalised.
        ot_weight (`float`, defaults to 0.0):
            Weight of the optimal-transport term in the loss; 0 switches it off.
        ot_epsilon (`float`, defaults to 0.1):
            Strength of the entropic regularisation, finite and positive, in units of `ot_epsilon_scale`.
        ot_solver (`str`, defaults to `"sinkhorn"`):
            `"sinkhorn"`; or a limit of epsilon: `"exact"` (towards 0; needs POT), `"product"` (towards infinity).
        ot_epsilon_scale (`str`, defaults to `"centered_std"`):
            Unit of epsilon: the standard deviation of a pair's double-centred cost; or `"std"`, `"mean"`, `"max"` of
            the cost; or `"absolute"`.
        ot_cost (`str`, defaults to `"cosine"`):
            `"cosine"`: 1 - cos(x, y); `"sqeuclidean"`: ||x - y||² / 2.
        ot_layer (`str` or `int`, defaults to `"fused"`):
            States that are aligned: `"fused"` (the last layer where `fusion="none"`) or a layer index 0..N.
        ot_tau (`float`, *optional*):
            Strength of soft marginals (unbalanced transport), in units of `ot_epsilon_scale`; None for hard ones.
        ot_debiased (`bool`, defaults to `False`):
            The Sinkhorn divergence instead of the plain value.
        ot_marginals (`str`, defaults to `"uniform"`):
            Weights of a sentence's tokens: `"uniform"`, `"norm"` (of their states), or `"idf"` (a table that is saved
            with the weights).
        ot_center (`bool`, defaults to `False`):
            Subtract each side's mean state over the batch (of each process, its own part) before the cost, for encoders
            whose states all point one way.
        ot_epsilon_start (`float`, *optional*):
            Epsilon at the start of training; it decays geometrically to `ot_epsilon` at the end.
        ot_max_iter (`int`, defaults to 5000):
            Most Sinkhorn sweeps for a pair.
        ot_tol (`float`, defaults to 1e-3):
            L1 error of the marginals at which a pair counts as converged.
        freeze_layers (`int`, defaults to 0):
            K, 0..N-1: of the encoder only the layers K+1..N are trained. All else, the trunk, stays in evaluation mode.
        classifier_dropout (`float`, *optional*):
            Dropout in front of the head; by default the encoder's hidden dropout, or 0.1.
        classifier_pooling (`str`, defaults to `"cls"`):
            Sentence vector for sequence classification: the first token's state, or the mean over tokens.
        input_length, input_stride (`int`, *optional*):
            Longest input in tokens and overlap of windows in training: what scoring takes by default.

    Raises:
        ValueError: if a field has a value that is not allowed; the message names field, value and what is allowed.

    Example:

    ```python
    >>> from modeling_xlfa import XLFAConfig
    >>> config = XLFAConfig(fusion_layer=8, ot_weight=0.1, ot_epsilon=0.05)
    >>> config.fusion_layer, config.ot_epsilon
    (8, 0.05)
    ```
    """

    model_type = "xlfa"
    sub_configs = {"text_config": AutoConfig}
    # Trainer's predict() returns every output that is not named here or None: logits must come first.
    keys_to_ignore_at_inference = [
        "task_loss",
        "ot_loss",
        "ot_statistics",
        "last_hidden_state",
        "hidden_states",
        "attentions",
    ]

    def __init__(
        self,
        text_config=None,
        fusion="dlfa",
        fusion_layer=None,
        fusion_gate="literal",
        fusion_gate_bias=0.0,
        fusion_reduction=4,
        fusion_norm="batch",
        fusion_layer_norm=False,
        ot_weight=0.0,
        ot_epsilon=0.1,
        ot_solver="sinkhorn",
        ot_epsilon_scale="centered_std",
        ot_cost="cosine",
        ot_layer="fused",
        ot_tau=None,
        ot_debiased=False,
        ot_marginals="uniform",
        ot_center=False,
        ot_epsilon_start=None,
        ot_max_iter=5000,
        ot_tol=1e-3,
        freeze_layers=0,
        classifier_dropout=None,
        classifier_pooling="cls",
        input_length=None,
        input_stride=None,
        schema_version=SCHEMA_VERSION,
        **kwargs,
    ):
        # Before all other fields: a newer checkpoint may have names and values that mean nothing here.
        self.schema_version = schema_version
        if not (_is_int(schema_version) and 1 <= schema_version <= SCHEMA_VERSION):
            self._reject("schema_version", f"1..{SCHEMA_VERSION}; a newer checkpoint needs a newer version of xlfa")
        if text_config is None:
            text_config = AutoConfig.for_model("xlm-roberta")
        elif isinstance(text_config, dict):
            if "model_type" not in text_config:
                raise ValueError("text_config: the dictionary has no 'model_type', such as 'xlm-roberta'")
            if text_config["model_type"] not in CONFIG_MAPPING:
                raise ValueError(
                    f"text_config: transformers {__version__} has no encoder {text_config['model_type']!r}; a newer "
                    "version may have it: pip install --upgrade transformers"
                )
            text_config = AutoConfig.for_model(**text_config)
        else:
            text_config = copy.deepcopy(text_config)
        unknown = [name for name in kwargs if name.startswith(("fusion", "ot_", "freeze_", "classifier_"))]
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}: XLFAConfig has none of that name")
        # The name is a path on the machine that trained the model; it must not travel into a published config.
        text_config._name_or_path = ""
        self.text_config = text_config

        if fusion_layer is None:
            depth = text_config.num_hidden_layers
            fusion_layer = max(1, min(depth - 1, round(2 * depth / 3)))
        if classifier_dropout is None:
            classifier_dropout = getattr(text_config, "hidden_dropout_prob", None)
            classifier_dropout = 0.1 if classifier_dropout is None else classifier_dropout

        self.fusion = fusion
        self.fusion_layer = fusion_layer
        self.fusion_gate = fusion_gate
        self.fusion_gate_bias = fusion_gate_bias
        self.fusion_reduction = fusion_reduction
        self.fusion_norm = fusion_norm
        self.fusion_layer_norm = fusion_layer_norm
        self.ot_weight = ot_weight
        self.ot_epsilon = ot_epsilon
        self.ot_solver = ot_solver
        self.ot_epsilon_scale = ot_epsilon_scale
        self.ot_cost = ot_cost
        self.ot_layer = ot_layer
        self.ot_tau = ot_tau
        self.ot_debiased = ot_debiased
        self.ot_marginals = ot_marginals
        self.ot_center = ot_center
        self.ot_epsilon_start = ot_epsilon_start
        self.ot_max_iter = ot_max_iter
        self.ot_tol = ot_tol
        self.freeze_layers = freeze_layers
        self.classifier_dropout = classifier_dropout
        self.classifier_pooling = classifier_pooling
        self.input_length = input_length
        self.input_stride = input_stride

        kwargs.setdefault("pad_token_id", getattr(text_config, "pad_token_id", None))
        # Written anew on every load: a checkpoint cannot point its classes at other code.
        kwargs.pop("auto_map", None)
        super().__init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        self.check_fields()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "XLFAConfig":
        """As in transformers; `ValueError` for the config of another model, whose weights would not be used."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(f"a {kind!r} model, and no XLFA one: build one on it with from_encoder")
        return super().from_dict(config_dict, **kwargs)

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.text_config.num_hidden_layers

    def check_fields(self) -> None:
        """Raise `ValueError` for the first field with a value that is not allowed.

        Models call this again when they are built: `from_pretrained(…, ot_epsilon=…)` sets fields after `__init__`.
        """
        encoder = self.text_config.model_type
        causal = encoder in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and encoder not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if causal or self.text_config.is_encoder_decoder or getattr(self.text_config, "is_decoder", False):
            raise ValueError(f"text_config: {encoder!r} is not an encoder-only model")
        for config in (self, self.text_config):
            check_weights_file(config)
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                self._reject(field, f"one of {', '.join(map(repr, allowed))}")

        depth = self.num_hidden_layers
        learned = self.fusion_layer == "learned"
        if self.fusion in ("dlfa", "aff"):
            if depth < 2:
                self._reject("fusion", "'none' or 'scalar_mix' (the encoder has one layer, and no lower one to fuse)")
            if not learned and not (_is_int(self.fusion_layer) and 1 <= self.fusion_layer <= depth - 1):
                self._reject(
                    "fusion_layer", f"a layer index 1..{depth - 1} or 'learned' (the encoder has {depth} layers)"
                )
        elif learned:
            self._reject("fusion_layer", f"a layer index with fusion={self.fusion!r}, which chooses no lower layer")
        if not (_is_int(self.fusion_reduction) and 1 <= self.fusion_reduction <= self.hidden_size):
            self._reject("fusion_reduction", f"an integer 1..{self.hidden_size} (the hidden size)")
        if not _is_finite(self.fusion_gate_bias):
            self._reject("fusion_gate_bias", "a finite number (0: no bias)")
        for field in ("fusion_layer_norm", "ot_debiased", "ot_center"):
            if not isinstance(getattr(self, field), bool):
                self._reject(field, "True or False")

        if not (_is_finite(self.ot_weight) and self.ot_weight >= 0):
            self._reject("ot_weight", "a finite number >= 0 (0 switches the term off)")
        if not (_is_finite(self.ot_epsilon) and self.ot_epsilon > 0):
            self._reject("ot_epsilon", 'a finite number > 0 (its limits are ot_solver="exact" and ot_solver="product")')
        for field in ("ot_tau", "ot_epsilon_start"):
            value = getattr(self, field)
            if value is not None and not (_is_finite(value) and value > 0):
                self._reject(field, "None or a finite number > 0")
        if self.ot_tau is not None and self.ot_solver != "sinkhorn":
            self._reject("ot_tau", f"None with ot_solver={self.ot_solver!r}, which has hard marginals only")
        if self.ot_epsilon_start is not None and self.ot_solver != "sinkhorn":
            self._reject("ot_epsilon_start", f"None with ot_solver={self.ot_solver!r}, which knows no epsilon")
        if self.ot_layer != "fused" and not (_is_int(self.ot_layer) and 0 <= self.ot_layer <= depth):
            self._reject("ot_layer", f"'fused' or a layer index 0..{depth}")
        if not (_is_int(self.freeze_layers) and 0 <= self.freeze_layers < depth):
            self._reject("freeze_layers", f"a number of layers 0..{depth - 1} (the encoder has {depth})")
        if self.freeze_layers and self.ot_layer != "fused" and self.ot_layer <= self.freeze_layers:
            self._reject("ot_layer", f"'fused' or a layer above the frozen ones, {self.freeze_layers + 1}..{depth}")
        if not (_is_int(self.ot_max_iter) and self.ot_max_iter >= 1):
            self._reject("ot_max_iter", "an integer >= 1")
        if not (_is_finite(self.ot_tol) and self.ot_tol > 0):
            self._reject("ot_tol", "a finite number > 0")

        if not (_is_finite(self.classifier_dropout) and 0 <= self.classifier_dropout < 1):
            self._reject("classifier_dropout", "a number in [0, 1)")
        for field in ("input_length", "input_stride"):
            value = getattr(self, field)
            if value is not None and not (_is_int(value) and value >= 0):
                self._reject(field, "None or an integer >= 0")

    def _reject(self, field: str, allowed: str) -> None:
        raise ValueError(f"{field}={getattr(self, field)!r} is not allowed: it must be {allowed}")


def check_weights_file(config: PretrainedConfig) -> None:
    """Raise `ValueError` where a config names a file of weights that is not safetensors.

    transformers would load the file of that name, whatever `use_safetensors` says.
    """
    weights = getattr(config, "transformers_weights", None)
    if weights is not None and not str(weights).endswith(".safetensors"):
        raise ValueError(f"transformers_weights={weights!r} is not allowed: it must be a .safetensors file")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


XLFAConfig.register_for_auto_class()
