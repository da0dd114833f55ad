"""A short convolution over the activated tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sma
from sma.errors import ShapeError, StreamingError


@dataclass(frozen=True)
class ShortConvState(sma.State):
    """``tokens (B, kernel - 1, D)``: the last activated tokens of each sequence, newest last; zeros where none was."""

    tokens: Tensor


class ShortConv(sma.Module):
    """``y_k = W SiLU(b + sum_j w_j * x_{k-j})``, j = 0..kernel-1, over the activated tokens of a sequence.

    Every feature has a filter of its own (a depthwise convolution). Two activated tokens are neighbours however far
    apart they are in the input, so a few taps see far. It looks back only, in bidirectional models too.

    Example:
        >>> conv = ShortConv.Config(kernel=2).build(d_model=8)
        >>> packed = sma.Packed.from_mask(torch.tensor([[True, False, True]]))
        >>> conv(torch.randn(2, 8), packed).output.shape
        torch.Size([2, 8])
    """

    layout = "packed"

    @dataclass(kw_only=True, frozen=True)
    class Config(sma.Module.Config):
        """Options.

        Attributes:
            kernel: number of taps.
        """

        kernel: int = 4

        def __post_init__(self) -> None:
            self.require(self.kernel >= 1, "kernel", "must be at least 1")

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        self.kernel = config.kernel
        self.weight = nn.Parameter(torch.randn(config.kernel, d_model) * config.kernel**-0.5)
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.out = nn.Linear(d_model, d_model)

    def initial_state(self, batch: int, like: Tensor) -> ShortConvState:
        """Nothing seen yet."""
        return ShortConvState(like.new_zeros(batch, self.kernel - 1, self.d_model))

    def forward(self, x: Tensor, packed: sma.Packed, state: sma.State | None = None) -> sma.ModuleOutput:
        """One chunk of activated tokens.

        Args:
            x: ``(K, D)``.
            packed: where they come from.
            state: what :meth:`forward` returned for the chunk before; None at the start.

        Returns:
            ``(K, D)`` and the state after the chunk.

        Raises:
            ShapeError: ``x`` is not ``(K, D)``.
            StreamingError: the state is that of another module or batch.
        """
        if x.shape != (packed.index.numel(), self.d_model):
            raise ShapeError(f"ShortConv: x must be {(packed.index.numel(), self.d_model)}, got {tuple(x.shape)}")
        before = self.initial_state(packed.batch, x) if state is None else state
        taps = self.kernel - 1
        if not isinstance(before, ShortConvState) or before.tokens.shape != (packed.batch, taps, self.d_model):
            raise StreamingError(f"ShortConv: a state for a batch of {packed.batch} is needed, got {before!r:.80}")

        # One row for every token there is: those of this chunk, then the remembered ones, sequence by sequence.
        rows = torch.cat([x, before.tokens.reshape(-1, self.d_model).to(x.dtype)])
        back = torch.arange(self.kernel, device=x.device)
        here = torch.arange(x.shape[0], device=x.device)[:, None] - back
        there = x.shape[0] + (packed.sequence * taps + taps + packed.rank)[:, None] - back
        window = rows[torch.where(packed.rank[:, None] >= back, here, there)]  # (K, kernel, D), the newest first
        y = self.out(F.silu((window * self.weight).sum(1) + self.bias))

        back = taps - torch.arange(taps, device=x.device)  # how far behind the end of the chunk each slot lies
        lengths, sequence = packed.lengths[:, None], torch.arange(packed.batch, device=x.device)[:, None]
        here = packed.cu_seqlens[1:, None] - back
        there = x.shape[0] + sequence * taps + taps + lengths - back
        return sma.ModuleOutput(y, ShortConvState(rows[torch.where(lengths >= back, here, there)]))
