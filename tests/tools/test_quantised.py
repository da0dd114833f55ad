"""Quantised projections run, stay close to the float ones, and say the same step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma_models.inference import Decoder
from sma_models.language_model import LanguageModel
from tests.models.tiny import SPECS, call, inputs_of, tiny
from tests.tools.parts import PARTS, Part
from tests.tools.tools import linears

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.* deprecated:UserWarning"),
]


def dynamic(module: nn.Module) -> nn.Module:
    """``torch.ao``: int8 weights, and int8 inputs by their own range at every call."""
    quantised: nn.Module = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    return quantised


def weight_only(module: nn.Module) -> nn.Module:
    """torchao: int8 weights, products in float."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module = copy.deepcopy(module)
    quantize_(module, Int8WeightOnlyConfig())
    return module


QUANTISERS: dict[str, Callable[[nn.Module], nn.Module]] = {"quantize_dynamic": dynamic, "int8 weight only": weight_only}
quantisers = pytest.mark.parametrize("quantise", QUANTISERS.values(), ids=QUANTISERS)


def quantised_linears(module: nn.Module) -> list[str]:
    """The projections that are not plain any more."""
    return [
        name
        for name, each in module.named_modules()
        if isinstance(each, torch.ao.nn.quantized.dynamic.Linear)
        or type(getattr(each, "weight", None)).__name__.startswith("Int8")
    ]


@quantisers
@pytest.mark.parametrize("name", SPECS)
def test_quantised_models(name: str, quantise: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny(name)
    quantised: Any = quantise(model)
    assert set(quantised_linears(quantised)) == set(linears(model)), "some projections were left as they were"
    inputs = inputs_of(model)
    with torch.no_grad():
        plain = call(model, inputs)
        out = call(quantised, inputs, replay=plain.routings)  # rounding decides nothing then
    error = (out.logits - plain.logits).norm() / plain.logits.norm()
    assert float(error) < 0.1, f"the logits are off by {float(error):.3f}"
    if isinstance(model, LanguageModel):
        steps(quantised, inputs[:1])


def steps(model: LanguageModel, tokens: Tensor) -> None:
    """A decoder of one sequence says what the model says, token by token, for inputs are quantised call by call."""
    state, decoder = model.initial_state(1), Decoder(model, 1)
    slot = decoder.acquire()
    with torch.no_grad():
        for t in range(12):
            out = model(tokens[:, t : t + 1], state)
            state = out.state
            logits = decoder.step({slot: int(tokens[0, t])})
            torch.testing.assert_close(logits, out.logits[:, 0], rtol=1e-4, atol=1e-4)


@quantisers
@pytest.mark.parametrize(
    "part", [p for p in PARTS if p.suite is not None and p.kind != "model" and linears(p.build())], ids=str
)
def test_quantised_parts(part: Part, quantise: Callable[[nn.Module], nn.Module]) -> None:
    module = part.build().float()
    x = part.inputs(module).float()
    quantised = quantise(module)
    assert set(quantised_linears(quantised)) == set(linears(module)), "some projections were left as they were"
    with torch.no_grad():
        plain = part.suite().call(module, x)
        out = part.suite().call(quantised, x, replay=plain.routings or None)
    error = (out.y - plain.y).norm() / plain.y.norm()
    assert float(error) < 0.1, f"off by {float(error):.3f}"
