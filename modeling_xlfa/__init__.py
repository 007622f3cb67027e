"""What ships to the Hub: configuration, fusion, transport and models, on torch and transformers only.

Importing this package registers the classes with transformers' Auto classes. The registration stands here and not in
the flat files, which are copied to the Hub: a copy that registered itself would take the place of an installed package.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_xlfa import XLFAConfig
from .fusion_xlfa import AFF, AIF, DLFA, ScalarMix
from .modeling_xlfa import (
    XLFAForQuestionAnswering,
    XLFAForSequenceClassification,
    XLFAForTokenClassification,
    XLFAModel,
    XLFAPreTrainedModel,
)
from .sinkhorn_xlfa import TransportProblem, TransportResult
from .transport_xlfa import alignment_loss, pairwise_cost, sinkhorn

AutoConfig.register("xlfa", XLFAConfig, exist_ok=True)
AutoModel.register(XLFAConfig, XLFAModel, exist_ok=True)
AutoModelForQuestionAnswering.register(XLFAConfig, XLFAForQuestionAnswering, exist_ok=True)
AutoModelForSequenceClassification.register(XLFAConfig, XLFAForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(XLFAConfig, XLFAForTokenClassification, exist_ok=True)

__all__ = [
    "AFF",
    "AIF",
    "DLFA",
    "ScalarMix",
    "TransportProblem",
    "TransportResult",
    "XLFAConfig",
    "XLFAForQuestionAnswering",
    "XLFAForSequenceClassification",
    "XLFAForTokenClassification",
    "XLFAModel",
    "XLFAPreTrainedModel",
    "alignment_loss",
    "pairwise_cost",
    "sinkhorn",
]
