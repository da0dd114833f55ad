"""Linear layers by convolution: equal to matrix products, in both directions, and taken only where they pay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sma.runtime import onednn as module
from sma.runtime.onednn import linear
from sma.runtime.plain import project

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def _slow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where it pays."""
    monkeypatch.setattr(module, "_mkl_is_slow", lambda: True)


def _case(*shape: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).requires_grad_()

    return draw(*shape), draw(width, shape[-1]), draw(width)


@pytest.mark.parametrize("shape", [(2, 512, 128), (1031, 128), (3, 333, 128), (512, 256)])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_matrix_product(shape: tuple[int, ...], biased: bool) -> None:
    x, weight, bias = _case(*shape, width=272)
    assert module._pays(x, weight)
    inputs = (x, weight, bias) if biased else (x, weight)
    y = linear(*inputs)
    exact = F.linear(*(each.double() for each in inputs))
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    pairs = [(y, exact)]
    pairs += zip(
        torch.autograd.grad(y, inputs, gradient), torch.autograd.grad(exact, inputs, gradient.double()), strict=True
    )
    for have, want in pairs:
        assert have.shape == want.shape
        assert have.is_contiguous()
        torch.testing.assert_close(
            have.double(), want.double(), rtol=1e-5, atol=2e-6 * float(want.detach().abs().max())
        )


def test_gives_the_same_bits_each_time() -> None:
    inputs = _case(1031, 128, width=256)

    def run() -> tuple[Tensor, ...]:
        y = linear(*inputs)
        return (y, *torch.autograd.grad(y.square().sum(), inputs))

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_is_differentiable_twice() -> None:
    inputs = _case(1031, 128, width=256)

    def second(function: object) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)  # type: ignore[operator]
        return torch.autograd.grad(sum(each.square().mean() for each in first), inputs)  # type: ignore[arg-type]

    for have, want in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5 * float(want.detach().abs().max()))


def test_gives_only_the_gradients_that_are_asked_for() -> None:
    x, weight, bias = _case(1024, 128, width=256)
    linear(x, weight.detach(), bias.detach()).sum().backward()
    assert x.grad is not None
    linear(x.detach(), weight, bias.detach()).sum().backward()
    assert weight.grad is not None
    assert bias.grad is None


@pytest.mark.parametrize(
    ("shape", "width", "dtype", "why"),
    [
        ((511, 512), 512, torch.float32, "few tokens"),
        ((1024, 64), 64, torch.float32, "a small product"),
        ((1024, 128), 257, torch.float32, "an odd width"),
        ((1024, 130), 256, torch.float32, "an odd width"),
        ((1024, 128), 256, torch.float64, "no kernel"),
        ((1024, 128), 256, torch.bfloat16, "its matrix products go to oneDNN anyway"),
    ],
)
def test_the_rest_stays_a_matrix_product(
    shape: tuple[int, ...], width: int, dtype: torch.dtype, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = _case(*shape, width=width, dtype=dtype)
    monkeypatch.setattr(module._Convolution, "apply", lambda *_: pytest.fail(why))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_leaves_compilers_autocast_and_errors_alone() -> None:
    x, weight, bias = _case(1024, 128, width=256)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
        assert not module._pays(x, weight)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        linear(x, weight[:, :64])
    assert linear(torch.ones(0, 128), weight).shape == (0, 256)


def test_a_projection_is_that_of_torch() -> None:
    torch.manual_seed(0)
    projection, x = torch.nn.Linear(128, 256), torch.randn(1024, 128)
    torch.testing.assert_close(project(projection, x), projection(x), rtol=1e-5, atol=1e-5)
    projection.register_forward_hook(lambda *_: torch.zeros(()))
    assert project(projection, x).shape == ()
