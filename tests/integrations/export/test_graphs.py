"""Graphs of fixed shapes: every registered part is in one, and it computes what the model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma.configurators import Replay
from sma.errors import ConfigError, ExportError, StreamingError
from sma.interfaces import Model, Module
from sma.layer import SparselyActivated
from sma.plugins import registry
from sma_models.integrations.export import Exported, export_forward, export_prefill, export_step
from sma_models.language_model import LanguageModel
from sma_models.retrieval import Retrieval
from sma_models.stack import StackState
from tests.integrations.export.conftest import TEXT
from tests.integrations.export.parts import (
    BLOCKS,
    NORMS,
    SHIPPED,
    SUBLAYERS,
    WHOLE,
    activated,
    model_of,
    owners,
    refused,
    sublayer,
    suites,
)
from tests.models.tiny import inputs_of, tiny


def run(exported: Exported, **inputs: Tensor) -> dict[str, Tensor]:
    """Outputs by name; what is not given is that of the example."""
    given = exported.example | inputs
    with torch.no_grad():
        outputs = exported.program.module()(*(given[name] for name in exported.inputs))
    return dict(zip(exported.outputs, outputs, strict=True))


def read(model: LanguageModel, tokens: Tensor, state: StackState, lengths: Tensor) -> tuple[Tensor, StackState]:
    """Logits of the last real token of each row, and the state, by the model itself."""
    with torch.no_grad():
        out = model(tokens, state, lengths=lengths)
    assert out.state is not None
    return out.logits[torch.arange(tokens.shape[0], device=tokens.device), lengths - 1], out.state


def follow(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state after as the state before."""
    return {name.removeprefix("next_"): each for name, each in given.items() if name.startswith("next_state.")}


