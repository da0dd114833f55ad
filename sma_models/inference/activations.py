"""The decisions of layers, as the rows that are reported for tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from sma.steppers import Decision


def channel_names(decisions: Mapping[str, Decision]) -> list[str]:
    """A name for each module of each layer: the layer's, or ``name[0]``, ``name[1]`` where it has several modules."""
    return [
        name if decision.active.shape[-1] == 1 else f"{name}[{m}]"
        for name, decision in decisions.items()
        for m in range(decision.active.shape[-1])
    ]


def activation_rows(
    decisions: Mapping[str, Decision], count: int
) -> Iterator[tuple[tuple[bool, ...], tuple[float, ...]]]:
    """For each of ``count`` rows, which modules of all layers were active, and with which confidence."""
    each = list(decisions.values())
    if not each:
        yield from [((), ())] * count
        return
    active = torch.cat([decision.active for decision in each], -1).tolist()
    confidence = torch.cat([decision.confidence.float().nan_to_num() for decision in each], -1).tolist()
    for one, other in zip(active, confidence, strict=True):
        yield tuple(one), tuple(round(number, 3) for number in other)
