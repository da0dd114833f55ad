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
        if name == "generate" or (part.suite is None and name == "chunks"):
            continue  # of the same steps; of the same blocks
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
    """Parameters of the tool without a gradient, where the plain part has one."""
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    missing = []
    for name, parameter in module.named_parameters():
        owner, _, last = name.rpartition(".")
        # "mixer.parametrizations.alpha.original" stands for "mixer.alpha", "up.weight_g" for "up.weight".
        parametrised = "parametrizations." in owner
        gradient = gradients.get(owner.replace("parametrizations.", "") if parametrised else f"{owner}.weight")
        expected = last in tool.trained and gradient is not None and bool(gradient.any())
        if expected and (parameter.grad is None or not bool(parameter.grad.any())):
            missing.append(name)
    return missing