def check_stream(model: LanguageModel) -> None:
    """A prompt in two chunks, of rows of different lengths, and some steps of a larger batch."""
    tokens, sizes = inputs_of(model, 2, 16), (torch.tensor([8, 8]), torch.tensor([5, 8]))
    prefill, step = export_prefill(model, 2, 8), export_step(model)
    state, given = model.initial_state(2), {}
    for chunk, lengths in zip(tokens.split(8, 1), sizes, strict=True):
        logits, state = read(model, chunk, state, lengths)
        got = run(prefill, tokens=chunk, lengths=lengths, **given)
        torch.testing.assert_close(got["logits"], logits, rtol=1e-5, atol=1e-5)
        assert int(got["overflow"]) == 0
        given = follow(got)
    rows, live = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([True, True, False, True, True])
    state, given = state.reorder(rows), {name: each[rows] for name, each in given.items()}
    for token in inputs_of(model, 5, 6, seed=2).unbind(1):
        logits, state = read(model, token[:, None], state, live.long())
        got = run(step, tokens=token, live=live, **given)
        torch.testing.assert_close(got["logits"][live], logits[live], rtol=1e-5, atol=1e-5)
        given = follow(got)
    for (name, ours), theirs in zip(given.items(), state.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", SUBLAYERS)
def test_a_stream_is_that_of_the_model(name: str) -> None:
    check_stream(model_of([SUBLAYERS[name]]))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_stream_of_other_blocks(name: str) -> None:
    check_stream(tiny(name, n_layers=1))


@pytest.mark.parametrize("name", WHOLE)
def test_whole_sequences_are_those_of_the_model(name: str) -> None:
    check_whole(model_of([WHOLE[name]], n_classes=3))


def test_every_norm() -> None:
    check_whole(model_of([{"module": {"type": "ffn", "d_hidden": 8}, "norm": norm} for norm in NORMS], n_classes=3))


@pytest.mark.parametrize("name", SHIPPED)
def test_whole_sequences_of_shipped_models(name: str) -> None:
    check_whole(tiny(name, n_layers=1))


def check_whole(model: Model) -> None:
    exported, lengths = export_forward(model, 2, 24), torch.tensor([24, 13])
    inputs = inputs_of(model, 2)
    with torch.no_grad():
        if isinstance(model, Retrieval):
            sides = {"first": inputs, "second": inputs.flip(0), "first_lengths": lengths}
            got = run(exported, **sides, second_lengths=lengths)
            expected = model(inputs, inputs.flip(0), lengths=(lengths, lengths)).logits
        else:
            got = run(exported, inputs=inputs, lengths=lengths)
            expected = model(inputs, lengths=lengths).logits
    torch.testing.assert_close(got["logits"], expected, rtol=1e-5, atol=1e-5)
    assert int(got["overflow"]) == 0


def test_every_registered_part_is_in_a_graph_or_refused() -> None:
    models = [model_of([each]) for each in SUBLAYERS.values()]
    models += [model_of([each], n_classes=3) for each in WHOLE.values()]
    models += [tiny(name, n_layers=1) for name in [*BLOCKS, *SHIPPED]]
    exported = {owner for model in models for owner in owners(model.config)}
    exported |= {registry().get("norm", name) for name in NORMS}  # test_every_norm
    kinds = ("module", "mixer", "norm", "configurator", "block", "model")
    parts = {entry.target: entry.name for entry in registry().entries() if entry.kind in kinds}
    assert parts
    missing = sorted(name for target, name in parts.items() if target not in exported | refused())
    assert not missing, f"neither in a graph nor refused: {missing}"


def test_what_is_refused_is_named_with_the_reason() -> None:
    """Parts of suites that say ``exports = False``; a recorded decision has a test of its own."""
    for kind in ("module", "mixer"):
        for suite in suites(kind):
            if not getattr(suite, "exports", True):
                model = model_of([sublayer(kind, suite)], n_classes=3)
                with pytest.raises(ExportError, match=type(suite.config).owner.__name__):
                    export_forward(model, 2, 24)
    assert Replay in refused()


def test_states_are_named_in_the_order_of_the_library(trained: LanguageModel) -> None:
    step = export_step(trained, 3)
    names = [f"state.{name}" for name in trained.initial_state(1).named_tensors()]
    assert list(step.states) == names
    assert step.outputs == ("logits", *(f"next_{name}" for name in names))
    assert not step.dynamic
    with pytest.raises(AssertionError, match=r"tokens.size\(\)\[0\] == 3"):
        run(step, tokens=torch.zeros(2, dtype=torch.int64))


def test_the_model_is_left_as_it_is(trained: LanguageModel) -> None:
    before = {name: (each, each.clone()) for name, each in trained.state_dict(keep_vars=True).items()}
    exported = export_prefill(trained, 1, 8)
    for name, each in trained.state_dict(keep_vars=True).items():
        assert each is before[name][0]
        assert torch.equal(each, before[name][1])
    assert trained.stack.layers[0].activate.capacity is None  # type: ignore[union-attr]
    weight = dict(exported.program.named_parameters())["model.embedding.weight"]
    assert weight.data_ptr() == trained.embedding.weight.data_ptr(), "the graph copied the weights"


def test_autocast_around_it_changes_nothing(trained: LanguageModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        step = export_step(trained, 2)
    inside = run(step)
    for name, each in run(export_step(trained, 2)).items():
        assert torch.equal(inside[name], each), name


def test_what_finds_no_room_is_counted(trained: LanguageModel) -> None:
    exported = export_prefill(trained, 2, 20, capacity=0.05)
    with torch.no_grad():
        active = trained(tokens := torch.tensor([list(TEXT[:20])] * 2)).routings["layers.0.activate"].active
    assert int(run(exported, tokens=tokens)["overflow"]) == int(active.sum()) - 2 > 0


class Deepest(Module):
    """Reads a value back to decide what it does."""

    layout = "packed"
    streams = True

    def initial_state(self, batch: int, like: Tensor) -> None:
        return None

    def forward(self, x: Tensor, packed: Any, state: Any = None) -> Tensor:
        return x * 2 if int(packed.lengths.max()) > 3 else x


def put(model: Any, module: nn.Module, window: int | None = None) -> Any:
    """The model with another module in its layer."""
    old = model.stack.layers[0].sublayers[0].activate
    new = SparselyActivated(module, old.configurator, d_model=8, causal=old.causal).with_window(window).eval()
    model.stack.layers[0].sublayers[0].activate = new
    return model


LAYER = "stack.layers.0.sublayers.0.activate"


@pytest.mark.parametrize("export", [lambda model: export_prefill(model, 1, 8), export_step])
def test_what_cannot_be_exported_is_named_with_the_reason(export: Callable[[Any], Exported]) -> None:
    model = put(model_of([activated()]), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), window=4)
    with pytest.raises(ExportError, match=rf"{LAYER}: cannot be exported: TransformerEncoderLayer .* 'padded'"):
        export(model)
    model = put(model_of([activated()]), Deepest(Deepest.Config(), d_model=8, causal=True))
    with pytest.raises(ExportError, match=rf"{LAYER}.module \(Deepest\): .* depend on values"):
        export(model)


def test_a_recorded_decision_says_so() -> None:
    model = model_of([activated()])
    routing = model(inputs_of(model, 1, 8)).routings["layers.0.sublayers.0.activate"]
    layer = model.stack.layers[0].sublayers[0].activate
    layer.configurator, layer.router = Replay.of(routing), None
    for export in (lambda: export_prefill(model, 1, 8), lambda: export_step(model, 1)):
        with pytest.raises(ExportError, match=rf"{LAYER}.configurator \(Replay\): .* depend on values"):
            export()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda model: model.train(), {}, "model: must be in evaluation mode to be exported"),
        (
            lambda model: model.double(),
            {},
            "model: must be in float32, bfloat16 or float16 on the CPU or a CUDA device",
        ),
        (lambda model: model.to("meta"), {}, "model: must be in float32, .* embedding.weight is torch.float32 on meta"),
        (
            lambda model: model.apply(lambda part: part.half() if isinstance(part, nn.Linear) else part),
            {},
            "model: must be in one dtype on one device to be exported, embedding.weight is torch.float32 on cpu, "
            r"stack.* is torch.float16 on cpu",
        ),
        (lambda model: model, {"chunk": 0}, "chunk: must be at least 1, got 0"),
        (lambda model: model, {"batch": -1}, "batch: must be at least 1, got -1"),
        (lambda model: model, {"capacity": 1.5}, r"capacity: must lie in \(0, 1\], got 1.5"),
        (lambda model: nn.Linear(2, 2), {}, "model: must be a model of this library, got Linear"),
        (lambda model: tiny("seqboat_text"), {}, "model: must be a LanguageModel, got Classifier"),
    ],
)
def test_bad_arguments(change: Callable[[Any], Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_prefill(change(tiny("seqboat_lm")), **arguments)


def test_a_model_that_does_not_stream_says_why() -> None:
    model = model_of([{"module": {"type": "attention", "n_heads": 2}}])
    with pytest.raises(StreamingError, match="no bounded memory"):
        export_step(model)
