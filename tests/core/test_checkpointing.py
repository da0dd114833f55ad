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
