"""How a layer comes to its routing: scores, a decision that is taken once, and rows for the active tokens."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isfinite, prod
from typing import NamedTuple

import torch
from torch import Tensor

from sma.errors import RoutingError, ShapeError
from sma.interfaces import Configurator
from sma.ops.narrow_linear import narrow_linear
from sma.ops.pack import pack
from sma.ops.router import Compressor, Gate, routed_compress
from sma.padding import valid_of
from sma.routing import Packed, Routing
from sma.runtime.checkpointing import inside_checkpoint, mark_decision

Weights = tuple[Tensor, Tensor]
"""Weight ``(M * logits_per_module, D)`` and bias of a router."""


class Scored(NamedTuple):
    """What a configurator says of a batch.

    Attributes:
        x: ``(B, L, D)``, the tokens, passed through.
        score: ``(B, L, M)``.
        active: ``(B, L, M)`` bool, False at padding, where the score alone did not have to be asked; else None.
        valid: ``(B, L)`` real tokens.
        position: ``(B, L)`` 0-based position among the real tokens of the stream.
        counts: ``(M, blocks)`` of the active tokens, for :func:`~sma.ops.pack.pack`, or None.
        padded: whether some tokens may not be real.
        compress: what brings the tokens of the first module together, and gives ``x`` and the score their gradient, see
            :func:`~sma.ops.router.routed_compress`; None where they have it.
        tokens: ``(K, D)`` of the first module, where it was asked.
    """

    x: Tensor
    score: Tensor
    active: Tensor | None
    valid: Tensor
    position: Tensor
    counts: Tensor | None
    padded: bool
    compress: Compressor | None = None
    tokens: Tensor | None = None


def score_tokens(
    name: str,
    configurator: Configurator,
    x: Tensor,
    weights: Weights | None,
    logits: Tensor | None = None,
    valid: Tensor | None = None,
    lengths: Tensor | None = None,
    seen: Tensor | None = None,
) -> Scored:
    """Scores of the tokens ``x (B, L, D)``, by the given logits or by a router's weights.

    Args:
        name: of the layer, for its errors.
        configurator: whose scores.
        x: the tokens.
        weights: of the router; None where the logits are given, or where none are needed.
        logits: ``(B, L, M * logits_per_module)``.
        valid: ``(B, L)`` real tokens.
        lengths: ``(B,)`` in place of ``valid``.
        seen: ``(B,)`` real tokens of the stream before these.

    Raises:
        ShapeError: the logits have the wrong shape, are missing or not finite.
    """
    padded = valid is not None or lengths is not None
    gate = None if weights is None or logits is not None else gate_of(configurator)
    if gate is not None and weights is not None:
        routed, compress = routed_compress(x, *weights, gate, valid=valid, lengths=lengths)
        _check_finite(name, routed.margin, None)
        position = _position(routed.valid, routed.column, seen)
        return Scored(routed.x, routed.score, routed.active, routed.valid, position, routed.counts, padded, compress)
    column = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if valid is None else None
    valid = valid_of(lengths, x) if valid is None else valid
    position = _position(valid, column, seen)
    logits, x = _logits(name, configurator, x, weights, logits, valid if padded else None)
    return Scored(x, configurator.score(logits, position), None, valid, position, None, padded)


def _position(valid: Tensor, column: Tensor | None, seen: Tensor | None) -> Tensor:
    """``(B, L)`` among the real tokens of the stream: the ``column`` where all padding is on the right."""
    position = (valid.cumsum(1) - 1).clamp(min=0) if column is None else column
    return position if seen is None else position + seen[:, None]


def gate_of(configurator: Configurator) -> Gate | None:
    """What may be computed in place of the three steps of a configurator, or None."""
    own = configurator.__dict__
    return None if "score" in own or "decide" in own or "weigh" in own else configurator.gate()


def _logits(
    name: str,
    configurator: Configurator,
    x: Tensor,
    weights: Weights | None,
    logits: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Logits ``(B, L, M, C)``, those given or the router's, and ``x`` to go on with."""
    shape = (*x.shape[:2], configurator.n_modules, configurator.logits_per_module)
    if logits is None and configurator.logits_per_module:
        if weights is None:
            raise ShapeError(f"{name}: has no router of its own, logits must be given")
        logits, x = narrow_linear(x, *weights, valid)
    elif logits is None:
        logits = x.new_empty(shape)
    if logits.shape[:2] != shape[:2] or prod(logits.shape[2:]) != shape[2] * shape[3]:
        raise ShapeError(f"{name}: logits must hold (B, L, M, C) = {shape}, got {tuple(logits.shape)}")
    _check_finite(name, logits if configurator.logits_per_module else x, valid)
    return logits.reshape(shape), x


