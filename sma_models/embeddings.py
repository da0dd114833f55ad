"""From tokens, values and positions to features."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from sma.ops.embedding import embedding
from sma.runtime.onednn import linear
from sma.runtime.plain import unwrapped


class TokenEmbedding(nn.Embedding):
    """``nn.Embedding`` by :func:`sma.ops.embedding.embedding`."""

    def forward(self, input: Tensor, scale: float = 1.0, rounded: bool = True) -> Tensor:
        """``(B, L)`` to ``(B, L, D)``, times ``scale``; unless ``rounded`` is False, in the dtype of autocast.

        Of features ``(..., D)`` it gives logits ``(..., V)``, for a head that is tied to a weight that exists only
        while the embedding is called.
        """
        if input.is_floating_point():
            return linear(input, self.weight)
        device = input.device.type
        narrow = rounded and torch.is_autocast_enabled(device)
        return embedding(input, self.weight, scale=scale, dtype=torch.get_autocast_dtype(device) if narrow else None)


class ValueEmbedding(nn.Module):
    """``x_t * w + b`` for a real number ``x_t``: pixels, samples of sound. ``w`` ~ N(0, 1), ``b`` ~ N(0, 0.1)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_model))
        self.bias = nn.Parameter(torch.randn(d_model) * 0.1)

    def forward(self, values: Tensor) -> Tensor:
        """``(B, L)`` to ``(B, L, D)``."""
        return values.to(self.weight.dtype).unsqueeze(-1) * self.weight + self.bias


def embedded(table: nn.Module, tokens: Tensor, scale: float = 1.0, rounded: bool = True) -> Tensor:
    """Tokens by our table, wrapped or not, or by its replacement."""
    if isinstance(unwrapped(table), TokenEmbedding):
        return table(tokens, scale, rounded)  # type: ignore[no-any-return]
    return table(tokens.long()) * scale  # type: ignore[no-any-return]


def like_of(table: nn.Module) -> Tensor:
    """``(0,)`` in the dtype and on the device of the features of an embedding, whatever its weight is."""
    weight = getattr(table, "weight", None)
    if not isinstance(weight, Tensor):
        weight = next(chain(table.parameters(), table.buffers()), torch.empty(0))
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    return torch.empty(0, dtype=dtype, device=weight.device)


class SinusoidalPositions(nn.Module):
    """Sines and cosines of the position, theta 10000, times a learned scale that starts at ``d_model ** -0.5``."""

    frequency: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), d_model**-0.5))
        self.register_buffer("frequency", 10000.0 ** (-torch.arange(0, d_model, 2).float() / d_model), persistent=False)

    def forward(self, position: Tensor) -> Tensor:
        """``(B, L)`` positions to ``(B, L, D)``."""
        angle = position.unsqueeze(-1) * self.frequency
        return torch.cat([angle.sin(), angle.cos()], -1)[..., : 2 * self.frequency.numel()] * self.scale
