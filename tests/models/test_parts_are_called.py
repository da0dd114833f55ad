"""What is hung on a part of a model works in steps of decoding as well, also on a decoder that is running."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize

from sma.errors import StreamingError
from sma.testing.called import hooked
from sma_models.inference import Decoder
from sma_models.language_model import LanguageModel
from tests.models.tiny import SPECS, inputs_of, tiny

LANGUAGE_MODELS = [name for name in SPECS if name.endswith("_lm")]
every_language_model = pytest.mark.parametrize("name", LANGUAGE_MODELS)
START, LENGTH = 4, 12


def double(name: str) -> LanguageModel:
    model: LanguageModel = deepcopy(tiny(name)).double().eval()
    return model


def whole(model: LanguageModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in model.named_modules() if type(part).forward is not nn.Module.forward}


def assert_steps(decoder: Decoder, tokens: Tensor, expected: Tensor, start: int = START) -> None:
    for t in range(start, tokens.shape[1]):
        torch.testing.assert_close(decoder.step(tokens[:, t]), expected[:, t], rtol=1e-9, atol=1e-9)


@every_language_model
def test_hooks_run_in_steps(name: str) -> None:
    model = double(name)
    tokens = inputs_of(model, batch=2, length=LENGTH)
    expected, parts = whole(model, tokens), parts_of(model)
    decoder = Decoder(model, 2)
    decoder.join_all(tokens[:, :START])
    with hooked(parts) as fired:
        assert_steps(decoder, tokens, expected)
        assert decoder.uncaptured[""] == "has hooks: a CUDA graph would not run them"
    assert {part for kind, part in fired if kind == "forward"} == set(parts)


@every_language_model
def test_hooks_on_each_part_alone(name: str) -> None:
    model = double(name)
    tokens = inputs_of(model, batch=2, length=10)
    expected = whole(model, tokens)
    decoder = Decoder(model, 2)
    for part, module in parts_of(model).items():
        with hooked({part: module}) as fired:
            for slot in decoder.occupied:
                decoder.leave(slot)
            decoder.join_all(tokens[:, :START])
            fired.clear()
            assert_steps(decoder, tokens, expected)
            assert ("forward", part) in fired, part
            assert part.removeprefix("stack.") in decoder.uncaptured


def test_plain_again() -> None:
    model = double("seqboat_small_lm")
    decoder = Decoder(model, 1)
    assert not decoder.uncaptured
    with hooked(parts_of(model)):
        decoder.refresh()
        assert decoder.uncaptured
    assert Decoder(model, 1).uncaptured == {}


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Shouting(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 1.5 * super().forward(input)


def replaced(linear: nn.Linear) -> nn.Linear:
    other = Shouting(linear.in_features, linear.out_features, linear.bias is not None).to(linear.weight)
    other.load_state_dict(linear.state_dict())
    return other


def patched(part: Any) -> Any:
    forward = part.forward
    part.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.5
    return part


def kept(change: Callable[[Any], object]) -> Callable[[Any], Any]:
    def apply(part: Any) -> Any:
        change(part)
        return part

    return apply


ON_PROJECTIONS: dict[str, Callable[[Any], Any]] = {
    "parametrised": kept(lambda part: parametrize.register_parametrization(part, "weight", Halved())),
    "weight norm": kept(parametrizations.weight_norm),
    "spectral norm": kept(lambda part: parametrizations.spectral_norm(part).eval()),
    "old weight norm": kept(torch.nn.utils.weight_norm),
    "old spectral norm": kept(lambda part: torch.nn.utils.spectral_norm(part).eval()),
    "pruned": kept(lambda part: torch.nn.utils.prune.l1_unstructured(part, "weight", 0.5)),
    "replaced": replaced,
    "own forward": patched,
}
ON_PARTS: dict[str, Callable[[Any], Any]] = {
    "checkpointed": checkpoint_wrapper,
    "compiled": lambda part: torch.compile(part, backend="eager"),
    "compiled in place": kept(lambda part: part.compile(backend="eager")),
}
PROJECTIONS = (
    "stack.layers.0.skip_proj",
    "stack.layers.0.activate.module.mx_proj",
    "stack.layers.1.activate.module.h_proj",
)
PARTS = (
    "stack.layers.1",
    "stack.layers.0.mixer",
    "stack.layers.0.activate",
    "stack.layers.0.activate.module",
    "stack.layers.0.activate.configurator",
    "stack.layers.0.norm",
    "stack.layers.0.dropout",
    "embedding",
    "stack",
)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated", "ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("change", "name"),
    [(change, name) for change in ON_PROJECTIONS for name in PROJECTIONS]
    + [(change, name) for change in ON_PARTS for name in PARTS],
)
def test_what_is_put_around_or_in_place_of_a_part(change: str, name: str) -> None:
    """In training, whole, in chunks and in steps."""
    torch.manual_seed(3)
    model = double("seqboat_small_lm")
    parent, _, own = name.rpartition(".")
    part = model.get_submodule(name)
    setattr(model.get_submodule(parent), own, (ON_PROJECTIONS | ON_PARTS)[change](part))
    tokens = inputs_of(model, batch=2, length=LENGTH)
    expected = whole(model, tokens)
    if change in ON_PARTS:
        torch.testing.assert_close(expected, whole(double("seqboat_small_lm"), tokens))
    else:
        assert not torch.equal(expected, whole(double("seqboat_small_lm"), tokens)) or "weight norm" in change
    decoder = Decoder(model, 2, prefill_chunk=3)
    decoder.join_all(tokens[:, :START])
    assert_steps(decoder, tokens, expected)
    model.train()(tokens).logits.square().sum().backward()
    assert all(each.grad is not None for each in model.parameters())


def test_a_running_decoder_notices() -> None:
    """Sequences go on from where they stand."""
    model = double("seqboat_small_lm")
    tokens = inputs_of(model, batch=3, length=LENGTH)
    expected = whole(model, tokens)
    decoder = Decoder(model, 3, rollback=2)
    decoder.join_all(tokens[:, :START])
    decoder.leave(1)
    some = torch.tensor([0, 2])
    torch.testing.assert_close(decoder.step(tokens[:, START])[some], expected[some, START])
    layer = model.stack.layers[0]
    layer.mixer = torch.compile(layer.mixer, backend="eager")
    torch.testing.assert_close(decoder.step(tokens[:, START + 1])[some], expected[some, START + 1])
    assert list(decoder.uncaptured) == ["layers.0.mixer"]
    decoder.take_back(0, 1)
    torch.testing.assert_close(decoder.step({0: int(tokens[0, START + 1])})[0], expected[0, START + 1])
    layer.skip_proj.register_forward_hook(lambda *_: None)
    decoder.step(tokens[:, START + 2])
    with pytest.raises(StreamingError, match="can take back up to 1 tokens, got 2"):
        decoder.take_back(2, 2)
    assert decoder.uncaptured["layers.0.skip_proj"] == "has hooks: a CUDA graph would not run them"
    torch.testing.assert_close(decoder.step(tokens[:, START + 3])[some], expected[some, START + 3])


def test_weights_that_were_replaced_are_noticed() -> None:
    model, other = double("seqboat_small_lm"), tiny("seqboat_small_lm", 7).double()
    tokens = inputs_of(model, batch=1, length=LENGTH)
    decoder = Decoder(model, 1)
    model.load_state_dict(other.state_dict(), assign=True)
    decoder.refresh()
    decoder.join(tokens[0, :START])
    assert_steps(decoder, tokens, whole(model, tokens))
