"""What tools do to the weights of a part counts, in every way of running it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tools.parts import PARTS, Part, trained, ways_of
from tests.tools.tools import TOOLS, Tool, linears

WITH_LINEARS = [part for part in PARTS if linears(part.build())]
CASES = [
    pytest.param(tool, part, id=f"{tool}-{part}")
    for tool in TOOLS
    for part in (PARTS if tool.everything else WITH_LINEARS)
]


@pytest.mark.parametrize(("tool", "part"), CASES)
def test_weights_of_a_tool_count(tool: Tool, part: Part) -> None:
    module = tool.apply(part.build())
    plain = tool.plain(part, module)
    wrong = []
    for name, way in ways_of(part, plain).items():
        try:
            torch.testing.assert_close(way(part, module), way(part, plain), rtol=1e-9, atol=1e-9)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    actual, expected = trained(part, module), trained(part, plain)
    if tool.in_training and not torch.allclose(actual, expected, rtol=1e-9, atol=1e-9):
        wrong.append("training: the outputs differ")
    wrong += [f"training: {name}: no gradient" for name in without_gradient(tool, module, plain)]
    assert not wrong, "\n".join(wrong)


def without_gradient(tool: Tool, module: nn.Module, plain: nn.Module) -> list[str]:
    """Parameters of the tool that should have a gradient and have none; what the plain part does not use, has none."""
    used = {
        name.rpartition(".")[0]
        for name, parameter in plain.named_parameters()
        if parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-12
    }
    missing = []
    for name, parameter in module.named_parameters():
        owner, _, last = name.rpartition(".")
        owner = owner.split("parametrizations.")[0].rstrip(".")
        if last in tool.trained and owner in used and (parameter.grad is None or not bool(parameter.grad.any())):
            missing.append(name)
    return missing
