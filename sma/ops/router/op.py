"""router: public functions, checks, and registration of the backends."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy, without_autocast
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma.ops.narrow_linear import WIDEST
from sma.ops.router import eager, reference
from sma.ops.router.types import Compressor, Gate, Routed, Signature


def router(
    x: Float[Tensor, "batch length d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"],
    gate: Gate,
    *,
    valid: Bool[Tensor, "batch length"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> Routed:
    """Logits ``x W^T + b``, their scores, and which tokens are active.

    Like :func:`~sma.ops.narrow_linear.narrow_linear`, which it continues, it passes ``x`` on. The returned ``x`` must
    go into one function only, whose gradient is a tensor of its own: the gradient of the scores is added to that in
    place. README.md derives the gradient.

    Args:
        x: ``(B, L, D)``; padding may hold anything, also NaN.
        weight: ``(M, D)``, or ``(2 M, D)`` with the logits {inactive, active} of each module beside each other.
        bias: ``(M,)`` or ``(2 M,)``.
        gate: what a logit means.
        valid: ``(B, L)`` real tokens.
        lengths: ``(B,)`` in place of ``valid`` where all padding is on the right. With neither, all tokens are real.

    Raises:
        ShapeError: the sizes do not fit, or both ``valid`` and ``lengths`` are given.

    Example:
        >>> gate = Gate(balance=torch.zeros(1))
        >>> routed = router(torch.tensor([[[3.0], [-3.0]]]), torch.ones(1, 1), torch.zeros(1), gate)
        >>> routed.active.flatten().tolist()
        [True, False]
    """
    signature = _signature(x, weight, bias, gate, valid, lengths)
    routed: Routed = OP.run(signature, x, weight, bias, gate, valid, lengths)
    return routed


def routed_compress(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Gate,
    *,
    valid: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Routed, Compressor | None]:
    """:func:`router`, and what compresses the tokens once they are packed, if the two can share a backward pass.

    They can on the kernels: the gradient of ``x`` is written once, not spread first and added to by the router. The
    returned ``x`` and score have no gradient until the compressor returns them anew; that ``x`` is under the
    conditions of :func:`router`. Without a compressor everything is as :func:`router` returns it.
    """
    signature = _signature(x, weight, bias, gate, valid, lengths)
    shared = OP.chosen(signature).capabilities.get("shares_gradient")
    if shared is None or torch.compiler.is_compiling():
        return OP.run(signature, x, weight, bias, gate, valid, lengths), None
    with without_autocast(x.device):
        return shared(x, weight, bias, gate, valid, lengths)  # type: ignore[no-any-return]


def _signature(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Gate, valid: Tensor | None, lengths: Tensor | None
) -> Signature:
    modules = gate.balance.numel()
    if x.dim() != 3 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ShapeError(
            "router: x (B, L, D), weight (C, D) and bias (C,) must agree, "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if weight.shape[0] not in (modules, 2 * modules):
        raise ShapeError(
            f"router: weight must have one or two rows for each of {modules} modules, got {weight.shape[0]}"
        )
    if valid is not None and lengths is not None:
        raise ShapeError("router: lengths must not be given together with valid")
    for name, value, shape in (("valid", valid, x.shape[:2]), ("lengths", lengths, x.shape[:1])):
        if value is not None and value.shape != shape:
            raise ShapeError(f"router: {name} must be {tuple(shape)}, got {tuple(value.shape)}")
    learned = None if gate.log_temperature is None else gate.log_temperature.dtype
    dtypes = (x.dtype, weight.dtype, gate.balance.dtype, learned)
    return Signature(x.device, dtypes, weight.shape[0], x.numel() == 0 or weight.numel() == 0)


def _why_not_triton(signature: Signature) -> str | None:
    if signature.logits > WIDEST:
        return f"the kernel has at most {WIDEST} logits, got {signature.logits}"
    if signature.empty:
        return "there is nothing to compute"
    return why_not_triton(signature.device, *signature.dtypes)


OP = Op("router", _signature)
"""Capability ``shares_gradient``: :func:`routed_compress` with a compressor."""
OP.register(
    "triton",
    lazy("sma.ops.router.launch", "router"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
    capabilities={"shares_gradient": lazy("sma.ops.router.launch", "routed_compress")},
)
OP.register("eager", eager.router)
OP.register("reference", reference.router, priority=90)
