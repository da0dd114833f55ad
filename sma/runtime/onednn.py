"""Matrix products that use the whole of a CPU."""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sma.transforms import transformed

_PIXELS = 32
"""Tokens are filled up to a multiple of it, so that few shapes occur."""
_LARGEST = 128
"""Tokens of an image at most. Large ones are read from memory a quarter faster than those of 32."""
_IMAGES = 16
"""With fewer of them one thread would compute the product as before."""
_FEWEST = _IMAGES * _PIXELS
"""Tokens."""
_SMALLEST = 1 << 24
"""Multiplications that are worth it."""
PLAIN_WEIGHTS = frozenset({nn.Parameter, Tensor})
"""Plain weights; a subclass may be sharded or quantised, and defines its own product."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, as :func:`torch.nn.functional.linear`.

    PyTorch gives matrix products on a CPU to MKL, which leaves half of what an AMD processor with AVX-512 can do, and
    convolutions to oneDNN, which does not. There a large float32 product is taken as a convolution over single pixels:
    the same sums in another order, in half the time, forward and backward.

    Args:
        x: ``(..., K)``.
        weight: ``(N, K)``.
        bias: ``(N,)`` or None.

    Returns:
        ``(..., N)``.

    Example:
        >>> linear(torch.ones(2, 3), torch.ones(1, 3)).tolist()
        [[3.0], [3.0]]
    """
    # The compiler is checked first: a graph would be specialised to the sizes that were compared.
    if (
        torch.compiler.is_compiling()
        or x.device.type != "cpu"
        or x.numel() * weight.shape[0] < _SMALLEST
        or not _pays(x, weight)
        or transformed()
    ):
        return F.linear(x, weight, bias)
    out: Tensor = _Convolution.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], weight.shape[0])


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether a large product on a CPU is faster as a convolution."""
    return (
        x.dtype == weight.dtype == torch.float32
        and type(weight) in PLAIN_WEIGHTS
        and x.numel() >= _FEWEST * x.shape[-1]
        and not weight.shape[0] % 16
        and not weight.shape[1] % 16
        and weight.shape[1] == x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and _mkl_is_slow()
    )


def _images(tokens: Tensor) -> Tensor:
    """``(M, K)`` to ``(M / P, K, 1, P)``, channels last: the features of a token stay neighbours, nothing moves."""
    missing = -tokens.shape[0] % _PIXELS
    tokens = F.pad(tokens, (0, 0, 0, missing)) if missing else tokens.contiguous()
    pixels = gcd(tokens.shape[0], _LARGEST)
    while pixels > _PIXELS and tokens.shape[0] < _IMAGES * pixels:
        pixels //= 2
    return tokens.view(-1, 1, pixels, tokens.shape[1]).permute(0, 3, 1, 2)


def _tokens(images: Tensor, count: int) -> Tensor:
    """The inverse: ``(count, K)``."""
    tokens = images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])
    return tokens if tokens.shape[0] == count else tokens[:count]


class _Convolution(torch.autograd.Function):
    """By hand for the bias, whose gradient a convolution adds up token by token: slow, and less exact."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return _tokens(F.conv2d(_images(tokens), weight[:, :, None, None], bias), tokens.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (tokens, weight) = grads, ctx.saved_tensors
        need_tokens, need_weight, need_bias = ctx.needs_input_grad
        rest = tokens.shape[0] % _PIXELS
        whole = tokens.shape[0] - rest
        options = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, ..., groups
        d_images, d_weight, _ = torch.ops.aten.convolution_backward.default(
            _images(grad[:whole] if rest else grad),
            _images(tokens[:whole] if rest else tokens),
            weight[:, :, None, None],
            None,
            *options,
            [need_tokens, need_weight, False],
        )
        d_tokens = _tokens(d_images, whole) if need_tokens else None
        d_weight = d_weight.view_as(weight) if need_weight else None
        if rest:  # padding both would move more data than these few products do
            d_tokens = None if d_tokens is None else torch.cat([d_tokens, grad[whole:] @ weight])
            d_weight = None if d_weight is None else d_weight.addmm_(grad[whole:].t(), tokens[whole:])
        return d_tokens, d_weight, grad.sum(0) if need_bias else None


@cache
def _mkl_is_slow() -> bool:
    """An AMD processor with AVX-512, which MKL does not use there, and a PyTorch that has both libraries."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions have none
    return (
        torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and str(capabilities.get("cpu_name", "")).startswith("AMD")
        and bool(capabilities.get("avx512_f"))
    )
