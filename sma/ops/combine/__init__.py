"""combine: all that follows a sparse module in one pass: extract, confidence, skip, residual, activation, norm."""

from __future__ import annotations

from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from sma.errors import ConfigError, ShapeError
from sma.ops.backend import Op, without_autocast
from sma.ops.kernel import why_not_triton
from sma.ops.packed import Packed
from sma.ops.row_norm import WIDEST, RowNorm

OP = Op("combine")
Activation = Literal["none", "silu"]


class Plan(NamedTuple):
    """What combine does, known on the host.

    Attributes:
        activation: after the residual was added.
        dropout: probability.
        drop_sum: drop out module and skip together, not the module alone.
    """

    activation: Activation
    dropout: float
    drop_sum: bool


def combine(
    h: Float[Tensor, "active dim"],
    packed: Packed,
    *,
    weight: Float[Tensor, "batch length"] | None = None,
    skip: Float[Tensor, "batch length dim"] | None = None,
    skip_bias: Float[Tensor, " dim"] | None = None,
    residual: Float[Tensor, "batch length dim"] | None = None,
    activation: Activation = "none",
    norm: RowNorm | None = None,
    dropout: float = 0.0,
    drop_sum: bool = False,
) -> Float[Tensor, "batch length dim"]:
    """``norm(act(skip + dropout(weight * extract(h)) + residual))``; ``drop_sum`` puts the dropout around the skip too.

    Args:
        h: ``(K, D)`` output of the module, one row per active token.
        packed: where the rows came from.
        weight: ``(B, L)`` confidence, read at active tokens; None means 1.
        skip: ``(B, L, D)`` or None.
        skip_bias: ``(D,)``, added to the skip of every token; None means 0. A linear layer in front can leave its own
            bias to this: the gradient is summed on the way.
        residual: ``(B, L, D)`` or None.
        activation: "none" or "silu".
        norm: normalisation over the features, or None.
        dropout: probability; those kept are scaled up. 0 in evaluation. (The kernel rounds it to a multiple of 2^-16.)
        drop_sum: what is dropped out.

    Returns:
        ``(B, L, D)`` in the dtype of ``residual``, or else ``skip``, or else ``h``.

    Raises:
        ShapeError: sizes do not fit.
        ConfigError: an option is out of range.

    Example:
        >>> import torch
        >>> packed = Packed.from_mask(torch.tensor([[False, True]]))
        >>> combine(torch.ones(1, 2), packed, weight=torch.tensor([[0.5, 0.5]]))
        tensor([[[0.0000, 0.0000],
                 [0.5000, 0.5000]]])
    """
    if activation not in ("none", "silu"):
        raise ConfigError(f"combine: activation must be 'none' or 'silu', got {activation!r}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"combine: dropout must be in [0, 1), got {dropout}")
    if h.dim() != 2 or h.shape[0] != packed.index.numel():
        raise ShapeError(
            f"combine: h must be ({packed.index.numel()}, D), one row per active token, got {tuple(h.shape)}"
        )
    expected = (*packed.shape, h.shape[1])
    for name, value, shape in (
        ("weight", weight, packed.shape),
        ("skip", skip, expected),
        ("skip_bias", skip_bias, expected[2:]),
        ("residual", residual, expected),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise ShapeError(f"combine: {name} must be {shape}, got {tuple(value.shape)}")
    with without_autocast(h.device):
        out: Tensor = OP(h, packed, weight, skip, skip_bias, residual, norm, Plan(activation, dropout, drop_sum))
    return out


def leading(h: Tensor, skip: Tensor | None, residual: Tensor | None) -> Tensor:
    """The tensor whose dtype the result has."""
    return residual if residual is not None else skip if skip is not None else h


def _why_not(
    h: Tensor,
    packed: Packed,
    weight: Tensor | None,
    skip: Tensor | None,
    skip_bias: Tensor | None,
    residual: Tensor | None,
    norm: RowNorm | None,
    plan: Plan,
) -> str | None:
    if h.shape[1] > WIDEST:
        return f"the kernel takes at most {WIDEST} features, got {h.shape[1]}"
    if packed.row.numel() == 0 or h.shape[1] == 0:
        return "there is nothing to compute"
    for value in (h, weight, skip, residual):
        reason = None if value is None else why_not_triton(value)
        if reason is not None:
            return reason
    return None


@OP.backend("triton", priority=10, applies=_why_not)
def _triton(
    h: Tensor,
    packed: Packed,
    weight: Tensor | None,
    skip: Tensor | None,
    skip_bias: Tensor | None,
    residual: Tensor | None,
    norm: RowNorm | None,
    plan: Plan,
) -> Tensor:
    from sma.ops.combine.triton_kernel import combine as run

    return run(h, packed, weight, skip, skip_bias, residual, norm, plan)


from sma.ops.combine import eager, reference  # noqa: E402,F401  (registers the backends)
