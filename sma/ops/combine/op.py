"""combine: all that follows a sparse module in one pass: extract, confidence, skip, residual, activation, norm."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sma.errors import ConfigError, ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.combine import eager, reference
from sma.ops.combine.types import Activation, Finish, Signature, Terms
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma.ops.packed import Packed
from sma.ops.row_norm import WIDEST, RowNorm


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
    terms, finish = Terms(weight, skip, skip_bias, residual), Finish(activation, norm, dropout, drop_sum)
    out: Tensor = OP.run(_signature(h, packed, terms, finish), h, packed, terms, finish)
    return out


def _signature(h: Tensor, packed: Packed, terms: Terms, finish: Finish) -> Signature:
    if finish.activation not in ("none", "silu"):
        raise ConfigError(f"combine: activation must be 'none' or 'silu', got {finish.activation!r}")
    if not 0 <= finish.dropout < 1:
        raise ConfigError(f"combine: dropout must be in [0, 1), got {finish.dropout}")
    rows = packed.index.numel()
    if h.dim() != 2 or h.shape[0] != rows:
        raise ShapeError(f"combine: h must be ({rows}, D), one row per active token, got {tuple(h.shape)}")
    width, dtypes = h.shape[1], [h.dtype]
    expected = (*packed.shape, width)
    for name, value, shape in zip(terms._fields, terms, (packed.shape, expected, (width,), expected), strict=True):
        if value is None:
            continue
        if tuple(value.shape) != shape:
            raise ShapeError(f"combine: {name} must be {shape}, got {tuple(value.shape)}")
        if name != "skip_bias":
            dtypes.append(value.dtype)
    return Signature(h.device, tuple(dtypes), width, packed.row.numel() == 0 or width == 0)


def _why_not_triton(signature: Signature) -> str | None:
    if signature.width > WIDEST:
        return f"the kernel takes at most {WIDEST} features, got {signature.width}"
    if signature.empty:
        return "there is nothing to compute"
    return why_not_triton(signature.device, *signature.dtypes)


OP = Op("combine", _signature)
OP.register(
    "triton",
    lazy("sma.ops.combine.launch", "combine"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
)
OP.register("eager", eager.combine)
OP.register("reference", reference.combine, priority=90)
