"""Weights that change while a text is decoded: loaded, trained, merged, or moved."""

from __future__ import annotations

from itertools import chain
from typing import Literal

from torch import nn


class WeightsWatch:
    """Notices that the parameters or buffers of a model moved, or that their values changed.

    A look compares addresses and version counters, so it does not synchronise with a device. It takes some 50
    microseconds for a model of 14 layers. Values that are written through ``.data`` pass the counters by.

    Args:
        model: to be watched.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._children = [part._modules.values() for part in modules if part._modules]
        self._parts = list(chain.from_iterable(self._children))
        self._tensors = [
            tensors for part in modules for tensors in (part._parameters.values(), part._buffers.values()) if tensors
        ]
        self._places = self._places_now()
        self._versions = self._versions_now()

    def look(self) -> Literal["moved", "changed"] | None:
        """What happened since the last look: "moved", also where a part was replaced, or only values "changed"."""
        if list(chain.from_iterable(self._children)) != self._parts or self._places_now() != self._places:
            return "moved"
        versions = self._versions_now()
        if versions is not None and versions == self._versions:
            return None
        self._versions = versions
        return "changed"

    def _places_now(self) -> list[int]:
        return [each.data_ptr() for each in chain.from_iterable(self._tensors) if each is not None]

    def _versions_now(self) -> list[int] | None:
        try:
            return [each._version for each in chain.from_iterable(self._tensors) if each is not None]
        except RuntimeError:  # those of a model that was built in inference mode are not counted
            return None
