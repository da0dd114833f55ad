"""What tools do to the weights of a part counts, in every way of running it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tools.parts import PARTS, Part, trained, ways_of
from tests.tools.tools import TOOLS, Tool, linears


def parts_for(tool: Tool) -> list[Part]:
    """Those that the tool has something to do with."""
    return [part for part in PARTS if tool.everything or linears(part.build())]


CASES = [pytest.param(tool, part, id=f"{tool}-{part}") for tool in TOOLS for part in parts_for(tool)]


@pytest.mark.parametrize(("tool", "part"), CASES)
def test_weights_of_a_tool_count(tool: Tool, part: Part) -> None:
    module = tool.apply(part.build())
    plain = tool.plain(part, module)
    wrong = []
    for name, way in ways_of(part, plain).items():
        try:
            actual, expected = way(part, module), way(part, plain)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("tool", "part"), CASES)
def test_gradients_arrive(tool: Tool, part: Part) -> None:
    module = tool.apply(part.build())
    plain = tool.plain(part, module)
    actual, expected = trained(part, module), trained(part, plain)
    if tool.in_training:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    wrong = [f"{name}: no gradient" for name in without_gradient(tool, module, plain)]
    assert not wrong, "\n".join(wrong)


def without_gradient(tool: Tool, module: nn.Module, plain: nn.Module) -> list[str]:
    """Parameters of the tool that should have a gradient and have none; what the plain part does not use, has none."""
    used = {
        name.rpartition(".")[0]
        for name, parameter in plain.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }
    missing = []
    for name, parameter in module.named_parameters():
        owner, _, last = name.rpartition(".")
        owner = owner.split("parametrizations.")[0].rstrip(".")
        if last in tool.trained and owner in used and (parameter.grad is None or not bool(parameter.grad.any())):
            missing.append(name)
    return missing
