"""How a layer comes to its routing: scores, a decision that is taken once, and rows for the active tokens."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isfinite, prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sma.errors import RoutingError, ShapeError
from sma.interfaces import Configurator
from sma.ops.narrow_linear import narrow_linear
from sma.ops.pack import pack
from sma.ops.router import Compressor, Gate, routed_compress
from sma.padding import valid_of
from sma.routing import Packed, Routing
from sma.runtime.checkpointing import DEPTH, mark_decision
from sma.runtime.plain import call_router, is_plain
from sma.transforms import refuse_vmap, transformed

Weights = tuple[Tensor, Tensor]
"""Weight ``(M * logits_per_module, D)`` and bias of a router."""


class Scored(NamedTuple):
    """The result of a configurator for a batch.

    Attributes:
        x: ``(B, L, D)``, the tokens, passed through.
        score: ``(B, L, M)``.
        active: ``(B, L, M)`` bool, False at padding, if the decision was computed with the score; else None.
        valid: ``(B, L)`` real tokens.
        position: ``(B, L)`` 0-based position among the real tokens of the stream.
        counts: ``(M, blocks)`` of the active tokens, for :func:`~sma.ops.pack.pack`, or None.
        padded: whether some tokens may not be real.
        compress: compresses the tokens of the first module, and gives ``x`` and the score their gradient, see
            :func:`~sma.ops.router.routed_compress`; None where they have it already.
        tokens: ``(K, D)`` of the first module, after ``compress`` was called.
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


class LogitSource(NamedTuple):
    """Where the logits of a layer come from: one of the three, or nothing for a configurator that needs none.

    Attributes:
        router: a projection, read if it is plain, else called.
        weights: weight and bias of a projection that the caller knows to be plain.
        logits: ``(B, L, M * logits_per_module)``.
    """

    router: nn.Module | None = None
    weights: Weights | None = None
    logits: Tensor | None = None


def score_tokens(
    name: str,
    configurator: Configurator,
    x: Tensor,
    source: LogitSource,
    valid: Tensor | None = None,
    lengths: Tensor | None = None,
    seen: Tensor | None = None,
) -> Scored:
    """Scores of the tokens ``x (B, L, D)``.

    Args:
        name: of the layer, for its errors.
        configurator: whose scores.
        x: the tokens.
        source: of the logits.
        valid: ``(B, L)`` real tokens.
        lengths: ``(B,)`` in place of ``valid``.
        seen: ``(B,)`` real tokens of the stream before these.

    Raises:
        ShapeError: the logits have the wrong shape, are missing or not finite.
    """
    router, weights, logits = source
    padded = valid is not None or lengths is not None
    if router is not None and is_plain(router):
        weights = router.weight, router.bias  # type: ignore[assignment]  # a plain one has tensors
    gate = None if weights is None else gate_of(configurator)
    if gate is not None and weights is not None:
        routed, compress = routed_compress(x, *weights, gate, valid=valid, lengths=lengths)
        if routed.margin.device.type == "cpu":
            _check_finite(name, routed.margin, None)
        column, position = routed.column, routed.column
        if column is None or seen is not None:
            position = _position(routed.valid, column, seen)
        assert position is not None
        return Scored(routed.x, routed.score, routed.active, routed.valid, position, routed.counts, padded, compress)
    column = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if valid is None else None
    valid = valid_of(lengths, x) if valid is None else valid
    position = _position(valid, column, seen)
    real = valid if padded else None
    if weights is not None:
        logits, x = narrow_linear(x, *weights, real)
    elif router is not None:
        logits = call_router(router, x if real is None else x.masked_fill(~real[..., None], 0))
    logits = _logits(name, configurator, x, logits, real)
    return Scored(x, configurator(logits, position), None, valid, position, None, padded)


def _position(valid: Tensor, column: Tensor | None, seen: Tensor | None) -> Tensor:
    """``(B, L)`` among the real tokens of the stream: the ``column`` where all padding is on the right."""
    position = (valid.cumsum(1) - 1).clamp(min=0) if column is None else column
    return position if seen is None else position + seen[:, None]


def gate_of(configurator: Configurator) -> Gate | None:
    """The gate that may replace the three steps of a configurator, or None."""
    own = configurator.__dict__
    replaced = "score" in own or "decide" in own or "weigh" in own
    return None if replaced or not is_plain(configurator, Configurator) else configurator.gate()


