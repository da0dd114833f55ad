"""What a model does not take is refused before any work, with one clear error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sma
from sma.errors import ConfigError, RoutingError, ShapeError, StreamingError
from sma.interfaces import Model
from sma_models.classifier import Classifier
from sma_models.hybrid import Hybrid, SublayerConfig
from sma_models.language_model import LanguageModel
from sma_models.retrieval import Retrieval
from sma_modules.mixers.ema import EMA
from sma_modules.modules.ffn import FFN
from tests.models.tiny import tiny

BLOCK = Hybrid.Config(sublayers=(SublayerConfig(mixer=EMA.Config(n_state=2)), SublayerConfig(module=FFN.Config())))
COMMON: dict[str, Any] = {"d_model": 4, "n_layers": 1, "blocks": (BLOCK,)}


def language_model() -> Model:
    return LanguageModel.Config(**COMMON, vocab_size=5).build()


def classifier(vocab_size: int | None = 5) -> Model:
    return Classifier.Config(**COMMON, vocab_size=vocab_size, n_classes=2).build()


@pytest.mark.parametrize("build", [language_model, classifier])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 3), r"tokens must be integers of shape \(B, L\), got torch.float32 \(2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.bool), "got torch.bool"),
        (torch.zeros(3, dtype=torch.int64), r"got torch.int64 \(3,\)"),
        (torch.zeros(0, 3, dtype=torch.int64), r"at least one sequence, got \(0, 3\)"),
        (torch.full((1, 3), 5), r"tokens must lie in 0\.\.4, got 5"),
        (torch.full((1, 3), -1), r"tokens must lie in 0\.\.4, got -1"),
    ],
)
def test_tokens_that_are_none(build: Any, tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        build()(tokens)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), r"values must be floats of shape \(B, L\)"),
        (torch.zeros(2, 3, 1), r"got torch.float32 \(2, 3, 1\)"),
        (torch.zeros(0, 3), "B > 0"),
        (torch.tensor([[0.0, float("nan")]]), "values must be finite"),
        (torch.tensor([[0.0, float("inf")]]), "values must be finite"),
        (torch.zeros(2, 0), r"at least one token, got \(2, 0\)"),
    ],
)
def test_values_that_are_none(values: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        classifier(None)(values)


def test_masks_that_do_not_fit() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    for valid in (torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool)):
        with pytest.raises(ShapeError, match=r"valid: must be bool of shape \(2, 3\)"):
            language_model()(tokens, valid=valid)
        with pytest.raises(ShapeError, match=r"valid: must be bool of shape \(2, 3\)"):
            classifier()(tokens, valid=valid)


def test_a_row_of_padding_is_answered() -> None:
    valid = torch.tensor([[True, True, False], [False] * 3])
    assert classifier()(torch.zeros(2, 3, dtype=torch.int64), valid=valid).logits.isfinite().all()
    assert language_model()(torch.zeros(2, 3, dtype=torch.int64), valid=valid).logits.isfinite().all()


def test_lengths_zero_and_one() -> None:
    model = language_model()
    assert model(torch.zeros(2, 0, dtype=torch.int64)).logits.shape == (2, 0, 5)
    assert model(torch.zeros(2, 1, dtype=torch.int64)).logits.shape == (2, 1, 5)


def test_models_that_read_whole_sequences_do_not_stream() -> None:
    for model in (classifier(), Retrieval.Config(**COMMON, vocab_size=5).build()):
        with pytest.raises(StreamingError, match="reads whole sequences, it does not stream"):
            model.initial_state(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 1}, "vocab_size: must be at least 2, got 1"),
        ({"vocab_size": 5, "n_layers": 0}, "n_layers: must be at least 1, got 0"),
        ({"vocab_size": 5, "blocks": ()}, r"blocks: must hold 1 to n_layers = 1 blocks, got \(\)"),
        ({"vocab_size": 5, "d_model": 0}, "d_model: must be at least 1, got 0"),
        ({"vocab_size": 5, "dropout": 1.0}, r"dropout: must lie in \[0, 1\), got 1.0"),
    ],
)
def test_sizes_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LanguageModel.Config(**{**COMMON, **options})


def retrieval() -> Retrieval:
    model: Retrieval = Retrieval.Config(**COMMON, vocab_size=5).build()
    return model


TOKENS = torch.tensor([[1, 2, 3], [4, 0, 1]])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("build", [language_model, classifier])
def test_integers_of_any_size_are_tokens(build: Any, dtype: torch.dtype) -> None:
    model = build()
    assert torch.equal(model(TOKENS.to(dtype)).logits, model(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_values_of_any_precision_are_taken(dtype: torch.dtype) -> None:
    model, values = classifier(None), torch.tensor([[0.5, -1.0, 2.0]])
    assert torch.equal(model(values.to(dtype)).logits, model(values).logits)


@pytest.mark.parametrize("inputs", [TOKENS.to(torch.complex64), TOKENS.to("meta"), TOKENS.tolist(), None])
@pytest.mark.parametrize("build", [language_model, classifier, lambda: classifier(None)])
def test_what_is_no_input_at_all(build: Any, inputs: Any) -> None:
    rule = "must be (integers|floats) of shape|must be on the device of the model, cpu, got meta|must be a tensor"
    with pytest.raises(ShapeError, match=rule):
        build()(inputs)


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), "got torch.int64"),
        (torch.ones(3, 2, dtype=torch.bool), r"got torch.bool \(3, 2\)"),
        (torch.ones(2, dtype=torch.bool), r"got torch.bool \(2,\)"),
        (torch.ones(2, 3, dtype=torch.bool, device="meta"), "on the device of the input, cpu, got meta"),
        ([[True] * 3] * 2, "a bool tensor .* got list"),
    ],
    ids=["integers", "transposed", "one row", "device", "list"],
)
def test_masks_that_are_none(valid: Any, message: str) -> None:
    sinusoidal = Classifier.Config(**COMMON, vocab_size=5, n_classes=2, positions="sinusoidal").build()
    for model in (language_model(), classifier(), sinusoidal):
        with pytest.raises(ShapeError, match="valid: must be .*" + message):
            model(TOKENS, valid=valid)
    with pytest.raises(ShapeError, match="valid: must be .*" + message):
        retrieval()(TOKENS, TOKENS, valid=(None, valid))


def test_padding_may_hold_anything() -> None:
    valid = torch.tensor([[False, True, True], [True, True, False]])
    bad = TOKENS.masked_fill(~valid, -100)
    for model in (language_model().eval(), classifier().eval()):
        torch.testing.assert_close(model(bad, valid=valid).logits, model(TOKENS, valid=valid).logits)
    values, model = TOKENS.float(), classifier(None).eval()
    expected = model(values, valid=valid).logits
    torch.testing.assert_close(model(values.masked_fill(~valid, float("nan")), valid=valid).logits, expected)
    with pytest.raises(ShapeError, match="values must be finite"):
        model(values.masked_fill(valid, float("nan")), valid=valid)
    with pytest.raises(ShapeError, match=r"tokens must lie in 0\.\.4, got -100"):
        language_model()(TOKENS.masked_fill(valid, -100), valid=valid)


@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("positions", ["none", "sinusoidal"])
def test_nothing_but_padding_has_a_result_and_gradients(pool: Any, positions: Any) -> None:
    model = Classifier.Config(**COMMON, vocab_size=5, n_classes=2, pool=pool, positions=positions).build()
    logits = model(TOKENS, valid=torch.zeros(2, 3, dtype=torch.bool)).logits
    assert torch.equal(logits[0], logits[1])
    logits.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    language = language_model()
    language(TOKENS, valid=torch.zeros(2, 3, dtype=torch.bool)).logits.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in language.parameters())


def test_a_length_of_zero_leaves_the_state_and_has_gradients() -> None:
    model = language_model()
    state = model(TOKENS, model.initial_state(2)).state
    out = model(TOKENS[:, :0], state)
    assert all(map(torch.equal, out.state.tensors(), state.tensors()))
    model(TOKENS[:, :0]).logits.sum().backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.parameters())


def test_pairs_that_do_not_fit() -> None:
    model = retrieval()
    with pytest.raises(ShapeError, match=r"both sides must hold as many sequences, got \(2, 3\) and \(1, 3\)"):
        model(TOKENS, TOKENS[:1])
    with pytest.raises(ShapeError, match=r"valid must be a pair, .* got Tensor"):
        model(TOKENS, TOKENS, valid=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="at least one token"):
        model(TOKENS, TOKENS[:, :0])
    with pytest.raises(ShapeError, match="the input must be a tensor"):
        model(TOKENS, None)


def test_states_that_do_not_fit() -> None:
    model = language_model()
    deeper = LanguageModel.Config(**{**COMMON, "n_layers": 2}, vocab_size=5).build()
    with pytest.raises(StreamingError, match="state: must be of 2 sequences like the input, got 3"):
        model(TOKENS, model.initial_state(3))
    with pytest.raises(StreamingError, match="state: must be of a model of 1 layers, got of 2 layers"):
        model(TOKENS, deeper.initial_state(2))
    with pytest.raises(StreamingError, match="state: must be of a model of 1 layers, got Tensor"):
        model(TOKENS, torch.zeros(2, 4))


def test_replays_that_do_not_fit() -> None:
    model = tiny("seqboat_small_lm")
    routings = model(TOKENS).routings
    name = next(iter(routings))
    with pytest.raises(
        RoutingError, match=r"replay\['layers.0.activate'\]: must be of \(B, L\) = \(2, 2\), got \(2, 3\)"
    ):
        model(TOKENS[:, :2], replay=routings)
    with pytest.raises(RoutingError, match=r"no layer 'layers.9.activate' decides; there are layers.0.activate"):
        model(TOKENS, replay={"layers.9.activate": routings[name]})
    with pytest.raises(RoutingError, match=r"no layer 'layers.0.activate' decides; there are none"):
        language_model()(TOKENS, replay={"layers.0.activate": routings[name]})
    with pytest.raises(RoutingError, match=r"names begin with 'first.' or 'second.'"):
        retrieval()(TOKENS, TOKENS, replay=routings)
    partial = model(TOKENS, replay={name: routings[name]})  # the other layers decide for themselves
    assert torch.equal(partial.logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(2, 3, 4, dtype=torch.float64), {}, "x must be torch.float32 like the layer, got torch.float64"),
        (torch.zeros(2, 3, 4, device="meta"), {}, "x must be on the device of the layer, cpu, got meta"),
        (
            torch.zeros(2, 3, 4),
            {"logits": torch.zeros(3, 2, 2)},
            r"logits must hold .* \(2, 3, 1, 2\), got \(3, 2, 2\)",
        ),
        (
            torch.zeros(2, 3, 4),
            {"logits": torch.full((2, 3, 2), float("nan"))},
            "x must be finite, it .or its logits. hold NaN",
        ),
    ],
    ids=["dtype", "device", "transposed logits", "logits that are NaN"],
)
def test_layers_say_what_they_take(x: torch.Tensor, options: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ShapeError, match="SparselyActivated: " + message):
        sma.SparselyActivated(nn.Linear(4, 4))(x, **options)


def test_a_layer_runs_in_another_precision_under_autocast() -> None:
    layer, x = sma.SparselyActivated(nn.Linear(4, 4)), torch.randn(2, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x.bfloat16()).output
    torch.testing.assert_close(out.float(), layer(x).output, atol=0.05, rtol=0.05)
