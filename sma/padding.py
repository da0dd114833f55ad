"""Between the public entry points, which take any boolean ``valid (B, L)``, and the inside, where rows are right-padded
and have lengths.

Padding that lies to the left or in the middle is moved to the right once, at the entry point, and back at the end.
Inside, a row is described by its length alone, so no layer needs a mask, a search or a synchronisation. A caller that
knows that the padding is on the right passes the lengths. Then no padding is searched for, which would synchronise with
the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sma.errors import ShapeError


def valid_of(lengths: Tensor | None, x: Tensor) -> Tensor:
    """``(B, L)`` bool: the first ``lengths[b]`` tokens of each row of ``x (B, L, ...)``; all of them when lengths is
    None.
    """
    if lengths is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def check_valid(valid: Tensor | None, shape: tuple[int, int], device: torch.device | None = None) -> None:
    """Refuse what is no mask of the real tokens of ``(B, L) = shape`` on ``device``; None is accepted.

    Raises:
        ShapeError: the mask has another shape or dtype, or is elsewhere.
    """
    if valid is None:
        return
    if not isinstance(valid, Tensor):
        raise ShapeError(f"valid: must be a bool tensor of shape {tuple(shape)}, got {type(valid).__name__}")
    if valid.dtype != torch.bool or tuple(valid.shape) != tuple(shape):
        raise ShapeError(f"valid: must be bool of shape {tuple(shape)}, got {valid.dtype} {tuple(valid.shape)}")
    if device is not None and valid.device != device:
        raise ShapeError(f"valid: must be on the device of the input, {device}, got {valid.device}")


def check_lengths(
    lengths: Tensor | None, valid: Tensor | None, shape: tuple[int, int], device: torch.device | None = None
) -> None:
    """Refuse what are no numbers of real tokens of ``(B, L) = shape`` on ``device``; None is accepted.

    Raises:
        ShapeError: another shape or dtype, elsewhere, together with a mask, or (checked on the CPU) out of range.
    """
    if lengths is None:
        return
    if valid is not None:
        raise ShapeError("lengths: must not be given together with valid")
    if not isinstance(lengths, Tensor):
        raise ShapeError(f"lengths: must be an int64 tensor of shape ({shape[0]},), got {type(lengths).__name__}")
    if lengths.dtype != torch.int64 or tuple(lengths.shape) != (shape[0],):
        raise ShapeError(f"lengths: must be int64 of shape ({shape[0]},), got {lengths.dtype} {tuple(lengths.shape)}")
    if device is not None and lengths.device != device:
        raise ShapeError(f"lengths: must be on the device of the input, {device}, got {lengths.device}")
    if lengths.device.type == "cpu" and lengths.numel() and not torch.compiler.is_compiling():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > shape[1]:
            raise ShapeError(f"lengths: must lie in 0..{shape[1]}, got {low if low < 0 else high}")


@dataclass(frozen=True)
class Alignment:
    """How the rows of a batch were moved to the left.

    Attributes:
        lengths: ``(B,)`` real tokens of each row, or None when there is no padding.
        order: ``(B, L)`` column that each aligned token came from, or None when nothing moved.
    """

    lengths: Tensor | None
    order: Tensor | None

    @staticmethod
    def of(valid: Tensor | None, shape: tuple[int, int], lengths: Tensor | None = None) -> Alignment:
        """The alignment of a mask, or of lengths.

        Args:
            valid: ``(B, L)`` bool, True on real tokens, or None when all are.
            shape: ``(B, L)`` of the input.
            lengths: ``(B,)`` int64, instead of a mask: the padding is on the right.

        Raises:
            ShapeError: one of them has another shape or dtype, or both are given.
        """
        check_lengths(lengths, valid, shape)
        if lengths is not None:
            # Lengths out of range on another device are not checked; they do no harm.
            return Alignment(lengths.clamp(0, shape[1]), None)
        if valid is None:
            return Alignment(None, None)
        check_valid(valid, shape)
        if bool(valid.all()):
            return Alignment(None, None)
        lengths = valid.sum(1)
        if bool((valid[:, 1:] & ~valid[:, :-1]).any()):
            return Alignment(lengths, valid.to(torch.int8).argsort(dim=1, descending=True, stable=True))
        return Alignment(lengths, None)

    def align(self, x: Tensor) -> Tensor:
        """Move the real tokens of ``x (B, L, ...)`` to the left, in order."""
        return x if self.order is None else _gather(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`align`."""
        return x if self.order is None else _gather(x, self.order.argsort(dim=1))


def _gather(x: Tensor, order: Tensor) -> Tensor:
    index = order.reshape(*order.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
