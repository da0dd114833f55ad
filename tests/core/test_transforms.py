"""Derivatives by ``torch.func``, forward mode and second derivatives: right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import sma
from sma.dropout import add_dropout
from sma.errors import BackendError
from sma.layer import SparselyActivated
from sma.ops import using
from sma.runtime import onednn
from sma_modules.ops.ema.chunked import chunked
from sma_modules.ops.ema.convolution import convolve
from sma_modules.ops.gau_inputs.eager import _SiluParts

# PyTorch scripts its own formulas for forward mode, and warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(6, 6),
    lambda: nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.Tanh(), nn.AvgPool1d(3, 1, 1)),
]


def layer_and_loss(build: Callable[[], nn.Module]) -> tuple[SparselyActivated, Callable[[Tensor], Tensor], Tensor]:
    torch.manual_seed(0)
    layer = SparselyActivated(build()).double().eval()
    return layer, lambda x: layer(x).output.square().sum(), torch.randn(2, 5, 6, dtype=torch.float64)


@pytest.mark.parametrize("build", LAYERS)
def test_transforms_of_a_layer_give_the_derivatives_of_autograd(build: Callable[[], nn.Module]) -> None:
    layer, loss, x = layer_and_loss(build)
    (wanted,) = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)
    along = torch.randn_like(x)
    torch.testing.assert_close(grad(loss)(x), wanted)
    torch.testing.assert_close(jvp(loss, (x,), (along,))[1], (wanted * along).sum())
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, along))).tangent
    torch.testing.assert_close(tangent, (wanted * along).sum())
    whole = jacrev(lambda x: layer(x).output)(x)
    torch.testing.assert_close(jacfwd(lambda x: layer(x).output)(x), whole)
    second = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(hessian(loss)(x), second)


def test_transforms_of_a_model_agree_with_differences_of_its_gradients() -> None:
    torch.manual_seed(0)
    model = sma.build("seqboat_small_lm", "d_model=16", "n_layers=2").double().eval()
    tokens = torch.randint(256, (2, 70))
    weights = {name: each.detach().clone() for name, each in model.named_parameters()}
    along = {name: torch.randn_like(each) for name, each in weights.items()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        total: Tensor = functional_call(model, weights, (tokens,)).logits.logsumexp(-1).sum()
        return total

    def gradient(step: float) -> list[Tensor]:
        at = {name: (each + step * along[name]).requires_grad_() for name, each in weights.items()}
        return list(torch.autograd.grad(loss(at), list(at.values()), allow_unused=True, materialize_grads=True))

    first, second = jvp(grad(loss), (weights,), (along,))
    for got, wanted in zip(first.values(), gradient(0), strict=True):
        torch.testing.assert_close(got, wanted)
    for got, after, before in zip(second.values(), gradient(1e-6), gradient(-1e-6), strict=True):
        difference = (after - before) / 2e-6
        assert (got - difference).norm() <= 1e-6 * difference.norm() + 1e-9


@pytest.mark.parametrize("build", LAYERS)
def test_vmap_is_refused_by_name(build: Callable[[], nn.Module]) -> None:
    layer, loss, x = layer_and_loss(build)
    with pytest.raises(BackendError, match=r"SparselyActivated: cannot run under torch.vmap.*batch \(B, L, D\)"):
        vmap(lambda x: layer(x).output)(x[:, None])
    with pytest.raises(BackendError, match=r"cannot run under torch.vmap"):
        vmap(grad(loss))(x[:, None])
    weights = {name: torch.stack([each, each]) for name, each in layer.named_parameters()}
    with pytest.raises(BackendError, match=r"cannot run under torch.vmap"):
        vmap(lambda weights: functional_call(layer, weights, (x,)).output)(weights)


def _doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradients_that_are_written_by_hand_have_a_second_derivative() -> None:
    torch.manual_seed(0)
    assert gradgradcheck(convolve, (_doubles(2, 5, 3), _doubles(3, 4), _doubles(3, 4)))
    assert gradgradcheck(lambda mx: _SiluParts.apply(mx, (2, 3, 3)), (_doubles(4, 8),))
    assert gradgradcheck(onednn._Convolution.apply, (_doubles(33, 4), _doubles(4, 4), _doubles(4)))


def test_a_second_derivative_that_is_not_there_is_refused() -> None:
    x, decay, weight, direct = _doubles(1, 40, 2), -_doubles(2, 2).detach().abs() - 0.1, _doubles(2, 2), _doubles(2)
    y = chunked(x, decay, weight, direct).square().sum()
    with pytest.raises(BackendError, match=r"ema: this backend has no second derivative.*using\('reference'\)"):
        torch.autograd.grad(y, [x, weight], create_graph=True)
    torch.autograd.grad(chunked(x, decay, weight, direct).square().sum(), [x, weight])


def test_the_reference_has_every_second_derivative() -> None:
    torch.manual_seed(0)
    model = sma.build("seqboat_small_lm", "d_model=16", "n_layers=1").double().eval()
    tokens, bias = torch.randint(256, (1, 8)), model.stack.layers[0].mixer.omega
    with pytest.raises(BackendError, match="ema: this backend has no second derivative"):
        torch.autograd.grad(model(tokens).logits.logsumexp(-1).sum(), bias, create_graph=True)
    with using("reference"):
        (slope,) = torch.autograd.grad(model(tokens).logits.logsumexp(-1).sum(), bias, create_graph=True)
        (got,) = torch.autograd.grad(slope.sum(), bias)

    def loss(bias: Tensor) -> Tensor:
        total: Tensor = functional_call(model, {"stack.layers.0.mixer.omega": bias}, (tokens,)).logits.logsumexp(-1)
        return total.sum()

    torch.testing.assert_close(got, hessian(loss)(bias.detach()).sum(0))


def test_dropout_has_a_tangent() -> None:
    x = torch.ones(3, 8)
    y, tangent = jvp(lambda x: add_dropout(x, 0.5, torch.zeros_like(x)), (x,), (torch.ones_like(x),))
    assert torch.equal(y, tangent)
