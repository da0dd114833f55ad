"""expert_matmul: checks, and the choices of backends."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import capability, why_not_interpreted, why_not_triton
from sma_modules.ops.expert_matmul import eager, grouped, reference
from sma_modules.ops.expert_matmul.types import ActivatedSignature, Signature
from sma_modules.ops.feed_forward import ACTIVATE, Activation, activate
from sma_modules.ops.feed_forward.op import activate_signature

GROUPED_MM_FROM = 0
"""From so many multiplications (rows * d_in * d_out) on PyTorch's product is taken where the kernels apply as well."""


def expert_matmul(
    x: Float[Tensor, "rows d_in"],
    weight: Float[Tensor, "experts d_in d_out"],
    counts: Int[Tensor, " experts"],
    ends: Int[Tensor, " experts"] | None = None,
) -> Float[Tensor, "rows d_out"]:
    """Multiply rows that are sorted by expert with their experts' matrices.

    Args:
        x: ``(R, d_in)``: first the rows of expert 0, then those of expert 1, and so on.
        weight: ``(E, d_in, d_out)`` in the dtype of ``x``.
        counts: ``(E,)`` integers, the rows of each expert, R in total. On an accelerator they are not checked (that
            would synchronise with the device): rows beyond the total go to the last expert, counts beyond R end at R.
        ends: ``(E,)`` int32, the running sum of ``counts`` where it is known (``ExpertOrder.ends``).

    Returns:
        ``(R, d_out)`` in the dtype of ``x``, also under autocast. Experts without rows get a zero gradient.

    Raises:
        ShapeError: sizes or dtypes do not fit.

    Example:
        >>> import torch
        >>> x, weight = torch.ones(3, 2), torch.stack([torch.eye(2), 5 * torch.eye(2)])
        >>> expert_matmul(x, weight, torch.tensor([1, 2])).tolist()
        [[1.0, 1.0], [5.0, 5.0], [5.0, 5.0]]
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ShapeError(
            f"expert_matmul: x (R, d_in) and weight (E, d_in, d_out) must agree in d_in and dtype, got {x.dtype} "
            f"{tuple(x.shape)} and {weight.dtype} {tuple(weight.shape)}"
        )
    if tuple(counts.shape) != (weight.shape[0],) or counts.is_floating_point():
        raise ShapeError(
            f"expert_matmul: counts must be {weight.shape[0]} integers, one per expert, got {counts.dtype} "
            f"{tuple(counts.shape)}"
        )
    if ends is not None and (ends.shape != counts.shape or ends.dtype != torch.int32):
        raise ShapeError(
            f"expert_matmul: ends must be int32 of shape {tuple(counts.shape)}, got {ends.dtype} {tuple(ends.shape)}"
        )
    readable = counts.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and (int(counts.sum()) != x.shape[0] or bool((counts < 0).any())):
        raise ShapeError(
            f"expert_matmul: counts must be 0 or more and add up to the {x.shape[0]} rows of x, got {counts.tolist()}"
        )
    return OP.run(_signature(x, weight, counts, ends), x, weight, counts, ends)  # type: ignore[no-any-return]


def activated_expert_matmul(
    up: Float[Tensor, "rows hidden"],
    gate: Float[Tensor, "rows hidden"] | None,
    activation: Activation,
    weight: Float[Tensor, "experts hidden d_out"],
    counts: Int[Tensor, " experts"],
    ends: Int[Tensor, " experts"] | None = None,
) -> Float[Tensor, "rows d_out"]:
    """``expert_matmul(activate(up, gate, activation), weight, counts, ends)``, without keeping what is in between.

    Args:
        up: ``(R, d)``, see :func:`~sma_modules.ops.feed_forward.activate`.
        gate: ``(R, d)`` or None.
        activation: "relu", "gelu" or "silu".
        weight: ``(E, d, d_out)``, see :func:`expert_matmul`.
        counts: ``(E,)`` integers, the rows of each expert.
        ends: ``(E,)`` int32, the running sum of ``counts`` where it is known.

    Returns:
        ``(R, d_out)`` in the dtype of ``up``.
    """
    signature = _activated_signature(up, gate, activation, weight, counts, ends)
    return ACTIVATED.run(signature, up, gate, activation, weight, counts, ends)  # type: ignore[no-any-return]


def _signature(x: Tensor, weight: Tensor, counts: Tensor, ends: Tensor | None = None) -> Signature:
    (rows, d_in), d_out = x.shape, weight.shape[2]
    return Signature(
        x.device,
        x.dtype,
        d_in * d_out > 0 and d_in % grouped.ALIGNMENT == 0 and d_out % grouped.ALIGNMENT == 0,
        rows == 0,
        rows >= 2**31,
        d_in * d_out >= 2**31,
        rows * d_in * d_out < GROUPED_MM_FROM,
    )


def _activated_signature(
    up: Tensor, gate: Tensor | None, activation: str, weight: Tensor, counts: Tensor, ends: Tensor | None = None
) -> ActivatedSignature:
    return ActivatedSignature(up.device, activate_signature(up, gate, activation), _signature(up, weight, counts, ends))


def _why_not_grouped_mm(signature: Signature) -> str | None:
    device = signature.device
    if signature.dtype != torch.bfloat16:
        return f"grouped_mm multiplies bfloat16 without synchronising with the device, got {signature.dtype}"
    if device.type != "cuda" or torch.version.hip is not None or capability(device.index or 0)[0] != 9:
        return f"grouped_mm synchronises with every device but CUDA ones of capability 9.x, got {device}"
    if not signature.aligned:
        return f"grouped_mm needs widths in multiples of {grouped.ALIGNMENT}"
    if signature.empty:
        return "grouped_mm needs at least one row"
    return None


def _why_not_triton(signature: Signature) -> str | None:
    if signature.many_rows:
        return "the kernel takes fewer than 2^31 rows"
    if signature.large:
        return "the kernel takes matrices of fewer than 2^31 entries"
    return why_not_triton(signature.device, signature.dtype)


def _why_grouped_mm_is_not_worth_it(signature: Signature) -> str | None:
    if signature.few_products:
        return f"the Triton kernels are faster below {GROUPED_MM_FROM} multiplications"
    return None


OP = Op("expert_matmul", _signature)
OP.register(
    "grouped_mm",
    grouped.expert_matmul,
    priority=5,
    applies=_why_not_grouped_mm,
    pays=_why_grouped_mm_is_not_worth_it,
)
OP.register(
    "triton",
    lazy("sma_modules.ops.expert_matmul.launch", "expert_matmul"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
)
OP.register("eager", eager.expert_matmul)
OP.register("reference", reference.expert_matmul, priority=90)


def _one_after_the_other(
    up: Tensor, gate: Tensor | None, activation: Activation, weight: Tensor, counts: Tensor, ends: Tensor | None = None
) -> Tensor:
    """Each operation by its own backend: small activations may be eager while the product is a kernel."""
    return expert_matmul(activate(up, gate, activation), weight, counts, ends)


def _why_not_fused_grouped_mm(signature: ActivatedSignature) -> str | None:
    return ACTIVATE.backends["triton"].applies(signature.activation) or _why_not_grouped_mm(signature.product)


def _why_not_fused_triton(signature: ActivatedSignature) -> str | None:
    return ACTIVATE.backends["triton"].applies(signature.activation) or _why_not_triton(signature.product)


def _why_fused_grouped_mm_is_not_worth_it(signature: ActivatedSignature) -> str | None:
    small = ACTIVATE.backends["triton"].pays(signature.activation)
    return small or _why_grouped_mm_is_not_worth_it(signature.product)


def _why_not_fused_worth_it(signature: ActivatedSignature) -> str | None:
    return ACTIVATE.backends["triton"].pays(signature.activation)


ACTIVATED = Op("activated_expert_matmul", _activated_signature)
ACTIVATED.register(
    "grouped_mm",
    lazy("sma_modules.ops.expert_matmul.activated", "by_grouped_mm"),
    priority=5,
    applies=_why_not_fused_grouped_mm,
    pays=_why_fused_grouped_mm_is_not_worth_it,
)
ACTIVATED.register(
    "triton",
    lazy("sma_modules.ops.expert_matmul.activated", "by_kernels"),
    priority=10,
    applies=_why_not_fused_triton,
    pays=_why_not_fused_worth_it,
)
ACTIVATED.register("eager", _one_after_the_other)
ACTIVATED.register("reference", _one_after_the_other, priority=90)
