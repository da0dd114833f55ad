"""Dropout that costs little on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sma.transforms import transformed

_LANES = 1 << 16


def dropout(x: Tensor, p: float) -> Tensor:
    """``x`` with zeros at a share ``p`` of its entries, and the others divided by ``1 - p``.

    PyTorch draws a 64-bit number for every entry, one after the other on a CPU, which can take a fifth of a training
    step. There, 64-bit numbers are hashed from a single one here, and each decides on four entries, by 16 bits each;
    ``p`` becomes the nearest multiple of 2^-16, and the others are divided by what that leaves.

    Args:
        x: floating point, any shape.
        p: 0 up to but not 1; 0 returns ``x`` itself.
    """
    if p == 0:
        return x
    kept = _factors(x, p)
    return torch.dropout(x, p, train=True) if kept is None else x * kept


def dropout_(x: Tensor, p: float) -> Tensor:
    """:func:`dropout` in place, for an ``x`` that nothing else reads, its gradient included."""
    if p == 0:
        return x
    kept = _factors(x, p)
    return torch.dropout(x, p, train=True) if kept is None else x.mul_(kept)


def add_dropout(x: Tensor, p: float, onto: Tensor, rows: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """``onto + dropout(x, p)``, with fewer passes over memory.

    Args:
        x: ``(..., D)`` floating point.
        p: as for :func:`dropout`.
        onto: of the shape of ``x``.
        rows: ``(K, D)``, added to rows of ``x`` before; None for nothing.
        index: ``(K,)`` which rows, counted over all but the last dimension, all different.
    """
    same = x.dtype == onto.dtype and (rows is None or rows.dtype == x.dtype)
    kept = _factors(x, p) if p and same else None
    if kept is not None:
        return _AddProduct.apply(onto, x, kept, rows, index)  # type: ignore[no-any-return,no-untyped-call]
    if rows is not None and index is not None:
        x = torch.index_add(x.flatten(0, -2), 0, index, rows).view_as(x)
    return dropout(x, p) + onto


class _AddProduct(torch.autograd.Function):
    """``onto + (x with rows added at index) * factors``, without a copy of ``x``."""

    @staticmethod
    def forward(
        ctx: Any, onto: Tensor, x: Tensor, factors: Tensor, rows: Tensor | None, index: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(factors, index)
        y = torch.addcmul(onto, x, factors)
        if rows is not None and index is not None:
            y.flatten(0, -2).index_add_(0, index, rows * factors.flatten(0, -2).index_select(0, index))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factors, index = ctx.saved_tensors
        by_x = grads[0] * factors
        by_rows = None if index is None else by_x.flatten(0, -2).index_select(0, index)
        return grads[0], by_x, None, by_rows, None


def _factors(x: Tensor, p: float) -> Tensor | None:
    """What the entries of ``x`` are multiplied with, 0 or one over the share that is kept; None where PyTorch's own
    dropout is the faster one.
    """
    dropped = round(p * _LANES)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not 0 < dropped < _LANES or transformed():
        return None
    lanes = _words(-(-x.numel() // 4)).view(torch.int16)[: x.numel()].view(x.shape)
    # As numbers, 0 and 1: PyTorch's selections by Booleans take ten times as long as a product.
    kept = lanes.float().ge_(dropped - _LANES // 2)
    return kept.to(x.dtype).mul_(_LANES / (_LANES - dropped))


def _words(count: int) -> Tensor:
    """``(count,)`` 64-bit numbers, each a hash of its place and of one number of PyTorch's generator.

    The generator itself gives one after the other; this is SplitMix64 (Steele, Lea and Flood, 2014), which gives all at
    once, but for the shifts, which keep the sign here, and for the last of them.
    """
    seed = torch.empty((), dtype=torch.int64).random_(-(2**63), None)
    words = torch.arange(count).mul_(_signed(0x9E3779B97F4A7C15)).add_(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = words.bitwise_xor_(words >> shift).mul_(_signed(factor))
    return words


def _signed(word: int) -> int:
    """The 64 bits of ``word`` as PyTorch reads them."""
    return word - (word >> 63 << 64)


class Dropout(nn.Dropout):
    """The module of :func:`dropout`: active in training."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return dropout(input, self.p) if self.training else input
