"""FFN: the position-wise feed-forward network, plain or gated (GLU variants: Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sma.dropout import Dropout
from sma.interfaces import Module
from sma.runtime.plain import DROPOUTS, is_plain
from sma_modules.ops.feed_forward import Activation, Linear, feed_forward
from sma_modules.ops.feed_forward.eager import ACTIVATIONS

__all__ = ["ACTIVATIONS", "FFN", "Activation", "compute_dtype"]


class FFN(Module):
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))``: SwiGLU with ``silu``, GEGLU with ``gelu``.

    Example:
        >>> import torch
        >>> ffn = FFN.Config(d_hidden=32, gated=True, activation="silu").build(d_model=8)
        >>> ffn(torch.randn(5, 8)).shape
        torch.Size([5, 8])
    """

    layout = "tokens"

    @dataclass(kw_only=True, frozen=True)
    class Config(Module.Config):
        """Options.

        Attributes:
            d_hidden: hidden width; None for 4 * d_model.
            activation: nonlinearity of the hidden layer, of the gate when gated.
            gated: multiply the hidden layer by a second, activated projection.
            bias: biases on all projections.
            dropout: probability with which hidden values are dropped in training.
        """

        d_hidden: int | None = None
        activation: Activation = "gelu"
        gated: bool = False
        bias: bool = True
        dropout: float = 0.0

        def __post_init__(self) -> None:
            self.require(self.d_hidden is None or self.d_hidden >= 1, "d_hidden", "must be None or at least 1")
            self.require(self.activation in ACTIVATIONS, "activation", f"must be one of {', '.join(ACTIVATIONS)}")
            self.require(0.0 <= self.dropout < 1.0, "dropout", "must be in [0, 1)")

    config: Config

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        d_hidden = 4 * d_model if config.d_hidden is None else config.d_hidden
        self.act = ACTIVATIONS[config.activation]
        self.up = nn.Linear(d_model, d_hidden, bias=config.bias)
        self.gate = nn.Linear(d_model, d_hidden, bias=config.bias) if config.gated else None
        self.down = nn.Linear(d_hidden, d_model, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``x (K, D)``, or any leading shape, to the same shape."""
        up, gate, down = self.up, self.gate, self.down
        plain = (
            is_plain(up) and is_plain(down) and (gate is None or is_plain(gate)) and is_plain(self.dropout, DROPOUTS)
        )
        if plain and not (self.training and self.dropout.p):
            dtype = compute_dtype(x)
            rows = x.to(dtype) if x.dim() == 2 else x.to(dtype).reshape(-1, x.shape[-1])
            gated = None if gate is None else _weights(gate, dtype)
            y = feed_forward(rows, _weights(up, dtype), gated, _weights(down, dtype), self.config.activation)
            return y if x.dim() == 2 else y.reshape(x.shape)
        hidden = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        out: Tensor = self.down(self.dropout(hidden))
        return out


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``x`` is computed: that of autocast where it is on."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _weights(linear: nn.Linear, dtype: torch.dtype) -> Linear:
    """The weights, in the dtype of autocast where it is on."""
    weight, bias = linear.weight, linear.bias
    if weight.dtype != dtype and torch.is_autocast_enabled(weight.device.type):
        return Linear(weight.to(dtype), None if bias is None else bias.to(dtype))
    return Linear(weight, bias)
