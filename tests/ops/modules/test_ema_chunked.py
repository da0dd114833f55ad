"""The chunks of a CPU and the transform are two ways to one convolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sma_modules.ops.ema.chunked import chunked, chunked_stream
from sma_modules.ops.ema.convolution import convolve


def by_transform(x: Tensor, log_q: Tensor, weight: Tensor, direct: Tensor) -> Tensor:
    steps = torch.arange(x.shape[1], dtype=x.dtype)
    kernel = (weight[..., None] * torch.exp(log_q[..., None] * steps)).sum(1)
    return convolve(x, kernel) + direct * x


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 100, 129])
@pytest.mark.parametrize("slowest", [1e-6, 1.0, 60.0], ids=["slow", "fast", "at once"])
def test_chunks_are_the_convolution(length: int, slowest: float) -> None:
    """Output and every gradient; q from nearly 1 to where its powers vanish."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_q = -slowest * torch.logspace(0, 1, 4, dtype=torch.float64).expand(3, 4)
    inputs = [draw(2, length, 3), log_q.clone(), draw(3, 4), draw(3)]
    grad = draw(2, length, 3)
    results = []
    for way in (chunked, by_transform):
        leaves = [each.clone().requires_grad_() for each in inputs]
        y = way(*leaves)
        y.backward(grad)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("splits", [(1,), (31,), (32,), (33,), (100,), (5, 32, 1, 64, 40)], ids=str)
@pytest.mark.parametrize("slowest", [1e-6, 1.0, 60.0], ids=["slow", "fast", "at once"])
def test_a_stream_is_the_recurrence(splits: tuple[int, ...], slowest: float) -> None:
    """Outputs and the state after each chunk, from a state that is not zero."""
    generator = torch.Generator().manual_seed(sum(splits))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_q = -slowest * torch.logspace(0, 1, 4, dtype=torch.float64).expand(3, 4)
    drive, read, hidden = draw(3, 4), draw(3, 4), draw(2, 3, 4)
    state = hidden
    for length in splits:
        x = draw(2, length, 3)
        y, hidden = chunked_stream(x, log_q, drive, read, hidden)
        for t in range(length):
            state = log_q.exp() * state + drive * x[:, t, :, None]
            torch.testing.assert_close(y[:, t], (read * state).sum(-1), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(hidden, state, atol=1e-9, rtol=1e-9)
        assert hidden.is_contiguous()


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, direct = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 40, 2), (2, 3), (2,))
    )
    log_q = (-torch.rand(2, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(chunked, (x, log_q, weight, direct))
