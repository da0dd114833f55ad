"""Checkpointing saves decisions and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from sma.configurators import GumbelSoftmax, Sigmoid
from sma.layer import SparselyActivated
from sma.runtime.checkpointing import checkpoint, mark_decision


class Restless(Sigmoid):
    """Decides differently at every call: ever more tokens."""

    calls = 0

    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        self.calls += 1
        return (position < self.calls)[..., None].expand_as(score)


def restless() -> SparselyActivated:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    return SparselyActivated(module, Restless(Restless.Config()))


def test_the_decision_is_kept_and_the_rest_recomputed() -> None:
    layer, x = restless(), torch.randn(2, 6, 4)
    calls = []
    layer.module.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[0]))
    out = checkpoint(layer, x)
    out.output.square().sum().backward()
    assert layer.configurator.calls == 2, "nothing was recomputed"
    assert calls == [2, 2], "the recomputation ran on other tokens"
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer(x, replay=out.routing).output.square().sum().backward()
    for grad, parameter in zip(grads, layer.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def test_plain_checkpointing_does_fail_on_it() -> None:
    layer = restless()
    out = torch_checkpoint(layer, torch.randn(2, 6, 4), use_reentrant=False)
    with pytest.raises(CheckpointError):
        out.output.square().sum().backward()


def test_noise_is_the_same_noise() -> None:
    torch.manual_seed(0)
    layer = SparselyActivated(nn.Linear(4, 4), GumbelSoftmax.Config().build()).train()
    x = torch.randn(3, 7, 4)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x)):
        torch.manual_seed(5)
        layer.zero_grad()
        run(x).output.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in layer.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_activations_are_not_kept() -> None:
    layer, x = restless(), torch.randn(2, 64, 4)
    sizes: dict[str, int] = {}
    for name, run in (("plain", layer), ("checkpointed", lambda x: checkpoint(layer, x))):
        layer.configurator.calls = 63
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(x)
        sizes[name] = sum(kept)
    assert sizes["checkpointed"] < sizes["plain"] / 4


@pytest.mark.parametrize("shape", [(2, 3, 1), (0, 3, 2), (2, 0, 2)])
def test_the_operation_of_decisions(shape: tuple[int, ...]) -> None:
    active = torch.rand(shape) < 0.5
    torch.library.opcheck(torch.ops.sma.decision.default, (active,))
    torch.library.opcheck(torch.ops.sma.decision.default, (active.transpose(0, 1),))
    torch.library.opcheck(torch.ops.sma.decision.default, (torch.ones(2, 3, 1, dtype=torch.bool).expand(2, 3, 4),))
    marked = mark_decision(active)
    assert torch.equal(marked, active)
    assert marked.untyped_storage().data_ptr() != active.untyped_storage().data_ptr() or not active.numel()


def test_a_graph_can_be_used_more_than_once() -> None:
    layer, x = restless(), torch.randn(2, 6, 4, requires_grad=True)
    out = checkpoint(layer, x)
    for loss in (Tensor.sum, lambda y: y.square().sum(), lambda y: y.exp().sum()):
        wanted = torch.autograd.grad(loss(layer(x, replay=out.routing).output), [x, *layer.parameters()])
        got = torch.autograd.grad(loss(out.output), [x, *layer.parameters()], retain_graph=True)
        for each, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(each, other)


def test_a_graph_that_is_used_twice_leaves_buffers_alone() -> None:
    norm = nn.BatchNorm1d(4)
    layer, x = SparselyActivated(nn.Sequential(nn.Linear(4, 4), norm)), torch.randn(2, 6, 4)
    out = checkpoint(layer, x)
    mean = norm.running_mean.clone()
    out.output.sum().backward(retain_graph=True)
    out.output.square().sum().backward()
    assert torch.equal(norm.running_mean, mean)
    assert norm.num_batches_tracked == 1


def test_a_second_derivative_goes_through() -> None:
    layer, x = restless(), torch.randn(2, 6, 4, requires_grad=True)
    out = checkpoint(layer, x)
    (slope,) = torch.autograd.grad(out.output.square().sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(slope.square().sum(), x)
    (slope,) = torch.autograd.grad(layer(x, replay=out.routing).output.square().sum(), x, create_graph=True)
    (wanted,) = torch.autograd.grad(slope.square().sum(), x)
    torch.testing.assert_close(got, wanted)


class Forgetful(nn.Module):
    """Takes one decision at the first call, and two at every later one."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for _ in range(min(self.calls, 2)):
            x = x * mark_decision(x > 0)
        return x.exp()


def test_a_function_that_takes_more_decisions_is_refused() -> None:
    out = checkpoint(Forgetful(), torch.randn(2, 6, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match="as many decisions when it recomputes"):
        out.sum().backward()


def test_a_decision_that_the_caller_changes_is_still_the_one_that_counts() -> None:
    layer, x = restless(), torch.randn(2, 6, 4)
    out = checkpoint(layer, x)
    (wanted,) = torch.autograd.grad(out.output.sum(), layer.module[0].weight, retain_graph=True)
    out.routing.active.logical_not_()
    (got,) = torch.autograd.grad(out.output.sum(), layer.module[0].weight)
    assert torch.equal(got, wanted)
