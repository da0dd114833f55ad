"""A stand-in for CUDA graphs: on a CPU, results of a function lie where a replay would put them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from sma.runtime.captured_function import WARMUP


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in something that a function returned."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [each for field in fields(value) for each in tensors_of(getattr(value, field.name))]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [each for item in inside for each in tensors_of(item)]


class Replayed:
    """Does on a CPU what a graph does: from the capture on, results lie where those of the capture lay."""

    failure: str | None = None

    def __init__(self, device: torch.device) -> None:
        self.runs = 0
        self.returned: Any = None

    @property
    def ready(self) -> bool:
        return self.returned is not None

    def run(self, function: Callable[[], Any]) -> Any:
        self.runs += 1
        if self.runs <= WARMUP:
            return function()
        if self.returned is None:
            self.returned = function()
            for tensor in tensors_of(self.returned):  # while it is captured nothing runs
                tensor.zero_()
        with torch.no_grad():
            for place, tensor in zip(tensors_of(self.returned), tensors_of(function()), strict=True):
                assert place.shape == tensor.shape
                place.copy_(tensor)
        return self.returned
