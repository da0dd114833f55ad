"""Decisions that were recorded before: record them from ``routings``, save them, replay them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sma.configurators.common import at_least_float32
from sma.errors import DataError, RoutingError
from sma.interfaces import Configurator
from sma.routing import Routing


def save_routings(path: str | PathLike[str], routings: Mapping[str, Routing]) -> None:
    """Write routings to a safetensors file, under their names.

    Args:
        path: the file to write.
        routings: as models return them.
    """
    tensors: dict[str, Tensor] = {}
    for name, routing in routings.items():
        for part in ("active", "confidence", "valid", "position"):
            tensors[f"{name}.{part}"] = getattr(routing, part).detach().contiguous().clone()
    save_file(tensors, str(path))


def load_routings(path: str | PathLike[str]) -> dict[str, Routing]:
    """Read what :func:`save_routings` wrote.

    Raises:
        DataError: the file is missing, truncated, or holds something else.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file of routings")
    try:
        tensors = load_file(str(path))
    except SafetensorError as error:
        raise DataError(f"{path}: not a complete safetensors file ({error})") from error
    parts = ("active", "confidence", "valid", "position")
    names = sorted({key.rpartition(".")[0] for key in tensors})
    missing = [f"{name}.{part}" for name in names for part in parts if f"{name}.{part}" not in tensors]
    if missing or not names:
        raise DataError(f"{path}: not a file of routings, it lacks {', '.join(missing) or 'any tensor'}")
    return {name: Routing(*(tensors[f"{name}.{part}"] for part in parts)) for name in names}


class Replay(Configurator):
    """Repeats a recorded routing, token by token of the stream.

    The batch must be the recorded one (same rows); chunks may be cut differently, since tokens are found by their
    position.
    """

    logits_per_module = 0
    adjustable = False
    active: Tensor
    confidence: Tensor

    @dataclass(kw_only=True, frozen=True)
    class Config(Configurator.Config):
        path: str
        name: str

    def __init__(self, config: Config, *, n_modules: int = 1) -> None:
        super().__init__(config, n_modules=n_modules)
        recorded = load_routings(config.path)
        if config.name not in recorded:
            raise RoutingError(f"{config.path}: no routing named {config.name!r}; there are {', '.join(recorded)}")
        self._set(recorded[config.name])

    @classmethod
    def of(cls, routing: Routing) -> Self:
        """A configurator that repeats ``routing``, without a file between."""
        self = cls.__new__(cls)
        Configurator.__init__(self, Configurator.Config(), n_modules=routing.n_modules)
        self._set(routing)
        return self

    def _set(self, routing: Routing) -> None:
        if routing.n_modules != self.n_modules:
            raise RoutingError(f"replay: the layer has {self.n_modules} modules, the routing {routing.n_modules}")
        # Stored by position, so that padding and chunks of the recorded run do not matter.
        length = int(routing.position[routing.valid].max()) + 1 if routing.valid.any() else 1
        rows, columns = routing.valid.nonzero(as_tuple=True)
        position = routing.position[rows, columns]
        batch = routing.active.shape[0]
        active = torch.zeros(batch, length, self.n_modules, dtype=torch.bool, device=routing.active.device)
        confidence = routing.confidence.new_zeros(batch, length, self.n_modules)
        active[rows, position] = routing.active[rows, columns]
        confidence[rows, position] = routing.confidence.detach()[rows, columns]
        self.register_buffer("active", active, persistent=False)
        self.register_buffer("confidence", confidence, persistent=False)

    def _at(self, recorded: Tensor, position: Tensor) -> Tensor:
        batch, length = recorded.shape[:2]
        if position.shape[0] != batch:
            raise RoutingError(f"replay: recorded for a batch of {batch}, asked for a batch of {position.shape[0]}")
        if position.numel() and int(position.max()) >= length:
            raise RoutingError(f"replay: recorded for {length} tokens, asked for position {int(position.max())}")
        return recorded.gather(1, position[..., None].expand(-1, -1, self.n_modules))

    def score(self, logits: Tensor, position: Tensor) -> Tensor:
        return at_least_float32(self._at(self.confidence, position))

    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        return self._at(self.active, position)