def _logits(name: str, configurator: Configurator, x: Tensor, logits: Tensor | None, valid: Tensor | None) -> Tensor:
    """Logits ``(B, L, M, C)``, those given or, where none are needed, anything."""
    shape = (*x.shape[:2], configurator.n_modules, configurator.logits_per_module)
    if logits is None:
        if configurator.logits_per_module:
            raise ShapeError(f"{name}: has no router of its own, logits must be given")
        logits = x.new_empty(shape)
    if logits.shape[:2] != shape[:2] or prod(logits.shape[2:]) != shape[2] * shape[3]:
        raise ShapeError(f"{name}: logits must hold (B, L, M, C) = {shape}, got {tuple(logits.shape)}")
    _check_finite(name, logits if configurator.logits_per_module else x, valid)
    return logits.reshape(shape)


def _check_finite(name: str, values: Tensor, valid: Tensor | None) -> None:
    # Only on the CPU: elsewhere this would synchronise with the device.
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if transformed():
        refuse_vmap(name, values)
    real = values.detach() if valid is None else values.detach()[valid]
    # A sum is quicker, and is finite only if all of its terms are; where it is not, it may have overflowed.
    if not isfinite(float(real.sum())) and not bool(real.isfinite().all()):
        raise ShapeError(f"{name}: x must be finite, it (or its logits) hold NaN or Inf at real tokens")


def route_tokens(
    configurator: Configurator, scored: Scored, *, replay: Routing | None = None, capacity: float | None = None
) -> tuple[Routing, Scored]:
    """The routing that follows from scores, and the scores with their gradient.

    Args:
        configurator: takes the decision.
        scored: what :func:`score_tokens` returned.
        replay: a routing whose decision is taken over instead.
        capacity: share of the tokens, padding included, that each module has rows for; None for as many as are active.

    Raises:
        RoutingError: ``replay`` is of another shape.
    """
    active, valid, counts = scored.active, scored.valid, scored.counts
    if replay is not None:
        active, counts = _replayed(configurator, replay, valid), None
    else:
        if active is None:
            active = configurator.decide(scored.score.detach(), scored.position, valid) & valid[..., None]
        if (DEPTH.value or torch.compiler.is_compiling()) and not torch.compiler.is_exporting():
            # The decision of the first run counts; that of the recomputation is ignored.
            active, counts = mark_decision(active), None
    overflow: Tensor | None = None
    if configurator.everywhere and replay is None and capacity is None and not scored.padded:
        packed = (Packed.of_all(scored.position),) * configurator.n_modules
    elif capacity is None and active.shape[2] == 1:
        rows = pack(active[..., 0], scored.position, counts=None if counts is None else counts[0])
        packed = (Packed.from_rows(rows, (active.shape[0], active.shape[1])),)
    elif capacity is None:
        packed = _packed(active, scored.position, counts)
    else:
        packed, active, overflow = _packed_within(active, scored.position, counts, capacity)
    if scored.compress is not None:
        tokens, x, score = scored.compress(packed[0])
        scored = scored._replace(x=x, score=score, compress=None, tokens=tokens)
    # With a gate in place of the three steps, the score is the confidence.
    confidence = scored.score if scored.active is not None else configurator.weigh(scored.score, active)
    routing = Routing(active, confidence, valid, scored.position, overflow)
    routing.__dict__["packed"] = packed  # the cached property would search again, without a capacity
    return routing, scored


def _packed(active: Tensor, position: Tensor, counts: Tensor | None) -> tuple[Packed, ...]:
    """Rows for all active tokens."""
    shape = (active.shape[0], active.shape[1])
    packed: list[Packed] = []
    for m in range(active.shape[2]):
        rows = pack(active[..., m], position, counts=None if counts is None else counts[m])
        packed.append(Packed.from_rows(rows, shape))
    return tuple(packed)


def _packed_within(
    active: Tensor, position: Tensor, counts: Tensor | None, capacity: float
) -> tuple[tuple[Packed, ...], Tensor, Tensor | None]:
    """Rows of a fixed number, the decision that they leave, and how many tokens were dropped for lack of capacity."""
    shape = (active.shape[0], active.shape[1])
    if not active.numel():
        return _packed(active, position, counts), active, None
    size = max(1, ceil(capacity * shape[0] * shape[1]))
    rows = [
        pack(active[..., m], position, capacity=size, counts=None if counts is None else counts[m])
        for m in range(active.shape[2])
    ]
    packed = tuple(Packed.from_rows(each, shape) for each in rows)
    dropped = [each.overflow for each in packed if each.overflow is not None]
    return packed, _stacked([each.kept for each in rows]), _stacked(dropped)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Along a new last axis; one tensor is not copied, which would be a launch for every layer."""
    return tensors[0].unsqueeze(-1) if len(tensors) == 1 else torch.stack(list(tensors), -1)


def _replayed(configurator: Configurator, replay: Routing, valid: Tensor) -> Tensor:
    expected = (*valid.shape, configurator.n_modules)
    if replay.active.shape != expected:
        raise RoutingError(f"replay: must be of shape (B, L, M) = {expected}, got {tuple(replay.active.shape)}")
    return replay.active & valid[..., None]
