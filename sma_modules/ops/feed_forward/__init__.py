"""The feed-forward network on packed tokens, and its activation alone (for experts, whose products are grouped).

The products stay PyTorch's; what lies between them is one kernel forward and one backward, and only what the first
products gave is kept for the backward pass (README.md).
"""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from sma.errors import ConfigError, ShapeError
from sma.ops.backend import Op, without_autocast
from sma_modules.ops.feed_forward.weights import Linear

__all__ = ["ACTIVATE", "FEED_FORWARD", "Activation", "Linear", "activate", "feed_forward"]

Activation = Literal["relu", "gelu", "silu"]

ACTIVATIONS = get_args(Activation)
ACTIVATE = Op("activate")
FEED_FORWARD = Op("feed_forward")


def activate(
    up: Float[Tensor, "rows d"], gate: Float[Tensor, "rows d"] | None, activation: Activation
) -> Float[Tensor, "rows d"]:
    """``act(up)``, or gated ``act(gate) * up`` (GLU variants: Shazeer, arXiv 2002.05202), in the dtype of ``up``.

    Args:
        up: ``(R, d)``.
        gate: ``(R, d)`` or None.
        activation: "relu", "gelu" (with the error function) or "silu".

    Raises:
        ConfigError: no such activation.
        ShapeError: ``gate`` is not like ``up``.

    Example:
        >>> import torch
        >>> activate(torch.tensor([[-1.0, 2.0]]), torch.tensor([[3.0, 3.0]]), "relu")
        tensor([[-3.,  6.]])
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activate: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if gate is not None and (gate.shape != up.shape or gate.dtype != up.dtype):
        raise ShapeError(
            f"activate: gate must be like up, {up.dtype} {tuple(up.shape)}, got {gate.dtype} {tuple(gate.shape)}"
        )
    with without_autocast(up.device):
        out: Tensor = ACTIVATE(up, gate, activation)
    return out


def feed_forward(
    x: Float[Tensor, "rows d_in"], up: Linear, gate: Linear | None, down: Linear, activation: Activation
) -> Float[Tensor, "rows d_out"]:
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))``.

    Args:
        x: ``(K, d_in)``.
        up: weight ``(d_hidden, d_in)`` and bias, as in ``nn.Linear``.
        gate: the same, or None.
        down: weight ``(d_out, d_hidden)`` and bias.
        activation: "relu", "gelu" (with the error function) or "silu".

    Raises:
        ConfigError: no such activation.
        ShapeError: sizes do not fit.

    Example:
        >>> import torch
        >>> feed_forward(torch.ones(1, 2), Linear(torch.eye(2)), None, Linear(torch.ones(1, 2)), "relu")
        tensor([[2.]])
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"feed_forward: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    hidden, d_in = up.weight.shape
    if x.dim() != 2 or x.shape[1] != d_in or down.weight.shape[1] != hidden:
        raise ShapeError(
            f"feed_forward: x (K, d_in), up (d_hidden, d_in) and down (d_out, d_hidden) must agree, got "
            f"{tuple(x.shape)}, {tuple(up.weight.shape)} and {tuple(down.weight.shape)}"
        )
    if gate is not None and gate.weight.shape != up.weight.shape:
        raise ShapeError(
            f"feed_forward: gate must be like up, {tuple(up.weight.shape)}, got {tuple(gate.weight.shape)}"
        )
    out: Tensor = FEED_FORWARD(x, *up, *(gate or (None, None)), *down, activation)
    return out


from sma_modules.ops.feed_forward import eager, fused, reference  # noqa: E402,F401  (registers the backends)
