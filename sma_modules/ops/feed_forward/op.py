"""feed_forward: checks, and the choices of backends."""

from __future__ import annotations

from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sma.errors import ConfigError, ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma_modules.ops.feed_forward import eager, reference
from sma_modules.ops.feed_forward.types import ActivateSignature, Activation, Network, NetworkSignature, Projection

ACTIVATIONS = get_args(Activation)
MIN_HIDDEN = 1 << 20
"""Below so many hidden values a call takes as long as its launches, of which eager operations need fewer in Python."""


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
    return ACTIVATE.run(activate_signature(up, gate, activation), up, gate, activation)  # type: ignore[no-any-return]


def feed_forward(
    x: Float[Tensor, "rows d_in"], up: Projection, gate: Projection | None, down: Projection, activation: Activation
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
        >>> feed_forward(torch.ones(1, 2), Projection(torch.eye(2)), None, Projection(torch.ones(1, 2)), "relu")
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
    network = Network(up, gate, down, activation)
    return FEED_FORWARD.chosen(_network_signature(x, network)).run(x, network)  # type: ignore[no-any-return]


def activate_signature(up: Tensor, gate: Tensor | None, activation: str) -> ActivateSignature:
    """What the choice of a backend for :func:`activate` depends on."""
    return ActivateSignature(up.device, up.dtype, up.numel() < MIN_HIDDEN)


def _network_signature(x: Tensor, network: Network) -> NetworkSignature:
    up, gate, down, _ = network
    weights = [up.weight.dtype, down.weight.dtype]
    for bias in (up.bias, down.bias):
        if bias is not None:
            weights.append(bias.dtype)
    if gate is not None:
        weights.append(gate.weight.dtype)
        if gate.bias is not None:
            weights.append(gate.bias.dtype)
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return NetworkSignature(x.device, x.dtype, tuple(weights), autocast, x.shape[0] * up.weight.shape[0] < MIN_HIDDEN)


def _why_not_activated(signature: ActivateSignature) -> str | None:
    return why_not_triton(signature.device, signature.dtype)


def _why_not_fused(signature: NetworkSignature) -> str | None:
    reason = why_not_triton(signature.device, signature.dtype)
    if reason is not None:
        return reason
    if set(signature.weights) != {signature.dtype}:
        others = ", ".join(sorted(map(str, set(signature.weights))))
        return f"the kernels want one dtype, got {signature.dtype} and {others}"
    if signature.autocast not in (None, signature.dtype):
        return f"autocast would change the dtype from {signature.dtype} on the way"
    return None


def _why_not_worth_it(signature: ActivateSignature | NetworkSignature) -> str | None:
    if signature.small:
        return f"the eager operations are faster below {MIN_HIDDEN} hidden values"
    return why_not_interpreted(signature)


_LAUNCH = "sma_modules.ops.feed_forward.launch"
ACTIVATE = Op("activate", activate_signature)
ACTIVATE.register("triton", lazy(_LAUNCH, "activate"), priority=10, applies=_why_not_activated, pays=_why_not_worth_it)
ACTIVATE.register("eager", eager.activate)
ACTIVATE.register("reference", reference.activate, priority=90)
FEED_FORWARD = Op("feed_forward", _network_signature)
FEED_FORWARD.register(
    "triton", lazy(_LAUNCH, "feed_forward"), priority=10, applies=_why_not_fused, pays=_why_not_worth_it
)
FEED_FORWARD.register("eager", eager.feed_forward)
FEED_FORWARD.register("reference", reference.feed_forward, priority=90)
