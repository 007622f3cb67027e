"""Feature aggregation: DLFA with AIF (Chen, Guo, Liu, Tao, ICPR 2022, arXiv 2205.08497; "the paper" below), AFF
(Dai et al. 2021, arXiv 2009.14082) and the scalar mix (Peters et al. 2018, arXiv 1802.05365).

All tensors are B x T x E with the channels last, so the kernel-size-1 convolutions of the paper are linear maps over
the last axis. `mask` is B x T with 1 on tokens and 0 on padding; padding enters neither pooling nor statistics.
"""

from collections.abc import Sequence

import torch
from torch import distributed, nn

from .configuration_xlfa import XLFAConfig


class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the last axis of B x T x C whose statistics see only the positions where the mask is 1.

    In training the batch's statistics normalise and the running ones are updated, unless `update_statistics` is false:
    then, and in evaluation, the running statistics normalise. Where fewer than two values reach a channel the batch has
    no variance, and the running statistics are used too. Statistics are float32 at least, whatever the input's type.

    The batch is that of all processes of torch.distributed's default group: count and sum are reduced over them, then
    the squared deviations from the common mean. A process may bring no values, but each must run the same forward and
    backward passes. Where the processes' gradients are averaged, as DDP and FSDP do, they are those of one process on
    the whole batch. The running statistics stay the same everywhere; normalising by them needs no communication.
    """

    def forward(self, states: torch.Tensor, mask: torch.Tensor, update_statistics: bool = True) -> torch.Tensor:
        if self.training:
            return self._forward_in_training(states, mask, update_statistics)
        return self._normalise(states, self.running_mean, self.running_var)

    # Not compiled: a compiled graph keeps the running statistics themselves for its backward pass, and the next forward
    # pass changes them in place, as the task batch's does after that of the alignment sequences.
    @torch.compiler.disable
    def _forward_in_training(self, states: torch.Tensor, mask: torch.Tensor, update_statistics: bool) -> torch.Tensor:
        mean, variance = self.running_mean, self.running_var
        if update_statistics:
            values = states.to(torch.promote_types(states.dtype, torch.float32))
            weights = mask.unsqueeze(-1).to(values.dtype)
            sums = _sum_over_processes(torch.cat([(values * weights).sum(dim=(0, 1)), weights.sum().view(1)]))
            count = sums[-1]
            batch_mean = sums[:-1] / count.clamp(min=1)
            squares = _sum_over_processes(((values - batch_mean).square() * weights).sum(dim=(0, 1)))
            batch_variance = squares / count.clamp(min=1)
            enough = count >= 2
            with torch.no_grad():
                # None is the mean over all batches, which torch.optim.swa_utils.update_bn asks for.
                rate = 1 / (self.num_batches_tracked + 1) if self.momentum is None else self.momentum
                momentum = rate * enough.to(values.dtype)
                unbiased = batch_variance * count / (count - 1).clamp(min=1)
                self.running_mean.lerp_(batch_mean.to(self.running_mean.dtype), momentum.to(self.running_mean.dtype))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum.to(self.running_var.dtype))
                self.num_batches_tracked.add_(enough)
            mean = torch.where(enough, batch_mean, mean)
            variance = torch.where(enough, batch_variance, variance)
        return self._normalise(states, mean, variance)

    def _normalise(self, states: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        values = states.to(torch.promote_types(states.dtype, torch.float32))
        normalised = (values - mean.to(values.dtype)) * torch.rsqrt(variance.to(values.dtype) + self.eps)
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
        gate_bias: where a trained bias within the sigmoid starts, for all channels (ours); 0: there is none.
    """

    def __init__(self, channels: int, reduction: int = 4, norm: str = "batch", gate_bias: float = 0.0):
        super().__init__()
        self.global_branch = AIFBranch(channels, reduction, norm)
        self.local_branch = AIFBranch(channels, reduction, norm)
        self.first_gate_bias = gate_bias
        self.gate_bias = nn.Parameter(torch.empty(channels)) if gate_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gate_bias is not None:
            nn.init.constant_(self.gate_bias, self.first_gate_bias)

    def attention(self, states: torch.Tensor, mask: torch.Tensor, update_statistics: bool = True) -> torch.Tensor:
        """sigmoid(W_global + W_local), with a bias where there is one, B x T x E, in (0, 1)."""
        pooled = mean_over_tokens(states, mask)
        not_empty = mask.any(dim=1, keepdim=True)
        global_part = self.global_branch(pooled, not_empty, update_statistics)
        logits = global_part + self.local_branch(states, mask, update_statistics)
        return torch.sigmoid(logits if self.gate_bias is None else logits + self.gate_bias)

    def forward(self, states: torch.Tensor, mask: torch.Tensor, update_statistics: bool = True) -> torch.Tensor:
        """Eq. 1 on `states` (B x T x E); `mask` is B x T. Returns B x T x E."""
        return states * self.attention(states, mask, update_statistics)


