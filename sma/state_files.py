"""States in safetensors files: a sequence can be continued later, or on another machine."""

from __future__ import annotations

import json
from os import PathLike
from typing import TypeVar

from torch import Tensor

from sma.errors import CheckpointError
from sma.state import State, difference
from sma.weights import read_tensors, write_tensors

KINDS_KEY = "sma_state"
S = TypeVar("S", bound=State)


def save_state(state: State, path: str | PathLike[str]) -> None:
    """Write a state; the file appears complete or not at all.

    Args:
        state: of any batch, on any device.
        path: the file to write, by custom ``*.safetensors``.

    Raises:
        CheckpointError: the file cannot be written.
    """
    write_tensors(state.named_tensors(), path, {KINDS_KEY: json.dumps(state.kinds())})


def load_state(path: str | PathLike[str], like: S) -> S:
    """Read what :func:`save_state` wrote.

    Args:
        path: the file.
        like: a state of the model that goes on, of any batch, for instance its ``initial_state(1)``. The state comes
            to its device, in its dtypes.

    Raises:
        CheckpointError: the file is missing, truncated or holds no state, or one of another model.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from sma import WorkingMemory
        >>> memory = WorkingMemory.empty(2, 8, torch.zeros(0, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_state(memory, f"{folder}/state.safetensors")
        ...     load_state(f"{folder}/state.safetensors", WorkingMemory.empty(1, 8, torch.zeros(0, 3))).count.shape
        torch.Size([2])
    """
    tensors, metadata = read_tensors(path)
    if KINDS_KEY not in metadata:
        raise CheckpointError(f"{path}: holds no state")
    try:
        kinds = json.loads(metadata[KINDS_KEY])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: its description of the state cannot be read ({error})") from error
    if not isinstance(kinds, dict):
        raise CheckpointError(f"{path}: its description of the state must be a mapping, got {type(kinds).__name__}")
    problem = difference(like, kinds, tensors)
    if problem is not None:
        raise CheckpointError(f"{path}: does not fit the model: {problem}")
    own = like.named_tensors()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise CheckpointError(f"{path}: {name} must be {own[name].dtype}, got {tensor.dtype}")
    names = iter(own)

    def read(tensor: Tensor) -> Tensor:
        return tensors[next(names)].to(tensor.device, tensor.dtype)

    return like.map(read)
