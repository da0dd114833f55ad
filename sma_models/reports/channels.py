"""The layers of a report: readable names, and the decisions of one sequence lined up with its bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sma.errors import RoutingError
from sma.routing import Routing

_LAYER = re.compile(r"(?:(?P<before>.+)\.)?layers\.(?P<layer>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class Channel:
    """One module of one layer, on one sequence of n real tokens.

    Attributes:
        label: for people, "layer 0".
        active: ``(n,)`` bool.
        confidence: ``(n,)`` float32.
    """

    label: str
    active: npt.NDArray[np.bool_]
    confidence: npt.NDArray[np.float32]

    @property
    def rate(self) -> float:
        """Share of the tokens that are active."""
        return float(self.active.mean()) if self.active.size else 0.0


def short_labels(names: Sequence[str]) -> list[str]:
    """Readable labels for names of routings: "layers.0.activate" is "layer 0" where that says it all.

    Labels stay unique: as soon as two names share a layer, all keep the part behind the layer.

    Example:
        >>> short_labels(["layers.0.activate", "layers.1.activate"])
        ['layer 0', 'layer 1']
        >>> short_labels(["layers.0.sublayers.1.activate", "layers.0.sublayers.2.activate"])
        ['layer 0 sublayers.1', 'layer 0 sublayers.2']
    """
    matches = [_LAYER.fullmatch(name) for name in names]
    short = [
        f"{m['before'] + ' ' if m['before'] else ''}layer {m['layer']}" if m else name
        for m, name in zip(matches, names, strict=True)
    ]
    if len(set(short)) == len(short):
        return short
    rests = [m["rest"].removesuffix(".activate").removesuffix(".mixture") if m else "" for m in matches]
    long = [f"{label} {rest}" if rest else label for label, rest in zip(short, rests, strict=True)]
    return long if len(set(long)) == len(long) else list(names)


def module_labels(label: str, n_modules: int) -> list[str]:
    """A label for each module of a layer: the layer's own where there is one module only."""
    return [label] if n_modules == 1 else [f"{label} module {m}" for m in range(n_modules)]


def channels(n_bytes: int, routings: Mapping[str, Routing], sample: int = 0) -> list[Channel]:
    """Every module of every layer on the real tokens of one sequence, padding removed.

    Args:
        n_bytes: how many bytes the sequence has: one token each.
        routings: by the name of the layer, as models return them.
        sample: which row of the batch.

    Raises:
        RoutingError: no routings, no such row, or the number of real tokens is not ``n_bytes``.
    """
    if not routings:
        raise RoutingError("routings: must hold at least one layer, got none (the model activates nothing sparsely)")
    found: list[Channel] = []
    for (name, routing), label in zip(routings.items(), short_labels(list(routings)), strict=True):
        batch = routing.active.shape[0]
        if not 0 <= sample < batch:
            raise RoutingError(f"{name}: sample must lie in 0..{batch - 1}, got {sample}")
        valid = routing.valid[sample]
        n_tokens = int(valid.sum())
        if n_tokens != n_bytes:
            raise RoutingError(
                f"{name}: the routing has {n_tokens} real tokens, the text has {n_bytes} bytes; they must agree"
            )
        active = _array(routing.active[sample][valid]).astype(np.bool_)
        confidence = _array(routing.confidence[sample][valid].float()).astype(np.float32)
        for m, module_label in enumerate(module_labels(label, routing.n_modules)):
            found.append(Channel(module_label, active[:, m], confidence[:, m]))
    return found


def _array(tensor: Tensor) -> npt.NDArray[np.generic]:
    array: npt.NDArray[np.generic] = tensor.detach().cpu().numpy()
    return array
