"""Feature aggregation: AIF and DLFA (Chen, Guo, Liu, Tao, ICPR 2022, arXiv 2205.08497).

All tensors are B x T x E with the channels last, so the kernel-size-1 convolutions of the paper are linear maps over
the last axis. `mask` is B x T with 1 on tokens and 0 on padding; padding enters neither pooling nor statistics.
"""

import torch
from torch import nn


class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the last axis of B x T x C whose statistics see only the positions where the mask is 1.

    In training the batch's statistics normalise and the running ones are updated, unless `update_statistics` is false:
    then, and in evaluation, the running statistics normalise. Where fewer than two values reach a channel the batch has
    no variance, and the running statistics are used too. Statistics are float32 at least, whatever the input's type.
    """

    def forward(self, states: torch.Tensor, mask: torch.Tensor, update_statistics: bool = True) -> torch.Tensor:
        values = states.to(torch.promote_types(states.dtype, torch.float32))
        mean, variance = self.running_mean.to(values.dtype), self.running_var.to(values.dtype)
        if self.training and update_statistics:
            weights = mask.unsqueeze(-1).to(values.dtype)
            count = weights.sum()
            batch_mean = (values * weights).sum(dim=(0, 1)) / count.clamp(min=1)
            batch_variance = ((values - batch_mean).square() * weights).sum(dim=(0, 1)) / count.clamp(min=1)
            enough = count >= 2
            with torch.no_grad():
                momentum = self.momentum * enough.to(values.dtype)
                unbiased = batch_variance * count / (count - 1).clamp(min=1)
                self.running_mean.lerp_(batch_mean.to(self.running_mean.dtype), momentum.to(self.running_mean.dtype))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum.to(self.running_var.dtype))
                self.num_batches_tracked.add_(enough)
            mean = torch.where(enough, batch_mean, mean)
            variance = torch.where(enough, batch_variance, variance)
        normalised = (values - mean) * torch.rsqrt(variance + self.eps)
        return (normalised * self.weight + self.bias).to(states.dtype)


class AIFBranch(nn.Module):
    """Bottleneck of one branch of AIF: linear, norm, ReLU (E/r channels), linear, norm (E channels)."""

    def __init__(self, channels: int, reduction: int, norm: str):
        super().__init__()
        bottleneck = max(1, channels // reduction)
        self.reduce = nn.Linear(channels, bottleneck)
        self.reduce_norm = _build_norm(norm, bottleneck)
        self.expand = nn.Linear(bottleneck, channels)
        self.expand_norm = _build_norm(norm, channels)

    def forward(self, states: torch.Tensor, mask: torch.Tensor, update_statistics: bool) -> torch.Tensor:
        states = _apply_norm(self.reduce_norm, self.reduce(states), mask, update_statistics)
        return _apply_norm(self.expand_norm, self.expand(states.relu()), mask, update_statistics)


class AIF(nn.Module):
    """Attentional information fusion: AIF(W) = W * sigmoid(W_global + W_local) (paper, eq. 1).

    The global branch sees W averaged over the tokens (B x 1 x E), the local branch sees W itself (B x T x E).

    Args:
        channels: E.
        reduction: r; the bottleneck has E / r channels. The paper prints none, AFF (arXiv 2009.14082) uses 4.
        norm: `"batch"` as published, `"layer"`, or `"none"`.
    """

    def __init__(self, channels: int, reduction: int = 4, norm: str = "batch"):
        super().__init__()
        self.global_branch = AIFBranch(channels, reduction, norm)
        self.local_branch = AIFBranch(channels, reduction, norm)

    def attention(self, states: torch.Tensor, mask: torch.Tensor, update_statistics: bool = True) -> torch.Tensor:
        """sigmoid(W_global + W_local), B x T x E, in (0, 1)."""
        weights = mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp(min=1)
        not_empty = mask.any(dim=1, keepdim=True)
        global_part = self.global_branch(pooled, not_empty, update_statistics)
        return torch.sigmoid(global_part + self.local_branch(states, mask, update_statistics))

    def forward(self, states: torch.Tensor, mask: torch.Tensor, update_statistics: bool = True) -> torch.Tensor:
        """Eq. 1 on `states` (B x T x E); `mask` is B x T. Returns B x T x E."""
        return states * self.attention(states, mask, update_statistics)


class DLFA(nn.Module):
    """Double layers feature aggregation: L = L1 * A + L2 * (1 - A) with W = (L1 + L2) / 2 (paper, eq. 2).

    `gate="literal"` takes A = AIF(W), as the paper prints it: then L = L2 + A * (L1 - L2) is quadratic in the features,
    and at initialisation about L2 + W * (L1 - L2) / 2. `gate="sigmoid"` takes A = sigmoid(W_global + W_local), a gate
    in (0, 1) as in AFF: at initialisation about the average of the two layers.

    Args:
        channels: E.
        gate, reduction, norm: see `XLFAConfig`.
        layer_norm: a LayerNorm of its own on each of the two layers first.
    """

    def __init__(
        self, channels: int, gate: str = "literal", reduction: int = 4, norm: str = "batch", layer_norm: bool = False
    ):
        super().__init__()
        self.gate = gate
        self.lower_norm = nn.LayerNorm(channels) if layer_norm else nn.Identity()
        self.last_norm = nn.LayerNorm(channels) if layer_norm else nn.Identity()
        self.aif = AIF(channels, reduction, norm)

    def forward(
        self, lower: torch.Tensor, last: torch.Tensor, mask: torch.Tensor, update_statistics: bool = True
    ) -> torch.Tensor:
        """Fuse `lower` (L1) with `last` (L2), both B x T x E; `mask` is B x T. Returns B x T x E.

        `update_statistics=False` (alignment sequences) makes batch norm use its running statistics unchanged.
        """
        lower, last = self.lower_norm(lower), self.last_norm(last)
        average = (lower + last) / 2
        weigh = self.aif if self.gate == "literal" else self.aif.attention
        weights = weigh(average, mask, update_statistics)
        return lower * weights + last * (1 - weights)


def _build_norm(norm: str, channels: int) -> nn.Module:
    return {"batch": MaskedBatchNorm, "layer": nn.LayerNorm, "none": nn.Identity}[norm](channels)


def _apply_norm(norm: nn.Module, states: torch.Tensor, mask: torch.Tensor, update_statistics: bool) -> torch.Tensor:
    if isinstance(norm, MaskedBatchNorm):
        return norm(states, mask, update_statistics)
    return norm(states)
