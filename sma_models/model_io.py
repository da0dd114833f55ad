"""The output of every model, and the checks of its input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sma.errors import ShapeError
from sma.padding import check_lengths, check_valid, valid_of
from sma.routing import Routing
from sma_models.stack import StackState


class ModelOutput(NamedTuple):
    """The output of every model. A tuple, as backward hooks and ``fully_shard`` look for tensors in tuples only.

    Attributes:
        logits: ``(B, L, vocab_size)`` of a language model, ``(B, n_classes)`` of a classifier.
        state: streaming state, None unless one was passed in.
        routings: the decisions, by the name of the layer.
        losses: auxiliary losses by name, scalars, already weighted; add them to the loss.
    """

    logits: Tensor
    state: StackState | None = None
    routings: Mapping[str, Routing] = {}
    losses: Mapping[str, Tensor] = {}


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def without_padding(
    name: str, inputs: Tensor, valid: Tensor | None, weight: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """The input ``(B, L)`` with zeros at padding, which may hold anything.

    Raises:
        ShapeError: it is no such tensor, ``valid`` or ``lengths`` do not fit it, or one is not on the device of
            ``weight``.
    """
    if not isinstance(inputs, Tensor):
        raise ShapeError(f"{name}: the input must be a tensor (B, L), got {type(inputs).__name__}")
    if inputs.device != weight.device:
        raise ShapeError(f"{name}: the input must be on the device of the model, {weight.device}, got {inputs.device}")
    if inputs.dim() != 2 or (valid is None and lengths is None):
        return inputs
    shape = (inputs.shape[0], inputs.shape[1])
    check_valid(valid, shape, inputs.device)
    check_lengths(lengths, valid, shape, inputs.device)
    return inputs.masked_fill(~(valid_of(lengths, inputs) if valid is None else valid), 0)


def check_tokens(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Refuse what is not a batch of token numbers.

    Raises:
        ShapeError: wrong shape or dtype, an empty batch, or (checked on the CPU) a number outside the vocabulary.
    """
    if tokens.dim() != 2 or tokens.dtype not in INTEGERS:
        raise ShapeError(f"{name}: tokens must be integers of shape (B, L), got {tokens.dtype} {tuple(tokens.shape)}")
    if tokens.shape[0] == 0:
        raise ShapeError(f"{name}: the batch must hold at least one sequence, got {tuple(tokens.shape)}")
    if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise ShapeError(f"{name}: tokens must lie in 0..{vocab_size - 1}, got {low if low < 0 else high}")
