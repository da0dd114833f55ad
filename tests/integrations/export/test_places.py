"""Graphs in other dtypes and on other devices compute what the library computes there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sma.ops import using
from sma_models.integrations.export import export_forward, export_prefill, export_step
from sma_models.language_model import LanguageModel
from sma_models.retrieval import Retrieval
from tests.integrations.export.parts import BLOCKS, SHIPPED, SUBLAYERS, WHOLE, model_of
from tests.integrations.export.places import EVERYWHERE, Place, at, check
from tests.integrations.export.test_graphs import follow, read, run
from tests.models.tiny import inputs_of, tiny

CHUNKS = [(slice(0, 8), [8, 8]), (slice(8, 16), [5, 8])]
"""The columns of two prompts, and how many tokens each has there."""
ROWS, LIVE = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([True, True, False, True, True])
"""The sequences of a larger batch, and which of them take tokens."""


def built(name: str) -> Any:
    if name in SUBLAYERS:
        return model_of([SUBLAYERS[name]])
    return model_of([WHOLE[name]], n_classes=3) if name in WHOLE else tiny(name, n_layers=1)


def stream(model: LanguageModel) -> list[Tensor]:
    """Logits by the model itself, after each chunk and each of some steps."""
    device = model.embedding.weight.device
    tokens, live = inputs_of(model, 2, 16).to(device), LIVE.to(device)
    state, found = model.initial_state(2), []
    for columns, lengths in CHUNKS:
        logits, state = read(model, tokens[:, columns], state, torch.tensor(lengths, device=device))
        found.append(logits)
    state = state.reorder(ROWS)
    for token in inputs_of(model, 5, 6, seed=2).to(device).unbind(1):
        logits, state = read(model, token[:, None], state, live.long())
        found.append(logits[live])
    return found


def exported_stream(model: LanguageModel) -> list[Tensor]:
    """The same by graphs, in which the state keeps its dtypes."""
    device = model.embedding.weight.device
    tokens, live = inputs_of(model, 2, 16).to(device), LIVE.to(device)
    prefill, step = export_prefill(model, 2, 8), export_step(model)
    given: dict[str, Tensor] = {}
    found = []
    for columns, lengths in CHUNKS:
        got = run(prefill, tokens=tokens[:, columns], lengths=torch.tensor(lengths, device=device), **given)
        found.append(got["logits"])
        given = follow(got)
    given = {name: each[ROWS.to(device)] for name, each in given.items()}
    for token in inputs_of(model, 5, 6, seed=2).to(device).unbind(1):
        got = run(step, tokens=token, live=live, **given)
        found.append(got["logits"][live])
        given = follow(got)
    kinds = {name: (each.dtype, each.device) for name, each in given.items()}
    assert kinds == {name: (step.example[name].dtype, step.example[name].device) for name in step.states}
    return found


def whole_inputs(model: Any) -> tuple[Tensor, Tensor]:
    """Two sequences for a model, one of them shorter, and their lengths."""
    weight = next(model.parameters())
    inputs = inputs_of(model, 2)
    dtype = weight.dtype if inputs.is_floating_point() else inputs.dtype
    return inputs.to(weight.device, dtype), torch.tensor([24, 13], device=weight.device)


def whole(model: Any) -> list[Tensor]:
    """Logits by the model itself."""
    inputs, lengths = whole_inputs(model)
    with torch.no_grad():
        if isinstance(model, Retrieval):
            return [model(inputs, inputs.flip(0), lengths=(lengths, lengths)).logits]
        return [model(inputs, lengths=lengths).logits]


def exported_whole(model: Any) -> list[Tensor]:
    """The same by a graph."""
    exported, (inputs, lengths) = export_forward(model, 2, 24), whole_inputs(model)
    if isinstance(model, Retrieval):
        sides = {"first": inputs, "second": inputs.flip(0)}
        return [run(exported, **sides, first_lengths=lengths, second_lengths=lengths)["logits"]]
    return [run(exported, inputs=inputs, lengths=lengths)["logits"]]


def check_there(
    name: str, place: Place, exported: Callable[[Any], list[Tensor]], own: Callable[[Any], list[Tensor]]
) -> None:
    model = place.of(built(name))
    mine = exported(model)
    with using("eager"):
        plain = own(model)
    exact = own(model.cpu().double())
    check(mine, plain, exact)


@pytest.mark.parametrize("place", EVERYWHERE)
@pytest.mark.parametrize("name", [*SUBLAYERS, *BLOCKS])
def test_a_stream_is_that_of_the_model(name: str, place: Place) -> None:
    check_there(name, place, exported_stream, stream)


@pytest.mark.parametrize("place", at("cpu", torch.float16))
@pytest.mark.parametrize("name", ["moe", *BLOCKS])
def test_a_stream_in_float16(name: str, place: Place) -> None:
    check_there(name, place, exported_stream, stream)


@pytest.mark.parametrize("place", EVERYWHERE)
@pytest.mark.parametrize("name", [*WHOLE, *SHIPPED])
def test_whole_sequences_are_those_of_the_model(name: str, place: Place) -> None:
    check_there(name, place, exported_whole, whole)


@pytest.mark.parametrize("name", [*SUBLAYERS, *WHOLE, *BLOCKS, *SHIPPED])
def test_everything_in_a_graph_is_on_the_device_of_the_model(name: str) -> None:
    """Where the default is a device without memory, nothing computes with a tensor that was made there."""
    model = built(name)
    with torch.device("meta"):
        if isinstance(model, LanguageModel):
            graphs = [export_prefill(model, 2, 8), export_step(model)]
        else:
            graphs = [export_forward(model, 2, 24)]
    for exported in graphs:
        devices = {key: each.device.type for key, each in run(exported).items()}
        assert devices == dict.fromkeys(exported.outputs, "cpu")
