"""Checkpoints to go on from: one safetensors file with the model, the optimiser and how far training got.

Nothing is unpickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sma.errors import CheckpointError
from sma.interfaces import Model
from sma.weights import check_keys, read_tensors, write_tensors

FORMAT = "1"
_MODEL = "model."
_OPTIMISER = "optimiser."


@dataclass(frozen=True)
class Progress:
    """How far a run got: optimiser steps done, and seconds spent on them."""

    step: int
    seconds: float


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds; ``optimiser[i]`` is the state of parameter i by name."""

    progress: Progress
    model: dict[str, Tensor]
    optimiser: dict[int, dict[str, Tensor]]
    place: str

    def restore_model(self, model: Model) -> None:
        """Take over the weights and buffers.

        Raises:
            CheckpointError: they are those of another model.
        """
        check_keys(model, self.model, self.place)
        model.load_state_dict(self.model)

    def restore_optimiser(self, optimiser: torch.optim.Optimizer) -> None:
        """Take over the moments.

        Raises:
            CheckpointError: they are those of other parameters.
        """
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        for number, state in self.optimiser.items():
            for name, tensor in state.items():
                if number >= len(parameters) or (tensor.dim() and tensor.shape != parameters[number].shape):
                    raise CheckpointError(f"{self.place}: {name} of parameter {number} does not fit the optimiser")
        optimiser.load_state_dict({**optimiser.state_dict(), "state": self.optimiser})


def save_checkpoint(
    path: str | PathLike[str], model: Model, optimiser: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write a checkpoint. The file before it stays until the new one is complete on the disk."""
    tensors: dict[str, Tensor] = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    state: dict[int, dict[str, Any]] = optimiser.state_dict()["state"]
    for number, entries in state.items():
        tensors.update({f"{_OPTIMISER}{number}.{name}": torch.as_tensor(value) for name, value in entries.items()})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, path, {"format": FORMAT, "progress": json.dumps(asdict(progress))})


def read_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: it is missing, truncated, or no checkpoint of this library.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: must be a training checkpoint of format {FORMAT}, got {metadata.get('format')!r}"
        )
    try:
        progress = Progress(**json.loads(metadata["progress"]))
        optimiser: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(_OPTIMISER):
                number, _, entry = name.removeprefix(_OPTIMISER).partition(".")
                optimiser.setdefault(int(number), {})[entry] = tensor
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: must say how far training got, got {metadata.get('progress')!r}") from error
    model = {name.removeprefix(_MODEL): tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}
    return Checkpoint(progress, model, dict(sorted(optimiser.items())), str(path))
