"""The feed-forward network, plain and gated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sma.errors import ConfigError
from sma_modules.modules.ffn import FFN

FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_formula(gated: bool, activation: str, bias: bool) -> None:
    ffn = FFN.Config(d_hidden=12, activation=activation, gated=gated, bias=bias).build(d_model=5).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    weights = ffn.state_dict()

    def linear(name: str, value: Tensor) -> Tensor:
        out = value @ weights[f"{name}.weight"].T
        return out + weights[f"{name}.bias"] if bias else out

    act = FUNCTIONS[activation]
    hidden = act(linear("gate", x)) * linear("up", x) if gated else act(linear("up", x))
    torch.testing.assert_close(ffn(x), linear("down", hidden))
    assert len(weights) == (3 if gated else 2) * (2 if bias else 1)


def test_hidden_width_by_default() -> None:
    assert FFN.Config().build(d_model=6).up.out_features == 24


@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(gated: bool) -> None:
    ffn = FFN.Config(d_hidden=3, gated=gated).build(d_model=2).double()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in ffn.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(ffn, dict(zip(names, weights, strict=True)), x)

    assert torch.autograd.gradcheck(function, (x, *ffn.parameters()))


@pytest.mark.parametrize("gated", [False, True])
def test_no_tokens_give_zero_gradients(gated: bool) -> None:
    ffn = FFN.Config(gated=gated).build(d_model=4)
    y = ffn(torch.zeros(0, 4))
    assert y.shape == (0, 4)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ffn.parameters())


def test_dropout_only_in_training() -> None:
    ffn = FFN.Config(dropout=0.5).build(d_model=4)
    x = torch.randn(50, 4)
    assert not torch.equal(ffn(x), ffn(x))
    ffn.eval()
    assert torch.equal(ffn(x), ffn(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_hidden": 0}, "d_hidden: must be None or at least 1, got 0"),
        ({"activation": "tanh"}, "activation: must be one of relu, gelu, silu, got 'tanh'"),
        ({"dropout": 1.0}, r"dropout: must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FFN.Config(**options)
