"""The backends of torch-scatter, with the real package."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sma.configurators import FixedRate
from sma.layer import SparselyActivated
from sma.ops import operations, using
from sma.ops.segment_sum import segment_sum
from sma.routing import Packed
from tests.ops.packed_cases import numbers

NAMES = ("compress", "extract", "segment_sum")


@pytest.mark.scatter
@pytest.mark.parametrize("name", NAMES)
def test_torch_scatter_is_a_backend(name: str) -> None:
    mask = torch.tensor([[True, False, True]])
    packed = Packed.from_mask(mask)
    arguments = {
        "compress": (numbers(1, 3, 2), packed),
        "extract": (numbers(2, 2), packed),
        "segment_sum": (numbers(2, 2), packed.cu_seqlens),
    }[name]
    assert operations()[name].explain(*arguments)["torch_scatter"] is None
    half = (arguments[0].to(torch.bfloat16), arguments[1])
    assert "bfloat16" in str(operations()[name].explain(*half)["torch_scatter"])
    assert operations()[name].choose(*half).name == "eager"


@pytest.mark.scatter
def test_torch_scatter_takes_layers_in_which_nothing_is_active() -> None:
    layer = SparselyActivated(nn.Linear(3, 3), FixedRate(FixedRate.Config(rate=0.0)))
    x = torch.randn(2, 4, 3, requires_grad=True)
    with using("torch_scatter"):
        output = layer(x).output
        sums = segment_sum(torch.zeros(0, 3), torch.zeros(3, dtype=torch.int64))
    output.sum().backward()
    assert torch.equal(output, torch.zeros(2, 4, 3))
    assert torch.equal(x.grad, torch.zeros(2, 4, 3))
    assert torch.equal(sums, torch.zeros(2, 3))