def _check_finite(name: str, values: Tensor, valid: Tensor | None) -> None:
    # Only on the CPU: elsewhere the answer would have to be waited for.
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    real = values.detach() if valid is None else values.detach()[valid]
    # A sum is quicker, and is finite only if all of its terms are; where it is not, it may have overflowed.
    if not isfinite(float(real.sum())) and not bool(real.isfinite().all()):
        raise ShapeError(f"{name}: x must be finite, it (or its logits) hold NaN or Inf at real tokens")


def route_tokens(
    configurator: Configurator, scored: Scored, *, replay: Routing | None = None, capacity: float | None = None
) -> tuple[Routing, Scored]:
    """The routing that follows from scores, and the scores with their gradient.

    Args:
        configurator: who decides.
        scored: what :func:`score_tokens` returned.
        replay: a routing whose decision is taken over instead.
        capacity: share of the tokens, padding included, that each module has room for; None for as many as are active.

    Raises:
        RoutingError: ``replay`` is of another shape.
    """
    _, score, active, valid, position, counts, padded, *_ = scored
    if replay is not None:
        active, counts = _replayed(configurator, replay, valid), None
    else:
        if active is None:
            active = configurator.decide(score.detach(), position, valid) & valid[..., None]
        if (inside_checkpoint() or torch.compiler.is_compiling()) and not torch.compiler.is_exporting():
            # The decision of the first run is what counts, whatever the second one made of it.
            active, counts = mark_decision(active), None
    if configurator.everywhere and replay is None and capacity is None and not padded:
        everything = Packed.of_all(position)
        return _routing(configurator, scored, active, (everything,) * configurator.n_modules)
    room = None if capacity is None or not valid.numel() else max(1, ceil(capacity * valid.numel()))
    rows = [
        pack(active[..., m], position, capacity=room, counts=None if counts is None else counts[m])
        for m in range(configurator.n_modules)
    ]
    if room is not None:
        active = _stack([each.kept for each in rows])
    shape = (valid.shape[0], valid.shape[1])
    return _routing(configurator, scored, active, tuple(Packed.from_rows(each, shape) for each in rows))


def _routing(
    configurator: Configurator, scored: Scored, active: Tensor, packed: tuple[Packed, ...]
) -> tuple[Routing, Scored]:
    if scored.compress is not None:
        tokens, x, score = scored.compress(packed[0])
        scored = scored._replace(x=x, score=score, compress=None, tokens=tokens)
    overflow = [each.overflow for each in packed if each.overflow is not None]
    routing = Routing(
        active,
        configurator.weigh(scored.score, active),
        scored.valid,
        scored.position,
        _stack(overflow) if overflow else None,
    )
    routing.__dict__["packed"] = packed  # the cached property would look for who is active, and knows no capacity
    return routing, scored


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Along a new last axis; one tensor is not copied."""
    return tensors[0].unsqueeze(-1) if len(tensors) == 1 else torch.stack(list(tensors), -1)


def _replayed(configurator: Configurator, replay: Routing, valid: Tensor) -> Tensor:
    expected = (*valid.shape, configurator.n_modules)
    if replay.active.shape != expected:
        raise RoutingError(f"replay: must be of shape (B, L, M) = {expected}, got {tuple(replay.active.shape)}")
    return replay.active & valid[..., None]


def weights_of(confidence: Tensor) -> Sequence[Tensor]:
    """``(B, L)`` for each module of a confidence ``(B, L, M)``: their gradients come together at once."""
    return (confidence.squeeze(-1),) if confidence.shape[-1] == 1 else confidence.unbind(-1)
