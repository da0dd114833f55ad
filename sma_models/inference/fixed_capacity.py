"""Models whose chunks have a fixed number of rows, whoever is active."""

from __future__ import annotations

import copy
from typing import TypeVar

from sma.interfaces import Model
from sma.layer import SparseMixture

M = TypeVar("M", bound=Model)


def why_not_fixed(model: Model) -> dict[str, str]:
    """Why layers cannot have a fixed number of rows, by their names; empty where all can."""
    return {
        name: f"{type(module).__name__} (layout 'padded') takes rows as long as the longest sequence of active tokens, "
        "which is not known beforehand"
        for name, layer in model.named_modules()
        if isinstance(layer, SparseMixture)
        for module, layout in zip(layer.activated_modules, layer.layouts, strict=True)
        if layout == "padded"
    }


def with_fixed_rows(model: M, capacity: float = 1.0) -> M:
    """The model with a fixed number of rows in every layer, in chunks of a stream too; see :func:`why_not_fixed`.

    Args:
        model: in evaluation mode. Its weights are shared, nothing else is.
        capacity: share of the tokens that a layer which decides has room for; with 1 the results are the same.
    """
    weights = {id(each): each for each in (*model.parameters(), *model.buffers())}
    fixed = copy.deepcopy(model, weights)  # what is in there already is not copied
    for layer in fixed.modules():
        if isinstance(layer, SparseMixture):
            # Not with_capacity: what losses and running averages would make of rows without a token does not count.
            layer.capacity = 1.0 if layer.configurator.everywhere else capacity
            layer.capacity_streams = True
    return fixed
