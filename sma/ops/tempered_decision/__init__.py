"""tempered_decision: logits, tempered softmax and threshold in one pass: who is active in a step of decoding."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op
from sma.ops.kernel import why_not_triton

OP = Op("tempered_decision")
WIDEST = 8192
"""A token is held by one program of the kernel, and more features do not fit its registers."""


def tempered_decision(
    x: Float[Tensor, "rows dim"],
    weight: Float[Tensor, "logits dim"],
    bias: Float[Tensor, " logits"],
    balance: Float[Tensor, " modules"],
    temp: Float[Tensor, "1"],
    live: Bool[Tensor, " rows"],
) -> tuple[Bool[Tensor, "rows modules"], Float[Tensor, "rows modules"]]:
    """The decision of :class:`~sma.configurators.TemperedSoftmax` for a few tokens, from the router on.

    ``c = sigmoid((u_1 - u_0 + balance) / exp(temp))`` with logits ``u = W x + b``, in float32 at least; active where c
    is above 1/2 (or NaN, which is to show) and the row is live.

    Args:
        x: ``(S, D)``.
        weight: ``(2 M, D)`` of the router, two rows for each module.
        bias: ``(2 M,)``.
        balance: ``(M,)``.
        temp: ``(1,)``.
        live: ``(S,)``.

    Returns:
        Who is active ``(S, M)``, and the confidence ``(S, M)`` in float32 (float64 for float64 inputs).

    Raises:
        ShapeError: the sizes do not fit.

    Example:
        >>> import torch
        >>> x, weight, zero = torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.0], [1.0]]), torch.zeros(1)
        >>> active, _ = tempered_decision(x, weight, torch.zeros(2), zero, zero, torch.tensor([True, True]))
        >>> active.flatten().tolist()
        [True, False]
    """
    if weight.shape != (2 * balance.numel(), x.shape[1]) or bias.shape != weight.shape[:1]:
        raise ShapeError(
            f"tempered_decision: weight must be ({2 * balance.numel()}, {x.shape[1]}) and bias of its rows, got "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    active, confidence = OP(x, weight, bias, balance, temp, live)
    return active, confidence


def _why_not(x: Tensor, weight: Tensor, bias: Tensor, balance: Tensor, temp: Tensor, live: Tensor) -> str | None:
    if x.shape[1] > WIDEST:
        return f"the kernel takes at most {WIDEST} features, got {x.shape[1]}"
    return "there is nothing to compute" if x.numel() == 0 else why_not_triton(x) or why_not_triton(weight)


@OP.backend("triton", priority=10, applies=_why_not)
def _triton(
    x: Tensor, weight: Tensor, bias: Tensor, balance: Tensor, temp: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    from sma.ops.tempered_decision.triton_kernel import decide

    active, confidence = decide(x, weight, bias, balance, temp, live)
    return active, confidence


from sma.ops.tempered_decision import eager, reference  # noqa: E402,F401  (registers the backends)
