"""What XLFA models return: losses with their parts, logits, states, and what the transport solver did."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .sinkhorn_xlfa import TransportResult


@dataclass
class XLFAModelOutput(ModelOutput):
    """Output of `XLFAModel`.

    Args:
        last_hidden_state: B x T x E, the fused states (the last layer's where `fusion="none"`).
        ot_loss: scalar, the alignment term before `ot_weight`; None without pairs.
        ot_statistics: what the solver did, one detached value a pair; None without pairs. See `transport_statistics`.
        hidden_states: the encoder's own states H_0..H_N, each B x T x E, on request.
        attentions: the encoder's attention weights, on request.
    """

    last_hidden_state: torch.FloatTensor | None = None
    ot_loss: torch.FloatTensor | None = None
    ot_statistics: dict[str, torch.Tensor] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class XLFAClassifierOutput(ModelOutput):
    """Output of the classification heads.

    Args:
        loss: scalar, task_loss + ot_weight · ot_loss, of the parts that are there.
        logits: B x labels for sequences, B x T x labels for tokens.
        task_loss: scalar, the cross entropy; None without labels.
        ot_loss, ot_statistics, hidden_states, attentions: see `XLFAModelOutput`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    task_loss: torch.FloatTensor | None = None
    ot_loss: torch.FloatTensor | None = None
    ot_statistics: dict[str, torch.Tensor] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class XLFAQuestionAnsweringOutput(ModelOutput):
    """Output of the question-answering head.

    Args:
        loss: scalar, task_loss + ot_weight · ot_loss, of the parts that are there.
        start_logits, end_logits: B x T.
        task_loss: scalar, mean of the two cross entropies; None without positions.
        ot_loss, ot_statistics, hidden_states, attentions: see `XLFAModelOutput`.
    """

    loss: torch.FloatTensor | None = None
    start_logits: torch.FloatTensor | None = None
    end_logits: torch.FloatTensor | None = None
    task_loss: torch.FloatTensor | None = None
    ot_loss: torch.FloatTensor | None = None
    ot_statistics: dict[str, torch.Tensor] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def transport_statistics(result: TransportResult, solver: str) -> dict[str, torch.Tensor]:
    """What training logs of a solve, one value a pair: the plan's entropy in nats; of a solver that may end early, the
    marginal error and whether the pair did not converge; of Sinkhorn's iterations, their number and the absolute
    epsilon."""
    statistics = {"plan_entropy": result.plan_entropy.detach()}
    if solver != "product":
        statistics |= {"marginal_error": result.marginal_error.detach(), "not_converged": ~result.converged}
    if solver == "sinkhorn":
        statistics |= {"iterations": result.iterations, "epsilon": result.epsilon}
    return statistics
