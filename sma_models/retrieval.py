"""Two sequences through one encoder: does the second match the first?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sma.errors import RoutingError, ShapeError
from sma.routing import Routing
from sma_models.encoder import Encoder, EncoderConfig
from sma_models.model_io import ModelOutput


class Retrieval(Encoder):
    """Two sequences through one encoder; the classifier reads ``[a, b, a * b, a - b]`` (LRA's matching task)."""

    @dataclass(kw_only=True, frozen=True)
    class Config(EncoderConfig):
        n_classes: int = 2

    def __init__(self, config: Config) -> None:
        super().__init__(config, n_inputs=4)

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        *,
        valid: tuple[Tensor | None, Tensor | None] = (None, None),
        lengths: tuple[Tensor | None, Tensor | None] = (None, None),
        replay: Mapping[str, Routing] | None = None,
    ) -> ModelOutput:
        """Logits ``(B, n_classes)`` for pairs of sequences ``(B, L1)`` and ``(B, L2)``.

        Routings and losses are named ``first.layers...`` and ``second.layers...``.

        Raises:
            ShapeError: as for :class:`Classifier`, and for two batches of different sizes.
            RoutingError: ``replay`` does not fit the model or the inputs.
        """
        masks = _two_sides("valid", valid)
        counts = _two_sides("lengths", lengths)
        sizes = [tuple(side.shape) for side in (first, second) if isinstance(side, Tensor)]
        if len({size[:1] for size in sizes}) > 1:
            raise ShapeError(f"Retrieval: both sides must hold as many sequences, got {sizes[0]} and {sizes[1]}")
        for name in replay or {}:
            if not name.startswith(("first.", "second.")):
                raise RoutingError(f"replay: names begin with 'first.' or 'second.', got {name!r}")
        pooled: list[Tensor] = []
        routings: dict[str, Routing] = {}
        losses: dict[str, Tensor] = {}
        for side, inputs, mask, count in zip(("first", "second"), (first, second), masks, counts, strict=True):
            prefix = f"{side}."
            own = {name.removeprefix(prefix): r for name, r in (replay or {}).items() if name.startswith(prefix)}
            vector, side_routings, side_losses = self._encode(inputs, mask, count, own or None)
            pooled.append(vector)
            routings.update({prefix + name: routing for name, routing in side_routings.items()})
            losses.update({prefix + name: loss for name, loss in side_losses.items()})
        a, b = pooled
        return ModelOutput(self._classify(torch.cat([a, b, a * b, a - b], -1)), None, routings, losses)


def _two_sides(name: str, given: object) -> tuple[Tensor | None, ...]:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ShapeError(
            f"Retrieval: {name} must be a pair, a tensor or None for each side, got {type(given).__name__}"
        )
    return tuple(given)
