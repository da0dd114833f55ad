"""Dropout that costs little on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LANES = 1 << 16


def dropout(x: Tensor, p: float) -> Tensor:
    """``x`` with zeros at a share ``p`` of its entries, and the others divided by ``1 - p``.

    PyTorch draws a 64-bit number for every entry, one after the other on a CPU, which can take a fifth of a training
    step. There, each of them decides on four entries here, by 16 bits each; ``p`` becomes the nearest multiple of
    2^-16, and the others are divided by what that leaves.

    Args:
        x: floating point, any shape.
        p: 0 up to but not 1; 0 returns ``x`` itself.
    """
    if p == 0:
        return x
    kept = _factors(x, p)
    return torch.dropout(x, p, train=True) if kept is None else x * kept


def dropout_(x: Tensor, p: float) -> Tensor:
    """:func:`dropout` in place, for an ``x`` that nothing else needs, also not its gradient."""
    if p == 0:
        return x
    kept = _factors(x, p)
    return torch.dropout(x, p, train=True) if kept is None else x.mul_(kept)


def add_dropout(x: Tensor, p: float, onto: Tensor) -> Tensor:
    """``onto + dropout(x, p)``, one pass over memory less."""
    kept = _factors(x, p) if p and x.dtype == onto.dtype else None
    return dropout(x, p) + onto if kept is None else torch.addcmul(onto, x, kept)


def _factors(x: Tensor, p: float) -> Tensor | None:
    """What the entries of ``x`` are multiplied with, 0 or one over the share that is kept; None where PyTorch's own
    dropout is the faster one.
    """
    dropped = round(p * _LANES)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not 0 < dropped < _LANES:
        return None
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    lanes = words.view(torch.int16)[: x.numel()].view(x.shape)
    # As numbers, 0 and 1: PyTorch's selections by Booleans take ten times as long as a product.
    kept = lanes.float().ge_(dropped - _LANES // 2)
    return kept.to(x.dtype).mul_(_LANES / (_LANES - dropped))


class Dropout(nn.Dropout):
    """The module of :func:`dropout`: active in training."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return dropout(input, self.p) if self.training else input
