"""The norms that the recipes name: over features (layer, rms, scale) and over tokens (batch, synchronised batch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sma.errors import ShapeError
from sma.interfaces import Norm
from sma.ops.row_norm import RowNorm, row_norm


class _FeatureNorm(Norm):
    """Common options of the norms that look at one token at a time."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Norm.Config):
        """Options.

        Attributes:
            eps: added to the variance or mean square.
            affine: learn a scale (and for layernorm a shift).
        """

        eps: float = 1e-5
        affine: bool = True

        def __post_init__(self) -> None:
            self.require(self.eps > 0, "eps", "must be positive")

    config: Config
    centred: ClassVar[bool] = False
    shifted: ClassVar[bool] = False
    single_weight: ClassVar[bool] = False

    def __init__(self, config: Config, *, d_model: int) -> None:
        super().__init__(config, d_model=d_model)
        size = 1 if self.single_weight else d_model
        self.weight = nn.Parameter(torch.ones(size)) if config.affine else None
        self.bias = nn.Parameter(torch.zeros(d_model)) if config.affine and self.shifted else None

    def row_norm(self) -> RowNorm:
        return RowNorm(self.centred, self.config.eps, self.weight, self.bias)

    def forward(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """``(B, L, D)`` to the same shape and dtype; ``lengths`` makes no difference."""
        if x.shape[-1:] != (self.d_model,):
            raise ShapeError(f"{type(self).__name__}: x must have {self.d_model} features, got {tuple(x.shape)}")
        return row_norm(x, self.row_norm())


class LayerNorm(_FeatureNorm):
    """Mean 0 and variance 1 over each token's features, then scale ``weight`` and shift ``bias`` (arXiv 1607.06450)."""

    centred = shifted = True


class RMSNorm(_FeatureNorm):
    """Mean square 1 over each token's features, then scale ``weight`` (arXiv 1910.07467)."""


class ScaleNorm(_FeatureNorm):
    """``weight * x / sqrt(mean(x^2) + eps)`` with a single learned number ``weight (1,)`` (arXiv 1910.05895)."""

    single_weight = True


class BatchNorm(Norm):
    """Mean 0 and variance 1 of each feature over the real tokens of the batch (arXiv 1502.03167).

    In training the statistics are those of the batch, and running averages of them are kept for evaluation, as in
    torch. Fewer than two real tokens have no variance: then the running averages are used, and left as they are.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    @dataclass(kw_only=True, frozen=True)
    class Config(Norm.Config):
        """Options.

        Attributes:
            eps: added to the variance.
            affine: learn a scale and a shift per feature.
            momentum: weight of the newest batch in the running averages.
        """

        eps: float = 1e-5
        affine: bool = True
        momentum: float = 0.1

        def __post_init__(self) -> None:
            self.require(self.eps > 0, "eps", "must be positive")
            self.require(0 < self.momentum <= 1, "momentum", "must be in (0, 1]")

    config: Config

    def __init__(self, config: Config, *, d_model: int) -> None:
        super().__init__(config, d_model=d_model)
        self.weight = nn.Parameter(torch.ones(d_model)) if config.affine else None
        self.bias = nn.Parameter(torch.zeros(d_model)) if config.affine else None
        self.register_buffer("running_mean", torch.zeros(d_model))
        self.register_buffer("running_var", torch.ones(d_model))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """``x (B, L, D)``, right-padded, ``lengths (B,)`` real tokens per row, to the same shape."""
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ShapeError(f"{type(self).__name__}: x must be (B, L, {self.d_model}), got {tuple(x.shape)}")
        tokens = x.flatten(0, 1)
        if not self.training:
            return self._by_running(tokens).reshape(x.shape)
        if lengths is None:
            return self._by_batch(tokens).reshape(x.shape)
        real = (torch.arange(x.shape[1], device=x.device) < lengths[:, None]).flatten().nonzero().squeeze(1)
        normalised = self._by_batch(tokens.index_select(0, real))
        return torch.zeros_like(tokens).index_copy(0, real, normalised).reshape(x.shape)

    def _by_running(self, tokens: Tensor) -> Tensor:
        return F.batch_norm(
            tokens, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.config.eps
        )

    def _by_batch(self, tokens: Tensor) -> Tensor:
        """Normalise ``tokens (K, D)`` by their own statistics and keep these."""
        if tokens.shape[0] < 2:
            return self._by_running(tokens)
        self.num_batches_tracked += 1
        return F.batch_norm(
            tokens,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=True,
            momentum=self.config.momentum,
            eps=self.config.eps,
        )


class SyncBatchNorm(BatchNorm):
    """Batch norm with the statistics of the real tokens of all ranks; without a process group plain batch norm."""

    def _by_batch(self, tokens: Tensor) -> Tensor:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return super()._by_batch(tokens)
        wide = tokens.double() if tokens.dtype == torch.float64 else tokens.float()
        # A rank without tokens takes part too, as the others wait for its sums.
        total = _sum_over_ranks(torch.cat([wide.sum(0), wide.new_tensor([wide.shape[0]])]))
        count = total[-1].detach()
        if count < 2:
            return self._by_running(tokens)
        mean = total[:-1] / count
        centred = wide - mean
        variance = _sum_over_ranks(centred.square().sum(0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.config.momentum)
            unbiased = variance * count / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.config.momentum)
        out: Tensor = centred * torch.rsqrt(variance + self.config.eps)
        if self.weight is not None and self.bias is not None:
            out = out * self.weight + self.bias
        return out.to(tokens.dtype)


def _sum_over_ranks(value: Tensor) -> Tensor:
    total: Tensor = _AllSum.apply(value)  # type: ignore[no-untyped-call]
    return total


class _AllSum(torch.autograd.Function):
    """Sum over the ranks. Every rank's loss depends on every rank's term, so the gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad
