"""What a module counts as it runs is counted once, although its activations are recomputed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma.layer import SparselyActivated
from sma.runtime.checkpointing import checkpoint


class Counting(nn.Module):
    """Counts its calls in a buffer that it assigns anew, and in one that it changes in place."""

    calls: Tensor
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("sums", torch.zeros(1))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.sums += 1
        return self.linear(x).tanh()

    def other(self, x: Tensor) -> Tensor:
        return self(x)


def _pass(module: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = module(x)
    return out


@pytest.mark.parametrize(
    "wrap",
    [
        lambda module: module,
        lambda module: module.other,
        lambda module: lambda x: module(x),
        lambda module: partial(_pass, module),
        lambda module: partial(module),
    ],
    ids=["module", "method", "closure", "argument of partial", "partial"],
)
def test_buffers_change_once(wrap: Callable[[Any], Any]) -> None:
    module, x = Counting(), torch.randn(2, 4, requires_grad=True)
    before = module.sums
    checkpoint(wrap(module), x).sum().backward()
    assert x.grad is not None
    assert (float(module.calls), float(module.sums)) == (1, 1)
    assert module.sums is before


def test_buffers_are_the_modules_own_again_after_an_error() -> None:
    module, x = Counting(), torch.randn(2, 4, requires_grad=True)
    before = module.sums
    out = checkpoint(module, x)
    module.linear = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        out.sum().backward()
    assert module.sums is before
    assert float(before) == 1


def test_batch_norm_counts_a_batch_once() -> None:
    torch.manual_seed(0)
    layer = SparselyActivated(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    plain = SparselyActivated(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 9, 4)
    plain(x).output.square().sum().backward()
    checkpoint(layer, x).output.square().sum().backward()
    for (name, expected), (_, found) in zip(plain.named_buffers(), layer.named_buffers(), strict=True):
        assert torch.equal(found, expected), name
    for expected, found in zip(plain.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
