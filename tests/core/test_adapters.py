"""How modules that know nothing of packed sequences are recognised and called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma.configurators import Always
from sma.errors import ConfigError, ShapeError
from sma.interfaces import ModuleOutput
from sma.layer import SparselyActivated
from sma.routing import Routing
from sma.wrap.layouts import infer_layout
from tests.core.parts import Running


class Residual(nn.Sequential):
    """A chain that runs its parts in its own way."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = x + part(x)
        return x


class Returning(nn.Module):
    """Returns what it is told to, and has one parameter."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        return self.result(x * self.scale)


class Declared(nn.Module):
    layout = "padded"


@pytest.mark.parametrize(
    ("module", "layout"),
    [
        (nn.Linear(2, 2), "tokens"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "tokens"),
        (Residual(nn.Linear(2, 2)), "tokens"),
        (nn.Sequential(nn.Sequential(nn.GRU(2, 2))), "padded"),
        (nn.Sequential(nn.Linear(2, 2), Running.Config().build(d_model=2)), "padded"),
        (nn.Sequential(nn.Linear(2, 2), Declared()), "padded"),
        (nn.ModuleDict({"inner": nn.MultiheadAttention(2, 1)}), "padded"),
        (Running.Config().build(d_model=2), "packed"),
        (Declared(), "padded"),
    ],
)
def test_the_layout_is_inferred(module: nn.Module, layout: str) -> None:
    assert infer_layout(module) == layout


def test_an_unknown_layout_is_refused() -> None:
    module = nn.Linear(2, 2)
    module.layout = "ragged"
    with pytest.raises(ConfigError, match=r"Linear.layout: must be 'tokens', 'packed' or 'padded', got 'ragged'"):
        SparselyActivated(module)


def test_a_stated_layout_wins() -> None:
    mean = Returning(lambda x: x - x.mean(-2, keepdim=True))
    x = torch.randn(2, 3, 4)
    y = SparselyActivated(mean, Always.Config().build(), layout="padded")(x).output
    torch.testing.assert_close(y, x - x.mean(1, keepdim=True))


@pytest.mark.parametrize("layout", ["tokens", "padded"])
@pytest.mark.parametrize(
    ("result", "described"),
    [
        (lambda x: None, "NoneType"),
        (lambda x: [x], "list"),
        (lambda x: (x, x), r"\(Tensor, Tensor\)"),
        (lambda x: (x, None, x), r"\(Tensor, NoneType, Tensor\)"),
        (lambda x: {"y": x}, "dict"),
    ],
)
def test_results_that_are_no_tensor_are_refused(layout: Any, result: Any, described: str) -> None:
    layer = SparselyActivated(Returning(result), Always.Config().build(), layout=layout)
    with pytest.raises(ShapeError, match=f"Returning: must return .*got {described}; .* wrapper"):
        layer(torch.randn(2, 3, 4))


def test_a_tensor_with_no_state_is_accepted() -> None:
    x = torch.randn(2, 3, 4)
    for result in (lambda x: x, lambda x: (x,), lambda x: (x, None), ModuleOutput):
        assert torch.equal(SparselyActivated(Returning(result), Always.Config().build())(x).output, x)


@pytest.mark.parametrize("layout", ["tokens", "padded"])
def test_too_few_rows_are_refused(layout: Any) -> None:
    layer = SparselyActivated(Returning(lambda x: x[..., :1, :]), Always.Config().build(), layout=layout)
    with pytest.raises(ShapeError, match=r"Returning: must (return one row for each of 6|keep)"):
        layer(torch.randn(2, 3, 4))


def test_a_sequence_module_taken_for_tokens_is_pointed_to_its_layout() -> None:
    layer = SparselyActivated(Returning(lambda x: x.sum(0, keepdim=True)), Always.Config().build())
    with pytest.raises(ShapeError, match="needs layout='padded'"):
        layer(torch.randn(2, 3, 4))


def test_the_output_may_have_another_width() -> None:
    assert SparselyActivated(nn.Linear(4, 7))(torch.randn(2, 3, 4)).output.shape == (2, 3, 7)
    assert SparselyActivated(nn.LSTM(4, 3, bidirectional=True))(torch.randn(2, 3, 4)).output.shape == (2, 3, 6)


class Attending(nn.Module):
    """A user's class with attention inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0]
        return y


def test_an_unknown_sequence_module_has_to_say_that_it_is_causal() -> None:
    with pytest.raises(
        ConfigError, match=r"Attending: cannot be used in a causal layer unless .* Attending.causal = True"
    ):
        SparselyActivated(Attending(), causal=True)
    with pytest.raises(ConfigError, match="Attending"):
        SparselyActivated(nn.Sequential(nn.Linear(4, 4), Attending()), causal=True)
    said = Attending()
    said.causal = True
    assert SparselyActivated(said, causal=True).causal


def test_chains_collect_the_losses_of_their_parts() -> None:
    from tests.core.parts import Losing

    layer = SparselyActivated(nn.Sequential(nn.GRU(4, 4), Losing(4)))
    assert set(layer(torch.randn(2, 3, 4)).losses) == {"1.size"}


def test_batch_norm_in_a_chain_counts_active_tokens_only() -> None:
    chain = nn.Sequential(nn.Conv1d(4, 4, 1, bias=False), nn.BatchNorm1d(4, momentum=1.0))
    with torch.no_grad():
        chain[0].weight.copy_(torch.eye(4)[..., None])
    layer, x = SparselyActivated(chain), torch.randn(3, 8, 4)
    routing = layer(x).routing
    torch.testing.assert_close(chain[1].running_mean, x[routing.active[..., 0]].mean(0))


class Unstable(nn.Module):
    """Has no derivative at zero."""

    layout = "padded"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x / (self.scale * x).norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("module", [Unstable(), Attending(), nn.Sequential(nn.Conv1d(4, 4, 1), nn.LayerNorm(4))])
def test_nothing_active_has_finite_gradients(module: nn.Module) -> None:
    layer, x = SparselyActivated(module), torch.randn(2, 3, 4, requires_grad=True)
    usual = layer(x).routing.detach()
    silent = Routing(torch.zeros_like(usual.active), usual.confidence, usual.valid, usual.position)
    layer(x, replay=silent).output.sum().backward()
    for name, parameter in [*layer.named_parameters(), ("x", x)]:
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
