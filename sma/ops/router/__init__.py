"""router: from tokens to scores and a decision by threshold, in one look at the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op
from sma.ops.kernel import why_not_triton_on
from sma.ops.narrow_linear import WIDEST
from sma.ops.packed import Packed

OP = Op("router")


class Gate(NamedTuple):
    """A decision by threshold, about each token and module alone.

    ``score = sigmoid(margin / (temperature * exp(log_temperature)))``, and a token is active unless ``score <=
    threshold``. The margin is a module's logit plus its balance; with two logits it is the second (active) less the
    first (inactive), of which the sigmoid is the softmax.

    Attributes:
        balance: ``(M,)`` added to the logits in favour of activation; it gets no gradient.
        log_temperature: ``(1,)``, or None for 0.
        temperature: positive.
        threshold: strictly between 0 and 1.
    """

    balance: Tensor
    log_temperature: Tensor | None = None
    temperature: float = 1.0
    threshold: float = 0.5

    def score(self, logits: Tensor) -> Tensor:
        """Scores ``(B, L, M)``, in the dtype of the logits ``(B, L, M, 1 or 2)``."""
        return self.score_of(self.margin(logits))

    def margin(self, logits: Tensor) -> Tensor:
        """What speaks for activation, ``(B, L, M)``."""
        margin = logits[..., 0] if logits.shape[-1] == 1 else logits[..., 1] - logits[..., 0]
        return margin + self.balance.to(logits.dtype)

    def score_of(self, margin: Tensor) -> Tensor:
        """Scores of margins, of the same shape and dtype."""
        if self.log_temperature is not None:
            margin = margin / self.log_temperature.to(margin.dtype).exp()
        if self.temperature != 1:
            margin = margin / self.temperature
        return torch.sigmoid(margin)

    def decide(self, score: Tensor) -> Tensor:
        """Who is active. NaN is, so that it shows in the output instead of hiding."""
        return ~(score <= self.threshold)


class Routed(NamedTuple):
    """What :func:`router` returns.

    Attributes:
        x: the tokens, passed through.
        score: ``(B, L, M)``, 0 at padding, in float32 (float64 for float64 inputs) also under autocast.
        active: ``(B, L, M)`` bool, False at padding.
        margin: ``(B, L, M)`` like the score, but without a gradient.
        valid: ``(B, L)`` bool: real tokens.
        column: ``(B, L)`` int64: where each token stands in its row; None where ``valid`` was given.
        counts: ``(M, blocks)`` int32, for :func:`~sma.ops.pack.pack`; None where nothing was counted on the way.
    """

    x: Tensor
    score: Tensor
    active: Tensor
    margin: Tensor
    valid: Tensor
    column: Tensor | None
    counts: Tensor | None


Compressor = Callable[[Packed], tuple[Tensor, Tensor, Tensor]]
"""From what was packed to its tokens ``(K, D)``, the tokens ``(B, L, D)`` passed through, and their scores."""


def router(
    x: Float[Tensor, "batch length d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"],
    gate: Gate,
    *,
    valid: Bool[Tensor, "batch length"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> Routed:
    """Logits ``x W^T + b``, their scores, and who is active.

    Like :func:`~sma.ops.narrow_linear.narrow_linear`, of which this is the continuation, it passes ``x`` on: the ``x``
    that is returned must go into one function only, whose gradient is a tensor of its own, for the gradient of the
    scores is added to it in place. README.md derives the gradient.

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
    _check(x, weight, bias, gate, valid, lengths)
    with torch.autocast(x.device.type, enabled=False):
        out: Routed = OP(x, weight, bias, gate, valid, lengths)
    return out


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

    They can on the kernels. The gradient of ``x`` is written once then, not spread first and added to by the router.
    Neither ``x`` nor the score that are returned has a gradient before the compressor returned them anew, and the ``x``
    it returns is under the conditions of :func:`router`. Without a compressor all is as :func:`router` returns it.
    """
    _check(x, weight, bias, gate, valid, lengths)
    arguments = x, weight, bias, gate, valid, lengths
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling() or OP.choose(*arguments).name != "triton":
            return OP(*arguments), None
        from sma.ops.router.triton_kernel import routed_compress as run

        return run(*arguments)


def _check(x: Tensor, weight: Tensor, bias: Tensor, gate: Gate, valid: Tensor | None, lengths: Tensor | None) -> None:
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


def _why_not(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Gate, valid: Tensor | None, lengths: Tensor | None
) -> str | None:
    if weight.shape[0] > WIDEST:
        return f"the kernel has at most {WIDEST} logits, got {weight.shape[0]}"
    if x.numel() == 0 or weight.numel() == 0:
        return "there is nothing to compute"
    for value in (x, weight, gate.balance, gate.log_temperature):
        reason = None if value is None else why_not_triton_on(value)
        if reason is not None:
            return reason
    return None


@OP.backend("triton", priority=10, applies=_why_not)
def _triton(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Gate, valid: Tensor | None, lengths: Tensor | None
) -> Routed:
    from sma.ops.router.triton_kernel import router as run

    return run(x, weight, bias, gate, valid, lengths)


from sma.ops.router import eager, reference  # noqa: E402,F401  (registers the backends)
