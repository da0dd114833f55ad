"""Tensors that are computed again for the backward pass: the same gradients, and nothing kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sma import checkpoint
from sma.runtime.checkpointing import DEPTH
from sma.runtime.recomputation import _Recomputed, recomputed


@pytest.mark.parametrize("passes", [1, 2])
def test_same_gradients_and_nothing_kept(passes: int) -> None:
    """The hooks themselves, which :func:`recomputed` uses on a GPU only."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    calls: list[int] = []

    def compute() -> Sequence[Tensor]:
        calls.append(1)
        return x.detach().exp(), x.detach().sin()

    a, b = x.detach().exp().requires_grad_(), x.detach().sin().requires_grad_()
    expected = torch.autograd.grad((a * b * a).sum(), [a, b])
    hooks = _Recomputed(compute, (a, b))
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        y = (a.view(12, 1) * b.view(12, 1)) * a.view(12, 1)
    for _ in range(passes):
        grads = torch.autograd.grad(y.sum(), [a, b], retain_graph=True)
        assert all(map(torch.allclose, grads, expected))
    assert calls


def test_packed_tensors_are_let_go() -> None:
    kept, other = torch.randn(5), torch.randn(5)
    hooks = _Recomputed(lambda: (torch.ones(5),), (kept,))
    saved, number = hooks.pack(other), hooks.pack(kept)
    assert saved is other
    gone = weakref.ref(kept)
    del kept
    assert gone() is None
    assert torch.equal(hooks.unpack(number), torch.ones(5))
    assert hooks.unpack(saved) is other


def test_only_on_a_gpu_and_outside_checkpoints() -> None:
    def run(x: Tensor) -> Tensor:
        assert DEPTH.value
        return x.exp()

    assert not DEPTH.value
    x = torch.randn(3, requires_grad=True)
    checkpoint(run, x).sum().backward()
    assert not DEPTH.value
    never: Callable[[], Sequence[Tensor]] = lambda: pytest.fail("not on a CPU")  # noqa: E731
    with recomputed(never, (x,)):
        y = x.exp() * x
    y.sum().backward()