class ScalarMix(nn.Module):
    """Scalar mix of layers: gamma * sum_j softmax(s)_j H_j (Peters et al. 2018, eq. 1).

    The logits s start at zero and gamma at one: at initialisation the mix is the layers' mean.

    Args:
        layers: how many layers are mixed.
        channels: E.
        layer_norm: a LayerNorm of its own on each layer first.
        scaled: whether there is a gamma.
    """

    def __init__(self, layers: int, channels: int, layer_norm: bool = False, scaled: bool = True):
        super().__init__()
        self.norms = nn.ModuleList(_build_layer_norm(channels, layer_norm) for _ in range(layers))
        self.logits = nn.Parameter(torch.empty(layers))
        # One element and not a scalar: FSDP shards no parameter without a dimension.
        self.gamma = nn.Parameter(torch.empty(1)) if scaled else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.logits)
        if self.gamma is not None:
            nn.init.ones_(self.gamma)

    @property
    def weights(self) -> torch.Tensor:
        """softmax(s), one weight a layer; float32 at least."""
        return torch.softmax(self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)), dim=0)

    def forward(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mix `layers`, each B x T x E. Returns B x T x E; the sum is float32 at least, whatever the layers' type."""
        weights = self.weights if self.gamma is None else self.gamma * self.weights
        # Weights of shape 1, not 0: with those the products would be rounded to half-precision layers' type.
        terms = zip(weights.split(1), self.norms, layers, strict=True)
        return sum(weight * norm(layer) for weight, norm, layer in terms).to(layers[-1].dtype)


class GatedFusion(nn.Module):
    """L = L1 * A + L2 * (1 - A) of a lower layer L1 and the last layer L2; subclasses say what the gate A is.

    Args:
        channels: E.
        reduction, norm, gate_bias: of the gate, see `AIF`.
        layer_norm: a LayerNorm of its own on each layer first.
        mixed_layers: L1 is the scalar mix, without gamma, of that many layers; by default it is one layer.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 4,
        norm: str = "batch",
        layer_norm: bool = False,
        mixed_layers: int | None = None,
        gate_bias: float = 0.0,
    ):
        super().__init__()
        if mixed_layers is None:
            self.lower_mix, self.lower_norm = None, _build_layer_norm(channels, layer_norm)
        else:
            # Its layers have their own norms.
            self.lower_mix, self.lower_norm = ScalarMix(mixed_layers, channels, layer_norm, scaled=False), None
        self.last_norm = _build_layer_norm(channels, layer_norm)
        self.aif = AIF(channels, reduction, norm, gate_bias)

    def gate_weights(
        self, lower: torch.Tensor, last: torch.Tensor, mask: torch.Tensor, update_statistics: bool
    ) -> torch.Tensor:
        """A, B x T x E."""
        raise NotImplementedError

    def forward(
        self,
        lower: torch.Tensor | Sequence[torch.Tensor],
        last: torch.Tensor,
        mask: torch.Tensor,
        update_statistics: bool = True,
    ) -> torch.Tensor:
        """Fuse `lower` (L1, or the layers that are mixed to it) with `last` (L2), all B x T x E; `mask` is B x T.
        Returns B x T x E.

        `update_statistics=False` (alignment sequences) makes batch norm use its running statistics unchanged.
        """
        lower = self.lower_norm(lower) if self.lower_mix is None else self.lower_mix(lower)
        last = self.last_norm(last)
        weights = self.gate_weights(lower, last, mask, update_statistics)
        return lower * weights + last * (1 - weights)


class DLFA(GatedFusion):
    """Double layers feature aggregation: L = L1 * A + L2 * (1 - A) with W = (L1 + L2) / 2 (paper, eq. 2).

    `gate="literal"` takes A = AIF(W), as the paper prints it: then L = L2 + A * (L1 - L2) is quadratic in the features,
    and for zero weights L2 + W * (L1 - L2) / 2. `gate="sigmoid"` takes A = sigmoid(W_global + W_local), a gate in
    (0, 1) as in AFF: for zero weights the average of the two layers. Random weights start scattered around that.

    Args:
        channels: E.
        gate: `"literal"` or `"sigmoid"`.
        options: see `GatedFusion`.
    """

    def __init__(self, channels: int, gate: str = "literal", **options):
        super().__init__(channels, **options)
        self.gate = gate

    def gate_weights(
        self, lower: torch.Tensor, last: torch.Tensor, mask: torch.Tensor, update_statistics: bool
    ) -> torch.Tensor:
        weigh = self.aif if self.gate == "literal" else self.aif.attention
        return weigh((lower + last) / 2, mask, update_statistics)


class AFF(GatedFusion):
    """Attentional feature fusion: Z = X * M(X + Y) + Y * (1 - M(X + Y)) (Dai et al. 2021), X = L1 and Y = L2.

    M = sigmoid(global + local) is AIF's attention, here on the sum. For zero weights Z is the average of the two
    layers. The authors' published code doubles Z; their equation does not, nor does this.
    """

    def gate_weights(
        self, lower: torch.Tensor, last: torch.Tensor, mask: torch.Tensor, update_statistics: bool
    ) -> torch.Tensor:
        return self.aif.attention(lower + last, mask, update_statistics)


def build_fusion(config: XLFAConfig) -> ScalarMix | DLFA | AFF | None:
    """The fusion that the config asks for; None for the plain last layer."""
    if config.fusion == "none":
        return None
    depth = config.num_hidden_layers
    if config.fusion == "scalar_mix":
        return ScalarMix(depth + 1, config.hidden_size, config.fusion_layer_norm)
    options = {
        "reduction": config.fusion_reduction,
        "norm": config.fusion_norm,
        "layer_norm": config.fusion_layer_norm,
        "mixed_layers": depth - 1 if config.fusion_layer == "learned" else None,
        "gate_bias": config.fusion_gate_bias,
    }
    if config.fusion == "aff":
        return AFF(config.hidden_size, **options)
    return DLFA(config.hidden_size, gate=config.fusion_gate, **options)


def mean_over_tokens(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of `states`, B x T x E, where `mask`, B x T, is not 0: B x 1 x E; 0 where it is 0 throughout.

    Summed in float32 at least: a sum of float16 may overflow, and a number of tokens above 256 is rounded in bfloat16.
    """
    weights = mask.unsqueeze(-1).to(states.device, torch.promote_types(states.dtype, torch.float32))
    means = (states * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return means.to(states.dtype)


def _build_layer_norm(channels: int, layer_norm: bool) -> nn.Module:
    return nn.LayerNorm(channels) if layer_norm else nn.Identity()


def _build_norm(norm: str, channels: int) -> nn.Module:
    return {"batch": MaskedBatchNorm, "layer": nn.LayerNorm, "none": nn.Identity}[norm](channels)


def _apply_norm(norm: nn.Module, states: torch.Tensor, mask: torch.Tensor, update_statistics: bool) -> torch.Tensor:
    if isinstance(norm, MaskedBatchNorm):
        return norm(states, mask, update_statistics)
    return norm(states)


def _sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return _AllReduce.apply(values)
    return values


class _AllReduce(torch.autograd.Function):
    """Sum over the processes; its gradient is the sum of theirs, since each one's loss depends on every summand.

    torch's own with a gradient (torch.distributed.nn) is deprecated, and what is to replace it is private.
    """

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _AllReduce.apply(gradient)
